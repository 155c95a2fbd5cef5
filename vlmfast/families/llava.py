"""LLaVA families whose pictures are whole views: LLaVA-1.5, ViP-LLaVA and Video-LLaVA.

Where the CLS token of a view enters the prompt (frames of Video-LLaVA; images with the strategy "full") it is no
visual token: it shows no part of the picture and has no place on the grid. It is treated like a newline: it stays when
nothing is dropped and goes as soon as tokens are dropped, which is also what FasterVLM's code for Video-LLaVA does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from vlmfast.families.base import Encoded, Family, Source
from vlmfast.families.clip import BLOCKS, cls_stays, has_cls, patch_maps, videos, vit_tower, vit_vision
from vlmfast.towers import Grid, Picture, Vision
from vlmfast.visual import VisualTokens, frames


def _images(encoded: Encoded) -> list[VisualTokens]:
    """pixel_values [images, C, H, W]: one view an image."""
    return _views(encoded, encoded.inputs["pixel_values"][:, None], cls_stays(encoded.config), video=False)


def _videos(encoded: Encoded) -> list[VisualTokens]:
    """pixel_values_videos [videos, frames, C, H, W]: one view a frame, none of which loses its CLS token."""
    return _views(encoded, encoded.inputs["pixel_values_videos"], has_cls(encoded.config), video=True)


def _views(encoded: Encoded, pixels: Any, cls: bool, video: bool) -> list[VisualTokens]:
    """pixels: [pictures, views, C, H, W]; cls: whether the CLS token of a view is among its features."""
    patch = encoded.config.vision_config.patch_size
    t, h, w = pixels.shape[1], pixels.shape[-2] // patch, pixels.shape[-1] // patch
    maps = patch_maps(encoded)
    slots = torch.arange(t * (h * w + 1)).view(t, -1)[:, 1:].flatten() if cls else None
    pictures = []
    for i in range(len(pixels)):
        views = slice(i * t, (i + 1) * t)
        own = encoded.output.pooler_output[views]
        features = torch.stack(list(own)) if t > 1 else own[0][None]
        pictures.append(
            VisualTokens(
                features=features[:, int(cls) :].flatten(0, 1),
                grid=(t, h, w),
                queries=h * w + encoded.tower.has_cls,
                views=frames((t, h, w), video),
                pixels=pixels[i] if video else pixels[i, 0],
                statistics={score: values[views].flatten(0, 1) for score, values in maps.items()},
                patches=(t, h, w),
                slots=slots,
                span=t * (h * w + cls),
                newline=features[:, 0] if cls else None,
            )
        )
    return pictures


def _video_vision(config: Any, grid: Grid) -> Vision:
    return vit_vision(config, grid, cls=has_cls(config))


def _nominal(config: Any, modality: str) -> Picture:
    """An image, or eight frames, as Video-LLaVA's own evaluation takes them."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    video = modality == "video"
    t, cls = (8, has_cls(config)) if video else (1, cls_stays(config))
    patches = (t, side, side)
    return Picture(patches=patches, tokens=t * side**2, span=t * (side**2 + cls), frames=t, video=video)


LLAVA = Family(
    name="llava",
    blocks=BLOCKS,
    attention="self_attn",
    positions="compact",
    mrope=False,
    tower=vit_tower,
    vision=vit_vision,
    sources={"image": Source(layout=_images)},
    projector="multi_modal_projector",
    cls=True,
)

VIPLLAVA = dataclasses.replace(LLAVA, name="vipllava", sources={"image": Source(layout=_images, container="tensor")})

VIDEO_LLAVA = Family(
    name="video_llava",
    blocks=("image_tower.encoder.layers", "image_tower.vision_model.encoder.layers"),
    attention="self_attn",
    positions="compact",
    mrope=False,
    tower=vit_tower,
    vision=vit_vision,
    sources={
        "image": Source(layout=_images, container="tensor", aliases=("pixel_values_images",)),
        "video": videos(
            _videos, _video_vision, ("video_tower.encoder.layers", "video_tower.vision_model.encoder.layers")
        ),
    },
    projector="multi_modal_projector",
    cls=True,
    nominal=_nominal,
)

FAMILIES = (LLAVA, VIPLLAVA, VIDEO_LLAVA)
