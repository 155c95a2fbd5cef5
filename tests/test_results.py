"""Result files: round trip, atomic writing, and every way in which a file can be damaged or belong to another run."""

import dataclasses
import json

import pytest

from vlmfast.eval.results import (
    Answers,
    Metric,
    Result,
    TaskResult,
    check_identity,
    load_results,
    read_result,
    ready_folder,
    run_name,
    sole_writer,
    write_atomic,
    write_result,
)

METRIC = Metric(value=0.9, low=0.8, high=1.0, difference=-0.1, difference_low=-0.2, difference_high=0.0)


def result(spec="none", keep=None, model="testbed:llava", **changes):
    task = TaskResult(hash="h", n=3, images=2, headline="accuracy", metrics={"accuracy": METRIC})
    fields = {
        "model": model, "model_hash": "m", "spec": spec, "method": spec.split(":")[0], "keep": keep, "limit": 2,
        "seed": 0, "batch": 8, "device": "cpu", "dtype": "float32", "tasks": {"colour": task}, "macro": METRIC,
        "cost": {"tower": 1}, "latency": {"ttft_ms": {"median": 1.0}}, "environment": {"torch": "2"},
        "command": "vlmfast eval", "started": "2026-01-01T00:00:00+00:00", "seconds": 1.5,
        "samples": [{"task": "colour", "kept": [[0, 1]]}],
    }  # fmt: skip
    return Result(**fields | changes)


def store(folder, *results):
    for r in results:
        write_result(folder / f"{run_name(r.model, r.spec)}.json", r)


def test_round_trip(tmp_path):
    store(tmp_path, result())
    (path,) = tmp_path.iterdir()
    assert path.name == "testbed-llava--none.json"
    assert read_result(path) == result()
    assert json.loads(path.read_text())["tasks"]["colour"]["metrics"]["accuracy"]["low"] == 0.8


def test_results_come_in_order(tmp_path):
    specs = [("random:keep=64", 64), ("random:keep=0.5", 0.5), ("none", None), ("random:keep=1.0", 1.0)]
    one, two = tmp_path / "a", tmp_path / "b"
    one.mkdir(), two.mkdir()
    store(one, *(result(*spec) for spec in specs))
    store(two, result(model="other"))
    (one / "testbed-llava--none.jsonl").write_text("")
    found = [(r.model, r.spec) for r in load_results([one, two])]
    assert found == [("other", "none")] + [
        ("testbed:llava", spec) for spec in ("none", "random:keep=1.0", "random:keep=0.5", "random:keep=64")
    ]
    assert load_results(one) == load_results(str(one))


def test_load_results_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_results(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no finished result"):
        load_results(tmp_path)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    store(tmp_path / "a", result())
    store(tmp_path / "b", result())
    with pytest.raises(ValueError, match="same run"):
        load_results([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "not a readable result"),
        (lambda text: "", "not a readable result"),
        (lambda text: "[]", "no JSON object"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "schema is 99"),
        (lambda text: text.replace('"complete": true', '"complete": false'), "not marked complete"),
        (lambda text: text.replace('"seed"', '"sed"'), "do not fit the schema"),
        (lambda text: text.replace('"macro"', '"makro"'), "'macro' is missing"),
        (lambda text: text.replace('"metrics"', '"metriks"'), "'metrics' is missing"),
        (lambda text: text.encode("utf-16").decode("latin-1"), "not a readable result"),
    ],
)
def test_damaged_results_are_named(tmp_path, damage, says):
    store(tmp_path, result())
    (path,) = tmp_path.iterdir()
    path.write_text(damage(path.read_text()), encoding="latin-1")
    with pytest.raises(ValueError, match=says) as caught:
        load_results(tmp_path)
    assert str(path) in str(caught.value) and "delete it" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"limit": 5}, "limit 2 .now 5."),
        ({"seed": 1}, "seed 0 .now 1."),
        ({"batch": 1}, "batch"),
        ({"dtype": "bfloat16"}, "dtype float32 .now bfloat16."),
        ({"model_hash": "x"}, "other weights or configuration of the model"),
        ({"spec": "random:keep=0.5"}, "spec none .now random"),
        ({"tasks": {"colour": "x"}}, "other questions or images in task colour"),
        ({"tasks": {"colour": "h", "word": "w"}}, "tasks colour .now colour, word."),
    ],
)
def test_a_file_of_another_run_is_named(tmp_path, change, says):
    check_identity(tmp_path, result().identity(), result().identity())
    with pytest.raises(ValueError, match=says) as caught:
        check_identity(tmp_path, result().identity(), result().identity() | change)
    assert "--out" in str(caught.value) and "delete" in str(caught.value)


def test_names_are_safe():
    name = run_name("../my models/lläva", "hiprune:keep=0.33+var:alpha=1e-3")
    assert name == "my-models-ll-va--hiprune-keep=0.33+var-alpha=1e-3"
    long = run_name("m", "x" * 400)
    assert len(long) < 210 and long != run_name("m", "x" * 401)


def test_write_atomic_leaves_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


IDENTITY = result().identity()
RECORDS = [{"id": f"colour/{i}/0", "answer": "réd"} for i in range(4)]


@pytest.fixture
def answers(tmp_path):
    answers = Answers(tmp_path / "run.jsonl", IDENTITY)
    answers.start([])
    answers.append(RECORDS[:2])
    answers.append(RECORDS[2:])
    return answers


def test_answers_round_trip(answers):
    assert answers.read() == RECORDS
    answers.start(RECORDS[:1])
    assert answers.read() == RECORDS[:1]
    assert Answers(answers.path.with_name("none"), IDENTITY).read() == []


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(answers):
    whole = answers.path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last, len(whole)):
        answers.path.write_bytes(whole[:end])
        assert answers.read() == RECORDS[:3]
    answers.path.write_bytes(whole[:20])  # torn in the first line
    assert answers.read() == []


def test_other_damage_is_an_error(answers):
    lines = answers.path.read_bytes().split(b"\n")
    for number in (0, 2):
        broken = [line[:-5] if i == number else line for i, line in enumerate(lines)]
        answers.path.write_bytes(b"\n".join(broken))
        with pytest.raises(ValueError, match=f"damaged in line {number + 1}: delete it"):
            answers.read()


def test_answers_of_another_run_are_not_read(answers):
    with pytest.raises(ValueError, match="limit 2 .now 7."):
        Answers(answers.path, IDENTITY | {"limit": 7}).read()


def test_only_one_process_writes(tmp_path):
    with sole_writer(tmp_path, "m"):
        with sole_writer(tmp_path, "other"):
            pass
        with pytest.raises(OSError, match="another process is evaluating m into"), sole_writer(tmp_path, "m"):
            pass
    with sole_writer(tmp_path, "m"):
        pass
    assert not list(tmp_path.iterdir())


def test_ready_folder(tmp_path):
    ready_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write results to .*file"):
        ready_folder(tmp_path / "file" / "x")


def test_metric_fields_are_what_the_files_promise():
    assert [f.name for f in dataclasses.fields(Metric)] == [
        "value", "low", "high", "difference", "difference_low", "difference_high",
    ]  # fmt: skip
