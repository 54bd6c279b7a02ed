"""Runs one training step of tiny random models of the five real families with LoRAs of PEFT on them, and writes what went in and came out.

    python lora.py OUT_DIR SEED [--families flux,flux2,qwen_image,wan,hunyuan_video15] [--cases N]

Needs peft 0.21.2 and its dependencies beside what families.py needs, whose models, batches and steps these are. SEED alone decides every
draw. Writes what families.py writes, a case at least for each of plain LoRA, rsLoRA and DoRA, and

<family>-<number>/lora.safetensors  A, B and DoRA's magnitude of every module that PEFT changed, all away from what they begin as, under
                                    diffusers' names: `<module>.lora_A.weight`, `<module>.lora_B.weight`, `<module>.lora_magnitude_vector`;
                                    `<module>.alpha` is its scale times its rank

`grad.<name>` stands for the tensors of lora.safetensors alone; `gradient_norm` in cases.json is that of the model's and these.
"""

import argparse
import json
from pathlib import Path

import families
import torch
from diffusers.utils import logging
from families import FAMILIES, Dice, Draw, Place, adapter_of, in_float32, load_model, pipeline_arguments, save_model
from flow_matching import DTYPES, Recorder
from nemo_automodel.components.flow_matching.pipeline import FlowMatchingPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

# Kinds of LoRA; most are plain ones.
KINDS = [{}, {"use_rslora": True}, {"use_dora": True}, {}]
# PEFT's targets for our words.
ATTENTION = {
    "flux": r".*attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    "flux2": r".*attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)|single_transformer_blocks\..*attn\.to_out",
    "qwen_image": r".*attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    "wan": r".*attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)",
    "hunyuan_video15": r"transformer_blocks\..*attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
}


def linears(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def draw_settings(family: str, model: torch.nn.Module, dice: Dice) -> tuple[dict, LoraConfig]:
    """A LoRA as our settings and as PEFT's."""
    rank, kind = dice.between(1, 8), dice.deal("kind", KINDS)
    alpha = {"rank": rank, "twice": 2 * rank, "any": 3.5}[dice.deal("alpha", ["rank", "twice", "any"])]
    word = dice.deal("targets", ["attention", "all-linear", "some"])
    if word == "attention":
        ours, theirs = [word], ATTENTION[family]
    elif word == "all-linear":
        ours, theirs = [word], linears(model)
    else:
        ours = theirs = sorted(dice.random.sample(linears(model), 3))
    other = {}
    if dice.deal("patterns", [False, True]) and word == "attention":
        # PEFT takes a regular expression of the name's end, we a pattern of it.
        other = {"to_k": dice.between(1, 5)}
    settings = {"lora.rank": rank, "lora.alpha": alpha, "lora.target_modules": ours, **{f"lora.{key}": value for key, value in kind.items()}}
    if other:
        settings |= {f"lora.rank_pattern.{name}": value for name, value in other.items()}
    return settings, LoraConfig(r=rank, lora_alpha=alpha, target_modules=theirs, rank_pattern=other, **kind)


def add_lora(model: torch.nn.Module, config: LoraConfig, dice: Dice) -> None:
    """PEFT's LoRA on the model; no matrix is what it began as."""
    inject_adapter_in_model(config, model)
    # The whole model's gradient is what rounding of any part of it is measured by.
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            # A tenth of what the model does, as a trained one, whatever its scale is.
            for matrix, size in ((down, 1.0), (up, 0.1 / module.scaling["default"])):
                noise = torch.randn(matrix.shape, generator=dice.generator) / matrix.shape[1] ** 0.5
                matrix.data.copy_(size * noise)
            if "default" in module.lora_magnitude_vector:
                magnitude = module.lora_magnitude_vector["default"].weight
                magnitude.data *= (1 + 0.25 * torch.randn(magnitude.shape, generator=dice.generator)).to(magnitude.dtype)


def ours(name: str) -> str:
    """Our name of a parameter of PEFT's."""
    return name.replace(".default.weight", "").replace("lora_A", "lora_A.weight").replace("lora_B", "lora_B.weight").replace(".default", "")


def gradients(model: torch.nn.Module) -> dict:
    """The gradients of the LoRA, contiguous."""
    of_lora = {ours(name): parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    return {f"grad.{name}": (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).contiguous() for name, parameter in of_lora.items()}


def run_case(folder: Path, family: str, dice: Dice, draw: Draw, place: Place) -> dict:
    """Writes one case's folder and returns its entry in cases.json."""
    arguments = pipeline_arguments(dice) | draw.pipeline
    dtype = dice.deal("dtype", ["float32", "float32", "bfloat16"])
    save_model(folder / "model", draw, dice)
    save_file({key: tensor.contiguous() for key, tensor in draw.batch.items()}, folder / "batch.safetensors", {"data_type": draw.data_type})
    model = load_model(draw.model, folder / "model", DTYPES[dtype])
    settings, config = draw_settings(family, model, dice)
    add_lora(model, config, dice)
    trained = {ours(name): parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    loras = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    alphas = {f"{name}.alpha": torch.tensor(module.scaling["default"] * module.r["default"]) for name, module in loras.items()}
    save_file({name: tensor.detach().float().contiguous() for name, tensor in {**trained, **alphas}.items()}, folder / "lora.safetensors")
    pipeline = FlowMatchingPipeline(adapter_of(draw), device=place.device, **arguments)
    recorder, seed = Recorder(pipeline), dice.random.getrandbits(32)
    place.step(pipeline, model, draw, DTYPES[dtype], seed).backward()
    found = gradients(model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert any(gradient.any() for gradient in found.values()), "a case without any gradient"
    save_file({**recorder.tensors, **found}, folder / "expected.safetensors")
    if dtype == "bfloat16":
        save_file(in_float32(place, pipeline, model, draw, seed, gradients), folder / "exact.safetensors")
    norms = [parameter.grad.double().norm() for parameter in model.parameters() if parameter.grad is not None]
    adapter = {f"flow_matching.adapter.{key}": value for key, value in draw.adapter.items()}
    return {
        "dtype": dtype,
        "seed": seed,
        "settings": {
            "flow_matching.adapter_type": draw.adapter_type,
            **adapter,
            **{f"flow_matching.{key}": value for key, value in arguments.items()},
            **settings,
        },
        "vanishing_gradients": [],
        "gradient_norm": torch.stack(norms).norm().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--cases", type=int, default=len(KINDS), help="of each family")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.nn.Conv3d._conv_forward = families.without_onednn(torch.nn.Conv3d._conv_forward)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    entries, place = [], Place(torch.device("cpu"), "host")
    for name in arguments.families.split(","):
        dice, family = Dice(f"{arguments.seed} lora {name}"), FAMILIES[name]
        for number in range(arguments.cases):
            dice.begin_case()
            folder = f"{name}-{number}"
            (arguments.out / folder).mkdir()
            case = run_case(arguments.out / folder, name, dice, family.draw(dice, {}), place)
            entries.append({"name": folder, "family": name, "folder": folder, **case})
    (arguments.out / "cases.json").write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
