"""Door 3, edits: what the door tells a method of every token, and the engine against full maps in plain loops."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_oracle import full_maps
from torch import Tensor

import vlmfast
from vlmfast.adapters.attention.base import AttentionEdit, which
from vlmfast.adapters.attention.zerotuning import ZeroTuning
from vlmfast.edits import Call
from vlmfast.edits.engine import Few, Seen, correct, redistribute, rescore, with_lse

ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]


def first_token_scaled(gamma: float, inputs: dict[str, Tensor]):
    """The oracle of ZeroTuning, row by row."""
    first = inputs["attention_mask"].argmax(1)

    def edit(layer, shown, hidden):
        before, shown = shown, shown.clone()
        for row in range(len(shown)):
            shown[row, :, :, first[row]] *= gamma
        total = shown.sum(-1, keepdim=True)
        return torch.where(total > 1e-6, shown / total, before)  # rows that see nothing else

    return edit


@pytest.mark.parametrize("gamma", [3.0, 0.2, 0.0])
def test_zerotuning_equals_full_maps(any_vlm, gamma):
    """Also decoding: the maps of a run without a cache are those of one with it."""
    model, inputs = any_vlm.model, any_vlm.prompts(ROWS)
    with full_maps(model, first_token_scaled(gamma, inputs)):
        expected = model(**inputs).logits[:, -1]
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with vlmfast.patch(model, ZeroTuning(gamma=gamma)):
        torch.testing.assert_close(model(**inputs).logits[:, -1], expected, rtol=1e-3, atol=2e-4)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spy(AttentionEdit):
    """Changes nothing and tells of every call."""

    name = "spy"
    seen: Any = dataclasses.field(default=None, compare=False)

    @property
    def neutral(self):
        return False

    def edit(self, call):
        self.seen.append(call)
        return call.plain()


def spied(vlm, inputs, run, **settings) -> tuple[list[Call], Any]:
    calls: list[Call] = []
    with vlmfast.patch(vlm.model, Spy(seen=calls, **settings)):
        result = run(vlm.model, inputs)
    return calls, result


def test_a_call_tells_what_is_what(any_vlm):
    inputs = any_vlm.prompts(ROWS)
    plain = any_vlm.model(**inputs).logits
    calls, output = spied(any_vlm, inputs, lambda model, given: model(**given).logits)
    assert torch.equal(output, plain), "the spy changes nothing"
    family = vlmfast.families.family_of(any_vlm.model)
    config = any_vlm.model.config
    visual = sum(inputs["input_ids"] == getattr(config, source.token) for source in family.sources.values()) > 0
    real = inputs["attention_mask"].bool()
    for call in calls:
        assert torch.equal(call.visual, visual) and torch.equal(call.real, real)
        assert call.initial.tolist() == real.long().argmax(1).tolist()
        assert call.prompt and call.ends.nonzero().tolist() == [[row, real.shape[1] - 1] for row in range(3)]
        text = real & ~visual
        for row in range(3):
            seen = False
            for column in range(real.shape[1]):
                assert bool(call.after_visual[row, column]) == bool(seen and text[row, column])
                seen = seen or bool(visual[row, column])


def test_decoding_with_any_cache(vlm):
    inputs = vlm.prompts(ROWS)
    width = inputs["input_ids"].shape[1]

    def generate(model, given, **how):
        return model.generate(**given, max_new_tokens=4, do_sample=False, **how)

    for how in ({}, {"cache_implementation": "static"}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        only = vlm.prompts([[3, "a", 2]]) if "prompt_lookup_num_tokens" in how else inputs
        wide = only["input_ids"].shape[1] if only is not inputs else width
        calls, _ = spied(vlm, only, lambda model, given, how=how: generate(model, given, **how), layers=1)
        prefill, later = calls[0], calls[1:]
        assert prefill.prompt and prefill.query.shape[2] == wide and later
        for call in later:
            assert not call.prompt and bool(call.ends.all())
            assert torch.equal(call.visual[:, :wide], prefill.visual[:, :wide])
            assert not call.visual[:, wide:].any()


def test_chunks_of_a_prompt(vlm):
    """Positions decide: only the last chunk ends the prompt, and all of them know the pictures before them."""
    inputs = vlm.prompts([[3, "a", 4]])
    width = inputs["input_ids"].shape[1]
    calls, tokens = spied(
        vlm,
        inputs,
        lambda model, given: model.generate(**given, max_new_tokens=3, do_sample=False, prefill_chunk_size=6),
        layers=0,
    )
    assert torch.equal(tokens, vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False))
    visual = (inputs["input_ids"] == vlm.model.config.image_token_id)[0]
    end = 0
    for call in calls:
        count = call.query.shape[2]
        assert call.prompt == (end < width)
        assert call.ends[0].tolist() == [end + k >= width - 1 for k in range(count)]
        known = min(end + count, width)
        assert torch.equal(call.visual[0, :known], visual[:known])
        end += count


def test_behind_cuts_of_another_method(vlm):
    """Composed with pruning, a layer's keys are told as what they are."""
    inputs = vlm.prompts(ROWS)
    calls: list[Call] = []
    ids = inputs["input_ids"]
    token = vlm.model.config.image_token_id
    text = ((ids != token) & inputs["attention_mask"].bool()).sum(1)
    with vlmfast.patch(vlm.model, "random:keep=0.5+fastv:keep=0.5", Spy(seen=calls)) as handle:
        vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        held = [prompt.per_layer for prompt in handle.report().prompts]
    assert any(layers[-1] < layers[0] for layers in held)
    for call in calls:
        for row in range(3):
            assert int(call.visual[row].sum()) == held[row][call.layer]
            assert int(call.real[row].sum()) == held[row][call.layer] + int(text[row]) + int(not call.prompt) * (
                call.key.shape[2] - calls[call.layer].key.shape[2]
            )
            assert bool(call.real[row, call.initial[row]]) and not call.real[row, : call.initial[row]].any()


