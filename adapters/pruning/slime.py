"""SliME's selector: keep the tokens that resemble the words of the question.

Paper: Beyond LLaVA-HD: Diving into High-Resolution Large Multimodal Models (Zhang et al. 2024), arXiv:2406.08487
Code:  https://github.com/yfzhang114/SliME (5c89ec9, llava/model/multimodal_resampler/builder.py)

    s_j = mean_i cos(v_j, t_i)         v visual tokens, t input embeddings of the question
    p = softmax(s / temperature)
    keep the `keep` largest; or, with `top_p`, the largest whose cumulative p stays within it, and one more

Shapes: v [N, D], t [T, D] -> s, p [N] -> kept [budget]; [<= budget] with `top_p`, where `keep` is the most that stays.

Experimental: SliME trains its projector together with this selector. Without that training the input embeddings of
images and words are only weakly aligned. The selector alone; their resampler and gates are trained.

Views: their selector sees the crops alone, together, and the global view stays whole. Here `keep` counts all tokens
of a picture, therefore by default (`thumbnail="filtered"`) the thumbnail gives its share and is filtered by itself;
`thumbnail="whole"` keeps it whole and leaves the crops the rest of the budget.

Differs from the authors' code:
- s is a mean over the words (`reduce="sum"`: their sum, whose softmax sharpens with the length of the prompt). Both
  rank alike: they differ with `top_p` alone;
- the question is the text after the last picture of a prompt; theirs is the whole prompt, in training with its answer;
- `keep` tokens by default, their `top_p` (0.95) on demand; no noise, which theirs adds in training;
- cosines in fp32, 0 for a zero vector; equal scores go by index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmfast.adapters.pruning.base import Pruner
from vlmfast.patching import ImageReport
from vlmfast.visual import Choice, VisualTokens, top, unit


def text_similarity(features: Tensor, text: Tensor, reduce: str = "mean") -> Tensor:
    """Cosine of every visual token to the words, mean or sum over them, fp32. [N, D], [T, D] -> [N]"""
    words = unit(text)
    words, features = words.mean(dim=0) if reduce == "mean" else words.sum(dim=0), features.float()
    return (features @ words) / features.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def nucleus(probability: Tensor, top_p: float) -> int:
    """How many of the most probable have a cumulative probability of at most top_p, and one more. [N] -> in [1, N]"""
    cumulative = probability.sort(descending=True, stable=True).values.cumsum(dim=0)
    return min(int((cumulative <= top_p).sum()) + 1, len(probability))


@dataclass(frozen=True, kw_only=True)
class Slime(Pruner):
    """top_p: choose by probability, `keep` being the most; temperature: of the softmax before it. reduce: "mean" or
    "sum" over the words. thumbnail: "filtered" by itself, or kept "whole" while the crops share the rest.
    """

    name = "slime"
    summary = "tokens that resemble the words of the question; experimental without SliME's training"
    paper = "arXiv:2406.08487"
    uses_text = True
    top_p: float | None = None
    temperature: float = 1.0
    reduce: Literal["mean", "sum"] = "mean"
    thumbnail: Literal["filtered", "whole"] = "filtered"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r}: a probability in (0, 1], or leave it out")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r}: a positive number")
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"reduce={self.reduce!r}: choose 'mean' or 'sum'")
        if self.thumbnail not in ("filtered", "whole"):
            raise ValueError(f"thumbnail={self.thumbnail!r}: choose 'filtered' or 'whole'")

    def remarks(self, pictures: Sequence[ImageReport]) -> tuple[str, ...]:
        """Say that `top_p` decides how many tokens stay."""
        about = super().remarks(pictures)
        if self.top_p is None:
            return about
        return (*about, f"{self.name}: top_p={self.top_p} decides how many tokens stay, keep={self.keep} at the most")

    def choose(self, visual: VisualTokens) -> Choice:
        """As every pruner; with `top_p`, keep=1.0 is no reason to keep everything."""
        if self.top_p is None:
            return super().choose(visual)
        return Choice(self.select(visual).sort().values)

    def select(self, visual: VisualTokens) -> Tensor:
        """Features [N, D] and text [T, D] -> kept [budget], or fewer with `top_p`."""
        if visual.text is None or not len(visual.text):
            raise ValueError(f"{self.name} chooses by the question, and this prompt has no text beside its pictures")
        score = text_similarity(visual.features, visual.text.to(visual.features.device), self.reduce)

        def choose(index: Tensor, k: int) -> Tensor:
            own = score[index]
            if self.top_p is not None:
                k = min(k, nucleus((own / self.temperature).softmax(dim=0), self.top_p))
            return top(own, k)

        return self.beside_thumbnail(visual, choose, whole=self.thumbnail == "whole")
