"""Time the Triton kernels on a CUDA device, beside SDPA, flash attention and their torch references.

python scripts/bench_kernels.py
python scripts/bench_kernels.py --shape decoder --rounds 50 --out results/bench_kernels.json
python scripts/bench_kernels.py --interpret     (no CUDA device: only whether results are right, at small shapes)

Per kernel and shape: milliseconds (median over rounds, all contenders in turn within a round, warm), peak memory
beyond the inputs, and the largest error against the torch reference run in fp32 on the same numbers, divided by its
largest value. "sdpa" attends and gives no statistic: `column_sums` comes on top of it, the two others in its place.
"flash" is aten's flash attention, which gives the log-sum-exp too, where it takes the shape (keys repeated for it
beforehand). "full map" is what eager attention does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlmfast import kernels
from vlmfast.edits import engine
from vlmfast.edits.engine import EVERYTHING, Seen
from vlmfast.eval.environment import describe
from vlmfast.eval.results import write_atomic

INTERPRET = "TRITON_INTERPRET"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
INNER = 10  # calls between two readings of the clock
CLOSE = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of the largest value


@dataclass(frozen=True)
class Shape:
    """One attention call. queries see all keys, or those up to their own (the last one all)."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    causal: bool


SHAPES = (
    Shape("tower CLIP-L, 577", 1, 16, 16, 577, 577, 64, False),
    Shape("tower CLIP-L, 5 views of 577", 5, 16, 16, 577, 577, 64, False),
    Shape("tower Qwen2.5-VL, 5184", 1, 16, 16, 5184, 5184, 80, False),
    Shape("decoder 0.5B, 624", 1, 14, 2, 624, 624, 64, True),
    Shape("decoder 0.5B, 1356", 1, 14, 2, 1356, 1356, 64, True),
    Shape("decoder 7B, 624", 1, 28, 4, 624, 624, 128, True),
    Shape("decoder 7B, 1356", 1, 28, 4, 1356, 1356, 128, True),
    Shape("decoder 7B, 48 of 1356", 1, 28, 4, 48, 1356, 128, True),
    Shape("decode 0.5B, 1356", 1, 14, 2, 1, 1356, 64, True),
    Shape("decode 7B, 1356", 1, 28, 4, 1, 1356, 128, True),
    Shape("decode 7B, 32768", 1, 28, 4, 1, 32_768, 128, True),
)
SMALL = (
    Shape("small tower", 1, 2, 2, 70, 70, 80, False),
    Shape("small decoder", 2, 4, 2, 40, 70, 64, True),
    Shape("small decode", 1, 4, 2, 1, 150, 128, True),
)


@dataclass(frozen=True)
class Given:
    """Tensors of one shape. classes: two, a tenth of the keys and the half behind it."""

    query: Tensor
    key: Tensor
    value: Tensor
    classes: Tensor
    scaling: float
    seen: Seen
    shape: Shape

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, device: str) -> Given:
        """Random numbers, as transposed views, which is what transformers gives."""
        generator = torch.Generator(device).manual_seed(0)

        def made(heads: int, count: int) -> Tensor:
            size = (shape.batch, count, heads, shape.width)
            return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype).transpose(1, 2)

        query = made(shape.heads, shape.queries)
        key, value = made(shape.kv_heads, shape.keys), made(shape.kv_heads, shape.keys)
        number = torch.arange(shape.keys, device=device)
        first, last = shape.keys // 10, shape.keys // 10 + shape.keys // 2
        classes = torch.stack([number < first, (number >= first) & (number < last)])[:, None, None]
        places = torch.arange(shape.keys - shape.queries, shape.keys, device=device)
        seen = Seen(places=places) if shape.causal and shape.queries > 1 else EVERYTHING
        return cls(query, key, value, classes, shape.width**-0.5, seen, shape)

    def full(self) -> Given:
        """The same in fp32."""
        return Given(
            self.query.float(), self.key.float(), self.value.float(), self.classes, self.scaling, self.seen, self.shape
        )


def factors(masses: Tensor) -> Tensor:
    """Half of the first class's mass moved to the second, as VAR does."""
    moved = 0.5 * masses[..., 0]
    return torch.stack([torch.full_like(moved, 0.5), 1 + moved / masses[..., 1].clamp(min=1e-6)], dim=-1)


