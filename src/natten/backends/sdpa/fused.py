"""Fused attention by PyTorch's kernel, forward and backward, one grid of tiles after another."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...caches import kept
from ...inputs import Gradients, Inputs, compute_dtype
from ...neighborhood import Rule
from ..tiled.grids import Plan
from .costs import plan_for
from .views import Sizes, TileViews, contiguous


def _exact(x: Tensor) -> Tensor:
    """A tensor of half precision in the dtype in which it is computed."""
    # PyTorch loses the sign where it copies lazily negated float16 views to float32.
    return x.resolve_neg().to(compute_dtype(x.dtype))


def _all_exact(inputs: Inputs) -> Inputs:
    return Inputs(*(None if x is None else _exact(x) for x in inputs))  # type: ignore[arg-type]


@kept(lambda every: sum(tiles.bytes() for tiles in every))
def _kept_views(
    rule: Rule, scale: float, dtype: torch.dtype, shapes: tuple[Any, ...], half: bool,
    backward: bool, grad_lse: bool, threads: int,
) -> list[TileViews]:  # fmt: skip
    sizes = Sizes.of(shapes)
    plan: Plan = plan_for(
        rule, sizes.shape, sizes.key_shape, sizes.batch * sizes.heads,
        max(sizes.dim, sizes.value_dim), sizes.num_additional is not None, backward, half, threads,
    )  # fmt: skip
    return [TileViews(grid, sizes, dtype, scale, grad_lse) for grid in plan.grids]


def _tile_views(
    rule: Rule, scale: float, inputs: Inputs, half: bool, backward: bool = False,
    grad_lse: bool = False,
) -> list[TileViews]:  # fmt: skip
    query, key, value, _, additional, *_ = inputs
    shapes = query.shape, key.shape, value.shape, None if additional is None else additional.shape
    every: list[TileViews] = _kept_views(
        rule, scale, query.dtype, shapes, half, backward, grad_lse, torch.get_num_threads()
    )
    return every


def heads_last(x: Tensor, like: Tensor, channels: int) -> Tensor:
    """A result of the kernel for all tokens at once, in the layout and dtype of ``like``.

    It changes ``x`` in place, to which there is no other reference, because a Function with forward
    mode must not return views.
    """
    x = _tokens_first(x if x.shape[-1] == channels else x[..., :channels], like.shape[:-1])
    return x if x.dtype == like.dtype else x.to(like.dtype)


def _tokens_first(x: Tensor, shape: torch.Size) -> Tensor:
    """``[batch, heads, tokens, ...]`` as ``[*shape, ...]``, which is the kernel's memory layout."""
    sizes = (*shape, *x.shape[3:])
    steps, axis = contiguous(sizes), len(shape) - 1  # which the heads are
    if x.stride() == (steps[0], steps[axis], steps[axis - 1], *steps[axis + 1 :]):
        return x.as_strided_(sizes, steps)
    return x.transpose_(1, 2).contiguous().resize_(sizes)


def nothing_attended(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE where there are no queries, no keys or no channels."""
    shape, dtype = query.shape[:-1], compute_dtype(query.dtype)
    out = query.new_zeros(*shape, value.shape[-1])
    return out, query.new_full(shape, -math.inf, dtype=dtype)


def forward(inputs: Inputs, rule: Rule, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value dim]`` and LSE ``[batch, *space, heads]``."""
    query, key, value, *_ = inputs
    shape, value_dim, dtype = query.shape[:-1], value.shape[-1], compute_dtype(query.dtype)
    if query.numel() == 0 or key.numel() == 0:
        return nothing_attended(query, value)
    half = query.dtype != dtype
    if half:
        inputs = _all_exact(inputs)
    grids = _tile_views(rule, scale, inputs, half)
    if grids[0].alone:
        out, lse = grids[0].forward(*grids[0].load_all(inputs, 0))
        return heads_last(out, query, value_dim), _tokens_first(lse, shape)
    out, lse = query.new_empty(*shape, value_dim), query.new_empty(shape, dtype=dtype)
    for views in grids:
        for index in range(len(views.chunks)):
            own_out, own_lse = views.forward(*views.load_all(inputs, index))
            views.store(out, index, own_out)
            views.store(lse, index, own_lse)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor, rule: Rule,
    scale: float,
) -> Gradients:  # fmt: skip
    """Gradients of the inputs."""
    query, key, value, _, *additional, _, _ = inputs
    if query.numel() == 0 or key.numel() == 0:
        return Gradients.zeros(inputs)
    dtype, value_dim = compute_dtype(query.dtype), value.shape[-1]
    half = query.dtype != dtype
    if half:
        inputs, grad_out = _all_exact(inputs), _exact(grad_out)
    grids = _tile_views(rule, scale, inputs, half, True, grad_lse is not None)
    alone = grids[0].alone
    grad_query, grad_kv = query, []
    if not alone:
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_kv = [x.new_zeros(x.shape, dtype=dtype) for x in (key, value)]
    grad_additional = [None if x is None else x.new_zeros(x.shape, dtype=dtype) for x in additional]
    for views in grids:
        for index, chunk in enumerate(views.chunks):
            if half:
                q, k, v, grad = views.load_all(inputs, index, grad_out)
                own_out, own_lse = views.forward(q, k, v)
            else:
                q, k, v, grad, own_out, own_lse = views.load_all(inputs, index, grad_out, out, lse)
            if grad_lse is not None:
                grad[..., value_dim] = views.load(grad_lse, index)
                own_out[..., value_dim] = -1.0
            dq, *dkv = views.backward(grad, q, k, v, own_out, own_lse)
            for i, total in enumerate(grad_additional):
                if total is not None:
                    target = total if chunk is None else total[chunk[-2], :, chunk[-1]]
                    tail = dkv[i][:, :, views.cols :, : total.shape[-1]].transpose(1, 2)
                    target.add_(tail.unflatten(0, (-1, len(target))).sum(0))
                    dkv[i] = dkv[i][:, :, : views.cols]
            if alone:
                grad_query = heads_last(dq, query, query.shape[-1])
                grad_kv = [heads_last(x, y, y.shape[-1]) for x, y in zip(dkv, (key, value))]
                break
            views.store(grad_query, index, dq)
            for x, total in zip(dkv, grad_kv):
                views.add(total, index, x)
    grads = (grad_query, *grad_kv, None, *grad_additional)
    if half:
        grads = tuple([None if x is None else x.to(query.dtype) for x in grads])
    return Gradients(*grads)
