"""Tile shapes of the Hopper forward, by cost: products, boxes visited, programs started."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from natten.neighborhood import Neighborhood, group_length

Shape = tuple[int, ...]
ROWS = 64  # queries of a warpgroup
SHARED = 227 * 1024  # bytes a program may have

NONE, SELECT, BRANCH, PRODUCT = range(4)

# Beside its products, what a score, a box and a program cost, in multiply-adds of one row.
_SCORE, _BOX, _PROGRAM = 90, 4000, 40000


class Tiles(NamedTuple):
    """What the forward kernel is compiled for, beside dtype, head dims and axis modes."""

    query: Shape  # of one warpgroup
    key: Shape
    split: int  # the axis along which a program's two warpgroups are neighbors
    mask: int = NONE
    masked: tuple[bool, ...] = (False, False, False)
    phased: bool = False  # boxes that are whole along ``split`` have their own loop
    ahead: bool = False  # start the next scores before this box's softmax
    code: Shape = (0, 0, 0)  # columns of a PRODUCT mask, summed up over the axes
    by_row: bool = False
    steps: int = 1
    tables: int = 1
    stages: int = 2
    groups: int = 2  # warpgroups with queries
    programs: int = 1  # at once on a multiprocessor


class _Axis(NamedTuple):
    """One way to cut an axis: what a half and a box cover, summed over the axis's tiles."""

    query: int
    key: int
    halved: bool
    tiles: int
    boxes: int  # attended, of both halves if it is halved, else of either
    most: int  # boxes of one tile
    masked: bool


def _cut(first: torch.Tensor, last: torch.Tensor, query: int, key: int, halved: bool) -> _Axis:
    """Cut an axis whose queries have windows ``first .. last``."""
    n = len(first)
    size = query * (2 if halved else 1)
    begin = torch.arange(0, n, size, device="cpu")
    low, high = first[begin], last[(begin + size - 1).clamp(max=n - 1)]
    boxes, masked = 0, False
    for half in range(2 if halved else 1):
        head = (begin + half * query).clamp(max=n - 1)
        tail = (begin + half * query + query - 1).clamp(max=n - 1)
        before, past = first[head] - low, last[tail] - low
        boxes += int((-(-past // key) - before // key).sum())
        masked |= bool((first[tail] > first[head]).any() or (last[tail] > last[head]).any())
        masked |= bool((before % key).any() or (past % key).any())
    most = int((-(-(high - low) // key)).max())
    return _Axis(query, key, halved, len(begin), boxes, most, masked)


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def _masks(axes: tuple[_Axis, ...], split: int, rank: int) -> Iterator[dict[str, Any]]:
    """The ways to mask that tiles allow, the best first."""
    masked = tuple(axis.masked for axis in axes)
    if not any(masked):
        yield {}
        return
    if rank > 1:
        by_row = masked[2] and split != 2 and axes[2].query < axes[2].key
        widths = [axis.key if axis.masked else 0 for axis in axes]
        if by_row:
            widths[2] = axes[2].query
        tables = axes[2].most if by_row else 1
        if sum(widths) <= 32 and tables <= 8:
            yield {
                "mask": PRODUCT, "masked": masked, "code": tuple(itertools.accumulate(widths)),
                "by_row": by_row, "steps": 1 if sum(widths) <= 16 else 2, "tables": tables,
            }  # fmt: skip
    yield {"mask": BRANCH, "masked": masked}
    yield {"mask": SELECT, "masked": masked, "phased": True}


def shared_bytes(tiles: Tiles, dim: int, value_dim: int) -> int:
    """Shared memory of a program, without its barriers."""
    keys = math.prod(tiles.key)
    out = 0 if dim == value_dim else value_dim
    bias = tiles.tables * keys * 32 * tiles.steps if tiles.mask == PRODUCT else 0
    return (
        2 * tiles.groups * ROWS * (dim + out) + tiles.stages * keys * 2 * (dim + value_dim) + bias
    )


def candidates(
    rule: Neighborhood, shape: Shape, dim: int, value_dim: int
) -> list[tuple[float, Tiles]]:
    """All tiles that fit, each with its best mask, cheapest first."""
    rank = len(shape)
    lengths = [group_length(n, d, 0) for n, d in zip(shape, rule.dilation)]
    windows = []
    for axis, n in enumerate(lengths):
        windows.append(rule.windows(axis, torch.arange(n, device="cpu"), n, n))
    most_keys = 64 if max(dim, value_dim) > 128 else 128
    programs_per_head = math.prod(rule.dilation)

    @cache
    def cut(axis: int, query: int, key: int, halved: bool) -> _Axis:
        if axis < 3 - rank:
            return _Axis(1, 1, False, 1, 1, 1, False)
        return _cut(*windows[axis - 3 + rank], query, key, halved)

    def shapes(volume: int) -> list[Shape]:
        """Three-axis powers of two of a volume that do not pass twice an axis."""
        ways = [[1]] * (3 - rank) + [
            [p for p in _powers(volume) if p == 1 or p < 2 * n] for n in lengths
        ]
        return [s for s in itertools.product(*ways) if math.prod(s) == volume]

    found = []
    keys = [k for volume in (most_keys, most_keys // 2) for k in shapes(volume)] or [
        (1, 1, most_keys // 2)
    ]
    for query in shapes(ROWS) or [(1, 1, ROWS)]:
        for key in keys:
            for split in range(3 - rank, 3):
                axes = tuple(cut(a, query[a], key[a], a == split) for a in range(3))
                for mask in _masks(axes, split, rank):
                    tiles = Tiles(query, key, split, **mask)
                    if shared_bytes(tiles, dim, value_dim) > SHARED:
                        continue
                    columns = math.prod(key)
                    products = dim + value_dim + 16 * tiles.steps * (tiles.mask == PRODUCT)
                    masking = {NONE: 0, PRODUCT: 10, BRANCH: 40, SELECT: 70}[tiles.mask]
                    halves = math.prod(axis.boxes for axis in axes)
                    if not any(axis.halved for axis in axes):
                        halves *= 2
                    box = ROWS * columns * (products + _SCORE + masking) / 64 + _BOX
                    programs = math.prod(axis.tiles for axis in axes)
                    cost = (halves * box + programs * _PROGRAM) * programs_per_head
                    found.append((cost, tiles))
                    break
    return sorted(found, key=lambda pair: pair[0])


@lru_cache(maxsize=512)
def choose(rule: Neighborhood, shape: Shape, dim: int, value_dim: int) -> Tiles:
    """The cheapest tiles."""
    return candidates(rule, shape, dim, value_dim)[0][1]
