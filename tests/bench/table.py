"""The numbers of target/bench/compare.json as tables: medians, and ratios pair by pair with their spread."""

import statistics
from collections.abc import Callable

# Of a step that both sides measure. The peer's batches lie in memory: loading is compared by itself.
PHASES = ["step", "forward", "backward", "communication", "optimizer"]
PEERS = ["peer", "peer, tuned"]
# Ratios fm-dist / peer that were set as goals, for two ranks: as it comes, tuned.
GOALS = {
    "flux-71m float32 2": {"step": (0.85, 0.92)},
    "flux-71m bfloat16 2": {"step": (0.70, 0.88)},
    "wan-70m float32 2": {"step": (0.85, 0.92)},
    "wan-70m bfloat16 2": {"step": (0.72, 0.90)},
}
LAUNCH_GOAL = (0.3, 0.3)
SHARDED_GOAL = (0.75, 0.75)


def median_of(steps: list[dict], phase: str) -> float:
    return statistics.median(step[phase] for step in steps)


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the ratios of each pair, and their range; two programs that spend nothing have none."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True) if b > 0]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def figure(name: str, of: Callable[[dict], float], pairs: list[dict], ours: str, show: str, goal: tuple | None = None) -> list[str]:
    """One line: our median, then each peer's with the ratio and the goal."""
    values = {program: [of(pair[program]) for pair in pairs] for program in [ours, *PEERS] if all(program in pair for pair in pairs)}
    cells = [name, format(statistics.median(values[ours]), show)]
    for number, peer in enumerate(PEERS):
        found = peer in values
        cells += [format(statistics.median(values[peer]), show), ratio(values[ours], values[peer])] if found else ["", ""]
        cells.append(f"≤ {goal[number]}" if goal else "")
    return cells


def lines(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


HEAD = ["median", "fm-dist", "peer", "ratio", "goal", "peer, tuned", "ratio", "goal"]


def of_setting(name: str, row: dict) -> str:
    """The table of one case, kind and number of ranks."""
    pairs, warm_up, goals = row["pairs"], row["warm_up"], GOALS.get(name, {})

    def phase(name: str) -> Callable[[dict], float]:
        return lambda run: median_of(run["steps"][warm_up:], name)

    def rate(run: dict) -> float:
        return row["global_batch"] / phase("step")(run)

    def memory(run: dict) -> float:
        return run["peak_memory_bytes"] / 1e9

    rows = [figure(f"{each}, s", phase(each), pairs, "fm-dist", ".3f", goals.get(each)) for each in PHASES]
    rows.append(["data, s", format(statistics.median(phase("data")(pair["fm-dist"]) for pair in pairs), ".3f"), "in memory", *[""] * 2, "in memory", *[""] * 2])
    rows.append(figure("samples a second", rate, pairs, "fm-dist", ".2f"))
    rows.append(figure("peak memory, GB", memory, pairs, "fm-dist", ".2f"))
    sharded = "fm-dist, sharding = optimizer"
    if all(sharded in pair for pair in pairs):
        rows.append(figure("the same, sharding = optimizer", memory, pairs, sharded, ".2f", SHARDED_GOAL))
        rows.append(figure("step with it, s", phase("step"), pairs, sharded, ".3f"))
    rows.append(figure("launch to first step, s", lambda run: run["launch_seconds"], pairs, "fm-dist", ".2f", LAUNCH_GOAL))
    case, dtype, ranks = name.split()
    busiest = max(run["before"]["busy_share"] for pair in pairs for run in pair.values())
    steps = len(pairs[0]["fm-dist"]["steps"]) - warm_up
    title = f"{case}, {dtype}, {ranks} rank{'s' if ranks != '1' else ''}"
    note = f"{row['date']}, {len(pairs)} pairs of {steps} steps after {warm_up}; at most {100 * busiest:.0f} % busy before a run"
    return f"### {title}\n\n{note}\n\n{lines(HEAD, rows)}\n"


def steps(results: dict, names: list[str]) -> str:
    return "\n".join(of_setting(name, results["steps"][name]) for name in names)


def whole(results: dict) -> str:
    return steps(results, list(results.get("steps", {})))
