"""Golden sets of the selections by diversity and by merging: VisionZip, DivPrune, CDPruner, VisPruner.

Each function yields (what, ours, theirs) for one case of its set, through the functions that production runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmfast.adapters.pruning.cdpruner import greedy_map, relevance
from vlmfast.adapters.pruning.divprune import DivPrune, max_min
from vlmfast.adapters.pruning.visionzip import merge, take_apart
from vlmfast.adapters.pruning.vispruner import VisPruner
from vlmfast.visual import VisualTokens

Arrays = Callable[[str], Tensor]
Checks = Iterator[tuple[str, Tensor, Tensor]]


def visionzip(case: dict[str, Any], array: Arrays) -> Checks:
    """Kept tokens, targets, assignment and the final tokens, CLS among the dominant ones."""
    dominant, contextual = case["hyper"]["dominant"], case["hyper"]["contextual"]
    attention, hidden, keys = array("in_{}_attn_cls").mean(1), array("in_{}_hidden"), array("in_{}_metric")
    for view in range(len(attention)):
        patches = hidden[view, 1:]
        one = take_apart(attention[view, 1:], keys[view, 1:], dominant - 1, contextual)
        zero, none = torch.zeros(1, dtype=torch.long), -torch.ones(1, dtype=torch.long)
        yield f"kept {view}", torch.cat([zero, one.dominant + 1]), array("out_{}_kept")[view]
        yield f"targets {view}", one.targets + 1, array("out_{}_targets")[view]
        yield f"assign {view}", torch.cat([none, one.assign]), array("out_{}_assign")[view]
        tokens = torch.cat([hidden[view, :1], patches[one.dominant], merge(patches, one, official=True)])
        yield f"tokens {view}", tokens, array("out_{}_tokens")[view]


def divprune(case: dict[str, Any], array: Arrays) -> Checks:
    """Order of choice and kept tokens; the repaired form agrees where nothing is double."""
    features, order = array("in_{}_tokens"), array("out_{}_order")
    ratio, n = case["hyper"]["ratio"], case["hyper"]["n"]
    for parity in ("official", "repaired"):
        yield f"order {parity}", max_min(features, n, parity == "official"), order
        method = DivPrune(keep=float(ratio), parity=parity)
        yield (
            f"kept {parity}",
            method.choose(VisualTokens(features, (1, 1, len(features)), 0)).kept,
            array("out_{}_kept"),
        )


def cdpruner(case: dict[str, Any], array: Arrays) -> Checks:
    """Relevance over all views, order of choice and kept tokens of each."""
    features = array("in_{}_features")
    score = relevance(array("in_{}_image_embeds"), array("in_{}_text_embeds"), negate=True)
    yield "relevance", score, array("out_{}_relevance")
    for official in (True, False):
        order = torch.stack([greedy_map(x, r, case["hyper"]["T"], official) for x, r in zip(features, score)])
        yield f"order official={official}", order, array("out_{}_order")
        yield f"kept official={official}", order.sort().values, array("out_{}_kept")


def vispruner(case: dict[str, Any], array: Arrays) -> Checks:
    """Kept tokens."""
    attention, features = array("in_{}_attn_cls").mean(1), array("in_{}_features")
    method = VisPruner(keep=case["hyper"]["T"], important=case["hyper"]["important_ratio"])
    kept = []
    for score, hidden in zip(attention, features):
        scores = {"attention": score, "hidden": hidden}
        kept.append(method.choose(VisualTokens(hidden, (1, 1, len(hidden)), 0, scores=scores)).kept)
    yield "kept", torch.stack(kept), array("out_{}_kept")


SETS = {"cdpruner": cdpruner, "divprune": divprune, "visionzip": visionzip, "vispruner": vispruner}
