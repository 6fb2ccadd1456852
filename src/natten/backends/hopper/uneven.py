"""Tiles and blocks that are no powers of two along each axis: which ones may take less.

Kernels have matrices of 64 or 128 rows or columns, in which a tile of 3x5x4 tokens leaves four
empty. It is worth that where tiles follow strides, so that their queries share one window, and
where windows are small, of which tiles and blocks then exceed less. How TMA fetches them is told in
``descriptors.py``.

There are too many to be priced. So tiles are ranked by how far their partners reach in all, and for
the best of them blocks are sought that cut that evenly.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache, lru_cache

from ...neighborhood import Neighborhood
from ..interface import Shape
from ..triton import releases
from ..triton.tiles import more_for_shared


@cache
def _fits_boxes() -> bool:
    """Whether TMA can be had to copy less than types say, which leans on internals of Triton."""
    version = releases.version()
    return version is None or releases.release(version) in releases.CHECKED


def may_be_uneven(rule: Neighborhood, shape: Shape) -> bool:
    """Whether tiles and blocks that are no powers of two are looked for: to follow strides that are
    none, and of small windows, where layouts are so large that they do not share kernels. Pieces of
    rings divide blocks."""
    is_small = rule.window_tokens <= _MOST_TOKENS and not more_for_shared(rule, shape)
    follows = is_small or any(s & (s - 1) for s in rule.stride)
    return follows and "circular" not in rule.boundary and _fits_boxes()


# Of a matrix's rows or columns, what part is tokens at least.
_LEAST_FILLED = 0.75
# Keys of a window up to which every tile is looked at.
_MOST_TOKENS = 2048
# For how many tiles blocks are looked for, and for how many blocks.
_TILES, _BLOCKS = 12, 3


def _sizes(length: int, stride: int, rows: int) -> list[int]:
    """Along an axis, tokens of tiles that follow its stride: parts of it, or several."""
    whole = range(1, rows + 1) if stride == 1 else [stride << i for i in range(rows.bit_length())]
    parts = [size for size in range(1, stride) if stride % size == 0]
    return [size for size in (*parts, *whole) if size == 1 or size < 2 * length]


@lru_cache(maxsize=256)
def tiles_of_strides(
    rows: int, lengths: Shape, windows: Shape, strides: Shape
) -> list[tuple[int, Shape, Shape]]:
    """A few tiles of up to so many rows whose partners are the fewest: how many tiles there are,
    the tile, and how far its partners reach along each axis, which is about the same of keys."""
    axes = []
    for n, k, s in zip(lengths, windows, strides):
        sizes = _sizes(n, s, rows)
        spans = [min(n, k + s * ((size - 1) // s)) for size in sizes]
        axes.append([(size, -(-n // size), span) for size, span in zip(sizes, spans)])
    x, y, z = axes
    last = [size for size, _, _ in z]
    found = []
    for (a, tiles_a, span_a), (b, tiles_b, span_b) in itertools.product(x, y):
        first = bisect_right(last, int(_LEAST_FILLED * rows) // (a * b))
        for c, tiles_c, span_c in z[first : bisect_right(last, rows // (a * b))]:
            count, span = tiles_a * tiles_b * tiles_c, (span_a, span_b, span_c)
            found.append((count * span_a * span_b * span_c, count, (a, b, c), span))
    return [each[1:] for each in sorted(found)[:_TILES]]


@lru_cache(maxsize=4096)
def blocks_of_span(span: Shape, strides: Shape, columns: int) -> list[tuple[int, Shape]]:
    """Blocks of up to so many columns that cut the partners of a tile into the fewest: how many
    there are, and a block. Those that follow strides come first, as they need fewer masks, and last
    the best of powers of two, which may be masked in more ways."""
    shapes: list[Shape] = []
    for a in _even(span[0], columns):
        for b in _even(span[1], columns // a):
            shape = a, b, -(-span[2] // -(-span[2] // (columns // (a * b))))
            powers = tuple([1 << (n - 1).bit_length() for n in shape])
            # If no column is empty, and there are as many blocks, powers of two are better.
            shapes.append(powers if math.prod(powers) == columns else shape)

    def ranked(shape: Shape) -> tuple[int, int, int, Shape]:
        count = math.prod([-(-n // size) for n, size in zip(span, shape)])
        across = sum(size % s > 0 and s % size > 0 for size, s in zip(shape, strides))
        return count, across, max(shape), shape

    filled = {shape for shape in shapes if math.prod(shape) > _LEAST_FILLED * columns}
    found = sorted(map(ranked, filled))[:_BLOCKS]
    found += sorted(map(ranked, _powers_of_two(span, columns)))[:1]
    return [(count, shape) for count, _, _, shape in dict.fromkeys(found)]


def _powers_of_two(span: Shape, columns: int) -> Iterator[Shape]:
    """Blocks of so many columns, none twice a span along an axis."""
    x, y, _ = [[1 << i for i in range((2 * n - 1).bit_length())] for n in span]
    for a, b in itertools.product(x, y):
        c = columns // (a * b)
        if c == 1 or 1 <= c < 2 * span[2]:
            yield a, b, c


@cache
def _even(length: int, most: int) -> list[int]:
    """Sizes of parts, up to some, into which a length is cut evenly."""
    return sorted({-(-length // parts) for parts in range(-(-length // most), length + 1)})
