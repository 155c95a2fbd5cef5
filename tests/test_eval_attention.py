"""Where attention goes, measured without maps, against full maps in plain loops."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_oracle import full_maps

import vlmfast
from vlmfast.adapters import ADAPTERS
from vlmfast.adapters.attention.base import AttentionEdit
from vlmfast.eval.attention import CLASSES, ROWS, edits, measure

GAMMA = 6.0
SPEC = f"zerotuning:gamma={GAMMA},layers=1:"


def by_hand(vlm, inputs, edit, new_tokens=3, sinks=()):
    """{rows: {class: [share of every layer]}} of one prompt, and its answer, from full maps."""
    ids = inputs["input_ids"][0]
    config = vlm.model.config
    family = vlmfast.families.family_of(vlm.model)
    visual = [int(token) in {getattr(config, s.token) for s in family.sources.values()} for token in ids]
    first, width = visual.index(True), len(ids)
    found: dict[tuple[str, int], list[list[float]]] = {}
    rows_seen: dict[int, int] = {}

    def note(layer, shown, hidden):
        shown = edit(layer, shown, hidden)
        start = rows_seen.get(layer, 0)
        rows_seen[layer] = start + shown.shape[2]
        for i in range(shown.shape[2]):
            place = start + i
            shares = [0.0, 0.0, 0.0]
            for head in range(shown.shape[1]):
                for j in range(shown.shape[3]):
                    is_sink = j == 0 or j in sinks
                    kind = 0 if is_sink else 1 if j < width and visual[j] else 2
                    shares[kind] += float(shown[0, head, i, j]) / shown.shape[1]
            if place < width and place > first and not visual[place]:
                found.setdefault(("prompt", layer), []).append(shares)
            if place >= width - 1:
                found.setdefault(("answer", layer), []).append(shares)
        return shown

    with full_maps(vlm.model, note), torch.no_grad():
        answer = vlm.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    depth = config.get_text_config().num_hidden_layers
    table = {
        rows: {
            name: [torch.tensor(found[rows, n]).mean(0)[c].item() for n in range(depth)]
            for c, name in enumerate(CLASSES)
        }
        for rows in ROWS
    }
    return table, answer


def unchanged(layer, shown, hidden):
    return shown


def scaled(layer, shown, hidden):
    """The first token's probability times GAMMA, from layer 1 on, renormalised."""
    if layer < 1:
        return shown
    shown = shown.clone()
    shown[..., 0] *= GAMMA
    return shown / shown.sum(-1, keepdim=True)


def same(found, expected):
    for rows in ROWS:
        for name in CLASSES:
            assert found[rows][name] == pytest.approx(expected[rows][name], abs=2e-4), (rows, name)


@pytest.fixture(params=["llava", "qwen2_5_vl", "internvl"])
def few(request):
    from conftest import lend

    yield from lend(request.param)


def test_shares_equal_full_maps(few):
    inputs = few.prompts([[4, "a", 5]])
    before, _ = by_hand(few, inputs, unchanged)
    after, _ = by_hand(few, inputs, scaled)
    found = measure(few.model, SPEC, [inputs], new_tokens=3)
    same(found["before"], before)
    same(found["after"], after)
    assert found["edited"] == list(range(1, few.model.config.get_text_config().num_hidden_layers))
    for rows in ROWS:
        assert found["total"][rows] == pytest.approx([1.0] * len(found["total"][rows]), abs=1e-4)
        assert found["after"][rows]["sinks"][1] > found["before"][rows]["sinks"][1]


