"""find_sinks: massive dimensions, sink tokens and the sink metric, against full maps in plain loops."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from attention_oracle import full_maps
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from typer.testing import CliRunner

import vlmfast
from vlmfast import __main__ as cli
from vlmfast.adapters.attention.var import VAR
from vlmfast.eval import sinks as pictures
from vlmfast.families import family_of
from vlmfast.sinks import known, massive, parsed, sizes

ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]
BOS, MASSIVE = 1, (3, 17)  # a token, and the dimensions in which it and some visual tokens are huge


def with_sinks(vlm):
    """A model with massive activations: in the embedding of BOS, and, in different measure, in visual features."""
    projector = {
        "llava": lambda model: model.model.multi_modal_projector.linear_2,
        "qwen2_5_vl": lambda model: model.model.visual.merger.mlp[2],
    }[vlm.name](vlm.model)
    with torch.no_grad():
        embedding = vlm.model.get_input_embeddings().weight
        embedding[BOS, MASSIVE[0]], embedding[BOS, MASSIVE[1]] = 4000, -3000
        projector.weight[list(MASSIVE)] *= 10
    return vlm


def prompts(vlm, rows=ROWS, **how):
    inputs = vlm.prompts(rows, **how)
    for row, column in enumerate(inputs["attention_mask"].argmax(1).tolist()):
        inputs["input_ids"][row, column] = BOS
    return inputs


# --- dimensions --------------------------------------------------------------------------------------------------


def test_massive_dimensions():
    torch.manual_seed(0)
    plain = torch.randn(5, 4096)
    assert not massive(plain).any()
    token = plain.clone()
    token[0, 7] = 900
    token[1, [7, 33]] = torch.tensor([900.0, -400.0])
    token[2, [7, 33, 90]] = torch.tensor([900.0, -400.0, 250.0])
    token[3, 7] = 50  # large, and not massive
    token[4, :9] = 900  # too many
    expected = [[7], [7, 33], [7, 33, 90], [], []]
    assert [row.nonzero().flatten().tolist() for row in massive(token)] == expected
    assert not massive(torch.zeros(3, 32)).any() and not massive(torch.ones(32)).any()


def test_sizes():
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 16) * 100
    each = torch.zeros(2, 16, dtype=torch.bool)
    each[0, [3, 9]] = True
    for dims, rows in (((3, 9), (0, 1)), (each, (0,))):
        found = sizes(hidden, dims)
        for b in rows:
            for i in range(5):
                root = float(sum(x * x for x in hidden[b, i].double()) / 16 + 1e-6) ** 0.5
                assert float(found[b, i]) == pytest.approx(max(abs(float(hidden[b, i, d])) for d in (3, 9)) / root)
    assert not sizes(hidden, each)[1].any(), "no dimensions, no sinks"
    huge = (hidden * 100).half()  # their squares fit no half precision
    torch.testing.assert_close(sizes(huge, (3, 9)), sizes(hidden, (3, 9)), rtol=1e-2, atol=0)


def test_known_models_by_their_sizes():
    def config(**text):
        shape = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32}
        return LlavaConfig(text_config=LlamaConfig(**(shape | text)), vision_config=CLIPVisionConfig())

    assert known(config()).dims == (1415, 2533)
    large = {"hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 13824, "num_attention_heads": 40}
    assert known(config(**large)).dims == (2100, 4743)
    assert known(config(num_hidden_layers=31)) is None
    assert known(config(intermediate_size=14336, vocab_size=128256)) is None, "LLaMA-3 is another model"
    assert known(config(intermediate_size=14336, vocab_size=92553)).dims == (3584,)
    for one in vlmfast.sinks.KNOWN:
        assert one.dims == parsed(one.dims, one.width) and one.source


def test_dimensions_in_words():
    assert parsed("17/3") == parsed((17, 3)) == parsed([3, 17, 3]) == (3, 17) and parsed(5) == (5,)
    for wrong in ("", "3,4", "a", -1, [], [None], True):
        with pytest.raises(ValueError, match="joined by slashes"):
            parsed(wrong)
    with pytest.raises(ValueError, match="0 to 15"):
        parsed("3/16", 16)


# --- find_sinks --------------------------------------------------------------------------------------------------


def by_hand(model, inputs, dims, tau, epsilon):
    """Sinks, shares and metric from full maps, one entry at a time."""
    maps, states = {}, {}

    def keep(layer, shown, hidden):
        maps[layer], states[layer] = shown, hidden
        return shown

    with full_maps(model, keep), torch.no_grad():
        model(**inputs)
    config = model.config
    tokens = {getattr(config, source.token) for source in family_of(model).sources.values()}
    real = inputs["attention_mask"].bool()
    visual = torch.tensor([[int(one) in tokens for one in row] for row in inputs["input_ids"]])
    batch, length = real.shape
    metric, found = torch.zeros(batch, length), {}
    for layer, shown in maps.items():
        heads = shown.shape[1]
        layer_tokens, shares = {}, torch.zeros(4)
        for b in range(batch):
            columns = [j for j in range(length) if real[b, j]]
            text = [i for i in columns if not visual[b, i]]
            rows = [i for i in text if visual[b, :i].any()] or text
            for k in columns:
                looking = [i for i in columns if float(shown[b, 0, i, k]) > 0]
                for h in range(heads):
                    alpha = sum(float(shown[b, h, i, k]) for i in looking) / max(1, len(looking))
                    metric[b, k] += float(alpha > epsilon) / heads / len(maps)
                share = sum(float(shown[b, h, i, k]) for i in rows for h in range(heads)) / len(rows) / heads
                x = states[layer][b, k].double()
                phi = max((abs(float(x[d])) for d in dims), default=0) / float((x * x).mean() + 1e-6) ** 0.5
                sink = phi > tau
                if sink:
                    layer_tokens[b, k] = ("image" if visual[b, k] else "text", phi, share)
                place = {(False, True): 0, (True, True): 1, (True, False): 2, (False, False): 3}
                shares[place[bool(visual[b, k]), sink]] += share / batch
        largest = [max(abs(float(x[d])) for row, seen in zip(states[layer], real) for x in row[seen]) for d in dims]
        found[layer] = layer_tokens, shares, largest
    return metric, found


def test_equals_full_maps(any_vlm):
    model, inputs = any_vlm.model, any_vlm.prompts(ROWS)
    sinks = vlmfast.find_sinks(model, inputs, dims="3/17", tau=1.8, epsilon=0.1)
    metric, expected = by_hand(model, inputs, (3, 17), 1.8, 0.1)
    torch.testing.assert_close(sinks.metric, metric)
    assert [one.layer for one in sinks.layers] == sorted(expected)
    assert (metric > 0).any() and (metric < 1).any()
    for one in sinks.layers:
        tokens, shares, largest = expected[one.layer]
        assert [(t.row, t.column) for t in one.tokens] == sorted(tokens)
        for token in one.tokens:
            kind, phi, share = tokens[token.row, token.column]
            assert token.kind == kind
            assert (token.size, token.share) == (pytest.approx(phi, rel=1e-4), pytest.approx(share, rel=1e-3))
        ours = (one.text_sinks, one.image_sinks, one.image, one.text)
        assert ours == pytest.approx(shares.tolist(), abs=1e-5) and sum(ours) == pytest.approx(1)
        assert list(one.largest) == pytest.approx(largest, rel=1e-4)
    assert any(one.count("image") for one in sinks.layers) and any(one.count("text") for one in sinks.layers)
    assert sinks.first == tuple(inputs["attention_mask"].argmax(1).tolist())
    assert sinks.first_metric == pytest.approx(
        sum(float(metric[row, column]) for row, column in enumerate(sinks.first)) / 3
    )


def test_leaves_the_model_as_it_was(any_vlm):
    inputs = any_vlm.prompts(ROWS)
    model = any_vlm.model
    before = {name: one.clone() for name, one in model.state_dict().items()}
    plain, attributes = model(**inputs).logits, set(model.__dict__)
    given = {name: one.clone() for name, one in inputs.items()}
    vlmfast.find_sinks(model, inputs)
    assert set(model.__dict__) == attributes and not any(
        layer._forward_pre_hooks for layer in model.model.get_decoder().layers
    )
    assert torch.equal(model(**inputs).logits, plain)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(torch.equal(one, given[name]) for name, one in inputs.items()) and set(given) == set(inputs)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_massive_activations_are_found(fresh, name):
    vlm = with_sinks(fresh(name))
    inputs = prompts(vlm)
    sinks = vlmfast.find_sinks(vlm.model, inputs, tau=3.8)
    assert sinks.dims == MASSIVE and sinks.setting == "3/17" and "enters layer 1" in sinks.source
    kinds = sinks.tokens
    assert list(kinds.values()).count("image") > 1
    assert {(row, column) for row, column in enumerate(sinks.first)} <= {
        at for at, kind in kinds.items() if kind == "text"
    }
    for one in sinks.layers:
        assert one.largest == pytest.approx((4000, 3000), rel=0.01)
    lines = str(sinks).splitlines()
    assert lines[0].startswith("sink dimensions 3/17 (found at the first token") and len(lines) == 2 + 1 + 3 + 1
    assert "|x_3|" in lines[2] and "|x_17|" in lines[2] and lines[-1].startswith("sink metric (epsilon 0.3)")
    with vlmfast.patch(vlm.model, VAR(layers="1:", tau=3.8, dims=sinks.setting)):
        pass  # what it found is what methods take
    longest = int(inputs["attention_mask"].sum(1).argmax())
    inputs["input_ids"][longest, 0] = 5  # now only prompts behind padding begin with BOS
    assert vlmfast.find_sinks(vlm.model, inputs, tau=3.8).dims == MASSIVE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nothing(vlm, side):
    inputs = vlm.prompts(ROWS, side=side)
    together = vlmfast.find_sinks(vlm.model, inputs, dims="3/17", tau=1.8, epsilon=0.1)
    assert not together.metric[~inputs["attention_mask"].bool()].any()
    for row in range(3):
        alone = vlmfast.find_sinks(vlm.model, vlm.prompts(ROWS, only=row), dims="3/17", tau=1.8, epsilon=0.1)
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(together.metric[row][real], alone.metric[0])
        shift = int(real.long().argmax())
        for ours, theirs in zip(together.layers, alone.layers):
            mine = [(t.column - shift, t.kind) for t in ours.tokens if t.row == row]
            assert mine == [(t.column, t.kind) for t in theirs.tokens]
            shares = [t.share for t in ours.tokens if t.row == row]
            assert shares == pytest.approx([t.share for t in theirs.tokens], rel=1e-3, abs=1e-5)


def test_in_blocks(vlm, monkeypatch):
    """Nothing of the size of a map is made, and the result is the same."""
    inputs = vlm.prompts(ROWS)
    whole = vlmfast.find_sinks(vlm.model, inputs, dims="3/17", tau=1.8)
    monkeypatch.setattr("vlmfast.edits.engine.ENTRIES_CPU", 1)
    parts = vlmfast.find_sinks(vlm.model, inputs, dims="3/17", tau=1.8)
    torch.testing.assert_close(whole.metric, parts.metric)
    for one, other in zip(whole.layers, parts.layers):
        assert one.image_sinks == pytest.approx(other.image_sinks, rel=1e-4)


def test_without_massive_dimensions(vlm):
    sinks = vlmfast.find_sinks(vlm.model, vlm.prompts(ROWS))
    assert sinks.dims == () and sinks.tokens == {} and sinks.setting == ""
    assert all(one.largest == () and one.image + one.text == pytest.approx(1) for one in sinks.layers)
    assert str(sinks).startswith("no sink dimensions: none stands out at the first token as it enters layer 1")


def test_bad_input(vlm):
    inputs = vlm.prompts([[3, "a", 4]])
    find = vlmfast.find_sinks
    for settings, words in (
        ({"dims": "3/32"}, "dimensions 0 to 31"),
        ({"dims": "x"}, "joined by slashes"),
        ({"tau": -1}, "tau=-1"),
        ({"tau": "much"}, "tau='much'"),
        ({"epsilon": 2}, "epsilon=2"),
    ):
        with pytest.raises(ValueError, match=words):
            find(vlm.model, inputs, **settings)
    for wrong in (inputs["input_ids"], {"pixel_values": inputs["pixel_values"]}):
        with pytest.raises(ValueError, match="with input_ids"):
            find(vlm.model, wrong)
    with vlmfast.patch(vlm.model, "zerotuning"), pytest.raises(RuntimeError, match="already patched"):
        find(vlm.model, inputs)
    with pytest.raises(TypeError, match="cannot generate"):
        find(vlm.model.model, inputs)
    with pytest.raises(AttributeError, match="no attribute 'find_sink'"):
        vlmfast.find_sink  # noqa: B018


# --- the picture and the command ---------------------------------------------------------------------------------


def colours(path):
    """Pixels of a picture, [n, 3]."""
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


@pytest.mark.parametrize("named", [True, False])
def test_picture(fresh, tmp_path, named):
    vlm = with_sinks(fresh("llava"))
    sinks = vlmfast.find_sinks(vlm.model, prompts(vlm) if named else vlm.prompts(ROWS), tau=3.8)
    assert bool(sinks.dims) == named
    drawn = copy.deepcopy(pictures.figure(sinks))
    bars, lines = drawn.axes
    heights = [[bar.get_height() for bar in container] for container in bars.containers]
    expected = [
        [getattr(one, name) * 100 for one in sinks.layers] for name in ("text_sinks", "image_sinks", "image", "text")
    ]
    for height, share in zip(heights, expected):
        assert height == pytest.approx(share)
    assert len(lines.get_lines()) == len(sinks.dims)
    if named:
        assert lines.get_lines()[0].get_ydata().tolist() == pytest.approx([one.largest[0] for one in sinks.layers])
    pictures.draw(sinks, tmp_path / "sinks.png")
    assert len(np.unique(colours(tmp_path / "sinks.png"), axis=0)) > 4


@pytest.fixture
def ask(tmp_path):
    """vlmfast sinks with everything right, but for what the test changes."""
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)).save(photo)

    def run(**changes):
        options = {"model": "testbed:llava", "image": photo, "out": tmp_path / "sinks.png"} | changes
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        return CliRunner().invoke(cli.app, ["sinks", *words])

    return run


def test_command(ask, tmp_path):
    result = ask(dims="3/17", tau=1)
    assert result.exit_code == 0, result.output
    assert "sink dimensions 3/17 (given)" in result.stdout and str(tmp_path / "sinks.png") in result.stdout
    assert (tmp_path / "sinks.png").read_bytes().startswith(b"\x89PNG")
    assert "no sink dimensions" in ask().stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dims": "3/1000"}, "dimensions 0 to 191"),
        ({"dims": "x"}, "joined by slashes"),
        ({"tau": -1}, "tau"),
        ({"out": "sinks.jpg"}, ".png"),
        ({"out": "nowhere/sinks.png"}, "nowhere"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"model": "testbed:lava"}, "testbed:llava"),
    ],
)
def test_wrong_command(ask, tmp_path, changes, words):
    result = ask(**changes)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("vlmfast: ") and words in line
    assert not (tmp_path / "sinks.png").exists()
