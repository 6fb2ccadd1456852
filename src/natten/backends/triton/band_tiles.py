"""Which problems have the kernels of bands, with which tiles, and what these cost.

This file needs no Triton.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any, NamedTuple

from ... import tuning
from ...neighborhood import Neighborhood, Rule
from ...tiling import group_kinds, padded
from ..interface import Shape
from . import small_tiles
from . import tiles as tiling

WARPS = 4  # of a program
CHANNELS = (32, 64)
_ROWS = 16  # of a warp
_STAGES = 2
_COLUMNS = (16, 32)  # of a step
_HALOS = (32, 64, 128)  # columns of a line
_PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4}
# Instructions of a step beside products and what loads their operands, and of a band.
_STEP, _BAND = 100.0, 120.0


class BandTiles(NamedTuple):
    """How the kernels cut a problem: rows of a warp and columns of its step, per axis, and columns
    of a line."""

    tile: Shape
    block: Shape
    halo: int

    def program(self) -> Shape:
        """Rows of a program."""
        return (*self.tile[:2], WARPS * self.tile[2])

    def shared_bytes(self, dim: int) -> int:
        """Shared memory of a program."""
        return _STAGES * 2 * self.block[0] * self.block[1] * self.halo * dim * 4


def choose(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool, scale: float,
) -> BandTiles | None:  # fmt: skip
    """Tiles of a kind of kernel; None if the portable kernel runs a problem, which has no masks of
    keys and no additional tokens: where these can not, where it does not pay, and where the other
    one's tiles are to be measured, or were."""
    gpu, sizes = tiling.gpu(), (shape, key_shape, dim, value_dim, itemsize, bias)
    if itemsize < 4 or not gpu.tf32 or bias:
        return None
    if dim != value_dim or dim not in CHANNELS or not 1e-20 < scale < 1e6:
        return None
    if not isinstance(rule, Neighborhood) or max(rule.queries_per_key) > 1:
        return None
    if math.prod(shape[:-1]) == 1:  # one band, which Triton 3.6 fails to compile
        return None
    if rule.query_offset is not None or not small_tiles.runs_here():
        return None
    wanted = tuning.wanted(backward=kind != "forward") > 1
    if wanted or tuning.lookup(tiling.key(kind, rule, *sizes)):
        return None
    found = cheapest(kind, rule, tuple(shape), dim, gpu.shared)
    if found is None or not pays(found.pairs, kind, rule, *sizes):
        return None
    return found.tiles


def pays(pairs: int, kind: str, rule: Rule, shape: Shape, key_shape: Shape, *sizes: Any) -> bool:
    """Whether so many pairs take less time here: a pair does, so no more than there are enough."""
    tiles = tiling.choose(kind, rule, shape, key_shape, *sizes)
    return pairs <= tiling.computed_pairs(kind, rule, shape, key_shape, tiles)


class Cut(NamedTuple):
    """A way to cut a problem."""

    cost: float  # instructions of a warp of each program, added up over a dilation group's programs
    tiles: BandTiles
    pairs: int  # of rows and columns that are computed, per batch entry and head


@lru_cache(maxsize=1024)
def cheapest(kind: str, rule: Neighborhood, shape: Shape, dim: int, shared: int) -> Cut | None:
    """The way that costs least, if any has room."""
    return min(every(kind, rule, shape, dim, shared), default=None)


def every(kind: str, rule: Neighborhood, shape: Shape, dim: int, shared: int) -> list[Cut]:
    """All ways that have room, with ``shared`` bytes of a multiprocessor."""
    of_keys, rank = kind == "dkdv", len(shape)
    axes = [(rule.of_axis(axis), length) for axis, length in enumerate(shape)]
    missing, found = 3 - rank, []
    blocks = [b for n in _COLUMNS for b in small_tiles.shapes(n, rank) if 8 <= b[2] <= 32]
    for tile, block in itertools.product(small_tiles.shapes(_ROWS, rank), blocks):
        bands = 1
        for axis, t, b in zip(axes[:-1], tile[missing:], block[missing:]):
            bands *= _bands(*axis, of_keys, t, b)
        steps, lines, need = _along_line(*axes[-1], of_keys, tile[2], block[2])
        halo = next((n for n in _HALOS if n >= need), None)
        if halo is None:
            continue
        tiles = BandTiles(tile, block, halo)
        needed = tiles.shared_bytes(dim) + small_tiles.SHARED_OF_PROGRAM
        if _programs(kind, dim) * needed > shared + small_tiles.SHARED_OF_PROGRAM:
            continue
        columns, of_band = math.prod(block), block[0] * block[1]
        step = _STEP + _PRODUCTS[kind] * columns * dim / 16  # that many are products
        copy = _BAND + of_band * halo * dim / 64
        pairs = bands * steps * WARPS * _ROWS * columns * math.prod(rule.dilation)
        found.append(Cut(bands * (steps * step + lines * copy), tiles, pairs))
    return found


@lru_cache(maxsize=4096)
def _bands(rule: Neighborhood, length: int, of_keys: bool, tile: int, block: int) -> int:
    """Blocks that all tiles reach along an axis that is not the last."""
    start, end = tiling.reaches(rule, length, length, 0, of_keys)
    return tiling.visited_by(tiling.spans_of(start, end, tile), block)


@lru_cache(maxsize=4096)
def _along_line(
    rule: Neighborhood, length: int, of_keys: bool, tile: int, block: int
) -> tuple[int, int, int]:
    """Along the last axis: blocks of a warp of each program, summed, how many programs there are,
    and how many columns a line has at least."""
    total = programs = need = 0
    for group, _ in group_kinds(length, rule.dilation[0]):
        start, end = tiling.reaches(rule, length, length, group, of_keys)
        last = len(start) - 1
        for begin in range(0, last + 1, WARPS * tile):
            stop = min(begin + WARPS * tile, last + 1)
            firsts = range(begin, stop, tile)
            most = max(end[min(i + tile - 1, last)] - start[i] for i in firsts)
            visited = -(-most // block)
            need = max(need, end[stop - 1] - start[begin], visited * block)
            if group == 0:
                total, programs = total + visited, programs + 1
    return total, programs, need


def _programs(kind: str, dim: int) -> int:
    """How many run at once on a multiprocessor: registers of dK and dV have room for two."""
    return 2 if kind == "dkdv" and dim > 32 else 3


def registers(kind: str, dim: int) -> int:
    """Of a thread at most."""
    return 255 if _programs(kind, dim) == 2 else 168


def grid(rule: Neighborhood, space: Shape, program: Shape, heads: int) -> tuple[Shape, Shape]:
    """Programs of a launch, and how many there are per axis of the longest dilation group."""
    lengths = padded([-(-length // d) for length, d in zip(space, rule.dilation)], 1)
    counts = tuple(-(-length // size) for length, size in zip(lengths, program))
    return (math.prod(counts), math.prod(rule.dilation), heads), counts
