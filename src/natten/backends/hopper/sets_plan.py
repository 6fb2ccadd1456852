"""What shapes decide about kernels that take sets of tiles in turn (``sets.py``): tiles, blocks and
programs."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from operator import floordiv, mul
from typing import NamedTuple

import torch

from ...neighborhood import Neighborhood, group_length
from ..interface import Shape
from ..triton.plan import MOST_SUMS
from ..triton.tiles import SHARED_MEMORY
from .bias_tables import Table, table
from .costs import ROWS
from .tiles import tile_shapes
from .widths import native

# What a program that sums dS costs beside its steps, in steps.
_PROGRAM_STEPS = 4


class Cut(NamedTuple):
    """How the gradient of a bias is cut: a program has one of the blocks of a tile, which is as far
    from every tile.

    Attributes:
        tile, block: queries and keys of a step.
        apart: how far the first block is from its tile, per axis.
        blocks: how many there are, per axis.
        steps: how many tiles attend a block, summed over the blocks; of a dilation group.
        most: the same of the block that most tiles attend.
    """

    tile: Shape
    block: Shape
    apart: Shape
    blocks: Shape
    steps: int
    most: int


def _cut(rule: Neighborhood, axis: int, n: int, tile: int, block: int) -> tuple[int, ...]:
    """``apart``, ``blocks``, ``steps`` and ``most`` of a :class:`Cut`, of an axis of ``n``
    positions: of all ways to lay blocks beside tiles, the one with the fewest steps."""
    start, end = rule.windows(axis, torch.arange(n, device="cpu"), n)
    first = torch.arange(0, n, tile, device="cpu")
    # Partners of each tile, from its first query on.
    low, high = start[first] - first, end[(first + tile - 1).clamp(max=n - 1)] - first  # [tiles]
    # Later, blocks would be as many until they begin after some tile's first partner.
    shifts = (low % block).unique()[:, None]
    begins, ends = (low - shifts) // block, (high - shifts + block - 1) // block  # [shifts, tiles]
    ways = zip((ends - begins).sum(1).tolist(), (ends.amax(1) - begins.amin(1)).tolist())
    (steps, blocks), way = min((each, way) for way, each in enumerate(ways))
    begin, end = begins[way], ends[way]
    least = int(begin.min())
    at = least + torch.arange(blocks, device="cpu")[:, None]  # [blocks, 1]
    most = int(((begin <= at) & (at < end)).sum(1).max())
    return int(shifts[way]) + least * block, blocks, steps, most


@lru_cache(maxsize=64)
def cut(rule: Neighborhood, space: Shape, columns: tuple[int, ...]) -> Cut:
    """The cut that fetches least, and of such the one with the fewest blocks, of as many
    ``columns``."""
    lengths = tuple(group_length(n, d, 0) for n, d in zip(space, rule.dilation))
    missing = 3 - len(space)

    @cache
    def of_axis(axis: int, tile: int, block: int) -> tuple[int, ...]:
        if axis < missing:
            return 0, 1, 1, 1
        return _cut(rule, axis - missing, lengths[axis - missing], tile, block)

    found = []
    blocks_of = [shape for each in columns for shape in tile_shapes(each, lengths)]
    for tile in tile_shapes(ROWS, lengths):
        for block in blocks_of:
            apart, blocks, steps, most = zip(*map(of_axis, range(3), tile, block))
            found.append(Cut(tile, block, apart, blocks, math.prod(steps), math.prod(most)))

    def cost(each: Cut) -> tuple[int, int]:
        return each.steps * (ROWS + math.prod(each.block)), math.prod(each.blocks)

    return min(found, key=cost)


class InSets(NamedTuple):
    """How a kernel takes the sets of tiles in turn.

    Attributes:
        rule: of the problem.
        cut: of the tiles.
        blocks: how many of a tile's a program has, per axis.
        table: of a head's bias.
        splits: in how many splits the tiles of a head are.
        programs: how many a multiprocessor runs at once.
        stages: of tiles, and of blocks.
        fetch_registers: of threads that fetch.
    """

    rule: Neighborhood
    cut: Cut
    blocks: Shape
    table: Table
    splits: int
    programs: int
    stages: tuple[int, int]
    fetch_registers: int

    @property
    def programs_of_tile(self) -> Shape:
        """How many programs have the blocks of a tile, per axis."""
        return tuple(map(floordiv, self.cut.blocks, self.blocks))

    @property
    def region(self) -> Shape:
        """Keys of a program's blocks, per axis."""
        return tuple(map(mul, self.cut.block, self.blocks))


def block_by_block(
    rule: Neighborhood, space: Shape, sets: int, heads: int, dims: tuple[int, int], processors: int
) -> InSets | None:
    """How each program sums dS of one block of a tile, for so many batch entries and dilation
    groups; None if there is no room."""
    found = cut(rule, space, columns(*dims))
    programs, stages = programs_and_stages(found, *dims)
    splits = splits_of(found, sets, heads, programs * processors)
    if splits == 0 or stages == 0:
        return None
    # Blocks are on a grid that begins anywhere before the first partner.
    made = table(rule.kernel_size, found.tile, found.block, earlier=found.block)
    return InSets(rule, found, (1, 1, 1), made, splits, programs, (stages, stages), 32)


