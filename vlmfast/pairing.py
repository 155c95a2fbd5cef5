"""Door 4, pairing: steps of `generate` in which a branch goes through the model with its prompts, as one batch.

A step of decoding is bound by reading the weights, so that more rows cost next to nothing and a second forward costs
as much as the first. All of a decoder layer but its attention works token by token: there the branch's rows stand
behind the prompts'. In the attention each goes its own way, with its own cache, mask and edits, as if the other were
not there. Nothing is padded to a common width, no key is copied, and what methods remember of either stays apart.

A step is paired inside `generate` alone, when each row gets one token and the branch knows all that came before. Where
a decoder keeps more than keys and values, a cache is of another kind, layers hold different columns, or a method looks
at hidden states or attention of single layers meanwhile, the branch has a forward of its own: what comes out is the
same.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmfast.attention import EDIT, tap, tapped_attention
from vlmfast.conversation import STATE
from vlmfast.edits import EditsDoor
from vlmfast.edits.memory import EDITS, Pass, memory_of
from vlmfast.edits.turn import Enter, Turn
from vlmfast.layers.cache import LAYERS
from vlmfast.modality import KEYWORD as TOKENS
from vlmfast.patching import HANDLE, Patch
from vlmfast.products import FewRows, pays

if TYPE_CHECKING:
    from vlmfast.branches import BranchDoor, Running

PAIR = "vlmfast_pair"  # keyword of a forward: the `Pair` that may join it
FEW = (2, 3)  # rows of a paired forward whose products are turned round (see `vlmfast.products`)


class PairedCache(Cache):
    """Two caches behind one forward, each of which grows as it would alone.

    Lengths and what `update` returns are those of the first, of `rows` rows; `second_of` gives the other's.
    """

    def __init__(self, first: Cache, second: Cache, rows: int) -> None:
        super().__init__(layers=first.layers)
        self.first, self.second, self.rows = first, second, rows
        self.returned: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of new tokens, [B + R, H_kv, 1, d] -> those of the first cache, [B, H_kv, K, d]"""
        rows = self.rows
        self.returned[layer_idx] = self.second.update(
            key_states[rows:], value_states[rows:], layer_idx, *args, **kwargs
        )
        return self.first.update(key_states[:rows], value_states[:rows], layer_idx, *args, **kwargs)

    def second_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """What the second cache returned for the layer that runs. [R, H_kv, K', d] each"""
        return self.returned.pop(layer)


@dataclass(frozen=True)
class Half:
    """Some rows of a paired forward: the prompts', or the branch's, aside of them.

    masks: by kind of layer or for all. one: what they are to methods that edit attention.
    """

    rows: slice
    cache: Cache
    masks: Any
    one: Pass | None
    aside: bool = False


@dataclass(frozen=True)
class Together:
    """One forward of two prompts: EDITS among the keyword arguments of the layers.

    kinds: of each layer. attention: the implementation that the model uses.
    """

    halves: tuple[Half, Half]
    cache: PairedCache
    kinds: Sequence[str] | None
    attention: Callable[..., Any]

    def enter(self, enter: Enter, hidden: Tensor) -> Both | None:
        """The turns of an edited layer, one for each half. hidden: [B + R, 1, D]"""
        turns = [
            None if half.one is None else enter.turn(half.one, hidden[half.rows], half.cache, None)
            for half in self.halves
        ]
        return None if turns == [None, None] else Both(self, turns)


