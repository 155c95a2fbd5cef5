"""What editing attention costs, each as a ratio of readings taken in turns in one process.

Only the language model is measured; pictures are encoded before. Per model and method, for prefill and for each
further token, over the unpatched model with its own attention (SDPA):

* **patched**: the method as it is.
* **eager**: the unpatched model with eager attention, whose maps most official codes need before they edit anything.
* **maps**: the same method on these maps, rows and columns as a whole. What a method finds out about its keys besides
  (ACT's sums over columns) runs as it does when patched, not from the map.
* **memory**: the most bytes that a prefill holds, and that one edited layer's attention holds.

The spec "none" shows the noise of the machine.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import vlmfast
from vlmfast.adapters import from_spec
from vlmfast.edits import Call, EditsDoor
from vlmfast.edits.engine import Factors
from vlmfast.eval import bench
from vlmfast.eval.attention import stand_in
from vlmfast.eval.latency import (
    MB,
    Clock,
    Spread,
    image_inputs,
    interleave,
    peak_bytes,
    ratio,
)
from vlmfast.layers.tokens import Placed
from vlmfast.patching import entrance

STEPS = 8  # further tokens a reading
PATHS = ("patched", "eager", "maps")
Run = Callable[[], AbstractContextManager[Any]]  # opens a variant of the model


def edits_only(spec: str) -> bool:
    """Whether a spec edits attention and does no more: it drops no token and runs no second prompt in `generate`."""
    adapters = from_spec(spec)
    branches = [branch for adapter in adapters if (branch := getattr(adapter, "branch", None)) is not None]
    return (
        bool(adapters)
        and all(adapter.kind == "attention" for adapter in adapters)
        and all(branch.gamma == 1 for branch in branches)
    )


def bench_edits(
    name_or_path: str,
    specs: Sequence[str],
    *,
    repeats: int = 5,
    threads: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[dict[str, Any]]:
    """Measure methods that edit attention on one model; one row (plain data) per spec. Arguments as `bench.bench`.

    ValueError, TypeError, NotImplementedError or OSError for a wrong spec, model, device or number.
    """
    settings: dict[str, Any] = {"repeats": repeats, "threads": threads, "device": device, "dtype": dtype}
    return bench.measured(measure_edits, name_or_path, specs, **settings, kind="edits")


# --- the same method on full maps ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MapCall(Call):
    """A call whose edits are made on the whole map [B, H, Q, K], keys and values repeated, as eager attention does.

    Maps change in place, and only in the rows that are edited: no dearer than need be. Not for training.
    """

    def scores(self) -> Tensor:
        """Masked scores, hidden entries -inf. fp32 [B, H, Q, K]"""
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        scores = (self.query @ key.transpose(-1, -2)).float().mul_(self.scaling)
        mask = self.seen.of(slice(None), self.key.shape[2])
        if mask is None:
            return scores
        if mask.dtype != torch.bool:
            mask = mask > torch.finfo(mask.dtype).min / 2
        return scores.masked_fill_(~mask, -torch.inf)

    def shown(self, scores: Tensor) -> Tensor:
        """Probabilities; rows of padding are zero. fp32 [B, H, Q, K]"""
        return scores.softmax(dim=-1).nan_to_num_(0.0)

    def attend(self, shown: Tensor) -> Tensor:
        """Probabilities times values. -> [B, H, Q, d]"""
        value = self.value.repeat_interleave(self.query.shape[1] // self.value.shape[1], dim=1)
        return shown.to(value.dtype) @ value

    def redistribute(self, classes: Sequence[Tensor], factors: Factors, rows: Tensor | None = None) -> Tensor:
        """As `Call.redistribute`."""
        member = torch.stack(torch.broadcast_tensors(*classes), dim=-1).float()

        def edit(shown: Tensor) -> Tensor:
            wanted = factors(shown @ member)
            return shown * (1 + (wanted - 1) @ member.transpose(-1, -2))

        return self.attend(in_rows(self.shown(self.scores()), edit, rows))

    def rescore(self, edit: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> Tensor:
        """As `Call.rescore`."""
        return self.attend(self.shown(in_rows(self.scores(), edit, rows)))

    def correct(
        self,
        member: Tensor,
        factors: Callable[[Tensor], tuple[Tensor, Tensor]],
        heads: Tensor | None = None,
        *,
        lse: Tensor | None = None,
        exact: Factors | None = None,
    ) -> Tensor:
        """As `Call.correct`."""
        shown = self.shown(self.scores())
        some = shown if heads is None else shown[:, heads]
        few = member[:, :, None]
        mass = (some * few).sum(dim=-1)
        if exact is None:
            on_few, on_others = factors(mass)
        else:
            on_few, on_others = exact(torch.stack([mass, (some * ~few).sum(dim=-1)], dim=-1)).unbind(-1)
        some.mul_(torch.where(few, on_few[..., None], on_others[..., None]))
        return self.attend(shown if heads is None else shown.index_copy_(1, heads, some))


def in_rows(values: Tensor, edit: Callable[[Tensor], Tensor], rows: Tensor | None) -> Tensor:
    """A map [B, H, Q, K], edited in some rows, bool [B, Q], or in all."""
    if rows is None:
        return edit(values)
    union = rows.any(0).nonzero().flatten()
    some = values[:, :, union]
    return values.index_copy_(2, union, torch.where(rows[:, None, union, None], edit(some), some))


@dataclass(frozen=True, eq=False)
class Beside:
    """An editor that stands for another one."""

    inner: Any

    @property
    def name(self) -> str:
        """The other one's."""
        return str(self.inner.name)

    @property
    def needs_visual(self) -> bool:
        """As the other one."""
        return bool(self.inner.needs_visual)

    @property
    def compares(self) -> bool:
        """As the other one."""
        return bool(self.inner.compares)

    def where(self, attends: Sequence[int], depth: int) -> Sequence[int]:
        """As the other one."""
        found: Sequence[int] = self.inner.where(attends, depth)
        return found

    def marks(self, picture: Placed) -> Mapping[str, Tensor]:
        """As the other one."""
        found: Mapping[str, Tensor] = self.inner.marks(picture)
        return found

    def edit(self, call: Call) -> Tensor:
        """As the other one."""
        edited: Tensor = self.inner.edit(call)
        return edited


