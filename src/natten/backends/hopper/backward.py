"""Backward on Hopper in two passes without atomics, so that every run gives the same bits.

Both passes are one kernel: dQ is summed for tiles of queries over boxes of keys, dK and dV for
tiles of keys over boxes of queries. In both the tile is the left operand: S = Q K^T and dP = dO V^T
in the first, their transposes in the second. So the weights and dS, made in registers, stay there
as left operands of what is summed: dQ += dS K, or dK += dS^T Q and dV += P^T dO.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from .gluon_names import (
    aggregate,
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    reinterpret,
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
from .ring import Ring, ring

LN2 = gl.constexpr(0.6931471805599453)


@aggregate
class Inputs:
    """A ring of query and dO, or of key and value, that come together.

    With queries come their ``terms``, four numbers each: LSE in exponents of two, delta, zeros.
    """

    ring: Ring  # and its buffers: query or key
    other: gl.shared_memory_descriptor
    terms: gl.shared_memory_descriptor
    OF_QUERIES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, ring, other, terms, OF_QUERIES):
        self.ring, self.other, self.terms = ring, other, terms
        self.OF_QUERIES = gl.constexpr(OF_QUERIES)

    @gluon.jit
    def fill(self, i, a, b, terms, x, places):
        """Fetch the box from ``x`` on; ``places``: where it starts along the first axis."""
        TERMS: gl.constexpr = terms.block_type.nbytes if self.OF_QUERIES else 0
        self.ring.expect(i, a.block_type.nbytes + b.block_type.nbytes + TERMS)
        self.ring.load(i, a, [places[0], x[0], x[1], x[2], 0], self.ring.buffers)
        if self.OF_QUERIES:
            self.ring.load(i, terms, [places[2], x[0], x[1], x[2], 0], self.terms)
        self.ring.load(i, b, [places[1], x[0], x[1], x[2], 0], self.other)

    @gluon.jit
    def row_terms(self, i, LAYOUT: gl.constexpr):
        """LSE and delta of queries that are rows, ``[rows, 1]``."""
        ROWS: gl.constexpr = LAYOUT.warps_per_cta[0] * 16
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        four = reinterpret(self.terms.index(i % self.ring.STAGES), gl.float32, [ROWS, 4], flat)
        return four.slice(0, 1, 1).load(LAYOUT), four.slice(1, 1, 1).load(LAYOUT)

    @gluon.jit
    def column_term(self, i, WHICH: gl.constexpr, LAYOUT: gl.constexpr):
        """LSE (0) or delta (1) of queries that are columns, ``[1, columns]``."""
        COLUMNS: gl.constexpr = LAYOUT.instr_shape[1]
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
        four = reinterpret(self.terms.index(i % self.ring.STAGES), gl.float32, [4, COLUMNS], flat)
        return four.slice(WHICH, 1, 0).load(LAYOUT)


@gluon.jit
def _inputs(
    a, b, terms, STAGES: gl.constexpr, READERS: gl.constexpr, OF_QUERIES: gl.constexpr
):  # fmt: skip
    """Inputs as the descriptors have them, that many warpgroups read."""
    first = ring(a, STAGES, READERS)
    other = gl.allocate_shared_memory(b.dtype, [STAGES] + b.block_type.shape, b.layout)
    fours = other
    if OF_QUERIES:
        fours = gl.allocate_shared_memory(
            gl.float32, [STAGES] + terms.block_type.shape, terms.layout
        )
    return Inputs(first, other, fours, OF_QUERIES)


@gluon.jit
def _places(a_steps, b_steps, t_steps, batch, group, head):
    """Where a batch entry's head and dilation group begin in each tensor."""
    return (
        place(a_steps, batch, group, head),
        place(b_steps, batch, group, head),
        place(t_steps, batch, group, head),
    )


@gluon.jit
def _fetch_tiles(p, a, b, terms, a_steps, b_steps, t_steps, first, second):
    """Warp that fetches each warpgroup's tiles."""
    turn = 0
    for number in range(gl.program_id(0), p.total, gl.num_programs(0)):
        batch, head, group, f, _low, _boxes = p.tile(number)
        places = _places(a_steps, b_steps, t_steps, batch, group, head)
        gdc_wait()  # until the kernel before has ended; what comes first need not
        first.fill(turn, a, b, terms, p.part(f, 0), places)
        if p.GROUPS == 2:
            second.fill(turn, a, b, terms, p.part(f, 1), places)
        turn += 1  # noqa: SIM113


