"""Tiles whose *sets* follow one another: batch entries and dilation groups.

In all sets of a tile, a query and a key have the same bias, and see each other or do not. So where
blocks are as far from all tiles, what the products of a tile's scores start from, biases and masks,
is laid in shared memory once, in the order of a thread's registers, for all sets that a program
takes one after another.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from .bias import Bias
from .geometry import OWN, Geometry, Group, Side, Tile, mma_layout, volume
from .gluon_names import aggregate, gl, gluon
from .masks import COMPARE, MASKED, Mask


@gluon.constexpr_function
def _as_in_registers(rows, columns):
    """Layout of scores ``[rows, columns]`` in shared memory, where four numbers of a thread are
    side by side: a warp has 16 rows, a thread two of them and two columns of each eight."""
    of_thread = [[0, 1], [8, 0]]
    of_lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    eights = [[0, 8 << i] for i in range((columns // 8).bit_length() - 1)]
    of_warps = [[16 << i, 0] for i in range((rows // 16).bit_length() - 1)]
    return gl.SharedLinearLayout(of_thread + of_lanes + eights + of_warps)


@gluon.constexpr_function
def region_of(block, blocks):
    """Keys of all blocks of a tile, per axis."""
    return [n * count for n, count in zip(block, blocks)]


@gluon.constexpr_function
def _in_region(block, blocks, number):
    """Where a tile's block of that number begins, from the first one on."""
    row = number // blocks[2]
    # Triton 3.8 has no remainder of a number by one of its constants.
    at = row // blocks[1], row - row // blocks[1] * blocks[1], number - row * blocks[2]
    return [i * size for i, size in zip(at, block)]


@gluon.jit
def _digit(number, base):
    """Last digit of a number, and the others."""
    return number % base, number // base


@gluon.jit
def _after(i, sizes):
    """The index after ``i`` per axis, and whether it is the first one again: divisions would cost
    as much as a softmax."""
    i2 = i[2] + 1
    end2 = i2 == sizes[2]
    i1 = gl.where(end2, i[1] + 1, i[1])
    end1 = i1 == sizes[1]
    i0 = gl.where(end1, i[0] + 1, i[0])
    end0 = i0 == sizes[0]
    return (gl.where(end0, 0, i0), gl.where(end1, 0, i1), gl.where(end2, 0, i2)), end0


@gluon.jit
def _after_if(condition, i, sizes):
    """As :func:`_after`, or ``i`` itself and False."""
    after, is_first = _after(i, sizes)
    i0 = gl.where(condition, after[0], i[0])
    i1 = gl.where(condition, after[1], i[1])
    return (i0, i1, gl.where(condition, after[2], i[2])), condition & is_first


