"""Forward on Hopper: boxes by TMA, products by wgmma, two warps that fetch, one or two warpgroups.

A program takes tiles of queries in turn, so that the next tile is fetched while this one ends. A
warpgroup has 64 queries of a tile; two are neighbors along axis ``SPLIT``. Keys and values come in
boxes from the tile's first window on, ``SPLIT`` outermost: the boxes that one warpgroup attends
follow one another, the others it hands back unread.

With ``PRODUCT``, a mask is one more step of the product Q K^T: per axis, one factor says which
positions of the box a row must not see, the other which position a key has, and their product is
0 or about -2^100. Where that takes too many columns, ``COMPARE`` looks at every score of a box
that some row does not attend whole.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from natten.backends.hopper.gluon_names import (
    aggregate,
    fence_async_shared,
    from_triton,
    gl,
    gluon,
    store_box,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from natten.backends.hopper.ring import ring
from natten.backends.triton import primitives

NONE = gl.constexpr(0)
COMPARE = gl.constexpr(1)
PRODUCT = gl.constexpr(2)

# What a masked score is lowered to or by. Finite, so that a row that has seen only masked keys
# stays finite; what it summed is erased by the first real score.
HUGE = gl.constexpr(-(2.0**100))
ROOT = gl.constexpr(2.0**50)
LN2 = gl.constexpr(0.6931471805599453)
FAR = gl.constexpr(1 << 30)

window = from_triton(primitives.window)


@gluon.jit
def _digit(number, base, ONE: gl.constexpr):
    """Last digit of a number, and the others; ``ONE``: the base is 1."""
    if ONE:
        return number * 0, number
    else:
        return number % base, number // base


@aggregate
class Problem:
    """Sizes of a call per axis, tuples of three: positions of a dilation group, window, stride,
    dilation, tiles; and what the kernel is compiled for."""

    length: gl.tuple
    window: gl.tuple
    stride: gl.tuple
    dilation: gl.tuple
    tiles: gl.tuple
    total: gl.tensor  # tiles of all heads
    heads: gl.tensor
    MODES: gl.constexpr
    WQ: gl.constexpr
    TK: gl.constexpr
    SPLIT: gl.constexpr
    GROUPS: gl.constexpr
    DILATED: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, length, window, stride, dilation, tiles, total, heads,
        MODES, WQ, TK, SPLIT, GROUPS, DILATED,
    ):  # fmt: skip
        self.length, self.window, self.stride = length, window, stride
        self.dilation, self.tiles = dilation, tiles
        self.total, self.heads = total, heads
        self.MODES, self.WQ, self.TK = gl.constexpr(MODES), gl.constexpr(WQ), gl.constexpr(TK)
        self.SPLIT, self.GROUPS = gl.constexpr(SPLIT), gl.constexpr(GROUPS)
        self.DILATED = gl.constexpr(DILATED)

    @gluon.jit
    def windows(self, i, AXIS: gl.constexpr):
        """First and one-past-last key of queries ``i`` of an axis; past the end, of the last."""
        n = self.length[AXIS]
        i = gl.minimum(i, n - 1)
        return window(i, n, n, self.window[AXIS], self.stride[AXIS], self.MODES[AXIS])

    @gluon.jit
    def axis(self, t, AXIS: gl.constexpr):
        """First query, first key and boxes of tile ``t`` of an axis."""
        SIZE: gl.constexpr = self.WQ[AXIS] * (self.GROUPS if self.SPLIT == AXIS else 1)
        first = t * SIZE
        low, _ = self.windows(first, AXIS)
        _, high = self.windows(first + SIZE - 1, AXIS)
        return first, low, (high - low + self.TK[AXIS] - 1) // self.TK[AXIS]

    @gluon.jit
    def tile(self, number):
        """Batch, head, dilation group, and per axis first query, first key and boxes of a tile."""
        UNIT: gl.constexpr = primitives.UNIT
        t2, rest = _digit(number, self.tiles[2], self.MODES[2] == UNIT)
        t1, rest = _digit(rest, self.tiles[1], self.MODES[1] == UNIT)
        t0, rest = _digit(rest, self.tiles[0], self.MODES[0] == UNIT)
        g2, rest = _digit(rest, self.dilation[2], not self.DILATED)
        g1, rest = _digit(rest, self.dilation[1], not self.DILATED)
        g0, rest = _digit(rest, self.dilation[0], not self.DILATED)
        f0, low0, b0 = self.axis(t0, 0)
        f1, low1, b1 = self.axis(t1, 1)
        f2, low2, b2 = self.axis(t2, 2)
        batch, head = rest // self.heads, rest % self.heads
        return batch, head, (g0, g1, g2), (f0, f1, f2), (low0, low1, low2), (b0, b1, b2)

    @gluon.jit
    def box(self, j, low):
        """First position of the ``j``-th box of a tile, and its number along the last axis.

        ``j`` counts along three axes, the fastest first; ``SPLIT`` is the slowest.
        """
        if self.SPLIT == 0:
            j0, j1, j2 = j[2], j[1], j[0]
        elif self.SPLIT == 1:
            j0, j1, j2 = j[1], j[2], j[0]
        else:
            j0, j1, j2 = j[1], j[0], j[2]
        TK: gl.constexpr = self.TK
        return low[0] + j0 * TK[0], low[1] + j1 * TK[1], low[2] + j2 * TK[2], j2

    @gluon.jit
    def next(self, j, boxes):
        """The box after ``j``: divisions would cost as much as a softmax."""
        fast = boxes[1 if self.SPLIT == 2 else 2]
        middle = boxes[1 if self.SPLIT == 0 else 0]
        j0 = j[0] + 1
        j1 = gl.where(j0 == fast, j[1] + 1, j[1])
        j2 = gl.where(j1 == middle, j[2] + 1, j[2])
        return gl.where(j0 == fast, 0, j0), gl.where(j1 == middle, 0, j1), j2

    @gluon.jit
    def part(self, f, HALF: gl.constexpr):
        """First query of a warpgroup, per axis."""
        f0 = f[0] + (HALF * self.WQ[0] if self.SPLIT == 0 else 0)
        f1 = f[1] + (HALF * self.WQ[1] if self.SPLIT == 1 else 0)
        f2 = f[2] + (HALF * self.WQ[2] if self.SPLIT == 2 else 0)
        return f0, f1, f2

    @gluon.jit
    def reach(self, f, AXIS: gl.constexpr):
        """Of the queries of a warpgroup from ``f`` on: what any attends, and what all attend.

        Windows move monotonically, so the first and the last query bound both.
        """
        first, inner_last = self.windows(f[AXIS], AXIS)
        inner_first, last = self.windows(f[AXIS] + self.WQ[AXIS] - 1, AXIS)
        return first, last, inner_first, inner_last


@gluon.jit
def _channel(steps, group, head):
    """Where a head and a dilation group begin in the last axis of a descriptor."""
    return group[0] * steps[0] + group[1] * steps[1] + group[2] * steps[2] + head * steps[3]


@gluon.jit
def _fetch_queries(p, descriptor, steps, first, second):
    """Warp that fetches each warpgroup's queries."""
    turn = 0
    for number in range(gl.program_id(0), p.total, gl.num_programs(0)):
        batch, head, group, f, _low, _boxes = p.tile(number)
        c = _channel(steps, group, head)
        f0, f1, f2 = p.part(f, 0)
        first.fill(turn, descriptor, [batch, f0, f1, f2, c])
        if p.GROUPS == 2:
            f0, f1, f2 = p.part(f, 1)
            second.fill(turn, descriptor, [batch, f0, f1, f2, c])
        turn += 1  # noqa: SIM113