@gluon.jit
def _fetch_boxes(
    p, a, b, terms, more_a, more_b, a_steps, b_steps, t_steps, extra_b, boxes, per_kv, extra,
    HAS_EXTRA: gl.constexpr,
):  # fmt: skip
    """Warp that fetches the additional tokens, then boxes of each head that shares the tile's."""
    N: gl.constexpr = p.BOX[0] * p.BOX[1] * p.BOX[2]
    n = 0
    for number in range(gl.program_id(0), p.total, gl.num_programs(0)):
        batch, head, group, _f, low, counts = p.tile(number)
        if p.OF_KEYS:
            first_head, rounds = head * per_kv, per_kv
        else:
            first_head, rounds = head // per_kv, 1
        gdc_wait()
        if HAS_EXTRA:
            at = batch * extra_b + first_head
            for e in range(0, extra, N):
                boxes.fill(n, more_a, more_b, terms, (0, 0, e), (at, at, at))
                n += 1
        for h in range(first_head, first_head + rounds):
            places = _places(a_steps, b_steps, t_steps, batch, group, h)
            j = (n * 0, n * 0, n * 0)
            for _ in range(counts[0] * counts[1] * counts[2]):
                a0, a1, a2, _ = p.box(j, low)
                boxes.fill(n, a, b, terms, (a0, a1, a2), places)
                j = p.next(j, counts)
                n += 1
    gdc_launch_dependents()  # the next kernel can be set up, and waits for this one's end


