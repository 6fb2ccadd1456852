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

from ... import tuning
from ...neighborhood import Neighborhood, Rule, group_length
from ...tiling import padded, reach

Shape = tuple[int, ...]
KINDS = ("forward", "query", "key")  # the last two make the gradients of these
ROWS = 64  # tokens of a warpgroup
HEADS = (32, 64, 128, 256)  # channels that there are kernels for
MOST = 2**31 - 1  # coordinates of TMA are 32 bits
_SHARED = 227 * 1024  # bytes a program may have

NONE, COMPARE, PRODUCT = range(3)  # kinds of masks, as in the kernels


class Tiles(NamedTuple):
    """A program's tiles and boxes, three axes each, and how it runs.

    Tiles are of queries and boxes of keys, but for the kind "key", where it is the reverse.
    """

    tile: Shape  # of one warpgroup
    box: Shape
    split: int  # the axis along which the warpgroups are neighbors
    groups: int  # of warps with tiles
    programs: int  # at once on a multiprocessor
    stages: int


def native(channels: int) -> int:
    """Channels of the kernels that run heads of so many: zeros beside their own."""
    return next(each for each in HEADS if each >= channels)


class Work(NamedTuple):
    """What a kernel does with a head: channels in shared memory, registers, cycles."""

    tile: int  # channels of a row of a tile
    box: int
    out: int
    sums: int  # registers of a thread
    scores: float  # registers of a thread, per two columns of a box
    factor: bool  # whether there are registers for the factor of a mask by products
    products: int  # channels multiplied per score
    cycles: float  # of a column's scores beside products
    wait: float  # cycles until a box's products and scores are made, if nothing else runs
    pair: float  # cycles that a box waits for the next one's buffer if there are only two
    columns: Shape  # of a box
    rooms: tuple[tuple[int, bool], ...]  # stages, and outputs not in the tile's place: best first


def work(kind: str, dim: int, value_dim: int) -> Work:
    """Of a kind of kernel; gradients need equal dims. With queries come 16 bytes of terms."""
    dim, value_dim = native(dim), native(value_dim)
    both = dim + value_dim
    if kind == "forward":
        columns: Shape = (64, 32) if max(dim, value_dim) > 128 else (128, 64)
        # Outputs that delay no tile are worth more than a third stage.
        rooms = [(3, True), (2, True)] + [(2, False)] * (dim == value_dim)
        return Work(
            dim, both, value_dim, value_dim // 2, 1.5, True, both, 8.0, 1200.0, 0.0, columns,
            tuple(rooms),
        )  # fmt: skip
    # A box is held while the next one's scores are made.
    rooms = [(stages, own) for stages in (4, 3, 2) for own in (True, False)]
    if kind == "query":
        columns = (64,) if dim > 64 else (128, 64)
        return Work(
            both + 8, both, dim, dim // 2, 2.5, True, 3 * dim, 12.0, 1600.0, 400.0, columns,
            tuple(rooms),
        )  # fmt: skip
    return Work(
        both, both + 8, both, dim, 2.25, dim < 128, 4 * dim, 12.0, 2000.0, 400.0, (64,),
        tuple(rooms),
    )  # fmt: skip


class Mask(NamedTuple):
    """How scores are masked; see the kernel."""

    kind: int = NONE
    code: Shape = (0, 0, 0)  # columns of a product, summed up over the axes
    by_row: bool = False
    steps: int = 1  # of 16 columns
    tables: int = 1


class Axis(NamedTuple):
    """One way to cut an axis: what a warpgroup and a box cover, summed over the axis's tiles."""

    tile: int
    box: int
    tiles: int
    boxes: int  # with partners, of all warpgroups if the axis is split, else of one
    fetched: int  # as boxes, with those that a warpgroup hands back unread
    most: int  # boxes of one tile
    masked: bool


