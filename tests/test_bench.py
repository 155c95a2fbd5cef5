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
from vlmfast.eval import bench_edits as bench_edits_module
from vlmfast.eval.bench import GROUPS, SHAPES, Shape, bench, measure_specs, print_table, random_inputs, subject
from vlmfast.eval.bench_edits import bench_edits, growth, measure_edits, print_edits, through_maps
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
        model, inputs, _ = subject("tiny-llava", "cpu", "float32")
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
    pruning = {"testbed:llava", "testbed:qwen2_5_vl", "llava-0.5b", "qwen2.5-vl"}
    assert set(GROUPS["pruning"]) == pruning and set(GROUPS["attention"]) == {"llava-0.5b", "llava-0.5b-1296"}
    assert set(GROUPS["all"]) == pruning | {"llava-0.5b-1296"}
    qwen, llava = SHAPES["qwen2.5-vl"].config(), SHAPES["llava-0.5b"].config()
    assert prompt_cost(qwen, text=0, images=[SHAPES["qwen2.5-vl"].grid]).kv_bytes == 1296 * 2 * 256 * 4 * 2
    assert round(prompt_cost(llava, text=48, images=[(1, 24, 24)]).prefill / 1e9) == 480


# --- attention edits -------------------------------------------------------------------------------------------

EDITS = ["none", "zerotuning:gamma=3.0", "vhr:layers=1"]
MAPPED = [
    "zerotuning:gamma=5.0",
    "zerotuning:gamma=0.2,heads=1/2",
    "act:theta=0.01,layers=all",
    "act:theta=0.01,layers=1:,heads=0/3",
    "var:dims=3/7,tau=0.5,rho=1.0,summ=0.0,layers=all",
    "vhr:layers=all,alpha=3.0",
    "pai:gamma=1.0,alpha=2.0,layers=all",
    "paint:gamma=1.0,alpha=2.0,beta=1.0,layers=all,fallback=received",
]


@pytest.mark.parametrize("spec", MAPPED)
def test_the_reference_on_full_maps_is_the_same_method(vlm, spec):
    inputs = vlm.prompts([[3, "a", 6], [7], [2, "b", 1, "a", 3]])
    model, own = vlm.model, vlm.model.config.text_config._attn_implementation
    plain = model(**inputs).logits[:, -1]
    with vlmfast.patch(model, spec):
        expected = model(**inputs).logits[:, -1]
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with through_maps(model, spec):
        assert model.config.text_config._attn_implementation == "eager"
        torch.testing.assert_close(model(**inputs).logits[:, -1], expected, rtol=1e-3, atol=2e-4)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    assert (expected - plain).abs().max() > 1e-3, "the method does something here"
    assert model.config.text_config._attn_implementation == own


def test_the_reference_holds_maps(vlm, monkeypatch):
    """Every edit of the reference is made on [B, H, Q, K], and in no other way."""
    inputs, shapes = vlm.prompts([[3, "a", 6]]), []
    attend = bench_edits_module.MapCall.attend

    def seen(self, shown):
        shapes.append(tuple(shown.shape))
        return attend(self, shown)

    monkeypatch.setattr(bench_edits_module.MapCall, "attend", seen)
    with through_maps(vlm.model, "zerotuning:gamma=3.0"):
        vlm.model(**inputs)
    config, length = vlm.model.config.get_text_config(), inputs["input_ids"].shape[1]
    assert shapes == [(1, config.num_attention_heads, length, length)] * config.num_hidden_layers


