"""The evaluation from end to end, on untrained models of the testbed's kind with fewer layers, saved as folders."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CORE, crossed
from devices import dispatched, pretending
from transformers import AutoConfig, GPT2Config

import vlmfast
from vlmfast.adapters import from_spec
from vlmfast.eval import runner, sweep
from vlmfast.eval.models import load_model, model_folder, model_hash
from vlmfast.eval.planning import expand, named, plan, usual_prompt
from vlmfast.eval.prompts import Prompts
from vlmfast.eval.results import Answers, load_results, read_result
from vlmfast.eval.runner import evaluate
from vlmfast.eval.tasks import TASKS, choose, image
from vlmfast.eval.testbed import folder as shipped
from vlmfast.eval.testbed.build import new_model, new_processor
from vlmfast.solving import share_of

PROMPTS = Path(__file__).parent / "data" / "prompts.json"
TASKS_HERE = ["existence", "word", "caption"]
RESULT_FILES = ("--none.json", "--random-keep=1.0.json", "--random-keep=0.5.json")
VOLATILE = ("latency", "started", "seconds", "command", "environment")  # the commit may change meanwhile


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder of each family."""
    root = tmp_path_factory.mktemp("models")
    for name in ("llava", "qwen2_5_vl"):
        whole = new_model(name)
        config = whole.config
        config.text_config.num_hidden_layers = 1
        if kinds := getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = kinds[:1]
        if name == "llava":
            config.vision_config.num_hidden_layers = 2
        else:
            config.vision_config.depth, config.vision_config.fullatt_block_indexes = 2, [1]
        model = type(whole)(config)
        model.generation_config = whole.generation_config
        model.get_input_embeddings().weight.data.normal_(0, 0.6)
        model.save_pretrained(root / name)
        new_processor(name).save_pretrained(root / name)
    return root


def hurry(monkeypatch):
    """One reading of each latency, one thread, short answers."""
    monkeypatch.setattr(sweep, "REPEATS", 1)
    monkeypatch.setattr(runner, "cores", lambda: 1)
    for task in TASKS.values():
        monkeypatch.setattr(task, "NEW_TOKENS", 4)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Latencies are measured once, by `finished`, and no two are the same anyway."""
    hurry(monkeypatch)
    monkeypatch.setattr(sweep.Sweep, "latency", lambda self, spec: {"ttft_ms": None})


def run(folders, out, specs=("random",), keeps=(1.0, 0.5), models=("llava",), tasks=TASKS_HERE, **changes):
    settings = {"limit": 2, "batch": 5, "progress": False} | changes
    return evaluate([str(folders / m) for m in models], specs, keeps, tasks, out, **settings)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """An evaluation that nothing interrupted: unpatched and two budgets. Copied before use."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        return run(folders, out)


def stable(path):
    """What a result must repeat exactly."""
    return {name: value for name, value in json.loads(path.read_text()).items() if name not in VOLATILE}


def answers(path):
    """What a run answered, question by question, without the times."""
    lines = path.with_suffix(".jsonl").read_text().splitlines()[1:]
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def same(paths, others):
    for one, other in zip(paths, others, strict=True):
        assert stable(one) == stable(other)
        key = lambda record: record["id"]  # noqa: E731
        assert sorted(answers(one), key=key) == sorted(answers(other), key=key)


# --- what a run gives ---------------------------------------------------------------------------------------------


