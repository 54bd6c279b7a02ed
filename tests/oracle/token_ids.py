"""Tiny tokenizers of every kind, trained on random text and saved in the layouts that published
folders have, and their ids by transformers.

    token_ids.py OUT SEED

writes the folders OUT/<case>, and OUT/ids.json: prompts, and for each case the ids of each prompt,
cut to each of some lengths.
"""

import importlib
import json
import pathlib
import random
import sys
import unicodedata

import transformers
from charsmaps import charsmap, compatible
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

# The model's file is parsed by protobuf; the package of this name is asked for, and not used.
importlib.import_module("transformers.convert_slow_tokenizer").requires_backends = lambda *_: None

PROMPTS = 1000
LENGTHS = [2, 7, 77, 1 << 20]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
QWEN2_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>"]
QWEN2_PLAIN = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
MISTRAL_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL_SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
SPELLED = QWEN2_SPECIAL + QWEN2_PLAIN + MISTRAL_SPECIAL + [
    "<|startoftext|>", "<|STARTOFTEXT|>", "<extra_id_0>", "<extra_id_7>", "<extra_id_99>", "<extra_id_299>",
    "<color-3>", "<en-font-1>", "<0x41>", "▁", "</w>", "<tool_call",
]  # fmt: skip
WORDS = "a cat's photo of two red houses in Paris, they're 1234 years old: don't we'll I'd THE Sky; naïve café".split()
SCRIPTS = [
    (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x600), (0x600, 0x700), (0x900, 0xA00), (0xE00, 0xE80),
    (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2070, 0x2400), (0x3000, 0x3100), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A4), (0xF900, 0xFB50), (0xFB50, 0xFF00), (0xFF00, 0xFFF0), (0x1D400, 0x1D800), (0x1F300, 0x1FAFF),
    (0, 0x30000),
]  # fmt: skip
EMOJI = ["👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇫🇷", "1️⃣", "✈️"]


# Texts.


def character(dice):
    """An assigned character; those of later versions of Unicode are classed differently by each library."""
    script = dice.choice(SCRIPTS)
    while True:
        c = chr(dice.randrange(*script))
        if unicodedata.category(c) not in ("Cn", "Cs"):
            return c


def piece(dice):
    kinds = [
        lambda: dice.choice(WORDS),
        lambda: dice.choice(WORDS) + " ",
        lambda: " " * dice.randint(1, 4),
        lambda: dice.choice(["\n", "\r\n", "\t", " \n ", "\u3000", "\u0085", "\u2028", "\x00", "\x1f", "\u200d", "\u00ad"]),
        lambda: "".join(character(dice) for _ in range(dice.randint(1, 6))),
        lambda: dice.choice("aeiouAE") + "".join(chr(dice.randrange(0x300, 0x36F)) for _ in range(dice.randint(1, 3))),
        lambda: dice.choice(EMOJI),
        lambda: dice.choice(SPELLED),
        lambda: str(dice.randrange(10**6)),
    ]  # fmt: skip
    return dice.choice(kinds)()


def prompts(dice):
    fixed = ["", " ", "  \n ", "\x00", "</s>", " </s> ", "a</s>", "<pad> <pad>", *SPELLED, *EMOJI]
    fixed += ["a" * 3000, " " * 3000, "é" * 999 + " \n" * 999, "".join(piece(dice) for _ in range(4000))]
    return fixed + ["".join(piece(dice) for _ in range(dice.randint(1, 40))) for _ in range(PROMPTS - len(fixed))]


def corpus(dice):
    return [" ".join(piece(dice) for _ in range(30)) + " " + " ".join(dice.choices(WORDS, k=40)) for _ in range(60)]


# Vocabularies.


def byte_pairs(dice, pre_tokenizer, size, suffix=""):
    """Tokens in the order of their ids, and merges."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pre_tokenizer)
    rules = {"end_of_word_suffix": suffix} if suffix else {}
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=BYTES, show_progress=False, **rules)
    tokenizer.train_from_iterator(corpus(dice), trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = BYTES + [byte + suffix for byte in BYTES if suffix]
    tokens += list(dict.fromkeys(left + right for left, right in merges))
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def scores(dice, first, size):
    """Tokens with scores, `first` ones at the beginning."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=first, unk_token="<unk>", show_progress=False)
    # All characters become tokens, so that others than these stay unknown.
    texts = [unicodedata.normalize("NFKC", text) for text in corpus(dice)]
    kept = set(dice.sample(sorted(set("".join(texts))), 200)) | set(" ".join(WORDS))
    tokenizer.train_from_iterator(["".join(c for c in text if c in kept) for text in texts], trainer)
    return [tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]]


# Files.


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        name, _, end = name.rpartition("_")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=2)
        (folder / f"{name}.{end}").write_text(text, encoding="utf-8")


def token(content, normalized=False, special=True, **rules):
    return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False, "special": special} | rules  # fmt: skip


