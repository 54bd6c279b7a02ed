"""Encodes and decodes with tiny random autoencoders of diffusers 0.42.1, whole and in tiles, and writes what went in and came out.

    python autoencoders.py OUT_DIR SEED [--classes AutoencoderKL,...] [--cases 6] [--verbose]

Needs torch 2.13.0, diffusers 0.42.1 and safetensors; takes 20 s. SEED alone decides every draw, a class's cases whatever the other classes
are. Writes

cases.json              one entry a case: name, class, dtype, tile (side and stride in pixels)
<case>/vae/             the autoencoder by `save_pretrained`, in a third of the cases with shards and their index, in others in float16
<case>/case.safetensors pixels, latents: what went in, in float32, pictures without a frame axis where the class takes videos
                        mean, log_variance, decoded: what came out of them
                        tiled_mean, tiled_log_variance, tiled_decoded: the same with tiling on
                        model_latents: of the mean, as the class's pipeline hands latents to its transformer
                        model_input, unscaled: latents of a transformer, and what the pipeline hands to the decoder of them

HunyuanVideo's masks fail with more than one video, so that it takes them one by one, as `enable_slicing` has it. The decoder of Qwen-Image
keeps pixels within -1 and 1 only where it is not tiled; its pipeline does so later, and so does this script.
"""

import argparse
import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLHunyuanVideo15, AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.utils import logging
from safetensors.torch import save_file

FRAMES = [1, 5, 9, 13]
DTYPES = ["float32", "float32", "bfloat16"]


@dataclass
class Draw:
    """A tiny autoencoder and what it is asked to do."""

    model: type
    config: dict
    # Pixels along the side of one of a model's latents, and whether there is an axis of frames.
    space: int
    has_frames: bool
    # Side of a tile and distance of two, in pixels; `enable` sets them.
    tile: tuple[int, int]
    enable: Callable[[torch.nn.Module, int, int], None]
    # Latents of a transformer from the autoencoder's, and back.
    to_model: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    from_model: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    # Pixels along the side of one of the autoencoder's own latents; channels of those and of a model's.
    own_space: int
    channels: tuple[int, int]


class Dice:
    """All draws of one class."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self.generator = torch.Generator()
        self.decks: dict[str, list] = {}

    def begin_case(self) -> None:
        self.generator.manual_seed(self.random.getrandbits(32))

    def deal(self, name: str, values: list):
        """The next value of a deck: every value once before any comes again."""
        if not self.decks.get(name):
            self.decks[name] = self.random.sample(values, len(values))
        return self.decks[name].pop()

    def between(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)


def set_quarter_tiles(vae: torch.nn.Module, _side: int, _stride: int) -> None:
    """The class's own tiles, of `sample_size`."""
    vae.enable_tiling()


def set_tiles(vae: torch.nn.Module, side: int, stride: int) -> None:
    vae.enable_tiling(side, side, stride, stride)


def set_hunyuan_tiles(vae: torch.nn.Module, side: int, _stride: int) -> None:
    latents = side // vae.config.spatial_compression_ratio
    vae.enable_tiling(side, side, latents, latents, 0.25)


def widths(dice: Dice, groups: int, levels: int) -> list[int]:
    """Channels of each level. A tile may be one position at the last one, where PyTorch refuses a group of a single channel."""
    return [groups * dice.between(2, 4) for _ in range(levels)]


def of_pictures(dice: Dice, own_space: int, tile_side: int) -> dict:
    """Fields that AutoencoderKL and AutoencoderKLFlux2 share."""
    levels, groups = own_space.bit_length(), dice.deal("groups", [2, 4])
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": widths(dice, groups, levels),
        "layers_per_block": dice.deal("layers", [1, 2]),
        "act_fn": dice.deal("act_fn", ["silu", "silu", "swish"]),
        "latent_channels": dice.between(1, 5),
        "norm_num_groups": groups,
        "sample_size": tile_side,
        "use_quant_conv": dice.deal("quant", [True, False]),
        "use_post_quant_conv": dice.deal("post_quant", [True, False]),
        "mid_block_add_attention": dice.deal("attention", [True, True, False]),
    }


