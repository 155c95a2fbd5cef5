"""The authors' order of an any-resolution image's tokens, which the golden sets hold.

Production follows transformers' own order and rounding (`vlmfast/families/anyres.py`); this is what the authors' codes
do, for the comparison with them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def canvas_order(
    crops: tuple[int, int], side: int, image_size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Order in which the tokens of an any-resolution image enter the prompt: thumbnail, then the stitched crops.

    crops: (columns, rows) of the crop grid; side: tokens per row of a view; image_size: (width, height) in pixels of
    the original image: its padding is then removed from the canvas and one newline ends every row.
    Returns (view, token), int64 [M]: view 0 is the thumbnail, views 1.. the crops row by row, token the raster index
    inside that view; both are -1 for a newline.
    """
    columns, rows = crops
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    view = 1 + (y // side) * columns + x // side
    token = (y % side) * side + x % side
    if image_size is not None:
        top_pad, left_pad = _padding(image_size, (columns * side, rows * side))
        inner = slice(top_pad, rows * side - top_pad), slice(left_pad, columns * side - left_pad)
        view, token = view[inner], token[inner]
        newline = torch.full_like(token[:, :1], -1)
        view, token = torch.cat([view, newline], dim=1), torch.cat([token, newline], dim=1)
    thumbnail = torch.arange(side * side)
    return torch.cat([torch.zeros_like(thumbnail), view.flatten()]), torch.cat([thumbnail, token.flatten()])


def _padding(image_size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Rows above and columns left of the image on the canvas (both sizes: width, height)."""
    (width, height), (canvas_width, canvas_height) = image_size, canvas
    if width / height > canvas_width / canvas_height:
        inner = int(height * (canvas_width / width))
        return (canvas_height - inner) // 2, 0
    inner = int(width * (canvas_height / height))
    return 0, (canvas_width - inner) // 2
