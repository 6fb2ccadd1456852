"""The estimated cost of PyTorch's kernel, and the tiles that are cheapest for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...caches import kept
from ...neighborhood import Dense, Rule, group_length
from ...tiling import (
    Cut,
    Floor,
    TileCost,
    axis_runs,
    cheapest,
    cuts_bytes,
    even_cuts,
    is_scattered,
    window_runs,
)
from ..tiled.grids import Plan

MASK = 1 << 22  # the largest number of pairs of a tile that needs a mask; 16 MB in float32


class Costs(NamedTuple):
    """What the kernel costs, in the units of ``tiled``'s estimate."""

    product: float  # per query-key pair
    product_dim: float  # per query-key pair and head dim
    mask: float  # per pair of a tile that needs a mask
    key: float  # per key of a tile and head dim, for gradients that are added up
    read: float  # per key and head dim, each time that a block of queries reads it
    block: float  # per block of queries, which the kernel computes at a time
    copy: float  # per copied element, where tiles and blocks of keys are not views
    run: float  # time in Python per call of the kernel, beyond a single tile's

    def of(
        self, axes: Sequence[TileCost], queries: int, matrices: int, dim: int, threads: int
    ) -> float:
        """The cost of tiles.

        Args:
            axes: the cost of each axis of the tiling.
            queries, matrices, dim: of the problem.
            threads: how many threads share the matrices of a call; 0 if they also share queries.
        """
        products = rows = keys = runs = tiles = full = largest = 1
        for axis in axes:
            products, full, rows = products * axis.products, full * axis.full, rows * axis.rows
            keys, tiles, runs = keys * axis.keys, tiles * axis.tiles, runs * axis.runs
            largest *= axis.largest
        # A tile needs a mask if it needs one on any axis.
        masked = max([axis.largest_masked * largest // max(axis.largest, 1) for axis in axes])
        if masked > MASK:
            return math.inf
        # The constants were measured with one thread.
        idle = max(1.0, threads * runs / (2 * matrices * tiles))
        copied, calls = 0.0, float(runs)
        if any(is_scattered(*each) for each in enumerate(axes)):
            copied = 2 * dim * self.copy * (queries + keys)
            calls += (queries + 2 * keys) / (3 * queries)  # see TileViews._chunks
        # The number of queries of a tile, averaged over pairs, and of its blocks.
        each = rows / max(1, products)
        blocks = math.ceil(each / _block_rows(each))
        product = (
            products * (self.product + self.product_dim * dim)
            + keys * (self.key + blocks * self.read) * dim
            + tiles * blocks * self.block
        )
        masks = (products - full) * self.mask
        python = 0.0 if tiles == 1 else calls * self.run
        return matrices * (product * idle + masks + copied) + python

    def floor(self, queries: int, matrices: int, dim: int) -> Floor:
        """What tiles cost at least."""
        copy = matrices * 2 * dim * self.copy
        return Floor(
            matrices * (self.product + self.product_dim * dim), matrices * self.mask,
            matrices * (self.key + self.read) * dim, matrices * self.block, self.run,
            copy, copy * queries,
        )  # fmt: skip


def _block_rows(rows: float) -> int:
    """How many of a tile's ``rows`` queries PyTorch's kernel computes at a time."""
    return 256 if rows >= 768 else 64 if rows >= 192 else 32


# Fitted to times of random problems in float32 on one thread, each with up to nine tilings, and to
# `tiled`'s times of the same problems. A unit is what makes the median of `tiled`'s estimates its
# time, in the backward on AVX2 0.9 of that, so that `tiled` runs where both are about as fast.
# With the faster of both backends known, the choice took 1.01 to 1.02 of its time on average.
AVX2 = (  # 117 problems, AMD Zen 3; units of 4.75 ns forward and 7.7 ns backward
    Costs(product=0.124, product_dim=0.0112, mask=0.117, key=0.0, read=0.129, block=120.0,
          copy=0.244, run=27_000.0),
    Costs(product=0.037, product_dim=0.0196, mask=0.195, key=0.585, read=0.07, block=240.0,
          copy=0.22, run=32_000.0),
)  # fmt: skip
AVX512 = (  # 222 problems, AMD Zen 5; units of 1.48 ns forward and 3.12 ns backward
    Costs(product=0.093, product_dim=0.038, mask=0.054, key=0.35, read=0.0083, block=160.0,
          copy=0.053, run=19_000.0),
    Costs(product=0.078, product_dim=0.036, mask=0.026, key=0.35, read=0.013, block=570.0,
          copy=0.16, run=8_100.0),
)  # fmt: skip
_CAPABILITY = torch.backends.cpu.get_cpu_capability()
FORWARD, BACKWARD = AVX512 if _CAPABILITY.startswith("AVX512") else AVX2
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
    queries = math.prod(shape)
    found = cheapest(
        _options(rule, shape, key_shape),
        lambda axes: costs.of(axes, queries, matrices, dim, threads if backward else 0),
        costs.floor(queries, matrices, dim),
        triangles=len(shape) == 1 and not additional,
    )
    return Plan.of(*found, rule)


def _options(rule: Rule, shape: tuple[int, ...], key_shape: tuple[int, ...]) -> list[list[Cut]]:
    """For each axis, the ways to cut it that are worth trying."""
    by_windows = not is_causal(rule)
    lengths = zip(shape, key_shape)
    return [_cuts(rule.of_axis(axis), *each, by_windows) for axis, each in enumerate(lengths)]


@kept(lambda cuts: cuts_bytes(cuts[-3:]))  # those of one size are kept as such
def _cuts(rule: Rule, length: int, key_length: int, by_windows: bool) -> list[Cut]:
    """Of a rule's only axis; ``by_windows``: also where windows change."""
    longest = group_length(length, rule.dilation[0], 0)
    cuts = [*even_cuts(rule, length, key_length), axis_runs(rule, 0, length, key_length, longest)]
    if by_windows:
        cuts += [window_runs(rule, 0, length, key_length, each) for each in (False, True)]
    return [cut for i, cut in enumerate(cuts) if cut not in cuts[:i]]
