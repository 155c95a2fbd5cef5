"""lmms-eval itself with our model and our command, on tasks of local files: skipped where it is not installed."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vlmfast.eval import report
from vlmfast.eval.lmms.arguments import Arguments
from vlmfast.eval.lmms.engine import Ask, Engine
from vlmfast.eval.lmms.options import Options
from vlmfast.eval.models import model_hash
from vlmfast.eval.results import read_result
from vlmfast.eval.tasks import TASKS, image
from vlmfast.eval.testbed import folder as shipped

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed", allow_module_level=True)

from vlmfast.eval.lmms import runner, scores
from vlmfast.eval.lmms import tasks as tasks_of

LLAVA = "testbed:llava"
COLOURS = ["red", "blue", "white", "purple", "orange", "green", "pink", "yellow", "brown", "black", "grey"]
COMMON = """
dataset_path: parquet
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files:
    test: {folder}/{data}.parquet
test_split: test
doc_to_visual: !function utils.{visual}
doc_to_text: question
doc_to_target: answer
"""
GENERATE = """
task: {name}
output_type: {kind}
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
  until: []
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOICE = """
task: {name}
output_type: multiple_choice
doc_to_choice: {choices}
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
UTILS = '''
import functools

def one(doc):
    return [doc["image"].convert("RGB")]

def both(doc):
    return [doc["image"].convert("RGB"), doc["other"].convert("RGB")]

def nothing(doc):
    return []

def fail(doc, results):
    raise KeyError("no luck with " + results[0])

def counted(doc, results):
    """As POPE does: what a document gives is no number, only the aggregation makes one."""
    return {"hits": {"right": results[0] == doc["answer"], "length": len(results[0])}}

def hits(values):
    return sum(value["right"] for value in values) / len(values)
'''


@pytest.fixture(scope="module")
def documents():
    """Questions about colours, and their pictures."""
    return TASKS["colour"].load(2, 0)[:5]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, documents):
    """A folder of tasks: one picture, two pictures, text alone, multiple choice, and some that cannot be."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("tasks")
    pictures = [Image.fromarray(image(doc)) for doc in documents]
    rows = [
        {"question": doc.prompt, "answer": doc.answer, "image": picture, "other": picture.resize((150, 90))}
        for doc, picture in zip(documents, pictures)
    ]
    Dataset.from_list(rows).to_parquet(str(folder / "colours.parquet"))
    (folder / "utils.py").write_text(UTILS)

    def write(name, text, visual="one", **names):
        settings = {"name": name, "folder": folder, "data": "colours", "visual": visual, "choices": COLOURS}
        text = (text + COMMON).format(**settings | {"kind": "generate_until"} | names)
        (folder / f"{name}.yaml").write_text(text)

    write("v_colour", GENERATE)
    write("v_pair", GENERATE, "both")
    write("v_text", GENERATE, "nothing")
    write("v_choice", CHOICE)
    write("v_broken", GENERATE + "process_results: !function utils.fail\n")
    write("v_rounds", GENERATE, kind="generate_until_multi_round")
    write("v_lost", GENERATE, data="lost")
    counted = GENERATE.replace("exact_match", "hits").replace("aggregation: mean", "aggregation: !function utils.hits")
    write("v_hits", counted + "process_results: !function utils.counted\n")
    (folder / "v_needs.yaml").write_text("task: v_needs\ndoc_to_text: !function missing.text\n")
    (folder / "missing.py").write_text("import a_package_that_nobody_has\n")
    return folder


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """One reading of each time; a task that fails is not tried again after two seconds, five times."""
    from lmms_eval.api.task import ConfigurableTask

    monkeypatch.setattr(runner, "REPEATS", 1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for tried in (ConfigurableTask.process_results, ConfigurableTask.download):
        monkeypatch.setattr(tried.retry, "sleep", lambda seconds: None)


def named(tasks, *names):
    return [f"lmms:{name},include={tasks}" for name in names]


def evaluate(tasks, out, names, specs=("none",), **settings):
    return runner.evaluate([LLAVA], specs, [0.4], named(tasks, *names), out, **{"batch": 2} | settings)


@pytest.fixture(scope="module")
def said(documents):
    """What the model answers, asked by our engine: {(spec, task): answers}."""
    engine = Engine(Arguments(pretrained=LLAVA, batch_size=1))
    short, found = Options.of({"max_new_tokens": 4}, 4), {}
    for spec in ("none", "hiprune:keep=0.4", "vtc_cls:keep=0.4,preset=repo"):
        engine.open(spec)
        for task, seen in (("v_colour", 1), ("v_pair", 2), ("v_text", 0)):
            asks = []
            for doc in documents:
                picture = Image.fromarray(image(doc))
                shown = [picture, picture.resize((150, 90))][:seen]
                parts = [{"type": "image", "url": one} for one in shown] + [{"type": "text", "text": doc.prompt}]
                messages = [{"role": "user", "content": parts}]
                asks.append(Ask(doc.id, lambda m=messages: m, 1, short))
            found[spec, task] = [reply.text for reply in engine.answer(asks)]
    engine.close()
    return found


@pytest.fixture(scope="module")
def finished(tasks, tmp_path_factory):
    """All kinds of tasks under two methods."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "REPEATS", 1)
        patch.setenv("HF_HUB_OFFLINE", "1")
        names = ["v_colour", "v_pair", "v_text", "v_choice", "v_hits"]
        return evaluate(tasks, out, names, ["hiprune", "grid:keep=1.0"])


# --- vlmfast eval -------------------------------------------------------------------------------------------------


def test_results_are_those_of_the_model(finished, documents, said):
    """Batches of two, one and two pictures and none: lmms-eval's scores of the answers that the engine gives alone."""
    none, pruned, whole = map(read_result, finished)
    assert [result.spec for result in (none, pruned, whole)] == ["none", "hiprune:keep=0.4", "grid:keep=1.0"]
    for result in (none, pruned):
        assert result.model_hash == model_hash(shipped("llava"))
        assert result.environment["lmms_eval"] and result.batch == 2
        for task in ("v_colour", "v_pair", "v_text"):
            right = [one == doc.answer for one, doc in zip(said[result.spec, task], documents)]
            found = result.tasks[f"lmms:{task}"]
            assert (found.headline, found.n) == ("exact_match", 5)
            assert found.metrics["exact_match"].value == pytest.approx(np.mean(right))
        assert (
            result.tasks["lmms:v_hits"].metrics["hits"].value
            == result.tasks["lmms:v_colour"].metrics["exact_match"].value
        )
    assert none.tasks["lmms:v_choice"].metrics["acc"].value == 1
    assert {name: task.metrics for name, task in whole.tasks.items()}.keys() == none.tasks.keys()
    for name, task in whole.tasks.items():
        (metric,) = task.metrics.values()
        assert metric.value == none.tasks[name].metrics[task.headline].value
        assert metric.difference == metric.difference_low == metric.difference_high == 0


def test_costs_beside_the_scores(finished):
    none, pruned, whole = map(read_result, finished)
    # 5 documents: one picture twice, two once, none once, and one picture for each choice
    prompts = 5 * (2 + 1 + 1 + len(COLOURS))
    pictures = 5 * (2 + 2 + len(COLOURS))
    tokens = 144
    assert none.cost["prompts"] == pruned.cost["prompts"] == prompts
    assert none.cost["visual_tokens"] == whole.cost["visual_tokens"] == tokens * pictures / prompts
    assert pruned.cost["visual_tokens"] == pytest.approx(0.4 * tokens * pictures / prompts, rel=0.02)
    assert none.cost["share_of_unpatched"] == whole.cost["share_of_unpatched"] == 1
    assert 0.5 < pruned.cost["share_of_unpatched"] < 0.8
    for result in (none, pruned):
        assert result.latency["ttft_ms"]["median"] > 0 and result.latency["ttft_speedup"]["median"] > 0


def test_intervals_are_paired(finished, documents):
    """Of a mean by numbers, of a task's own aggregation by calling it: the same draws, the same ends."""
    none, pruned, _ = map(read_result, finished)
    for name, metric in (("v_colour", "exact_match"), ("v_hits", "hits")):
        one = pruned.tasks[f"lmms:{name}"].metrics[metric]
        assert one.low <= one.value <= one.high and one.difference_low <= one.difference <= one.difference_high
        assert one.difference == pytest.approx(one.value - none.tasks[f"lmms:{name}"].metrics[metric].value)
    assert pruned.tasks["lmms:v_colour"].metrics["exact_match"] == pruned.tasks["lmms:v_hits"].metrics["hits"]


def test_an_interval_is_that_of_the_draws():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    before = [1.0] * 8

    def mean(items):
        return sum(items) / len(items)

    def slow_name(items):
        return sum(items) / len(items)

    fast, called = (
        scores.resampled(0.625, values, before, mean, 3),
        scores.resampled(0.625, values, before, slow_name, 3),
    )
    assert fast.low == pytest.approx(called.low) and fast.difference_high == pytest.approx(called.difference_high)
    assert fast.low < 0.625 < fast.high and fast.difference == -0.375 and fast.difference_low < -0.375

    paired = scores.resampled(0.625, values, values, mean, 3)
    assert paired.difference_low == paired.difference == paired.difference_high == 0 < paired.high - paired.low

    def files(items, args):
        raise AssertionError("such an aggregation is called once, by lmms-eval")

    for aggregate, number in ((files, 0.5), (mean, 0.5)):  # the second is not what lmms-eval reports
        point = scores.resampled(number, values, before, aggregate, 3)
        assert point.low == point.high == 0.5 and point.difference is None


def test_answers_are_stored(finished, documents, said):
    for path, spec in zip(finished, ("none", "hiprune:keep=0.4")):
        records = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()[1:]]
        for task in ("v_colour", "v_pair", "v_text"):
            mine = [record for record in records if record["id"].startswith(f"lmms:{task}/")]
            assert [record["answer"] for record in mine] == [[one] for one in said[spec, task]]
            assert [record["expected"] for record in mine] == [doc.answer for doc in documents]
            assert all(record["tokens"] > 0 for record in mine)


