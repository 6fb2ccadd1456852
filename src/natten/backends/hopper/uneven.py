"""Tiles and blocks that are no powers of two along each axis: which ones may take less.

Kernels have matrices of 64 or 128 rows or columns, in which a tile of 3x5x4 tokens leaves four
empty. It is worth that where tiles follow strides, so that their queries share one window, and
where tiles and blocks then exceed windows less. How TMA fetches them is told in ``descriptors.py``.

There are too many to be priced. So tiles are ranked by how far their partners reach in all, and for
the best of them blocks are sought that cut that evenly.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache, lru_cache

from ...neighborhood import Neighborhood
from ..interface import Shape
from ..triton import releases
from ..triton.tiles import LARGE, more_for_shared


@cache
def _fits_boxes() -> bool:
    """Whether TMA can be had to copy less than types say, which leans on internals of Triton."""
    version = releases.version()
    return version is None or releases.release(version) in releases.CHECKED


# Keys of a window that is small.
SMALL = 2048


def may_be_uneven(rule: Neighborhood, shape: Shape, is_part: bool) -> bool:
    """Whether tiles and blocks that are no powers of two are looked for: to follow strides that are
    none; of small windows, where they follow other strides, too, or layouts do not share kernels;
    and of windows of three axes in large layouts. Parts may begin amid a stride, and pieces of
    rings divide blocks."""
    is_small, is_large = rule.window_tokens <= SMALL, math.prod(shape) >= LARGE
    has_strides = max(rule.stride) > 1
    if is_part:
        suits = is_large and (is_small or rule.rank == 3)
        suits = suits and not has_strides and max(rule.queries_per_key) == 1
    elif is_small:
        suits = has_strides or not more_for_shared(rule, shape)
    else:
        follows = any(s & (s - 1) for s in rule.stride)
        suits = follows or (is_large and rule.rank == 3)
    return suits and "circular" not in rule.boundary and _fits_boxes()


# Of a matrix's rows or columns, what part is tokens at least.
_LEAST_FILLED = 0.75
# For how many tiles blocks are looked for, and for how many blocks.
_TILES, _BLOCKS = 12, 6


def _sizes(length: int, stride: int, rows: int) -> list[int]:
    """Along an axis, tokens of tiles that follow its stride: parts of it, or several."""
    whole = range(1, rows + 1) if stride == 1 else [stride << i for i in range(rows.bit_length())]
    parts = [size for size in range(1, stride) if stride % size == 0]
    return [size for size in (*parts, *whole) if size == 1 or size < 2 * length]


@lru_cache(maxsize=256)
def tiles_of_strides(
    rows: int, lengths: Shape, partners: Shape, windows: Shape, strides: Shape, has_ends: bool
) -> list[tuple[Shape, Shape]]:
    """A few tiles of up to so many rows whose partners are the fewest, and how far partners reach
    along each axis.

    Args:
        rows: of a matrix.
        lengths, partners: tokens along each axis, and those that they may have as partners.
        windows, strides: of the rule.
        has_ends: whether windows do not move at both ends of an axis, as those of queries.
    """
    axes = zip(lengths, partners, windows, strides)
    x, y, z = (_tiles_along(*each, rows, has_ends) for each in axes)
    sizes, least = [size for size, *_ in z], int(_LEAST_FILLED * rows)
    # What fills a tile's rows, by how many tokens it has along the other axes.
    filling = [
        z[bisect_right(sizes, least // n) : bisect_right(sizes, rows // n)]
        for n in range(1, rows + 1)
    ]
    found = []
    for a, span_a, reached_a in x:
        for b, span_b, reached_b in y:
            if a * b > rows:
                break
            reached = reached_a * reached_b
            for c, span_c, reached_c in filling[a * b - 1]:
                found.append((reached * reached_c, (a, b, c), (span_a, span_b, span_c)))
    return [each[1:] for each in heapq.nsmallest(_TILES, found)]


@lru_cache(maxsize=1024)
def _tiles_along(
    length: int, partners: int, window: int, stride: int, rows: int, has_ends: bool
) -> list[tuple[int, int, int]]:
    """The tiles of up to so many tokens along an axis: their size, how far the partners of one
    reach, and those of all."""
    found = []
    for size in _sizes(length, stride, rows):
        tiles, span = -(-length // size), min(partners, window + stride * ((size - 1) // stride))
        at_ends = min(2 * (window // 2 // size), tiles) if has_ends else 0
        found.append((size, span, at_ends * window + (tiles - at_ends) * span))
    return found


@lru_cache(maxsize=4096)
def blocks_of_span(span: Shape, strides: Shape, columns: int) -> list[Shape]:
    """Blocks of up to so many columns that cut the partners of a tile into the fewest. Those that
    follow strides come first, as they need fewer masks, and last the best of powers of two, which
    may be masked in more ways."""
    shapes: list[Shape] = []
    for a in _even(span[0], columns):
        for b in _even(span[1], columns // a):
            c = -(-span[2] // -(-span[2] // (columns // (a * b))))
            # If no column is empty, and there are as many blocks, powers of two are better.
            powers = _power(a), _power(b), _power(c)
            shapes.append(powers if math.prod(powers) == columns else (a, b, c))

    def ranked(shape: Shape) -> tuple[int, int, int, Shape]:
        (x, y, z), (a, b, c) = span, shape
        count = -(-x // a) * -(-y // b) * -(-z // c)
        across = sum([size % s > 0 and s % size > 0 for size, s in zip(shape, strides)])
        return count, across, max(shape), shape

    filled = {shape for shape in shapes if math.prod(shape) > _LEAST_FILLED * columns}
    found = sorted(map(ranked, filled))[:_BLOCKS]
    found += sorted(map(ranked, _powers_of_two(span, columns)))[:1]
    return [shape for *_, shape in dict.fromkeys(found)]


def _powers_of_two(span: Shape, columns: int) -> Iterator[Shape]:
    """Blocks of so many columns, none twice a span along an axis."""
    x, y, _ = [[1 << i for i in range((2 * n - 1).bit_length())] for n in span]
    for a, b in itertools.product(x, y):
        c = columns // (a * b)
        if c == 1 or 1 <= c < 2 * span[2]:
            yield a, b, c


def _power(size: int) -> int:
    """The power of two that holds a size."""
    return 1 << (size - 1).bit_length()


@cache
def _even(length: int, most: int) -> list[int]:
    """Sizes of parts, up to some, into which a length is cut evenly."""
    return sorted({-(-length // parts) for parts in range(-(-length // most), length + 1)})
