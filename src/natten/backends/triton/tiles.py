"""Tile shapes of the kernels, by cost: boxes visited, rows wasted, registers and shared memory."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch

from natten.neighborhood import Dense, Rule, group_length

Shape = tuple[int, int, int]


class Tiles(NamedTuple):
    """A kernel's tiles of queries and keys, and how it runs."""

    query: Shape
    key: Shape
    num_warps: int
    num_stages: int


def block(channels: int) -> int:
    """Channels as a kernel sees them: a power of two that the matrix units take."""
    return max(16, 1 << (channels - 1).bit_length())


def _limits(kind: str, dim: int, value_dim: int, itemsize: int) -> tuple[int, int]:
    """Most query rows and key rows of a tile, by registers and shared memory."""
    wide = max(block(dim), block(value_dim)) * itemsize // 2
    if kind == "forward":
        return _clamp(16384 // wide, 128), _clamp(8192 // wide, 128)
    if kind == "query":
        return _clamp(8192 // wide, 128), _clamp(8192 // wide, 64)
    return _clamp(8192 // wide, 64), _clamp(8192 // wide, 128)


def _clamp(rows: int, most: int) -> int:
    return max(16, min(rows, most))


def _axis_boxes(
    rule: Rule, axis: int, length: int, key_length: int, transposed: bool
) -> list[tuple[int, int, dict[int, int]]]:
    """Per size of the outer tile: its rows, and how many boxes it visits per inner tile size."""
    d = rule.dilation[axis]
    n, n_keys = group_length(length, d, 0), group_length(key_length, d, 0)
    start, end = rule.windows(axis, torch.arange(n), n, n_keys)
    if transposed:
        keys = torch.arange(n_keys)
        start, end = (
            torch.searchsorted(end, keys, right=True),
            torch.searchsorted(start, keys, right=True),
        )
    count = len(start)
    options = []
    sizes = [1 << i for i in range(8) if 1 << i <= 16 or 1 << (i - 1) < count]
    for size in sizes:
        firsts = torch.arange(0, max(count, 1), size).clamp(max=max(count - 1, 0))
        lasts = (firsts + size - 1).clamp(max=max(count - 1, 0))
        box = (end[lasts] - start[firsts]).clamp(min=0) if count else torch.zeros(1)
        visits = {inner: int((-(-box // inner)).sum()) for inner in (1, 2, 4, 8, 16, 32, 64, 128)}
        options.append((size, len(firsts), visits))
    return options


# Costs of a visited box and of a program beside its products, in products of 64 x 32 rows at 64
# channels; from timings on an H200.
_BOX, _PROGRAM = 1.0, 3.0


@lru_cache(maxsize=512)
def choose(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int
) -> Tiles:
    """The cheapest tiles for ``kind`` of kernel: "forward", "query" (dQ) or "key" (dK, dV)."""
    most_queries, most_keys = _limits(kind, dim, value_dim, itemsize)
    transposed = kind == "key"
    most_outer, most_inner = (most_keys, most_queries) if transposed else (most_queries, most_keys)
    rank = 3
    axes = [
        _axis_boxes(rule, axis, shape[axis], key_shape[axis], transposed) for axis in range(rank)
    ]
    width = (block(dim) + block(value_dim)) / 128
    best: tuple[float, Shape, Shape] | None = None
    for outer in itertools.product(*axes):
        rows = math.prod(size for size, _, _ in outer)
        if rows > most_outer or rows < min(16, most_outer):
            continue
        programs = math.prod(count for _, count, _ in outer)
        for inner in _factors(most_inner):
            cols = math.prod(inner)
            visited = math.prod(visits[t] for (_, _, visits), t in zip(outer, inner))
            work = max(rows, 32) * max(cols, 32) / (64 * 32) * width
            cost = visited * (work + _BOX) + programs * _PROGRAM
            key = (cost, tuple(size for size, _, _ in outer), inner)
            if best is None or key < best:
                best = key  # type: ignore[assignment]
    assert best is not None
    _, outer_shape, inner_shape = best
    rows, cols = math.prod(outer_shape), math.prod(inner_shape)
    warps = 8 if rows * max(block(dim), block(value_dim)) >= 128 * 128 else 4
    stages = 2 if cols * (block(dim) + block(value_dim)) * itemsize <= 40_000 else 1
    if transposed:
        return Tiles(inner_shape, outer_shape, warps, stages)
    return Tiles(outer_shape, inner_shape, warps, stages)


@lru_cache(maxsize=64)
def _factors(most: int) -> list[Shape]:
    """Shapes of powers of two with ``most`` rows, or half as many."""
    powers = [1 << i for i in range(8)]
    return [
        shape
        for shape in itertools.product(powers, repeat=3)
        if math.prod(shape) in {most, max(16, most // 2)}
    ]


def is_dense(rule: Rule) -> bool:
    """Whether the rule is plain attention."""
    return isinstance(rule, Dense)
