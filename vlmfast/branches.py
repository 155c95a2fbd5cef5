"""Door 4, branches: a second prompt beside the first, and the logits of both decide together on each token.

A `Branch` says two things: what its prompt is, made from the one that `generate` was given, and what becomes of the
two rows of logits. Everything else is done here, once: a cache of the branch's own, masks and positions that grow with
the answer, rows without a picture, beams.

The branch acts as the last of `generate`'s logits processors, in front of temperature, top-k and their like: what the
others forbid is forbidden already when a branch decides what is plausible, so that something is always left to choose
from. Direct calls of the model give its own logits, in training too. What it hands on are log-probabilities: greedy
search and sampling do not see a constant of the row, beam search adds the values up and would.

A processor is not told of reordered beams. So the branch compares the tokens it has seen with those it is shown: rows
with the same past, of the same prompt, have the same cache, and one is chosen for each. Where no row has it (drafts of
an assistant that were thrown away) the branch starts again. Nothing is left on the prompts' cache; its kind does not
matter, nor does what it holds, as long as `input_ids` tell the whole conversation.

The branch's prompt runs on the patched model in a call of its own, behind the prompts'. Later tokens go through it in
one batch with the prompts' where that is possible (see `vlmfast.pairing`), else in a call of their own.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from vlmfast.conversation import state_of
from vlmfast.decoders import Sizes
from vlmfast.edits import EditsDoor
from vlmfast.pairing import Pairing
from vlmfast.patching import HANDLE, Patch, Report


@dataclass(frozen=True)
class Prompts:
    """The prompts with a picture, as `generate` got them, each as often as it has rows (beams, return sequences).

    ids: [R, L]; real: bool [R, L], no padding; visual: bool [R, L], placeholders. rows: int64 [R], rows of the batch;
    repeat: rows of the batch a prompt. first_position: of the first token of a prompt. given: the arguments of
    `generate` by name; `of` fits them to the rows. pictures: what the branch's own door knows of the pictures.
    """

    ids: Tensor
    real: Tensor
    visual: Tensor
    rows: Tensor
    repeat: int = 1
    first_position: int = 0
    given: Mapping[str, Any] = field(default_factory=dict)
    pictures: Any = None

    def of(self, name: str) -> Tensor | None:
        """An argument with one entry a prompt, in the rows' order. [R, ...]; None where it was not given"""
        values = self.given.get(name)
        return None if values is None else values[(self.rows // self.repeat).to(values.device)].to(self.ids.device)


@dataclass(frozen=True)
class Start:
    """The first forward of a branch.

    ids: [R, M]; real: bool [R, M], padding is on the left. positions: [R, M], or [A, R, M] with several axes;
    following: [R] position of the first generated token. more: further arguments of the model, for this forward alone.
    """

    ids: Tensor
    real: Tensor
    positions: Tensor
    following: Tensor
    more: Mapping[str, Any] = field(default_factory=dict)


class Branch(Protocol):
    """What a method that decodes with a second prompt has to say."""

    @property
    def name(self) -> str:
        """The method's, as in its spec."""
        ...

    @property
    def what(self) -> str:
        """What happens to generated tokens, in the words of a report: they are ..."""
        ...

    def combine(self, logits: Tensor, branch: Tensor, step: int) -> Tensor:
        """Scores of the next token from the prompts' logits and the branch's, fp32. [R, V] each; -inf: never.

        step: how many tokens have been generated until now.
        """
        ...


@runtime_checkable
class Starting(Protocol):
    """A branch that makes its own prompts; otherwise its door does (see `vlmfast.branch_pictures`)."""

    def start(self, prompts: Prompts) -> Start:
        """The branch's prompts."""
        ...


def plausible(scores: Tensor, logits: Tensor, share: float) -> Tensor:
    """The scores, -inf for tokens less likely than `share` times the likeliest by `logits`. [..., V] each

    What the logits rule out stays out. share: 0: nothing else is.
    """
    out = logits.isneginf()
    if share > 0:
        out = out | (logits < math.log(share) + logits.amax(-1, keepdim=True))
    return scores.masked_fill(out, -torch.inf)


def contrast(logits: Tensor, branch: Tensor, gamma: float, plausibility: float = 0.1) -> Tensor:
    """gamma (c - u) + u of the log-probabilities c, u; tokens less likely than plausibility max c are out. [..., V]

    PAI (arXiv:2407.21771), and PAINT after it. gamma of 1 gives c, and rules nothing out.
    """
    own, other = logits.float().log_softmax(-1), branch.float().log_softmax(-1)
    if gamma == 1:
        return own
    implausible = own < math.log(plausibility) + own.amax(-1, keepdim=True)
    return (gamma * (own - other) + other).masked_fill(implausible, -torch.inf)


@dataclass(frozen=True)
class ImageFreeBranch:
    """The branch without pictures: the same text, placeholders taken out, positions counted anew.

    Tokens that a template puts around a picture (`<|vision_start|>`, `<row_1_col_1>`, ...) are text like any other.
    """

    name: str
    gamma: float
    plausibility: float = 0.1
    what: str = "contrasted with the same text without its pictures"

    def __post_init__(self) -> None:
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)) or not 0 <= self.gamma < 1e6:
            raise ValueError(
                f"gamma={self.gamma!r}: a number from 0 on; above 1: away from what is said without pictures; "
                "1: no branch"
            )
        if not isinstance(self.plausibility, (int, float)) or not 0 < self.plausibility <= 1:
            raise ValueError(
                f"plausibility={self.plausibility!r}: a share in (0, 1] of the likeliest token's probability"
            )

    def start(self, prompts: Prompts) -> Start:
        """The text. Raises ValueError where a prompt has none."""
        text = prompts.real & ~prompts.visual
        counts = text.sum(1)
        if not bool(counts.all()):
            row = int(prompts.rows[counts.argmin()])
            raise ValueError(f"{self.name}: row {row} is a picture alone: nothing is left without it")
        order = text.long().argsort(dim=1, stable=True)[:, -int(counts.max()) :]
        real = text.gather(1, order)

        def taken(values: Tensor) -> Tensor:
            return values.gather(1, order).masked_fill(~real, 0)

        # Gemma 3 sees pictures by their type (there are none left), PaliGemma its prefix: text stays what it was.
        types = prompts.of("token_type_ids")
        more = {} if types is None else {"token_type_ids": taken(types)}
        positions = (real.long().cumsum(1) - 1).clamp(min=0) + prompts.first_position
        return Start(taken(prompts.ids), real, positions, counts + prompts.first_position, more)

    def combine(self, logits: Tensor, branch: Tensor, step: int = 0) -> Tensor:
        """`contrast`. [R, V]"""
        return contrast(logits, branch, self.gamma, self.plausibility)

    def prefill_flops(self, text: int, model: Sizes) -> int:
        """X2 of the branch's own prompt, until its first logits (see `vlmfast.cost`)."""
        return sum(layer.flops(text, text) for layer in model.decoder.layers) + model.decoder.head


