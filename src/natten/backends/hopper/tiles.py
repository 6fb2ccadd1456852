"""Tile shapes of the Hopper kernels, by cost: products, blocks visited, tiles, waiting.

The estimate ranks them; what :mod:`natten.tuning` remembers from measuring comes first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from ... import tuning
from ...documents import roomy
from ...neighborhood import Neighborhood, group_length
from ...tiling import padded, reach
from ..interface import Shape, Tiles
from ..triton.tiles import SHARED_MEMORY

ROWS = 64  # tokens of a warpgroup
WARPS = 4  # of a warpgroup
HEAD_DIMS = (32, 64, 128, 256)  # channels that there are kernels for
MOST = 2**31 - 1  # coordinates of TMA are 32 bits

MASK_KINDS = NONE, COMPARE, PRODUCT = 0, 1, 2

# Queries are the keys' own tokens, a part of the layout, or a part where some are finer than keys.
# Where a dilation does not divide an axis, groups differ in length; then they are a part, too.
QUERY_KINDS = OWN, PART, FINER = 0, 1, 2


def queries(rule: Neighborhood, shape: Sequence[int]) -> int:
    """Which of ``QUERY_KINDS`` the queries are."""
    if any(r > 1 for r in rule.queries_per_key):
        return FINER
    ragged = any(n % d for n, d in zip(shape, rule.dilation))
    return PART if rule.query_offset is not None or ragged else OWN


def warpgroups(tiles: Tiles) -> int:
    """How many of a program compute: one or two."""
    return tiles.num_warps // WARPS


def tile_and_block(tiles: Tiles, of_keys: bool) -> tuple[Shape, Shape]:
    """What a warpgroup holds, and what it walks over."""
    return (tiles.kv_block, tiles.q_block) if of_keys else (tiles.q_block, tiles.kv_block)


@cache
def native(channels: int) -> int:
    """Channels of the kernels that run heads of so many: zeros beside their own."""
    return next(each for each in HEAD_DIMS if each >= channels)


def has_empty_box(channels: int) -> bool:
    """Whether TMA, which loads boxes of 64 channels, finds none of a head's in one of them."""
    return native(channels) - channels >= 64


def boxes(tiles: Tiles, of_keys: bool, piece: Shape) -> Tiles:
    """What a kernel loads at once: its tiles, and pieces of its blocks."""
    return tiles._replace(q_block=piece) if of_keys else tiles._replace(kv_block=piece)


class Work(NamedTuple):
    """What a kind of kernel does with a head."""

    of_keys: bool  # tiles are of keys, blocks of queries
    tile_channels: int  # in shared memory, of a token of a tile
    block_channels: int
    out_channels: int
    acc_registers: int  # of a thread, for sums
    score_registers: float  # of a thread, per two columns of a block
    has_mask_registers: bool  # for the rows' factor of a mask by products
    product_channels: int  # multiplied per score
    column_cycles: float  # of a column's scores beside products
    block_latency: float  # cycles until a block's scores are made, if nothing else runs
    two_stage_cycles: float  # that a block waits for the next one's buffer if there are only two
    block_sizes: Shape  # columns
    smem_options: tuple[tuple[int, bool], ...]  # stages, whether outputs have their own: best first


def work(kind: str, dim: int, value_dim: int) -> Work:
    """Of a kind of kernel; gradients need equal dims. A query has 16 bytes of LSE and delta."""
    dim, value_dim = native(dim), native(value_dim)
    both = dim + value_dim
    if kind == "forward":
        # Outputs that delay no tile are worth more than a third stage.
        smem_options = [(3, True), (2, True)] + [(2, False)] * (dim == value_dim)
        return Work(
            of_keys=False,
            tile_channels=dim,
            block_channels=both,
            out_channels=value_dim,
            acc_registers=value_dim // 2,
            score_registers=1.5,
            has_mask_registers=True,
            product_channels=both,
            column_cycles=8.0,
            block_latency=1200.0,
            two_stage_cycles=0.0,
            block_sizes=(64, 32) if max(dim, value_dim) > 128 else (128, 64),
            smem_options=tuple(smem_options),
        )
    of_keys = kind == "dkdv"
    return Work(
        of_keys=of_keys,
        tile_channels=both if of_keys else both + 8,
        block_channels=both + 8 if of_keys else both,
        out_channels=both if of_keys else dim,
        acc_registers=dim if of_keys else dim // 2,
        score_registers=2.25 if of_keys else 2.5,
        has_mask_registers=not of_keys or dim < 128,
        product_channels=(4 if of_keys else 3) * dim,
        column_cycles=12.0,
        block_latency=2000.0 if of_keys else 1600.0,
        two_stage_cycles=400.0,
        block_sizes=(64,) if of_keys or dim > 64 else (128, 64),
        # A block is held while the next one's scores are made.
        smem_options=tuple(itertools.product((4, 3, 2), (True, False))),
    )


