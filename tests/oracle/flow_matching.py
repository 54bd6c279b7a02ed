"""Runs the flow matching of NeMo AutoModel 0.5.0 on a CPU, and writes what went in and what came out.

    python flow_matching.py OUT_DIR SEED

Needs torch 2.13.0, nemo-automodel 0.5.0 and safetensors; takes 10 s, most of it imports. Writes

cases.json              one entry a case: file, seed, dtype, data_type, pipeline (constructor arguments), metrics, sampling_method
case-NNN.safetensors    `batch.<key>` as given, and what `step` computed, all f32:
                        sigma timesteps noise noisy_latents model_pred target loss_weight unweighted_loss weighted_loss
                        average_unweighted_loss average_weighted_loss
time_shift_utils.json   one entry a call: function, arguments (with the seed where it draws), inputs and output (names of tensors)
time_shift_utils.safetensors

A case repeats so: `manual_seed(seed)`, then `step` on the batch with the model of this file. Its draws come in the order of the
reference; the task type of videos needs none of Python's, since `i2v_prob` is 0 or 1. It runs on one thread, so that no sum
depends on the machine.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from nemo_automodel.components.flow_matching import time_shift_utils
from nemo_automodel.components.flow_matching.adapters import SimpleAdapter
from nemo_automodel.components.flow_matching.pipeline import FlowMatchingPipeline
from safetensors.torch import save_file

SAMPLINGS = ["uniform", "logit_normal", "mode", "lognorm", "mix"]
MIX_UNIFORM_RATIOS = [0.0, 0.1, 0.5, 1.0]
WEIGHTINGS = [(True, "linear"), (True, "bsmntw"), (False, "linear")]
NUM_FREE_CASES = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model(hidden_states, timestep, encoder_hidden_states, attention_kwargs, return_dict):
    """A transformer's interface around a formula that a test can repeat: every input counts, in the kind of `hidden_states`."""
    per_sample = (-1,) + (1,) * (hidden_states.ndim - 1)
    time = (timestep / 1000).view(per_sample) * 0.25
    text = encoder_hidden_states.float().mean(dim=(1, 2)).to(hidden_states.dtype).view(per_sample)
    return (hidden_states * 0.5 + time + text,)


def deck(dice: random.Random, values: list) -> Iterator:
    """Draws without end, every value once before any comes again: so few cases cover all values."""
    while True:
        yield from dice.sample(values, len(values))


class Decks:
    """What the cases vary besides sampling and weighting."""

    def __init__(self, dice: random.Random):
        self.dice = dice
        self.dtype = deck(dice, sorted(DTYPES))
        self.stored = deck(dice, [torch.float32, torch.float16, torch.bfloat16])
        self.kind = deck(dice, ["image", "video", "both", "flat text"])
        self.batch_size = deck(dice, list(range(1, 10)))
        self.flow_shift = deck(dice, [1.0, 2.23, 3.0])
        self.window = deck(dice, [(0.0, 1.0), (0.02, 1.0), (0.0, 0.875), (0.3, 0.7)])
        self.num_train_timesteps = deck(dice, [1000, 1000, 10])
        self.i2v_prob = deck(dice, [0.0, 1.0])
        self.masked = deck(dice, [False, False, True])

    def pipeline(self, sampling: str, mix_uniform_ratio: float, weighting: tuple[bool, str], use_sigma_noise: bool) -> dict:
        """All constructor arguments but the adapter and the device."""
        sigma_min, sigma_max = next(self.window)
        use_loss_weighting, loss_weighting_scheme = weighting
        return {
            "num_train_timesteps": next(self.num_train_timesteps),
            "timestep_sampling": sampling,
            "flow_shift": next(self.flow_shift),
            "i2v_prob": next(self.i2v_prob),
            "cfg_dropout_prob": 0.1,
            "logit_mean": round(self.dice.uniform(-1, 1), 3),
            "logit_std": round(self.dice.uniform(0.5, 1.5), 3),
            "mix_uniform_ratio": mix_uniform_ratio,
            "use_sigma_noise": use_sigma_noise,
            "sigma_min": sigma_min,
            "sigma_max": sigma_max,
            "use_loss_weighting": use_loss_weighting,
            "loss_weighting_scheme": loss_weighting_scheme,
            "log_interval": 100,
            "summary_log_interval": 10,
        }

    def batch(self) -> tuple[dict[str, torch.Tensor], str]:
        """Tensors under the batch's keys, and the data type."""
        kind, size, stored = next(self.kind), next(self.batch_size), next(self.stored)
        generator = torch.Generator().manual_seed(self.dice.getrandbits(32))

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(stored)

        channels, height, width = self.dice.randint(1, 5), self.dice.randint(1, 6), self.dice.randint(1, 6)
        length, features = self.dice.randint(1, 7), self.dice.randint(1, 12)
        if kind == "flat text" and length == size > 1:
            # As many tokens as samples: fm-dist refuses what may be a row for each sample.
            length += 1
        tensors = {"text_embeddings": normal(length, features) if kind == "flat text" else normal(size, length, features)}
        if kind != "video":
            tensors["image_latents"] = normal(size, channels, height, width)
        if kind in ("video", "both"):
            tensors["video_latents"] = normal(size, channels, self.dice.randint(1, 4), height, width)
        if next(self.masked):
            tensors["loss_mask"] = torch.randint(2, (size,), generator=generator).float()
        return tensors, "image" if kind in ("image", "flat text") else "video"


