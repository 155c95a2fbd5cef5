"""Golden sets of the methods that change what is generated: see parity.py, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmfast.adapters.decoding.deco import DeCo
from vlmfast.adapters.decoding.dola import DoLa, divergences

Case = dict[str, Any]
Arrays = Callable[[str], Tensor]
Checks = Iterator[tuple[str, Tensor, Tensor]]


def dola(case: Case, array: Arrays) -> Checks:
    """Divergences, the layer they choose for the batch, and the contrast."""
    hyper = case["hyperparameters"]
    layers = hyper["candidate_layers"]
    logits, premature = array("{}__in_mature_logits"), array("{}__in_premature_logits")
    method = DoLa(layers="/".join(map(str, layers)), relative_top=hyper["relative_top"], parity="official")
    yield "js", divergences(logits, premature).mean(1), array("{}__out_js")
    yield "layer", torch.tensor(layers)[method.choice(logits, premature)][0], array("{}__out_layer")
    yield "logits", method.combine(logits, premature), array("{}__out_logits")


def deco(case: Case, array: Arrays) -> Checks:
    """The corrected logits."""
    hyper = case["hyperparameters"]
    layers = "/".join(map(str, hyper["layers"]))
    method = DeCo(alpha=hyper["alpha"], top_p=hyper["top_p"], top_k=hyper["top_k"], layers=layers)
    yield "logits", method.combine(array("{}__in_logits"), array("{}__in_early_logits")), array("{}__out_logits")


SETS: dict[str, Callable[[Case, Arrays], Checks]] = {"deco": deco, "dola": dola}
