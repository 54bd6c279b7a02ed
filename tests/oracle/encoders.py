"""Encodes with tiny random encoders of transformers 5.24.0, and writes what went in and came out.

    python encoders.py OUT_DIR SEED [--classes T5EncoderModel,...] [--cases 8] [--verbose]

Needs torch 2.13.0, transformers 5.24.0, safetensors and Pillow; takes 20 s, most of it for imports. SEED alone decides every draw, a class's
cases whatever the other classes are. Writes

cases.json                one entry a case: name, class, dtype, layers, subset (of the hidden states), pools
<case>/encoder/           the encoder by `save_pretrained`; some in shards, some in float16, some with the names and the fields of other versions
<case>/case.safetensors   ids, mask (in some cases): what went in
                          last, pooled (where there is one), hidden.0, hidden.1, ...: what came out of it, in float32
                          of SigLIP: pixels, last; picture (bytes), input: as the published preprocessor makes it by torchvision, whose
                          resizing of bytes is torch's interpolate; smooth (bytes), by_pillow: as it makes it by Pillow

Texts are padded on the right, on the left, or have a mask of their own; in some cases one text is nothing but padding.
"""

import argparse
import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

DTYPES = ["float32", "float32", "float32", "bfloat16"]
PADDINGS = ["none", "right", "left", "own", "left with an empty text", "right with an empty text"]
STORED = ["as computed", "as computed", "float16", "shards"]


@dataclass
class Draw:
    """A tiny encoder, and the files that may hold it."""

    model: torch.nn.Module
    vocabulary: int
    layers: int
    # Called on config.json's fields.
    change_config: Callable[[dict], None] = lambda _: None
    # Called on the name of each tensor that is saved; returns the names under which it is saved instead.
    names: Callable[[str], list[str]] = lambda name: [name]
    # Tensors that are saved, too.
    more: dict[str, torch.Tensor] = field(default_factory=dict)
    longest: int = 40
    end: int | None = None


