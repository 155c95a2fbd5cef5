"""rank_layers: layer by layer and one by one, against patches made by hand; the file; the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import call, refused
from test_promises import snapshot

import vlmfast
from vlmfast.adapters import EEMLLM
from vlmfast.composite import UPDATES
from vlmfast.eval import ranking as command
from vlmfast.eval.heads import held_out
from vlmfast.eval.models import load_model
from vlmfast.eval.prompts import Prompts
from vlmfast.eval.tasks import TASKS
from vlmfast.eval.tasks.base import image
from vlmfast.eval.testbed.build import new_model, new_processor
from vlmfast.ranking import Ranking, deciding, divergence, rank_layers, trials

ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]


def by_hand(model, inputs, layers, places, update="self"):
    """KL of the next-token distributions at (row, column) places, mean, in plain loops over the vocabulary."""
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        plain = model(**inputs).logits
        with vlmfast.patch(model, EEMLLM(layers="/".join(map(str, layers)), visual_update=update)):
            patched = model(**inputs).logits
    total = 0.0
    for row, column in places:
        p, q = (one[row, column].double().softmax(-1).tolist() for one in (plain, patched))
        total += sum(a * math.log(a / b) for a, b in zip(p, q))
    return total / len(places)


# --- measuring ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_layer_alone(vlm, side):
    inputs = vlm.prompts(ROWS, side=side)
    ends = [int(mask.nonzero().max()) for mask in inputs["attention_mask"]]
    for update in UPDATES if side == "left" else ("self",):
        found = rank_layers(vlm.model, inputs, visual_update=update)
        expected = {layer: by_hand(vlm.model, inputs, [layer], list(enumerate(ends)), update) for layer in range(3)}
        for layer in range(3):
            assert found.divergence[layer] == pytest.approx(expected[layer], rel=1e-3, abs=1e-6)
        assert found.order == tuple(sorted(expected, key=lambda layer: (found.divergence[layer], -layer)))
        assert found.order[0] == 2 and expected[2] < 1e-9 < min(expected[0], expected[1])
        assert (found.depth, found.prompts, found.positions, found.greedy) == (3, 3, 3, False)
        assert found.visual_update == update


def test_one_by_one(fresh):
    """Each time the layer with which all so far change least."""
    one = fresh("qwen3_vl")
    inputs, calls = one.prompts(ROWS[:2]), []
    last = [(row, inputs["input_ids"].shape[1] - 1) for row in range(2)]
    chosen, left, expected = [], [0, 1, 2, 3], {}
    while left:
        tried = {layer: by_hand(one.model, inputs, [*chosen, layer], last) for layer in left}
        best = min(left, key=lambda layer: (round(tried[layer], 9), -layer))
        chosen.append(best)
        left.remove(best)
        expected[best] = tried[best]
    found = rank_layers(one.model, inputs, greedy=True, progress=lambda: calls.append(1))
    assert list(found.order) == chosen and found.greedy
    for layer, value in expected.items():
        assert found.divergence[layer] == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert len(calls) == trials(4, True) == 10 and trials(4) == 4
    part = rank_layers(one.model, inputs, greedy=True, count=2)
    assert list(part.order[:2]) == chosen[:2]
    for layer in part.order[2:]:  # as the last round had them
        value = by_hand(one.model, inputs, [chosen[0], layer], last)
        assert part.divergence[layer] == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert trials(4, True, 2) == 7
    assert part.divergence[part.order[2]] <= part.divergence[part.order[3]]


def test_labels_say_where_answers_are(vlm):
    """All positions that predict a label; of a prompt without one the last."""
    inputs = vlm.prompts([[3, "a", 6], [2, "b", 3]], side="right")
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    end = int(inputs["attention_mask"][0].sum())
    labels[0, end - 3 : end - 1] = ids[0, end - 3 : end - 1]
    last = int(inputs["attention_mask"][1].sum()) - 1
    places = [(0, end - 4), (0, end - 3), (1, last)]
    assert [tuple(place) for place in deciding({**inputs, "labels": labels}).nonzero().tolist()] == places
    found = rank_layers(vlm.model, {**inputs, "labels": labels})
    assert found.positions == 3
    assert found.divergence[0] == pytest.approx(by_hand(vlm.model, inputs, [0], places), rel=1e-3, abs=1e-6)


def test_batches_are_one_measurement_and_pictures_are_encoded_once(vlm, monkeypatch):
    rows = [[3, "a", 2], [2, "b", 1, "c", 6]]
    parts = [vlm.prompts(rows, only=row) for row in range(2)]
    encoded = []
    tower = vlm.model.model.vision_tower if vlm.name == "llava" else vlm.model.model.visual
    hook = tower.register_forward_hook(lambda *args: encoded.append(1))
    together, apart = rank_layers(vlm.model, vlm.prompts(rows)), rank_layers(vlm.model, iter(parts))
    hook.remove()
    assert len(encoded) == 1 + 2
    assert apart.order == together.order and apart.prompts == 2
    for layer in range(3):
        assert apart.divergence[layer] == pytest.approx(together.divergence[layer], rel=1e-3, abs=1e-6)


def test_divergence():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert divergence(p, q) == pytest.approx(0.5 * math.log(2))
    assert divergence(q, q) == 0
    for wrong in (q, torch.full((1, 3), float("nan"))):
        with pytest.raises(ValueError, match="no numbers in this dtype"):
            divergence(wrong, p)


def test_leaves_the_model_as_it_was(any_vlm):
    inputs = any_vlm.prompts(ROWS)
    with torch.no_grad():
        plain, before = any_vlm.model(**inputs).logits, snapshot(any_vlm.model)
    if any_vlm.name in ("gemma3", "paligemma"):
        with pytest.raises(NotImplementedError, match="rank_layers does not work on .*both directions"):
            rank_layers(any_vlm.model, inputs)
    else:
        found = rank_layers(any_vlm.model, inputs)
        layers = any_vlm.model.model.get_decoder().layers
        assert sorted(found.order) == [n for n, layer in enumerate(layers) if hasattr(layer, "self_attn")]
        assert all(math.isfinite(value) for value in found.divergence.values())
    assert snapshot(any_vlm.model) == before
    with torch.no_grad():
        assert torch.equal(any_vlm.model(**inputs).logits, plain)


def test_wrong_arguments(fresh):
    vlm = fresh("llava")
    inputs = vlm.prompts(ROWS)
    before = snapshot(vlm.model)
    for settings, words in (
        ({"visual_update": "all"}, "choose 'self', 'ffn', 'none'"),
        ({"layers": "x"}, "numbers and ranges"),
        ({"layers": 7}, "layers 0 to 2"),
        ({"layers": "3:"}, "none of this decoder's 3"),
        ({"count": 2}, "greedy=True"),
        ({"greedy": True, "count": 0}, "1 or more"),
        ({"inputs": {"pixel_values": inputs["pixel_values"]}}, "with input_ids"),
        ({"inputs": [inputs["input_ids"]]}, "with input_ids"),
        ({"inputs": vlm.prompts([[4]])}, "prompts with pictures"),
        ({"inputs": []}, "prompts with pictures"),
    ):
        with pytest.raises(ValueError, match=words):
            rank_layers(vlm.model, **{"inputs": inputs, **settings})
    with vlmfast.patch(vlm.model, "random"), pytest.raises(RuntimeError, match="already patched"):
        rank_layers(vlm.model, inputs)
    with pytest.raises(TypeError, match="cannot generate"):
        rank_layers(vlm.model.model, inputs)
    assert snapshot(vlm.model) == before
    training = fresh(vlm.name).model.train()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        rank_layers(training, inputs)


# --- the ranking -------------------------------------------------------------------------------------------------

RANKING = Ranking((3, 0, 2, 1), {0: 0.1, 1: 0.5, 2: 0.25, 3: 0.0}, 5, "ffn", True, 7, 9, "tiny")


def test_the_best_layers():
    assert RANKING.best(3) == (0, 2, 3) and RANKING.best(0) == () and RANKING.best(4) == (0, 1, 2, 3)
    assert RANKING.best(0.5) == (0, 3) and RANKING.best(1.0) == RANKING.best(4)
    assert RANKING.setting(3) == "0/2/3" and RANKING.setting(0) == "none"
    assert EEMLLM(layers=RANKING.setting(0)).neutral
    for wrong in (5, -1, 1.5, 0.0, True, "2"):
        with pytest.raises(ValueError, match="of 4 ranked layers"):
            RANKING.best(wrong)
    assert "    2      0  1.000e-01" in str(RANKING).splitlines()
    assert "visual_update=ffn" in str(RANKING) and "7 prompts, 9 positions" in str(RANKING)


def test_the_file(tmp_path):
    path = tmp_path / "ranking.json"
    RANKING.save(path)
    assert Ranking.load(path) == RANKING
    whole = json.loads(path.read_text())
    for changes in (
        {"format": "1"},
        {"order": [0, 0]},
        {"order": []},
        {"order": [0, 4]},
        {"order": "x"},
        {"depth": 3},
        {"visual_update": "x"},
    ):
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(ValueError, match="no ranking of layers .*vlmfast rank-layers"):
            Ranking.load(path)
    for text in ("", "[1]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="no ranking of layers"):
            Ranking.load(path)


def test_from_the_front_door():
    assert vlmfast.rank_layers is rank_layers and vlmfast.Ranking is Ranking


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an untrained model of the testbed's shape."""
    path = tmp_path_factory.mktemp("models") / "llava"
    torch.manual_seed(0)
    new_model("llava").save_pretrained(path)
    new_processor("llava").save_pretrained(path)
    return path


