"""Which runs an evaluation makes: specs crossed with keeps, or `keep` solved so that all runs cost the same.

The cost that is matched is the unpatched prefill's share: FLOPs until the first token, vision tower and selection
included.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vlmfast.adapters import ADAPTERS, from_spec, support, to_spec
from vlmfast.eval.prompts import Prompts
from vlmfast.eval.tasks import Doc, image
from vlmfast.families import family_of
from vlmfast.processors import load_processor
from vlmfast.solving import nominal, share_of, solve_keep, with_keep
from vlmfast.towers import Picture
from vlmfast.visual import check_keep

GOALS = ("flops",)  # what runs can be matched by
ALL = "all"  # in place of a spec: every method
NONE = "none"  # the model as it is
PLAIN = "random"  # pruning that computes nothing: what a keep costs by itself


@dataclass
class Plan:
    """The runs of one model. matched: spec -> share of the unpatched prefill FLOPs that its keep was solved for."""

    runs: list[str]
    matched: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan(
    config: Any,
    specs: Sequence[str],
    keeps: Sequence[float | int],
    shares: Sequence[float],
    match: str | None,
    usual: Callable[[], tuple[int, Picture]],
    *,
    counted: bool = True,
) -> Plan:
    """The runs of a model of this config, the unpatched one first.

    shares: of the unpatched prefill FLOPs, instead of `keeps`. match: "flops": every keep stands for the share that
    pruning so much costs by itself. usual: (text tokens, picture) of a prompt that the shares are solved for. counted:
    as in `expand_flops`. Errors as in `expand` and `expand_flops`.
    """
    check_goal(match)
    asked = named(specs, family_of(config).name)
    if not (shares or match):
        return Plan(list(expand(list(asked), keeps)))
    text, picture = usual()
    notes: list[str] = []
    if not shares:
        shares, notes = shares_of(keeps, config, text, picture)
    found = expand_flops(asked, shares, config, text, picture, counted=counted)
    found.notes[:0] = notes
    return found


def check_goal(goal: str | None) -> None:
    """ValueError for what runs cannot be matched by."""
    if goal is not None and goal not in GOALS:
        raise ValueError(f"runs cannot be matched by {goal!r}; there is {', '.join(GOALS)}")


def shares_of(keeps: Sequence[float | int], config: Any, text: int, picture: Picture) -> tuple[list[float], list[str]]:
    """What pruning at these keeps costs by itself, as shares of the unpatched prefill FLOPs. -> (shares, notes)

    That of a method which computes nothing to choose (`random`). A keep that drops nothing of the picture gives none:
    there is nothing to be matched.
    """
    shares, notes = [], []
    for keep in keeps:
        share = share_of(config, from_spec(f"{PLAIN}:keep={keep!r}"), picture, text)
        if share < 1:
            shares.append(share)
        else:
            notes.append(f"keep {keep} drops no token: nothing to be matched at the cost of the unpatched model")
    if not shares:
        raise ValueError("no keep that drops tokens: give --keep such as 0.5,0.25 to match the cost of")
    return list(dict.fromkeys(shares)), notes


def usual_prompt(
    config: Any, folder: Path, tasks: Mapping[str, Any], documents: Mapping[str, Sequence[Doc]]
) -> tuple[int, Picture]:
    """(text tokens, picture) of a usual prompt of these tasks on a model: the median text, the first scene's size."""
    prompts = Prompts(load_processor(folder), torch.device("cpu"), torch.float32)
    token = getattr(config, family_of(config).sources["image"].token)
    docs = [doc for some in documents.values() for doc in some]
    rows = [prompts.row(tasks[doc.task].prompt(doc), image(doc))["input_ids"] for doc in docs]
    span = int((rows[0] == token).sum())
    text = round(median(int((row != token).sum()) for row in rows))
    grid = prompts.pictures([image(docs[0])]).get("image_grid_thw")
    patches = nominal(config).patches if grid is None else tuple(grid[0].tolist())
    return text, Picture(patches=patches, tokens=span, span=span)


