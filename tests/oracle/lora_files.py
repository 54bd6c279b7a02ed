"""Adapters as PEFT and diffusers write them, and what PEFT and diffusers make of ours.

    lora_files.py make FOLDER SEED     random adapters of tiny random models of the five families
    lora_files.py judge FOLDER SEED    loads what fm-dist wrote there

Needs torch 2.13.0, diffusers 0.42.1, peft 0.21.2, transformers 5.24.0 and safetensors; takes 20 s each, most of it imports. A model is a
function of SEED and its family, and so is the step that it predicts (families.py). `make` writes for each family FOLDER/<family>/

model/config.json          the model
theirs/diffusers/          its adapter by diffusers: `save_lora_weights`, and `save_lora_adapter` for HunyuanVideo 1.5
theirs/peft/               the same by PEFT: `save_pretrained`
theirs/dora/               another one with DoRA, by PEFT
updates.safetensors        by module, what the adapter adds to its weight

`judge` expects what fm-dist made of them: FOLDER/<family>/ours/modules.json with the modules of each file there that diffusers or PEFT
loads; each must load without a warning and add to these modules what `updates.safetensors` says, and the model must predict as one with
the updates in its weights. Beside them dora-peft and dora-diffusers.safetensors, which must predict as theirs, all-comfyui.safetensors
(Wan) and all-kohya.safetensors (FLUX.2), and FOLDER/wide/{diffusers,kohya}.safetensors, FLUX.1's at its real width: their names must be
those of the published single file, as diffusers' converters of weights have them.
"""

import json
import re
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxPipeline, Flux2Pipeline, QwenImagePipeline, WanPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import logging
from families import FAMILIES, Dice, adapter_of, randomize, without_onednn
from flow_matching import Recorder
from nemo_automodel.components.flow_matching.pipeline import FlowMatchingPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

PIPELINES = {"flux": FluxPipeline, "flux2": Flux2Pipeline, "qwen_image": QwenImagePipeline, "wan": WanPipeline}
LISTS = Path(__file__).parent.parent / "fixtures/linears/native"


class Case:
    """One family's model and step."""

    def __init__(self, name: str, seed: int):
        self.name, self.dice = name, Dice(f"{seed} {name} lora")
        self.dice.begin_case()
        self.draw = FAMILIES[name].draw(self.dice, {})
        model = self.draw.model(**self.draw.config)
        randomize(model, self.dice.generator)
        self.weights = model.state_dict()
        self.linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]

    def model(self) -> torch.nn.Module:
        model = self.draw.model(**self.draw.config)
        model.load_state_dict(self.weights)
        return model.eval()

    def predict(self, model: torch.nn.Module) -> torch.Tensor:
        pipeline = FlowMatchingPipeline(adapter_of(self.draw), device=torch.device("cpu"), **self.draw.pipeline)
        recorder = Recorder(pipeline)
        torch.manual_seed(1)
        with torch.no_grad():
            batch = {**self.draw.batch, "data_type": self.draw.data_type}
            pipeline.step(model, batch, torch.device("cpu"), torch.float32, 1, check_loss=False)
        return recorder.tensors["model_pred"]

    def config(self, **further) -> LoraConfig:
        """Every module, two of them with a rank and an alpha of their own."""
        rank, odd = self.dice.between(2, 4), self.dice.random.sample(self.linears, 2)
        return LoraConfig(
            r=rank,
            lora_alpha=self.dice.between(1, 9),
            target_modules="|".join(re.escape(name) for name in self.linears),
            rank_pattern={f"^{odd[0]}": rank + 1},
            alpha_pattern={f"^{odd[1]}": 2.5},
            # Both matrices random.
            init_lora_weights=False,
            **further,
        )

    @staticmethod
    def calm(model: torch.nn.Module) -> torch.nn.Module:
        """Makes the updates smaller than the weights, so that predictions stay near 1."""
        for layer in tuned(model).values():
            for b in layer.lora_B.values():
                b.weight.data *= 0.2
        return model


def tuned(model: torch.nn.Module) -> dict[str, BaseTunerLayer]:
    named = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    return {name: module for name, module in named.items() if isinstance(module, BaseTunerLayer)}


def updates(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.get_delta_weight(layer.active_adapters[0]).detach() for name, layer in tuned(model).items()}


