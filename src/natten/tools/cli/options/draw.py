"""Draw windows, masks, tiles, or a walk over the queries.

window   the tokens, one query, and what it attends; three axes become slices
mask     one row per query and one column per key, for at most 1024 tokens
tiles    one tile of queries, and the blocks of keys that a kernel visits for it
walk     an animation of one query after the other: a GIF, or an HTML page that
         follows the pointer

Pictures are SVG or, with matplotlib (pip install matplotlib), PNG. A GIF needs
matplotlib, too.
"""

from __future__ import annotations

import argparse

from ..outputs import output
from ..parser import Choice
from . import add_per_axis, add_window_arguments, not_negative, positive

USAGE = "[kind] -i N [N ...] [-w N [N ...]] [options]"
EPILOG = """examples:
  a 5x5 window near a corner:
    natten draw -i 11 11 -w 5 --query 1 9
  the queries that share a window, as PNG:
    natten draw -i 12 12 -w 6 -s 3 -o shared.png
  causal along time, dilated in space:
    natten draw -i 4 9 9 -w 3 3 3 --dilation 1 2 2 -c true false false
  the mask of a dilated 1-D window:
    natten draw mask -i 48 -w 7 --dilation 2
  the same pairs as a kernel computes them:
    natten draw mask -i 16 16 -w 7 --q-tile 4 4 --kv-tile 2 4
  one tile and its blocks:
    natten draw tiles -i 24x24 -w 9 --q-tile 4x8 --kv-tile 4x4
  windows at the end of a ring:
    natten draw -i 12 12 -w 5 --boundary circular --query 0 11
  the last three frames of a video, cut where it starts and causal in time:
    natten draw -i 6x8x8 -w 4x3x3 -c true,0,0 --boundary truncate,shift,shift \\
        --query-offset 3x0x0
  queries twice as fine as keys:
    natten draw -i 8 8 -w 3 --queries-per-key 2
  an animation, and a page to point at:
    natten draw walk -i 8 8 -w 3 -o walk.gif
    natten draw walk -i 12 12 -w 5 -s 2 -o walk.html
"""
KINDS = ("window", "mask", "tiles", "walk")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``natten draw``; the window's have the names that the profiler uses."""
    parser.epilog = EPILOG
    parser.add_argument(
        "kind", nargs="?", default="window", type=Choice(KINDS), metavar="kind",
        help="window, mask, tiles or walk; default: window",
    )  # fmt: skip
    add_window_arguments(parser, "window")
    picture = parser.add_argument_group("picture")
    add_per_axis(
        picture, "-q", "--query", type=not_negative,
        help="position of the query, one number per axis; default: the middle",
    )  # fmt: skip
    for option, what in (("--q-tile", "queries in a tile"), ("--kv-tile", "keys in a block")):
        add_per_axis(picture, option, type=positive, help=f"{what}, one size per axis")
    picture.add_argument("--title", default="", help="a line above")
    picture.add_argument("--no-legend", action="store_true", help="leave the colors unexplained")
    picture.add_argument(
        "-o", "--output", type=output, metavar="FILE",
        help="where to write: .svg or .png; walk: .gif or .html; default: natten-KIND.svg or .gif "
        "(.html without matplotlib); - writes the default's format to standard output",
    )  # fmt: skip
