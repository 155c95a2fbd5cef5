"""Memory stays flat over a thousand prompts: nothing is kept of those that were answered."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import shared
from PIL import Image
from test_devices import DOORS, spec_of, written
from test_eval import folders, quick  # noqa: F401  fixtures

import vlmfast
from vlmfast.eval.lmms.arguments import Arguments
from vlmfast.eval.lmms.engine import Ask, Engine
from vlmfast.eval.lmms.options import Options
from vlmfast.eval.sweep import Job, sweep
from vlmfast.eval.tasks import TASKS, image, task_hash

pytestmark = pytest.mark.slow
PROMPTS = 1000
BYTES = 8e6  # that the allocator may keep more of; a picture's share of a thousand leaks would be larger
OBJECTS = 50  # that Python may have more of


@dataclass
class Held:
    """What the process holds: live tensors, objects that Python's collector knows, resident bytes.

    The C library keeps freed memory for a while; where it can be asked to, it gives it back first.
    """

    tensors: int
    objects: int
    resident: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        every = gc.get_objects()
        tensors = sum(issubclass(type(one), torch.Tensor) for one in every)
        return cls(tensors, len(every), psutil.Process().memory_info().rss)

    def stays(self, objects: int = OBJECTS) -> None:
        """Fails where more is held now. objects: that may have come."""
        now = Held.now()
        assert now.tensors <= self.tensors, "tensors stay behind"
        assert now.objects <= self.objects + objects, "objects stay behind"
        assert now.resident <= self.resident + BYTES, "memory stays behind"


def over(times: int, work: Callable[[int], Any]) -> None:
    """Do something again and again; what is held after a fifth of the times is held in the end."""
    for number in range(times // 5):
        work(number)
    before = Held.now()
    for number in range(times // 5, times):
        work(number)
    before.stays()


@pytest.mark.parametrize(("name", "family"), DOORS.items())
def test_answers_under_an_open_patch(name: str, family: str, tmp_path: Path) -> None:
    """A thousand, over all doors."""
    vlm = shared(family)
    prompts = [vlm.prompts([[length, "a", 4]]) for length in (3, 5, 7)]
    with vlmfast.patch(vlm.model, spec_of(name, family, tmp_path)) as handle:

        def work(number: int) -> None:
            written(vlm.model, prompts[number % 3])
            handle.report()

        over(PROMPTS // len(DOORS), work)


def test_patches_that_come_and_go(tmp_path: Path) -> None:
    vlm = shared("llava")
    inputs, specs = vlm.prompts([[3, "a", 4]]), [spec_of(name, "llava", tmp_path) for name in DOORS]

    def work(number: int) -> None:
        with torch.no_grad(), vlmfast.patch(vlm.model, specs[number % len(specs)]):
            if number % 5 == 0:
                vlm.model(**inputs)

    over(PROMPTS, work)


def test_questions_of_a_sweep(folders: Path, tmp_path: Path) -> None:  # noqa: F811
    """Answers are a few objects each until they are scored; pictures are encoded before the first."""
    tasks = {name: TASKS[name] for name in ("existence", "colour")}
    job = Job(
        model=str(folders / "llava"),
        model_hash="",
        specs=("none", "hiprune:keep=0.5+vcd"),
        hashes={name: task_hash(task, task.load(70, 0)) for name, task in tasks.items()},
        out=tmp_path,
        limit=70,
        seed=0,
        batch=16,
        device="cpu",
        dtype="float32",
        threads=1,
        command="",
    )
    answered = dict.fromkeys(job.specs, 0)
    held: dict[str, tuple[int, Held]] = {}

    def notify(event: str, spec: str, questions: int) -> None:
        if event == "answered":
            answered[spec] += questions
            if answered[spec] >= 100 and spec not in held:
                held[spec] = answered[spec], Held.now()
        else:
            since, before = held[spec]
            before.stays(10 * (answered[spec] - since))

    sweep(job, notify)
    assert sum(answered.values()) >= PROMPTS


def test_requests_of_lmms_eval() -> None:
    """Pictures are made when their batch is."""
    engine = Engine(Arguments(pretrained="testbed:llava", batch_size=8, latency=0))
    options, docs = Options.of({"max_new_tokens": 2}, 64), TASKS["colour"].load(10, 0)

    def ask(number: int) -> Ask:
        doc = docs[number % len(docs)]

        def messages() -> list[dict[str, Any]]:
            content = [{"type": "image", "url": Image.fromarray(image(doc))}, {"type": "text", "text": doc.prompt}]
            return [{"role": "user", "content": content}]

        return Ask(str(number), messages, len(doc.prompt), options)

    asks = [ask(number) for number in range(PROMPTS)]
    answered = 0
    held: list[Held] = []

    def notify(more: int) -> None:
        nonlocal answered
        answered += more
        if answered >= PROMPTS // 5 and not held:
            held.append(Held.now())
        elif answered == PROMPTS:
            held[0].stays(2 * PROMPTS)  # the replies

    engine.open("hiprune:keep=0.5")
    assert len(engine.answer(asks, notify)) == answered == PROMPTS
    engine.close()
