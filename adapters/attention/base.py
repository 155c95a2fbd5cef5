"""AttentionEdit: the base of the methods that redistribute the attention of decoder layers (door 3)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.adapter import ATTENTION, Adapter
from vlmfast.branches import BranchDoor, ImageFreeBranch
from vlmfast.decoders import Attention, Sizes
from vlmfast.edits import Call, EditsDoor, attending_layers
from vlmfast.layers.tokens import Placed
from vlmfast.patching import Patch
from vlmfast.ranges import DEEP, which
from vlmfast.towers import Picture


def attending(model: Sizes) -> list[int]:
    """The decoder layers that have attention."""
    return [n for n, layer in enumerate(model.decoder.layers) if isinstance(layer.mixer, Attention)]


def _heads_file(path: str) -> dict[int, tuple[int, ...]]:
    """Heads by layer from a JSON file {"layer": [head, ...]}."""
    try:
        content = json.loads(Path(path).read_text())
        found = {int(layer): tuple(sorted({int(head) for head in heads})) for layer, heads in content.items()}
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"heads={path!r}: neither heads joined by slashes (0/4/5) nor a JSON file "
            f'{{"layer": [head, ...]}}: {error}'
        ) from error
    if any(min(heads, default=0) < 0 for heads in found.values()):
        raise ValueError(f"heads={path!r}: layers and heads are counted from 0")
    return found


@dataclass(frozen=True, kw_only=True)
class AttentionEdit(Adapter):
    """Redistribute the attention of some decoder layers, in prefill and decoding.

    layers: "all", numbers (negative: from the end) and ranges as Python slices them, joined by slashes: "2:-1",
    "1/-14:". Layers of a hybrid decoder that have no attention are left out of ranges. One method edits a layer.

    A method implements `edit`, `neutral` (settings under which it changes nothing: nothing is installed then), and
    `marks` when it needs to know more of visual tokens than that they are some.
    """

    kind: ClassVar[str] = "attention"
    door: ClassVar[int] = ATTENTION
    needs_visual: ClassVar[bool] = True
    compares: ClassVar[bool] = False
    layers: str | int = "all"

    def __post_init__(self) -> None:
        which(self.layers, DEEP)  # how it is written; what it means depends on the decoder
        parity = getattr(self, "parity", "repaired")
        if parity not in ("repaired", "official"):
            raise ValueError(f"parity={parity!r}: choose 'repaired' or 'official'")

    @property
    def neutral(self) -> bool:
        """Whether these settings change nothing."""
        raise NotImplementedError(f"{type(self).__name__} does not implement neutral")

    @property
    def edits(self) -> bool:
        """Whether they change any attention; a method may do something else beside."""
        return not self.neutral

    def where(self, attends: Sequence[int], depth: int) -> Sequence[int]:
        """The layers to edit, of those that attend. Raises ValueError where there are none."""
        chosen, named = which(self.layers, depth)
        without = [layer for layer in named if layer not in attends]
        if without:
            raise ValueError(f"{self.name}: layers {'/'.join(map(str, without))} have no attention to edit")
        found = [layer for layer in chosen if layer in attends]
        if not found:
            raise ValueError(f"{self.name}: layers={self.layers!r} are none of this decoder's {depth}")
        return found

    def marks(self, picture: Placed) -> Mapping[str, Tensor]:
        """What the method wants to know of each token of a picture, [n] by name: `Call.marks` hands it out."""
        return {}

    def edit(self, call: Call) -> Tensor:
        """The attention of one call, edited. -> [B, H, Q, d]"""
        raise NotImplementedError(f"{type(self).__name__} does not implement edit")

    def attach(self, patch: Patch) -> None:
        """Install door 3 where attention changes. Raises ValueError for layers or heads that there are not."""
        decoder = patch.base.get_decoder()
        layers = self.where(attending_layers(decoder), len(decoder.layers))
        self.check_decoder(patch.model.config.get_text_config(), layers)
        if self.edits:
            EditsDoor.of(patch).add(self)

    def check_decoder(self, text: Any, layers: Sequence[int]) -> None:
        """Raise ValueError where the settings do not fit the decoder. text: its config; layers: to be edited."""


@dataclass(frozen=True, kw_only=True)
class HeadEdit(AttentionEdit):
    """An edit of some query heads.

    heads: numbers joined by slashes ("0/4/5", in every edited layer), or the path of a JSON file {"layer": [head,
    ...]}, of whose layers those in `layers` are edited; None: all heads.
    """

    heads: str | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heads_of(0)

    @functools.cached_property
    def _heads(self) -> tuple[int, ...] | dict[int, tuple[int, ...]] | None:
        """The heads of every layer, or by layer, as the file had them when this was made; None: all."""
        if self.heads is None:
            return None
        text = str(self.heads)
        if all(piece.strip().isdigit() for piece in text.split("/")):
            return tuple(sorted({int(piece) for piece in text.split("/")}))
        return _heads_file(text)

    def heads_of(self, layer: int) -> tuple[int, ...] | None:
        """The heads to edit in a layer, ascending; None: all."""
        return self._heads.get(layer, ()) if isinstance(self._heads, dict) else self._heads

    def where(self, attends: Sequence[int], depth: int) -> Sequence[int]:
        """As `AttentionEdit.where`, without the layers of which no head is to be edited."""
        found = [layer for layer in super().where(attends, depth) if self.heads_of(layer) != ()]
        if not found:
            raise ValueError(f"{self.name}: heads={self.heads!r} names no head of layers={self.layers!r}")
        return found

    def check_decoder(self, text: Any, layers: Sequence[int]) -> None:
        """Raise ValueError for heads that there are not."""
        for layer in layers:
            if max(self.heads_of(layer) or (0,)) >= text.num_attention_heads:
                raise ValueError(
                    f"{self.name}: heads={self.heads!r}: the decoder has heads 0 to {text.num_attention_heads - 1}"
                )

    def statistic(self, model: Sizes, rows: float, keys: float) -> int:
        """X2 of the scores of some rows over some keys, of the heads that are edited in all edited layers."""
        if self.neutral:
            return 0
        total = 0.0
        for number in self.where(attending(model), len(model.decoder.layers)):
            layer, heads = model.decoder.layers[number], self.heads_of(number)
            assert isinstance(layer.mixer, Attention)
            total += layer.statistic(rows, keys) * (1 if heads is None else len(heads) / layer.mixer.heads)
        return round(total)

    def picked(self, call: Call) -> Tensor | None:
        """The heads to edit in a call. int64 [n], None: all"""
        heads = self.heads_of(call.layer)
        return None if heads is None else torch.tensor(heads, device=call.query.device)


class Boost(AttentionEdit):
    """What PAI and PAINT share: higher scores in the rows that decide on a token, beside a contrast with `gamma`.

    A method has the settings gamma and plausibility, and says whether it `edits` at all: whether any score rises.
    """

    gamma: float
    plausibility: float

    @property
    def neutral(self) -> bool:
        """No boost and no contrast."""
        return not self.edits and self.gamma == 1

    @property
    def branch(self) -> ImageFreeBranch:
        """The image-free prompt and what becomes of its logits."""
        return ImageFreeBranch(self.name, self.gamma, self.plausibility)

    def attach(self, patch: Patch) -> None:
        """Install door 3 where a score rises, and door 4 where there is a contrast."""
        super().attach(patch)
        if self.gamma != 1:
            BranchDoor(patch, self.branch)

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """The last row again in every edited layer, and the image-free prompt through the decoder."""
        layers = model.decoder.layers
        edited = self.where(attending(model), len(layers)) if self.edits else ()
        rows = sum(2 * layers[layer].statistic(1, picture.span + text) for layer in edited)
        return rows + (self.branch.prefill_flops(text, model) if self.gamma != 1 else 0)

    def step_flops(self, picture: Picture, text: int, model: Sizes, step: int) -> int:
        """The branch's token."""
        return int(model.decoder.token(text + step)) if self.gamma != 1 else 0
