"""Where a program's tiles and boxes are: the geometry that forward and backward walk.

A tile is 64 tokens of a warpgroup, queries or keys; a box is tokens of the other kind. Tiles of two
warpgroups are neighbors along axis ``SPLIT``. Boxes begin at the first partner of the tiles' first
token and are walked with ``SPLIT`` outermost, so that those with partners of one warpgroup's tokens
follow one another. Partners of a query are the keys of its window, those of a key the queries that
attend it.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from ..triton import windows
from .gluon_names import aggregate, from_triton, gl, gluon

window = from_triton(windows.window)
queries_of = from_triton(windows.queries_of)
longest_first = from_triton(windows.longest_first)


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
    TILE: gl.constexpr
    BOX: gl.constexpr
    SPLIT: gl.constexpr
    GROUPS: gl.constexpr
    DILATED: gl.constexpr
    OF_KEYS: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, length, window, stride, dilation, tiles, total, heads,
        MODES, TILE, BOX, SPLIT, GROUPS, DILATED, OF_KEYS,
    ):  # fmt: skip
        self.length, self.window, self.stride = length, window, stride
        self.dilation, self.tiles = dilation, tiles
        self.total, self.heads = total, heads
        self.MODES, self.TILE, self.BOX = gl.constexpr(MODES), gl.constexpr(TILE), gl.constexpr(BOX)
        self.SPLIT, self.GROUPS = gl.constexpr(SPLIT), gl.constexpr(GROUPS)
        self.DILATED, self.OF_KEYS = gl.constexpr(DILATED), gl.constexpr(OF_KEYS)

    @gluon.jit
    def partners(self, i, AXIS: gl.constexpr):
        """First and one-past-last partner of tokens ``i`` of an axis; past the end, of the last."""
        n = self.length[AXIS]
        MODE: gl.constexpr = self.MODES[AXIS]
        i = gl.minimum(i, n - 1)
        if self.OF_KEYS:
            first, end = queries_of(i, n, n, self.window[AXIS], self.stride[AXIS], MODE)
        else:
            first, end = window(i, n, n, self.window[AXIS], self.stride[AXIS], MODE)
        return first, end

    @gluon.jit
    def axis(self, t, AXIS: gl.constexpr):
        """First token, first partner and boxes of an axis's tile, the ``t``-th in turn."""
        SIZE: gl.constexpr = self.TILE[AXIS] * (self.GROUPS if self.SPLIT == AXIS else 1)
        if self.OF_KEYS and AXIS == 2:
            t = longest_first(t, self.tiles[2], self.window[2], SIZE, self.MODES)
        first = t * SIZE
        low, _ = self.partners(first, AXIS)
        _, high = self.partners(first + SIZE - 1, AXIS)
        return first, low, (high - low + self.BOX[AXIS] - 1) // self.BOX[AXIS]

    @gluon.jit
    def tile(self, number):
        """Batch, head, dilation group; per axis first token, first partner and boxes of a tile."""
        UNIT: gl.constexpr = windows.UNIT
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
        BOX: gl.constexpr = self.BOX
        return low[0] + j0 * BOX[0], low[1] + j1 * BOX[1], low[2] + j2 * BOX[2], j2

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
        """First token of a warpgroup, per axis."""
        f0 = f[0] + (HALF * self.TILE[0] if self.SPLIT == 0 else 0)
        f1 = f[1] + (HALF * self.TILE[1] if self.SPLIT == 1 else 0)
        f2 = f[2] + (HALF * self.TILE[2] if self.SPLIT == 2 else 0)
        return f0, f1, f2

    @gluon.jit
    def reach(self, f, AXIS: gl.constexpr):
        """Of a warpgroup's tokens from ``f`` on: partners of any, and partners of all.

        Partners move monotonically, so those of the first and the last token bound both.
        """
        first, inner_last = self.partners(f[AXIS], AXIS)
        inner_first, last = self.partners(f[AXIS] + self.TILE[AXIS] - 1, AXIS)
        return first, last, inner_first, inner_last

    @gluon.jit
    def own(self, f, low, boxes):
        """A warpgroup's boxes among the tile's: number of the first, of the first beyond, of all;
        and where the first lies along ``SPLIT``."""
        SIZE: gl.constexpr = self.BOX[self.SPLIT]
        count = boxes[0] * boxes[1] * boxes[2]
        layer = count // boxes[self.SPLIT]
        first, end, _, _ = self.reach(f, self.SPLIT)
        before = (first - low[self.SPLIT]) // SIZE
        after = (end - low[self.SPLIT] + SIZE - 1) // SIZE
        return before * layer, after * layer, count, before

    @gluon.jit
    def tokens(self, f, LAYOUT: gl.constexpr):
        """Tokens of a warpgroup's rows, per axis; they may be past the end."""
        TILE: gl.constexpr = self.TILE
        r = gl.arange(0, TILE[0] * TILE[1] * TILE[2], gl.SliceLayout(1, LAYOUT))
        return f[0] + r // (TILE[1] * TILE[2]), f[1] + r // TILE[2] % TILE[1], f[2] + r % TILE[2]


@gluon.jit
def place(steps, batch, group, head):
    """Where a batch entry's head and dilation group begin in the first axis of a descriptor."""
    at = batch * steps[0] + head * steps[4]
    return at + group[0] * steps[1] + group[1] * steps[2] + group[2] * steps[3]
