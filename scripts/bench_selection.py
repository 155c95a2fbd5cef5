"""Measure what choosing tokens costs: every method that selects before the language model, on made-up pictures.

python scripts/bench_selection.py
python scripts/bench_selection.py --methods hiprune divprune --repeats 50 --threads 1 --out results/selection.json

Times `choose` alone: features and statistics of the vision tower are there already. An image of one view (576 tokens)
and one of five (2,880: a thumbnail and 2 x 2 crops), methods for videos on 16 and 80 frames of 36 tokens; the shapes
are those of LLaVA-1.5-7B, the statistics like CLIP's: smooth over the grid with a common direction, attention with a
heavy tail. Beside each a straightforward reading of its paper (scripts/selection_references.py), which must keep the
same tokens: exit 1 where one does not. With one thread the clock is process time, with more it is wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vlmfast.adapters import ADAPTERS
from vlmfast.adapters.pruning.base import Pruner
from vlmfast.families import did_you_mean
from vlmfast.towers import Tower
from vlmfast.visual import Score, View, VisualTokens

sys.path.insert(0, str(Path(__file__).parent))  # scripts are no package
from selection_references import REFERENCES  # noqa: E402

TOWER = Tower(depth=24, heads=16, feature_layer=22, full_layers=tuple(range(24)), has_cls=True)  # CLIP-L
SIZES = {"576 -> 64": (1, 64), "2880 -> 320": (5, 320)}  # views, tokens kept
PRUNERS = sorted(name for name, cls in ADAPTERS.items() if issubclass(cls, Pruner))


def smooth(generator: torch.Generator, frames: int, side: int, width: int) -> Tensor:
    """Vectors that change smoothly over a grid, with noise, a common direction and a few large channels. [F, n, C]"""
    coarse = torch.randn(frames, width, max(2, side // 4), max(2, side // 4), generator=generator)
    field = nn.functional.interpolate(coarse, (side, side), mode="bilinear").flatten(2).transpose(1, 2)
    noise = torch.randn(frames, side * side, width, generator=generator)
    common = torch.randn(width, generator=generator)
    scale = torch.ones(width)
    scale[torch.randint(width, (4,), generator=generator)] = 8
    return (field + 0.5 * noise + 0.7 * common) * scale


def picture(views: int, wanted: dict[str, Score], video: bool, seed: int, width: int = 4096) -> VisualTokens:
    """A picture of `views` times 576 tokens, with the statistics a method wants. width: D of the language model."""
    generator = torch.Generator().manual_seed(seed)
    frames, side = (views * 16, 6) if video else (views, 24)
    n = side * side
    with torch.no_grad():
        first, second = nn.Linear(1024, width), nn.Linear(width, width)
        for layer in (first, second):
            layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
    project = nn.Sequential(first, nn.GELU(), second).requires_grad_(False)
    hidden = smooth(generator, frames, side, 1024).flatten(0, 1)
    statistics_: dict[str, Tensor] = {}
    for name, score in wanted.items():
        if score.kind == "hidden":
            statistics_[name] = hidden
        elif score.kind == "key":
            statistics_[name] = smooth(generator, frames, side, 64).flatten(0, 1)
        else:
            logits = 1.5 * smooth(generator, frames, side, 1)[..., 0]
            statistics_[name] = (logits.softmax(-1) if score.softmax else logits / 8).flatten()
    if video:
        parts = tuple(View(torch.arange(i * n, i * n + n), (side, side), "frame", (i, 0)) for i in range(frames))
    elif frames == 1:
        parts = (View(torch.arange(n), (side, side)),)
    else:
        cells = [(0, 0), *((i // 2, i % 2) for i in range(frames - 1))]
        parts = tuple(
            View(torch.arange(i * n, i * n + n), (side, side), "crop" if i else "thumbnail", cell)
            for i, cell in enumerate(cells)
        )
    return VisualTokens(
        features=project(hidden),
        grid=(1, side, side) if frames == 1 else (1, 1, frames * n),
        queries=n + 1,
        pixels=torch.randn(frames, 3, 14 * side, 14 * side, generator=generator),
        scores=statistics_,
        views=parts,
        text=torch.randn(24, width, generator=generator),
        project=project,
    )


def median_ms(run: Callable[[], Any], repeats: int, threads: int) -> float:
    """Median time of `repeats` runs after two to warm up, in milliseconds.

    One thread: the process's own time, which other programs on the machine hardly touch; more: wall time.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    times = []
    for i in range(repeats + 2):
        start = clock()
        run()
        if i >= 2:
            times.append(1e3 * (clock() - start))
    return statistics.median(times)


