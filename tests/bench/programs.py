"""Starts either program from its launcher, waits for its end, and reads what it measured."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cases import BENCH, ROOT, SEED, Case
from machine import GpuMemory

FM_DIST = ROOT / "target" / "release" / "fm-dist"
PYTHON = ROOT / ".deps" / "oracle" / "bin" / "python"
HERE = Path(__file__).resolve().parent
# Whose constants `fm-dist check` predicts a step on one GPU with.
CLUSTER = "h100"
# What keeps glibc from giving freed tensors back to the system, to be asked for again at the next step.
TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "68719476736"}
# Between looks at the file in which fm-dist says that a step is over.
POLL_SECONDS = 0.005
# Lines of a run's log.
STEP_ENDED = re.compile(r"\[STEP (\d+)\]")
SAVED = re.compile(r"step (\d+): .* ([\d.]+) s until it was safe")
# Phases of a step in the order of the table; fm-dist's as sums of its own metrics. The peer's forward pass holds its draws, and its
# backward pass its all-reduces.
PHASES = {
    "step": ["step"],
    "data": ["data"],
    "draw": ["draw"],
    "forward": ["draw", "forward"],
    "backward": ["backward", "reduce"],
    "optimizer": ["optimizer"],
    "communication": ["communication"],
    "exposed": ["exposed"],
}


@dataclass(frozen=True)
class Setting:
    """One row's case, kind, number of ranks and device."""

    case: Case
    dtype: str
    ranks: int
    device: str = "cpu"
    # Both sides may use cuDNN's attention.
    cudnn: bool = False

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.dtype} {self.ranks}" + (f" {self.device}" if self.device != "cpu" else "")


@dataclass(frozen=True)
class Program:
    """One side of a comparison."""

    name: str
    run: Callable[[Setting, int, "Program"], dict]
    # What it gets besides: variables of the environment, arguments.
    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


class Ended(Exception):
    """A program that did not end as it should."""


class DoesNotFit(Ended):
    """A program that a GPU has too little memory for."""


# Ends of programs for which a GPU has too little memory: our error, whose code a launcher may replace, and the peer's exception.
OUT_OF_MEMORY = re.compile(r"fm-dist: error MEMORY|OutOfMemoryError")
# Lines that name the cause of an end.
CAUSE = re.compile(r"^(fm-dist: error .*|[\w.]*(?:Error|Exception): .*)$", re.MULTILINE)


