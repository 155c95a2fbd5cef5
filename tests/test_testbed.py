"""The testbed: scenes and questions are reproducible and true, and the shipped models see."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlmfast.eval import testbed
from vlmfast.eval.testbed import build, card, encode, forward, measure, scenes, sprites, training
from vlmfast.eval.testbed.questions import (
    COUNTS,
    TASKS,
    VOCABULARY,
    caption,
    objects_in,
    prompt_messages,
    questions,
)

TEST = [scenes.scene("test", i) for i in range(80)]
shipped = pytest.mark.parametrize("name", testbed.MODELS)


def test_a_scene_is_a_pure_function_of_split_and_index():
    again = [scenes.scene("test", i) for i in range(80)]
    assert again == TEST
    assert all((a.image == b.image).all() for a, b in zip(TEST, again))
    assert scenes.scene("train", 0) != scenes.scene("test", 0)
    with pytest.raises(ValueError, match="unknown split"):
        scenes.scene("dev", 0)


def test_splits_share_no_handwritten_digit():
    parts = [set(sprites.digit_ids(split)) for split in scenes.SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    for split, part in zip(scenes.SPLITS, parts):
        drawn = [digit.image for i in range(60) for digit in scenes.scene(split, i).digits]
        assert drawn and part.issuperset(drawn)


def test_the_test_split_is_the_published_one():
    scenes.check_test_split()


def test_a_changed_test_split_is_noticed(monkeypatch):
    monkeypatch.setattr(scenes, "TEST_HASH", "0" * 64)
    with pytest.raises(RuntimeError, match="differs from the published one"):
        scenes.check_test_split.__wrapped__()


def test_pictures_hold_what_the_scene_says():
    for shown in TEST:
        assert shown.image.shape == (scenes.SIDE, scenes.SIDE, 3) and shown.image.dtype == np.uint8
        assert 1 <= len(shown.visible) <= 6
        places = scenes.boxes(shown)
        for i, a in enumerate(places):
            assert 0 <= a[0] < a[2] <= scenes.SIDE and 0 <= a[1] < a[3] <= scenes.SIDE
            for b in places[i + 1 :]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_priors_bind_partners_in_training_more_than_in_the_test():
    def rate(split):
        shown = [scenes.scene(split, i).present for i in range(400)]
        return np.mean([scenes.PARTNERS[c] in seen for seen in shown for c in seen if c in scenes.PARTNERS])

    assert 0.8 < rate("train") < 0.97
    assert rate("test") < rate("train") - 0.05


@pytest.mark.parametrize("patch", [10, 12])
def test_masks_and_the_oracle(patch):
    for shown in TEST[:20]:
        mask = scenes.mask(shown, patch)
        assert mask.shape == (scenes.SIDE // patch,) * 2
        assert (mask == scenes.mask(shown, patch, "objects") | scenes.mask(shown, patch, "sign")
                | scenes.mask(shown, patch, "digits")).all()  # fmt: skip
        order = scenes.oracle(shown, patch)
        assert sorted(order) == list(range(mask.size))
        assert mask.ravel()[order[: mask.sum()]].mean() == 1.0
        first = order[: len(scenes.boxes(shown))]
        assert all(scenes.coverage(box, mask.shape[0]).ravel()[first].max() > 0.5 for box in scenes.boxes(shown))


def test_every_answer_follows_from_the_scene():
    asked = 0
    for i, shown in enumerate(TEST):
        for question in questions(shown, "test", i):
            assert set(f"{question.prompt} {question.answer}".split()) <= set(VOCABULARY)
            assert question.answer == _derive(shown, question)
            asked += 1
    assert asked > 1000


def _derive(shown, question):
    """The answer by another way than the generator's."""
    words = question.prompt.split()
    by = {c: [o for o in shown.objects if o.category == c] for c in scenes.CATEGORIES}
    if question.task == "existence":
        return "yes" if by[words[3]] else "no"
    if question.task == "count":
        return COUNTS[len(by[words[2]]) - 1]
    if question.task == "colour":
        return by[words[4]][0].colour
    if question.task == "size":
        return by[words[2]][0].size
    if question.task == "where":
        x, y = by[words[3]][0].centre
        return f"{'top' if y < 60 else 'bottom'} {'left' if x < 60 else 'right'}"
    if question.task == "binding":
        return next(o.category for o in shown.objects if o.colour == words[2])
    if question.task == "relation":
        x, y = by[words[-2]][0].centre
        away = {
            "left": lambda o: (x - o.centre[0], abs(y - o.centre[1])),
            "right": lambda o: (o.centre[0] - x, abs(y - o.centre[1])),
            "above": lambda o: (y - o.centre[1], abs(x - o.centre[0])),
            "below": lambda o: (o.centre[1] - y, abs(x - o.centre[0])),
        }[words[2]]
        (found,) = {o.category for o in shown.objects if away(o)[0] > away(o)[1] and o.centre != (x, y)}
        return found
    if question.task == "digits":
        return " ".join(str(d.value) for d in sorted(shown.digits, key=lambda d: d.box))
    if question.task == "word":
        return shown.word
    assert question.task == "caption" and set(objects_in(question.answer)) == set(shown.present)
    return question.answer