@aggregate
class Walk:
    """A program's steps: a set of a tile each, with all of its blocks. Tiles of one head follow one
    another, each with all of its sets."""

    geometry: Geometry
    mask: Mask
    bias: Bias
    start: gl.shared_memory_descriptor  # what scores of a tile start from, float32 [blocks, M, N]
    apart: gl.tuple  # how far the first block is from its tile, per axis
    first: gl.tuple  # the first tile, per axis
    counts: gl.tuple  # how many tiles there are, per axis
    batches: gl.tensor
    sets: gl.tensor  # of a tile
    begin: gl.tensor  # the program's first step, of those of all tiles
    end: gl.tensor
    head: gl.tensor
    SCORES: gl.constexpr  # layout of [M, N]
    BLOCKS: gl.constexpr  # of a tile, per axis

    @gluon.jit
    def first_step(self):
        """Of the program's first step the tile, per axis, the dilation group, and the batch
        entry."""
        batch, rest = _digit(self.begin, self.batches)
        dilation = self.geometry.dilation
        g2, rest = _digit(rest, dilation[2])
        g1, rest = _digit(rest, dilation[1])
        g0, rest = _digit(rest, dilation[0])
        t2, rest = _digit(rest, self.counts[2])
        t1, t0 = _digit(rest, self.counts[1])
        return (t0, t1, t2), (g0, g1, g2), batch

    @gluon.jit
    def next_step(self, t, group, batch):
        """What comes after a step, as :meth:`first_step` says."""
        is_last = batch + 1 == self.batches
        group, is_last_set = _after_if(is_last, group, self.geometry.dilation)
        t, _ = _after_if(is_last_set, t, self.counts)
        return t, group, gl.where(is_last, 0, batch + 1)

    @gluon.jit
    def steps_of(self, tile_id):
        """The first and one-past-last step of a tile, among the program's."""
        first = gl.maximum(tile_id * self.sets, self.begin)
        last = gl.minimum((tile_id + 1) * self.sets, self.end)
        return first - self.begin, last - self.begin

    @gluon.jit
    def first_token(self, t):
        """First query of a tile, per axis."""
        TILE: gl.constexpr = self.geometry.TILE
        return (
            (self.first[0] + t[0]) * TILE[0],
            (self.first[1] + t[1]) * TILE[1],
            (self.first[2] + t[2]) * TILE[2],
        )

    @gluon.jit
    def block_start(self, first, NUMBER: gl.constexpr):
        """Where the block of that number begins, of the tile whose first token is ``first``."""
        apart = self.apart
        AT: gl.constexpr = _in_region(self.geometry.BLOCK, self.BLOCKS, NUMBER)
        return first[0] + apart[0] + AT[0], first[1] + apart[1] + AT[1], first[2] + apart[2] + AT[2]

    @gluon.jit
    def rows(self, first, group, steps, LAYOUT: gl.constexpr):
        """Of a tile's queries, ``[M]``: the row in a batch entry of a tensor whose tokens along
        three axes are so many ``steps`` apart, and whether there is such a query."""
        g = self.geometry
        i0, i1, i2 = g.tokens(first, LAYOUT)  # [M] each
        row = (i0 * g.dilation[0] + group[0]) * steps[0] + (i1 * g.dilation[1] + group[1]) * steps[
            1
        ]
        row += (i2 * g.dilation[2] + group[2]) * steps[2]
        return row, (i0 < g.length[0]) & (i1 < g.length[1]) & (i2 < g.length[2])

    @gluon.jit
    def lay(self, t):
        """Lay what scores of a tile start from in shared memory."""
        first = self.first_token(t)
        for NUMBER in gl.static_range(volume(self.BLOCKS)):
            start = self._start(first, self.block_start(first, NUMBER))
            self.start.index(NUMBER).store(start)

    @gluon.jit
    def _start(self, first, block_start):
        """What scores of a tile and a block start from, ``[M, N]``: biases, masked. The first query
        and the first key are given."""
        g = self.geometry
        zero = self.begin * 0
        here = zero, zero, zero
        side = Side(g.length, here, here, (), ())
        group = Group(side, side, (), g.window, g.stride)
        tile = Tile(self.head, self.head, group, first, block_start, here)
        bias = self.bias.of_tile(tile, first, self.head)
        (start,) = bias.of_block(here, self.SCORES)  # [M, N]
        start = self.mask.of_tile(tile, first, self.SCORES).compare(start, here, True)
        _, real = self.rows(first, here, here, self.SCORES)
        return gl.where(real[:, None], start, MASKED)


@gluon.jit
def geometry_of_sets(
    length, window, stride, dilation, batches, MODES: gl.constexpr, TILE: gl.constexpr,
    BLOCK: gl.constexpr,
):  # fmt: skip
    """The geometry of a walk, which counts tiles itself."""
    return Geometry(
        length=length, window=window, stride=stride, dilation=dilation, tiles=length, part=(),
        tile_table=(), num_tiles=batches, heads=batches, heads_at_once=batches, MODES=MODES,
        TILE=TILE, BLOCK=BLOCK, SPLIT_AXIS=0, WARPGROUPS=1, DILATED=True, QUERIES=OWN, PIECE=BLOCK,
        SEAM_PIECE=BLOCK, HEADS_FIRST=False, OF_KEYS=False,
    )  # fmt: skip


@gluon.jit
def all_tiles(g):
    """The first tile per axis, and how many there are."""
    n = g.length
    TILE: gl.constexpr = g.TILE
    counts = (
        (n[0] + TILE[0] - 1) // TILE[0],
        (n[1] + TILE[1] - 1) // TILE[1],
        (n[2] + TILE[2] - 1) // TILE[2],
    )
    return (n[0] * 0, n[1] * 0, n[2] * 0), counts


@gluon.jit
def walk_of(
    g, bias, apart, first, counts, batches, split_id, splits, head, BLOCKS: gl.constexpr
):  # fmt: skip
    """The walk over one of ``splits`` splits of all steps of a head."""
    M: gl.constexpr = volume(g.TILE)
    N: gl.constexpr = volume(g.BLOCK)
    dilation = g.dilation
    sets = dilation[0] * dilation[1] * dilation[2] * batches
    steps = counts[0] * counts[1] * counts[2] * sets
    per_split = (steps + splits - 1) // splits
    begin = gl.minimum(split_id * per_split, steps)
    return Walk(
        geometry=g, mask=Mask(g, (), (), COMPARE, (0, 0, 0), False, 1), bias=bias,
        start=gl.allocate_shared_memory(
            gl.float32, [volume(BLOCKS), M, N], _as_in_registers(M, N)
        ),
        apart=apart, first=first,
        counts=(gl.maximum(counts[0], 1), gl.maximum(counts[1], 1), gl.maximum(counts[2], 1)),
        batches=batches, sets=sets, begin=begin, end=gl.minimum(begin + per_split, steps),
        head=head, SCORES=mma_layout(N), BLOCKS=BLOCKS,
    )  # fmt: skip
