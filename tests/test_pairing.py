"""Steps in which a branch goes through the model with its prompts: the same as two forwards, in one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import CORE, build, crossed
from test_promises import ROWS, snapshot
from torch import Tensor
from transformers import DynamicCache

import vlmfast
from vlmfast import pairing, products
from vlmfast.adapters.attention.zerotuning import ZeroTuning
from vlmfast.branches import BranchDoor
from vlmfast.edits.memory import EDITS
from vlmfast.patching import HANDLE

SPEC = "pai:gamma=2.5,plausibility=0.05,layers=all"
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
}


def door_of(model: Any) -> BranchDoor:
    """The branch's door of a patched model."""
    return next(one for one in model.__dict__[HANDLE].reporters if isinstance(one, BranchDoor))


def generate(vlm: Any, spec: str, pairs: bool, inputs: dict[str, Tensor], **how: Any) -> tuple[Any, list[int]]:
    """What a patched model generates, and how many steps were paired and how many not."""
    how = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, "output_scores": True, **how}
    torch.manual_seed(5)
    with vlmfast.patch(vlm.model, spec):
        door = door_of(vlm.model)
        door.pairs = pairs
        return vlm.model.generate(**inputs, **how), list(door.steps)


def same(found: Any, expected: Any) -> None:
    """The same tokens, for the same reasons."""
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3)
    ours, theirs = torch.stack(found.scores), torch.stack(expected.scores)
    assert torch.equal(ours.isneginf(), theirs.isneginf())
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@contextmanager
def rows_of_calls(vlm: Any, layer: int | None = None) -> Iterator[list[tuple[int, int]]]:
    """(rows, tokens) of every call of the decoder, or of one of its layers."""
    decoder = vlm.model.model.get_decoder()
    module, seen = decoder if layer is None else decoder.layers[layer], []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        seen.append(tuple(hidden.shape[:2]))

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("way", list(WAYS))
def test_the_same_as_two_forwards(any_vlm, way):
    """Every family; rows with one picture, two and none, padded; a boost in the attention of the prompts' rows."""
    inputs, before = any_vlm.prompts(ROWS), snapshot(any_vlm.model)
    expected, steps = generate(any_vlm, SPEC, False, inputs, **WAYS[way])
    assert steps == [0, 5]
    with rows_of_calls(any_vlm) as calls:
        found, steps = generate(any_vlm, SPEC, True, inputs, **WAYS[way])
    same(found, expected)
    repeat = WAYS[way].get("num_beams", WAYS[way].get("num_return_sequences", 1))
    if any_vlm.name.startswith("qwen3_5"):  # its layers hold states of all tokens
        assert steps == [0, 5] and len(calls) == 12
    else:
        assert steps == [5, 0] and calls[2:] == [(5 * repeat, 1)] * 5
    assert snapshot(any_vlm.model) == before


# Branches with a picture of their own: by the model's own attention, which is looked at in the prompts' forward alone.
PICTURED = ["agla:matcher=self,part=0.3,beta=0.05", "vcd:branch=random/keep=0.5,beta=0.05"]


SEEN = list(itertools.product([*PICTURED, f"zerotuning:gamma=4,layers=0+{PICTURED[0]}"], WAYS))


@pytest.mark.parametrize(("vlm", "both"), crossed(CORE, SEEN), indirect=["vlm"])
def test_branches_with_pictures(vlm, both):
    spec, way = both
    inputs, before = vlm.prompts(ROWS), snapshot(vlm.model)
    expected, steps = generate(vlm, spec, False, inputs, **WAYS[way])
    assert steps == [0, 5]
    found, steps = generate(vlm, spec, True, inputs, **WAYS[way])
    same(found, expected)
    assert steps == [5, 0] and snapshot(vlm.model) == before


@pytest.mark.slow
@pytest.mark.parametrize("spec", PICTURED)
def test_branches_with_pictures_on_every_family(any_vlm, spec):
    inputs = any_vlm.prompts(ROWS)
    expected, _ = generate(any_vlm, spec, False, inputs)
    found, steps = generate(any_vlm, spec, True, inputs)
    same(found, expected)
    assert steps == ([0, 5] if any_vlm.name.startswith("qwen3_5") else [5, 0])


OTHERS = ["random:keep=0.5", "zerotuning:gamma=4,layers=0", "act:layers=0", "var:layers=0"]
BOTH = list(itertools.product(["greedy", "beams"], OTHERS))