@gluon.jit
def _step(
    p, j, n, f, low, a, b, acc_a, acc_b, ds, lse, delta, boxes, hidden_from, hidden_to, tables,
    bounds, factor,
    LATE: gl.constexpr, MASK: gl.constexpr, CODE: gl.constexpr, SCORES: gl.constexpr,
    GRADS: gl.constexpr,
):  # fmt: skip
    """Make dS of box ``n``; if ``LATE``, add that of the box before, ``ds``, in the meantime."""
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    M: gl.constexpr = p.TILE[0] * p.TILE[1] * p.TILE[2]
    N: gl.constexpr = p.BOX[0] * p.BOX[1] * p.BOX[2]
    DTYPE: gl.constexpr = boxes.other.dtype
    zeros = gl.zeros([M, N], gl.float32, SCORES)
    s = scores(p, j, n, a, boxes.ring, low, hidden_from, hidden_to, tables, MASK, CODE, SCORES)
    other = boxes.ring.matrix(n, N, boxes.other)
    if LATE:
        before = boxes.ring.matrix(n - 1, N, boxes.ring.buffers)
        acc_a = warpgroup_mma(ds, before, acc_a, is_async=True)
    if p.OF_KEYS:
        # dP comes later: registers do not suffice for all sums at once.
        s = warpgroup_mma_wait(1 if LATE else 0, deps=[s])
        lse = boxes.column_term(n, 0, SCORES)
    else:
        dp = warpgroup_mma(b, other.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(2 if LATE else 1, deps=[s])
    if MASK == COMPARE:  # noqa: SIM102 (decided when compiling)
        if not is_whole(p, j, f, low):
            ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
            b0, b1, b2 = bounds.index(0), bounds.index(1), bounds.index(2)
            starts = (b0.load(ROWS), b1.load(ROWS), b2.load(ROWS))
            b3, b4, b5 = bounds.index(3), bounds.index(4), bounds.index(5)
            ends = (b3.load(ROWS), b4.load(ROWS), b5.load(ROWS))
            s = compared(p, s, j, low, starts, ends)
    w = gl.exp2(s * factor - lse)
    if p.OF_KEYS:
        dp = warpgroup_mma(b, other.permute((1, 0)), zeros, use_acc=False, is_async=True)
        weights = gl.convert_layout(w.to(DTYPE), WEIGHTS)
        acc_b = warpgroup_mma(weights, other, acc_b, is_async=True)
        if LATE:
            acc_a, dp = warpgroup_mma_wait(1, deps=[acc_a, dp])
        else:
            dp = warpgroup_mma_wait(1, deps=[dp])
        delta = boxes.column_term(n, 1, SCORES)
    elif LATE:
        acc_a, dp = warpgroup_mma_wait(0, deps=[acc_a, dp])
    else:
        dp = warpgroup_mma_wait(0, deps=[dp])
    if LATE:
        boxes.ring.release(n - 1)
    return acc_a, acc_b, gl.convert_layout((w * (dp - delta)).to(DTYPE), WEIGHTS)


@gluon.jit
def _add(acc_a, acc_b, ds, n, boxes, N: gl.constexpr, OF_KEYS: gl.constexpr):
    """Add dS of box ``n``, and hand the box back."""
    box = boxes.ring.matrix(n, N, boxes.ring.buffers)
    acc_a = warpgroup_mma(ds, box, acc_a, is_async=True)
    if OF_KEYS:
        acc_a, acc_b = warpgroup_mma_wait(0, deps=[acc_a, acc_b])
    else:
        acc_a = warpgroup_mma_wait(0, deps=[acc_a])
    boxes.ring.release(n)
    return acc_a, acc_b


@gluon.jit
def _walk(
    p, n, f, low, counts, a, b, acc_a, acc_b, lse, delta, boxes, hidden_from, hidden_to, tables,
    bounds, factor,
    LATE: gl.constexpr, MASK: gl.constexpr, CODE: gl.constexpr, SCORES: gl.constexpr,
    GRADS: gl.constexpr,
):  # fmt: skip
    """Sum over a warpgroup's boxes, of which the ring's ``n``-th is the tile's first."""
    N: gl.constexpr = p.BOX[0] * p.BOX[1] * p.BOX[2]
    first, last, count, before = p.own(f, low, counts)
    for i in range(first):
        boxes.ring.skip(n + i)
    j = (before * 0, before * 0, before)
    if LATE:
        acc_a, acc_b, ds = _step(
            p, j, n + first, f, low, a, b, acc_a, acc_b, 0, lse, delta, boxes, hidden_from,
            hidden_to, tables, bounds, factor, False, MASK, CODE, SCORES, GRADS,
        )  # fmt: skip
        for i in range(first + 1, last):
            if p.OF_KEYS:
                acc_b = warpgroup_mma_wait(0, deps=[acc_b])
            j = p.next(j, counts)
            acc_a, acc_b, ds = _step(
                p, j, n + i, f, low, a, b, acc_a, acc_b, ds, lse, delta, boxes, hidden_from,
                hidden_to, tables, bounds, factor, True, MASK, CODE, SCORES, GRADS,
            )  # fmt: skip
        acc_a, acc_b = _add(acc_a, acc_b, ds, n + last - 1, boxes, N, p.OF_KEYS)
    else:
        for i in range(first, last):
            acc_a, acc_b, ds = _step(
                p, j, n + i, f, low, a, b, acc_a, acc_b, 0, lse, delta, boxes, hidden_from,
                hidden_to, tables, bounds, factor, False, MASK, CODE, SCORES, GRADS,
            )  # fmt: skip
            acc_a, acc_b = _add(acc_a, acc_b, ds, n + i, boxes, N, p.OF_KEYS)
            j = p.next(j, counts)
    for i in range(last, count):
        boxes.ring.skip(n + i)
    return acc_a, acc_b


@gluon.jit
def _sum(
    p, grad_a, grad_b, g_steps, out_a, out_b, tile, boxes, tables, bounds, per_kv, extra, factor,
    HALF: gl.constexpr, MASK: gl.constexpr, CODE: gl.constexpr, BY_ROW: gl.constexpr,
    STEPS: gl.constexpr, HAS_EXTRA: gl.constexpr, OWN_OUT: gl.constexpr,
):  # fmt: skip
    """Warpgroup that makes the gradients of 64 tokens of each tile, the ``HALF``-th ones."""
    M: gl.constexpr = p.TILE[0] * p.TILE[1] * p.TILE[2]
    N: gl.constexpr = p.BOX[0] * p.BOX[1] * p.BOX[2]
    D: gl.constexpr = grad_a.block_type.shape[4]
    DTYPE: gl.constexpr = grad_a.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    # Adding late takes registers, which two sums of 128 channels leave none of.
    LATE: gl.constexpr = not p.OF_KEYS or D < 128
    turn = 0
    n = 0  # boxes that went through the ring
    for number in range(gl.program_id(0), p.total, gl.num_programs(0)):
        batch, head, group, f, low, counts = p.tile(number)
        f = p.part(f, HALF)
        hidden_from, hidden_to = 0, 0
        if MASK == PRODUCT:
            left: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
            hidden_from, hidden_to = hidden_bounds(p, f, low, CODE, BY_ROW, STEPS, left)
        if MASK == COMPARE:
            # In shared memory, for want of registers.
            i0, i1, i2 = p.tokens(f, SCORES)
            s0, e0 = p.partners(i0, 0)
            s1, e1 = p.partners(i1, 1)
            s2, e2 = p.partners(i2, 2)
            bounds.index(0).store(s0)
            bounds.index(1).store(s1)
            bounds.index(2).store(s2)
            bounds.index(3).store(e0)
            bounds.index(4).store(e1)
            bounds.index(5).store(e2)

        acc_a = gl.zeros([M, D], gl.float32, GRADS)
        acc_b = gl.zeros([M, D], gl.float32, GRADS) if p.OF_KEYS else acc_a
        a = tile.ring.wait(turn, M)
        b = tile.ring.matrix(turn, M, tile.other)
        lse, delta = 0.0, 0.0
        if not p.OF_KEYS:
            # Rows that are no query have zeros, and gradients that nobody reads.
            lse, delta = tile.row_terms(turn, SCORES)
        if HAS_EXTRA:
            for at in range(0, extra, N):
                zeros = gl.zeros([M, N], gl.float32, SCORES)
                s = scores(p, 0, n, a, boxes.ring, low, 0, 0, tables, NONE, CODE, SCORES)
                other = boxes.ring.matrix(n, N, boxes.other)
                dp = warpgroup_mma(b, other.permute((1, 0)), zeros, use_acc=False, is_async=True)
                s, dp = warpgroup_mma_wait(0, deps=[s, dp])
                c = gl.arange(0, N, gl.SliceLayout(0, SCORES))
                w = gl.exp2(gl.where((at + c < extra)[None, :], s, HUGE) * factor - lse)
                ds = gl.convert_layout(
                    (w * (dp - delta)).to(DTYPE), gl.DotOperandLayout(0, GRADS, 2)
                )
                acc_a = warpgroup_mma(ds, boxes.ring.matrix(n, N, boxes.ring.buffers), acc_a)
                boxes.ring.release(n)
                n += 1
        count = counts[0] * counts[1] * counts[2]
        # Of keys: the query heads that share a key head follow one another.
        for _ in range(per_kv if p.OF_KEYS else 1):
            acc_a, acc_b = _walk(
                p, n, f, low, counts, a, b, acc_a, acc_b, lse, delta, boxes, hidden_from,
                hidden_to, tables, bounds, factor, LATE, MASK, CODE, SCORES, GRADS,
            )  # fmt: skip
            n += count
        if OWN_OUT:
            tile.ring.release(turn)

        store_wait(0)  # the tile before has left
        out_a.reshape([M, D]).store((acc_a * (factor * LN2)).to(DTYPE))
        if p.OF_KEYS:
            out_b.reshape([M, D]).store(acc_b.to(DTYPE))
        fence_async_shared()
        at = place(g_steps, batch, group, head)
        store_box(grad_a, [at, f[0], f[1], f[2], 0], out_a)
        if p.OF_KEYS:
            store_box(grad_b, [at, f[0], f[1], f[2], 0], out_b)
        if not OWN_OUT:
            store_wait(0)
            tile.ring.release(turn)
        turn += 1  # noqa: SIM113
    store_wait(0)


@gluon.jit
def _out(tile, descriptor, OWN_OUT: gl.constexpr):
    """Where a warpgroup's gradients wait to be stored: for want of room in the tile's place."""
    a, b = tile.ring.buffers.index(0), tile.other.index(0)
    if OWN_OUT:
        shape: gl.constexpr = descriptor.block_type.shape
        a = gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)
        if not tile.OF_QUERIES:
            b = gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)
    return a, b


