"""FrameFusion: frames merge where they repeat each other in the first decoder layers, then attention prunes the rest.

Paper: FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Visual Language Models (Fu
       et al., ICCV 2025), arXiv:2501.01986
Code:  https://github.com/thu-nics/FrameFusion (fbec1d2e, framefusion/main.py)

    s_i = cos(h_i, h_j)      j: the token before i at the same place of a frame, among those that are left
    before layers `first`, `first` + 1, ...: every i with s_i >= `similarity` joins j; a run of them becomes its mean,
    and stands where its first token stood
    before the layer after the first at which less than `least` of the tokens merged: keep the largest attention of the
    prompt's last token in the layer before, mean over heads
    once merging would go below the budget, only the most similar ones merge, and nothing more is dropped

Shapes: hidden [n, D], index [n] -> s [n]; attention [n] -> kept [budget].

Budget: `keep` is what is left after the last cut; merging that never ends is cut short before the last layer. `cost`
instead is the authors' budget: the mean over all layers of the share of tokens in a layer; `keep` then says nothing.
Merging that would spend it all is cut short too (theirs raises).

Images, and videos of one frame, stay whole; theirs prunes them by attention.

Differs from the authors' code:
- cuts lie between layers; theirs merges before layer 0 as well, and inside layers, before the feed-forward net;
- any batch, padding and decoding; theirs takes one prompt, and 28 layers in the formula of `cost` for every model;
- cosines and means in fp32, hidden states are not written into; equal scores go by index.
"The attention averaged over heads and queries" is that of the last query alone in their code, as here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.adapters.pruning.layered import LayerPruner
from vlmfast.decoders import Attention, Sizes
from vlmfast.layers.door import LayersDoor
from vlmfast.layers.tokens import Cut, LayerScore, LayerTokens
from vlmfast.patching import ImageReport, Patch
from vlmfast.towers import Picture
from vlmfast.visual import VisualTokens, budget, frame_index, is_video, top, unit


def by_place(visual: VisualTokens, index: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of a video ordered by their place in the frame, then by time. index: [n] -> (order [n], place [n])"""
    frames = frame_index(visual.views).to(index.device)
    count, n = frames.shape
    where = torch.empty(len(visual), 2, dtype=torch.long, device=index.device)
    where[frames, 0] = torch.arange(n, device=index.device)
    where[frames, 1] = torch.arange(count, device=index.device)[:, None]
    place, time = where[index].unbind(-1)
    order = (place * count + time).argsort()
    return order, place[order]