def kl(dice: Dice) -> Draw:
    space = dice.deal("space", [2, 4, 8])
    side = 4 * space
    config = of_pictures(dice, space, side) | {
        "scaling_factor": dice.deal("scaling", [0.3611, 0.18215]),
        "shift_factor": dice.deal("shift", [0.1159, None]),
    }
    return Draw(
        AutoencoderKL,
        config,
        space,
        False,
        (side, 3 * space),
        set_quarter_tiles,
        lambda vae, z: (z - (vae.config.shift_factor or 0)) * vae.config.scaling_factor,
        lambda vae, z: z / vae.config.scaling_factor + (vae.config.shift_factor or 0),
        space,
        (config["latent_channels"],) * 2,
    )


def statistics(vae: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    mean = vae.bn.running_mean.float().view(1, -1, 1, 1)
    return mean, torch.sqrt(vae.bn.running_var.float().view(1, -1, 1, 1) + vae.config.batch_norm_eps)


def flux2_to_model(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    mean, std = statistics(vae)
    return (Flux2Pipeline._patchify_latents(latents) - mean) / std


def flux2_from_model(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    mean, std = statistics(vae)
    return Flux2Pipeline._unpatchify_latents(latents * std + mean)


def flux2(dice: Dice) -> Draw:
    own_space = dice.deal("space", [2, 4])
    side = 8 * own_space
    config = of_pictures(dice, own_space, side) | {"batch_norm_eps": dice.deal("epsilon", [1e-4, 1e-2])}
    if dice.deal("own decoder", [False, True]):
        config["decoder_block_out_channels"] = widths(dice, config["norm_num_groups"], len(config["block_out_channels"]))
    channels = config["latent_channels"]
    return Draw(
        AutoencoderKLFlux2,
        config,
        2 * own_space,
        False,
        (side, 6 * own_space),
        set_quarter_tiles,
        flux2_to_model,
        flux2_from_model,
        own_space,
        (channels, 4 * channels),
    )


def wan_to_model(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ["latents_mean", "latents_std"])
    return (latents - mean) * (1.0 / std)


def wan_from_model(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ["latents_mean", "latents_std"])
    return latents / (1.0 / std) + mean


def of_wan(dice: Dice) -> dict:
    """Fields that AutoencoderKLWan and AutoencoderKLQwenImage share."""
    halvings, multiples = dice.deal("levels", [(2, [1, 2, 2]), (2, [1, 2, 4]), (3, [1, 2, 4, 4])])
    channels = dice.between(1, 4)
    return {
        "base_dim": 2 * dice.between(2, 4),
        "z_dim": channels,
        "dim_mult": multiples,
        "num_res_blocks": dice.deal("blocks", [1, 2]),
        "temperal_downsample": dice.random.sample([True, True, False][:halvings], halvings),
        "latents_mean": [dice.random.uniform(-1, 1) for _ in range(channels)],
        "latents_std": [dice.random.uniform(0.5, 3) for _ in range(channels)],
    }


def video(model: type, config: dict, space: int, tile: tuple[int, int]) -> Draw:
    channels = (config["z_dim"],) * 2
    return Draw(model, config, space, True, tile, set_tiles, wan_to_model, wan_from_model, space, channels)


def wan(dice: Dice) -> Draw:
    config = of_wan(dice)
    is_residual, patch = dice.deal("residual", [(False, 1), (True, 2), (True, 1), (False, 1), (True, 2), (False, 2)])
    space = 2 ** len(config["temperal_downsample"]) * patch
    config |= {"is_residual": is_residual, "scale_factor_spatial": space}
    if is_residual:
        # No shortcut averages to more channels where the sides stay.
        config["dim_mult"] = [*config["dim_mult"][:-1], config["dim_mult"][-2]]
        config["decoder_base_dim"] = 2 * dice.between(2, 4)
    if patch > 1:
        config |= {"patch_size": patch, "in_channels": 3 * patch**2, "out_channels": 3 * patch**2}
    side, stride = dice.deal("tile", [(2, 1), (4, 3), (3, 2)])
    return video(AutoencoderKLWan, config, space, (side * space, stride * space))


def qwen_image(dice: Dice) -> Draw:
    config = of_wan(dice)
    space = 2 ** len(config["temperal_downsample"])
    side, stride = dice.deal("tile", [(2, 1), (4, 3)])
    return video(AutoencoderKLQwenImage, config, space, (side * space, stride * space))


def hunyuan_video15(dice: Dice) -> Draw:
    space, time, widths = dice.deal(
        "levels", [(4, 4, [8, 16, 32]), (4, 2, [16, 16, 32]), (8, 4, [8, 8, 16, 32]), (4, 4, [8, 16, 16, 16]), (2, 2, [16, 32])]
    )
    config = {
        "latent_channels": dice.deal("latents", [2, 4, 8]),
        "block_out_channels": widths,
        "layers_per_block": dice.deal("layers", [1, 2]),
        "spatial_compression_ratio": space,
        "temporal_compression_ratio": time,
        "downsample_match_channel": dice.deal("down", [True, True, False]),
        "upsample_match_channel": dice.deal("up", [True, True, False]),
        "scaling_factor": dice.deal("scaling", [1.03682, 0.5]),
    }
    return Draw(
        AutoencoderKLHunyuanVideo15,
        config,
        space,
        True,
        (4 * space, 3 * space),
        set_hunyuan_tiles,
        lambda vae, z: z * vae.config.scaling_factor,
        lambda vae, z: z / vae.config.scaling_factor,
        space,
        (config["latent_channels"],) * 2,
    )


CLASSES = {
    "AutoencoderKL": kl,
    "AutoencoderKLFlux2": flux2,
    "AutoencoderKLWan": wan,
    "AutoencoderKLQwenImage": qwen_image,
    "AutoencoderKLHunyuanVideo15": hunyuan_video15,
}


def randomized(draw: Draw, dice: Dice) -> torch.nn.Module:
    """A model whose norms, biases and statistics are no ones and zeros."""
    torch.manual_seed(dice.random.getrandbits(32))
    vae = draw.model(**draw.config).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.ndim == 1 or name.endswith("gamma"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        if hasattr(vae, "bn"):
            vae.bn.running_mean.normal_()
            vae.bn.running_var.uniform_(0.5, 2)
    return vae


def inputs(draw: Draw, dice: Dice) -> dict[str, torch.Tensor]:
    """Pixels and latents that need several tiles along one side at least."""
    batch, frames = dice.deal("batch", [1, 2, 3]), dice.deal("frames", FRAMES)
    most = draw.tile[0] // draw.space
    rows, columns = dice.random.sample(range(1, 2 * most + 2), 2)
    if max(rows, columns) <= most:
        columns = most + dice.between(1, most)
    if dice.deal("turned", [True, False]):
        rows, columns = columns, rows
    time = draw.config.get("temporal_compression_ratio", 4)
    own, of_model = draw.channels

    def sides(frames: int, size: int) -> list[int]:
        return [*([frames] if draw.has_frames else []), size * rows, size * columns]

    latent_frames = 1 + (frames - 1) // time
    return {
        "pixels": 2 * dice.uniform(batch, 3, *sides(frames, draw.space)) - 1,
        "latents": dice.normal(batch, own, *sides(latent_frames, draw.space // draw.own_space)),
        "model_input": dice.normal(batch, of_model, *sides(latent_frames, 1)),
    }


def widened(function: Callable) -> Callable:
    """The same function, of bfloat16 summed in float32 and rounded once, as GPUs do.

    A CPU's convolutions by oneDNN round in between, and on processors with AMX they read memory that nobody wrote; its kernels of attention
    differ in where they round.
    """

    def wide(value):
        return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value

    def wrapped(*arguments, **named):
        kinds = [value.dtype for value in arguments if isinstance(value, torch.Tensor)]
        return function(*map(wide, arguments), **{name: wide(value) for name, value in named.items()}).to(kinds[0])

    return wrapped


def computed(vae: torch.nn.Module, draw: Draw, given: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What comes out, whole and in tiles, in float32."""
    found = {}
    if draw.model is AutoencoderKLHunyuanVideo15:
        vae.enable_slicing()
    with torch.no_grad():
        for prefix in ["", "tiled_"]:
            posterior = vae.encode(given["pixels"].to(dtype)).latent_dist
            found[f"{prefix}mean"], found[f"{prefix}log_variance"] = posterior.mean, posterior.logvar
            decoded = vae.decode(given["latents"].to(dtype)).sample
            if draw.model is AutoencoderKLQwenImage:
                decoded = decoded.clamp(-1, 1)
            found[f"{prefix}decoded"] = decoded
            draw.enable(vae, *draw.tile)
        found["model_latents"] = draw.to_model(vae, found["mean"].float())
        found["unscaled"] = draw.from_model(vae, given["model_input"])
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def in_float32(vae: torch.nn.Module, draw: Draw, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What comes out of the same weights and the same rounded inputs without further rounding."""
    rounded = {name: tensor.bfloat16().float() for name, tensor in given.items()}
    return computed(copy.deepcopy(vae).float(), draw, rounded, torch.float32)


def write_case(folder: Path, dice: Dice, draw: Draw, verbose: bool) -> dict:
    dtype, stored = dice.deal("dtype", DTYPES), dice.deal("stored", ["as computed", "float16", "shards"])
    vae = randomized(draw, dice).to(getattr(torch, dtype))
    if stored == "float16":
        vae = vae.half()
    vae.save_pretrained(folder / "vae", max_shard_size="20KB" if stored == "shards" else "10GB")
    vae = vae.to(getattr(torch, dtype))
    given = inputs(draw, dice)
    exact = in_float32(vae, draw, given) if dtype == "bfloat16" else {}
    tensors = given | computed(vae, draw, given, getattr(torch, dtype))
    is_picture = draw.has_frames and given["pixels"].shape[2] == 1 and dice.deal("picture", [True, False])
    if is_picture:
        tensors, exact = ({name: tensor.squeeze(2) for name, tensor in part.items()} for part in (tensors, exact))
    tensors |= {f"exact.{name}": tensor for name, tensor in exact.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "case.safetensors")
    if verbose:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        spread = {name: round(tensor.std().item(), 3) for name, tensor in tensors.items()}
        print(folder.name, dtype, stored, draw.config, shapes, spread, sep="\n  ")
    return {"dtype": dtype, "tile": {"side": draw.tile[0], "stride": draw.tile[1]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("--classes", default=",".join(CLASSES))
    parser.add_argument("--cases", type=int, default=6, help="of each class")
    parser.add_argument("--verbose", action="store_true", help="configuration, shapes and spread of each case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for convolution in [torch.nn.Conv2d, torch.nn.Conv3d]:
        convolution._conv_forward = widened(convolution._conv_forward)
    torch.nn.functional.scaled_dot_product_attention = widened(torch.nn.functional.scaled_dot_product_attention)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    entries = []
    for name in arguments.classes.split(","):
        dice = Dice(f"{arguments.seed} {name}")
        for number in range(arguments.cases):
            dice.begin_case()
            folder = arguments.out / f"{name}-{number}"
            folder.mkdir(parents=True)
            case = write_case(folder, dice, CLASSES[name](dice), arguments.verbose)
            entries.append({"name": folder.name, "class": name, **case})
    (arguments.out / "cases.json").write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
