"""What every method that edits attention promises on every family (pruning: tests/test_promises.py).

The matrix comes from `vlmfast.adapters.support`. The fast suite runs the short form on one family of every make and
every promise on the two core families; `-m slow` runs every promise of every pair.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import CORE, KINDS, TINY, build, crossed, lend
from peft import LoraConfig, get_peft_model
from test_promises import (
    ROWS,
    generate,
    is_undone_after_an_error,
    snapshot,
    the_deep_copy_is_patched_by_itself,
)

import vlmfast
from vlmfast.adapters import ADAPTERS, from_spec, support, to_spec

# Settings under which each method changes much on a random decoder of three layers, and under which it does nothing.
STRONG: dict[str, dict[str, Any]] = {
    "act": {"layers": "all", "theta": 0.03, "beta": 0.1},
    "pai": {"layers": "all", "alpha": 3.0, "gamma": 1.0},
    "paint": {"layers": "all", "alpha": 4.0, "beta": 3.0, "gamma": 1.0},
    "var": {"layers": "all", "dims": "0/1", "tau": 1.0, "summ": 0.0, "rho": 1.0, "p": 0.0},
    "vhr": {"layers": "all", "alpha": 3.0},
    "zerotuning": {"gamma": 4.0},
}
NEUTRAL: dict[str, dict[str, Any]] = {
    "act": {"layers": "all", "beta": 1.0},
    "pai": {"alpha": 0.0, "gamma": 1.0},
    "paint": {"alpha": 0.0, "beta": 0.0, "gamma": 1.0},
    "var": {"layers": "all", "p": 1.0},
    "vhr": {"layers": "all", "alpha": 1.0},
    "zerotuning": {"gamma": 1.0},
}
EVERY_ROW = {"act", "zerotuning"}  # also prompts without a picture
WHOLE_PROMPTS = {"paint", "vhr"}  # refused in chunks: what the first chunk does depends on the rest
BY_CHUNKS = {"act"}  # what is a sink is found by and by

NAMES = [name for name, cls in ADAPTERS.items() if cls.kind == "attention"]
PAIRS = [(name, family) for name in NAMES for family in TINY if support(name, family).reason is None]
REFUSED = [(name, family) for name in NAMES for family in TINY if support(name, family).reason is not None]


def spec(name: str, family: str, settings: dict[str, Any]) -> str:
    """The method's spec on a family."""
    parts = support(name, family).needs | settings
    return name + ":" + ",".join(f"{key}={value}" for key, value in parts.items())


def strong(name: str, family: str) -> str:
    return spec(name, family, STRONG[name])


def keeps_the_short_promises(vlm, name):
    """The identity, a change, rows of a batch as if alone, generation, and nothing left behind."""
    inputs = vlm.prompts(ROWS)
    plain, before = vlm.model(**inputs).logits, snapshot(vlm.model)
    with vlmfast.patch(vlm.model, "none"):
        bare = snapshot(vlm.model)
    with vlmfast.patch(vlm.model, spec(name, vlm.name, NEUTRAL[name])):
        assert snapshot(vlm.model) == bare, "the neutral setting installs nothing"
        assert torch.equal(vlm.model(**inputs).logits, plain), "the neutral setting is the identity"
    with vlmfast.patch(vlm.model, strong(name, vlm.name)) as handle:
        logits = vlm.model(**inputs).logits[:, -1]
        for row in range(2 + (name in EVERY_ROW)):
            assert (logits[row] - plain[row, -1]).abs().max() > 1e-3, f"row {row} does not change"
        if name not in EVERY_ROW:
            torch.testing.assert_close(logits[2], plain[2, -1], rtol=1e-4, atol=1e-4)
        for row in range(len(ROWS)):
            alone = vlm.model(**vlm.prompts(ROWS, only=row)).logits[0, -1]
            torch.testing.assert_close(alone, logits[row], rtol=1e-3, atol=1e-3)
        tokens = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
        report = handle.report()
    assert snapshot(vlm.model) == before, "nothing is left behind"
    assert torch.equal(vlm.model(**inputs).logits, plain), "unpatching restores bit for bit"
    assert str(report).startswith(report.spec) and any(name in note for note in report.notes)