def repetition(hidden: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """Cosine with the token before, in the order of `by_place`; -inf for the first of a place. [n, D] -> [n]"""
    features = unit(hidden[order])
    cosine = (features[1:] * features[:-1]).sum(-1).masked_fill(place[1:] != place[:-1], -torch.inf)
    return torch.cat([cosine.new_full((1,), -torch.inf), cosine])


def fuse(joins: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of tokens that join the one before. joins: [n] bool in the order of `order` -> (kept [K], merge [n])

    kept: ascending, the first token of every run; merge: which of these each token becomes part of.
    """
    steps = torch.arange(len(order), device=order.device)
    heads = order[torch.where(joins, 0, steps).cummax(0).values]
    kept = order[~joins].sort().values
    merge = torch.empty_like(order)
    merge[order] = torch.searchsorted(kept, heads)
    return kept, merge


@dataclass(frozen=True, kw_only=True)
class FrameFusion(LayerPruner):
    """similarity: cosine from which tokens merge; least: merging is over once a smaller share of tokens merges; first:
    the decoder layer (0-based) before which merging begins, None: 1, or behind the layers that get deepstack features;
    cost: mean share of tokens in a layer, in place of `keep`.
    """

    name = "framefusion"
    summary = "videos: frames merge where they repeat each other in early decoder layers, attention prunes the rest"
    paper = "arXiv:2501.01986"
    modalities: ClassVar[tuple[str, ...]] = ("video",)
    foreseeable: ClassVar[bool] = False
    similarity: float = 0.6
    least: float = 0.1
    first: int | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity={self.similarity!r}: a cosine in [-1, 1]")
        if not 0 <= self.least <= 1:
            raise ValueError(f"least={self.least!r}: a share in [0, 1]")
        if self.first is not None and (type(self.first) is not int or self.first < 1):
            raise ValueError(f"first={self.first!r}: a decoder layer, 1 or more (0-based)")
        if self.cost is not None and not 0 < self.cost <= 1:
            raise ValueError(f"cost={self.cost!r}: a share in (0, 1], or leave it out for `keep`")

    def layers(self, depth: int) -> tuple[int, ...]:
        """From `first` on: when merging is over, only the tokens can tell."""
        return tuple(range(self.first or 1, depth))

    def left(self, layer: int, total: int, depth: int) -> int | None:
        """Known beforehand only where nothing is to go."""
        whole = (
            self.cost == 1
            if self.cost is not None
            else isinstance(self.keep, float) and round(self.keep * total) == total
        )
        return total if whole else None

    def asks(self, layer: int) -> Mapping[str, LayerScore]:
        """The last query's row in the layer before."""
        return {"attention": LayerScore(queries="last")}

    def cut(self, tokens: LayerTokens) -> Cut:
        """Merge, or prune once merging is over."""
        n, memory, device = len(tokens), tokens.memory, tokens.hidden.device
        if not is_video(tokens.visual.views):
            return Cut(torch.arange(n, device=device), final=True)
        k = self._target(tokens)
        attention = tokens.scores["attention"].to(device)
        if n <= k:
            return Cut(torch.arange(n, device=device), final=True)
        if memory.get("merged"):
            return Cut(top(attention, k).sort().values, final=True)
        order, place = by_place(tokens.visual, tokens.index.to(device))
        cosine = repetition(tokens.hidden, order, place)
        joins = cosine >= self.similarity
        if int(joins.sum()) >= n - k:
            joins = torch.zeros_like(joins).index_fill(0, top(cosine, n - k), True)
        kept, merge = fuse(joins, order)
        same = len(kept) == n
        memory["merged"] = n - len(kept) < self.least * n
        if len(kept) > k and self._ends(tokens, len(kept)):
            best = top(attention[kept], k).sort().values
            place_of = torch.full_like(kept, -1)
            place_of[best] = torch.arange(k, device=kept.device)
            kept, merge = kept[best], place_of[merge]
        return Cut(kept, None if same else merge, final=len(kept) == k)

    def _target(self, tokens: LayerTokens) -> int:
        """How many tokens may be left from this layer on. Raises ValueError when `cost` is spent already."""
        if self.cost is None:
            return budget(self.keep, tokens.total)
        since, room = tokens.memory.get("since", 0), tokens.memory.get("room", self.cost * tokens.depth * tokens.total)
        room -= (tokens.layer - since) * len(tokens)
        tokens.memory.update(since=tokens.layer, room=room)
        k = round(room / (tokens.depth - tokens.layer))
        if k < 1:
            raise ValueError(
                f"{self.name}: cost={self.cost} is spent before layer {tokens.layer} of {tokens.depth}; choose more, "
                "or an earlier `first`"
            )
        return k

    def _ends(self, tokens: LayerTokens, left: int) -> bool:
        """Whether merging must not go on: no later cut, or nothing of `cost` would be left for what is behind it."""
        later = [cut for cut in self.layers(tokens.depth) if cut > tokens.layer]
        if not later or self.cost is None:
            return not later
        return tokens.memory["room"] - (later[0] - tokens.layer) * left < tokens.depth - later[0]

    def remarks(self, pictures: Sequence[ImageReport]) -> tuple[str, ...]:
        """Say what was left whole."""
        whole = sum(not is_video(picture.views) for picture in pictures)
        return (f"{self.name}: prunes videos; {whole} still picture(s) kept whole",) if whole else ()

    def visual_per_layer(self, picture: Picture, depth: int) -> Sequence[int]:
        """As for a video in which nothing repeats itself: what merges is known to the hidden states alone."""
        if picture.frames == 1 or self.left(0, picture.tokens, depth) is not None:
            return [picture.span] * depth
        whole = min((self.first or 1) + 1, depth - 1)
        k = budget(self.keep, picture.tokens)
        if self.cost is not None:
            k = max(1, round((self.cost * depth - whole) * picture.tokens / (depth - whole)))
        return [picture.span] * whole + [k] * (depth - whole)

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """A row of attention at each cut, of which there are two for a video in which nothing repeats itself."""
        layers = model.decoder.layers
        depth = len(layers)
        if picture.frames == 1 or self.left(0, picture.tokens, depth) is not None:
            return 0
        before = (layers[cut - 1] for cut in self.layers(depth))
        attending = [layer for layer in before if isinstance(layer.mixer, Attention)]
        return sum(layer.statistic(1, text + picture.span) for layer in attending[:2])

    def attach(self, patch: Patch) -> None:
        """Install door 2 with the cuts that this decoder allows: behind layers that attend and deepstack features."""
        config = patch.base.get_decoder().config
        depth = config.num_hidden_layers
        kinds = getattr(config, "layer_types", None) or ("full_attention",) * depth
        stacked = getattr(patch.model.config.vision_config, "deepstack_visual_indexes", ())
        first = self.first or max(1, len(stacked))
        cuts = tuple(layer for layer in range(first, depth) if kinds[layer - 1] != "linear_attention")
        if not cuts:
            raise ValueError(f"{self.name}: first={first} in a decoder with {depth} layers; choose 1 to {depth - 1}")
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        LayersDoor(patch, _Settled(**settings, cuts=cuts), self.positions or self.authors)


@dataclass(frozen=True, kw_only=True)
class _Settled(FrameFusion):
    """The method on one decoder, whose possible cuts it knows."""

    cuts: tuple[int, ...] = ()

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.cuts
