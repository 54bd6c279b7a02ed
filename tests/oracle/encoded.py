"""configs/encode_flux1.py on made-up pictures, with a tiny random VAE and made-up text encoders in place of FLUX.1's.

    python encoded.py ROOT

Makes ROOT/pictures, encodes them into ROOT/data as squares of 64 pixels, and writes ROOT/expected.safetensors: the latents that
diffusers' own image processor and VAE give for the same squares.
"""

import runpy
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import save_file

from sampling import stand_in_for_text_encoders

SIDE, NUM_PICTURES = 64, 5


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = 4
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


class Pipeline:
    """What the script takes of FluxPipeline."""

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae

    def to(self, _device: str) -> "Pipeline":
        return self

    def encode_prompt(self, prompt: str, prompt_2: str | None) -> tuple[torch.Tensor, torch.Tensor, None]:
        """A batch of one, as the pipeline gives for one text; T5 pads to one length."""
        generator = torch.Generator().manual_seed(len(prompt))
        return torch.randn(1, 12, 24, generator=generator), torch.randn(1, 16, generator=generator), None


def make_pictures(folder: Path) -> list[Image.Image]:
    """Pictures of all kinds with their captions. Returns the squares that must be encoded, in the order of their names."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    squares = []
    for index in range(NUM_PICTURES):
        square = Image.frombytes("RGB", (SIDE, SIDE), torch.randint(256, (SIDE * SIDE * 3,), generator=generator).byte().numpy().tobytes())
        # Wider or taller by a border that is cropped away; the size within is the one wanted, so that nothing is scaled.
        width, height = (SIDE + 20, SIDE) if index % 2 else (SIDE, SIDE + 8)
        picture = Image.new("RGB", (width, height), "red")
        picture.paste(square, ((width - SIDE) // 2, (height - SIDE) // 2))
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a cat" + "!" * index + "\n")
        squares.append(square)
    return squares


def main() -> None:
    root = Path(sys.argv[1])
    squares, vae = make_pictures(root / "pictures"), tiny_vae()
    stand_in_for_text_encoders()
    from diffusers import FluxPipeline

    FluxPipeline.from_pretrained = classmethod(lambda *_arguments, **_more: Pipeline(vae))
    sys.argv = ["encode_flux1.py", str(root / "pictures"), str(root / "data"), "--side", str(SIDE), "--device", "cpu"]
    runpy.run_path(str(Path(__file__).parents[2] / "configs/encode_flux1.py"), run_name="__main__")

    with torch.no_grad():
        pixels = VaeImageProcessor(vae_scale_factor=8).preprocess(squares)
        codes = vae.encode(pixels).latent_dist.mode()
    expected = (codes - vae.config.shift_factor) * vae.config.scaling_factor
    save_file({"image_latents": expected.contiguous()}, root / "expected.safetensors")


if __name__ == "__main__":
    main()