def test_finished_runs_are_kept(finished, tasks, monkeypatch, capsys):
    monkeypatch.setattr(runner, "Engine", None)  # nothing is loaded
    before = [path.stat().st_mtime_ns for path in finished]
    names = ["v_colour", "v_pair", "v_text", "v_choice", "v_hits"]
    assert evaluate(tasks, finished[0].parent, names, ["hiprune", "grid:keep=1.0"]) == finished
    assert [path.stat().st_mtime_ns for path in finished] == before
    runner.show(finished)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("hiprune:keep=0.4") for line in lines) and "v_choice" in lines[1]


def test_the_page_of_their_tasks(finished, documents, tmp_path):
    """Every task with its numbers, and the first documents with the answers of all runs."""
    page = report.make(finished[0].parent, tmp_path, tables=False).page.read_text("utf-8")
    assert all(f"lmms:{name}" in page for name in ("v_colour", "v_pair", "v_text", "v_choice", "v_hits"))
    assert page.count('class="one"') >= len(documents)
    assert "lmms-eval keeps the pictures of its tasks" in page and documents[0].prompt in page


def test_another_run_is_not_taken_for_this_one(finished, tasks):
    for change in ({"limit": 2}, {"seed": 1}, {"batch": 3}):
        with pytest.raises(ValueError, match=f"was made with .*{next(iter(change))}"):
            evaluate(tasks, finished[0].parent, ["v_colour", "v_pair", "v_text", "v_choice", "v_hits"], **change)
    with pytest.raises(ValueError, match="tasks lmms:v_colour"):
        evaluate(tasks, finished[0].parent, ["v_colour"])


