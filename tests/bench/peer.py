"""The peer: NeMo AutoModel's flow-matching pipeline on a transformer of diffusers with DistributedDataParallel, over gloo or NCCL.

    python peer.py prepare CASE
    torchrun --nproc-per-node 2 peer.py train CASE DTYPE STEPS OUT.json [--device cuda] [--tuned] [--compiled] [--cudnn] [--profiled] [--lora]

`prepare` writes the case's model with random weights, its dataset in fm-dist's format, a batch, and the loss of that batch for the draws
of one seed, of each kind. `train` steps on batches that lie in memory, the hot path of the package's own training recipe: no metrics, no
look at the loss. It writes, of rank 0, seconds since the epoch when the first step ended, and seconds of each phase of each step;
communication, which DistributedDataParallel hides inside of the backward pass, is seen in some more steps through a hook. Peak memory
is that of the measured steps.

On GPUs a rank alone is not wrapped, phases end when the GPU has done them, and peak memory is what PyTorch's tensors took; cuDNN's
attention, which gave wrong gradients there, is off unless `--cudnn` asks for it. `--profiled` marks the last step for a profiler.

As it comes: AdamW and DistributedDataParallel with their defaults. Tuned: fused AdamW, a static graph, gradients that are views of their
buckets; malloc's thresholds are the launcher's to set. Compiled: tuned, and each kind of block by torch.compile. `--lora`: the model is
frozen, and PEFT's LoRA of rank 16 on the projections of its attentions, by diffusers' `add_adapter`, is trained in float32.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from cases import DTYPES, SEED, Case, case
from safetensors import safe_open
from safetensors.torch import save_file

LR = 1e-4
MAX_GRAD_NORM = 1.0
# The LoRA of `--lora`; the targets are those of diffusers' own scripts for FLUX.1.
LORA_RANK = 16
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
# Steps in which a hook watches the all-reduces, after those that are measured.
WATCHED_STEPS = 3
CPU = torch.device("cpu")


def model_class(of: Case) -> type:
    import diffusers

    return getattr(diffusers, of.model)


def load_model(of: Case, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """`from_pretrained` in training mode; what it keeps in float32 by the package accelerate is kept here by the same rule."""
    kind = model_class(of)
    kept = kind._keep_in_fp32_modules or []
    if of.shares_weights:
        with patch.object(kind, "_keep_in_fp32_modules", None):
            model = kind.from_pretrained(of.weights, torch_dtype=torch.float32 if kept else dtype).to(device)
    else:
        with device:
            model = kind(**of.config)
    for name, parameter in model.named_parameters():
        if not set(kept) & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.train()


def add_lora(model: torch.nn.Module) -> None:
    """Freezes the model and gives it an adapter, whose matrices are float32 as in diffusers' scripts."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGETS))
    cast_training_params([model], dtype=torch.float32)


def pipeline_of(of: Case, device: torch.device):
    from nemo_automodel.components.flow_matching.pipeline import create_pipeline

    return create_pipeline(of.adapter, device=device, **of.pipeline)


def samples(of: Case, first: int, count: int) -> dict[str, torch.Tensor]:
    """Tensors of consecutive samples under the batch's keys."""
    with safe_open(of.data / "samples.safetensors", "pt") as file:
        return {key: file.get_slice(key)[first : first + count] for key in of.keys}


def step(pipeline, model: torch.nn.Module, of: Case, batch: dict[str, torch.Tensor], dtype: torch.dtype, number: int) -> torch.Tensor:
    batch = {**batch, "data_type": of.data_type}
    return pipeline.step(model, batch, pipeline.device, dtype, number, collect_metrics=False, check_loss=False)[1]


def write_model(of: Case) -> None:
    torch.manual_seed(SEED)
    model_class(of)(**of.config).save_pretrained(of.weights)


