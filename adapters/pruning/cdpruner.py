"""CDPruner: a diverse set of tokens that suits the question (a determinantal point process).

Paper: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs (Zhang et al.,
       NeurIPS 2025), arXiv:2506.10967
Code:  https://github.com/Theia-4869/CDPruner (9541616)

    r_j  = +-mean_m cos(p_j, t_m), then (r - min + 1e-6) / (max - min) over all views of the picture
    L_ij = r_i cos(x_i, x_j) r_j
    greedy maximum of det L_S, per view: j = argmax_i d_i with d_i = det L_{S+i} / det L_S, kept up to date by one row
    of the Cholesky factor a token:  c = (L_j - C^T C_j) / sqrt(d_j),  d -= c^2

Shapes: p [N, C], t [M, C] -> r [N]; x [N, D] (after the projector), r -> kept [budget], shared out over the views by
size. The kernel is never built: one row of it a token, O(budget N (D + budget)).

What the relevance is made of. The official code compares CLIP's own image and text embeddings, for which it carries
the question through CLIP's text encoder, and NEGATES the mean, because patches of CLIP resemble the texts they do not
show. No stock model brings that encoder along. Here p are the visual tokens as the language model receives them and
t its input embeddings of the question, as in the two ports of the method to OpenVINO; that space is not CLIP's, and
nothing inverts it, so the sign is plus (`negate=True` turns it). `relevance` takes any pair of embeddings.

Differs from the authors' code (`parity="official"` has the failures back):
- embeddings and sign of the relevance, see above;
- equal relevances give the unconditional process, r = 1 (theirs: NaN, and 2 tokens);
- a token that depends linearly on the chosen ones, up to rounding, is not taken for what rounding left of it; when no
  other remains (more tokens asked than the features have dimensions, duplicates), the most relevant ones fill up
  (theirs: noise, NaN, and fewer tokens than asked);
- a feature of length zero is orthogonal to all (theirs: NaN), and taken last;
- everything in fp32; equal scores go by index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmfast.adapters.pruning.base import Pruner
from vlmfast.decoders import Sizes
from vlmfast.families import Tower
from vlmfast.towers import Picture
from vlmfast.visual import Cosines, View, VisualTokens, top, unit

EQUAL = 1e-6  # cosines that differ by less are equal: rounding in fp32
NOISE = 1e-6  # of a token's own L_jj: what rounding in fp32 leaves of it when the chosen ones explain it


def relevance(image: Tensor, text: Tensor, negate: bool = False, official: bool = False) -> Tensor:
    """How well tokens suit the question, from about 0 (least) to 1 (most) over all of them.

    image: [..., C] embeddings of the tokens, text: [M, C] of the question's parts. -> [...], fp32
    negate: the less similar, the more relevant, as with CLIP. Relevances that are equal up to rounding are all 1;
    official: stretched noise, or not finite.
    """
    image = image.float()
    length = image.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    similarity = image @ unit(text).mean(dim=0) / length  # mean of cosines = product with the mean
    score = -similarity if negate else similarity
    low, high = score.min(), score.max()
    if high - low < EQUAL and not official:
        return torch.ones_like(score)
    return (score - low + 1e-6) / (high - low)


def greedy_map(features: Tensor, relevant: Tensor, k: int, official: bool = False) -> Tensor:
    """Greedy maximum of the determinant. features: [N, D], relevant: [N] -> indices in the order of choice [k].

    official: without care for rounding; may repeat indices once variances or relevances are not finite.
    """
    x = unit(features)
    start = relevant.square() * x.square().sum(-1)
    variance, floor = start.clone(), NOISE * start
    factor = x.new_zeros(k, len(x))
    order: list[int] = []
    cosines = Cosines(x)
    for step in range(k):
        gain = variance if official else variance.masked_fill(variance <= floor, -torch.inf)
        j = int(gain.argmax())
        if not official and gain[j] == -torch.inf:
            break
        order.append(j)
        row = relevant * cosines.row(j, gain) * relevant[j]
        row = (row - factor[:step, j] @ factor[:step]) / variance[j].sqrt()
        factor[step] = row
        variance = variance - row.square()
        variance[j] = -torch.inf
    chosen = torch.tensor(order, dtype=torch.long, device=x.device)
    if len(chosen) == k:
        return chosen
    rest = relevant.index_fill(0, chosen, -torch.inf)
    return torch.cat([chosen, top(rest, k - len(chosen))])


@dataclass(frozen=True, kw_only=True)
class CDPruner(Pruner):
    """Diverse tokens that suit the question. negate: take the less similar tokens for the more relevant ones."""

    name = "cdpruner"
    summary = "a diverse set of tokens that suits the question (DPP, relevance by the LM's embeddings)"
    paper = "arXiv:2506.10967"
    uses_text = True
    negate: bool = False
    parity: Literal["repaired", "official"] = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.negate, bool):
            raise TypeError(f"negate={self.negate!r}: True or False")

    def notes(self, tower: Tower) -> tuple[str, ...]:
        """Say what the relevance is made of, and that the official form may fall short."""
        sign = "negated cosine" if self.negate else "cosine"
        notes = [
            f"cdpruner: relevance is the {sign} of visual tokens and the question's input embeddings in the language "
            "model (the paper: negated cosine of CLIP's image and text embeddings)"
        ]
        if self.parity == "official":
            notes.append("cdpruner: the official form keeps fewer tokens than asked where its numbers break down")
        return tuple(notes)

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """Tokens times question; in every view a row of cosines and of the factor for each token taken (rows fetched
        in advance apart). All text counts as question.
        """
        views, width = picture.patches[0], model.decoder.width
        n, k = picture.tokens / views, self.kept_of(picture) / views
        return round(2 * picture.tokens * text * width + views * k * n * (2 * width + k - 1))

    def select(self, visual: VisualTokens) -> Tensor:
        """Features [N, D] and question [T, D] -> kept [budget]; official: up to budget."""
        if visual.text is None or not len(visual.text):
            raise ValueError("cdpruner needs a question: the prompt has no text")
        relevant = relevance(
            visual.features, visual.text.to(visual.features.device), self.negate, self.parity == "official"
        )

        def choose(view: View, k: int) -> Tensor:
            index = view.index.to(relevant.device)
            return greedy_map(visual.features[index], relevant[index], k, self.parity == "official").unique()

        return self.per_view(visual, choose)
