"""Model families as data: everything that differs between them, so that nothing else asks for a model's type."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlmfast.visual import Score, VisualTokens, mean_over, window_order

Positions = Literal["original", "compact"]


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The vision tower, read from a config.

    depth, heads: of its blocks. feature_layer: 0-based block whose output becomes the visual tokens.
    full_layers: blocks whose attention spans the whole image (the others have windows: their scores do not compare).
    has_cls: token 0 of the tower is CLS and leaves before the projector.
    merge: patches per side of a visual token; window: visual tokens per side of an attention window, 0 without.
    """

    depth: int
    heads: int
    feature_layer: int
    full_layers: tuple[int, ...]
    has_cls: bool
    merge: int = 1
    window: int = 0

    def check(self, score: Score) -> None:
        """Raise ValueError when this tower cannot give the statistic."""
        if not 0 <= score.layer < self.depth:
            raise ValueError(f"layer {score.layer} of a vision tower with {self.depth} layers (0-based)")
        if score.layer not in self.full_layers:
            raise ValueError(
                f"layer {score.layer} of this vision tower attends inside windows, so its scores do not compare "
                f"between windows; layers with full attention: {', '.join(map(str, self.full_layers))}"
            )
        if score.kind == "cls_row" and not self.has_cls:
            raise ValueError("this vision tower has no CLS token")

    def nearest_full_layer(self, share: float) -> int:
        """The full-attention block nearest to this share of the depth (1-based count, as papers give it)."""
        return min(self.full_layers, key=lambda layer: (abs((layer + 1) / self.depth - share), layer))


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    blocks: dotted paths from the base model to the tower's blocks, first that exists; attention: from a block to its
    attention module. positions: what the authors' codes do with position ids of kept tokens. mrope: positions have
    three axes. tower: config -> Tower. layout: maps features and raw statistics to one VisualTokens an image.
    """

    name: str
    blocks: tuple[str, ...]
    attention: str
    positions: Positions
    mrope: bool
    tower: Callable[[Any], Tower]
    layout: Callable[
        [Tower, Any, Mapping[str, Any], Sequence[Tensor], Mapping[Score, list[Tensor]]], list[VisualTokens]
    ]

    def attention_modules(self, base: Any) -> list[Any]:
        """The attention module of every block of the vision tower."""
        return [_follow(block, self.attention) for block in _first(base, self.blocks)]


def _follow(root: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), root)


def _first(root: Any, paths: Sequence[str]) -> Any:
    for path in paths:
        try:
            return _follow(root, path)
        except AttributeError:
            continue
    raise NotImplementedError(
        f"{type(root).__name__} has none of {', '.join(paths)}: an unknown layout of this family"
    )


def _clip_tower(config: Any) -> Tower:
    vision, layer = config.vision_config, config.vision_feature_layer
    if vision.model_type != "clip_vision_model":
        raise NotImplementedError(f"llava with a {vision.model_type} tower; supported: clip_vision_model")
    if config.vision_feature_select_strategy != "default":
        raise NotImplementedError(
            f"llava with vision_feature_select_strategy={config.vision_feature_select_strategy!r}; supported: default"
        )
    if not isinstance(layer, int):
        raise NotImplementedError(f"llava with several feature layers {layer}; supported: one, as an int")
    depth = vision.num_hidden_layers
    feature = depth + layer if layer < 0 else layer - 1
    return Tower(
        depth=depth,
        heads=vision.num_attention_heads,
        feature_layer=feature,
        full_layers=tuple(range(depth)),
        has_cls=True,
    )


def _clip_layout(
    tower: Tower,
    config: Any,
    inputs: Mapping[str, Any],
    features: Sequence[Tensor],
    raw: Mapping[Score, list[Tensor]],
) -> list[VisualTokens]:
    pixels = inputs["pixel_values"]
    patch = config.vision_config.patch_size
    grid = (1, pixels.shape[-2] // patch, pixels.shape[-1] // patch)
    maps = {score: parts[0][:, 1:] for score, parts in raw.items()}  # the CLS key leaves with its feature
    return [
        VisualTokens(
            features=image,
            grid=grid,
            queries=len(image) + 1,
            pixels=pixels[i],
            statistics={score: values[i] for score, values in maps.items()},
        )
        for i, image in enumerate(features)
    ]


def _qwen_tower(config: Any) -> Tower:
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


def _qwen_layout(
    tower: Tower,
    config: Any,
    inputs: Mapping[str, Any],
    features: Sequence[Tensor],
    raw: Mapping[Score, list[Tensor]],
) -> list[VisualTokens]:
    grids = [tuple(int(side) for side in grid) for grid in inputs["image_grid_thw"].tolist()]
    patches = [t * h * w for t, h, w in grids]
    pixels = inputs["pixel_values"].split(patches)
    maps = {score: torch.cat(parts, dim=1)[0].split(patches) for score, parts in raw.items()}
    images = []
    for i, (t, h, w) in enumerate(grids):
        grid = (t, h // tower.merge, w // tower.merge)
        order = window_order(grid, tower.window)
        statistics = {score: window_to_raster(parts[i], order, tower.merge) for score, parts in maps.items()}
        images.append(
            VisualTokens(features=features[i], grid=grid, queries=h * w, pixels=pixels[i], statistics=statistics)
        )
    return images


def window_to_raster(patches: Tensor, order: Tensor, merge: int) -> Tensor:
    """Values of patches in window order -> values of merged tokens in raster order. [N * merge^2] -> [N]

    order: `window_order` of the merged grid; a merged token's value is the mean over its patches.
    """
    merged = mean_over(patches, merge * merge)
    raster = torch.empty_like(merged)
    raster[order.to(merged.device)] = merged
    return raster


FAMILIES: dict[str, Family] = {
    "llava": Family(
        name="llava",
        blocks=("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers"),
        attention="self_attn",
        positions="compact",
        mrope=False,
        tower=_clip_tower,
        layout=_clip_layout,
    ),
    "qwen2_5_vl": Family(
        name="qwen2_5_vl",
        blocks=("visual.blocks",),
        attention="attn",
        positions="original",
        mrope=True,
        tower=_qwen_tower,
        layout=_qwen_layout,
    ),
}


def family_of(model_or_config: Any) -> Family:
    """The family of a model or config. Raises NotImplementedError that names the supported ones."""
    config = getattr(model_or_config, "config", model_or_config)
    name = getattr(config, "model_type", type(model_or_config).__name__)
    if name not in FAMILIES:
        raise NotImplementedError(
            f"model family {name!r} is not supported{did_you_mean(str(name), FAMILIES)}; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def did_you_mean(word: str, choices: Any) -> str:
    """A hint such as ' (did you mean keep?)', empty when nothing is close."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
