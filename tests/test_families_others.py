"""InternVL, Idefics3, SmolVLM, Gemma 3, PaliGemma and Mistral 3 at door 1, against plain loops and masks by hand."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import tiny_others
import torch
from conftest import lend, shared
from tiny import IMAGE, Vlm, make, noise, placeholders
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, DynamicCache

import vlmfast
from vlmfast.cost import prompt_cost
from vlmfast.encoding import encode_images, encoder_outputs
from vlmfast.families import family_of
from vlmfast.visual import Score

NAMES = list(tiny_others.TINY)
ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]
METHODS = ["random", "grid", "fastervlm:fallback=received", "hiprune"]
BIDIRECTIONAL = ("gemma3", "paligemma")
ENCODER = ("pixel_values", "pixel_attention_mask", "image_sizes")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=NAMES)
def one(request):
    """The families of this file in turn."""
    yield from lend(request.param)


@pytest.fixture(params=BIDIRECTIONAL)
def both_ways(request):
    """The families whose image tokens attend to later ones."""
    yield from lend(request.param)


def spec(method: str, **settings: Any) -> str:
    parts = [f"{key}={value}" for key, value in settings.items()]
    return ",".join([method if ":" in method else method + ":" + parts.pop(0), *parts])


def pictures(vlm: Vlm, inputs: dict[str, Any], scores: list[Score] | None = None) -> list[Any]:
    """Encode the pictures of a prompt, with statistics."""

    class Asking:
        def wanted(self, tower):
            return dict(enumerate(scores or []))

    return encode_images(vlm.model, [Asking()], **{name: inputs[name] for name in ENCODER if name in inputs})


def tower_blocks(vlm: Vlm) -> tuple[list[Any], list[Any]]:
    """Blocks of the tower, and their attention modules, by their names in transformers."""
    base = vlm.model.model
    if vlm.name == "internvl":
        blocks = list(base.vision_tower.encoder.layer)
        return blocks, [block.attention for block in blocks]
    if vlm.name == "mistral3":
        blocks = list(base.vision_tower.transformer.layers)
        return blocks, [block.attention for block in blocks]
    tower = base.vision_tower if vlm.name in BIDIRECTIONAL else base.vision_model
    blocks = list(tower.encoder.layers)
    return blocks, [block.self_attn for block in blocks]


# --- layouts -------------------------------------------------------------------------------------------------------

# (patches a side of a view, patches a side of a token, CLS) as the configs of tests/tiny_others.py make them.
SHAPES = {
    "internvl": (12, 2, 1),
    "idefics3": (8, 2, 0),
    "smolvlm": (8, 2, 0),
    "gemma3": (12, 2, 0),
    "paligemma": (6, 1, 0),
}


def view_grids(vlm: Vlm, inputs: dict[str, Any]) -> list[list[tuple[int, int]]]:
    """(rows, columns) in patches of every view, picture by picture, from the inputs alone."""
    if vlm.name == "mistral3":
        return [[(h // 4, w // 4)] for h, w in inputs["image_sizes"].tolist()]
    side = SHAPES[vlm.name][0]
    if vlm.name in ("idefics3", "smolvlm"):
        tiles = [sum(bool(tile.abs().sum() > 0) for tile in sample) for sample in inputs["pixel_values"]]
        return [[(side, side)] * count for count in tiles if count]
    return [[(side, side)] for _ in inputs["pixel_values"]]


def embedded(vlm: Vlm, inputs: dict[str, Any]) -> torch.Tensor:
    """What the unpatched model hands to its language model. [B, L, D]"""
    seen = []
    hook = vlm.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    vlm.model(**inputs)
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_features_are_what_the_model_scatters(one):
    inputs = one.prompts(ROWS)
    visuals = pictures(one, inputs)
    places = inputs["input_ids"] == IMAGE
    assert torch.equal(torch.cat([visual.features for visual in visuals]), embedded(one, inputs)[places])
    merge = 2 if one.name == "mistral3" else SHAPES[one.name][1]
    for visual, views in zip(visuals, view_grids(one, inputs), strict=True):
        (h, w), t = views[0], len(views)
        assert visual.patches == (t, h, w) and visual.grid == (t, h // merge, w // merge)
        assert visual.queries == h * w + (one.name == "internvl")
        assert [view.grid for view in visual.views] == [(h // merge, w // merge)] * t
        assert torch.equal(torch.cat([view.index for view in visual.views]), torch.arange(len(visual)))


@torch.no_grad()
def test_a_token_is_made_of_the_patches_of_its_square(one):
    """Change the tower's output on the patches of one token: that token changes, and no other."""
    inputs = one.prompts([["a", 1, "b"]])
    encode = {name: inputs[name] for name in ENCODER if name in inputs}
    last = tower_blocks(one)[0][-1]
    merge = 2 if one.name == "mistral3" else SHAPES[one.name][1]
    plain = flat(one.model.model.get_image_features(**encode, return_dict=True).pooler_output)
    views = [view for picture in view_grids(one, inputs) for view in picture]
    before = 0
    for number, (h, w) in enumerate(views):
        for row, column in ((0, 0), (1, 0), (h // merge - 1, w // merge - 2)):
            square = [(row * merge + y) * w + column * merge + x for y in range(merge) for x in range(merge)]

            def change(module, args, output, number=number, square=square):
                output = output.clone()
                if one.name == "mistral3":
                    start = sum(y * x for y, x in views[:number])
                    output[0, [start + patch for patch in square]] += 5 * noise("z", output.shape[-1])
                else:
                    output[number, [patch + (one.name == "internvl") for patch in square]] += 5 * noise(
                        "z", output.shape[-1]
                    )
                return output

            hook = last.register_forward_hook(change)
            changed = flat(one.model.model.get_image_features(**encode, return_dict=True).pooler_output)
            hook.remove()
            differs = (changed - plain).abs().amax(1) > 1e-3
            assert differs.nonzero().flatten().tolist() == [before + row * (w // merge) + column]
        before += (h // merge) * (w // merge)


def flat(features: Any) -> torch.Tensor:
    """Features of all pictures behind one another. [N, D]"""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


def eager_maps(vlm: Vlm, encode: dict[str, Any], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention map [views, H, Q, K] and output [views, Q, C] of a block, from a model with eager attention."""
    block, attention = tower_blocks(vlm)[0][layer], tower_blocks(vlm)[1][layer]
    maps, outputs = [], []
    vlm.model.set_attn_implementation("eager")
    hooks = [
        attention.register_forward_hook(lambda *parts: maps.append(parts[-1][1])),
        block.register_forward_hook(lambda *parts: outputs.append(parts[-1])),
    ]
    vlm.model.model.get_image_features(**encode, return_dict=True)
    for hook in hooks:
        hook.remove()
    vlm.model.set_attn_implementation("sdpa")
    return maps[0], outputs[0]


@pytest.mark.parametrize("layer", [1, 3])
@torch.no_grad()
def test_statistics_are_those_of_eager_maps_in_plain_loops(one, layer):
    inputs = one.prompts(ROWS)
    kinds = ["column_mean", "row_mean", "last_row", "hidden"] + ["cls_row"] * (one.name == "internvl")
    scores = [Score(layer, kind) for kind in kinds]
    visuals = pictures(one, inputs, scores)
    encode = {name: inputs[name] for name in ENCODER if name in inputs}
    maps, outputs = eager_maps(one, encode, layer)
    first = int(one.name == "internvl")
    merge = 2 if one.name == "mistral3" else SHAPES[one.name][1]
    start = view = 0
    for visual, grids in zip(visuals, view_grids(one, inputs), strict=True):
        done = 0
        for h, w in grids:
            if one.name == "mistral3":  # one sequence of all images: cut out the image's own square of the map
                own = slice(start, start + h * w)
                weights, hidden = maps[0, :, own, own].mean(0), outputs[0, own]
                assert maps[0, :, own].sum(-1).allclose(maps[0, :, own, own].sum(-1)), "the mask keeps images apart"
                start += h * w
            else:
                weights, hidden = maps[view].mean(0), outputs[view]
            values = {
                "column_mean": weights.mean(0)[first:],
                "row_mean": weights.mean(1)[first:],
                "last_row": weights[-1][first:],
                "cls_row": weights[0][first:],
                "hidden": hidden[first:],
            }
            for score in scores:
                expected = []
                for row in range(h // merge):
                    for column in range(w // merge):
                        square = [
                            (row * merge + y) * w + column * merge + x for y in range(merge) for x in range(merge)
                        ]
                        expected.append(sum(values[score.kind][patch] for patch in square) / merge**2)
                ours = visual.statistics[score][done : done + len(expected)]
                torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-5)
            done += (h // merge) * (w // merge)
            view += 1
        assert done == len(visual) and all(len(values) == done for values in visual.statistics.values())


@pytest.mark.parametrize("one", ["mistral3"], indirect=True)
@torch.no_grad()
def test_packed_images_have_the_statistics_of_images_alone(one):
    """Every kind, before the softmax, too, where a mask of finite numbers would leak in."""
    kinds = ("column_mean", "row_mean", "last_row", "key", "hidden")
    scores = [Score(2, kind, softmax) for kind in kinds for softmax in (True, False)]
    together = pictures(one, one.prompts([["a", "b"], ["c", 3, "a"]]), scores)
    for letter, visual in zip("abca", together, strict=True):
        alone = pictures(one, one.prompts([[letter]]), scores)[0]
        torch.testing.assert_close(visual.features, alone.features, rtol=1e-4, atol=1e-4)
        for score in scores:
            torch.testing.assert_close(visual.statistics[score], alone.statistics[score], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("one", ["idefics3", "smolvlm"], indirect=True)
def test_a_sample_is_one_picture(one):
    """Its images together, one view a tile; a sample without images between others has none."""
    inputs = one.prompts([["a", 2, "c"], [5], ["b"]])
    with vlmfast.patch(one.model, "random:keep=7") as handle:
        one.model(**inputs)
        images = handle.report().images
    assert [image.kept for image in images] == [7, 7]
    assert [image.grid for image in images] == [(3, 4, 4), (3, 4, 4)]
    assert [len(image.views) for image in images] == [3, 3]
    visuals = pictures(one, inputs)
    assert torch.equal(visuals[0].pixels, inputs["pixel_values"][0, :3])
    assert torch.equal(visuals[1].pixels, inputs["pixel_values"][2, :3])


@pytest.mark.parametrize("one", ["idefics3", "smolvlm"], indirect=True)
@torch.no_grad()
def test_hidden_parts_of_a_tile_are_hidden_from_its_statistics(one):
    inputs = one.prompts([["a"], ["b"]])
    inputs["pixel_attention_mask"][0, 1, 16:] = 0  # the lower half of tile 1
    encode = {name: inputs[name] for name in ENCODER if name in inputs}
    score = Score(2, "column_mean")
    received = torch.cat([visual.statistics[score] for visual in pictures(one, inputs, [score])]).view(-1, 4, 4)
    maps, _ = eager_maps(one, encode, 2)
    torch.testing.assert_close(received, maps.mean((1, 2)).view(-1, 4, 2, 4, 2).mean((2, 4)), rtol=1e-4, atol=1e-6)
    assert (received[1, 2:] == 0).all() and (received[1, :2] > 0).all()


@pytest.mark.parametrize("one", ["internvl"], indirect=True)
def test_a_tile_is_one_picture(one):
    inputs = one.prompts([[2, "a", "b", "c", 1]])
    with vlmfast.patch(one.model, "random:keep=7") as handle:
        one.model(**inputs)
        assert [image.kept for image in handle.report().images] == [7, 7, 7]


# --- pruned prompts ------------------------------------------------------------------------------------------------


def by_hand(vlm: Vlm, inputs: dict[str, Any], kept: list[Any], compact: bool, steps: int = 0) -> tuple[Any, list[int]]:
    """Logits of one row cut by hand, and greedy tokens: the unpatched language model with a mask made in loops.

    kept: of every picture of the row.
    """
    model, ids = vlm.model, inputs["input_ids"][0].tolist()
    places = [column for column, token in enumerate(ids) if token == IMAGE]
    stays, start = [column for column, token in enumerate(ids) if token != IMAGE], 0
    for indices, n in kept:
        stays += [places[start + int(i)] for i in indices]
        start += n
    assert start == len(places)
    stays.sort()
    embeds = embedded(vlm, inputs)[0, stays]
    first = int(vlm.name == "paligemma")
    positions = [first + (k if compact else column) for k, column in enumerate(stays)]
    following = first + (len(stays) if compact else len(ids))
    blocks: list[int] = []  # tokens of one block see each other, -1: none
    for column in stays:
        if vlm.name == "gemma3" and ids[column] == IMAGE:
            begin = column
            while begin and ids[begin - 1] == IMAGE:
                begin -= 1
            blocks.append(begin)  # a run of placeholders, which two images side by side share
        else:
            blocks.append(0 if vlm.name == "paligemma" and not inputs["token_type_ids"][0, column] else -1)
    tokens: list[int] = []
    suppressed = model.generation_config.suppress_tokens
    prompt = None
    for step in range(steps + 1):
        place, block = torch.arange(len(embeds)), torch.tensor(blocks)
        full = (place <= place[:, None]) | ((block == block[:, None]) & (block >= 0))  # [query, key]
        mask: Any = full[None, None]
        if vlm.name == "gemma3":
            near = place[:, None] - place < model.config.text_config.sliding_window
            mask = {"full_attention": full[None, None], "sliding_attention": (full & near)[None, None]}
        hidden = model.get_decoder()(
            inputs_embeds=embeds[None], position_ids=torch.tensor([positions]), attention_mask=mask, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden)[0]
        prompt = logits if prompt is None else prompt
        best = logits[-1].clone()
        best[suppressed] = -torch.inf
        tokens.append(int(best.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(tokens[-1:]))])
        positions.append(following + step)
        blocks.append(-1)
    return prompt, tokens[:steps]


def by_row(inputs: dict[str, Any], images: Any) -> list[list[tuple[Any, int]]]:
    """(kept indices, placeholders) of the pictures of every row."""
    rows, left = [], list(images)
    for ids in inputs["input_ids"]:
        count, own = int((ids == IMAGE).sum()), []
        while sum(n for _, n in own) < count:
            image = left.pop(0)
            own.append((image.indices, image.n))
        rows.append(own)
    assert not left
    return rows


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_pruned_logits_are_those_of_a_prompt_cut_by_hand(one, method, positions):
    """A batch with left padding, two images in a row, and a row of text."""
    inputs = one.prompts(ROWS)
    with vlmfast.patch(one.model, spec(method, keep=0.4, positions=positions)) as handle:
        logits = one.model(**inputs).logits
        cached = one.model(**inputs, use_cache=False).logits
        kept = by_row(inputs, handle.report().images)
    torch.testing.assert_close(cached, logits, **CLOSE)
    for row in range(len(ROWS)):
        expected, _ = by_hand(one, one.prompts(ROWS, only=row), kept[row], positions == "compact")
        torch.testing.assert_close(logits[row, -len(expected) :], expected, **CLOSE)


@pytest.mark.parametrize("positions", ["original", "compact"])
@torch.no_grad()
def test_generation_goes_on_as_by_hand(one, positions):
    """Greedy, with a static cache, without cache, in a loop of one's own; beams as their rows alone."""
    inputs, steps = one.prompts(ROWS), 3
    greedy = {"max_new_tokens": steps, "do_sample": False}
    with vlmfast.patch(one.model, f"hiprune:keep=0.4,positions={positions}") as handle:
        tokens = one.model.generate(**inputs, **greedy)[:, -steps:]
        kept = by_row(inputs, handle.report().images)
        for how in ({"cache_implementation": "static"}, {"use_cache": False}):
            assert torch.equal(one.model.generate(**inputs, **greedy, **how)[:, -steps:], tokens)
        assert torch.equal(own_loop(one, inputs, steps), tokens)
        beams = one.model.generate(**inputs, **greedy, num_beams=3)
        for row in range(2):
            alone = one.model.generate(**one.prompts(ROWS, only=row), **greedy, num_beams=3)
            assert torch.equal(alone[0, -steps:], beams[row, -steps:])
    for row in range(len(ROWS)):
        _, expected = by_hand(one, one.prompts(ROWS, only=row), kept[row], positions == "compact", steps)
        assert tokens[row].tolist() == expected


def own_loop(vlm: Vlm, inputs: dict[str, Any], steps: int) -> torch.Tensor:
    """Greedy tokens of a loop over direct calls that knows nothing of pruning: its mask covers the whole prompt."""
    positions = inputs["attention_mask"].cumsum(1) - 1 + (vlm.name == "paligemma")
    out = vlm.model(**inputs, position_ids=positions.clamp(min=0), use_cache=True)
    mask, tokens = inputs["attention_mask"], []
    for _ in range(steps):
        logits = out.logits[:, -1].clone()
        logits[:, vlm.model.generation_config.suppress_tokens] = -torch.inf
        tokens.append(logits.argmax(-1, keepdim=True))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out = vlm.model(input_ids=tokens[-1], attention_mask=mask, past_key_values=out.past_key_values)
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def test_keeping_all_is_the_identity_and_unpatching_restores(one):
    inputs = one.prompts(ROWS)
    logits = one.model(**inputs).logits
    tokens = one.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    handle = vlmfast.patch(one.model, "hiprune:keep=1.0")
    assert torch.equal(one.model(**inputs).logits, logits)
    assert torch.equal(one.model.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)
    shown = {name: value for name, value in inputs.items() if name not in ENCODER}
    handle.close()
    encoded = encoder_outputs(pictures(one, inputs))
    with vlmfast.patch(one.model, "random:keep=1.0"):
        assert torch.equal(one.model(**shown, mm_encoder_outputs=encoded).logits, logits), "features as a list"
    assert torch.equal(one.model(**inputs).logits, logits)


# --- blocks that see both ways -------------------------------------------------------------------------------------


def side_by_side(vlm: Vlm) -> Vlm:
    """The family with images that have no tokens of their own around them."""
    size = 48 if vlm.name == "gemma3" else 24
    kind = int(vlm.name == "gemma3")

    def image(letter: str) -> Any:
        return placeholders({"pixel_values": noise(letter, 1, 3, size, size)}, 36, kind=kind)

    return Vlm(vlm.name, vlm.model, dataclasses.replace(vlm.tiny, image=image))


@functools.cache
def windowed() -> Vlm:
    """Gemma 3 with windows shorter than an image."""
    tiny = dataclasses.replace(tiny_others.TINY["gemma3"], build=lambda: tiny_others.build_gemma3(window=8))
    return make("gemma3", tiny)


@pytest.mark.parametrize("which", ["gemma3", "gemma3 with windows", "paligemma"])
@torch.no_grad()
def test_images_side_by_side_and_windows_inside_an_image(which):
    vlm = side_by_side(windowed() if "windows" in which else shared(which))
    rows = [["a", "b", 3], [4, "c", 1, "a", "b", 2]]
    inputs = vlm.prompts(rows)
    for positions in ("original", "compact"):
        with vlmfast.patch(vlm.model, f"random:keep=0.5,positions={positions}") as handle:
            logits = vlm.model(**inputs).logits
            tokens = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, -3:]
            still = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation="static")
            kept = by_row(inputs, handle.report().images)
        assert torch.equal(still[:, -3:], tokens)
        for row in range(2):
            alone = vlm.prompts(rows, only=row)
            expected, following = by_hand(vlm, alone, kept[row], positions == "compact", 3)
            torch.testing.assert_close(logits[row, -len(expected) :], expected, **CLOSE)
            assert tokens[row].tolist() == following


@pytest.mark.parametrize("one", ["paligemma"], indirect=True)
@pytest.mark.parametrize("positions", ["original", "compact"])
@torch.no_grad()
def test_positions_of_paligemma_start_with_one(one, positions):
    inputs = one.prompts([[3, "a", 2]])
    seen = []
    hook = one.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    with vlmfast.patch(one.model, f"random:keep=9,positions={positions}") as handle:
        one.model(**inputs)
        one.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        kept = handle.report().kept[0].tolist()
    hook.remove()
    image = [4 + i for i in kept] if positions == "original" else [*range(4, 13)]
    after = [40, 41] if positions == "original" else [13, 14]
    assert seen == [[1, 2, 3, *image, *after]] * 2 + [[after[-1] + 1]]


@torch.no_grad()
def test_the_direction_matters_to_these_references(both_ways):
    """The references would notice a causal mask: without token types the logits are others."""
    inputs = both_ways.prompts(ROWS)
    types = inputs.pop("token_type_ids")
    with vlmfast.patch(both_ways.model, "grid:keep=0.4"):
        causal = both_ways.model(**inputs).logits[:2, -1]
        blocks = both_ways.model(**inputs, token_type_ids=types).logits[:2, -1]
    assert (causal - blocks).abs().max() > 1e-2


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("second", [[2, 7, 3], [2, "b", 3]])
@torch.no_grad()
def test_a_second_turn_of_gemma3_sees_its_own_blocks_alone(short, second):
    """Text or a new image on a cache that holds a shorter prompt: logits of a fresh run over everything."""
    vlm = windowed() if short else shared("gemma3")
    one, two = vlm.prompts([[3, "a", 5]]), vlm.prompts([second], seed=1)
    how = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for positions in ("original", "compact"):
        with vlmfast.patch(vlm.model, f"hiprune:keep=0.4,positions={positions}"):
            cache = DynamicCache(config=vlm.model.config.get_text_config())
            first = vlm.model.generate(**one, **how, past_key_values=cache).sequences
            answered = first.shape[1] - one["input_ids"].shape[1]
            types = [one["token_type_ids"], torch.zeros(1, answered, dtype=torch.long), two["token_type_ids"]]
            whole = {
                "input_ids": torch.cat([first, two["input_ids"]], 1),
                "token_type_ids": torch.cat(types, 1),
            }
            new = {"pixel_values": two["pixel_values"]} if "pixel_values" in two else {}
            both = torch.cat([one["pixel_values"], *new.values()])
            turn = vlm.model.generate(**whole, **new, **how, past_key_values=cache)
            fresh = vlm.model.generate(**whole, pixel_values=both, **how)
        for ours, theirs in zip(turn.logits, fresh.logits, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_with_labels(both_ways, side):
    """The loss of a prompt cut by hand: PaliGemma's suffix (type 1) is causal, all before it is not."""
    rows = [[3, "a", 6], [2, "b", 1, "c", 5]]
    inputs = both_ways.prompts(rows, side=side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, mask in enumerate(inputs["attention_mask"]):
        answer = mask.nonzero().flatten()[-4:]
        labels[row, answer] = inputs["input_ids"][row, answer]
        if both_ways.name == "paligemma":
            inputs["token_type_ids"][row, answer] = 1
    both_ways.model.train()
    with vlmfast.patch(both_ways.model, "hiprune:keep=0.4,positions=original") as handle:
        loss = both_ways.model(**inputs, labels=labels).loss
        images = handle.report().images
    both_ways.model.eval()
    loss.backward()
    tower = both_ways.model.model.vision_tower
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tower.parameters())
    both_ways.model.zero_grad(set_to_none=True)
    losses = []
    with torch.no_grad():
        for row, kept in enumerate(by_row(inputs, images)):
            real = inputs["attention_mask"][row].bool()
            alone = both_ways.prompts(rows, only=row)
            if both_ways.name == "paligemma":
                alone["token_type_ids"] = inputs["token_type_ids"][row : row + 1, real]
            logits, _ = by_hand(both_ways, alone, kept, False)
            losses += [nn.functional.cross_entropy(logits[-5:-1], labels[row, real][-4:], reduction="none")]
    torch.testing.assert_close(loss.detach(), torch.cat(losses).mean(), **CLOSE)


# --- configs and cost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("internvl", {"vision_feature_select_strategy": "full"}, "supported: default"),
        ("internvl", {"vision_feature_layer": [-1, -2]}, "several feature layers"),
        ("internvl", {"vision_feature_layer": 0}, "output of one of 4 blocks"),
        ("internvl", {"downsample_ratio": 0.3}, "downsample_ratio=0.3"),
        ("mistral3", {"vision_feature_layer": [-1, -2]}, "several feature layers"),
        ("gemma3", {"mm_tokens_per_image": 30}, "a square number of tokens"),
        ("gemma3", {"mm_tokens_per_image": 25}, "whose side divides"),
    ],
)
def test_configs_that_are_not_supported(name, settings, message):
    config = tiny_others.TINY[name].build().config
    for key, value in settings.items():
        setattr(config, key, value)
    with pytest.raises(NotImplementedError, match=message):
        family_of(config).tower(config)


@pytest.mark.parametrize(
    ("name", "known"), [("internvl", "internvl_vision"), ("gemma3", "siglip"), ("mistral3", "pixtral")]
)
def test_towers_that_are_not_supported(name, known):
    config = tiny_others.TINY[name].build().config
    config.vision_config.model_type = "dinov2"
    with pytest.raises(NotImplementedError, match=f"dinov2 tower; supported: {known}"):
        family_of(config).tower(config)


@pytest.mark.parametrize("one", ["mistral3"], indirect=True)
def test_image_sizes_must_come_along(one):
    inputs = one.prompts([["a"]])
    with vlmfast.patch(one.model, "random"), pytest.raises(ValueError, match="image_sizes"):
        one.model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])


GRIDS = {
    "internvl": (1, 12, 12),
    "idefics3": (3, 8, 8),
    "smolvlm": (3, 8, 8),
    "gemma3": (1, 12, 12),
    "paligemma": (1, 6, 6),
    "mistral3": (1, 8, 12),
}


@pytest.mark.parametrize(("name", "pooled"), [(n, False) for n in NAMES] + [(n, True) for n in BIDIRECTIONAL])
def test_vision_equals_torchs_counter(name, pooled):
    config = tiny_others.TINY[name].build().config
    if pooled:  # SigLIP's own head, which runs though nobody uses it
        config.vision_config.vision_use_head = True
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    t, h, w = GRIDS[name]
    pixels = noise("a", t, 3, 4 * h, 4 * w)
    encode = {"pixel_values": pixels[None] if name in ("idefics3", "smolvlm") else pixels}
    if name == "mistral3":
        encode["image_sizes"] = torch.tensor([[4 * h, 4 * w]])
    scores = [Score(1, "column_mean"), Score(2, "last_row")]

    class Asking:
        def wanted(self, tower):
            return dict(enumerate(scores))

    def count(work: Any) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            work()
        return sum(counter.get_flop_counts()["Global"].values())

    analytic = prompt_cost(config, text=5, images=[(t, h, w)], scores=scores)
    alone = count(lambda: model.model.get_image_features(**encode))
    assert analytic.tower + analytic.projector == alone
    assert count(lambda: encode_images(model, [Asking()], **encode)) - alone == analytic.selection
    assert (
        sum(len(v) for v in encode_images(model, [], **encode)) == family_of(config).vision(config, (t, h, w)).tokens
    )


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("internvl", (1, 11, 11)),
        ("internvl", (1, 8, 12)),
        ("idefics3", (1, 8, 4)),
        ("gemma3", (1, 8, 8)),
        ("mistral3", (1, 1, 9)),
    ],
)
def test_grids_that_cannot_be(name, grid):
    config = tiny_others.TINY[name].build().config
    with pytest.raises(ValueError, match=r"got \(1,"):
        prompt_cost(config, text=5, images=[grid])
