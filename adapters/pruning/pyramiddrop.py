"""PyramidDrop: in stages through the decoder, keep the visual tokens that the instruction attends to.

Paper: PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction (Xing et
       al., CVPR 2025), arXiv:2410.17247
Code:  https://github.com/Cooperx521/PyramidDrop (6444f304, llava/model/modeling_llama_pdrop.py)

    before layer L of a stage: q, k = rope(W_q norm(h)), rope(W_k norm(h))     with the weights of layer L itself
    s_j = mean_h softmax(q_last k^T / sqrt(d))[j]
    keep the lambda^stage N largest; positions are renumbered without gaps after every stage

Shapes: hidden [N + T, D] -> s [n] -> kept. Stages before layers 8, 16, 24 of 32, lambda = 0.5: 1/2, 1/4, 1/8 of the
tokens. Other depths: the same shares of the depth; other `keep`: lambda = keep^(1/3), what the last stage leaves.
In training "last" is every token before an answer begins, as in the authors' code.

Differs from the authors' code: only the rows that are asked for and the keys are computed (theirs: queries, keys and
values of all tokens); any padding and several pictures (theirs: right padding, one image); fp32; equal scores go by
index; numbers are rounded to the nearest, halves to even (`parity="official"`: rounded down).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmfast.adapters.pruning.layered import StagedPruner
from vlmfast.families import Positions
from vlmfast.layers.tokens import Cut, LayerScore, LayerTokens
from vlmfast.visual import budget, top


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(StagedPruner):
    """keep: what the last stage leaves; the stages before it keep shares that fall by one factor."""

    name = "pyramiddrop"
    summary = "the instruction's attention, in stages with geometrically falling shares"
    paper = "arXiv:2410.17247"
    authors: ClassVar[Positions] = "compact"
    plan: ClassVar[tuple[int, ...]] = (8, 16, 24)
    keep: float | int = 0.125
    parity: Literal["repaired", "official"] = "repaired"

    def left(self, layer: int, total: int, depth: int) -> int:
        """lambda^stage of the tokens; the last stage leaves `keep` exactly."""
        part, last = (self.stage(layer, depth) + 1) / self.count, budget(self.keep, total)
        if self.parity == "official":
            share = self.keep if isinstance(self.keep, float) else self.keep / total
            return max(1, int(total * share**part))
        return max(last, round(total * (last / total) ** part))

    def asks(self, layer: int) -> Mapping[str, LayerScore]:
        """The instruction's rows of the layer to come."""
        return {"attention": LayerScore(queries="last", own=True)}

    def cut(self, tokens: LayerTokens) -> Cut:
        """Scores [n] -> kept."""
        return Cut(top(tokens.scores["attention"], tokens.budget).sort().values)
