"""Learning rates, shifts, weights and losses by diffusers, transformers and torch, as one JSON file.

    rules.py OUT.json SEED
"""

import json
import random
import sys

import torch
from diffusers.optimization import (
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.training_utils import compute_loss_weighting_for_sd3
from transformers.optimization import get_inverse_sqrt_schedule

STEPS = 60
TOKENS = [16, 256, 1024, 4096, 4301, 9000]


def rates(schedule, **arguments):
    """Factors of steps 1 to STEPS; their step k is the one of ours after k - 1 updates and a warm-up."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    factor = schedule(optimizer, **arguments).lr_lambdas[0]
    return [factor(step) for step in range(1, STEPS + 1)]


def schedules(dice):
    warmup, cycles, timescale = dice.randint(1, 20), dice.randint(1, 4), dice.randint(5, 200)
    power, floor = dice.choice([0.5, 1.0, 2.0, 3.0]), dice.uniform(0.001, 0.5)
    return [
        {
            "set": f"[lr_scheduler.cosine]\nwarmup_steps = {warmup}\nrestarts = {cycles - 1}",
            "factors": rates(
                get_cosine_with_hard_restarts_schedule_with_warmup,
                num_warmup_steps=warmup,
                num_training_steps=STEPS,
                num_cycles=cycles,
            ),
        },
        {
            "set": f"[lr_scheduler.polynomial]\nwarmup_steps = {warmup}\npower = {power}\nmin_factor = {floor!r}",
            "factors": rates(
                get_polynomial_decay_schedule_with_warmup,
                num_warmup_steps=warmup,
                num_training_steps=STEPS,
                lr_end=floor,
                power=power,
            ),
        },
        {
            "set": f"[lr_scheduler.inverse_sqrt]\nwarmup_steps = {warmup}\ntimescale = {timescale}",
            "factors": rates(get_inverse_sqrt_schedule, num_warmup_steps=warmup, timescale=timescale),
        },
    ]


def shifts(dice):
    base, top = dice.uniform(0.0, 1.0), dice.uniform(1.0, 3.0)
    return [
        {
            "set": f"shift_type = 'flux'\nbase_shift = {base!r}\nmax_shift = {top!r}",
            "mu": [calculate_shift(tokens, 256, 4096, base, top) for tokens in TOKENS],
        },
        {
            "set": "shift_type = 'qwen_image'",
            "mu": [calculate_shift(tokens, 256, 8192, 0.5, 0.9) for tokens in TOKENS],
        },
        {
            "set": "shift_type = 'flux2'",
            "mu": [compute_empirical_mu(tokens, 50) for tokens in TOKENS],
        },
    ]


def main(out, seed):
    dice, generator = random.Random(int(seed)), torch.Generator().manual_seed(int(seed))
    sigma = torch.rand(16, generator=generator) * 0.98 + 0.02
    error = torch.randn(16, generator=generator) * 2
    turn = dice.uniform(0.05, 2.0)
    zero = torch.zeros_like(error)
    answer = {
        "schedules": schedules(dice),
        "tokens": TOKENS,
        "shifts": shifts(dice),
        "sigma": sigma.tolist(),
        "weights": {
            scheme: compute_loss_weighting_for_sd3(scheme, sigma).tolist() for scheme in ("sigma_sqrt", "cosmap")
        },
        "error": error.tolist(),
        "huber_c": turn,
        "huber": torch.nn.functional.huber_loss(error, zero, reduction="none", delta=turn).tolist(),
    }
    with open(out, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
