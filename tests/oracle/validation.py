"""The losses of a validation by NeMo AutoModel's flow matching and the demo's transformer in plain PyTorch.

    validation.py CHECKPOINT.safetensors DRAWS.safetensors OUT.json ARGUMENTS.json

DRAWS has latents, texts and noise of all samples, and the numbers of training: its noise, sigmas and dropped texts.
ARGUMENTS has `sigmas`, the shape of the model, `pipeline` and `batch`, the samples of a batch.
"""

import json
import sys

import torch
from nemo_automodel.components.flow_matching.adapters import SimpleAdapter
from nemo_automodel.components.flow_matching.pipeline import FlowMatchingPipeline
from safetensors.torch import load_file

from dit import Dit


def losses(pipeline, model, latents, text, noise, sigma):
    """Mean weighted and unweighted loss of a batch."""
    shape = (-1, *[1] * (latents.dim() - 1))
    noisy = (1 - sigma.view(shape)) * latents + sigma.view(shape) * noise
    (prediction,) = model(noisy, sigma * pipeline.num_train_timesteps, text, None, False)
    _, weighted, _, unweighted, _, _ = pipeline.compute_loss(prediction, noise - latents, sigma, {})
    return weighted.item(), unweighted.item()


def val_loss(batches):
    """NeMo AutoModel 0.7.0's `_run_validation_epoch`: each batch's mean weighted loss, weighted by its samples, over all samples."""
    total, samples = 0.0, 0
    for weighted, size in batches:
        total += weighted * size
        samples += size
    return total / samples


def main(checkpoint, draws, out, arguments):
    torch.set_num_threads(1)
    with open(arguments) as file:
        arguments = json.load(file)
    model = Dit(load_file(checkpoint), arguments["depth"], arguments["heads"], arguments["patch"])
    pipeline = FlowMatchingPipeline(SimpleAdapter(), device=torch.device("cpu"), **arguments["pipeline"])
    numbers = load_file(draws)
    latents, text, noise = (numbers[name].float() for name in ["latents", "text", "noise"])
    with torch.no_grad():
        by_sigma = [losses(pipeline, model, latents, text, noise, torch.full((len(latents),), sigma))[1] for sigma in arguments["sigmas"]]
        # A dropped text is zeros.
        kept = torch.where(numbers["training.drop"].view(-1, 1, 1).bool(), torch.zeros(()), text)
        batches = []
        for first in range(0, len(latents), arguments["batch"]):
            part = slice(first, first + arguments["batch"])
            sigma = numbers["training.sigma"][part]
            weighted, _ = losses(pipeline, model, latents[part], kept[part], numbers["training.noise"][part], sigma)
            batches.append((weighted, len(sigma)))
    with open(out, "w") as file:
        json.dump({"by_sigma": by_sigma, "val_loss": val_loss(batches)}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
