"""Portable GPU kernels in Triton: one source for every rank, deterministic forward and backward.

Keys are read in blocks that start where a tile's first window starts; no token is permuted, padded
or copied, except a tensor whose last stride is not 1. What is a compile-time constant: dtype, head
dims, tile shapes, how the windows of each axis go (causal, strided, truncated, circular, of one
token), how many queries stand at a key where queries are a layout of their own, whether there is a
bias, masks, additional tokens or packed documents, and the largest power of two (up to 16) that
divides all strides. Small windows have a forward kernel of their own on NVIDIA's GPUs, in Gluon
(:mod:`natten.backends.triton.small`).
"""

from __future__ import annotations

import os
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from ... import _submodules
from ...documents import Documents
from ...inputs import Gradients, Inputs
from ...neighborhood import Neighborhood, Rule
from ..interface import Backend, Problem, Shape, TileChooser
from . import releases


def missing(problem: Problem) -> str | None:
    """What Triton's kernels for GPUs lack on this machine, None if nothing."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if problem.device.type != "cuda" and not interpreted:
        return f"runs on GPUs, not on {problem.device.type}"
    version = releases.version()
    if version is None:
        return "needs the package triton"
    if releases.release(version) < releases.OLDEST:
        return f"needs Triton {'.'.join(map(str, releases.OLDEST))} or newer, not {version}"
    if interpreted or torch.version.hip is not None:
        return None
    if torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


class Triton(Backend):
    """The portable kernels; their modules are imported at the first use, as they need Triton."""

    name = "triton"
    devices = "NVIDIA from compute capability 8.0, AMD"
    operations = ("attention", "gradient", "unfused", "packed")
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    head_dims = range(1, 257)
    value_dims = range(1, 513)
    circular = True
    masks = True
    takes_tiles = True
    compiles = True

    def missing(self, problem: Problem) -> str | None:
        return missing(problem)

    def limits(self, problem: Problem) -> str | None:
        if problem.bias and abs(problem.scale) < 1e-20:
            return "divides a bias by the scale, which must not be that small"
        return None

    @cached_property
    def _fused(self) -> ModuleType:
        from . import fused

        return fused

    @cached_property
    def _unfused(self) -> ModuleType:
        from . import unfused

        return unfused

    def forward(
        self, inputs: Inputs, rule: Rule, scale: float, tiles: Shape = ()
    ) -> tuple[Tensor, Tensor]:
        return self._fused.forward(inputs, rule, scale, None, tiles)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor,
        rule: Rule, scale: float, tiles: Shape = (),
    ) -> Gradients:  # fmt: skip
        return self._fused.backward(grad_out, grad_lse, inputs, out, lse, rule, scale, None, tiles)

    def packed_forward(
        self, inputs: Inputs, documents: Documents, rule: Rule, scale: float
    ) -> tuple[Tensor, Tensor]:
        return self._fused.forward(inputs, rule, scale, documents)

    def packed_backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor,
        documents: Documents, rule: Rule, scale: float,
    ) -> Gradients:  # fmt: skip
        return self._fused.backward(grad_out, grad_lse, inputs, out, lse, rule, scale, documents)

    def qk(self, query: Tensor, key: Tensor, rule: Neighborhood) -> Tensor:
        return self._unfused.qk(query, key, rule)

    def av(self, attn: Tensor, value: Tensor, rule: Neighborhood) -> Tensor:
        return self._unfused.av(attn, value, rule)

    def av_transposed(
        self, attn: Tensor, x: Tensor, key_shape: Shape, rule: Neighborhood
    ) -> Tensor:
        return self._unfused.av_transposed(attn, x, key_shape, rule)

    def rpb_bias(self, rpb: Tensor, shape: Shape, key_shape: Shape, rule: Neighborhood) -> Tensor:
        return self._unfused.rpb_bias(rpb, shape, key_shape, rule)

    def rpb_bias_transposed(self, grad: Tensor, key_shape: Shape, rule: Neighborhood) -> Tensor:
        return self._unfused.rpb_bias_transposed(grad, key_shape, rule)

    def tile_chooser(self) -> TileChooser:
        from . import tiles

        return tiles


__getattr__ = _submodules.getter(__name__)
