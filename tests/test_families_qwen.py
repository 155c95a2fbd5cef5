"""Qwen-VL families: layouts against the models' own passes, pruned runs against the unpatched parts run by hand."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny_qwen
import torch
from conftest import lend, some_families
from tiny import IMAGE, VIDEO
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache
from transformers.vision_utils import get_vision_window_index

import vlmfast
from vlmfast.encoding import IMAGES, PictureEncoder, encode_images, encoder_outputs
from vlmfast.families import family_of
from vlmfast.patching import Patch
from vlmfast.rewriting import following
from vlmfast.visual import Score

METHODS = ["random:keep=0.5", "fastervlm:fallback=received,keep=0.4", "hiprune:keep=0.4", "grid:keep=0.3"]
POLICIES = ["original", "compact"]
# Images and videos in one row, in both orders, rows of either kind alone, and text alone.
ROWS = [[3, "a", 2, "A", 4], [2, "B", 3, "c", 2, "b", 5], [4, "A", 3, "B", 2], [6]]
HYBRID = ("qwen3_5", "qwen3_5_moe")  # a linear layer keeps something of a masked token: masking is not dropping
SPLIT = ("qwen3_vl", "qwen3_vl_moe", *HYBRID)  # a video's placeholders stand in a run a frame
STEPS = 3
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=some_families(*tiny_qwen.TINY))
def qwen(request: pytest.FixtureRequest) -> Any:
    with torch.no_grad():
        yield from lend(request.param)


@dataclass
class Shown:
    """A picture of a prompt: its (t, h, w) in tokens, seconds between frames, features, and what is kept of it."""

    grid: tuple[int, int, int]
    seconds: float
    features: torch.Tensor
    deepstack: list[torch.Tensor]
    kept: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept = list(range(len(self.features)))


def by_modality(inputs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments of `get_image_features` and `get_video_features`."""
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
    return {
        modality: {name: inputs[name] for name in needed} for modality, needed in names.items() if needed[0] in inputs
    }


