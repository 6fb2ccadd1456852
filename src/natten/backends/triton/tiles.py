"""Tile shapes of the kernels, by cost: boxes visited, rows wasted, registers, shared memory.

The estimate ranks them; what :mod:`natten.tuning` remembers from measuring comes first.
"""

from __future__ import annotations

import itertools
import logging
import math
from functools import lru_cache
from typing import NamedTuple

import torch

from ... import tuning
from ...neighborhood import Rule, group_length
from ...tiling import group_kinds, reach

_log = logging.getLogger("natten")

Shape = tuple[int, ...]
KINDS = ("forward", "query", "key")  # of kernels; the gradients are of the query, of key and value
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

# Beside its products, what a visited box and a program cost, in products of 64 x 32 rows with 64
# channels. A box of the forward costs more where two groups of warps wait for it.
_BOX, _PROGRAM, _SECOND_GROUP = 1.0, 3.0, 0.6


class Tiles(NamedTuple):
    """A kernel's tiles of queries and of keys, three axes each, and how it runs."""

    query: Shape
    key: Shape
    num_warps: int
    num_stages: int


class Gpu(NamedTuple):
    """What of a GPU decides tiles.

    Attributes:
        capability: NVIDIA's, as 90 for 9.0; 0 for AMD's.
        shared: bytes of shared memory that a program may have.
    """

    capability: int
    shared: int


def gpu() -> Gpu:
    """The current GPU; an H100 where there is none."""
    return _gpu(torch.cuda.current_device()) if torch.cuda.is_available() else Gpu(90, 232448)


@lru_cache(maxsize=64)
def _gpu(index: int) -> Gpu:
    from triton.runtime import driver  # only who has a GPU needs it

    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    major, minor = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(index)
    return Gpu(10 * major + minor, shared)


class _Axis(NamedTuple):
    """An axis cut into tiles of ``size``: how many, and the boxes they visit per box size."""

    size: int
    tiles: int
    boxes: dict[int, int]


def block(channels: int) -> int:
    """Channels as a kernel sees them: a power of two that the matrix units take."""
    return max(16, 1 << (channels - 1).bit_length())


