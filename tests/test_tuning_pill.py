"""PILL: against plain loops through whole models, its stages, what runs on which tokens, and bad settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import TINY
from peft import PeftModel, get_peft_model
from tiny import IMAGE, VIDEO, text_settings
from tiny_llava import clip
from torch import Tensor, nn
from transformers import Gemma2Config, LlavaConfig, LlavaForConditionalGeneration, Phi3Config

from vlmfast.adapters.tuning import PillConfig
from vlmfast.adapters.tuning.pill import Glu, PillExperts, PillGate, PillInput

PROMPTS = [[3, "a", 2], [4]]  # and a row of text, padded on the left
FED = {"gemma3": "pre_feedforward_layernorm"}  # the norm before the feed-forward net, where it is another one


def families(*fast: str) -> list[Any]:
    """Test parameters: every family, all but these slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in TINY]


def visual(ids: Tensor) -> Tensor:
    return (ids == IMAGE) | (ids == VIDEO)


def layers_of(model: Any) -> nn.ModuleList:
    return getattr(model, "get_base_model", lambda: model)().model.get_decoder().layers


def random_weights(peft: Any, prefix: str) -> None:
    """Adapters far from their start."""
    torch.manual_seed(3)
    for name, parameter in peft.named_parameters():
        if prefix in name:
            nn.init.normal_(parameter, std=0.7 / parameter.shape[-1] ** 0.5)


