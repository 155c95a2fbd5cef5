"""Modality-gated LoRA: against plain loops through whole models, what it wraps, what it costs, and bad settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TINY
from peft import get_peft_model
from test_tuning_pill import PROMPTS, edited, equals_the_oracle, families, layers_of, random_weights, visual
from torch import Tensor, nn

import vlmfast
from vlmfast.adapters.tuning import VisualLoraConfig
from vlmfast.adapters.tuning.visual_lora import VisualLoraLayer

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
LINEAR = {f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")}
DENSE = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
SHARED = {name.replace("mlp.", "mlp.shared_expert.") for name in DENSE}
WRAPPED = {  # in layers with attention, and in those without
    "qwen3_5": (ATTENTION | DENSE, LINEAR | DENSE),
    "qwen3_5_moe": (ATTENTION | SHARED, LINEAR | SHARED),
    "qwen3_vl_moe": (ATTENTION, None),
}


def wrapped(layer: nn.Module) -> dict[str, VisualLoraLayer]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, VisualLoraLayer)}


def oracle(plain: Any, peft: Any, shown: Tensor, factors: dict[str, float], tokens: str = "visual") -> Any:
    """The plain model edited token by token with the weights of a tuned one. factors: alpha / r, by adapter."""
    places: dict[nn.Module, Callable[[Tensor, Tensor], Tensor]] = {}
    for own, tuned in zip(layers_of(plain), layers_of(peft)):
        for name, module in wrapped(tuned).items():

            def update(x: Tensor, y: Tensor, module: Any = module) -> Tensor:
                result, rows = y.flatten(0, -2).clone(), x.flatten(0, -2)
                length = len(rows) // len(shown)  # some modules are given all rows of the batch behind one another
                for at in range(len(rows)):
                    row, column = divmod(at, length)
                    is_visual = column < shown.shape[1] and bool(shown[row, column])
                    for adapter, factor in factors.items() if is_visual == (tokens == "visual") else ():
                        a, b = module.visual_lora_A[adapter], module.visual_lora_B[adapter]
                        result[at] += factor * (b @ (a @ rows[at]))
                return result.view_as(y)

            places[own.get_submodule(name)] = update
    return edited(places)


@pytest.mark.parametrize("name", families("llava", "qwen3_5"))
def test_plain_loops_through_whole_models(name, fresh):
    vlm = fresh(name)
    plain, inputs = copy.deepcopy(vlm.model), vlm.prompts(PROMPTS)
    peft = get_peft_model(vlm.model, VisualLoraConfig(r=4, alpha=6)).eval()
    random_weights(peft, "visual_lora_")
    reference = oracle(plain, peft, visual(inputs["input_ids"]), {"default": 1.5})
    equals_the_oracle(plain, peft, inputs, reference)


def test_a_shared_expert_is_given_all_rows_behind_one_another(fresh):
    vlm = fresh("qwen3_5_moe")
    plain, inputs = copy.deepcopy(vlm.model), vlm.prompts([[1, "a", 2], [2]])
    config = VisualLoraConfig(r=4, target_modules=r".*language_model\.layers\.\d+\.mlp\.shared_expert\.\w+_proj")
    peft = get_peft_model(vlm.model, config).eval()
    random_weights(peft, "visual_lora_")
    with torch.no_grad(), oracle(plain, peft, visual(inputs["input_ids"]), {"default": 8.0}):
        found, expected = peft(**inputs).logits, plain(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.allclose(found[real], expected[real], rtol=1e-3, atol=1e-3)


def test_text_instead(fresh):
    """The other way round: generated tokens pass it then."""
    vlm = fresh("llava")
    plain, inputs = copy.deepcopy(vlm.model), vlm.prompts(PROMPTS)
    peft = get_peft_model(vlm.model, VisualLoraConfig(r=4, alpha=4, tokens="text")).eval()
    random_weights(peft, "visual_lora_")
    reference = oracle(plain, peft, visual(inputs["input_ids"]), {"default": 1.0}, tokens="text")
    equals_the_oracle(plain, peft, inputs, reference)


def test_two_adapters_at_once(fresh):
    """Each with its own rank and tokens; what they add adds up."""
    vlm = fresh("llava")
    plain, inputs = copy.deepcopy(vlm.model), vlm.prompts([[3, "a", 2]])
    peft = get_peft_model(vlm.model, VisualLoraConfig(r=4, alpha=4)).eval()
    peft.add_adapter("second", VisualLoraConfig(r=2, alpha=1))
    peft.base_model.set_adapter(["default", "second"])
    random_weights(peft, "visual_lora_")
    shown = visual(inputs["input_ids"])
    equals_the_oracle(plain, peft, inputs, oracle(plain, peft, shown, {"default": 1.0, "second": 0.5}))


def test_where_it_sits(fresh):
    """The projections of attention and of dense feed-forward nets, in every layer, and nothing else."""
    for name in ("llava", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"):
        peft = get_peft_model(fresh(name).model, VisualLoraConfig(r=2))
        with_attention, without = WRAPPED.get(name, (ATTENTION | DENSE, None))
        for layer in layers_of(peft):
            assert set(wrapped(layer)) == (with_attention if hasattr(layer, "self_attn") else without), name
        everywhere = sum(isinstance(module, VisualLoraLayer) for module in peft.modules())
        assert everywhere == sum(len(wrapped(layer)) for layer in layers_of(peft))


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_family_has_something_to_wrap(name, fresh):
    peft = get_peft_model(fresh(name).model, VisualLoraConfig(r=2))
    assert all(len(wrapped(layer)) >= 4 for layer in layers_of(peft))


def test_a_fresh_adapter_changes_nothing(fresh):
    vlm = fresh("llava")
    inputs = vlm.prompts(PROMPTS)
    expected = vlm.model(**inputs).logits
    peft = get_peft_model(vlm.model, VisualLoraConfig(dropout=0.5))
    for tokens in ("visual", "text"):
        peft.add_adapter(tokens, VisualLoraConfig(tokens=tokens))
        peft.set_adapter(tokens)
        assert torch.equal(peft.eval()(**inputs).logits, expected)
    downs = [p for name, p in peft.named_parameters() if "visual_lora_A.default" in name]
    assert all(0.5 < p.abs().max() * p.shape[1] ** 0.5 <= 1 for p in downs)  # as LoRA begins


# --- what runs on which tokens -------------------------------------------------------------------------------------


def rows_of(peft: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens pass each update, call by call."""
    seen: list[int] = []
    plain = VisualLoraLayer.update

    def counted(self: VisualLoraLayer, name: str, x: Tensor) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        return plain(self, name, x)

    monkeypatch.setattr(VisualLoraLayer, "update", counted)
    return seen


