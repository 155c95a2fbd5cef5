"""Composite attention (EE-MLLM): against explicit masks and plain loops, what it really multiplies, and promises."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from typing import Any

import pytest
import test_promises_attention as promises
import torch
from attention_oracle import full_maps
from conftest import KINDS, TINY, build, lend
from test_promises import ROWS, snapshot
from tiny import IMAGE, VIDEO, Tiny, make, text_settings
from tiny_llava import clip, square
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig

import vlmfast
from vlmfast.adapters import EEMLLM, from_spec, support, to_spec
from vlmfast.composite import MEANING, UPDATES
from vlmfast.decoders import WHOLE, Parts, decoder
from vlmfast.ranking import Ranking
from vlmfast.solving import cost_of

FAMILIES = [name for name in TINY if support("eemllm", name).reason is None]
# Of every make of decoder what differs there: gates, experts, positions with three axes, deepstack.
FAST = {("llava", update) for update in UPDATES} | {("qwen3_5", "self"), ("qwen3_vl", "none"), ("qwen2_5_vl", "ffn")}
EVERYWHERE = [
    pytest.param(family, update, marks=() if (family, update) in FAST else pytest.mark.slow, id=f"{family}-{update}")
    for family in FAMILIES
    for update in UPDATES
]


@pytest.fixture
def llava():
    """The plainest family."""
    yield from lend("llava")


def visual_of(inputs: dict[str, Any]) -> torch.Tensor:
    """Which tokens are visual. bool [B, L]"""
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def attending(model: Any) -> list[int]:
    return [n for n, layer in enumerate(model.model.get_decoder().layers) if hasattr(layer, "self_attn")]


@contextmanager
def oracle(model: Any, update: str, layers: list[int], visual: torch.Tensor):
    """The unpatched model with full maps, and everything computed that the method skips. visual: bool [B, L]"""
    hooks, decoder_layers = [], model.model.get_decoder().layers

    def diagonal(layer, scores, hidden):
        if layer not in layers or update != "self":
            return scores
        itself = torch.eye(scores.shape[-1], dtype=torch.bool)
        return scores.masked_fill(visual[:, None, :, None] & ~itself, -torch.inf)

    def without_attention(module, args, output):
        return (output[0].masked_fill(visual[..., None], 0.0), *output[1:])

    def frozen(module, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        return torch.where(visual[..., None], before, output)

    for number in layers:
        layer = decoder_layers[number]
        if update == "ffn":
            hooks.append(layer.self_attn.register_forward_hook(without_attention))
        if update == "none":
            hooks.append(layer.register_forward_hook(frozen, with_kwargs=True))
    try:
        with full_maps(model, diagonal, before_softmax=True):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def spec(update: str, layers: str = "all") -> str:
    return f"eemllm:layers={layers},visual_update={update}"


def close(ours: torch.Tensor, theirs: torch.Tensor, real: torch.Tensor) -> None:
    torch.testing.assert_close(ours[real], theirs[real], rtol=2e-4, atol=2e-4)


# --- against full maps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "update"), EVERYWHERE)
def test_equals_the_whole_model_with_everything_computed(family, update):
    """Prefill of a ragged batch on either side, and tokens decoded from its cache."""
    for vlm in lend(family):
        equals_the_whole_model(vlm, update)


def equals_the_whole_model(one_vlm, update):
    model, layers = one_vlm.model, attending(one_vlm.model)
    for side in ("left", "right"):
        inputs = one_vlm.prompts(ROWS, side=side)
        real, visual = inputs["attention_mask"].bool(), visual_of(inputs)
        with torch.no_grad():
            plain = model(**inputs).logits
            with oracle(model, update, layers, visual):
                expected = model(**inputs).logits
            with vlmfast.patch(model, spec(update)):
                found = model(**inputs).logits
        close(found, expected, real)
        assert (found - plain)[0, -1 if side == "left" else real[0].sum() - 1].abs().max() > 1e-2
    whole = one_vlm.prompts([[3, "a", 9]])
    cut = {k: v[:, :-4] if v.shape == whole["input_ids"].shape else v for k, v in whole.items()}
    with torch.no_grad(), vlmfast.patch(model, spec(update)):
        forced = vlmfast.patching.unwrap(model).generate(
            **cut, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    ids = torch.cat([cut["input_ids"], forced.sequences[:, -4:]], dim=1)
    longer = {**whole, "input_ids": ids}
    with torch.no_grad(), oracle(model, update, layers, visual_of(longer)):
        expected = model(**longer).logits
    close(torch.stack(forced.logits, 1), expected[:, -5:-1], torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("update", ["self", "none"])
def test_sliding_windows(update):
    """Layers that have forgotten part of the prompt, also in chunks and in a static cache."""

    def sliding():
        text = MistralConfig(**text_settings(), sliding_window=9)
        settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
        config = LlavaConfig(text_config=text, vision_config=clip(), image_token_id=IMAGE, **settings)
        return LlavaForConditionalGeneration(config)

    vlm = make("llava", Tiny(sliding, square))
    equals_the_whole_model(vlm, update)
    inputs, found = vlm.prompts(ROWS), []
    with vlmfast.patch(vlm.model, spec(update)):
        for how in ({}, {"prefill_chunk_size": 7}, {"cache_implementation": "static"}):
            found.append(vlm.model.generate(**inputs, max_new_tokens=5, do_sample=False, **how))
    assert all(torch.equal(one, found[0]) for one in found[1:])


@pytest.mark.parametrize("update", UPDATES)
def test_some_layers(vlm, update):
    inputs = vlm.prompts(ROWS)
    with torch.no_grad():
        with oracle(vlm.model, update, [1], visual_of(inputs)):
            expected = vlm.model(**inputs).logits
        with vlmfast.patch(vlm.model, spec(update, "1")) as handle:
            found = vlm.model(**inputs).logits
            notes = handle.report().notes
    close(found, expected, inputs["attention_mask"].bool())
    assert "eemllm: edits the attention of layers 1 of 3" in notes and any(MEANING[update] in note for note in notes)


@pytest.mark.parametrize("update", UPDATES)
def test_one_layer_in_plain_loops(update):
    """The equations of the method's docstring, token by token and head by head, in a layer of LLaVA."""
    model, inputs = build("llava").model, build("llava").prompts([[3, "a", 4]])
    layer, seen = model.model.get_decoder().layers[1], {}
    layer.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(
            before=args[0], after=output, rotary=kwargs["position_embeddings"]
        ),
        with_kwargs=True,
    )
    with torch.no_grad(), vlmfast.patch(model, spec(update, "1")):
        model(**inputs)
        attention, visual = layer.self_attn, visual_of(inputs)[0]
        hidden, (cos, sin) = seen["before"][0], (one[0] for one in seen["rotary"])
        normed = layer.input_layernorm(hidden)
        heads, width = 4, 8

        def rotated(x, place):
            turned = torch.cat([-x[width // 2 :], x[: width // 2]])
            return x * cos[place] + turned * sin[place]

        def linear(name, x):  # past what the patch puts in its place
            return torch.nn.functional.linear(x, getattr(attention, name).weight)

        for row in range(len(hidden)):
            found = hidden[row]
            if not visual[row]:
                parts = []
                for head in range(heads):
                    mine, shared = slice(head * width, (head + 1) * width), head // 2
                    theirs = slice(shared * width, (shared + 1) * width)
                    query = rotated(linear("q_proj", normed[row])[mine], row)
                    scores = [
                        float(query @ rotated(linear("k_proj", normed[key])[theirs], key)) / math.sqrt(width)
                        for key in range(row + 1)
                    ]
                    weights = torch.tensor(scores).softmax(0)
                    parts.append(sum(w * linear("v_proj", normed[k])[theirs] for k, w in enumerate(weights)))
                found = found + linear("o_proj", torch.cat(parts))
            elif update == "self":
                value = linear("v_proj", normed[row]).view(2, width)
                found = found + linear("o_proj", torch.cat([value[head // 2] for head in range(heads)]))
            if not visual[row] or update != "none":
                mlp, x = layer.mlp, layer.post_attention_layernorm(found)
                gate, up = (torch.nn.functional.linear(x, one.weight) for one in (mlp.gate_proj, mlp.up_proj))
                found = found + torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, mlp.down_proj.weight)
            torch.testing.assert_close(seen["after"][0, row], found, rtol=1e-4, atol=1e-4)


def test_frozen_visual_tokens_leave_the_layer_as_they_came():
    model, inputs = build("qwen2_5_vl").model, build("qwen2_5_vl").prompts(ROWS)
    seen = {}
    model.model.get_decoder().layers[0].register_forward_hook(
        lambda module, args, output: seen.update(before=args[0], after=output)
    )
    with torch.no_grad(), vlmfast.patch(model, spec("none")):
        model(**inputs)
    visual = visual_of(inputs)
    assert torch.equal(seen["after"][visual], seen["before"][visual])
    text = inputs["attention_mask"].bool() & ~visual
    assert not torch.isclose(seen["after"][text], seen["before"][text]).all(-1).any()


# --- what is multiplied --------------------------------------------------------------------------------------------


def counted(model: Any, inputs: dict[str, Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    return counter.get_total_flops()


@pytest.mark.parametrize(("family", "update"), EVERYWHERE)
def test_flops_fall_by_what_the_cost_model_says(family, update, fresh):
    """Eager attention, torch's own counter: two pictures in one prompt, to the last unit; also of a pruned prompt."""
    one = fresh(family)
    model, inputs = one.model, one.prompts([[3, "a", 2, "b", 6]])
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    (method,) = methods = from_spec(spec(update))
    visual = int(visual_of(inputs).sum())
    text = inputs["input_ids"].shape[1] - visual
    layers = decoder(model.config).layers
    parts = method.visual_parts(decoder(model.config))
    assert list(parts) == attending(model)
    before, after = (
        sum(
            int(layer.flops(text + visual, text + visual, visual, some.get(n, WHOLE)))
            for n, layer in enumerate(layers)
        )
        for some in ({}, parts)
    )
    plain = counted(model, inputs)
    with vlmfast.patch(model, method) as handle:
        assert plain - counted(model, inputs) == before - after > 0
        assert f"eemllm: prefill of the decoder {after / before:.1%} of plain FLOPs (X2)" in handle.report().notes
    pruner = from_spec("random:keep=0.5")
    with vlmfast.patch(model, *pruner):
        shorter = counted(model, inputs)
    with vlmfast.patch(model, *pruner, method) as handle:
        shortest, report = counted(model, inputs), handle.report()
    (prompt,) = report.prompts
    sizes = [picture.size for picture in prompt.pictures]
    before, after = (
        cost_of(model.config, some, prompt.text, sizes, prompt.per_layer) for some in (pruner, (*pruner, *methods))
    )
    assert shorter - shortest == before.prefill - after.prefill > 0
    assert after.kv_bytes == before.kv_bytes and after.decode == before.decode
    assert report.share == after.total_prefill / cost_of(model.config, (), prompt.text, sizes).total_prefill


def test_the_report_tells_of_whole_prompts(vlm):
    """In chunks, and where each step runs the whole sequence again."""
    inputs, lines = vlm.prompts([[3, "a", 4]]), []
    with vlmfast.patch(vlm.model, "eemllm") as handle:
        for how in ({}, {"prefill_chunk_size": 5}, {"use_cache": False}, {"num_beams": 2}):
            vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False, **how)
            lines.append(handle.report().notes[-1])
    assert len(set(lines)) == 1 and "prefill of the decoder" in lines[0]


def test_shares_of_a_picture():
    """What each way skips, in a decoder of full size: of 576 visual and 48 text tokens of Qwen2-0.5B."""
    from vlmfast.eval.bench import SHAPES

    config = SHAPES["llava-0.5b"].config()
    layer = decoder(config).layers[0]
    whole = layer.flops(624, 624)
    width, query, ff = 896, 896, 4864
    expected = {
        "self": 576 * (2 * width * query + 4 * query * 624),
        "ffn": 576 * (4 * width * query + 4 * query * 624),
        "none": 576 * (4 * width * query + 4 * query * 624 + 6 * width * ff),
    }
    for update, saved in expected.items():
        assert whole - layer.flops(624, 624, 576, UPDATES[update]) == saved
    assert layer.flops(624, 624, 576, WHOLE) == layer.flops(624, 624, 576, Parts()) == whole


def test_flops_are_solved_for_beside_it():
    """A budget takes into account what composite attention saves."""
    model = build("llava").model
    with vlmfast.patch(model, "random", "eemllm:visual_update=none", flops=0.7) as handle:
        both = handle.adapters[0].keep
    with vlmfast.patch(model, "random", flops=0.7) as handle:
        assert handle.adapters[0].keep < both


# --- what it does not touch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["none", "", None])
def test_no_layers_install_nothing(vlm, layers):
    method = EEMLLM(layers=layers)
    assert method.neutral and to_spec([method]) == "eemllm:layers=none"
    assert from_spec("eemllm:layers=none") == from_spec("eemllm:layers=None") == (method,)
    before = snapshot(vlm.model)
    with vlmfast.patch(vlm.model, method) as handle:
        added = [one for one, other in zip(snapshot(vlm.model), before) if one != other]
        assert not handle.reporters and len(added) == 1  # the handle itself, on the model
        assert method.visual_parts(decoder(vlm.model.config)) == {}


def test_prompts_without_pictures_and_decoding_are_plain_bit_for_bit(vlm):
    text, pictured = vlm.prompts([[4], [6]]), vlm.prompts([[3, "a", 4]])
    with torch.no_grad():
        plain = vlm.model(**text).logits
        with vlmfast.patch(vlm.model, "eemllm:visual_update=none"):
            assert torch.equal(vlm.model(**text).logits, plain)
            gathered, layer = [], vlm.model.model.get_decoder().layers[0]
            layer.mlp.gate_proj.register_forward_hook(lambda module, args, output: gathered.append(args[0].shape[1]))
            vlm.model.generate(**pictured, max_new_tokens=3, do_sample=False)
            layer.mlp.gate_proj._forward_hooks.clear()
    assert gathered == [int((~visual_of(pictured)).sum()), 1, 1]


# --- promises ------------------------------------------------------------------------------------------------------

PROMISES = promises.PROMISES | {"keeps_the_short_promises": promises.keeps_the_short_promises}
SHORT = "keeps_the_short_promises"


@pytest.mark.parametrize(
    ("family", "promise", "update"),
    [
        pytest.param(
            family,
            promise,
            update,
            marks=()
            if (promise == SHORT and update == "none" and family in KINDS)
            or (family == "llava" and update == "none" and promise != "undoes_after_an_error")
            or (family == "qwen2_5_vl" and update == "self" and promise in ("joins_with_pruning", SHORT))
            else (pytest.mark.slow,),
            id=f"{family}-{promise}-{update}",
        )
        for family in FAMILIES
        for promise in PROMISES
        for update in UPDATES
    ],
)
def test_promise(family, promise, update, monkeypatch):
    """As for every method that edits attention (tests/test_promises_attention.py)."""
    monkeypatch.setitem(promises.STRONG, "eemllm", {"visual_update": update})
    monkeypatch.setitem(promises.NEUTRAL, "eemllm", {"layers": "none"})
    if family.startswith("qwen3_5"):  # what one layer changes behind it reaches text through a state that fades
        monkeypatch.setattr(promises, "ROWS", [[3, "a", 1], [2, "b", 1, "c", 1], [4]])
    for vlm in lend(family):
        PROMISES[promise](vlm, "eemllm")


def test_is_saved_and_loaded_back(vlm, monkeypatch, tmp_path):
    monkeypatch.setitem(promises.STRONG, "eemllm", {"visual_update": "ffn"})
    promises.is_saved_and_loaded_back(vlm, "eemllm", tmp_path)


def test_later_turns_and_videos(fresh):
    """A second turn with a video on the first one's cache, as the oracle has the whole conversation."""
    one = fresh("llava_next_video")
    whole = one.prompts([[3, "a", 4, "A", 3]])
    first = one.prompts([[3, "a", 4]])
    count = first["input_ids"].shape[1]
    assert torch.equal(first["input_ids"], whole["input_ids"][:, :count])
    for update in UPDATES:
        with torch.no_grad(), oracle(one.model, update, [0, 1, 2], visual_of(whole)):
            expected = one.model(**whole).logits
        with torch.no_grad(), vlmfast.patch(one.model, spec(update)):
            cache = one.model(**first).past_key_values
            second = {
                "input_ids": whole["input_ids"][:, count:],
                "attention_mask": whole["attention_mask"],
                "pixel_values_videos": whole["pixel_values_videos"],
            }
            found = one.model(**second, past_key_values=cache).logits
        close(found, expected[:, count:], torch.ones_like(second["input_ids"], dtype=torch.bool))


@pytest.mark.parametrize("update", UPDATES)
def test_gradients_equal_the_oracles_with_checkpoints_and_without(fresh, update):
    one = fresh("llava")
    inputs = one.prompts(ROWS, side="right")  # on the left the last token of the padding predicts a label
    labels = inputs["input_ids"].masked_fill(visual_of(inputs) | (inputs["attention_mask"] == 0), -100)
    model = one.model

    def gradients():
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    with oracle(model, update, [0, 1, 2], visual_of(inputs)):
        expected = gradients()
    model.train()
    with vlmfast.patch(model, spec(update)):
        plain = gradients()
        for reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            again = gradients()
            model.gradient_checkpointing_disable()
            assert again.keys() == plain.keys()
            assert all(torch.allclose(again[name], plain[name], rtol=1e-4, atol=1e-6) for name in plain)
    decoder_names = [name for name in expected if "language_model" in name]
    assert decoder_names
    for name in decoder_names:
        torch.testing.assert_close(plain[name], expected[name], rtol=1e-3, atol=1e-5)


def test_eager_flash_and_sdpa_agree(fresh):
    """The implementation of the model's own attention changes nothing; one that takes no masks is gone around."""
    one = fresh("llava")
    inputs, found = one.prompts(ROWS), []
    for implementation in ("sdpa", "eager"):
        one.model.set_attn_implementation(implementation)
        with torch.no_grad(), vlmfast.patch(one.model, spec("self")):
            found.append(one.model(**inputs).logits)
    real = inputs["attention_mask"].bool()
    close(found[0], found[1], real)
    for number, attention in enumerate(one.model.model.get_decoder().layers):
        assert attention.self_attn.layer_idx == number
    one.model.set_attn_implementation("sdpa")
    with torch.no_grad(), vlmfast.patch(one.model, spec("self")) as handle:
        (door,) = {editor for door in handle.reporters for editor in getattr(door, "editors", {}).values()}
        for module in door.attentions.values():  # as flash attention would be found
            module.config.vlmfast_original = type("Config", (), {"_attn_implementation": "flash_attention_2"})()
        masks = []
        monkey = torch.nn.functional.scaled_dot_product_attention

        def noting(*args, **kwargs):
            masks.append(args[3].shape)
            return monkey(*args, **kwargs)

        call = Fake()
        torch.nn.functional.scaled_dot_product_attention = noting
        try:
            output = door._attend(call, call.rows)
        finally:
            torch.nn.functional.scaled_dot_product_attention = monkey
    assert masks == [(2, 1, 2, 5)]
    torch.testing.assert_close(output, call.expected())


class Fake:
    """A call of flash attention: a mask of keys alone, one prompt padded on the left."""

    def __init__(self):
        from vlmfast.composite import Rows
        from vlmfast.edits.engine import Seen

        torch.manual_seed(3)
        self.layer, self.scaling = 0, 0.4
        self.query, self.key, self.value = (torch.randn(2, heads, 5, 6) for heads in (4, 2, 2))
        self.real = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
        self.visual = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 1, 0]]).bool()
        self.seen = Seen(keys=self.real, places=torch.arange(5))
        self.rows = Rows.of(self.visual, self.real)

    def expected(self):
        """Text rows in loops; of the padded prompt's two places the second is filled up."""
        out = torch.full((2, 2, 4, 6), float("nan"))
        for row, texts in enumerate(([0, 4], [4])):
            for place, text in enumerate(texts):
                keys = [k for k in range(text + 1) if self.real[row, k]]
                for head in range(4):
                    scores = torch.stack([self.query[row, head, text] @ self.key[row, head // 2, k] for k in keys])
                    weights = (scores * self.scaling).softmax(0)
                    out[row, place, head] = weights @ self.value[row, head // 2, keys]
        fill = torch.stack([self.query[1, :, 0]])  # sees all keys, and is dropped
        scores = torch.einsum("bhd,hkd->bhk", fill, self.key[1].repeat_interleave(2, 0)) * self.scaling
        out[1, 1] = torch.einsum("bhk,hkd->bhd", scores.softmax(-1), self.value[1].repeat_interleave(2, 0))[0]
        return out


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_pictures_seen_in_both_directions_are_refused(family):
    for vlm in lend(family):
        before = snapshot(vlm.model)
        with pytest.raises(NotImplementedError, match=f"eemllm does not work on {family}: .*both directions"):
            vlmfast.patch(vlm.model, "eemllm")
        assert snapshot(vlm.model) == before


def test_another_edit_of_the_same_layer_is_refused(llava):
    before = snapshot(llava.model)
    with pytest.raises(NotImplementedError, match="zerotuning and eemllm both edit the attention of layer 1"):
        vlmfast.patch(llava.model, "eemllm:layers=1:+zerotuning:layers=0/1")
    assert snapshot(llava.model) == before
    with vlmfast.patch(llava.model, "eemllm:layers=1:+zerotuning:layers=0"), torch.no_grad():
        assert llava.model(**llava.prompts(ROWS)).logits.isfinite().all()


def test_layers_that_compare_with_an_image_free_stream_are_not_disturbed(vlm):
    """VHR runs layers of its own on the text alone, past the hooks, while composite layers stand beside it."""
    inputs = vlm.prompts(ROWS)
    with torch.no_grad(), vlmfast.patch(vlm.model, "eemllm:layers=0,visual_update=none+vhr:layers=1/2,alpha=3.0"):
        found = vlm.model(**inputs).logits
        for row in range(3):
            alone = vlm.model(**vlm.prompts(ROWS, only=row)).logits[0, -1]
            torch.testing.assert_close(found[row, -1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eemllm:visual_update=own", "visual_update='own': choose 'self', 'ffn', 'none'"),
        ("eemllm:layers=1/x", "layers='1/x': 'all', numbers and ranges"),
        ("eemllm:layers=3", "this decoder has layers 0 to 2"),
        ("eemllm:layers=2:2", "are none of this decoder's 3"),
        ("eemllm:top=3", "layers=FILE.json"),
        ("eemllm:layers=/nowhere/ranking.json,top=3", "no ranking of layers .*rank_layers"),
    ],
)
def test_wrong_settings(llava, text, message):
    before = snapshot(llava.model)
    with pytest.raises(ValueError, match=message):
        vlmfast.patch(llava.model, text)
    assert snapshot(llava.model) == before


def test_linear_layers_are_left_out_and_refused_by_name():
    for vlm in lend("qwen3_5"):
        with vlmfast.patch(vlm.model, "eemllm:layers=2:") as handle:
            assert "edits the attention of layers 3 of 5" in str(handle.report().notes)
        with pytest.raises(ValueError, match="layers 2 have no attention"):
            vlmfast.patch(vlm.model, "eemllm:layers=2/3")


def test_fused_projections_are_refused(fresh):
    model = fresh("llava").model
    layer = model.model.get_decoder().layers[1]
    layer.self_attn.qkv_proj = layer.self_attn.q_proj
    del layer.self_attn.q_proj
    with pytest.raises(NotImplementedError, match=r"LlamaDecoderLayer \(layer 1\) has no q_proj of its own"):
        vlmfast.patch(model, "eemllm")


# --- layers from a ranking -----------------------------------------------------------------------------------------


@pytest.fixture
def ranking(tmp_path):
    """A saved ranking of a decoder of three layers: 2, 0, 1."""
    path = tmp_path / "ranking.json"
    Ranking((2, 0, 1), {0: 0.1, 1: 0.5, 2: 0.0}, 3, "self", False, 4, 4, "tiny").save(path)
    return path


def test_layers_of_a_ranking(llava, ranking):
    inputs = llava.prompts(ROWS)
    for top, layers in ((2, "0/2"), (0.34, "2"), (3, "all")):
        text = f"eemllm:layers={ranking},top={top}"
        assert to_spec(from_spec(text)) == text
        with torch.no_grad():
            with vlmfast.patch(llava.model, f"eemllm:layers={layers}"):
                expected = llava.model(**inputs).logits
            with vlmfast.patch(llava.model, text):
                assert torch.equal(llava.model(**inputs).logits, expected)
    before = snapshot(llava.model)
    with vlmfast.patch(llava.model, f"eemllm:layers={ranking},top=0") as handle:
        assert not handle.reporters
    assert snapshot(llava.model) == before


def test_wrong_use_of_a_ranking(ranking):
    with pytest.raises(ValueError, match="ranks 3 layers: say how many to take with top=N"):
        EEMLLM(layers=str(ranking))
    with pytest.raises(ValueError, match="4 of 3 ranked layers"):
        EEMLLM(layers=str(ranking), top=4)
    with pytest.raises(ValueError, match="ranked with visual_update=self, not none"):
        EEMLLM(layers=str(ranking), top=1, visual_update="none")
    for vlm in lend("qwen3_vl"):
        with pytest.raises(ValueError, match="ranks a decoder of 3 layers, this one has 4"):
            vlmfast.patch(vlm.model, f"eemllm:layers={ranking},top=1")
    ranking.write_text(json.dumps({"1": [0, 2]}))
    with pytest.raises(ValueError, match="no ranking of layers .another kind of file"):
        EEMLLM(layers=str(ranking), top=1)
