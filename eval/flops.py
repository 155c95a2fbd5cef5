"""What a prompt costs under methods, from a config alone: no weights, no processor, no GPU.

The figures are those of `vlmfast.cost` (X2, tower included), beside the two conventions that papers use, so that a
table of theirs can be compared with ours. The times are a roofline: the larger of FLOPs over the device's peak and
bytes over its bandwidth. No kernel reaches either, so they are the least a device could take, not what it will.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging

from vlmfast.adapter import ATTENTION
from vlmfast.adapters import from_spec, to_spec
from vlmfast.cost import CONVENTION, CONVENTIONS, Cost, prefill_flops
from vlmfast.eval import testbed
from vlmfast.eval.planning import expand
from vlmfast.eval.report.text import MISSING
from vlmfast.eval.results import write_atomic
from vlmfast.eval.sweep import UNPATCHED
from vlmfast.families import family_of
from vlmfast.families.base import did_you_mean
from vlmfast.solving import apply, cost_of, picture_of, sizes_of, visual_parts
from vlmfast.towers import Picture

CONFIGS = Path(__file__).parent / "configs"
BUNDLED = tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))
WHOLE = 500  # columns of a table that goes to a file
BYTES = 2  # of a weight and of a cached number: 16 bits


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet. peak: dense bf16 FLOP/s; bandwidth: bytes/s of its memory."""

    peak: float
    bandwidth: float


# From the makers' data sheets (dense, without sparsity).
DEVICES = {
    "a100": Device(312e12, 2.039e12),  # 80 GB SXM
    "h100": Device(989e12, 3.35e12),  # SXM
    "h200": Device(989e12, 4.8e12),
    "l4": Device(121e12, 0.3e12),
    "l40s": Device(362e12, 0.864e12),
    "rtx4090": Device(165e12, 1.008e12),
}


@dataclass(frozen=True)
class Weights:
    """Parameters that a prompt passes.

    vision: tower and projector; language: decoder and head; used: of these by one token, fewer with experts.
    """

    vision: int
    language: int
    used: int


@dataclass(frozen=True)
class Line:
    """One spec on one prompt.

    visual: mean visual tokens a decoder layer; share: of the unpatched FLOPs until the first token. conventions: of
    the decoder over the prompt, by name. None of them where tokens skip parts of layers.
    ttft_s, token_s: roofline, None without a device.
    """

    spec: str
    visual: float
    cost: Cost
    share: float
    conventions: dict[str, float]
    ttft_s: float | None = None
    token_s: float | None = None


def config_of(name: str) -> Any:
    """The config of a bundled name, `testbed:NAME`, a folder, a config.json, or a Hugging Face id.

    ValueError or OSError for what is none of these, NotImplementedError for an unknown family.
    """
    if name in BUNDLED:
        values = json.loads((CONFIGS / f"{name}.json").read_text())
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)
    path = Path(name).expanduser()
    if name.startswith("testbed:"):
        from vlmfast.eval.models import model_folder

        path = model_folder(name)
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not the configuration of a model that transformers knows") from None
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"the folder {path} has no config.json")
        config = AutoConfig.from_pretrained(path)
    else:
        known = [*BUNDLED, *(f"testbed:{one}" for one in testbed.MODELS)]
        wrong = f"{name} is no folder and no file{did_you_mean(name, known)}; bundled: {', '.join(known)}"
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise FileNotFoundError(wrong)
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"{wrong}; nor a model of the Hugging Face hub: {reason}") from None
    family_of(config)
    return config


def weights_of(config: Any) -> Weights:
    """Parameters, counted on a model without storage."""
    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    finally:
        logging.set_verbosity(shown)
    base = getattr(model, model.base_model_prefix, model)
    decoder = base.get_decoder()
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layers = sum(one.numel() for one in decoder.parameters()) - embeddings.numel()
    every = {id(one): one.numel() for one in model.parameters()}
    apart = head.numel() if id(head) != id(embeddings) else 0
    text = config.get_text_config()
    experts = getattr(text, "num_experts", None) or 0
    idle = 0
    if experts:
        routed = sum(one.numel() for name, one in decoder.named_parameters() if ".experts." in name)
        idle = routed - routed * text.num_experts_per_tok // experts
    return Weights(
        vision=sum(every.values()) - layers - embeddings.numel() - apart,
        language=layers + head.numel(),
        used=layers - idle + head.numel(),
    )


