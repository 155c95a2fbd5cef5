"""Kept visual tokens drawn over the picture: a kept token's cell stays as it is, a dropped one is greyed out.

Token j of a picture whose grid is (1, h, w) covers row j // w and column j % w of h x w equal cells. The command line
draws with Pillow (``overlay``), the page draws the dropped cells as an SVG path (``dropped_path``); both go through
the same geometry.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlmfast.visual import View

Grid = Sequence[int]  # (t, h, w) of merged tokens

LEFT_OVER = 0.2  # share of a dropped cell's own colour that is left
GREY = 140  # what a dropped cell fades to: away from both dark and bright pictures
SMALLEST_SIDE, LARGEST_SIDE = 480, 1200  # pixels that the longer side has in an overlay, at least and at most


def kept_mask(kept: Sequence[int], grid: Grid) -> np.ndarray:
    """Which cells are kept: bool [h, w]. ValueError for a grid of several frames or an index outside of it."""
    frames, height, width = (int(side) for side in grid)
    if frames != 1:
        raise ValueError(f"an overlay shows one picture, but the grid {tuple(grid)} has {frames} frames")
    indices = np.asarray(kept, dtype=np.int64).reshape(-1)
    if indices.size and (indices.min() < 0 or indices.max() >= height * width):
        raise ValueError(
            f"kept tokens reach from {indices.min()} to {indices.max()}, but a grid of {height} x {width} has tokens "
            f"0 to {height * width - 1}"
        )
    mask = np.zeros(height * width, dtype=bool)
    mask[indices] = True
    return mask.reshape(height, width)


def dropped_runs(kept: Sequence[int], grid: Grid) -> Iterator[tuple[int, int, int]]:
    """Dropped cells as horizontal runs (row, first column, length), from the top left to the bottom right."""
    for row, cells in enumerate(kept_mask(kept, grid)):
        edges = np.flatnonzero(np.diff(np.concatenate(([1], cells, [1])).astype(np.int8)))
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist()):
            yield row, start, end - start


def dropped_path(kept: Sequence[int], grid: Grid) -> str:
    """The dropped cells as one SVG path in units of cells (view box ``0 0 w h``); empty where all are kept."""
    return "".join(f"M{column} {row}h{length}v1h-{length}z" for row, column, length in dropped_runs(kept, grid))


def overlay(
    image: Image.Image | np.ndarray, kept: Sequence[int], grid: Grid, views: Sequence[View] = ()
) -> Image.Image:
    """Draw the cells of kept tokens as they are and those of dropped tokens greyed out.

    ``image``: the picture as the model sees it (see ``visible``), Pillow or uint8 [H, W, 3]; ``kept``: indices into
    its tokens; ``grid``: (1, h, w). ``views``: where the picture went in as several parts (a thumbnail and crops),
    those; a place is then as bright as the share of the parts showing it that keep it. The longer side becomes 480 to
    1200 pixels, by a whole factor if it grows.
    """
    picture = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    factor = max(1, -(-SMALLEST_SIDE // max(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    pixels = np.asarray(picture, dtype=np.float32)
    if len(views) > 1:
        bright = brightness(kept, views, (picture.height, picture.width))
    else:
        bright = paint(kept_mask(kept, grid), (picture.height, picture.width))
    left = LEFT_OVER + (1 - LEFT_OVER) * bright[..., None]
    return Image.fromarray((left * pixels + (1 - left) * GREY).astype(np.uint8))


WHOLE = (0.0, 0.0, 1.0, 1.0)


def paint(mask: np.ndarray, size: tuple[int, int], region: Sequence[float] = WHOLE) -> np.ndarray:
    """A mask [h, w] stretched over a region of ``size`` pixels (height, width). -> float32 [height, width], 0 or 1

    region: (top, left, bottom, right) as fractions of the picture, beyond 0 and 1 where a view shows padding, too;
    places outside of it are NaN.
    """
    top, left, bottom, right = region
    painted = np.full(size, np.nan, dtype=np.float32)
    rows, ys = _cells(size[0], mask.shape[0], top, bottom)
    columns, xs = _cells(size[1], mask.shape[1], left, right)
    painted[np.ix_(ys, xs)] = mask[np.ix_(rows, columns)]
    return painted


def _cells(pixels: int, cells: int, start: float, stop: float) -> tuple[np.ndarray, np.ndarray]:
    """Which cells, and which pixels along an axis show them, from start to stop (fractions of all pixels)."""
    centres = (np.arange(pixels) + 0.5) / pixels
    inside = np.flatnonzero((centres >= start) & (centres < stop))
    found = ((centres[inside] - start) / (stop - start) * cells).astype(int)
    return np.minimum(found, cells - 1), inside


def brightness(kept: Sequence[int], views: Sequence[View], size: tuple[int, int]) -> np.ndarray:
    """At every pixel the share of the views showing it that keep it. -> float32 [height, width]

    ValueError for frames of a video, which are not one picture.
    """
    if any(view.kind == "frame" for view in views):
        raise ValueError("an overlay shows one picture, not the frames of a video")
    shown, keeping = np.zeros(size, dtype=np.float32), np.zeros(size, dtype=np.float32)
    stays = set(kept)
    for view in views:
        mask = np.array([index in stays for index in view.index.tolist()]).reshape(view.grid)
        if mask.size == 0:  # a crop of nothing but padding
            continue
        painted = paint(mask, size, view.region)
        shown += ~np.isnan(painted)
        keeping += np.nan_to_num(painted)
    return keeping / np.maximum(shown, 1)


def visible(image: Image.Image, image_processor: Any) -> Image.Image:
    """The part of a picture that the model sees: CLIP-style processors cut the centre out, others see all of it."""
    if not getattr(image_processor, "do_center_crop", False):
        return image
    size, crop = image_processor.size, image_processor.crop_size
    if "shortest_edge" in size:
        scale_x = scale_y = size["shortest_edge"] / min(image.size)
    else:
        scale_x, scale_y = size["width"] / image.width, size["height"] / image.height
    width, height = min(image.width, crop["width"] / scale_x), min(image.height, crop["height"] / scale_y)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.crop((round(left), round(top), round(left + width), round(top + height)))
