"""Tiny models of the Qwen-VL families."""

from __future__ import annotations

from typing import Any

import torch
from tiny import IMAGE, VIDEO, WIDTH, Picture, Tiny, noise, placeholders, text_settings
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

SIZES = [(8, 12), (12, 12), (8, 8)]  # (h, w) in patches
VIDEO_SIZES = [(2, 8, 8), (3, 4, 12)]  # (t, h, w) in patches
START, END = 92, 93  # around a picture
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
TOWER = {"depth": 4, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
SIZED = TOWER | {"hidden_size": WIDTH, "intermediate_size": 48, "out_hidden_size": WIDTH}
POSED = SIZED | {"num_position_embeddings": 36}
DEEPSTACK = {"deepstack_visual_indexes": [0, 1, 2]}  # three of them, as the published models have
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "head_dim": 16,
    "num_hidden_layers": 5,
    "layer_types": [*["linear_attention"] * 3, "full_attention", "linear_attention"],  # every fourth, as published
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def rope(sections: list[int], **more: Any) -> dict[str, Any]:
    """Rotary settings with three axes."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}}


def build_qwen2_vl() -> Qwen2VLForConditionalGeneration:
    tower = TOWER | {"embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}
    config = Qwen2VLConfig(vision_config=tower, text_config=text_settings(**rope([1, 1, 2])), **TOKENS)
    return Qwen2VLForConditionalGeneration(config)


def build_qwen2_5_vl() -> Qwen2_5_VLForConditionalGeneration:
    tower = SIZED | {"window_size": 16, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2}
    config = Qwen2_5_VLConfig(vision_config=tower, text_config=text_settings(**rope([1, 1, 2])), **TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


def build_qwen3_vl() -> Qwen3VLForConditionalGeneration:
    text = text_settings(num_hidden_layers=4, head_dim=8, **rope([2, 1, 1], mrope_interleaved=True))
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=POSED | DEEPSTACK, text_config=text, **TOKENS))


def build_qwen3_vl_moe() -> Qwen3VLMoeForConditionalGeneration:
    text = text_settings(num_hidden_layers=4, head_dim=8, **EXPERTS, **rope([2, 1, 1], mrope_interleaved=True))
    config = Qwen3VLMoeConfig(vision_config=POSED | DEEPSTACK, text_config=text, **TOKENS)
    return Qwen3VLMoeForConditionalGeneration(config)


def build_qwen3_5() -> Qwen3_5ForConditionalGeneration:
    text = text_settings(**LINEAR, **rope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5))
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(vision_config=POSED, text_config=text, **TOKENS))


def build_qwen3_5_moe() -> Qwen3_5MoeForConditionalGeneration:
    text = text_settings(**LINEAR, **EXPERTS, **rope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5))
    text |= {"shared_expert_intermediate_size": 16}
    return Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(vision_config=POSED, text_config=text, **TOKENS))


def image(letter: str) -> Picture:
    """An image of one of three sizes, patches of 4 x 4 in two frames."""
    h, w = SIZES[ord(letter) % 3]
    inputs = {"pixel_values": noise(letter, h * w, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, h, w]])}
    return placeholders(inputs, h * w // 4)


def frames(letter: str) -> dict[str, torch.Tensor]:
    """The pixels of a video of two or three frames."""
    t, h, w = VIDEO_SIZES[ord(letter) % 2]
    pixels = noise(letter, t * h * w, 3 * 2 * 4 * 4)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[t, h, w]])}


def video(letter: str) -> Picture:
    """A video whose placeholders stand in one run."""
    inputs = frames(letter)
    return placeholders(inputs, len(inputs["pixel_values_videos"]) // 4, VIDEO, 2)


def timed_video(letter: str) -> Picture:
    """As the Qwen2.5-VL processor gives it: with the seconds of a frame of the grid, other ones for other letters."""
    plain = video(letter)
    seconds = torch.tensor([0.5 + 2 * (ord(letter) % 2)])
    return Picture({**plain.inputs, "second_per_grid_ts": seconds}, plain.ids, plain.types)


def split_video(letter: str) -> Picture:
    """As the Qwen3-VL processor gives it: every frame for itself, after its time in words."""
    inputs = frames(letter)
    t, h, w = inputs["video_grid_thw"][0].tolist()
    ids, types = [], []
    for frame in range(t):
        time = [81, 82 + frame]
        n = h * w // 4
        ids += [*time, START, *[VIDEO] * n, END]
        types += [0, 0, 0, *[2] * n, 0]
    return Picture(inputs, ids, types)


TYPES = "mm_token_type_ids"
TINY = {
    "qwen2_vl": Tiny(build_qwen2_vl, image, video, TYPES),
    "qwen2_5_vl": Tiny(build_qwen2_5_vl, image, timed_video, TYPES),
    "qwen3_vl": Tiny(build_qwen3_vl, image, split_video, TYPES),
    "qwen3_vl_moe": Tiny(build_qwen3_vl_moe, image, split_video, TYPES),
    "qwen3_5": Tiny(build_qwen3_5, image, split_video, TYPES),
    "qwen3_5_moe": Tiny(build_qwen3_5_moe, image, split_video, TYPES),
}
