"""OPERA against plain loops and against transformers' beam search, and the search that carries it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from typing import Any

import opera_oracle as oracle
import pytest
import torch
from attention_oracle import full_maps
from conftest import CORE, TINY, build, crossed, lend
from tables import TableWalker
from test_promises import shortened, snapshot
from test_promises_attention import strong
from tiny import make
from tiny_others import TINY as OTHERS
from tiny_others import build_gemma3
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import vlmfast
from vlmfast import walking
from vlmfast.adapters import from_spec
from vlmfast.adapters.decoding.opera import MOST, OPERA, Memory, OfficialEnded, mode
from vlmfast.search import Ended, Look, Moment, Tally, _reject, search

ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]
SOME = ("llava",)
RESTLESS = {"sigma": 20.0, "threshold": 1, "candidates": 3}  # goes back on tiny models
EVERYTHING = OPERA(alpha=0, threshold=10, candidates=97)  # all tokens are candidates, none is penalised


@pytest.fixture(params=[name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in TINY])
def some_vlm(request):
    """Every family in turn, most of them only with -m slow."""
    yield from lend(request.param)


def beams(model, inputs, count=3, length=6, **how):
    return model.generate(**inputs, num_beams=count, max_new_tokens=length, do_sample=False, **how)


# --- the equation ---------------------------------------------------------------------------------------------------


def asking(vlm, inputs):
    """`ask` of the oracle: one row of an unpatched model, no cache, full maps."""
    model = vlm.model
    last = max(n for n, one in enumerate(model.model.get_decoder().layers) if hasattr(one, "self_attn"))
    width = inputs["input_ids"].shape[1]
    family = vlmfast.families.family_of(model)
    tokens_of = [int(getattr(model.config, source.token)) for source in family.sources.values()]
    visual = sum(inputs["input_ids"][0] == token for token in tokens_of) > 0

    @functools.cache
    def ask(tokens):
        maps: dict[int, torch.Tensor] = {}

        def note(layer, shown, hidden):
            maps[layer] = shown
            return shown

        more = torch.tensor([tokens], dtype=torch.long)
        given = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], dim=1)}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in given:
                given[name] = torch.cat([given[name], torch.zeros_like(more)], dim=1)
        with full_maps(model, note), torch.no_grad():
            logits = model(**given).logits[0, -1]
        row = maps[last][0, :, -1].amax(0).double()
        row = row / row.sum()
        return logits.double().tolist(), row[width:].tolist(), float(row[:width][visual].sum())

    return ask


@pytest.mark.parametrize(("vlm", "settings"), crossed(CORE, [RESTLESS, {"candidates": 4}]), indirect=["vlm"])
def test_a_search_equals_plain_loops(vlm, settings):
    inputs = vlm.prompts([[3, "a", 2]])
    ask = asking(vlm, inputs)
    forbidden = vlm.model.generation_config.suppress_tokens
    found, backs = oracle.opera(ask, beams=3, length=26, forbidden=forbidden, **settings)
    assert bool(backs) == (settings is RESTLESS)
    with vlmfast.patch(vlm.model, OPERA(**settings)) as handle:
        output = beams(vlm.model, inputs, length=26, num_return_sequences=3, return_dict_in_generate=True)
        assert f"{len(backs)} times back" in str(handle.report())
    for row, (score, tokens) in enumerate(found):
        assert output.sequences[row, inputs["input_ids"].shape[1] :].tolist() == list(tokens)
        assert output.sequences_scores[row].item() == pytest.approx(score, abs=2e-4)
    plain = beams(vlm.model, inputs, length=26)
    assert not torch.equal(plain[0], output.sequences[0]), "the method changes what is said"


def test_a_search_behind_a_pruner_equals_plain_loops():
    """On the unpatched model, whose prompt was cut by hand."""
    vlm, spec, settings = build("llava"), "fastervlm:keep=6", "sigma=20.0,threshold=1,candidates=3"
    inputs = vlm.prompts([[3, "b", 2]])
    with vlmfast.patch(vlm.model, spec, positions="compact") as handle:
        vlm.model(**inputs)
        (kept,) = handle.report().kept
    short = shortened(vlm, inputs, kept)
    del short["position_ids"]  # counted from 0
    forbidden = vlm.model.generation_config.suppress_tokens
    expected, backs = oracle.opera(asking(vlm, short), beams=3, length=22, forbidden=forbidden, **RESTLESS)
    with vlmfast.patch(vlm.model, f"{spec}+opera:{settings}", positions="compact") as handle:
        found = beams(vlm.model, inputs, length=22, num_return_sequences=3)
        assert f"{len(backs)} times back" in str(handle.report()) and backs
    assert len(kept) == 6 and found[:, -22:].tolist() == [list(tokens) for _, tokens in expected]


def tables(seed: int, size: int = 12, start: int = 8, length: int = 40) -> TableWalker:
    """A scripted model whose attention is drawn to one generated token, and later to one before it."""
    draw = torch.Generator().manual_seed(seed)
    span = start + length
    base = torch.randn(4, span, span, generator=draw)
    early = start + 11 + seed % 4
    late = early + 5 + seed % 3
    base[:, :, late] += 3.0
    base[:, late + 5 + seed % 3 :, early] += 5.5
    more = 0.5 * torch.randn(size, 4, span, generator=draw)
    logits = 1.5 * torch.randn(span, size, size, generator=draw)
    prompt = torch.randint(0, size, (1, start), generator=draw)
    return TableWalker(logits, base, more, prompt, range(1, 5))


def asking_tables(walker):
    @functools.cache
    def ask(tokens):
        state = torch.tensor([tokens], dtype=torch.long)
        logits = walker._behind(state)[0]
        if not tokens:
            return logits.double().tolist(), [], 0.0
        _, _, look = walker.step(state[:, :-1], torch.tensor([0]), state[:, -1])
        return logits.double().tolist(), look.generated[0].double().tolist(), float(look.visual[0])

    return ask


def ends(walker, count, length, tokens=(), **settings):
    end = torch.tensor(tokens) if tokens else None
    start = walker.prompt.shape[1]

    def stops(ids):
        over = torch.full((len(ids),), ids.shape[1] >= start + length)
        return over if end is None else over | torch.isin(ids[:, -1], end)

    return Ended(beams=count, prompt=walker.prompt, stops=stops, room=length, ends=end, **settings)


@pytest.mark.parametrize("end", [(), (5,), (5, 7)])
def test_searches_on_tables_equal_plain_loops(end):
    """Also where sequences end on the way, before and behind the place that the search comes back to."""
    backs = 0
    for seed in range(4):
        walker = tables(seed)
        walker.logits[:, :, list(end)] -= 1.0
        settings: dict[str, Any] = {"candidates": 3, "sigma": 12.0, "threshold": 2}
        expected, places = oracle.opera(
            asking_tables(walker), beams=3, length=30, ends=end, length_penalty=2.0, **settings
        )
        tally = Tally()
        ended = ends(walker, 3, 30, end, length_penalty=2.0)
        found = search(walker, OPERA(**settings), ended, lambda ids, scores: scores, tally)
        assert [tuple(one.tokens.tolist()) for one in found] == [tokens for _, tokens in expected]
        torch.testing.assert_close(
            torch.tensor([one.score for one in found]), torch.tensor([score for score, _ in expected])
        )
        assert tally.backs == len(places)
        backs += len(places)
    assert backs > 9, "something must go back, to more than one place"


def test_no_more_than_one_forward_a_token_and_two_to_go_back(vlm):
    inputs = vlm.prompts([[3, "a", 2]])
    rows: list[int] = []
    layer = vlm.model.model.get_decoder().layers[0]
    with vlmfast.patch(vlm.model, OPERA(**RESTLESS)) as handle:
        hook = layer.register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape[:2])))
        beams(vlm.model, inputs, length=26)
        hook.remove()
        tally = next(one.tally for one in handle.reporters if hasattr(one, "tally"))
    assert tally.backs > 0
    assert rows[0] == (1, inputs["input_ids"].shape[1]), "one prefill, of one row"
    assert len(rows) - 1 == tally.calls == tally.steps + 2 * tally.backs
    assert rows.count((9, 1)) == tally.steps, "all candidates of all beams in one batch"
    short = [tokens for _, tokens in rows[1:]]
    assert max(short) < 20, "no prompt again"


def test_logarithms_equal_products():
    draw = torch.Generator().manual_seed(0)
    shown = torch.rand(2, 30, 30, generator=draw).tril() / 10
    method = OPERA(sigma=30.0)
    memory = Memory(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.long))
    for row in range(30):
        judged = method.judge(memory, Look(shown[:, None, row, : row + 1], torch.zeros(2, 1)))
        memory = method.keep(judged, torch.arange(2), torch.zeros(2, dtype=torch.long))
        for beam in range(2):
            scaled = 30.0 * shown[beam].double()
            products = [1e-7 * float(scaled[j : row + 1, j].prod()) for j in range(row + 1)]
            assert judged.places[beam, 0] == products.index(max(products))
            if row >= 10:
                assert judged.penalty[beam, 0].item() == pytest.approx(min(max(products), MOST), rel=1e-3)


def test_penalties_beyond_half_precision_stay_in_order():
    """65504 and more, and below 6e-8, where the official code has infinity and zero."""
    strong = Look(torch.tensor([[[0.9] * 11, [0.8] * 11]]), torch.zeros(1, 2))
    window = torch.full((1, 10), 10 * math.log(1e3 * 0.9))
    judged = OPERA(sigma=1e3).judge(Memory(window, torch.zeros(1, 10).long()), strong)
    assert judged.penalty.tolist() == [[MOST, MOST]] and judged.penalty.isfinite().all()
    weak = Look(torch.tensor([[[1e-4] * 10 + [2e-4], [3e-4] + [1e-4] * 10]]), torch.zeros(1, 2))
    judged = OPERA(sigma=1.0).judge(Memory(torch.zeros(1, 10), torch.zeros(1, 10).long()), weak)
    assert judged.places.tolist() == [[10, 0]] and (judged.penalty > 0).all()
    official = OPERA(sigma=1.0, parity="official")
    known = Memory(torch.ones(1, 10, 10).tril(), torch.zeros(1, 10).long())
    assert official.judge(known, weak).penalty.tolist() == [[0, 0]]


def test_mode_takes_the_smallest_of_several():
    assert mode(torch.tensor([[3, 1, 1, 3], [2, 2, 9, 2], [4, 3, 2, 1]])).tolist() == [1, 2, 1]


def test_records_go_with_the_beams():
    """And stay at their number in the official form."""
    for parity, expected in (("repaired", [[7], [4], [4]]), ("official", [[4], [5], [7]])):
        method = OPERA(candidates=2, parity=parity)
        window = torch.zeros(3, 0, 0) if method.official else torch.zeros(3, 0)
        judged = method.judge(
            Memory(window, torch.tensor([[4], [5], [7]])), Look(torch.ones(3, 2, 1), torch.ones(3, 2))
        )
        kept = method.keep(judged, torch.tensor([2, 0, 0]), torch.tensor([0, 1, 0]))
        assert kept.places[:, :1].tolist() == expected
        assert (
            method.follow(judged.memory, torch.tensor([2, 0, 0]), Look(torch.ones(3, 1), torch.ones(3)))
            .places[:, :1]
            .tolist()
            == expected
        )


def test_where_to_go_back():
    method = OPERA(threshold=2, candidates=2)
    alive = torch.ones(3, dtype=torch.bool)

    def back(places, alive=alive, spent=None):
        judged = method.judge(
            Memory(torch.zeros(3, 0), torch.zeros(3, 0).long()), Look(torch.ones(3, 2, 1), alive * 0.0)
        )
        seen = torch.tensor(places)
        return method.back(
            judged.__class__(judged.penalty, judged.places, Memory(judged.grown, seen), 0), alive, spent
        )

    agreed = [[12, 12, 12]] * 3
    spent: dict[int, int] = {}
    assert [back(agreed, spent=spent) for _ in range(5)] == [13, 13, 12, 12, None], "each place as often as candidates"
    assert back([[12, 12, 12], [12, 3, 12], [12, 12, 12]], spent={}) is None, "more than threshold in every beam"
    assert back([[9, 9, 9]] * 3, spent={}) is None, "none of the first ten"
    assert back([[10, 10, 10]] * 3, spent={}) == 11
    dead = torch.tensor([True, False, True])
    assert back([[12, 12, 12], [1, 1, 1], [12, 12, 12]], dead, {}) == 13, "beams that are none do not count"


def test_what_is_not_chosen_again():
    """Everything chosen at a place before; what was at places behind it is forgotten, officially at the next alone."""
    nothing = torch.zeros(2, 0)
    now = Moment(nothing, nothing, nothing, None, None, chosen=(torch.tensor([0, 1]), torch.tensor([3, 4])))
    logits = torch.arange(12.0).view(2, 6)
    known = {4: torch.tensor([0]), 5: torch.tensor([1]), 6: torch.tensor([2]), 9: torch.tensor([5])}
    for official, left in ((False, {4, 5}), (True, {4, 5, 9})):
        rejected = dict(known)
        allowed = _reject(official, now, logits, 5, 11, rejected)
        assert set(rejected) == left and rejected[5].tolist() == [1, 3, 10]
        gone = allowed == (-999.0 if official else -torch.inf)
        assert gone.flatten().nonzero().flatten().tolist() == ([0, 1, 3, 6, 10] if official else [1, 3, 10])
        again = _reject(official, now, logits, 5, 11, rejected)
        assert torch.equal(again, allowed), "twice is as good as once"


def test_the_official_loop_keeps_what_ended_after_its_first_return():
    """Sequences that ended behind the place stay known there from the second time on; repaired: they do not."""
    known: dict[str, list[int]] = {}
    for parity in ("official", "repaired"):
        counts: list[int] = []
        for seed in range(6):
            walker = tables(seed)
            method = OPERA(candidates=3, sigma=12.0, threshold=2, parity=parity)
            one = OfficialEnded(beams=3, prompt=walker.prompt, stops=lambda ids: ids[:, 0] < 0, room=34)
            one = OfficialEnded(**{**vars(one), "ends": torch.tensor([5])})
            starts: dict[int, list[int]] = {}

            class Noting(OfficialEnded):
                def take(self, best, tokens, lineage, starts=starts):
                    starts.setdefault(tokens.shape[1], []).append(len(self.found))
                    return super().take(best, tokens, lineage)

            search(walker, method, Noting(**vars(one)), lambda ids, scores: scores)
            counts += [max(seen) - min(seen) for seen in starts.values() if len(seen) > 2]
        known[parity] = counts
    assert max(known["official"]) > 0 and known["repaired"]


# --- beam search ----------------------------------------------------------------------------------------------------


def test_the_loop_is_transformers_beam_search(any_vlm):
    """With every token a candidate and no penalty; on a batch with padding."""
    inputs = any_vlm.prompts(ROWS)
    plain = beams(any_vlm.model, inputs, 3, 6)
    with vlmfast.patch(any_vlm.model, EVERYTHING):
        assert torch.equal(beams(any_vlm.model, inputs, 3, 6), plain)


PENALTIES = list(itertools.product([1.0, 0.0, -1.0, 2.0], [False, True, "never"]))


@pytest.mark.parametrize(
    ("vlm", "end", "penalty"), crossed(CORE, [[20], list(range(3, 40, 3))], PENALTIES), indirect=["vlm"]
)
def test_sequences_end_as_in_transformers(vlm, end, penalty):
    length_penalty, early_stopping = penalty
    inputs = vlm.prompts(ROWS)
    how = {
        "eos_token_id": end,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    plain = beams(vlm.model, inputs, 3, 9, **how)
    with vlmfast.patch(vlm.model, EVERYTHING):
        ours = beams(vlm.model, inputs, 3, 9, **how)
    assert torch.equal(ours.sequences, plain.sequences)
    torch.testing.assert_close(ours.sequences_scores, plain.sequences_scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.beam_indices, plain.beam_indices)


class After(StoppingCriteria):
    """Ends what has a token of some kind."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, input_ids, scores, **kwargs):
        return ((input_ids[:, self.start :] % 7) == 3).any(1)