def test_existence_asks_as_many_yes_as_no():
    asked = [q for i, shown in enumerate(TEST) for q in questions(shown, "test", i) if q.task == "existence"]
    for subtask in ("random", "popular", "adversarial"):
        answers = [q.answer for q in asked if q.subtask == subtask]
        assert answers.count("yes") == answers.count("no") > 10
    for question in asked:
        if question.subtask == "adversarial" and question.answer == "no":
            assert question.info["query"] in scenes.PARTNERS


def test_captions_name_hidden_objects_and_questions_do_not():
    hidden = 0
    for i in range(300):
        shown = scenes.scene("train", i)
        for one in shown.objects:
            if one.hidden:
                hidden += 1
                assert one.category in objects_in(caption(shown))
                assert all(one.category != q.info.get("query") for q in questions(shown, "train", i))
    assert hidden > 5


@shipped
def test_training_forwards_compute_what_the_classes_compute(name):
    model = build.new_model(name).eval()
    for parameter in model.parameters():
        parameter.data *= 1.5
    shown, batch = measure.scene_batch(name, "validation", range(3))
    for values in (batch.tokens, batch.segments, batch.offsets):
        assert values.shape == batch.tokens.shape
    processor = build.new_processor(name)
    asked = [questions(one, "validation", i)[4] for i, one in enumerate(shown)]
    text = [processor.apply_chat_template(prompt_messages(q.prompt), add_generation_prompt=True) for q in asked]
    inputs = processor(images=[Image.fromarray(s.image) for s in shown], text=text, return_tensors="pt", padding=True)
    with torch.no_grad():
        reference = model(**inputs).logits[:, -1]
        seen = forward.see(model, batch.pixels)
        packed = training.pack(model, name, batch, seen["visual"], None, False, False)
        out, _ = forward.language(model, packed.embeds, packed.positions, packed.first_text, packed.mask, {})
        everything = torch.arange(batch.pixels.shape[1]).expand(3, -1)
        assert torch.allclose(forward.see(model, batch.pixels, everything)["visual"], seen["visual"], atol=1e-5)
    for b, question in enumerate(asked):
        place = int((batch.segments[b] == 5).nonzero()[0]) + len(question.prompt.split()) + 1
        assert torch.allclose(model.lm_head(out[b, place]), reference[b], atol=1e-4)


