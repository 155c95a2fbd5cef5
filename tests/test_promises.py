"""What every method promises on every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import vlmfast
from vlmfast.adapters import ADAPTERS, from_spec

# A spec for every method that works on every family.
SPECS = {name: name for name in ADAPTERS} | {"fastervlm": "fastervlm:fallback=received"}
ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]
DECODING = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sample": {"do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "static beam": {"do_sample": False, "num_beams": 2, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
}


def spec(name: str, **settings: Any) -> str:
    """The method's spec with further settings."""
    parts = [f"{key}={value}" for key, value in settings.items()]
    base, _, own = SPECS[name].partition(":")
    return base + ":" + ",".join(filter(None, [own, *parts]))


def snapshot(model: Any) -> list[Any]:
    """Everything a patch may touch: instance attributes, hooks, configs of every module, registered names."""
    state: list[Any] = [sorted(AttentionInterface._global_mapping), sorted(AttentionMaskInterface._global_mapping)]
    for name, module in model.named_modules():
        hooks = {key: len(module.__dict__[key]) for key in module.__dict__ if key.endswith("_hooks")}
        config = module.__dict__.get("config")
        state.append((name, sorted(module.__dict__), hooks, id(config)))
    return state


def generate(model: Any, inputs: dict[str, Any], **how: Any) -> torch.Tensor:
    torch.manual_seed(5)
    return model.generate(**inputs, max_new_tokens=5, **how)


@pytest.mark.parametrize("how", DECODING)
@pytest.mark.parametrize("name", ADAPTERS)
def test_generates_like_an_unpatched_model_given_the_shorter_prompt(vlm, name, how):
    inputs = vlm.prompts([[3, "a", 2]])
    with vlmfast.patch(vlm.model, spec(name), positions="compact") as handle:
        ours = generate(vlm.model, inputs, **DECODING[how])
        kept = handle.report().kept[0]
    shorter = shortened(vlm, inputs, kept)
    theirs = generate(vlm.model, shorter, **DECODING[how])
    width = inputs["input_ids"].shape[1]
    assert torch.equal(ours[:, :width], inputs["input_ids"].expand(len(ours), -1)), "the prompt comes back whole"
    assert torch.equal(ours[:, width:], theirs[:, shorter["input_ids"].shape[1] :])


