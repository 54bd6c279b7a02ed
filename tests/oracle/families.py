"""Runs one training step of tiny random models of the five real families under NeMo AutoModel, and writes what went in and came out.

    python families.py OUT_DIR SEED [--families flux,flux2,qwen_image,wan,hunyuan_video15] [--cases N] [--device cuda] [--draws device] [--verbose]

Needs torch 2.13.0, diffusers 0.42.1, nemo-automodel 0.5.0 and safetensors; takes 25 s, half of it imports, and 300 MB of disk, most of
it the 2048 x 2048 layer that every HunyuanVideo 1.5 has. SEED alone decides every draw, a family's cases whatever the other families are.
N cases a family (6), then one for each better behaviour of ours that diffusers can judge. Writes

cases.json                          one entry a case: name, family, folder, dtype, seed, settings (keys of our configuration and their
                                    values), vanishing_gradients (parameters whose true gradient is zero: only rounding is left of it)
<family>-<number>/model/            a diffusers folder, in a third of the cases with shards and their index
<family>-<number>/batch.safetensors the batch's tensors under their keys, data_type in the metadata
<family>-<number>/expected.safetensors
                                    sigma timesteps noise noisy_latents model_pred target loss_weight unweighted_loss weighted_loss
                                    average_unweighted_loss average_weighted_loss, all f32, and `grad.<name>` of every parameter in the
                                    parameter's kind, zeros where the step does not reach it
<family>-<number>/exact.safetensors of a case in bfloat16: the same from the same weights in float32

A case repeats so: `manual_seed(seed)`, then `step` on the batch with the model loaded in `dtype`; Python's own generator decides nothing,
since `i2v_prob` is 0 or 1, and so is `cfg_dropout_prob` for qwen_image. It runs on one thread, so that no sum depends on the machine.
On a GPU the package's draws are those of the GPU's generator (`--draws device`), or by our patch those of the CPU's (`--draws host`).

Longer than the house's files are: one draw a family, and what they share reads best beside them.
"""

import argparse
import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)
from diffusers.utils import logging
from draws import drawn_by_the_host
from flow_matching import DTYPES, SAMPLINGS, WEIGHTINGS, Recorder, deck
from nemo_automodel.components.flow_matching.adapters import FluxAdapter, ModelAdapter, QwenImageAdapter, SimpleAdapter
from nemo_automodel.components.flow_matching.pipeline import FlowMatchingPipeline, create_adapter
from safetensors.torch import load_file, save_file

# The context of the text encoder, which diffusers' image-conditioned Wan takes for granted.
WAN_TEXT_LENGTH = 512
# What the reference's FLUX adapter makes up where a batch has no pooled text.
DEFAULT_POOLED_WIDTH = 768
MAX_WIDTH = 128
# Reads cosines and sines of up to a thousand radians. As in trained models the fastest quarter of them counts less; else the last bit
# of a timestep, which no other program must hit, would be seen far above the rounding of everything else.
TIME = re.compile(r"(timestep|time)_embedder\.linear_1\.weight$")


class Flux(FluxAdapter):
    """The reference's, but guidance goes only to models that embed it, and padding can be masked."""

    def __init__(self, use_text_mask: bool = False, **arguments):
        super().__init__(**arguments)
        self.use_text_mask = use_text_mask

    def prepare_inputs(self, context):
        inputs = super().prepare_inputs(context)
        if self.use_text_mask:
            text = context.batch["text_mask"].bool()
            image = torch.ones(inputs["hidden_states"].shape[:2], dtype=torch.bool, device=text.device)
            inputs["attention"] = {"attention_mask": torch.cat([text, image], dim=1)[:, None, None]}
        return inputs

    def forward(self, model, inputs):
        if not model.config.guidance_embeds:
            inputs["guidance"] = None
        return super().forward(partial(model, joint_attention_kwargs=inputs.get("attention")), inputs)


class QwenImage(QwenImageAdapter):
    """The reference's, but padding can be masked."""

    def __init__(self, use_text_mask: bool = False, **arguments):
        super().__init__(**arguments)
        self.use_text_mask = use_text_mask

    def prepare_inputs(self, context):
        mask = context.batch["text_mask"] if self.use_text_mask else None
        return super().prepare_inputs(context) | {"encoder_hidden_states_mask": mask}


