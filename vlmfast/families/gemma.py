"""Gemma 3 and PaliGemma: SigLIP without CLS, image tokens that attend to later image tokens.

Gemma 3 averages squares of patches into a fixed number of tokens. In its decoder the tokens of one image (a run of
token type 1) see each other in both directions, in layers with full attention and, as far as the window reaches, in
layers with sliding windows. PaliGemma's prefix (token type 0: image and question) sees itself whole. Both models make
these masks from the token types of the prompt they get, which lose the places of dropped tokens with them: the blocks
are then the kept tokens. Windows count places of the shorter prompt, so they reach further into the text. Crops that
Gemma 3's processor takes of an image ("pan and scan") are pictures of their own.

PaliGemma counts positions from 1. PaliGemma 2 is the same family with a Gemma 2 decoder. Its later turns on a cache
are causal, unlike a fresh run over the whole conversation, as they are unpatched.
"""

from __future__ import annotations

import dataclasses
from math import isqrt
from typing import Any

from vlmfast.families.base import Family, Source
from vlmfast.families.clip import BLOCKS, merged_views, tower_flops
from vlmfast.towers import Grid, Tower, Vision


def _siglip(config: Any, merge: int) -> Tower:
    vision = config.vision_config
    if vision.model_type != "siglip_vision_model":
        raise NotImplementedError(
            f"{config.model_type} with a {vision.model_type} tower; supported: siglip_vision_model"
        )
    depth = vision.num_hidden_layers
    return Tower(
        depth=depth,
        heads=vision.num_attention_heads,
        feature_layer=depth - 1,
        full_layers=tuple(range(depth)),
        has_cls=False,
        merge=merge,
    )


def _siglip_cost(config: Any, grid: Grid, tokens: int, out: int) -> Vision:
    """SigLIP on every image and one matrix from its width to `out` for each of the tokens."""
    tower = config.vision_config
    images, h, w = grid
    spans = ((h * w,) * images,) * tower.num_hidden_layers
    return Vision(
        tower=tower_flops(tower, images, h * w, spans),
        projector=2 * tokens * tower.hidden_size * out,
        tokens=tokens,
        width=tower.hidden_size,
        spans=spans,
    )


def _pooling(config: Any) -> int:
    """Patches per side of a token of Gemma 3. Raises NotImplementedError where they do not come out even."""
    vision, tokens = config.vision_config, config.mm_tokens_per_image
    patches, side = vision.image_size // vision.patch_size, isqrt(tokens)
    if side * side != tokens or patches % side:
        raise NotImplementedError(
            f"gemma3 with {tokens} tokens for {patches} x {patches} patches; supported: a square number of tokens "
            "whose side divides that of the patches"
        )
    return patches // side


def _gemma3_tower(config: Any) -> Tower:
    return _siglip(config, _pooling(config))


def _gemma3_vision(config: Any, grid: Grid) -> Vision:
    """SigLIP, averages, and one matrix."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    if tuple(grid[1:]) != (side, side):
        raise ValueError(f"images of this gemma3 have {side} x {side} patches, got {tuple(grid)}")
    _pooling(config)
    return _siglip_cost(config, grid, grid[0] * config.mm_tokens_per_image, config.text_config.hidden_size)


def _paligemma_tower(config: Any) -> Tower:
    return _siglip(config, 1)


def _paligemma_vision(config: Any, grid: Grid) -> Vision:
    """SigLIP and one matrix."""
    return _siglip_cost(config, grid, grid[0] * grid[1] * grid[2], config.vision_config.projection_dim)


GEMMA3 = Family(
    name="gemma3",
    blocks=BLOCKS,
    attention="self_attn",
    positions="compact",
    mrope=False,
    tower=_gemma3_tower,
    vision=_gemma3_vision,
    sources={"image": Source(layout=merged_views, container="tensor")},
    sees_ahead=True,
)

PALIGEMMA = dataclasses.replace(
    GEMMA3, name="paligemma", tower=_paligemma_tower, vision=_paligemma_vision, first_position=1
)

FAMILIES = (GEMMA3, PALIGEMMA)
