"""What decoding methods cost, each as a ratio of readings taken in turns in one process.

Whole calls of `generate`, pictures included, over the unpatched model with as many beams:

* **first token**: vision tower, prompts and, where there is one, the branch's prompt.
* **decode**: a further token.
* **forwards**: calls of the decoder for a further token, and the rows that go through it in all of them. Counted, not
  timed. Plain decoding takes one call of as many rows as there are beams.

The spec "none" shows the noise of the machine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console

import vlmfast
from vlmfast.adapters import from_spec
from vlmfast.eval import bench
from vlmfast.eval.latency import Clock, Generation, Spread, generation, interleave, ratio
from vlmfast.eval.sweep import beams_of
from vlmfast.patching import entrance

NEW_TOKENS = 33  # the first comes out of the prefill, 32 are timed
PARTS = {"prefill": "ttft_ms", "decode": "decode_ms_per_token"}


def decodes(spec: str) -> bool:
    """Whether a method of a spec changes how tokens are decided on, as a branch beside an attention edit does, too."""
    adapters = from_spec(spec)
    branches = [branch for adapter in adapters if (branch := getattr(adapter, "branch", None)) is not None]
    return any(adapter.kind == "decoding" for adapter in adapters) or any(
        getattr(branch, "gamma", 1) != 1 for branch in branches
    )


def bench_decoding(
    name_or_path: str,
    specs: Sequence[str],
    *,
    repeats: int = 5,
    threads: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[dict[str, Any]]:
    """Measure decoding methods on one model; one row (plain data) per spec. Arguments as `bench.bench`.

    ValueError, TypeError, NotImplementedError or OSError for a wrong spec, model, device or number.
    """
    settings: dict[str, Any] = {"repeats": repeats, "threads": threads, "device": device, "dtype": dtype}
    return bench.measured(measure_decoding, name_or_path, specs, **settings, kind="decoding")


def measure_decoding(
    model: Any,
    inputs: Mapping[str, Any],
    specs: Sequence[str],
    *,
    repeats: int,
    threads: int,
    warmup: int = 1,
    new_tokens: int = NEW_TOKENS,
) -> list[dict[str, Any]]:
    """Rows of `bench_decoding` for a loaded, unpatched model and one prompt with its picture."""
    device = entrance(model)
    clock = Clock.of(device, threads)
    beams = {spec: beams_of(from_spec(spec)) for spec in specs}

    def reading(spec: str, width: int, count: bool = False) -> Generation:
        with vlmfast.patch(model, spec):
            return generation(model, inputs, new_tokens, clock, beams=width, count=count)

    variants: dict[tuple[str, str, int], Callable[[], Generation]] = {
        ("unpatched", "none", width): partial(reading, "none", width) for width in sorted(set(beams.values()))
    }
    variants |= {("patched", spec, width): partial(reading, spec, width) for spec, width in beams.items()}
    names = {" ".join(map(str, key)): key for key in variants}
    readings = interleave({name: variants[key] for name, key in names.items()}, repeats=repeats, warmup=warmup)
    taken = {names[name]: values for name, values in readings.items()}
    counted = {spec: reading(spec, width, count=True) for spec, width in beams.items()}
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    rows = []
    for spec in specs:
        mine, plain = taken["patched", spec, beams[spec]], taken["unpatched", "none", beams[spec]]
        times = {
            part: ([getattr(one, field) for one in mine], [getattr(one, field) for one in plain])
            for part, field in PARTS.items()
        }
        rows.append(
            {
                "spec": spec,
                "device": str(device),
                "threads": threads,
                "clock": clock.name,
                "repeats": repeats,
                "new_tokens": new_tokens,
                "beams": beams[spec],
                "text_tokens": inputs["input_ids"].shape[1] - tokens,
                "visual_tokens": tokens,
                "unpatched_ms": {part: asdict(Spread.of(below)) for part, (_, below) in times.items()},
                "patched_ms": {part: asdict(Spread.of(above)) for part, (above, _) in times.items()},
                "over_unpatched": {part: asdict(ratio(above, below)) for part, (above, below) in times.items()},
                "forwards_per_token": counted[spec].forwards_per_token,
                "rows_per_token": counted[spec].rows_per_token,
            }
        )
    return rows


def print_decoding(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Print rows of `bench_decoding`, a table a model."""
    console = console or Console()
    for model, about in {row["model"]: row["about"] for row in rows}.items():
        mine = [row for row in rows if row["model"] == model]
        first = mine[0]
        console.print(f"\n[bold]{model}[/bold]: {about}", highlight=False)
        plain = "; ".join(
            f"with {beams} beam{'s' if beams > 1 else ''} {found['prefill']['median']:.4g} ms to the first token, "
            f"{found['decode']['median']:.3g} ms a further one"
            for beams, found in sorted({row["beams"]: row["unpatched_ms"] for row in mine}.items())
        )
        console.print(
            f"{first['visual_tokens']} visual and {first['text_tokens']} text tokens, {first['new_tokens']} generated"
            f"; {first['clock']}, {first['threads']} thread(s), {first['device']}, {first['dtype']}, "
            f"{first['repeats']} rounds; unpatched {plain}",
            highlight=False,
        )
        table = bench._table(
            "over the unpatched model with as many beams",
            ("method", "beams", "first token", "decode", "ms/token", "forwards", "rows"),
        )
        for row in mine:
            over = row["over_unpatched"]
            table.add_row(
                row["spec"],
                str(row["beams"]),
                bench._ratio(over["prefill"]),
                bench._ratio(over["decode"]),
                f"{row['patched_ms']['decode']['median']:.3g}",
                f"{row['forwards_per_token']:.2f}",
                f"{row['rows_per_token']:.4g}",
            )
        console.print(table)
    console.print(
        "First token: picture and prompts included. Forwards: decoder calls for a further token; rows: of them all. "
        "Ratios: median over rounds of readings paired within a round, ± half the interquartile range. The row none "
        "shows the measuring error.",
        highlight=False,
    )
