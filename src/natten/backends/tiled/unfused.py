"""Unfused attention over tiles; weights are ``[batch, *space, heads, window tokens]``.

Results are heads-first in memory, as the callers need them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...inputs import compute_dtype
from ...neighborhood import Neighborhood, outer
from .bias import add_bias_gradient, bias_of
from .grids import Scratch, TileGrid, add_kv_blocks, grids_for, grids_of, load


def _slots(
    grid: TileGrid, rule: Neighborhood, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The key in each window slot, ``[queries, window tokens]``, and whether it is attended.

    Keys are counted inside the tile's block. The second result is None where all are attended;
    slots that are not attended hold some key of the block.
    """
    index = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    valid = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for run, k in zip(grid.runs, rule.kernel_size):
        lower, upper = torch.tensor(run.spans, device="cpu")[..., None]
        position = lower + torch.arange(k, device="cpu")
        own_valid = position < upper
        index = outer(index * run.key_size, position.clamp(max=run.key_size - 1), torch.add)
        valid = outer(valid, own_valid, torch.logical_and)
    return index.to(device), None if bool(valid.all()) else valid.to(device)


def _spread(weights: Tensor, index: Tensor, valid: Tensor | None, cols: int, out: Tensor) -> Tensor:
    """Weights in window slots as weights over the block's keys; ``out`` has one column more."""
    if valid is not None:  # masked slots go to the last column, which is cut off
        index = index.masked_fill(~valid, cols)
    out.zero_().scatter_(2, index.expand(len(weights), -1, -1), weights)
    return out[..., :cols]


def qk(query: Tensor, key: Tensor, rule: Neighborhood) -> Tensor:
    """The product of each query with each key of its window; 0 in masked slots."""
    batch, heads, dim = query.shape[0], query.shape[-2], query.shape[-1]
    attn = query.new_empty(batch, heads, *query.shape[1:-2], rule.window_tokens).movedim(1, -2)
    scratch = Scratch(query, compute_dtype(query.dtype))
    for grid in grids_for(rule, query, key, dim):
        q_view, k_view = grid.queries(query, heads), grid.keys(key)
        attn_view = grid.queries(attn, heads)
        index, valid = _slots(grid, rule, query.device)
        rows, cols = math.prod(grid.query_sizes), math.prod(grid.key_sizes)
        for chunk in grid.chunks(query, key):
            part = q_view[chunk]
            n = part.numel() // (rows * dim)
            q = load(scratch("q", n, rows, dim), part)
            k = load(scratch("k", n, cols, dim), k_view[chunk])
            s = torch.bmm(q, k.transpose(1, 2), out=scratch("s", n, rows, cols))
            picked = scratch("picked", n, *index.shape)
            torch.gather(s, 2, index.expand(n, -1, -1), out=picked)
            if valid is not None:
                picked.masked_fill_(~valid, 0)
            target = attn_view[chunk]
            target.copy_(picked.view(target.shape))
    return attn


def av(attn: Tensor, value: Tensor, rule: Neighborhood) -> Tensor:
    """For each query, the weighted sum of its window's values; masked slots are ignored."""
    batch, heads, dim = value.shape[0], value.shape[-2], value.shape[-1]
    out = value.new_empty(batch, heads, *attn.shape[1:-2], dim).movedim(1, -2)
    scratch = Scratch(value, compute_dtype(value.dtype))
    for grid in grids_for(rule, attn, value, dim):
        attn_view, v_view, out_view = (
            grid.queries(attn, heads),
            grid.keys(value),
            grid.queries(out, heads),
        )
        index, valid = _slots(grid, rule, value.device)
        rows, cols = math.prod(grid.query_sizes), math.prod(grid.key_sizes)
        for chunk in grid.chunks(out, value):
            part = attn_view[chunk]
            n = part.numel() // index.numel()
            weights = load(scratch("a", n, *index.shape), part)
            dense = _spread(weights, index, valid, cols, scratch("p", n, rows, cols + 1))
            v = load(scratch("v", n, cols, dim), v_view[chunk])
            o = torch.bmm(dense, v, out=scratch("o", n, rows, dim))
            target = out_view[chunk]
            target.copy_(o.view(target.shape))
    return out


def av_transposed(
    attn: Tensor, x: Tensor, key_shape: tuple[int, ...], rule: Neighborhood
) -> Tensor:
    """For each key, the weighted sum of ``x`` at the queries that attend it."""
    batch, heads, dim = x.shape[0], x.shape[-2], x.shape[-1]
    dtype = compute_dtype(x.dtype)
    out = x.new_zeros(batch, heads, *key_shape, dim, dtype=dtype).movedim(1, -2)
    scratch = Scratch(x, dtype)
    for grid in grids_for(rule, x, out, dim):
        attn_view, x_view, out_view = (
            grid.queries(attn, heads),
            grid.queries(x, heads),
            grid.keys(out),
        )
        index, valid = _slots(grid, rule, x.device)
        rows, cols = math.prod(grid.query_sizes), math.prod(grid.key_sizes)
        for chunk in grid.chunks(x, out):
            part = attn_view[chunk]
            n = part.numel() // index.numel()
            weights = load(scratch("a", n, *index.shape), part)
            dense = _spread(weights, index, valid, cols, scratch("p", n, rows, cols + 1))
            xs = load(scratch("x", n, rows, dim), x_view[chunk])
            sums = torch.bmm(dense.transpose(1, 2), xs, out=scratch("o", n, cols, dim))
            add_kv_blocks(grid, out_view, chunk, sums)
    return out.to(x.dtype)


def rpb_bias(
    rpb: Tensor, shape: tuple[int, ...], key_shape: tuple[int, ...], rule: Neighborhood
) -> Tensor:
    """``rpb`` in each window slot, ``[*space, heads, window tokens]``; 0 in masked slots."""
    heads = rpb.shape[0]
    out = rpb.new_empty(1, heads, *shape, rule.window_tokens).movedim(1, -2)
    for grid in grids_of(rule, shape, key_shape, heads, rule.window_tokens):
        index, valid = _slots(grid, rule, rpb.device)
        picked = bias_of(grid, rpb, rule).gather(2, index.expand(heads, -1, -1))
        if valid is not None:
            picked = picked.masked_fill(~valid, 0)
        view = grid.queries(out, heads)
        view.copy_(picked.view(heads, *view.shape[-len(shape) - 2 :]))
    return out[0]


def rpb_bias_transposed(grad: Tensor, key_shape: tuple[int, ...], rule: Neighborhood) -> Tensor:
    """The gradient of ``rpb`` from ``grad [*space, heads, window tokens]``."""
    heads, dtype = grad.shape[-2], compute_dtype(grad.dtype)
    out = grad.new_zeros(heads, *(2 * k - 1 for k in rule.kernel_size), dtype=dtype)
    grad, shape = grad[None], tuple(grad.shape[:-2])
    for grid in grids_of(rule, shape, key_shape, heads, rule.window_tokens):
        index, valid = _slots(grid, rule, grad.device)
        view = grid.queries(grad, heads)
        lead = tuple(range(2 * rule.rank + 1))
        weights = view.sum(lead, dtype=dtype).reshape(heads, *index.shape)
        rows, cols = math.prod(grid.query_sizes), math.prod(grid.key_sizes)
        dense = _spread(weights, index, valid, cols, weights.new_empty(heads, rows, cols + 1))
        add_bias_gradient(grid, dense, out, rule)
    return out.to(grad.dtype)
