"""What decoding methods cost: that it is measured over plain decoding of the same width, and what is counted."""

import io
import json
import runpy
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_bench import TINY, run_script

import vlmfast
from vlmfast.eval import bench_decoding as module
from vlmfast.eval.bench import GROUPS, SHAPES, TEXT, subject
from vlmfast.eval.bench_decoding import bench_decoding, decodes, measure_decoding, print_decoding
from vlmfast.eval.bench_edits import edits_only
from vlmfast.eval.latency import Clock, Forwards, generation

RESTLESS = "opera:sigma=20.0,threshold=1,candidates=3"  # goes back on tiny models
SPECS = ["none", "dola", "vcd", "pai:layers=all", "opera", "opera:candidates=2", "random:keep=0.5+vcd"]


@pytest.fixture(scope="module")
def llava():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(SHAPES, "tiny-llava", TINY["tiny-llava"])
        model, inputs, _ = subject("tiny-llava", "cpu", "float32")
    return model, inputs


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, shape in TINY.items():
            monkeypatch.setitem(SHAPES, name, shape)
        monkeypatch.setattr(module, "NEW_TOKENS", 5)
        return {name: bench_decoding(name, SPECS, repeats=2) for name in TINY}


def test_which_specs_decode():
    for spec in ("vcd", "opera", "random:keep=0.5+vcd", "zerotuning+dola", "pai", "pai:gamma=1.3", "paint"):
        assert decodes(spec) and not edits_only(spec), spec
    for spec in ("none", "pai:gamma=1.0", "paint:gamma=1.0", "zerotuning", "hiprune:keep=0.5"):
        assert not decodes(spec), spec


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_rows(rows, name):
    for spec, row in zip(SPECS, rows[name], strict=True):
        assert json.loads(json.dumps(row)) == row
        assert (row["kind"], row["model"], row["spec"], row["repeats"]) == ("decoding", name, spec, 2)
        assert (row["text_tokens"], row["visual_tokens"]) == (TEXT, 16 if name == "tiny-llava" else 24)
        assert row["beams"] == (5 if spec.startswith("opera") else 1)
        for part in ("prefill", "decode"):
            assert row["unpatched_ms"][part]["median"] > 0 and row["patched_ms"][part]["median"] > 0
            assert row["over_unpatched"][part]["median"] > 0
    counted = {row["spec"]: (row["forwards_per_token"], row["rows_per_token"]) for row in rows[name]}
    assert counted == {
        "none": (1, 1),
        "dola": (1, 1),
        "vcd": (1, 2),
        "pai:layers=all": (1, 2),
        "opera": (1, 25),
        "opera:candidates=2": (1, 10),
        "random:keep=0.5+vcd": (1, 2),
    }


def test_forwards_of_steps_that_go_back_are_counted(vlm):
    """A search that goes back takes more calls for as many tokens; what it says itself agrees."""
    model, inputs = vlm.model, vlm.prompts([[3, "a", 6]])
    found = {}
    for spec in ("opera:candidates=2", RESTLESS):
        with vlmfast.patch(model, spec) as handle:
            timed = generation(model, inputs, 26, Clock.of("cpu"), beams=3, count=True)
            (note,) = [note for note in handle.report().notes if "steps" in note]
        calls = int(note.split(" forwards")[0].split()[-1])
        # The first token is chosen behind the first step's forward of candidates.
        assert timed.forwards_per_token == (calls - 1) / 25, note
        found[spec] = timed.forwards_per_token
    assert found["opera:candidates=2"] == 1 < found[RESTLESS]


def test_forwards_are_those_of_the_decoder(llava):
    model, inputs = llava
    batch = {name: torch.cat([value] * 3) for name, value in inputs.items()}
    with Forwards(model) as counted, torch.no_grad():
        model(**batch)
        assert (counted.calls, counted.rows) == (1, 3)
        model(**inputs)
    assert (counted.calls, counted.rows) == (2, 4)
    with torch.no_grad():
        model(**inputs)
    assert (counted.calls, counted.rows) == (2, 4), "nothing is left behind"


