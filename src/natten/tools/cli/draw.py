"""Draw what a query attends, the attention mask, how tiles cover it, or a walk over the queries.

window   the tokens, one query, and what it attends; three axes become slices
mask     one row per query and one column per key, for at most 1024 tokens
tiles    one tile of queries, and the blocks of keys that a kernel visits for it
walk     an animation of one query after the other: a GIF, or an HTML page that follows the pointer

Pictures are SVG or, with matplotlib (pip install matplotlib), PNG.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import ArgumentError
from ...neighborhood import Neighborhood
from .. import draw
from ..layouts import by, words
from .options import add_window_arguments, not_negative, positive, window_of

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
    natten draw tiles -i 24 24 -w 9 --q-tile 4 8 --kv-tile 4 4
  windows at the end of a ring:
    natten draw -i 12 12 -w 5 --boundary circular --query 0 11
  the last three frames of a video, the first axis causal and cut where it starts:
    natten draw -i 6 8 8 -w 4 3 3 -c true 0 0 --boundary truncate shift shift --query-offset 3 0 0
  queries twice as fine as keys:
    natten draw -i 8 8 -w 3 --queries-per-key 2
  an animation, and a page to point at:
    natten draw walk -i 8 8 -w 3 -o walk.gif
    natten draw walk -i 12 12 -w 5 -s 2 -o walk.html
"""
KINDS: dict[str, Callable[..., Any]] = {
    "window": draw.draw_neighborhood,
    "mask": draw.draw_mask,
    "tiles": draw.draw_tiles,
    "walk": draw.draw_walk,
}
# The kinds of picture that have an option; with any other kind it is an error.
USES = {"query": ("window", "tiles"), "q_tile": ("mask", "tiles"), "kv_tile": ("mask", "tiles")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``natten draw``; the window's have the names that the profiler uses."""
    parser.epilog = EPILOG
    parser.add_argument(
        "kind", nargs="?", default="window", choices=KINDS, help="what to draw; default: window"
    )
    add_window_arguments(parser, "window")
    picture = parser.add_argument_group("picture")
    picture.add_argument(
        "-q", "--query", nargs="+", type=not_negative, metavar="X",
        help="position of the query, one number per axis; default: the middle",
    )  # fmt: skip
    for option, what in (("--q-tile", "queries in a tile"), ("--kv-tile", "keys in a block")):
        picture.add_argument(
            option, nargs="+", type=positive, metavar="N", help=f"{what}, one size per axis"
        )
    picture.add_argument("--title", default="", help="a line above")
    picture.add_argument("--no-legend", action="store_true", help="leave the colors unexplained")
    picture.add_argument(
        "-o", "--output", metavar="FILE",
        help="where to write: .svg or .png; walk: .gif or .html; default: natten-KIND.svg or .gif; "
        "- writes the default's format to standard output",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the picture and say where."""
    rule, queries = window_of(args)
    for option, kinds in USES.items():
        if getattr(args, option) is not None and args.kind not in kinds:
            name = option.replace("_", "-")
            raise ArgumentError(f"`--{name}` is for {' and '.join(kinds)}, not for {args.kind}.")
    if args.kind == "tiles" and not (args.q_tile and args.kv_tile):
        raise ArgumentError("`tiles` needs `--q-tile` and `--kv-tile`, one size per axis.")
    options: dict[str, Any] = {
        name: tuple(getattr(args, name)) for name in USES if getattr(args, name) is not None
    }
    if args.kind != "walk":
        options["legend"] = not args.no_legend
    title = args.title
    if args.kind == "tiles":  # draw_tiles writes a caption of its own
        title = title or _caption(args, rule, queries)
    else:
        options["caption"] = _caption(args, rule, queries)
    names = "boundary", "queries_per_key", "query_offset"
    options |= {name: getattr(rule, name) for name in names}
    window = (rule.kernel_size, rule.stride, rule.dilation, rule.is_causal)
    draw_to = partial(
        KINDS[args.kind], tuple(args.input_size), *window, query_shape=queries, title=title,
        **options,
    )  # fmt: skip
    default = f"natten-{args.kind}.{'gif' if args.kind == 'walk' else 'svg'}"
    if args.output == "-":
        with tempfile.TemporaryDirectory() as folder:
            draw_to(path=Path(folder, default))
            sys.stdout.buffer.write(Path(folder, default).read_bytes())
    else:
        path = Path(args.output or default)
        draw_to(path=path)
        print(f"wrote {path}")
    return 0


def _caption(args: argparse.Namespace, rule: Neighborhood, queries: tuple[int, ...]) -> str:
    parts = [f"window {by(rule.kernel_size)}"]
    parts += [f"stride {by(rule.stride)}"] if max(rule.stride) > 1 else []
    parts += [f"dilation {by(rule.dilation)}"] if max(rule.dilation) > 1 else []
    causal = [str(axis) for axis, is_causal in enumerate(rule.is_causal) if is_causal]
    parts += [f"causal along axis {', '.join(causal)}"] if causal else []
    parts += words(rule, queries)
    if args.kind == "window" and args.query is not None:
        parts.append(f"query at {', '.join(map(str, args.query))}")
    if args.kind == "mask":
        for sizes, what in (
            (args.q_tile, "tiles of {} queries"),
            (args.kv_tile, "blocks of {} keys"),
        ):
            parts += [what.format(by(sizes))] if sizes else []
    return ", ".join(parts)
