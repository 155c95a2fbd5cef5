"""VHR: the equations in plain loops through whole models, and what its second stream must not disturb."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import build
from test_edits import ROWS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

import vlmfast
from vlmfast.adapters.attention.vhr import VHR, Divergence, reinforced
from vlmfast.decoders import Sizes, decoder
from vlmfast.edits.memory import EDITS
from vlmfast.lockstep import ImageFree

Chosen = dict[int, list[int]]


# --- the oracle --------------------------------------------------------------------------------------------------


@contextmanager
def head_outputs(model: Any, edit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Run the decoder of an unpatched model with head outputs [B, H, Q, d] replaced by `edit(layer, outputs)`."""
    base = model.model.get_decoder()

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        group = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ keys.transpose(-1, -2) * scaling + attention_mask[..., : keys.shape[2]]
        return edit(module.layer_idx, scores.softmax(-1) @ values).transpose(1, 2).contiguous(), None

    configs = [base.config, model.config.get_text_config()]
    configs += [layer.self_attn.config for layer in base.layers if hasattr(layer, "self_attn")]
    before = [(one, one._attn_implementation_internal) for one in configs]
    AttentionInterface.register("heads", attend)
    AttentionMaskInterface.register("heads", eager_mask)
    try:
        for one in configs:
            one._attn_implementation_internal = "heads"
        yield
    finally:
        for one, own in before:
            one._attn_implementation_internal = own
        AttentionInterface._global_mapping.pop("heads", None)
        AttentionMaskInterface._global_mapping.pop("heads", None)


def scaling(chosen: Chosen, alpha: float, seen: dict[int, Tensor] | None = None) -> Callable[[int, Tensor], Tensor]:
    """Scale the chosen heads; what the last position gave before that goes to `seen`, [H, d] by layer."""

    def edit(layer, outputs):
        if seen is not None:
            seen[layer] = outputs[0, :, -1].clone()
        outputs = outputs.clone()
        for head in chosen.get(layer, ()):
            outputs[:, head] *= alpha
        return outputs

    return edit


def visual_tokens(model: Any, ids: Tensor) -> Tensor:
    sources = vlmfast.families.family_of(model).sources.values()
    return sum((ids == getattr(model.config, source.token) for source in sources), torch.zeros_like(ids)) > 0


