"""Measure what patching costs and saves (`make bench`): prints a table, writes JSON.

python scripts/bench.py --model small
python scripts/bench.py --model all --repeats 5 --out results/bench.json
python scripts/bench.py --model llava-0.5b --method hiprune:keep=0.2 --device cuda --dtype bfloat16
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from vlmfast.eval.bench import GROUPS, SHAPES, bench, print_table, write_rows

METHODS = (
    "none",
    "random:keep=0.33",
    "fastervlm:keep=0.33,fallback=received",
    "hiprune:keep=0.33",
    "hiprune:keep=0.11",
)


def main() -> int:
    """Parse the options, measure one model after the other, print and write everything measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*SHAPES, *GROUPS])
    parser.add_argument(
        "--model", default="all", help=f"{names}, testbed:NAME, a folder or Hugging Face id (%(default)s)"
    )
    parser.add_argument("--method", action="append", metavar="SPEC", help=f"repeatable; default: {' '.join(METHODS)}")
    parser.add_argument("--repeats", type=int, help="rounds; default: 5, for the small models 30")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; with 1 the clock is process time (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/bench.json"), help="JSON file (%(default)s)")
    options = parser.parse_args()
    console, rows = Console(), []
    try:
        for name in GROUPS.get(options.model, (options.model,)):
            small = name == "small" or name.startswith("testbed:")
            repeats = options.repeats if options.repeats is not None else 30 if small else 5
            console.print(f"measuring {name}, {repeats} rounds ...")
            rows += bench(
                name,
                options.method or METHODS,
                repeats=repeats,
                threads=options.threads,
                device=options.device,
                dtype=options.dtype,
            )
            write_rows(options.out, rows, options.device)  # after every model: an interrupted run loses one at most
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(rows, console)
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
