"""Answers requests about pictures with one model under one method, and counts what they cost.

Requests with the same generation settings are answered together, the longest first, padded on the left, and come back
in the order they were asked in. Their messages are made when their batch is: pictures are not held longer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import vlmfast
from vlmfast.adapters import from_spec, resolve, solve_flops, to_spec
from vlmfast.branches import BranchDoor
from vlmfast.eval.latency import Clock, Spread, generation, interleave, ratio
from vlmfast.eval.lmms.arguments import PIXELS, Arguments
from vlmfast.eval.lmms.costs import Costs, Sizes
from vlmfast.eval.lmms.options import Options
from vlmfast.eval.models import AUTO, load_model, with_adapter
from vlmfast.eval.sharing import of_environment
from vlmfast.eval.sweep import UNPATCHED, beams_of, failure
from vlmfast.families import family_of
from vlmfast.patching import Handle, entrance

Message = dict[str, Any]  # {"role": ..., "content": [{"type": "text" | "image" | "video", ...}]}
MARK = "<image>"  # where a text wants its pictures, if it says so
LATER = 7  # tokens behind the first that times are taken of


@dataclass(frozen=True)
class Ask:
    """One request. name: in messages of errors. length: of its text, for the order. counts: among the costs.

    continuation: whose likelihood is asked for; None: an answer is. A text that says <image> as often as the message
    has pictures gets them there.
    """

    name: str
    messages: Callable[[], Sequence[Message]]
    length: int
    options: Options
    continuation: str | None = None
    counts: bool = True


@dataclass(frozen=True)
class Reply:
    """What a request got: an answer with its tokens, or a continuation's `loss` and whether it is `greedy`.

    loss: mean negative log-likelihood of its tokens.
    """

    text: str
    prompt_tokens: int
    tokens: int
    loss: float = 0.0
    greedy: bool = False


class Engine:
    """A model with its processor, ready for requests. `open` patches it; one method at a time."""

    def __init__(self, arguments: Arguments, loaded: tuple[Any, Any] | None = None) -> None:
        self.arguments = arguments
        self.name = with_adapter(arguments.pretrained, arguments.adapter)
        self.model, self.processor = loaded or _load(self.name, arguments)
        self.family = family_of(self.model)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # the last token of every row is where its answer begins
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.processor.chat_template is None and self.tokenizer.chat_template is None:
            raise ValueError(f"{self.name} has no chat template: lmms-eval's prompts cannot be written for it")
        self._set_pixels()
        names = ("image_token", "video_token", "boi_token", "eoi_token")
        control = {*self.tokenizer.all_special_tokens, *(getattr(self.processor, name, None) for name in names)}
        self.control = sorted(
            (str(token) for token in control if token and len(str(token)) > 1), key=len, reverse=True
        )
        spec = arguments.method
        if arguments.flops is not None:
            spec = to_spec(solve_flops(self.model, resolve(self.model, [spec]), arguments.flops))
        self.spec = spec
        self.handle: Handle | None = None
        self.sizes: Sizes | None = None
        self.costs = Costs(self.model.config, ())
        self.first: Ask | None = None  # the request that times are taken of

    def open(self, spec: str) -> None:
        """Patch the model; what was opened before is closed. Errors as in `vlmfast.patch`."""
        self.close()
        self.sizes = Sizes(self.model)
        try:
            self.handle, self.spec = vlmfast.patch(self.model, spec), spec
        except BaseException:
            self.close()
            raise
        self.costs, self.first = Costs(self.model.config, self.handle.adapters), None

    def close(self) -> None:
        """Restore the model. Safe to call twice."""
        for one in (self.handle, self.sizes):
            if one is not None:
                one.close()
        self.handle = self.sizes = None

    def answer(self, asks: Sequence[Ask], notify: Callable[[int], None] = lambda n: None) -> list[Reply]:
        """Replies to requests, in their order. notify: is told how many more are done.

        RuntimeError names the request that failed.
        """
        if self.handle is None:
            self.open(self.spec)
        replies: list[Reply | None] = [None] * len(asks)
        for batch in batches(asks, self.arguments.batch_size):
            for number, reply in zip(batch, self._guarded([asks[number] for number in batch])):
                replies[number] = reply
            notify(len(batch))
        return [reply for reply in replies if reply is not None]

    def _guarded(self, asks: Sequence[Ask]) -> list[Reply]:
        try:
            return self._batch(asks)
        except Exception as error:
            where = f"{self.name} with {self.spec}"
            for ask in asks if len(asks) > 1 else ():
                try:
                    self._batch([replace(ask, counts=False)])
                except Exception as alone:
                    raise RuntimeError(failure(where, ask.name, alone)) from alone
            if len(asks) == 1:
                raise RuntimeError(failure(where, asks[0].name, error)) from error
            what = f"the batch of {len(asks)} from {asks[0].name} on, though each request works alone"
            raise RuntimeError(failure(where, what, error) + " (try a smaller batch)") from error

    def _batch(self, asks: Sequence[Ask]) -> list[Reply]:
        """One batch; requests with pictures and requests without are run apart."""
        rows = [self._messages(ask) for ask in asks]
        replies: dict[int, Reply] = {}
        for kind in dict.fromkeys(map(kinds, rows)):
            numbers = [i for i, messages in enumerate(rows) if kinds(messages) == kind]
            some = [asks[i] for i in numbers]
            run = self._generate if some[0].continuation is None else self._score
            replies |= dict(zip(numbers, run(some, [rows[i] for i in numbers])))
        return [replies[i] for i in range(len(asks))]

    def _generate(self, asks: Sequence[Ask], rows: Sequence[Sequence[Message]]) -> list[Reply]:
        options = asks[0].options
        inputs = self.inputs(rows)
        new, lengths = self._run(asks, rows, inputs, dict(options.kwargs), options.until)
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        tokens = inputs["attention_mask"].sum(1).tolist()
        return [Reply(options.cut(text), prompt, n) for text, prompt, n in zip(texts, tokens, lengths)]

    def _score(self, asks: Sequence[Ask], rows: Sequence[Sequence[Message]]) -> list[Reply]:
        """The likelihood of given answers: they are generated, whatever the model thinks of them."""
        assert self.handle is not None
        if any(isinstance(one, BranchDoor) for one in self.handle.reporters) or beams_of(self.handle.adapters) > 1:
            raise NotImplementedError(
                f"{self.spec} decides on tokens by a second prompt or by a search: the likelihood of a given answer "
                "is not defined; tasks that generate are"
            )
        inputs = self.inputs(rows)
        targets = [self._continuation(ask, messages) for ask, messages in zip(asks, rows)]
        forced = Forced(targets, self._end())
        kwargs: dict[str, Any] = {"max_new_tokens": max(map(len, targets)), "do_sample": False, "num_beams": 1}
        kwargs |= {"repetition_penalty": 1.0, "temperature": None, "top_p": None, "top_k": None}
        self._run(asks, rows, inputs, kwargs, (), LogitsProcessorList([forced]))
        tokens = inputs["attention_mask"].sum(1).tolist()
        return [
            Reply(str(ask.continuation), prompt, len(target), -float(total) / len(target), bool(greedy))
            for ask, prompt, target, total, greedy in zip(asks, tokens, targets, forced.sums, forced.greedy)
        ]

    def _run(
        self,
        asks: Sequence[Ask],
        rows: Sequence[Sequence[Message]],
        inputs: dict[str, Tensor],
        kwargs: dict[str, Any],
        until: Sequence[str],
        processors: LogitsProcessorList | None = None,
    ) -> tuple[Tensor, list[int]]:
        """Generate, and count the cost. -> new tokens [B, T], and how many of them each row took"""
        assert self.handle is not None and self.sizes is not None
        self.sizes.found.clear()
        width = inputs["input_ids"].shape[1]
        extra: dict[str, Any] = {"pad_token_id": self.tokenizer.pad_token_id}
        if until:
            extra["stopping_criteria"] = StoppingCriteriaList([Stops(self.tokenizer, until, width)])
        if processors is not None:
            extra["logits_processor"] = processors
        with torch.no_grad():
            new = self.model.generate(**inputs, **kwargs, **extra)[:, width:]
        lengths = self._lengths(new)
        numbers = {kind: [count(messages, kind) for messages in rows] for kind in self.family.sources}
        real = inputs["attention_mask"].sum(1).tolist()
        entries = self.sizes.entries(self.handle, real, numbers, lengths, self.costs.depth)
        self.first = self.first or next((ask for ask in asks if ask.counts), None)
        self.costs.add(entry for ask, entry in zip(asks, entries) if ask.counts)
        return new, lengths

    def inputs(self, rows: Sequence[Sequence[Message]]) -> dict[str, Tensor]:
        """What the processor makes of conversations, padded on the left, on the model's device and in its type."""
        arguments = self.arguments
        frames = {"num_frames": arguments.num_frames, "fps": arguments.fps}
        settings: dict[str, Any] = {name: value for name, value in frames.items() if value is not None}
        given = self.processor.apply_chat_template(
            [list(messages) for messages in rows],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **(settings if count(rows[0], "video") else {})},
        )
        device, dtype = entrance(self.model), self.model.dtype
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in given.items()
            if isinstance(value, Tensor)
        }

    def _messages(self, ask: Ask) -> list[Message]:
        """The conversation of a request, pictures loaded; NotImplementedError for what the model does not take."""
        rows = [_placed(one) for one in ask.messages()]
        for part in (part for one in rows for part in one["content"] if part["type"] == "text"):
            part["text"] = self._words(part["text"])
        if self.arguments.system_prompt and rows[0]["role"] != "system":
            rows.insert(0, {"role": "system", "content": [{"type": "text", "text": self.arguments.system_prompt}]})
        for kind in ("image", "video", "audio"):
            if count(rows, kind) and kind not in self.family.sources:
                raise NotImplementedError(
                    f"a prompt with {kind}: {self.family.name} takes {' and '.join(self.family.sources)}s"
                )
        if count(rows, "video") and getattr(self.processor, "video_processor", None) is None:
            raise NotImplementedError(f"the processor of {self.name} reads videos by torchvision, which is missing")
        return rows

    def _continuation(self, ask: Ask, messages: Sequence[Message]) -> list[int]:
        """The tokens of a continuation behind its prompt; white space in front goes where the prompt ends in some."""
        prompt = self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        text = str(ask.continuation)
        text = text.lstrip() if prompt[-1:].isspace() else text

        def tokens(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        before, whole = tokens(prompt), tokens(prompt + text)
        found = whole[len(before) :] if whole[: len(before)] == before else tokens(text)
        if not found:
            raise ValueError(f"the answer {ask.continuation!r} whose likelihood is asked for has no tokens")
        return found

    def _words(self, text: str) -> str:
        """A text in which nothing is a token with a meaning of its own: `<image>` becomes `< image>`."""
        for token in self.control:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def _end(self) -> int:
        ends = self.model.generation_config.eos_token_id
        end = ends[0] if isinstance(ends, list | tuple) else ends
        return int(self.tokenizer.eos_token_id if end is None else end)

    def _lengths(self, new: Tensor) -> list[int]:
        """How many tokens each answer took, its end token included; padding behind it is none. new: [B, T]"""
        ends = self.model.generation_config.eos_token_id
        ends = torch.as_tensor(ends if ends is not None else [], device=new.device)
        ended = torch.isin(new, ends)
        pad = self.tokenizer.pad_token_id
        filled = (new != pad).flip(1).int().argmax(1)  # columns of padding at the end
        open_ = new.shape[1] - (filled if not torch.isin(torch.tensor(pad), ends.cpu()) else torch.zeros_like(filled))
        return torch.where(ended.any(1), ended.int().argmax(1) + 1, open_).tolist()

    def _set_pixels(self) -> None:
        """The limits of pixels, where the processor has any; ValueError where it has none."""
        asked = {name: getattr(self.arguments, name) for name in PIXELS}
        if not any(value is not None for value in asked.values()):
            return
        pictures = self.processor.image_processor
        size = pictures.size
        if not hasattr(pictures, "merge_size") or any(size.get(edge) is None for edge in EDGES.values()):
            raise ValueError(f"min_pixels, max_pixels: the processor of {self.name} does not size images by pixels")
        limits = {EDGES[name]: value for name, value in asked.items() if value is not None}
        pictures.size = type(size)(**{**dict(size), **limits})

    def latency(self) -> dict[str, Any]:
        """Times of the first request, alone in its batch, under the names of a result's `latency`; empty without one.

        The unpatched and the patched model take turns. Closes what was open.
        """
        if self.first is None or not self.arguments.latency:
            return {}
        ask, beams = self.first, beams_of(from_spec(self.spec))
        self.close()
        inputs = self.inputs([self._messages(ask)])
        threads = torch.get_num_threads()
        clock = Clock.of(entrance(self.model), threads)

        def once(spec: str) -> Any:
            with vlmfast.patch(self.model, spec) as handle:
                return generation(self.model, inputs, 1 + LATER, clock, beams=beams_of(handle.adapters))

        names = dict.fromkeys((UNPATCHED, self.spec))
        gc.collect()
        gc.freeze()  # between readings only what is made from now on is looked through
        try:
            read = interleave({name: partial(once, name) for name in names}, repeats=self.arguments.latency)
        finally:
            gc.unfreeze()
        own = read[self.spec]
        first = {name: [one.ttft_ms for one in readings] for name, readings in read.items()}
        later = [one.decode_ms_per_token for one in own if one.decode_ms_per_token is not None]
        return {
            "ttft_ms": asdict(Spread.of(first[self.spec])),
            "decode_ms_per_token": asdict(Spread.of(later)),
            "ttft_speedup": asdict(ratio(first[UNPATCHED], first[self.spec])),
            "beams": beams,
            "clock": clock.name,
            "device": str(entrance(self.model)),
            "threads": threads,
            "prompt": ask.name,
        }


EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # what Qwen's processors call their limits


class Stops(StoppingCriteria):
    """Ends an answer that says one of some texts. start: where answers begin in the ids.

    transformers' own way needs a tokenizer whose tokens join to text without spaces in between.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], start: int) -> None:
        self.tokenizer, self.until, self.start = tokenizer, tuple(until), start
        self.longest = max(map(len, until)) + 1  # tokens that the last stop can begin in, and one before it

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row is over. [B, L] -> bool [B]"""
        new = input_ids[:, max(self.start, input_ids.shape[1] - self.longest) :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        over = [any(stop in text for stop in self.until) for text in texts]
        return torch.tensor(over, dtype=torch.bool, device=input_ids.device)


class Forced(LogitsProcessor):
    """Makes `generate` say given tokens, and adds up what they are worth.

    targets: tokens of each row; behind its last one a row ends. sums: [B] log-likelihoods, fp32; greedy: whether each
    token is the likeliest.
    """

    def __init__(self, targets: Sequence[Sequence[int]], end: int) -> None:
        self.targets, self.end, self.step = targets, end, 0
        self.sums = [0.0] * len(targets)
        self.greedy = [True] * len(targets)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """-inf for all but the token that is next. [B, V] -> [B, V]"""
        logs = scores.float().log_softmax(-1)
        forced = torch.full_like(scores, -torch.inf)
        for row, target in enumerate(self.targets):
            token = target[self.step] if self.step < len(target) else self.end
            if self.step < len(target):
                self.sums[row] += float(logs[row, token])
                self.greedy[row] &= int(logs[row].argmax()) == token
            forced[row, token] = 0.0
        self.step += 1
        return forced


def batches(asks: Sequence[Ask], size: int) -> Iterator[list[int]]:
    """The numbers of requests, batch by batch: equal options together, the longest first."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, ask in enumerate(asks):
        groups.setdefault((ask.options, ask.continuation is None), []).append(number)
    for group in groups.values():
        ordered = sorted(group, key=lambda number: (-asks[number].length, number))
        yield from (ordered[i : i + size] for i in range(0, len(ordered), size))


def count(messages: Sequence[Message], kind: str) -> int:
    """How many parts of a kind a conversation has."""
    return sum(part["type"] == kind for one in messages for part in one["content"])


def kinds(messages: Sequence[Message]) -> tuple[bool, bool]:
    """Whether there are images, and videos."""
    return bool(count(messages, "image")), bool(count(messages, "video"))


def _placed(message: Message) -> Message:
    """A message of lmms-eval's as transformers' templates take it, pictures in RGB and where the text wants them."""
    content = message["content"]
    parts = [_part(part) for part in ([{"type": "text", "text": content}] if isinstance(content, str) else content)]
    pictures = [part for part in parts if part["type"] == "image"]
    texts = [part for part in parts if part["type"] == "text"]
    if pictures and sum(part["text"].count(MARK) for part in texts) == len(pictures):
        placed: list[dict[str, Any]] = [part for part in parts if part["type"] not in ("image", "text")]
        for text in texts:
            for i, piece in enumerate(text["text"].split(MARK)):
                placed += [pictures.pop(0)] if i else []
                placed += [{"type": "text", "text": piece}] if piece else []
        parts = placed
    return {"role": message["role"], "content": parts}


def _part(part: Message) -> Message:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    value = part.get("url", part.get(kind))
    if kind == "image" and isinstance(value, Image.Image):
        value = value.convert("RGB")
    return {"type": kind, kind: value}


def _load(name: str, arguments: Arguments) -> tuple[Any, Any]:
    """Model and processor where the arguments want them; one GPU for each of several processes.

    ValueError where several processes of a machine would each take all of its devices.
    """
    cuda, parts = torch.cuda.is_available(), arguments.device_map
    device = arguments.device or ("cuda" if cuda and parts is None else "cpu")
    device = of_environment().device(AUTO if isinstance(parts, str) else device)
    short = cuda if device == AUTO or parts is not None else device != "cpu"
    return load_model(
        name,
        device=device,
        dtype=arguments.dtype or ("bfloat16" if short else "float32"),
        device_map=arguments.device_map,
        attention=arguments.attn_implementation,
    )


__all__ = ["Ask", "Engine", "Forced", "Message", "Reply", "batches"]