def without_pictures(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompt's text alone, as a user would give it. One row."""
    text = ~visual_tokens(model, inputs["input_ids"])[0]
    return {
        name: values[:, text]
        for name, values in inputs.items()
        if values.shape == inputs["input_ids"].shape and not name.startswith("mm_")
    }


def heads_by_hand(full: Tensor, text: Tensor) -> list[int]:
    """The equations, one head at a time. [H, d] each"""
    count = len(full)
    distance = [sum(float(full[i, j] - text[i, j]) ** 2 for j in range(full.shape[1])) ** 0.5 for i in range(count)]
    strength = [sum(float(text[i, j]) ** 2 for j in range(full.shape[1])) for i in range(count)]

    def bound(values):
        mean = sum(values) / count
        return mean + (sum((one - mean) ** 2 for one in values) / (count - 1)) ** 0.5

    outlier = [d > bound(distance) and s > bound(strength) for d, s in zip(distance, strength)]
    kept = [0.0 if out else d for d, out in zip(distance, outlier)]
    median = sorted(kept)[(count - 1) // 2]
    return [i for i in range(count) if kept[i] > median]


def chosen_by_hand(model: Any, inputs: dict[str, Tensor], layers: range, alpha: float) -> Chosen:
    """Layer by layer: both prompts through the whole model, with the heads of the layers before scaled in both."""
    chosen: Chosen = {}
    for layer in layers:
        found = []
        for given in (inputs, without_pictures(model, inputs)):
            seen: dict[int, Tensor] = {}
            with torch.no_grad(), head_outputs(model, scaling(chosen, alpha, seen)):
                model(**given)
            if layer not in seen:
                break
            found.append(seen[layer])
        if found:
            chosen[layer] = heads_by_hand(*found)
    return chosen


def remembered(cache: Any, row: int) -> Chosen:
    """The heads that a cache remembers for a row."""
    layers = getattr(cache, EDITS).layers
    return {layer: known["heads"][row].nonzero().flatten().tolist() for layer, known in layers.items() if known}


# --- the equations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["all", "1/-1:"])
def test_vhr_equals_the_equations_in_whole_models(any_vlm, layers):
    """Rows of a padded batch against each row alone, prefill and decoding."""
    model, inputs, alpha = any_vlm.model, any_vlm.prompts(ROWS), 3.0
    depth = len(model.model.get_decoder().layers)
    if layers != "all" and any_vlm.name.startswith("qwen3_5"):
        layers = "-2:"
    where = {"all": range(depth), "1/-1:": sorted({1, depth - 1}), "-2:": range(depth - 2, depth)}[layers]
    with vlmfast.patch(model, VHR(alpha=alpha, layers=layers)):
        output = model(**inputs)
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    for row in (0, 1):
        alone = any_vlm.prompts(ROWS, only=row)
        chosen = chosen_by_hand(model, alone, where, alpha)
        assert chosen and remembered(output.past_key_values, row) == chosen
        with head_outputs(model, scaling(chosen, alpha)):
            torch.testing.assert_close(output.logits[row, -1], model(**alone).logits[0, -1], rtol=1e-3, atol=2e-4)
            expected = model.generate(**alone, max_new_tokens=4, do_sample=False)[0, -4:]
        assert torch.equal(tokens[row], expected)
    assert not any(remembered(output.past_key_values, 2).values())


def test_heads_of_one_layer_by_hand():
    """Many heads, among them some that a picture disturbs: far apart and loud without it."""
    torch.manual_seed(0)
    full, text = torch.randn(5, 9, 6), torch.randn(5, 9, 6)
    text[1, 4] *= 5
    text[2, 0] *= 4
    full[3, 7] *= 9  # far apart, but silent without the picture
    found = Divergence.of(full, text)
    assert found.outlier[1, 4] and found.outlier[2, 0] and not found.outlier[3, 7]
    assert not found.vision[1, 4] and not found.vision[2, 0] and found.vision[3, 7]
    for row in range(5):
        assert found.vision[row].nonzero().flatten().tolist() == heads_by_hand(full[row], text[row])
        kept = sorted((0.0 if out else float(d)) for d, out in zip(found.distance[row], found.outlier[row]))
        assert abs(float(found.total(3)[row]) - sum(kept[-3:])) < 1e-4
    torch.testing.assert_close(found.total(100), found.distance.masked_fill(found.outlier, 0).sum(1))
    assert not Divergence.of(full[:, :1], text[:, :1]).vision.any(), "one head is not above its own median"
    halves = Divergence.of(full.bfloat16(), text.bfloat16())
    assert halves.distance.dtype == torch.float32


def test_scaled_heads_keep_the_type_and_others_their_bits():
    outputs = torch.randn(2, 3, 4, 5).bfloat16()
    heads = torch.tensor([[True, False, False], [False, False, False]])
    scaled = reinforced(outputs, heads, 2.0)
    assert scaled.dtype == torch.bfloat16
    assert torch.equal(scaled[0, 0], outputs[0, 0] * 2)
    assert torch.equal(scaled[0, 1:], outputs[0, 1:]) and torch.equal(scaled[1], outputs[1])


# --- who is chosen, and for how long -----------------------------------------------------------------------------


def test_rows_without_a_picture_or_without_text_stay_as_they_are(vlm):
    rows = [[3, "a", 2], [8], *([["b"]] if vlm.name == "llava" else [])]
    inputs = vlm.prompts(rows)
    plain = vlm.model(**inputs).logits
    with vlmfast.patch(vlm.model, VHR(layers="all")) as handle:
        logits = vlm.model(**inputs).logits
        assert torch.equal(logits[1:], plain[1:]) and not torch.allclose(logits[0], plain[0])
        assert any("T-VHD" in note for note in handle.report().notes)
        text = vlm.prompts([[5], [7]])
        edited = vlm.model(**text).logits
        assert not any("T-VHD" in note for note in handle.report().notes)
    assert torch.equal(edited, vlm.model(**text).logits)


def test_padding_on_the_right(vlm):
    inputs = vlm.prompts(ROWS[:2], side="right")
    with vlmfast.patch(vlm.model, VHR(layers="all")):
        logits = vlm.model(**inputs).logits
        for row in (0, 1):
            alone = vlm.model(**vlm.prompts(ROWS[:2], only=row)).logits[0]
            torch.testing.assert_close(logits[row, : len(alone)], alone, rtol=1e-3, atol=2e-4)


def further(vlm: Any, mask: Tensor, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """A turn of text behind a cache, and its ids."""
    ids = torch.randint(3, 80, (len(mask), count), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    given = {"input_ids": ids, "attention_mask": mask}
    if hasattr(vlm.model.base_model, "get_rope_index"):
        first = vlm.model.model.rope_deltas.view(-1) + mask.shape[1] - count
        given["position_ids"] = (first[:, None] + torch.arange(count)).expand(3, -1, -1)
    return given, ids


def test_heads_stay_chosen_in_further_turns(vlm):
    """The second turn by hand: the whole conversation with the heads of the first."""
    alpha, layers = 3.0, range(3)
    inputs = vlm.prompts([[3, "a", 4]])
    with vlmfast.patch(vlm.model, VHR(alpha=alpha, layers="all")):
        first = vlm.model(**inputs)
        given, ids = further(vlm, inputs["attention_mask"], 5)
        logits = vlm.model(**given, past_key_values=first.past_key_values).logits[:, -1]
        chosen = remembered(first.past_key_values, 0)
    assert chosen == chosen_by_hand(vlm.model, inputs, layers, alpha)
    whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], ids], 1), "attention_mask": given["attention_mask"]}
    if vlm.tiny.types:
        whole[vlm.tiny.types] = torch.nn.functional.pad(inputs[vlm.tiny.types], (0, 5))
    assert chosen_by_hand(vlm.model, whole, layers, alpha) != chosen, "else nothing would be seen"
    with head_outputs(vlm.model, scaling(chosen, alpha)):
        torch.testing.assert_close(logits, vlm.model(**whole).logits[:, -1], rtol=1e-3, atol=2e-4)


