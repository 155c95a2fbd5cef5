"""Attention sinks: tokens that draw attention without meaning much, and the few huge dimensions that mark them.

Massive dimensions: "Massive Activations in Large Language Models" (arXiv:2402.17762). Visual sinks by them: "See What
You Are Told: Visual Attention Sink in Large Multimodal Models" (arXiv:2503.03321):

    phi(x) = max_{d in dims} | x_d / sqrt(mean(x^2) + 1e-6) |,   x [D] the input of a decoder layer, in fp32, no gain

is above tau for a sink. phi is at most sqrt(D). The sink metric: "When Attention Sink Emerges in Language Models"
(arXiv:2410.10781).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.adapter import ATTENTION, Adapter
from vlmfast.edits import Call, EditsDoor
from vlmfast.edits.engine import column_sums
from vlmfast.layers.tokens import Placed
from vlmfast.patching import Patch, install, unwrap

EPS = 1e-6
TAU = 20.0  # the paper's threshold
EPSILON = 0.3  # of the sink metric, its paper's
MOST = 8  # massive dimensions of one token, at most
DROP = 2.0  # the last massive dimension is at least this many times the next one (seen: 3 to 4 times)
FAR = 100.0  # and this many times the median


# --- dimensions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """The sink dimensions of a language model that was looked at before.

    text: model types of its config; width, depth, feed_forward: its sizes; vocabulary: where these leave a doubt.
    """

    dims: tuple[int, ...]
    source: str
    text: tuple[str, ...]
    width: int
    depth: int
    feed_forward: int
    vocabulary: tuple[int, ...] = ()

    def fits(self, text: Any) -> bool:
        """Whether a text model's config is of this kind."""
        sizes = text.hidden_size, text.num_hidden_layers, getattr(text, "intermediate_size", None)
        return (
            text.model_type in self.text
            and sizes == (self.width, self.depth, self.feed_forward)
            and (not self.vocabulary or text.vocab_size in self.vocabulary)
        )


_CODE = "src/logic/constants.py of seilk/VisAttnSink (98e62d6)"
_PAPER = "arXiv:2503.03321"
_OTHERS = "tables in others' code, not verified"

# What a config can tell: a model of the same sizes that was trained from scratch has other dimensions (LLaMA-1 would
# pass for LLaMA-2).
KNOWN = (
    Known((1415, 2533), f"LLaMA-2-7B, {_CODE}", ("llama",), 4096, 32, 11008),
    Known((2100, 4743), f"LLaMA-2-13B, {_CODE}", ("llama",), 5120, 40, 13824),
    Known((458, 2570), f"Qwen2-VL-7B, {_PAPER}", ("qwen2_vl_text",), 3584, 28, 18944),
    Known((3584,), f"InternVL2-8B, {_PAPER}", ("llama", "internlm2"), 4096, 32, 14336, (92544, 92553)),
    Known((458, 2570), f"Qwen2.5-VL-7B, {_OTHERS}", ("qwen2_5_vl_text",), 3584, 28, 18944),
    Known((318, 1819, 1874), f"Qwen2.5-VL-3B, {_OTHERS}", ("qwen2_5_vl_text",), 2048, 36, 11008),
    Known((3094, 4675), f"Qwen2.5-VL-32B, {_OTHERS}", ("qwen2_5_vl_text",), 5120, 64, 27648),
    Known((534, 940, 1073), f"Qwen2-VL-2B, {_OTHERS}", ("qwen2_vl_text",), 1536, 28, 8960),
    Known((1401, 1793, 1999), f"Qwen3-VL-2B, {_OTHERS}", ("qwen3_vl_text",), 2048, 28, 6144),
    Known((0,), f"Qwen3-VL-4B, {_OTHERS}", ("qwen3_vl_text",), 2560, 36, 9728),
    Known((1838,), f"Qwen3-VL-8B, {_OTHERS}", ("qwen3_vl_text",), 4096, 36, 12288),
    Known((13, 35), f"InternVL3.5-1B, {_OTHERS}", ("qwen3",), 1024, 28, 3072),
    Known((0, 4, 396), f"InternVL3.5-4B, {_OTHERS}", ("qwen3",), 2560, 36, 9728),
    Known((233, 2276), f"InternVL3.5-8B, {_OTHERS}", ("qwen3",), 4096, 36, 12288),
    Known((731,), f"InternVL3.5-38B, {_OTHERS}", ("qwen3",), 5120, 64, 25600),
)