def test_cost(fresh, monkeypatch):
    """Only the tokens that it is for pass an update, so that generated tokens cost nothing."""
    vlm = fresh("llava")
    inputs = vlm.prompts(PROMPTS)
    total, shown = inputs["input_ids"].numel(), int(visual(inputs["input_ids"]).sum())
    peft = get_peft_model(vlm.model, VisualLoraConfig(r=2)).eval()
    peft.add_adapter("text", VisualLoraConfig(r=2, tokens="text"))
    updates = 3 * 7  # layers, projections
    seen = rows_of(peft, monkeypatch)
    peft.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert seen == [shown] * updates
    seen.clear()
    with peft.disable_adapter():
        peft(**inputs)
    assert seen == []
    peft.set_adapter("text")
    peft.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert seen == [total - shown] * updates + [len(PROMPTS)] * updates


def test_rows_without_its_tokens_leave_zero_gradients(fresh):
    """Replicas that train together wait for a gradient of every parameter, each step."""
    vlm = fresh("llava")
    inputs = {"visual": vlm.prompts([[5], [3]]), "text": vlm.prompts([["a"]])}
    peft = get_peft_model(vlm.model, VisualLoraConfig(r=2), adapter_name="visual")
    peft.add_adapter("text", VisualLoraConfig(r=2, tokens="text"))
    random_weights(peft, "visual_lora_")
    for mode, other in (("visual", "text"), ("text", "visual")):
        peft.set_adapter(mode)
        peft.train()
        for without, some in ((True, inputs[mode]), (False, inputs[other])):
            peft.zero_grad()
            peft(**some).logits.square().sum().backward()
            for name, parameter in peft.named_parameters():
                if parameter.requires_grad:
                    assert f".{mode}" in name and parameter.grad is not None
                    assert without != bool(parameter.grad.any()) or "layers.2.mlp" in name and mode == "visual"


