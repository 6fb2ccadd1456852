"""Tile shapes of the Hopper kernels, by cost: products, boxes visited, tiles, waiting.

The estimate ranks them; what :mod:`natten.tuning` remembers from measuring comes first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from natten import tuning
from natten.neighborhood import Neighborhood, Rule, group_length
from natten.tiling import padded

Shape = tuple[int, ...]
KINDS = ("forward",)
ROWS = 64  # queries of a warpgroup
_SHARED = 227 * 1024  # bytes a program may have

NONE, COMPARE, PRODUCT = range(3)  # kinds of masks, as in the kernels


class Tiles(NamedTuple):
    """A program's tiles of queries and of keys, three axes each, and how it runs."""

    query: Shape  # of one warpgroup
    key: Shape
    split: int  # the axis along which the warpgroups are neighbors
    groups: int  # of warps with queries
    programs: int  # at once on a multiprocessor
    stages: int


class Mask(NamedTuple):
    """How scores are masked; see the kernel."""

    kind: int = NONE
    code: Shape = (0, 0, 0)  # columns of a product, summed up over the axes
    by_row: bool = False
    steps: int = 1  # of 16 columns
    tables: int = 1


class Axis(NamedTuple):
    """One way to cut an axis: what a warpgroup and a box cover, summed over the axis's tiles."""

    query: int
    key: int
    tiles: int
    boxes: int  # attended, of all warpgroups if the axis is split, else of one
    most: int  # boxes of one tile
    masked: bool


