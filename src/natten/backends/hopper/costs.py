"""What a kind of kernel does with tiles, and what that costs: masks, memory, registers, cycles.

Nothing is chosen here: ``tiles.py`` compares tiles by these numbers, and plans run kernels by them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from ...neighborhood import Dense, Neighborhood, Rule
from ..interface import Shape, Tiles
from ..triton.tiles import SHARED_MEMORY
from .cuts import (
    IDLE,
    MISSING,
    WARPS,
    Axis,
    Pieces,
    cuts,
    in_rows,
    rows_held,
    tile_and_block,
    warpgroups,
)
from .flat import Flat
from .widths import are_together, native, row_cycles, slices

ROWS = 64  # tokens of a warpgroup
MOST = 2**31 - 1  # coordinates of TMA are 32 bits
MOST_MASKED = 2**29  # blocks may begin at the last key of a mask and exceed it by twice of all

# Passes of the backward: what each of them sums.
PASSES = DQ, DKDV, DK, DV = 0, 1, 2, 3

# Scores are not masked, by compare, by a product, by compare in the first block only, or by a
# product whose factors come with tiles and blocks.
MASK_KINDS = NONE, COMPARE, PRODUCT, FIRST, COLUMNS = 0, 1, 2, 3, 4

# Cycles by estimate for one that kernels take (hopper-log.md).
FORWARD_SCALE, BACKWARD_SCALE = 2.15, 2.7

# Cycles that TMA takes for a token's columns of a mask (hopper-log.md).
_COLUMNS_CYCLES = 1.7

# Cycles of a multiprocessor: of a block and of a tile, beside products and waiting; and until the
# first block of a tile is there, if nothing else runs.
_BLOCK_CYCLES, _TILE_CYCLES, _TILE_LATENCY = 100.0, 500.0, 3000.0
_EXPOSED = 0.05  # of a block, where TMA takes longer
_COMPARE_CYCLES = 4.0  # of a column of a partial block

_L2_BYTES = 30.0  # that L2 gives a multiprocessor in a cycle, if all fetch (hopper-log.md)


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
    wide_block: float  # how much longer a block of more than 64 columns takes than its parts
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
            wide_block=1.0,
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
        block_latency=2000.0 if of_keys else 1300.0,
        wide_block=1.07,
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


def is_padded(shape: Shape) -> bool:
    """Whether some rows or columns of a tile or a block are no token."""
    return rows_held(shape) > math.prod(shape)


def mask_of(sliding: bool, axes: Sequence[Axis], tiles: Tiles, work: Work) -> Mask:
    """How three axes are masked; ``sliding``: every token of the last has a window of its own."""
    # A column of a product masks those of a block that are no key.
    rest = int(not work.of_keys and is_padded(tiles.kv_block))
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
    columns = columns_of(tiles, work)
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
        axes = any_axes(kind, rule, tiles)
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


def any_axes(kind: str, rule: Neighborhood, tiles: Tiles) -> tuple[Axis, ...]:
    """Of axes that are cut, what decides masks, for parts of every offset and length."""
    of_keys, missing = kind == "dkdv", 3 - rule.rank
    axes = [MISSING] * missing
    sizes = list(zip(*tile_and_block(tiles, of_keys)))[missing:]
    for (tile, block), k, r in zip(sizes, rule.kernel_size, rule.queries_per_key):
        positions = -(-(tile - 1) // r) + 1  # of keys, where a warpgroup's queries stand
        axes.append(Axis(tile, block, 1, 1, 0, 1, -(-(positions + k - 1) // block), True))
    return tuple(axes)


def columns_of(tiles: Tiles, work: Work) -> int:
    """Columns of a block's scores."""
    return rows_held(tile_and_block(tiles, work.of_keys)[1])


def boxes(tiles: Tiles, of_keys: bool, piece: Shape, packed: bool = False) -> Tiles:
    """What a kernel loads at once: its tiles, of packed documents a row of them, and pieces of its
    blocks."""
    tile, _ = tile_and_block(tiles, of_keys)
    own = row(tile) if packed else tile
    return tiles._replace(q_block=piece if of_keys else own, kv_block=own if of_keys else piece)


def row(shape: Shape) -> Shape:
    """A row of a tile or block."""
    return 1, 1, shape[2]


def shared_bytes(tiles: Tiles, mask: Mask, work: Work, own_out: bool) -> int:
    """Bytes of shared memory of a multiprocessor's programs; 2176 each for barriers, bounds of
    windows, and Triton."""
    columns = columns_of(tiles, work)
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


def has_registers(tiles: Tiles, work: Work) -> bool:
    """Whether sums and scores fit; a product alone must fit what a program starts with."""
    start, most, _ = registers(tiles, work)
    acc, scores = work.acc_registers, columns_of(tiles, work) // 2
    return max(acc, scores) + 30 <= start and acc + scores * work.score_registers + 40 <= most


class Cycles(NamedTuple):
    """Cycles of a multiprocessor."""

    block: float  # that a block costs
    tile: float  # that a warpgroup's tile costs beside its blocks
    compare: float  # that a partial block costs more, if masked by compare


def cycles(tiles: Tiles, mask: Mask, work: Work) -> Cycles:
    """What tiles cost with a mask."""
    columns = columns_of(tiles, work)
    # While one waits, others compute; warpgroups of one program wait for the same blocks.
    at_once = tiles.resident_programs * (1 if warpgroups(tiles) == 1 else work.pair_at_once)
    channels = work.product_channels + 16 * mask.steps * (mask.kind in (PRODUCT, COLUMNS))
    block = columns * channels / 32 + columns * work.column_cycles + _BLOCK_CYCLES
    block += work.block_latency / at_once + work.two_stage_cycles * (tiles.num_stages == 2)
    block *= work.wide_block if columns > ROWS else 1.0
    # TMA fetches meanwhile, which may take longer; warpgroups of one program share what it fetches.
    block = max(block, columns * work.row_cycles / warpgroups(tiles) + _EXPOSED * block)
    compare = columns * _COMPARE_CYCLES * (mask.kind == COMPARE)
    return Cycles(block, _TILE_CYCLES + _TILE_LATENCY / at_once, compare)


def cost_of(axes: tuple[Axis, ...], tiles: Tiles, each: Cycles) -> float:
    """Cycles of a multiprocessor per batch entry, head and dilation group."""
    (a, b, c), groups = axes, warpgroups(tiles)
    blocks, fetched = a.blocks * b.blocks * c.blocks, a.fetched * b.fetched * c.fetched
    partial, count = blocks - a.full * b.full * c.full, a.tiles * b.tiles * c.tiles
    cost = (blocks + IDLE * (fetched - blocks)) * each.block + partial * each.compare
    return cost + count * groups * each.tile


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
    is_free = mask.ends[-1] <= 16 * mask.steps - 2 and not is_padded(tiles.kv_block)
    if mask.kind == PRODUCT and mask.tables == 1 and is_free:
        mask = mask._replace(tables=0)
    columns = 16 if mask.tables else 16 * mask.steps
    work = work._replace(block_channels=work.block_channels + columns)
    while shared_bytes(tiles, mask, work, own_out(tiles, mask, work)) > SHARED_MEMORY[90]:
        fewer = tiles._replace(resident_programs=tiles.resident_programs - 1)
        tiles = fitted(tiles, mask, work) or fewer
    return tiles, mask, work
