"""The two models of the testbed before any training: genuine Hugging Face classes, small.

Both read pictures of 120 x 120 pixels. ``llava``: CLIP tower with a CLS token (patch 10, 12 x 12 = 144 tokens),
projector, Llama. ``qwen2_5_vl``: patch 6, window attention but for two blocks, 2 x 2 merger (10 x 10 = 100 tokens),
M-RoPE. One vocabulary of whole words serves both.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vlmfast.eval.testbed.questions import SYSTEM, VOCABULARY
from vlmfast.eval.testbed.scenes import SIDE

GRID = {"llava": 12, "qwen2_5_vl": 10}  # visual tokens a side
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
IDS = {word: i for i, word in enumerate((*SPECIAL, "<|video_pad|>", *VOCABULARY))}
PREFIX = {
    "llava": ["<s>", *SYSTEM.split(), "user", ":"],
    "qwen2_5_vl": ["<s>", *SYSTEM.split(), "user", ":", "<|vision_start|>"],
}
SUFFIX = {"llava": [], "qwen2_5_vl": ["<|vision_end|>"]}
_PICTURE = {"llava": "<image>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
TEMPLATE = (
    "<s> " + SYSTEM + "{% for message in messages %} {{ message['role'] }} :{% if message['content'] is string %}"
    " {{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %} PICTURE"
    "{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)
_TEXT: dict[str, Any] = {
    "vocab_size": len(IDS),
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": IDS["<s>"],
    "eos_token_id": IDS["</s>"],
    "pad_token_id": IDS["<pad>"],
}
_IDENTITY: dict[str, Any] = {"bos_token_id": IDS["<s>"], "eos_token_id": IDS["</s>"], "pad_token_id": IDS["<pad>"]}


def new_model(name: str, seed: int = 0) -> Any:
    """An untrained model of the family, fp32."""
    torch.manual_seed(seed)
    model: Any
    config: Any
    if name == "llava":
        vision = CLIPVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4, image_size=SIDE,
            patch_size=SIDE // GRID[name], projection_dim=128, hidden_act="gelu",
        )  # fmt: skip
        text = LlamaConfig(**_TEXT, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-6)
        config = LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=IDS["<image>"], vision_feature_layer=-2,
            vision_feature_select_strategy="default", image_seq_length=GRID[name] ** 2, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlavaForConditionalGeneration(config)
    elif name == "qwen2_5_vl":
        # With 1e6 the width axis, last in the head, would turn by a thousandth over a picture: invisible at this size.
        rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]}
        config = Qwen2_5_VLConfig(
            text_config={**_TEXT, "rope_parameters": rope, "rms_norm_eps": 1e-6},
            vision_config={
                "depth": 4, "hidden_size": 128, "intermediate_size": 288, "num_heads": 4, "patch_size": 6,
                "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 60, "fullatt_block_indexes": [1, 3],
                "out_hidden_size": 192,
            },
            image_token_id=IDS["<|image_pad|>"], video_token_id=IDS["<|video_pad|>"],
            vision_start_token_id=IDS["<|vision_start|>"], vision_end_token_id=IDS["<|vision_end|>"],
            tie_word_embeddings=False, **_IDENTITY,
        )  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        raise ValueError(f"unknown testbed model {name!r}; there are {', '.join(GRID)}")
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(0, 0.6)
    for key, value in _IDENTITY.items():
        setattr(model.generation_config, key, value)
    return model


def new_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The word-level tokenizer; pads on the left."""
    tokens = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    extra = {"image_token": "<image>"}
    if name == "qwen2_5_vl":
        extra = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        padding_side="left", model_max_length=4096, extra_special_tokens={**extra, **_VISION[name]},
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


_VISION: dict[str, dict[str, str]] = {
    "llava": {},
    "qwen2_5_vl": {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"},
}


def new_processor(name: str) -> Any:
    """The processor of a model: image processor without torchvision, tokenizer, chat template."""
    template = TEMPLATE.replace("PICTURE", _PICTURE[name])
    tokenizer = new_tokenizer(name)
    pictures: Any
    scaling = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if name == "llava":
        from transformers import LlavaProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        pictures = CLIPImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=False,
            **scaling,
        )  # fmt: skip
        return LlavaProcessor(
            pictures, tokenizer, patch_size=SIDE // GRID[name], vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=template,
        )  # fmt: skip
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from vlmfast.processors import ImageOnlyQwenProcessor

    pictures = Qwen2VLImageProcessorPil(
        patch_size=6, merge_size=2, temporal_patch_size=2, min_pixels=48 * 48, max_pixels=240 * 240, **scaling
    )
    return ImageOnlyQwenProcessor(pictures, tokenizer, chat_template=template)


def save_processor(name: str, folder: Path) -> None:
    """Write a model's processor; Qwen's also with the video settings that the ordinary class reads."""
    new_processor(name).save_pretrained(folder)
    if name == "qwen2_5_vl":
        pictures = json.loads((folder / "processor_config.json").read_text())["image_processor"]
        pictures.pop("image_processor_type")
        video = {"video_processor_type": "Qwen2VLVideoProcessor", **pictures}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")
