"""Measure what patching costs and saves (`make bench`): prints a table, writes JSON.

python scripts/bench.py --model small
python scripts/bench.py --model all --repeats 5 --out results/bench.json
python scripts/bench.py --model llava-0.5b --method hiprune:keep=0.2 --device cuda --dtype bfloat16
python scripts/bench.py --model attention --repeats 5 --out results/bench-attention.json
python scripts/bench.py --model decoding --out results/bench-decoding.json

Methods that edit attention and do nothing else are measured apart: the language model alone, over the unpatched one,
beside eager attention and the same method on full maps. So are methods that decide on tokens: whole calls of generate,
over unpatched ones with as many beams.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from vlmfast.eval.bench import GROUPS, SHAPES, bench, print_table, write_rows
from vlmfast.eval.bench_decoding import bench_decoding, decodes, print_decoding
from vlmfast.eval.bench_edits import bench_edits, edits_only, print_edits

METHODS = (
    "none",
    "random:keep=0.33",
    "fastervlm:keep=0.33,fallback=received",
    "hiprune:keep=0.33",
    "hiprune:keep=0.11",
)
# Random weights have no attention sinks: these settings make a few tokens of a hundred pass for sinks, as they do in
# trained models, so that the methods have something to do. Without contrast, which is not the attention's price.
EDITS = (
    "none",
    "act:alpha=5.0",
    "pai:gamma=1.0",
    "paint:gamma=1.0",
    "var:dims=3/7,tau=2.5",
    "vhr",
    "zerotuning",
)
# Models with random weights have no processor, and AGLA no question to ask a matcher: the model's own attention.
DECODING = (
    "none",
    "dola",
    "deco",
    "only",
    "vista",
    "vcd",
    "vcd:branch=fastervlm/keep=0.1",
    "m3id",
    "agla:matcher=self",
    "pai",
    "paint",
    "opera",
)


def plan(group: str, model: str, named: list[str] | None) -> tuple[list[str], list[str], list[str]]:
    """(specs measured whole, attention edits, decoding methods) for a model of a group, or one named by itself."""
    if named is not None:
        kinds = [[spec for spec in named if kind(spec)] for kind in (edits_only, decodes)]
        whole = [spec for spec in named if not any(spec in kind for kind in kinds)]
        edits, decoding = [(["none"] if "none" in named and kind else []) + kind for kind in kinds]
        return whole, edits, decoding
    if group == "decoding":
        return [], [], list(DECODING)
    edited = group == "attention" or model in GROUPS["attention"] and (group == "all" or model not in GROUPS["all"])
    whole = group != "attention" and (model in GROUPS["pruning"] or model not in GROUPS["attention"])
    return list(METHODS) if whole else [], list(EDITS) if edited else [], []


def main() -> int:
    """Parse the options, measure one model after the other, print and write everything measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*SHAPES, *GROUPS])
    parser.add_argument(
        "--model", default="all", help=f"{names}, testbed:NAME, a folder or Hugging Face id (%(default)s)"
    )
    parser.add_argument(
        "--method",
        action="append",
        metavar="SPEC",
        help=f"repeatable; default: {' '.join(METHODS)}; for group attention: {' '.join(EDITS)}; for group "
        f"decoding: {' '.join(DECODING)}",
    )
    parser.add_argument("--repeats", type=int, help="rounds; default: 5, for the small models 30")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; with 1 the clock is process time (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/bench.json"), help="JSON file (%(default)s)")
    options = parser.parse_args()
    console, whole, edited, decoded = Console(), *(list[dict[str, Any]]() for _ in range(3))
    try:
        for name in GROUPS.get(options.model, (options.model,)):
            small = name == "small" or name.startswith("testbed:")
            repeats = options.repeats if options.repeats is not None else 30 if small else 5
            how = {"repeats": repeats, "threads": options.threads, "device": options.device, "dtype": options.dtype}
            specs, edits, decoding = plan(options.model, name, options.method)
            console.print(f"measuring {name}, {repeats} rounds ...")
            whole += bench(name, specs, **how) if specs else []
            edited += bench_edits(name, edits, **how) if edits else []
            decoded += bench_decoding(name, decoding, **how) if decoding else []
            # After every model: an interrupted run loses one at most.
            write_rows(options.out, [*whole, *edited, *decoded], options.device)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if whole:
        print_table(whole, console)
    if edited:
        print_edits(edited, console)
    if decoded:
        print_decoding(decoded, console)
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
