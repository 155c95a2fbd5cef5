"""Door 4, search on a model: forwards of forked caches inside the model's own `generate`.

`generate` prepares everything for one row a prompt and hands over to the search (`custom_generate`): the prompts are
prefilled once, not once a beam. From then on every prompt has caches of its own. Candidates run on a copy of the
beams' cache with a row for each of them; those that are chosen are taken out of it. To go back, a cache is cut to what
its rows share with the beams of that time, and these are forwarded again from there on: the prompt never is. Caches
that cannot be cut (windows that have moved on, linear attention, static ones) start again from the prompt's.

The attention that a method looks at is taken from the last decoder layer that has some, row by row, while candidates
run: `vlmfast.edits` tells which of its keys are visual tokens, also behind methods that drop some.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

from vlmfast.attention import attention_rows
from vlmfast.conversation import STATE
from vlmfast.crossattention import SEEN, Seen
from vlmfast.edits import Call, EditsDoor
from vlmfast.edits.memory import EDITS, Memory
from vlmfast.layers.cache import LAYERS
from vlmfast.patching import Patch, Report
from vlmfast.search import Guide, Look, Sequence, Tally, search

TYPES = ("token_type_ids", "mm_token_type_ids")


def _rows(value: Any, rows: Tensor, count: int, least: int = 1) -> Any:
    """Rows of every tensor of `count` rows and `least` or more axes, in dataclasses and containers, too."""
    if isinstance(value, Tensor):
        taken = value.ndim >= least and len(value) == count
        return value.index_select(0, rows.to(value.device)) if taken else value
    if isinstance(value, Memory):
        # What a method remembers of a layer by tokens has two axes or more; by channels or heads it may have one.
        rest = {name: _rows(getattr(value, name), rows, count) for name in ("visual", "real", "marks")}
        return replace(value, **rest, layers=_rows(value.layers, rows, count, least=2))
    if isinstance(value, Seen):
        return replace(value, prompts=value.prompts[rows.cpu()])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [one.name for one in dataclasses.fields(value) if one.init]
        return replace(value, **{name: _rows(getattr(value, name), rows, count, least) for name in fields})
    if isinstance(value, Mapping):
        return {name: _rows(one, rows, count, least) for name, one in value.items()}
    if isinstance(value, list):
        return [_rows(one, rows, count, least) for one in value]
    return value


class Taken(DynamicLayer):
    """Rows of another layer, that are copied when the next tokens come: once, with room for them."""

    def __init__(self, layer: DynamicLayer, rows: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.source: DynamicLayer | None = layer
        self.rows = rows.to(layer.keys.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `DynamicLayer.update`."""
        if self.source is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = self._longer(self.source.keys, key_states)
        self.values = self._longer(self.source.values, value_states)
        self.source = None
        return self.keys, self.values

    def _longer(self, before: Tensor, new: Tensor) -> Tensor:
        held, rows, heads, count, width = before.shape[2], *new.shape
        longer = before.new_empty(rows, heads, held + count, width)
        torch.index_select(before, 0, self.rows, out=longer[:, :, :held])
        longer[:, :, held:] = new
        return longer

    def get_seq_length(self) -> int:
        """Tokens held, also before they are copied."""
        return super().get_seq_length() if self.source is None else self.source.get_seq_length()


def fork(cache: Any, rows: Tensor, grows: bool = False) -> Any:
    """A cache of some rows of another one, which stays as it is, with all that a patch has left on it. int64 [R]

    grows: tokens follow before anything else is done with it. Raises NotImplementedError for caches that hold more
    than tensors.
    """
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        raise NotImplementedError(
            f"a search on a {'offloaded ' * cache.offloading}{type(cache).__name__}: use the default or a static cache"
        )
    twin = copy.copy(cache)
    twin.layers = [
        Taken(layer, rows) if grows and _plain(layer) and layer.get_seq_length() else _fork_layer(layer, rows)
        for layer in cache.layers
    ]
    for name in (STATE, EDITS, LAYERS, SEEN):
        state = getattr(cache, name, None)
        if state is not None:
            setattr(twin, name, _rows(state, rows, _count(state)))
    return twin


def _count(state: Any) -> int:
    """Rows of what a patch has left on a cache."""
    if isinstance(state, Memory):
        return len(state.visual)
    if isinstance(state, Seen):
        return len(state.prompts)
    stages = getattr(state, "stages", None)
    return len(state.mask) if stages is None else len(stages[0].columns)


