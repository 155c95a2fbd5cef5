"""Composite attention: decoder layers in which the visual tokens of a prompt do not attend to each other.

Text attends as ever, to all keys that it sees. A visual token is moved on by what it carries itself, in one of three
ways (`UPDATES`), and what it does not need is not computed:

             query projection, scores   output projection   feed-forward net
    "self"   -                          of its own value    x                  softmax over one key is 1
    "ffn"    -                          -                   x
    "none"   -                          -                   -                  leaves the layer as it came

Keys and values are made for all tokens, so that the cache, decoding and every other layer know nothing of it. A query
projection that gives a gate for the attention's output as well (Qwen3.5) runs for all tokens in "self".

How: on the layer's own modules. Projections and the feed-forward net get the tokens that need them, one behind the
other, and zeros stand where the others would be; a norm of zeros is zero, so that the residual stream of a token that
skips a part stays as it is. The attention gets text queries alone, padded to the most that a row of the batch has,
with a mask of their own [B, 1, T, K]; nothing of size [Q, Q] is made. Padding skips what visual tokens skip. Prompts
without visual tokens, and generated tokens, go through the layers untouched. A prompt that ends with a picture is
answered by a visual token, which has seen nothing of the rest in these layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.attention import EDIT
from vlmfast.decoders import WHOLE, Parts, decoder
from vlmfast.edits import Call, EditsDoor
from vlmfast.edits.turn import Turn
from vlmfast.families import Family
from vlmfast.layers.tokens import Placed
from vlmfast.modality import beside_the_prompts
from vlmfast.patching import Patch

UPDATES: Mapping[str, Parts] = {
    "self": Parts(queries=False),
    "ffn": Parts(queries=False, output=False),
    "none": Parts(queries=False, output=False, feed_forward=False),
}
MEANING = {
    "self": "each sees itself alone",
    "ffn": "they pass the feed-forward net alone",
    "none": "they leave each layer as they came",
}


def checked(update: str) -> str:
    """A way to move visual tokens on. Raises ValueError for another word."""
    if update not in UPDATES:
        raise ValueError(f"visual_update={update!r}: choose {', '.join(map(repr, UPDATES))}")
    return update


def contradicts(family: Family) -> str | None:
    """Why composite attention does not work on a family; None where it does."""
    if family.sees_ahead:
        return "the tokens of a picture attend to each other in both directions there, which the method takes away"
    return None


@dataclass(frozen=True)
class Rows:
    """The text among the tokens that a layer gets, [B, Q] of them.

    flat: int64 [n] ascending among all B * Q. places: int64 [B, T] the same row by row, rows with fewer filled up with
    other tokens; live: bool [B, T] False for these, None: there are none.
    """

    flat: Tensor
    places: Tensor
    live: Tensor | None

    @classmethod
    def of(cls, visual: Tensor, real: Tensor) -> Rows | None:
        """From which tokens are visual and which are no padding, bool [B, Q]; None where none is visual."""
        if not bool((visual & real).any()):
            return None
        text = real & ~visual
        flat = text.flatten().nonzero().flatten()
        if len(text) == 1:
            return cls(flat, flat[None], None)
        counts = text.sum(1)
        most = int(counts.max())
        places = text.long().argsort(dim=1, descending=True, stable=True)[:, :most]
        live = torch.arange(most, device=text.device) < counts[:, None]
        return cls(flat, places, None if len(flat) == len(text) * most else live)


class Here:
    """One layer: which of its tokens are text in the forward that runs. Modules inside the layer hold it."""

    def __init__(self, door: CompositeDoor, number: int) -> None:
        self.door, self.number = door, number
        self.rows: Rows | None = None  # None: the layer runs as it is

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the layer's attention, which runs again where a checkpointed layer is recomputed."""
        turn = kwargs.get(EDIT)
        self.rows = None
        if isinstance(turn, Turn) and turn.one.prompt and self.number in self.door.active:
            self.rows = self.door.rows(turn)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook of the layer: what calls its modules from elsewhere is about other tokens."""
        self.rows = None


class Gathered:
    """Stands for the `forward` of a module that works token by token: it runs on text, others get zeros."""

    def __init__(self, here: Here, module: nn.Module) -> None:
        self.here, self.original = here, module.forward

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original. [B, Q, D] -> [B, Q, D']"""
        rows = self.here.rows
        if rows is None:
            return self.original(hidden, *args, **kwargs)
        flat = rows.flat.to(hidden.device)
        some = flat if len(flat) else flat.new_zeros(1)  # not every module takes no tokens at all
        with beside_the_prompts():  # adapters that tell visual tokens from text: all of these are text
            output = self.original(hidden.flatten(0, 1).index_select(0, some)[None], *args, **kwargs)
        found = output[0] if isinstance(output, tuple) else output
        spread = found.new_zeros(hidden.shape[0] * hidden.shape[1], found.shape[-1])
        spread = spread.index_copy_(0, flat, found[0, : len(flat)]).unflatten(0, hidden.shape[:2])
        return (spread, *output[1:]) if isinstance(output, tuple) else spread


