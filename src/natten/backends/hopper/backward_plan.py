"""What the launches of the backward passes need, worked out once for a call's shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from natten import tuning
from natten.backends import triton as portable
from natten.backends.hopper import backward_tiles
from natten.backends.hopper.backward_kernel import pass_kernel
from natten.backends.hopper.backward_tiles import Tiles
from natten.backends.hopper.descriptors import Boxes, View, box_layout, contiguous, readable, view
from natten.backends.hopper.gluon_names import gl
from natten.backends.hopper.plan import Launch, Shape
from natten.backends.triton.plan import modes, on_device, padded
from natten.neighborhood import Neighborhood


class _Pass:
    """dQ, from tiles of queries and boxes of keys, or dK and dV, from the reverse."""

    def __init__(self, plan: Plan, of_keys: bool, tiles: Tiles) -> None:
        order, outer, inner, stages, masked = tiles
        layout = box_layout(plan.dim, plan.dtype)
        outer_box, inner_box = [1, *outer, plan.dim], [1, *inner, plan.dim]
        views = [_ordered(each, order) for each in plan.views]
        queries, keys = (views[0], views[3]), (views[1], views[2])
        fixed, walked = (keys, queries) if of_keys else (queries, keys)
        grad = _ordered(plan.grad_views[of_keys], order)
        self.outer = [Boxes(each, outer_box, layout) for each in fixed]
        self.inner = [Boxes(each, inner_box, layout) for each in walked]
        self.grad = Boxes(grad, outer_box, layout)
        terms = _ordered(plan.terms_view, order)
        self.terms = Boxes(
            terms, [1, *(inner if of_keys else outer), 4], gl.NVMMASharedLayout(0, 32, rank=5)
        )
        extra = 0 if of_keys else plan.extra
        box = [1, 1, 1, math.prod(inner), plan.dim]
        self.extra = Boxes(plan.extra_view, box, layout) if extra else None
        sizes = (outer[0], outer[1], 2 * outer[2])
        lengths = [plan.groups[axis] for axis in order]
        counts = [-(-length // size) for length, size in zip(lengths, sizes)]
        heads = plan.kv_heads if of_keys else plan.heads
        rule = plan.rule
        numbers = (
            *(step for each in (*fixed, *walked, terms, grad) for step in each.steps),
            *lengths,
            *(x[axis] for x in (plan.window, plan.stride, plan.dilation) for axis in order),
            *counts, heads, plan.heads // plan.kv_heads, extra, plan.scale,
        )  # fmt: skip
        constants = {
            "MODES": tuple(plan.modes[axis] for axis in order), "STAGES": stages,
            "MASKED": masked,
            "OF_KEYS": of_keys, "HAS_EXTRA": extra > 0, "num_warps": 4, "maxnreg": 168,
        }  # fmt: skip
        programs = math.prod(counts) * math.prod(rule.dilation) * heads * plan.batch
        self.launch = Launch(pass_kernel, programs, numbers, constants)

    def __call__(
        self, outer: Sequence[Tensor], inner: Sequence[Tensor], extra: Sequence[Tensor],
        terms: Tensor, grads: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Sum over ``inner`` for the tiles of ``outer``, into ``grads``."""
        tiles = [make(x) for make, x in zip(self.outer, outer)]
        boxes = [make(x) for make, x in zip(self.inner, inner)]
        # What is missing is never read.
        more = boxes if self.extra is None else [self.extra(x) for x in extra]
        found = [self.grad(x) for x in grads]
        self.launch(*tiles, *boxes, self.terms(terms), *more, found[0], found[-1])


def _ordered(each: View, order: Sequence[int]) -> View:
    """A view with its axes in another order."""
    axes = [axis + 1 for axis in order]
    return View(
        [each.shape[0], *(each.shape[axis] for axis in axes), each.shape[4]],
        [each.strides[0], *(each.strides[axis] for axis in axes), 1],
        (*(each.steps[axis] for axis in order), each.steps[3]),
    )


class Plan:
    """The passes of one problem; tensors are query, key, value and the gradient of the output."""

    def __init__(
        self,
        rule: Neighborhood,
        scale: float,
        device: torch.device,
        dtype: torch.dtype,
        shapes: Sequence[Shape],
        strides: Sequence[Shape],
        extra: int,
    ) -> None:
        batch, *space, heads, dim = shapes[0]
        self.rule, self.scale, self.dtype, self.extra = rule, scale, dtype, extra
        self.batch, self.heads, self.dim, self.kv_heads = batch, heads, dim, shapes[1][-2]
        self.views = [view(*each, rule.dilation) for each in zip(shapes, strides)]
        self.grad_views = [view(x, contiguous(x), rule.dilation) for x in shapes[:2]]
        more = (batch, extra, self.kv_heads, dim)
        self.extra_view = view(more, contiguous(more), (1,))
        four = (*shapes[0][:-1], 4)
        self.terms_view = view(four, contiguous(four), rule.dilation)
        self.dilation = padded(rule.dilation, 1)
        self.groups = padded([n // d for n, d in zip(space, rule.dilation)], 1)
        self.window, self.stride = padded(rule.kernel_size, 1), padded(rule.stride, 1)
        self.modes = modes(rule, space)
        queries, keys = (
            backward_tiles.choose(of_keys, rule, self.groups, dim, 64) for of_keys in (False, True)
        )
        self.of_queries = _Pass(self, False, queries)
        self.of_keys = _Pass(self, True, keys)


_plan = tuning.cached(Plan)


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
    if query.numel() == 0 or key.numel() == 0:
        inputs = (query, key, value, None, extra_keys, extra_values)
        return tuple(None if x is None else x.new_zeros(x.shape) for x in inputs)
    grads = [
        x.new_empty(x.shape) for x in (query, key, value)
    ]  # contiguous: a view's strides are not kept
    query, key, value = (readable(x, rule.dilation) for x in (query, key, value))
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    grad_out = readable(grad_out, rule.dilation)
    extra: list[Tensor] = []
    if extra_keys is not None and extra_values is not None and extra_keys.shape[1] > 0:
        extra = [readable(x.contiguous(), (1,)) for x in (extra_keys, extra_values)]
    tensors = (query, key, value, grad_out)
    found = _plan(
        rule, scale, query.device, query.dtype, tuple(x.shape for x in tensors),
        tuple(x.stride() for x in tensors), extra[0].shape[1] if extra else 0,
    )  # fmt: skip
    # LSE and delta, and what every query reaches, are the portable backend's work.
    shared = portable.plan_for(
        query, key, value, None, extra[0] if extra else None, rule, scale, None, ()
    )
    terms = lse.new_empty(*lse.shape, 4)
    grad_ek = grad_ev = None
    with on_device(query):
        given = lse if grad_lse is None else grad_lse.contiguous()
        shared.terms[grad_lse is not None](out, lse, grad_out, given, terms)
        found.of_queries((query, grad_out), (key, value), extra, terms, grads[:1])
        found.of_keys((key, value), (query, grad_out), (), terms, grads[1:])
        if extra:
            grad_ek, grad_ev = portable.extra_gradients(shared, query, *extra, grad_out, terms)
        elif extra_keys is not None and extra_values is not None:
            grad_ek, grad_ev = (torch.zeros_like(x) for x in (extra_keys, extra_values))
    return (*grads, None, grad_ek, grad_ev)
