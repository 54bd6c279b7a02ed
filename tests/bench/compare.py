"""Measures fm-dist and its peer in turns; compare.sh starts it after it has set up and built both.

    compare.sh [steps] [--cases flux-71m …] [--dtypes float32 …] [--ranks 1 2] [--beside peer tuned sharded] [--pairs 5] [--steps 6] [--warm-up 2]

Each part replaces its own rows in target/bench/compare.json and leaves the others: one row can be measured again by itself.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator

import machine
import programs
import table
from cases import BENCH, CASES, DTYPES, MICRO_BATCH, SEED, Case, case
from programs import OURS, PEER, SHARDED, TUNED_PEER, Ended, Program, Setting, launch

# The peer as it comes, tuned, and fm-dist with its optimizer's state shared.
BESIDE = ["peer", "tuned", "sharded"]
RESULTS = BENCH / "compare.json"
# Saves of one run, and steps between two of them, in which one is written.
SAVES, SAVE_STEPS = 3, 4
# Of two losses for the same draws. f32: sums of a few thousand numbers in another order.
# bf16: 8 bits, rounded at other places by other orders of products; the loss averages the errors of 16,000 and more of them.
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}


def keep(part: str, name: str, row: dict) -> None:
    """Writes one row's numbers beside those of all others."""
    results = table.read(RESULTS) if RESULTS.exists() else {}
    results["machine"] = machine.description()
    results.setdefault(part, {})[name] = {"date": time.strftime("%Y-%m-%d %H:%M"), **row}
    unfinished = RESULTS.with_suffix(".new")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(RESULTS)


def prepare(of: Case) -> None:
    """The case's model, data and losses, made by the peer once."""
    if (of.folder / "losses.json").exists():
        return
    print(f"==> {of.name}: model, data and losses", flush=True)
    shutil.rmtree(of.folder, ignore_errors=True)
    launch("prepare", [str(programs.PYTHON), str(programs.HERE / "peer.py"), "prepare", of.name], {})


def our_loss(of: Case, dtype: str) -> float:
    """The loss that `fm-dist step` writes for the case's batch and the draws of its seed."""
    dump = of.folder / "dump.safetensors"
    arguments = ["--batch", str(of.folder / "batch.safetensors"), "--dump", str(dump), "--torch-seed", str(SEED)]
    launch("step", programs.fm_dist("step", of, dtype, *arguments), {})
    with dump.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        entry = header["average_weighted_loss"]
        assert entry["dtype"] == "F32", entry
        file.seek(entry["data_offsets"][0], 1)
        return memoryview(file.read(4)).cast("f")[0]


def check_losses(of: Case, dtypes: list[str]) -> None:
    """Refuses to compare programs that do not compute the same."""
    for dtype in dtypes:
        theirs, ours = json.loads((of.folder / "losses.json").read_text())[dtype], our_loss(of, dtype)
        difference = abs(ours - theirs) / theirs
        print(f"    {of.name} {dtype}: loss {ours:.6f}, the peer's {theirs:.6f}, difference {difference:.1e} of it", flush=True)
        keep("loss", f"{of.name} {dtype}", {"fm-dist": ours, "peer": theirs})
        if not difference <= LOSS_TOLERANCE[dtype]:
            raise Ended(f"the losses differ by more than {LOSS_TOLERANCE[dtype]}")


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    for name in arguments.cases:
        for dtype in arguments.dtypes:
            for ranks in arguments.ranks:
                yield Setting(case(name), dtype, ranks)


def programs_of(setting: Setting, arguments: argparse.Namespace) -> list[Program]:
    """Who takes turns: the peer, then fm-dist."""
    chosen = [PEER] * ("peer" in arguments.beside) + [OURS] + [TUNED_PEER] * ("tuned" in arguments.beside)
    # For its memory, which is compared in f32.
    return chosen + [SHARDED] * ("sharded" in arguments.beside and setting.ranks > 1 and setting.dtype == "float32")


def compare_steps(arguments: argparse.Namespace) -> None:
    for name in arguments.cases:
        prepare(case(name))
        check_losses(case(name), arguments.dtypes)
    for setting in settings(arguments):
        turns = []
        for pair in range(arguments.pairs):
            print(f"==> {setting.name}: pair {pair + 1} of {arguments.pairs}", flush=True)
            turns.append({program.name: measured(setting, program, arguments.steps, arguments.warm_up) for program in programs_of(setting, arguments)})
        keep("steps", setting.name, {"warm_up": arguments.warm_up, "global_batch": MICRO_BATCH * setting.ranks, "pairs": turns})


