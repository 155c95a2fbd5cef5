"""Patch: every change to a model goes through one object that can take it back, and `patch` / `unpatch`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn

from vlmfast.adapter import Adapter
from vlmfast.families import Family, Tower, family_of
from vlmfast.solving import prompts_share
from vlmfast.towers import Picture, size_of

HANDLE = "vlmfast_handle"
FILE = "vlmfast.json"
WRAPPED = "_old_forward"  # of a module that accelerate hooks: the `forward` that stood there before


class _Missing:
    """Stands for no value; a class, so that it stays itself in a deep copy."""


class Undo(Protocol):
    """A record that knows how to take one change back."""

    def undo(self) -> None:
        """Take the change back."""
        ...


@dataclass
class _Attribute:
    target: Any
    name: str
    before: Any  # what the instance itself held; _Missing when the class provided it

    def undo(self) -> None:
        if self.before is _Missing:
            self.target.__dict__.pop(self.name, None)
        else:
            self.target.__dict__[self.name] = self.before


@dataclass
class _Hook:
    handle: Any

    def undo(self) -> None:
        self.handle.remove()


@dataclass
class _Forward:
    module: Any
    ours: Any
    before: Any  # what the instance itself held; _Missing when the class provided it

    def undo(self) -> None:
        held = self.module.__dict__
        if held.get(WRAPPED) is self.ours:  # accelerate came later: its hook stays, around what was there before
            bound = self.before is _Missing
            held[WRAPPED] = type(self.module).forward.__get__(self.module) if bound else self.before
        elif held.get("forward") is self.ours:  # and not one that accelerate put back
            _Attribute(self.module, "forward", self.before).undo()


class Patch:
    """The changes made to one model, newest last. Undo records are data, so a deep copy of a patched model is
    patched by itself and can be unpatched by itself.

    model: the transformers model (XForConditionalGeneration); base: its multimodal base model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base: Any = getattr(model, getattr(model, "base_model_prefix", ""), model)
        self.family: Family = family_of(model)
        self.reporters: list[Any] = []  # the doors: each adds to the report, and finds the others here
        self._undo: list[Undo] = []

    @property
    def tower(self) -> Tower:
        """The vision tower as data."""
        return self.family.tower(self.model.config)

    def undo(self, record: Undo) -> None:
        """Remember how to take back a change that was just made."""
        self._undo.append(record)

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance (never of a class)."""
        self.undo(_Attribute(target, name, target.__dict__.get(name, _Missing)))
        target.__dict__[name] = value

    def stand_in(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let a callable stand for the module's `forward`, which accelerate may wrap or put back meanwhile."""
        self.undo(_Forward(module, forward, module.__dict__.get("forward", _Missing)))
        module.__dict__["forward"] = forward

    def hook(
        self, module: nn.Module, function: Callable[..., Any], *, before: bool = False, first: bool = True
    ) -> None:
        """Add a forward hook that sees keyword arguments; `before`: a pre-hook, that runs `first` or last."""
        if before:
            handle = module.register_forward_pre_hook(function, prepend=first, with_kwargs=True)
        else:
            handle = module.register_forward_hook(function, with_kwargs=True)
        self.undo(_Hook(handle))

    def close(self) -> None:
        """Take every change back, newest first. Safe to call twice."""
        while self._undo:
            self._undo.pop().undo()


@dataclass(frozen=True)
class ImageReport:
    """One picture of the last prompt batch.

    n, kept: its placeholders in the prompt before and after, newline tokens of any-resolution images included.
    indices: [K] ascending, the visual tokens kept; grid, views: where they lie (see `VisualTokens`); patches: their
    (t, h, w) before merging; merged: other features stand in the kept places than their own.
    """

    n: int
    kept: int
    indices: Any = None
    grid: tuple[int, int, int] = (0, 0, 0)
    views: tuple[Any, ...] = ()
    patches: tuple[int, int, int] = (0, 0, 0)
    merged: bool = False

    @property
    def size(self) -> Picture:
        """The picture by its sizes, before anything was dropped."""
        return size_of(self.patches, self.views, self.n)


