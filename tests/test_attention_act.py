"""ACT: sinks found and calibrated as in plain loops over full maps: in prompts, chunks, batches, while generating."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_oracle import full_maps
from conftest import CORE, crossed
from test_edits import maps, masks
from torch import Tensor

import vlmfast
from vlmfast.adapters import from_spec, to_spec
from vlmfast.adapters.attention.act import ACT
from vlmfast.decoders import decoder
from vlmfast.edits import Call
from vlmfast.edits.engine import column_sums, corrected, redistribute

ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]


# --- the oracle ------------------------------------------------------------------------------------------------


def sinks_of(shown: Tensor, real: Tensor, bar: float, spared: int | None) -> list[int]:
    """The sinks of one head's map [Q, K]. real: bool [K]; spared: the initial token; None: the first sink."""
    found = []
    rows = real[-shown.shape[0] :]
    for j in real.nonzero().flatten().tolist():
        column = shown[rows, j]
        if float(column.sum()) / max(1, int((column > 0).sum())) > bar:
            found.append(j)
    return found[1:] if spared is None else [j for j in found if j != spared]


def calibrated(row: Tensor, sinks: list[int], beta: float) -> Tensor:
    """One row [K]."""
    row = row.double()
    mass = float(row[sinks].sum())
    new = row.clone()
    new[sinks] = 0
    rest = float(new.sum())
    if rest == 0:
        return row.float()
    new *= 1 + (1 - beta) * mass / rest
    new[sinks] = beta * row[sinks]
    return new.float()


def oracle(inputs: dict[str, Tensor], method: ACT, depth: int = 3):
    """The edit of full maps: a prompt's sinks, row by row, and the same sinks in every row generated."""
    real = inputs["attention_mask"].bool()
    first = real.long().argmax(1)
    layers = method.where(range(depth), depth)
    known: dict[tuple[int, int, int], list[int]] = {}

    def edit(layer, shown, hidden):
        if layer not in layers:
            return shown
        shown = shown.clone()
        for b in range(len(shown)):
            for h in method.heads_of(layer) or range(shown.shape[1]):
                if shown.shape[2] > 1:
                    bar = method.theta if method.alpha is None else method.alpha / int(real[b].sum())
                    known[layer, b, h] = sinks_of(shown[b, h], real[b], bar, int(first[b]))
                for i in range(shown.shape[2]):
                    shown[b, h, i] = calibrated(shown[b, h, i], known[layer, b, h], method.beta)
        return shown

    edit.known = known
    return edit


def depth_of(vlm) -> int:
    return vlm.model.config.get_text_config().num_hidden_layers


@torch.no_grad()
def agrees(vlm, inputs, method, some_sinks=True):
    """Logits of the prompt, and tokens generated with the cache."""
    model, edit = vlm.model, oracle(inputs, method, depth_of(vlm))
    with full_maps(model, edit):
        expected = model(**inputs).logits[:, -1]
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert any(edit.known.values()) == some_sinks
    with vlmfast.patch(model, method):
        torch.testing.assert_close(model(**inputs).logits[:, -1], expected, rtol=1e-3, atol=3e-4)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    return edit


SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.0, "theta": 0.15},
    {"alpha": 1.5},
    {"theta": 0.0},  # every key but the initial one is a sink: rows are made explicitly
    {"heads": "0/3"},
]


@pytest.mark.parametrize(("vlm", "settings"), crossed(CORE, SETTINGS), indirect=["vlm"])
def test_equals_full_maps(vlm, settings):
    edit = agrees(vlm, vlm.prompts(ROWS), ACT(layers="1:", **settings))
    if not settings:
        kinds = {(layer, b): set() for layer, b, _ in edit.known}
        for (layer, b, _), sinks in edit.known.items():
            kinds[layer, b].add(tuple(sinks))
        assert any(len(found) > 1 for found in kinds.values()), "each head its own"


def test_on_every_family(any_vlm):
    with_attention = [n for n, one in enumerate(any_vlm.model.model.get_decoder().layers) if hasattr(one, "self_attn")]
    agrees(any_vlm, any_vlm.prompts(ROWS), ACT(layers="/".join(map(str, with_attention))))