def test_processors_criteria_and_lengths(vlm):
    inputs = vlm.prompts(ROWS)
    start = inputs["input_ids"].shape[1]
    for how in (
        {"stopping_criteria": StoppingCriteriaList([After(start)])},
        {"no_repeat_ngram_size": 1, "repetition_penalty": 1.3},
        {"eos_token_id": list(range(3, 60)), "min_new_tokens": 3},
        {"max_length": start + 4, "max_new_tokens": None},
        {"prefill_chunk_size": 5},
    ):
        if "prefill_chunk_size" in how:
            inputs = vlm.prompts([[3, "a", 4]])
        given = {"num_beams": 3, "do_sample": False, "max_new_tokens": 7, **how}
        plain = vlm.model.generate(**inputs, **given)
        with vlmfast.patch(vlm.model, EVERYTHING):
            assert torch.equal(vlm.model.generate(**inputs, **given), plain), how
        with vlmfast.patch(vlm.model, OPERA()):
            assert vlm.model.generate(**inputs, **given).shape[1] <= start + 7


def test_candidates_that_are_forbidden_make_room(vlm):
    """A beam always has something to say: the likeliest tokens of those that are allowed."""
    inputs = vlm.prompts(ROWS)
    start = inputs["input_ids"].shape[1]
    allowed = [11, 47]
    banned = [token for token in range(97) if token not in allowed]
    with vlmfast.patch(vlm.model, OPERA(candidates=2)):
        tokens = beams(vlm.model, inputs, 2, 5, suppress_tokens=banned)[:, start:]
    assert torch.isin(tokens, torch.tensor(allowed)).all()


