"""Files in a folder of results that are damaged, or not ours: named in one line, and left as they are."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import call, refused
from test_eval import TASKS_HERE, answers, finished, folders, quick  # noqa: F401  fixtures among them

from vlmfast.eval.lmms.runner import Work
from vlmfast.eval.results import locked

HALF = "*--random-keep=0.5"
pytestmark = pytest.mark.slow


@pytest.fixture
def out(finished: list[Path], tmp_path: Path) -> Path:  # noqa: F811
    """A folder with three complete runs."""
    return Path(shutil.copytree(finished[0].parent, tmp_path / "out"))


def words(folders: Path, out: Path) -> list[Any]:  # noqa: F811
    tasks = [word for task in TASKS_HERE for word in ("--task", task)]
    more = ["--method", "random", "--keep", "1.0,0.5", "--limit", 2, "--batch", 5, "--device", "cpu"]
    return ["eval", "--model", folders / "llava", *more, *tasks, "--out", out]


def one(out: Path, pattern: str) -> Path:
    (path,) = out.glob(pattern)
    return path


def inside(folder: Path) -> dict[Path, Any]:
    """Every file with its bytes, links as links."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name not in ("report.html", "pareto.png", "runs.csv")
    }


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], bytes]:
    """A result whose JSON was changed."""

    def content(path: Path) -> bytes:
        data = json.loads(path.read_text())
        change(data)
        return json.dumps(data).encode()

    return content


RESULTS: dict[str, tuple[Callable[[Path], bytes], str, str]] = {  # what eval says of it, and report ("": nothing)
    "empty": (lambda path: b"", "not a readable result", "not a readable result"),
    "cut": (lambda path: path.read_bytes()[:200], "not a readable result", "not a readable result"),
    "no text": (lambda path: b"\x89PNG\r\n\x1a\n\xff", "not a readable result", "not a readable result"),
    "somebody's JSON": (lambda path: b'{"name": "x"}', "its schema is None", "its schema is None"),
    "a later schema": (edited(lambda data: data.update(schema=2)), "reads schema 1", "reads schema 1"),
    "other weights": (edited(lambda data: data.update(model_hash="x")), "other weights", ""),
    "other limit": (edited(lambda data: data.update(limit=3)), "limit 3 (now 2)", ""),
    "no tasks": (edited(lambda data: data.update(tasks=None)), "do not fit", "do not fit"),
    "no number": (edited(lambda data: data["macro"].update(value="x")), "do not fit", "do not fit"),
    "no headline": (edited(lambda data: data["tasks"]["word"].update(headline="x")), "no metric 'x'", "no metric 'x'"),
}


@pytest.mark.parametrize("damage", RESULTS)
def test_damaged_results(folders: Path, out: Path, damage: str) -> None:  # noqa: F811
    content, by_eval, by_report = RESULTS[damage]
    path = one(out, f"{HALF}.json")
    path.write_bytes(content(path))
    before = inside(out)
    refused(call(*words(folders, out)), path, by_eval)
    if by_report:
        refused(call("report", out), path, by_report)
    else:
        assert call("report", out).exit_code == 0
    assert inside(out) == before


def test_what_is_no_file(folders: Path, out: Path) -> None:  # noqa: F811
    for pattern in (f"{HALF}.json", f"{HALF}.jsonl"):
        path = one(out, pattern)
        kept = path.read_bytes()
        path.unlink()
        path.mkdir()
        (path / "mine").write_text("x")
        before = inside(out)
        refused(call(*words(folders, out)), path, "Is a directory")
        if path.suffix == ".json":
            refused(call("report", out), path, "Is a directory")
        assert inside(out) == before
        shutil.rmtree(path)
        path.write_bytes(kept)


