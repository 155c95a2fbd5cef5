"""Metrics: the tasks' scoring against hand-worked cases, the intervals against slow and obvious resampling."""

import numpy as np
import pytest

from vlmfast.eval.metrics import Counts, chair, draw, measure, ratio, retention, summarise_chair
from vlmfast.eval.tasks import TASKS, Doc, choose


def doc(task, answer, subtask="", **info):
    return Doc(task, 0, 0, "", answer, subtask, info)


def point(task, scored):
    """The metrics of (doc, answer) pairs, without intervals."""
    counts = Counts.of([TASKS[task].score(d, answer) for d, answer in scored], [0] * len(scored), [0])
    return {name: float(v[0]) for name, v in TASKS[task].summarise(counts.totals(np.ones((1, 1)))).items()}


@pytest.mark.parametrize(
    ("task", "expected", "answer", "right"),
    [
        ("colour", "red", "red", 1),
        ("colour", "red", "It is red, not blue.", 1),
        ("colour", "red", "blue or red", 0),
        ("colour", "red", "", 0),
        ("count", "three", "3 suns", 1),
        ("count", "three", "three", 1),
        ("count", "three", "there are two", 0),
        ("where", "top left", "top left .", 1),
        ("where", "top left", "left top", 0),
        ("relation", "sun", "sun", 1),
        ("relation", "sun", "the cloud has the sun on its left", 1),  # cloud is what was asked about
        ("binding", "sun", "the sun", 1),
        ("binding", "sun", "sunny", 0),
        ("digits", "3 7", "37", 1),
        ("digits", "3 7", "3 7", 1),
        ("digits", "3 7", "7 3", 0),
        ("digits", "3", "3 3", 0),
        ("word", "tree", "Tree", 1),
        ("word", "tree", "trees", 0),
    ],
)
def test_short_answers(task, expected, answer, right):
    assert TASKS[task].score(doc(task, expected, query="cloud"), answer) == {"asked": 1, "right": right}


def test_existence_is_pope():
    random = [("yes", "yes")] * 3 + [("yes", "no")] * 2 + [("no", "no")] * 4 + [("no", "Yes, there is one.")]
    adversarial = [("no", "blue"), ("yes", "")]  # neither yes nor no: wrong, and not said yes
    scored = [(doc("existence", truth, "random"), said) for truth, said in random]
    scored += [(doc("existence", truth, "adversarial"), said) for truth, said in adversarial]
    metrics = point("existence", scored)
    assert metrics["accuracy/random"] == pytest.approx(7 / 10)
    assert metrics["precision/random"] == pytest.approx(3 / 4)
    assert metrics["recall/random"] == metrics["yes_accuracy/random"] == pytest.approx(3 / 5)
    assert metrics["f1/random"] == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))
    assert metrics["yes_ratio/random"] == pytest.approx(4 / 10)
    assert metrics["accuracy/adversarial"] == metrics["precision/adversarial"] == metrics["yes_ratio/adversarial"] == 0
    assert metrics["accuracy"] == pytest.approx(7 / 12)
    assert metrics["recall"] == pytest.approx(3 / 6)
    assert not any(name.endswith("/popular") for name in metrics)  # nothing was asked there


def test_chair_by_hand():
    assert chair(["sun", "sun", "cup"], ["sun", "cloud"]) == {
        "captions": 1, "hallucinating": 1, "mentioned": 2, "invented": 1, "found": 1, "present": 2,
    }  # fmt: skip
    captions = [("a red sun , a blue cup .", ("sun", "cloud")), ("two green leaf .", ("leaf",)), ("", ("star",))]
    metrics = point("caption", [(doc("caption", "", target=present), said) for said, present in captions])
    assert metrics == pytest.approx(
        {"chair_s": 1 / 3, "chair_i": 1 / 3, "recall": 2 / 4, "f1": 2 * 2 / (3 + 4), "length": (6 + 3) / 3}
    )
    silent = Counts.of([chair([], ["sun"])], [0], [0]).totals(np.ones((1, 1)))
    assert {name: float(v[0]) for name, v in summarise_chair(silent).items()} == {
        "chair_s": 0, "chair_i": 0, "recall": 0,
    }  # fmt: skip


def test_counts_sum_over_images():
    counts = Counts.of([{"a": 1}, {"a": 2, "b": 5}, {"b": 1}], [7, 3, 7], [3, 5, 7])
    assert counts.columns == ("a", "b")
    assert counts.values.tolist() == [[2, 5], [0, 0], [1, 1]]


def test_draws_are_seeded_and_whole():
    draws = draw(40, seed=1, draws=50)
    assert (draws == draw(40, seed=1, draws=50)).all() and (draws != draw(40, seed=2, draws=50)).any()
    assert (draws.sum(1) == 40).all()


def accuracy(totals):
    return {"accuracy": ratio(totals["right"], totals["asked"])}


def made_up(rng, images, spread):
    """Five questions an image, about as hard as one another within it: counts and the raw scores."""
    easy = rng.beta(spread, spread, images)
    right = rng.random((images, 5)) < easy[:, None]
    groups = np.repeat(np.arange(images), 5)
    scores = [{"asked": 1, "right": float(r)} for r in right.ravel()]
    return Counts.of(scores, groups.tolist(), list(range(images))), right


