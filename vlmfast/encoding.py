"""Images through the vision tower, once: features, and the statistics that pruning methods ask for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmfast.attention import KEYWORD, Taps, tap
from vlmfast.families import Tower
from vlmfast.patching import HANDLE, Patch, unwrap
from vlmfast.visual import Score, VisualTokens

IMAGES = "vlmfast_images"  # on an encoder output: its VisualTokens


class Selector(Protocol):
    """What door 1 needs of a pruning method."""

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """The statistics the method needs, under its own names."""
        ...

    def choose(self, visual: VisualTokens) -> Tensor:
        """Kept indices of one image, ascending. -> int64 [kept]"""
        ...


class ImageEncoder:
    """Stands for the base model's `get_image_features`: takes the statistics and attaches the VisualTokens."""

    def __init__(self, patch: Patch, scores: Sequence[Score]) -> None:
        self.original = patch.base.get_image_features
        functools.update_wrapper(self, self.original)  # generate() reads the signature
        self.family, self.config, self.tower, self.scores = (
            patch.family,
            patch.model.config,
            patch.tower,
            tuple(scores),
        )
        for score in self.scores:
            self.tower.check(score)
        modules = self.family.attention_modules(patch.base)
        self.modules = {score.layer: modules[score.layer] for score in self.scores}
        tap(patch, list(self.modules.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with `VisualTokens` attached to the output."""
        taps = Taps({id(module): [s for s in self.scores if s.layer == i] for i, module in self.modules.items()})
        inputs = inspect.signature(self.original).bind(*args, **kwargs).arguments
        extra = {KEYWORD: taps} if self.scores else {}
        output = self.original(*args, **kwargs, **extra)
        taps.closed = True
        if isinstance(output, tuple):  # return_dict=False: nowhere to attach anything
            return output
        setattr(
            output, IMAGES, self.family.layout(self.tower, self.config, inputs, output.pooler_output, taps.collected)
        )
        return output


def encode_images(model: Any, methods: Sequence[Any], **inputs: Any) -> list[VisualTokens]:
    """Encode images once for several methods: one VisualTokens an image, without gradient.

    model: an unpatched model; methods: pruning adapters (others want nothing of the images); inputs: what the
    processor gave for the images (`pixel_values`, `image_grid_thw`, ...). Raises RuntimeError on a patched model.
    """
    target = unwrap(model)
    if HANDLE in target.__dict__:
        raise RuntimeError("encode_images needs the unpatched model: call vlmfast.unpatch(model) first")
    patch = Patch(target)
    wanted = [
        score for method in methods if hasattr(method, "wanted") for score in method.wanted(patch.tower).values()
    ]
    try:
        encoder = ImageEncoder(patch, list(dict.fromkeys(wanted)))
        with torch.no_grad():
            return getattr(encoder(**inputs, return_dict=True), IMAGES)
    finally:
        patch.close()


def encoder_outputs(images: Sequence[VisualTokens]) -> dict[str, Any]:
    """`mm_encoder_outputs` for `model(...)` or `model.generate(...)` from images encoded before.

    images: in the order of their placeholders in the batch.
    """
    output = BaseModelOutputWithPooling(pooler_output=[image.features for image in images])
    setattr(output, IMAGES, list(images))
    return {"image": output}
