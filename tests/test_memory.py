"""Memory stays flat: over a thousand prompts under one patch, and over patching again and again."""

import gc

import psutil
import pytest
import torch

import vlmfast

PROMPTS, WARM = 1000, 100  # what is built on first use (transformers' own caches, allocators) comes before
FEW = 30
GROWTH = 12_000_000  # bytes; a prompt that left one copy of its cache behind would take 40 MB of 1,000
# One method of every door at a time, and all of them that go together.
TOGETHER = "hiprune:keep=0.5+fastv:keep=0.5,layer=1+zerotuning:gamma=2.0+vcd"
ALONE = ["hiprune:keep=0.5", "fastv:keep=0.5,layer=1", "act:layers=1:", "vhr", "vista", "m3id", "eemllm", "opera"]


def tensors() -> int:
    """Tensors that are alive."""
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def resident() -> int:
    """Bytes of the process that are in memory."""
    gc.collect()
    return psutil.Process().memory_info().rss


def prompt(vlm, number):
    """A prompt like no other: its texts, their lengths, its picture."""
    return vlm.prompts([[1 + number % 7, "ab"[number % 2], 2 + number % 5], [2]], seed=number)


def ask(vlm, number, beams=1):
    with torch.no_grad():
        vlm.model.generate(**prompt(vlm, number), max_new_tokens=3, do_sample=False, num_beams=beams)


@pytest.mark.slow
def test_a_thousand_prompts(fresh):
    vlm = fresh("llava")
    with vlmfast.patch(vlm.model, TOGETHER):
        for number in range(WARM):
            ask(vlm, number)
        before, bytes_before = tensors(), resident()
        for number in range(WARM, WARM + PROMPTS):
            ask(vlm, number)
        assert tensors() <= before
        assert resident() - bytes_before < GROWTH


@pytest.mark.slow
@pytest.mark.parametrize("spec", ALONE)
def test_patching_again_and_again(fresh, spec):
    """Nothing of a patch outlives it, nor of a prompt the next one."""
    vlm = fresh("llava")
    counts = []
    for number in range(FEW):
        with vlmfast.patch(vlm.model, spec) as handle:
            ask(vlm, number, max(one.beams for one in handle.adapters))
            ask(vlm, number + 1, max(one.beams for one in handle.adapters))
            handle.report()
        del handle
        counts.append(tensors())
    assert counts[-1] == counts[FEW // 2]
