"""LoFiT: the equation head by head, which heads, the L1 term, both stages, merging."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from conftest import build
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny import text_settings
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import vlmfast
from vlmfast.adapters.tuning import LofitConfig
from vlmfast.adapters.tuning.lofit import (
    LofitLayer,
    LofitTrainer,
    num_heads,
    penalty,
    select_heads,
    strongest,
    two_stages,
)

IDS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9], [3, 4, 5, 6, 7]])}
COUNT, WIDTH = 4, 8  # query heads of a tiny decoder, and their width; it has two key-value heads


def llama(**changes: Any) -> LlamaForCausalLM:
    """A language model without pictures."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**text_settings(**changes))).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def lofit(model: Any, seed: int = 0, **settings: Any) -> Any:
    """With an adapter that acts."""
    torch.manual_seed(seed)
    return get_peft_model(model, LofitConfig(**({"init_std": 0.5} | settings))).eval()


def layers(model: Any) -> dict[int, LofitLayer]:
    """The wrapped projections by layer."""
    return {module.number: module for module in model.modules() if isinstance(module, LofitLayer)}


def entering(model: Any, inputs: dict[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """What a wrapped projection gets and what the weights behind it get. [B, Q, H d] each"""
    layer, seen = layers(model)[number], []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1]


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# --- the equation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["A", "v", "both"])
@pytest.mark.parametrize("chosen", [None, [2, 0]])
def test_every_head_by_itself(component, chosen):
    heads = None if chosen is None else {"1": chosen}
    model = lofit(llama(), component=component, heads=heads)
    layer = layers(model)[1]
    z, moved = entering(model, IDS, 1)
    expected = z.clone()
    for place, head in enumerate(range(COUNT) if chosen is None else sorted(chosen)):
        own = slice(head * WIDTH, (head + 1) * WIDTH)
        if component != "v":
            expected[..., own] = expected[..., own] * (1 + layer.lofit_A["default"][place].detach())
        if component != "A":
            expected[..., own] = expected[..., own] + layer.lofit_v["default"][place].detach()
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-6)
    held = [value for value in model.parameters() if value.requires_grad]
    parts = 2 if component == "both" else 1
    assert sum(value.numel() for value in held) == parts * WIDTH * (3 * COUNT if chosen is None else 2)
    if chosen is not None:
        assert list(layers(model)) == [1], "layers without a chosen head stay as they are"
        assert torch.equal(moved[..., WIDTH : 2 * WIDTH], z[..., WIDTH : 2 * WIDTH]), "and so do other heads"


def test_a_gated_attention_is_shifted_behind_its_gate():
    """Qwen3.5: v is a constant offset of the residual stream at every token, and only full attention has heads."""
    one = build("qwen3_5")
    inputs = one.prompts([[3, "a", 2]])
    model = lofit(one.model, component="v")
    assert list(layers(model)) == [3] and num_heads(model) == {"3": COUNT}
    z, moved = entering(model, inputs, 3)
    offset = layers(model)[3].lofit_v["default"].detach().flatten()
    torch.testing.assert_close(moved - z, offset.expand_as(z), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"layers \[0\] have no self_attn.o_proj; layers 3 do"):
        lofit(build("qwen3_5").model, heads={"0": [1]})


def test_text_alone_leaves_visual_tokens():
    one = build("llava")
    inputs = one.prompts([[3, "a", 2], [2, "b", 4]])
    model = lofit(one.model, positions="text")
    visual = inputs["input_ids"] == 90
    z, moved = entering(model, inputs, 0)
    assert torch.equal(moved[visual], z[visual])
    factor, offset = (layers(model)[0].spread("default", part) for part in "Av")
    torch.testing.assert_close(moved[~visual], (1 + factor) * z[~visual] + offset)
    assert not torch.isclose(moved[~visual], z[~visual]).any()
    with vlmfast.patch(model, "random:keep=0.5"):
        z, moved = entering(model, inputs, 0)
    assert int(torch.isclose(moved, z).all(-1).sum()) == int(visual.sum()) // 2
    everywhere = lofit(build("llava").model)
    everywhere.add_adapter("text", LofitConfig(positions="text", init_std=0.5))
    everywhere.set_adapter("text")  # the wrappers are there already, and hear of the pictures from now on
    z, moved = entering(everywhere, inputs, 2)
    assert torch.equal(moved[visual], z[visual]) and not torch.equal(moved, z)
    with pytest.raises(NotImplementedError, match="'llama' is not supported"):
        lofit(llama(), positions="text")


