"""From methods to cost: what they leave of a picture in every decoder layer, and `keep` solved for a share of FLOPs.

Methods tell what they do to a picture of a given size (`Adapter.visual_per_layer`, `Adapter.selection_flops`); those
before the language model come first, those between its layers get what is left. A family tells the size of a usual
picture (`Family.nominal`); where it does not, an image has the model's own size, or 72 x 72 patches where any size is
taken, and a video 16 frames in 8 time steps of 36 x 36 patches.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from vlmfast.adapter import INPUTS, Adapter
from vlmfast.cost import Cost, nominal_grid, prompt_cost, vision, visual_tokens
from vlmfast.decoders import Parts, Sizes, decoder
from vlmfast.families import family_of
from vlmfast.towers import Picture
from vlmfast.visual import Score

NOMINAL_TEXT = 60  # text tokens of a prompt where none are given
NOMINAL_VIDEO = (8, 36, 36)  # patches (t, h, w)
TOLERANCE = 0.01  # of the share asked for


def nominal(config: Any, modality: str = "image") -> Picture:
    """A usual picture of a family. modality: "image" or "video"."""
    family = family_of(config)
    if family.nominal is not None:
        return family.nominal(config, modality)
    grid = nominal_grid(config) if modality == "image" else NOMINAL_VIDEO
    video = modality == "video"
    tokens = visual_tokens(config, grid, video)
    return Picture(patches=grid, tokens=tokens, span=tokens, frames=grid[0] if video else 1, video=video)


def picture_of(config: Any, size: tuple[int, int] | None = None, most: int | None = None) -> Picture:
    """An image of (height, width) pixels as its processor hands it over; None: a usual one.

    most: pixels that a processor of Qwen's kind leaves (`max_pixels`). ValueError for a size that cannot be,
    NotImplementedError where the size alone does not tell.
    """
    family = family_of(config)
    if size is None:
        if most is not None:
            raise ValueError("a limit of pixels is for an image of a given size")
        return nominal(config)
    if min(size) < 1:
        raise ValueError(f"an image has at least one pixel a side, got {size[0]}x{size[1]}")
    if family.tiled:
        raise NotImplementedError(f"how many tiles {family.name} cuts an image into is its processor's setting")
    if family.sized is not None:
        return family.sized(config, size, most)
    if most is not None:
        raise NotImplementedError(f"{family.name} resizes every image to the same size")
    return nominal(config)


def tower_scores(config: Any, adapters: Sequence[Adapter]) -> list[Score]:
    """The statistics that the methods take in the vision tower, each once."""
    tower = family_of(config).tower(config)
    wanted = [adapter.wanted(tower).values() for adapter in adapters if hasattr(adapter, "wanted")]
    return list(dict.fromkeys(score for scores in wanted for score in scores))


def apply(config: Any, adapters: Sequence[Adapter], picture: Picture, text: int) -> tuple[list[int], int]:
    """What the methods together leave of a picture in every decoder layer, and the FLOPs of their own products.

    text: text tokens of the prompt. A method that drops nothing does not run.
    """
    sizes = sizes_of(config, picture)
    depth = len(sizes.decoder.layers)
    layers, own = [picture.span] * depth, 0
    for adapter in sorted(adapters, key=lambda adapter: adapter.door):
        if not adapter.drops:
            own += adapter.selection_flops(picture, text, sizes)
            continue
        layers = list(adapter.visual_per_layer(picture, depth))
        if len(layers) != depth:
            raise ValueError(f"{adapter.name} tells of {len(layers)} layers, the decoder has {depth}")
        if any(held != picture.span for held in layers):
            own += adapter.selection_flops(picture, text, sizes)
        if adapter.door == INPUTS:
            picture = dataclasses.replace(picture, tokens=layers[0], span=layers[0])
    return layers, own


def sizes_of(config: Any, picture: Picture) -> Sizes:
    """What methods' own products depend on, for a picture of a config."""
    family = family_of(config)
    return Sizes(
        decoder=decoder(config),
        tower=family.tower(config),
        vision=vision(config, picture.patches, picture.video),
        projects=family.projector is not None,
        whole=picture,
    )


def visual_parts(config: Any, adapters: Sequence[Adapter]) -> dict[int, Parts]:
    """By decoder layer, what the methods let visual tokens of prompts go through; layers left alone are left out."""
    model = decoder(config)
    return {number: parts for adapter in adapters for number, parts in adapter.visual_parts(model).items()}


def cost_of(
    config: Any,
    adapters: Sequence[Adapter],
    text: int,
    pictures: Sequence[Picture],
    per_layer: Sequence[int] | None = None,
    generated: int = 0,
) -> Cost:
    """Cost of a prompt under methods, their statistics and own products included.

    text: text tokens. per_layer: visual tokens that the prompt holds in every decoder layer; None: all, as without
    methods. generated: tokens to generate.
    """
    cost = prompt_cost(
        config,
        text=text,
        images=[picture.patches for picture in pictures],
        videos=[picture.video for picture in pictures],
        tokens=[picture.span for picture in pictures],
        generated=generated,
        scores=tower_scores(config, adapters),
        selection=sum(apply(config, adapters, picture, text)[1] for picture in pictures),
        visual_per_layer=per_layer,
        parts=visual_parts(config, adapters),
    )
    return dataclasses.replace(cost, decode=cost.decode + _steps(config, adapters, text, pictures, generated))