@pytest.fixture(scope="module")
def edit_rows():
    """Rows of two lengths and of the other family, one round each."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(SHAPES, "short", Shape("short", tiny_llava_of(112), (1, 8, 8)))
        monkeypatch.setitem(SHAPES, "long", Shape("long", tiny_llava_of(448), (1, 32, 32)))
        monkeypatch.setitem(SHAPES, "tiny-qwen", TINY["tiny-qwen"])
        return {name: bench_edits(name, EDITS, repeats=2) for name in ("short", "long", "tiny-qwen")}


def tiny_llava_of(side):
    def config():
        made = tiny_llava()
        made.vision_config.image_size, made.image_seq_length = side, (side // 14) ** 2
        return made

    return config


@pytest.mark.slow
def test_rows_of_edits(edit_rows):
    for name, visual in (("short", 64), ("long", 1024), ("tiny-qwen", 24)):
        for spec, row in zip(EDITS, edit_rows[name], strict=True):
            assert json.loads(json.dumps(row)) == row
            assert (row["kind"], row["model"], row["spec"], row["repeats"]) == ("edits", name, spec, 2)
            assert (row["visual_tokens"], row["text_tokens"]) == (visual, bench_module.TEXT)
            paths = {"patched", "eager"} if spec == "none" else {"patched", "eager", "maps"}
            for part in ("prefill", "decode"):
                assert row["unpatched_ms"][part]["median"] > 0
                assert set(row["over_unpatched"][part]) == paths
                assert all(spread["median"] > 0 for spread in row["over_unpatched"][part].values())
            assert set(row["memory"]["prefill"]) == paths | {"unpatched"}
            assert min(row["memory"]["prefill"].values()) > 0
            assert (row["memory"]["layer"] is None) == (spec == "none")


@pytest.mark.slow
def test_memory_of_an_edit_grows_with_the_tokens_and_not_with_their_square(edit_rows):
    """Sizes are counted, not timed: 1,072 tokens against 112, of 4 heads."""
    short, long = (edit_rows[name][1]["memory"]["layer"] for name in ("short", "long"))
    assert long["maps"] >= 4 * 1072**2 * 4
    tokens = 1072 / 112
    assert long["patched"] / short["patched"] < 1.3 * tokens
    assert long["maps"] / short["maps"] > 5 * tokens
    assert long["own"] <= long["patched"] < long["maps"] / 20
    lines = growth(edit_rows["short"] + edit_rows["long"])
    assert [line.split(":")[0] for line in lines] == ["zerotuning", "vhr"]
    assert f"{tokens:.2f} times the tokens" in lines[0]
    assert growth(edit_rows["short"]) == []


def test_eager_prefill_holds_maps_and_patched_does_not(edit_rows):
    peaks = edit_rows["long"][1]["memory"]["prefill"]
    assert peaks["eager"] - peaks["unpatched"] > 4 * 1072**2 * 4
    assert peaks["patched"] - peaks["unpatched"] < (peaks["eager"] - peaks["unpatched"]) / 10


def test_decoding_starts_from_the_same_cache_every_time(llava):
    """What is timed is the next tokens of one prompt, however often it is timed."""
    model, inputs = llava
    lengths = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(
            (
                kwargs["inputs_embeds"].shape[1],
                kwargs["past_key_values"] and kwargs["past_key_values"].get_seq_length(),
            )
        ),
        with_kwargs=True,
    )
    try:
        measure_edits(model, inputs, ["zerotuning:gamma=3.0"], repeats=2, threads=1, warmup=0)
    finally:
        hook.remove()
    prompt = inputs["input_ids"].shape[1]
    steps = [held for new, held in lengths if new == 1]
    run = list(range(prompt, prompt + bench_edits_module.STEPS))
    assert steps == run * (2 * 4)  # twice, by unpatched, eager, patched, maps


def test_edits_leave_the_model_as_it_was(llava):
    model, inputs = llava
    with torch.no_grad():
        before = model(**inputs).logits
    measure_edits(model, inputs, ["vhr:layers=1"], repeats=1, threads=1, warmup=0)
    assert model.config.text_config._attn_implementation == "sdpa" and "vlmfast_handle" not in model.__dict__
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_table_of_edits(edit_rows):
    console = Console(width=80, record=True, file=io.StringIO())
    everything = [row for name in edit_rows for row in edit_rows[name]]
    print_edits([*everything, {**everything[-1], "spec": "var:dims=1415/2533,tau=20.0,layers=2:-1"}], console)
    text = console.export_text()
    assert "…" not in text
    for word in ("short", "tiny-qwen", "vhr:layers=1", "maps", "eager attention alone", "times the memory"):
        assert word in text


@pytest.mark.slow
def test_script_measures_edits_apart(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SHAPES, "tiny-llava", TINY["tiny-llava"])
    out = tmp_path / "bench.json"
    options = ["--model", "tiny-llava", "--repeats", "1", "--out", str(out)]
    for spec in ("none", "zerotuning", "random:keep=0.5+zerotuning"):
        options += ["--method", spec]
    assert run_script(monkeypatch, *options) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row.get("kind"), row["spec"]) for row in rows] == [
        (None, "none"),
        (None, "random:keep=0.5+zerotuning"),
        ("edits", "none"),
        ("edits", "zerotuning"),
    ]
    assert "time over unpatched" in capsys.readouterr().out


def test_script_knows_what_to_measure_by_default():
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "bench.py"))
    plan, whole, edits = script["plan"], list(script["METHODS"]), list(script["EDITS"])
    assert plan("all", "llava-0.5b", None) == (whole, edits, [])
    assert plan("all", "llava-0.5b-1296", None) == ([], edits, [])
    assert plan("all", "qwen2.5-vl", None) == plan("small", "small", None) == (whole, [], [])
    assert plan("attention", "llava-0.5b", None) == ([], edits, [])
    assert plan("pruning", "llava-0.5b", None) == plan("llava-0.5b", "llava-0.5b", None) == (whole, [], [])
    assert plan("small", "small", ["none"]) == (["none"], [], [])
    edits_only = bench_edits_module.edits_only
    assert not edits_only("pai:gamma=1.1") and not edits_only("random:keep=0.5+zerotuning") and not edits_only("none")
    for spec in (*whole, *edits):
        assert spec == "none" or edits_only(spec) == (spec in edits)


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
