"""The numbers of target/bench/compare.json as tables: medians, and ratios pair by pair with their spread."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

README = Path(__file__).resolve().with_name("README.md")
BEGIN, END = "<!-- table: written by compare.sh readme -->", "<!-- end of the table -->"
# Of a step that both sides measure. The peer's batches lie in memory: loading is compared by itself.
PHASES = ["step", "forward", "backward", "communication", "optimizer"]
PEERS = ["peer", "peer, tuned", "peer, compiled"]
SHARDED = "fm-dist, sharding = optimizer"
# Goals as ratios fm-dist / peer on two ranks, as it comes and tuned.
STEP_GOALS = {
    "flux-71m float32 2": ("≤ 0.85", "≤ 0.92"),
    "flux-71m bfloat16 2": ("≤ 0.70", "≤ 0.88"),
    "wan-70m float32 2": ("≤ 0.85", "≤ 0.92"),
    "wan-70m bfloat16 2": ("≤ 0.72", "≤ 0.90"),
}
# A LoRA's step over that of PEFT's, and over that of training all of the model.
LORA_GOALS = ("≤ 0.85", "≤ 0.75")
SHARDED_GOAL = ("≤ 0.75", "≤ 0.75")
LAUNCH_GOAL = ("≤ 0.3", "≤ 0.3")
DATA_GOAL = ("≥ 5",)
PIPELINE_GOAL = ("≤ 0.5",)
STALL_GOAL = ("≤ 0.2",)

median = statistics.median
# What is made of one side's numbers in one pair.
Of = Callable[[dict], float]


def median_of(steps: list[dict], phase: str) -> float:
    return median(step[phase] for step in steps)


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the ratios of each pair, and their range; where either side spends nothing, or less by noise, there is none."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True) if a > 0 and b > 0]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


class Table:
    """Lines of figures, of fm-dist and of those that it is compared with."""

    def __init__(self, pairs: list[dict], peers: list[str], ours: str = "fm-dist"):
        self.pairs, self.ours = pairs, ours
        self.peers = [peer for peer in peers if all(peer in pair for pair in pairs)]
        self.rows = [["median", ours] + [cell for peer in self.peers for cell in (peer, "ratio", "goal")]]
        self.rows.append(["---"] * len(self.rows[0]))

    def add(self, name: str, of: Of, show: str, goals: tuple = (), ours: str = "", of_peer: dict[str, Of] | None = None) -> None:
        """A figure by `of`, which may be another for a peer."""
        mine = [of(pair[ours or self.ours]) for pair in self.pairs]
        cells = [name, format(median(mine), show)]
        for number, peer in enumerate(self.peers):
            theirs = [(of_peer or {}).get(peer, of)(pair[peer]) for pair in self.pairs]
            goal = goals[number] if number < len(goals) else ""
            cells += [format(median(theirs), show), ratio(mine, theirs), goal]
        self.rows.append(cells)

    def add_ours(self, name: str, of: Of, show: str) -> None:
        """A figure that only fm-dist has."""
        self.rows.append([name, format(median(of(pair["fm-dist"]) for pair in self.pairs), show)] + [""] * 3 * len(self.peers))

    def text(self, title: str, row: dict, note: str) -> str:
        busiest = max(run["before"]["busy_share"] for pair in row["pairs"] for run in pair.values())
        pairs = f"{len(row['pairs'])} pair{'s' if len(row['pairs']) != 1 else ''}"
        note = f"{row['date']}, {pairs}{note}; at most {100 * busiest:.0f} % of the processors busy before a run."
        lines = ["| " + " | ".join(cells) + " |" for cells in self.rows]
        return "\n".join([f"### {title}", "", note, "", *lines, ""])


def described(name: str) -> str:
    case, dtype, ranks, *device = name.split()
    return ", ".join([case, dtype, f"{ranks} rank{'s' if ranks != '1' else ''}", *device])


def short_row(setting: str, program: str, text: str) -> str:
    """A line of what was just measured."""
    return f"| {setting} | {program} | {text}"


def figures(run: dict, warm_up: int) -> str:
    """Step and phases in milliseconds, memory, launch."""
    steps = run["steps"][warm_up:]
    parts = [f"step {1e3 * median_of(steps, 'step'):.1f} ms"]
    parts += [f"{phase} {1e3 * median_of(steps, phase):.1f}" for phase in ["forward", "backward", "optimizer"]]
    memory = {"GPU": "gpu_memory_bytes", "peak": "peak_memory_bytes"}
    parts += [f"{name} {run[key] / 1e9:.2f} GB" for name, key in memory.items() if key in run]
    if waits := run.get("draw_seconds", [])[warm_up:]:
        parts.append(f"draws {1e3 * median(waits):.2f} ms")
    return ", ".join([*parts, f"first step after {run['launch_seconds']:.1f} s"])


def kernels_of(classes: dict[str, dict]) -> str:
    """Milliseconds and launches of a step by class."""
    whole = sum(its["ms"] for its in classes.values())
    return ", ".join([f"{whole:.1f} ms", *(f"{name} {its['ms']:.1f} in {its['launches']}" for name, its in classes.items())])


def of_steps(name: str, row: dict) -> str:
    if not all("fm-dist" in pair for pair in row["pairs"]):
        return f"### {described(name)}\n\nIt does not fit.\n"
    warm_up, table = row["warm_up"], Table(row["pairs"], PEERS)

    def phase(name: str) -> Of:
        return lambda run: median_of(run["steps"][warm_up:], name)

    def memory(run: dict) -> float:
        return run["peak_memory_bytes"] / 1e9

    for each in PHASES:
        table.add(f"{each}, s", phase(each), ".3f", STEP_GOALS.get(name, ()) if each == "step" else ())
    table.add_ours("data, s", phase("data"), ".4f")
    table.add_ours("communication not hidden, s", phase("exposed"), ".3f")
    table.add("samples a second", lambda run: row["global_batch"] / phase("step")(run), ".2f")
    table.add("peak memory, GB", memory, ".2f")
    if all(SHARDED in pair for pair in row["pairs"]):
        table.add("peak memory, sharding = optimizer, GB", memory, ".2f", SHARDED_GOAL, ours=SHARDED)
        table.add("step, sharding = optimizer, s", phase("step"), ".3f", ours=SHARDED)
    table.add("launch to first step, s", launched, ".2f", LAUNCH_GOAL)
    if all("gpu_memory_bytes" in run for pair in row["pairs"] for run in pair.values()):
        table.add("GPU memory in use, GB", lambda run: run["gpu_memory_bytes"] / 1e9, ".2f")
    steps = len(row["pairs"][0]["fm-dist"]["steps"]) - warm_up
    return table.text(described(name), row, f" of {steps} steps after {warm_up}")


def of_lora(name: str, row: dict) -> str:
    warm_up, table = row["warm_up"], Table(row["pairs"], ["peer, LoRA", "fm-dist"], "fm-dist, LoRA")
    for phase in ["step", "forward", "backward", "optimizer"]:
        goals = LORA_GOALS if phase == "step" else ()
        table.add(f"{phase}, s", lambda run, phase=phase: median_of(run["steps"][warm_up:], phase), ".3f", goals)
    table.add("peak memory, GB", lambda run: run["peak_memory_bytes"] / 1e9, ".2f")
    steps = len(row["pairs"][0]["fm-dist"]["steps"]) - warm_up
    return table.text(f"LoRA of rank 16: {described(name)}", row, f" of {steps} steps after {warm_up}")


def launched(run: dict) -> float:
    return run["launch_seconds"]


def of_launch(name: str, row: dict) -> str:
    table = Table(row["pairs"], PEERS)
    table.add("launch to first step, s", launched, ".2f", LAUNCH_GOAL)
    return table.text(f"launch: {described(name)}", row, "")


def of_data(_name: str, row: dict) -> str:
    table = Table(row["pairs"], PEERS)
    table.add("samples a second", lambda run: median(run["samples_per_second"]), ".0f", DATA_GOAL)
    return table.text("data: 16x64x64 float16 and 512x4096 bfloat16, batches of 4", row, "")


def of_pipeline(_name: str, row: dict) -> str:
    table = Table(row["pairs"], PEERS)
    for shape in ["4x32x32", "16x64x64"]:
        table.add(f"{shape}, ms", lambda run, shape=shape: 1e3 * median(run[shape]), ".3f", PIPELINE_GOAL)
    return table.text("pipeline without a model: a step of 4 samples in float32", row, "")


def of_checkpoint(_name: str, row: dict) -> str:
    # The peer's two ways are two columns of the same runs.
    pairs = [{**pair, "save": {**pair["peer"], "before": {}}, "async_save": {**pair["peer"], "before": {}}} for pair in row["pairs"]]
    table = Table(pairs, ["save", "async_save"])

    def of(figure: Callable[[dict, float], float]) -> tuple[Of, dict[str, Of]]:
        def way(key: str) -> Of:
            return lambda run: median(figure(save, median(run["steps"])) for save in run[key])

        return way("save"), {"async_save": way("async_save")}

    def slower(save: dict, usual: float) -> float:
        return sum(seconds - usual for seconds in save.get("steps_beside", []))

    for name, figure, goals in [
        ("the loop stands still, s", lambda save, _usual: save["stall"], STALL_GOAL),
        ("the steps beside it take longer by, s", slower, ()),
        ("both, s", lambda save, usual: save["stall"] + slower(save, usual), ()),
        ("until it is on the disk, s", lambda save, _usual: save["total"], ()),
    ]:
        ours, theirs = of(figure)
        table.add(name, ours, ".3f", goals, of_peer=theirs)
    saves = len(row["pairs"][0]["fm-dist"]["save"])
    return table.text("checkpoint: flux-71m, float32 with optimizer state, 2 ranks", row, f" of {saves} saves")


def of_kernels(name: str, row: dict) -> str:
    sides = {side: its for side, its in row.items() if side != "date"}
    classes = sorted({each for its in sides.values() for each in its})
    cell = {side: {each: f"{its[each]['ms']:.1f} in {its[each]['launches']}" for each in its} for side, its in sides.items()}
    lines = [["kernels, ms", *sides], ["---"] * (1 + len(sides))]
    lines += [[each, *(cell[side].get(each, "") for side in sides)] for each in classes]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"### kernels of a step: {described(name)}\n\n{row['date']}\n\n{text}\n"


def of_offload(name: str, row: dict) -> str:
    return f"### offloaded: {described(name)}\n\n{row['date']}: {figures(row, row['warm_up'])}\n\n```\n{row['plan']}```\n"


PARTS = {"steps": of_steps, "lora": of_lora, "launch": of_launch, "kernels": of_kernels, "offload": of_offload, "data": of_data, "pipeline": of_pipeline, "checkpoint": of_checkpoint}


def text(results: dict, parts: list[str]) -> str:
    return "\n".join(PARTS[part](name, row) for part in PARTS if part in parts for name, row in results.get(part, {}).items())


def write_readme(results: dict) -> None:
    """Puts the machine and all tables where the README keeps its last ones."""
    machine = results["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, Linux {machine['kernel']}."
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n\n{where}\n\n{text(results, list(PARTS))}\n{END}{after}")


def read(path: Path) -> dict:
    return json.loads(path.read_text())
