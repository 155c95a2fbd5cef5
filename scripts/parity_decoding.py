"""Golden sets of the methods that change what is generated: see parity.py, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmfast.adapters.decoding.deco import DeCo
from vlmfast.adapters.decoding.dola import DoLa, divergences
from vlmfast.adapters.decoding.only import ONLY, textual
from vlmfast.edits.engine import weighted

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


IMAGE = range(35, 611)  # columns of the picture in the authors' prompt


def only(case: Case, array: Arrays) -> Checks:
    """One layer's attention to the text, or what becomes of both logits."""
    hyper = case["hyperparameters"]
    if "H" in hyper:
        shown = array("{}__in_scores").softmax(-1)
        columns = torch.arange(shown.shape[-1])
        image = ((columns >= IMAGE.start) & (columns < IMAGE.stop))[None, None, None]
        edited, ratio, dropped = textual(shown, ~image & (columns > 0), image)
        yield "ratio", ratio[0], array("{}__out_ratio")
        yield "heads", dropped[0], array("{}__out_removed_heads")
        context = weighted(edited, array("{}__in_value")).transpose(1, 2).flatten(2)
        yield "context", context, array("{}__out_context_cd")
        return
    weights = {name: hyper[name] for name in ("alpha_pos", "alpha_neg", "beta", "gamma")}
    method = ONLY(**weights, parity="official")
    logits, side = array("{}__in_logits"), array("{}__in_logits_alt")
    yield "difference", method.difference(logits, side)[0, 0], array("{}__out_tvd")
    if hyper["t"] is None:
        yield "logits", method.combine(logits, side), array("{}__out_logits")


SETS: dict[str, Callable[[Case, Arrays], Checks]] = {"deco": deco, "dola": dola, "only": only}
