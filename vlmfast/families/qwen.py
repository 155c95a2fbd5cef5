"""Qwen-VL families: dynamic resolution, merged patches, M-RoPE, images and videos through one tower.

The tower sees every frame (two of the video's, the temporal patch) by itself and holds its patches in blocks of
merge x merge, block after block in raster order, so that a token's patches are neighbours. Only Qwen2.5-VL orders the
blocks by windows and puts the merged tokens back at the end. What differs between the families:

                tower                                   placeholders of a video         decoder
    qwen2_vl    full attention, 2 matrices              one run                         Qwen2
    qwen2_5_vl  windows but for some layers, gated      one run; time by the second     Qwen2
    qwen3_vl    full attention, 2 matrices, deepstack   a run a frame, between times    Qwen3, or its experts
    qwen3_5     full attention, 2 matrices              a run a frame, between times    three linear layers, one full
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from vlmfast.families.base import Encoded, Family, Source, window_to_raster
from vlmfast.towers import Grid, Picture, Tower, Vision, vit_flops
from vlmfast.visual import VisualTokens, mean_over, window_order


def _tower(config: Any) -> Tower:
    """A tower with windows where the config tells of some, else one with full attention in every layer."""
    vision = config.vision_config
    windows = getattr(vision, "window_size", None)
    full = range(vision.depth) if windows is None else sorted(vision.fullatt_block_indexes)
    return Tower(
        depth=vision.depth,
        heads=vision.num_heads,
        feature_layer=vision.depth - 1,
        full_layers=tuple(full),
        has_cls=False,
        merge=vision.spatial_merge_size,
        window=0 if windows is None else windows // vision.patch_size // vision.spatial_merge_size,
    )


@dataclass(frozen=True)
class _Layout:
    """The layout of images or videos. pixels, grids: the arguments that hold their patches and their (t, h, w)."""

    pixels: str
    grids: str

    def __call__(self, encoded: Encoded) -> list[VisualTokens]:
        """One VisualTokens a picture; a video's tokens frame by frame."""
        tower, output = encoded.tower, encoded.output
        grids = [(int(t), int(h), int(w)) for t, h, w in encoded.inputs[self.grids].tolist()]
        patches = [prod(grid) for grid in grids]
        pixels = encoded.inputs[self.pixels].split(patches)
        maps = {score: torch.cat(parts, dim=1)[0].split(patches) for score, parts in encoded.raw.items()}
        deepstack = getattr(output, "deepstack_features", None) or []
        pictures = []
        for i, (t, h, w) in enumerate(grids):
            grid = (t, h // tower.merge, w // tower.merge)
            if tower.window:
                order = window_order(grid, tower.window)
                statistics = {score: window_to_raster(parts[i], order, tower.merge) for score, parts in maps.items()}
            else:
                statistics = {score: mean_over(parts[i], tower.merge**2) for score, parts in maps.items()}
            pictures.append(
                VisualTokens(
                    features=output.pooler_output[i],
                    grid=grid,
                    queries=h * w,
                    pixels=pixels[i],
                    statistics=statistics,
                    patches=(t, h, w),
                    deepstack=[layer[i] for layer in deepstack],
                )
            )
        return pictures


IMAGE = Source(layout=_Layout("pixel_values", "image_grid_thw"), needs=("image_grid_thw",))
VIDEO = Source(
    layout=_Layout("pixel_values_videos", "video_grid_thw"),
    token="video_token_id",
    pixels="pixel_values_videos",
    encode="get_video_features",
    needs=("video_grid_thw",),
)


def _cost(config: Any, grid: Grid, *, width: int, ff: int, matrices: int, out: int, mergers: int = 1) -> Vision:
    """Cost of one picture: full attention within a frame or windows, and `mergers` mergers with two matrices each.

    width, ff: of the tower; matrices: of its feed-forward net; out: width of a visual token.
    """
    tower = config.vision_config
    merge = tower.spatial_merge_size
    frames, rows, columns = grid
    if rows % merge or columns % merge:
        raise ValueError(f"h and w of a patch grid must be multiples of {merge}, got {tuple(grid)}")
    whole = (rows * columns,) * frames
    spans = (whole,) * tower.depth
    if getattr(tower, "window_size", None) is not None:
        side = tower.window_size // merge // tower.patch_size  # of a window, in merged tokens
        windows = tuple(
            high * wide * merge**2
            for _ in range(frames)
            for high in _chunks(rows // merge, side)
            for wide in _chunks(columns // merge, side)
        )
        spans = tuple(whole if i in tower.fullatt_block_indexes else windows for i in range(tower.depth))
    patches, merged = prod(grid), width * merge**2
    tokens = patches // merge**2
    return Vision(
        tower=vit_flops(
            patches=patches,
            patch_values=tower.in_channels * tower.temporal_patch_size * tower.patch_size**2,
            width=width,
            ff=ff,
            matrices=matrices,
            spans=spans,
        ),
        projector=mergers * 2 * tokens * (merged * merged + merged * out),
        tokens=tokens,
        width=width,
        spans=spans,
    )


def _chunks(length: int, size: int) -> list[int]:
    """A length cut into pieces of `size` and a smaller rest, if there is one."""
    return [min(size, length - start) for start in range(0, length, size)]


def _qwen2_vision(config: Any, grid: Grid) -> Vision:
    tower = config.vision_config
    ff = int(tower.embed_dim * tower.mlp_ratio)
    return _cost(config, grid, width=tower.embed_dim, ff=ff, matrices=2, out=tower.hidden_size)


def _qwen2_5_vision(config: Any, grid: Grid) -> Vision:
    tower = config.vision_config
    ff, out = tower.intermediate_size, tower.out_hidden_size
    return _cost(config, grid, width=tower.hidden_size, ff=ff, matrices=3, out=out)


def _qwen3_vision(config: Any, grid: Grid) -> Vision:
    """The features of every deepstack layer have a merger of their own."""
    tower = config.vision_config
    ff, out = tower.intermediate_size, tower.out_hidden_size
    mergers = 1 + len(getattr(tower, "deepstack_visual_indexes", ()))
    return _cost(config, grid, width=tower.hidden_size, ff=ff, matrices=2, out=out, mergers=mergers)


def _sized(config: Any, size: tuple[int, int], most: int | None) -> Picture:
    """An image as the processors resize it: sides in whole merged patches, from 4 to `most` pixels' worth of tokens.

    most: None: 16,384 tokens, as the hub's processors have it (that of transformers without a file: 1,280).
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    tower = config.vision_config
    factor = tower.patch_size * tower.spatial_merge_size
    height, width = smart_resize(
        *size, factor=factor, min_pixels=4 * factor**2, max_pixels=16384 * factor**2 if most is None else most
    )
    tokens = height * width // factor**2
    return Picture(patches=(1, height // tower.patch_size, width // tower.patch_size), tokens=tokens, span=tokens)


def _family(name: str, vision: Callable[[Any, Grid], Vision], deepstack: bool = False, hybrid: bool = False) -> Family:
    return Family(
        name=name,
        blocks=("visual.blocks",),
        attention="attn",
        positions="original",
        mrope=True,
        tower=_tower,
        vision=vision,
        sources={"image": IMAGE, "video": VIDEO},
        sized=_sized,
        deepstack=deepstack,
        hybrid=hybrid,
    )


FAMILIES = (
    _family("qwen2_vl", _qwen2_vision),
    _family("qwen2_5_vl", _qwen2_5_vision),
    _family("qwen3_vl", _qwen3_vision, deepstack=True),
    _family("qwen3_vl_moe", _qwen3_vision, deepstack=True),
    _family("qwen3_5", _qwen3_vision, hybrid=True),
    _family("qwen3_5_moe", _qwen3_vision, hybrid=True),
)
