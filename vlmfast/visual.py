"""What a method sees of one picture: its visual tokens, their layout, and the statistics it asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

ScoreKind = Literal["cls_row", "last_row", "column_mean", "row_mean", "key", "hidden", "cls_hidden"]


@dataclass(frozen=True)
class Score:
    """A statistic of one layer of the vision tower, fp32, one value (or one vector) per token of the tower.

    layer: 0-based index of the block. Negative values are not allowed: a score is a key of dictionaries.
    kind: of the attention, averaged over heads: `cls_row` the row of the CLS query; `last_row` the row of the last
        query; `column_mean` the mean over queries, that is the attention a key receives; `row_mean` the mean over
        keys, per query. Vectors: `key` the head-mean of the keys [d]; `hidden` the block's output [C]; `cls_hidden`
        that of the CLS token, the same for every token of a view [C].
    softmax: statistics of softmax(q k^T / sqrt(d)); False: of the scaled logits before the softmax.
    patches: queries and keys of the mean are patches alone, CLS is left out (the softmax still runs over all keys).
    """

    layer: int
    kind: ScoreKind
    softmax: bool = True
    patches: bool = False

    @property
    def vector(self) -> bool:
        """Whether the statistic is a vector per token, which costs no attention."""
        return self.kind in ("key", "hidden", "cls_hidden")


@dataclass(frozen=True)
class View:
    """One part of a picture that went through the tower by itself: the whole image, a crop of it, a frame.

    index: [h * w] where its tokens stand among the picture's, in the view's own raster order. grid: (h, w) of these
    tokens (padding that never enters the prompt is cut off already). kind: "image", "thumbnail", "crop" or "frame".
    cell: (row, column) of a crop in the crops' grid; number of a frame as (frame, 0). region: (top, left, bottom,
    right) of the picture that the view shows, as fractions.
    """

    index: Tensor
    grid: tuple[int, int]
    kind: Literal["image", "thumbnail", "crop", "frame"] = "image"
    cell: tuple[int, int] = (0, 0)
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one picture (an image or a video) as they would enter the language model.

    features: [N, D], in the order of the prompt: raster order over `grid` where there is one view.
    grid: (t, h, w) of the tokens; t * h * w = N where all views have one size, else (1, 1, N).
    queries: number of rows of the tower's attention over one view (patches, and CLS where there is one):
        column_mean * queries = attention mass received.
    pixels: the processor's values of this picture (only read, for methods whose choice depends on the image alone).
    statistics: every statistic that was taken, mapped to the N tokens (merged patches averaged), fp32.
    scores: the statistics the current method asked for, under its own names.
    views: its parts; none given: one view of the whole grid, or one a frame where t > 1.
    patches: (t, h, w) in patches before merging, of all views together: what the tower had to do.
    slots: [N] the tokens' places among the picture's placeholders, ascending; None: all of them. Other places hold
        `newline` [D], or [span - N, D] where each holds something of its own, such as the CLS token of its frame.
    span: number of placeholders, N where there are no newlines.
    deepstack: [N, D] for each decoder layer that adds features of its own.
    text: [T, D] input embeddings of the question, for methods that ask for it (`uses_text`).
    project: maps tower features [n, C] to visual tokens [n, D] where the family's projector works token by token.
    """

    features: Tensor
    grid: tuple[int, int, int]
    queries: int
    pixels: Tensor | None = None
    statistics: Mapping[Score, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    views: Sequence[View] = ()
    patches: tuple[int, int, int] = (0, 0, 0)
    slots: Tensor | None = None
    span: int = 0
    newline: Tensor | None = None
    deepstack: Sequence[Tensor] = ()
    text: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.views:
            object.__setattr__(self, "views", frames(self.grid))
        if not self.span:
            object.__setattr__(self, "span", len(self))

    def __len__(self) -> int:
        return self.features.shape[0]

    def spread(self, features: Tensor) -> Tensor:
        """Features of all tokens [N, D] -> of all placeholders [span, D]: newlines put in."""
        if self.slots is None:
            return features
        if self.newline is None:
            raise ValueError("placeholders without a token need `newline`")
        whole, slots = features.new_empty(self.span, features.shape[-1]), self.slots.to(features.device)
        other = torch.ones(self.span, dtype=torch.bool, device=features.device)
        other[slots] = False
        whole[slots] = features
        whole[other] = self.newline.to(features).expand(self.span - len(self), -1)
        return whole


@dataclass(frozen=True)
class Choice:
    """What a method keeps of one picture.

    kept: [K] indices of visual tokens, ascending. features: [K, D] what stands in their places, None: their own.
    slots: [M] placeholders that stay, ascending, for a method that decides over newlines or the order of the sequence
    itself: `features` is then [M, D].
    """

    kept: Tensor
    features: Tensor | None = None
    slots: Tensor | None = None


def frames(grid: tuple[int, int, int], video: bool = False) -> tuple[View, ...]:
    """The views of a picture whose tokens lie in raster order over (t, h, w): one, or one a frame. video: a single
    one is a frame, too."""
    t, h, w = grid
    index = torch.arange(t * h * w).view(t, h * w)
    if t == 1 and not video:
        return (View(index[0], (h, w)),)
    return tuple(View(index[i], (h, w), "frame", (i, 0)) for i in range(t))


def is_video(views: Sequence[View]) -> bool:
    """Whether a picture has frames to compare: not an image, nor a video of one frame."""
    return sum(view.kind == "frame" for view in views) > 1


def frame_index(views: Sequence[View]) -> Tensor:
    """Where the tokens of a video's frames stand among its tokens, a row a frame in order of time. -> [F, n]

    Raises ValueError without two frames, or when frames differ in size.
    """
    index = [view.index for view in views if view.kind == "frame"]
    if not is_video(views):
        raise ValueError(f"a video of two frames or more is needed, got {len(index)} frame(s)")
    if len(set(map(len, index))) > 1:
        raise ValueError(f"frames of different sizes: {', '.join(str(len(one)) for one in index)} tokens")
    return torch.stack(index)


def apportion(k: int, sizes: Sequence[int]) -> list[int]:
    """`k` tokens shared out over views in proportion to their sizes, by largest remainder, ties to earlier views.

    Raises ValueError when k exceeds the sum of the sizes.
    """
    total = sum(sizes)
    if not 0 <= k <= total:
        raise ValueError(f"{k} tokens of views that have {total}")
    shares = [k * size // total for size in sizes]
    left = sorted(range(len(sizes)), key=lambda i: (-(k * sizes[i] % total), i))[: k - sum(shares)]
    return [share + (i in left) for i, share in enumerate(shares)]


def check_keep(keep: float | int) -> None:
    """Raise ValueError unless `keep` is a share in (0, 1] (float) or a positive number of tokens (int)."""
    explain = "a float in (0, 1] is the share of visual tokens, an int >= 1 their number per image"
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"keep={keep!r}: {explain}")
    if isinstance(keep, float) and not (0 < keep <= 1):  # NaN fails every comparison
        raise ValueError(f"keep={keep!r}: {explain}")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"keep={keep!r}: {explain}")


