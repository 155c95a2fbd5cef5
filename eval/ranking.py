"""``vlmfast rank-layers``: which decoder layers can do without attention between visual tokens.

Measured on questions about scenes of the validation split, so that methods with the layers chosen can be scored on
test scenes; or on a question about the user's own pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import AutoConfig

from vlmfast.composite import checked
from vlmfast.decoders import Attention, decoder
from vlmfast.eval.asking import open_image
from vlmfast.eval.heads import held_out
from vlmfast.eval.latency import use_threads
from vlmfast.eval.models import DTYPES, check_device, load_model, model_folder
from vlmfast.eval.progress import Bars
from vlmfast.eval.prompts import Prompts
from vlmfast.eval.results import write_atomic
from vlmfast.eval.runner import cores
from vlmfast.eval.tasks import choose
from vlmfast.eval.tasks.base import Doc, image
from vlmfast.patching import entrance
from vlmfast.ranges import attending
from vlmfast.ranking import Ranking, rank_layers, trials


def run(
    model: str,
    out: Path,
    *,
    images: Sequence[Path] = (),
    prompt: str | None = None,
    tasks: Sequence[str] | None = None,
    visual_update: str = "self",
    layers: str = "all",
    greedy: bool = False,
    count: int | None = None,
    limit: int | None = None,
    batch: int = 16,
    device: str = "cpu",
    dtype: str = "float32",
    progress: bool = True,
    console: Console | None = None,
) -> Ranking:
    """Rank the layers, print the ranking and write it.

    Parameters
    ----------
    model: `testbed:NAME`, a folder, or a Hugging Face id.
    out: NAME.json, for `eemllm:layers=NAME.json,top=N`.
    images, prompt: pictures, and the question that is asked about each; without pictures the tasks' questions.
    tasks: names of tasks; None: all offline ones. limit: images per task.
    visual_update, layers, greedy, count: see `vlmfast.rank_layers`.
    batch: questions a forward.

    Raises ValueError for arguments that cannot be, FileNotFoundError for files that are not there.
    """
    console = console or Console()
    checked(visual_update)
    check_device(device)
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: a file NAME.json")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write {out.name} to")
    if images and tasks:
        raise ValueError("give --image or --task, not both")
    if bool(images) != (prompt is not None):
        raise ValueError("--image and --prompt go together: a question about pictures of your own")
    if count is not None and not greedy:
        raise ValueError("--count goes with --greedy: how many layers are added one by one")
    pictures = [np.asarray(open_image(path)) for path in images]
    names = [] if images else list(choose(tasks or None))
    about = decoder(AutoConfig.from_pretrained(model_folder(model)))
    attends = [number for number, layer in enumerate(about.layers) if isinstance(layer.mixer, Attention)]
    tried = attending(layers, attends, len(about.layers), "rank-layers")
    total = trials(len(tried), greedy, count)
    with Bars(progress, {model: total}) as bars, use_threads(cores()):
        network, processor = load_model(model, device=device, dtype=dtype)
        if images and processor.chat_template is None:
            raise ValueError(f"the processor of {model} has no chat template: the prompt cannot be phrased")
        prompts = Prompts(processor, entrance(network), network.dtype)
        inputs = (
            [prompts.full(str(prompt), picture) for picture in pictures]
            if images
            else questions(prompts, [doc for name in names for doc in held_out(name, limit, 0)], batch)
        )
        ranking = rank_layers(
            network,
            inputs,
            visual_update=visual_update,
            layers=layers,
            greedy=greedy,
            count=count,
            progress=partial(bars.update, model, "answered", "layers", 1),
        )
    write_atomic(out, ranking.to_json())
    show(ranking, out, console)
    return ranking


def questions(prompts: Prompts, docs: Sequence[Doc], batch: int) -> list[dict[str, Any]]:
    """Batches of questions, those of like length together."""
    tasks = choose(list(dict.fromkeys(doc.task for doc in docs)))
    rows = [(prompts.row(tasks[doc.task].prompt(doc), image(doc)), doc) for doc in docs]
    rows.sort(key=lambda pair: len(pair[0]["input_ids"]))
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return [
        prompts.batch([row for row, _ in part]) | prompts.pictures([image(doc) for _, doc in part]) for part in parts
    ]


def show(ranking: Ranking, out: Path, console: Console) -> None:
    """Print the ranking, and how to use it."""
    console.print(str(ranking), highlight=False, soft_wrap=True, markup=False)
    half = max(1, len(ranking.order) // 2)
    update = "" if ranking.visual_update == "self" else f",visual_update={ranking.visual_update}"
    console.print(
        f"\nranking  {out}\nhalf of them: vlmfast eval --method eemllm:layers={out},top={half}{update}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