def known(config: Any) -> Known | None:
    """The listed dimensions of a model's language model, by its config; None where none are listed."""
    text = config.get_text_config()
    return next((one for one in KNOWN if one.fits(text)), None)


def parsed(dims: str | int | Sequence[int], width: int | None = None) -> tuple[int, ...]:
    """Dimensions given as numbers or joined by slashes ("1415/2533"), ascending, each once.

    Raises ValueError for anything else, and for those that hidden states of this width do not have.
    """
    parts: Sequence[Any] = str(dims).split("/") if isinstance(dims, (str, int)) else dims
    try:
        found = tuple(sorted({int(part) for part in parts}))
    except (TypeError, ValueError):
        found = ()
    if not found or found[0] < 0 or isinstance(dims, bool):
        raise ValueError(f"dims={dims!r}: dimensions of the hidden states, joined by slashes, such as 1415/2533")
    if width is not None and found[-1] >= width:
        raise ValueError(f"dims={dims!r}: the hidden states have dimensions 0 to {width - 1}")
    return found


def spelled(dims: Sequence[int]) -> str:
    """Dimensions as a setting: "1415/2533"."""
    return "/".join(map(str, dims))


def magnitudes(hidden: Tensor) -> Tensor:
    """|x| over the token's root mean square, fp32. [..., D] -> [..., D]"""
    hidden = hidden.float()
    return (hidden * (hidden.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()).abs()


def sizes(hidden: Tensor, dims: Sequence[int] | Tensor) -> Tensor:
    """phi: the largest magnitude among the sink dimensions. [B, Q, D] -> [B, Q], fp32

    dims: numbers; or bool [B, D], which dimensions count for each prompt (none: phi is 0).
    """
    if isinstance(dims, Tensor):
        return (magnitudes(hidden) * dims[:, None]).amax(dim=-1)
    hidden = hidden.float()
    scale = (hidden.square().mean(dim=-1) + EPS).rsqrt()
    picked: Tensor = hidden[..., list(dims)].abs().amax(dim=-1) * scale
    return picked


def massive(token: Tensor) -> Tensor:
    """The massive dimensions of a token, those far above all others; usually none, or two or three. bool [..., D]

    token: [..., D] hidden state, of a prompt's first token, which is the sink of every model that has one. Dimensions
    in descending order of magnitude are cut at the largest drop among the first few: it must be a factor of 2 or more,
    and what lies before it 100 times the median or more.
    """
    found = magnitudes(token)
    width = found.shape[-1]
    largest, order = found.topk(min(MOST + 1, width), dim=-1)
    drops, last = (largest[..., :-1] / largest[..., 1:].clamp(min=EPS)).max(dim=-1, keepdim=True)
    least = largest.gather(-1, last)
    there = (drops >= DROP) & (least >= FAR * found.median(dim=-1, keepdim=True).values)
    return there & (found >= least)


# --- what find_sinks tells -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SinkToken:
    """A sink of one layer.

    row, column: where it stands in input_ids. kind: "text" or "image" (any visual token). size: its phi. share: of
    the attention of the text behind the picture, mean over rows and heads.
    """

    row: int
    column: int
    kind: str
    size: float
    share: float


@dataclass(frozen=True)
class LayerSinks:
    """One decoder layer.

    The four shares sum to 1: where the text behind the picture looks (all text of prompts without one), mean over
    rows, heads and prompts. largest: |x| of each sink dimension, the largest of all tokens, as it enters the layer.
    """

    layer: int
    tokens: tuple[SinkToken, ...]
    text_sinks: float
    image_sinks: float
    image: float
    text: float
    largest: tuple[float, ...]

    def count(self, kind: str) -> int:
        """How many sinks are of a kind."""
        return sum(token.kind == kind for token in self.tokens)


@dataclass(frozen=True, eq=False)
class Sinks:
    """The attention sinks of a batch of prompts, layer by layer; `print` shows a table.

    dims: sink dimensions; source: where they are from. tau: threshold of phi. layers: those that attend, ascending, of
    `depth`. metric: [B, L] fp32, share of layers and heads whose mean attention on a token is above epsilon (see
    `find_sinks`); first: each prompt's first token, a column of it.
    """

    dims: tuple[int, ...]
    source: str
    tau: float
    epsilon: float
    depth: int
    layers: tuple[LayerSinks, ...]
    metric: Tensor = field(repr=False)
    first: tuple[int, ...]

    @property
    def setting(self) -> str:
        """The dimensions as methods take them, such as "1415/2533"; empty where there are none."""
        return spelled(self.dims)

    @property
    def tokens(self) -> dict[tuple[int, int], str]:
        """(row, column) of every token that is a sink in some layer -> its kind, ascending."""
        found = {(token.row, token.column): token.kind for layer in self.layers for token in layer.tokens}
        return dict(sorted(found.items()))

    @property
    def first_metric(self) -> float:
        """The metric of the first token, mean over the prompts."""
        return float(torch.stack([row[column] for row, column in zip(self.metric, self.first)]).mean())

    def __str__(self) -> str:
        kinds = list(self.tokens.values())
        text, image = kinds.count("text"), kinds.count("image")
        if self.dims:
            lines = [
                f"sink dimensions {self.setting} ({self.source})",
                f"{text} text and {image} image token(s) are sinks in some layer: phi > {self.tau:g}",
            ]
        else:
            lines = [f"no sink dimensions: {self.source}"]
        head = ["layer", "text sinks", "image sinks", "on text sinks", "on image sinks", "on image", "on text"]
        table = [[*head, *(f"|x_{dim}|" for dim in self.dims)]]
        for one in self.layers:
            counts = [str(one.layer), str(one.count("text")), str(one.count("image"))]
            shares = [f"{share:.1%}" for share in (one.text_sinks, one.image_sinks, one.image, one.text)]
            table.append([*counts, *shares, *(f"{size:.4g}" for size in one.largest)])
        widths = [max(map(len, column)) for column in zip(*table)]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in table]
        lines.append(
            f"sink metric (epsilon {self.epsilon:g}): {self.first_metric:.1%} of layers and heads at the first token"
        )
        return "\n".join(lines)


