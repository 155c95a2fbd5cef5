"""Imported before transformers, which imports Triton: where no GPU is, Triton's programs are to be interpreted.

Triton decides when it is imported, and again when a program is defined and when it runs (tests/test_kernels.py); the
variable is set for these moments alone, and other tests and what they start never see it.
"""

from __future__ import annotations

import contextlib
import os

import torch

VARIABLE = "TRITON_INTERPRET"
GPU = torch.cuda.is_available()


@contextlib.contextmanager
def interpreting():
    """Triton interprets what is imported or run inside; nothing where a GPU is."""
    before = os.environ.get(VARIABLE)
    if not GPU:
        os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


with interpreting(), contextlib.suppress(ImportError):
    import triton  # noqa: F401