@pytest.mark.parametrize(("vlm", "both"), crossed(CORE, BOTH), indirect=["vlm"])
def test_beside_other_methods(vlm, both):
    """Each half is edited as if it were alone, and methods remember of each what they would."""
    way, other = both
    spec, inputs = f"{other}+pai:gamma=2.5,layers=1:", vlm.prompts(ROWS)
    expected, _ = generate(vlm, spec, False, inputs, **WAYS[way])
    found, steps = generate(vlm, spec, True, inputs, **WAYS[way])
    same(found, expected)
    assert steps == [5, 0]
    ours, theirs = (getattr(one.past_key_values, EDITS) for one in (found, expected))
    assert torch.equal(ours.visual, theirs.visual) and torch.equal(ours.real, theirs.real)
    torch.testing.assert_close(ours.layers, theirs.layers, rtol=1e-3, atol=1e-3)


def test_what_methods_note_is_about_the_prompts(vlm, monkeypatch):
    edit = ZeroTuning.edit

    def noting(self: ZeroTuning, call: Any) -> Tensor:
        call.note(f"{len(call.query)} rows")
        return edit(self, call)

    monkeypatch.setattr(ZeroTuning, "edit", noting)
    with vlmfast.patch(vlm.model, "zerotuning:gamma=4,layers=0+pai:gamma=2.5,layers=1:") as handle:
        vlm.model.generate(**vlm.prompts(ROWS), max_new_tokens=4)
        assert door_of(vlm.model).steps == [3, 0]
        assert [note for note in handle.report().notes if note.endswith("rows")] == ["3 rows"]


def test_the_users_cache_is_that_of_the_prompts(vlm):
    inputs = vlm.prompts(ROWS)
    expected, _ = generate(vlm, SPEC, False, inputs, output_hidden_states=True)
    found, steps = generate(vlm, SPEC, True, inputs, output_hidden_states=True)
    ours, theirs = found.past_key_values, expected.past_key_values
    assert steps == [5, 0] and type(ours) is DynamicCache and set(vars(ours)) == set(vars(theirs))
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine.values, other.values, rtol=1e-3, atol=1e-3)
    for step, others in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(step, others, rtol=1e-3, atol=1e-3)


def test_a_layer_runs_once_a_step(vlm):
    """With the rows of both; the text alone, from its second token on, and a prompt without a picture have one row."""
    inputs = vlm.prompts([[3, "a", 2]])
    with rows_of_calls(vlm, layer=1) as calls:
        generate(vlm, SPEC, True, inputs)
    assert calls == [(1, inputs["input_ids"].shape[1]), (1, 5)] + [(2, 1)] * 5
    with rows_of_calls(vlm, layer=1) as calls:
        _, steps = generate(vlm, SPEC, True, vlm.prompts([[3], [4]]))
    assert calls == [(2, 4)] + [(2, 1)] * 5 and steps == [0, 0]


@pytest.mark.parametrize(
    ("family", "eager"), crossed(["gemma3", "mistral3", "paligemma", "qwen3_vl_moe"], [False, True])
)
def test_windows_and_masks_of_all_forms(fresh, family, eager):
    """Windows that prompt and answer leave behind; eager attention, whose masks are added."""
    vlm = fresh(family)
    text = vlm.model.config.get_text_config()
    if getattr(text, "sliding_window", None) is not None:
        text.sliding_window = 6
    if eager:
        vlm.model.set_attn_implementation("eager")
    for rows in (ROWS, [[9, "a", 2]], [[5], [3, "a"]]):
        inputs = vlm.prompts(rows)
        expected, _ = generate(vlm, SPEC, False, inputs, max_new_tokens=9)
        found, steps = generate(vlm, SPEC, True, inputs, max_new_tokens=9)
        same(found, expected)
        assert steps == [8, 0]


def test_rows_that_end_earlier(vlm):
    inputs = vlm.prompts(ROWS)
    plain, _ = generate(vlm, SPEC, False, inputs)
    end = int(plain.sequences[0, -4])
    for how in WAYS.values():
        expected, _ = generate(vlm, SPEC, False, inputs, eos_token_id=end, **how)
        found, _ = generate(vlm, SPEC, True, inputs, eos_token_id=end, **how)
        same(found, expected)
    assert (generate(vlm, SPEC, True, inputs, eos_token_id=end)[0].sequences[0] == 0).any()


