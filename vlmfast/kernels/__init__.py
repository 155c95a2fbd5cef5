"""Triton kernels for CUDA devices; each has its plain torch reference beside it, in `vlmfast.edits.engine`.

Three, all flash attention's way of never holding the map: attention received per key (`column_sums`), attention whose
keys fall into classes with a factor each (`redistribute`), and attention with its log-sum-exp (`with_lse`). Gathering
kept tokens needs none: `torch.gather` and indexing already move every byte once, in one launch.

They run where `usable` says so, and torch does everywhere else. VLMFAST_KERNELS=torch in the environment switches them
off, to tell a kernel's fault from a method's; "auto" is the same as nothing.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

VARIABLE = "VLMFAST_KERNELS"
WIDEST = 256  # numbers of a head
MOST_CLASSES = 4  # of `redistribute`, not counting the rest
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def usable(*tensors: Tensor) -> bool:
    """Whether kernels take these queries, keys and values: on a CUDA device that Triton is installed for, of one type
    in DTYPES, heads no wider than WIDEST, and no gradient asked for.

    Raises: ValueError if the environment variable says what it cannot.
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "torch"):
        raise ValueError(f"{VARIABLE}={wanted}: auto, or torch to run without the Triton kernels")
    first = tensors[0]
    return (
        wanted == "auto"
        and all(one.is_cuda and one.dtype == first.dtype and one.shape[-1] <= WIDEST for one in tensors)
        and first.dtype in DTYPES
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))
        and _supported(first.device)
    )


@cache
def _supported(device: torch.device) -> bool:
    """Whether Triton is there and compiles for this device (NVIDIA's from compute capability 8.0 on)."""
    try:
        launcher()
    except ImportError:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def launcher() -> Any:
    """The kernels, `vlmfast.kernels.launch`; only where `usable`."""
    return importlib.import_module("vlmfast.kernels.launch")
