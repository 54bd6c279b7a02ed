"""Encodes prompts and pixels with tiny random pipelines of all families, by diffusers 0.42.1, and writes what came out.

    python family_pipelines.py OUT_DIR SEED [--families flux,flux2_dev,...]

Needs torch 2.13.0, diffusers 0.42.1, transformers 5.24.0, tokenizers and safetensors; takes 30 s, most of it for imports. Of each family it
makes

<family>/pipeline/            vae, text_encoder, tokenizer, ... by `save_pretrained`
<family>/prompts.json         prompts; the last one is empty
<family>/prompts.safetensors  N.KEY: what the pipeline's own `encode_prompt` makes of prompt N, by the keys of NeMo's batches
<family>/pixels.safetensors   pixels, from -1 to 1; mean and std: of the VAE's posterior as NeMo's preprocessors call it; shift and scale, by
                              which they normalize it (FLUX.2: latents, already normalized); image_embeds where the pipeline has an image encoder
                              decoded: pixels of the normalized mean, as the pipeline decodes it
"""

import argparse
import json
import random
from pathlib import Path

import tokenizers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    HunyuanVideo15Pipeline,
    QwenImagePipeline,
    WanPipeline,
)
from safetensors.torch import save_file

CORPUS = [
    "a photograph of a small red house beside a quiet lake at dawn, with mountains behind it",
    'a shop sign that reads "OPEN" above a green door, in the rain; two people walk by',
    "You are a helpful assistant. Describe the video by detailing the following aspects: objects, style and atmosphere.",
    "Der schnelle braune Fuchs springt über den faulen Hund, 1234567890! 你好，世界",
]
PROMPTS = [
    "a red house",
    'a sign that reads "OPEN 24 h", and “您好” below; and "OPEN 24 h" again',
    "two people walk &amp; talk   in the\n rain, 世界",
    "a photograph of a small red house beside a quiet lake at dawn, " * 40,
    "",
]
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + message.content[0].text + '[/SYSTEM_PROMPT]' }}{% else %}{{ '[INST]' + message.content[0].text + '[/INST]' }}"
    "{% endif %}{% endfor %}"
)


def bytes_bpe(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=size, min_frequency=1, show_progress=False)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def qwen_tokenizer() -> transformers.PreTrainedTokenizerBase:
    vocab, merges = bytes_bpe(330)
    made = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.add_tokens(["<think>", "</think>"])
    made.chat_template = CHAT
    return made


def mistral_tokenizer() -> transformers.PreTrainedTokenizerBase:
    vocab, merges = bytes_bpe(330)
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "<pad>"]
    vocab = {token: index for index, token in enumerate(special)} | {token: index + len(special) for token, index in vocab.items()}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=model, padding_side="left", **named)
    made.chat_template = MISTRAL_CHAT
    return made


def t5_tokenizer(kind: type) -> transformers.PreTrainedTokenizerBase:
    trained = tokenizers.Tokenizer(tokenizers.models.Unigram())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=180, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    vocab = [tuple(entry) for entry in json.loads(trained.to_str())["model"]["vocab"]]
    return kind(vocab=vocab, extra_ids=0) if kind is transformers.T5Tokenizer else kind(vocab=vocab)


def clip_tokenizer() -> transformers.PreTrainedTokenizerBase:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    trained.normalizer = tokenizers.normalizers.Lowercase()
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Whitespace(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=620,
        end_of_word_suffix="</w>",
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"]
    for token in tokenizers.pre_tokenizers.ByteLevel.alphabet():
        vocab.setdefault(token + "</w>", len(vocab))
    made = transformers.CLIPTokenizer(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]])
    made.model_max_length = 77
    return made


def of_pictures(**more) -> dict:
    """Fields of the autoencoders of FLUX.1 and FLUX.2 at toy size."""
    levels = 4
    return {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    } | more


def t5(tokenizer, kind: type = transformers.T5EncoderModel, config: type = transformers.T5Config, width: int = 24) -> torch.nn.Module:
    fields = {"d_model": width, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3, "feed_forward_proj": "gated-gelu"}
    return kind(config(vocab_size=len(tokenizer), **fields))


def decoder_fields(tokenizer, layers: int) -> dict:
    return {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }


def qwen_vl(tokenizer) -> torch.nn.Module:
    text = decoder_fields(tokenizer, 4)
    del text["head_dim"]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
    config = transformers.Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def wan_vae(kind: type) -> torch.nn.Module:
    return kind(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])