class BranchDoor:
    """Lets one method decode with a branch, on one patched model.

    pairs: whether the branch's tokens go through the model in one batch with the prompts' where that is possible.
    running: the branch of the `generate` that runs. steps: of the last one, how many were paired and how many not.
    """

    branch: Branch
    pairs: bool = True

    def __init__(self, patch: Patch, branch: Branch) -> None:
        handle = patch.model.__dict__[HANDLE]
        others = [one.branch.name for one in handle.reporters if isinstance(one, BranchDoor)]
        if others:
            raise NotImplementedError(
                f"{others[0]} and {branch.name} both decode with a second branch: choose one (gamma=1 leaves it out)"
            )
        self.patch, self.branch = patch, branch
        config = patch.model.config
        self.tokens = [int(getattr(config, source.token)) for source in patch.family.sources.values()]
        self.running: Running | None = None
        self.steps = [0, 0]
        self.pairing = Pairing(self, patch)
        handle.reporters.append(self)
        patch.set(patch.model, "generate", Generate(self, patch.model))

    @contextmanager
    def beside(self, prompt: int) -> Iterator[None]:
        """The branch runs: other doors do not take its tokens for those of the prompts. prompt: its columns"""
        with ExitStack() as stack:
            for one in self.patch.reporters:
                if isinstance(one, EditsDoor):
                    stack.enter_context(one.beside(prompt))
            yield

    def begin(self, ids: Tensor, real: Tensor, given: dict[str, Any]) -> Any:
        """A `generate` begins. -> what `start` wants to know of its pictures (`Prompts.pictures`)

        ids, real: [B, L] of the prompts. given: its arguments by name, which may change.
        """
        return None

    def end(self, pictures: Any, cache: Any) -> None:
        """A `generate` is over; a further turn may go on with its cache, None: nobody has it."""

    def start(self, prompts: Prompts) -> Start:
        """The branch's prompts."""
        if not isinstance(self.branch, Starting):
            raise NotImplementedError(f"{type(self.branch).__name__} does not implement start")
        return self.branch.start(prompts)

    def report(self, report: Report) -> Report:
        """Say that there is a branch."""
        together, apart = self.steps
        if together and apart:
            how = f"{together} in one batch with the prompts, {apart} in a second forward"
        elif together or (self.pairs and self.pairing.possible and not apart):
            how = "in one batch with the prompts"
        else:
            how = "a second forward each"
        note = f"{self.branch.name}: generated tokens are {self.branch.what}, {how}"
        return replace(report, notes=(*report.notes, note))


