"""CLIP and SigLIP towers, as the LLaVA families use them: what they can be asked for and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vlmfast.families.base import Encoded, Source, merged_raster
from vlmfast.towers import Grid, Tower, Vision, pair, vit_flops
from vlmfast.visual import Score, VisualTokens

HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False}  # by `model_type`: whether token 0 is CLS

BLOCKS = ("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers")


def has_cls(config: Any) -> bool:
    """Whether the tower's token 0 is CLS. Raises NotImplementedError for towers that are not known."""
    kind = config.vision_config.model_type
    if kind not in HAS_CLS:
        raise NotImplementedError(f"{config.model_type} with a {kind} tower; supported: {', '.join(HAS_CLS)}")
    return HAS_CLS[kind]


def cls_stays(config: Any) -> bool:
    """Whether the CLS token of an image enters the prompt.

    Raises NotImplementedError where the strategy "default" would cut off a patch for want of a CLS token.
    """
    strategy = getattr(config, "vision_feature_select_strategy", "default")  # vipllava always cuts token 0
    if has_cls(config):
        return bool(strategy == "full")
    if strategy == "default":
        raise NotImplementedError(
            f"{config.model_type} with a {config.vision_config.model_type} tower and "
            "vision_feature_select_strategy='default', which cuts off its first patch: the tower has no CLS token; "
            "supported: 'full'"
        )
    return False


def vit_tower(config: Any) -> Tower:
    """The tower of a LLaVA config. Raises NotImplementedError for towers and settings that are not supported."""
    cls_stays(config)
    depth, chosen = config.vision_config.num_hidden_layers, config.vision_feature_layer
    layers = [chosen] if isinstance(chosen, int) else list(chosen)
    blocks = [depth + layer if layer < 0 else layer - 1 for layer in layers]  # hidden state 0 is the embedding
    if not blocks or not 0 <= max(blocks) < depth or min(blocks) < -1:
        raise NotImplementedError(
            f"{config.model_type} with vision_feature_layer={chosen!r}; supported: hidden states of a tower with "
            f"{depth} blocks, at least one of them after a block"
        )
    return Tower(
        depth=depth,
        heads=config.vision_config.num_attention_heads,
        feature_layer=max(blocks),
        full_layers=tuple(range(depth)),
        has_cls=has_cls(config),
        layers=len(blocks),
    )


def vit_vision(
    config: Any, grid: Grid, *, cls: bool | None = None, projected: int | None = None, tokens: int | None = None
) -> Vision:
    """Tower and two-layer projector on `grid` = (views, h, w); every view goes through the tower by itself.

    transformers computes all layers of the tower, also where the features come from an earlier one, and SigLIP's
    pooling head where the config has one. cls: whether the CLS token is projected, too, None: as for images.
    projected: tokens of a view that the projector sees, None: its patches, and CLS. tokens: of the prompt, None: those
    projected.
    """
    tower = config.vision_config
    views, height, width = grid
    patches, d = height * width, tower.hidden_size
    n = patches + has_cls(config)
    cls = cls_stays(config) if cls is None else cls
    projected = patches + cls if projected is None else projected
    spans = ((n,) * views,) * tower.num_hidden_layers
    chosen = config.vision_feature_layer
    inner = d if isinstance(chosen, int) else d * len(chosen)
    out = config.text_config.hidden_size
    return Vision(
        tower=tower_flops(tower, views, patches, spans),
        projector=views * 2 * projected * (inner * out + out * out),
        tokens=views * projected if tokens is None else tokens,
        width=d,
        spans=spans,
    )


def tower_flops(tower: Any, views: int, patches: int, spans: Sequence[Sequence[int]]) -> int:
    """FLOPs of the tower on `views` of `patches` each, SigLIP's pooling head included where the config has one.

    tower: the vision config; spans: per layer the numbers of tokens that attend to each other.
    """
    d, ff = tower.hidden_size, tower.intermediate_size
    flops = vit_flops(
        patches=views * patches,
        patch_values=tower.num_channels * tower.patch_size**2,
        width=d,
        ff=ff,
        matrices=2,
        spans=spans,
    )
    if getattr(tower, "vision_use_head", False):  # one query attends to all patches; then a feed-forward net
        flops += views * (2 * (2 * d * d + 2 * patches * d * d + 2 * d * ff) + 4 * patches * d)
    return flops


def check_call(encoded: Encoded) -> None:
    """Raise NotImplementedError when the call chose its own feature layer or strategy: the statistics are those of the
    config's.
    """
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        given, own = encoded.inputs.get(name), getattr(encoded.config, name, None)
        if given is not None and own is not None and _plain(given) != _plain(own):
            raise NotImplementedError(f"{name}={given!r} in the call; set it in the config before patching: {own!r}")


def patch_maps(encoded: Encoded) -> dict[Score, Tensor]:
    """The statistics of all views, without CLS. -> [views, patches] or, for vectors, [views, patches, c]

    Raises NotImplementedError as `check_call` does.
    """
    check_call(encoded)
    first = int(encoded.tower.has_cls)
    return {score: parts[0][:, first:] for score, parts in encoded.raw.items()}


def merged_views(encoded: Encoded) -> list[VisualTokens]:
    """Every view a picture of its own, squares of patches (`Tower.merge` a side) merged into one token each."""
    pixels, tower = encoded.inputs["pixel_values"], encoded.tower
    height, width = pair(encoded.config.vision_config.patch_size)
    h, w = pixels.shape[-2] // height, pixels.shape[-1] // width
    maps = patch_maps(encoded)
    return [
        VisualTokens(
            features=view,
            grid=(1, h // tower.merge, w // tower.merge),
            queries=h * w + tower.has_cls,
            pixels=pixels[i],
            statistics={score: merged_raster(values[i], (h, w), tower.merge) for score, values in maps.items()},
            patches=(1, h, w),
        )
        for i, view in enumerate(encoded.output.pooler_output)
    ]


def videos(
    layout: Callable[[Encoded], list[VisualTokens]],
    vision: Callable[[Any, Grid], Vision],
    blocks: tuple[str, ...] | None = None,
) -> Source:
    """Videos that go through `get_video_features`, which gives one tensor for all of them."""
    return Source(
        layout=layout,
        token="video_token_id",
        pixels="pixel_values_videos",
        encode="get_video_features",
        container="tensor",
        vision=vision,
        blocks=blocks,
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