@torch.no_grad()
def test_rows_of_padding_do_not_count(vlm):
    """On the right they see all of their prompt."""
    inputs, method = vlm.prompts(ROWS, side="right"), ACT(layers="all", theta=0.08)
    real = inputs["attention_mask"].bool()
    with full_maps(vlm.model, oracle(inputs, method)):
        expected = vlm.model(**inputs).logits[real]
    with vlmfast.patch(vlm.model, method):
        torch.testing.assert_close(vlm.model(**inputs).logits[real], expected, rtol=1e-3, atol=3e-4)


def test_nothing_above_the_threshold(vlm):
    """A model without sinks is not touched, bit for bit."""
    inputs = vlm.prompts(ROWS)
    plain = vlm.model(**inputs).logits
    with vlmfast.patch(vlm.model, ACT(layers="all", theta=1.0)):
        assert torch.equal(vlm.model(**inputs).logits, plain)


# --- what production does on the way ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched(ACT):
    """Keeps every call with what came out of it."""

    watch: Any = dataclasses.field(default=None, compare=False)

    def edit(self, call):
        edited = super().edit(call)
        sinks = call.recall("sinks")
        self.watch.append((call, edited, None if sinks is None else sinks.clone()))
        return edited


def watched(vlm, inputs, tokens=3, how=None, **settings):
    """[(call, what came out, the sinks known then)], the tokens generated."""
    found: list[tuple[Call, Tensor, Tensor | None]] = []
    with vlmfast.patch(vlm.model, Watched(watch=found, **settings)):
        out = vlm.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **(how or {}))
    return found, out


def test_heads_that_are_not_chosen_stay_bit_for_bit(vlm):
    """In the prompt and in every row generated; those chosen change in some row of both."""
    found, _ = watched(vlm, vlm.prompts(ROWS), layers="all", heads="1/2", theta=0.05)
    changed = {True: False, False: False}
    for call, edited, _ in found:
        real = call.real[:, call.start : call.start + call.query.shape[2]]
        assert torch.equal(edited[:, [0, 3]], call.plain()[:, [0, 3]])
        changed[call.prompt] |= bool((edited != call.plain())[real[:, None].expand(-1, 4, -1)].any())
    assert all(changed.values())


def test_sinks_of_the_prompt_stand_while_it_is_continued(vlm):
    """And are forgotten with it: another prompt finds its own."""
    inputs, others = vlm.prompts([[3, "a", 2]]), vlm.prompts([[2, "b", 7]], seed=5)
    width = inputs["input_ids"].shape[1]
    found, _ = watched(vlm, inputs, layers=1)
    first = found[0][2]
    assert first is not None and first.any() and len(found) == 3
    for call, _, sinks in found[1:]:
        assert torch.equal(sinks[..., :width], first) and not sinks[..., width:].any()
        assert sinks.shape[-1] == call.key.shape[2]
    with vlmfast.patch(vlm.model, method := Watched(watch=[], layers=1)):
        for given in (others, inputs):
            vlm.model.generate(**given, max_new_tokens=2, do_sample=False)
    assert torch.equal(method.watch[2][2], first), "nothing of the prompt before"


@pytest.mark.parametrize(
    ("vlm", "how"), crossed(CORE, [{"cache_implementation": "static"}, {"num_beams": 2}]), indirect=["vlm"]
)
def test_other_caches(vlm, how):
    inputs, method = vlm.prompts(ROWS), {"layers": "all", "theta": 0.05}
    settings = {"max_new_tokens": 5, "do_sample": False}
    if "num_beams" in how:
        with full_maps(vlm.model, oracle(repeated(inputs, 2), ACT(**method))):
            expected = vlm.model.generate(**inputs, **settings, **how)
    else:
        _, expected = watched(vlm, inputs, 5, **method)
    found, tokens = watched(vlm, inputs, 5, how, **method)
    assert torch.equal(tokens, expected) and any(sinks is not None for _, _, sinks in found)


