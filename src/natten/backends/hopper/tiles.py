"""Tile shapes of the Hopper kernels, by cost: products, blocks visited, tiles, waiting.

The estimate ranks them; what :mod:`natten.tuning` remembers from measuring comes first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

from ... import tuning
from ...documents import roomy, roomy_layout
from ...neighborhood import Dense, Neighborhood, Rule
from ...tiling import padded
from ..interface import Shape, Tiles
from ..triton.tiles import SHARED_MEMORY, usual
from .cuts import (
    IDLE,
    MISSING,
    OWN,
    PIECE_ROWS,
    WARPS,
    Axis,
    Pieces,
    cuts,
    in_rows,
    queries,
    rows_held,
    tile_and_block,
    warpgroups,
)
from .flat import Flat, columns_of_rule, flattened
from .uneven import blocks_of_span, may_be_uneven, tiles_of_strides

ROWS = 64  # tokens of a warpgroup
HEAD_DIMS = (32, 64, 128, 256, 512)  # channels that there are kernels for; of keys, up to 256
MOST = 2**31 - 1  # coordinates of TMA are 32 bits
MOST_MASKED = 2**29  # blocks may begin at the last key of a mask and exceed it by twice of all

# Passes of the backward: what each of them sums.
PASSES = DQ, DKDV, DK, DV = 0, 1, 2, 3

# Channels of heads of which blocks have the next head's, which a product must not find: to set
# these to zero takes less than it takes TMA to fill rows (measured: hopper-log.md).
_WORTH_CLEARING = (24, 40, 104)

# Scores are not masked, by compare, by a product, by compare in the first block only, or by a
# product whose factors come with tiles and blocks.
MASK_KINDS = NONE, COMPARE, PRODUCT, FIRST, COLUMNS = 0, 1, 2, 3, 4


# Cycles by estimate for one that kernels take (hopper-log.md).
FORWARD_SCALE, BACKWARD_SCALE = 2.15, 2.7


@cache
def native(channels: int) -> int:
    """Channels of the kernels that run heads of so many, which may be more."""
    return next(each for each in HEAD_DIMS if each >= channels)


def aligned(channels: int) -> int:
    """Channels of a head in memory that TMA reads: 16 bytes divide strides."""
    return -(-channels // 8) * 8


def are_half_aligned(channels: int) -> bool:
    """Whether of heads side by side every second one begins amid 16 bytes, at a multiple of 8."""
    return channels % 8 == 4


def reads_in_place(
    dim: int, value_dim: int, heads: int, kv_heads: int, has_more: bool = False
) -> bool:
    """Whether kernels read heads where they are, not wider copies: 8 divides their width, or heads
    are half aligned, and TMA reads four channels more.

    Then a head of queries must begin as that of keys and of values does, for products to find the
    same channels in one place, and tokens at multiples of 16 bytes. Copies remain if a call
    ``has_more``: a bias, masks, additional tokens or documents, which have kernels, warps or views
    of their own. Wider heads have sums in other registers.
    """
    if dim % 8 == value_dim % 8 == 0:
        return True
    is_alike = dim == value_dim and heads == kv_heads
    return is_alike and are_half_aligned(dim) and dim <= 128 and heads % 2 == 0 and not has_more


@cache
def chunks(channels: int) -> Shape:
    """What products of heads of so many channels are made of: all that kernels have, or half of
    them and a power of two that the others fit."""
    width = native(channels)
    rest = next(each for each in (16, 32, 64, 128, 256) if channels - width // 2 <= each)
    return (width,) if width == 32 or 2 * rest >= width else (width // 2, rest)


@cache
def is_joined(channels: int) -> bool:
    """Whether a block has the next head's channels beside a head's own, of heads side by side:
    where products take none of them, or where to set these to zero takes less than to fill rows;
    or where TMA can not read a head alone."""
    return native(channels) > channels and (
        channels == sum(chunks(channels)) or channels in _WORTH_CLEARING or channels % 8 > 0
    )


@cache
def cleared(channels: int) -> tuple[int, int]:
    """Channels that products take of a block and that are the next head's: the first, and the
    end."""
    return (channels, sum(chunks(channels))) if is_joined(channels) else (0, 0)


@cache
def slices(dim: int, value_dim: int) -> tuple[int, int]:
    """In how many slices of values a kernel sums outputs or dV, and the channels of a slice.

    For each slice the weights are made again. 512 channels of a sum would take all registers.
    """
    if value_dim <= 256:
        return 1, native(value_dim)
    ways = ((-(-value_dim // width), width) for width in (128, 256))
    # Scores take the time of another 256 channels of products.
    return min(ways, key=lambda way: way[0] * (native(dim) + way[1] + 256))


def are_together(dim: int, value_dim: int) -> bool:
    """Whether one pass sums dK and dV; else each has a pass of its own, for want of registers."""
    return native(dim) == native(value_dim) <= 128


def has_empty_box(channels: int) -> bool:
    """Whether TMA, which loads boxes of 64 channels, finds none of a head's in one of them."""
    return native(channels) - channels >= 64


