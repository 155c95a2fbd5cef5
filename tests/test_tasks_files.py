"""POPE's question files and COCO's annotations, in small: read, asked, scored, and refused where they are broken."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vlmfast.eval import runner, sweep
from vlmfast.eval.runner import evaluate
from vlmfast.eval.tasks import choose, image, task
from vlmfast.eval.tasks.chair import singulars, things_in
from vlmfast.eval.testbed.scenes import scene

SYNONYMS = """person, man, woman, baby
bear, teddy bear, cub
train, locomotive
cell phone, mobile phone, phone
knife
dining table, table
"""


@pytest.fixture
def pictures(tmp_path):
    """Two scenes of the testbed as files, and what is in them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in (0, 1):
        Image.fromarray(scene("test", index).image).save(folder / f"{index}.png")
    return folder


def pope_file(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


@pytest.fixture
def questions(tmp_path, pictures):
    folder = tmp_path / "questions"
    folder.mkdir()
    names = [one.category for one in scene("test", 0).objects]
    ask = {"image": "0.png", "text": f"is there a {names[0]} ?", "label": "yes"}
    other = {"image": "1.png", "text": "is there a sun ?", "label": "No"}
    pope_file(folder / "coco_pope_random.json", [ask, other])
    pope_file(folder / "coco_pope_popular.jsonl", [ask])
    return folder


def test_pope_files(questions, pictures, tmp_path):
    name = f"pope:{questions},images={pictures},suffix=please ."
    pope = task(name)
    docs = pope.load(None, 0)
    assert sorted((doc.picture[-5:], doc.subtask, doc.answer) for doc in docs) == [
        ("0.png", "popular", "yes"),
        ("0.png", "random", "yes"),
        ("1.png", "random", "no"),
    ]
    assert len(pope.load(1, 0)) in (1, 2), "a limit counts pictures"
    assert pope.prompt(docs[0]).endswith("? please .")
    for doc in docs:
        index = int(doc.picture[-5])
        assert np.array_equal(image(doc), scene("test", index).image)
    assert len({doc.scene for doc in docs}) == 2 and min(doc.scene for doc in docs) >= 10**6
    totals = {}
    for doc in docs:
        for key, value in pope.score(doc, "Yes, there is.").items():
            totals[key] = totals.get(key, 0) + np.array([value])
    metrics = {key: float(value[0]) for key, value in pope.summarise(totals).items()}
    assert metrics["accuracy"] == pytest.approx(2 / 3) and metrics["yes_ratio"] == 1
    assert metrics["precision"] == pytest.approx(2 / 3) and metrics["recall"] == 1
    assert metrics["f1/popular"] == 1 and metrics["accuracy/random"] == 0.5


def test_an_evaluation_over_files(questions, pictures, tmp_path, monkeypatch):
    """The main job takes them like any task, beside a task of the testbed."""
    monkeypatch.setattr(sweep.Sweep, "latency", lambda self, spec: {"ttft_ms": None})
    monkeypatch.setattr(runner, "cores", lambda: 1)
    name = f"pope:{questions},images={pictures}"
    given = (["testbed:llava"], ["zerotuning"], [], [name, "colour"], tmp_path / "out")
    files = evaluate(*given, limit=2, progress=False)
    results = [json.loads(file.read_text()) for file in files]
    assert [result["spec"] for result in results] == ["none", "zerotuning"]
    for result in results:
        assert set(result["tasks"]) == {name, "colour"} and result["tasks"][name]["n"] == 3
        assert "recall/random" in result["tasks"][name]["metrics"]
    before = [file.stat().st_mtime_ns for file in files]
    evaluate(*given, limit=2, progress=False)
    assert [file.stat().st_mtime_ns for file in files] == before, "what is complete stays"


def coco(tmp_path, pictures):
    instances = {
        "images": [{"id": 7, "file_name": "0.png"}, {"id": 8, "file_name": "1.png"}],
        "annotations": [
            {"image_id": 7, "category_id": 1},
            {"image_id": 7, "category_id": 1},
            {"image_id": 8, "category_id": 3},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "bear"}, {"id": 3, "name": "cell phone"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    captions = {"annotations": [{"image_id": 7, "caption": "A man with two bears."}]}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return f"chair:{tmp_path}/instances.json,images={pictures},synonyms={tmp_path}/synonyms.txt"


def test_chair_on_annotations(tmp_path, pictures):
    name = coco(tmp_path, pictures)
    plain = {doc.picture[-5:]: doc for doc in task(name).load(None, 0)}
    assert plain["0.png"].info["target"] == ("person",) and plain["1.png"].info["target"] == ("cell phone",)
    chair = task(f"{name},captions={tmp_path}/captions.json,tokens=64,prompt=describe it .")
    docs = {doc.picture[-5:]: doc for doc in chair.load(None, 0)}
    assert docs["0.png"].info["target"] == ("bear", "person") and chair.NEW_TOKENS == 64
    assert chair.prompt(docs["0.png"]) == "describe it ."
    totals = {}
    for picture, answer in (("0.png", "Two men and a teddy bear."), ("1.png", "A phone on a table.")):
        for key, value in chair.score(docs[picture], answer).items():
            totals[key] = totals.get(key, 0) + np.array([value])
    metrics = {key: float(value[0]) for key, value in chair.summarise(totals).items()}
    assert metrics["chair_i"] == 1 / 4 and metrics["chair_s"] == 1 / 2 and metrics["recall"] == 1
    assert metrics["length"] == 5.5


def test_things_in_a_caption():
    names = {}
    for line in SYNONYMS.splitlines():
        words = [word.strip() for word in line.split(",")]
        names |= dict.fromkeys(words, words[0])
    for text, expected in (
        ("People and a baby.", ["person", "person"]),
        ("A baby bear and its cubs", ["bear", "bear"]),
        ("the passenger train on the train tracks", ["train"]),
        ("Mobile phones, knives; a teddy-bear", ["cell phone", "knife", "bear"]),
        ("a dining table", ["dining table"]),
        ("women at tables", ["person", "dining table"]),
        ("", []),
    ):
        assert things_in(text, names) == expected, text
    assert list(singulars("babies")) == ["babies", "baby", "babi", "babie"]


def test_bad_files(tmp_path, pictures, questions):
    for name, error, words in (
        ("pope:", ValueError, "names no file"),
        ("pope:nowhere.json", FileNotFoundError, "no question file nowhere.json"),
        (f"pope:{questions},image=x", ValueError, "settings are images, suffix"),
        (f"pope:{questions},images=nowhere", FileNotFoundError, "folder of pictures"),
        ("poep:x", ValueError, "did you mean pope"),
        (f"chair:{questions}/coco_pope_random.json", ValueError, "not a JSON file"),
        (f"chair:{tmp_path}/instances.json", FileNotFoundError, "annotation file"),
    ):
        with pytest.raises(error, match=words):
            choose([name])
    name = coco(tmp_path, pictures)
    with pytest.raises(ValueError, match="tokens='0'"):
        task(f"{name},tokens=0")
    (tmp_path / "synonyms.txt").write_text("person, man\n")
    with pytest.raises(ValueError, match="no line for the category 'bear'"):
        task(f"{name},tokens=9")
    (tmp_path / "instances.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match="no list 'annotations'"):
        task(f"{name},tokens=8")
    for record, words in (
        ({"image": "0.png", "text": "is it ?"}, "line 1: needs 'label'"),
        ({"image": "0.png", "text": "is it ?", "label": "maybe"}, "neither yes nor no"),
        ({"image": "9.png", "text": "is it ?", "label": "no"}, "no picture .*9.png"),
    ):
        file = pope_file(tmp_path / "one.json", [record])
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            task(f"pope:{file},images={pictures}").load(None, 0)
    (pictures / "0.png").write_text("no picture")
    file = pope_file(tmp_path / "one.json", [{"image": "0.png", "text": "is it ?", "label": "no"}])
    with pytest.raises(ValueError, match="cannot be read"):
        image(task(f"pope:{file},images={pictures},suffix=a").load(None, 0)[0])