def _fork_layer(layer: Any, rows: Tensor) -> Any:
    def taken(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: taken(one) for name, one in value.items()}
        if not isinstance(value, Tensor):
            return value
        return value.index_select(0, rows.to(value.device)) if value.ndim > 1 else value.clone()

    twin = copy.copy(layer)
    twin.__dict__ = {name: taken(value) for name, value in vars(layer).items()}
    if "batch_size" in twin.__dict__:
        twin.batch_size = len(rows)
    return twin


def _plain(layer: Any) -> bool:
    """Whether a layer holds nothing but the keys and values of all tokens."""
    return type(layer) in (DynamicLayer, Taken)


def crops(cache: Any) -> bool:
    """Whether the last tokens of a cache can be cut off."""
    return all(
        _plain(layer) or (type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() < layer.sliding_window)
        for layer in cache.layers
    )


@dataclass(frozen=True)
class Rows:
    """A state of `ModelWalker`: a cache, and the generated tokens [R, t] that it holds behind the prompt."""

    cache: Any
    tokens: Tensor


class ModelWalker:
    """One prompt of a batch that a model has prefilled.

    ids: [1, P]; cache: of the batch, with the prompts in it; row: the prompt's. logits: [V] behind it. given: what
    `generate` prepared for the forwards of the batch. eye: sees the forwards of candidates.
    """

    def __init__(
        self, model: Any, eye: Eye, ids: Tensor, cache: Any, row: int, logits: Tensor, given: Mapping[str, Any]
    ) -> None:
        self.model, self.eye, self.ids, self.cache, self.row, self.logits = model, eye, ids, cache, row, logits
        self.single = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
        self.mask: Tensor | None = given.get("attention_mask")
        self.positions: Tensor | None = given.get("position_ids")
        self.types = {name: given[name] for name in TYPES if given.get(name) is not None}

    def begin(self, rows: int) -> tuple[Rows, Tensor]:
        """See `vlmfast.search.Walker`, also for the other methods."""
        index = torch.full((rows,), self.row, device=self.ids.device)
        return Rows(fork(self.cache, index), self.ids[:, :0].expand(rows, 0)), self.logits.expand(rows, -1)

    def step(self, state: Rows, rows: Tensor, tokens: Tensor) -> tuple[Rows, Tensor, Look]:
        """One batch, whose last layer is looked at."""
        ahead = Rows(fork(state.cache, rows, grows=True), torch.cat([state.tokens[rows], tokens[:, None]], dim=1))
        with self.eye.open(ahead.tokens.shape[1]) as seen:
            logits = self._forward(ahead, 1)
        assert seen.look is not None
        look = Look(seen.look.generated.to(logits.device), seen.look.visual.to(logits.device))
        return ahead, logits, look

    def keep(self, state: Rows, rows: Tensor) -> Rows:
        """No forward."""
        return Rows(fork(state.cache, rows), state.tokens[rows])

    def back(self, state: Rows, tokens: Tensor) -> tuple[Rows, Tensor]:
        """What the cache's rows share with `tokens` stays; the rest is forwarded again, one token at least."""
        count, shared = tokens.shape[1], 0
        if crops(state.cache):
            both = min(count, state.tokens.shape[1])
            same = state.tokens[None, :, :both] == tokens[:, None, :both]
            lengths, rows = same.long().cumprod(-1).sum(-1).max(1)  # [n], the row that goes with each the longest way
            shared = min(int(lengths.min()), count - 1)
            cache = fork(state.cache, rows)
            cache.crop(shared - state.tokens.shape[1])
        else:
            cache = fork(self.cache, torch.full((len(tokens),), self.row, device=tokens.device))
        rows_back = Rows(cache, tokens)
        return rows_back, self._forward(rows_back, count - shared)

    def _forward(self, state: Rows, new: int) -> Tensor:
        """The logits behind the last `new` tokens. [R, V] fp32"""
        (rows, count), device = state.tokens.shape, state.tokens.device

        def extended(values: Tensor, more: Tensor) -> Tensor:
            values = values[..., min(self.row, values.shape[-2] - 1), :].unsqueeze(-2)
            values = torch.cat([values, more.expand(*values.shape[:-1], count).to(values)], dim=-1)
            return values.expand(*values.shape[:-2], rows, values.shape[-1])

        given: dict[str, Any] = dict(self.single)
        if self.mask is not None:
            given["attention_mask"] = extended(self.mask, torch.ones(1, device=device))
        if self.positions is not None:
            last = self.positions[..., min(self.row, self.positions.shape[-2] - 1), -1:].unsqueeze(-2)
            given["position_ids"] = extended(self.positions, last + torch.arange(1, count + 1, device=device))
        for name, types in self.types.items():  # as `generate` extends them: with the last value, or as text
            last = types[self.row, -1:] if name == "token_type_ids" else types.new_zeros(1)
            given[name] = extended(types, last)
        ids = torch.cat([self.ids.expand(rows, -1), state.tokens], dim=1)
        given["past_key_values"] = state.cache
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=new, **given)
        logits: Tensor = self.model(**inputs, return_dict=True).logits[:, -1].to(device, torch.float32, copy=True)
        return logits