class Made:
    """A family's pipeline, and how NeMo's preprocessor uses it."""

    # Key of latents' sizes: frames, height, width of the pixels; no frames for pictures.
    size: tuple[int, ...] = (32, 48)

    def parts(self) -> dict:
        """Folders of the pipeline by their names."""
        raise NotImplementedError

    def prompt(self, text: str) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def normalization(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


def scalar(shift: float, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(shift), torch.tensor(scale)


class Flux(Made):
    def __init__(self):
        tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer(transformers.T5Tokenizer)
        config = transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id,
        )
        self.vae = AutoencoderKL(**of_pictures(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False))
        self.named = {
            "vae": self.vae,
            "text_encoder": transformers.CLIPTextModel(config),
            "tokenizer": tokenizer,
            "text_encoder_2": t5(tokenizer_2),
            "tokenizer_2": tokenizer_2,
        }
        self.pipeline = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=None, **self.named)

    def prompt(self, text: str) -> dict[str, torch.Tensor]:
        states, pooled, _ = self.pipeline.encode_prompt(text, prompt_2=None)
        return {"text_embeddings": states[0], "pooled_prompt_embeds": pooled[0]}

    def normalization(self):
        return scalar(self.vae.config.shift_factor, self.vae.config.scaling_factor)


class Flux2(Made):
    def __init__(self):
        self.vae = AutoencoderKLFlux2(**of_pictures(latent_channels=8))
        self.vae.bn.running_mean.copy_(torch.randn_like(self.vae.bn.running_mean))
        self.vae.bn.running_var.copy_(torch.rand_like(self.vae.bn.running_var) + 0.5)
        self.named = {"vae": self.vae} | self.texts()
        self.pipeline = self.kind(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=None, **self.named)

    def prompt(self, text: str) -> dict[str, torch.Tensor]:
        states, _ = self.pipeline.encode_prompt(text)
        return {"text_embeddings": states[0]}


class Flux2Dev(Flux2):
    kind = Flux2Pipeline

    def texts(self) -> dict:
        tokenizer = mistral_tokenizer()
        text = transformers.MistralConfig(**decoder_fields(tokenizer, 31), rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e9}, sliding_window=None)
        vision = transformers.PixtralVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
        config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=7)
        return {"text_encoder": transformers.Mistral3ForConditionalGeneration(config), "tokenizer": tokenizer}


class Flux2Klein(Flux2):
    kind = Flux2KleinPipeline

    def texts(self) -> dict:
        tokenizer = qwen_tokenizer()
        config = transformers.Qwen3Config(**decoder_fields(tokenizer, 28), rope_parameters={"rope_type": "default", "rope_theta": 1e6})
        return {"text_encoder": transformers.Qwen3ForCausalLM(config), "tokenizer": tokenizer}


class OfLists(Made):
    """Families whose VAE has means and standard deviations as lists."""

    def normalization(self):
        mean, std = (torch.tensor(getattr(self.vae.config, name)).view(-1, 1, 1) for name in ["latents_mean", "latents_std"])
        if len(self.size) == 3:
            mean, std = mean.unsqueeze(1), std.unsqueeze(1)
        return mean, 1 / std


class QwenImage(OfLists):
    def __init__(self):
        tokenizer = qwen_tokenizer()
        self.vae = wan_vae(AutoencoderKLQwenImage)
        self.named = {"vae": self.vae, "text_encoder": qwen_vl(tokenizer), "tokenizer": tokenizer}
        self.pipeline = QwenImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=None, **self.named)

    def prompt(self, text: str) -> dict[str, torch.Tensor]:
        states, _ = self.pipeline.encode_prompt(text)
        return {"text_embeddings": states[0]}


class Wan(OfLists):
    size = (5, 32, 48)

    def __init__(self):
        tokenizer = t5_tokenizer(transformers.T5Tokenizer)
        self.vae = wan_vae(AutoencoderKLWan)
        encoder = t5(tokenizer, transformers.UMT5EncoderModel, transformers.UMT5Config)
        self.named = {"vae": self.vae, "text_encoder": encoder, "tokenizer": tokenizer}
        self.pipeline = WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=None, **self.named)

    def prompt(self, text: str) -> dict[str, torch.Tensor]:
        states, _ = self.pipeline.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)
        return {"text_embeddings": states[0]}


