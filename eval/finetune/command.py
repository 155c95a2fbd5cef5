"""The command line of `scripts/finetune.py`."""

import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from vlmfast.eval.finetune.arguments import Arguments, Training
from vlmfast.eval.finetune.training import Outcome, finetune
from vlmfast.eval.finetune.tuners import FULL, parse
from vlmfast.families.base import did_you_mean


class Parser(HfArgumentParser):
    """HfArgumentParser with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """ValueError, where argparse would print every option there is."""
        raise ValueError(f"{message} (--help lists all options)")


def parsed(words: Sequence[str], about: str = "") -> tuple[Arguments, TrainingArguments]:
    """The arguments of a command line, or of the one JSON or YAML file that it names. ValueError for a wrong one."""
    kinds: Any = (Arguments, Training)
    parser = Parser(
        kinds,
        prog="finetune.py",
        usage="finetune.py --model ID --data FILE --output_dir DIR [options, or one file of options]",
        description=about,
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
    )
    options = [option for action in parser._actions for option in action.option_strings]
    if len(words) == 1 and Path(words[0]).suffix in (".json", ".yaml", ".yml"):
        return _from_file(Path(words[0]), parser, options)
    _, left = parser.parse_known_args(list(words))
    unknown = next((word for word in left if word.startswith("-")), left[0] if left else None)
    if unknown is not None:
        raise ValueError(f"unknown option {unknown}{did_you_mean(unknown, options)}; --help lists all options")
    return _made(lambda: parser.parse_args_into_dataclasses(list(words), look_for_args_file=False))


def _made(make: Callable[[], Any]) -> tuple[Arguments, TrainingArguments]:
    """The arguments, with what transformers has against them in an error of ours."""
    try:
        arguments, training = make()
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(str(error)) from error
    return arguments, training


def _from_file(path: Path, parser: Parser, options: Sequence[str]) -> tuple[Arguments, TrainingArguments]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of options {path}")
    if path.suffix == ".json":
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
    else:
        import yaml

        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no options by name")
    known = {option.lstrip("-") for option in options}
    for name in values:
        if name not in known:
            raise ValueError(f"{path}: unknown option {name!r}{did_you_mean(str(name), known)}")
    for name in ("model", "data", "output_dir"):
        if name not in values:
            raise ValueError(f"{path}: {name} is missing")
    return _made(lambda: parser.parse_dict(values))


def run(words: Sequence[str], about: str = "") -> Outcome:
    """Fine-tune as a command line says, and tell where the result is."""
    arguments, training = parsed(words, about)
    outcome = finetune(arguments, training)
    if training.process_index == 0:
        share = outcome.trainable / outcome.parameters
        print(f"\n{outcome.trainable} of {outcome.parameters} parameters were trained ({share:.3%})")
        for name, value in outcome.metrics.items():
            print(f"  {name:32s} {value:.6g}" if isinstance(value, float) else f"  {name:32s} {value}")
        name = "--model" if parse(arguments.tuner).name == FULL else f"--model {arguments.model} --adapter"
        print(f"folder  {outcome.folder}\nnext    vlmfast eval {name} {outcome.folder}")
    return outcome