def test_dropout(fresh):
    """In training alone, and of what the update is given alone."""
    vlm = fresh("llava")
    inputs = vlm.prompts(PROMPTS)
    peft = get_peft_model(vlm.model, VisualLoraConfig(r=2, dropout=0.5, layers_to_transform=[0]))
    plain = peft.eval()(**inputs).logits
    assert torch.equal(peft.train()(**inputs).logits, plain), "of the update alone, which is still zero"
    random_weights(peft, "visual_lora_")
    seen = [peft.train(train)(**inputs).logits for train in (False, False, True, True)]
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(seen[2], seen[3])
    layer = layers_of(peft)[0].self_attn.q_proj.train()
    with torch.no_grad():
        layer.visual_lora_A["default"].fill_(1.0), layer.visual_lora_B["default"].fill_(1.0)
        found = layer.update("default", torch.eye(32)).unique()
    assert torch.equal(found, torch.tensor([0.0, 2 * 2 * 32 / 2])), "what is left counts twice"


@pytest.mark.parametrize("spec", ["random:keep=0.5", "eemllm:visual_update=none", "vhr:layers=1:", "only", "m3id"])
def test_beside_methods(spec, fresh):
    """The same update for visual tokens and for text is one of the weights: no token is missed, or passes it twice."""
    vlm = fresh("llava")
    dense, inputs = copy.deepcopy(vlm.model), vlm.prompts([[3, "a", 2], [2, "b", 4, "a", 1]])
    peft = get_peft_model(vlm.model, VisualLoraConfig(r=4, alpha=2), adapter_name="visual").eval()
    peft.add_adapter("text", VisualLoraConfig(r=4, alpha=2, tokens="text"))
    peft.base_model.set_adapter(["visual", "text"])
    random_weights(peft, "visual_lora_")
    with torch.no_grad():
        for own, tuned in zip(layers_of(dense), layers_of(peft)):
            for name, module in wrapped(tuned).items():
                for part in (module.visual_lora_A, module.visual_lora_B):
                    part["text"].copy_(part["visual"])
                own.get_submodule(name).weight += module.visual_lora_B["text"] @ module.visual_lora_A["text"] / 2
        found = []
        for model in (peft, dense):
            torch.manual_seed(0)
            with vlmfast.patch(model, spec):
                settings = {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
                found.append(torch.stack(model.generate(**inputs, max_new_tokens=3, **settings).scores))
        assert torch.allclose(*found, rtol=1e-3, atol=1e-3)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_modules_by_name(fresh):
    """Names are those inside the language model: towers have projections of the same names."""
    peft = get_peft_model(fresh("llava").model, VisualLoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    names = [name for name, module in peft.named_modules() if isinstance(module, VisualLoraLayer)]
    assert len(names) == 6 and all("language_model.layers" in name for name in names)
    with pytest.raises(ValueError, match="in no decoder layer"):
        get_peft_model(fresh("llava").model, VisualLoraConfig(target_modules=r".*vision_tower.*\.v_proj"))
    with pytest.raises(ValueError, match="linear layers, LlamaRMSNorm is none"):
        get_peft_model(fresh("llava").model, VisualLoraConfig(target_modules=["input_layernorm"]))


def test_no_merging(fresh):
    vlm = fresh("llava")
    peft, inputs = get_peft_model(vlm.model, VisualLoraConfig(r=2)).eval(), vlm.prompts([[3, "a", 2]])
    random_weights(peft, "visual_lora_")
    expected = peft(**inputs).logits
    for merge in (peft.merge_adapter, peft.merge_and_unload):
        with pytest.raises(NotImplementedError, match="depends on its input"):
            merge()
    assert torch.equal(peft(**inputs).logits, expected)


def test_settings():
    wrong: list[dict[str, Any]] = [
        {"r": 0},
        {"r": True},
        {"alpha": 0},
        {"alpha": float("inf")},
        {"alpha": "1"},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"tokens": "image"},
    ]
    for settings in wrong:
        with pytest.raises(ValueError, match=next(iter(settings))):
            VisualLoraConfig(**settings)
