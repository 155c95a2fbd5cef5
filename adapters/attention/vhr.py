"""VHR: heads whose output the picture changes most count more.

Paper: Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence (He et al., ACL 2025),
    arXiv:2412.13949
Code:  https://github.com/jinghan1he/VHR, not obtainable: everything here is derived from the paper (equations 4 to 7,
    algorithm 1, section 4.4, appendices C and D)

A_i [d] is a head's output (softmax(q k^T) v, before the output projection) at the prompt's last position, T_i the same
without the picture, in a stream of the prompt's text alone.

    VHD_i = ||A_i - T_i||          TA_i = ||T_i||^2
    VHD_i := 0 where VHD_i > mean + std and TA_i > mean + std, over the heads     (vision disturbs such a head)
    A_i := alpha A_i for all heads with VHD_i > median, in all rows of the prompt and of everything after it

layer by layer in one prefill. Shapes: [B, H, Q, d] and, for the R rows with a picture and T text tokens, [R, H, T, d].
Defaults: alpha=2, the second layer and the last 14 (LLaVA-1.5, LLaVA-NeXT; the paper takes the last 18 of
InstructBLIP's decoder, "1/-18:"). alpha=4 makes the paper's models collapse, and it calls the second layer optional:
"-14:".

Where the paper leaves room: both streams are reinforced before the next layer is measured; std is the unbiased one;
the median of an even number is the lower one; the distance is not squared, as equation 4 has it (a port by others
squares it, which changes the outliers). Where a layer gates its attention's output (Qwen3.5), heads are measured
before the gate. "Without the picture" is without its placeholders: see vlmfast.lockstep.

Heads are chosen for each row of a batch at its first prompt with a picture and stay chosen for as long as the cache
lives, so that all its keys and values belong to one model: a prompt is read as a whole (no prefill_chunk_size), a
first picture behind text that a cache holds is refused, and pictures of later turns choose nothing. Rows without a
picture, or without text, stay as they are. Without a cache heads are chosen in every forward, by the prompt alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.adapters.attention.base import AttentionEdit, attending
from vlmfast.decoders import Sizes
from vlmfast.edits import Call
from vlmfast.towers import Picture


@dataclass(frozen=True)
class Divergence:
    """What a picture does to the heads of one layer, fp32 and bool [..., H].

    distance: VHD as measured; text: TA; outlier: heads that it disturbs; vision: heads to be reinforced.
    """

    distance: Tensor
    text: Tensor
    outlier: Tensor
    vision: Tensor

    @classmethod
    def of(cls, full: Tensor, text: Tensor) -> Divergence:
        """From head outputs with and without the picture, [..., H, d] each."""
        full, text = full.float(), text.float()
        distance, strength = (full - text).norm(dim=-1), text.square().sum(-1)
        outlier = _large(distance) & _large(strength)
        kept = distance.masked_fill(outlier, 0.0)
        return cls(distance, strength, outlier, kept > kept.median(dim=-1, keepdim=True).values)

    def total(self, topk: int) -> Tensor:
        """The layer's part of T-VHD: the sum of its largest VHD, outliers apart. [...]"""
        kept = self.distance.masked_fill(self.outlier, 0.0)
        return kept.topk(min(topk, kept.shape[-1]), dim=-1).values.sum(-1)


def _large(values: Tensor) -> Tensor:
    """Which are above mean + std of the last axis; none where there is only one."""
    if values.shape[-1] < 2:
        return torch.zeros_like(values, dtype=torch.bool)
    return values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True)


def reinforced(outputs: Tensor, heads: Tensor, alpha: float) -> Tensor:
    """Head outputs with some heads scaled. [B, H, Q, d], bool [B, H] -> [B, H, Q, d]"""
    return outputs * torch.where(heads, alpha, 1.0).to(outputs.dtype)[..., None, None]


@dataclass(frozen=True, kw_only=True)
class VHR(AttentionEdit):
    """Scale the heads whose output the picture changes most.

    alpha: the factor; 1 changes nothing. topk: heads a layer that count in the report's T-VHD, which says how much a
    prompt leans on its picture (over the edited layers, as reinforced).
    """

    name: ClassVar[str] = "vhr"
    summary: ClassVar[str] = "heads that the picture changes most are scaled up"
    paper: ClassVar[str] = "arXiv:2412.13949"
    compares: ClassVar[bool] = True

    layers: str | int = "1/-14:"
    alpha: float = 2.0
    topk: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha < 1e6:
            raise ValueError(f"alpha={self.alpha!r}: a number from 0 on; 1 changes nothing")
        if isinstance(self.topk, bool) or not isinstance(self.topk, int) or self.topk < 1:
            raise ValueError(f"topk={self.topk!r}: a whole number of heads, 1 or more")

    @property
    def neutral(self) -> bool:
        """alpha of 1."""
        return self.alpha == 1

    def edit(self, call: Call) -> Tensor:
        """All rows of the prompts' heads, once these are chosen."""
        plain = call.plain()
        if call.free is not None and "heads" not in call.memory:
            call.memory["heads"] = self.choose(call, plain.detach())
        heads: Tensor | None = call.memory.get("heads")
        return plain if heads is None else reinforced(plain, heads.to(plain.device), self.alpha)

    def choose(self, call: Call, plain: Tensor) -> Tensor:
        """Take the image-free stream through the layer and compare. plain: [B, H, Q, d] -> bool [B, H]"""
        free = call.free
        assert free is not None
        chosen = torch.zeros(plain.shape[:2], dtype=torch.bool, device=plain.device)
        rows = free.rows.to(plain.device)
        last = call.ends.long().argmax(1).to(plain.device)[rows]  # the first of `ends` is the prompt's own end

        def compare(text: Tensor) -> Tensor:
            found = Divergence.of(plain[rows, :, last], text[:, :, -1].to(plain.device))
            chosen[rows] = found.vision
            total = found.total(self.topk)
            free.memory["total"] = total + free.memory.get("total", torch.zeros_like(total)).to(total.device)
            return reinforced(text, found.vision.to(text.device), self.alpha)

        free.through(call.layer, compare)
        if call.layer == free.last:
            call.note(spelled(free.memory["total"], self.topk))
        return chosen

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """The decoder over the text alone, up to the last edited layer: once a prompt, counted for every picture."""
        layers = model.decoder.layers
        last = max(self.where(attending(model), len(layers)))
        return sum(layer.flops(text, text) for layer in layers[: last + 1])


def spelled(totals: Tensor, topk: int) -> str:
    """T-VHD of some prompts as a line of a report. totals: [R]"""
    mean = f"vhr: T-VHD {totals.mean():.4g} (the {topk} largest of each edited layer"
    if len(totals) == 1:
        return mean + ")"
    return mean + f"; {len(totals)} rows with pictures, {totals.min():.4g} to {totals.max():.4g})"
