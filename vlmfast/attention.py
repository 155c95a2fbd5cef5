"""Door 3: statistics of an attention layer without its map (and the way in for edits, see vlmfast.edits).

A chosen attention module gets its own shallow copy of the config, whose implementation name is ours. The function
behind that name calls the implementation the model itself uses (sdpa, flash, eager, ...) for the output, unchanged,
and adds the statistic from q and k. Other layers keep their own path. Statistics are computed in fp32, in
blocks of rows, so that no tensor of the size of the map ever exists.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from vlmfast import kernels
from vlmfast.visual import Score

if TYPE_CHECKING:
    from vlmfast.patching import Patch

PREFIX = "vlmfast|"
# Entries of the attention held at a time. On a CPU a block that stays in the cache is a third faster than a larger
# one; elsewhere few large launches are faster than many small ones.
ENTRIES_CPU, ENTRIES = 2**18, 2**24
KEYWORD = "vlmfast_taps"
EDIT = "vlmfast_edit"  # keyword of an attention call: the `vlmfast.edits.turn.Turn` of a method that edits it

_users: Counter[str] = Counter()  # how many open patches use a registered name; the last one removes it


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: slice,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softmax: bool = True,
) -> Tensor:
    """Rows of the attention map, fp32. query: [B, H, Q, d], key: [B, H_kv, K, d] -> [B, H, R, K].

    mask: None, bool (True = visible) or additive, broadcastable to [B, H, Q, K]; causal: hide keys after the query,
    the last query seeing the last key. Hidden entries are 0 after the softmax and -inf before it.
    """
    heads, kv_heads, n_query, n_key = query.shape[1], key.shape[1], query.shape[2], key.shape[2]
    picked = query[:, :, rows].float() * scaling
    grouped = picked.reshape(picked.shape[0], kv_heads, -1, picked.shape[-1])  # GQA without repeating the keys
    logits = (grouped @ key.float().transpose(-1, -2)).view(picked.shape[0], heads, picked.shape[2], n_key)
    if mask is not None:
        part = mask[..., rows, :n_key] if mask.shape[-2] != 1 else mask[..., :n_key]
        logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part
    if causal:
        position = torch.arange(n_query, device=query.device)[rows] + n_key - n_query
        logits = logits.masked_fill(torch.arange(n_key, device=query.device) > position[:, None], -torch.inf)
    return logits.softmax(dim=-1) if softmax else logits


def column_mean(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softmax: bool = True,
) -> Tensor:
    """Attention received by each key: mean over heads and over all query rows, fp32. -> [B, K]

    Before the softmax, the mean is over the rows that see the key (-inf where none does).
    """
    (batch, heads, n_query, _), kv_heads, n_key = query.shape, key.shape[1], key.shape[2]
    if softmax and kernels.usable(query, key):
        places = torch.arange(n_key - n_query, n_key, device=query.device) if causal else None
        sums: Tensor = kernels.launcher().column_sums(query, key, scaling, mask, places=places)[0]
        return sums.sum(dim=1) / (heads * n_query)
    on_cpu = query.device.type == "cpu"
    step = 1 if on_cpu else kv_heads  # key heads at a time, with all their query heads
    group = heads // kv_heads
    rows = max(1, (ENTRIES_CPU if on_cpu else ENTRIES) // (batch * step * group * n_key))
    total = query.new_zeros(batch, n_key, dtype=torch.float32)
    seen = torch.zeros_like(total)
    for first in range(0, kv_heads, step):
        part = slice(first * group, (first + step) * group)
        q, k = query[:, part], key[:, first : first + step].float()
        own = mask[:, part] if mask is not None and mask.shape[1] > 1 else mask
        for start in range(0, n_query, rows):
            block = attention_rows(q, k, slice(start, start + rows), scaling, own, causal, softmax)
            if softmax:
                total += block.sum(dim=(1, 2))
            else:
                hidden = block.isneginf()
                total += block.masked_fill(hidden, 0).sum(dim=(1, 2))
                seen += (~hidden).sum(dim=(1, 2))
    return total / (heads * n_query) if softmax else (total / seen).masked_fill(seen == 0, -torch.inf)


def row_mean(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softmax: bool = True,
    keys: slice = slice(None),
) -> Tensor:
    """Mean of each query's row over the `keys` it sees, mean over heads, fp32. -> [B, Q]

    The softmax runs over all keys, whichever are averaged.
    """
    (batch, heads, n_query, _), n_key = query.shape, key.shape[2]
    rows = max(1, (ENTRIES_CPU if query.device.type == "cpu" else ENTRIES) // (batch * heads * n_key))
    parts = []
    for start in range(0, n_query, rows):
        block = attention_rows(query, key, slice(start, start + rows), scaling, mask, causal, softmax)[..., keys]
        hidden = block.isneginf()
        seen = (~hidden).sum(dim=-1).clamp(min=1)
        parts.append((block.masked_fill(hidden, 0).sum(dim=-1) / seen).mean(dim=1))
    return torch.cat(parts, dim=1)


def statistic(
    score: Score, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """The statistic `score` names, over one attention call: [B, H, Q, d], [B, H_kv, K, d] -> [B, K], fp32.

    `key` gives [B, K, d]. With `score.patches` token 0 is CLS, and its value is 0.
    """
    if score.kind == "key":
        return key.float().mean(dim=1)
    if score.kind in ("column_mean", "row_mean"):
        if not score.patches:
            mean = column_mean if score.kind == "column_mean" else row_mean
            return mean(query, key, scaling, mask, causal, score.softmax)
        if mask is not None or causal:
            raise NotImplementedError("statistics over patches alone are for towers without a mask")
        if score.kind == "column_mean":
            means = column_mean(query[:, :, 1:], key, scaling, softmax=score.softmax)[:, 1:]
        else:
            means = row_mean(query[:, :, 1:], key, scaling, softmax=score.softmax, keys=slice(1, None))
        return nn.functional.pad(means, (1, 0))
    rows = slice(0, 1) if score.kind == "cls_row" else slice(query.shape[2] - 1, query.shape[2])
    return attention_rows(query, key, rows, scaling, mask, causal, score.softmax).mean(dim=1)[:, 0]


@dataclass
class Taps:
    """Collects statistics of one forward pass; travels to the layers through the keyword arguments of the forward.

    collected[score] holds one [B, K] tensor (vectors: [B, K, c]) per attention call of that layer (towers with windows
    make several). cuts: where the pictures begin and end, [0, ..., Q], in a tower that sees all pictures of a call as
    one sequence with a mask between them: one tensor a picture then.
    """

    wanted: dict[int, list[Score]]  # id of the attention module, or of the block -> what to take there
    collected: dict[Score, list[Tensor]] = field(default_factory=dict)
    closed: bool = False  # set when read: a later recomputation (gradient checkpointing) takes nothing again
    cuts: Sequence[int] | None = None

    @torch.no_grad()
    def observe(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float,
        kwargs: dict[str, Any],
    ) -> None:
        """Take the statistics wanted of `module` from one attention call."""
        if self.closed:
            return
        causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", False) if causal is None else causal) and mask is None
        bounds = kwargs.get("cu_seq_lens_q")  # one call over a packed batch (flash attention of windowed towers)
        cuts = [0, query.shape[2]] if bounds is None else bounds.tolist()
        packed = bounds is not None
        if self.cuts is not None:
            cuts, packed, mask = self.cuts, True, None
        for score in self.wanted.get(id(module), ()):
            for start, stop in zip(cuts[:-1], cuts[1:]):
                part = query[:, :, start:stop], key[:, :, start:stop] if packed else key
                self.collected.setdefault(score, []).append(statistic(score, *part, scaling, mask, causal))


_current: ContextVar[Taps | None] = ContextVar("vlmfast_taps", default=None)


@contextmanager
def observing(taps: Taps) -> Iterator[None]:
    """Let `taps` see what runs inside, also in towers that hand their layers no keyword arguments."""
    token = _current.set(taps)
    try:
        yield
    finally:
        _current.reset(token)


def taps_of(kwargs: dict[str, Any]) -> Taps | None:
    """The `Taps` of a pass: from the keyword arguments of a layer, which lose them, or from around the pass."""
    given: Taps | None = kwargs.pop(KEYWORD, None)
    return _current.get() if given is None else given


def tapped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, plus the statistics its `Taps` want, or edited by the method whose turn it is."""
    taps, turn = taps_of(kwargs), kwargs.pop(EDIT, None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if taps is not None:
        taps.observe(module, query, key, attention_mask, scale, kwargs)
    own = module.config.vlmfast_original._attn_implementation
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
    if turn is None:
        return attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if dropout:
        raise NotImplementedError("edited attention with attention dropout: set the config's attention_dropout to 0")

    def plain(query: Tensor = query, mask: Tensor | None = attention_mask) -> Tensor:
        output: Tensor = attend(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)[0]
        return output

    return turn.attend(module, query, key, value, attention_mask, scale, plain, kwargs), None


def tap(patch: Patch, modules: Sequence[Any]) -> None:
    """Let `Taps` observe these attention modules for as long as the patch is open. Twice is as good as once."""
    for module in modules:
        original = module.config
        if hasattr(original, "vlmfast_original"):  # images and videos may share a tower
            continue
        own = original._attn_implementation or "eager"
        config = copy.copy(original)
        config.vlmfast_original = original
        config._attn_implementation_internal = PREFIX + own
        patch.undo(_register(own))
        patch.set(module, "config", config)


@dataclass
class _Registered:
    """Undo record of a name registered for the implementation `own`."""

    own: str

    def undo(self) -> None:
        name = PREFIX + self.own
        _users[name] -= 1
        if not _users[name]:
            del _users[name]
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _register, (self.own,)  # a copied or unpickled patch is one more user of the name


def _register(own: str) -> _Registered:
    """Register our name for the implementation `own`, with the mask function that belongs to it.

    Without its mask function transformers would silently hand over no mask at all.
    """
    name = PREFIX + own
    if not _users[name]:
        AttentionInterface.register(name, tapped_attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS.get(own, eager_mask))
    _users[name] += 1
    return _Registered(own)
