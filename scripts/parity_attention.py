"""Golden sets of the methods that redistribute attention: see parity.py, which runs them.

An official map of scores becomes a call of a decoder layer: queries are the scores, keys are unit vectors, and with
unit vectors as values the output is the edited map itself. What runs is the method's `edit`, as in production.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast.adapters.attention.act import ACT
from vlmfast.adapters.attention.pai import PAI
from vlmfast.adapters.attention.paint import PAINT
from vlmfast.adapters.attention.var import VAR
from vlmfast.adapters.attention.vhr import VHR, Divergence
from vlmfast.adapters.attention.zerotuning import ZeroTuning
from vlmfast.attention import EDIT
from vlmfast.branches import ImageFreeBranch
from vlmfast.edits import Call
from vlmfast.layers.tokens import Placed
from vlmfast.lockstep import ImageFree
from vlmfast.visual import VisualTokens

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
    fields |= {"own": lambda: plain}
    return Call(query=query, key=key, value=value, scaling=1.0, **(fields | known))


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


def pai(case: Case, array: Arrays) -> Checks:
    """The boosted map, or what becomes of the logits of both prompts."""
    hyper = case["hyperparameters"]
    if "gamma" in hyper:
        branch = ImageFreeBranch("pai", hyper["gamma"], hyper["plausibility"])
        yield (
            "scores",
            branch.combine(array("{}__in_cond_logits"), array("{}__in_uncond_logits")),
            array("{}__out_scores"),
        )
        return
    scores = array("{}__in_scores")
    visual = torch.zeros(scores.shape[0], scores.shape[-1], dtype=torch.bool)
    visual[:, hyper["i0"] : hyper["i1"]] = True
    # The flag is set while the image-free prompt runs and before the first prompt: no boost in either.
    method = PAI(alpha=hyper["alpha"] * hyper["use_attn"], gamma=1.1 if hyper["use_cfg"] else 1, parity="official")
    call = call_of(scores, visual=visual, **({"prompt": True} if hyper["use_cfg"] else {}))
    yield "attn", method.edit(call), array("{}__out_attn")


def paint(case: Case, array: Arrays) -> Checks:
    """The two sets of visual tokens, and the map boosted on them."""
    hyper, scores = case["hyperparameters"], array("{}__in_scores")
    n, begin = hyper["nv"], hyper["i0"]
    method = PAINT(**{name: hyper[name] for name in ("alpha", "beta", "ratio")}, gamma=1, parity="official")
    rows = {"early": "{}__in_vit_cls_layer0", "late": "{}__in_vit_cls_layer_m2"}
    rows_of = {name: array(row).mean(0)[-n:] for name, row in rows.items()}
    visual = VisualTokens(torch.empty(n, 1), (1, 1, n), n + 1, scores=rows_of)
    columns = torch.arange(begin, begin + n)
    codes = method.marks(Placed(0, 0, visual, columns, torch.arange(n), columns[:0]))["paint"]
    yield "local", codes == 1, array("{}__out_local_mask")
    yield "summary", codes == 2, array("{}__out_summary_mask")
    marks = torch.zeros(scores.shape[0], scores.shape[-1])
    marks[:, columns] = codes.float()
    yield "attn", method.edit(call_of(scores, visual=marks > 0, marks={"paint": marks})), array("{}__out_attn")


def var(case: Case, array: Arrays) -> Checks:
    """Sinks, the rows that look at the picture and those that are rewritten, and the redistributed map."""
    hyper, shown = case["hyperparameters"], array("{}__in_attn")
    method = VAR(
        p=hyper["p"],
        rho=hyper["rho"],
        tau=hyper["tau"],
        summ=hyper["summ"],
        dims="/".join(map(str, hyper["dims"])),
        layers="all",
        parity="official",
    )
    visual = torch.zeros(len(shown), shown.shape[-1], dtype=torch.bool)
    visual[:, hyper["im"] : hyper["im"] + hyper["pa"]] = True
    memory: dict[str, Any] = {}
    if shown.shape[2] == 1:  # a generated token: the prompt was there before
        hidden = array("{}__in_prefill_hidden")
        held = hidden.shape[1]
        scores = torch.zeros(len(shown), shown.shape[1], held, held)
        method.edit(call_of(scores, hidden=hidden, visual=visual[:, :held], prompt=True, memory=memory))
        call = call_of(shown.log(), visual=visual, memory=memory)
    else:
        call = call_of(shown.log(), hidden=array("{}__in_hidden"), visual=visual, prompt=True, memory=memory)
    edited = method.edit(call)
    yield "sinks", memory["sinks"].any(0).nonzero().flatten(), array("{}__out_sink_indices")
    classes = method.classes(call)
    masses = torch.stack([(shown * member[:, :, None]).sum(-1) for member in classes], dim=-1)
    selected = method.selected(masses, visual.sum(1)) & classes[1].any()  # none in a layer without a visual sink
    yield "selected", selected, array("{}__out_selected")
    yield "modified", selected & method.rows(call)[:, None], array("{}__out_modified")
    yield "attention", edited, array("{}__out_attn")


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


@dataclass(frozen=True)
class _TextLayer:
    """A decoder layer of an image-free stream, whose heads give known outputs [H, d] for one token."""

    outputs: Tensor

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Hand the outputs to the method whose turn it is."""
        nothing = torch.empty(0)
        turn = kwargs[EDIT]
        turn.attend(None, nothing, nothing, nothing, None, 1.0, lambda: self.outputs[None, None], {})
        return hidden


def vhr_paper(case: Case, array: Arrays) -> Checks:
    """What tells the heads apart, those reinforced, and later tokens with them (from the paper, not its code)."""
    hyper, full, text = case["hyperparameters"], array("{}__in_full"), array("{}__in_text")
    method = VHR(alpha=hyper["alpha"], topk=hyper["topk"], layers="all")
    found = Divergence.of(full, text)
    yield "vhd", found.distance, array("{}__out_vhd")
    yield "ta", found.text, array("{}__out_ta")
    yield "outlier", found.outlier, array("{}__out_outlier")
    yield "tvhd", found.total(hyper["topk"]), array("{}__out_tvhd_topk_sum")
    one = torch.zeros(1, full.shape[0], 1, 1)
    noted = {0: (torch.zeros(1, 1, 1), (), {})}
    free = ImageFree([_TextLayer(text)], torch.tensor([0]), torch.ones(1, 1).bool(), last=0, _noted=noted)
    memory: dict[str, Any] = {}
    method.edit(call_of(one, own=lambda: full[None, None], free=free, memory=memory))
    yield "selected", memory["heads"][0], array("{}__out_selected")
    later = array("{}__in_x")
    heads = later.unflatten(-1, full.shape)
    edited = method.edit(call_of(one, own=lambda: heads, memory=memory))
    yield "x", edited.transpose(1, 2).flatten(2), array("{}__out_x")


SETS: dict[str, Callable[[Case, Arrays], Checks]] = {
    "act": act,
    "pai": pai,
    "paint": paint,
    "var": var,
    "vhr_paper": vhr_paper,
    "zerotuning": zerotuning,
}
