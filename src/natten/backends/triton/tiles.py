"""Tile shapes of the kernels, by cost: blocks visited, rows wasted, registers, shared memory.

The estimate ranks them; what :mod:`natten.tuning` remembers from measuring comes first.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from operator import contains, itemgetter, sub
from typing import Any, NamedTuple

import torch

from ... import tuning
from ..._torch import allows_tf32
from ...documents import roomy
from ...neighborhood import Dense, Neighborhood, Rule, queries_before
from ...tiling import group_kinds, padded, reach
from ..interface import Shape, Tiles

_log = logging.getLogger("natten")

_LESS = 0.999999  # of a lower bound, as sums are rounded
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_LEAST_ROWS = 16  # of a product

# Costs beside products, in products of 64 x 32 rows with 64 channels: of a visited block, of a
# program, and of a block of the forward where two warpgroups wait for it.
_BLOCK_COST, _PROGRAM_COST, _TWO_WARPGROUPS_COST = 1.0, 3.0, 0.6
# What such a product takes, forward, on an H200 with all that is beside it: cycles of a
# multiprocessor (benchmarks/results/hopper-log.md).
_CYCLES = 430.0

# Bytes of shared memory that a program may have, by NVIDIA's compute capability; 0 is AMD's.
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448, 0: 65536}


class Gpu(NamedTuple):
    """What of a GPU decides tiles.

    Attributes:
        capability: NVIDIA's, as 90 for 9.0; 0 for AMD's.
        shared: bytes of shared memory that a program may have.
        multiprocessors: how many there are; by default an H100's.
        tf32: whether its products of float32 may be rounded to TF32.
    """

    capability: int
    shared: int
    multiprocessors: int = 132
    tf32: bool = False


def gpu_of(capability: int) -> Gpu:
    """A GPU that need not be there."""
    return Gpu(capability, SHARED_MEMORY[capability])


def gpu() -> Gpu:
    """The current GPU; an H100 where there is none."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else None
    return _gpu(index, allows_tf32())


@lru_cache(maxsize=64)
def _gpu(index: int | None, tf32: bool) -> Gpu:
    if index is None:
        return gpu_of(90)._replace(tf32=tf32)
    from triton.runtime import driver  # only who has a GPU needs it

    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    major, minor = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(index)
    count = torch.cuda.get_device_properties(index).multi_processor_count
    return Gpu(10 * major + minor, shared, count, tf32)


def padded_channels(channels: int) -> int:
    """Channels that a kernel has for a head's: a power of two that the matrix units take."""
    return max(16, 1 << (channels - 1).bit_length())


def _rounds(dim: int, value_dim: int, itemsize: int, gpu: Gpu) -> bool:
    """Whether tiles are those of products that are rounded to TF32. Sums of wide heads have no room
    in two warps; they have the tiles of exact products."""
    channels = max(padded_channels(dim), padded_channels(value_dim))
    return itemsize > 2 and gpu.tf32 and gpu.capability > 0 and channels <= 64


