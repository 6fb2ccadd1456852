"""Tiles of queries and the blocks of keys they need.

A tile holds queries at consecutive positions of one dilation group. Its block of keys is the
smallest range of key positions that holds every window of the tile. Consecutive tiles whose windows
look alike relative to the tile form a :class:`Run`, so that one mask, one shape and one strided
view serve all of them.

GPU kernels visit the keys of a tile in blocks of one size; :func:`count_blocks` counts these. Tiles
and blocks are products of axes, so what is counted per axis multiplies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .caches import kept
from .neighborhood import Neighborhood, Rule, group_length, query_range


class QueryGroup(NamedTuple):
    """Neighboring groups of an axis's queries that look alike: they have the same windows.

    Queries of a group attend keys of one dilation group. The first of these groups has the query
    ``group`` and the keys ``key_group``, the next ones follow, token by token.
    """

    group: int
    key_group: int
    groups: int
    apart: int  # tokens between neighboring queries of a group
    positions: Tensor  # [queries], where they stand among the keys of their group
    n_keys: int


class Source(NamedTuple):
    """The windows that runs are cut from."""

    rule: Rule  # of one axis
    length: int
    key_length: int
    kind: int  # which of the :func:`query_groups`


class Run(NamedTuple):
    """``repeats`` tiles, ``step`` queries apart, in each of ``groups`` neighboring groups.

    Their blocks of keys are ``key_step`` positions apart.
    """

    group: int  # token of the first group's first query
    key_group: int  # dilation group of its keys
    groups: int
    apart: int  # tokens between neighboring queries of a group
    repeats: int
    step: int
    key_step: int
    query_start: int
    query_size: int
    key_start: int
    key_size: int
    source: Source
    full: bool  # every query attends every key of the block, so no mask is needed
    triangular: bool  # the first query attends the first key, and each query one key more

    @property
    def spans(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where each query's window starts and one past where it ends, inside the block of keys."""
        windows = self._windows
        return self._inside(windows.start), self._inside(windows.end)

    @property
    def stands(self) -> tuple[int, ...]:
        """Where each query stands, perhaps outside of the block of keys."""
        own = self._windows.group.positions[self.query_start :][: self.query_size]
        return tuple((own - self.key_start).tolist())

    @property
    def _windows(self) -> _Windows:
        *source, kind = self.source
        every: list[_Windows] = _windows(*source)
        return every[kind]

    def _inside(self, positions: list[int]) -> tuple[int, ...]:
        own = positions[self.query_start : self.query_start + self.query_size]
        return tuple([x - self.key_start for x in own])

    def bytes(self) -> int:
        """About how many bytes it takes, with what is made of it."""
        return 512 + 24 * self.query_size


class TileCost(NamedTuple):
    """What one axis contributes to the cost of tiles; over the axes, most of it multiplies."""

    products: int  # query-key pairs computed
    full: int  # how many of these pairs belong to tiles that need no mask
    rows: int  # queries of a tile, summed over its pairs
    keys: int  # key rows of all tiles
    tiles: int
    runs: int
    largest: int  # pairs of one tile
    largest_masked: int  # pairs of one tile that needs a mask


# Nanoseconds, measured on two AVX-512 cores in float32; only their ratios matter.
PRODUCT = 0.4  # softmax and mask, per query-key pair
PRODUCT_DIM = 0.035  # the two matrix products, per pair and head dim
COPY = 0.25  # per copied element
_TILE = 300.0  # per matrix product of a tile
_RUN = 60_000.0  # time spent in Python, per run
_MAX_SCORES = 1 << 20  # query-key pairs of one tile