class Eye:
    """Watches the attention of one decoder layer, while it is open. One token a row."""

    def __init__(self, number: int) -> None:
        self.number, self.count, self.first = number, 0, 0
        self.look: Look | None = None

    @property
    def active(self) -> bool:
        """Whether it is open."""
        return self.count > 0

    def begin(self, cache: Any) -> None:
        """A batch of prompts has been prefilled: what comes into the cache from now on is generated."""
        self.first = int(cache.get_seq_length(self.number))

    def open(self, count: int) -> Eye:
        """Watch one forward, of the `count`-th generated tokens."""
        self.count, self.look = count, None
        return self

    def __enter__(self) -> Eye:
        return self

    def __exit__(self, *error: object) -> None:
        self.count = 0

    def watch(self, call: Call) -> None:
        """Take the rows of one call."""
        last = slice(0, 1)
        seen = call.seen.of(last, call.key.shape[2])
        rows = attention_rows(call.query, call.key, last, call.scaling, seen)[:, :, 0]
        self.look = Look.of(rows, call.visual, self.first - call.offset, self.count)


@dataclass(frozen=True)
class Loop:
    """The decoding loop that `generate` runs for the prompts it has prepared. config: what the user asked for."""

    door: SearchDoor
    config: GenerationConfig

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """Prefill the prompts, search for one after the other."""
        config, door, prepared = self.config, self.door, generation_config
        outputs = model._prefill(input_ids, prepared, model_kwargs)
        cache = outputs.past_key_values
        logits = outputs.logits[:, -1].to(input_ids.device, torch.float32, copy=True)
        door.eye.begin(cache)
        width = input_ids.shape[1]
        found: list[Sequence] = []
        dropped = ("past_key_values", "mm_encoder_outputs")
        given = {name: value for name, value in model_kwargs.items() if name not in dropped}
        for row, ids in enumerate(input_ids):
            walker = ModelWalker(model, door.eye, ids[None], cache, row, logits[row], given)
            ended = door.ending(
                beams=config.num_beams,
                prompt=ids[None],
                stops=functools.partial(stopping_criteria, scores=None),
                room=prepared.max_length - width,
                ends=prepared._eos_token_tensor,
                length_penalty=config.length_penalty,
                early_stopping=config.early_stopping,
            )
            best = search(walker, door.guide, ended, logits_processor, door.tally)
            found += best[: config.num_return_sequences]
        return self._output(found, input_ids, prepared, cache)

    def _output(self, found: list[Sequence], ids: Tensor, prepared: Any, cache: Any) -> Any:
        """In the form that `generate` returns."""
        returned, beams = self.config.num_return_sequences, self.config.num_beams
        pad, end = prepared._pad_token_tensor, prepared._eos_token_tensor
        fill = -1 if end is None else int(pad or end[0])  # as transformers' beam search has it
        width = max(len(one.tokens) for one in found)
        tokens = ids.new_full((len(found), width), fill)
        lineage = torch.full((len(found), width), -1, dtype=torch.int32, device=ids.device)
        for row, one in enumerate(found):
            tokens[row, : len(one.tokens)] = one.tokens
            lineage[row, : len(one.lineage)] = one.lineage + row // returned * beams
        sequences = torch.cat([ids.repeat_interleave(returned, dim=0), tokens], dim=1)
        if not prepared.return_dict_in_generate:
            return sequences
        scores = torch.tensor([one.score for one in found], device=ids.device)
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences, sequences_scores=scores, beam_indices=lineage, past_key_values=cache
        )