def test_what_is_remembered_lies_beside_its_key(vlm):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Marks(Spy):
        def edit(self, call):
            if call.prompt:
                call.remember("sum", call.hidden.sum(-1))
            self.seen.append((call, call.recall("sum"), call.hidden))
            return call.plain()

    calls: list[Any] = []
    inputs = vlm.prompts([[3, "a", 4]])
    with vlmfast.patch(vlm.model, Marks(seen=calls, layers=1)):
        vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False, prefill_chunk_size=5)
    width = inputs["input_ids"].shape[1]
    whole = torch.cat([hidden for _, _, hidden in calls], 1)[:, :width].sum(-1)
    for call, known, _ in calls:
        assert known.shape == (1, call.key.shape[2])
        there = min(width, call.key.shape[2])
        assert torch.equal(known[:, :there], whole[:, :there])
        assert not known[:, width:].any()


def test_bad_input(vlm):
    inputs = vlm.prompts([[3, "a", 4]])
    for settings, words in (
        ({"layers": "3:"}, "none of this decoder's 3"),
        ({"layers": 7}, "layers 0 to 2"),
        ({"heads": "0/9"}, "heads 0 to 3"),
        ({"heads": "nowhere.json"}, "neither heads"),
    ):
        with pytest.raises(ValueError, match=words):
            vlmfast.patch(vlm.model, ZeroTuning(**settings))
    for settings in ({"layers": "a:b"}, {"layers": "1:2:3"}, {"gamma": -1}, {"gamma": "x"}, {"start": 3, "end": 2}):
        with pytest.raises(ValueError):
            ZeroTuning(**settings)
    with pytest.raises(NotImplementedError, match="both edit the attention of layer 0"):
        vlmfast.patch(vlm.model, "zerotuning:layers=0", "zerotuning:gamma=3,layers=0")
    cache = vlm.model(**inputs).past_key_values
    with vlmfast.patch(vlm.model, "zerotuning"), pytest.raises(ValueError, match="before the model was patched"):
        vlm.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    with vlmfast.patch(vlm.model, Spy(seen=[])), pytest.raises(NotImplementedError, match="spy needs input_ids"):
        vlm.model(inputs_embeds=vlm.model.get_input_embeddings()(inputs["input_ids"]))


def test_layers_in_words():
    assert which("2:-1", 6)[0] == (2, 3, 4)
    assert which("1/-2:", 6) == ((1, 4, 5), (1,))
    assert which("all", 3)[0] == (0, 1, 2)
    assert which(-1, 4) == ((3,), (3,))


# --- the engine ------------------------------------------------------------------------------------------------


def masks(batch: int, n_query: int, n_key: int) -> dict[str, Seen]:
    """What queries may see, in every form."""
    generator = torch.Generator().manual_seed(3)
    seen = torch.rand(batch, 1, n_query, n_key, generator=generator) > 0.3
    seen[..., 0] = True
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    places = n_key - n_query + torch.arange(n_query)
    keys = torch.ones(batch, n_key, dtype=torch.bool)
    keys[0, :2] = False
    return {
        "none": Seen(),
        "bool": Seen(mask=seen),
        "additive": Seen(mask=additive),
        "causal": Seen(places=places),
        "padded": Seen(places=places, keys=keys),
        "window": Seen(places=places, window=4),
    }