def without_special(entry):
    return {name: value for name, value in entry.items() if name != "special"}


def merges_txt(merges):
    return "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)


def clip(dice, out):
    split = rf"<\|startoftext\|>|<\|endoftext\|>|{CONTRACTIONS}|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"
    split = pre_tokenizers.Split(Regex(split), behavior="removed", invert=True)
    vocab, merges = byte_pairs(dice, [split, pre_tokenizers.ByteLevel(add_prefix_space=False)], 700, "</w>")
    start, end = len(vocab), len(vocab) + 1
    vocab |= {"<|startoftext|>": start, "<|endoftext|>": end}
    named = {name: token("<|endoftext|>", normalized=True) for name in ("eos_token", "unk_token")}
    named["bos_token"] = token("<|startoftext|>", normalized=True)
    common = {
        "vocab_json": vocab,
        "merges_txt": merges_txt(merges),
        "special_tokens_map_json": {name: without_special(entry) for name, entry in named.items()} | {"pad_token": "<|endoftext|>"},
    }  # fmt: skip
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace", "add_prefix_space": False}  # fmt: skip
    tagged = {name: {"__type": "AddedToken"} | without_special(entry) for name, entry in named.items()}
    write(out / "clip-old", **common, tokenizer_config_json=config | tagged | {"pad_token": "<|endoftext|>"})
    numbered = {str(start): token("<|startoftext|>", normalized=True), str(end): token("<|endoftext|>")}
    plain = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "!"}
    write(out / "clip", **common, tokenizer_config_json=config | plain | {"added_tokens_decoder": numbered})
    yield "clip-old", transformers.CLIPTokenizer
    yield "clip", transformers.CLIPTokenizer


def qwen2(dice, out):
    split = pre_tokenizers.Split(Regex(rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|\s+|."), "isolated")
    vocab, merges = byte_pairs(dice, [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)], 600)
    added = QWEN2_SPECIAL + QWEN2_PLAIN
    numbered = {str(len(vocab) + k): token(text, special=text in QWEN2_SPECIAL) for k, text in enumerate(added)}
    named = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    config = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False, "split_special_tokens": False}  # fmt: skip
    common = {
        "vocab_json": vocab,
        "merges_txt": merges_txt(merges),
        "added_tokens_json": {entry["content"]: int(number) for number, entry in numbered.items()},
        "special_tokens_map_json": {
            "additional_special_tokens": QWEN2_SPECIAL[1:],
            "eos_token": without_special(token("<|im_end|>")),
            "pad_token": without_special(token("<|endoftext|>")),
        },
    }
    special = {"additional_special_tokens": QWEN2_SPECIAL[1:], "extra_special_tokens": {}}
    write(out / "qwen2", **common, tokenizer_config_json=config | named | special | {"added_tokens_decoder": numbered})
    write(out / "qwen2-older", **common, tokenizer_config_json=config | named)
    write(out / "qwen2-ended", **common, tokenizer_config_json=config | named | {"add_eos_token": True, "image_token": "<i>"})
    yield "qwen2", transformers.Qwen2Tokenizer
    yield "qwen2-ended", transformers.Qwen2Tokenizer
    yield "qwen2-older", transformers.Qwen2TokenizerFast


