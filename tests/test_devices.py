"""Models that accelerate has spread over devices, or keeps on disk: patched like those in one place, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from conftest import KINDS, TINY, build, crossed, shared
from devices import dispatched, pretending, spread
from steering_file import steering_file
from test_promises_attention import STRONG
from test_tuning_ademvl import tune
from torch import Tensor

import vlmfast
from vlmfast.adapters import ADAPTERS, from_spec, support
from vlmfast.patching import entrance

SETTINGS: dict[str, dict[str, Any]] = STRONG | {
    "agla": {"matcher": "self", "layer": 1},
    "dart": {"layer": 1},
    "fastv": {"layer": 1},
    "lscenellm": {"layer": 1, "keep": 0.4},
    "opera": {"candidates": 2},
    "pyramiddrop": {"positions": "original"},
}
TOGETHER = [
    "grid:keep=0.5+fastv:layer=1+pai:layers=all",
    "fastv:layer=1+opera:candidates=2",
    "fastv:layer=1,positions=compact+vista",
    "fastv:layer=1+eemllm",
    "hiprune:keep=0.5+vcd",
    "vcd:branch=fastervlm/fallback=received/keep=0.3",
    "pai:layers=all,gamma=1.5",
]
NOT_TOGETHER = ("qwen3_vl", "qwen3_5")  # layers from which nothing can go so early
# One method of every door, on a family each: what prunes before the language model and inside it, edits attention,
# decodes with a branch, looks at hidden states and changes modules, fuses.
DOORS = {
    "visionzip": "llava",
    "pyramiddrop": "llava",
    "var": "qwen2_5_vl",
    "vcd": "qwen3_vl",
    "vista": "llava",
    "eemllm": "qwen2_5_vl",
}
WRITTEN = 3


def pairs() -> list[Any]:
    """Methods and families: those of DOORS, and, slow, every method on every make of family, and these on all."""
    found = []
    for family in TINY:
        for name in [*ADAPTERS, *TOGETHER]:
            if name in TOGETHER and family in NOT_TOGETHER:
                continue
            names = [part.partition(":")[0] for part in name.split("+")]
            if all(support(one, family).reason is None for one in names) and (family in KINDS or name in DOORS):
                fast = DOORS.get(name) == family
                found.append(pytest.param(name, family, marks=[] if fast else pytest.mark.slow))
    return found


def spec_of(name: str, family: str, folder: Path) -> str:
    """A method with settings under which it does much, on a family; what is a spec already stays as it is."""
    if name not in ADAPTERS:
        return name
    settings = SETTINGS.get(name, {}) | support(name, family).needs
    if name == "seal":
        settings |= {"vector": steering_file(shared(family).model, folder / "vector.safetensors")}
    return name + ":" * bool(settings) + ",".join(f"{key}={value}" for key, value in settings.items())


def rows_of(spec: str) -> list[list[int | str]]:
    still = all("image" in getattr(one, "modalities", ("image",)) for one in from_spec(spec))
    return [[3, "a", 2], [2, "b", 4]] if still else [[3, "A", 2], [2, "B", 1, "A", 4]]


def written(model: Any, inputs: dict[str, Any], **how: Any) -> Tensor:
    """What a model writes, with beams where its methods need them."""
    handle = model.__dict__.get("vlmfast_handle")
    least = {"num_beams": 2} if handle and any(method.beams > 1 for method in handle.adapters) else {}
    return model.generate(**inputs, max_new_tokens=WRITTEN, **({"do_sample": False} | how | least))


# --- on two devices ------------------------------------------------------------------------------------------------


def test_pretended_devices_are_different_places() -> None:
    with pretending():
        one, two = torch.arange(6.0, device="cpu:1"), torch.arange(6.0).to("cpu:2")
        assert (one + 1).device == torch.device("cpu:1") and float(one.sum()) == 15
        for other in (two, torch.arange(6.0)):
            with pytest.raises(RuntimeError, match="aten.add"):
                one + other
            assert torch.equal(one + other.to("cpu:1"), 2 * one)
        assert one[torch.tensor([1, 2])].tolist() == [1, 2]
        with pytest.raises(RuntimeError, match="aten.index"):
            one[two.long()]


def on_two_devices(name: str, family: str, folder: Path, place: str = "scattered", **how: Any) -> None:
    """A spread model writes and computes what one in a single place does, patched and when it was."""
    vlm, spec = shared(family), spec_of(name, family, folder)
    inputs = vlm.prompts(rows_of(spec))
    with vlmfast.patch(vlm.model, spec) as handle, torch.no_grad():
        expected, logits, told = written(vlm.model, inputs, **how), vlm.model(**inputs).logits, handle.report()
    plain = written(vlm.model, inputs)
    model = build(family).model
    with pretending():
        # Inputs taken elsewhere than where they are embedded: more than transformers' own masks of PaliGemma bear.
        dispatched(model, place, "cpu:1" if family == "paligemma" else "cpu:2")
        there = {name: value.to(entrance(model)) for name, value in inputs.items()}
        with vlmfast.patch(model, spec) as handle:
            for _ in range(2):
                assert torch.equal(written(model, there, **how).cpu(), expected)
            assert torch.equal(model(**there).logits.cpu(), logits)
            apart = "a second forward each"  # a branch does not join a model that is spread
            assert str(handle.report()) == str(told).replace("in one batch with the prompts", apart)
        assert torch.equal(written(model, there).cpu(), plain)


@pytest.mark.parametrize(("name", "family"), pairs())
def test_on_two_devices(name: str, family: str, tmp_path: Path) -> None:
    on_two_devices(name, family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize(("name", "family"), DOORS.items())
def test_ways_to_decode_on_two_devices(name: str, family: str, how: dict[str, Any], tmp_path: Path) -> None:
    on_two_devices(name, family, tmp_path, "halves", **how)


@pytest.mark.parametrize("mode", ["augment", pytest.param("replace", marks=pytest.mark.slow)])
def test_a_tuner_on_two_devices(mode: str) -> None:
    """Pictures reach the adapter through accelerate's hooks."""
    there, here = tune(build("llava").model, mode), tune(build("llava").model, mode)
    inputs = shared("llava").prompts(rows_of("none"))
    expected = written(here, inputs)
    with pretending():
        model = dispatched(there.get_base_model(), "halves")
        inputs = {name: value.to(entrance(model)) for name, value in inputs.items()}
        assert torch.equal(written(there, inputs).cpu(), expected)


