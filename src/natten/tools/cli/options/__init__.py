"""The options of every command; those that several commands share have the names of NATTEN's.

A module of this folder says by ``add_arguments(parser)`` what the command of its name takes; its
docstring describes the command. None of them imports PyTorch, so that help is printed at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from ...._submodules import getter
from ..outputs import output
from ..parser import Choice, Flat

__getattr__ = getter(__name__)
BOUNDARIES = ("shift", "truncate", "circular")
Value = TypeVar("Value")


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


def positive_real(text: str) -> float:
    """Parse a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def add_per_axis(
    group: Any, *names: str, type: Callable[[str], Value], metavar: str = "N", **options: Any
) -> None:
    """Add an option with one value per axis: ``8 16``, ``8x16`` or ``8,16``.

    Args:
        group: a parser, or a group of its options.
        names: of the option.
        type: parses one value.
        metavar, options: as in :meth:`argparse.ArgumentParser.add_argument`.
    """
    numbers = type in (positive, not_negative)

    def values(text: str) -> list[Value]:
        split = (text.replace("x", ",") if numbers else text).split(",")
        if "" in split:
            raise argparse.ArgumentTypeError(f"expected one value per axis, got {text!r}")
        return [type(each) for each in split]

    group.add_argument(
        *names, nargs="+", action=Flat, type=values, metavar=metavar, **options
    )  # fmt: skip


def add_window_arguments(parser: argparse.ArgumentParser, title: str) -> Any:
    """Add the options of layout and window, and return their group."""
    layer = parser.add_argument_group(
        title, "one value for all axes, or one per axis: 8 16, 8x16 or 8,16"
    )
    add_per_axis(
        layer, "-i", "--input-size", type=positive, required=True,
        help="token layout of the keys: length; height and width; or depth, height and width",
    )  # fmt: skip
    add_per_axis(
        layer, "-w", "--window-size", type=positive,
        help="tokens of the window (kernel_size); default: the whole layout (self attention)",
    )  # fmt: skip
    add_per_axis(
        layer, "-s", "--stride", type=positive, default=[1],
        help="queries that share a window; default: 1",
    )  # fmt: skip
    add_per_axis(
        layer, "--dilation", type=positive, default=[1],
        help="distance between tokens of a window; default: 1",
    )  # fmt: skip
    add_per_axis(
        layer, "-c", "--causal", type=boolean, default=[False], metavar="BOOL",
        help="whether queries attend no later token: true, false, 1 or 0; default: false",
    )  # fmt: skip
    add_per_axis(
        layer, "--boundary", type=Choice(BOUNDARIES), default=["shift"], metavar="WORD",
        help="what windows do at the ends of an axis: shift, truncate or circular; default: shift",
    )  # fmt: skip
    add_per_axis(
        layer, "--queries-per-key", type=positive, default=[1],
        help="how many queries stand at one key; default: 1",
    )  # fmt: skip
    add_per_axis(
        layer, "--query-offset", type=not_negative,
        help="for queries that are a part of the layout: how many come before them",
    )  # fmt: skip
    add_per_axis(
        layer, "--query-shape", type=positive,
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


def add_json(group: Any, what: str) -> None:
    """Add ``--json``, which all commands that print tables have."""
    group.add_argument(
        "--json", nargs="?", const="-", type=output, metavar="FILE",
        help=f"write {what} as JSON to a file, or instead of the tables to standard output",
    )  # fmt: skip
