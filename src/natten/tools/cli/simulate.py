"""How much a window can gain over dense attention, and which strides gain it.

Nothing runs. The bound by FLOPs is the number of all query-key pairs over the number needed. The
bound by tiling counts the pairs that a kernel computes, because it works in whole tiles. Times are
rooflines: the longest of products, exponentials and memory at the device's peak rates.

The table has the finest stride and each coarser one that is faster than all finer ones. If each of
these needs masks, the finest stride of which all blocks are full follows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace

from ...errors import ArgumentError
from ..layouts import by, words
from ..simulator import (
    DEVICES,
    Device,
    Prediction,
    recommend,
    recommended_strides,
    simulate,
    simulate_strides,
)
from . import ranks
from .options import add_layer_arguments, output, positive, window_of, write
from .tables import duration, print_table

EPILOG = """examples:
  every stride of HunyuanVideo's window, on an H100:
    natten simulate -i 30 48 80 -w 18 24 24 -n 24
  the same, with one stride of your own in the table:
    natten simulate -i 30 48 80 -w 18 24 24 -s 16 8 8 -n 24
  windows up to 20 % smaller or larger that are best in kept pairs and time:
    natten simulate -i 256 256 -w 80 80 -n 24 --near 0.2
  a kernel that reorders tokens into tiles first, with its tile shapes:
    natten simulate -i 30 48 80 -w 18 24 24 --q-tile 4 8 8 --kv-tile 2 8 8 --aligned
  the frames of a video that come last, with those before them as keys:
    natten simulate -i 12 48 80 -w 8 24 24 -c true 0 0 --query-offset 8 0 0 -n 24
  the same video on four GPUs, two along each of the last two axes:
    natten simulate -i 30 48 80 -w 18 24 24 -n 24 --ranks 1 2 2
  another device, from its data sheet:
    natten simulate -i 32768 -w 2048 --tflops 2250 --bandwidth 8 --exponentials 4.4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``natten simulate``."""
    parser.epilog = EPILOG
    add_layer_arguments(parser, head_dim=128)
    device = parser.add_argument_group("device", "rates replace those of --device")
    device.add_argument("--device", choices=sorted(DEVICES), default="h100", help="default: h100")
    device.add_argument("--tflops", type=float, metavar="X", help="10^12 operations a second")
    device.add_argument("--bandwidth", type=float, metavar="X", help="10^12 bytes a second")
    device.add_argument("--exponentials", type=float, metavar="X", help="10^12 a second")
    for option, meaning in (("--q-tile", "queries in a tile"), ("--kv-tile", "keys in a block")):
        device.add_argument(
            option, nargs="+", type=positive, metavar="N",
            help=f"{meaning}, one size per axis; default: what the kernels choose",
        )  # fmt: skip
    device.add_argument(
        "--aligned", action="store_true",
        help="blocks of keys lie on a fixed grid; ours start where a tile's windows start",
    )  # fmt: skip
    device.add_argument(
        "--itemsize", type=positive, default=2, metavar="N", help="bytes of a number; default: 2"
    )
    what = parser.add_argument_group("what is shown")
    what.add_argument(
        "--near", type=float, metavar="X",
        help="show windows that differ by at most this fraction, instead of strides of one window",
    )  # fmt: skip
    what.add_argument(
        "--top",
        type=positive,
        default=12,
        metavar="N",
        help="with --near: show at most this many windows; default: 12",
    )
    several = parser.add_argument_group("several ranks")
    several.add_argument(
        "--ranks", nargs="+", type=positive, metavar="N",
        help="show what this many ranks along the first axes move, hold and gain, not strides",
    )  # fmt: skip
    several.add_argument(
        "--link", type=float, default=450, metavar="X",
        help="10^9 bytes a second that a rank sends, and receives; default: 450",
    )  # fmt: skip
    several.add_argument(
        "--latency", type=float, default=20, metavar="X",
        help="microseconds until a message's first byte arrives; default: 20",
    )  # fmt: skip
    what.add_argument("--all", action="store_true", help="show every stride, or every best window")
    what.add_argument(
        "--json", nargs="?", const="-", type=output, metavar="FILE",
        help="write the rows as JSON to a file, or instead of the table",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Predict and print."""
    (rule, queries), shape = window_of(args), tuple(args.input_size)
    options = {
        "dilation": rule.dilation,
        "is_causal": rule.is_causal,
        "boundary": rule.boundary,
        "queries_per_key": rule.queries_per_key,
        "query_offset": rule.query_offset,
        "query_shape": queries,
        "device": _device(args),
        "batch": args.batch_size,
        "heads": args.heads,
        "head_dim": args.dim,
        "itemsize": args.itemsize,
        "q_tile": args.q_tile,
        "kv_tile": args.kv_tile,
        "aligned": args.aligned,
    }
    wish = simulate(shape, rule.kernel_size, rule.stride, **options)
    if args.ranks is not None:
        return ranks.run(args, rule, wish)
    if args.near is None:
        every = simulate_strides(shape, rule.kernel_size, **options)
        rows = every if args.all else _worth_showing(every, wish)
        title = f"{len(rows)} of {len(every)} strides, finest first:"
    else:
        front = recommend(shape, rule.kernel_size, rule.stride, near=args.near, **options)
        rows = front if args.all else _around(front, wish, args.top)
        title = f"The wish, then {len(rows)} of {len(front)} Pareto-best windows, fastest first:"
        rows = [wish, *rows]
    if args.json is not None:
        write(args.json, json.dumps([row.as_dict() for row in rows], indent=2))
        if args.json == "-":
            return 0
    device = options["device"]
    layer = [f"{len(shape)}-D {by(shape)}", f"window {by(rule.kernel_size)}"]
    layer += [*words(rule, queries), f"batch {args.batch_size}", f"heads {args.heads}"]
    layer += [f"dim {args.dim}"]
    print(
        f"{', '.join(layer)}\n{device.name}: {device.tflops:g} TFLOP/s, "
        f"{device.bandwidth:g} TB/s, {_tiles(args, device, wish)}\n"
        f"Dense attention: {duration(wish.dense_us)}. Needed: {wish.kept:.2%} of the "
        f"query-key pairs, so at most {wish.flop_bound:.1f}x by FLOPs."
    )
    _print(rows, wish, title)
    return 0