class Dice:
    """All draws of one class."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self.generator = torch.Generator()
        self.decks: dict[str, list] = {}

    def begin_case(self) -> None:
        seed = self.random.getrandbits(32)
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)

    def deal(self, name: str, values: list):
        """The next value of a deck: every value once before any comes again."""
        if not self.decks.get(name):
            self.decks[name] = self.random.sample(values, len(values))
        return self.decks[name].pop()

    def between(self, low: int, high: int) -> int:
        return self.random.randint(low, high)


def t5(dice: Dice, model: type, config: type) -> Draw:
    vocabulary, layers = dice.between(20, 60), dice.between(1, 4)
    buckets, farthest = dice.deal("buckets", [(32, 128), (8, 20), (12, 16)])
    fields = {
        "vocab_size": vocabulary,
        "d_model": 8 * dice.between(2, 5),
        "d_kv": dice.deal("head", [4, 6, 16]),
        "d_ff": dice.between(9, 40),
        "num_layers": layers,
        "num_heads": dice.between(1, 5),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": farthest,
        "layer_norm_epsilon": dice.deal("epsilon", [1e-6, 1e-3]),
        "feed_forward_proj": "gated-gelu",
    }
    embeddings = ["shared.weight", "encoder.embed_tokens.weight"]
    held = dice.deal("held", [embeddings[:1], embeddings[1:], embeddings])
    names = lambda name: held if name == "shared.weight" else [name]
    more = {"decoder.block.0.layer.0.layer_norm.weight": torch.ones(3)} if dice.deal("whole", [False, False, True]) else {}

    def without_architecture(config: dict) -> None:
        del config["architectures"]

    change = dice.deal("config", [lambda _: None, without_architecture])
    return Draw(model(config(**fields)), vocabulary, layers, change, names, more, longest=70)


def clip(dice: Dice) -> Draw:
    heads, vocabulary, layers = dice.between(1, 4), dice.between(30, 60), dice.between(1, 4)
    # Before a correction configurations named the end token 2, whatever it was.
    end = {"former": 2, "last": vocabulary - 1, "amid": dice.between(5, vocabulary - 2)}[dice.deal("end", ["former", "last", "amid"])]
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=heads * dice.deal("head", [4, 6, 16]),
        intermediate_size=dice.between(9, 40),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=dice.between(20, 50),
        hidden_act=dice.deal("act", ["quick_gelu", "quick_gelu", "gelu"]),
        layer_norm_eps=dice.deal("epsilon", [1e-5, 1e-3]),
        eos_token_id=end,
    )
    prefix = dice.deal("prefix", ["text_model.", "text_model.", ""])
    more = {f"{prefix}embeddings.position_ids": torch.arange(20).unsqueeze(0)} if dice.deal("counted", [True, False]) else {}
    return Draw(
        transformers.CLIPTextModel(config),
        vocabulary,
        layers,
        names=lambda name: [prefix + name],
        more=more,
        longest=config.max_position_embeddings,
        end=vocabulary - 1 if end == 2 else end,
    )


def of_decoders(dice: Dice, head: int | None) -> tuple[dict, dict]:
    """Fields that all decoders have, and those of their rotations."""
    shared, group = dice.between(1, 2), dice.deal("group", [1, 2, 3])
    heads = shared * group
    width = 8 * dice.between(2, 4) if head else heads * dice.deal("head", [4, 8, 16])
    fields = {
        "vocab_size": dice.between(20, 60),
        "hidden_size": width,
        "intermediate_size": dice.between(9, 40),
        "num_hidden_layers": dice.between(1, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "rms_norm_eps": dice.deal("epsilon", [1e-6, 1e-5, 1e-3]),
    }
    return fields | ({"head_dim": head} if head else {}), {"rope_type": "default", "rope_theta": dice.deal("theta", [1e4, 1e6, 1e9])}


def as_before(fields: dict, kind: str | None) -> None:
    """Fields of the rotations as transformers 4 wrote them."""
    rotations = fields.pop("rope_parameters")
    fields["rope_theta"] = rotations["rope_theta"]
    scaling = {"type": kind, "rope_type": kind, "mrope_section": [1, 1, 2]}
    fields["rope_scaling"] = scaling if kind else None


def qwen25_vl(dice: Dice) -> Draw:
    text, rotations = of_decoders(dice, None)
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    rotations["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    text["rope_parameters"] = rotations
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": text["hidden_size"]}
    version = dice.deal("version", ["4", "5", "flat", "text alone"])
    if version == "text alone":
        model = transformers.Qwen2_5_VLTextModel(transformers.Qwen2_5_VLTextConfig(**text))
    else:
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    moved = [("model.", "model.language_model."), ("visual.", "model.visual.")]

    def names(name: str) -> list[str]:
        found = [new + name.removeprefix(old) for old, new in moved if version == "5" and name.startswith(old)]
        return found or [name]

    def change(config: dict) -> None:
        if version == "4":
            as_before(config["text_config"], "default")
        if version == "flat":
            fields = config.pop("text_config")
            as_before(fields, "mrope")
            config.update({name: value for name, value in fields.items() if name != "model_type"})

    return Draw(model, text["vocab_size"], text["num_hidden_layers"], change, names)


def qwen3(dice: Dice) -> Draw:
    text, rotations = of_decoders(dice, dice.deal("head", [4, 8, 16]))
    text |= {"attention_bias": dice.deal("bias", [False, False, True]), "tie_word_embeddings": dice.deal("tied", [True, False])}
    config = transformers.Qwen3Config(**text, rope_parameters=rotations)
    change = dice.deal("version", [lambda _: None, lambda fields: as_before(fields, None)])
    return Draw(transformers.Qwen3ForCausalLM(config), text["vocab_size"], text["num_hidden_layers"], change)


def mistral3(dice: Dice) -> Draw:
    text, rotations = of_decoders(dice, dice.deal("head", [4, 8, 16, None]))
    text |= {"model_type": "mistral", "rope_parameters": rotations, "sliding_window": dice.deal("window", [None, None, 4096, 5])}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=dice.deal("tied", [False, True]))
    version = dice.deal("version", ["4", "5"])
    moved = [("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"), ("", "model.")]

    def names(name: str) -> list[str]:
        return [name] if version == "4" else [next(new + name.removeprefix(old) for old, new in moved if name.startswith(old))]

    change = lambda fields: as_before(fields["text_config"], None) if version == "4" else None
    return Draw(transformers.Mistral3ForConditionalGeneration(config), text["vocab_size"], text["num_hidden_layers"], change, names)


def siglip(dice: Dice) -> Draw:
    heads, layers = dice.between(1, 4), dice.between(1, 4)
    patch = dice.deal("patch", [4, 7, 14])
    config = transformers.SiglipVisionConfig(
        hidden_size=heads * dice.deal("head", [4, 6, 16]),
        intermediate_size=dice.between(9, 40),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=patch * dice.between(1, 4) + dice.deal("rest", [0, 3]),
        patch_size=patch,
        layer_norm_eps=dice.deal("epsilon", [1e-6, 1e-3]),
    )
    prefix = dice.deal("prefix", ["vision_model.", ""])
    return Draw(transformers.SiglipVisionModel(config), 0, layers, names=lambda name: [prefix + name])


CLASSES = {
    "T5EncoderModel": lambda dice: t5(dice, transformers.T5EncoderModel, transformers.T5Config),
    "UMT5EncoderModel": lambda dice: t5(dice, transformers.UMT5EncoderModel, transformers.UMT5Config),
    "CLIPTextModel": clip,
    "Qwen2_5_VLForConditionalGeneration": qwen25_vl,
    "Qwen3ForCausalLM": qwen3,
    "Mistral3ForConditionalGeneration": mistral3,
    "SiglipVisionModel": siglip,
}


def randomize(model: torch.nn.Module) -> None:
    """Weights with which tokens differ, norms and biases that are no ones and zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            elif any(part in name for part in ["embed", "shared", "relative_attention_bias"]):
                parameter.copy_(noise)
            else:
                parameter.copy_(1.2 * noise / parameter[0].numel() ** 0.5)


