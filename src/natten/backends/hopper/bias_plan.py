"""Launches of kernels that read a relative positional bias from tables, and of its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..interface import Shape
from ..triton.launch import Launch, Wrapped, per_axis
from .bias import bias_table_kernel
from .bias_sum import bias_sum_kernel
from .bias_tables import Table
from .passes import Passes
from .sets_plan import InSets


class Biased(Wrapped):
    """A launch that reads tables of the bias, which are made first, as its tiles need them.

    Args:
        launch: of the kernel that reads them.
        table: of a head.
        kernel_size, heads, scale: of the problem.
        is_reversed: rows of scores are keys.
        waits_at_end: tables are made while the kernel before runs, in memory that it does not use.
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
        waits_at_end: bool = False,
        overlap: bool = False,
    ) -> None:
        self.launch, self.shape = launch, (heads, table.size)
        self.make = Launch(
            bias_table_kernel, (-(-table.size // 1024), heads),
            {
                **per_axis("K", kernel_size), **per_axis("B", table.before),
                "T0": table.strides[0], "T1": table.strides[1], "size": table.size,
                "sign": -1 if is_reversed else 1, "scale": scale,
                "waits_at_end": int(waits_at_end), "N": 1024,
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


# Of the kernel that adds up splits.
_OFFSETS_AT_ONCE, _SPLITS_AT_ONCE = 16, 64


class BiasGradient:
    """The gradient of the bias: dS is summed over tiles pair by pair, then over the pairs that have
    the same bias, and these sums of all splits and blocks are added up.

    Args:
        tiles: how they are taken.
        launch: of the kernel that sums them.
    """

    def __init__(self, tiles: InSets, launch: Biased) -> None:
        self.launch = launch
        cut, region, (*_, heads) = tiles.cut, tiles.region, launch.grid
        programs = tiles.splits, heads, math.prod(tiles.programs_of_tile)
        self.shape = *programs, math.prod(cut.tile), math.prod(region)
        self.offsets_shape = *programs, math.prod(t + n - 1 for t, n in zip(cut.tile, region))
        kernel_size = tiles.rule.kernel_size
        offsets = math.prod(2 * k - 1 for k in kernel_size)
        self.add_up = Launch(
            bias_sum_kernel, (-(-offsets // _OFFSETS_AT_ONCE), heads),
            {
                **per_axis("K", kernel_size), **per_axis("A", cut.apart),
                **per_axis("B", tiles.programs_of_tile), "splits": tiles.splits,
                "TILE": cut.tile, "BLOCK": region,
                "OFFSETS": _OFFSETS_AT_ONCE, "SPLITS": _SPLITS_AT_ONCE,
            },
            launch_pdl=launch.make.options["launch_pdl"],
        )  # fmt: skip

    def run(self, rpb: Tensor, **tensors: Tensor | None) -> Tensor:
        """The gradient of a contiguous bias, whose tables may be given."""
        return self.added_up(rpb, self.summed(rpb, **tensors))

    def summed(
        self, rpb: Tensor, grad_query: Tensor | None = None, **tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The sums of each program; with ``grad_query``, it makes dQ."""
        sums = rpb.new_empty(self.shape, dtype=torch.float32)
        of_offsets = rpb.new_empty(self.offsets_shape, dtype=torch.float32)
        self.launch.run(
            rpb=rpb, **tensors, sums=sums, of_offsets=of_offsets, grad_query=grad_query
        )  # fmt: skip
        return sums, of_offsets

    def added_up(self, rpb: Tensor, summed: tuple[Tensor, Tensor]) -> Tensor:
        """The gradient of a bias like ``rpb`` of these sums."""
        grad = torch.empty_like(rpb)
        self.add_up.run(of_offsets=summed[1], grad_rpb=grad)
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
