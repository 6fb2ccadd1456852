"""Launches of the backward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natten.backends import triton as portable
from natten.backends.hopper import backward_tiles
from natten.backends.hopper.backward_kernel import BRANCH, EARLY, pass_kernel, terms_kernel
from natten.backends.hopper.backward_tiles import Tiles
from natten.backends.hopper.common import modes, padded
from natten.backends.hopper.descriptors import View, box_layout, readable, view
from natten.backends.hopper.gluon_names import TensorDescriptor, gl
from natten.neighborhood import Neighborhood


class Call:
    """What the launches of one call share."""

    def __init__(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        extra_keys: Tensor | None,
        extra_values: Tensor | None,
        out: Tensor,
        lse: Tensor,
        rule: Neighborhood,
        scale: float,
    ) -> None:
        tensors = (query, key, value, grad_out)
        self.query, self.key, self.value, self.grad_out = (
            readable(x, rule.dilation) for x in tensors
        )
        self.extras = None
        if extra_keys is not None and extra_values is not None and extra_keys.shape[1] > 0:
            self.extras = extra_keys.contiguous(), extra_values.contiguous()
        self.out, self.lse, self.grad_lse = out.contiguous(), lse.contiguous(), grad_lse
        self.rule, self.scale = rule, scale
        self.batch, self.heads, self.dim = query.shape[0], query.shape[-2], query.shape[-1]
        self.kv_heads = key.shape[-2]
        space = query.shape[1:-2]
        self.dilation = padded(rule.dilation, 1)
        self.shape = padded([n // d for n, d in zip(space, rule.dilation)], 1)
        self.modes = modes(rule, space)
        self.window, self.stride = (padded(x, 1) for x in (rule.kernel_size, rule.stride))
        self.groups = math.prod(self.dilation)

    def tiles(self, of_keys: bool, columns: int = 64) -> Tiles:
        """The tiles of a pass."""
        return backward_tiles.choose(of_keys, self.rule, self.shape, self.dim, columns)

    def terms(self, order: Sequence[int]) -> Tensor:
        """LSE and delta as the passes read them, ``[batch * heads * groups, 2, *space]``."""
        x0, x1, x2 = (self.shape[axis] for axis in order)
        wide = -(-x2 // 4) * 4  # TMA wants rows of 16 bytes
        shape = (self.batch * self.heads * self.groups, 2, x0, x1, wide)
        terms = torch.empty(shape, dtype=torch.float32, device=self.lse.device)
        grad_lse = self.lse if self.grad_lse is None else self.grad_lse.contiguous()
        strides: list[int] = []
        for x in (self.out, self.grad_out, self.lse[..., None]):
            batch, *space, heads, _ = x.stride()
            axes = padded(space, 0)
            strides += [batch, *(axes[axis] for axis in order), heads]
        rows = 4096 // self.dim
        lines = -(-x0 * x1 * wide // rows)
        terms_kernel[(lines * self.groups * self.heads, self.batch)](
            self.out, self.grad_out, self.lse, grad_lse, terms, *strides[:-1],
            x0, x1, x2, wide, *(self.dilation[axis] for axis in order), self.heads,
            D=self.dim, HAS_GRAD_LSE=self.grad_lse is not None, M=rows,
        )  # fmt: skip
        return terms

    def view(self, x: Tensor, order: Sequence[int]) -> View:
        """How TMA sees ``x``, axes in ``order``."""
        shape, strides, steps = view(x.shape, x.stride(), self.rule.dilation)
        axes = [axis + 1 for axis in order]
        return View(
            [shape[0], *(shape[axis] for axis in axes), shape[4]],
            [strides[0], *(strides[axis] for axis in axes), 1],
            (*(steps[axis] for axis in order), steps[3]),
        )

    def run(
        self,
        of_keys: bool,
        terms: Tensor,
        grad_a: Tensor,
        grad_b: Tensor,
        tiles: Tiles,
        **options: Any,
    ) -> None:
        """A pass: dQ into ``grad_a``, or dK and dV into ``grad_a`` and ``grad_b``."""
        order, outer, inner, stages = tiles
        queries, keys = (self.query, self.grad_out), (self.key, self.value)
        fixed, walked = (keys, queries) if of_keys else (queries, keys)
        layout = box_layout(self.dim, self.query.dtype)
        outer_box, inner_box = [1, *outer, self.dim], [1, *inner, self.dim]
        outer_views, inner_views = ([self.view(x, order) for x in xs] for xs in (fixed, walked))
        outer_a, outer_b = (v.boxes(x, outer_box, layout) for v, x in zip(outer_views, fixed))
        inner_a, inner_b = (v.boxes(x, inner_box, layout) for v, x in zip(inner_views, walked))
        grad_view = self.view(grad_a, order)
        extra_a, extra_b, extra = inner_a, inner_b, 0
        if self.extras is not None and not of_keys:
            extra = self.extras[0].shape[1]
            box = [1, 1, 1, math.prod(inner), self.dim]
            extra_a, extra_b = (
                view(x.shape, x.stride(), (1,)).boxes(x, box, layout) for x in self.extras
            )
        lengths, window, stride, dilation, modes = (
            tuple(x[axis] for axis in order)
            for x in (self.shape, self.window, self.stride, self.dilation, self.modes)
        )
        rows = inner_a
        if of_keys:
            plain = gl.NVMMASharedLayout(0, 32, rank=5)
            rows = TensorDescriptor(
                terms, list(terms.shape), list(terms.stride()), [1, 2, *inner], plain
            )
        sizes = (outer[0], outer[1], 2 * outer[2])
        counts = tuple(-(-length // size) for length, size in zip(lengths, sizes))
        heads = self.kv_heads if of_keys else self.heads
        pass_kernel[(math.prod(counts) * self.groups * heads * self.batch,)](
            outer_a, outer_b, inner_a, inner_b, rows, extra_a, extra_b,
            grad_view.boxes(grad_a, outer_box, layout), grad_view.boxes(grad_b, outer_box, layout),
            terms, *(step for v in (*outer_views, *inner_views, grad_view) for step in v.steps),
            *lengths, *window, *stride, *dilation, *counts,
            heads, self.heads // self.kv_heads, extra, self.scale,
            MODES=modes, STAGES=stages, OF_KEYS=of_keys, HAS_EXTRA=extra > 0,
            num_warps=4, maxnreg=168,
            **{"MASK": BRANCH.value, "HELD": not of_keys, "DP": EARLY.value, **options},
        )  # fmt: skip


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rule: Neighborhood,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, rpb (None), additional keys and additional values."""
    assert rpb is None, "the Hopper backend has no bias"
    if query.numel() == 0 or key.numel() == 0:
        inputs = (query, key, value, None, extra_keys, extra_values)
        return tuple(None if x is None else x.new_zeros(x.shape) for x in inputs)
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    with torch.cuda.device(query.device):
        call = Call(
            grad_out, grad_lse, query, key, value, extra_keys, extra_values, out, lse, rule, scale
        )
        queries, keys = call.tiles(False), call.tiles(True)
        terms = call.terms(queries.order)
        call.run(False, terms, grad_query, grad_query, queries)
        if keys.order != queries.order:
            terms = call.terms(keys.order)
        call.run(True, terms, grad_key, grad_value, keys)
    grad_ek = grad_ev = None
    if extra_keys is not None and extra_values is not None:
        grad_ek, grad_ev = _extra_gradients(call, extra_keys, extra_values, grad_out)
    return grad_query, grad_key, grad_value, None, grad_ek, grad_ev


def _extra_gradients(
    call: Call, extra_keys: Tensor, extra_values: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Every query reaches the additional tokens: the portable backend's sums over parts."""
    tokens = extra_keys.contiguous(), extra_values.contiguous()
    grad_out, terms = grad_out.contiguous(), call.lse.new_empty(*call.lse.shape, 4)
    given = call.lse if call.grad_lse is None else call.grad_lse.contiguous()
    found = portable.plan_for(
        call.query, call.key, call.value, None, tokens[0], call.rule, call.scale
    )
    with torch.cuda.device(call.query.device):
        found.terms[call.grad_lse is not None](call.out, call.lse, grad_out, given, terms)
        return portable._extra_gradients(found, call.query, *tokens, grad_out, terms)
