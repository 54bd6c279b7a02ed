"""Caches of other trainers, small and random, and what their own readers make of them.

    python caches.py FOLDER

Writes FOLDER/nemo/<family> as NeMo AutoModel's tools do (torch.save), FOLDER/musubi/<family> as musubi-tuner and
FOLDER/ai-toolkit/<family> as ai-toolkit do, and beside each <family>.safetensors with the batch of all its samples: that of NeMo by NeMo's own
dataset and collate, the others stacked here.
Needs torch 2.13.0, safetensors 0.8.0 and nemo_automodel 0.5.0.
"""

import json
import sys
import types
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
