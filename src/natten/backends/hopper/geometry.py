"""Where a program's tiles and blocks are: the geometry that forward and backward walk.

A tile is up to 64 tokens of each warpgroup, queries or keys; a block is tokens of the other kind.
Where they are fewer than a matrix has rows, the last rows stand for none (``uneven.py``). Tiles
of two warpgroups are neighbors along ``SPLIT_AXIS``. Blocks begin at the first partner of the
tile's first token and are walked with ``SPLIT_AXIS`` outermost, so that those with partners of one
warpgroup's tokens follow one another. Partners of a query are the keys of its window, those of a
key the queries that attend it.

Queries that are not the keys' own tokens are a part of the layout, and perhaps finer than keys.
They are numbered from the part's first, so partners of keys are numbers of them, too. There are
tiles of those keys only among which some query attends some, along each axis. If no query attends
a tile's or a warpgroup's keys even so, it has one block that is all masked.

On a circular axis partners are counted before the modulo. A block may then be fetched in pieces,
each of which is a box somewhere on the ring; its tokens follow one another piece by piece. Of a
tile whose partners go on at the other end, blocks begin a little earlier, so that pieces meet at
the seam. Smaller pieces need fewer positions for that. So the pieces of a block that crosses the
seam may be smaller than those of all others; inside a piece they follow one another, so that every
block has its tokens in the same order.

Packed documents are layouts of their own sizes. Which tiles there are, of which document, is read
from a table (``documents.py``). Rows of a document lie one after another in memory, and how far
apart they are differs from document to document, so tiles and blocks are fetched and stored row by
row: a row is a piece. TMA's view of the tokens ends with the row (``descriptors.py``).
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from ..triton import windows
from . import cuts, documents
from .gluon_names import aggregate, from_triton, gl, gluon

window = from_triton(windows.window)
queries_of = from_triton(windows.queries_of)
wrapped = from_triton(windows.wrapped)
lpt_order = from_triton(windows.lpt_order)

WARPS = gl.constexpr(cuts.WARPS)  # of a warpgroup
OWN, PART, FINER = map(gl.constexpr, cuts.QUERY_KINDS)
TABLE_WIDTH = gl.constexpr(documents.TABLE_WIDTH)


@gluon.constexpr_function
def volume(shape):
    """Tokens of a shape of three axes."""
    return shape[0] * shape[1] * shape[2]


@gluon.constexpr_function
def rows_held(shape):
    """Rows of a matrix that holds a shape's tokens: a power of two. The last ones may be none."""
    rows = 1
    while rows < volume(shape):  # Triton 3.8 has no number of bits of its constants
        rows *= 2
    return rows


@gluon.constexpr_function
def fetched_tokens(shape):
    """Tokens of a shape that TMA fetches, 0 if they fill the matrix that holds them."""
    return volume(shape) if volume(shape) < rows_held(shape) else 0


@gluon.constexpr_function
def piece_start(block, piece, number):
    """Where a block's piece of that number begins inside the block."""
    rows, columns = block[1] // piece[1], block[2] // piece[2]
    row = number // columns
    # Triton 3.8 has no remainder of a number by one of its constants.
    at = row // rows, row - row // rows * rows, number - row * columns
    return [i * size for i, size in zip(at, piece)]


