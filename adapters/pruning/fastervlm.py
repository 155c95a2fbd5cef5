"""FasterVLM: keep the tokens the vision tower's CLS token attends to.

Paper: [CLS] Attention is All You Need for Training-Free Visual Token Pruning (Zhang et al. 2024), arXiv:2412.01818v1
Code:  https://github.com/Theia-4869/FasterVLM (f5d5f12; video branch eca4cd5)

    s_j = mean_h softmax(q_CLS k_j / sqrt(d))      in the layer whose output becomes the features
    keep the `keep` largest, in raster order       (per view: thumbnail, crop, frame)

Shapes: CLS row [H, N] -> s [N] -> kept [budget].

Every view gets its share of the budget by its size: the authors' same number for each where views have one size.
Differs from the authors' code: the row is computed in fp32 (theirs: the tower's fp16); equal scores go by index.
Towers without CLS: theirs has no such path. `fallback="received"` uses the attention received from all patches, as
the authors advise (VisPruner issue 1); without it such a tower is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from vlmfast.adapters.pruning.base import Pruner
from vlmfast.families import Family, Tower
from vlmfast.visual import Score, VisualTokens, top


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Pruner):
    """Keep what the CLS token attends to. fallback: what to use on a tower without CLS ("received", or refuse)."""

    name = "fastervlm"
    summary = "top visual tokens by CLS attention of the vision tower"
    paper = "arXiv:2412.01818"
    fallback: Literal["received"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fallback not in (None, "received"):
            raise ValueError(f"fallback={self.fallback!r}: choose 'received' or leave it out")

    @classmethod
    def needs(cls, family: Family) -> dict[str, Any]:
        """The fallback, where the tower has no CLS."""
        return {} if family.cls else {"fallback": "received"}

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """CLS row of the feature layer; the attention received where there is no CLS and the fallback is chosen."""
        if tower.has_cls:
            return {"attention": Score(tower.feature_layer, "cls_row")}
        if self.fallback is None:
            raise NotImplementedError(
                "fastervlm needs a CLS token, and this vision tower has none; fastervlm:fallback=received uses the "
                "attention received from all patches instead"
            )
        return {"attention": Score(tower.feature_layer, "column_mean")}

    def notes(self, tower: Tower) -> tuple[str, ...]:
        """Say when the fallback is at work."""
        return () if tower.has_cls else ("fastervlm: no CLS in this tower, attention received from all patches used",)

    def select(self, visual: VisualTokens) -> Tensor:
        """[N] scores -> kept [budget], view by view."""
        scores = visual.scores["attention"]
        return self.per_view(visual, lambda view, k: top(scores[view.index.to(scores.device)], k))
