"""VAR against full maps in plain loops, its sinks, its two names for a number, and what it says of itself."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from attention_oracle import full_maps
from conftest import CORE, crossed
from test_sinks import BOS, MASSIVE, with_sinks
from torch.utils.flop_counter import FlopCounterMode

import vlmfast
from vlmfast.adapters import from_spec
from vlmfast.adapters.attention.var import NOTHING, VAR
from vlmfast.decoders import Sizes, decoder
from vlmfast.edits import Call
from vlmfast.families import family_of

ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]
DIMS = (3, 5, 17, 30)
STRICT = {"layers": "1:", "dims": "3/5/17/30", "tau": 1.8, "rho": 0.3, "summ": 0.35}


class Oracle:
    """VAR in plain loops, one row of one head at a time; keeps the sinks of each layer's prompt as a cache does."""

    def __init__(self, model, inputs, *, first=1, dims=DIMS, tau=1.8, rho=0.3, summ=0.35, p=0.6):
        self.first, self.dims, self.tau, self.rho, self.summ, self.p = first, dims, tau, rho, summ, p
        config, ids = model.config, inputs["input_ids"]
        tokens = {getattr(config, source.token) for source in family_of(model).sources.values()}
        self.real = inputs["attention_mask"].bool()
        self.visual = torch.tensor([[int(one) in tokens for one in row] for row in ids])
        self.sinks: dict[int, list[list[bool]]] = {}
        self.held: dict[int, int] = {}
        self.edited = self.asked = 0
        self.seen: list[tuple[float, float]] = []  # what each row asked about pays: image, share of its sinks

    def is_sink(self, x, real):
        root = float((x.double() ** 2).mean() + 1e-6) ** 0.5
        return bool(real) and max(abs(float(x[d])) / root for d in self.dims) > self.tau

    @torch.no_grad()
    def __call__(self, layer, shown, hidden):
        if layer < self.first:
            return shown
        batch, heads, count, n_key = shown.shape
        prompt = count > 1
        if prompt:
            self.held[layer] = count
            self.sinks[layer] = [
                [self.is_sink(hidden[b, i], self.real[b, i]) for i in range(count)] for b in range(batch)
            ]
        else:
            self.held[layer] += 1
        behind = self.held[layer] - n_key  # what a sliding window has forgotten
        shown = shown.clone()
        for b in range(batch):
            width = self.visual.shape[1]
            image = {j - behind for j in range(behind, width) if self.visual[b, j]}
            sinks = {j - behind for j in range(behind, width) if self.sinks[layer][b][j]}
            for i in range(count):
                if prompt and (self.visual[b, i] or not self.real[b, i]):
                    continue
                before = {j for j in image & sinks if not prompt or j <= i}
                if not before:
                    continue
                for h in range(heads):
                    self.edited += self.edit(shown[b, h, i], image, sinks)
                    self.asked += 1
        return shown

    def edit(self, row, image, sinks):
        """One row, in place. -> whether it was selected"""
        looks = sum(float(row[j]) for j in image)
        share = sum(float(row[j]) for j in image & sinks) / (looks + 1e-6 * len(image))
        self.seen.append((looks, share))
        if not (share <= self.rho and looks >= self.summ):
            return False
        freed, others = sum(float(row[j]) for j in sinks), sum(float(row[j]) for j in image - sinks)
        for j in sinks:
            row[j] *= self.p
        for j in image - sinks:
            row[j] += (1 - self.p) * freed * row[j] / others
        return True


def steps(model, inputs, **how):
    """Logits of a prompt's last token and of generated ones, [B, T, V], and the tokens."""
    found = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True, **how
    )
    return torch.stack(found.logits, dim=1), found.sequences


def between(values, share):
    """A threshold that lies well between two of the values."""
    values = sorted(values)
    place = int(share * len(values))
    return round((values[place] + values[place + 1]) / 2, 6)


