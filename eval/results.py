"""Results on disk: one JSON per run, its raw answers beside it as JSON lines, and the way back.

A run is one model under one spec on a fixed set of tasks. While it runs, answers are appended to `MODEL--SPEC.jsonl`,
a batch at a time; when it is finished, `MODEL--SPEC.json` is written atomically and the run counts as complete. Every
file carries the identity of its run (hashes of model and tasks, limit, seed, ...), so that nothing is ever reused
for a run it was not made by.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
import reprlib
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
SCHEMA = 1
IDENTITY = ("schema", "model_hash", "spec", "limit", "seed", "batch", "device", "dtype", "beams", "tasks")
BEFORE = {"beams": 1}  # fields of the identity that older files lack, and what they were then
LOOKS = 5  # at a lock, before it is another evaluation's
PART = "process"  # in the names of files that one of several processes writes
WAY_OUT = "choose another folder with --out, or delete the file to run it again"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A value with its 95 % interval, and its paired difference from the unpatched run (None for that run itself)."""

    value: float
    low: float
    high: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task of a run: `hash` of its prompts, answers and images; `n` questions on `images` images.

    better: 1 where more of the headline metric is better, -1 where less is.
    """

    hash: str
    n: int
    images: int
    headline: str
    metrics: dict[str, Metric]
    better: int = 1

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TaskResult":
        """From nested dicts; errors as of `made`, KeyError for what is missing."""
        metrics = {name: made(Metric, metric) for name, metric in data["metrics"].items()}
        if data["headline"] not in metrics:
            raise ValueError(f"there is no metric {data['headline']!r}, which a task is told by")
        return made(cls, data | {"metrics": metrics})


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished run, as it is stored; fields without a type of their own are plain JSON values.

    beams: `num_beams` of the unpatched run, and of every method that does not need more (`latency` has a run's own).
    retention: mean over the tasks of what is left of the unpatched model's headline metric; None for that model.
    matched: the share of the unpatched prefill FLOPs that `keep` was solved for, None where it was given.
    attention: where attention goes, before and after (see `vlmfast.eval.attention.measure`), of specs that edit it.
    """

    model: str
    model_hash: str
    spec: str
    method: str
    keep: float | int | None
    limit: int | None
    seed: int
    batch: int
    device: str
    dtype: str
    tasks: dict[str, TaskResult]
    macro: Metric
    cost: dict[str, Any]
    latency: dict[str, Any]
    environment: dict[str, Any]
    command: str
    started: str
    seconds: float
    samples: list[dict[str, Any]] = field(default_factory=list)
    attention: dict[str, Any] | None = None
    beams: int = 1
    retention: Metric | None = None
    matched: float | None = None
    schema: int = SCHEMA
    complete: bool = True

    def identity(self) -> dict[str, Any]:
        """What must agree for this result to stand for a run."""
        values: dict[str, Any] = {name: getattr(self, name) for name in IDENTITY if name != "tasks"}
        return values | {"tasks": {name: task.hash for name, task in self.tasks.items()}}

    def to_json(self) -> dict[str, Any]:
        """The result as nested dicts, lists, strings and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Result":
        """The inverse of `to_json`; ValueError names what is missing or unknown."""
        if not isinstance(data, dict):
            raise ValueError("it holds no JSON object")
        if data.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {data.get('schema')!r}, this version of vlmfast reads schema {SCHEMA}")
        if data.get("complete") is not True:
            raise ValueError("it is not marked complete")
        try:
            tasks = {name: TaskResult.from_json(task) for name, task in data["tasks"].items()}
            kept = data.get("retention")
            means = {"macro": made(Metric, data["macro"]), "retention": None if kept is None else made(Metric, kept)}
            return made(cls, data | {"tasks": tasks} | means)
        except KeyError as error:
            raise ValueError(f"the field {error} is missing") from None
        except (AttributeError, TypeError) as error:
            raise ValueError(f"its fields do not fit the schema ({error})") from None


def made(kind: type[T], fields: dict[str, Any]) -> T:
    """An object of a dataclass. TypeError for fields that are missing or unknown, ValueError for a wrong type."""
    one = kind(**fields)
    for name, wanted in get_type_hints(kind).items():
        if not _fits(wanted, value := getattr(one, name)):
            raise ValueError(f"its fields do not fit the schema ({name} is {reprlib.repr(value)})")
    return one


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of the type of a field; whole numbers do for any number."""
    outer, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if outer is UnionType:
        return any(_fits(one, value) for one in inner)
    if outer is dict:
        return isinstance(value, dict) and all(_fits(inner[1], one) for one in value.values())
    if outer is list:
        return isinstance(value, list) and all(_fits(inner[0], one) for one in value)
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def run_name(model: str, spec: str) -> str:
    """The file name of a run without its ending: `MODEL--SPEC`, with characters that every file system takes."""
    name = "--".join(re.sub(r"[^A-Za-z0-9._=,+-]+", "-", part).strip("-.") for part in (model, spec))
    if len(name) <= 200:
        return name
    return f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write so that `path` is at every moment either as before or complete, on the disk as well. Links stay links."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # folders may be shared
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """In words, each field in which two identities differ."""
    words = []
    for name in IDENTITY:
        old, new = found.get(name, BEFORE.get(name)), wanted.get(name, BEFORE.get(name))
        if old == new:
            continue
        if name == "tasks" and isinstance(old, dict) and isinstance(new, dict):
            if old.keys() != new.keys():
                words.append(f"tasks {', '.join(old) or 'none'} (now {', '.join(new) or 'none'})")
            words += [f"other questions or images in task {t}" for t in old if t in new and old[t] != new[t]]
        elif name == "model_hash":
            words.append("other weights or configuration of the model")
        else:
            words.append(f"{name} {old} (now {new})")
    return words


