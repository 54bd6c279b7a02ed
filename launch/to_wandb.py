"""Sends the metrics of run folders to Weights & Biases; with WANDB_MODE=offline, into ./wandb for `wandb sync`.

    python launch/to_wandb.py RUN...

Needs the package wandb. Called again, it adds the steps since then: the file wandb-id in a run folder says which run it is there, since
many folders have one name.
"""

import json
import secrets
import sys
import tomllib
from pathlib import Path

import wandb



def id_of(folder: Path) -> str:
    path = folder / "wandb-id"
    if not path.exists():
        path.write_text(secrets.token_hex(8) + "\n")
    return path.read_text().strip()


for folder in map(Path, sys.argv[1:] or sys.exit(__doc__)):
    config = tomllib.loads((folder / "config.toml").read_text())
    with wandb.init(project="fm-dist", id=id_of(folder), name=folder.resolve().name, resume="allow", config=config) as run:
        for line in (folder / "metrics.jsonl").open():
            # The last one was cut if the run was.
            if line.endswith("\n"):
                numbers = json.loads(line)
                run.log(numbers, step=numbers.pop("step"))
