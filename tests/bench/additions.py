"""A step with averages, factors or TensorBoard's files beside a step without.

    tests/bench/additions.py [--steps N] [--rounds N] [--set KEY=VALUE]... [--program PATH]

Trains the digits by a model of 11 million parameters on few tokens, so that the optimizer's share of a step is larger than any real model's. In each
round every addition runs once between two runs without; its ratio is that of medians of step times, over the mean of the two beside it. Averages are
also measured within one run, in which every other step moves them. Prints each round, then the median ratio of each addition with its spread, and the
load of the machine before each run. Needs a Python of 3.11 and nothing else.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOAL = 1.05
# Steps whose time is that of warming up.
FIRST = 5

BASE = [
    "model.dit.width=384", "model.dit.depth=4", "data.micro_batch_size_per_gpu=16", "train.global_batch_size=16", "parallel.num_threads=1",
    "checkpoint.save_last=false", "checkpoint.every_n_steps=1000000", "log.progress=never", "sampling.num_steps=1", "sampling.per_condition=1",
]
ADDITIONS = {
    "averages": ["ema.decay=0.999"],
    "averages in bfloat16": ["ema.decay=0.999", "ema.dtype=bfloat16"],
    "factors": ['optimizer.lr_factors={"*.bias"=2.0,"blocks.1"=0.5}', "optimizer.decay=all"],
    "TensorBoard": ["log.tensorboard=true"],
}


def steps_of(program, sets, number):
    """The lines of metrics.jsonl of a run, without the first steps."""
    folder = Path(tempfile.mkdtemp(prefix="additions-"))
    sets = [*BASE, f"max_steps={number}", f"output_dir={folder / 'run'}", *sets]
    command = [program, "train", *(word for text in sets for word in ("--set", text))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    return lines[FIRST:]


def median(lines, key="step_seconds"):
    return statistics.median(line[key] for line in lines)


def told(name, ratios):
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"{name}: {middle:.3f} ({low:.3f} to {high:.3f}){'' if middle <= GOAL else f', above the goal of {GOAL}'}")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=40)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--set", action="append", default=[])
    arguments.add_argument("--program", default=str(ROOT / "target/release/fm-dist"))
    chosen = arguments.parse_args()
    ratios, within = {name: [] for name in ADDITIONS}, []

    def run(sets):
        return steps_of(chosen.program, [*chosen.set, *sets], chosen.steps)

    for number in range(1, chosen.rounds + 1):
        before = median(run([]))
        for name, sets in ADDITIONS.items():
            load = os.getloadavg()[0]
            found, after = median(run(sets)), median(run([]))
            ratios[name].append(2 * found / (before + after))
            print(f"round {number}, {name}: {before:.4f}, {found:.4f}, {after:.4f} s, load {load:.1f}", flush=True)
            before = after
        lines = run(["ema.decay=0.999", "ema.every_n_steps=2"])
        turns = [[line for line in lines if line["step"] % 2 == rest] for rest in (0, 1)]
        within.append(median(turns[0]) / median(turns[1]))
        phases = [median(turn, "optimizer_seconds") for turn in turns]
        print(f"round {number}, every other step: optimizer {phases[1]:.4f} s, with averages {phases[0]:.4f} s", flush=True)
    for name, found in ratios.items():
        told(name, found)
    told("averages at every other step, within one run", within)


if __name__ == "__main__":
    main()
