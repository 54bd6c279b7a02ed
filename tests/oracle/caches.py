"""Caches of other trainers, small and random, and what their own readers make of them.

    python caches.py FOLDER

Writes FOLDER/<trainer>/<family> as NeMo AutoModel's tools (torch.save), musubi-tuner and ai-toolkit (safetensors), diffusion-pipe (torch.save in
shards that a database of sqlite3 lists) and SimpleTuner (torch.save, perhaps through gzip) do, and beside each <family>.safetensors with the batch
of all its samples: that of NeMo by NeMo's own dataset and collate, the others stacked here.
Needs torch 2.13.0, safetensors 0.8.0 and nemo_automodel 0.5.0.
"""

import gzip
import hashlib
import io
import json
import os
import sqlite3
import sys
import types
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file

# NeMo's module of collate functions imports a loader that none of them uses.
loader = types.ModuleType("torchdata.stateful_dataloader")
loader.StatefulDataLoader = object
sys.modules.update({"torchdata": types.ModuleType("torchdata"), "torchdata.stateful_dataloader": loader})
from nemo_automodel.components.datasets.diffusion.collate_fns import collate_fn_text_to_image, collate_fn_video  # noqa: E402
from nemo_automodel.components.datasets.diffusion.text_to_image_dataset import TextToImageDataset  # noqa: E402
from nemo_automodel.components.datasets.diffusion.text_to_video_dataset import TextToVideoDataset  # noqa: E402

SAMPLES = 8
LENGTHS = [5, 9, 1, 12, 3, 8, 2, 7]
HALF, BRAIN = torch.float16, torch.bfloat16


def random(shape, dtype):
    return torch.randn(shape).to(dtype)


def nemo_tensors(family, index):
    match family:
        case "flux":
            return {
                "latent": random([4, 8, 12], HALF),
                "prompt_embeds": random([1, 8, 12], BRAIN),
                "pooled_prompt_embeds": random([1, 10], BRAIN),
                "clip_hidden": random([1, 5, 10], BRAIN),
                "clip_tokens": torch.arange(5)[None],
                "t5_tokens": torch.arange(5)[None],
            }
        case "flux2":
            return {"latent": random([16, 4, 6], HALF), "prompt_embeds": random([8, 12], HALF)}
        case "qwen_image":
            return {"latent": random([4, 8, 12], HALF), "prompt_embeds": random([1, LENGTHS[index], 12], BRAIN)}
        case "wan":
            return {
                "video_latents": random([1, 4, 3, 4, 6], HALF),
                "text_embeddings": random([1, 5, 12], BRAIN),
                "first_frame": torch.zeros(32, 48, 3, dtype=torch.uint8),
            }
        case "hunyuanvideo":
            return {
                "video_latents": random([1, 4, 3, 4, 6], HALF),
                "text_embeddings": random([1, 5, 12], HALF),
                "text_mask": torch.ones(1, 5, dtype=HALF),
                "text_embeddings_2": random([1, 3, 10], HALF),
                "text_mask_2": torch.tensor([[1, 1, 0]], dtype=HALF),
                "image_embeds": random([1, 7, 8], HALF),
            }


def nemo(folder, family):
    """As tools/diffusion/preprocessing_multiprocess.py: one file a sample, two shards of metadata."""
    is_image = family in ("flux", "flux2", "qwen_image")
    rows = []
    (folder / "96x64").mkdir(parents=True)
    for index in range(SAMPLES):
        path = folder / "96x64" / (f"{index:032x}" + (".pt" if is_image else ".meta"))
        source = f"/pictures/{index}." + ("png" if is_image else "mp4")
        kind = {"image_path" if is_image else "video_path": source}
        about = {"prompt": f"caption {index}", "model_type": family, "original_resolution": (96, 64), "bucket_resolution": (96, 64)}
        further = {"crop_offset": (0, 8), "bucket_id": None, "aspect_ratio": 1.5}
        torch.save({**nemo_tensors(family, index), **about, **kind, **further}, path)
        rows.append({**about, **kind, "cache_file": str(path.resolve()), "bucket_id": None, "aspect_ratio": 1.5, "pixels": 96 * 64})
    shards = [rows[:5], rows[5:]]
    names = [f"metadata_shard_{number:04}.json" for number in range(2)]
    for name, shard in zip(names, shards, strict=True):
        (folder / name).write_text(json.dumps(shard))
    top = {"processor": family, "model_name": "random", "model_type": family, "total_items": SAMPLES, "num_shards": 2, "shards": names}
    (folder / "metadata.json").write_text(json.dumps(top))
    dataset = (TextToImageDataset if is_image else TextToVideoDataset)(str(folder))
    batch = (collate_fn_text_to_image if is_image else collate_fn_video)([dataset[index] for index in range(SAMPLES)])
    keep(folder.parent / f"{family}.safetensors", {key: value for key, value in batch.items() if torch.is_tensor(value) and key != "clip_hidden"})