def maps(query: Tensor, key: Tensor, scaling: float, seen: Seen) -> Tensor:
    """Masked scores, one pair of a query and a key at a time."""
    batch, heads, n_query, _ = query.shape
    n_key, group = key.shape[2], query.shape[1] // key.shape[1]
    scores = torch.full((batch, heads, n_query, n_key), -torch.inf)
    for b in range(batch):
        for h in range(heads):
            for i in range(n_query):
                for j in range(n_key):
                    shown = True
                    if seen.mask is not None:
                        entry = seen.mask[b, 0, i, j]
                        shown = bool(entry) if seen.mask.dtype == torch.bool else float(entry) == 0
                    if seen.places is not None:
                        shown = shown and j <= int(seen.places[i])
                        shown = shown and (seen.window is None or j > int(seen.places[i]) - seen.window)
                    if seen.keys is not None:
                        shown = shown and bool(seen.keys[b, j])
                    if shown:
                        scores[b, h, i, j] = query[b, h, i] @ key[b, h // group, j] * scaling
    return scores


@pytest.mark.parametrize("form", ["none", "bool", "additive", "causal", "padded", "window"])
@pytest.mark.parametrize("n_query", [1, 5, 9])
def test_the_engine_equals_plain_loops(form, n_query, monkeypatch):
    monkeypatch.setattr("vlmfast.edits.engine.ENTRIES_CPU", 2 * 4 * 9 * 2)  # blocks of two rows
    torch.manual_seed(0)
    batch, heads, kv_heads, n_key, width, scaling = 2, 4, 2, 9, 8, 0.4
    query = torch.randn(batch, heads, n_query, width)
    key, value = torch.randn(batch, kv_heads, n_key, width), torch.randn(batch, kv_heads, n_key, width)
    seen = masks(batch, n_query, n_key)[form]
    scores = maps(query, key, scaling, seen)
    values = value.repeat_interleave(2, 1)
    shown = scores.softmax(-1).nan_to_num(0.0)
    kinds = torch.randint(0, 3, (batch, heads, n_key))
    classes = torch.stack([kinds == 0, kinds == 1])

    def factors(masses):
        return torch.stack([1 + masses[..., 1], 0.5 * masses[..., 0] + masses[..., 1] ** 2], dim=-1)

    expected = torch.zeros(batch, heads, n_query, width)
    for b in range(batch):
        for h in range(heads):
            for i in range(n_query):
                row = shown[b, h, i]
                masses = torch.stack([row[kinds[b, h] == c].sum() for c in (0, 1)])
                wanted = [*factors(masses), 1.0]
                for j in range(n_key):
                    expected[b, h, i] += row[j] * wanted[int(kinds[b, h, j])] * values[b, h, j]
    torch.testing.assert_close(redistribute(query, key, value, classes, factors, scaling, seen), expected)

    doubled = rescore(query, key, value, lambda s: torch.where(s > 0, 2 * s, s), scaling, seen)
    again = torch.where(scores > 0, 2 * scores, scores).softmax(-1).nan_to_num(0.0) @ values
    torch.testing.assert_close(doubled, again)

    rows = ~scores.isneginf().all(-1)  # a row of padding has no log-sum-exp
    causal = form == "causal" and n_query == n_key
    out, lse = with_lse(query, key, value, scaling, seen, causal)
    torch.testing.assert_close(out[rows], (shown @ values)[rows])
    torch.testing.assert_close(lse[rows], scores.logsumexp(-1)[rows])
    some = Few.of(kinds == 0)
    assert torch.equal(some.member(n_key), kinds == 0)

    def two(mass):
        return 0.3 + mass, 1.5 - 0.5 * mass

    corrected = correct(query, key, value, some, two, scaling, seen, causal)
    mass = (shown * (kinds == 0)[:, :, None]).sum(-1)
    on_few, on_others = two(mass)
    edited = shown * torch.where((kinds == 0)[:, :, None], on_few[..., None], on_others[..., None])
    torch.testing.assert_close(corrected[rows], (edited @ values)[rows], rtol=1e-4, atol=1e-5)


def test_a_share_found_by_subtraction_is_not_trusted_too_far():
    """Where a few keys hold nearly all mass, the rest comes from explicit rows."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    key[:, :, 0] = 40 * query.mean(dim=2)
    few = Few.of(torch.arange(5)[None, None] == 0)
    assert correct(query, key, value, few, lambda mass: (0 * mass, 1 / (1 - mass).clamp(min=1e-9)), 1.0) is None


def test_gradients_pass_through_an_edit(fresh):
    """With labels and gradients, a small step against the gradient lowers the loss as far as it says."""
    vlm = fresh("llava")
    inputs = vlm.prompts([[3, "a", 4]])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == vlm.model.config.image_token_id, -100)
    weight = vlm.model.model.language_model.layers[0].self_attn.k_proj.weight
    with vlmfast.patch(vlm.model, "zerotuning:gamma=5.0"):
        loss = vlm.model(**inputs, labels=labels).loss
        loss.backward()
        step = 1e-3 * weight.grad / weight.grad.norm()
        with torch.no_grad():
            weight -= step
            lower = vlm.model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss.detach() - lower, (step * weight.grad).sum(), rtol=0.05, atol=0)