def check_identity(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ValueError if the file at `path` was made by another run than the one wanted."""
    words = differences(found, wanted)
    if words:
        raise ValueError(f"{path} was made with {'; '.join(words)}: {WAY_OUT}")


def read_result(path: Path) -> Result:
    """The result stored at `path`; ValueError names the file and what to do when it cannot be read as one."""
    try:
        return Result.from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        message = f"{path} is not a readable result: {error}. Move or delete it, and run the evaluation again"
        raise ValueError(message) from None


def write_result(path: Path, result: Result) -> None:
    """Store a finished run atomically."""
    write_atomic(path, json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")


def tell_matched(path: Path, share: float) -> None:
    """Note in a complete result for which share its keep was solved: another call may have made it by its spec."""
    result = read_result(path)
    if result.matched != share:
        write_result(path, dataclasses.replace(result, matched=share))


def load_results(folders: str | Path | Sequence[str | Path]) -> list[Result]:
    """All finished runs of one or more folders: by model, beams, the unpatched one first, method and falling keep.

    Raises FileNotFoundError for a missing folder or one without a result, ValueError for a damaged file and for
    two results of the same run.
    """
    folders = [folders] if isinstance(folders, str | Path) else folders
    seen: dict[tuple[str, str, int], Path] = {}
    results = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        paths = sorted(path for path in folder.glob("*--*.json") if not path.name.startswith("."))
        if not paths:
            raise FileNotFoundError(f"{folder} holds no finished result of `vlmfast eval` (files MODEL--SPEC.json)")
        for path in paths:
            result = read_result(path)
            other = seen.setdefault((result.model, result.spec, result.beams), path)
            if other != path:
                raise ValueError(f"{other} and {path} are results of the same run: report them apart, or delete one")
            results.append(result)
    return sorted(results, key=order)


def order(result: Result) -> tuple[Any, ...]:
    """Sort key: model, beams, unpatched first, method, keep falling (shares before numbers of tokens), spec."""
    share = -float(result.keep) if isinstance(result.keep, float) else 0.0
    count = -result.keep if isinstance(result.keep, int) else 0
    return result.model, result.beams, result.spec != "none", result.method, share, count, result.spec


class Answers:
    """The raw answers of one run on disk: a line with the run's identity, then one line a question.

    `append` writes a batch at once and waits until it is on the disk. A process that dies in the middle leaves at
    worst one torn last line, which `read` drops; any other damage is an error.

    Several processes that share a run (see `vlmfast.eval.sharing`) write a file each, and the first one joins them.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity

    def of_process(self, rank: int) -> "Answers":
        """The file of one of several processes."""
        return Answers(self.path.with_name(f"{self.path.stem}.{PART}{rank}.jsonl"), self.identity)

    def parts(self) -> list["Answers"]:
        """The files of processes that are not joined yet."""
        stem = f"{self.path.stem}.{PART}"
        found = [path for path in self.path.parent.iterdir() if path.name.startswith(stem) and path.suffix == ".jsonl"]
        return [Answers(path, self.identity) for path in sorted(found)]

    def everybodys(self) -> list[dict[str, Any]]:
        """What was answered by any process, each question once or more; errors as in `read`."""
        return [record for one in (self, *self.parts()) for record in one.read()]

    def size(self) -> int:
        """Bytes that all processes have written: it grows with every answer."""
        return sum(one.path.stat().st_size for one in (self, *self.parts()) if one.path.exists())

    def join(self, records: Iterable[dict[str, Any]]) -> None:
        """Begin the file anew with these answers; those of single processes go."""
        parts = self.parts()
        self.start(records)
        for part in parts:
            part.path.unlink(missing_ok=True)

    def read(self) -> list[dict[str, Any]]:
        """The answers stored so far; ValueError if the file is damaged or was made by another run."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:  # also one that was just joined with the others
            return []
        lines.pop()  # empty after a whole last line, otherwise the torn one
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or ("run" if number == 1 else "id") not in record:
                    raise ValueError
            except ValueError:
                message = f"{self.path} is damaged in line {number}: delete it and run the evaluation again"
                raise ValueError(message) from None
            records.append(record)
        if records:
            check_identity(self.path, records[0]["run"], self.identity)
        return records[1:]

    def start(self, records: Iterable[dict[str, Any]]) -> None:
        """Begin the file anew, atomically, with these answers."""
        lines = [{"run": self.identity}, *records]
        write_atomic(self.path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add the answers of a batch. FileNotFoundError where others have taken the file away meanwhile."""
        with open(os.open(self.path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())


class Missing(LookupError):
    """Something that a report would like to have is not at hand; the message says what and why."""


def answers_of(result: Result, folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The raw answers of a finished run, from the folder that has them; `Missing` where none does."""
    why = ""
    for folder in folders:
        try:
            records = Answers(folder / f"{run_name(result.model, result.spec)}.jsonl", result.identity()).read()
        except ValueError as error:  # damaged, or of another run by the same name
            why = why or str(error)
            continue
        if records:
            return records
    raise Missing(why or f"the answers of {result.spec} are not beside its result")


def _lock(folder: Path, model: str, rank: int) -> Path:
    return folder / f".{run_name(model, 'lock')}{f'.{PART}{rank}' if rank else ''}"


def locked(folder: Path, model: str, rank: int = 0) -> bool:
    """Whether a process, of this number where several share the work, is writing this model's runs into the folder.

    Where the system has no flock nobody knows: True.
    """
    if fcntl is None:
        return True
    try:
        with open(_lock(folder, model, rank), encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def sole_writer(folder: Path, model: str, rank: int = 0) -> Iterator[None]:
    """Keep other processes from writing this model's runs into the folder; OSError if one is doing that already.

    rank: the number of this process where several share the work: each keeps its own place. The lock goes with its
    process, however that ends. Where the system has no flock there is no guard.
    """
    if fcntl is None:
        yield
        return
    path = _lock(folder, model, rank)
    for _ in range(LOOKS):
        if (file := _taken(path)) is not None:
            break
        time.sleep(0.05)  # it may be no more than a look of `locked`
    else:
        message = f"another process is evaluating {model} into {folder}: wait for it, or choose another --out"
        raise OSError(errno.EWOULDBLOCK, message)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _taken(path: Path) -> int | None:
    """A descriptor for as long as which is open the lock is ours; None where another process has it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(FileNotFoundError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return None
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)  # its last owner took the file away between the two


def ready_folder(path: Path) -> None:
    """Make the folder for results and see that it can be written to; OSError says what stands in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot write results to {path} ({error.strerror})") from None