def musubi(folder, family):
    """As dataset/image_video_dataset.py: safetensors without an axis of samples, latents and texts apart."""
    folder.mkdir(parents=True)
    samples = []
    for index in range(SAMPLES):
        length, piece = LENGTHS[index], ""
        match family:
            case "wan":
                latents, piece = random([4, 3, 4, 6], torch.float32), "_00000-009"
                image, clip, text = random([8, 3, 4, 6], BRAIN), random([7, 8], HALF), random([length, 12], BRAIN)
                stored = {"latents_3x4x6_float32": latents, "latents_image_3x4x6_bfloat16": image, "clip_float16": clip}
                texts = {"varlen_t5_bfloat16": text}
                expected = {"video_latents": latents, "condition_latents": image, "image_embeds": clip, "text_embeddings": text}
                word = "wan"
            case "flux2":
                latents, text, word = random([16, 4, 6], BRAIN), random([8, 12], BRAIN), "f2d"
                stored, texts = {"latents_4x6_bfloat16": latents}, {"ctx_vec_bfloat16": text}
                expected = {"image_latents": latents, "text_embeddings": text}
            case "qwen_image":
                latents, text, word = random([4, 1, 8, 12], BRAIN), random([length, 12], BRAIN), "qi"
                stored, texts = {"latents_1x8x12_bfloat16": latents}, {"varlen_vl_embed_bfloat16": text}
                expected = {"image_latents": latents[:, 0], "text_embeddings": text}
            case "hunyuanvideo":
                latents, piece, word = random([4, 3, 4, 6], HALF), "_00000-009", "hv15"
                # No text in quotes gives no glyphs.
                text, glyphs = random([length, 12], BRAIN), random([index % 3, 10], BRAIN)
                image, siglip = random([4, 1, 4, 6], HALF), random([7, 8], HALF)
                stored = {"latents_3x4x6_float16": latents, "latents_image_1x4x6_float16": image, "siglip_float16": siglip}
                texts = {"varlen_vl_embed_bfloat16": text, "varlen_byt5_embed_bfloat16": glyphs}
                scaled = (latents.float() * 1.03682).to(HALF)
                expected = {"video_latents": scaled, "text_embeddings": text, "text_embeddings_2": glyphs, "image_embeds": siglip}
        about = {"architecture": family, "format_version": "1.0.1", "caption1": f"caption {index}"}
        save_file(stored, folder / f"a_b{index}{piece}_0096x0064_{word}.safetensors", about)
        save_file(texts, folder / f"a_b{index}_{word}_te.safetensors", about)
        samples.append(expected)
    keep(folder.parent / f"{family}.safetensors", {key: padded([sample[key] for sample in samples]) for key in samples[0]})


