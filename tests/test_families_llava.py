"""The LLaVA families: where their visual tokens lie, against plain loops, and what pruning does to their prompts."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import tiny_llava
import torch
from conftest import lend, shared
from tiny import IMAGE, VIDEO, Tiny, make, noise
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

import vlmfast
from vlmfast.adapters import FasterVLM, Grid, HiPrune, from_spec
from vlmfast.adapters.pruning.grid import even_grid
from vlmfast.cost import prompt_cost
from vlmfast.encoding import encode_images
from vlmfast.families import FAMILIES, Encoded
from vlmfast.families.anyres import Canvas
from vlmfast.solving import nominal
from vlmfast.towers import Picture
from vlmfast.visual import Score, VisualTokens, apportion, top

ANYRES = {"llava_next": (32, None), "llava_next_video": (32, None), "llava_onevision": (40, 1)}  # side, at most
VIDEOS = [name for name, tiny in tiny_llava.TINY.items() if tiny.video is not None]
METHODS = ["random", "grid", "fastervlm:fallback=received", "hiprune"]
MARK = Score(0, "column_mean")
# Settings beside the stock ones that must work just as well.
VARIANTS = {
    "llava, siglip": lambda: tiny_llava.build_llava(
        vision_config=tiny_llava.siglip(48, vision_use_head=True),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    ),
    "llava, two layers": lambda: tiny_llava.build_llava(vision_feature_layer=[0, 3]),
    "llava_next, siglip": lambda: tiny_llava.build_llava_next(
        vision_config=tiny_llava.siglip(32), vision_feature_select_strategy="full"
    ),
    "llava_next_video, max": lambda: tiny_llava.build_llava_next_video(spatial_pool_mode="max"),
    "llava_next_video, conv": lambda: tiny_llava.build_llava_next_video(spatial_pool_mode="conv"),
}


@pytest.fixture(params=list(tiny_llava.TINY))
def vlm(request):
    yield from lend(request.param)


@pytest.fixture(params=list(ANYRES))
def anyres(request):
    yield from lend(request.param)


@pytest.fixture(params=VIDEOS)
def with_videos(request):
    yield from lend(request.param)


def rows_of(vlm: Any) -> list[list[int | str]]:
    """Different images, two in a row, text alone; an image beside a video where there are videos."""
    return [[3, "a", 2, "b", 1], [2, "A", 1, "c", 4] if vlm.tiny.video else [2, "c", 4], [4]]


@functools.cache
def variant(name: str) -> Any:
    """A tiny model of a family with other settings."""
    family = name.split(",")[0]
    return make(family, dataclasses.replace(tiny_llava.TINY[family], build=VARIANTS[name]))


def cls_in_prompt() -> Any:
    """LLaVA with the strategy "full": CLS and 36 patches an image."""
    return make(
        "llava",
        Tiny(
            lambda: tiny_llava.build_llava(vision_feature_select_strategy="full"),
            lambda letter: tiny_llava.placeholders({"pixel_values": noise(letter, 1, 3, 48, 48)}, 37),
        ),
    )


def encoded(vlm: Any, inputs: dict[str, Any], modality: str = "image", methods: Any = ()) -> list[VisualTokens]:
    """The pictures of one kind among the inputs."""
    names = ("pixel_values_videos",) if modality == "video" else ("pixel_values", "image_sizes", "batch_num_images")
    return encode_images(
        vlm.model, methods, modality=modality, **{name: inputs[name] for name in names if name in inputs}
    )


@dataclasses.dataclass(frozen=True)
class Wants:
    """Stands for a method that asks for these statistics."""

    scores: tuple[Score, ...]

    def wanted(self, tower: Any) -> dict[str, Score]:
        return {str(number): score for number, score in enumerate(self.scores)}


def embeddings(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What the language model is fed. [B, L, D]"""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def marked(vlm: Any, inputs: dict[str, Any], modality: str, values: torch.Tensor) -> list[VisualTokens]:
    """The layout of a pass whose statistic has these values. values: [views, tower tokens, ...]"""
    family = FAMILIES[vlm.name]
    source = family.sources[modality]
    names = ("pixel_values_videos",) if modality == "video" else ("pixel_values", "image_sizes")
    given = {name: inputs[name] for name in names if name in inputs}
    with torch.no_grad():
        output = getattr(vlm.model.model, source.encode)(**given, return_dict=True)
    config = vlm.model.config
    return source.layout(Encoded(family.tower(config), config, given, output, {MARK: [values]}))