def row_cycles(channels: int) -> float:
    """Cycles that TMA takes for a token's channels of a head, in boxes of 64 (hopper-log.md).

    It is slow where rows do not begin where 32 bytes do, and where it has zeros to fill in. With
    the next head's channels beside them, boxes take 2.5 to 4.1 alone; 3.3 fits the times of
    kernels where heads begin at multiples of 32 bytes.
    """
    if native(channels) == channels:
        return 1.7 * max(1, channels // 64)
    if is_joined(channels):
        return 3.3 * max(1, native(channels) // 64)
    box, last = (2.5, 3.9) if channels % 16 == 0 else (4.3, 6.5)
    return channels // 64 * box + last


_COLUMNS_CYCLES = 1.7  # likewise, for a token's columns of a mask

_LINE = 128  # bytes of a line of the L2 cache


def heads_of_lines(channels: int) -> int:
    """Of how many heads side by side every line is theirs alone."""
    return _LINE // math.gcd(2 * channels, _LINE)


@cache
def split_lines(channels: int) -> float:
    """In how many lines of the L2 cache a head's channels lie, on average over heads side by side;
    0 where none begins amid a line and ends in another one."""
    size, heads = 2 * channels, heads_of_lines(channels)
    if size % _LINE == 0 or _LINE % size == 0:
        return 0.0
    first_and_last = ((i * size // _LINE, (i * size + size - 1) // _LINE) for i in range(heads))
    return sum(last - first + 1 for first, last in first_and_last) / heads


def overflows_cache(key_shape: Shape, dim: int, value_dim: int) -> bool:
    """Whether keys and values of a head that lie across lines of the L2 cache take more of it than
    the half of 50 MB; then heads that share lines have to run at once."""
    lines = split_lines(dim) + split_lines(value_dim)
    return math.prod(key_shape) * lines * _LINE > 25e6


def boxes(tiles: Tiles, of_keys: bool, piece: Shape, packed: bool = False) -> Tiles:
    """What a kernel loads at once: its tiles, of packed documents a row of them, and pieces of its
    blocks."""
    tile, _ = tile_and_block(tiles, of_keys)
    own = row(tile) if packed else tile
    return tiles._replace(q_block=piece if of_keys else own, kv_block=own if of_keys else piece)


def row(shape: Shape) -> Shape:
    """A row of a tile or block."""
    return 1, 1, shape[2]


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
    pair_at_once: float  # programs that hide as much waiting as two warpgroups of one do
    block_latency: float  # cycles until a block's scores are made, if nothing else runs
    two_stage_cycles: float  # that a block waits for the next one's buffer if there are only two
    row_cycles: float  # of TMA, for a token of a block
    may_be_alone: bool  # one warpgroup may have a multiprocessor: of two, tiles may not fit
    block_sizes: Shape  # columns
    smem_options: tuple[tuple[int, bool], ...]  # stages, whether outputs have their own: best first


def work(kind: str, dim: int, value_dim: int, columns: int = 0) -> Work:
    """Of a kind of kernel. A query has 16 bytes of LSE and delta.

    Where dK and dV have a pass each, both have the same tiles, and this is what both do together.
    Tokens may have so many ``columns`` of a mask beside their channels.
    """
    if columns:
        found = work(kind, dim, value_dim)
        scale = FORWARD_SCALE if kind == "forward" else BACKWARD_SCALE
        return found._replace(
            tile_channels=found.tile_channels + columns,
            block_channels=found.block_channels + columns,
            row_cycles=found.row_cycles + scale * _COLUMNS_CYCLES,
        )
    rows = row_cycles(dim) + row_cycles(value_dim)
    together = are_together(dim, value_dim)
    count, width = slices(dim, value_dim)
    dim, value_dim = native(dim), native(value_dim)
    both = dim + value_dim
    if kind == "forward":
        # Outputs that delay no tile are worth more than a third stage.
        smem_options = [(3, True), (2, True)] + [(2, False)] * (dim == width)
        return Work(
            of_keys=False,
            tile_channels=dim,
            block_channels=dim + width,
            out_channels=width,
            acc_registers=width // 2,
            score_registers=1.5,
            has_mask_registers=True,
            product_channels=count * (dim + width),
            column_cycles=8.0 * count,
            pair_at_once=1.5,
            block_latency=1200.0,
            two_stage_cycles=40.0 if max(dim, width) == 64 else 0.0,
            row_cycles=FORWARD_SCALE * rows,
            may_be_alone=False,
            block_sizes=(64, 32) if max(dim, width) > 128 else (128, 64),
            smem_options=tuple(smem_options),
        )
    of_keys = kind == "dkdv"
    # What dQ, or dK, takes: S, dP and the sum. Of dV it is S and the sum, for each slice.
    product_channels, column_cycles = 2 * dim + value_dim, 12.0
    if of_keys:
        product_channels += dim * (0 if together else count) + count * width
        column_cycles *= 1 if together else 1 + count
    most = max(dim, width if of_keys else 0)  # of a sum
    widest = max(dim, value_dim)
    return Work(
        of_keys=of_keys,
        tile_channels=both if of_keys else both + 8,
        block_channels=both + 8 if of_keys else both,
        out_channels=(both if together else most) if of_keys else dim,
        acc_registers=dim if of_keys and together else most // 2,
        score_registers=2.25 if of_keys and together else 2.5,
        has_mask_registers=dim < 128 or (dim == 128 and not of_keys),
        product_channels=product_channels,
        column_cycles=column_cycles,
        pair_at_once=1.3,
        block_latency=2000.0 if of_keys else 1600.0,
        two_stage_cycles={32: 400.0, 64: 650.0, 128: 900.0}.get(widest, 3000.0),
        row_cycles=BACKWARD_SCALE * rows,
        may_be_alone=widest > 128,
        block_sizes=_gradient_block_sizes(of_keys, widest),
        # A block is held while the next one's scores are made.
        smem_options=tuple(itertools.product((4, 3, 2), (True, False))),
    )


def _gradient_block_sizes(of_keys: bool, channels: int) -> Shape:
    """Columns of blocks for heads that wide."""
    if channels > 128:
        return (64, 32)
    return (64,) if of_keys or channels > 64 else (128, 64)


class Mask(NamedTuple):
    """How scores are masked; see the kernel's ``masks.py``."""

    kind: int = NONE
    ends: Shape = (0, 0, 0)  # of each axis's columns of a product
    by_row: bool = False
    steps: int = 1  # of 16 columns
    tables: int = 1  # 0 if each stage has the columns' factor, with a mask of keys in it


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


def _is_padded(shape: Shape) -> bool:
    """Whether some rows or columns of a tile or a block are no token."""
    return rows_held(shape) > math.prod(shape)


def mask_of(sliding: bool, axes: Sequence[Axis], tiles: Tiles, work: Work) -> Mask:
    """How three axes are masked; ``sliding``: every token of the last has a window of its own."""
    # A column of a product masks those of a block that are no key.
    rest = int(not work.of_keys and _is_padded(tiles.kv_block))
    if not any(axis.masked for axis in axes) and not rest:
        return Mask()
    # The windows of a tile's queries start in as many places, at the same distances everywhere.
    by_row = sliding and axes[2].masked and axes[2].tile < axes[2].block
    by_row &= tiles.split_axis != 2 or warpgroups(tiles) == 1
    widths = [axis.block if axis.masked else 0 for axis in axes]
    if by_row:
        widths[2] = axes[2].tile
    tables = axes[2].most if by_row else 1
    columns = sum(widths) + rest
    if columns > 32 or tables > 8 or not work.has_mask_registers:
        return Mask(COMPARE)
    ends = tuple(itertools.accumulate(widths))
    return Mask(PRODUCT, ends, by_row, 1 if columns <= 16 else 2, tables)


def slides(kind: str, rule: Rule) -> bool:
    """Whether partners along the last axis are a window that moves from token to token, never
    shrinks, and begins in the first block of its tile."""
    if isinstance(rule, Dense):
        return False
    moves = rule.stride[-1] == 1 and not rule.is_causal[-1]
    return kind != "dkdv" and moves and rule.boundary[-1] == "shift"


def plain_mask(rule: Dense, key_length: int | None, tiles: Tiles, work: Work) -> Mask:
    """How tiles of plain attention are masked; None: key lengths differ."""
    if isinstance(rule, Flat):
        return Mask(COLUMNS)
    columns = _columns(tiles, work)
    if rule.causal:  # the keys of a warpgroup's own positions are in one block, which is first
        return Mask(FIRST if columns % ROWS == 0 else COMPARE)
    # Queries beyond the last are zeros, and so is what they add to gradients of keys.
    is_cut = not work.of_keys and (key_length is None or key_length % columns > 0)
    return Mask(FIRST) if is_cut else Mask()


def mask(
    kind: str, rule: Rule, shape: Shape, key_shape: Shape, tiles: Tiles, work: Work,
    packed: bool = False,
) -> Mask:  # fmt: skip
    """How tiles are masked."""
    if isinstance(rule, Dense):
        return plain_mask(rule, None if packed else key_shape[0], tiles, work)
    if rule.is_self_attention and not packed:
        axes = cuts(kind == "dkdv", rule, shape, shape)(tiles)
    else:
        axes = _any_axes(kind, rule, tiles)
    # Windows of short documents shrink.
    return mask_of(slides(kind, rule) and not packed, axes, tiles, work)


def pieces(kind: str, rule: Rule, shape: Shape, tiles: Tiles, packed: bool = False) -> Pieces:
    """What of a block is fetched at once."""
    if packed:
        return in_rows(tiles, kind == "dkdv")
    if "circular" in rule.boundary:
        return cuts(kind == "dkdv", rule, shape, shape).pieces(tiles)
    _, block = tile_and_block(tiles, kind == "dkdv")
    return Pieces(block, block, 1.0)


def _any_axes(kind: str, rule: Neighborhood, tiles: Tiles) -> tuple[Axis, ...]:
    """Of axes that are cut, what decides masks, for parts of every offset and length."""
    of_keys, missing = kind == "dkdv", 3 - rule.rank
    axes = [MISSING] * missing
    sizes = list(zip(*tile_and_block(tiles, of_keys)))[missing:]
    for (tile, block), k, r in zip(sizes, rule.kernel_size, rule.queries_per_key):
        positions = -(-(tile - 1) // r) + 1  # of keys, where a warpgroup's queries stand
        axes.append(Axis(tile, block, 1, 1, 0, 1, -(-(positions + k - 1) // block), True))
    return tuple(axes)


def _columns(tiles: Tiles, work: Work) -> int:
    """Columns of a block's scores."""
    return rows_held(tile_and_block(tiles, work.of_keys)[1])


def shared_bytes(tiles: Tiles, mask: Mask, work: Work, own_out: bool) -> int:
    """Bytes of shared memory of a multiprocessor's programs; 2176 each for barriers, bounds of
    windows, and Triton."""
    columns = _columns(tiles, work)
    rows = warpgroups(tiles) * ROWS * (work.tile_channels + work.out_channels * own_out)
    blocks = tiles.num_stages * columns * work.block_channels
    tables = mask.tables * columns * 16 * mask.steps * (mask.kind == PRODUCT)
    return tiles.resident_programs * (2 * (rows + blocks + tables) + 2176)


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
    return start, min(256, (start * (groups + 1) - fetch) // groups // 8 * 8), fetch


def _has_registers(tiles: Tiles, work: Work) -> bool:
    """Whether sums and scores fit; a product alone must fit what a program starts with."""
    start, most, _ = registers(tiles, work)
    acc, scores = work.acc_registers, _columns(tiles, work) // 2
    return max(acc, scores) + 30 <= start and acc + scores * work.score_registers + 40 <= most


# Cycles of a multiprocessor: of a block and of a tile, beside products and waiting; and until the
# first block of a tile is there, if nothing else runs.
_BLOCK_CYCLES, _TILE_CYCLES, _TILE_LATENCY = 100.0, 500.0, 3000.0
_EXPOSED = 0.05  # of a block, where TMA takes longer
_COMPARE_CYCLES = 4.0  # of a column of a partial block

# What a block costs more if it or its tile is no power of two, of small windows (hopper-log.md): of
# heads of a native width, and of others. And how many such tiles with blocks are priced.
_UNEVEN_COSTS, _UNEVEN = (1.03, 1.07), 10

_L2_BYTES = 30.0  # that L2 gives a multiprocessor in a cycle, if all fetch (hopper-log.md)


class Cycles(NamedTuple):
    """Cycles of a multiprocessor."""

    block: float  # that a block costs
    tile: float  # that a warpgroup's tile costs beside its blocks
    compare: float  # that a partial block costs more, if masked by compare


def cycles(tiles: Tiles, mask: Mask, work: Work) -> Cycles:
    """What tiles cost with a mask."""
    columns = _columns(tiles, work)
    # While one waits, others compute; warpgroups of one program wait for the same blocks.
    at_once = tiles.resident_programs * (1 if warpgroups(tiles) == 1 else work.pair_at_once)
    channels = work.product_channels + 16 * mask.steps * (mask.kind in (PRODUCT, COLUMNS))
    block = columns * channels / 32 + columns * work.column_cycles + _BLOCK_CYCLES
    block += work.block_latency / at_once + work.two_stage_cycles * (tiles.num_stages == 2)
    # TMA fetches meanwhile, which may take longer; warpgroups of one program share what it fetches.
    block = max(block, columns * work.row_cycles / warpgroups(tiles) + _EXPOSED * block)
    compare = columns * _COMPARE_CYCLES * (mask.kind == COMPARE)
    return Cycles(block, _TILE_CYCLES + _TILE_LATENCY / at_once, compare)


def _cost(axes: tuple[Axis, ...], tiles: Tiles, each: Cycles) -> float:
    """Cycles of a multiprocessor per batch entry, head and dilation group."""
    (a, b, c), groups = axes, warpgroups(tiles)
    blocks, fetched = a.blocks * b.blocks * c.blocks, a.fetched * b.fetched * c.fetched
    partial, count = blocks - a.full * b.full * c.full, a.tiles * b.tiles * c.tiles
    cost = (blocks + IDLE * (fetched - blocks)) * each.block + partial * each.compare
    return cost + count * groups * each.tile


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
) -> Tiles:
    """The tiles that were measured to be fastest, else those estimated to be cheapest, or nearly
    so (:func:`natten.backends.triton.tiles.usual`).

    Args:
        kind: of kernel, one of ``interface.KINDS``.
        packed: of packed documents, up to the layouts' lengths.
    """
    model = _model(rule, shape, key_shape)
    return _choose(kind, *model, aligned(dim), aligned(value_dim), itemsize, packed)


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

    def _programs(self, columns: int, rank: int) -> tuple[list[_Program], float, float]:
        """Of blocks of so many tokens, the programs that have the registers, and the fewest cycles
        of a block and of a warpgroup's tile."""
        found, prices = [], []
        for program in _programs(rank, self.work.may_be_alone):
            tiles = Tiles((1, 1, columns), (1, 1, columns), *program)
            if _has_registers(tiles, self.work):
                found.append(program)
                stages, _ = self.work.smem_options[0]
                prices.append(cycles(tiles._replace(num_stages=stages), Mask(), self.work)[:2])
        return found, *map(min, zip(*prices))

    def priced(self, tiles: Tiles, mask: Mask) -> tuple[int, Cycles] | None:
        """The stages that fit, and the :func:`cycles`; None if none fit."""
        key = _columns(tiles, self.work), tiles.num_warps, tiles.resident_programs, mask
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
        self.uneven_cost = _UNEVEN_COSTS[any(native(each) > each for each in dims)]
        self.uneven: list[tuple[Shape, Shape]] = []  # tiles with blocks
        # Wide heads and half aligned ones were never run with them.
        suits = max(map(native, dims)) <= 128 and not any(map(are_half_aligned, dims))
        if isinstance(rule, Neighborhood) and kv_lengths is None and not packed and suits:
            self.uneven = self._find_uneven(rule) if may_be_uneven(rule, shape) else []
        if kv_lengths is not None and not self.of_keys and isinstance(rule, Neighborhood):
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

    def _find_uneven(self, rule: Neighborhood) -> list[tuple[Shape, Shape]]:
        """The best tiles with blocks that are no powers of two (``uneven.py``), by what all blocks
        take about."""
        windows, strides = padded(rule.kernel_size, 1), padded(rule.stride, 1)
        found = []
        lengths = padded(self.cuts.q_lengths, 1)
        usual_tiles, usual_blocks = set(self.tiles), set(self.blocks)
        for count, tile, span in tiles_of_strides(ROWS, lengths, windows, strides):
            for columns in self.ways.work.block_sizes:
                _, per_block, per_tile = self.ways.programs(columns, rule.rank)
                for blocks, block in blocks_of_span(span, strides, columns):
                    if tile not in usual_tiles or block not in usual_blocks:
                        found.append((count * (blocks * per_block + per_tile), tile, block))
        found.sort(key=itemgetter(0))
        return [(tile, block) for _, tile, block in found[:_UNEVEN]]

    def every(self) -> list[Tiles]:
        """All tiles that fit, cheapest first."""
        costs: dict[Tiles, float] = {}
        for tile, block in [*itertools.product(self.tiles, self.blocks), *self.uneven]:
            costs.update((tiles, cost) for cost, tiles in self._fitting(tile, block))
        return sorted(costs, key=costs.__getitem__)

    def cheapest(self) -> tuple[float, Tiles] | None:
        """The first of :meth:`every` and its cost, None if nothing fits: tiles are looked at in the
        order of a lower bound, up to one that is above what was found."""
        bounds = self._bounds()
        best, found, at = math.inf, None, -1
        first = min(range(len(bounds)), key=bounds.__getitem__)
        order = [first]
        for i in order:
            if bounds[i] > best:
                break
            for cost, tiles in self._fitting(*self._pair(i)):
                if cost < best or (cost == best and i < at):
                    best, found, at = cost, tiles, i
            if i == first:  # few of all are left to be sorted
                rest = (j for j, bound in enumerate(bounds) if bound <= best and j != first)
                order += sorted(rest, key=bounds.__getitem__)
        return found and (best, found)

    def _pair(self, i: int) -> tuple[Shape, Shape]:
        """The tile and the block of one of :meth:`_bounds`."""
        tile, block = divmod(i, len(self.blocks))
        count = len(self.tiles) * len(self.blocks)
        return (self.tiles[tile], self.blocks[block]) if i < count else self.uneven[i - count]

    def priced(self, tiles: Tiles) -> tuple[float, Tiles] | None:
        """What tiles cost, with the stages that fit; None if none do, or an axis is too short."""
        tile, block = tile_and_block(tiles, self.of_keys)
        suits = tile in self.tiles and block in self.blocks
        if not suits and self.uneven:
            lengths = padded(self.cuts.q_lengths, 1)
            suits = all(
                size == 1 or size < 2 * n
                for each in (tile, block)
                for size, n in zip(each, lengths)
            )
        return self._priced(tiles) if suits else None

    def _bounds(self) -> list[float]:
        """What each tile with each block costs at least, as if each warpgroup had blocks and a
        program of its own, and no mask."""
        least = []
        for block in self.blocks:
            _, per_block, per_tile = self.ways.programs(rows_held(block), self.rule.rank)
            # Sums are rounded, and a bound must stay one.
            least.append((*block, 0.999999 * per_block, 0.999999 * per_tile))
        x, y, z = map(self._blocks_along, range(3), zip(*self.tiles), zip(*self.blocks))
        bounds = []
        for tile in self.tiles:
            i, j, k = tile
            xi, yj, zk, count = x[i], y[j], z[k], self.cuts.count(tile)
            bounds += [
                xi[a] * yj[b] * zk[c] * block + count * each for a, b, c, block, each in least
            ]
        for tile, block in self.uneven:
            _, per_block, per_tile = self.ways.programs(rows_held(block), self.rule.rank)
            blocks = math.prod(map(self.cuts.least_blocks, range(3), tile, block))
            bounds.append(0.999999 * (blocks * per_block + self.cuts.count(tile) * per_tile))
        return bounds

    def _blocks_along(
        self, axis: int, tiles: Sequence[int], blocks: Sequence[int]
    ) -> dict[int, dict[int, int]]:
        """Along an axis, the fewest blocks of each of these sizes, of all tiles of each size."""
        sizes = set(blocks)
        return {
            tile: {block: self.cuts.least_blocks(axis, tile, block) for block in sizes}
            for tile in set(tiles)
        }

    def _fitting(self, tile: Shape, block: Shape) -> Iterator[tuple[float, Tiles]]:
        """What the ways to run a tile with a block cost, of those that fit."""
        programs, *_ = self.ways.programs(rows_held(block), self.rule.rank)
        both = (block, tile) if self.of_keys else (tile, block)
        return filter(None, (self._priced(Tiles(*both, *program)) for program in programs))

    def _priced(self, tiles: Tiles) -> tuple[float, Tiles] | None:
        pieces = in_rows(tiles, self.of_keys) if self.packed else self.cuts.pieces(tiles)
        axes = self.cuts.in_pieces(tiles, pieces.at_seam)
        mask = self._mask(tiles, axes)
        if mask.kind == COMPARE and _is_padded(tile_and_block(tiles, self.of_keys)[1]):
            return None  # where each column is would take registers
        priced = self.ways.priced(tiles, mask)
        if priced is None or not all(axis.fits for axis in axes):
            return None
        stages, each = priced
        is_uneven = _is_padded(tiles.q_block) or _is_padded(tiles.kv_block)
        each = each._replace(
            block=each.block * pieces.cost * (self.uneven_cost if is_uneven else 1)
        )
        return _cost(axes, tiles, each), tiles._replace(num_stages=stages)

    def _mask(self, tiles: Tiles, axes: Sequence[Axis]) -> Mask:
        """How tiles are masked that cut the axes so."""
        rule, work = self.rule, self.ways.work
        if isinstance(rule, Dense):
            return plain_mask(rule, None if self.packed else self.cuts.kv_lengths[0], tiles, work)
        if self.packed or not rule.is_self_attention:
            axes = _any_axes(self.kind, rule, tiles)
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
        fitting += [tiles for tiles in every if _has_registers(tiles, work)]
    return fitting


def fitted(tiles: Tiles, mask: Mask, work: Work) -> Tiles | None:
    """The tiles with the stages that fit the shared memory, or None if not even two do."""
    for stages, own in work.smem_options:
        tiles = tiles._replace(num_stages=stages)
        if shared_bytes(tiles, mask, work, own) <= SHARED_MEMORY[90]:
            return tiles
    return None


def paired(tiles: Tiles, mask: Mask, work: Work, tokens: int, blocks: int) -> Tiles:
    """Tiles of plain attention that all have so many blocks: two programs as one of two
    warpgroups, if that takes less by estimate.

    The warpgroups share what is fetched, of which L2 gives a multiprocessor so many bytes a cycle.
    They wait for blocks no more than two programs do, but begin and end their tiles together.
    Of so many ``tokens``, more may be none.
    """
    pair = fitted(tiles._replace(num_warps=2 * WARPS, resident_programs=1), mask, work)
    if pair is None or warpgroups(tiles) > 1 or tiles.resident_programs != 2:
        return tiles
    fetched = FORWARD_SCALE * 2 * work.block_channels / _L2_BYTES  # cycles of a token
    alike = work._replace(pair_at_once=2.0, row_cycles=max(work.row_cycles, fetched))

    def cost(each: Tiles) -> float:
        rows = ROWS * warpgroups(each)
        block, tile = cycles(each, mask, alike).block, cycles(each, mask, work).tile
        return -(-tokens // rows) * rows * (blocks * block + tile)

    return min(tiles, pair, key=cost)


def masked(tiles: Tiles, mask: Mask, work: Work) -> tuple[Tiles, Mask, Work]:
    """What a mask of keys makes of tiles, their mask and their work.

    Each stage has a columns' factor of the mask of keys, as two columns of the other mask's where
    these are free, else as a factor of its own. For want of shared memory there are fewer stages,
    or fewer programs at once. What is computed stays the same.
    """
    is_free = mask.ends[-1] <= 16 * mask.steps - 2 and not _is_padded(tiles.kv_block)
    if mask.kind == PRODUCT and mask.tables == 1 and is_free:
        mask = mask._replace(tables=0)
    columns = 16 if mask.tables else 16 * mask.steps
    work = work._replace(block_channels=work.block_channels + columns)
    while shared_bytes(tiles, mask, work, own_out(tiles, mask, work)) > SHARED_MEMORY[90]:
        fewer = tiles._replace(resident_programs=tiles.resident_programs - 1)
        tiles = fitted(tiles, mask, work) or fewer
    return tiles, mask, work


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
