"""Door 2: visual tokens dropped between decoder layers.

The inputs door tells of every prompt where its pictures stand. Before a cut layer the method chooses, and hidden
states lose the rest of the columns; every layer behind gets rotary embeddings, positions and the mask for what is
left. The cache remembers which columns each layer holds (see vlmfast.layer_cache), so that later tokens get masks of
the right shape in every layer. Nothing runs in layers before the first cut, nor at all while nothing is to go.

The decoder's last hidden state has the prompt's length again, so that logits, labels and `logits_to_keep` mean what
they mean without a patch: at the place of a dropped token stands what the last token before it that is left has. The
token after a dropped one is thus predicted as by a model that never saw the dropped one. Hidden states and attention
maps of single layers (`output_hidden_states`, `output_attentions`) are of the tokens that the layer got.

In sliding layers the window counts the columns of the prompt as the first layer has them; flash attention, which
applies the window itself, counts the tokens that are left.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.attention import KEYWORD, Taps, tap
from vlmfast.families import Positions
from vlmfast.inputs import Door
from vlmfast.layer_cache import LAYERS, LayerState, Stage, later_mask, layer_state, prompt_mask, sizes, window_of
from vlmfast.layer_scores import Asked, LayerTaps, OwnAttention, key_norm, measure, plain, rotates
from vlmfast.layer_tokens import PROMPT, Cut, LayerSelector, LayerTokens, Placed, Prompt
from vlmfast.patching import HANDLE, Patch, Report
from vlmfast.rewriting import compact, gather_index
from vlmfast.towers import Tower
from vlmfast.visual import Choice, Score, VisualTokens

PASS = "vlmfast_pass"  # keyword of the decoder layers: what happens to the tokens of this forward
IMPLEMENTATIONS = ("sdpa", "eager", "flash")
NOBODY = Taps({}, closed=True)  # observes nothing


@dataclass(frozen=True)
class Everything:
    """Selector of the inputs door that drops nothing: it only tells where the pictures stand."""

    uses_text: bool = False
    keeps_newlines: bool = True

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """No statistics."""
        return {}

    def choose(self, visual: VisualTokens) -> Choice:
        """All tokens."""
        return Choice(torch.arange(len(visual), device=visual.features.device))


class LayersDoor:
    """Drops visual tokens between the decoder layers of one patched model for one selector."""

    def __init__(self, patch: Patch, selector: LayerSelector, positions: Positions) -> None:
        if positions not in ("original", "compact"):
            raise ValueError(f"positions={positions!r}: choose 'original' or 'compact'")
        self.family, self.selector, self.positions = patch.family, selector, positions
        decoder = patch.base.get_decoder()
        self.config = decoder.config
        self.depth = len(decoder.layers)
        vision = patch.model.config.vision_config
        self.stacked = len(getattr(vision, "deepstack_visual_indexes", ())) if self.family.deepstack else 0
        self.cuts = selector.layers(self.depth)
        if not selector.fixed:  # early cuts of a schedule by depth are left out where features are still added
            self.cuts = tuple(cut for cut in self.cuts if cut >= self.stacked) or (self.stacked,)
        self.linear = self._check(decoder)
        doors = [one for one in patch.model.__dict__[HANDLE].reporters if isinstance(one, Door)]
        inputs = doors[0] if doors else Door(patch, Everything(), None)
        if inputs.tells:
            raise NotImplementedError("two methods that drop tokens between decoder layers cannot be combined")
        inputs.tells = True
        patch.model.__dict__[HANDLE].reporters.append(self)
        self.types = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
        scored = [cut - 1 for cut in self.cuts if any(not score.own for score in selector.asks(cut).values())]
        tap(patch, [decoder.layers[layer].self_attn for layer in dict.fromkeys(scored)])
        patch.hook(decoder, self.before_decoder, before=True)
        patch.hook(decoder, self.after_decoder)
        for number in range(self.cuts[0] - 1, self.depth):
            patch.hook(decoder.layers[number], Enter(number, number in scored), before=True)

    def _check(self, decoder: Any) -> list[int]:
        """Refuse decoders and layers that this cannot work on. -> layers without attention"""
        name = self.selector.name
        if (
            not self.cuts
            or list(self.cuts) != sorted(set(self.cuts))
            or not 1 <= self.cuts[0] <= self.cuts[-1] < self.depth
        ):
            raise ValueError(
                f"{name} drops tokens before layers {'/'.join(map(str, self.cuts))}; this decoder has {self.depth} "
                f"layers: choose ascending numbers from 1 to {self.depth - 1}"
            )
        types = getattr(self.config, "layer_types", None) or ("full_attention",) * self.depth
        strange = sorted(set(types) - {"full_attention", "sliding_attention", "linear_attention"})
        if strange:
            raise NotImplementedError(f"{name}: {self.family.name} has {', '.join(strange)} layers")
        attends = [layer for layer, kind in enumerate(types) if kind != "linear_attention"]
        scores = {cut: self.selector.asks(cut).values() for cut in self.cuts}
        needed = {cut if score.own else cut - 1 for cut in self.cuts for score in scores[cut]}
        if not needed <= set(attends) or self.cuts[0] <= attends[0]:
            raise NotImplementedError(
                f"{name} takes scores in layers {'/'.join(map(str, sorted(needed)))} and drops tokens before "
                f"{'/'.join(map(str, self.cuts))}; only layers {'/'.join(map(str, attends))} of this decoder attend "
                "(the others hold one state of all tokens), and the first of them must see everything"
            )
        if self.cuts[0] < self.stacked:
            raise ValueError(
                f"{name} drops tokens before layer {self.cuts[0]}, but {self.family.name} adds features of the vision "
                f"tower to all visual tokens behind its first {self.stacked} layers: choose {self.stacked} or more"
            )
        implementation = self.config._attn_implementation or "eager"
        if not any(known in implementation for known in IMPLEMENTATIONS):
            raise NotImplementedError(
                f"{name} with attn_implementation={implementation!r}; choose sdpa, eager or flash"
            )
        for cut in self.cuts:
            for score in scores[cut]:
                layer = decoder.layers[cut if score.own else cut - 1]
                if getattr(layer.self_attn, "attn_logit_softcapping", None) is not None:
                    raise NotImplementedError(f"{name}: attention scores of layers with capped logits")
                if (score.own and not plain(layer)) or (score.kind == "key_norm" and not rotates(layer)):
                    raise NotImplementedError(
                        f"{name} needs queries and keys of a decoder layer apart from its attention; "
                        f"{type(layer.self_attn).__name__} does not compute them in a known way"
                    )
        return [layer for layer in range(self.depth) if layer not in attends]

    # --- hooks ------------------------------------------------------------------------------------------------

    def before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the decoder: decide whether anything happens to the tokens of this forward."""
        prompt: Prompt | None = kwargs.get(PROMPT)
        kwargs = {name: value for name, value in kwargs.items() if name != PROMPT}
        cache = kwargs.get("past_key_values")
        state = None if cache is None else layer_state(cache, decoding=kwargs["inputs_embeds"].shape[1] == 1)
        one: Prefill | Later | None = None
        if prompt is not None and prompt.pictures:
            prefill = Prefill(self, decoder, prompt, kwargs)
            if prefill.active:
                if state is not None:
                    raise NotImplementedError(
                        "a new picture in a later turn on a cache whose layers hold different tokens: use a fresh one"
                    )
                one = prefill
        if one is None and state is not None:
            one = Later(self, decoder, state, kwargs)
            if prompt is not None and prompt.mask is not None:
                state.mask = prompt.mask
        if one is not None:
            kwargs[PASS] = one
        return args, kwargs

    def after_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook of the decoder: give the last hidden state the prompt's length, and the cache its state."""
        one = kwargs.get(PASS)
        if not isinstance(one, Prefill):
            return None
        one.finish()
        if isinstance(output, tuple):
            return (one.spread(output[0]), *output[1:])
        output.last_hidden_state = one.spread(output.last_hidden_state)
        return output

    def report(self, report: Report) -> Report:
        """Add what the method has to say about the pictures of the last prompts."""
        remarks = getattr(self.selector, "remarks", lambda pictures: ())(report.images)
        return dataclasses.replace(report, notes=(*report.notes, *remarks))