def shortened(vlm, inputs, kept):
    """The same prompt cut by hand, for the unpatched model, with compact positions given explicitly."""
    model = vlm.model
    encode = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        output = model.model.get_image_features(**encode, return_dict=True)
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    stays[places] = False
    stays[places[kept]] = True
    output.pooler_output = [output.pooler_output[0][kept]]
    length = int(stays.sum())
    result = {
        "input_ids": inputs["input_ids"][:, stays],
        "attention_mask": torch.ones(1, length, dtype=torch.long),
        "mm_encoder_outputs": {"image": output},
        "position_ids": torch.arange(length)[None],
    }
    if vlm.name == "qwen2_5_vl":
        first = int(places[0])
        t, h, w = inputs["image_grid_thw"][0].tolist()
        columns = w // 2
        ys = sorted({int(i) // columns for i in kept})
        xs = sorted({int(i) % columns for i in kept})
        axes = [[p] * 3 for p in range(first)]
        axes += [[first, first + ys.index(int(i) // columns), first + xs.index(int(i) % columns)] for i in kept]
        after = first + max(len(ys), len(xs))
        axes += [[after + p] * 3 for p in range(length - len(axes))]
        text = torch.arange(length)[None, None]
        result["position_ids"] = torch.cat([text, torch.tensor(axes).T[:, None]])
    return result


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_batch_with_left_padding_equals_its_rows_alone(vlm, name, positions):
    together = vlm.prompts(ROWS)
    with vlmfast.patch(vlm.model, spec(name), positions=positions):
        logits = vlm.model(**together).logits[:, -1]
        tokens = generate(vlm.model, together, do_sample=False)[:, -5:]
        beams = generate(vlm.model, together, do_sample=False, num_beams=3)[:, -5:]
        for row in range(3):
            alone = only(vlm, together, row)
            torch.testing.assert_close(vlm.model(**alone).logits[0, -1], logits[row], rtol=1e-4, atol=1e-4)
            assert torch.equal(generate(vlm.model, alone, do_sample=False)[0, -5:], tokens[row])
            assert torch.equal(generate(vlm.model, alone, do_sample=False, num_beams=3)[0, -5:], beams[row])


def only(vlm, inputs, row):
    """One row of a batch, without its padding and with its own images."""
    real = inputs["attention_mask"][row].bool()
    alone = {
        key: inputs[key][row : row + 1, real]
        for key in ("input_ids", "attention_mask", "mm_token_type_ids")
        if key in inputs
    }
    owned = {0: [0], 1: [1, 2], 2: []}[row]
    if owned and vlm.name == "llava":
        alone["pixel_values"] = inputs["pixel_values"][owned]
    elif owned:
        grids = inputs["image_grid_thw"]
        parts = inputs["pixel_values"].split(grids.prod(1).tolist())
        alone |= {"pixel_values": torch.cat([parts[i] for i in owned]), "image_grid_thw": grids[owned]}
    return alone


@pytest.mark.parametrize("name", ADAPTERS)
def test_dropping_equals_masking(vlm, name):
    """A pruned run must give the logits of the full run in which nobody may attend to the dropped tokens."""
    inputs = vlm.prompts([[3, "a", 2, "b", 4]])
    with vlmfast.patch(vlm.model, spec(name), positions="original") as handle:
        pruned = vlm.model(**inputs).logits[0]
        kept = handle.report().kept
    places = (inputs["input_ids"][0] == vlm.model.config.image_token_id).nonzero().flatten()
    stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    start = 0
    for indices, n in zip(kept, (image.n for image in handle.report().images)):
        dropped = torch.ones(n, dtype=torch.bool)
        dropped[indices] = False
        stays[places[start : start + n][dropped]] = False
        start += n
    masked = {**inputs, "attention_mask": stays.long()[None]}
    masked["position_ids"] = torch.arange(len(stays))[None]
    if vlm.name == "qwen2_5_vl":
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        masked["position_ids"], _ = vlm.model.model.get_rope_index(**{name: inputs[name] for name in names})
    full = vlm.model(**masked).logits[0]
    torch.testing.assert_close(pruned, full[stays], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_changes_the_logits_and_keeps_the_budget(vlm, name):
    inputs = vlm.prompts(ROWS)
    plain = vlm.model(**inputs).logits[:, -1]
    with vlmfast.patch(vlm.model, spec(name, keep=0.25)) as handle:
        pruned = vlm.model(**inputs).logits[:, -1]
        report = handle.report()
    assert not torch.allclose(plain[:2], pruned[:2], atol=1e-3), "rows with images change"
    torch.testing.assert_close(plain[2], pruned[2], rtol=1e-4, atol=1e-4)
    assert len(report.images) == 3
    for image, indices, grid in zip(report.images, report.kept, report.grids):
        assert image.kept == max(1, round(0.25 * image.n)) == len(indices)
        assert grid[0] * grid[1] * grid[2] == image.n
        assert indices.tolist() == sorted(set(indices.tolist()))


@pytest.mark.parametrize("name", ADAPTERS)
def test_keeping_everything_is_the_identity(vlm, name):
    inputs = vlm.prompts(ROWS)
    logits, tokens = vlm.model(**inputs).logits, generate(vlm.model, inputs, do_sample=False)
    with vlmfast.patch(vlm.model, spec(name, keep=1.0)):
        assert torch.equal(vlm.model(**inputs).logits, logits)
        assert torch.equal(generate(vlm.model, inputs, do_sample=False), tokens)


@pytest.mark.parametrize("name", ADAPTERS)
def test_unpatch_restores_bit_for_bit_and_leaves_nothing(vlm, name):
    inputs = vlm.prompts(ROWS)
    logits, tokens, before = vlm.model(**inputs).logits, generate(vlm.model, inputs), snapshot(vlm.model)
    handle = vlmfast.patch(vlm.model, spec(name))
    assert snapshot(vlm.model) != before
    generate(vlm.model, inputs)
    vlm.model(**inputs)
    vlmfast.unpatch(vlm.model)
    handle.close()  # a second time changes nothing
    assert snapshot(vlm.model) == before
    assert torch.equal(vlm.model(**inputs).logits, logits)
    assert torch.equal(generate(vlm.model, inputs), tokens)


@pytest.mark.parametrize("name", ADAPTERS)
def test_undoes_after_an_error(vlm, name):
    before = snapshot(vlm.model)
    with pytest.raises(ZeroDivisionError), vlmfast.patch(vlm.model, spec(name)):
        1 / 0  # noqa: B018
    assert snapshot(vlm.model) == before


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_deep_copy_is_patched_and_unpatched_by_itself(vlm, name):
    inputs = vlm.prompts(ROWS)
    plain = vlm.model(**inputs).logits
    with vlmfast.patch(vlm.model, spec(name, keep=0.25)):
        pruned = vlm.model(**inputs).logits
        twin = copy.deepcopy(vlm.model)
        with torch.no_grad():
            vlm.model.lm_head.weight.neg_()
        torch.testing.assert_close(twin(**inputs).logits, pruned)
        vlmfast.unpatch(twin)
        assert torch.equal(twin(**inputs).logits, plain)
        with torch.no_grad():
            vlm.model.lm_head.weight.neg_()
        assert torch.equal(vlm.model(**inputs).logits, pruned), "the original is still patched"


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_choice_depends_on_the_image_alone(vlm, name):
    with vlmfast.patch(vlm.model, spec(name)) as handle:
        vlm.model(**vlm.prompts([[3, "a", 2], [2, "b", 9]]))
        first = handle.report().kept[1]
        vlm.model(**vlm.prompts([[5, "b", 1, "a"]], seed=3))
        assert torch.equal(handle.report().kept[0], first)


@pytest.mark.parametrize("name", ADAPTERS)
def test_patched_then_bf16(fresh, vlm, name):
    half = fresh(vlm.name)
    half.model.to(torch.bfloat16)
    inputs = half.prompts(ROWS)
    with vlmfast.patch(half.model, spec(name)):
        assert half.model(**inputs).logits.isfinite().all()
        assert generate(half.model, inputs, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 5


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_and_loaded_back(fresh, vlm, name, tmp_path):
    one = fresh(vlm.name)
    inputs = one.prompts(ROWS)
    with vlmfast.patch(one.model, spec(name, keep=0.25)) as handle:
        pruned = one.model(**inputs).logits
        one.model.save_pretrained(tmp_path / "patched")
    one.model.save_pretrained(tmp_path / "plain")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    loaded = vlmfast.from_pretrained(tmp_path / "patched").eval()
    assert loaded.vlmfast_handle.spec == handle.spec
    assert torch.equal(loaded(**inputs).logits, pruned)
    assert not hasattr(vlmfast.from_pretrained(tmp_path / "plain"), "vlmfast_handle")


@pytest.mark.parametrize("name", ADAPTERS)
def test_specs_round_trip(name):
    from vlmfast.adapters import to_spec

    for text in (SPECS[name], spec(name, keep=3), spec(name, keep=0.125, positions="original")):
        adapters = from_spec(text)
        assert from_spec(to_spec(adapters)) == adapters
