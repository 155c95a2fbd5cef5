"""Which decoder layers can do without attention between visual tokens: each tried, and what it changes measured.

    ranking = vlmfast.rank_layers(model, inputs)
    vlmfast.patch(model, f"eemllm:layers={ranking.setting(12)}")
    ranking.save("ranking.json")                              # eemllm:layers=ranking.json,top=12

A layer is good when the answers hardly notice: composite attention (`vlmfast.composite`) in that layer alone moves the
distribution of the next token little, where an answer is decided on:

    D_l = mean over positions of KL(p || p_l),   p the unpatched model's distribution, p_l that with layer l, fp32

The decoder's last layer comes first, with 0: nothing looks at what becomes of visual tokens behind it. Of equals the
later one is better. `greedy`: layers are added one by one, each time the one with which all so far change least, as
RedundancyLens does (arXiv:2501.19036); D is then that of the layer with all before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.adapter import ATTENTION, Adapter
from vlmfast.composite import CompositeDoor, checked, contradicts
from vlmfast.edits import EditsDoor
from vlmfast.families import Family
from vlmfast.patching import Patch, install, shallow, unwrap
from vlmfast.ranges import DEEP, attending, which

FORMAT = "vlmfast layer ranking 1"
HOW = "make one with vlmfast.rank_layers(model, inputs).save(FILE), or vlmfast rank-layers"
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Ranking:
    """Decoder layers by what composite attention in them changes, least first; `print` shows a table.

    order: layers, from 0 on. divergence: by layer, nats (see the module's docstring). depth: layers of the decoder.
    visual_update: how visual tokens were moved on (`vlmfast.composite.UPDATES`). greedy: each measured with those
    before it. prompts, positions: measured over. model: its name.
    """

    order: tuple[int, ...]
    divergence: Mapping[int, float]
    depth: int
    visual_update: str
    greedy: bool
    prompts: int
    positions: int
    model: str = ""

    def best(self, n: int | float) -> tuple[int, ...]:
        """The n layers that change least, ascending; n may be a share of all ranked ones, as a float in (0, 1].

        Raises ValueError for more layers than were ranked, and for other numbers.
        """
        total = len(self.order)
        fits = 0 < n <= 1 if isinstance(n, float) else isinstance(n, int) and 0 <= n <= total
        if isinstance(n, bool) or not fits:
            raise ValueError(f"{n!r} of {total} ranked layers: a number from 0 to {total}, or a share such as 0.5")
        return tuple(sorted(self.order[: round(n * total) if isinstance(n, float) else n]))

    def setting(self, n: int | float) -> str:
        """`best` as methods take layers: "3/7/9"; "none" where there are none."""
        return "/".join(map(str, self.best(n))) or "none"

    def to_json(self) -> str:
        """What `save` writes."""
        content = {
            "format": FORMAT,
            "model": self.model,
            "depth": self.depth,
            "visual_update": self.visual_update,
            "greedy": self.greedy,
            "prompts": self.prompts,
            "positions": self.positions,
            "order": list(self.order),
            "divergence": {str(layer): self.divergence[layer] for layer in self.order},
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write it as a JSON file, for `layers=FILE`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Ranking:
        """Read one back. Raises ValueError for anything that is not such a file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError("another kind of file")
            order = tuple(int(layer) for layer in content["order"])
            found = cls(
                order,
                {layer: float(content["divergence"][str(layer)]) for layer in order},
                int(content["depth"]),
                checked(content["visual_update"]),
                bool(content["greedy"]),
                int(content["prompts"]),
                int(content["positions"]),
                str(content["model"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no ranking of layers ({error}); {HOW}") from error
        if not order or len(set(order)) < len(order) or not 0 <= min(order) <= max(order) < found.depth:
            raise ValueError(f"{path}: no ranking of layers (layers 0 to {found.depth - 1}, each once); {HOW}")
        return found

    def __str__(self) -> str:
        how = "added one by one" if self.greedy else "each alone"
        lines = [
            f"composite attention (visual_update={self.visual_update}) in {len(self.order)} of {self.depth} decoder "
            f"layers, {how}; {self.prompts} prompts, {self.positions} positions",
            " rank  layer  divergence from the unpatched model, nats",
        ]
        lines += [f"{rank:5}  {layer:5}  {self.divergence[layer]:.3e}" for rank, layer in enumerate(self.order, 1)]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Trial(Adapter):
    """Composite attention that is switched on and off, layer by layer."""

    name: ClassVar[str] = "rank_layers"
    door: ClassVar[int] = ATTENTION
    layers: str | int = "all"
    visual_update: str = "self"

    @classmethod
    def unsupported(cls, family: Family) -> str | None:
        """As composite attention."""
        return contradicts(family)

    def attach(self, patch: Patch) -> None:
        """Stand in every layer that is tried."""
        edits = EditsDoor.of(patch)
        layers = attending(self.layers, edits.attends, edits.depth, self.name, "try without")
        CompositeDoor(patch, self.name, layers, self.visual_update)


def rank_layers(
    model: Any,
    inputs: Inputs | Iterable[Inputs],
    *,
    visual_update: str = "self",
    layers: str | int = "all",
    greedy: bool = False,
    count: int | None = None,
    progress: Callable[[], None] | None = None,
) -> Ranking:
    """Rank decoder layers by what composite attention in them changes in the model's answers.

    Parameters
    ----------
    model          an unpatched model of a supported family in evaluation mode; it is left as it was
    inputs         a batch of prompts as the processor gives them, or several batches; padded on either side. The
                   position that counts is each prompt's last token; with `labels`, all that predict one of them
    visual_update  "self", "ffn" or "none": how visual tokens are moved on in a layer that is tried
    layers         which are tried: "all", numbers and ranges joined by slashes. Without attention: left out
    greedy         add layers one by one instead of trying each alone: some L^2 / 2 forwards instead of L
    count          greedy: how many are chosen so; the others follow in the order of the last round. None: all
    progress       called after every trial (`trials` tells how many there will be)

    Raises ValueError for wrong arguments, for prompts without a picture and for logits that are no numbers;
    RuntimeError for a patched model; NotImplementedError for families or layers that composite attention cannot be
    in.
    """
    checked(visual_update)
    which(layers, DEEP)
    target = unwrap(model)
    if target.training:
        raise ValueError("rank_layers measures a model as it answers: call model.eval() first")
    if count is not None and (not greedy or isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(f"count={count!r}: how many layers greedy=True chooses one by one, 1 or more")
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    for batch in batches:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise ValueError("rank_layers takes inputs as the processor gives them, with input_ids")
    with install(model, (Trial(layers=layers, visual_update=visual_update),), Trial.name) as handle, torch.no_grad():
        edits = EditsDoor.of(handle.patch)
        if not any(bool(_visual(edits.tokens, batch).any()) for batch in batches):
            raise ValueError("rank_layers needs prompts with pictures: without one no layer changes anything")
        door = next(one for one in edits.editors.values() if isinstance(one, CompositeDoor))
        measuring = _Measuring(handle.patch, door, batches, progress)
        order, divergence = _greedy(measuring, door.layers, count) if greedy else _alone(measuring, door.layers)
        return Ranking(
            tuple(order),
            divergence,
            edits.depth,
            visual_update,
            greedy,
            sum(len(batch["input_ids"]) for batch in batches),
            measuring.positions,
            str(getattr(target.config, "_name_or_path", "")),
        )


def trials(layers: int, greedy: bool = False, count: int | None = None) -> int:
    """How many sets of layers `rank_layers` tries on every batch."""
    rounds = min(layers, layers if count is None else count)
    return sum(layers - one for one in range(rounds)) if greedy else layers


def _alone(measuring: _Measuring, layers: Sequence[int]) -> tuple[list[int], dict[int, float]]:
    """Each layer by itself. -> order, divergence by layer"""
    found = dict(zip(layers, measuring([{layer} for layer in layers])))
    return sorted(layers, key=lambda layer: (found[layer], -layer)), found


def _greedy(measuring: _Measuring, layers: Sequence[int], count: int | None) -> tuple[list[int], dict[int, float]]:
    """Layers added one by one. -> order, divergence of each with all before it"""
    order: list[int] = []
    divergence: dict[int, float] = {}
    left = list(layers)
    while left and (count is None or len(order) < count):
        found = dict(zip(left, measuring([{*order, layer} for layer in left])))
        left.sort(key=lambda layer: (found[layer], -layer))
        order.append(left.pop(0))
        divergence |= found
    return [*order, *left], divergence


def _visual(tokens: Collection[int], batch: Inputs) -> Tensor:
    """Which tokens are visual. bool [B, L]"""
    ids: Tensor = batch["input_ids"]
    return torch.isin(ids, torch.tensor(sorted(tokens), device=ids.device))


def deciding(batch: Inputs) -> Tensor:
    """The positions whose next token is (part of) an answer. bool [B, L]

    Those that predict a label, in prompts that have one; of others, and without labels, the last that is no padding.
    """
    ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    last = real & (real.flip(1).long().cumsum(1).flip(1) == 1)
    if labels is None:
        return last
    answer = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1)) & real
    return torch.where(answer.any(1, keepdim=True), answer, last)


class _Once:
    """Stands for a function that encodes pictures: each picture once, known by its tensors."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.held: list[tuple[list[Tensor], Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, the first time."""
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        for known, output in self.held:
            if len(known) == len(given) and all(one is other for one, other in zip(known, given)):
                return shallow(output)
        output = self.original(*args, **kwargs)
        if hasattr(output, "pooler_output"):
            self.held.append((given, output))
        return output


class _Measuring:
    """Measures sets of layers over all batches. positions: of one measurement, known after the first."""

    def __init__(
        self, patch: Patch, door: CompositeDoor, batches: Sequence[Inputs], progress: Callable[[], None] | None
    ) -> None:
        self.model, self.door, self.batches, self.progress = patch.model, door, batches, progress
        self.positions = 0
        self.encoders = []
        for name in dict.fromkeys(source.encode for source in patch.family.sources.values()):
            once = _Once(getattr(patch.base, name))
            patch.set(patch.base, name, once)
            self.encoders.append(once)

    def __call__(self, sets: Sequence[Collection[int]]) -> list[float]:
        """The mean divergence of each set of layers."""
        totals, self.positions = [0.0] * len(sets), 0
        for batch in self.batches:
            for once in self.encoders:
                once.held.clear()
            plain = self._distributions(batch, ())
            self.positions += len(plain)
            for number, layers in enumerate(sets):
                totals[number] += divergence(plain, self._distributions(batch, layers))
                if self.progress is not None and batch is self.batches[-1]:
                    self.progress()
        return [total / self.positions for total in totals]

    def _distributions(self, batch: Inputs, layers: Collection[int]) -> Tensor:
        """Log-probabilities at the deciding positions, with some layers. [P, V] fp32"""
        where = deciding(batch)
        columns = where.any(0).nonzero().flatten()
        self.door.active = frozenset(layers)
        given = {name: value for name, value in batch.items() if name != "labels"}
        logits = self.model(**{**given, "use_cache": False, "logits_to_keep": columns}).logits
        return logits[where[:, columns].to(logits.device)].float().log_softmax(-1)


def divergence(plain: Tensor, other: Tensor) -> float:
    """KL(plain || other), summed over positions, nats. Log-probabilities [P, V] each.

    Raises ValueError where it is no number.
    """
    terms = torch.where(plain == -torch.inf, 0.0, plain.exp() * (plain - other))
    total = float(terms.sum(-1).clamp(min=0).double().sum())
    if not total < float("inf"):
        raise ValueError(f"the divergence of a layer is {total}: the model's logits are no numbers in this dtype")
    return total