class Wan(SimpleAdapter):
    """The reference's, but image-conditioned models get their condition: channels behind the noisy ones, and an image's embedding."""

    def __init__(self, image_conditioning: bool = False):
        self.image_conditioning = image_conditioning

    def prepare_inputs(self, context):
        inputs = super().prepare_inputs(context)
        if self.image_conditioning:
            condition = context.batch["condition_latents"].to(context.dtype)
            inputs["hidden_states"] = torch.cat([inputs["hidden_states"], condition], dim=1)
            inputs["image_embeds"] = context.batch.get("image_embeds")
        return inputs

    def forward(self, model, inputs):
        image = inputs.get("image_embeds")
        if image is None or model.config.image_dim is None:
            return super().forward(model, inputs)
        return super().forward(partial(model, encoder_hidden_states_image=image.to(inputs["timestep"].dtype)), inputs)


OUR_ADAPTERS = {"flux": Flux, "qwen_image": QwenImage, "simple": Wan}


class Dice:
    """All draws of one family."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self.decks: dict[str, Iterator] = {}
        self.generator = torch.Generator()

    def begin_case(self) -> None:
        """Fixes what the whole case shares: the tensors' generator and the kind they are stored in."""
        self.generator.manual_seed(self.random.getrandbits(32))
        self.stored = self.deal("stored", [torch.float32, torch.float16, torch.bfloat16])
        self.size = self.deal("size", [1, 2, 3])

    def deal(self, name: str, values: list):
        """The next value of a deck: every value once before any comes again."""
        if name not in self.decks:
            self.decks[name] = deck(self.random, values)
        return next(self.decks[name])

    def between(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.stored)

    def heads(self, head_dims: list[int]) -> tuple[int, int]:
        """Number of heads and their width."""
        head_dim = self.deal("head_dim", head_dims)
        return self.between(1, min(4, MAX_WIDTH // head_dim)), head_dim

    def axes(self, head_dim: int, count: int) -> list[int]:
        """A head cut into even parts, one for each axis of the rotary embedding."""
        cuts = sorted(self.random.sample(range(1, head_dim // 2), count - 1))
        return [2 * (end - start) for start, end in zip([0, *cuts], [*cuts, head_dim // 2], strict=True)]

    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens, never as many of the one as of the other."""
        rows, columns = self.random.sample(range(1, 6), 2)
        return rows, columns

    def text(self, features: int, flat: bool = False) -> torch.Tensor:
        """Text embeddings; with `flat`, that of a batch of one may come without its first axis."""
        tensor = self.normal(self.size, self.between(2, 9), features)
        return tensor[0] if flat and self.size == 1 and self.deal("flat", [True, False]) else tensor

    def mask(self, length: int, shortest: int, kind: str) -> torch.Tensor:
        """Which of `length` tokens count: all, a beginning of each row (two or more in the longest), or some anywhere."""
        if kind == "ones":
            mask = torch.ones(self.size, length, dtype=torch.bool)
        elif kind == "prefix":
            longest = self.between(2, length)
            lengths = [longest, *(self.between(shortest, longest) for _ in range(self.size - 1))]
            self.random.shuffle(lengths)
            mask = torch.arange(length) < torch.tensor(lengths)[:, None]
        else:
            mask = torch.rand((self.size, length), generator=self.generator) < 0.6
            mask[0, -1] = True
        return mask.to(self.deal("mask kind", [torch.int64, torch.float32, torch.bool]))


@dataclass
class Draw:
    """A case but for what all families share."""

    model: type
    config: dict
    batch: dict[str, torch.Tensor]
    adapter_type: str
    adapter: dict = field(default_factory=dict)
    pipeline: dict = field(default_factory=dict)
    data_type: str = "image"
    # Names of parameters that the step may leave without gradient, as regular expressions.
    unreached: list[str] = field(default_factory=list)
    # The same for parameters whose gradient cancels: a bias of all keys shifts all scores of a query alike.
    vanishing: str = "$^"


def last_text_branch(block: int, feed_forward: str) -> str:
    """What only makes the text that nobody reads behind the last joint block."""
    return rf"transformer_blocks\.{block}\.({feed_forward}|attn\.(to_add_out|add_q_proj|norm_added_q))\."


def flux(dice: Dice, better: dict) -> Draw:
    (heads, head_dim), (rows, columns), channels = dice.heads([8, 16, 24, 32]), dice.grid(), dice.between(1, 4)
    pooled = dice.deal("pooled", ["pooled_prompt_embeds", "clip_pooled", ""])
    config = {
        "in_channels": 4 * channels,
        "out_channels": dice.deal("out_channels", [None, 4 * channels]) and 4 * channels,
        "num_layers": dice.deal("num_layers", [1, 2]),
        "num_single_layers": dice.deal("num_single_layers", [0, 1, 2]),
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": dice.between(5, 40),
        "pooled_projection_dim": dice.between(4, 24) if pooled else DEFAULT_POOLED_WIDTH,
        "guidance_embeds": dice.deal("guidance_embeds", [True, False]),
        "axes_dims_rope": dice.axes(head_dim, 3),
    }
    batch = {
        "image_latents": dice.normal(dice.size, channels, 2 * rows, 2 * columns),
        "text_embeddings": dice.text(config["joint_attention_dim"], flat="use_text_mask" not in better),
    }
    if pooled:
        batch[pooled] = dice.normal(dice.size, config["pooled_projection_dim"])[0 if batch["text_embeddings"].ndim == 2 else slice(None)]
    if "use_text_mask" in better:
        batch["text_mask"] = dice.mask(batch["text_embeddings"].shape[1], 1, dice.deal("mask", ["anywhere", "prefix"]))
    dropout = dice.deal("dropout", [0.0, 0.0, 0.5, 1.0])
    unreached = [r"context_embedder\.weight", r"time_text_embed\.text_embedder\.linear_1\.weight"] if dropout else []
    if not pooled:
        unreached.append(r"time_text_embed\.text_embedder\.linear_1\.weight")
    if config["num_single_layers"] == 0:
        unreached.append(last_text_branch(config["num_layers"] - 1, "ff_context"))
    adapter = {"guidance_scale": dice.deal("guidance_scale", [3.5, 1.0, 4.25])}
    return Draw(FluxTransformer2DModel, config, batch, "flux", adapter, {"cfg_dropout_prob": dropout}, unreached=unreached)


def flux2(dice: Dice, _better: dict) -> Draw:
    (heads, head_dim), (rows, columns), channels = dice.heads([8, 16, 24, 32]), dice.grid(), dice.between(2, 12)
    config = {
        "in_channels": channels,
        "num_layers": dice.deal("num_layers", [1, 2]),
        "num_single_layers": dice.deal("num_single_layers", [1, 2, 3]),
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": dice.between(5, 40),
        "timestep_guidance_channels": dice.deal("timestep_guidance_channels", [256, 64, 32]),
        "mlp_ratio": dice.deal("mlp_ratio", [3.0, 2.0, 2.5]),
        "axes_dims_rope": dice.axes(head_dim, 4),
        "rope_theta": dice.deal("rope_theta", [2000, 10000]),
        "eps": dice.deal("eps", [1e-6, 1e-5]),
        "guidance_embeds": dice.deal("guidance_embeds", [True, False]),
    }
    batch = {
        "image_latents": dice.normal(dice.size, channels, rows, columns),
        "text_embeddings": dice.text(config["joint_attention_dim"]),
    }
    adapter = {
        "guidance_scale": dice.deal("guidance_scale", [3.5, 1.0, 4.25]),
        "use_guidance_embeds": dice.deal("use_guidance_embeds", [True, True, False]),
    }
    dropout = dice.deal("dropout", [0.0, 0.0, 0.5, 1.0])
    unreached = [r"context_embedder\.weight"] if dropout else []
    if not adapter["use_guidance_embeds"]:
        unreached.append(r"time_guidance_embed\.guidance_embedder\.")
    return Draw(Flux2Transformer2DModel, config, batch, "flux2", adapter, {"cfg_dropout_prob": dropout}, unreached=unreached)


def qwen_image(dice: Dice, better: dict) -> Draw:
    (heads, head_dim), (rows, columns) = dice.heads([8, 16, 24, 32]), dice.grid()
    channels = dice.deal("channels", [16, 1, 3])
    config = {
        "in_channels": 4 * channels,
        "out_channels": channels,
        "num_layers": dice.deal("num_layers", [1, 2, 3]),
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": dice.between(5, 40),
        "axes_dims_rope": dice.axes(head_dim, 3),
    }
    batch = {
        "image_latents": dice.normal(dice.size, channels, 2 * rows, 2 * columns),
        "text_embeddings": dice.text(config["joint_attention_dim"], flat="use_text_mask" not in better),
    }
    if "use_text_mask" in better:
        batch["text_mask"] = dice.mask(batch["text_embeddings"].shape[1], 1, dice.deal("mask", ["anywhere", "prefix"]))
    dropout = dice.deal("dropout", [0.0, 0.0, 1.0])
    unreached = [last_text_branch(config["num_layers"] - 1, "txt_mlp"), *([r"txt_norm\.weight", r"txt_in\.weight"] if dropout else [])]
    return Draw(QwenImageTransformer2DModel, config, batch, "qwen_image", {}, {"cfg_dropout_prob": dropout}, unreached=unreached)


def wan(dice: Dice, _better: dict) -> Draw:
    (heads, head_dim), (rows, columns), channels = dice.heads([8, 12, 16, 20, 32]), dice.grid(), dice.between(1, 4)
    # Text alone; the image behind the noise (2.2); its embedding as well (2.1); the embeddings of the first and the last image.
    condition = dice.deal("condition", ["text", "text", "text", "channels", "image", "two images"])
    frames, image_dim, image_tokens = dice.deal("frames", [1, 2, 3]), dice.between(4, 20), dice.between(2, 5)
    condition_channels = 0 if condition == "text" else dice.between(1, 5)
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels + condition_channels,
        "out_channels": channels,
        "text_dim": dice.between(5, 40),
        "freq_dim": dice.deal("freq_dim", [256, 64, 32]),
        "ffn_dim": dice.between(16, 160),
        "num_layers": dice.deal("num_layers", [1, 2, 3]),
        "cross_attn_norm": dice.deal("cross_attn_norm", [True, False]),
        "eps": dice.deal("eps", [1e-6, 1e-5]),
    }
    batch = {"video_latents": dice.normal(dice.size, channels, frames, 2 * rows, 2 * columns)}
    if condition == "text":
        batch["text_embeddings"] = dice.text(config["text_dim"], flat=True)
        return Draw(WanTransformer3DModel, config, batch, "simple", data_type="image" if frames == 1 else "video")
    batch["condition_latents"] = dice.normal(dice.size, condition_channels, frames, 2 * rows, 2 * columns)
    if condition == "channels":
        batch["text_embeddings"] = dice.text(config["text_dim"])
    else:
        images = 2 if condition == "two images" else 1
        config |= {"image_dim": image_dim, "added_kv_proj_dim": heads * head_dim}
        config |= {"pos_embed_seq_len": images * image_tokens} if images == 2 else {}
        # diffusers pairs the images of a sample along the batch's axis.
        batch["image_embeds"] = dice.normal(images * dice.size, image_tokens, image_dim)
        batch["text_embeddings"] = dice.normal(dice.size, WAN_TEXT_LENGTH, config["text_dim"])
    return Draw(WanTransformer3DModel, config, batch, "simple", {"image_conditioning": True}, data_type="video")


def hunyuan_video15(dice: Dice, _better: dict) -> Draw:
    # The gradient of a single output's bias would be one sum over all tokens, which may cancel to nothing.
    (heads, head_dim), (rows, columns), channels = dice.heads([8, 16, 24, 32]), dice.grid(), dice.between(2, 4)
    patch, conditioned = dice.deal("patch_size", [1, 2]), dice.deal("use_condition_latents", [True, True, True, True, False])
    # The reference would give a model the only frame of a still; fm-dist never does.
    task, frames = dice.deal("task", [(0.0, False), (1.0, True), (1.0, False), (1.0, True), (0.0, True)]), dice.deal("frames", [1, 2, 3])
    i2v_prob, has_image = (0.0, task[1]) if frames == 1 else task
    config = {
        "in_channels": 2 * channels + 1 if conditioned else channels,
        "out_channels": channels,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": dice.deal("num_layers", [1, 2]),
        "num_refiner_layers": dice.deal("num_refiner_layers", [1, 2]),
        "mlp_ratio": dice.deal("mlp_ratio", [4.0, 2.0, 2.5]),
        "patch_size": patch,
        "text_embed_dim": dice.between(5, 40),
        "text_embed_2_dim": dice.between(5, 40),
        "image_embed_dim": dice.between(4, 20),
        "rope_theta": dice.deal("rope_theta", [256.0, 10000.0]),
        "rope_axes_dim": dice.axes(head_dim, 3),
        "target_size": dice.deal("target_size", [640, 960]),
        "task_type": "i2v" if i2v_prob else "t2v",
    }
    batch = {
        "video_latents": dice.normal(dice.size, channels, frames, patch * rows, patch * columns),
        "text_embeddings": dice.text(config["text_embed_dim"]),
        "text_embeddings_2": dice.text(config["text_embed_2_dim"]),
    }
    kinds = dice.deal("masks", [("prefix", "prefix"), ("ones", "prefix"), ("prefix", "ones"), ("ones", "ones")])
    batch["text_mask"] = dice.mask(batch["text_embeddings"].shape[1], 1, kinds[0])
    # A prompt without quoted letters has no second text.
    batch["text_mask_2"] = dice.mask(batch["text_embeddings_2"].shape[1], 0, kinds[1])
    image_shape = [dice.between(2, 5), config["image_embed_dim"]]
    if has_image:
        batch["image_embeds"] = dice.normal(dice.size, *image_shape)
    adapter = {"use_condition_latents": conditioned, "default_image_embed_shape": image_shape}
    unreached = [last_text_branch(config["num_layers"] - 1, "ff_context")]
    if not (i2v_prob and has_image):
        unreached.append(r"image_embedder\.")
    vanishing = r"context_embedder\.token_refiner\.refiner_blocks\.\d+\.attn\.to_k\.bias"
    draw = partial(Draw, HunyuanVideo15Transformer3DModel, config, batch, "hunyuan", adapter, {"i2v_prob": i2v_prob})
    return draw(data_type="video", unreached=unreached, vanishing=vanishing)


@dataclass
class Family:
    draw: Callable[[Dice, dict], Draw]
    # Settings of ours that the reference lacks, one case each.
    better: list[dict]


FLOAT32_TIMESTEPS = {"timestep_dtype": "float32"}
FAMILIES = {
    "flux": Family(flux, [FLOAT32_TIMESTEPS, {"use_text_mask": True}]),
    "flux2": Family(flux2, [FLOAT32_TIMESTEPS]),
    "qwen_image": Family(qwen_image, [FLOAT32_TIMESTEPS, {"use_text_mask": True}]),
    "wan": Family(wan, [FLOAT32_TIMESTEPS]),
    "hunyuan_video15": Family(hunyuan_video15, [FLOAT32_TIMESTEPS]),
}


def pipeline_arguments(dice: Dice) -> dict:
    """Sampling and weighting; what the adapter's draws depend on is the family's to say."""
    use_loss_weighting, loss_weighting_scheme = dice.deal("weighting", WEIGHTINGS)
    # The bell is zero at its ends, and so would be every gradient.
    windows = [(0.02, 0.98)] if loss_weighting_scheme == "bsmntw" else [(0.0, 1.0), (0.0, 0.875), (0.3, 0.9)]
    sigma_min, sigma_max = dice.deal(f"window {loss_weighting_scheme}", windows)
    return {
        "timestep_sampling": dice.deal("sampling", SAMPLINGS),
        "flow_shift": dice.deal("flow_shift", [3.0, 1.0, 2.23]),
        "logit_mean": round(dice.random.uniform(-1, 1), 3),
        "logit_std": round(dice.random.uniform(0.5, 1.5), 3),
        "mix_uniform_ratio": dice.deal("mix_uniform_ratio", [0.1, 0.0, 0.5]),
        "use_sigma_noise": dice.deal("use_sigma_noise", [True, True, True, False]),
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "use_loss_weighting": use_loss_weighting,
        "loss_weighting_scheme": loss_weighting_scheme,
        "i2v_prob": 0.0,
        "cfg_dropout_prob": 0.0,
    }


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Takes every parameter away from its default, so that none can be forgotten unseen: activations near 1, gates not small."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if not name.endswith(".weight") or "cond_type_embed" in name:
            value = 0.4 * noise
        elif parameter.ndim == 1:
            value = 1 + 0.25 * noise
        else:
            value = 1.2 * noise / parameter[0].numel() ** 0.5
        if TIME.search(name):
            cosines_and_sines = value.unflatten(1, (2, -1))
            cosines_and_sines[:, :, : cosines_and_sines.shape[2] // 4] *= 0.15
        parameter.data.copy_(value)


def save_model(folder: Path, draw: Draw, dice: Dice) -> None:
    """A diffusers folder with weights in float32 or, as most are published, in bfloat16."""
    model = draw.model(**draw.config)
    assert not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()), "training mode would draw"
    randomize(model, dice.generator)
    model.to(dice.deal("weights", [torch.float32, torch.float32, torch.bfloat16]))
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    shards = {"max_shard_size": num_bytes // 3} if dice.deal("shards", [False, False, True]) else {}
    model.save_pretrained(folder, **shards)


def load_model(model_class: type, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """`from_pretrained` in training mode; what it keeps in float32 by the package accelerate is kept here by the same rule."""
    kept = model_class._keep_in_fp32_modules
    if kept is None:
        return model_class.from_pretrained(folder, torch_dtype=dtype).train()
    with patch.object(model_class, "_keep_in_fp32_modules", None):
        model = model_class.from_pretrained(folder, torch_dtype=torch.float32).train()
    for name, parameter in model.named_parameters():
        if not set(kept) & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def without_onednn(convolve: Callable) -> Callable:
    """The same convolution by PyTorch's own kernel.

    With torch 2.13.0 on a processor with AMX, oneDNN's bfloat16 convolution of a patch of 2 x 2 reads memory that nobody wrote, for 36
    channels (Wan's, image-conditioned), 20, 48, all odd counts and others, and gives no number whenever that memory holds none.
    """

    def wrapped(*arguments):
        with torch.backends.mkldnn.flags(enabled=False):
            return convolve(*arguments)

    return wrapped


def adapter_of(draw: Draw) -> ModelAdapter:
    """The reference's, or our addition to it."""
    if draw.adapter_type in OUR_ADAPTERS:
        return OUR_ADAPTERS[draw.adapter_type](**draw.adapter)
    return create_adapter(draw.adapter_type, **draw.adapter)


def gradients(model: torch.nn.Module, draw: Draw) -> dict[str, torch.Tensor]:
    """Every parameter's gradient; one that is zero or not finite without a reason makes the case worthless."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite"
        excused = any(re.match(pattern, name) for pattern in [*draw.unreached, draw.vanishing])
        assert excused or gradient.any(), f"the gradient of {name} is zero: {draw.config}"
        found[name] = gradient.contiguous()
    return found


@dataclass
class Place:
    """Where a step is computed, and which generator its draws are of: `host` or `device`."""

    device: torch.device
    draws: str

    def step(self, pipeline: FlowMatchingPipeline, model: torch.nn.Module, draw: Draw, dtype: torch.dtype, seed: int) -> torch.Tensor:
        """The average weighted loss of a step after `manual_seed(seed)`; a random model may make it as large as it likes."""
        batch = {key: tensor.to(self.device) for key, tensor in draw.batch.items()}
        with drawn_by_the_host() if self.draws == "host" else nullcontext():
            torch.manual_seed(seed)
            return pipeline.step(model, {**batch, "data_type": draw.data_type}, self.device, dtype, 1, check_loss=False)[1]


def in_float32(
    place: Place, pipeline: FlowMatchingPipeline, model: torch.nn.Module, draw: Draw, seed: int, gradients: Callable[[torch.nn.Module], dict]
) -> dict:
    """What a step of a copy of the model in float32 computes, and its gradients."""
    wide = copy.deepcopy(model).float()
    wide.zero_grad(set_to_none=True)
    recorder = Recorder(pipeline)
    place.step(pipeline, wide, draw, torch.float32, seed).backward()
    return {name: tensor.cpu() for name, tensor in {**recorder.tensors, **gradients(wide)}.items()}


def run_case(folder: Path, dice: Dice, draw: Draw, better: dict, place: Place) -> dict:
    """Writes one case's folder and returns its entry in cases.json."""
    arguments = pipeline_arguments(dice) | draw.pipeline
    dtype = dice.deal("dtype", ["float32", "float32", "bfloat16"])
    if better == FLOAT32_TIMESTEPS:
        dtype = "float32"
    else:
        draw.adapter |= better
    save_model(folder / "model", draw, dice)
    save_file({key: tensor.contiguous() for key, tensor in draw.batch.items()}, folder / "batch.safetensors", {"data_type": draw.data_type})
    model = load_model(draw.model, folder / "model", DTYPES[dtype]).to(place.device)
    pipeline = FlowMatchingPipeline(adapter_of(draw), device=place.device, **arguments)
    recorder, seed = Recorder(pipeline), dice.random.getrandbits(32)
    place.step(pipeline, model, draw, DTYPES[dtype], seed).backward()
    found = gradients(model, draw)

    def named(of: torch.nn.Module) -> dict:
        return {f"grad.{name}": tensor for name, tensor in gradients(of, draw).items()}

    tensors = {**recorder.tensors, **named(model)}
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / "expected.safetensors")
    if dtype == "bfloat16":
        save_file(in_float32(place, pipeline, model, draw, seed, named), folder / "exact.safetensors")
    adapter = {f"flow_matching.adapter.{key}": value for key, value in (draw.adapter | better).items()}
    pipeline_settings = {f"flow_matching.{key}": value for key, value in arguments.items()}
    draws = {"flow_matching.draws": place.draws} if place.draws != "host" else {}
    return {
        "dtype": dtype,
        "seed": seed,
        "settings": {"flow_matching.adapter_type": draw.adapter_type} | adapter | pipeline_settings | draws,
        "vanishing_gradients": [name for name in found if re.match(draw.vanishing, name)],
    }


def describe(entry: dict, folder: Path) -> str:
    """One line on how strong a case is: its losses, and its weakest gradient beside the norm of all."""
    tensors = load_file(folder / "expected.safetensors")
    named = {name.removeprefix("grad."): tensor.float().norm() for name, tensor in tensors.items() if name.startswith("grad.")}
    total = torch.stack(list(named.values())).norm()
    reached = {name: norm for name, norm in named.items() if norm > 0 and name not in entry["vanishing_gradients"]}
    weakest = min(reached, key=reached.get)
    losses = f"loss {tensors['average_unweighted_loss']:.2f}, weighted {tensors['average_weighted_loss']:.2f}"
    parts = f"norm {total:.2e}, {len(reached)} of {len(named)} gradients, weakest {weakest} {reached[weakest] / total:.1e}"
    return f"{entry['name']} {entry['dtype']}: {losses}; prediction {tensors['model_pred'].std(correction=0):.2f}; {parts}"


def write_family(out: Path, name: str, seed: int, num_cases: int, place: Place, verbose: bool) -> list[dict]:
    """Writes all cases of one family."""
    dice, family, entries = Dice(f"{seed} {name}"), FAMILIES[name], []
    for number, better in enumerate([{}] * num_cases + family.better):
        dice.begin_case()
        folder = f"{name}-{number}"
        (out / folder).mkdir()
        case = run_case(out / folder, dice, family.draw(dice, better), better, place)
        entries.append({"name": folder, "family": name, "folder": folder, **case})
        if verbose:
            print(describe(entries[-1], out / folder))
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--cases", type=int, default=6, help="of each family, without those for better behaviours")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the step")
    parser.add_argument("--draws", choices=["host", "device"], default="host", help="whose generator draws")
    parser.add_argument("--verbose", action="store_true", help="a line a case: losses and the weakest gradient")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.nn.Conv3d._conv_forward = without_onednn(torch.nn.Conv3d._conv_forward)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Convolutions in full float32, and attention by kernels that have given right gradients everywhere.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    entries, place = [], Place(torch.device(arguments.device), arguments.draws)
    for name in arguments.families.split(","):
        entries += write_family(arguments.out, name, arguments.seed, arguments.cases, place, arguments.verbose)
    (arguments.out / "cases.json").write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