def test_results(finished):
    assert [path.name.split("llava")[1] for path in finished] == list(RESULT_FILES)
    none, full, half = results = load_results(finished[0].parent)
    assert [(r.spec, r.method, r.keep) for r in results] == [
        ("none", "none", None), ("random:keep=1.0", "random", 1.0), ("random:keep=0.5", "random", 0.5),
    ]  # fmt: skip
    for result in results:
        assert list(result.tasks) == TASKS_HERE
        assert all(task.images == 2 for task in result.tasks.values())
        assert {task["task"] for task in result.samples} == set(TASKS_HERE)
        assert result.cost["total_prefill"] == sum(
            result.cost[part] for part in ("tower", "projector", "selection", "prefill", "head")
        )
        assert result.latency["ttft_ms"]["median"] > 0 and result.latency["threads"] == 1
        assert result.environment["torch"] == torch.__version__ or torch.__version__.startswith(
            result.environment["torch"]
        )
    tokens = none.cost["visual_tokens_before"]
    assert none.cost["visual_tokens"] == full.cost["visual_tokens"] == tokens
    assert half.cost["visual_tokens"] == tokens / 2 and half.cost["visual_tokens_per_layer"] == [tokens / 2]
    assert none.cost["share_of_unpatched"] == full.cost["share_of_unpatched"] == 1 > half.cost["share_of_unpatched"]
    assert none.macro.difference is None
    assert (full.macro.difference, full.macro.difference_low, full.macro.difference_high) == (0, 0, 0)
    assert [len(s["kept"][0]) for s in half.samples] == [tokens / 2] * len(half.samples)
    assert [s["kept"][0] for s in none.samples] == [list(range(int(tokens)))] * len(none.samples)
    strip = [[{k: s[k] for k in ("task", "index", "prompt")} for s in r.samples] for r in results]
    assert strip[0] == strip[1] == strip[2]


def test_kept_tokens_are_noted_beside_some_answers():
    """Of the samples and more questions in turn of the tasks, about new pictures as long as there are any."""
    docs = [doc for name in TASKS_HERE for doc in TASKS[name].load(15, 0)]
    samples = sweep.fixed_samples(docs)
    shown = sweep.more_samples(docs, samples)
    assert shown[: len(samples)] == samples
    assert len(shown) == len({doc.id for doc in shown}) == sweep.SHOWN > len(samples)
    numbers = [sum(doc.task == name for doc in shown[len(samples) :]) for name in TASKS_HERE]
    assert max(numbers) - min(numbers) <= 1
    scenes = {doc.scene for doc in docs if doc.task == "word"} - {doc.scene for doc in samples}
    words = [doc.scene for doc in shown[len(samples) :] if doc.task == "word"]
    assert len(set(words)) == len(words) <= len(scenes)
    assert sweep.more_samples(docs[:3], docs[:2]) == docs[:3], "no more than there are"


DISK = dict.fromkeys(["model.vision_tower", "model.language_model"], "disk")
DISK |= dict.fromkeys(["model.multi_modal_projector", "lm_head"], "cpu")


@pytest.mark.parametrize("where", ["two devices", "disk"])
def test_a_model_too_large_for_one_device(folders, finished, tmp_path, monkeypatch, where):
    """--device auto, where it comes to two devices, or to files: the same answers, in files of their own."""
    spread = []

    def loaded(name, device, dtype):
        assert device == "auto"
        model, processor = load_model(name, device=device, dtype=dtype, device_map=DISK if where == "disk" else None)
        spread.append(model if where == "disk" else dispatched(model, "scattered"))
        return model, processor

    monkeypatch.setattr(sweep, "load_model", loaded)
    with pretending():
        paths = run(folders, tmp_path, device="auto")
    assert len(set(spread[0].hf_device_map.values())) == 2
    for path, other in zip(paths, finished, strict=True):
        assert stable(path) == stable(other) | {"device": "auto"}
        assert answers(path) == answers(other)
    with pytest.raises(ValueError, match="device auto .now cpu."):
        run(folders, tmp_path)
    with pytest.raises(ValueError, match="workers=2: device auto"):
        run(folders, tmp_path / "other", device="auto", workers=2)


def test_cost_of_cuts_inside_the_language_model(folders, tmp_path):
    """Every layer counts with what it holds, and the statistic of the layer before the cut is paid for."""
    whole = new_model("llava")
    config = whole.config
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 3, 2
    if kinds := getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = kinds[:3]
    model = type(whole)(config)
    model.generation_config = whole.generation_config
    model.save_pretrained(tmp_path / "deep")
    new_processor("llava").save_pretrained(tmp_path / "deep")
    path = evaluate([str(tmp_path / "deep")], ["fastv:keep=0.25"], [], ["word"], tmp_path, limit=2, progress=False)[-1]
    result = read_result(path)
    tokens = result.cost["visual_tokens_before"]
    assert result.cost["visual_tokens_per_layer"] == [tokens, tokens, tokens / 4]
    assert result.cost["visual_tokens"] == tokens / 4
    assert result.cost["selection"] > 0
    assert all(len(sample["kept"][0]) == tokens / 4 for sample in result.samples)
    assert all(record["layers"] == [tokens, tokens, tokens / 4] for record in answers(path))


