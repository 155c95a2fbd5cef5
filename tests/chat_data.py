"""Conversations about pictures, and processors with other tokenizers and templates, for the tests of fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import Gemma3Processor, Idefics3Processor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

COLOURS = ("red", "blue", "green", "yellow")
# As in llava-hf/llava-1.5-7b-hf: marks what is generated, and ends without any token.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# As in Qwen2-VL: a new line behind the end of a turn.
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Says another thing behind an answer that is not the last one.
CHANGING_TEMPLATE = CHATML_TEMPLATE.replace(
    "<|im_end|>\n{% endfor %}",
    "{% if message['role'] == 'assistant' and not loop.last %} and{% endif %}<|im_end|>\n{% endfor %}",
)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *parts: str | None) -> dict[str, Any]:
    """A turn; None is a picture."""
    return {"role": role, "content": [{"type": "image"} if part is None else text(part) for part in parts]}


def picture(height: int = 90, width: int = 120, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def colours(folder: Path, number: int = 6) -> Path:
    """JSON lines beside pictures of one colour each, and a question about it."""
    values = {"red": (220, 0, 0), "blue": (0, 0, 220), "green": (0, 200, 0), "yellow": (220, 220, 0)}
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(number):
        name = COLOURS[i % len(COLOURS)]
        Image.new("RGB", (60 + 10 * i, 90), values[name]).save(folder / "pictures" / f"{i}.png")
        messages = [turn("user", None, "what colour is it ?"), turn("assistant", name)]
        records.append({"messages": messages, "images": [f"pictures/{i}.png"]})
    return write_lines(folder / "train.jsonl", records)


def bpe_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, whose tokens carry the spaces before them. special: names of more special tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = ["USER: what is red ? ASSISTANT: the cup user assistant system \n", "a cup, a dog and no ball"] * 3
    known = ["<image>", "<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        lines, BpeTrainer(vocab_size=400, special_tokens=known, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", padding_side="left",
        extra_special_tokens={"start": "<|im_start|>", "end": "<|im_end|>"} | special,
    )  # fmt: skip


def bpe_processor(template: str) -> LlavaProcessor:
    """LLaVA's processor with a byte-level tokenizer."""
    size = {"height": 20, "width": 20}
    pictures = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    return LlavaProcessor(
        pictures, bpe_tokenizer(picture="<image>"), patch_size=10, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip


def gemma_processor() -> Gemma3Processor:
    """Gemma 3: a placeholder becomes other tokens, between two of its own and new lines."""
    tokenizer = bpe_tokenizer(image_token="<soft>", boi_token="<boi>", eoi_token="<eoi>")
    pictures = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    template = CHATML_TEMPLATE.replace("<image>", "<boi>")
    return Gemma3Processor(pictures, tokenizer, chat_template=template, image_seq_length=4)


def tile_processor() -> Idefics3Processor:
    """Idefics 3: rows of tiles, and samples with different numbers of pictures."""
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = CHATML_TEMPLATE.replace("<|im_end|>", "<end_of_utterance>")
    return Idefics3Processor(pictures, bpe_tokenizer(picture="<image>"), image_seq_len=4, chat_template=template)
