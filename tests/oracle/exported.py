"""What diffusers makes of an exported folder: every key where it belongs, and the loss and gradients of one step of the reference.

    exported.py FOLDER ADAPTER BATCH OUT --seed N

FOLDER is loaded by `from_pretrained`, which must find no key missing, unexpected or misshapen; then the reference's pipeline takes one
step with its default arguments, i2v_prob and cfg_dropout_prob 0, and OUT gets `model_pred`, `average_weighted_loss` and `grad.<name>`.
"""

import argparse
import json
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
from flow_matching import Recorder
from nemo_automodel.components.flow_matching.adapters import FluxAdapter, HunyuanAdapter, SimpleAdapter
from nemo_automodel.components.flow_matching.adapters.flux2 import Flux2Adapter
from nemo_automodel.components.flow_matching.adapters.qwen_image import QwenImageAdapter
from nemo_automodel.components.flow_matching.pipeline import FlowMatchingPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ADAPTERS = {
    "flux": FluxAdapter,
    "flux2": Flux2Adapter,
    "hunyuan": lambda: HunyuanAdapter(default_image_embed_shape=(7, 8)),
    "qwen_image": QwenImageAdapter,
    "simple": SimpleAdapter,
}


def load(folder: Path) -> torch.nn.Module:
    """The model in float32, all of its keys accounted for."""
    model_class = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    # The list is empty of meaning in float32, and asks for another package.
    with patch.object(model_class, "_keep_in_fp32_modules", None):
        model, info = model_class.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("adapter", choices=ADAPTERS)
    parser.add_argument("batch")
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load(arguments.folder)
    batch = dict(load_file(arguments.batch))
    with safe_open(arguments.batch, "pt") as file:
        batch["data_type"] = file.metadata()["data_type"]
    device = torch.device("cpu")
    pipeline = FlowMatchingPipeline(ADAPTERS[arguments.adapter](), device=device, i2v_prob=0.0, cfg_dropout_prob=0.0)
    recorder = Recorder(pipeline)
    torch.manual_seed(arguments.seed)
    _, average, *_ = pipeline.step(model, batch, device, torch.float32, 1, check_loss=False)
    average.backward()
    zeros = torch.zeros_like
    gradients = {name: zeros(value) if value.grad is None else value.grad for name, value in model.named_parameters()}
    tensors = {f"grad.{name}": gradient.contiguous() for name, gradient in gradients.items()}
    tensors |= {name: recorder.tensors[name] for name in ["model_pred", "average_weighted_loss"]}
    save_file(tensors, arguments.out)


if __name__ == "__main__":
    main()