def test_a_changed_task_is_another_task(tasks, tmp_path):
    path = tasks / "utils.py"
    (first,) = tasks_of.choose([("v_colour", {"include": str(tasks)})], None)
    tasks_of.indexed.cache_clear()
    text = path.read_text()
    try:
        path.write_text(text.replace('[doc["image"].convert("RGB")]', '[doc["image"].convert("L").convert("RGB")]'))
        (second,) = tasks_of.choose([("v_colour", {"include": str(tasks)})], None)
    finally:
        path.write_text(text)
        tasks_of.indexed.cache_clear()
    (third,) = tasks_of.choose([("v_colour", {"include": str(tasks)})], None)
    assert first.hash == third.hash != second.hash


def test_an_error_ends_with_a_code(tasks, tmp_path, capsys):
    """Scoring fails: what lmms-eval's own command ends with exit code 0 is an error here, and there is no result."""
    from vlmfast.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(
            ["eval", "--model", LLAVA, "--method", "none", "--task", *named(tasks, "v_broken"), "--out", str(tmp_path)]
        )
    assert stop.value.code == 1
    assert "with none on v_broken: KeyError: 'no luck with" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("v_rounds", RuntimeError, "v_rounds: vlmfast answers tasks of one round"),
        ("v_lost", RuntimeError, "could not load the task v_lost: .*lost.parquet"),
        ("v_needs", ImportError, "task v_needs needs the package a_package_that_nobody_has"),
    ],
)
def test_tasks_that_cannot_be(tasks, tmp_path, name, error, says):
    with pytest.raises(error, match=says):
        evaluate(tasks, tmp_path, [name])
    assert not list(tmp_path.glob("*.json"))


