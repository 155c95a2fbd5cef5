"""The language model's decoder as data: what every layer multiplies and keeps, read from a config alone.

Layers of one decoder may differ: sliding windows, experts beside dense layers, linear attention beside softmax
attention. Conventions are those of `vlmfast.cost`: 2 x multiply-adds of every matrix product that runs in eager or
SDPA, softmax, norms and element-wise work free.

- A sliding window saves nothing in the prefill, where the full square is computed and masked; it bounds the cache, and
  with it what a decoded token attends to.
- Experts: those that a token is routed to, the router and the shared expert with its gate.
- Gated delta rule (Qwen3.5's linear layers): the products of transformers' chunked form, padded to whole chunks. Its
  two triangular solves (64 x 64 a chunk and head) are no matrix products and are not counted; decoding is
  element-wise but for the projections. Kernels of other packages may multiply differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from vlmfast.towers import Picture, Tower, Vision

CHUNK = 64  # tokens in a chunk of the delta rule


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the visual tokens of a prompt go through in a decoder layer with attention, beside keys and values.

    queries: the query projection and the attention itself. output: the output projection, with a gate where there is
    one. feed_forward: the feed-forward net.
    """

    queries: bool = True
    output: bool = True
    feed_forward: bool = True


WHOLE = Parts()


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Softmax attention. query, key: widths of all query heads and of all key heads together (values are as wide).

    gated: the query projection gives a gate for the output as well. window: None, or the tokens a query sees. heads:
    query heads.
    """

    query: int
    key: int
    gated: bool = False
    window: int | None = None
    heads: int = 1

    def flops(self, width: int, queries: float, keys: float, visual: float = 0, parts: Parts = WHOLE) -> Any:
        """q, k, v, o projections, q k^T and its product with v. visual: of the queries, those that skip parts."""
        if self.window is not None:  # the cache holds window - 1 tokens besides the new ones
            keys = min(keys, self.window - 1 + queries)
        asking = queries - (0 if parts.queries else visual)
        leaving = queries - (0 if parts.output else visual)
        projected = max(asking, leaving) if self.gated else asking  # the gate comes out of the query projection
        projections = (2 if self.gated else 1) * projected + leaving
        return 2 * width * (self.query * projections + 2 * self.key * queries) + 4 * self.query * asking * keys

    def cached(self, tokens: float, itemsize: int) -> Any:
        """Keys and values."""
        held = tokens if self.window is None else min(tokens, self.window - 1)
        return 2 * self.key * itemsize * held


@dataclass(frozen=True, kw_only=True)
class DeltaRule:
    """Linear attention by the gated delta rule: heads and head widths of keys and values, width of the convolution."""

    key_heads: int
    value_heads: int
    key: int
    value: int
    kernel: int

    @property
    def channels(self) -> int:
        """Width of q, k and v together, which is what the convolution runs over."""
        return 2 * self.key_heads * self.key + self.value_heads * self.value

    def flops(self, width: int, queries: float, keys: float) -> Any:
        """Projections (q, k, v; gate; two numbers a head; output), convolution, and the products of every chunk.

        A chunk of C tokens multiplies, per head: k k^T and q k^T [C, C, dk]; the state [C, dk, dv] three times (what
        it predicts, what it answers, what is added to it); the chunk's own attention [C, C, dv].
        """
        values = self.value_heads * self.value
        linear = 2 * width * (self.channels + 2 * values + 2 * self.value_heads) * queries
        if queries == 1 and keys > 1:  # a step of decoding: 2 positions of the convolution, the rest is element-wise
            return linear + 2 * 2 * self.channels * self.kernel
        convolution = 2 * (queries + self.kernel - 1) * self.channels * self.kernel
        chunk = 2 * CHUNK * CHUNK * self.key + 3 * CHUNK * self.key * self.value + CHUNK * CHUNK * self.value
        return linear + convolution + 2 * self.value_heads * ceil(queries / CHUNK) * chunk

    def cached(self, tokens: float, itemsize: int) -> Any:
        """The state, kept in fp32, and the convolution's last inputs: the same for any number of tokens."""
        return 4 * self.value_heads * self.key * self.value + itemsize * self.channels * self.kernel


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer.

    width: of the hidden states. ff: width of the gated feed-forward net that a token passes, its experts together.
    router: numbers that the router (and the shared expert's gate) gives, 0 without experts.
    """

    width: int
    mixer: Attention | DeltaRule
    ff: int
    router: int = 0

    def flops(self, queries: float, keys: float, visual: float = 0, parts: Parts = WHOLE) -> Any:
        """X2 of `queries` new tokens that attend to `keys` tokens, themselves included.

        visual: of the queries, those that go through some `parts` of the layer alone. Raises NotImplementedError for a
        layer without attention whose parts shall be skipped.
        """
        fed = queries - (0 if parts.feed_forward else visual)
        feed_forward = 2 * self.width * (3 * self.ff + self.router) * fed
        if parts == WHOLE:
            return self.mixer.flops(self.width, queries, keys) + feed_forward
        if not isinstance(self.mixer, Attention):
            raise NotImplementedError("a layer of linear attention holds one state of all tokens: none skips it")
        return self.mixer.flops(self.width, queries, keys, visual, parts) + feed_forward

    def statistic(self, rows: float, keys: float, apart: bool = False) -> Any:
        """X2 of `rows` rows of q k^T over `keys` tokens, all heads. apart: their projections run for it alone, too.

        Raises NotImplementedError for a layer without an attention map.
        """
        if not isinstance(self.mixer, Attention):
            raise NotImplementedError("a layer of linear attention has no attention map to take statistics of")
        projections = 2 * self.width * (self.mixer.query * rows + self.mixer.key * keys) if apart else 0
        return projections + 2 * self.mixer.query * rows * keys


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder: its layers, the width of its hidden states, and the size of the vocabulary."""

    layers: tuple[Layer, ...]
    width: int
    vocabulary: int

    @property
    def head(self) -> int:
        """X2 of the output head on one position."""
        return 2 * self.width * self.vocabulary

    def token(self, keys: float) -> Any:
        """X2 of one token that attends to `keys` tokens, itself included, with its logits."""
        return self.head + sum(layer.flops(1, keys) for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a method's own products depend on, beside the picture: the model by its sizes.

    tower: the vision tower; vision: what it does to the picture. projects: the projector works token by token. whole:
    the picture before any method, None: not known to be another one.
    """

    decoder: Decoder
    tower: Tower
    vision: Vision
    projects: bool
    whole: Picture | None = None


def decoder(config: Any) -> Decoder:
    """The decoder of a config. NotImplementedError for a text model whose count is not verified."""
    text = config.get_text_config()
    if text.model_type not in FEED_FORWARD:
        raise NotImplementedError(
            f"no cost model for the text model {text.model_type!r}; there is one for {', '.join(FEED_FORWARD)}"
        )
    feed_forward, gated = FEED_FORWARD[text.model_type], text.model_type.startswith("qwen3_5")
    layers = tuple(
        Layer(width=text.hidden_size, mixer=_mixer(text, index, gated), **feed_forward(text, index))
        for index in range(text.num_hidden_layers)
    )
    return Decoder(layers=layers, width=text.hidden_size, vocabulary=text.vocab_size)


def _mixer(text: Any, index: int, gated: bool) -> Attention | DeltaRule:
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or [("sliding" if window else "full") + "_attention"] * (index + 1)
    kind = kinds[index]
    if kind == "linear_attention":
        return DeltaRule(
            key_heads=text.linear_num_key_heads,
            value_heads=text.linear_num_value_heads,
            key=text.linear_key_head_dim,
            value=text.linear_value_head_dim,
            kernel=text.linear_conv_kernel_dim,
        )
    if kind not in ("full_attention", "sliding_attention"):
        raise NotImplementedError(f"no cost model for the {kind} layers of {text.model_type}")
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Attention(
        query=heads * head_width,
        key=(text.num_key_value_heads or heads) * head_width,
        gated=gated,
        window=window if kind == "sliding_attention" else None,
        heads=heads,
    )


def _dense(text: Any, index: int) -> dict[str, int]:
    return {"ff": text.intermediate_size}


def _experts(text: Any, index: int) -> dict[str, int]:
    """Experts in every `decoder_sparse_step`-th layer but those named as dense."""
    if index in text.mlp_only_layers or (index + 1) % text.decoder_sparse_step or not text.num_experts:
        return _dense(text, index)
    return {"ff": text.num_experts_per_tok * text.moe_intermediate_size, "router": text.num_experts}


def _shared_expert(text: Any, index: int) -> dict[str, int]:
    """Experts and one that every token passes, with a gate of one number."""
    routed = text.num_experts_per_tok * text.moe_intermediate_size
    return {"ff": routed + text.shared_expert_intermediate_size, "router": text.num_experts + 1}


# Text models whose count equals torch's counter (tests/test_decoders.py), and their feed-forward nets by layer.
FEED_FORWARD: Mapping[str, Callable[[Any, int], dict[str, int]]] = {
    "llama": _dense,
    "mistral": _dense,
    "ministral": _dense,
    "ministral3": _dense,
    "qwen2": _dense,
    "qwen2_vl_text": _dense,
    "qwen2_5_vl_text": _dense,
    "qwen3": _dense,
    "qwen3_moe": _experts,
    "qwen3_vl_text": _dense,
    "qwen3_vl_moe_text": _experts,
    "qwen3_5_text": _dense,
    "qwen3_5_moe_text": _shared_expert,
    "gemma": _dense,
    "gemma2": _dense,
    "gemma3_text": _dense,
}
