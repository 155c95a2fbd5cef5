"""What a testbed model knows, and what it still knows with few visual tokens: the numbers of the model cards.

Answers are read from packed sequences, which give the same as one chat prompt per question (a test compares); tokens
are dropped after the tower by plain selections: the oracle (patches that show something, each thing in turn), random,
a uniform grid, and the tower's own attention (of its CLS, or received from all patches in its last layer).
"""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast.eval.testbed import build, encode, forward, training
from vlmfast.eval.testbed.questions import PARTNERS, TASKS, objects_in, prompt_messages, questions
from vlmfast.eval.testbed.scenes import CATEGORIES, SIDE, Scene, Split, oracle, scene

SELECTIONS = ("all", "oracle", "attention", "grid", "random")


def scene_batch(name: str, split: Split, index: range) -> tuple[list[Scene], training.Batch]:
    """Scenes with all their questions packed."""
    shown, arrays = zip(*(encode.encode(split, i) for i in index))
    images = np.stack([one.image for one in shown]).astype(np.float32) / 127.5 - 1
    pixels = torch.from_numpy(encode.image_patches(images, name))
    corpus: Any = _Held(list(arrays), name)
    labels, present = training.patch_labels(corpus, name, np.arange(len(shown)))
    batch = training.Batch(pixels, None, labels, present)
    training.choose_questions(corpus, np.arange(len(shown)), None, batch)
    return list(shown), batch