@gluon.jit
def _fetch_boxes(
    p, k_desc, v_desc, ek_desc, ev_desc, k_steps, v_steps, ek_h, ev_h, keys, values, per_kv, extra,
    HAS_EXTRA: gl.constexpr,
):  # fmt: skip
    """Warp that fetches the additional tokens, then boxes of keys and values."""
    N: gl.constexpr = p.TK[0] * p.TK[1] * p.TK[2]
    n = 0
    for number in range(gl.program_id(0), p.total, gl.num_programs(0)):
        batch, head, group, _f, low, boxes = p.tile(number)
        kv = head // per_kv
        if HAS_EXTRA:
            for at in range(0, extra, N):
                keys.fill(n, ek_desc, [batch, 0, 0, at, kv * ek_h])
                values.fill(n, ev_desc, [batch, 0, 0, at, kv * ev_h])
                n += 1
        k_c, v_c = _channel(k_steps, group, kv), _channel(v_steps, group, kv)
        j = (n * 0, n * 0, n * 0)
        for _ in range(boxes[0] * boxes[1] * boxes[2]):
            a0, a1, a2, _ = p.box(j, low)
            keys.fill(n, k_desc, [batch, a0, a1, a2, k_c])
            values.fill(n, v_desc, [batch, a0, a1, a2, v_c])
            j = p.next(j, boxes)
            n += 1