def test_an_error_of_the_model_names_the_document(tasks, tmp_path, monkeypatch):
    generate = Engine._generate

    def broken(self, asks, rows):
        if any(ask.name == "v_colour/3" for ask in asks):
            raise RuntimeError("no luck")
        return generate(self, asks, rows)

    monkeypatch.setattr(Engine, "_generate", broken)
    with pytest.raises(RuntimeError, match="stopped at v_colour/3: RuntimeError: no luck"):
        evaluate(tasks, tmp_path, ["v_colour"])


def test_runs_at_equal_flops(tasks, tmp_path, capsys):
    """Both methods at the cost of pruning to a half; the results tell it, and what their documents really cost."""
    paths = runner.evaluate(
        [LLAVA], ["random", "hiprune"], [0.5], named(tasks, "v_colour"), tmp_path, batch=2, match="flops"
    )
    none, random, hiprune = map(read_result, paths)
    assert none.matched is None and random.matched == hiprune.matched
    assert hiprune.keep < random.keep == pytest.approx(0.5, abs=0.01)
    shares = [one.cost["share_of_unpatched"] for one in (random, hiprune)]
    assert shares[0] == pytest.approx(shares[1], rel=0.01)
    assert "keep is solved for 60 text tokens" in capsys.readouterr().err


def test_an_unknown_task_is_told(tasks, tmp_path, monkeypatch):
    real = tasks_of.indexed

    # The whole index takes long.
    monkeypatch.setattr(
        tasks_of, "indexed", lambda folder, defaults: real(folder, False)
    )  # the whole index takes long
    with pytest.raises(ValueError, match="no task 'v_color'.*did you mean v_colour"):
        evaluate(tasks, tmp_path, ["v_color"])
    with pytest.raises(FileNotFoundError, match="no folder of tasks"):
        runner.evaluate([LLAVA], ["none"], [], [f"lmms:v_colour,include={tmp_path}/no"], tmp_path)
    with pytest.raises(ValueError, match="written lmms:NAME,include=FOLDER"):
        runner.evaluate([LLAVA], ["none"], [], ["lmms:v_colour,inclde=x"], tmp_path)


# --- lmms-eval ----------------------------------------------------------------------------------------------------


