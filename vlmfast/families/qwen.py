"""Qwen-VL families: dynamic resolution, merged patches, M-RoPE."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from vlmfast.families.base import Encoded, Family, Source, window_to_raster
from vlmfast.towers import Grid, Tower, Vision, vit_flops
from vlmfast.visual import VisualTokens, window_order


def _qwen2_5_tower(config: Any) -> Tower:
    vision = config.vision_config
    return Tower(
        depth=vision.depth,
        heads=vision.num_heads,
        feature_layer=vision.depth - 1,
        full_layers=tuple(sorted(vision.fullatt_block_indexes)),
        has_cls=False,
        merge=vision.spatial_merge_size,
        window=vision.window_size // vision.patch_size // vision.spatial_merge_size,
    )


def _qwen2_5_layout(encoded: Encoded) -> list[VisualTokens]:
    tower = encoded.tower
    grids = [tuple(int(side) for side in grid) for grid in encoded.inputs["image_grid_thw"].tolist()]
    patches = [t * h * w for t, h, w in grids]
    pixels = encoded.inputs["pixel_values"].split(patches)
    maps = {score: torch.cat(parts, dim=1)[0].split(patches) for score, parts in encoded.raw.items()}
    images = []
    for i, (t, h, w) in enumerate(grids):
        grid = (t, h // tower.merge, w // tower.merge)
        order = window_order(grid, tower.window)
        statistics = {score: window_to_raster(parts[i], order, tower.merge) for score, parts in maps.items()}
        images.append(
            VisualTokens(
                features=encoded.output.pooler_output[i],
                grid=grid,
                queries=h * w,
                pixels=pixels[i],
                statistics=statistics,
                patches=(t, h, w),
            )
        )
    return images


def _qwen2_5_vision(config: Any, grid: Grid) -> Vision:
    """Tower with window and full-attention layers (full within one frame), gated feed-forward nets, patch merger."""
    tower = config.vision_config
    merge = tower.spatial_merge_size
    frames, height, width = grid
    if height % merge or width % merge:
        raise ValueError(f"h and w of a patch grid must be multiples of {merge}, got {tuple(grid)}")
    patches, d = prod(grid), tower.hidden_size
    side = tower.window_size // merge // tower.patch_size  # of a window, in merged tokens
    windows = tuple(
        rows * columns * merge**2
        for _ in range(frames)
        for rows in _chunks(height // merge, side)
        for columns in _chunks(width // merge, side)
    )
    whole = (height * width,) * frames
    spans = tuple(whole if i in tower.fullatt_block_indexes else windows for i in range(tower.depth))
    merged = d * merge**2
    return Vision(
        tower=vit_flops(
            patches=patches,
            patch_values=tower.in_channels * tower.temporal_patch_size * tower.patch_size**2,
            width=d,
            ff=tower.intermediate_size,
            matrices=3,
            spans=spans,
        ),
        projector=2 * (patches // merge**2) * (merged * merged + merged * tower.out_hidden_size),
        tokens=patches // merge**2,
        width=d,
        spans=spans,
    )


def _chunks(length: int, size: int) -> list[int]:
    """A length cut into pieces of `size` and a smaller rest, if there is one."""
    return [min(size, length - start) for start in range(0, length, size)]


QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    blocks=("visual.blocks",),
    attention="attn",
    positions="original",
    mrope=True,
    tower=_qwen2_5_tower,
    vision=_qwen2_5_vision,
    sources={"image": Source(layout=_qwen2_5_layout)},
)

FAMILIES = (QWEN2_5_VL,)
