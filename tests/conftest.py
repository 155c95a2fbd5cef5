"""Tiny random models of every family, built from configs, and prompts for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("VLMFAST_GOLDEN", ROOT.parent / "shared" / "golden"))
VOCABULARY, IMAGE, PAD = 97, 90, 0


@dataclass
class Vlm:
    """A tiny model and how to make prompts for it."""

    name: str
    model: Any

    def prompts(self, rows: Sequence[Sequence[int | str]], seed: int = 0, side: str = "left") -> dict[str, Tensor]:
        """Model inputs. A row is a sequence of text lengths (int) and images (letters: 'a', 'b', ... differ)."""
        generator = torch.Generator().manual_seed(seed)
        sequences, types, pixels, grids = [], [], [], []
        for row in rows:
            ids: list[int] = []
            kinds: list[int] = []
            for part in row:
                if isinstance(part, int):
                    ids += torch.randint(3, 80, (part,), generator=generator).tolist()
                    kinds += [0] * part
                else:
                    values, grid, n = self.image(part)
                    pixels.append(values)
                    grids.append(grid)
                    ids += [IMAGE] * n
                    kinds += [1] * n
            sequences.append(ids)
            types.append(kinds)
        width = max(map(len, sequences))

        def pad(items: Sequence[int], value: int) -> list[int]:
            gap = [value] * (width - len(items))
            return [*gap, *items] if side == "left" else [*items, *gap]

        inputs = {
            "input_ids": torch.tensor([pad(ids, PAD) for ids in sequences]),
            "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids in sequences]),
        }
        if self.name == "qwen2_5_vl":
            inputs["mm_token_type_ids"] = torch.tensor([pad(kinds, 0) for kinds in types])
        if pixels:
            inputs["pixel_values"] = torch.cat(pixels)
            if self.name == "qwen2_5_vl":
                inputs["image_grid_thw"] = torch.tensor(grids)
        return inputs

    def image(self, letter: str) -> tuple[Tensor, list[int], int]:
        """(pixel values, patch grid, visual tokens) of an image; letters give images of different size (Qwen)."""
        generator = torch.Generator().manual_seed(ord(letter))
        if self.name == "llava":
            return torch.randn(1, 3, 48, 48, generator=generator), [1, 6, 6], 36
        h, w = [(8, 12), (12, 12), (8, 8)][ord(letter) % 3]
        return torch.randn(h * w, 3 * 2 * 4 * 4, generator=generator), [1, h, w], h * w // 4


def text_settings() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def build_llava() -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=48,
            patch_size=8,
        ),
        text_config=LlamaConfig(**text_settings()),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def build_qwen2_5_vl() -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 32,
        },
        text_config=dict(
            **text_settings(),
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        ),
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


BUILDERS = {"llava": build_llava, "qwen2_5_vl": build_qwen2_5_vl}


def build(name: str) -> Vlm:
    """A tiny random model, always the same, scaled up so that attention and logits are far from uniform."""
    torch.manual_seed(7)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.6 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.1)
    model.generation_config.suppress_tokens = [IMAGE]
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    vlm = Vlm(name, model)
    with torch.no_grad():
        model(**vlm.prompts([[3, "a", 2]]))  # transformers installs hooks of its own on the first call
    return vlm


@pytest.fixture(params=list(BUILDERS), scope="session")
def shared_vlm(request: pytest.FixtureRequest) -> Vlm:
    """One model a family, shared: a test that leaves traces is caught by the `vlm` fixture."""
    return build(request.param)


@pytest.fixture
def vlm(shared_vlm: Vlm) -> Any:
    """A tiny model of each family in turn; the test must leave it as it found it."""
    yield shared_vlm
    leftover = shared_vlm.model.__dict__.get("vlmfast_handle")
    if leftover is not None:
        leftover.close()
        pytest.fail("the test left the model patched")


@pytest.fixture
def fresh() -> Any:
    """build(name) -> a new tiny model, for tests that change weights or modes."""
    return build


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say in one visible line when there was nothing to compare with."""
    if not GOLDEN.is_dir():
        terminalreporter.write_line(
            f"golden files: {GOLDEN} is absent, parity with the official codes was not compared"
        )
