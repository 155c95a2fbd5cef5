"""From a question and a picture to model inputs, each thing computed once a sweep.

A prompt's tokens depend on its text and the picture's size only, so they are made once for each pair of the two; a
picture goes through the image processor once. Batches are padded on the left, as `generate` needs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmfast.eval.testbed.questions import prompt_messages

Row = dict[str, Tensor]  # the token sequences of one prompt, each [L]


class Prompts:
    """Makes token rows, picture inputs and batches for one processor on one device."""

    def __init__(self, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.processor, self.device, self.dtype = processor, device, dtype
        self.tokenizer = processor.tokenizer
        self.pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self._rows: dict[tuple[str, tuple[int, ...]], Row] = {}

    def full(self, prompt: str, image: np.ndarray) -> dict[str, Tensor]:
        """Everything the processor gives for one prompt with its picture, on the device, as a user would call it."""
        messages = prompt_messages(prompt)
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = Image.fromarray(image)
        inputs = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        return self._move(inputs)

    def row(self, prompt: str, image: np.ndarray) -> Row:
        """The token sequences of one prompt (ids, token types, ...), placeholders of its picture included."""
        key = (prompt, image.shape)
        if key not in self._rows:
            inputs = self.full(prompt, image)
            shape = inputs["input_ids"].shape
            self._rows[key] = {name: value[0] for name, value in inputs.items() if value.shape == shape}
        return self._rows[key]

    def pictures(self, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """What the image processor gives for several pictures."""
        return self._move(
            self.processor.image_processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")
        )

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows as one batch [B, L], padded on the left."""
        length = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad}
        batch = {}
        for name in rows[0]:
            padded = rows[0][name].new_full((len(rows), length), fill.get(name, 0))
            for i, row in enumerate(rows):
                padded[i, length - len(row[name]) :] = row[name]
            batch[name] = padded
        return batch

    def _move(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the device, floating-point values in the model's type."""
        return {
            name: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in inputs.items()
        }
