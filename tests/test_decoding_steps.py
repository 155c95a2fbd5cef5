"""What methods that decide on the logits of a step promise: every way to generate, nothing else changed, no traces."""

from __future__ import annotations

import copy
import itertools

import decoding_oracle as oracle
import pytest
import torch
from conftest import CORE, build, crossed
from peft import LoraConfig, get_peft_model
from test_decoding_layers import METHODS, ROWS, generated, oracle_of, same
from test_promises import generate, snapshot
from transformers import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import vlmfast
from vlmfast.adapters import from_spec, support, to_spec
from vlmfast.steps import StepsDoor, last, possible

NEUTRAL = {
    "dola": "dola:layers=none",
    "deco": "deco:alpha=0,top_p=1.0,top_k=0",
    "only": "only:alpha_pos=0,alpha_neg=0,beta=0",
    "vista": "vista:lam=0,gamma=0",
}


@pytest.mark.parametrize("name", METHODS)
def test_short_promises(any_vlm, name):
    """The identity, direct calls, a change in `generate`, and nothing left behind."""
    model, inputs = any_vlm.model, any_vlm.prompts(ROWS)
    assert support(name, any_vlm.name).reason is None
    plain, before = model(**inputs).logits, snapshot(model)
    tokens, logits = generated(model, inputs, 3)
    with vlmfast.patch(model, NEUTRAL[name]):
        assert [hooks for _, _, hooks, _ in snapshot(model)[2:]] == [hooks for _, _, hooks, _ in before[2:]]
        same_tokens, same_logits = generated(model, inputs, 3)
        assert torch.equal(same_tokens, tokens) and all(map(torch.equal, same_logits, logits))
    with vlmfast.patch(model, METHODS[name]) as handle:
        assert torch.equal(model(**inputs).logits, plain), "direct calls are plain"
        _, scores = generated(model, inputs, 3)
        assert torch.equal(model(**inputs).logits, plain), "afterwards, too"
        for row in range(2):
            assert (scores[0][row] - logits[0][row]).abs().max() > 1e-2
        assert all(one.isfinite().all() for one in scores), "nothing is ruled out for good"
        assert str(handle.report()).startswith(handle.spec) and f"\n{name}: " in str(handle.report())
    assert snapshot(model) == before, "nothing is left behind"
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize(("vlm", "name"), crossed(CORE, list(METHODS)), indirect=["vlm"])
def test_every_way_to_generate(vlm, name):
    """They repeat themselves; caches of another kind, or none, change nothing; nor do other rows."""
    inputs = vlm.prompts(ROWS)
    width = inputs["input_ids"].shape[1]
    with vlmfast.patch(vlm.model, METHODS[name]):
        greedy = generate(vlm.model, inputs, do_sample=False)[:, width:]
        for how in (
            {"num_beams": 3, "do_sample": False},
            {"num_beams": 3, "do_sample": True},
            {"do_sample": True},
            {"do_sample": True, "num_return_sequences": 2},
            {"do_sample": True, "temperature": 0.3, "top_k": 3, "repetition_penalty": 1.2},
        ):
            first = generate(vlm.model, inputs, **how)[:, width:]
            assert first.shape[1] == 5 and torch.equal(first, generate(vlm.model, inputs, **how)[:, width:])
        for how in ({"cache_implementation": "static"}, {"use_cache": False}):
            assert torch.equal(generate(vlm.model, inputs, do_sample=False, **how)[:, width:], greedy)
        if name != "vista":
            chunks = generate(vlm.model, inputs, do_sample=False, prefill_chunk_size=7)[:, width:]
            assert torch.equal(chunks, greedy)
        beams = generate(vlm.model, inputs, num_beams=3, do_sample=False)[:, width:]
        for row in range(3):
            alone = vlm.prompts(ROWS, only=row)
            assert torch.equal(generate(vlm.model, alone, do_sample=False)[0, -5:], greedy[row])
            assert torch.equal(generate(vlm.model, alone, num_beams=3, do_sample=False)[0, -5:], beams[row])


