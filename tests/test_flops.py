"""`vlmfast flops`: sizes of pictures after their processor, bundled configs, costs of methods, and what it prints."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vlmfast.__main__ import app
from vlmfast.adapters import from_spec
from vlmfast.eval import flops
from vlmfast.families import FAMILIES
from vlmfast.solving import cost_of, picture_of, sizes_of

TERA = 1e12
# Parameters of the published checkpoints, in thousands of millions; prefill of the decoder with 60 text tokens, in
# TFLOPs (X2), from published tables and from formulas written down apart from this package.
KNOWN = {
    "llava-1.5-7b": (7.063, 576, 8.450),
    "llava-1.5-13b": (13.351, 576, 16.470),
    "llava-onevision-7b": (8.030, None, None),
    "qwen2.5-vl-3b": (3.755, 1296, 8.067),
    "qwen2.5-vl-7b": (8.292, 1296, 18.435),
    "qwen3-vl-8b": (8.767, None, None),
    "llava-next-7b": (7.063, None, None),
}


@pytest.mark.parametrize("name", flops.BUNDLED)
def test_bundled_configs_are_those_of_the_models(name: str) -> None:
    config = flops.config_of(name)
    weights = flops.weights_of(config)
    parameters, visual, prefill = KNOWN[name]
    text = config.get_text_config()
    embeddings = 0 if config.tie_word_embeddings else text.vocab_size * text.hidden_size
    assert (weights.vision + weights.language + embeddings) / 1e9 == pytest.approx(parameters, abs=5e-4)
    assert weights.used == weights.language  # no experts
    if visual is not None:
        line = flops.lines(config, [], picture_of(config))[0]
        assert line.visual == visual
        assert line.cost.prefill / TERA == pytest.approx(prefill, abs=5e-4)


def test_experts_that_a_token_does_not_use_are_not_read() -> None:
    from tiny_qwen import TINY

    config = TINY["qwen3_vl_moe"].build().config
    weights = flops.weights_of(config)
    assert 0 < weights.used < weights.language


@pytest.mark.parametrize(
    ("name", "size", "patches", "span"),
    [
        ("llava-1.5-7b", (10, 5000), (1, 24, 24), 576),  # one size for all
        ("qwen2.5-vl-7b", (1008, 1008), (1, 72, 72), 1296),
        ("qwen2.5-vl-7b", (1080, 1920), (1, 78, 138), 39 * 69),  # 38.57, 68.57 tokens, rounded
        ("qwen2.5-vl-7b", (20, 20), (1, 4, 4), 4),  # not below 4 tokens
        ("qwen3-vl-8b", (640, 320), (1, 40, 20), 200),
        ("llava-next-7b", (672, 672), (5, 24, 24), 576 + 48 * 49),
        ("llava-next-7b", (336, 1008), (4, 24, 24), 576 + 24 * 73),
        ("llava-next-7b", (500, 1000), (3, 24, 24), 576 + 24 * 49),  # one row of two, nothing cut off
        ("llava-onevision-7b", (384, 384), (2, 27, 27), 729 + 27 * 28),
    ],
)
def test_pictures_after_their_processor(name: str, size: tuple[int, int], patches: Any, span: int) -> None:
    picture = picture_of(flops.config_of(name), size)
    assert (picture.patches, picture.span) == (patches, span)


def test_at_most_so_many_pixels() -> None:
    config = flops.config_of("qwen2.5-vl-7b")
    picture = picture_of(config, (2000, 1000), 100 * 28 * 28)
    assert picture.tokens <= 100
    assert picture.patches[1:] == (2 * 14, 2 * 7)


@pytest.mark.parametrize("family", [name for name, one in FAMILIES.items() if one.tiled])
def test_tiles_are_the_processors_business(family: str) -> None:
    from conftest import TINY

    with pytest.raises(NotImplementedError, match="tiles"):
        picture_of(TINY[family].build().config, (100, 100))


@pytest.mark.parametrize("family", ["mistral3", "llava_next", "qwen2_vl", "qwen3_5", "gemma3"])
def test_sizes_fit_the_cost_model(family: str) -> None:
    """Whatever the size, the picture is one that the family's cost model takes, with as many tokens."""
    from conftest import TINY

    from vlmfast.cost import vision

    config = TINY[family].build().config
    for size in [(30, 50), (64, 200), (333, 77)]:
        picture = picture_of(config, size)
        tokens = vision(config, picture.patches).tokens
        assert tokens >= picture.tokens if family == "llava_next" else tokens == picture.tokens