# --- models ---------------------------------------------------------------------------------------------------------


def test_rows_are_as_if_alone(some_vlm):
    inputs = some_vlm.prompts(ROWS)
    with vlmfast.patch(some_vlm.model, OPERA(**RESTLESS)):
        tokens = beams(some_vlm.model, inputs, 3, 16)[:, -16:]
        for row in range(3):
            alone = beams(some_vlm.model, some_vlm.prompts(ROWS, only=row), 3, 16)
            assert torch.equal(alone[0, -16:], tokens[row])


def test_going_back_restores_logits_and_attention(any_vlm, monkeypatch):
    """What a model says and looks at after going back, twice, is what it was on the way; also behind a window."""
    checked: list[int] = []

    def walk(walker, guide, ended, process, tally):
        draw = torch.Generator().manual_seed(3)
        state, logits = walker.begin(3)
        seen = [(state.tokens, logits, None)]
        for _ in range(12):
            rows, tokens = torch.randint(0, 3, (3,), generator=draw), torch.randint(3, 80, (3,), generator=draw)
            state, logits, look = walker.step(state, rows, tokens)
            seen.append((state.tokens, logits, look))
        for count in (9, 4, 11, 1):
            tokens, logits, _ = seen[count]
            state, again = walker.back(state, tokens)
            torch.testing.assert_close(again, logits, rtol=1e-3, atol=1e-3)
            further = seen[count + 1]
            rows = [next(r for r in range(3) if torch.equal(tokens[r], line[:-1])) for line in further[0]]
            state, again, look = walker.step(state, torch.tensor(rows), further[0][:, -1])
            torch.testing.assert_close(again, further[1], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(look.generated, further[2].generated, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(look.visual, further[2].visual, rtol=1e-3, atol=1e-4)
            checked.append(count)
            state, _ = walker.back(state, seen[12][0])
        return search(walker, guide, ended, process, tally)

    monkeypatch.setattr(walking, "search", walk)
    with vlmfast.patch(any_vlm.model, OPERA()):
        beams(any_vlm.model, any_vlm.prompts(ROWS), 3, 3)
    assert checked == [9, 4, 11, 1] * 3


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}])
def test_behind_a_window_that_has_moved_on(monkeypatch, how):
    """The last layer sees twelve tokens: the picture and the first answers leave its sight."""
    vlm, plain = (
        make("gemma3", dataclasses.replace(OTHERS["gemma3"], build=lambda: build_gemma3(window=12))) for _ in range(2)
    )
    asked = [asking(plain, plain.prompts(ROWS, only=row)) for row in range(3)]
    shown: list[float] = []

    def walk(walker, guide, ended, process, tally):
        draw = torch.Generator().manual_seed(3)
        state, _ = walker.begin(2)
        seen = {}
        for count in range(1, 17):
            tokens = torch.randint(3, 80, (2,), generator=draw)
            state, logits, look = walker.step(state, torch.tensor([1, 0]), tokens)
            seen[count] = state.tokens, logits, look
            if count == 16:
                state, again = walker.back(state, seen[14][0])
                torch.testing.assert_close(again, seen[14][1], rtol=1e-3, atol=1e-3)
                rows = [next(r for r in range(2) if torch.equal(seen[14][0][r], line[:14])) for line in seen[15][0]]
                _, again, look = walker.step(state, torch.tensor(rows), seen[15][0][:, -1])
                torch.testing.assert_close(again, seen[15][1], rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(look.generated, seen[15][2].generated, rtol=1e-3, atol=1e-4)
            for row in range(2 if count in (1, 9, 16) else 0):
                _, generated, visual = asked[walker.row](tuple(seen[count][0][row].tolist()))
                assert seen[count][2].generated[row].tolist() == pytest.approx(generated, rel=1e-3, abs=1e-5)
                assert seen[count][2].visual[row].item() == pytest.approx(visual, rel=1e-3, abs=1e-5)
                shown.append(generated[0])
        return search(walker, guide, ended, process, tally)

    monkeypatch.setattr(walking, "search", walk)
    with vlmfast.patch(vlm.model, OPERA()):
        beams(vlm.model, vlm.prompts(ROWS), 2, 17, **how)
    assert shown[0] > 0 and shown[5] == 0 == shown[11], "the first answer has left, too"


def looks(vlm, inputs, monkeypatch, spec):
    """The looks of every step of a search."""
    found: list[Look] = []
    step = walking.ModelWalker.step

    def noting(self, state, rows, tokens):
        result = step(self, state, rows, tokens)
        found.append(result[2])
        return result

    monkeypatch.setattr(walking.ModelWalker, "step", noting)
    with vlmfast.patch(vlm.model, spec):
        tokens = beams(vlm.model, inputs, 2, 5)
    monkeypatch.undo()
    return tokens, found


class Other(DynamicCache):
    """A cache that nothing is known of."""


def test_any_cache(some_vlm, monkeypatch):
    """A static cache shows and says what a growing one does."""
    inputs = some_vlm.prompts(ROWS)
    with vlmfast.patch(some_vlm.model, OPERA(**RESTLESS)):
        grown = beams(some_vlm.model, inputs, 3, 14)
        static = beams(some_vlm.model, inputs, 3, 14, cache_implementation="static")
        assert torch.equal(static, grown)
        with pytest.raises(NotImplementedError, match="a search on a Other"):
            beams(some_vlm.model, inputs, 3, 3, past_key_values=Other(config=some_vlm.model.config.get_text_config()))


def test_a_conversation(fresh, monkeypatch):
    """The second question on the cache of the first, which holds the prompt and nothing of the beams."""
    vlm = fresh("llava")
    inputs = vlm.prompts([[3, "a", 4]])
    settings = OPERA(**RESTLESS)
    with vlmfast.patch(vlm.model, settings):
        first = beams(vlm.model, inputs, 2, 4, return_dict_in_generate=True)
        cache = first.past_key_values
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        further = beams(vlm.model, whole, 2, 14, past_key_values=cache)
        assert torch.equal(further, beams(vlm.model, inputs | whole, 2, 14))


@pytest.mark.parametrize("how", [{}, {"num_beams": None}])
def test_settings_may_come_in_a_config(vlm, how):
    """And an ending in words: `generate` has no tokenizer for a loop that is not its own."""
    words = {f"w{number}": number for number in range(96)} | {"abcdef": 96}  # what transformers looks for
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))
    inputs = vlm.prompts([[3, "a", 2]])
    start = inputs["input_ids"].shape[1]
    with vlmfast.patch(vlm.model, "opera"):
        said = beams(vlm.model, inputs, 3, 8)[0, start:].tolist()
        word = tokenizer.decode([said[4]])
        config = GenerationConfig(
            max_new_tokens=8, stop_strings=[word], num_beams=3, pad_token_id=0, suppress_tokens=[90, 91]
        )
        if how:
            config.num_beams = None
            with pytest.raises(ValueError, match="num_beams=5"):
                vlm.model.generate(**inputs, generation_config=config, tokenizer=tokenizer)
            return
        short = vlm.model.generate(**inputs, generation_config=config, tokenizer=tokenizer)[0, start:].tolist()
    assert word in tokenizer.decode(short[-1:]) and len(short) <= 8
    assert config.num_beams == 3 and config.stop_strings == [word]


