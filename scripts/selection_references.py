"""Straightforward readings of the papers' selections, for scripts/bench_selection.py to compare with.

Each function takes a picture (`VisualTokens`) and a configured method, and gives the kept indices, ascending, the slow
and obvious way: lists, full matrices, everything computed anew in every step. How a budget is shared out over views is
no paper's matter: both sides use `apportion`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from vlmfast.visual import View, VisualTokens, apportion, budget


def views(visual: VisualTokens, method: Any) -> Iterator[tuple[View, list[int], int]]:
    """Each view with the indices of its tokens and its share of the budget."""
    shares = apportion(budget(method.keep, len(visual)), [len(view) for view in visual.views])
    for view, k in zip(visual.views, shares):
        if k:
            yield view, view.index.tolist(), k


def largest(score: list[float], k: int) -> list[int]:
    """Positions of the k largest."""
    return sorted(range(len(score)), key=lambda i: (-score[i], i))[:k]


def by_score(visual: VisualTokens, method: Any, score: Tensor) -> list[int]:
    """The largest scores of every view."""
    values = score.tolist()
    kept = []
    for _, index, k in views(visual, method):
        kept += [index[i] for i in largest([values[i] for i in index], k)]
    return sorted(kept)


def fastervlm(visual: VisualTokens, method: Any) -> list[int]:
    """Largest CLS attention."""
    return by_score(visual, method, visual.scores["attention"])


def vtc_cls(visual: VisualTokens, method: Any) -> list[int]:
    """Largest sum of CLS attention over layers."""
    return by_score(visual, method, sum(visual.scores.values(), torch.zeros(len(visual))))


def fopru(visual: VisualTokens, method: Any) -> list[int]:
    """Largest value of the statistic with the larger variance."""
    kept = []
    for _, index, k in views(visual, method):
        column, row = (visual.scores[name][index] for name in ("column", "row"))
        score = column if column.var() > row.var() else row
        kept += [index[i] for i in largest(score.tolist(), k)]
    return sorted(kept)


def hiprune(visual: VisualTokens, method: Any) -> list[int]:
    """Anchors, their neighbours on the grid, and registers."""
    kept = []
    for view, index, k in views(visual, method):
        rows, columns = view.grid
        objects, deep = (visual.scores[name][index].tolist() for name in ("objects", "deep"))
        anchors = largest(objects, round(k * method.alpha / 5))
        around = {
            (i // columns + dy) * columns + i % columns + dx
            for i in anchors
            for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))
            if 0 <= i // columns + dy < rows and 0 <= i % columns + dx < columns
        }
        outer = sorted(around - set(anchors), key=lambda i: (-objects[i], i))
        chosen = set((anchors + outer)[:k])
        rest = [i for i in largest(deep, len(deep)) if i not in chosen]
        kept += [index[i] for i in [*chosen, *rest[: k - len(chosen)]]]
    return sorted(kept)


def grid(visual: VisualTokens, method: Any) -> list[int]:
    """The tokens nearest to the centres of equal cells."""
    kept = []
    for view, index, k in views(visual, method):
        rows, columns = view.grid
        down = min(rows, max(1, round(math.sqrt(k * rows / columns))))
        across = min(columns, math.ceil(k / down))
        down = min(rows, math.ceil(k / across))
        points = [
            int((y + 0.5) * rows / down) * columns + int((x + 0.5) * columns / across)
            for y in range(down)
            for x in range(across)
        ]
        kept += [index[points[int((i + 0.5) * len(points) / k)]] for i in range(k)]
    return sorted(kept)


def _thumbnail_apart(visual: VisualTokens, method: Any, choose: Callable[[list[int], int], list[int]]) -> list[int]:
    """Crops together, the thumbnail by itself. choose: (indices, k) -> k of them"""
    parts: dict[bool, list[int]] = {}
    for view in visual.views:
        parts.setdefault(view.kind == "thumbnail", []).extend(view.index.tolist())
    groups = [parts[key] for key in (True, False) if key in parts]
    shares = apportion(budget(method.keep, len(visual)), list(map(len, groups)))
    return sorted(i for group, k in zip(groups, shares) for i in choose(group, k))


def textmonkey(visual: VisualTokens, method: Any) -> list[int]:
    """Largest cosine to a later token, over the whole matrix."""

    def choose(index: list[int], k: int) -> list[int]:
        x = visual.features[index]
        x = x / x.norm(dim=-1, keepdim=True)
        cosine = (x @ x.T).masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).tril(), -1)
        most = cosine.amax(1).tolist()
        return [index[i] for i in largest(most, len(most))[len(most) - k :]]

    return _thumbnail_apart(visual, method, choose)


def slime(visual: VisualTokens, method: Any) -> list[int]:
    """Largest mean cosine to the words."""
    assert visual.text is not None
    words = visual.text
    score = torch.stack([cosine_similarity(token[None], words).mean() for token in visual.features]).tolist()

    def choose(index: list[int], k: int) -> list[int]:
        return [index[i] for i in largest([score[i] for i in index], k)]

    return _thumbnail_apart(visual, method, choose)


def globalcom2(visual: VisualTokens, method: Any) -> list[int]:
    """Crops that keep what the thumbnail finds them worth; none is full here. One view: the largest logits."""
    logits = visual.scores["logits"]
    if len(visual.views) == 1:
        return by_score(visual, method, logits)
    thumbnail, crops = visual.views[0], list(visual.views[1:])
    h, w = thumbnail.grid
    rows, columns = 1 + max(crop.cell[0] for crop in crops), 1 + max(crop.cell[1] for crop in crops)
    overview = logits[thumbnail.index].view(h, w)
    sums = torch.stack(
        [
            overview.view(rows, h // rows, columns, w // columns)[crop.cell[0], :, crop.cell[1]].double().sum()
            for crop in crops
        ]
    )
    sigma = torch.softmax(sums / method.tau, 0)
    weight = (1 + sigma - sigma.mean()).tolist()
    first, others = apportion(budget(method.keep, len(visual)), [len(thumbnail), sum(map(len, crops))])
    kept = [thumbnail.index.tolist()[i] for i in largest(overview.flatten().tolist(), first)]
    exact = [others * v * len(c) / sum(a * len(b) for a, b in zip(weight, crops)) for v, c in zip(weight, crops)]
    counts = [int(share) for share in exact]
    for i in sorted(range(len(crops)), key=lambda i: (counts[i] - exact[i], i))[: others - sum(counts)]:
        counts[i] += 1
    ch, cw = crops[0].grid
    large = interpolate(overview[None, None], (rows * ch, columns * cw), mode="bilinear", align_corners=False)[0, 0]
    for crop, k in zip(crops, counts):
        y, x = crop.cell[0] * ch, crop.cell[1] * cw
        own, piece = logits[crop.index], large[y : y + ch, x : x + cw].flatten()
        score = own / own.norm() + piece / piece.norm()
        kept += [crop.index.tolist()[i] for i in largest(score.tolist(), k)]
    return sorted(kept)


def visionzip(visual: VisualTokens, method: Any) -> list[int]:
    """Dominant tokens and targets; the merging is done token by token, too, and left unused."""
    kept = []
    k = budget(method.keep, len(visual))
    shares = [share for _, _, share in views(visual, method)]
    contextual = iter(apportion(round(method.contextual * k), shares))
    for _, index, share in views(visual, method):
        c = next(contextual)
        score, keys = visual.scores["attention"][index].tolist(), visual.scores["keys"][index]
        dominant = largest(score, share - c)
        rest = [i for i in range(len(index)) if i not in dominant]
        targets = rest[:: max(1, len(rest) // c)][:c]
        groups: dict[int, list[Tensor]] = {i: [visual.scores["hidden"][index[i]]] for i in targets}
        for i in rest:
            if i not in targets:
                nearest = int(cosine_similarity(keys[i][None], keys[targets]).argmax())
                groups[targets[nearest]].append(visual.scores["hidden"][index[i]])
        merged = torch.stack([torch.stack(group).mean(0) for group in groups.values()])
        assert visual.project is not None
        visual.project(merged)
        kept += [index[i] for i in dominant + targets]
    return sorted(kept)


def divprune(visual: VisualTokens, method: Any) -> list[int]:
    """Max-min diversity from the whole matrix of distances, all chosen rows reduced anew in every step."""
    x = visual.features / visual.features.norm(dim=-1, keepdim=True)
    distance = 1 - x @ x.T
    chosen = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    for _ in range(budget(method.keep, len(visual)) - 1):
        least = distance[chosen].amin(0)
        least[chosen] = -torch.inf
        chosen.append(int(least.argmax()))
    return sorted(chosen)


def cdpruner(visual: VisualTokens, method: Any) -> list[int]:
    """Greedy by the determinants of the kernel, each step solved anew."""
    assert visual.text is not None
    score = torch.stack([cosine_similarity(token[None], visual.text).mean() for token in visual.features])
    score = (score - score.min() + 1e-6) / (score.max() - score.min())
    kept = []
    for _, index, k in views(visual, method):
        x = visual.features[index].double()
        x = x / x.norm(dim=-1, keepdim=True)
        kernel = score[index, None].double() * (x @ x.T) * score[index].double()
        chosen: list[int] = []
        for _ in range(k):
            rows = kernel[chosen]
            gain = kernel.diagonal() - (rows * torch.linalg.solve(kernel[chosen][:, chosen], rows)).sum(0)
            gain[chosen] = -torch.inf
            chosen.append(int(gain.argmax()))
        kept += [index[i] for i in chosen]
    return sorted(kept)


def vispruner(visual: VisualTokens, method: Any) -> list[int]:
    """Important tokens, and the rest thinned out round by round on lists.

    The cosines come from one product: computed anew in every round they differ in the last digit, and the order of
    close ones with it.
    """
    kept = []
    for _, index, k in views(visual, method):
        order = largest(visual.scores["attention"][index].tolist(), len(index))
        first = int(k * method.important)
        x = visual.scores["hidden"][index][order[first:]]
        x = x / x.norm(dim=-1, keepdim=True)
        cosine = (x @ x.T).tolist()
        left = list(range(len(x)))
        while len(left) > k - first:
            candidates, partners = left[::2], left[1::2]
            nearest = [max(cosine[i][j] for j in partners) for i in candidates]
            ranked = [candidates[i] for i in largest(nearest, len(nearest))]
            left = ranked[min(8, len(left) - k + first, len(ranked)) :] + partners
        kept += [index[order[i]] for i in range(first)] + [index[order[first + i]] for i in left]
    return sorted(kept)


def evs(visual: VisualTokens, method: Any) -> list[int]:
    """The first frame, and what changed most since the frame before."""
    frames = [view.index.tolist() for view in visual.views]
    change = {
        i: 1 - float(cosine_similarity(visual.features[i].double(), visual.features[j].double(), dim=0))
        for before, now in zip(frames, frames[1:])
        for j, i in zip(before, now)
    }
    k = max(0, budget(method.keep, len(visual)) - len(frames[0]))
    return sorted(frames[0] + sorted(change, key=lambda i: (-change[i], i))[:k])


def vidcom2(visual: VisualTokens, method: Any) -> list[int]:
    """Counts a frame by how it stands out, scaled until they add up; in each the least similar tokens."""
    frames = [view.index.tolist() for view in visual.views]
    n, k = len(frames[0]), budget(method.keep, len(visual))
    calm = visual.features.var(dim=0).sort(stable=True).indices[: visual.features.shape[1] // 2]
    x = visual.features[:, calm]
    x = x / x.norm(dim=-1, keepdim=True)

    def gauss(token: Tensor, centre: Tensor) -> float:
        distance = float((token - centre).double().square().sum())
        return sum(math.exp(-distance / (2 * scale)) for scale in (0.125, 0.25, 0.5, 1, 2))

    everything = x.mean(0)
    video = [[gauss(x[i], everything) for i in frame] for frame in frames]
    own = [[gauss(x[i], x[frame].mean(0)) for i in frame] for frame in frames]
    out = torch.softmax(torch.tensor([-sum(row) / n / 0.01 for row in video]), 0)
    share = (k / len(visual) * (1 + out - out.mean())).clamp(max=1).double().tolist()
    least = 1 if k >= len(frames) else 0
    low, high = 0.0, 2.0 * n / min(share)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(min(n, max(least, middle * r)) for r in share) < k:
            low = middle
        else:
            high = middle
    exact = [min(n, max(least, high * r)) for r in share]
    counts = [int(value + 1e-6) for value in exact]
    for t in sorted(range(len(frames)), key=lambda t: (counts[t] - exact[t], t))[: k - sum(counts)]:
        counts[t] += 1
    kept = []
    for frame, count, a, b in zip(frames, counts, video, own):
        score = [p + q for p, q in zip(a, b)]
        kept += [frame[i] for i in sorted(range(n), key=lambda i: (score[i], i))[:count]]
    return sorted(kept)


REFERENCES: dict[str, Callable[[VisualTokens, Any], list[int]]] = {
    "cdpruner": cdpruner,
    "divprune": divprune,
    "evs": evs,
    "fastervlm": fastervlm,
    "fopru": fopru,
    "globalcom2": globalcom2,
    "grid": grid,
    "hiprune": hiprune,
    "slime": slime,
    "textmonkey": textmonkey,
    "vidcom2": vidcom2,
    "visionzip": visionzip,
    "vispruner": vispruner,
    "vtc_cls": vtc_cls,
}
