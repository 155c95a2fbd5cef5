"""patch and unpatch in users' hands: conversations, training, PEFT, checkpointing, and what they may get wrong."""

from __future__ import annotations

import math
import pickle

import peft
import pytest
import torch
from conftest import CORE, TINY, lend
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import vlmfast
from vlmfast.adapters import ADAPTERS, from_spec
from vlmfast.cost import nominal_grid, prompt_cost, visual_tokens
from vlmfast.encoding import encode_images, encoder_outputs
from vlmfast.eval.latency import image_inputs
from vlmfast.eval.planning import named
from vlmfast.families import family_of

METHOD = "hiprune:keep=0.4"
ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]


def greedy(model, inputs, steps=4, **how):
    return model.generate(**inputs, max_new_tokens=steps, do_sample=False, **how)


# --- conversations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_second_turn_on_the_same_cache_equals_a_fresh_run(vlm, positions):
    inputs = vlm.prompts([[3, "a", 5], [2, "a", 2]])
    with vlmfast.patch(vlm.model, METHOD, positions=positions):
        cache = DynamicCache(config=vlm.model.config.get_text_config())
        first = greedy(vlm.model, inputs, past_key_values=cache)
        longer = longer_conversation(inputs, first)
        again = {k: v for k, v in longer.items() if k not in ("pixel_values", "image_grid_thw")}
        second = greedy(vlm.model, again, past_key_values=cache)
        fresh = greedy(vlm.model, longer)
    assert torch.equal(second, fresh)


def test_later_turns_of_unequal_lengths_in_a_batch(vlm):
    """Padding stands between a conversation and the new tokens of a shorter turn."""
    inputs = vlm.prompts([[3, "a", 5], [2, "a", 2]])
    with vlmfast.patch(vlm.model, METHOD):
        cache = DynamicCache(config=vlm.model.config.get_text_config())
        longer = longer_conversation(inputs, greedy(vlm.model, inputs, past_key_values=cache))
        longer["input_ids"][1, -5:-2] = longer["attention_mask"][1, -5:-2] = 0
        again = {k: v for k, v in longer.items() if k not in ("pixel_values", "image_grid_thw")}
        second = greedy(vlm.model, again, past_key_values=cache)
        assert torch.equal(second, greedy(vlm.model, longer))