def test_readings_are_over_plain_decoding_of_the_same_width(llava, monkeypatch):
    """The unpatched model runs once a round for each width, and methods of a width share it."""
    model, inputs = llava
    seen = []

    def timed(model, inputs, new_tokens, clock, *, beams=1, count=False):
        patched = "vlmfast_handle" in model.__dict__ and model.__dict__["vlmfast_handle"].spec
        time = {("none", 1): 1.0, ("none", 5): 4.0, ("vcd", 1): 3.0, ("opera", 5): 6.0}[patched or "none", beams]
        seen.append((patched or "none", beams, count))
        return module.Generation(10 * time, time, 7.0 if count else None, 9.0 if count else None)

    monkeypatch.setattr(module, "generation", timed)
    plain, vcd, opera = measure_decoding(model, inputs, ["none", "vcd", "opera"], repeats=2, threads=1, warmup=0)
    assert [row["over_unpatched"]["decode"]["median"] for row in (plain, vcd, opera)] == [1.0, 3.0, 1.5]
    assert [row["over_unpatched"]["prefill"]["median"] for row in (plain, vcd, opera)] == [1.0, 3.0, 1.5]
    assert opera["unpatched_ms"]["decode"]["median"] == 4.0 and opera["patched_ms"]["prefill"]["median"] == 60.0
    assert (vcd["forwards_per_token"], vcd["rows_per_token"]) == (7, 9)
    first = [("none", 1, False), ("none", 5, False), ("none", 1, False), ("vcd", 1, False), ("opera", 5, False)]
    assert seen[:10] == first + first[::-1], "in turns"
    assert [count for _, _, count in seen[10:]] == [True] * 3


def test_model_is_left_as_it_was(llava):
    model, inputs = llava
    with torch.no_grad():
        before = model(**inputs).logits
    measure_decoding(model, inputs, ["vcd", "opera"], repeats=1, threads=1, warmup=0, new_tokens=3)
    assert "vlmfast_handle" not in model.__dict__ and "generate" not in model.__dict__
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.slow
def test_table(rows):
    console = Console(width=80, record=True, file=io.StringIO())
    print_decoding([row for name in rows for row in rows[name]], console)
    text = console.export_text()
    assert "…" not in text
    for word in ("tiny-llava", "tiny-qwen", "opera", "with 5 beams", "with 1 beam ", "forwards", "25"):
        assert word in text


@pytest.mark.parametrize(
    ("change", "message"),
    [({"specs": ["vdc"]}, "vcd"), ({"repeats": 0}, "repeats"), ({"dtype": "int8"}, "float32"), ({"device": "x"}, "x")],
)
def test_bad_input_is_told_at_once(change, message):
    arguments = {"specs": ["vcd"], **change}
    with pytest.raises(ValueError, match=message):
        bench_decoding("small", arguments.pop("specs"), **arguments)


def test_script(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SHAPES, "tiny-llava", TINY["tiny-llava"])
    out = tmp_path / "bench.json"
    options = ["--model", "tiny-llava", "--repeats", "1", "--out", str(out)]
    for spec in ("none", "vcd", "vhr:layers=1"):
        options += ["--method", spec]
    assert run_script(monkeypatch, *options) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row.get("kind"), row["spec"]) for row in rows] == [
        (None, "none"),
        ("edits", "none"),
        ("edits", "vhr:layers=1"),
        ("decoding", "none"),
        ("decoding", "vcd"),
    ]
    assert "with as many beams" in capsys.readouterr().out


def test_group():
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "bench.py"))
    assert set(GROUPS["decoding"]) == {"testbed:llava", "llava-0.5b"}
    for model in GROUPS["decoding"]:
        assert script["plan"]("decoding", model, None) == ([], [], list(script["DECODING"]))
    assert all(spec == "none" or decodes(spec) for spec in script["DECODING"])
    assert script["plan"]("small", "small", ["opera"]) == ([], [], ["opera"])
    assert {spec.partition(":")[0] for spec in script["DECODING"]} >= {
        name for name, cls in vlmfast.adapters.ADAPTERS.items() if cls.kind == "decoding"
    }


@pytest.mark.slow
def test_command(monkeypatch, tmp_path, capsys):
    """Specs of both kinds in one call: each measured in its way, all in one file."""
    from vlmfast.__main__ import main

    monkeypatch.setitem(SHAPES, "tiny-llava", TINY["tiny-llava"])
    out = tmp_path / "bench.json"
    options = ["--model", "tiny-llava", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *options, "--method", "opera", "--method", "random:keep=0.5"])
    assert exit_.value.code == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row.get("kind"), row["spec"]) for row in rows] == [(None, "random:keep=0.5"), ("decoding", "opera")]
    printed = capsys.readouterr().out
    assert "efficiency" in printed and "with as many beams" in printed
