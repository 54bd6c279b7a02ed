"""Samples with the pipelines of diffusers 0.42.1 on a CPU, each family in its own way, and writes what went in and what came out.

    python sampling.py families OUT_DIR SEED
    python sampling.py schedulers OUT_DIR SEED
    python sampling.py exported FAMILY FOLDER CONDITIONS.safetensors OUT.safetensors --steps 5 --shift 3 --guidance 4 [--lora FILE:SCALE]...
    python sampling.py digits CHECKPOINT.safetensors CONDITIONS.safetensors OUT.safetensors --steps 5 --shift 2 --guidance 1.3 --patch 2

Needs torch 2.13.0, diffusers 0.42.1, nemo-automodel 0.5.0 (for `digits`) and safetensors.

The pipelines are diffusers' own. They import the package of their text encoders, of which sampling from embeddings uses nothing: empty
classes stand in its place, so that it need not be installed.

`families` writes OUT_DIR/sampling.json, one entry a case, and OUT_DIR/sampling.safetensors with `<case>.sigmas` and `<case>.timesteps`; a case that is a whole
trajectory has also `.noise`, `.text`, perhaps `.negative`, and `.samples`, the latents at its end. The model is a formula that a
test can repeat; a real transformer goes into `generate` just so. The schedulers are configured as the published checkpoints
configure them.

`schedulers` writes OUT_DIR/schedulers.json, one entry a case, OUT_DIR/<case>/scheduler/ as a published pipeline has it, and
OUT_DIR/schedulers.safetensors with `<case>.sigmas` and `<case>.timesteps`.

`exported` follows the transformer in FOLDER from the `noise` among the conditions, which have the reference's keys, and writes `samples`
and `sigmas`; the transformer has the adapters that are named.

`digits` follows the demo's transformer of dit.py from `noise` under classifier-free guidance against `negative.text_embeddings`, or
zeros, and writes `samples` and `sigmas`.
"""

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import json
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.utils import import_utils
from safetensors.torch import load_file, save_file

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
SCHEDULERS = {
    "flux_dev": DYNAMIC | {"shift": 3.0},
    "flux_schnell": {"shift": 1.0},
    "flux2": DYNAMIC | {"shift": 3.0},
    "qwen_image": DYNAMIC | {"max_shift": 0.9, "max_image_seq_len": 8192, "shift": 1.0, "shift_terminal": 0.02},
    "wan": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "wan_euler": {},
    "hunyuan_video": {},
}
PIPELINES = {
    "flux_dev": "flux.pipeline_flux.FluxPipeline",
    "flux_schnell": "flux.pipeline_flux.FluxPipeline",
    "flux2": "flux2.pipeline_flux2.Flux2Pipeline",
    "qwen_image": "qwenimage.pipeline_qwenimage.QwenImagePipeline",
    "wan": "wan.pipeline_wan.WanPipeline",
    "wan_euler": "wan.pipeline_wan.WanPipeline",
    "hunyuan_video": "hunyuan_video1_5.pipeline_hunyuan_video1_5.HunyuanVideo15Pipeline",
}
VIDEO = ["wan", "wan_euler", "hunyuan_video"]
NUM_SIGMA_CASES = 8
NUM_TRAJECTORIES = 4
NUM_SCHEDULERS = 60
# Fields of the line by which a shift follows from the number of tokens, with the defaults of the pipelines that draw it.
LINE = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


def scheduler_of(family: str, flow_shift: float) -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
    """As published; the families with a constant shift take the run's."""
    if family == "wan":
        return UniPCMultistepScheduler(flow_shift=flow_shift, **SCHEDULERS[family])
    return FlowMatchEulerDiscreteScheduler(**({"shift": flow_shift} | SCHEDULERS[family]))