def test_on_validation_scenes(folder, tmp_path, monkeypatch):
    """Question by question, as the command asks them in batches; the file is what the method takes."""
    out = tmp_path / "ranking.json"
    monkeypatch.setattr(command, "cores", lambda: 1)
    options = ["rank-layers", "--model", folder, "--task", "word", "--limit", 2, "--layers", "0/1", "--batch", 1]
    result = call(*options, "--visual-update", "ffn", "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    found = Ranking.load(out)
    assert str(found) in result.stdout and f"eemllm:layers={out},top=1,visual_update=ffn" in result.stdout
    network, processor = load_model(str(folder))
    prompts, docs = Prompts(processor, network.device, network.dtype), held_out("word", 2, 0)
    totals = {0: 0.0, 1: 0.0}
    for doc in docs:
        inputs = prompts.full(TASKS["word"].prompt(doc), image(doc))
        for layer in totals:
            totals[layer] += by_hand(network, inputs, [layer], [(0, -1)], "ffn") / len(docs)
    assert found.prompts == len(docs) and sorted(found.order) == [0, 1]
    for layer, value in totals.items():
        assert found.divergence[layer] == pytest.approx(value, rel=1e-2, abs=1e-7)
    method = EEMLLM(layers=str(out), top=1, visual_update="ffn")
    assert method.where(range(found.depth), found.depth) == (found.order[0],)


def test_on_pictures_of_ones_own(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "cores", lambda: 1)
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    found = command.run(
        str(folder), tmp_path / "own.json", images=paths, prompt="what do you see ?", greedy=True, count=1,
        layers="-1:", progress=False,
    )  # fmt: skip
    assert found == Ranking.load(tmp_path / "own.json")
    assert found.prompts == 2 and found.greedy and len(found.order) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--visual-update", "own"], "choose 'self', 'ffn', 'none'"),
        (["--out", "ranking.txt"], "NAME.json"),
        (["--out", "nowhere/ranking.json"], "nowhere"),
        (["--image", "nowhere.png", "--prompt", "x"], "nowhere.png"),
        (["--prompt", "x"], "--image and --prompt go together"),
        (["--image", "x.png", "--task", "word"], "--image or --task"),
        (["--count", "2"], "--greedy"),
        (["--task", "words"], "did you mean word"),
        (["--layers", "99"], "layers 0 to"),
        (["--dtype", "float8"], "unknown dtype"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_wrong_commands(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    refused(call("rank-layers", "--model", "testbed:llava", "--device", "cpu", *changes), words)
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_help():
    result = call("rank-layers", "--help")
    assert result.exit_code == 0 and "vlmfast rank-layers --model testbed:llava" in result.stdout
