"""`flops=`: solved on whole tokens, and true of the prompt that then runs."""

import dataclasses
import functools
import warnings
from typing import Any

import pytest
import torch
from conftest import TINY, build, shared
from test_cost import llava, qwen2_5_vl
from torch.utils.flop_counter import FlopCounterMode

import vlmfast
from vlmfast import solving
from vlmfast.adapter import LAYERS, Adapter
from vlmfast.adapters import ADAPTERS, FasterVLM, Random, from_spec, support
from vlmfast.cost import NOMINAL_GRID, prompt_cost
from vlmfast.families import FAMILIES
from vlmfast.solving import NOMINAL_TEXT, TOLERANCE, nominal, share_of, solve_keep, with_keep
from vlmfast.towers import Picture

CORE = ("llava", "qwen2_5_vl")


def spec_of(name: str, family: str) -> str:
    needs = support(name, family).needs
    return name + ":" * bool(needs) + ",".join(f"{key}={value}" for key, value in needs.items())


def shown(name: str) -> str:
    """The picture to show to a method: image a, or video A where it prunes videos alone."""
    return "a" if "image" in getattr(ADAPTERS[name], "modalities", ("image",)) else "A"


PRUNERS = [name for name, cls in ADAPTERS.items() if cls.drops]
PAIRS = [(name, family) for name in PRUNERS for family in CORE if support(name, family).reason is None]


def picture_of(vlm: Any, letter: str) -> Picture:
    """The sizes of a tiny picture, as the unpatched prompt holds it."""
    with vlmfast.patch(vlm.model, "random:keep=1.0") as handle, torch.no_grad():
        vlm.model(**vlm.prompts([[letter, NOMINAL_TEXT]]))
        return handle.report().images[0].size


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> Any:
    """usual(vlm, letter): a tiny picture becomes the family's nominal one."""

    def set_nominal(vlm: Any, letter: str) -> Picture:
        picture = picture_of(vlm, letter)
        monkeypatch.setattr(solving, "nominal", lambda config, modality: picture)
        return picture

    return set_nominal


@pytest.mark.parametrize("part", [0.2, 0.7])
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_every_method_reaches_its_share_or_warns(name, family, part, usual):
    """Shares between what one token costs and the unpatched model, on the prompt that runs."""
    vlm, letter, spec = shared(family), shown(name), spec_of(name, family)
    picture = usual(vlm, letter)
    least = share_of(vlm.model.config, with_keep(from_spec(spec), 1 / picture.tokens), picture)
    share = least + part * (1 - least)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        handle = vlmfast.patch(vlm.model, spec, flops=share)
    with handle, torch.no_grad():
        vlm.model(**vlm.prompts([[letter, NOMINAL_TEXT]]))
        reached = handle.report().share
    if not any("flops=" in str(warning.message) for warning in seen):
        assert reached == pytest.approx(share, rel=TOLERANCE)


@pytest.mark.parametrize(("name", "family"), [pair for pair in PAIRS if ADAPTERS[pair[0]].foreseeable])
def test_what_methods_tell_is_what_they_do(name, family, usual):
    """The schedule and the FLOPs a method tells of are those of the prompt that runs."""
    vlm, letter = shared(family), shown(name)
    picture = usual(vlm, letter)
    with vlmfast.patch(vlm.model, spec_of(name, family)) as handle, torch.no_grad():
        vlm.model(**vlm.prompts([[letter, NOMINAL_TEXT]]))
        report = handle.report()
        layers, _ = solving.apply(vlm.model.config, handle.adapters, picture, NOMINAL_TEXT)
        assert list(report.per_layer) == layers
        assert report.share == pytest.approx(share_of(vlm.model.config, handle.adapters, picture), rel=1e-9)


# Whose own products depend on the content: rows of cosines fetched in advance, text that rates, frames that merge. On
# models as tiny as these, with more text than visual tokens, they weigh far more than elsewhere.
ABOUT = {"cdpruner", "divprune", "framefusion", "sparsevlm"}


@functools.cache
def eager(family: str) -> Any:
    """A tiny model whose attention torch's counter sees."""
    vlm = build(family)
    vlm.model.set_attn_implementation("eager")
    vlm.model.set_experts_implementation("eager")
    return vlm