def _cut(first: torch.Tensor, last: torch.Tensor, query: int, key: int, parts: int) -> Axis:
    """Cut an axis whose queries have windows ``first .. last``; ``parts`` warpgroups a tile."""
    end = len(first) - 1
    begin = torch.arange(0, len(first), query * parts, device="cpu")
    low, high = first[begin], last[(begin + query * parts - 1).clamp(max=end)]
    boxes, masked = 0, False
    for part in range(parts):
        head = (begin + part * query).clamp(max=end)
        tail = (begin + part * query + query - 1).clamp(max=end)
        before, past = first[head] - low, last[tail] - low
        boxes += int((-(-past // key) - before // key).sum())
        masked |= bool((first[tail] > first[head]).any() or (last[tail] > last[head]).any())
        masked |= bool((before % key).any() or (past % key).any())
    most = int((-(-(high - low) // key)).max())
    return Axis(query, key, len(begin), boxes, most, masked)


class _Cuts:
    """The axes of a problem, cut for given tiles."""

    def __init__(self, rule: Neighborhood, shape: Shape) -> None:
        self.missing = 3 - len(shape)
        self.lengths = [group_length(n, d, 0) for n, d in zip(shape, rule.dilation)]
        self.windows = [
            rule.windows(axis, torch.arange(n, device="cpu"), n, n)
            for axis, n in enumerate(self.lengths)
        ]
        self.axis = cache(self._axis)

    def _axis(self, axis: int, query: int, key: int, parts: int) -> Axis:
        if axis < self.missing:
            return Axis(1, 1, 1, 1, 1, False)
        return _cut(*self.windows[axis - self.missing], query, key, parts)

    def __call__(self, query: Shape, key: Shape, split: int, groups: int) -> tuple[Axis, ...]:
        return tuple(self.axis(a, query[a], key[a], groups if a == split else 1) for a in range(3))


_cuts = lru_cache(maxsize=64)(_Cuts)


def mask_of(sliding: bool, axes: Sequence[Axis], split: int, groups: int) -> Mask:
    """How three axes are masked; ``sliding``: every query of the last has a window of its own."""
    if not any(axis.masked for axis in axes):
        return Mask()
    # The windows of a tile's queries start in as many places, at the same distances everywhere.
    by_row = axes[2].masked and axes[2].query < axes[2].key and (split != 2 or groups == 1)
    by_row &= sliding
    widths = [axis.key if axis.masked else 0 for axis in axes]
    if by_row:
        widths[2] = axes[2].query
    tables = axes[2].most if by_row else 1
    if sum(widths) > 32 or tables > 8:
        return Mask(COMPARE)
    code = tuple(itertools.accumulate(widths))
    return Mask(PRODUCT, code, by_row, 1 if sum(widths) <= 16 else 2, tables)


def slides(rule: Neighborhood) -> bool:
    """Whether windows move by one position from query to query along the last axis."""
    return rule.stride[-1] == 1 and not rule.is_causal[-1]


def mask(rule: Neighborhood, shape: Shape, tiles: Tiles) -> Mask:
    """How tiles are masked."""
    axes = _cuts(rule, shape)(tiles.query, tiles.key, tiles.split, tiles.groups)
    return mask_of(slides(rule), axes, tiles.split, tiles.groups)


def _shared(tiles: Tiles, mask: Mask, dim: int, value_dim: int, own_out: bool) -> int:
    """Bytes of shared memory of a multiprocessor's programs; 2 kB each for barriers and Triton."""
    keys = math.prod(tiles.key)
    queries = tiles.groups * ROWS * (dim + value_dim * own_out)
    table = mask.tables * keys * 16 * mask.steps * (mask.kind == PRODUCT)
    each = 2 * (queries + tiles.stages * keys * (dim + value_dim) + table)
    return tiles.programs * (each + 2048)


def own_out(tiles: Tiles, mask: Mask, dim: int, value_dim: int) -> bool:
    """Whether the output has shared memory of its own, or takes the queries'."""
    return dim != value_dim or _shared(tiles, mask, dim, value_dim, True) <= _SHARED


def registers(tiles: Tiles) -> tuple[int, int, int]:
    """Of a thread: when a program starts, of warpgroups that compute, and of warps that fetch."""
    fetch = 40 if tiles.programs == 1 else 24
    # What the fetching warpgroup leaves (two of its warps are idle) goes to the others.
    start = 65536 // tiles.programs // (128 * tiles.groups + 128) // 8 * 8
    return start, (start * (tiles.groups + 1) - fetch) // tiles.groups // 8 * 8, fetch


def _has_registers(tiles: Tiles, value_dim: int) -> bool:
    """Whether sums, scores and weights fit; a product alone must fit what a program starts with."""
    start, most, _ = registers(tiles)
    out, scores = value_dim // 2, math.prod(tiles.key) // 2
    return max(out, scores) + 30 <= start and out + scores * 3 // 2 + 40 <= most


# What a box and a tile cost a multiprocessor beside products, and what they wait: cycles.
_SCORE, _BOX, _BOX_WAIT, _TILE, _TILE_WAIT = 8.0, 100.0, 1200.0, 500.0, 3000.0


def prices(tiles: Tiles, mask: Mask, dim: int, value_dim: int) -> tuple[float, float]:
    """Cycles of a multiprocessor that a box costs, and a warpgroup's tile beside its boxes."""
    columns = math.prod(tiles.key)
    # Warpgroups of one program wait for the same boxes.
    at_once = tiles.programs if tiles.groups == 1 else 1.5 * tiles.programs
    product = columns * (dim + value_dim + 16 * mask.steps * (mask.kind == PRODUCT)) / 32
    score = _SCORE * (1.3 if mask.kind == COMPARE else 1)
    box = product + columns * score + _BOX + _BOX_WAIT / at_once
    return box, _TILE + _TILE_WAIT / at_once


def _cost(axes: tuple[Axis, ...], tiles: Tiles, mask: Mask, dim: int, value_dim: int) -> float:
    """Cycles of a multiprocessor per batch entry, head and dilation group."""
    box, tile = prices(tiles, mask, dim, value_dim)
    number = math.prod(axis.tiles for axis in axes)
    return math.prod(axis.boxes for axis in axes) * box + number * tiles.groups * tile


def key(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int
) -> str:
    """The name of a problem in :mod:`natten.tuning`."""
    return f"hopper-{kind}-{'x'.join(map(str, shape))}-{rule}-{dim}-{value_dim}"


@tuning.cached
def choose(
    kind: str,
    rule: Neighborhood,
    shape: Shape,
    key_shape: Shape,
    dim: int,
    value_dim: int,
    itemsize: int = 2,
) -> Tiles:
    """The tiles that were measured to be fastest, else those estimated to be cheapest.

    Args:
        kind: of kernel, one of ``KINDS``.
    """
    tuned = tuning.lookup(key(kind, rule, shape, key_shape, dim, value_dim, itemsize))
    if tuned is None:
        return candidates(kind, rule, shape, key_shape, dim, value_dim, itemsize)[0]
    query, keys, *options = tuned
    return Tiles(tuple(query), tuple(keys), *options)


@lru_cache(maxsize=64)
def candidates(
    kind: str,
    rule: Neighborhood,
    shape: Shape,
    key_shape: Shape,
    dim: int,
    value_dim: int,
    itemsize: int = 2,
) -> list[Tiles]:
    """Tiles that fit the registers and shared memory, cheapest first by estimate."""
    cuts = _cuts(rule, shape)
    costs: dict[Tiles, float] = {}
    for tiles in cuttings(cuts.lengths, dim, value_dim):
        axes = cuts(tiles.query, tiles.key, tiles.split, tiles.groups)
        found = mask_of(slides(rule), axes, tiles.split, tiles.groups)
        fitting = fitted(tiles, found, dim, value_dim)
        if fitting is not None:
            costs[fitting] = _cost(axes, fitting, found, dim, value_dim)
    return sorted(costs, key=costs.__getitem__)


def cuttings(lengths: Sequence[int], dim: int, value_dim: int) -> list[Tiles]:
    """Tiles that fit the registers, to be :func:`fitted`; of equal cost, the first is better.

    Args:
        lengths: positions of a dilation group, per axis.
        dim, value_dim: of a head.
    """
    most_keys = 64 if max(dim, value_dim) > 128 else 128
    keys = _shapes(most_keys, lengths) + _shapes(most_keys // 2, lengths)
    every = (
        Tiles(query, box, *way, stages=2)
        for query, box in itertools.product(_shapes(ROWS, lengths), keys)
        for way in _ways(len(lengths))
    )
    fitting = (tiles for tiles in every if _has_registers(tiles, value_dim))
    return sorted(fitting, key=lambda tiles: max(tiles.query))


def fitted(tiles: Tiles, mask: Mask, dim: int, value_dim: int) -> Tiles | None:
    """The tiles with the stages that fit the shared memory, or None if not even two do."""
    # An output buffer that delays no query is worth more than a third stage.
    for stages, own in ((3, True), (2, True), (2, dim != value_dim)):
        tiles = tiles._replace(stages=stages)
        if _shared(tiles, mask, dim, value_dim, own) <= _SHARED:
            return tiles
    return None


def _ways(rank: int) -> list[tuple[int, int, int]]:
    """Axis of the split, warpgroups, programs at once: two that share boxes, or one alone."""
    pairs = [(split, 2, 1) for split in range(3 - rank, 3)]
    return pairs + [(3 - rank, 1, programs) for programs in (2, 3, 4)]


def _shapes(volume: int, lengths: Sequence[int]) -> list[Shape]:
    """Three-axis powers of two of a volume, none twice its axis; if there is none, a row."""
    powers = [1 << i for i in range(volume.bit_length())]
    ways = [[p for p in powers if p == 1 or p < 2 * n] for n in padded(lengths, 1)]
    fitting = [s for s in itertools.product(*ways) if math.prod(s) == volume]
    return fitting or [(1, 1, volume)]


def computed_pairs(
    kind: str, rule: Neighborhood, shape: Shape, key_shape: Shape, tiles: Tiles
) -> int:
    """Query-key pairs that a kernel computes per batch entry and head, wasted ones included."""
    axes = _cuts(rule, shape)(tiles.query, tiles.key, tiles.split, tiles.groups)
    boxes = math.prod(axis.boxes for axis in axes) * math.prod(rule.dilation)
    return boxes * ROWS * math.prod(tiles.key)
