"""Windows of nearly the whole layout as plain attention of all tokens in a row.

Tiles waste much where they do not divide a layout: 8x8 queries cover 37x67 with 40x72. A row of all
tokens is cut once, at its end. So where windows hold nearly all pairs, it costs less to compute all
of them and to mask the others than to visit the blocks of windows.

Windows differ little along an axis then. Each has a column of two factors, as in a mask by a
product (``masks.py``): the factor of a query says which window it has along each axis, that of a
key which windows it is not in. Their product is 0, or -2^100 for each axis that hides the key. Both
are tables ``[tokens, COLUMNS]`` that all batch entries and heads share. They come with tiles and
blocks, as if heads had more channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ...neighborhood import Dense, Neighborhood, Rule, as_dense
from ..interface import Shape

COLUMNS = 16  # of a factor, the channels of one step of a product
_LEAST = 8  # windows hold at least this part of a layout, or nobody asks what they would cost


class Columns(NamedTuple):
    """Columns of three axes, one for each window along an axis where windows differ.

    Attributes:
        ends: one past the last column of each axis.
        by_position: per axis, whether a column stands for a query's position, else for the start
            of a window.
    """

    ends: Shape
    by_position: tuple[bool, ...]


@dataclass(frozen=True)
class Flat(Dense):
    """Plain attention of the tokens of a layout in a row, where ``rule`` hides some pairs.

    Without a rule it stands for all such problems, which have the same tiles.
    """

    rule: Neighborhood | None = None
    space: Shape = ()

    @property
    def columns(self) -> Columns:
        """The columns of the factors."""
        found = None if self.rule is None else columns_of(self.rule, self.space)
        assert found is not None
        return found


def columns_of_rule(rule: Rule) -> int:
    """How many channels a rule's factors have: none but of flat ones."""
    return COLUMNS if isinstance(rule, Flat) else 0


def flattened(rule: Rule, space: Shape) -> Dense | None:
    """The rule of the tokens in a row, if there is one: of queries that are the keys' own tokens,
    with few different windows."""
    if isinstance(rule, Dense) or not rule.is_self_attention:
        return None
    if _LEAST * math.prod(rule.kernel_size) < math.prod(space):  # windows are faster
        return None
    return _flattened(rule, space)


@lru_cache(maxsize=1024)
def _flattened(rule: Neighborhood, space: Shape) -> Dense | None:
    dense = as_dense(rule, space, space)
    if dense is not None:
        return dense
    return None if columns_of(rule, space) is None else Flat(rule=rule, space=tuple(space))


@lru_cache(maxsize=1024)
def columns_of(rule: Neighborhood, space: Shape) -> Columns | None:
    """The columns of windows of a layout, None if they are too many."""
    ends, by_position = [0] * (3 - len(space)), [False] * (3 - len(space))
    for axis, n in enumerate(space):
        count, of_positions = 0, False
        if as_dense(rule.of_axis(axis), (n,), (n,)) != Dense():
            if rule.boundary[axis] == "circular":
                return None
            moves = rule.boundary[axis] == "shift" and not rule.is_causal[axis]
            of_positions = not moves or rule.dilation[axis] > 1
            count = n if of_positions else n - rule.kernel_size[axis] + 1
        ends.append((ends[-1] if ends else 0) + count)
        by_position.append(of_positions)
    return None if ends[-1] > COLUMNS else Columns(tuple(ends), tuple(by_position))
