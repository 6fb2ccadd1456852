"""How kernels cut a layer into tiles of queries and boxes of keys, and what that costs them.

Two kinds: kernels of which only the sizes of tiles and boxes are known, and our Hopper kernels,
whose own estimate says what they choose. :mod:`natten.simulator` counts boxes for both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends.hopper import tiles as hopper

Shape = tuple[int, ...]


class Tiling(NamedTuple):
    """Blocks of queries, and boxes of keys.

    ``parts`` blocks that are neighbors along the axis ``split`` are a tile: their boxes start where
    the tile's first window starts, and each visits those of them that it needs.
    """

    query: Shape  # of a block
    key: Shape
    split: int = 0
    parts: int = 1

    @property
    def pairs(self) -> int:
        """Query-key pairs of a block and a box."""
        return math.prod(self.query + self.key)

    @property
    def tile(self) -> Shape:
        """Queries of all parts."""
        if self.parts == 1:
            return self.query
        return tuple(q * (self.parts if a == self.split else 1) for a, q in enumerate(self.query))


class Axis(NamedTuple):
    """Counts of one axis for one tiling; one entry per window and stride.

    float64: counts of three axes are multiplied.
    """

    needed: Tensor  # pairs
    visited: Tensor  # boxes, by every block
    whole: Tensor  # those that every query of their block attends whole
    most: Tensor  # boxes of the block that visits the most
    fetched: Tensor  # boxes that pass by every block, whether it visits them or not
    slides: Tensor  # whether every query has a window of its own, one position after the other
    blocks: int

    def of(self, windows: Tensor) -> Axis:
        """Of some of the windows."""
        counts = {name: x[windows] for name, x in self._asdict().items() if name != "blocks"}
        return self._replace(**counts)


class Kernel(Protocol):
    """What the simulator asks of a kind of kernel; results have an entry per combination."""

    name: str
    tilings: list[Tiling]  # of equal cost, the first is taken

    def least(self, number: int, visited: float, blocks: float) -> float:
        """A bound of :meth:`cost` of the tiling of this number, that takes no time."""

    def cost(self, number: int, axes: Sequence[Axis]) -> Tensor:
        """What tilings are chosen by, in any unit."""

    def overhead(self, number: int, axes: Sequence[Axis]) -> Tensor:
        """Work of masking and of waiting, as a fraction of the products."""


def outer(vectors: Sequence[Tensor]) -> Tensor:
    """The product of one entry per axis, for every combination, flat."""
    product = vectors[0]
    for vector in vectors[1:]:
        product = (product[:, None] * vector).flatten()
    return product


def _boxes(axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """Boxes visited, and those of them that are attended whole."""
    return outer([axis.visited for axis in axes]), outer([axis.whole for axis in axes])


def tile_shapes(count: int, lengths: Sequence[int]) -> list[Shape]:
    """Powers of two, one per axis, whose product is ``count``; no axis is far longer than needed.

    If the layout has too few tokens, the last axis is as long as it must be.
    """
    most = [max(1, 1 << (n - 1).bit_length()) for n in lengths]
    most[-1] = max(most[-1], count // math.prod(most[:-1]))
    sizes = [[1 << i for i in range(count.bit_length()) if 1 << i <= m] for m in most]
    return [shape for shape in itertools.product(*sizes) if math.prod(shape) == count]


class Sized:
    """Kernels with tiles and boxes of these shapes, which mask boxes that are attended in part."""

    name = ""

    def __init__(self, queries: Sequence[Shape], keys: Sequence[Shape], masking: float) -> None:
        self.tilings = [Tiling(*each) for each in itertools.product(queries, keys)]
        self.fraction = masking

    def least(self, number: int, visited: float, blocks: float) -> float:
        """Of boxes without masks."""
        return visited * self.tilings[number].pairs

    def cost(self, number: int, axes: Sequence[Axis]) -> Tensor:
        """Pairs computed, more of them where there are masks."""
        visited, whole = _boxes(axes)
        return (visited + self.fraction * (visited - whole)) * self.tilings[number].pairs

    def overhead(self, number: int, axes: Sequence[Axis]) -> Tensor:
        """Masks of the boxes that are attended in part."""
        visited, whole = _boxes(axes)
        return self.fraction * (1 - whole / visited)


class Hopper:
    """The forward of the ``hopper`` backend: as it estimates, so it chooses.

    Its masks are part of the compiled kernel, so that all boxes have one if some box needs it.
    """

    name = "hopper"

    def __init__(self, lengths: Sequence[int], dim: int, masking: float) -> None:
        self.work, self.fraction = hopper.work("forward", dim, dim), masking
        self.found = hopper.cuttings(lengths, self.work)
        missing = 3 - len(lengths)
        self.tilings = [
            Tiling(each.tile[missing:], each.box[missing:], each.split - missing, each.groups)
            for each in self.found
        ]
        self.bare = [hopper.prices(each, hopper.Mask(), self.work) for each in self.found]
        self.kinds = cache(_kinds)

    def least(self, number: int, visited: float, blocks: float) -> float:
        """Of boxes without masks."""
        box, block = self.bare[number]
        return visited * box + blocks * block

    def cost(self, number: int, axes: Sequence[Axis]) -> Tensor:
        """Cycles of a multiprocessor; infinite where masks leave no room."""
        block = math.prod(axis.blocks for axis in axes) * self.bare[number][1]
        visited = outer([axis.visited for axis in axes])
        boxes = visited * (1 + self._idle(axes))
        return boxes * self._by_mask(number, axes, 0) + block

    def overhead(self, number: int, axes: Sequence[Axis]) -> Tensor:
        """Masks, a step of the product or comparisons, and boxes that are handed back."""
        return self._by_mask(number, axes, 1) + self._idle(axes)

    def _idle(self, axes: Sequence[Axis]) -> Tensor:
        """Cost of boxes that are handed back, per visited box."""
        return hopper.IDLE * (outer([axis.fetched / axis.visited for axis in axes]) - 1)

    def _by_mask(self, number: int, axes: Sequence[Axis], what: int) -> Tensor:
        """The price of a box (0) or the work of its mask (1), for every combination."""
        kinds, places = zip(*(self.kinds(axis, axis is axes[-1]) for axis in axes))
        values = [self._priced(number, kind)[what] for kind in itertools.product(*kinds)]
        table = torch.tensor(values, dtype=torch.float64, device="cpu").view(*map(len, kinds))
        for axis, place in reversed(list(enumerate(places))):
            table = table.index_select(axis, place)
        return table.flatten()

    def _priced(self, number: int, kinds: tuple[_Masked, ...]) -> tuple[float, float]:
        tiles = self.found[number]
        missing = 3 - len(kinds)
        axes = [
            hopper.Axis(tile, box, 1, 1, 1, most, masked)
            for tile, box, (masked, _, most) in zip(
                tiles.tile, tiles.box, (*[_Masked(False, False, 1)] * missing, *kinds)
            )
        ]
        mask = hopper.mask_of(kinds[-1].slides, axes, tiles.split, tiles.groups, self.work)
        return _priced(tiles, mask, self.work, self.fraction)


class _Masked(NamedTuple):
    """What a mask needs to know of an axis."""

    masked: bool
    slides: bool
    most: int


def _kinds(axis: Axis, is_last: bool) -> tuple[list[_Masked], Tensor]:
    """How windows of an axis are masked, each way once, and which way each window is."""
    masked = axis.whole < axis.visited
    slides = masked & axis.slides & is_last
    rows = map(_Masked, masked.tolist(), slides.tolist(), (axis.most.long() * slides).tolist())
    places: dict[_Masked, int] = {}
    numbers = [places.setdefault(row, len(places)) for row in rows]
    return list(places), torch.tensor(numbers, device="cpu")


@lru_cache(maxsize=1 << 14)
def _priced(
    tiles: hopper.Tiles, mask: hopper.Mask, work: hopper.Work, masking: float
) -> tuple[float, float]:
    fitted = hopper.fitted(tiles, mask, work)
    if fitted is None:
        return math.inf, 0.0
    step = 16 * mask.steps / work.products
    masks = {hopper.NONE: 0.0, hopper.COMPARE: masking, hopper.PRODUCT: step}
    return hopper.prices(fitted, mask, work)[0], masks[mask.kind]
