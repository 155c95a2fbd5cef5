"""The cost model against torch's own counter, against published figures, and at its edges."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
)

from vlmfast import cost
from vlmfast.adapters import from_spec
from vlmfast.cost import kv_bytes, nominal_grid, prefill_flops, prompt_cost, visual_tokens
from vlmfast.encoding import encode_images
from vlmfast.families import family_of
from vlmfast.visual import Score

DATA = json.loads((Path(__file__).parent / "data" / "flops_rows.json").read_text())
LLAVA = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 99}
QWEN = {
    "model_type": "qwen2_5_vl_text",
    **LLAVA,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def llava(text: Any = None, **settings: Any) -> LlavaConfig:
    clip = CLIPVisionConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
    )
    text = text or Qwen2Config(**LLAVA, **HEADS)
    return LlavaConfig(vision_config=clip, text_config=text, image_token_index=98, image_seq_length=16, **settings)


def qwen2_5_vl(**settings: Any) -> Qwen2_5_VLConfig:
    tower = {"depth": 4, "hidden_size": 32, "intermediate_size": 36, "num_heads": 4, "patch_size": 4}
    tower |= {"window_size": 24, "out_hidden_size": 48, "fullatt_block_indexes": [1, 3]} | settings
    return Qwen2_5_VLConfig(
        text_config={**QWEN, **HEADS}, vision_config=tower, image_token_id=98, video_token_id=97,
        vision_start_token_id=96, vision_end_token_id=95,
    )  # fmt: skip


def llava_full(**settings: Any) -> LlavaConfig:
    return llava(vision_feature_layer=[0, -1], vision_feature_select_strategy="full", **settings)


def llama_text() -> LlavaConfig:
    return llava(LlamaConfig(**LLAVA, **HEADS, head_dim=10))


CASES = {
    "llava": (llava(), [(1, 4, 4)]),
    "llava, two images": (llava(), [(1, 4, 4), (1, 4, 4)]),
    "llava, CLS kept, two feature layers": (llava_full(), [(1, 4, 4)]),
    "llava, head width of its own": (llama_text(), [(1, 4, 4)]),
    "qwen2_5_vl, windows cut at the border": (qwen2_5_vl(), [(1, 10, 8)]),
    "qwen2_5_vl, windows that fit": (qwen2_5_vl(), [(1, 12, 6)]),
    "qwen2_5_vl, frames and two sizes": (qwen2_5_vl(), [(2, 8, 14), (1, 4, 4)]),
}


def build(config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def image_inputs(config: Any, images: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    if config.model_type == "llava":
        return {"pixel_values": torch.randn(len(images), 3, 28, 28)}
    tower = config.vision_config
    size = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    patches = sum(t * h * w for t, h, w in images)
    return {"pixel_values": torch.randn(patches, size), "image_grid_thw": torch.tensor(images)}


def count(work: Any, module: str = "Global") -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return sum(counter.get_flop_counts()[module].values()) if module in counter.get_flop_counts() else 0


@pytest.mark.parametrize("case", CASES)
def test_vision_equals_torchs_counter(case):
    config, images = CASES[case]
    model, inputs = build(config), image_inputs(config, images)
    analytic = prompt_cost(config, text=5, images=images)
    counted = count(lambda: model.model.get_image_features(**inputs))
    assert analytic.tower + analytic.projector == counted
    merger = model.model.multi_modal_projector if config.model_type == "llava" else model.model.visual.merger
    seen: list[torch.Tensor] = []
    handle = merger.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        features = model.model.get_image_features(**inputs).pooler_output
    handle.remove()
    assert analytic.projector == count(lambda: merger(seen[0]))
    assert [len(f) for f in features] == [visual_tokens(config, grid) for grid in images]


@pytest.mark.parametrize("case", CASES)
def test_language_model_equals_torchs_counter(case):
    config, images = CASES[case]
    model, text, steps = build(config), 5, 3
    kept = [visual_tokens(config, grid) // 2 for grid in images]
    length = text + sum(kept)
    analytic = prompt_cost(config, text=text, images=images, kept=kept, generated=1 + steps, kv_dtype=torch.float32)
    cache = DynamicCache()
    ids = torch.full((1, length), 5)

    def forward(new: int) -> None:
        done = cache.get_seq_length()
        positions = torch.arange(done, done + new)[None]
        mask = torch.ones(1, done + new, dtype=torch.long)
        model(
            input_ids=ids[:, :new],
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            logits_to_keep=1,
        )

    assert count(lambda: forward(length)) == analytic.prefill + analytic.head
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == analytic.kv_bytes == kv_bytes(config, length, torch.float32)
    assert count(lambda: [forward(1) for _ in range(steps)]) == analytic.decode
    assert prefill_flops(config, length) == analytic.prefill
    assert analytic.total == analytic.total_prefill + analytic.decode


@pytest.mark.parametrize("case", ["llava", "qwen2_5_vl, windows cut at the border"])
def test_generate_equals_torchs_counter(case):
    """`generate` of an unpatched model runs the head on the last position only and one step less than its tokens."""
    config, images = CASES[case]
    model, inputs = build(config), image_inputs(config, images)
    visual = visual_tokens(config, images[0])
    ids = torch.tensor([[4, 5, 96, *[98] * visual, 95, 6, 7]])
    kinds = {} if config.model_type == "llava" else {"mm_token_type_ids": (ids == 98).int()}
    text = ids.shape[1] - visual
    counted = count(
        lambda: model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, **kinds, max_new_tokens=4, min_new_tokens=4
        )
    )
    assert counted == prompt_cost(config, text=text, images=images, generated=4).total


def test_layers_may_hold_different_numbers_of_visual_tokens():
    config, images = CASES["llava"]
    layered = prompt_cost(config, text=5, images=images, visual_per_layer=[16, 8, 4], generated=3)
    alone = [prompt_cost(config, text=5, images=images, kept=[n], generated=3) for n in (16, 8, 4)]
    assert 3 * layered.prefill == sum(c.prefill for c in alone)
    assert 3 * layered.kv_bytes == sum(c.kv_bytes for c in alone)
    assert 3 * layered.decode == sum(c.decode for c in alone)


def test_text_alone_costs_no_vision():
    plain = prompt_cost(CASES["llava"][0], text=9)
    assert plain.tower == plain.projector == plain.selection == 0
    assert plain.total == plain.prefill + plain.head


@pytest.mark.parametrize("case", ["llava", "qwen2_5_vl, frames and two sizes"])
@pytest.mark.parametrize("kind", ["cls_row", "last_row", "column_mean"])
def test_statistics_cost_their_rows_of_q_k(case, kind):
    config, images = CASES[case]
    spans = [[17], [17]]
    if config.model_type != "llava":  # windows of 3 x 3 merged tokens of 4 patches; layer 1 attends within a frame
        spans = [[36, 36, 12, 12, 12, 4] * 2 + [16], [112, 112, 16]]
    for layer in (0, 1):
        expected = sum(2 * 32 * n * (n if kind == "column_mean" else 1) for n in spans[layer])
        assert prompt_cost(config, text=5, images=images, scores=[Score(layer, kind)]).selection == expected


@pytest.mark.parametrize(
    ("case", "spec"),
    [
        ("llava, two images", "random"),
        ("llava, two images", "fastervlm"),
        ("llava, two images", "hiprune"),
        ("qwen2_5_vl, windows cut at the border", "hiprune"),  # FasterVLM needs a CLS token
    ],
)
def test_statistics_equal_torchs_counter(case, spec):
    """What a method's statistics really multiply, beyond the tower's own work."""
    config, images = CASES[case]
    model, inputs, methods = build(config), image_inputs(config, images), from_spec(spec)
    scores = list(methods[0].wanted(family_of(config).tower(config)).values())
    alone = count(lambda: model.model.get_image_features(**inputs))
    with_statistics = count(lambda: encode_images(model, methods, **inputs))
    assert with_statistics - alone == prompt_cost(config, text=5, images=images, scores=scores).selection


def unit(figure: float, row: dict[str, Any]) -> float:
    return figure / {"G": 1e9, "T": 1e12, "MiB": 2**20}[row["unit"]]


def llm(name: str) -> LlamaConfig:
    sizes = DATA["models"][name]
    return LlamaConfig(
        hidden_size=sizes["width"], intermediate_size=sizes["ff"], num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv_heads"],
    )  # fmt: skip


def recompute(row: dict[str, Any]) -> float:
    """The figure of one row of flops_rows.json, unrounded."""
    config = llm(row["model"])

    def figure(blocks: list[list[float]]) -> float:
        lengths = [tokens for tokens, layers in blocks for _ in range(layers)]
        if row["convention"] == "kv":
            return kv_bytes(config, lengths)
        return prefill_flops(config, lengths, row["convention"])

    prompts = row.get("prompts") or [row["blocks"]]
    base = row.get("base_prompts") or ([row["base"]] if "base" in row else None)
    if base:
        return mean(100 * figure(p) / figure(b) for p, b in zip(prompts, base))
    whole = mean(figure(p) for p in prompts)
    return unit(whole / config.num_hidden_layers if row.get("mean") else whole, row)


@pytest.mark.parametrize("row", DATA["rows"], ids=lambda row: f"{row['source']} - {row['what']} - {row['model']}")
def test_published_figures(row):
    assert round(recompute(row), row["digits"]) == row["published"]


def test_conventions_differ_as_they_say():
    llama, qwen = llm("llama-7b"), llm("qwen2.5-vl-7b")
    assert prefill_flops(llama, 576) == 2 * prefill_flops(llama, 576, "F3m")  # no grouped queries
    assert prefill_flops(qwen, 1296) < 2 * prefill_flops(qwen, 1296, "F3m")
    assert prefill_flops(llama, 576, "F2m") < prefill_flops(llama, 576, "F3m")
    assert set(cost.CONVENTIONS) == {"X2", "F2m", "F3m"}


def test_towers_of_real_size():
    """CLIP-L/336 costs .382 T, the projector to a 7 B model .024 T; Qwen2.5-VL's tower 7.3 T at 1,296 tokens."""
    real = LlavaConfig()
    c = prompt_cost(real, text=0, images=[nominal_grid(real)])
    assert (round(c.tower / 1e12, 3), round(c.projector / 1e12, 3)) == (0.382, 0.024)
    qwen = Qwen2_5_VLConfig(
        vision_config={"hidden_size": 1280, "out_hidden_size": 3584}, text_config={**QWEN, **HEADS}
    )
    c = prompt_cost(qwen, text=0, images=[nominal_grid(qwen)])
    assert visual_tokens(qwen, nominal_grid(qwen)) == 1296
    assert round((c.tower + c.projector) / 1e12, 1) == 7.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kept": [17]}, "between 0 and an image's 16"),
        ({"kept": [4, 4]}, "1 images, 2 numbers"),
        ({"text": -1}, "text must not be negative"),
        ({"generated": -1}, "generated must not be negative"),
        ({"images": [(1, 0, 4)]}, "positive numbers"),
        ({"visual_per_layer": [16, 8]}, "each of the 3 decoder layers"),
        ({"scores": [Score(3, "cls_row")]}, "layers 0 to 2"),
        ({"scores": [Score(1, "median")]}, "cls_row, last_row, column_mean"),
    ],
)
def test_impossible_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        prompt_cost(llava(), **{"text": 5, "images": [(1, 4, 4)], **settings})


def test_impossible_configs():
    with pytest.raises(NotImplementedError, match="family 'llama' is not supported.*supported: llava"):
        visual_tokens(llm("llama-7b"), (1, 4, 4))
    with pytest.raises(ValueError, match="multiples of 2"):
        visual_tokens(qwen2_5_vl(), (1, 5, 4))
    with pytest.raises(ValueError, match="X2, F2m, F3m"):
        prefill_flops(llava(), 10, "X3")
    with pytest.raises(ValueError, match="each of the 3 layers"):
        prefill_flops(llava(), [10, 10])