def test_without_a_cache_the_prompt_alone_chooses(any_vlm):
    inputs = any_vlm.prompts(ROWS)
    for joined in ("", "+random:keep=0.5"):
        with vlmfast.patch(any_vlm.model, "vhr:alpha=3,layers=all" + joined):
            cached = any_vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)
            again = any_vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(cached, again)


def test_rows_of_one_prompt_share_its_heads(vlm):
    inputs = vlm.prompts([[3, "a", 2], [2, "b", 3]])
    for how in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        with vlmfast.patch(vlm.model, VHR(alpha=3, layers="all")):
            plain = vlm.model(**inputs).past_key_values
            cache = DynamicCache(config=vlm.model.config.get_text_config())
            vlm.model.generate(**inputs, max_new_tokens=3, past_key_values=cache, **how)
        for row in range(6):
            assert remembered(cache, row) == remembered(plain, row // 3)
        assert remembered(cache, 0) != remembered(cache, 3)


def test_what_cannot_be_chosen_is_refused(vlm):
    inputs = vlm.prompts([[3, "a", 4]])
    with vlmfast.patch(vlm.model, VHR(layers="all")):
        with pytest.raises(NotImplementedError, match="vhr reads a prompt as a whole.*prefill_chunk_size"):
            vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=4)
        cache = vlm.model(**vlm.prompts([[6]])).past_key_values
        mask = torch.ones(1, 6 + inputs["input_ids"].shape[1]).long()
        with pytest.raises(NotImplementedError, match="vhr: a first picture behind text"):
            vlm.model(**(inputs | {"attention_mask": mask}), past_key_values=cache)
        first = vlm.model(**inputs).past_key_values
        before = remembered(first, 0)
        more = vlm.prompts([[2, "b", 4]], seed=3)
        mask = torch.ones(1, inputs["input_ids"].shape[1] + more["input_ids"].shape[1]).long()
        positions = {}
        if hasattr(vlm.model.base_model, "get_rope_index"):
            positions["position_ids"] = torch.arange(40, 40 + more["input_ids"].shape[1]).expand(3, 1, -1)
        vlm.model(**(more | {"attention_mask": mask}), past_key_values=first, **positions)
        assert remembered(first, 0) == before, "a second picture chooses nothing"


# --- the stream leaves no trace ----------------------------------------------------------------------------------


def test_the_stream_is_not_collected(vlm):
    """Hidden states that a caller asks for are those of the prompts."""
    inputs = vlm.prompts(ROWS[:1])
    wanted = {"output_hidden_states": True}
    plain = vlm.model(**inputs, **wanted).hidden_states
    with vlmfast.patch(vlm.model, VHR(layers=1)):
        found = vlm.model(**inputs, **wanted).hidden_states
    assert [one.shape for one in found] == [one.shape for one in plain]
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1]) and not torch.equal(found[2], plain[2])
    one = build(vlm.name)
    one.model.set_attn_implementation({"text_config": "eager"})
    with vlmfast.patch(one.model, VHR(layers=2)):
        maps = one.model(**inputs, output_attentions=True).attentions
    width = inputs["input_ids"].shape[1]
    assert [known.shape[-1] for known in maps] == [width] * 2, "of the layers that are not edited"


