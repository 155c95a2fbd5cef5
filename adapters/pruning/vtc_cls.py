"""VTC-CLS: keep the tokens the CLS token attends to in several layers of the vision tower.

Paper: [CLS] Token Tells Everything Needed for Training-free Efficient MLLMs (Wang et al. 2024), arXiv:2412.05819
Code:  https://github.com/THU-MIG/VTC-CLS (e41ac9b)

    s_j = sum_{l in layers} mean_h softmax(q_CLS k_j / sqrt(d))      (the paper's average ranks alike)
    keep the largest, in raster order                                (per view; per frame)

Layers, 0-based, of a tower whose features leave after layer F (F = L - 2 of L = 24 in the papers' CLIP-L):
`preset="paper"` the three layers up to F (20, 21, 22); `preset="repo"` the default of the repository's command line,
16 to F, scaled to the depth of other towers; `layers` any others: "20-22", "16/20/22" or, in code, a tuple. Where a
tower has windows, only layers with full attention count.

Shapes: CLS rows [S, N] -> s [N] -> kept [budget].

Differs from the authors' code: rows and sum in fp32 (theirs: fp16); equal scores go by index; a budget of one token
works (theirs raises), as does any grid (theirs: up to 576 tokens) and any number of views (theirs then reads head 0
of the views' mean). Towers without CLS: theirs has no such path; `fallback="received"` takes the attention received
from all patches in the same layers, without it such a tower is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmfast.adapters.pruning.base import ClsPruner
from vlmfast.families import Tower
from vlmfast.visual import Score, VisualTokens, top


def ensemble(rows: Sequence[Tensor]) -> Tensor:
    """The score of every token: its CLS attention summed over layers, fp32. [S] x [..., N] -> [..., N]"""
    return torch.stack([row.float() for row in rows]).sum(dim=0)


def parse_layers(layers: str | int | tuple[int, ...]) -> tuple[int, ...]:
    """0-based layers, ascending, of a setting such as 22, "20-22", "16/20-22" or (20, 22); ValueError for others."""
    parts = list(map(str, layers)) if isinstance(layers, tuple) else str(layers).split("/")
    found: set[int] = set()
    for part in parts or [""]:
        first, dash, last = part.partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.isdecimal() for end in ends) or int(ends[0]) > int(ends[1]):
            raise ValueError(f"layers={layers!r}: 0-based layers such as 22, '20-22' or '16/20/22'")
        found.update(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(found))


@dataclass(frozen=True, kw_only=True)
class VtcCls(ClsPruner):
    """preset: which layers; layers: these instead. fallback: "received" on a tower without CLS, or it is refused."""

    name = "vtc_cls"
    summary = "top visual tokens by CLS attention summed over several layers of the tower"
    paper = "arXiv:2412.05819"
    preset: Literal["paper", "repo"] = "paper"
    layers: str | int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in ("paper", "repo"):
            raise ValueError(f"preset={self.preset!r}: choose 'paper' or 'repo'")
        if self.layers is not None:
            parse_layers(self.layers)
        if isinstance(self.layers, tuple):  # in the spelling that a spec string can hold
            object.__setattr__(self, "layers", "/".join(map(str, self.layers)))

    def chosen(self, tower: Tower) -> tuple[int, ...]:
        """The 0-based layers whose attention is summed, ascending."""
        if self.layers is not None:
            return parse_layers(self.layers)
        last = tower.feature_layer
        full = [layer for layer in tower.full_layers if layer <= last]
        if self.preset == "paper":
            return tuple(full[-3:])
        first = round(tower.depth * 16 / 24)
        return tuple(layer for layer in full if layer >= first) or tuple(full[-1:])

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """CLS rows of the layers; the attention received where there is no CLS and the fallback is chosen."""
        kind: Literal["cls_row", "column_mean"] = "cls_row" if self.follows_cls(tower) else "column_mean"
        return {str(layer): Score(layer, kind) for layer in self.chosen(tower)}

    def select(self, visual: VisualTokens) -> Tensor:
        """Rows [S] x [N] -> kept [budget]."""
        score = ensemble(list(visual.scores.values()))
        return self.per_view(visual, lambda view, k: top(score[view.index.to(score.device)], k))
