"""What is compared: models, shapes, and what lies where under target/bench. Imports nothing heavy: the launch is measured too."""

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "target" / "bench"
# Samples of one rank in one step of `parts.rs`.
MICRO_BATCH = 4
# Of the peer's random weights, of the data, and of the draws that both must turn into one loss.
SEED = 20
DTYPES = ["float32", "bfloat16"]


@dataclass(frozen=True)
class Case:
    """A model of diffusers, its adapter, and the shapes of one sample's tensors."""

    name: str
    # Class of diffusers, and its arguments.
    model: str
    config: dict
    # The model's table in our configuration.
    table: str
    adapter: str
    data_type: str
    keys: dict[str, list[int]]
    # Arguments of the peer's pipeline, which are also keys of our `[flow_matching]`.
    pipeline: dict = field(default_factory=dict)
    # Devices on which it is compared unless it is named.
    devices: tuple[str, ...] = ("cpu",)
    # Samples of one rank in one step, and of the dataset: enough for an epoch that is no step.
    micro_batch: int = 4
    samples: int = 64
    # False for models whose files would take longer than their steps: each side draws weights of its own.
    shares_weights: bool = True
    # Of both sides: blocks' activations are computed again in the backward pass.
    recompute: bool = False

    @property
    def folder(self) -> Path:
        return BENCH / self.name

    @property
    def weights(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "data"


def flux(name: str, case: dict | None = None, channels: int = 4, **size: int | list[int]) -> Case:
    joint, pooled, latents, tokens = size.pop("joint"), size.pop("pooled"), size.pop("latents"), size.pop("tokens")
    config = {"patch_size": 1, "in_channels": 4 * channels, "joint_attention_dim": joint, "pooled_projection_dim": pooled, "guidance_embeds": True}
    keys = {"image_latents": [channels, latents, latents], "text_embeddings": [tokens, joint], "pooled_prompt_embeds": [pooled]}
    return Case(name, "FluxTransformer2DModel", config | size, "flux", "flux", "image", keys, **(case or {}))


def wan(name: str, latents: list[int], case: dict | None = None, **size: int) -> Case:
    tokens = size.pop("tokens")
    config = {"in_channels": 16, "out_channels": 16, "freq_dim": 256}
    keys = {"video_latents": [16, *latents], "text_embeddings": [tokens, size["text_dim"]]}
    # The task type is a draw of Python's own generator, and changes nothing for this model.
    return Case(name, "WanTransformer3DModel", config | size, "wan", "simple", "video", keys, {"i2v_prob": 0.0}, **(case or {}))


# Published widths and lengths: FLUX.1-dev's of 1024 x 1024 pixels, Wan 2.1 1.3B's of 17 frames of 480 x 832 and of 81 of 720 x 1280.
LARGE = {"devices": ("cuda",), "micro_batch": 1, "samples": 8, "shares_weights": False}
DEV = {
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "axes_dims_rope": [16, 56, 56],
    "joint": 4096,
    "pooled": 768,
    "latents": 128,
    "tokens": 512,
    "channels": 16,
}
WAN_1B = {"num_layers": 30, "attention_head_dim": 128, "num_attention_heads": 12, "ffn_dim": 8960, "text_dim": 4096, "tokens": 512}
# Their step is told beside `check`, alone, and not by `steps`.
OFFLOADED = "flux-6b"
# Its step with a LoRA is told beside that of training all of it.
ADAPTED = "flux-71m"


CASES = [
    flux(
        "flux-71m",
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=8,
        axes_dims_rope=[16, 24, 24],
        joint=256,
        pooled=128,
        latents=32,
        tokens=64,
        case={"devices": ("cpu", "cuda")},
    ),
    wan(
        "wan-70m",
        num_layers=16,
        attention_head_dim=64,
        num_attention_heads=8,
        ffn_dim=2048,
        text_dim=256,
        latents=[5, 16, 16],
        tokens=64,
    ),
    flux(
        "flux-tiny",
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        axes_dims_rope=[8, 12, 12],
        joint=64,
        pooled=32,
        latents=16,
        tokens=16,
    ),
    wan(
        "wan-tiny",
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        ffn_dim=512,
        text_dim=64,
        latents=[3, 8, 8],
        tokens=16,
    ),
    flux("flux-2.6b", LARGE, num_layers=4, num_single_layers=8, **DEV),
    wan("wan-1.3b", [5, 60, 104], LARGE, **WAN_1B),
    wan("wan-1.3b-720p", [21, 90, 160], LARGE | {"devices": (), "samples": 2, "recompute": True}, **WAN_1B),
    flux(OFFLOADED, LARGE | {"devices": (), "samples": 4, "recompute": True}, num_layers=9, num_single_layers=19, **DEV),
]


def case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