@dataclass(frozen=True)
class Both:
    """A layer in a paired forward: EDIT among its keyword arguments. turns: of the method that edits it, by half."""

    together: Together
    turns: Sequence[Turn | None] = (None, None)

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        own: Any,
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Two attentions. query: [B + R, H, 1, d]; key, value: of the first half -> [B + R, 1, H, d]"""
        number, kinds = module.layer_idx, self.together.kinds
        held = ((key, value), self.together.cache.second_of(number))
        outputs = []
        for half, (keys, values), turn in zip(self.together.halves, held, self.turns):
            masks = half.masks[kinds[number]] if isinstance(half.masks, Mapping) and kinds else half.masks
            more: dict[str, Any] = {
                name: one[half.rows] if isinstance(one, Tensor) and one.ndim > 1 and len(one) == len(query) else one
                for name, one in kwargs.items()
            }
            call = (module, query[half.rows], keys, values, masks)
            if turn is None:
                outputs.append(self.together.attention(*call, scaling=scaling, dropout=0.0, **more)[0])
                continue
            noted = turn.door.noted
            if half.aside:  # nothing that is noted of it is about the prompts
                turn.door.noted = {}
            try:
                more[EDIT] = turn
                outputs.append(tapped_attention(*call, scaling, **more)[0])
            finally:
                turn.door.noted = noted
        return torch.cat(outputs)


@dataclass
class Pair:
    """A branch that could join a step of its prompts. ids: [R, L] all tokens of its rows. joined: whether it did."""

    running: Running
    ids: Tensor
    cache: Cache
    joined: int | None = None  # rows of the prompts


class Pairing:
    """Lets the branch of one patched model go with its prompts."""

    def __init__(self, door: BranchDoor, patch: Patch) -> None:
        self.door, self.patch = door, patch
        self.decoder = patch.base.get_decoder()
        attentions = [getattr(layer, "self_attn", None) for layer in self.decoder.layers]
        self.few = 0  # rows of the paired forward that runs, where they are few
        self.possible = all(attention is not None for attention in attentions)
        if not self.possible:
            return
        tap(patch, attentions)
        self.eager = getattr(sys.modules[type(attentions[0]).__module__], "eager_attention_forward", None)
        patch.set(patch.model, "prepare_inputs_for_generation", PrepareInputs(self, patch.model))
        patch.hook(self.decoder, self.before_decoder, before=True)
        patch.hook(self.decoder, self.after_decoder)
        patch.hook(patch.model, self.after_model)
        head = patch.model.get_output_embeddings()
        for module in [*self.decoder.modules(), *([] if head is None else [head])]:
            if type(module) is nn.Linear and pays(module.weight):
                patch.stand_in(module, FewRows(module, self.turned))

    def pair(self, ids: Tensor, inputs: Mapping[str, Any]) -> Pair | None:
        """The branch of the running `generate`, where it can join this step. ids: [B, L] all tokens"""
        running, cache, new = self.door.running, inputs.get("past_key_values"), inputs.get("input_ids")
        if running is None or running.prompts is None or running.cache is None or not self.door.pairs:
            return None
        if new is None or new.shape[1] != 1 or self.patch.model.training or inputs.get("output_attentions"):
            return None
        if (
            cache is None
            or not _plain(cache)
            or not _plain(running.cache)
            or hasattr(running.cache, STATE)
            or not self._alone()
        ):
            return None
        rows = ids[running.prompts.rows]
        return Pair(running, rows, cache) if running.follows(rows[:, :-1]) else None

    def _alone(self) -> bool:
        """Whether nothing looks at hidden states or attention, which would take the branch's for the prompts'."""
        model = self.patch.model
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            return False
        doors = [one for one in model.__dict__[HANDLE].reporters if isinstance(one, EditsDoor)]
        looking = (watcher for door in doors for watcher in door.watchers.values())
        return not any(watcher.active for watcher in looking) and not any(door.followed for door in doors)

    def turned(self, input: Tensor) -> bool:
        """Whether a linear layer runs for the few rows of a paired step."""
        return bool(self.few) and input.shape[:-1] == (self.few, 1)

    # --- hooks -------------------------------------------------------------------------------------------------

    def before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the decoder: the branch's rows behind the prompts'."""
        pair: Pair | None = kwargs.get(PAIR)
        if pair is None:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != PAIR}
        embeds, one = kwargs.get("inputs_embeds"), kwargs.get(EDITS)
        fits = not args and embeds is not None and embeds.shape[1] == 1
        if not fits or kwargs.get("past_key_values") is not pair.cache or (one is not None and one.prompt):
            return args, kwargs
        known = ("inputs_embeds", "position_ids", "attention_mask")
        tokens = kwargs.get(TOKENS)
        if tokens is not None and tokens.notes:  # an adapter has something for each row of the batch
            return args, kwargs
        others = [value for name, value in kwargs.items() if name not in known]
        if any(isinstance(value, Tensor) and value.ndim > 1 for value in others):
            return args, kwargs  # something else that has a row for each of the batch
        kwargs |= self._joined(pair, kwargs)
        rows = len(kwargs["inputs_embeds"])
        pair.joined, self.few = rows - len(pair.ids), rows if rows in FEW else 0
        return args, kwargs

    def _joined(self, pair: Pair, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What changes among the decoder's arguments."""
        running, embeds, one = pair.running, kwargs["inputs_embeds"], kwargs.get(EDITS)
        assert running.prompts is not None
        count, rows = len(embeds), running.prompts.rows.to(embeds.device)
        more = embeds[rows]  # the same tokens
        real, place = running.behind(1)
        masks = (
            self._masks(embeds, kwargs.get("attention_mask"), pair.cache),
            self._masks(more, None if real is None else real.to(embeds.device), running.cache),
        )
        ones: tuple[Pass | None, Pass | None] = (one, None)
        memory = memory_of(running.cache, decoding=True)
        if one is not None and memory is not None:
            ones = one, Pass(memory, False, more.new_ones(len(rows), 1, dtype=torch.bool), pair.ids[:, -1:])
        cache = PairedCache(pair.cache, running.cache, count)
        halves = (
            Half(slice(0, count), pair.cache, masks[0], ones[0]),
            Half(slice(count, None), running.cache, masks[1], ones[1], aside=True),
        )
        config = self.decoder.config
        name = config._attn_implementation or "eager"
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, self.eager)
        together = Together(halves, cache, getattr(config, "layer_types", None), attention)
        positions: Tensor | None = kwargs.get("position_ids")
        if positions is None:
            positions = place.new_full((count, 1), int(pair.cache.get_seq_length()))
        axes, place = positions.shape[:-2], place.to(positions.device)
        joined = {
            "inputs_embeds": torch.cat([embeds, more]),
            "position_ids": torch.cat([positions.expand(*axes, count, 1), place.expand(*axes, len(rows), 1)], dim=-2),
            "attention_mask": None,  # each half has its own
            "past_key_values": cache,
            EDIT: Both(together),
        }
        return joined if one is None else {**joined, EDITS: together}

    def _masks(self, embeds: Tensor, given: Any, cache: Any) -> Any:
        """The masks that the decoder would make. given: as it gets them"""
        if isinstance(given, Mapping) or (given is not None and given.ndim == 4):
            return given
        config = self.decoder.config
        windows = getattr(config, "sliding_window", None) is not None
        if given is None and config._attn_implementation == "sdpa" and not windows:
            return None  # one row sees all keys
        return create_masks_for_generate(config, embeds, given, cache)

    def after_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook of the decoder: what it returns is the prompts' cache again."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, PairedCache):
            output.past_key_values = cache.first

    def after_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook of the model: each gets its own logits."""
        pair: Pair | None = kwargs.get(PAIR)
        if pair is None or pair.joined is None:
            return None
        self.few = 0
        pair.running.joined(pair.ids, output.logits[pair.joined :, -1])
        output.logits = output.logits[: pair.joined]
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(hidden[: pair.joined] for hidden in output.hidden_states)
        return output


def _plain(cache: Any) -> bool:
    """Whether a cache holds keys and values that grow, of the same columns in all layers, and nothing else."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and getattr(cache, LAYERS, None) is None
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        and bool(cache.layers)
        and all(layer.is_initialized for layer in cache.layers)
    )


class PrepareInputs:
    """Stands for the instance's `prepare_inputs_for_generation`: it alone is told the tokens of every row."""

    def __init__(self, pairing: Pairing, model: Any) -> None:
        self.pairing, self.original = pairing, model.prepare_inputs_for_generation
        functools.update_wrapper(self, self.original, updated=())  # none of the attributes of another door

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the original, and a branch that may join."""
        inputs: dict[str, Any] = self.original(input_ids, *args, **kwargs)
        pair = self.pairing.pair(input_ids, inputs)
        return inputs if pair is None else {**inputs, PAIR: pair}