@pytest.mark.parametrize(
    "how", [{"cache_implementation": "static"}, {"use_cache": False}, {"output_attentions": True}]
)
def test_what_has_forwards_of_its_own(fresh, how):
    vlm = fresh("llava")
    vlm.model.set_attn_implementation("eager")
    inputs = vlm.prompts(ROWS)
    expected, _ = generate(vlm, SPEC, False, inputs, **how)
    found, steps = generate(vlm, SPEC, True, inputs, **how)
    same(found, expected)
    assert steps == [0, 5]


def test_drafts_and_further_turns(vlm):
    """Thrown away drafts start the branch again; from one token on it is paired. A further turn is, too."""
    inputs = vlm.prompts([[3, "a", 6]])
    how = {"max_new_tokens": 8, "output_logits": False, "output_scores": False}
    expected, _ = generate(vlm, SPEC, False, inputs, **how)
    found, _ = generate(vlm, SPEC, True, inputs, prompt_lookup_num_tokens=3, **how)
    assert torch.equal(found.sequences, expected.sequences)
    ids = torch.cat([expected.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    answers = []
    for pairs in (False, True):
        with vlmfast.patch(vlm.model, SPEC):
            door_of(vlm.model).pairs = pairs
            first = vlm.model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
            answers.append(
                vlm.model.generate(**turn, max_new_tokens=4, do_sample=False, past_key_values=first.past_key_values)
            )
            assert door_of(vlm.model).steps == ([3, 0] if pairs else [0, 3])
    assert torch.equal(*answers)


def test_the_report_says_how(vlm):
    inputs = vlm.prompts(ROWS)
    for pairs, how, words in ((True, {}, "in one batch"), (False, {}, "a second forward each")):
        with vlmfast.patch(vlm.model, SPEC) as handle:
            assert "in one batch with the prompts" in str(handle.report())
            door_of(vlm.model).pairs = pairs
            vlm.model.generate(**inputs, max_new_tokens=3, **how)
            assert words in str(handle.report())


def test_an_error_leaves_no_branch_behind(vlm):
    """The branch of a `generate` that failed does not join the next one."""
    inputs = vlm.prompts(ROWS)
    expected, _ = generate(vlm, SPEC, False, inputs)

    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > inputs["input_ids"].shape[1] + 1:
            raise RuntimeError("stop")
        return scores

    with vlmfast.patch(vlm.model, SPEC):
        with pytest.raises(RuntimeError, match="stop"):
            vlm.model.generate(**inputs, max_new_tokens=6, logits_processor=[fail])
        assert door_of(vlm.model).running is None
        found = vlm.model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(found, expected.sequences)


def test_half_precision_runs():
    vlm = build("qwen2_5_vl")
    vlm.model.to(torch.bfloat16)
    found, steps = generate(vlm, SPEC, True, vlm.prompts(ROWS))
    assert steps == [5, 0] and found.sequences.shape[0] == 3


@pytest.mark.parametrize(("rows", "paired"), [([[3, "a", 2]], 2), ([[3, "a", 2], [4]], 3), (ROWS, 5)])
def test_few_rows_of_large_weights(fresh, monkeypatch, rows, paired):
    """The product turned round: with a bias and without, for two rows and for three, in paired steps alone."""
    monkeypatch.setattr(products, "LARGE", 1)
    vlm = fresh("qwen2_5_vl")
    for one in vlm.model.model.get_decoder().layers:
        one.self_attn.q_proj.bias.data.normal_()
    inputs = vlm.prompts(rows)
    expected, _ = generate(vlm, SPEC, False, inputs)
    calls: list[int] = []

    def counted(call: Any) -> Any:
        return lambda x: (calls.append(len(x)), call(x))[1]

    with vlmfast.patch(vlm.model, SPEC):
        linears = [one for one in vlm.model.modules() if isinstance(getattr(one, "forward", None), products.FewRows)]
        for one in linears:
            one.forward.original = counted(one.forward.original)
        how = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
        found = vlm.model.generate(**inputs, **how)
        assert len(linears) == 3 * 7 + 1 and door_of(vlm.model).steps == [5, 0]
        paired_calls = 0 if paired in pairing.FEW else 5 * len(linears)
        assert len(calls) == 2 * len(linears) + paired_calls
        vlm.model(**inputs)
        assert len(calls) == 3 * len(linears) + paired_calls, "a direct call"
    same(found, expected)
    assert not any("forward" in vars(one) for one in vlm.model.modules())
