"""Channels of heads: which kernels run heads so wide, how TMA reads them, and how caches hold them.

Kernels are compiled for a few numbers of channels. Other heads run in the next wider one's, and
what a block then has beside a head's own channels is told in ``descriptors.py``.
"""

from __future__ import annotations

import math
from functools import cache

from ..interface import Shape

HEAD_DIMS = (32, 64, 128, 256, 512)  # channels that there are kernels for; of keys, up to 256

# Channels of heads of which blocks have the next head's, which a product must not find: to set
# these to zero takes less than it takes TMA to fill rows (measured: hopper-log.md).
_WORTH_CLEARING = (24, 40, 104)


@cache
def native(channels: int) -> int:
    """Channels of the kernels that run heads of so many, which may be more."""
    return next(each for each in HEAD_DIMS if each >= channels)


def aligned(channels: int) -> int:
    """Channels of a head in memory that TMA reads: 16 bytes divide strides."""
    return -(-channels // 8) * 8


def are_half_aligned(channels: int) -> bool:
    """Whether of heads side by side every second one begins amid 16 bytes, at a multiple of 8."""
    return channels % 8 == 4


def reads_in_place(
    dim: int, value_dim: int, heads: int, kv_heads: int, has_more: bool = False
) -> bool:
    """Whether kernels read heads where they are, not wider copies: 8 divides their width, or heads
    are half aligned, and TMA reads four channels more.

    Then a head of queries must begin as that of keys and of values does, for products to find the
    same channels in one place, and tokens at multiples of 16 bytes. Copies remain if a call
    ``has_more``: a bias, masks, additional tokens or documents, which have kernels, warps or views
    of their own. Wider heads have sums in other registers.
    """
    if dim % 8 == value_dim % 8 == 0:
        return True
    is_alike = dim == value_dim and heads == kv_heads
    return is_alike and are_half_aligned(dim) and dim <= 128 and heads % 2 == 0 and not has_more


@cache
def chunks(channels: int) -> Shape:
    """What products of heads of so many channels are made of: all that kernels have, or half of
    them and a power of two that the others fit."""
    width = native(channels)
    rest = next(each for each in (16, 32, 64, 128, 256) if channels - width // 2 <= each)
    return (width,) if width == 32 or 2 * rest >= width else (width // 2, rest)


@cache
def is_joined(channels: int) -> bool:
    """Whether a block has the next head's channels beside a head's own, of heads side by side:
    where products take none of them, or where to set these to zero takes less than to fill rows;
    or where TMA can not read a head alone."""
    return native(channels) > channels and (
        channels == sum(chunks(channels)) or channels in _WORTH_CLEARING or channels % 8 > 0
    )


@cache
def cleared(channels: int) -> tuple[int, int]:
    """Channels that products take of a block and that are the next head's: the first, and the
    end."""
    return (channels, sum(chunks(channels))) if is_joined(channels) else (0, 0)


@cache
def slices(dim: int, value_dim: int) -> tuple[int, int]:
    """In how many slices of values a kernel sums outputs or dV, and the channels of a slice.

    For each slice the weights are made again. 512 channels of a sum would take all registers.
    """
    if value_dim <= 256:
        return 1, native(value_dim)
    ways = ((-(-value_dim // width), width) for width in (128, 256))
    # Scores take the time of another 256 channels of products.
    return min(ways, key=lambda way: way[0] * (native(dim) + way[1] + 256))


def are_together(dim: int, value_dim: int) -> bool:
    """Whether one pass sums dK and dV; else each has a pass of its own, for want of registers."""
    return native(dim) == native(value_dim) <= 128


def has_empty_box(channels: int) -> bool:
    """Whether TMA, which loads boxes of 64 channels, finds none of a head's in one of them."""
    return native(channels) - channels >= 64


def row_cycles(channels: int) -> float:
    """Cycles that TMA takes for a token's channels of a head, in boxes of 64 (hopper-log.md).

    It is slow where rows do not begin where 32 bytes do, and where it has zeros to fill in. With
    the next head's channels beside them, boxes take 2.5 to 4.1 alone; 3.3 fits the times of
    kernels where heads begin at multiples of 32 bytes.
    """
    if native(channels) == channels:
        return 1.7 * max(1, channels // 64)
    if is_joined(channels):
        return 3.3 * max(1, native(channels) // 64)
    box, last = (2.5, 3.9) if channels % 16 == 0 else (4.3, 6.5)
    return channels // 64 * box + last


_LINE = 128  # bytes of a line of the L2 cache


def heads_of_lines(channels: int) -> int:
    """Of how many heads side by side every line is theirs alone."""
    return _LINE // math.gcd(2 * channels, _LINE)


@cache
def split_lines(channels: int) -> float:
    """In how many lines of the L2 cache a head's channels lie, on average over heads side by side;
    0 where none begins amid a line and ends in another one."""
    size, heads = 2 * channels, heads_of_lines(channels)
    if size % _LINE == 0 or _LINE % size == 0:
        return 0.0
    first_and_last = ((i * size // _LINE, (i * size + size - 1) // _LINE) for i in range(heads))
    return sum(last - first + 1 for first, last in first_and_last) / heads


def overflows_cache(key_shape: Shape, dim: int, value_dim: int) -> bool:
    """Whether keys and values of a head that lie across lines of the L2 cache take more of it than
    the half of 50 MB; then heads that share lines have to run at once."""
    lines = split_lines(dim) + split_lines(value_dim)
    return math.prod(key_shape) * lines * _LINE > 25e6
