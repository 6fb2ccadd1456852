"""How kernels cut a layer into tiles of queries and blocks of keys, and what that costs them.

There are two models: kernels of which only the sizes of tiles and blocks are known, and our Hopper
kernels, whose own estimate says what they choose. :mod:`.counting` counts blocks for both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...backends.hopper import costs, cuts
from ...backends.hopper.tiles import cuttings
from ...backends.interface import Tiles

Shape = tuple[int, ...]


class Tiling(NamedTuple):
    """The queries and keys that one warpgroup computes in one step.

    The ``q_block`` of ``warpgroups`` warpgroups are neighbors along ``split_axis`` and make one
    tile. The blocks of keys of a tile start where its first window starts, and each warpgroup
    visits those of them that it needs.
    """

    q_block: Shape
    kv_block: Shape
    split_axis: int = 0
    warpgroups: int = 1

    @property
    def pairs(self) -> int:
        """Query-key pairs of one step."""
        return math.prod(self.q_block + self.kv_block)

    @property
    def tile(self) -> Shape:
        """Queries of all warpgroups."""
        factors = (self.warpgroups if a == self.split_axis else 1 for a in range(len(self.q_block)))
        return tuple(q * factor for q, factor in zip(self.q_block, factors))


class Axis(NamedTuple):
    """Counts of one axis for one tiling; one entry per window and stride.

    They are float64, because counts of three axes are multiplied.
    """

    needed: Tensor  # query-key pairs
    visited: Tensor  # blocks of keys, summed over the blocks of queries that visit them
    full: Tensor  # how many of them every query of the block attends in full
    most: Tensor  # blocks of keys of the block of queries that visits the most
    fetched: Tensor  # blocks of keys fetched for a tile, summed over its warpgroups
    slides: Tensor  # whether each query's window starts one position after the previous one's
    q_blocks: int  # blocks of queries

    def of(self, windows: Tensor) -> Axis:
        """The counts of some of the windows, given by their indices."""
        counts = {name: x[windows] for name, x in self._asdict().items() if name != "q_blocks"}
        return self._replace(**counts)


class Kernel(Protocol):
    """What the simulator asks of a model of kernels; results have one entry per combination.

    ``number`` is the index of a tiling in ``tilings``.
    """

    name: str
    tilings: list[Tiling]  # the first of those with equal cost is taken

    def least(self, number: int, visited: float, q_blocks: float) -> float:
        """A lower bound of :meth:`cost` that is computed at once from numbers."""

    def cost(self, number: int, axes: Sequence[Axis]) -> Tensor:
        """The cost by which tilings are compared, in any unit."""

    def overhead(self, number: int, axes: Sequence[Axis]) -> Tensor:
        """The work of masking and of waiting, as a fraction of the products."""


def outer(vectors: Sequence[Tensor]) -> Tensor:
    """The product of one entry per axis, for every combination, flat."""
    product = vectors[0]
    for vector in vectors[1:]:
        product = (product[:, None] * vector).flatten()
    return product


def _blocks(axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """Blocks of keys that are visited, and how many of them are full."""
    return outer([axis.visited for axis in axes]), outer([axis.full for axis in axes])


def tile_shapes(count: int, lengths: Sequence[int]) -> list[Shape]:
    """Powers of two, one per axis, whose product is ``count``.

    No axis exceeds the power of two that covers its length, except for the last one of a layout
    that has fewer tokens than ``count``.
    """
    most = [max(1, 1 << (n - 1).bit_length()) for n in lengths]
    most[-1] = max(most[-1], count // math.prod(most[:-1]))
    sizes = [[1 << i for i in range(count.bit_length()) if 1 << i <= m] for m in most]
    return [shape for shape in itertools.product(*sizes) if math.prod(shape) == count]


class Sized:
    """Kernels with tiles and blocks of these shapes, which mask partial blocks only."""

    name = ""

    def __init__(self, queries: Sequence[Shape], keys: Sequence[Shape], masking: float) -> None:
        self.tilings = [Tiling(*each) for each in itertools.product(queries, keys)]
        self.fraction = masking

    def least(self, number: int, visited: float, q_blocks: float) -> float:
        """The cost if no block had a mask."""
        return visited * self.tilings[number].pairs

    def cost(self, number: int, axes: Sequence[Axis]) -> Tensor:
        """Pairs computed; those of partial blocks cost more by the fraction of masking."""
        visited, full = _blocks(axes)
        return (visited + self.fraction * (visited - full)) * self.tilings[number].pairs

    def overhead(self, number: int, axes: Sequence[Axis]) -> Tensor:
        """The masks of partial blocks."""
        visited, full = _blocks(axes)
        return self.fraction * (1 - full / visited)


class Hopper:
    """The forward kernels of the ``hopper`` backend, which choose by the same estimate.

    Masks are part of a compiled kernel: if one block needs a product that masks it, all blocks have
    one. Partial blocks alone are compared.
    """

    name = "hopper"

    def __init__(self, lengths: Sequence[int], dim: int, masking: float) -> None:
        self.work, self.fraction = costs.work("forward", dim, dim), masking
        self.found = cuttings(lengths, self.work)
        missing = 3 - len(lengths)
        self.tilings = [
            Tiling(
                each.q_block[missing:],
                each.kv_block[missing:],
                each.split_axis - missing,
                cuts.warpgroups(each),
            )
            for each in self.found
        ]
        self.bare = [costs.cycles(each, costs.Mask(), self.work) for each in self.found]
        self.kinds = cache(_kinds)

    def least(self, number: int, visited: float, q_blocks: float) -> float:
        """The cost if no block had a mask."""
        bare = self.bare[number]
        return visited * bare.block + q_blocks * bare.tile

    def cost(self, number: int, axes: Sequence[Axis]) -> Tensor:
        """Cycles of a multiprocessor; infinite where the tiles with their masks do not fit it."""
        q_blocks = math.prod(axis.q_blocks for axis in axes)
        visited, full = _blocks(axes)
        cost = visited * (1 + self._idle(axes)) * self._by_mask(number, axes, 0)
        partial = (visited - full) * self._by_mask(number, axes, 1)
        return cost + partial + q_blocks * self.bare[number].tile

    def overhead(self, number: int, axes: Sequence[Axis]) -> Tensor:
        """Masks, by a step of the product or by comparisons, and blocks released unread."""
        visited, full = _blocks(axes)
        of_product, of_compare = (self._by_mask(number, axes, what) for what in (2, 3))
        return of_product + of_compare * (1 - full / visited) + self._idle(axes)

    def _idle(self, axes: Sequence[Axis]) -> Tensor:
        """The cost of blocks that a warpgroup releases unread, per visited block."""
        return cuts.IDLE * (outer([axis.fetched / axis.visited for axis in axes]) - 1)

    def _by_mask(self, number: int, axes: Sequence[Axis], what: int) -> Tensor:
        """Of :func:`_priced`, one number for every combination."""
        kinds, indices = zip(*(self.kinds(axis, axis is axes[-1]) for axis in axes))
        values = [self._priced(number, kind)[what] for kind in itertools.product(*kinds)]
        table = torch.tensor(values, dtype=torch.float64, device="cpu").view(*map(len, kinds))
        for axis, index in reversed(list(enumerate(indices))):
            table = table.index_select(axis, index)
        return table.flatten()

    def _priced(self, number: int, kinds: tuple[_Masked, ...]) -> tuple[float, ...]:
        tiles = self.found[number]
        missing = 3 - len(kinds)
        axes = [
            cuts.Axis(tile, block, 1, 1, 1, 1, most, masked)
            for tile, block, (masked, _, most) in zip(
                tiles.q_block, tiles.kv_block, (*[_Masked(False, False, 1)] * missing, *kinds)
            )
        ]
        mask = costs.mask_of(kinds[-1].slides, axes, tiles, self.work)
        return _priced(tiles, mask, self.work, self.fraction)


class _Masked(NamedTuple):
    """What decides how one axis is masked."""

    masked: bool
    slides: bool
    most: int


def _kinds(axis: Axis, is_last: bool) -> tuple[list[_Masked], Tensor]:
    """The distinct ways in which windows of an axis are masked, and each window's index in them."""
    masked = axis.full < axis.visited
    slides = masked & axis.slides & is_last
    rows = map(_Masked, masked.tolist(), slides.tolist(), (axis.most.long() * slides).tolist())
    index: dict[_Masked, int] = {}
    indices = [index.setdefault(row, len(index)) for row in rows]
    return list(index), torch.tensor(indices, device="cpu")


@lru_cache(maxsize=1 << 14)
def _priced(tiles: Tiles, mask: costs.Mask, work: costs.Work, masking: float) -> tuple[float, ...]:
    """The cycles of a block, and what a partial one costs more; the work of a mask as a fraction of
    the products, of any block and of partial ones."""
    fitted = costs.fitted(tiles, mask, work)
    if fitted is None:
        return math.inf, 0.0, 0.0, 0.0
    cycles = costs.cycles(fitted, mask, work)
    step = 16 * mask.steps / work.product_channels
    works = step * (mask.kind == costs.PRODUCT), masking * (mask.kind == costs.COMPARE)
    return cycles.block, cycles.compare, *works