def _device(args: argparse.Namespace) -> Device:
    device = DEVICES[args.device]
    for name in ("tflops", "bandwidth", "exponentials"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ArgumentError(f"`--{name}` must be a number above 0, got {value}.")
        if value is not None:
            device = replace(device, name="as given", **{name: value})
    return device


def _tiles(args: argparse.Namespace, device: Device, wish: Prediction) -> str:
    """One phrase that says how the kernels are tiled."""
    if wish.backend:
        return f"tiles of our {wish.backend} backend"
    queries = by(args.q_tile) if args.q_tile else device.q_tile
    keys = by(args.kv_tile) if args.kv_tile else device.kv_tile
    blocks = "blocks as large as needed" if keys == 1 else f"blocks of {keys} keys"
    return f"tiles of {queries} queries, {blocks}{', on a fixed grid' if args.aligned else ''}"


def _worth_showing(every: Sequence[Prediction], wish: Prediction) -> list[Prediction]:
    """The recommended strides, one without masks if there is one, and the wish; finest first."""
    shown = recommended_strides(every)
    if not any(each.is_full for each in shown):
        shown += [each for each in every if each.is_full][:1]
    strides = {each.stride for each in shown} | {wish.stride}
    return [each for each in every if each.stride in strides]


def _around(front: Sequence[Prediction], wish: Prediction, most: int) -> list[Prediction]:
    """The ``most`` entries of the front that keep about as many pairs as the wish."""
    nearest = sorted(front, key=lambda each: abs(each.kept - wish.kept))[:most]
    return [each for each in front if each in nearest]


def _print(rows: Sequence[Prediction], wish: Prediction, title: str) -> None:
    header = (
        "window", "stride", "queries", "keys", "kept", "computed/needed", "full blocks",
        "by tiling", "time", "speed-up", "bound by",
    )  # fmt: skip
    wished = (wish.kernel_size, wish.stride)
    cells = [
        (
            by(row.kernel_size),
            by(row.stride),
            by(row.q_tile),
            by(row.kv_tile),
            f"{row.kept:.2%}",
            f"{row.computed_over_needed:.2f}",
            "all" if row.is_full else f"{min(row.full_blocks, 0.99):.0%}",  # 100 % would mean all
            f"{row.tile_bound:.1f}x",
            duration(row.time_us),
            f"{row.speedup:.1f}x",
            row.bound_by,
        )
        for row in rows
    ]
    at = [number for number, row in enumerate(rows) if (row.kernel_size, row.stride) == wished]
    print_table(title, header, cells, emphasized=at[0] if at else None)