# --- where tokens lie ----------------------------------------------------------------------------------------------


def check_features(vlm: Any) -> None:
    inputs = vlm.prompts(rows_of(vlm))
    fed = embeddings(vlm.model, inputs)
    for modality, token in (("image", IMAGE), ("video", VIDEO)):
        if modality in FAMILIES[vlm.name].sources:
            pictures = encoded(vlm, inputs, modality)
            whole = torch.cat([picture.spread(picture.features) for picture in pictures])
            assert torch.equal(whole, fed[inputs["input_ids"] == token])
            for picture in pictures:
                index = torch.cat([view.index for view in picture.views])
                assert index.sort().values.tolist() == list(range(len(picture))), "every token in one view"
                assert all(len(view) == view.grid[0] * view.grid[1] for view in picture.views)


def test_features_are_what_the_unpatched_model_feeds_its_language_model(vlm):
    check_features(vlm)


@pytest.mark.parametrize("name", VARIANTS)
def test_other_settings(name):
    one = variant(name)
    check_features(one)
    check_masking(one, "hiprune:keep=0.4")


def prompt_order(size, side, n):
    """(view, row, column) of the tokens of an image in crops, in the order of the prompt; view 0 is the thumbnail.

    side: of a crop in pixels; n: in tokens.
    """
    height, width = select_best_resolution(size, tiny_llava.grid_points(side))
    rows, columns = height // side * n, width // side * n
    top_rows = left_columns = 0
    if size[1] / size[0] > columns / rows:
        top_rows = (rows - int(round(size[0] * (columns / size[1]), 7))) // 2
    else:
        left_columns = (columns - int(round(size[1] * (rows / size[0]), 7))) // 2
    order = [(0, y, x) for y in range(n) for x in range(n)]
    for y in range(top_rows, rows - top_rows):
        for x in range(left_columns, columns - left_columns):
            order.append((1 + (y // n) * (width // side) + x // n, y % n, x % n))
    return order


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video"])
def test_markers_of_crops_land_on_their_tokens(name):
    """Every tower token carries its own number: view, row, column."""
    one = shared(name)
    inputs = one.prompts([["a", "b"], ["c"]])
    sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
    grids = [select_best_resolution(size, tiny_llava.grid_points(32)) for size in sizes]
    counts = [1 + h * w // 32**2 for h, w in grids]
    numbers = torch.cat([torch.arange(count)[:, None] * 100 + torch.arange(-1, 16) for count in counts]).float()
    for marks in (numbers, torch.stack([numbers, -numbers], dim=-1)):  # one value a token, and a vector
        pictures = marked(one, inputs, "image", marks)
        assert len(pictures) == 3
        for picture, size, (height, width) in zip(pictures, sizes, grids):
            expected = [view * 100 + y * 4 + x for view, y, x in prompt_order(size, 32, 4)]
            mark = picture.statistics[MARK]
            assert (mark if mark.ndim == 1 else mark[:, 0]).tolist() == expected
            assert mark.ndim == 1 or torch.equal(mark[:, 1], -mark[:, 0])
            assert picture.views[0].kind == "thumbnail" and picture.views[0].grid == (4, 4)
            assert picture.patches == (1 + height * width // 32**2, 4, 4)
            for view in picture.views[1:]:
                number = 1 + view.cell[0] * (width // 32) + view.cell[1]
                assert view.kind == "crop"
                assert [expected[i] for i in view.index] == sorted(e for e in expected if e // 100 == number)
            # unpadding leaves an image cut on two sides, one wide, one tall
    assert [picture.views[1].grid for picture in pictures] == [(2, 4), (4, 4), (4, 3)]


def gradient(size: tuple[int, int]) -> np.ndarray:
    """A picture whose first two colours tell the place of a pixel, whose third is full. [h, w, 3]"""
    y, x = np.meshgrid(*((np.arange(side) + 0.5) / side for side in size), indexing="ij")
    return (np.stack([y, x, np.ones(size)], axis=-1) * 255).round().astype(np.uint8)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", [(300, 900), (820, 260), (640, 515), (400, 390), (333, 777)])
def test_regions_on_pictures_from_the_real_processor(name, size):
    """What a token shows of a picture that tells its own coordinates is where the token's view says it is."""
    side, patch = (112, 14) if name == "llava_next" else (384, 14)  # 27 patches of 14 do not fill 384 pixels
    points = tiny_llava.grid_points(side)
    about: dict[str, Any] = {"image_grid_pinpoints": points, "do_normalize": False, "resample": 2}
    if name == "llava_next":
        about |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        processor = LlavaNextImageProcessorPil(**about)
    else:
        processor = LlavaOnevisionImageProcessorPil(**about, size={"height": side, "width": side})
    given = processor(gradient(size), input_data_format="channels_last", return_tensors="pt")
    assert given["image_sizes"].tolist() == [list(size)]
    n = side // patch
    shown = functional.avg_pool2d(given["pixel_values"][0][..., : n * patch, : n * patch], patch)
    tokens = shown.flatten(2).transpose(1, 2)  # [views, n^2, 3]
    resolution = select_best_resolution(size, points)
    assert len(tokens) == 1 + resolution[0] * resolution[1] // side**2
    canvas = Canvas(size, resolution, side, n, patch, 1 if name == "llava_onevision" else None)
    (h, w), views = canvas.views(0)
    placed = canvas.place(tokens[1:]).flatten(0, 1)
    assert len(placed) == h * w == sum(map(len, views))
    checked = 0
    for view in views:
        top_edge, left_edge, bottom, right = view.region
        for i, index in enumerate(view.index.tolist()):
            y, x, full = placed[index].tolist()
            if full > 0.999:  # shows no padding
                row, column = divmod(i, view.grid[1])
                assert y == pytest.approx(top_edge + (row + 0.5) / view.grid[0] * (bottom - top_edge), abs=0.02)
                assert x == pytest.approx(left_edge + (column + 0.5) / view.grid[1] * (right - left_edge), abs=0.02)
                checked += 1
    assert checked > 0.6 * len(placed)


def test_shrunken_crops_take_scores_as_they_take_features():
    """LLaVA-OneVision blends tokens: whatever is placed like the features comes out as the model blends them."""
    one = shared("llava_onevision")
    inputs = one.prompts([["a", "b"], ["c"]])
    projected = []
    hook = one.model.model.multi_modal_projector.register_forward_hook(lambda *call: projected.append(call[2]))
    with torch.no_grad():
        one.model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    hook.remove()
    pictures = marked(one, inputs, "image", projected[0])
    assert [len(picture) for picture in pictures] == [25 + 30, 25 + 16, 25 + 20]
    for picture in pictures:
        torch.testing.assert_close(picture.statistics[MARK], picture.features, rtol=0, atol=0)


def test_frames_keep_their_order(with_videos):
    vlm, name = with_videos, with_videos.name
    inputs = vlm.prompts([["A", 1, "B"]])
    side = {"video_llava": 4, "llava_next_video": 4, "llava_onevision": 5}[name]
    first = int(name != "llava_onevision")  # CLS
    t = tiny_llava.FRAMES
    numbers = (torch.arange(2 * t)[:, None] * 100 + torch.arange(-first, side * side)).float()
    pictures = marked(vlm, inputs, "video", numbers)
    for number, picture in enumerate(pictures):
        assert [view.kind for view in picture.views] == ["frame"] * t and picture.patches == (t, side, side)
        for frame, view in enumerate(picture.views):
            grid = [[(number * t + frame) * 100 + y * side + x for x in range(side)] for y in range(side)]
            if name == "video_llava":
                expected = sum(grid, [])
            elif name == "llava_next_video":
                expected = [
                    sum(grid[2 * y + i][2 * x + j] for i in (0, 1) for j in (0, 1)) / 4
                    for y in range(2)
                    for x in range(2)
                ]
            else:  # bilinear from 5 to 3 points: centres 1/3, 2, 11/3
                at = [1 / 3, 2, 11 / 3]
                origin = grid[0][0]
                expected = [origin + y * side + x for y in at for x in at]
            assert picture.statistics[MARK][view.index].tolist() == pytest.approx(expected, rel=1e-5)
            assert view.cell == (frame, 0) and len(view) == view.grid[0] * view.grid[1]


def test_several_images_of_a_sample_have_no_crops():
    """LLaVA-OneVision cuts no crops where a sample has several images: 25 tokens and a newline each, then a square."""
    one = shared("llava_onevision")
    pixels = torch.cat([noise(letter, 1, 3, 3, 40, 40) for letter in "abc"])
    sizes = torch.tensor([[20, 60], [90, 28], [20, 60]])
    rows = [[5, *[IMAGE] * 26, 6, *[IMAGE] * 26, 7, 8], [5, *[IMAGE] * 58, 9, 8]]
    ids = torch.tensor([[0] * (62 - len(row)) + row for row in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": pixels,
        "image_sizes": sizes,
        "batch_num_images": torch.tensor([2, 1]),
    }
    fed = embeddings(one.model, inputs)[ids == IMAGE]
    pictures = encoded(one, inputs)
    assert torch.equal(torch.cat([picture.spread(picture.features) for picture in pictures]), fed)
    assert [(len(picture), picture.span) for picture in pictures] == [(25, 26), (25, 26), (55, 58)]
    assert [len(picture.views) for picture in pictures] == [1, 1, 3] and len(fed) == 110
    assert pictures[0].views[0].region == (-1.0, 0.0, 2.0, 1.0), "a wide image lies in the middle third of its square"
    assert pictures[1].views[0].region[0] == 0 and pictures[1].views[0].region[1] == -31 / 28
    with vlmfast.patch(one.model, "hiprune:keep=0.4") as handle:
        one.model.generate(**inputs, max_new_tokens=2)
        assert [image.kept for image in handle.report().images] == [10, 10, 22]


def test_crops_given_in_one_row(anyres):
    """`pixel_values` may come without filling: [views of all images, C, H, W]."""
    inputs = anyres.prompts([["a", "b"], ["c"]])
    counts = [picture.patches[0] for picture in encoded(anyres, inputs)]
    flat = torch.cat([pixels[:n] for pixels, n in zip(inputs["pixel_values"], counts)])
    together = encoded(anyres, inputs)
    for one, other in zip(together, encoded(anyres, {**inputs, "pixel_values": flat})):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.features, other.features)
        assert torch.equal(one.slots, other.slots)


# --- scores --------------------------------------------------------------------------------------------------------


def eager_maps(tower: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Attention maps of every layer of a tower, [views, H, n, n]."""
    eager = copy.deepcopy(tower)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        return list(eager(pixels, output_attentions=True).attentions)


def in_loops(maps: torch.Tensor, kind: str, cls: bool) -> list[float]:
    """A statistic of one view: means over heads, and over queries, of the columns of its patches. maps: [H, n, n]"""
    heads, n = maps.shape[:2]
    queries = [0] if kind == "cls_row" else range(n)
    values = maps.tolist()
    return [
        sum(values[head][query][key] for head in range(heads) for query in queries) / (heads * len(queries))
        for key in range(int(cls), n)
    ]


def test_scores_of_thumbnail_and_crop_in_loops(anyres):
    vlm, cls = anyres, anyres.name != "llava_onevision"
    kinds = ["column_mean", "cls_row"] if cls else ["column_mean"]
    scores = [Score(layer, kind) for layer in (1, 2) for kind in kinds]
    inputs = vlm.prompts([["a", "b"], ["c"]])
    pictures = encoded(vlm, inputs, methods=[Wants(tuple(scores))])
    for picture in (pictures[0], pictures[2]):
        maps = eager_maps(vlm.model.model.vision_tower, picture.pixels)
        for score in scores:
            values = picture.statistics[score]
            every = [in_loops(view, score.kind, cls) for view in maps[score.layer]]
            assert values[picture.views[0].index].tolist() == pytest.approx(every[0], abs=1e-6)
            number = torch.tensor(every[1:])
            side, at_most = ANYRES[vlm.name]
            size = (64, 50) if picture is pictures[2] else (20, 60)
            if at_most is None:
                order = prompt_order(size, side, side // 8)[len(every[0]) :]
                expected = [every[view][y * (side // 8) + x] for view, y, x in order]
            else:
                resolution = select_best_resolution(size, tiny_llava.grid_points(side))
                expected = Canvas(size, resolution, side, 5, 8, at_most).place(number).flatten().tolist()
            assert values[len(every[0]) :].tolist() == pytest.approx(expected, abs=1e-6)


def test_scores_of_frames_in_loops():
    """The video tower's own attention, frame by frame; the CLS token's key leaves with its place."""
    one = shared("video_llava")
    inputs = one.prompts([["A", "B"]])
    scores = (Score(2, "cls_row"), Score(1, "column_mean"))
    pictures = encoded(one, inputs, "video", [Wants(scores)])
    for picture in pictures:
        maps = eager_maps(one.model.model.video_tower, picture.pixels)
        for score in scores:
            for frame, view in enumerate(picture.views):
                expected = in_loops(maps[score.layer][frame], score.kind, cls=True)
                assert picture.statistics[score][view.index].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["llava", "video_llava", "llava_next", "llava_next_video"])
def test_tower_features_project_to_the_visual_tokens(name):
    one = shared(name)
    hidden = Score(one.model.config.vision_config.num_hidden_layers - 2, "hidden")
    for modality in FAMILIES[name].sources:
        letter = "a" if modality == "image" else "A"
        (picture,) = encoded(one, one.prompts([[letter]]), modality, [Wants((hidden,))])
        with torch.no_grad():
            projected = picture.project(picture.statistics[hidden])
        torch.testing.assert_close(projected, picture.features, rtol=1e-5, atol=1e-5)


def test_no_projection_where_one_layer_does_not_make_a_token(vlm):
    """ViP-LLaVA joins five layers, LLaVA-OneVision blends after the projector."""
    (picture,) = encoded(vlm, vlm.prompts([["a"]]))
    assert (picture.project is None) == (vlm.name in ("vipllava", "llava_onevision"))


# --- pruned prompts ------------------------------------------------------------------------------------------------


def check_masking(vlm: Any, spec: str) -> None:
    """A pruned run has the logits of the full run in which nobody may attend to what was dropped."""
    for row in rows_of(vlm)[:2]:
        inputs = vlm.prompts([row])
        with vlmfast.patch(vlm.model, spec, positions="original") as handle, torch.no_grad():
            pruned = vlm.model(**inputs).logits[0]
            kept = {id(image): image for image in handle.report().images}
        letters = [part for part in row if isinstance(part, str)]
        stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
        for token, letters_of in (
            (IMAGE, [x for x in letters if x.islower()]),
            (VIDEO, [x for x in letters if x.isupper()]),
        ):
            if not letters_of:
                continue
            pictures = encoded(vlm, inputs, "image" if token == IMAGE else "video")
            reports = [one for one, letter in zip(kept.values(), letters) if letter in letters_of]
            places = []
            for picture, report in zip(pictures, reports):
                slots = torch.arange(picture.span) if picture.slots is None else picture.slots
                place = torch.zeros(picture.span, dtype=torch.bool)
                place[slots[report.indices]] = True
                assert report.n == picture.span and report.kept == len(report.indices) == int(place.sum())
                places.append(place)
            stays[(inputs["input_ids"][0] == token)] = torch.cat(places)
        masked = {**inputs, "attention_mask": stays.long()[None], "position_ids": torch.arange(len(stays))[None]}
        with torch.no_grad():
            full = vlm.model(**masked).logits[0]
        torch.testing.assert_close(pruned, full[stays], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", METHODS)
def test_dropping_equals_masking(vlm, spec):
    check_masking(vlm, spec)


def test_cls_in_the_prompt_goes_when_tokens_go():
    one = cls_in_prompt()
    check_features(one)
    check_masking(one, "fastervlm:keep=0.5")
    inputs = one.prompts(rows_of(one))
    with torch.no_grad():
        plain = one.model(**inputs).logits
        with vlmfast.patch(one.model, "fastervlm:keep=1.0") as handle:
            assert torch.equal(one.model(**inputs).logits, plain)
            assert [(image.n, image.kept, len(image.indices)) for image in handle.report().images] == [
                (37, 37, 36)
            ] * 3


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_rows_of_a_batch_are_as_alone(vlm, how):
    rows = rows_of(vlm)
    together = vlm.prompts(rows)
    width = together["input_ids"].shape[1]
    with vlmfast.patch(vlm.model, "hiprune:keep=0.4"), torch.no_grad():
        logits = vlm.model(**together).logits[:, -1]
        tokens = vlm.model.generate(**together, max_new_tokens=3, do_sample=False, **how)[:, width:]
        assert tokens.shape == (3, 3)
        for row in range(3):
            alone = vlm.prompts(rows, only=row)
            torch.testing.assert_close(vlm.model(**alone).logits[0, -1], logits[row], rtol=1e-3, atol=1e-3)
            one = vlm.model.generate(**alone, max_new_tokens=3, do_sample=False, **how)
            assert torch.equal(one[0, alone["input_ids"].shape[1] :], tokens[row])


@pytest.mark.parametrize("spec", METHODS[2:])  # test_promises.py has the others
def test_keeping_everything_is_the_identity_and_unpatching_restores(vlm, spec):
    inputs = vlm.prompts(rows_of(vlm))
    run = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        logits, tokens = vlm.model(**inputs).logits, vlm.model.generate(**inputs, **run)
        with vlmfast.patch(vlm.model, spec + (",keep=1.0" if ":" in spec else ":keep=1.0")) as handle:
            assert torch.equal(vlm.model(**inputs).logits, logits)
            assert torch.equal(vlm.model.generate(**inputs, **run), tokens)
            assert all(image.kept == image.n for image in handle.report().images), "newlines too"
        with vlmfast.patch(vlm.model, spec):
            vlm.model.generate(**inputs, **run)
        assert torch.equal(vlm.model(**inputs).logits, logits)
        assert torch.equal(vlm.model.generate(**inputs, **run), tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridWithNewlines(Grid):
    """Keeps the places that hold no visual token."""

    keeps_newlines = True


def test_newlines_go_with_tokens_unless_a_method_keeps_them(anyres):
    inputs = anyres.prompts([[2, "c", 3]])
    (picture,) = encoded(anyres, inputs)
    rows = picture.span - len(picture)
    assert rows == picture.views[1].grid[0] + picture.views[3].grid[0], "one for each row that is no padding"
    with torch.no_grad():
        for method, newlines in ((Grid(keep=0.5), 0), (GridWithNewlines(keep=0.5), rows)):
            with vlmfast.patch(anyres.model, method) as handle:
                anyres.model(**inputs)
                (report,) = handle.report().images
                assert report.kept == len(report.indices) + newlines
        with vlmfast.patch(anyres.model, GridWithNewlines(keep=0.5)):
            fed = embeddings(anyres.model, inputs)[0]
        newline = anyres.model.model.image_newline
        assert int((fed == newline).all(-1).sum()) == rows
        whole = torch.ones(picture.span, dtype=torch.bool)
        whole[picture.slots[[i for i in range(len(picture)) if i not in report.indices]]] = False
        assert torch.equal(fed[2:-3], picture.spread(picture.features)[whole])


def test_older_name_of_the_pixels():
    """Processors before 5.23 give Video-LLaVA its images as `pixel_values_images`."""
    one = shared("video_llava")
    new = one.prompts([[3, "a", 2, "A", 1]])
    old = {("pixel_values_images" if name == "pixel_values" else name): value for name, value in new.items()}
    with vlmfast.patch(one.model, "fastervlm:keep=0.5"), torch.no_grad():
        assert torch.equal(one.model(**old).logits, one.model(**new).logits)
        assert torch.equal(one.model.generate(**old, max_new_tokens=3), one.model.generate(**new, max_new_tokens=3))


# --- budgets by view -----------------------------------------------------------------------------------------------


def test_methods_choose_view_by_view(vlm):
    inputs = vlm.prompts(rows_of(vlm))
    methods = from_spec("fastervlm:keep=0.4,fallback=received")[0], HiPrune(keep=0.4, alpha=0.5), Grid(keep=0.4)
    for modality in FAMILIES[vlm.name].sources:
        for picture in encoded(vlm, inputs, modality, methods):
            shares = apportion(round(0.4 * len(picture)), [len(view) for view in picture.views])
            chosen = {}
            for method in methods:
                wanted = method.wanted(FAMILIES[vlm.name].tower(vlm.model.config))
                scores = {name: picture.statistics[score] for name, score in wanted.items()}
                chosen[type(method)] = method.choose(dataclasses.replace(picture, scores=scores)).kept
                if isinstance(method, FasterVLM):
                    attention = scores["attention"]
            for view, share in zip(picture.views, shares):
                part = {cls: kept[torch.isin(kept, view.index)] for cls, kept in chosen.items()}
                assert all(len(kept) == share for kept in part.values())
                best = view.index[top(attention[view.index], share)].sort().values
                assert torch.equal(part[FasterVLM], best)
                assert torch.equal(part[Grid], view.index[even_grid(*view.grid, share)].sort().values)


def test_neighbours_stay_on_the_grid_of_their_view():
    """One anchor in the middle of each crop: its neighbours are those of the crop, not of the canvas."""
    one = shared("llava_next")
    (picture,) = encoded(one, one.prompts([["c"]]))
    objects = torch.zeros(len(picture))
    expected = set()
    for view in picture.views:
        h, w = view.grid
        objects[view.index[w + 1]] = 1.0
        expected |= {int(view.index[i]) for i in (w + 1, w, w + 2, 1, 2 * w + 1)}
    scores = {"objects": objects, "deep": torch.zeros(len(picture))}
    kept = HiPrune(keep=5 * len(picture.views), alpha=1.0).choose(dataclasses.replace(picture, scores=scores)).kept
    # views of 16 and 12 tokens do not get five each: the first adds a register, the last leaves a neighbour out
    shares = apportion(25, [len(view) for view in picture.views])
    assert shares == [6, 5, 5, 5, 4] and len(expected - set(kept.tolist())) == 1
    for view, share in zip(picture.views, shares):
        assert len([i for i in kept.tolist() if i in view.index]) == share
        assert int(view.index[view.grid[1] + 1]) in kept


# --- cost ----------------------------------------------------------------------------------------------------------


def count(work: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def check_cost(vlm: Any) -> None:
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")
    family, config = FAMILIES[vlm.name], model.config
    for modality, source in family.sources.items():
        for letter in "abc" if modality == "image" else "A":
            inputs = vlm.picture(letter if modality == "image" else letter.upper()).inputs
            (picture,) = encoded(vlm, inputs, modality)
            vision = (source.vision or family.vision)(config, picture.patches)
            seen = count(lambda: getattr(model.model, source.encode)(**inputs))  # noqa: B023
            assert vision.tower + vision.projector == seen
            if modality == "video" or not family.crops:
                assert vision.tokens == picture.span
            towers = [module for name, module in model.model.named_children() if name.endswith("tower")]
            tower = towers[0] if modality == "video" else towers[-1]  # video_llava has two
            views = picture.pixels.reshape(-1, *picture.pixels.shape[-3:])
            assert count(lambda: tower(views)) == vision.tower  # noqa: B023


def test_cost_equals_torchs_counter(vlm):
    check_cost(vlm)


@pytest.mark.parametrize("name", VARIANTS)
def test_cost_of_other_settings(name):
    check_cost(variant(name))


def test_the_report_counts_videos_as_videos(with_videos):
    vlm, config = with_videos, with_videos.model.config
    (picture,) = encoded(vlm, vlm.prompts([["A"]]), "video")
    with vlmfast.patch(vlm.model, "random:keep=0.5") as handle, torch.no_grad():
        vlm.model(**vlm.prompts([[3, "A", 2]]))
        share, kept = handle.report().share, handle.report().images[0].kept
    about = {"text": 5, "images": [picture.patches], "videos": [True], "tokens": [picture.span]}
    plain = prompt_cost(config, **about)
    vision = FAMILIES[vlm.name].sources["video"].vision(config, picture.patches)
    assert (plain.tower, plain.projector) == (vision.tower, vision.projector)
    assert share == prompt_cost(config, **about, kept=[kept]).total_prefill / plain.total_prefill


def size_of(visual: VisualTokens) -> Picture:
    """The sizes of an encoded picture."""
    t = sum(view.kind == "frame" for view in visual.views)
    return Picture(patches=visual.patches, tokens=len(visual), span=visual.span, frames=t or 1, video=t > 0)


def test_usual_pictures_are_as_they_come(vlm):
    """The sizes for which `keep` is solved are those of a real picture."""
    config = vlm.model.config
    image = vlm.picture("a").inputs
    if vlm.name in ANYRES:
        side, at_most = ANYRES[vlm.name]
        image = tiny_llava.anyres("a", side, at_most, (2 * side, 2 * side)).inputs
    (picture,) = encoded(vlm, image)
    assert nominal(config) == size_of(picture)
    if vlm.tiny.video:
        video = vlm.picture("A").inputs["pixel_values_videos"][:, :1].expand(-1, 8, -1, -1, -1)
        (picture,) = encoded(vlm, {"pixel_values_videos": video}, "video")
        assert nominal(config, "video") == size_of(picture)
        (picture,) = encoded(vlm, {"pixel_values_videos": video[:, :1]}, "video")
        assert size_of(picture).video and len(picture.views) == 1 and picture.views[0].kind == "frame"


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny_llava.build_llava(vision_config=tiny_llava.siglip(48)), "cuts off its first patch.*'full'"),
        (lambda: tiny_llava.build_vipllava(vision_config=tiny_llava.siglip(48)), "cuts off its first patch"),
        (lambda: tiny_llava.build_llava(vision_feature_layer=0), "vision_feature_layer=0"),
        (lambda: tiny_llava.build_llava(vision_feature_layer=[2, 9]), r"\[2, 9\]; supported.*4 blocks"),
        (lambda: tiny_llava.build_llava_next(vision_feature_select_strategy="full"), "do not fit the crops' grid"),
        (lambda: tiny_llava.build_llava_onevision(vision_aspect_ratio="pad"), "anyres_max_ and a number"),
        (lambda: tiny_llava.build_llava_onevision(vision_aspect_ratio="anyres_max_0"), "anyres_max_ and a number"),
    ],
)
def test_what_is_not_supported_is_refused_when_patching(build, message):
    with pytest.raises(NotImplementedError, match=message):
        vlmfast.patch(build(), "random")


def test_another_tower_is_refused():
    config = tiny_llava.build_llava().config
    config.vision_config = CLIPVisionConfig()
    config.vision_config.model_type = "dinov2"
    with pytest.raises(NotImplementedError, match="dinov2 tower; supported: clip_vision_model, siglip_vision_model"):
        FAMILIES["llava"].tower(config)


def test_settings_of_the_call_must_be_those_of_the_config():
    one = shared("llava")
    inputs = one.prompts([[3, "a", 2]])
    with vlmfast.patch(one.model, "fastervlm"), torch.no_grad():
        one.model(**inputs, vision_feature_layer=-2)
        with pytest.raises(NotImplementedError, match="vision_feature_layer=-1 in the call"):
            one.model(**inputs, vision_feature_layer=-1)


def test_sizes_of_images_must_come_along(anyres):
    inputs = anyres.prompts([[3, "a", 2]])
    del inputs["image_sizes"]
    with vlmfast.patch(anyres.model, "random"), pytest.raises(ValueError, match="image_sizes is missing"):
        anyres.model(**inputs)
