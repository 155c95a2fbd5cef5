"""Methods at equal cost: `keep` solved so that every run has the same share of the unpatched prefill FLOPs."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig

from vlmfast.adapters import ADAPTERS, from_spec, support, to_spec
from vlmfast.eval.prompts import Prompts
from vlmfast.eval.tasks import Doc, image
from vlmfast.families import family_of
from vlmfast.processors import load_processor
from vlmfast.solving import nominal, solve_keep, with_keep
from vlmfast.towers import Picture


def usual_prompt(
    folder: Path, tasks: Mapping[str, Any], documents: Mapping[str, Sequence[Doc]]
) -> tuple[int, Picture]:
    """(text tokens, picture) of a usual prompt of these tasks on a model: the median text, the first scene's size."""
    config = AutoConfig.from_pretrained(folder)
    prompts = Prompts(load_processor(folder), torch.device("cpu"), torch.float32)
    token = getattr(config, family_of(config).sources["image"].token)
    docs = [doc for some in documents.values() for doc in some]
    rows = [prompts.row(tasks[doc.task].prompt(doc), image(doc))["input_ids"] for doc in docs]
    span = int((rows[0] == token).sum())
    text = round(median(int((row != token).sum()) for row in rows))
    grid = prompts.pictures([image(docs[0])]).get("image_grid_thw")
    patches = nominal(config).patches if grid is None else tuple(grid[0].tolist())
    return text, Picture(patches=patches, tokens=span, span=span)


ALL = "all"  # in place of a spec: every method


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


def expand_flops(
    specs: Mapping[str, bool],
    shares: Sequence[float],
    folder: Path,
    tasks: Mapping[str, Any],
    documents: Mapping[str, Sequence[Doc]],
) -> tuple[tuple[str, ...], list[str]]:
    """All runs of one model: "none", then every spec at every share of the unpatched prefill FLOPs. -> (runs, notes)

    specs: from `named`. shares: in (0, 1], vision tower and selection included. A spec that names its keep runs as it
    is; others get `keep` as a number of tokens, the nearest that reaches the share. Where a method cannot reach a
    share there is no run: a ValueError for a spec that was named itself, a note for one of "all".
    """
    config = AutoConfig.from_pretrained(folder)
    text, picture = usual_prompt(folder, tasks, documents)
    runs, notes = ["none"], []
    for spec, by_name in specs.items():
        adapters = from_spec(spec)
        if not any(leaves_keep_open(part) for part in spec.split("+")):
            if not by_name:
                notes.append(f"no run of {spec}: it drops no tokens, so that no share can be reached")
                continue
            runs.append(to_spec(adapters))
            continue
        for share in shares:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the table shows the share that each run really had
                try:
                    keep = solve_keep(config, adapters, share, text=text, picture=picture)
                except ValueError as error:
                    if by_name:
                        raise ValueError(f"{spec}: {error}") from None
                    notes.append(f"no run of {spec}: {error}")
                    continue
            # A number says more than a share, but methods in a row each take their share of what the last one left.
            alone = sum("keep" in adapter.settings() for adapter in adapters) == 1
            whole = max(1, round(keep * picture.tokens)) if alone and keep < 1 else keep
            runs.append(to_spec(with_keep(adapters, whole)))
    return tuple(dict.fromkeys(runs)), notes


def leaves_keep_open(part: str) -> bool:
    """Whether one method of a spec drops tokens, has a setting `keep`, and the spec does not name it."""
    named = part.partition(":")[2].split(",")
    return any(adapter.drops and "keep" in adapter.settings() for adapter in from_spec(part)) and not any(
        setting.split("=")[0].strip() == "keep" for setting in named
    )
