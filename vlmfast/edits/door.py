"""Door 3, edits: which tokens are what, from prompt to prompt, and which method edits which decoder layer.

A hook on the base model sees the ids that really enter it (rewritten by the inputs door where there is one) and notes
on the cache which columns are visual tokens and which are padding; a hook on every edited layer hands its attention a
`Call`. Everything a method remembers lives on the cache beside it and goes with it: nothing leaks into another prompt.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vlmfast.attention import EDIT, tap
from vlmfast.conversation import STATE, CacheState
from vlmfast.edits.call import Call
from vlmfast.encoding import asked
from vlmfast.inputs import Door
from vlmfast.layers.cache import sizes
from vlmfast.layers.door import PASS, LayersDoor
from vlmfast.layers.tokens import PROMPT, Placed, Prompt
from vlmfast.lockstep import ImageFree
from vlmfast.patching import HANDLE, Patch, Report, shallow
from vlmfast.rewriting import present
from vlmfast.visual import Score

EDITS = "vlmfast_edits"  # keyword of a forward: its Pass; attribute of a cache: its Memory


class Editor(Protocol):
    """What the door needs of a method that edits attention."""

    @property
    def name(self) -> str:
        """As in its spec."""
        ...

    def where(self, attends: Sequence[int], depth: int) -> Sequence[int]:
        """Which layers to edit, of those that attend (others hold one state of all tokens). ValueError for others."""
        ...

    @property
    def needs_visual(self) -> bool:
        """Whether it must know which tokens are visual."""
        ...

    @property
    def compares(self) -> bool:
        """Whether it compares prompts with the same ones without their pictures (`Call.free`)."""
        ...

    def edit(self, call: Call) -> Tensor:
        """The attention of one call, edited. -> [B, H, Q, d]"""
        ...

    def marks(self, picture: Placed) -> Mapping[str, Tensor]:
        """What it wants to know of each token of a picture: values [n] by name.

        A method with `wanted(tower)`, as methods that prune have it, finds these statistics of the vision tower in
        `picture.visual.scores`.
        """
        ...


class Watcher(Protocol):
    """What the door needs of a method that looks at attention and changes nothing."""

    @property
    def active(self) -> bool:
        """Whether it wants to see the forward that runs."""
        ...

    def watch(self, call: Call) -> None:
        """See one call, as it is before another method edits it."""
        ...


@runtime_checkable
class Summing(Protocol):
    """A method that sums up what its calls noted, layer by layer, before it is reported."""

    def remarks(self, notes: Sequence[str]) -> Sequence[str]:
        """Lines of the report. notes: what the calls of the last prompts noted, each once, in order."""
        ...


@dataclass
class Memory:
    """What a cache remembers of the prompts it holds, by columns of its first layer.

    visual, real: bool [B, n]. marks: [B, n] each. layers: for each edited layer what its method remembers.
    """

    visual: Tensor
    real: Tensor
    marks: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Columns known; those behind them are generated text."""
        return self.visual.shape[1]

    def extended(self, held: int, visual: Tensor, real: Tensor, marks: Mapping[str, Tensor]) -> Memory:
        """With new tokens behind `held` columns. A cropped cache forgets what was cropped."""

        def joined(before: Tensor, new: Tensor, fill: float) -> Tensor:
            kept = before[:, :held]
            return torch.cat([torch.nn.functional.pad(kept, (0, held - kept.shape[1]), value=fill), new], dim=1)

        names = dict.fromkeys([*self.marks, *marks])
        nothing = {name: self.visual.new_zeros(self.visual.shape, dtype=torch.float32) for name in names}
        return Memory(
            joined(self.visual, visual, False),
            joined(self.real, real, True),
            {
                name: joined(
                    self.marks.get(name, nothing[name]),
                    marks.get(name, torch.zeros_like(visual, dtype=torch.float32)),
                    0.0,
                )
                for name in names
            },
            self.layers,
        )


def memory_of(cache: Any, decoding: bool) -> Memory | None:
    """The memory a cache carries; one left over from before a reset is removed.

    decoding: one token follows the others, so that a static cache, whose length is on the device, need not be read.
    """
    memory: Memory | None = getattr(cache, EDITS, None)
    if memory is None:
        return None
    held = cache.get_seq_length()
    if not (decoding and isinstance(held, Tensor)) and int(held) == 0:
        delattr(cache, EDITS)
        return None
    return memory


