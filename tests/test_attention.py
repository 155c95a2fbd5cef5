"""Door 3: statistics against plain loops, taps that change nothing, memory that does not grow with N x N."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmfast.attention import ENTRIES_CPU, KEYWORD, Taps, attention_rows, column_mean, statistic, tap
from vlmfast.families import family_of
from vlmfast.patching import Patch
from vlmfast.visual import Score


def attention_modules(model, base):
    """The attention module of every block of the vision tower."""
    family = family_of(model)
    return [family.attention_module(block) for block in family.block_modules(base, family.sources["image"])]


def loops(q, k, scaling, visible, softmax):
    """The attention map, entry by entry. q: [H][Q][d], k: [H_kv][K][d] -> [H][Q][K]; hidden entries None."""
    heads, groups = len(q), len(q) // len(k)
    rows = []
    for h in range(heads):
        rows.append([])
        for i, query in enumerate(q[h]):
            logits = [
                scaling * sum(a * b for a, b in zip(query, key)) if visible[i][j] else None
                for j, key in enumerate(k[h // groups])
            ]
            if softmax:
                top = max(x for x in logits if x is not None)
                powers = [0.0 if x is None else math.exp(x - top) for x in logits]
                logits = [p / sum(powers) for p in powers]
            rows[-1].append(logits)
    return rows


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", ["none", "bool", "additive"])
@pytest.mark.parametrize("kind", ["cls_row", "last_row", "column_mean"])
def test_statistics_equal_the_map_in_loops(kind, masked, causal, softmax):
    torch.manual_seed(1)
    heads, kv_heads, n_query, n_key, d = 4, 2, 5, 7, 3
    q, k = torch.randn(1, heads, n_query, d), torch.randn(1, kv_heads, n_key, d)
    visible = torch.ones(n_query, n_key, dtype=torch.bool)
    mask = None
    if masked != "none":
        visible[:, 1] = False
        visible[2, 4] = False
        additive = torch.zeros(1, 1, n_query, n_key).masked_fill(~visible, -torch.inf)
        mask = visible[None, None] if masked == "bool" else additive
    if causal:
        visible = visible & (torch.arange(n_key) <= torch.arange(n_query)[:, None] + n_key - n_query)
    ours = statistic(Score(0, kind, softmax), q, k, 0.7, mask, causal)[0]
    full = loops(q[0].tolist(), k[0].tolist(), 0.7, visible.tolist(), softmax)
    for j in range(n_key):
        rows = {"cls_row": [0], "last_row": [n_query - 1], "column_mean": range(n_query)}[kind]
        entries = [full[h][i][j] for h in range(heads) for i in rows]
        seen = [entry for entry in entries if entry is not None]
        if not seen or (kind != "column_mean" and len(seen) < len(entries)):
            assert ours[j] == -math.inf
        else:
            assert ours[j].item() == pytest.approx(sum(seen) / len(seen), abs=1e-6)


def test_column_mean_over_more_rows_than_a_block():
    torch.manual_seed(2)
    n = 401  # 2 * 2 * 401 * 401 entries a key head: three blocks, the last one cut
    q, k = torch.randn(2, 6, n, 4), torch.randn(2, 3, n, 4)
    assert 2 * ENTRIES_CPU < 2 * 2 * n * n < 3 * ENTRIES_CPU
    whole = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).softmax(-1).mean((1, 2))
    torch.testing.assert_close(column_mean(q, k, 1.0), whole)
    perhead = torch.rand(2, 6, n, n) > 0.3
    masked = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).masked_fill(~perhead, -torch.inf).softmax(-1)
    torch.testing.assert_close(column_mean(q, k, 1.0, perhead), masked.mean((1, 2)))


def test_statistics_are_fp32_for_half_precision():
    torch.manual_seed(3)
    q, k = torch.randn(1, 2, 9, 4).bfloat16(), torch.randn(1, 2, 9, 4).bfloat16()
    ours = column_mean(q, k, 0.5)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, column_mean(q.float(), k.float(), 0.5))


def test_no_tensor_of_the_size_of_the_map():
    """No intermediate of column_mean holds more than a block, or than its inputs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    n, heads = 1024, 2
    q, k = torch.randn(1, heads, n, 4), torch.randn(1, heads, n, 4)
    with Watch():
        column_mean(q, k, 1.0)
        attention_rows(q, k, slice(0, 1), 1.0)
    assert largest <= ENTRIES_CPU < n * n


