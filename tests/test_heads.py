"""The search for heads: every head alone against the unpatched model, on scenes apart, resumable, and its files."""

from __future__ import annotations

import dataclasses
import json
import zlib

import pytest
import torch
from test_cli import call, refused

import vlmfast
from vlmfast.adapters.attention.zerotuning import ZeroTuning
from vlmfast.eval import heads
from vlmfast.eval.heads import Profile, Search, Trial, held_out, profile
from vlmfast.eval.models import load_model
from vlmfast.eval.prompts import Prompts
from vlmfast.eval.tasks import TASKS, image
from vlmfast.eval.tasks.base import Doc, accuracy, right
from vlmfast.eval.testbed.build import new_model, new_processor
from vlmfast.eval.testbed.scenes import scene

SPEC = "zerotuning:gamma=30.0"
CHOSEN = {"limit": 2, "progress": False, "batch": 3}
PAIRS = [(layer, head) for layer in range(2) for head in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small random model whose attention is far from even: every head matters a little."""
    whole = new_model("llava")
    config = whole.config
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 2
    if kinds := getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = kinds[:2]
    torch.manual_seed(0)
    small = type(whole)(config)
    small.generation_config = whole.generation_config
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.6 / parameter.shape[-1] ** 0.5)
    folder = tmp_path_factory.mktemp("models") / "small"
    small.save_pretrained(folder)
    new_processor("llava").save_pretrained(folder)
    return str(folder)


def hurry(patch):
    """Short answers, half of which are right by chance, whatever a random model says."""
    patch.setattr(heads, "cores", lambda: 1)
    for name in ("word", "colour"):
        patch.setattr(TASKS[name], "NEW_TOKENS", 3)
        patch.setattr(TASKS[name], "score", lambda doc, answer: right(zlib.crc32(answer.encode()) % 2 == 0))
        patch.setattr(TASKS[name], "summarise", accuracy)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A search that nothing interrupted: (its folder, what it found)."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        return folder, profile(model, SPEC, ["word", "colour"], folder / "heads.json", **CHOSEN)


def by_hand(model, method, docs):
    """Question by question, as a user would ask: the mean over tasks of the share of right answers."""
    network, processor = load_model(model)
    prompts = Prompts(processor, network.device, network.dtype)
    shares = {}
    with torch.no_grad(), vlmfast.patch(network, method):
        for doc in docs:
            inputs = prompts.full(TASKS[doc.task].prompt(doc), image(doc))
            out = network.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            text = processor.tokenizer.decode(out, skip_special_tokens=True).strip()
            shares.setdefault(doc.task, []).append(TASKS[doc.task].score(doc, text)["right"])
    means = {task: sum(values) / len(values) for task, values in shares.items()}
    return sum(means.values()) / len(means), means


def test_each_head_alone(model, finished):
    _, found = finished
    docs = [doc for name in ("word", "colour") for doc in held_out(name, 2, 0)]
    plain, _ = by_hand(model, "none", docs)
    assert [(trial.layer, trial.head) for trial in found.trials] == PAIRS
    assert found.unpatched == pytest.approx(plain) and found.questions == len(docs)
    assert len({trial.difference for trial in found.trials}) > 2, "heads differ"
    for trial in found.trials[::5]:
        score, means = by_hand(model, ZeroTuning(gamma=30.0, layers=trial.layer, heads=trial.head), docs)
        assert trial.score == pytest.approx(score) and trial.tasks == pytest.approx(means)
        assert trial.difference == pytest.approx(score - plain)
        assert trial.low <= trial.difference <= trial.high


def test_the_files(model, finished):
    """The heads that help are what `heads=FILE` reads."""
    folder, found = finished
    path = folder / "heads.json"
    helping = {layer: [t.head for t in found.trials if t.layer == layer and t.difference > 0] for layer in (0, 1)}
    helping = {layer: numbers for layer, numbers in helping.items() if numbers}
    assert helping and json.loads(path.read_text()) == {str(layer): numbers for layer, numbers in helping.items()}
    method = ZeroTuning(gamma=30.0, heads=str(path))
    assert {layer: list(method.heads_of(layer)) for layer in method.where((0, 1), 2)} == helping
    network, _ = load_model(model)
    with vlmfast.patch(network, f"{SPEC},heads={path}") as handle:
        assert "zerotuning: edits" in str(handle.report())
    scores = json.loads((folder / "heads.scores.json").read_text())
    assert [(one["layer"], one["head"]) for one in scores["heads"]] == PAIRS and scores["split"] == "validation"
    assert not list(folder.glob(".*tmp"))


def test_an_interrupted_search_goes_on(model, finished, tmp_path, monkeypatch):
    """Heads that were tried are not tried again, and the end is the same."""
    folder, found = finished
    path, tried, answered = tmp_path / "heads.json", [], Search.answered

    def stopping(self, method, name):
        if len(tried) == 5:
            raise KeyboardInterrupt
        tried.append(name)
        return answered(self, method, name)

    monkeypatch.setattr(Search, "answered", stopping)
    with pytest.raises(KeyboardInterrupt):
        profile(model, SPEC, ["word", "colour"], path, **CHOSEN)
    assert tried == ["none", *(f"layer 0 head {head}" for head in range(4))] and not path.exists()
    tried.clear()
    monkeypatch.setattr(Search, "answered", lambda self, *one: (tried.append(one[1]), answered(self, *one))[1])
    assert profile(model, SPEC, ["word", "colour"], path, **CHOSEN) == found
    assert tried == ["none", *(f"layer {layer} head {head}" for layer, head in PAIRS[4:])]
    assert path.read_text() == (folder / "heads.json").read_text()
    monkeypatch.setattr(heads, "Search", lambda *_: pytest.fail("everything is known"))
    best = profile(model, SPEC, ["word", "colour"], path, top=1, **CHOSEN)
    assert sum(map(len, json.loads(path.read_text()).values())) == 1
    assert best.trials == found.trials


def test_questions_apart_from_the_test_scenes():
    for name in TASKS:
        docs = held_out(name, 2, 0)
        assert docs and {doc.split for doc in docs} == {"validation"} and all(doc.task == name for doc in docs)
        for doc in docs:
            assert doc.id.startswith("validation:")
            assert (image(doc) == scene("validation", doc.scene).image).all()
            assert not (image(dataclasses.replace(doc, split="test")) == image(doc)).all()
    ids = {doc.id for doc in held_out("colour", 5, 0)}
    assert {doc.id for doc in held_out("colour", 2, 0)} < ids and ids != {d.id for d in held_out("colour", 5, 1)}
    assert not ids & {doc.id for doc in TASKS["colour"].load(None, 0)}
    assert Doc("colour", 3, 0, "", "").id == "colour/3/0"


def trials(*differences: float) -> Profile:
    """Six heads a layer with these differences."""
    made = (
        Trial(layer=i // 6, head=i % 6, score=0.5 + d, difference=d, low=d, high=d, tasks={})
        for i, d in enumerate(differences)
    )
    return Profile("m", "s", 10, 5, 0.5, tuple(made))


def test_which_heads_are_taken():
    found = trials(0.1, 0.0, -0.2, 0.3, 0.05, 0.0, 0.2, -0.1, 0.0, 0.0, 0.0, 0.02)
    assert found.chosen() == {0: [0, 3, 4], 1: [0, 5]}
    assert found.chosen(0.05) == {0: [0, 3], 1: [0]}, "a head at the margin does not help by more"
    assert found.chosen(top=2) == {0: [3], 1: [0]}
    assert found.chosen(top=0.25) == {0: [0, 3], 1: [0]}, "a share of all heads tried: three of twelve"
    assert found.chosen(top=0.9) == found.chosen() == found.chosen(top=50)
    assert trials(0.0, -0.1).chosen(top=1) == {}
    for top in (0, 1.5, 0.0, -1, True):
        with pytest.raises(ValueError, match="a share of the heads such as 0.4"):
            found.chosen(top=top)


# --- wrong input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spec": "hiprune:keep=0.5"}, "hiprune does not edit single heads; methods with heads: .*act.*zerotuning"),
        ({"spec": "zerotunin"}, "did you mean zerotuning"),
        ({"spec": "zerotuning:gama=2"}, "did you mean gamma"),
        ({"spec": "none"}, "one method at a time"),
        ({"spec": "act:layers=1+zerotuning:layers=0"}, "one method at a time"),
        ({"spec": "zerotuning:heads=0/1"}, "heads are what is looked for"),
        ({"spec": "zerotuning:gamma=1"}, "changes nothing in any head"),
        ({"spec": "zerotuning:layers=7"}, "layers 0 to 1"),
        ({"tasks": ["colours"]}, "did you mean colour"),
        ({"limit": 0}, "limit must be a whole number, 1 or more"),
        ({"top": 2.0}, "a share of the heads"),
        ({"dtype": "float8"}, "unknown dtype"),
        ({"out": "heads.txt"}, "NAME.json"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(model, tmp_path, changes, words):
    settings = {"spec": SPEC, "tasks": ["word"], "out": "heads.json"} | CHOSEN | changes
    settings["out"] = tmp_path / settings["out"]
    with pytest.raises(ValueError, match=words):
        profile(model, **settings)
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_scores_of_another_search_are_not_taken(model, finished, tmp_path):
    folder, _ = finished
    for name in ("heads.json", "heads.scores.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for changes, words in (
        ({"limit": 3}, "limit 2 .now 3"),
        ({"spec": "zerotuning:gamma=3.0"}, "spec zerotuning:gamma=30.0 .now zerotuning:gamma=3.0"),
        ({"tasks": ["word"]}, "tasks colour, word .now word"),
    ):
        settings = {"spec": SPEC, "tasks": ["word", "colour"]} | CHOSEN | changes
        with pytest.raises(ValueError, match=words):
            profile(model, out=tmp_path / "heads.json", **settings)
    (tmp_path / "heads.scores.json").write_text('{"heads": [')
    with pytest.raises(ValueError, match="is damaged"):
        profile(model, SPEC, ["word", "colour"], tmp_path / "heads.json", **CHOSEN)


# --- the command line -------------------------------------------------------------------------------------------


def test_the_command(model, finished, tmp_path):
    folder, found = finished
    (tmp_path / "heads.scores.json").write_bytes((folder / "heads.scores.json").read_bytes())
    options = ["heads", "--model", model, "--method", SPEC, "--task", "word", "--task", "colour", "--limit", 2]
    result = call(*options, "--batch", 3, "--top", 2, "--out", tmp_path / "heads.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    helping = sum(t.difference > 0 for t in found.trials)
    assert f"of 12 heads {helping} help" in result.stdout and f"{100 * found.unpatched:.1f} %" in result.stdout
    best = max(found.trials, key=lambda t: t.difference)
    assert f"{best.head} {100 * best.difference:+.1f}" in result.stdout
    assert sum(map(len, json.loads((tmp_path / "heads.json").read_text()).values())) == 2
    refused(call(*options, "--top", "many", "--out", tmp_path / "heads.json"), "many")
    refused(call(*options, "--top", "1,2", "--out", tmp_path / "heads.json"), "--top")
    refused(call("heads", "--model", model, "--method", "hiprune", "--out", tmp_path / "x.json"), "single heads")


def test_help():
    result = call("heads", "--help")
    assert result.exit_code == 0 and "vlmfast heads --model testbed:llava" in result.stdout
