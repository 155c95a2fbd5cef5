"""Pictures through the vision tower, once: features, and the statistics that pruning methods ask for."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmfast.attention import KEYWORD, Taps, observing, tap, taps_of
from vlmfast.families import Encoded, Family, Source, Tower, family_of
from vlmfast.families.base import follow
from vlmfast.patching import HANDLE, Patch, unwrap
from vlmfast.rewriting import present
from vlmfast.visual import Choice, Score, VisualTokens

IMAGES = "vlmfast_images"  # on an encoder output: its VisualTokens
OUTPUTS = ("hidden", "cls_hidden")  # statistics of a block's output rather than of its attention


class Selector(Protocol):
    """What door 1 needs of a pruning method. Hashable: choices are remembered under it."""

    @property
    def uses_text(self) -> bool:
        """Whether `choose` reads `visual.text`."""
        ...

    @property
    def keeps_newlines(self) -> bool:
        """Whether places without a token stay when tokens are dropped."""
        ...

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """The statistics the method needs, under its own names."""
        ...

    def choose(self, visual: VisualTokens) -> Choice:
        """What stays of one picture."""
        ...


def source_of(family: Family, modality: str) -> Source:
    """Images or videos of a family; NotImplementedError where it takes none."""
    if modality not in family.sources:
        raise NotImplementedError(f"{family.name} takes no {modality}s; it takes {' and '.join(family.sources)}s")
    return family.sources[modality]


def renamed(inputs: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The inputs with the pixels under the name that the source knows."""
    known = dict(inputs)
    for alias in source.aliases:
        if known.get(alias) is not None and known.get(source.pixels) is None:
            known[source.pixels] = known.pop(alias)
    return known


class Outputs(dict[str, Any]):
    """`mm_encoder_outputs` on their way into a model that accelerate has spread over devices.

    Its hooks would make each output anew, without what is attached to it; they ask what has a `to` to move itself.
    """

    def to(self, device: Any, **how: Any) -> Outputs:
        """Nothing: the model itself brings the features to the embeddings."""
        return self