# Compiled once for all of them, whatever divides them.
_NUMBERS = """
oa_b oa_0 oa_1 oa_2 oa_h ob_b ob_0 ob_1 ob_2 ob_h ia_b ia_0 ia_1 ia_2 ia_h ib_b ib_0 ib_1 ib_2
ib_h t_b t_0 t_1 t_2 t_h g_b g_0 g_1 extra_b N0 N1 N2 K0 K1 K2 S0 S1 S2 D0 D1 D2 T0 T1 T2
total heads per_kv extra factor
""".split()  # noqa: SIM905


@gluon.jit(do_not_specialize=_NUMBERS)
def pass_kernel(
    outer_a, outer_b, inner_a, inner_b, terms, more_a, more_b, grad_a, grad_b,
    oa_b, oa_0, oa_1, oa_2, oa_h, ob_b, ob_0, ob_1, ob_2, ob_h,
    ia_b, ia_0, ia_1, ia_2, ia_h, ib_b, ib_0, ib_1, ib_2, ib_h,
    t_b, t_0, t_1, t_2, t_h, g_b, g_0, g_1, extra_b,
    N0, N1, N2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, total, heads, per_kv, extra, factor,
    MODES: gl.constexpr, TILE: gl.constexpr, BOX: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, MASK: gl.constexpr, CODE: gl.constexpr, BY_ROW: gl.constexpr,
    STEPS: gl.constexpr, TABLES: gl.constexpr, HAS_EXTRA: gl.constexpr, OWN_OUT: gl.constexpr,
    REGISTERS: gl.constexpr, FETCH: gl.constexpr, GROUPS: gl.constexpr, DILATED: gl.constexpr,
    OF_KEYS: gl.constexpr,
):  # fmt: skip
    """One pass: dQ, or with ``OF_KEYS`` dK and dV.

    Tiles come from ``outer_a`` and ``outer_b`` (query and dO; key and value), boxes from
    ``inner_a`` and ``inner_b`` (key and value; query and dO); ``grad_a`` and ``grad_b`` take the
    gradients. Numbers are as in the forward kernel: steps of :func:`place` (``oa`` .. ``g``),
    positions ``N`` of a dilation group, window ``K``, stride ``S``, dilation ``D``, tiles ``T``,
    per axis; ``total`` tiles of all batches, ``heads`` of the tiles, and groups.
    """
    p = Problem(
        (N0, N1, N2), (K0, K1, K2), (S0, S1, S2), (D0, D1, D2), (T0, T1, T2), total, heads,
        MODES, TILE, BOX, SPLIT, GROUPS, DILATED, OF_KEYS,
    )  # fmt: skip
    oa_steps, ob_steps, g_steps = (
        (oa_b, oa_0, oa_1, oa_2, oa_h),
        (ob_b, ob_0, ob_1, ob_2, ob_h),
        (g_b, g_0, g_1, heads, 1),
    )
    ia_steps, ib_steps, t_steps = (
        (ia_b, ia_0, ia_1, ia_2, ia_h),
        (ib_b, ib_0, ib_1, ib_2, ib_h),
        (t_b, t_0, t_1, t_2, t_h),
    )
    boxes = _inputs(inner_a, inner_b, terms, STAGES, GROUPS, OF_KEYS)
    first = _inputs(outer_a, outer_b, terms, 1, 1, not OF_KEYS)
    out_a, out_b = _out(first, grad_a, OWN_OUT)
    tables = column_tables(p, out_a, MASK, CODE, BY_ROW, STEPS, TABLES)
    bounds = tables
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    if MASK == COMPARE:
        bounds = gl.allocate_shared_memory(gl.int32, [6, 64], FLAT)
    if GROUPS == 2:
        second = _inputs(outer_a, outer_b, terms, 1, 1, not OF_KEYS)
        out2_a, out2_b = _out(second, grad_a, OWN_OUT)
        bounds2 = bounds
        if MASK == COMPARE:
            bounds2 = gl.allocate_shared_memory(gl.int32, [6, 64], FLAT)
        gl.warp_specialize(
            [
                (_sum, (
                    p, grad_a, grad_b, g_steps, out_a, out_b, first, boxes, tables, bounds,
                    per_kv, extra, factor, 0, MASK, CODE, BY_ROW, STEPS, HAS_EXTRA, OWN_OUT,
                )),
                (_sum, (
                    p, grad_a, grad_b, g_steps, out2_a, out2_b, second, boxes, tables, bounds2,
                    per_kv, extra, factor, 1, MASK, CODE, BY_ROW, STEPS, HAS_EXTRA, OWN_OUT,
                )),
                (_fetch_tiles, (
                    p, outer_a, outer_b, terms, oa_steps, ob_steps, t_steps, first, second,
                )),
                (_fetch_boxes, (
                    p, inner_a, inner_b, terms, more_a, more_b, ia_steps, ib_steps, t_steps,
                    extra_b, boxes, per_kv, extra, HAS_EXTRA,
                )),
            ],
            [4, 1, 1],
            [REGISTERS, FETCH, FETCH],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_sum, (
                    p, grad_a, grad_b, g_steps, out_a, out_b, first, boxes, tables, bounds,
                    per_kv, extra, factor, 0, MASK, CODE, BY_ROW, STEPS, HAS_EXTRA, OWN_OUT,
                )),
                (_fetch_tiles, (
                    p, outer_a, outer_b, terms, oa_steps, ob_steps, t_steps, first, first,
                )),
                (_fetch_boxes, (
                    p, inner_a, inner_b, terms, more_a, more_b, ia_steps, ib_steps, t_steps,
                    extra_b, boxes, per_kv, extra, HAS_EXTRA,
                )),
            ],
            [1, 1],
            [FETCH, FETCH],
        )  # fmt: skip
