"""The measuring code: that it measures what it says. No claim about speed: a machine under load must pass too."""

import gc
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText

import vlmfast
from vlmfast.attention import ENTRIES_CPU, attention_rows, column_mean
from vlmfast.cost import prompt_cost
from vlmfast.eval import bench as bench_module
from vlmfast.eval.bench import GROUPS, SHAPES, Shape, bench, measure_specs, print_table, random_inputs, subject
from vlmfast.eval.latency import (
    Clock,
    LiveBytes,
    Spread,
    generation,
    image_inputs,
    interleave,
    measure,
    peak_bytes,
    ratio,
    use_threads,
    weight_bytes,
)
from vlmfast.visual import Score

SPECS = ["none", "random:keep=0.25", "hiprune:keep=0.25"]
CPU = torch.device("cpu")


def tiny_llava():
    return bench_module._llava(
        bench_module._sizes(32, 48, 3, 4), {**bench_module._sizes(32, 48, 2, 4), "num_key_value_heads": 2}, 56, 1024
    )


def tiny_qwen():
    config = SHAPES["qwen2.5-vl"].config()
    for part, sizes in (("text_config", (32, 48, 2, 4)), ("vision_config", (32, 48, 4, 4))):
        width, ff, layers, heads = sizes
        inner = getattr(config, part)
        inner.hidden_size, inner.intermediate_size = width, ff
        inner.num_hidden_layers, inner.num_attention_heads = layers, heads
    config.text_config.vocab_size, config.image_token_id, config.video_token_id = 1024, 1023, 1022
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.text_config.rope_parameters["mrope_section"] = [1, 1, 2]
    config.vision_config.out_hidden_size = 32
    return config


TINY = {
    "tiny-llava": Shape("tiny", tiny_llava, (1, 4, 4)),
    "tiny-qwen": Shape("tiny", tiny_qwen, (1, 12, 8)),
}