@dataclass
class Pass:
    """One forward. prompt: its tokens belong to prompts. ends: bool [B, Q], see `Call`.

    ids: int64 [B, Q], where they are known. free: the image-free stream of its prompts, where a method asks for it and
    they have pictures. known: what layers that hold the same keys share.
    """

    memory: Memory
    prompt: bool
    ends: Tensor
    ids: Tensor | None = None
    free: ImageFree | None = None
    known: dict[Any, dict[str, Any]] = field(default_factory=dict)


class EditsDoor:
    """Lets methods edit the attention of decoder layers of one patched model, one method a layer."""

    @classmethod
    def of(cls, patch: Patch) -> EditsDoor:
        """The door of a patch: several methods share it."""
        found = [one for one in patch.model.__dict__[HANDLE].reporters if isinstance(one, cls)]
        return found[0] if found else cls(patch)

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.decoder = patch.base.get_decoder()
        self.depth = len(self.decoder.layers)
        self.attends = [n for n, one in enumerate(self.decoder.layers) if getattr(one, "self_attn", None) is not None]
        self.config = self.decoder.config
        config = patch.model.config
        self.tokens = [int(getattr(config, source.token)) for source in patch.family.sources.values()]
        self.names = list(inspect.signature(patch.base.forward).parameters)
        self.editors: dict[int, Editor] = {}
        self.watchers: dict[int, Watcher] = {}
        self.followed: set[int] = set()  # layers whose tokens another door wants to know
        self.wanted: dict[Editor, Mapping[str, Score]] = {}  # statistics of the tower that methods make marks of
        self.noted: dict[Editor, dict[str, None]] = {}  # what methods had to say of the last prompts, in order
        self.until: int | None = None  # columns that the prompts of the running `generate` have, as the user counts
        self.width: int | None = None  # and what its first forward without a cache got of them
        reporters = patch.model.__dict__[HANDLE].reporters
        self.keeps_prompt = any(isinstance(one, LayersDoor) for one in reporters)
        reporters.append(self)
        patch.hook(patch.base, self.before_base, before=True, first=False)
        patch.set(patch.model, "generate", Generate(self, patch.model))

    def add(self, editor: Editor) -> tuple[int, ...]:
        """Let a method edit the layers it asks for. -> these layers

        Raises NotImplementedError for layers whose attention is more than softmax(q k^T) v, or that another method
        edits already.
        """
        layers = tuple(editor.where(self.attends, self.depth))
        for number in layers:
            self._check(editor.name, number)
            if number in self.editors:
                raise NotImplementedError(
                    f"{editor.name} and {self.editors[number].name} both edit the attention of layer {number}: "
                    "choose one, or give them different layers"
                )
        wanted: Mapping[str, Score] = getattr(editor, "wanted", lambda tower: {})(self.patch.tower)
        if wanted:
            Door.telling(self.patch)  # puts the encoders in place that take them
            for source in self.patch.family.sources.values():
                getattr(self.patch.base, source.encode).add(self.patch, list(wanted.values()))
            self.wanted[editor] = wanted
        for number in layers:
            self._enter(number)
            self.editors[number] = editor
        return layers

    def watch(self, name: str, number: int, watcher: Watcher) -> None:
        """Let a method look at the attention of a layer, beside the one that edits it. One method looks at a layer.

        Raises NotImplementedError as `add` does.
        """
        self._check(name, number)
        if number in self.watchers:
            raise NotImplementedError(f"{name} and another method both look at the attention of layer {number}")
        self._enter(number)
        self.watchers[number] = watcher

    def _check(self, name: str, number: int) -> None:
        """Refuse layers whose attention is more than softmax(q k^T) v."""
        module = self.decoder.layers[number].self_attn
        if getattr(module, "attn_logit_softcapping", None) is not None:
            raise NotImplementedError(f"{name}: attention with capped logits ({type(module).__name__})")
        if getattr(module, "sinks", None) is not None:
            raise NotImplementedError(f"{name}: attention with learned sinks ({type(module).__name__})")

    def follow(self, number: int) -> None:
        """Tell whoever hooks a layer of the tokens it gets: the `Pass` among its keyword arguments, as EDITS."""
        if number not in self.editors and number not in self.watchers and number not in self.followed:
            self.patch.hook(self.decoder.layers[number], Enter(self, number), before=True, first=False)
        self.followed.add(number)

    def _enter(self, number: int) -> None:
        """Put the hook in front of a layer, once, and lead its attention here."""
        if number in self.editors or number in self.watchers:
            return
        tap(self.patch, [self.decoder.layers[number].self_attn])
        if number not in self.followed:
            self.patch.hook(self.decoder.layers[number], Enter(self, number), before=True, first=False)

    # --- hooks -------------------------------------------------------------------------------------------------

    def before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the base model: note what the tokens of this forward are."""
        given = {**dict(zip(self.names, args)), **kwargs}
        prompt: Prompt | None = given.get(PROMPT)
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        like = embeds if ids is None else ids
        if like is None or not (self.editors or self.watchers or self.followed):
            return args, kwargs
        one = self._pass(ids, like, given.get("attention_mask"), given.get("past_key_values"), prompt)
        one.ids = ids
        comparing = [number for number, editor in self.editors.items() if editor.compares]
        if comparing and one.prompt and ids is not None:
            one.free = self._image_free(base, ids, one, max(comparing), given.get("token_type_ids"))
        kwargs = {name: value for name, value in kwargs.items() if name != PROMPT or self.keeps_prompt}
        return args, {**kwargs, EDITS: one}

    def _pass(self, ids: Tensor | None, like: Tensor, mask: Any, cache: Any, prompt: Prompt | None) -> Pass:
        rows, new = like.shape[:2]
        memory = memory_of(cache, decoding=new == 1)
        if memory is not None and len(memory.visual) != rows:
            raise ValueError(f"{rows} rows for a cache that was filled with {len(memory.visual)}")
        visual = None if ids is None else sum((ids == token for token in self.tokens), torch.zeros_like(ids) > 0)
        if new == 1 and memory is not None and (self.until is None or self._generated(cache)):
            return Pass(memory, False, like.new_ones(rows, 1, dtype=torch.bool))
        held = 0 if cache is None else int(cache.get_seq_length())
        if memory is None and held:
            raise ValueError("the cache was filled before the model was patched: start with an empty one")
        if visual is None:
            needy = [editor.name for editor in self.editors.values() if editor.needs_visual]
            if needy:
                raise NotImplementedError(f"{needy[0]} needs input_ids; inputs_embeds hide where the images are")
            visual = torch.zeros(rows, new, dtype=torch.bool, device=like.device)
        real = real_tokens(mask, rows, held, new, like.device)
        marks = {} if prompt is None else self._marks(prompt, rows, new, like.device)
        if not held:
            self.noted.clear()
        before = memory or Memory(visual[:, :0], real[:, :0])
        place = torch.arange(new, device=like.device)
        last = torch.where(real.any(1), (place * real).amax(1), new - 1)
        ends = place == last[:, None]
        generated = False
        if self.until is not None:  # inside generate: chunks of a prompt end nothing, drafts of an assistant do
            if cache is None:  # prompts come again and again, with what was generated behind them
                self.width = self.width or new
                first = self.width - 1
            else:
                first = self.until - 1 - held - self._dropped(cache)
            ends = (place >= first).expand(rows, -1)
            generated = first < -1
        return Pass(before.extended(held, visual & real, real, marks), not generated, ends)

    def _image_free(self, base: Any, ids: Tensor, one: Pass, last: int, types: Tensor | None) -> ImageFree | None:
        """The image-free stream of prompts on their first way through the decoder."""
        name, memory, new = self.editors[last].name, one.memory, ids.shape[1]
        held = memory.count - new
        if not bool(one.ends.any()):
            raise NotImplementedError(f"{name} reads a prompt as a whole: without prefill_chunk_size, not in chunks")
        before, pictured = memory.visual[:, :held].any(1), memory.visual[:, held:].any(1)
        if held:
            if bool((pictured & ~before).any()):
                raise NotImplementedError(
                    f"{name}: a first picture behind text that a cache holds already; start with an empty cache"
                )
            return None
        # Without a cache what was generated comes again behind the prompt, whose end is the first of `ends`.
        place = torch.arange(new, device=ids.device)
        text = memory.real & ~memory.visual & (place <= one.ends.long().argmax(1)[:, None])
        more = {}
        if "token_type_ids" in self.names:  # text has type 0: causal (Gemma 3), or the prefix (PaliGemma)
            more["token_type_ids"] = torch.zeros_like(ids) if types is None or types.shape != ids.shape else types
        return ImageFree.of(base, ids, text, pictured, last, self.patch.family.first_position, more)

    @contextmanager
    def beside(self, until: int) -> Iterator[None]:
        """Other prompts, of `until` columns, run meanwhile: nothing that is noted of them is about the prompts."""
        before, noted = self.until, self.noted
        self.until, self.noted = until, {}
        try:
            yield
        finally:
            self.until, self.noted = before, noted

    def _generated(self, cache: Any) -> bool:
        """Whether what follows the cache was generated, inside `generate`."""
        held = cache.get_seq_length()
        if isinstance(held, Tensor):
            return True  # a static cache: its prompts are prefilled at once
        return held + self._dropped(cache) >= (self.until or 0)

    def _dropped(self, cache: Any) -> int:
        """Columns that the user counts and a pruned cache does not hold."""
        state: CacheState | None = getattr(cache, STATE, None)  # an empty cache has that of the prompt that comes
        return 0 if state is None else state.dropped

    def _marks(self, prompt: Prompt, rows: int, new: int, device: torch.device) -> dict[str, Tensor]:
        """What methods want to know of each visual token of the prompt. [B, Q] each"""
        found: dict[str, Tensor] = {}
        for editor in dict.fromkeys(self.editors.values()):
            for picture in prompt.pictures:
                if wanted := self.wanted.get(editor):
                    picture = replace(picture, visual=asked(picture.visual, wanted))
                for name, values in editor.marks(picture).items():
                    mark = found.setdefault(name, torch.zeros(rows, new, device=device))
                    mark[picture.row, picture.columns.to(device)] = values.to(mark)
        return found

    def report(self, report: Report) -> Report:
        """Add which layers are edited, and what the methods have to say."""
        notes = []
        for editor in dict.fromkeys(self.editors.values()):
            layers = [number for number, other in self.editors.items() if other is editor]
            notes.append(f"{editor.name}: edits the attention of layers {spelled(layers)} of {self.depth}")
            said = tuple(self.noted.get(editor, ()))
            notes += editor.remarks(said) if isinstance(editor, Summing) else said
        return replace(report, notes=(*report.notes, *notes))

    def note(self, editor: Editor | None, text: str) -> None:
        """A method has something to say of the running prompts."""
        if editor is not None:
            self.noted.setdefault(editor, {}).setdefault(text)


def spelled(numbers: Sequence[int]) -> str:
    """Ascending numbers as runs, such as '2-30' or '1/18-31'."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "/".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def real_tokens(mask: Any, rows: int, held: int, new: int, device: torch.device) -> Tensor:
    """Which of the new tokens are no padding. bool [B, Q]

    mask: of the conversation, [B, held + Q]; or ready-made, [B, 1, Q, K] or several of them by kind of layer; or None.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(rows, new, dtype=torch.bool, device=device)
    if mask.ndim == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return mask[:, held : held + new].to(device).bool().expand(rows, -1)


class Generate:
    """Stands for the instance's `generate`: lets the door know where the prompts end."""

    def __init__(self, door: EditsDoor, model: Any) -> None:
        self.door, self.original = door, model.generate
        functools.update_wrapper(self, self.original, updated=())  # none of the attributes of another door

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if outputs := kwargs.get("mm_encoder_outputs"):  # beams expand these in place: not in the caller's object
            kwargs["mm_encoder_outputs"] = {name: shallow(output) for name, output in present(outputs).items()}
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        lengths = [one.shape[1] for one in (ids, mask) if one is not None and one.ndim == 2]
        held = 0 if cache is None else int(cache.get_seq_length())
        held += self.door._dropped(cache) if held else 0
        if lengths:
            self.door.until = max(lengths) if max(lengths) > held else held + max(lengths)
        try:
            return self.original(*args, **kwargs)
        finally:
            self.door.until = self.door.width = None


