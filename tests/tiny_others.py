"""Tiny models of the other families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny import IMAGE, WIDTH, Picture, Tiny, noise, placeholders, text_settings
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Config,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

START, END, TILE = 92, 93, 94  # around a picture, and before each of its tiles
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 4,
}
SIZES = [(32, 48), (48, 48), (32, 32)]  # (height, width) in pixels of Mistral 3's images
TILES = 8, 4  # of Idefics3 and SmolVLM: patches and tokens a side


def build_internvl(**changes: Any) -> InternVLForConditionalGeneration:
    tower = TOWER | {"image_size": 48, "layer_scale_init_value": 1.0, "attention_bias": True}
    settings = {"image_token_id": IMAGE, "image_seq_length": 36, "tie_word_embeddings": False} | changes
    text = Qwen2Config(**text_settings())
    return InternVLForConditionalGeneration(InternVLConfig(vision_config=tower, text_config=text, **settings))


def build_idefics3() -> Idefics3ForConditionalGeneration:
    config = Idefics3Config(
        vision_config=TOWER | {"image_size": 32}, text_config=LlamaConfig(**text_settings()), image_token_id=IMAGE
    )
    return Idefics3ForConditionalGeneration(config)


def build_smolvlm() -> SmolVLMForConditionalGeneration:
    config = SmolVLMConfig(
        vision_config=TOWER | {"image_size": 32}, text_config=LlamaConfig(**text_settings()), image_token_id=IMAGE
    )
    return SmolVLMForConditionalGeneration(config)


def build_gemma3(window: int = 128, **changes: Any) -> Gemma3ForConditionalGeneration:
    """Sliding, full, sliding layers. 12 x 12 patches, averaged to 36 tokens."""
    text = text_settings(
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    tower = TOWER | {"image_size": 48, "vision_use_head": False, "model_type": "siglip_vision_model"}
    settings = {"mm_tokens_per_image": 36, "image_token_index": IMAGE, "tie_word_embeddings": False} | changes
    settings |= {"boi_token_index": START, "eoi_token_index": END}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(vision_config=tower, text_config=Gemma3TextConfig(**text), **settings)
    )


def build_paligemma() -> PaliGemmaForConditionalGeneration:
    config = PaliGemmaConfig(
        vision_config=TOWER | {"image_size": 24, "vision_use_head": False, "model_type": "siglip_vision_model"},
        text_config=GemmaConfig(**text_settings(head_dim=8)),
        projection_dim=WIDTH,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return PaliGemmaForConditionalGeneration(config)


def build_mistral3(**changes: Any) -> Mistral3ForConditionalGeneration:
    settings = {"image_token_index": IMAGE, "spatial_merge_size": 2, "tie_word_embeddings": False} | changes
    config = Mistral3Config(
        vision_config=TOWER | {"image_size": 96, "model_type": "pixtral"},
        text_config=MistralConfig(**text_settings(head_dim=8), sliding_window=None),
        **settings,
    )
    return Mistral3ForConditionalGeneration(config)


def between(picture: Picture) -> Picture:
    """The picture between its start and end tokens."""
    return Picture(picture.inputs, [START, *picture.ids, END], [0, *picture.types, 0])


def tile(letter: str) -> Picture:
    """One tile of InternVL: 12 x 12 patches, 36 tokens."""
    return between(placeholders({"pixel_values": noise(letter, 1, 3, 48, 48)}, 36))


def gemma_image(letter: str) -> Picture:
    """An image of Gemma 3: its placeholders are of type 1."""
    return tile(letter)


def paligemma_image(letter: str) -> Picture:
    """An image of PaliGemma: part of the prefix, which is of type 0."""
    return placeholders({"pixel_values": noise(letter, 1, 3, 24, 24)}, 36, kind=0)


def tiled(letter: str) -> Picture:
    """One, two or three tiles of 8 x 8 patches, each announced by tokens of its own. [1, tiles, 3, 32, 32]"""
    tiles, (_, side) = 1 + ord(letter) % 3, TILES
    pixels = noise(letter, 1, tiles, 3, 32, 32)
    ids = [token for number in range(tiles) for token in (TILE, 3 + number, *[IMAGE] * side**2)]
    inputs = {"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, tiles, 32, 32, dtype=torch.long)}
    return Picture(inputs, [*ids, TILE], [int(token == IMAGE) for token in ids] + [0])


def by_sample(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """All tiles of a row behind one another, filled up with tiles of zeros. [rows, most tiles, ...]"""
    most = max(sum(picture.inputs["pixel_values"].shape[1] for picture in row) for row in rows)
    filled: dict[str, list[Tensor]] = {}
    shapes = {"pixel_values": (3, 32, 32), "pixel_attention_mask": (32, 32)}
    for row in rows:
        for name, shape in shapes.items():
            tiles = [picture.inputs[name][0] for picture in row]
            kind = torch.float32 if name == "pixel_values" else torch.long
            empty = torch.zeros(most - sum(map(len, tiles)), *shape, dtype=kind)
            filled.setdefault(name, []).append(torch.cat([*tiles, empty]))
    return {name: torch.stack(parts) for name, parts in filled.items()}


def mistral_image(letter: str) -> Picture:
    """An image of one of three sizes, on a canvas that fits all: 24, 36 or 16 tokens."""
    height, width = SIZES[ord(letter) % 3]
    canvas = torch.zeros(1, 3, 48, 48)
    canvas[:, :, :height, :width] = noise(letter, 1, 3, height, width)
    inputs = {"pixel_values": canvas, "image_sizes": torch.tensor([[height, width]])}
    return between(placeholders(inputs, height * width // 64))


TINY = {
    "internvl": Tiny(build_internvl, tile),
    "idefics3": Tiny(build_idefics3, tiled, collect=by_sample),
    "smolvlm": Tiny(build_smolvlm, tiled, collect=by_sample),
    "gemma3": Tiny(build_gemma3, gemma_image, types="token_type_ids"),
    "paligemma": Tiny(build_paligemma, paligemma_image, types="token_type_ids"),
    "mistral3": Tiny(build_mistral3, mistral_image),
}
