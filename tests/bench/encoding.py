"""Encoding pictures for FLUX.1 beside the loop of NeMo AutoModel's preprocessor.

    tests/bench/encoding.py [--pictures N] [--side PIXELS] [--pairs N] [--program PATH]

Makes random photographs with captions and a pipeline under target/bench/encoding: FLUX.1's own autoencoder and CLIP, and a T5 of 8 layers and width
512 in place of XXL's 24 and 4096, all of random weights. Then in turns encodes them by a loop as NeMo AutoModel 0.7.0's flux processor has it (one
picture at a time: Pillow, LANCZOS, centre crop; `vae.encode(...).latent_dist.sample()`; `encode_prompt`; `torch.save`) and by `fm-dist data encode`,
each as a new process with one thread. Of either side the seconds for one picture are taken off, which are its start and the reading of weights.
Prints pictures per second of each pair, their medians, and the median ratio. Needs the Python of `launch/setup.sh --oracle`.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "target/bench/encoding"
GOAL = 0.95
WORDS = "a small red house beside quiet lake at dawn with mountains behind it and two people walking in the rain under green door".split()


def make(pictures: int, side: int) -> None:
    """The pipeline, and folders `pictures` and `one`."""
    import numpy as np
    import torch
    import transformers
    from diffusers import AutoencoderKL
    from PIL import Image

    sys.path.insert(0, str(ROOT / "tests/oracle"))
    from family_pipelines import clip_tokenizer, t5_tokenizer

    pipeline = PLACE / "pipeline"
    if not pipeline.exists():
        torch.manual_seed(0)
        unfinished = PLACE / "unfinished"
        blocks = 4
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        clip, t5 = clip_tokenizer(), t5_tokenizer(transformers.T5Tokenizer)
        small = transformers.T5Config(vocab_size=len(t5), d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=8, feed_forward_proj="gated-gelu")
        large = transformers.CLIPTextConfig(vocab_size=len(clip), hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        parts = {"vae": vae, "text_encoder": transformers.CLIPTextModel(large), "text_encoder_2": transformers.T5EncoderModel(small)}
        for name, part in {**parts, "tokenizer": clip, "tokenizer_2": t5}.items():
            part.save_pretrained(unfinished / name)
        unfinished.rename(pipeline)
    dice = np.random.default_rng(0)
    for folder, count in (("pictures", pictures), ("one", 1)):
        folder = PLACE / folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for number in range(count):
            coarse = dice.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((side * 3 // 2, side * 5 // 4), Image.Resampling.BICUBIC).save(folder / f"{number:04}.png")
            (folder / f"{number:04}.txt").write_text(" ".join(dice.choice(WORDS, 12)))


def loop(pictures: Path, out: Path, side: int) -> None:
    """The peer, in a process of its own."""
    import torch
    import transformers
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from PIL import Image

    parts = PLACE / "pipeline"
    vae = AutoencoderKL.from_pretrained(parts / "vae").eval()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=None,
        text_encoder=transformers.CLIPTextModel.from_pretrained(parts / "text_encoder").eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        text_encoder_2=transformers.T5EncoderModel.from_pretrained(parts / "text_encoder_2").eval(),
        tokenizer_2=transformers.T5Tokenizer.from_pretrained(parts / "tokenizer_2"),
    )
    out.mkdir(parents=True)
    with torch.no_grad():
        for path in sorted(pictures.glob("*.png")):
            picture = Image.open(path).convert("RGB")
            scale = max(side / picture.width, side / picture.height)
            picture = picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.Resampling.LANCZOS)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)[None] / 127.5 - 1
            latent = (vae.encode(pixels).latent_dist.sample() - vae.config.shift_factor) * vae.config.scaling_factor
            states, pooled, _ = pipeline.encode_prompt(path.with_suffix(".txt").read_text(), prompt_2=None)
            sample = {"latent": latent[0].half(), "prompt_embeds": states.bfloat16(), "pooled_prompt_embeds": pooled.bfloat16()}
            torch.save(sample, out / f"{path.stem}.pt")


def seconds(command: list) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.monotonic() - began


def rate(command, pictures: int) -> float:
    """Pictures per second of a side, whose command for a folder `command` makes."""
    times = []
    for folder in ("pictures", "one"):
        out = PLACE / "out"
        for left in (out, out.with_name("out.encoded")):
            shutil.rmtree(left, ignore_errors=True)
        times.append(seconds(command(PLACE / folder, out)))
    return (pictures - 1) / (times[0] - times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--program", default=str(ROOT / "target/release/fm-dist"))
    parser.add_argument("--loop", nargs=2, type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.loop:
        return loop(*chosen.loop, chosen.side)
    make(chosen.pictures, chosen.side)
    size = f"{chosen.side}x{chosen.side}"
    peer = lambda folder, out: [sys.executable, __file__, "--side", str(chosen.side), "--loop", folder, out]
    encode = [chosen.program, "data", "encode", "--family", "flux", "--pipeline", PLACE / "pipeline", "--size", size]
    own = lambda folder, out: [*encode, folder, "--out", out]
    print(f"{chosen.pictures} pictures of {size}, one thread; {chosen.program}, {os.cpu_count()} cores")
    pairs = []
    for number in range(chosen.pairs):
        load = os.getloadavg()[0]
        pairs.append((rate(peer, chosen.pictures), rate(own, chosen.pictures)))
        print(f"pair {number + 1}: the loop {pairs[-1][0]:.3f} and fm-dist {pairs[-1][1]:.3f} pictures a second, load {load:.1f}")
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    ratio = statistics.median(own / peer for peer, own in pairs)
    print(f"medians {medians[0]:.3f} and {medians[1]:.3f}; fm-dist over the loop {ratio:.2f}, at least {GOAL} is the goal")


if __name__ == "__main__":
    main()
