"""Forward on Hopper: boxes by TMA, products by wgmma, two warps that fetch, one or two warpgroups.

A program takes tiles of queries in turn, so that the next tile is fetched while this one ends. Keys
and values come box by box; a warpgroup hands back unread what its queries do not attend.
"""

from .gluon_names import (
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    store_box,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .masks import (
    COMPARE,
    HUGE,
    NONE,
    PRODUCT,
    column_tables,
    compared,
    hidden_bounds,
    is_whole,
    scores,
)
from .problem import Problem, place
from .ring import ring

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _fetch_queries(p, descriptor, steps, first, second):
    """Warp that fetches each warpgroup's queries."""
    turn = 0
    for number in range(gl.program_id(0), p.total, gl.num_programs(0)):
        batch, head, group, f, _low, _boxes = p.tile(number)
        at = place(steps, batch, group, head)
        f0, f1, f2 = p.part(f, 0)
        gdc_wait()  # until the kernel before has ended; what comes first need not
        first.fill(turn, descriptor, [at, f0, f1, f2, 0])
        if p.GROUPS == 2:
            f0, f1, f2 = p.part(f, 1)
            second.fill(turn, descriptor, [at, f0, f1, f2, 0])
        turn += 1  # noqa: SIM113


@gluon.jit
def _fetch_boxes(
    p, k_desc, v_desc, ek_desc, ev_desc, k_steps, v_steps, extra_b, keys, values, per_kv, extra,
    HAS_EXTRA: gl.constexpr,
):  # fmt: skip
    """Warp that fetches the additional tokens, then boxes of keys and values."""
    N: gl.constexpr = p.BOX[0] * p.BOX[1] * p.BOX[2]
    n = 0
    for number in range(gl.program_id(0), p.total, gl.num_programs(0)):
        batch, head, group, _f, low, boxes = p.tile(number)
        kv = head // per_kv
        k_at, v_at = place(k_steps, batch, group, kv), place(v_steps, batch, group, kv)
        gdc_wait()
        if HAS_EXTRA:
            for e in range(0, extra, N):
                keys.fill(n, ek_desc, [batch * extra_b + kv, 0, 0, e, 0])
                values.fill(n, ev_desc, [batch * extra_b + kv, 0, 0, e, 0])
                n += 1
        j = (n * 0, n * 0, n * 0)
        for _ in range(boxes[0] * boxes[1] * boxes[2]):
            a0, a1, a2, _ = p.box(j, low)
            keys.fill(n, k_desc, [k_at, a0, a1, a2, 0])
            values.fill(n, v_desc, [v_at, a0, a1, a2, 0])
            j = p.next(j, boxes)
            n += 1
    gdc_launch_dependents()  # the next kernel can be set up, and waits for this one's end


@gluon.jit
def _compare(p, s, j, f, low, starts, ends):
    if not is_whole(p, j, f, low):
        s = compared(p, s, j, low, starts, ends)
    return s


@gluon.jit
def _softmax(s, top, total, factor, ACC: gl.constexpr, DTYPE: gl.constexpr):
    """Weights as a left operand, new maximum and sum, and what earlier sums shrink by."""
    new = gl.maximum(top, gl.max(s, 1) * factor)
    weights = gl.exp2(s * factor - new[:, None])
    shrink = gl.exp2(top - new)
    total = total * shrink + gl.sum(weights, 1)
    operand: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    return gl.convert_layout(weights.to(DTYPE), operand), new, total, shrink


@gluon.jit
def _add(acc, weights, n, values):
    """Start ``acc += weights V`` of the ``n``-th box of the ring."""
    return warpgroup_mma(weights, values.wait(n, weights.shape[1]), acc, is_async=True)


@gluon.jit
def _scaled(acc, by):
    """``acc`` with its rows scaled."""
    return acc * gl.convert_layout(by, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def _attend(
    p, o_desc, o_steps, out, lse, queries, keys, values, tables, extra, factor,
    HALF: gl.constexpr, MASK: gl.constexpr, CODE: gl.constexpr, BY_ROW: gl.constexpr,
    STEPS: gl.constexpr, HAS_EXTRA: gl.constexpr, OWN_OUT: gl.constexpr,
):  # fmt: skip
    """Warpgroup that computes the attention of 64 queries of each tile, the ``HALF``-th ones."""
    M: gl.constexpr = p.TILE[0] * p.TILE[1] * p.TILE[2]
    N: gl.constexpr = p.BOX[0] * p.BOX[1] * p.BOX[2]
    DV: gl.constexpr = o_desc.block_type.shape[4]
    DTYPE: gl.constexpr = o_desc.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    turn = 0
    n = 0  # boxes that went through the rings
    for number in range(gl.program_id(0), p.total, gl.num_programs(0)):
        batch, head, group, f, low, boxes = p.tile(number)
        f = p.part(f, HALF)
        first, last, count, before = p.own(f, low, boxes)

        i0, i1, i2 = p.tokens(f, SCORES)
        s0, e0 = p.partners(i0, 0)
        s1, e1 = p.partners(i1, 1)
        s2, e2 = p.partners(i2, 2)
        starts, ends = (s0, s1, s2), (e0, e1, e2)
        hidden_from, hidden_to = 0, 0
        if MASK == PRODUCT:
            left: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
            hidden_from, hidden_to = hidden_bounds(p, f, low, CODE, BY_ROW, STEPS, left)

        acc = gl.zeros([M, DV], gl.float32, ACC)
        top = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([M], gl.float32, gl.SliceLayout(1, SCORES))
        q = queries.wait(turn, M)
        if HAS_EXTRA:
            for at in range(0, extra, N):
                s = scores(p, 0, n, q, keys, low, 0, 0, tables, NONE, CODE, SCORES)
                s = warpgroup_mma_wait(0, deps=[s])
                keys.release(n)
                c = gl.arange(0, N, gl.SliceLayout(0, SCORES))
                s = gl.where((at + c < extra)[None, :], s, HUGE)
                weights, top, total, by = _softmax(s, top, total, factor, ACC, DTYPE)
                acc = _add(_scaled(acc, by), weights, n, values)
                acc = warpgroup_mma_wait(0, deps=[acc])
                values.release(n)
                n += 1

        for i in range(first):
            keys.skip(n + i)
            values.skip(n + i)
        j = (before * 0, before * 0, before)
        s = scores(
            p, j, n + first, q, keys, low, hidden_from, hidden_to, tables, MASK, CODE, SCORES
        )
        s = warpgroup_mma_wait(0, deps=[s])
        keys.release(n + first)
        if OWN_OUT:  # after the last scores the next tile's queries can come
            queries.release(turn, first + 1 == last)
        if MASK == COMPARE:
            s = _compare(p, s, j, f, low, starts, ends)
        weights, top, total, by = _softmax(s, top, total, factor, ACC, DTYPE)
        if HAS_EXTRA:
            acc = _scaled(acc, by)
        # While the softmax of a box is computed, the values of the box before it are added.
        for i in range(first + 1, last):
            j = p.next(j, boxes)
            s = scores(
                p, j, n + i, q, keys, low, hidden_from, hidden_to, tables, MASK, CODE, SCORES
            )
            acc = _add(acc, weights, n + i - 1, values)
            s = warpgroup_mma_wait(1, deps=[s])
            keys.release(n + i)
            if OWN_OUT:
                queries.release(turn, i + 1 == last)
            if MASK == COMPARE:
                s = _compare(p, s, j, f, low, starts, ends)
            weights, top, total, by = _softmax(s, top, total, factor, ACC, DTYPE)
            acc = warpgroup_mma_wait(0, deps=[acc])
            values.release(n + i - 1)
            acc = _scaled(acc, by)
        acc = _add(acc, weights, n + last - 1, values)
        acc = warpgroup_mma_wait(0, deps=[acc])
        values.release(n + last - 1)
        for i in range(last, count):
            keys.skip(n + i)
            values.skip(n + i)

        store_wait(0)  # the tile before has left ``out``
        out.reshape([M, DV]).store(_scaled(acc, 1.0 / total).to(DTYPE))
        fence_async_shared()
        at = place(o_steps, batch, group, head)
        store_box(o_desc, [at, f[0], f[1], f[2], 0], out)
        if not OWN_OUT:
            store_wait(0)
            queries.release(turn)
        # Places in a contiguous tensor are its rows.
        row = at + i0 * (p.dilation[0] * o_steps[1]) + i1 * (p.dilation[1] * o_steps[2])
        row += i2 * (p.dilation[2] * o_steps[3])
        real = (i0 < p.length[0]) & (i1 < p.length[1]) & (i2 < p.length[2])
        gl.store(lse + row, (top + gl.log2(total)) * LN2, mask=real)
        n += count
        turn += 1  # noqa: SIM113
    store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "N0", "N1", "N2", "K0", "K1", "K2", "S0", "S1", "S2", "D0", "D1", "D2", "T0", "T1", "T2",
        "total", "heads", "per_kv", "extra", "factor",
        "q_b", "q_0", "q_1", "q_2", "q_h", "k_b", "k_0", "k_1", "k_2", "k_h",
        "v_b", "v_0", "v_1", "v_2", "v_h", "o_b", "o_0", "o_1", "extra_b",
    ]
)  # fmt: skip
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, ek_desc, ev_desc, lse,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    o_b, o_0, o_1, extra_b, N0, N1, N2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2,
    total, heads, per_kv, extra, factor,
    MODES: gl.constexpr, TILE: gl.constexpr, BOX: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, MASK: gl.constexpr, CODE: gl.constexpr, BY_ROW: gl.constexpr,
    STEPS: gl.constexpr, TABLES: gl.constexpr, HAS_EXTRA: gl.constexpr, OWN_OUT: gl.constexpr,
    REGISTERS: gl.constexpr, FETCH: gl.constexpr, GROUPS: gl.constexpr, DILATED: gl.constexpr,
):  # fmt: skip
    """Steps ``x_a`` of :func:`place`, positions ``N`` of a dilation group, window ``K``, stride
    ``S``, dilation ``D``, tiles ``T``, per axis; ``total`` tiles of all batches, heads and groups.
    """
    p = Problem(
        (N0, N1, N2), (K0, K1, K2), (S0, S1, S2), (D0, D1, D2), (T0, T1, T2), total, heads,
        MODES, TILE, BOX, SPLIT, GROUPS, DILATED, False,
    )  # fmt: skip
    o_steps = (o_b, o_0, o_1, heads, 1)
    k_steps, v_steps = (k_b, k_0, k_1, k_2, k_h), (v_b, v_0, v_1, v_2, v_h)
    keys = ring(k_desc, STAGES, GROUPS)
    values = ring(v_desc, STAGES, GROUPS)
    first = ring(q_desc, 1, 1)
    out = first.buffers.index(0)
    if OWN_OUT:
        out = gl.allocate_shared_memory(o_desc.dtype, o_desc.block_type.shape, o_desc.layout)
    tables = column_tables(p, out, MASK, CODE, BY_ROW, STEPS, TABLES)
    if GROUPS == 2:
        second = ring(q_desc, 1, 1)
        out2 = second.buffers.index(0)
        if OWN_OUT:
            out2 = gl.allocate_shared_memory(o_desc.dtype, o_desc.block_type.shape, o_desc.layout)
        gl.warp_specialize(
            [
                (_attend, (
                    p, o_desc, o_steps, out, lse, first, keys, values, tables, extra,
                    factor, 0, MASK, CODE, BY_ROW, STEPS, HAS_EXTRA, OWN_OUT,
                )),
                (_attend, (
                    p, o_desc, o_steps, out2, lse, second, keys, values, tables, extra,
                    factor, 1, MASK, CODE, BY_ROW, STEPS, HAS_EXTRA, OWN_OUT,
                )),
                (_fetch_queries, (p, q_desc, (q_b, q_0, q_1, q_2, q_h), first, second)),
                (_fetch_boxes, (
                    p, k_desc, v_desc, ek_desc, ev_desc, k_steps, v_steps, extra_b, keys, values,
                    per_kv, extra, HAS_EXTRA,
                )),
            ],
            [4, 1, 1],
            [REGISTERS, FETCH, FETCH],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    p, o_desc, o_steps, out, lse, first, keys, values, tables, extra,
                    factor, 0, MASK, CODE, BY_ROW, STEPS, HAS_EXTRA, OWN_OUT,
                )),
                (_fetch_queries, (p, q_desc, (q_b, q_0, q_1, q_2, q_h), first, first)),
                (_fetch_boxes, (
                    p, k_desc, v_desc, ek_desc, ev_desc, k_steps, v_steps, extra_b, keys, values,
                    per_kv, extra, HAS_EXTRA,
                )),
            ],
            [1, 1],
            [FETCH, FETCH],
        )  # fmt: skip