def test_an_error_while_noting_leaves_the_layers_whole(vlm, monkeypatch):
    inputs = vlm.prompts(ROWS[:1])
    plain = vlm.model(**inputs).logits
    base = vlm.model.model.get_decoder()
    layers = base.layers
    with vlmfast.patch(vlm.model, VHR(layers="all")):
        forward = type(base.norm).forward
        monkeypatch.setattr(type(base.norm), "forward", lambda self, hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            vlm.model(**inputs)
        monkeypatch.setattr(type(base.norm), "forward", forward)
        assert base.layers is layers
    assert torch.equal(vlm.model(**inputs).logits, plain)


def test_hooks_of_layers_see_the_prompts_alone(vlm):
    inputs, seen = vlm.prompts(ROWS[:1]), []
    layer = vlm.model.model.get_decoder().layers[2]
    with vlmfast.patch(vlm.model, VHR(layers=2)):
        hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        vlm.model(**inputs)
        hook.remove()
    text = int((~visual_tokens(vlm.model, inputs["input_ids"])).sum())
    assert seen.count(inputs["input_ids"].shape[1]) == 1
    assert not seen.count(text)


@pytest.mark.parametrize("name", ["llava", "qwen3_5"])
def test_checkpoints_recompute_with_the_heads_that_were_chosen(fresh, name):
    one = fresh(name)
    inputs = one.prompts(ROWS[:2])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    grads = []
    for checkpoints in (False, True):
        if checkpoints:
            one.model.gradient_checkpointing_enable()
        one.model.train()
        with vlmfast.patch(one.model, VHR(layers="all")):
            loss = one.model(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
        grads.append([p.grad.clone() for p in one.model.parameters() if p.grad is not None])
        one.model.zero_grad()
    assert len(grads[0]) == len(grads[1]) > 0
    for plain, again in zip(*grads):
        torch.testing.assert_close(again, plain)


def test_layers_are_asked_for_in_order(vlm):
    inputs = vlm.prompts([[3, "a", 4]])
    base, ids = vlm.model.model, inputs["input_ids"]
    visual = visual_tokens(vlm.model, ids)
    free = ImageFree.of(base, ids, ~visual, visual.any(1), last=2)
    assert free.rows.tolist() == [0] and free.mask.all() and free.mask.shape[1] == int((~visual).sum())
    free.through(0, lambda text: text)
    with pytest.raises(ValueError, match="layer 0 of the image-free stream has passed"):
        free.through(0, lambda text: text)
    assert ImageFree.of(base, ids, ~visual, torch.tensor([False]), last=2) is None


def test_what_the_stream_costs():
    """The count of the products that run, and the method's own answer."""
    one = build("llava")
    one.model.set_attn_implementation("eager")
    inputs = one.prompts([[3, "a", 7]])
    sizes = Sizes(decoder=decoder(one.model.config), tower=None, vision=None, projects=True)

    def count() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            one.model(**inputs, logits_to_keep=1)
        return counter.get_total_flops()

    plain = count()
    for layers in ("all", "0/1"):
        method = VHR(layers=layers)
        with vlmfast.patch(one.model, method):
            extra = count() - plain
        assert extra == method.selection_flops(None, 10, sizes) > 0


def test_settings(vlm):
    assert VHR().where(range(32), 32) == [1, *range(18, 32)]
    assert VHR(alpha=1).neutral and not VHR(alpha=0).neutral
    for settings, words in (
        ({"alpha": -1}, "alpha=-1"),
        ({"alpha": "x"}, "1 changes nothing"),
        ({"alpha": True}, "a number from 0 on"),
        ({"topk": 0}, "topk=0"),
        ({"topk": 1.5}, "a whole number of heads"),
        ({"layers": "a"}, "layers='a'"),
    ):
        with pytest.raises(ValueError, match=words):
            VHR(**settings)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        vlmfast.patch(vlm.model, VHR(layers=7))
    inputs = vlm.prompts(ROWS[:1])
    plain = vlm.model(**inputs).logits
    with vlmfast.patch(vlm.model, "vhr:alpha=1"):
        assert torch.equal(vlm.model(**inputs).logits, plain)
