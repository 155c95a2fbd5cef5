"""Products of a few rows with large fp32 weights on a CPU, which are bound by reading the weights.

There the library's product of two rows takes more than twice as long as that of one, as if the weights were read again
for each. Turned round, W x^T, up to four rows cost what one costs, where the weights have many more rows than columns;
two or three do of any weights. Half precision and GPUs need no such care.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

LARGE = 2**18  # values of a weight; smaller ones stay in the cache
PIECE, MOST = 4, 8  # rows of a product, and rows up to which it is faster


def pays(weight: Tensor) -> bool:
    """Whether a few rows of such weights are faster turned round."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LARGE


def few_rows(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of a few rows. [n, D], [D', D], [D'] -> [n, D']"""
    turned = []
    edges = [*range(0, len(rows) - 1, PIECE), len(rows)]  # one row left over goes with the last piece
    for start, stop in zip(edges, edges[1:]):
        piece = rows[start:stop].t()
        product = weight @ piece if bias is None else torch.addmm(bias[:, None], weight, piece)
        turned.append(product.t())
    return turned[0].contiguous() if len(turned) == 1 else torch.cat(turned)


class FewRows:
    """Stands for the `forward` of a linear layer. wanted: whether this call is to be turned round, if that pays."""

    def __init__(self, module: nn.Linear, wanted: Callable[[Tensor], bool]) -> None:
        self.module, self.wanted, self.original = module, wanted, module.forward

    def __call__(self, input: Tensor) -> Tensor:
        """As the original. [..., D] -> [..., D']"""
        module, rows = self.module, input.shape[:-1].numel()
        alike = input.dtype == module.weight.dtype and input.device == module.weight.device
        if not 1 < rows <= MOST or not alike or not self.wanted(input) or not pays(module.weight):
            return self.original(input)
        return few_rows(input.flatten(0, -2), module.weight, module.bias).unflatten(0, input.shape[:-1])