@pytest.mark.parametrize("name", METHODS)
def test_beams_add_up_normalised_scores(vlm, name):
    """The score that beam search reports is the sum of the method's log-probabilities along the sequence."""
    inputs = vlm.prompts([[3, "a", 4]])
    width = inputs["input_ids"].shape[1]
    with vlmfast.patch(vlm.model, METHODS[name]):
        out = vlm.model.generate(
            **inputs, num_beams=3, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
    scores, prompt, total = oracle_of(name, vlm, inputs), inputs, 0.0
    for token in out.sequences[0, width:].tolist():
        total += float(scores(vlm, prompt).log_softmax(0)[token])
        prompt = oracle.longer(vlm, prompt, token)
    assert float(out.sequences_scores[0]) == pytest.approx(total / 4, rel=1e-3, abs=1e-3)


class Heard(BaseStreamer):
    """Keeps what it is told."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.tokens.append(None)


@pytest.mark.parametrize("name", METHODS)
def test_arguments_of_generate(vlm, name):
    inputs = vlm.prompts([[3, "a", 4]])
    width = inputs["input_ids"].shape[1]
    with vlmfast.patch(vlm.model, METHODS[name]):
        greedy = generate(vlm.model, inputs, do_sample=False)
        heard = Heard()
        generate(vlm.model, inputs, do_sample=False, streamer=heard)
        assert torch.cat(heard.tokens[1:-1]).tolist() == greedy[0, width:].tolist()
        stops = StoppingCriteriaList([MaxLengthCriteria(width + 2)])
        assert torch.equal(generate(vlm.model, inputs, do_sample=False, stopping_criteria=stops), greedy[:, :-3])
        both = vlm.prompts(ROWS)
        free = generate(vlm.model, both, do_sample=False)[:, -5:]
        end = int(free[0, 1])
        ended = generate(vlm.model, both, do_sample=False, eos_token_id=end)[:, both["input_ids"].shape[1] :]
        for before, after in zip(free.tolist(), ended.tolist()):
            count = before.index(end) + 1 if end in before else 5
            assert after == (before[:count] + [0] * 5)[: len(after)] and len(after) >= min(count, 2)


@pytest.mark.parametrize("name", METHODS)
def test_something_is_left_to_choose_from(vlm, name):
    """Where `generate` forbids all that the method finds plausible."""
    inputs = vlm.prompts(ROWS)
    with vlmfast.patch(vlm.model, METHODS[name]):
        _, scores = generated(vlm.model, inputs, 1)
        allowed = scores[0].amin(0).argsort()[:3].tolist()  # implausible in some row
        others = [token for token in range(scores[0].shape[1]) if token not in allowed]
        for how in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False}):
            tokens = generate(vlm.model, inputs, suppress_tokens=others, **how)[:, -5:]
            assert set(tokens.flatten().tolist()) <= set(allowed)


def test_the_rest_of_a_prompt_is_not_kept():
    assert last(torch.zeros(2, 100, 8)).untyped_storage().nbytes() == 2 * 8 * 4


def test_what_is_out_keeps_its_order():
    logits = torch.tensor([[3.0, 1.0, 2.0, 5.0], [0.0, 1.0, 2.0, 3.0]])
    scores = torch.tensor([[-torch.inf, -40.0, -torch.inf, 7.0], [-torch.inf] * 4])
    found = possible(scores, logits)
    assert found[0, [1, 3]].tolist() == [-40.0, 7.0]
    assert found[0, 2] - found[0, 0] == -1.0 and found[0].softmax(0)[[0, 2]].sum() == 0
    assert found[1].argsort().tolist() == [0, 1, 2, 3] and found.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_no_forward_more_than_it_says(vlm, name):
    """One forward a token, VISTA two more a prompt; heads see one position; nothing is kept."""
    inputs = vlm.prompts(ROWS)
    layers, head = vlm.model.model.get_decoder().layers, vlm.model.lm_head
    calls, rows = [], []
    with (
        vlmfast.patch(vlm.model, METHODS[name]) as handle,
        oracle.hooked(layers[1], lambda *given: calls.append(1)),
        oracle.hooked(head, lambda module, args, kwargs: rows.append(args[0][..., 0].numel()), before=True),
    ):
        generate(vlm.model, inputs, do_sample=False)
        door = next(one for one in handle.reporters if isinstance(one, StepsDoor))
        assert not door.found and not door.running and door.asked is None and door.raw is None
    assert len(calls) == 5 + 2 * (name == "vista")
    assert rows == [3 * (1 + (3 if name in ("dola", "deco") else 1))] * 5, "once a step, for all that it asks"


@pytest.mark.parametrize("name", METHODS)
def test_behind_pruning(vlm, name):
    inputs = vlm.prompts(ROWS)
    both = "random:keep=0.6+fastv:keep=0.5,layer=1"
    with vlmfast.patch(vlm.model, both):
        _, pruned = generated(vlm.model, inputs, 1)
    with vlmfast.patch(vlm.model, both, METHODS[name]) as handle:
        tokens, scores = generated(vlm.model, inputs, 5)
        assert (scores[0][:2] - pruned[0][:2]).abs().amax(1).min() > 1e-2
        for row in range(3):
            alone = vlm.prompts(ROWS, only=row)
            other, found = generated(vlm.model, alone, 5)
            torch.testing.assert_close(found[0][0], scores[0][row], rtol=1e-3, atol=2e-3)
            assert torch.equal(other[0], tokens[row])
        assert (handle.report().share < 1) == (name != "vista")  # whose prompts run once more


def test_early_layers_behind_a_cut(vlm):
    """DoLa by plain loops on a model whose prompt was cut between its layers: the hidden states are the cut ones'."""
    inputs = vlm.prompts([[3, "a", 4]])
    with vlmfast.patch(vlm.model, "fastv:keep=0.5,layer=1"):
        expected = oracle_of("dola", vlm, inputs)(vlm, inputs)
    with vlmfast.patch(vlm.model, "fastv:keep=0.5,layer=1", METHODS["dola"]):
        _, scores = generated(vlm.model, inputs, 1)
    same(scores[0][0], expected)


EDITS = ["pai:alpha=1.0,gamma=1,layers=0:", "zerotuning:gamma=3.0", "vhr"]


@pytest.mark.parametrize(("vlm", "both"), crossed(CORE, list(itertools.product(METHODS, EDITS))), indirect=["vlm"])
def test_beside_methods_that_edit_attention(vlm, both):
    name, edit = both
    inputs = vlm.prompts(ROWS)
    with vlmfast.patch(vlm.model, edit):
        _, edited = generated(vlm.model, inputs, 1)
    with vlmfast.patch(vlm.model, edit, METHODS[name]):
        tokens, scores = generated(vlm.model, inputs, 5)
        assert (scores[0][:2] - edited[0][:2]).abs().amax(1).min() > 1e-2
        for row in range(3):
            alone = vlm.prompts(ROWS, only=row)
            assert torch.equal(generated(vlm.model, alone, 5)[0][0], tokens[row])


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("dola+deco", "dola and deco"),
        ("only+vista", "only and vista"),
        ("dola+dola:layers=high", "dola and dola"),
        ("pai+dola", "dola and pai"),
    ],
)
def test_one_method_owns_the_logits(vlm, spec, names):
    before = snapshot(vlm.model)
    with pytest.raises(NotImplementedError, match=f"{names} both decide"):
        vlmfast.patch(vlm.model, spec)
    assert snapshot(vlm.model) == before
    with vlmfast.patch(vlm.model, "pai:gamma=1,layers=1:+dola+deco:alpha=0,top_p=1.0,top_k=0"):
        generate(vlm.model, vlm.prompts(ROWS), do_sample=False)


