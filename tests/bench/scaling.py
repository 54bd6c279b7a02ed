"""The parts of `scaling.sh` that are no shell.

`scaling.py data FOLDER` writes a dataset of random latents and texts. `scaling.py clusters KNOWN CALIBRATED` prints the clusters of
one file, with those of the other behind them and in place of any of their names. `scaling.py compare FOLDER` lays the plan in a
folder beside what its runs measured.
"""

import array
import hashlib
import json
import math
import pathlib
import random
import re
import statistics
import struct
import sys

SAMPLES = 64
SHAPES = {"image_latents": (4, 32, 32), "text_embeddings": (64, 256), "pooled_prompt_embeds": (128,)}
# Steps until every buffer is made and every page was touched.
WARM_UP = 3


def write_data(folder: pathlib.Path) -> None:
    header, tensors, end = {"__metadata__": {"data_type": "image"}}, [], 0
    for name, shape in SHAPES.items():
        numbers = array.array("f", (random.gauss(0, 1) for _ in range(SAMPLES * math.prod(shape))))
        begin, end = end, end + 4 * len(numbers)
        header[name] = {"dtype": "F32", "shape": [SAMPLES, *shape], "data_offsets": [begin, end]}
        tensors.append(numbers.tobytes())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text + b"".join(tensors)
    folder.mkdir(parents=True)
    (folder / "samples.safetensors").write_bytes(content)
    entry = {"path": "samples.safetensors", "samples": SAMPLES, "group": "one", "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format": "fm-dist dataset", "version": 1, "name": "random", "source": "tests/bench/scaling.py", "licence": "CC0"}
    (folder / "dataset.json").write_text(json.dumps(manifest | {"data_type": "image", "files": [entry]}))


def write_clusters(known: pathlib.Path, calibrated: pathlib.Path) -> None:
    lines = calibrated.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("[cluster."))
    name = lines[first].strip("[]")
    # Tables begin with their name; what is between two of them belongs to the first.
    tables = re.split(r"(?m)^(?=\[)", known.read_text())
    print("".join(table for table in tables if not re.match(rf"\[{re.escape(name)}[\].]", table)))
    print("\n".join(lines[first:]))


def predicted(plan: pathlib.Path) -> dict[int, dict[str, float]]:
    """By number of ranks: the columns of the plan's table that are seconds."""
    rows = (line.split() for line in plan.read_text().splitlines() if re.match(r"  \d+ ", line))
    columns = ("step", "compute", "optimizer", "communication")
    return {int(row[0]): dict(zip(columns, map(float, row[2:6]))) for row in rows}


def measured(run: pathlib.Path) -> dict[str, list[float]]:
    """The same, a number a step."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    return {
        "step": [step["step_seconds"] for step in steps],
        "compute": [step["draw_seconds"] + step["forward_seconds"] + step["backward_seconds"] for step in steps],
        "optimizer": [step["optimizer_seconds"] for step in steps],
        "communication": [step["communication_seconds"] for step in steps],
    }


def compare(folder: pathlib.Path) -> None:
    print(f"{'ranks':>5}  {'seconds':14}{'predicted':>10}{'measured':>10}  {'spread':>16}{'predicted / measured':>22}")
    for ranks, plan in predicted(folder / "plan.txt").items():
        for name, seconds in measured(folder / f"run-{ranks}").items():
            median = statistics.median(seconds)
            ratio = f"{plan[name] / median:.2f}" if plan[name] > 0 else "–"
            spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
            print(f"{ranks:>5}  {name:14}{plan[name]:>10.3f}{median:>10.3f}  {spread:>16}{ratio:>22}")


match sys.argv[1:]:
    case ["data", folder]:
        write_data(pathlib.Path(folder))
    case ["clusters", known, calibrated]:
        write_clusters(pathlib.Path(known), pathlib.Path(calibrated))
    case ["compare", folder]:
        compare(pathlib.Path(folder))
    case _:
        sys.exit(__doc__)