def make(folder: Path, seed: int) -> None:
    for name in FAMILIES:
        case, out = Case(name, seed), folder / name
        torch.manual_seed(seed)
        model, config = case.model(), case.config(use_rslora=case.dice.deal("rslora", [False, True]))
        model.save_config(out / "model")
        model.add_adapter(config, "default")
        case.calm(model)
        save_file({name: update.contiguous() for name, update in updates(model).items()}, out / "updates.safetensors")
        if name in PIPELINES:
            layers, metadata = get_peft_model_state_dict(model), _collate_lora_metadata({"transformer": model})
            PIPELINES[name].save_lora_weights(out / "theirs/diffusers", transformer_lora_layers=layers, **metadata)
        else:
            model.save_lora_adapter(out / "theirs/diffusers", weight_name=LORA_WEIGHT_NAME_SAFE)
        wrapped = get_peft_model(case.model(), config)
        by_name = {f"base_model.model.{name}": value for name, value in model.state_dict().items()}
        wrapped.load_state_dict(by_name)
        wrapped.save_pretrained(out / "theirs/peft")
        dora = case.calm(get_peft_model(case.model(), case.config(use_dora=True)))
        for layer in tuned(dora).values():
            for magnitude in layer.lora_magnitude_vector.values():
                magnitude.weight.data *= 1 + 0.2 * torch.rand(magnitude.weight.shape)
        dora.save_pretrained(out / "theirs/dora")


def loaded(case: Case, file: Path) -> torch.nn.Module:
    """A fresh model with the adapter of a file or of PEFT's folder, by what users would call."""
    model = case.model()
    if file.name.endswith("peft"):
        return PeftModel.from_pretrained(model, file).eval()
    if case.name not in PIPELINES:
        model.load_lora_adapter(file.parent, weight_name=file.name, prefix="transformer")
        return model
    pipeline = PIPELINES[case.name]
    pipeline.load_lora_weights(Loader(pipeline, model), file.parent, weight_name=file.name)
    return model


class Loader:
    """A pipeline of a transformer alone."""

    hf_device_map = text_encoder = None

    def __init__(self, pipeline: type, transformer: torch.nn.Module):
        self.pipeline, self.transformer, self.components = pipeline, transformer, {"transformer": transformer}

    def __getattr__(self, name: str):
        found = getattr(self.pipeline, name)
        return partial(found, self) if callable(found) and not hasattr(found, "__self__") else found


def assert_close(found: torch.Tensor, expected: torch.Tensor, bound: float, what: str) -> None:
    difference = (found - expected).norm() / expected.norm().clamp(min=1e-12)
    assert difference <= bound, f"{what}: ‖difference‖ is {difference:.1e} of ‖expected‖, allowed {bound:.1e}"


def judge_file(case: Case, file: Path, expected: dict[str, torch.Tensor]) -> None:
    model = loaded(case, file)
    found = updates(model)
    # Files may be of a part of the modules; then diffusers fills up matrices with zeros.
    part = set(json.loads((file.parent / "modules.json").read_text())[file.name])
    assert part <= found.keys(), f"{file}: {sorted(part - found.keys())[:5]} got nothing"
    for name, update in found.items():
        if name in part:
            assert_close(update, expected[name], 1e-5, f"{file}: {name}")
        else:
            assert not update.any(), f"{file}: {name} was changed"
    merged = case.model()
    for name in part:
        merged.get_submodule(name).weight.data += expected[name]
    assert_close(case.predict(model), case.predict(merged), 2e-5, f"the prediction with {file}")


def judge_dora(case: Case, folder: Path) -> None:
    expected = case.predict(PeftModel.from_pretrained(case.model(), folder / "theirs/dora").eval())
    for file in ["dora-peft", "dora-diffusers.safetensors"]:
        assert_close(case.predict(loaded(case, folder / "ours" / file)), expected, 2e-5, f"DoRA of {folder / file}")


def probe(inputs: int) -> torch.Tensor:
    """What stands for a weight is its product with these columns: rows stay rows, and numbers few."""
    return torch.randn(inputs, 3, generator=torch.Generator().manual_seed(inputs))


