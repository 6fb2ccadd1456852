"""Tile shapes of the backward passes, by cost."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch

from natten.neighborhood import Neighborhood

Shape = tuple[int, ...]
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_ROWS = 64  # tokens of a tile: what a warpgroup multiplies at once
_SHARED = 227 * 1024  # bytes of shared memory of a program

# What a box and a program cost beside their products, in columns of a box: barriers and masks;
# loading the tiles and storing the gradients. Idle: a box that one warpgroup only hands back.
_BOX, _PROGRAM, _IDLE = 16.0, 400.0, 0.25


class Tiles(NamedTuple):
    """A pass: which axis a program walks first, second, last; tile and box in that order."""

    order: Shape
    outer: Shape
    inner: Shape
    stages: int
    masked: bool  # whether a box is ever in part outside of what a token pairs with


class _Cut(NamedTuple):
    """An axis cut into tiles: how many, and per box size the boxes they visit, and, where it is
    the axis along which tiles are paired, how many pairs, and the boxes that the pairs fetch;
    and the box sizes that need no mask, where tiles are not paired and where they are."""

    size: int
    tiles: int
    boxes: dict[int, int]
    pairs: int
    pair_boxes: dict[int, int]
    whole: tuple[set[int], set[int]]


_UNIT = [_Cut(1, 1, {1: 1}, 1, {1: 1}, ({1}, {1}))]


def _cuts(rule: Neighborhood, axis: int, length: int, of_keys: bool) -> list[_Cut]:
    tokens = torch.arange(length, device="cpu")
    start, end = rule.windows(axis, tokens, length, length)
    if of_keys:  # the queries of each key
        start, end = (
            torch.searchsorted(end, tokens, right=True),
            torch.searchsorted(start, tokens, right=True),
        )
    rows = len(start)
    cuts = []
    for size in _SIZES[:-1]:
        first = torch.arange(0, rows, size, device="cpu")
        last = (first + size - 1).clamp(max=rows - 1)
        low, high = start[first], end[last]
        alike = torch.equal(start[last], low) and torch.equal(end[first], high)
        high = high.maximum(low)
        pair_low = low[::2]
        pair_high = torch.cat([high[1::2], high[len(high) // 2 * 2 :]])
        origin = pair_low.repeat_interleave(2)[: len(low)]
        boxes, pair_boxes = {}, {}
        whole: tuple[set[int], set[int]] = (set(), set())
        for box in _SIZES:
            for paired, base in enumerate((low, origin)):
                if alike and not ((low - base) % box).any() and not ((high - base) % box).any():
                    whole[paired].add(box)
            own = -((origin - high) // box) - (low - origin) // box
            boxes[box] = int(own[high > low].sum())
            pair_boxes[box] = int((-((pair_low - pair_high) // box)).sum())
        cuts.append(_Cut(size, len(first), boxes, len(pair_low), pair_boxes, whole))
    return cuts


@lru_cache(maxsize=512)
def choose(of_keys: bool, rule: Neighborhood, shape: Shape, dim: int, columns: int) -> Tiles:
    """The cheapest tiles of a pass, with boxes of ``columns`` tokens; axes as in ``shape``.

    Args:
        of_keys: tiles are of keys (dK, dV), not of queries (dQ).
        rule: the windows.
        shape: token layout of a dilation group, three axes.
        dim: head dim.
        columns: tokens of a box.
    """
    axes = [
        _UNIT if length == 1 else _cuts(rule, axis, length, of_keys)
        for axis, length in zip(range(-3, 0), shape)
    ]
    if all(cuts is _UNIT for cuts in axes):
        axes[2] = _cuts(rule, -1, 1, of_keys)
    best_cost, best = math.inf, None
    for last in range(3):
        if axes[last] is _UNIT:
            continue
        order = (*(axis for axis in range(3) if axis != last), last)
        for outer in itertools.product(*(axes[axis] for axis in order)):
            if math.prod(cut.size for cut in outer) != _ROWS:
                continue
            programs = outer[0].tiles * outer[1].tiles * outer[2].pairs
            for inner in _boxes(columns):
                if any(size not in cut.boxes for size, cut in zip(inner, outer)):
                    continue
                around = outer[0].boxes[inner[0]] * outer[1].boxes[inner[1]]
                own = around * outer[2].boxes[inner[2]]
                fetched = around * outer[2].pair_boxes[inner[2]]
                cost = own * (columns + _BOX) + (2 * fetched - own) * _IDLE * columns
                cost += programs * _PROGRAM
                masked = any(
                    size not in cut.whole[axis == 2]
                    for axis, (size, cut) in enumerate(zip(inner, outer))
                )
                # Masks see groups of 8 columns.
                cost += own * masked * (_BOX if inner[2] >= 8 else 2 * _BOX)
                if cost < best_cost:
                    best_cost = cost
                    best = order, tuple(c.size for c in outer), inner, stages(dim, columns), masked
    assert best is not None
    return Tiles(*best)


def stages(dim: int, columns: int) -> int:
    """Boxes in flight: as shared memory allows, at most 4."""
    outer, inner = 4 * _ROWS * dim * 2, 2 * columns * dim * 2 + 16 * columns
    return min(4, (_SHARED - outer - 8192) // inner)


@lru_cache(maxsize=8)
def _boxes(columns: int) -> list[Shape]:
    """Box shapes."""
    return [s for s in itertools.product(_SIZES, repeat=3) if math.prod(s) == columns]
