"""What is compared: models, shapes, and what lies where under target/bench. Imports nothing heavy: the launch is measured too."""

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "target" / "bench"
# Samples of one rank in one step.
MICRO_BATCH = 4
# Samples of a dataset: enough for an epoch that is no step.
SAMPLES = 64
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

    @property
    def folder(self) -> Path:
        return BENCH / self.name

    @property
    def weights(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "data"


def flux(name: str, **size: int | list[int]) -> Case:
    joint, pooled, latents, tokens = size.pop("joint"), size.pop("pooled"), size.pop("latents"), size.pop("tokens")
    config = {"patch_size": 1, "in_channels": 16, "joint_attention_dim": joint, "pooled_projection_dim": pooled, "guidance_embeds": True}
    keys = {"image_latents": [4, latents, latents], "text_embeddings": [tokens, joint], "pooled_prompt_embeds": [pooled]}
    return Case(name, "FluxTransformer2DModel", config | size, "flux", "flux", "image", keys)


def wan(name: str, **size: int) -> Case:
    frames, latents, tokens = size.pop("frames"), size.pop("latents"), size.pop("tokens")
    config = {"in_channels": 16, "out_channels": 16, "freq_dim": 256}
    keys = {"video_latents": [16, frames, latents, latents], "text_embeddings": [tokens, size["text_dim"]]}
    # The task type is a draw of Python's own generator, and changes nothing for this model.
    return Case(name, "WanTransformer3DModel", config | size, "wan", "simple", "video", keys, {"i2v_prob": 0.0})


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
    ),
    wan(
        "wan-70m",
        num_layers=16,
        attention_head_dim=64,
        num_attention_heads=8,
        ffn_dim=2048,
        text_dim=256,
        frames=5,
        latents=16,
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
        frames=3,
        latents=8,
        tokens=16,
    ),
]


def case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