class SearchDoor:
    """Lets one method search for the tokens of one patched model.

    ending: makes what keeps the finished sequences, from the fields of `vlmfast.search.Ended`. beams: what to tell
    those who did not ask for any. alone: prompts come one at a time, with no stopping criteria of the user's.
    """

    def __init__(
        self, patch: Patch, name: str, guide: Guide, ending: Callable[..., Any], beams: int, alone: bool = False
    ) -> None:
        self.name, self.guide, self.ending, self.beams, self.alone = name, guide, ending, beams, alone
        edits = EditsDoor.of(patch)
        self.eye = Eye(edits.attends[-1])
        edits.watch(name, self.eye.number, self.eye)
        self.tally = Tally()
        patch.set(patch.model, "generate", Generate(self, patch.model))
        patch.reporters.append(self)

    def check(self, model: Any, config: GenerationConfig, given: Mapping[str, Any]) -> None:
        """Refuse what the search cannot do. config: of the call; given: its arguments by name."""
        name, beams = self.name, config.num_beams or 1
        if given.get("custom_generate") is not None:
            raise NotImplementedError(f"{name} owns the decoding loop: custom_generate cannot be another one")
        if given.get("streamer") is not None:
            raise ValueError(f"{name} searches with beams, and `streamer` cannot be used with beam search")
        if beams == 1:
            raise ValueError(f"{name} searches with beams: pass num_beams={self.beams} (or 2 and more) to generate")
        if config.do_sample:
            raise ValueError(f"{name} does not sample: pass do_sample=False to generate")
        mode = config.get_generation_mode(given.get("assistant_model"))
        if mode != GenerationMode.BEAM_SEARCH:
            raise NotImplementedError(f"{name} is a beam search of its own, generate is set to {mode.value}")
        if config.use_cache is False:
            raise ValueError(f"{name} needs the cache: leave out use_cache=False")
        if given.get("prefix_allowed_tokens_fn") is not None or config.guidance_scale not in (None, 1):
            raise NotImplementedError(f"{name} with prefix_allowed_tokens_fn or guidance_scale")
        for output in ("attentions", "hidden_states", "logits"):
            if getattr(config, f"output_{output}"):
                raise NotImplementedError(f"{name} returns sequences and their scores, no output_{output}")
        if self.alone and given.get("stopping_criteria"):
            raise NotImplementedError(f"{name} with parity='official' knows no stopping_criteria")
        ids = given.get("inputs", given.get("input_ids"))
        if self.alone and ids is not None and len(ids) > 1:
            raise ValueError(f"{name} with parity='official' takes one prompt at a time, got {len(ids)}")

    def report(self, report: Report) -> Report:
        """Say what the last call of `generate` cost."""
        tally = self.tally
        notes = [f"{self.name}: looks at the attention of layer {self.eye.number}"]
        if tally.steps:
            notes.append(
                f"{self.name}: {tally.steps} steps, {tally.calls} forwards of {tally.rows} rows, "
                f"{tally.backs} times back"
            )
        return replace(report, notes=(*report.notes, *notes))


class Generate:
    """Stands for the instance's `generate`: hands it the search."""

    def __init__(self, door: SearchDoor, model: Any) -> None:
        self.door, self.model, self.original = door, model, model.generate
        self.names = list(inspect.signature(model.generate).parameters)
        functools.update_wrapper(self, self.original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with the method's beams. Raises what `SearchDoor.check` does."""
        given = {**dict(zip(self.names, args)), **kwargs}
        asked = {name: value for name, value in given.items() if name not in self.names}
        config, _ = self.model._prepare_generation_config(given.get("generation_config"), **asked)
        self.door.check(self.model, config, given)
        config.num_return_sequences = config.num_return_sequences or 1
        config.length_penalty = 1.0 if config.length_penalty is None else config.length_penalty
        config.early_stopping = config.early_stopping or False
        if config.stop_strings is not None and given.get("tokenizer") is not None:
            # generate loses the tokenizer on the way to a loop that is not its own.
            criterion = StopStringCriteria(tokenizer=given["tokenizer"], stop_strings=config.stop_strings)
            given["stopping_criteria"] = StoppingCriteriaList([*(given.get("stopping_criteria") or ()), criterion])
            given["stop_strings"] = None
        ids = given.get("inputs", given.get("input_ids"))
        if (
            config.cache_implementation is not None and ids is not None
        ):  # candidates of the last step have a place, too
            longest = config.max_length if config.max_new_tokens is None else ids.shape[1] + config.max_new_tokens
            given["max_cache_len"] = max(longest or 0, config.max_cache_len or 0) or None
        self.door.tally = Tally(watch=self.door.tally.watch)
        one = {"num_beams": 1, "num_return_sequences": 1, "early_stopping": False, "length_penalty": 1.0}
        return self.original(**{**given, **one}, custom_generate=Loop(self.door, config))
