"""Tile shapes of the kernels, by cost: boxes visited, rows wasted, registers, shared memory."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch

from natten.neighborhood import Rule, group_length

Shape = tuple[int, ...]
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

# Beside its products, what a visited box and a program cost, in products of 64 x 32 rows with 64
# channels.
_BOX, _PROGRAM = 1.0, 3.0


class Tiles(NamedTuple):
    """A kernel's tiles of queries and of keys, three axes each, and how it runs."""

    query: Shape
    key: Shape
    num_warps: int
    num_stages: int


class _Axis(NamedTuple):
    """An axis cut into tiles of ``size``: how many, and the boxes they visit per box size."""

    size: int
    tiles: int
    boxes: dict[int, int]


def block(channels: int) -> int:
    """Channels as a kernel sees them: a power of two that the matrix units take."""
    return max(16, 1 << (channels - 1).bit_length())


def _limits(kind: str, dim: int, value_dim: int, itemsize: int) -> tuple[int, int]:
    """Most rows of an outer tile and of a box, by registers and shared memory."""
    wide = max(block(dim), block(value_dim)) * itemsize // 2

    def clamp(rows: int, most: int) -> int:
        return max(16, min(rows, most))

    if kind == "forward":
        return clamp(16384 // wide, 128), clamp(8192 // wide, 128)
    return clamp(8192 // wide, 128), clamp(8192 // wide, 64)


def _axis(rule: Rule, axis: int, length: int, key_length: int, transposed: bool) -> list[_Axis]:
    """The ways to cut an axis; ``transposed``: tiles are of keys, boxes of queries."""
    d = rule.dilation[axis]
    n, n_keys = group_length(length, d, 0), group_length(key_length, d, 0)
    start, end = rule.windows(axis, torch.arange(n, device="cpu"), n, n_keys)
    if transposed:
        keys = torch.arange(n_keys, device="cpu")
        start, end = (
            torch.searchsorted(end, keys, right=True),
            torch.searchsorted(start, keys, right=True),
        )
    rows = len(start)
    ways = []
    for size in _SIZES:
        if size > 16 and size >= 2 * rows:
            break
        first = torch.arange(0, rows, size, device="cpu")
        box = end[(first + size - 1).clamp(max=rows - 1)] - start[first]
        ways.append(_Axis(size, len(first), {s: int((-(-box // s)).sum()) for s in _SIZES}))
    return ways


_ONE = [_Axis(1, 1, dict.fromkeys(_SIZES, 1))]


@lru_cache(maxsize=512)
def choose(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int
) -> Tiles:
    """The cheapest tiles for a kind of kernel: "forward", "query" (dQ) or "key" (dK and dV)."""
    transposed = kind == "key"
    most_rows, most_cols = _limits(kind, dim, value_dim, itemsize)
    channels = block(dim) + block(value_dim)
    axes = [_ONE] * (3 - len(shape)) + [
        _axis(rule, axis, length, key_length, transposed)
        for axis, (length, key_length) in enumerate(zip(shape, key_shape))
    ]
    best_cost = math.inf
    best: tuple[Shape, Shape] = ((1, 1, 16), (1, 1, 16))
    for tile in itertools.product(*axes):
        rows = math.prod(axis.size for axis in tile)
        if not 16 <= rows <= most_rows:
            continue
        programs = math.prod(axis.tiles for axis in tile)
        for box in _boxes(most_cols, len(shape)):
            cols = math.prod(box)
            visited = math.prod(axis.boxes[size] for axis, size in zip(tile, box))
            work = max(rows, 32) * max(cols, 32) / (64 * 32) * channels / 128
            cost = visited * (work + _BOX) + programs * _PROGRAM
            if cost < best_cost:
                best_cost, best = cost, (tuple(axis.size for axis in tile), box)
    outer, inner = best
    rows, cols = math.prod(outer), math.prod(inner)
    # Eight warps are two groups of matrix units, 64 rows each.
    warps = 8 if rows >= 128 else 4
    stages = 2 if cols * channels * itemsize <= 40_000 else 1
    query, key = (inner, outer) if transposed else (outer, inner)
    return Tiles(query, key, warps, stages)


@lru_cache(maxsize=64)
def _boxes(most: int, rank: int) -> list[Shape]:
    """Three-axis shapes of powers of two with ``most`` rows, or half as many."""
    ways = [_SIZES if axis >= 3 - rank else (1,) for axis in range(3)]
    counts = {most, max(16, most // 2)}
    return [shape for shape in itertools.product(*ways) if math.prod(shape) in counts]