def generates_in_every_way(vlm, name):
    """Every decoding mode repeats itself, and a static cache gives what a growing one gives."""
    inputs = vlm.prompts(ROWS)
    width = inputs["input_ids"].shape[1]
    with vlmfast.patch(vlm.model, strong(name, vlm.name)):
        greedy = generate(vlm.model, inputs, do_sample=False)[:, width:]
        for how in (
            {"num_beams": 3, "do_sample": False},
            {"do_sample": True},
            {"do_sample": True, "num_return_sequences": 2},
            {"do_sample": False, "use_cache": False},
        ):
            first = generate(vlm.model, inputs, **how)[:, width:]
            assert first.shape[1] == 5
            assert torch.equal(first, generate(vlm.model, inputs, **how)[:, width:])
        static = generate(vlm.model, inputs, do_sample=False, cache_implementation="static")[:, width:]
        assert torch.equal(static, greedy)
        for row in range(3):
            alone = vlm.prompts(ROWS, only=row)
            assert torch.equal(generate(vlm.model, alone, do_sample=False)[0, -5:], greedy[row])


def decodes_as_it_prefills(vlm, name):
    """A decoding loop by hand on the cache that a call returned gives what `generate` gives."""
    inputs = vlm.prompts([[3, "a", 4]])
    with vlmfast.patch(vlm.model, strong(name, vlm.name)):
        expected = generate(vlm.model, inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        output = vlm.model(**inputs)
        suppressed = vlm.model.generation_config.suppress_tokens
        mask, found = inputs["attention_mask"], []
        for _ in range(5):
            logits = output.logits[:, -1].index_fill(1, torch.tensor(suppressed), -torch.inf)
            found.append(logits.argmax(-1, keepdim=True))
            mask = torch.cat([mask, mask[:, :1]], dim=1)
            more = {"token_type_ids": torch.zeros(1, 1).long()} if vlm.tiny.types == "token_type_ids" else {}
            positions = None
            if hasattr(vlm.model.base_model, "get_rope_index"):
                last = vlm.model.model.rope_deltas + mask.shape[1] - 1
                positions = last.view(1, 1, 1).expand(3, 1, 1)
            output = vlm.model(
                input_ids=found[-1],
                attention_mask=mask,
                past_key_values=output.past_key_values,
                position_ids=positions,
                **more,
            )
        assert torch.equal(torch.cat(found, dim=1), expected)


def takes_prompts_in_chunks(vlm, name):
    inputs = vlm.prompts([[3, "a", 4]])
    if vlm.name == "paligemma":  # sees its whole prompt in both directions: chunks change the unpatched model, too
        return
    with vlmfast.patch(vlm.model, strong(name, vlm.name)):
        if name in WHOLE_PROMPTS:
            with pytest.raises(NotImplementedError, match="chunk"):
                generate(vlm.model, inputs, do_sample=False, prefill_chunk_size=5)
            return
        whole = generate(vlm.model, inputs, do_sample=False)
        parts = generate(vlm.model, inputs, do_sample=False, prefill_chunk_size=5)
        assert torch.equal(parts, whole) or (name in BY_CHUNKS and parts.shape == whole.shape)


def joins_with_pruning(vlm, name):
    """Behind methods that drop tokens before the language model and inside it, rows are still as if alone."""
    inputs = vlm.prompts(ROWS)
    first = 3 if vlm.name.startswith("qwen3_vl") else 1
    both = "random:keep=0.6" if vlm.name.startswith("qwen3") else f"random:keep=0.6+fastv:keep=0.5,layer={first}"
    with vlmfast.patch(vlm.model, both):
        pruned = vlm.model(**inputs).logits[:, -1]
    with vlmfast.patch(vlm.model, f"{strong(name, vlm.name)}+{both}") as handle:
        logits = vlm.model(**inputs).logits[:, -1]
        assert (logits[:2] - pruned[:2]).abs().amax(-1).min() > 1e-3
        tokens = generate(vlm.model, inputs, do_sample=False)[:, -5:]
        for row in range(3):
            alone = vlm.prompts(ROWS, only=row)
            torch.testing.assert_close(vlm.model(**alone).logits[0, -1], logits[row], rtol=1e-3, atol=1e-3)
            assert torch.equal(generate(vlm.model, alone, do_sample=False)[0, -5:], tokens[row])
        assert handle.report().share is not None


def undoes_after_an_error(vlm, name):
    is_undone_after_an_error(vlm, strong(name, vlm.name))


def a_deep_copy_is_patched_by_itself(vlm, name):
    the_deep_copy_is_patched_by_itself(vlm, strong(name, vlm.name), ROWS)


def works_in_bf16(vlm, name):
    half = build(vlm.name)
    half.model.to(torch.bfloat16)
    inputs = half.prompts(ROWS)
    with vlmfast.patch(half.model, strong(name, vlm.name)):
        assert half.model(**inputs).logits.isfinite().all()
        assert generate(half.model, inputs, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 5


def trains_with_lora(vlm, name):
    """Gradients reach the adapters, and checkpoints change nothing of them."""
    one = build(vlm.name)
    inputs = one.prompts([[3, "a", 4]])
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    model = get_peft_model(one.model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with vlmfast.patch(model, strong(name, vlm.name)):
        model.eval()
        model(**inputs, labels=labels).loss.backward()
        grads = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    decoder = {key: grad for key, grad in grads.items() if "lora" in key and "vision" not in key}
    assert decoder and all(grad.isfinite().all() for grad in grads.values())
    assert any(grad.abs().max() > 0 for grad in decoder.values())


def is_saved_and_loaded_back(vlm, name, tmp_path):
    one = build(vlm.name)
    inputs = one.prompts(ROWS)
    with vlmfast.patch(one.model, strong(name, vlm.name)) as handle:
        edited = one.model(**inputs).logits
        one.model.save_pretrained(tmp_path / "patched")
    loaded = vlmfast.from_pretrained(tmp_path / "patched").eval()
    assert loaded.vlmfast_handle.spec == handle.spec
    torch.testing.assert_close(loaded(**inputs).logits, edited)


PROMISES = {
    promise.__name__: promise
    for promise in (
        generates_in_every_way,
        decodes_as_it_prefills,
        takes_prompts_in_chunks,
        joins_with_pruning,
        undoes_after_an_error,
        a_deep_copy_is_patched_by_itself,
        works_in_bf16,
        trains_with_lora,
    )
}


def cases(promises=(None,)):
    """Test parameters (method, family, promise); slow unless short, or on a core family, by turns of the methods."""
    found = []
    for name, family in PAIRS:
        for number, promise in enumerate(promises):
            turn = family == CORE[(NAMES.index(name) + number) % len(CORE)]
            marks = () if turn or (promise is None and family in KINDS) else (pytest.mark.slow,)
            text = "-".join(filter(None, (name, family, promise)))
            found.append(pytest.param(name, family, promise, marks=marks, id=text))
    return found


@pytest.fixture
def lent(request):
    """The model of the family that the test's parameter names."""
    yield from lend(request.getfixturevalue("family"))


def test_every_method_has_its_settings():
    assert set(STRONG) == set(NEUTRAL) == set(NAMES)


@pytest.mark.parametrize(("name", "family", "promise"), cases())
def test_short_promises(lent, name, family, promise):
    keeps_the_short_promises(lent, name)


@pytest.mark.parametrize(("name", "family", "promise"), cases(PROMISES))
def test_promise(lent, name, family, promise):
    PROMISES[promise](lent, name)


@pytest.mark.parametrize(("family", "name"), crossed(CORE, NAMES))
def test_saved_and_loaded_back(lent, name, family, tmp_path):
    is_saved_and_loaded_back(lent, name, tmp_path)


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(name, family, lent):
    before = snapshot(lent.model)
    with pytest.raises(NotImplementedError) as error:
        vlmfast.patch(lent.model, name)
    assert support(name, family).reason in str(error.value)
    assert snapshot(lent.model) == before


@pytest.mark.parametrize("name", NAMES)
def test_specs_round_trip(name):
    adapters = from_spec(strong(name, "llava"))
    assert from_spec(to_spec(adapters)) == adapters
