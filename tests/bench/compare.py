"""Measures fm-dist and its peer in turns; compare.sh starts it after it has set up and built both.

    compare.sh [steps] [--device cuda] [--cases flux-71m …] [--dtypes float32 …] [--ranks 1 2] [--beside peer tuned …] [--pairs 5] [--steps 6]
               [--warm-up 2] [--cudnn]

Each part replaces its own rows in target/bench/compare.json and leaves the others: one row can be measured again by itself.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kernel_times
import machine
import programs
import table
from cases import ADAPTED, BENCH, CASES, DTYPES, MICRO_BATCH, OFFLOADED, SEED, Case, case
from programs import COMPILED_PEER, LORA, LORA_PEER, OURS, PEER, SHARDED, TUNED_PEER, DoesNotFit, Ended, Program, Setting, launch

# The peer as it comes, tuned, compiled, and fm-dist with its optimizer's state shared.
BESIDE = ["peer", "tuned", "compiled", "sharded"]
# Who runs beside fm-dist unless it is said.
USUAL = {"cpu": ["peer", "tuned", "sharded"], "cuda": ["peer", "compiled"]}
RANKS = {"cpu": [1, 2], "cuda": [1]}
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
    if (of.folder / "prepared").exists():
        return
    print(f"==> {of.name}: " + ("model, data and losses" if of.shares_weights else "data"), flush=True)
    shutil.rmtree(of.folder, ignore_errors=True)
    launch("prepare", [str(programs.PYTHON), str(programs.HERE / "peer.py"), "prepare", of.name], {})


def our_loss(of: Case, setting: Setting) -> float:
    """The loss that `fm-dist step` writes for the case's batch and the draws of its seed."""
    dump = of.folder / "dump.safetensors"
    arguments = ["--batch", str(of.folder / "batch.safetensors"), "--dump", str(dump), "--torch-seed", str(SEED)]
    launch("step", programs.fm_dist("step", setting, *arguments), {})
    with dump.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        entry = header["average_weighted_loss"]
        assert entry["dtype"] == "F32", entry
        file.seek(entry["data_offsets"][0], 1)
        return memoryview(file.read(4)).cast("f")[0]


def check_losses(of: Case, dtypes: list[str], device: str) -> None:
    """Refuses to compare programs that do not compute the same; the peer's losses are a CPU's."""
    for dtype in dtypes:
        setting = Setting(of, dtype, 1, device)
        theirs, ours = json.loads((of.folder / "losses.json").read_text())[dtype], our_loss(of, setting)
        difference = abs(ours - theirs) / theirs
        print(f"    {of.name} {dtype}: loss {ours:.6f}, the peer's {theirs:.6f}, difference {difference:.1e} of it", flush=True)
        keep("loss", f"{of.name} {dtype}" + (f" {device}" if device != "cpu" else ""), {"fm-dist": ours, "peer": theirs})
        if not difference <= LOSS_TOLERANCE[dtype]:
            raise Ended(f"the losses differ by more than {LOSS_TOLERANCE[dtype]}")


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    for name in arguments.cases:
        for dtype in arguments.dtypes:
            for ranks in arguments.ranks:
                yield Setting(case(name), dtype, ranks, arguments.device, arguments.cudnn)


def programs_of(setting: Setting, arguments: argparse.Namespace) -> list[Program]:
    """Who takes turns: the peer, then fm-dist."""
    beside = arguments.beside
    chosen = [PEER] * ("peer" in beside) + [OURS] + [TUNED_PEER] * ("tuned" in beside) + [COMPILED_PEER] * ("compiled" in beside)
    # For its memory, which is compared in f32.
    return chosen + [SHARDED] * ("sharded" in beside and setting.ranks > 1 and setting.dtype == "float32")


def compare_steps(arguments: argparse.Namespace) -> None:
    for name in arguments.cases:
        prepare(case(name))
        if case(name).shares_weights:
            check_losses(case(name), arguments.dtypes, arguments.device)
    for setting in settings(arguments):
        turns = []
        for pair in range(arguments.pairs):
            print(f"==> {setting.name}: pair {pair + 1} of {arguments.pairs}", flush=True)
            turns.append(turn_of(setting, programs_of(setting, arguments), arguments.steps, arguments.warm_up))
        row = {"warm_up": arguments.warm_up, "global_batch": setting.case.micro_batch * setting.ranks, "pairs": turns}
        keep("steps", setting.name, {"device": setting.device, **row})


def compare_lora(arguments: argparse.Namespace) -> None:
    """Steps of a LoRA, beside PEFT's and beside training all of the model."""
    of = case(ADAPTED)
    prepare(of)
    for dtype in arguments.dtypes:
        for ranks in arguments.ranks:
            setting, turns = Setting(of, dtype, ranks, arguments.device, arguments.cudnn), []
            for pair in range(arguments.pairs):
                print(f"==> LoRA, {setting.name}: pair {pair + 1} of {arguments.pairs}", flush=True)
                turns.append(turn_of(setting, [LORA_PEER, LORA, OURS], arguments.steps, arguments.warm_up))
            keep("lora", setting.name, {"device": setting.device, "warm_up": arguments.warm_up, "pairs": turns})


def turn_of(setting: Setting, programs: list[Program], steps: int, warm_up: int) -> dict:
    """Numbers of one run of each program that fits."""
    found = {program.name: measured(setting, program, steps, warm_up) for program in programs}
    return {name: numbers for name, numbers in found.items() if numbers}