def test_equals_full_maps(any_vlm):
    """Prefill and decoding; the thresholds are such that some rows are edited and some are not."""
    model, inputs = any_vlm.model, any_vlm.prompts(ROWS)
    first = Oracle(model, inputs, p=1)
    with full_maps(model, first):
        model(**inputs)
    looks, shares = zip(*first.seen)
    limits = {"summ": between(looks, 0.2), "rho": between(shares, 0.7)}
    oracle = Oracle(model, inputs, **limits)
    plain = model(**inputs).logits
    with full_maps(model, oracle):
        prefill = model(**inputs).logits
        assert 0.1 * oracle.asked < oracle.edited < 0.9 * oracle.asked
        expected, tokens = steps(model, inputs)
    real = inputs["attention_mask"].bool()
    assert (prefill - plain)[:2, -1].abs().max() > 5e-3
    with vlmfast.patch(model, VAR(**(STRICT | limits))):
        torch.testing.assert_close(model(**inputs).logits[real], prefill[real], rtol=1e-4, atol=2e-4)
        found, ours = steps(model, inputs)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


CACHES = [{}, {"cache_implementation": "static"}, {"use_cache": False}]


@pytest.mark.parametrize(("vlm", "both"), crossed(CORE, list(itertools.product([0.0, 0.9], CACHES))), indirect=["vlm"])
def test_any_cache_and_p(vlm, both):
    p, how = both
    model, inputs = vlm.model, vlm.prompts(ROWS)
    with full_maps(model, Oracle(model, inputs, p=p)):
        expected, tokens = steps(model, inputs)
    with vlmfast.patch(model, VAR(**STRICT, p=p)):
        found, ours = steps(model, inputs, **how)
    if how.get("use_cache", True):
        assert torch.equal(ours, tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    else:  # every token comes with a prompt of its own
        torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=1e-4, atol=2e-4)


def massive(fresh, name):
    return with_sinks(fresh(name)), {"layers": "1:", "tau": 3.8, "rho": 0.6, "summ": 0.1}


def prompts(vlm, rows=ROWS, **how):
    """Prompts whose first token is the one with massive activations."""
    inputs = vlm.prompts(rows, **how)
    for row, column in enumerate(inputs["attention_mask"].argmax(1).tolist()):
        inputs["input_ids"][row, column] = BOS
    return inputs


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_real_sinks_are_found_and_edited(fresh, name):
    """Massive activations made by weights: the dimensions that nobody names are the ones put there."""
    vlm, settings = massive(fresh, name)
    model, inputs = vlm.model, prompts(vlm)
    limits = {key: settings[key] for key in ("tau", "rho", "summ")}
    oracle = Oracle(model, inputs, dims=MASSIVE, **limits)
    with full_maps(model, oracle):
        expected, tokens = steps(model, inputs)
    assert 0 < oracle.edited < oracle.asked
    for layer, rows in oracle.sinks.items():
        sinks = torch.tensor(rows)
        for kind in (oracle.visual, oracle.real & ~oracle.visual):
            assert (sinks & kind)[:2].any(1).all(), f"layer {layer} has sinks of both kinds"
        assert not sinks[oracle.visual].all()
    for more in ({}, {"dims": "3/17"}):
        with vlmfast.patch(model, VAR(**settings, **more)) as handle:
            found, ours = steps(model, inputs)
            notes = handle.report().notes
        assert torch.equal(ours, tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
        how = "given or listed" if more else "found at the first token"
        assert f"var: sinks by dimensions 3/17, {how}" in notes and not any("nothing" in note for note in notes)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_rows_of_a_batch_have_their_own_sinks(fresh, name):
    vlm, settings = massive(fresh, name)
    inputs = prompts(vlm)
    inputs["input_ids"][1][inputs["attention_mask"][1].argmax()] = 5  # no massive first token here: nothing to go by
    plain = steps(vlm.model, inputs)[0]
    with vlmfast.patch(vlm.model, VAR(**settings)):
        found = steps(vlm.model, inputs)[0]
        alone = steps(vlm.model, prompts(vlm, only=0))[0]
    torch.testing.assert_close(found[0], alone[0], rtol=1e-3, atol=1e-3)
    assert (found[0] - plain[0]).abs().max() > 1e-2
    assert torch.equal(found[1:], plain[1:]), "no sinks, and no picture: bit for bit"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_chunks_of_a_prompt(fresh, name):
    """Sinks of earlier chunks are known, as are the dimensions found at the first token."""
    vlm, settings = massive(fresh, name)
    inputs = prompts(vlm, [[3, "a", 4, "b", 5]])
    with vlmfast.patch(vlm.model, VAR(**settings, p=0)):
        whole, tokens = steps(vlm.model, inputs)
        parts, ours = steps(vlm.model, inputs, prefill_chunk_size=6)
    assert torch.equal(tokens, ours)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=2e-4)
    assert (whole - steps(vlm.model, inputs)[0]).abs().max() > 5e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched(VAR):
    """Keeps its calls."""

    calls: Any = dataclasses.field(default=None, compare=False)

    def edit(self, call):
        found = super().edit(call)
        self.calls.append((call, self.classes(call)))
        return found


