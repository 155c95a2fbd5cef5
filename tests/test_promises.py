"""What every pruning method promises on every family (those that edit attention: tests/test_promises_attention.py).

The matrix comes from `vlmfast.adapters.support`, the table that `vlmfast list families` prints. The fast suite runs
the short form on one family of every make, every promise for one method of each door on these, and what depends on the
method for every method on the two core families in turns; `-m slow` runs every promise of every pair.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from conftest import CORE, KINDS, TINY, build, lend
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import vlmfast
from vlmfast.adapters import ADAPTERS, from_spec, support, to_spec
from vlmfast.adapters.pruning.base import Pruner
from vlmfast.encoding import encode_images
from vlmfast.families import FAMILIES, family_of
from vlmfast.visual import budget

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
# Methods that choose by the frames of a video leave still images alone: they are tested on videos.
VIDEO_ONLY = {name for name, cls in ADAPTERS.items() if "image" not in getattr(cls, "modalities", ("image",))}
# Methods whose kept places hold new features, so that a prompt cut by hand is not the same.
MERGING = {"sparsevlm", "visionzip"}
PRUNERS = [name for name, cls in ADAPTERS.items() if cls.drops]
PAIRS = [(name, family) for name in PRUNERS for family in TINY if support(name, family).reason is None]
REFUSED = [(name, family) for name in PRUNERS for family in TINY if support(name, family).reason is not None]
BEFORE_LM = {name for name, cls in ADAPTERS.items() if issubclass(cls, Pruner)}


def spec(name: str, family: str, **settings: Any) -> str:
    """The method's spec on a family, with further settings."""
    parts = support(name, family).needs | settings
    return name + ":" * bool(parts) + ",".join(f"{key}={value}" for key, value in parts.items())


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


def pictures(vlm: Any, inputs: dict[str, Any]) -> list[Any]:
    """The VisualTokens of the images among the inputs."""
    pixels, others = encoder_inputs(vlm, inputs)
    name = next(iter(inspect.signature(vlm.model.model.get_image_features).parameters))
    return encode_images(vlm.model, [], **{name: pixels}, **others)