def measure(
    name: str,
    size: str,
    repeats: int,
    threads: Sequence[int],
    references: bool = True,
    seed: int = 0,
    width: int = 4096,
) -> dict[str, Any]:
    """One method on one size. -> row of the table: ms per number of threads, reference ms, whether they agree"""
    views, keep = SIZES[size]
    cls = ADAPTERS[name]
    method = cls(keep=keep)  # type: ignore[call-arg]
    assert isinstance(method, Pruner)
    video = method.modalities == ("video",)
    visual = picture(views, method.wanted(TOWER), video, seed, width)
    row: dict[str, Any] = {"method": name, "size": size, "ms": {}, "reference_ms": None, "equal": None}
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            for count in threads:
                torch.set_num_threads(count)
                row["ms"][count] = median_ms(lambda: method.choose(visual), repeats, count)
            if references and name in REFERENCES:
                torch.set_num_threads(threads[0])
                kept = method.choose(visual).kept.tolist()
                clock = time.process_time if threads[0] == 1 else time.perf_counter
                start = clock()
                theirs = REFERENCES[name](visual, method)
                row["reference_ms"] = 1e3 * (clock() - start)
                row["equal"] = kept == theirs
                row["differ"] = len(set(kept) - set(theirs))
    finally:
        torch.set_num_threads(before)
    return row


def table(rows: Sequence[dict[str, Any]], threads: Sequence[int]) -> Table:
    """What was measured, a line a method."""
    result = Table(title="choosing tokens, ms a picture (median); reference: one run of a straightforward reading")
    result.add_column("method", no_wrap=True)
    for size in SIZES:
        for count in threads:
            result.add_column(f"{size}\n{count} thread{'s' * (count > 1)}", justify="right")
        result.add_column("reference\nms", justify="right")
        result.add_column("same\ntokens")
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = [name]
        for size in SIZES:
            row = next((row for row in rows if row["method"] == name and row["size"] == size), None)
            if row is None:
                cells += [""] * (len(threads) + 2)
                continue
            cells += [f"{row['ms'][count]:.2f}" for count in threads]
            cells.append("-" if row["reference_ms"] is None else f"{row['reference_ms']:.1f}")
            cells.append({None: "-", True: "yes", False: f"{row.get('differ')} differ"}[row["equal"]])
        result.add_row(*cells)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. -> exit code"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=PRUNERS, metavar="NAME", help=f"of: {', '.join(PRUNERS)}")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="default: both")
    parser.add_argument("--repeats", type=int, default=20, help="runs the median is taken of (%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads (1 2)")
    parser.add_argument("--no-references", action="store_true", help="leave the straightforward readings out")
    parser.add_argument("--width", type=int, default=4096, help="of the language model's features (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up pictures (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file with the rows")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.methods if name not in PRUNERS]
    if unknown:
        print(
            f"no method {unknown[0]!r} that selects before the language model{did_you_mean(unknown[0], PRUNERS)}; "
            f"there are {', '.join(PRUNERS)}",
            file=sys.stderr,
        )
        return 2
    if options.repeats < 1 or min(options.threads) < 1:
        print("--repeats and --threads: 1 or more", file=sys.stderr)
        return 2
    rows = [
        measure(name, size, options.repeats, options.threads, not options.no_references, options.seed, options.width)
        for name in options.methods
        for size in options.sizes
    ]
    Console().print(table(rows, options.threads))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
        print(f"written to {options.out}")
    wrong = [f"{row['method']} ({row['size']})" for row in rows if row["equal"] is False]
    if wrong:
        print(f"other tokens than the straightforward reading: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