@dataclass(frozen=True)
class Enter:
    """Pre-hook of an edited, watched or followed decoder layer, behind those that take tokens away."""

    door: EditsDoor
    number: int

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the layer's attention its turn."""
        one: Any = kwargs.get(EDITS)
        if one is None:
            return args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        if isinstance(one, Pass):
            turn = self.turn(one, hidden, kwargs.get("past_key_values"), kwargs.get(PASS))
        else:  # prompts of two caches in one batch (see `vlmfast.pairing`)
            turn = one.enter(self, hidden)
        return args, kwargs if turn is None else {**kwargs, EDIT: turn}

    def turn(self, one: Pass, hidden: Tensor, cache: Any, moved: Any) -> Turn | None:
        """The turn of the layer's method; None: the layer runs as it is. hidden: [B, Q, D]"""
        if cache is not None and getattr(cache, EDITS, None) is not one.memory:
            setattr(cache, EDITS, one.memory)
        watcher = self.door.watchers.get(self.number)
        if self.number not in self.door.editors and not (watcher is not None and watcher.active):
            return None
        return Turn(self.door, one, self.number, hidden, cache, moved)


class Turn:
    """One edited layer in one forward: makes the `Call` when its attention runs."""

    def __init__(self, door: EditsDoor, one: Pass, number: int, hidden: Tensor, cache: Any, moved: Any) -> None:
        self.door, self.one, self.number, self.hidden = door, one, number, hidden
        new = hidden.shape[1]
        self.offset = sizes(cache, new, number)[1]
        self.start: Any = 0
        if cache is not None:
            held = cache.get_seq_length(number)
            # A static cache counts on in place; while it decodes its length need not leave the device.
            self.start = (held.clone() if new == 1 else int(held)) if isinstance(held, Tensor) else held
            self.start = self.start - self.offset
        self.columns: Tensor | None = None if moved is None else moved.columns(number)

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        own: Callable[[], Tensor],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """The edited attention, in the shape that transformers expects. -> [B, Q, H, d]"""
        n_key = key.shape[2]
        same = (self.offset, n_key, id(self.columns), query.shape[2])
        if same not in self.one.known:
            self.one.known[same] = self._tokens(n_key, query.shape[2])
        causal = kwargs.get("is_causal")
        editor, watcher = self.door.editors.get(self.number), self.door.watchers.get(self.number)
        call = Call(
            layer=self.number,
            depth=self.door.depth,
            query=query,
            key=key,
            value=value,
            scaling=scaling,
            start=self.start,
            mask=mask,
            causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
            window=None if mask is not None and mask.ndim == 4 else kwargs.get("sliding_window"),
            hidden=self.hidden,
            prompt=self.one.prompt,
            free=self.one.free,
            offset=self.offset,
            memory=self.one.memory.layers.setdefault(self.number, {}),
            own=own,
            **self.one.known[same],
            note=functools.partial(self.door.note, editor),
        )
        if watcher is not None and watcher.active:
            watcher.watch(call)
        return own() if editor is None else editor.edit(call).transpose(1, 2).contiguous()

    def _tokens(self, n_key: int, count: int) -> dict[str, Any]:
        """What the keys and the queries of this layer are, as `Call` has it."""
        memory = self.one.memory
        if memory.count:
            first = memory.real.long().argmax(1)
        else:
            first = torch.zeros(len(memory.real), dtype=torch.long, device=memory.real.device)
        if self.columns is not None:  # text before a picture is never taken away, so that the first token stays
            first = (self.columns == first[:, None]).long().argmax(1)
        return {
            "visual": self._local(memory.visual, n_key, False),
            "real": self._local(memory.real, n_key, True),
            "initial": torch.where(first >= self.offset, first - self.offset, -1),
            "ends": self._new(self.one.ends, count),
            "marks": {name: self._local(mark, n_key, 0.0) for name, mark in memory.marks.items()},
        }

    def _local(self, values: Tensor, n_key: int, fill: float) -> Tensor:
        """Values of the first layer's columns for this layer's keys. [B, n] -> [B, K]"""
        if self.columns is not None:
            columns, count = self.columns.to(values.device), values.shape[1]
            values = values.gather(1, columns.clamp(0, count - 1))
            values = values.masked_fill(columns >= count, fill).masked_fill(columns < 0, 0)
        local = values[:, self.offset : self.offset + n_key]
        return torch.nn.functional.pad(local, (0, n_key - local.shape[1]), value=fill)

    def _new(self, values: Tensor, count: int) -> Tensor:
        """Values of the forward's tokens for those that the layer got. [B, Q] -> [B, M]"""
        return of_layer(values, self.columns, self.one.memory.count, count)


def of_layer(values: Tensor, columns: Tensor | None, known: int, count: int) -> Tensor:
    """What is true of a forward's tokens, for the `count` of them that a layer got. bool [B, Q] -> [B, M]

    columns: [B, K] the first layer's columns that the layer's keys stand for; None: all. known: of the first layer.
    """
    if values.shape[1] == count or columns is None:
        return values
    new = columns[:, -count:] - (known - values.shape[1])
    return values.gather(1, new.clamp(min=0).to(values.device)) & (new >= 0).to(values.device)
