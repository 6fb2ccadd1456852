"""The relative positional bias of a block's scores, read from a table.

The bias of a pair follows from how far the key's position is from the query's. In a block of scores
that is a number of the block, plus one of the column, minus one of the row. So the table of a head
is padded until every pair of a tile and of its blocks is in it, and its strides are known when a
kernel is compiled: then the addresses of a thread are one that moves from block to block, plus
constants. Products of scores start from what is loaded, so tables hold biases over the scale.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

import triton
import triton.language as tl

from ..triton.launch import kernel
from .geometry import OWN, Geometry, rows_held
from .gluon_names import aggregate, gdc_launch_dependents, gdc_wait, gl, gluon
from .masks import MASKED


@gluon.constexpr_function
def _number(position, strides):
    """Number of a position in a table."""
    return sum(i * stride for i, stride in zip(position, strides))


@gluon.constexpr_function
def _last(shape):
    """The last position of a block."""
    return [n - 1 for n in shape]


@aggregate
class Bias:
    """The bias of all tiles, or none."""

    geometry: Geometry
    tables: gl.tuple  # of a bias: where float32 [heads, size] is
    size: gl.tensor  # of a head's table
    middle: gl.tensor  # number of the pair of a query and the key at its own position
    STRIDES: gl.constexpr  # of a table, per axis

    @gluon.jit
    def of_tile(self, tile, first, head):
        """The bias of a tile's scores, for the warpgroup's tokens from ``first`` on and a query
        head."""
        at = ()
        if len(self.tables) > 0:
            g = self.geometry
            at = first
            if g.QUERIES != OWN:
                before = tile.group.offset
                if g.OF_KEYS:
                    before = -before[0], -before[1], -before[2]
                at = first[0] + before[0], first[1] + before[1], first[2] + before[2]
        return TileBias(self, at, tile.origin, head)


@aggregate
class TileBias:
    """The bias of one tile's scores, for a warpgroup and a query head."""

    bias: Bias
    first: gl.tuple  # position of the warpgroup's first token, counted as those of blocks are
    origin: gl.tuple  # where the tile's blocks begin
    head: gl.tensor

    @gluon.jit
    def of_block(self, block, SCORES: gl.constexpr):
        """What the product of a block's scores starts from, ``[M, N]``, in a tuple; () if there is
        no bias."""
        found = ()
        if len(self.bias.tables) > 0:
            g = self.bias.geometry
            STRIDES: gl.constexpr = self.bias.STRIDES
            start, _ = g.block_start(block, self.origin)
            at = self.bias.middle + (start[0] - self.first[0]) * STRIDES[0]
            at += (start[1] - self.first[1]) * STRIDES[1] + (start[2] - self.first[2])
            # A tile that no query attends has a block anywhere, which is all masked.
            LEAST: gl.constexpr = _number(_last(g.TILE), STRIDES)
            MARGIN: gl.constexpr = _number(_last(g.BLOCK), STRIDES) + 1
            at = gl.minimum(gl.maximum(at, LEAST), self.bias.size - MARGIN)
            row0, row1, row2 = g.tokens((0, 0, 0), SCORES)  # [M] each
            rows = row0 * STRIDES[0] + row1 * STRIDES[1] + row2
            c = gl.arange(0, rows_held(g.BLOCK), gl.SliceLayout(0, SCORES))  # [N]
            columns = g.in_block(c, 0) * STRIDES[0] + g.in_block(c, 1) * STRIDES[1]
            columns += g.in_block(c, 2)
            table = self.bias.tables[0] + self.head.to(gl.int64) * self.bias.size
            found = (gl.load((table + at - rows[:, None]) + columns[None, :]),)
        return found


@gluon.jit
def bias_of(g, tables, size, middle, STRIDES: gl.constexpr):
    """The bias that is in tables; ``STRIDES`` are () if there is none."""
    found = ()
    if len(STRIDES) > 0:
        found = (tables,)
    return Bias(g, found, size, middle, STRIDES)


@kernel(triton.jit, tensors="rpb tables")
def bias_table_kernel(
    rpb, tables, K0, K1, K2, B0, B1, B2, T0, T1, size, sign, scale, waits_at_end, N: tl.constexpr,
):  # fmt: skip
    """Each head's table from ``rpb [heads, 2 K - 1, ...]``: along an axis, key position minus query
    position from ``-B`` on, or with a ``sign`` of -1 query position minus key position.

    Strides of a table are ``T0``, ``T1`` and 1. Where no pair is attended it is zero.

    The kernel before does not make the bias. Where it does not use the tables' memory either, both
    may run at once: this one then ``waits_at_end``, so that who follows finds both done.
    """
    gdc_launch_dependents()  # the next kernel can be set up, or run at the same time
    if waits_at_end == 0:
        gdc_wait()
    head, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * N + tl.arange(0, N)
    o0 = sign * (at // T0 - B0) + K0 - 1  # [N]
    o1 = sign * (at % T0 // T1 - B1) + K1 - 1
    o2 = sign * (at % T1 - B2) + K2 - 1
    n0, n1, n2 = 2 * K0 - 1, 2 * K1 - 1, 2 * K2 - 1
    inside = (o0 >= 0) & (o0 < n0) & (o1 >= 0) & (o1 < n1) & (o2 >= 0) & (o2 < n2)
    offset = ((head * n0 + o0) * n1 + o1) * n2 + o2
    bias = tl.load(rpb + offset, mask=inside, other=0.0).to(tl.float32) * (1.0 / scale)
    # Scores of a bias of -inf are as low as masked ones.
    bias = tl.maximum(bias, MASKED, propagate_nan=tl.PropagateNan.ALL)
    tl.store(tables + head * size + at, bias, mask=at < size)
    gdc_wait()