def probed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The probes of a file's pairs by their names, without prefix."""
    found = {}
    for key, a in tensors.items():
        for down, up in [(".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")]:
            if key.endswith(down):
                stem = key.removesuffix(down)
                scale = float(tensors.get(f"{stem}.alpha", a.shape[0])) / a.shape[0]
                product = tensors[f"{stem}{up}"].float() @ (a.float() @ probe(a.shape[1])) * scale
                found[re.sub(r"^(transformer\.|diffusion_model\.|lora_unet_)", "", stem)] = product
    return found


class Checkpoint(dict):
    """A single file of weights; what no adapter changes is zero."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__(weights)
        self.biases = {re.sub(r"weight$", "bias", name): torch.zeros(weight.shape[0]) for name, weight in weights.items()}

    def pop(self, key, *_default):
        return super().pop(key) if key in self else self.biases.get(key, torch.zeros(2))


def judge_native(native: dict[str, torch.Tensor], convert, expected: dict[str, torch.Tensor], what: str) -> None:
    """What diffusers makes of the single file's weights it must make of their updates."""
    found = convert(Checkpoint({f"{name}.weight": update for name, update in native.items()}))
    for name, update in expected.items():
        assert_close(found[f"{name}.weight"], update, 1e-5, f"{what}: {name}")


def dotted(flat: dict[str, torch.Tensor], model: str) -> dict[str, torch.Tensor]:
    """Names of kohya's with their dots, by the list of the published file."""
    names = [line.split(" ")[0] for line in (LISTS / f"{model}.txt").read_text().splitlines()]
    spelled = {name.replace("*", str(block)).replace(".", "_"): name.replace("*", str(block)) for name in names for block in range(60)}
    return {spelled[name]: update for name, update in flat.items()}


def judge(folder: Path, seed: int) -> None:
    for name in FAMILIES:
        case, expected = Case(name, seed), load_file(folder / name / "updates.safetensors")
        ours = folder / name / "ours"
        for file in sorted(json.loads((ours / "modules.json").read_text())):
            judge_file(case, ours / file, expected)
        judge_dora(case, folder / name)
        probes = {module: update @ probe(update.shape[1]) for module, update in expected.items()}
        if name == "wan":
            judge_native(probed(load_file(ours / "all-comfyui.safetensors")), convert_wan_transformer_to_diffusers, probes, "Wan's own names")
        if name == "flux2":
            native = dotted(probed(load_file(ours / "all-kohya.safetensors")), "flux2-dev")
            judge_native(native, convert_flux2_transformer_checkpoint_to_diffusers, probes, "FLUX.2's own names")
    wide = probed(load_file(folder / "wide/diffusers.safetensors"))
    kohya = load_file(folder / "wide/kohya.safetensors")
    judge_native(dotted(probed(kohya), "flux1-dev"), convert_flux_transformer_checkpoint_to_diffusers, wide, "FLUX.1's own names")
    converted = FluxPipeline.lora_state_dict(kohya)
    found = probed(converted)
    for name, update in wide.items():
        assert_close(found[name], update, 1e-5, f"kohya's file by diffusers: {name}")
    # Where alpha is the rank, the converter gives back diffusers' file.
    for key, matrix in load_file(folder / "wide/diffusers.safetensors").items():
        if key.startswith("transformer.transformer_blocks."):
            assert torch.equal(converted[key], matrix), f"kohya's file by diffusers: {key}"


def main() -> None:
    command, folder, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.nn.Conv3d._conv_forward = without_onednn(torch.nn.Conv3d._conv_forward)
    logging.disable_progress_bar()
    if command == "make":
        make(folder, seed)
        return
    # A missing or an unexpected key is a warning of diffusers or PEFT, and here an error.
    warnings.simplefilter("error", RuntimeWarning)
    logger = logging.get_logger("diffusers")
    logger.warning = refuse
    for name in ["lora_base", "lora_pipeline", "peft", "lora_conversion_utils"]:
        sys.modules[f"diffusers.loaders.{name}"].logger.warning = refuse
    sys.modules["diffusers.utils.peft_utils"].logger.warning = refuse
    judge(folder, seed)


def refuse(text: str, *_arguments) -> None:
    # FLUX.1's loader also looks for an adapter of the text encoder, which the pipeline here lacks.
    if "No LoRA keys associated to NoneType" not in text:
        raise AssertionError(f"diffusers warns: {text}")


if __name__ == "__main__":
    main()
