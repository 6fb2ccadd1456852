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
from ..triton.backward import rpb_grad_sum_kernel
from ..triton.launch import Launch, Wrapped, per_axis, summed
from ..triton.plan import MOST_SUMS
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
    """

    def __init__(
        self,
        launch: Launch | Passes,
        table: Table,
        kernel_size: Shape,
        heads: int,
        scale: float,
        is_reversed: bool = False,
    ) -> None:
        self.launch, self.shape = launch, (heads, table.size)
        self.make = Launch(
            bias_table_kernel, (-(-table.size // 1024), heads),
            {
                **per_axis("K", kernel_size), **per_axis("B", table.before),
                "T0": table.strides[0], "T1": table.strides[1], "size": table.size,
                "sign": -1 if is_reversed else 1, "scale": scale, "N": 1024,
            },
        )  # fmt: skip

    def moved(self, *where: Any) -> Biased:
        """As :meth:`Launch.moved`."""
        found = object.__new__(Biased)
        found.__dict__.update(self.__dict__)
        found.launch = self.launch.moved(*where)
        return found

    def run(self, rpb: Tensor, **tensors: Tensor | None) -> None:
        """As :meth:`Launch.run`, with ``rpb`` instead of the tables."""
        tables = rpb.new_empty(self.shape, dtype=torch.float32)
        self.make.run(rpb=rpb, tables=tables)
        self.launch.run(**tensors, bias_tables=tables)


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
    positions."""
    k = rule.kernel_size[axis]
    # A window begins half of it before its query, at the ends of an axis up to all of it.
    apart = -(k // 2) - -(-(k - 1 - k // 2) // block) * block
    blocks = -(-(tile + k - 1 - apart) // block)
    start, end = rule.windows(axis, torch.arange(n, device="cpu"), n)
    first = torch.arange(0, n, tile, device="cpu")
    low, high = start[first, None], end[(first + tile - 1).clamp(max=n - 1), None]
    begin = first[:, None] + apart + block * torch.arange(blocks, device="cpu")  # [tiles, blocks]
    counts = ((begin < high) & (begin + block > low)).sum(0)
    return apart, blocks, int(counts.sum()), int(counts.max())


@lru_cache(maxsize=64)
def cut(rule: Neighborhood, space: Shape) -> Cut:
    """The cut with the fewest steps, and of those the one with the fewest blocks."""
    lengths = tuple(group_length(n, d, 0) for n, d in zip(space, rule.dilation))
    missing = 3 - len(space)

    @cache
    def of_axis(axis: int, tile: int, block: int) -> tuple[int, ...]:
        if axis < missing:
            return 0, 1, 1, 1
        return _cut(rule, axis - missing, lengths[axis - missing], tile, block)

    found = []
    shapes = tile_shapes(ROWS, lengths)
    for tile in shapes:
        for block in shapes:
            apart, blocks, steps, most = zip(*map(of_axis, range(3), tile, block))
            found.append(Cut(tile, block, apart, blocks, math.prod(steps), math.prod(most)))
    return min(found, key=lambda each: (each.steps, math.prod(each.blocks)))


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
        blocks = math.prod(cut.blocks)
        offsets = math.prod(2 * k - 1 for k in kernel_size)
        self.launch = launch
        self.shape = splits, heads, blocks, math.prod(cut.tile), math.prod(cut.block)
        arguments = {
            **per_axis("K", kernel_size), **per_axis("O", cut.apart), "B1": cut.blocks[1],
            "B2": cut.blocks[2], "first_head": 0, "blocks": blocks, "splits": 1,
            "offsets": offsets, "Q_BLOCK": cut.tile, "KV_BLOCK": cut.block, "BLOCK": 32,
        }  # fmt: skip
        grid = -(-offsets // 32), splits * heads  # each split by itself, as so many heads
        self.add_up = Launch(rpb_grad_sum_kernel, grid, arguments)

    def run(self, rpb: Tensor, **tensors: Tensor | None) -> Tensor:
        """The gradient of a contiguous bias."""
        splits, *others = self.shape
        sums = rpb.new_empty(splits, *others, dtype=torch.float32)
        grads = rpb.new_empty(splits, *rpb.shape, dtype=torch.float32)
        self.launch.run(rpb, **tensors, sums=sums)
        self.add_up.run(sums=sums, grad_rpb=grads)
        return summed(grads, 0).to(rpb.dtype)


def programs_of(dim: int, value_dim: int) -> int:
    """Programs of a multiprocessor that sum dS: with 128 channels registers suffice for two."""
    return 3 if max(native(dim), native(value_dim)) <= 64 else 2


def splits_of(cut: Cut, sets: int, heads: int, programs: int) -> int:
    """In how many splits tiles of ``sets`` batch entries and dilation groups are summed, so that
    about as many ``programs`` have about as many; 0 if the sums would take too much memory."""
    each = -(-cut.steps * sets * heads // programs)
    sums = heads * math.prod(cut.blocks) * ROWS * ROWS
    return min(-(-cut.most * sets // each), MOST_SUMS // sums)


def stages_of(dim: int, value_dim: int) -> int:
    """How many tiles and blocks, which have as many tokens, fit the shared memory of a program."""
    stage = 2 * ROWS * (2 * (native(dim) + native(value_dim)) + 8)
    return min(4, (SHARED_MEMORY[90] // programs_of(dim, value_dim) - 2048) // stage)