@dataclass(frozen=True)
class Enter:
    """Pre-hook of a decoder layer. tapped: its attention looks for an observer, also when there is none."""

    number: int
    tapped: bool

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the layer what it works on. Hidden states stay positional: checkpoints and recorders count on it."""
        one: Prefill | Later | None = kwargs.get(PASS)
        if self.tapped:
            kwargs = {KEYWORD: NOBODY, **kwargs}
        if one is None:
            return args, kwargs
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden, kwargs = one.enter(self.number, layer, hidden, dict(kwargs))
        return (hidden, *args[1:]), kwargs


# --- positions ------------------------------------------------------------------------------------------------------


@dataclass
class _Rotary:
    """Rotary embeddings for some of the tokens, or for other positions."""

    door: LayersDoor
    decoder: Any
    memo: dict[Any, Any] = field(default_factory=dict)

    def picked(self, embeddings: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin: [..., B or 1, L, d], index [B, M] -> [..., B, M, d]"""
        key = ("picked", id(embeddings[0]), id(index))
        if key not in self.memo:
            self.memo[key] = embeddings, index, tuple(_pick(one, index) for one in embeddings)
        return self.memo[key][-1]

    def at(self, stage: int, positions: Tensor, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """For the positions behind a cut, computed once for it. [B, M] or [3 or 4, B, M]"""
        kind = (self.door.config.layer_types[layer],) if self.door.types else ()
        key = ("at", stage, kind)
        if key not in self.memo:
            axes = positions if positions.ndim == 2 else positions[-3:]
            self.memo[key] = self.decoder.rotary_emb(hidden, axes, *kind)
        return self.memo[key]


def _pick(embedding: Tensor, index: Tensor) -> Tensor:
    rows, width = index.shape[0], embedding.shape[-1]
    embedding = embedding.expand(*embedding.shape[:-3], rows, *embedding.shape[-2:])
    index = index.to(embedding.device)[..., None].expand(*embedding.shape[:-3], -1, -1, width)
    return embedding.gather(-2, index)


# --- a prompt with pictures -----------------------------------------------------------------------------------------


@dataclass
class _Moving:
    """A picture on its way through the layers. columns: [n] places among the tokens that the next layer gets."""

    placed: Placed
    columns: Tensor
    index: Tensor
    others: Tensor
    left: dict[int, int | None]  # how many are to enter each cut layer
    merged: bool = False
    stays: Tensor | None = None  # at the current cut: which of `columns` and then `others`, bool
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def row(self) -> int:
        """Of the batch."""
        return self.placed.row


class Prefill:
    """One forward over prompts with pictures."""

    def __init__(self, door: LayersDoor, decoder: Any, prompt: Prompt, kwargs: dict[str, Any]) -> None:
        self.door, self.decoder, self.prompt = door, decoder, prompt
        self.embeds: Tensor = kwargs["inputs_embeds"]
        self.rows, self.new = self.embeds.shape[:2]
        self.pictures = [
            _Moving(
                one,
                one.columns,
                one.index,
                one.others,
                {cut: door.selector.left(cut, len(one.columns), door.depth) for cut in door.cuts},
            )
            for one in prompt.pictures
        ]
        self.active = any(
            left is None or left < len(one.columns) for one in self.pictures for left in one.left.values()
        )
        if not self.active:
            return
        device = self.embeds.device
        self.cache = kwargs.get("past_key_values")
        self.held = 0 if self.cache is None else int(self.cache.get_seq_length())
        self.mask = None if prompt.mask is None else prompt.mask.to(device).bool()
        if self.mask is None:
            self.live = torch.ones(self.rows, self.new, dtype=torch.bool, device=device)
        else:
            self.live = self.mask[:, self.held :]
        self.index = torch.arange(self.new, device=device).expand(self.rows, -1)
        self.positions = self._given_positions(kwargs.get("position_ids"))
        self.shift = torch.zeros(self.rows, dtype=torch.long, device=device)
        self.stages: list[Stage] = []
        self.rotary = _Rotary(door, decoder)
        self.memo: dict[Any, Any] = {}
        self.taps: LayerTaps | None = None
        self.counts: list[dict[int, int]] = [{0: len(one.columns) + len(one.others)} for one in self.pictures]
        visual = torch.zeros_like(self.live)
        for one in self.pictures:
            visual[one.row, one.columns] = visual[one.row, one.others] = True
        self.text = self.live & ~visual
        after = ~(visual.flip(1).long().cumsum(1).flip(1) > 0)
        question = self.text & after
        self.question = torch.where(question.any(1, keepdim=True), question, self.text)
        self.last = prompt.queries(self.live)

    def _given_positions(self, given: Tensor | None) -> Tensor:
        """Positions of the new tokens. [B, L] or [3 or 4, B, L]"""
        if given is None:
            given = self.held + torch.arange(self.new, device=self.embeds.device)[None]
        return given.expand(*given.shape[:-2], self.rows, self.new)

    # --- a layer ----------------------------------------------------------------------------------------------

    def enter(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Cut where tokens have to go, fit the layer's arguments, and have statistics taken for the next cut."""
        door = self.door
        if self.cache is None:
            self.cache = kwargs.get("past_key_values")
        given = dict(kwargs)  # made for all tokens
        if self.stages:
            kwargs = self._fitted(number, hidden, given)
        if number in door.cuts and any(self._wants(number)):
            before = len(self.stages)
            hidden = self._cut(number, layer, hidden, kwargs)
            if len(self.stages) > before:
                kwargs = self._fitted(number, hidden, given)
        if number + 1 in door.cuts and any(self._wants(number + 1)):
            scores = {name: score for name, score in door.selector.asks(number + 1).items() if not score.own}
            if scores:
                start = self.held - sizes(self.cache, hidden.shape[1], number)[1]
                self.taps = LayerTaps(self._asked(number + 1, scores), start, *kwargs["position_embeddings"])
                kwargs[KEYWORD] = self.taps
        return hidden, kwargs

    def _wants(self, cut: int) -> list[bool]:
        """For each picture, whether tokens of it may have to go before this layer."""
        lefts = [(one.left[cut], len(one.columns)) for one in self.pictures]
        return [left is None or left < count for left, count in lefts]

    def _fitted(self, number: int, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """The layer's arguments for the tokens that are left."""
        kwargs = dict(given)
        mask = given.get("attention_mask")
        if number in self.door.linear:
            kwargs["attention_mask"] = None if self.stages[-1].whole else self.live
            return kwargs
        full, now = sizes(self.cache, self.new, number), sizes(self.cache, hidden.shape[1], number)
        key = (len(self.stages), id(mask), full, now)
        if key not in self.memo:
            fitted = None
            if mask is not None or not self.stages[-1].whole:
                implementation = self.door.config._attn_implementation or "eager"
                fitted = prompt_mask(
                    mask, self.index, self.live, self.held, self.mask, full, now, implementation, hidden.dtype
                )
            self.memo[key] = mask, fitted  # the mask stays, and so does its id
        kwargs["attention_mask"] = self.memo[key][-1]
        ids: Tensor | None
        if self.door.positions == "compact":
            kwargs["position_embeddings"] = self.rotary.at(self.stages[-1].first, self.positions, number, hidden)
            ids = self.positions if self.positions.ndim == 2 else self.positions[0]  # of four rows the text's
        else:
            kwargs["position_embeddings"] = self.rotary.picked(given["position_embeddings"], self.index)
            ids = given.get("position_ids")
            if ids is not None:
                ids = ids.expand(self.rows, -1).gather(1, self.index)
        if given.get("position_ids") is not None:
            kwargs["position_ids"] = ids
        return kwargs

    # --- statistics -------------------------------------------------------------------------------------------

    def _asked(self, cut: int, scores: Mapping[str, Any]) -> dict[int, Asked]:
        """What each row wants of the layer before (or at) a cut."""
        wants = self._wants(cut)
        rows = sorted({one.row for one, wanted in zip(self.pictures, wants) if wanted})
        return {
            row: Asked(scores, {name: self._queries(row, score.queries) for name, score in scores.items()})
            for row in rows
        }

    def _queries(self, row: int, which: str) -> Tensor:
        """Places among the tokens a layer gets. [R]"""
        if which == "all":
            return self.live[row].nonzero().flatten()
        if which == "last":
            wanted = self.last[row]
        elif which == "question":
            wanted = self.question[row] if bool(self.question[row].any()) else self.last[row]
        else:
            wanted = self._raters(row)
        found = (wanted[self.index[row]] & self.live[row]).nonzero().flatten()
        if len(found):
            return found
        return self.live[row].nonzero().flatten()[-1:]  # a prompt that ends with a picture: its last token is gone

    def _raters(self, row: int) -> Tensor:
        """The question's tokens that the method lets rate, as a mask over the prompt. [L]"""
        key = ("raters", row)
        if key not in self.memo:
            question = self.question[row].nonzero().flatten()
            wanted = torch.zeros_like(self.question[row])
            if len(question):
                visual = torch.cat([one.placed.columns for one in self.pictures if one.row == row])
                embeds = self.embeds[row].detach()
                wanted[question[self.door.selector.raters(embeds[visual], embeds[question])]] = True
            self.memo[key] = wanted if bool(wanted.any()) else self.last[row]
        return self.memo[key]

    def _own(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
        """Statistics of a layer's own attention before it runs."""
        scores = {name: score for name, score in self.door.selector.asks(number).items() if score.own}
        if not scores:
            return {}
        start = self.held - sizes(self.cache, hidden.shape[1], number)[1]
        device = layer.self_attn.q_proj.weight.device
        if device.type == "meta":
            raise NotImplementedError(
                f"{self.door.selector.name} needs the weights of decoder layer {number} before it runs, and they are "
                "offloaded; keep them on a device"
            )
        mask: Tensor | None = kwargs.get("attention_mask")
        results: dict[int, dict[str, Tensor]] = {}
        for row, asked in self._asked(number, scores).items():
            cos, sin = (
                (one[row : row + 1] if len(one) > 1 else one).to(device) for one in kwargs["position_embeddings"]
            )
            past = None
            if start and self.cache is not None:
                keys = self.cache.layers[number].keys[row : row + 1]
                past = keys[:, :, : self.held][:, :, -start:]
            own = OwnAttention(layer, hidden[row : row + 1].detach().to(device), cos, sin, past)
            keys = own.keys()
            mine = None if mask is None else (mask[row : row + 1] if mask.shape[0] > 1 else mask).to(device)
            results[row] = {
                name: measure(score, own, asked.rows[name].to(device), keys, start, mine, layer.self_attn.scaling)
                if score.kind == "attention"
                else key_norm(layer.self_attn, keys[:, :, start:], cos, sin)
                for name, score in scores.items()
            }
        return results

    # --- the cut ----------------------------------------------------------------------------------------------

    def _cut(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Ask the method about every picture that has too many tokens. -> hidden states of what is left"""
        with torch.no_grad():
            results = {} if self.taps is None else self.taps.results
            if self.taps is not None:
                self.taps.closed, self.taps = True, None
            for row, own in self._own(number, layer, hidden, kwargs).items():
                results.setdefault(row, {}).update(own)
            choices = [
                self._ask(one, number, hidden, results.get(one.row, {})) if wanted else None
                for one, wanted in zip(self.pictures, self._wants(number))
            ]
        keep = torch.ones_like(self.live)
        dropped = False
        places: list[Tensor] = []
        for one, cut in zip(self.pictures, choices):
            kept = torch.arange(len(one.columns), device=keep.device) if cut is None else cut.kept.to(keep.device)
            if len(kept) == 0:
                raise ValueError(f"{self.door.selector.name} left no token of a picture")
            if cut is not None and cut.merge is not None:
                hidden = merged(hidden, one.row, one.columns, kept, cut.merge.to(keep.device))
                one.merged = True
            gone = torch.ones(len(one.columns), dtype=torch.bool, device=keep.device)
            gone[kept] = False
            stays = torch.cat([~gone, torch.ones(len(one.others), dtype=torch.bool, device=keep.device)])
            if len(kept) < len(one.columns):
                dropped = True
                keep[one.row, one.columns[gone]] = False
                keep[one.row, one.others] = False  # newlines of rows that are no longer whole
                stays[len(gone) :] = False
            one.stays = stays
            index = one.index[kept] if cut is None or cut.index is None else cut.index.to(one.index.device)
            one.index = index
            if cut is not None and cut.final:
                one.left = dict.fromkeys(one.left, len(kept))
            places.append(kept)
        if not dropped:
            return hidden
        return self._shorter(number, hidden, keep, places)

    def _ask(self, one: _Moving, number: int, hidden: Tensor, results: Mapping[str, Tensor]) -> Cut:
        """The method's choice for one picture."""
        text = self.text[one.row][self.index[one.row]] & self.live[one.row]
        question = self.question[one.row][self.index[one.row]][text]
        states = hidden[one.row].detach()
        columns, text = one.columns.to(states.device), text.to(states.device)
        tokens = LayerTokens(
            layer=number,
            depth=self.door.depth,
            hidden=states[columns],
            text=states[text],
            question=question.to(states.device),
            index=one.index.to(states.device),
            visual=one.placed.visual,
            total=len(one.placed.columns),
            keep=one.left[number],
            scores={name: values.to(states.device)[..., columns] for name, values in results.items()},
            text_scores={name: values.to(states.device)[..., text] for name, values in results.items()},
            final_norm=self.decoder.norm,
            ordered=self.door.positions == "compact" and self.positions.ndim == 2,
            memory=one.memory,
        )
        return self.door.selector.cut(tokens)

    def _shorter(self, number: int, hidden: Tensor, keep: Tensor, places: list[Tensor]) -> Tensor:
        """Take the columns out of everything."""
        local, live = gather_index(keep, self.live)
        if self.door.positions == "compact":
            spans = [
                _Span.of(one.row, torch.cat([one.columns, one.others]), one.stays)
                for one in self.pictures
                if one.stays is not None
            ]
            positions, shift = compact(self.positions, keep, spans)
            self.positions = positions.gather(-1, local.expand(*positions.shape[:-1], -1))
            self.shift = self.shift + shift
        place = torch.full_like(keep, -1, dtype=torch.long)
        place.scatter_(1, local, torch.arange(local.shape[1], device=local.device).expand(self.rows, -1))
        for number_of, (one, kept) in enumerate(zip(self.pictures, places)):
            if len(kept) < len(one.columns):
                one.others = one.others[:0]
            one.columns = place[one.row, one.columns[kept]]
            one.others = place[one.row, one.others]
            self.counts[number_of][number] = len(one.columns) + len(one.others)
        self.index, self.live = self.index.gather(1, local), live
        before = torch.arange(self.held, device=local.device).expand(self.rows, -1)
        real = before.new_ones(self.rows, self.held, dtype=torch.bool)
        if self.mask is not None:
            real = self.mask[:, : self.held]
        held = torch.cat([real, live], dim=1)
        self.stages.append(
            Stage(
                number,
                torch.cat([before, self.held + self.index], dim=1),
                held,
                bool(held.all()),
                self.shift if self.door.positions == "compact" else None,
            )
        )
        rows = torch.arange(self.rows, device=hidden.device)[:, None]
        return hidden[rows, local.to(hidden.device)]

    # --- the end ----------------------------------------------------------------------------------------------

    def spread(self, hidden: Tensor) -> Tensor:
        """The last hidden state at every place of the prompt. [B, M, D] -> [B, L, D]"""
        if not self.stages:
            return hidden
        there = torch.zeros(self.rows, self.new, dtype=torch.long, device=self.index.device)
        place = torch.arange(self.index.shape[1], device=there.device).expand(self.rows, -1)
        # Padding points anywhere, so only live tokens say where they are; a dropped one takes the place before it.
        there.scatter_reduce_(1, self.index, place.masked_fill(~self.live, 0), "amax")
        there = there.cummax(dim=1).values.to(hidden.device)
        return hidden[torch.arange(self.rows, device=hidden.device)[:, None], there]

    def finish(self) -> None:
        """Leave the state on the cache, and complete what is reported of the prompts."""
        if self.stages and self.cache is not None and int(self.cache.get_seq_length()) > 0:
            setattr(self.cache, LAYERS, LayerState(self.held + self.new, self.stages, self.mask))
        layers: dict[int, list[int]] = {}
        for one, counts in zip(self.pictures, self.counts):
            if one.row % self.prompt.repeat:
                continue
            row = self.prompt.rows[one.row // self.prompt.repeat]
            number, held = one.placed.number, 0
            row.pictures[number] = dataclasses.replace(
                row.pictures[number],
                kept=len(one.columns) + len(one.others),
                indices=one.index.sort().values,
                merged=row.pictures[number].merged or one.merged,
            )
            total = layers.setdefault(one.row, [0] * self.door.depth)
            for layer in range(self.door.depth):
                held = counts.get(layer, held)
                total[layer] += held
            row.layers = tuple(total)


@dataclass(frozen=True)
class _Span:
    """A picture's places as `rewriting.compact` wants them."""

    row: int
    columns: Tensor
    left: Tensor

    def stays(self) -> Tensor:
        """Indices into `columns`."""
        return self.left

    @classmethod
    def of(cls, row: int, columns: Tensor, stays: Tensor) -> _Span:
        """columns, stays (bool): [n], in any order."""
        order = columns.argsort()
        return cls(row, columns[order], stays[order].nonzero().flatten())


def merged(hidden: Tensor, row: int, columns: Tensor, kept: Tensor, merge: Tensor) -> Tensor:
    """Hidden states with the kept tokens of a picture replaced by the mean of what joins them. [B, M, D]

    columns: [n]; kept: [K]; merge: [n] which kept place each token joins, -1: none. Gradients reach every token.
    """
    columns, kept, merge = (one.to(hidden.device) for one in (columns, kept, merge))
    joins = (merge >= 0).nonzero().flatten()
    states = hidden[row, columns[joins]].float()
    total = states.new_zeros(len(kept), states.shape[-1]).index_add(0, merge[joins], states)
    count = torch.bincount(merge[joins], minlength=len(kept)).clamp(min=1)[:, None]
    place = columns[kept]
    return hidden.index_put((torch.full_like(place, row), place), (total / count).to(hidden.dtype))


# --- tokens after the prompt ----------------------------------------------------------------------------------------


class Later:
    """One forward over tokens that follow prompts a cache holds: decoding, or a further turn of text."""

    def __init__(self, door: LayersDoor, decoder: Any, state: LayerState, kwargs: dict[str, Any]) -> None:
        self.door, self.state, self.cache = door, state, kwargs["past_key_values"]
        embeds = kwargs["inputs_embeds"]
        self.rows, self.new = embeds.shape[:2]
        filled = len(state.stages[0].columns)
        if filled != self.rows:
            raise ValueError(f"{self.rows} rows for a cache that was filled with {filled}")
        self.held = self.cache.get_seq_length()
        if isinstance(self.held, Tensor):
            self.held = self.held.clone()  # a static cache counts on in place
        elif self.held < state.seen:
            raise ValueError(
                f"the cache holds {self.held} columns, fewer than the {state.seen} of the pruned prompt: "
                "cropping into a pruned prompt is not supported, start a fresh cache"
            )
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (self.held + torch.arange(self.new, device=embeds.device))[None]
        self.positions = positions.expand(*positions.shape[:-2], self.rows, self.new)
        self.rotary = _Rotary(door, decoder)
        self.memo: dict[Any, Any] = {}

    def enter(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The mask for what the layer holds, and its positions."""
        stage = self.state.stage(number)
        if stage is None or number in self.door.linear:
            return hidden, kwargs
        mask = kwargs.get("attention_mask")
        now, window = sizes(self.cache, self.new, number), window_of(self.door.config, number)
        key = (stage.first, mask is None, now, window)
        if key not in self.memo:
            implementation = self.door.config._attn_implementation or "eager"
            self.memo[key] = later_mask(
                mask, self.state, stage, self.held, self.new, now, window, implementation, hidden.dtype
            )
        kwargs["attention_mask"] = self.memo[key]
        if stage.shift is not None:
            if ("positions", stage.first) not in self.memo:
                moved = self.positions - stage.shift.view(-1, 1).to(self.positions.device)
                self.memo["positions", stage.first] = moved
            positions = self.memo["positions", stage.first]
            kwargs["position_embeddings"] = self.rotary.at(stage.first, positions, number, hidden)
            if kwargs.get("position_ids") is not None and positions.ndim == 2:
                kwargs["position_ids"] = positions
        return hidden, kwargs
