"""Golden sets of the tuners: see parity.py, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmfast.adapters.tuning import PillConfig

Case = dict[str, Any]
Arrays = Callable[[str], Tensor]
Checks = Iterator[tuple[str, Tensor, Tensor]]


def pill(case: Case, array: Arrays) -> Checks:
    """One block of the authors' model: as it is tuned, in the alignment stage, and as it begins."""
    hyper = case["hyper"]
    mask = torch.zeros(hyper["B"], hyper["T"], dtype=torch.bool)
    for row, (start, end) in enumerate(hyper["image_spans"]):
        mask[row, start:end] = True
    yield "image", mask, array("in_image_mask")
    tuned = PillBlock(hyper, array, depth=2, stage="instruction")
    block, attention = tuned(mask)
    normed = tuned.layer.input_layernorm.base_layer(array("in_h"))
    given = tuned.layer.input_layernorm(array("in_h"))
    yield "norm", normed, array("out_attn_norm")
    yield "adapter", given - normed, array("out_attn_adapter")
    yield "gate", tuned.layer.self_attn.v_proj.gate("default", given), array("out_gate")
    yield "attention", attention, array("out_attention")
    experts = tuned.layer.post_attention_layernorm
    inside = experts.base_layer(array("in_h") + attention)
    yield "visual", experts.pill_visual["default"](inside), array("out_vis_expert")
    yield "text", experts.pill_text["default"](inside), array("out_txt_expert")
    yield "block", block, array("out_block")
    yield "alignment", PillBlock(hyper, array, depth=2, stage="alignment")(mask)[0], array("out_block_pretrain")
    last = PillBlock(hyper, array, depth=1, stage="alignment")(mask)[0]
    yield "alignment, last layer", last, array("out_block_pretrain_lastlayer")
    tuned.layer.self_attn.v_proj.pill_gate["default"].weight.data.zero_()
    yield "gate zero", tuned(mask)[0], array("out_block_gate_zero")


class PillBlock:
    """The first decoder layer of a LLaVA with the authors' weights, tuned by PILL."""

    def __init__(self, hyper: dict[str, Any], array: Arrays, depth: int, stage: str) -> None:
        width, heads = hyper["D"], hyper["H"]
        text = LlamaConfig(
            vocab_size=8,
            hidden_size=width,
            intermediate_size=len(array("in_feed_forward_w1_weight")),
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
        vision = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
        )
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=7, vision_feature_layer=-1)
        settings = PillConfig(r=hyper["r"], gate_init="official", stage=stage)
        self.model = get_peft_model(LlavaForConditionalGeneration(config), settings).eval()
        self.layer = self.model.get_base_model().get_decoder().layers[0]
        self.hidden = array("in_h")
        for name, own in PILL_NAMES.items():
            weight = array(f"in_{name}_weight")
            if name in PILL_ROTATED:  # the authors turn neighbours (2i, 2i + 1), transformers turns i and d/2 + i
                weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            self.layer.get_parameter(f"{own}.weight").data.copy_(weight)

    @torch.no_grad()
    def __call__(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states behind the layer, and what its attention gives. mask: bool [B, L], visual -> [B, L, D] each"""
        seen: list[Tensor] = []
        attention = self.layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        whole = self.layer.register_forward_hook(lambda module, args, output: seen.append(output))
        base = self.model.get_base_model().model
        base(inputs_embeds=self.hidden, mm_token_type_ids=mask.long(), use_cache=False)
        attention.remove()
        whole.remove()
        return seen[1], seen[0]


PILL_ROTATED = ("attention_wq", "attention_wk")
PILL_NAMES = {  # the authors' names of a block's weights, and ours
    "attention_wq": "self_attn.q_proj",
    "attention_wk": "self_attn.k_proj",
    "attention_wv": "self_attn.v_proj.base_layer",
    "attention_wo": "self_attn.o_proj",
    "attention_vis_adapter_gate": "self_attn.v_proj.pill_gate.default",
    "feed_forward_w1": "mlp.gate_proj",
    "feed_forward_w2": "mlp.down_proj",
    "feed_forward_w3": "mlp.up_proj",
    "attention_norm": "input_layernorm.base_layer",
    "ffn_norm": "post_attention_layernorm.base_layer",
} | {
    f"{theirs}_{part}": f"{ours}.default.{own}"
    for theirs, ours in {
        "adapter_attn": "input_layernorm.pill_attn",
        "vis_adapter_ffn": "post_attention_layernorm.pill_visual",
        "txt_adapter_ffn": "post_attention_layernorm.pill_text",
    }.items()
    for part, own in {"down_sampler": "down", "down_sampler_gate": "gate", "up_sampler": "up"}.items()
}


SETS: dict[str, Callable[[Case, Arrays], Checks]] = {"pill": pill}