def _limits(
    kind: str, dim: int, value_dim: int, itemsize: int, bias: bool, gpu: Gpu
) -> tuple[int, int]:
    """Most rows of an outer tile and of a box, by registers.

    Tiles of 64 rows, one group of warps, leave room for several programs per processor, which hide
    each other's waiting. Two sums of wide heads leave no registers for more than 32 columns. Exact
    products of 32 bits have both operands in registers, whole. Of narrow heads, addresses of biases
    are most of what is in registers; beside the weights of dK and dV there is room for them only
    where products read shared memory (NVIDIA's from 9.0 on) or there are 512 registers (AMD).
    """
    wide = max(block(dim), block(value_dim)) * itemsize // 2
    rows, cols = max(16, min(64, 16384 // wide)), max(16, min(64, 8192 // wide))
    if itemsize > 2:
        return min(32, rows), min(32, cols)
    if kind == "key" and wide == 128:
        return 64, 32
    if bias and wide <= 32 and (kind != "key" or 0 < gpu.capability < 90):
        return rows, 32
    if wide == 128 and gpu.capability == 90:
        return 128, 64
    return rows, cols


def _stages(kind: str, rows: int, cols: int, channels: int, itemsize: int) -> int:
    """Boxes in flight; more than two pay where a tile's own operands leave room."""
    if cols * channels * itemsize > 40_000:
        return 1
    if kind == "key":
        return 3 if channels > 128 else 2
    return 3 if kind == "forward" or rows >= 128 or channels <= 128 else 2


def stages_of_both(tiles: Tiles, dim: int, value_dim: int, itemsize: int) -> int:
    """Steps in flight where each has a tile of queries and a box of keys of its own.

    One where products are exact: both operands take registers, whole.
    """
    rows = math.prod(tiles.query) + math.prod(tiles.key)
    step = rows * (block(dim) + block(value_dim)) * itemsize
    return 1 if itemsize > 2 else max(1, min(3, (gpu().shared - 2048) // step))


def _shared(
    kind: str, rows: int, cols: int, dim: int, value_dim: int, itemsize: int, stages: int, gpu: Gpu
) -> int:
    """Bytes of shared memory, as Triton 3.6 uses it where the limit matters.

    That is on AMD (64 kB), and on NVIDIA's GPUs but those of data centers (99 kB), whose matrix
    units take 16-bit weights of dK and dV from registers.
    """
    scores = rows * cols * itemsize
    boxes = cols * (dim + value_dim) * itemsize * max(1, stages - 1)
    if gpu.capability == 0:
        return boxes + scores  # the outer tile is in registers
    outer = rows * (dim if kind == "forward" else dim + value_dim) * itemsize
    return outer + boxes + (scores if kind != "key" or itemsize > 2 else 0) + 1024


def _spans(start: torch.Tensor, end: torch.Tensor, size: int) -> torch.Tensor:
    """How many positions each tile of ``size`` reaches."""
    first = torch.arange(0, len(start), size, device="cpu")
    return end[(first + size - 1).clamp(max=len(start) - 1)] - start[first]


def _axis(rule: Rule, axis: int, length: int, key_length: int, transposed: bool) -> list[_Axis]:
    """The ways to cut an axis; ``transposed``: tiles are of keys, boxes of queries."""
    d = rule.dilation[axis]
    n, n_keys = group_length(length, d, 0), group_length(key_length, d, 0)
    start, end = reach(rule, axis, n, n_keys, transposed)
    ways = []
    for size in _SIZES:
        if size > 16 and size >= 2 * len(start):
            break
        spans = _spans(start, end, size)
        ways.append(_Axis(size, len(spans), {s: int((-(-spans // s)).sum()) for s in _SIZES}))
    return ways


_ONE = [_Axis(1, 1, dict.fromkeys(_SIZES, 1))]


def key(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool = False,
) -> str:  # fmt: skip
    """The name of a problem in :mod:`natten.tuning`."""
    sizes = "-".join("x".join(map(str, each)) for each in (shape, key_shape))
    return f"triton-{kind}-{sizes}-{rule}-{dim}-{value_dim}-{itemsize}{'-bias' * bias}"


def choose(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool = False, asked_query: Shape = (), asked_key: Shape = (),
) -> Tiles:  # fmt: skip
    """The tiles asked for, else those measured to be fastest, else those estimated to be cheapest.

    Args:
        kind: of kernel, one of ``KINDS``.
        bias: whether there is one.
        asked_query, asked_key: tile shapes, 0 or nothing where any will do.
    """
    problem = (kind, rule, shape, key_shape, dim, value_dim, itemsize, bias)
    if any(asked_query) or any(asked_key):
        fitting = (
            tiles
            for tiles in candidates(*problem)
            if _is_asked(tiles.query, asked_query) and _is_asked(tiles.key, asked_key)
        )
        found = next(fitting, None)
        if found is not None:
            return found
        _log.debug("the %s kernel has no tiles %s and %s", kind, asked_query, asked_key)
    return tuning.choose(key(*problem), candidates(*problem))


def _is_asked(tile: Shape, asked: Shape) -> bool:
    return not any(asked) or tile[3 - len(asked) :] == asked


def candidates(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool = False,
) -> list[Tiles]:  # fmt: skip
    """Tiles that fit the current GPU's registers and shared memory, cheapest first by estimate."""
    return _candidates(kind, rule, shape, key_shape, dim, value_dim, itemsize, bias, gpu())


@lru_cache(maxsize=64)
def _candidates(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int,
    bias: bool, gpu: Gpu,
) -> list[Tiles]:  # fmt: skip
    transposed = kind == "key"
    most_rows, most_cols = _limits(kind, dim, value_dim, itemsize, bias, gpu)
    channels = block(dim) + block(value_dim)
    axes = [_ONE] * (3 - len(shape)) + [
        _axis(rule, axis, length, key_length, transposed)
        for axis, (length, key_length) in enumerate(zip(shape, key_shape))
    ]

    def fits(rows: int, cols: int, stages: int) -> bool:
        blocks = block(dim), block(value_dim)
        return _shared(kind, rows, cols, *blocks, itemsize, stages, gpu) <= gpu.shared

    costs: dict[Tiles, float] = {}
    fitting = []
    for tile in itertools.product(*axes):
        rows = math.prod(axis.size for axis in tile)
        if not 16 <= rows <= most_rows:
            continue
        programs = math.prod(axis.tiles for axis in tile)
        for box in _boxes(most_cols, len(shape)):
            cols = math.prod(box)
            visited = math.prod(axis.boxes[size] for axis, size in zip(tile, box))
            work = max(rows, 32) * max(cols, 32) / (64 * 32) * channels / 128
            outer = tuple(axis.size for axis in tile)
            # Eight warps are two groups of matrix units, 64 rows each.
            warps = 8 if rows >= 128 else 4
            stages = _stages(kind, rows, cols, channels, itemsize)
            while stages > 1 and not fits(rows, cols, stages):
                stages -= 1
            query, keys = (box, outer) if transposed else (outer, box)
            tiles = Tiles(query, keys, warps, stages)
            once = _BOX + _SECOND_GROUP * (kind == "forward" and warps == 8)
            costs[tiles] = visited * (work + once) + programs * _PROGRAM
            if fits(rows, cols, stages):
                fitting.append(tiles)
    # Where none fits, Triton says how much is missing.
    return sorted(fitting or costs, key=lambda tiles: costs[tiles])


def computed_pairs(kind: str, rule: Rule, shape: Shape, key_shape: Shape, tiles: Tiles) -> int:
    """Query-key pairs that a kernel computes per batch entry and head, wasted ones included."""
    transposed = kind == "key"
    outer, box = (tiles.key, tiles.query) if transposed else (tiles.query, tiles.key)
    pairs = math.prod(outer) * math.prod(box)
    for axis, (length, key_length, d) in enumerate(zip(shape, key_shape, rule.dilation)):
        i = axis + 3 - len(shape)
        visited = 0
        for group, groups in group_kinds(length, d):
            n, n_keys = group_length(length, d, group), group_length(key_length, d, group)
            spans = _spans(*reach(rule, axis, n, n_keys, transposed), outer[i])
            visited += groups * int((-(-spans // box[i])).sum())
        pairs *= visited
    return pairs


@lru_cache(maxsize=64)
def _boxes(most: int, rank: int) -> list[Shape]:
    """Three-axis shapes of powers of two with ``most`` rows, or half as many."""
    ways = [_SIZES if axis >= 3 - rank else (1,) for axis in range(3)]
    counts = {most, max(16, most // 2)}
    return [shape for shape in itertools.product(*ways) if math.prod(shape) in counts]
