"""Fine-tune a VLM on conversations about pictures.

    python scripts/finetune.py --model testbed:llava --data train.jsonl --tuner lora:r=8 --output_dir runs/lora
    accelerate launch --num_processes 2 scripts/finetune.py --model ... --data ... --output_dir ...

All options of transformers' TrainingArguments work besides (--max_steps, --learning_rate, --save_steps, --bf16, ...);
one JSON or YAML file may stand for all options. `vlmfast eval --adapter FOLDER` scores what was tuned.
"""

import sys

from vlmfast.__main__ import INTERRUPTED, complain
from vlmfast.complaints import TOLD, raised_on_purpose


def main() -> int:
    """The command line: one clear line for wrong input."""
    try:
        from vlmfast.eval.finetune.command import run

        run(sys.argv[1:], __doc__ or "")
        return 0
    except KeyboardInterrupt:
        again = "the same command with --resume_from_checkpoint auto goes on from the last checkpoint"
        return complain(f"interrupted; {again}", INTERRUPTED)
    except (*TOLD, OSError) as error:
        if not raised_on_purpose(error.__traceback__):
            raise
        return complain(str(error))


if __name__ == "__main__":
    sys.exit(main())