class Recorder:
    """Keeps what a pipeline computes inside `step`, by wrapping the methods of one pipeline and its adapter."""

    def __init__(self, pipeline: FlowMatchingPipeline):
        self.tensors: dict[str, torch.Tensor] = {}
        self.sampling_method = ""
        self.observe(pipeline, "sample_timesteps", self.on_timesteps)
        self.observe(pipeline.noise_schedule, "forward", self.on_schedule)
        self.observe(pipeline.model_adapter, "prepare_inputs", self.on_inputs)
        self.observe(pipeline, "compute_loss", self.on_loss)

    @staticmethod
    def observe(owner, name: str, watcher) -> None:
        """Calls `watcher(result, *arguments)` after every call of `owner.name`."""
        original = getattr(owner, name)

        def wrapped(*arguments):
            result = original(*arguments)
            watcher(result, *arguments)
            return result

        setattr(owner, name, wrapped)

    def keep(self, **tensors: torch.Tensor) -> None:
        self.tensors.update({name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()})

    def on_timesteps(self, result, *_):
        sigma, timesteps, self.sampling_method = result
        self.keep(sigma=sigma, timesteps=timesteps)

    def on_schedule(self, _result, _latents, noise, _sigma):
        self.keep(noise=noise)

    def on_inputs(self, _result, context):
        self.keep(noisy_latents=context.noisy_latents)

    def on_loss(self, result, model_pred, target, *_):
        weighted, average_weighted, unweighted, average_unweighted, weight, _mask = result
        self.keep(model_pred=model_pred, target=target, loss_weight=weight, unweighted_loss=unweighted, weighted_loss=weighted)
        self.keep(average_unweighted_loss=average_unweighted, average_weighted_loss=average_weighted)


def run_case(out: Path, number: int, decks: Decks, arguments: dict) -> dict:
    """Runs `step` once, writes the case's tensors and returns its entry in cases.json."""
    batch, data_type = decks.batch()
    dtype, seed = next(decks.dtype), decks.dice.getrandbits(32)
    pipeline = FlowMatchingPipeline(model_adapter=SimpleAdapter(), device=torch.device("cpu"), **arguments)
    recorder = Recorder(pipeline)
    torch.manual_seed(seed)
    *_, metrics = pipeline.step(
        model, {**batch, "data_type": data_type}, torch.device("cpu"), DTYPES[dtype], 1, collect_metrics=True, check_loss=False
    )
    file = f"case-{number:03}.safetensors"
    save_file({**{f"batch.{key}": tensor for key, tensor in batch.items()}, **recorder.tensors}, out / file, {"data_type": data_type})
    return {
        "file": file,
        "seed": seed,
        "dtype": dtype,
        "data_type": data_type,
        "pipeline": arguments,
        "metrics": metrics,
        "sampling_method": recorder.sampling_method,
    }


def grid(dice: random.Random) -> list[tuple]:
    """Sampling, mixing, weighting, use_sigma_noise: all combinations, then draws of them."""
    shifted = [(*combination, True) for combination in itertools.product(SAMPLINGS, MIX_UNIFORM_RATIOS, WEIGHTINGS)]
    plain = [("logit_normal", 0.1, weighting, False) for weighting in WEIGHTINGS]
    return shifted + plain + dice.choices(shifted + plain, k=NUM_FREE_CASES)