class Generate:
    """Stands for the instance's `generate`: puts the branch behind the other logits processors."""

    def __init__(self, door: BranchDoor, model: Any) -> None:
        self.door, self.model, self.original = door, model, model.generate
        functools.update_wrapper(self, self.original, updated=())  # none of the attributes of another door

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. Raises where the branch's prompt cannot be known."""
        given = {**dict(zip(inspect.signature(self.original).parameters, args)), **kwargs}
        ids = given.get("inputs", given.get("input_ids"))
        if ids is None or not ids.numel():
            if given.get("inputs_embeds") is not None:
                raise NotImplementedError(
                    f"{self.door.branch.name} needs input_ids; inputs_embeds hide where the images are"
                )
            return self.original(*args, **kwargs)
        real = self._real(ids, given)
        processors = [*(given.pop("logits_processor", None) or ())]
        pictures = self.door.begin(ids, real, given)
        branch = Running(self.door, ids, real, dict(given), pictures)
        before, self.door.running, self.door.steps = self.door.running, branch, [0, 0]
        try:
            output = self.original(**given, logits_processor=LogitsProcessorList([*processors, branch]))
        finally:
            self.door.running, self.door.pairing.few = before, 0
        for cache in (given.get("past_key_values"), getattr(output, "past_key_values", None)):
            self.door.end(pictures, cache)
        return output

    def _real(self, ids: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Which tokens are no padding, as `generate` sees it. bool [B, L]"""
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        state = state_of(cache)
        held = 0 if cache is None else int(cache.get_seq_length()) + (0 if state is None else state.dropped)
        if ids.shape[1] <= held or (mask is not None and mask.shape != ids.shape):
            raise ValueError(
                f"{self.door.branch.name}: {ids.shape[1]} input_ids, of a conversation of "
                f"{held + ids.shape[1] if mask is None else mask.shape[-1]}: pass all of it, so that the branch knows "
                "what was said before"
            )
        if mask is not None:
            return mask.bool()
        config = given.get("generation_config") or self.model.generation_config

        def setting(name: str) -> Any:
            return getattr(config, name, None) if given.get(name) is None else given[name]

        pad, ends = setting("pad_token_id"), setting("eos_token_id")
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        if pad is None or pad in ends:
            return torch.ones_like(ids, dtype=torch.bool)
        return ids != pad


class Running(LogitsProcessor):
    """The branch of one running `generate`."""

    def __init__(
        self, door: BranchDoor, ids: Tensor, real: Tensor, given: Mapping[str, Any], pictures: Any = None
    ) -> None:
        """ids, real: [B, L] of the prompts, before rows are repeated."""
        self.door, self.given, self.real, self.pictures = door, given, real, pictures
        self.visual = torch.isin(ids, torch.tensor(door.tokens, device=ids.device)) & real
        self.prompts: Prompts | None = None
        self.first: Start | None = None
        self.whole = False  # whether that has no padding
        self.cache: Any = None
        self.seen: Tensor | None = None  # [R, n] tokens that the branch knows, as the user counts
        self.logits: Tensor | None = None  # [R, V] behind them

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of rows with a picture become those of both branches, normalised. [B, L], [B, V] -> [B, V]"""
        if self.prompts is None:
            self.prompts = self._prompts(input_ids)
        rows = self.prompts.rows
        if not len(rows):
            return scores
        branch = self._behind(input_ids[rows]).to(scores.device)
        step = input_ids.shape[1] - self.prompts.ids.shape[1]
        combined = self.door.branch.combine(scores[rows].float(), branch, step).log_softmax(-1)
        return scores.index_copy(0, rows, combined.to(scores.dtype))

    def _prompts(self, ids: Tensor) -> Prompts:
        """What the branch is made from. ids: [B, L] of the first call, which are the prompts"""
        repeat = len(ids) // len(self.real)
        width = self.real.shape[1]
        real, visual = (values.repeat_interleave(repeat, 0).to(ids.device) for values in (self.real, self.visual))
        rows = visual.any(1).nonzero().flatten()
        first = self.door.patch.family.first_position
        return Prompts(ids[rows, :width], real[rows], visual[rows], rows, repeat, first, self.given, self.pictures)

    def _behind(self, ids: Tensor) -> Tensor:
        """The branch's logits behind these tokens. [R, L] -> [R, V]"""
        order = self._order(ids)
        if order is None:
            self._restart()
        elif len(order):
            self._reorder(order)
        assert self.seen is not None and self.logits is not None
        if ids.shape[1] > self.seen.shape[1]:
            self._forward(ids[:, self.seen.shape[1] :])
        self.seen = ids
        return self.logits

    def _order(self, ids: Tensor) -> Tensor | None:
        """Which row of the branch each row goes on from. int64 [R]; empty: its own; None: some row has no past here"""
        assert self.prompts is not None
        if self.seen is None or ids.shape[1] < self.seen.shape[1]:
            return None
        before, rows = ids[:, : self.seen.shape[1]], self.prompts.rows
        if torch.equal(before, self.seen):
            return rows[:0]
        prompt = rows // self.prompts.repeat
        generated = slice(self.prompts.ids.shape[1], None)
        same = (before[:, None, generated] == self.seen[None, :, generated]).all(-1)
        same = same & (prompt[:, None] == prompt[None])
        return same.long().argmax(1) if bool(same.any(1).all()) else None

    def _reorder(self, order: Tensor) -> None:
        assert self.logits is not None and self.seen is not None
        self.cache.reorder_cache(order)
        self.logits, self.seen = self.logits[order.to(self.logits.device)], self.seen[order.to(self.seen.device)]

    # --- in one batch with the prompts ----------------------------------------------------------------------------

    def follows(self, ids: Tensor) -> bool:
        """Whether all that comes before the next token is known, row by row. Rows are put in order. [R, L]"""
        if self.logits is None or self.seen is None or ids.shape != self.seen.shape:
            return False
        order = self._order(ids)
        if order is not None and len(order):
            self._reorder(order)
        return order is not None

    def joined(self, ids: Tensor, logits: Tensor) -> None:
        """The last token went through the model with the prompts'. [R, L], logits behind it [R, V]"""
        self.seen, self.logits = ids, logits.float()
        self.door.steps[0] += 1

    @property
    def width(self) -> int:
        """Columns of the branch's prompts."""
        assert self.first is not None
        return self.first.ids.shape[1]

    def behind(self, new: int) -> tuple[Tensor | None, Tensor]:
        """Mask and positions of tokens that follow: [R, held + new] int64, None where all is real; [R, new]"""
        assert self.first is not None
        held, following = self.cache.get_seq_length(), self.first.following
        place = held - self.width + torch.arange(new, device=following.device)
        real = None
        if not self.whole:
            real = torch.nn.functional.pad(self.first.real, (0, held + new - self.width), value=True).long()
        return real, following[:, None] + place

    # --- apart ------------------------------------------------------------------------------------------------------

    def _restart(self) -> None:
        """The branch's prompts through the model."""
        assert self.prompts is not None
        if self.first is None:
            self.first = self.door.start(self.prompts)
            self.whole = bool(self.first.real.all())
        self.cache = DynamicCache(config=self.door.patch.model.config.get_text_config(decoder=True))
        self.seen = self.prompts.ids
        self._forward(None)

    def _forward(self, tokens: Tensor | None) -> None:
        """A forward of the branch. tokens: [R, n] that follow; None: its prompts"""
        first, model = self.first, self.door.patch.model
        assert first is not None and self.prompts is not None
        more: Mapping[str, Any] = {}
        if tokens is None:
            tokens, positions, more = first.ids, first.positions, first.more
            mask = None if self.whole else first.real.long()
        else:
            mask, positions = self.behind(tokens.shape[1])
            self.door.steps[1] += 1
        device = self.prompts.ids.device  # not the model's, which may be in several places
        with self.door.beside(self.width):
            output = model(
                input_ids=tokens.to(device),
                attention_mask=None if mask is None else mask.to(device),
                position_ids=positions.to(device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                return_dict=True,
                **{name: one.to(device) if isinstance(one, Tensor) else one for name, one in more.items()},
            )
        self.logits = output.logits[:, -1].float()
