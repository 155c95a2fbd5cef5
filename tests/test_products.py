"""Products of a few rows: the same values, turned round where that pays and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmfast import products
from vlmfast.products import MOST, FewRows, few_rows, pays


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", range(2, MOST + 2))
def test_the_same_as_a_linear_layer(count, bias):
    """Also where the rows go in pieces; one left over goes with the last piece."""
    torch.manual_seed(count)
    layer, rows = nn.Linear(16, 50, bias=bias), torch.randn(count, 16)
    found = few_rows(rows, layer.weight, layer.bias)
    torch.testing.assert_close(found, layer(rows))
    assert found.is_contiguous()


@pytest.mark.parametrize(
    ("shape", "turned"),
    [((1, 2), True), ((2, 1), True), ((2, 3), True), ((1, MOST), True), ((1, 1), False), ((1, MOST + 1), False)],
)
def test_few_rows_of_any_shape(shape, turned, monkeypatch):
    monkeypatch.setattr(products, "LARGE", 1)
    products_seen = []
    monkeypatch.setattr(products, "few_rows", lambda *args: products_seen.append(args[0].shape) or few_rows(*args))
    layer, wanted = nn.Linear(16, 50), [True]
    stand_in, hidden = FewRows(layer, lambda _: wanted[0]), torch.randn(*shape, 16)
    torch.testing.assert_close(stand_in(hidden), layer(hidden))
    assert len(products_seen) == turned
    wanted[0] = False
    assert torch.equal(stand_in(hidden), layer(hidden)) and len(products_seen) == turned


def test_where_it_pays():
    large = torch.empty(2**9, 2**9)
    assert pays(large) and not pays(large[1:])
    assert not pays(large.bfloat16()) and not pays(large.double()) and not pays(large.to("meta"))


def test_rows_of_another_precision_go_the_old_way(monkeypatch):
    """As under autocast, which casts the rows by itself."""
    monkeypatch.setattr(products, "LARGE", 1)
    layer, calls = nn.Linear(16, 50), []
    stand_in = FewRows(layer, lambda _: True)
    stand_in.original = lambda rows: calls.append(rows.dtype) or rows
    stand_in(torch.ones(1, 2, 16, dtype=torch.bfloat16))
    assert calls == [torch.bfloat16]