def columns(dim: int, value_dim: int) -> Shape:
    """How many keys a block may have; of wide heads, 128 leave no room for two stages."""
    return (ROWS, 2 * ROWS) if max(native(dim), native(value_dim)) == 32 else (ROWS,)


def programs_and_stages(cut: Cut, dim: int, value_dim: int) -> tuple[int, int]:
    """How many programs of a multiprocessor sum dS, and how many tiles and blocks fit the shared
    memory of each: three programs, if they have registers and room for two stages, else two."""
    columns, channels = math.prod(cut.block), native(dim) + native(value_dim)

    def stages(programs: int) -> int:
        # Beside them are what scores start from, and barriers.
        room = SHARED_MEMORY[90] // programs - 4 * ROWS * columns - 2048
        return min(4, room // (2 * (ROWS + columns) * channels + 8 * ROWS))

    programs = 3 if columns == ROWS and stages(3) > 1 else 2
    return programs, stages(programs)


def splits_of(cut: Cut, sets: int, heads: int, programs: int) -> int:
    """In how many splits tiles of ``sets`` batch entries and dilation groups are summed, where so
    many ``programs`` run at once; 0 if the sums would take too much memory."""
    longest, blocks = cut.most * sets, math.prod(cut.blocks)
    pairs = math.prod(cut.tile + cut.block)
    # Of blocks that few tiles attend, programs end soon: several count as one.
    each = heads * -(-cut.steps // cut.most)

    def cost(splits: int) -> int:
        return -(-splits * each // programs) * (-(-longest // splits) + _PROGRAM_STEPS)

    most = min(longest, max(1, 4 * programs // each), MOST_SUMS // (heads * blocks * pairs))
    return min(range(1, most + 1), key=cost, default=0)


# Of programs that have all blocks of a tile, and make dQ: how many run at once, keys of a block,
# and blocks at most, of whose sums a thread has registers; channels of a head.
_WHOLE_PROGRAMS, _WHOLE_BLOCK, _MOST_BLOCKS, WHOLE_CHANNELS = 2, 32, 7, 32
# To lay biases and masks of a tile takes about as many instructions as to compute one of its sets.
_FEWEST_SETS = 2


@lru_cache(maxsize=64)
def _whole_cut(rule: Neighborhood, space: Shape) -> Cut | None:
    """The cut in which all blocks of a tile are as far from each, and the fewest rows are fetched;
    None if they are too many. ``steps`` are tiles of a dilation group."""
    lengths = tuple(group_length(n, d, 0) for n, d in zip(space, rule.dilation))
    missing = 3 - len(space)

    @cache
    def of_axis(axis: int, tile: int) -> tuple[int, int, int]:
        """Tiles, the first partner of all, and how many there are from it on."""
        if axis < missing:
            return 1, 0, 1
        n = lengths[axis - missing]
        start, end = rule.windows(axis - missing, torch.arange(n, device="cpu"), n)
        first = torch.arange(0, n, tile, device="cpu")
        low = int((start[first] - first).min())
        high = int((end[(first + tile - 1).clamp(max=n - 1)] - first).max())
        return len(first), low, high - low

    found = []
    for tile in tile_shapes(ROWS, lengths):
        tiles, apart, spans = zip(*map(of_axis, range(3), tile))
        steps = math.prod(tiles)
        for block in tile_shapes(_WHOLE_BLOCK, lengths):
            blocks = tuple(-(-span // n) for span, n in zip(spans, block))
            if math.prod(blocks) <= _MOST_BLOCKS:
                found.append(Cut(tile, block, apart, blocks, steps, steps))
    return min(found, key=_fetched, default=None)


def _fetched(cut: Cut) -> int:
    """Rows of queries and of keys that all tiles fetch."""
    return cut.steps * (ROWS + _WHOLE_BLOCK * math.prod(cut.blocks))


def all_blocks(
    rule: Neighborhood, space: Shape, sets: int, heads: int, processors: int
) -> InSets | None:
    """How each program has all blocks of a tile, for so many batch entries and dilation groups;
    None if registers or memory do not hold the sums, or a tile has too few sets."""
    found = _whole_cut(rule, space)
    if found is None or sets < _FEWEST_SETS:
        return None
    steps, region = found.steps * sets, tuple(map(mul, found.block, found.blocks))
    each = -(-steps // max(1, _WHOLE_PROGRAMS * processors // heads))
    splits = -(-steps // each)
    if splits * heads * math.prod(found.tile + region) > MOST_SUMS:
        return None
    # Blocks of a tile at an end of an axis may begin before its first partner.
    made = table(rule.kernel_size, found.tile, region, earlier=region)
    # Of a program: what scores start from, two stages of a tile's tensors with LSE and delta, dQ
    # that is stored, and barriers. The rest is for keys and values.
    row = 2 * WHOLE_CHANNELS
    room = SHARED_MEMORY[90] // _WHOLE_PROGRAMS - 4 * ROWS * math.prod(region)
    room -= 2 * ROWS * (2 * row + 8) + ROWS * row + 2048
    stages = 2, min(room // (2 * _WHOLE_BLOCK * row), 16)
    return InSets(rule, found, found.blocks, made, splits, _WHOLE_PROGRAMS, stages, 24)