@gluon.jit
def _hidden_bounds(
    p, f, low, CODE: gl.constexpr, BY_ROW: gl.constexpr, STEPS: gl.constexpr, LEFT: gl.constexpr
):
    """The rows' factor of a ``PRODUCT`` mask: hidden unless a box starts in ``from .. to``.

    Column ``c`` of an axis stands for position ``c`` of a box along it. With ``BY_ROW``, the last
    axis's columns stand for where a row's window starts, and each row is hidden at its own.
    """
    i0, i1, i2 = _queries(p, f, LEFT)
    c = gl.arange(0, STEPS * 16, gl.SliceLayout(0, LEFT))[None, :]
    s0, e0 = p.windows(i0, 0)
    s1, e1 = p.windows(i1, 1)
    s2, e2 = p.windows(i2, 2)
    if BY_ROW:
        from2 = gl.where((s2 - low[2])[:, None] == c - CODE[1], FAR, -FAR)
        to2 = gl.full(from2.shape, FAR, gl.int32, LEFT)
    else:
        from2, to2 = s2[:, None] - (c - CODE[1]), e2[:, None] - (c - CODE[1])
    from1, to1 = s1[:, None] - (c - CODE[0]), e1[:, None] - (c - CODE[0])
    from0, to0 = s0[:, None] - c, e0[:, None] - c
    first = gl.where(c < CODE[1], from1, gl.where(c < CODE[2], from2, -FAR))
    last = gl.where(c < CODE[1], to1, gl.where(c < CODE[2], to2, FAR))
    return gl.where(c < CODE[0], from0, first), gl.where(c < CODE[0], to0, last)


@gluon.jit
def _key_factor(
    p, j2, CODE: gl.constexpr, BY_ROW: gl.constexpr, STEPS: gl.constexpr, LAYOUT: gl.constexpr
):
    """The keys' factor: -2^50 at each key's own position of every axis.

    With ``BY_ROW``, of box ``j2`` of the last axis: where the windows that start at a column's
    place do not have the key.
    """
    TK: gl.constexpr = p.TK
    k = gl.arange(0, TK[0] * TK[1] * TK[2], gl.SliceLayout(1, LAYOUT))[:, None]
    c = gl.arange(0, STEPS * 16, gl.SliceLayout(0, LAYOUT))[None, :]
    start = c - CODE[1]
    if BY_ROW:
        at = j2 * TK[2] + k % TK[2]
        own2 = (at < start) | (at >= start + p.window[2])
    else:
        own2 = k % TK[2] == start
    own1 = k // TK[2] % TK[1] == c - CODE[0]
    own0 = k // (TK[1] * TK[2]) == c
    own = gl.where(c < CODE[0], own0, gl.where(c < CODE[1], own1, own2 & (c < CODE[2])))
    return gl.where(own, -ROOT, 0.0).to(gl.bfloat16)


@gluon.jit
def _queries(p, f, LAYOUT: gl.constexpr):
    """Queries of a warpgroup's rows, per axis; they may be past the end."""
    WQ: gl.constexpr = p.WQ
    r = gl.arange(0, WQ[0] * WQ[1] * WQ[2], gl.SliceLayout(1, LAYOUT))
    return f[0] + r // (WQ[1] * WQ[2]), f[1] + r // WQ[2] % WQ[1], f[2] + r % WQ[2]


