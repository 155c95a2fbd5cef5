"""The new skill: scenes, questions, tasks over them, and the data set that fine-tuning reads."""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vlmfast.eval import testbed
from vlmfast.eval.listing import show
from vlmfast.eval.tasks import NOVEL, TASKS, choose, image, task
from vlmfast.eval.tasks.base import NOVEL as FIRST
from vlmfast.eval.testbed import novel, scenes, sprites
from vlmfast.eval.testbed.questions import VOCABULARY, questions

SHOWN = [novel.scene("test", i) for i in range(60)]
ASKED = [(shown, q) for i, shown in enumerate(SHOWN) for q in novel.questions(shown, "test", i)]


def picture_hash(shown):
    return hashlib.sha256(shown.image.tobytes()).hexdigest()


def test_scenes_are_pure_functions_and_the_published_ones():
    assert [novel.scene("test", i) for i in range(5)] == SHOWN[:5]
    assert all((novel.scene("test", i).image == SHOWN[i].image).all() for i in range(5))
    again = [q for i in range(5) for q in novel.questions(SHOWN[i], "test", i)]
    assert again == [q for shown, q in ASKED if shown in SHOWN[:5]]
    assert novel.fingerprint() == novel.HASH
    with pytest.raises(ValueError, match="unknown split 'dev'; there are train, validation, test"):
        novel.scene("dev", 0)


def test_splits_are_disjoint_from_each_other_and_from_the_known_scenes():
    drawn = [
        picture_hash(kind.scene(split, i)) for kind in (novel, scenes) for split in scenes.SPLITS for i in range(25)
    ]
    assert len(set(drawn)) == len(drawn)
    for split in scenes.SPLITS:
        digits = {digit.image for i in range(25) for digit in novel.scene(split, i).digits}
        assert digits and digits <= set(sprites.digit_ids(split).tolist())


def test_new_kinds_are_words_that_were_only_read_from_signs():
    assert len(novel.KINDS) == 8 and set(novel.KINDS) <= set(scenes.WORDS) - set(scenes.CATEGORIES)
    assert not set(sprites.NEW_GLYPHS.values()) & set(sprites.GLYPHS.values())
    signs = [novel.scene("train", i).word for i in range(120)]
    assert sum(word is not None for word in signs) > 15 and not set(signs) & set(novel.KINDS)
    for split in scenes.SPLITS:
        assert not any(o.category in novel.KINDS for i in range(40) for o in scenes.scene(split, i).objects)
    for _, question in ASKED:
        assert set(f"{question.prompt} {question.answer}".split()) <= set(VOCABULARY)


def test_new_kinds_look_different_from_all_others():
    """No two pictograms are alike when they are as small as they get, however they are turned."""
    ink = {
        kind: np.stack([sprites.pictogram(kind, 17, turn) for turn in range(7)]).reshape(7, -1)
        for kind in (*novel.KINDS, *scenes.CATEGORIES)
    }
    for kind in novel.KINDS:
        own = np.linalg.norm(ink[kind][3])
        for other in set(ink) - {kind}:
            assert min(np.linalg.norm(ink[kind][3] - turned) for turned in ink[other]) > 0.4 * own, (kind, other)


