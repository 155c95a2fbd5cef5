"""Mistral 3: the Pixtral tower over all images of a batch in one sequence, 2 x 2 patches merged into a token.

Images keep their own size. The tower sees all of them in one sequence, with a mask that keeps them apart and positions
of two axes; statistics are taken image by image. The masked pairs of different images are multiplied all the same
(but for flash attention), which the cost of one image does not know of.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor
from typing import Any

import torch

from vlmfast.families.base import Encoded, Family, Source, feature_block, merged_raster
from vlmfast.families.clip import check_call
from vlmfast.towers import Grid, Picture, Tower, Vision, vit_flops
from vlmfast.visual import VisualTokens


def _tower(config: Any) -> Tower:
    vision = config.vision_config
    if vision.model_type != "pixtral":
        raise NotImplementedError(f"mistral3 with a {vision.model_type} tower; supported: pixtral")
    return Tower(
        depth=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        feature_layer=feature_block(config),
        full_layers=tuple(range(vision.num_hidden_layers)),
        has_cls=False,
        merge=config.spatial_merge_size,
    )


def _vision(config: Any, grid: Grid) -> Vision:
    """Tower with gated nets, all layers; patch merger; two layers. For one image in a call."""
    tower, merge = config.vision_config, config.spatial_merge_size
    images, h, w = grid
    d, out = tower.hidden_size, config.text_config.hidden_size
    tokens = images * (h // merge) * (w // merge)
    if not tokens:
        raise ValueError(f"an image of mistral3 has {merge} x {merge} patches at least, got {tuple(grid)}")
    spans = ((h * w,) * images,) * tower.num_hidden_layers
    return Vision(
        tower=vit_flops(
            patches=images * h * w,
            patch_values=tower.num_channels * tower.patch_size**2,
            width=d,
            ff=tower.intermediate_size,
            matrices=3,
            spans=spans,
        ),
        projector=2 * tokens * (d * merge**2 * d + d * out + out * out),
        tokens=tokens,
        width=d,
        spans=spans,
    )


def _grids(config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(h, w) in patches of every image."""
    patch = config.vision_config.patch_size
    return [(int(height) // patch, int(width) // patch) for height, width in inputs["image_sizes"]]


def _packed(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    return [h * w for h, w in _grids(config, inputs)]


def _layout(encoded: Encoded) -> list[VisualTokens]:
    check_call(encoded)
    merge, grids = encoded.tower.merge, _grids(encoded.config, encoded.inputs)
    pixels, patch = encoded.inputs["pixel_values"], encoded.config.vision_config.patch_size
    patches = [h * w for h, w in grids]
    maps = {score: torch.cat(parts, dim=1)[0].split(patches) for score, parts in encoded.raw.items()}
    return [
        VisualTokens(
            features=encoded.output.pooler_output[i],
            grid=(1, h // merge, w // merge),
            queries=h * w,
            pixels=pixels[i, :, : h * patch, : w * patch],
            statistics={score: merged_raster(parts[i], (h, w), merge) for score, parts in maps.items()},
            patches=(1, h, w),
        )
        for i, (h, w) in enumerate(grids)
    ]


def _sized(config: Any, size: tuple[int, int], most: int | None) -> Picture:
    """An image as its processor resizes it: the longest side at most the tower's, both whole merged patches."""
    if most is not None:
        raise NotImplementedError("mistral3 limits the longest side of an image, not its pixels")
    merge, patch = config.spatial_merge_size, config.vision_config.patch_size
    ratio = max(1.0, *(side / config.vision_config.image_size for side in size))
    h, w = (ceil(floor(side / ratio) / (patch * merge)) for side in size)
    return Picture(patches=(1, h * merge, w * merge), tokens=h * w, span=h * w)


MISTRAL3 = Family(
    name="mistral3",
    blocks=("vision_tower.transformer.layers",),
    attention="attention",
    positions="compact",
    mrope=False,
    tower=_tower,
    vision=_vision,
    sources={"image": Source(layout=_layout, needs=("image_sizes",), packed=_packed)},
    sized=_sized,
)

FAMILIES = (MISTRAL3,)