class Mapped(Beside):
    """Makes the other one's edits on full maps."""

    def edit(self, call: Call) -> Tensor:
        """The other one's edit."""
        return super().edit(MapCall(**{one.name: getattr(call, one.name) for one in fields(call)}))


class Enough(Exception):
    """Ends a forward that has told what was asked of it."""


@dataclass(frozen=True, eq=False)
class Weighed(Beside):
    """Notes the most bytes that the attention of one layer holds, the model's own and edited, and ends the forward."""

    found: dict[str, int]

    def edit(self, call: Call) -> Tensor:
        """Raises Enough."""
        self.found["own"] = peak_bytes(call.own, call.query.device)
        self.found["edited"] = peak_bytes(lambda: self.inner.edit(call), call.query.device)
        raise Enough


@contextmanager
def eager(model: Any) -> Any:
    """The language model with eager attention."""
    own = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": own})


@contextmanager
def through_maps(model: Any, spec: str) -> Any:
    """The language model with eager attention, whose maps a method edits."""
    with eager(model), vlmfast.patch(model, spec) as handle:
        stand_in(EditsDoor.of(handle.patch), Mapped)
        yield handle


# --- measuring -------------------------------------------------------------------------------------------------


def measure_edits(
    model: Any, inputs: Mapping[str, Any], specs: Sequence[str], *, repeats: int, threads: int, warmup: int = 1
) -> list[dict[str, Any]]:
    """Rows of `bench_edits` for a loaded, unpatched model and one prompt with its picture."""
    device = entrance(model)
    clock = Clock.of(device, threads)
    images = image_inputs(model, inputs)
    text = {name: value for name, value in inputs.items() if name not in images or name == "image_grid_thw"}
    variants: dict[str, Run] = {"unpatched": nullcontext, "eager": partial(eager, model)}
    for spec in specs:
        variants[f"patched {spec}"] = partial(vlmfast.patch, model, spec)
        if edits_only(spec):
            variants[f"maps {spec}"] = partial(through_maps, model, spec)
    # Statistics of the tower that a method wants come with the encoded picture.
    encoded = {}
    for name in variants:
        spec = name.partition(" ")[2] or "none"
        if spec not in encoded:
            with vlmfast.patch(model, spec), torch.no_grad():
                encoded[spec] = model.base_model.get_image_features(**images, return_dict=True)

    def forward(name: str) -> Any:
        picture = encoded[name.partition(" ")[2] or "none"]
        return model(**text, mm_encoder_outputs={"image": picture}, use_cache=True, logits_to_keep=1)

    def prefill(name: str) -> float:
        with variants[name]():
            return clock.milliseconds(lambda: forward(name))

    def decoding(name: str) -> Callable[[], float]:
        with variants[name](), torch.no_grad():
            first = forward(name)
        token, cache = first.logits.argmax(dim=-1), first.past_key_values

        def steps() -> None:
            for _ in range(STEPS):
                model(input_ids=token, past_key_values=cache, use_cache=True)

        def work() -> float:
            with variants[name]():
                taken = clock.milliseconds(steps) / STEPS
            cache.crop(-STEPS)
            return taken

        return work

    times = {
        "prefill": interleave({name: partial(prefill, name) for name in variants}, repeats=repeats, warmup=warmup),
        "decode": interleave({name: decoding(name) for name in variants}, repeats=repeats, warmup=warmup),
    }
    peaks = {}
    for name, opened in variants.items():
        with opened():
            peaks[name] = peak_bytes(partial(forward, name), device)
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    rows = []
    for spec in specs:
        names = {"patched": f"patched {spec}", "eager": "eager", "maps": f"maps {spec}"}
        names = {what: name for what, name in names.items() if name in variants}
        rows.append(
            {
                "spec": spec,
                "device": str(device),
                "threads": threads,
                "clock": clock.name,
                "repeats": repeats,
                "text_tokens": inputs["input_ids"].shape[1] - tokens,
                "visual_tokens": tokens,
                "unpatched_ms": {part: asdict(Spread.of(taken["unpatched"])) for part, taken in times.items()},
                "over_unpatched": {
                    part: {what: asdict(ratio(taken[name], taken["unpatched"])) for what, name in names.items()}
                    for part, taken in times.items()
                },
                "memory": {
                    "prefill": {what: peaks[name] for what, name in {"unpatched": "unpatched", **names}.items()},
                    "layer": _layer_bytes(variants, names, forward),
                },
            }
        )
    return rows


