"""What PyTorch's kernel is estimated to take, and the tiles that are cheapest for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ...caches import kept
from ...neighborhood import Dense, Rule, group_length
from ...tiling import Run, TileCost, axis_runs, cheapest, uniform, window_runs
from ..tiled.blocks import Plan

MASK = 1 << 22  # most pairs of a tile that needs a mask; 16 MB in float32


class Costs(NamedTuple):
    """What the kernel takes, in the units of what ``tiled`` is estimated to take."""

    product_dim: float  # per query-key pair and head dim
    mask: float  # per pair of a tile that needs a mask
    copy: float  # per copied element, where tiles and boxes are no views
    key: float  # per key of a tile
    run: float  # Python, per call of the kernel: at least one per run
    alone: float  # Python, where there is one tile, which nothing is copied for

    def of(
        self, axes: Sequence[TileCost], queries: int, matrices: int, dim: int, threads: int
    ) -> float:
        """What tiles take, of which the axes are given.

        ``threads`` is how many share the matrices of a call; 0 if they share the queries, too.
        """
        products = math.prod(each.products for each in axes)
        keys, runs = (math.prod(x) for x in zip(*((each.keys, each.runs) for each in axes)))
        largest = math.prod(each.largest for each in axes)
        # A tile needs a mask if it does on one axis.
        masked = max(each.largest_masked * largest // max(each.largest, 1) for each in axes)
        if masked > MASK:
            return math.inf
        # The estimates are of two threads.
        tiles = math.prod(each.tiles for each in axes)
        idle = max(1.0, threads * runs / (2 * matrices * tiles))
        # Boxes that are consecutive tokens are not copied, if the tiles of a run are few.
        few = axes[0].tiles <= 2 * axes[0].runs
        consecutive = few and all(each.tiles == 1 for each in axes[1:])
        copied, calls = 0.0, float(runs)
        if not consecutive:
            copied = 2 * dim * self.copy * (queries + keys)
            calls += (queries + 2 * keys) / (3 * queries)  # see TileViews._chunks
        # Queries of a tile, on average over pairs.
        rows = math.prod(each.rows for each in axes) / max(1, products)
        return (
            matrices * products * self.product_dim * dim * _of_rows(rows) * idle
            + matrices * (products - math.prod(each.full for each in axes)) * self.mask
            + matrices * (keys * self.key + copied)
            + (self.alone if all(each.tiles == 1 for each in axes) else calls * self.run)
        )


def _of_rows(rows: float) -> float:
    """What products take in tiles of so many queries, beside those of 192 to 767.

    PyTorch's kernel works on 256 queries at a time from 768 on, on 64 from 192 on, else on 32.
    """
    return 0.9 if rows >= 768 else 1.0 if rows >= 192 else 1.25


SURELY = 0.8  # of tiled's estimate: what is estimated is within 30 % of what was measured

# Fitted to times of 50 random problems and tilings on AMD Zen 3 (AVX2), float32, one thread,
# beside `tiled`, whose softmax takes more of its time there than its own constants say. Those of
# the backward are relative to its backward. The forward's mask and what rows cost
# (:func:`_of_rows`) were measured on two threads, beside dense attention.
FORWARD = Costs(product_dim=0.027, mask=0.2, copy=0.21, key=2.2, run=60_000.0, alone=20_000.0)
BACKWARD = Costs(product_dim=0.028, mask=0.15, copy=0.38, key=2.2, run=60_000.0, alone=20_000.0)
RECOMPUTED = Costs(*(b + f / 2 for b, f in zip(BACKWARD, FORWARD)))  # and the forward once more


def is_causal(rule: Rule) -> bool:
    return rule.causal if isinstance(rule, Dense) else any(rule.is_causal)


@kept(Plan.bytes)
def plan_for(
    rule: Rule,
    shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    matrices: int,
    dim: int,
    additional: bool,
    backward: bool,
    half: bool,
    threads: int,
) -> Plan:
    costs = (RECOMPUTED if half else BACKWARD) if backward else FORWARD
    found = cheapest(
        _options(rule, shape, key_shape),
        lambda axes: costs.of(axes, math.prod(shape), matrices, dim, threads if backward else 0),
        triangles=len(shape) == 1 and not additional,
    )
    return Plan.of(*found, rule)


def _options(
    rule: Rule, shape: tuple[int, ...], key_shape: tuple[int, ...]
) -> list[list[list[Run]]]:
    """For each axis, the ways to cut it that are worth a thought."""
    options = []
    for axis, sizes in enumerate(uniform(rule, shape, key_shape)):
        lengths = shape[axis], key_shape[axis]
        whole = axis_runs(rule, axis, *lengths, group_length(shape[axis], rule.dilation[axis], 0))
        ends = [] if is_causal(rule) else [False, True]
        options.append(
            [*sizes, whole, *(window_runs(rule, axis, *lengths, between) for between in ends)]
        )
    return options
