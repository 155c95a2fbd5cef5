"""VidCom2: more tokens for frames that stand out, and in each the tokens that stand out.

Paper: Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models (Liu et al.,
       EMNLP 2025), arXiv:2505.14454
Code:  https://github.com/xuyang-liu16/VidCom2 (944a17d, token_compressor/vidcom2/vidcom2.py)

    x  = features, the half of the channels with the lowest variance over the video, L2-normalised
    g(x, c) = sum over a = 1/8, 1/4, 1/2, 1, 2 of exp(-|x - c|^2 / (2 a))
    v_tj, f_tj = g(x_tj, mean of the video), g(x_tj, mean of frame t)
    p  = softmax over frames of (-mean_j v_tj) / 0.01
    r_t = min(1, R (1 + p_t - mean p))             share of frame t, R = `keep`
    keep in every frame the round(r_t n), at least one, smallest v_tj + f_tj

Shapes: features [N, D] -> x [F, n, D / 2] -> v, f [F, n] -> kept [budget].

Images, and videos of one frame, stay whole. Differs from the authors' code (`parity="official"` has it back):
- `keep` is met exactly: rounding and the limits at 1 token and at n make theirs drift from R N; ours scales the r_t
  until the shares sum up to `keep` within these limits, and rounds by largest remainder (no frame must keep a token
  where `keep` is smaller than their number);
- newline tokens leave with the tokens they followed; theirs keeps all of them, beyond R;
- scores in fp32; equal scores go by index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from vlmfast.adapters.pruning.base import Pruner
from vlmfast.visual import VisualTokens, budget, frame_index, top, unit

SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)
TEMPERATURE = 0.01


def similarity(x: Tensor, centre: Tensor) -> Tensor:
    """Gaussian similarity summed over the scales. x: [F, n, C], centre: broadcasts to it -> [F, n]"""
    distance = (x - centre).square().sum(-1, keepdim=True)
    return torch.exp(-distance / (2 * distance.new_tensor(SCALES))).sum(-1)


def scores(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity of every token to the mean of the video and to that of its frame. [F, n, D] -> two of [F, n]"""
    frames = frames.float()
    variance = frames.flatten(0, 1).var(dim=0, unbiased=False)
    calm = top(-variance, max(1, len(variance) // 2))
    x = unit(frames[..., calm])
    return similarity(x, x.mean(dim=(0, 1))), similarity(x, x.mean(dim=1, keepdim=True))


def shares(video: Tensor, keep: float) -> Tensor:
    """What every frame keeps, as shares before rounding. video: [F, n] similarity to the video's mean -> [F]"""
    stands_out = functional.softmax(-video.mean(-1) / TEMPERATURE, dim=0)
    return (keep * (1 + stands_out - stands_out.mean())).clamp(max=1)


def split(share: Tensor, n: int, k: int) -> Tensor:
    """k tokens over frames of n in proportion to their shares, 1 to n each where k allows. -> int64 [F], sum k"""
    least = 1 if k >= len(share) else 0
    share = share.double()
    # The sum of the limited shares grows piecewise linearly with their scale; it bends where one reaches a limit.
    scale = torch.cat([least / share, n / share]).sort().values
    total = (scale[:, None] * share).clamp(least, n).sum(-1)
    i = int(torch.searchsorted(total, total.new_tensor(float(k))).clamp(1, len(total) - 1))
    part = ((k - total[i - 1]) / (total[i] - total[i - 1]).clamp(min=1e-9)).clamp(0, 1)
    exact = (share * torch.lerp(scale[i - 1], scale[i], part)).clamp(least, n)
    whole = (exact + 1e-6).floor()
    whole[top(exact - whole, k - int(whole.sum()))] += 1
    return whole.long()


@dataclass(frozen=True, kw_only=True)
class VidCom2(Pruner):
    """Keep the least similar tokens of every frame, more of frames that stand out."""

    name = "vidcom2"
    summary = "videos: a budget for every frame by how it stands out, in it the tokens that stand out"
    paper = "arXiv:2505.14454"
    modalities = ("video",)
    keep: float | int = 0.25
    parity: Literal["repaired", "official"] = "repaired"

    @property
    def keeps_newlines(self) -> bool:  # type: ignore[override]
        """The official code puts all newlines around what it keeps."""
        return self.parity == "official"

    def select(self, visual: VisualTokens) -> Tensor:
        """Features [N, D] -> kept [budget]; with parity="official" near it."""
        index = frame_index(visual.views).to(visual.features.device)
        n, k = index.shape[1], budget(self.keep, len(visual))
        video, frame = scores(visual.features[index])
        if self.parity == "official":
            ratio = self.keep if isinstance(self.keep, float) else k / len(visual)
            counts = (shares(video, ratio) * n).round().long().clamp(min=1)
        else:
            counts = split(shares(video, k / len(visual)), n, k)
        rank = (video + frame).sort(dim=-1, stable=True).indices.argsort(dim=-1)
        return index[rank < counts[:, None]]
