"""Backward on Hopper in two passes without atomics, so that every run gives the same bits.

Both passes are one kernel. A program owns a pair of neighboring tiles of 64 tokens, a tile for each
of two warpgroups: queries in the first pass (dQ), keys in the second (dK and dV). One more warp
fetches, box by box, the tokens of the other kind that the pair attends or is attended by: all boxes
along the last axis, then the next row of boxes. The pair lies side by side along that last axis, so
that the boxes of no use to one warpgroup begin or end a row of boxes; it only hands them back.

In both passes the tile is the left operand: S = Q K^T and dP = dO V^T in the first, their
transposes in the second. So the weights and dS, made in registers, stay there as left operands of
what is summed: dQ += dS K, or dK += dS^T Q and dV += P^T dO.

The host orders the axes as a program walks them: axis 0, 1, 2 here may be any axis of the problem.
"""

from __future__ import annotations

from natten.backends.hopper.gluon_names import (
    fence_async_shared,
    from_triton,
    gl,
    gluon,
    load_box,
    mbarrier,
    reinterpret,
    store_box,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from natten.backends.triton import primitives

UNIT = gl.constexpr(primitives.UNIT.value)
FULL = gl.constexpr(primitives.FULL.value)
LOG2E = gl.constexpr(1.4426950408889634)

window = from_triton(primitives.window)
queries_of = from_triton(primitives.queries_of)
coordinates = from_triton(primitives.coordinates)
split = from_triton(primitives.split)


@gluon.jit
def _partners(x, n, k, s, MODE: gl.constexpr, OF_KEYS: gl.constexpr):
    """First and one-past-last token of the other kind that token ``x`` pairs with."""
    if OF_KEYS:
        low, high = queries_of(x, n, n, k, s, MODE)
    else:
        low, high = window(x, n, n, k, s, MODE)
    return low, high


@gluon.jit
def _span(first, size, n, k, s, MODE: gl.constexpr, OF_KEYS: gl.constexpr):
    """Bounds of the partners of the tokens ``first .. first + size - 1`` that exist.

    Both ends of a token's partners move monotonically, so the first and the last token bound what
    any of them pairs with, ``low .. high``, and what all do, ``all_low .. all_high``.
    """
    last = gl.minimum(first + size, n) - 1
    low, all_high = _partners(first, n, k, s, MODE, OF_KEYS)
    all_low, high = _partners(last, n, k, s, MODE, OF_KEYS)
    return low, all_low, all_high, gl.where(first <= last, gl.maximum(low, high), low)


@gluon.jit
def _place(T0, T1, T2, D0, D1, D2, heads, OUTER: gl.constexpr):
    """Batch, head, dilation group per axis, and first token of this program's pair of tiles."""
    pid, t0, t1, t2 = split(gl.program_id(0), T0, T1, T2)
    pid, g0, g1, g2 = split(pid, D0, D1, D2)
    f0, f1, f2 = t0 * OUTER[0], t1 * OUTER[1], t2 * (2 * OUTER[2])
    return pid // heads, pid % heads, g0, g1, g2, f0, f1, f2


@gluon.jit
def _boxes(low, high, SIZE: gl.constexpr):
    return (high - low + SIZE - 1) // SIZE


@gluon.jit
def _producer(
    outer_a, outer_b, inner_a, inner_b, terms, extra_a, extra_b, grad_a, grad_b,
    outer_a_bufs, outer_b_bufs, a_bufs, b_bufs, term_bufs, outer_full, full, empty, done,
    oa_0, oa_1, oa_2, oa_h, ob_0, ob_1, ob_2, ob_h, ia_0, ia_1, ia_2, ia_h, ib_0, ib_1, ib_2, ib_h,
    t_0, t_1, t_2, t_h, g_0, g_1, g_2, g_h,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, heads, per_kv, extra,
    OUTER: gl.constexpr, INNER: gl.constexpr, MODES: gl.constexpr, OF_KEYS: gl.constexpr,
    HAS_EXTRA: gl.constexpr,
):  # fmt: skip
    """Fetch the pair of tiles, then box by box as buffers become free."""
    D: gl.constexpr = inner_a.block_type.shape[4]
    STAGES: gl.constexpr = full.shape[0]
    batch, head, g0, g1, g2, f0, f1, f2 = _place(T0, T1, T2, D0, D1, D2, heads, OUTER)

    # Head and dilation group are an offset along the channels.
    oa_c = head * oa_h + g0 * oa_0 + g1 * oa_1 + g2 * oa_2
    ob_c = head * ob_h + g0 * ob_0 + g1 * ob_1 + g2 * ob_2
    ia_c = g0 * ia_0 + g1 * ia_1 + g2 * ia_2
    ib_c = g0 * ib_0 + g1 * ib_1 + g2 * ib_2
    t_c = g0 * t_0 + g1 * t_1 + g2 * t_2
    term_bytes: gl.constexpr = terms.block_type.nbytes
    outer_bytes: gl.constexpr = 4 * outer_a.block_type.nbytes + (0 if OF_KEYS else 2 * term_bytes)
    mbarrier.expect(outer_full, outer_bytes)
    for half in gl.static_range(2):
        at = f2 + half * OUTER[2]
        load_box(outer_a, [batch, f0, f1, at, oa_c], outer_full, outer_a_bufs.index(half))
        load_box(outer_b, [batch, f0, f1, at, ob_c], outer_full, outer_b_bufs.index(half))
        if not OF_KEYS:
            at_terms = [batch, f0, f1, at, t_c + head * t_h]
            load_box(terms, at_terms, outer_full, term_bufs.index(half))

    low0, _, _, high0 = _span(f0, OUTER[0], L0, K0, S0, MODES[0], OF_KEYS)
    low1, _, _, high1 = _span(f1, OUTER[1], L1, K1, S1, MODES[1], OF_KEYS)
    low2, _, _, high2 = _span(f2, 2 * OUTER[2], L2, K2, S2, MODES[2], OF_KEYS)
    if OF_KEYS:
        # The query heads that share a key head follow one another.
        first_head, rounds = head * per_kv, per_kv
    else:
        first_head, rounds = head // per_kv, 1
    box_bytes: gl.constexpr = 2 * inner_a.block_type.nbytes + (term_bytes if OF_KEYS else 0)
    i = 0
    for h in range(first_head, first_head + rounds):
        for x0 in range(low0, high0, INNER[0]):
            for x1 in range(low1, high1, INNER[1]):
                for x2 in range(low2, high2, INNER[2]):
                    stage = i % STAGES
                    bar = full.index(stage)
                    mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
                    mbarrier.expect(bar, box_bytes)
                    load_box(
                        inner_a, [batch, x0, x1, x2, ia_c + h * ia_h], bar, a_bufs.index(stage)
                    )
                    if OF_KEYS:
                        at_terms = [batch, x0, x1, x2, t_c + h * t_h]
                        load_box(terms, at_terms, bar, term_bufs.index(stage))
                    load_box(
                        inner_b, [batch, x0, x1, x2, ib_c + h * ib_h], bar, b_bufs.index(stage)
                    )
                    i += 1
    if HAS_EXTRA:
        N: gl.constexpr = INNER[0] * INNER[1] * INNER[2]
        for e in range(0, extra, N):
            stage = i % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            mbarrier.expect(bar, box_bytes)
            at = first_head * D
            load_box(
                extra_a, [batch, 0, 0, e, at], bar, a_bufs.index(stage).reshape([1, 1, 1, N, D])
            )
            load_box(
                extra_b, [batch, 0, 0, e, at], bar, b_bufs.index(stage).reshape([1, 1, 1, N, D])
            )
            i += 1

    g_c = head * g_h + g0 * g_0 + g1 * g_1 + g2 * g_2
    for half in gl.static_range(2):
        at = f2 + half * OUTER[2]
        mbarrier.wait(done.index(half), 0)
        store_box(grad_a, [batch, f0, f1, at, g_c], outer_a_bufs.index(half))
        if OF_KEYS:
            store_box(grad_b, [batch, f0, f1, at, g_c], outer_b_bufs.index(half))
    store_wait(0)


@gluon.jit
def _hand_back(i, count, full, empty):
    """Pass over ``count`` boxes from number ``i`` on."""
    for j in range(i, i + count):
        stage = j % full.shape[0]
        mbarrier.wait(full.index(stage), j // full.shape[0] & 1)
        mbarrier.arrive(empty.index(stage), count=1)
    return i + count


@gluon.jit
def _bound(i, n, k, s, bounds, AT: gl.constexpr, MODE: gl.constexpr, OF_KEYS: gl.constexpr):
    """Keep the bounds of the partners of tokens ``i``; in shared memory, for want of registers."""
    if MODE != UNIT:
        low, high = _partners(i, n, k, s, MODE, OF_KEYS)
        bounds.index(AT).store(low)
        bounds.index(AT + 1).store(high)


@gluon.jit
def _inside(x, bounds, AT: gl.constexpr, MODE: gl.constexpr, ROWS: gl.constexpr, allowed):
    """``allowed``, and whether ``x`` (columns) are partners (of rows)."""
    if MODE != UNIT:
        low, high = bounds.index(AT).load(ROWS), bounds.index(AT + 1).load(ROWS)
        allowed = allowed & (x[None, :] >= low[:, None]) & (x[None, :] < high[:, None])
    return allowed


@gluon.jit
def _row_terms(buffers, i, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """LSE and delta of the rows' queries, ``[COUNT, 1]``."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    four = reinterpret(buffers.index(i), gl.float32, [COUNT, 4], flat)
    return four.slice(0, 1, 1).load(LAYOUT), four.slice(1, 1, 1).load(LAYOUT)


@gluon.jit
def _column_term(buffers, i, WHICH: gl.constexpr, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """LSE (0) or delta (1) of the columns' queries, ``[1, COUNT]``."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    four = reinterpret(buffers.index(i), gl.float32, [4, COUNT], flat)
    return four.slice(WHICH, 1, 0).load(LAYOUT)


@gluon.jit
def _step(
    acc_a, acc_b, i, a, b, lse, delta, a_bufs, b_bufs, term_bufs, full, empty, scale,
    whole, x0, x1, x2, bounds,
    AT: gl.constexpr, INNER: gl.constexpr, MODES: gl.constexpr, MASKED: gl.constexpr,
    OF_KEYS: gl.constexpr, SCORES: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Add box ``i``."""
    M: gl.constexpr = 64
    N: gl.constexpr = INNER[0] * INNER[1] * INNER[2]
    D: gl.constexpr = a_bufs.shape[5]
    STAGES: gl.constexpr = full.shape[0]
    stage = i % STAGES
    mbarrier.wait(full.index(stage), i // STAGES & 1)
    inner_a = a_bufs.index(stage).reshape([N, D])
    inner_b = b_bufs.index(stage).reshape([N, D])
    zeros = gl.zeros([M, N], gl.float32, SCORES)
    s = warpgroup_mma(a, inner_a.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if OF_KEYS:
        s = warpgroup_mma_wait(0, deps=(s,))
    else:
        dp = warpgroup_mma(b, inner_b.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
    if OF_KEYS:
        lse = _column_term(term_bufs, stage, 0, N, SCORES)
    e = s * (scale * LOG2E) - lse
    if MASKED:  # noqa: SIM102 (decided when compiling)
        if not whole:
            columns = gl.arange(0, N, layout=gl.SliceLayout(0, SCORES))
            c0, c1, c2 = coordinates(columns, INNER[1], INNER[2])
            allowed = gl.full([M, N], 1, gl.int1, SCORES)
            ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
            allowed = _inside(x0 + c0, bounds, AT, MODES[0], ROWS, allowed)
            allowed = _inside(x1 + c1, bounds, AT + 2, MODES[1], ROWS, allowed)
            allowed = _inside(x2 + c2, bounds, AT + 4, MODES[2], ROWS, allowed)
            e = gl.where(allowed, e, float("-inf"))
    w = gl.exp2(e)
    if OF_KEYS:
        # Only now: with four sums in flight registers do not suffice.
        dp = warpgroup_mma(b, inner_b.permute((1, 0)), zeros, use_acc=False, is_async=True)
        p = gl.convert_layout(w.to(a_bufs.dtype), WEIGHTS)
        acc_b = warpgroup_mma(p, inner_b, acc_b, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
    else:
        dp = warpgroup_mma_wait(0, deps=(dp,))
    if OF_KEYS:
        delta = _column_term(term_bufs, stage, 1, N, SCORES)
    ds = w * (dp - delta)
    ds = gl.convert_layout(ds.to(a_bufs.dtype), WEIGHTS)
    acc_a = warpgroup_mma(ds, inner_a, acc_a, is_async=True)
    if OF_KEYS:
        acc_a, acc_b = warpgroup_mma_wait(0, deps=(acc_a, acc_b))
    else:
        acc_a = warpgroup_mma_wait(0, deps=(acc_a,))
    mbarrier.arrive(empty.index(stage), count=1)
    return acc_a, acc_b


@gluon.jit
def _consumer(
    bounds, outer_a_bufs, outer_b_bufs, a_bufs, b_bufs, term_bufs, outer_full, full, empty, done,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, heads, per_kv, extra, scale,
    HALF: gl.constexpr, OUTER: gl.constexpr, INNER: gl.constexpr, MODES: gl.constexpr,
    MASKED: gl.constexpr,
    OF_KEYS: gl.constexpr, HAS_EXTRA: gl.constexpr,
):  # fmt: skip
    """Sum over the boxes of one tile of the pair, and store its gradients."""
    M: gl.constexpr = OUTER[0] * OUTER[1] * OUTER[2]
    N: gl.constexpr = INNER[0] * INNER[1] * INNER[2]
    D: gl.constexpr = a_bufs.shape[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    _, _, _, _, _, f0, f1, f2 = _place(T0, T1, T2, D0, D1, D2, heads, OUTER)

    # The boxes of the pair along the last axis, and which of them are this tile's.
    low2, _, _, high2 = _span(f2, 2 * OUTER[2], L2, K2, S2, MODES[2], OF_KEYS)
    f2 += HALF * OUTER[2]
    low0, all_low0, all_high0, high0 = _span(f0, OUTER[0], L0, K0, S0, MODES[0], OF_KEYS)
    low1, all_low1, all_high1, high1 = _span(f1, OUTER[1], L1, K1, S1, MODES[1], OF_KEYS)
    own_low, all_low2, all_high2, own_high = _span(f2, OUTER[2], L2, K2, S2, MODES[2], OF_KEYS)
    boxes = _boxes(low2, high2, INNER[2])
    # A tile beyond the last token has none.
    before = gl.minimum((own_low - low2) // INNER[2], boxes)
    own = gl.maximum(_boxes(low2, own_high, INNER[2]) - before, 0)
    own = gl.where(own_high > own_low, own, 0)
    after = boxes - before - own
    start2, end2 = low2 + before * INNER[2], low2 + (before + own) * INNER[2]
    rounds = per_kv if OF_KEYS else 1

    r0, r1, r2 = coordinates(gl.arange(0, M, layout=ROWS), OUTER[1], OUTER[2])
    i0, i1, i2 = f0 + r0, f1 + r1, f2 + r2
    _bound(gl.minimum(i0, L0 - 1), L0, K0, S0, bounds, 8 * HALF, MODES[0], OF_KEYS)
    _bound(gl.minimum(i1, L1 - 1), L1, K1, S1, bounds, 8 * HALF + 2, MODES[1], OF_KEYS)
    _bound(gl.minimum(i2, L2 - 1), L2, K2, S2, bounds, 8 * HALF + 4, MODES[2], OF_KEYS)
    a, b = outer_a_bufs.index(HALF).reshape([M, D]), outer_b_bufs.index(HALF).reshape([M, D])
    mbarrier.wait(outer_full, 0)
    if OF_KEYS:
        lse, delta = 0.0, 0.0
    else:
        # Rows that are no query have zeros, and gradients that nobody reads.
        lse, delta = _row_terms(term_bufs, HALF, M, SCORES)
    acc_a = gl.zeros([M, D], gl.float32, GRADS)
    acc_b = gl.zeros([M, D], gl.float32, GRADS) if OF_KEYS else 0

    i = 0
    for _ in range(rounds):
        for x0 in range(low0, high0, INNER[0]):
            whole0 = (x0 >= all_low0) & (x0 + INNER[0] <= all_high0)
            for x1 in range(low1, high1, INNER[1]):
                whole1 = whole0 & (x1 >= all_low1) & (x1 + INNER[1] <= all_high1)
                i = _hand_back(i, before, full, empty)
                for x2 in range(start2, end2, INNER[2]):
                    whole = whole1 & (x2 >= all_low2) & (x2 + INNER[2] <= all_high2)
                    acc_a, acc_b = _step(
                        acc_a, acc_b, i, a, b, lse, delta, a_bufs, b_bufs, term_bufs, full,
                        empty, scale, whole, x0, x1, x2, bounds,
                        8 * HALF, INNER, MODES, MASKED, OF_KEYS, SCORES, WEIGHTS,
                    )  # fmt: skip
                    i += 1
                i = _hand_back(i, after, full, empty)
    if HAS_EXTRA:
        bounds.index(8 * HALF + 4).store(gl.zeros([M], gl.int32, ROWS))
        bounds.index(8 * HALF + 5).store(gl.full([M], extra, gl.int32, ROWS))
        for e in range(0, extra, N):
            acc_a, acc_b = _step(
                acc_a, acc_b, i, a, b, lse, delta, a_bufs, b_bufs, term_bufs, full, empty,
                scale, e + N <= extra, 0, 0, e, bounds,
                8 * HALF, (1, 1, N), (UNIT, UNIT, FULL), MASKED, OF_KEYS, SCORES, WEIGHTS,
            )  # fmt: skip
            i += 1

    buf = outer_a_bufs.index(HALF)
    buf.reshape([M, D]).store((acc_a * scale).to(buf.dtype))
    if OF_KEYS:
        buf = outer_b_bufs.index(HALF)
        buf.reshape([M, D]).store(gl.cast(acc_b, buf.dtype))
    # The producer stores them: it knows where, which takes registers.
    fence_async_shared()
    mbarrier.arrive(done.index(HALF), count=1)


# Compiled once for all of them, whatever divides them.
_NUMBERS = """
oa_0 oa_1 oa_2 oa_h ob_0 ob_1 ob_2 ob_h ia_0 ia_1 ia_2 ia_h ib_0 ib_1 ib_2 ib_h t_0 t_1 t_2 t_h
g_0 g_1 g_2 g_h L0 L1 L2 K0 K1 K2 S0 S1 S2 D0 D1 D2 T0 T1 T2 heads per_kv extra scale
""".split()  # noqa: SIM905


@gluon.jit(do_not_specialize=_NUMBERS)
def pass_kernel(
    outer_a, outer_b, inner_a, inner_b, terms, extra_a, extra_b, grad_a, grad_b,
    oa_0, oa_1, oa_2, oa_h, ob_0, ob_1, ob_2, ob_h, ia_0, ia_1, ia_2, ia_h, ib_0, ib_1, ib_2, ib_h,
    t_0, t_1, t_2, t_h, g_0, g_1, g_2, g_h,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, heads, per_kv, extra, scale,
    MODES: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, OF_KEYS: gl.constexpr,
    HAS_EXTRA: gl.constexpr,
):  # fmt: skip
    """One pass: dQ, or with ``OF_KEYS`` dK and dV.

    Tiles come from ``outer_a`` and ``outer_b`` (query and dO; key and value), boxes from
    ``inner_a`` and ``inner_b`` (key and value; query and dO); ``grad_a`` and ``grad_b`` take the
    gradients. Per axis: ``L`` tokens of a dilation group, window ``K``, stride ``S``, dilation
    ``D``, ``T`` pairs of tiles. ``oa`` .. ``ib``, ``t``, ``g``: how far apart dilation groups, and
    heads, are in memory. ``terms`` has four numbers a query: LSE in exponents of two, delta, zeros.
    """
    OUTER: gl.constexpr = outer_a.block_type.shape[1:4]
    INNER: gl.constexpr = inner_a.block_type.shape[1:4]
    outer_a_bufs = gl.allocate_shared_memory(
        outer_a.dtype, [2] + outer_a.block_type.shape, outer_a.layout
    )
    outer_b_bufs = gl.allocate_shared_memory(
        outer_b.dtype, [2] + outer_b.block_type.shape, outer_b.layout
    )
    a_bufs = gl.allocate_shared_memory(
        inner_a.dtype, [STAGES] + inner_a.block_type.shape, inner_a.layout
    )
    b_bufs = gl.allocate_shared_memory(
        inner_b.dtype, [STAGES] + inner_b.block_type.shape, inner_b.layout
    )
    # Of queries, in the first pass fetched once, in the second box by box.
    term_bufs = gl.allocate_shared_memory(
        gl.float32, [STAGES if OF_KEYS else 2] + terms.block_type.shape, terms.layout
    )
    bounds = gl.allocate_shared_memory(gl.int32, [16, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    outer_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(outer_full, count=1)
    for half in gl.static_range(2):
        mbarrier.init(done.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)

    gl.warp_specialize(
        [
            (_consumer, (
                bounds, outer_a_bufs, outer_b_bufs, a_bufs, b_bufs, term_bufs, outer_full, full,
                empty, done,
                L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, heads, per_kv, extra,
                scale,
                0, OUTER, INNER, MODES, MASKED, OF_KEYS, HAS_EXTRA,
            )),
            (_consumer, (
                bounds, outer_a_bufs, outer_b_bufs, a_bufs, b_bufs, term_bufs, outer_full, full,
                empty, done,
                L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, heads, per_kv, extra,
                scale,
                1, OUTER, INNER, MODES, MASKED, OF_KEYS, HAS_EXTRA,
            )),
            (_producer, (
                outer_a, outer_b, inner_a, inner_b, terms, extra_a, extra_b, grad_a, grad_b,
                outer_a_bufs, outer_b_bufs, a_bufs, b_bufs, term_bufs, outer_full, full, empty,
                done,
                oa_0, oa_1, oa_2, oa_h, ob_0, ob_1, ob_2, ob_h, ia_0, ia_1, ia_2, ia_h,
                ib_0, ib_1, ib_2, ib_h, t_0, t_1, t_2, t_h, g_0, g_1, g_2, g_h,
                L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, heads, per_kv, extra,
                OUTER, INNER, MODES, OF_KEYS, HAS_EXTRA,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
