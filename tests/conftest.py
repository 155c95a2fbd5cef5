"""Fixtures: a tiny random model of every family (tests/tiny.py and its neighbours)."""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import interpreter  # noqa: F401  first: see there
import pytest
import tiny_llava
import tiny_others
import tiny_qwen
import torch
from tiny import Vlm, make

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("VLMFAST_GOLDEN", ROOT.parent / "shared" / "golden"))
TINY = tiny_llava.TINY | tiny_qwen.TINY | tiny_others.TINY


def build(name: str) -> Vlm:
    """A new tiny model of a family."""
    return make(name, TINY[name])


@functools.cache
def shared(name: str) -> Vlm:
    """One model a family for the whole session: a test that leaves traces is caught by the fixtures below."""
    return build(name)


def lend(name: str) -> Iterator[Vlm]:
    """The shared model of a family; the test must leave it as it found it."""
    one = shared(name)
    yield one
    leftover = one.model.__dict__.get("vlmfast_handle")
    if leftover is not None:
        leftover.close()
        pytest.fail("the test left the model patched")


CORE = ("llava", "qwen2_5_vl")


@pytest.fixture(params=CORE)
def vlm(request: pytest.FixtureRequest) -> Iterator[Vlm]:
    """The two families that every test of the core runs on: CLS and 1-D positions; windows, merging and M-RoPE."""
    yield from lend(request.param)


# One family of every make of decoder: 1-D positions, M-RoPE, deepstack, linear layers, sliding layers with pictures
# seen in both directions. The fast suite runs these; `-m slow` the others.
KINDS = ("llava", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3")


def some_families(*names: str) -> list[Any]:
    """Test parameters: families, those like another one slow."""
    return [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in names]


def every_family() -> list[Any]:
    """Test parameters: every family, those like another one slow."""
    return some_families(*TINY)


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """Test parameters: every combination, all slow but a diagonal, on which each value of each axis is met.

    For values that take ways of their own through the code, whose combinations hold no further one.
    """
    fast = {tuple(n % len(axis) for axis in axes) for n in range(max(map(len, axes)))}
    marks = [
        () if places in fast else pytest.mark.slow for places in itertools.product(*(range(len(a)) for a in axes))
    ]
    return [pytest.param(*values, marks=mark) for values, mark in zip(itertools.product(*axes), marks)]


@pytest.fixture(params=every_family())
def any_vlm(request: pytest.FixtureRequest) -> Iterator[Vlm]:
    """Every family in turn."""
    yield from lend(request.param)


@pytest.fixture
def fresh() -> Any:
    """build(name) -> a new tiny model, for tests that change weights or modes."""
    return build


def pytest_collection_finish() -> None:
    """What was imported is never garbage: measuring code collects often, and would look through it each time."""
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None  # an evaluation thaws everything at its end


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say in one visible line when there was nothing to compare with."""
    if not GOLDEN.is_dir():
        terminalreporter.write_line(
            f"golden files: {GOLDEN} is absent, parity with the official codes was not compared"
        )
    if importlib.util.find_spec("lmms_eval") is None:
        terminalreporter.write_line("lmms-eval is not installed: tests/test_lmms_eval.py was not run")
