"""Options that several commands share; they have the names of NATTEN's profiler."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ...errors import ArgumentError
from ...neighborhood import BOUNDARIES, Neighborhood
from ..layouts import query_layout


def boolean(text: str) -> bool:
    """Parse ``true``, ``false``, ``1`` or ``0``."""
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected true, false, 1 or 0, got {text!r}")
    return values[text.lower()]


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """Parse an integer of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(
            f"expected an integer that is at least {least}, got {text!r}"
        )
    return number


def output(text: str) -> str:
    """Check that a file can be written, as far as one can tell beforehand; "-" is stdout."""
    path = Path(text)
    folder = path.parent
    if text == "-":
        return text
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(folder)!r} for {text!r}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} can not be written")
    return text


def write(target: str, text: str) -> None:
    """Write a text to a target that :func:`output` has checked."""
    if target == "-":
        print(text)
    else:
        Path(target).write_text(text + "\n", encoding="utf-8")


def add_window_arguments(parser: argparse.ArgumentParser, title: str) -> Any:
    """Add the options of layout and window, and return their group."""
    layer = parser.add_argument_group(title, "one number for all axes, or one per axis")
    layer.add_argument(
        "-i", "--input-size", nargs="+", type=positive, required=True, metavar="N",
        help="token layout of the keys: length; height and width; or depth, height and width",
    )  # fmt: skip
    layer.add_argument(
        "-w", "--window-size", nargs="+", type=positive, metavar="N",
        help="tokens of the window (kernel_size); default: the whole layout (self attention)",
    )  # fmt: skip
    layer.add_argument(
        "-s", "--stride", nargs="+", type=positive, default=[1], metavar="N",
        help="queries that share a window; default: 1",
    )  # fmt: skip
    layer.add_argument(
        "--dilation", nargs="+", type=positive, default=[1], metavar="N",
        help="distance between tokens of a window; default: 1",
    )  # fmt: skip
    layer.add_argument(
        "-c", "--causal", nargs="+", type=boolean, default=[False], metavar="BOOL",
        help="whether queries attend no later token: true, false, 1 or 0; default: false",
    )  # fmt: skip
    layer.add_argument(
        "--boundary", nargs="+", choices=BOUNDARIES, default=["shift"],
        help="what windows do at the ends of an axis; default: shift",
    )  # fmt: skip
    layer.add_argument(
        "--queries-per-key", nargs="+", type=positive, default=[1], metavar="N",
        help="how many queries stand at one key; default: 1",
    )  # fmt: skip
    layer.add_argument(
        "--query-offset", nargs="+", type=not_negative, metavar="N",
        help="for queries that are a part of the layout: how many come before them",
    )  # fmt: skip
    layer.add_argument(
        "--query-shape", nargs="+", type=positive, metavar="N",
        help="token layout of the queries; default: all from --query-offset on",
    )  # fmt: skip
    return layer


def add_layer_arguments(parser: argparse.ArgumentParser, head_dim: int) -> None:
    """Add the options of layout, window and sizes of an attention layer."""
    layer = add_window_arguments(parser, "layer")
    for names, what in ((("-b", "--batch-size"), "batch size"), (("-n", "--heads"), "heads")):
        layer.add_argument(
            *names, type=positive, default=1, metavar="N", help=f"{what}; default: 1"
        )
    layer.add_argument(
        "-d", "--dim", type=positive, default=head_dim, metavar="N",
        help=f"head dim; default: {head_dim}",
    )  # fmt: skip


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
