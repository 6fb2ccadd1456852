"""The estimated cost of PyTorch's kernel, and the tiles that are cheapest for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ...caches import kept
from ...neighborhood import Dense, Rule, group_length
from ...tiling import Floor, Run, TileCost, axis_runs, cheapest, uniform, window_runs
from ..tiled.grids import Plan

MASK = 1 << 22  # the largest number of pairs of a tile that needs a mask; 16 MB in float32


class Costs(NamedTuple):
    """What the kernel costs, in the units of ``tiled``'s estimate."""

    product_dim: float  # per query-key pair and head dim
    mask: float  # per pair of a tile that needs a mask
    copy: float  # per copied element, where tiles and blocks of keys are not views
    key: float  # per key of a tile
    run: float  # time in Python per call of the kernel; there is at least one call per run
    alone: float  # time in Python if there is a single tile, for which nothing is copied

    def of(
        self, axes: Sequence[TileCost], queries: int, matrices: int, dim: int, threads: int
    ) -> float:
        """The cost of tiles.

        Args:
            axes: the cost of each axis of the tiling.
            queries, matrices, dim: of the problem.
            threads: how many threads share the matrices of a call; 0 if they also share queries.
        """
        products = math.prod(each.products for each in axes)
        keys, runs = (math.prod(x) for x in zip(*((each.keys, each.runs) for each in axes)))
        largest = math.prod(each.largest for each in axes)
        # A tile needs a mask if it needs one on any axis.
        masked = max(each.largest_masked * largest // max(each.largest, 1) for each in axes)
        if masked > MASK:
            return math.inf
        # The constants were measured with two threads.
        tiles = math.prod(each.tiles for each in axes)
        idle = max(1.0, threads * runs / (2 * matrices * tiles))
        # Blocks of consecutive tokens are not copied if the tiles of a run are few.
        few = axes[0].tiles <= 2 * axes[0].runs
        consecutive = few and all(each.tiles == 1 for each in axes[1:])
        copied, calls = 0.0, float(runs)
        if not consecutive:
            copied = 2 * dim * self.copy * (queries + keys)
            calls += (queries + 2 * keys) / (3 * queries)  # see TileViews._chunks
        # The number of queries of a tile, averaged over pairs.
        rows = math.prod(each.rows for each in axes) / max(1, products)
        return (
            matrices * products * self.product_dim * dim * _of_rows(rows) * idle
            + matrices * (products - math.prod(each.full for each in axes)) * self.mask
            + matrices * (keys * self.key + copied)
            + (self.alone if all(each.tiles == 1 for each in axes) else calls * self.run)
        )

    def floor(self, matrices: int, dim: int) -> Floor:
        """What tiles cost at least."""
        per_pair = matrices * self.product_dim * dim * _of_rows(math.inf)
        return Floor(per_pair, matrices * self.key, 0.0, min(self.alone, self.run))


def _of_rows(rows: float) -> float:
    """The cost of products in tiles of ``rows`` queries, relative to tiles of 192 to 767.

    PyTorch's kernel computes 256 queries at a time from 768 on, 64 from 192 on, and otherwise 32.
    """
    return 0.9 if rows >= 768 else 1.0 if rows >= 192 else 1.25


# sdpa runs where its estimate is below this fraction of tiled's, because estimates differ from
# measured times by up to 30 %.
SURELY = 0.8

# Fitted to times of 50 random problems and tilings on AMD Zen 3 (AVX2), float32, one thread, beside
# `tiled`, whose softmax takes more of its time there than its own constants say. The constants of
# the backward are relative to tiled's backward. The forward's mask and the factors of `_of_rows`
# were measured on two threads, beside dense attention.
FORWARD = Costs(product_dim=0.027, mask=0.2, copy=0.21, key=2.2, run=60_000.0, alone=20_000.0)
BACKWARD = Costs(product_dim=0.028, mask=0.15, copy=0.38, key=2.2, run=60_000.0, alone=20_000.0)
# With half of the forward's: the backward, and the forward once more.
RECOMPUTED = Costs(*(b + f / 2 for b, f in zip(BACKWARD, FORWARD)))


def is_causal(rule: Rule) -> bool:
    """Whether any axis is causal."""
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
    """The tiles that are estimated to be cheapest.

    Args:
        rule, shape, key_shape, matrices, dim: the problem.
        additional: whether there are additional keys.
        backward: whether the plan is for the backward.
        half: whether tensors have half precision, so that the backward computes the output again.
        threads: the number of PyTorch's threads.
    """
    costs = (RECOMPUTED if half else BACKWARD) if backward else FORWARD
    found = cheapest(
        _options(rule, shape, key_shape),
        lambda axes: costs.of(axes, math.prod(shape), matrices, dim, threads if backward else 0),
        costs.floor(matrices, dim),
        triangles=len(shape) == 1 and not additional,
    )
    return Plan.of(*found, rule)


def _options(
    rule: Rule, shape: tuple[int, ...], key_shape: tuple[int, ...]
) -> list[list[list[Run]]]:
    """For each axis, the ways to cut it that are worth trying."""
    options = []
    for axis, sizes in enumerate(uniform(rule, shape, key_shape)):
        lengths = shape[axis], key_shape[axis]
        longest = group_length(shape[axis], rule.dilation[axis], 0)
        one_tile = axis_runs(rule, axis, *lengths, longest)
        ends = [] if is_causal(rule) else [False, True]
        options.append(
            [*sizes, one_tile, *(window_runs(rule, axis, *lengths, between) for between in ends)]
        )
    return options