@pytest.mark.parametrize(
    ("spec", "rows"),
    [("vcd", 2), ("opera", 25), ("agla:matcher=self,part=1.0", 2), ("none", 1)],
)
def test_further_rows_are_whole_tokens(spec: str, rows: int) -> None:
    """A method whose other rows are as long as the prompt costs whole multiples of plain decoding."""
    config = flops.config_of("llava-1.5-7b")
    picture = picture_of(config)
    adapters = from_spec(spec)
    plain = cost_of(config, (), 60, [picture], generated=7).decode
    assert cost_of(config, adapters, 60, [picture], generated=7).decode == rows * plain


def test_rows_without_pictures_and_pruned_ones_are_shorter() -> None:
    config = flops.config_of("llava-1.5-7b")
    picture = picture_of(config)
    costs = [
        cost_of(config, from_spec(spec), 60, [picture], generated=50).decode
        for spec in ("none", "m3id", "vcd:branch=fastervlm/keep=0.1", "vcd")
    ]
    assert all(a < b for a, b in pairwise(costs))
    assert costs[1] == cost_of(config, from_spec("pai:gamma=1.1"), 60, [picture], generated=50).decode


def test_heads_on_other_layers_cost_heads() -> None:
    config = flops.config_of("llava-1.5-7b")
    picture = picture_of(config)
    head = sizes_of(config, picture).decoder.head
    plain = cost_of(config, (), 60, [picture], generated=11)
    dola = cost_of(config, from_spec("dola:layers=2/4/6"), 60, [picture], generated=11)
    assert dola.decode - plain.decode == 10 * 3 * head
    assert dola.selection == 3 * head


def test_skipped_parts_have_no_paper_convention() -> None:
    config = flops.config_of("llava-1.5-7b")
    plain, skipping = flops.lines(config, ["eemllm:visual_update=none"], picture_of(config))
    assert set(plain.conventions) == {"X2", "F2m", "F3m"}
    assert not skipping.conventions
    assert skipping.share < 0.3


def test_roofline() -> None:
    """Bound by compute while a prompt is read, by bandwidth while an answer is written."""
    config = flops.config_of("llava-1.5-7b")
    device = flops.DEVICES["a100"]
    line = flops.lines(config, [], picture_of(config), generated=2, device=device)[0]
    weights = flops.weights_of(config)
    assert line.ttft_s == line.cost.total_prefill / device.peak
    assert line.token_s == (2 * weights.used + line.cost.kv_bytes) / device.bandwidth


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    arguments = ["flops", "--model", "qwen2.5-vl-7b", "--image-size", "1080x1920", "--method", "random", "--keep"]
    result = CliRunner().invoke(app, [*arguments, "0.5,64", "--tokens", "5", "--gpu", "h100", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "estimate" in result.output
    data = json.loads(out.read_text())
    assert [row["spec"] for row in data["rows"]] == ["unpatched", "random:keep=0.5", "random:keep=64"]
    assert [row["visual"] for row in data["rows"]] == [2691, 1346, 64]
    assert data["prompt"]["patches"] == [1, 78, 138]
    shares = [row["share"] for row in data["rows"]]
    assert shares[0] == 1 > shares[1] > shares[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "llava-1.5"], "did you mean llava-1.5-7b"),
        (["--model", "llava-1.5-7b", "--gpu", "a10"], "did you mean a100"),
        (["--model", "llava-1.5-7b", "--image-size", "100"], "height x width"),
        (["--model", "llava-1.5-7b", "--image-size", "9x9", "--max-pixels", "9"], "same size"),
        (["--model", "qwen2.5-vl-7b", "--max-pixels", "9"], "given size"),
        (["--model", "llava-1.5-7b", "--images", "2", "--method", "vcd"], "one image"),
        (["--model", "llava-1.5-7b", "--method", "fastervln"], "did you mean fastervlm"),
        (["--model", "qwen2.5-vl-7b", "--method", "fastervlm"], "CLS"),
    ],
)
def test_wrong_input(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["flops", *arguments])
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize("width", [200, 80])
def test_the_table_is_whole_on_every_terminal(width):
    """A line a method where there is room, else a column a method, in two tables; no number is cut."""
    heads = [f"head {i}" for i in range(12)]
    rows = {f"method-{j}:keep=0.33": [f"{100 * j + i}.125" for i in range(12)] for j in range(1, 6)}
    console = Console(file=io.StringIO(), width=width, color_system=None)
    found = flops.tables(heads, rows, console)
    for table in found:
        console.print(table)
    printed = console.file.getvalue()
    assert all(cell in printed for cells in rows.values() for cell in cells)
    assert all(name in printed for name in rows) and "…" not in printed
    assert all(len(line) <= width for line in printed.splitlines())
    assert len(found) == (1 if width == 200 else 2)
