"""What the page asks for: one question under several specs, step by step, and every error as one line."""

import base64
import io
import re
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlmfast.complaints import told
from vlmfast.eval.asking import (
    HEADS,
    Outcome,
    Question,
    answer,
    called,
    conventions,
    drawn,
    figures,
    misread,
    notes,
    open_image,
    prepare,
)
from vlmfast.eval.planning import ALL, expand, named
from vlmfast.families import family_of
from vlmfast.patching import unwrap

SEPARATOR = ";"  # between specs that are typed


@dataclass(frozen=True)
class Card:
    """What one spec said, and the picture of what it kept, as a data URI."""

    outcome: Outcome
    picture: str

    @property
    def kept(self) -> str:
        """How many of the visual tokens are left."""
        whole = self.outcome.report.images[0].n if self.outcome.report.images else self.outcome.kept
        return f"{self.outcome.kept} of {whole} tokens"


@dataclass(frozen=True)
class Progress:
    """How far a request is: its specs in order, cards of those that are done, what is odd, and what went wrong."""

    specs: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()
    warning: str | None = None
    error: str | None = None

    @property
    def waiting(self) -> tuple[str, ...]:
        """Specs that have no answer yet; none after an error."""
        return () if self.error else self.specs[len(self.cards) :]


@dataclass
class Room:
    """A loaded model and those who ask it, one at a time: a patch changes the model for everybody.

    folder: where uploaded pictures lie; no other file is opened, whoever names one.
    """

    model: Any
    processor: Any
    folder: Path
    max_new_tokens: int = 64
    repeats: int = 3
    turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def offered(self) -> dict[str, str]:
        """Methods by name that work on images of the model's family and need no file -> specs with what they need."""
        specs = named([ALL], family_of(unwrap(self.model)).name)
        return {spec.partition(":")[0]: spec for spec in specs}

    def ask(
        self, picture: str | None, prompt: str, methods: Sequence[str], keep: float, typed: str
    ) -> Iterator[Progress]:
        """Answer unpatched and under every spec, telling how far it is; errors are told, not raised.

        picture: a file. methods: specs. keep: share of the visual tokens for specs that leave it open. typed: further
        specs with ; between them.
        """
        progress = Progress()
        try:
            specs = expand([*methods, *filter(None, map(str.strip, typed.split(SEPARATOR)))], [float(keep)])
            file = self._uploaded(picture)
            yield (progress := Progress(specs))
            with self.turn:
                question = prepare(self.model, self.processor, open_image(file), prompt)
            yield (progress := replace(progress, warning=misread(question)))
            for spec in specs:
                with self.turn:
                    outcome = answer(self.model, self.processor, question, spec, self.max_new_tokens, self.repeats)
                card = Card(outcome, _data_uri(question, outcome))
                yield (progress := replace(progress, cards=(*progress.cards, card)))
        except Exception as error:  # the page goes on working
            line = told(error)
            if line is None:
                traceback.print_exc()
                line = f"vlmfast failed, the terminal shows where: {type(error).__name__}: {error}"
            yield replace(progress, error=line.replace(f"{self.folder.resolve()}/", ""))

    def _uploaded(self, picture: str | None) -> Path:
        """The file of a picture, if it is one that was uploaded."""
        if picture is None:
            raise ValueError("there is no picture: upload one, or take an example")
        file = Path(picture).resolve()
        if not file.is_relative_to(self.folder.resolve()):
            raise ValueError(f"{file.name} was not uploaded here")
        return file


def _data_uri(question: Question, outcome: Outcome) -> str:
    """The picture of what a spec kept as text, so that no file of it is left anywhere."""
    buffer = io.BytesIO()
    drawn(question, outcome).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def broken(spec: str) -> Any:
    """What a spec is called, as HTML that may go on in a new line behind its signs."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[,:+])", called(spec)))


def render(progress: Progress) -> str:
    """Cards side by side, the table, the notes, as HTML; everything that came from outside is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("vlmfast.eval.demo").joinpath("answers.html").read_text("utf-8"))
    return template.render(
        progress=progress,
        heads=[head.replace("\n", " ") for head in HEADS],
        figures=figures,
        conventions=conventions,
        called=called,
        broken=broken,
        notes=notes,
    )
