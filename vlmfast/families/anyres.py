"""LLaVA families whose images come as a thumbnail and crops: LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision.

An image is resized to the best of some resolutions, padded and cut into crops. In the prompt stand the thumbnail's
tokens, then those of the crops as one stitched picture, row by row, each row with a newline at its end. The rows and
columns that only show padding are cut off first; LLaVA-OneVision then shrinks what is left by bilinear interpolation
if it is too large, so that its tokens are blends of up to four. The functions that decide sizes are transformers' own.

Frames of videos are pooled to about a quarter of their tokens: before the projector in LLaVA-NeXT-Video, after it in
LLaVA-OneVision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches, unpad_image

from vlmfast.families.base import Encoded, Family, Source
from vlmfast.families.clip import BLOCKS, cls_stays, patch_maps, videos, vit_tower, vit_vision
from vlmfast.towers import Grid, Picture, Tower, Vision
from vlmfast.visual import View, VisualTokens, frames

SHRINK_ABOVE = 1.1  # LLaVA-OneVision shrinks a picture whose sides are more than this times too long


class _Part(NamedTuple):
    """What a crop has of one axis: tokens from `start` to before `stop`, which show the original from `begin` to `end`
    (fractions, below 0 and above 1 in padding)."""

    start: int
    stop: int
    begin: float
    end: float


@dataclass(frozen=True)
class Canvas:
    """The stitched crops of one image, from the tower's tokens to those of the prompt.

    size: (h, w) of the original in pixels; resolution: of the crops together; crop: side of a crop in pixels; side:
    in tokens; patch: side of a token in pixels; at_most: views' worth of tokens above which the picture is shrunk,
    None: never.
    """

    size: tuple[int, int]
    resolution: tuple[int, int]
    crop: int
    side: int
    patch: int
    at_most: int | None = None

    @property
    def crops(self) -> tuple[int, int]:
        """(rows, columns) of crops."""
        return self.resolution[0] // self.crop, self.resolution[1] // self.crop

    def place(self, values: Tensor) -> Tensor:
        """Values of the crops' tokens -> of the tokens in the prompt. [crops, side^2, ...] -> [h, w, ...]"""
        rows, columns = self.crops
        channels = values.reshape(rows, columns, self.side, self.side, -1).permute(4, 0, 2, 1, 3)
        canvas = unpad_image(channels.reshape(-1, rows * self.side, columns * self.side), list(self.size))
        shape = self._shrunk(*canvas.shape[1:])
        if shape != canvas.shape[1:]:
            canvas = functional.interpolate(canvas[None], shape, mode="bilinear")[0]
        return canvas.permute(1, 2, 0).reshape(*shape, *values.shape[2:])

    def _shrunk(self, h: int, w: int) -> tuple[int, int]:
        ratio = 0.0 if self.at_most is None else math.sqrt(h * w / (self.at_most * self.side**2))
        return (int(h // ratio), int(w // ratio)) if ratio > SHRINK_ABOVE else (h, w)

    def views(self, offset: int) -> tuple[tuple[int, int], list[View]]:
        """(h, w) of the stitched tokens, and a View for each crop that has some of them, from index `offset` on.

        A shrunken token belongs to the crop in which its centre lies.
        """
        rows, columns = (crops * self.side for crops in self.crops)
        valid = unpad_image(torch.arange(rows * columns).view(1, rows, columns), list(self.size))[0]
        h, w = self._shrunk(*valid.shape)
        above, before = divmod(int(valid[0, 0]), columns)
        down = self._parts(0, above, valid.shape[0], h)
        across = self._parts(1, before, valid.shape[1], w)
        index = offset + torch.arange(h * w).view(h, w)
        return (h, w), [
            View(
                index[y.start : y.stop, x.start : x.stop].flatten(),
                (y.stop - y.start, x.stop - x.start),
                "crop",
                (row, column),
                (y.begin, x.begin, y.end, x.end),
            )
            for row, y in enumerate(down)
            for column, x in enumerate(across)
            if y.stop > y.start and x.stop > x.start
        ]

    def _parts(self, axis: int, cut: int, n: int, m: int) -> list[_Part]:
        """The parts of the crops along an axis. cut, n: tokens cut off before, and left; m: after shrinking."""
        step, (start, length) = n / m, self._original(axis)
        parts = []
        for crop in range(self.crops[axis]):
            limits = crop * self.side, (crop + 1) * self.side
            first, stop = (min(m, max(0, math.ceil((limit - cut) / step - 0.5))) for limit in limits)
            shift = crop * (self.crop - self.side * self.patch)  # a crop may be wider than its tokens
            begin, end = ((shift + self.patch * (cut + token * step) - start) / length for token in (first, stop))
            parts.append(_Part(first, stop, begin, end))
        return parts

    def _original(self, axis: int) -> tuple[int, int]:
        """Start and length of the resized original among the crops' pixels, as the image processors paste it."""
        scale = min(to / of for of, to in zip(self.size, self.resolution))
        length = min(math.ceil(self.size[axis] * scale), self.resolution[axis])
        return (self.resolution[axis] - length) // 2, length


def _images(encoded: Encoded, at_most: int | None = None) -> list[VisualTokens]:
    """pixel_values [images, most views, C, H, W], or [views, C, H, W] of all; image_sizes [images, 2]."""
    vision = encoded.config.vision_config
    crop, patch = vision.image_size, vision.patch_size
    side = crop // patch
    points, pixels = encoded.config.image_grid_pinpoints, encoded.inputs["pixel_values"]
    sizes = [(int(h), int(w)) for h, w in torch.as_tensor(encoded.inputs["image_sizes"]).tolist()]
    together = encoded.inputs.get("batch_num_images")  # samples with several images have no crops
    whole = [False] * len(sizes) if together is None else [n != 1 for n in map(int, together) for _ in range(n)]
    counts = [1 if one else image_size_to_num_patches(size, points, crop) for size, one in zip(sizes, whole)]
    parts = [own[:n] for own, n in zip(pixels, counts)] if pixels.ndim == 5 else pixels.split(counts)
    maps = {score: values.split(counts) for score, values in patch_maps(encoded).items()}
    base, covered = torch.arange(side**2), side * patch / crop
    images = []
    for i, (size, count, packed) in enumerate(zip(sizes, counts, encoded.output.pooler_output)):
        own = {score: values[i] for score, values in maps.items()}
        if count == 1:
            slots, statistics = base, {score: values[0] for score, values in own.items()}
            views, grid = [View(base, (side, side), region=_padded(size))], (1, side, side)
        else:
            resolution = select_best_resolution(size, points)
            canvas = Canvas(size, resolution, crop, side, patch, at_most)
            (h, w), crops = canvas.views(side**2)
            views = [View(base, (side, side), "thumbnail", region=(0.0, 0.0, covered, covered)), *crops]
            slots = torch.cat([base, side**2 + torch.arange(h * (w + 1)).view(h, -1)[:, :-1].flatten()])
            grid = (1, 1, len(slots))
            statistics = {s: torch.cat([v[0], canvas.place(v[1:]).flatten(0, 1)]) for s, v in own.items()}
        images.append(
            VisualTokens(
                features=packed[slots.to(packed.device)],
                grid=grid,
                queries=side**2 + encoded.tower.has_cls,
                pixels=parts[i],
                statistics=statistics,
                views=views,
                patches=(count, side, side),
                slots=slots,
                span=len(packed),
                newline=packed[-1],
            )
        )
    return images


def _padded(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Region of a picture that was padded to a square, around its middle."""
    longest = max(size)
    before = [((longest - side) // 2) / side for side in size]
    after = [longest / side - start for side, start in zip(size, before)]
    return -before[0], -before[1], after[0], after[1]


def _videos(encoded: Encoded, pool: Callable[[Tensor], Tensor], newline: bool) -> list[VisualTokens]:
    """pixel_values_videos [videos, frames, C, H, W]. pool: [frames, c, h, w] -> [frames, c, h', w']; newline: whether
    one ends the video."""
    vision, pixels = encoded.config.vision_config, encoded.inputs["pixel_values_videos"]
    t, side = pixels.shape[1], vision.image_size // vision.patch_size
    h, w = pool(torch.zeros(1, 1, side, side)).shape[2:]
    maps = {}
    for score, values in patch_maps(encoded).items():
        pooled = pool(values.reshape(len(values), side, side, -1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        maps[score] = pooled.reshape(len(pixels), t * h * w, *values.shape[2:])
    slots = torch.arange(t * h * w)
    return [
        VisualTokens(
            features=packed[: t * h * w],
            grid=(t, h, w),
            views=frames((t, h, w), video=True),
            queries=side**2 + encoded.tower.has_cls,
            pixels=pixels[i],
            statistics={score: values[i] for score, values in maps.items()},
            patches=(t, side, side),
            slots=slots if newline else None,
            span=len(packed),
            newline=packed[-1] if newline else None,
        )
        for i, packed in enumerate(encoded.output.pooler_output)
    ]


def _sized(
    config: Any, size: tuple[int, int], most: int | None, at_most: Callable[[Any], int | None] = lambda config: None
) -> Picture:
    """An image of (height, width) pixels. at_most: config -> see `Canvas`."""
    if most is not None:
        raise NotImplementedError(f"{config.model_type} takes its resolutions from the config, not a number of pixels")
    vision, points = config.vision_config, config.image_grid_pinpoints
    crop, side = vision.image_size, vision.image_size // vision.patch_size
    canvas = Canvas(size, select_best_resolution(size, points), crop, side, vision.patch_size, at_most(config))
    (h, w), _ = canvas.views(side**2)
    tokens = side**2 + h * w
    return Picture(patches=(1 + prod(canvas.crops), side, side), tokens=tokens, span=tokens + h)


def _usual_video(config: Any, pool: Callable[[Tensor], Tensor], newline: bool) -> Picture:
    """A video of eight frames."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    tokens = 8 * pool(torch.zeros(1, 1, side, side)).numel()
    return Picture(patches=(8, side, side), tokens=tokens, span=tokens + newline, frames=8, video=True)


# --- LLaVA-NeXT and LLaVA-NeXT-Video -------------------------------------------------------------------------------


def _tower(config: Any) -> Tower:
    if cls_stays(config):
        raise NotImplementedError(
            f"{config.model_type} with vision_feature_select_strategy='full' and a tower with CLS: its tokens do not "
            "fit the crops' grid; supported: 'default'"
        )
    return vit_tower(config)


def _next_pool(config: Any) -> Callable[[Tensor], Tensor]:
    """The pooling of a video's frames. A learned one (conv) mixes channels: statistics then take the mean."""
    pool = functional.max_pool2d if config.spatial_pool_mode == "max" else functional.avg_pool2d
    return lambda values: pool(values, config.spatial_pool_stride)


def _next_videos(encoded: Encoded) -> list[VisualTokens]:
    return _videos(encoded, _next_pool(encoded.config), newline=False)


def _next_video_vision(config: Any, grid: Grid) -> Vision:
    t, h, w = grid
    stride = config.spatial_pool_stride
    pooled = (h // stride) * (w // stride)
    vision = vit_vision(config, grid, projected=pooled)
    if config.spatial_pool_mode != "conv":
        return vision
    d = config.vision_config.hidden_size
    flops = 2 * t * pooled * stride**2 * d * getattr(config, "spatial_pool_out_channels", d)
    return dataclasses.replace(vision, projector=vision.projector + flops)


def _next_nominal(config: Any, modality: str) -> Picture:
    """An image of two by two crops, or eight frames."""
    if modality == "video":
        return _usual_video(config, _next_pool(config), newline=False)
    return _sized(config, (2 * config.vision_config.image_size,) * 2, None)


NEXT_IMAGES = Source(layout=_images, needs=("image_sizes",))

LLAVA_NEXT = Family(
    name="llava_next",
    blocks=BLOCKS,
    attention="self_attn",
    positions="compact",
    mrope=False,
    tower=_tower,
    vision=vit_vision,
    sources={"image": NEXT_IMAGES},
    projector="multi_modal_projector",
    cls=True,
    crops=True,
    nominal=_next_nominal,
    sized=_sized,
)

LLAVA_NEXT_VIDEO = dataclasses.replace(
    LLAVA_NEXT,
    name="llava_next_video",
    sources={"image": NEXT_IMAGES, "video": videos(_next_videos, _next_video_vision)},
)


# --- LLaVA-OneVision -----------------------------------------------------------------------------------------------


def _at_most(aspect: str) -> int:
    """9 of "anyres_max_9". Raises NotImplementedError for other strings."""
    digits = aspect.removeprefix("anyres_max_")
    if digits == aspect or not digits.isdecimal() or int(digits) < 1:
        raise NotImplementedError(f"vision_aspect_ratio={aspect!r}; supported: anyres_max_ and a number, at least 1")
    return int(digits)


def _onevision_tower(config: Any) -> Tower:
    _at_most(config.vision_aspect_ratio)
    return _tower(config)


def _onevision_images(encoded: Encoded) -> list[VisualTokens]:
    aspect = encoded.inputs.get("vision_aspect_ratio") or encoded.config.vision_aspect_ratio
    return _images(encoded, _at_most(aspect))


def _halved(values: Tensor) -> Tensor:
    """Bilinear, to half of the sides, rounded up."""
    half = [math.ceil(side / 2) for side in values.shape[2:]]
    return functional.interpolate(values, size=half, mode="bilinear")


def _onevision_videos(encoded: Encoded) -> list[VisualTokens]:
    return _videos(encoded, _halved, newline=True)


def _onevision_video_vision(config: Any, grid: Grid) -> Vision:
    t, h, w = grid
    return vit_vision(config, grid, tokens=t * math.ceil(h / 2) * math.ceil(w / 2) + 1)


def _onevision_sized(config: Any, size: tuple[int, int], most: int | None) -> Picture:
    return _sized(config, size, most, lambda config: _at_most(config.vision_aspect_ratio))


def _onevision_nominal(config: Any, modality: str) -> Picture:
    """An image of two by two crops, or eight frames."""
    if modality == "video":
        return _usual_video(config, _halved, newline=True)
    return _onevision_sized(config, (2 * config.vision_config.image_size,) * 2, None)


LLAVA_ONEVISION = Family(
    name="llava_onevision",
    blocks=BLOCKS,
    attention="self_attn",
    positions="compact",
    mrope=False,
    tower=_onevision_tower,
    vision=vit_vision,
    sources={
        "image": Source(layout=_onevision_images, needs=("image_sizes",)),
        "video": videos(_onevision_videos, _onevision_video_vision),
    },
    crops=True,
    nominal=_onevision_nominal,
    sized=_onevision_sized,
)

FAMILIES = (LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION)