def on_torch(run: Callable[..., Any], *args: Any) -> Any:
    """An engine's function without the kernels."""
    before = os.environ.get(kernels.VARIABLE)
    os.environ[kernels.VARIABLE] = "torch"
    try:
        return run(*args)
    finally:
        if before is None:
            del os.environ[kernels.VARIABLE]
        else:
            os.environ[kernels.VARIABLE] = before


def full_map(given: Given) -> Tensor:
    """All probabilities, as eager attention makes them: in the type of the queries, softmax in fp32."""
    group = given.shape.heads // given.shape.kv_heads
    scores = given.query @ given.key.repeat_interleave(group, 1).transpose(-1, -2) * given.scaling
    mask = given.seen.of(slice(None), given.shape.keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32)


def eager_columns(given: Given) -> Tensor:
    """Column sums from the full map."""
    return full_map(given).sum(2)


def eager_edit(given: Given) -> Tensor:
    """Redistribution on the full map."""
    shown = full_map(given)
    member = given.classes.movedim(0, -1).float()
    shown = shown * (1 + (factors(shown @ member) - 1) @ member.transpose(-1, -2))
    group = given.shape.heads // given.shape.kv_heads
    return shown.to(given.value.dtype) @ given.value.repeat_interleave(group, 1)


def sdpa(given: Given) -> Tensor:
    """The model's attention."""
    square = given.shape.queries == given.shape.keys
    mask = None if square or given.seen.places is None else given.seen.of(slice(None), given.shape.keys)
    return scaled_dot_product_attention(
        given.query,
        given.key,
        given.value,
        attn_mask=mask,
        is_causal=given.shape.causal and square,
        scale=given.scaling,
        enable_gqa=given.shape.heads != given.shape.kv_heads,
    )


def flash(given: Given) -> Callable[[], Any]:
    """aten's flash attention, whose log-sum-exp comes for nothing."""
    group = given.shape.heads // given.shape.kv_heads
    key, value = given.key.repeat_interleave(group, 1), given.value.repeat_interleave(group, 1)
    causal = given.seen.places is not None
    run = torch.ops.aten._scaled_dot_product_flash_attention
    return lambda: run(given.query, key, value, 0.0, causal, scale=given.scaling)


def columns(given: Given) -> Tensor:
    """The engine's column sums."""
    return engine.column_sums(given.query, given.key, given.scaling, given.seen)[0]


def edit(given: Given) -> Tensor:
    """The engine's redistribution."""
    return engine.redistribute(given.query, given.key, given.value, given.classes, factors, given.scaling, given.seen)


def attend(given: Given) -> Tensor:
    """The engine's attention with log-sum-exp."""
    return engine.with_lse(given.query, given.key, given.value, given.scaling, given.seen)[0]


KERNELS: Mapping[str, tuple[Callable[[Given], Tensor], Callable[[Given], Tensor] | None]] = {
    "column_sums": (columns, eager_columns),
    "redistribute": (edit, eager_edit),
    "with_lse": (attend, None),
}


def contenders(name: str, given: Given) -> dict[str, Callable[[], Any]]:
    """Who is timed."""
    run, eager = KERNELS[name]
    found: dict[str, Callable[[], Any]] = {
        "kernel": lambda: run(given),
        "torch": lambda: on_torch(run, given),
        "sdpa": lambda: sdpa(given),
    }
    if eager is not None:
        found["full map"] = lambda: eager(given)
    square = given.shape.queries == given.shape.keys or given.seen.places is None
    if name == "with_lse" and given.query.dtype != torch.float32 and square:
        found["flash"] = flash(given)
    return found


def error(name: str, given: Given) -> float:
    """Largest error of a kernel over the largest value, against the reference in fp32."""
    run, _ = KERNELS[name]
    expected = on_torch(run, given.full())
    return float((run(given).float() - expected).abs().max() / expected.abs().max())


