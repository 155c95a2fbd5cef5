"""Pruner: the base of the methods that choose visual tokens before the language model (door 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.adapter import Adapter
from vlmfast.families import Family, Positions, Tower
from vlmfast.inputs import Door
from vlmfast.patching import ImageReport, Patch
from vlmfast.towers import Picture
from vlmfast.visual import Choice, Score, View, VisualTokens, apportion, budget, check_keep, is_video


@dataclass(frozen=True, kw_only=True)
class Budgeted(Adapter):
    """What all methods share that drop visual tokens, before the language model or inside it.

    keep: a float in (0, 1] is the share of a picture's visual tokens, an int their number per picture. positions:
    "original" keeps the position ids of kept tokens, "compact" renumbers without gaps; None: what the official code
    does. `modalities`: what the method prunes. `parity`, where a method has it, is "repaired" or "official".
    """

    kind: ClassVar[str] = "pruning"
    drops: ClassVar[bool] = True
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    keep: float | int = 0.5
    positions: Positions | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.positions not in (None, "original", "compact"):
            raise ValueError(f"positions={self.positions!r}: choose 'original' or 'compact'")
        parity = getattr(self, "parity", "repaired")
        if parity not in ("repaired", "official"):
            raise ValueError(f"parity={parity!r}: choose 'repaired' or 'official'")

    @classmethod
    def unsupported(cls, family: Family) -> str | None:
        """A method for videos has nothing to do where a family takes none."""
        if any(modality in family.sources for modality in cls.modalities):
            return None
        return f"it prunes {' and '.join(cls.modalities)}s, the family takes {' and '.join(family.sources)}s"


@dataclass(frozen=True, kw_only=True)
class Pruner(Budgeted):
    """Keep some of a picture's visual tokens, before the language model.

    keep: of all its views together. positions: None is what the official codes do for the model family.

    A method implements `select`, and `wanted` when it needs statistics of the vision tower. A method for videos alone
    leaves images, and videos of a single frame, whole.
    """

    uses_text: ClassVar[bool] = False
    keeps_newlines: ClassVar[bool] = False

    @property
    def prefills_in_parts(self) -> bool:
        """What is chosen among a picture's tokens alone does not depend on the text behind them."""
        return not self.uses_text

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """Statistics of the vision tower the method needs, under its own names. Raises where it cannot work."""
        return {}

    def notes(self, tower: Tower) -> tuple[str, ...]:
        """What a user of this tower should read in the report."""
        return ()

    def remarks(self, pictures: Sequence[ImageReport]) -> tuple[str, ...]:
        """What a user should read in the report about the pictures of the last prompts."""
        whole = sum(not self._prunes(picture.views) for picture in pictures)
        return (f"{self.name}: prunes videos; {whole} still picture(s) kept whole",) if whole else ()

    def _prunes(self, views: Sequence[View]) -> bool:
        return "image" in self.modalities or is_video(views)

    def select(self, visual: VisualTokens) -> Tensor | Choice:
        """The visual tokens to keep: their indices in any order, int64 [budget(keep, N)], or a `Choice`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement select")

    def choose(self, visual: VisualTokens) -> Choice:
        """Kept tokens in the order of the prompt; all of them, untouched by the method, when nothing is to go."""
        if not self._prunes(visual.views) or budget(self.keep, len(visual)) == len(visual):
            return Choice(torch.arange(len(visual), device=visual.features.device))
        chosen = self.select(visual)
        return chosen if isinstance(chosen, Choice) else Choice(chosen.sort().values)

    def per_view(self, visual: VisualTokens, choose: Callable[[View, int], Tensor]) -> Tensor:
        """Share the budget out over the views by size and choose in each. -> int64 [budget(keep, N)]

        choose: (view, k) -> k indices into `view.index`.
        """
        shares = apportion(budget(self.keep, len(visual)), [len(view) for view in visual.views])
        chosen = [(view, choose(view, k)) for view, k in zip(visual.views, shares) if k]
        return torch.cat([view.index.to(kept.device)[kept] for view, kept in chosen])

    def beside_thumbnail(
        self, visual: VisualTokens, choose: Callable[[Tensor, int], Tensor], whole: bool = False
    ) -> Tensor:
        """Choose among all views together, the thumbnail apart from the others. -> int64 [budget(keep, N)]

        choose: (index [n] of tokens, view after view, k) -> k of these n, as positions in `index`. whole: the
        thumbnail stays whole and the others share the rest; otherwise both get their share by size.
        Raises ValueError when a thumbnail that is to stay whole exceeds the budget.
        """
        device, k = visual.features.device, budget(self.keep, len(visual))
        parts = [
            torch.cat([view.index.to(device) for view in views])
            for views in (
                [view for view in visual.views if view.kind == "thumbnail"],
                [view for view in visual.views if view.kind != "thumbnail"],
            )
            if views
        ]
        shares = apportion(k, [len(part) for part in parts])
        if whole and len(parts) == 2:
            if k < len(parts[0]):
                raise ValueError(
                    f"{self.name}: keep={self.keep} is {k} of {len(visual)} visual tokens, fewer than the thumbnail's "
                    f"{len(parts[0])}, which thumbnail=whole keeps; raise keep or leave thumbnail out"
                )
            shares = [len(parts[0]), k - len(parts[0])]
        return torch.cat([part[choose(part, share)] for part, share in zip(parts, shares) if share])

    def kept_of(self, picture: Picture) -> int:
        """Visual tokens that stay of a picture of this size: `keep`, unless the method promises more to some."""
        whole = picture.frames == 1 and "image" not in self.modalities
        return picture.tokens if whole else budget(self.keep, picture.tokens)

    def visual_per_layer(self, picture: Picture, depth: int) -> Sequence[int]:
        """The same in every layer. Newlines go as soon as a token goes, unless the method keeps them."""
        kept = self.kept_of(picture)
        newlines = picture.span - picture.tokens if self.keeps_newlines or kept == picture.tokens else 0
        return [kept + newlines] * depth

    def attach(self, patch: Patch) -> None:
        """Install door 1. Two pruners would each rewrite what the other rewrote: refused."""
        if any(isinstance(one, Door) for one in patch.reporters):
            raise NotImplementedError("two pruning methods before the language model cannot be combined: choose one")
        Door(patch, self, self.positions)


@dataclass(frozen=True, kw_only=True)
class ClsPruner(Pruner):
    """A method that follows the CLS token of the vision tower, and needs a substitute on a tower without one.

    fallback: name of the substitute, used on such a tower alone and said in the report; None: the tower is refused.
    """

    substitute: ClassVar[tuple[str, str]] = ("received", "the attention received from all patches")
    fallback: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fallback not in (None, self.substitute[0]):
            raise ValueError(f"fallback={self.fallback!r}: choose {self.substitute[0]!r} or leave it out")

    @classmethod
    def needs(cls, family: Family) -> dict[str, Any]:
        """The fallback, where the tower has no CLS."""
        return {} if family.cls else {"fallback": cls.substitute[0]}

    def follows_cls(self, tower: Tower) -> bool:
        """Whether there is a CLS token; False: the fallback is at work. Raises NotImplementedError without either."""
        if not tower.has_cls and self.fallback is None:
            word, what = self.substitute
            raise NotImplementedError(
                f"{self.name} needs a CLS token, and this vision tower has none; {self.name}:fallback={word} uses "
                f"{what} instead"
            )
        return tower.has_cls

    def notes(self, tower: Tower) -> tuple[str, ...]:
        """Say when the fallback is at work."""
        return () if tower.has_cls else (f"{self.name}: no CLS in this tower, {self.substitute[1]} used instead",)