def repeated(inputs: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """What the oracle needs of a batch whose rows are repeated, as beams are."""
    return {"attention_mask": inputs["attention_mask"].repeat_interleave(times, 0)}


def test_the_attention_runs_once_and_no_map_is_made(vlm, monkeypatch):
    """Where sinks are a handful: the log-sum-exp of the search for them serves the correction, too."""
    monkeypatch.setattr("vlmfast.edits.call.redistribute", lambda *args: pytest.fail("rows were made explicitly"))
    runs = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Counted(ACT):
        def edit(self, call):
            times: list[int] = []

            def own():
                times.append(1)
                return call.own()

            edited = super().edit(dataclasses.replace(call, own=own))
            runs.append((len(times), bool(call.recall("sinks") is not None)))
            return edited

    with torch.no_grad(), vlmfast.patch(vlm.model, Counted(layers="all", theta=0.15, beta=0.9)):
        vlm.model(**vlm.prompts([[3, "a", 2]]))
    assert (1, True) in runs and all(times == 1 for times, _ in runs)


def test_many_sinks_are_no_handful(vlm, monkeypatch):
    """Their shares would be larger than the queries: rows are made explicitly, with the same outcome."""
    widths = []

    def noted(out, lse, query, key, value, few, *rest):
        widths.append(few.columns.shape[-1])
        return corrected(out, lse, query, key, value, few, *rest)

    monkeypatch.setattr("vlmfast.edits.call.corrected", noted)
    inputs = vlm.prompts([[9, "a", 9]])
    shown = {}
    for theta in (0.1, 0.002):
        found = []
        with torch.no_grad(), vlmfast.patch(vlm.model, Watched(watch=found, layers="all", theta=theta, beta=0.9)):
            vlm.model(**inputs)
        shown[theta] = max(int(sinks.sum(-1).max()) for _, _, sinks in found if sinks is not None)
    width = found[0][0].query.shape[-1]
    assert shown[0.1] <= width < shown[0.002] and widths and max(widths) <= width


# --- one call ---------------------------------------------------------------------------------------------------


def call_of(scores: Tensor, rows: slice = slice(None), **known: Any) -> Call:
    """Some rows of a causal map given by its scores [B, H, N, N], as one call; its output is the edited map."""
    n = scores.shape[2]
    start, stop, _ = rows.indices(n)
    batch, heads = scores.shape[:2]
    units = torch.eye(n, dtype=scores.dtype)[None, None].expand(batch, heads, -1, -1)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    masked = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    fields: dict[str, Any] = {
        "layer": 0,
        "depth": 1,
        "start": start,
        "mask": None,
        "causal": True,
        "window": None,
        "hidden": torch.zeros(batch, stop - start, 1),
        "visual": torch.zeros(batch, stop, dtype=torch.bool),
        "real": torch.ones(batch, stop, dtype=torch.bool),
        "initial": torch.zeros(batch, dtype=torch.long),
        "prompt": True,
        "ends": torch.zeros(batch, stop - start, dtype=torch.bool),
        "note": lambda text: None,
    } | known
    key = units[:, :, :stop]
    plain = (masked[:, :, rows, :stop].softmax(-1) @ key).transpose(1, 2)
    return Call(query=masked[:, :, rows], key=key, value=key, scaling=1.0, own=lambda: plain, **fields)


EVERY = torch.ones(14, dtype=torch.bool)


def random_map(n: int = 14, sink: int | None = 5, strength: float = 2.5, seed: int = 0) -> Tensor:
    """Scores [1, 2, n, n]; the second head has a sink, and so has the first one at 0."""
    scores = torch.randn(1, 2, n, n, generator=torch.Generator().manual_seed(seed))
    scores[:, 0, :, 0] += strength
    if sink is not None:
        scores[:, 1, :, sink] += strength
    return scores


def test_the_initial_token_is_spared_whether_or_not_it_is_a_sink():
    """The official code spares whatever comes first."""
    scores = random_map()
    shown = call_of(scores).plain()[0]
    for parity, spared in (("repaired", 0), ("official", None)):
        method = ACT(theta=0.3, parity=parity)
        found, _ = method.sinks(call_of(scores))
        expected = [sinks_of(shown[h], EVERY, 0.3, spared) for h in (0, 1)]
        assert [row.nonzero().flatten().tolist() for row in found[0]] == expected
    assert expected == [[], []] and found.sum() == 0, "each head has one sink, and the official code spares it"
    repaired, _ = ACT(theta=0.3).sinks(call_of(scores))
    assert repaired[0].nonzero().tolist() == [[1, 5]]
    later = torch.tensor([5])  # padded by five: the sink is the prompt's first token
    padded, _ = ACT(theta=0.3).sinks(call_of(scores, initial=later, real=torch.arange(14)[None] >= 5))
    assert not padded[0, 1, 5]


def test_a_prompt_in_chunks():
    """Sinks of the rows so far, in each chunk; in the end those of the whole prompt."""
    scores, method, memory = random_map(seed=3), ACT(theta=0.15), {}
    whole = call_of(scores)
    expected = [sinks_of(whole.plain()[0, h], EVERY, 0.15, 0) for h in (0, 1)]
    assert sum(map(len, expected)) > 1
    for rows in (slice(0, 5), slice(5, 6), slice(6, 14)):
        call = call_of(scores, rows, memory=memory)
        edited = method.edit(call)
        known = [sinks_of(whole.plain()[0, h, : rows.stop, : rows.stop], EVERY[: rows.stop], 0.15, 0) for h in (0, 1)]
        for h in (0, 1):
            for i, row in enumerate(call.plain()[0, h]):
                torch.testing.assert_close(edited[0, h, i, : rows.stop], calibrated(row[: rows.stop], known[h], 0.4))
    assert [row.nonzero().flatten().tolist() for row in call.recall("sinks")[0]] == expected
    cut = call_of(scores, slice(6, 14), memory=memory)  # the cache was cropped to six tokens, and the rest came again
    method.edit(cut)
    assert torch.equal(memory["received"][-1][2][0, 0], torch.arange(14, 0, -1))
    assert torch.equal(cut.recall("sinks"), call.recall("sinks"))


def test_rows_that_see_nothing_but_sinks_stay():
    """Here they keep their rows; the official code divides 0 by 0."""
    scores = torch.zeros(1, 1, 6, 6)
    scores[..., 2] = 200.0  # from row 2 on everything, to the last bit
    shown = call_of(scores).plain()
    for theta in (0.5, 0.0):
        assert torch.equal(ACT(theta=theta, beta=0.5).edit(call_of(scores))[0, 0, 2:], shown[0, 0, 2:])
    scores[..., 0] = 195.0
    method = ACT(theta=0.5, beta=0.5)
    edited = method.edit(call_of(scores))
    torch.testing.assert_close(edited[0, 0, 4], calibrated(call_of(scores).plain()[0, 0, 4], [2], 0.5))
    scores[..., 0], scores[..., 1] = 0.0, 200.0
    official = ACT(theta=0.4, beta=0.5, parity="official").edit(call_of(scores))
    assert not official[0, 0, :2].isnan().any() and not official[0, 0, 3].isnan().any(), "the first one is spared"


def test_only_rows_that_need_it_are_made_explicitly(monkeypatch):
    """Where sinks hold so much that the share of the others cannot be found by subtraction."""
    explicit = []

    def noted(query, *rest):
        explicit.append(query.shape[2])
        return redistribute(query, *rest)

    monkeypatch.setattr("vlmfast.edits.call.redistribute", noted)
    scores = random_map(n=20, strength=2.0)
    scores[:, 1, 7:9, 5] += 9.0
    scores[:, 1, 15, 5] += 9.0
    for heads in (None, "1"):
        explicit.clear()
        call = call_of(scores)
        edited = ACT(theta=0.3, heads=heads).edit(call)
        for i, row in enumerate(call.plain()[0, 1]):
            torch.testing.assert_close(edited[0, 1, i], calibrated(row, [5], 0.4), rtol=1e-4, atol=1e-6)
        assert torch.equal(edited[:, 0], call.plain()[:, 0]), "a head without sinks"
        assert explicit == [3]


@pytest.mark.parametrize("form", ["none", "bool", "additive", "causal", "padded", "window"])
def test_how_many_rows_see_a_key(form):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8)
    seen = masks(2, 5, 9)[form]
    rows = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    shown = maps(query, key, 0.4, seen)
    visible = ~shown.isneginf()
    counted = seen.counts(rows, 9).expand(-1, 4, -1)
    sums, _ = column_sums(query, key, 0.4, seen, rows)
    for b in range(2):
        for h in range(4):
            for j in range(9):
                onlookers = [i for i in range(5) if rows[b, i] and visible[b, h, i, j]]
                assert int(counted[b, h, j]) == len(onlookers)
                received = sum(float(shown[b, h, i].softmax(-1)[j]) for i in onlookers)
                assert float(sums[b, h, j]) == pytest.approx(received, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Also where a sink holds so much of a row that the others' share cannot be found by subtraction."""
    for strength in (2.5, 6.0):
        scores = random_map(strength=strength).to(dtype)
        call = call_of(scores)
        exact = ACT(theta=0.2).edit(call_of(scores.float()))
        found = ACT(theta=0.2).edit(call)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.004)


