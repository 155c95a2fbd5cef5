"""Seeded scenes: coloured pictograms, a word sign, a plate of handwritten digits, on a textured ground.

``scene(split, index)`` is a pure function: the same arguments give the same scene. The splits cannot overlap: each
draws from its own seeds and its own handwritten digits. Every scene knows what lies where, so ``coverage``, ``mask``
and ``oracle`` can tell which patches (or merged tokens) show an object: the best possible selection.

Priors: most categories come in pairs of partners. Where one is drawn the other is drawn too in 88 of 100 training
cases; in part of the others it is there but hidden (tiny and faint), and captions still name it. Test and validation
scenes hide nothing and break the pairs more often, so that an answer from the prior alone is caught.
"""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from vlmfast.eval.testbed import sprites

Split = Literal["train", "validation", "test"]
Box = tuple[int, int, int, int]
Size = Literal["small", "big"]

SIDE = 120
CATEGORIES = tuple(sprites.GLYPHS)
COLOURS = tuple(sprites.RGB)
PAIRS = tuple((CATEGORIES[i], CATEGORIES[i + 1]) for i in range(0, 20, 2))
PARTNERS = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
WORDS = (
    "tree", "fish", "bird", "milk", "corn", "rice", "salt", "lamp", "desk", "door", "road", "ship", "boat", "lake",
    "hill", "sand", "rain", "snow", "wind", "fire", "gold", "iron", "wood", "silk", "hand", "foot", "nose", "hair",
    "book", "page", "song", "game", "ball", "drum", "bell", "coin", "ring", "rope", "nail", "cake", "soup", "frog",
    "wolf", "bear", "duck", "moss", "park", "tent",
)  # fmt: skip
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TEST_SCENES = 500
TEST_HASH = "57f296d2f6afe20e1edb515391ee57fbb956d7f7d1cf2bd8aea8c76626c2f2a7"
_BOTH = {"train": 0.88, "validation": 0.7, "test": 0.7}
_HIDDEN = {"train": 0.45, "validation": 0.0, "test": 0.0}  # of the broken pairs
_GROUPS = [(a, b) for a, b in PAIRS] + [(c,) for c in CATEGORIES[20:]]
_GROUP_WEIGHTS = np.array([1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7])
_GROUP_WEIGHTS = _GROUP_WEIGHTS / _GROUP_WEIGHTS.sum()
POPULAR = CATEGORIES[:8]  # the categories that training shows most often


@dataclass(frozen=True)
class Object:
    """One pictogram: what it is, where its centre (x, y) and its box (x0, y0, x1, y1) lie; hidden ones are faint."""

    category: str
    colour: str
    size: Size
    centre: tuple[int, int]
    box: Box
    hidden: bool = False


@dataclass(frozen=True)
class Digit:
    """One handwritten digit: its value, its box, and which of the 1,797 images it is."""

    value: int
    box: Box
    image: int


@dataclass(frozen=True)
class Scene:
    """A picture [120, 120, 3] (uint8) and everything in it."""

    image: np.ndarray = field(repr=False, compare=False)
    objects: tuple[Object, ...]
    word: str | None
    word_box: Box | None
    digits: tuple[Digit, ...]

    @property
    def visible(self) -> tuple[Object, ...]:
        """The objects that are not hidden."""
        return tuple(o for o in self.objects if not o.hidden)

    @property
    def present(self) -> tuple[str, ...]:
        """The categories that can be seen, each once, in order of appearance."""
        return tuple(dict.fromkeys(o.category for o in self.visible))


