"""VisionZip: the tokens CLS attends to, and a few more that each sum up a part of the rest.

Paper: VisionZip: Longer is Better but Not Necessary in Vision Language Models (Yang et al., CVPR 2025),
       arXiv:2412.04467
Code:  https://github.com/dvlab-research/VisionZip (3151f6d)

    s_j = mean_h softmax(q_CLS k_j / sqrt(d))      in the layer whose output becomes the features
    dominant = top K - c of s, their features unchanged
    targets  = every step-th of the R tokens left, step = max(1, R // c), the first c of them
    every other token joins the target with the largest cosine of head-mean keys of that layer
    contextual token = mean of the target's and its members' features, in the target's place

Shapes: s [N], keys [N, d] -> kept [K], features [K, D]. Per view, K and c shared out over the views by size.
c is a share of the budget, or a number per picture: 10 of 64, 20 of 128 and 30 of 192 in the paper are 0.15625.

What is averaged: where the projector works token by token on one layer, the tower's outputs, projected afterwards as
in the official code; elsewhere (merged patches, several layers) the visual tokens as they come out of the projector.
In training, gradients reach the projector through all kept tokens, the tower through those that keep their features
or are averaged after the projector. What a family adds in later decoder layers (deepstack) stays the target's own.

Differs from the authors' code (`parity="official"` has the first three back, where such a projector and CLS exist):
- a true mean; theirs adds the mean of the members to the target, a token about twice as long as the others;
- all K tokens are patches; theirs spends one of the dominant on the CLS token of every view;
- contextual tokens stand in the place of their target; theirs follow after the dominant ones of the view (the order
  that counts with compact positions; each keeps a place of its view);
- c = 0 keeps dominant tokens alone (theirs: ZeroDivisionError), and more contextual tokens than the budget has is an
  error that says so;
- keys of length zero are orthogonal to all (theirs: NaN); everything in fp32, equal values go by index.
Towers without CLS: `fallback="received"` uses the attention received from all patches; without it they are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmfast.adapters.pruning.base import ClsPruner
from vlmfast.decoders import Sizes
from vlmfast.families import Family, Tower
from vlmfast.towers import Picture
from vlmfast.visual import Choice, Score, VisualTokens, apportion, budget, top, unit

OFFICIAL = (
    "visionzip:parity=official needs a CLS token and a projector that takes one layer of the tower token by token"
)


@dataclass(frozen=True)
class Zip:
    """A view taken apart: dominant [a] and targets [c], ascending; assign [N]: the target (0..c-1) a token belongs to,
    its own for a target, -1 for dominant tokens and where there are no targets.
    """

    dominant: Tensor
    targets: Tensor
    assign: Tensor


def take_apart(score: Tensor, keys: Tensor, dominant: int, contextual: int) -> Zip:
    """Dominant tokens by score [N], and which contextual token every other one joins by the cosine of keys [N, d].

    Raises ValueError when there are fewer tokens than dominant and contextual ones together.
    """
    n, device = len(score), score.device
    if dominant + contextual > n:
        raise ValueError(f"{dominant} dominant and {contextual} contextual tokens of {n}")
    first = top(score, dominant).sort().values
    taken = torch.zeros(n, dtype=torch.bool, device=device)
    taken[first] = True
    rest = (~taken).nonzero().flatten()
    assign = torch.full((n,), -1, dtype=torch.long, device=device)
    if contextual == 0:
        return Zip(first, rest[:0], assign)
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    x = unit(keys[rest])
    own = unit(keys[targets])
    assign[rest] = (x @ own.T).argmax(dim=1)
    assign[targets] = torch.arange(contextual, device=device)
    return Zip(first, targets, assign)


def merge(features: Tensor, parts: Zip, official: bool = False) -> Tensor:
    """Contextual tokens of a view, means over groups; official: target + mean of its members. [N, C] -> [c, C]"""
    features = features.float()
    group = torch.arange(len(parts.targets), device=features.device)
    member = (parts.assign == group[:, None]).to(features.dtype)  # a product, not a scatter: the same on every device
    if not official:
        return member @ features / member.sum(1, keepdim=True)
    member[group, parts.targets] = 0
    return features[parts.targets] + member @ features / member.sum(1, keepdim=True).clamp_min(1)


def _one_by_one(tower: Tower) -> bool:
    """Whether a projector could make a visual token of one output of the tower (the family tells whether it does)."""
    return tower.merge == 1 and tower.layers == 1


def _project(visual: VisualTokens, outputs: Tensor) -> Tensor:
    """Tower outputs of all views as visual tokens: one call, since reading the weights is what it costs. [m, C]"""
    if visual.project is None:
        raise NotImplementedError(OFFICIAL)
    return visual.project(outputs)


@dataclass(frozen=True, kw_only=True)
class VisionZip(ClsPruner):
    """contextual: share of the budget (float) or tokens of a picture (int) that sum up what is dropped."""

    name = "visionzip"
    summary = "top visual tokens by CLS attention, the rest merged into a few contextual ones"
    paper = "arXiv:2412.04467"
    contextual: float | int = 0.15625
    parity: Literal["repaired", "official"] = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        explain = "a float in [0, 1] is a share of the budget, an int >= 0 a number of tokens per picture"
        if isinstance(self.contextual, bool) or not isinstance(self.contextual, (int, float)):
            raise TypeError(f"contextual={self.contextual!r}: {explain}")
        if not self.contextual >= 0 or (isinstance(self.contextual, float) and self.contextual > 1):
            raise ValueError(f"contextual={self.contextual!r}: {explain}")

    def check(self, family: Family) -> None:
        """The official form needs a CLS token and a projector that works token by token."""
        super().check(family)
        if self.parity == "official" and (family.projector is None or not family.cls):
            raise NotImplementedError(f"{OFFICIAL}, which {family.name} does not have")

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """CLS row (or the fallback), keys and, where patches are not merged, the output of the feature layer."""
        layer = tower.feature_layer
        scores = {
            "attention": Score(layer, "cls_row" if self.follows_cls(tower) else "column_mean"),
            "keys": Score(layer, "key"),
        }
        if _one_by_one(tower):
            scores["hidden"] = Score(layer, "hidden")
        elif self.parity == "official":
            raise NotImplementedError(OFFICIAL)
        if self.parity == "official":
            scores["cls"] = Score(layer, "cls_hidden")
        return scores

    def notes(self, tower: Tower) -> tuple[str, ...]:
        """Say what is averaged, and when the fallback is at work."""
        if self.parity == "official":
            what = "target + mean of its members (official), and the CLS token of every view is one of the kept"
        elif _one_by_one(tower):
            what = "means of tower outputs, projected, where the projector works token by token; else of visual tokens"
        else:
            what = "means of visual tokens, after the projector"
        return (*super().notes(tower), f"visionzip: contextual tokens are {what}")

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """In every view: cosines of keys between what is not dominant and the targets, and the means as one product;
        these are projected where the projector works token by token.
        """
        views, k = picture.patches[0], self.kept_of(picture)
        c, width = self._contextual(k), model.vision.width
        projected = model.projects and _one_by_one(model.tower)
        cosines = (picture.tokens - k + c) * c / views * (width // model.tower.heads)
        means = c * picture.tokens / views * (width if projected else model.decoder.width)
        each = model.vision.projector // model.vision.tokens if projected else 0
        return round(2 * (cosines + means) + c * each)

    def select(self, visual: VisualTokens) -> Choice:
        """Scores [N], keys [N, d] -> kept [K] and their features [K, D]."""
        shares = apportion(budget(self.keep, len(visual)), [len(view) for view in visual.views])
        contextual = apportion(self._contextual(sum(shares)), shares)
        parts = [
            (view.index.to(visual.features.device), k, c) for view, k, c in zip(visual.views, shares, contextual) if k
        ]
        with torch.set_grad_enabled(visual.features.requires_grad):  # a choice is made without, its features are not
            return self._official(visual, parts) if self.parity == "official" else self._repaired(visual, parts)

    def _contextual(self, k: int) -> int:
        """Contextual tokens of a picture that keeps k."""
        count = self.contextual if isinstance(self.contextual, int) else round(self.contextual * k)
        if count > k:
            raise ValueError(
                f"contextual={self.contextual} tokens of {k} that are kept; a float is a share of the budget"
            )
        return count

    def _repaired(self, visual: VisualTokens, parts: list[tuple[Tensor, int, int]]) -> Choice:
        before = visual.project is not None and "hidden" in visual.scores
        averaged = visual.scores["hidden"] if before else visual.features
        dominant, targets, merged = [], [], []
        for index, k, c in parts:
            one = take_apart(visual.scores["attention"][index], visual.scores["keys"][index], k - c, c)
            dominant.append(index[one.dominant])
            targets.append(index[one.targets])
            merged.append(merge(averaged[index], one).to(visual.features))
        indices = torch.cat(dominant + targets)
        order = indices.argsort()
        contextual = torch.cat(merged)
        if not len(contextual):
            return Choice(indices[order])
        if before:
            contextual = _project(visual, contextual)
        features = torch.cat([visual.features[torch.cat(dominant)], contextual])
        return Choice(indices[order], features[order])

    def _official(self, visual: VisualTokens, parts: list[tuple[Tensor, int, int]]) -> Choice:
        """CLS, dominant, contextual of every view in turn, over as many places as there are such tokens."""
        kept, places, features, towers = [], [], [], []
        for index, k, c in parts:
            if c == k:
                raise ValueError(f"visionzip:parity=official with {c} contextual tokens of {k}: CLS needs one of them")
            one = take_apart(visual.scores["attention"][index], visual.scores["keys"][index], k - c - 1, c)
            kept += [index[one.dominant], index[one.targets]]
            free = torch.ones_like(index, dtype=torch.bool)
            free[one.dominant] = free[one.targets] = False
            places.append(index[free][:1])  # CLS has no place of its own among the patches
            contextual = merge(visual.scores["hidden"][index], one, official=True)
            towers.append(torch.cat([visual.scores["cls"][index[:1]], contextual]).to(visual.features))
            features.append(visual.features[index[one.dominant]])
        projected = _project(visual, torch.cat(towers)).split([len(one) for one in towers])
        features = [part for new, own in zip(projected, features) for part in (new[:1], own, new[1:])]
        indices = torch.cat(kept).sort().values
        slots = torch.cat([indices, *places]).sort().values
        if visual.slots is not None:
            slots = visual.slots.to(slots.device)[slots]
        return Choice(indices, torch.cat(features), slots)
