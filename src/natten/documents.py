"""Packed documents in the form that kernels read: a table of where each begins, and its windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .neighborhood import Neighborhood


class Sizes(NamedTuple):
    """What plans of packed documents are made for.

    Attributes:
        number: how many documents there are.
        space, key_space: for each axis a length that no document exceeds.
    """

    number: int
    space: tuple[int, ...]
    key_space: tuple[int, ...]


class Documents(NamedTuple):
    """Packed documents in the form that kernels read.

    Attributes:
        table: int64 ``[documents, 16]``. A row holds the first token of the queries and of the
            keys, the lengths of three axes, the number of keys on the last axis, window, stride and
            dilation of three axes each, and a 0. Axes that a layout lacks come first and have
            length 1.
        sizes: how many they are, and how long.
    """

    table: Tensor
    sizes: Sizes

    @classmethod
    def of_layouts(
        cls, shapes: Sequence[tuple[int, ...]], rule: Neighborhood, device: torch.device
    ) -> Documents:
        """Documents of these layouts; windows that exceed a document are clamped to it.

        Documents without tokens are left out, because nothing is read or written for them.
        """
        missing = [1] * (3 - rule.rank)
        rows, first = [], 0
        shapes = [shape for shape in shapes if 0 not in shape]
        for shape in shapes:
            own = rule.fitted(shape)
            window = [
                n for each in (own.kernel_size, own.stride, own.dilation) for n in (*missing, *each)
            ]
            rows.append([first, first, *missing, *shape, shape[-1], *window, 0])
            first += math.prod(shape)
        longest = tuple(roomy(max(lengths)) for lengths in zip(*shapes))
        host = torch.tensor(rows, dtype=torch.int64, device="cpu")
        return cls(host.to(device, non_blocking=True), Sizes(len(rows), longest, longest))

    @classmethod
    def of_sequences(cls, starts: Sequence[Tensor], longest: Sequence[int]) -> Documents:
        """Sequences of queries and of keys for plain attention.

        Args:
            starts: two cumulative sums ``[sequences + 1]``, of queries and of keys.
            longest: for each of them a length that no sequence exceeds.
        """
        table = starts[0].new_ones(len(starts[0]) - 1, 16, dtype=torch.int64)
        for side, start in enumerate(starts):
            table[:, side] = start[:-1]
            table[:, 4 + side] = start.diff()
        space, key_space = ((roomy(length),) for length in longest)
        return cls(table, Sizes(len(table), space, key_space))


def roomy(length: int) -> int:
    """``length`` rounded up to three binary digits, by at most a quarter, so that few different
    sizes need a plan."""
    step = max(length.bit_length() - 3, 0)
    return -(-length >> step) << step


@lru_cache(maxsize=1024)
def roomy_layout(layout: tuple[int, ...]) -> tuple[int, ...]:
    """A token layout with every axis rounded up as :func:`roomy` does."""
    return tuple([roomy(length) for length in layout])
