"""How axes are cut into tiles and blocks: how many there are, and what they cover.

Axes are cut independently of each other, so what is counted along them multiplies. Most tiles of an
axis look alike, and are counted once.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from operator import sub
from typing import NamedTuple

from ...neighborhood import Dense, Rule, group_length
from ...tiling import reach
from ..interface import Shape, Tiles
from ..triton.tiles import visited_by

WARPS = 4  # of a warpgroup

# Queries are the keys' own tokens, a part of the layout, or a part where some are finer than keys.
# Where a dilation does not divide an axis, groups differ in length; then they are a part, too. So
# are those of plain attention, which have a length of their own.
QUERY_KINDS = OWN, PART, FINER = 0, 1, 2

# What a block costs that a warpgroup hands back, of one that it computes: the other works alone.
IDLE = 0.15

# The least tokens of a piece of a block: shared memory has a pattern of eight rows.
PIECE_ROWS = 8


def queries(rule: Rule, shape: Sequence[int]) -> int:
    """Which of ``QUERY_KINDS`` the queries are."""
    if isinstance(rule, Dense):
        return PART
    if any(r > 1 for r in rule.queries_per_key):
        return FINER
    ragged = any(n % d for n, d in zip(shape, rule.dilation))
    return PART if rule.query_offset is not None or ragged else OWN


def rows_held(shape: Sequence[int]) -> int:
    """Rows of a matrix that holds a tile or a block, as kernels have them: a power of two."""
    return 1 << (math.prod(shape) - 1).bit_length()


def warpgroups(tiles: Tiles) -> int:
    """How many of a program compute: one or two."""
    return tiles.num_warps // WARPS


def tile_and_block(tiles: Tiles, of_keys: bool) -> tuple[Shape, Shape]:
    """What a warpgroup holds, and what it walks over."""
    return (tiles.kv_block, tiles.q_block) if of_keys else (tiles.q_block, tiles.kv_block)


def tile_sizes(tiles: Tiles, of_keys: bool) -> Shape:
    """Per axis, what a program's warpgroups hold together."""
    tile, _ = tile_and_block(tiles, of_keys)
    groups = warpgroups(tiles)
    return tuple(n * groups if axis == tiles.split_axis else n for axis, n in enumerate(tile))


def tiled(
    rule: Rule, shape: Sequence[int], key_shape: Sequence[int], of_keys: bool
) -> list[tuple[int, int]]:
    """Per axis, between which positions of a dilation group there are tiles: all queries are in
    one, and of keys those that some query attends."""
    if of_keys:
        return [rule.attended(axis, *each) for axis, each in enumerate(zip(shape, key_shape))]
    return [(0, group_length(n, d, 0)) for n, d in zip(shape, rule.dilation)]


# What a further piece of a block costs, or a row of packed documents, of a block that is fetched at
# once; and as how many tokens are computed while a piece is fetched (hopper-log.md).
_PIECE_COST, _ROW_COST, _PIECE_TOKENS = 0.03, 0.02, 13


def _in_pieces(tokens: int, piece: Shape) -> float:
    """What a block of so many tokens costs in pieces. One warp fetches them one after another,
    which may take longer than to compute the block."""
    count = tokens // math.prod(piece)
    return max(1 + _PIECE_COST * (count - 1), count * _PIECE_TOKENS / tokens)


class Pieces(NamedTuple):
    """What of a block is fetched at once."""

    piece: Shape
    at_seam: Shape  # of a block that goes on at the other end of a ring; it divides the piece
    cost: float  # of a block, on average, if one that is fetched at once costs 1


def in_rows(tiles: Tiles, of_keys: bool) -> Pieces:
    """Rows of a block, as packed documents are fetched."""
    _, (planes, rows, size) = tile_and_block(tiles, of_keys)
    row = 1, 1, size
    return Pieces(row, row, 1 + _ROW_COST * (planes * rows - 1))