class HunyuanVideo15(Made):
    size = (5, 32, 48)
    has_images = False

    def __init__(self):
        tokenizer, tokenizer_2 = qwen_tokenizer(), transformers.ByT5Tokenizer()
        self.vae = AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, spatial_compression_ratio=16, temporal_compression_ratio=4
        )
        self.named = {
            "vae": self.vae,
            "text_encoder": qwen_vl(tokenizer),
            "tokenizer": tokenizer,
            "text_encoder_2": t5(tokenizer_2, width=32),
            "tokenizer_2": tokenizer_2,
        }

    def prompt(self, text: str) -> dict[str, torch.Tensor]:
        """Rows that a mask shows, without the others."""
        kind, parts = HunyuanVideo15Pipeline, self.named
        states, mask = kind._get_mllm_prompt_embeds(parts["text_encoder"].model.language_model, parts["tokenizer"], text, torch.device("cpu"))
        quoted, mask_2 = kind._get_byt5_prompt_embeds(parts["tokenizer_2"], parts["text_encoder_2"], text, torch.device("cpu"))
        return {"text_embeddings": states[mask.bool()], "text_embeddings_2": quoted[mask_2.bool()]}

    def normalization(self):
        return scalar(0.0, self.vae.config.scaling_factor)


class HunyuanVideo15WithImages(HunyuanVideo15):
    def __init__(self):
        super().__init__()
        config = transformers.SiglipVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
        self.named["image_encoder"] = transformers.SiglipVisionModel(config)


FAMILIES = {
    "flux": Flux,
    "flux2_dev": Flux2Dev,
    "flux2_klein": Flux2Klein,
    "qwen_image": QwenImage,
    "wan": Wan,
    "hunyuan_video15": HunyuanVideo15,
    "hunyuan_video15_images": HunyuanVideo15WithImages,
}


def image_embeds(encoder: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """As the pipeline's image encoder sees the first frame: resized as torchvision, which the published preprocessor calls, resizes bytes. How far
    Pillow's bytes are from these is for the encoders' own test."""
    frame, side = ((pixels[:, :, 0] + 1) * 127.5).round().byte(), encoder.config.image_size
    resized = torch.nn.functional.interpolate(frame, (side, side), mode="bicubic", antialias=True)
    return encoder((resized.float() / 255 - 0.5) / 0.5).last_hidden_state[0]


def pixels_of(made: Made, dice: random.Random) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(dice.getrandbits(32))
    # Whole bytes, as pictures are.
    pixels = torch.randint(256, (1, 3, *made.size), generator=generator).float() / 127.5 - 1
    is_qwen = isinstance(made, QwenImage)
    # A picture is one frame.
    posterior = made.vae.encode(pixels.unsqueeze(2) if is_qwen else pixels).latent_dist
    mean, std = (part.squeeze(2) if is_qwen else part for part in [posterior.mean, posterior.std])
    out = {"pixels": pixels, "mean": mean, "std": std}
    if isinstance(made, Flux2):
        bn = made.vae.bn
        patches = Flux2Pipeline._patchify_latents(mean)
        shift, deviation = bn.running_mean.view(1, -1, 1, 1), torch.sqrt(bn.running_var.view(1, -1, 1, 1) + made.vae.config.batch_norm_eps)
        latents = (patches - shift) / deviation
        back = Flux2Pipeline._unpatchify_latents(latents * deviation + shift)
        out["latents"] = latents
    else:
        shift, scale = made.normalization()
        out |= {"shift": shift.clone(), "scale": scale.clone(), "latents": (mean - shift) * scale}
        back = out["latents"] / scale + shift
    decoded = made.vae.decode(back.unsqueeze(2) if is_qwen else back).sample
    out["decoded"] = (decoded.squeeze(2) if is_qwen else decoded).clamp(-1, 1)
    if "image_encoder" in made.named:
        out["image_embeds"] = image_embeds(made.named["image_encoder"], pixels)
    return out


@torch.no_grad()
def make(name: str, seed: str, out: Path) -> None:
    dice = random.Random(seed + name)
    torch.manual_seed(dice.getrandbits(32))
    made = FAMILIES[name]()
    for part in made.named.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            # Random weights of their own size leave little of a prompt or a picture; larger ones show what is wrong.
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(2)
    pipeline = out / name / "pipeline"
    for folder, part in made.named.items():
        part.save_pretrained(pipeline / folder)
    (out / name / "prompts.json").write_text(json.dumps(PROMPTS))
    prompts = {f"{index}.{key}": tensor.contiguous() for index, text in enumerate(PROMPTS) for key, tensor in made.prompt(text).items()}
    save_file({key: tensor for key, tensor in prompts.items() if tensor.numel()}, out / name / "prompts.safetensors")
    save_file({key: tensor.contiguous() for key, tensor in pixels_of(made, dice).items()}, out / name / "pixels.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("seed")
    parser.add_argument("--families", default=",".join(FAMILIES))
    arguments = parser.parse_args()
    for name in arguments.families.split(","):
        make(name, arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
