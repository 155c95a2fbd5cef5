"""Training forwards through the genuine modules' weights: patches may be left out, questions share one picture.

They compute what the Hugging Face classes compute (a test compares), but batched for training: both towers take
patches already cut (``encode.image_patches``) and optionally only some of them, and the language model takes a packed
sequence of one picture and many questions, and can tell how much attention falls on given targets.

Letters: B batch, N visual tokens, n kept ones, L packed length, H heads, R supervision rows, d width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.eval.testbed.build import GRID

WINDOW = 5  # side of a Qwen tower's attention window in merged tokens
SUPERVISED_HEADS = 3


def gather(values: Tensor, kept: Tensor | None) -> Tensor:
    """Rows of values [B, N, ...] named by kept [B, n]; all of them for None."""
    if kept is None:
        return values
    index = kept.reshape(*kept.shape, *[1] * (values.dim() - 2)).expand(*kept.shape, *values.shape[2:])
    return values.gather(1, index)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention [B, H, L, d / H], joined to [B, L, d].

    Under autocast it is written out in bf16: on a CPU the backward pass of the fused kernel costs twice as much.
    """
    if torch.is_autocast_enabled(q.device.type) and q.device.type == "cpu":
        scores = (q * q.shape[-1] ** -0.5).bfloat16() @ k.bfloat16().transpose(2, 3)
        if mask is not None:
            scores = scores + mask.bfloat16()
        out = scores.softmax(-1) @ v.bfloat16()
    else:
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., d] by cos and sin of the same last dimension."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def tower_llava(model: Any, pixels: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """CLIP tower on patches [B, N, 300].

    Returns the patch features that the projector reads (layer -2) [B, n, d], the last layer's CLS [B, d] (normed), and
    the CLS attention of the layer that makes the features, mean over heads [B, n].
    """
    tower = model.model.vision_tower
    weight = tower.embeddings.patch_embedding.weight
    places = tower.embeddings.position_embedding.weight
    x = gather(pixels, kept) @ weight.flatten(1).T
    index = torch.arange(pixels.shape[1], device=x.device)[None] if kept is None else kept
    cls = (tower.embeddings.class_embedding + places[0]).expand(len(x), 1, -1)
    x = tower.pre_layrnorm(torch.cat([cls, x + places[1 + index]], 1))
    features = row = x
    layers = tower.encoder.layers
    for i, layer in enumerate(layers):
        if i == len(layers) - 1:
            features = x
        h = layer.layer_norm1(x)
        attention = layer.self_attn
        q, k, v = (
            proj(h).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if i == len(layers) - 2 and not torch.is_grad_enabled():
            row = (q[:, :, :1].float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0, 1:]
        x = x + attention.out_proj(attend(q, k, v))
        x = x + layer.mlp(layer.layer_norm2(x))
    return features[:, 1:], tower.post_layernorm(x[:, 0]), row


def tower_qwen(model: Any, pixels: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Qwen2.5-VL tower on merge groups of patches [B, N, 4, 108].

    Returns merged features [B, n, 192] and the attention each merged token receives in the last layer [B, n].
    """
    tower = model.model.visual
    grid, device = GRID["qwen2_5_vl"], pixels.device
    y, x_ = (t.flatten() for t in torch.meshgrid(*[torch.arange(grid, device=device)] * 2, indexing="ij"))
    window = y // WINDOW * (grid // WINDOW) + x_ // WINDOW
    full = kept is None
    order = window.argsort(stable=True).expand(len(pixels), -1) if full else kept
    assert order is not None
    sub = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=device)
    places = torch.stack([y, x_], -1)[order][:, :, None] * 2 + sub  # [B, n, 4, 2]
    angles = places.flatten(1, 2).unsqueeze(-1).float() * tower.rotary_pos_emb.inv_freq  # [B, 4n, 2, d/4]
    angles = angles.flatten(2).repeat(1, 1, 2)[:, None]
    cos, sin = angles.cos(), angles.sin()
    weight = tower.patch_embed.proj.weight.sum(2).flatten(1)
    x = (gather(pixels, order) @ weight.T).flatten(1, 2)
    near = None
    if not full:
        groups = window[order].repeat_interleave(4, 1)
        near = (groups[:, None, :, None] == groups[:, None, None, :]).float().sub(1).mul(1e4)
    received = x
    for i, block in enumerate(tower.blocks):
        qkv = (
            block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4).float()
        )
        q, k, v = rotate(qkv[0], cos, sin), rotate(qkv[1], cos, sin), qkv[2]
        if i in tower.fullatt_block_indexes:
            out = attend(q, k, v)
            if i == len(tower.blocks) - 1 and not torch.is_grad_enabled():
                weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
                received = weights.mean((1, 2)).unflatten(-1, (-1, 4)).sum(-1)
        elif full:
            out = torch.cat([attend(*parts) for parts in zip(*(t.chunk(4, 2) for t in (q, k, v)))], 1)
        else:
            out = attend(q, k, v, near)
        x = x + block.attn.proj(out)
        x = x + block.mlp(block.norm2(x))
    merged = tower.merger.mlp(tower.merger.ln_q(x).unflatten(1, (-1, 4)).flatten(2))
    if full:
        back = order.argsort(1)
        merged = gather(merged, back)
        received = gather(received, back) if received.shape[1] == back.shape[1] else received
    return merged, received