def _largest(block: Shape, small: Shape) -> Shape:
    """The largest piece of a block in which the tokens of small ones follow one another."""
    found = block
    for axis in range(2):
        if small[axis] > 1:
            found = (*block[: axis + 1], *small[axis + 1 :])
            break
    return found


class Axis(NamedTuple):
    """One way to cut an axis: what a warpgroup and a block cover, summed over the axis's tiles."""

    tile: int
    block: int
    tiles: int
    blocks: int  # with partners, of all warpgroups if the axis is split, else of one
    full: int  # as ``blocks``, those that all of a warpgroup's tokens have as partners
    fetched: int  # as ``blocks``, with those that a warpgroup hands back unread
    most: int  # blocks of one tile
    masked: bool
    fits: bool = True  # else a tile's blocks cross both ends of a ring, and pieces meet at one


MISSING = Axis(1, 1, 1, 1, 1, 1, 1, False)  # an axis that a layout does not have


class _Alike(NamedTuple):
    """Tiles of one size along an axis; those that look alike are counted."""

    # By what a tile looks like: where it is before the seam of a ring that its partners cross, None
    # if they cross none; then of each warpgroup first and one-past-last partner of any token, and
    # of all tokens, from the tile's first partner on.
    counts: dict[tuple[int | None, tuple[tuple[int, int, int, int], ...]], int]
    slides: bool  # tokens of a warpgroup differ in their partners
    # Of tiles that cross the end of a ring: the first partner, and that before the seam.
    at_end: list[tuple[int, int]]


class Visits(dict[int, float]):
    """Along an axis, how many blocks of each size tiles visit at least, with what those cost that a
    warpgroup hands back unread. Blocks of a size are counted when they are first asked for.

    Args:
        tiles: how many there are, of all warpgroups.
        count: counts the blocks of a size.
    """

    def __init__(self, tiles: int, count: Callable[[int], float]) -> None:
        self.tiles, self._count = tiles, count

    def __missing__(self, size: int) -> float:
        found = self[size] = self._count(size)
        return found


_NO_VISITS = Visits(1, lambda size: 1)  # along an axis that a layout does not have