def test_lmms_evals_own_command(tasks, tmp_path, said, documents):
    """The plug-in is found, a spec with commas arrives whole, costs are in its results and in our file."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "vlmfast", "--tasks", "v_colour,v_pair"]
    command += ["--include_path", str(tasks), "--batch_size", "2", "--device", "cpu", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out"), "--model_args"]
    command += [f"pretrained={LLAVA},method=vtc_cls:keep=0.4,preset=repo,latency=1,costs={tmp_path}/costs.json"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (tmp_path / "out").glob("*/*_results.json")
    results, costs = json.loads(path.read_text()), json.loads((tmp_path / "costs.json").read_text())
    for task in ("v_colour", "v_pair"):
        right = [one == doc.answer for one, doc in zip(said["vtc_cls:keep=0.4,preset=repo", task], documents)]
        assert results["results"][task]["exact_match,none"] == pytest.approx(np.mean(right))
    assert costs["spec"] == "vtc_cls:keep=0.4,preset=repo" and costs["cost"]["prompts"] == 10
    assert results["throughput"]["avg_prefill_flops_share"] == pytest.approx(costs["cost"]["share_of_unpatched"])
    assert results["throughput"]["avg_visual_tokens"] == costs["cost"]["visual_tokens"]
    assert results["throughput"]["avg_ttft_ms"] == costs["latency"]["ttft_ms"]["median"]
    assert results["throughput"]["total_gen_tokens"] == costs["tokens"] > 10


def test_through_its_python_interface(tasks, tmp_path):
    """Multiple choice by the simple model; arguments from a text, lmms-eval's own where that names none."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models.registry_v2 import ModelRegistryV2
    from lmms_eval.tasks import TaskManager, get_task_dict

    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    simple = registry.get_model_class("vlmfast", force_simple=True)
    assert simple.is_simple and not registry.get_model_class("vlmfast").is_simple
    model = simple.create_from_arg_string(
        f"pretrained={LLAVA},method=grid:keep=0.5,latency=0",
        {"batch_size": "3", "device": "cpu", "max_batch_size": None},
    )
    assert model.batch_size == 3 and model.device == torch.device("cpu")
    manager = TaskManager("ERROR", include_path=str(tasks), include_defaults=False)
    chosen = [*get_task_dict(["v_choice", "v_text"], manager, "simple").values()]
    options = argparse.Namespace(output_path=str(tmp_path), process_with_media=False, reasoning_tags="none")
    found = simple_evaluate(
        model=model, tasks=chosen, task_manager=manager, limit=2, bootstrap_iters=0, cli_args=options
    )
    assert 0 <= found["results"]["v_choice"]["acc,none"] <= 1
    losses = [reply[0] for sample in found["samples"]["v_choice"] for reply in sample["filtered_resps"]]
    assert len(losses) == 2 * len(COLOURS) and all(loss > 0 for loss in losses)
    assert model.cost["prompts"] == 2 * len(COLOURS) + 2 and not hasattr(model, "engine")  # let go
    with pytest.raises(ValueError, match="did you mean pretrained"):
        simple.create_from_arg_string("pretraind=x")
    with pytest.raises(ValueError, match="batch_size=auto: no whole number"):
        simple.create_from_arg_string(f"pretrained={LLAVA}", {"batch_size": "auto"})


def test_requests_repeated_for_other_processes_cost_nothing(documents):
    from lmms_eval.api.instance import Instance

    from vlmfast.eval.lmms.model import Vlmfast

    model = Vlmfast(pretrained=LLAVA, batch_size=2, latency=0)
    model.task_dict["t"] = {"test": [{"doc": doc} for doc in documents]}

    def messages(row):
        parts = [
            {"type": "image", "url": Image.fromarray(image(row["doc"]))},
            {"type": "text", "text": row["doc"].prompt},
        ]
        return [{"role": "user", "content": parts}]

    requests = [
        Instance(
            request_type="generate_until",
            arguments=("x" * i, messages, {"max_new_tokens": 1 + i % 2, "until": ["\n\n"]}, i, "t", "test"),
            idx=0,
            metadata={"task": "t", "doc_id": i, "repeats": 1, **({"__padding_only__": True} if i == 4 else {})},
        )
        for i in range(5)
    ]
    replies = model.generate_until(requests)
    assert [reply.token_counts.output_tokens for reply in replies] == [1, 2, 1, 2, 1]
    assert [reply.text for reply in replies] == [doc.answer for doc in documents]
    model.clean()
    assert model.cost["prompts"] == 4


@pytest.mark.slow
def test_two_processes_score_as_one(tasks, finished, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "vlmfast"]
    command += ["eval", "--model", LLAVA, "--method", "hiprune:keep=0.4", "--batch", "2", "--out", str(tmp_path)]
    for name in named(tasks, "v_colour", "v_pair", "v_text", "v_choice", "v_hits"):
        command += ["--task", name]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for path in finished[:2]:
        one, two = read_result(path), read_result(tmp_path / path.name)
        assert one.tasks == two.tasks and one.cost == two.cost
