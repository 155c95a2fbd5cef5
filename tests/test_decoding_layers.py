"""DoLa, DeCo, ONLY and VISTA against plain loops, and what is special about each."""

from __future__ import annotations

import dataclasses
import math

import decoding_oracle as oracle
import pytest
import torch
from tiny import make
from tiny_others import TINY as OTHERS
from tiny_others import build_paligemma

import vlmfast
from vlmfast.adapters.decoding.deco import DeCo, candidates, correct
from vlmfast.adapters.decoding.dola import DoLa, contrast, divergences
from vlmfast.adapters.decoding.only import ONLY, textual
from vlmfast.adapters.decoding.vista import VISTA, steered

ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]
METHODS = {
    "dola": DoLa(layers="0/1/2"),
    "deco": DeCo(layers="0/1/2", alpha=3.0, top_p=0.95, top_k=6),
    "only": ONLY(alpha_pos=0.5, gamma=1.0, beta=0.02),
    "vista": VISTA(lam=0.6, gamma=0.4),
}


def first_layer(vlm) -> int:
    return {"qwen3_5": 3, "qwen3_5_moe": 3, "gemma3": 1}.get(vlm.name, 0)


def oracle_of(name, vlm, prompt):
    """The method of `METHODS` as plain loops."""
    if name == "dola":
        return oracle.dola([0, 1, 2], 0.1)
    if name == "deco":
        return oracle.deco([0, 1, 2], 3.0, 0.95, 6)
    if name == "only":
        return oracle.only(first_layer(vlm), 0.5, 1.0, 0.02, 1.0)
    depth = vlm.model.config.get_text_config().num_hidden_layers
    return oracle.vista(vlm, prompt, 0.6, 0.4, [depth - 2])


def generated(model, inputs, steps, **how):
    """Tokens [B, steps] and the method's scores of every step [B, V]."""
    torch.manual_seed(5)
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        output_logits=True,
        return_dict_in_generate=True,
        **({"do_sample": False} | how),
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], out.logits


def same(ours, theirs):
    """Scores [V] that agree, also in what is out."""
    kept = theirs.isfinite()
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-3, atol=2e-3)
    if not bool(kept.all()):
        assert ours[~kept].max() < ours[kept].min() - 1000


@pytest.mark.parametrize("name", METHODS)
def test_greedy_search_equals_plain_loops(vlm, name):
    """A batch with padding and a cache against every prompt alone without."""
    inputs = vlm.prompts(ROWS)
    with vlmfast.patch(vlm.model, METHODS[name]):
        tokens, scores = generated(vlm.model, inputs, 4)
    for row in range(3):
        alone = vlm.prompts(ROWS, only=row)
        expected, seen = oracle.greedy(vlm, alone, oracle_of(name, vlm, alone), 4)
        assert tokens[row].tolist() == expected
        for ours, theirs in zip(scores, seen):
            same(ours[row], theirs)


