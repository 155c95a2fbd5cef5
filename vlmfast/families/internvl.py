"""InternVL: InternViT with CLS, 2 x 2 patches shuffled into one token, an image as several tiles.

The processor cuts an image into square tiles of one size and a thumbnail and hands all tiles of a batch over in one
row; nothing in the model's inputs says which tiles belong together. So every tile is a picture of its own here:
`keep` counts the tokens of a tile, and reports list tiles. Frames of a video are tiles, too.
"""

from __future__ import annotations

from typing import Any

from vlmfast.families.base import Family, Source, feature_block
from vlmfast.families.clip import merged_views
from vlmfast.towers import Grid, Tower, Vision, pair, vit_flops


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
    patch_h, patch_w = pair(tower.patch_size)
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


INTERNVL = Family(
    name="internvl",
    blocks=("vision_tower.encoder.layer",),
    attention="attention",
    positions="compact",
    mrope=False,
    tower=_tower,
    vision=_vision,
    sources={"image": Source(layout=merged_views, container="tensor")},
    cls=True,
    tiled=True,
)

FAMILIES = (INTERNVL,)
