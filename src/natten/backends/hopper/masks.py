"""Masks of scores: what lies in a box but is no partner of a row.

With ``PRODUCT``, a mask is one more step of the product that gives the scores: per axis, one factor
says which positions of the box a row must not see, the other which position a column has, and their
product is 0 or about -2^100. Where that takes too many columns, ``COMPARE`` looks at every score of
a box that is not whole.
"""

from ..triton import primitives
from .gluon_names import fence_async_shared, gl, gluon, warpgroup_mma

NONE = gl.constexpr(0)
COMPARE = gl.constexpr(1)
PRODUCT = gl.constexpr(2)

# What a masked score is lowered to or by, up to three times. Finite, and its multiples by the scale
# are exact (the host sees to it), so that a row that has seen only masked columns has weights of
# one; what it summed is erased by the first real score.
HUGE = gl.constexpr(-(2.0**100))
ROOT = gl.constexpr(2.0**50)
FAR = gl.constexpr(1 << 30)


@gluon.jit
def hidden_bounds(
    p, f, low, CODE: gl.constexpr, BY_ROW: gl.constexpr, STEPS: gl.constexpr, LEFT: gl.constexpr
):
    """The rows' factor of a ``PRODUCT`` mask: hidden unless a box starts in ``from .. to``.

    Column ``c`` of an axis stands for position ``c`` of a box along it. With ``BY_ROW``, the last
    axis's columns stand for where a row's window starts, and each row is hidden at its own.
    """
    i0, i1, i2 = p.tokens(f, LEFT)
    c = gl.arange(0, STEPS * 16, gl.SliceLayout(0, LEFT))[None, :]
    s0, e0 = p.partners(i0, 0)
    s1, e1 = p.partners(i1, 1)
    s2, e2 = p.partners(i2, 2)
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
def _column_factor(
    p, j2, CODE: gl.constexpr, BY_ROW: gl.constexpr, STEPS: gl.constexpr, LAYOUT: gl.constexpr
):
    """The keys' factor: -2^50 at each key's own position of every axis.

    With ``BY_ROW``, of box ``j2`` of the last axis: where the windows that start at a column's
    place do not have the key.
    """
    BOX: gl.constexpr = p.BOX
    k = gl.arange(0, BOX[0] * BOX[1] * BOX[2], gl.SliceLayout(1, LAYOUT))[:, None]
    c = gl.arange(0, STEPS * 16, gl.SliceLayout(0, LAYOUT))[None, :]
    start = c - CODE[1]
    if BY_ROW:
        at = j2 * BOX[2] + k % BOX[2]
        own2 = (at < start) | (at >= start + p.window[2])
    else:
        own2 = k % BOX[2] == start
    own1 = k // BOX[2] % BOX[1] == c - CODE[0]
    own0 = k // (BOX[1] * BOX[2]) == c
    own = gl.where(c < CODE[0], own0, gl.where(c < CODE[1], own1, own2 & (c < CODE[2])))
    return gl.where(own, -ROOT, 0.0).to(gl.bfloat16)


@gluon.jit
def column_tables(
    p, other, MASK: gl.constexpr, CODE: gl.constexpr, BY_ROW: gl.constexpr, STEPS: gl.constexpr,
    TABLES: gl.constexpr,
):  # fmt: skip
    """The columns' factors in shared memory; ``other`` if the mask is no ``PRODUCT``."""
    tables = other
    if MASK == PRODUCT:
        N: gl.constexpr = p.BOX[0] * p.BOX[1] * p.BOX[2]
        TABLE: gl.constexpr = gl.NVMMASharedLayout(32 * STEPS, 16, 2)
        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [16 // STEPS, 2 * STEPS], [4, 1], [1, 0])
        tables = gl.allocate_shared_memory(gl.bfloat16, [TABLES, N, 16 * STEPS], TABLE)
        for j in gl.static_range(TABLES):
            tables.index(j).store(_column_factor(p, j, CODE, BY_ROW, STEPS, ROWS))
        fence_async_shared()
    return tables


@gluon.jit
def scores(
    p, j, n, q, keys, low, hidden_from, hidden_to, tables,
    MASK: gl.constexpr, CODE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Start Q K^T of box ``j``, the ``n``-th of the ring, masked if ``MASK`` is ``PRODUCT``."""
    N: gl.constexpr = p.BOX[0] * p.BOX[1] * p.BOX[2]
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
def is_whole(p, j, f, low):
    """Whether box ``j`` has partners of all of a warpgroup's tokens only."""
    a0, a1, a2, _ = p.box(j, low)
    _, _, from0, to0 = p.reach(f, 0)
    _, _, from1, to1 = p.reach(f, 1)
    _, _, from2, to2 = p.reach(f, 2)
    whole = (a0 >= from0) & (a0 + p.BOX[0] <= to0) & (a1 >= from1) & (a1 + p.BOX[1] <= to1)
    return whole & (a2 >= from2) & (a2 + p.BOX[2] <= to2)


@gluon.jit
def compared(p, s, j, low, starts, ends):
    """Scores of box ``j``, lowered to almost nothing outside of ``starts .. ends`` of their row."""
    BOX: gl.constexpr = p.BOX
    a0, a1, a2, _ = p.box(j, low)
    c = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    if p.MODES[0] != primitives.UNIT or BOX[0] > 1:
        at = (a0 + c // (BOX[1] * BOX[2]))[None, :]
        s = gl.where((at >= starts[0][:, None]) & (at < ends[0][:, None]), s, HUGE)
    if p.MODES[1] != primitives.UNIT or BOX[1] > 1:
        at = (a1 + c // BOX[2] % BOX[1])[None, :]
        s = gl.where((at >= starts[1][:, None]) & (at < ends[1][:, None]), s, HUGE)
    if p.MODES[2] != primitives.UNIT or BOX[2] > 1:
        at = (a2 + c % BOX[2])[None, :]
        s = gl.where((at >= starts[2][:, None]) & (at < ends[2][:, None]), s, HUGE)
    return s
