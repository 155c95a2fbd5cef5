"""EVS: keep the first frame of a video, and of the others what changed.

Paper: Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference (Bagrov et al. 2025),
       arXiv:2510.14624
Code:  https://github.com/vllm-project/vllm (vllm/multimodal/evs.py, 094f117; `--video-pruning-rate q`, keep = 1 - q)

    d_tj = 1 - cos(x_tj, x_(t-1)j)      the same place j of consecutive frames, on what enters the language model
    keep the first frame whole, and the largest d of all other frames together, up to `keep`

Shapes: features [N, D] -> frames [F, n, D] -> d [F - 1, n] -> kept [max(budget, n)].

The first frame stays whole also where `keep` means fewer tokens than it has; the report says so. Images and videos of
one frame are all first frame: they stay whole. Kept tokens have their own (M-RoPE) positions wherever the family's
official code does that, as here.

Differs from vLLM's code: the budget is rounded where theirs is cut, int(N (1 - q)); d is |u - v|^2 / 2 of the
normalised features, the same number but exactly 0 for a place that did not change, in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.adapters.pruning.base import Pruner
from vlmfast.patching import ImageReport
from vlmfast.towers import Picture
from vlmfast.visual import VisualTokens, budget, frame_index, top, unit


def changes(frames: Tensor) -> Tensor:
    """1 - cosine between each place and the same place one frame earlier. [F, n, D] -> [F - 1, n]"""
    before, found = unit(frames[0]), [frames.new_empty(0, frames.shape[1], dtype=torch.float32)]
    for frame in frames[1:]:  # frame by frame: two of them stay in the cache where the whole video does not
        now = unit(frame)
        found.append((now - before).square().sum(-1)[None] / 2)
        before = now
    return torch.cat(found)


@dataclass(frozen=True, kw_only=True)
class EVS(Pruner):
    """Keep the first frame and what differs most from the frame before."""

    name = "evs"
    summary = "videos: the first frame whole, of later ones what changed"
    paper = "arXiv:2510.14624"
    modalities = ("video",)

    def remarks(self, pictures: Sequence[ImageReport]) -> tuple[str, ...]:
        """Say where the first frame alone is more than `keep`."""
        over = [p for p in pictures if self._prunes(p.views) and len(p.indices) > budget(self.keep, tokens_of(p))]
        first = (
            f"{self.name}: the first frame stays whole, which is more than keep={self.keep} in {len(over)} video(s)"
        )
        return (*super().remarks(pictures), *((first,) if over else ()))

    def kept_of(self, picture: Picture) -> int:
        """`keep`, but the first frame at least."""
        return max(super().kept_of(picture), picture.tokens // picture.frames)

    def select(self, visual: VisualTokens) -> Tensor:
        """Features [N, D] -> kept [max(budget, n)]."""
        index = frame_index(visual.views).to(visual.features.device)
        first, later = index[0], index[1:].flatten()
        k = max(0, budget(self.keep, len(visual)) - len(first))
        return torch.cat([first, later[top(changes(visual.features[index]).flatten(), k)]])


def tokens_of(picture: ImageReport) -> int:
    """Visual tokens of a picture before pruning, newlines left out."""
    return sum(len(view) for view in picture.views)
