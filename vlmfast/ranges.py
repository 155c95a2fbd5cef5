"""Decoder layers named in a setting."""

from __future__ import annotations

from collections.abc import Collection

DEEP = 10_000  # layers, more than any decoder has: to see how a setting is written before the decoder is known


def which(text: str | int, depth: int, name: str = "layers") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers from a setting. -> (all of them, those named one by one), ascending

    "all"; numbers from 0 on, negative ones from the end; ranges as Python slices them ("2:", "2:-1"); several joined
    by slashes ("1/-14:"). Ranges are cut at the decoder's depth, as Python does. Raises ValueError for anything else
    and for numbers that the decoder does not have.
    """
    if text == "all":
        return tuple(range(depth)), ()
    chosen: set[int] = set()
    named: set[int] = set()
    for piece in str(text).split("/"):
        bounds = piece.split(":")
        try:
            numbers = [int(bound) if bound.strip() else None for bound in bounds]
        except ValueError as error:
            raise ValueError(
                f"{name}={text!r}: 'all', numbers and ranges joined by slashes, such as 2: or 1/-14:"
            ) from error
        if len(numbers) == 1 and numbers[0] is not None:
            if not -depth <= numbers[0] < depth:
                raise ValueError(f"{name}={text!r}: this decoder has layers 0 to {depth - 1}")
            named.add(numbers[0] % depth)
        elif len(numbers) == 2:
            chosen.update(range(depth)[slice(*numbers)])
        else:
            raise ValueError(f"{name}={text!r}: {piece!r} is neither a number nor a range such as 2:30")
    return tuple(sorted(chosen | named)), tuple(sorted(named))


def attending(
    text: str | int, attends: Collection[int], depth: int, method: str, what: str = "change"
) -> tuple[int, ...]:
    """Layers from a setting `layers`, of those that attend, ascending: ranges leave the others out.

    Raises ValueError for layers named one by one that do not attend, and where none is left.
    """
    chosen, named = which(text, depth)
    without = [layer for layer in named if layer not in attends]
    if without:
        raise ValueError(f"{method}: layers {'/'.join(map(str, without))} have no attention to {what}")
    found = tuple(layer for layer in chosen if layer in attends)
    if not found:
        raise ValueError(f"{method}: layers={text!r} are none of this decoder's {depth}")
    return found


def scaled(number: int, depth: int, of: int = 32) -> int:
    """A layer of a decoder of `of` layers, as the papers number those of a 7B model, in one of `depth`."""
    return int(number * depth / of + 0.5)
