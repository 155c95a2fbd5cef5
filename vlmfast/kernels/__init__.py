"""Triton kernels for CUDA devices, each beside its plain torch reference."""

from __future__ import annotations

from torch import Tensor


def usable(tensor: Tensor) -> bool:
    """Whether the kernels run on this tensor's device."""
    return False
