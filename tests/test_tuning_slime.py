"""SliME's mixture of adapters: resampler and gates in plain loops, other grids, noise, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import build
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import layer_norm, softplus

import vlmfast
from vlmfast.adapters.tuning import SlimeConfig
from vlmfast.adapters.tuning.slime import Mixture, Resampler, SlimeLayer, places, resized

WIDTH, OUT = 8, 6


def layer(shaken: bool = True, queries: int = 4, **settings: Any) -> SlimeLayer:
    """A projector with a mixture around it, in evaluation mode."""
    torch.manual_seed(0)
    project = nn.Sequential(nn.Linear(WIDTH, OUT), nn.GELU(), nn.Linear(OUT, OUT))
    wrapped = SlimeLayer(project, None, None)
    wrapped.update_layer("default", SlimeConfig(num_queries=queries, num_heads=2, **settings))
    wrapped.set_adapter(["default"])
    if shaken:
        for parameter in wrapped.slime_mixture.parameters():
            parameter.data += torch.randn_like(parameter) * 0.5
    return wrapped.eval()


def view(n: int = 4) -> Tensor:
    return torch.randn(3, n, WIDTH, generator=torch.Generator().manual_seed(1))


def mixture(wrapped: SlimeLayer) -> Mixture:
    return wrapped.slime_mixture["default"]


@torch.no_grad()
def seen(resampler: Resampler, tokens: Tensor, grid: int) -> Tensor:
    """R of one view in plain loops. [N, C] -> [N, C]"""

    def normed(values: Tensor, norm: nn.LayerNorm) -> Tensor:
        return layer_norm(values, values.shape[-1:], norm.weight, norm.bias, 1e-6)

    place = torch.zeros(grid * grid, WIDTH)
    for row in range(grid):
        for column in range(grid):
            for axis, where in enumerate((column, row)):
                for k in range(WIDTH // 4):
                    angle = where / 10000 ** (k / (WIDTH / 4))
                    place[row * grid + column, axis * WIDTH // 2 + k] = math.sin(angle)
                    place[row * grid + column, axis * WIDTH // 2 + WIDTH // 4 + k] = math.cos(angle)
    place = place.half().float()
    inward, biases = resampler.inward.weight.chunk(3), resampler.inward.bias.chunk(3)
    value = normed(tokens, resampler.view_norm)
    q = (normed(resampler.queries, resampler.query_norm) + place) @ inward[0].T + biases[0]
    k = (value + place) @ inward[1].T + biases[1]
    v = value @ inward[2].T + biases[2]
    heads = []
    for own in (slice(0, WIDTH // 2), slice(WIDTH // 2, WIDTH)):
        rows = []
        for query in q[:, own]:
            share = torch.tensor([float(query @ key) / math.sqrt(WIDTH // 2) for key in k[:, own]]).softmax(0)
            rows.append(sum(share[n] * v[n, own] for n in range(len(tokens))))
        heads.append(torch.stack(rows))
    out = torch.cat(heads, dim=-1) @ resampler.outward.weight.T + resampler.outward.bias
    return normed(out, resampler.norm)


@pytest.mark.parametrize("gate_init", ["official", "identity"])
def test_the_equation_token_by_token(gate_init):
    wrapped = layer(gate_init=gate_init)
    own, project = mixture(wrapped), wrapped.base_layer
    with torch.no_grad():
        found = wrapped(view())
        for tokens, got in zip(view(), found):
            behind = seen(own.resampler, tokens, 2)
            for x, r, y in zip(tokens, behind, got):
                gate = (x @ own.gate).softmax(-1)
                gate = gate / (gate.sum() + 1e-6)
                if own.strength is None:
                    expected = gate[0] * project(x) + gate[1] * project(r)
                else:
                    expected = project(x) + own.strength * gate[1] * (project(r) - project(x))
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_where_the_gates_start():
    plain = layer(shaken=False)
    assert torch.equal(plain(view()), plain.base_layer(view())), "the model as it was"
    mixture(plain).strength.data.fill_(1)
    official = layer(shaken=False, gate_init="official")
    official.slime_mixture.load_state_dict(plain.slime_mixture.state_dict(), strict=False)
    torch.testing.assert_close(plain(view()), official(view()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixture(official).gates(view()), torch.full((3, 4, 2), 0.5))


def test_views_of_another_size():
    wrapped = layer()
    with torch.no_grad():
        larger, other = wrapped(view(9)), mixture(wrapped)
        stretched = resized(other.resampler.queries, 3)
        assert stretched.shape == (9, WIDTH)
        expected = other.resampler
        expected.queries = nn.Parameter(stretched)  # a resampler of nine queries, its table shrunk from theirs
        own = resized(places(2, WIDTH), 3)
        assert not torch.allclose(own, places(3, WIDTH), atol=1e-2)
        expected.places = lambda: own  # type: ignore[method-assign]
        torch.testing.assert_close(wrapped(view(9)), larger)
        with_cls = layer()(torch.cat([view(9)[:, :1], view()], dim=1))
        torch.testing.assert_close(with_cls[:, 1:], layer()(view()))
        torch.testing.assert_close(with_cls[:, :1], wrapped.base_layer(view(9)[:, :1]))
        with pytest.raises(NotImplementedError, match="square views, with or without CLS; this one has 6"):
            wrapped(view(6))
        official = layer(parity="official")
        for n in (9, 5, 6):
            assert torch.equal(official(view(n)), official.base_layer(view(n))), "theirs: the projector alone"
        assert not torch.allclose(official(view()), official.base_layer(view()), atol=1e-2)


@pytest.mark.parametrize("parity", ["repaired", "official"])
def test_noise_in_training(parity):
    """Its scale has weights of its own, where the authors' code takes the gates' again."""
    wrapped = layer(gate_init="official", parity=parity)
    own, x = mixture(wrapped), view()
    still = own.gates(x)
    assert torch.equal(own.gates(x), still)
    own.train()
    torch.manual_seed(6)
    found = own.gates(x)
    torch.manual_seed(6)
    scale = own.gate if parity == "official" else own.spread
    logits = x @ own.gate + torch.randn(3, 4, 2) * (softplus(x @ scale) + 0.01)
    torch.testing.assert_close(found, logits.softmax(-1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, still, atol=1e-2)
    assert any("spread" in name for name, _ in own.named_parameters()) == (parity == "repaired")
    quiet = mixture(layer(gate_init="official", noise=False)).train()
    torch.testing.assert_close(quiet.gates(x), quiet.eval().gates(x))


def test_every_view_of_a_model():
    """Crops and thumbnails, videos whose frames keep CLS, and five layers side by side."""
    cases = (("llava_next", "a", 16, 32), ("video_llava", "A", 16, 32), ("vipllava", "a", 36, 160))
    for family, letter, queries, width in cases:
        one = build(family)
        inputs = one.prompts([[3, letter, 2]])
        model = get_peft_model(one.model, SlimeConfig(gate_init="official")).eval()
        assert model.peft_config["default"].num_queries == queries
        wrapped = next(module for module in model.modules() if isinstance(module, SlimeLayer))
        assert wrapped.width == width
        with torch.no_grad():
            acting = model(**inputs).logits
            with model.disable_adapter():
                assert not torch.allclose(model(**inputs).logits, acting, atol=1e-3)


def test_what_is_refused():
    for settings, said in (
        ({"num_queries": 5}, "a square number"),
        ({"num_heads": 0}, "1 or more"),
        ({"gate_init": "zero"}, "choose 'identity' or 'official'"),
        ({"parity": "none"}, "choose 'repaired' or 'official'"),
    ):
        with pytest.raises(ValueError, match=said):
            SlimeConfig(**settings)
    model = build("llava").model
    for settings in ({"target_modules": ["linear_1"]}, {"layers_to_transform": [0]}):
        with pytest.raises(ValueError, match="leave target_modules and layers_to_transform out"):
            get_peft_model(model, SlimeConfig(**settings))
    with pytest.raises(ValueError, match="num_heads=5 does not divide the tower's width of 32"):
        get_peft_model(model, SlimeConfig(num_heads=5))
    assert not model.get_decoder()._forward_pre_hooks and not any(isinstance(m, SlimeLayer) for m in model.modules())
    one = build("llava")
    inputs = one.prompts([[3, "a", 2]])
    model = get_peft_model(one.model, SlimeConfig()).eval()
    with vlmfast.patch(model, "visionzip:keep=0.5"), pytest.raises(NotImplementedError, match="looks at whole views"):
        model(**inputs)
    with vlmfast.patch(model, "visionzip:keep=0.5"), model.disable_adapter():
        model(**inputs)
