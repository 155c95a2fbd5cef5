"""The inputs door inside `generate`: every step's inputs, and checks before anything runs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlmfast.conversation import CacheState, state_of
from vlmfast.layers.cache import layer_state
from vlmfast.layers.tokens import PROMPT, Prompt
from vlmfast.patching import shallow
from vlmfast.rewriting import present

if TYPE_CHECKING:
    from vlmfast.inputs import Door

DONE = "vlmfast_prepared"  # keyword of a forward whose inputs are already rewritten
NAMED = ("__module__", "__name__", "__qualname__", "__doc__")  # not the annotations, which cannot be pickled
MISSING_TYPES = (
    "mm_token_type_ids are missing: without them this family falls back to plain 1-D positions without a word; "
    "pass everything the processor returns"
)


class PrepareInputs:
    """Stands for the instance's `prepare_inputs_for_generation`: every step of `generate` passes here."""

    def __init__(self, door: Door, model: Any) -> None:
        self.door, self.original = door, model.prepare_inputs_for_generation
        functools.update_wrapper(self, self.original, NAMED, ())  # none of the attributes of another door

    def __call__(self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any) -> dict[str, Any]:
        """As the original, over the rewritten prompt."""
        cache = kwargs.get("past_key_values")
        state = state_of(cache)
        first = kwargs.get("is_first_iteration", False)
        pictures = present(kwargs.get("mm_encoder_outputs"))
        if not first and kwargs.get("use_cache", True):
            pictures = {}  # already in the cache
        if kwargs.get("inputs_embeds") is not None or (not pictures and state is None):
            inputs = self.original(input_ids, next_sequence_length=next_sequence_length, **kwargs)
            if first and self.door.tells:
                layer_state(cache)  # one from before a reset goes
                inputs[PROMPT] = Prompt(kwargs.get("attention_mask"))
            return {**inputs, DONE: True}
        if next_sequence_length is not None:
            start = input_ids.shape[1] - next_sequence_length
            if state is not None and cache is not None and start == cache.get_seq_length():
                start += state.dropped  # generate counted the cache's columns as if nothing had been dropped
            input_ids = input_ids[:, start:]
        call = self.door.rewrite({**kwargs, "input_ids": input_ids}, pictures, cache_holds_state=True)
        prompt = call.pop(PROMPT, None)
        inputs = self.original(call.pop("input_ids"), next_sequence_length=None, **call)
        if prompt is not None and (first or prompt.pictures):
            inputs[PROMPT] = prompt
        return {**inputs, DONE: True}


class Generate:
    """Stands for the instance's `generate`: refuses early what would go wrong silently later."""

    def __init__(self, door: Door, model: Any) -> None:
        self.door, self.model, self.original = door, model, model.generate
        functools.update_wrapper(self, self.original, NAMED, ())  # none of the attributes of another door

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, after the checks."""
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
            raise NotImplementedError("prefill_chunk_size: a prompt prefilled in chunks cannot be pruned")
        self.door.check_pictures(kwargs)
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and bool((mask[:, -1] == 0).any()):
            raise ValueError("right padding in generate: set processor.tokenizer.padding_side = 'left'")
        given = any(kwargs.get(source.pixels) is not None for source in self.door.family.sources.values())
        images = given or bool(present(kwargs.get("mm_encoder_outputs")))
        if outputs := kwargs.get("mm_encoder_outputs"):  # beams expand these in place: not in the caller's object
            kwargs["mm_encoder_outputs"] = {name: shallow(output) for name, output in present(outputs).items()}
        state = state_of(kwargs.get("past_key_values"))
        if ids is not None and self.door.family.mrope and kwargs.get("position_ids") is None:
            if state is not None:
                self._continue(state, ids, images, kwargs)
            elif images:
                self.door.check_prompt(ids, kwargs)
        return self.original(*args, **kwargs)

    def _continue(self, state: CacheState, ids: Tensor, images: bool, kwargs: dict[str, Any]) -> None:
        """A further turn on a pruned cache: positions go on where the unpruned conversation would.

        Grids and pixels are those of the new pictures alone: what the cache holds is not encoded again.
        """
        held = int(kwargs["past_key_values"].get_seq_length())
        counted = held + state.dropped
        mask = kwargs.get("attention_mask")
        whole = mask is None or mask.shape[1] == ids.shape[1]
        new = ids.shape[1] - counted if whole else ids.shape[1]
        if new < 1:
            raise ValueError(
                f"{ids.shape[1]} input_ids for a conversation of {counted}: pass all of it with the new tokens, or "
                "the new tokens with the attention_mask of all"
            )
        call = {**kwargs, "input_ids": ids[:, -new:]}
        kwargs["position_ids"] = self.door.original_positions(call, state, held, images)
        if not images:
            for name in ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
                kwargs.pop(name, None)  # they tell of pictures that are in the cache already
