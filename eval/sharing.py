"""One evaluation by several processes, on one machine or on many that see the same folder.

`accelerate launch --num_processes 8 -m vlmfast eval ...` (or torchrun) starts the same command in every process. Each
plans the same batches and answers every so-many-th of them into a file of its own; the first one waits for the others'
answers, joins them and does what is left: scores, costs, times. A batch is the same batch whoever answers it, so that
the results are those of one process.

There is nothing but files between the processes: no barrier to be stuck at, and whatever was answered is there for the
next run, of as many processes as it likes. A process holds a lock while it works; one that does not, and still owes
answers, has died or never started.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmfast.eval.models import AUTO
from vlmfast.eval.results import Answers

GRACE = 300.0  # seconds that a process may take to start, or be gone, before it is given up
PAUSE = 0.2  # seconds between two looks at the others' answers


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's: number `rank` of `world`; on its machine, `local` of `beside`."""

    rank: int = 0
    world: int = 1
    local: int = 0
    beside: int = 1

    @property
    def first(self) -> bool:
        """Whether this process joins the answers and writes the results."""
        return self.rank == 0

    def owner(self, batch: int) -> int:
        """Who answers a batch."""
        return batch % self.world

    def device(self, name: str) -> str:
        """The device of this process: one GPU each where the user asked for "cuda".

        ValueError for "auto" where several processes would each take all devices of a machine.
        """
        if name == AUTO and self.beside > 1:
            raise ValueError(
                f"device auto shares a model out among all devices of a machine, and {self.beside} processes run on "
                "this one: start one process a machine, or give each its own GPU with --device cuda"
            )
        return f"cuda:{self.local}" if name == "cuda" and self.world > 1 else name


def of_environment() -> Share:
    """The part that the launcher gave this process, all of it without one. ValueError for numbers that cannot be."""
    values = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    if values["RANK"] is None or values["WORLD_SIZE"] is None:
        return Share()
    try:
        rank, world = int(values["RANK"]), int(values["WORLD_SIZE"])
        local, beside = int(values["LOCAL_RANK"] or 0), int(values["LOCAL_WORLD_SIZE"] or 1)
    except ValueError:
        raise ValueError(f"the launcher set {values}: RANK and WORLD_SIZE must be whole numbers") from None
    if not (0 <= rank < world and local >= 0 and beside > 0):
        raise ValueError(f"the launcher set {values}: RANK must lie from 0 to WORLD_SIZE - 1")
    return Share(rank, world, local, beside)


def joined(
    answers: Answers,
    share: Share,
    owed: dict[str, int],
    alive: Callable[[int], bool],
    seen: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, Any]]:
    """The answers of all processes, by question, as soon as they are complete.

    owed: the questions that must be there, and whose they are. alive: whether a process is at work. seen: told of how
    many answers have come. RuntimeError where a process that owes answers has not been at work for `GRACE` seconds.
    """
    missing_since: dict[int, float] = {}
    records: dict[str, dict[str, Any]] = {}
    read = -1
    while True:
        if (size := answers.size()) != read:  # read again only what has grown
            records, read = {record["id"]: record for record in answers.everybodys()}, size
            seen(len(records.keys() & owed.keys()))
        late = {owner for question, owner in owed.items() if question not in records}
        if not late:
            return records
        now = time.monotonic()
        for rank in late:
            if rank == share.rank or alive(rank):
                missing_since.pop(rank, None)
            elif now - missing_since.setdefault(rank, now) > GRACE:
                raise RuntimeError(
                    f"process {rank} of {share.world} is not at work and owes answers: it died, or never started; "
                    "run the same command again to go on from there"
                )
        time.sleep(PAUSE)
