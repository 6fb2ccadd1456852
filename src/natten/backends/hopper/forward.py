"""Forward on Hopper: boxes by TMA, products by wgmma, one producer warp and two warpgroups.

A program owns a tile of 128 queries; each warpgroup holds 64 of them, a half along axis ``SPLIT``.
The producer fetches every box of keys and values that a query of the tile attends, starting at the
first window, and walks ``SPLIT`` outermost, so that the boxes of one warpgroup are neighbors; the
others it only hands back.

Masks come in three kinds (``MASK``). With ``PRODUCT``, a mask is one more step of the product
Q K^T: per axis, one factor says which positions of the box a row must not see, the other which
position a key has, and their product is 0 or about -2^100. With ``SELECT``, scores are compared
element by element; with ``BRANCH`` only in boxes that are not whole for the warpgroup.
"""

from __future__ import annotations

from natten.backends.hopper.gluon_names import (
    fence_async_shared,
    from_triton,
    gl,
    gluon,
    load_box,
    mbarrier,
    store_box,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from natten.backends.triton import primitives

NONE = gl.constexpr(0)
SELECT = gl.constexpr(1)
BRANCH = gl.constexpr(2)
PRODUCT = gl.constexpr(3)

# What a masked score is lowered to or by. Finite, so that a row that has seen only masked keys
# stays finite; what it summed is erased by the first real score.
HUGE = gl.constexpr(-(2.0**100))
ROOT = gl.constexpr(2.0**50)
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
FAR = gl.constexpr(1 << 30)

window = from_triton(primitives.window)


@gluon.jit
def _axis(t, n, K, S, MODE: gl.constexpr, TQ: gl.constexpr, TK: gl.constexpr):
    """Of one axis of a tile: first and last query, first key, boxes."""
    first = t * TQ
    last = gl.minimum(first + TQ, n) - 1
    low, _ = window(first, n, n, K, S, MODE)
    _, high = window(last, n, n, K, S, MODE)
    return first, last, low, (high - low + TK - 1) // TK


@gluon.jit
def _box(i, low0, low1, low2, b0, b1, b2, TK: gl.constexpr, SPLIT: gl.constexpr):
    """First position of box ``i``; axis ``SPLIT`` is walked outermost."""
    if SPLIT == 0:
        j2 = i % b2
        j1 = i // b2 % b1
        j0 = i // b2 // b1
    elif SPLIT == 1:
        j2 = i % b2
        j0 = i // b2 % b0
        j1 = i // b2 // b0
    else:
        j1 = i % b1
        j0 = i // b1 % b0
        j2 = i // b1 // b0
    return low0 + j0 * TK[0], low1 + j1 * TK[1], low2 + j2 * TK[2], j2


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, ek_desc, ev_desc, q_bufs, k_bufs, v_bufs, q_full, k_full, k_empty,
    v_full, v_empty, batch, f0, f1, f2, low0, low1, low2, b0, b1, b2, q_c, k_c, v_c, ek_c, ev_c,
    extra, TK: gl.constexpr, WQ: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
    HAS_EXTRA: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Fetch each warpgroup's queries, then the boxes of keys and values in turn."""
    boxes = b0 * b1 * b2
    for half in gl.static_range(GROUPS):
        bar = q_full.index(half)
        mbarrier.expect(bar, q_desc.block_type.nbytes)
        h0 = f0 + (half * WQ[0] if SPLIT == 0 else 0)
        h1 = f1 + (half * WQ[1] if SPLIT == 1 else 0)
        h2 = f2 + (half * WQ[2] if SPLIT == 2 else 0)
        load_box(q_desc, [batch, h0, h1, h2, q_c], bar, q_bufs.index(half))
    for i in range(boxes):
        a0, a1, a2, _ = _box(i, low0, low1, low2, b0, b1, b2, TK, SPLIT)
        stage = i % STAGES
        phase = i // STAGES & 1
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        load_box(k_desc, [batch, a0, a1, a2, k_c], k_full.index(stage), k_bufs.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        load_box(v_desc, [batch, a0, a1, a2, v_c], v_full.index(stage), v_bufs.index(stage))
    if HAS_EXTRA:
        N: gl.constexpr = TK[0] * TK[1] * TK[2]
        for e in range((extra + N - 1) // N):
            stage = (boxes + e) % STAGES
            phase = (boxes + e) // STAGES & 1
            k_buf = k_bufs.index(stage).reshape([1, 1, 1, N, k_bufs.shape[5]])
            v_buf = v_bufs.index(stage).reshape([1, 1, 1, N, v_bufs.shape[5]])
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            load_box(ek_desc, [batch, 0, 0, e * N, ek_c], k_full.index(stage), k_buf)
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            load_box(ev_desc, [batch, 0, 0, e * N, ev_c], v_full.index(stage), v_buf)


@gluon.jit
def _issue_scores(
    i, q, k_bufs, k_full, bias_bufs, lo, hi, low0, low1, low2, b0, b1, b2,
    TK: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
    CODE: gl.constexpr, TABLES: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Start Q K^T of box ``i``, masked by ``PRODUCT`` if that is the way."""
    M: gl.constexpr = q.shape[0]
    N: gl.constexpr = TK[0] * TK[1] * TK[2]
    stage = i % STAGES
    s = gl.zeros([M, N], gl.float32, SCORES)
    if MASK == PRODUCT:
        left: gl.constexpr = lo.type.layout
        a0, a1, a2, j2 = _box(i, low0, low1, low2, b0, b1, b2, TK, SPLIT)
        column = gl.arange(0, lo.shape[1], gl.SliceLayout(0, left))
        at = gl.where(column < CODE[0], a0, gl.where(column < CODE[1], a1, a2))[None, :]
        hidden = (at < lo) | (at >= hi)
        bias = gl.where(hidden, ROOT, 0.0).to(gl.bfloat16)
        keys = bias_bufs.index(j2 if TABLES > 1 else 0)
        mbarrier.wait(k_full.index(stage), i // STAGES & 1)
        s = warpgroup_mma(bias, keys.permute((1, 0)), s, use_acc=False, is_async=True)
        k = k_bufs.index(stage).reshape([N, q.shape[1]])
        return warpgroup_mma(q, k.permute((1, 0)), s, is_async=True)
    else:
        mbarrier.wait(k_full.index(stage), i // STAGES & 1)
        k = k_bufs.index(stage).reshape([N, q.shape[1]])
        return warpgroup_mma(q, k.permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _select(
    s, i, starts, ends, low0, low1, low2, b0, b1, b2,
    TK: gl.constexpr, SPLIT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Lower the scores of keys outside their row's window, element by element."""
    a0, a1, a2, _ = _box(i, low0, low1, low2, b0, b1, b2, TK, SPLIT)
    c = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    if MASKED[0]:
        p = (a0 + c // (TK[1] * TK[2]))[None, :]
        s = gl.where((p >= starts[0][:, None]) & (p < ends[0][:, None]), s, HUGE)
    if MASKED[1]:
        p = (a1 + c // TK[2] % TK[1])[None, :]
        s = gl.where((p >= starts[1][:, None]) & (p < ends[1][:, None]), s, HUGE)
    if MASKED[2]:
        p = (a2 + c % TK[2])[None, :]
        s = gl.where((p >= starts[2][:, None]) & (p < ends[2][:, None]), s, HUGE)
    return s


@gluon.jit
def _softmax(s, top, total, factor, ACC: gl.constexpr, DTYPE: gl.constexpr):
    """Weights as a left operand, new maximum and sum, and what earlier sums shrink by."""
    new = gl.maximum(top, gl.max(s, 1) * factor)
    p = gl.exp2(s * factor - new[:, None])
    shrink = gl.exp2(top - new)
    total = total * shrink + gl.sum(p, 1)
    return gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, ACC, 2)), new, total, shrink


@gluon.jit
def _add_values(acc, p, i, v_bufs, v_full, STAGES: gl.constexpr):
    """Start ``acc += p V`` of box ``i``."""
    stage = i % STAGES
    mbarrier.wait(v_full.index(stage), i // STAGES & 1)
    v = v_bufs.index(stage).reshape([p.shape[1], acc.shape[1]])
    return warpgroup_mma(p, v, acc, is_async=True)


@gluon.jit
def _shrink(acc, by):
    """``acc`` with its rows scaled."""
    return acc * gl.convert_layout(by, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def _hand_back(first, last, k_full, k_empty, v_full, v_empty, STAGES: gl.constexpr):
    """Release boxes that only the other warpgroup attends."""
    for i in range(first, last):
        stage = i % STAGES
        phase = i // STAGES & 1
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.arrive(v_empty.index(stage), count=1)


@gluon.jit
def _whole(
    i, whole0, whole1, whole2, low0, low1, low2, b0, b1, b2,
    TK: gl.constexpr, SPLIT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Whether every row of the warpgroup attends every key of box ``i``."""
    a0, a1, a2, _ = _box(i, low0, low1, low2, b0, b1, b2, TK, SPLIT)
    whole = i >= 0
    if MASKED[0]:
        whole = whole & (a0 >= whole0[0]) & (a0 + TK[0] <= whole0[1])
    if MASKED[1]:
        whole = whole & (a1 >= whole1[0]) & (a1 + TK[1] <= whole1[1])
    if MASKED[2]:
        whole = whole & (a2 >= whole2[0]) & (a2 + TK[2] <= whole2[1])
    return whole


@gluon.jit
def _masked(
    s, i, starts, ends, whole0, whole1, whole2, low0, low1, low2, b0, b1, b2,
    TK: gl.constexpr, SPLIT: gl.constexpr, MASKED: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores of box ``i``, masked by ``SELECT`` or ``BRANCH``."""
    if MASKED[0] or MASKED[1] or MASKED[2]:
        if MASK == SELECT:
            s = _select(s, i, starts, ends, low0, low1, low2, b0, b1, b2, TK, SPLIT, MASKED)
        elif MASK == BRANCH:  # noqa: SIM102
            if not _whole(
                i, whole0, whole1, whole2, low0, low1, low2, b0, b1, b2, TK, SPLIT, MASKED
            ):
                s = _select(s, i, starts, ends, low0, low1, low2, b0, b1, b2, TK, SPLIT, MASKED)
    return s


@gluon.jit
def _walk(
    begin, end, acc, p, top, total, q, k_bufs, v_bufs, k_full, k_empty, v_full, v_empty,
    bias_bufs, lo, hi, starts, ends, whole0, whole1, whole2, low0, low1, low2, b0, b1, b2, factor,
    TK: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
    CODE: gl.constexpr, TABLES: gl.constexpr, MASKED: gl.constexpr, SCORES: gl.constexpr,
    ACC: gl.constexpr,
):  # fmt: skip
    """Boxes ``begin .. end``: a box's scores, and the values of the box before it."""
    for i in range(begin, end):
        s = _issue_scores(
            i, q, k_bufs, k_full, bias_bufs, lo, hi, low0, low1, low2, b0, b1, b2,
            TK, SPLIT, STAGES, MASK, CODE, TABLES, SCORES,
        )  # fmt: skip
        acc = _add_values(acc, p, i - 1, v_bufs, v_full, STAGES)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(i % STAGES), count=1)
        s = _masked(
            s, i, starts, ends, whole0, whole1, whole2, low0, low1, low2, b0, b1, b2,
            TK, SPLIT, MASKED, MASK,
        )  # fmt: skip
        p, top, total, by = _softmax(s, top, total, factor, ACC, q.dtype)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index((i - 1) % STAGES), count=1)
        acc = _shrink(acc, by)
    return acc, p, top, total


@gluon.jit
def _half(f, z, W: gl.constexpr, AT: gl.constexpr):
    """First and last query of a warpgroup along an axis, inside the layout."""
    return gl.minimum(f + AT, z), gl.minimum(f + AT + W - 1, z)


@gluon.jit
def _consumer(
    HALF: gl.constexpr, o_desc, lse, q_bufs, k_bufs, v_bufs, o_bufs, bias_bufs,
    q_full, k_full, k_empty, v_full, v_empty,
    batch, head, heads, n0, n1, n2, f0, f1, f2, z0, z1, z2, low0, low1, low2, b0, b1, b2,
    g0, g1, g2, K0, K1, K2, S0, S1, S2, D0, D1, D2, extra, factor, o_c,
    MODES: gl.constexpr, WQ: gl.constexpr, TK: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr, PHASED: gl.constexpr,
    CORE: gl.constexpr,
    AHEAD: gl.constexpr, CODE: gl.constexpr, BY_ROW: gl.constexpr, STEPS: gl.constexpr,
    TABLES: gl.constexpr, HAS_EXTRA: gl.constexpr,
):  # fmt: skip
    """Attention of 64 queries, half ``HALF`` of the tile."""
    M: gl.constexpr = WQ[0] * WQ[1] * WQ[2]
    N: gl.constexpr = TK[0] * TK[1] * TK[2]
    D: gl.constexpr = q_bufs.shape[5]
    DV: gl.constexpr = v_bufs.shape[5]
    DTYPE: gl.constexpr = q_bufs.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(
        0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]), 2
    )
    AT0: gl.constexpr = HALF * WQ[0] if SPLIT == 0 else 0
    AT1: gl.constexpr = HALF * WQ[1] if SPLIT == 1 else 0
    AT2: gl.constexpr = HALF * WQ[2] if SPLIT == 2 else 0

    # Windows move monotonically, so the first and the last query bound what all attend.
    h0, l0 = _half(f0, z0, WQ[0], AT0)
    h1, l1 = _half(f1, z1, WQ[1], AT1)
    h2, l2 = _half(f2, z2, WQ[2], AT2)
    from0, whole_to0 = window(h0, n0, n0, K0, S0, MODES[0])
    from1, whole_to1 = window(h1, n1, n1, K1, S1, MODES[1])
    from2, whole_to2 = window(h2, n2, n2, K2, S2, MODES[2])
    whole_from0, to0 = window(l0, n0, n0, K0, S0, MODES[0])
    whole_from1, to1 = window(l1, n1, n1, K1, S1, MODES[1])
    whole_from2, to2 = window(l2, n2, n2, K2, S2, MODES[2])
    whole0, whole1, whole2 = (
        (whole_from0, whole_to0),
        (whole_from1, whole_to1),
        (whole_from2, whole_to2),
    )

    # Boxes of this half: ``first .. last``; ``inner_from .. inner_to`` are whole along SPLIT.
    boxes = b0 * b1 * b2
    if SPLIT == 0:
        layer, T, low, lo_, hi_, wl, wh = b1 * b2, TK[0], low0, from0, to0, whole_from0, whole_to0
    elif SPLIT == 1:
        layer, T, low, lo_, hi_, wl, wh = b0 * b2, TK[1], low1, from1, to1, whole_from1, whole_to1
    else:
        layer, T, low, lo_, hi_, wl, wh = b0 * b1, TK[2], low2, from2, to2, whole_from2, whole_to2
    first = (lo_ - low) // T * layer
    last = (hi_ - low + T - 1) // T * layer

    r = gl.arange(0, M, gl.SliceLayout(1, SCORES))
    i0 = gl.minimum(f0 + AT0 + r // (WQ[1] * WQ[2]), z0)
    i1 = gl.minimum(f1 + AT1 + r // WQ[2] % WQ[1], z1)
    i2 = gl.minimum(f2 + AT2 + r % WQ[2], z2)
    s0, e0 = window(i0, n0, n0, K0, S0, MODES[0])
    s1, e1 = window(i1, n1, n1, K1, S1, MODES[1])
    s2, e2 = window(i2, n2, n2, K2, S2, MODES[2])
    starts, ends = (s0, s1, s2), (e0, e1, e2)

    lo, hi = 0, 0
    if MASK == PRODUCT:
        lo, hi = _hidden_bounds(
            n0, n1, n2, f0 + AT0, f1 + AT1, f2 + AT2, z0, z1, z2, K0, K1, K2, S0, S1, S2,
            MODES, WQ, CODE, BY_ROW, STEPS, LEFT,
        )  # fmt: skip

    _hand_back(0, first, k_full, k_empty, v_full, v_empty, STAGES)

    acc = gl.zeros([M, DV], gl.float32, ACC)
    top = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([M], gl.float32, gl.SliceLayout(1, SCORES))
    mbarrier.wait(q_full.index(HALF), 0)
    q = q_bufs.index(HALF).reshape([M, D])

    s = _issue_scores(
        first, q, k_bufs, k_full, bias_bufs, lo, hi, low0, low1, low2, b0, b1, b2,
        TK, SPLIT, STAGES, MASK, CODE, TABLES, SCORES,
    )  # fmt: skip
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(first % STAGES), count=1)
    if AHEAD:
        for i in range(first, last - 1):
            ahead = _issue_scores(
                i + 1, q, k_bufs, k_full, bias_bufs, lo, hi, low0, low1, low2, b0, b1, b2,
                TK, SPLIT, STAGES, MASK, CODE, TABLES, SCORES,
            )  # fmt: skip
            s = _masked(
                s, i, starts, ends, whole0, whole1, whole2, low0, low1, low2, b0, b1, b2,
                TK, SPLIT, MASKED, MASK,
            )  # fmt: skip
            p, top, total, by = _softmax(s, top, total, factor, ACC, DTYPE)
            acc = _add_values(_shrink(acc, by), p, i, v_bufs, v_full, STAGES)
            s = warpgroup_mma_wait(1, deps=[ahead])
            mbarrier.arrive(k_empty.index((i + 1) % STAGES), count=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(i % STAGES), count=1)
        s = _masked(
            s, last - 1, starts, ends, whole0, whole1, whole2, low0, low1, low2, b0, b1, b2,
            TK, SPLIT, MASKED, MASK,
        )  # fmt: skip
        p, top, total, by = _softmax(s, top, total, factor, ACC, DTYPE)
        acc = _shrink(acc, by)
    else:
        s = _masked(
            s, first, starts, ends, whole0, whole1, whole2, low0, low1, low2, b0, b1, b2,
            TK, SPLIT, MASKED, MASK,
        )  # fmt: skip
        p, top, total, by = _softmax(s, top, total, factor, ACC, DTYPE)
        edge, core = last, last
        if PHASED:
            edge = gl.minimum(gl.maximum((wl - low + T - 1) // T * layer, first + 1), last)
            core = gl.minimum(gl.maximum((wh - low) // T * layer, edge), last)
        acc, p, top, total = _walk(
            first + 1, edge, acc, p, top, total, q, k_bufs, v_bufs, k_full, k_empty, v_full,
            v_empty, bias_bufs, lo, hi, starts, ends, whole0, whole1, whole2,
            low0, low1, low2, b0, b1, b2, factor,
            TK, SPLIT, STAGES, MASK, CODE, TABLES, MASKED, SCORES, ACC,
        )  # fmt: skip
        if PHASED:
            acc, p, top, total = _walk(
                edge, core, acc, p, top, total, q, k_bufs, v_bufs, k_full, k_empty, v_full,
                v_empty, bias_bufs, lo, hi, starts, ends, whole0, whole1, whole2,
                low0, low1, low2, b0, b1, b2, factor,
                TK, SPLIT, STAGES, MASK, CODE, TABLES, CORE, SCORES, ACC,
            )  # fmt: skip
            acc, p, top, total = _walk(
                core, last, acc, p, top, total, q, k_bufs, v_bufs, k_full, k_empty, v_full,
                v_empty, bias_bufs, lo, hi, starts, ends, whole0, whole1, whole2,
                low0, low1, low2, b0, b1, b2, factor,
                TK, SPLIT, STAGES, MASK, CODE, TABLES, MASKED, SCORES, ACC,
            )  # fmt: skip
    acc = _add_values(acc, p, last - 1, v_bufs, v_full, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index((last - 1) % STAGES), count=1)
    _hand_back(last, boxes, k_full, k_empty, v_full, v_empty, STAGES)

    if HAS_EXTRA:
        for e in range((extra + N - 1) // N):
            i = boxes + e
            s = _issue_scores(
                i, q, k_bufs, k_full, bias_bufs, lo, hi, low0, low1, low2, b0, b1, b2,
                TK, SPLIT, STAGES, NONE, CODE, TABLES, SCORES,
            )  # fmt: skip
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(i % STAGES), count=1)
            column = gl.arange(0, N, gl.SliceLayout(0, SCORES))
            s = gl.where((e * N + column < extra)[None, :], s, HUGE)
            p, top, total, by = _softmax(s, top, total, factor, ACC, DTYPE)
            acc = _add_values(_shrink(acc, by), p, i, v_bufs, v_full, STAGES)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(i % STAGES), count=1)

    o_buf = o_bufs.index(HALF)
    o_buf.reshape([M, DV]).store(_shrink(acc, 1.0 / total).to(DTYPE))
    fence_async_shared()
    store_box(o_desc, [batch, f0 + AT0, f1 + AT1, f2 + AT2, o_c], o_buf)
    x0, x1, x2 = i0 * D0 + g0, i1 * D1 + g1, i2 * D2 + g2
    row = (batch.to(gl.int64) * (n0 * D0) + x0) * (n1 * D1) + x1
    row = (row * (n2 * D2) + x2) * heads + head
    real = f0 + AT0 + r // (WQ[1] * WQ[2]) <= z0
    real = real & (f1 + AT1 + r // WQ[2] % WQ[1] <= z1) & (f2 + AT2 + r % WQ[2] <= z2)
    gl.store(lse + row, (top + gl.log2(total)) * LN2, mask=real)
    store_wait(0)


@gluon.jit
def _hidden_bounds(
    n0, n1, n2, f0, f1, f2, z0, z1, z2, K0, K1, K2, S0, S1, S2,
    MODES: gl.constexpr, WQ: gl.constexpr, CODE: gl.constexpr, BY_ROW: gl.constexpr,
    STEPS: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """The rows' factor of a ``PRODUCT`` mask: hidden unless a box starts in ``lo .. hi``.

    Column ``c`` of an axis stands for position ``c`` of a box along it. With ``BY_ROW``, the last
    axis's columns stand for the rows' positions instead, and each row is hidden at its own.
    """
    r = gl.arange(0, WQ[0] * WQ[1] * WQ[2], gl.SliceLayout(1, LEFT))
    c = gl.arange(0, STEPS * 16, gl.SliceLayout(0, LEFT))[None, :]
    s0, e0 = window(gl.minimum(f0 + r // (WQ[1] * WQ[2]), z0), n0, n0, K0, S0, MODES[0])
    s1, e1 = window(gl.minimum(f1 + r // WQ[2] % WQ[1], z1), n1, n1, K1, S1, MODES[1])
    s2, e2 = window(gl.minimum(f2 + r % WQ[2], z2), n2, n2, K2, S2, MODES[2])
    none = r * 0
    if BY_ROW:
        own = (r % WQ[2])[:, None] == c - CODE[1]
        lo2, hi2 = gl.where(own, FAR, -FAR), gl.where(own, FAR, FAR)
    else:
        lo2, hi2 = s2[:, None] - (c - CODE[1]), e2[:, None] - (c - CODE[1])
    lo1, hi1 = s1[:, None] - (c - CODE[0]), e1[:, None] - (c - CODE[0])
    lo0, hi0 = s0[:, None] - c, e0[:, None] - c
    lo = gl.where(
        c < CODE[0],
        lo0,
        gl.where(c < CODE[1], lo1, gl.where(c < CODE[2], lo2, none[:, None] - FAR)),
    )
    hi = gl.where(
        c < CODE[0],
        hi0,
        gl.where(c < CODE[1], hi1, gl.where(c < CODE[2], hi2, none[:, None] + FAR)),
    )
    return lo, hi


@gluon.jit
def _key_bias(
    low2, j2, n2, f2, z2, K2, S2, MODE: gl.constexpr, WQ: gl.constexpr, TK: gl.constexpr,
    CODE: gl.constexpr, BY_ROW: gl.constexpr, STEPS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The keys' factor of a ``PRODUCT`` mask: -2^50 at each key's own position of every axis."""
    k = gl.arange(0, TK[0] * TK[1] * TK[2], gl.SliceLayout(1, LAYOUT))[:, None]
    c = gl.arange(0, STEPS * 16, gl.SliceLayout(0, LAYOUT))[None, :]
    c2 = c - CODE[1]
    if BY_ROW:
        start, end = window(gl.minimum(f2 + c2, z2), n2, n2, K2, S2, MODE)
        at = low2 + j2 * TK[2] + k % TK[2]
        own2 = (at < start) | (at >= end)
    else:
        own2 = k % TK[2] == c2
    own = gl.where(
        c < CODE[0], k // (TK[1] * TK[2]) == c,
        gl.where(c < CODE[1], k // TK[2] % TK[1] == c - CODE[0], own2 & (c < CODE[2])),
    )  # fmt: skip
    return gl.where(own, -ROOT, 0.0).to(gl.bfloat16)


@gluon.jit(
    do_not_specialize=[
        "N0", "N1", "N2", "K0", "K1", "K2", "S0", "S1", "S2", "D0", "D1", "D2", "T0", "T1", "T2",
        "heads", "per_kv", "extra", "factor",
        "q_0", "q_1", "q_2", "q_h", "k_0", "k_1", "k_2", "k_h", "v_0", "v_1", "v_2", "v_h",
        "o_0", "o_1", "o_2", "o_h", "ek_h", "ev_h",
    ]
)  # fmt: skip
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, ek_desc, ev_desc, lse,
    q_0, q_1, q_2, q_h, k_0, k_1, k_2, k_h, v_0, v_1, v_2, v_h, o_0, o_1, o_2, o_h, ek_h, ev_h,
    N0, N1, N2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, heads, per_kv, extra, factor,
    MODES: gl.constexpr, WQ: gl.constexpr, TK: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, MASK: gl.constexpr, MASKED: gl.constexpr, PHASED: gl.constexpr,
    CORE: gl.constexpr,
    AHEAD: gl.constexpr, CODE: gl.constexpr, BY_ROW: gl.constexpr, STEPS: gl.constexpr,
    TABLES: gl.constexpr, HAS_EXTRA: gl.constexpr, REGISTERS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Strides ``x_a`` of one token, positions ``N`` of a dilation group, window ``K``, stride
    ``S``, dilation ``D``, tiles ``T``, per axis.

    A descriptor's last axis spans one batch entry, so that a head and a dilation group are an
    offset in it; its other axes are batch and positions inside the group.
    """
    t2, pid = gl.program_id(0) % T2, gl.program_id(0) // T2
    t1, pid = pid % T1, pid // T1
    t0, pid = pid % T0, pid // T0
    g2, pid = pid % D2, pid // D2
    g1, pid = pid % D1, pid // D1
    g0, pid = pid % D0, pid // D0
    head, batch = pid % heads, pid // heads
    kv = head // per_kv
    n0, n1, n2 = N0, N1, N2
    SIZE0: gl.constexpr = WQ[0] * GROUPS if SPLIT == 0 else WQ[0]
    SIZE1: gl.constexpr = WQ[1] * GROUPS if SPLIT == 1 else WQ[1]
    SIZE2: gl.constexpr = WQ[2] * GROUPS if SPLIT == 2 else WQ[2]
    f0, z0, low0, b0 = _axis(t0, n0, K0, S0, MODES[0], SIZE0, TK[0])
    f1, z1, low1, b1 = _axis(t1, n1, K1, S1, MODES[1], SIZE1, TK[1])
    f2, z2, low2, b2 = _axis(t2, n2, K2, S2, MODES[2], SIZE2, TK[2])
    q_c = g0 * q_0 + g1 * q_1 + g2 * q_2 + head * q_h
    k_c = g0 * k_0 + g1 * k_1 + g2 * k_2 + kv * k_h
    v_c = g0 * v_0 + g1 * v_1 + g2 * v_2 + kv * v_h
    o_c = g0 * o_0 + g1 * o_1 + g2 * o_2 + head * o_h

    q_bufs = gl.allocate_shared_memory(
        q_desc.dtype, [GROUPS] + q_desc.block_type.shape, q_desc.layout
    )
    k_bufs = gl.allocate_shared_memory(
        k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout
    )
    v_bufs = gl.allocate_shared_memory(
        v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout
    )
    if q_desc.block_type.shape[4] == o_desc.block_type.shape[4]:
        o_bufs = q_bufs  # queries are done with when their output is there
    else:
        o_bufs = gl.allocate_shared_memory(
            o_desc.dtype, [GROUPS] + o_desc.block_type.shape, o_desc.layout
        )
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)

    bias_bufs = q_full
    if MASK == PRODUCT:
        N: gl.constexpr = TK[0] * TK[1] * TK[2]
        BIAS: gl.constexpr = gl.NVMMASharedLayout(32 * STEPS, 16, 2)
        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [16 // STEPS, 2 * STEPS], [4, 1], [1, 0])
        bias_bufs = gl.allocate_shared_memory(gl.bfloat16, [TABLES, N, 16 * STEPS], BIAS)
        for j in gl.static_range(TABLES):
            bias_bufs.index(j).store(
                _key_bias(low2, j, n2, f2, z2, K2, S2, MODES[2], WQ, TK, CODE, BY_ROW, STEPS, ROWS)
            )
        fence_async_shared()

    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consumer, (
                    0, o_desc, lse, q_bufs, k_bufs, v_bufs, o_bufs, bias_bufs,
                    q_full, k_full, k_empty, v_full, v_empty,
                    batch, head, heads, n0, n1, n2, f0, f1, f2, z0, z1, z2,
                    low0, low1, low2, b0, b1, b2,
                    g0, g1, g2, K0, K1, K2, S0, S1, S2, D0, D1, D2, extra, factor, o_c,
                    MODES, WQ, TK, SPLIT, STAGES, MASK, MASKED, PHASED,
                    CORE, AHEAD, CODE, BY_ROW, STEPS,
                    TABLES, HAS_EXTRA,
                )),
                (_consumer, (
                    1, o_desc, lse, q_bufs, k_bufs, v_bufs, o_bufs, bias_bufs,
                    q_full, k_full, k_empty, v_full, v_empty,
                    batch, head, heads, n0, n1, n2, f0, f1, f2, z0, z1, z2,
                    low0, low1, low2, b0, b1, b2,
                    g0, g1, g2, K0, K1, K2, S0, S1, S2, D0, D1, D2, extra, factor, o_c,
                    MODES, WQ, TK, SPLIT, STAGES, MASK, MASKED, PHASED,
                    CORE, AHEAD, CODE, BY_ROW, STEPS,
                    TABLES, HAS_EXTRA,
                )),
                (_producer, (
                    q_desc, k_desc, v_desc, ek_desc, ev_desc, q_bufs, k_bufs,
                    v_bufs, q_full, k_full,
                    k_empty, v_full, v_empty, batch, f0, f1, f2, low0, low1, low2, b0, b1, b2,
                    q_c, k_c, v_c, kv * ek_h, kv * ev_h, extra,
                    TK, WQ, SPLIT, STAGES, HAS_EXTRA, GROUPS,
                )),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (
                    0, o_desc, lse, q_bufs, k_bufs, v_bufs, o_bufs, bias_bufs,
                    q_full, k_full, k_empty, v_full, v_empty,
                    batch, head, heads, n0, n1, n2, f0, f1, f2, z0, z1, z2,
                    low0, low1, low2, b0, b1, b2,
                    g0, g1, g2, K0, K1, K2, S0, S1, S2, D0, D1, D2, extra, factor, o_c,
                    MODES, WQ, TK, SPLIT, STAGES, MASK, MASKED, PHASED,
                    CORE, AHEAD, CODE, BY_ROW, STEPS,
                    TABLES, HAS_EXTRA,
                )),
                (_producer, (
                    q_desc, k_desc, v_desc, ek_desc, ev_desc, q_bufs, k_bufs,
                    v_bufs, q_full, k_full,
                    k_empty, v_full, v_empty, batch, f0, f1, f2, low0, low1, low2, b0, b1, b2,
                    q_c, k_c, v_c, kv * ek_h, kv * ev_h, extra,
                    TK, WQ, SPLIT, STAGES, HAS_EXTRA, GROUPS,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