def test_generated_tokens_are_no_sinks(vlm):
    """Not even in a conversation that goes on, where new prompts bring new sinks."""
    calls: list[tuple[Call, Any]] = []
    inputs = vlm.prompts([[3, "a", 4]])
    width = inputs["input_ids"].shape[1]
    with vlmfast.patch(vlm.model, Watched(calls=calls, layers="1", dims=3, tau=0)):
        out = vlm.model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        held = out.past_key_values.get_seq_length()
        ids = torch.cat([out.sequences[:, :held], torch.tensor([[7, 8, 9, 10]])], dim=1)
        vlm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=out.past_key_values,
            max_new_tokens=2,
            do_sample=False,
        )
    visual = inputs["input_ids"] == vlm.model.config.image_token_id
    assert held == width + 3
    for call, (text, image, others) in calls:
        count = call.key.shape[2]
        expected = torch.zeros(1, count, dtype=torch.bool)
        expected[:, :width] = True
        if count > held:
            expected[:, held : held + 4] = True
        assert torch.equal((text | image)[:, 0], expected), "whatever came as a prompt is above a threshold of 0"
        assert torch.equal(image[0, 0, :width], visual[0]) and not others.any()
    assert [call.prompt for call, _ in calls] == [True, False, False, False, True, False]


def test_one_prompt_leaves_nothing_for_the_next(vlm):
    inputs, other = vlm.prompts(ROWS), vlm.prompts([[5, "c", 3]], seed=4)
    with vlmfast.patch(vlm.model, VAR(**STRICT)):
        first = steps(vlm.model, other)[0]
        steps(vlm.model, inputs)
        assert torch.equal(steps(vlm.model, other)[0], first)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "no sink dimensions found"),
        ({"dims": "3/17"}, "no token is a sink"),  # phi is at most sqrt(32)
        ({"dims": "8", "tau": 4}, "no visual token is a sink"),
    ],
)
def test_without_sinks_nothing_happens_and_the_report_says_so(fresh, settings, reason):
    vlm = fresh("llava")
    with torch.no_grad():
        vlm.model.get_input_embeddings().weight[BOS, 8] = 4000
    inputs = prompts(vlm) if "dims" in settings and "tau" in settings else vlm.prompts(ROWS)
    plain = steps(vlm.model, inputs)
    with vlmfast.patch(vlm.model, VAR(layers="1:", **settings)) as handle:
        assert not any("nothing" in note for note in handle.report().notes), "no prompt yet"
        found = steps(vlm.model, inputs)
        assert f"var: {reason}; nothing was redistributed" in handle.report().notes
        assert sum("nothing" in note for note in handle.report().notes) == 1
        vlm.model(**vlm.prompts([[4]]))
        assert not any("nothing" in note for note in handle.report().notes), "and none with a picture"
    assert all(torch.equal(ours, before) for ours, before in zip(found, plain))


def test_the_report_sums_up_the_layers(fresh):
    """Massive in one layer alone: that the others have nothing is no news. Without it, what came furthest is."""
    vlm, settings = massive(fresh, "llava")
    with torch.no_grad():  # layer 0 adds what it lacks itself
        vlm.model.get_input_embeddings().weight[BOS, list(MASSIVE)] = 0
        vlm.model.model.multi_modal_projector.linear_2.weight[list(MASSIVE)] = 0
        vlm.model.model.language_model.layers[0].mlp.down_proj.weight[list(MASSIVE)] *= 1000
    inputs = prompts(vlm)
    for layers, expected in (("0", None), ("1", "sinks"), ("all", "sinks")):
        with vlmfast.patch(vlm.model, VAR(**(settings | {"layers": layers}))) as handle:
            vlm.model(**inputs)
            (note,) = [note for note in handle.report().notes if "sink" in note]
        assert note.startswith("var: sinks by dimensions 3/17" if expected else "var: no sink dimensions found;")
    first, second, third = (f"var: {reason}" for reason in NOTHING)
    assert VAR().remarks([first, third, second]) == [third] and VAR().remarks([first]) == [first]
    assert VAR().remarks([]) == [] and VAR().remarks([first, "var: more"]) == ["var: more"]


