"""Runs torch.optim.AdamW on named parameters, one group a parameter, each with factors of its own.

    python param_groups.py CASE.json OUT.safetensors SEED

Needs torch and safetensors; takes 5 s, most of it imports. CASE.json holds `lr`, `weight_decay` and `parameters`: a list of
{"name", "shape", "lr_factor", "decay_factor"}. OUT.safetensors holds for each name `begin.NAME`, `gradients.NAME` [S, ...]
and `parameters.NAME` [S, ...], the values after each step.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

NUM_STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes steps of PyTorch's AdamW with parameter groups.")
    parser.add_argument("case", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case = json.loads(arguments.case.read_text())
    generator = torch.Generator().manual_seed(arguments.seed)
    groups, tensors = {}, {}
    for info in case["parameters"]:
        name, shape = info["name"], info["shape"]
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
        tensors[f"begin.{name}"] = parameter.detach().clone()
        tensors[f"gradients.{name}"] = torch.randn([NUM_STEPS, *shape], generator=generator)
        groups[name] = {
            "params": [parameter],
            "lr": case["lr"] * info["lr_factor"],
            "weight_decay": case["weight_decay"] * info["decay_factor"],
        }
    optimizer = torch.optim.AdamW(list(groups.values()), foreach=False)
    steps = {name: [] for name in groups}
    for step in range(NUM_STEPS):
        for name, group in groups.items():
            group["params"][0].grad = tensors[f"gradients.{name}"][step].clone()
        optimizer.step()
        for name, group in groups.items():
            steps[name].append(group["params"][0].detach().clone())
    tensors |= {f"parameters.{name}": torch.stack(values) for name, values in steps.items()}
    save_file(tensors, arguments.out)
    print(f"seed {arguments.seed}: {len(groups)} parameters over {NUM_STEPS} steps")


if __name__ == "__main__":
    main()
