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

from torch import Tensor

from vlmfast.adapters.pruning.base import ClsPruner
from vlmfast.families import Tower
from vlmfast.visual import Score, VisualTokens, top


@dataclass(frozen=True, kw_only=True)
class FasterVLM(ClsPruner):
    """Keep what the CLS token attends to. fallback: what to use on a tower without CLS ("received", or refuse)."""

    name = "fastervlm"
    summary = "top visual tokens by CLS attention of the vision tower"
    paper = "arXiv:2412.01818"

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """CLS row of the feature layer; the attention received where there is no CLS and the fallback is chosen."""
        return {"attention": Score(tower.feature_layer, "cls_row" if self.follows_cls(tower) else "column_mean")}

    def select(self, visual: VisualTokens) -> Tensor:
        """[N] scores -> kept [budget], view by view."""
        scores = visual.scores["attention"]
        return self.per_view(visual, lambda view, k: top(scores[view.index.to(scores.device)], k))