def test_only_text_behind_a_visual_sink_changes(vlm):
    """Bit for bit, in the first layer whose attention is edited."""
    calls: list[tuple[Call, Any]] = []
    inputs = vlm.prompts([[3, "a", 2, "b", 4], [4]])
    one = Watched(calls=calls, **STRICT)
    with vlmfast.patch(vlm.model, one):
        vlm.model(**inputs)
    call, (_, image, _) = calls[0]
    edited, plain = one.edit(dataclasses.replace(call, memory={})), call.plain()
    changed = (edited != plain).any(3).any(1)
    behind = image[:, 0].cumsum(1) > 0
    text = call.real & ~call.visual
    assert changed.any() and not (changed & ~(behind & text)).any()


def test_factors():
    """Rows keep their sum; rows that pay nothing to other visual tokens stay, even where rho admits them."""
    masses = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.6, 0.0], [0.3, 0.5, 0.1], [0.1, 0.05, 0.1], [0.5, 0.0, 0.2]])
    masses = masses[None, None]
    n = torch.tensor([10])
    factors = VAR().factors(masses, n)
    assert (factors != 1).any(-1).tolist() == [[[True, False, False, False, True]]]
    torch.testing.assert_close((factors * masses).sum(-1), masses.sum(-1))
    assert factors[0, 0, 0].tolist() == pytest.approx([0.6, 0.6, 1 + 0.4 * 0.3 / 0.3])
    factors = VAR(rho=1, summ=0).factors(masses, n)
    assert factors.isfinite().all() and (factors != 1).any(-1).tolist() == [[[True, False, True, True, True]]]
    least = torch.tensor([[0.0, 0.1, 0.3]])[None, None]
    assert (VAR(summ=0.41).factors(least, n) == 1).all() and (VAR(summ=0.39).factors(least, n) != 1).any()
    assert (VAR(rho=0.24).factors(least, n) == 1).all() and (VAR(rho=0.26).factors(least, n) != 1).any()
    # A millionth for each visual token, which is what the code divides by.
    assert (VAR(rho=0.24).factors(least, torch.tensor([20_000])) != 1).any()


def test_both_names():
    assert VAR(budget=0.25).kept == VAR(p=0.75).kept == 0.75 and VAR().kept == 0.6
    assert VAR(rho_paper=0.75).limit == VAR(rho=0.25).limit == 0.25 and VAR().limit == 0.5
    (one,) = from_spec("var:budget=0.5,rho_paper=0.8,dims=1415/2533,layers=3/10:12")
    assert (one.kept, one.limit, one.dims) == (0.5, pytest.approx(0.2), "1415/2533")
    for settings in ({"p": 0.6, "budget": 0.4}, {"rho": 0.5, "rho_paper": 0.5}):
        with pytest.raises(ValueError, match="give one of them"):
            VAR(**settings)


def test_layers():
    assert list(VAR().where(range(32), 32)) == list(range(2, 31))
    assert list(VAR(parity="official").where(range(32), 32)) == list(range(2, 32))
    assert list(VAR(parity="official", layers="5:7").where(range(32), 32)) == [5, 6]


def test_dimensions_of_a_known_model(vlm, monkeypatch):
    """They go to the door, and not into the spec."""
    text = vlm.model.config.get_text_config()
    listed = vlmfast.sinks.Known((3, 5, 17, 30), "here", (text.model_type,), text.hidden_size, 3, 48)
    monkeypatch.setattr(vlmfast.sinks, "KNOWN", (listed,))
    inputs = vlm.prompts(ROWS)
    settings = {key: value for key, value in STRICT.items() if key != "dims"}
    with vlmfast.patch(vlm.model, VAR(**STRICT)):
        expected = vlm.model(**inputs).logits
    with vlmfast.patch(vlm.model, VAR(**settings)) as handle:
        assert torch.equal(vlm.model(**inputs).logits, expected)
        assert "dims" not in handle.spec