def measured(setting: Setting, program: Program, steps: int, warm_up: int) -> dict:
    before = machine.look(f"{program.name} on {setting.name}")
    result = program.run(setting, warm_up + steps, program)
    seconds = table.median_of(result["steps"][warm_up:], "step")
    print(f"    {program.name}: {seconds:.3f} s a step, {result['launch_seconds']:.2f} s to the first, {result['peak_memory_bytes'] / 1e9:.2f} GB", flush=True)
    return {"before": before, **result}


def compare_launch(arguments: argparse.Namespace) -> None:
    """Runs of a single step: launch/mpirun and torchrun, libraries, model, data, step."""
    for name in arguments.cases:
        prepare(case(name))
    for setting in settings(arguments):
        turns = []
        for pair in range(arguments.pairs):
            print(f"==> launch, {setting.name}: pair {pair + 1} of {arguments.pairs}", flush=True)
            chosen = [program for program in programs_of(setting, arguments) if program is not SHARDED]
            turns.append({program.name: measured(setting, program, 1, 0) for program in chosen})
        keep("launch", setting.name, {"pairs": turns})


def in_turns(part: str, arguments: argparse.Namespace, ours: Callable[[], dict], theirs: Callable[[], dict]) -> None:
    """A part that either side measures by itself."""
    turns = []
    for pair in range(arguments.pairs):
        print(f"==> {part}: pair {pair + 1} of {arguments.pairs}", flush=True)
        turn = {}
        for name, run in [("peer", theirs), ("fm-dist", ours)]:
            before = machine.look(f"{name}'s {part}")
            turn[name] = {"before": before, **run()}
        turns.append(turn)
    keep(part, "all", {"pairs": turns})


def peer_part(command: str, *arguments: str) -> dict:
    out = BENCH / "peer.json"
    launch("peer", programs.python("peer_parts.py", command, *arguments, str(out)), {})
    return json.loads(out.read_text())


def compare_data(arguments: argparse.Namespace) -> None:
    parts, folder = programs.built_parts(), BENCH / "loader"
    # Writes its dataset, from which the peer's pickles are made; what both read lies in the page cache from then on.
    programs.run_parts(parts, "loader")
    peer_part("data", str(folder))

    def ours() -> dict:
        (seconds,) = programs.run_parts(parts, "loader").values()
        return {"samples_per_second": [MICRO_BATCH / each for each in seconds]}

    in_turns("data", arguments, ours, lambda: peer_part("data", str(folder)))


def compare_pipeline(arguments: argparse.Namespace) -> None:
    parts = programs.built_parts()
    in_turns("pipeline", arguments, lambda: programs.run_parts(parts, "pipeline"), lambda: peer_part("pipeline"))


def compare_checkpoint(arguments: argparse.Namespace) -> None:
    setting = Setting(case("flux-71m"), "float32", 2)
    prepare(setting.case)
    out, folder = BENCH / "peer.json", BENCH / "checkpoint"

    def theirs() -> dict:
        command = programs.torchrun(2, "peer_parts.py", "checkpoint", setting.case.name, str(SAVES), str(SAVE_STEPS), str(folder), str(out))
        launch("peer", command, {})
        return json.loads(out.read_text())

    in_turns("checkpoint", arguments, lambda: programs.save_fm_dist(setting, SAVES, SAVE_STEPS), theirs)


PARTS = {
    "steps": compare_steps,
    "launch": compare_launch,
    "data": compare_data,
    "pipeline": compare_pipeline,
    "checkpoint": compare_checkpoint,
}


def main() -> None:
    names = [each.name for each in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "all", "table", "readme"], default=["steps"])
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--beside", nargs="*", choices=BESIDE, default=BESIDE, help="who runs in turns with fm-dist; nobody if none is named")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each run")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    arguments = parser.parse_args()
    BENCH.mkdir(parents=True, exist_ok=True)
    print(f"{machine.description()}, load {machine.load()}", flush=True)
    chosen = list(PARTS) if arguments.parts in (["all"], ["table"]) else arguments.parts
    if chosen == ["readme"]:
        return table.write_readme(table.read(RESULTS))
    if arguments.parts != ["table"]:
        for part in chosen:
            PARTS[part](arguments)
    print(table.text(table.read(RESULTS), chosen))


if __name__ == "__main__":
    try:
        main()
    except Ended as error:
        raise SystemExit(f"compare: {error}") from None
