"""FastV: behind an early decoder layer, keep the visual tokens that the prompt's last token attends to.

Paper: An Image is Worth 1/2 Tokens After Layer 2 (Chen et al., ECCV 2024), arXiv:2403.06764
Code:  https://github.com/pkunlp-icler/FastV (d1659729)

    s_j = mean_h A[h, last, j]      attention of layer K - 1, j among the visual tokens
    the `keep` largest enter layer K, in the order of the prompt, at their original positions

Shapes: row of the last query [N + T] -> s [N] -> kept [budget]. Text always stays. Default: K = 2, 0-based, keep=0.5.

The paper says "the average attention a token receives from all others"; its code takes the last query's row, and so
does this. Differs from the authors' code: any number of pictures anywhere in the prompt, each with its own budget
(theirs: one slice with hand-set bounds, of row 0 of the batch); the row is computed beside the model's own attention
kernel, in fp32 (theirs: eager attention in every layer, in the model's dtype); equal scores go by index. The number
kept is round(keep N), halves to even, as in theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmfast.adapters.pruning.layered import EarlyPruner
from vlmfast.layers.tokens import Cut, LayerScore, LayerTokens
from vlmfast.visual import top


@dataclass(frozen=True, kw_only=True)
class FastV(EarlyPruner):
    """Keep what the last token of the prompt attends to."""

    name = "fastv"
    summary = "top visual tokens by the last token's attention in an early decoder layer"
    paper = "arXiv:2403.06764"

    def asks(self, layer: int) -> Mapping[str, LayerScore]:
        """The last query's row in the layer before."""
        return {"attention": LayerScore(queries="last")}

    def cut(self, tokens: LayerTokens) -> Cut:
        """Scores [n] -> kept [keep]."""
        return Cut(top(tokens.scores["attention"], tokens.budget).sort().values)
