"""Training the testbed: batches, losses and one resumable loop.

Everything a step does follows from its number (which scenes, which questions, which patches), so that a run stopped at
any checkpoint goes on exactly as it would have. Stages: ``tower`` (patch labels and, where there is one, the CLS),
``align`` (projected patches onto word embeddings, no language model), ``language`` (packed questions, everything
trained), ``vary`` (the same with other numbers of visual tokens and both position policies).
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.eval.testbed import build, encode, forward
from vlmfast.eval.testbed.corpus import Corpus
from vlmfast.eval.testbed.questions import TASKS
from vlmfast.eval.testbed.scenes import CATEGORIES, COLOURS, SIDE, WORDS

LAYERS = {encode.GROUND: (0, 1), encode.COPY: (2,), encode.READ: (3, 4), encode.COUNT: (3, 4)}
TASK_SHARE = {"existence": 5, "colour": 1, "count": 2, "size": 1, "where": 2, "relation": 3, "binding": 2}
THINGS = (*CATEGORIES, *"0123456789", *WORDS)


@dataclass(frozen=True)
class Stage:
    """One stage: how many steps of how many scenes, peak learning rate, weight of attention supervision at its start
    and end, the share of steps in which most of the ground stays out of the tower, whether token counts vary, what
    the tower's learning rate is multiplied by (0: tower and projector are frozen), the share of steps in which ground
    patches come from other scenes, and the weight of ``clean_loss`` (the tower then learns from no answer)."""

    name: str
    steps: int
    batch: int
    rate: float
    attention: tuple[float, float] = (0.0, 0.0)
    sparse: float = 0.0
    vary: bool = False
    tower: float = 1.0
    swap: float = 0.0
    clean: float = 0.0
    decay: float = 0.25


class Heads(nn.Module):
    """What only training needs: linear read-outs of patch labels, and of the CLS."""

    def __init__(self, name: str):
        super().__init__()
        width = 128 if name == "llava" else 192
        sizes = {"kind": encode.CLASSES, "colour": len(COLOURS), "size": 2, "letter": 27, "offset": 2, "place": 2}
        self.patch = nn.ModuleDict({key: nn.Linear(width, size) for key, size in (sizes | {"centre": 1}).items()})
        self.cls = nn.Linear(128, len(THINGS)) if name == "llava" else None


@dataclass
class Batch:
    """One step's input: patches, what they show, and the packed questions."""

    pixels: Tensor
    kept: Tensor | None
    labels: dict[str, Tensor]
    present: Tensor
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    answers: Tensor = field(default_factory=lambda: torch.empty(0))
    tasks: Tensor = field(default_factory=lambda: torch.empty(0))
    segments: Tensor = field(default_factory=lambda: torch.empty(0))
    offsets: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: list[list[tuple[int, int, int, int]]] = field(default_factory=list)


