"""Fine-tuning of any supported VLM on conversations about pictures (extra `train`).

from vlmfast.eval.finetune import Arguments, Training, finetune

outcome = finetune(
    Arguments(model="testbed:llava", data="train.jsonl", tuner="lora:r=8", method="hiprune:keep=0.33"),
    Training(output_dir="runs/lora", max_steps=100, per_device_train_batch_size=8),
)
outcome.folder, outcome.metrics, outcome.trainable

`scripts/finetune.py` is the same for the command line (`command.py`). `data.py` reads the conversations, `collate.py`
makes batches whose labels are the answers alone, `tuners.py` knows the ways to tune, `training.py` trains,
`evaluating.py` asks tasks meanwhile, `folder.py` knows what a run leaves and where it goes on.
"""

from importlib.util import find_spec

_missing = [name for name in ("accelerate", "datasets", "jinja2", "peft") if find_spec(name) is None]
if _missing:
    raise ImportError(f"fine-tuning needs {', '.join(_missing)}: pip install 'vlmfast[train]'")

from vlmfast.eval.finetune.arguments import Arguments, Training  # noqa: E402
from vlmfast.eval.finetune.data import Sample, Samples, load_samples  # noqa: E402
from vlmfast.eval.finetune.training import Outcome, finetune  # noqa: E402

__all__ = ["Arguments", "Outcome", "Sample", "Samples", "Training", "finetune", "load_samples"]
