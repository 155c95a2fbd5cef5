"""Idefics3 and SmolVLM: a SigLIP-like tower without CLS, pixel shuffle, all tiles of a sample in one entry.

The processor gives [samples, tiles, 3, H, W]: a sample's images, each cut into square tiles and a small copy of the
whole, behind one another, filled up with tiles of zeros. The encoder skips these and returns one entry a sample, and
nothing in the model's inputs says where one image ends. So **a sample is one picture here, with one view a tile**, in
the order of the prompt: `keep` counts (or is the share of) the visual tokens of a whole sample, all its images
together, and reports list samples. Samples without images are left out. The tokens between the tiles (their row and
column, "global image") are text and stay.
A usual prompt holds an image of 13 tiles (what `flops=` is solved for).

Where `pixel_attention_mask` hides a part of a tile, the tower's masks hide its keys; the queries there run all the
same and count in means over queries, as they do in the tower.
"""

from __future__ import annotations

from typing import Any

import torch

from vlmfast.families.base import Encoded, Family, Source, merged_raster
from vlmfast.families.clip import tower_flops
from vlmfast.towers import Grid, Picture, Tower, Vision
from vlmfast.visual import View, VisualTokens


def _tower(config: Any) -> Tower:
    depth = config.vision_config.num_hidden_layers
    return Tower(
        depth=depth,
        heads=config.vision_config.num_attention_heads,
        feature_layer=depth - 1,
        full_layers=tuple(range(depth)),
        has_cls=False,
        merge=config.scale_factor,
    )


def _vision(config: Any, grid: Grid) -> Vision:
    """Plain ViT over every tile, pixel shuffle, one matrix without bias. grid: (tiles, h, w) of a sample."""
    tower, merge = config.vision_config, config.scale_factor
    tiles, h, w = grid
    if h != w or h % merge:
        raise ValueError(
            f"tiles of {config.model_type} are squares whose side is a multiple of {merge}, got {tuple(grid)}"
        )
    d = tower.hidden_size
    tokens = tiles * (h // merge) * (w // merge)
    spans = ((h * w,) * tiles,) * tower.num_hidden_layers
    return Vision(
        tower=tower_flops(tower, tiles, h * w, spans),
        projector=2 * tokens * d * merge**2 * config.text_config.hidden_size,
        tokens=tokens,
        width=d,
        spans=spans,
    )


def _nominal(config: Any, modality: str) -> Picture:
    """An image of 4 : 3 as the processors of both cut it: 3 x 4 tiles and a small copy."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    tokens = 13 * (side // config.scale_factor) ** 2
    return Picture(patches=(13, side, side), tokens=tokens, span=tokens)


def _layout(encoded: Encoded) -> list[VisualTokens]:
    pixels, merge, patch = encoded.inputs["pixel_values"], encoded.tower.merge, encoded.config.vision_config.patch_size
    h, w = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    rows, columns = h // merge, w // merge
    maps = {
        score: torch.stack([merged_raster(tile, (h, w), merge) for tile in parts[0]])
        for score, parts in encoded.raw.items()
    }  # [tiles, tokens of a tile, ...]
    samples, first = [], 0
    for i, features in enumerate(encoded.output.pooler_output):
        tiles = len(features) // (rows * columns)
        if not tiles:
            continue
        own = slice(first, first + tiles)
        first += tiles
        index = torch.arange(len(features)).view(tiles, rows * columns)
        samples.append(
            VisualTokens(
                features=features,
                grid=(tiles, rows, columns),
                queries=h * w,
                pixels=pixels[i][(pixels[i] != 0).flatten(1).any(1)],
                statistics={score: values[own].flatten(0, 1) for score, values in maps.items()},
                views=tuple(View(part, (rows, columns), cell=(tile, 0)) for tile, part in enumerate(index)),
                patches=(tiles, h, w),
            )
        )
    return samples


def _family(name: str) -> Family:
    return Family(
        name=name,
        blocks=("vision_model.encoder.layers",),
        attention="self_attn",
        positions="compact",
        mrope=False,
        tower=_tower,
        vision=_vision,
        sources={"image": Source(layout=_layout)},
        tiles=True,
        nominal=_nominal,
        tiled=True,
    )


FAMILIES = (_family("idefics3"), _family("smolvlm"))