def test_taps_see_what_eager_attention_computes_and_change_nothing(vlm):
    """Statistics of the tower equal those of the eager maps of the same layer; outputs stay the same to the bit."""
    model, base = vlm.model, vlm.model.model
    inputs = vlm.prompts([[3, "a", 2, "b", 1]])
    encode = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    plain = torch.cat(list(base.get_image_features(**encode, return_dict=True).pooler_output))
    modules = attention_modules(model, base)
    layers = family_of(model).tower(model.config).full_layers
    scores = [
        Score(layer, kind, softmax) for layer in layers for kind in ("cls_row", "column_mean") for softmax in (1, 0)
    ]
    patch = Patch(model)
    tap(patch, [modules[layer] for layer in layers])
    taps = Taps({id(modules[layer]): [s for s in scores if s.layer == layer] for layer in layers})
    tapped = torch.cat(list(base.get_image_features(**encode, return_dict=True, **{KEYWORD: taps}).pooler_output))
    patch.close()
    assert torch.equal(tapped, plain)
    maps = eager_maps(vlm, modules, encode, layers)
    for score, parts in taps.collected.items():
        assert len(parts) == len(maps[score.layer])
        for ours, (logits, weights) in zip(parts, maps[score.layer]):
            full = weights if score.softmax else logits
            rows = full[:, :, :1] if score.kind == "cls_row" else full
            torch.testing.assert_close(ours, rows.mean((1, 2)), rtol=1e-5, atol=1e-5)


def eager_maps(vlm, modules, encode, layers):
    """Full maps of the given layers, taken by an attention function of the test's own."""
    seen: dict[int, list] = {layer: [] for layer in layers}
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watch(module, query, key, value, attention_mask, scaling=None, **kwargs):
        for layer in layers:
            if modules[layer] is module:
                logits = query @ key.transpose(-1, -2) * scaling
                seen[layer].append((logits, logits.softmax(-1)))
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = watch  # a local entry of the one dictionary all models read
    try:
        vlm.model.model.get_image_features(**encode, return_dict=True)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    return seen


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_taps_respect_the_models_own_attention(fresh, vlm, implementation):
    """The function behind a tap is whatever the model uses, also when that changes while patched."""
    one = fresh(vlm.name)
    inputs = one.prompts([[3, "a", 2]])
    one.model.set_attn_implementation(implementation)
    logits = one.model(**inputs).logits
    patch = Patch(one.model)
    tap(patch, attention_modules(one.model, one.model.model))
    torch.testing.assert_close(one.model(**inputs).logits, logits, rtol=0, atol=0)
    patch.close()


def test_packed_attention_calls_are_cut_at_their_bounds():
    """Flash attention hands over a packed batch in one call; the statistic is per sequence all the same."""
    torch.manual_seed(4)
    q, k = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    module = nn.Identity()
    taps = Taps({id(module): [Score(0, "column_mean")]})
    taps.observe(module, q, k, None, 1.0, {"cu_seq_lens_q": torch.tensor([0, 4, 9]), "is_causal": False})
    first, second = taps.collected[Score(0, "column_mean")]
    torch.testing.assert_close(first, column_mean(q[:, :, :4], k[:, :, :4], 1.0))
    torch.testing.assert_close(second, column_mean(q[:, :, 4:], k[:, :, 4:], 1.0))


def test_closed_taps_take_nothing():
    module = nn.Identity()
    taps = Taps({id(module): [Score(0, "column_mean")]}, closed=True)
    taps.observe(module, torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2), None, 1.0, {})
    assert not taps.collected