# --- the official form ------------------------------------------------------------------------------------------


def test_the_official_form(vlm):
    """The first prompt of a batch alone; and a row with a cache as the code has it, which sums to more than one."""
    inputs, method = vlm.prompts([[3, "a", 2]]), ACT(layers="all", theta=0.1, parity="official")
    sums: list[float] = []

    def edit(layer, shown, hidden):
        shown = shown.clone()
        n = shown.shape[2]
        for h in range(shown.shape[1]):
            a = shown[0, h].clone()
            score = [float(a[:, j].sum()) / (n - j if n > 1 else 1) for j in range(a.shape[1])]
            sinks = [j for j, value in enumerate(score) if value > 0.1][1:]
            mass = a[:, sinks].sum(-1, keepdim=True)
            ratio = a.clone()
            for j in sinks:
                ratio[1:, j] = 0
            ratio = ratio / ratio.sum(-1, keepdim=True)
            for j in sinks:
                a[:, j] *= method.beta
            a = a + (1 - method.beta) * mass * ratio
            a[0, 0] = 1
            if n == 1:
                sums.append(float(a.sum()))
            shown[0, h] = a
        return shown

    with full_maps(vlm.model, edit):
        tokens = vlm.model.generate(**inputs, max_new_tokens=4, do_sample=False, output_logits=True, **SCORES)
    assert max(sums) > 1.2
    with vlmfast.patch(vlm.model, method):
        ours = vlm.model.generate(**inputs, max_new_tokens=4, do_sample=False, output_logits=True, **SCORES)
    for a, b in zip(ours.logits, tokens.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-4)
    batch = vlm.prompts([[3, "a", 2], [3, "b", 2]])
    plain = vlm.model(**batch).logits
    with vlmfast.patch(vlm.model, method):
        both = vlm.model(**batch).logits
    torch.testing.assert_close(both[1], plain[1], rtol=1e-4, atol=1e-5)
    assert (both[0, -1] - plain[0, -1]).abs().max() > 1e-3