def _cut(first: torch.Tensor, last: torch.Tensor, tile: int, box: int, parts: int) -> Axis:
    """Cut an axis whose tokens have partners ``first .. last``; ``parts`` warpgroups a tile."""
    end = len(first) - 1
    begin = torch.arange(0, len(first), tile * parts, device="cpu")
    low, high = first[begin], last[(begin + tile * parts - 1).clamp(max=end)]
    boxes, masked = 0, False
    for part in range(parts):
        head = (begin + part * tile).clamp(max=end)
        tail = (begin + part * tile + tile - 1).clamp(max=end)
        before, past = first[head] - low, last[tail] - low
        boxes += int((-(-past // box) - before // box).sum())
        masked |= bool((first[tail] > first[head]).any() or (last[tail] > last[head]).any())
        masked |= bool((before % box).any() or (past % box).any())
    fetched = -(-(high - low) // box)
    total = int(fetched.sum()) * parts
    return Axis(tile, box, len(begin), boxes, total, int(fetched.max()), masked)


class _Cuts:
    """The axes of a problem, cut for given tiles."""

    def __init__(self, of_keys: bool, rule: Neighborhood, shape: Shape) -> None:
        self.missing = 3 - len(shape)
        self.lengths = [group_length(n, d, 0) for n, d in zip(shape, rule.dilation)]
        self.partners = [
            reach(rule, axis, length, length, of_keys) for axis, length in enumerate(self.lengths)
        ]
        self.axis = cache(self._axis)

    def _axis(self, axis: int, tile: int, box: int, parts: int) -> Axis:
        if axis < self.missing:
            return Axis(1, 1, 1, 1, 1, 1, False)
        return _cut(*self.partners[axis - self.missing], tile, box, parts)

    def __call__(self, tiles: Tiles) -> tuple[Axis, ...]:
        return tuple(
            self.axis(a, tiles.tile[a], tiles.box[a], tiles.groups if a == tiles.split else 1)
            for a in range(3)
        )


@lru_cache(maxsize=64)
def _cuts(kind: str, rule: Neighborhood, shape: Shape) -> _Cuts:
    return _Cuts(kind == "key", rule, shape)


def mask_of(sliding: bool, axes: Sequence[Axis], split: int, groups: int, work: Work) -> Mask:
    """How three axes are masked; ``sliding``: every token of the last has a window of its own."""
    if not any(axis.masked for axis in axes):
        return Mask()
    # The windows of a tile's queries start in as many places, at the same distances everywhere.
    by_row = axes[2].masked and axes[2].tile < axes[2].box and (split != 2 or groups == 1)
    by_row &= sliding
    widths = [axis.box if axis.masked else 0 for axis in axes]
    if by_row:
        widths[2] = axes[2].tile
    tables = axes[2].most if by_row else 1
    if sum(widths) > 32 or tables > 8 or not work.factor:
        return Mask(COMPARE)
    code = tuple(itertools.accumulate(widths))
    return Mask(PRODUCT, code, by_row, 1 if sum(widths) <= 16 else 2, tables)


def slides(kind: str, rule: Neighborhood) -> bool:
    """Whether partners along the last axis are a window that moves by one from token to token."""
    return kind != "key" and rule.stride[-1] == 1 and not rule.is_causal[-1]


def mask(kind: str, rule: Neighborhood, shape: Shape, tiles: Tiles, work: Work) -> Mask:
    """How tiles are masked."""
    axes = _cuts(kind, rule, shape)(tiles)
    return mask_of(slides(kind, rule), axes, tiles.split, tiles.groups, work)


def _shared(tiles: Tiles, mask: Mask, work: Work, own_out: bool) -> int:
    """Bytes of shared memory of a multiprocessor's programs; 2 kB each for barriers and Triton."""
    columns = math.prod(tiles.box)
    rows = tiles.groups * ROWS * (work.tile + work.out * own_out)
    table = mask.tables * columns * 16 * mask.steps * (mask.kind == PRODUCT)
    each = 2 * (rows + tiles.stages * columns * work.box + table)
    return tiles.programs * (each + 2048)


def own_out(tiles: Tiles, mask: Mask, work: Work) -> bool:
    """Whether outputs have shared memory of their own, or take the tile's."""
    fits = _shared(tiles, mask, work, True) <= _SHARED
    return fits or (tiles.stages, False) not in work.rooms


def registers(tiles: Tiles, work: Work) -> tuple[int, int, int]:
    """Of a thread: when a program starts, of warpgroups that compute, and of warps that fetch."""
    fetch = 40 if tiles.programs == 1 and work.factor else 24
    # What the fetching warpgroup leaves (two of its warps are idle) goes to the others.
    start = 65536 // tiles.programs // (128 * tiles.groups + 128) // 8 * 8
    return start, (start * (tiles.groups + 1) - fetch) // tiles.groups // 8 * 8, fetch


def _has_registers(tiles: Tiles, work: Work) -> bool:
    """Whether sums and scores fit; a product alone must fit what a program starts with."""
    start, most, _ = registers(tiles, work)
    scores = math.prod(tiles.box) // 2
    alone = max(work.out // 2 if work.sums < work.out else work.sums // 2, scores)
    return alone + 30 <= start and work.sums + scores * work.scores + 40 <= most


# What a box and a tile cost a multiprocessor beside products, and a tile's wait: cycles.
_BOX, _TILE, _TILE_WAIT = 100.0, 500.0, 3000.0
# What a box costs that a warpgroup hands back, of one that it computes: the other works alone.
IDLE = 0.15


def prices(tiles: Tiles, mask: Mask, work: Work) -> tuple[float, float]:
    """Cycles of a multiprocessor that a box costs, and a warpgroup's tile beside its boxes."""
    columns = math.prod(tiles.box)
    # Warpgroups of one program wait for the same boxes.
    at_once = tiles.programs if tiles.groups == 1 else 1.5 * tiles.programs
    product = columns * (work.products + 16 * mask.steps * (mask.kind == PRODUCT)) / 32
    cycles = work.cycles * (1.3 if mask.kind == COMPARE else 1)
    box = product + columns * cycles + _BOX + work.wait / at_once
    box += work.pair * (tiles.stages == 2)
    return box, _TILE + _TILE_WAIT / at_once


def _cost(axes: tuple[Axis, ...], tiles: Tiles, mask: Mask, work: Work) -> float:
    """Cycles of a multiprocessor per batch entry, head and dilation group."""
    box, tile = prices(tiles, mask, work)
    number = math.prod(axis.tiles for axis in axes)
    boxes, fetched = (math.prod(each) for each in zip(*((a.boxes, a.fetched) for a in axes)))
    return (boxes + IDLE * (fetched - boxes)) * box + number * tiles.groups * tile


def key(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int, itemsize: int
) -> str:
    """The name of a problem in :mod:`natten.tuning`."""
    dims = f"{native(dim)}-{native(value_dim)}"
    return f"hopper-{kind}-{'x'.join(map(str, shape))}-{rule}-{dims}"


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
    problem = (kind, rule, shape, key_shape, dim, value_dim, itemsize)
    return tuning.choose(key(*problem), candidates(*problem))


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
    cuts, needs = _cuts(kind, rule, shape), work(kind, dim, value_dim)
    costs: dict[Tiles, float] = {}
    for tiles in cuttings(cuts.lengths, needs):
        axes = cuts(tiles)
        found = mask_of(slides(kind, rule), axes, tiles.split, tiles.groups, needs)
        fitting = fitted(tiles, found, needs)
        if fitting is not None:
            costs[fitting] = _cost(axes, fitting, found, needs)
    return sorted(costs, key=costs.__getitem__)


def cuttings(lengths: Sequence[int], work: Work) -> list[Tiles]:
    """Tiles that fit the registers, to be :func:`fitted`; of equal cost, the first is better.

    Args:
        lengths: positions of a dilation group, per axis.
        work: of the kernel.
    """
    boxes = [shape for columns in work.columns for shape in _shapes(columns, lengths)]
    every = (
        Tiles(tile, box, *way, stages=2)
        for tile, box in itertools.product(_shapes(ROWS, lengths), boxes)
        for way in _ways(len(lengths))
    )
    fitting = (tiles for tiles in every if _has_registers(tiles, work))
    return sorted(fitting, key=lambda tiles: max(tiles.tile))


def fitted(tiles: Tiles, mask: Mask, work: Work) -> Tiles | None:
    """The tiles with the stages that fit the shared memory, or None if not even two do."""
    for stages, own in work.rooms:
        tiles = tiles._replace(stages=stages)
        if _shared(tiles, mask, work, own) <= _SHARED:
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
    axes = _cuts(kind, rule, shape)(tiles)
    boxes = math.prod(axis.boxes for axis in axes) * math.prod(rule.dilation)
    return boxes * ROWS * math.prod(tiles.box)


def longest(kind: str, rule: Neighborhood, shape: Shape, tiles: Tiles) -> int:
    """Boxes of the tile that has most."""
    return math.prod(axis.most for axis in _cuts(kind, rule, shape)(tiles))
