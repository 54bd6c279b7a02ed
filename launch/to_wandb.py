"""Sends the metrics of run folders to Weights & Biases; with WANDB_MODE=offline, into ./wandb for `wandb sync`.

    python launch/to_wandb.py RUN...

Needs the package wandb. Called again, it adds the steps since then.
"""

import json
import sys
import tomllib
from pathlib import Path

import wandb

for folder in map(Path, sys.argv[1:] or sys.exit(__doc__)):
    config = tomllib.loads((folder / "config.toml").read_text())
    with wandb.init(project="fm-dist", id=folder.resolve().name, resume="allow", config=config) as run:
        for line in (folder / "metrics.jsonl").open():
            numbers = json.loads(line)
            run.log(numbers, step=numbers.pop("step"))
