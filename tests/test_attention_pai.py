"""PAI: scores of visual tokens where a token is decided, on full maps; the contrast is in tests/test_branches.py."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import full_maps
from test_promises import ROWS, snapshot
from tiny import IMAGE, VIDEO, Vlm
from tiny_others import TINY, build_gemma3

import vlmfast
from vlmfast.adapters.attention.pai import PAI, boosted
from vlmfast.decoders import decoder
from vlmfast.edits import Call
from vlmfast.solving import share_of
from vlmfast.towers import Picture

ALPHA = 3.0


def boosted_maps(inputs, alpha, layers):
    """The oracle: scores one by one, in the last row of a call (the only one while decoding)."""
    ids = inputs["input_ids"].tolist()
    total = {}

    def edit(layer, scores, hidden):
        n_query, n_key = scores.shape[2:]
        total[layer] = n_query if n_query > 1 else total[layer] + 1
        forgotten = total[layer] - n_key  # by a sliding window
        if layer not in layers:
            return scores
        scores = scores.detach().clone()
        for row in range(len(scores)):
            for key in range(n_key):
                column = key + forgotten
                if column >= len(ids[row]) or ids[row][column] not in (IMAGE, VIDEO):
                    continue
                for head in range(scores.shape[1]):
                    s = float(scores[row, head, -1, key])
                    if s > -torch.inf:  # out of the window
                        scores[row, head, -1, key] = s + alpha * abs(s)
        return scores

    return edit


def compare(model, inputs, method, layers):
    """Prefill and decoding against full maps."""
    how = {"max_new_tokens": 4, "do_sample": False}
    plain = model(**inputs).logits
    with full_maps(model, boosted_maps(inputs, method.alpha, layers), before_softmax=True):
        expected = model(**inputs).logits
        tokens = model.generate(**inputs, **how)
    with vlmfast.patch(model, method):
        found = model(**inputs).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=2e-4)
        assert torch.equal(model.generate(**inputs, **how), tokens)
    return plain, found


def test_equals_full_maps(any_vlm):
    model, inputs = any_vlm.model, any_vlm.prompts(ROWS)
    types = getattr(model.config.get_text_config(), "layer_types", None)
    depth = model.config.get_text_config().num_hidden_layers
    layers = [n for n in range(1, depth) if types is None or types[n] != "linear_attention"]
    plain, found = compare(model, inputs, PAI(alpha=ALPHA, gamma=1, layers="1:"), layers)
    assert (found[:2, -1] - plain[:2, -1]).abs().amax(-1).min() > 1e-2
    real = inputs["attention_mask"].bool()
    if any_vlm.name != "paligemma":  # whose prefix sees its last token
        assert torch.equal(found[:, :-1][real[:, :-1]], plain[:, :-1][real[:, :-1]]), "rows that decide on nothing"
    assert torch.equal(found[2, -1], plain[2, -1]), "a prompt without a picture"


def test_pictures_behind_a_window():
    """Visual tokens that a sliding layer has left behind are hidden, and stay so."""
    torch.manual_seed(0)
    model = build_gemma3(window=8).eval()
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.6 / parameter.shape[-1] ** 0.5)
    inputs = Vlm("gemma3", model, TINY["gemma3"]).prompts([[3, "a", 5], [3, "b", 1], [6]])
    plain, found = compare(model, inputs, PAI(alpha=ALPHA, gamma=1, layers="all"), range(3))
    assert found[:, -1].isfinite().all() and not torch.equal(found[:2, -1], plain[:2, -1])


def test_hidden_scores_stay_hidden():
    scores = torch.tensor([[[[1.0, -2.0, -torch.inf, 0.5]]]], requires_grad=True)
    rise = torch.tensor([2.0, 2.0, 2.0, 0.0])
    found = boosted(scores, rise)
    assert found.flatten().tolist() == [3.0, 2.0, -torch.inf, 0.5]
    found.softmax(-1)[..., 0].sum().backward()
    assert scores.grad.isfinite().all()


def test_the_first_token_of_the_official_code_is_not_boosted(vlm):
    """With a contrast, and while the prompt is read alone."""
    inputs = vlm.prompts([[3, "a", 4]])
    plain = vlm.model(**inputs).logits
    width, how = inputs["input_ids"].shape[1], {"max_new_tokens": 6, "do_sample": False}
    found = {}
    for parity in ("official", "repaired"):
        for gamma in (1, 1.1):
            method = PAI(alpha=ALPHA, gamma=gamma, layers="all", parity=parity)
            with vlmfast.patch(vlm.model, method):
                logits = vlm.model(**inputs).logits
                found[parity, gamma] = vlm.model.generate(**inputs, **how)[0, width:].tolist()
            assert torch.equal(logits, plain) == (parity == "official" and gamma != 1)
    with vlmfast.patch(vlm.model, PAI(alpha=0, gamma=1.1)):
        unboosted = vlm.model.generate(**inputs, **how)[0, width:].tolist()
    assert found["official", 1] == found["repaired", 1]
    assert found["official", 1.1][0] == unboosted[0]
    assert unboosted != found["official", 1.1] != found["repaired", 1.1]


def test_the_branch_is_not_boosted(vlm, monkeypatch):
    """It has nothing to boost: scores are changed only in calls whose prompts have pictures."""
    calls: list[Call] = []
    edit = PAI.edit
    monkeypatch.setattr(PAI, "edit", lambda self, call: calls.append(call) or edit(self, call))
    rescored: list[Call] = []
    rescore = Call.rescore
    monkeypatch.setattr(Call, "rescore", lambda call, *args: rescored.append(call) or rescore(call, *args))
    with vlmfast.patch(vlm.model, PAI(alpha=ALPHA, gamma=2)):
        vlm.model.generate(**vlm.prompts([[3, "a", 4]]), max_new_tokens=3, do_sample=False)
    assert len(calls) == 6, "three forwards of the prompt and three of the branch, one layer"
    assert [bool(call.visual.any()) for call in calls] == [True, False] * 3
    assert [call.prompt for call in calls] == [True, True, False, False, False, False]
    assert rescored == calls[::2]


def test_a_contrast_alone_edits_no_attention(vlm):
    """Layers run as they are, and another method may edit them."""
    installed = []
    for spec in ("m3id", "pai:alpha=0"):
        with vlmfast.patch(vlm.model, spec) as handle:
            state = snapshot(vlm.model)
            installed.append([state[:2], *(one[:-1] for one in state[2:])])  # without the configs, copied each time
    assert installed[0] == installed[1] and "edits the attention" not in str(handle.report())
    inputs = vlm.prompts([[3, "a", 4]])
    with vlmfast.patch(vlm.model, "zerotuning:gamma=4"):
        expected = vlm.model(**inputs).logits
    with vlmfast.patch(vlm.model, "zerotuning:gamma=4+pai:alpha=0"):
        assert torch.equal(vlm.model(**inputs).logits, expected)


def test_settings():
    for settings in ({"alpha": -1}, {"alpha": "x"}, {"alpha": True}, {"alpha": float("nan")}, {"gamma": -0.5}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            PAI(**settings)
    for settings in ({"plausibility": 0}, {"parity": "yes"}, {"layers": "x"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            PAI(**settings)
    assert PAI(alpha=0, gamma=1).neutral and not PAI(alpha=0).neutral and not PAI(gamma=1).neutral


def test_cost(vlm):
    """The last row once more in every edited layer, and a prompt of text."""
    config = vlm.model.config
    layers, picture = decoder(config).layers, Picture(patches=(1, 8, 12), tokens=24, span=24)
    free = sum(layer.flops(10, 10) for layer in layers) + 2 * decoder(config).width * decoder(config).vocabulary
    heads = 2 * layers[2].mixer.query * 34  # q k^T of one row
    extra = {}
    for name, method in {"none": (), "boost": (PAI(gamma=1),), "both": (PAI(),), "branch": (PAI(alpha=0),)}.items():
        extra[name] = share_of(config, method, picture, 10)
    total = extra["none"]
    assert total == 1
    assert extra["branch"] > 1 and extra["both"] - extra["branch"] == pytest.approx(extra["boost"] - 1)
    assert (extra["boost"] - 1) / (extra["branch"] - 1) == pytest.approx(2 * heads / free)
