"""Golden sets of the methods that drop tokens between decoder layers: see parity.py, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast.adapters.pruning.fastv import FastV
from vlmfast.adapters.pruning.lscenellm import singled_out
from vlmfast.layers.scores import measure
from vlmfast.layers.tokens import LayerScore, LayerTokens
from vlmfast.rewriting import gather_index
from vlmfast.visual import VisualTokens

Case = dict[str, Any]
Arrays = Callable[[str], Tensor]
Checks = Iterator[tuple[str, Tensor, Tensor]]


@dataclass(frozen=True)
class _Query:
    """Queries [1, H, 1, S] that, with the unit vectors as keys, have a given row [H, S] of attention."""

    row: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return self.row.log()[None, :, None].expand(-1, -1, len(rows), -1)


def fastv(case: Case, array: Arrays) -> Checks:
    """The last query's row, the tokens it keeps, and the shorter sequence with its positions."""
    hyper, row, hidden = case["hyper"], array("in_{}_attn_last"), array("in_{}_hidden")
    start, n, length = hyper["image_start"], hyper["image_len"], hyper["seq_len"]
    keys = torch.eye(length)[None, None]
    scores = measure(LayerScore(), _Query(row), torch.tensor([length - 1]), keys, 0, None, 1.0)
    score = scores[start : start + n]
    yield "score", score, array("out_{}_score")
    method = FastV(keep=1 - hyper["fastv_r"])
    tokens = LayerTokens(
        layer=2,
        depth=32,
        hidden=hidden[0, start : start + n],
        text=hidden[0, :0],
        question=torch.ones(0, dtype=torch.bool),
        index=torch.arange(n),
        visual=VisualTokens(hidden[0, start : start + n], (1, 1, n), n),
        total=n,
        keep=method.left(2, n, 32),
        scores={"attention": score},
    )
    kept = method.cut(tokens).kept
    yield "kept", kept, array("out_{}_kept_image")
    keep = torch.ones(1, length, dtype=torch.bool)
    keep[0, start : start + n] = False
    keep[0, start + kept] = True
    index, _ = gather_index(keep, torch.ones_like(keep))
    yield "sequence", index[0], array("out_{}_kept_seq")
    yield "hidden", hidden[:, index[0]], array("out_{}_hidden")
    yield "positions", torch.arange(length)[None].gather(1, index), array("out_{}_position_ids")


def lscenellm_selector(case: Case, array: Arrays) -> Checks:
    """Which finer tokens each row of the question sees: `k` for every visual token that it singles out."""
    hyper, attention = case["hyperparameters"], array("{}__in_attn")
    first, begin, n = hyper["q0"], hyper["v0"], hyper["nv"]
    rows = attention.sum(1)[:, first:, begin : begin + n]
    seen = torch.zeros(*attention.shape[::2], n * hyper["k"], dtype=torch.bool)
    seen[:, first:] = singled_out(rows, hyper["thr"]).repeat_interleave(hyper["k"], dim=-1)
    yield "mask", seen, array("{}__out_select_mask")


SETS: dict[str, Callable[[Case, Arrays], Checks]] = {"fastv": fastv, "lscenellm_selector": lscenellm_selector}
