"""Door 4, a side path: what one layer's attention would say otherwise, past all layers between it and the last one.

A method changes the map of one attention layer, for the row that decides on a token alone. What comes of it goes
through the layer's output projection, then through the feed-forward net of the last layer, the final norm and the
head: logits beside the model's own, at the price of a row, a feed-forward net and a head. The model itself goes on as
if nothing had happened.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmfast.edits import Call, EditsDoor
from vlmfast.edits.engine import masked_scores, weighted
from vlmfast.modality import beside_the_prompts
from vlmfast.patching import Patch
from vlmfast.steps import Step, StepsDoor


class Aside(Protocol):
    """What the side path needs of a method."""

    @property
    def name(self) -> str:
        """As in its spec."""
        ...

    def aside(self, shown: Tensor, text: Tensor, image: Tensor) -> Tensor:
        """The map that the side path begins with. [B, H, 1, K] after the softmax -> the same shape

        text, image: bool [B, 1, 1, K]; the prompt's first token is neither.
        """
        ...

    def combine(self, logits: Tensor, side: Tensor) -> Tensor:
        """Scores from the model's logits and those of the side path; -inf: out. [B, V] each"""
        ...


class SidePath:
    """The side path of one patched model. What a forward notes is used up by its end.

    layer: whose attention it begins with. share: of the last layer's input, which it is given besides.
    """

    def __init__(self, patch: Patch, method: Aside, layer: int, share: float) -> None:
        self.method, self.share = method, share
        edits = EditsDoor.of(patch)
        self.attention, self.last = edits.decoder.layers[layer].self_attn, edits.decoder.layers[-1]
        self.gate: Tensor | None = None  # [B, H d]
        self.context: Tensor | None = None  # [B, H d] what the output projection is to be given
        self.pictured: Tensor | None = None  # bool [B]
        what = f"compares with what the attention of layer {layer} to text alone would say"
        self.steps = StepsDoor(patch, method.name, [edits.depth - 1], self.asks, self.scores, what)
        edits.watch(method.name, layer, self)
        if self.attention.q_proj.out_features != self.attention.o_proj.in_features:  # queries, and a gate behind them
            patch.hook(self.attention.q_proj, self.after_queries)

    @property
    def active(self) -> bool:
        """Inside `generate` alone."""
        return self.steps.running

    def after_queries(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Hook of a query projection that gives the gate of the attention's output as well."""
        if self.active:
            width = self.attention.head_dim
            self.gate = output[:, -1].unflatten(-1, (-1, 2, width))[:, :, 1].flatten(1).sigmoid()

    def watch(self, call: Call) -> None:
        """The last row, as the method would have it."""
        final = call.query.shape[2] - 1
        row = torch.tensor([final], device=call.query.device)
        scores = masked_scores(call.query[:, :, final:], call.key, call.scaling, call.seen.take(row), slice(None))
        seen = scores[:, :1].isfinite()
        columns = torch.arange(scores.shape[-1], device=scores.device)
        image = seen & call.visual[:, None, None]
        text = seen & ~image & (columns != call.initial[:, None])[:, None, None]
        edited = self.method.aside(scores.softmax(-1), text, image)
        context = weighted(edited, call.value).flatten(1)
        self.context = (context if self.gate is None else context * self.gate).to(call.value.dtype)
        self.pictured = image.flatten(1).any(1)

    def asks(self, step: Step) -> Tensor:
        """From the output projection to the head. [1, B, D]"""
        context, main, last = self.context, step.hidden()[0], self.last
        self.context = self.gate = None
        assert context is not None
        with beside_the_prompts():
            beside = last.input_layernorm(self.attention.o_proj(context[:, None]).to(main.device))
            hidden = self.share * main.to(beside.device)[:, None] + beside
            return step.norm(fed_forward(last, hidden)).transpose(0, 1)

    def scores(self, logits: Tensor, others: Tensor) -> Tensor:
        """What becomes of both logits; rows without a picture keep their own. [B, V], [1, B, V] -> [B, V]"""
        pictured, self.pictured = self.pictured, None
        assert pictured is not None
        return torch.where(pictured[:, None].to(logits.device), self.method.combine(logits, others[0]), logits)


def fed_forward(layer: Any, hidden: Tensor) -> Tensor:
    """A decoder layer without its attention: hidden states through its feed-forward net, and themselves. [B, L, D]"""
    before = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
    after = getattr(layer, "post_feedforward_layernorm", None)
    output = layer.mlp(before(hidden))
    output = output[0] if isinstance(output, tuple) else output
    result: Tensor = hidden + (output if after is None else after(output))
    return result