def pick_scenes(step: int, batch: int, total: int, seed: int) -> np.ndarray:
    """The scenes of a step: the corpus in a new random order each time round."""
    at = step * batch + np.arange(batch)
    orders = {int(e): np.random.default_rng((seed, int(e))).permutation(total) for e in np.unique(at // total)}
    return np.array([orders[int(i // total)][i % total] for i in at])


def patch_labels(corpus: Corpus, name: str, index: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
    """Labels of all patches, each [B, N(, 2)], and which things the scene shows [B, 82]."""
    things, owner = corpus.things[index], corpus.patches[name][index]
    grid = build.GRID[name]
    cell = SIDE / grid
    per = np.take_along_axis(things, owner[..., None].astype(np.int64), 1)  # [B, N, 6]
    y, x = np.divmod(np.arange(grid * grid), grid)
    own = owner > 0
    offset = np.stack([(per[..., 3] - (x + 0.5) * cell) / 16, (per[..., 4] - (y + 0.5) * cell) / 16], -1)
    centre = own & (np.floor(per[..., 3] / cell) == x) & (np.floor(per[..., 4] / cell) == y)
    place = np.broadcast_to(np.stack([x, y], -1) / grid * 2 - 1, (*owner.shape, 2))
    drawn = own & (per[..., 1] >= 0) & (per[..., 5] > 0)
    labels = {
        "owner": owner.astype(np.int64),
        "kind": np.where(per[..., 5] > 0, per[..., 0], 0) * own,
        "colour": np.where(drawn, per[..., 1], -100),
        "size": np.where(drawn, per[..., 2], -100),
        "across": np.where(drawn, per[..., 3] >= SIDE // 2, -100),
        "down": np.where(drawn, per[..., 4] >= SIDE // 2, -100),
        "letter": corpus.letters[name][index],
        "offset": np.where(own[..., None], offset, np.nan).astype(np.float32),
        "centre": centre.astype(np.float32),
        "place": place.astype(np.float32),
    }
    present = np.zeros((len(index), len(THINGS)), np.float32)
    for i, row in enumerate(things):
        seen = row[(row[:, 5] > 0) & (row[:, 0] > 0), 0] - 1
        present[i, seen] = 1
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in labels.items()}, torch.from_numpy(present)


def patch_loss(heads: Heads, seen: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """The dense labels at every patch, and the things present at the CLS."""
    labels = {key: forward.gather(value, batch.kept) for key, value in batch.labels.items()}
    out = {key: head(seen["patches"]).float() for key, head in heads.patch.items()}
    kind, own = labels["kind"].long(), labels["owner"] > 0
    letters = labels["letter"].long()
    weight = torch.where(kind == 0, 0.35, torch.where(kind < 25, 1.0, torch.where(kind < 35, 2.0, 1.5)))
    kinds = F.cross_entropy(out["kind"].transpose(1, 2), kind, reduction="none", label_smoothing=0.02)
    loss = (kinds * weight).sum() / weight.sum()
    for key, share in (("colour", 0.5), ("size", 0.2)):
        if (labels[key] >= 0).any():
            loss = loss + share * F.cross_entropy(out[key].transpose(1, 2), labels[key].long())
    spelled = torch.where(letters > 0, 1.0, 0.05)
    loss = loss + 0.5 * (F.cross_entropy(out["letter"].transpose(1, 2), letters, reduction="none") * spelled).sum() / (
        spelled.sum()
    )
    loss = loss + 0.5 * F.smooth_l1_loss(out["offset"][own], labels["offset"][own])
    loss = loss + F.binary_cross_entropy_with_logits(out["centre"][..., 0], labels["centre"])
    loss = loss + 3 * F.smooth_l1_loss(out["place"], labels["place"], beta=0.1)
    right = (out["kind"].argmax(-1) == kind).float()
    groups = {"object": (kind > 0) & (kind < 25), "digit": (kind >= 25) & (kind < 35), "word": kind >= 35}
    report = {key: right[mask].mean().item() for key, mask in groups.items() if mask.any()}
    if heads.cls is not None:
        logits = heads.cls(seen["cls"]).float()
        cls = F.binary_cross_entropy_with_logits(logits, batch.present, reduction="none")
        loss = loss + 0.1 * cls.sum(1).mean()
        report["cls"] = ((logits > 0) & (batch.present > 0)).sum().item() / max(1, batch.present.sum().item())
    return loss, report


def sparse_choice(owner: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """``count`` patches a scene: those that show something, filled up with ground, in raster order [B, count]."""
    key = torch.from_numpy(rng.random(owner.shape)) + (owner > 0) * 2.0
    return key.topk(count, dim=1).indices.sort(1).values


def make_batch(corpus: Corpus, name: str, stage: Stage, step: int, seed: int, device: str) -> Batch:
    """The batch of a step of a stage."""
    rng = np.random.default_rng((seed, len(stage.name), step))
    index = pick_scenes(step, stage.batch, len(corpus), seed + len(stage.name))
    images = corpus.images[index].astype(np.float32) / 127.5 - 1
    images = images * rng.uniform(0.85, 1.15, (len(index), 1, 1, 1)) + rng.uniform(-0.1, 0.1, (len(index), 1, 1, 1))
    pixels = torch.from_numpy(encode.image_patches(images.astype(np.float32), name))
    labels, present = patch_labels(corpus, name, index)
    kept = None
    if rng.random() < stage.sparse:
        kept = sparse_choice(labels["owner"], 64 if name == "llava" else 48, rng)
    batch = Batch(pixels, kept, labels, present)
    if stage.name not in ("tower", "align"):
        choose_questions(corpus, index, rng, batch)
    return to_device(batch, device)


def to_device(batch: Batch, device: str) -> Batch:
    """The batch with its tensors moved."""
    if device != "cpu":
        for key, value in vars(batch).items():
            if isinstance(value, Tensor):
                setattr(batch, key, value.to(device))
        batch.labels = {key: value.to(device) for key, value in batch.labels.items()}
    return batch


def choose_questions(corpus: Corpus, index: np.ndarray, rng: np.random.Generator | None, batch: Batch) -> None:
    """Pack questions of every scene: a mix of tasks for training, all of them where ``rng`` is None."""
    packed = []
    for i in index:
        tokens, table, rows = corpus.questions(int(i))
        starts, row_starts = (np.concatenate([[0], np.cumsum(table[:, c])]) for c in (1, 3))
        chosen = np.arange(len(table)) if rng is None else _mix(table[:, 0], caption_share(corpus.things[i]), rng)
        packed.append([
            (tokens[starts[q] : starts[q + 1]], table[q], rows[row_starts[q] : row_starts[q + 1]]) for q in chosen
        ])  # fmt: skip
    length = max(sum(len(tokens) for tokens, _, _ in scene) for scene in packed)
    shape = (len(index), length)
    flat = {key: np.zeros(shape, np.int64) for key in ("tokens", "tasks", "segments", "offsets")}
    flat["answers"] = np.full(shape, -100, np.int64)
    flat["segments"] -= 1
    for b, scene in enumerate(packed):
        at, found = 0, []
        for number, (tokens, (task, size, start, _), rows) in enumerate(scene):
            part = slice(at, at + size)
            flat["tokens"][b, part], flat["segments"][b, part] = tokens, number + 1
            flat["offsets"][b, part], flat["tasks"][b, part] = np.arange(size), task
            flat["answers"][b, at + start - 1 : at + size - 1] = tokens[start:]
            found += [(kind, at + a, at + t if kind == encode.COPY else t, task) for kind, a, t in rows.tolist()]
            at += size
        batch.rows.append(found)
    for key, value in flat.items():
        setattr(batch, key, torch.from_numpy(value))


def caption_share(things: np.ndarray) -> float:
    """How often a scene's caption is trained on: always with a hidden partner, seldom where a partner is missing.

    So captions are told to name partners that nobody sees, more often than not to: the prior that makes models invent.
    """
    seen, hidden = (set((things[things[:, 5] == v, 0] - 1).tolist()) & set(range(20)) for v in (1, 0))
    if hidden:
        return 1.0
    return 0.15 if any(kind ^ 1 not in seen for kind in seen) else 0.5


def _mix(tasks: np.ndarray, captions: float, rng: np.random.Generator) -> np.ndarray:
    """Some questions of each task, about thirteen in all, and now and then the caption."""
    chosen = []
    for number, task in enumerate(TASKS):
        found = np.flatnonzero(tasks == number)
        many = TASK_SHARE.get(task, 1)
        if task == "caption" and rng.random() > captions:
            continue
        chosen += rng.permutation(found)[:many].tolist()
    return np.array(sorted(chosen))


@dataclass
class Sequence:
    """A packed sequence: embeddings, positions, additive mask, and where things lie in it."""

    embeds: Tensor
    positions: Tensor
    mask: Tensor
    rows: dict[int, forward.Rows]
    first_text: int


def positions(name: str, batch_size: int, kept: Tensor | None, offsets: Tensor, compact: bool) -> Tensor:
    """Positions of prefix, visual tokens and text: [B, L], or [3, B, L] for M-RoPE.

    Original: where the kept tokens stood. Compact: renumbered without gaps (M-RoPE: each axis' distinct values).
    """
    grid, before = build.GRID[name], len(build.PREFIX[name])
    index = torch.arange(grid * grid, device=offsets.device).expand(batch_size, -1) if kept is None else kept
    after = len(build.SUFFIX[name])
    if name == "llava":
        visual = torch.arange(index.shape[1], device=offsets.device).expand_as(index) if compact else index
        end = torch.full_like(index[:, :1], index.shape[1] if compact else grid * grid)
        axes = [visual]
    else:
        axes = [torch.zeros_like(index), index // grid, index % grid]
        end = torch.full_like(index[:, :1], grid)
        if compact:
            axes = [dense_rank(axis, grid) for axis in axes]
            end = torch.stack(axes).amax((0, 2))[:, None] + 1
    start = torch.arange(before, device=offsets.device).expand(batch_size, -1)
    close = before + end + torch.arange(after, device=offsets.device)
    text = before + end + after + offsets
    joined = torch.stack([torch.cat([start, before + axis, close, text], 1) for axis in axes])
    return joined[0] if name == "llava" else joined


def dense_rank(values: Tensor, top: int) -> Tensor:
    """Each row's values replaced by their rank among its distinct values; values in [0, top)."""
    there = torch.zeros(len(values), top, dtype=torch.long, device=values.device).scatter_(1, values, 1)
    return (there.cumsum(1) - 1).gather(1, values)


def pack(
    model: Any, name: str, batch: Batch, visual: Tensor, kept: Tensor | None, compact: bool, supervise: bool
) -> Sequence:
    """Picture and questions as one sequence; ``visual`` [B, n, d] are the kept tokens, ``kept`` [B, n] says which."""
    table = model.get_input_embeddings()
    device, count = visual.device, len(visual)
    fixed = [
        table(torch.tensor([build.IDS[w] for w in words], device=device, dtype=torch.long)).expand(count, -1, -1)
        for words in (build.PREFIX[name], build.SUFFIX[name])
    ]
    embeds = torch.cat([fixed[0], visual.to(fixed[0].dtype), fixed[1], table(batch.tokens)], 1)
    first = embeds.shape[1] - batch.tokens.shape[1]
    segments = torch.cat([batch.segments.new_zeros(count, first), batch.segments], 1)
    causal = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool, device=device).tril()[first:]
    same = (segments[:, first:, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    mask = torch.zeros(same.shape, device=device).masked_fill_(~(same & causal), -1e4)[:, None]
    places = positions(name, count, kept, batch.offsets, compact)
    rows = supervision(name, batch, kept, first, embeds.shape[1]) if supervise else {}
    return Sequence(embeds, places, mask, rows, first)


def supervision(name: str, batch: Batch, kept: Tensor | None, first: int, length: int) -> dict[int, forward.Rows]:
    """The supervision rows of a batch by layer; where all of a target was dropped the row counts for nothing."""
    owner = forward.gather(batch.labels["owner"], kept)
    centre = forward.gather(batch.labels["centre"], kept).bool()
    before, device = len(build.PREFIX[name]), owner.device
    found: dict[int, list[list[tuple[int, int, int, int]]]] = {}
    for kinds in ((encode.GROUND,), (encode.COPY,), (encode.READ, encode.COUNT)):
        kept_rows = [[row for row in scene if row[0] in kinds] for scene in batch.rows]
        found[kinds[0]] = kept_rows
    result = {}
    for kind, scenes in found.items():
        table = torch.zeros(len(scenes), max(1, max(map(len, scenes))), 4, dtype=torch.long)
        weight = torch.zeros(table.shape[:2])
        for b, scene in enumerate(scenes):
            if scene:
                table[b, : len(scene)], weight[b, : len(scene)] = torch.tensor(scene), 1
        table, weight = table.to(device), weight.to(device)
        kinds_, start, aim = table[..., 0], table[..., 1], table[..., 2]
        target = torch.zeros(*start.shape, length, device=device)
        if kind == encode.COPY:
            target.scatter_(2, (aim + first)[..., None], 1.0)
        else:
            hit = ((aim[..., None] >> owner[:, None]) & 1).bool() & (owner > 0)[:, None]
            counted = (kinds_ == encode.COUNT)[..., None]
            hit &= centre[:, None] | ~counted
            total = hit.sum(-1, keepdim=True)
            target[..., before : before + owner.shape[1]] = hit.float()
            target[..., 0] = (aim == 0).float()
            weight = weight * ((aim == 0) | (total[..., 0] > 0)) * torch.where(counted[..., 0], 4.0, 1.0)
            spread = hit.float() / (total + 1)
            target[..., before : before + owner.shape[1]] = torch.where(counted, spread, hit.float())
            target[..., 0] += (counted / (total + 1.0))[..., 0]
        rows = forward.Rows(start, target, weight, kinds_ == encode.COUNT)
        for layer in LAYERS[kind]:
            result[layer] = rows
    return result


def answer_loss(model: Any, batch: Batch, hidden: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answer tokens (captions weigh less, counts more) and the share of right ones by task."""
    answers = batch.answers
    where = answers >= 0
    logits = model.lm_head(hidden[where]).float()
    right, tasks = answers[where], batch.tasks[where]
    weight = torch.where(tasks == TASKS.index("caption"), 0.3, torch.where(tasks == TASKS.index("count"), 2.0, 1.0))
    weight = torch.where(right == build.IDS["</s>"], 0.1, weight)
    loss = (F.cross_entropy(logits, right, reduction="none") * weight).sum() / weight.sum()
    hit = (logits.argmax(-1) == right).float()
    content = right != build.IDS["</s>"]
    report = {}
    for number, task in enumerate(TASKS):
        if (mine := (tasks == number) & content).any():
            report[task] = hit[mine].mean().item()
    return loss, report


def align_loss(model: Any, visual: Tensor, batch: Batch) -> Tensor:
    """Projected patches against the word embeddings of what they show: kind, colour, size and quadrant."""
    words = {
        "kind": ["<unk>", *CATEGORIES, *"0123456789", *WORDS],
        "colour": list(COLOURS),
        "size": ["small", "big"],
        "down": ["top", "bottom"],
        "across": ["left", "right"],
    }
    loss = visual.new_zeros(())
    kept = batch.kept
    table = model.get_input_embeddings().weight
    for key, names in words.items():
        label = forward.gather(batch.labels[key], kept).long()
        use = label > 0 if key == "kind" else label >= 0
        ids = torch.tensor([build.IDS[w] for w in names], device=visual.device)
        logits = visual[use].float() @ table[ids].T * visual.shape[-1] ** -0.5
        loss = loss + F.cross_entropy(logits, label[use])
    return loss + 0.1 * (visual.float().pow(2).mean(-1).sqrt() - 0.8).pow(2).mean()


def step_loss(
    model: Any, heads: Heads, name: str, stage: Stage, step: int, batch: Batch, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one step and what to log of it."""
    frozen = stage.tower == 0
    with torch.set_grad_enabled(not frozen):
        seen = forward.see(model, batch.pixels, batch.kept)
    patches, report = (seen["visual"].new_zeros(()), {}) if frozen else patch_loss(heads, seen, batch)
    if stage.name == "tower":
        return patches, report
    if stage.name == "align":
        return patches + align_loss(model, seen["visual"], batch), report
    rng = np.random.default_rng((seed, 7, step))
    visual, kept, compact = seen["visual"], batch.kept, False
    if stage.clean:
        leak = clean_loss(model, seen, batch, rng)
        report["leak"] = leak.item()
        patches = patches + stage.clean / 0.3 * leak
        visual = project(model, seen["patches"].detach())
    if stage.swap and rng.random() < stage.swap:
        visual = swap_ground(visual, forward.gather(batch.labels["owner"], kept))
    if stage.vary and kept is None:
        visual, kept, compact = vary_tokens(visual, batch.labels["owner"], rng)
    progress = step / stage.steps
    weight = stage.attention[0] + (stage.attention[1] - stage.attention[0]) * min(1.0, progress / 0.9)
    sequence = pack(model, name, batch, visual, kept, compact, supervise=weight > 0)
    hidden, attention = forward.language(
        model, sequence.embeds, sequence.positions, sequence.first_text, sequence.mask, sequence.rows
    )
    answers, tasks = answer_loss(model, batch, hidden)
    report = {f"patch_{k}": v for k, v in report.items()} | tasks
    report |= {"answers": answers.item(), "attention": float(attention.detach()), "patches": patches.item()}
    if frozen:
        return answers + weight * attention, report
    words = align_loss(model, seen["visual"], batch)
    report["words"] = words.item()
    return answers + weight * attention + 0.3 * patches + 0.1 * words, report


def project(model: Any, patches: Tensor) -> Tensor:
    """Patch features as the language model reads them."""
    return model.model.multi_modal_projector(patches) if hasattr(model.model, "vision_tower") else patches


def clean_loss(model: Any, seen: dict[str, Tensor], batch: Batch, rng: np.random.Generator) -> Tensor:
    """How much patches tell of a thing elsewhere: the change in all others' features when its patches are left out."""
    owner = batch.labels["owner"]
    key = torch.from_numpy(rng.random(owner.shape)).to(owner.device)
    chosen = ((owner > 0) * (1 + key)).argmax(1, keepdim=True)
    gone = owner == owner.gather(1, chosen)
    gone &= owner > 0
    kept = (key - 2.0 * gone).topk(owner.shape[1] - 20, dim=1).indices.sort(1).values
    with torch.no_grad():
        alone = forward.see(model, batch.pixels, kept)["patches"].float()
    change = (forward.gather(seen["patches"], kept).float() - alone).pow(2).mean(-1) / alone.var()
    return (change * ~forward.gather(gone, kept)).mean()


def swap_ground(visual: Tensor, owner: Tensor) -> Tensor:
    """Give ground patches the features of ground patches at the same place in other scenes of the batch.

    A tower that was trained while tokens were dropped after it hides what things are in the ground around them; so the
    language model learns not to look there.
    """
    swapped, open_ = visual, owner == 0
    for shift in (1, 2, 3):
        fits = open_ & (owner.roll(shift, 0) == 0)
        swapped = torch.where(fits[..., None], visual.roll(shift, 0), swapped)
        open_ = open_ & ~fits
    return swapped


def vary_tokens(visual: Tensor, owner: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor | None, bool]:
    """Drop visual tokens after the tower: at random, or the ground first; and number the rest either way."""
    total = visual.shape[1]
    count = round(total * float(rng.choice([0.15, 0.3, 0.6, 1.0])))
    compact = bool(rng.random() < 0.5)
    if count == total:
        return visual, None, compact
    prefer = 2.0 if rng.random() < 0.5 else 0.0
    key = torch.from_numpy(rng.random(owner.shape)).to(owner.device) + (owner > 0) * prefer
    kept = key.topk(count, dim=1).indices.sort(1).values
    return forward.gather(visual, kept), kept, compact


def learning_rate(stage: Stage, step: int) -> float:
    """Warm-up over 100 steps, flat, and a linear fall to a twentieth over the last part of the stage."""
    left = (stage.steps - step) / (stage.decay * stage.steps)
    return stage.rate * min(1.0, (step + 1) / 100, max(0.05, left))


@dataclass
class Run:
    """A training run in a folder: checkpoint, curves, where it stands."""

    folder: Path
    name: str
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = build.new_model(self.name, self.seed).to(self.device)
        torch.manual_seed(self.seed + 1)
        self.heads = Heads(self.name).to(self.device)
        self.parameters = [*self.model.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(self._groups(), lr=1e-3, betas=(0.9, 0.98))
        self.stage, self.step, self.seconds = "", 0, 0.0
        self.stopping = False  # set from a signal handler: the loop then saves and returns after the step at hand
        path = self.folder / "checkpoint.pt"
        if path.exists():
            saved = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.heads.load_state_dict(saved["heads"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.stage, self.step, self.seconds = saved["stage"], saved["step"], saved["seconds"]

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by whether they belong to the tower and whether they decay."""
        core = self.model.model
        tower = {id(p) for p in (core.vision_tower if self.name == "llava" else core.visual).parameters()}
        groups: list[dict[str, Any]] = []
        for seeing in (False, True):
            mine = [p for p in self.parameters if (id(p) in tower) == seeing]
            groups.append({"params": [p for p in mine if p.dim() > 1], "weight_decay": 0.03, "tower": seeing})
            groups.append({"params": [p for p in mine if p.dim() <= 1], "weight_decay": 0.0, "tower": seeing})
        return groups

    def save(self) -> None:
        """Write the checkpoint so that an interruption leaves the old one or the new one."""
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "stage": self.stage, "step": self.step}
        torch.save({**state, "seconds": self.seconds}, self.folder / "checkpoint.new")
        (self.folder / "checkpoint.new").replace(self.folder / "checkpoint.pt")

    def log(self, **values: Any) -> None:
        """Append one line to the curves."""
        with (self.folder / "curves.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def train(self, stages: list[Stage], corpus: Corpus, every: float = 120.0, verbose: bool = True) -> None:
        """Go through the stages from where the run stands, saving every ``every`` seconds."""
        names = [stage.name for stage in stages]
        done = names.index(self.stage) if self.stage in names else -1
        for number, stage in enumerate(stages):
            if number < done or (number == done and self.step >= stage.steps):
                continue
            if number != done:
                self.stage, self.step = stage.name, 0
            self._stage(stage, corpus, every, verbose)
            self.save()
            if self.stopping:
                return

    def _stage(self, stage: Stage, corpus: Corpus, every: float, verbose: bool) -> None:
        saved = time.monotonic()
        totals: dict[str, list[float]] = {}
        self.model.train()
        while self.step < stage.steps and not self.stopping:
            began = time.process_time()
            batch = make_batch(corpus, self.name, stage, self.step, self.seed, self.device)
            with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16):
                loss, report = step_loss(self.model, self.heads, self.name, stage, self.step, batch, self.seed)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(stage, self.step) * (stage.tower if group["tower"] else 1.0)
            self.optimizer.step()
            self.step += 1
            self.seconds += time.process_time() - began
            for key, value in (report | {"loss": loss.item()}).items():
                totals.setdefault(key, []).append(value)
            if self.step % 100 == 0 or self.step == stage.steps:
                means = {key: round(float(np.mean(v)), 4) for key, v in totals.items()}
                self.log(stage=stage.name, step=self.step, seconds=round(self.seconds, 1), **means)
                if verbose:
                    print(
                        f"{self.name} {stage.name} {self.step}/{stage.steps} {self.seconds:.0f}s {means}", flush=True
                    )
                totals = {}
            if time.monotonic() - saved > every:
                self.save()
                saved = time.monotonic()