def encoder_inputs(vlm: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The pixels of the images, and the other inputs that `get_image_features` takes."""
    pixels = family_of(vlm.model).sources["image"].pixels
    names = list(inspect.signature(vlm.model.model.get_image_features).parameters)[1:]
    return inputs[pixels], {key: inputs[key] for key in names if key in inputs and key != pixels}


def rows_of(name: str, vlm: Any) -> list[list[int | str]]:
    """The batch a method is tested on: images of different size, two in a row, a row of text alone."""
    return [[3, "A", 2], [2, "B", 1, "A", 6], [4]] if name in VIDEO_ONLY else ROWS


def one_row(name: str) -> list[list[int | str]]:
    return [[3, "A", 4]] if name in VIDEO_ONLY else [[3, "a", 4]]


# --- the promises --------------------------------------------------------------------------------------------------


def keeps_the_short_promises(vlm, name):
    """The identity, a change, rows of a batch as if alone, generation, and nothing left behind."""
    rows = rows_of(name, vlm)
    inputs = vlm.prompts(rows)
    plain, before = vlm.model(**inputs).logits, snapshot(vlm.model)
    with vlmfast.patch(vlm.model, spec(name, vlm.name, keep=1.0)):
        assert torch.equal(vlm.model(**inputs).logits, plain), "keep=1.0 is the identity"
    with vlmfast.patch(vlm.model, spec(name, vlm.name, keep=0.4)) as handle:
        pruned = vlm.model(**inputs).logits
        logits, report = pruned[:, -1], handle.report()
        # Behind a cut between layers there may be layers that have forgotten the pictures by the last token.
        seen = slice(None) if pruned.shape == plain.shape else slice(-1, None)
        assert not torch.allclose(plain[:2, seen], pruned[:2, seen], atol=1e-4), "rows with pictures change"
        torch.testing.assert_close(plain[2, -1], logits[2], rtol=1e-4, atol=1e-4)
        for row in range(len(rows)):
            alone = vlm.model(**vlm.prompts(rows, only=row)).logits[0, -1]
            torch.testing.assert_close(alone, logits[row], rtol=1e-3, atol=1e-3)
        tokens = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
    assert snapshot(vlm.model) == before, "nothing is left behind"
    assert torch.equal(vlm.model(**inputs).logits, plain), "unpatching restores bit for bit"
    assert report.share is not None and report.share > 0
    assert sum(report.per_layer) < sum(image.n for image in report.images) * len(report.per_layer) / 2
    assert all(0 < image.kept < image.n for image in report.images)
    assert str(report).startswith(report.spec)


def generates_like_an_unpatched_model_given_the_shorter_prompt(vlm, name, how):
    inputs = vlm.prompts([[3, "a", 2]])
    with vlmfast.patch(vlm.model, spec(name, vlm.name), positions="compact") as handle:
        ours = generate(vlm.model, inputs, **DECODING[how])
        kept = handle.report().kept[0]
    shorter = shortened(vlm, inputs, kept, ADAPTERS[name].keeps_newlines)
    theirs = generate(vlm.model, shorter, **DECODING[how])
    width = inputs["input_ids"].shape[1]
    assert torch.equal(ours[:, :width], inputs["input_ids"].expand(len(ours), -1)), "the prompt comes back whole"
    assert torch.equal(ours[:, width:], theirs[:, shorter["input_ids"].shape[1] :])


def shortened(vlm, inputs, kept, newlines=False):
    """The same prompt cut by hand, for the unpatched model, with compact positions given explicitly."""
    model, family = vlm.model, family_of(vlm.model)
    pixels, others = encoder_inputs(vlm, inputs)
    with torch.no_grad():
        output = model.model.get_image_features(pixels, **others, return_dict=True)
    visual = pictures(vlm, inputs)[0]
    slots = kept if visual.slots is None else visual.slots[kept]
    if newlines and visual.slots is not None:
        others = [place for place in range(visual.span) if place not in set(visual.slots.tolist())]
        slots = torch.cat([slots, torch.tensor(others, dtype=torch.long)]).sort().values
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    stays[places] = False
    stays[places[slots]] = True
    flat = torch.cat(list(output.pooler_output)) if not torch.is_tensor(output.pooler_output) else output.pooler_output
    output.pooler_output = family.sources["image"].pack([flat.reshape(-1, flat.shape[-1])[slots]])
    if family.deepstack:
        output.deepstack_features = [[torch.cat(list(layer))[slots]] for layer in output.deepstack_features]
    length = int(stays.sum())
    result = {
        "input_ids": inputs["input_ids"][:, stays],
        "attention_mask": torch.ones(1, length, dtype=torch.long),
        "mm_encoder_outputs": {"image": output},
        "position_ids": torch.arange(length)[None] + family.first_position,
    }
    if vlm.tiny.types == "token_type_ids":
        result["token_type_ids"] = inputs["token_type_ids"][:, stays]
    if family.mrope:
        first = int(places[0])
        columns = visual.grid[2]
        ys = sorted({int(i) // columns for i in kept})
        xs = sorted({int(i) % columns for i in kept})
        axes = [[p] * 3 for p in range(first)]
        axes += [[first, first + ys.index(int(i) // columns), first + xs.index(int(i) % columns)] for i in kept]
        after = first + max(len(ys), len(xs))
        axes += [[after + p] * 3 for p in range(length - len(axes))]
        text = torch.arange(length)[None, None]
        result["position_ids"] = torch.cat([text, torch.tensor(axes).T[:, None]])
    return result


def treats_the_rows_of_a_batch_as_if_alone(vlm, name, positions):
    rows = rows_of(name, vlm)
    together = vlm.prompts(rows)
    with vlmfast.patch(vlm.model, spec(name, vlm.name), positions=positions):
        logits = vlm.model(**together).logits[:, -1]
        tokens = generate(vlm.model, together, do_sample=False)[:, -5:]
        beams = generate(vlm.model, together, do_sample=False, num_beams=3)[:, -5:]
        for row in range(3):
            alone = vlm.prompts(rows, only=row)
            torch.testing.assert_close(vlm.model(**alone).logits[0, -1], logits[row], rtol=1e-3, atol=1e-3)
            assert torch.equal(generate(vlm.model, alone, do_sample=False)[0, -5:], tokens[row])
            assert torch.equal(generate(vlm.model, alone, do_sample=False, num_beams=3)[0, -5:], beams[row])


def keeps_the_budget(vlm, name):
    inputs = vlm.prompts(rows_of(name, vlm))
    with vlmfast.patch(vlm.model, spec(name, vlm.name, keep=0.25)) as handle:
        vlm.model(**inputs)
        report = handle.report()
    for image in report.images:
        n = sum(len(view) for view in image.views)
        least = len(image.views[0]) if name == "evs" else 0  # the first frame of a video stays whole
        assert len(image.indices) == max(least, budget(0.25, n))
        assert image.indices.tolist() == sorted(set(image.indices.tolist()))
        if name != "framefusion":  # merges what repeats itself, where something does
            assert image.merged == (name in MERGING)
    assert len(report.per_layer) == vlm.model.config.get_text_config().num_hidden_layers


def generates_in_every_way(vlm, name):
    """Every decoding mode gives the tokens that the mode's own repetition gives: nothing depends on earlier calls."""
    inputs = vlm.prompts(one_row(name))
    with vlmfast.patch(vlm.model, spec(name, vlm.name)):
        width = inputs["input_ids"].shape[1]
        greedy = generate(vlm.model, inputs, do_sample=False)[:, width:]
        for how in DECODING.values():
            first = generate(vlm.model, inputs, **how)[:, width:]
            assert first.shape[1] == 5
            assert torch.equal(first, generate(vlm.model, inputs, **how)[:, width:])
        assert torch.equal(generate(vlm.model, inputs, **DECODING["static"])[:, width:], greedy)


def keeping_everything_generates_the_same(vlm, name):
    inputs = vlm.prompts(rows_of(name, vlm))
    tokens = generate(vlm.model, inputs, do_sample=False)
    with vlmfast.patch(vlm.model, spec(name, vlm.name, keep=1.0)):
        assert torch.equal(generate(vlm.model, inputs, do_sample=False), tokens)


def unpatching_restores_bit_for_bit(vlm, name):
    inputs = vlm.prompts(rows_of(name, vlm))
    logits, tokens, before = vlm.model(**inputs).logits, generate(vlm.model, inputs), snapshot(vlm.model)
    handle = vlmfast.patch(vlm.model, spec(name, vlm.name))
    assert snapshot(vlm.model) != before
    generate(vlm.model, inputs)
    vlm.model(**inputs)
    vlmfast.unpatch(vlm.model)
    handle.close()  # a second time changes nothing
    assert snapshot(vlm.model) == before
    assert torch.equal(vlm.model(**inputs).logits, logits)
    assert torch.equal(generate(vlm.model, inputs), tokens)


def undoes_after_an_error(vlm, name):
    is_undone_after_an_error(vlm, spec(name, vlm.name))


def is_undone_after_an_error(vlm, text):
    before = snapshot(vlm.model)
    with pytest.raises(ZeroDivisionError), vlmfast.patch(vlm.model, text):
        1 / 0  # noqa: B018
    assert snapshot(vlm.model) == before


def a_deep_copy_is_patched_by_itself(vlm, name):
    the_deep_copy_is_patched_by_itself(vlm, spec(name, vlm.name, keep=0.25), rows_of(name, vlm))


def the_deep_copy_is_patched_by_itself(vlm, text, rows):
    inputs = vlm.prompts(rows)
    plain = vlm.model(**inputs).logits
    head = vlm.model.get_output_embeddings().weight
    with vlmfast.patch(vlm.model, text):
        patched = vlm.model(**inputs).logits
        twin = copy.deepcopy(vlm.model)
        with torch.no_grad():
            head.neg_()
        torch.testing.assert_close(twin(**inputs).logits, patched)
        vlmfast.unpatch(twin)
        assert torch.equal(twin(**inputs).logits, plain)
        with torch.no_grad():
            head.neg_()
        assert torch.equal(vlm.model(**inputs).logits, patched), "the original is still patched"


def chooses_by_the_prompt_alone(vlm, name):
    """The same prompt keeps the same tokens in any batch."""
    rows = rows_of(name, vlm)
    with vlmfast.patch(vlm.model, spec(name, vlm.name)) as handle:
        vlm.model(**vlm.prompts(rows))
        together = handle.report().kept
        alone = []
        for row in (0, 1):
            vlm.model(**vlm.prompts(rows, only=row))
            alone += handle.report().kept
        assert len(together) == len(alone)
        assert all(torch.equal(one, other) for one, other in zip(together, alone))


def works_in_bf16(vlm, name):
    half = build(vlm.name)
    half.model.to(torch.bfloat16)
    inputs = half.prompts(rows_of(name, vlm))
    with vlmfast.patch(half.model, spec(name, vlm.name)):
        assert half.model(**inputs).logits.isfinite().all()
        assert generate(half.model, inputs, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 5


def is_saved_and_loaded_back(vlm, name, tmp_path):
    one = build(vlm.name)
    inputs = one.prompts(rows_of(name, vlm))
    with vlmfast.patch(one.model, spec(name, vlm.name, keep=0.25)) as handle:
        pruned = one.model(**inputs).logits
        one.model.save_pretrained(tmp_path / "patched")
    one.model.save_pretrained(tmp_path / "plain")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    loaded = vlmfast.from_pretrained(tmp_path / "patched").eval()
    assert loaded.vlmfast_handle.spec == handle.spec
    torch.testing.assert_close(loaded(**inputs).logits, pruned)
    assert not hasattr(vlmfast.from_pretrained(tmp_path / "plain"), "vlmfast_handle")


PROMISES = {
    promise.__name__: promise
    for promise in (
        keeps_the_budget,
        generates_in_every_way,
        keeping_everything_generates_the_same,
        unpatching_restores_bit_for_bit,
        undoes_after_an_error,
        a_deep_copy_is_patched_by_itself,
        chooses_by_the_prompt_alone,
        works_in_bf16,
    )
}
DOORS = ("random", "fastv")  # one method of each door
# What hangs on the door alone.
OF_THE_DOOR = {"undoes_after_an_error", "a_deep_copy_is_patched_by_itself", "unpatching_restores_bit_for_bit"}


def cases(pairs, promises=(None,), of_the_door=False, short=False):
    """Test parameters (method, family, promise); slow unless the fast suite takes them.

    of_the_door: what hangs on the door alone, so that the core families need not show it for every method. What does
    not each method shows on one of them, by turns. short: on a family of every make.
    """
    found, names = [], list(dict.fromkeys(name for name, _ in pairs))
    for name, family in pairs:
        core = [one for one in CORE if (name, one) in pairs]
        for number, promise in enumerate(promises):
            turn = core and family == core[(names.index(name) + number) % len(core)]
            own = turn and not of_the_door and promise not in OF_THE_DOOR
            marks = () if own or (family in KINDS and (short or name in DOORS)) else (pytest.mark.slow,)
            text = "-".join(filter(None, (name, family, promise)))
            found.append(pytest.param(name, family, promise, marks=marks, id=text))
    return found


@pytest.fixture
def lent(request):
    """The model of the family that the test's parameter names."""
    yield from lend(request.getfixturevalue("family"))


@pytest.mark.parametrize(("name", "family", "promise"), cases(PAIRS, short=True))
def test_short_promises(lent, name, family, promise):
    keeps_the_short_promises(lent, name)


@pytest.mark.parametrize(("name", "family", "promise"), cases(PAIRS, PROMISES))
def test_promise(lent, name, family, promise):
    PROMISES[promise](lent, name)


@pytest.mark.parametrize(
    ("name", "family", "promise"),
    cases([pair for pair in PAIRS if pair[0] in BEFORE_LM - VIDEO_ONLY - MERGING], DECODING, of_the_door=True),
)
def test_generates_like_an_unpatched_model_given_the_shorter_prompt(lent, name, family, promise):
    generates_like_an_unpatched_model_given_the_shorter_prompt(lent, name, promise)


@pytest.mark.parametrize(("name", "family", "promise"), cases(PAIRS, ("original", "compact"), True))
def test_rows_of_a_batch(lent, name, family, promise):
    treats_the_rows_of_a_batch_as_if_alone(lent, name, promise)


@pytest.mark.parametrize(
    ("name", "family", "promise"), cases([pair for pair in PAIRS if pair[0] in DOORS or pair[1] in CORE])
)
def test_saved_and_loaded_back(lent, name, family, promise, tmp_path):
    is_saved_and_loaded_back(lent, name, tmp_path)


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(name, family, lent):
    before = snapshot(lent.model)
    with pytest.raises(NotImplementedError) as error:
        vlmfast.patch(lent.model, name)
    assert support(name, family).reason in str(error.value)
    assert snapshot(lent.model) == before


def test_every_family_is_tested():
    assert set(TINY) == set(FAMILIES)
    for family, tiny in TINY.items():
        assert ("video" in FAMILIES[family].sources) == (tiny.video is not None)


@pytest.mark.parametrize("family", TINY)
def test_family_data_agree_with_the_stock_tower(family, lent):
    about = FAMILIES[family]
    assert about.tower(lent.model.config).has_cls == about.cls
    assert about.mrope == hasattr(lent.model.base_model, "get_rope_index")


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name in BEFORE_LM - VIDEO_ONLY - MERGING])
def test_dropping_equals_masking(vlm, name):
    """A pruned run must give the logits of the full run in which nobody may attend to the dropped tokens."""
    inputs = vlm.prompts([[3, "a", 2, "b", 4]])
    with vlmfast.patch(vlm.model, spec(name, vlm.name), positions="original") as handle:
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
    if family_of(vlm.model).mrope:
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        masked["position_ids"], _ = vlm.model.model.get_rope_index(**{name: inputs[name] for name in names})
    full = vlm.model(**masked).logits[0]
    torch.testing.assert_close(pruned, full[stays], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRUNERS)
def test_specs_round_trip(name):
    for text in (name, spec(name, "llava", keep=3), spec(name, "llava", keep=0.125, positions="original")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapters = from_spec(text)
        assert from_spec(to_spec(adapters)) == adapters
