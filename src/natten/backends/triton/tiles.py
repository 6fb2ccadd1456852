"""Tile shapes of the kernels, by cost: blocks visited, rows wasted, registers, shared memory.

The estimate ranks them; what :mod:`natten.tuning` remembers from measuring comes first.
"""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from ... import tuning
from ...documents import roomy
from ...neighborhood import Dense, Neighborhood, Rule, queries_before
from ...tiling import group_kinds, reach
from ..interface import Shape, Tiles

_log = logging.getLogger("natten")

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

# Costs beside products, in products of 64 x 32 rows with 64 channels: of a visited block, of a
# program, and of a block of the forward where two warpgroups wait for it.
_BLOCK_COST, _PROGRAM_COST, _TWO_WARPGROUPS_COST = 1.0, 3.0, 0.6

# Bytes of shared memory that a program may have, by NVIDIA's compute capability; 0 is AMD's.
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448, 0: 65536}


class Gpu(NamedTuple):
    """What of a GPU decides tiles.

    Attributes:
        capability: NVIDIA's, as 90 for 9.0; 0 for AMD's.
        shared: bytes of shared memory that a program may have.
        multiprocessors: how many there are; by default an H100's.
    """

    capability: int
    shared: int
    multiprocessors: int = 132


def gpu_of(capability: int) -> Gpu:
    """A GPU that need not be there."""
    return Gpu(capability, SHARED_MEMORY[capability])


def gpu() -> Gpu:
    """The current GPU; an H100 where there is none."""
    return _gpu(torch.cuda.current_device()) if torch.cuda.is_available() else gpu_of(90)


@lru_cache(maxsize=64)
def _gpu(index: int) -> Gpu:
    from triton.runtime import driver  # only who has a GPU needs it

    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    major, minor = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(index)
    count = torch.cuda.get_device_properties(index).multi_processor_count
    return Gpu(10 * major + minor, shared, count)


class _AxisTiles(NamedTuple):
    """An axis cut into tiles of ``size``: how many, and the blocks they visit by block size."""

    size: int
    tiles: int
    visited: dict[int, int]


def padded_channels(channels: int) -> int:
    """Channels that a kernel has for a head's: a power of two that the matrix units take."""
    return max(16, 1 << (channels - 1).bit_length())


