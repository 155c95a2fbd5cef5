"""What every tuner promises on every family that it wraps, as an ordinary method of PEFT.

The fast suite runs the first promises for every tuner and the others for those that have most to lose, on one family
or two; `-m slow` all for all on every family. A new tuner in TUNERS is taken up by itself: give it settings below,
should its defaults not do.
"""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch
from conftest import KINDS, TINY, build, shared
from peft import PeftModel, PeftType, get_layer_status, get_model_status, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import Trainer, TrainingArguments

import vlmfast
from vlmfast.adapters.tuning import TUNERS
from vlmfast.adapters.tuning.base import Tuner, TunerConfig, register
from vlmfast.families import FAMILIES

ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]
# Other settings under which the promises hold, in the slow suite: by a name that begins with the tuner's.
VARIANTS: dict[str, dict[str, Any]] = {
    "lofit text": {"positions": "text"},
    "lofit A": {"component": "A"},
    "pill alignment": {"stage": "alignment"},
    "slime repaired": {"gate_init": "identity", "noise": True},
    "visual_lora text": {"tokens": "text"},
}
# Settings that leave a model as it is until it is trained: the defaults, and these.
NEUTRAL: dict[str, dict[str, Any]] = {"ademvl": {"mode": "augment", "gate": "zero"}, "lofit": {"init_std": 0.0}}
# Settings that act visibly, beside the noise that `tuned` puts on whatever is trained.
ACTING: dict[str, dict[str, Any]] = {
    "ademvl": {"mode": "augment", "alpha": 1.0, "beta": 1.0, "grids": [4, 2]},
    "slime": {"gate_init": "official", "noise": False},
}
# Tuners whose adapters can be put into the weights.
MERGES = {"lofit"}
# Tuners that wrap what not every family has.
WRAPS = {"slime": {name for name, family in FAMILIES.items() if family.projector is not None}}


def pairs(*fast: str, names: Any = TUNERS) -> list[Any]:
    """Test parameters: these tuners on these families; when slow every tuner on all others, variants on some."""
    found = []
    for name in [*TUNERS, *VARIANTS]:
        having = [
            family for family in (TINY if name in TUNERS else KINDS) if family in WRAPS.get(tuner_of(name), TINY)
        ]
        light = [family for family in fast if family in having] or having[:1] if name in names else []
        for family in having:
            found.append(pytest.param(name, family, marks=[] if family in light else pytest.mark.slow))
    return found


def tuner_of(name: str) -> str:
    """The tuner of a variant."""
    return name.split()[0]


def shake(model: Any, seed: int = 0, by: float = 0.1) -> None:
    """Move every trained value, so that all of an adapter acts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)


def trained(model: Any) -> dict[str, Any]:
    """Parameters that are trained, by name."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def config(name: str, **settings: Any) -> TunerConfig:
    """A tuner's config, acting visibly."""
    tuner = tuner_of(name)
    return TUNERS[tuner](**(ACTING.get(tuner, {}) | VARIANTS.get(name, {}) | settings))


def neutral(name: str) -> TunerConfig:
    """A tuner's config that changes nothing."""
    tuner = tuner_of(name)
    return TUNERS[tuner](**(VARIANTS.get(name, {}) | NEUTRAL.get(tuner, {})))


def tuned(name: str, model: Any, adapter: str = "default", seed: int = 0, **settings: Any) -> Any:
    """The model with an adapter that acts, in evaluation mode."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config(name, **settings), adapter_name=adapter).eval()
    shake(wrapped, seed)
    return wrapped


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def labelled(inputs: dict[str, Any]) -> dict[str, Any]:
    """With labels: the text, without what is padding or picture."""
    ids = inputs["input_ids"]
    return inputs | {"labels": ids.masked_fill((inputs["attention_mask"] == 0) | (ids >= 80), -100)}


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of all that a model holds."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two copies are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def traces(model: Any) -> list[Any]:
    """Everything a tuner may leave on a model: kinds of modules, their attributes and hooks."""
    found: list[Any] = []
    for name, module in model.named_modules():
        hooks = {key: len(module.__dict__[key]) for key in module.__dict__ if key.endswith("_hooks")}
        found.append((name, type(module), sorted(module.__dict__), hooks))
    return found


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Of the loss, for all that is trained; with the same random numbers each time."""
    model.zero_grad()
    torch.manual_seed(3)
    model(**labelled(inputs)).loss.backward()
    missing = [name for name, one in trained(model).items() if one.grad is None]
    assert not missing, f"no gradient of {missing}: replicas that train together would wait for them"
    return {name: one.grad.clone() for name, one in trained(model).items()}


