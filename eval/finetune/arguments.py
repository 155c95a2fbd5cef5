"""What a run is told: the model, the data and the tuner, and the options of transformers' TrainingArguments."""

import copy
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from vlmfast.eval.finetune.tuners import FULL, Tuning
from vlmfast.eval.models import DTYPES
from vlmfast.families.base import did_you_mean

TOO_LONG = ("raise", "drop")


@dataclass
class Arguments:
    """What is tuned, on what, and how. TrainingArguments says the rest."""

    model: str = field(metadata={"help": "Hugging Face id, folder, testbed:llava or testbed:qwen2_5_vl."})
    data: str = field(
        metadata={"help": "File (.jsonl, .json, .parquet), folder of images with metadata.jsonl, hub id."}
    )
    tuner: str = field(default="lora", metadata={"help": "lora, lofit, ... or full, such as lora:r=8,lora_alpha=16."})
    method: str = field(
        default="none", metadata={"help": "Active while training, such as hiprune:keep=0.33; what is saved is clean."}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Image files are relative to this folder (default: to the data file's)."}
    )
    data_split: str = field(default="train", metadata={"help": "Split of a data set of the hub."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a data set of the hub."})
    eval_data: str | None = field(default=None, metadata={"help": "More data, for the loss while training."})
    eval_split: str = field(default="train", metadata={"help": "Its split, if it is of the hub."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest conversation of `data` in tokens; nothing is cut."}
    )
    too_long: str = field(default="raise", metadata={"help": "What longer ones do: raise (an error) or drop (told)."})
    eval_tasks: str | None = field(
        default=None, metadata={"help": "vlmfast's tasks asked while training, such as existence,colour."}
    )
    eval_limit: int = field(default=20, metadata={"help": "Images a task."})
    eval_batch: int = field(default=32, metadata={"help": "Questions at a time."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Of the weights: float32, bfloat16, float16; auto: bfloat16 for adapters where it works."},
    )


@dataclass
class Training(TrainingArguments):
    """TrainingArguments with defaults that suit adapters of VLMs. All its options work as ever."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run; one run a folder."})
    learning_rate: float = field(default=2e-4, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X steps."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Where logs go besides."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Always False here."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Logits of a whole data set fit nowhere."})

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("--output_dir is missing: the folder of the run")
        named: Any = self
        if named.eval_steps and getattr(named.eval_strategy, "value", named.eval_strategy) == "no":
            named.eval_strategy = "steps"  # it is asked for
        super().__post_init__()


def prepared(training: TrainingArguments) -> TrainingArguments:
    """A copy of the arguments with what a VLM cannot do without."""
    training = copy.copy(training)
    training.remove_unused_columns = False  # samples are conversations, not columns
    training.label_names = training.label_names or ["labels"]  # a PEFT model's forward does not tell
    if training.n_gpu > 1:
        raise NotImplementedError(
            f"one process with {training.n_gpu} GPUs would run copies of the model: start it with accelerate launch, "
            "or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if training.world_size == 1 and on_cpu and "MASTER_ADDR" in os.environ:
        raise ValueError(
            "accelerate launch --cpu starts one process, whatever its --num_processes: for several on a CPU set "
            "ACCELERATE_USE_CPU=true and use accelerate launch --multi_gpu --num_processes N"
        )
    if training.train_sampling_strategy not in ("random", "sequential"):
        raise NotImplementedError(
            f"train_sampling_strategy={training.train_sampling_strategy}: lengths of conversations with pictures are "
            "not known beforehand; there are random and sequential"
        )
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if hasattr(training, name):
            setattr(training, name, {"use_reentrant": False} | (getattr(training, name) or {}))
    return training


def dtype_of(asked: str, tuning: Tuning, training: TrainingArguments) -> str:
    """The type of the weights. auto: bfloat16 where adapters go on top and the device computes it, else float32."""
    if asked in DTYPES:
        return asked
    if asked != "auto":
        names = ["auto", *DTYPES]
        raise ValueError(f"unknown dtype {asked!r}{did_you_mean(asked, names)}; there are {', '.join(names)}")
    able = training.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bfloat16" if able and tuning.name != FULL and not training.fp16 else "float32"
