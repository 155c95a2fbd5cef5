"""Door 3, edits: what a cache remembers of the prompts it holds, and what the tokens of one forward are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmfast.lockstep import ImageFree

EDITS = "vlmfast_edits"  # keyword of a forward: its Pass; attribute of a cache: its Memory


@dataclass
class Memory:
    """What a cache remembers of the prompts it holds, by columns of its first layer.

    visual, real: bool [B, n]. marks: [B, n] each. layers: for each edited layer what its method remembers.
    """

    visual: Tensor
    real: Tensor
    marks: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Columns known; those behind them are generated text."""
        return self.visual.shape[1]

    def extended(self, held: int, visual: Tensor, real: Tensor, marks: Mapping[str, Tensor]) -> Memory:
        """With new tokens behind `held` columns. A cropped cache forgets what was cropped."""

        def joined(before: Tensor, new: Tensor, fill: float) -> Tensor:
            kept = before[:, :held]
            return torch.cat([torch.nn.functional.pad(kept, (0, held - kept.shape[1]), value=fill), new], dim=1)

        names = dict.fromkeys([*self.marks, *marks])
        nothing = {name: self.visual.new_zeros(self.visual.shape, dtype=torch.float32) for name in names}
        return Memory(
            joined(self.visual, visual, False),
            joined(self.real, real, True),
            {
                name: joined(
                    self.marks.get(name, nothing[name]),
                    marks.get(name, torch.zeros_like(visual, dtype=torch.float32)),
                    0.0,
                )
                for name in names
            },
            self.layers,
        )


def memory_of(cache: Any, decoding: bool) -> Memory | None:
    """The memory a cache carries; one left over from before a reset is removed.

    decoding: one token follows the others, so that a static cache, whose length is on the device, need not be read.
    """
    memory: Memory | None = getattr(cache, EDITS, None)
    if memory is None:
        return None
    held = cache.get_seq_length()
    if not (decoding and isinstance(held, Tensor)) and int(held) == 0:
        delattr(cache, EDITS)
        return None
    return memory


@dataclass
class Pass:
    """One forward. prompt: its tokens belong to prompts. ends: bool [B, Q], see `Call`.

    ids: int64 [B, Q], where they are known. free: the image-free stream of its prompts, where a method asks for it and
    they have pictures. known: what layers that hold the same keys share.
    """

    memory: Memory
    prompt: bool
    ends: Tensor
    ids: Tensor | None = None
    free: ImageFree | None = None
    known: dict[Any, dict[str, Any]] = field(default_factory=dict)


def real_tokens(mask: Any, rows: int, held: int, new: int, device: torch.device) -> Tensor:
    """Which of the new tokens are no padding. bool [B, Q]

    mask: of the conversation, [B, held + Q]; or ready-made, [B, 1, Q, K] or several of them by kind of layer; or None.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(rows, new, dtype=torch.bool, device=device)
    if mask.ndim == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return mask[:, held : held + new].to(device).bool().expand(rows, -1)
