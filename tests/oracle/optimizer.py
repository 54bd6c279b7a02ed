"""Runs torch.optim.AdamW and clip_grad_norm_ on random numbers, and writes what went in and what came out.

    python optimizer.py OUT_DIR SEED

Needs torch and safetensors; takes 5 s, most of it imports. Writes

optimizer.json              {"adamw": [...], "clip": [...]}: one entry a case, with its file and its settings
adamw-NN.safetensors        `parameter` [P] before the first step, `gradients` [S, P], `lr` [S] f64; after each step
                            `parameters` [S, P], `exp_avg` [S, P], `exp_avg_sq` [S, P]
clip-NN.safetensors         `gradient.N` before and `clipped.N` after, of any shape; `total_norm` before
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

NUM_ADAMW_CASES = 6
NUM_CLIP_CASES = 6
NUM_STEPS = 20


def adamw_settings(dice: random.Random, number: int) -> dict:
    """The usual settings first, then drawn ones, every other without weight decay."""
    if number == 0:
        return {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    return {
        "betas": [round(dice.uniform(0.5, 0.95), 3), round(dice.uniform(0.9, 0.9999), 4)],
        "eps": 10 ** dice.uniform(-10, -4),
        "weight_decay": 0.0 if number % 2 else round(dice.uniform(0.001, 0.3), 3),
    }


def run_adamw(out: Path, number: int, dice: random.Random, generator: torch.Generator) -> dict:
    """Twenty steps on one parameter vector; the learning rate changes at each, and some gradients are exactly zero."""
    settings = adamw_settings(dice, number)
    size = dice.randint(16, 300)
    start = torch.randn(size, generator=generator)
    gradients = torch.randn(NUM_STEPS, size, generator=generator) * 10 ** dice.uniform(-4, 2)
    gradients[:, :: dice.randint(3, 7)] = 0.0
    lr = [10 ** dice.uniform(-5, -2) for _ in range(NUM_STEPS)]
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], foreach=False, **settings)
    steps = []
    for gradient, rate in zip(gradients, lr):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = gradient.clone()
        optimizer.step()
        state = optimizer.state[parameter]
        steps.append((parameter.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()))
    parameters, exp_avg, exp_avg_sq = (torch.stack(tensors) for tensors in zip(*steps))
    file = f"adamw-{number:02}.safetensors"
    inputs = {"parameter": start, "gradients": gradients, "lr": torch.tensor(lr, dtype=torch.float64)}
    save_file({**inputs, "parameters": parameters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, out / file)
    return {"file": file, **settings}


def run_clip(out: Path, number: int, dice: random.Random, generator: torch.Generator) -> dict:
    """Gradients of several shapes under one norm, clipped in every other case; the last has no gradient but zeros."""
    scale = 0.0 if number == NUM_CLIP_CASES - 1 else 10 ** dice.uniform(-3, 3)
    shapes = [[dice.randint(1, 40) for _ in range(dice.randint(1, 3))] for _ in range(dice.randint(1, 8))]
    gradients = [torch.randn(shape, generator=generator) * scale for shape in shapes]
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients])).item()
    max_norm = (norm or 1.0) * (dice.uniform(0.01, 0.9) if number % 2 == 0 else dice.uniform(1.1, 10.0))
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    total_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=False)
    file = f"clip-{number:02}.safetensors"
    tensors = {"total_norm": total_norm}
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients)):
        tensors[f"gradient.{index}"], tensors[f"clipped.{index}"] = gradient, parameter.grad
    save_file(tensors, out / file)
    return {"file": file, "max_norm": max_norm, "num_gradients": len(gradients)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes cases computed by PyTorch's AdamW and gradient clipping.")
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    dice = random.Random(arguments.seed)
    generator = torch.Generator().manual_seed(dice.getrandbits(32))
    cases = {
        "adamw": [run_adamw(arguments.out, number, dice, generator) for number in range(NUM_ADAMW_CASES)],
        "clip": [run_clip(arguments.out, number, dice, generator) for number in range(NUM_CLIP_CASES)],
    }
    (arguments.out / "optimizer.json").write_text(json.dumps(cases, indent=1) + "\n")
    print(f"seed {arguments.seed}: {NUM_ADAMW_CASES} cases of AdamW over {NUM_STEPS} steps, {NUM_CLIP_CASES} of clipping")


if __name__ == "__main__":
    main()
