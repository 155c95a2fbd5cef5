"""LSceneLLM's selector: keep the visual tokens that the question's tokens single out.

Paper: LSceneLLM: Enhancing Large 3D Scene Understanding Using Adaptive Visual Preferences (Zhi et al., CVPR 2025),
       arXiv:2412.01292
Code:  https://github.com/Hoyyyaard/LSceneLLM (b85581b, models/modeling_llama.py:524-541)

    g[q, j] = sum_h A[h, q, j]                          one decoder layer, q in the question, j visual
    r[q, :] = (g[q, :] - min) / (max - min)             per row
    token q singles j out where 255 r[q, j] > threshold
    keep the `keep` tokens that most of the question singles out; among equals those with the larger mean of r

Shapes: rows [Q, n] -> singled out [Q, n] -> votes [n] -> kept [budget]. Default: threshold 96 (their configs), K = 2.

In the paper the selection decides which finer tokens a trained module attends to; here it is the choice of a
training-free pruner, with a budget (theirs has none: what the threshold lets through). The rows are those of the text
after the last picture, where theirs are those behind a learnable token; the layer is FastV's. A row that is the same
everywhere singles out nothing (theirs: 0 / 0). Only these rows of the map are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vlmfast.adapters.pruning.layered import EarlyPruner
from vlmfast.layers.tokens import Cut, LayerScore, LayerTokens
from vlmfast.visual import top


def relative(rows: Tensor) -> Tensor:
    """Each row from 0 to 1; 0 in a row that is the same everywhere. [..., n]"""
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    return ((rows - low) / (high - low)).masked_fill(high == low, 0)


def singled_out(rows: Tensor, threshold: float) -> Tensor:
    """Which tokens each row singles out. Attention of all heads together [..., n] -> bool"""
    return relative(rows) * 255 > threshold


@dataclass(frozen=True, kw_only=True)
class LSceneLLM(EarlyPruner):
    """threshold: of 255, above which a token of the question singles a visual token out."""

    name = "lscenellm"
    summary = "visual tokens that stand out in the attention of most of the question's tokens"
    paper = "arXiv:2412.01292"
    threshold: float = 96

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < 255:
            raise ValueError(f"threshold={self.threshold!r}: from 0 up to, but not including, 255")

    def asks(self, layer: int) -> Mapping[str, LayerScore]:
        """The question's rows in the layer before."""
        return {"rows": LayerScore(queries="question", reduce="rows")}

    def cut(self, tokens: LayerTokens) -> Cut:
        """Rows [Q, n] -> kept [keep]."""
        rows = tokens.scores["rows"]
        votes = (
            singled_out(rows, self.threshold).sum(0) + relative(rows).mean(0) / 2
        )  # a mean is at most 1: half a vote
        return Cut(top(votes, tokens.budget).sort().values)
