"""PAINT: more attention on the visual tokens that carry detail, and on those that sum up the picture.

Paper: Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model (Arif et al.
    2025), arXiv:2501.12206 (later "PAINT: Paying Attention to INformed Tokens")
Code:  https://github.com/hasanar1f/PAINT (2a9e8f8)

    a, b     attention of the vision tower's CLS token in its first layer and in its last but one, over n patches
    summary  the tokens with b > Q3 + 1.5 (Q3 - Q1), quartiles of b
    local    the floor(ratio n) largest of a, but for those of summary
    s_j' = s_j + alpha |s_j|  (j local),    s_j + beta |s_j|  (j summary)          scores before the softmax
    p(y) ~ gamma (log c - log u) + log u         c: with the pictures, u: the same text without them
    tokens with c(y) < plausibility max c        are out

The scores change in the rows that decide on a token, the last of a prompt and each generated one, in all heads of the
chosen layers, and not in the image-free branch. Shapes: a, b [n] -> a code a token [n] (1 local, 2 summary), chosen
once a picture, view by view (image, thumbnail, crop, frame); rows [B, H, 1, K]. Defaults: alpha=0.7, beta=0.3,
ratio=0.25, layers from the third on, gamma=1.1, plausibility 0.1 (fixed in the code). The paper's own figures turn
sharply between alpha 0.5 and 0.8.

Differs from the official code: every row's own pictures count (there: the first picture of the batch, one run of
columns); as many summary tokens as there are outliers (there floor(n (outliers / n)), which rounding can make one
fewer); hidden keys stay hidden; the branch follows the beams; with a branch the code leaves the first generated token
without the boost. `parity="official"` brings back the second and the last. The code's third set, "spatial" tokens
(none by default), ranks row sums of a softmax, which are all one: it is left out. So is what the abstract says of
heads, of which the code has nothing. Layers of the tower that see windows only: the nearest that sees all. Towers
without CLS: the code has none; `fallback="received"` takes the attention received from all patches, without it such a
tower is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.adapters.attention.base import Boost
from vlmfast.edits import Call
from vlmfast.families import Family, Tower
from vlmfast.layers.tokens import Placed
from vlmfast.patching import Patch, Report
from vlmfast.visual import Score, top

LOCAL, SUMMARY = 1, 2


def informed(early: Tensor, late: Tensor, ratio: float, official: bool = False) -> Tensor:
    """Which of n tokens are local (1), summary (2) or neither (0). early, late: [n] attention of CLS -> int64 [n]"""
    n, late = len(late), late.double()
    low, high = late.quantile(0.25), late.quantile(0.75)
    count = int((late > high + 1.5 * (high - low)).sum())
    if official:
        count = int(n * (count / n))
    codes = torch.zeros(n, dtype=torch.long, device=late.device)
    codes[top(early, int(n * ratio))] = LOCAL
    codes[top(late, count)] = SUMMARY
    return codes


def boosted(scores: Tensor, rise: Tensor) -> Tensor:
    """Scores that rise by a share of their size; hidden keys (-inf) stay hidden. [B, H, R, K], [B, 1, 1, K]"""
    return torch.where(scores.isfinite(), scores + rise * scores.abs(), scores)


@dataclass(frozen=True)
class Remark:
    """Says something in the report."""

    text: str

    def report(self, report: Report) -> Report:
        """Add it."""
        return replace(report, notes=(*report.notes, self.text))


@dataclass(frozen=True, kw_only=True)
class PAINT(Boost):
    """Raise the scores of two sets of visual tokens where a token is decided, and contrast with the image-free prompt.

    alpha, beta: share of its size that the score of a local and of a summary token rises by; 0: none. ratio: share of
    a view's tokens that are local. gamma: strength of the contrast in `generate`; 1: none, and no second forward.
    plausibility: tokens less likely than this share of the likeliest one are out (with a contrast). fallback: what to
    use on a vision tower without CLS ("received", or refuse).
    """

    name: ClassVar[str] = "paint"
    summary: ClassVar[str] = "raises scores of detailed and of summarising visual tokens; image-free contrast"
    paper: ClassVar[str] = "arXiv:2501.12206"

    layers: str | int = "2:"
    alpha: float = 0.7
    beta: float = 0.3
    ratio: float = 0.25
    gamma: float = 1.1
    plausibility: float = 0.1
    fallback: str | None = None
    parity: str = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "ratio"):
            value, most = getattr(self, name), 1 if name == "ratio" else 1e3
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                what = (
                    "a share of a view's tokens" if name == "ratio" else "the share of its size that a score rises by"
                )
                raise ValueError(f"{name}={value!r}: a number in [0, {most:g}], {what}")
        if self.fallback not in (None, "received"):
            raise ValueError(f"fallback={self.fallback!r}: choose 'received' or leave it out")
        self.branch  # noqa: B018  checks its settings

    @classmethod
    def needs(cls, family: Family) -> dict[str, Any]:
        """The fallback, where the tower has no CLS."""
        return {} if family.cls else {"fallback": "received"}

    @property
    def edits(self) -> bool:
        """Whether a score rises."""
        return self.alpha != 0 or self.beta != 0

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """CLS rows of the first and the last layer but one; the attention received with the fallback, where needed."""
        if not self.edits:
            return {}
        if not tower.has_cls and self.fallback is None:
            raise NotImplementedError(
                "paint needs a CLS token, and this vision tower has none; paint:fallback=received uses the attention "
                "received from all patches instead"
            )
        kind: Any = "cls_row" if tower.has_cls else "column_mean"
        places = {"early": 0, "late": max(0, tower.depth - 2)}
        return {name: Score(tower.nearest_full_layer((at + 1) / tower.depth), kind) for name, at in places.items()}

    def attach(self, patch: Patch) -> None:
        """As `Boost.attach`, saying what stands for CLS where there is none."""
        super().attach(patch)
        if self.edits and not patch.tower.has_cls:
            text = "paint: no CLS in this tower, the attention received from all patches used instead"
            patch.reporters.append(Remark(text))

    def marks(self, picture: Placed) -> Mapping[str, Tensor]:
        """The code of each token of a picture: 1 local, 2 summary."""
        visual = picture.visual
        early, late = visual.scores["early"], visual.scores["late"]
        codes = torch.zeros(len(visual), dtype=torch.long, device=late.device)
        for view in visual.views:
            index = view.index.to(late.device)
            codes[index] = informed(early[index], late[index], self.ratio, self.parity == "official")
        return {self.name: codes[picture.index.to(codes.device)]}

    def edit(self, call: Call) -> Tensor:
        """The rows that decide on a token, where they can see a token of the two sets."""
        codes = call.marks.get(self.name)
        skipped = self.parity == "official" and self.gamma != 1 and call.prompt
        if codes is None or skipped:
            return call.plain()
        rows = call.ends & (codes != 0).any(1, keepdim=True)
        if not bool(rows.any()):
            return call.plain()
        rise = (self.alpha * (codes == LOCAL) + self.beta * (codes == SUMMARY))[:, None, None].float()
        return call.rescore(lambda scores: boosted(scores, rise), rows)
