"""Conversations about pictures, from JSON lines, JSON, parquet, a folder of images or the Hugging Face hub.

Two forms of a record:

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "a cup"}]}],
     "images": ["pictures/cup.png"]}
    {"conversations": [{"from": "human", "value": "<image>\\nwhat is this ?"}, {"from": "gpt", "value": "a cup"}],
     "image": "pictures/cup.png"}

Contents may be plain strings, in which `<image>` stands for a picture. Pictures are files (relative to the data file
or to `image_folder`), encoded bytes, or PIL images; an image part may hold its own: {"type": "image", "image": ...}.
Every record is checked before anything is trained, and the first wrong one is named.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

PLACEHOLDER = "<image>"  # in plain strings
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
JSON_FILES = (".jsonl", ".ndjson", ".json")
METADATA = "metadata.jsonl"  # of a folder of images
FORM = (
    '{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}, {"role": '
    '"assistant", "content": "..."}], "images": ["a.png"]}, or LLaVA\'s {"image": "a.png", "conversations": [{"from": '
    '"human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}'
)

Source = Path | bytes | Image.Image  # where a picture is


@dataclass(frozen=True)
class Sample:
    """One conversation.

    where: names the record in messages, such as "train.jsonl line 7". messages: roles "system", "user", "assistant",
    each content a list of {"type": "image"} and {"type": "text", "text": ...}. images: in the order of their
    placeholders.
    """

    where: str
    messages: list[dict[str, Any]]
    images: tuple[Source, ...]

    def pictures(self) -> list[Image.Image]:
        """The pictures as RGB, turned as their cameras say. ValueError for one that cannot be read."""
        return [self._picture(number, source) for number, source in enumerate(self.images, 1)]

    def _picture(self, number: int, source: Source) -> Image.Image:
        try:
            if isinstance(source, Image.Image):
                return ImageOps.exif_transpose(source).convert("RGB")
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            what = source if isinstance(source, Path) else f"image {number}"
            reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
            raise ValueError(f"{self.where}: {what} cannot be read as an image: {reason}") from error


class Samples(Sequence[Sample]):
    """All conversations of a data set, in its order; made one by one when they are asked for.

    name: of the data set. records: raw records by index. folder: that files of pictures are relative to. where: index
    -> name of a record. chosen: the indices that take part, None: all.
    """

    def __init__(
        self,
        name: str,
        records: Sequence[Any],
        folder: Path,
        where: Callable[[int], str] | None = None,
        chosen: Sequence[int] | None = None,
    ) -> None:
        self.name, self.records, self.folder = name, records, folder
        self.where = where or f"{name} record {{}}".format
        self.chosen = range(len(records)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.only(range(len(self))[index])
        number = self.chosen[index]
        return sample_of(self.records[number], self.where(number + 1), self.folder)

    def only(self, indices: Sequence[int]) -> "Samples":
        """Some of the conversations."""
        return Samples(self.name, self.records, self.folder, self.where, [self.chosen[i] for i in indices])

    def check(self) -> str:
        """Look at every record and return a hash of all: of messages, and of pictures by bytes, or by name and size.

        ValueError or FileNotFoundError names the first wrong record.
        """
        if not len(self):
            raise ValueError(f"{self.name} holds no record; a record looks like {FORM}")
        digest = hashlib.sha256()
        for sample in self:
            digest.update(json.dumps(sample.messages, sort_keys=True).encode())
            for source in sample.images:
                digest.update(_identity(source))
        return digest.hexdigest()[:16]


def _identity(source: Source) -> bytes:
    if isinstance(source, Path):
        return f"{source.name} {source.stat().st_size}".encode()
    return hashlib.sha256(source if isinstance(source, bytes) else source.tobytes()).digest()


class Lines(Sequence[Any]):
    """JSON lines: kept as text, parsed when asked for. where: index from 1 -> name of the line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = _text(path).split("\n")  # and no other character: JSON strings may hold what str.splitlines breaks at
        self.numbers = [number for number, line in enumerate(text, 1) if line.strip()]
        self.lines = [line for line in text if line.strip()]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: Any) -> Any:
        try:
            return json.loads(self.lines[index])
        except ValueError as error:
            raise ValueError(f"{self.where(index + 1)} is no JSON: {error}") from None

    def where(self, number: int) -> str:
        """The name of a record, by its line."""
        return f"{self.path.name} line {self.numbers[number - 1]}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None


