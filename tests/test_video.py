"""Videos: the methods made for them against plain loops, and what every method promises where there are videos."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from conftest import TINY, lend

import vlmfast
from vlmfast.adapters import support
from vlmfast.adapters.pruning.evs import EVS
from vlmfast.adapters.pruning.fastervlm import FasterVLM
from vlmfast.adapters.pruning.framefusion import FrameFusion
from vlmfast.adapters.pruning.hiprune import HiPrune
from vlmfast.adapters.pruning.vidcom2 import VidCom2, split
from vlmfast.encoding import encode_images, encoder_outputs
from vlmfast.families import FAMILIES, family_of
from vlmfast.layers.prefill import merged
from vlmfast.layers.tokens import LayerTokens
from vlmfast.towers import Picture
from vlmfast.visual import View, VisualTokens, apportion, frame_index, is_video

VIDEO_FAMILIES = [name for name, tiny in TINY.items() if tiny.video is not None]
KEYED = [name for name in VIDEO_FAMILIES if not name.startswith("qwen3_5")]  # its linear attention has no keys to mask


def video(t: int, h: int, w: int, width: int = 8, seed: int = 0, features: torch.Tensor | None = None) -> VisualTokens:
    """A video of t frames of h x w tokens."""
    if features is None:
        features = torch.randn(t * h * w, width, generator=torch.Generator().manual_seed(seed))
    return VisualTokens(features, (t, h, w), h * w)


def pooled(t: int, h: int, w: int, width: int = 8, seed: int = 0) -> VisualTokens:
    """A video with a newline after every frame."""
    one = video(t, h, w, width, seed)
    slots = torch.arange(t * (h * w + 1)).view(t, -1)[:, :-1].flatten()
    return VisualTokens(
        one.features, one.grid, h * w, slots=slots, span=t * (h * w + 1), newline=torch.full((width,), 9.0)
    )


# --- frames ------------------------------------------------------------------------------------------------------


def test_frames_of_a_video():
    assert frame_index(video(3, 2, 2).views).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert not is_video(video(1, 2, 2).views)
    assert not is_video([View(torch.arange(4), (2, 2), "crop"), View(torch.arange(4), (2, 2), "crop")])
    with pytest.raises(ValueError, match="two frames or more is needed, got 0"):
        frame_index(video(1, 2, 2).views)
    uneven = [View(torch.arange(4), (2, 2), "frame"), View(torch.arange(6), (2, 3), "frame")]
    with pytest.raises(ValueError, match="different sizes: 4, 6 tokens"):
        frame_index(uneven)


def test_frames_in_any_order_of_the_prompt():
    """Views may interleave: methods go by their indices, not by where tokens stand."""
    plain = video(3, 2, 2, seed=3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    place = order.argsort()
    views = tuple(View(place[view.index], view.grid, "frame", view.cell) for view in plain.views)
    mixed = VisualTokens(plain.features[order], (1, 1, 12), 4, views=views)
    for method in (EVS(keep=7), VidCom2(keep=7)):
        assert sorted(order[method.choose(mixed).kept].tolist()) == method.choose(plain).kept.tolist()


# --- EVS ---------------------------------------------------------------------------------------------------------


def evs_in_loops(features, t, n, k):
    """Kept tokens, ascending; dissimilarities rounded so that rounding errors do not order equal ones."""
    rows = features.double()
    dissimilarity = []
    for frame in range(1, t):
        for j in range(n):
            now, before = rows[frame * n + j], rows[(frame - 1) * n + j]
            cosine = float(now @ before) / (float(now.norm()) * float(before.norm()))
            dissimilarity.append((-round(1 - cosine, 6), frame * n + j))
    later = sorted(dissimilarity)[: max(0, k - n)]
    return sorted([*range(n), *(j for _, j in later)])


@pytest.mark.parametrize(("t", "h", "w", "keep"), [(4, 3, 5, 0.4), (2, 3, 3, 0.75), (6, 2, 2, 11), (3, 1, 4, 1.0)])
def test_evs_in_loops(t, h, w, keep):
    one = video(t, h, w, seed=t)
    k = keep if isinstance(keep, int) else round(keep * t * h * w)
    assert EVS(keep=keep).choose(one).kept.tolist() == evs_in_loops(one.features, t, h * w, k)


def test_evs_keeps_the_first_frame_whole_even_above_the_budget():
    one = video(5, 2, 4)
    for keep in (1, 7, 0.1):
        assert EVS(keep=keep).choose(one).kept.tolist() == list(range(8))
    assert EVS(keep=8).choose(one).kept.tolist() == list(range(8))


def test_evs_keeps_what_changed():
    """A still background, one place that changes in frame 2 and stays changed."""
    frame = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    changed = frame.clone()
    changed[4] = -changed[4]
    one = video(4, 2, 3, features=torch.cat([frame, frame, changed, changed]))
    assert EVS(keep=7).choose(one).kept.tolist() == [*range(6), 2 * 6 + 4]


def test_evs_on_frames_that_never_change_goes_by_index():
    frame = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) * 100
    one = video(4, 2, 3, features=frame.repeat(4, 1))
    assert EVS(keep=10).choose(one).kept.tolist() == list(range(10))


# --- VidCom2 -----------------------------------------------------------------------------------------------------


def vidcom2_in_loops(features, t, n, ratio):
    """The official choice in plain loops: (shares of the frames before rounding, scores [t][n], kept)."""
    rows = [[float(x) for x in row] for row in features.double()]
    width = len(rows[0])
    variance = []
    for c in range(width):
        mean = sum(row[c] for row in rows) / len(rows)
        variance.append((sum((row[c] - mean) ** 2 for row in rows) / len(rows), c))
    channels = [c for _, c in sorted(variance)[: width // 2]]
    units = []
    for row in rows:
        part = [row[c] for c in channels]
        norm = math.sqrt(sum(x * x for x in part))
        units.append([x / norm for x in part])

    def mean_of(indices):
        return [sum(units[i][c] for i in indices) / len(indices) for c in range(len(channels))]

    def gaussian(x, centre):
        distance = sum((a - b) ** 2 for a, b in zip(x, centre))
        return sum(math.exp(-distance / (2 * 2.0**power)) for power in range(-3, 2))

    whole = mean_of(range(t * n))
    to_video, total = [], []
    for frame in range(t):
        own = range(frame * n, frame * n + n)
        centre = mean_of(own)
        to_video.append([gaussian(units[i], whole) for i in own])
        total.append([gaussian(units[i], whole) + gaussian(units[i], centre) for i in own])
    logits = [-sum(row) / n / 0.01 for row in to_video]
    powers = [math.exp(value - max(logits)) for value in logits]
    p = [value / sum(powers) for value in powers]
    share = [min(1.0, ratio * (1 + value - sum(p) / t)) for value in p]
    kept = []
    for frame in range(t):
        k = max(1, round(share[frame] * n))
        kept += sorted(frame * n + j for _, j in sorted((total[frame][j], j) for j in range(n))[:k])
    return share, total, kept


@pytest.mark.parametrize(("t", "h", "w", "keep"), [(4, 3, 5, 0.4), (2, 3, 3, 0.75), (8, 2, 2, 0.25), (3, 1, 4, 0.9)])
def test_vidcom2_in_loops(t, h, w, keep):
    n = h * w
    one = video(t, h, w, width=10, seed=t + 1)
    _, _, official = vidcom2_in_loops(one.features, t, n, keep)
    assert VidCom2(keep=keep, parity="official").choose(one).kept.tolist() == official
    k = round(keep * t * n)
    share, total, _ = vidcom2_in_loops(one.features, t, n, k / (t * n))
    kept = VidCom2(keep=keep).choose(one).kept.tolist()
    assert len(kept) == k
    for frame in range(t):
        mine = [j - frame * n for j in kept if frame * n <= j < frame * n + n]
        assert mine == sorted(sorted(range(n), key=lambda j: (total[frame][j], j))[: len(mine)])
        if max(share) < 1:  # no limit is reached: what is kept is the share up to rounding
            assert abs(len(mine) - share[frame] * n) < 1


def test_vidcom2_official_drifts_and_repaired_does_not():
    one = video(8, 3, 3, width=10, seed=5)
    assert len(VidCom2(keep=0.05, parity="official").choose(one).kept) == 8  # at least one a frame
    assert len(VidCom2(keep=0.05).choose(one).kept) == 4
    assert len(VidCom2(keep=9).choose(one).kept) == 9


@pytest.mark.parametrize(
    ("share", "n", "k", "expected"),
    [
        ([0.5, 0.5], 4, 4, [2, 2]),
        ([1.0, 1.0, 1.0], 4, 4, [2, 1, 1]),
        ([1.0, 0.2, 0.2], 10, 14, [10, 2, 2]),  # a full frame leaves the rest to the others
        ([1.0, 0.2, 0.2], 10, 20, [10, 5, 5]),
        ([0.9, 0.01, 0.01], 10, 6, [4, 1, 1]),
        ([0.9, 0.2, 0.01], 10, 2, [2, 0, 0]),  # fewer tokens than frames
        ([0.3, 0.2, 0.1], 5, 15, [5, 5, 5]),
        ([0.3, 0.2, 0.1], 5, 14, [5, 5, 4]),
        ([1.0, 1.0, 1.0, 1.0], 3, 1, [1, 0, 0, 0]),
    ],
)
def test_a_budget_split_over_frames(share, n, k, expected):
    assert split(torch.tensor(share), n, k).tolist() == expected


def test_every_budget_is_met_exactly():
    generator = torch.Generator().manual_seed(0)
    for t, n in ((2, 5), (5, 7), (9, 3)):
        share = torch.rand(t, generator=generator) + 1e-4
        for k in range(1, t * n + 1):
            counts = split(share, n, k)
            assert int(counts.sum()) == k
            assert int(counts.max()) <= n and int(counts.min()) >= (1 if k >= t else 0)


def test_vidcom2_gives_more_to_a_frame_that_stands_out():
    generator = torch.Generator().manual_seed(0)
    frame = torch.randn(12, 8, generator=generator)
    odd = torch.randn(12, 8, generator=generator) * 5
    one = video(4, 3, 4, features=torch.cat([frame, frame, odd, frame]))
    counts = torch.bincount(VidCom2(keep=0.25).choose(one).kept // 12, minlength=4)
    assert counts.argmax() == 2


# --- FrameFusion -------------------------------------------------------------------------------------------------


def fusion_in_loops(one, hidden, index, method, depth, total, attention):
    """All cuts of one video in plain loops. hidden: states that enter a layer stay as they are, but for merging.

    -> [(layer, tokens of the picture that are left, states)]
    """
    place = {int(token): (j, t) for t, view in enumerate(one.views) for j, token in enumerate(view.index)}
    tokens, states = index.tolist(), {int(i): hidden[n].double() for n, i in enumerate(index)}
    over, spent, cuts = False, 0, []
    for layer in range(depth):
        if layer < (method.first or 1):
            spent += len(tokens)
            continue
        k = round(method.keep * total) if isinstance(method.keep, float) else method.keep
        if method.cost is not None:
            k = round((method.cost * depth * total - spent) / (depth - layer))
        if len(tokens) <= k:
            break
        if not over:
            line = sorted(tokens, key=lambda token: place[token])
            cosine = {}
            for before, token in zip(line, line[1:]):
                if place[before][0] == place[token][0]:
                    a, b = states[before], states[token]
                    cosine[token] = float(a @ b) / float(a.norm() * b.norm())
            similar = [token for token in line if cosine.get(token, -2) >= method.similarity]
            if done := len(similar) >= len(tokens) - k:
                similar = sorted(similar, key=lambda token: (-round(cosine[token], 6), place[token]))
                similar = similar[: len(tokens) - k]
            runs: dict[int, list[int]] = {}
            for token in line:
                head = token if token not in similar else head  # noqa: F821
                runs.setdefault(head, []).append(token)
            over = len(similar) < method.least * len(tokens)
            for head, run in runs.items():
                states[head] = sum(states[token] for token in run) / len(run)
            tokens = [token for token in tokens if token in runs]
            room = math.inf if method.cost is None else method.cost * depth * total - spent
            if len(tokens) > k and (layer == depth - 1 or room - len(tokens) < depth - layer - 1):
                tokens, done = best(tokens, attention, k), True
        else:
            tokens, done = best(tokens, attention, k), True
        cuts.append((layer, list(tokens), torch.stack([states[token] for token in tokens])))
        if done:
            break
        spent += len(tokens)
    return cuts


def best(tokens, attention, k):
    kept = sorted(tokens, key=lambda token: (-float(attention[token]), token))[:k]
    return [token for token in tokens if token in kept]


def fusion(one, hidden, index, method, depth, total, attention):
    """The same through the method, with the door's part (`merged`) by hand."""
    memory, cuts = {}, []
    for layer in method.layers(depth):
        tokens = LayerTokens(
            layer=layer,
            depth=depth,
            hidden=hidden,
            text=hidden[:0],
            question=hidden[:0],
            index=index,
            visual=one,
            total=total,
            keep=method.left(layer, total, depth),
            scores={"attention": attention[index]},
            memory=memory,
        )
        cut = method.cut(tokens)
        if cut.merge is not None:
            columns = torch.arange(len(index))
            hidden = merged(hidden[None], 0, columns, cut.kept, cut.merge)[0]
        if len(cut.kept) < len(index):
            cuts.append((layer, index[cut.kept].tolist(), hidden[cut.kept]))
        hidden, index = hidden[cut.kept], index[cut.kept]
        if cut.final:
            break
    return cuts