def budget(keep: float | int, n: int) -> int:
    """Number of tokens that `keep` means for an image of `n` visual tokens, at least 1.

    Shares are rounded to the nearest token, halves to even, as the authors' codes do.
    Raises ValueError when an int asks for more tokens than there are.
    """
    check_keep(keep)
    if isinstance(keep, int):
        if keep > n:
            raise ValueError(f"keep={keep} visual tokens, but the image has only {n}; use keep <= {n} or a share")
        return keep
    return max(1, round(keep * n))


def top(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest scores, descending. scores: [..., N] -> [..., k]; computed in fp32.

    Equal scores are ordered by index, so that the choice does not depend on the device.
    """
    return scores.float().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def unit(features: Tensor) -> Tensor:
    """Features of length one, fp32; those of length zero stay zero: orthogonal to all. [..., D]"""
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


class Cosines:
    """Cosines of tokens to all others, a row when it is asked for: greedy choices need few, and never all pairs.

    A row alone reads all features for one product each. So rows that will probably be asked for come along: `likely`
    ranks the tokens, and in a greedy choice the next ones are among the best now, four times out of five or more.
    """

    AHEAD = 16

    def __init__(self, x: Tensor) -> None:
        """x: [N, D] of length one."""
        self.x = x
        self.rows: dict[int, Tensor] = {}

    def row(self, token: int, likely: Tensor) -> Tensor:
        """Cosines of a token to all. likely: [N] scores, the largest of those asked for next -> [N]"""
        if token not in self.rows:
            ahead = likely.topk(min(self.AHEAD, len(likely))).indices.tolist()
            wanted = [token, *(i for i in ahead if i != token and i not in self.rows)]
            self.rows.update(zip(wanted, self.x[wanted] @ self.x.T))
        return self.rows[token]


def window_order(grid: tuple[int, int, int], window: int) -> Tensor:
    """Raster indices of merged tokens in the order in which a windowed tower holds them. -> [t * h * w]

    grid: (t, h, w) of merged tokens; window: tokens per side of a window. Windows go row by row, and so do the tokens
    inside one; windows at the right and lower border are cut.
    """
    t, h, w = grid
    index = torch.arange(t * h * w).view(t, h, w)
    parts = [
        index[frame, top_row : top_row + window, left : left + window].flatten()
        for frame in range(t)
        for top_row in range(0, h, window)
        for left in range(0, w, window)
    ]
    return torch.cat(parts)


def mean_over(groups: Tensor, size: int) -> Tensor:
    """Mean of each run of `size` consecutive values: [N * size, ...] -> [N, ...]."""
    return groups.unflatten(0, (-1, size)).mean(dim=1)
