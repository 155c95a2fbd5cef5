"""VisPruner: important tokens by CLS attention, and diverse ones among the rest.

Paper: Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs (Zhang et al.,
       ICCV 2025), arXiv:2412.01818v2
Code:  https://github.com/Theia-4869/VisPruner (aefa01a)

    s_j = mean_h softmax(q_CLS k_j / sqrt(d))      in the layer whose output becomes the features
    important = top int(K `important`) of s
    rest, in order of s; while more than K - |important| are left: take the tokens at even places as candidates, those
    at odd places as their partners; drop the min(8, surplus) candidates with the largest cosine to any partner; the
    order is now candidates by that cosine, largest first, then partners

Shapes: s [N], features h [N, C] (the tower's output before the projector, of the deepest layer it takes; mean over
the patches of a merged token) -> kept [K]. Per view, the budget shared out by size.

NUMERICALLY CHAOTIC: hundreds of close cosines are sorted, and two that swap places change the parity of all behind
them. On random features the 64 kept of 576 differ by 10 between fp32 and fp64, and by 26 when the features were
rounded to 16 bits. Everything is fp32 here, from unrounded features, and one device gives one result; two devices, or
two models that differ in the last digit, need not agree.

Differs from the authors' code, where theirs cannot go on (elsewhere the two agree):
- an odd number of tokens is left: the candidates are one more than the partners (theirs: IndexError);
- fewer candidates than are to be dropped: all of them go in this round (theirs: an error or a wrong count);
- a feature of length zero is orthogonal to all (theirs: NaN); equal values go by index.
Towers without CLS: `fallback="received"` uses the attention received from all patches; without it they are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.adapters.pruning.base import ClsPruner
from vlmfast.decoders import Sizes
from vlmfast.families import Tower
from vlmfast.towers import Picture
from vlmfast.visual import Score, View, VisualTokens, top, unit

DROPPED = 8  # tokens a round


def diverse(order: Tensor, features: Tensor, k: int) -> Tensor:
    """Thin tokens out until k are left. order: [R] indices in order of importance, features: [N, C] -> [k]"""
    if k == 0:
        return order[:0]
    x = unit(features[order])
    cosine = x @ x.T  # every round needs a part of it
    left = torch.arange(len(order), device=order.device)
    while len(left) > k:
        candidates, partners = left[::2], left[1::2]
        similarity = cosine[candidates[:, None], partners].amax(dim=1)
        ranked = candidates[top(similarity, len(candidates))]
        drop = min(DROPPED, len(left) - k, len(candidates))
        left = torch.cat([ranked[drop:], partners])
    return order[left]


def important_and_diverse(score: Tensor, features: Tensor, k: int, important: float) -> tuple[Tensor, Tensor]:
    """The two parts of a choice of k tokens. score: [N], features: [N, C] -> indices [int(k important)], [the rest]"""
    order = top(score, len(score))
    first = int(k * important)
    return order[:first], diverse(order[first:], features, k - first)


@dataclass(frozen=True, kw_only=True)
class VisPruner(ClsPruner):
    """important: share of the budget for tokens CLS attends to. fallback: on a tower without CLS ("received")."""

    name = "vispruner"
    summary = "top tokens by CLS attention, and the least similar of the rest"
    paper = "arXiv:2412.01818"
    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.important, bool) or not 0 <= self.important <= 1:
            raise ValueError(f"important={self.important!r}: a share in [0, 1]")

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """CLS row (or the fallback) and output of the feature layer."""
        layer = tower.feature_layer
        return {
            "attention": Score(layer, "cls_row" if self.follows_cls(tower) else "column_mean"),
            "hidden": Score(layer, "hidden"),
        }

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """Cosines of all that is not important, in every view."""
        views = picture.patches[0]
        n, k = picture.tokens / views, self.kept_of(picture) / views
        return round(2 * views * model.vision.width * (n - int(k * self.important)) ** 2)

    def select(self, visual: VisualTokens) -> Tensor:
        """Scores [N] and tower features [N, C] -> kept [budget]."""
        attention, hidden = visual.scores["attention"], visual.scores["hidden"]

        def choose(view: View, k: int) -> Tensor:
            index = view.index.to(attention.device)
            return torch.cat(important_and_diverse(attention[index], hidden[index], k, self.important))

        return self.per_view(visual, choose)
