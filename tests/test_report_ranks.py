"""Ranks with ties: by hand, against the differences that results carry, and where they cannot be had."""

import json

import numpy as np
import pytest

from vlmfast.eval.metrics import Counts, measure
from vlmfast.eval.report import text
from vlmfast.eval.report.archive import Archive
from vlmfast.eval.report.page import lead
from vlmfast.eval.report.ranks import places, ranked
from vlmfast.eval.report.rows import Place, arrange
from vlmfast.eval.report.table import notes
from vlmfast.eval.results import Metric, Result, TaskResult, run_name, write_result
from vlmfast.eval.tasks import TASKS, task_hash

ASKED = ("colour", "caption")
LIMIT = 8
# Spec -> share of the questions that are answered rightly.
RUNS = {"none": 1.0, "random:keep=0.5": 0.2, "hiprune:keep=0.5": 0.95, "grid:keep=0.5": 0.9}


@pytest.fixture(scope="module")
def documents():
    return {name: TASKS[name].load(LIMIT, 0) for name in ASKED}


def answered(documents, share, seed=0):
    """One answer a question, so many of them right."""
    rng = np.random.default_rng(seed)
    return {doc.id: doc.answer if rng.random() < share else "" for docs in documents.values() for doc in docs}


def made(spec, tasks):
    keep = float(spec.partition("keep=")[2]) if "keep=" in spec else None
    macro = Metric(value=0.5, low=0.4, high=0.6)
    return Result(
        model="testbed:llava", model_hash="ab", spec=spec, method=spec.partition(":")[0], keep=keep, limit=LIMIT,
        seed=0, batch=4, device="cpu", dtype="float32", tasks=tasks, macro=macro, latency={}, environment={},
        cost={"share_of_unpatched": 0.6, "visual_tokens": 100.0 * (keep or 1), "visual_tokens_before": 100.0},
        command="", started="", seconds=1.0,
    )  # fmt: skip


def store(folder, result, records):
    name = run_name(result.model, result.spec)
    write_result(folder / f"{name}.json", result)
    lines = [{"run": result.identity()}, *records]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path, documents):
    tasks = {
        name: TaskResult(
            hash=task_hash(TASKS[name], docs), n=len(docs), images=LIMIT, headline=TASKS[name].HEADLINE,
            metrics={TASKS[name].HEADLINE: Metric(value=0.5, low=0.4, high=0.6)},
        )
        for name, docs in documents.items()
    }  # fmt: skip
    for number, (spec, share) in enumerate(RUNS.items()):
        records = [{"id": id_, "answer": answer} for id_, answer in answered(documents, share, number).items()]
        store(tmp_path, made(spec, tasks), records)
    return tmp_path


def section_of(folder):
    from vlmfast.eval.results import load_results

    (section,) = ranked(arrange(load_results(folder)), Archive([folder]))
    return section


