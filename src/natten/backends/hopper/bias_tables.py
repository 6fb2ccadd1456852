"""How large a table of a relative positional bias is, and where a pair's entry is in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...tiling import padded
from ..interface import Shape


class Table(NamedTuple):
    """A head's table of the bias, which has every pair of a tile and of its blocks.

    Attributes:
        size: how many numbers it has.
        strides: per axis.
        before: per axis, entries before that of a query and the key at its own position.
        middle: the index of such a pair's entry.
    """

    size: int
    strides: Shape
    before: Shape
    middle: int


def table(kernel_size: Shape, tile: Sequence[int], block: Shape, earlier: Sequence[int]) -> Table:
    """The table for tiles and blocks of these shapes, which are of three axes.

    The first partner of a tile's first token is less than a window before it, and the last partner
    of its last token less than a window after it. Blocks begin at the first partner, or less than
    ``earlier`` before it, and the last one ends less than a block after the last partner.
    """
    windows = padded(kernel_size, 1)
    before = tuple(k + t + e - 3 for k, t, e in zip(windows, tile, earlier))
    sizes = [b + k + t + n - 2 for b, k, t, n in zip(before, windows, tile, block)]
    # Kernels are compiled for strides: rounded up, those of other windows are the same.
    last = 1 << (sizes[2] - 1).bit_length()
    strides = -(-sizes[1] // 8) * 8 * last if sizes[1] > 1 else last, last, 1
    middle = sum(i * stride for i, stride in zip(before, strides))
    return Table(sizes[0] * strides[0], strides, before, middle)