def test_language_models_without_pictures(tmp_path):
    model = lofit(llama())
    acting = logits(model, IDS)
    model.get_base_model().config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(tmp_path / "adapter")
    plain = model.unload()
    plain.save_pretrained(tmp_path / "base")
    assert len(layers(lofit(plain.model))) == 3, "a bare decoder"
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter", low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(again, IDS), acting)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(), IDS), acting)
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    with pytest.raises(NotImplementedError, match="name the modules as target_modules"):
        lofit(gpt)
    with pytest.raises(TypeError, match="linear layer"):
        lofit(llama(), target_modules=["self_attn"])


def test_settings_that_make_no_sense():
    for settings, said in (
        ({"component": "a"}, "choose 'A', 'v' or 'both'"),
        ({"positions": "answer"}, "choose 'all' or 'text'"),
        ({"init_std": -1}, "init_std=-1"),
        ({"l1_lambda": float("inf")}, "l1_lambda=inf"),
        ({"heads": {}}, "names no head"),
        ({"heads": {"0": [1, 1]}}, "every head once"),
        ({"heads": [1]}, "every head once"),
        ({"heads": {"first": [1]}}, "every head once"),
        ({"heads": {"0": [1]}, "layers_to_transform": [0]}, "leave layers_to_transform out"),
    ):
        with pytest.raises(ValueError, match=said):
            LofitConfig(**settings)
    for heads, said in (({"7": [0]}, "layers 0 to 2"), ({"0": [4]}, "layer 0 has heads 0 to 3, not 4")):
        model = llama()
        with pytest.raises(ValueError, match=said):
            lofit(model, heads=heads)
        assert not layers(model)
    with pytest.raises(ValueError, match="layer 1 is none of those"):
        lofit(llama(), heads={"1": [0]}, target_modules=r"model\.layers\.0\.self_attn\.o_proj")
    assert LofitConfig(heads={1: (3, 0), 0: [2]}).heads == {"0": [2], "1": [0, 3]}


# --- which heads, and the L1 term ----------------------------------------------------------------------------------


def test_heads_are_ranked_over_the_whole_model():
    model = lofit(llama())
    norms = {}
    for number, layer in layers(model).items():
        for head, factor in enumerate(layer.lofit_A["default"].tolist()):
            norms[number, head] = sum(value**2 for value in factor) ** 0.5
    best = sorted(norms, key=lambda place: -norms[place])
    for k in (1, 5, 12):
        chosen = select_heads(model, k)
        assert sorted((int(layer), head) for layer, heads in chosen.items() for head in heads) == sorted(best[:k])
    assert select_heads(model) == select_heads(model, 1), "10 % of 12 heads"
    assert num_heads(model) == {"0": COUNT, "1": COUNT, "2": COUNT} == num_heads(llama())
    model.add_adapter("some", LofitConfig(heads={"2": [1, 3]}, component="A"))
    assert select_heads(model, 2, "some") == {"2": [1, 3]}
    assert strongest(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [1, 2], "equal ones go in order"
    for k in (0, 13):
        with pytest.raises(ValueError, match="from 1 to 12"):
            select_heads(model, k)
    with pytest.raises(ValueError, match="no LoFiT adapter 'v'"):
        model.add_adapter("v", LofitConfig(component="v"))
        select_heads(model, 1, "v")
    with pytest.raises(ValueError, match="has no LoFiT adapter"):
        select_heads(llama(), 1)


def test_the_penalty_counts_what_lofit_trains():
    model = lofit(llama(), modules_to_save=["lm_head"])
    own = [value for name, value in model.named_parameters() if "lofit_" in name]
    expected = sum(float(value.detach().abs().sum()) for value in own)
    assert float(penalty(model)) == pytest.approx(expected)
    model.add_adapter("other", LofitConfig(init_std=0.5))
    assert float(penalty(model)) == pytest.approx(expected), "what is not trained is not counted"
    assert float(penalty(model, "other")) == 0
    penalty(model).backward()
    assert all(torch.equal(value.grad, value.detach().sign()) for value in own)


class Mixed(LofitTrainer, Trainer):
    """A Trainer with the L1 term."""


def trainer(model: Any, folder: Any, **how: Any) -> Mixed:
    """One step of plain descent."""
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    arguments = TrainingArguments(
        output_dir=str(folder), max_grad_norm=0.0, dataloader_pin_memory=False, **quiet, **(settings | how)
    )
    samples = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (4, 6))]
    return Mixed(model=model, args=arguments, train_dataset=samples, eval_dataset=samples)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_trainer_adds_the_penalty_once_a_step(steps, tmp_path):
    """Also where a step is accumulated from several batches; and not to the loss of an evaluation."""
    ends, losses, evaluated = [], [], []
    for weight in (0.0, 0.01):
        model = lofit(llama(), l1_lambda=weight)
        start = {name: value.detach().clone() for name, value in model.named_parameters() if "lofit_" in name}
        torch.manual_seed(4)
        run = trainer(model, tmp_path, gradient_accumulation_steps=steps)
        evaluated.append(run.evaluate()["eval_loss"])
        run.train()
        losses.append(run.state.log_history[-2]["loss"])
        ends.append({name: value.detach() for name, value in model.named_parameters() if name in start})
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-6)
    for name, value in start.items():
        torch.testing.assert_close(ends[1][name] - ends[0][name], -0.1 * 0.01 * value.sign(), rtol=1e-3, atol=1e-6)
    total = sum(float(value.abs().sum()) for value in start.values())
    assert losses[1] - losses[0] == pytest.approx(0.01 * total, rel=1e-2)


