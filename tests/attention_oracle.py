"""An oracle for attention edits: the same model with full attention maps, changed as a whole by a plain function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

NAME = "oracle"
Edit = Callable[[int, Tensor, Tensor], Tensor]


@contextmanager
def full_maps(model: Any, edit: Edit, before_softmax: bool = False) -> Iterator[None]:
    """Run the decoder of an unpatched model on full maps, each replaced by `edit(layer, map, hidden)`.

    map: [B, H, Q, K] fp32 after the softmax, or the masked scores before it (hidden entries -inf); hidden: [B, Q, D],
    the layer's input. Rows of padding are whatever they are.
    """
    decoder = model.model.get_decoder()
    inputs: dict[int, Tensor] = {}

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        group = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(group, 1).float(), value.repeat_interleave(group, 1).float()
        scores = query.float() @ keys.transpose(-1, -2) * scale
        if attention_mask is not None:
            hidden = attention_mask[..., : keys.shape[2]] <= torch.finfo(attention_mask.dtype).min / 2
            scores = scores.masked_fill(hidden, -torch.inf)
        if before_softmax:
            shown = edit(module.layer_idx, scores, inputs[module.layer_idx]).softmax(-1)
        else:
            shown = edit(module.layer_idx, scores.softmax(-1).nan_to_num(0.0), inputs[module.layer_idx])
        return (shown.nan_to_num(0.0) @ values).to(query.dtype).transpose(1, 2).contiguous(), None

    def remember(number: int) -> Any:
        def hook(layer, args, kwargs):
            inputs[number] = args[0] if args else kwargs["hidden_states"]

        return hook

    hooks = [
        layer.register_forward_pre_hook(remember(number), with_kwargs=True)
        for number, layer in enumerate(decoder.layers)
    ]
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    configs = [decoder.config, model.config.get_text_config()]
    configs += [layer.self_attn.config for layer in decoder.layers if hasattr(layer, "self_attn")]
    before = [(one, one._attn_implementation_internal) for one in configs]
    try:
        for one in configs:
            one._attn_implementation_internal = NAME
        yield
    finally:
        for one, own in before:
            one._attn_implementation_internal = own
        for hook in hooks:
            hook.remove()
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)