@gluon.constexpr_function
def small_piece_start(block, piece, small, number):
    """Where a block's small piece of that number begins; those of a piece follow one another."""
    each = volume(piece) // volume(small)
    at = piece_start(block, piece, number // each)
    inside = piece_start(piece, small, number - number // each * each)
    return [a + b for a, b in zip(at, inside)]


@gluon.constexpr_function
def mma_layout(columns):
    """Layout of what a warpgroup's products give, ``[ROWS, columns]``, 16 rows a warp."""
    return gl.NVMMADistributedLayout([3, 0], [cuts.WARPS, 1], [16, columns, 16])


@gluon.jit
def _digit(number, base, ONE: gl.constexpr):
    """Last digit of a number, and the others; ``ONE``: the base is 1."""
    if ONE:
        return number * 0, number
    else:
        # Without signs, a division takes fewer instructions.
        rest = (number.to(gl.uint32) // base.to(gl.uint32)).to(gl.int32)
        return number - rest * base, rest


@gluon.jit
def _coordinate(k, SIZES: gl.constexpr, AXIS: gl.constexpr):
    """Coordinates along an axis of the ``k``-th ones in a grid of these sizes."""
    if AXIS == 0:
        return k // (SIZES[1] * SIZES[2])
    elif AXIS == 1:
        return k // SIZES[2] % SIZES[1]
    else:
        return k % SIZES[2]


@gluon.jit
def _side(g, length, short, dilation):
    """Of an axis's dilation group ``g``: its positions, the group of its bases, and the positions
    that TMA counts before its first one (``descriptors.py``).

    Groups have ``length`` positions; those from ``short`` on have one less. One that has none is
    loaded as the first group, and stored nowhere.
    """
    is_short = g >= short
    base = gl.where((short < dilation) & (g < short), g + dilation, g)
    base = gl.where(is_short & (length == 1), dilation, base)
    return gl.where(is_short, length - 1, length), base, gl.where(is_short, 1, 0)


@gluon.constexpr_function
def _is_plain(mode):
    """Whether an axis is that of plain attention."""
    return mode in (windows.FULL.value, windows.FULL_CAUSAL.value)


@gluon.constexpr_function
def _from_the_end(modes, of_keys):
    """Whether the last block of keys comes first: of plain attention, it is the partial one."""
    return modes[2] in (windows.FULL.value, windows.FULL_CAUSAL.value) and not of_keys


@aggregate
class Side:
    """The queries or the keys of a dilation group; tuples have an entry per axis."""

    length: gl.tuple  # positions
    group: gl.tuple
    bases: gl.tuple  # the group where TMA finds the first of ``skipped`` and the positions
    skipped: gl.tuple
    document: gl.tuple  # of a packed one: its first token, and the tokens of all

    @gluon.jit
    def token(self, position):
        """The number of a document's token among those of all documents."""
        row = position[0] * self.length[1] + position[1]
        return self.document[0] + row * self.length[2] + position[2]

    @gluon.jit
    def at(self, position):
        """Where TMA finds a position."""
        if len(self.document) > 0:
            end = self.token((position[0], position[1], self.length[2]))  # of the row
            return position[0] * 0, end, self.document[1] - self.length[2] + position[2]
        elif len(self.skipped) > 0:
            return (
                position[0] + self.skipped[0],
                position[1] + self.skipped[1],
                position[2] + self.skipped[2],
            )
        else:
            return position

    @gluon.jit
    def load_at(self, position):
        """As :meth:`at`, of a box to load; of one that is beyond the end, where the last position
        is, for TMA then looks at where the view begins, which may be in front of all memory."""
        if len(self.skipped) > 0 or len(self.document) > 0:
            position = (
                gl.minimum(position[0], self.length[0] - 1),
                gl.minimum(position[1], self.length[1] - 1),
                gl.minimum(position[2], self.length[2] - 1),
            )
        return self.at(position)


@aggregate
class Group:
    """A dilation group of a tile, or a document; tuples have an entry per axis."""

    queries: Side
    keys: Side
    offset: gl.tuple  # queries of the group before the part's first
    window: gl.tuple
    stride: gl.tuple


@aggregate
class Tile:
    """Where a tile is, and which blocks it has; tuples have an entry per axis."""

    batch: gl.tensor
    head: gl.tensor
    group: Group
    first: gl.tuple  # its first token, of all warpgroups
    origin: gl.tuple  # where the first block begins: mostly the first partner of that token
    blocks: gl.tuple  # how many there are


@aggregate
class Part:
    """Queries that are a part of the layout, and groups of different lengths; per axis."""

    queries: gl.tuple  # of a dilation group
    short_queries: gl.tuple  # groups from that one on have one query less
    short_keys: gl.tuple  # groups from that one on have one key less
    offset: gl.tuple  # queries of the first query's group before it
    group: gl.tuple  # the first query's dilation group
    per_key: gl.tuple  # queries per key
    first_key: gl.tuple  # where tiles of keys begin


@aggregate
class Geometry:
    """Sizes of a call per axis, tuples of three: positions of a dilation group, window, stride,
    dilation, tiles; and what the kernel is compiled for.

    Of packed documents, lengths are those of all tokens in a row, and the last number of tiles is
    that of all documents.
    """

    length: gl.tuple  # of keys, and of queries unless they are a part
    window: gl.tuple
    stride: gl.tuple
    dilation: gl.tuple
    tiles: gl.tuple
    part: gl.tuple  # a Part, unless queries are the keys' OWN tokens
    tile_table: gl.tuple  # of packed documents: where the table of tiles is
    num_tiles: gl.tensor  # of all batch entries, heads and dilation groups
    heads: gl.tensor  # that have tiles
    heads_at_once: gl.tensor  # of which tiles at one position follow one another, with HEADS_FIRST
    MODES: gl.constexpr
    TILE: gl.constexpr  # of one warpgroup
    BLOCK: gl.constexpr
    SPLIT_AXIS: gl.constexpr
    WARPGROUPS: gl.constexpr
    DILATED: gl.constexpr
    QUERIES: gl.constexpr
    PIECE: gl.constexpr  # of a block, fetched at once
    SEAM_PIECE: gl.constexpr  # of a block that crosses the seam of a ring
    HEADS_FIRST: gl.constexpr  # tiles at one position come before those at the next
    OF_KEYS: gl.constexpr  # tiles are of keys, blocks of queries

    @gluon.jit
    def partners(self, group, i, AXIS: gl.constexpr):
        """First and one-past-last partner of tokens ``i`` of an axis; past the end, of the last."""
        K, S = group.window[AXIS], group.stride[AXIS]
        MODE: gl.constexpr = self.MODES[AXIS]
        if self.QUERIES == OWN or MODE == windows.UNIT:
            n = group.keys.length[AXIS]
            i = gl.minimum(i, n - 1)
            if self.OF_KEYS:
                first, end = queries_of(i, n, n, K, S, MODE)
            else:
                first, end = window(i, n, n, K, S, MODE)
        else:
            n, n_queries = group.keys.length[AXIS], group.queries.length[AXIS]
            offset = group.offset[AXIS]
            if self.OF_KEYS:
                is_plain: gl.constexpr = _is_plain(MODE)
                positions = n_queries if is_plain else n
                first, end = queries_of(gl.minimum(i, n - 1), positions, n, K, S, MODE)
                if self.QUERIES == FINER:
                    per_key = self.part[0].per_key[AXIS]
                    first, end = first * per_key, end * per_key
                first = gl.minimum(gl.maximum(first - offset, 0), n_queries)
                end = gl.minimum(gl.maximum(end - offset, 0), n_queries)
            else:
                i = gl.minimum(i, n_queries - 1) + offset
                if self.QUERIES == FINER:
                    i = i // self.part[0].per_key[AXIS]
                first, end = window(i, n, n, K, S, MODE)
        return first, end

    @gluon.jit
    def windows(self, group, tokens):
        """Partners of tokens along each axis: the first ones, and those one past the last."""
        start0, end0 = self.partners(group, tokens[0], 0)
        start1, end1 = self.partners(group, tokens[1], 1)
        start2, end2 = self.partners(group, tokens[2], 2)
        return (start0, start1, start2), (end0, end1, end2)

    @gluon.jit
    def _sides(self, g, AXIS: gl.constexpr):
        """Of an axis's dilation group ``g`` of tiles: :func:`_side` of queries and of keys, and how
        many of its queries come before the part."""
        part, dilation = self.part[0], self.dilation[AXIS]
        first = part.group[AXIS]
        if self.OF_KEYS:
            of_keys, later = g, g < first
            of_queries = gl.where(later, g - first + dilation, g - first)
        else:
            of_queries, later = g, g + first >= dilation
            of_keys = gl.where(later, g + first - dilation, g + first)
        queries = _side(of_queries, part.queries[AXIS], part.short_queries[AXIS], dilation)
        keys = _side(of_keys, self.length[AXIS], part.short_keys[AXIS], dilation)
        offset = gl.where(later, part.offset[AXIS] + 1, part.offset[AXIS])
        return queries, of_queries, keys, of_keys, offset

    @gluon.jit
    def _group(self, g):
        """The dilation group ``g`` of tiles."""
        if self.QUERIES == OWN:
            side = Side(self.length, g, g, (), ())
            return Group(side, side, (), self.window, self.stride)
        elif self.DILATED:
            q0, h0, k0, g0, offset0 = self._sides(g[0], 0)
            q1, h1, k1, g1, offset1 = self._sides(g[1], 1)
            q2, h2, k2, g2, offset2 = self._sides(g[2], 2)
            queries = Side(
                (q0[0], q1[0], q2[0]), (h0, h1, h2), (q0[1], q1[1], q2[1]), (q0[2], q1[2], q2[2]),
                (),
            )  # fmt: skip
            keys = Side(
                (k0[0], k1[0], k2[0]), (g0, g1, g2), (k0[1], k1[1], k2[1]), (k0[2], k1[2], k2[2]),
                (),
            )  # fmt: skip
            return Group(queries, keys, (offset0, offset1, offset2), self.window, self.stride)
        else:
            part = self.part[0]
            queries, keys = Side(part.queries, g, g, (), ()), Side(self.length, g, g, (), ())
            return Group(queries, keys, part.offset, self.window, self.stride)

    @gluon.jit
    def own_side(self, tile):
        """The tokens that a tile's are among."""
        if self.OF_KEYS:
            return tile.group.keys
        else:
            return tile.group.queries

    @gluon.jit
    def other_side(self, tile):
        """The tokens that a tile's blocks are among."""
        if self.OF_KEYS:
            return tile.group.queries
        else:
            return tile.group.keys

    @gluon.jit
    def _along(self, group, t, AXIS: gl.constexpr):
        """First token, first partner and blocks of an axis's tile, the ``t``-th in turn."""
        SIZE: gl.constexpr = self.TILE[AXIS] * (self.WARPGROUPS if self.SPLIT_AXIS == AXIS else 1)
        if len(self.tile_table) == 0:  # a table has an order
            if self.OF_KEYS and AXIS == 2:
                t = lpt_order(t, self.tiles[2], self.window[2], SIZE, self.MODES)
            elif self.MODES[AXIS] == windows.FULL_CAUSAL:
                t = self.tiles[2] - 1 - t  # later queries attend more keys
        first = t * SIZE
        if self.OF_KEYS and self.QUERIES != OWN:
            first += self.part[0].first_key[AXIS]
        origin, _ = self.partners(group, first, AXIS)
        _, end = self.partners(group, first + SIZE - 1, AXIS)
        BLOCK: gl.constexpr = self.BLOCK[AXIS]
        if self.MODES[AXIS] >= windows.CIRCULAR:
            n = self.length[AXIS]
            seam = gl.where(origin < 0, 0, n)
            PIECE: gl.constexpr = self.SEAM_PIECE[AXIS]
            at_seam = seam - (seam - origin + PIECE - 1) // PIECE * PIECE
            origin = gl.where((origin < 0) | (end > n), at_seam, origin)
        blocks = (end - origin + BLOCK - 1) // BLOCK
        if self.QUERIES != OWN:
            blocks = gl.maximum(blocks, 1)
        if AXIS == 2 and _from_the_end(self.MODES, self.OF_KEYS):
            origin += (blocks - 1) * BLOCK
        return first, origin, blocks

    @gluon.jit
    def tile(self, tile_id):
        """The tile of that number."""
        if len(self.tile_table) > 0:
            return self._tile_of_document(tile_id)
        else:
            return self._tile_of_layout(tile_id)

    @gluon.jit
    def _tile_of_layout(self, tile_id):
        UNIT: gl.constexpr = windows.UNIT
        rest = tile_id
        if self.HEADS_FIRST:  # with plain attention, tiles of a length follow one another
            rest = tile_id // self.heads_at_once
        t2, rest = _digit(rest, self.tiles[2], self.MODES[2] == UNIT)
        t1, rest = _digit(rest, self.tiles[1], self.MODES[1] == UNIT)
        t0, rest = _digit(rest, self.tiles[0], self.MODES[0] == UNIT)
        g2, rest = _digit(rest, self.dilation[2], not self.DILATED)
        g1, rest = _digit(rest, self.dilation[1], not self.DILATED)
        g0, rest = _digit(rest, self.dilation[0], not self.DILATED)
        if self.HEADS_FIRST:
            rest = rest * self.heads_at_once + tile_id % self.heads_at_once
        group = self._group((g0, g1, g2))
        head, batch = _digit(rest, self.heads, False)
        return self._tile_at(group, batch, head, (t0, t1, t2))

    @gluon.jit
    def _tile_of_document(self, tile_id):
        count, at_once = self.tiles[2], self.heads_at_once
        rest = tile_id // at_once
        head = rest // count * at_once + tile_id % at_once
        row = self.tile_table[0] + (1 + rest % count) * TABLE_WIDTH
        first_query, first_key = gl.load(row), gl.load(row + 1)
        n0, n1, n2, n2_keys = (
            gl.load(row + 2), gl.load(row + 3), gl.load(row + 4), gl.load(row + 5),
        )  # fmt: skip
        window = gl.load(row + 6), gl.load(row + 7), gl.load(row + 8)
        stride = gl.load(row + 9), gl.load(row + 10), gl.load(row + 11)
        t = gl.load(row + 12), gl.load(row + 13), gl.load(row + 14)
        none = (head * 0, head * 0, head * 0)
        keys = Side((n0, n1, n2_keys), none, none, (), (first_key, self.length[2]))
        if self.QUERIES == OWN:
            group = Group(keys, keys, (), window, stride)
        else:
            part = self.part[0]
            queries = Side((n0, n1, n2), none, none, (), (first_query, part.queries[2]))
            group = Group(queries, keys, part.offset, window, stride)
        return self._tile_at(group, head * 0, head, t)

    @gluon.jit
    def _tile_at(self, group, batch, head, t):
        """The tile of these numbers along the axes, of a group."""
        t0, t1, t2 = t
        first0, origin0, blocks0 = self._along(group, t0, 0)
        first1, origin1, blocks1 = self._along(group, t1, 1)
        first2, origin2, blocks2 = self._along(group, t2, 2)
        return Tile(
            batch=batch,
            head=head,
            group=group,
            first=(first0, first1, first2),
            origin=(origin0, origin1, origin2),
            blocks=(blocks0, blocks1, blocks2),
        )

    @gluon.jit
    def first_of(self, tile, WARPGROUP: gl.constexpr):
        """First token of a warpgroup, per axis."""
        AXIS: gl.constexpr = self.SPLIT_AXIS
        first0 = tile.first[0] + (WARPGROUP * self.TILE[0] if AXIS == 0 else 0)
        first1 = tile.first[1] + (WARPGROUP * self.TILE[1] if AXIS == 1 else 0)
        first2 = tile.first[2] + (WARPGROUP * self.TILE[2] if AXIS == 2 else 0)
        return first0, first1, first2

    @gluon.jit
    def tokens(self, first, LAYOUT: gl.constexpr):
        """Tokens of a warpgroup's rows, per axis ``[M]``; they may be past the end. Rows that are
        no token are as the last one that is."""
        TILE: gl.constexpr = self.TILE
        row = gl.arange(0, rows_held(TILE), gl.SliceLayout(1, LAYOUT))  # [M]
        if fetched_tokens(TILE) > 0:
            row = gl.minimum(row, volume(TILE) - 1)
        i0 = first[0] + row // (TILE[1] * TILE[2])
        i1 = first[1] + row // TILE[2] % TILE[1]
        return i0, i1, first[2] + row % TILE[2]

    @gluon.jit
    def rows(self, base, steps, side, tokens):
        """Rows of a side's tokens, per axis ``[M]``, in a contiguous tensor, where those of a head
        and dilation group begin at ``base`` and are such ``steps`` apart; and which there are."""
        i0, i1, i2 = tokens
        if len(side.document) > 0:
            row = base + side.token((i0, i1, i2)).to(gl.int64) * steps[3]
        else:
            row = base + i0 * (self.dilation[0] * steps[1]) + i1 * (self.dilation[1] * steps[2])
            row += i2 * (self.dilation[2] * steps[3])
        real = (i0 < side.length[0]) & (i1 < side.length[1]) & (i2 < side.length[2])
        if fetched_tokens(self.TILE) > 0:  # the matrix's last rows are none
            number = gl.arange(0, rows_held(self.TILE), i0.type.layout)
            real = real & (number < volume(self.TILE))
        return row, real

    @gluon.jit
    def block_start(self, block, origin):
        """First position of a tile's block, per axis, and its number along the last axis.

        ``block`` counts along three axes, the fastest first; ``SPLIT_AXIS`` is the slowest.
        """
        if self.SPLIT_AXIS == 0:
            j0, j1, j2 = block[2], block[1], block[0]
        elif self.SPLIT_AXIS == 1:
            j0, j1, j2 = block[1], block[2], block[0]
        else:
            j0, j1, j2 = block[1], block[0], block[2]
        if _from_the_end(self.MODES, self.OF_KEYS):
            j2 = -j2
        BLOCK: gl.constexpr = self.BLOCK
        start = origin[0] + j0 * BLOCK[0], origin[1] + j1 * BLOCK[1], origin[2] + j2 * BLOCK[2]
        return start, j2

    @gluon.jit
    def in_block(self, k, AXIS: gl.constexpr):
        """Positions along an axis, inside a block, of its tokens ``k``; those that are none are as
        the last one that is."""
        BLOCK: gl.constexpr = self.BLOCK
        if fetched_tokens(BLOCK) > 0:
            k = gl.minimum(k, volume(BLOCK) - 1)
        PIECE: gl.constexpr = self.PIECE
        COUNTS: gl.constexpr = [BLOCK[0] // PIECE[0], BLOCK[1] // PIECE[1], BLOCK[2] // PIECE[2]]
        if len(self.tile_table) > 0:  # pieces are rows
            at = _coordinate(k, BLOCK, AXIS)
        else:
            at = _coordinate(k % volume(PIECE) if PIECE != BLOCK else k, PIECE, AXIS)
            if COUNTS[AXIS] > 1:
                at += _coordinate(k // volume(PIECE), COUNTS, AXIS) * PIECE[AXIS]
        return at

    @gluon.jit
    def _piece_at(self, start, SMALL: gl.constexpr, NUMBER: gl.constexpr, AXIS: gl.constexpr):
        """Where the small piece of that number of a block begins along an axis, modulo the ring."""
        position = start[AXIS]
        AT: gl.constexpr = small_piece_start(self.BLOCK, self.PIECE, SMALL, NUMBER)[AXIS]
        if AT > 0:
            position += AT
        if self.MODES[AXIS] >= windows.CIRCULAR:
            position = wrapped(position, self.length[AXIS])
        return position

    @gluon.jit
    def _places(self, side, start, AT_SEAM: gl.constexpr):
        """Where TMA finds the pieces of a block of a side's tokens, which begins at ``start``."""
        SMALL: gl.constexpr = self.SEAM_PIECE if AT_SEAM else self.PIECE
        found = ()
        for i in gl.static_range(volume(self.BLOCK) // volume(SMALL)):
            p0 = self._piece_at(start, SMALL, i, 0)
            p1 = self._piece_at(start, SMALL, i, 1)
            p2 = self._piece_at(start, SMALL, i, 2)
            found = found + (side.load_at((p0, p1, p2)),)
        return found

    @gluon.jit
    def _crosses_seam(self, start):
        """Whether a block that begins at ``start`` may have a piece on both ends of a ring."""
        found = False
        for AXIS in gl.static_range(3):
            if self.SEAM_PIECE[AXIS] < self.PIECE[AXIS]:
                n = self.length[AXIS]
                found = (wrapped(start[AXIS], n) + self.BLOCK[AXIS] > n) | found
        return found

    @gluon.jit
    def fetch(self, pipeline, stage, tensors, bases, side, start):
        """Have a pipeline fetch a block of a side's tokens, which begins at ``start``."""
        if self.SEAM_PIECE == self.PIECE:
            places = self._places(side, start, False)
            pipeline.produce(stage, tensors, bases, places, TOKENS=fetched_tokens(self.BLOCK))
        else:
            if self._crosses_seam(start):
                pipeline.produce(stage, tensors, bases, self._places(side, start, True), True)
            else:
                pipeline.produce(stage, tensors, bases, self._places(side, start, False))

    @gluon.jit
    def row_of_tile(self, first, NUMBER: gl.constexpr):
        """Where the row of that number begins of a warpgroup's tile."""
        TILE: gl.constexpr = self.TILE
        AT: gl.constexpr = piece_start(TILE, (1, 1, TILE[2]), NUMBER)
        return first[0] + AT[0], first[1] + AT[1], first[2]

    @gluon.jit
    def places_of_tile(self, side, first):
        """Where TMA finds a warpgroup's tile, in pieces as blocks are."""
        found = ()
        if len(self.tile_table) > 0:
            for i in gl.static_range(self.TILE[0] * self.TILE[1]):
                found = found + (side.load_at(self.row_of_tile(first, i)),)
        else:
            found = (side.load_at(first),)
        return found

    @gluon.jit
    def store_tile(self, tensor, base, side, first, buffer):
        """Start to write a warpgroup's tile ``[PIECES, *piece, channels]``."""
        if len(self.tile_table) > 0:
            for i in gl.static_range(self.TILE[0] * self.TILE[1]):
                row = self.row_of_tile(first, i)
                if (row[0] < side.length[0]) & (row[1] < side.length[1]):
                    tensor.store(base, side.at(row), buffer.slice(i, 1))
        else:
            tensor.store(base, side.at(first), buffer)

    @gluon.jit
    def next_block(self, block, blocks):
        """The one after ``block``: divisions would cost as much as a softmax."""
        fast = blocks[1 if self.SPLIT_AXIS == 2 else 2]
        middle = blocks[1 if self.SPLIT_AXIS == 0 else 0]
        j0 = block[0] + 1
        j1 = gl.where(j0 == fast, block[1] + 1, block[1])
        j2 = gl.where(j1 == middle, block[2] + 1, block[2])
        return gl.where(j0 == fast, 0, j0), gl.where(j1 == middle, 0, j1), j2

    @gluon.jit
    def reach(self, group, first, AXIS: gl.constexpr):
        """Of a warpgroup's tokens from ``first`` on: partners of any, and partners of all.

        Partners move monotonically, so those of the first and the last token bound both.
        """
        start, inner_end = self.partners(group, first[AXIS], AXIS)
        inner_start, end = self.partners(group, first[AXIS] + self.TILE[AXIS] - 1, AXIS)
        return start, end, inner_start, inner_end

    @gluon.jit
    def own_blocks(self, first, tile):
        """A warpgroup's blocks among the tile's: the number of the first, of one past the last, and
        of all; and the first, as :meth:`block_start` counts."""
        SIZE: gl.constexpr = self.BLOCK[self.SPLIT_AXIS]
        count = tile.blocks[0] * tile.blocks[1] * tile.blocks[2]
        if self.WARPGROUPS == 1:  # all of the tile's
            return 0, count, count, (count * 0, count * 0, count * 0)
        layer = count // tile.blocks[self.SPLIT_AXIS]
        start, end, _, _ = self.reach(tile.group, first, self.SPLIT_AXIS)
        if _from_the_end(self.MODES, self.OF_KEYS):
            last = tile.origin[2] + SIZE
            before, after = (last - end) // SIZE, (last - start + SIZE - 1) // SIZE
        else:
            before = (start - tile.origin[self.SPLIT_AXIS]) // SIZE
            after = (end - tile.origin[self.SPLIT_AXIS] + SIZE - 1) // SIZE
        if self.QUERIES != OWN:
            before = gl.minimum(before, tile.blocks[self.SPLIT_AXIS] - 1)
            after = gl.maximum(after, before + 1)
        return before * layer, after * layer, count, (before * 0, before * 0, before)
