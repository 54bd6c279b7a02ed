"""Kernels of one step by class, from what ncu saw of a program.

    python kernel_times.py NCU.csv           the table of a file
"""

import csv
import re
import sys
from collections import Counter
from pathlib import Path

# The first class whose words a kernel's name has. libtorch's, cuBLAS', cuDNN's, triton's names, and our own.
CLASSES = {
    "attention": r"flash|fmha|sdpa|attention",
    "product": r"gemm|cutlass|nvjet|xmma|splitK|cublas|gemv|dot_kernel|convol|conv[23]d",
    "optimizer": r"adamw|multi_tensor|FusedAdam|fused_adam",
    "normalization": r"norm|GammaBeta|RowwiseMoments|triton_per_",
    "copies": r"copy|Memcpy|Memset|CatArray|transpose|fill|index|gather|scatter|^cut_|^join_",
    "sums": r"reduce|triton_red_|sum|softmax",
    "elementwise": r"elementwise|triton_poi_|vectorized|distribution|random|gated_residual|gelu_tanh|rotation",
}
OTHER = "other"
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
# Our own kernel of the optimizer, behind whose last launch a step is over.
OUR_LAST = "adamw"


def class_of(kernel: str) -> str:
    return next((name for name, words in CLASSES.items() if re.search(words, kernel, re.IGNORECASE)), OTHER)


def read(path: Path) -> list[tuple[str, float]]:
    """Kernels in the order of their launches, each with its microseconds."""
    rows = csv.DictReader(line for line in path.read_text().splitlines() if line.startswith('"'))
    return [(row["Kernel Name"], float(row["Metric Value"].replace(",", "")) * MICROSECONDS[row["Metric Unit"]]) for row in rows]


def last_step(kernels: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Of a run of ours with several steps, the kernels of the last one: those behind the optimizer's of the step before.

    A step's launches of the optimizer stand close together; they are tried at the start of a run as well.
    """
    places = [place for place, (name, _) in enumerate(kernels) if OUR_LAST in name]
    gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
    if not gaps:
        raise ValueError(f"{len(places)} kernels are named {OUR_LAST}: where does a step end?")
    wide = max(number for number, gap in enumerate(gaps) if gap >= max(gaps) / 2)
    return kernels[places[wide] + 1 : places[-1] + 1]


def by_class(kernels: list[tuple[str, float]]) -> dict[str, dict]:
    """Milliseconds and launches of each class, the longest first."""
    spent, launches = Counter(), Counter()
    for name, microseconds in kernels:
        spent[class_of(name)] += microseconds / 1e3
        launches[class_of(name)] += 1
    return {name: {"ms": round(milliseconds, 3), "launches": launches[name]} for name, milliseconds in spent.most_common()}


def longest_of_none(kernels: list[tuple[str, float]], count: int) -> list[str]:
    """Names of the longest kernels without a class."""
    spent = Counter()
    for name, microseconds in kernels:
        if class_of(name) == OTHER:
            spent[name[:100]] += microseconds
    return [name for name, _ in spent.most_common(count)]


if __name__ == "__main__":
    for each, its in by_class(read(Path(sys.argv[1]))).items():
        print(f"{each:<14} {its['ms']:9.2f} ms in {its['launches']} kernels")