def _limits(
    kind: str, dim: int, value_dim: int, itemsize: int, bias: bool, gpu: Gpu
) -> tuple[int, int]:
    """The most rows of a tile, and of a block, that registers have room for.

    Tiles of 64 rows, one warpgroup, leave room for several programs per multiprocessor, which hide
    each other's waiting. Beside two sums of wide heads there is room for 32 columns. Of the widest
    values, a tile of 16 keys fills registers: they are there beside their sum. Exact products of 32
    bits have both operands in registers, whole. With narrow heads, addresses of biases take the
    most registers; beside the weights of dK and dV there is room for them only where products read
    shared memory (NVIDIA's from 9.0 on) or where there are 512 registers (AMD).
    """
    wide = max(padded_channels(dim), padded_channels(value_dim)) * itemsize // 2
    rows, cols = max(16, min(64, 16384 // wide)), max(16, min(64, 8192 // wide))
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


def _spans(start: torch.Tensor, end: torch.Tensor, size: int) -> torch.Tensor:
    """How many positions each tile of ``size`` reaches, given what each position reaches."""
    first = torch.arange(0, len(start), size, device="cpu")
    return end[(first + size - 1).clamp(max=len(start) - 1)] - start[first]


def _axis(rule: Rule, axis: int, length: int, key_length: int, of_keys: bool) -> list[_AxisTiles]:
    """The ways to cut an axis; ``of_keys``: tiles are of keys, blocks of queries."""
    start, end = reach(rule, axis, length, key_length, 0, of_keys)
    found = []
    for size in _SIZES:
        if size > 16 and size >= 2 * len(start):
            break
        spans = _spans(start, end, size)
        visited = {s: int((-(-spans // s)).sum()) for s in _SIZES}
        found.append(_AxisTiles(size, len(spans), visited))
    return found


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


_NO_AXIS = [_AxisTiles(1, 1, dict.fromkeys(_SIZES, 1))]


def key(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool = False,
) -> str:  # fmt: skip
    """The name of a problem in :mod:`natten.tuning`."""
    rule, shape, key_shape = typical(rule, shape, key_shape)
    sizes = "-".join("x".join(map(str, each)) for each in (shape, key_shape))
    return f"triton-{kind}-{sizes}-{rule}-{dim}-{value_dim}-{itemsize}{'-bias' * bias}"


def choose(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool = False, asked_q_block: Shape = (), asked_kv_block: Shape = (),
) -> Tiles:  # fmt: skip
    """The tiles asked for, else those measured to be fastest, else those estimated to be cheapest.

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
    return tuning.choose(key(*problem), candidates(*problem))


def _is_asked(tile: Shape, asked: Shape) -> bool:
    return not any(asked) or tile[3 - len(asked) :] == asked


def candidates(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool = False,
) -> list[Tiles]:  # fmt: skip
    """Tiles that fit the current GPU's registers and shared memory, cheapest first by estimate."""
    problem = typical(rule, shape, key_shape)
    return _candidates(kind, *problem, dim, value_dim, itemsize, bias, gpu())


@lru_cache(maxsize=64)
def _candidates(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool, gpu: Gpu,
) -> list[Tiles]:  # fmt: skip
    of_keys = kind == "dkdv"
    most_rows, most_cols = _limits(kind, dim, value_dim, itemsize, bias, gpu)
    channels = padded_channels(dim) + padded_channels(value_dim)
    axes = [_NO_AXIS] * (3 - len(shape)) + [
        _axis(rule, axis, length, key_length, of_keys)
        for axis, (length, key_length) in enumerate(zip(shape, key_shape))
    ]

    def fits(rows: int, cols: int, stages: int) -> bool:
        dims = padded_channels(dim), padded_channels(value_dim)
        return _shared(kind, rows, cols, *dims, itemsize, stages, gpu) <= gpu.shared

    costs: dict[Tiles, float] = {}
    fitting = []
    for cut in itertools.product(*axes):
        tile = tuple(axis.size for axis in cut)
        rows = math.prod(tile)
        if not 16 <= rows <= most_rows:
            continue
        programs = math.prod(axis.tiles for axis in cut)
        for other in _blocks(most_cols, len(shape)):
            cols = math.prod(other)
            visited = math.prod(axis.visited[size] for axis, size in zip(cut, other))
            products = max(rows, 32) * max(cols, 32) / (64 * 32) * channels / 128
            num_warps = 8 if rows >= 128 else 4  # eight are two warpgroups of 64 rows each
            num_stages = _stages(kind, rows, cols, channels, itemsize)
            while num_stages > 1 and not fits(rows, cols, num_stages):
                num_stages -= 1
            q_block, kv_block = (other, tile) if of_keys else (tile, other)
            tiles = Tiles(q_block, kv_block, num_warps, num_stages)
            two_warpgroups = kind == "forward" and num_warps == 8
            per_block = products + _BLOCK_COST + _TWO_WARPGROUPS_COST * two_warpgroups
            costs[tiles] = visited * per_block + programs * _PROGRAM_COST
            if fits(rows, cols, num_stages):
                fitting.append(tiles)
    # Where none fits, Triton says how much is missing.
    return sorted(fitting or costs, key=lambda tiles: costs[tiles])


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
            spans = _spans(*reach(rule, axis, length, key_length, group, of_keys), tile[i])
            visited += groups * int((-(-spans // other[i])).sum())
        pairs *= visited
    return pairs


@lru_cache(maxsize=64)
def _blocks(most: int, rank: int) -> list[Shape]:
    """Three-axis shapes of powers of two with ``most`` rows, or half as many."""
    sizes = [_SIZES if axis >= 3 - rank else (1,) for axis in range(3)]
    counts = {most, max(16, most // 2)}
    return [shape for shape in itertools.product(*sizes) if math.prod(shape) in counts]