def as_they_are(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of the model, behind those that rewrite its inputs: encoders' outputs keep what is attached to them."""
    outputs = kwargs.get("mm_encoder_outputs")
    return (args, {**kwargs, "mm_encoder_outputs": Outputs(outputs)}) if outputs else None


class PictureEncoder:
    """Stands for the base model's `get_image_features` or `get_video_features`: attaches the VisualTokens."""

    def __init__(self, patch: Patch, modality: str, scores: Sequence[Score]) -> None:
        self.family, self.config, self.tower = patch.family, patch.model.config, patch.tower
        self.source = source_of(patch.family, modality)
        self.base = patch.base
        self.original = getattr(patch.base, self.source.encode)
        functools.update_wrapper(self, self.original)  # generate() reads the signature
        self.scores: tuple[Score, ...] = ()
        self.places: dict[Score, nn.Module] = {}
        self.add(patch, scores)
        if as_they_are not in patch.model._forward_pre_hooks.values():
            patch.hook(patch.model, as_they_are, before=True, first=False)

    def add(self, patch: Patch, scores: Sequence[Score]) -> None:
        """Take these statistics, too, for as long as the patch is open. Raises ValueError for those that the tower
        cannot give.
        """
        scores = [score for score in dict.fromkeys(scores) if score not in self.places]
        for score in scores:
            self.tower.check(score)
        blocks = self.family.block_modules(patch.base, self.source)
        places = dict(self.places)
        for score in scores:
            block = blocks[score.layer]
            places[score] = block if score.kind in OUTPUTS else self.family.attention_module(block)
        patch.set(self, "places", places)
        patch.set(self, "scores", (*self.scores, *scores))
        hidden = [module for score, module in self.places.items() if score.kind in OUTPUTS]
        tap(patch, [module for module in dict.fromkeys(self.places.values()) if module not in hidden])
        for module in dict.fromkeys(hidden):
            if _take_hidden not in module._forward_hooks.values():  # images and videos may share a tower
                patch.hook(module, _take_hidden)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with `VisualTokens` attached to the output."""
        if KEYWORD in kwargs:  # a model that encodes its videos as images: the call for the videos collects
            return self.original(*args, **kwargs)
        wanted: dict[int, list[Score]] = {}
        for score, module in self.places.items():
            wanted.setdefault(id(module), []).append(score)
        taps = Taps(wanted)
        inputs = renamed(inspect.signature(self.original).bind_partial(*args, **kwargs).arguments, self.source)
        missing = [name for name in self.source.needs if inputs.get(name) is None]
        if missing:
            raise ValueError(f"{missing[0]} is missing beside {self.source.pixels}: pass all the processor returns")
        extra = {KEYWORD: taps} if self.scores else {}
        if self.source.packed is not None:
            taps.cuts = list(accumulate(self.source.packed(self.config, inputs), initial=0))
        with observing(taps):
            output = self.original(*args, **kwargs, **extra)
        taps.closed = True
        if isinstance(output, tuple):  # return_dict=False: nowhere to attach anything
            return output
        pooled = output.pooler_output
        device = (pooled if isinstance(pooled, Tensor) else pooled[0]).device  # the tower may be elsewhere
        found = {score: [one.to(device) for one in parts] for score, parts in taps.collected.items()}
        visuals = self.source.layout(Encoded(self.tower, self.config, inputs, output, found))
        if self.family.projector is not None and self.tower.layers == 1:
            project = follow(self.base, self.family.projector)
            visuals = [dataclasses.replace(visual, project=project) for visual in visuals]
        setattr(output, IMAGES, visuals)
        return output


def encoder_of(patch: Patch, modality: str, scores: Sequence[Score]) -> PictureEncoder:
    """The encoder that stands in the model, taking these statistics, too; put there where none is.

    An adapter that needs features of the tower leaves one there for good: a patch adds to it. Raises as
    `PictureEncoder.add`.
    """
    source = source_of(patch.family, modality)
    standing = patch.base.__dict__.get(source.encode)
    if isinstance(standing, PictureEncoder):
        standing.add(patch, scores)
        return standing
    encoder = PictureEncoder(patch, modality, scores)
    patch.set(patch.base, source.encode, encoder)
    return encoder


def encode_pictures(family: Family, base: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The encoder's outputs for the pictures of a forward, by modality. Consumes the pixels among its arguments.

    base: the multimodal base model. Raises ValueError for pixels beside outputs of the same modality.
    """
    pictures = present(kwargs.get("mm_encoder_outputs"))
    for name, source in family.sources.items():
        pixels = kwargs.get(source.pixels)
        if pixels is None:
            continue
        if name in pictures:
            raise ValueError(f"pass {source.pixels} or mm_encoder_outputs, not both")
        encode = getattr(base, source.encode)
        names = list(inspect.signature(encode).parameters)[1:]
        others = {key: kwargs[key] for key in names if kwargs.get(key) is not None and key != "kwargs"}
        pictures[name] = encode(pixels, **others, return_dict=True)
    for source in family.sources.values():
        if kwargs.get(source.pixels) is not None:
            kwargs[source.pixels] = None
    return pictures


def _take_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Hook of a block of the tower: its output is a statistic. [B, K, C] or, packed, [K, C]"""
    taps = taps_of(dict(kwargs))
    if taps is None or taps.closed:
        return
    hidden = (output[0] if isinstance(output, tuple) else output).detach().float()
    for score in taps.wanted.get(id(module), ()):
        if score.kind in OUTPUTS:
            vectors = hidden if hidden.ndim == 3 else hidden[None]
            if score.kind == "cls_hidden":
                vectors = vectors[:, :1].expand_as(vectors)
            taps.collected.setdefault(score, []).append(vectors)


def asked(visual: VisualTokens, wanted: Mapping[str, Score]) -> VisualTokens:
    """A picture with the statistics that a method asked for, under the method's names.

    Raises ValueError where the picture was encoded without them.
    """
    missing = [score for score in wanted.values() if score not in visual.statistics]
    if missing:
        raise ValueError(
            f"these images were encoded without {missing[0]}; name the method in encode_images(model, methods)"
        )
    return dataclasses.replace(visual, scores={name: visual.statistics[score] for name, score in wanted.items()})


def encode_images(model: Any, methods: Sequence[Any], *, modality: str = "image", **inputs: Any) -> list[VisualTokens]:
    """Encode pictures once for several methods: one VisualTokens each, without gradient.

    model: an unpatched model; methods: adapters (many want nothing of the images); modality: "image" or
    "video"; inputs: what the processor gave for the pictures, under the names of `get_image_features` or
    `get_video_features` (`pixel_values`, `image_grid_thw`, ...). Raises RuntimeError on a patched model.
    """
    target = unwrap(model)
    if HANDLE in target.__dict__:
        raise RuntimeError("encode_images needs the unpatched model: call vlmfast.unpatch(model) first")
    patch = Patch(target)
    wanted = [
        score for method in methods if hasattr(method, "wanted") for score in method.wanted(patch.tower).values()
    ]
    try:
        encoder = encoder_of(patch, modality, list(dict.fromkeys(wanted)))
        with torch.no_grad():
            return getattr(encoder(**inputs, return_dict=True), IMAGES)
    finally:
        patch.close()


def encoder_outputs(images: Sequence[VisualTokens], modality: str = "image", *, model: Any = None) -> dict[str, Any]:
    """`mm_encoder_outputs` for `model(...)` or `model.generate(...)` from pictures encoded before.

    images: images, or videos where modality is "video", in the order of their placeholders in the batch; for prompts
    with both, join the two dictionaries. model: the one that takes them. Some take one tensor for all images,
    [n, N, D]; without it there is a list, which these accept only under a method that drops tokens.
    """
    features: Any = [image.spread(image.features) for image in images]
    if images and model is not None and family_of(unwrap(model)).sources[modality].container == "tensor":
        features = torch.stack(features)
    output = BaseModelOutputWithPooling(pooler_output=features)
    if images and images[0].deepstack:
        output.deepstack_features = [list(layer) for layer in zip(*(image.deepstack for image in images))]
    setattr(output, IMAGES, list(images))
    return {modality: output}