def slow_video(t, h, w, noise, seed=0):
    """Frames that drift: how much, differs from place to place."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.randn(h * w, 8, generator=generator)
    steps = torch.randn(t, h * w, 8, generator=generator) * torch.linspace(0, noise, h * w)[:, None]
    return video(t, h, w, features=(frame + steps.cumsum(0)).flatten(0, 1))


FUSIONS = {
    "one cut is enough": FrameFusion(keep=0.5, similarity=0.0),
    "merges, then prunes": FrameFusion(keep=0.3, similarity=0.9),
    "merges little, then prunes": FrameFusion(keep=0.4, similarity=0.9999, least=0.5),
    "nothing is alike": FrameFusion(keep=7, similarity=1.0),
    "later": FrameFusion(keep=0.2, similarity=0.5, first=3),
    "merging never ends": FrameFusion(keep=3, similarity=0.97, least=0.0),
    "budget of the authors": FrameFusion(cost=0.6),
    "budget of the authors, tight": FrameFusion(cost=0.35, similarity=0.95),
}


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_framefusion_in_loops(name, noise):
    method, depth = FUSIONS[name], 6
    one = slow_video(5, 3, 4, noise, seed=len(name))
    attention = torch.rand(len(one), generator=torch.Generator().manual_seed(1))
    for index in (torch.arange(60), torch.arange(60)[::2]):  # all, and what a method before the language model left
        given = one, one.features[index], index, method, depth, len(index), attention
        ours, loops = fusion(*given), fusion_in_loops(*given)
        loops = [cut for before, cut in zip([(0, index.tolist())] + loops, loops) if len(cut[1]) < len(before[1])]
        assert [cut[:2] for cut in ours] == [cut[:2] for cut in loops]
        for (_, _, states), (_, _, wanted) in zip(ours, loops):
            torch.testing.assert_close(states.double(), wanted, rtol=1e-5, atol=1e-5)
        left = len(ours[-1][1])
        if method.cost is None:
            assert left == (method.keep if isinstance(method.keep, int) else round(method.keep * len(index)))
        else:
            held = [len(index)] * depth
            for layer, tokens, _ in ours:
                held[layer:] = [len(tokens)] * (depth - layer)
            assert abs(sum(held) - method.cost * depth * len(index)) <= depth / 2, "the mean is the authors' cost"


def test_framefusion_of_frames_that_never_change_leaves_the_first():
    frame = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    one = video(4, 2, 3, features=frame.repeat(4, 1))
    ((layer, tokens, states),) = fusion(
        one, one.features, torch.arange(24), FrameFusion(keep=6), 4, 24, torch.ones(24)
    )
    assert (layer, tokens) == (1, list(range(6)))
    torch.testing.assert_close(states, frame)


@pytest.mark.parametrize("features", [torch.ones(24, 8), torch.zeros(24, 8), torch.ones(24, 8, dtype=torch.bfloat16)])
def test_framefusion_of_constant_videos(features):
    one = video(4, 2, 3, features=features)
    cuts = fusion(one, one.features, torch.arange(24), FrameFusion(keep=0.5), 6, 24, torch.ones(24))
    assert len(cuts[-1][1]) == 12 and cuts[-1][2].isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity": 1.5}, "a cosine"),
        ({"least": -0.1}, "a share"),
        ({"first": 0}, "a decoder layer"),
        ({"first": True}, "a decoder layer"),
        ({"cost": 0.0}, r"a share in \(0, 1\]"),
        ({"keep": 0}, "int >= 1"),
    ],
)
def test_framefusion_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FrameFusion(**settings)


def test_framefusion_refuses_a_cost_that_is_spent_already():
    one = video(4, 2, 3)
    with pytest.raises(ValueError, match=r"cost=0.2 is spent before layer 1 of 4; choose more"):
        fusion(one, one.features, torch.arange(24), FrameFusion(cost=0.2), 4, 24, torch.ones(24))


def test_framefusion_inside_a_model():
    """Merged states go through the layers behind the cut as if computed by hand."""
    (vlm,) = lend("qwen2_vl")
    inputs = vlm.prompts([[3, "A", 4]])
    caught = {}

    def catch(module, args, kwargs):
        caught["hidden"], caught["kwargs"] = args[0], kwargs

    decoder = vlm.model.get_decoder()
    hook = decoder.layers[1].register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        vlm.model(**inputs)
    hook.remove()
    method = FrameFusion(keep=0.5, similarity=-0.9)
    with vlmfast.patch(vlm.model, method) as handle, torch.no_grad():
        logits = vlm.model(**inputs).logits[0, -1]
        kept, merging = handle.report().kept[0], handle.report().images[0].merged
    (one,) = encode_videos(vlm, inputs)
    columns = (inputs["input_ids"][0] == vlm.model.config.video_token_id).nonzero().flatten()
    given = one, caught["hidden"][0, columns], torch.arange(len(one)), method, 3, len(one), torch.ones(len(one))
    ((layer, tokens, states),) = fusion_in_loops(*given)
    assert layer == 1 and tokens == kept.tolist() and merging
    hidden = caught["hidden"].clone()
    hidden[0, columns[kept]] = states.to(hidden.dtype)
    stays = torch.ones(hidden.shape[1], dtype=torch.bool)
    stays[columns] = False
    stays[columns[kept]] = True
    cos, sin = caught["kwargs"]["position_embeddings"]
    call = {**caught["kwargs"], "position_embeddings": (cos[..., stays, :], sin[..., stays, :])}
    call |= {"attention_mask": None, "past_key_values": None, "position_ids": None}
    hidden = hidden[:, stays]
    with torch.no_grad():
        for block in decoder.layers[1:]:
            hidden = block(hidden, **call)
        expected = vlm.model.lm_head(decoder.norm(hidden))[0, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# --- both --------------------------------------------------------------------------------------------------------


METHODS = [EVS(keep=0.5), VidCom2(keep=0.5), VidCom2(keep=0.5, parity="official")]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_constant_and_empty_videos_give_distinct_tokens(method):
    for features in (torch.ones(24, 8), torch.zeros(24, 8), torch.ones(24, 8, dtype=torch.bfloat16)):
        kept = method.choose(video(4, 2, 3, features=features)).kept.tolist()
        assert kept == sorted(set(kept)) and len(kept) == 12


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_images_and_single_frames_stay_whole(method):
    image = video(1, 3, 4)
    crops = VisualTokens(
        image.features,
        (1, 1, 12),
        6,
        views=tuple(View(torch.arange(6) + 6 * i, (2, 3), "crop", (0, i)) for i in range(2)),
    )
    single = VisualTokens(image.features, (1, 3, 4), 12, views=(View(torch.arange(12), (3, 4), "frame"),))
    for one in (image, crops, single):
        assert method.choose(one).kept.tolist() == list(range(12))
        assert type(method)(keep=500).choose(one).kept.tolist() == list(range(12)), "a budget for videos"


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_newlines_do_not_count(method):
    plain, lined = video(3, 2, 4, seed=2), pooled(3, 2, 4, seed=2)
    assert torch.equal(method.choose(plain).kept, method.choose(lined).kept)


@pytest.mark.parametrize("method", [EVS, VidCom2])
def test_budgets_that_do_not_fit(method):
    with pytest.raises(ValueError, match="has only 24"):
        method(keep=25).choose(video(4, 2, 3))
    with pytest.raises(ValueError, match=r"float in \(0, 1\]"):
        method(keep=0.0)


def test_vidcom2_settings():
    with pytest.raises(ValueError, match="choose 'repaired' or 'official'"):
        VidCom2(parity="theirs")


def test_what_evs_costs_is_what_it_keeps():
    for keep in (0.1, 0.5, 20, 1.0):
        one = video(4, 2, 3)
        about = Picture(patches=(4, 4, 6), tokens=24, span=24, frames=4)
        assert EVS(keep=keep).visual_per_layer(about, 3) == [len(EVS(keep=keep).choose(one).kept)] * 3
    assert EVS(keep=0.1).kept_of(Picture(patches=(1, 4, 6), tokens=6, span=6)) == 6


def test_evs_says_when_the_first_frame_is_more_than_the_budget():
    (vlm,) = lend("qwen2_5_vl")
    for keep, said in ((0.2, True), (0.9, False)):
        with vlmfast.patch(vlm.model, EVS(keep=keep)) as handle:
            vlm.model(**vlm.prompts([[3, "A", 2]]))
            notes = handle.report().notes
        assert (f"evs: the first frame stays whole, which is more than keep={keep} in 1 video(s)" in notes) == said


def test_families_without_videos_are_refused():
    (llava,) = lend("llava")
    for name in ("evs", "vidcom2", "framefusion"):
        assert {family for family in FAMILIES if works(name, family)} <= set(VIDEO_FAMILIES)
        assert name == "framefusion" or all(works(name, family) for family in VIDEO_FAMILIES)
        with pytest.raises(
            NotImplementedError, match="does not work on llava: it prunes videos, the family takes images"
        ):
            vlmfast.patch(llava.model, name)


# --- every family with videos ------------------------------------------------------------------------------------


ROWS = [[3, "A", 2, "a", 1], [2, "b", 1, "B", 6], [4]]


@pytest.fixture(params=VIDEO_FAMILIES)
def filmed(request):
    """Every family with videos in turn."""
    yield from lend(request.param)


def on_families(*specs):
    """Parametrize a test by methods and the families with videos that each works on."""
    families = [family for family in VIDEO_FAMILIES if not family.endswith("_moe")]  # experts see one token at a time
    found = [(family, spec) for spec in specs for family in families if works(spec, family)]
    return pytest.mark.parametrize(("filmed", "spec"), found, indirect=["filmed"])


def works(spec, family):
    return support(spec.partition(":")[0], family).reason is None


def encode_videos(vlm, inputs, methods=()):
    """The VisualTokens of the videos among the inputs."""
    return encode_modality(vlm, inputs, methods, "video")


def encode_modality(vlm, inputs, methods, modality):
    source = family_of(vlm.model).sources[modality]
    names = list(inspect.signature(getattr(vlm.model.model, source.encode)).parameters)
    others = {name: inputs[name] for name in names[1:] if name in inputs}
    return encode_images(vlm.model, methods, modality=modality, **{names[0]: inputs[source.pixels]}, **others)


def generate(vlm, inputs, **how):
    tokens = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False, **how)
    return tokens[:, inputs["input_ids"].shape[1] :]


def test_layout_of_a_video(filmed):
    """Frames of one size that hold every visual token once, in order of time, and the placeholders they came from."""
    inputs = filmed.prompts([[3, "A", 2]])
    (one,) = encode_videos(filmed, inputs)
    index = frame_index(one.views)
    assert sorted(index.flatten().tolist()) == list(range(len(one)))
    assert index.equal(index.sort(dim=0).values), "later frames come later"
    assert all(view.grid[0] * view.grid[1] == len(view) for view in one.views)
    assert [view.cell for view in one.views] == [(i, 0) for i in range(len(index))]
    places = (inputs["input_ids"] == filmed.model.config.video_token_id).sum()
    assert one.span == int(places)
    assert one.spread(one.features).shape[0] == one.span


@on_families("vidcom2:keep=0.4", "vidcom2:keep=0.4,positions=compact", "framefusion:keep=0.4,similarity=0.2")
def test_videos_beside_images_in_a_padded_batch(filmed, spec):
    together = filmed.prompts(ROWS)
    with vlmfast.patch(filmed.model, spec) as handle, torch.no_grad():
        logits = filmed.model(**together).logits[:, -1]
        report = handle.report()
        for row in range(len(ROWS)):
            alone = filmed.model(**filmed.prompts(ROWS, only=row)).logits[0, -1]
            torch.testing.assert_close(alone, logits[row], rtol=1e-3, atol=1e-3)
    for picture in report.images:
        n = sum(len(view) for view in picture.views)
        assert len(picture.indices) == (round(0.4 * n) if is_video(picture.views) else n)
    assert [is_video(picture.views) for picture in report.images] == [True, False, False, True]
    assert f"{spec.partition(':')[0]}: prunes videos; 2 still picture(s) kept whole" in report.notes
    assert " video(s) and " in str(report)


@on_families("vidcom2:keep=0.4,positions=original", "framefusion:keep=0.4,similarity=0.2,positions=compact")
def test_decoding_of_videos_beside_images_in_a_padded_batch(filmed, spec):
    together = filmed.prompts(ROWS)
    with vlmfast.patch(filmed.model, spec):
        greedy, beams = generate(filmed, together), generate(filmed, together, num_beams=2)
        assert torch.equal(generate(filmed, together, cache_implementation="static"), greedy)
        alone = filmed.prompts(ROWS, only=1)
        assert torch.equal(generate(filmed, alone)[0], greedy[1])
        assert torch.equal(generate(filmed, alone, num_beams=2)[0], beams[1])


@on_families("evs:keep=1.0", "random:keep=1.0", "framefusion:keep=1.0")
def test_keeping_whole_videos_is_the_identity_and_unpatching_restores(filmed, spec):
    inputs = filmed.prompts(ROWS)
    logits, tokens = filmed.model(**inputs).logits, generate(filmed, inputs)
    with vlmfast.patch(filmed.model, spec):
        assert torch.equal(filmed.model(**inputs).logits, logits)
        assert torch.equal(generate(filmed, inputs), tokens)
    with vlmfast.patch(filmed.model, spec.replace("1.0", "0.5")):
        pruned = filmed.model(**inputs).logits
        assert pruned.shape != logits.shape or not torch.allclose(pruned[:2], logits[:2], atol=1e-4)
    assert torch.equal(filmed.model(**inputs).logits, logits)
    assert torch.equal(generate(filmed, inputs), tokens)


@pytest.mark.parametrize("filmed", KEYED, indirect=True)
@pytest.mark.parametrize("spec", ["evs:keep=0.7", "vidcom2:keep=0.4"])
def test_dropping_of_frames_equals_masking(filmed, spec):
    """A pruned run gives the logits of the full run in which nobody may attend to what was dropped."""
    inputs = filmed.prompts([[3, "A", 2, "a", 4, "B", 3]])
    with vlmfast.patch(filmed.model, spec, positions="original") as handle:
        pruned = filmed.model(**inputs).logits[0]
        kept = [one.indices for one in handle.report().images if is_video(one.views)]
    videos = encode_videos(filmed, inputs)
    stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    places = (inputs["input_ids"][0] == filmed.model.config.video_token_id).nonzero().flatten()
    for one, indices in zip(videos, kept, strict=True):
        mine, places = places[: one.span], places[one.span :]
        assert len(indices) < len(one)
        stays[mine] = False
        stays[mine[indices if one.slots is None else one.slots[indices]]] = True
    masked = {**inputs, "attention_mask": stays.long()[None], "position_ids": torch.arange(len(stays))[None]}
    if family_of(filmed.model).mrope:
        names = inspect.signature(filmed.model.model.get_rope_index).parameters
        given = {name: inputs[name] for name in names if name in inputs and name != "attention_mask"}
        masked["position_ids"], _ = filmed.model.model.get_rope_index(**given)
    full = filmed.model(**masked).logits[0]
    torch.testing.assert_close(pruned, full[stays], rtol=1e-3, atol=1e-3)


def test_videos_encoded_once(filmed):
    """encode_images and encoder_outputs for videos, for images beside them, and for several methods at once."""
    inputs = filmed.prompts([[3, "A", 2, "a", 4]])
    methods = (EVS(keep=0.7), VidCom2(keep=0.5), HiPrune(keep=0.5))
    videos = encode_videos(filmed, inputs, methods)
    images = encode_modality(filmed, inputs, methods, "image")
    sources = family_of(filmed.model).sources
    pixels = {source.pixels for source in sources.values()}
    rest = {name: value for name, value in inputs.items() if name not in pixels}
    for method in methods:
        with vlmfast.patch(filmed.model, method):
            outputs = {**encoder_outputs(images), **encoder_outputs(videos, "video")}
            given = filmed.model(**rest, mm_encoder_outputs=outputs).logits
            torch.testing.assert_close(given, filmed.model(**inputs).logits, rtol=1e-4, atol=1e-4)
            with pytest.raises(ValueError, match="not both"):
                filmed.model(**inputs, mm_encoder_outputs=encoder_outputs(videos, "video"))


def test_before_and_inside_the_language_model():
    """What frames are left of a video is what merges inside."""
    (vlm,) = lend("qwen2_vl")
    inputs = vlm.prompts([[3, "A", 2]])
    (one,) = encode_videos(vlm, inputs)
    with vlmfast.patch(vlm.model, "evs:keep=0.7+framefusion:keep=0.5,similarity=-0.9") as handle:
        vlm.model(**inputs)
        (picture,), held = handle.report().images, handle.report().per_layer
    left = round(0.7 * len(one))
    assert list(held) == [left, round(0.5 * left), round(0.5 * left)]
    assert picture.merged and set(picture.indices.tolist()) <= set(EVS(keep=0.7).choose(one).kept.tolist())


def test_newlines_stay_in_the_official_form_of_vidcom2():
    (vlm,) = lend("llava_onevision")
    inputs = vlm.prompts([[3, "A", 2]])
    for parity, newlines in (("official", 1), ("repaired", 0)):
        with vlmfast.patch(vlm.model, VidCom2(keep=0.5, parity=parity)) as handle:
            vlm.model(**inputs)
            (picture,) = handle.report().images
        assert picture.kept == len(picture.indices) + newlines


def per_frame(vlm, method, inputs):
    """A video, what the method keeps of it, frame by frame (indices inside the frame), and the even shares."""
    (one,) = encode_videos(vlm, inputs, [method])
    wanted = method.wanted(family_of(vlm.model).tower(vlm.model.config))
    with vlmfast.patch(vlm.model, method) as handle:
        vlm.model(**inputs)
        kept = set(handle.report().kept[0].tolist())
    inside = [[j for j, token in enumerate(view.index.tolist()) if token in kept] for view in one.views]
    assert sum(map(len, inside)) == len(kept)
    scores = {name: one.statistics[score] for name, score in wanted.items()}
    return one, inside, scores


@pytest.mark.parametrize("keep", [0.5, 7])
def test_fastervlm_goes_frame_by_frame(filmed, keep):
    has_cls = family_of(filmed.model).tower(filmed.model.config).has_cls
    method = FasterVLM(keep=keep, fallback=None if has_cls else "received")
    one, inside, scores = per_frame(filmed, method, filmed.prompts([[3, "A", 2]]))
    k = keep if isinstance(keep, int) else round(keep * len(one))
    shares = apportion(k, [len(view) for view in one.views])
    assert max(shares) - min(shares) <= 1 and sum(shares) == k, "frames of one size have even shares"
    for view, mine, share in zip(one.views, inside, shares):
        values = [float(scores["attention"][token]) for token in view.index.tolist()]
        assert mine == sorted(sorted(range(len(values)), key=lambda j: (-values[j], j))[:share])


def test_hiprune_goes_frame_by_frame(filmed):
    method = HiPrune(keep=0.5, alpha=0.5)
    one, inside, scores = per_frame(filmed, method, filmed.prompts([[3, "A", 2]]))
    shares = apportion(round(0.5 * len(one)), [len(view) for view in one.views])
    for view, mine, share in zip(one.views, inside, shares):
        objects, deep = ([float(scores[name][token]) for token in view.index.tolist()] for name in ("objects", "deep"))
        assert mine == hiprune_in_loops(objects, deep, share, 0.5, view.grid)


def hiprune_in_loops(objects, deep, k, alpha, grid):
    """Anchors, their neighbours inside the frame, registers: one frame in plain loops."""
    rows, columns = grid
    by_object = sorted(range(len(objects)), key=lambda j: (-objects[j], j))
    anchors = by_object[: round(k * alpha / 5)]
    chosen = set(anchors)
    for anchor in anchors:
        y, x = divmod(anchor, columns)
        around = [(y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)]
        chosen |= {r * columns + c for r, c in around if 0 <= r < rows and 0 <= c < columns}
    if len(chosen) > k:
        outer = [j for j in by_object if j in chosen and j not in anchors]
        chosen = set([*anchors, *outer][:k])
    registers = sorted((j for j in range(len(deep)) if j not in chosen), key=lambda j: (-deep[j], j))
    return sorted([*chosen, *registers[: k - len(chosen)]])
