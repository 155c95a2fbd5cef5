"""What a patch costs and saves, each as a ratio of readings taken in turns in one process.

Per model and method:

* **patched / oracle**: the price of the method's machinery. The oracle is the same model, unpatched, on the prompt
  already shortened: it is handed the very embeddings, positions and mask that the patched language model receives.
  1.00 means that scoring, choosing and rewriting cost nothing. Rewriting takes about a millisecond whatever the
  model's size, which a model of a few million parameters shows and one of a billion does not: hence also in ms.
* **speed-up / FLOPs speed-up** (efficiency): unpatched over patched time against what the analytic FLOPs promise
  (`vlmfast.cost`, X2), end to end (vision tower, selection, prefill, head) and for the language model alone.
* **memory of score capture**: bytes held by the blockwise statistic against the full attention map that eager
  attention makes, at the tower's real shape; and the peak of the whole vision pass, plain, patched and eager.
* **decode**: milliseconds per further token, patched over unpatched.

The spec "none" shows the noise of the machine: it does nothing, so its ratios are 1 but for the measuring error.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig, Qwen2_5_VLConfig, Qwen2Config

import vlmfast
from vlmfast.adapters import from_spec
from vlmfast.attention import attention_rows, statistic
from vlmfast.cost import CONVENTION, Cost
from vlmfast.encoding import encode_images
from vlmfast.eval import testbed
from vlmfast.eval.environment import describe
from vlmfast.eval.latency import (
    MB,
    Clock,
    Spread,
    check_repeats,
    generation,
    image_inputs,
    interleave,
    peak_bytes,
    ratio,
    use_threads,
)
from vlmfast.eval.models import DTYPES, check_device, load_model
from vlmfast.eval.prompts import Prompts
from vlmfast.eval.results import write_atomic
from vlmfast.eval.testbed.scenes import scene
from vlmfast.families import family_of
from vlmfast.patching import entrance
from vlmfast.solving import cost_of, tower_scores
from vlmfast.towers import Picture, size_of
from vlmfast.visual import Score

TEXT = 48  # text tokens of the prompts for models with random weights
NEW_TOKENS = 9  # generated for the decode time: the first comes out of the prefill, eight are timed
PICTURE = 1008  # side in pixels of the picture for a model that is not the testbed's: 1,296 tokens of Qwen2.5-VL
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model with random weights: what it stands for, its config, and the patch grid of the picture it is shown."""

    about: str
    config: Callable[[], Any]
    grid: tuple[int, int, int]