def see(model: Any, pixels: Tensor, kept: Tensor | None = None) -> dict[str, Tensor]:
    """The tower of either model: ``patches`` (for the patch losses), ``visual`` (for the language model), ``score``
    (CLS attention, or attention received), and ``cls`` where there is one."""
    if hasattr(model.model, "vision_tower"):
        features, cls, score = tower_llava(model, pixels, kept)
        return {"patches": features, "visual": model.model.multi_modal_projector(features), "cls": cls, "score": score}
    merged, score = tower_qwen(model, pixels, kept)
    return {"patches": merged, "visual": merged, "score": score}


@dataclass
class Rows:
    """Supervision rows for some layers: where from [B, R], targets [B, R, L], weights [B, R] (0 for padding).

    A target is a set (ones), or where ``spread`` [B, R] is true a distribution.
    """

    start: Tensor
    target: Tensor
    weight: Tensor
    spread: Tensor

    def loss(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """Minus the log of the attention that falls on the targets, or the cross-entropy to a spread target."""
        heads = SUPERVISED_HEADS
        rows = q[:, :heads].gather(2, self.start[:, None, :, None].expand(-1, heads, -1, q.shape[-1]))
        scores = rows @ k[:, :heads].transpose(2, 3) * q.shape[-1] ** -0.5
        scores = scores + mask.gather(2, self.start[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
        log = scores.log_softmax(-1)
        inside = log.masked_fill(self.target[:, None] == 0, -1e4).logsumexp(-1)
        spread = (log.clamp_min(-12) * self.target[:, None]).sum(-1)
        loss = -torch.where(self.spread[:, None], spread, inside.clamp_min(-12)) * self.weight[:, None]
        return loss.sum() / (heads * self.weight.sum().clamp_min(1))


def language(
    model: Any, embeds: Tensor, positions: Tensor, first: int, mask: Tensor, rows: dict[int, Rows]
) -> tuple[Tensor, Tensor]:
    """The language model on embeds [B, L, d], the first ``first`` tokens shared by all questions that follow (T).

    ``mask`` [B, 1, T, L] is what is added to the text's scores, positions [B, L] or [3, B, L]. Returns the normed
    hidden states of the text [B, T, d] and the attention loss summed over the supervised layers.
    """
    text = model.model.language_model
    cos, sin = (t.unsqueeze(1).float() for t in text.rotary_emb(embeds.float(), positions))
    x, loss = embeds, embeds.new_zeros(())
    for i, layer in enumerate(text.layers):
        h, attention = layer.input_layernorm(x), layer.self_attn
        last = i == len(text.layers) - 1
        asking = h[:, first:] if last else h
        k, v = (proj(h).unflatten(-1, (-1, attention.head_dim)) for proj in (attention.k_proj, attention.v_proj))
        q = attention.q_proj(asking).unflatten(-1, (-1, attention.head_dim))
        q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
        q, k = rotate(q, cos[:, :, -q.shape[2] :], sin[:, :, -q.shape[2] :]), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(attention.num_key_value_groups, 1) for t in (k, v))
        late = q if last else q[:, :, first:]
        if i in rows:
            loss = loss + rows[i].loss(late, k, mask)
        out = attend(late, k, v, mask)
        if last:
            x = x[:, first:]
        else:
            causal = torch.full((first, first), -1e4, device=q.device).triu(1)
            out = torch.cat([attend(q[:, :, :first], k[:, :, :first], v[:, :, :first], causal), out], 1)
        x = x + attention.o_proj(out)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return text.norm(x), loss