def ai_toolkit(folder, family):
    """As LatentCachingFileItemDTOMixin and PromptEmbeds.save: one folder a kind beside the pictures, names end with a hash."""
    for name in ("_latent_cache", "_t_e_cache"):
        (folder / name).mkdir(parents=True)
    samples = []
    for index in range(SAMPLES):
        length = LENGTHS[index]
        match family:
            case "flux":
                text, pooled = random([1, 8, 12], BRAIN), random([1, 10], BRAIN)
                latents, texts = random([4, 8, 12], BRAIN), {"text_embed": text, "pooled_embed": pooled}
                expected = {"image_latents": latents, "text_embeddings": text[0], "pooled_prompt_embeds": pooled[0]}
            case "qwen_image":
                latents, text = random([4, 8, 12], BRAIN), random([1, 16, 12], BRAIN)
                texts = {"text_embed": text, "attention_mask": (torch.arange(16) < length)[None].long()}
                expected = {"image_latents": latents, "text_embeddings": text[0, :length]}
            case "wan":
                latents, text = random([4, 3, 4, 6], BRAIN), random([1, 5, 12], BRAIN)
                texts, expected = {"text_embed_0": text}, {"video_latents": latents, "text_embeddings": text[0]}
        save_file({"latent": latents}, folder / "_latent_cache" / f"a_b{index}_{'_-'.ljust(22, 'x')}.safetensors", {"filename": "x"})
        save_file(texts, folder / "_t_e_cache" / f"a_b{index}_{'y' * 22}.safetensors")
        (folder / f"a_b{index}.txt").write_text(f"caption {index}\n")
        samples.append(expected)
    keep(folder.parent / f"{family}.safetensors", {key: padded([sample[key] for sample in samples]) for key in samples[0]})


class Records:
    """As diffusion-pipe's utils/cache.py: records of torch.save one after another in shards, which tables of a database list."""

    def __init__(self, folder):
        folder.mkdir(parents=True)
        self.folder, self.count = folder, 0
        self.database = sqlite3.connect(folder / "metadata.db")
        self.database.execute("CREATE TABLE fingerprint(value)")
        self.database.execute("INSERT INTO fingerprint VALUES('a fingerprint')")
        self.database.execute("CREATE TABLE items(shard, shard_index)")

    def add(self, record):
        shard, index = divmod(self.count, 3)
        path = self.folder / f"shard_{shard}.bin"
        if index == 0:
            path.touch()
            self.database.execute(f"CREATE TABLE shard_{shard}(offset, size)")
        stored = io.BytesIO()
        torch.save(record, stored)
        self.database.execute(f"INSERT INTO shard_{shard} VALUES(?, ?)", (path.stat().st_size, len(stored.getvalue())))
        with path.open("ab") as file:
            file.write(stored.getvalue())
        self.database.execute("INSERT INTO items VALUES(?, ?)", (shard, index))
        self.count += 1

    def close(self, since=None):
        self.database.commit()
        self.database.close()
        for path in self.folder.glob("*.bin"):
            os.utime(path, (since.timestamp(), since.timestamp()) if since else None)


# Folders of the models of diffusion-pipe, by what is tested.
PIPES = {
    "flux": "flux",
    "flux2": "flux2_klein_4b",
    "flux2_raw": "flux2",
    "qwen_image": "qwen_image",
    "wan": "wan",
    "wan_i2v": "wan_i2v",
    "hunyuanvideo": "hunyuan_video_1.5",
    "hunyuanvideo_old": "hunyuan_video_1.5",
}