def test_keeping_all_answers_as_the_unpatched_model(finished):
    assert [r["answer"] for r in answers(finished[0])] == [r["answer"] for r in answers(finished[1])]


@pytest.mark.parametrize(("name", "spec"), crossed(CORE, ["none", "grid:keep=0.3"]))
def test_answers_are_those_of_a_plain_generate(folders, tmp_path, name, spec):
    """Batched, left-padded and encoded beforehand, or one at a time as a user asks: the same answers."""
    path = run(folders, tmp_path, [spec], [], [name])[-1]
    found = {record["id"]: record["answer"] for record in answers(path)}
    model, processor = load_model(str(folders / name))
    prompts = Prompts(processor, model.device, model.dtype)
    for task in TASKS_HERE:
        for doc in TASKS[task].load(2, 0):
            inputs = prompts.full(doc.prompt, image(doc))
            with vlmfast.patch(model, spec), torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            text = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert found.pop(doc.id) == text.strip()
    assert not found


def test_two_models_in_one_call(folders, tmp_path, finished):
    paths = run(folders, tmp_path, models=("llava", "qwen2_5_vl"), keeps=[0.5])
    assert [read_result(p).model.split("/")[-1] for p in paths] == ["llava"] * 2 + ["qwen2_5_vl"] * 2
    same([paths[0], paths[1]], [finished[0], finished[2]])


def test_every_image_is_encoded_once(folders, tmp_path, monkeypatch):
    seen = []
    encode = sweep.encode_images
    monkeypatch.setattr(sweep, "encode_images", lambda *a, **k: seen.append(len(k["pixel_values"])) or encode(*a, **k))
    run(folders, tmp_path, ["random", "hiprune", "fastervlm"])
    docs = [doc for task in TASKS_HERE for doc in TASKS[task].load(2, 0)]
    assert sum(seen) == len({doc.scene for doc in docs})


