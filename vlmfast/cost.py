"""Analytic cost of one prompt from a Hugging Face config alone: FLOPs and bytes of the key-value cache.

A figure without its convention means nothing (published "TFLOPs" of the same run differ by a factor of 2.6), so:

X2   2 x multiply-adds of every matrix product that really runs; grouped-query attention counted with its true key
     and value width; attention as the full n x n product, also where it is causal (eager and SDPA on most devices
     compute, or are counted as, the full square); element-wise work, norms, softmax and embeddings are not counted.
     Equals `torch.utils.flop_counter.FlopCounterMode` on an eager model to the last unit (tests/test_cost.py; under
     CPU SDPA that counter sees no attention at all). Everything in this module that does not say otherwise is X2.
F2m  per layer 4 n d^2 + 2 n^2 d + 2 n d m: multiply-adds, feed-forward net counted with 2 matrices, GQA ignored
     (FastV, arXiv:2403.06764, eq. 5; also DivPrune's script). Undercounts gated nets, which have 3.
F3m  the same with 3 n d m (PyramidDrop, arXiv:2410.17247; SparseVLM, arXiv:2410.04417). X2 = 2 x F3m without GQA.

d width, m feed-forward width, n tokens of a layer. F2m and F3m exist for the language model's prefill only, as in the
papers; they leave out tower, projector, head and the selection itself, which X2 includes.

Decoders are counted layer by layer (vlmfast.decoders), and what methods multiply themselves, similarities between
tokens included, as they tell it (`Adapter.selection_flops`): where that depends on the picture's content it is an
estimate, and all of it below a thousandth of the total at 7 B but for PyramidDrop, which projects keys twice.

The towers are counted as transformers runs them: its CLIP tower computes **all** layers even where the features are
taken from an earlier one (`vision_feature_layer=-2`), and Qwen2.5-VL's window layers attend within the real windows of
the image's grid, the smaller ones at its border included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmfast.decoders import WHOLE, Parts, decoder
from vlmfast.families import family_of
from vlmfast.towers import Grid, Vision, pair
from vlmfast.visual import Score

CONVENTION = (
    "X2: 2 x multiply-adds, GQA aware, full attention, head on the last position, tower and selection included"
)
CONVENTIONS = {
    "X2": "2 x multiply-adds, GQA aware, gated feed-forward net, full n^2 attention",
    "F2m": "multiply-adds, 2-matrix feed-forward net, GQA ignored (FastV eq. 5, DivPrune)",
    "F3m": "multiply-adds, 3-matrix feed-forward net, GQA ignored (PyramidDrop, SparseVLM)",
}
NOMINAL_GRID = (1, 72, 72)  # patches (t, h, w) assumed for a model that takes any image size: 1008 x 1008 pixels of 14

# For how many rows of the attention map a statistic recomputes q k^T; None: all of them.
SCORE_ROWS = {"cls_row": 1, "last_row": 1, "column_mean": None, "row_mean": None}
SCORE_ROWS |= {"key": 0, "hidden": 0, "cls_hidden": 0}  # no attention


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs (X2) and cache bytes of one prompt.

    tower      vision tower with its patch embedding, all layers that run
    projector  projector or patch merger
    selection  what methods multiply themselves: statistics taken in the tower or a decoder layer, similarities
    prefill    decoder layers over the prompt
    head       output head on the prompt's last position
    decode     all further generated tokens, decoder layers and head
    kv_bytes   key-value cache after the prompt
    """

    tower: int
    projector: int
    selection: int
    prefill: int
    head: int
    decode: int
    kv_bytes: int

    @property
    def total_prefill(self) -> int:
        """Everything until the first token: tower, projector, selection, prefill, head."""
        return self.tower + self.projector + self.selection + self.prefill + self.head

    @property
    def total(self) -> int:
        """Everything including the decoding."""
        return self.total_prefill + self.decode


