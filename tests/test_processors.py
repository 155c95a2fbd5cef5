"""Processors load with and without torchvision, and say clearly when they cannot."""

import json
import logging
import pickle

import numpy as np
import pytest
from PIL import Image
from transformers.utils import is_torchvision_available

from vlmfast.eval.testbed import build
from vlmfast.processors import ImageOnlyQwenProcessor, load_processor

without_torchvision = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
PICTURE = Image.fromarray(np.zeros((120, 120, 3), np.uint8))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_round_trip(tmp_path, name):
    saved = build.new_processor(name)
    saved.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    loaded = load_processor(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is red ?"}]}]
    text = loaded.apply_chat_template(messages, add_generation_prompt=True)
    assert text == saved.apply_chat_template(messages, add_generation_prompt=True)
    one, other = (p(images=[PICTURE], text=[text], return_tensors="pt") for p in (saved, loaded))
    assert set(one) == set(other)
    assert all((one[key] == other[key]).all() for key in one)
    image = loaded.image_token_id
    assert (one["input_ids"] == image).sum() == build.GRID[name] ** 2


@without_torchvision
def test_qwen_without_video_slot_is_said(tmp_path, caplog):
    build.new_processor("qwen2_5_vl").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    with caplog.at_level(logging.WARNING, logger="vlmfast.processors"):
        loaded = load_processor(tmp_path)
    assert isinstance(loaded, ImageOnlyQwenProcessor)
    assert isinstance(pickle.loads(pickle.dumps(loaded)), ImageOnlyQwenProcessor)
    assert "without videos" in caplog.text
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "Qwen2_5_VLProcessor"


@without_torchvision
def test_hub_layout_with_video_settings(tmp_path):
    """A folder as the Hub has it: class names of the ordinary processor, the settings in preprocessor_config.json."""
    saved = build.new_processor("qwen2_5_vl")
    saved.tokenizer.chat_template = saved.chat_template
    saved.tokenizer.save_pretrained(tmp_path)
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    settings |= {"patch_size": 6, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 2304, "max_pixels": 57600}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    loaded = load_processor(tmp_path)
    assert loaded.image_processor.patch_size == 6
    assert loaded.chat_template == saved.chat_template
    text = loaded.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    assert loaded(images=[PICTURE], text=[text], return_tensors="pt")["image_grid_thw"].tolist() == [[1, 20, 20]]


def test_folder_without_processor(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match="has no processor"):
        load_processor(tmp_path)
