"""scripts/tuning.py: what is compared with what, that a finished row is not made again, and what the table says."""

import json
import sys

import pytest
import torch
import tuning

from vlmfast.eval.tasks import NOVEL, TASKS
from vlmfast.eval.testbed.scenes import scene


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Calls the script with options; its files lie in tmp_path."""

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["tuning.py", "--limit", "1", "--out", str(tmp_path), *map(str, options)])
        return tuning.main()

    return call


@pytest.fixture
def made(monkeypatch):
    """Rows are made up, not trained: answers right but for every n-th, n by label. The labels in the order made."""
    labels = []
    wrong = {"none": 2, "none+hiprune:keep=0.33": 3, "lofit": 4, "lora+hiprune": 10**9}

    def run(settings, label, way, note):
        labels.append(label)
        answers = {
            name: {doc.id: "" if i % wrong[label] == 0 else doc.answer for i, doc in enumerate(exam.docs)}
            for name, exam in tuning.exams(settings.limit, settings.split).items()
        }
        cost = {"median": 2.0, "low": 1.0, "high": 3.0}
        record = {
            "identity": tuning.identity(settings, way),
            "answers": answers,
            "trainable": 1234 if way.rate else 0,
            "first_token": {"gflops": 1.5, "gflops_share": 0.5, "ttft_ms": cost, "ttft_share": cost},
            "note": note,
            **({"step": {"ms": cost, "peak_mb": 99.0}} if way.rate else {}),
        }
        tuning.write_atomic(settings.path(label), json.dumps(record))
        return record

    monkeypatch.setattr(tuning, "run", run)
    return labels


def test_rows_come_behind_what_they_are_compared_with():
    assert list(tuning.rows_of(["lora+hiprune", "lora"])) == ["none", "none+hiprune:keep=0.33", "lora", "lora+hiprune"]
    assert list(tuning.rows_of(["pill"])) == ["none", "pill"]
    wanted = {"lora", "lofit", "pill", "ademvl", "visual_lora"}
    assert {way.tuner.partition(":")[0] for way in tuning.WAYS.values()} == wanted
    assert {way.method for way in tuning.WAYS.values()} == {"none", "hiprune:keep=0.33"}


def test_exams_ask_all_tasks_as_they_ask_themselves_and_validation_other_scenes():
    exams = tuning.exams(2, "test")
    assert exams["old"].docs == tuple(doc for task in TASKS.values() for doc in task.load(2, 0))
    assert exams["new"].docs == tuple(doc for task in NOVEL.values() for doc in task.load(4, 0))
    other = tuning.exams(2, "validation")
    assert all(doc.split == "validation" for exam in other.values() for doc in exam.docs)
    assert other["new"].hash != exams["new"].hash and other["old"].hash != exams["old"].hash
    assert scene("validation", 0) != scene("test", 0)


def test_a_finished_row_is_not_made_again(main, made, capsys, tmp_path):
    assert main("--way", "lofit") == 0
    assert main("--way", "lofit", "--way", "lora+hiprune", "--note", "busy") == 0
    assert made == ["none", "lofit", "none+hiprune:keep=0.33", "lora+hiprune"]
    assert main("--table", "--way", "lofit") == 0 and len(made) == 4
    capsys.readouterr()
    (tmp_path / "testbed-llava--lofit.json").unlink()
    assert main("--table", "--way", "lofit") == 0
    assert "lofit" not in capsys.readouterr().out and len(made) == 4


@pytest.mark.parametrize(
    "options, words",
    [
        (("--rate", 0.5), "rate 0.01 (now 0.5)"),
        (("--steps", 7), "steps 400 (now 7)"),
        (("--seed", 3), "seed 0 (now 3)"),
        (("--split", "validation"), "exams"),
    ],
)
def test_a_row_of_other_settings_is_refused(main, made, capsys, options, words):
    assert main("--way", "lofit") == 0
    assert main("--way", "lofit", *options) == 2
    said = capsys.readouterr().err
    assert words in said and "choose another folder with --out" in said and len(made) == 2


def test_a_damaged_row_and_a_missing_one_are_named(main, made, capsys, tmp_path):
    assert main("--table") == 2
    assert "holds no row of testbed:llava" in capsys.readouterr().err
    (tmp_path / "testbed-llava--none.json").write_text("{")
    assert main("--way", "lofit") == 2
    assert "testbed-llava--none.json is not a readable row" in capsys.readouterr().err and not made


def test_the_table_counts_and_compares(main, made, capsys, tmp_path):
    assert main("--way", "lofit", "--way", "lora+hiprune", "--note", "Taken on a busy machine.") == 0
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "testbed-llava--tuning.md").read_text().strip()
    assert "Taken on a busy machine." in text
    rows = {row["way"]: row for row in json.loads((tmp_path / "testbed-llava--tuning.json").read_text())}
    docs = tuning.exams(1, "test")["new"].docs

    def share(task, every):
        hits = [i % every != 0 for i, doc in enumerate(docs) if doc.task == task]
        return sum(hits) / len(hits)

    for label, every in (("none", 2), ("lofit", 4), ("lora+hiprune", 10**9)):
        new = rows[label]["new"]
        for task in NOVEL:
            assert new["tasks"][task]["accuracy"]["value"] == pytest.approx(share(task, every))
        assert new["mean"]["value"] == pytest.approx(sum(share(task, every) for task in NOVEL) / len(NOVEL))
    assert rows["lofit"]["compared with"] == "none" and rows["none"]["new"]["mean"]["difference"] is None
    gained = rows["lofit"]["new"]["mean"]["value"] - rows["none"]["new"]["mean"]["value"]
    assert rows["lofit"]["new"]["mean"]["difference"] == pytest.approx(gained)
    pruned = rows["lora+hiprune"]
    assert pruned["compared with"] == "none+hiprune:keep=0.33"
    gained = pruned["new"]["mean"]["value"] - rows["none+hiprune:keep=0.33"]["new"]["mean"]["value"]
    assert pruned["new"]["mean"]["difference"] == pytest.approx(gained)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.count("|") == len(tuning.COLUMNS) + 1 for line in lines) and len(lines) == 5
    assert f"| lofit | 1,234 | {100 * rows['lofit']['new']['mean']['value']:.1f} [" in text
    assert "| 2 | 99 | 1.500 (50 %) | 2.00 |" in text and "| - | - | 1.500 (50 %) | 2.00 |" in text


@pytest.mark.slow
def test_a_row_for_real_goes_on_after_an_interruption(main, monkeypatch, tmp_path):
    """Stopped after training, before a question: the next call trains no step again, and weights stay as trained."""
    monkeypatch.setattr(tuning, "SAVE", 1)
    monkeypatch.setattr(tuning, "READINGS", 1)
    ask, trained = tuning.ask, []

    def stopped(model, *args):
        if hasattr(model, "peft_config") and not trained:
            trained.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
            raise KeyboardInterrupt
        return ask(model, *args)

    monkeypatch.setattr(tuning, "ask", stopped)
    with pytest.raises(KeyboardInterrupt):
        main("--way", "lofit-all", "--steps", 2)

    def again(model, *args):
        if hasattr(model, "peft_config"):
            trained.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return ask(model, *args)

    monkeypatch.setattr(tuning, "ask", again)
    assert main("--way", "lofit-all", "--steps", 2) == 0
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    row = json.loads((tmp_path / "testbed-llava--lofit-all.json").read_text())
    plain = json.loads((tmp_path / "testbed-llava--none.json").read_text())
    assert row["step"]["ms"]["median"] > 0 and row["step"]["peak_mb"] > 12 and row["step"]["batch"] == tuning.BATCH
    assert plain["first_token"]["gflops_share"] == 1 and row["trainable"] == 2 * 192 * 6
    assert plain["first_token"]["gflops"] == pytest.approx(1.1, abs=0.05)  # as the analytic cost says
    assert set(row["answers"]["old"]) == {doc.id for doc in tuning.exams(1, "test")["old"].docs}
