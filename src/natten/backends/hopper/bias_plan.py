"""What shapes decide about a relative positional bias: its tables, how its gradient is summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...neighborhood import Neighborhood, group_length
from ...tiling import padded
from ..interface import Shape
from ..triton.launch import Launch, Wrapped, per_axis
from ..triton.plan import MOST_SUMS, sum_of_bias
from ..triton.tiles import SHARED_MEMORY
from .bias import bias_table_kernel
from .passes import Passes
from .tiles import ROWS, native, tile_shapes


class Table(NamedTuple):
    """A head's table of the bias, which has every pair of a tile and of its blocks.

    Attributes:
        size: how many numbers it has.
        strides: per axis.
        before: per axis, entries before that of a query and the key at its own position.
        middle: the index of such a pair's entry.
    """

    size: int
    strides: Shape
    before: Shape
    middle: int


def table(kernel_size: Shape, tile: Sequence[int], block: Shape, earlier: Sequence[int]) -> Table:
    """The table for tiles and blocks of these shapes, which are of three axes.

    The first partner of a tile's first token is less than a window before it, and the last partner
    of its last token less than a window after it. Blocks begin at the first partner, or less than
    ``earlier`` before it, and the last one ends less than a block after the last partner.
    """
    windows = padded(kernel_size, 1)
    before = tuple(k + t + e - 3 for k, t, e in zip(windows, tile, earlier))
    sizes = [b + k + t + n - 2 for b, k, t, n in zip(before, windows, tile, block)]
    # Kernels are compiled for strides: rounded up, those of other windows are the same.
    last = 1 << (sizes[2] - 1).bit_length()
    strides = -(-sizes[1] // 8) * 8 * last if sizes[1] > 1 else last, last, 1
    middle = sum(i * stride for i, stride in zip(before, strides))
    return Table(sizes[0] * strides[0], strides, before, middle)


class Biased(Wrapped):
    """A launch that reads tables of the bias, which are made first, as its tiles need them.

    Args:
        launch: of the kernel that reads them.
        table: of a head.
        kernel_size, heads, scale: of the problem.
        is_reversed: rows of scores are keys.
        beside: tables are made beside the kernel before, in memory that it does not use.
        overlap: kernels may be set up while the one before ends.
    """

    def __init__(
        self,
        launch: Launch | Passes,
        table: Table,
        kernel_size: Shape,
        heads: int,
        scale: float,
        is_reversed: bool = False,
        beside: bool = False,
        overlap: bool = False,
    ) -> None:
        self.launch, self.shape = launch, (heads, table.size)
        self.make = Launch(
            bias_table_kernel, (-(-table.size // 1024), heads),
            {
                **per_axis("K", kernel_size), **per_axis("B", table.before),
                "T0": table.strides[0], "T1": table.strides[1], "size": table.size,
                "sign": -1 if is_reversed else 1, "scale": scale, "beside": int(beside), "N": 1024,
            },
            launch_pdl=overlap,
        )  # fmt: skip

    def moved(self, *where: Any) -> Biased:
        """As :meth:`Launch.moved`."""
        found = object.__new__(Biased)
        found.__dict__.update(self.__dict__)
        found.launch = self.launch.moved(*where)
        return found

    def room(self, rpb: Tensor) -> Tensor:
        """Where tables can be made."""
        return rpb.new_empty(self.shape, dtype=torch.float32)

    def fill(self, tables: Tensor, rpb: Tensor) -> None:
        """Make the tables of a contiguous bias. A kernel that follows this one waits for all of it,
        so kernels that overlap are better launched when all of their tables are made."""
        self.make.run(rpb=rpb, tables=tables)

    def run(self, rpb: Tensor, bias_tables: Tensor | None = None, **tensors: Tensor | None) -> None:
        """As :meth:`Launch.run`, with ``rpb`` instead of the tables, if these are not given."""
        if bias_tables is None:
            bias_tables = self.room(rpb)
            self.fill(bias_tables, rpb)
        self.launch.run(**tensors, bias_tables=bias_tables)


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


class BiasGradient:
    """The gradient of the bias: dS is summed over tiles pair by pair, then over the pairs that have
    the same bias.

    Args:
        cut: of the tiles.
        splits: in how many splits tiles are summed.
        launch: of the kernel that sums them.
        kernel_size, heads: of the problem.
    """

    def __init__(
        self, cut: Cut, splits: int, launch: Biased, kernel_size: Shape, heads: int
    ) -> None:
        self.launch = launch
        self.shape = splits, heads, math.prod(cut.blocks), math.prod(cut.tile), math.prod(cut.block)
        self.add_up = sum_of_bias(padded(kernel_size, 1), *cut[:4], splits, heads)

    def run(self, rpb: Tensor, **tensors: Tensor | None) -> Tensor:
        """The gradient of a contiguous bias, whose tables may be given."""
        sums = rpb.new_empty(self.shape, dtype=torch.float32)
        grad = torch.empty_like(rpb)
        self.launch.run(rpb=rpb, **tensors, sums=sums)
        self.add_up.run(sums=sums, grad_rpb=grad)
        return grad


class Tables:
    """The tables that some launches read, made together.

    Memory for them is had first: another kernel may run while they are made.
    """

    def __init__(self, launches: Sequence[Any], rpb: Tensor | None) -> None:
        self._made: list[tuple[Biased, Tensor, Tensor] | None] = []
        for launch in launches:
            biased = launch.launch if isinstance(launch, BiasGradient) else launch
            if rpb is not None and isinstance(biased, Biased):
                self._made.append((biased, biased.room(rpb), rpb))
            else:
                self._made.append(None)

    def make(self) -> list[dict[str, Tensor]]:
        """The tables of each launch, as its argument; {} of one that reads none."""
        for each in self._made:
            if each is not None:
                biased, tables, rpb = each
                biased.fill(tables, rpb)
        return [{} if each is None else {"bias_tables": each[1]} for each in self._made]


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
