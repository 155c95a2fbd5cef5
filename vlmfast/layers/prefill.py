"""A prompt with pictures on its way through the decoder layers: where tokens go, and what the layers behind get."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmfast.attention import KEYWORD
from vlmfast.layers.cache import LAYERS, LayerState, Stage, prompt_mask, sizes
from vlmfast.layers.rotary import Rotary
from vlmfast.layers.scores import Asked, LayerTaps, OwnAttention, key_norm, measure
from vlmfast.layers.tokens import Cut, LayerTokens, Placed, Prompt
from vlmfast.rewriting import compact, gather_index

if TYPE_CHECKING:
    from vlmfast.layers.door import LayersDoor


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
        device = self.embeds.device  # where everything is done; layers may be elsewhere
        self.pictures = [
            _Moving(
                one,
                one.columns.to(device),
                one.index.to(device),
                one.others.to(device),
                {cut: door.selector.left(cut, len(one.columns), door.depth) for cut in door.cuts},
            )
            for one in prompt.pictures
        ]
        self.active = any(
            left is None or left < len(one.columns) for one in self.pictures for left in one.left.values()
        )
        if not self.active:
            return
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
        self.rotary = Rotary(door, decoder)
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
        return given.to(self.embeds.device).expand(*given.shape[:-2], self.rows, self.new)

    def columns(self, number: int) -> Tensor | None:
        """Which of the first layer's columns a layer's keys stand for, -1 for padding; None: the same. [B, K]"""
        if not self.stages:
            return None
        key = ("columns", len(self.stages))
        if key not in self.memo:
            before = torch.arange(self.held, device=self.index.device).expand(self.rows, -1)
            new = (self.held + self.index).masked_fill(~self.live, -1)
            self.memo[key] = torch.cat([before, new], dim=1)
        return self.memo[key]

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
                ids = ids.expand(self.rows, -1).gather(1, self.index.to(ids.device))
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
                embeds = self.embeds[row].detach()
                visual = torch.cat([one.placed.columns for one in self.pictures if one.row == row]).to(embeds.device)
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
        if device.type == "meta":  # offloaded: where the layer runs is known when something of it has run
            device = layer.input_layernorm(hidden[:, :0]).device
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
            final_norm=self._normed,
            ordered=self.door.positions == "compact" and self.positions.ndim == 2,
            memory=one.memory,
        )
        return self.door.selector.cut(tokens)

    def _normed(self, hidden: Tensor) -> Tensor:
        """The norm behind the decoder's last layer, which may be on another device."""
        normed: Tensor = self.decoder.norm(hidden)
        return normed.to(hidden.device)

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
