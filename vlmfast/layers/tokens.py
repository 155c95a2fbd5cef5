"""Door 2, what a method sees: the visual tokens of one picture on their way into a decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vlmfast.visual import VisualTokens


@dataclass(frozen=True)
class LayerScore:
    """A statistic of one decoder layer's attention, fp32, over all tokens of a prompt that the layer holds.

    kind: "attention" of some queries, softmax over all keys; "key_norm": L1 norm of each key, all key heads together,
        before the rotary embedding (behind it an L1 norm would tell of the position, padding included).
    queries: "last": the last token of the prompt (in training every token before an answer begins); "question": the
        text after the last picture; "chosen": those of the question that the method's `raters` name; "all".
    reduce: "mean": over heads and queries [n]; "rows": over heads [R, n]; "heads": over queries [H, n].
    own: of the layer the tokens are about to enter, whose queries and keys are computed before it runs; False: of the
        layer they come from, taken while it runs.
    """

    kind: Literal["attention", "key_norm"] = "attention"
    queries: Literal["last", "question", "chosen", "all"] = "last"
    reduce: Literal["mean", "rows", "heads"] = "mean"
    own: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerTokens:
    """The visual tokens of one picture between two decoder layers, and the text they share a prompt with.

    layer: 0-based layer they are about to enter, of `depth`. hidden: [n, D] their hidden states, in the order of the
    prompt. text: [T, D] hidden states of the prompt's text tokens; question: [T] which of them come after the last
    picture (all, where none does). index: [n] which of the picture's own tokens
    (`visual`) each one is; `visual.grid`, `visual.views` tell where these lie. total: how many reached the language
    model. keep: how many the method announced to leave (`left`), None where it decides only now.
    scores, text_scores: the statistics asked for, over the picture's tokens [..., n] and over the text [..., T].
    final_norm: the norm behind the decoder's last layer. ordered: only the order of tokens counts (positions on one
    axis, renumbered), so that a merged token may stand anywhere. memory: what the method noted at earlier layers for
    this picture of this prompt.
    """

    layer: int
    depth: int
    hidden: Tensor
    text: Tensor
    question: Tensor
    index: Tensor
    visual: VisualTokens
    total: int
    keep: int | None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    text_scores: Mapping[str, Tensor] = field(default_factory=dict)
    final_norm: Any = None
    ordered: bool = False
    memory: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def budget(self) -> int:
        """`keep`, for methods that always announce it."""
        if self.keep is None:
            raise ValueError(f"no number of tokens was announced for layer {self.layer}")
        return self.keep


@dataclass(frozen=True)
class Cut:
    """What stays of the tokens of a picture.

    kept: [K] ascending, which of the n tokens stay. merge: [n] the place (0..K-1) whose mean each token joins, -1 for
    none; None: every kept token stays itself. index: [K] which of the picture's own tokens stands at each place; None:
    the token kept there. final: no token of this picture goes later, so that the method need not be asked.
    """

    kept: Tensor
    merge: Tensor | None = None
    index: Tensor | None = None
    final: bool = False


class LayerSelector(Protocol):
    """What door 2 needs of a method that drops visual tokens between decoder layers."""

    @property
    def name(self) -> str:
        """As in its spec."""
        ...

    @property
    def fixed(self) -> bool:
        """Whether the layers were set by hand, and none may be left out."""
        ...

    def layers(self, depth: int) -> tuple[int, ...]:
        """Before which layers of `depth` tokens are dropped: ascending, 1 or more. Raises ValueError for others."""
        ...

    def left(self, layer: int, total: int, depth: int) -> int | None:
        """How many of a picture's `total` tokens are to enter `layer`; None: decided only when it is reached."""
        ...

    def asks(self, layer: int) -> Mapping[str, LayerScore]:
        """The statistics needed to cut before `layer`, under the method's own names."""
        ...

    def raters(self, visual: Tensor, question: Tensor) -> Tensor:
        """Which tokens of the question rate the visual tokens. Input embeddings [N, D], [T, D] -> indices [R]."""
        ...

    def cut(self, tokens: LayerTokens) -> Cut:
        """What stays of one picture. Only asked where tokens have to go."""
        ...


@dataclass
class Placed:
    """One picture in the prompt that the language model gets.

    row: of the batch. number: among the pictures of its prompt. columns: [n] of the prompt, where its tokens stand;
    index: [n] which of the picture's tokens; others: [m] columns of its newlines.
    """

    row: int
    number: int
    visual: VisualTokens
    columns: Tensor
    index: Tensor
    others: Tensor


@dataclass
class Prompt:
    """What the inputs door tells the layers door of one forward, under the keyword PROMPT.

    mask: [B, held + L] 1 for real tokens, None: all are. labels: [B, L] in training. pictures: of all rows. rows: what
    the inputs door reports of the prompts, one entry for each `repeat` rows of the batch, and completed by door 2.
    """

    mask: Tensor | None = None
    labels: Tensor | None = None
    pictures: list[Placed] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    repeat: int = 1

    def queries(self, real: Tensor) -> Tensor:
        """The tokens that stand for the instruction: the last of each row, or all before an answer. [B, L] bool

        real: [B, L] tokens that are not padding.
        """
        last = real & (real.flip(1).long().cumsum(1).flip(1) == 1)
        if self.labels is None:
            return last
        answer = self.labels.to(real.device) != -100
        before = real & ~answer & torch.nn.functional.pad(answer[:, 1:], (0, 1))
        return torch.where(before.any(1, keepdim=True), before, last)


PROMPT = "vlmfast_prompt"