def test_lines_for_a_log_and_silence(folders, tmp_path, capsys):
    run(folders, tmp_path, keeps=[0.5], tasks=["word"], progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "none" in lines[0] and "random:keep=0.5" in lines[1]
    run(folders, tmp_path / "b", keeps=[0.5], tasks=["word"])
    assert capsys.readouterr() == ("", "")


# --- running again ------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(finished, tmp_path):
    """The finished evaluation in a folder that may be damaged."""
    for path in finished[0].parent.iterdir():
        shutil.copy2(path, tmp_path)
    return [tmp_path / path.name for path in finished]


def test_finished_runs_are_not_repeated(folders, copy, monkeypatch):
    def no(*arguments):
        raise AssertionError("nothing was left to do")

    monkeypatch.setattr(runner, "sweep", no)
    before = [path.stat().st_mtime_ns for path in copy]
    assert run(folders, copy[0].parent) == copy
    assert [path.stat().st_mtime_ns for path in copy] == before


@pytest.mark.parametrize("appended", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 5))])
def test_an_interrupted_evaluation_resumes_exactly(folders, finished, tmp_path, monkeypatch, appended):
    """Ctrl-C while a batch is written, half of it and half a line on the disk."""
    append, count = Answers.append, []

    def cut(self, records):
        count.append(1)
        if len(count) <= appended:
            return append(self, records)
        append(self, records[: len(records) // 2])
        with open(self.path, "a") as file:
            file.write('{"id": "torn')
        raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "append", cut)
    with pytest.raises(KeyboardInterrupt):
        run(folders, tmp_path)
    monkeypatch.setattr(Answers, "append", append)
    asked = []
    answer = sweep.Sweep.answer
    monkeypatch.setattr(sweep.Sweep, "answer", lambda self, b, *r: asked.append(len(b)) or answer(self, b, *r))
    paths = run(folders, tmp_path)
    same(paths, finished)
    docs = sum(len(TASKS[task].load(2, 0)) for task in TASKS_HERE)
    runs, batches = divmod(appended, -(-docs // 5))
    assert sum(asked) == (3 - runs) * docs - 5 * batches  # whole batches are not answered again


def test_a_full_disk_leaves_a_state_to_go_on_from(folders, finished, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(folders, tmp_path)
    monkeypatch.setattr("os.fsync", fsync)
    same(run(folders, tmp_path), finished)


def test_an_error_names_the_question_and_scores_nothing(folders, finished, tmp_path, monkeypatch):
    victim = TASKS["word"].load(2, 0)[0]
    row, failing = Prompts.row, []

    def broken(self, prompt, picture):
        found = row(self, prompt, picture)
        if failing and prompt == victim.prompt and (picture == image(victim)).all():
            raise RuntimeError("no luck")
        return found

    monkeypatch.setattr(Prompts, "row", broken)
    generate = sweep.Sweep._generate
    monkeypatch.setattr(sweep.Sweep, "_generate", lambda *a: failing.append(1) or generate(*a))
    with pytest.raises(RuntimeError, match=f"llava with none stopped at question {victim.id}: RuntimeError: no luck"):
        run(folders, tmp_path)
    assert not list(tmp_path.glob("*.json"))
    monkeypatch.undo()
    hurry(monkeypatch)
    same(run(folders, tmp_path), finished)


def test_an_error_while_encoding_names_the_pictures(folders, tmp_path, monkeypatch):
    def broken(*arguments, **inputs):
        raise RuntimeError("no luck")

    monkeypatch.setattr(sweep, "encode_images", broken)
    scenes = ", ".join(str(doc.scene) for doc in TASKS["word"].load(2, 0))
    with pytest.raises(
        RuntimeError, match=f"llava stopped at encoding the pictures of the test scenes {scenes}: .* luck"
    ):
        run(folders, tmp_path, tasks=["word"])


def test_a_batch_that_is_too_large_says_so(folders, tmp_path, monkeypatch):
    generate = sweep.Sweep._generate

    def short_of_memory(self, batch, handle):
        if len(batch) > 1:
            raise MemoryError("out of memory")
        return generate(self, batch, handle)

    monkeypatch.setattr(sweep.Sweep, "_generate", short_of_memory)
    with pytest.raises(RuntimeError, match="the batch of 5 from question .* each question works alone.*--batch"):
        run(folders, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"limit": 1}, "limit 2 .now 1."),
        ({"seed": 1}, "seed 0 .now 1."),
        ({"batch": 4}, "batch 5 .now 4."),
        ({"dtype": "bfloat16"}, "dtype float32 .now bfloat16."),
        ({"tasks": ["existence", "word"]}, "tasks existence, word, caption .now existence, word."),
    ],
)
def test_results_of_other_settings_are_not_reused(folders, copy, change, says):
    before = [stable(path) for path in copy]
    with pytest.raises(ValueError, match=says):
        run(folders, copy[0].parent, **change)
    assert [stable(path) for path in copy] == before


def test_results_of_other_weights_or_prompts_are_not_reused(folders, copy, tmp_path, monkeypatch):
    other = tmp_path / "models"
    shutil.copytree(folders / "llava", other / "llava")
    assert model_hash(other / "llava") == model_hash(folders / "llava")
    file = other / "llava" / "preprocessor_config.json"
    file = file if file.exists() else file.with_name("processor_config.json")
    file.write_text(file.read_text().replace("0.5", "0.4"))
    model = str(folders / "llava")
    monkeypatch.setattr(runner, "model_folder", lambda name: other / "llava" if name == model else Path(name))
    with pytest.raises(ValueError, match="other weights or configuration of the model"):
        run(folders, copy[0].parent)
    monkeypatch.undo()
    monkeypatch.setattr(TASKS["word"], "prompt", lambda doc: doc.prompt + " ")
    with pytest.raises(ValueError, match="other questions or images in task existence"):  # NEW_TOKENS is back as well
        run(folders, copy[0].parent)


def test_damaged_files_are_named(folders, copy):
    text = copy[1].read_text()
    copy[1].write_text(text[:1000])
    with pytest.raises(ValueError, match=r"keep=1.0.json is not a readable result.*delete it"):
        run(folders, copy[0].parent)
    copy[1].write_text(text)
    copy[0].with_suffix(".jsonl").unlink()
    with pytest.raises(ValueError, match="none.json has lost its answers"):
        run(folders, copy[0].parent)


# --- two processes, and real kills --------------------------------------------------------------------------------

SCRIPT = """
import sys
from vlmfast.adapters import from_spec
from vlmfast.eval import runner, sweep
sweep.REPEATS = 1
runner.cores = lambda: 1
if __name__ == "__main__":
    try:
        runner.evaluate(sys.argv[3:], ["random"], [1.0, 0.5], ["existence", "word"], sys.argv[1], limit=4, batch=2,
                        workers=int(sys.argv[2]), progress=False)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start(folders, tmp_path, out, workers):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    models = [str(folders / name) for name in ("llava", "qwen2_5_vl")]
    command = [sys.executable, str(script), str(out), str(workers), *models]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listen,
    )


def listen() -> None:
    """A shell's background job ignores Ctrl-C, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_side_by_side_and_killed_equals_one_after_the_other(folders, tmp_path):
    one = start(folders, tmp_path, tmp_path / "one", 1)
    assert one.wait() == 0, one.stderr.read()
    for blow, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        two = start(folders, tmp_path, tmp_path / "two", 2)
        lines = 0
        while lines < 40 + 30 * (code == -9):  # in the middle of both models
            assert two.poll() is None, two.stderr.read()
            time.sleep(0.02)
            lines = sum(len(path.read_text().splitlines()) for path in (tmp_path / "two").glob("*.jsonl"))
        os.kill(two.pid, blow)
        assert two.wait(timeout=60) == code
        time.sleep(5)  # workers whose parent was killed notice it at their next batch
        size = [path.stat().st_size for path in sorted((tmp_path / "two").iterdir())]
        time.sleep(1)
        assert size == [path.stat().st_size for path in sorted((tmp_path / "two").iterdir())]
    two = start(folders, tmp_path, tmp_path / "two", 2)
    assert two.wait() == 0, two.stderr.read()
    names = sorted(path.name for path in (tmp_path / "one").glob("*.json"))
    assert len(names) == 6
    same([tmp_path / "one" / name for name in names], [tmp_path / "two" / name for name in names])


@pytest.mark.slow
def test_an_error_in_one_of_two_processes_ends_both(folders, tmp_path):
    with pytest.raises(RuntimeError, match="with random:keep=9999 stopped at question .*keep=9999"):
        run(folders, tmp_path, keeps=[9999], models=("llava", "qwen2_5_vl"), tasks=["word"], workers=2)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_process_that_dies_is_told(folders, tmp_path):
    running, victims = multiprocessing.active_children, []

    def kill(*_):
        while not victims:
            victims.extend(running())
            time.sleep(0.05)
        os.kill(victims[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match="died with exit code -9 .short of memory"):
        run(folders, tmp_path, models=("llava", "qwen2_5_vl"), tasks=["word"], workers=2)
    killer.join()
    assert multiprocessing.active_children() == []


# --- wrong arguments ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual():
    """The testbed's config and usual prompt: config, text tokens, picture."""
    folder, tasks = shipped("llava"), choose(["colour"])
    config = AutoConfig.from_pretrained(folder)
    return config, *usual_prompt(config, folder, tasks, {"colour": tasks["colour"].load(5, 0)})


def test_runs_at_equal_flops(usual):
    """The keeps differ, the cost of the testbed's usual prompt does not; a spec with a keep of its own stays."""
    config, text, picture = usual
    assert picture.tokens == 144 and 5 < text < 60
    found = plan(config, ["none", "random", "fastv", "hiprune:keep=7"], [], [0.6], None, lambda: (text, picture))
    none, random, fastv, own = found.runs
    assert not found.notes
    assert (none, own) == ("none", "hiprune:keep=7")
    assert found.matched == {random: 0.6, fastv: 0.6}
    keeps = [from_spec(spec)[0].keep for spec in (random, fastv)]
    assert keeps[1] < keeps[0] < 100, "FastV pays for the layers before its cut"
    for spec in (random, fastv):
        assert abs(share_of(config, from_spec(spec), picture, text) - 0.6) < 0.006
    shares = plan(config, ["random"], [], [0.6], None, lambda: (text, picture), counted=False)
    assert 0 < from_spec(shares.runs[1])[0].keep < 1, "a share of pictures of any size"
    with pytest.raises(ValueError, match="random: a share of 0.01"):
        plan(config, ["random"], [], [0.01], None, lambda: (text, picture))
    nothing = plan(config, ["all"], [], [0.01], None, lambda: (text, picture))
    assert nothing.runs == ["none"] and len(nothing.notes) == len(named(["all"], "llava"))


def test_keeps_matched_by_flops(usual):
    """A keep stands for what random pruning costs at it: random keeps that, a method that computes more keeps less."""
    config, text, picture = usual
    found = plan(config, ["random", "hiprune"], [1.0, 0.5, 0.25], [], "flops", lambda: (text, picture))
    none, *random, half, quarter = found.runs
    assert random == ["random:keep=72", "random:keep=36"]
    keeps = [from_spec(spec)[0].keep for spec in (half, quarter)]
    assert keeps[0] < 72 and keeps[1] < 36
    targets = [share_of(config, from_spec(f"random:keep={keep}"), picture, text) for keep in (0.5, 0.25)]
    assert [found.matched[spec] for spec in (*random, half, quarter)] == targets * 2
    for spec, target in found.matched.items():
        assert share_of(config, from_spec(spec), picture, text) == pytest.approx(target, rel=0.01)
    assert len(found.notes) == 1 and "keep 1.0 drops no token" in found.notes[0]
    with pytest.raises(ValueError, match="no keep that drops tokens"):
        plan(config, ["random"], [1.0], [], "flops", lambda: (text, picture))
    with pytest.raises(ValueError, match="cannot be matched by 'flop'; there is flops"):
        plan(config, ["random"], [0.5], [], "flop", lambda: (text, picture))


def test_matched_runs_say_so(folders, tmp_path):
    """Also a run that another call made, by its spec: it is not made again, but learns what it stands for."""
    (_, plain) = run(folders, tmp_path, specs=["random:keep=72"], tasks=["existence"])
    before = plain.read_text()
    assert read_result(plain).matched is None
    (_, matched) = run(folders, tmp_path, keeps=[0.5], match="flops", tasks=["existence"])
    assert matched == plain and 0.3 < read_result(plain).matched < 1
    told = f'"matched": {read_result(plain).matched!r}'
    assert plain.read_text().replace(told, '"matched": null') == before


def test_all_stands_for_every_method_with_what_it_needs():
    assert named(["none", "hiprune:alpha=0.2"], "llava") == {"none": True, "hiprune:alpha=0.2": True}
    everything = named(["all"], "qwen2_5_vl")
    assert "fastervlm:fallback=received" in everything and "hiprune" in everything
    assert "evs" not in everything, "videos only"
    assert not any(everything.values())


def test_expand():
    assert expand(["none", "random", "hiprune:alpha=0.2"], [1.0, 0.25, 64]) == (
        "none", "random:keep=1.0", "random:keep=0.25", "random:keep=64",
        "hiprune:keep=1.0,alpha=0.2", "hiprune:keep=0.25,alpha=0.2", "hiprune:keep=64,alpha=0.2",
    )  # fmt: skip
    assert expand(["grid:keep=0.5", "grid"], [0.5]) == ("none", "grid:keep=0.5")
    assert expand(["grid:keep=0.5"], []) == ("none", "grid:keep=0.5")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"limit": 0}, "limit must be a whole number, 1 or more; got 0"),
        ({"limit": True}, "limit must be"),
        ({"batch": -1}, "batch must be"),
        ({"workers": 0}, "workers must be"),
        ({"seed": -1}, "seed must be a whole number, 0 or more"),
        ({"dtype": "float8"}, "unknown dtype 'float8'; there are float32"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
        ({"tasks": ["exist"]}, "unknown task 'exist', did you mean existence"),
        ({"tasks": []}, "no task chosen"),
        ({"models": ()}, "no model given"),
        ({"specs": ["randm"]}, "no method 'randm'.*did you mean random"),
        ({"specs": ["random:sed=1"]}, "random has no setting 'sed'.*did you mean seed"),
        ({"keeps": [0.0]}, "keep=0.0"),
        ({"keeps": [1.5]}, "keep=1.5"),
        ({"keeps": [float("nan")]}, "keep=nan"),
        ({"keeps": [-3]}, "keep=-3"),
        ({"keeps": []}, "'random' needs a keep"),
    ],
)
def test_wrong_arguments_are_told_before_any_work(folders, tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        run(folders, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_a_method_that_cannot_work_is_told_before_any_work(folders, tmp_path):
    with pytest.raises(NotImplementedError, match="fastervlm:keep=0.5 on .*qwen2_5_vl: .*fallback=received"):
        run(folders, tmp_path, ["fastervlm"], [0.5], ["llava", "qwen2_5_vl"])
    assert not list(tmp_path.iterdir())


def test_more_tokens_than_there_are_stops_the_run(folders, tmp_path):
    with pytest.raises(RuntimeError, match="random:keep=9999 stopped at question .*keep=9999"):
        run(folders, tmp_path, keeps=[9999], tasks=["word"])


def test_wrong_folders(folders, tmp_path):
    with pytest.raises(OSError, match="cannot write results to"):
        (tmp_path / "file").write_text("")
        run(folders, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        model_folder(str(tmp_path / "missing" / "model"))
    with pytest.raises(ValueError, match="unknown testbed model 'testbed:lava'; there are testbed:llava"):
        model_folder("testbed:lava")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        model_folder(str(tmp_path / "file"))
    with pytest.raises(ValueError, match="no config.json"):
        model_folder(str(tmp_path))

    def part(name, *left_out):
        target = tmp_path / name
        shutil.copytree(folders / "llava", target, ignore=shutil.ignore_patterns(*left_out))
        return target

    with pytest.raises(ValueError, match="has no processor"):
        model_folder(str(part("a", "*processor*")))
    with pytest.raises(ValueError, match="has no weights"):
        model_folder(str(part("b", "*.safetensors")))
    broken = part("c")
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not the configuration of a model"):
        model_folder(str(broken))
    GPT2Config().save_pretrained(broken)
    with pytest.raises(ValueError, match="a 'gpt2' model, which takes no images"):
        model_folder(str(broken))
    (broken / "config.json").write_text('{"model_type": "kosmos-2"}')
    with pytest.raises(NotImplementedError, match="family 'kosmos-2'; vlmfast supports llava"):
        model_folder(str(broken))


# --- prompts ------------------------------------------------------------------------------------------------------


def test_batches_are_padded_on_the_left(folders):
    model, processor = load_model(str(folders / "llava"))
    prompts = Prompts(processor, model.device, model.dtype)
    picture = np.zeros((120, 120, 3), np.uint8)
    rows = [prompts.row(text, picture) for text in ("read the word .", "is there a sun ?")]
    batch = prompts.batch(rows)
    assert (batch["attention_mask"].sum(1) == torch.tensor([len(r["input_ids"]) for r in rows])).all()
    assert (batch["attention_mask"][:, -1] == 1).all()
    for i, row in enumerate(rows):
        assert (batch["input_ids"][i, -len(row["input_ids"]) :] == row["input_ids"]).all()
    assert prompts.row("read the word .", picture.copy()) is rows[0]


def test_prompts_are_those_of_the_snapshot():
    """A changed space changes a leaderboard: to change prompts on purpose, delete the file and run this once."""
    found = {name: [[d.id, t.prompt(d), d.answer] for d in t.load(3, 0)] for name, t in TASKS.items()}
    if not PROMPTS.exists():
        PROMPTS.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{PROMPTS} was not there; it has been written: look at it and commit it")
    assert found == json.loads(PROMPTS.read_text())
