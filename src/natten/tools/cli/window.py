"""The window that the options of a command describe."""

from __future__ import annotations

import argparse
from typing import Any

from ...errors import ArgumentError
from ...neighborhood import Neighborhood
from ..layouts import query_layout


def window_of(args: argparse.Namespace) -> tuple[Neighborhood, tuple[int, ...]]:
    """The window that the arguments describe, and the token layout of the queries, checked.

    Raises:
        ArgumentError: an option has the wrong number of entries, or a value that is not allowed.
    """
    shape = tuple(args.input_size)
    if len(shape) > 3:
        raise ArgumentError(f"`--input-size` must have one to three axes, got {len(shape)}.")

    def per_axis(option: str, values: list[Any]) -> tuple[Any, ...]:
        if len(values) not in (1, len(shape)):
            raise ArgumentError(
                f"`--{option}` must have 1 entry or one per axis of `--input-size` "
                f"({len(shape)}), got {len(values)}."
            )
        return tuple(values * len(shape) if len(values) == 1 else values)

    dilation = per_axis("dilation", args.dilation)
    if args.window_size is None:
        kernel_size: tuple[int, ...] = tuple(max(1, n // d) for n, d in zip(shape, dilation))
    else:
        kernel_size = per_axis("window-size", args.window_size)
    offset = None if args.query_offset is None else per_axis("query-offset", args.query_offset)
    rule = Neighborhood.create(
        len(shape),
        kernel_size,
        per_axis("stride", args.stride),
        dilation,
        per_axis("causal", args.causal),
        per_axis("boundary", args.boundary),
        per_axis("queries-per-key", args.queries_per_key),
        offset,
    )
    queries = None if args.query_shape is None else per_axis("query-shape", args.query_shape)
    return rule, query_layout(rule, shape, queries)