def write_data(of: Case) -> None:
    """A dataset of random samples, and one batch of its first ones."""
    of.data.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED)
    tensors = {key: torch.randn(of.samples, *shape, generator=generator) for key, shape in of.keys.items()}
    path = of.data / "samples.safetensors"
    save_file(tensors, path, {"data_type": of.data_type})
    entry = {"path": path.name, "samples": of.samples, "group": "one", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest = {"format": "fm-dist dataset", "version": 1, "name": of.name, "source": "a generator of random numbers", "licence": "CC0"}
    (of.data / "dataset.json").write_text(json.dumps({**manifest, "data_type": of.data_type, "files": [entry]}))
    save_file(samples(of, 0, of.micro_batch), of.folder / "batch.safetensors", {"data_type": of.data_type})


def write_losses(of: Case) -> None:
    """The loss of the batch for the draws of one seed, of each kind."""
    losses = {}
    for dtype in DTYPES:
        model, pipeline = load_model(of, getattr(torch, dtype), CPU), pipeline_of(of, CPU)
        torch.manual_seed(SEED)
        losses[dtype] = step(pipeline, model, of, samples(of, 0, of.micro_batch), getattr(torch, dtype), 1).item()
    (of.folder / "losses.json").write_text(json.dumps(losses))


def prepare(of: Case) -> None:
    write_data(of)
    if of.shares_weights:
        write_model(of)
        write_losses(of)
    (of.folder / "prepared").touch()


class Laps:
    """Seconds of each phase of a step, to the end of what it computes."""

    def __init__(self, device: torch.device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.wait()
        self.began = self.lap_began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        self.wait()
        now = time.perf_counter()
        self.seconds[phase] = now - self.lap_began
        self.lap_began = now

    def total(self) -> dict[str, float]:
        return {"step": self.lap_began - self.began, **self.seconds}


class AllReduces:
    """A communication hook that does what DistributedDataParallel does without one, and notes when each bucket was under way."""

    def __init__(self):
        self.spans: list[list[float]] = []

    def begin(self, _state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        span = [time.perf_counter(), 0.0]
        self.spans.append(span)
        future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()

        def done(future: torch.futures.Future) -> torch.Tensor:
            span[1] = time.perf_counter()
            return future.value()[0]

        return future.then(done)

    def seconds(self) -> float:
        """While at least one bucket was under way."""
        total, until = 0.0, 0.0
        for begin, end in sorted(self.spans):
            total += max(0.0, end - max(begin, until))
            until = max(until, end)
        self.spans.clear()
        return total


@dataclass(frozen=True)
class Options:
    """How the peer runs."""

    device: str = "cpu"
    tuned: bool = False
    compiled: bool = False
    cudnn: bool = False
    profiled: bool = False
    lora: bool = False

    def torch_device(self) -> torch.device:
        return torch.device(self.device, int(os.environ["LOCAL_RANK"])) if self.device == "cuda" else CPU


class Trainer:
    """One rank of the peer's training loop."""

    def __init__(self, of: Case, dtype: torch.dtype, options: Options):
        tuned = options.tuned or options.compiled
        self.of, self.dtype, self.number, self.device = of, dtype, 0, options.torch_device()
        self.model = load_model(of, dtype, self.device)
        if options.lora:
            add_lora(self.model)
        if of.recompute:
            self.model.enable_gradient_checkpointing()
        if options.compiled:
            self.model.compile_repeated_blocks()
        if self.device == CPU or dist.get_world_size() > 1:
            views = {"static_graph": True, "gradient_as_bucket_view": True} if tuned else {}
            self.model = torch.nn.parallel.DistributedDataParallel(self.model, **views)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, **({"fused": True} if tuned else {}))
        self.pipeline, self.batches = pipeline_of(of, self.device), batches_of(of)
        torch.manual_seed(dist.get_rank())

    def step(self) -> dict[str, float]:
        """One step; returns the seconds of its phases."""
        laps = Laps(self.device)
        batch = next(self.batches)
        laps.lap("data")
        self.number += 1
        loss = step(self.pipeline, self.model, self.of, batch, self.dtype, self.number)
        laps.lap("forward")
        loss.backward()
        laps.lap("backward")
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        laps.lap("optimizer")
        return laps.total()


def batches_of(of: Case) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's batches, read before the first step, over and over."""
    stride = of.micro_batch * dist.get_world_size()
    batches = [samples(of, first, of.micro_batch) for first in range(dist.get_rank() * of.micro_batch, of.samples, stride)]
    while True:
        yield from batches


def peak_memory_bytes(device: torch.device) -> int:
    """Largest resident memory this process has had, or most memory of a GPU that its tensors took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def watched_steps(trainer: Trainer) -> list[float]:
    """Seconds of communication of some more steps."""
    if not isinstance(trainer.model, torch.nn.parallel.DistributedDataParallel):
        return [0.0]
    all_reduces, watched = AllReduces(), []
    trainer.model.register_comm_hook(None, all_reduces.begin)
    for _ in range(WATCHED_STEPS):
        trainer.step()
        watched.append(all_reduces.seconds())
    return watched


def train(of: Case, dtype: torch.dtype, num_steps: int, out: Path, options: Options) -> None:
    torch.set_num_threads(1)
    device = options.torch_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(options.cudnn)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    trainer = Trainer(of, dtype, options)
    steps = [trainer.step()]
    first_step_ended = time.time()
    steps += [trainer.step() for _ in range(1, num_steps)]
    peak = peak_memory_bytes(device)
    if options.profiled:
        with torch.cuda.profiler.profile():
            trainer.step()
    watched = watched_steps(trainer) if num_steps > 1 else []
    if dist.get_rank() == 0:
        result = {"first_step_ended": first_step_ended, "steps": steps, "communication": watched, "peak_memory_bytes": peak}
        out.write_text(json.dumps(result))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument("case", type=case)
    training = commands.add_parser("train")
    training.add_argument("case", type=case)
    training.add_argument("dtype", choices=DTYPES)
    training.add_argument("steps", type=int)
    training.add_argument("out", type=Path)
    training.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for flag in ["--tuned", "--compiled", "--cudnn", "--profiled", "--lora"]:
        training.add_argument(flag, action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        torch.set_num_threads(1)
        prepare(arguments.case)
    else:
        options = Options(arguments.device, arguments.tuned, arguments.compiled, arguments.cudnn, arguments.profiled, arguments.lora)
        train(arguments.case, getattr(torch, arguments.dtype), arguments.steps, arguments.out, options)


if __name__ == "__main__":
    main()