@dataclass(frozen=True)
class PromptReport:
    """One prompt of the last batch: its text tokens, its pictures, and the visual tokens in each decoder layer."""

    text: int
    pictures: tuple[ImageReport, ...]
    per_layer: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What the patch did to the last batch of prompts.

    prompts: one entry a prompt. share: prefill FLOPs of these prompts, tower and selection included, over the
    unpatched ones (convention X2 of vlmfast.cost), None before the first prompt. notes: what a user should know.
    prunes: whether a method may drop visual tokens; pictures and prompts are only told of then.

    The methods' doors fill in prompts and notes one after the other, those before the language model first; the handle
    computes the share.
    """

    spec: str
    prompts: tuple[PromptReport, ...] = ()
    share: float | None = None
    notes: tuple[str, ...] = ()
    prunes: bool = False

    @property
    def images(self) -> tuple[ImageReport, ...]:
        """One entry a picture, in the order of the prompts."""
        return tuple(one for prompt in self.prompts for one in prompt.pictures)

    @property
    def per_layer(self) -> tuple[float, ...]:
        """Visual tokens in each decoder layer, mean over the prompts; empty before the first."""
        return tuple(sum(held) / len(held) for held in zip(*(prompt.per_layer for prompt in self.prompts)))

    @property
    def kept(self) -> tuple[Any, ...]:
        """Ascending indices of the kept visual tokens, one LongTensor a picture."""
        return tuple(image.indices for image in self.images)

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """(t, h, w) of each picture's tokens."""
        return tuple(image.grid for image in self.images)

    def __str__(self) -> str:
        if not self.images:
            return "\n".join([f"{self.spec}: no picture seen yet" if self.prunes else self.spec, *self.notes])
        before, after = sum(i.n for i in self.images), sum(i.kept for i in self.images)
        kinds = ["video" if any(view.kind == "frame" for view in one.views) else "image" for one in self.images]
        counts = " and ".join(f"{kinds.count(kind)} {kind}(s)" for kind in dict.fromkeys(kinds))
        lines = [f"{self.spec}: {after} of {before} visual tokens kept in {counts}"]
        lines += [f"  {kind} {k}: {one.kept} of {one.n}" for k, (kind, one) in enumerate(zip(kinds, self.images))]
        if self.per_layer:
            mean = sum(self.per_layer) / len(self.per_layer)
            lines.append(f"  visual tokens a prompt, mean over the {len(self.per_layer)} decoder layers: {mean:.1f}")
        if self.share is not None:
            lines.append(f"  prefill FLOPs, vision tower included: {self.share:.1%} of unpatched (X2)")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


@dataclass
class Handle:
    """A patched model: a context manager that restores the model on exit, also after an error."""

    patch: Patch
    adapters: tuple[Adapter, ...]
    spec: str

    @property
    def reporters(self) -> list[Any]:
        """The doors that the methods came through."""
        return self.patch.reporters

    def close(self) -> None:
        """Restore the model. Safe to call twice."""
        self.patch.close()

    def report(self) -> Report:
        """What the methods did to the last batch of prompts."""
        report = Report(self.spec, prunes=any(adapter.drops for adapter in self.adapters))
        for reporter in self.reporters:
            report = reporter.report(report)
        if not report.prompts:
            return report
        return replace(report, share=prompts_share(self.patch.model.config, self.adapters, report.prompts))

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SaveSpec:
    """`save_pretrained` of a patched model: a clean model, and the spec beside it."""

    def __init__(self, model: Any, spec: str) -> None:
        self.original, self.spec = model.save_pretrained, spec

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, then write the spec as vlmfast.json."""
        result = self.original(save_directory, *args, **kwargs)
        Path(save_directory, FILE).write_text(json.dumps({"spec": self.spec}) + "\n")
        return result


def unwrap(model: Any) -> Any:
    """The transformers model inside `model` (itself, or the base of a PEFT model).

    Raises TypeError for anything else, and NotImplementedError for PEFT prompt learning, which replaces the very
    function that the inputs door needs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    inner: Any = model
    peft = getattr(model, "peft_config", None)
    if peft and hasattr(model, "get_base_model"):
        if any(getattr(config, "is_prompt_learning", False) for config in peft.values()):
            raise NotImplementedError(
                "PEFT prompt learning rewrites the model's inputs itself and cannot be combined with vlmfast; "
                "LoRA and other weight adapters can"
            )
        inner = inner.get_base_model()
    if not hasattr(inner, "prepare_inputs_for_generation") or not hasattr(inner, "config"):
        raise TypeError(
            f"{type(inner).__name__} cannot generate: pass the XForConditionalGeneration model "
            "(AutoModelForImageTextToText), not a part of it"
        )
    return inner


def entrance(model: Any) -> torch.device:
    """Where a model's inputs belong: with its embeddings, also where accelerate keeps these elsewhere meanwhile."""
    embeddings = unwrap(model).get_input_embeddings()
    device: torch.device = embeddings.weight.device
    hook = getattr(embeddings, "_hf_hook", None)
    found = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,))]
    return torch.device(found[0]) if device.type == "meta" and found[0] is not None else device


def install(model: Any, adapters: tuple[Adapter, ...], spec: str) -> Handle:
    """Attach the adapters to the model, or nothing at all: an error while attaching restores the model."""
    target = unwrap(model)
    if HANDLE in target.__dict__:
        raise RuntimeError(
            f"the model is already patched with {target.__dict__[HANDLE].spec!r}; "
            "call vlmfast.unpatch(model) first, or join the methods with + in one patch"
        )
    patch = Patch(target)
    handle = Handle(patch, adapters, spec)
    try:
        patch.set(target, HANDLE, handle)
        patch.set(target, "save_pretrained", SaveSpec(target, spec))
        for adapter in sorted(adapters, key=lambda adapter: adapter.door):  # in the order of effect
            adapter.check(patch.family)
            adapter.attach(patch)
    except BaseException:
        patch.close()
        raise
    return handle


def handle_of(model: Any) -> Handle | None:
    """The handle of a patched model, None when it is not patched."""
    return unwrap(model).__dict__.get(HANDLE)


def shallow(output: Any) -> Any:
    """A shallow copy of a ModelOutput that keeps the attributes attached to it."""
    twin = copy.copy(output)
    twin.__dict__.update(output.__dict__)
    return twin
