"""What ``natten simulate`` does: it predicts strides or windows, and prints them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace

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
from .outputs import STDOUT, write
from .tables import duration, print_table, progress, say
from .window import window_of


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
    with progress() as status:
        if args.near is None:
            every = simulate_strides(shape, rule.kernel_size, step=status, **options)
            rows = every if args.all else _worth_showing(every, wish)
            title = f"{len(rows)} of {len(every)} strides, finest first:"
            possible = math.prod(rule.kernel_size)
            if len(every) < possible and "circular" not in rule.boundary:
                title = (
                    f"The window has {possible} strides. Along some axes, only powers of two and "
                    f"the whole window were tried. {title}"
                )
        else:
            front = recommend(
                shape, rule.kernel_size, rule.stride, near=args.near, step=status, **options
            )
            rows = front if args.all else _around(front, wish, args.top)
            title = (
                f"The wish, then {len(rows)} of {len(front)} Pareto-best windows, fastest first:"
            )
            rows = [wish, *rows]
    if args.json is not None:
        write(args.json, json.dumps([row.as_dict() for row in rows], indent=2))
        if args.json == STDOUT:
            return 0
    device = options["device"]
    layer = [f"{len(shape)}-D {by(shape)}", f"window {by(rule.kernel_size)}"]
    layer += [*words(rule, queries), f"batch {args.batch_size}", f"heads {args.heads}"]
    layer += [f"dim {args.dim}"]
    say(", ".join(layer))
    say(
        f"{device.name}: {device.tflops:g} TFLOP/s, {device.bandwidth:g} TB/s, "
        f"{_tiles(args, device, wish)}"
    )
    say(
        f"Dense attention: {duration(wish.dense_us)}. Needed: {100 * wish.kept:.3g}% of the "
        f"query-key pairs, so at most {wish.flop_bound:.1f}x by FLOPs."
    )
    _print(rows, wish, title)
    return 0


def _device(args: argparse.Namespace) -> Device:
    rates = {name: getattr(args, name) for name in ("tflops", "bandwidth", "exponentials")}
    given = {name: rate for name, rate in rates.items() if rate is not None}
    device = DEVICES[args.device]
    return replace(device, name="as given", **given) if given else device


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
        "window", "stride", "time", "speed-up", "by tiling", "computed/needed", "full blocks",
        "queries", "keys", "kept", "bound by",
    )  # fmt: skip
    wished = (wish.kernel_size, wish.stride)
    cells = [
        (
            by(row.kernel_size),
            by(row.stride),
            duration(row.time_us),
            f"{row.speedup:.1f}x",
            f"{row.tile_bound:.1f}x",
            f"{row.computed_over_needed:.2f}",
            "all" if row.is_full else f"{min(row.full_blocks, 0.99):.0%}",  # 100 % would mean all
            by(row.q_tile),
            by(row.kv_tile),
            f"{row.kept:.2%}",
            row.bound_by,
        )
        for row in rows
    ]
    at = [number for number, row in enumerate(rows) if (row.kernel_size, row.stride) == wished]
    print_table(title, header, cells, bold=at[0] if at else None, keys=2)