@gluon.jit
def _scores(
    p, j, n, q, keys, low, hidden_from, hidden_to, tables,
    MASK: gl.constexpr, CODE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Start Q K^T of box ``j``, the ``n``-th of the ring, masked if ``MASK`` is ``PRODUCT``."""
    N: gl.constexpr = p.TK[0] * p.TK[1] * p.TK[2]
    M: gl.constexpr = q.shape[0]
    s = gl.zeros([M, N], gl.float32, LAYOUT)
    if MASK == PRODUCT:
        a0, a1, a2, j2 = p.box(j, low)
        left: gl.constexpr = hidden_from.type.layout
        c = gl.arange(0, hidden_from.shape[1], gl.SliceLayout(0, left))
        at = gl.where(c < CODE[0], a0, gl.where(c < CODE[1], a1, a2))[None, :]
        factor = gl.where((at < hidden_from) | (at >= hidden_to), ROOT, 0.0).to(gl.bfloat16)
        table = tables.index(j2 if tables.shape[0] > 1 else 0)
        k = keys.wait(n, N)
        s = warpgroup_mma(factor, table.permute((1, 0)), s, use_acc=False, is_async=True)
        s = warpgroup_mma(q, k.permute((1, 0)), s, is_async=True)
    else:
        k = keys.wait(n, N)
        s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=False, is_async=True)
    return s


@gluon.jit
def _compare(p, s, j, f, low, starts, ends):
    """Scores of box ``j``, those outside their row's window lowered to almost nothing."""
    TK: gl.constexpr = p.TK
    a0, a1, a2, _ = p.box(j, low)
    _, _, from0, to0 = p.reach(f, 0)
    _, _, from1, to1 = p.reach(f, 1)
    _, _, from2, to2 = p.reach(f, 2)
    whole = (a0 >= from0) & (a0 + TK[0] <= to0) & (a1 >= from1) & (a1 + TK[1] <= to1)
    whole = whole & (a2 >= from2) & (a2 + TK[2] <= to2)
    if not whole:
        c = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        if p.MODES[0] != primitives.UNIT:
            at = (a0 + c // (TK[1] * TK[2]))[None, :]
            s = gl.where((at >= starts[0][:, None]) & (at < ends[0][:, None]), s, HUGE)
        if p.MODES[1] != primitives.UNIT:
            at = (a1 + c // TK[2] % TK[1])[None, :]
            s = gl.where((at >= starts[1][:, None]) & (at < ends[1][:, None]), s, HUGE)
        if p.MODES[2] != primitives.UNIT:
            at = (a2 + c % TK[2])[None, :]
            s = gl.where((at >= starts[2][:, None]) & (at < ends[2][:, None]), s, HUGE)
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
    p, o_desc, o_steps, out, lse, l_steps, queries, keys, values, tables, extra, factor,
    HALF: gl.constexpr, MASK: gl.constexpr, CODE: gl.constexpr, BY_ROW: gl.constexpr,
    STEPS: gl.constexpr, HAS_EXTRA: gl.constexpr, OWN_OUT: gl.constexpr,
):  # fmt: skip
    """Warpgroup that computes the attention of 64 queries of each tile, the ``HALF``-th ones."""
    M: gl.constexpr = p.WQ[0] * p.WQ[1] * p.WQ[2]
    N: gl.constexpr = p.TK[0] * p.TK[1] * p.TK[2]
    DV: gl.constexpr = o_desc.block_type.shape[4]
    DTYPE: gl.constexpr = o_desc.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    SPLIT: gl.constexpr = p.SPLIT
    turn = 0
    n = 0  # boxes that went through the rings
    for number in range(gl.program_id(0), p.total, gl.num_programs(0)):
        batch, head, group, f, low, boxes = p.tile(number)
        f = p.part(f, HALF)
        count = boxes[0] * boxes[1] * boxes[2]
        attended_from, attended_to, _, _ = p.reach(f, SPLIT)
        layer = count // boxes[SPLIT]
        before = (attended_from - low[SPLIT]) // p.TK[SPLIT]
        first = before * layer
        last = (attended_to - low[SPLIT] + p.TK[SPLIT] - 1) // p.TK[SPLIT] * layer

        i0, i1, i2 = _queries(p, f, SCORES)
        s0, e0 = p.windows(i0, 0)
        s1, e1 = p.windows(i1, 1)
        s2, e2 = p.windows(i2, 2)
        starts, ends = (s0, s1, s2), (e0, e1, e2)
        hidden_from, hidden_to = 0, 0
        if MASK == PRODUCT:
            left: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
            hidden_from, hidden_to = _hidden_bounds(p, f, low, CODE, BY_ROW, STEPS, left)

        acc = gl.zeros([M, DV], gl.float32, ACC)
        top = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([M], gl.float32, gl.SliceLayout(1, SCORES))
        q = queries.wait(turn, M)
        if HAS_EXTRA:
            for at in range(0, extra, N):
                s = _scores(p, 0, n, q, keys, low, 0, 0, tables, NONE, CODE, SCORES)
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
        j = (layer * 0, layer * 0, before)
        s = _scores(
            p, j, n + first, q, keys, low, hidden_from, hidden_to, tables, MASK, CODE, SCORES
        )
        s = warpgroup_mma_wait(0, deps=[s])
        keys.release(n + first)
        if MASK == COMPARE:
            s = _compare(p, s, j, f, low, starts, ends)
        weights, top, total, by = _softmax(s, top, total, factor, ACC, DTYPE)
        if HAS_EXTRA:
            acc = _scaled(acc, by)
        # While the softmax of a box is computed, the values of the box before it are added.
        for i in range(first + 1, last):
            j = p.next(j, boxes)
            s = _scores(
                p, j, n + i, q, keys, low, hidden_from, hidden_to, tables, MASK, CODE, SCORES
            )
            acc = _add(acc, weights, n + i - 1, values)
            s = warpgroup_mma_wait(1, deps=[s])
            keys.release(n + i)
            if MASK == COMPARE:
                s = _compare(p, s, j, f, low, starts, ends)
            weights, top, total, by = _softmax(s, top, total, factor, ACC, DTYPE)
            acc = warpgroup_mma_wait(0, deps=[acc])
            values.release(n + i - 1)
            acc = _scaled(acc, by)
        if OWN_OUT:
            queries.release(turn)
        acc = _add(acc, weights, n + last - 1, values)
        acc = warpgroup_mma_wait(0, deps=[acc])
        values.release(n + last - 1)
        for i in range(last, count):
            keys.skip(n + i)
            values.skip(n + i)

        store_wait(0)  # the tile before has left ``out``
        out.reshape([M, DV]).store(_scaled(acc, 1.0 / total).to(DTYPE))
        fence_async_shared()
        store_box(o_desc, [batch, f[0], f[1], f[2], _channel(o_steps, group, head)], out)
        if not OWN_OUT:
            store_wait(0)
            queries.release(turn)
        # A batch entry with 2^31 rows would not fit the memory.
        row = (i0 * p.dilation[0] + group[0]) * l_steps[1] + head
        row += (i1 * p.dilation[1] + group[1]) * l_steps[2]
        row += (i2 * p.dilation[2] + group[2]) * p.heads
        real = (i0 < p.length[0]) & (i1 < p.length[1]) & (i2 < p.length[2])
        entry = lse + batch.to(gl.int64) * l_steps[0]
        gl.store(entry + row, (top + gl.log2(total)) * LN2, mask=real)
        n += count
        turn += 1  # noqa: SIM113
    store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "N0", "N1", "N2", "K0", "K1", "K2", "S0", "S1", "S2", "D0", "D1", "D2", "T0", "T1", "T2",
        "total", "heads", "per_kv", "extra", "factor",
        "q_0", "q_1", "q_2", "q_h", "k_0", "k_1", "k_2", "k_h", "v_0", "v_1", "v_2", "v_h",
        "o_0", "o_1", "o_2", "o_h", "ek_h", "ev_h", "l_b", "l_0", "l_1",
    ]
)  # fmt: skip
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, ek_desc, ev_desc, lse,
    q_0, q_1, q_2, q_h, k_0, k_1, k_2, k_h, v_0, v_1, v_2, v_h, o_0, o_1, o_2, o_h, ek_h, ev_h,
    l_b, l_0, l_1, N0, N1, N2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2,
    total, heads, per_kv, extra, factor,
    MODES: gl.constexpr, WQ: gl.constexpr, TK: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, MASK: gl.constexpr, CODE: gl.constexpr, BY_ROW: gl.constexpr,
    STEPS: gl.constexpr, TABLES: gl.constexpr, HAS_EXTRA: gl.constexpr, OWN_OUT: gl.constexpr,
    REGISTERS: gl.constexpr, FETCH: gl.constexpr, GROUPS: gl.constexpr, DILATED: gl.constexpr,
):  # fmt: skip
    """Strides ``x_a`` of one token, positions ``N`` of a dilation group, window ``K``, stride
    ``S``, dilation ``D``, tiles ``T``, per axis; ``total`` tiles of all batches, heads and groups.

    A descriptor's last axis spans one batch entry, so that a head and a dilation group are an
    offset in it; its other axes are batch and positions inside the group.
    """
    p = Problem(
        (N0, N1, N2), (K0, K1, K2), (S0, S1, S2), (D0, D1, D2), (T0, T1, T2), total, heads,
        MODES, WQ, TK, SPLIT, GROUPS, DILATED,
    )  # fmt: skip
    o_steps, l_steps = (o_0, o_1, o_2, o_h), (l_b, l_0, l_1)
    keys = ring(k_desc, STAGES, GROUPS)
    values = ring(v_desc, STAGES, GROUPS)
    first = ring(q_desc, 1, 1)
    out = first.buffers.index(0)
    if OWN_OUT:
        out = gl.allocate_shared_memory(o_desc.dtype, o_desc.block_type.shape, o_desc.layout)
    tables = out
    if MASK == PRODUCT:
        N: gl.constexpr = TK[0] * TK[1] * TK[2]
        TABLE: gl.constexpr = gl.NVMMASharedLayout(32 * STEPS, 16, 2)
        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [16 // STEPS, 2 * STEPS], [4, 1], [1, 0])
        tables = gl.allocate_shared_memory(gl.bfloat16, [TABLES, N, 16 * STEPS], TABLE)
        for j in gl.static_range(TABLES):
            tables.index(j).store(_key_factor(p, j, CODE, BY_ROW, STEPS, ROWS))
        fence_async_shared()
    if GROUPS == 2:
        second = ring(q_desc, 1, 1)
        out2 = second.buffers.index(0)
        if OWN_OUT:
            out2 = gl.allocate_shared_memory(o_desc.dtype, o_desc.block_type.shape, o_desc.layout)
        gl.warp_specialize(
            [
                (_attend, (
                    p, o_desc, o_steps, out, lse, l_steps, first, keys, values, tables, extra,
                    factor, 0, MASK, CODE, BY_ROW, STEPS, HAS_EXTRA, OWN_OUT,
                )),
                (_attend, (
                    p, o_desc, o_steps, out2, lse, l_steps, second, keys, values, tables, extra,
                    factor, 1, MASK, CODE, BY_ROW, STEPS, HAS_EXTRA, OWN_OUT,
                )),
                (_fetch_queries, (p, q_desc, (q_0, q_1, q_2, q_h), first, second)),
                (_fetch_boxes, (
                    p, k_desc, v_desc, ek_desc, ev_desc, (k_0, k_1, k_2, k_h), (v_0, v_1, v_2, v_h),
                    ek_h, ev_h, keys, values, per_kv, extra, HAS_EXTRA,
                )),
            ],
            [4, 1, 1],
            [REGISTERS, FETCH, FETCH],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    p, o_desc, o_steps, out, lse, l_steps, first, keys, values, tables, extra,
                    factor, 0, MASK, CODE, BY_ROW, STEPS, HAS_EXTRA, OWN_OUT,
                )),
                (_fetch_queries, (p, q_desc, (q_0, q_1, q_2, q_h), first, first)),
                (_fetch_boxes, (
                    p, k_desc, v_desc, ek_desc, ev_desc, (k_0, k_1, k_2, k_h), (v_0, v_1, v_2, v_h),
                    ek_h, ev_h, keys, values, per_kv, extra, HAS_EXTRA,
                )),
            ],
            [1, 1],
            [FETCH, FETCH],
        )  # fmt: skip
