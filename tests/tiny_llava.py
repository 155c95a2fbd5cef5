"""Tiny models of the LLaVA families."""

from __future__ import annotations

from tiny import IMAGE, WIDTH, Picture, Tiny, noise, placeholders, text_settings
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration


def clip(**changes) -> CLIPVisionConfig:
    """A tiny CLIP tower: 36 patches and CLS."""
    settings = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
    }
    return CLIPVisionConfig(**(settings | changes))


def build_llava() -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=clip(),
        text_config=LlamaConfig(**text_settings()),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def square(letter: str) -> Picture:
    """A square image of 36 patches."""
    return placeholders({"pixel_values": noise(letter, 1, 3, 48, 48)}, 36)


TINY = {"llava": Tiny(build_llava, square)}
