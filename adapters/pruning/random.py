"""Random: the control that every table needs.

Paper: none; the random row of FastV (Chen et al., ECCV 2024), arXiv:2403.06764, Table 7.
Code:  none.

    keep a uniformly random subset of `keep` tokens, drawn from (seed, the image's pixels)

The draw depends on the image alone: the same image keeps the same tokens in any batch, beam or order of prompts.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.adapters.pruning.base import Pruner
from vlmfast.visual import VisualTokens, budget


@dataclass(frozen=True, kw_only=True)
class Random(Pruner):
    """Control: a random subset of the visual tokens, seeded."""

    name = "random"
    summary = "control: random visual tokens, seeded by image"
    paper = "arXiv:2403.06764"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed!r}: an int from 0 to 2**32 - 1")

    def select(self, visual: VisualTokens) -> Tensor:
        """[N] -> random indices [budget]."""
        if visual.pixels is None:
            raise ValueError("random needs the image's pixels to seed its draw; encode with encode_images")
        pixels = visual.pixels.detach().float().cpu().contiguous().numpy().tobytes()
        draw = torch.Generator().manual_seed(zlib.crc32(pixels, self.seed))  # only 32 bits of a seed count on CPU
        order = torch.randperm(len(visual), generator=draw)
        return order[: budget(self.keep, len(visual))].to(visual.features.device)