def query_groups(rule: Rule, axis: int, length: int, key_length: int) -> list[QueryGroup]:
    """The groups of an axis's queries, in each of which tokens are equally far apart.

    Where queries are finer than keys and there is dilation, the queries of a dilation group are not
    equally far apart. Then there is a group for each of the queries that share a key.
    """
    d, r, offset = rule.dilation[axis], rule.queries_per_key[axis], rule.offset[axis]
    apart = 1 if d == 1 else d * r
    found: list[QueryGroup] = []
    last = None
    for group in range(min(apart, length)):
        position, key_group = divmod((offset + group) // r, d)
        n_keys = group_length(key_length, d, key_group) if d > 1 else key_length
        kind = position, group_length(length, apart, group), n_keys
        if kind == last and key_group == found[-1].key_group + found[-1].groups:
            found[-1] = found[-1]._replace(groups=found[-1].groups + 1)
            continue
        last = kind
        x = torch.arange(group, length, apart, device="cpu")
        positions = rule.key_tokens(axis, x) // d
        found.append(QueryGroup(group, key_group, 1, apart, positions, n_keys))
    return found


def reach(
    rule: Rule, axis: int, length: int, key_length: int, group: int, of_keys: bool
) -> tuple[Tensor, Tensor]:
    """First and one-past-last key of each query of a dilation group, in the queries' order.

    With ``of_keys``, the first and one-past-last query of each key, among the group's queries. On a
    circular axis they are those before the modulo.
    """
    first, last = query_range(rule, axis, length, group)
    n_keys = group_length(key_length, rule.dilation[axis], group)
    position = torch.arange(first, last, device="cpu") // rule.queries_per_key[axis]
    start, end = rule.windows(axis, position, n_keys)
    if not of_keys:
        return start, end
    before = 0
    if rule.boundary[axis] == "circular":  # once around to both sides
        start, end = (torch.cat([x - n_keys, x, x + n_keys]) for x in (start, end))
        before = len(position)
    keys = torch.arange(n_keys, device="cpu")
    return (
        torch.searchsorted(end, keys, right=True) - before,
        torch.searchsorted(start, keys, right=True) - before,
    )


def axis_pairs(rule: Rule, axis: int, length: int, key_length: int) -> int:
    """Pairs of a query and a key that attend each other along an axis."""
    d = rule.dilation[axis]
    key = rule.key_tokens(axis, torch.arange(length, device="cpu"))
    start, end = rule.windows(axis, key // d, group_length(key_length, d, key % d))
    return int((end - start).sum())


def padded(values: Sequence[Any], fill: Any) -> tuple[Any, ...]:
    """``values`` with three axes: the missing ones come first and hold ``fill``."""
    return (*(fill,) * (3 - len(values)), *values)


def group_kinds(length: int, dilation: int) -> list[tuple[int, int]]:
    """``(first group, number of groups)`` for each set of equally long dilation groups.

    There are at most two such sets.
    """
    longer = length % dilation  # groups 0 .. longer - 1 have one position more than the rest
    kinds = ((0, longer), (longer, dilation - longer))
    return [(group, groups) for group, groups in kinds if groups and group < length]


class BlockCount(NamedTuple):
    """Blocks of keys that the tiles of one axis visit; the fields have one entry per case."""

    visited: Tensor  # blocks visited by all tiles
    full: Tensor  # how many of them every query of the tile attends in full, without a mask
    most: Tensor  # blocks visited by the tile that visits the most


def count_blocks(
    low: Tensor, start: Tensor, end: Tensor, high: Tensor, size: int | Tensor, origin: Tensor
) -> BlockCount:
    """Count the blocks of ``size`` key positions that tiles visit along one axis.

    Args:
        low, start: ``[..., tiles]``, the first and the last window start among a tile's queries.
        end, high: ``[..., tiles]``, the first and the last window end among a tile's queries.
        size: key positions in a block.
        origin: a key position at which a block starts; the blocks of a tile lie side by side.
    """
    first, last = (low - origin) // size, -((origin - high) // size)
    full = ((end - origin) // size + (origin - start) // size).clamp(min=0)
    visited = last - first
    return BlockCount(visited.sum(-1), full.sum(-1), visited.amax(-1))


class _Windows(NamedTuple):
    """The windows of a group of queries, in numbers of Python, because runs are many and short."""

    group: QueryGroup
    source: Source
    kinds: Tensor  # of windows as their queries see them, int64 [queries]
    shared: list[tuple[int, int]]  # how many queries share a window, and so many windows in a row
    start: list[int]
    end: list[int]
    fine: bool  # whether neighboring queries of the group may stand at the same key


@kept(lambda every: sum(512 + 128 * len(each.start) for each in every))
def _windows(rule: Rule, length: int, key_length: int) -> list[_Windows]:
    """Of each group of queries of a rule's only axis."""
    found = []
    for kind, group in enumerate(query_groups(rule, 0, length, key_length)):
        start, end = rule.windows(0, group.positions, group.n_keys)
        both = (start << 32) + end  # in one number, which two windows share only if they are equal
        kinds = both - group.positions * ((1 << 32) + 1)
        queries = both.unique_consecutive(return_counts=True)[1]  # of each window
        shared = zip(*(x.tolist() for x in queries.unique_consecutive(return_counts=True)))
        source = Source(rule, length, key_length, kind)
        fine = rule.queries_per_key[0] > group.apart == 1
        lists = list(shared), start.tolist(), end.tolist()
        found.append(_Windows(group, source, kinds, *lists, fine))
    return found


class Cut(list[Run]):
    """One way to cut an axis: its runs, with what they cost."""

    @cached_property
    def cost(self) -> TileCost:
        return axis_cost(self)

    @cached_property
    def cost_of_triangles(self) -> TileCost:
        """The cost where triangular tiles need no mask."""
        return axis_cost(self, triangles=True)


def axis_runs(rule: Rule, axis: int, length: int, key_length: int, tile: int) -> Cut:
    """Cut an axis of ``length`` queries and ``key_length`` keys into tiles of ``tile`` queries."""
    runs = Cut()
    for windows in _windows(rule.of_axis(axis), length, key_length):
        n = len(windows.start)
        count = n // tile
        if count:
            runs += _merge_tiles(windows, 0, tile, count)
        if n % tile:  # the last, smaller tile
            runs += _merge_tiles(windows, count * tile, n % tile, 1)
    return runs


def _merge_tiles(windows: _Windows, first: int, size: int, count: int) -> list[Run]:
    """Runs of ``count`` tiles of ``size`` queries from ``first`` on."""
    group, start, end = windows.group, windows.start, windows.end
    key_step, changes = size, []
    if count > 1:
        # Tiles look alike if each query does so to the one that stands there in the next tile.
        here = slice(first, first + size * (count - 1))
        there = slice(first + size, first + size * count)
        changed = windows.kinds[here] != windows.kinds[there]
        if windows.fine:
            steps = group.positions[there] - group.positions[here]
            key_step = max(1, int(steps[0]))
            changed |= steps != key_step
        changes = sorted({1 + i // size for i in changed.nonzero().flatten().tolist()})
    runs = []
    for a, b in itertools.pairwise([0, *changes, count]):
        begin, last = first + size * a, first + size * (a + 1) - 1
        key_start = start[begin]  # windows start and end in the order of queries
        key_size = end[last] - key_start
        from_first = start[last] == key_start
        triangular = from_first and end[begin] == key_start + 1
        if triangular and size > 1:
            one_more_each = [key_start + min(i, key_size) for i in range(1, size + 1)]
            triangular = end[begin : last + 1] == one_more_each
        runs.append(
            Run(
                group.group, group.key_group, group.groups, group.apart, b - a, size, key_step,
                begin, size, key_start, key_size, windows.source,
                from_first and end[begin] == end[last],
                triangular,
            )
        )  # fmt: skip
    return runs


def window_runs(rule: Rule, axis: int, length: int, key_length: int, between: bool) -> Cut:
    """Cut an axis of ``length`` queries and ``key_length`` keys where windows change.

    At each end many queries share one window, which is their tile's block of keys. The other
    queries lie in one tile or, with ``between``, in one tile for each window. Without ``between``
    the tiles at the two ends have one size and are one run.
    """
    runs = Cut()
    for windows in _windows(rule.of_axis(axis), length, key_length):
        tiles = windows.shared
        if not between and sum(count for _, count in tiles) > 2:
            size = min(tiles[0][0], tiles[-1][0])
            rest = len(windows.start) - 2 * size
            tiles = [(size, 3)] if rest == size else [(size, 1), (rest, 1), (size, 1)]
        own: list[Run] = []
        first = 0
        for size, count in tiles:
            own += _merge_tiles(windows, first, size, count)
            first += size * count
        runs += own if between else _merge_ends(own)
    return runs


def _merge_ends(runs: list[Run]) -> list[Run]:
    """Make one run of the first and the last, if both are one tile of one size without a mask."""
    first, last = runs[0], runs[-1]
    sizes = [(run.query_size, run.key_size, run.repeats, run.full) for run in (first, last)]
    if len(runs) == 1 or sizes != [(first.query_size, first.key_size, 1, True)] * 2:
        return runs
    steps = last.query_start - first.query_start, last.key_start - first.key_start
    return [first._replace(repeats=2, step=steps[0], key_step=steps[1]), *runs[1:-1]]


def axis_cost(runs: Sequence[Run], triangles: bool = False) -> TileCost:
    """What the runs of an axis cost.

    Args:
        runs: what the axis is cut into.
        triangles: whether triangular tiles need no mask and only half of them is computed.
    """
    products = full = rows = keys = tiles = largest = largest_masked = 0
    for run in runs:
        own, size = run.groups * run.repeats, run.query_size * run.key_size
        half = triangles and run.triangular
        pairs = own * (size // 2 if half else size)
        products, rows = products + pairs, rows + pairs * run.query_size
        keys, tiles = keys + own * run.key_size, tiles + own
        largest = max(largest, size)
        if half or run.full:
            full += pairs
        else:
            largest_masked = max(largest_masked, size)
    return TileCost(products, full, rows, keys, tiles, len(runs), largest, largest_masked)


def _candidates(rule: Rule, axis: int, length: int) -> list[int]:
    d, r = rule.dilation[axis], rule.queries_per_key[axis]
    n = group_length(length, 1 if d == 1 else d * r, 0)
    whole = rule.stride[axis] if isinstance(rule, Neighborhood) else 1
    whole *= r if d == 1 else 1
    sizes = {n} | {size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size < n}
    if whole > 1:  # tiles of whole strides, so that no two tiles share a window
        sizes |= {whole * m for m in (1, 2, 4, 8, 16) if whole * m < n}
    return sorted(size for size in sizes if size <= 256) or [256]


Tiling = tuple[tuple[Run, ...], ...]  # the runs of each axis; one run of each makes a set of tiles


def is_scattered(axis: int, cost: TileCost) -> bool:
    """Whether tiles that are cut like this along an axis are copied, not views of the tokens.

    Where only the first axis is cut, tiles are views if those of a run are few.
    """
    return cost.tiles > (1 if axis else 2 * cost.runs)


class Floor(NamedTuple):
    """What tiles cost at least."""

    product: float  # per query-key pair
    mask: float  # per query-key pair of a tile that needs a mask
    key: float  # per key of a tile
    tile: float
    run: float  # that is not the first
    copy: float = 0.0  # per key of a tile, where tiles are scattered along any axis
    copies: float = 0.0  # of all queries there


def cheapest(
    options: Sequence[Sequence[Cut]],
    cost: Callable[[Sequence[TileCost]], float],
    floor: Floor,
    triangles: bool = False,
) -> tuple[float, Tiling]:
    """The cost of the cheapest tiling, and that tiling.

    Args:
        options: for each axis, the ways to cut it; the first is taken if all cost infinitely much.
        cost: the cost of one way for every axis; infinite if tiles are too large.
        floor: bounds that cost from below, so that few ways have to be looked at.
        triangles: as in :func:`axis_cost`.
    """
    costs = [[cut.cost_of_triangles if triangles else cut.cost for cut in axis] for axis in options]
    sums = [(1, 1, 1, 1, 1, False)]
    for axis, cuts in enumerate(costs):
        counts = [
            (each.products, each.full, each.keys, each.tiles, each.runs, is_scattered(axis, each))
            for each in cuts
        ]
        sums = [
            (p * a, f * b, k * c, t * d, r * e, scattered or own)
            for p, f, k, t, r, scattered in sums
            for a, b, c, d, e, own in counts
        ]
    # Sums are rounded, and a bound must stay one. Scattered tiles are more than one, so that their
    # first run costs, too. Triangles of one pair count as none, and may cost less than a copy.
    product, mask, key, tile, run, copy, copies = (0.999999 * each for each in floor)
    bounds = [
        p * product + (p - f) * mask + k * key + t * tile + (r - 1) * run
        + (copies + k * copy + run if scattered and p else 0.0)
        for p, f, k, t, r, scattered in sums
    ]  # fmt: skip
    ways = list(itertools.product(*(range(len(axis)) for axis in options)))
    best, at = math.inf, 0
    for i in sorted(range(len(ways)), key=bounds.__getitem__):
        if bounds[i] > best:
            break
        found = cost([axis[way] for axis, way in zip(costs, ways[i])])
        if found < best or (found == best and i < at):
            best, at = found, i
    return best, tuple(tuple(axis[way]) for axis, way in zip(options, ways[at]))


def cuts_bytes(cuts: Sequence[Cut]) -> int:
    """About how many bytes ways to cut an axis take."""
    return sum(512 + sum(run.bytes() for run in cut) for cut in cuts)


@kept(cuts_bytes)
def even_cuts(rule: Rule, length: int, key_length: int) -> list[Cut]:
    """A rule's only axis, cut into tiles of one size, for every size that is worth trying."""
    sizes = _candidates(rule, 0, length)
    return [axis_runs(rule, 0, length, key_length, size) for size in sizes]


def tiles(
    rule: Rule, shape: tuple[int, ...], key_shape: tuple[int, ...], matrices: int, head_dim: int
) -> tuple[float, Tiling]:
    """The cost of the cheapest tiling for the backend ``tiled``, and that tiling.

    Args:
        rule: the windows.
        shape, key_shape: token layouts of queries and of keys.
        matrices: batch times heads.
        head_dim: mean of the query's and the value's head dim.
    """

    def cost(axes: Sequence[TileCost]) -> float:
        if math.prod(each.largest for each in axes) > _MAX_SCORES:
            return math.inf
        return (
            floor.product * math.prod(each.products for each in axes)
            + floor.key * math.prod(each.keys for each in axes)
            + floor.tile * math.prod(each.tiles for each in axes)
            + floor.run * math.prod(each.runs for each in axes)
        )

    floor = Floor(
        matrices * (PRODUCT + PRODUCT_DIM * head_dim), 0.0, matrices * 2 * head_dim * COPY,
        matrices * _TILE, _RUN,
    )  # fmt: skip
    options = [
        even_cuts(rule.of_axis(axis), *each) for axis, each in enumerate(zip(shape, key_shape))
    ]
    return cheapest(options, cost, floor)