@contextmanager
def edited(places: dict[nn.Module, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[None]:
    """Modules whose outputs are edited: (input, output) -> output."""
    hooks = [
        module.register_forward_hook(lambda m, args, output, edit=edit: edit(args[0], output))
        for module, edit in places.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


def tokens(hidden: Tensor, shown: Tensor) -> Iterator[tuple[int, int, bool]]:
    """(row, column, whether it is visual) of every token. shown: bool [B, L] of the prompt; what follows is text."""
    for row in range(hidden.shape[0]):
        for column in range(hidden.shape[1]):
            yield row, column, column < shown.shape[1] and bool(shown[row, column])


def glu(adapter: Any, y: Tensor) -> Tensor:
    g, d, u = adapter.gate.weight, adapter.down.weight, adapter.up.weight
    return u @ ((g @ y) * torch.sigmoid(g @ y) * (d @ y))


def oracle(plain: Any, peft: Any, shown: Tensor, names: tuple[str, ...] = ("default",), fed: str = "") -> Any:
    """The plain model edited token by token with the weights of a tuned one."""
    places: dict[nn.Module, Callable[[Tensor, Tensor], Tensor]] = {}
    layers = layers_of(plain)
    for own, tuned in zip(layers, layers_of(peft)):
        place = fed or "post_attention_layernorm"

        def attend(x: Tensor, y: Tensor, tuned: Any = tuned) -> Tensor:
            result = y.clone()
            for row, column, _ in tokens(y, shown):
                for name in names:
                    result[row, column] += glu(tuned.input_layernorm.pill_attn[name], y[row, column])
            return result

        experts_of, last = getattr(tuned, place), own is layers[-1]

        def feed(x: Tensor, y: Tensor, norm: Any = experts_of, last: bool = last) -> Tensor:
            result = y.clone()
            for row, column, is_visual in tokens(y, shown):
                for name in names:
                    exchanged = last and peft.peft_config[name].stage == "alignment"
                    experts = norm.pill_visual if is_visual != exchanged else norm.pill_text
                    result[row, column] += glu(experts[name], y[row, column])
            return result

        places[own.input_layernorm], places[getattr(own, place)] = attend, feed
        if hasattr(own, "self_attn"):

            def gated(u: Tensor, v: Tensor, tuned: Any = tuned, width: int = own.self_attn.head_dim) -> Tensor:
                result = v.clone()
                for row, column, is_visual in tokens(v, shown):
                    for name in names if is_visual else ():
                        if peft.peft_config[name].stage == "alignment":
                            continue
                        weight = tuned.self_attn.v_proj.pill_gate[name].weight
                        for head in range(v.shape[-1] // width):
                            opened = torch.tanh(weight[head] @ u[row, column])
                            opened = opened + (peft.peft_config[name].gate_init == "identity")
                            result[row, column, head * width : (head + 1) * width] *= opened
                return result

            places[own.self_attn.v_proj] = gated
    return edited(places)


def equals_the_oracle(plain: Any, peft: Any, inputs: dict[str, Tensor], reference: Any) -> None:
    """Whole prompts, and what is generated with a cache beside the same without one."""
    settings = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        found, generated = peft(**inputs).logits, peft.generate(**inputs, **settings)
        with reference:
            expected = plain(**inputs).logits
            other = plain.generate(**inputs, **settings, use_cache=False)
        real = inputs["attention_mask"].bool()
        assert torch.allclose(found[real], expected[real], rtol=1e-3, atol=1e-3)
        assert (expected - plain(**inputs).logits)[real].abs().max() > 0.5
    assert torch.equal(generated.sequences, other.sequences)
    for one, two in zip(generated.logits, other.logits):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", families("llava", "gemma3", "qwen3_5"))
def test_plain_loops_through_whole_models(name, fresh):
    vlm = fresh(name)
    plain, inputs = copy.deepcopy(vlm.model), vlm.prompts(PROMPTS)
    peft = get_peft_model(vlm.model, PillConfig(r=3)).eval()
    random_weights(peft, "pill_")
    reference = oracle(plain, peft, visual(inputs["input_ids"]), fed=FED.get(name, ""))
    equals_the_oracle(plain, peft, inputs, reference)


@pytest.mark.parametrize(
    "settings", [{"gate_init": "official"}, {"stage": "alignment"}], ids=["official", "alignment"]
)
def test_other_forms(fresh, settings):
    """The authors' gate; no gate and exchanged experts in the last layer, for generated tokens, too."""
    vlm = fresh("llava")
    plain, inputs = copy.deepcopy(vlm.model), vlm.prompts(PROMPTS)
    peft = get_peft_model(vlm.model, PillConfig(r=3, **settings)).eval()
    random_weights(peft, "pill_")
    equals_the_oracle(plain, peft, inputs, oracle(plain, peft, visual(inputs["input_ids"])))


def test_two_adapters_at_once(fresh):
    """What they add adds up, gates multiply."""
    vlm = fresh("llava")
    plain, inputs = copy.deepcopy(vlm.model), vlm.prompts([[3, "a", 2]])
    peft = get_peft_model(vlm.model, PillConfig(r=3)).eval()
    peft.add_adapter("second", PillConfig(r=2, gate_init="official"))
    random_weights(peft, "pill_")
    peft.base_model.set_adapter(["default", "second"])
    reference = oracle(plain, peft, visual(inputs["input_ids"]), ("default", "second"))
    equals_the_oracle(plain, peft, inputs, reference)


# --- the start -----------------------------------------------------------------------------------------------------


def test_a_fresh_adapter(fresh):
    """It changes nothing, bit for bit; the authors' silences pictures, which text then sees as zeros."""
    vlm = fresh("llava")
    plain, inputs = copy.deepcopy(vlm.model), vlm.prompts(PROMPTS)
    expected = plain(**inputs).logits
    peft = get_peft_model(vlm.model, PillConfig(r=3)).eval()
    assert torch.equal(peft(**inputs).logits, expected)
    peft.add_adapter("official", PillConfig(r=3, gate_init="official"))
    peft.set_adapter("official")
    shown = visual(inputs["input_ids"])
    silent = {layer.self_attn.v_proj: lambda u, v: v.masked_fill(shown[..., None], 0.0) for layer in layers_of(plain)}
    with edited(silent):
        assert torch.equal(peft(**inputs).logits, plain(**inputs).logits)
    glus = [module for module in peft.modules() if isinstance(module, Glu)]
    down = torch.cat([one.down.weight.flatten() for one in glus])
    assert abs(float(down.detach().std()) - 0.02) < 0.002 and all(not one.up.weight.any() for one in glus)
    bound = 32**-0.5  # of PyTorch's own start for a width of 32
    assert all(0.5 * bound < one.gate.weight.abs().max() <= bound for one in glus)


def test_where_it_sits(fresh):
    """A gate for every head that has values; none in layers of linear attention; four norms; nothing in the tower."""
    for name, attends in {"llava": [0, 1, 2], "gemma3": [0, 1, 2], "qwen3_5": [3]}.items():
        peft = get_peft_model(fresh(name).model, PillConfig(r=2))
        layers = layers_of(peft)
        gates = {n: layer.self_attn.v_proj.pill_gate["default"] for n, layer in enumerate(layers) if n in attends}
        assert all(gate.weight.shape == (2, 32) for gate in gates.values())
        parts = [type(one) for one in peft.modules() if isinstance(one, (PillInput, PillExperts, PillGate))]
        assert [parts.count(kind) for kind in (PillInput, PillExperts, PillGate)] == [len(layers)] * 2 + [len(attends)]
        assert all(isinstance(layer.input_layernorm, PillInput) for layer in layers)
        for layer in layers:
            assert isinstance(getattr(layer, FED.get(name, "post_attention_layernorm")), PillExperts)


def test_bfloat16_base(fresh):
    """Adapters in fp32, hidden states as they were, and a start that changes nothing."""
    vlm = fresh("llava")
    vlm.model.to(torch.bfloat16)
    inputs = vlm.prompts([[3, "a", 2], [2]])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    expected = vlm.model(**inputs).logits
    peft = get_peft_model(vlm.model, PillConfig(r=3)).eval()
    assert {p.dtype for name, p in peft.named_parameters() if "pill_" in name} == {torch.float32}
    assert torch.equal(peft(**inputs).logits, expected)
    random_weights(peft, "pill_")
    for layer in layers_of(peft):
        layer.register_forward_hook(lambda m, args, output: dtypes.add(output.dtype))
    dtypes: set[torch.dtype] = set()
    assert not torch.equal(peft(**inputs).logits, expected) and dtypes == {torch.bfloat16}


# --- what runs on which tokens -------------------------------------------------------------------------------------


@contextmanager
def rows_of(peft: Any) -> Iterator[list[tuple[str, int]]]:
    """(dict, tokens) of every part that runs in the first layer."""
    layer, seen = layers_of(peft)[0], []
    parts = {
        "pill_attn": layer.input_layernorm,
        "pill_visual": layer.post_attention_layernorm,
        "pill_text": layer.post_attention_layernorm,
        "pill_gate": layer.self_attn.v_proj,
    }

    def count(name: str) -> Any:
        return lambda module, args: seen.append((name, args[0].numel() // args[0].shape[-1]))

    hooks = [getattr(module, name)["default"].register_forward_pre_hook(count(name)) for name, module in parts.items()]
    yield seen
    for hook in hooks:
        hook.remove()


def test_parts_run_on_their_own_tokens(fresh):
    vlm = fresh("llava")
    peft, inputs = get_peft_model(vlm.model, PillConfig(r=2)).eval(), vlm.prompts(PROMPTS)
    total, shown = inputs["input_ids"].numel(), int(visual(inputs["input_ids"]).sum())
    with rows_of(peft) as seen:
        peft.generate(**inputs, max_new_tokens=2, do_sample=False)
    prompt = [("pill_attn", total), ("pill_gate", shown), ("pill_visual", shown), ("pill_text", total - shown)]
    assert seen == [*prompt, ("pill_attn", 2), ("pill_text", 2)]
    with rows_of(peft) as seen, peft.disable_adapter():
        peft(**inputs)
    assert seen == []


@pytest.mark.parametrize("stage", ["instruction", "alignment"])
def test_text_alone_leaves_zero_gradients(fresh, stage):
    """Replicas that train together wait for a gradient of every parameter, each step."""
    vlm = fresh("llava")
    peft = get_peft_model(vlm.model, PillConfig(r=2, stage=stage)).train()
    random_weights(peft, "pill_")
    inputs = vlm.prompts([[5], [3]])
    peft(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())
    last = f".layers.{len(layers_of(peft)) - 1}."
    for name, parameter in trained.items():
        idle = "pill_visual" in name and not (stage == "alignment" and last in name) or "pill_gate" in name
        assert bool(parameter.grad.any()) != idle, name
    peft.zero_grad()
    inputs = vlm.prompts([["a"]])  # nothing but visual tokens
    peft(**inputs).logits.sum().backward()
    for name, parameter in trained.items():
        idle = "pill_text" in name or stage == "alignment" and last in name
        assert parameter.grad is not None and bool(parameter.grad.any()) != idle, name
    with rows_of(peft) as seen, torch.no_grad():
        peft(**vlm.prompts([[5]]))
    assert [name for name, _ in seen] == ["pill_attn", "pill_text"]


# --- stages --------------------------------------------------------------------------------------------------------


def trained(peft: Any) -> set[str]:
    """The dicts whose parameters train."""
    return {
        part for name, p in peft.named_parameters() if p.requires_grad for part in name.split(".") if "pill_" in part
    }


def test_from_alignment_to_instruction(fresh, tmp_path):
    """Only visual experts learn at first, whatever is switched meanwhile; then everything goes on from there."""
    vlm = fresh("llava")
    plain = copy.deepcopy(vlm.model)
    peft = get_peft_model(vlm.model, PillConfig(r=2, stage="alignment"))
    assert trained(peft) == {"pill_visual"}
    with peft.disable_adapter():
        pass
    assert trained(peft) == {"pill_visual"}
    peft.add_adapter("other", PillConfig(r=2))
    peft.set_adapter("other")
    assert trained(peft) == {"pill_attn", "pill_visual", "pill_text", "pill_gate"}
    peft.set_adapter("default")
    peft.base_model.set_requires_grad("default")
    assert trained(peft) == {"pill_visual"}
    peft.delete_adapter("other")
    peft.train()
    inputs = vlm.prompts([[3, "a", 4]])
    optimiser = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.5)
    peft(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimiser.step()
    for number, layer in enumerate(layers_of(peft)):
        parts = layer.post_attention_layernorm
        assert parts.pill_visual["default"].up.weight.any(), f"layer {number} learns"
        assert not parts.pill_text["default"].up.weight.any()
    peft.save_pretrained(tmp_path)
    later = PeftModel.from_pretrained(plain, tmp_path, config=PillConfig(r=2), is_trainable=True)
    assert trained(later) == {"pill_attn", "pill_visual", "pill_text", "pill_gate"}
    for one, other in zip(layers_of(peft), layers_of(later)):
        one, other = (layer.post_attention_layernorm.pill_visual["default"] for layer in (one, other))
        assert torch.equal(one.up.weight, other.up.weight)
    again = PeftModel.from_pretrained(later.unload(), tmp_path)
    assert again.peft_config["default"].stage == "alignment" and not trained(again)


# --- refusals ------------------------------------------------------------------------------------------------------


def llava_with(text: Any) -> LlavaForConditionalGeneration:
    config = LlavaConfig(vision_config=clip(), text_config=text, image_token_id=IMAGE)
    return LlavaForConditionalGeneration(config).eval()


def test_other_decoders(fresh):
    """Gemma 2 has four norms, too. Phi-3's projections are one."""
    model = llava_with(Gemma2Config(**text_settings(head_dim=8)))
    plain, inputs = copy.deepcopy(model), fresh("llava").prompts([[3, "a", 2]])
    peft = get_peft_model(model, PillConfig(r=3)).eval()
    random_weights(peft, "pill_")
    with torch.no_grad(), oracle(plain, peft, visual(inputs["input_ids"]), fed="pre_feedforward_layernorm"):
        assert torch.allclose(peft(**inputs).logits, plain(**inputs).logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(NotImplementedError, match=r"self_attn.v_proj.*llava \(Phi3DecoderLayer\)"):
        get_peft_model(llava_with(Phi3Config(**text_settings())), PillConfig())


def test_modules_by_name(fresh):
    """Names are those inside the language model; nothing but PILL's places can be wrapped."""
    peft = get_peft_model(fresh("llava").model, PillConfig(target_modules=["v_proj"], layers_to_transform=[1]))
    wrapped = [name for name, module in peft.named_modules() if isinstance(module, (PillInput, PillExperts, PillGate))]
    assert len(wrapped) == 1 and wrapped[0].endswith("language_model.layers.1.self_attn.v_proj")
    with pytest.raises(ValueError, match="mlp: PILL wraps input_layernorm, post_attention_layernorm"):
        get_peft_model(fresh("llava").model, PillConfig(target_modules=["mlp"]))
    with pytest.raises(ValueError, match="in no decoder layer"):
        get_peft_model(fresh("llava").model, PillConfig(target_modules=r".*vision_tower.*\.v_proj"))
    with pytest.raises(ValueError, match="PILL wraps .*pre_feedforward_layernorm"):
        get_peft_model(fresh("gemma3").model, PillConfig(target_modules=["post_attention_layernorm"]))


def test_no_merging(fresh):
    vlm = fresh("llava")
    peft, inputs = get_peft_model(vlm.model, PillConfig(r=2)).eval(), vlm.prompts([[3, "a", 2]])
    random_weights(peft, "pill_")
    expected = peft(**inputs).logits
    for merge in (peft.merge_adapter, peft.merge_and_unload):
        with pytest.raises(NotImplementedError, match="depends on its input"):
            merge()
    assert torch.equal(peft(**inputs).logits, expected)


def test_settings():
    for settings in ({"r": 0}, {"r": True}, {"r": 2.0}, {"gate_init": "zero"}, {"stage": "pretrain"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            PillConfig(**settings)
    assert PillConfig().r == 32
