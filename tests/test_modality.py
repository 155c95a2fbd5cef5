"""Which tokens are visual, as modules inside decoder layers are told: against what the ids say."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import KINDS, TINY
from peft import get_peft_model
from test_promises import ROWS
from tiny import IMAGE, VIDEO, text_settings
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import vlmfast
from vlmfast.adapters.tuning import PillConfig, VisualLoraConfig
from vlmfast.modality import MIXERS, MODALITIES, Modalities

VIDEOS = [
    name if name in KINDS else pytest.param(name, marks=pytest.mark.slow)
    for name, tiny in TINY.items()
    if tiny.video is not None
]
Seen = list[Tensor | None]


def visual(ids: Tensor) -> Tensor:
    return (ids == IMAGE) | (ids == VIDEO)


@contextmanager
def watching(model: Any) -> Iterator[list[Seen]]:
    """What the feed-forward net of every layer is told, call by call."""
    layers = model.base_model.get_decoder().layers if model.base_model_prefix else model.get_decoder().layers
    modalities = Modalities.of(model)
    seen: list[Seen] = [[] for _ in layers]
    handles = []
    for number, layer in enumerate(layers):
        here = modalities.layer(number)

        def look(module: Any, args: Any, here: Any = here, told: Seen = seen[number]) -> None:
            told.append(here.visual(args[0]))
            places = here.places(args[0])
            assert (places is None) == (told[-1] is None)
            if places is not None:
                flat = told[-1].flatten()
                assert flat[places[0]].all() and not flat[places[1]].any() and sum(map(len, places)) == len(flat)

        handles.append(layer.mlp.register_forward_pre_hook(look))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        modalities.close()
        assert MODALITIES not in model.__dict__


def same(told: Seen, expected: Seen) -> None:
    assert len(told) == len(expected)
    for one, other in zip(told, expected):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_prompts_and_what_follows(any_vlm):
    """Left padding, several pictures, a row of text; then generated tokens. A batch of text alone. No trace behind."""
    inputs = any_vlm.prompts(ROWS)
    expected = visual(inputs["input_ids"])
    assert expected.any() and not expected.any(1).all()
    plain = any_vlm.model(**inputs).logits
    with watching(any_vlm.model) as seen:
        assert torch.equal(any_vlm.model(**inputs).logits, plain)
        any_vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        any_vlm.model(**any_vlm.prompts([[3], [5]]))
    for told in seen:
        same(told, [expected, expected, None, None, None])
    assert torch.equal(any_vlm.model(**inputs).logits, plain)
    for layer in any_vlm.model.base_model.get_decoder().layers:
        mixers = [getattr(layer, name) for name in MIXERS if hasattr(layer, name)]
        assert len(mixers) == 1 and not layer._forward_pre_hooks and not mixers[0]._forward_pre_hooks


@pytest.mark.parametrize("name", VIDEOS)
def test_videos(name, fresh):
    vlm = fresh(name)
    inputs = vlm.prompts([[2, "A", 3, "b", 1], [4, "B", 1]] if name != "video_llava" else [[2, "A", 1], [3, "B", 2]])
    assert (inputs["input_ids"] == VIDEO).any()
    with watching(vlm.model) as seen:
        vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    for told in seen:
        same(told, [visual(inputs["input_ids"]), None])


def test_every_way_to_decode(vlm):
    """Beams and return sequences, a static cache, no cache, sampling."""
    inputs = vlm.prompts([[3, "a", 2], [1, "b", 4, "a", 1]])
    prompt = visual(inputs["input_ids"])
    generate = vlm.model.generate
    with watching(vlm.model) as seen:
        generate(**inputs, max_new_tokens=2, num_beams=3, do_sample=False)
        generate(**inputs, max_new_tokens=2, num_return_sequences=2, do_sample=True)
        generate(**inputs, max_new_tokens=2, cache_implementation="static", do_sample=False)
        generate(**inputs, max_new_tokens=2, use_cache=False, do_sample=False)
    more = torch.cat([prompt, torch.zeros(2, 1, dtype=torch.bool)], dim=1)
    for told in seen:
        beams, sequences = (prompt.repeat_interleave(count, dim=0) for count in (3, 2))
        same(told, [beams, None, sequences, None, prompt, None, prompt, more])


def test_chunks_and_further_turns(vlm):
    """A prompt in parts on one cache: text, a picture in the midst, one token, another picture."""
    cache, masks, expected = DynamicCache(config=vlm.model.config.get_text_config()), [], []
    with watching(vlm.model) as seen, torch.no_grad():
        for number, part in enumerate([[3], [2, "a", 1], [1], ["b"], [4]]):
            inputs = vlm.prompts([part], seed=number)
            masks.append(inputs.pop("attention_mask"))
            held = cache.get_seq_length()
            positions = torch.arange(held, held + masks[-1].shape[1])[None]
            vlm.model(**inputs, attention_mask=torch.cat(masks, 1), past_key_values=cache, position_ids=positions)
            expected.append(visual(inputs["input_ids"]) if part in ([2, "a", 1], ["b"]) else None)
    assert expected[3].all()
    for told in seen:
        same(told, expected)


def test_generate_goes_on_with_another_picture(vlm):
    first, second = vlm.prompts([[3, "a", 2]]), vlm.prompts([[3, "a", 2, 1, 2, "b", 3]])
    new = second["input_ids"][:, first["input_ids"].shape[1] :]
    pixels = vlm.picture("b").inputs
    with watching(vlm.model) as seen:
        cache = vlm.model.generate(
            **first, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        ).past_key_values
        vlm.model(
            input_ids=new,
            past_key_values=cache,
            position_ids=torch.arange(first["input_ids"].shape[1], second["input_ids"].shape[1])[None],
            **pixels,
        )
    for told in seen:
        same(told, [visual(first["input_ids"]), visual(new)])


def test_prompts_in_chunks_inside_generate(fresh):
    """transformers reads a text prompt in chunks."""
    vlm = fresh("llava")
    with watching(vlm.model) as seen:
        vlm.model.generate(**vlm.prompts([[7]]), max_new_tokens=2, do_sample=False, prefill_chunk_size=3)
    for told in seen:
        assert len(told) > 2 and all(one is None for one in told)


# --- beside methods ------------------------------------------------------------------------------------------------


def test_pruned_prompts(any_vlm):
    """The mask follows the rewritten prompts, also into a picture that is one token."""
    inputs = any_vlm.prompts([[3, "a", 2, "b", 1], [2, "a", 6]])
    ids: list[Tensor] = []
    with vlmfast.patch(any_vlm.model, "random:keep=5") as handle, watching(any_vlm.model) as seen:
        base = any_vlm.model.base_model
        spy = base.register_forward_pre_hook(lambda m, a, k: ids.append(k.get("input_ids", *a[:1])), with_kwargs=True)
        any_vlm.model(**inputs)
        kept = [sum(one.kept for one in prompt.pictures) for prompt in handle.report().prompts]
        any_vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        spy.remove()
    assert ids[0].shape[1] < inputs["input_ids"].shape[1]
    for told in seen:
        same(told, [visual(ids[0]), visual(ids[0]), None])
        assert told[0].sum(1).tolist() == kept


def test_a_picture_of_one_token_alone_on_a_cache(vlm):
    """A single token is not taken for a generated one where it comes with a picture."""
    text, picture = vlm.prompts([[4]]), vlm.prompts([["a"]])
    held = text["input_ids"].shape[1]
    with vlmfast.patch(vlm.model, "random:keep=1"), watching(vlm.model) as seen, torch.no_grad():
        cache = vlm.model(**text).past_key_values
        n = picture["input_ids"].shape[1]
        picture["attention_mask"] = torch.ones(1, held + n, dtype=torch.long)
        vlm.model(**picture, past_key_values=cache, position_ids=torch.arange(held, held + n)[None])
    for told in seen:
        same(told, [None, torch.ones(1, 1, dtype=torch.bool)])


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_beside_an_image_free_stream(name, fresh):
    """Layers run on the text alone in the midst of a prompt's layer, which still knows its own tokens behind."""
    vlm = fresh(name)
    peft = get_peft_model(vlm.model, PillConfig(r=2)).eval()
    inputs = vlm.prompts([[3, "a", 2], [2], [4, "b", 1]])
    expected = visual(inputs["input_ids"])
    depth = len(vlm.model.base_model.get_decoder().layers)
    with vlmfast.patch(peft, "vhr:layers=-2:"), watching_only(vlm.model) as seen:
        peft.generate(**inputs, max_new_tokens=2, do_sample=False)
        text, seen[:] = list(seen), []
        peft(**vlm.prompts([[3], [4]]))
    for number in range(depth):
        # the stream passes a layer before the layer's own feed-forward net, up to the first edited one at once
        order = [expected, None, None] if number < depth - 2 else [None, expected, None]
        same([told for at, told in text if at == number], order)
    assert all(told is None for _, told in seen)


