"""The model `vlmfast` of lmms-eval: its requests through `vlmfast.eval.lmms.engine`.

A class of our own, since lmms-eval's general one does not run with transformers 5.23 and pads on the right. What the
run cost goes into lmms-eval's results as "throughput" (means; `avg_` is lmms-eval's) and, with costs=FILE, whole into
a file. lmms-eval's own command ends with exit code 0 after an error; `vlmfast eval --task lmms:NAME` does not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from vlmfast.adapters import from_spec
from vlmfast.eval.environment import describe
from vlmfast.eval.lmms.arguments import Arguments, parse
from vlmfast.eval.lmms.costs import Entry
from vlmfast.eval.lmms.engine import Ask, Engine, Message
from vlmfast.eval.lmms.options import Options
from vlmfast.eval.results import write_atomic
from vlmfast.eval.sweep import beams_of
from vlmfast.patching import entrance

PADDING = "__padding_only__"  # a request that lmms-eval repeats so that all processes have as many


class Vlmfast(lmms):
    """A vision-language model under a method. arguments: see `vlmfast.eval.lmms.arguments.Arguments`.

    engine: instead of loading one; it stays loaded when lmms-eval is done with it. times: whether to take them.
    """

    is_simple = False

    def __init__(self, engine: Engine | None = None, times: bool = True, **arguments: Any) -> None:
        super().__init__()
        self.lent, self.times = engine is not None, times
        self.engine = engine or Engine(Arguments.of(arguments))
        self.seconds = 0.0
        self.tokens = 0
        self.cost: dict[str, Any] = {}  # what the last run cost, when lmms-eval is done with the model
        self.latency: dict[str, Any] = {}
        self.told: set[str] = set()

    @classmethod
    def create_from_arg_string(cls, arg_string: Any, additional_config: Mapping[str, Any] | None = None) -> Vlmfast:
        """From `--model_args`, which also takes lmms-eval's own `--batch_size` and `--device` where it names none."""
        given = dict(arg_string) if isinstance(arg_string, Mapping) else parse(arg_string or "")
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if "device_map" in given:
            others.pop("device", None)
        return cls(**{**others, **given})

    @property
    def batch_size(self) -> int:
        """Requests answered at a time."""
        return self.engine.arguments.batch_size

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts what it gathers."""
        return entrance(self.engine.model)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.engine.model.config

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers, one a request."""
        beams = beams_of(self._methods())
        longest = self.engine.arguments.max_new_tokens
        asks = []
        for request in requests:
            context, source, settings, doc, task, split = self._parts(request)
            options = Options.of(settings, longest, beams)
            for name in options.ignored:
                if name not in self.told:
                    self.told.add(name)
                    logger.warning(f"{task}: generation_kwargs {name} means nothing to this model and is left out")
            messages = partial(self._messages, context, source, doc, task, split)
            asks.append(self._ask(request, messages, context, options))
        replies = self._answer(asks)
        return [GenerationResult(reply.text, TokenCounts(reply.prompt_tokens, reply.tokens)) for reply in replies]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Of given answers: (mean loss of their tokens, whether greedy search would give them).

        A loss, for which less is better, as all of lmms-eval's models return and its scores want. Each pair is in a
        GenerationResult: lmms-eval 0.7.3 turns bare pairs of numbers into text, which its scores cannot read.
        """
        asks = []
        for request in requests:
            context, target, visual, doc, task, split = request.args
            text = target if isinstance(target, str) else str(target(self.task_dict[task][split][doc]))
            messages = partial(self._messages, context, visual, doc, task, split)
            asks.append(self._ask(request, messages, context, Options.of({}, 1), text))
        replies = self._answer(asks)
        return [
            GenerationResult((one.loss, one.greedy), TokenCounts(one.prompt_tokens, one.tokens)) for one in replies
        ]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not done: what is asked in a round depends on what was answered, one request at a time."""
        raise NotImplementedError(
            "vlmfast answers tasks of one round; this one has several (generate_until_multi_round)"
        )

    def clean(self) -> None:
        """Called when all requests are answered: tell what they cost, and let the model go."""
        self._gather()
        self.latency = self.engine.latency() if self.times and self.rank == 0 else {}
        self.engine.close()
        self.cost = self.engine.costs.summary()
        if self.cost and self.rank == 0:
            self._tell()
        if not self.lent:
            del self.engine
        super().clean()

    def _parts(self, request: Any) -> tuple[str, Any, Any, Any, str, str]:
        """(context, where messages or pictures come from, settings, document, task, split) of a request."""
        context, source, settings, doc, task, split = request.args
        return context, source, settings, doc, task, split

    def _messages(self, context: str, source: Callable[[Any], Any], doc: Any, task: str, split: str) -> list[Message]:
        """The conversation of a document: as its task writes it."""
        messages = source(self.task_dict[task][split][doc])
        return [dict(message) for message in messages]

    def _ask(
        self, request: Any, messages: Any, context: str, options: Options, continuation: str | None = None
    ) -> Ask:
        counts = not (request.metadata or {}).get(PADDING, False)
        return Ask(f"{request.task_name}/{request.doc_id}", messages, len(context), options, continuation, counts)

    def _answer(self, asks: Sequence[Ask]) -> Any:
        """Replies in the order of the requests, with a bar."""
        start = time.perf_counter()
        with tqdm(total=len(asks), disable=self.rank != 0, desc=f"vlmfast {self.engine.spec}") as bar:
            replies = self.engine.answer(asks, bar.update)
        self.seconds += time.perf_counter() - start
        self.tokens += sum(reply.tokens for reply in replies)
        return replies

    def _methods(self) -> tuple[Any, ...]:
        return from_spec(self.engine.spec)

    def _gather(self) -> None:
        """What all processes answered, known to every one of them."""
        if self.world_size < 2 or not torch.distributed.is_initialized():
            return
        shares: list[tuple[dict[Entry, int], int, float]] = [({}, 0, 0.0)] * self.world_size
        torch.distributed.all_gather_object(shares, (dict(self.engine.costs.prompts), self.tokens, self.seconds))
        self.engine.costs.prompts.clear()
        for prompts, _, _ in shares:
            self.engine.costs.prompts.update(prompts)
        self.tokens, self.seconds = sum(one[1] for one in shares), max(one[2] for one in shares)

    def _tell(self) -> None:
        """Into lmms-eval's results, and into a file if one was asked for."""
        numbers = {
            "prefill_flops_share": self.cost["share_of_unpatched"],
            "prefill_gflops": self.cost["total_prefill"] / 1e9,
            "visual_tokens": self.cost["visual_tokens"],
            "visual_tokens_unpatched": self.cost["visual_tokens_before"],
        }
        if self.latency:
            numbers["ttft_ms"] = self.latency["ttft_ms"]["median"]
            numbers["ttft_speedup"] = self.latency["ttft_speedup"]["median"]
        log_metrics(self.seconds, self.tokens, self.tokens / self.seconds if self.seconds else 0.0, numbers)
        path = self.engine.arguments.costs
        if path is not None:
            report = {
                "model": self.engine.name,
                "spec": self.engine.spec,
                "cost": self.cost,
                "latency": self.latency,
                "seconds": round(self.seconds, 3),
                "tokens": self.tokens,
                "environment": describe(str(entrance(self.engine.model))),
            }
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(path), json.dumps(report, indent=1) + "\n")


class VlmfastSimple(Vlmfast):
    """The same for tasks that name pictures and a text apart: multiple choice, likelihoods."""

    is_simple = True

    def _parts(self, request: Any) -> tuple[str, Any, Any, Any, str, str]:
        context, settings, source, doc, task, split = request.args
        return context, source, settings, doc, task, split

    def _messages(self, context: str, source: Callable[[Any], Any], doc: Any, task: str, split: str) -> list[Message]:
        """One turn of the user: the document's pictures, then the text."""
        return [{"role": "user", "content": [*parts_of(source, self.task_dict[task][split][doc]), text_of(context)]}]


def text_of(text: str) -> dict[str, Any]:
    """A text as part of a message."""
    return {"type": "text", "text": text}


def parts_of(source: Callable[[Any], Any] | None, doc: Any) -> list[dict[str, Any]]:
    """The pictures of a document as parts of a message, as lmms-eval's chat tasks make them."""
    from lmms_eval.api.task import ConfigurableMessagesTask

    return [ConfigurableMessagesTask._visual_to_content(one) for one in (source(doc) if source else None) or ()]


__all__ = ["Vlmfast", "VlmfastSimple"]