def longer_conversation(inputs, answered):
    """The first turn, its answer, and five more tokens of text."""
    more = torch.arange(20, 30).view(2, 5)
    ids = torch.cat([answered, more], dim=1)
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    result = {**inputs, "input_ids": ids}
    result["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(2, new, dtype=torch.long)], dim=1)
    if "mm_token_type_ids" in inputs:
        result["mm_token_type_ids"] = torch.cat(
            [inputs["mm_token_type_ids"], torch.zeros(2, new, dtype=torch.long)], dim=1
        )
    return result


def test_new_image_in_a_later_turn(vlm):
    inputs = vlm.prompts([[3, "a", 5]])
    with vlmfast.patch(vlm.model, METHOD):
        cache = DynamicCache(config=vlm.model.config.get_text_config())
        first = greedy(vlm.model, inputs, past_key_values=cache)
        more = vlm.prompts([[2, "b", 3]])
        ids = torch.cat([first, more["input_ids"]], dim=1)
        turn = {"input_ids": ids, "pixel_values": more["pixel_values"]}
        if vlm.name == "llava":
            both = torch.cat([inputs["pixel_values"], more["pixel_values"]])
            fresh = greedy(vlm.model, {"input_ids": ids, "pixel_values": both})
            assert torch.equal(greedy(vlm.model, turn, past_key_values=cache), fresh)
            return
        types = (ids == 90).long()
        grids = torch.cat([inputs["image_grid_thw"], more["image_grid_thw"]])
        pixels = torch.cat([inputs["pixel_values"], more["pixel_values"]])
        fresh = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": types}
        turn |= {"image_grid_thw": more["image_grid_thw"], "mm_token_type_ids": types}
        assert torch.equal(greedy(vlm.model, turn, past_key_values=cache), greedy(vlm.model, fresh))


def test_a_reset_cache_forgets_the_old_prompt(vlm):
    one, two = vlm.prompts([[3, "a", 5], [9]]), vlm.prompts([[9, "b", 1], [2, "b", 1]])
    with vlmfast.patch(vlm.model, METHOD):
        expected = greedy(vlm.model, two)
        cache = StaticCache(config=vlm.model.config.get_text_config(), max_cache_len=80)
        greedy(vlm.model, one, past_key_values=cache)
        cache.reset()
        assert torch.equal(greedy(vlm.model, two, past_key_values=cache), expected)


def test_text_only_calls_are_untouched(vlm):
    inputs = vlm.prompts([[7], [3]])
    logits, tokens = vlm.model(**inputs).logits, greedy(vlm.model, inputs)
    with vlmfast.patch(vlm.model, METHOD) as handle:
        assert torch.equal(vlm.model(**inputs).logits, logits)
        assert torch.equal(greedy(vlm.model, inputs), tokens)
        assert "no picture seen yet" in str(handle.report())


def test_prompt_lookup_and_custom_loops_agree_with_plain_greedy(vlm):
    inputs = vlm.prompts([[3, "a", 5]])
    with vlmfast.patch(vlm.model, METHOD):
        plain = greedy(vlm.model, inputs, steps=6)
        assert torch.equal(greedy(vlm.model, inputs, steps=6, prompt_lookup_num_tokens=2), plain)


def test_positional_arguments(vlm):
    inputs = vlm.prompts([[3, "a", 5]])
    with vlmfast.patch(vlm.model, METHOD):
        named = vlm.model(**inputs).logits
        rest = {k: v for k, v in inputs.items() if k != "input_ids"}
        assert torch.equal(vlm.model(inputs["input_ids"], **rest).logits, named)
        assert torch.equal(
            vlm.model.generate(inputs["input_ids"], **rest, max_new_tokens=3), greedy(vlm.model, inputs, 3)
        )


def checkpoint(model):
    """Gradient checkpointing under the name this version of transformers has for it."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


# --- training, PEFT ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_training_with_labels(fresh, vlm, checkpointing, side):
    one = fresh(vlm.name)
    inputs = one.prompts(ROWS, side=side)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == 90), -100)
    labels[torch.arange(3), inputs["attention_mask"].argmax(1)] = -100  # nothing precedes the first token
    with torch.no_grad(), vlmfast.patch(one.model, METHOD, positions="original") as handle:
        loss = one.model(**inputs, labels=labels).loss
        kept = handle.report().kept
    expected = masked_loss(one, inputs, labels, kept)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    one.model.train()
    if checkpointing:
        checkpoint(one.model)
    with vlmfast.patch(one.model, METHOD):
        one.model(**inputs, labels=labels).loss.backward()
    tower = one.model.model.vision_tower if vlm.name == "llava" else one.model.model.visual
    grads = [p.grad for p in tower.parameters() if p.grad is not None]
    assert grads and any(g.abs().max() > 0 for g in grads), "gradients reach the vision tower"


def masked_loss(vlm, inputs, labels, kept):
    """Loss of the unpatched model in which nobody attends to the dropped tokens."""
    mask = inputs["attention_mask"].clone()
    places = (inputs["input_ids"] == 90).nonzero()
    start = 0
    for indices, n in zip(kept, [36, 36, 36] if vlm.name == "llava" else inputs["image_grid_thw"].prod(1) // 4):
        dropped = torch.ones(int(n), dtype=torch.bool)
        dropped[indices] = False
        for row, column in places[start : start + int(n)][dropped]:
            mask[row, column] = 0
        start += int(n)
    positions = {}
    if vlm.name == "qwen2_5_vl":
        positions["position_ids"], _ = vlm.model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
    else:
        positions["position_ids"] = torch.arange(mask.shape[1]).expand_as(mask)
    # The token before a dropped one predicts across the gap in the pruned run, and nothing in the masked one: image
    # tokens have no labels, so the two agree except for the first token after an image.
    logits = vlm.model(**{**inputs, "attention_mask": mask}, **positions).logits
    total, count = 0.0, 0
    for row in range(len(mask)):
        columns = mask[row].nonzero().flatten()
        for before, after in zip(columns[:-1], columns[1:]):
            if labels[row, after] != -100:
                total = total + nn.functional.cross_entropy(logits[row, before], labels[row, after])
                count += 1
    return total / count


def test_right_padded_prompts_that_begin_with_an_image(vlm):
    """The padding side is read off the padding, not off what happened to be dropped first."""
    inputs = vlm.prompts([["a", 2], ["a", 5]], side="right")
    with vlmfast.patch(vlm.model, "grid:keep=0.3"):
        logits = vlm.model(**inputs).logits
        kept = logits.shape[1] - 5
        alone = vlm.model(**vlm.prompts([["a", 2]])).logits
    torch.testing.assert_close(logits[0, : kept + 2], alone[0], rtol=1e-4, atol=1e-4)


def test_checkpointing_gives_the_same_gradients(fresh, vlm):
    gradients = []
    for checkpointing in (False, True):
        one = fresh(vlm.name)
        one.model.train()
        if checkpointing:
            checkpoint(one.model)
        inputs = one.prompts(ROWS)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 90, -100)
        with vlmfast.patch(one.model, METHOD):
            one.model(**inputs, labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("first", ["patch", "peft"])
def test_lora(fresh, vlm, first):
    one = fresh(vlm.name)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    inputs = one.prompts(ROWS)
    if first == "patch":
        vlmfast.patch(one.model, METHOD)
        wrapped = peft.get_peft_model(one.model, config)
    else:
        wrapped = peft.get_peft_model(one.model, config)
        vlmfast.patch(wrapped, METHOD)
    wrapped.eval()
    pruned = wrapped(**inputs).logits
    assert pruned.shape[1] < inputs["input_ids"].shape[1]
    assert wrapped.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    wrapped.train()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 90, -100)
    wrapped(**inputs, labels=labels).loss.backward()
    trained = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n and "language_model" in n]
    assert trained and all(g is not None and g.abs().max() > 0 for g in trained)
    wrapped.eval()
    vlmfast.unpatch(wrapped)
    assert wrapped(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_prompt_learning_is_refused(fresh, vlm):
    wrapped = peft.get_peft_model(
        fresh(vlm.name).model,
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=2,
            token_dim=32,
            num_layers=3,
            num_attention_heads=4,
        ),
    )
    with pytest.raises(NotImplementedError, match="prompt learning"):
        vlmfast.patch(wrapped, METHOD)


# --- encoding once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vlm", [CORE[0], pytest.param(CORE[1], marks=pytest.mark.slow)], indirect=True)
def test_images_encoded_once_serve_every_method(vlm):
    inputs = vlm.prompts(ROWS)
    everything = [from_spec(spec)[0] for spec in named(["all"], vlm.name)]
    methods = [method for method in everything if method.drops]
    encode = {k: inputs.pop(k) for k in ("pixel_values", "image_grid_thw") if k in inputs}
    images = encode_images(vlm.model, methods, **encode)
    later = {k: v for k, v in encode.items() if k != "pixel_values"}
    assert torch.equal(
        greedy(vlm.model, inputs | later, mm_encoder_outputs=encoder_outputs(images)),
        greedy(vlm.model, inputs | encode),
    )
    for method in methods:
        with vlmfast.patch(vlm.model, method):
            expected = greedy(vlm.model, inputs | encode)
            beams = greedy(vlm.model, inputs | encode, num_beams=2)
            outputs = encoder_outputs(images)
            for _ in range(2):  # generate must not change the caller's object
                assert torch.equal(greedy(vlm.model, inputs | later, mm_encoder_outputs=outputs, num_beams=2), beams)
            assert torch.equal(greedy(vlm.model, inputs | later, mm_encoder_outputs=outputs), expected)


@pytest.mark.parametrize("name", list(TINY))
def test_images_encoded_once_serve_every_family(name):
    """Unpatched, too, and under a method that leaves the inputs alone: in the container that the model takes."""
    for vlm in lend(name):
        inputs = vlm.prompts(ROWS)
        encode = image_inputs(vlm.model, inputs)
        images = encode_images(vlm.model, [], **encode)
        kept = {k: v for k, v in inputs.items() if k not in encode or v.ndim < 3}
        kept.pop("pixel_values", None)
        for spec in ("none", "zerotuning:gamma=1.5", "random:keep=0.5"):
            with vlmfast.patch(vlm.model, spec):
                outputs = encoder_outputs(images, model=vlm.model)
                assert torch.equal(greedy(vlm.model, kept, mm_encoder_outputs=outputs), greedy(vlm.model, inputs))


def test_images_encoded_for_another_method_are_refused(vlm):
    inputs = vlm.prompts([[3, "a", 2]])
    encode = {k: inputs.pop(k) for k in ("pixel_values", "image_grid_thw") if k in inputs}
    images = encode_images(vlm.model, from_spec("grid"), **encode)
    later = {k: v for k, v in encode.items() if k != "pixel_values"}
    with vlmfast.patch(vlm.model, METHOD):
        with pytest.raises(ValueError, match="encoded without Score"):
            greedy(vlm.model, inputs | later, mm_encoder_outputs=encoder_outputs(images))
        with pytest.raises(RuntimeError, match="unpatched"):
            encode_images(vlm.model, from_spec("grid"), **encode)
    with torch.no_grad():
        foreign = vlm.model.model.get_image_features(**encode, return_dict=True)
    with vlmfast.patch(vlm.model, METHOD), pytest.raises(ValueError, match="made without vlmfast"):
        greedy(vlm.model, inputs | later, mm_encoder_outputs={"image": foreign})


# --- goals, defaults, reports ------------------------------------------------------------------------------------


def test_the_default_method_of_the_family(vlm):
    with vlmfast.patch(vlm.model) as handle:
        vlm.model(**vlm.prompts([[3, "a", 2]]))
        assert handle.spec == vlmfast.adapters.DEFAULTS[vlm.name]
        assert handle.report().images[0].kept < handle.report().images[0].n


def test_flops_as_a_goal(vlm):
    """Solved on the nominal prompt, the cost of the method's own statistics included."""
    config = vlm.model.config
    images = [nominal_grid(config)]
    n = visual_tokens(config, images[0])
    full = prompt_cost(config, text=60, images=images).total_prefill
    for method in ("grid", "hiprune"):
        scores = list(from_spec(method)[0].wanted(family_of(config).tower(config)).values())
        goal = prompt_cost(config, text=60, images=images, kept=[n // 4], scores=scores).total_prefill / full
        if goal >= 1:  # on so tiny a model the statistics can cost more than pruning saves
            with pytest.raises(ValueError, match="cannot be reached"):
                vlmfast.patch(vlm.model, method, flops=goal)
            continue
        with vlmfast.patch(vlm.model, method, flops=goal) as handle:
            assert handle.adapters[0].keep * n == pytest.approx(n // 4, abs=0.01)
        with pytest.raises(ValueError, match="cannot be reached"):
            vlmfast.patch(vlm.model, method, flops=1e-4)
    with pytest.raises(ValueError, match="none of the methods"):
        vlmfast.patch(vlm.model, "none", flops=0.5)


def test_the_report_says_what_happened(vlm):
    with vlmfast.patch(vlm.model, METHOD) as handle:
        greedy(vlm.model, vlm.prompts(ROWS), num_beams=2)
        report = handle.report()
    assert len(report.images) == 3, "beams are not reported twice"
    assert report.share > 0
    assert str(report).startswith("hiprune:keep=0.4: ") and "visual tokens kept in 3 image(s)" in str(report)


def test_a_fallback_is_stated(vlm):
    with vlmfast.patch(vlm.model, "fastervlm:fallback=received") as handle:
        vlm.model(**vlm.prompts([[3, "a", 2]]))
        assert ("no CLS" in str(handle.report())) == (vlm.name == "qwen2_5_vl")


def test_none_is_a_spec(vlm):
    inputs = vlm.prompts(ROWS)
    logits = vlm.model(**inputs).logits
    with vlmfast.patch(vlm.model, "none") as handle:
        assert handle.spec == "none"
        assert torch.equal(vlm.model(**inputs).logits, logits)


def test_methods_lists_everything():
    info = vlmfast.methods()
    assert list(info) == sorted(ADAPTERS)
    for name, method in info.items():
        assert method.name == name and method.summary and method.paper.startswith("arXiv:")
        assert ("keep" in method.settings) == ADAPTERS[name].drops


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep", [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, False, "0.5", None], ids=lambda keep: repr(keep)
)
def test_bad_keep(keep):
    for cls in (one for one in ADAPTERS.values() if one.drops):
        with pytest.raises((ValueError, TypeError), match="share of visual tokens"):
            cls(keep=keep)


def test_keep_larger_than_the_image(vlm):
    with vlmfast.patch(vlm.model, "grid:keep=1000"), pytest.raises(ValueError, match="only 36|only 24|only 16"):
        vlm.model(**vlm.prompts([[3, "a", 2]]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hyprune", "did you mean hiprune"),
        ("hiprune:keap=0.3", "did you mean keep"),
        ("hiprune:keep", "name=value"),
        ("hiprune:keep=", "name=value"),
        ("hiprune:keep=0.3,keep=0.4", "twice"),
        ("hiprune:keep=nan", "share of visual tokens"),
        ("hiprune:keep=abc", "share of visual tokens"),
        ("hiprune:alpha=2", "alpha"),
        ("hiprune:parity=oficial", "official"),
        ("fastervlm:fallback=cls", "received"),
        ("grid:positions=near", "compact"),
        ("", "methods:"),
        ("none+grid", "methods:"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        from_spec(spec)


def test_unpatchable_things(vlm):
    with pytest.raises(TypeError, match="transformers model"):
        vlmfast.patch("llava", METHOD)
    with pytest.raises(TypeError, match="cannot generate"):
        vlmfast.patch(vlm.model.model, METHOD)
    with pytest.raises(TypeError, match="spec string"):
        vlmfast.patch(vlm.model, 3)
    with pytest.raises(ValueError, match="compact"):
        vlmfast.patch(vlm.model, METHOD, positions="dense")
    with pytest.raises(ValueError, match="no setting|setting 'positions'|none of the methods"):
        vlmfast.patch(vlm.model, "none", positions="compact")
    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    )
    with pytest.raises(NotImplementedError, match="supported: llava, .*qwen2_5_vl"):
        vlmfast.patch(llama, METHOD)


def test_patching_twice_and_unpatching_the_unpatched(vlm):
    with (
        vlmfast.patch(vlm.model, METHOD),
        pytest.raises(RuntimeError, match="already patched with 'hiprune:keep=0.4'"),
    ):
        vlmfast.patch(vlm.model, "grid")
    with pytest.raises(RuntimeError, match="not patched"):
        vlmfast.unpatch(vlm.model)


def test_two_pruners_are_refused_and_leave_nothing(vlm):
    before = sorted(vlm.model.__dict__)
    with pytest.raises(NotImplementedError, match="two pruning methods"):
        vlmfast.patch(vlm.model, "grid+hiprune")
    assert sorted(vlm.model.__dict__) == before and "get_image_features" not in vlm.model.model.__dict__


def test_cls_methods_on_a_tower_without_cls(vlm):
    if vlm.name == "llava":
        return
    before = sorted(vlm.model.__dict__)
    with pytest.raises(NotImplementedError, match="fallback=received"):
        vlmfast.patch(vlm.model, "fastervlm")
    assert sorted(vlm.model.__dict__) == before


def test_layers_that_do_not_exist_or_have_windows(vlm):
    with pytest.raises(ValueError, match="4 layers"):
        vlmfast.patch(vlm.model, "hiprune:object_layer=9")
    if vlm.name == "qwen2_5_vl":
        with pytest.raises(ValueError, match="windows.*1, 3"):
            vlmfast.patch(vlm.model, "hiprune:object_layer=1")


def test_right_padding_with_generate(vlm):
    inputs = vlm.prompts(ROWS, side="right")
    with vlmfast.patch(vlm.model, METHOD), pytest.raises(ValueError, match="padding_side = 'left'"):
        greedy(vlm.model, inputs)


def test_placeholders_that_do_not_match(vlm):
    inputs = vlm.prompts(ROWS)
    inputs["input_ids"][0, -1] = 90
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"][0, -1] = 1
    with vlmfast.patch(vlm.model, METHOD), pytest.raises(ValueError, match="placeholders"):
        vlm.model(**inputs)


def test_what_cannot_work_says_so(vlm):
    inputs = vlm.prompts([[3, "a", 2]])
    with vlmfast.patch(vlm.model, METHOD):
        with pytest.raises(NotImplementedError, match="prefill_chunk_size"):
            greedy(vlm.model, inputs, prefill_chunk_size=4)
        with pytest.raises(NotImplementedError, match="inputs_embeds"):
            embeds = vlm.model.get_input_embeddings()(inputs["input_ids"])
            vlm.model(**{k: v for k, v in inputs.items() if k != "input_ids"}, inputs_embeds=embeds)
        with pytest.raises(NotImplementedError, match="logits_to_keep"):
            vlm.model(**inputs, logits_to_keep=torch.tensor([3]))
        with pytest.raises(NotImplementedError, match="4 dimensions"):
            n = inputs["input_ids"].shape[1]
            vlm.model(**{**inputs, "attention_mask": torch.ones(1, 1, n, n, dtype=torch.bool)})
        with pytest.raises(ValueError, match="expected"):
            out = vlm.model(**inputs, use_cache=True)
            vlm.model(
                input_ids=torch.tensor([[5]]),
                past_key_values=out.past_key_values,
                attention_mask=torch.ones(1, 7, dtype=torch.long),
            )
        if vlm.name == "qwen2_5_vl":
            bare = {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}
            with pytest.raises(ValueError, match="mm_token_type_ids"):
                vlm.model(**bare)
            with pytest.raises(ValueError, match="mm_token_type_ids"):
                greedy(vlm.model, bare)
            with pytest.raises(ValueError, match="video_grid_thw is missing"):
                vlm.model(**inputs, pixel_values_videos=torch.zeros(16, 96))


def test_damaged_spec_file(fresh, vlm, tmp_path):
    fresh(vlm.name).model.save_pretrained(tmp_path)
    (tmp_path / "vlmfast.json").write_text('{"spec": ')
    with pytest.raises(ValueError, match="damaged"):
        vlmfast.from_pretrained(tmp_path)


def test_methods_pickle(vlm):
    for name in ADAPTERS:
        method = from_spec(name)[0]
        assert pickle.loads(pickle.dumps(method)) == method
