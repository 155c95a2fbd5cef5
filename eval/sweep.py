"""One model through all its specs: encode every picture once, answer every question under every spec, score.

Questions about a picture fall together, and prefill what they have in common once (see `vlmfast.eval.prefixes`).

The order of work is fixed by the arguments alone, batches included, so that a sweep that was interrupted and goes on
gives the same answers as one that was not: whole batches are kept, a batch that was cut short is answered again.
"""

import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlmfast
from vlmfast.adapter import Adapter
from vlmfast.adapters import from_spec, to_spec
from vlmfast.cost import CONVENTION
from vlmfast.encoding import encode_images, encoder_outputs
from vlmfast.eval.attention import edits
from vlmfast.eval.attention import measure as measure_attention
from vlmfast.eval.environment import describe
from vlmfast.eval.latency import Clock, generation, interleave, measure, ratio, use_threads
from vlmfast.eval.metrics import Counts, retention
from vlmfast.eval.metrics import measure as intervals
from vlmfast.eval.models import load_model
from vlmfast.eval.prefixes import divide, prefilled, shareable
from vlmfast.eval.prompts import Prompts, Row
from vlmfast.eval.results import SCHEMA, Answers, Result, TaskResult, locked, run_name, sole_writer, write_result
from vlmfast.eval.sharing import Share, joined
from vlmfast.eval.tasks import Doc, choose, image
from vlmfast.eval.tasks import task as task_named
from vlmfast.families import family_of
from vlmfast.patching import entrance
from vlmfast.solving import cost_of
from vlmfast.towers import Picture, size_of
from vlmfast.visual import VisualTokens

UNPATCHED = "none"
SAMPLES = 6  # questions whose answers and kept tokens are stored in the result, for the page
SHOWN = 24  # questions whose kept tokens are noted beside their answers, for the page: those, and more
CAPTIONS = 3  # of which so many captions, or that many more, where captions are asked for
ENCODE = 16  # pictures in one pass of the vision tower
REPEATS = 5  # readings of each latency
PARTS = ("tower", "projector", "selection", "prefill", "head", "decode", "total_prefill", "total", "kv_bytes")
Notify = Callable[[str, str, int], None]  # ("answered", spec, questions) or ("finished", spec, questions)


@dataclass(frozen=True)
class Job:
    """One model and the runs it still owes: all that a worker process needs to know."""

    model: str
    model_hash: str
    specs: tuple[str, ...]
    hashes: dict[str, str]  # of the tasks, by name
    out: Path
    limit: int | None
    seed: int
    batch: int
    device: str
    dtype: str
    threads: int
    command: str
    beams: int = 1  # `num_beams` of every run, but for methods that need more than greedy search
    share: Share = Share()  # which batches are this process's
    matched: dict[str, float] = field(default_factory=dict)  # spec -> share of the FLOPs that its keep was solved for

    def identity(self, spec: str) -> dict[str, Any]:
        """What the files of one run must agree on (see `vlmfast.eval.results`)."""
        names = ("model_hash", "limit", "seed", "batch", "device", "dtype", "beams")
        fields = {name: getattr(self, name) for name in names}
        return {"schema": SCHEMA, "spec": spec, "tasks": self.hashes} | fields

    def beams_of(self, methods: Sequence[Adapter]) -> int:
        """`num_beams` of one run: the job's, or, where that is greedy search, what the methods need."""
        return beams_of(methods) if self.beams == 1 else self.beams

    def path(self, spec: str) -> Path:
        """Where the result of one run belongs."""
        return self.out / f"{run_name(self.model, spec)}.json"

    def answers(self, spec: str) -> Answers:
        """The raw answers of one run."""
        return Answers(self.path(spec).with_name(f"{run_name(self.model, spec)}.jsonl"), self.identity(spec))


