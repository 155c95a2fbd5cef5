"""Every decoder's cost against torch's own counter: prefill, decoding and cache, to the last unit and byte."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, DynamicCache

from vlmfast.cost import kv_bytes, prefill_flops, prompt_cost
from vlmfast.decoders import CHUNK, FEED_FORWARD, Attention, DeltaRule, decoder

SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 99, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
PLAIN = {name: value for name, value in SIZES.items() if name != "head_dim"}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.6
    },
}  # fmt: skip
SLIDING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "llama, heads that share nothing": ("llama", PLAIN | {"num_key_value_heads": 6}),
    "mistral": ("mistral", SIZES | {"sliding_window": None}),
    "mistral, every layer slides": ("mistral", SIZES | {"sliding_window": 7}),
    "ministral": ("ministral", SIZES | SLIDING),
    "ministral3": ("ministral3", SIZES),
    "qwen2": ("qwen2", PLAIN),
    "qwen2, the last layers slide": (
        "qwen2",
        PLAIN | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2_vl_text": ("qwen2_vl_text", PLAIN | MROPE),
    "qwen2_5_vl_text": ("qwen2_5_vl_text", PLAIN | MROPE),
    "qwen3": ("qwen3", SIZES),
    "qwen3_moe": ("qwen3_moe", SIZES | EXPERTS),
    "qwen3_vl_text": ("qwen3_vl_text", SIZES | MROPE),
    "qwen3_vl_moe_text": ("qwen3_vl_moe_text", SIZES | EXPERTS | MROPE),
    "qwen3_vl_moe_text, dense layers between": (
        "qwen3_vl_moe_text",
        SIZES | EXPERTS | MROPE | {"mlp_only_layers": [0], "decoder_sparse_step": 1},
    ),
    "qwen3_5_text": ("qwen3_5_text", SIZES | LINEAR),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", SIZES | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 40}),
    "gemma": ("gemma", SIZES),
    "gemma2": ("gemma2", SIZES | SLIDING),
    "gemma3_text": ("gemma3_text", SIZES | SLIDING),
}


def text_model(case: str) -> Any:
    """A tiny decoder without a head, eager in attention and experts."""
    name, settings = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **settings)
    return AutoModel.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()


def count(work: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def held_bytes(cache: DynamicCache) -> int:
    """Bytes of everything the cache holds."""
    tensors = []
    for layer in cache.layers:
        tensors += [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
        for states in (getattr(layer, "conv_states", None), getattr(layer, "recurrent_states", None)):
            tensors += list(states.values() if isinstance(states, dict) else states or [])
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("length", [5, 20, 2 * CHUNK + 3])
@pytest.mark.parametrize("case", CASES)
def test_decoder_equals_torchs_counter(case, length):
    model, steps = text_model(case), 3
    config = model.config
    cache = DynamicCache(config=config)

    def forward(new: int) -> None:
        done = cache.get_seq_length()
        model(
            input_ids=torch.full((1, new), 5),
            attention_mask=torch.ones(1, done + new, dtype=torch.long),
            position_ids=torch.arange(done, done + new)[None],
            past_key_values=cache,
        )

    analytic = prompt_cost(config, text=length, generated=1 + steps, kv_dtype=torch.float32)
    assert count(lambda: forward(length)) == analytic.prefill == prefill_flops(config, length)
    assert held_bytes(cache) == analytic.kv_bytes == kv_bytes(config, length, torch.float32)
    assert count(lambda: [forward(1) for _ in range(steps)]) == analytic.decode - steps * analytic.head


def test_every_decoder_is_tested():
    assert {name for name, _ in CASES.values()} == set(FEED_FORWARD)


def test_layers_differ_where_they_should():
    shapes = {case: decoder(text_model(case).config) for case in CASES}
    assert [layer.router for layer in shapes["qwen3_vl_moe_text, dense layers between"].layers] == [0, 5, 5]
    assert [type(layer.mixer) for layer in shapes["qwen3_5_text"].layers] == [DeltaRule, Attention, DeltaRule]
    assert [layer.mixer.window for layer in shapes["gemma3_text"].layers] == [7, None, 7]
    assert [layer.mixer.window for layer in shapes["qwen2, the last layers slide"].layers] == [None, 7, 7]


def test_unknown_text_models_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="no cost model for the text model 'gpt2'.*llama"):
        decoder(AutoConfig.for_model("gpt2"))
    config = AutoConfig.for_model("llama", **SIZES)
    config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(NotImplementedError, match="chunked_attention layers of llama"):
        decoder(config)


def test_gate_doubles_the_query_projection():
    plain = Attention(query=12, key=4)
    gated = dataclasses.replace(plain, gated=True)
    assert gated.flops(8, 3, 3) - plain.flops(8, 3, 3) == 2 * 8 * 12 * 3


def test_statistics_count_rows_and_what_is_projected_for_them():
    attention, linear = (decoder(text_model("qwen3_5_text").config).layers[i] for i in (1, 0))
    assert attention.statistic(3, 7) == 2 * 60 * 3 * 7
    assert attention.statistic(3, 7, apart=True) == 2 * 60 * 3 * 7 + 2 * 48 * (60 * 3 + 20 * 7)
    with pytest.raises(NotImplementedError, match="no attention map"):
        linear.statistic(1, 7)
