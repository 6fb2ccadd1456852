"""Hopper kernels (sm_90) in Gluon: TMA blocks, wgmma, warp specialisation.

The fastest way for fp16 and bf16; what it can not run, :meth:`Hopper.limits` says. Compile-time
constants: dtype, head dims, which axes are causal or strided, truncated or circular or have one
token, tile shapes and the kind of mask, the pieces in which blocks of rings come, whether there are
additional tokens and masks, whether there is dilation, whether queries are a part of the layout,
whether they are finer than keys, whether documents are packed, and the strides of a bias's tables,
which follow from windows and tile shapes.
"""

from __future__ import annotations

import math
import os
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from ... import _submodules
from ...documents import Documents
from ...inputs import Gradients, Inputs
from ...neighborhood import Dense, Neighborhood, Rule
from .. import triton
from ..interface import KINDS, Backend, Problem, Shape, TileChooser
from ..triton import releases, small_tiles
from .costs import FORWARD_SCALE, MOST, MOST_MASKED
from .cuts import OWN, queries
from .tiles import cycles_of, has_tiles
from .widths import aligned, are_together, has_empty_box, reads_in_place

# Keys of a query from which on copies of heads that TMA can not read pay.
_WORTH_COPYING = 48

# Cycles of a multiprocessor that a number takes to be copied, and a token's row of a head to be
# stored without TMA (hopper-log.md).
_COPY_CYCLES, _ROW_CYCLES = 0.3, 8.0

# For heads of so many channels the kernel of small windows runs where it takes less by estimate.
_SMALL_CHANNELS, _SMALL_CYCLES = 32, 0.95 / FORWARD_SCALE


def _copies(problem: Problem) -> bool:
    """Whether heads are copied to wider ones."""
    dims = problem.head_dim, problem.value_dim
    if problem.operation == "packed":
        return any(dim % 8 for dim in dims)
    heads = problem.shape[-2]
    has_more = problem.bias or problem.additional or problem.masked
    return not reads_in_place(*dims, heads, problem.kv_heads or heads, has_more)