@contextmanager
def watching_only(model: Any) -> Iterator[list[tuple[int, Tensor | None]]]:
    """What feed-forward nets are told in turn, of a model that is told of its tokens already."""
    seen: list[tuple[int, Tensor | None]] = []
    modalities = Modalities.of(model)

    def look(number: int) -> Any:
        here = modalities.layer(number)
        return lambda module, args: seen.append((number, here.visual(args[0])))

    layers = model.base_model.get_decoder().layers
    handles = [layer.mlp.register_forward_pre_hook(look(number)) for number, layer in enumerate(layers)]
    yield seen
    for handle in handles:
        handle.remove()


def test_beside_a_side_path(fresh):
    """What runs of the last layer beside the model is a token of text."""
    vlm = fresh("llava")
    peft = get_peft_model(vlm.model, PillConfig(r=2)).eval()
    inputs = vlm.prompts([[3, "a", 2]])
    with vlmfast.patch(peft, "only"), watching_only(vlm.model) as seen:
        peft.generate(**inputs, max_new_tokens=2, do_sample=False)
    last = len(vlm.model.base_model.get_decoder().layers) - 1
    same([told for number, told in seen if number == last], [visual(inputs["input_ids"]), None, None, None])


@pytest.mark.parametrize("rows", [[[2, "a", 3]], [[2, "a", 3], [70]]], ids=["shorter", "as wide as before"])
def test_pruning_inside_the_language_model_is_refused(vlm, rows):
    """Also where a longer row of text keeps the batch as wide as it was."""
    inputs = vlm.prompts(rows)
    with vlmfast.patch(vlm.model, "fastv:keep=0.5,layer=1"):
        with pytest.raises(NotImplementedError, match="before the language model, not inside"), watching(vlm.model):
            vlm.model(**inputs)
        with watching(vlm.model) as seen:  # nothing to drop
            vlm.model(**vlm.prompts([[4]]))
    assert all(told == [None] for told in seen)