def lines(
    config: Any,
    specs: Sequence[str],
    picture: Picture,
    *,
    images: int = 1,
    text: int = 60,
    generated: int = 1,
    device: Device | None = None,
    keeps: Sequence[float | int] = (),
) -> list[Line]:
    """One line a spec (and keep), the unpatched model first.

    images: pictures of this size in the prompt; text: its text tokens; generated: tokens of the answer. keeps: for
    specs with a `keep` that name none. ValueError for numbers that cannot be and for wrong specs.
    """
    for name, value, least in (("images", images, 1), ("text", text, 1), ("tokens", generated, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    weights = None if device is None else weights_of(config)
    found: list[Line] = []
    for adapters in [(), *_chosen(specs, keeps)]:
        for adapter in adapters:
            adapter.check(family_of(config))
            beside = adapter.door >= ATTENTION and adapter.selection_flops(picture, 1, sizes_of(config, picture))
            if images > 1 and beside:
                raise NotImplementedError(f"{adapter.name} costs more than its prompt: it is counted for one image")
        per_picture, _ = apply(config, adapters, picture, text)
        parts = visual_parts(config, adapters)
        layers = [images * held for held in per_picture]
        cost = cost_of(config, adapters, text, [picture] * images, layers, generated)
        lengths = [text + held for held in layers]
        line = Line(
            spec=to_spec(adapters) if adapters else "unpatched",
            visual=sum(layers) / len(layers),
            cost=cost,
            share=cost.total_prefill / (found[0].cost.total_prefill if found else cost.total_prefill),
            conventions={} if parts else {name: prefill_flops(config, lengths, name) for name in CONVENTIONS},
            **({} if device is None or weights is None else _times(cost, device, weights, generated)),
        )
        found.append(line)
    return found


def _chosen(specs: Sequence[str], keeps: Sequence[float | int]) -> list[tuple[Any, ...]]:
    """The methods of every run but the unpatched one; without `keeps` each has its own."""
    runs = expand(specs, keeps) if keeps else [to_spec(from_spec(spec)) for spec in specs]
    return [from_spec(run) for run in dict.fromkeys(runs) if run != UNPATCHED]


def _times(cost: Cost, device: Device, weights: Weights, generated: int) -> dict[str, float]:
    """Roofline. The whole prompt reads every weight once; a step reads those a token uses, and the cache."""
    first = max(cost.total_prefill / device.peak, BYTES * (weights.vision + weights.language) / device.bandwidth)
    steps = max(1, generated - 1)
    step = cost.decode / steps if generated > 1 else 0.0
    return {
        "ttft_s": first,
        "token_s": max(step / device.peak, (BYTES * weights.used + cost.kv_bytes) / device.bandwidth),
    }


def show(
    model: str,
    found: Sequence[Line],
    picture: Picture,
    *,
    images: int,
    text: int,
    generated: int,
    device: str | None,
    console: Console | None = None,
) -> None:
    """Print the lines as a table; a file gets it whole."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=WHOLE, force_terminal=False, no_color=True)
    side = "x".join(map(str, picture.patches))
    console.print(
        f"{model}: {images} image(s) of {side} patches ({picture.span} placeholders each), {text} text tokens, "
        f"{generated} generated\nTFLOPs, {CONVENTION}",
        highlight=False,
    )
    heads = ["visual tokens", "tower", "projector", "selection", "prefill", "total", "share"]
    heads += ["decode", "F2m", "F3m", "KV MiB"]
    heads += [] if device is None else [f"TTFT ms on {device}*", "ms/token*"]
    for table in tables(heads, {line.spec: cells_of(line) for line in found}, console):
        console.print(table)
    console.print("F2m, F3m: the decoder's prefill alone, in multiply-adds, as papers count it.", highlight=False)
    if device is not None:
        console.print(
            "* an estimate: the roofline of the data sheet in 16 bits, which no kernel reaches.", highlight=False
        )


def cells_of(line: Line) -> list[str]:
    """A line's numbers as they are printed."""
    cost = line.cost
    numbers = (cost.tower, cost.projector, cost.selection, cost.prefill, cost.total_prefill)
    cells = [f"{line.visual:.1f}", *(f"{one / 1e12:.3f}" for one in numbers), f"{line.share:.1%}"]
    papers = [line.conventions.get(name) for name in ("F2m", "F3m")]
    cells += [MISSING if one is None else f"{one / 1e12:.3f}" for one in (cost.decode, *papers)]
    cells.append(f"{cost.kv_bytes / 2**20:.1f}")
    if line.ttft_s is not None and line.token_s is not None:
        cells += [f"{1e3 * line.ttft_s:.2f}", f"{1e3 * line.token_s:.2f}"]
    return cells


def tables(heads: Sequence[str], rows: Mapping[str, Sequence[str]], console: Console) -> list[Table]:
    """One row a method; where that is too wide, a column a method, in as many tables as the width asks for."""
    whole = table_of(["method", *heads], [[name, *cells] for name, cells in rows.items()])
    if width_of(whole, console) <= console.width:
        return [whole]
    names, found = list(rows), []
    while names:
        some = names[:1]
        while len(some) < len(names):
            wider = names[: len(some) + 1]
            if width_of(turned(heads, rows, wider), console) > console.width:
                break
            some = wider
        found.append(turned(heads, rows, some))
        names = names[len(some) :]
    return found


def width_of(table: Table, console: Console) -> int:
    """Columns that a table would like to have."""
    return Measurement.get(console, console.options.update(max_width=WHOLE), table).maximum


def turned(heads: Sequence[str], rows: Mapping[str, Sequence[str]], names: Sequence[str]) -> Table:
    """Some methods as columns."""
    return table_of(["", *names], [[head, *(rows[name][i] for name in names)] for i, head in enumerate(heads)])


def table_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column stands on the left and whose cells are not broken."""
    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if not number else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def as_data(model: str, found: Sequence[Line], **prompt: Any) -> dict[str, Any]:
    """The lines as plain data for JSON."""
    rows = []
    for line in found:
        row = asdict(line)
        row["cost"] |= {"total_prefill": line.cost.total_prefill, "total": line.cost.total}
        rows.append(row)
    return {"model": model, "convention": CONVENTION, "conventions": CONVENTIONS, "prompt": prompt, "rows": rows}


def run(
    model: str,
    specs: Sequence[str],
    *,
    keeps: Sequence[float | int] = (),
    size: tuple[int, int] | None = None,
    most: int | None = None,
    images: int = 1,
    text: int = 60,
    generated: int = 1,
    gpu: str | None = None,
    out: Path | None = None,
) -> None:
    """Print the costs of one prompt, and write them as JSON where `out` names a file.

    size: (height, width) of the image, None: a usual one. Errors as in `config_of`, `picture_of` and `lines`.
    """
    if gpu is not None and gpu not in DEVICES:
        raise ValueError(f"unknown GPU {gpu!r}{did_you_mean(gpu, DEVICES)}; there are {', '.join(DEVICES)}")
    config = config_of(model)
    picture = picture_of(config, size, most)
    prompt: dict[str, Any] = {"images": images, "text": text, "generated": generated}
    found = lines(config, specs, picture, device=DEVICES.get(gpu or ""), keeps=keeps, **prompt)
    show(model, found, picture, device=gpu, **prompt)
    if out is not None:
        prompt |= {"patches": picture.patches, "placeholders": picture.span, "size": size, "gpu": gpu}
        write_atomic(out, json.dumps(as_data(model, found, **prompt), indent=1) + "\n")