SCORES: dict[str, Any] = {"return_dict_in_generate": True}


# --- settings ---------------------------------------------------------------------------------------------------


def test_settings(vlm):
    for settings, words in (
        ({"beta": 1.2}, "the share of their attention that sinks keep"),
        ({"beta": True}, "beta=True"),
        ({"theta": -0.1}, "theta=-0.1"),
        ({"theta": 5}, "0 to 1"),
        ({"alpha": "x"}, "alpha='x'"),
        ({"alpha": 5, "theta": 0.2}, "give one"),
        ({"parity": "exact"}, "choose 'repaired' or 'official'"),
    ):
        with pytest.raises(ValueError, match=words):
            ACT(**settings)
    method = ACT(alpha=5, heads="0/2", layers="1:")
    assert from_spec(to_spec((method,))) == (method,)
    assert ACT(beta=1).neutral and not ACT(beta=1, parity="official").neutral
    inputs = vlm.prompts(ROWS)
    plain = vlm.model(**inputs).logits
    with vlmfast.patch(vlm.model, "act:beta=1,layers=all"):
        assert not any(layer._forward_pre_hooks for layer in vlm.model.model.get_decoder().layers)
        assert torch.equal(vlm.model(**inputs).logits, plain)


def test_the_cost_follows_the_heads(vlm):
    """Scores of the chosen heads over all rows: [N, d] x [d, N] each."""
    config = vlm.model.config.get_text_config()
    layers, heads = decoder(vlm.model.config), config.num_attention_heads
    width = layers.layers[0].mixer.query // heads
    picture = dataclasses.make_dataclass("Picture", ["span"])(11)
    sizes = dataclasses.make_dataclass("Sizes", ["decoder"])(layers)
    one = 2 * width * (11 + 7) ** 2
    assert ACT(layers="all").selection_flops(picture, 7, sizes) == one * heads * len(layers.layers)
    assert ACT(layers="1:", heads="0/3").selection_flops(picture, 7, sizes) == 2 * one * (len(layers.layers) - 1)