def load_samples(
    source: str | Path, *, split: str = "train", config: str | None = None, image_folder: str | Path | None = None
) -> Samples:
    """The conversations of a file (.jsonl, .json, .parquet), a folder (metadata.jsonl or *.parquet) or a hub id.

    split, config: of a hub id. image_folder: that pictures are relative to; default: the data file's folder.

    FileNotFoundError for what is not there, ValueError for what holds no records. Records themselves are checked by
    `Samples.check`.
    """
    path = Path(source).expanduser()
    if image_folder is not None and not Path(image_folder).expanduser().is_dir():
        raise FileNotFoundError(f"there is no folder of images {image_folder}")
    folder = path.parent if image_folder is None else Path(image_folder).expanduser()
    name = path.name
    if path.is_dir():
        return _folder(path, path if image_folder is None else folder)
    if not path.exists():
        text = str(source)
        if text.count("/") > 1 or text.startswith((".", "/", "~")) or path.suffix in (*JSON_FILES, ".parquet"):
            raise FileNotFoundError(f"there is no data file or folder {source}")
        return Samples(text, _hub(text, split, config), Path(".") if image_folder is None else folder)
    if path.suffix == ".parquet":
        return Samples(name, _parquet([path]), folder)
    if path.suffix not in JSON_FILES:
        raise ValueError(f"{path}: data is a file .jsonl, .json or .parquet, a folder, or an id of the hub")
    if path.suffix == ".json":
        try:
            records = json.loads(_text(path))
        except ValueError:
            records = None  # JSON lines under another name, or damaged: the lines tell
        if isinstance(records, list):
            return Samples(name, records, folder)
    lines = Lines(path)
    return Samples(name, lines, folder, lines.where)


def _folder(path: Path, folder: Path) -> Samples:
    """A folder of images with metadata.jsonl, or of parquet files."""
    if (path / METADATA).is_file():
        lines = Lines(path / METADATA)
        return Samples(path.name, _Named(lines), folder, lines.where)
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    if not files:
        raise ValueError(
            f"the folder {path} has no {METADATA} (lines with a file_name or file_names and messages) and no *.parquet"
        )
    return Samples(path.name, _parquet(files), folder)


class _Named(Sequence[Any]):
    """Records of a folder of images: file_name, or file_names, is the picture."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: Any) -> Any:
        record = self.lines[index]
        if isinstance(record, dict):
            for name in ("file_name", "file_names"):
                if name in record:
                    record = {key: value for key, value in record.items() if key != name} | {"images": record[name]}
        return record


def _parquet(files: Sequence[Path]) -> Any:
    from datasets import load_dataset

    try:
        return _undecoded(load_dataset("parquet", data_files=[str(file) for file in files], split="train"))
    except Exception as error:  # pyarrow and datasets have errors of many kinds
        raise ValueError(f"{files[0]} cannot be read as parquet: {str(error).strip().splitlines()[-1]}") from error


def _hub(name: str, split: str, config: str | None) -> Any:
    from datasets import load_dataset

    try:
        return _undecoded(load_dataset(name, config, split=split))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{name} is neither a file, a folder nor a data set of the hub with {split=}: {reason}"
        ) from None


def _undecoded(table: Any) -> Any:
    """The data set with its pictures as they are stored: they are decoded when they are used."""
    from datasets import Image as Picture

    def plain(feature: Any) -> Any:
        if isinstance(feature, Picture):
            return Picture(decode=False)
        if hasattr(feature, "feature"):
            return type(feature)(plain(feature.feature))
        return feature

    for name, feature in table.features.items():
        if plain(feature) != feature:
            table = table.cast_column(name, plain(feature))
    return table


# --- one record ----------------------------------------------------------------------------------------------------


def sample_of(record: Any, where: str, folder: Path) -> Sample:
    """A record of either form as a sample. ValueError or FileNotFoundError says what is wrong, and where."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} is a {type(record).__name__}, not a record such as {FORM}")
    turns = next((record[name] for name in ("messages", "conversations") if record.get(name) is not None), None)
    if turns is None:
        raise ValueError(
            f"{where} has no messages (it has {', '.join(map(str, record)) or 'nothing'}); it must be {FORM}"
        )
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not len(turns):
        raise ValueError(f"{where}: its messages are no list of turns; it must be {FORM}")
    beside = record.get("images") if record.get("images") is not None else record.get("image")
    if beside is None:
        beside = []
    elif isinstance(beside, str | bytes | Path | Mapping | Image.Image):
        beside = [beside]
    messages: list[dict[str, Any]] = []
    inline: list[Any] = []
    for number, turn in enumerate(turns, 1):
        messages.append(_message(turn, f"{where}, turn {number}", inline))
    _check_turns(messages, where)
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    own = [image for image in inline if image is not None]
    if own and len(beside):
        raise ValueError(f"{where} has images beside its messages and in them: one or the other")
    images = own or list(beside)
    if len(images) != placeholders:
        raise ValueError(
            f"{where} has {len(images)} image(s), but its messages have {placeholders} place(s) for images "
            '({"type": "image"}, or <image> in a plain string)'
        )
    return Sample(where, messages, tuple(_source(image, where, folder) for image in images))


