"""Parts of the peer by themselves: its data loader, its pipeline around a model that costs nothing, its checkpoints.

    python peer_parts.py data FOLDER OUT.json
    python peer_parts.py pipeline OUT.json
    torchrun --nproc-per-node 2 peer_parts.py checkpoint CASE SAVES STEPS_BETWEEN FOLDER OUT.json

`data` reads the samples of `cargo bench`'s dataset in FOLDER as one pickle a sample, the way in which the package caches them, through a
DataLoader with two workers and its default collation, in batches of four. `pipeline` repeats `parts.rs`: the same shapes, metrics
collected. `checkpoint` trains in f32 and saves parameters and optimizer state, of two ranks that hold the same, with
`torch.distributed.checkpoint`: first with `save`, then with `async_save` beside the steps.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from cases import BENCH, MICRO_BATCH, case

WORKERS = 2
# Epochs of the loader that are timed, after one that is not.
EPOCHS = 3
# Steps of the pipeline that are timed, after a tenth as many that are not.
PIPELINE_STEPS = 300
# Latents, as `parts.rs` has them.
PIPELINE_SHAPES = {"4x32x32": (4, 32), "16x64x64": (16, 64)}


class Pickles(torch.utils.data.Dataset):
    """Samples of one file each."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.pt"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return torch.load(self.files[index], map_location="cpu")


def pickles_of(folder: Path) -> Path:
    """The samples of a dataset in our format as one pickle each, written once."""
    from safetensors.torch import load_file

    pickles = BENCH / "pickles"
    if not pickles.exists():
        unfinished = pickles.with_suffix(".new")
        unfinished.mkdir(exist_ok=True)
        tensors = load_file(folder / "samples.safetensors")
        for number in range(len(next(iter(tensors.values())))):
            torch.save({key: tensor[number].clone() for key, tensor in tensors.items()}, unfinished / f"{number:04}.pt")
        unfinished.rename(pickles)
    return pickles


def data(folder: Path, out: Path) -> None:
    dataset = Pickles(pickles_of(folder))
    loader = torch.utils.data.DataLoader(dataset, batch_size=MICRO_BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    rates = []
    for _ in range(1 + EPOCHS):
        began, samples = time.perf_counter(), 0
        for batch in loader:
            samples += len(batch["image_latents"])
        rates.append(samples / (time.perf_counter() - began))
    out.write_text(json.dumps({"samples_per_second": rates[1:]}))


def pipeline_seconds(channels: int, side: int) -> list[float]:
    from nemo_automodel.components.flow_matching.pipeline import create_pipeline

    pipeline = create_pipeline("flux", device=torch.device("cpu"))
    batch = {
        "image_latents": torch.randn(MICRO_BATCH, channels, side, side),
        "text_embeddings": torch.randn(MICRO_BATCH, 64, 256),
        "pooled_prompt_embeds": torch.randn(MICRO_BATCH, 128),
        "data_type": "image",
    }
    prediction = torch.randn(MICRO_BATCH, side * side // 4, channels * 4, requires_grad=True)

    def model(**_inputs) -> tuple[torch.Tensor]:
        return (prediction,)

    seconds = []
    for number in range(PIPELINE_STEPS // 10 + PIPELINE_STEPS):
        began = time.perf_counter()
        pipeline.step(model, batch, torch.device("cpu"), torch.float32, number, collect_metrics=True, check_loss=False)
        seconds.append(time.perf_counter() - began)
    return seconds[PIPELINE_STEPS // 10 :]


def pipeline(out: Path) -> None:
    out.write_text(json.dumps({name: pipeline_seconds(*shape) for name, shape in PIPELINE_SHAPES.items()}))


def checkpoint(name: str, saves: int, steps_between: int, folder: Path, out: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from peer import Options, Trainer
    from torch.distributed.checkpoint.state_dict import get_state_dict

    dist.init_process_group("gloo")
    trainer = Trainer(case(name), torch.float32, Options())

    def state() -> dict:
        model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
        return {"model": model, "optimizer": optimizer}

    def fresh_folder() -> Path:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        return folder

    trainer.step()
    result = {"steps": [trainer.step()["step"] for _ in range(steps_between)], "save": [], "async_save": []}
    for _ in range(saves):
        path, began = fresh_folder(), time.perf_counter()
        dcp.save(state(), checkpoint_id=path)
        seconds = time.perf_counter() - began
        result["save"].append({"stall": seconds, "total": seconds})
        result["steps"] += [trainer.step()["step"] for _ in range(steps_between)]
    for _ in range(saves):
        path, began, beside = fresh_folder(), time.perf_counter(), []
        future = dcp.async_save(state(), checkpoint_id=path)
        stall = time.perf_counter() - began
        # The ranks must agree how many steps they take.
        while not all_done(future.done()):
            beside.append(trainer.step()["step"])
        future.result()
        result["async_save"].append({"stall": stall, "total": time.perf_counter() - began, "steps_beside": beside})
        trainer.step()
    fresh_folder()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(result))
    dist.destroy_process_group()


def all_done(done: bool) -> bool:
    flag = torch.tensor(int(done))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, arguments in {
        "data": {"folder": Path, "out": Path},
        "pipeline": {"out": Path},
        "checkpoint": {"name": str, "saves": int, "steps_between": int, "folder": Path, "out": Path},
    }.items():
        its_parser = commands.add_parser(command)
        for name, kind in arguments.items():
            its_parser.add_argument(name, type=kind)
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    {"data": data, "pipeline": pipeline, "checkpoint": checkpoint}[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    main()
