"""Which problems have the forward kernel of small windows, with which tiles, and what it costs.

A warp's block of keys and the halo, what a program's tiles reach, have a size along each axis that
is enough for all tiles, so that a kernel is the same wherever they are, and for layouts of all
sizes. This file needs no Triton.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from operator import mul
from typing import NamedTuple

from ... import tuning
from ...neighborhood import Neighborhood, Rule
from ...tiling import padded
from ..interface import Shape
from . import releases
from . import tiles as tiling

CHANNELS = (16, 32, 64)  # of products
_QUERIES = 16  # of a warp
_WARPS = (4, 8)  # of a program
_COLUMNS = (32, 64, 128)  # keys of a step
# Of float32 at most: for more, registers have no room beside channels of queries and sums.
_COLUMNS_OF_FLOAT32 = {16: 64, 32: 64, 64: 32}
REGISTERS = 128  # of a thread at most, so that 16 warps run at once
_WARPS_AT_ONCE = 65536 // (32 * REGISTERS)
_MOST_ROWS = 128  # of a halo, copied at once
MOST_HEADS = 2**16  # of all batch entries, along an axis of the grid; one less at most
SHARED_OF_PROGRAM = 1024  # bytes that a program takes beside its own


def width(dim: int) -> int:
    """Channels that products have for heads of so many."""
    return next(each for each in CHANNELS if each >= dim)


class SmallTiles(NamedTuple):
    """How the kernel cuts a problem, per axis: a warp's queries, its keys of one step, and the
    warps of a program."""

    q_block: Shape
    kv_block: Shape
    warps: Shape

    def blocks(self, windows: Windows) -> Shape:
        """How many blocks a warp visits: what the windows of its queries span at most."""
        axes = zip(windows, self.q_block, self.kv_block)
        return tuple([-(-(k + _apart(s, q - 1)) // n) for (k, s), q, n in axes])

    def halo(self, windows: Windows) -> Shape:
        """Keys of all warps, from the first one's first to the end of the last one's blocks; rows
        of 8 keys or a multiple."""
        axes = zip(windows, self.q_block, self.kv_block, self.warps, self.blocks(windows))
        *others, last = [_apart(s, (w - 1) * q) + b * n for (_, s), q, n, w, b in axes]
        return (*others, -(-last // 8) * 8)

    def program(self) -> Shape:
        """Queries of a program."""
        return tuple(map(mul, self.warps, self.q_block))


# Window and stride of each of three axes.
Windows = tuple[tuple[int, int], ...]


def windows_of(rule: Neighborhood) -> Windows:
    """What of a rule decides how large a halo is."""
    return tuple(zip(padded(rule.kernel_size, 1), padded(rule.stride, 1)))


def _apart(stride: int, positions: int) -> int:
    """How far the windows of two queries are apart at most, which are so many positions apart."""
    return -(-positions // stride) * stride


def rows_of_copy(keys: int, itemsize: int) -> int:
    """Rows of the halo that are copied at once. There is room for whole numbers of these, so where
    numbers have four bytes, they are fewer."""
    return min(_MOST_ROWS if itemsize == 2 else 32, 1 << (keys - 1).bit_length())


def shared_bytes(keys: int, dim: int, itemsize: int) -> int:
    """Shared memory of a program."""
    rows = rows_of_copy(keys, itemsize)
    return 2 * dim * itemsize * rows * -(-keys // rows)


def choose(
    rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool, scale: float,
) -> tuple[float, SmallTiles] | None:  # fmt: skip
    """Cycles of a multiprocessor per batch entry, head and dilation group, and tiles; None if the
    portable kernel runs a problem, which has no additional tokens.

    That is where this one can not, where it takes longer by estimate, and where the other one's
    tiles are to be measured, or were.
    """
    gpu, sizes = tiling.gpu(), (shape, key_shape, dim, value_dim, itemsize, bias)
    if itemsize > 2 and not gpu.tf32:
        return None
    if dim * itemsize % 4:  # no fewer bytes are copied at once
        return None
    if dim != value_dim or dim > CHANNELS[-1] or not 1e-20 < scale < 1e6:
        return None
    if not isinstance(rule, Neighborhood) or max(rule.queries_per_key) > 1 or not runs_here():
        return None
    if rule.query_offset is not None:  # so that parts of about one size have the same tiles
        shape = tiling.part_size(tuple(shape))
    if tuning.wanted(backward=False) > 1 or tuning.lookup(tiling.key("forward", rule, *sizes)):
        return None
    found = cheapest(rule, shape, width(dim), itemsize, gpu.shared)
    if found is None:
        return None
    cycles, tiles = found[0] * _narrower(dim, itemsize), found[1]
    return None if cycles >= tiling.forward_cycles(rule, *sizes) else (cycles, tiles)


def _narrower(dim: int, itemsize: int) -> float:
    """How much longer heads take that are narrower than products: rows lie across more lines of
    the cache, and come in smaller pieces."""
    if dim in CHANNELS:
        return 1.0
    return 1.15 if dim * itemsize % 16 == 0 else 1.2


def runs_here() -> bool:
    """Whether this is an NVIDIA GPU, and a Triton that is known to compile Gluon's kernels well."""
    version = releases.version()
    return (
        version is not None
        and releases.release(version) in releases.CHECKED
        and tiling.gpu().capability >= 80
        and os.environ.get("TRITON_INTERPRET") != "1"
    )


