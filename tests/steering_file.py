"""A steering vector for a tiny model, whose tokens come up in what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlmfast.steering import KINDS, SteeringVector

TOKENS = tuple(range(3, 80, 2))  # half of what prompts are made of, and of what is generated


def steering_file(model: Any, path: Path, layer: int = 1, length: float = 20.0) -> str:
    """Write a vector that changes much, and give its path."""
    width = model.config.get_text_config().hidden_size
    vector = torch.randn(width, generator=torch.Generator().manual_seed(2))
    vector *= length / vector.norm()
    SteeringVector(vector, layer, TOKENS, dict.fromkeys(KINDS, 1), "tiny").save(path)
    return str(path)