def _llava(tower: dict[str, Any], text: dict[str, Any], image: int, vocabulary: int) -> LlavaConfig:
    clip = CLIPVisionConfig(**tower, image_size=image, patch_size=14)
    qwen2 = Qwen2Config(**text, vocab_size=vocabulary, tie_word_embeddings=True)
    return LlavaConfig(
        vision_config=clip,
        text_config=qwen2,
        image_token_index=vocabulary - 1,
        image_seq_length=(image // 14) ** 2,
        tie_word_embeddings=True,
    )


def _sizes(width: int, ff: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _small() -> LlavaConfig:
    return _llava(_sizes(256, 1024, 4, 4), {**_sizes(256, 1024, 4, 4), "num_key_value_heads": 2}, 224, 4096)


def _llava_half_billion(side: int = 336, tower_layers: int = 24) -> LlavaConfig:
    text = {**_sizes(896, 4864, 24, 14), "num_key_value_heads": 2}
    return _llava(_sizes(1024, 4096, tower_layers, 16), text, side, 151936)


def _qwen2_5_vl() -> Qwen2_5_VLConfig:
    text: dict[str, Any] = {
        **_sizes(2048, 11008, 4, 16),
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "model_type": "qwen2_5_vl_text",
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        "tie_word_embeddings": True,
    }
    tower: dict[str, Any] = {"depth": 4, "hidden_size": 1280, "out_hidden_size": 2048, "fullatt_block_indexes": [1, 3]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=True)


SHAPES: dict[str, Shape] = {
    "small": Shape("random weights: CLIP tower and Qwen2, 4 layers of width 256 each", _small, (1, 16, 16)),
    "llava-0.5b": Shape(
        "random weights: CLIP-L/336 tower (24 layers, width 1024), Qwen2-0.5B (24 layers, width 896)",
        _llava_half_billion,
        (1, 24, 24),
    ),
    "llava-0.5b-1296": Shape(
        "random weights: Qwen2-0.5B (24 layers, width 896) behind a CLIP tower of 2 layers and 36 x 36 patches: for "
        "what runs in the language model alone",
        partial(_llava_half_billion, 504, 2),
        (1, 36, 36),
    ),
    "qwen2.5-vl": Shape(
        "random weights, widths of Qwen2.5-VL-3B, depth reduced: tower of 4 layers (2 with windows, 2 with full "
        "attention, real: 32 with 4 full), text model of 4 layers (real: 36); two layers' column means are 9 % of "
        "all FLOPs at keep 0.11 here, 1.6 % at real depth",
        _qwen2_5_vl,
        (1, 72, 72),
    ),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "testbed": tuple(f"testbed:{name}" for name in testbed.MODELS),
    "pruning": (*(f"testbed:{name}" for name in testbed.MODELS), "llava-0.5b", "qwen2.5-vl"),
    "attention": ("llava-0.5b", "llava-0.5b-1296"),
    "decoding": ("testbed:llava", "llava-0.5b"),
    "all": (*(f"testbed:{name}" for name in testbed.MODELS), "llava-0.5b", "llava-0.5b-1296", "qwen2.5-vl"),
}


def bench(
    name_or_path: str,
    specs: Sequence[str],
    *,
    repeats: int = 10,
    threads: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure methods on one model against the unpatched model; one row (plain data) per spec.

    name_or_path: a name of `SHAPES`, `testbed:llava`, `testbed:qwen2_5_vl`, a folder or a Hugging Face id.
    specs: what to patch with, e.g. "hiprune:keep=0.33"; "none" shows the measuring error.
    repeats: rounds in which every variant runs once. threads: CPU threads; with 1 the clock is process time.
    out: JSON file for the rows with the environment they were measured in.

    ValueError, TypeError, NotImplementedError or OSError for a wrong spec, model, device or number.
    """
    settings: dict[str, Any] = {"repeats": repeats, "threads": threads, "device": device, "dtype": dtype}
    rows = measured(measure_specs, name_or_path, specs, **settings)
    if out is not None:
        write_rows(out, rows, device)
    return rows


def measured(
    measure: Callable[..., list[dict[str, Any]]],
    name_or_path: str,
    specs: Sequence[str],
    *,
    repeats: int,
    threads: int,
    device: str,
    dtype: str,
    **more: Any,
) -> list[dict[str, Any]]:
    """Rows of `measure(model, inputs, specs, repeats=, threads=)` on one model, after the checks of `bench`.

    more: stands at the head of every row.
    """
    check_repeats(repeats, 0)
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    if not specs:
        raise ValueError("no method to measure: name at least one, such as 'hiprune:keep=0.33'")
    for spec in specs:
        from_spec(spec)  # a misspelt one must not cost minutes first
    check_device(device)
    with use_threads(threads):
        model, inputs, about = subject(name_or_path, device, dtype)
        rows = measure(model, inputs, specs, repeats=repeats, threads=threads)
    return [{**more, "model": name_or_path, "about": about, "dtype": dtype, **row} for row in rows]


def write_rows(path: Path, rows: Sequence[dict[str, Any]], device: str = "cpu") -> None:
    """Write rows of `bench` as JSON, with the environment, in one step."""
    record = {
        "schema": 1,
        "convention": CONVENTION,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": describe(device),
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(record, indent=1) + "\n")


def subject(name: str, device: str, dtype: str) -> tuple[nn.Module, Inputs, str]:
    """A model in evaluation mode, one prompt with one picture for it, and a line on what it is."""
    if name in SHAPES:
        shape, target = SHAPES[name], check_device(device)
        config = shape.config()
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=DTYPES[dtype]).to(target).eval()
        return model, random_inputs(config, shape.grid, target, DTYPES[dtype]), shape.about
    model, processor = load_model(name, device=device, dtype=dtype)
    picture = scene("test", 0).image
    about = "trained testbed model, first test scene"
    if not name.startswith("testbed:"):
        enlarge = -(-PICTURE // picture.shape[0])
        picture = picture.repeat(enlarge, 0).repeat(enlarge, 1)[:PICTURE, :PICTURE]
        about = f"a testbed scene of {PICTURE} x {PICTURE} pixels"
    return model, Prompts(processor, entrance(model), DTYPES[dtype]).full("what do you see ?", picture), about


def random_inputs(config: Any, grid: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Inputs:
    """A prompt of `TEXT` tokens around one random picture of this patch grid, as a processor would give it."""
    random = torch.Generator().manual_seed(0)
    tower, tokens = family_of(config).tower(config), grid[0] * grid[1] * grid[2]
    vision, patch = config.vision_config, config.vision_config.patch_size
    if tower.merge == 1:
        inputs = {"pixel_values": torch.randn(1, 3, grid[1] * patch, grid[2] * patch, generator=random)}
    else:
        size = vision.in_channels * vision.temporal_patch_size * patch**2
        inputs = {
            "pixel_values": torch.randn(tokens, size, generator=random),
            "image_grid_thw": torch.tensor([grid]),
        }
    placeholders = torch.full((tokens // tower.merge**2,), config.image_token_id)
    text = torch.randint(10, 1000, (TEXT,), generator=random)
    ids = torch.cat([text[: TEXT // 2], placeholders, text[TEXT // 2 :]])[None]
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if tower.merge > 1:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}


@dataclass(frozen=True)
class Shortened:
    """What the language model receives of a patched prompt, what came out, and what it should cost."""

    inputs: Inputs  # inputs_embeds [1, M, D], position_ids, attention_mask
    logits: Tensor
    kept: tuple[int, ...]
    cost: Cost
    scores: tuple[Score, ...]

    @property
    def length(self) -> int:
        """Tokens that enter the first layer."""
        return int(self.inputs["inputs_embeds"].shape[1])


def measure_specs(
    model: Any, inputs: Inputs, specs: Sequence[str], *, repeats: int, threads: int, warmup: int = 1
) -> list[dict[str, Any]]:
    """Rows of `bench` for a loaded, unpatched model and one prompt."""
    device = entrance(model)
    clock = Clock.of(device, threads)
    images = image_inputs(model, inputs)
    text = {name: value for name, value in inputs.items() if name not in images or name == "image_grid_thw"}
    base = model.base_model
    visuals = encode_images(model, [], **images)
    pictures = [size_of(visual.patches, visual.views, visual.span) for visual in visuals]
    n_text = inputs["input_ids"].shape[1] - sum(picture.span for picture in pictures)
    full = cost_of(model.config, (), n_text, pictures)

    def encode() -> Any:
        return base.get_image_features(**images, return_dict=True)

    def forward(encoded: Any) -> Any:
        return model(**text, mm_encoder_outputs={"image": encoded}, use_cache=True, logits_to_keep=1)

    short = {spec: _shorten(model, spec, lambda: forward(encode()), n_text, pictures) for spec in dict.fromkeys(specs)}

    def patched(spec: str | None) -> AbstractContextManager[Any]:
        return nullcontext() if spec is None else vlmfast.patch(model, spec)

    def stages(spec: str | None, run: Callable[[Any], Any]) -> Callable[[], dict[str, float]]:
        def work() -> dict[str, float]:
            with patched(spec), torch.no_grad():
                start = clock.read()
                encoded = encode()
                middle = clock.read()
                result = run(encoded)
                end = clock.read()
            del result
            times = {"vision": middle - start, "prefill": end - middle, "total": end - start}
            return {name: 1000 * seconds for name, seconds in times.items()}

        return work

    def on_short(shortened: Shortened) -> Callable[[Any], Any]:
        return lambda _: model(**shortened.inputs, use_cache=True, logits_to_keep=1)

    # Specs that keep equally many tokens share an oracle: its time does not depend on which tokens they are. A method
    # inside the language model has the whole prompt as its oracle, and its gain there.
    oracles = {s.length: s for s in short.values()}
    variants = {"unpatched": stages(None, forward)}
    variants |= {f"patched {spec}": stages(spec, forward) for spec in short}
    variants |= {f"oracle {length}": stages(None, on_short(s)) for length, s in oracles.items()}
    times = {name: _columns(values) for name, values in interleave(variants, repeats=repeats, warmup=warmup).items()}

    def decoding(spec: str | None) -> Callable[[], float]:
        with patched(spec), torch.no_grad():
            encoded = encode()

        def work() -> float:
            with patched(spec):
                timed = generation(model, {**text, "mm_encoder_outputs": {"image": encoded}}, NEW_TOKENS, clock)
            assert timed.decode_ms_per_token is not None
            return timed.decode_ms_per_token

        return work

    decode_variants = {"unpatched": decoding(None)} | {f"patched {spec}": decoding(spec) for spec in short}
    decode = interleave(decode_variants, repeats=repeats, warmup=warmup)
    plain_peak, eager_peak = _vision_peaks(model, encode)
    rows = []
    for spec in specs:
        s = short[spec]
        mine, oracle, plain = times[f"patched {spec}"], times[f"oracle {s.length}"], times["unpatched"]
        promised = {
            "prefill": (full.prefill + full.head) / (s.cost.prefill + s.cost.head),
            "total": full.total_prefill / s.cost.total_prefill,
        }
        with torch.no_grad():
            again = on_short(s)(None).logits
        with patched(spec):
            patched_peak = peak_bytes(encode, device)
        rows.append(
            {
                "spec": spec,
                "device": str(device),
                "threads": threads,
                "clock": clock.name,
                "repeats": repeats,
                "text_tokens": n_text,
                "visual_tokens": sum(picture.tokens for picture in pictures),
                "kept": sum(s.kept),
                "unpatched_ms": _spreads(plain) | {"decode_per_token": asdict(Spread.of(decode["unpatched"]))},
                "patched_ms": _spreads(mine) | {"decode_per_token": asdict(Spread.of(decode[f"patched {spec}"]))},
                "oracle_ms": _spreads(oracle),
                "over_oracle": {part: asdict(ratio(mine[part], oracle[part])) for part in mine},
                "over_oracle_ms": {
                    part: asdict(Spread.of([a - b for a, b in zip(mine[part], oracle[part])])) for part in mine
                },
                "speedup": {part: asdict(ratio(plain[part], mine[part])) for part in promised},
                "flops_speedup": promised,
                "efficiency": {
                    part: asdict(ratio(plain[part], [promised[part] * t for t in mine[part]])) for part in promised
                },
                "decode_over_unpatched": asdict(ratio(decode[f"patched {spec}"], decode["unpatched"])),
                "memory": {
                    "capture": _capture_bytes(model, visuals[0].queries, s.scores),
                    "vision_peak": {"plain": plain_peak, "patched": patched_peak, "eager": eager_peak},
                },
                "oracle_logit_difference": float((again - s.logits).abs().max()),
            }
        )
    return rows


def _shorten(
    model: Any,
    spec: str,
    run: Callable[[], Any],
    text: int,
    pictures: Sequence[Picture],
) -> Shortened:
    """Run the patched model once and note what its language model is given."""
    seen: list[Inputs] = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        with vlmfast.patch(model, spec) as handle, torch.no_grad():
            logits = run().logits
            report, methods = handle.report(), handle.adapters
    finally:
        hook.remove()
    # A method that leaves the visual tokens alone, such as none, reports no prompts.
    kept = tuple(image.kept for image in report.images) or tuple(picture.tokens for picture in pictures)
    per_layer = report.prompts[0].per_layer if report.prompts else None
    names = ("inputs_embeds", "position_ids", "attention_mask")
    return Shortened(
        inputs={name: seen[0][name] for name in names if seen[0].get(name) is not None},
        logits=logits,
        kept=kept,
        cost=cost_of(model.config, methods, text, pictures, per_layer),
        scores=tuple(tower_scores(model.config, methods)),
    )


def _columns(readings: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """A list of dicts as a dict of lists."""
    return {part: [reading[part] for reading in readings] for part in readings[0]}


def _spreads(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """The spread of every part, as plain data."""
    return {part: asdict(Spread.of(values)) for part, values in times.items()}


def _vision_peaks(model: Any, encode: Callable[[], Any]) -> tuple[int, int]:
    """Peak bytes of the vision pass of the unpatched model: with its own attention, and with eager attention."""
    device = entrance(model)
    plain = peak_bytes(encode, device)
    own = model.config.vision_config._attn_implementation
    model.set_attn_implementation({"vision_config": "eager"})
    try:
        return plain, peak_bytes(encode, device)
    finally:
        model.set_attn_implementation({"vision_config": own})


def _capture_bytes(model: Any, queries: int, scores: Sequence[Score]) -> dict[str, Any] | None:
    """Peak bytes of taking a method's statistics from q and k, blockwise and through the full map (fp32).

    On queries and keys of the tower's real shape, one attention call over the whole image; None without a statistic.
    """
    if not scores:
        return None
    device = entrance(model)
    heads = family_of(model).tower(model.config).heads
    width = model.config.vision_config.hidden_size // heads
    q, k = (torch.randn(1, heads, queries, width).to(device, model.dtype) for _ in range(2))
    scale = width**-0.5
    blockwise = max(peak_bytes(partial(statistic, score, q, k, scale), device) for score in scores)
    full = peak_bytes(lambda: attention_rows(q, k, slice(None), scale).mean(dim=(1, 2)), device)
    return {"blockwise": blockwise, "full_map": full, "ratio": blockwise / full, "shape": [heads, queries, queries]}


def print_table(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Print rows of `bench`, for each model: overhead, speed-up and memory."""
    console = console or Console()
    for model, about in {row["model"]: row["about"] for row in rows}.items():
        mine = [row for row in rows if row["model"] == model]
        first = mine[0]
        console.print(f"\n[bold]{model}[/bold]: {about}", highlight=False)
        console.print(
            f"{first['visual_tokens']} visual and {first['text_tokens']} text tokens; {first['clock']}, "
            f"{first['threads']} thread(s), {first['device']}, {first['dtype']}, {first['repeats']} rounds; "
            f"unpatched: {first['unpatched_ms']['total']['median']:.4g} ms to the first token "
            f"(vision {first['unpatched_ms']['vision']['median']:.4g} ms), "
            f"{first['unpatched_ms']['decode_per_token']['median']:.3g} ms a further token",
            highlight=False,
        )
        overhead = _table(
            "overhead: patched / oracle, decode patched / unpatched",
            ("method", "kept", "total", "+ms", "prefill", "decode", "ms"),
        )
        speed = _table(
            "speed-up, what the FLOPs promise, and measured / promised (efficiency)",
            ("method", "total", "FLOPs", "efficiency", "prefill", "FLOPs", "efficiency"),
        )
        memory = _table(
            "memory in MB: statistic by blocks and by full map, peak of the vision pass",
            ("method", "blocks", "full map", "ratio", "plain", "patched", "eager"),
        )
        for row in mine:
            spec, over, gain, promised = row["spec"], row["over_oracle"], row["speedup"], row["flops_speedup"]
            overhead.add_row(
                spec,
                str(row["kept"]),
                _ratio(over["total"]),
                f"{row['over_oracle_ms']['total']['median']:.1f}",
                _ratio(over["prefill"]),
                _ratio(row["decode_over_unpatched"]),
                f"{row['patched_ms']['total']['median']:.4g}",
            )
            cells = [
                (f"{gain[part]['median']:.2f}", f"{promised[part]:.2f}", _ratio(row["efficiency"][part]))
                for part in ("total", "prefill")
            ]
            speed.add_row(spec, *cells[0], *cells[1])
            capture, peak = row["memory"]["capture"], row["memory"]["vision_peak"]
            taken = ["-", "-", "-"]
            if capture:
                taken = [f"{capture[name] / MB:.2f}" for name in ("blockwise", "full_map")] + [
                    f"{capture['ratio']:.3f}"
                ]
            memory.add_row(spec, *taken, *(f"{peak[name] / MB:.1f}" for name in ("plain", "patched", "eager")))
        for table in (overhead, speed, memory):
            console.print(table)
    console.print(
        "Total: vision tower to first logits; +ms: patched less oracle. Ratios: median over rounds of readings paired "
        "within a round, ± half the interquartile range. The row none shows the measuring error. FLOPs "
        f"{CONVENTION}.",
        highlight=False,
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_style="",
        min_width=len(title) + 2,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        if column == "method":
            table.add_column(column, overflow="fold")  # a long spec takes two lines, numbers are never cut
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _ratio(spread: Mapping[str, float]) -> str:
    half = f"{(spread['high'] - spread['low']) / 2:.3f}"
    return f"{spread['median']:.3f}±{half.removeprefix('0')}"
