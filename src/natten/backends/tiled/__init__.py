"""Neighborhood attention over tiles in plain PyTorch, which runs on every device.

Queries are cut into tiles (:mod:`natten.tiling`). Each tile is dense attention against the block of
keys that holds its windows, with a mask. Equal tiles at regular distances, a grid of tiles, are one
batch of matrix products. A grid is computed in chunks that are small enough to stay in cache, in
buffers that are used again. Nothing grows with the square of the number of tokens, and the backward
computes the weights again.

Blocks of keys overlap. Their gradients are added up in phases of tiles whose blocks do not overlap,
so every result has the same bits on every run, on any device.
"""

from __future__ import annotations

import math

from ... import tiling
from ...neighborhood import Neighborhood
from ..interface import Backend, Shape
from . import fused, unfused


class Tiled(Backend):
    """Attention over tiles in plain PyTorch."""

    name = "tiled"
    devices = "every device of PyTorch"
    operations = ("attention", "gradient", "unfused")
    masks = True

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