def sweep(job: Job, notify: Notify) -> None:
    """Make every run of the job; what is done is on the disk whenever this stops.

    Of several processes the first one writes the results, the others their answers.
    """
    with sole_writer(job.out, job.model, job.share.rank), use_threads(job.threads), torch.no_grad():
        work = Sweep(job)
        gc.collect()
        gc.freeze()  # timings collect garbage between readings: only what is made from now on need be looked through
        try:
            for spec in job.specs:
                work.run(spec, notify)
        finally:
            gc.unfreeze()


class Sweep:
    """A loaded model with everything that the runs of a job share. loaded: model and processor, None: by the job."""

    def __init__(self, job: Job, loaded: tuple[Any, Any] | None = None) -> None:
        self.job = job
        self.model, processor = loaded or load_model(job.model, device=job.share.device(job.device), dtype=job.dtype)
        self.prompts = Prompts(processor, entrance(self.model), self.model.dtype)
        self.depth = self.model.config.get_text_config().num_hidden_layers
        sources = family_of(self.model).sources.values()
        self.placeholders = [int(getattr(self.model.config, source.token)) for source in sources]
        self.tasks = choose(list(job.hashes))
        self.docs = self.documents()
        self.scenes = list(dict.fromkeys(doc.scene for doc in self.docs))
        self.batches = self._plan()
        self.samples = fixed_samples(self.docs)
        self.shown = {doc.id for doc in more_samples(self.docs, self.samples)}
        self.pictures = self._encode()

    def documents(self) -> list[Doc]:
        """The questions."""
        return [doc for task in self.tasks.values() for doc in task.load(self.job.limit, self.job.seed)]

    def row(self, doc: Doc) -> Row:
        """The tokens of a document's prompt."""
        return self.prompts.row(self.tasks[doc.task].prompt(doc), image(doc))

    def _plan(self) -> list[list[Doc]]:
        """The batches, the same in every run: by longest answer, then picture by picture, by the length of prompts."""
        kinds: dict[int, dict[int, list[Doc]]] = {}
        for doc in self.docs:
            kinds.setdefault(self.tasks[doc.task].NEW_TOKENS, {}).setdefault(doc.scene, []).append(doc)
        size = self.job.batch
        batches = []
        for _, scenes in sorted(kinds.items()):
            ordered = sorted(scenes.values(), key=lambda docs: max(len(self.row(doc)["input_ids"]) for doc in docs))
            docs = list(chain.from_iterable(ordered))
            batches += [docs[i : i + size] for i in range(0, len(docs), size)]
        return batches

    def _encode(self) -> dict[int, tuple[VisualTokens, dict[str, Tensor]]]:
        """Each scene's visual tokens, with the statistics that any spec wants, and its other inputs, each [1, ...]."""
        methods = [adapter for spec in self.job.specs for adapter in from_spec(spec)]
        first = {doc.scene: doc for doc in reversed(self.docs)}
        mine = {doc.scene for _, batch in self.mine() for doc in batch}
        found = {}
        for start in range(0, len(self.scenes), ENCODE):  # the same groups in every process
            scenes = self.scenes[start : start + ENCODE]
            if mine.isdisjoint(scenes):
                continue
            inputs: dict[str, Any] = self.prompts.pictures([image(first[scene]) for scene in scenes])
            try:
                visual = encode_images(self.model, methods, **inputs)
            except Exception as error:
                what = f"encoding the pictures of the {first[scenes[0]].split} scenes {', '.join(map(str, scenes))}"
                raise RuntimeError(failure(self.job.model, what, error)) from error
            if len(visual) != len(scenes):
                raise NotImplementedError(
                    f"the processor of {self.job.model} cuts images into tiles that count as pictures of their own: "
                    "let it make one of each image (its setting crop_to_patches), or ask lmms-eval's tasks"
                )
            # Pixels, and what is as large, are for the encoder alone.
            others = {name: value for name, value in inputs.items() if len(value) == len(scenes) and value.ndim < 3}
            others.pop("pixel_values", None)
            for i, scene in enumerate(scenes):
                found[scene] = visual[i], {name: value[i : i + 1] for name, value in others.items()}
        return found

    def mine(self) -> list[tuple[int, list[Doc]]]:
        """The batches of this process, with their numbers."""
        share = self.job.share
        return [(i, batch) for i, batch in enumerate(self.batches) if share.owner(i) == share.rank]

    def run(self, spec: str, notify: Notify) -> None:
        """Answer what is not answered yet, score, measure, and store the result."""
        started, share = datetime.now(timezone.utc).isoformat(timespec="seconds"), self.job.share
        answers = self.job.answers(spec)
        records = self.whole(answers.everybodys())
        if share.world == 1:
            own = answers
            answers.join(records.values())
        else:
            own = answers.of_process(share.rank)
            own.start(self.whole(own.read()).values())
        notify("answered", spec, len(records))
        with vlmfast.patch(self.model, spec) as handle:
            for _, batch in self.mine():
                if batch[0].id not in records:
                    new = self.answer(batch, spec, handle)
                    own.append(new)
                    records |= {record["id"]: record for record in new}
                    notify("answered", spec, len(new))
        if not share.first:
            notify("finished", spec, len(records))
            return
        if share.world > 1:
            records = self.gather(answers, spec, notify, len(records))
        write_result(self.job.path(spec), self.result(spec, records, started))
        notify("finished", spec, len(records))

    def whole(self, stored: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Those of the stored answers that belong to whole batches, by question in the order of the batches."""
        records = {record["id"]: record for record in stored}
        # Older files may lack pictures' sizes, and the kept tokens of questions that are shown.
        complete = [record for record in records.values() if "picture" in record]
        known = {record["id"] for record in complete if record["id"] not in self.shown or "indices" in record}
        whole = [batch for batch in self.batches if all(doc.id in known for doc in batch)]
        return {doc.id: records[doc.id] for batch in whole for doc in batch}

    def gather(self, answers: Answers, spec: str, notify: Notify, told: int) -> dict[str, dict[str, Any]]:
        """The answers of all processes, joined in one file. told: how many are known of already."""
        share, alive = self.job.share, partial(locked, self.job.out, self.job.model)

        def seen(count: int) -> None:
            nonlocal told
            if count > told:
                notify("answered", spec, count - told)
                told = count

        owed = {doc.id: share.owner(i) for i, batch in enumerate(self.batches) for doc in batch}
        records = self.whole(list(joined(answers, share, owed, alive, seen).values()))
        answers.join(records.values())
        return records

    def answer(self, batch: Sequence[Doc], spec: str, handle: Any) -> list[dict[str, Any]]:
        """One record for each question of a batch; RuntimeError names the question that could not be answered."""
        try:
            return self._generate(batch, handle)
        except Exception as error:
            for doc in batch if len(batch) > 1 else ():
                try:
                    self._generate([doc], handle)
                except Exception as alone:
                    raise RuntimeError(
                        failure(f"{self.job.model} with {spec}", f"question {doc.id}", alone)
                    ) from alone
            if len(batch) == 1:
                raise RuntimeError(
                    failure(f"{self.job.model} with {spec}", f"question {batch[0].id}", error)
                ) from error
            what = f"the batch of {len(batch)} from question {batch[0].id} on, though each question works alone"
            raise RuntimeError(
                failure(f"{self.job.model} with {spec}", what, error) + " (try a smaller --batch)"
            ) from error

    def _generate(self, batch: Sequence[Doc], handle: Any) -> list[dict[str, Any]]:
        start = time.perf_counter()
        pictures = [self.pictures[doc.scene] for doc in batch]
        beams = self.job.beams_of(handle.adapters)
        inputs, of = self._inputs(batch, shareable(self.model, handle.adapters, beams))
        sequences = self.model.generate(
            **inputs, max_new_tokens=self.tasks[batch[0].task].NEW_TOKENS, do_sample=False, num_beams=beams
        )
        new = sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.prompts.tokenizer.batch_decode(new, skip_special_tokens=True)
        kept, layers = self._kept(pictures, of, handle)
        seconds = (time.perf_counter() - start) / len(batch)
        return [
            {
                "id": doc.id,
                "prompt": self.tasks[doc.task].prompt(doc),
                "expected": doc.answer,
                "answer": text.strip(),
                "tokens": length,
                "kept": len(indices),
                "picture": asdict(size_of(visual.patches, visual.views, visual.span)),
                **({"layers": held} if set(held) != {len(indices)} else {}),
                **({"indices": indices, "grid": visual.grid} if doc.id in self.shown else {}),
                "seconds": round(seconds, 5),
            }
            for doc, text, length, indices, held, (visual, _) in zip(
                batch, texts, self._lengths(new), kept, layers, pictures
            )
        ]

    def _inputs(self, batch: Sequence[Doc], share: bool) -> tuple[dict[str, Any], list[int]]:
        """The arguments of `generate` for a batch, and which of the prompts that are reported is each question's.

        share: what the questions about a picture have in common is prefilled here, once.
        """
        rows = [self.row(doc) for doc in batch]
        divided = divide(rows, [doc.scene for doc in batch], self.placeholders) if share else None
        if divided is None:
            return self._whole(rows, batch), list(range(len(batch)))
        beginnings = self._whole(divided.beginnings, [batch[row] for row in divided.first])
        return prefilled(self.model, beginnings, self.prompts.batch(divided.rests), divided.of), divided.of

    def _whole(self, rows: Sequence[Row], docs: Sequence[Doc]) -> dict[str, Any]:
        """Inputs of the model for token rows with the pictures of some questions."""
        pictures = [self.pictures[doc.scene] for doc in docs]
        inputs: dict[str, Any] = self.prompts.batch(rows)
        inputs |= {name: torch.cat([others[name] for _, others in pictures]) for name in pictures[0][1]}
        return inputs | {"mm_encoder_outputs": encoder_outputs([visual for visual, _ in pictures], model=self.model)}

    def _kept(
        self, pictures: Sequence[tuple[VisualTokens, Any]], of: Sequence[int], handle: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Each row's kept indices, and the visual tokens in each decoder layer, as reported of the prompts prefilled.

        of: which of these prompts is each row's.
        """
        report = handle.report()
        kept = [indices.tolist() for indices in report.kept]
        layers = [list(prompt.per_layer) for prompt in report.prompts]
        if not report.prunes:
            kept = [list(range(len(visual))) for visual, _ in pictures]
            layers = [[visual.span] * self.depth for visual, _ in pictures]
            return kept, layers
        if not len(kept) == len(layers) == max(of) + 1:
            raise RuntimeError(f"the report tells of {len(kept)} pictures, the batch has {max(of) + 1}")
        return [kept[prompt] for prompt in of], [layers[prompt] for prompt in of]

    def _lengths(self, new: Tensor) -> list[int]:
        """How many tokens each answer took, its end token included. new: [B, T]"""
        config = self.model.generation_config
        ends = torch.as_tensor(config.eos_token_id if config.eos_token_id is not None else [], device=new.device)
        ended = torch.isin(new, ends)
        first = torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1])
        return first.tolist()

    def counts(self, records: dict[str, dict[str, Any]]) -> dict[str, Counts]:
        """The scores of all answers of a run, summed over pictures, by task."""
        counts = {}
        for name, task in self.tasks.items():
            docs = [doc for doc in self.docs if doc.task == name]
            scores = [task.score(doc, records[doc.id]["answer"]) for doc in docs]
            counts[name] = Counts.of(scores, [doc.scene for doc in docs], self.scenes)
        return counts

    def result(self, spec: str, records: dict[str, dict[str, Any]], started: str) -> Result:
        """Everything that is stored about a finished run."""
        job, start = self.job, time.perf_counter()
        baseline = None
        if spec != UNPATCHED:
            baseline = self.counts({record["id"]: record for record in job.answers(UNPATCHED).read()})
        summarise = {name: task.summarise for name, task in self.tasks.items()}
        headline = {name: task.HEADLINE for name, task in self.tasks.items()}
        counts = self.counts(records)
        metrics, macro = intervals(counts, summarise, headline, baseline, job.seed)
        tasks = {
            name: TaskResult(
                hash=job.hashes[name],
                n=sum(doc.task == name for doc in self.docs),
                images=len({doc.scene for doc in self.docs if doc.task == name}),
                headline=task.HEADLINE,
                metrics=metrics[name],
            )
            for name, task in self.tasks.items()
        }
        cost, latency = self.cost(spec, records), self.latency(spec)
        method, keep = describe_spec(spec)
        return Result(
            model=job.model,
            model_hash=job.model_hash,
            spec=spec,
            method=method,
            keep=keep,
            matched=job.matched.get(spec),
            limit=job.limit,
            seed=job.seed,
            batch=job.batch,
            device=job.device,
            dtype=job.dtype,
            tasks=tasks,
            macro=macro,
            retention=None if baseline is None else retention(counts, summarise, headline, baseline, job.seed),
            cost=cost,
            latency=latency,
            attention=self.attention(spec),
            beams=job.beams,
            environment=describe(job.device),
            command=job.command,
            started=started,
            seconds=round(sum(r["seconds"] for r in records.values()) + time.perf_counter() - start, 3),
            samples=[self._sample(doc, records[doc.id]) for doc in self.samples],
        )

    def _sample(self, doc: Doc, record: dict[str, Any]) -> dict[str, Any]:
        """One stored question: `index` is the test scene, `kept` the indices of the kept visual tokens a picture."""
        return {
            "task": doc.task,
            "index": doc.scene,
            "prompt": record["prompt"],
            "answer": record["answer"],
            "expected": record["expected"],
            "kept": [record["indices"]],
            "grid": list(record["grid"]),
        }

    def cost(self, spec: str, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The analytic cost, mean over all prompts; `decode` counts the tokens that were really generated.

        `visual_tokens` is what is left of a picture in the end, `visual_tokens_per_layer` what each layer holds.
        """
        config, methods = self.model.config, from_spec(spec)
        prompts: Counter[tuple[Any, ...]] = Counter()
        kept = before = 0
        for doc in self.docs:
            record = records[doc.id]
            picture = Picture(**record["picture"] | {"patches": tuple(record["picture"]["patches"])})
            layers = tuple(record.get("layers") or [record["kept"]] * self.depth)
            text = len(self.row(doc)["input_ids"]) - picture.span
            prompts[text, picture, layers, record["tokens"]] += 1
            kept += record["kept"]
            before += picture.tokens
        sums: Counter[str] = Counter()
        held = [0] * self.depth
        for (text, size, layers, generated), times in prompts.items():
            cost = cost_of(config, methods, text, [size], layers, generated)
            for part in PARTS:
                sums[part] += times * getattr(cost, part)
            sums["unpatched"] += times * cost_of(config, (), text, [size]).total_prefill
            held = [total + times * number for total, number in zip(held, layers)]
        n = len(self.docs)
        return {
            "convention": CONVENTION,
            **{part: round(sums[part] / n) for part in PARTS},
            "share_of_unpatched": sums["total_prefill"] / sums["unpatched"],
            "visual_tokens": kept / n,
            "visual_tokens_before": before / n,
            "visual_tokens_per_layer": [total / n for total in held],
        }

    def attention(self, spec: str) -> dict[str, Any] | None:
        """Where attention goes on the fixed samples, unpatched and patched; None for specs that do not edit it.

        In greedy search, by itself: without what a decoding method of the spec makes of the logits.
        """
        if not edits(spec):
            return None
        spec = to_spec([adapter for adapter in from_spec(spec) if adapter.kind != "decoding"])
        prompts = [self.prompts.full(self.tasks[doc.task].prompt(doc), image(doc)) for doc in self.samples[:SAMPLES]]
        return measure_attention(self.model, spec, prompts)

    def latency(self, spec: str) -> dict[str, Any]:
        """Timings of one fixed prompt, alone in its batch, tower included; `ttft_speedup` against the unpatched model.

        For the speed-up the unpatched and the patched model take turns, here and now: unlike a comparison with the
        timings of another run it does not mind what else the machine was doing then.
        """
        doc = self.samples[0]
        inputs = self.prompts.full(self.tasks[doc.task].prompt(doc), image(doc))
        clock = Clock.of(entrance(self.model), self.job.threads)

        def first_token(spec: str) -> float:
            with vlmfast.patch(self.model, spec) as handle:
                return generation(self.model, inputs, 1, clock, beams=self.job.beams_of(handle.adapters)).ttft_ms

        with vlmfast.patch(self.model, spec) as handle:
            beams = self.job.beams_of(handle.adapters)
            latency = measure(self.model, inputs, repeats=REPEATS, threads=self.job.threads, beams=beams)
        readings = interleave(
            {name: partial(first_token, name) for name in dict.fromkeys((UNPATCHED, spec))}, repeats=REPEATS
        )
        return latency.as_dict() | {"ttft_speedup": asdict(ratio(readings[UNPATCHED], readings[spec]))}


def fixed_samples(docs: Sequence[Doc]) -> list[Doc]:
    """A few questions, the same in every run: spread over the tasks, each about another picture where possible.

    The first SAMPLES of them do not depend on whether there are captions; behind them come captions that are missing.
    """
    names = _names(docs)
    chosen: list[Doc] = []
    for i in range(min(SAMPLES, len(docs))):
        task = names[i * len(names) // SAMPLES if len(names) >= SAMPLES else i % len(names)]
        left = [doc for doc in docs if doc.task == task and doc not in chosen] or [d for d in docs if d not in chosen]
        seen = {doc.scene for doc in chosen}
        chosen.append(next((doc for doc in left if doc.scene not in seen), left[0]))
    captions = [doc for doc in docs if hasattr(task_named(doc.task), "mentions")]
    missing = CAPTIONS - sum(doc in captions for doc in chosen)
    return chosen + [doc for doc in captions if doc not in chosen][: max(0, missing)]


def more_samples(docs: Sequence[Doc], samples: Sequence[Doc]) -> list[Doc]:
    """The samples and more questions behind them, in turn of every task, about as many pictures as possible."""
    chosen, seen = list(samples), {doc.scene for doc in samples}
    left = {name: [doc for doc in docs if doc.task == name and doc not in samples] for name in _names(docs)}
    while len(chosen) < SHOWN and any(left.values()):
        for some in left.values():
            if some and len(chosen) < SHOWN:
                doc = next((doc for doc in some if doc.scene not in seen), some[0])
                some.remove(doc)
                seen.add(doc.scene)
                chosen.append(doc)
    return chosen


def _names(docs: Sequence[Doc]) -> list[str]:
    """The tasks of some questions, in their order."""
    return list(dict.fromkeys(doc.task for doc in docs))


def failure(run: str, what: str, error: Exception) -> str:
    """The message for something that could not be computed."""
    return f"{run} stopped at {what}: {type(error).__name__}: {error}"


def beams_of(methods: Sequence[Adapter]) -> int:
    """`num_beams` that some methods need, 1: none of them minds."""
    return max((method.beams for method in methods), default=1)


def describe_spec(spec: str) -> tuple[str, float | int | None]:
    """The method's name (several joined by +) and its keep, None if it has none."""
    adapters = from_spec(spec)
    keeps = [vars(adapter)["keep"] for adapter in adapters if adapter.drops and "keep" in adapter.settings()]
    return "+".join(adapter.name for adapter in adapters) or UNPATCHED, keeps[0] if keeps else None