def saved(folder: Path, dice: Dice, draw: Draw, dtype: str) -> None:
    """Saves the model in one of the ways in which such models are published, and leaves it as transformers loads it."""
    stored = dice.deal("stored", STORED)
    draw.model.to(torch.float16 if stored == "float16" else getattr(torch, dtype))
    draw.model.save_pretrained(folder)
    draw.model = type(draw.model).from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    config = json.loads((folder / "config.json").read_text())
    draw.change_config(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    renamed = {new: tensor.clone() for old, tensor in tensors.items() for new in draw.names(old)} | draw.more
    files = {"model.safetensors": list(renamed)}
    if stored == "shards":
        files = {f"model-0000{number + 1}-of-00003.safetensors": list(renamed)[number::3] for number in range(3)}
        index = {"weight_map": {name: file for file, names in files.items() for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, names in files.items():
        save_file({name: renamed[name] for name in names}, folder / file, {"format": "pt"})


def texts(dice: Dice, draw: Draw) -> dict[str, torch.Tensor]:
    """Ids, and a mask where there is padding."""
    batch, length = dice.between(2, 4), dice.between(1, draw.longest)
    length = {"any": length, "one": 1, "odd": length - 1 + length % 2, "longest": draw.longest}[
        dice.deal("length", ["any", "odd", "longest", "any", "odd", "longest", "one"])
    ]
    ids = torch.randint(draw.vocabulary, (batch, length), generator=dice.generator)
    if draw.end is not None:
        # The greatest id is the end, and texts are padded with it.
        ids = torch.where(ids >= draw.end, 0, ids)
        for row in ids:
            row[dice.between(0, length - 1) :] = draw.end
    padding = dice.deal("padding", PADDINGS)
    if padding == "none":
        return {"ids": ids}
    counts = torch.tensor([dice.between(1, length) for _ in range(batch)]).unsqueeze(1)
    counts[0] = 0 if "empty" in padding else counts[0]
    places = torch.arange(length).unsqueeze(0)
    mask = places < counts if "right" in padding else places >= length - counts
    if padding == "own":
        mask = torch.rand(batch, length, generator=dice.generator) < 0.7
    return {"ids": ids, "mask": mask.to(dice.deal("mask", [torch.int64, torch.float32]))}


def encoded(draw: Draw, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        output = draw.model(given["ids"], attention_mask=given.get("mask"), output_hidden_states=True)
        body = draw.model if "last_hidden_state" in output else draw.model.model
        last = body(given["ids"], attention_mask=given.get("mask")).last_hidden_state
    found = {f"hidden.{index}": state for index, state in enumerate(output.hidden_states)} | {"last": last}
    if draw.end is not None:
        found["pooled"] = output.pooler_output
    return found


def seen(dice: Dice, draw: Draw, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Pixels and what comes out of them; pictures and what the two backends of the published preprocessor make of them."""
    side = draw.model.config.image_size
    pixels = torch.randn(dice.between(1, 3), 3, side, side, generator=dice.generator)
    height, width = dice.between(1, 3 * side), dice.between(1, 3 * side)
    picture = torch.randint(256, (1, 3, height, width), generator=dice.generator, dtype=torch.uint8)
    resized = interpolate(picture, (side, side), mode="bicubic", antialias=True)
    # Bytes far enough from 0 and 255 that no bicubic overshoot is cut.
    colours = 64 + 127 * torch.rand(1, 3, 4, 4, generator=dice.generator)
    smooth = interpolate(colours, (height, width), mode="bilinear")[0].to(torch.uint8)
    processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    by_pillow = processor.preprocess(
        images=Image.fromarray(smooth.permute(1, 2, 0).numpy()), do_resize=True, do_convert_rgb=True, return_tensors="pt"
    )
    with torch.no_grad():
        last = draw.model(pixels.to(dtype)).last_hidden_state
    return {
        "pixels": pixels,
        "last": last,
        "picture": picture[0],
        "input": (resized[0] / 255 - 0.5) / 0.5,
        "smooth": smooth,
        "by_pillow": by_pillow["pixel_values"][0],
    }


def in_float32(draw: Draw, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What comes out of the same weights and the same rounded pixels without further rounding."""
    wide = replace(draw, model=copy.deepcopy(draw.model).float())
    if draw.vocabulary:
        return encoded(wide, given)
    with torch.no_grad():
        return {"last": wide.model(given["pixels"].bfloat16().float()).last_hidden_state}


def write_case(folder: Path, dice: Dice, draw: Draw, verbose: bool) -> dict:
    dtype = dice.deal("dtype", DTYPES)
    randomize(draw.model)
    saved(folder / "encoder", dice, draw, dtype)
    if draw.vocabulary:
        given = texts(dice, draw)
        tensors = given | {name: state.float() for name, state in encoded(draw, given).items()}
    else:
        tensors = seen(dice, draw, getattr(torch, dtype))
        tensors["last"] = tensors["last"].float()
    if dtype == "bfloat16":
        tensors |= {f"exact.{name}": state for name, state in in_float32(draw, tensors).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "case.safetensors")
    if verbose:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        spread = {name: round(tensor.float().std().item(), 3) for name, tensor in tensors.items()}
        print(folder.name, dtype, draw.model.config, shapes, spread, sep="\n  ")
    subset = dice.random.sample(range(draw.layers + 1), dice.between(1, draw.layers + 1))
    return {"dtype": dtype, "layers": draw.layers, "subset": subset, "pools": draw.end is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("--classes", default=",".join(CLASSES))
    parser.add_argument("--cases", type=int, default=8, help="of each class")
    parser.add_argument("--verbose", action="store_true", help="configuration, shapes and spread of each case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
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