# --- the promises --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), pairs("llava", "qwen2_5_vl"))
def test_learns_and_leaves_the_model_as_it_was(name, family):
    """Identity at the start, a loss that falls, adapter weights alone that change, disabled and unloaded the base."""
    one = build(family)
    inputs = one.prompts(ROWS)
    base, held, before = logits(one.model, inputs), weights(one.model), traces(one.model)
    model = get_peft_model(one.model, neutral(name)).eval()
    assert torch.equal(logits(model, inputs), base), "these settings change nothing"
    wrapped = [key for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert wrapped and not any("vision" in key or "visual." in key for key in wrapped), "the tower is left alone"
    optimizer = torch.optim.Adam(trained(model).values(), lr=1e-2)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)
        model.train()
        loss = model(**labelled(inputs)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    assert losses[-1] < losses[0] - 1e-4
    assert not torch.allclose(logits(model, inputs), base, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base), "disabled, it is the base"
    plain = model.unload()
    assert plain is one.model and traces(plain) == before
    assert same(weights(plain), held), "the base never changes"
    assert torch.equal(logits(plain, inputs), base)


@pytest.mark.parametrize(("name", "family"), pairs("llava"))
def test_several_adapters_saved_and_loaded(name, family, tmp_path):
    one = build(family)
    inputs = one.prompts(ROWS)
    base = logits(one.model, inputs)
    model = tuned(name, one.model)
    first = logits(model, inputs)
    assert not torch.allclose(first, base, atol=1e-3)
    torch.manual_seed(1)
    model.add_adapter("second", config(name))
    assert torch.equal(logits(model, inputs), first), "an adapter that is not active does nothing"
    model.set_adapter("second")
    shake(model, 1)
    second = logits(model, inputs)
    assert not torch.allclose(second, first, atol=1e-3)
    assert all(".second" in name for name in trained(model))
    status = get_model_status(model)
    assert status.available_adapters == ["default", "second"] and status.active_adapters == ["second"]
    assert status.enabled is True and status.trainable_params == sum(v.numel() for v in trained(model).values())
    each = get_layer_status(model)
    assert len(each) == sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert all(layer.active_adapters == ["second"] and layer.merged_adapters == [] for layer in each)
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), first)
    model.save_pretrained(tmp_path)
    files = sorted(path.name for path in (tmp_path / "second").iterdir())
    assert [file for file in files if file != "README.md"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == tuner_of(name).upper()
    again = build(family)
    loaded = PeftModel.from_pretrained(again.model, tmp_path, adapter_name="other").eval()
    assert torch.equal(logits(loaded, inputs), first)
    loaded.load_adapter(tmp_path / "second", adapter_name="default")
    assert torch.equal(logits(loaded, inputs), first)
    loaded.set_adapter("default")
    assert torch.equal(logits(loaded, inputs), second)
    loaded.delete_adapter("other")
    assert torch.equal(logits(loaded, inputs), second) and not any(".other" in key for key in loaded.state_dict())
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, inputs), base)
    assert torch.equal(logits(loaded.unload(), inputs), base)


@pytest.mark.parametrize(("name", "family"), pairs("qwen2_5_vl"))
def test_generates(name, family):
    """With a cache as without, rows of a batch as if alone, beams."""
    one = build(family)
    inputs = one.prompts(ROWS)
    model = tuned(name, one.model)
    whole = logits(model, inputs)[:, -1]
    alone = [one.prompts(ROWS, only=row) for row in range(len(ROWS))]
    for row, prompt in enumerate(alone):
        torch.testing.assert_close(logits(model, prompt)[0, -1], whole[row], rtol=1e-3, atol=1e-3)
    start = inputs["input_ids"].shape[1]
    how = {"max_new_tokens": 4, "do_sample": False}
    greedy = model.generate(**inputs, **how)
    assert torch.equal(greedy, model.generate(**inputs, **how, use_cache=False))
    beams = model.generate(**inputs, **how, num_beams=3)
    assert torch.equal(beams, model.generate(**inputs, **how, num_beams=3, use_cache=False))
    for row, prompt in enumerate(alone):
        assert torch.equal(model.generate(**prompt, **how)[0, -4:], greedy[row, start:])
        assert torch.equal(model.generate(**prompt, **how, num_beams=3)[0, -4:], beams[row, start:])


