"""How much a window can gain over dense attention, and which strides gain it.

Nothing runs. The bound by FLOPs is the number of all query-key pairs over the
number needed. The bound by tiling counts the pairs that a kernel computes,
because it works in whole tiles. Times are rooflines: the longest of products,
exponentials and memory at the device's peak rates.

The table has the finest stride and each coarser one that is faster than all
finer ones. If each of these needs masks, the finest stride of which all blocks
are full follows.
"""

from __future__ import annotations

import argparse

from ..parser import Choice
from . import add_json, add_layer_arguments, add_per_axis, positive, positive_real

USAGE = "-i N [N ...] [-w N [N ...]] [options]"
EPILOG = """examples:
  every stride of HunyuanVideo's window, on an H100:
    natten simulate -i 30 48 80 -w 18 24 24 -n 24
  the same, with one stride of your own in the table:
    natten simulate -i 30x48x80 -w 18x24x24 -s 16x8x8 -n 24
  windows up to 20 % smaller or larger that are best in kept pairs and time:
    natten simulate -i 256 256 -w 80 80 -n 24 --near 0.2
  a kernel that reorders tokens into tiles first, with its tile shapes:
    natten simulate -i 30x48x80 -w 18x24x24 --q-tile 4x8x8 --kv-tile 2x8x8 \\
        --aligned
  the frames of a video that come last, with those before them as keys:
    natten simulate -i 12x48x80 -w 8x24x24 -c 1,0,0 --query-offset 8x0x0 -n 24
  the same video on four GPUs, two along each of the last two axes:
    natten simulate -i 30x48x80 -w 18x24x24 -n 24 --ranks 1x2x2
  another device, from its data sheet:
    natten simulate -i 32768 -w 2048 --tflops 2250 --bandwidth 8 \\
        --exponentials 4.4
"""
DEVICES = ("a100", "cpu", "h100", "h200")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``natten simulate``."""
    parser.epilog = EPILOG
    add_layer_arguments(parser, head_dim=128)
    device = parser.add_argument_group("device", "rates replace those of --device")
    device.add_argument(
        "--device", type=Choice(DEVICES), default="h100", metavar="NAME",
        help=f"{', '.join(DEVICES[:-1])} or {DEVICES[-1]}; default: h100",
    )  # fmt: skip
    for rate, unit in (("tflops", "10^12 operations"), ("bandwidth", "10^12 bytes")):
        device.add_argument(
            f"--{rate}", type=positive_real, metavar="X", help=f"{unit} a second"
        )  # fmt: skip
    device.add_argument(
        "--exponentials", type=positive_real, metavar="X", help="10^12 exponentials a second"
    )
    for option, meaning in (("--q-tile", "queries in a tile"), ("--kv-tile", "keys in a block")):
        add_per_axis(
            device, option, type=positive,
            help=f"{meaning}, one size per axis; default: what the kernels choose",
        )  # fmt: skip
    device.add_argument(
        "--aligned", action="store_true",
        help="blocks of keys lie on a fixed grid; ours start where a tile's windows start",
    )  # fmt: skip
    device.add_argument(
        "--itemsize", type=positive, default=2, metavar="N", help="bytes of a number; default: 2"
    )
    several = parser.add_argument_group("several ranks")
    add_per_axis(
        several, "--ranks", type=positive,
        help="show what this many ranks along the first axes move, hold and gain, not strides",
    )  # fmt: skip
    several.add_argument(
        "--link", type=positive_real, default=450, metavar="X",
        help="10^9 bytes a second that a rank sends, and receives; default: 450",
    )  # fmt: skip
    several.add_argument(
        "--latency", type=positive_real, default=20, metavar="X",
        help="microseconds until a message's first byte arrives; default: 20",
    )  # fmt: skip
    what = parser.add_argument_group("what is shown")
    what.add_argument(
        "--near", type=float, metavar="X",
        help="show windows that differ by at most this fraction, instead of strides of one window",
    )  # fmt: skip
    what.add_argument(
        "--top", type=positive, default=12, metavar="N",
        help="with --near: show at most this many windows; default: 12",
    )  # fmt: skip
    what.add_argument("--all", action="store_true", help="show every stride, or every best window")
    add_json(what, "the rows")
