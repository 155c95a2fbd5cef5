"""AGLA: together with what is said of the part of the picture that the question is about.

Paper: AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local
    Attention (An et al., CVPR 2025), arXiv:2406.12718
Code:  https://github.com/Lackel/AGLA (efa1263)

A small image-text matcher (BLIP) reads the question and the picture, once a picture:

    C   = mean over heads of A max(dm / dA, 0)       A [H, T, n^2]: attention of the matcher's layer 6 to the patches,
                                                     m: the score "they match"; mean over the words -> [n, n]
    M   = smoothed C in the matcher's size [S, S], from 0 to 1 (`vlmfast.matching`)
    rho = min(1 - cos / 2, 1 - 1e-5)                 cos: of the matcher's embeddings of picture and question
    x'  = x where M is among its largest, about rho of the pixels; black elsewhere
    f   = z + alpha z'                               z, z' [V]: logits with x and with x'
    tokens with z < ln(beta) + max z are out

Defaults: alpha=2, beta=0.5 (the authors' scripts; their code falls back on alpha=1), layer 6 of BLIP-ITM large, COCO.

The question is the text behind a prompt's last picture (all text where none follows), without what a chat template
puts around it; the picture is what the vision tower gets, its normalisation taken back. Both need the model's
processor, which is loaded from where the model came from. Where a picture goes to the tower as several views this
does not work; `matcher=self` does: no other model, but the attention of the text's last token to the picture in the
decoder's middle layer; the most attended `part` of the visual tokens makes up the second prompt. Not the paper.
`branch=fastervlm/keep=0.1` prunes the second prompt's picture by its own statistics (ours, too).

Differs from the official code: that makes the second prompt's keyword arguments anew from the first's at each step,
so that from the second generated token on both branches go on with the first one's cache, and f = (1 + alpha) z
(sample.py:127); two caches here, `parity="official"`: as there. The mask is laid over the picture as the tower gets
it, with its shape (there the masked picture is squared, the other one not). Any batch, greedy search and beams.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vlmfast.adapters.decoding.base import Decoding, number, pruner_of
from vlmfast.branch_pictures import (
    Attended,
    AttendedDoor,
    Glance,
    PicturesDoor,
    Scene,
    branch_flops,
    kept_of,
    prompt_flops,
)
from vlmfast.branches import plausible
from vlmfast.decoders import Attention, Sizes
from vlmfast.edits import attending_layers
from vlmfast.families import Family
from vlmfast.layers.cache import window_of
from vlmfast.matching import Matcher, caption, check_folder
from vlmfast.patching import Patch, entrance
from vlmfast.processors import load_processor
from vlmfast.towers import Picture
from vlmfast.visual import budget

SELF = "self"
BLIP = "Salesforce/blip-itm-large-coco"
ROLE = re.compile(r"\s*(assistant|model)\s*:?\s*$", re.IGNORECASE)  # what templates put behind a question


def question_of(text: str) -> str:
    """A decoded question without the words of a chat template around it."""
    return ROLE.sub("", text).strip()


def image_of(pixels: Tensor, grid: tuple[int, int, int], merge: int, frames: int) -> Tensor:
    """Patches as one image. [h * w, 3 * frames * p * p], blocks of merge x merge behind one another -> [3, H, W]"""
    _, h, w = grid
    side = int((pixels.shape[1] // (3 * frames)) ** 0.5)
    parts = pixels.view(h // merge, w // merge, merge, merge, 3, frames, side, side)[:, :, :, :, :, 0]
    return parts.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, h * side, w * side)


def patches_of(image: Tensor, grid: tuple[int, int, int], merge: int, frames: int) -> Tensor:
    """The other way round. [3, H, W] -> [h * w, 3 * frames * p * p]"""
    _, h, w = grid
    side = image.shape[1] // h
    parts = image.view(3, h // merge, merge, side, w // merge, merge, side).permute(1, 4, 2, 5, 0, 3, 6)
    return parts[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, frames, -1, -1).reshape(h * w, -1)


class Reader:
    """What a patch loads once, when it is first needed: the matcher and the model's own processor."""

    def __init__(self, model: Any, matcher: str, layer: int) -> None:
        self.model, self.path, self.layer = model, matcher, layer
        self.matcher: Matcher | None = None
        self.processor: Any = None

    def load(self) -> None:
        """Load both. Raises ValueError where one is not to be had."""
        if self.processor is None:
            self.processor = self._processor()
        if self.matcher is None:
            self.matcher = Matcher(self.path, self.layer, entrance(self.model))

    def _processor(self) -> Any:
        path = getattr(self.model.config, "_name_or_path", "") or getattr(self.model, "name_or_path", "")
        wanted = "agla reads the question and takes back the picture's normalisation with the model's processor"
        if not path:
            raise ValueError(
                f"{wanted}; this model was not loaded with from_pretrained, so there is none (matcher=self)"
            )
        try:
            processor = load_processor(path)
            processor.tokenizer, processor.image_processor.image_mean  # noqa: B018
        except (AttributeError, ImportError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{wanted}, and {path} has none that can be loaded: {reason} (matcher=self)") from error
        return processor

    def question(self, scene: Scene) -> str:
        """The text behind the prompt's last picture, or all its text where there are no words. ValueError for none."""
        for ids in (scene.question, scene.text):
            found = question_of(self.processor.tokenizer.decode(ids, skip_special_tokens=True))
            if caption(found):
                return found
        raise ValueError("agla compares the picture with the question, and this prompt has no words")

    def colours(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation that pixel values were normalised with. [3, 1, 1] each"""
        own = self.processor.image_processor
        normal = getattr(own, "do_normalize", True)
        mean, std = (own.image_mean, own.image_std) if normal else ([0.0] * 3, [1.0] * 3)
        return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


@dataclass(frozen=True)
class LocalBranch:
    """The branch that sees what the question is about. merge, frames: how the tower takes patches of an image."""

    method: AGLA
    reader: Reader = field(compare=False)
    merge: int
    frames: int
    name: str = "agla"
    what: str = "joined with the same prompt that shows what the question is about"

    def redraw(self, scene: Scene) -> Tensor:
        """The pixel values, black where the question is not about the picture."""
        pixels = scene.visual.pixels
        assert pixels is not None
        if scene.modality != "image":
            raise NotImplementedError(f"agla does not work on {scene.modality}s: the matcher compares images and text")
        self.reader.load()
        assert self.reader.matcher is not None
        grid, packed = scene.visual.patches, pixels.ndim == 2
        image = image_of(pixels, grid, self.merge, self.frames) if packed else pixels
        mean, std = (values.to(image.device) for values in self.reader.colours())
        raw = (image.float() * std + mean).clamp(0, 1)
        keep = self.reader.matcher.keep(raw, self.reader.question(scene))
        here = functional.interpolate(keep[None, None].float(), image.shape[1:], mode="nearest-exact")[0, 0] > 0
        local = torch.where(here.to(image.device), image, (-mean / std).to(image))
        return patches_of(local, grid, self.merge, self.frames) if packed else local

    def combine(self, logits: Tensor, branch: Tensor, step: int) -> Tensor:
        """As the method has it. [R, V]"""
        official = self.method.parity == "official" and step > 0
        return self.method.combine(logits, logits if official else branch)


@dataclass(frozen=True)
class AttendedBranch:
    """The branch that has the most attended visual tokens alone."""

    method: AGLA
    glance: Glance = field(compare=False)
    name: str = "agla"
    what: str = "joined with the same prompt that keeps what the text attends to (matcher=self: not the paper's)"

    def redraw(self, scene: Scene) -> Attended:
        """The tokens with what attends to them."""
        return self.glance.of(scene)

    def combine(self, logits: Tensor, branch: Tensor, step: int) -> Tensor:
        """As the method has it. [R, V]"""
        official = self.method.parity == "official" and step > 0
        return self.method.combine(logits, logits if official else branch)


@dataclass(frozen=True, kw_only=True)
class AGLA(Decoding):
    """Add the logits of the same prompt whose pictures show only what the question is about.

    alpha: their weight. beta: tokens less likely than this share of the likeliest are out; 0: none. matcher: folder or
    Hub id of a BlipForImageTextRetrieval, loaded when it is first needed, or "self". layer: of its text encoder. part:
    share of the visual tokens that stays with matcher="self". branch: what prunes the second prompt's pictures, its
    settings joined by slashes; None: what prunes the prompts, if anything does.
    """

    name: ClassVar[str] = "agla"
    summary: ClassVar[str] = "joined with the same prompt whose pictures show what the question is about"
    paper: ClassVar[str] = "arXiv:2406.12718"
    needs_file: ClassVar[bool] = True  # the matcher

    alpha: float = 2.0
    beta: float = 0.5
    matcher: str = BLIP
    layer: int = 6
    part: float = 0.5
    branch: str | None = None
    parity: str = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not number(self.alpha, 0, 1e3):
            raise ValueError(f"alpha={self.alpha!r}: a number from 0 on, the weight of the second prompt")
        if not number(self.beta, 0, 1):
            raise ValueError(f"beta={self.beta!r}: a share from 0 to 1 of the likeliest token's probability")
        if not isinstance(self.matcher, str) or not self.matcher:
            raise ValueError(f"matcher={self.matcher!r}: a folder or Hub id of a BLIP matcher, such as {BLIP}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"layer={self.layer!r}: a layer of the matcher's text encoder, from 0 on")
        if not number(self.part, 0, 1) or not self.part:
            raise ValueError(f"part={self.part!r}: a share in (0, 1] of the visual tokens, for matcher=self")
        if pruner_of(self.branch) is not None and self.matcher == SELF:
            raise ValueError(f"branch={self.branch!r}: matcher=self chooses the second prompt's tokens already")

    @classmethod
    def needs(cls, family: Family) -> dict[str, Any]:
        """The model's own attention, where a picture may come in several pieces."""
        return {"matcher": SELF} if family.crops or family.tiles else {}

    def check(self, family: Family) -> None:
        """Raise NotImplementedError where the matcher cannot see a picture as a whole."""
        super().check(family)
        if self.matcher != SELF and not self.neutral and self.needs(family):
            raise NotImplementedError(
                f"agla: the matcher sees pictures in one piece, and {family.name} cuts them; agla:matcher=self goes "
                "by the model's own attention instead"
            )

    @property
    def neutral(self) -> bool:
        """Nothing is added, and nothing ruled out."""
        return self.alpha == self.beta == 0

    def combine(self, logits: Tensor, branch: Tensor) -> Tensor:
        """Scores from the logits of the picture and of its part. [B, V] each"""
        return plausible(logits + self.alpha * branch, logits, self.beta)

    def install(self, patch: Patch) -> None:
        """Door 4. Raises ValueError for a folder that holds no BLIP."""
        if self.matcher == SELF:
            decoder, glance = patch.base.get_decoder(), Glance()
            attends = attending_layers(decoder)
            whole = [n for n in attends if window_of(decoder.config, n) is None] or attends
            middle = min(whole, key=lambda n: abs(n - len(decoder.layers) // 2))
            AttendedDoor(patch, AttendedBranch(self, glance), float(self.part), middle, glance)
            return
        check_folder(self.matcher)
        frames = int(getattr(patch.model.config.vision_config, "temporal_patch_size", 1))
        reader = Reader(patch.model, self.matcher, self.layer)
        pruner = pruner_of(self.branch)
        if pruner is not None:
            pruner.check(patch.family)
        PicturesDoor(patch, LocalBranch(self, reader, patch.tower.merge, frames), pruner)

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """The tower again, and the prompt through the decoder again. The matcher, a model of its own, is left out."""
        if self.neutral:
            return 0
        if self.matcher != SELF:
            return branch_flops(picture, text, model, pruner_of(self.branch))
        attends = [layer for layer in model.decoder.layers if isinstance(layer.mixer, Attention)]
        row = 2 * attends[len(attends) // 2].statistic(1, picture.span + text)
        return row + prompt_flops(self._kept(picture, model), text, model)

    def step_flops(self, picture: Picture, text: int, model: Sizes, step: int) -> int:
        """The branch's token."""
        return 0 if self.neutral else int(model.decoder.token(self._kept(picture, model) + text + step))

    def _kept(self, picture: Picture, model: Sizes) -> int:
        """Visual tokens of the branch."""
        if self.matcher == SELF:
            return budget(float(self.part), picture.tokens)
        return kept_of(picture, model, pruner_of(self.branch))
