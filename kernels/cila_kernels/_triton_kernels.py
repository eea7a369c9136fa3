"""Device code: row statistics, and the gradient either summed into query or key, or written out block by block.

Tiles of similarities live in registers only. Logits are to base 2, scaled after the product in float32: x of the
student at its first temperature, ``ratio`` x at its second, t of the teacher. ``scale`` holds log2(e) / temperature,
temperature / student_temperature and log2(e) / teacher_temperature.

Queries are rows, keys are columns: BLOCK_N x BLOCK_M. A width larger than its BLOCK_D is taken in pieces of BLOCK_D;
otherwise the tile that stays is loaded once. UPCAST serves the interpreter, which multiplies bfloat16 as integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXCLUDED = tl.constexpr(-1e30)  # a finite logit whose exponential is 0: 0 x logit stays 0


@triton.jit
def _load(matrix, row, size, start, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """(rows, BLOCK_D) of a contiguous matrix (size, WIDTH), 0 outside."""
    column = start + tl.arange(0, BLOCK_D)
    pointer = matrix + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = row[:, None] < size
    if WIDTH % BLOCK_D != 0:
        inside = inside & (column[None, :] < WIDTH)
    tile = tl.load(pointer, mask=inside, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _similarities(
    resident, a, a_row, a_size, b, b_row, b_size,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(BLOCK_A, BLOCK_B) products of rows of ``a`` (``resident`` where they fit one block) and rows of ``b``."""
    if WIDTH <= BLOCK_D:
        other = _load(b, b_row, b_size, 0, WIDTH, BLOCK_D, UPCAST)
        product = tl.dot(resident, tl.trans(other), input_precision=PRECISION)
    else:
        product = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            own = _load(a, a_row, a_size, start, WIDTH, BLOCK_D, UPCAST)
            other = _load(b, b_row, b_size, start, WIDTH, BLOCK_D, UPCAST)
            product = tl.dot(own, tl.trans(other), product, input_precision=PRECISION)
    return product


