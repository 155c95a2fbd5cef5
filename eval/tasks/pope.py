"""POPE's own question files (Li et al., EMNLP 2023, arXiv:2305.10355): `pope:FILE,images=FOLDER`.

FILE: JSON lines {"image": file name, "text": question, "label": "yes" or "no"}, or a folder of such files. The
splits (random, popular, adversarial) are told by the files' names. Metrics as in the task `existence`: accuracy,
precision, recall, f1, yes_ratio, over all files and by split. An answer that is neither yes nor no is wrong and counts
as not said yes (the authors' script takes everything without a no for yes).

Settings: images, the pictures' folder (default: beside the file); suffix, put behind every question, such as "Please
answer this question with one word.".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmfast.eval.tasks import existence
from vlmfast.eval.tasks.base import Doc
from vlmfast.eval.tasks.files import existing, json_lines, scene_of, settings_of

USAGE = "pope:FILE or FOLDER,images=FOLDER,suffix=TEXT"


@dataclass(frozen=True)
class Pope:
    """The questions of one or more files. name: as the user wrote it."""

    name: str
    files: tuple[Path, ...]
    images: Path
    suffix: str = ""
    HEADLINE: str = existence.HEADLINE
    NEW_TOKENS: int = existence.NEW_TOKENS

    @classmethod
    def of(cls, name: str) -> Pope:
        """From "pope:FILE,images=FOLDER"; ValueError or FileNotFoundError for what cannot be."""
        path, settings = settings_of(name, {"images": "", "suffix": ""}, USAGE)
        source = existing(path, "question file")
        files = tuple(sorted(source.glob("*.json*"))) if source.is_dir() else (source,)
        if not files:
            raise FileNotFoundError(f"{source} holds no question file (*.json, *.jsonl)")
        beside = source if source.is_dir() else source.parent
        images = existing(settings["images"], "folder of pictures") if settings["images"] else beside
        return cls(name, files, images, settings["suffix"])

    def load(self, limit: int | None, seed: int) -> list[Doc]:
        """The questions about `limit` pictures (None: all), in the order that `seed` draws."""
        asked: dict[str, list[tuple[str, str, str]]] = {}
        for file in self.files:
            split = next((split for split in existence.SPLITS if split in file.stem.lower()), "all")
            for record in json_lines(file, {"image": str, "text": str, "label": str}):
                label = record["label"].strip().lower()
                if label not in ("yes", "no"):
                    raise ValueError(f"{file}: label {record['label']!r} is neither yes nor no")
                asked.setdefault(record["image"], []).append((record["text"], label, split))
        names = sorted(asked)
        order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
        docs: list[Doc] = []
        for name in order if limit is None else order[:limit]:
            picture = existing(self.images / name, "picture")
            docs += [
                Doc(self.name, scene_of(picture), number, text, label, split, picture=str(picture))
                for number, (text, label, split) in enumerate(asked[name])
            ]
        return docs

    def prompt(self, doc: Doc) -> str:
        """The question, as the model is asked it."""
        return f"{doc.prompt} {self.suffix}".strip()

    score = staticmethod(existence.score)
    summarise = staticmethod(existence.summarise)