def named(specs: Sequence[str], family: str) -> dict[str, bool]:
    """The specs for one family, "all" taken apart. -> spec: whether it was named itself

    "all" stands for every method that works on images of the family, with the settings it needs there, but those that
    need a file made first.
    """
    found: dict[str, bool] = {}
    for spec in specs:
        if spec.strip() != ALL:
            found[spec] = True
            continue
        for name, cls in ADAPTERS.items():
            answer = support(name, family)
            works = answer.reason is None and not cls.needs_file
            if works and "image" in getattr(cls, "modalities", ("image",)):
                settings = ",".join(f"{key}={value}" for key, value in answer.needs.items())
                found.setdefault(f"{name}:{settings}" if settings else name, False)
    return found


def expand(specs: Sequence[str], keeps: Sequence[float | int]) -> tuple[str, ...]:
    """All runs: "none", then every spec in its canonical form, crossed with `keeps` where it leaves `keep` open.

    ValueError or TypeError for a misspelt spec or a keep that cannot be.
    """
    for keep in keeps:
        check_keep(keep)
    runs = [NONE]
    for spec in specs:
        parts = spec.split("+")
        open_keep = [i for i, part in enumerate(parts) if leaves_keep_open(part)]
        if open_keep and not keeps:
            raise ValueError(
                f"{spec!r} needs a keep: give a list of them, or name it as in {parts[open_keep[0]]}:keep=0.5"
            )
        if not open_keep:
            runs.append(to_spec(from_spec(spec)))
            continue
        for keep in keeps:
            filled = list(parts)
            for i in open_keep:
                filled[i] += f"{',' if ':' in parts[i] else ':'}keep={keep!r}"
            runs.append(to_spec(from_spec("+".join(filled))))
    return tuple(dict.fromkeys(runs))


def expand_flops(
    specs: Mapping[str, bool],
    shares: Sequence[float],
    config: Any,
    text: int,
    picture: Picture,
    *,
    counted: bool = True,
) -> Plan:
    """All runs of one model: "none", then every spec at every share of the unpatched prefill FLOPs.

    specs: from `named`. shares: in (0, 1], of a prompt with `text` text tokens and this picture. A spec that names its
    keep runs as it is; others get the `keep` that comes nearest to the share, as a number of tokens if `counted`
    (pictures of one size) and as a share of them otherwise. Where a method cannot reach a share there is no run: a
    ValueError for a spec that was named itself, a note for one of "all".
    """
    found = Plan([NONE])
    for spec, by_name in specs.items():
        adapters = from_spec(spec)
        if not any(leaves_keep_open(part) for part in spec.split("+")):
            if not by_name:
                found.notes.append(f"no run of {spec}: it drops no tokens, so that no share can be reached")
                continue
            found.runs.append(to_spec(adapters))
            continue
        for share in shares:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the table shows the share that each run really had
                try:
                    keep = solve_keep(config, adapters, share, text=text, picture=picture)
                except ValueError as error:
                    if by_name:
                        raise ValueError(f"{spec}: {error}") from None
                    found.notes.append(f"no run of {spec}: {error}")
                    continue
            # A number says more than a share, but methods in a row each take their share of what the last one left.
            alone = sum("keep" in adapter.settings() for adapter in adapters) == 1
            whole = max(1, round(keep * picture.tokens)) if counted and alone and keep < 1 else keep
            solved = to_spec(with_keep(adapters, whole))
            found.runs.append(solved)
            found.matched.setdefault(solved, share)
    found.runs = list(dict.fromkeys(found.runs))
    return found


def leaves_keep_open(part: str) -> bool:
    """Whether one method of a spec drops tokens, has a setting `keep`, and the spec does not name it."""
    named = part.partition(":")[2].split(",")
    return any(adapter.drops and "keep" in adapter.settings() for adapter in from_spec(part)) and not any(
        setting.split("=")[0].strip() == "keep" for setting in named
    )