def counted(vlm: Any, letter: str) -> int:
    """FLOPs of a prompt until its first token, by torch's counter."""
    inputs = vlm.prompts([[letter, NOMINAL_TEXT]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vlm.model(**inputs, logits_to_keep=1)
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_torchs_counter_sees_the_share(name, family):
    """What really multiplies, patched over unpatched, is what the report says: tower, selection, cuts, everything."""
    vlm, letter = eager(family), shown(name)
    plain = counted(vlm, letter)
    with vlmfast.patch(vlm.model, spec_of(name, family)) as handle:
        share = counted(vlm, letter) / plain
        assert share < 1.03
        assert handle.report().share == pytest.approx(share, rel=0.025 if name in ABOUT else 1e-9)


@pytest.mark.parametrize("family", [family for family in TINY if family not in CORE])
def test_torchs_counter_sees_the_share_on_every_family(family):
    """Tower, projector, decoder of every kind, a statistic and a cut inside."""
    vlm = eager(family)
    plain = counted(vlm, "a")
    for name in ("random", "fastv"):
        with vlmfast.patch(vlm.model, spec_of(name, family)) as handle:
            share = counted(vlm, "a") / plain
            assert handle.report().share == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize("spec", ["random+fastv:layer=1", "hiprune+fastv:layer=1"])
@pytest.mark.parametrize("family", CORE)
def test_composed_methods_are_solved_together(spec, family, usual):
    vlm = eager(family)
    picture = usual(vlm, "a")
    least = share_of(vlm.model.config, with_keep(from_spec(spec), 1 / picture.tokens), picture)
    goal = (least + 1) / 2
    plain = counted(vlm, "a")
    with vlmfast.patch(vlm.model, spec, flops=goal) as handle:
        share = counted(vlm, "a") / plain
        report = handle.report()
    assert share == pytest.approx(report.share, rel=1e-9)
    assert share == pytest.approx(goal, rel=TOLERANCE)
    before, after = report.per_layer[0], report.per_layer[-1]
    assert picture.tokens > before > after


CONFIGS = {"llava": llava(), "qwen2_5_vl": qwen2_5_vl()}


@pytest.mark.parametrize("method", ["random", "hiprune"])
@pytest.mark.parametrize("family", CONFIGS)
def test_solved_on_whole_tokens(family, method):
    config, methods = CONFIGS[family], from_spec(method)
    picture = Picture(patches=(1, 16, 16), tokens=64, span=64) if family == "qwen2_5_vl" else nominal(config)
    n = picture.tokens
    at = {k: share_of(config, with_keep(methods, k / n), picture) for k in range(1, n, 5)}
    for k in at:
        if at[k] <= 1:  # on so tiny a model statistics can cost more than a few tokens save
            assert solve_keep(config, methods, at[k], picture=picture) == k / n
    assert solve_keep(config, methods, 1.0, picture=picture) == 1.0
    least = at[1]
    with pytest.raises(ValueError, match=f"between {least:.4f}"):
        solve_keep(config, methods, least * 0.98, picture=picture)


def test_the_share_includes_tower_statistics():
    config = llava()
    picture = nominal(config)
    cost = [share_of(config, from_spec(spec), picture) for spec in ("random", "fastervlm", "hiprune")]
    assert cost[0] < cost[1] < cost[2]
    full = prompt_cost(config, text=60, images=[picture.patches]).total_prefill
    half = prompt_cost(config, text=60, images=[picture.patches], kept=[8]).total_prefill
    assert cost[0] == half / full


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves(Adapter):
    """A method between decoder layers: everything up to layer 1, then half of what was there, one row of layer 1."""

    name = "halves"
    door, drops = LAYERS, True

    def visual_per_layer(self, picture: Picture, depth: int) -> list[int]:
        return [picture.span] + [picture.span // 2] * (depth - 1)

    def selection_flops(self, picture: Picture, text: int, model: Any) -> int:
        return model.decoder.layers[0].statistic(1, text + picture.span)


def test_methods_before_the_language_model_come_first():
    config = llava()
    picture = nominal(config)
    pruner = Random(keep=0.5)
    for order in ((pruner, Halves()), (Halves(), pruner)):
        layers, own = solving.apply(config, order, picture, 10)
        assert layers == [8, 4, 4]
        assert own == 2 * 48 * (10 + 8)
    expected = prompt_cost(
        config, text=60, images=[picture.patches], visual_per_layer=[8, 4, 4], selection=2 * 48 * 68
    )
    full = prompt_cost(config, text=60, images=[picture.patches])
    assert share_of(config, (pruner, Halves()), picture) == expected.total_prefill / full.total_prefill


def test_nominal_pictures():
    assert nominal(llava()) == Picture(patches=(1, 4, 4), tokens=16, span=16)
    assert nominal(qwen2_5_vl()).patches == NOMINAL_GRID
    video = nominal(qwen2_5_vl(), "video")
    assert (video.frames, video.tokens) == (8, 8 * 18 * 18)


@pytest.mark.parametrize("family", TINY)
def test_every_family_has_a_nominal_picture_that_its_cost_model_takes(family):
    config = shared(family).model.config
    for modality in FAMILIES[family].sources:
        picture = nominal(config, modality)
        assert 0 < picture.tokens <= picture.span
        assert (modality == "video") == (picture.frames > 1)
        assert share_of(config, (FasterVLM(keep=1.0, fallback="received"),), picture) >= 1


def test_a_step_too_wide_for_the_share_warns_with_both_numbers():
    config = llava()
    picture = Picture(patches=(1, 4, 4), tokens=2, span=2)  # a cut by half is the only one there is
    methods = from_spec("random")
    one, both = (share_of(config, with_keep(methods, keep), picture, 0) for keep in (0.5, 1.0))
    goal = one + (both - one) * 0.4
    with pytest.warns(UserWarning, match=rf"flops={goal} is not reached.*nearest share is {one:.4f}"):
        assert solve_keep(config, methods, goal, text=0, picture=picture) == 0.5


def test_a_method_that_follows_the_content_warns_of_an_estimate(monkeypatch):
    monkeypatch.setattr(Random, "foreseeable", False)
    with pytest.warns(UserWarning, match=r"what random leaves depends on the picture's content.*is an estimate"):
        solve_keep(llava(), from_spec("random"), 0.9)


@pytest.mark.parametrize("share", [0.0, -1.0, 0.05, 1.2, float("nan"), True])
def test_shares_out_of_reach_name_the_range(share):
    with pytest.raises(ValueError, match=r"between 0\.\d+ \(keep=0\.\d+\) and 1\.0"):
        solve_keep(llava(), from_spec("random"), share)
