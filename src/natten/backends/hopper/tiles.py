"""Tile shapes of the Hopper kernels, by cost: products, blocks visited, tiles, waiting.

Estimates (``costs.py``) rank them; what :mod:`natten.tuning` remembers from measuring comes first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property, lru_cache, partial
from operator import itemgetter
from typing import Any

from ... import tuning
from ...documents import roomy, roomy_layout
from ...neighborhood import Dense, Neighborhood, Rule
from ...tiling import padded
from ..interface import Shape, Tiles
from ..triton.tiles import usual
from .costs import (
    COMPARE,
    ROWS,
    Cycles,
    Mask,
    Work,
    any_axes,
    columns_of,
    cost_of,
    cycles,
    fitted,
    has_registers,
    is_padded,
    mask_of,
    plain_mask,
    slides,
    work,
)
from .cuts import (
    OWN,
    PIECE_ROWS,
    WARPS,
    Axis,
    cuts,
    in_rows,
    queries,
    rows_held,
    tile_and_block,
    warpgroups,
)
from .flat import Flat, columns_of_rule, flattened
from .uneven import SMALL, blocks_of_span, may_be_uneven, tiles_of_strides
from .widths import aligned, native

# What a block costs more if it or its tile is no power of two, and once more if its tile is none
# (hopper-log.md): of small windows, of large ones, and of heads of no native width. And how many
# such tiles with blocks are priced.
_OF_SMALL, _OF_LARGE, _OF_OTHER_WIDTHS, _UNEVEN = (1.03, 1.0), (1.0, 1.0), (1.07, 1.05), 16
_LESS = 0.999999  # of a lower bound, as sums are rounded


@lru_cache(maxsize=1024)
def _model(rule: Rule, shape: Shape, key_shape: Shape) -> tuple[Rule, Shape, Shape]:
    """The problem for which tiles are chosen, which stands for many parts of a layout.

    Lengths are rounded up. Of a part, it is one dilation group with the part in its middle, so that
    offsets do not matter, and keys that no window of the part's middle reaches are left out. So a
    new offset or a longer cache of keys has the same tiles, and the same compiled kernels.
    """
    if isinstance(rule, Dense):
        rule = Flat() if isinstance(rule, Flat) else rule
        return rule, roomy_layout(shape), roomy_layout(key_shape)
    if rule.is_self_attention:
        return rule, shape, key_shape
    shape, key_shape = zip(*model_sizes(rule, shape, key_shape))
    offset = []
    for count, n, s, r in zip(shape, key_shape, rule.stride, rule.queries_per_key):
        offset.append((r * n - count) // 2 // (r * s) * (r * s))
    own = replace(rule, dilation=(1,) * rule.rank, query_offset=tuple(offset))
    return own, shape, key_shape


def model_sizes(
    rule: Neighborhood, shape: Sequence[int], key_shape: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Per axis, queries and keys of the problem for which the tiles of a part are chosen."""
    axes = zip(rule.kernel_size, rule.dilation, rule.queries_per_key, shape, key_shape)
    return tuple([_model_size(*each) for each in axes])


