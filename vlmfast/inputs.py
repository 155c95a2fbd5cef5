"""Door 1: prompts rewritten without the dropped visual tokens, so that the model sees an ordinary shorter prompt.

Two interception points, both on the instance: `prepare_inputs_for_generation` (all of `generate`) and a forward
pre-hook (direct calls, training, hand-written decoding loops). Dropped placeholders leave the ids, masks, positions,
token types and labels; dropped features leave the encoder's output. Masks inside the layers, caches and decoding
modes then need no care of their own.

What later calls on the same cache need to know (which of its columns are padding, how many the user counts that it
does not hold, where positions go on) travels with the cache: see vlmfast.conversation.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from vlmfast.conversation import STATE, CacheState, state_of
from vlmfast.cost import prompt_cost
from vlmfast.encoding import IMAGES, ImageEncoder, Selector
from vlmfast.families import Family, Positions
from vlmfast.patching import HANDLE, ImageReport, Patch, Report, shallow
from vlmfast.rewriting import Selected, compact, following, gather_index, rows_of_images
from vlmfast.visual import Score, VisualTokens

KEPT = "vlmfast_kept"  # on an encoder output: what each selector keeps, so that it is chosen once
DONE = "vlmfast_prepared"  # keyword of a forward whose inputs are already rewritten
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass
class _Row:
    """One prompt of the last batch: its text tokens, and its images as (grid, kept indices).

    No features: they would keep the whole graph of a training step alive.
    """

    text: int
    images: list[tuple[tuple[int, int, int], Tensor]]

    def flops(self, config: Any, merge: int, scores: Sequence[Score] | None) -> float:
        """Prefill FLOPs, tower included; scores None: of the unpatched model."""
        patches = [(t, h * merge, w * merge) for (t, h, w), _ in self.images]
        kept = [prod(grid) if scores is None else len(k) for grid, k in self.images]
        return prompt_cost(config, text=self.text, images=patches, kept=kept, scores=scores or ()).total_prefill


class Door:
    """Rewrites the inputs of one patched model for one selector."""

    def __init__(self, patch: Patch, selector: Selector, positions: Positions | None) -> None:
        if positions not in (None, "original", "compact"):
            raise ValueError(f"positions={positions!r}: choose 'original' or 'compact'")
        self.family: Family = patch.family
        self.config, self.base, self.tower = patch.model.config, patch.base, patch.tower
        self.selector, self.positions = selector, positions or self.family.positions
        self.wanted = selector.wanted(self.tower)
        self.token = int(self.config.image_token_id)
        self.pad = 0 if self.token != 0 else 1
        self.names = list(inspect.signature(patch.model.forward).parameters)
        self.last: list[_Row] = []
        encoder = ImageEncoder(patch, list(dict.fromkeys(self.wanted.values())))
        patch.set(patch.base, "get_image_features", encoder)
        patch.set(patch.model, "prepare_inputs_for_generation", PrepareInputs(self, patch.model))
        patch.set(patch.model, "generate", Generate(self, patch.model))
        patch.hook(patch.model, self.before_forward, before=True)
        patch.hook(patch.model, self.after_forward)
        patch.model.__dict__[HANDLE].reporters.append(self)

    # --- direct calls -----------------------------------------------------------------------------------------

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the model: rewrite the inputs unless `generate` already did."""
        if DONE in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != DONE}
            return args, kwargs
        kwargs = {**dict(zip(self.names, args)), **kwargs}
        cache = kwargs.get("past_key_values")
        if kwargs.get("pixel_values_videos") is not None:
            raise NotImplementedError("videos are not pruned; unpatch the model for prompts with videos")
        images = self._images(kwargs)
        if images is None and state_of(cache) is None:
            return (), kwargs
        if kwargs.get("input_ids") is None:
            raise NotImplementedError("a patched model needs input_ids; inputs_embeds hide where the images are")
        return (), self.rewrite(kwargs, images)

    def after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook of the model: leave the state on the cache that a direct call returned."""
        images = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        state = getattr(images, STATE, None)
        if state is None:
            return
        parts = output if isinstance(output, tuple) else output.values()  # return_dict=False gives a tuple
        for cache in (part for part in parts if isinstance(part, Cache)):
            setattr(cache, STATE, state)

    def _images(self, kwargs: dict[str, Any]) -> Any:
        """The encoder's output for the images of this call, None without images. Consumes pixel_values."""
        given = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if kwargs.get("pixel_values") is None:
            return given
        if given is not None:
            raise ValueError("pass pixel_values or mm_encoder_outputs, not both")
        names = inspect.signature(self.base.get_image_features).parameters
        encode = {name: kwargs[name] for name in names if kwargs.get(name) is not None and name != "kwargs"}
        kwargs["pixel_values"] = None
        return self.base.get_image_features(**encode, return_dict=True)

    # --- the rewriting ----------------------------------------------------------------------------------------

    def rewrite(self, kwargs: dict[str, Any], images: Any, cache_holds_state: bool = False) -> dict[str, Any]:
        """The arguments of a forward, with dropped tokens gone and everything else fitted to what is left.

        kwargs: input_ids [B, L] holds new tokens only; masks and positions may cover the whole conversation.
        images: the encoder's output for the placeholders among the new tokens, or None.
        cache_holds_state: the cache object of the call is the one that will be filled (generate makes it beforehand).
        """
        ids, cache, mask = kwargs["input_ids"], kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise NotImplementedError(f"attention_mask with {mask.ndim} dimensions; a patched model takes [B, L]")
        held = 0 if cache is None else int(cache.get_seq_length())
        state = state_of(cache)
        if images is None:
            return self._later_tokens(kwargs, state, held)
        rows, new = ids.shape
        if state is not None:
            full = state.extend(mask, held, new)
        else:
            full = ids.new_ones(rows, held + new) if mask is None else mask
        if full.shape != (rows, held + new):
            raise ValueError(f"attention_mask is {list(full.shape)}, expected {[rows, held + new]}")
        real = full[:, held:].bool()
        keep, selected = self.select(ids, images, real)
        if state is None and keep.all():
            return self._with_images(kwargs, images)
        positions = self.original_positions(kwargs, state, held, images=True)
        next_position = following(positions, real)
        shift = torch.zeros_like(next_position) if state is None else state.shift
        if self.positions == "compact":
            positions, more = compact(positions - shift.view(-1, 1), keep, selected)
            shift = shift + more
        kwargs = dict(kwargs)
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise NotImplementedError("logits_to_keep as indices: pruning moves them; pass an int")
        index, live = gather_index(keep, real)
        kwargs["input_ids"] = ids.gather(1, index).masked_fill(~live, self.pad)
        kwargs["position_ids"] = positions.gather(-1, index.expand(*positions.shape[:-1], -1))
        for name in TOKEN_TYPES:
            if (types := kwargs.get(name)) is not None:
                kwargs[name] = types[:, -new:].gather(1, index).masked_fill(~live, 0)
        if (labels := kwargs.get("labels")) is not None:
            kwargs["labels"] = labels.gather(1, index).masked_fill(~live, -100)
        pruned = torch.cat([full[:, :held], live.to(full.dtype)], dim=1)
        # Explicit even when all ones: without it, and without a cache, transformers takes gaps in the positions for
        # borders of packed sequences and masks across them.
        kwargs["attention_mask"] = pruned
        columns = new + (held if state is None else held + state.dropped)
        later = CacheState(pruned, columns, shift, next_position, padded=bool((pruned == 0).any()))
        if cache_holds_state and cache is not None:
            setattr(cache, STATE, later)
        images = shallow(images)
        images.pooler_output = [one.visual.features[one.kept.to(one.visual.features.device)] for one in selected]
        setattr(images, STATE, later)
        return self._with_images(kwargs, images)

    def _later_tokens(self, kwargs: dict[str, Any], state: CacheState | None, held: int) -> dict[str, Any]:
        """Tokens without images on a cache that holds pruned prompts: decoding, or a further turn of text."""
        if state is None:
            return kwargs
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if state.mask.shape[0] != ids.shape[0]:
            raise ValueError(f"{ids.shape[0]} rows for a cache that was filled with {state.mask.shape[0]}")
        needed = mask is not None or state.padded
        positions = self.original_positions(kwargs, state, held, images=False)
        if self.positions == "compact":
            positions = positions - state.shift.view(-1, 1)
        return {
            **kwargs,
            "attention_mask": state.extend(mask, held, ids.shape[1]) if needed else None,
            "position_ids": positions,
        }

    @staticmethod
    def _with_images(kwargs: dict[str, Any], images: Any) -> dict[str, Any]:
        return {**kwargs, "mm_encoder_outputs": {**(kwargs.get("mm_encoder_outputs") or {}), "image": images}}

    def select(self, ids: Tensor, images: Any, real: Tensor) -> tuple[Tensor, list[Selected]]:
        """Which tokens stay. ids, real (not padding): [B, L] -> keep [B, L], and the images of the batch."""
        keep = torch.ones_like(ids, dtype=torch.bool)
        places = ids == self.token
        visuals: list[VisualTokens] | None = getattr(images, IMAGES, None)
        if visuals is None:
            raise ValueError(
                "mm_encoder_outputs were made without vlmfast; pass pixel_values, or encode the images with "
                "vlmfast.encoding.encode_images"
            )
        chosen: dict[Any, list[Tensor]] = images.__dict__.setdefault(KEPT, {})
        if self.selector not in chosen:
            chosen[self.selector] = [self._choose(visual) for visual in visuals]
        selected: list[Selected] = []
        for row, image in rows_of_images(places.sum(1).tolist(), [len(visual) for visual in visuals]):
            visual, kept = visuals[image], chosen[self.selector][image]
            start = sum(len(one.visual) for one in selected if one.row == row)
            columns = places[row].nonzero().flatten()[start : start + len(visual)]
            dropped = torch.ones(len(visual), dtype=torch.bool)
            dropped[kept.cpu()] = False
            keep[row, columns[dropped.to(columns.device)]] = False
            selected.append(Selected(visual, kept, row, columns))
        repeat = max(1, len(selected) // len(visuals))  # beams and return sequences repeat a prompt: report it once
        texts = [int(count) for count in (real & ~places).sum(1)]
        self.last = [
            _Row(texts[row], [(one.visual.grid, one.kept) for one in selected if one.row == row])
            for row in range(0, len(ids), repeat)
        ]
        return keep, selected

    def _choose(self, visual: VisualTokens) -> Tensor:
        missing = [score for score in self.wanted.values() if score not in visual.statistics]
        if missing:
            raise ValueError(
                f"these images were encoded without {missing[0]}; name the method in encode_images(model, methods)"
            )
        scores = {name: visual.statistics[score] for name, score in self.wanted.items()}
        with torch.no_grad():
            return self.selector.choose(dataclasses.replace(visual, scores=scores))

    def original_positions(self, kwargs: dict[str, Any], state: CacheState | None, held: int, images: bool) -> Tensor:
        """Positions of the new tokens in the unpruned conversation: [B, L], or [3 or 4, B, L] for M-RoPE."""
        ids, new = kwargs["input_ids"], kwargs["input_ids"].shape[1]
        given = kwargs.get("position_ids")
        if given is not None:
            part = given[..., -new:]
            return part.expand(*part.shape[:-2], ids.shape[0], new)
        if state is not None:
            start = state.following + held - state.mask.shape[1]
        else:
            start = torch.full((ids.shape[0],), held, device=ids.device)
        flat = start.view(-1, 1) + torch.arange(new, device=ids.device)
        if not (self.family.mrope and images):
            return flat
        if kwargs.get("mm_token_type_ids") is None:
            raise ValueError(MISSING_TYPES)
        mask = kwargs.get("attention_mask")
        axes, _ = self.base.get_rope_index(
            ids,
            image_grid_thw=kwargs.get("image_grid_thw"),
            attention_mask=None if mask is None else mask[:, -new:],
            mm_token_type_ids=kwargs["mm_token_type_ids"][:, -new:],
        )
        return axes + start.view(1, -1, 1) if state is not None else axes

    def report(self, report: Report) -> Report:
        """Add the images of the last prompts to a report."""
        if not self.last:
            return report
        scores = list(dict.fromkeys(self.wanted.values()))
        cost = sum(row.flops(self.config, self.tower.merge, scores) for row in self.last)
        plain = sum(row.flops(self.config, self.tower.merge, None) for row in self.last)
        images = [pair for row in self.last for pair in row.images]
        notes = getattr(self.selector, "notes", lambda tower: ())(self.tower)
        return dataclasses.replace(
            report,
            images=tuple(ImageReport(prod(grid), len(kept)) for grid, kept in images),
            kept=tuple(kept for _, kept in images),
            grids=tuple(grid for grid, _ in images),
            share=cost / plain,
            notes=(*report.notes, *notes),
        )


MISSING_TYPES = (
    "mm_token_type_ids are missing: without them this family falls back to plain 1-D positions without a word; "
    "pass everything the processor returns"
)


class PrepareInputs:
    """Stands for the instance's `prepare_inputs_for_generation`: every step of `generate` passes here."""

    def __init__(self, door: Door, model: Any) -> None:
        self.door, self.original = door, model.prepare_inputs_for_generation
        functools.update_wrapper(self, self.original)

    def __call__(self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any) -> dict[str, Any]:
        """As the original, over the rewritten prompt."""
        cache = kwargs.get("past_key_values")
        state = state_of(cache)
        first = kwargs.get("is_first_iteration", False)
        images = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if not first and kwargs.get("use_cache", True):
            images = None  # already in the cache
        if kwargs.get("inputs_embeds") is not None or (images is None and state is None):
            inputs = self.original(input_ids, next_sequence_length=next_sequence_length, **kwargs)
            return {**inputs, DONE: True}
        if next_sequence_length is not None:
            start = input_ids.shape[1] - next_sequence_length
            if state is not None and cache is not None and start == cache.get_seq_length():
                start += state.dropped  # generate counted the cache's columns as if nothing had been dropped
            input_ids = input_ids[:, start:]
        call = self.door.rewrite({**kwargs, "input_ids": input_ids}, images, cache_holds_state=True)
        inputs = self.original(call.pop("input_ids"), next_sequence_length=None, **call)
        return {**inputs, DONE: True}


class Generate:
    """Stands for the instance's `generate`: refuses early what would go wrong silently later."""

    def __init__(self, door: Door, model: Any) -> None:
        self.door, self.model, self.original = door, model, model.generate
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, after the checks."""
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
            raise NotImplementedError("prefill_chunk_size: a prompt prefilled in chunks cannot be pruned")
        if kwargs.get("pixel_values_videos") is not None:
            raise NotImplementedError("videos are not pruned; unpatch the model for prompts with videos")
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and bool((mask[:, -1] == 0).any()):
            raise ValueError("right padding in generate: set processor.tokenizer.padding_side = 'left'")
        images = kwargs.get("pixel_values") is not None or (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if images and self.door.family.mrope and kwargs.get("mm_token_type_ids") is None:
            raise ValueError(MISSING_TYPES)
        if outputs := kwargs.get("mm_encoder_outputs"):  # beams expand these in place: not in the caller's object
            kwargs["mm_encoder_outputs"] = {name: shallow(output) for name, output in outputs.items()}
        state = state_of(kwargs.get("past_key_values"))
        if state is not None and ids is not None:
            self._continue(state, ids, images, kwargs)
        return self.original(*args, **kwargs)

    def _continue(self, state: CacheState, ids: Tensor, images: Any, kwargs: dict[str, Any]) -> None:
        """A further turn on a pruned cache: positions go on where the unpruned conversation would."""
        if self.door.family.mrope and images:
            raise NotImplementedError("a new image in a later turn on a pruned cache: start a fresh cache")
        if kwargs.get("position_ids") is not None or not self.door.family.mrope:
            return
        held = int(kwargs["past_key_values"].get_seq_length())
        counted = held + state.dropped
        mask = kwargs.get("attention_mask")
        whole = mask is None or mask.shape[1] == ids.shape[1]
        new = ids.shape[1] - counted if whole else ids.shape[1]
        start = state.following + held - state.mask.shape[1]
        kwargs["position_ids"] = start.view(-1, 1) + torch.arange(new, device=ids.device)
        for name in ("mm_token_type_ids", "image_grid_thw"):
            kwargs.pop(name, None)  # they tell of images that are in the cache already
