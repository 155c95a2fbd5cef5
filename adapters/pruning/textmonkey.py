"""TextMonkey's token filter: drop the tokens that a later token resembles most.

Paper: TextMonkey: An OCR-Free Large Multimodal Model for Understanding Document (Liu et al. 2024), arXiv:2403.04473
Code:  https://github.com/Yuliang-Liu/Monkey (498e1d9, monkey_model/text_monkey/merge.py, self_soft_matching)

    m_i = max_{j > i} cos(x_i, x_j),   m_N = -1
    keep the tokens with the smallest m, in the order of the prompt

Of two alike the later one stays, and the last token stays always. The filter alone, which needs no training; their
resampler, a cross-attention from the kept tokens to all of them, is trained and adds nothing before it is.

Shapes: features [N, D] -> m [N] -> kept [budget]. Blocks of rows: no [N, N] matrix exists.

Views: all crops together, crop after crop, as theirs; so are the frames of a video, which theirs does not take. Their
global view is never filtered. Here `keep` counts all tokens of a picture, therefore by default
(`thumbnail="filtered"`) the thumbnail gives its share and is filtered by itself; `thumbnail="whole"` keeps it whole
and takes the crops down to what is left of the budget.

Differs from the authors' code: a zero vector resembles nothing (cosine 0; theirs: NaN everywhere it is compared); of
equal m the later token stays (theirs: as the sort has it); cosines in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmfast.adapters.pruning.base import Pruner
from vlmfast.decoders import Sizes
from vlmfast.towers import Picture
from vlmfast.visual import VisualTokens, top, unit

ROWS = 256  # rows of the similarity matrix that exist at a time


def later_similarity(features: Tensor) -> Tensor:
    """Largest cosine of every token to a later one, -1 for the last; fp32, in [-1, 1]. [..., N, D] -> [..., N]"""
    x = unit(features)
    n = x.shape[-2]
    most = x.new_full(x.shape[:-1], -1.0)
    for start in range(0, n - 1, ROWS):
        stop = min(start + ROWS, n - 1)
        cosine = x[..., start:stop, :] @ x[..., start + 1 :, :].transpose(-1, -2)
        earlier = torch.ones(cosine.shape[-2:], dtype=torch.bool, device=x.device).tril(-1)
        most[..., start:stop] = cosine.masked_fill(earlier, -torch.inf).amax(dim=-1)
    return most.clamp(-1, 1)


@dataclass(frozen=True, kw_only=True)
class TextMonkey(Pruner):
    """thumbnail: "filtered" by itself, or kept "whole" while the crops are filtered down to the rest of the budget."""

    name = "textmonkey"
    summary = "drop the visual tokens that a later one resembles most"
    paper = "arXiv:2403.04473"
    thumbnail: Literal["filtered", "whole"] = "filtered"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thumbnail not in ("filtered", "whole"):
            raise ValueError(f"thumbnail={self.thumbnail!r}: choose 'filtered' or 'whole'")

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """Cosines of every token to the later ones, in blocks; as of one view."""
        n = picture.tokens - 1
        return 2 * model.decoder.width * sum(min(ROWS, n - start) * (n - start) for start in range(0, n, ROWS))

    def select(self, visual: VisualTokens) -> Tensor:
        """Features [N, D] -> kept [budget]."""

        def choose(index: Tensor, k: int) -> Tensor:
            return top(later_similarity(visual.features[index]), len(index))[len(index) - k :]

        return self.beside_thumbnail(visual, choose, whole=self.thumbnail == "whole")
