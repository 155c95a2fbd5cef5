"""Our side of lmms-eval without lmms-eval: arguments, generation settings, the engine that answers its requests."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import vlmfast
from vlmfast.adapters import ADAPTERS
from vlmfast.eval.lmms.arguments import Arguments, parse
from vlmfast.eval.lmms.engine import Ask, Engine, batches
from vlmfast.eval.lmms.options import Options
from vlmfast.eval.models import load_model
from vlmfast.eval.prompts import Prompts
from vlmfast.eval.tasks import TASKS, image
from vlmfast.solving import cost_of

MODELS = ["testbed:llava", "testbed:qwen2_5_vl"]
SHORT = Options.of({"max_new_tokens": 4, "until": ["\n\n"]}, 64)


# --- what --model_args say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pretrained=a/b,method=hiprune:keep=0.33", {"pretrained": "a/b", "method": "hiprune:keep=0.33"}),
        (
            "method=vtc_cls:keep=0.3,preset=repo,dtype=bfloat16,pretrained=x=y",
            {"method": "vtc_cls:keep=0.3,preset=repo", "dtype": "bfloat16", "pretrained": "x=y"},
        ),
        (
            "pretrained=a,method=hiprune:keep=0.5,alpha=0.2+fastv:keep=8,layer=2,batch_size=4",
            {"pretrained": "a", "method": "hiprune:keep=0.5,alpha=0.2+fastv:keep=8,layer=2", "batch_size": "4"},
        ),
        (
            """method="vtc_cls:keep=0.3,preset=repo",device_map={"a": 0, "b": "cpu"},pretrained='a,b'""",
            {
                "method": "vtc_cls:keep=0.3,preset=repo",
                "device_map": '{"a": 0, "b": "cpu"}',
                "pretrained": "a,b",
            },
        ),
    ],
)
def test_settings_of_methods_and_arguments_share_the_commas(text, found):
    assert parse(text) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pretraind=a", "unknown argument 'pretraind'.*did you mean pretrained"),
        ("method=vtc_cls:keep=0.3,prest=repo", "unknown argument 'prest'.*did you mean preset"),
        ("method=hiprune:keep=0.5,dtype=float32,alpha=0.1", "'alpha'.*setting of 'hiprune:keep=0.5'.*right behind"),
        ("pretrained=a,pretrained=b", "pretrained is given twice"),
        ("pretrained", "unknown argument 'pretrained'"),
        ("pretrained=", "has no value"),
    ],
)
def test_what_is_no_argument_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_arguments_are_read_and_checked():
    read = Arguments.of(
        {"pretrained": "a", "method": " vtc_cls: keep=0.3 , preset=repo", "batch_size": "8", "fps": "2"}
    )
    assert (read.method, read.batch_size, read.fps) == ("vtc_cls:keep=0.3,preset=repo", 8, 2.0)
    assert Arguments.of({"pretrained": "a", "device_map": '{"": "cpu"}'}).device_map == {"": "cpu"}
    for wrong, says in [
        ({}, "pretrained is missing"),
        ({"batch_sise": 2}, "did you mean batch_size"),
        ({"batch_size": "auto"}, "batch_size=auto: no whole number"),
        ({"batch_size": 0}, "1 or more"),
        ({"max_batch_size": 4}, "unknown argument 'max_batch_size'"),
        ({"method": "hiprun"}, "did you mean hiprune"),
        ({"dtype": "bf16"}, "did you mean|there are float32, bfloat16"),
        ({"attn_implementation": "fast"}, "there are eager, sdpa"),
        ({"flops": 0.5}, "none of the methods in 'none' has a keep"),
        ({"flops": 1.5, "method": "hiprune"}, "above 0 and at most 1"),
        ({"device": "cpu", "device_map": "auto"}, "not both"),
        ({"device_map": "{a"}, "no JSON"),
        ({"num_frames": 8, "fps": 1}, "not together"),
    ]:
        with pytest.raises(ValueError, match=says):
            Arguments.of(({"pretrained": "a"} if wrong else {}) | wrong)


def test_no_setting_of_a_method_has_the_name_of_an_argument():
    settings = {setting for method in ADAPTERS.values() for setting in method.settings()}
    assert not settings & set(Arguments.defaults())


# --- generation settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, {"max_new_tokens": 64, "do_sample": False, "num_beams": 1, "temperature": None}),
        ({"temperature": 0, "top_p": 1.0, "num_beams": 3}, {"do_sample": False, "num_beams": 3, "top_p": None}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": None}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False, "temperature": None}),
        ({"do_sample": True}, {"do_sample": True, "temperature": 1.0}),
        ({"do_sample": True, "temperature": 0}, {"do_sample": False}),
        ({"max_gen_toks": 7, "repetition_penalty": 1.1}, {"max_new_tokens": 7, "repetition_penalty": 1.1}),
    ],
)
def test_generation_settings(given, found):
    kwargs = dict(Options.of(given, 64).kwargs)
    assert {name: kwargs[name] for name in found} == found


def test_beams_a_method_needs_are_taken_where_the_task_has_no_wish():
    assert dict(Options.of({"num_beams": 1}, 64, beams=5).kwargs)["num_beams"] == 5
    assert dict(Options.of({"num_beams": 2}, 64, beams=5).kwargs)["num_beams"] == 2


def test_stops_and_what_means_nothing():
    options = Options.of({"until": ["\n\n", "Q:", "</s>"], "stop_sequences": ".", "image_aspect_ratio": "pad"}, 64)
    assert options.until == ("Q:", "</s>", ".") and options.ignored == ("image_aspect_ratio",)
    assert options.cut(" a b\n\nc Q: d. e") == "a b\n\nc" and options.cut(" plain ") == "plain"
    assert Options.of({"skip_special_tokens": True}, 64).ignored == ()
    for wrong in ({"max_new_tokens": 0}, {"until": [1]}, {"num_beams": 1.5}):
        with pytest.raises(ValueError, match="generation_kwargs"):
            Options.of(wrong, 64)


def test_batches_hold_equal_options_longest_first():
    other = Options.of({"max_new_tokens": 5}, 64)
    asks = [
        Ask(str(i), list, length, options)
        for i, (length, options) in enumerate([(3, SHORT), (9, other), (7, SHORT), (5, SHORT), (9, other)])
    ]
    assert list(batches(asks, 2)) == [[2, 3], [0], [1, 4]]


# --- the engine ---------------------------------------------------------------------------------------------------


LLAVA, QWEN = MODELS
SLOWLY = pytest.param(QWEN, marks=pytest.mark.slow)


def under(fast, slow):
    """Test parameters (model, spec): every spec once, then on the other model."""
    pairs = [pytest.param(*pair) for pair in fast] + [pytest.param(*pair, marks=pytest.mark.slow) for pair in slow]
    return pytest.mark.parametrize(("engine", "spec"), pairs, indirect=["engine"])


@pytest.fixture(scope="module", params=[LLAVA, SLOWLY])
def engine(request):
    engine = Engine(Arguments(pretrained=request.param, batch_size=2, latency=1))
    yield engine
    engine.close()


def docs(n=3):
    return [*TASKS["colour"].load(2, 0), *TASKS["count"].load(2, 0)][:n]


def picture(doc):
    return Image.fromarray(image(doc))


def message(*content):
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "url": c} for c in content]
    return [{"role": "user", "content": parts}]


def ask(name, *content, options=SHORT, **more):
    texts = sum(len(c) for c in content if isinstance(c, str))
    return Ask(name, lambda: message(*content), texts, options, **more)


def requests():
    """One picture, two of other sizes, none, and one again; answered in another order: (4th, 2nd), (3rd, 1st)."""
    one, two, three = docs()
    wide = picture(two).resize((150, 90)).convert("L")
    asks = [
        ask("one", picture(one), one.prompt),
        ask("two", picture(two), wide, "look at the first picture : " + two.prompt),
        ask("none", "what colour is the cup ?"),
        ask("three", picture(three), three.prompt),
    ]
    return [replace(one, length=length) for one, length in zip(asks, (0, 2, 1, 3))]


@under(
    [(LLAVA, "none"), (QWEN, "hiprune:keep=0.4"), (LLAVA, "fastv:keep=0.5"), (QWEN, "vcd")],
    [(QWEN, "none"), (LLAVA, "hiprune:keep=0.4"), (QWEN, "fastv:keep=0.5"), (LLAVA, "vcd")],
)
def test_answers_are_those_of_a_plain_generate(engine, spec):
    """In batches of two and in another order, or one at a time as a user asks: the same answers."""
    engine.open(spec)
    replies = engine.answer(requests())
    plain = []
    for request in requests():
        inputs = engine.inputs([engine._messages(request)])
        assert inputs["attention_mask"].all()  # alone there is no padding
        with torch.no_grad():
            out = engine.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        plain.append(engine.tokenizer.decode(new, skip_special_tokens=True).strip())
        assert replies[len(plain) - 1].prompt_tokens == inputs["input_ids"].shape[1]
        assert replies[len(plain) - 1].tokens == len(new)
    assert [reply.text for reply in replies] == plain
    assert plain[3] != plain[1] and plain[2] != plain[0]  # the two of a batch


def test_prompts_are_those_of_the_harness(engine):
    """What lmms-eval asks is tokenised as `vlmfast eval` does it."""
    doc = docs()[0]
    ours = Prompts(engine.processor, engine.model.device, engine.model.dtype).full(doc.prompt, image(doc))
    theirs = engine.inputs([engine._messages(ask("x", picture(doc), doc.prompt))])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_likelihoods_are_those_of_a_forward(engine):
    """Of answers of one and of two tokens, in one batch, against the logits of the whole text."""
    doc = docs()[0]
    answers = [" " + doc.answer, " no", " blue cup"]
    engine.open("none")
    replies = engine.answer([ask("x", picture(doc), doc.prompt, continuation=text) for text in answers])
    assert [reply.tokens for reply in replies] == [1, 1, 2]
    prompt = engine.inputs([engine._messages(ask("x", picture(doc), doc.prompt))])
    for text, reply in zip(answers, replies):
        more = torch.tensor([engine.tokenizer(text, add_special_tokens=False)["input_ids"]])
        inputs = dict(prompt)
        for name, fill in (("input_ids", more), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.zeros_like(more) + fill], 1)
        with torch.no_grad():
            logits = engine.model(**inputs).logits[0, -more.shape[1] - 1 : -1]
        logs = logits.log_softmax(-1).gather(1, more[0, :, None])
        assert reply.loss == pytest.approx(-logs.mean().item(), abs=2e-5)
        assert reply.greedy == bool((logits.argmax(-1) == more[0]).all())
    assert replies[0].greedy and replies[0].loss == min(reply.loss for reply in replies)


def test_likelihoods_under_a_method_see_what_it_keeps(engine):
    """The prompt is pruned as for an answer: what is asked about it does not change what is kept."""
    doc = docs()[0]
    engine.open("fastv:keep=0.3")
    words = (" no", " blue cup", " " + doc.answer)
    together = engine.answer([ask("x", picture(doc), doc.prompt, continuation=word) for word in words])
    alone = [engine.answer([ask("x", picture(doc), doc.prompt, continuation=word)])[0] for word in words]
    assert [one.loss for one in together] == pytest.approx([one.loss for one in alone], abs=2e-5)
    said = engine.answer([ask("x", picture(doc), doc.prompt)])[0].text
    best = engine.answer([ask("x", picture(doc), doc.prompt, continuation=" " + said)])[0]
    assert best.greedy
    assert engine.costs.summary()["visual_tokens"] < engine.costs.summary()["visual_tokens_before"]


def test_likelihoods_need_a_method_that_leaves_tokens_alone(engine):
    doc = docs()[0]
    for spec in ("vcd", "opera"):
        engine.open(spec)
        with pytest.raises(RuntimeError, match="q/1.*likelihood of a given answer"):
            engine.answer([ask("q/1", picture(doc), doc.prompt, continuation=" no")])


@under(
    [(QWEN, "none"), (LLAVA, "fastv:keep=0.5")],
    [(LLAVA, "none"), (QWEN, "fastv:keep=0.5")]
    + [(model, spec) for model in MODELS for spec in ("hiprune:keep=0.4", "pai:gamma=1.0")],
)
def test_costs_are_those_of_the_report(engine, spec):
    """Prompts without a picture, with two, repeated in other batches: as told by the patch, prompt by prompt."""
    engine.open(spec)
    engine.answer([*requests(), Ask("again", requests()[0].messages, 99, SHORT, counts=False)])
    cost, depth = engine.costs.summary(), engine.costs.depth
    engine.close()
    assert cost["prompts"] == 4
    before, kept, layers, share, plain = 0, 0.0, np.zeros(depth), [], []
    for request in requests():
        inputs = engine.inputs([engine._messages(request)])
        with vlmfast.patch(engine.model, "grid:keep=1.0") as handle, torch.no_grad():
            engine.model.generate(**inputs, max_new_tokens=1)
            sizes = [one.size for one in handle.report().images] if "pixel_values" in inputs else []
        before += sum(size.span for size in sizes)
        text = inputs["input_ids"].shape[1] - sum(size.span for size in sizes)
        plain.append(cost_of(engine.model.config, (), text, sizes).total_prefill)
        with vlmfast.patch(engine.model, spec) as handle, torch.no_grad():
            engine.model.generate(**inputs, max_new_tokens=1)
            report = handle.report()
        if report.prunes and report.prompts and "pixel_values" in inputs:
            kept += sum(len(one.indices) for one in report.images)
            layers += np.array(report.per_layer)
            share.append(report.share)
    assert cost["visual_tokens_before"] == before / 4
    if spec in ("none", "pai:gamma=1.0"):
        assert cost["visual_tokens"] == before / 4 and cost["visual_tokens_per_layer"] == [before / 4] * depth
        assert cost["share_of_unpatched"] == 1 if spec == "none" else cost["share_of_unpatched"] > 1  # a second prompt
    else:
        assert cost["visual_tokens"] == kept / 4
        assert cost["visual_tokens_per_layer"] == pytest.approx(list(layers / 4))
        assert min(share) < cost["share_of_unpatched"] < 1  # a text costs what it does
    assert cost["total_prefill"] == pytest.approx(cost["share_of_unpatched"] * sum(plain) / 4)
    assert cost["decode"] > 0


def test_times_of_the_first_request(engine):
    engine.open("grid:keep=0.25")
    assert engine.latency() == {}  # nothing was asked
    engine.open("grid:keep=0.25")
    engine.answer(requests()[:1])
    times = engine.latency()
    assert times["ttft_ms"]["median"] > 0 and times["ttft_speedup"]["median"] > 0 and times["prompt"] == "one"
    assert engine.handle is None
    engine.model.generate(**engine.inputs([engine._messages(requests()[0])]), max_new_tokens=1)  # as before


def test_stops_end_an_answer(engine):
    doc = docs()[0]
    engine.open("none")
    whole = engine.answer([ask("x", picture(doc), doc.prompt)])[0]
    cut = engine.answer([ask("x", picture(doc), doc.prompt, options=Options.of({"until": [whole.text[1:3]]}, 9))])[0]
    assert whole.text.startswith(cut.text) and len(cut.text) == 1 and cut.tokens <= whole.tokens


def test_pictures_go_where_the_text_wants_them(engine):
    one, two, _ = docs()
    written = message(picture(one), picture(two), "first <image> then <image> what is red ?")
    meant = message("first ", picture(one), " then ", picture(two), " what is red ?")
    both = [engine.inputs([engine._messages(Ask("x", lambda m=m: m, 1, SHORT))]) for m in (written, meant)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_words_that_are_tokens_stay_words(engine):
    """Markers in a question, more than pictures: its text, not further placeholders."""
    doc = docs()[0]
    token = engine.processor.image_token
    inputs = engine.inputs([engine._messages(ask("x", picture(doc), f"{token} and {token} what ?"))])
    plain = engine.inputs([engine._messages(ask("x", picture(doc), "what ?"))])
    number = engine.tokenizer.convert_tokens_to_ids(token)
    assert (inputs["input_ids"] == number).sum() == (plain["input_ids"] == number).sum()


def test_what_a_model_does_not_take(engine):
    engine.open("none")
    for kind, says in (("video", "video"), ("audio", "a prompt with audio")):
        request = Ask("task/7", lambda k=kind: [{"role": "user", "content": [{"type": k, "url": "x"}]}], 1, SHORT)
        with pytest.raises(RuntimeError, match=f"stopped at task/7: NotImplementedError: .*{says}"):
            engine.answer([requests()[0], request])


def test_a_system_prompt_comes_first(tmp_path):
    (tmp_path / "p.txt").write_text("be brief\n")
    engine = Engine(Arguments.of({"pretrained": MODELS[0], "system_prompt": str(tmp_path / "p.txt")}))
    assert engine._messages(requests()[0])[0] == {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    assert Arguments.of({"pretrained": "a", "system_prompt": "short " * 999}).system_prompt.startswith("short")


def test_limits_of_pixels():
    tokens = []
    for most in (None, 48 * 48):
        engine = Engine(Arguments(pretrained=MODELS[1], max_pixels=most))
        tokens.append(engine.inputs([engine._messages(requests()[0])])["input_ids"].shape[1])
    assert tokens[1] < tokens[0]
    with pytest.raises(ValueError, match="does not size images by pixels"):
        Engine(Arguments(pretrained=MODELS[0], max_pixels=48 * 48))


def test_keep_solved_for_a_share():
    engine = Engine(Arguments(pretrained=MODELS[0], method="grid", flops=0.6))
    engine.answer(requests()[:1])
    assert engine.spec.startswith("grid:keep=0.") and 0.5 < engine.costs.summary()["share_of_unpatched"] < 0.6
    engine.close()


def test_a_model_loaded_as_asked():
    model, _ = load_model(MODELS[0], device_map={"": "cpu"}, attention="eager", dtype="bfloat16")
    assert model.config._attn_implementation == "eager" and model.dtype == torch.bfloat16


@pytest.mark.parametrize("how", [{"device": "auto"}, {"device_map": "auto"}])
def test_a_model_shared_out(monkeypatch, how):
    """On a machine of CPUs that comes to one place; several processes would each take all that there is."""
    engine = Engine(Arguments(pretrained=MODELS[0], **how))
    assert (engine.model.device.type, engine.model.dtype) == ("cpu", torch.float32)
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="device auto shares a model out .* and 2 processes run on this one"):
        Engine(Arguments(pretrained=MODELS[0], **how))


# --- without lmms-eval --------------------------------------------------------------------------------------------


def test_one_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    from vlmfast.__main__ import main

    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--model", MODELS[0], "--task", "lmms:pope", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "vlmfast: lmms_eval is not installed; pip install 'vlmfast[lmms]' brings it\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "colour"], "colour: lmms-eval's tasks have a call of their own"),
        (["--beams", "2"], "--beams does not go with lmms-eval's tasks"),
        (["--workers", "2"], "--workers does not go with lmms-eval's tasks"),
    ],
)
def test_what_does_not_go_with_their_tasks(options, says, capsys, tmp_path):
    from vlmfast.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["eval", "--task", "lmms:pope", "--out", str(tmp_path), *options])
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_their_tasks_are_listed_and_not_taken_for_ours():
    from vlmfast.eval.tasks import choose

    with pytest.raises(ValueError, match="lmms:pope: lmms-eval's tasks are for vlmfast eval alone"):
        choose(["lmms:pope"])


def test_the_entry_point_names_what_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nvlmfast = "vlmfast.eval.lmms:manifest"' in text
    from vlmfast.eval import lmms

    assert callable(lmms.manifest)
