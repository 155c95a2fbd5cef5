"""Training scenes drawn once and kept on disk, so that training only reads.

A corpus folder holds ``images.npy`` [N, 120, 120, 3], one array per patch labelling and flat arrays for the questions
with offsets into them. It is written in parts by several processes and joined by memory maps.
"""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vlmfast.eval.testbed.build import GRID
from vlmfast.eval.testbed.encode import SLOTS, encode
from vlmfast.eval.testbed.scenes import SIDE, Split

_FLAT = ("tokens", "table", "rows")


class Corpus:
    """A corpus on disk: fixed-size arrays by name and the questions of each scene."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.things = np.load(folder / "things.npy")
        self.patches = {name: np.load(folder / f"patches_{name}.npy") for name in GRID}
        self.letters = {name: np.load(folder / f"letters_{name}.npy") for name in GRID}
        self.flat = {key: np.load(folder / f"{key}.npy") for key in _FLAT}
        self.offsets = np.load(folder / "offsets.npy")  # [N + 1, 3] into tokens, table, rows

    def __len__(self) -> int:
        return len(self.images)

    def questions(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tokens, table and rows of one scene."""
        start, end = self.offsets[index], self.offsets[index + 1]
        tokens, table, rows = (self.flat[key][start[i] : end[i]] for i, key in enumerate(_FLAT))
        return tokens, table, rows


def _write_part(folder: Path, split: Split, start: int, end: int) -> None:
    images = np.lib.format.open_memmap(folder / "images.npy", mode="r+")
    kept: dict[str, list[Any]] = {}
    for index in range(start, end):
        shown, arrays = encode(split, index)
        images[index] = shown.image
        for key in ("things", *_FLAT):
            kept.setdefault(key, []).append(getattr(arrays, key))
        for name in GRID:
            kept.setdefault(f"patches_{name}", []).append(arrays.patches[name])
            kept.setdefault(f"letters_{name}", []).append(arrays.letters[name])
    images.flush()
    parts: dict[str, Any] = {k: np.concatenate(v) for k, v in kept.items()}
    np.savez(folder / f"part{start}.npz", **parts)
    np.save(folder / f"sizes{start}.npy", np.array([[len(kept[key][i]) for key in _FLAT] for i in range(end - start)]))


def write_corpus(folder: Path, split: Split, count: int, workers: int) -> Corpus:
    """Draw ``count`` scenes of a split into a folder, or open the folder if that is done already."""
    if (folder / "offsets.npy").exists():
        return Corpus(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=(count, SIDE, SIDE, 3)).flush()
    edges = np.linspace(0, count, workers + 1).astype(int).tolist()
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(_write_part, folder, split, a, b) for a, b in zip(edges[:-1], edges[1:])]
        for job in jobs:
            job.result()
    parts = [np.load(folder / f"part{start}.npz") for start in edges[:-1]]
    shapes = {"things": (count, SLOTS, -1)}
    for name in GRID:
        shapes |= {f"patches_{name}": (count, -1), f"letters_{name}": (count, -1)}  # type: ignore[dict-item]
    for key in parts[0].files:
        joined = np.concatenate([part[key] for part in parts])
        np.save(folder / f"{key}.npy", joined.reshape(shapes[key]) if key in shapes else joined)
    sizes = np.concatenate([np.load(folder / f"sizes{start}.npy") for start in edges[:-1]])
    for start in edges[:-1]:
        (folder / f"part{start}.npz").unlink()
        (folder / f"sizes{start}.npy").unlink()
    np.save(folder / "offsets.npy", np.concatenate([np.zeros((1, 3), int), sizes.cumsum(0)]))
    return Corpus(folder)