def as_file(model, normalizer, pre_tokenizer, post_processor, added):
    """The text of a tokenizer.json."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor = normalizer, pre_tokenizer, post_processor
    tokenizer.decoder = decoders.ByteLevel()
    for entry in added:
        rules = {name: value for name, value in entry.items() if name not in ("content",)}
        tokenizer.add_tokens([transformers.AddedToken(entry["content"], **rules)])
    return tokenizer.to_str(pretty=True)


def spiece(vocab, replacements, kinds):
    model = sentencepiece.ModelProto()
    for text, score in vocab:
        piece = model.pieces.add(piece=text, score=score)
        if text in kinds:
            piece.type = kinds[text]
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 1, 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.precompiled_charsmap = replacements
    return model.SerializeToString()


def t5(dice, out):
    replacements = charsmap(compatible(dice, 800))
    first = ["<pad>", "</s>", "<unk>"]
    for name, extra, folders in [("t5", 100, ["", "-model", "-older"]), ("umt5", 300, ["", "-model"])]:
        vocab = scores(dice, first, 500)
        if name == "umt5":
            vocab += [(f"<0x{byte:02X}>", -20.0 - byte / 256) for byte in range(256)]
        sentinels = [f"<extra_id_{number}>" for number in range(extra)]
        whole = vocab + [(text, 0.0) for text in reversed(sentinels)]
        numbers = {text: number for number, (text, _) in enumerate(whole)}
        numbered = {str(numbers[text]): token(text) for text in first + sentinels[::-1]}
        config = {"tokenizer_class": "T5Tokenizer", "extra_ids": extra, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 512}  # fmt: skip
        normalizer = normalizers.Sequence([normalizers.Precompiled(replacements), normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")])  # fmt: skip
        post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
        file = as_file(models.Unigram(whole, 2, name == "umt5"), normalizer, pre_tokenizers.Metaspace(), post_processor, numbered.values())  # fmt: skip
        special = {"additional_special_tokens": sentinels}
        write(out / name, tokenizer_json=file, tokenizer_config_json=config | special | {"added_tokens_decoder": numbered})
        kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
        if name == "umt5":
            kinds["naïve"] = 4
            vocab.append(("naïve", 0.0))
        model = spiece(vocab, replacements, kinds)
        mapped = {name: without_special(token(text, normalized=True)) for name, text in zip(("pad_token", "eos_token", "unk_token"), first)}  # fmt: skip
        write(out / f"{name}-model", tokenizer_config_json=config)
        (out / f"{name}-model" / "spiece.model").write_bytes(model)
        if name == "t5":
            write(out / "t5-older", tokenizer_config_json={"tokenizer_class": "T5Tokenizer"}, special_tokens_map_json=mapped | special)
            (out / "t5-older" / "spiece.model").write_bytes(model)
        for folder in folders:
            yield name + folder, transformers.T5TokenizerFast


def byt5(dice, out):
    sentinels = [f"<extra_id_{number}>" for number in range(125)]
    fonts = [f"<color-{number}>" for number in range(5)] + [f"<en-font-{number}>" for number in range(5)]
    first = {name: without_special(token(text, normalized=True)) for name, text in [("pad_token", "<pad>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]}  # fmt: skip
    added = {text: 259 + number for number, text in enumerate(sentinels + fonts)}
    special = {"additional_special_tokens": sentinels + fonts}
    config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0, "model_max_length": 1000000000000000019884624838656}
    named = {name: entry["content"] for name, entry in first.items()}
    numbered = {str(number): token(text, normalized=True) for number, text in enumerate(named.values())}
    numbered |= {str(number): token(text) for text, number in added.items()}
    write(
        out / "byt5",
        tokenizer_config_json=config | named | special | {"added_tokens_decoder": numbered},
        special_tokens_map_json=first | special,
        added_tokens_json=added,
    )
    write(out / "byt5-older", tokenizer_config_json=config, special_tokens_map_json=first | special, added_tokens_json=added)
    write(out / "byt5-least", tokenizer_config_json={"tokenizer_class": "ByT5Tokenizer"})
    for name in ("byt5", "byt5-older", "byt5-least"):
        yield name, transformers.ByT5Tokenizer


def mistral(dice, out):
    split = pre_tokenizers.Split(Regex(MISTRAL_SPLIT), "isolated")
    parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    learned, merges = byte_pairs(dice, parts, 600)
    vocab = {text: number for number, text in enumerate(MISTRAL_SPECIAL)}
    vocab |= {text: number + len(MISTRAL_SPECIAL) for text, number in learned.items()}
    post_processor = processors.TemplateProcessing(single=["<s>", "$A"], pair=["<s>", "$A", "<s>:1", "$B:1"], special_tokens=[("<s>", 1)])  # fmt: skip
    added = [token(text) for text in MISTRAL_SPECIAL]
    model = models.BPE(vocab, merges, ignore_merges=True)
    file = as_file(model, None, pre_tokenizers.Sequence(parts), post_processor, added)
    numbered = {str(number): entry for number, entry in enumerate(added)}
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizerFast", "processor_class": "PixtralProcessor", "padding_side": "left", "legacy": True}  # fmt: skip
    special = {"additional_special_tokens": MISTRAL_SPECIAL, "added_tokens_decoder": numbered}
    write(out / "mistral", tokenizer_json=file, tokenizer_config_json=config | named | special)
    plain = config | named | {"tokenizer_class": "PreTrainedTokenizerFast", "truncation_side": "left"}
    write(out / "mistral-cut-left", tokenizer_json=file, tokenizer_config_json=plain)
    yield "mistral", transformers.AutoTokenizer
    yield "mistral-cut-left", transformers.PreTrainedTokenizerFast


def saved_again(out, cases):
    """Each folder once more, as today's transformers saves it."""
    for name, make in cases:
        yield name, make
        make.from_pretrained(out / name).save_pretrained(out / f"{name}-saved")
        yield f"{name}-saved", make


def main(out, seed):
    dice, out = random.Random(seed), pathlib.Path(out)
    texts = prompts(dice)
    cases = {}
    for kind in (clip, qwen2, t5, byt5, mistral):
        for name, make in saved_again(out, list(kind(dice, out))):
            tokenizer = make.from_pretrained(out / name)
            ids = [[tokenizer(text, truncation=True, max_length=most)["input_ids"] for text in texts] for most in LENGTHS]
            cases[name] = {"ids": ids, "pad": tokenizer.pad_token_id, "pads_left": tokenizer.padding_side == "left"}
    answer = {"prompts": texts, "lengths": LENGTHS, "cases": cases}
    (out / "ids.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
