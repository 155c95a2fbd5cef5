"""Generation settings of lmms-eval's tasks as `generate` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_STOP = "\n\n"
NUMBERS = ("repetition_penalty", "length_penalty", "min_new_tokens", "no_repeat_ngram_size")
SAMPLING = ("temperature", "top_p", "top_k")
READ = ("max_new_tokens", "max_gen_toks", "do_sample", "num_beams", "until", "stop_sequences", *SAMPLING, *NUMBERS)
SETTLED = {"skip_special_tokens": True}  # what is done anyway, and only so


@dataclass(frozen=True)
class Options:
    """How one answer is generated. Hashable: requests with the same options are answered together.

    kwargs: of `generate`, sorted. until: the answer ends in front of the first of these. ignored: settings of the task
    that mean nothing here.
    """

    kwargs: tuple[tuple[str, Any], ...]
    until: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Mapping[str, Any] | None, longest: int, beams: int = 1) -> Options:
        """From a task's `generation_kwargs`. longest: tokens, where it names none; beams: likewise.

        Without do_sample a temperature above 0 asks for sampling; a temperature of 0 is greedy search. `until` of a
        blank line is what lmms-eval puts into every task that names none: it is not followed, as in its own models,
        since it cuts answers of several paragraphs. ValueError for what cannot be.
        """
        given = {name: value for name, value in (given or {}).items() if value is not None}
        longest = _whole(given, "max_new_tokens", _whole(given, "max_gen_toks", longest))
        temperature = float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
        sample = bool(given.get("do_sample", temperature > 0)) and temperature > 0
        kwargs: dict[str, Any] = {"max_new_tokens": longest, "do_sample": sample}
        asked = _whole(given, "num_beams", 1)
        kwargs["num_beams"] = beams if asked == 1 else asked
        for name in SAMPLING:  # None: not those of the model's own generation config
            kwargs[name] = given.get(name) if sample else None
        if sample:
            kwargs["temperature"] = temperature
        kwargs |= {name: given[name] for name in NUMBERS if name in given}
        until = [*_texts(given, "until"), *_texts(given, "stop_sequences")]
        stops = tuple(dict.fromkeys(stop for stop in until if stop and stop != DEFAULT_STOP))
        ignored = [name for name in given if name not in READ and SETTLED.get(name) != given[name]]
        return cls(tuple(sorted(kwargs.items())), stops, tuple(sorted(ignored)))

    def cut(self, text: str) -> str:
        """The text in front of the first stop, without white space around it."""
        ends = [place for stop in self.until if (place := text.find(stop)) >= 0]
        return text[: min(ends)].strip() if ends else text.strip()


def _texts(given: Mapping[str, Any], name: str) -> list[str]:
    value = given.get(name, [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(one, str) for one in values):
        raise ValueError(f"generation_kwargs: {name} is a text or a list of texts, got {value!r}")
    return list(values)


def _whole(given: Mapping[str, Any], name: str, default: int) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"generation_kwargs: {name} is a whole number, 1 or more; got {value!r}")
    return int(value)