@triton.jit
def _resident(a, row, size, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """The tile that stays while the other matrix passes; a dummy where it does not fit one block."""
    if WIDTH <= BLOCK_D:
        return _load(a, row, size, 0, WIDTH, BLOCK_D, UPCAST)
    else:  # noqa: RET505 - Triton wants one return per constant branch
        return row


@triton.heuristics({"EVEN": lambda given: given["M"] % given["BLOCK_M"] == 0})
@triton.jit
def statistics_kernel(
    query, key, teacher_query, teacher_key, query_id, key_id, scale, out,
    N, M, SPLIT,
    D: tl.constexpr, D_TEACHER: tl.constexpr,
    TEACHER: tl.constexpr, IDS: tl.constexpr, SHARED: tl.constexpr, SLOPES: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_TEACHER: tl.constexpr,
):  # fmt: skip
    """Online softmax statistics of a block of rows over ``SPLIT`` keys, into ``out`` (9, splits, N) float32.

    0: largest x; sums of 1: exp2(x - largest), 2: the same times x, 3: exp2(ratio (x - largest)), 4: the same times x;
    5: largest t; sums of 6: exp2(t - largest), 7: the same times x, 8: the same times t. SHARED: ratio is 1, so 3 and 4
    are 1 and 2 and not written; without SLOPES 2 and 4 are not written; without TEACHER 3 to 8 are not.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    scale_x, ratio, scale_t = tl.load(scale), tl.load(scale + 1), tl.load(scale + 2)
    q = _resident(query, row, N, D, BLOCK_D, UPCAST)
    top = tl.full((BLOCK_N,), EXCLUDED, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    total_x = tl.zeros((BLOCK_N,), tl.float32)
    distill = tl.zeros((BLOCK_N,), tl.float32)
    distill_x = tl.zeros((BLOCK_N,), tl.float32)
    top_t = tl.full((BLOCK_N,), EXCLUDED, tl.float32)
    total_t = tl.zeros((BLOCK_N,), tl.float32)
    cross = tl.zeros((BLOCK_N,), tl.float32)
    entropy = tl.zeros((BLOCK_N,), tl.float32)
    if TEACHER:
        tq = _resident(teacher_query, row, N, D_TEACHER, BLOCK_D_TEACHER, UPCAST)
    if IDS:
        own_id = tl.load(query_id + row, mask=row < N, other=-1)

    for start in range(split * SPLIT, tl.minimum(M, (split + 1) * SPLIT), BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        x = scale_x * _similarities(q, query, row, N, key, column, M, BLOCK_N, BLOCK_M, D, BLOCK_D, PRECISION, UPCAST)
        keep = _candidates(column, M, EVEN)
        if IDS:
            other_id = tl.load(key_id + column, mask=column < M, other=-2)
            keep = keep & (own_id[:, None] != other_id[None, :])
        if IDS or not EVEN:
            x = tl.where(keep, x, EXCLUDED)
        new_top = tl.maximum(top, tl.max(x, 1))
        fall = top - new_top
        top = new_top
        shrink = tl.exp2(fall)
        below = x - top[:, None]
        e = tl.exp2(below)
        total = total * shrink + tl.sum(e, 1)
        if SLOPES:
            total_x = total_x * shrink + _moment(e, below, top)
        if TEACHER:
            if not SHARED:
                shrink = tl.exp2(ratio * fall)
                e = tl.exp2(ratio * below)
                distill = distill * shrink + tl.sum(e, 1)
                if SLOPES:
                    distill_x = distill_x * shrink + _moment(e, below, top)
            t = scale_t * _similarities(
                tq, teacher_query, row, N, teacher_key, column, M,
                BLOCK_N, BLOCK_M, D_TEACHER, BLOCK_D_TEACHER, PRECISION, UPCAST,
            )  # fmt: skip
            if IDS or not EVEN:
                t = tl.where(keep, t, EXCLUDED)
            new_top = tl.maximum(top_t, tl.max(t, 1))
            shrink = tl.exp2(top_t - new_top)
            top_t = new_top
            p = tl.exp2(t - top_t[:, None])
            total_t = total_t * shrink + tl.sum(p, 1)
            cross = cross * shrink + _moment(p, below, top)
            entropy = entropy * shrink + tl.sum(p * t, 1)

    step = tl.num_programs(1).to(tl.int64) * N  # from one statistic to the next
    out += split.to(tl.int64) * N + row
    inside = row < N
    tl.store(out, top, mask=inside)
    tl.store(out + step, total, mask=inside)
    if SLOPES:
        tl.store(out + 2 * step, total_x, mask=inside)
    if TEACHER:
        if not SHARED:
            tl.store(out + 3 * step, distill, mask=inside)
            if SLOPES:
                tl.store(out + 4 * step, distill_x, mask=inside)
        tl.store(out + 5 * step, top_t, mask=inside)
        tl.store(out + 6 * step, total_t, mask=inside)
        tl.store(out + 7 * step, cross, mask=inside)
        tl.store(out + 8 * step, entropy, mask=inside)


@triton.jit
def _moment(weight, below, top):
    """Row sums of weight x, with x = below + top, which frees the registers of x."""
    return tl.sum(weight * below, 1) + top * tl.sum(weight, 1)


@triton.jit
def _candidates(column, M, EVEN: tl.constexpr):
    """(1, columns): which columns are keys; a constant where all are."""
    if EVEN:
        return (column >= 0)[None, :]
    else:  # noqa: RET505 - Triton wants one return per constant branch
        return (column < M)[None, :]


@triton.jit
def _of_rows(terms, index: tl.constexpr, row, N, ALONG: tl.constexpr):
    """Row term ``index`` of (7, N), as a column (ALONG 0) or a row (ALONG 1) of the tile; 0 outside."""
    return tl.expand_dims(tl.load(terms + index * N + row, mask=row < N, other=0.0), 1 - ALONG)


@triton.jit
def _gradient(
    x, t, keep, positive, ratio, terms, row, N,
    TEACHER: tl.constexpr, MASK: tl.constexpr, SHARED: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """G of a tile: d loss / d similarity, from ``terms`` (7, N) float32: log2 of the softmax sums of x, ratio x and t,
    the factors of the three softmaxes, and that of a positive. SHARED: the factor of ratio x is part of that of x.
    Positives are added before G is rounded: near the optimum they cancel almost all of it."""
    if MASK:
        x = tl.where(keep, x, EXCLUDED)
    g = _of_rows(terms, 3, row, N, ALONG) * tl.exp2(x - _of_rows(terms, 0, row, N, ALONG))
    if TEACHER:
        if not SHARED:
            g += _of_rows(terms, 4, row, N, ALONG) * tl.exp2(ratio * x - _of_rows(terms, 1, row, N, ALONG))
        if MASK:
            t = tl.where(keep, t, EXCLUDED)
        g += _of_rows(terms, 5, row, N, ALONG) * tl.exp2(t - _of_rows(terms, 2, row, N, ALONG))
    if MASK:
        positive = positive & keep
    return g + tl.where(positive, _of_rows(terms, 6, row, N, ALONG), 0.0)


@triton.heuristics({"EVEN": lambda given: given["B"] % given["BLOCK_B"] == 0})
@triton.jit
def gradient_kernel(
    a, b, teacher_a, teacher_b, a_id, b_id, a_group, b_group, scale, terms, out,
    A, B, SPLIT,
    D: tl.constexpr, D_TEACHER: tl.constexpr,
    TEACHER: tl.constexpr, IDS: tl.constexpr, SHARED: tl.constexpr, OF_KEYS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_TEACHER: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of ``a`` (A, D) from ``SPLIT`` rows of ``b`` (B, D), into ``out`` (splits, A, D) float32.

    ``a`` are the queries and ``b`` the keys, or with OF_KEYS the other way round; the whole width is one block. A pair
    of equal groups is a positive.
    """
    own = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    split = tl.program_id(1)
    scale_x, ratio, scale_t = tl.load(scale), tl.load(scale + 1), tl.load(scale + 2)
    resident = _load(a, own, A, 0, D, BLOCK_D, UPCAST)
    if TEACHER:
        teacher_resident = _resident(teacher_a, own, A, D_TEACHER, BLOCK_D_TEACHER, UPCAST)
    if IDS:
        own_id = tl.load(a_id + own, mask=own < A, other=-1)
    own_group = tl.load(a_group + own, mask=own < A, other=-1)
    gradient = tl.zeros((BLOCK_A, BLOCK_D), tl.float32)

    for start in range(split * SPLIT, tl.minimum(B, (split + 1) * SPLIT), BLOCK_B):
        other = start + tl.arange(0, BLOCK_B)
        moving = _load(b, other, B, 0, D, BLOCK_D, UPCAST)
        x = scale_x * tl.dot(resident, tl.trans(moving), input_precision=PRECISION)
        t = x  # not used without a teacher
        if TEACHER:
            t = scale_t * _similarities(
                teacher_resident, teacher_a, own, A, teacher_b, other, B,
                BLOCK_A, BLOCK_B, D_TEACHER, BLOCK_D_TEACHER, PRECISION, UPCAST,
            )  # fmt: skip
        keep = (own < A)[:, None] & _candidates(other, B, EVEN)
        if IDS:
            other_id = tl.load(b_id + other, mask=other < B, other=-2)
            keep = keep & (own_id[:, None] != other_id[None, :])
        positive = own_group[:, None] == tl.load(b_group + other, mask=other < B, other=-2)[None, :]
        if OF_KEYS:
            g = _gradient(x, t, keep, positive, ratio, terms, other, B, TEACHER, IDS or not EVEN, SHARED, 1)
        else:
            g = _gradient(x, t, keep, positive, ratio, terms, own, A, TEACHER, IDS or not EVEN, SHARED, 0)
        g = g.to(b.dtype.element_ty)
        if UPCAST:
            g = g.to(tl.float32)
        gradient = tl.dot(g, moving, gradient, input_precision=PRECISION)

    column = tl.arange(0, BLOCK_D)
    out += (split.to(tl.int64) * A + own)[:, None] * D + column[None, :]
    tl.store(out, gradient, mask=(own < A)[:, None] & (column < D)[None, :])


@triton.heuristics({"EVEN": lambda given: given["M"] % given["BLOCK_M"] == 0})
@triton.jit
def similarity_gradient_kernel(
    query, key, teacher_query, teacher_key, query_id, key_id, query_group, key_group, scale, terms, out,
    N, M, FIRST, LAST,
    D: tl.constexpr, D_TEACHER: tl.constexpr,
    TEACHER: tl.constexpr, IDS: tl.constexpr, SHARED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_TEACHER: tl.constexpr,
):  # fmt: skip
    """G of the rows FIRST to LAST and all keys, into ``out`` (LAST - FIRST, M), in its dtype. Keys are on the grid's
    first axis, the one without a limit that matters."""
    row = FIRST + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale_x, ratio, scale_t = tl.load(scale), tl.load(scale + 1), tl.load(scale + 2)
    q = _resident(query, row, N, D, BLOCK_D, UPCAST)
    x = scale_x * _similarities(q, query, row, N, key, column, M, BLOCK_N, BLOCK_M, D, BLOCK_D, PRECISION, UPCAST)
    t = x  # not used without a teacher
    if TEACHER:
        tq = _resident(teacher_query, row, N, D_TEACHER, BLOCK_D_TEACHER, UPCAST)
        t = scale_t * _similarities(
            tq, teacher_query, row, N, teacher_key, column, M,
            BLOCK_N, BLOCK_M, D_TEACHER, BLOCK_D_TEACHER, PRECISION, UPCAST,
        )  # fmt: skip
    keep = _candidates(column, M, EVEN)
    if IDS:
        own_id = tl.load(query_id + row, mask=row < N, other=-1)
        other_id = tl.load(key_id + column, mask=column < M, other=-2)
        keep = keep & (own_id[:, None] != other_id[None, :])
    own_group = tl.load(query_group + row, mask=row < N, other=-1)
    positive = own_group[:, None] == tl.load(key_group + column, mask=column < M, other=-2)[None, :]
    g = _gradient(x, t, keep, positive, ratio, terms, row, N, TEACHER, IDS or not EVEN, SHARED, 0)
    out += (row - FIRST).to(tl.int64)[:, None] * M + column[None, :]
    tl.store(out, g.to(out.dtype.element_ty), mask=(row < LAST)[:, None] & (column < M)[None, :])