# --- what cannot be known ------------------------------------------------------------------------------------------


def test_inputs_embeds(vlm):
    inputs = vlm.prompts([[3, "a", 2]])
    expected = visual(inputs["input_ids"])
    base = vlm.model.base_model
    embeds = vlm.model.get_input_embeddings()(inputs["input_ids"])
    positions = torch.arange(embeds.shape[1])[None]
    with watching(vlm.model) as seen, torch.no_grad():
        for types in (None, expected[:, 1:].long()):
            with pytest.raises(NotImplementedError, match="needs input_ids, or mm_token_type_ids"):
                base(inputs_embeds=embeds, mm_token_type_ids=types, position_ids=positions)
        cache = base(
            inputs_embeds=embeds[:, :4], mm_token_type_ids=expected[:, :4].long(), position_ids=positions[:, :4]
        ).past_key_values
        base(
            inputs_embeds=embeds[:, 4:],
            mm_token_type_ids=expected.long(),
            past_key_values=cache,
            position_ids=positions[:, 4:],
        )
        with pytest.raises((ValueError, TypeError), match="input_ids|embedding"):  # what transformers says
            base()
    for told in seen:
        same(told, [expected[:, :4], expected[:, 4:]])


def test_past_the_model(vlm):
    """The language model alone does not know what it is given, whatever ran before it."""
    inputs = vlm.prompts([[3, "a", 2]])
    embeds = vlm.model.get_input_embeddings()(inputs["input_ids"])
    with watching(vlm.model) as seen:
        vlm.model(**inputs)
        with pytest.raises(RuntimeError, match="not its language model"):
            vlm.model.base_model.get_decoder()(inputs_embeds=embeds)
        vlm.model(**inputs)
    for told in seen:
        same(told, [visual(inputs["input_ids"])] * 2)


