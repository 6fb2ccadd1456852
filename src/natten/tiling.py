"""Tiles of queries and the boxes of keys they need.

A tile is a block of consecutive positions inside one dilation group; its box is the smallest block
of key positions that holds every window of the tile. Consecutive tiles whose windows look alike
relative to the tile form a :class:`Run`, so that one mask, one shape and one strided view serve
all of them.

Kernels walk a box in pieces of one size; :func:`count_boxes` counts those pieces. Tiles and boxes
are products of axes, so what is counted per axis multiplies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten.neighborhood import Neighborhood, Rule, group_length


class Run(NamedTuple):
    """``repeats`` tiles, ``step`` positions apart, in each of ``groups`` dilation groups."""

    group: int
    groups: int
    repeats: int
    step: int
    query_start: int
    query_size: int
    key_start: int
    key_size: int
    lower: Tensor  # [query_size]: each query's window inside the box: first position ...
    upper: Tensor  # [query_size]: ... and one past the last


class TileCost(NamedTuple):
    """What one axis contributes to the cost of a tile size."""

    products: int  # query-key pairs computed
    keys: int  # key rows copied
    tiles: int
    runs: int


# Measured on two AVX-512 cores, float32; only their ratios matter. Nanoseconds.
PRODUCT = 0.4  # softmax and mask, per query-key pair
PRODUCT_DIM = 0.035  # the two matrix products, per pair and head dim
COPY = 0.25  # per copied element
_TILE = 300.0  # per matrix product of a tile
_RUN = 60_000.0  # Python, per run
_MAX_SCORES = 1 << 20  # query-key pairs of one tile


def reach(rule: Rule, axis: int, n: int, n_keys: int, of_keys: bool) -> tuple[Tensor, Tensor]:
    """First and one-past-last key of each of ``n`` queries of an axis, or query of each key."""
    start, end = rule.windows(axis, torch.arange(n, device="cpu"), n, n_keys)
    if not of_keys:
        return start, end
    keys = torch.arange(n_keys, device="cpu")
    return torch.searchsorted(end, keys, right=True), torch.searchsorted(start, keys, right=True)


def padded(values: Sequence[Any], fill: Any) -> tuple[Any, ...]:
    """Three axes: the missing ones come first."""
    return (*(fill,) * (3 - len(values)), *values)


def group_kinds(length: int, dilation: int) -> list[tuple[int, int]]:
    """``(first group, how many groups)`` of the dilation groups that are alike: at most two."""
    longer = length % dilation  # groups 0 .. longer - 1 have one position more than the rest
    kinds = ((0, longer), (longer, dilation - longer))
    return [(group, groups) for group, groups in kinds if groups and group < length]


class BoxCount(NamedTuple):
    """Boxes that the tiles of one axis visit; each is a tensor with one entry per case."""

    visited: Tensor  # all of them
    whole: Tensor  # those that every query of their tile attends whole: no mask is needed
    most: Tensor  # visited by the tile that visits the most


def count_boxes(
    low: Tensor, start: Tensor, end: Tensor, high: Tensor, size: int | Tensor, origin: Tensor
) -> BoxCount:
    """Count the boxes of ``size`` key positions that tiles visit along one axis.

    Args:
        low, start: ``[..., tiles]``, first window start among a tile's queries, and the last one.
        end, high: ``[..., tiles]``, first window end among a tile's queries, and the last one.
        size: key positions in a box.
        origin: a key position at which a box starts; those of one tile lie side by side.
    """
    first, last = (low - origin) // size, -((origin - high) // size)
    whole = ((end - origin) // size + (origin - start) // size).clamp(min=0)
    visited = last - first
    return BoxCount(visited.sum(-1), whole.sum(-1), visited.amax(-1))


def axis_runs(rule: Rule, axis: int, length: int, key_length: int, tile: int) -> list[Run]:
    """Cut an axis of ``length`` queries and ``key_length`` keys into runs of tiles of ``tile``."""
    dilation = rule.dilation[axis]
    runs: list[Run] = []
    for group, groups in group_kinds(length, dilation):
        n = group_length(length, dilation, group)
        n_keys = group_length(key_length, dilation, group)
        start, end = rule.windows(axis, torch.arange(n, device="cpu"), n, n_keys)
        whole = n // tile * tile
        for first, last, size in ((0, whole, tile), (whole, n, n - whole)):
            if first < last:
                runs += _merge_tiles(group, groups, first, size, start[first:last], end[first:last])
    return runs


def _merge_tiles(
    group: int, groups: int, first: int, size: int, start: Tensor, end: Tensor
) -> list[Run]:
    start, end = start.view(-1, size), end.view(-1, size)
    box = start.amin(1)
    tile_start = first + size * torch.arange(len(box), device="cpu")
    shape = torch.cat(
        [start - box[:, None], end - box[:, None], (box - tile_start)[:, None]], dim=1
    )
    changes = (shape[1:] != shape[:-1]).any(1).nonzero().flatten() + 1
    edges = [0, *changes.tolist(), len(box)]
    runs = []
    for a, b in itertools.pairwise(edges):
        lower, upper = start[a] - box[a], end[a] - box[a]
        key_size = int(upper.max())
        runs.append(
            Run(
                group,
                groups,
                b - a,
                size,
                first + size * a,
                size,
                int(box[a]),
                key_size,
                lower,
                upper,
            )
        )
    return runs


def axis_cost(runs: list[Run]) -> TileCost:
    """What the runs of an axis cost."""
    return TileCost(
        products=sum(r.groups * r.repeats * r.query_size * r.key_size for r in runs),
        keys=sum(r.groups * r.repeats * r.key_size for r in runs),
        tiles=sum(r.groups * r.repeats for r in runs),
        runs=len(runs),
    )


def _candidates(rule: Rule, axis: int, length: int) -> list[int]:
    n = group_length(length, rule.dilation[axis], 0)
    stride = rule.stride[axis] if isinstance(rule, Neighborhood) else 1
    sizes = {n} | {size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size < n}
    if stride > 1:  # whole strides make whole tiles
        sizes |= {stride * m for m in (1, 2, 4, 8, 16) if stride * m < n}
    return sorted(size for size in sizes if size <= 256) or [256]


def tiles(
    rule: Rule, shape: tuple[int, ...], key_shape: tuple[int, ...], matrices: int, head_dim: int
) -> tuple[tuple[Run, ...], ...]:
    """The cheapest tiling: for each axis its runs; a block of tiles is one run of each axis.

    Args:
        rule: the windows.
        shape, key_shape: token layout of queries and of keys.
        matrices: batch times heads.
        head_dim: mean of the query's and the value's head dim.
    """
    options = []
    for axis, (length, key_length) in enumerate(zip(shape, key_shape)):
        by_size = {}
        for size in _candidates(rule, axis, length):
            runs = axis_runs(rule, axis, length, key_length, size)
            largest = max((r.query_size * r.key_size for r in runs), default=0)
            by_size[size] = (axis_cost(runs), largest, runs)
        options.append(list(by_size.values()))

    best_cost, best = math.inf, None
    for choice in itertools.product(*options):
        costs = [c for c, _, _ in choice]
        scores = math.prod(largest for _, largest, _ in choice)
        smallest = all(c is o[0] for c, o in zip(choice, options))
        if scores > _MAX_SCORES and not smallest:
            continue
        tile_count = math.prod(c.tiles for c in costs)
        cost = (
            matrices * math.prod(c.products for c in costs) * (PRODUCT + PRODUCT_DIM * head_dim)
            + matrices * math.prod(c.keys for c in costs) * 2 * head_dim * COPY
            + matrices * tile_count * _TILE
            + math.prod(c.runs for c in costs) * _RUN
        )
        if cost < best_cost:
            best_cost, best = cost, tuple(tuple(runs) for _, _, runs in choice)
    assert best is not None
    return best