@lru_cache(maxsize=1024)
def cheapest(
    rule: Neighborhood, shape: Shape, dim: int, itemsize: int, shared: int
) -> tuple[float, SmallTiles] | None:
    """Cycles and tiles, the cheapest, and of equally cheap ones those with the smallest halo; None
    if no halo fits in shared memory, of which a program may have ``shared`` bytes."""
    windows = windows_of(rule)
    lengths = padded([-(-n // d) for n, d in zip(shape, rule.dilation)], 1)
    costs = (
        (
            math.prod(-(-n // size) for n, size in zip(lengths, program)) * cycles,
            math.prod(tiles.halo(windows)),
            tiles,
        )
        for program, (cycles, tiles) in _programs(windows, rule.rank, dim, itemsize, shared).items()
    )
    found = min(costs, default=None)
    return None if found is None else (found[0], found[2])


@lru_cache(maxsize=64)
def _programs(
    windows: Windows, rank: int, dim: int, itemsize: int, shared: int
) -> dict[Shape, tuple[float, SmallTiles]]:
    """By the queries of a program, its cycles and tiles, the cheapest that fit."""
    found: dict[Shape, tuple[float, SmallTiles]] = {}
    for tiles in _every(rank):
        if itemsize > 2 and math.prod(tiles.kv_block) > _COLUMNS_OF_FLOAT32[dim]:
            continue
        cycles = _cycles(tiles, windows, dim, itemsize, shared)
        program = tiles.program()
        if cycles is not None and (program not in found or cycles < found[program][0]):
            found[program] = cycles, tiles
    return found


@lru_cache(maxsize=8)
def _every(rank: int) -> list[SmallTiles]:
    """All tiles that are looked at. Along the last axis a block has 8 keys or a multiple, as rows
    of matrices do."""
    least = _COLUMNS if rank < 3 else _COLUMNS[:1]
    blocks = [shape for n in least for shape in shapes(n, rank) if 8 <= shape[2] <= 32]
    warps = [shape for n in _WARPS for shape in shapes(n, rank)]
    queries = [shape for shape in shapes(_QUERIES, rank) if rank == 1 or max(shape) <= 8]
    return [SmallTiles(*each) for each in itertools.product(queries, blocks, warps)]


def shapes(volume: int, rank: int) -> list[Shape]:
    """Three-axis shapes of powers of two with so many tokens."""
    sizes = [1 << i for i in range(volume.bit_length())]
    axes = [sizes if axis >= 3 - rank else [1] for axis in range(3)]
    return [shape for shape in itertools.product(*axes) if math.prod(shape) == volume]


# Cycles from a warp's start to its end, of which most are waiting: fitted to times of an H200
# (benchmarks/results/hopper-log.md). They pass for all warps that run at once.
_MORE_WARPS = 1.13  # times as many, where more warps than four wait for one another
_WARP_CYCLES, _BLOCK_CYCLES, _KEY_CYCLES, _CHANNEL_CYCLES = 4550.0, 450.0, 10.0, 0.66
_FLOAT32 = 1.6  # times as many, with numbers of four bytes


def _cycles(
    tiles: SmallTiles, windows: Windows, dim: int, itemsize: int, shared: int
) -> float | None:
    """Cycles of a multiprocessor that a program costs; None if two do not fit at once."""
    halo = math.prod(tiles.halo(windows))
    if 2 * dim * itemsize * halo > shared:  # windows may be huge
        return None
    needed = shared_bytes(halo, dim, itemsize)
    programs = (shared + SHARED_OF_PROGRAM) // (needed + SHARED_OF_PROGRAM)
    warps = math.prod(tiles.warps)
    programs = min(programs, _WARPS_AT_ONCE // warps)
    blocks, keys = math.prod(tiles.blocks(windows)), math.prod(tiles.kv_block)
    each = _WARP_CYCLES + blocks * (_BLOCK_CYCLES + keys * (_KEY_CYCLES + _CHANNEL_CYCLES * dim))
    waiting = 1.0 if warps == min(_WARPS) else _MORE_WARPS
    if itemsize > 2:
        waiting *= _FLOAT32
    return waiting * each / programs if programs > 1 else None


def has_room(
    halo: Shape, rule: Neighborhood, shape: Shape, strides: Sequence[int], grid: Shape
) -> bool:
    """Whether numbers of 32 bits say how far tokens of a halo are apart in memory, with ``strides``
    of each axis, and the GPU has such a grid. On a ring, tokens may be as far apart as the ends."""
    # The last rows that are copied at once may be of planes beyond the halo.
    plane = halo[1] * halo[2]
    halo = halo[0] + -(-_MOST_ROWS // plane), *halo[1:]
    apart = 0
    axes = zip(shape, halo[-rule.rank :], rule.dilation, rule.boundary, strides)
    for length, keys, dilation, boundary, stride in axes:
        tokens = length if boundary == "circular" else min(length, keys * dilation)
        apart += tokens * stride
    return apart < 2**31 and grid[0] < 2**31 and max(grid[1:]) < MOST_HEADS
