"""Runs diffusers' EMAModel beside weights that walk at random, and writes what it was given and what it kept.

    python averages.py OUT_DIR SEED

Needs torch, safetensors and diffusers; takes 10 s, most of it imports. Writes

averages.json             {"float32": [...], "bfloat16": [...]}: one entry a case, with its file, EMAModel's settings and
                          `every_n_steps`, the updates from one call of step() to the next
ema-KIND-NN.safetensors   `weights` [S + 1, P]: before the first update and after each; `averages` [S, P]: after each;
                          `decays` [S] f64: of the newest call
"""

import argparse
import json
import random
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

NUM_CASES = {"float32": 12, "bfloat16": 4}
NUM_STEPS = 400


def ema_settings(dice: random.Random, number: int) -> dict:
    """The defaults first, then drawn ones; every other with warm-up."""
    if number == 0:
        return {"decay": 0.9999}
    settings = {
        "decay": round(dice.uniform(0.5, 0.99999), 5),
        "update_after_step": dice.choice([0, 0, dice.randint(1, 100)]),
        "use_ema_warmup": number % 2 == 1,
    }
    if dice.random() < 0.5:
        settings["min_decay"] = round(dice.uniform(0.0, settings["decay"]), 5)
    if settings["use_ema_warmup"]:
        settings |= {"inv_gamma": round(dice.uniform(0.1, 50.0), 3), "power": round(dice.uniform(0.1, 1.5), 4)}
    return settings


def run(out: Path, kind: str, number: int, dice: random.Random, generator: torch.Generator) -> dict:
    """Hundreds of updates, some of them as small as the last bits of a weight."""
    settings, every = ema_settings(dice, number), dice.choice([1, 1, 2, 5])
    size, scale = dice.randint(1, 400), 10 ** dice.uniform(-4, 0)
    parameter = torch.nn.Parameter(torch.randn(size, generator=generator))
    ema = EMAModel([parameter], **settings)
    ema.to(dtype=getattr(torch, kind))
    weights, averages, decays = [parameter.detach().clone()], [], []
    for step in range(1, NUM_STEPS + 1):
        with torch.no_grad():
            parameter += torch.randn(size, generator=generator) * scale
        if step % every == 0:
            ema.step([parameter])
        weights.append(parameter.detach().clone())
        averages.append(ema.shadow_params[0].float().clone())
        decays.append(0.0 if ema.cur_decay_value is None else ema.cur_decay_value)
    file = f"ema-{kind}-{number:02}.safetensors"
    tensors = {"weights": torch.stack(weights), "averages": torch.stack(averages)}
    save_file({**tensors, "decays": torch.tensor(decays, dtype=torch.float64)}, out / file)
    return {"file": file, "every_n_steps": every, "settings": settings}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes cases computed by diffusers' EMAModel.")
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    dice = random.Random(arguments.seed)
    generator = torch.Generator().manual_seed(dice.getrandbits(32))
    cases = {
        kind: [run(arguments.out, kind, number, dice, generator) for number in range(count)]
        for kind, count in NUM_CASES.items()
    }
    (arguments.out / "averages.json").write_text(json.dumps(cases, indent=1) + "\n")
    print(f"seed {arguments.seed}: {NUM_CASES} cases of EMAModel over {NUM_STEPS} updates")


if __name__ == "__main__":
    main()