def measured(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """{contender: {"ms", "low", "high", "mb"}}; low and high are quartiles."""
    memory, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        for _ in range(3):  # compiled, and warm
            run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
    for _ in range(rounds):
        for name, run in runs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(INNER):
                run()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) / INNER)
    found = {}
    for name, readings in times.items():
        readings.sort()
        found[name] = {
            "ms": median(readings),
            "low": readings[len(readings) // 4],
            "high": readings[3 * len(readings) // 4],
            "mb": memory[name],
        }
    return found


def bench(shapes: tuple[Shape, ...], dtype: torch.dtype, rounds: int, console: Console) -> list[dict[str, Any]]:
    """Every kernel at every shape, printed as it comes."""
    rows = []
    for name in KERNELS:
        table = Table("shape", "error", *(f"{one} ms" for one in ("kernel", "torch", "sdpa", "flash", "full map")))
        table.add_column("kernel / sdpa")
        table.add_column("kernel MB")
        table.add_column("full map MB")
        for shape in shapes:
            given = Given.of(shape, dtype, "cuda")
            found = measured(contenders(name, given), rounds)
            wrong = error(name, given)
            rows.append({"kernel": name, **asdict(shape), "dtype": str(dtype)[6:], "error": wrong, "measured": found})
            cells = [
                f"{found[one]['ms']:.4f}" if one in found else "-"
                for one in ("kernel", "torch", "sdpa", "flash", "full map")
            ]
            table.add_row(
                shape.name,
                f"{wrong:.1e}",
                *cells,
                f"{found['kernel']['ms'] / found['sdpa']['ms']:.2f}",
                f"{found['kernel']['mb']:.1f}",
                f"{found['full map']['mb']:.1f}" if "full map" in found else "-",
            )
        table.title = f"{name}, {str(dtype)[6:]}"
        console.print(table)
    return rows


def checked(console: Console) -> bool:
    """Whether the kernels' results are right at small shapes, under the interpreter."""
    table, right = Table("kernel", "shape", "type", "error", title="results under Triton's interpreter"), True
    kernels.usable = lambda *_: os.environ.get(kernels.VARIABLE) != "torch"
    for name in KERNELS:
        for shape in SMALL:
            for label, dtype in DTYPES.items():
                wrong = error(name, Given.of(shape, dtype, "cpu"))
                right = right and wrong <= CLOSE[dtype]
                table.add_row(name, shape.name, label, f"{wrong:.1e}" + ("" if wrong <= CLOSE[dtype] else " WRONG"))
    console.print(table)
    console.print("No time measured here would mean anything: the interpreter runs programs one after another.")
    return right


def environment() -> dict[str, Any]:
    """Where it was measured, with Triton's version and the device's kind."""
    major, minor = torch.cuda.get_device_capability()
    return {
        **describe("cuda"),
        "triton": importlib.metadata.version("triton"),
        "cuda": torch.version.cuda,
        "capability": f"{major}.{minor}",
    }


def main() -> int:
    """Parse the options, measure or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="", help="only shapes whose name has this in it; default: all")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="repeatable; default: float16 bfloat16")
    parser.add_argument("--rounds", type=int, default=30, help="readings of each contender (%(default)s)")
    parser.add_argument("--interpret", action="store_true", help="check results on a CPU, measure nothing")
    parser.add_argument("--out", type=Path, default=Path("results/bench_kernels.json"), help="JSON file (%(default)s)")
    options = parser.parse_args()
    console = Console(width=max(Console().width, 132))  # the tables', also into a pipe
    if options.interpret:
        if os.environ.get(INTERPRET) != "1":  # Triton reads it when it is imported, which has happened by now
            again = [sys.executable, __file__, "--interpret"]
            return subprocess.run(again, env={**os.environ, INTERPRET: "1"}).returncode
        return 0 if checked(console) else 1
    shapes = tuple(shape for shape in SHAPES if options.shape in shape.name)
    if not torch.cuda.is_available():
        print("error: no CUDA device here: nothing to measure; --interpret checks results", file=sys.stderr)
        return 2
    if not shapes or options.rounds < 1:
        names = ", ".join(shape.name for shape in SHAPES)
        print(f"error: --shape takes part of one of: {names}; --rounds a number from 1 on", file=sys.stderr)
        return 2
    if not kernels.usable(torch.zeros(1, 1, 1, 16, device="cuda", dtype=torch.float16)):
        print("error: the kernels are off: no Triton, an old device, or VLMFAST_KERNELS=torch", file=sys.stderr)
        return 2
    rows = []
    with torch.inference_mode():
        for dtype in options.dtype or ("float16", "bfloat16"):
            rows += bench(shapes, DTYPES[dtype], options.rounds, console)
    record = {
        "schema": 1,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "rounds": options.rounds,
        "inner": INNER,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, json.dumps(record, indent=1) + "\n")
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
