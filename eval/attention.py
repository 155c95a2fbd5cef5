"""Where attention goes: to sinks, to visual tokens, to other text, in every layer, before and after an edit.

No attention map is made and no method has to help. A probe stands before the method in every decoder layer: it runs
the method once more on the same call, with values that are one-hot in the class of their key. Attention averages
values, so what comes out is the mass of each class, edited as the method edits it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import vlmfast
from vlmfast.adapters import from_spec
from vlmfast.edits import Call, EditsDoor
from vlmfast.edits.engine import rescore
from vlmfast.layers.tokens import Placed

CLASSES = ("sinks", "image", "text")
ROWS = ("prompt", "answer")
NEW_TOKENS = 8  # generated behind each prompt, at most
SINKS = "sinks"  # under which name methods remember tokens as sinks, bool [B, K], or of some heads, [B, H, K]


def edits(spec: str) -> bool:
    """Whether a spec edits attention."""
    return any(adapter.kind == "attention" for adapter in from_spec(spec))


def measure(
    model: Any, spec: str, prompts: Sequence[Mapping[str, Any]], *, new_tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """Where text looks, in the unpatched model and under a spec: plain data for a result file.

    model: unpatched. prompts: inputs of `generate`, one prompt with a picture each; both runs answer them greedily
    with at most `new_tokens` tokens.

    -> `before` and `after`, each {rows: {class: [share of every layer]}}, means over heads, rows and prompts; layers
    whose attention is more than softmax(q k^T) v hold None.
    Rows: "prompt", text behind the picture; "answer", rows that decide on a generated token: the prompt's last one,
    and those generated.
    Classes: "sinks", the prompt's first token and, unless tokens are dropped, those that the method remembers as
    sinks (of any head); "image", other visual tokens; "text", other text, generated tokens included.
    Shares of a row sum to 1. `total` {rows: [of every layer]} is what its weights sum to under the spec before that: 1
    where the method renormalises. `edited`: the layers that the spec edits.

    Raises ValueError for prompts of several rows, or without a picture.
    """
    if not prompts:
        raise ValueError("no prompts to measure attention on")
    sums = {name: Shares() for name in ("before", "after")}
    layers: tuple[int, ...] = ()
    depth = model.config.get_text_config().num_hidden_layers
    # Where tokens were dropped, what a method remembers of those that are left does not say which they were.
    sinks: dict[int, Tensor] | None = {} if any(adapter.drops for adapter in from_spec(spec)) else None
    for inputs in prompts:
        if len(inputs["input_ids"]) != 1:
            raise ValueError(f"one prompt at a time: got a batch of {len(inputs['input_ids'])}")
        after, layers = profile(model, spec, inputs, new_tokens, sinks)
        found = {number: one.sinks for number, one in after.items() if one.sinks is not None}
        before, _ = profile(model, "none", inputs, new_tokens, found)
        for name, seen in (("before", before), ("after", after)):
            sums[name].add(seen)
    return {
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "edited": list(layers),
        "before": sums["before"].table(depth),
        "after": sums["after"].table(depth),
        "total": sums["after"].totals(depth),
    }


@dataclass
class Seen:
    """What was seen of one layer while a prompt was answered.

    masses: by rows, [n, C + 1] each, mean over heads: the shares of the classes and the row's total. sinks: bool
    [1, K], those that the method remembers.
    """

    masses: dict[str, list[Tensor]] = field(default_factory=dict)
    sinks: Tensor | None = None


def profile(
    model: Any,
    spec: str,
    inputs: Mapping[str, Any],
    new_tokens: int = NEW_TOKENS,
    sinks: Mapping[int, Tensor] | None = None,
) -> tuple[dict[int, Seen], tuple[int, ...]]:
    """Answer one prompt under a spec and look where it looks. -> (by layer, layers that the spec edits)

    sinks: of each layer, bool [1, K], instead of those that the method remembers.
    """
    seen: dict[int, Seen] = {}
    with vlmfast.patch(model, spec) as handle, torch.no_grad(), probing(handle, seen, sinks) as edited:
        model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1)
    if not any("answer" in one.masses for one in seen.values()):
        raise ValueError("the prompt has no picture, or no text behind it")
    return seen, edited


@contextmanager
def probing(
    handle: Any, seen: dict[int, Seen], sinks: Mapping[int, Tensor] | None = None
) -> Iterator[tuple[int, ...]]:
    """Let a probe look at every layer of a patched model. -> the layers that the methods edit

    The probes go with the patch.
    """
    door = EditsDoor.of(handle.patch)
    edited = tuple(sorted(door.editors))
    stand_in(door, lambda editor: Probe(editor, seen, sinks))
    others = [number for number in door.attends if number not in edited and probed(door.decoder.layers[number])]
    if others:
        door.add(Probe(None, seen, sinks, tuple(others)))
    yield edited


def stand_in(door: EditsDoor, beside: Callable[[Any], Any], count: int | None = None) -> None:
    """Let another editor stand for each one of a door, or for those of the first `count` edited layers."""
    twins: dict[int, Any] = {}
    for number in sorted(door.editors)[:count]:
        editor = door.editors[number]
        twin = twins.setdefault(id(editor), beside(editor))
        door.editors[number] = twin
        if editor in door.wanted:  # the same statistics of the vision tower
            door.wanted[twin] = door.wanted[editor]


def probed(layer: Any) -> bool:
    """Whether a decoder layer's attention is softmax(q k^T) v and no more."""
    module = layer.self_attn
    return getattr(module, "attn_logit_softcapping", None) is None and getattr(module, "sinks", None) is None


