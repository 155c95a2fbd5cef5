"""DART: behind an early layer, keep a few pivots and the visual tokens that resemble them least.

Paper: Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More (Wen et al., EMNLP
       2025), arXiv:2502.11494
Code:  https://github.com/xqy1111111/DART (d6a5af6f, a fork of the authors'; llava/model/language_model)

    pivots: 4 visual tokens and 4 tokens of the question with the largest L1 norm of their keys, all heads together,
            in layer K - 1
    for each pivot p in turn: of the visual tokens left in the pool, take the (keep - 4) / 8 with the lowest
            cos(norm(h_p), norm(h_j)), norm being the one behind the last layer
    visual pivots and everything taken enter layer K, at their original positions

Shapes: keys [n + T] norms, hidden [n, D] -> kept [budget]. Default K = 2; keep: 128 of 576 tokens in the paper.

Differs from the authors' code:
- pivots are gone through by falling norm, visual ones first; theirs walks a Python set of positions in the prompt,
  whose order is not defined and changes with the length of what stands before the image (so there is no
  `parity="official"`);
- exactly `keep` tokens stay: what does not divide goes to the first pivots; theirs keeps 4 + 8 * (budget // 8);
- norms are those of the keys before the rotary embedding: behind it an L1 norm tells of the position too;
- with a budget below 5 there is nothing but visual pivots; cosines in fp32; equal values go by index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.adapters.pruning.layered import EarlyPruner
from vlmfast.decoders import Sizes
from vlmfast.layers.tokens import Cut, LayerScore, LayerTokens
from vlmfast.towers import Picture
from vlmfast.visual import top, unit


def least_alike(states: Tensor, pivots: Tensor, own: Tensor, k: int) -> Tensor:
    """k tokens unlike the pivots. states: [n, D]; pivots: [P, D]; own: [<= k] tokens that are pivots. -> [k]

    Each pivot in turn takes its share of what is left; the k asked for include the pivots' own tokens.
    """
    share, more = divmod(k - len(own), len(pivots))
    likeness = unit(pivots) @ unit(states).T
    likeness[:, own] = torch.inf
    taken = [own]
    for pivot in range(len(pivots)):
        chosen = top(-likeness[pivot], share + (pivot < more))
        likeness[:, chosen] = torch.inf
        taken.append(chosen)
    return torch.cat(taken)


@dataclass(frozen=True, kw_only=True)
class Dart(EarlyPruner):
    """pivots_image, pivots_text: how many of each."""

    name = "dart"
    summary = "pivots by key norm in an early decoder layer, and the tokens least alike to them"
    paper = "arXiv:2502.11494"
    pivots_image: int = 4
    pivots_text: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pivots_image", "pivots_text"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r}: a number of tokens")
        if self.pivots_image + self.pivots_text == 0:
            raise ValueError("pivots_image and pivots_text are both 0: nothing to compare with")

    def asks(self, layer: int) -> Mapping[str, LayerScore]:
        """L1 norms of the keys of the layer before."""
        return {"keys": LayerScore(kind="key_norm")}

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """Cosines of the pivots with every token."""
        pivots = min(self.pivots_image, self.left(self.layer, picture.tokens, len(model.decoder.layers)) or 0)
        return 2 * (pivots + min(self.pivots_text, text)) * picture.tokens * model.decoder.width

    def cut(self, tokens: LayerTokens) -> Cut:
        """Norms [n], [T] and hidden states -> kept."""
        k, states = tokens.budget, tokens.final_norm(tokens.hidden)
        own = top(tokens.scores["keys"], min(self.pivots_image, k, len(tokens)))
        norms = tokens.text_scores["keys"].masked_fill(~tokens.question, -torch.inf)
        text = top(norms, min(self.pivots_text, int(tokens.question.sum())))
        pivots = torch.cat([states[own], tokens.final_norm(tokens.text[text])])
        if len(pivots) == 0:
            raise ValueError("dart: pivots_image=0, and the prompt has no text for pivots")
        return Cut(least_alike(states, pivots, own, k).sort().values)