def test_unknown_family():
    model = LlamaForCausalLM(LlamaConfig(**text_settings(num_hidden_layers=1)))
    for config in (PillConfig(), VisualLoraConfig()):
        with pytest.raises(NotImplementedError, match="llama.*supported: .*qwen2_5_vl"):
            get_peft_model(model, config)
    assert MODALITIES not in model.__dict__


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [
        ("llava", False),
        ("llava", True),
        ("qwen3_5", False),
        pytest.param("qwen3_5", True, marks=pytest.mark.slow),
        pytest.param("qwen3_vl_moe", False, marks=pytest.mark.slow),
    ],
)
def test_two_forwards_before_the_first_backward(name, reentrant, fresh):
    """Layers that are recomputed are told of the tokens they had then, those of linear attention, too."""
    vlm = fresh(name)
    peft = get_peft_model(vlm.model, VisualLoraConfig(r=2))
    torch.manual_seed(0)
    for own, parameter in peft.named_parameters():
        if "visual_lora_B" in own:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts = [vlm.prompts(rows) for rows in ([[3, "a", 2]], [[1, "b", 4], [2, "a", 1]], [[5]])]
    trained = {own: parameter for own, parameter in peft.named_parameters() if parameter.requires_grad}
    peft.train()

    def gradients(together: bool) -> dict[str, Tensor]:
        peft.zero_grad()
        losses = []
        for number, inputs in enumerate(prompts):
            loss = (number + 1) * peft(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            losses.append(loss)
            if not together:
                loss.backward()
        for loss in losses if together else ():
            loss.backward()
        return {own: parameter.grad.clone() for own, parameter in trained.items()}

    peft.enable_input_require_grads()
    expected = gradients(together=False)
    peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for own, found in gradients(together=True).items():
        assert torch.allclose(found, expected[own], rtol=1e-3, atol=1e-5), own


def test_a_copy_is_told_by_itself(fresh):
    vlm = fresh("llava")
    peft = get_peft_model(vlm.model, PillConfig(r=2, gate_init="official")).eval()
    inputs = vlm.prompts([[3, "a", 2]])
    tuned = peft(**inputs).logits
    twin = copy.deepcopy(peft)
    assert Modalities.of(twin.get_base_model()) is not Modalities.of(vlm.model)
    peft(**vlm.prompts([[4]]))
    plain = peft.unload()(**inputs).logits
    assert torch.equal(twin(**inputs).logits, tuned) and not torch.equal(plain, tuned)
    assert Modalities.of(twin.get_base_model()).patch.model is twin.get_base_model()
    twin.unload()
    assert MODALITIES not in twin.get_base_model().__dict__


def test_a_forward_of_no_one_interested(vlm):
    """Before a layer asks, nothing is looked at."""
    modalities = Modalities.of(vlm.model)
    assert modalities.before_base(SimpleNamespace(), (), {"inputs_embeds": 1}) == ((), {"inputs_embeds": 1})
    assert Modalities.of(vlm.model) is modalities
    modalities.close()