def _layer_bytes(
    variants: Mapping[str, Run], names: Mapping[str, str], forward: Callable[[str], Any]
) -> dict[str, int] | None:
    """Most bytes that the attention of the first edited layer holds in a prefill: own, patched, on maps."""
    if "maps" not in names:
        return None
    found: dict[str, int] = {}
    for what in ("patched", "maps"):
        weights: dict[str, int] = {}
        with variants[names[what]]() as handle, torch.no_grad():
            stand_in(EditsDoor.of(handle.patch), partial(Weighed, found=weights), 1)
            with suppress(Enough):
                forward(names[what])
        if "edited" in weights:
            found |= {what: weights["edited"], **({"own": weights["own"]} if what == "patched" else {})}
    return found or None


def print_edits(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Print rows of `bench_edits`: for each model time and memory, then how memory grows with the tokens."""
    console = console or Console()
    for model, about in {row["model"]: row["about"] for row in rows}.items():
        mine = [row for row in rows if row["model"] == model]
        first = mine[0]
        over = first["over_unpatched"]
        console.print(f"\n[bold]{model}[/bold]: {about}", highlight=False)
        console.print(
            f"{first['visual_tokens']} visual and {first['text_tokens']} text tokens; {first['clock']}, "
            f"{first['threads']} thread(s), {first['device']}, {first['dtype']}, {first['repeats']} rounds; language "
            f"model unpatched: prefill {first['unpatched_ms']['prefill']['median']:.4g} ms, "
            f"{first['unpatched_ms']['decode']['median']:.3g} ms a further token; eager attention alone: prefill "
            f"{bench._ratio(over['prefill']['eager'])}, a further token {bench._ratio(over['decode']['eager'])}",
            highlight=False,
        )
        speed = bench._table(
            "time over unpatched: patched, and the same method on full maps",
            ("method", "prefill", "decode", "maps prefill", "maps decode"),
        )
        memory = bench._table(
            "most memory in MB: prefill of the language model; attention of one layer",
            ("method", "plain", "patched", "eager", "maps", "layer", "patched", "maps"),
        )
        for row in mine:
            cells = [
                bench._ratio(row["over_unpatched"][part][what]) if what in row["over_unpatched"][part] else "-"
                for what in ("patched", "maps")
                for part in ("prefill", "decode")
            ]
            speed.add_row(row["spec"], *cells)
            peaks, layer = row["memory"]["prefill"], row["memory"]["layer"] or {}
            memory.add_row(
                row["spec"],
                *(f"{peaks[what] / MB:.1f}" if what in peaks else "-" for what in ("unpatched", *PATHS)),
                *(f"{layer[what] / MB:.2f}" if what in layer else "-" for what in ("own", "patched", "maps")),
            )
        console.print(speed, memory)
    for line in growth(rows):
        console.print(line, highlight=False)
    console.print(
        "Ratios: median over rounds of readings paired within a round, ± half the interquartile range. The row none "
        "shows the measuring error.",
        highlight=False,
    )


def growth(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How the memory of one layer's attention grows with the tokens, for methods measured on two lengths, in words."""
    lines = []
    for spec in dict.fromkeys(row["spec"] for row in rows):
        sizes = {
            row["visual_tokens"] + row["text_tokens"]: row["memory"]["layer"]
            for row in rows
            if row["spec"] == spec and row["memory"]["layer"]
        }
        if len(sizes) < 2:
            continue
        short, long = min(sizes), max(sizes)
        grown = {what: sizes[long][what] / sizes[short][what] for what in ("patched", "maps")}
        lines.append(
            f"{spec}: {long / short:.2f} times the tokens take {grown['patched']:.2f} times the memory in a layer "
            f"patched, {grown['maps']:.2f} times on full maps"
        )
    return lines
