"""Importing a cache beside copying it.

    tests/bench/importing.py [--samples N] [--rounds N] [--jobs N] [--program PATH]

Makes a cache of NeMo AutoModel with FLUX.1's shapes at 512 x 512 pixels (4.5 MB a sample) under target/bench/importing, then in turns copies it
(`cp -r`, `sync`, `sha256sum` of the copy) and imports it (`fm-dist data import`, whose dataset.json has the hashes), and prints the seconds of each
round, medians, their ratio, and the load of the machine before each. Needs the Python of `launch/setup.sh --oracle` to make the cache.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "target/bench/importing"
GOAL = 2.0


def make(folder, samples):
    import torch

    if (folder / "metadata.json").exists():
        return
    (folder / "512x512").mkdir(parents=True)
    rows = []
    for index in range(samples):
        path = folder / "512x512" / f"{index:032x}.pt"
        tensors = {
            "latent": torch.randn(16, 64, 64).half(),
            "prompt_embeds": torch.randn(1, 512, 4096).bfloat16(),
            "pooled_prompt_embeds": torch.randn(1, 768).bfloat16(),
            "clip_hidden": torch.randn(1, 77, 768).bfloat16(),
        }
        torch.save({**tensors, "prompt": f"caption {index}", "model_type": "flux", "image_path": f"/pictures/{index}.png"}, path)
        rows.append({"cache_file": str(path), "prompt": f"caption {index}"})
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "metadata.json").write_text(json.dumps({"model_type": "flux", "shards": ["rows.json"]}))


def seconds(command):
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, shell=isinstance(command, str))
    return time.monotonic() - began


arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--samples", type=int, default=115)
arguments.add_argument("--rounds", type=int, default=5)
arguments.add_argument("--jobs", type=int, default=2)
arguments.add_argument("--program", default=str(ROOT / "target/release/fm-dist"))
chosen = arguments.parse_args()
source, copy, out = PLACE / f"cache-{chosen.samples}", PLACE / "copy", PLACE / "out"
make(source, chosen.samples)
size = sum(path.stat().st_size for path in source.rglob("*.pt"))
print(f"{chosen.samples} samples, {size / 1e6:.0f} MB; {chosen.program}, {chosen.jobs} jobs, {os.cpu_count()} cores")
times = []
for number in range(chosen.rounds):
    for folder in (copy, out):
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    load = os.getloadavg()[0]
    copied = seconds(f"cp -r {source} {copy} && sync && find {copy} -type f -exec sha256sum {{}} +")
    imported = seconds([chosen.program, "data", "import", "--from", "nemo", source, "--out", out, "--jobs", str(chosen.jobs)])
    times.append((copied, imported))
    print(f"round {number + 1}: copied in {copied:.2f} s, imported in {imported:.2f} s, load {load:.1f}")
medians = [statistics.median(column) for column in zip(*times, strict=True)]
ratio = statistics.median(imported / copied for copied, imported in times)
print(f"medians {medians[0]:.2f} and {medians[1]:.2f} s; import over copy {ratio:.2f}, at most {GOAL} is the goal")
for folder in (copy, out):
    shutil.rmtree(folder, ignore_errors=True)