def test_every_prompt_counts_the_same(vlm):
    short, long = vlm.prompts([[3, "a", 2]]), vlm.prompts([[3, "b", 14]], seed=1)
    found = measure(vlm.model, SPEC, [short, long], new_tokens=2)
    alone = [measure(vlm.model, SPEC, [one], new_tokens=2) for one in (short, long)]
    for when in ("before", "after"):
        for rows in ROWS:
            for name in CLASSES:
                means = [(a + b) / 2 for a, b in zip(*(one[when][rows][name] for one in alone))]
                assert found[when][rows][name] == pytest.approx(means, abs=2e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Louder(AttentionEdit):
    """Scales the output of every head: the weights sum to 3, and go where they went. Remembers sinks in passing."""

    name = "louder"
    sinks: tuple[int, ...] = ()
    answers: Any = dataclasses.field(default=None, compare=False)

    @property
    def neutral(self):
        return False

    def edit(self, call):
        if call.prompt:
            columns = torch.arange(call.query.shape[2])
            call.remember("sinks", torch.isin(columns, torch.tensor(self.sinks))[None])
        call.memory["calls"] = call.memory.get("calls", 0) + 1
        if self.answers is not None:
            self.answers.append((call.layer, call.memory["calls"], call.value.clone()))
        return 3 * call.plain()


def registered(monkeypatch, **settings):
    monkeypatch.setitem(
        ADAPTERS,
        "louder",
        dataclasses.make_dataclass(
            "Made",
            [],
            bases=(Louder,),
            frozen=True,
            kw_only=True,
            namespace={"__post_init__": lambda self: [object.__setattr__(self, k, v) for k, v in settings.items()]},
        ),
    )
    return "louder"


def test_scaled_heads_look_where_they_looked(vlm, monkeypatch):
    inputs = vlm.prompts([[4, "a", 5]])
    spec = registered(monkeypatch)
    found = measure(vlm.model, spec, [inputs], new_tokens=1)
    for rows in ROWS:
        assert found["total"][rows] == pytest.approx([3.0] * len(found["total"][rows]), abs=1e-4)
        for name in CLASSES:  # the first layer has the same inputs
            assert found["after"][rows][name][0] == pytest.approx(found["before"][rows][name][0], abs=1e-5)
            assert found["after"][rows][name][1] != pytest.approx(found["before"][rows][name][1], abs=1e-5)


def test_sinks_that_the_method_remembers(vlm, monkeypatch):
    inputs = vlm.prompts([[4, "a", 5]])
    sinks = (2, 6, 7)
    found = measure(vlm.model, registered(monkeypatch, sinks=sinks), [inputs], new_tokens=3)
    before, _ = by_hand(vlm, inputs, unchanged, sinks=sinks)
    same(found["before"], before)
    after, _ = by_hand(vlm, inputs, lambda layer, shown, hidden: 3 * shown, sinks=sinks)
    third = {rows: {name: [x / 3 for x in table[name]] for name in CLASSES} for rows, table in after.items()}
    same(found["after"], third)
    # Behind tokens that are dropped, columns no longer say which token was meant.
    spec = "random:keep=0.5+" + registered(monkeypatch, sinks=sinks)
    pruned = measure(vlm.model, spec, [inputs], new_tokens=3)
    plain = measure(vlm.model, "random:keep=0.5+" + registered(monkeypatch), [inputs], new_tokens=3)
    assert pruned == plain and pruned["before"] != pruned["after"]


def test_the_method_does_not_notice_the_probe(vlm, monkeypatch):
    """What it remembers, and what it is asked beside the probe's questions, is as without one."""
    inputs = vlm.prompts([[4, "a", 5]])
    with_probe: list[Any] = []
    measure(vlm.model, registered(monkeypatch, answers=with_probe), [inputs], new_tokens=3)
    without: list[Any] = []
    with vlmfast.patch(vlm.model, registered(monkeypatch, answers=without)), torch.no_grad():
        vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    own = [one for one in with_probe if any(torch.equal(one[2], value) for _, _, value in without)]
    assert [one[:2] for one in own] == [one[:2] for one in without] and len(with_probe) == 2 * len(without)


def test_sinks_of_some_heads(vlm, monkeypatch):
    """A token is a sink that any head takes for one."""
    inputs = vlm.prompts([[4, "a", 5]])

    def edit(self, call):
        if call.prompt:
            heads = torch.zeros(1, 2, call.query.shape[2], dtype=torch.bool)
            heads[0, 0, 2] = heads[0, 1, 6] = True
            call.remember("sinks", heads)
        return call.plain()

    spec = registered(monkeypatch)
    monkeypatch.setattr(Louder, "edit", edit)
    expected, _ = by_hand(vlm, inputs, unchanged, sinks=(2, 6))
    found = measure(vlm.model, spec, [inputs], new_tokens=3)
    same(found["before"], expected)
    same(found["after"], expected)


def test_a_method_with_an_image_free_stream(vlm):
    """VHR takes its stream through each layer once; the heads it scales look where they looked."""
    inputs = vlm.prompts([[4, "a", 5]])
    found = measure(vlm.model, "vhr:layers=all,alpha=3.0", [inputs], new_tokens=3)
    for rows in ROWS:
        assert all(1 < total < 3 for total in found["total"][rows])
        for name in CLASSES:
            if rows == "prompt":  # what is generated differs
                assert found["after"][rows][name][0] == pytest.approx(found["before"][rows][name][0], abs=1e-5)


def last_row_boosted(vlm, inputs, alpha):
    """Scores of visual tokens raised in rows that decide on a token."""
    ids, config = inputs["input_ids"][0], vlm.model.config
    visual = torch.isin(ids, torch.tensor([config.image_token_id]))

    def edit(layer, scores, hidden):
        scores = scores.clone()
        chosen = scores[:, :, -1, : len(ids)]
        chosen[..., visual] += alpha * chosen[..., visual].abs()
        return scores

    return edit


def test_scores_raised_in_the_last_row(vlm):
    """PAI: only rows that answer change in the first layer; the image-free branch is not looked at."""
    inputs = vlm.prompts([[4, "a", 5]])
    found = measure(vlm.model, "pai:gamma=1.0,alpha=2.0,layers=all", [inputs], new_tokens=3)
    raised: dict[str, list[float]] = {}
    boost = last_row_boosted(vlm, inputs, 2.0)
    width = inputs["input_ids"].shape[1]
    visual = torch.isin(inputs["input_ids"][0], torch.tensor([vlm.model.config.image_token_id]))

    def note(layer, scores, hidden):
        scores = boost(layer, scores, hidden)
        shown = scores.softmax(-1)[0, :, -1, :width]
        raised.setdefault(layer, []).append(shown[:, visual].sum(-1).mean().item())
        return scores

    with full_maps(vlm.model, note, before_softmax=True), torch.no_grad():
        vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert found["after"]["answer"]["image"] == pytest.approx([sum(x) / len(x) for x in raised.values()], abs=2e-4)
    contrast = measure(vlm.model, "pai:gamma=1.5,alpha=2.0,layers=all", [inputs], new_tokens=1)
    without = measure(vlm.model, "pai:gamma=1.0,alpha=2.0,layers=all", [inputs], new_tokens=1)
    assert contrast == without


def test_a_method_that_asks_the_tower(vlm):
    """PAINT knows its tokens by the tower's attention, with a probe before it too."""
    inputs = vlm.prompts([[4, "a", 5]])
    spec = "paint:gamma=1.0,alpha=3.0,beta=3.0,layers=all,fallback=received"
    found = measure(vlm.model, spec, [inputs], new_tokens=1)
    for before, after in zip(found["before"]["answer"]["image"][:1], found["after"]["answer"]["image"]):
        assert after > before + 1e-3
    assert found["after"]["prompt"]["image"][0] > found["before"]["prompt"]["image"][0]  # the last row is of both


def test_the_model_is_left_as_it_was(vlm):
    inputs = vlm.prompts([[4, "a", 5]])
    plain = vlm.model(**inputs).logits
    measure(vlm.model, SPEC, [inputs], new_tokens=2)
    assert torch.equal(vlm.model(**inputs).logits, plain)
    assert "vlmfast_handle" not in vlm.model.__dict__


def test_layers_that_are_more_than_a_softmax_are_left_out(fresh):
    vlm = fresh("llava")
    inputs = vlm.prompts([[4, "a", 5]])
    whole = measure(vlm.model, "zerotuning:gamma=6.0,layers=1:", [inputs], new_tokens=1)
    vlm.model.model.language_model.layers[0].self_attn.attn_logit_softcapping = 50.0
    found = measure(vlm.model, "zerotuning:gamma=6.0,layers=1:", [inputs], new_tokens=1)
    for rows in ROWS:
        for name in CLASSES:
            assert found["after"][rows][name] == [None, *whole["after"][rows][name][1:]]


def test_bad_prompts(vlm):
    with pytest.raises(ValueError, match="a batch of 2"):
        measure(vlm.model, SPEC, [vlm.prompts([[3, "a", 2], [3, "a", 2]])])
    with pytest.raises(ValueError, match="no picture"):
        measure(vlm.model, SPEC, [vlm.prompts([[7]])])
    with pytest.raises(ValueError, match="no prompts"):
        measure(vlm.model, SPEC, [])


def test_which_specs_edit_attention():
    assert edits("zerotuning:gamma=3.0") and edits("hiprune:keep=0.5+zerotuning")
    assert not edits("none") and not edits("hiprune:keep=0.5")