@pytest.mark.parametrize(("name", "family"), pairs("llava", names=["lofit", "pill"]))
def test_merges_or_says_that_it_cannot(name, family):
    one = build(family)
    inputs = one.prompts(ROWS)
    base, model = logits(one.model, inputs), tuned(name, one.model)
    acting, before = logits(model, inputs), traces(model)
    if tuner_of(name) not in MERGES or name == "lofit text":
        for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
            with pytest.raises(NotImplementedError, match="cannot be merged"):
                merge()
        assert traces(model) == before and torch.equal(logits(model, inputs), acting), "nothing was done half"
        model.unmerge_adapter()
        return
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), acting, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), acting)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(logits(twin.merge_and_unload(), inputs), acting, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    assert torch.equal(logits(model.unload(), inputs), base), "unloading takes merging back"


@pytest.mark.parametrize(("name", "family"), pairs("llava", names=["ademvl", "pill"]))
def test_gradient_checkpointing_gives_the_same_gradients(name, family):
    one = build(family)
    inputs, model = one.prompts(ROWS), tuned(name, one.model)
    model.train()
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(model, inputs)
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert any(value.any() for value in plain.values())


@pytest.mark.parametrize(("name", "family"), pairs("llava"))
def test_all_that_is_trained_has_a_gradient_for_any_batch(name, family):
    """Pictures and text, text alone, pictures in one row of two: zero rather than None."""
    one = build(family)
    model = tuned(name, one.model)
    model.train()
    for rows in ([[5], [3]], ROWS, [["a", 3], [4]]):
        gradients(model, one.prompts(rows))
    text = one.prompts([[5], [3]])
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(**text).logits).all()


@pytest.mark.parametrize(("name", "family"), pairs("llava", names=["ademvl", "lofit", "pill"]))
def test_fp32_adapters_under_a_bf16_model(name, family, tmp_path):
    one = build(family)
    one.model.to(torch.bfloat16)
    inputs = {
        key: value.to(torch.bfloat16) if value.is_floating_point() else value
        for key, value in one.prompts(ROWS).items()
    }
    base = logits(one.model, inputs)
    model = get_peft_model(one.model, neutral(name)).eval()
    assert {value.dtype for value in trained(model).values()} == {torch.float32}
    assert torch.equal(logits(model, inputs), base) and base.dtype == torch.bfloat16
    shake(model)
    acting = logits(model, inputs)
    assert acting.dtype == torch.bfloat16 and not torch.allclose(acting, base, atol=1e-2)
    model.train()
    assert {value.dtype for value in gradients(model, inputs).values()} == {torch.float32}
    model.eval().save_pretrained(tmp_path)
    model.load_adapter(tmp_path, adapter_name="again")
    model.set_adapter("again")
    assert torch.equal(logits(model, inputs), acting), "saved and loaded in fp32"
    model.add_adapter("kept", neutral(name), autocast_adapter_dtype=False)
    assert {value.dtype for key, value in model.named_parameters() if ".kept" in key} == {torch.float32}
    model.to(torch.bfloat16)
    assert torch.isfinite(logits(model, inputs)).all(), "a whole model in half precision runs, too"


@pytest.mark.parametrize(("name", "family"), pairs("llava", names=["ademvl", "visual_lora"]))
def test_trains_and_generates_with_pruning(name, family):
    one = build(family)
    inputs = one.prompts(ROWS)
    model = tuned(name, one.model)
    full = logits(model, inputs)[:, -1]
    with vlmfast.patch(model, "random:keep=0.5") as handle:
        pruned = logits(model, inputs)[:, -1]
        model.train()
        assert any(value.any() for value in gradients(model, inputs).values())
        model.eval()
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert all(image.kept < image.n for image in handle.report().images)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
    assert not torch.allclose(pruned[:2], full[:2], atol=1e-4)
    torch.testing.assert_close(pruned[2], full[2], rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(model, inputs)[:, -1], full)


@pytest.mark.parametrize(("name", "family"), pairs("llava", names=["ademvl", "pill"]))
def test_copies_are_models_of_their_own(name, family):
    """deepcopy, and pickle as torch.save does it."""
    one = build(family)
    inputs = one.prompts(ROWS)
    model = tuned(name, one.model)
    acting = logits(model, inputs)
    twin = copy.deepcopy(model)
    shake(twin, 5)
    assert not torch.allclose(logits(twin, inputs), acting, atol=1e-3)
    assert torch.equal(logits(model, inputs), acting)
    plain = twin.unload()
    assert torch.equal(logits(plain, inputs), logits(shared(family).model, inputs))
    assert torch.equal(logits(model, inputs), acting), "the copy's hooks were its own"
    torch.manual_seed(2)
    unused = tuned(name, one.tiny.build().eval())  # a model that ran has hooks of transformers that cannot be saved
    file = io.BytesIO()
    torch.save(unused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded, inputs), logits(unused, inputs))