def _steps(config: Any, adapters: Sequence[Adapter], text: int, pictures: Sequence[Picture], generated: int) -> int:
    """What the methods multiply themselves for all tokens but the first."""
    if generated < 2 or not pictures:
        return 0
    held = [apply(config, adapters, picture, text)[0][0] for picture in pictures]
    joined = dataclasses.replace(pictures[0], tokens=sum(held), span=sum(held))
    sizes = sizes_of(config, pictures[0])
    return sum(adapter.step_flops(joined, text, sizes, step) for adapter in adapters for step in range(1, generated))


def share_of(config: Any, adapters: Sequence[Adapter], picture: Picture, text: int = NOMINAL_TEXT) -> float:
    """FLOPs until the first token (X2, tower and selection included) over those of the unpatched model."""
    layers, _ = apply(config, adapters, picture, text)
    patched = cost_of(config, adapters, text, [picture], layers)
    return patched.total_prefill / cost_of(config, (), text, [picture]).total_prefill


class Prompt(Protocol):
    """What the cost of a prompt depends on (`vlmfast.patching.PromptReport`)."""

    @property
    def text(self) -> int:
        """Its text tokens."""
        ...

    @property
    def pictures(self) -> Sequence[Any]:
        """Its pictures, with their sizes as `size`."""
        ...

    @property
    def per_layer(self) -> Sequence[int]:
        """Visual tokens in every decoder layer."""
        ...


def prompts_share(config: Any, adapters: Sequence[Adapter], prompts: Sequence[Prompt]) -> float:
    """As `share_of`, for prompts that ran: with what their layers really held."""
    patched = plain = 0
    for prompt in prompts:
        sizes = [picture.size for picture in prompt.pictures]
        patched += cost_of(config, adapters, prompt.text, sizes, prompt.per_layer).total_prefill
        plain += cost_of(config, (), prompt.text, sizes).total_prefill
    return patched / plain


def with_keep(adapters: Sequence[Adapter], keep: float) -> tuple[Adapter, ...]:
    """The same methods, with this `keep` where they have one."""
    return tuple(dataclasses.replace(a, keep=keep) if "keep" in a.settings() else a for a in adapters)  # type: ignore[call-arg]


def solve_keep(
    config: Any,
    adapters: Sequence[Adapter],
    share: float,
    *,
    text: int = NOMINAL_TEXT,
    picture: Picture | None = None,
) -> float:
    """The `keep` at which these methods cost `share` of the unpatched model until the first token (`share_of`).

    Solved on whole tokens of one picture; on others the share differs as their size does, which matters in families
    that take any size. Every method with `keep` gets the same. Where no whole number of tokens comes within 1 % of the
    share, the nearest is taken with a warning; a warning also says where a method's share depends on the content.

    share    in (0, 1]; 1.0 gives keep 1.0, the unpatched model
    text     text tokens of the prompt
    picture  None: `nominal`, a video where a method prunes videos alone

    Raises ValueError naming the reachable range: the tower's cost cannot be saved by dropping its output.
    """
    if picture is None:
        still = all("image" in getattr(adapter, "modalities", ("image",)) for adapter in adapters)
        picture = nominal(config, "image" if still else "video")
    if share == 1 and not isinstance(share, bool):
        return 1.0

    def reached(keep: float) -> float:
        return share_of(config, with_keep(adapters, keep), picture, text)

    low, high = 1 / picture.tokens, 1.0
    least = reached(low)
    if isinstance(share, bool) or not least * (1 - TOLERANCE) <= share <= 1:
        grid = "x".join(str(side) for side in picture.patches)
        raise ValueError(
            f"a share of {share:.4g} of the unpatched FLOPs cannot be reached: with {text} text tokens and a picture "
            f"of {grid} patches it lies between {least:.4f} (keep={low:.4g}) and 1.0"
        )
    for _ in range(60):  # bisection between two keeps that enclose the share: ends at a step of one token
        middle = (low + high) / 2
        if reached(middle) < share:
            low = middle
        else:
            high = middle
    keep = min((low, high), key=lambda keep: abs(reached(keep) - share))
    whole = round(keep * picture.tokens) / picture.tokens  # the middle of the step, where that is the same step
    if whole and reached(whole) == reached(keep):
        keep = whole
    found = reached(keep)
    unforeseen = [adapter.name for adapter in adapters if not adapter.foreseeable]
    if unforeseen:
        warnings.warn(
            f"flops={share}: what {' and '.join(unforeseen)} leaves depends on the picture's content, so that "
            f"{found:.4f} at keep={keep:.4g} is an estimate",
            stacklevel=4,
        )
    if abs(found - share) > TOLERANCE * share:
        warnings.warn(
            f"flops={share} is not reached on whole tokens: the nearest share is {found:.4f}, at keep={keep:.4g} of "
            f"{picture.tokens} visual tokens",
            stacklevel=4,
        )
    return keep
