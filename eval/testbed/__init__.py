"""The testbed: generated scenes, questions about them, and two small models that were trained to see them.

``load("llava")`` and ``load("qwen2_5_vl")`` give (model, processor); the folders are normal Hugging Face folders.
"""

from pathlib import Path
from typing import Any

MODELS = ("llava", "qwen2_5_vl")


def folder(name: str) -> Path:
    """The folder of a shipped model."""
    if name not in MODELS:
        raise ValueError(f"unknown testbed model {name!r}; there are {', '.join(MODELS)}")
    return Path(__file__).parent / name


def load(name: str) -> tuple[Any, Any]:
    """A shipped model (fp32, evaluation mode) and its processor."""
    import torch
    from transformers import AutoModelForImageTextToText

    from vlmfast.processors import load_processor

    path = folder(name)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return model.eval(), load_processor(path)