@pytest.mark.parametrize(("name", "family"), pairs("llava", names=["lofit", "pill"]))
def test_adapters_of_transformers_itself(name, family, tmp_path):
    """model.add_adapter, load_adapter and what goes with them, where PEFT allows it."""
    one = build(family)
    inputs = one.prompts(ROWS)
    base = logits(one.model, inputs)
    model = tuned(name, one.model)
    acting = logits(model, inputs)
    model.save_pretrained(tmp_path)
    plain = build(family).model
    if PEFT_TYPE_TO_TUNER_MAPPING[PeftType[tuner_of(name).upper()]].uses_shared_state:
        with pytest.raises(ValueError, match="get_peft_model"):
            plain.add_adapter(config(name))
        return
    plain.add_adapter(config(name), adapter_name="new")
    shake(plain)
    added = logits(plain.eval(), inputs)
    assert not torch.allclose(added, base, atol=1e-3)
    plain.load_adapter(str(tmp_path), adapter_name="loaded")
    plain.set_adapter("loaded")
    assert torch.equal(logits(plain, inputs), acting)
    plain.set_adapter("new")
    assert torch.equal(logits(plain, inputs), added)
    plain.disable_adapters()
    assert torch.equal(logits(plain, inputs), base)
    plain.enable_adapters()
    plain.delete_adapter("new")
    plain.set_adapter("loaded")
    assert torch.equal(logits(plain, inputs), acting)


class Pictures(torch.utils.data.Dataset):
    """A few conversations, each a batch of its own."""

    def __init__(self, one: Any, count: int = 8) -> None:
        rows = [[[3, "abc"[k % 3], 2 + k % 4]] if k % 4 else [[5]] for k in range(count)]
        self.samples = [labelled(one.prompts(row, seed=k)) for k, row in enumerate(rows)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]


def only(batch: list[Any]) -> Any:
    """Collate one sample."""
    return batch[0]


def training(name: str, family: str, folder: Any, **how: Any) -> Trainer:
    """A Trainer for the tuner, with dropout and noise wherever the tuner has them."""
    one = build(family)
    torch.manual_seed(11)
    model = get_peft_model(one.model, neutral(name))
    settings = {"per_device_train_batch_size": 1, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "seed": 5}
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **(settings | how),
    )
    return Trainer(model=model, args=arguments, train_dataset=Pictures(one), data_collator=only)


@pytest.mark.parametrize(("name", "family"), pairs("llava", names=["lofit"]))
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(name, family, tmp_path):
    whole = training(name, family, tmp_path / "whole", gradient_checkpointing=True)
    start = {key: value.detach().clone() for key, value in trained(whole.model).items()}
    whole.train()
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    resumed = training(name, family, tmp_path / "resumed", gradient_checkpointing=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ends = trained(resumed.model)
    assert ends.keys() == start.keys()
    for key, value in trained(whole.model).items():
        assert torch.equal(ends[key], value), key
    assert any(not torch.equal(value, start[key]) for key, value in trained(whole.model).items())


# --- the places ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TUNERS if name not in WRAPS])
def test_layers_by_number_and_modules_left_out(name):
    one = build("llava")
    model = tuned(name, one.model, layers_to_transform=[1])
    assert all(".layers.1." in key for key in trained(model))
    model.unload()
    with pytest.raises(ValueError, match="has layers 0 to 2"):
        get_peft_model(one.model, config(name, layers_to_transform=[3]))
    one = build("llava")
    model = tuned(name, one.model, exclude_modules=r".*\.layers\.0\..*")
    assert trained(model) and not any(".layers.0." in key for key in trained(model))


@pytest.mark.parametrize("name", WRAPS)
def test_families_that_a_tuner_cannot_wrap(name):
    without = next(family for family in TINY if family not in WRAPS[name])
    model = build(without).model
    before = traces(model)
    with pytest.raises(NotImplementedError, match="llava_next"):
        get_peft_model(model, config(name))
    assert traces(model) == before


# --- PEFT's enum ---------------------------------------------------------------------------------------------------


def test_registering_twice_and_names_that_peft_has():
    """The enum is extended by CPython internals: this fails first when they change."""
    for name, cls in TUNERS.items():
        member = PeftType[name.upper()]
        assert member is PeftType(name.upper()) and member.value == name.upper() and member.name == name.upper()
        assert isinstance(member, PeftType) and member in list(PeftType) and member == name.upper()
        assert getattr(PeftType, name.upper()) is member and copy.deepcopy(member) is member
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[member]
        count = len(PeftType)
        register(name, cls, tuner)
        assert len(PeftType) == count and PEFT_TYPE_TO_CONFIG_MAPPING[member] is cls
        assert issubclass(tuner, Tuner) and tuner.prefix == f"{name}_"
    before = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA]
    with pytest.raises(RuntimeError, match=r"'lora' of its own \(peft\."):
        register("lora", TunerConfig, Tuner)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is before
