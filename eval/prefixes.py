"""What the questions about a picture have in common is prefilled once.

Their prompts begin alike, with system text and visual tokens, which is most of a prompt. Each beginning in a batch
runs through the model once, under the methods at hand; then every question goes on from a copy of its beginning's
cache, as a further turn of a conversation would, with the ids, the mask and the positions of its whole prompt:

    S beginnings    [ . s s v v v v ]        B questions    [ . . q q q ]        padding is on the left of each
                    [ s s v v v v v ]                       [ q q q q q ]
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlmfast.adapter import Adapter
from vlmfast.eval.prompts import Row
from vlmfast.families import family_of
from vlmfast.walking import fork


@dataclass(frozen=True)
class Divided:
    """The B prompts of a batch in two parts. beginnings: each once, S of them; rests: what follows, of each prompt.

    of: the number of each prompt's beginning; first: the first prompt of each beginning.
    """

    beginnings: list[Row]
    rests: list[Row]
    of: list[int]
    first: list[int]


def shareable(model: Any, methods: Sequence[Adapter], beams: int) -> bool:
    """Whether prompts can be prefilled in two parts with the same result, on this model under these methods.

    Not where pictures see what follows, where a layer holds something else than the keys and values of all tokens (a
    window, or one state of them), and where beams would have to multiply the rows of a cache that is there already.
    """
    config = model.generation_config
    return (
        beams == 1
        and all(method.prefills_in_parts for method in methods)
        and not family_of(model).sees_ahead
        and config.use_cache is not False
        and config.cache_implementation is None
        and config.prefill_chunk_size is None
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    )


def divide(rows: Sequence[Row], pictures: Sequence[int], placeholders: Collection[int]) -> Divided | None:
    """Cut prompts behind their pictures; None where no picture comes twice, or prompts about one begin differently.

    pictures: which one each prompt is about; placeholders: ids of visual tokens. Text behind the pictures that their
    questions share belongs to the beginnings: equally much of it everywhere, so that pictures of one size need no
    padding.
    """
    numbers = {picture: number for number, picture in enumerate(dict.fromkeys(pictures))}
    if len(numbers) == len(rows):
        return None
    of = [numbers[picture] for picture in pictures]
    first = [of.index(number) for number in range(len(numbers))]
    ids = [row["input_ids"].tolist() for row in rows]
    ends, spare = [], []
    for number, row in enumerate(first):
        own = [one for one, its in zip(ids, of) if its == number]
        common = min(len(os.path.commonprefix(own)), min(map(len, own)) - 1)  # one token is left for the second part
        ends.append(1 + max(place for place, token in enumerate(ids[row]) if token in placeholders))
        spare.append(common - ends[-1])
    if min(spare) < 0:
        return None
    cuts = [end + min(spare) for end in ends]
    return Divided(
        [{name: value[:cut] for name, value in rows[row].items()} for row, cut in zip(first, cuts)],
        [{name: value[cuts[number] :] for name, value in row.items()} for row, number in zip(rows, of)],
        of,
        first,
    )


def prefilled(model: Any, beginnings: Mapping[str, Any], rests: Mapping[str, Tensor], of: Sequence[int]) -> Any:
    """Prefill beginnings; what `generate` is then to be given for whole prompts.

    beginnings: inputs of the model for S prompts, with the encoder's outputs; rests: tokens [B, Q] that follow; of:
    the beginning of each. Positions are those that `generate` makes of whole prompts: of prompts that go on it would
    take M-RoPE's from what the model remembers of the last forward, which was S.
    """
    positions = model._prepare_position_ids_for_generation
    cache = model(
        **beginnings, position_ids=positions(beginnings["input_ids"], beginnings), use_cache=True, logits_to_keep=1
    ).past_key_values
    rows = torch.tensor(of, device=beginnings["input_ids"].device)
    whole = {name: value[rows] for name, value in beginnings.items() if isinstance(value, Tensor)}
    whole |= {name: torch.cat([whole[name], rest], dim=1) for name, rest in rests.items()}
    return {
        "input_ids": whole["input_ids"],
        "attention_mask": whole["attention_mask"],
        "position_ids": positions(whole["input_ids"], whole),
        "past_key_values": fork(cache, rows, grows=True),
    }