def _model_size(k: int, d: int, r: int, length: int, key_length: int) -> tuple[int, int]:
    count, n = roomy(-(-length // d)), -(-key_length // d)
    most = roomy(-(-count // r) + k)  # keys that matter to tiles
    n = roomy(n) if n < most else most
    return min(count, r * n), n


def key(
    kind: str,
    rule: Rule,
    shape: Shape,
    key_shape: Shape,
    dim: int,
    value_dim: int,
    itemsize: int,
    packed: bool = False,
) -> str:
    """The name of a problem in :mod:`natten.tuning`."""
    dim, value_dim = aligned(dim), aligned(value_dim)
    rule, shape, key_shape = _model(rule, shape, key_shape)
    layouts = (shape,) if shape == key_shape else (shape, key_shape)
    sizes = "-".join("x".join(map(str, each)) for each in layouts)
    return f"hopper-{kind}-{sizes}-{rule}-{dim}-{value_dim}" + "-packed" * packed


def choose(
    kind: str,
    rule: Rule,
    shape: Shape,
    key_shape: Shape,
    dim: int,
    value_dim: int,
    itemsize: int = 2,
    packed: bool = False,
    has_bias: bool = False,
) -> Tiles:
    """The tiles that were measured to be fastest, else those estimated to be cheapest, or nearly
    so (:func:`natten.backends.triton.tiles.usual`).

    Args:
        kind: of kernel, one of ``interface.KINDS``.
        packed: of packed documents, up to the layouts' lengths.
        has_bias: whether scores have a bias. Kernels of wide heads spill registers then where
            blocks are no powers of two, as where each column is takes some.
    """
    problem = kind, *_model(rule, shape, key_shape), aligned(dim), aligned(value_dim)
    found = _choose(*problem, itemsize, packed)
    _, block = tile_and_block(found, kind == "dkdv")
    if has_bias and is_padded(block) and max(dim, value_dim) > 64:
        search = _Search(*problem)
        search.uneven = []
        even = search.cheapest()
        found = found if even is None else even[1]
    return found


@tuning.cached
def _choose(*problem: Any) -> Tiles:
    *sizes, _, packed = problem
    every, of_model = partial(candidates, *problem), partial(_usual, *sizes, packed)
    found = tuning.choose(key(*problem), every, of_model)
    assert found is not None
    return found


def candidates(
    kind: str,
    rule: Rule,
    shape: Shape,
    key_shape: Shape,
    dim: int,
    value_dim: int,
    itemsize: int = 2,
    packed: bool = False,
) -> list[Tiles]:
    """Tiles that fit the registers and shared memory: what :func:`choose` takes if no others were
    measured, then the others, cheapest first by estimate."""
    model = _model(rule, shape, key_shape)
    return _candidates(kind, *model, aligned(dim), aligned(value_dim), packed)


def estimates(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int
) -> dict[Tiles, float]:
    """As :func:`cycles_of`, of all tiles that fit, cheapest first."""
    model = _model(rule, shape, key_shape)
    return _Search(kind, *model, aligned(dim), aligned(value_dim)).every()


@lru_cache(maxsize=1024)
def cycles_of(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, dim: int, value_dim: int
) -> float:
    """Cycles of a multiprocessor per batch entry, head and dilation group, of the cheapest tiles by
    estimate."""
    found = _Search(kind, *_model(rule, shape, key_shape), dim, value_dim).cheapest()
    return math.inf if found is None else found[0]


@lru_cache(maxsize=1024)
def in_a_row(
    kinds: tuple[str, ...], rule: Rule, space: Shape, dim: int, value_dim: int
) -> Dense | None:
    """The rule of all tokens in a row, if kernels of these kinds take less for it by estimate than
    for the windows."""
    row = flattened(rule, space)
    if row is None:
        return None
    assert isinstance(rule, Neighborhood)
    groups = math.prod(rule.dilation) if queries(rule, space) == OWN else 1
    tokens = (math.prod(space),)
    ours = theirs = 0.0
    for kind in kinds:
        # Not of the rounded length for which tiles are chosen.
        search = _Search(kind, row, tokens, tokens, dim, value_dim)
        priced = search.priced(choose(kind, row, tokens, tokens, dim, value_dim))
        ours += math.inf if priced is None else priced[0]
        theirs += groups * cycles_of(kind, rule, space, space, dim, value_dim)
    return row if ours < theirs else None


def has_tiles(
    kind: str, rule: Neighborhood, shape: Shape, key_shape: Shape, dim: int, value_dim: int
) -> bool:
    """Whether there are tiles at all; some rings are too short."""
    model = _model(rule, shape, key_shape)
    return _usual(kind, *model, aligned(dim), aligned(value_dim), False) is not None


@lru_cache(maxsize=64)
def _candidates(*problem: Any) -> list[Tiles]:
    first = _usual(*problem)
    rest = (tiles for tiles in _Search(*problem).every() if tiles != first)
    return [] if first is None else [first, *rest]


@lru_cache(maxsize=1024)
def _usual(*problem: Any) -> Tiles | None:
    return usual(_Search, *problem)


class _Ways:
    """How a kind of kernel may run, for heads of some width: what does not depend on a layout."""

    def __init__(self, kind: str, dim: int, value_dim: int, columns: int) -> None:
        self.work = work(kind, dim, value_dim, columns)
        self.programs = cache(self._programs)
        self._priced: dict[Any, tuple[int, Cycles] | None] = {}

    def _programs(
        self, columns: int, rank: int
    ) -> tuple[list[tuple[_Program, float, float]], float, float]:
        """Of blocks of so many tokens, the programs that fit, each with what a block and a
        warpgroup's tile cost at least, without a mask; and the least of all programs."""
        found = []
        for program in _programs(rank, self.work.may_be_alone):
            tiles = Tiles((1, 1, columns), (1, 1, columns), *program)
            fits = has_registers(tiles, self.work) and fitted(tiles, Mask(), self.work)
            if fits:
                each = cycles(fits, Mask(), self.work)
                found.append((program, _LESS * each.block, _LESS * each.tile))
        per_block = min((block for _, block, _ in found), default=math.inf)
        return found, per_block, min((tile for *_, tile in found), default=math.inf)

    def priced(self, tiles: Tiles, mask: Mask) -> tuple[int, Cycles] | None:
        """The stages that fit, and the :func:`cycles`; None if none fit."""
        key = columns_of(tiles, self.work), tiles.num_warps, tiles.resident_programs, mask
        if key not in self._priced:
            fitting = fitted(tiles, mask, self.work)
            self._priced[key] = fitting and (fitting.num_stages, cycles(fitting, mask, self.work))
        return self._priced[key]


_ways = cache(_Ways)


class _Search:
    """Tiles for a problem, by what they cost: cycles of a multiprocessor per batch entry, head and
    dilation group."""

    def __init__(
        self,
        kind: str,
        rule: Rule,
        shape: Shape,
        key_shape: Shape,
        dim: int,
        value_dim: int,
        packed: bool = False,
    ) -> None:
        self.of_keys, self.packed = kind == "dkdv", packed
        self.ways = _ways(kind, dim, value_dim, columns_of_rule(rule))
        self.cuts = cuts(self.of_keys, rule, shape, key_shape)
        self.kind, self.rule, self.slides = kind, rule, slides(kind, rule)
        kv_lengths = None if queries(rule, shape) == OWN else self.cuts.kv_lengths
        self.tiles, self.blocks = _tiles_and_blocks(self.cuts.q_lengths, self.ways.work, kv_lengths)
        if packed:  # in rows of so many tokens that shared memory keeps its pattern
            lengths = *self.cuts.q_lengths[:-1], max(self.cuts.q_lengths[-1], PIECE_ROWS)
            self.tiles, self.blocks = (
                [shape for shape in shapes if shape[2] >= PIECE_ROWS]
                for shapes in _tiles_and_blocks(lengths, self.ways.work, kv_lengths)
            )
        dims = dim, value_dim
        self.uneven_costs = _OF_OTHER_WIDTHS
        if all(native(each) == each for each in dims):
            is_large = isinstance(rule, Neighborhood) and rule.window_tokens > SMALL
            self.uneven_costs = _OF_LARGE if is_large else _OF_SMALL
        self.uneven: list[tuple[float, Shape, Shape]] = []  # what tiles with blocks cost at least
        self.is_part = kv_lengths is not None
        lengths = padded(self.cuts.q_lengths, 1), padded(self.cuts.kv_lengths, 1)
        self.lengths = lengths[::-1] if self.of_keys else lengths  # of tiles' axes, and of blocks'
        suits = max(map(native, dims)) <= 128  # wide heads were never run with them
        if isinstance(rule, Neighborhood) and not packed and suits:
            is_uneven = may_be_uneven(rule, shape, self.is_part)
            self.uneven = self._find_uneven(rule) if is_uneven else []
        if self.is_part and not self.of_keys and isinstance(rule, Neighborhood):
            # The part begins where a stride does, and many that it stands for do not.
            self.tiles.sort(key=self._strides_within)

    def _strides_within(self, tile: Shape) -> float:
        """Where a part may begin anywhere, how often a tile of queries lies across the ends of
        strides, whose windows differ; of equally cheap tiles, those are better that do so less."""
        rule, missing = self.rule, self.cuts.missing
        assert isinstance(rule, Neighborhood)
        sizes = self.cuts.q_lengths, self.cuts.kv_lengths
        axes = zip(tile[missing:], *sizes, rule.stride, rule.queries_per_key)
        return sum((size - 1) / (s * r) for size, n, m, s, r in axes if s > 1 and n < m * r)

    def _find_uneven(self, rule: Neighborhood) -> list[tuple[float, Shape, Shape]]:
        """The best tiles with blocks that are no powers of two (``uneven.py``), and first what they
        cost at least, lowest first."""
        more, _ = self.uneven_costs
        windows, strides = padded(rule.kernel_size, 1), padded(rule.stride, 1)
        has_ends = not (self.of_keys or self.is_part)
        problem = ROWS, *self.lengths, windows, strides, has_ends
        found = []
        usual_tiles, usual_blocks = set(self.tiles), set(self.blocks)
        for tile, span in tiles_of_strides(*problem):
            x, y, z = self.cuts.visits(tile)
            count = x.tiles * y.tiles * z.tiles
            for columns in self.ways.work.block_sizes:
                _, per_block, per_tile = self.ways.programs(columns, rule.rank)
                for block in blocks_of_span(span, strides, columns):
                    if tile not in usual_tiles or block not in usual_blocks:
                        a, b, c = block
                        cost = x[a] * y[b] * z[c] * per_block * more + count * per_tile
                        found.append((cost, tile, block))
        found.sort(key=itemgetter(0))
        return found[:_UNEVEN]

    def every(self) -> dict[Tiles, float]:
        """All tiles that fit, with their costs, cheapest first."""
        costs: dict[Tiles, float] = {}
        uneven = [(tile, block) for _, tile, block in self.uneven]
        for pair in [*itertools.product(self.tiles, self.blocks), *uneven]:
            ways = (tiles for *_, tiles in self._bounds_of_ways(*pair))
            costs.update((tiles, cost) for cost, tiles in filter(None, map(self._priced, ways)))
        return dict(sorted(costs.items(), key=itemgetter(1)))

    def cheapest(self, most: float = math.inf) -> tuple[float, Tiles] | None:
        """The first of :meth:`every` and its cost, None if nothing costs less than ``most``: in the
        order of lower bounds, up to one that is above what was found."""
        best, found, at = most, None, (-1, -1)
        for bound, number in self._bounds_of_tiles():
            if bound > best:
                break
            for bound, i in sorted(self._bounds_of_blocks(number, best)):
                if bound > best:
                    break
                for bound, way, tiles in sorted(self._bounds_of_ways(*self._pair(i), best)):
                    priced = self._priced(tiles) if bound <= best else None
                    if priced and (priced[0] < best or (priced[0] == best and (i, way) < at)):
                        (best, found), at = priced, (i, way)
        return found and (best, found)

    def _pair(self, i: int) -> tuple[Shape, Shape]:
        """The tile and the block of one of :meth:`_bounds_of_blocks`."""
        tile, block = divmod(i, len(self.blocks))
        count = len(self.tiles) * len(self.blocks)
        return (self.tiles[tile], self.blocks[block]) if i < count else self.uneven[i - count][1:]

    def priced(self, tiles: Tiles) -> tuple[float, Tiles] | None:
        """What tiles cost, with the stages that fit; None if none do, or an axis is too short."""
        tile, block = tile_and_block(tiles, self.of_keys)
        suits = tile in self.tiles and block in self.blocks
        if not suits and self.uneven:
            sizes = zip((*tile, *block), itertools.chain(*self.lengths))
            suits = all(size == 1 or size < 2 * n for size, n in sizes)
        return self._priced(tiles) if suits else None

    def _bounds_of_tiles(self) -> list[tuple[float, int]]:
        """What each tile costs at least, and its number, from the lowest on: as if each warpgroup
        had a program of its own, no mask, and blocks without a token that is no partner. The last
        number is that of all that are no powers of two."""
        programs = [self.ways.programs(n, self.rule.rank) for n in self.ways.work.block_sizes]
        per_column = min(
            block / n for n, (_, block, _) in zip(self.ways.work.block_sizes, programs)
        )
        per_tile = min(each for *_, each in programs)
        bounds = [(bound, len(self.tiles)) for bound, *_ in self.uneven[:1]]
        for number, tile in enumerate(self.tiles):
            x, y, z = self.cuts.visits(tile)
            count = x.tiles * y.tiles * z.tiles
            bounds.append((x[1] * y[1] * z[1] * per_column + count * per_tile, number))
        return sorted(bounds)

    def _bounds_of_blocks(self, number: int, most: float) -> list[tuple[float, int]]:
        """What the tile of that number costs at least with each block, and the numbers of both;
        those with which it costs more than ``most`` are left out."""
        start = number * len(self.blocks)
        if number == len(self.tiles):
            return [(bound, i) for i, (bound, *_) in enumerate(self.uneven, start) if bound <= most]
        x, y, z = self.cuts.visits(self.tiles[number])
        count = x.tiles * y.tiles * z.tiles
        return [
            (bound, i)
            for i, ((a, b, c), per_block, per_tile) in enumerate(self._prices, start)
            if (bound := x[a] * y[b] * z[c] * per_block + count * per_tile) <= most
        ]

    @cached_property
    def _prices(self) -> list[tuple[Shape, float, float]]:
        """Of each of :attr:`blocks`, what it and a tile beside blocks cost at least."""
        rank = self.rule.rank
        return [(block, *self.ways.programs(rows_held(block), rank)[1:]) for block in self.blocks]

    def _bounds_of_ways(
        self, tile: Shape, block: Shape, most: float = math.inf
    ) -> Iterator[tuple[float, int, Tiles]]:
        """What each way to run a tile with a block costs at least, and its number; those that cost
        more than ``most`` are left out."""
        programs, *_ = self.ways.programs(rows_held(block), self.rule.rank)
        both = (block, tile) if self.of_keys else (tile, block)
        visits = self.cuts.visits(tile)
        along = [axis[size] for axis, size in zip(visits, block)]
        blocks, count = math.prod(along), math.prod([axis.tiles for axis in visits])
        for way, (program, per_block, per_tile) in enumerate(programs):
            num_warps, _, axis, _ = program
            bound = blocks * per_block + count * per_tile
            if bound <= most and num_warps > WARPS:
                of_pairs = self.cuts.visits_of_pairs(axis, tile[axis])[block[axis]]
                bound = blocks / along[axis] * of_pairs * per_block + count * per_tile
            if bound <= most:
                yield bound, way, Tiles(*both, *program)

    def _priced(self, tiles: Tiles) -> tuple[float, Tiles] | None:
        pieces = in_rows(tiles, self.of_keys) if self.packed else self.cuts.pieces(tiles)
        axes = self.cuts.in_pieces(tiles, pieces.at_seam)
        mask = self._mask(tiles, axes)
        if mask.kind == COMPARE and is_padded(tile_and_block(tiles, self.of_keys)[1]):
            return None  # where each column is would take registers
        priced = self.ways.priced(tiles, mask)
        if priced is None or not all(axis.fits for axis in axes):
            return None
        stages, each = priced
        tile, block = map(is_padded, tile_and_block(tiles, self.of_keys))
        of_both, of_tile = self.uneven_costs
        uneven = of_both ** (tile or block) * of_tile**tile
        each = each._replace(block=each.block * pieces.cost * uneven)
        return cost_of(axes, tiles, each), tiles._replace(num_stages=stages)

    def _mask(self, tiles: Tiles, axes: Sequence[Axis]) -> Mask:
        """How tiles are masked that cut the axes so."""
        rule, work = self.rule, self.ways.work
        if isinstance(rule, Dense):
            return plain_mask(rule, None if self.packed else self.cuts.kv_lengths[0], tiles, work)
        if self.packed or not rule.is_self_attention:
            axes = any_axes(self.kind, rule, tiles)
        return mask_of(self.slides and not self.packed, axes, tiles, work)


def _tiles_and_blocks(
    q_lengths: Sequence[int], work: Work, kv_lengths: Sequence[int] | None
) -> tuple[list[Shape], list[Shape]]:
    """Shapes of tiles and of blocks; arguments as of :func:`cuttings`."""
    shapes = tile_shapes if kv_lengths is None else _shapes_of_part
    of_tile, of_block = tuple(q_lengths), tuple(kv_lengths or q_lengths)
    if work.of_keys:
        of_tile, of_block = of_block, of_tile
    blocks = [shape for columns in work.block_sizes for shape in shapes(columns, of_block)]
    return sorted(shapes(ROWS, of_tile), key=max), blocks


def cuttings(q_lengths: Sequence[int], work: Work) -> list[Tiles]:
    """Tiles that fit the registers, to be :func:`fitted`; of equal cost, the first is better.

    Args:
        q_lengths: queries of a dilation group, per axis.
        work: of the kernel.
    """
    fitting = []
    for tile, block in itertools.product(*_tiles_and_blocks(q_lengths, work, None)):
        queries, keys = (block, tile) if work.of_keys else (tile, block)
        programs = _programs(len(q_lengths), work.may_be_alone)
        every = (Tiles(queries, keys, *program) for program in programs)
        fitting += [tiles for tiles in every if has_registers(tiles, work)]
    return fitting


_Program = tuple[int, int, int, int]


@cache
def _programs(rank: int, may_be_alone: bool) -> list[_Program]:
    """Warps, stages, axis of the split, programs of a multiprocessor: two warpgroups that share
    blocks, or one, of which several run at once or one is alone."""
    pairs = [(2 * WARPS, 2, axis, 1) for axis in range(3 - rank, 3)]
    counts = (1, 2, 3, 4) if may_be_alone else (2, 3, 4)
    return pairs + [(WARPS, 2, 3 - rank, programs) for programs in counts]


@lru_cache(maxsize=1024)
def tile_shapes(volume: int, lengths: Shape) -> list[Shape]:
    """Three-axis powers of two of a volume, none twice its axis; if there is none, a row."""
    powers = [1 << i for i in range(volume.bit_length())]
    sizes = [[p for p in powers if p == 1 or p < 2 * n] for n in padded(lengths, 1)]
    pairs = itertools.product(*sizes[:2])
    shapes: list[Shape] = [(a, b, volume // (a * b)) for a, b in pairs if a * b <= volume]
    return [shape for shape in shapes if shape[2] in sizes[2]] or [(1, 1, volume)]


def _shapes_of_part(volume: int, lengths: Shape) -> list[Shape]:
    """As :func:`tile_shapes`; if there is none, all axes may be exceeded, as little as need be."""
    while math.prod(1 << (2 * n - 1).bit_length() - 1 for n in lengths) < volume:
        lengths = tuple(2 * n for n in lengths)
    return tile_shapes(volume, lengths)


def computed_pairs(kind: str, rule: Rule, shape: Shape, key_shape: Shape, tiles: Tiles) -> int:
    """Query-key pairs that a kernel computes per batch entry and head, wasted ones included."""
    found = cuts(kind == "dkdv", rule, shape, key_shape)
    blocks = math.prod(axis.blocks for axis in found(tiles)) * found.groups
    return blocks * rows_held(tiles.q_block) * rows_held(tiles.kv_block)


def excess(kind: str, rule: Rule, shape: Shape, key_shape: Shape, tiles: Tiles) -> float:
    """How many blocks more than usual the tile has that has most."""
    axes = cuts(kind == "dkdv", *_model(rule, shape, key_shape))(tiles)
    count = math.prod(axis.tiles for axis in axes) * warpgroups(tiles)
    return math.prod(axis.most for axis in axes) - math.prod(a.blocks for a in axes) / count