# --- finding -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch(Adapter):
    """Looks at every attention call of a decoder and changes nothing."""

    name: ClassVar[str] = "find_sinks"
    door: ClassVar[int] = ATTENTION
    needs_visual: ClassVar[bool] = True
    compares: ClassVar[bool] = False
    look: Callable[[Call], None]

    def where(self, attends: Sequence[int], depth: int) -> Sequence[int]:
        """All layers that attend."""
        return attends

    def marks(self, picture: Placed) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def attach(self, patch: Patch) -> None:
        """Stand in every layer."""
        EditsDoor.of(patch).add(self)

    def edit(self, call: Call) -> Tensor:
        """The attention as it is."""
        self.look(call)
        return call.plain()


def find_sinks(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    dims: str | int | Sequence[int] | None = None,
    tau: float = TAU,
    epsilon: float = EPSILON,
) -> Sinks:
    """Which tokens of a batch of prompts are attention sinks, by which dimensions, and how much attention they take.

    model: an unpatched one of a supported family; it is left as it was. inputs: as the processor gives them, padded on
    either side. dims: sink dimensions, as numbers or "1415/2533"; None: those listed for the model (`KNOWN`), else
    those that are massive at the prompts' first tokens in the middle layer (`massive`), at the price of a second
    forward. No attention map is made: memory grows by H * L, not by H * L^2.

    The metric beside them is that of arXiv:2410.10781, for each token k:

        Sink_k = mean over layers and heads of 1[alpha_k > epsilon],  alpha_k = mean over rows i that see k of A[i, k]

    where the rows that see k are those from k on unless a layer has a window or looks at pictures in both directions.

    Raises ValueError for wrong dims, tau, epsilon or inputs; RuntimeError for a patched model; NotImplementedError for
    unsupported families and for attention that is more than softmax(q k^T) v.
    """
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), Tensor):
        raise ValueError("find_sinks takes the model's inputs as the processor gives them, with input_ids")
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau < float("inf"):
        raise ValueError(f"tau={tau!r}: a number from 0 on, such as {TAU:g}")
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon={epsilon!r}: a share of attention, such as {EPSILON:g}")
    config = unwrap(model).config
    listed = known(config) if dims is None else None
    if dims is not None:
        chosen, source = parsed(dims, config.get_text_config().hidden_size), "given"
    elif listed is not None:
        chosen, source = listed.dims, listed.source
    else:
        chosen, source = _search(model, inputs)
    measuring = _Measuring(chosen, tau, epsilon)
    _run(model, inputs, measuring)
    return Sinks(
        chosen,
        source,
        float(tau),
        float(epsilon),
        config.get_text_config().num_hidden_layers,
        tuple(measuring.layers),
        measuring.hits / len(measuring.layers),
        tuple(measuring.first),
    )