@pytest.mark.parametrize("settings", [{"p": 1}, {"budget": 0}])
def test_neutral_installs_nothing(vlm, settings):
    inputs = vlm.prompts(ROWS)
    plain = vlm.model(**inputs).logits
    with vlmfast.patch(vlm.model, VAR(layers="1:", **settings)):
        assert not vlm.model.model.get_decoder().layers[1]._forward_pre_hooks
        assert torch.equal(vlm.model(**inputs).logits, plain)


def test_composed_with_pruning(vlm):
    """Sinks stay with their tokens when layers lose tokens."""
    calls: list[tuple[Call, Any]] = []
    inputs = vlm.prompts(ROWS)
    with vlmfast.patch(vlm.model, "random:keep=0.5+fastv:keep=0.5", Watched(calls=calls, **STRICT)):
        steps(vlm.model, inputs)
    sinks: dict[int, list[float]] = {}
    for call, (text, image, _) in calls:
        found = (text | image)[:, 0]
        keys = [[call.key[b, :, j].sum().item() for j in found[b].nonzero().flatten().tolist()] for b in range(3)]
        if call.prompt:
            sinks[call.layer] = keys
            phi = [[Oracle.is_sink(ORACLE, x, real) for x, real in zip(*row)] for row in zip(call.hidden, call.real)]
            assert found.tolist() == phi and found.any()
        else:
            assert keys == sinks[call.layer], "the same tokens, by their keys"


ORACLE = Oracle.__new__(Oracle)
ORACLE.dims, ORACLE.tau = DIMS, 1.8


def test_what_it_multiplies(fresh):
    """The count of the products that run, and the method's own answer."""
    vlm = fresh("llava")
    vlm.model.set_attn_implementation("eager")
    inputs = vlm.prompts([["a", 7]])
    sizes = Sizes(decoder=decoder(vlm.model.config), tower=None, vision=None, projects=True)
    picture = dataclasses.make_dataclass("Picture", ["span"])(inputs["input_ids"].shape[1] - 7)

    def count():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            vlm.model(**inputs, logits_to_keep=1)
        return counter.get_total_flops()

    plain = count()
    for layers in ("all", "1"):
        method = VAR(**(STRICT | {"layers": layers, "tau": 1.5}))
        with vlmfast.patch(vlm.model, method):
            assert count() - plain == method.selection_flops(picture, 7, sizes) > 0
    assert VAR(layers="all", p=1).selection_flops(picture, 7, sizes) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(fresh, dtype):
    """Squares of massive activations fit no half precision: phi is made in fp32."""
    vlm, settings = massive(fresh, "llava")
    inputs = prompts(vlm)
    calls: list[tuple[Call, Any]] = []
    exact: list[tuple[Call, Any]] = []
    model = copy.deepcopy(vlm.model).to(dtype)
    with vlmfast.patch(vlm.model, Watched(calls=exact, **settings)):
        vlm.model(**inputs)
    with vlmfast.patch(model, Watched(calls=calls, **settings)) as handle:
        half = {key: one.to(dtype) if one.is_floating_point() else one for key, one in inputs.items()}
        assert model(**half).logits[:, -1].isfinite().all()
        assert any("sinks by dimensions 3/17" in note for note in handle.report().notes)
    for (_, ours), (_, theirs) in zip(calls, exact):
        for one, other in zip(ours, theirs):
            assert (one != other).sum() <= 2, "but for tokens at the very threshold"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"p": 1.5}, "p=1.5"),
        ({"p": True}, "p=True"),
        ({"budget": "half"}, "budget='half'"),
        ({"rho": -0.1}, "rho=-0.1"),
        ({"rho_paper": 2}, "rho_paper=2"),
        ({"summ": None}, "summ=None"),
        ({"tau": -1}, "tau=-1"),
        ({"tau": float("nan")}, "tau=nan"),
        ({"dims": "3,4"}, "joined by slashes"),
        ({"dims": "-1"}, "joined by slashes"),
        ({"dims": ""}, "joined by slashes"),
        ({"parity": "exact"}, "parity='exact'"),
        ({"layers": "x"}, "layers='x'"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        VAR(**settings)


def test_what_a_decoder_does_not_have(vlm):
    with pytest.raises(ValueError, match="dimensions 0 to 31"):
        vlmfast.patch(vlm.model, VAR(layers="1:", dims="3/32"))
    with pytest.raises(ValueError, match="none of this decoder's 3"):
        vlmfast.patch(vlm.model, VAR())
