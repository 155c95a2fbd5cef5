"""Tiny random models of every family, built from configs, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

VOCABULARY, IMAGE, VIDEO, PAD = 97, 90, 91, 0
WIDTH = 32


@dataclass(frozen=True)
class Picture:
    """One image or video of a prompt: inputs as the processor gives them for it alone, its ids and their types."""

    inputs: Mapping[str, Tensor]
    ids: Sequence[int]
    types: Sequence[int]


def concatenated(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """The usual way: every input of all pictures along the first axis."""
    pictures = [picture for row in rows for picture in row]
    names = dict.fromkeys(name for picture in pictures for name in picture.inputs)
    return {name: torch.cat([p.inputs[name] for p in pictures if name in p.inputs]) for name in names}


@dataclass(frozen=True)
class Tiny:
    """How to make a tiny model of one family, and pictures for it.

    image, video: letter -> Picture; letters give different pictures, of different size where the family allows it.
    types: name of the token-type input that the processor gives, None if there is none. collect: pictures of every row
    -> inputs of the batch.
    """

    build: Callable[[], Any]
    image: Callable[[str], Picture]
    video: Callable[[str], Picture] | None = None
    types: str | None = None
    collect: Callable[[Sequence[Sequence[Picture]]], dict[str, Tensor]] = concatenated


@dataclass
class Vlm:
    """A tiny model and how to make prompts for it."""

    name: str
    model: Any
    tiny: Tiny
    cache: dict[Any, Any] = field(default_factory=dict)

    def prompts(
        self, rows: Sequence[Sequence[int | str]], seed: int = 0, side: str = "left", only: int | None = None
    ) -> dict[str, Tensor]:
        """Model inputs. A row is a sequence of text lengths (int), images ('a', 'b', ...) and videos ('A', 'B', ...).

        only: this row of the batch alone, without padding.
        """
        generator = torch.Generator().manual_seed(seed)
        sequences, types, pictures = [], [], []
        for row in rows:
            ids: list[int] = []
            kinds: list[int] = []
            shown: list[Picture] = []
            for part in row:
                if isinstance(part, int):
                    ids += torch.randint(3, 80, (part,), generator=generator).tolist()
                    kinds += [0] * part
                    continue
                picture = self.picture(part)
                shown.append(picture)
                ids += picture.ids
                kinds += picture.types
            sequences.append(ids)
            types.append(kinds)
            pictures.append(shown)
        if only is not None:
            sequences, types, pictures = [sequences[only]], [types[only]], [pictures[only]]
        width = max(map(len, sequences))

        def pad(items: Sequence[int], value: int) -> list[int]:
            gap = [value] * (width - len(items))
            return [*gap, *items] if side == "left" else [*items, *gap]

        inputs = {
            "input_ids": torch.tensor([pad(ids, PAD) for ids in sequences]),
            "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids in sequences]),
        }
        if self.tiny.types is not None:
            inputs[self.tiny.types] = torch.tensor([pad(kinds, 0) for kinds in types])
        if any(pictures):
            inputs |= self.tiny.collect(pictures)
        return inputs

    def picture(self, letter: str) -> Picture:
        """The image or video of a letter."""
        if letter not in self.cache:
            make = self.tiny.video if letter.isupper() else self.tiny.image
            assert make is not None, f"{self.name} has no videos"
            self.cache[letter] = make(letter)
        return self.cache[letter]


def noise(letter: str, *shape: int) -> Tensor:
    """Pixels that depend on the letter alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(ord(letter)))


def placeholders(inputs: Mapping[str, Tensor], n: int, token: int = IMAGE, kind: int = 1) -> Picture:
    """A picture whose ids are n placeholders in a row."""
    return Picture(inputs, [token] * n, [kind] * n)


def text_settings(**changes: Any) -> dict[str, Any]:
    """A tiny decoder."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    } | changes


def make(name: str, tiny: Tiny) -> Vlm:
    """A tiny random model, always the same, scaled up so that attention and logits are far from uniform."""
    torch.manual_seed(7)
    model = tiny.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.6 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.1)
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    vlm = Vlm(name, model, tiny)
    with torch.no_grad():
        model(**vlm.prompts([[3, "a", 2]]))  # transformers installs hooks of its own on the first call
    return vlm