@dataclass(frozen=True, eq=False)
class Probe:
    """Stands for the editor of some layers, notes where attention goes, and then does what the editor does."""

    inner: Any  # the editor; None: the layers are not edited
    seen: dict[int, Seen]
    sinks: Mapping[int, Tensor] | None = None
    layers: tuple[int, ...] = ()
    name: str = "probe"

    @property
    def needs_visual(self) -> bool:
        """It tells visual tokens from others."""
        return True

    @property
    def compares(self) -> bool:
        """Whether the editor does."""
        return self.inner is not None and self.inner.compares

    def where(self, attends: Sequence[int], depth: int) -> Sequence[int]:
        """The layers given."""
        return self.layers

    def marks(self, picture: Placed) -> Mapping[str, Tensor]:
        """What the editor wants to know."""
        return {} if self.inner is None else self.inner.marks(picture)

    def edit(self, call: Call) -> Tensor:
        """Note the masses, then edit as the editor does."""
        memory = copy.deepcopy(call.memory)
        edited = call.plain() if self.inner is None else self.inner.edit(call)
        if call.free is not None:  # the image-free stream passes once: the method remembers what it decided by it
            memory = copy.deepcopy(call.memory)
        one = self.seen.setdefault(call.layer, Seen())
        classes = self.classes(call, one)
        shares, total = split(self.masses(call, classes, memory), classes.shape[-1])
        found = torch.cat([shares, total], dim=-1).mean(dim=1)  # over heads
        ends = call.ends & call.visual.any(1, keepdim=True)
        for rows, chosen in (("prompt", call.after_visual & call.prompt), ("answer", ends)):
            if bool(chosen.any()):
                one.masses.setdefault(rows, []).append(found[chosen].double().cpu())
        return edited

    def classes(self, call: Call, one: Seen) -> Tensor:
        """The class of each key, one-hot. fp32 [B, K, C]; padding has none"""
        columns = torch.arange(call.key.shape[2], device=call.key.device)
        sinks = columns == call.initial[:, None]
        known = call.recall(SINKS) if self.sinks is None else self.sinks.get(call.layer)
        if known is not None:
            one.sinks = known = known.bool() if known.ndim == 2 else known.bool().any(dim=1)
            count = min(known.shape[1], sinks.shape[1])
            sinks = sinks.clone()
            sinks[:, :count] |= known[:, :count]
        sinks = sinks & call.real
        image = call.visual & ~sinks
        return torch.stack([sinks, image, call.real & ~image & ~sinks], dim=-1).float()

    def masses(self, call: Call, classes: Tensor, memory: dict[str, Any]) -> Tensor:
        """What each row pays to each class, edited. fp32 [B, H, Q, C or more], further entries zero"""
        query, key, heads = call.query.float(), call.key.float(), call.key.shape[1]
        # As wide as the values are, so that the method takes the very path it takes with them.
        width = max(0, call.value.shape[-1] - classes.shape[-1])
        value = torch.nn.functional.pad(classes, (0, width))[:, None].expand(-1, heads, -1, -1).contiguous()
        own = rescore(query, key, value, lambda scores: scores, call.scaling, call.seen).transpose(1, 2)
        if self.inner is None:
            return own.transpose(1, 2)
        twin = replace(
            call,
            query=query,
            key=key,
            value=value,
            memory=memory,
            own=lambda: own.clone(),
            note=lambda text: None,
            free=None,
        )
        edited: Tensor = self.inner.edit(twin)
        return edited


def split(masses: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Masses [..., C or more] -> (shares of their sum [..., C], the sum [..., 1])."""
    masses = masses[..., :count]
    total = masses.sum(dim=-1, keepdim=True)
    return masses / total.masked_fill(total == 0, 1.0), total


class Shares:
    """Means over prompts of what was seen."""

    def __init__(self) -> None:
        self.found: dict[str, dict[int, list[Tensor]]] = {rows: {} for rows in ROWS}

    def add(self, seen: Mapping[int, Seen]) -> None:
        """One more prompt: every prompt counts the same, however many rows it has."""
        for number, one in seen.items():
            for rows, parts in one.masses.items():
                self.found[rows].setdefault(number, []).append(torch.cat(parts).mean(dim=0))

    def table(self, depth: int) -> dict[str, dict[str, list[float | None]]]:
        """{rows: {class: [share of every layer]}}"""
        return {rows: dict(zip(CLASSES, self._columns(rows, depth))) for rows in ROWS}

    def totals(self, depth: int) -> dict[str, list[float | None]]:
        """{rows: [sum of every layer]}"""
        return {rows: self._columns(rows, depth)[-1] for rows in ROWS}

    def _columns(self, rows: str, depth: int) -> list[list[float | None]]:
        """The means of each class, and of the total, in every layer."""
        means = {number: torch.stack(parts).mean(dim=0).tolist() for number, parts in self.found[rows].items()}
        return [
            [round(means[number][place], 5) if number in means else None for number in range(depth)]
            for place in range(len(CLASSES) + 1)
        ]