def _run(model: Any, inputs: Mapping[str, Any], look: Callable[[Call], None]) -> None:
    """One forward of the prompts, watched."""
    with install(model, (Watch(look=look),), Watch.name), torch.no_grad():
        model(**{**inputs, "use_cache": False, "logits_to_keep": 1})


def _search(model: Any, inputs: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """The massive dimensions of the first tokens in the middle of the layers that attend. -> (dims, where)"""
    seen: dict[int, Tensor] = {}

    def look(call: Call) -> None:
        rows = torch.arange(len(call.hidden), device=call.hidden.device)
        seen[call.layer] = call.hidden[rows, call.initial]

    _run(model, inputs, look)
    layers = sorted(seen)
    middle = layers[len(layers) // 2]
    dims = tuple(massive(seen[middle]).any(dim=0).nonzero().flatten().tolist())
    where = f"the first token as it enters layer {middle}"
    return dims, f"found at {where}" if dims else f"none stands out at {where}"


class _Measuring:
    """Measures every call of one forward. hits: [B, L] on the CPU, layers' shares of heads, summed."""

    def __init__(self, dims: tuple[int, ...], tau: float, epsilon: float) -> None:
        self.dims, self.tau, self.epsilon = dims, tau, epsilon
        self.layers: list[LayerSinks] = []
        self.first: list[int] = []
        self.hits = torch.zeros(())

    def __call__(self, call: Call) -> None:
        n_key = call.key.shape[2]
        sums, _ = column_sums(call.query, call.key, call.scaling, call.seen, call.real)
        rows = call.seen.counts(call.real, n_key).clamp(min=1)  # [B, 1, L]
        self.hits = self.hits + (sums / rows > self.epsilon).float().mean(dim=1).cpu()
        self.first = call.initial.tolist()

        looking = torch.where(call.after_visual.any(1, keepdim=True), call.after_visual, call.real & ~call.visual)
        sums, _ = column_sums(call.query, call.key, call.scaling, call.seen, looking)
        share = sums.mean(dim=1) / looking.sum(dim=1, keepdim=True).clamp(min=1)  # [B, L]
        size = sizes(call.hidden, self.dims) if self.dims else torch.zeros_like(share)
        sink = (size > self.tau) & call.real if self.dims else torch.zeros_like(call.real)
        text, image = call.real & ~call.visual, call.visual
        text_sinks, image_sinks, other_image, other_text = (
            float((share * which).sum(1).mean()) for which in (text & sink, image & sink, image & ~sink, text & ~sink)
        )
        hidden = call.hidden.masked_fill(~call.real[..., None], 0)[..., list(self.dims)]
        tokens = tuple(
            SinkToken(
                row,
                column,
                "image" if image[row, column] else "text",
                float(size[row, column]),
                float(share[row, column]),
            )
            for row, column in sink.nonzero().tolist()
        )
        self.layers.append(
            LayerSinks(
                call.layer,
                tokens,
                text_sinks=text_sinks,
                image_sinks=image_sinks,
                image=other_image,
                text=other_text,
                largest=tuple(hidden.float().abs().amax(dim=(0, 1)).tolist()) if self.dims else (),
            )
        )
