"""Masks of scores: what lies in a block but is no partner of a row.

With ``PRODUCT``, a mask is one more step of the product that gives the scores: per axis, one factor
says which positions of the block a row must not see, the other which position a column has, and
their product is 0 or about -2^100. Where that takes too many columns, ``COMPARE`` looks at every
score of a partial block. With ``FIRST``, only a tile's first block is partial. With ``COLUMNS``,
both factors of a product are tables that come with tiles and blocks (``flat.py``).
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from ..triton.windows import UNIT
from .costs import MASK_KINDS
from .geometry import WARPS, Geometry, Group, fetched_tokens, rows_held
from .gluon_names import aggregate, fence_async_shared, gl, gluon
from .products import add_product, multiply

NONE, COMPARE, PRODUCT, FIRST, COLUMNS = map(gl.constexpr, MASK_KINDS)

# What a masked score is lowered to or by, up to three times. Finite, and its multiples by the scale
# are exact (the host sees to it), so that a row that has seen only masked columns has weights of
# one; what it summed is erased by the first real score.
MASKED = gl.constexpr(-(2.0**100))
ROOT = gl.constexpr(2.0**50)
FAR = gl.constexpr(1 << 30)


@gluon.jit
def _multiply(a, b, start, LAYOUT: gl.constexpr, CHUNKS: gl.constexpr):
    """As :func:`multiply`; the sum starts from ``[M, N]``, if there is a start."""
    if len(start) > 0:
        return add_product(a, b, start[0], CHUNKS)
    else:
        return multiply(a, b, LAYOUT, CHUNKS)


@gluon.jit
def _mask_keys(masked, start, M: gl.constexpr, SCORES: gl.constexpr):
    """``start`` and the product of a mask of keys, ``[M, N]`` in a tuple, if there is a mask."""
    if len(masked) > 0:
        LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
        rows = gl.full([M, 16], ROOT, gl.float32, LEFT).to(gl.bfloat16)
        return (_multiply(rows, masked[0], start, SCORES, (16,)),)
    else:
        return start


@aggregate
class Mask:
    """How a warpgroup masks scores, the same for all tiles.

    The two factors of a ``PRODUCT`` have ``C = 16 STEPS`` columns: those of axis 0, of axis 1, and
    of axis 2, which end at ``ENDS``. Column ``c`` of an axis stands for position ``c`` of a block
    along it. With ``BY_ROW``, those of the last axis stand for where a row's window starts, and
    each row is masked at its own. The last two columns may be those of a mask of keys
    (``key_masks.py``), at which all rows are masked; then there are no tables.
    """

    geometry: Geometry
    tables: gl.tuple  # of PRODUCT: the columns' factor, [tables, N, C] in shared memory
    bounds: gl.tuple  # of COMPARE: [6, M] in shared memory, where registers do not suffice
    KIND: gl.constexpr
    ENDS: gl.constexpr
    BY_ROW: gl.constexpr
    STEPS: gl.constexpr

    @gluon.jit
    def of_tile(self, tile, first, SCORES: gl.constexpr):
        """The mask of a tile's scores, for the warpgroup's tokens from ``first`` on."""
        g = self.geometry
        factor, windows = (), ()
        if self.KIND == PRODUCT:
            factor = self._masked_bounds(tile, first, gl.DotOperandLayout(0, SCORES, 2))
        if self.KIND == COMPARE or self.KIND == FIRST:
            starts, ends = g.windows(tile.group, g.tokens(first, SCORES))  # [M] each
            windows = starts + ends
            if len(self.bounds) > 0:
                for i in gl.static_range(6):
                    self.bounds[0].index(i).store(windows[i])
                windows = ()
        return TileMask(self, tile.group, first, tile.origin, factor, windows)

    @gluon.jit
    def _masked_bounds(self, tile, first, LEFT: gl.constexpr):
        """The rows' factor of a ``PRODUCT``, ``[M, C]``: masked unless a block starts in
        ``from .. to``."""
        g, origin = self.geometry, tile.origin
        ENDS: gl.constexpr = self.ENDS
        starts, ends = g.windows(tile.group, g.tokens(first, LEFT))  # [M] each
        c = gl.arange(0, self.STEPS * 16, gl.SliceLayout(0, LEFT))[None, :]  # [1, C]
        if self.BY_ROW:
            from2 = gl.where((starts[2] - origin[2])[:, None] == c - ENDS[1], FAR, -FAR)
            to2 = gl.full(from2.shape, FAR, gl.int32, LEFT)
        else:
            from2, to2 = starts[2][:, None] - (c - ENDS[1]), ends[2][:, None] - (c - ENDS[1])
        from1, to1 = starts[1][:, None] - (c - ENDS[0]), ends[1][:, None] - (c - ENDS[0])
        from0, to0 = starts[0][:, None] - c, ends[0][:, None] - c
        # Where there are no tables, all rows are masked at the columns of the mask of keys; and at
        # the last column, if some of a block's are no key.
        rest = FAR if len(self.tables) == 0 or fetched_tokens(g.BLOCK) > 0 else -FAR
        low = gl.where(c < ENDS[1], from1, gl.where(c < ENDS[2], from2, rest))
        high = gl.where(c < ENDS[1], to1, gl.where(c < ENDS[2], to2, FAR))
        return gl.where(c < ENDS[0], from0, low), gl.where(c < ENDS[0], to0, high)


@aggregate
class TileMask:
    """The mask of one tile's scores, for a warpgroup."""

    mask: Mask
    group: Group
    first: gl.tuple  # the warpgroup's first token
    origin: gl.tuple  # where the tile's blocks begin
    factor: gl.tuple  # of PRODUCT: the rows' factor is 0 for a block from .. to, [M, C] each
    windows: gl.tuple  # of compares: starts of the rows' windows per axis, then ends, [M] each

    @gluon.jit
    def scores(
        self, q, rows, keys, stage, block, bias, masked, SCORES: gl.constexpr, CHUNKS: gl.constexpr
    ):  # fmt: skip
        """Start ``S = Q K^T`` of a block, once it is there, with its bias, masked by a ``PRODUCT``
        and by a mask of keys, whose columns' factor ``[N, C]`` is in the tuple ``masked`` if there
        is one. With ``COLUMNS``, the rows' factor ``[M, C]`` is in the tuple ``rows``, and the
        columns' one is the last tensor of ``keys``. ``CHUNKS`` are of channels (``products.py``).
        """
        s = bias.of_block(block, SCORES)  # [M, N], if there is a bias
        if self.mask.KIND == PRODUCT:
            factor, columns = self._factors(block)  # [M, C], [N, C] in a tuple
            keys.consumer_wait(stage)
            if len(columns) == 0:
                columns = masked  # of both masks
            else:
                s = _mask_keys(masked, s, q.shape[0], SCORES)
            s = (_multiply(factor, columns[0], s, SCORES, factor.shape[1:]),)
        elif self.mask.KIND == COLUMNS:
            keys.consumer_wait(stage)
            s = _mask_keys(masked, s, q.shape[0], SCORES)
            columns = keys.matrix(stage, len(keys.buffers) - 1)  # [N, C]
            s = (_multiply(rows[0], columns, s, SCORES, (16,)),)
        else:
            keys.consumer_wait(stage)
            s = _mask_keys(masked, s, q.shape[0], SCORES)
        return _multiply(q, keys.matrix(stage), s, SCORES, CHUNKS)

    @gluon.jit
    def _factors(self, block):
        """Rows' factor of the mask of a block, and the columns', if a table has it."""
        ENDS: gl.constexpr = self.mask.ENDS
        low, high = self.factor
        start, along_last = self.mask.geometry.block_start(block, self.origin)
        c = gl.arange(0, low.shape[1], gl.SliceLayout(0, low.type.layout))  # [C]
        at = gl.where(c < ENDS[0], start[0], gl.where(c < ENDS[1], start[1], start[2]))[None, :]
        rows = gl.where((at < low) | (at >= high), ROOT, 0.0).to(gl.bfloat16)
        columns = ()
        if len(self.mask.tables) > 0:
            tables = self.mask.tables[0]
            columns = (tables.index(along_last if tables.shape[0] > 1 else 0),)
        return rows, columns

    @gluon.jit
    def compare(self, s, block, IS_FIRST: gl.constexpr):
        """Scores ``[M, N]`` of a block, masked by compare if it is partial."""
        if self.mask.KIND == COMPARE:
            if not self._is_full(block):
                s = self._compared(s, block)
        elif self.mask.KIND == FIRST and IS_FIRST:
            s = self._compared(s, block)
        return s

    @gluon.jit
    def _is_full(self, block):
        """Whether all of a block are partners of all of the warpgroup's tokens."""
        g = self.mask.geometry
        start, _ = g.block_start(block, self.origin)
        _, _, from0, to0 = g.reach(self.group, self.first, 0)
        _, _, from1, to1 = g.reach(self.group, self.first, 1)
        _, _, from2, to2 = g.reach(self.group, self.first, 2)
        full = (start[0] >= from0) & (start[0] + g.BLOCK[0] <= to0)
        full = full & (start[1] >= from1) & (start[1] + g.BLOCK[1] <= to1)
        return full & (start[2] >= from2) & (start[2] + g.BLOCK[2] <= to2)

    @gluon.jit
    def _compared(self, s, block):
        g = self.mask.geometry
        BLOCK: gl.constexpr = g.BLOCK
        windows = self.windows
        if len(self.mask.bounds) > 0:
            windows = _loaded(self.mask.bounds[0], gl.SliceLayout(1, s.type.layout))
        start, _ = g.block_start(block, self.origin)
        c = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))  # [N]
        if g.MODES[0] != UNIT or BLOCK[0] > 1:
            s = _within(s, start[0] + g.in_block(c, 0), windows[0], windows[3])
        if g.MODES[1] != UNIT or BLOCK[1] > 1:
            s = _within(s, start[1] + g.in_block(c, 1), windows[1], windows[4])
        if g.MODES[2] != UNIT or BLOCK[2] > 1:
            s = _within(s, start[2] + g.in_block(c, 2), windows[2], windows[5])
        return s


