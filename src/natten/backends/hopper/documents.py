"""The tiles of packed documents: a small kernel writes a table of them, another one reads it.

A row says which document a tile is of and which tile of it. Long documents come first, so that none
of their tiles ends after all others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton.launch import kernel
from .gluon_names import gdc_wait, gl, gluon

# Numbers of a row: first query, first key, queries along three axes, keys along the last one,
# window and stride along three axes, number of the tile along three axes, nothing.
TABLE_WIDTH = 16


@triton.jit
def _counts(documents, d, real, SIZES: tl.constexpr, LAST: tl.constexpr):
    """How many tiles documents have along three axes."""
    row = documents + d * 16
    n0 = tl.load(row + 2, mask=real, other=0).to(tl.int32)
    n1 = tl.load(row + 3, mask=real, other=0).to(tl.int32)
    n2 = tl.load(row + LAST, mask=real, other=0).to(tl.int32)
    return tl.cdiv(n0, SIZES[0]), tl.cdiv(n1, SIZES[1]), tl.cdiv(n2, SIZES[2])


@triton.jit
def _copy(documents, row, real, document, COLUMN: tl.constexpr):
    """Store a number of a document in rows of tiles."""
    number = tl.load(documents + document * 16 + COLUMN).to(tl.int32)
    tl.store(row + COLUMN, number, mask=real)
    return number


@kernel(triton.jit, tensors="documents tile_table")
def tile_table_kernel(
    documents, tile_table, number,
    SIZES: tl.constexpr, OF_KEYS: tl.constexpr, FROM_THE_END: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``tile_table [1 + tiles, 16]`` from the table of :class:`natten.documents.Documents`, of a
    ``number`` of documents; the first entry is how many tiles there are.

    Tiles are of ``SIZES`` queries, or keys where they are ``OF_KEYS``; ``FROM_THE_END``: the last
    tile of a document comes first. A document without tokens of the other kind is as one whose
    first token is all tokens' second one: then what is loaded in place of its last token, which it
    lacks, is the first of all (:meth:`Side.load_at`).
    """
    LAST: tl.constexpr = 5 if OF_KEYS else 4
    document = tl.program_id(0)
    c0, c1, c2 = _counts(documents, document, document < number, SIZES, LAST)
    own = c0 * c1 * c2
    first = document * 0  # the document's first tile
    every = document * 0
    for begin in range(0, number, N):
        d = begin + tl.arange(0, N)
        n0, n1, n2 = _counts(documents, d, d < number, SIZES, LAST)
        count = n0 * n1 * n2
        comes_before = (count > own) | ((count == own) & (d < document))
        first += tl.sum(tl.where(comes_before, count, 0))
        every += tl.sum(count)
    if document == 0:
        tl.store(tile_table, every)
    for begin in range(0, own, N):
        t = begin + tl.arange(0, N)
        row, real = tile_table + (1 + first + t) * 16, t < own
        for column in tl.static_range(12):
            _copy(documents, row, real, document, column)
        for side in tl.static_range(2):
            if tl.load(documents + document * 16 + 4 + side) == 0:
                tl.store(row + side, t * 0 + 1, mask=real)
        if FROM_THE_END:
            t = own - 1 - t
        tl.store(row + 12, t // (c1 * c2), mask=real)
        tl.store(row + 13, t // c2 % c1, mask=real)
        tl.store(row + 14, t % c2, mask=real)


@gluon.jit
def num_tiles_of(tile_table, heads):
    """How many tiles a head has, and all heads, of the table that the kernel before made."""
    gdc_wait()
    count = gl.load(tile_table)
    return count, count * heads
