"""What sizes decide about packed documents: how many tiles they may have, and their launches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...documents import Sizes
from ...tiling import padded
from ..interface import Shape
from ..triton.launch import Launch, Wrapped
from .documents import TABLE_WIDTH, tile_table_kernel
from .passes import Passes

_AT_ONCE = 128  # documents that a program of the kernel looks at, and tiles that it writes


class Packed(Wrapped):
    """A launch that reads the table of tiles, which is made first.

    Args:
        launch: of the kernel that reads it.
        most: tiles that there are at most.
        number: documents.
        sizes: tokens of a tile, of three axes.
        of_keys: tiles are of keys.
        from_the_end: the last tile of a document comes first.
    """

    def __init__(
        self, launch: Launch | Passes, most: int, number: int, sizes: Shape, of_keys: bool,
        from_the_end: bool,
    ) -> None:  # fmt: skip
        self.launch, self.shape = launch, (1 + most, TABLE_WIDTH)
        constants = {"SIZES": sizes, "OF_KEYS": of_keys, "FROM_THE_END": from_the_end}
        self.make = Launch(
            tile_table_kernel, (number,), {"number": number, **constants, "N": _AT_ONCE}
        )

    def run(self, documents: Tensor, **tensors: Tensor | None) -> None:
        """As :meth:`Launch.run`, with the table of documents instead of that of tiles."""
        tile_table = torch.empty(self.shape, dtype=torch.int32, device=documents.device)
        self.make.run(documents=documents, tile_table=tile_table)
        self.launch.run(tile_table=tile_table, **tensors)


def most_tiles(documents: Sizes, tile: Shape, tokens: int, of_keys: bool) -> int:
    """How many tiles documents that have so many tokens together have at most."""
    space = documents.key_space if of_keys else documents.space
    counts = [-(-n // size) for n, size in zip(padded(space, 1), tile)]
    most = tokens // tile[2] + documents.number if len(space) == 1 else tokens
    return min(most, documents.number * math.prod(counts))
