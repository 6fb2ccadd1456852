"""Neighborhood attention over tiles in plain PyTorch: the CPU default, and the fallback everywhere.

Queries are cut into tiles (:mod:`natten.tiling`); each tile is dense attention against the box of
keys that holds its windows, with a mask. Many tiles of one kind are a batch of matrix products;
they are worked through in chunks small enough to stay in cache, in buffers that are used again.
Nothing grows with the square of the number of tokens, and the backward recomputes the weights.

Sums over overlapping boxes are taken in phases of tiles whose boxes do not overlap, so every
result has the same bits on every run, on any device.
"""

from __future__ import annotations

import math

from ... import tiling
from ...neighborhood import Neighborhood
from ..interface import Backend, Shape
from . import fused, unfused


class Tiled(Backend):
    """Plain PyTorch over tiles."""

    name = "tiled"
    devices = "every device of PyTorch"
    operations = ("attention", "gradient", "unfused")

    forward = staticmethod(fused.forward)
    backward = staticmethod(fused.backward)
    qk = staticmethod(unfused.qk)
    av = staticmethod(unfused.av)
    av_transposed = staticmethod(unfused.av_transposed)
    rpb_bias = staticmethod(unfused.rpb_bias)
    rpb_bias_transposed = staticmethod(unfused.rpb_bias_transposed)

    def computed_pairs(
        self, rule: Neighborhood, shape: Shape, key_shape: Shape, matrices: int, dim: int
    ) -> int:
        _, runs = tiling.tiles(rule, shape, key_shape, matrices, dim)
        return math.prod(tiling.axis_cost(axis).products for axis in runs)
