"""Golden sets of the methods that redistribute attention: see parity.py, which runs them.

An official map of scores becomes a call of a decoder layer: queries are the scores, keys are unit vectors, and with
unit vectors as values the output is the edited map itself. What runs is the method's `edit`, as in production.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmfast.adapters.attention.act import ACT
from vlmfast.adapters.attention.zerotuning import ZeroTuning
from vlmfast.edits import Call

Case = dict[str, Any]
Arrays = Callable[[str], Tensor]
Checks = Iterator[tuple[str, Tensor, Tensor]]


def call_of(scores: Tensor, value: Tensor | None = None, **known: Any) -> Call:
    """A call whose masked scores are these. [B, H, Q, K] -> value None: its output is the map [B, H, Q, K]

    known: further fields of `Call`.
    """
    batch, _, n_query, n_key = scores.shape
    units = torch.eye(n_key).expand(batch, 1, -1, -1)
    heads = scores.shape[1]
    query = scores.clamp(min=torch.finfo(torch.float32).min)
    key = units.expand(-1, heads, -1, -1)
    value = key if value is None else value
    nothing = torch.zeros(batch, n_key, dtype=torch.bool)
    ends = torch.zeros(batch, n_query, dtype=torch.bool)
    ends[:, -1] = True
    fields: dict[str, Any] = {
        "layer": 0,
        "depth": 1,
        "start": n_key - n_query,
        "mask": None,
        "causal": False,  # the scores are masked
        "window": None,
        "hidden": torch.zeros(batch, n_query, 1),
        "visual": nothing,
        "real": ~nothing,
        "initial": torch.zeros(batch, dtype=torch.long),
        "prompt": n_query > 1,
        "ends": ends,
        "note": lambda text: None,
    }
    plain = (query.softmax(-1) @ value).transpose(1, 2)
    return Call(query=query, key=key, value=value, scaling=1.0, own=lambda: plain, **(fields | known))


def act(case: Case, array: Arrays) -> Checks:
    """The sinks of each head, and the calibrated map."""
    hyper, heads = case["hyperparameters"], array("{}__in_heads")
    call = call_of(array("{}__in_attn").log())
    method = ACT(
        beta=hyper["beta"],
        theta=hyper["threshold"],
        layers="all",
        heads="/".join(map(str, heads.tolist())),
        parity="official",
    )
    found = torch.zeros(call.query.shape[1], call.key.shape[2], dtype=torch.bool)
    found[heads] = method.sinks(call.of_heads(heads))[0][0]
    yield "sinks", found, array("{}__out_sink_cols")
    yield "attention", method.edit(call), array("{}__out_attn")


def zerotuning(case: Case, array: Arrays) -> Checks:
    """The tuned map and its product with the values."""
    hyper, scores = case["hyperparameters"], array("{}__in_scores")
    heads = None if hyper["heads"] is None else "/".join(map(str, hyper["heads"]))
    layers = "all" if hyper["layers"] is None else "/".join(map(str, hyper["layers"]))
    method = ZeroTuning(
        gamma=hyper["rate"], start=hyper["st"], end=hyper["en"], heads=heads, layers=layers, parity="official"
    )
    depth = max([hyper["layer"], *(hyper["layers"] or [])]) + 1
    edits = not method.neutral and hyper["layer"] in method.where(range(depth), depth)
    for name, value in (("attn", None), ("context", array("{}__in_value"))):
        call = call_of(scores, value, layer=hyper["layer"], depth=depth)
        yield name, method.edit(call) if edits else call.plain(), array(f"{{}}__out_{name}")


SETS: dict[str, Callable[[Case, Arrays], Checks]] = {"act": act, "zerotuning": zerotuning}