@pytest.mark.parametrize("name", METHODS)
def test_drafts_are_refused(vlm, name):
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    with vlmfast.patch(vlm.model, METHODS[name]), pytest.raises(NotImplementedError, match="one token at a time"):
        vlm.model.generate(ids, max_new_tokens=3, do_sample=False, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("name", METHODS)
def test_after_an_error(vlm, name):
    """Inside `generate`, or while patched."""
    inputs, before = vlm.prompts(ROWS), snapshot(vlm.model)
    plain = vlm.model(**inputs).logits

    def fail(ids, scores):
        raise ZeroDivisionError

    with vlmfast.patch(vlm.model, METHODS[name]):
        tokens = generate(vlm.model, inputs, do_sample=False)
        with pytest.raises(ZeroDivisionError):
            generate(vlm.model, inputs, logits_processor=[fail])
        assert torch.equal(vlm.model(**inputs).logits, plain)
        assert torch.equal(generate(vlm.model, inputs, do_sample=False), tokens)
    assert snapshot(vlm.model) == before


@pytest.mark.parametrize(("family", "name"), crossed(CORE, list(METHODS)))
def test_copies_halves_adapters_and_files(name, family, tmp_path):
    """A deep copy is patched by itself; bf16; LoRA; saved and loaded back."""
    vlm = build(family)
    inputs = vlm.prompts(ROWS)
    plain = generate(vlm.model, inputs, do_sample=False)
    with vlmfast.patch(vlm.model, METHODS[name]) as handle:
        tokens = generate(vlm.model, inputs, do_sample=False)
        assert from_spec(handle.spec) == (METHODS[name],) and to_spec((METHODS[name],)) == handle.spec
        vlm.model.save_pretrained(tmp_path)
        twin = copy.deepcopy(vlm.model)
        with torch.no_grad():
            vlm.model.lm_head.weight.neg_()
        assert torch.equal(generate(twin, inputs, do_sample=False), tokens)
        vlmfast.unpatch(twin)
        assert torch.equal(generate(twin, inputs, do_sample=False), plain)
        with torch.no_grad():
            vlm.model.lm_head.weight.neg_()
        assert torch.equal(generate(vlm.model, inputs, do_sample=False), tokens)
    loaded = vlmfast.from_pretrained(tmp_path).eval()
    assert torch.equal(generate(loaded, inputs, do_sample=False), tokens)
    lora = get_peft_model(vlm.model, LoraConfig(target_modules=["q_proj", "o_proj", "up_proj"]))
    with vlmfast.patch(lora, METHODS[name]):
        assert torch.equal(generate(lora.eval(), inputs, do_sample=False), tokens), "fresh adapters change nothing"
    half = build(family)
    half.model.to(torch.bfloat16)
    with vlmfast.patch(half.model, METHODS[name]):
        assert generate(half.model, inputs, do_sample=False).shape == tokens.shape
