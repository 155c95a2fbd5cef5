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


# Long lists of parameters: of these tests the fast suite runs every second, third, ... combination, the slow one the
# others. Together they take as much time as all that stands for itself.
SAMPLED = {
    "test_promises.py": {
        "test_promise": 3,
        "test_short_promises": 3,
        "test_saved_and_loaded_back": 4,
        "test_rows_of_a_batch": 3,
        "test_generates_like_an_unpatched_model_given_the_shorter_prompt": 3,
    },
    "test_promises_attention.py": {"test_promise": 2, "test_short_promises": 2},
    "test_solving.py": {
        "test_every_method_reaches_its_share_or_warns": 3,
        "test_torchs_counter_sees_the_share": 3,
        "test_torchs_counter_sees_the_share_on_every_family": 3,
    },
    "test_kernels.py": {"test_a_few_of_the_grid": 3},
    "test_decoders.py": {"test_decoder_equals_torchs_counter": 3},
    "test_pairing.py": {
        "test_the_same_as_two_forwards": 2,
        "test_beside_other_methods": 2,
        "test_windows_and_masks_of_all_forms": 2,
    },
    "test_decoding_agla.py": {"test_greedy_equals_plain_loops": 2},
    "test_decoding_opera.py": {
        "test_a_search_equals_plain_loops": 2,
        "test_with_edited_attention": 2,
        "test_sequences_end_as_in_transformers": 3,
        "test_behind_a_window_that_has_moved_on": 2,
        "test_processors_criteria_and_lengths": 2,
    },
    "test_decoding_steps.py": {"test_short_promises": 2, "test_beside_methods_that_edit_attention": 3},
    "test_decoding_layers.py": {"test_the_first_token_equals_plain_loops": 2},
    "test_video.py": {
        "test_keeping_whole_videos_is_the_identity_and_unpatching_restores": 3,
        "test_decoding_of_videos_beside_images_in_a_padded_batch": 3,
    },
    "test_families_others.py": {
        "test_pruned_logits_are_those_of_a_prompt_cut_by_hand": 2,
        "test_generation_goes_on_as_by_hand": 2,
    },
    "test_families_llava.py": {"test_rows_of_a_batch_are_as_alone": 3},
    "test_attention_seal.py": {"test_seal_equals_a_plain_hook": 2},
    "test_tasks_files.py": {"test_an_evaluation_over_files": 2},
    "test_bench.py": {"test_the_reference_on_full_maps_is_the_same_method": 3},
    "test_testbed.py": {"test_shipped_models_see": 2},
    "test_devices.py": {"test_on_two_devices": 2},
    "test_patch.py": {"test_images_encoded_once_serve_every_family": 3},
    "test_prefixes.py": {"test_methods_that_prefill_in_parts": 2},
}


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is sampled. A test that is named here and not there any more is an error."""
    seen: dict[tuple[str, str], int] = {}
    for item in items:
        every = SAMPLED.get(item.path.name, {}).get(getattr(item, "originalname", ""))
        if every is None or item.get_closest_marker("slow") or item.get_closest_marker("gpu"):
            continue
        key = item.path.name, getattr(item, "originalname", "")
        if seen.setdefault(key, 0) % every:
            item.add_marker(pytest.mark.slow)
        seen[key] += 1
    whole = not any("::" in argument for argument in config.args)
    files = {item.path.name for item in items if whole}
    gone = [name for file in files & SAMPLED.keys() for name in SAMPLED[file] if (file, name) not in seen]
    if gone:
        raise pytest.UsageError(f"tests/conftest.py samples tests that there are not: {', '.join(gone)}")


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