def diffusion_pipe(folder, name):
    """As utils/dataset.py and models/: latents in one order, texts in another, both with the picture that they are of; two captions a picture of
    Qwen-Image; sizes are given for HunyuanVideo 1.5, which has no aspect ratios then."""
    family = name.removesuffix("_old").removesuffix("_raw")
    cache = folder / "pictures" / "cache" / PIPES[name]
    sized = family == "hunyuanvideo"
    of_size = cache / ("cache_96x64x9" if sized else "cache_1.500x96x64x1")
    of_texts = of_size if sized else cache / "ar_frames_1.500_1"
    encoders = [Records(of_texts / f"text_embeddings_{encoder}") for encoder in ([1, 2] if family == "flux" else [1])]
    latents = Records(of_size / "latents")
    captions_each = 2 if family == "qwen_image" else 1
    samples, texts = [], []
    for index in range(SAMPLES):
        length = LENGTHS[index]
        if index % captions_each == 0:
            spec = [None, f"/pictures/{index}.png"]
            about = {"image_spec": spec, "caption": [f"caption {index + number}" for number in range(captions_each)], "mask": None}
            match family:
                case "flux":
                    # Every third picture has no mask.
                    about["mask"] = torch.rand(64, 96).to(HALF) if index % 3 else None
                    tensors = {"latents": random([4, 8, 12], BRAIN)}
                case "flux2":
                    tensors = {"latents": random([16, 4, 6], BRAIN) * (1.78 if name.endswith("_raw") else 1)}
                case "qwen_image":
                    tensors = {"latents": random([4, 1, 8, 12], BRAIN)}
                case "wan":
                    tensors = {"latents": random([4, 3, 4, 6], BRAIN)}
                case "wan_i2v":
                    shapes = {"latents": [4, 3, 4, 6], "y": [4, 3, 4, 6], "clip_context": [7, 8]}
                    tensors = {key: random(shape, BRAIN) for key, shape in shapes.items()}
                case "hunyuanvideo":
                    tensors = {"latents": random([4, 3, 4, 6], BRAIN)}
            latents.add({**tensors, **about})
        match family:
            case "flux":
                clip, t5 = random([10], BRAIN), random([8, 12], BRAIN)
                embeds = [{"clip_embed": clip}, {"t5_embed": t5}]
                mask = torch.ones(8, 12, dtype=HALF)
                if about["mask"] is not None:
                    mask = torch.nn.functional.interpolate(about["mask"][None, None], size=(8, 12), mode="nearest-exact")[0, 0]
                expected = {"image_latents": tensors["latents"], "text_embeddings": t5, "pooled_prompt_embeds": clip, "loss_mask": mask}
            case "flux2":
                text = random([8, 12], BRAIN)
                embeds = [{"text_embeds_0": text, "attention_mask_0": torch.ones(8, dtype=torch.int64)}]
                expected = {"image_latents": tensors["latents"], "text_embeddings": text}
            case "qwen_image":
                text = random([length, 12], BRAIN)
                embeds, expected = [{"prompt_embeds": text}], {"image_latents": tensors["latents"][:, 0], "text_embeddings": text}
            case "wan" | "wan_i2v":
                text = random([16, 12], BRAIN)
                embeds = [{"text_embeddings": text, "seq_lens": torch.tensor(length)}]
                expected = {"video_latents": tensors["latents"], "text_embeddings": text[:length]}
                if family == "wan_i2v":
                    known = torch.zeros(4, 3, 4, 6, dtype=BRAIN)
                    known[:, 0] = 1
                    expected |= {"condition_latents": torch.cat([known, tensors["y"]]), "image_embeds": tensors["clip_context"]}
            case "hunyuanvideo":
                # No text in quotes gives no glyphs.
                text, glyphs = random([length, 12], BRAIN), random([index % 3, 10], BRAIN)
                seen, drawn = torch.ones(length, dtype=torch.bool), torch.ones(len(glyphs), dtype=torch.bool)
                embeds = [{"text_embeds": text, "attention_mask": seen, "byt5_embeds": glyphs, "byt5_attention_mask": drawn}]
                scaled = (tensors["latents"].float() * 1.03682).to(BRAIN) if name.endswith("_old") else tensors["latents"]
                expected = {"video_latents": scaled, "text_embeddings": text, "text_embeddings_2": glyphs}
        texts.append((spec, embeds))
        samples.append(expected)
    # Another order of pictures; the captions of one stay in theirs.
    for spec, embeds in sorted(texts, key=lambda text: text[0][1], reverse=True):
        for encoder, embed in zip(encoders, embeds, strict=True):
            encoder.add({**embed, "image_spec": spec})
    for records in [*encoders, latents]:
        records.close(datetime(2026, 8, 1, tzinfo=UTC) if name.endswith("_old") else None)
    keep(folder.parent / f"{name}.safetensors", {key: padded([sample[key] for sample in samples]) for key in samples[0]})


