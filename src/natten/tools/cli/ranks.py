"""``natten simulate --ranks``: what a layout on several ranks moves, holds and gains."""

from __future__ import annotations

import argparse
import json
import math

import torch

from ...distributed.planning import plan
from ...errors import ArgumentError
from ...neighborhood import Neighborhood
from ..simulator import Prediction
from .outputs import STDOUT, write

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def run(args: argparse.Namespace, rule: Neighborhood, whole: Prediction) -> int:
    """Predict and print. ``whole`` is the prediction of the layout on one rank."""
    shape = tuple(args.input_size)
    if len(args.ranks) > len(shape):
        raise ArgumentError(
            f"`--ranks` must have at most one number per axis of `--input-size` ({len(shape)}), "
            f"got {len(args.ranks)}."
        )
    if rule.query_offset is not None:
        raise ArgumentError(
            "`--ranks` is for queries that are the whole layout; leave out `--query-offset`."
        )
    if args.itemsize not in DTYPES:
        raise ArgumentError(
            f"`--itemsize` must be one of {list(DTYPES)} with `--ranks`, got {args.itemsize}."
        )
    fine = math.prod(rule.queries_per_key)
    pairs = whole.kept * fine * math.prod(shape) ** 2 * args.batch_size * args.heads
    found = plan(
        shape, rule.kernel_size, rule.stride, rule.dilation, rule.is_causal,
        ranks=dict(enumerate(args.ranks)), boundary=rule.boundary,
        queries_per_key=rule.queries_per_key, batch=args.batch_size, heads=args.heads,
        head_dim=args.dim, dtype=DTYPES[args.itemsize], bandwidth=1e9 * args.link,
        latency=1e-6 * args.latency, flops=4 * args.dim * pairs / (1e-6 * whole.time_us),
    )  # fmt: skip
    if args.json is not None:
        write(args.json, json.dumps(found.as_dict(), indent=2))
        if args.json == STDOUT:
            return 0
    print(
        f"{found}\n\nA rank computes at the rate of the whole layout's roofline, "
        f"{whole.time_us / 1e3:.3g} ms forward,\nsends and receives {args.link:g} GB/s each, and "
        f"waits {args.latency:g} us for a message."
    )
    return 0