def test_places_by_hand():
    """The first beats all; the next two are one apart and tied; the last loses to all but the third, who is noisy."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=2001)  # what all runs share does not count: resamples are paired
    runs = ((9, 0), (5, 0.1), (4.7, 1), (3, 0.1))
    values = [common + shift + width * rng.normal(size=2001) for shift, width in runs]
    found = places(values)
    assert found == [Place(1, False, 4), Place(2, True, 4), Place(2, True, 4), Place(3, False, 4)]
    assert [text.place(one) for one in found] == ["1", "2=", "2=", "3"]
    assert text.place(found[1], whole=True) == "2= of 4" and text.place(None) == text.MISSING
    assert places([-value for value in values])[3] == Place(1, True, 4)


def test_ranks_are_what_paired_differences_say(folder, documents):
    """Against `measure`, which gives results their differences: of each run from each other one of its budget."""
    section = section_of(folder)
    assert not section.unranked
    scenes = list(dict.fromkeys(doc.scene for docs in documents.values() for doc in docs))
    counts = {
        spec: {
            name: Counts.of(
                [TASKS[name].score(doc, answered(documents, share, number)[doc.id]) for doc in docs],
                [doc.scene for doc in docs],
                scenes,
            )
            for name, docs in documents.items()
        }
        for number, (spec, share) in enumerate(RUNS.items())
    }
    rules = {name: TASKS[name].summarise for name in ASKED}, {name: TASKS[name].HEADLINE for name in ASKED}
    pruned = [spec for spec in RUNS if spec != "none"]
    for spec in pruned:
        better = {"mean": 0} | dict.fromkeys(ASKED, 0)
        for other in pruned:
            metrics, macro = measure(counts[other], *rules, counts[spec])
            better["mean"] += macro.difference_low > 0
            for name in ASKED:
                better[name] += metrics[name][TASKS[name].HEADLINE].difference_low > 0
        row = next(row for row in section.rows if row.spec == spec)
        assert {"mean": row.place.rank} | {name: row.places[name].rank for name in ASKED} == {
            name: 1 + n for name, n in better.items()
        }
        assert row.place.of == len(pruned)
    (random,) = (row for row in section.rows if row.spec == "random:keep=0.5")
    assert random.place == Place(3, False, 3), "the other two are better, and cannot be told apart"
    assert section.baseline.place is None, "nothing else keeps all tokens"
    assert any(note.startswith("Rank: 1 +") for note in notes(section))
    assert "Best, and not to be told apart: grid, hiprune." in lead(section)


def test_runs_at_equal_cost_are_ranked_together(folder):
    """Their keeps differ; what they were given is told, and what they took."""
    for path in folder.glob("*keep*.json"):
        stored = json.loads(path.read_text())
        if stored["method"] != "grid":
            stored |= {"matched": 0.57, "keep": 0.5 if stored["method"] == "random" else 0.45}
            stored["cost"]["share_of_unpatched"] = 0.568 if stored["method"] == "random" else 0.571
        path.write_text(json.dumps(stored))
    section = section_of(folder)
    found = {row.label: row.place for row in section.rows}
    assert found["hiprune"] == Place(1, False, 2) and found["random"] == Place(2, False, 2)
    assert found["grid"] is None, "the only one of its keep"
    assert (
        "Equal cost: keep was solved so that 2 runs take 57.0 % of the unpatched prefill FLOPs, tower and selection "
        "included; they took 56.8 to 57.1 %."
    ) in notes(section)
    assert any(line.startswith("At equal cost, 57 % of the prefill FLOPs: ") for line in lead(section))


def test_without_answers_there_are_no_ranks_and_a_reason(folder):
    path = next(folder.glob("*grid*.jsonl"))
    whole = path.read_text()
    path.unlink()
    assert section_of(folder).unranked == "the answers of grid:keep=0.5 are not beside its result"
    path.write_text(whole.replace('{"id"', "{id", 1))
    assert f"{path} is damaged in line 2" in section_of(folder).unranked
    path.write_text("".join(f"{line}\n" for line in whole.splitlines()[:-1]))
    section = section_of(folder)
    assert "the answers of grid:keep=0.5 lack question caption/" in section.unranked
    assert f"No ranks of some runs or tasks: {section.unranked}." in notes(section)
    assert all(row.place is None for row in section.rows)


@pytest.mark.parametrize(("better", "first"), [(1, "hiprune"), (-1, "random")])
def test_ranks_of_lmms_evals_tasks(tmp_path, better, first):
    """Values lie beside the answers; where less is better, less wins; what is no mean has no rank."""
    values = {"none": 0.9, "random:keep=0.5": 0.1, "hiprune:keep=0.5": 0.8}
    for spec, value in values.items():
        numbers = (np.random.default_rng(1).random(200) < value).astype(float).tolist()
        task = TaskResult(
            hash="cd", n=200, images=200, headline="acc", better=better,
            metrics={"acc": Metric(value=float(np.mean(numbers)), low=0.0, high=1.0)},
        )  # fmt: skip
        records = [{"id": f"lmms:pope/{i}", "answer": "", "values": {"acc": n}} for i, n in enumerate(numbers)]
        store(tmp_path, made(spec, {"lmms:pope": task}), records)
    section = section_of(tmp_path)
    assert [row.label for row in section.rows if row.place and row.place.rank == 1] == [first]
    assert [row.label for row in section.rows if row.places and row.places["lmms:pope"].rank == 1] == [first]
    odd = next(tmp_path.glob("*hiprune*.json"))
    stored = json.loads(odd.read_text())
    stored["tasks"]["lmms:pope"]["metrics"]["acc"]["value"] = 0.123
    odd.write_text(json.dumps(stored))
    section = section_of(tmp_path)
    assert section.unranked == "acc of lmms:pope is no mean over its documents"
    assert not any(row.place or row.places for row in section.rows)
