"""SparseVLM: text tokens that speak of the image rate the visual tokens in three layers; what goes is recycled.

Paper: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (Zhang et al., ICML 2025),
       arXiv:2410.04417
Code:  https://github.com/Gumpest/SparseVLMs (26a5f488), version 1

    raters, once, on the input embeddings of the image V and of the text behind it T:
        r_t = mean_v softmax_t(V T^t)[v, t],    rater: r_t > mean(r)
    behind layers 2, 6, 15 of 32:  s_j = mean over raters and heads of that layer's attention A[t, j]
        keep the k best; of the d dropped, take the best m = int(0.3 d) + 1, form c = int(m / 10) + 1 clusters by
        density peaks, and let the mean of each stand behind the tokens kept
    positions are renumbered without gaps after every stage

Shapes: rows [raters, n] -> s [n] -> k kept + c means. Density peaks: with D = distances / sqrt(width), a token's
density is exp(-mean of its c smallest D^2, itself included), its reach the D to the nearest denser token; the c
largest products of both are centres, the rest joins the nearest centre.

Budget: `keep` is what the third stage leaves, means included. The authors give tables for 576 tokens alone, k of each
stage for a nominal 192, 128, 96, 64 tokens; the first two stages are interpolated between the shares these tables
leave in the end, so that the tables are met exactly (keep = 0.196, 113 of 576, is their 192). A table of one's own:
`schedule="300/200/110"`, k of each stage; `keep` then says nothing. Other depths: the same shares of the depth.

Differs from the authors' code: ties in density go by index (theirs adds random noise); only the raters' rows are
computed (theirs: eager attention in the layers that score); any batch; each picture has its own budget; where
positions are kept (`positions="original"`) or have three axes, a mean stands at its centre's place. Not here: version
2 ("SparseVLM+"), which keeps positions, merges nothing and takes the 14 heads with the largest mass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.adapters.pruning.layered import StagedPruner, numbers
from vlmfast.decoders import Sizes
from vlmfast.families import Positions
from vlmfast.layers.tokens import Cut, LayerScore, LayerTokens
from vlmfast.towers import Picture
from vlmfast.visual import budget, top

TOKENS = 576
TABLES = ((66, 30, 17), (238, 48, 26), (303, 110, 36), (300, 200, 110))


def clusters(dropped: int) -> int:
    """How many means are made of what one stage drops."""
    return int((int(0.3 * dropped) + 1) / 10) + 1 if dropped else 0


def split(n: int, left: int) -> tuple[int, int]:
    """n tokens come, `left` go on. -> (tokens kept, means); at least one is kept"""
    for kept in range(left, 0, -1):
        if kept + clusters(n - kept) <= left:
            return kept, clusters(n - kept) if kept + clusters(n - kept) == left else left - kept
    return 1, left - 1


def chain(total: int, table: tuple[int, ...]) -> tuple[int, ...]:
    """What each stage leaves, means included, where it keeps the tokens of the table."""
    left = []
    for kept in table:
        kept = min(kept, total - 1)
        total = kept + clusters(total - kept)
        left.append(total)
    return tuple(left)


def interpolated(share: float) -> tuple[float, float]:
    """Shares that the first two stages leave when the last leaves `share`: between the authors' tables."""
    known = [(0.0, 0.0, 0.0), *(tuple(left / TOKENS for left in chain(TOKENS, table)) for table in TABLES), (1.0,) * 3]
    for (first, second, low), (more, further, high) in zip(known[:-1], known[1:]):
        if share <= high:
            part = (share - low) / (high - low)
            return first + part * (more - first), second + part * (further - second)
    return 1.0, 1.0


def rating(visual: Tensor, text: Tensor) -> Tensor:
    """Which text tokens speak of the image more than the mean of them. [N, D], [T, D] -> [R]"""
    rate = (visual.float() @ text.float().T).softmax(dim=-1).mean(dim=0)
    return (rate > rate.mean()).nonzero().flatten()


def density_peaks(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Clusters. states: [m, D] -> (centres [count], cluster of each state [m])"""
    states = states.float()
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[1] ** 0.5
    density = distance.sort(dim=-1).values[:, :count].square().mean(-1).neg().exp()
    order = top(density, len(density))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    denser = rank[None] < rank[:, None]
    reach = distance.masked_fill(~denser, torch.inf).amin(-1)
    reach[order[0]] = distance.max()
    centres = top(reach * density, count)
    member = distance[:, centres].argmin(-1)
    member[centres] = torch.arange(count, device=centres.device)
    return centres, member


@dataclass(frozen=True, kw_only=True)
class SparseVLM(StagedPruner):
    """schedule: tokens kept by each stage, such as 300/200/110, instead of what follows from `keep`."""

    name = "sparsevlm"
    summary = "text that speaks of the image rates in three layers; dropped tokens are recycled as cluster means"
    paper = "arXiv:2410.04417"
    authors: ClassVar[Positions] = "compact"
    plan: ClassVar[tuple[int, ...]] = (3, 7, 16)  # cuts lie behind layers 2, 6, 15
    keep: float | int = 0.196
    schedule: str | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        kept = None if self.schedule is None else numbers(self.schedule, "schedule")
        if kept is not None and (len(kept) != self.count or min(kept) < 1):
            raise ValueError(f"schedule={self.schedule!r}: {self.count} numbers of tokens, one for each stage")
        if kept is None and self.count != len(self.plan):
            raise ValueError(f"stages={self.stages!r}: three stages, or a schedule for as many as there are")

    def left(self, layer: int, total: int, depth: int) -> int:
        """What the stage leaves, means included."""
        stage = self.stage(layer, depth)
        if self.schedule is not None:
            return chain(total, numbers(self.schedule, "schedule"))[stage]
        last = budget(self.keep, total)
        shares = (*interpolated(last / total), 0.0)
        return min(total, max(last, round(shares[stage] * total)))

    def asks(self, layer: int) -> Mapping[str, LayerScore]:
        """The raters' rows of the layer before."""
        return {"attention": LayerScore(queries="chosen")}

    def raters(self, visual: Tensor, question: Tensor) -> Tensor:
        """Text tokens above the mean."""
        return rating(visual, question)

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """The statistics, and visual tokens times text for the raters; distances of recycled tokens are left out."""
        return super().selection_flops(picture, text, model) + 2 * picture.tokens * text * model.decoder.width

    def cut(self, tokens: LayerTokens) -> Cut:
        """Scores [n] and hidden states -> kept tokens, and means where others were."""
        kept_count, count = split(len(tokens), tokens.budget)
        order = top(tokens.scores["attention"], len(tokens))
        kept, rest = order[:kept_count].sort().values, order[kept_count:]
        if count == 0:
            return Cut(kept)
        pool = rest[: max(count, int(0.3 * len(rest)) + 1)]
        centres, member = density_peaks(tokens.hidden[pool], count)
        centres = pool[centres]
        stays = torch.cat([kept, centres])
        if not tokens.ordered:
            stays = stays.sort().values
        merge = torch.full_like(order, -1)
        place = torch.empty_like(merge).scatter_(0, stays, torch.arange(len(stays), device=stays.device))
        merge[kept] = place[kept]
        merge[pool] = place[centres[member]]
        return Cut(stays.sort().values, merge, tokens.index[stays])
