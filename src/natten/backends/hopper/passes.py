"""Launches that share what is compiled, and several in the place of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...tuning import cached
from ..triton.launch import Launch, Wrapped


@cached
def compiled(*constants: Any) -> list[Any]:
    """Where the kernel of these constants is kept, once it is compiled."""
    return []


class Passes(Wrapped):
    """Launches with the same tiles, each of which makes one of the gradients of keys and values."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.launches, self.launch = launches, launches[0]
        names = "value", "grad_key", "grad_value"
        self._unread = [[name for name in names if each.tensors[name] is None] for each in launches]

    def moved(self, grid: Sequence[int], *others: Any) -> Passes:
        """As :meth:`Launch.moved`."""
        return Passes([each.moved((grid[0], *each.grid[1:]), *others) for each in self.launches])

    def run(self, **tensors: Tensor | None) -> None:
        """As :meth:`Launch.run`."""
        for each, unread in zip(self.launches, self._unread):
            each.run(**{**tensors, **dict.fromkeys(unread)})
