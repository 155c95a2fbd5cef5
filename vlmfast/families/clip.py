"""Families with a CLIP tower whose every patch becomes one visual token."""

from __future__ import annotations

from typing import Any

from vlmfast.families.base import Encoded, Family, Source
from vlmfast.towers import Grid, Tower, Vision, vit_flops
from vlmfast.visual import VisualTokens


def clip_tower(config: Any) -> Tower:
    """The CLIP tower of a LLaVA config. Raises NotImplementedError for towers and settings not supported."""
    vision, layer = config.vision_config, config.vision_feature_layer
    family = config.model_type
    if vision.model_type != "clip_vision_model":
        raise NotImplementedError(f"{family} with a {vision.model_type} tower; supported: clip_vision_model")
    if config.vision_feature_select_strategy != "default":
        raise NotImplementedError(
            f"{family} with vision_feature_select_strategy={config.vision_feature_select_strategy!r}; "
            "supported: default"
        )
    if not isinstance(layer, int):
        raise NotImplementedError(f"{family} with several feature layers {layer}; supported: one, as an int")
    depth = vision.num_hidden_layers
    return Tower(
        depth=depth,
        heads=vision.num_attention_heads,
        feature_layer=depth + layer if layer < 0 else layer - 1,
        full_layers=tuple(range(depth)),
        has_cls=True,
    )


def clip_vision(config: Any, grid: Grid) -> Vision:
    """CLIP tower (every view has its own CLS token) and two-layer projector.

    transformers computes all layers of the tower, also where the features come from an earlier one.
    """
    tower = config.vision_config
    if tower.model_type != "clip_vision_model":
        raise NotImplementedError(
            f"no cost model for a {config.model_type} with the tower {tower.model_type!r}; there is one for "
            "'clip_vision_model'"
        )
    views, height, width = grid
    patches, d = height * width, tower.hidden_size
    n = patches + 1
    spans = ((n,) * views,) * tower.num_hidden_layers
    selected = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    tokens = patches if config.vision_feature_select_strategy == "default" else n
    out = config.text_config.hidden_size
    return Vision(
        tower=vit_flops(
            patches=views * patches,
            patch_values=tower.num_channels * tower.patch_size**2,
            width=d,
            ff=tower.intermediate_size,
            matrices=2,
            spans=spans,
        ),
        projector=views * 2 * tokens * (selected * d * out + out * out),
        tokens=views * tokens,
        width=d,
        spans=spans,
    )


def _llava_layout(encoded: Encoded) -> list[VisualTokens]:
    pixels = encoded.inputs["pixel_values"]
    patch = encoded.config.vision_config.patch_size
    h, w = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    maps = {score: parts[0][:, 1:] for score, parts in encoded.raw.items()}  # the CLS key leaves with its feature
    return [
        VisualTokens(
            features=image,
            grid=(1, h, w),
            queries=len(image) + 1,
            pixels=pixels[i],
            statistics={score: values[i] for score, values in maps.items()},
            patches=(1, h, w),
        )
        for i, image in enumerate(encoded.output.pooler_output)
    ]


LLAVA = Family(
    name="llava",
    blocks=("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers"),
    attention="self_attn",
    positions="compact",
    mrope=False,
    tower=clip_tower,
    vision=clip_vision,
    sources={"image": Source(layout=_llava_layout)},
    projector="multi_modal_projector",
    cls=True,
)

FAMILIES = (LLAVA,)
