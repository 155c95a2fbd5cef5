"""Tiny models of the LLaVA families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny import IMAGE, VIDEO, WIDTH, Picture, Tiny, concatenated, noise, placeholders, text_settings
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.image_processing_utils import select_best_resolution

FRAMES = 3
SIZES = [(64, 50), (20, 60), (90, 28)]  # (h, w) of images c, a, b in pixels: padded on two sides, wide, tall


def clip(**changes: Any) -> CLIPVisionConfig:
    """A tiny CLIP tower: 36 patches and CLS."""
    return CLIPVisionConfig(**(vit(48) | changes))


def siglip(image_size: int, **changes: Any) -> SiglipVisionConfig:
    """A tiny SigLIP tower."""
    return SiglipVisionConfig(**(vit(image_size) | {"vision_use_head": False} | changes))


def vit(image_size: int) -> dict[str, Any]:
    """Settings of a tower."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": 8,
    }


# --- whole views ---------------------------------------------------------------------------------------------------


def build_llava(**changes: Any) -> LlavaForConditionalGeneration:
    """LLaVA-1.5."""
    settings = {"vision_config": clip(), "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    text = LlamaConfig(**text_settings())
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, image_token_id=IMAGE, **(settings | changes)))


def build_vipllava(**changes: Any) -> VipLlavaForConditionalGeneration:
    """ViP-LLaVA: five layers side by side."""
    settings = {"vision_config": clip(), "vision_feature_layer": [-2, -3, -4, 3, 1]}
    text = LlamaConfig(**text_settings())
    config = VipLlavaConfig(text_config=text, image_token_id=IMAGE, **(settings | changes))
    return VipLlavaForConditionalGeneration(config)


def build_video_llava(**changes: Any) -> VideoLlavaForConditionalGeneration:
    """Video-LLaVA: two towers; frames keep their CLS tokens."""
    settings = {"vision_config": clip(image_size=32), "vision_feature_layer": -2}
    config = VideoLlavaConfig(
        text_config=LlamaConfig(**text_settings()),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **(settings | changes),
    )
    return VideoLlavaForConditionalGeneration(config)


def square(letter: str, side: int = 48) -> Picture:
    """A square image in patches of 8 x 8."""
    return placeholders({"pixel_values": noise(letter, 1, 3, side, side)}, (side // 8) ** 2)


def small_square(letter: str) -> Picture:
    """A square image of 16 patches."""
    return square(letter, 32)


def video(letter: str, side: int, tokens: int) -> Picture:
    """A video of a few frames."""
    return placeholders({"pixel_values_videos": noise(letter, 1, FRAMES, 3, side, side)}, tokens, VIDEO, 2)


def video_with_cls(letter: str) -> Picture:
    """A video of frames of 16 patches and CLS."""
    return video(letter, 32, FRAMES * 17)


# --- thumbnail and crops -------------------------------------------------------------------------------------------


def grid_points(side: int) -> list[list[int]]:
    """Resolutions (h, w) that crops of this side can make."""
    return [[side, side], [side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side]]


def build_llava_next(**changes: Any) -> LlavaNextForConditionalGeneration:
    """LLaVA-NeXT: crops of 16 tokens."""
    settings = {"vision_config": clip(image_size=32), "image_grid_pinpoints": grid_points(32)}
    text = MistralConfig(**text_settings())
    config = LlavaNextConfig(text_config=text, image_token_id=IMAGE, **(settings | changes))
    return LlavaNextForConditionalGeneration(config)


def build_llava_next_video(**changes: Any) -> LlavaNextVideoForConditionalGeneration:
    """LLaVA-NeXT-Video: crops of 16 tokens, frames pooled to 4."""
    settings = {"vision_config": clip(image_size=32), "image_grid_pinpoints": grid_points(32)}
    config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**text_settings()),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **(settings | changes),
    )
    return LlavaNextVideoForConditionalGeneration(config)


def build_llava_onevision(**changes: Any) -> LlavaOnevisionForConditionalGeneration:
    """LLaVA-OneVision: crops of 25 tokens, shrunk above 25 in all; frames of 9 tokens, one newline a video."""
    settings = {
        "vision_config": siglip(40),
        "image_grid_pinpoints": grid_points(40),
        "vision_aspect_ratio": "anyres_max_1",
    }
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**text_settings()),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **(settings | changes),
    )
    return LlavaOnevisionForConditionalGeneration(config)


def anyres(letter: str, side: int, at_most: int | None = None, size: tuple[int, int] | None = None) -> Picture:
    """An image of one of three sizes, with as many placeholders as the processors of transformers give it."""
    size = size or SIZES[ord(letter) % 3]
    height, width = select_best_resolution(size, grid_points(side))
    rows, columns, n = height // side, width // side, side // 8
    h, w = rows * n, columns * n
    if size[1] / size[0] > w / h:
        h -= (h - int(round(size[0] * (w / size[1]), 7))) // 2 * 2
    else:
        w -= (w - int(round(size[1] * (h / size[0]), 7))) // 2 * 2
    if at_most is not None and (ratio := (h * w / (at_most * n * n)) ** 0.5) > 1.1:
        h, w = int(h // ratio), int(w // ratio)
    inputs = {
        "pixel_values": noise(letter, 1, 1 + rows * columns, 3, side, side),
        "image_sizes": torch.tensor([size]),
    }
    return placeholders(inputs, n * n + h * (w + 1))


def next_image(letter: str) -> Picture:
    """An image in crops of 16 tokens."""
    return anyres(letter, 32)


def onevision_image(letter: str) -> Picture:
    """An image in crops of 25 tokens."""
    return anyres(letter, 40, at_most=1)


def next_video(letter: str) -> Picture:
    """A video of frames of 4 tokens."""
    return video(letter, 32, FRAMES * 4)


def onevision_video(letter: str) -> Picture:
    """A video of frames of 9 tokens and a newline."""
    return video(letter, 40, FRAMES * 9 + 1)


def padded(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """As the processors do: images filled up with black crops to the largest number of crops in the batch."""
    pictures = [picture for row in rows for picture in row]
    most = max((p.inputs["pixel_values"].shape[1] for p in pictures if "pixel_values" in p.inputs), default=0)

    def filled(picture: Picture) -> Picture:
        if "pixel_values" not in picture.inputs:
            return picture
        pixels = picture.inputs["pixel_values"]
        more = {"pixel_values": pad(pixels, [0] * 7 + [most - pixels.shape[1]])}
        return Picture({**picture.inputs, **more}, picture.ids, picture.types)

    return concatenated([[filled(picture) for picture in pictures]])


TINY = {
    "llava": Tiny(build_llava, square),
    "vipllava": Tiny(build_vipllava, square),
    "video_llava": Tiny(build_video_llava, small_square, video_with_cls),
    "llava_next": Tiny(build_llava_next, next_image, collect=padded),
    "llava_next_video": Tiny(build_llava_next_video, next_image, next_video, collect=padded),
    "llava_onevision": Tiny(build_llava_onevision, onevision_image, onevision_video, collect=padded),
}