@gluon.jit
def _loaded(bounds, ROWS: gl.constexpr):
    """Starts and ends of windows that are kept in shared memory ``[6, M]``."""
    b0, b1, b2 = bounds.index(0), bounds.index(1), bounds.index(2)
    starts = b0.load(ROWS), b1.load(ROWS), b2.load(ROWS)
    b3, b4, b5 = bounds.index(3), bounds.index(4), bounds.index(5)
    ends = b3.load(ROWS), b4.load(ROWS), b5.load(ROWS)
    return starts + ends


@gluon.jit
def _within(s, at, start, end):
    """Scores ``[M, N]`` whose column's position, ``at [N]``, is in the row's window ``[M]``."""
    at = at[None, :]
    return gl.where((at >= start[:, None]) & (at < end[:, None]), s, MASKED)


@gluon.jit
def _column_factor(
    g, along_last, ENDS: gl.constexpr, BY_ROW: gl.constexpr, STEPS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """The columns' factor ``[N, C]``: -2^50 at each key's own position of every axis.

    With ``BY_ROW``, of the block of that number along the last axis: where windows that start at a
    column's position do not have the key.
    """
    BLOCK: gl.constexpr = g.BLOCK
    k = gl.arange(0, rows_held(BLOCK), gl.SliceLayout(1, LAYOUT))[:, None]  # [N, 1]
    c = gl.arange(0, STEPS * 16, gl.SliceLayout(0, LAYOUT))[None, :]  # [1, C]
    start = c - ENDS[1]
    if BY_ROW:
        at = along_last * BLOCK[2] + g.in_block(k, 2)
        own2 = (at < start) | (at >= start + g.window[2])
    else:
        own2 = g.in_block(k, 2) == start
    own1 = g.in_block(k, 1) == c - ENDS[0]
    own0 = g.in_block(k, 0) == c
    own = gl.where(c < ENDS[0], own0, gl.where(c < ENDS[1], own1, own2 & (c < ENDS[2])))
    if fetched_tokens(BLOCK) > 0:
        own = gl.where(k < fetched_tokens(BLOCK), own, c == STEPS * 16 - 1)
    return gl.where(own, -ROOT, 0.0).to(gl.bfloat16)


@gluon.jit
def _stored(
    g, COUNT: gl.constexpr, IS_TABLE: gl.constexpr, ENDS: gl.constexpr, BY_ROW: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    """That many columns' factors in shared memory, ``[COUNT, N, C]``; those of a table are of
    blocks along the last axis, others are all of the first."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(32 * STEPS, 16, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [16 // STEPS, 2 * STEPS], [WARPS, 1], [1, 0])
    shape: gl.constexpr = [COUNT, rows_held(g.BLOCK), 16 * STEPS]
    factors = gl.allocate_shared_memory(gl.bfloat16, shape, SHARED)
    for j in gl.static_range(COUNT):
        factor = _column_factor(g, j if IS_TABLE else 0, ENDS, BY_ROW, STEPS, ROWS)
        factors.index(j).store(factor)
    fence_async_shared()
    return factors


@gluon.jit
def column_tables(
    g, KIND: gl.constexpr, ENDS: gl.constexpr, BY_ROW: gl.constexpr, STEPS: gl.constexpr,
    TABLES: gl.constexpr,
):  # fmt: skip
    """The columns' factors of a ``PRODUCT`` in shared memory, :class:`Mask`'s ``tables``."""
    found = ()
    if KIND == PRODUCT and TABLES > 0:
        found = (_stored(g, TABLES, True, ENDS, BY_ROW, STEPS),)
    return found


@gluon.jit
def stage_factors(
    g, STAGES: gl.constexpr, KIND: gl.constexpr, ENDS: gl.constexpr, BY_ROW: gl.constexpr,
    STEPS: gl.constexpr, TABLES: gl.constexpr,
):  # fmt: skip
    """Columns' factors of a mask of keys, one for each stage, in shared memory: with those of a
    ``PRODUCT`` that has no tables, else by themselves. In the last two columns are zeros."""
    if KIND == PRODUCT and TABLES == 0:
        return _stored(g, STAGES, False, ENDS, BY_ROW, STEPS)
    else:
        return _stored(g, STAGES, False, (0, 0, 0), False, 1)