def test_what_may_not_be_read(folders: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    path, plain = one(out, f"{HALF}.json"), Path.read_text

    def read(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == path:  # root reads whatever the mode says
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    refused(call(*words(folders, out)), path, "Permission denied")
    refused(call("report", out), path, "Permission denied")


ANSWERS: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "torn in the middle": (lambda lines: [*lines[:2], lines[2][:-9], *lines[3:]], "damaged in line 3"),
    "torn in the first": (lambda lines: [lines[0][:-9], *lines[1:]], "damaged in line 1"),
    "somebody's": (lambda lines: [b'{"text": "hello"}', *lines[1:]], "damaged in line 1"),
    "no text": (lambda lines: [b"\xff\xfe", b""], "damaged in line 1"),
    "of another run": (lambda lines: [lines[0].replace(b'"seed": 0', b'"seed": 1'), *lines[1:]], "seed 1 (now 0)"),
}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("part", ["", ".process1"])
@pytest.mark.parametrize("damage", ANSWERS)
def test_damaged_answers(folders: Path, out: Path, damage: str, part: str, complete: bool) -> None:  # noqa: F811
    """Of the run, or of a process that has a share in it; of a run that is complete, or goes on."""
    whole = one(out, f"{HALF}.jsonl")
    path = whole.with_name(f"{whole.stem}{part}.jsonl")
    path.write_bytes(b"\n".join(ANSWERS[damage][0](whole.read_bytes().split(b"\n"))))
    if not complete:
        one(out, f"{HALF}.json").unlink()
    before = inside(out)
    refused(call(*words(folders, out)), path, ANSWERS[damage][1])
    assert call("report", out).exit_code == 0
    assert inside(out) == before


def test_lost_answers(folders: Path, out: Path) -> None:  # noqa: F811
    one(out, f"{HALF}.jsonl").unlink()
    refused(call(*words(folders, out)), one(out, f"{HALF}.json"), "lost its answers")


def test_lmms_tasks_leave_them_alone(out: Path) -> None:
    """The same, where lmms-eval scores: also answers of a run that is not complete, which it would begin anew."""
    answered, name = one(out, f"{HALF}.jsonl"), f"{one(out, '*--none.json').name.removesuffix('--none.json')}"
    identity = json.loads(answered.read_bytes().split(b"\n")[0])["run"]
    work = Work(name, out, {key: value for key, value in identity.items() if key != "spec"}, [])
    spec, stored = identity["spec"], one(out, f"{HALF}.json")
    assert work.answers(spec).path == answered and work.done(spec)
    for damage, (content, says) in ANSWERS.items():
        kept = answered.read_bytes()
        answered.write_bytes(b"\n".join(content(kept.split(b"\n"))))
        for there in (True, False):
            if not there:
                stored.rename(out / "away")
            with pytest.raises(ValueError) as caught:
                work.done(spec)
            assert says in str(caught.value) and str(answered) in str(caught.value), damage
        (out / "away").rename(stored)
        answered.write_bytes(kept)


# --- what is not ours ----------------------------------------------------------------------------------------------


def test_files_of_others(folders: Path, out: Path) -> None:  # noqa: F811
    (out / "notes.json").write_text("{}")
    (out / "probe").write_text("mine")
    (out / "sub").mkdir()
    (out / f".{one(out, f'{HALF}.json').name}.123-ab.tmp").write_text("cut off")
    before = inside(out)
    assert call(*words(folders, out)).exit_code == 0
    assert call("report", out).exit_code == 0
    assert inside(out) == before
    (out / "a--b.json").write_text("{}")
    for command in (words(folders, out), ["report", out]):
        refused(call(*command), out / "a--b.json", "its schema is None")
    assert inside(out) == before | {out / "a--b.json": b"{}"}


def test_a_lock_that_was_left(folders: Path, out: Path) -> None:  # noqa: F811
    model = str(folders / "llava")
    lock = out / f".{one(out, '*--none.json').name.removesuffix('none.json')}lock"
    lock.write_text("left")
    assert not locked(out, model)
    one(out, f"{HALF}.json").unlink()
    result = call(*words(folders, out))
    assert result.exit_code == 0, result.output
    assert not lock.exists() and one(out, f"{HALF}.json")


def test_answers_of_processes_that_died_are_used(folders: Path, out: Path) -> None:  # noqa: F811
    """Both files of a shared run that nobody joined: nothing is asked again."""
    one(out, f"{HALF}.json").unlink()
    whole = one(out, f"{HALF}.jsonl")
    first, *lines = whole.read_text().splitlines(keepends=True)
    expected = answers(whole.with_suffix(".json"))
    for rank in range(2):
        whole.with_name(f"{whole.stem}.process{rank}.jsonl").write_text(first + "".join(lines[rank::2]))
    whole.unlink()
    result = call(*words(folders, out))
    assert result.exit_code == 0, result.output
    assert answers(one(out, f"{HALF}.json")) == expected and not list(out.glob("*process*"))


def test_links_stay_links(folders: Path, out: Path, tmp_path: Path) -> None:  # noqa: F811
    """Results that lie elsewhere are read there and written there, also those that are not there yet."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    for path in (one(out, f"{HALF}.json"), one(out, f"{HALF}.jsonl")):
        shutil.move(path, other / path.name)
        path.symlink_to(other / path.name)
    assert call(*words(folders, out)).exit_code == 0
    kept = answers(one(out, f"{HALF}.json"))
    for path in list(other.iterdir()):
        path.unlink()
    result = call(*words(folders, out))
    assert result.exit_code == 0, result.output
    assert len(list(other.iterdir())) == 2 and all(path.is_symlink() for path in out.glob(f"{HALF}.*"))
    assert answers(one(out, f"{HALF}.json")) == kept


# --- folders that cannot be written to -----------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_full_disk(folders: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:  # noqa: F811
    """At any of the writes; what was complete stays, and the same command goes on when there is room."""
    one(out, f"{HALF}.json").unlink()
    whole = one(out, f"{HALF}.jsonl")
    expected = answers(whole.with_suffix(".json"))
    whole.write_text("".join(whole.read_text().splitlines(keepends=True)[:3]))
    before, plain, count = inside(out), os.fsync, [0]

    def full(descriptor: int) -> None:
        count[0] += 1
        if count[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(call(*words(folders, out)), "No space left on device", code=1)
        refused(call("report", out), "No space left on device", code=1)
    there = inside(out)
    assert {path: there[path] for path in before if path != whole} | {whole: None} == before | {whole: None}
    assert not list(out.glob(".*.tmp"))
    result = call(*words(folders, out))
    assert result.exit_code == 0, result.output
    assert answers(one(out, f"{HALF}.json")) == expected