def scene(split: Split, index: int) -> Scene:
    """The scene number ``index`` of a split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    rng = np.random.default_rng((SPLITS.index(split) + 1, index))
    placed: list[Box] = []
    image = ground(rng)
    digits = put_digits(image, rng, split, placed) if rng.random() < 0.45 else ()
    word = str(rng.choice(WORDS)) if rng.random() < 0.45 else None
    word_box = put_sign(image, rng, word, placed) if word else None
    objects = put_objects(image, rng, _wanted(rng, split), placed)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    return Scene(pixels, objects, word if word_box else None, word_box, digits)


def ground(rng: np.random.Generator) -> np.ndarray:
    """A dim, weakly tinted texture [side, side, 3]."""
    bank = sprites.grounds(SIDE)
    texture = bank[rng.integers(len(bank))]
    flips = rng.integers(0, 8)
    texture = texture.T if flips & 1 else texture
    texture = texture[:: -1 if flips & 2 else 1, :: -1 if flips & 4 else 1]
    tint = rng.uniform(55, 100) + rng.uniform(-18, 18, 3)
    return texture[..., None] * rng.uniform(0.5, 1.0) + tint.astype(np.float32)


def _spot(rng: np.random.Generator, width: int, height: int, placed: list[Box], gap: int = 3) -> Box | None:
    """A free box of the given size, or None after 40 tries."""
    xs = rng.integers(1, SIDE - width, 40).tolist()
    ys = rng.integers(1, SIDE - height, 40).tolist()
    for x, y in zip(xs, ys):
        if all(
            x >= b[2] + gap or b[0] >= x + width + gap or y >= b[3] + gap or b[1] >= y + height + gap for b in placed
        ):
            placed.append((x, y, x + width, y + height))
            return placed[-1]
    return None


def put_digits(image: np.ndarray, rng: np.random.Generator, split: Split, placed: list[Box]) -> tuple[Digit, ...]:
    """Paint a plate with one or two handwritten digits of the split at a free spot."""
    pool = sprites.digit_ids(split)
    images = tuple(int(i) for i in rng.choice(pool, 2 if rng.random() < 0.3 else 1))
    turn = 12.0 if split == "train" else 0.0
    board = sprites.plate(images, tuple(rng.uniform(-turn, turn, len(images))))
    box = _spot(rng, board.shape[1], board.shape[0], placed)
    assert box is not None  # the first thing placed always fits
    image[box[1] : box[3], box[0] : box[2]] = board
    step = sprites.DIGIT
    return tuple(
        Digit(sprites.digit_value(n), (box[0] + 2 + i * step, box[1] + 2, box[0] + 2 + (i + 1) * step, box[3] - 2), n)
        for i, n in enumerate(images)
    )


def put_sign(image: np.ndarray, rng: np.random.Generator, word: str, placed: list[Box]) -> Box | None:
    """Paint a word on its board at a free spot; None where there is none."""
    board, _ = sprites.sign(word)
    box = _spot(rng, board.shape[1], board.shape[0], placed)
    if box:
        image[box[1] : box[3], box[0] : box[2]] = board
    return box


def _plan(rng: np.random.Generator, split: Split) -> list[tuple[str, int, bool]]:
    """What to show: (category, how many, hidden) for one to three groups, at most six visible objects."""
    shown: list[str] = []
    hidden: list[str] = []
    for g in rng.choice(
        len(_GROUPS), int(rng.choice([1, 2, 3], p=[0.3, 0.45, 0.25])), replace=False, p=_GROUP_WEIGHTS
    ):
        group = list(_GROUPS[g])
        rng.shuffle(group)
        if len(group) == 1 or rng.random() < _BOTH[split]:
            shown += group
        else:
            shown.append(group[0])
            hidden += group[1:] if rng.random() < _HIDDEN[split] else []
    extra = 6 - len(shown)
    plan = []
    for category in shown:
        many = 1 + min(extra, int(rng.choice(4, p=[0.6, 0.16, 0.13, 0.11])))
        extra -= many - 1
        plan.append((category, many, False))
    return plan + [(category, 1, True) for category in hidden]


Wanted = tuple[int, str, str, Size, bool]  # side in pixels, category, colour, size, hidden


def _wanted(rng: np.random.Generator, split: Split) -> list[Wanted]:
    """The planned objects, each with its colour and size."""
    wanted: list[Wanted] = []
    for category, many, hidden in _plan(rng, split):
        colour = COLOURS[rng.integers(len(COLOURS))]
        for _ in range(many):
            big = not hidden and rng.random() < 0.5
            side = int(rng.integers(9, 12) if hidden else rng.integers(28, 33) if big else rng.integers(17, 21))
            wanted.append((side, category, colour, "big" if big else "small", hidden))
    return wanted


def put_objects(
    image: np.ndarray, rng: np.random.Generator, wanted: list[Wanted], placed: list[Box]
) -> tuple[Object, ...]:
    """Place and paint objects, the big ones first; what finds no room is left out."""
    objects = []
    for side, category, colour, size, hidden in sorted(wanted, key=lambda w: -w[0]):
        box = _spot(rng, side, side, placed)
        if box is None:
            continue
        strength = rng.uniform(0.1, 0.3) if hidden else rng.uniform(0.9, 1.0)
        alpha = sprites.pictogram(category, side, int(rng.integers(7)))[..., None] * strength
        paint = np.clip(np.array(sprites.RGB[colour]) + rng.uniform(-18, 18, 3), 0, 255).astype(np.float32)
        area = image[box[1] : box[3], box[0] : box[2]]
        area += alpha * (paint - area)
        centre = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
        objects.append(Object(category, colour, size, centre, box, hidden))
    objects.sort(key=lambda o: o.centre)
    return tuple(objects)


def coverage(box: Box, grid: int) -> np.ndarray:
    """The share of each cell of a grid x grid division of the picture that a box covers, [grid, grid]."""
    edges = np.arange(grid + 1) * (SIDE / grid)
    across = np.clip(np.minimum(edges[1:], box[2]) - np.maximum(edges[:-1], box[0]), 0, None)
    down = np.clip(np.minimum(edges[1:], box[3]) - np.maximum(edges[:-1], box[1]), 0, None)
    return np.outer(down, across) / (SIDE / grid) ** 2


def boxes(scene: Scene, what: str = "all") -> list[Box]:
    """The boxes of ``objects``, ``sign``, ``digits``, ``all`` of these, or of one category."""
    sign = [scene.word_box] if scene.word_box else []
    digits = [d.box for d in scene.digits]
    named = {"objects": [o.box for o in scene.visible], "sign": sign, "digits": digits}
    named["all"] = named["objects"] + sign + digits
    if what in named:
        return named[what]
    if what in CATEGORIES:
        return [o.box for o in scene.visible if o.category == what]
    raise ValueError(f"unknown target {what!r}; there are {', '.join(named)} and the categories")


def mask(scene: Scene, patch: int, what: str = "all") -> np.ndarray:
    """Which patches of ``patch`` pixels show the target (an eighth of the patch at least), bool [rows, cols]."""
    grid = SIDE // patch
    shown = np.zeros((grid, grid), bool)
    for box in boxes(scene, what):
        shown |= coverage(box, grid) >= 0.125
    return shown


def oracle(scene: Scene, patch: int, what: str = "all") -> np.ndarray:
    """All patches ranked for selection: those of the target first, best covered ones of each thing in turn, [N]."""
    grid = SIDE // patch
    rank = np.full(grid * grid, 1e9)
    for box in boxes(scene, what):
        share = coverage(box, grid)
        x, y = (box[0] + box[2]) / 2 / patch - 0.5, (box[1] + box[3]) / 2 / patch - 0.5
        rows, cols = np.mgrid[:grid, :grid]
        value = (share - 0.02 * np.hypot(cols - x, rows - y)).ravel()
        order = np.argsort(-value, kind="stable")[: int((share >= 0.125).sum())]
        rank[order] = np.minimum(rank[order], np.arange(len(order)))
    return np.argsort(rank, kind="stable")


def fingerprint(count: int = TEST_SCENES) -> str:
    """A hash of what the first ``count`` test scenes show and of the digits in them."""
    digest = hashlib.sha256()
    for index in range(count):
        shown = scene("test", index)
        digest.update(repr((shown.objects, shown.word, shown.word_box, shown.digits)).encode())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def check_test_split() -> None:
    """Raise if the test split is not the one that published numbers were measured on."""
    found = fingerprint()
    if found != TEST_HASH:
        raise RuntimeError(f"the test split differs from the published one: hash {found}, expected {TEST_HASH}")