# --- kept elsewhere ------------------------------------------------------------------------------------------------


def all_here(model: Any, folder: Path) -> None:
    dispatch_model(model, {"": "cpu"}, skip_keys=model._skip_keys_device_placement, force_hooks=True)


def partly_on_disk(model: Any, folder: Path) -> None:
    """The vision tower, and the decoder layers from the second on."""
    device_map = spread(model, lambda layer, part: "cpu" if (part if layer is None else layer < 1) else "disk")
    assert any("vis" in name and place == "disk" for name, place in device_map.items())
    dispatch_model(model, device_map, offload_dir=folder, skip_keys=model._skip_keys_device_placement)


def all_brought_from_memory(model: Any, folder: Path) -> None:
    cpu_offload(model, torch.device("cpu"))


def all_brought_from_disk(model: Any, folder: Path) -> None:
    disk_offload(model, folder, torch.device("cpu"))


KEPT = [all_here, partly_on_disk, all_brought_from_memory, all_brought_from_disk]


def hooked(model: Any) -> list[Any]:
    """Everything that accelerate or a patch may leave on the modules of a model."""
    return [
        (name, sorted(one.__dict__), len(one._forward_hooks), len(one._forward_pre_hooks))
        for name, one in model.named_modules()
    ]


@pytest.mark.parametrize(("name", "keep", "first"), crossed(list(DOORS), KEPT, ["patch", "accelerate"]))
def test_kept_elsewhere(name: str, keep: Any, first: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """accelerate brings the weights in part by part, whichever came first; its hooks stay when a patch goes."""
    caplog.set_level(logging.ERROR, "accelerate.big_modeling")  # it says so each time
    family = DOORS[name]
    vlm, spec = shared(family), spec_of(name, family, tmp_path)
    inputs = vlm.prompts(rows_of(spec))
    with vlmfast.patch(vlm.model, spec), torch.no_grad():
        expected, logits = written(vlm.model, inputs), vlm.model(**inputs).logits
    with torch.no_grad():
        plain = vlm.model(**inputs).logits
        model, other = build(family).model, build(family).model
        keep(other, tmp_path / "other")
        if first == "patch":
            handle = vlmfast.patch(model, spec)
            keep(model, tmp_path / "model")
        else:
            keep(model, tmp_path / "model")
            handle = vlmfast.patch(model, spec)
        assert entrance(model) == torch.device("cpu")
        for _ in range(2):
            assert torch.equal(written(model, inputs), expected)
        assert torch.equal(model(**inputs).logits, logits)
        handle.close()
        assert hooked(model) == hooked(other)
        assert torch.equal(model(**inputs).logits, plain)
        remove_hook_from_submodules(model)
        assert torch.equal(model(**inputs).logits, plain)
    assert not [value for one in model.modules() for value in one.__dict__.values() if "vlmfast" in str(type(value))]
