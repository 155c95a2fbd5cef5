"""What a model family is: everything that differs between families, as data, so that nothing else asks for a type."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlmfast.towers import Grid, Picture, Tower, Vision
from vlmfast.visual import Score, VisualTokens, mean_over

Positions = Literal["original", "compact"]


@dataclass(frozen=True)
class Encoded:
    """One pass of the vision side: what a layout turns into one `VisualTokens` a picture.

    tower, config: of the model. inputs: the arguments of `get_image_features` or `get_video_features` by name. output:
    its ModelOutput (`pooler_output`, `deepstack_features`, ...). raw: per statistic one tensor for each attention call
    of that layer, [views, tower tokens] or, for vectors, [views, tower tokens, c].
    """

    tower: Tower
    config: Any
    inputs: Mapping[str, Any]
    output: Any
    raw: Mapping[Score, list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One kind of visual input of a family: images or videos.

    layout: turns a pass into one VisualTokens a picture, in the order of the placeholders.
    token: attribute of the config with the placeholder's id. pixels: the forward's argument that holds the pictures.
    encode: method of the base model. container: what the model takes `pooler_output` as ("list" of one tensor a
    picture, or one "tensor"). blocks, vision: a tower and a cost of its own, None: the family's. aliases: older names
    of `pixels`. needs: arguments that must come with the pixels. packed: (config, inputs) -> tower tokens of each
    picture, for a tower that sees all pictures of a call as one sequence with a mask between them.
    """

    layout: Callable[[Encoded], list[VisualTokens]]
    token: str = "image_token_id"
    pixels: str = "pixel_values"
    encode: str = "get_image_features"
    container: Literal["list", "tensor"] = "list"
    blocks: tuple[str, ...] | None = None
    vision: Callable[[Any, Grid], Vision] | None = None
    aliases: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    packed: Callable[[Any, Mapping[str, Any]], list[int]] | None = None

    def pack(self, pictures: Sequence[Tensor]) -> Any:
        """The features of all pictures in the container the model takes. [n, D] each"""
        return list(pictures) if self.container == "list" else torch.cat(list(pictures))[None]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    blocks: dotted paths from the base model to the tower's blocks, first that exists; attention: from a block to its
    attention module. positions: what the authors' codes do with position ids of kept tokens. mrope: positions have
    three axes. tower: config -> Tower. vision: (config, patch grid) -> cost of the vision side. sources: "image" and,
    where the family takes them, "video". cls: the stock tower has a CLS token (`Tower.has_cls` is what holds for a
    config). crops: an image may come as a thumbnail and crops of its own. tiles: all tiles of a sample are one picture
    (see vlmfast.families.idefics). first_position: position of the first token of a prompt. deepstack: features are
    added after the first decoder layers, too. hybrid: most decoder layers have no attention but one state for all
    tokens. sees_ahead: in the decoder the tokens of a picture attend to later ones, too. projector: path to a module
    that maps tower features to visual tokens one by one, None where there is none such. nominal: (config, "image" or
    "video") -> sizes of a usual picture, for solving `keep`; None: see vlmfast.solving. sized: (config, (height,
    width) in pixels, most pixels or None) -> sizes of an image after its processor; None: every image gets the model's
    own size. tiled: what the processor cuts an image into is not known from its size.
    """

    name: str
    blocks: tuple[str, ...]
    attention: str
    positions: Positions
    mrope: bool
    tower: Callable[[Any], Tower]
    vision: Callable[[Any, Grid], Vision]
    sources: Mapping[str, Source]
    cls: bool = False
    crops: bool = False
    tiles: bool = False
    first_position: int = 0
    deepstack: bool = False
    hybrid: bool = False
    sees_ahead: bool = False
    projector: str | None = None
    nominal: Callable[[Any, str], Picture] | None = None
    sized: Callable[[Any, tuple[int, int], int | None], Picture] | None = None
    tiled: bool = False

    def block_modules(self, base: Any, source: Source) -> list[Any]:
        """The blocks of the vision tower."""
        return list(first_of(base, source.blocks or self.blocks))

    def attention_module(self, block: Any) -> Any:
        """The attention module of a block of the vision tower."""
        return follow(block, self.attention)


def follow(root: Any, path: str) -> Any:
    """The attribute at a dotted path."""
    return functools.reduce(getattr, path.split("."), root)


def first_of(root: Any, paths: Sequence[str]) -> Any:
    """The attribute at the first dotted path that exists."""
    for path in paths:
        try:
            return follow(root, path)
        except AttributeError:
            continue
    raise NotImplementedError(
        f"{type(root).__name__} has none of {', '.join(paths)}: an unknown layout of this family"
    )


def window_to_raster(patches: Tensor, order: Tensor, merge: int) -> Tensor:
    """Values of patches in window order -> values of merged tokens in raster order. [N * merge^2, ...] -> [N, ...]

    order: `window_order` of the merged grid; a merged token's value is the mean over its patches.
    """
    merged = mean_over(patches, merge * merge)
    raster = torch.empty_like(merged)
    raster[order.to(merged.device)] = merged
    return raster


def merged_raster(patches: Tensor, grid: tuple[int, int], merge: int) -> Tensor:
    """Values of patches in raster order -> means over squares of merge x merge. [h * w, ...] -> [N, ...], raster order

    grid: (h, w) of the patches; rows and columns that fill no square are left out, as unfolding and pooling do.
    """
    (h, w), rest = grid, patches.shape[1:]
    rows, columns = h // merge, w // merge
    whole = patches.reshape(h, w, *rest)[: rows * merge, : columns * merge]
    return whole.reshape(rows, merge, columns, merge, *rest).mean(dim=(1, 3)).flatten(0, 1)


def feature_block(config: Any) -> int:
    """The block whose output becomes the visual tokens, of a tower with one `vision_feature_layer`.

    Raises NotImplementedError for several layers and for states that are no block's output.
    """
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int):
        raise NotImplementedError(
            f"{config.model_type} with several feature layers {layer}; supported: one, as an int"
        )
    block = depth + layer if layer < 0 else layer - 1  # hidden state 0 is the embedding
    if not 0 <= block < depth:
        raise NotImplementedError(
            f"{config.model_type} with vision_feature_layer={layer}; supported: the output of one of {depth} blocks"
        )
    return block


def did_you_mean(word: str, choices: Any) -> str:
    """A hint such as ' (did you mean keep?)', empty when nothing is close."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
