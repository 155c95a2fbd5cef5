"""Compare the methods with golden files: inputs and outputs of the authors' own code.

    python scripts/parity.py ../shared/golden            # every set in the folder
    python scripts/parity.py ../shared/golden hiprune    # some of them

One line a set, `name: passed/total`; sets without a method here are listed as such. Exit 1 when a case falls short,
2 when the folder or a file in it is unusable. The comparison runs the functions that production runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast.adapters.pruning.fastervlm import FasterVLM
from vlmfast.adapters.pruning.hiprune import HiPrune, hierarchical
from vlmfast.attention import column_mean
from vlmfast.families import window_to_raster
from vlmfast.visual import VisualTokens, window_order

sys.path.insert(0, str(Path(__file__).parent))  # scripts are no package
import canvas  # noqa: E402
import parity_attention  # noqa: E402
import parity_decoding  # noqa: E402
import parity_layers  # noqa: E402
import parity_scores  # noqa: E402
import parity_selection  # noqa: E402
import parity_tuning  # noqa: E402

TOLERANCE = 1e-5
Case = dict[str, Any]
Arrays = Callable[[str], Tensor]
Checks = Iterator[tuple[str, Tensor, Tensor]]


def hiprune(case: Case, array: Arrays) -> Checks:
    """Scores from q and k, anchors, buffers, registers, kept indices, anyres order, and the Qwen window order."""
    hyper = case["hyper"]
    yield from _hiprune_qwen(hyper, array) if hyper["kind"] == "qwen2_5_vl" else _hiprune_clip(hyper, array)


def _hiprune_clip(hyper: dict[str, Any], array: Arrays) -> Checks:
    q, k = array("in_{}_q"), array("in_{}_k")
    if hyper["layers_stored"] == "all 24":
        object_layer, deep_layer = hyper["object_layer_1based"] - 1, hyper["deep_layer_index_0based"]
    else:
        object_layer, deep_layer = 0, 1
    objects = column_mean(q[object_layer], k[object_layer], 1.0)[:, 1:]
    deep = column_mean(q[deep_layer], k[deep_layer], 1.0)[:, 1:]
    yield "score_object", objects, array("out_{}_score_object")
    yield "score_deep", deep, array("out_{}_score_deep")
    kept = []
    for view in range(hyper["views"]):
        choice = hierarchical(
            objects[view], deep[view], hyper["budget_per_view"], hyper["alpha"], tuple(hyper["grid"]), official=True
        )
        yield f"anchors {view}", choice.anchors, array(f"out_{{}}_anchors_desc_v{view}")
        yield f"buffers {view}", choice.anchor_buffer, array(f"out_{{}}_anchor_buffer_v{view}")
        yield f"registers {view}", choice.registers, array(f"out_{{}}_registers_desc_v{view}")
        visual = _visual(tuple(hyper["grid"]), objects.shape[1] + 1, objects=objects[view], deep=deep[view])
        method = HiPrune(keep=hyper["budget_per_view"], alpha=hyper["alpha"], parity="official")
        kept.append(method.choose(visual).kept)
    yield "kept", torch.stack(kept), array("out_{}_kept")
    if "crops_wh" in hyper:
        yield from _sequence(hyper, torch.stack(kept), array)


def _hiprune_qwen(hyper: dict[str, Any], array: Arrays) -> Checks:
    q, k = array("in_{}_q"), array("in_{}_k")
    rows, columns = hyper["merged_grid"]
    order = window_order((1, rows, columns), 4)
    yield "window_index", order, array("out_{}_window_index")
    yield "reverse_index", order.argsort(), array("out_{}_reverse_index")
    patches = q.shape[2]
    objects, deep = (window_to_raster(column_mean(q[i : i + 1], k[i : i + 1], 1.0)[0], order, 2) for i in (0, 1))
    yield "score_object", objects * patches, array("out_{}_score_object")
    yield "score_deep", deep * patches, array("out_{}_score_deep")
    budget, alpha = hyper["budget"], hyper["alpha"]
    choice = hierarchical(objects * patches, deep * patches, budget, alpha, (rows, columns), official=True)
    yield "anchors", choice.anchors, array("out_{}_anchors_desc")
    yield "buffers", choice.anchor_buffer, array("out_{}_anchor_buffer")
    yield "registers", choice.registers, array("out_{}_registers_desc")
    visual = _visual((rows, columns), patches, objects=objects, deep=deep)
    method = HiPrune(keep=budget, alpha=alpha, parity="official")
    yield "kept", method.choose(visual).kept, array("out_{}_kept")
    before, after = hyper["text_prefix"], hyper["text_suffix"]
    n = rows * columns
    sequence = torch.cat([torch.arange(before), before + choice.kept, before + n + torch.arange(after)])
    yield "sequence", sequence, array("out_{}_kept_sequence_positions")


def fastervlm(case: Case, array: Arrays) -> Checks:
    """Scores, kept indices per view or frame, and the anyres order."""
    hyper, attention = case["hyper"], array("in_{}_cls_attn")
    score = attention.mean(dim=-2)
    score = score[0] if hyper["kind"] == "video" else score
    yield "score", score, array("out_{}_score")
    budget = next(value for name, value in hyper.items() if name.startswith("visual_token_num"))
    grid, method = tuple(hyper["grid"]), FasterVLM(keep=budget)
    kept = torch.stack([method.choose(_visual(grid, len(s) + 1, attention=s)).kept for s in score])
    yield "kept", kept, array("out_{}_kept")
    if hyper["kind"].startswith("anyres"):
        yield from _sequence(hyper, kept, array)


def _visual(grid: tuple[int, int], queries: int, **scores: Tensor) -> VisualTokens:
    """One image or view that has nothing but scores."""
    rows, columns = grid
    return VisualTokens(torch.empty(rows * columns, 1), (1, rows, columns), queries, scores=scores)


def _sequence(hyper: dict[str, Any], kept: Tensor, array: Arrays) -> Checks:
    """Order of the kept tokens of all views in the prompt; kept: [views, budget]."""
    size = tuple(hyper["image_size_wh"]) if "image_size_wh" in hyper else None
    view, token = canvas.canvas_order(tuple(hyper["crops_wh"]), hyper["grid"][0], size)
    mask = torch.zeros(len(kept), hyper["grid"][0] ** 2, dtype=torch.bool).scatter_(1, kept, True)
    stays = (token < 0) | mask[view, token]
    yield "seq_view", view[stays], array("out_{}_seq_view")
    yield "seq_token", token[stays], array("out_{}_seq_token")


SETS: dict[str, Callable[[Case, Arrays], Checks]] = {
    "fastervlm": fastervlm,
    "hiprune": hiprune,
    **parity_attention.SETS,
    **parity_decoding.SETS,
    **parity_layers.SETS,
    **parity_scores.SETS,
    **parity_selection.SETS,
    **parity_tuning.SETS,
}


def compare(folder: Path, name: str) -> tuple[int, list[str]]:
    """Run one set. -> (number of cases, one line for each case that fell short)"""
    described = json.loads((folder / f"{name}.json").read_text())
    failures = []
    with np.load(folder / f"{name}.npz") as arrays:
        cases = described["cases"]
        if isinstance(cases, dict):  # one case, whose arrays have no prefix
            cases = [{"case": name, "hyper": cases}]
        for case in cases:

            def array(pattern: str, key: str = case["case"]) -> Tensor:
                return torch.from_numpy(arrays[pattern.format(key)])

            bad = [what for what, ours, theirs in SETS[name](case, array) if not equal(ours, theirs)]
            if bad:
                failures.append(f"{name}/{case['case']}: {', '.join(bad)} differ")
    return len(cases), failures


def equal(ours: Tensor, theirs: Tensor) -> bool:
    """Exact for indices, to 1e-5 for values, of the same shape always."""
    if ours.shape != theirs.shape:
        return False
    if theirs.is_floating_point():
        return torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    return torch.equal(ours.long(), theirs.long())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. -> exit code"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of NAME.npz + NAME.json")
    parser.add_argument("names", nargs="*", help="sets to compare (default: all in the folder)")
    options = parser.parse_args(arguments)
    there = sorted(path.stem for path in options.folder.glob("*.json") if path.with_suffix(".npz").exists())
    if not there:
        print(f"{options.folder}: no golden set (NAME.npz with NAME.json)", file=sys.stderr)
        return 2
    unknown = sorted(set(options.names) - set(there))
    if unknown:
        print(f"{options.folder} has no {', '.join(unknown)}; it has {', '.join(there)}", file=sys.stderr)
        return 2
    short = False
    for name in options.names or there:
        if name not in SETS:
            print(f"{name}: no method here yet")
            continue
        try:
            total, failures = compare(options.folder, name)
        except (EOFError, KeyError, OSError, ValueError) as error:
            print(f"{options.folder / name}: unusable golden set: {error!r}", file=sys.stderr)
            return 2
        print(f"{name}: {total - len(failures)}/{total}")
        for line in failures:
            print(f"  {line}", file=sys.stderr)
        short = short or bool(failures)
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