def test_pictures_hold_what_the_scene_says():
    for shown in SHOWN:
        assert shown.image.shape == (120, 120, 3) and shown.image.dtype == np.uint8
        assert {2} >= {sum(o.category == c for o in shown.objects) for c in shown.present} - {1}
        assert len({o.colour for o in shown.objects}) == len(shown.present)  # a colour of its own for each kind
        assert 1 <= sum(c in novel.KINDS for c in shown.present) <= 2 and shown.visible == shown.objects
        boxes = scenes.boxes(shown)
        for i, a in enumerate(boxes):
            assert 0 <= a[0] < a[2] <= 120 and 0 <= a[1] < a[3] <= 120
            assert all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for b in boxes[i + 1 :])
        for one in shown.objects:
            area = shown.image[one.box[1] : one.box[3], one.box[0] : one.box[2]].reshape(-1, 3).astype(float)
            away = {name: np.linalg.norm(area - rgb, axis=1) for name, rgb in sprites.RGB.items()}
            near = {name: np.sort(distance)[: len(area) // 20].mean() for name, distance in away.items()}
            assert near[one.colour] < (55 if one.size == "big" else 80), (one, near)  # thin lines of small ones blend
    assert {c for shown in SHOWN for c in shown.present} >= set(novel.KINDS)


def answer_of(shown, prompt):
    """The answer by plain looking, by another way than the generator's; None for a form that is not known."""
    words = prompt.removesuffix(" ?").split()
    at = {}
    for o in shown.objects:
        at.setdefault(o.category, []).append(((o.box[0] + o.box[2]) // 2, (o.box[1] + o.box[3]) // 2, o.colour))
    if words[:3] == ["is", "there", "a"]:
        return "yes" if words[3] in at else "no"
    if words[:4] == ["what", "colour", "is", "the"]:
        return at[words[4]][0][2]
    if words[:2] == ["what", "is"]:
        (kind,) = {kind for kind, places in at.items() if places[0][2] == words[2]}
        return kind
    if words[:3] == ["what", "colour", "is"]:
        ((x, y, _),) = at[words[-1]]
        inside = set()
        for kind, places in at.items():
            for u, v, colour in places:
                across, down = u - x, v - y
                if kind == words[-1] or (across, down) == (0, 0):
                    continue
                far = abs(across) if words[3] in ("left", "right") else abs(down)
                side = abs(down) if words[3] in ("left", "right") else abs(across)
                right_way = {"left": across < 0, "right": across > 0, "above": down < 0, "below": down > 0}[words[3]]
                assert not (right_way and 0.8 * side < far <= 1.2 * side), "an arguable place"
                if right_way and far > side:
                    inside.add(colour)
        (colour,) = inside
        return colour
    return None


def test_every_answer_follows_from_the_scene():
    assert len(ASKED) > 500
    for shown, question in ASKED:
        assert question.answer == answer_of(shown, question.prompt), question
    for name in novel.TASKS:
        assert sum(q.task == name for _, q in ASKED) > 100
    assert {q.subtask for _, q in ASKED} == {"existence", "colour", "name", "known", "new"}


def test_answers_cannot_be_guessed():
    said = [q.answer for _, q in ASKED if q.subtask == "existence"]
    assert said.count("yes") == said.count("no") > 50
    for shown, question in ASKED:
        if question.task == "novel_relation":  # the colour of the thing that is named is never the answer
            named = next(o for o in shown.objects if o.category == question.info["query"])
            assert named.colour != question.answer
            assert question.subtask == ("new" if named.category in novel.KINDS else "known")
    colours = [q.answer for _, q in ASKED if q.answer in scenes.COLOURS]
    assert max(map(colours.count, scenes.COLOURS)) < 0.25 * len(colours)


def test_the_old_forms_are_about_new_kinds_and_the_new_form_is_new():
    old = {q.prompt for i in range(80) for q in questions(scenes.scene("train", i), "train", i)}
    for _, question in ASKED:
        if question.task == "novel_relation":
            assert question.prompt not in old and not question.prompt.startswith("what colour is the ")
        else:
            assert {question.info["query"], question.answer} & set(novel.KINDS)


# --- tasks


def test_the_default_run_asks_none_of_it():
    assert list(choose(None)) == list(TASKS) and not set(NOVEL) & set(TASKS) and len(TASKS) == 9
    assert list(choose(["novel_relation", "word", "novel_object", "existence"])) == [
        "existence",
        "word",
        "novel_object",
        "novel_relation",
    ]
    with pytest.raises(ValueError, match="did you mean novel_object"):
        task("novel_objekt")
    console = Console(file=io.StringIO(), width=200)
    show(["tasks"], console)
    assert all(name in console.file.getvalue() for name in (*TASKS, *NOVEL))


@pytest.mark.parametrize("name", novel.TASKS)
def test_tasks_ask_about_new_scenes_and_count_answers(name):
    asked = task(name)
    docs = asked.load(4, 0)
    assert docs == asked.load(6, 0)[: len(docs)] and len({doc.scene for doc in docs}) == 4
    for doc in docs:
        shown = novel.scene("test", doc.scene - FIRST)
        assert doc.scene >= FIRST and (image(doc) == shown.image).all()
        assert doc.answer == answer_of(shown, asked.prompt(doc))
        right, wrong = asked.score(doc, f"it is {doc.answer} ."), asked.score(doc, "7")
        assert right == {"asked": 1, "right": 1, f"asked/{doc.subtask}": 1, f"right/{doc.subtask}": 1}
        assert wrong == right | {"right": 0, f"right/{doc.subtask}": 0}
        other = {"yes": "no", "no": "yes", "red": "blue"}.get(
            doc.answer, "red" if doc.answer in scenes.COLOURS else "cup"
        )
        assert asked.score(doc, f"{other} {doc.answer}")["right"] == 0
    scores = [asked.score(doc, doc.answer if i % 2 else "") for i, doc in enumerate(docs)]
    totals = {key: np.array([sum(s.get(key, 0) for s in scores)], float) for score in scores for key in score}
    found = asked.summarise(totals)
    assert found["accuracy"] == pytest.approx(len(docs) // 2 / len(docs))
    parts = {doc.subtask for doc in docs}
    assert set(found) == {"accuracy", *(f"accuracy/{part}" for part in parts)}
    share = [np.mean([s["right"] for s, d in zip(scores, docs) if d.subtask == part]) for part in sorted(parts)]
    assert [found[f"accuracy/{part}"][0] for part in sorted(parts)] == pytest.approx(share)


# --- the data set


def test_a_data_set_is_what_fine_tuning_reads(tmp_path):
    finetune = pytest.importorskip("vlmfast.eval.finetune")
    file = novel.write(tmp_path / "skill", 30, "train", rehearsal=0.3)
    read = finetune.load_samples(str(file))
    drawn = novel.samples("train", 30, 0.3)
    assert len(read) == 30 and read.check()
    for sample, (shown, question, name) in zip(read, drawn):
        user, assistant = sample.messages
        assert [part["type"] for part in user["content"]] == ["image", "text"] and user["role"] == "user"
        assert user["content"][1]["text"] == question.prompt
        assert assistant == {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}
        (picture,) = sample.pictures()
        assert (np.asarray(picture) == shown.image).all() and name in str(sample.images[0])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["task"] for line in lines] == [question.task for _, question, _ in drawn]
    before = file.read_bytes()
    novel.write(tmp_path / "skill", 30, "train", rehearsal=0.3)
    assert file.read_bytes() == before and not list(file.parent.glob("*.new"))


def test_samples_mix_the_new_skill_with_rehearsal():
    drawn = novel.samples("train", 120, 0.25)
    old = [name.startswith("old") for _, _, name in drawn]
    assert sum(old) == 30 and all(sum(old[i : i + 40]) == 10 for i in (0, 40, 80))
    assert [(q, n) for _, q, n in novel.samples("train", 40, 0.25)] == [(q, n) for _, q, n in drawn[:40]]
    assert len({(question.prompt, name) for _, question, name in drawn}) == 120  # none twice
    for shown, question, name in drawn:
        kind, index = name.split("-")
        source = novel if kind == "new" else scenes
        assert (source.scene("train", int(index)).image == shown.image).all()
        assert (question.task in novel.TASKS) == (kind == "new")
    new = [q.task for _, q, name in drawn if name.startswith("new")]
    assert 0.3 < new.count("novel_relation") / len(new) < 0.6
    per_scene = [sum(n == name for _, _, n in drawn) for _, _, name in drawn]
    assert max(per_scene) <= novel.PER_SCENE
    assert not any(name.startswith("old") for _, _, name in novel.samples("validation", 20))
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match="rehearsal is a share"):
            novel.samples("train", 4, share)


@pytest.mark.slow
@pytest.mark.parametrize("name", testbed.MODELS)
def test_models_as_they_came_cannot_do_it(name):
    from vlmfast.eval.models import load_model
    from vlmfast.eval.prompts import Prompts

    model, processor = load_model(f"testbed:{name}")
    prompts = Prompts(processor, model.device, model.dtype)
    share = {}
    for kind, asked in NOVEL.items():
        docs = asked.load(30, 0)
        inputs = prompts.batch([prompts.row(asked.prompt(doc), image(doc)) for doc in docs])
        inputs |= prompts.pictures([image(doc) for doc in docs])
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        said = processor.batch_decode(out, skip_special_tokens=True)
        share[kind] = np.mean([asked.score(doc, text)["right"] for doc, text in zip(docs, said)])
    assert share["novel_object"] < 0.45 and share["novel_relation"] < 0.1


def test_pictures_are_written_losslessly(tmp_path):
    file = novel.write(tmp_path, 4, "test")
    (first, *_) = sorted((file.parent / "images").iterdir())
    with Image.open(first) as opened:
        assert opened.format == "PNG" and opened.size == (120, 120)