@pytest.fixture(scope="module")
def rows():
    """Rows of both families with two rounds each, and the time-free facts they were made from."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, shape in TINY.items():
            monkeypatch.setitem(SHAPES, name, shape)
        return {name: bench(name, SPECS, repeats=2) for name in TINY}


@pytest.fixture(scope="module")
def llava():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(SHAPES, "tiny-llava", TINY["tiny-llava"])
        model, inputs, _ = subject("tiny-llava", CPU, "float32")
    return model, inputs


def test_spread_is_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        Spread.of([])


def test_ratios_are_paired():
    assert ratio([2.0, 30.0], [1.0, 10.0]) == Spread.of([2.0, 3.0])
    with pytest.raises(ValueError, match="equally many"):
        ratio([1.0], [1.0, 2.0])


def test_variants_take_turns_and_the_order_turns_around():
    calls = []
    variants = {name: lambda name=name: (calls.append(name), len(calls))[1] for name in "abc"}
    results = interleave(variants, repeats=2, warmup=1)
    assert calls == [*"cba", *"abc", *"cba"]
    assert results == {"a": [4, 9], "b": [5, 8], "c": [6, 7]}  # the warm-up's 1 to 3 are gone


def test_garbage_is_collected_again_after_an_error():
    def fail():
        assert not gc.isenabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave({"a": fail}, repeats=1)
    assert gc.isenabled()


@pytest.mark.parametrize(("repeats", "warmup", "message"), [(0, 1, "repeats"), (1, -1, "warmup")])
def test_numbers_of_rounds(repeats, warmup, message):
    with pytest.raises(ValueError, match=message):
        interleave({}, repeats=repeats, warmup=warmup)


def test_clock_suits_device_and_threads():
    assert Clock.of("cpu").name == "process time"
    assert Clock.of("cpu", threads=2).name == Clock.of("cuda").name == "wall time"
    assert Clock.of("cpu").milliseconds(lambda: sum(range(1000))) > 0


def test_threads_come_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), use_threads(2):
        assert torch.get_num_threads() == 2
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="positive integer"), use_threads(0):
        pass


def test_live_bytes_follow_storages():
    with LiveBytes() as count:
        x = torch.ones(1000)  # 4000 bytes
        y = x.view(10, 100)  # a view costs nothing
        z = y + 1
        assert count.live == 8000
        del x
        assert count.live == 8000  # y holds the storage
        del y
        assert count.live == 4000
        z.add_(1)  # in place
        assert (count.live, count.peak) == (4000, 8000)
        del z
        assert (count.live, count.peak) == (0, 8000)


def test_memory_from_before_does_not_count():
    old = torch.ones(1000)
    assert peak_bytes(lambda: old.add_(1).view(10, 100).t(), "cpu") == 0
    assert peak_bytes(lambda: old + 1, "cpu") == 4000


def test_the_full_map_is_held_at_once_and_blocks_are_not():
    capture = bench_module._capture_bytes(subject_of(tiny_llava()), 17, [Score(1, "column_mean")])
    assert capture["full_map"] >= 2 * 4 * 17 * 17 * 4  # logits and probabilities of 4 heads, fp32
    q = k = torch.randn(1, 4, 1024, 8)
    blocks = peak_bytes(lambda: column_mean(q, k, 1.0), "cpu")
    full = peak_bytes(lambda: attention_rows(q, k, slice(None), 1.0), "cpu")
    assert full >= 2 * 4 * 1024 * 1024 * 4
    assert blocks <= 4 * 4 * ENTRIES_CPU


def subject_of(config):
    return AutoModelForImageTextToText.from_config(config)


def test_weights_are_counted_once_when_tied(llava):
    model, _ = llava
    total = sum(p.numel() for p in model.parameters()) * 4 + sum(b.nbytes for b in model.buffers())
    assert weight_bytes(model) == total
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_generation_makes_exactly_the_tokens_it_is_asked_for(llava):
    model, inputs = llava
    calls = []
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    timed = generation(model, inputs, 5, Clock.of("cpu"))
    hook.remove()
    assert len(calls) == 5
    assert timed.ttft_ms > 0 and timed.decode_ms_per_token > 0
    assert generation(model, inputs, 1, Clock.of("cpu")).decode_ms_per_token is None
    with pytest.raises(ValueError, match="new_tokens"):
        generation(model, inputs, 0, Clock.of("cpu"))


@pytest.mark.parametrize("spec", ["none", "hiprune:keep=0.25"])
def test_measure(llava, spec):
    model, inputs = llava
    with vlmfast.patch(model, spec):
        latency = measure(model, inputs, new_tokens=3, repeats=2)
    result = latency.as_dict()
    assert json.loads(json.dumps(result)) == result
    for part in ("ttft_ms", "vision_ms", "prefill_ms", "decode_ms_per_token"):
        assert 0 < result[part]["low"] <= result[part]["median"] <= result[part]["high"]
    assert result["peak_memory_mb"] > weight_bytes(model) / 1e6
    assert (result["clock"], result["threads"], result["repeats"]) == ("process time", 1, 2)


def test_measure_without_a_picture_or_with_an_encoded_one(llava):
    model, inputs = llava
    ids = inputs["input_ids"][:, :9]
    latency = measure(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, new_tokens=1, repeats=1)
    assert latency.vision_ms is None and latency.decode_ms_per_token is None
    with torch.no_grad():
        encoded = model.model.get_image_features(inputs["pixel_values"])
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    latency = measure(model, {**text, "mm_encoder_outputs": {"image": encoded}}, repeats=1, memory=False)
    assert latency.vision_ms is None and latency.peak_memory_mb is None


def test_image_inputs_are_those_of_the_encoder():
    model = subject_of(tiny_qwen())
    inputs = random_inputs(model.config, (1, 12, 8), CPU, torch.float32)
    assert set(image_inputs(model, inputs)) == {"pixel_values", "image_grid_thw"}
    assert image_inputs(model, {"input_ids": inputs["input_ids"]}) == {}


@pytest.mark.parametrize("name", TINY)
def test_rows_hold_what_they_promise(rows, name):
    for spec, row in zip(SPECS, rows[name], strict=True):
        assert json.loads(json.dumps(row)) == row
        assert (row["model"], row["spec"], row["repeats"], row["text_tokens"]) == (name, spec, 2, bench_module.TEXT)
        assert row["visual_tokens"] == (16 if name == "tiny-llava" else 24)
        assert row["kept"] == row["visual_tokens"] // (1 if spec == "none" else 4)
        for part in ("vision", "prefill", "total", "decode_per_token"):
            assert row["unpatched_ms"][part]["median"] > 0 and row["patched_ms"][part]["median"] > 0
        assert set(row["over_oracle"]) == set(row["over_oracle_ms"]) == {"vision", "prefill", "total"}
        assert row["decode_over_unpatched"]["median"] > 0
        gain, promised, efficiency = row["speedup"]["total"], row["flops_speedup"]["total"], row["efficiency"]["total"]
        assert efficiency["median"] == pytest.approx(gain["median"] / promised)


@pytest.mark.parametrize("name", TINY)
def test_the_oracle_computes_what_the_patched_model_computes(rows, name):
    for row in rows[name]:
        assert row["oracle_logit_difference"] < 1e-4


@pytest.mark.parametrize("name", TINY)
def test_promised_speedup_is_that_of_the_cost_model(rows, name):
    config, grid = TINY[name].config(), TINY[name].grid
    full = prompt_cost(config, text=bench_module.TEXT, images=[grid])
    for row in rows[name][:2]:  # without statistics
        short = prompt_cost(config, text=bench_module.TEXT, images=[grid], kept=[row["kept"]])
        assert row["flops_speedup"]["total"] == full.total_prefill / short.total_prefill
        assert row["flops_speedup"]["prefill"] == (full.prefill + full.head) / (short.prefill + short.head)
    assert rows[name][2]["flops_speedup"]["total"] < rows[name][1]["flops_speedup"]["total"]  # statistics cost


@pytest.mark.parametrize("name", TINY)
def test_memory_of_capture(rows, name):
    none, chance, scored = rows[name]
    assert none["memory"]["capture"] is None and chance["memory"]["capture"] is None
    capture = scored["memory"]["capture"]
    queries = 17 if name == "tiny-llava" else 96
    assert capture["shape"] == [4, queries, queries]
    assert capture["blockwise"] > 0 and capture["ratio"] == capture["blockwise"] / capture["full_map"]
    assert min(none["memory"]["vision_peak"].values()) > 0


def test_the_model_is_left_as_it_was(llava):
    model, inputs = llava
    with torch.no_grad():
        before = model(**inputs).logits
    own = model.config.vision_config._attn_implementation
    measure_specs(model, inputs, ["hiprune:keep=0.5"], repeats=1, threads=1, warmup=0)
    assert model.config.vision_config._attn_implementation == own
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_json_and_table(rows, tmp_path):
    everything = [row for name in rows for row in rows[name]]
    bench_module.write_rows(tmp_path / "deep" / "bench.json", everything)
    stored = json.loads((tmp_path / "deep" / "bench.json").read_text())
    assert stored["rows"] == everything and "torch" in stored["environment"]
    console = Console(width=80, record=True, file=io.StringIO())
    print_table([*everything, {**everything[-1], "spec": "fastervlm:keep=0.33,fallback=received"}], console)
    text = console.export_text()
    assert "…" not in text  # nothing cut off at the usual width
    for word in ("tiny-llava", "tiny-qwen", "hiprune:keep=0.25", "process time", "X2: 2 x multiply-adds"):
        assert word in text


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"specs": ["hyprune"]}, ValueError, "hiprune"),
        ({"specs": []}, ValueError, "at least one"),
        ({"repeats": 0}, ValueError, "repeats"),
        ({"threads": 0}, ValueError, "threads"),
        ({"dtype": "int8"}, ValueError, "float32, bfloat16, float16"),
        ({"device": "warp"}, ValueError, "warp"),
        ({"name_or_path": "testbed:lava"}, ValueError, "testbed:llava"),
    ],
)
def test_bad_input_is_told_at_once(settings, error, message):
    arguments = {"name_or_path": "small", "specs": ["none"], **settings}
    with pytest.raises(error, match=message):
        bench(arguments.pop("name_or_path"), arguments.pop("specs"), **arguments)


def test_names():
    assert set(GROUPS["all"]) == {"testbed:llava", "testbed:qwen2_5_vl", "llava-0.5b", "qwen2.5-vl"}
    qwen, llava = SHAPES["qwen2.5-vl"].config(), SHAPES["llava-0.5b"].config()
    assert prompt_cost(qwen, text=0, images=[SHAPES["qwen2.5-vl"].grid]).kv_bytes == 1296 * 2 * 256 * 4 * 2
    assert round(prompt_cost(llava, text=48, images=[(1, 24, 24)]).prefill / 1e9) == 480


def test_script_measures_prints_and_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SHAPES, "tiny-llava", TINY["tiny-llava"])
    out = tmp_path / "bench.json"
    assert (
        run_script(monkeypatch, "--model", "tiny-llava", "--method", "none", "--repeats", "1", "--out", str(out)) == 0
    )
    assert [row["spec"] for row in json.loads(out.read_text())["rows"]] == ["none"]
    assert "tiny-llava" in capsys.readouterr().out


def test_script_tells_errors_in_one_line(monkeypatch, capsys):
    assert run_script(monkeypatch, "--model", "testbed:lava", "--method", "none") == 2
    assert capsys.readouterr().err.count("\n") == 1


def run_script(monkeypatch, *options):
    script = Path(__file__).parents[1] / "scripts" / "bench.py"
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(script), run_name="__main__")
    return exit_.value.code
