"""The Triton programs, and nothing else; `vlmfast.kernels.launch` says what they compute and calls them.

Conventions: heads of a batch are counted through, b * H + h; a program has a block of BM queries or of BN keys of one
of them, and with more than one program along axis 1 each has a chunk of the keys. Scores are in base 2 (scaled by
log2 e), -inf where hidden. Offsets that may pass 2^31 are made in int64. What is absent (a mask, places, a window) is
None, and its code is not compiled. Heads have WIDTH numbers, padded to WIDE, which is a power of two.

kinds [B or 1, H or 1, K] uint8: what each key is: 0, of no class; 1 to C, of this class; HIDDEN, padding.
places [Q]: the key that each query stands at. mask [B or 1, H or 1, Q or 1, K]: BOOL as uint8, or ADDITIVE.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
BOOL = tl.constexpr(1)
ADDITIVE = tl.constexpr(2)
HIDDEN = tl.constexpr(255)
# Weights of a row in fp16 are made to sum to this: far from its largest number (65504), and what is lost below its
# smallest (2^-24) is less than 2^-38 of the row.
HALF_SUM = tl.constexpr(16384.0)
# What a share found by subtraction may be wrong by, with room: no row total is taken to be smaller.
LEAST = tl.constexpr(1e-6)
CHANGING = ("n_query", "n_key", "heads", "chunk", "window")  # new values must not mean a new compilation


@triton.jit
def whose(n, BLOCK: tl.constexpr, heads):
    """What a program has: block, head counted through, b, h. Last blocks, which see most, come first."""
    count = tl.cdiv(n, BLOCK)
    pid = tl.program_id(0)
    head = (pid // count).to(tl.int64)
    return count - 1 - pid % count, head, head // heads, head % heads


@triton.jit
def lines(start, first, stride, limit, BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Lines `first` to `first` + BLOCK of a matrix, zero outside it. [BLOCK, WIDE]"""
    line = tl.arange(0, BLOCK)
    wide = tl.arange(0, WIDE)
    inside = (first + line < limit)[:, None]
    if WIDE != WIDTH:
        inside = inside & (wide < WIDTH)[None, :]
    # Large offsets as one number, so that those of a block fit into 32 bits, and into registers.
    start += tl.cast(first, tl.int64) * stride
    return tl.load(start + (line[:, None] * stride + wide[None, :]), mask=inside, other=0.0)


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """a b in fp32, of fp32 throughout (no TF32). UPCAST: for the interpreter, which cannot multiply bf16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def placed(places, rows, n_query):
    """The key that each query stands at, -1 for those outside; the rows themselves where nothing is said."""
    place = rows
    if places is not None:
        place = tl.load(places + rows, mask=rows < n_query, other=-1).to(tl.int32)
    return place


@triton.jit
def oldest(place, rows, n_query, n_key, window):
    """The first key that any of these queries sees through its window; may be negative."""
    return tl.min(tl.where(rows < n_query, place, n_key), 0) - window + 1


@triton.jit
def bounds(places, place, rows, n_query, n_key, chunk, window, BN: tl.constexpr):
    """Keys that a block of queries may see, of those of this program's chunk: from, to."""
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, n_key)
    if places is not None:
        end = tl.minimum(end, tl.max(place, 0) + 1)
        if window is not None:
            begin = tl.maximum(begin, oldest(place, rows, n_query, n_key, window) // BN * BN)
    return begin, end


@triton.jit
def kind_of(kinds, cols, n_key):
    """What some keys are."""
    kind = cols
    if kinds is not None:
        kind = tl.load(kinds + cols, mask=cols < n_key, other=0)
    return kind


@triton.jit
def masked(
    found, kind, row, col, place, n_query, n_key, kinds, places, window, mask, mask_q, scale, lowest,
    MASK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Scores from products of queries from `row` on and keys from `col` on: scaled, an additive mask added, -inf where
    a key is hidden."""
    scores = found * scale
    down = tl.arange(0, BM)
    right = tl.arange(0, BN)
    cols = col + right
    seen = (cols < n_key)[None, :]
    if MASK:
        seen = seen & (row + down < n_query)[:, None]
        mask += tl.cast(row, tl.int64) * mask_q + col
        entry = tl.load(mask + (down[:, None] * mask_q + right[None, :]), mask=seen, other=0)
        if MASK == BOOL:
            seen = seen & (entry != 0)
        else:
            added = entry.to(tl.float32)
            seen = seen & (added > lowest)
            scores += added * LOG2E
    if kinds is not None:
        seen = seen & (kind != HIDDEN)[None, :]
    if places is not None:
        seen = seen & (cols[None, :] <= place[:, None])
        if window is not None:
            seen = seen & (cols[None, :] > place[:, None] - window)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def level_of(lse, head, rows, n_query):
    """A row's log-sum-exp in base 2; +inf, which makes all probabilities 0, where it sees nothing or is outside."""
    level = tl.load(lse + head * n_query + rows, mask=rows < n_query, other=float("inf"))
    return tl.where(level == float("-inf"), float("inf"), level) * LOG2E


@triton.jit
def store_lse(lse, top, total, head, rows, n_query, count):
    """Log-sum-exp of rows whose largest score is `top`, and whose exponentials without it sum to `total`."""
    found = tl.where(total == 0, float("-inf"), (top + tl.log2(total)) / LOG2E)
    tl.store(lse + (tl.program_id(1) * count + head) * n_query + rows, found, mask=rows < n_query)


@triton.jit
def store_out(out, made, rows, b, h, n_query, heads, count, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Rows of the output. out: [S, B, Q, H, d]"""
    wide = tl.arange(0, WIDE)
    batch = tl.program_id(1) * (count // heads) + b
    at = ((batch * n_query + rows) * heads + h) * WIDTH
    inside = (rows < n_query)[:, None] & (wide < WIDTH)[None, :]
    tl.store(out + at[:, None] + wide[None, :], made.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=CHANGING)
def row_sums(
    query, key, lse, masses, kinds, places, mask,
    q_b, q_h, q_n, k_b, k_h, k_n, kinds_b, kinds_h, mask_b, mask_h, mask_q,
    n_query, n_key, heads, group, chunk, window, scale, lowest,
    CLASSES: tl.constexpr, PAD: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Log-sum-exp of rows, and how much of each row every class holds. lse: [S, B H, Q], masses: [S, B H, Q, C]"""
    block, head, b, h = whose(n_query, BM, heads)
    count = tl.num_programs(0) // tl.cdiv(n_query, BM)
    rows = block * BM + tl.arange(0, BM)
    place = placed(places, rows, n_query)
    begin, end = bounds(places, place, rows, n_query, n_key, chunk, window, BN)
    q = lines(query + b * q_b + h * q_h, block * BM, q_n, n_query, BM, WIDTH, WIDE)
    key += b * k_b + h // group * k_h
    if kinds is not None:
        kinds += b * kinds_b + h * kinds_h
    if MASK:
        mask += b * mask_b + h * mask_h
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    part = tl.zeros((BM, PAD), tl.float32)
    which = tl.arange(0, PAD)
    for first in range(begin, end, BN):
        cols = first + tl.arange(0, BN)
        kind = kind_of(kinds, cols, n_key)
        found = product(q, tl.trans(lines(key, first, k_n, n_key, BN, WIDTH, WIDE)), UPCAST)
        s = masked(
            found, kind, block * BM, first, place, n_query, n_key, kinds, places, window, mask, mask_q, scale, lowest,
            MASK, BM, BN
        )  # fmt: skip
        new = tl.maximum(top, tl.max(s, 1))
        level = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(p, 1)
        if CLASSES:
            part = part * shrink[:, None]
            for c in tl.static_range(CLASSES):
                mass = tl.sum(tl.where((kind == c + 1)[None, :], p, 0.0), 1)
                part += tl.where((which == c)[None, :], mass[:, None], 0.0)
        top = new
    store_lse(lse, top, total, head, rows, n_query, count)
    if CLASSES:
        at = ((tl.program_id(1) * count + head) * n_query + rows) * CLASSES
        inside = (rows < n_query)[:, None] & (which < CLASSES)[None, :]
        share = part / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(masses + at[:, None] + which[None, :], share, mask=inside)


@triton.jit
def received(
    query, k, lse, counted, places, mask, row, col, place, kind, head, q_n, mask_q, n_query, n_key, kinds, window,
    scale, lowest, MASK: tl.constexpr, UPCAST: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Probabilities of a block of queries, zero for those that do not count. k: [WIDE, BN] -> [BM, BN]"""
    rows = row + tl.arange(0, BM)
    found = product(lines(query, row, q_n, n_query, BM, WIDTH, WIDE), k, UPCAST)
    s = masked(
        found, kind, row, col, place, n_query, n_key, kinds, places, window, mask, mask_q, scale, lowest, MASK, BM, BN
    )
    level = level_of(lse, head, rows, n_query)
    if counted is not None:
        level = tl.where(tl.load(counted + rows, mask=rows < n_query, other=0) != 0, level, float("inf"))
    return tl.exp2(s - level[:, None])


@triton.jit(do_not_specialize=CHANGING)
def column_sums(
    query, key, lse, sums, counted, kinds, places, mask,
    q_b, q_h, q_n, k_b, k_h, k_n, kinds_b, kinds_h, mask_b, mask_h, mask_q,
    n_query, n_key, heads, group, window, scale, lowest,
    MASK: tl.constexpr, UPCAST: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Probabilities summed over the rows that count. lse: [B H, Q], counted: [B, Q], sums: [B H, K]"""
    block, head, b, h = whose(n_key, BN, heads)
    cols = block * BN + tl.arange(0, BN)
    k = tl.trans(lines(key + b * k_b + h // group * k_h, block * BN, k_n, n_key, BN, WIDTH, WIDE))
    query += b * q_b + h * q_h
    if kinds is not None:
        kinds += b * kinds_b + h * kinds_h
    if MASK:
        mask += b * mask_b + h * mask_h
    if counted is not None:
        counted += b * n_query
    kind = kind_of(kinds, cols, n_key)
    total = tl.zeros((BM, BN), tl.float32)  # summed up once, behind the loop
    for row in range(0, n_query, BM):
        rows = row + tl.arange(0, BM)
        place = placed(places, rows, n_query)
        if places is None:
            total += received(
                query, k, lse, counted, places, mask, row, block * BN, place, kind, head, q_n, mask_q, n_query, n_key,
                kinds, window, scale, lowest, MASK, UPCAST, WIDTH, WIDE, BM, BN
            )  # fmt: skip
        else:
            live = tl.max(place, 0) >= block * BN
            if window is not None:
                live = live & (oldest(place, rows, n_query, n_key, window) < block * BN + BN)
            if live:
                total += received(
                    query, k, lse, counted, places, mask, row, block * BN, place, kind, head, q_n, mask_q, n_query,
                    n_key, kinds, window, scale, lowest, MASK, UPCAST, WIDTH, WIDE, BM, BN
                )  # fmt: skip
    tl.store(sums + head * n_key + cols, tl.sum(total, 0), mask=cols < n_key)


@triton.jit(do_not_specialize=CHANGING)
def attend(
    query, key, value, out, lse, kinds, places, mask,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, kinds_b, kinds_h, mask_b, mask_h, mask_q,
    n_query, n_key, heads, group, chunk, window, scale, lowest,
    MASK: tl.constexpr, UPCAST: tl.constexpr, UPCAST_V: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, WIDTH_V: tl.constexpr, WIDE_V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Attention and the rows' log-sum-exp, over each chunk of keys. out: [S, B, Q, H, d], lse: [S, B H, Q]"""
    block, head, b, h = whose(n_query, BM, heads)
    count = tl.num_programs(0) // tl.cdiv(n_query, BM)
    rows = block * BM + tl.arange(0, BM)
    place = placed(places, rows, n_query)
    begin, end = bounds(places, place, rows, n_query, n_key, chunk, window, BN)
    q = lines(query + b * q_b + h * q_h, block * BM, q_n, n_query, BM, WIDTH, WIDE)
    key += b * k_b + h // group * k_h
    value += b * v_b + h // group * v_h
    if kinds is not None:
        kinds += b * kinds_b + h * kinds_h
    if MASK:
        mask += b * mask_b + h * mask_h
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    made = tl.zeros((BM, WIDE_V), tl.float32)
    for first in range(begin, end, BN):
        cols = first + tl.arange(0, BN)
        kind = kind_of(kinds, cols, n_key)
        found = product(q, tl.trans(lines(key, first, k_n, n_key, BN, WIDTH, WIDE)), UPCAST)
        s = masked(
            found, kind, block * BM, first, place, n_query, n_key, kinds, places, window, mask, mask_q, scale, lowest,
            MASK, BM, BN
        )  # fmt: skip
        new = tl.maximum(top, tl.max(s, 1))
        level = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(p, 1)
        v = lines(value, first, v_n, n_key, BN, WIDTH_V, WIDE_V)
        made = made * shrink[:, None] + product(p.to(v.dtype), v, UPCAST_V)
        top = new
    store_lse(lse, top, total, head, rows, n_query, count)
    made = made / tl.where(total == 0, 1.0, total)[:, None]
    store_out(out, made, rows, b, h, n_query, heads, count, WIDTH_V, WIDE_V)


@triton.jit(do_not_specialize=CHANGING)
def weigh(
    query, key, value, out, lse, masses, factors, kinds, places, mask,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, kinds_b, kinds_h, mask_b, mask_h, mask_q,
    n_query, n_key, heads, group, chunk, window, scale, lowest,
    CLASSES: tl.constexpr, HALF: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr, UPCAST_V: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, WIDTH_V: tl.constexpr, WIDE_V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Probabilities, each times the factor of its row and class, times values, over each chunk of keys.
    lse: [B H, Q], masses, factors: [B H, Q, C], out: [S, B, Q, H, d]"""
    block, head, b, h = whose(n_query, BM, heads)
    count = tl.num_programs(0) // tl.cdiv(n_query, BM)
    rows = block * BM + tl.arange(0, BM)
    inside = rows < n_query
    place = placed(places, rows, n_query)
    begin, end = bounds(places, place, rows, n_query, n_key, chunk, window, BN)
    q = lines(query + b * q_b + h * q_h, block * BM, q_n, n_query, BM, WIDTH, WIDE)
    key += b * k_b + h // group * k_h
    value += b * v_b + h // group * v_h
    kinds += b * kinds_b + h * kinds_h
    if MASK:
        mask += b * mask_b + h * mask_h
    level = level_of(lse, head, rows, n_query)
    line = (head * n_query + rows) * CLASSES
    unit = tl.full((BM,), 1.0, tl.float32)
    if HALF:  # values of fp16: see HALF_SUM
        sum_of = tl.zeros((BM,), tl.float32)
        rest = tl.full((BM,), 1.0, tl.float32)
        for c in tl.static_range(CLASSES):
            mass = tl.load(masses + line + c, mask=inside, other=0.0)
            sum_of += mass * tl.abs(tl.load(factors + line + c, mask=inside, other=0.0))
            rest -= mass
        unit = HALF_SUM / tl.maximum(sum_of + tl.maximum(rest, 0.0), LEAST)
    made = tl.zeros((BM, WIDE_V), tl.float32)
    for first in range(begin, end, BN):
        cols = first + tl.arange(0, BN)
        kind = kind_of(kinds, cols, n_key)
        found = product(q, tl.trans(lines(key, first, k_n, n_key, BN, WIDTH, WIDE)), UPCAST)
        s = masked(
            found, kind, block * BM, first, place, n_query, n_key, kinds, places, window, mask, mask_q, scale, lowest,
            MASK, BM, BN
        )  # fmt: skip
        weight = tl.zeros((BM, BN), tl.float32) + unit[:, None]
        for c in tl.static_range(CLASSES):
            factor = tl.load(factors + line + c, mask=inside, other=0.0) * unit
            weight = tl.where((kind == c + 1)[None, :], factor[:, None], weight)
        p = tl.exp2(s - level[:, None]) * weight
        v = lines(value, first, v_n, n_key, BN, WIDTH_V, WIDE_V)
        made += product(p.to(v.dtype), v, UPCAST_V)
    store_out(out, made / unit[:, None], rows, b, h, n_query, heads, count, WIDTH_V, WIDE_V)
