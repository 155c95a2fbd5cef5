"""Batches from conversations: the processor's own chat template, pictures packed by the processor, labels of answers.

Which characters of a rendered conversation are answers is read off the template itself: from its `{% generation %}`
marks where it has them; else by rendering the conversation up to each answer, with the prompt for one, and up to its
end. Both must be beginnings of the whole conversation, or there is an error: nothing is searched for. Characters
become tokens by the tokenizer's offsets and the processor's record of what each placeholder grew to.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from vlmfast.eval.finetune.data import Sample, Samples

logger = logging.get_logger("vlmfast.finetune")
IGNORED = -100  # what the loss leaves out
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


class Collator:
    """Samples -> model inputs with labels, padded on the right, as a plain forward takes them in training.

    Picklable, so that it works in the worker processes of a DataLoader.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        if processor.chat_template is None:
            raise ValueError("the processor has no chat template, so conversations cannot be phrased for the model")
        if not getattr(processor.tokenizer, "is_fast", False):
            raise ValueError("the tokenizer is a slow one, which does not tell where its tokens begin and end")
        self.unknown = processor.tokenizer.unk_token_id
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels [B, L], and what else the processor makes for this model."""
        rendered = [self.rendered(sample) for sample in samples]
        pictures = [sample.pictures() for sample in samples]
        inputs = self._processed([text for text, _ in rendered], pictures, samples)
        offsets = inputs.pop("offset_mapping")
        grown = inputs.pop("text_replacement_offsets", None)
        if grown is None and any(pictures):
            raise NotImplementedError(
                f"{type(self.processor).__name__} does not tell what placeholders grow to, so that answers cannot be "
                "found among its tokens; processors of transformers' usual kind do"
            )
        inputs.convert_to_tensors("pt")
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, (_, spans) in enumerate(rendered):
            tokens = answer_tokens(offsets[row], grown[row] if grown else [], spans)
            labels[row, tokens] = inputs["input_ids"][row, tokens]
            if (labels[row] == (-1 if self.unknown is None else self.unknown)).any():
                logger.warning_once(
                    f"{samples[row].where}: an answer has words that the tokenizer does not know, and others may have "
                    "some, too; the model would learn to say that it has no word for them"
                )
            if not tokens:
                raise ValueError(f"{samples[row].where}: its answers have no tokens")
        return {**inputs, "labels": labels}

    def rendered(self, sample: Sample) -> tuple[str, list[Span]]:
        """The conversation as text, a placeholder a picture, and the characters that are to be learnt."""
        try:
            text, spans = answers(self.processor, sample.messages)
        except Exception as error:  # templates raise errors of their own
            raise ValueError(f"{sample.where}: {error}") from error
        token = getattr(self.processor, "image_token", None)
        if token is not None and text.count(token) != len(sample.images):
            raise ValueError(
                f"{sample.where}: {text.count(token)} placeholder(s) {token} in the rendered conversation for "
                f"{len(sample.images)} image(s): a text holds {token} itself, or the template leaves images out"
            )
        return text, spans

    def length(self, sample: Sample) -> int:
        """Tokens of a sample alone, those of its pictures included."""
        text, _ = self.rendered(sample)
        return len(self._processed([text], [sample.pictures()], [sample])["input_ids"][0])

    def _processed(self, texts: list[str], pictures: list[Any], samples: Sequence[Sample]) -> Any:
        """The processor's output, lists still: its record of placeholders is no tensor."""
        bos = self.processor.tokenizer.bos_token
        own = {"add_special_tokens": False} if bos is not None and texts[0].startswith(bos) else {}
        try:
            return self.processor(
                text=texts,
                images=pictures if any(pictures) else None,
                padding=True,
                padding_side="right",
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                **own,
            )
        except Exception as error:
            names = ", ".join(sample.where for sample in samples)
            raise ValueError(f"{names}: the processor cannot make inputs of this: {error}") from error


def answers(processor: Any, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Span]]:
    """The rendered conversation and the span of every answer in it, its end-of-turn token included.

    A template that ends without any token after the last answer (LLaVA-1.5's) gets the tokenizer's end token there:
    the model would not learn to stop.

    Raises ValueError where the template renders an answer in another way when it is the last one.
    """

    def render(said: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        return processor.apply_chat_template(list(said), tokenize=False, add_generation_prompt=prompt)

    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    template = processor.chat_template
    if isinstance(template, str) and MARKED.search(template):
        (text,), (marks,) = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
        )
        spans = list(marks)
        for number, turn in enumerate(turns if len(turns) == len(spans) else ()):
            before, (start, end) = render(messages[:turn], prompt=True), spans[number]
            if text.startswith(before) and not text[len(before) : start].strip():
                spans[number] = (len(before), end)  # white space between is what the model begins its answer with
    else:
        text, spans = render(messages), []
        for turn in turns:
            before, whole = render(messages[:turn], prompt=True), render(messages[: turn + 1])
            if not (text.startswith(whole) and whole.startswith(before)):
                raise ValueError(
                    f"the chat template renders turn {turn + 1} in another way when it is not the last one, so that "
                    "its tokens cannot be told for certain: make one record for each answer"
                )
            spans.append((len(before), len(whole)))
    spans = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    spoken = "".join(part["text"] for part in messages[-1]["content"]).strip()
    end, eos = spans[-1][1], processor.tokenizer.eos_token
    if eos is not None and not text[end:].strip() and text[:end].endswith(spoken):
        text, spans[-1] = text[:end] + eos, (spans[-1][0], end + len(eos))
    return text, spans


def answer_tokens(offsets: Sequence[Span], grown: Sequence[dict[str, Any]], spans: Sequence[Span]) -> list[int]:
    """The tokens that overlap the spans.

    offsets: of each token in the text with grown placeholders, (0, 0) for padding; grown: the placeholders in order,
    "span" before and "new_span" after; spans: in the text before, and in no placeholder.
    """
    ends = [one["span"][1] for one in grown]
    gained = [0, *(one["new_span"][1] - one["span"][1] for one in grown)]
    moved = [tuple(place + gained[bisect_right(ends, place)] for place in span) for span in spans]
    return [
        token
        for token, (first, last) in enumerate(offsets)
        if any(first < end and last > start for start, end in moved) and last > first
    ]


def fitting(samples: Samples, collator: Collator, max_length: int, too_long: str) -> tuple[Samples, list[str]]:
    """The samples of at most max_length tokens, and the names of the others. Nothing is ever cut.

    too_long: "raise": ValueError if there are others; "drop": ValueError if there is nothing else.
    """
    fits, others = [], []
    for index, sample in enumerate(samples):
        length = collator.length(sample)
        if length <= max_length:
            fits.append(index)
        else:
            others.append(f"{sample.where} ({length})")
    told = f"{len(others)} of {len(samples)} records of {samples.name} are longer than max_length={max_length} tokens"
    if others and too_long == "raise":
        raise ValueError(f"{told}: {some(others)}; too_long=drop leaves them out")
    if not fits:
        raise ValueError(f"all {told.partition(' of ')[2]}")
    return (samples.only(fits) if others else samples), others


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