PRUNERS = ["fastervlm:keep=4,fallback=received", "fastv:keep=0.5,layer=2", "random:keep=0.6+fastv:layer=1"]


@pytest.mark.parametrize(("vlm", "others"), crossed(CORE, PRUNERS), indirect=["vlm"])
def test_with_pruning(vlm, others, monkeypatch):
    """Pictures are what is left of them: rows as if alone, also after going back, and their share of attention."""
    inputs = vlm.prompts(ROWS)
    spec = "opera:sigma=20.0,threshold=1,candidates=3+" + others
    with vlmfast.patch(vlm.model, spec) as handle:
        tokens = beams(vlm.model, inputs, 3, 20)[:, -20:]
        for row in range(3):
            alone = beams(vlm.model, vlm.prompts(ROWS, only=row), 3, 20)
            assert torch.equal(alone[0, -20:], tokens[row])
        beams(vlm.model, inputs, 3, 20)
        assert handle.report().share < 1
    whole, full = looks(vlm, inputs, monkeypatch, "opera")
    _, less = looks(vlm, inputs, monkeypatch, "opera+" + others)
    assert 0 < less[0].visual.mean() < full[0].visual.mean()
    assert full[-1].visual.max() == 0, "the last prompt has no picture"
    with vlmfast.patch(vlm.model, others):
        plain = beams(vlm.model, inputs, 3, 6)
    with vlmfast.patch(vlm.model, "opera:alpha=0,threshold=9,candidates=97+" + others):
        assert torch.equal(beams(vlm.model, inputs, 3, 6), plain)