@pytest.mark.parametrize("name", METHODS)
def test_the_first_token_equals_plain_loops(any_vlm, name):
    inputs = any_vlm.prompts(ROWS)
    with vlmfast.patch(any_vlm.model, METHODS[name]):
        _, scores = generated(any_vlm.model, inputs, 1)
    for row in range(3):
        alone = any_vlm.prompts(ROWS, only=row)
        same(scores[0][row], oracle_of(name, any_vlm, alone)(any_vlm, alone))


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("name", ["deco", "only"])
def test_norms_with_weights_of_their_own(fresh, name, family):
    """A fresh model's norms all do the same: here each is another."""
    vlm = fresh(family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in vlm.model.model.get_decoder().parameters():
            if parameter.ndim == 1:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    inputs = vlm.prompts(ROWS)
    with vlmfast.patch(vlm.model, METHODS[name]):
        _, scores = generated(vlm.model, inputs, 1)
    for row in range(3):
        alone = vlm.prompts(ROWS, only=row)
        same(scores[0][row], oracle_of(name, vlm, alone)(vlm, alone))


# --- DoLa ------------------------------------------------------------------------------------------------------


def test_every_row_has_its_own_layer():
    """Where the batch's mean would choose one that suits neither."""
    torch.manual_seed(0)
    logits = torch.randn(2, 30)
    premature = torch.stack([logits + 0.1, logits.flip(0) * 3, torch.stack([-logits[0], logits[1] + 1e-3])])
    found = divergences(logits, premature)
    own, official = DoLa(), DoLa(parity="official")
    assert own.choice(logits, premature).tolist() == found.argmax(0).tolist()
    assert official.choice(logits, premature).tolist() == [int(found.mean(1).argmax())] * 2
    found = own.combine(logits, premature)
    for row in range(2):
        alone = own.combine(logits[row : row + 1], premature[:, row : row + 1])
        torch.testing.assert_close(found[row : row + 1], alone)


def test_rows_filter_for_themselves():
    logits = torch.tensor([[5.0, 4.9, 0.0, 0.0], [0.0, 0.0, 5.0, 4.9]])
    found = contrast(logits, torch.zeros(2, 4), 0.1)
    assert found.isneginf().tolist() == [[False, False, True, True], [True, True, False, False]]


def test_layers_of_dola():
    low, high = DoLa(), DoLa(layers="high")
    assert list(low.reads(32, False)) == list(range(0, 16, 2)) and list(high.reads(32, False)) == list(
        range(16, 32, 2)
    )
    assert list(low.reads(40, True)) == list(range(2, 20, 2)) and list(high.reads(40, True)) == list(range(20, 40, 2))
    assert list(low.reads(80, False)) == list(range(0, 20, 2)) and list(high.reads(80, False)) == list(
        range(60, 80, 2)
    )
    for depth in range(1, 12):
        for tied in (False, True):
            assert high.reads(depth, tied) and (low.reads(depth, tied) or depth == 1)
    assert DoLa(layers="8").reads(32, False) == (8,)


def test_one_layer_is_the_static_mode(vlm):
    inputs = vlm.prompts(ROWS)
    with vlmfast.patch(vlm.model, DoLa(layers=1)):
        _, scores = generated(vlm.model, inputs, 1)
    for row in range(3):
        alone = vlm.prompts(ROWS, only=row)
        same(scores[0][row], oracle.dola([1], 0.1)(vlm, alone))


# --- DeCo ------------------------------------------------------------------------------------------------------


def test_likely_tokens():
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.9, 0.03, 0.02]])
    for top_p, top_k, expected in (
        (0.8, 4, [2, 1]),
        (0.81, 4, [3, 1]),
        (0.99, 2, [2, 2]),
        (0.0, 3, [1, 1]),
        (1.0, 0, [4, 4]),
        (0.95, 0, [3, 2]),
    ):
        assert candidates(shares.log(), top_p - 1e-6 * (0 < top_p < 1), top_k).sum(1).tolist() == expected
    assert candidates(shares.log(), 0.0, 3).nonzero().tolist() == [[0, 0], [1, 1]]


def test_the_surest_layer_is_asked_about_likely_tokens_alone():
    """An early layer that is sure of something else has no say."""
    logits = torch.tensor([[3.0, 2.9, 0.0]])
    early = torch.tensor([[[0.0, 0.0, 9.0]], [[0.0, 1.0, 0.0]]])
    likely = torch.tensor([[True, True, False]])
    found = correct(logits, early, likely, 1.0)
    most = early[1, 0].softmax(0)[1]
    torch.testing.assert_close(found[0, :2], logits[0, :2] + most * early[1, 0, :2])
    assert found[0, 2] == -math.inf


@pytest.mark.slow
def test_late_layers_scale_with_the_depth():
    assert list(DeCo().reads(32, False)) == list(range(20, 29))
    assert list(DeCo().reads(28, False)) == list(range(18, 26)) and list(DeCo().reads(80, False))[::20] == [50, 70]
    assert all(
        len(DeCo().reads(depth, False)) > 0 and max(DeCo().reads(depth, False)) < depth for depth in range(2, 90)
    )
    assert VISTA().late(32) == tuple(range(25, 31)) and VISTA().late(28) == tuple(range(22, 27))
    assert all(VISTA().late(depth) and max(VISTA().late(depth)) < depth for depth in range(1, 90))


# --- ONLY ------------------------------------------------------------------------------------------------------


def test_heads_and_keys_that_the_side_path_drops():
    torch.manual_seed(1)
    shown = torch.randn(2, 4, 1, 12).mul(3).softmax(-1)
    text, image = torch.zeros(2, 2, 12, dtype=torch.bool)
    text[0, [1, 2, 3, 9, 10, 11]] = image[0, 4:9] = True
    text[1, [2, 3]] = image[1, [5, 6, 7, 8, 9]] = True
    found, _, _ = textual(shown, text[:, None, None], image[:, None, None])
    for row in range(2):
        keys = [one[row].nonzero().flatten().tolist() for one in (text, image)]
        torch.testing.assert_close(found[row, :, 0], oracle.text_minded(shown[row, :, 0], *keys))