def shown(vlm: Any, inputs: dict[str, Any]) -> list[Shown]:
    """All pictures of a batch in the order of their placeholders, from the unpatched model."""
    pictures: dict[str, list[Shown]] = {"image": [], "video": []}
    for modality, given in by_modality(inputs).items():
        output = getattr(vlm.model.model, f"get_{modality}_features")(**given, return_dict=True)
        deepstack = getattr(output, "deepstack_features", [])
        for i, (t, h, w) in enumerate(given[f"{modality}_grid_thw"].tolist()):
            seconds = float(inputs["second_per_grid_ts"][i]) if modality == "video" and vlm.name == "qwen2_5_vl" else 0
            layers = [layer[i] for layer in deepstack]
            pictures[modality].append(Shown((t, h // 2, w // 2), seconds, output.pooler_output[i], layers))
    queues = {IMAGE: iter(pictures["image"]), VIDEO: iter(pictures["video"])}
    order, left = [], 0
    for token in inputs["input_ids"].flatten().tolist():
        if token in queues:
            if left == 0:
                order.append(next(queues[token]))
                left = len(order[-1].features)
            left -= 1
    return order


@dataclass
class Row:
    """A prompt of a batch, cut by hand. columns: those that stay, among the tokens that are not padding."""

    ids: list[int]
    pictures: list[Shown]
    columns: list[int]
    axes: list[list[int]]
    following: int


def cut(vlm: Any, ids: list[int], pictures: list[Shown], policy: str) -> Row:
    """Columns and positions of what is kept of a prompt, in plain loops."""
    columns, axes, place, column = [], [], 0, 0
    for picture in [*pictures, None]:
        while column < len(ids) and ids[column] not in (IMAGE, VIDEO):
            columns.append(column)
            axes.append([place] * 3)
            column, place = column + 1, place + 1
        if picture is None:
            break
        t, h, w = picture.grid
        runs = [(1, frame * h * w) for frame in range(t)] if vlm.name in SPLIT else [(t, 0)]
        for frames, offset in runs:
            while ids[column] not in (IMAGE, VIDEO):  # the time of a frame
                columns.append(column)
                axes.append([place] * 3)
                column, place = column + 1, place + 1
            kept = [i - offset for i in picture.kept if offset <= i < offset + frames * h * w]
            # tokens_per_second of the tiny model is 2; times are cut to whole positions
            times = [int(f * 2 * picture.seconds) if picture.seconds else f for f in range(frames)]
            there = [[times[i // (h * w)], i // w % h, i % w] for i in kept]
            if policy == "compact":
                ranges = [times, list(range(h)), list(range(w))]
                left = [sorted({point[axis] for point in there}) for axis in range(3)]
                there = [[ranges[a][left[a].index(point[a])] for a in range(3)] for point in there]
                sides = [len(left[1]), len(left[2])]
            else:
                sides = [h, w]
            columns += [column + i for i in kept]
            axes += [[place + value for value in point] for point in there]
            column, place = column + frames * h * w, place + max(sides)
    return Row(ids, pictures, columns, axes, place)


def rows_by_hand(vlm: Any, inputs: dict[str, Any], kept: list[torch.Tensor] | None, policy: str) -> list[Row]:
    """Every row of a batch. kept: by picture in the order of the placeholders, None: everything."""
    pictures = shown(vlm, inputs)
    for picture, indices in zip(pictures, kept or ()):
        picture.kept = indices.tolist()
    rows, queue = [], iter(pictures)
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        alone = ids[mask.bool()].tolist()
        own, left = [], sum(token in (IMAGE, VIDEO) for token in alone)
        while left:
            own.append(next(queue))
            left -= len(own[-1].features)
        rows.append(cut(vlm, alone, own, policy))
    return rows


def by_hand(vlm: Any, row: Row, steps: int) -> tuple[torch.Tensor, list[int]]:
    """Logits of a row that was cut, and greedy tokens: the decoder over the whole sequence each time, no cache."""
    model = vlm.model
    placeholder = torch.tensor([token in (IMAGE, VIDEO) for token in row.ids])
    embeds = model.get_input_embeddings()(torch.tensor(row.ids)).clone()
    more = {}
    if row.pictures:
        embeds[placeholder] = torch.cat([picture.features for picture in row.pictures])
        layers = [torch.cat(layer) for layer in zip(*(picture.deepstack for picture in row.pictures))]
        stays = torch.zeros(len(row.ids), dtype=torch.bool)
        stays[row.columns] = True
        if layers:
            more = {
                "visual_pos_masks": placeholder[row.columns][None],
                "deepstack_visual_embeds": [layer[stays[placeholder]] for layer in layers],
            }
    embeds, axes, tokens, first = embeds[row.columns], list(row.axes), [], None
    for step in range(max(1, steps)):
        hidden = model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=torch.tensor(axes).T[:, None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            use_cache=False,
            **more,
        ).last_hidden_state
        logits = model.lm_head(hidden)[0]
        first = logits if first is None else first
        choice = logits[-1].clone()
        choice[[IMAGE, VIDEO]] = -torch.inf  # as the generation config has it
        tokens.append(int(choice.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(tokens[-1:]))])
        axes = [*axes, [row.following + step] * 3]
        if more:
            more["visual_pos_masks"] = torch.nn.functional.pad(more["visual_pos_masks"], (0, 1))
    return first, tokens


def prompt_order(vlm: Any, inputs: dict[str, Any], handle: Any) -> list[torch.Tensor]:
    """What a report says is kept, by picture in the order of the placeholders."""
    kept = handle.report().kept
    assert [image.grid for image in handle.report().images] == [one.grid for one in shown(vlm, inputs)]
    return list(kept)


# --- layouts -----------------------------------------------------------------------------------------------------


def test_features_are_what_the_model_scatters(qwen):
    inputs = qwen.prompts(ROWS)
    seen: list[dict[str, Any]] = []
    decoder = qwen.model.model.language_model
    hook = decoder.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    qwen.model(**inputs)
    hook.remove()
    for modality, token in (("image", IMAGE), ("video", VIDEO)):
        given = by_modality(inputs)[modality]
        pictures = encode_images(qwen.model, [], modality=modality, **given)
        places = inputs["input_ids"] == token
        assert torch.equal(seen[0]["inputs_embeds"][places], torch.cat([one.features for one in pictures]))
        for one, (t, h, w) in zip(pictures, given[f"{modality}_grid_thw"].tolist()):
            assert one.grid == (t, h // 2, w // 2) and one.patches == (t, h, w) and one.queries == h * w
            assert len(one.pixels) == t * h * w
            assert [view.kind for view in one.views] == (["image"] if t == 1 else ["frame"] * t)
            assert torch.equal(torch.cat([view.index for view in one.views]), torch.arange(len(one)))
            assert bool(one.deepstack) == family_of(qwen.model).deepstack
        if pictures[0].deepstack:
            ours = [torch.cat(layer) for layer in zip(*(one.deepstack for one in pictures))]
            among = places[places | (inputs["input_ids"] == (IMAGE + VIDEO - token))]
            theirs = [layer[among] for layer in seen[0]["deepstack_visual_embeds"]]
            assert len(ours) == len(theirs) == 3 and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("modality", ["image", "video"])
def test_statistics_equal_the_attention_maps(qwen, modality, monkeypatch):
    """An eager pass that keeps every map, read in plain loops: which token a patch belongs to is the model's word."""
    visual = qwen.model.model.visual
    given = by_modality(qwen.prompts(ROWS))[modality]
    grids = given[f"{modality}_grid_thw"]
    layers = (1, 3)
    kinds = ("column_mean", "row_mean", "last_row", "key", "hidden")
    scores = [Score(layer, kind) for layer in layers for kind in kinds]
    maps: dict[int, list[Any]] = {layer: [] for layer in layers}
    keys: dict[int, list[Any]] = {layer: [] for layer in layers}
    hidden: dict[int, Any] = {}
    module = sys.modules[type(visual).__module__]
    eager = module.eager_attention_forward
    number = {block.attn: i for i, block in enumerate(visual.blocks)}

    def record(attention, query, key, *args, **kwargs):
        output, weights = eager(attention, query, key, *args, **kwargs)
        if number[attention] in layers:
            maps[number[attention]].append(weights[0])
            keys[number[attention]].append(key[0])
        return output, weights

    hooks = [
        visual.blocks[layer].register_forward_hook(lambda _, __, out, layer=layer: hidden.update({layer: out}))
        for layer in layers
    ]
    with monkeypatch.context() as patched:
        patched.setattr(visual.config, "_attn_implementation_internal", "eager")
        patched.setattr(module, "eager_attention_forward", record)
        getattr(qwen.model.model, f"get_{modality}_features")(**given)
    for hook in hooks:
        hook.remove()

    sizes = [t * h * w // 4 for t, h, w in grids.tolist()]
    token_of = list(range(sum(sizes)))  # which token the j-th block of four patches becomes
    if qwen.name == "qwen2_5_vl":
        token_of = get_vision_window_index(grids, 2, 16, 4)[0].tolist()
    patch = Patch(qwen.model)
    try:
        for name, source in patch.family.sources.items():  # both at once, as a patched model has them
            patch.set(patch.base, source.encode, PictureEncoder(patch, name, scores))
        encode = getattr(patch.base, f"get_{modality}_features")
        pictures = getattr(encode(**given, return_dict=True), IMAGES)
    finally:
        patch.close()
    for score in scores:
        per_patch: list[Any] = []
        if score.kind == "hidden":
            per_patch = list(hidden[score.layer])
        elif score.kind == "key":
            for key in keys[score.layer]:
                per_patch += [key[:, j].mean(0) for j in range(key.shape[1])]
        else:
            assert len(maps[score.layer]) == int(grids[:, 0].sum()), "one map a frame"
            for weights in maps[score.layer]:
                for j in range(weights.shape[-1]):
                    per_patch.append(
                        {
                            "column_mean": weights[:, :, j].mean(),
                            "row_mean": weights[:, j].mean(),
                            "last_row": weights[:, -1, j].mean(),
                        }[score.kind]
                    )
        expected: list[Any] = [None] * len(token_of)
        for block, token in enumerate(token_of):
            expected[token] = sum(per_patch[4 * block + i] for i in range(4)) / 4
        ours = torch.cat([one.statistics[score] for one in pictures])
        torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_vision_cost_equals_torchs_counter(qwen, monkeypatch):
    monkeypatch.setattr(qwen.model.model.visual.config, "_attn_implementation_internal", "eager")
    for modality, given in by_modality(qwen.prompts(ROWS)).items():
        with FlopCounterMode(display=False) as counter:
            getattr(qwen.model.model, f"get_{modality}_features")(**given)
        config, grids = qwen.model.config, [tuple(grid) for grid in given[f"{modality}_grid_thw"].tolist()]
        costs = [family_of(config).vision(config, grid) for grid in grids]
        assert sum(cost.tower + cost.projector for cost in costs) == counter.get_total_flops()
        assert [cost.tokens for cost in costs] == [t * h * w // 4 for t, h, w in grids]
    with pytest.raises(ValueError, match="multiples of 2"):
        family_of(qwen.model).vision(qwen.model.config, (1, 3, 4))


# --- pruned runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "policy"), list(zip(METHODS, POLICIES * 2)))
def test_positions_and_logits_of_a_batch(qwen, method, policy):
    """Left padding, several images and videos in a row: positions exactly, logits as from the parts run by hand."""
    inputs = qwen.prompts(ROWS)
    seen: list[Any] = []
    decoder = qwen.model.model.language_model
    with vlmfast.patch(qwen.model, method, positions=policy) as handle:
        hook = decoder.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
        logits = qwen.model(**inputs).logits
        hook.remove()
        kept = prompt_order(qwen, inputs, handle)
    for i, row in enumerate(rows_by_hand(qwen, inputs, kept, policy)):
        length = len(row.columns)
        assert seen[0]["attention_mask"][i].tolist() == [0] * (logits.shape[1] - length) + [1] * length
        assert seen[0]["position_ids"][-3:, i, -length:].T.tolist() == row.axes
        expected, _ = by_hand(qwen, row, 0)
        close = {"rtol": 1e-2, "atol": 2e-3} if qwen.name in HYBRID else CLOSE  # a state over all tokens, in fp32
        torch.testing.assert_close(logits[i, -length:], expected, **close)


def test_the_position_that_follows():
    """After text, after a video whose time lies ahead, after padding on the right, after nothing at all."""
    time = [[0, 1, 2, 3], [0, 1, 6, 11], [0, 1, 0, 0], [0, 0, 0, 0]]
    side = [[0, 1, 2, 3], [0, 1, 1, 3], [0, 1, 0, 0], [0, 0, 0, 0]]
    real = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    axes = torch.tensor([time, side, side])
    assert following(axes, real).tolist() == [4, 4, 2, 0]
    assert following(axes[1], real).tolist() == [4, 4, 2, 0]


@pytest.mark.parametrize("method", METHODS)
def test_dropping_equals_masking(qwen, method):
    """The whole prompt with its own positions, in which nobody may attend to the dropped tokens. A linear layer keeps
    something of a masked token, so that there dropping must differ; the runs by hand are its oracle.
    """
    inputs = qwen.prompts(ROWS)
    with vlmfast.patch(qwen.model, method, positions="original") as handle:
        pruned = qwen.model(**inputs).logits
        kept = prompt_order(qwen, inputs, handle)
    mask = inputs["attention_mask"].clone()
    rows = rows_by_hand(qwen, inputs, kept, "original")
    for i, row in enumerate(rows):
        mask[i] = 0
        mask[i, torch.tensor(row.columns) + mask.shape[1] - len(row.ids)] = 1
    names = (
        "input_ids",
        "mm_token_type_ids",
        "attention_mask",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
    )
    axes, _ = qwen.model.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})
    full = qwen.model(**{**inputs, "attention_mask": mask, "position_ids": axes}).logits
    for i in range(len(ROWS)):
        expected = full[i, mask[i].bool()]
        if qwen.name in HYBRID and rows[i].pictures:
            assert not torch.allclose(pruned[i, -len(expected) :], expected, atol=1e-3)
        else:
            torch.testing.assert_close(pruned[i, -len(expected) :], expected, **CLOSE)


@pytest.mark.parametrize("policy", POLICIES)
def test_generation(qwen, policy):
    """Greedy with every cache equals the parts run by hand; beams of a batch equal unpatched beams of shorter rows."""
    inputs = qwen.prompts(ROWS)
    how = {"max_new_tokens": STEPS, "do_sample": False}
    with vlmfast.patch(qwen.model, "hiprune:keep=0.4", positions=policy) as handle:
        greedy = qwen.model.generate(**inputs, **how)
        kept = prompt_order(qwen, inputs, handle)
        static = qwen.model.generate(**inputs, **how, cache_implementation="static")
        without = qwen.model.generate(**inputs, **how, use_cache=False)
        two = qwen.prompts(ROWS[:2])
        beams = qwen.model.generate(**two, **how, num_beams=3)
    rows = rows_by_hand(qwen, inputs, kept, policy)
    expected = [by_hand(qwen, row, STEPS)[1] for row in rows]
    assert torch.equal(greedy[:, :-STEPS], inputs["input_ids"])
    for tokens in (greedy, static, without):
        assert tokens[:, -STEPS:].tolist() == expected
    for i, row in enumerate(rows[:2]):
        alone = qwen.model.generate(**shorter(row), **how, num_beams=3)
        assert beams[i, -STEPS:].tolist() == alone[0, -STEPS:].tolist()


def shorter(row: Row) -> dict[str, Any]:
    """A row that was cut, as inputs of the unpatched model."""
    outputs: dict[str, Any] = {}
    for modality, token in (("image", IMAGE), ("video", VIDEO)):
        column, chosen = 0, []
        for picture in row.pictures:
            column = next(i for i in range(column, len(row.ids)) if row.ids[i] in (IMAGE, VIDEO))
            if row.ids[column] == token:
                chosen.append(picture)
            left = len(picture.features)
            while left:
                left -= row.ids[column] in (IMAGE, VIDEO)
                column += 1
        if chosen:
            outputs |= encoder_outputs([], modality)
            outputs[modality].pooler_output = [one.features[one.kept] for one in chosen]
            if chosen[0].deepstack:
                layers = zip(*([layer[one.kept] for layer in one.deepstack] for one in chosen))
                outputs[modality].deepstack_features = [list(layer) for layer in layers]
    ids = torch.tensor([[row.ids[column] for column in row.columns]])
    axes = torch.cat([torch.arange(ids.shape[1])[None], torch.tensor(row.axes).T])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": axes[:, None],
        "mm_encoder_outputs": outputs,
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_a_later_turn_and_an_own_loop(qwen, policy):
    inputs = qwen.prompts([ROWS[0], ROWS[2]])
    more = torch.randint(3, 80, (2, 5), generator=torch.Generator().manual_seed(1))
    with vlmfast.patch(qwen.model, "grid:keep=0.4", positions=policy) as handle:
        cache = DynamicCache(config=qwen.model.config.get_text_config())
        first = qwen.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, past_key_values=cache)
        kept = prompt_order(qwen, inputs, handle)
        longer = longer_prompt(inputs, torch.cat([first, more], dim=1))
        turn = {name: longer[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        second = qwen.model.generate(**turn, max_new_tokens=STEPS, do_sample=False, past_key_values=cache)
        own, mask = [], longer["attention_mask"]
        out = qwen.model(**longer, use_cache=True)
        for _ in range(STEPS):
            logits = out.logits[:, -1].clone()
            logits[:, [IMAGE, VIDEO]] = -torch.inf
            own.append(logits.argmax(-1, keepdim=True))
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            out = qwen.model(input_ids=own[-1], attention_mask=mask, past_key_values=out.past_key_values)
    expected = [by_hand(qwen, row, STEPS)[1] for row in rows_by_hand(qwen, longer, kept, policy)]
    assert second[:, -STEPS:].tolist() == expected
    assert torch.cat(own, dim=1).tolist() == expected


@pytest.mark.parametrize(("policy", "whole"), [("original", True), ("compact", False)])
def test_new_pictures_in_a_later_turn(qwen, policy, whole):
    """Image and video of a second turn, on a cache that holds pruned ones: as in one prompt with all of them."""
    first, then = [ROWS[0], ROWS[2]], [[2, "b", 1, "B", 3], [2, "e", 1, "D", 3]]
    inputs, more = qwen.prompts(first), qwen.prompts(then, seed=1)
    how = {"max_new_tokens": STEPS, "do_sample": False}
    with vlmfast.patch(qwen.model, "grid:keep=0.4", positions=policy) as handle:
        cache = DynamicCache(config=qwen.model.config.get_text_config())
        answered = qwen.model.generate(**inputs, **how, past_key_values=cache)
        before = prompt_order(qwen, inputs, handle)
        held = longer_prompt(inputs, answered)
        joined = ("input_ids", "attention_mask", "mm_token_type_ids")
        both = {name: torch.cat([held[name], more[name]], dim=1) for name in joined}
        turn = more | both
        if not whole:  # the last answered token is not in the cache yet
            turn["input_ids"] = both["input_ids"][:, answered.shape[1] - 1 :]
        second = qwen.model.generate(**turn, **how, past_key_values=cache)
        after = handle.report().kept
    conversation = qwen.prompts([[*a, *b] for a, b in zip(first, then)]) | both
    kept = [*before[:2], *after[:2], *before[2:], *after[2:]]
    expected = [by_hand(qwen, row, STEPS)[1] for row in rows_by_hand(qwen, conversation, kept, policy)]
    assert second[:, -STEPS:].tolist() == expected


def longer_prompt(inputs: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """The same conversation with further tokens of text."""
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    pads = {
        "attention_mask": inputs["attention_mask"].new_ones(len(ids), new),
        "mm_token_type_ids": inputs["mm_token_type_ids"].new_zeros(len(ids), new),
    }
    return {**inputs, "input_ids": ids} | {name: torch.cat([inputs[name], pads[name]], dim=1) for name in pads}


def test_keeping_everything_is_the_identity_and_unpatching_restores(qwen):
    inputs = qwen.prompts(ROWS)
    how = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": 2}
    logits, tokens = qwen.model(**inputs).logits, qwen.model.generate(**inputs, **how)
    for method in METHODS[1::2]:
        with vlmfast.patch(qwen.model, method.rpartition("keep=")[0] + "keep=1.0"):
            assert torch.equal(qwen.model(**inputs).logits, logits)
            assert torch.equal(qwen.model.generate(**inputs, **how), tokens)
        with vlmfast.patch(qwen.model, method):
            assert not torch.allclose(qwen.model(**inputs).logits[:3, -1], logits[:3, -1], atol=1e-3)
        assert torch.equal(qwen.model(**inputs).logits, logits)
    assert torch.equal(qwen.model.generate(**inputs, **how), tokens)


def test_pictures_encoded_before(qwen):
    """Images and videos encoded once give what pixels give, deepstack and all."""
    inputs = qwen.prompts(ROWS)
    method = vlmfast.adapters.from_spec("hiprune:keep=0.4")[0]
    outputs: dict[str, Any] = {}
    for modality, given in by_modality(inputs).items():
        outputs |= encoder_outputs(encode_images(qwen.model, [method], modality=modality, **given), modality)
    rest = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
    with vlmfast.patch(qwen.model, method):
        expected = qwen.model(**inputs).logits
        assert torch.equal(qwen.model(**rest, mm_encoder_outputs=outputs).logits, expected)


def test_gradients_reach_the_mergers(fresh):
    """Training through pruned prompts, with experts and deepstack: every merger learns from images and videos."""
    one = fresh("qwen3_vl_moe")
    inputs = one.prompts(ROWS)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] >= 80), -100)
    one.model.train()
    with vlmfast.patch(one.model, "hiprune:keep=0.4"):
        one.model(**inputs, labels=labels, output_router_logits=True).loss.backward()
    for merger in (one.model.model.visual.merger, *one.model.model.visual.deepstack_merger_list):
        assert all(parameter.grad.abs().max() > 0 for parameter in merger.parameters())


# --- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input(qwen):
    inputs = qwen.prompts(ROWS)

    def refused(match, **changes):
        given = {name: value for name, value in (inputs | changes).items() if value is not None}
        with pytest.raises(ValueError, match=match):
            qwen.model(**given)
        with pytest.raises(ValueError, match=match):
            qwen.model.generate(**given, max_new_tokens=1)

    with vlmfast.patch(qwen.model, "grid:keep=0.5"):
        refused("mm_token_type_ids are missing", mm_token_type_ids=None)
        refused("mm_token_type_ids", mm_token_type_ids=inputs["mm_token_type_ids"].clamp(max=1))
        refused("image_grid_thw is missing", image_grid_thw=None)
        refused("video_grid_thw is missing", video_grid_thw=None)
        cut_short = inputs["input_ids"].clone()
        cut_short[0, (cut_short[0] == VIDEO).nonzero()[0]] = 5
        types = inputs["mm_token_type_ids"].masked_fill(cut_short == 5, 0)
        refused("placeholders", input_ids=cut_short, mm_token_type_ids=types)
        cache = DynamicCache(config=qwen.model.config.get_text_config())
        qwen.model(input_ids=torch.arange(3, 8)[None], past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="pass position_ids"):
            qwen.model(**qwen.prompts(ROWS[:1]) | {"attention_mask": None}, past_key_values=cache)
        cache = DynamicCache(config=qwen.model.config.get_text_config())
        qwen.model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
        with pytest.raises(ValueError, match="pass all of it"):
            qwen.model.generate(inputs["input_ids"], max_new_tokens=2, past_key_values=cache)
