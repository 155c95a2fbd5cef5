"""Tiny models of the Qwen-VL families."""

from __future__ import annotations

import torch
from tiny import IMAGE, VIDEO, WIDTH, Picture, Tiny, noise, placeholders, text_settings
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SIZES = [(8, 12), (12, 12), (8, 8)]  # (h, w) in patches


def build_qwen2_5_vl() -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": WIDTH,
        },
        text_config=text_settings(
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def image(letter: str) -> Picture:
    """An image of one of three sizes, patches of 4 x 4 in two frames."""
    h, w = SIZES[ord(letter) % 3]
    inputs = {"pixel_values": noise(letter, h * w, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, h, w]])}
    return placeholders(inputs, h * w // 4)


TINY = {"qwen2_5_vl": Tiny(build_qwen2_5_vl, image, types="mm_token_type_ids")}
