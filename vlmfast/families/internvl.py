"""InternVL: InternViT with CLS, 2 x 2 patches shuffled into one token, an image as several tiles.

The processor cuts an image into square tiles of one size and a thumbnail and hands all tiles of a batch over in one
row; nothing in the model's inputs says which tiles belong together. So every tile is a picture of its own here:
`keep` counts the tokens of a tile, and reports list tiles. Frames of a video are tiles, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmfast.families.base import Encoded, Family, Source, feature_block, merged_raster
from vlmfast.families.clip import patch_maps
from vlmfast.towers import Grid, Tower, Vision, vit_flops
from vlmfast.visual import VisualTokens


def _merge(config: Any) -> int:
    """Patches per side of a visual token."""
    return int(1 / config.downsample_ratio)


def _tower(config: Any) -> Tower:
    vision = config.vision_config
    if vision.model_type != "internvl_vision":
        raise NotImplementedError(f"internvl with a {vision.model_type} tower; supported: internvl_vision")
    if config.vision_feature_select_strategy != "default":
        raise NotImplementedError(
            f"internvl with vision_feature_select_strategy={config.vision_feature_select_strategy!r}; "
            "supported: default"
        )
    if not config.downsample_ratio > 0 or 1 / config.downsample_ratio != _merge(config):
        raise NotImplementedError(f"internvl with downsample_ratio={config.downsample_ratio}; supported: 1 / whole")
    return Tower(
        depth=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        feature_layer=feature_block(config),
        full_layers=tuple(range(vision.num_hidden_layers)),
        has_cls=True,
        merge=_merge(config),
    )


def _vision(config: Any, grid: Grid) -> Vision:
    """InternViT (a CLS token a tile, all layers run), pixel shuffle, layer norm and two layers."""
    tower, merge = config.vision_config, _merge(config)
    tiles, h, w = grid
    if h != w or h % merge:
        raise ValueError(f"tiles of internvl are squares whose side is a multiple of {merge}, got {tuple(grid)}")
    d, n, out = tower.hidden_size, h * w + 1, config.text_config.hidden_size
    patch_h, patch_w = _pair(tower.patch_size)
    tokens = tiles * (h // merge) * (w // merge)
    spans = ((n,) * tiles,) * tower.num_hidden_layers
    return Vision(
        tower=vit_flops(
            patches=tiles * h * w,
            patch_values=tower.num_channels * patch_h * patch_w,
            width=d,
            ff=tower.intermediate_size,
            matrices=2,
            spans=spans,
        ),
        projector=2 * tokens * (d * merge**2 * out + out * out),
        tokens=tokens,
        width=d,
        spans=spans,
    )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _layout(encoded: Encoded) -> list[VisualTokens]:
    pixels, merge = encoded.inputs["pixel_values"], encoded.tower.merge
    patch_h, patch_w = _pair(encoded.config.vision_config.patch_size)
    h, w = pixels.shape[-2] // patch_h, pixels.shape[-1] // patch_w
    maps = patch_maps(encoded)
    return [
        VisualTokens(
            features=tile,
            grid=(1, h // merge, w // merge),
            queries=h * w + 1,
            pixels=pixels[i],
            statistics={score: merged_raster(values[i], (h, w), merge) for score, values in maps.items()},
            patches=(1, h, w),
        )
        for i, tile in enumerate(encoded.output.pooler_output)
    ]


INTERNVL = Family(
    name="internvl",
    blocks=("vision_tower.encoder.layer",),
    attention="attention",
    positions="compact",
    mrope=False,
    tower=_tower,
    vision=_vision,
    sources={"image": Source(layout=_layout, container="tensor")},
    cls=True,
)

FAMILIES = (INTERNVL,)
