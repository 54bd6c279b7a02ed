"""Encodes pictures and captions as a dataset for FLUX.1.

    python configs/encode_flux1.py PICTURES OUT [--side 1024] [--device cuda] [--pipeline FOLDER_OR_NAME]

PICTURES holds *.png, *.jpg or *.webp, each with its caption in a .txt beside it (cat.png, cat.txt). Pictures are cropped to a
square around their centre and scaled to SIDE x SIDE pixels. The captions of the first four also become the conditions that
`fm-dist sample` generates from, and the empty prompt is encoded for `cfg_dropout_value = "empty_prompt"`.

Needs diffusers, transformers, sentencepiece, protobuf, Pillow, and the pipeline's VAE and text encoders: a folder, or a name on
the Hugging Face hub (FLUX.1-dev asks you to accept its licence and to log in). All samples are held in host memory.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image, ImageOps
from safetensors.torch import save_file

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp"]
NUM_CONDITIONS = 4


def text(pipe: FluxPipeline, prompt: str) -> dict[str, torch.Tensor]:
    """`text_embeddings` [512, 4096] of T5 and `pooled_prompt_embeds` [768] of CLIP."""
    tokens, pooled, _ = pipe.encode_prompt(prompt, prompt_2=None)
    return {"text_embeddings": tokens[0].cpu(), "pooled_prompt_embeds": pooled[0].cpu()}


def latents(pipe: FluxPipeline, path: Path, side: int) -> torch.Tensor:
    """Normalized latents [16, side / 8, side / 8]: the mode of the VAE's distribution, shifted and scaled as FLUX.1 expects."""
    picture = ImageOps.fit(ImageOps.exif_transpose(Image.open(path)).convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
    pixels = (pixels[None] / 127.5 - 1).to(pipe.vae.device, pipe.vae.dtype)
    codes = pipe.vae.encode(pixels).latent_dist.mode()
    return ((codes - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)[0].cpu()


def write(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Writes a safetensors file. Returns its name and hash, as dataset.json has them."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return {"path": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def stacked(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Encodes pictures and captions as a dataset for FLUX.1.")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, default=1024, help="side of the square pictures in pixels, a multiple of 16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pipeline", default="black-forest-labs/FLUX.1-dev")
    arguments = parser.parse_args()
    side, out = arguments.side, arguments.out

    paths = sorted(path for path in arguments.pictures.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"{arguments.pictures} holds no {', '.join(SUFFIXES)}")
    without = [path.name for path in paths if not path.with_suffix(".txt").is_file()]
    if without:
        parser.error(f"{len(without)} of {len(paths)} pictures have no caption in a .txt beside them, the first is {without[0]}")
    captions = [path.with_suffix(".txt").read_text().strip() for path in paths]
    pipe = FluxPipeline.from_pretrained(arguments.pipeline, transformer=None, torch_dtype=torch.bfloat16).to(arguments.device)

    samples = [{"image_latents": latents(pipe, path, side), **text(pipe, caption)} for path, caption in zip(paths, captions)]
    prompts = captions[:NUM_CONDITIONS]
    out.mkdir(parents=True, exist_ok=True)
    dataset = {
        "format": "fm-dist dataset",
        "version": 1,
        "name": out.name,
        "source": f"pictures of {arguments.pictures}",
        "licence": "not stated",
        "data_type": "image",
        "files": [
            {**write(out / "samples.safetensors", stacked(samples)), "samples": len(samples), "group": f"{side}x{side}"}
        ],
        "conditions": {
            **write(out / "conditions.safetensors", stacked([text(pipe, prompt) for prompt in prompts])),
            "names": prompts,
        },
        "empty_prompt": write(out / "empty.safetensors", text(pipe, "")),
    }
    (out / "dataset.json").write_text(json.dumps(dataset, indent=2) + "\n")


if __name__ == "__main__":
    main()