class AxisCuts:
    """An axis of a problem, whose tokens have partners ``first .. last`` in each of its groups.

    What is kept are few objects: many would have Python look for garbage in the middle of a call.

    Args:
        span: between which tokens of a group there are tiles.
        partners: of each group.
        ring: positions of a circular axis. Where a tile's partners cross its seam, two pieces of
            blocks meet.
    """

    def __init__(
        self, span: tuple[int, int], partners: Iterable[tuple[list[int], list[int]]],
        ring: int | None,
    ) -> None:  # fmt: skip
        self.span, self.ring = span, ring
        self.partners = [each if each[0] else ([0], [0]) for each in partners]
        self._alike: dict[tuple[int, int], _Alike] = {}
        self._cuts: dict[tuple[int, int, int, int], Axis] = {}
        self._visits: dict[tuple[int, int], Visits] = {}

    def cut(self, tile: int, block: int, groups: int, piece: int) -> Axis:
        """Cut into tiles of ``groups`` warpgroups, each of ``tile`` tokens, and into blocks.

        Args:
            groups: each has a block, also where its tokens have no partners.
            piece: positions of a piece of a block.
        """
        found = self._cuts.get((tile, block, groups, piece))
        if found is None:
            found = self._cut(tile, block, groups, piece)
            self._cuts[tile, block, groups, piece] = found
        return found

    def tiles(self, tile: int, groups: int) -> int:
        """How many tiles there are."""
        return len(self.partners) * len(self._numbers(tile * groups))

    def blocks_of_tiles(self, tile: int, block: int, groups: int) -> list[float]:
        """About how many blocks a warpgroup of each tile has, with what those cost that it hands
        back unread; of all dilation groups, one after another."""
        found = []
        for first, last in self.partners:
            most = len(first) - 1
            for number in self._numbers(tile * groups):
                begins = range(number * tile * groups, (number + 1) * tile * groups, tile)
                origin = first[begins[0]]
                own = 0
                for begin in begins:
                    end = -(-(last[min(begin + tile - 1, most)] - origin) // block)
                    own += max(end - (first[min(begin, most)] - origin) // block, 1)
                fetched = max(end, 1) * groups
                found.append((own + IDLE * (fetched - own)) / groups)
        return found

    def _numbers(self, size: int) -> range:
        """The numbers of a group's tiles of that size, counted from the group's first token."""
        first, end = self.span
        return range(first // size, -(-end // size))

    def visits(self, tile: int, groups: int) -> Visits:
        """The blocks that tiles of ``groups`` warpgroups visit at least: those that they do visit,
        unless the axis is a ring. They are counted faster than an axis is :meth:`cut`."""
        found = self._visits.get((tile, groups))
        if found is None:
            # On a ring, where blocks of a pair begin earlier, one of its warpgroups may have fewer.
            in_pairs = groups == 2 and self.ring is None
            count = self._count_pairs(tile) if in_pairs else self._count_tiles(tile)
            found = Visits(self.tiles(tile, groups) * groups, count)
            self._visits[tile, groups] = found
        return found

    def _count_tiles(self, tile: int) -> Callable[[int], float]:
        spans: Counter[int] = Counter()  # with what tiles have that have no partners: one block
        for begin, end in self._bounds(tile, 1):
            spans.update(map(max, map(sub, end, begin), itertools.repeat(1)))
        return partial(visited_by, spans)

    def _count_pairs(self, tile: int) -> Callable[[int], float]:
        pairs: Counter[tuple[int, ...]] = Counter()
        for begin, end in self._bounds(tile, 2):
            bounds = end[::2], begin[1::2], end[1::2]
            pairs.update(zip(*(map(sub, each, begin[::2]) for each in bounds)))
        return partial(_visited_by_pairs, pairs)

    def _bounds(self, tile: int, groups: int) -> Iterator[tuple[list[int], list[int]]]:
        """Of each dilation group, first and one-past-last partners of all warpgroups."""
        numbers = self._numbers(tile * groups)
        at, count = numbers.start * tile * groups, len(numbers) * groups
        for first, last in self.partners:
            yield _strided(first, at, tile, count), _strided(last, at + tile - 1, tile, count)

    def sizes(self, tile: int, block: int, groups: int) -> list[tuple[int, float, float]]:
        """Sizes that a piece of a block at the seam may have, the blocks of all tiles, and which
        part of them is at the seam; no size that a larger one equals."""
        if self.ring is None:
            return [(block, self.cut(tile, block, groups, block).blocks, 0.0)]
        found: dict[float, int] = {}
        for i in range(block.bit_length()):
            cut = self.cut(tile, block, groups, block >> i)
            found.setdefault(cut.blocks if cut.fits else math.inf, block >> i)
        counts = self._look(tile, groups).counts
        crossing = groups * sum(count for (seam, _), count in counts.items() if seam is not None)
        return [(size, blocks, min(crossing / blocks, 1.0)) for blocks, size in found.items()]

    def _cut(self, tile: int, block: int, groups: int, piece: int) -> Axis:
        counts, masked, at_end = self._look(tile, groups)
        blocks = full = fetched = most = 0
        for (seam, bounds), count in counts.items():
            earlier = 0 if seam is None else seam % piece
            end = earlier
            for before, after, all_before, all_after in bounds:
                before, end = before + earlier, after + earlier
                blocks += count * max(-(-end // block) - before // block, 1)
                first_full = -(-(all_before + earlier) // block)
                full += count * max((all_after + earlier) // block - first_full, 0)
                masked = masked or before % block > 0 or end % block > 0
            of_tile = max(-(-end // block), 1)
            fetched += count * of_tile * groups
            most = max(most, of_tile)
        # Blocks may cross the first seam, too, because they begin earlier.
        fits = self.ring is None or self.ring % piece == 0
        fits = fits or all(first >= seam % piece for first, seam in at_end)
        tiles = self.tiles(tile, groups)
        return Axis(tile, block, tiles, blocks, full, fetched, most, masked, fits)

    def _look(self, tile: int, groups: int) -> _Alike:
        found = self._alike.get((tile, groups))
        if found is None:
            found = self._alike[tile, groups] = self._looked(tile, groups)
        return found

    def _looked(self, tile: int, groups: int) -> _Alike:
        counts: Counter[tuple[int | None, tuple[tuple[int, int, int, int], ...]]] = Counter()
        slides, at_end = False, []
        numbers = self._numbers(tile * groups)
        at, of_axis = numbers.start * tile * groups, len(numbers) * groups
        tail = at + tile - 1
        for first, last in self.partners:
            begin, end = _strided(first, at, tile, of_axis), _strided(last, tail, tile, of_axis)
            all_begin = _strided(first, tail, tile, of_axis)
            all_end = _strided(last, at, tile, of_axis)
            slides = slides or begin != all_begin or end != all_end
            low, high = begin[::groups], end[groups - 1 :: groups]
            seams: Iterable[int | None] = itertools.repeat(None)
            if self.ring is not None:
                seams = [_before_seam(*each, self.ring) for each in zip(low, high)]
                pairs = zip(low, high, seams)
                at_end += [(a, s) for a, b, s in pairs if s is not None and b > self.ring]
            every = begin, end, all_begin, all_end
            bounds = [
                zip(*(map(sub, each[i::groups], low) for each in every)) for i in range(groups)
            ]
            counts.update(zip(seams, zip(*bounds)))
        return _Alike(counts, slides, at_end)


def _visited_by_pairs(pairs: Counter[tuple[int, ...]], size: int) -> float:
    """As :class:`Visits`. Of a pair of warpgroups, partners of the first one end at some distance
    from where they begin, and those of the other begin and end at some."""
    visited = 0.0
    for (first_end, begin, end), count in pairs.items():
        of_pair = -(-end // size)
        own = max(-(-first_end // size), 1) + max(of_pair - begin // size, 1)
        visited += count * (own + IDLE * (2 * max(of_pair, 1) - own))
    return visited


def _strided(values: list[int], start: int, step: int, count: int) -> list[int]:
    """``count`` values, ``step`` apart; past the end, the last one."""
    found = values[start::step][:count]
    return found + values[-1:] * (count - len(found))


def _before_seam(low: int, high: int, ring: int) -> int | None:
    """Where the partners ``low .. high`` begin, relative to the seam that they cross."""
    if low < 0:
        return low
    return low - ring if high > ring else None


@lru_cache(maxsize=256)
def _axis_cuts(rule: Rule, length: int, key_length: int, groups: int, of_keys: bool) -> AxisCuts:
    """Of a rule of one axis, of which so many dilation groups are cut."""
    (d,) = rule.dilation
    partners = (reach(rule, 0, length, key_length, group, of_keys) for group in range(groups))
    ring = group_length(key_length, d, 0) if rule.boundary == ("circular",) else None
    (span,) = tiled(rule, (length,), (key_length,), of_keys)
    return AxisCuts(span, [(a.tolist(), b.tolist()) for a, b in partners], ring)


class Cuts:
    """The axes of a problem, cut for given tiles; what is counted is of ``groups`` sets of them.

    Where queries are the keys' own tokens, all dilation groups are alike, and one is cut. Otherwise
    an axis counts its tiles in all of its dilation groups.
    """

    def __init__(self, of_keys: bool, rule: Rule, shape: Shape, key_shape: Shape) -> None:
        self.of_keys, self.missing = of_keys, 3 - len(shape)
        self.q_lengths, self.kv_lengths = (
            [group_length(n, d, 0) for n, d in zip(each, rule.dilation)]
            for each in (shape, key_shape)
        )
        own = queries(rule, shape) == OWN
        self.groups = math.prod(rule.dilation) if own else 1
        self.axes = [
            _axis_cuts(rule.of_axis(axis), *lengths, 1 if own else rule.dilation[axis], of_keys)
            for axis, lengths in enumerate(zip(shape, key_shape))
        ]
        self.has_rings = "circular" in rule.boundary

    def visits(self, tile: Shape) -> list[Visits]:
        """What tiles of a single warpgroup visit at least along three axes."""
        own = [axis.visits(size, 1) for axis, size in zip(self.axes, tile[self.missing :])]
        return [_NO_VISITS] * self.missing + own

    def visits_of_pairs(self, axis: int, tile: int) -> Visits:
        """What tiles visit at least along one of three axes, which pairs of warpgroups split."""
        return self.axes[axis - self.missing].visits(tile, 2)

    def blocks_of_tiles(self, tiles: Tiles) -> list[list[float]]:
        """Per axis, about how many blocks each tile of a program has, in the order of programs."""
        sizes = list(zip(*tile_and_block(tiles, self.of_keys), self._groups(tiles)))
        found = [
            axis.blocks_of_tiles(*each) for axis, each in zip(self.axes, sizes[self.missing :])
        ]
        # Of keys that are a row, those that take long come first (``lpt_order``).
        return [sorted(found[0], reverse=True)] if self.of_keys and len(found) == 1 else found

    def __call__(self, tiles: Tiles) -> tuple[Axis, ...]:
        return self.in_pieces(tiles, self.pieces(tiles).at_seam)

    def in_pieces(self, tiles: Tiles, at_seam: Shape) -> tuple[Axis, ...]:
        """Cut three axes, with blocks in such pieces at the seam of a ring."""
        tile, block = tile_and_block(tiles, self.of_keys)
        sizes = list(zip(tile, block, self._groups(tiles), at_seam))[self.missing :]
        cut = [axis.cut(*each) for axis, each in zip(self.axes, sizes)]
        return (*[MISSING] * self.missing, *cut)

    @staticmethod
    def _groups(tiles: Tiles) -> list[int]:
        """Warpgroups along each axis."""
        groups = [1, 1, 1]
        groups[tiles.split_axis] = warpgroups(tiles)
        return groups

    def pieces(self, tiles: Tiles) -> Pieces:
        """What of a block is fetched at once: on rings perhaps pieces, so that blocks begin only
        little before a tile's first partner where pieces have to meet at the seam."""
        tile, block = tile_and_block(tiles, self.of_keys)
        if not self.has_rings:
            return Pieces(block, block, 1.0)
        volume, found, lowest = math.prod(block), Pieces(block, block, 1.0), math.inf
        sizes = map(self._sizes, range(3), tile, block, self._groups(tiles))
        for choice in itertools.product(*sizes):
            (a, b, c), blocks, crossing = zip(*choice)
            small = a, b, c
            piece = _largest(block, small)
            split = zip(crossing, small, piece)
            usual = math.prod(1 - part for part, size, whole in split if size < whole)
            cost = usual * _in_pieces(volume, piece) + (1 - usual) * _in_pieces(volume, small)
            if math.prod(small) >= PIECE_ROWS and math.prod(blocks) * cost < lowest:
                lowest, found = math.prod(blocks) * cost, Pieces(piece, small, cost)
        return found

    def _sizes(
        self, axis: int, tile: int, block: int, groups: int
    ) -> list[tuple[int, float, float]]:
        if axis < self.missing:
            return [(block, 1, 0.0)]
        return self.axes[axis - self.missing].sizes(tile, block, groups)


@lru_cache(maxsize=64)
def cuts(of_keys: bool, rule: Rule, shape: Shape, key_shape: Shape) -> Cuts:
    """The :class:`Cuts` of a problem, with tiles of queries or ``of_keys``."""
    return Cuts(of_keys, rule, shape, key_shape)
