"""Door 4, branches: two prompts that decide on every token together, against models that run one after the other."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import CORE, build, crossed
from peft import LoraConfig, get_peft_model
from test_promises import ROWS, snapshot
from tiny import IMAGE, PAD, VIDEO
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

import vlmfast
from vlmfast.branches import ImageFreeBranch, contrast
from vlmfast.encoding import encode_images, encoder_outputs

GAMMA, PLAUSIBILITY = 2.5, 0.05
SPEC = f"pai:alpha=0,gamma={GAMMA},plausibility={PLAUSIBILITY}"
PLACEHOLDERS = (IMAGE, VIDEO)


def by_hand(own: list[float], other: list[float]) -> list[float]:
    """The contrast of two rows of logits, one token at a time; -inf where a token is out."""
    total, others = (math.log(sum(math.exp(x) for x in row)) for row in (own, other))
    largest = max(own) - total
    scores = []
    for x, y in zip(own, other):
        c, u = x - total, y - others
        out = c < math.log(PLAUSIBILITY) + largest
        scores.append(-math.inf if out else GAMMA * (c - u) + u)
    return scores


def test_the_contrast_in_plain_loops():
    generator = torch.Generator().manual_seed(1)
    own, other = torch.randn(2, 3, 50, generator=generator) * 3
    own[0, 4] = -torch.inf  # forbidden by another processor
    found = ImageFreeBranch("pai", GAMMA, PLAUSIBILITY).combine(own, other)
    assert found.isinf().any(1).all() and found.isfinite().any(1).all()
    for row in range(3):
        expected = torch.tensor(by_hand(own[row].tolist(), other[row].tolist()))
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(contrast(own, other, 1.0), own.log_softmax(-1)), "gamma of 1 rules nothing out"


# --- the same by other means -----------------------------------------------------------------------------------


def longer(inputs: dict[str, Tensor], generated: list[int]) -> dict[str, Tensor]:
    """One prompt with tokens behind it: text, and no part of a prefix."""
    fill = {"input_ids": None, "attention_mask": 1, "token_type_ids": 1, "mm_token_type_ids": 0}
    more = dict(inputs)
    for name, value in fill.items():
        if name in inputs:
            new = torch.tensor([generated]).long() if value is None else torch.full((1, len(generated)), value)
            more[name] = torch.cat([inputs[name], new.to(inputs[name])], dim=1)
    if "token_type_ids" in inputs and not (inputs["token_type_ids"] == 0)[inputs["input_ids"] == IMAGE].all():
        more["token_type_ids"][:, inputs["input_ids"].shape[1] :] = 0  # Gemma 3, where type 1 is a picture
    return more


def next_logits(model: Any, inputs: dict[str, Tensor], generated: list[int]) -> Tensor:
    """What a model says behind one prompt and some tokens, from nothing. [V]"""
    how = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**longer(inputs, generated), **how).logits[0][0]


def text_alone(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One prompt without its placeholders, by hand."""
    text = [token not in PLACEHOLDERS for token in inputs["input_ids"][0].tolist()]
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in inputs]
    return {name: inputs[name][:, text] for name in names}


def test_greedy_equals_two_models_by_hand(any_vlm):
    """Rows of a padded batch with one cache a branch, and each row of an unpatched model alone without any."""
    model, inputs, count = any_vlm.model, any_vlm.prompts(ROWS), 5
    plain = model.generate(**inputs, max_new_tokens=count, do_sample=False)[:, -count:]
    before = snapshot(model)
    with vlmfast.patch(model, SPEC):
        found = model.generate(**inputs, max_new_tokens=count, do_sample=False)[:, -count:]
    assert snapshot(model) == before, "nothing is left behind"
    assert torch.equal(found[2], plain[2]), "a prompt without a picture"
    assert not torch.equal(found[:2], plain[:2])
    for row in range(2):
        alone = any_vlm.prompts(ROWS, only=row)
        text, tokens = text_alone(alone), []
        if "token_type_ids" in text:  # what is left has no picture
            text["token_type_ids"] = torch.zeros_like(text["token_type_ids"])
        for _ in range(count):
            own = next_logits(model, alone, tokens)
            own[list(PLACEHOLDERS)] = -torch.inf  # as the generation config has it
            scores = by_hand(own.tolist(), _text_logits(any_vlm, text, tokens).tolist())
            tokens.append(max(range(len(scores)), key=scores.__getitem__))
        assert found[row].tolist() == tokens


