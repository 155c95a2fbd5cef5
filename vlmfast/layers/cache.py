"""Door 2, what each decoder layer holds: the columns of its keys, and the masks that belong to them.

Columns count the tokens of the prompt as the first layer gets it, then those that came later. A layer behind a cut
holds only some of them, in ascending order, padded on one side where rows of a batch keep different numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LAYERS = "vlmfast_layers"  # on a cache: its LayerState


@dataclass(frozen=True)
class Stage:
    """What the layers from `first` on hold of a prompt.

    columns: [B, C] ascending among the live ones; live: [B, C] False for padding; whole: all are live. shift: [B] what
    positions of later tokens fall by in these layers, None: positions stay as they are.
    """

    first: int
    columns: Tensor
    live: Tensor
    whole: bool
    shift: Tensor | None = None


@dataclass
class LayerState:
    """What a cache remembers of the prompts it holds.

    seen: columns of the prompts, which the first layer holds in full. stages: by first layer, ascending. mask: [B, n]
    real tokens among the first n columns, None: all. Columns behind it are real.
    """

    seen: int
    stages: list[Stage] = field(default_factory=list)
    mask: Tensor | None = None

    def stage(self, layer: int) -> Stage | None:
        """What a layer holds; None: everything."""
        behind = [stage for stage in self.stages if stage.first <= layer]
        return behind[-1] if behind else None

    def later(self, count: int, like: Tensor) -> Tensor:
        """Real tokens among the first `count` columns behind the prompts. [B, count] or [1, count], bool"""
        if self.mask is None:
            return torch.ones(1, count, dtype=torch.bool, device=like.device)
        known = self.mask[:, self.seen : self.seen + count].bool().to(like.device)
        return torch.nn.functional.pad(known, (0, count - known.shape[1]), value=True)


def layer_state(cache: Any, decoding: bool = False) -> LayerState | None:
    """The state a cache carries; one left over from before a reset is removed.

    decoding: one token follows the others, so that a static cache, whose length is on the device, need not be read.
    """
    state = getattr(cache, LAYERS, None)
    if state is None:
        return None
    held = cache.get_seq_length()
    if not (decoding and isinstance(held, Tensor)) and int(held) == 0:
        delattr(cache, LAYERS)
        return None
    return state


def sizes(cache: Any, new: int, layer: int) -> tuple[int, int]:
    """How many keys a layer returns for `new` tokens, and how many it has forgotten before them."""
    if cache is None:
        return new, 0
    length, offset = cache.get_mask_sizes(new, layer)
    return int(length), int(offset)


def window_of(config: Any, layer: int) -> int | None:
    """Width of a decoder layer's sliding window, None where it has none."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types is not None and types[layer] != "sliding_attention"):
        return None
    return int(window)


def as_given(visible: Tensor, keys: Tensor, given: Any, implementation: str, dtype: torch.dtype) -> Tensor:
    """A mask in the form the layer's attention takes.

    visible: [B, 1, Q, K] bool; keys: [B, K] bool. given: the mask that the model made, whose form counts; None: the
    form of the implementation (flash attention takes keys alone, eager an additive mask).
    """
    if given is None:
        flat, additive = "flash" in implementation, implementation == "eager"
    else:
        flat, additive = given.ndim == 2, given.is_floating_point()
    if flat:
        return keys if given is None or given.dtype == torch.bool else keys.to(given.dtype)
    if not additive:
        return visible
    dtype = dtype if given is None else given.dtype
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def prompt_mask(
    given: Tensor | None,
    index: Tensor,
    live: Tensor,
    held: int,
    mask: Tensor | None,
    full: tuple[int, int],
    now: tuple[int, int],
    implementation: str,
    dtype: torch.dtype,
) -> Tensor:
    """The mask of a layer that gets only some of a prompt's tokens, cut out of the one made for all.

    given: [B, K], [B, 1, L, K] or None (causal). index, live: [B, M] tokens of the new L that it gets. held: columns
    that every layer held before; mask: [B, held + L] real tokens. full, now: `sizes` of the layer for L and for M.
    """
    rows, device = len(index), index.device
    given = None if given is None else given.to(device)
    (length, offset), (_, first) = now, full
    before = torch.arange(held, device=device).expand(rows, -1)
    columns = torch.cat([before, held + index], dim=1)
    real = before.new_ones(rows, held, dtype=torch.bool) if mask is None else mask[:, :held].bool()
    keys = torch.cat([real.expand(rows, -1), live], dim=1)
    more = offset + length - columns.shape[1]
    columns = torch.nn.functional.pad(columns, (0, more))[:, offset:]
    keys = torch.nn.functional.pad(keys, (0, more), value=False)[:, offset:]
    keys = keys & (columns >= first)
    columns = (columns - first).clamp(min=0)
    if given is not None and given.ndim == 2:
        kept = given.expand(rows, -1).gather(1, columns)
        return kept.masked_fill(~keys, 0)
    if given is None:
        if "flash" in implementation:
            return keys
        slots = torch.arange(offset, offset + length, device=device)
        order = held + torch.arange(index.shape[1], device=device)
        visible = (slots <= order[:, None])[None, None] & keys[:, None, None]
    else:
        part = given.expand(rows, -1, -1, -1)
        part = part.gather(2, index[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3]))
        part = part.gather(3, columns[:, None, None].expand(-1, part.shape[1], part.shape[2], -1))
        if part.dtype != torch.bool:
            part = part.masked_fill(~keys[:, None, None], torch.finfo(part.dtype).min)
            return part
        visible = part & keys[:, None, None]
    # A query of padding must see something, or its softmax is not a number: itself.
    own = held - offset + torch.arange(index.shape[1], device=device)
    itself = (torch.arange(length, device=device) == own[:, None]) & ~live[:, :, None]
    return as_given(visible | itself[:, None], keys, given, implementation, dtype)


def later_mask(
    given: Tensor | None,
    state: LayerState,
    stage: Stage,
    held: Any,
    new: int,
    now: tuple[int, int],
    window: int | None,
    implementation: str,
    dtype: torch.dtype,
) -> Tensor | None:
    """The mask of a layer behind a cut for tokens that follow the prompt: causal, in columns of the first layer.

    held: columns that the first layer holds (an int, or a tensor of a static cache). now: `sizes` of the layer.
    """
    if given is None and new == 1 and stage.whole and (window is None or held + new <= window):
        return None
    length, offset = now
    device, count = stage.columns.device, stage.columns.shape[1]
    more = max(0, offset + length - count)
    rows = len(stage.columns)
    later = (state.seen + torch.arange(more, device=device)).expand(rows, -1)
    columns = torch.cat([stage.columns, later], dim=1)[:, offset : offset + length]
    keys = torch.cat([stage.live, state.later(more, stage.live).expand(rows, -1)], dim=1)[:, offset : offset + length]
    query = (held + torch.arange(new, device=device))[:, None]
    visible = columns[:, None] <= query
    if window is not None:
        visible = visible & (columns[:, None] > query - window)
    keys = keys & (columns <= query[-1])
    visible = (visible & keys[:, None])[:, None]
    return as_given(visible, keys, given, implementation, dtype)