def _message(turn: Any, where: str, inline: list[Any]) -> dict[str, Any]:
    """A turn in the usual form; what its image parts hold themselves is added to `inline`."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is a {type(turn).__name__}, not a turn with role and content")
    said, content = (turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
    if said not in ROLES:
        raise ValueError(f"{where}: its role is {said!r}; there are {', '.join(ROLES)}")
    if isinstance(content, str):
        parts = list(_split(content))
        inline += [None for part in parts if part["type"] == "image"]
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        parts = [_part(part, where, inline) for part in content]
    else:
        raise ValueError(f"{where}: its content is a {type(content).__name__}, not a string or a list of parts")
    if not parts:
        raise ValueError(f"{where} is empty")
    return {"role": ROLES[said], "content": parts}


def _split(text: str) -> Iterator[dict[str, Any]]:
    """A plain string: `<image>` becomes a part of its own, without the white space around it."""
    pieces = text.split(PLACEHOLDER)
    for number, piece in enumerate(pieces):
        if number:
            yield {"type": "image"}
        piece = piece.strip() if len(pieces) > 1 else piece
        if piece:
            yield {"type": "text", "text": piece}


def _part(part: Any, where: str, inline: list[Any]) -> dict[str, Any]:
    """A part of a turn's content."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: a text part without a text")
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        inline.append(next((part[n] for n in ("image", "path", "url") if part.get(n) is not None), None))
        return {"type": "image"}
    raise ValueError(f"{where}: a part of type {kind!r}; there are text and image")


def _check_turns(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """There is an answer to learn, at the end too, and every answer is text."""
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        if any(part["type"] != "text" for part in message["content"]):
            raise ValueError(f"{where}, turn {number}: an assistant's turn is text alone")
        if not "".join(part["text"] for part in message["content"]).strip():
            raise ValueError(f"{where}, turn {number}: the answer is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} has no assistant's turn: there is nothing to learn from it")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where} ends with a turn of the {messages[-1]['role']}: the last turn must be an answer")


def _source(image: Any, where: str, folder: Path) -> Source:
    """Where a picture is; files must be there."""
    if isinstance(image, Mapping):  # as `datasets` stores a picture
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes | Image.Image):
        return image
    if not isinstance(image, str | Path):
        raise ValueError(f"{where}: an image is a {type(image).__name__}, not a file name, bytes or a PIL image")
    if str(image).startswith(("http://", "https://", "data:")):
        raise ValueError(f"{where}: the image {str(image)[:60]} is an address: download it and name the file")
    path = folder / Path(image).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no image file {path}")
    return path