class CompositeDoor:
    """Composite attention in some decoder layers of one patched model: an `Editor` of their attention (door 3), and
    what stands for the modules that visual tokens skip.

    layers: those that can have it; `active`: those that have it now, all from the start. update: see `UPDATES`.
    """

    needs_visual = True
    compares = False
    prompts_alone = True

    def __init__(self, patch: Patch, name: str, layers: Sequence[int], update: str) -> None:
        self.name, self.update = name, checked(update)
        self.layers = tuple(layers)
        self.active: Collection[int] = frozenset(layers)
        self.here: dict[int, Here] = {}
        self.config = patch.model.config
        edits = EditsDoor.of(patch)
        for number in self.layers:
            self._check(edits.decoder.layers[number], number)
        edits.add(self)
        for number in self.layers:
            layer, here = edits.decoder.layers[number], Here(self, number)
            patch.hook(layer.self_attn, here.enter, before=True, first=False)
            patch.hook(layer, here.leave)
            for module in self._skipped(layer):
                patch.stand_in(module, Gathered(here, module))
            self.here[number] = here
        self.attentions = {number: edits.decoder.layers[number].self_attn for number in self.layers}

    def _check(self, layer: Any, number: int) -> None:
        """Refuse layers whose parts are not apart."""
        attention = layer.self_attn
        lacking = [name for name in ("q_proj", "o_proj") if not hasattr(attention, name)]
        lacking += [] if hasattr(layer, "mlp") else ["mlp"]
        if lacking:
            raise NotImplementedError(
                f"{self.name}: {type(layer).__name__} (layer {number}) has no {' and no '.join(lacking)} of its own, "
                "so that visual tokens cannot skip it"
            )

    def _skipped(self, layer: Any) -> list[Any]:
        """The modules that run on text alone."""
        parts, attention = UPDATES[self.update], layer.self_attn
        gated = attention.q_proj.out_features != attention.o_proj.in_features  # queries, and a gate behind them
        modules = [] if gated and parts.output else [attention.q_proj]
        modules += [] if parts.output else [attention.o_proj]
        if not parts.feed_forward:  # the norm in front of it multiplies nothing, but takes its time
            modules += [getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm), layer.mlp]
        return modules

    def rows(self, turn: Turn) -> Rows | None:
        """The text among the tokens of a layer's turn, worked out once for all layers that get the same ones."""
        known, key = turn.one.known, ("composite", id(turn.columns), turn.hidden.shape[1])
        if key not in known:
            visual, real = turn.new_tokens()
            known[key] = {"rows": Rows.of(visual, real)}
            self._note(turn, visual, real)
        rows: Rows | None = known[key]["rows"]
        return rows

    def _note(self, turn: Turn, visual: Tensor, real: Tensor) -> None:
        """Note how many tokens of each row are text and visual, for the report."""
        if turn.columns is not None:
            return  # layers hold different numbers
        count, width = turn.one.memory.count, turn.door.width
        generated = 0 if width is None else count - width  # without a cache it comes again behind the prompt
        text = (real & ~visual).sum(1) - generated
        rows = " ".join(f"{a}/{b}" for a, b in torch.stack([text, (real & visual).sum(1)], 1).tolist())
        turn.door.note(self, f"{count - len(visual[0])} {rows}")

    # --- the editor --------------------------------------------------------------------------------------------

    def where(self, attends: Sequence[int], depth: int) -> Sequence[int]:
        """The layers."""
        return self.layers

    def marks(self, picture: Placed) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def remarks(self, notes: Sequence[str]) -> Sequence[str]:
        """What becomes of visual tokens there, and what that saves. notes: columns before, text/visual by row."""
        lines = [f"{self.name}: visual tokens do not attend to each other there, {MEANING[self.update]}"]
        chunks = [[[int(n) for n in row.split("/")] for row in note.split()[1:]] for note in notes]
        if chunks:
            share = self._share([[sum(numbers) for numbers in zip(*row)] for row in zip(*chunks)])
            lines += [] if share is None else [f"{self.name}: prefill of the decoder {share:.1%} of plain FLOPs (X2)"]
        return lines

    def _share(self, prompts: Sequence[Sequence[int]]) -> float | None:
        """FLOPs of the decoder's prefill over those without composite attention. prompts: text, visual each."""
        try:
            layers = decoder(self.config).layers
        except NotImplementedError:  # no cost model
            return None
        parts = dict.fromkeys(self.layers, UPDATES[self.update])
        spent = plain = 0
        for text, visual in prompts:
            length = text + visual
            plain += sum(layer.flops(length, length) for layer in layers)
            spent += sum(layer.flops(length, length, visual, parts.get(n, WHOLE)) for n, layer in enumerate(layers))
        return spent / plain

    def edit(self, call: Call) -> Tensor:
        """Text rows attend; visual ones get their own value ("self") or nothing. -> [B, H, Q, d]"""
        rows = self.here[call.layer].rows
        if rows is None:
            return call.plain()
        query, value = call.query, call.value
        (batch, heads, count, _), width = query.shape, value.shape[-1]
        if UPDATES[self.update].output:
            own = value.narrow(2, int(call.start), count).transpose(1, 2)
            out = own.repeat_interleave(heads // value.shape[1], dim=2)  # a copy: the cache stays
        else:
            out = value.new_zeros(batch, count, heads, width)
        flat = rows.flat.to(query.device)
        if len(flat):
            found = self._attend(call, rows).flatten(0, 1)
            if rows.live is not None:
                found = found[rows.live.to(found.device).flatten()]
            out.view(-1, heads, width).index_copy_(0, flat, found)
        return out.transpose(1, 2)

    def _attend(self, call: Call, rows: Rows) -> Tensor:
        """The attention of text queries. -> [B, T, H, d]"""
        places = rows.places.to(call.query.device)
        live = None if rows.live is None else rows.live.to(places.device)
        index = places[:, None, :, None].expand(-1, call.query.shape[1], -1, call.query.shape[3])
        query, mask = call.query.gather(2, index), shown(call, places, live)
        config = self.attentions[call.layer].config.vlmfast_original
        implementation = config._attn_implementation or "eager"
        if implementation == "eager" and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        if implementation in ("eager", "sdpa"):
            return call.own(query, mask)
        # Others (flash attention) take no mask of single rows.
        output = nn.functional.scaled_dot_product_attention(
            query, call.key, call.value, mask, scale=call.scaling, enable_gqa=True
        )
        return output.transpose(1, 2)


def shown(call: Call, places: Tensor, live: Tensor | None) -> Tensor:
    """What some queries of a call see, others for each row of the batch. places: [B, T] -> [B, 1 or H, T, K]

    bool (True = visible) or additive, as the call's own. live: bool [B, T] the queries that count; others see all.
    """
    seen, n_key = call.seen, call.key.shape[2]
    if seen.mask is not None:
        mask = seen.mask[..., :n_key].expand(len(places), -1, call.query.shape[2], -1)
        mask = mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, n_key))
    else:
        columns = torch.arange(n_key, device=places.device)
        mask = columns.new_ones(*places.shape, n_key, dtype=torch.bool)
        if seen.places is not None:
            own = seen.places[places][..., None]
            mask = columns <= own
            if seen.window is not None:
                mask = mask & (columns > own - seen.window)
        if seen.keys is not None:
            mask = mask & seen.keys[:, None, :n_key]
        mask = mask[:, None]
    if live is None:
        return mask
    fill = ~live[:, None, :, None]
    return mask | fill if mask.dtype == torch.bool else mask.masked_fill(fill, 0.0)