def _limits(
    kind: str, dim: int, value_dim: int, itemsize: int, bias: bool, gpu: Gpu
) -> tuple[int, int]:
    """The most rows of a tile, and of a block, that registers have room for.

    Tiles of 64 rows, one warpgroup, leave room for several programs per multiprocessor, which hide
    each other's waiting. Beside two sums of wide heads there is room for 32 columns. Of the widest
    values, a tile of 16 keys fills registers: they are there beside their sum. Exact products of 32
    bits have both operands in registers, whole. Where they are rounded to TF32, a warpgroup's need
    blocks transposed in shared memory, number by number, which pays for dQ only. With narrow heads,
    addresses of biases take the most registers; beside the weights of dK and dV there is room for
    them only where products read shared memory (NVIDIA's from 9.0 on) or where there are 512
    registers (AMD).
    """
    wide = max(padded_channels(dim), padded_channels(value_dim)) * itemsize // 2
    rows, cols = max(16, min(64, 16384 // wide)), max(16, min(64, 8192 // wide))
    if kind == "dq" and _rounds(dim, value_dim, itemsize, gpu):
        return 64, 32
    if itemsize > 2:
        return min(32, rows), min(32, cols)
    if kind == "dkdv" and wide == 128:
        return 64, 32
    if kind == "dkdv" and wide == 512:
        return 16, 32
    if bias and wide <= 32 and (kind != "dkdv" or 0 < gpu.capability < 90):
        return rows, 32
    if wide == 128 and gpu.capability == 90:
        return 128, 64
    return rows, cols


def register_limit(
    kind: str, dim: int, value_dim: int, itemsize: int, num_warps: int
) -> dict[str, int]:
    """An option that limits a thread's registers, where a kernel with a mask of keys has one.

    Without a mask, registers of an H100 have room for three programs of narrow heads at once. With
    one ptxas takes a few more, and there is room for two, unless it is told not to.
    """
    wide = max(padded_channels(dim), padded_channels(value_dim)) * itemsize // 2
    if kind == "dkdv" or itemsize > 2 or wide > 32 or num_warps > 4 or gpu().capability != 90:
        return {}
    return {"maxnreg": 168}


def _stages(kind: str, rows: int, cols: int, channels: int, itemsize: int) -> int:
    """Blocks in flight; more than two pay where a tile's own operands leave room."""
    if cols * channels * itemsize > 40_000:
        return 1
    if kind == "dkdv":
        return 3 if channels > 128 else 2
    return 3 if kind == "forward" or rows >= 128 or channels <= 128 else 2


def stages_of_both(tiles: Tiles, dim: int, value_dim: int, itemsize: int) -> int:
    """Steps in flight where each has a tile of queries and a block of keys of its own.

    One where products are exact: both operands take registers, whole.
    """
    rows = math.prod(tiles.q_block) + math.prod(tiles.kv_block)
    step = rows * (padded_channels(dim) + padded_channels(value_dim)) * itemsize
    return 1 if itemsize > 2 else max(1, min(3, (gpu().shared - 2048) // step))


def _shared(
    kind: str, rows: int, cols: int, dim: int, value_dim: int, itemsize: int, stages: int, gpu: Gpu
) -> int:
    """Bytes of shared memory, as Triton 3.6 uses it where the limit matters.

    That is on AMD (64 kB), and on NVIDIA's GPUs but those of data centers (99 kB), whose matrix
    units take 16-bit weights of dK and dV from registers.
    """
    scores = rows * cols * itemsize
    blocks = cols * (dim + value_dim) * itemsize * max(1, stages - 1)
    if gpu.capability == 0:
        return blocks + scores  # the tile is in registers
    tile = rows * (dim if kind == "forward" else dim + value_dim) * itemsize
    return tile + blocks + (scores if kind != "dkdv" or itemsize > 2 else 0) + 1024


class _AxisTiles(NamedTuple):
    """An axis cut into tiles of ``size``: how many, and the blocks they visit by block size."""

    size: int
    tiles: int
    visited: dict[int, int]


_NO_AXIS = {1: _AxisTiles(1, 1, dict.fromkeys(_SIZES, 1))}  # that a layout does not have


@lru_cache(maxsize=256)
def reaches(
    rule: Rule, length: int, key_length: int, group: int, of_keys: bool
) -> tuple[list[int], list[int]]:
    """First and one-past-last partner of each token of one axis; ``of_keys``: of keys."""
    start, end = reach(rule, 0, length, key_length, group, of_keys)
    return start.tolist(), end.tolist()


def spans_of(start: list[int], end: list[int], size: int) -> Counter[int]:
    """How many positions each tile of ``size`` reaches, given what each position reaches; tiles
    that reach as many are counted."""
    stops = end[size - 1 :: size] + (end[-1:] if len(end) % size else [])
    return Counter(map(sub, stops, start[::size]))


def visited_by(spans: Counter[int], size: int) -> int:
    """How many blocks of ``size`` tiles visit."""
    return sum(count * -(-span // size) for span, count in spans.items())


@lru_cache(maxsize=1024)
def _axis(rule: Rule, length: int, key_length: int, of_keys: bool, size: int) -> _AxisTiles | None:
    """One axis, cut into tiles of ``size``; None if they are much longer than it is."""
    start, end = reaches(rule, length, key_length, 0, of_keys)
    if size > 16 and size >= 2 * len(start):
        return None
    spans = spans_of(start, end, size)
    return _AxisTiles(size, spans.total(), {s: visited_by(spans, s) for s in _SIZES})


# Windows are not counted as longer, nor parts: tiles have at most 128 rows.
_LONGEST = 4096


@lru_cache(maxsize=1024)
def part_size(shape: Shape) -> Shape:
    """A size of parts for which the tiles of ``shape`` are chosen, a bit larger."""
    return tuple(min(roomy(length), _LONGEST) for length in shape)


@lru_cache(maxsize=1024)
def typical(rule: Rule, shape: Shape, key_shape: Shape) -> tuple[Rule, Shape, Shape]:
    """The problem whose tiles a problem has.

    Of queries that are a part of the layout it is one dilation group, in which all keys of their
    windows lie beside them, and there are a few more queries. So neither an offset nor the length
    of a cache of keys changes tiles, for which kernels are compiled.
    """
    if isinstance(rule, Dense) or rule.query_offset is None:
        return rule, shape, key_shape
    axes = []
    for length, k, s, d, r in zip(
        part_size(shape), rule.kernel_size, rule.stride, rule.dilation, rule.queries_per_key
    ):
        count = queries_before(length, 0, d, r)
        k, s = min(k, _LONGEST), min(s, _LONGEST)
        beside = -(-k // s)  # strides
        axes.append((count, (-(-count // (r * s)) + 2 * beside) * s, k, s, beside * s * r))
    shape, key_shape, kernel_size, stride, offset = zip(*axes)
    own = replace(
        rule, kernel_size=kernel_size, stride=stride, dilation=(1,) * rule.rank, query_offset=offset
    )
    return own, shape, key_shape


def key(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool = False,
) -> str:  # fmt: skip
    """The name of a problem in :mod:`natten.tuning`."""
    rule, shape, key_shape = typical(rule, shape, key_shape)
    sizes = "-".join("x".join(map(str, each)) for each in (shape, key_shape))
    others = "-bias" * bias + "-tf32" * (itemsize > 2 and gpu().tf32)
    return f"triton-{kind}-{sizes}-{rule}-{dim}-{value_dim}-{itemsize}{others}"


def choose(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool = False, asked_q_block: Shape = (), asked_kv_block: Shape = (),
) -> Tiles:  # fmt: skip
    """The tiles asked for, else those measured to be fastest, else those estimated to be cheapest
    or nearly so (:func:`usual`).

    Args:
        kind: of kernel, one of ``interface.KINDS``.
        bias: whether there is one.
        asked_q_block, asked_kv_block: shapes, 0 or nothing where any will do.
    """
    problem = (kind, rule, shape, key_shape, dim, value_dim, itemsize, bias)
    if any(asked_q_block) or any(asked_kv_block):
        fitting = (
            tiles
            for tiles in candidates(*problem)
            if _is_asked(tiles.q_block, asked_q_block) and _is_asked(tiles.kv_block, asked_kv_block)
        )
        found = next(fitting, None)
        if found is not None:
            return found
        _log.debug("the %s kernel has no tiles %s and %s", kind, asked_q_block, asked_kv_block)
    model = typical(rule, shape, key_shape)
    of_model = partial(_usual, kind, *model, dim, value_dim, itemsize, bias, gpu())
    return tuning.choose(key(*problem), partial(candidates, *problem), of_model)


def _is_asked(tile: Shape, asked: Shape) -> bool:
    return not any(asked) or tile[3 - len(asked) :] == asked


def forward_cycles(rule: Rule, shape: Shape, key_shape: Shape, *sizes: Any) -> float:
    """Cycles of a multiprocessor per batch entry, head and dilation group, with the cheapest tiles;
    ``sizes`` as of :func:`choose`."""
    return _cycles_of("forward", *typical(rule, shape, key_shape), *sizes, gpu())


@lru_cache(maxsize=1024)
def _cycles_of(*problem: Any) -> float:
    found = _Search(*problem).cheapest()
    assert found is not None
    return found[0] * _CYCLES


def candidates(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool = False,
) -> list[Tiles]:  # fmt: skip
    """Tiles that fit the current GPU's registers and shared memory: what :func:`choose` takes if no
    others were measured, then the others, cheapest first by estimate."""
    problem = typical(rule, shape, key_shape)
    return _candidates(kind, *problem, dim, value_dim, itemsize, bias, gpu())


@lru_cache(maxsize=64)
def _candidates(*problem: Any) -> list[Tiles]:
    first = _usual(*problem)
    return [first, *(tiles for tiles in _Search(*problem).every() if tiles != first)]


@lru_cache(maxsize=1024)
def _usual(*problem: Any) -> Tiles:
    found = usual(_Search, *problem)
    assert found is not None
    return found


LARGE = 8192  # tokens of a layout that has tiles of its own

# A kernel is compiled for its tiles, which takes longer than many calls of a small layout. So that
# layouts of all sizes need few kernels, tiles that those of a rule share may cost more than the
# cheapest, by such a part of it, in layouts of fewer tokens.
_MORE_FOR_SHARED = ((1536, 0.35), (4096, 0.05), (LARGE, 0.035))


def usual(
    search: Callable[..., Any], kind: str, rule: Rule, shape: Shape, key_shape: Shape, *sizes: Any
) -> Tiles | None:
    """The tiles that are taken unless others were measured; None if none fit.

    Which ones follows from the problem alone, not from what ran before.

    Args:
        search: makes of a problem an object as :class:`_Search`.
        kind, rule, shape, key_shape, sizes: the problem.
    """
    found = search(kind, rule, shape, key_shape, *sizes)
    more, other, most = more_for_shared(rule, shape), None, math.inf
    if more:
        assert isinstance(rule, Neighborhood)
        shared = _shared_tiles(search, kind, replace(rule, dilation=(1,) * rule.rank), *sizes)
        other = min(filter(None, map(found.priced, shared)), default=None)
        most = math.inf if other is None else other[0] / (1 + more)
    taken = found.cheapest(most) or other
    return taken and taken[1]


def more_for_shared(rule: Rule, shape: Shape) -> float:
    """By what part of the cheapest tiles' cost others may cost more in a layout; 0 of a part, whose
    tiles are those of a rounded size, and of windows that nearly fill a layout: with its size, they
    change, too."""
    tokens = math.prod(shape)
    if isinstance(rule, Dense) or not rule.is_self_attention or 2 * rule.window_tokens > tokens:
        return 0.0
    return next((more for most, more in _MORE_FOR_SHARED if tokens < most), 0.0)


@lru_cache(maxsize=64)
def _shared_tiles(
    search: Callable[..., Any], kind: str, rule: Neighborhood, *sizes: Any
) -> tuple[Tiles, ...]:
    """The cheapest tiles of layouts in which one axis is long, of each axis."""
    found = []
    for long in range(rule.rank):
        windows = [12 if axis == long else 3 for axis in range(rule.rank)]
        axes = zip(windows, rule.kernel_size, rule.stride)
        shape = tuple(-(-count * k // s) * s for count, k, s in axes)
        found.append(search(kind, rule, shape, shape, *sizes).cheapest())
    return tuple(each[1] for each in found if each is not None)


class _Search:
    """Tiles for a problem, by what they cost.

    There are thousands, so costs are plain numbers: as many objects would have Python look for
    garbage.
    """

    def __init__(
        self, kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int,
        itemsize: int, bias: bool, gpu: Gpu,
    ) -> None:  # fmt: skip
        self.kind, rank = kind, len(shape)
        most_rows, most_cols = _limits(kind, dim, value_dim, itemsize, bias, gpu)
        axes = zip(map(rule.of_axis, range(rank)), shape, key_shape)
        cut = [[_axis(*each, kind == "dkdv", n) for n in _SIZES if n <= most_rows] for each in axes]
        self.axes = padded([{each.size: each for each in axis if each} for axis in cut], _NO_AXIS)
        shapes = _shapes(_LEAST_ROWS, most_rows, rank)
        self.shapes = [(rows, tile) for rows, tile in shapes if self._is_cut(tile)]
        self.ways = _ways(kind, most_rows, most_cols, rank, dim, value_dim, itemsize, gpu)

    def every(self) -> list[Tiles]:
        """All tiles that fit, cheapest first."""
        every = []
        for rows, tile in self.shapes:
            costs = self._costs(rows, tile)
            every += [(cost, tile, way) for way, cost in zip(self.ways[rows], costs)]
        every.sort(key=itemgetter(0))
        return [way.tiles(self.kind, tile) for _, tile, way in every]

    def cheapest(self, most: float = math.inf) -> tuple[float, Tiles] | None:
        """The first of :meth:`every` and its cost, None if that is not less than ``most``: in the
        order of lower bounds, up to one that is above what was found."""
        best, found, at = most, None, -1
        for bound, number in self._bounds():
            if bound > best:
                break
            rows, tile = self.shapes[number]
            costs = self._costs(rows, tile)
            cost = min(costs)
            if cost < best or (cost == best and number < at):
                way = self.ways[rows][costs.index(cost)]
                best, found, at = cost, way.tiles(self.kind, tile), number
        return found and (best, found)

    def priced(self, tiles: Tiles) -> tuple[float, Tiles] | None:
        """What tiles cost; None if an axis is too short for them."""
        tile, block = tiles.q_block, tiles.kv_block
        if self.kind == "dkdv":
            tile, block = block, tile
        if not self._is_cut(tile):
            return None
        rows = math.prod(tile)
        costs = zip(self.ways[rows], self._costs(rows, tile))
        return next((cost, tiles) for way, cost in costs if way.block == block)

    def _is_cut(self, tile: Shape) -> bool:
        """Whether every axis is long enough for a tile."""
        return all(map(contains, self.axes, tile))

    def _bounds(self) -> list[tuple[float, int]]:
        """What each of :attr:`shapes` costs at least, and its number, from the lowest on: as if
        blocks had no column without a partner."""
        bounds = []
        for number, (rows, tile) in enumerate(self.shapes):
            x, y, z = (axis[n] for axis, n in zip(self.axes, tile))
            pairs = x.visited[1] * y.visited[1] * z.visited[1]
            programs = x.tiles * y.tiles * z.tiles * _PROGRAM_COST
            bounds.append((_LESS * (pairs * self.ways[rows].per_column + programs), number))
        return sorted(bounds)

    def _costs(self, rows: int, tile: Shape) -> list[float]:
        """What the ways to run a tile of so many rows cost."""
        x, y, z = (axis[n] for axis, n in zip(self.axes, tile))
        programs = x.tiles * y.tiles * z.tiles * _PROGRAM_COST
        x, y, z = x.visited, y.visited, z.visited
        return [x[a] * y[b] * z[c] * each + programs for (a, b, c), _, _, each in self.ways[rows]]


class _Way(NamedTuple):
    """How tiles may run."""

    block: Shape
    num_warps: int
    num_stages: int
    per_block: float  # cost

    def tiles(self, kind: str, tile: Shape) -> Tiles:
        """These of a kind of kernel, with a shape of what stays."""
        both = (self.block, tile) if kind == "dkdv" else (tile, self.block)
        return Tiles(*both, self.num_warps, self.num_stages)


class _Ways(list[_Way]):
    """How tiles of as many rows may run."""

    @cached_property
    def per_column(self) -> float:
        """What a column of a block costs at least."""
        return min(way.per_block / math.prod(way.block) for way in self)


@lru_cache(maxsize=64)
def _ways(
    kind: str, most_rows: int, most_cols: int, rank: int, dim: int, value_dim: int, itemsize: int,
    gpu: Gpu,
) -> dict[int, _Ways]:  # fmt: skip
    """The ways that fit, by the rows of a tile. Where none fits, all: Triton says what is missing.

    Blocks have ``most_cols`` columns, or half as many.
    """
    dims = padded_channels(dim), padded_channels(value_dim)

    def fits(rows: int, cols: int, stages: int) -> bool:
        return _shared(kind, rows, cols, *dims, itemsize, stages, gpu) <= gpu.shared

    every: dict[int, _Ways] = defaultdict(_Ways)
    fitting: dict[int, _Ways] = defaultdict(_Ways)
    rows_of_tiles = sorted({rows for rows, _ in _shapes(_LEAST_ROWS, most_rows, rank)})
    blocks = _shapes(max(_LEAST_ROWS, most_cols // 2), most_cols, rank)
    for rows, (cols, block) in itertools.product(rows_of_tiles, blocks):
        products = max(rows, 32) * max(cols, 32) / (64 * 32) * sum(dims) / 128
        num_warps = 8 if rows >= 128 else 4  # eight are two warpgroups of 64 rows each
        if rows < 64 and _rounds(dim, value_dim, itemsize, gpu):
            num_warps = 2  # each has 16 of 32 rows; two more would compute the same
        num_stages = _stages(kind, rows, cols, sum(dims), itemsize)
        while num_stages > 1 and not fits(rows, cols, num_stages):
            num_stages -= 1
        two_warpgroups = kind == "forward" and num_warps == 8
        per_block = products + _BLOCK_COST + _TWO_WARPGROUPS_COST * two_warpgroups
        way = _Way(block, num_warps, num_stages, per_block)
        every[rows].append(way)
        if fits(rows, cols, num_stages):
            fitting[rows].append(way)
    return fitting or every


@lru_cache(maxsize=64)
def _shapes(least: int, most: int, rank: int) -> list[tuple[int, Shape]]:
    """Three-axis shapes of powers of two with ``least`` to ``most`` tokens, and these numbers."""
    sizes = [_SIZES if axis >= 3 - rank else (1,) for axis in range(3)]
    counted = ((math.prod(shape), shape) for shape in itertools.product(*sizes))
    return [(count, shape) for count, shape in counted if least <= count <= most]


def computed_pairs(kind: str, rule: Rule, shape: Shape, key_shape: Shape, tiles: Tiles) -> int:
    """Query-key pairs that a kernel computes per batch entry and head, wasted ones included."""
    of_keys = kind == "dkdv"
    tile, other = tiles.q_block, tiles.kv_block
    if of_keys:
        tile, other = other, tile
    pairs = math.prod(tile) * math.prod(other)
    for axis, (length, key_length, d) in enumerate(zip(shape, key_shape, rule.dilation)):
        i = axis + 3 - len(shape)
        visited = 0
        kinds = group_kinds(length, d)
        if isinstance(rule, Neighborhood) and not rule.is_self_attention:
            kinds = [(group, 1) for group in range(d)]
        for group, groups in kinds:
            reached = reaches(rule.of_axis(axis), length, key_length, group, of_keys)
            visited += groups * visited_by(spans_of(*reached, tile[i]), other[i])
        pairs *= visited
    return pairs