def _text_logits(vlm: Any, text: dict[str, Tensor], generated: list[int]) -> Tensor:
    """What the model says behind a text, from nothing. [V]"""
    inputs = longer(text, generated)
    if vlm.name == "gemma3":
        inputs.pop("token_type_ids")
    elif "token_type_ids" in inputs:
        inputs["token_type_ids"][:, text["input_ids"].shape[1] :] = 1
    return vlm.model(**inputs, use_cache=False).logits[0, -1]


class Afresh(LogitsProcessor):
    """The contrast of an unpatched model, which reads every row's text from its beginning at every step."""

    def __init__(self, vlm: Any, inputs: dict[str, Tensor]) -> None:
        self.vlm, self.width, self.inputs = vlm, inputs["input_ids"].shape[1], inputs

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        repeat = len(ids) // len(self.inputs["input_ids"])
        for row, tokens in enumerate(ids):
            prompt = tokens[: self.width]
            real = self.inputs["attention_mask"][row // repeat].bool()
            picture = torch.isin(prompt, torch.tensor(PLACEHOLDERS))
            if not picture.any():
                continue
            text = {"input_ids": prompt[real & ~picture][None]}
            text["attention_mask"] = torch.ones_like(text["input_ids"])
            if self.vlm.tiny.types == "token_type_ids":
                text["token_type_ids"] = torch.zeros_like(text["input_ids"])
            other = _text_logits(self.vlm, text, tokens[self.width :].tolist())
            scores[row] = contrast(scores[row], other, GAMMA, PLAUSIBILITY).log_softmax(-1)
        return scores


WAYS = {
    "beams": {"num_beams": 3, "do_sample": False},
    "beams that are sampled": {"num_beams": 3, "do_sample": True, "top_k": 20},
    "all beams": {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "length_penalty": 0.5},
    "samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.7},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
    "other processors": {"do_sample": False, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize(("vlm", "way"), crossed(CORE, list(WAYS)), indirect=["vlm"])
def test_every_way_of_generating(vlm, way):
    model, inputs = vlm.model, vlm.prompts(ROWS)
    how = {"max_new_tokens": 7, "logits_processor": None, **WAYS[way]}
    torch.manual_seed(5)
    plain = model.generate(**inputs, **how)
    torch.manual_seed(5)
    expected = model.generate(**inputs, **how | {"logits_processor": [Afresh(vlm, inputs)]})
    assert not torch.equal(expected, plain)
    torch.manual_seed(5)
    with vlmfast.patch(model, SPEC):
        assert torch.equal(model.generate(**inputs, **how), expected)


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3", "paligemma", "mistral3"])
def test_beams_of_other_decoders(family):
    """States of all tokens, sliding windows, prefixes."""
    vlm = build(family)
    inputs = vlm.prompts(ROWS)
    how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    expected = vlm.model.generate(**inputs, **how, logits_processor=[Afresh(vlm, inputs)])
    with vlmfast.patch(vlm.model, SPEC):
        assert torch.equal(vlm.model.generate(**inputs, **how), expected)


def lengths_of_forwards(vlm: Any, inputs: dict[str, Tensor], **how: Any) -> list[int]:
    """How many tokens each forward of a patched model got."""
    lengths: list[int] = []
    with vlmfast.patch(vlm.model, SPEC):
        hook = vlm.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        try:
            vlm.model.generate(**inputs, max_new_tokens=6, **how)
        finally:
            hook.remove()
    return lengths


def test_a_step_costs_no_second_forward(vlm):
    """The branch starts once, also with beams; and not at all without a picture. See tests/test_pairing.py"""
    inputs = vlm.prompts(ROWS)
    text = max(sum(part for part in row if isinstance(part, int)) for row in ROWS[:2])
    for how in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        lengths = lengths_of_forwards(vlm, inputs, **how)
        assert lengths == [inputs["input_ids"].shape[1], text] + [1] * 5
    assert len(lengths_of_forwards(vlm, vlm.prompts([[4], [6]]), do_sample=False)) == 6


def test_drafts_that_are_thrown_away(vlm):
    inputs = vlm.prompts([[3, "a", 6]])
    how = {"max_new_tokens": 8, "do_sample": False}
    with vlmfast.patch(vlm.model, SPEC):
        expected = vlm.model.generate(**inputs, **how)
        assert torch.equal(vlm.model.generate(**inputs, **how, prompt_lookup_num_tokens=3), expected)
        assert torch.equal(vlm.model.generate(**inputs, **how, prefill_chunk_size=5), expected)


class Words(BaseStreamer):
    """Notes what streams by."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_scores_logits_and_streams(vlm):
    """Scores are log-probabilities of both, logits the model's own; rows without a picture have their own scores."""
    inputs = vlm.prompts(ROWS)
    how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    how |= {"output_logits": True, "output_scores": True}
    plain = vlm.model.generate(**inputs, **how)
    with vlmfast.patch(vlm.model, SPEC):
        found = vlm.model.generate(**inputs, **how)
        stream = Words()
        tokens = vlm.model.generate(**vlm.prompts(ROWS, only=0), max_new_tokens=4, do_sample=False, streamer=stream)
        state = set(vars(found.past_key_values))
    assert torch.equal(found.logits[0], plain.logits[0])
    torch.testing.assert_close(torch.stack(found.scores)[:, 2], torch.stack(plain.scores)[:, 2])
    for scores in found.scores:
        torch.testing.assert_close(scores[:2].exp().sum(1), torch.ones(2))
        assert scores[:2].isinf().sum() > 20
    assert stream.tokens == tokens[0].tolist()
    # What other doors note stays, nothing of the branch does.
    assert not any("branch" in name for name in state)


def test_what_is_forbidden_leaves_something_plausible(vlm):
    """The only plausible token may not come: others are chosen from then, not everything ruled out."""
    inputs = vlm.prompts(ROWS)
    width, how = inputs["input_ids"].shape[1], {"max_new_tokens": 3, "return_dict_in_generate": True}
    with vlmfast.patch(vlm.model, "pai:alpha=0,gamma=2,plausibility=1"):  # the likeliest token alone
        likeliest = vlm.model.generate(**inputs, max_new_tokens=1)[:, width].tolist()
        found = vlm.model.generate(
            **inputs, **how, do_sample=True, output_scores=True, min_new_tokens=3, eos_token_id=likeliest
        )
    assert not torch.isin(found.sequences[:, width:], torch.tensor(likeliest)).any()
    for scores in found.scores:
        assert (scores[:2] == 0).sum(1).tolist() == [1, 1], "probability 1 of one token"


def test_a_further_turn(vlm):
    """On the cache of the first one: the branch reads the whole conversation. New tokens alone do not tell it."""
    inputs = vlm.prompts([[3, "a", 4]])
    how = {"max_new_tokens": 4, "do_sample": False}
    with vlmfast.patch(vlm.model, SPEC):
        first = vlm.model.generate(**inputs, **how, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        given = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if vlm.tiny.types is not None:
            given[vlm.tiny.types] = torch.nn.functional.pad(inputs[vlm.tiny.types], (0, 7))
        expected = vlm.model.generate(**given, **how)
        cached = {name: given[name] for name in ("input_ids", "attention_mask")}  # its pictures are in the cache
        found = vlm.model.generate(**cached, **how, past_key_values=first.past_key_values)
        assert torch.equal(found, expected)
        with pytest.raises(ValueError, match="pass all of it"):
            vlm.model.generate(
                input_ids=ids[:, -3:],
                attention_mask=given["attention_mask"],
                past_key_values=DynamicCache(),
                **how,
            )
        with pytest.raises(ValueError, match="pass all of it"):
            vlm.model.generate(input_ids=ids[:, -3:], past_key_values=first.past_key_values, **how)


def test_padding_is_found_where_no_mask_is_given(vlm):
    inputs = vlm.prompts(ROWS)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    with vlmfast.patch(vlm.model, SPEC):
        expected = vlm.model.generate(**inputs, **how)
        inputs.pop("attention_mask")
        assert torch.equal(vlm.model.generate(**inputs, **how), expected)
        arguments = dict(inputs)
        assert torch.equal(vlm.model.generate(arguments.pop("input_ids"), **arguments, **how), expected)


def test_direct_calls_and_training_are_plain(vlm):
    inputs = vlm.prompts(ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    plain, loss = vlm.model(**inputs).logits, vlm.model(**inputs, labels=labels).loss
    with vlmfast.patch(vlm.model, SPEC):
        vlm.model.generate(**inputs, max_new_tokens=2)
        assert torch.equal(vlm.model(**inputs).logits, plain)
        assert torch.equal(vlm.model(**inputs, labels=labels).loss, loss)


OTHERS = ["zerotuning:gamma=4,layers=0", "vhr:layers=0", "random:keep=0.5", "fastv:keep=0.5,layer=1"]


@pytest.mark.parametrize(("vlm", "other"), crossed(CORE, OTHERS), indirect=["vlm"])
def test_beside_other_methods(vlm, other):
    """The branch is the same patched model, and what is reported is about the prompts."""
    inputs = vlm.prompts(ROWS)
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    with vlmfast.patch(vlm.model, other) as handle:
        expected = vlm.model.generate(**inputs, **how, logits_processor=[Afresh(vlm, inputs)])
        plain, alone = vlm.model.generate(**inputs, **how), handle.report()
    with vlmfast.patch(vlm.model, f"{other}+{SPEC},layers=1:") as handle:
        assert torch.equal(vlm.model.generate(**inputs, **how), expected)
        report = handle.report()
    assert not torch.equal(plain, expected)
    assert [p.per_layer for p in report.prompts] == [p.per_layer for p in alone.prompts]
    assert set(alone.notes) <= set(report.notes)
    assert any("contrasted with the same text without its pictures" in note for note in report.notes)


def test_pictures_that_were_encoded_before(vlm):
    inputs = vlm.prompts([[3, "a", 4]])
    how = {"max_new_tokens": 4, "do_sample": False}
    names = {"pixel_values", "image_grid_thw"} & set(inputs)
    images = encode_images(vlm.model, [], **{name: inputs[name] for name in names})
    with vlmfast.patch(vlm.model, f"random:keep=0.5+{SPEC}"):
        expected = vlm.model.generate(**inputs, **how)
        inputs.pop("pixel_values")
        assert torch.equal(vlm.model.generate(**inputs, **how, mm_encoder_outputs=encoder_outputs(images)), expected)


def test_a_copy_an_adapter_and_half_precision(vlm):
    """A deep copy has a branch of its own; LoRA around the model and bf16 have one, too."""
    one = build(vlm.name)
    inputs, how = one.prompts(ROWS), {"max_new_tokens": 4, "do_sample": False}
    head = one.model.get_output_embeddings().weight
    with vlmfast.patch(one.model, SPEC):
        expected = one.model.generate(**inputs, **how)
        twin = copy.deepcopy(one.model)
        with torch.no_grad():
            head.neg_()
        assert torch.equal(twin.generate(**inputs, **how), expected)
        with torch.no_grad():
            head.neg_()
    wrapped = get_peft_model(one.model, LoraConfig(target_modules=["q_proj"]))
    with vlmfast.patch(wrapped, SPEC):
        assert torch.equal(wrapped.generate(**inputs, **how), expected)
    half = build(vlm.name)
    half.model.to(torch.bfloat16)
    with vlmfast.patch(half.model, SPEC):
        assert half.model.generate(**half.prompts(ROWS), **how).shape == expected.shape


@pytest.mark.parametrize("family", ["video_llava", "llava_next_video", "qwen2_5_vl"])
def test_videos(family):
    """Placeholders of every kind go."""
    vlm = build(family)
    inputs = vlm.prompts([[3, "A", 2], [2, "b", 1, "B", 6], [4]])
    how = {"max_new_tokens": 4, "do_sample": False}
    plain = vlm.model.generate(**inputs, **how)
    expected = vlm.model.generate(**inputs, **how, logits_processor=[Afresh(vlm, inputs)])
    with vlmfast.patch(vlm.model, SPEC):
        found = vlm.model.generate(**inputs, **how)
    assert torch.equal(found, expected) and not torch.equal(found[:2], plain[:2])


def test_what_cannot_work_is_said(vlm):
    before = snapshot(vlm.model)
    with pytest.raises(NotImplementedError, match="both decode with a second branch"):
        vlmfast.patch(vlm.model, "pai:gamma=2,layers=1", "pai:gamma=3,layers=2")
    assert snapshot(vlm.model) == before
    with vlmfast.patch(vlm.model, SPEC):
        with pytest.raises(ValueError, match="row 1 is a picture alone"):
            vlm.model.generate(**vlm.prompts([[3, "a", 4], ["b"]]), max_new_tokens=2)
        embeds = vlm.model.get_input_embeddings()(torch.tensor([[4, 5]]))
        with pytest.raises(NotImplementedError, match="pai needs input_ids"):
            vlm.model.generate(inputs_embeds=embeds, max_new_tokens=2)
        vlm.model.generate(**vlm.prompts(ROWS), max_new_tokens=2)  # an error leaves nothing running
    for settings in ({"gamma": -1}, {"gamma": "x"}, {"gamma": True}, {"plausibility": 0}, {"plausibility": 2}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ImageFreeBranch("pai", **{"gamma": 2.0, **settings})