@pytest.mark.parametrize(("vlm", "other"), crossed(CORE, ["zerotuning", "var", "act", "vhr"]), indirect=["vlm"])
def test_with_edited_attention(vlm, other):
    """Another method may edit the layer that is looked at, and remember of each prompt what it needs."""
    inputs, spec = vlm.prompts(ROWS), strong(other, vlm.name)
    with vlmfast.patch(vlm.model, spec):
        plain = beams(vlm.model, inputs, 3, 6)
    with vlmfast.patch(vlm.model, spec + "+opera:alpha=0,threshold=9,candidates=97"):
        assert torch.equal(beams(vlm.model, inputs, 3, 6), plain)
    with vlmfast.patch(vlm.model, "opera:sigma=20.0,threshold=1,candidates=3+" + spec):
        tokens = beams(vlm.model, inputs, 3, 20)[:, -20:]
        for row in range(3):
            assert torch.equal(beams(vlm.model, vlm.prompts(ROWS, only=row), 3, 20)[0, -20:], tokens[row])


def test_what_is_looked_at_equals_full_maps(some_vlm, monkeypatch):
    """The share of the picture and of generated tokens, in a padded batch, from the unpatched model's own maps."""
    if some_vlm.name == "paligemma":  # without a cache its prompt sees what was generated
        return
    inputs = some_vlm.prompts(ROWS)
    _, seen = looks(some_vlm, inputs, monkeypatch, "opera:candidates=2")
    for row, first in ((0, 0), (1, len(seen) // 3)):
        alone = some_vlm.prompts(ROWS, only=row)
        ask = asking(some_vlm, alone)
        logits = torch.tensor(ask(())[0])
        logits[some_vlm.model.generation_config.suppress_tokens] = -torch.inf
        for place, token in enumerate(logits.topk(2).indices.tolist()):
            _, generated, visual = ask((token,))
            assert seen[first].generated[place].tolist() == pytest.approx(generated, rel=1e-3, abs=1e-5)
            assert seen[first].visual[place].item() == pytest.approx(visual, rel=1e-3, abs=1e-5)


def test_calls_of_the_model_are_its_own(vlm):
    inputs = vlm.prompts(ROWS)
    plain, before = vlm.model(**inputs).logits, snapshot(vlm.model)
    searched = beams(vlm.model, inputs)
    with vlmfast.patch(vlm.model, "opera"):
        assert torch.equal(vlm.model(**inputs).logits, plain)
        twin = copy.deepcopy(vlm.model)
        ours = beams(vlm.model, inputs, 3, 12)
        assert torch.equal(beams(twin, inputs, 3, 12), ours)
        vlmfast.unpatch(twin)
        assert torch.equal(beams(twin, inputs), searched)
    assert snapshot(vlm.model) == before
    assert torch.equal(beams(vlm.model, inputs), searched)


def test_bf16(fresh):
    half = fresh("llava")
    half.model.to(torch.bfloat16)
    inputs = half.prompts(ROWS)
    with vlmfast.patch(half.model, OPERA(**RESTLESS)):
        assert beams(half.model, inputs, 3, 14).shape[1] == inputs["input_ids"].shape[1] + 14


def test_official_on_a_model(vlm):
    """One prompt; the first tokens, which no bug touches, are the repaired form's."""
    inputs = vlm.prompts([[3, "a", 2]])
    start = inputs["input_ids"].shape[1]
    with vlmfast.patch(vlm.model, "opera:parity=official"):
        official = beams(vlm.model, inputs, 3, 14, suppress_tokens=None)
        assert official.shape[1] == start + 14
        with pytest.raises(ValueError, match="one prompt"):
            beams(vlm.model, vlm.prompts(ROWS))
        with pytest.raises(NotImplementedError, match="stopping_criteria"):
            beams(vlm.model, inputs, stopping_criteria=StoppingCriteriaList([After(start)]))
    with vlmfast.patch(vlm.model, "opera"):
        repaired = beams(vlm.model, inputs, 3, 14, suppress_tokens=None)
    assert torch.equal(official[:, : start + 5], repaired[:, : start + 5])


# --- settings and refusals ------------------------------------------------------------------------------------------


def test_neutral_settings_install_nothing(vlm):
    for settings in ({"threshold": math.inf}, {"threshold": 10**9}):
        with vlmfast.patch(vlm.model, OPERA(alpha=0, **settings)):
            assert "generate" not in vlm.model.__dict__
            assert vlm.model.generate(**vlm.prompts(ROWS), max_new_tokens=2, do_sample=False) is not None
    assert from_spec("opera:alpha=0,threshold=inf") == (OPERA(alpha=0, threshold=math.inf),)


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"num_beams": 1}, ValueError, "num_beams=5"),
        ({"num_beams": 1, "do_sample": True}, ValueError, "num_beams=5"),
        ({"do_sample": True}, ValueError, "do_sample=False"),
        ({"num_return_sequences": 4}, ValueError, "num_return_sequences"),
        ({"use_cache": False}, ValueError, "use_cache"),
        ({"streamer": TextStreamer(None)}, ValueError, "streamer"),
        ({"custom_generate": print}, NotImplementedError, "custom_generate"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, NotImplementedError, "beam search"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [3]}, NotImplementedError, "prefix_allowed_tokens_fn"),
        ({"output_attentions": True, "return_dict_in_generate": True}, NotImplementedError, "output_attentions"),
    ],
)
def test_what_the_search_cannot_do_is_refused(vlm, how, error, says):
    inputs = vlm.prompts([[3, "a", 2]])
    with vlmfast.patch(vlm.model, "opera"), pytest.raises(error, match=says):
        vlm.model.generate(**inputs, **{"num_beams": 3, "max_new_tokens": 2, "do_sample": False, **how})