def stored(path, value, compressed):
    """As data_backend/base.py: torch.save, perhaps through gzip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = io.BytesIO()
    torch.save(value, plain)
    path.write_bytes(gzip.compress(plain.getvalue()) if compressed else plain.getvalue())


def simpletuner(folder, family):
    """As caching/vae.py and caching/text_embeds.py: latents named by their picture or its hash, texts by the MD5 of their caption, and the list of
    pictures beside those; captions are files beside the pictures, or the pictures' names."""
    pictures, hashed, compressed = folder / "pictures", family != "wan", family in ("flux", "hunyuanvideo")
    pictures.mkdir(parents=True)
    by_name = family == "flux2"
    samples, listed = [], []
    stored(folder / "text" / f"{hashlib.md5(b'').hexdigest()}-{family}.pt", {"prompt_embeds": random([1, 1, 12], BRAIN)}, compressed)
    for index in range(SAMPLES):
        length, caption = LENGTHS[index], f"caption {index}"
        picture = pictures / (f"caption_{index}.png" if by_name else f"p.{index}.png")
        picture.touch()
        # The folder was moved since.
        listed.append(f"/gone/pictures/{picture.name}")
        if not by_name:
            picture.with_suffix(".txt").write_text(caption)
        mask = (torch.arange(16) < length)[None].long()
        text = random([1, 16, 12], BRAIN)
        match family:
            case "flux":
                latents, pooled = random([4, 8, 12], BRAIN), random([10], BRAIN)
                texts = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "time_ids": torch.zeros(16, 3), "attention_masks": mask}
                expected = {"image_latents": latents, "text_embeddings": text[0], "pooled_prompt_embeds": pooled, "text_mask": mask[0]}
            case "flux2":
                latents, texts = random([16, 4, 6], BRAIN), {"prompt_embeds": text, "attention_mask": torch.ones(1, 16, dtype=torch.int64)}
                expected = {"image_latents": latents, "text_embeddings": text[0]}
            case "qwen_image":
                latents, texts = random([4, 8, 12], BRAIN), {"prompt_embeds": text, "attention_masks": mask}
                expected = {"image_latents": latents, "text_embeddings": text[0, :length]}
            case "wan":
                latents, texts = random([4, 3, 4, 6], torch.float32), {"prompt_embeds": text, "attention_masks": mask}
                expected = {"video_latents": latents, "text_embeddings": text[0]}
            case "hunyuanvideo":
                latents, glyphs = random([4, 3, 4, 6], HALF), random([1, 3, 10], BRAIN)
                drawn = (torch.arange(3) < index % 3)[None].long()
                texts = {"prompt_embeds": text, "prompt_attention_mask": mask, "prompt_embeds_2": glyphs, "prompt_attention_mask_2": drawn}
                expected = {"video_latents": latents, "text_embeddings": text[0, :length], "text_embeddings_2": glyphs[0, : index % 3]}
        stem = hashlib.sha256(picture.stem.encode()).hexdigest() if hashed else picture.stem
        stored(folder / "vae" / f"{stem}.pt", {"latents": latents} if family == "wan" else latents, compressed)
        stored(folder / "text" / f"{hashlib.md5(caption.encode()).hexdigest()}-{family}.pt", texts, compressed)
        samples.append(expected)
    buckets = {"config": {"caption_strategy": "filename" if by_name else "textfile"}, "aspect_ratio_bucket_indices": {"1.5": listed}}
    (pictures / "aspect_ratio_bucket_indices_p.json").write_text(json.dumps(buckets))
    keep(folder.parent / f"{family}.safetensors", {key: padded([sample[key] for sample in samples]) for key in samples[0]})


def padded(tensors):
    longest = max(len(tensor) for tensor in tensors)
    if any(len(tensor) != longest for tensor in tensors):
        longest = -(-longest // 8) * 8
        tensors = [torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])]) for tensor in tensors]
    return torch.stack(tensors)


def keep(path, tensors):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


root = Path(sys.argv[1])
torch.manual_seed(7)
for family in ("flux", "flux2", "qwen_image", "wan", "hunyuanvideo"):
    nemo(root / "nemo" / family, family)
for family in ("flux2", "qwen_image", "wan", "hunyuanvideo"):
    musubi(root / "musubi" / family, family)
for family in ("flux", "qwen_image", "wan"):
    ai_toolkit(root / "ai-toolkit" / family, family)
for name in PIPES:
    diffusion_pipe(root / "diffusion-pipe" / name, name)
for family in ("flux", "flux2", "qwen_image", "wan", "hunyuanvideo"):
    simpletuner(root / "simpletuner" / family, family)