def prompt_cost(
    config: Any,
    *,
    text: int,
    images: Sequence[Grid] = (),
    videos: Sequence[bool] | None = None,
    kept: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    generated: int = 0,
    scores: Sequence[Score] = (),
    selection: int = 0,
    visual_per_layer: Sequence[int] | None = None,
    parts: Mapping[int, Parts] | None = None,
    kv_dtype: torch.dtype = torch.float16,
) -> Cost:
    """Cost of one prompt (batch of one, no padding) on a model with this config.

    config            Hugging Face config of a supported family
    text              tokens of the prompt that are not visual (the template's included)
    images            patch grid (t, h, w) of every picture **before** merging: t counts views, crops or frames, for
                      LLaVA (1, size / patch, size / patch)
    videos            whether each picture is a video, for families whose videos go another way through the projector
                      (`Source.vision`); None: none of them
    kept              visual tokens kept of every picture; None: all of them (the unpatched model)
    tokens            placeholders of every picture in the unpatched prompt, newlines included; None: by its grid
    generated         tokens to generate; the first one comes out of the prefill, the others are decode steps with a
                      cache that grows by one each
    scores            statistics taken in the tower (for every picture)
    selection         FLOPs of the methods' own products elsewhere (`Adapter.selection_flops`), for all pictures
    visual_per_layer  visual tokens of the whole prompt in every decoder layer, where layers hold different numbers;
                      None: sum(kept) in all of them
    parts             by decoder layer, what the prompt's visual tokens go through there; all others: everything
    kv_dtype          number type of the cache

    Raises NotImplementedError for an unknown family, ValueError for numbers that cannot be.
    """
    text_model = decoder(config)
    layers = text_model.layers
    kinds = [False] * len(images) if videos is None else list(videos)
    if len(kinds) != len(images):
        raise ValueError(f"videos must tell of every picture: {len(images)} pictures, {len(kinds)} answers")
    seen = [vision(config, grid, video) for grid, video in zip(images, kinds)]
    everything = [image.tokens for image in seen] if tokens is None else list(tokens)
    if len(everything) != len(seen):
        raise ValueError(f"tokens must give one number per image: {len(seen)} images, {len(everything)} numbers")
    kept = everything if kept is None else list(kept)
    if len(kept) != len(seen):
        raise ValueError(f"kept must give one number per image: {len(seen)} images, {len(kept)} numbers")
    for number, available in zip(kept, everything):
        if not 0 <= number <= available:
            raise ValueError(f"kept must lie between 0 and an image's {available} visual tokens, got {number}")
    for name, value in (("text", text), ("generated", generated)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if visual_per_layer is None:
        visual_per_layer = [sum(kept)] * len(layers)
    if len(visual_per_layer) != len(layers):
        raise ValueError(
            f"visual_per_layer must give one number for each of the {len(layers)} decoder layers, "
            f"got {len(visual_per_layer)}"
        )
    lengths = [text + visual for visual in visual_per_layer]
    head = text_model.head
    decode = sum(
        head + sum(layer.flops(1, length + step) for layer, length in zip(layers, lengths))
        for step in range(1, generated)
    )
    return Cost(
        tower=sum(image.tower for image in seen),
        projector=sum(image.projector for image in seen),
        selection=selection + sum(_score(config, image, score) for image in seen for score in scores),
        prefill=sum(
            layer.flops(length, length, visual, (parts or {}).get(number, WHOLE))
            for number, (layer, length, visual) in enumerate(zip(layers, lengths, visual_per_layer))
        ),
        head=head,
        decode=decode,
        kv_bytes=sum(layer.mixer.cached(length, kv_dtype.itemsize) for layer, length in zip(layers, lengths)),
    )


def visual_tokens(config: Any, grid: Grid, video: bool = False) -> int:
    """Visual tokens that a picture of this patch grid (t, h, w before merging) takes up in the unpatched prompt."""
    return vision(config, grid, video).tokens


def nominal_grid(config: Any) -> Grid:
    """The patch grid of the model's own image size, or `NOMINAL_GRID` for a family that takes any image size."""
    size = getattr(config.vision_config, "image_size", None)
    if size is None:
        return NOMINAL_GRID
    height, width = (
        side // patch for side, patch in zip(pair(size), pair(config.vision_config.patch_size), strict=True)
    )
    return (1, height, width)


def prefill_flops(config: Any, tokens: float | Sequence[float], convention: str = "X2") -> float:
    """FLOPs of the decoder layers over a prompt, under a named convention (see the module's docstring).

    tokens: the prompt's length, or its length in every decoder layer. Lengths may be means, hence not whole numbers.
    """
    layers = decoder(config).layers
    lengths = _lengths(tokens, len(layers))
    if convention == "X2":
        return sum(layer.flops(n, n) for layer, n in zip(layers, lengths))
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}; there are {', '.join(CONVENTIONS)}")
    matrices = 2 if convention == "F2m" else 3
    return sum(
        4 * n * layer.width**2 + 2 * n * n * layer.width + matrices * n * layer.width * layer.ff
        for layer, n in zip(layers, lengths)
    )


def kv_bytes(config: Any, tokens: float | Sequence[float], dtype: torch.dtype = torch.float16) -> float:
    """Bytes of the key-value cache for a number of tokens, or for the number in every decoder layer."""
    layers = decoder(config).layers
    lengths = _lengths(tokens, len(layers))
    return sum(layer.mixer.cached(n, dtype.itemsize) for layer, n in zip(layers, lengths))


def _lengths(tokens: float | Sequence[float], layers: int) -> Sequence[float]:
    """The prompt's length in every decoder layer."""
    lengths = [tokens] * layers if isinstance(tokens, (int, float)) else tokens
    if len(lengths) != layers:
        raise ValueError(f"tokens must give a length for each of the {layers} layers, got {len(lengths)}")
    return lengths


def _score(config: Any, image: Vision, score: Score) -> int:
    """X2 of one statistic on one image: q k^T again, of one row or of all rows of every span; softmax is free.

    Vectors (keys, outputs of a block) are there anyway and cost nothing.
    """
    if score.kind not in SCORE_ROWS:
        raise ValueError(f"unknown statistic {score.kind!r}; there are {', '.join(SCORE_ROWS)}")
    depth = len(image.spans)
    if not 0 <= score.layer < depth:
        raise ValueError(f"the tower has layers 0 to {depth - 1}, got layer {score.layer}")
    rows = SCORE_ROWS[score.kind]
    without = score.patches and family_of(config).tower(config).has_cls  # the CLS query is left out
    return sum(
        2 * image.width * span * (span - without if rows is None else rows) for span in image.spans[score.layer]
    )


def vision(config: Any, grid: Grid, video: bool = False) -> Vision:
    """One picture of this patch grid on the vision side of the config's family."""
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"an image is a patch grid (t, h, w) of positive numbers, got {tuple(grid)}")
    family = family_of(config)
    if video and (source := family.sources.get("video")) is not None and source.vision is not None:
        return source.vision(config, grid)
    return family.vision(config, grid)
