"""Attention by PyTorch's own kernels: of windows on CPUs, of all tokens on GPUs.

On a GPU it is one call of PyTorch's kernel, for plain attention and for windows of the whole layout
(:mod:`natten.backends.sdpa.whole`). What follows is about CPUs.

As in :mod:`natten.backends.tiled`, queries are cut into tiles, and a tile attends the block of keys
that holds its windows. Here a tile is one matrix in a call of PyTorch's kernel, which keeps no
scores in memory, so tiles may be large. A window of the whole layout is one tile without a mask.
Where a window is nearly as large, many queries at each border share one window, and their tiles
have no mask either. Estimates from measured constants say which tiles are cheapest, and whether
``tiled`` is cheaper still (:mod:`natten.tiling`).

The kernel lacks three things, which are added here:

* It has the same number of channels for queries and for values. The smaller ones are filled up with
  zeros.
* It has no gradient of the LSE. The kernel subtracts ``sum(grad_out * out)`` from the gradient of
  the weights. One more channel, with the LSE's gradient in ``grad_out``, -1 in ``out`` and 0 in the
  values, makes this ``sum(grad_out * out) - grad_lse``.
* Half precision is computed in float32, as in ``tiled``. In bfloat16 the kernel's backward takes 10
  to 30 times as long on CPUs without instructions for it, and rounds where float32 does not. The
  backward computes the output again, because a rounded output gives wrong gradients where values
  have a large common mean.

The kernel adds up in one order, so every result has the same bits on every run.
"""

from __future__ import annotations

import math
import os
from types import ModuleType

import torch
from torch import Tensor

from ..._torch import cpu_attention, cpu_attention_backward
from ...inputs import Gradients, Inputs, compute_dtype
from ...neighborhood import Neighborhood, Rule
from ..interface import Backend, Problem, Shape
from ..tiled.grids import Plan, estimate
from . import fused, whole
from .costs import is_causal, plan_for


class Sdpa(Backend):
    """PyTorch's ``scaled_dot_product_attention``: over tiles on CPUs, of all tokens on GPUs."""

    name = "sdpa"
    devices = "CPUs; NVIDIA and AMD, for plain attention and windows of the whole layout"
    operations = ("attention", "gradient")
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    bias = False

    def forward(
        self, inputs: Inputs, rule: Rule, scale: float, tiles: Shape = ()
    ) -> tuple[Tensor, Tensor]:
        return _for_device(inputs).forward(inputs, rule, scale)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor,
        rule: Rule, scale: float, tiles: Shape = (),
    ) -> Gradients:  # fmt: skip
        run = _for_device(inputs).backward
        return run(grad_out, grad_lse, inputs, out, lse, rule, scale)

    def missing(self, problem: Problem) -> str | None:
        if problem.device.type == "cuda":
            return whole.missing(problem)
        if problem.device.type != "cpu":
            return f"runs on CPUs and GPUs, not on {problem.device.type}"
        if cpu_attention is None or cpu_attention_backward is None:
            return "needs a PyTorch that has flash attention for CPUs"
        return None

    def limits(self, problem: Problem) -> str | None:
        if problem.device.type == "cuda":
            return whole.limits(problem)
        if problem.rule is not None and is_causal(problem.rule) and problem.scale <= 0:
            return "needs a positive scale where windows are causal"
        return None

    def slower(self, problem: Problem) -> str | None:
        rule, shape = problem.rule, tuple(problem.shape[1:-2])
        if rule is None or not shape:
            return "is for windows that hold many pairs; which they are was not said"
        if 0 in problem.shape:
            return None
        if problem.device.type == "cuda":
            return whole.slower(problem)
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "is left to the kernels that Triton interprets"
        key_shape = problem.key_shape or shape
        matrices = problem.shape[0] * problem.shape[-2]
        ours: Plan = plan_for(
            rule, shape, key_shape, matrices, max(problem.head_dim, problem.value_dim),
            problem.additional, problem.operation == "gradient",
            compute_dtype(problem.dtype) != problem.dtype, torch.get_num_threads(),
        )  # fmt: skip
        mean_dim = (problem.head_dim + problem.value_dim) // 2
        theirs = estimate(rule, shape, key_shape, matrices, mean_dim)
        return None if ours.cost < theirs else "is estimated to be slower than tiled here"

    def computed_pairs(
        self, rule: Neighborhood, shape: Shape, key_shape: Shape, matrices: int, dim: int
    ) -> int:
        plan: Plan = plan_for(rule, shape, key_shape, matrices, dim, False, False, False, 0)
        return sum(
            math.prod(run.groups * run.repeats * run.query_size * run.key_size for run in grid.runs)
            // (2 if grid.triangular else 1)
            for grid in plan.grids
        )


def _for_device(inputs: Inputs) -> ModuleType:
    return fused if inputs.query.device.type == "cpu" else whole
