"""The vision side of a model as data: what its tower can be asked for, and what it costs on one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmfast.visual import Score, View

Grid = tuple[int, int, int]  # (t, h, w) in patches, before any merging; t counts views, crops or frames


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The vision tower, read from a config.

    depth, heads: of its blocks. feature_layer: 0-based block whose output becomes the visual tokens.
    full_layers: blocks whose attention spans the whole view (the others have windows: their scores do not compare).
    has_cls: token 0 of the tower is CLS and leaves before the projector.
    merge: patches per side of a visual token; window: visual tokens per side of an attention window, 0 without.
    layers: blocks whose outputs, side by side, are what the projector takes; `feature_layer` is the deepest.
    """

    depth: int
    heads: int
    feature_layer: int
    full_layers: tuple[int, ...]
    has_cls: bool
    merge: int = 1
    window: int = 0
    layers: int = 1

    def check(self, score: Score) -> None:
        """Raise ValueError when this tower cannot give the statistic."""
        if not 0 <= score.layer < self.depth:
            raise ValueError(f"layer {score.layer} of a vision tower with {self.depth} layers (0-based)")
        if score.layer not in self.full_layers and not score.vector:
            raise ValueError(
                f"layer {score.layer} of this vision tower attends inside windows, so its scores do not compare "
                f"between windows; layers with full attention: {', '.join(map(str, self.full_layers))}"
            )
        if score.kind in ("cls_row", "cls_hidden") and not self.has_cls:
            raise ValueError("this vision tower has no CLS token")

    def nearest_full_layer(self, share: float) -> int:
        """The full-attention block nearest to this share of the depth (1-based count, as papers give it)."""
        return min(self.full_layers, key=lambda layer: (abs((layer + 1) / self.depth - share), layer))


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture (an image or a video) by its sizes alone, which is what a cost depends on.

    patches: (t, h, w) before merging, of all views together. tokens: visual tokens. span: placeholders that they take
    up in the prompt, newlines included. frames: of a video, all with tokens / frames visual tokens; 1 for images.
    """

    patches: Grid
    tokens: int
    span: int
    frames: int = 1
    video: bool = False


def size_of(patches: Grid, views: Sequence[View], span: int) -> Picture:
    """The sizes of a picture with these views."""
    frames = sum(view.kind == "frame" for view in views)
    tokens = sum(len(view) for view in views)
    return Picture(patches=patches, tokens=tokens, span=span, frames=max(1, frames), video=frames > 0)


@dataclass(frozen=True, kw_only=True)
class Vision:
    """One picture on the vision side, in FLOPs (2 x multiply-adds of every matrix product that runs).

    tower, projector: FLOPs. tokens: visual tokens of the unpatched prompt. width: of all heads together.
    spans: [layers][spans] numbers of tower tokens that attend to each other.
    """

    tower: int
    projector: int
    tokens: int
    width: int
    spans: tuple[tuple[int, ...], ...]


def vit_flops(
    *, patches: int, patch_values: int, width: int, ff: int, matrices: int, spans: Sequence[Sequence[int]]
) -> int:
    """FLOPs of a plain ViT: patch embedding, and per layer q, k, v, o, a feed-forward net and full attention per span.

    patches: without CLS; patch_values: numbers in a patch; ff: width of the feed-forward net with 2 or 3 `matrices`
    (gated); spans: per layer the numbers of tokens that attend to each other.
    """
    embedding = 2 * patches * patch_values * width
    linear = sum(2 * sum(layer) * (4 * width * width + matrices * width * ff) for layer in spans)
    attention = sum(4 * width * span * span for layer in spans for span in layer)
    return embedding + linear + attention


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
