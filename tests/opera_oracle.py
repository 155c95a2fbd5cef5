"""OPERA in plain loops: every sequence asked for by itself, products as they stand in the paper's equation."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Asked = tuple[list[float], list[float], float]


@dataclass
class Beam:
    """One beam: tokens, score, and what each of its steps leaned on."""

    tokens: tuple[int, ...]
    score: float
    places: list[int] = field(default_factory=list)


def commonest(values: Sequence[int]) -> int:
    """The most frequent value, the smallest of several."""
    counts = Counter(values)
    return min(value for value in counts if counts[value] == max(counts.values()))


def log_softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    total = math.log(sum(math.exp(value - top) for value in values)) + top
    return [value - total for value in values]


def opera(
    ask: Callable[[tuple[int, ...]], Asked],
    *,
    beams: int,
    candidates: int,
    length: int,
    alpha: float = 1.0,
    sigma: float = 50.0,
    threshold: float = 15,
    ends: Sequence[int] = (),
    forbidden: Sequence[int] = (),
    length_penalty: float = 1.0,
) -> tuple[list[tuple[float, tuple[int, ...]]], list[int]]:
    """The repaired method. -> finished sequences with their scores, best first; where the search went back to

    ask: generated tokens -> (logits of the next one, what the last of them gives to each of them, and to the picture),
    shares of the whole row, the largest of all heads.
    """

    def leaning(tokens: tuple[int, ...]) -> tuple[float, int]:
        """(phi, place) of a candidate, the last of the tokens."""
        rows = [ask(tokens[: i + 1])[1] for i in range(len(tokens))]
        scores = []
        for j in range(len(tokens)):
            product = 1e-7
            for i in range(j, len(tokens)):
                product *= sigma * rows[i][j]
            scores.append(product)
        place = scores.index(max(scores))
        return (-ask(tokens)[2] if len(tokens) <= 10 else min(max(scores), 1000.0)), place

    running = [Beam((), 0.0)] + [Beam((), -1e9) for _ in range(beams - 1)]
    finished: list[tuple[float, tuple[int, ...]]] = []
    history: list[dict[str, Any]] = []
    spent: Counter[int] = Counter()
    rejected: dict[int, set[tuple[int, int]]] = {}
    backs: list[int] = []
    while True:
        count = len(running[0].tokens)
        penalised: list[dict[int, float]] = []
        for beam in running:
            logits = ask(beam.tokens)[0]
            allowed = [token for token in range(len(logits)) if token not in forbidden]
            wide = candidates if count else max(candidates, beams)
            likely = sorted(allowed, key=lambda token: -logits[token])[:wide]
            found = {token: leaning((*beam.tokens, token)) for token in likely}
            penalised.append({token: logits[token] - alpha * phi for token, (phi, _) in found.items()})
            beam.places = [*beam.places, commonest([place for _, place in found.values()])]
        history = [*history[:count], {"running": copy.deepcopy(running), "finished": list(finished)}]
        alive = [beam for beam in running if beam.score > -5e8]
        place = commonest([beam.places[-1] for beam in alive])
        back = None
        if place >= 10 and all(beam.places.count(place) > threshold for beam in alive):
            back = next((one for one in (place + 1, place) if spent[one] < candidates), None)
        if back is not None:
            spent[back] += 1
            backs.append(back)
            moment = history[back]
            running, finished = copy.deepcopy(moment["running"]), list(moment["finished"])
            rejected = {one: pairs for one, pairs in rejected.items() if one <= back}
            rejected.setdefault(back, set()).update(moment["chosen"])
            history, count = history[: back + 1], back
            options = []
            for number, beam in enumerate(running):
                logits = ask(beam.tokens)[0]
                kept = [t for t in range(len(logits)) if (number, t) not in rejected[back]]
                shares = log_softmax([logits[token] for token in kept])
                options += [(beam.score + share, number, t) for share, t in zip(shares, kept) if t not in forbidden]
        else:
            options = []
            for number, (beam, values) in enumerate(zip(running, penalised)):
                shares = log_softmax(list(values.values()))
                options += [(beam.score + share, number, token) for share, token in zip(shares, values)]
        wide = max(2, 1 + len(ends)) * beams
        options = sorted(options, key=lambda option: -option[0])[:wide]
        full = count + 1 == length
        over = [full or token in ends for _, _, token in options]
        for (score, number, token), is_over in list(zip(options, over))[:beams]:
            if is_over:
                finished.append((score / (count + 1) ** length_penalty, (*running[number].tokens, token)))
        finished = sorted(finished, key=lambda one: -one[0])[:beams]
        going = sorted(
            [(score - 1e9 * is_over, number, token) for (score, number, token), is_over in zip(options, over)],
            key=lambda option: -option[0],
        )[:beams]
        history[-1]["chosen"] = [(number, token) for _, number, token in going]
        best = going[0][0] / (count + 1) ** length_penalty
        if all(over) or (len(finished) == beams and best <= finished[-1][0]):
            return finished, backs
        running = [
            Beam((*running[number].tokens, token), score, list(running[number].places))
            for score, number, token in going
        ]