def write_cases(out: Path, dice: random.Random) -> int:
    """Writes the cases of `FlowMatchingPipeline.step` and says how many they are."""
    decks = Decks(dice)
    cases = [run_case(out, number, decks, decks.pipeline(*combination)) for number, combination in enumerate(grid(dice))]
    (out / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")
    return len(cases)


class Calls:
    """Calls of free functions: tensors by name, and one JSON entry each."""

    def __init__(self):
        self.tensors: dict[str, torch.Tensor] = {}
        self.entries: list[dict] = []

    def add(self, function: str, output: torch.Tensor, inputs: dict[str, str] | None = None, **arguments) -> None:
        name = f"{function}.{len(self.entries):03}"
        self.tensors[name] = output.clone().contiguous()
        self.entries.append({"function": function, "arguments": arguments, "inputs": inputs or {}, "output": name})

    def write(self, out: Path) -> None:
        save_file(self.tensors, out / "time_shift_utils.safetensors")
        (out / "time_shift_utils.json").write_text(json.dumps(self.entries, indent=1) + "\n")


def add_time_shifts(calls: Calls, generator: torch.Generator) -> None:
    """`time_shift` with its defaults and with others, over t in [0, 1] with both ends, in two kinds."""
    grid_of_t = torch.cat([torch.linspace(0, 1, 33), torch.tensor([1e-7, 1e-5, 1 - 1e-6]), torch.rand(64, generator=generator)])
    calls.tensors["t.float32"], calls.tensors["t.float64"] = grid_of_t, grid_of_t.double()
    shapes = [{}, {"base_shift": 0.25, "max_shift": 1.75, "constant": 2.23}]
    for kind, shift_type in itertools.product(["t.float32", "t.float64"], ["linear", "sqrt", "constant", "none of these"]):
        for image_seq_len, shape in itertools.product([1, 256, 1820, 1821, 4096, 16384, 32760], shapes):
            output = time_shift_utils.time_shift(calls.tensors[kind], image_seq_len, shift_type, **shape)
            calls.add("time_shift", output, {"t": kind}, image_seq_len=image_seq_len, shift_type=shift_type, **shape)


def add_densities(calls: Calls, dice: random.Random) -> None:
    """`compute_density_for_timestep_sampling`: every scheme, an unknown one, sizes on both sides of PyTorch's vectorized path."""
    shapes = [{}, {"logit_mean": 0.5, "logit_std": 0.75, "mode_scale": 0.8}]
    for scheme, batch_size, shape in itertools.product(["uniform", "logit_normal", "mode", "none of these"], [1, 7, 64], shapes):
        seed = dice.getrandbits(32)
        torch.manual_seed(seed)
        output = time_shift_utils.compute_density_for_timestep_sampling(scheme, batch_size, **shape)
        calls.add("compute_density_for_timestep_sampling", output, seed=seed, weighting_scheme=scheme, batch_size=batch_size, **shape)


def add_weights(calls: Calls, generator: torch.Generator) -> None:
    """`get_flow_match_loss_weight` over sigma in [0, 1], and the tables of the scheme "bsmntw"."""
    calls.tensors["sigma"] = torch.cat([torch.linspace(0, 1, 33), torch.rand(64, generator=generator)])
    calls.add("get_flow_match_loss_weight", time_shift_utils.get_flow_match_loss_weight(calls.tensors["sigma"]), {"sigma": "sigma"})
    for shift in [0.0, 1.0, 2.23]:
        output = time_shift_utils.get_flow_match_loss_weight(calls.tensors["sigma"], shift)
        calls.add("get_flow_match_loss_weight", output, {"sigma": "sigma"}, shift=shift)
    for num_train_timesteps in [10, 1000]:
        pipeline = FlowMatchingPipeline(SimpleAdapter(), num_train_timesteps, loss_weighting_scheme="bsmntw")
        calls.add("bsmntw_table", pipeline._bsmntw_weights, num_train_timesteps=num_train_timesteps)


def add_betas(calls: Calls, dice: random.Random) -> None:
    """Draws of torch's own Beta, which later versions of the package use; 0.5.0 has no such sampling."""
    for alpha, beta, batch_size in itertools.product([2.5, 1.0], [1.5, 0.5], [1, 5, 64]):
        seed = dice.getrandbits(32)
        torch.manual_seed(seed)
        output = torch.distributions.Beta(alpha, beta).sample((batch_size,))
        calls.add("beta", output, seed=seed, alpha=alpha, beta=beta, batch_size=batch_size)


def write_calls(out: Path, dice: random.Random) -> int:
    """Writes the calls of free functions and says how many they are."""
    calls = Calls()
    generator = torch.Generator().manual_seed(dice.getrandbits(32))
    add_time_shifts(calls, generator)
    add_densities(calls, dice)
    add_weights(calls, generator)
    add_betas(calls, dice)
    calls.write(out)
    return len(calls.entries)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes cases computed by NeMo AutoModel 0.5.0.")
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    dice = random.Random(arguments.seed)
    num_cases, num_calls = write_cases(arguments.out, dice), write_calls(arguments.out, dice)
    print(f"seed {arguments.seed}: {num_cases} cases of step, {num_calls} calls of free functions")


if __name__ == "__main__":
    main()