def launch(name: str, command: list[str], environment: dict[str, str], until: Path | None = None) -> tuple[float, float | None, int]:
    """Runs a launcher to its end: when it began, when the file `until` had its first line, and the largest process's memory in bytes."""
    log = BENCH / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        began, seen = time.time(), None
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT)
        while until and seen is None and (waited := os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is None:
            if until.exists() and until.stat().st_size > 0:
                seen = time.time()
            else:
                time.sleep(POLL_SECONDS)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        text = log.read_text(errors="replace")
        if OUT_OF_MEMORY.search(text):
            raise DoesNotFit(f"{name} does not fit into the GPU's memory")
        sys.stderr.write(text[-4000:])
        causes = CAUSE.findall(text) or ["its last lines stand above"]
        raise Ended(f"{name} ended with code {process.returncode}, see {log}: {causes[0]}")
    return began, seen, usage.ru_maxrss * 1024


def python(script: str, *arguments: str) -> list[str]:
    return [str(PYTHON), str(HERE / script), *arguments]


def torchrun(ranks: int, script: str, *arguments: str) -> list[str]:
    launcher = [str(PYTHON), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, *python(script, *arguments)[1:]]


def mpi_run(ranks: int, *command: str) -> list[str]:
    return ["bash", "-c", '. launch/env.sh && mpi_run "$@"', "mpi_run", str(ranks), *command]


def peer_command(setting: Setting, num_steps: int, out: Path, *arguments: str) -> list[str]:
    attention = ["--cudnn"] if setting.cudnn else []
    trained = [setting.case.name, setting.dtype, str(num_steps), str(out), "--device", setting.device]
    return torchrun(setting.ranks, "peer.py", "train", *trained, *attention, *arguments)


def run_peer(setting: Setting, num_steps: int, program: Program) -> dict:
    out = BENCH / "peer.json"
    began, _, largest = launch("peer", peer_command(setting, num_steps, out, *program.arguments), program.environment)
    measured = json.loads(out.read_text())
    launched = measured.pop("first_step_ended") - began
    # Seen in some more steps, because it lies inside of the backward pass.
    watched = measured.pop("communication")
    steps = [{**step, **({"communication": watched[number % len(watched)]} if watched else {})} for number, step in enumerate(measured["steps"])]
    return {**measured, "steps": steps, "launch_seconds": launched, "largest_process_bytes": largest}


def built_parts() -> str:
    """The program of `parts.rs`, built."""
    command = ["cargo", "bench", "--quiet", "--no-run", "--bench", "parts", "--message-format", "json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    (executable,) = (entry["executable"] for entry in map(json.loads, lines) if entry.get("executable") and entry["target"]["name"] == "parts")
    return executable


def run_parts(program: str, group: str) -> dict[str, list[float]]:
    """Seconds of one iteration in each sample of criterion's, by the benchmark's name."""
    home = BENCH / "criterion"
    launch("parts", [program, "--bench", group], {"CRITERION_HOME": str(home)})
    seconds = {}
    for sample in sorted(home.glob(f"{group}/*/new/sample.json")):
        measured = json.loads(sample.read_text())
        seconds[sample.parts[-3]] = [each / 1e9 / count for each, count in zip(measured["times"], measured["iters"], strict=True)]
    return seconds


def settings_of(case: Case, dtype: str, device: str) -> list[str]:
    """The configuration of a run, as `--set` takes it."""
    pipeline = {f"flow_matching.{key}": json.dumps(value) for key, value in case.pipeline.items()}
    shape = {f"model.{case.table}.{key}": json.dumps(value) for key, value in case.config.items()}
    place = {"parallel.device": '"cuda"', "checkpoint.save_last": "false"} if device == "cuda" else {}
    values = {
        "seed": str(SEED),
        **({"model.path": json.dumps(str(case.weights))} if case.shares_weights else shape),
        **({"parallel.recompute": '"always"'} if case.recompute else {}),
        **place,
        "model.dtype": json.dumps(dtype),
        "flow_matching.adapter_type": json.dumps(case.adapter),
        **pipeline,
        "data.path": json.dumps(str(case.data)),
        "data.micro_batch_size_per_gpu": str(case.micro_batch),
        "optimizer.adamw.lr": "1e-4",
        "train.max_grad_norm": "1.0",
        "checkpoint.every_n_steps": "1000000",
        "log.progress": '"never"',
    }
    return [text for key, value in values.items() for text in ("--set", f"{key}={value}")]


def fm_dist(command: str, setting: Setting, *arguments: str) -> list[str]:
    """A command line of ours; an empty configuration, so that all that it does not set is the default."""
    config = BENCH / "empty.toml"
    config.write_text("")
    attention = ["--set", 'compute.attention="cudnn"'] if setting.cudnn else []
    return [str(FM_DIST), command, "--config", str(config), *settings_of(setting.case, setting.dtype, setting.device), *attention, *arguments]


def train_command(setting: Setting, num_steps: int, folder: Path, *arguments: str) -> list[str]:
    run = ["--set", f"max_steps={num_steps}", "--set", f"output_dir={json.dumps(str(folder))}"]
    return mpi_run(setting.ranks, *fm_dist("train", setting, *run, *arguments))


def train_fm_dist(setting: Setting, num_steps: int, program: Program) -> tuple[Path, float, int]:
    """Run folder, seconds from the launch to the end of the first step, largest process."""
    folder = BENCH / "run"
    shutil.rmtree(folder, ignore_errors=True)
    command = train_command(setting, num_steps, folder, *program.arguments)
    began, seen, largest = launch("fm-dist", command, program.environment, until=folder / "metrics.jsonl")
    if seen is None:
        raise Ended("fm-dist ended before its first step was seen")
    return folder, seen - began, largest


def draws_seconds(lines: list[dict]) -> dict:
    """What each step waited for its draws, from versions that tell it."""
    waits = [line["draw_seconds"] for line in lines if "draw_seconds" in line]
    return {"draw_seconds": waits} if waits else {}


def run_fm_dist(setting: Setting, num_steps: int, program: Program) -> dict:
    folder, launched, largest = train_fm_dist(setting, num_steps, program)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [{phase: sum(line[f"{name}_seconds"] for name in names) for phase, names in PHASES.items()} for line in lines]
    shutil.rmtree(folder)
    # Of the last step, before the last checkpoint.
    peak = lines[-1]["peak_memory_bytes"]
    return {"steps": steps, "peak_memory_bytes": peak, "launch_seconds": launched, "largest_process_bytes": largest, **draws_seconds(lines)}


def save_fm_dist(setting: Setting, saves: int, steps_between: int) -> dict:
    """Saves beside the steps of a run: how long the loop stood still for each, and until it was on the disk, by the run's own log."""
    arguments = ["checkpoint.every_n_steps=" + str(steps_between), "flow_matching.summary_log_interval=1", 'log.level="debug"']
    saver = Program("fm-dist", run_fm_dist, {}, tuple(text for each in arguments for text in ("--set", each)))
    # Behind the last save but that at the end, in which nothing is left to wait.
    folder, _, _ = train_fm_dist(setting, (saves + 1) * steps_between - 1, saver)
    seconds = {line["step"]: line["step_seconds"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    ended, totals = {}, {}
    for line in map(json.loads, (folder / "log" / "rank-00000.jsonl").read_text().splitlines()):
        if found := STEP_ENDED.match(line["message"]):
            ended[int(found[1])] = datetime.fromisoformat(line["time"]).timestamp()
        if found := SAVED.match(line["message"]):
            totals[int(found[1])] = float(found[2])
    shutil.rmtree(folder)
    # What lies between the ends of two steps and is not the second one.
    pauses = {step: ended[step + 1] - ended[step] - seconds[step + 1] for step in ended if step + 1 in ended}
    saved = [step for step in totals if step in pauses and step % steps_between == 0]
    beside = [[seconds[step + each + 1] for each in range(steps_between - 1)] for step in saved]
    found = [{"stall": pauses[step], "total": totals[step], "steps_beside": beside[number]} for number, step in enumerate(saved)]
    return {"steps": [seconds[step] for step in range(2, steps_between + 1)], "save": found}


def on_gpu(run: Callable[[Setting, int, Program], dict]) -> Callable[[Setting, int, Program], dict]:
    """The same, with the GPU's memory that the driver saw in use."""

    def watched(setting: Setting, num_steps: int, program: Program) -> dict:
        if setting.device != "cuda":
            return run(setting, num_steps, program)
        with GpuMemory() as memory:
            result = run(setting, num_steps, program)
        return {**result, "gpu_memory_bytes": memory.most_bytes()}

    return watched


PEER = Program("peer", on_gpu(run_peer))
TUNED_PEER = Program("peer, tuned", run_peer, TUNED_MALLOC, ("--tuned",))
COMPILED_PEER = Program("peer, compiled", on_gpu(run_peer), {}, ("--compiled",))
OURS = Program("fm-dist", on_gpu(run_fm_dist))
# Rank 16 on the attention's projections, on both sides.
LORA = Program("fm-dist, LoRA", run_fm_dist, {}, ("--set", "lora.rank=16"))
LORA_PEER = Program("peer, LoRA", run_peer, {}, ("--lora",))
SHARDED = Program("fm-dist, sharding = optimizer", run_fm_dist, {}, ("--set", 'parallel.sharding="optimizer"'))
