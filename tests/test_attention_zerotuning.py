"""ZeroTuning: chosen heads by layer, rows that hold little but the initial token, tokens by place, cost.

That it equals full maps on every family is in tests/test_edits.py.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from attention_oracle import full_maps
from test_attention_act import ROWS, call_of

import vlmfast
from vlmfast.adapters.attention.zerotuning import ZeroTuning
from vlmfast.decoders import decoder


@pytest.mark.parametrize("gamma", [0.0, 0.001, 30.0])
@pytest.mark.parametrize("parity", ["repaired", "official"])
def test_rows_that_hold_little_but_the_initial_token(gamma, parity):
    """What is left of them is not found by subtraction: 1e-5 of a row is as exact as any."""
    scores = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    scores[..., 0] += 14.0
    call = call_of(scores)
    shown = call.query.double().softmax(-1)
    assert shown[0, 0, 5, 1:].sum() < 1e-4
    expected = shown.clone()
    expected[..., 0] *= gamma
    expected = expected / expected.sum(-1, keepdim=True)
    if gamma == 0 and parity == "repaired":
        expected[:, :, 0] = shown[:, :, 0]
    edited = ZeroTuning(gamma=gamma, parity=parity).edit(call)
    torch.testing.assert_close(edited, expected.float(), rtol=2e-5, atol=1e-7, equal_nan=True)
    assert edited.isnan().any() == (gamma == 0 and parity == "official")


def test_heads_of_a_file(vlm, tmp_path):
    """Each layer its own; those that `layers` leaves out are not edited."""
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"0": [1], "1": [0, 3], "2": [2]}))
    method = ZeroTuning(gamma=8.0, heads=str(path), layers="1:")
    inputs = vlm.prompts(ROWS)
    first = inputs["attention_mask"].argmax(1)
    chosen = {1: [0, 3], 2: [2]}

    def edit(layer, shown, hidden):
        shown = shown.clone()
        for row in range(len(shown)):
            for head in chosen.get(layer, ()):
                shown[row, head, :, first[row]] *= 8.0
        return shown / shown.sum(-1, keepdim=True).clamp(min=1e-9)

    with torch.no_grad():
        with full_maps(vlm.model, edit):
            expected = vlm.model(**inputs).logits[:, -1]
            tokens = vlm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with vlmfast.patch(vlm.model, method):
            torch.testing.assert_close(vlm.model(**inputs).logits[:, -1], expected, rtol=1e-3, atol=2e-4)
            assert torch.equal(vlm.model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    path.write_text(json.dumps({"1": [2]}))
    assert method.heads_of(1) == (0, 3), "as the file was"
    again = dataclasses.replace(method)
    assert again.heads_of(1) == (2,) and again == method, "as the file is"
    for content, words in (("{}", "names no head"), ('{"1": [9]}', "heads 0 to 3"), ('{"0": [1]}', "names no head")):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            vlmfast.patch(vlm.model, ZeroTuning(heads=str(path), layers="1:"))
    path.write_text('{"1": [-1]}')
    with pytest.raises(ValueError, match="counted from 0"):
        ZeroTuning(heads=str(path))


def test_tokens_by_place(vlm):
    """start to end - 1 of each prompt, counted behind its padding."""
    inputs = vlm.prompts(ROWS)
    first = inputs["attention_mask"].argmax(1)

    def edit(layer, shown, hidden):
        shown = shown.clone()
        for row in range(len(shown)):
            for place in (1, 2):
                shown[row, :, :, first[row] + place] *= 5.0
        return shown / shown.sum(-1, keepdim=True).clamp(min=1e-9)

    with torch.no_grad():
        with full_maps(vlm.model, edit):
            expected = vlm.model(**inputs).logits[:, -1]
        with vlmfast.patch(vlm.model, ZeroTuning(gamma=5.0, start=1, end=3)):
            torch.testing.assert_close(vlm.model(**inputs).logits[:, -1], expected, rtol=1e-3, atol=2e-4)
    for places in ((1.0, 2), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="tokens start to end - 1"):
            ZeroTuning(start=places[0], end=places[1])


def test_the_cost_follows_heads_and_tokens(vlm):
    """Scores and values of the scaled tokens in every row, again, of the chosen heads."""
    layers = decoder(vlm.model.config)
    width = layers.layers[0].mixer.query // layers.layers[0].mixer.heads
    picture = dataclasses.make_dataclass("Picture", ["span"])(11)
    sizes = dataclasses.make_dataclass("Sizes", ["decoder"])(layers)
    one = 2 * 2 * width * 18
    assert ZeroTuning(layers=0, heads="0/2/3").selection_flops(picture, 7, sizes) == 3 * one
    assert ZeroTuning(layers=0, heads=1, start=2, end=7).selection_flops(picture, 7, sizes) == 5 * one
    assert ZeroTuning().selection_flops(picture, 7, sizes) == 4 * len(layers.layers) * one
    assert ZeroTuning(gamma=1).selection_flops(picture, 7, sizes) == 0
