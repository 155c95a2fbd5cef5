"""Door 3, edits: which tokens are what, from prompt to prompt, and which method edits which decoder layer.

A hook on the base model sees the ids that really enter it (rewritten by the inputs door where there is one) and notes
on the cache which columns are visual tokens and which are padding; a hook on every edited layer hands its attention a
`Call`. Everything a method remembers lives on the cache beside it and goes with it: nothing leaks into another prompt.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.attention import tap
from vlmfast.conversation import STATE, CacheState
from vlmfast.edits.editor import Editor, Summing, Watcher
from vlmfast.edits.memory import EDITS, Memory, Pass, memory_of, real_tokens
from vlmfast.edits.turn import Enter
from vlmfast.encoding import asked
from vlmfast.inputs import Door
from vlmfast.layers.door import LayersDoor
from vlmfast.layers.tokens import PROMPT, Prompt
from vlmfast.lockstep import ImageFree
from vlmfast.patching import Patch, Report, shallow
from vlmfast.rewriting import present
from vlmfast.visual import Score


def attending_layers(decoder: Any) -> list[int]:
    """The layers of a decoder that have attention: of a hybrid one, not those that hold one state of all tokens."""
    return [n for n, one in enumerate(decoder.layers) if getattr(one, "self_attn", None) is not None]


class EditsDoor:
    """Lets methods edit the attention of decoder layers of one patched model, one method a layer."""

    @classmethod
    def of(cls, patch: Patch) -> EditsDoor:
        """The door of a patch: several methods share it."""
        found = [one for one in patch.reporters if isinstance(one, cls)]
        return found[0] if found else cls(patch)

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.decoder = patch.base.get_decoder()
        self.depth = len(self.decoder.layers)
        self.attends = attending_layers(self.decoder)
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
        reporters = patch.reporters
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