def measured(setting: Setting, program: Program, steps: int, warm_up: int) -> dict | None:
    """Numbers of one run; none where a GPU has too little memory for it."""
    before = machine.look(f"{program.name} on {setting.name}")
    try:
        result = program.run(setting, warm_up + steps, program)
    except DoesNotFit as error:
        print(table.short_row(setting.name, program.name, str(error)), flush=True)
        return None
    print(table.short_row(setting.name, program.name, table.figures(result, warm_up)), flush=True)
    return {"before": before, **result}


def ncu(name: str, log: Path, *options: str) -> list[str]:
    """The profiler before a command, which measures nothing but the time of each kernel."""
    ordinary = ["--clock-control", "none", "--cache-control", "none", "--metrics", "gpu__time_duration.sum"]
    if not shutil.which("ncu"):
        raise Ended(f"kernels of {name} are left out: no ncu (NVIDIA Nsight Compute) in PATH")
    return ["ncu", "--target-processes", "all", *ordinary, "--csv", "--log-file", str(log), *options]


def compare_kernels(arguments: argparse.Namespace) -> None:
    """Kernels of one step by class, fm-dist's and those of the eager peer, in bfloat16 on one GPU."""
    for name in arguments.cases:
        prepare(case(name))
        setting, log, out = Setting(case(name), "bfloat16", 1, arguments.device, arguments.cudnn), BENCH / "kernels.csv", BENCH / "peer.json"
        folder, found = BENCH / "run", {}
        shutil.rmtree(folder, ignore_errors=True)
        launch("kernels", [*ncu("fm-dist", log), *programs.train_command(setting, 2, folder)], {})
        found["fm-dist"] = kernel_times.last_step(kernel_times.read(log))
        if "peer" in arguments.beside:
            profiled = ncu("the peer", log, "--profile-from-start", "off")
            launch("kernels", [*profiled, *programs.peer_command(setting, 2, out, "--profiled")], {})
            found["peer"] = kernel_times.read(log)
        keep("kernels", setting.name, {side: kernel_times.by_class(its) for side, its in found.items()})
        for side, its in found.items():
            print(table.short_row(setting.name, side, table.kernels_of(kernel_times.by_class(its))), flush=True)
            if unknown := kernel_times.longest_of_none(its, 3):
                print("    without a class: " + "; ".join(unknown))


def compare_offload(arguments: argparse.Namespace) -> None:
    """One model that needs host memory: its memory and steps beside what `fm-dist check` tells of them."""
    of = case(OFFLOADED)
    prepare(of)
    setting, folder = Setting(of, "bfloat16", 1, arguments.device, arguments.cudnn), BENCH / "run"
    threads = str(len(machine.cores()))
    spared = ["--set", 'parallel.offload="all"', "--set", f"parallel.num_threads={threads}"]
    launch("check", programs.fm_dist("check", setting, *spared, "--cluster", programs.CLUSTER), {})
    plan = (BENCH / "check.log").read_text()
    program = Program("fm-dist", OURS.run, {}, tuple(spared))
    result = program.run(setting, arguments.warm_up + arguments.steps, program)
    keep("offload", setting.name, {"plan": plan, "warm_up": arguments.warm_up, **result})
    shutil.rmtree(folder, ignore_errors=True)
    print(table.short_row(setting.name, "fm-dist", table.figures(result, arguments.warm_up)), flush=True)
    for line in plan.splitlines():
        if line.startswith(("model ", "activations", "a rank, by", "  none", "prediction", "  step")):
            print(f"| check: {line}", flush=True)


def compare_launch(arguments: argparse.Namespace) -> None:
    """Runs of a single step: launch/mpirun and torchrun, libraries, model, data, step."""
    for name in arguments.cases:
        prepare(case(name))
    for setting in settings(arguments):
        turns = []
        for pair in range(arguments.pairs):
            print(f"==> launch, {setting.name}: pair {pair + 1} of {arguments.pairs}", flush=True)
            chosen = [program for program in programs_of(setting, arguments) if program is not SHARDED]
            turns.append(turn_of(setting, chosen, 1, 0))
        keep("launch", setting.name, {"device": setting.device, "pairs": turns})


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
    "lora": compare_lora,
    "launch": compare_launch,
    "kernels": compare_kernels,
    "offload": compare_offload,
    "data": compare_data,
    "pipeline": compare_pipeline,
    "checkpoint": compare_checkpoint,
}


# Parts that only a GPU can show, and those that it has no part in.
OF_GPUS, OF_CPUS = ["kernels", "offload"], ["data", "pipeline", "checkpoint"]


def main() -> None:
    names = [each.name for each in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "all", "table", "readme"], default=["steps"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of both sides")
    parser.add_argument("--cases", nargs="+", choices=names, help="those of the device if none is named")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--ranks", nargs="+", type=int)
    parser.add_argument("--beside", nargs="*", choices=BESIDE, help="who runs in turns with fm-dist; nobody if none is named")
    parser.add_argument("--cudnn", action="store_true", help="both sides may use cuDNN's attention on a GPU")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each run")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    arguments = parser.parse_args()
    device = arguments.device
    arguments.cases = arguments.cases or [each.name for each in CASES if device in each.devices]
    arguments.ranks = arguments.ranks or RANKS[device]
    arguments.beside = USUAL[device] if arguments.beside is None else arguments.beside
    BENCH.mkdir(parents=True, exist_ok=True)
    print(f"{machine.description()}, load {machine.load()}", flush=True)
    without = OF_CPUS if device == "cuda" else OF_GPUS
    chosen = [part for part in PARTS if part not in without] if arguments.parts in (["all"], ["table"]) else arguments.parts
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