def test_both_ways_to_use_the_side_path():
    """Row by row: where it agrees it is added, elsewhere it is subtracted; officially the batch decides."""
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    side = torch.tensor([[2.1, 1.0, 0.0], [0.0, 1.0, 3.0]])
    method = ONLY(beta=0)
    found = method.combine(logits, side)
    torch.testing.assert_close(found[0], logits[0] + 3 * side[0])
    torch.testing.assert_close(found[1], 2 * logits[1] - side[1])
    official = dataclasses.replace(method, parity="official").combine(logits, side)
    torch.testing.assert_close(official, 2 * logits - side)


def test_rows_without_a_picture_decode_plainly(any_vlm):
    inputs = any_vlm.prompts(ROWS)
    with torch.no_grad():
        plain, logits = generated(any_vlm.model, inputs, 4)
    for method in (METHODS["only"], VISTA(lam=0.6, gamma=0)):
        with vlmfast.patch(any_vlm.model, method):
            tokens, scores = generated(any_vlm.model, inputs, 4)
        assert torch.equal(tokens[2], plain[2])
        for ours, theirs in zip(scores, logits):
            # The head sees more rows with ONLY, experts see the tokens of all rows: the same to rounding.
            if method.name == "only" or "moe" in any_vlm.name:
                torch.testing.assert_close(ours[2], theirs[2])
            else:
                assert torch.equal(ours[2], theirs[2]), "bit for bit"
        assert not torch.equal(scores[0][:2], logits[0][:2])


def test_the_layer_that_only_watches(any_vlm):
    depth = any_vlm.model.config.get_text_config().num_hidden_layers
    with vlmfast.patch(any_vlm.model, "only") as handle:
        assert f"attention of layer {first_layer(any_vlm)} " in str(handle.report())
    with pytest.raises(ValueError, match=f"layers 0 to {depth - 1}"):
        vlmfast.patch(any_vlm.model, f"only:layer={depth}")
    if any_vlm.name.startswith("qwen3_5"):
        with pytest.raises(ValueError, match="no attention; 3 have"):
            vlmfast.patch(any_vlm.model, "only:layer=0")


@pytest.mark.parametrize("edit", ["zerotuning:gamma=3.0,layers=0", "zerotuning:gamma=3.0,layers=1:"])
def test_only_beside_a_method_that_edits_attention(vlm, edit):
    """Also of the layer that it looks at, which it sees as it was."""
    inputs = vlm.prompts(ROWS)
    with vlmfast.patch(vlm.model, edit):
        _, plain = generated(vlm.model, inputs, 1)
    with vlmfast.patch(vlm.model, edit, ONLY(alpha_pos=0, alpha_neg=0, beta=1e-30)):
        _, same_logits = generated(vlm.model, inputs, 1)
    torch.testing.assert_close(same_logits[0], plain[0])
    with vlmfast.patch(vlm.model, edit, METHODS["only"]):
        _, both = generated(vlm.model, inputs, 1)
    assert (both[0][:2] - plain[0][:2]).abs().amax(1).min() > 1e-2
    torch.testing.assert_close(both[0][2], plain[0][2])


# --- VISTA -----------------------------------------------------------------------------------------------------


def test_steering_keeps_lengths():
    torch.manual_seed(0)
    hidden, direction = torch.randn(2, 3, 8), torch.randn(2, 8)
    found = steered(hidden, [direction], [0.5])
    torch.testing.assert_close(found.norm(dim=-1), hidden.norm(dim=-1))
    torch.testing.assert_close(steered(hidden, [direction], [0.0]), hidden)
    cosines = [torch.cosine_similarity(one, direction[:, None], dim=-1) for one in (hidden, found)]
    assert (cosines[1] > cosines[0]).all()
    assert steered(torch.zeros(1, 1, 8), [torch.zeros(1, 8)], [0.5]).isfinite().all()


def test_a_conversation_keeps_its_directions(vlm):
    """A later turn is steered as the one that brought the picture; a fresh cache knows nothing of it."""
    method, inputs = VISTA(lam=0.6, gamma=0), vlm.prompts([[3, "a", 4]])
    more = torch.tensor([[7, 8, 9]])

    def turns(model):
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        cache = out.past_key_values
        ids = torch.cat([out.sequences, more], dim=1)
        mask = torch.ones_like(ids)
        types = {}
        if vlm.tiny.types is not None:
            known = inputs[vlm.tiny.types]
            types[vlm.tiny.types] = torch.nn.functional.pad(known, (0, ids.shape[1] - known.shape[1]))
        again = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **types,
        )
        return ids, again.logits[0][0]

    with vlmfast.patch(vlm.model, method):
        ids, logits = turns(vlm.model)
        text = torch.tensor([[5, 6, 7]])
        other = vlm.model.generate(text, max_new_tokens=2, do_sample=False)
    assert torch.equal(other, vlm.model.generate(text, max_new_tokens=2, do_sample=False)), "nothing leaks"
    if vlm.name == "llava":  # positions of a later turn are M-RoPE's business elsewhere
        prompt = inputs
        for token in ids[0, inputs["input_ids"].shape[1] :].tolist():
            prompt = oracle.longer(vlm, prompt, token)
        depth = vlm.model.config.get_text_config().num_hidden_layers
        same(logits, oracle.vista(vlm, inputs, 0.6, 0.0, [depth - 1])(vlm, prompt))


