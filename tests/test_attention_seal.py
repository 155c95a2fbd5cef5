"""SEAL: the vector by hand, the steered model beside one with a plain hook, and files that do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from steering_file import TOKENS, steering_file
from test_edits import ROWS
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import vlmfast
from vlmfast import steering
from vlmfast.adapters import ADAPTERS, support
from vlmfast.adapters.attention.seal import SEAL
from vlmfast.eval.planning import named
from vlmfast.families import FAMILIES
from vlmfast.steering import SteeringVector, extract, kind_of


@contextmanager
def hooked(model: Any, layer: int, shift: Tensor, where: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """An unpatched model whose layer adds `shift` where `where(ids)` says: bool [B, L]."""
    seen: list[Tensor] = []

    def before(base, args, kwargs):
        seen[:] = [kwargs["input_ids"] if "input_ids" in kwargs else args[0]]

    def after(module, args, output):
        mask = where(seen[0])[:, -output.shape[1] :]
        return torch.where(mask[..., None], output + shift.to(output), output)

    hooks = [
        model.model.register_forward_pre_hook(before, with_kwargs=True),
        model.model.get_decoder().layers[layer].register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ends_a_thought(ids: Tensor) -> Tensor:
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in TOKENS:
        found |= ids == token
    return found


def generate(model: Any, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    tokens = model.generate(**inputs, max_new_tokens=6, **({"do_sample": False} | how))
    return tokens[:, inputs["input_ids"].shape[1] :]


# --- steering ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_seal_equals_a_plain_hook(any_vlm, tmp_path, how):
    """A padded batch, with and without caches, against each row alone and computed anew in every step."""
    model, layer, coef = any_vlm.model, 1, 0.7
    inputs = any_vlm.prompts(ROWS)
    file = steering_file(model, tmp_path / "v", layer)
    shift = coef * SteeringVector.load(file).vector
    plain = generate(model, inputs, **how)
    expected = []
    for row in range(3):
        alone = any_vlm.prompts(ROWS, only=row)
        prompt = alone["input_ids"].shape[1]

        def where(ids, prompt=prompt):
            return ends_a_thought(ids) & (torch.arange(ids.shape[1]) >= prompt - 1)

        with hooked(model, layer, shift, where):
            expected.append(generate(model, alone, use_cache=False, **how)[0])
    with vlmfast.patch(model, SEAL(vector=file, coef=coef)):
        caches = ({}, {"cache_implementation": "static"}, {"use_cache": False})
        found = [generate(model, inputs, **how, **cache) for cache in (caches if not how else caches[:1])]
    assert all(torch.equal(one, torch.stack(expected)) for one in found)
    assert (found[0] != plain).any(), "else nothing would be seen"


def test_only_the_end_of_a_prompt_is_steered(vlm, tmp_path):
    file = steering_file(vlm.model, tmp_path / "v", 0)
    inputs = vlm.prompts(ROWS)
    for last in (TOKENS[3], TOKENS[3] + 1):
        inputs["input_ids"][:, -1] = last
        plain = vlm.model(**inputs).logits
        with vlmfast.patch(vlm.model, SEAL(vector=file)):
            logits = vlm.model(**inputs).logits
        assert torch.equal(logits[:, :-1], plain[:, :-1])
        moved = (logits[:, -1] - plain[:, -1]).abs().amax(-1)
        assert (moved > 1e-2).all() if last in TOKENS else torch.equal(logits, plain)


@pytest.mark.parametrize("how", [{"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 2}], ids=["chunks", "drafts"])
def test_whatever_comes_at_once(vlm, tmp_path, how):
    file = steering_file(vlm.model, tmp_path / "v")
    inputs = vlm.prompts([[3, "a", 9]])
    with vlmfast.patch(vlm.model, SEAL(vector=file)):
        assert torch.equal(generate(vlm.model, inputs, **how), generate(vlm.model, inputs))


def test_behind_layers_that_lose_tokens(vlm, tmp_path):
    file, inputs = steering_file(vlm.model, tmp_path / "v", 2), vlm.prompts(ROWS)
    shift, pruned = SteeringVector.load(file).vector, "random:keep=0.6+fastv:keep=0.5,layer=1"

    def where(ids):
        return ends_a_thought(ids) & (torch.arange(ids.shape[1]) == ids.shape[1] - 1)

    inputs["input_ids"][:, -1] = TOKENS[0]
    with vlmfast.patch(vlm.model, pruned):
        plain = vlm.model(**inputs).logits[:, -1]
        with hooked(vlm.model, 2, shift, where):
            logits, expected = vlm.model(**inputs).logits[:, -1], generate(vlm.model, inputs)
    assert ((logits - plain).abs().amax(1) > 1e-2).all()
    with vlmfast.patch(vlm.model, f"{pruned}+seal:vector={file}") as handle:
        assert torch.equal(vlm.model(**inputs).logits[:, -1], logits)
        assert torch.equal(generate(vlm.model, inputs), expected)
        assert handle.report().share < 1


def test_beside_an_edit_of_the_same_layer(vlm, tmp_path):
    file, inputs = steering_file(vlm.model, tmp_path / "v", 1), vlm.prompts(ROWS[:2])
    shift = SteeringVector.load(file).vector
    inputs["input_ids"][:, -1] = TOKENS[0]
    with vlmfast.patch(vlm.model, "vhr:layers=1"):
        alone = vlm.model(**inputs).logits
        with hooked(vlm.model, 1, shift, lambda ids: torch.arange(ids.shape[1]).expand_as(ids) == ids.shape[1] - 1):
            expected = vlm.model(**inputs).logits
    for spec in (f"vhr:layers=1+seal:vector={file}", f"seal:vector={file}+vhr:layers=1"):
        with vlmfast.patch(vlm.model, spec) as handle:
            logits = vlm.model(**inputs).logits
            notes = " ".join(handle.report().notes)
        assert torch.equal(logits, expected) and not torch.equal(logits, alone)
        assert "vhr: edits" in notes and "seal: 1 times a vector of length 20 behind layer 1 of 3" in notes


def test_nothing_is_left_behind_and_copies_stand_alone(fresh, tmp_path):
    one = fresh("llava")
    file, inputs = steering_file(one.model, tmp_path / "v"), one.prompts(ROWS)
    inputs["input_ids"][:, -1] = TOKENS[0]
    plain, hooks = one.model(**inputs).logits, [len(module._forward_hooks) for module in one.model.modules()]
    with vlmfast.patch(one.model, f"seal:coef=0,vector={file}") as handle:
        assert [len(module._forward_hooks) for module in one.model.modules()] == hooks and not handle.report().notes
    with vlmfast.patch(one.model, SEAL(vector=file, layer=-1)):
        steered = one.model(**inputs).logits
        twin = copy.deepcopy(one.model)
    assert torch.equal(one.model(**inputs).logits, plain) and not torch.equal(steered, plain)
    assert torch.equal(twin(**inputs).logits, steered)
    half = one.model.to(torch.bfloat16)
    with vlmfast.patch(half, SEAL(vector=file)):
        assert half(**inputs).logits.dtype == torch.bfloat16


def test_saved_and_loaded_back(fresh, tmp_path):
    one = fresh("llava")
    inputs = one.prompts(ROWS)
    inputs["input_ids"][:, -1] = TOKENS[0]
    with vlmfast.patch(one.model, SEAL(vector=steering_file(one.model, tmp_path / "v"), coef=0.5)) as handle:
        steered = one.model(**inputs).logits
        one.model.save_pretrained(tmp_path / "patched")
    loaded = vlmfast.from_pretrained(tmp_path / "patched").eval()
    assert loaded.vlmfast_handle.spec == handle.spec == f"seal:vector={tmp_path / 'v'},coef=0.5"
    torch.testing.assert_close(loaded(**inputs).logits, steered)


def test_gradients_pass(fresh, tmp_path):
    one = fresh("llava")
    inputs = one.prompts(ROWS[:1])
    inputs["input_ids"][:, -1] = TOKENS[0]
    with vlmfast.patch(one.model, SEAL(vector=steering_file(one.model, tmp_path / "v"))):
        one.model(**inputs).logits[:, -1].sum().backward()
    assert one.model.get_input_embeddings().weight.grad.abs().sum() > 0


# --- making a vector ---------------------------------------------------------------------------------------------

WORDS = ["<unk>", "<think>", "</think>", "Wait", "Alternatively", "compute", "then", "verify", "the", "sum", "is", "7"]
WORDS += ["done", "question", ":", "so"]
VOCABULARY = {word: number for number, word in enumerate([*WORDS, "\n\n", ".\n\n", "\n", "."])}


def words(vocabulary: dict[str, int] = VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, blank lines and a full stop with a blank line among them."""
    tokens = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    pieces = [Split(" ", "removed"), Split(Regex(r"\.?\n+"), "isolated"), Split(Regex("</?think>"), "isolated")]
    tokens.pre_tokenizer = Sequence(pieces)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>")


