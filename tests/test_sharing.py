"""Several processes share an evaluation: the results are those of one, whatever dies on the way."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_eval import TASKS_HERE, answers, finished, folders, quick, run, same  # noqa: F401  fixtures among them

from vlmfast.encoding import encode_images
from vlmfast.eval import sharing, sweep
from vlmfast.eval.results import Answers, locked, sole_writer
from vlmfast.eval.sharing import Share, joined, of_environment


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("world", [2, 3])
def test_shared_equals_alone(
    folders: Path,  # noqa: F811
    finished: list[Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    world: int,
) -> None:
    """The later processes first, so that the first one finds their answers; each answers its own batches alone."""
    for rank in reversed(range(world)):
        as_process(monkeypatch, rank, world)
        paths = run(folders, tmp_path)
        if rank:
            assert not any(path.exists() for path in paths)
            stored = [len(part.read_text().splitlines()) - 1 for part in tmp_path.glob("*process*.jsonl")]
            assert all(stored) and len(stored) == 3 * (world - rank)
    same(paths, finished)
    assert not list(tmp_path.glob("*process*"))


def test_a_process_encodes_what_it_asks_about(
    folders: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Picture by picture here: those of its own batches alone."""
    encoded: list[int] = []

    def encode(model: Any, methods: Any, **inputs: Any) -> Any:
        encoded[-1] += len(inputs["pixel_values"])
        return encode_images(model, methods, **inputs)

    monkeypatch.setattr(sweep, "ENCODE", 1)
    monkeypatch.setattr(sweep, "encode_images", encode)
    for rank in (2, 1):
        encoded.append(0)
        as_process(monkeypatch, rank, 3)
        run(folders, tmp_path, tasks=["word"], limit=3, batch=1)
    assert min(encoded) > 0 and max(encoded) < 3


def test_the_first_process_waits_for_answers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "PAUSE", 0.01)
    own = Answers(tmp_path / "m--s.jsonl", {"spec": "s"})
    other = own.of_process(1)
    own.of_process(0).start([{"id": "a"}])
    other.start([])
    told: list[int] = []

    def alive(rank: int) -> bool:
        if len(told) < 2:  # it has told of what there is: time for the next answer
            other.append([{"id": "b"}] if len(told) == 1 else [])
        return True

    found = joined(own, Share(0, 2), {"a": 0, "b": 1}, alive, told.append)
    assert list(found) == ["a", "b"]
    assert told == [1, 2]


def test_a_process_that_owes_answers_and_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "PAUSE", 0.01)
    monkeypatch.setattr(sharing, "GRACE", 0.1)
    own = Answers(tmp_path / "m--s.jsonl", {"spec": "s"})
    own.of_process(0).start([{"id": "a"}])
    with pytest.raises(RuntimeError, match="process 1 of 2 is not at work"):
        joined(own, Share(0, 2), {"a": 0, "b": 1}, lambda rank: False)


def test_what_dead_processes_left_is_used(
    folders: Path,  # noqa: F811
    finished: list[Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Process 2 of 3 never starts; one process alone goes on from what the others answered, and answers the rest."""
    monkeypatch.setattr(sharing, "GRACE", 0.0)
    as_process(monkeypatch, 1, 3)
    run(folders, tmp_path)
    as_process(monkeypatch, 0, 3)
    with pytest.raises(RuntimeError, match="process 2 of 3"):
        run(folders, tmp_path)
    left = {path.name: path.read_bytes() for path in tmp_path.glob("*process*")}
    assert left
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    paths = run(folders, tmp_path)
    same(paths, finished)
    assert not list(tmp_path.glob("*process*"))


def test_locks(tmp_path: Path) -> None:
    assert not locked(tmp_path, "m", 1)
    with sole_writer(tmp_path, "m", 1):
        assert locked(tmp_path, "m", 1)
        assert not locked(tmp_path, "m", 0)
        with pytest.raises(OSError, match="another process"), sole_writer(tmp_path, "m", 1):
            pass
    assert not locked(tmp_path, "m", 1)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must lie"), ({"RANK": "x", "WORLD_SIZE": "2"}, "whole numbers")],
)
def test_environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str], said: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        of_environment()


def test_devices() -> None:
    assert Share(3, 8, 1, 2).device("cuda") == "cuda:1"
    assert Share(3, 8, 1, 2).device("cuda:0") == "cuda:0"
    assert Share(3, 8, 1, 2).device("cpu") == "cpu"
    assert Share().device("cuda") == "cuda"
    assert Share(3, 8, 0, 1).device("auto") == "auto"
    with pytest.raises(ValueError, match="2 processes run on this one"):
        Share(3, 8, 1, 2).device("auto")


def launched(folders: Path, out: Path, world: int = 2) -> list[str]:  # noqa: F811
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_port=0"]
    command += ["-m", "vlmfast", "eval", "--model", str(folders / "llava"), "--method", "random", "--keep", "0.5"]
    return [*command, *(f"--task={task}" for task in TASKS_HERE), "--limit", "2", "--batch", "5", "--out", str(out)]


def alone(folders: Path, out: Path) -> list[str]:  # noqa: F811
    whole = launched(folders, out)
    return [sys.executable, *whole[whole.index("vlmfast") - 1 :]]


def told(out: Path) -> dict[str, Any]:
    """What runs answered and scored, without times."""
    found: dict[str, Any] = {}
    for path in sorted(out.glob("*--*.json")):
        data = json.loads(path.read_text())
        found[path.name] = data["tasks"], data["macro"], data["cost"], answers(path)
    return found


@pytest.mark.slow
def test_two_processes_from_the_command_line(folders: Path, tmp_path: Path) -> None:  # noqa: F811
    for out, command in ((tmp_path / "two", launched), (tmp_path / "one", alone)):
        done = subprocess.run(command(folders, out), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        assert (out / "report.html").exists()
    assert told(tmp_path / "two") == told(tmp_path / "one")
    assert len(told(tmp_path / "one")) == 2


@pytest.mark.slow
def test_killed_again_and_again(folders: Path, tmp_path: Path) -> None:  # noqa: F811
    """Twenty times, at random moments, by one process or by two; what comes in the end is what one run gives."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(alone(folders, tmp_path / "whole"), env=environment, check=True, capture_output=True)
    chance, out, kills = random.Random(0), tmp_path / "killed", 0
    for _ in range(60):
        command = launched(folders, out) if chance.random() < 0.3 else alone(folders, out)
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
        try:
            process.wait(timeout=chance.uniform(2.0, 9.0) if kills < 20 else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            kills += 1
            time.sleep(0.1)
            continue
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read().decode()[-2000:]
        if kills >= 20:
            break
        if chance.random() < 0.7:  # done too soon: take a finished run away
            for path in out.glob("*random*"):
                path.unlink()
    assert kills == 20
    assert told(out) == told(tmp_path / "whole")