def test_a_second_method_that_decodes_is_refused(vlm):
    before = snapshot(vlm.model)
    with pytest.raises(NotImplementedError, match="opera and dola|dola and opera"):
        vlmfast.patch(vlm.model, "opera+dola")
    assert snapshot(vlm.model) == before


@pytest.mark.parametrize(
    "spec",
    ["alpha=-1", "alpha=nan", "sigma=0", "threshold=-1", "threshold=many", "candidates=0", "candidates=2.5"]
    + ["parity=official,candidates=1", "parity=paper"],
)
def test_bad_settings(spec):
    with pytest.raises(ValueError, match=spec.split(",")[-1].split("=")[0]):
        from_spec(f"opera:{spec}")


def test_one_candidate_is_the_fast_variant(vlm):
    """Each beam goes on with its likeliest token; the first step makes them different."""
    inputs = vlm.prompts([[3, "a", 2]])
    with vlmfast.patch(vlm.model, OPERA(candidates=1, threshold=25)):
        tokens = beams(vlm.model, inputs, 3, 6, num_return_sequences=3)[:, -6:]
    assert len(set(tokens[:, 0].tolist())) == 3
    for row in tokens:
        ids = torch.cat([inputs["input_ids"], row[None, :1]], dim=1)
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in given:
                given[name] = torch.nn.functional.pad(given[name], (0, 1))
        greedy = vlm.model.generate(**given, max_new_tokens=5, do_sample=False)[0, -5:]
        assert torch.equal(row[1:], greedy)
