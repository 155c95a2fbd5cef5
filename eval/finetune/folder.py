"""The folder of a run: what it tells of itself, and the checkpoint to go on from.

A folder holds one run. `vlmfast_finetune.json` is written when it starts and again, with its results, when it ends. A
run goes on only from checkpoints that were made with the same model, data, tuner and method.
"""

import json
from pathlib import Path
from typing import Any, cast

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from vlmfast.eval.models import FINETUNED
from vlmfast.eval.results import write_atomic

logger = logging.get_logger("vlmfast.finetune")
FIRST, HEADS = "heads", "lofit_heads.json"  # of LoFiT: the folder of stage 1, and what it chooses
# What a run must agree on with the checkpoints it goes on from, and what else changes the result.
IDENTITY = ("model_hash", "data_hash", "tuner", "method", "max_length", "dtype", "processes")
SCHEDULE = (
    "seed", "data_seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "optim",
)  # fmt: skip


def schedule(training: TrainingArguments) -> dict[str, Any]:
    """The options that change the result, as plain values."""
    return {name: getattr(value, "value", value) for name in SCHEDULE for value in [getattr(training, name)]}


def write_run(folder: Path, record: dict[str, Any]) -> None:
    """Write what is known of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FINETUNED, json.dumps(record, indent=1) + "\n")


def asked_to_resume(training: TrainingArguments) -> str:
    """What resume_from_checkpoint says: "no", "last" (there must be one), "auto" (if there is one), or a folder."""
    asked = str(training.resume_from_checkpoint or "no")
    words = {"no": "no", "false": "no", "none": "no", "true": "last", "last": "last", "auto": "auto"}
    return words.get(asked.lower(), asked)


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint of a run, of LoFiT's first stage where there is none of the second; None: there is none."""
    for one in (folder, folder / FIRST):
        if one.is_dir() and (found := get_last_checkpoint(str(one))) is not None:
            return found
    return None


def checkpoint_of(training: TrainingArguments, record: dict[str, Any]) -> str | None:
    """The checkpoint to go on from, None: from the start. ValueError where the folder holds something else."""
    folder = Path(cast(str, training.output_dir))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output_dir {folder} is a file")
    asked, last, stored = asked_to_resume(training), last_checkpoint(folder), stored_run(folder / FINETUNED)
    if stored is not None and stored.get("complete") and asked in ("no", "auto"):
        raise ValueError(f"{folder} holds a finished run ({stored.get('command')}): choose another --output_dir")
    if asked == "no" and last is not None:
        raise ValueError(
            f"{folder} has checkpoints, the last is {Path(last).relative_to(folder)}: add --resume_from_checkpoint "
            "true to go on from there, or choose another --output_dir"
        )
    if asked == "no" or asked == "auto" and last is None:
        return None
    if asked in ("last", "auto"):
        if last is None:
            raise ValueError(f"--resume_from_checkpoint: there is no checkpoint in {folder}")
        checkpoint = last
    else:
        checkpoint = asked
        if not (Path(checkpoint) / "trainer_state.json").is_file():
            raise FileNotFoundError(f"--resume_from_checkpoint {checkpoint}: it is no folder of a checkpoint")
        above = Path(checkpoint).resolve().parent
        stored = stored_run((above.parent if above.name == FIRST else above) / FINETUNED)
    if stored is None:
        return checkpoint
    words = [f"{n} {stored.get(n)} (now {record[n]})" for n in IDENTITY if stored.get(n) != record[n]]
    if words:
        raise ValueError(f"{checkpoint} was made with {'; '.join(words)}: choose another --output_dir")
    old = stored.get("training", {})
    other = [f"{n} {old.get(n)} (now {v})" for n, v in record["training"].items() if old.get(n) != v]
    if other:
        logger.warning(f"{checkpoint} was made with {'; '.join(other)}: the result is not that of one run")
    return checkpoint


def stored_run(path: Path) -> dict[str, Any] | None:
    """What a folder tells of its run. ValueError if it is damaged."""
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("no JSON object")
        return stored
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): choose another --output_dir") from None