def interval(counts, baseline=None, seed=0):
    metrics, macro = measure({"t": counts}, {"t": accuracy}, {"t": "accuracy"}, baseline and {"t": baseline}, seed)
    assert macro == metrics["t"]["accuracy"]  # of one task
    return macro


def test_interval_equals_slow_resampling_over_images():
    counts, right = made_up(np.random.default_rng(0), 60, 0.3)
    found = interval(counts)
    rng = np.random.default_rng(5)
    slow = [np.mean([right[i] for i in rng.integers(0, 60, 60)]) for _ in range(4000)]
    assert found.value == pytest.approx(right.mean())
    assert (found.low, found.high) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.015)
    alone = 2 * 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / right.size)  # as if questions were independent
    assert found.high - found.low > 1.4 * alone
    assert found == interval(counts) and found != interval(counts, seed=1)


def test_intervals_cover_the_truth():
    hits = 0
    for seed in range(80):
        found = interval(made_up(np.random.default_rng(seed), 80, 1.0)[0])
        hits += found.low <= 0.5 <= found.high
    assert 70 <= hits <= 80  # 76 expected


def test_difference_is_paired():
    rng = np.random.default_rng(3)
    base, right = made_up(rng, 60, 0.3)
    worse = right & (rng.random(right.shape) < 0.95)
    scores = [{"asked": 1, "right": float(r)} for r in worse.ravel()]
    counts = Counts.of(scores, np.repeat(np.arange(60), 5).tolist(), list(range(60)))
    found = interval(counts, base)
    assert found.difference == pytest.approx(worse.mean() - right.mean())
    assert found.difference_low <= found.difference <= found.difference_high < 0
    assert found.difference_high - found.difference_low < (found.high - found.low) / 2
    same = interval(base, base)
    assert (same.difference, same.difference_low, same.difference_high) == (0, 0, 0)
    assert interval(base).difference is None


def test_macro_is_the_mean_of_the_headlines():
    rng = np.random.default_rng(4)
    (one, a), (two, b) = made_up(rng, 50, 1.0), made_up(rng, 50, 1.0)
    counts = {"one": one, "two": two}
    metrics, macro = measure(counts, dict.fromkeys(counts, accuracy), dict.fromkeys(counts, "accuracy"))
    assert macro.value == pytest.approx((a.mean() + b.mean()) / 2)
    widths = [m["accuracy"].high - m["accuracy"].low for m in metrics.values()]
    assert macro.high - macro.low < min(widths)


def test_retention_is_the_mean_of_paired_shares():
    """Of a task kept whole and one of which about half is kept; resampling both runs together, task by task."""
    rng = np.random.default_rng(6)
    (one, _), (two, b) = made_up(rng, 60, 0.3), made_up(rng, 60, 0.3)
    half = b & (rng.random(b.shape) < 0.5)
    scores = [{"asked": 1, "right": float(r)} for r in half.ravel()]
    worse = Counts.of(scores, np.repeat(np.arange(60), 5).tolist(), list(range(60)))
    tasks = {"one": accuracy, "two": accuracy}, dict.fromkeys(("one", "two"), "accuracy")
    base = {"one": one, "two": two}
    found = retention({"one": one, "two": worse}, *tasks, base)
    assert found.value == pytest.approx((1 + half.sum() / b.sum()) / 2)
    slow = []
    for _ in range(3000):
        drawn = rng.integers(0, 60, 60)
        slow.append((1 + half[drawn].sum() / b[drawn].sum()) / 2)
    assert (found.low, found.high) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.01)
    assert retention(base, *tasks, base).value == 1
    zero = {"one": one, "two": Counts.of([{"asked": 1, "right": 0.0}], [0], list(range(60)))}
    assert retention(base, *tasks, zero) is None


def test_a_subtask_that_no_resample_sees_is_left_out_of_the_interval():
    """Two images, the task asked on one of them: a quarter of the resamples have nothing to measure."""
    counts = Counts.of([{"asked": 1, "right": 1.0}], [0], [0, 1])
    found = interval(counts)
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_different_images_are_refused():
    a, b = made_up(np.random.default_rng(0), 5, 1.0)[0], made_up(np.random.default_rng(0), 6, 1.0)[0]
    with pytest.raises(ValueError, match="same images"):
        measure({"a": a, "b": b}, {"a": accuracy, "b": accuracy}, {"a": "accuracy", "b": "accuracy"})


def test_choose_tasks():
    assert list(choose(None)) == list(TASKS)
    assert list(choose(["word", "existence"])) == ["existence", "word"]
    with pytest.raises(ValueError, match="unknown task 'color', did you mean colour"):
        choose(["color"])
    with pytest.raises(ValueError, match="no task"):
        choose([])


@pytest.mark.parametrize("name", TASKS)
def test_docs(name):
    task = TASKS[name]
    docs = task.load(12, 0)
    assert len({d.scene for d in docs}) == 12 and len({d.id for d in docs}) == len(docs)
    assert task.load(5, 0) == docs[: len(task.load(5, 0))] and task.load(12, 1) != docs
    counts = Counts.of(
        [task.score(d, d.answer) for d in docs], [d.scene for d in docs], sorted({d.scene for d in docs})
    )
    best = task.summarise(counts.totals(np.ones((1, 12))))
    assert best[task.HEADLINE] == pytest.approx(1.0)  # the reference answers are right
    assert max(len(d.answer.split()) for d in task.load(None, 0)) < task.NEW_TOKENS