TRACES = [
    "question :\n\n so <think>compute the sum.\n\nthen the sum is 7\n\nWait verify the sum\n\n\nso done.\n\n</think>"
    "done\n\nthen",
    "compute the sum\n\nAlternatively compute the sum.\n\nthen done",
]
# (trace, words before the token, kind of what follows): "\n\n\n" is no word of this vocabulary
BY_HAND = [
    (0, "question :\n\n so <think> compute the sum", "execution"),
    (0, "question :\n\n so <think> compute the sum.\n\n then the sum is 7", "reflection"),
    (1, "compute the sum", "transition"),
    (1, "compute the sum\n\n Alternatively compute the sum", "execution"),
]


def left(model: Any, layer: int, given: dict[str, Tensor]) -> Tensor:
    """What leaves a layer."""
    seen: list[Tensor] = []
    hook = model.model.get_decoder().layers[layer].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(**given)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("layer", [1, -1])
def test_extraction_by_hand(any_vlm, tmp_path, layer):
    model, tokenizer = any_vlm.model, words()
    depth = len(model.model.get_decoder().layers)
    made = extract(model, tokenizer, TRACES, layer=layer)
    assert made.tokens == (VOCABULARY["\n\n"], VOCABULARY[".\n\n"]) and made.layer == layer % depth
    assert made.counts == {"reflection": 1, "transition": 1, "execution": 2}
    states: dict[str, list[Tensor]] = {"execution": [], "other": []}
    for _, before, kind in BY_HAND:
        ids = tokenizer(before)["input_ids"]
        follows = VOCABULARY["\n\n"] if before.endswith("7") or before == "compute the sum" else VOCABULARY[".\n\n"]
        given = {"input_ids": torch.tensor([[*ids, follows]]), "attention_mask": torch.ones(1, len(ids) + 1).long()}
        if any_vlm.name == "paligemma":
            given["token_type_ids"] = torch.ones_like(given["input_ids"])  # written by itself: token after token
        hidden = left(model, layer, given)[0, -1]
        states["execution" if kind == "execution" else "other"].append(hidden)
    expected = torch.stack(states["execution"]).mean(0) - torch.stack(states["other"]).mean(0)
    torch.testing.assert_close(made.vector, expected, rtol=1e-3, atol=1e-4)
    made.save(tmp_path / "v")
    loaded = SteeringVector.load(tmp_path / "v")
    assert torch.equal(loaded.vector, made.vector)
    assert (loaded.layer, loaded.tokens, loaded.counts) == (made.layer, made.tokens, made.counts)
    with vlmfast.patch(model, f"seal:vector={tmp_path / 'v'}") as handle:
        assert "made from 1 of reflection, 1 of transition, 2 of execution" in handle.report().notes[-1]