class Mask(NamedTuple):
    """How scores are masked; see the kernel's ``masks.py``."""

    kind: int = NONE
    ends: Shape = (0, 0, 0)  # of each axis's columns of a product
    by_row: bool = False
    steps: int = 1  # of 16 columns
    tables: int = 1


# The most pieces of a block, and the least tokens of a piece: shared memory has a pattern of eight
# rows.
PIECES, PIECE_ROWS = 4, 8


class Axis(NamedTuple):
    """One way to cut an axis: what a warpgroup and a block cover, summed over the axis's tiles."""

    tile: int
    block: int
    tiles: int
    blocks: int  # with partners, of all warpgroups if the axis is split, else of one
    fetched: int  # as ``blocks``, with those that a warpgroup hands back unread
    most: int  # blocks of one tile
    masked: bool
    fits: bool = True  # else a tile's blocks cross both ends of a ring, and pieces meet at one


def _cut(
    first: torch.Tensor,
    last: torch.Tensor,
    count: int,
    tile: int,
    block: int,
    groups: int,
    ring: int | None,
    piece: int,
) -> Axis:
    """Cut an axis, whose tokens have partners ``first .. last``, into ``count`` tiles.

    Args:
        groups: warpgroups a tile. Each has a block, also where its tokens have no partners.
        ring: positions of a circular axis. Where a tile's partners cross its seam, two pieces of
            blocks meet.
        piece: positions of a piece of a block.
    """
    if len(first) == 0:
        first = last = torch.zeros(1, dtype=torch.int64, device="cpu")
    end = len(first) - 1
    begin = torch.arange(count, device="cpu") * (tile * groups)
    low, high = first[begin.clamp(max=end)], last[(begin + tile * groups - 1).clamp(max=end)]
    blocks, masked, fits = 0, False, True
    if ring is not None:
        before, after = low < 0, high > ring
        seam = torch.where(before, 0, ring)
        low = torch.where(before | after, seam + (low - seam) // piece * piece, low)
        # Also where blocks cross the first seam only because they begin earlier.
        fits = ring % piece == 0 or not bool(((low < 0) & after).any())
    for warpgroup in range(groups):
        head = (begin + warpgroup * tile).clamp(max=end)
        tail = (begin + warpgroup * tile + tile - 1).clamp(max=end)
        before, after = first[head] - low, last[tail] - low
        blocks += int((-(-after // block) - before // block).clamp(min=1).sum())
        masked |= bool((first[tail] > first[head]).any() or (last[tail] > last[head]).any())
        masked |= bool((before % block).any() or (after % block).any())
    fetched = (-((low - high) // block)).clamp(min=1)
    total = int(fetched.sum()) * groups
    return Axis(tile, block, count, blocks, total, int(fetched.max()), masked, fits)


class _Cuts:
    """The axes of a problem, cut for given tiles; what is counted is of ``groups`` sets of them.

    Where queries are the keys' own tokens, all dilation groups are alike, and one is cut. Otherwise
    an axis counts its tiles in all of its dilation groups.
    """

    def __init__(self, of_keys: bool, rule: Neighborhood, shape: Shape, key_shape: Shape) -> None:
        self.of_keys, self.missing = of_keys, 3 - len(shape)
        self.q_lengths, self.kv_lengths = (
            [group_length(n, d, 0) for n, d in zip(each, rule.dilation)]
            for each in (shape, key_shape)
        )
        own = queries(rule, shape) == OWN
        self.groups = math.prod(rule.dilation) if own else 1
        self.rings = [
            n if boundary == "circular" else None
            for n, boundary in zip(self.kv_lengths, rule.boundary)
        ]
        self.partners = [
            [
                reach(rule, axis, length, key_length, group, of_keys)
                for group in range(1 if own else rule.dilation[axis])
            ]
            for axis, (length, key_length) in enumerate(zip(shape, key_shape))
        ]
        self.has_rings = any(ring is not None for ring in self.rings)
        self.axis, self.sizes = cache(self._axis), cache(self._sizes)

    def _axis(self, axis: int, tile: int, block: int, groups: int, piece: int) -> Axis:
        if axis < self.missing:
            return Axis(1, 1, 1, 1, 1, 1, False)
        lengths = self.kv_lengths if self.of_keys else self.q_lengths
        axis -= self.missing
        count, ring = -(-lengths[axis] // (tile * groups)), self.rings[axis]
        cuts = [
            _cut(*each, count, tile, block, groups, ring, piece) for each in self.partners[axis]
        ]
        _, _, tiles, blocks, fetched, most, masked, fits = zip(*cuts)
        return Axis(
            tile, block, sum(tiles), sum(blocks), sum(fetched), max(most), any(masked), all(fits)
        )  # fmt: skip

    def __call__(self, tiles: Tiles) -> tuple[Axis, ...]:
        tile, block = tile_and_block(tiles, self.of_keys)
        groups = self._groups(tiles)
        return tuple(map(self.axis, range(3), tile, block, groups, self.piece(tiles)))

    @staticmethod
    def _groups(tiles: Tiles) -> list[int]:
        """Warpgroups along each axis."""
        return [warpgroups(tiles) if axis == tiles.split_axis else 1 for axis in range(3)]

    def piece(self, tiles: Tiles) -> Shape:
        """What of a block is fetched at once: on rings perhaps a piece, so that blocks begin only
        little before a tile's first partner where pieces have to meet at the seam."""
        tile, block = tile_and_block(tiles, self.of_keys)
        if not self.has_rings:
            return block
        volume, best, found = math.prod(block), math.inf, block
        least = max(PIECE_ROWS, volume // PIECES)
        sizes = map(self.sizes, range(3), tile, block, self._groups(tiles))
        for choice in itertools.product(*sizes):
            (a, b, c), blocks = zip(*choice)
            tokens = a * b * c
            cost = math.prod(blocks) * in_pieces(volume // tokens)
            if tokens >= least and cost < best:
                best, found = cost, (a, b, c)
        return found

    def _sizes(self, axis: int, tile: int, block: int, groups: int) -> list[tuple[int, float]]:
        """Sizes along an axis that a piece of a block may have, and the blocks of all tiles; no
        size that a larger one equals."""
        if axis < self.missing or self.rings[axis - self.missing] is None:
            return [(block, self.axis(axis, tile, block, groups, block).blocks)]
        found: dict[float, int] = {}
        for i in range(block.bit_length()):
            cut = self.axis(axis, tile, block, groups, block >> i)
            found.setdefault(cut.blocks if cut.fits else math.inf, block >> i)
        return [(size, blocks) for blocks, size in found.items()]


@lru_cache(maxsize=64)
def _cuts(kind: str, rule: Neighborhood, shape: Shape, key_shape: Shape) -> _Cuts:
    return _Cuts(kind == "dkdv", rule, shape, key_shape)


@lru_cache(maxsize=1024)
def _model(rule: Neighborhood, shape: Shape, key_shape: Shape) -> tuple[Neighborhood, Shape, Shape]:
    """The problem for which tiles are chosen, which stands for many parts of a layout.

    It is one dilation group with the part in its middle, so that offsets do not matter. Lengths are
    rounded up, and keys that no window of the part's middle reaches are left out. So a new offset
    or a longer cache of keys has the same tiles, and the same compiled kernels.
    """
    if queries(rule, shape) == OWN:
        return rule, shape, key_shape
    shape, key_shape = zip(*model_sizes(rule, shape, key_shape))
    offset = []
    for count, n, s, r in zip(shape, key_shape, rule.stride, rule.queries_per_key):
        offset.append((r * n - count) // 2 // (r * s) * (r * s))
    own = replace(rule, dilation=(1,) * rule.rank, query_offset=tuple(offset))
    return own, shape, key_shape


def model_sizes(rule: Neighborhood, shape: Shape, key_shape: Shape) -> tuple[Shape, ...]:
    """Per axis, queries and keys of the problem for which the tiles of a part are chosen."""
    found = []
    for k, d, r, length, key_length in zip(
        rule.kernel_size, rule.dilation, rule.queries_per_key, shape, key_shape
    ):
        count, most = _count_and_most(-(-length // d), k, r)
        n = -(-key_length // d)
        n = roomy(n) if n < most else most
        found.append((min(count, r * n), n))
    return tuple(found)


@lru_cache(maxsize=1024)
def _count_and_most(count: int, k: int, r: int) -> tuple[int, int]:
    """Queries of an axis, rounded up, and the most keys that matter to their tiles."""
    count = roomy(count)
    return count, roomy(-(-count // r) + k)


def mask_of(sliding: bool, axes: Sequence[Axis], tiles: Tiles, work: Work) -> Mask:
    """How three axes are masked; ``sliding``: every token of the last has a window of its own."""
    if not any(axis.masked for axis in axes):
        return Mask()
    # The windows of a tile's queries start in as many places, at the same distances everywhere.
    by_row = sliding and axes[2].masked and axes[2].tile < axes[2].block
    by_row &= tiles.split_axis != 2 or warpgroups(tiles) == 1
    widths = [axis.block if axis.masked else 0 for axis in axes]
    if by_row:
        widths[2] = axes[2].tile
    tables = axes[2].most if by_row else 1
    if sum(widths) > 32 or tables > 8 or not work.has_mask_registers:
        return Mask(COMPARE)
    ends = tuple(itertools.accumulate(widths))
    return Mask(PRODUCT, ends, by_row, 1 if sum(widths) <= 16 else 2, tables)


def slides(kind: str, rule: Neighborhood) -> bool:
    """Whether partners along the last axis are a window that moves from token to token, never
    shrinks, and begins in the first block of its tile."""
    moves = rule.stride[-1] == 1 and not rule.is_causal[-1]
    return kind != "dkdv" and moves and rule.boundary[-1] == "shift"


def mask(kind: str, rule: Neighborhood, shape: Shape, tiles: Tiles, work: Work) -> Mask:
    """How tiles are masked."""
    if queries(rule, shape) == OWN:
        axes = _cuts(kind, rule, shape, shape)(tiles)
    else:
        axes = _any_axes(kind, rule, tiles)
    return mask_of(slides(kind, rule), axes, tiles, work)


def piece(kind: str, rule: Neighborhood, shape: Shape, tiles: Tiles) -> Shape:
    """What of a block is fetched at once."""
    if "circular" in rule.boundary:
        return _cuts(kind, rule, shape, shape).piece(tiles)
    return tile_and_block(tiles, kind == "dkdv")[1]


def _any_axes(kind: str, rule: Neighborhood, tiles: Tiles) -> tuple[Axis, ...]:
    """Of axes that are cut, what decides masks, for parts of every offset and length."""
    of_keys, missing = kind == "dkdv", 3 - rule.rank
    axes = [Axis(1, 1, 1, 1, 1, 1, False)] * missing
    sizes = list(zip(*tile_and_block(tiles, of_keys)))[missing:]
    for (tile, block), k, r in zip(sizes, rule.kernel_size, rule.queries_per_key):
        positions = -(-(tile - 1) // r) + 1  # of keys, where a warpgroup's queries stand
        axes.append(Axis(tile, block, 1, 1, 1, -(-(positions + k - 1) // block), True))
    return tuple(axes)


def _columns(tiles: Tiles, work: Work) -> int:
    """Tokens of a block."""
    return math.prod(tile_and_block(tiles, work.of_keys)[1])


def shared_bytes(tiles: Tiles, mask: Mask, work: Work, own_out: bool) -> int:
    """Bytes of shared memory of a multiprocessor's programs; 2 kB each for barriers and Triton."""
    columns = _columns(tiles, work)
    rows = warpgroups(tiles) * ROWS * (work.tile_channels + work.out_channels * own_out)
    blocks = tiles.num_stages * columns * work.block_channels
    tables = mask.tables * columns * 16 * mask.steps * (mask.kind == PRODUCT)
    return tiles.resident_programs * (2 * (rows + blocks + tables) + 2048)


def own_out(tiles: Tiles, mask: Mask, work: Work) -> bool:
    """Whether outputs have shared memory of their own, or take the tile's."""
    fits = shared_bytes(tiles, mask, work, True) <= SHARED_MEMORY[90]
    return fits or (tiles.num_stages, False) not in work.smem_options


def registers(tiles: Tiles, work: Work) -> tuple[int, int, int]:
    """Of a thread: when a program starts, of warpgroups that compute, and of warps that fetch."""
    groups, programs = warpgroups(tiles), tiles.resident_programs
    fetch = 40 if programs == 1 and work.has_mask_registers else 24
    # What the fetching warpgroup leaves (two of its warps are idle) goes to the others.
    start = 65536 // programs // (128 * groups + 128) // 8 * 8
    return start, (start * (groups + 1) - fetch) // groups // 8 * 8, fetch


def _has_registers(tiles: Tiles, work: Work) -> bool:
    """Whether sums and scores fit; a product alone must fit what a program starts with."""
    start, most, _ = registers(tiles, work)
    acc, scores = work.acc_registers, _columns(tiles, work) // 2
    return max(acc, scores) + 30 <= start and acc + scores * work.score_registers + 40 <= most


# Cycles of a multiprocessor: of a block and of a tile, beside products and waiting; and until the
# first block of a tile is there, if nothing else runs.
_BLOCK_CYCLES, _TILE_CYCLES, _TILE_LATENCY = 100.0, 500.0, 3000.0
# What a block costs that a warpgroup hands back, of one that it computes: the other works alone.
IDLE = 0.15


def cycles(tiles: Tiles, mask: Mask, work: Work) -> tuple[float, float]:
    """Cycles of a multiprocessor that a block costs, and a warpgroup's tile beside its blocks."""
    columns = _columns(tiles, work)
    # While one waits, others compute; warpgroups of one program wait for the same blocks.
    at_once = tiles.resident_programs * (1 if warpgroups(tiles) == 1 else 1.5)
    channels = work.product_channels + 16 * mask.steps * (mask.kind == PRODUCT)
    per_column = work.column_cycles * (1.3 if mask.kind == COMPARE else 1)
    block = columns * channels / 32 + columns * per_column + _BLOCK_CYCLES
    block += work.block_latency / at_once + work.two_stage_cycles * (tiles.num_stages == 2)
    return block, _TILE_CYCLES + _TILE_LATENCY / at_once


def in_pieces(pieces: int) -> float:
    """What a block in so many pieces costs, of one that is fetched at once."""
    return 1 + 0.02 * (pieces - 1)


def _cost(axes: tuple[Axis, ...], tiles: Tiles, mask: Mask, work: Work, piece: Shape) -> float:
    """Cycles of a multiprocessor per batch entry, head and dilation group."""
    per_block, per_tile = cycles(tiles, mask, work)
    per_block *= in_pieces(_columns(tiles, work) // math.prod(piece))
    count = math.prod(axis.tiles for axis in axes)
    blocks, fetched = (math.prod(each) for each in zip(*((a.blocks, a.fetched) for a in axes)))
    waited = IDLE * (fetched - blocks)
    return (blocks + waited) * per_block + count * warpgroups(tiles) * per_tile


def key(
    kind: str,
    rule: Neighborhood,
    shape: Shape,
    key_shape: Shape,
    dim: int,
    value_dim: int,
    itemsize: int,
) -> str:
    """The name of a problem in :mod:`natten.tuning`."""
    rule, shape, key_shape = _model(rule, shape, key_shape)
    layouts = (shape,) if shape == key_shape else (shape, key_shape)
    sizes = "-".join("x".join(map(str, each)) for each in layouts)
    return f"hopper-{kind}-{sizes}-{rule}-{native(dim)}-{native(value_dim)}"


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
        kind: of kernel, one of ``interface.KINDS``.
    """
    model = _model(rule, shape, key_shape)
    return _choose(kind, *model, native(dim), native(value_dim), itemsize)


@tuning.cached
def _choose(*problem: Any) -> Tiles:
    return tuning.choose(key(*problem), candidates(*problem))


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
    return _candidates(kind, *_model(rule, shape, key_shape), native(dim), native(value_dim))


@lru_cache(maxsize=64)
def _candidates(
    kind: str, rule: Neighborhood, shape: Shape, key_shape: Shape, dim: int, value_dim: int
) -> list[Tiles]:
    cuts, needs = _cuts(kind, rule, shape, key_shape), work(kind, dim, value_dim)
    costs: dict[Tiles, float] = {}
    kv_lengths = None if queries(rule, shape) == OWN else cuts.kv_lengths
    for tiles in cuttings(cuts.q_lengths, needs, kv_lengths):
        axes, found = cuts(tiles), mask(kind, rule, shape, tiles, needs)
        fitting = fitted(tiles, found, needs)
        if fitting is not None and all(axis.fits for axis in axes):
            costs[fitting] = _cost(axes, fitting, found, needs, cuts.piece(tiles))
    return sorted(costs, key=costs.__getitem__)


def cuttings(
    q_lengths: Sequence[int], work: Work, kv_lengths: Sequence[int] | None = None
) -> list[Tiles]:
    """Tiles that fit the registers, to be :func:`fitted`; of equal cost, the first is better.

    Args:
        q_lengths: queries of a dilation group, per axis.
        work: of the kernel.
        kv_lengths: keys of a dilation group, of a part of a layout.
    """
    of_keys, shapes = work.of_keys, _shapes if kv_lengths is None else _shapes_of_part
    of_tile, of_block = q_lengths, kv_lengths or q_lengths
    if of_keys:
        of_tile, of_block = of_block, of_tile
    blocks = [shape for columns in work.block_sizes for shape in shapes(columns, of_block)]
    fitting = []
    for tile in sorted(shapes(ROWS, of_tile), key=max):
        for block in blocks:
            queries, keys = (block, tile) if of_keys else (tile, block)
            every = (Tiles(queries, keys, *how) for how in _programs(len(q_lengths)))
            fitting += [tiles for tiles in every if _has_registers(tiles, work)]
    return fitting


def fitted(tiles: Tiles, mask: Mask, work: Work) -> Tiles | None:
    """The tiles with the stages that fit the shared memory, or None if not even two do."""
    for stages, own in work.smem_options:
        tiles = tiles._replace(num_stages=stages)
        if shared_bytes(tiles, mask, work, own) <= SHARED_MEMORY[90]:
            return tiles
    return None


def _programs(rank: int) -> list[tuple[int, int, int, int]]:
    """Warps, stages, axis of the split, programs of a multiprocessor: two warpgroups that share
    blocks, or one alone."""
    pairs = [(2 * WARPS, 2, axis, 1) for axis in range(3 - rank, 3)]
    return pairs + [(WARPS, 2, 3 - rank, programs) for programs in (2, 3, 4)]


def _shapes(volume: int, lengths: Sequence[int]) -> list[Shape]:
    """Three-axis powers of two of a volume, none twice its axis; if there is none, a row."""
    powers = [1 << i for i in range(volume.bit_length())]
    sizes = [[p for p in powers if p == 1 or p < 2 * n] for n in padded(lengths, 1)]
    fitting = [s for s in itertools.product(*sizes) if math.prod(s) == volume]
    return fitting or [(1, 1, volume)]


def _shapes_of_part(volume: int, lengths: Sequence[int]) -> list[Shape]:
    """As :func:`_shapes`; if there is none, all axes may be exceeded, as little as need be."""
    while math.prod(1 << (2 * n - 1).bit_length() - 1 for n in lengths) < volume:
        lengths = [2 * n for n in lengths]
    return _shapes(volume, lengths)


def computed_pairs(
    kind: str, rule: Neighborhood, shape: Shape, key_shape: Shape, tiles: Tiles
) -> int:
    """Query-key pairs that a kernel computes per batch entry and head, wasted ones included."""
    cuts = _cuts(kind, rule, shape, key_shape)
    blocks = math.prod(axis.blocks for axis in cuts(tiles)) * cuts.groups
    return blocks * math.prod(tiles.q_block + tiles.kv_block)


def excess(kind: str, rule: Neighborhood, shape: Shape, key_shape: Shape, tiles: Tiles) -> float:
    """How many blocks more than usual the tile has that has most."""
    axes = _cuts(kind, *_model(rule, shape, key_shape))(tiles)
    count = math.prod(axis.tiles for axis in axes) * warpgroups(tiles)
    return math.prod(axis.most for axis in axes) - math.prod(a.blocks for a in axes) / count