class _Held:
    """A corpus of a few scenes held in memory."""

    def __init__(self, arrays: list[encode.Encoded], name: str):
        self.arrays = arrays
        self.things = np.stack([a.things for a in arrays])
        self.patches = {name: np.stack([a.patches[name] for a in arrays])}
        self.letters = {name: np.stack([a.letters[name] for a in arrays])}

    def questions(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        one = self.arrays[index]
        return one.tokens, one.table, one.rows


def choose(select: str, keep: float, shown: list[Scene], score: Tensor, grid: int, seed: int) -> Tensor | None:
    """The kept tokens of each scene, ascending [B, n]; None for all."""
    total = grid * grid
    count = max(1, round(keep * total))
    if select == "all" or count == total:
        return None
    if select == "oracle":
        order = np.stack([oracle(one, SIDE // grid)[:count] for one in shown])
    elif select == "random":
        rng = np.random.default_rng(seed)
        order = np.stack([rng.permutation(total)[:count] for _ in shown])
    elif select == "grid":
        order = np.tile(((np.arange(count) + 0.5) * total / count).astype(int), (len(shown), 1))
    elif select == "attention":
        order = score.topk(count, dim=1).indices.numpy()
    else:
        raise ValueError(f"unknown selection {select!r}; there are {', '.join(SELECTIONS)}")
    return torch.from_numpy(np.sort(order, 1)).long()


@torch.no_grad()
def accuracy(
    model: Any, name: str, split: Split, count: int, select: str = "all", keep: float = 0.11, compact: bool = False,
    start: int = 0,
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """Right answers and questions by task, with existence also by kind of absent noun and for "yes" alone."""
    found: dict[str, list[bool]] = defaultdict(list)
    for first in range(start, start + count, 20):
        index = range(first, min(first + 20, start + count))
        shown, batch = scene_batch(name, split, index)
        seen = forward.see(model, batch.pixels)
        kept = choose(select, keep, shown, seen["score"], build.GRID[name], first)
        visual = forward.gather(seen["visual"], kept)
        packed = training.pack(model, name, batch, visual, kept, compact, supervise=False)
        hidden, _ = forward.language(model, packed.embeds, packed.positions, packed.first_text, packed.mask, {})
        wrong = (model.lm_head(hidden).argmax(-1) != batch.answers) & (batch.answers >= 0)
        for b, i in enumerate(index):
            for number, question in enumerate(questions(shown[b], split, i), start=1):
                right = not bool(wrong[b][batch.segments[b] == number].any())
                found[question.task].append(right)
                if question.task == "existence":
                    found[f"existence {question.subtask}"].append(right)
                    found[f"existence {question.answer}"].append(right)
    found.pop("caption", None)
    names = [task for task in found if task in TASKS] + sorted(task for task in found if task not in TASKS)
    return {task: (sum(found[task]), len(found[task])) for task in names}


@torch.no_grad()
def captions(model: Any, processor: Any, split: Split, count: int) -> list[tuple[Scene, str]]:
    """Captions of the first scenes of a split, by ``generate``."""
    from PIL import Image

    prompt = processor.apply_chat_template(prompt_messages("describe the picture ."), add_generation_prompt=True)
    written = []
    for first in range(0, count, 20):
        shown = [scene(split, i) for i in range(first, min(first + 20, count))]
        inputs = processor(
            images=[Image.fromarray(one.image) for one in shown], text=[prompt] * len(shown), return_tensors="pt"
        )
        out = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        written += list(zip(shown, (text.strip() for text in texts)))
    return written


def chair(written: list[tuple[Scene, str]]) -> dict[str, float]:
    """CHAIR_i, CHAIR_s, recall, and which share of the invented objects are partners of present ones."""
    mentions = invented = partners = bad = named = there = 0
    for shown, text in written:
        said, present = objects_in(text), set(shown.present)
        wrong = [c for c in said if c not in present]
        mentions, invented, bad = mentions + len(said), invented + len(wrong), bad + bool(wrong)
        partners += sum(PARTNERS.get(c) in present for c in wrong)
        named, there = named + len(present & set(said)), there + len(present)
    return {
        "chair_i": invented / max(1, mentions), "chair_s": bad / max(1, len(written)), "recall": named / max(1, there),
        "partners_among_invented": partners / max(1, invented), "captions": len(written),
    }  # fmt: skip


@torch.no_grad()
def sinks(model: Any, name: str, split: Split, count: int) -> dict[str, Any]:
    """Where the language model looks from the last token of "is there a ... ?", by layer.

    Shares on <s> (asking for something that is there, and for something that is not), on the rest of the prefix, the
    visual tokens and the question; what <s> receives from all tokens; the most attended visual token's share; the
    largest activation over the median one; and where in the sequence the largest hidden state stands.
    """
    shown, batch = scene_batch(name, split, range(count))
    visual = forward.see(model, batch.pixels)["visual"]
    before, last = len(build.PREFIX[name]), len(build.PREFIX[name]) + visual.shape[1]
    there = [one.present[0] for one in shown]
    absent = [next(c for c in CATEGORIES[i % 24 :] + CATEGORIES if c not in s.present) for i, s in enumerate(shown)]
    yes, no = (_attention(model, name, visual, nouns) for nouns in (there, absent))
    layers = []
    for present, missing, states in zip(yes[0], no[0], yes[1][1:]):
        row = present[:, :, -1].mean((0, 1))
        shares = {
            "bos_present": row[0],
            "bos_absent": missing[:, :, -1, 0].mean(),
            "prefix": row[1:before].sum(),
            "visual": row[before:last].sum(),
            "question": row[last:].sum(),
            "bos_from_all": present[..., before:, 0].mean(),
            "top_visual": present[:, :, -1, before:last].mean(1).max(-1).values.mean(),
            "largest_activation": states.abs().amax() / states.abs().median(),
        }
        layers.append({key: round(float(value), 3) for key, value in shares.items()})
        layers[-1]["largest_norm_token"] = int(states.norm(dim=-1).mean(0).argmax())
    return {"tokens": {"prefix": before, "visual": visual.shape[1]}, "layers": layers}


def _attention(model: Any, name: str, visual: Tensor, nouns: list[str]) -> tuple[Any, Any]:
    """Attention maps and hidden states of all layers for "is there a <noun> ?" about each picture."""
    table, count = model.get_input_embeddings(), len(nouns)
    prompts = [[*build.SUFFIX[name], *f"is there a {noun} ? assistant :".split()] for noun in nouns]
    before, after = (
        torch.tensor([[build.IDS[word] for word in words] for words in texts])
        for texts in ([build.PREFIX[name]] * count, prompts)
    )
    embeds = torch.cat([table(before), visual, table(after)], 1)
    offsets = torch.arange(after.shape[1] - len(build.SUFFIX[name])).expand(count, -1)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=training.positions(name, count, None, offsets, False),
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        output_attentions=True,
        output_hidden_states=True,
    )
    model.set_attn_implementation(implementation)
    return out.attentions, out.hidden_states
