"""The texts and ids that diffusers' pipelines make of prompts.

    prompt_texts.py OUT SEED

writes OUT/texts.json, and a tiny tokenizer OUT/<family> for each family whose prompts are chats.

The pipelines' own functions run here, with what they give to a tokenizer recorded. The chat
templates lie in the published folders, not in a package; CHATML and MISTRAL say what those of
Qwen2.5-VL, Qwen3 and Mistral Small 3 make of such messages.
"""

import html
import inspect
import json
import pathlib
import random
import shutil
import sys
import types

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, HunyuanVideo15Pipeline, QwenImagePipeline
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts
from diffusers.pipelines.wan.pipeline_wan import is_ftfy_available, prompt_clean
from token_ids import mistral, piece, qwen2

PROMPTS = 300
MOST = 150
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
MISTRAL = """{{- bos_token }}
{%- for message in messages %}
    {%- set text = message['content'][0]['text'] %}
    {%- if message['role'] == 'system' %}
        {{- '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}
    {%- else %}
        {{- '[INST]' + text + '[/INST]' }}
    {%- endif %}
{%- endfor %}"""


class Recorded(Exception):
    """Ends a pipeline's function when its tokenizer has answered."""


class Recorder:
    """A tokenizer that keeps its texts and ids."""

    def __init__(self, tokenizer, template):
        self.tokenizer, self.tokenizer.chat_template = tokenizer, template
        self.most, self.text, self.ids = None, None, None

    def apply_chat_template(self, conversation, tokenize=True, **arguments):
        if not tokenize:
            return self.tokenizer.apply_chat_template(conversation, tokenize=False, **arguments)
        [self.text] = self.tokenizer.apply_chat_template(conversation, tokenize=False, **arguments)
        arguments |= {"max_length": MOST, "padding": False, "return_tensors": None}
        [self.ids] = self.tokenizer.apply_chat_template(conversation, **arguments)["input_ids"]
        raise Recorded

    def __call__(self, text, truncation, **_):
        assert truncation
        self.text = text if isinstance(text, str) else text[0]
        self.ids = self.tokenizer(self.text, truncation=True, max_length=MOST)["input_ids"]
        raise Recorded


def recorded(recorder, function):
    try:
        function()
    except Recorded:
        return recorder.text, recorder.ids
    raise AssertionError("the pipeline asks its tokenizer for nothing")


def prompts(dice):
    names = list(html.entities.html5)
    numbers = [0, 9, 10, 13, 27, 38, 127, 128, 159, 173, 0xD800, 0xFDD0, 0xFFFE, 0xFFFF, 0x1F600, 0x10FFFF, 0x110000, 10**12]

    def reference():
        kind = dice.randrange(4)
        if kind == 0:
            return "&" + dice.choice(names)
        if kind == 1:
            return f"&#{dice.choice(numbers)}" + dice.choice([";", ""])
        if kind == 2:
            return f"&#{dice.choice('xX')}{dice.choice(numbers):x}" + dice.choice([";", ""])
        return dice.choice(["&amp;amp;", "&amp;lt;", "&", "&;", "&#;", "&#x;", "&x", "&notit;", "&" + "a" * 40])

    def quoted():
        inside = "".join(piece(dice) for _ in range(dice.randint(0, 2)))
        return dice.choice(['"{}"', "“{}”", '"{}”', '"', "“", '"Sale"', "“Sale”"]).replace("{}", inside)

    def prompt():
        kinds = [lambda: piece(dice), lambda: piece(dice), reference, quoted, lambda: "[IMG]", lambda: "[I[IMG]MG]"]
        return "".join(dice.choice(kinds)() for _ in range(dice.randint(1, 25)))

    every_name = [" ".join("&" + name for name in names), " ".join(f"&{name[:-1]}x" for name in names)]
    every_number = [" ".join(f"&#{number};" for number in range(0x300))]
    return ["", " ", '""', '"a\nb"', '"a" "a"', *every_name, *every_number] + [prompt() for _ in range(PROMPTS)]


def tokenizers(out, dice):
    """A tiny tokenizer for each family."""
    for name, make in [*qwen2(dice, out), *mistral(dice, out)]:
        families = {"qwen2": ["flux2_klein", "qwen_image", "hunyuan_video15"], "mistral": ["flux2"]}.get(name, [])
        for family in families:
            shutil.copytree(out / name, out / family)
            yield family, Recorder(make.from_pretrained(out / family), MISTRAL if family == "flux2" else CHATML)


def main(out, seed):
    dice, out = random.Random(seed), pathlib.Path(out)
    assert not is_ftfy_available(), "with ftfy diffusers' texts are others"
    texts = prompts(dice)
    encoder = types.SimpleNamespace(dtype=torch.float32, device="cpu")
    recorders = dict(tokenizers(out, dice))
    hunyuan_video15 = HunyuanVideo15Pipeline._get_mllm_prompt_embeds
    image = QwenImagePipeline(None, None, None, None, None)
    image.text_encoder, image.tokenizer = encoder, recorders["qwen_image"]
    ask = {
        "flux2": lambda text: Flux2Pipeline._get_mistral_3_small_prompt_embeds(encoder, recorders["flux2"], text),
        "flux2_klein": lambda text: Flux2KleinPipeline._get_qwen3_prompt_embeds(encoder, recorders["flux2_klein"], text),
        "qwen_image": lambda text: image._get_qwen_prompt_embeds(text, "cpu"),
        "hunyuan_video15": lambda text: hunyuan_video15(encoder, recorders["hunyuan_video15"], text, "cpu"),
    }
    chats, ids = {}, {}
    for family, function in ask.items():
        answers = [recorded(recorders[family], lambda text=text: function(text)) for text in texts]
        chats[family], ids[family] = map(list, zip(*answers))
    dropped = {
        "flux2": 0,
        "flux2_klein": 0,
        "qwen_image": image.prompt_template_encode_start_idx,
        "hunyuan_video15": inspect.signature(hunyuan_video15).parameters["crop_start"].default,
    }
    answer = {
        "prompts": texts,
        "wan": [prompt_clean(text) for text in texts],
        "quoted": [extract_glyph_texts(text) for text in texts],
        "chats": chats,
        "ids": ids,
        "dropped": dropped,
        "most": MOST,
    }
    (out / "texts.json").write_text(json.dumps(answer))


main(*sys.argv[1:])
