"""The queries of a picture, a prediction or a measurement: their token layout, and its words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .._numbers import entries, integer
from ..errors import ArgumentError
from ..neighborhood import Neighborhood


def query_layout(
    rule: Neighborhood, shape: tuple[int, ...], query_shape: int | Sequence[int] | None = None
) -> tuple[int, ...]:
    """The token layout of queries that attend keys of the layout ``shape``, checked.

    Args:
        rule: which key a query attends.
        shape: the keys' layout.
        query_shape: the queries' layout; None stands for all of them from ``query_offset`` on.

    Raises:
        ArgumentError: the windows or the queries do not fit the keys.
    """
    if len(shape) != rule.rank:
        rule.check(shape, shape)  # says so
    if query_shape is None:
        whole = tuple(r * n for r, n in zip(rule.queries_per_key, shape))
        queries = tuple(n - o for n, o in zip(whole, rule.offset))
        if min(queries) < 1:
            raise ArgumentError(
                "`query_offset` must leave at least one query on every axis, got "
                f"{rule.query_offset} of {whole} queries."
            )
    else:
        queries = _lengths(query_shape, len(shape))
    rule.check(queries, shape)
    return queries


def _lengths(query_shape: Any, rank: int) -> tuple[int, ...]:
    given = entries(query_shape)
    lengths = tuple(integer(n) for n in ((query_shape,) if given is None else given))
    if len(lengths) != rank or not all(n is not None and n >= 1 for n in lengths):
        raise ArgumentError(
            f"`query_shape` must be {rank} integers of at least 1, one per axis, got "
            f"{query_shape!r}."
        )
    return lengths


def words(rule: Neighborhood, queries: Sequence[int]) -> list[str]:
    """What boundaries and queries are, in a phrase each; nothing of what is the default."""
    found = []
    if any(border != "shift" for border in rule.boundary):
        is_one = len(set(rule.boundary)) == 1
        found.append(f"boundary {'/'.join(rule.boundary[:1] if is_one else rule.boundary)}")
    if math.prod(rule.queries_per_key) > 1:
        found.append(f"{by(rule.queries_per_key)} queries per key")
    if rule.query_offset is not None:
        found.append(f"{by(queries)} queries from {by(rule.query_offset)} on")
    return found


def by(sizes: Sequence[int]) -> str:
    """``8x16`` for ``(8, 16)``."""
    return "x".join(map(str, sizes))