class Formula(torch.nn.Module):
    """Stands where a transformer stands: every input counts, and each element by itself, so that packing changes nothing."""

    def __init__(self, channels: int, timestep_scale: float, guidance_embeds: bool):
        super().__init__()
        self.config = SimpleNamespace(
            in_channels=4 * channels, guidance_embeds=guidance_embeds, patch_size=(1, 2, 2), target_size=640, image_embed_dim=8
        )
        self.channels, self.timestep_scale = channels, timestep_scale
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def cache_context(self, *_, **__):
        return contextlib.nullcontext()

    def forward(self, hidden_states, timestep, encoder_hidden_states, guidance=None, **_):
        if hidden_states.ndim == 5:
            hidden_states = hidden_states[:, : self.channels]
        per_sample = (-1,) + (1,) * (hidden_states.ndim - 1)
        text = encoder_hidden_states.mean(dim=(1, 2)).view(per_sample)
        time = (timestep / self.timestep_scale).view(per_sample)
        fed = 0.0 if guidance is None else guidance.view(per_sample)
        return (torch.tanh(hidden_states) * (1 + text) + 0.25 * time * text + 0.05 * fed,)


class Vae(torch.nn.Module):
    """The sizes that HunyuanVideo's pipeline asks its autoencoder for."""

    def __init__(self, channels: int):
        super().__init__()
        self.config = SimpleNamespace(latent_channels=channels)
        self.temporal_compression_ratio, self.spatial_compression_ratio, self.device = 4, 16, torch.device("cpu")