def test_vista_refuses_what_it_cannot_compare(vlm):
    inputs = vlm.prompts([[3, "a", 4]])
    with vlmfast.patch(vlm.model, "vista"):
        with pytest.raises(NotImplementedError, match="prefill_chunk_size"):
            vlm.model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=4)
        with pytest.raises(NotImplementedError, match="needs input_ids"):
            vlm.model.generate(
                inputs_embeds=vlm.model.get_input_embeddings()(torch.tensor([[4, 5]])), max_new_tokens=2
            )
        tokens = vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert torch.equal(tokens, vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False))


def test_the_tower_runs_once(vlm, monkeypatch):
    inputs, count = vlm.prompts([[3, "a", 4]]), []
    blocks = vlmfast.families.family_of(vlm.model)
    source = blocks.sources["image"]
    first = blocks.block_modules(vlm.model.model, source)[0]
    with oracle.hooked(first, lambda *given: count.append(1)), vlmfast.patch(vlm.model, "vista"):
        vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert len(count) == 1


# --- heads that cap their logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dola", "deco"])
def test_capped_logits_are_capped_in_early_layers_too(name, monkeypatch):
    def build():
        model = build_paligemma()
        model.config.text_config.final_logit_softcapping = 1.5
        return model

    vlm = make("paligemma", dataclasses.replace(OTHERS["paligemma"], build=build))
    inputs = vlm.prompts(ROWS)
    with vlmfast.patch(vlm.model, METHODS[name]):
        _, scores = generated(vlm.model, inputs, 1)
    head = vlm.model.lm_head
    for row in range(3):
        alone = vlm.prompts(ROWS, only=row)
        known = oracle.states(vlm, alone)
        scores_of = oracle_of(name, vlm, alone)
        with monkeypatch.context() as patch:  # the oracle's own head calls are capped, too
            patch.setattr(oracle, "states", lambda *given, known=known: known)
            patch.setattr(head, "forward", lambda hidden: torch.tanh(hidden @ head.weight.T / 1.5) * 1.5)
            same(scores[0][row], scores_of(vlm, alone))


def test_a_cap_that_the_model_does_not_apply(fresh):
    """Gemma 3's config has one, but its conditional model leaves logits alone."""
    vlm = fresh("gemma3")
    inputs = vlm.prompts(ROWS)
    vlm.model.config.text_config.final_logit_softcapping = 1.5
    with vlmfast.patch(vlm.model, METHODS["dola"]):
        _, scores = generated(vlm.model, inputs, 1)
    for row in range(3):
        alone = vlm.prompts(ROWS, only=row)
        same(scores[0][row], oracle_of("dola", vlm, alone)(vlm, alone))


# --- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (DoLa, {"layers": "early"}),
        (DoLa, {"relative_top": 1.5}),
        (DoLa, {"relative_top": True}),
        (DoLa, {"parity": "authors"}),
        (DeCo, {"alpha": -1}),
        (DeCo, {"top_p": 2}),
        (DeCo, {"top_k": -1}),
        (DeCo, {"top_k": 2.5}),
        (DeCo, {"layers": "a:b"}),
        (ONLY, {"alpha_pos": "x"}),
        (ONLY, {"beta": -0.1}),
        (ONLY, {"gamma": 3}),
        (ONLY, {"layer": "last"}),
        (ONLY, {"layer": True}),
        (VISTA, {"lam": -1}),
        (VISTA, {"gamma": 1.1}),
        (VISTA, {"layers": "x"}),
        (VISTA, {"logits_layers": "x"}),
    ],
)
def test_bad_settings(method, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        method(**settings)


@pytest.mark.parametrize(
    "spec", ["dola:layers=9", "dola:layers=5:", "deco:layers=7", "vista:layers=3", "vista:layers=5:"]
)
def test_layers_that_there_are_not(spec, vlm):
    with pytest.raises(ValueError, match="decoder"):
        vlmfast.patch(vlm.model, spec)
    assert "vlmfast_handle" not in vlm.model.__dict__