def test_both_stages():
    model = llama()
    base, seen = logits(model, IDS), []

    def train(tuned: Any, stage: int) -> None:
        settings = tuned.peft_config["default"]
        trained = [name for name, value in tuned.named_parameters() if value.requires_grad]
        seen.append((stage, settings.component, settings.l1_lambda, len(trained)))
        if stage == 1:
            for number, head in ((0, 3), (2, 1)):
                layers(tuned)[number].lofit_A["default"].data[head] += 5
        else:
            assert torch.allclose(logits(tuned, IDS), base, atol=1e-2), "A of stage 1 is gone"

    found = two_stages(model, train, k=2, l1_lambda=0.3)
    assert seen == [(1, "A", 0.3, 3), (2, "v", 0.0, 2)]
    assert found.peft_config["default"].heads == {"0": [3], "2": [1]}
    assert torch.equal(logits(found.unload(), IDS), base)
    two_stages(model, train, heads={"1": [2]}).unload()
    assert [one[0] for one in seen] == [1, 2, 2], "heads of an earlier first stage"

    for failing in (1, 2):

        def fail(tuned: Any, stage: int, at: int = failing) -> None:
            if stage == at:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            two_stages(model, fail, k=1)
        assert not layers(model) and torch.equal(logits(model, IDS), base)


# --- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_merging_keeps_what_the_model_says(bias):
    """Two adapters one after the other, A = -1, weights that come back bit for bit."""
    model = lofit(llama(attention_bias=bias), heads={"0": [1, 2], "2": [0]})
    model.add_adapter("other", LofitConfig(init_std=0.5, heads={"0": [0, 1]}))
    layers(model)[0].lofit_A["default"].data[0] = -1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, IDS)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default", "other"]
    torch.testing.assert_close(logits(model, IDS), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.merge_adapter(["default"])
    model.merge_adapter()
    torch.testing.assert_close(logits(model, IDS), both, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), logits(llama(attention_bias=bias), IDS))
    assert torch.equal(logits(model, IDS), both), "disabled once, it is no longer merged"


def test_a_merged_model_that_would_lose_its_bias_is_not_saved(tmp_path):
    one = build("llava")
    inputs = one.prompts([[3, "a", 2]])
    model = lofit(one.model, component="v", heads={"1": [0]})
    acting = logits(model, inputs)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), acting, rtol=1e-4, atol=1e-5)
    for held in (merged, copy.deepcopy(merged)):
        with pytest.raises(RuntimeError, match="gave 1 output projections .* Save the adapter instead"):
            held.save_pretrained(tmp_path / "merged")
    with vlmfast.patch(merged, "random:keep=0.5"), pytest.raises(RuntimeError, match="Save the adapter instead"):
        merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(RuntimeError, match="Save the adapter"):
        pickle.loads(pickle.dumps(merged.save_pretrained))(tmp_path)

    merged = lofit(llama(), component="A").merge_and_unload()
    merged.save_pretrained(tmp_path / "A")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "A"), IDS), logits(merged, IDS))
    merged = lofit(llama(attention_bias=True)).merge_and_unload()
    merged.save_pretrained(tmp_path / "biased")  # this model's class knows the bias
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "biased"), IDS), logits(merged, IDS))


def test_what_cannot_be_merged():
    model = lofit(build("llava").model, positions="text")
    with pytest.raises(NotImplementedError, match="weights act on every token"):
        model.merge_and_unload()
    assert len(layers(model)) == 3
    model = lofit(llama())
    layers(model)[2].lofit_v["default"].data[0] = float("nan")
    with pytest.raises(ValueError, match="makes NaN"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="makes NaN"):
        model.merge_and_unload(safe_merge=True)
    assert len(layers(model)) == 3 and model.get_model_status().merged_adapters == []
    wrapped = get_peft_model(llama(), LoraConfig(target_modules=["o_proj"])).merge_and_unload()
    assert lofit(wrapped).merge_and_unload() is wrapped