class Absent(ModuleType):
    """A package that is not installed: whatever is taken from it is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in ["transformers", "tokenizers"]
        return importlib.machinery.ModuleSpec(name, self) if absent else None

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        pass


def stand_in_for_text_encoders() -> None:
    """Behind every other finder, so that what is installed is used; asked before the first pipeline is imported."""
    sys.meta_path.append(AbsentFinder())
    import_utils._transformers_available, import_utils._transformers_version = True, "4.57.0"


def pipeline_of(family: str, model: torch.nn.Module, scheduler: FlowMatchEulerDiscreteScheduler, channels: int, scale: float):
    """The family's pipeline around a model, without encoders."""
    module, name = PIPELINES[family].rsplit(".", 1)
    parts = {"scheduler": scheduler, "transformer": model, "text_encoder": None, "tokenizer": None, "vae": None}
    if family in ["flux_dev", "flux_schnell", "hunyuan_video"]:
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    if family == "hunyuan_video":
        guiders = importlib.import_module("diffusers.guiders")
        parts |= {"vae": Vae(channels), "guider": guiders.ClassifierFreeGuidance(guidance_scale=scale)}
    pipeline = getattr(importlib.import_module(f"diffusers.pipelines.{module}"), name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(family: str, model, scheduler, noise, conditions: dict, steps: int, scale: float, true_cfg_scale: float = 1.0):
    """The end of the trajectory from `noise`, in its shape, as the family's pipeline follows it.

    `conditions` has the pipeline's own names, `prompt_embeds` and so on. `scale` is the family's guidance: what the model is fed
    where it embeds it, classifier-free otherwise; `true_cfg_scale` is FLUX's second one.
    """
    pipeline = pipeline_of(family, model, scheduler, noise.shape[1], scale)
    height, width = noise.shape[-2:]
    common = conditions | {"num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    match family:
        case "flux_dev" | "flux_schnell" | "qwen_image":
            packed = pipeline._pack_latents(noise, noise.shape[0], noise.shape[1], height, width)
            if family == "qwen_image":
                common |= {"true_cfg_scale": scale}
            else:
                common |= {"guidance_scale": scale, "true_cfg_scale": true_cfg_scale}
            end = pipeline(latents=packed, height=8 * height, width=8 * width, **common)[0]
            return pipeline._unpack_latents(end, 8 * height, 8 * width, 8).view(noise.shape)
        case "flux2":
            end = pipeline(latents=noise, height=16 * height, width=16 * width, guidance_scale=scale, **common)[0]
            return end.transpose(1, 2).reshape(noise.shape)
        case "wan" | "wan_euler":
            frames = 4 * (noise.shape[2] - 1) + 1
            return pipeline(latents=noise, height=8 * height, width=8 * width, num_frames=frames, guidance_scale=scale, **common)[0]
        case "hunyuan_video":
            frames = 4 * (noise.shape[2] - 1) + 1
            return pipeline(latents=noise, height=16 * height, width=16 * width, num_frames=frames, **common)[0]


def conditions_of(family: str, text: torch.Tensor, negative: torch.Tensor | None) -> dict:
    """Embeddings under the pipeline's names; what the formula does not look at is ones."""
    given = {"prompt_embeds": text}
    if negative is not None and family != "flux2":
        given["negative_prompt_embeds"] = negative
    prefixes = [name.removesuffix("prompt_embeds") for name in given]
    ones = torch.ones(text.shape[:2])
    for prefix in prefixes:
        if family.startswith("flux_"):
            given[f"{prefix}pooled_prompt_embeds"] = torch.ones(text.shape[0], 4)
        if family == "hunyuan_video":
            given[f"{prefix}prompt_embeds_mask"] = ones
            given[f"{prefix}prompt_embeds_2"] = text[:, :, :2]
            given[f"{prefix}prompt_embeds_mask_2"] = ones
    return given


def sigmas_case(family: str, dice: random.Random) -> tuple[dict, FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler]:
    """Noise levels alone, at sizes that no test could afford to follow."""
    steps, flow_shift = dice.choice([2, 3, dice.randint(4, 60)]), dice.uniform(0.5, 9.0)
    side = [2 * dice.randint(4, 90) for _ in range(2)]
    shape = [16, dice.randint(1, 20), *side] if family in VIDEO else [16, *side]
    scheduler = scheduler_of(family, flow_shift)
    noise = torch.zeros(1, 1, *shape[1:]) if family not in VIDEO else torch.zeros(1, 1, 1, 2, 2)
    stand_in = Formula(1, 1.0, family in ["flux_dev", "flux2"])
    text = torch.zeros(1, 1, 3)
    generate(family, stand_in, scheduler, noise, conditions_of(family, text, text), steps, 1.0)
    return {"family": family, "steps": steps, "flow_shift": flow_shift, "shape": shape}, scheduler


def trajectory_case(family: str, index: int, dice: random.Random) -> tuple[dict, dict[str, torch.Tensor]]:
    """A few steps of a few small samples; the first case of a family is not guided, the others are."""
    batch, channels, steps, flow_shift = dice.randint(1, 3), dice.randint(1, 4), dice.randint(1, 12), dice.uniform(0.5, 9.0)
    if family == "qwen_image":
        steps = max(steps, 2)  # one step stretched to a terminal level is 0 / 0 there
    side = [2 * dice.randint(1, 5) for _ in range(2)]
    shape = [channels, dice.randint(1, 3), *side] if family in VIDEO else [channels, *side]
    noise, text = torch.randn(batch, *shape), torch.randn(batch, 3, 5) * 0.3
    guided = index > 0
    embeds = family in ["flux_dev", "flux2"]
    negative = torch.randn(batch, 3, 5) * 0.3 if guided and dice.random() < 0.7 and family != "flux2" else None
    scale = dice.uniform(1.1, 6.0) if guided or embeds else 1.0
    true_cfg_scale = dice.uniform(1.1, 6.0) if family == "flux_dev" and negative is not None else 1.0
    if family == "flux_schnell":
        scale, true_cfg_scale = 1.0, scale  # without an embedder the only guidance is the true one
    against = negative if negative is not None or embeds else torch.zeros_like(text)
    model = Formula(channels, 1000.0 if family in VIDEO else 1.0, embeds)
    scheduler = scheduler_of(family, flow_shift)
    end = generate(family, model, scheduler, noise, conditions_of(family, text, against), steps, scale, true_cfg_scale)
    if family == "flux_schnell":
        scale, true_cfg_scale = true_cfg_scale, 1.0
    case = {"family": family, "steps": steps, "flow_shift": flow_shift, "shape": shape, "scale": scale, "true_cfg_scale": true_cfg_scale}
    tensors = {"sigmas": scheduler.sigmas, "timesteps": scheduler.timesteps, "noise": noise, "text": text, "samples": end}
    return case, tensors | ({} if negative is None else {"negative": negative})


def levels_of(name: str, scheduler: FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler) -> dict[str, torch.Tensor]:
    return {f"{name}.sigmas": scheduler.sigmas, f"{name}.timesteps": scheduler.timesteps}


def scheduler_case(dice: random.Random) -> tuple[dict, FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler]:
    """A scheduler as a pipeline may be published with, set up as one that gives it levels, or a shift for its tokens, does."""
    unipc, dynamic = dice.random() < 0.5, dice.random() < 0.5
    gives_levels = dynamic or dice.random() < 0.5
    steps, tokens = dice.randint(2, 60), dice.randint(1, 9000)
    config = {"use_dynamic_shifting": dynamic, "flow_shift" if unipc else "shift": dice.choice([1.0, 3.0, 5.0, dice.uniform(0.5, 16.0)])}
    if dynamic and not unipc:
        config |= {"base_shift": dice.uniform(0.2, 0.8), "max_shift": dice.uniform(0.9, 1.6)}
        config |= {"base_image_seq_len": dice.choice([128, 256]), "max_image_seq_len": dice.choice([4096, 8192])}
    if gives_levels and dice.random() < 0.4:
        config["shift_terminal"] = dice.uniform(0.01, 0.1)
    of_class = SCHEDULERS["wan"] if unipc else {}
    by_class = [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler]
    of_other = [{"shift": dice.uniform(0.5, 16.0)}, SCHEDULERS["wan"] | {"flow_shift": dice.uniform(0.5, 16.0)}]
    # As a pipeline whose scheduler was exchanged is saved: with the fields of the one before.
    before = by_class[not unipc](**of_other[not unipc]).config if dice.random() < 0.4 else {}
    scheduler = by_class[unipc].from_config(before, **config, **of_class)
    line = [scheduler.config.get(*known) for known in LINE.items()]
    calculate_shift = importlib.import_module("diffusers.pipelines.flux.pipeline_flux").calculate_shift
    given = {"mu": calculate_shift(tokens, *line)} if dynamic else {}
    given |= {"sigmas": np.linspace(1.0, 1 / steps, steps)} if gives_levels else {"num_inference_steps": steps}
    scheduler.set_timesteps(**given)
    return {"steps": steps, "tokens": tokens, "gives_levels": gives_levels, "solver": "unipc" if unipc else "euler"}, scheduler


def schedulers(out: Path, seed: int) -> None:
    stand_in_for_text_encoders()
    dice = random.Random(seed)
    cases, tensors = [], {}
    for index in range(NUM_SCHEDULERS):
        case, scheduler = scheduler_case(dice)
        name = f"{index:03d}"
        scheduler.save_pretrained(out / name / "scheduler")
        cases.append(case | {"name": name})
        tensors |= levels_of(name, scheduler)
    save_file(tensors, out / "schedulers.safetensors")
    (out / "schedulers.json").write_text(json.dumps(cases, indent=1))


def families(out: Path, seed: int) -> None:
    stand_in_for_text_encoders()
    dice = random.Random(seed)
    torch.manual_seed(seed)
    cases, tensors = [], {}
    for family in SCHEDULERS:
        for _ in range(NUM_SIGMA_CASES):
            case, scheduler = sigmas_case(family, dice)
            cases.append(case | {"name": f"{len(cases):03d}", "trajectory": False})
            tensors |= levels_of(cases[-1]["name"], scheduler)
        for index in range(NUM_TRAJECTORIES):
            case, found = trajectory_case(family, index, dice)
            cases.append(case | {"name": f"{len(cases):03d}", "trajectory": True})
            tensors |= {f"{cases[-1]['name']}.{key}": tensor.contiguous() for key, tensor in found.items()}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    save_file(tensors, out / "sampling.safetensors")
    (out / "sampling.json").write_text(json.dumps(cases, indent=1))


PIPELINE_NAMES = {
    "text_embeddings": "prompt_embeds",
    "pooled_prompt_embeds": "pooled_prompt_embeds",
    "text_mask": "prompt_embeds_mask",
    "text_embeddings_2": "prompt_embeds_2",
    "text_mask_2": "prompt_embeds_mask_2",
}


def exported(arguments: argparse.Namespace) -> None:
    stand_in_for_text_encoders()
    from exported import load  # imports all of nemo-automodel

    model, given = load(Path(arguments.folder)), load_file(arguments.conditions)
    negative = {key.removeprefix("negative."): tensor for key, tensor in given.items() if key.startswith("negative.")}
    conditions = {name: given[key] for key, name in PIPELINE_NAMES.items() if key in given}
    if negative:
        conditions |= {f"negative_{name}": negative.get(key, given[key]) for key, name in PIPELINE_NAMES.items() if key in given}
    scheduler = scheduler_of(arguments.family, arguments.shift)
    add(model, arguments.lora)
    with torch.no_grad():
        end = generate(arguments.family, model, scheduler, given["noise"], conditions, arguments.steps, arguments.guidance)
    save_file({"samples": end.contiguous(), "sigmas": scheduler.sigmas}, arguments.out)


def add(model: torch.nn.Module, loras: list[str]) -> None:
    """Adapters of a transformer, FILE:SCALE each, by what users would call."""
    scales = {}
    for number, lora in enumerate(loras):
        path, scale = lora.rsplit(":", 1)
        scales[f"adapter{number}"] = float(scale)
        file = Path(path)
        model.load_lora_adapter(file.parent, weight_name=file.name, prefix="transformer", adapter_name=f"adapter{number}")
    if scales:
        model.set_adapters(list(scales), list(scales.values()))


def digits(arguments: argparse.Namespace) -> None:
    from dit import Dit  # imports all of nemo-automodel

    weights, given = load_file(arguments.checkpoint), load_file(arguments.conditions)
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    model = Dit(weights, depth, arguments.heads, arguments.patch)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=arguments.shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / arguments.steps, arguments.steps))
    x, text = given["noise"], given["text_embeddings"]
    negative = given.get("negative.text_embeddings", torch.zeros_like(text))
    with torch.no_grad():
        for t in scheduler.timesteps:
            conditional, unconditional = (model(x, t.expand(x.shape[0]), prompt, None, False)[0] for prompt in (text, negative))
            velocity = unconditional + arguments.guidance * (conditional - unconditional)
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
    save_file({"samples": x, "sigmas": scheduler.sigmas}, arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ["families", "schedulers"]:
        command = commands.add_parser(name)
        command.add_argument("out", type=Path)
        command.add_argument("seed", type=int)
    command = commands.add_parser("exported")
    command.add_argument("family", choices=SCHEDULERS)
    for name in ["folder", "conditions", "out"]:
        command.add_argument(name)
    command.add_argument("--steps", type=int, required=True)
    for name in ["--shift", "--guidance"]:
        command.add_argument(name, type=float, required=True)
    command.add_argument("--lora", action="append", default=[])
    command = commands.add_parser("digits")
    for name in ["checkpoint", "conditions", "out"]:
        command.add_argument(name)
    for name in ["--steps", "--heads", "--patch"]:
        command.add_argument(name, type=int, required=True)
    for name in ["--shift", "--guidance"]:
        command.add_argument(name, type=float, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    match arguments.command:
        case "families":
            families(arguments.out, arguments.seed)
        case "schedulers":
            schedulers(arguments.out, arguments.seed)
        case "exported":
            exported(arguments)
        case "digits":
            digits(arguments)


if __name__ == "__main__":
    main()