class Hopper(Backend):
    """The Hopper kernels; their modules are imported at the first use, as they need Gluon."""

    name = "hopper"
    devices = "NVIDIA H100 and H200 (compute capability 9.0)"
    operations = ("attention", "gradient", "packed")
    dtypes = (torch.float16, torch.bfloat16)
    head_dims = range(1, 257)
    value_dims = range(1, 513)
    masks = True
    circular = True
    compiles = True

    def missing(self, problem: Problem) -> str | None:
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "has no kernels that Triton can interpret"
        version = releases.version() if problem.device.type == "cuda" else None
        if version is None:
            return triton.missing(problem)
        if torch.version.hip is not None:
            return "needs an NVIDIA GPU"
        if torch.cuda.get_device_capability(problem.device) != (9, 0):
            return "needs a GPU of compute capability 9.0"
        if releases.release(version) not in releases.CHECKED:
            return self._without_check(version, problem.device)
        return None

    def _without_check(self, version: str, device: torch.device) -> str | None:
        """What is known of a release of Triton that nobody checked."""
        oldest = releases.CHECKED[0]
        if releases.release(version) < oldest:
            return f"needs Triton {'.'.join(map(str, oldest))} or newer, not {version}"
        from . import probe

        return probe.verdict(version, device)

    def pads(self, problem: Problem) -> bool:
        """Whether a ring is too short for its windows and for tiles, or queries are a part."""
        if not problem.has_rings:
            return False
        rule = problem.rule
        assert isinstance(rule, Neighborhood)
        space = problem.shape[1:-2]
        if queries(rule, space) != OWN:
            return True
        dims = problem.head_dim, problem.value_dim
        return not all(has_tiles(kind, rule, space, problem.key_shape, *dims) for kind in KINDS)

    def limits(self, problem: Problem) -> str | None:
        if not 1e-20 < problem.scale < 1e6:
            return "masks scores that are scaled by a positive number of usual size"
        if problem.rule is None:
            return None
        rule = problem.rule
        if problem.operation == "packed":
            if max(rule.dilation) > 1 or "circular" in rule.boundary:
                return "has no dilation and no circular axes of packed documents"
            if not are_together(problem.head_dim, problem.value_dim):
                return (
                    "packs documents for heads of up to 128 channels, the value's, rounded up to "
                    "32, 64 or 128, like the key's"
                )
            return None
        if any(r > 1 and d > 1 for r, d in zip(rule.queries_per_key, rule.dilation)):
            return "has no queries that are finer than keys along an axis with dilation"
        if problem.bias and isinstance(rule, Neighborhood):
            if max(rule.queries_per_key) > 1:
                return "has no relative positional bias where queries are finer than keys"
            # A table has the pairs of a tile and its blocks, too, and a power of two along an axis.
            if 2 * math.prod([2 * k + 384 for k in rule.kernel_size]) > MOST:
                return "numbers a head's relative positional biases with 31 bits"
        batch, *space, heads, _ = problem.shape
        # Of groups that differ in length, TMA must load no box that is empty (``descriptors.py``).
        may_differ = max(rule.dilation) > 1 and queries(rule, space) != OWN
        if may_differ and any(map(has_empty_box, (problem.head_dim, problem.value_dim))):
            return (
                "has no kernels for heads of 129 to 192 channels, or values of 257 to 448, with "
                "dilation where queries are a part of the layout or it does not divide the token "
                "layout"
            )
        for layout in (space, problem.key_shape):
            # Where a dilation does not divide an axis, TMA sees more tokens.
            tokens = (n + d if d > 1 else n for n, d in zip(layout, rule.dilation))
            if batch * heads * math.prod(tokens) > MOST:
                return "numbers the tokens of all heads with 31 bits"
        if problem.masked and math.prod(problem.key_shape) > MOST_MASKED:
            return "numbers the keys of a mask with 29 bits"
        return None

    def slower(self, problem: Problem) -> str | None:
        rule, dims = problem.rule, (problem.head_dim, problem.value_dim)
        if rule is None:
            return None
        is_finer = max(rule.queries_per_key) > 1
        if problem.operation == "gradient" and is_finer and not are_together(*dims):
            return "has few tiles of keys beside queries that are finer, and wide heads take long"
        if _copies(problem):
            plain = problem.key_shape or problem.shape[1:-2]
            keys = plain if isinstance(rule, Dense) else rule.kernel_size
            if math.prod(keys) < _WORTH_COPYING:
                return "copies heads of such a width, too slow for such small windows"
        return self._small_window(problem, rule)

    def _small_window(self, problem: Problem, rule: Rule) -> str | None:
        """Forward, small windows may be faster in tiles of 16 queries, which waste less."""
        if problem.operation != "attention" or problem.head_dim > _SMALL_CHANNELS:
            return None
        batch, *_, heads, _ = problem.shape
        if problem.bias or problem.additional:
            return None
        if batch * heads >= small_tiles.MOST_HEADS:
            return None
        sizes = rule, problem.shape[1:-2], problem.key_shape
        dims = problem.head_dim, problem.value_dim
        theirs = small_tiles.choose(*sizes, *dims, problem.dtype.itemsize, False, problem.scale)
        if theirs is None:
            return None
        ours = cycles_of("forward", *sizes, *map(aligned, dims))
        if any(dim % 8 for dim in dims):
            each = 2 * sum(dims) * _COPY_CYCLES if _copies(problem) else _ROW_CYCLES
            ours += FORWARD_SCALE * each * math.prod(sizes[1])
        if theirs[0] >= _SMALL_CYCLES * ours:
            return None
        return "takes longer than the kernel of `triton` for small windows"

    @cached_property
    def _fused(self) -> ModuleType:
        from . import fused

        return fused

    def forward(
        self, inputs: Inputs, rule: Rule, scale: float, tiles: Shape = ()
    ) -> tuple[Tensor, Tensor]:
        return self._fused.forward(inputs, rule, scale)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor,
        rule: Rule, scale: float, tiles: Shape = (),
    ) -> Gradients:  # fmt: skip
        return self._fused.backward(grad_out, grad_lse, inputs, out, lse, rule, scale)

    def packed_forward(
        self, inputs: Inputs, documents: Documents, rule: Rule, scale: float
    ) -> tuple[Tensor, Tensor]:
        return self._fused.forward(inputs, rule, scale, documents)

    def packed_backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor,
        documents: Documents, rule: Rule, scale: float,
    ) -> Gradients:  # fmt: skip
        return self._fused.backward(grad_out, grad_lse, inputs, out, lse, rule, scale, documents)

    def tile_chooser(self) -> TileChooser:
        from . import tiles

        return tiles


__getattr__ = _submodules.getter(__name__)