@pytest.mark.parametrize("name", testbed.MODELS)
def test_positions_original_and_compact(name):
    kept = torch.tensor([[0, 3, 25, 26, 47]])
    offsets = torch.arange(4)[None]
    before, after, grid = len(build.PREFIX[name]), len(build.SUFFIX[name]), build.GRID[name]
    original = training.positions(name, 1, kept, offsets, compact=False)
    compact = training.positions(name, 1, kept, offsets, compact=True)
    if name == "llava":
        assert original[0, before : before + 5].tolist() == [before + i for i in kept[0].tolist()]
        assert compact[0].tolist() == list(range(compact.shape[1]))
        assert original[0, -4] == before + grid * grid
    else:
        assert original[1, 0, before : before + 5].tolist() == [before + i // grid for i in kept[0].tolist()]
        assert compact[1, 0, before : before + 5].tolist() == [before + i for i in (0, 0, 1, 1, 2)]
        assert compact[2, 0, before : before + 5].tolist() == [before + i for i in (0, 1, 2, 3, 4)]
        assert compact[0, 0, -4 - after] == before + 5 and original[0, 0, -4 - after] == before + grid


def test_supervision_points_at_what_the_question_is_about():
    for i in range(30):
        shown = scenes.scene("train", i)
        for question in questions(shown, "train", i):
            words, start, rows = encode.supervision(shown, question)
            assert words[start - 1] == ":" and words[-1] == "</s>"
            assert " ".join(words[start:-1]) == question.answer
            for kind, place, target in rows:
                assert 0 <= place < len(words)
                if kind == encode.READ and question.task in ("colour", "binding", "size", "where"):
                    named = {o.category for n, o in enumerate(shown.objects) if target >> (n + 1) & 1}
                    assert named == set(question.info["target"])


def test_training_resumes_exactly(tmp_path):
    from vlmfast.eval.testbed.corpus import write_corpus

    corpus = write_corpus(tmp_path / "corpus", "train", 12, 1)
    stages = [training.Stage("tower", 2, 2, 1e-3, sparse=0.5), training.Stage("language", 2, 2, 1e-3, (0.3, 0.0))]
    whole = training.Run(tmp_path / "whole", "llava")
    whole.train(stages, corpus, verbose=False)
    training.Run(tmp_path / "parts", "llava").train(stages[:1], corpus, verbose=False)
    parts = training.Run(tmp_path / "parts", "llava")
    parts.train(stages, corpus, verbose=False)
    for a, b in zip(whole.model.state_dict().values(), parts.model.state_dict().values()):
        assert torch.equal(a, b)


def test_swapped_ground_leaves_things_alone():
    owner = torch.tensor([[0, 1, 0, 2], [0, 0, 3, 1], [1, 0, 0, 0]])
    visual = torch.arange(12.0).reshape(3, 4, 1)
    swapped = training.swap_ground(visual, owner)
    assert torch.equal(swapped[owner > 0], visual[owner > 0])
    assert swapped[0, 0] == visual[1, 0] and swapped[1, 0] == visual[0, 0]
    assert swapped[2, 3] == visual[2, 3]  # no other scene has ground there


@shipped
def test_clean_loss_sees_what_a_tower_writes_elsewhere(name):
    model = build.new_model(name)
    _, batch = measure.scene_batch(name, "validation", range(3))
    seen = forward.see(model, batch.pixels)
    loss = training.clean_loss(model, seen, batch, np.random.default_rng(0))
    assert 0 < loss < 1 and loss.requires_grad


def test_unknown_model():
    with pytest.raises(ValueError, match="there are llava, qwen2_5_vl"):
        testbed.folder("llama")


@shipped
def test_shipped_models_are_small(name):
    assert (testbed.folder(name) / "model.safetensors").stat().st_size <= 16 * 2**20


@shipped
def test_shipped_models_see(name):
    model, processor = testbed.load(name)
    asked = [(shown, q) for i, shown in enumerate(TEST[:16]) for q in questions(shown, "test", i)]
    asked = [(s, q) for s, q in asked if q.task in ("existence", "colour", "where")][:60]
    text = [processor.apply_chat_template(prompt_messages(q.prompt), add_generation_prompt=True) for _, q in asked]
    inputs = processor(
        images=[Image.fromarray(s.image) for s, _ in asked], text=text, padding=True, return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    said = [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]
    assert np.mean([answer == q.answer for answer, (_, q) in zip(said, asked)]) > 0.8
    assert {q.task for _, q in asked} <= set(TASKS)


def test_a_card_can_be_written(tmp_path):
    tasks = dict.fromkeys(("existence", "existence yes", "colour", "where"), (9, 10))
    layer = {"bos": 0.1, "visual": 0.9}
    results = {
        "parameters": 3e6,
        "scenes": 10,
        "test_scenes": 5,
        "minutes": 1.0,
        "selections": {"all": tasks, "oracle": tasks},
        "captions": measure.chair([(TEST[0], "a red sun , a blue cloud .")]),
        "sinks": {"layers": [layer, layer], "scenes": 5},
    }
    lines = [
        {"stage": stage, "step": step, "seconds": step, "loss": 1.0, "word": 0.5}
        for stage in ("tower", "language")
        for step in (1, 2, 2)
    ]
    (tmp_path / "curves.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curves = card.read_curves(tmp_path / "curves.jsonl")
    assert len(curves) == 4
    card.write_card("llava", results, [{"name": "tower", "steps": 2}], "A note.", tmp_path / "README.md")
    card.plot_curves(curves, "a run", tmp_path / "curves.png")
    text = (tmp_path / "README.md").read_text()
    assert "| colour | 0.900 | 10 | 0.93 |" in text and "A note." in text
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_chair_counts_inventions_and_partners():
    shown = next(s for s in TEST if any(scenes.PARTNERS.get(c, c) not in s.present for c in s.present))
    partner = next(scenes.PARTNERS[c] for c in shown.present if scenes.PARTNERS.get(c, c) not in shown.present)
    found = measure.chair([(shown, f"a red {shown.present[0]} , a red {partner} .")])
    assert found["chair_i"] == 0.5 and found["chair_s"] == 1.0 and found["partners_among_invented"] == 1.0
    assert found["recall"] == 1 / len(shown.present)