def test_a_processor_will_do(vlm):
    class Processor:
        tokenizer = words()

    assert torch.equal(
        extract(vlm.model, Processor(), TRACES, 1).vector, extract(vlm.model, words(), TRACES, 1).vector
    )


def test_extraction_leaves_the_model_alone(vlm):
    inputs = vlm.prompts(ROWS[:1])
    plain = vlm.model(**inputs).logits
    deltas = getattr(vlm.model.model, "rope_deltas", None)
    extract(vlm.model, words(), TRACES, 1)
    assert getattr(vlm.model.model, "rope_deltas", None) is deltas
    assert torch.equal(vlm.model(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("thought", "kind"),
    [
        ("Wait, that is 7", "reflection"),
        ("\n wait", "reflection"),
        ("I await it", "execution"),
        ("Let me check this", "reflection"),
        ("Hold on.", "reflection"),
        ("so it's correct", "reflection"),
        ("Alternatively, I verify", "reflection"),
        ("Alternatively, add", "transition"),
        ("try Another Approach", "transition"),
        ("think differenly", "transition"),
        ("the sum is 7", "execution"),
    ],
)
def test_kinds_of_thoughts(thought, kind):
    assert kind_of(thought) == kind


def test_what_no_vector_can_be_made_from(vlm):
    tokenizer = words()
    for traces, said in (
        (["the sum\n\nthen 7\n\nthen done"], "2 thoughts of execution, 0 of reflection and 0 of transition"),
        (["the sum\n\nWait verify"], "0 thoughts of execution, 1 of reflection"),
        (["the sum"], "1 traces with 0 thoughts of execution"),
        ([], "0 traces"),
    ):
        with pytest.raises(ValueError, match=said):
            extract(vlm.model, tokenizer, traces, 1)
    with pytest.raises(ValueError, match="layer=20: this decoder has layers 0 to 2"):
        extract(vlm.model, tokenizer, TRACES)
    without = words({word: n for n, word in enumerate([*WORDS, "\n"])})
    with pytest.raises(ValueError, match="no token of this vocabulary contains .* another separator"):
        extract(vlm.model, without, TRACES, 1)
    lines = ["the sum\nthen done\nWait verify"]
    assert extract(vlm.model, without, lines, 1, separator="\n").counts["reflection"] == 1


# --- files and settings ------------------------------------------------------------------------------------------


def test_files_that_do_not_fit(vlm, tmp_path):
    model = vlm.model
    narrow = SteeringVector(torch.randn(7), 1, (5,), {}, "another")
    narrow.save(tmp_path / "narrow")
    save_file({"vector": torch.ones(32)}, str(tmp_path / "other"))
    (tmp_path / "text").write_text("no tensors")
    deep = steering_file(model, tmp_path / "deep", layer=20)
    for settings, said in (
        ({}, "seal needs vector=FILE.*vlmfast.steering.extract"),
        ({"vector": str(tmp_path / "nowhere")}, "nowhere: no steering vector.*extract"),
        ({"vector": str(tmp_path / "text")}, "text: no steering vector"),
        ({"vector": str(tmp_path / "other")}, "other: a safetensors file, but no steering vector"),
        ({"vector": str(tmp_path / "narrow")}, "width 7 for hidden states of width 32.*another"),
        ({"vector": deep}, "layer=20: this decoder has layers 0 to 2"),
        ({"vector": deep, "layer": -4}, "layer=-4: this decoder"),
    ):
        with pytest.raises(ValueError, match=said):
            vlmfast.patch(model, SEAL(**settings))
        assert "vlmfast_handle" not in model.__dict__
    for settings in ({"coef": "x"}, {"coef": True}, {"coef": float("nan")}, {"layer": 1.5}, {"layer": True}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            SEAL(**settings)


def test_hidden_ids_are_refused(vlm, tmp_path):
    embeds = vlm.model.get_input_embeddings()(torch.tensor([[5, 6]]))
    file = steering_file(vlm.model, tmp_path / "v")
    with vlmfast.patch(vlm.model, SEAL(vector=file)), pytest.raises(NotImplementedError, match="seal needs input_ids"):
        vlm.model(inputs_embeds=embeds)


def test_every_family_is_told_that_a_file_is_needed():
    for family in FAMILIES:
        assert support("seal", family).reason is None and support("seal", family).needs == {"vector": "FILE"}
        assert not any(spec.startswith("seal") for spec in named(["all"], family))
    assert ADAPTERS["seal"] is SEAL and steering.FORMAT.endswith("1")
