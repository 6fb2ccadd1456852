"""Unfused attention over tiles; weights are ``[batch, *space, heads, window tokens]``.

What these functions return is heads-first in memory, as their callers want it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...inputs import compute_dtype
from ...neighborhood import Neighborhood, outer
from .bias import add_bias_gradient, bias_of
from .blocks import Block, Scratch, add_boxes, blocks_for, load


def _slots(block: Block, rule: Neighborhood, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Box position of every window slot, ``[tile tokens, window tokens]``, and which are attended.

    The second is None where all are; slots that are not hold some position inside the box.
    """
    index = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    valid = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for run, k in zip(block.runs, rule.kernel_size):
        position = run.lower[:, None] + torch.arange(k, device="cpu")
        own_valid = position < run.upper[:, None]
        index = outer(index * run.key_size, position.clamp(max=run.key_size - 1), torch.add)
        valid = outer(valid, own_valid, torch.logical_and)
    return index.to(device), None if bool(valid.all()) else valid.to(device)


def _spread(weights: Tensor, index: Tensor, valid: Tensor | None, box: int, out: Tensor) -> Tensor:
    """Weights in window slots as weights over the box; ``out`` has ``box + 1`` columns."""
    if valid is not None:  # masked slots go to the column that nobody reads
        index = index.masked_fill(~valid, box)
    out.zero_().scatter_(2, index.expand(len(weights), -1, -1), weights)
    return out[..., :box]


def qk(query: Tensor, key: Tensor, rule: Neighborhood) -> Tensor:
    """Products of every query with its window's keys; 0 in masked slots."""
    batch, heads, dim = query.shape[0], query.shape[-2], query.shape[-1]
    attn = query.new_empty(batch, heads, *query.shape[1:-2], rule.window_tokens).movedim(1, -2)
    scratch = Scratch(query, compute_dtype(query.dtype))
    for block in blocks_for(rule, query, key, dim):
        q_view, k_view = block.queries(query, heads), block.keys(key)
        attn_view = block.queries(attn, heads)
        index, valid = _slots(block, rule, query.device)
        rows, box = math.prod(block.query_sizes), math.prod(block.key_sizes)
        for chunk in block.chunks(query, key):
            part = q_view[chunk]
            n = part.numel() // (rows * dim)
            q = load(scratch("q", n, rows, dim), part)
            k = load(scratch("k", n, box, dim), k_view[chunk])
            s = torch.bmm(q, k.transpose(1, 2), out=scratch("s", n, rows, box))
            picked = scratch("picked", n, *index.shape)
            torch.gather(s, 2, index.expand(n, -1, -1), out=picked)
            if valid is not None:
                picked.masked_fill_(~valid, 0)
            target = attn_view[chunk]
            target.copy_(picked.view(target.shape))
    return attn


def av(attn: Tensor, value: Tensor, rule: Neighborhood) -> Tensor:
    """Sum of the window's values, weighted; masked slots are ignored."""
    batch, heads, dim = value.shape[0], value.shape[-2], value.shape[-1]
    out = value.new_empty(batch, heads, *value.shape[1:-2], dim).movedim(1, -2)
    scratch = Scratch(value, compute_dtype(value.dtype))
    for block in blocks_for(rule, value, value, dim):
        attn_view, v_view, out_view = (
            block.queries(attn, heads),
            block.keys(value),
            block.queries(out, heads),
        )
        index, valid = _slots(block, rule, value.device)
        rows, box = math.prod(block.query_sizes), math.prod(block.key_sizes)
        for chunk in block.chunks(value, value):
            part = attn_view[chunk]
            n = part.numel() // index.numel()
            weights = load(scratch("a", n, *index.shape), part)
            dense = _spread(weights, index, valid, box, scratch("p", n, rows, box + 1))
            v = load(scratch("v", n, box, dim), v_view[chunk])
            o = torch.bmm(dense, v, out=scratch("o", n, rows, dim))
            target = out_view[chunk]
            target.copy_(o.view(target.shape))
    return out


def av_transposed(attn: Tensor, x: Tensor, rule: Neighborhood) -> Tensor:
    """For every key, the sum of ``x`` at the queries that attend it, weighted."""
    batch, heads, dim = x.shape[0], x.shape[-2], x.shape[-1]
    dtype = compute_dtype(x.dtype)
    out = x.new_zeros(batch, heads, *x.shape[1:-2], dim, dtype=dtype).movedim(1, -2)
    scratch = Scratch(x, dtype)
    for block in blocks_for(rule, x, x, dim):
        attn_view, x_view, out_view = (
            block.queries(attn, heads),
            block.queries(x, heads),
            block.keys(out),
        )
        index, valid = _slots(block, rule, x.device)
        rows, box = math.prod(block.query_sizes), math.prod(block.key_sizes)
        for chunk in block.chunks(x, x):
            part = attn_view[chunk]
            n = part.numel() // index.numel()
            weights = load(scratch("a", n, *index.shape), part)
            dense = _spread(weights, index, valid, box, scratch("p", n, rows, box + 1))
            xs = load(scratch("x", n, rows, dim), x_view[chunk])
            boxes = torch.bmm(dense.transpose(1, 2), xs, out=scratch("o", n, box, dim))
            add_boxes(block, out_view, chunk, boxes)
    return out.to(x.dtype)


def _token_blocks(rule: Neighborhood, like: Tensor) -> list[Block]:
    """Blocks for a tensor ``[1, *space, heads, channels]``."""
    return blocks_for(rule, like, like, like.shape[-1])


def rpb_bias(rpb: Tensor, shape: Sequence[int], rule: Neighborhood) -> Tensor:
    """``rpb`` in every window slot, ``[*space, heads, window tokens]``; 0 in masked slots."""
    heads = rpb.shape[0]
    out = rpb.new_empty(1, heads, *shape, rule.window_tokens).movedim(1, -2)
    for block in _token_blocks(rule, out):
        index, valid = _slots(block, rule, rpb.device)
        picked = bias_of(block, rpb, rule).gather(2, index.expand(heads, -1, -1))
        if valid is not None:
            picked = picked.masked_fill(~valid, 0)
        view = block.queries(out, heads)
        view.copy_(picked.view(heads, *view.shape[-len(shape) - 2 :]))
    return out[0]


def rpb_bias_transposed(grad: Tensor, rule: Neighborhood) -> Tensor:
    """The gradient of ``rpb`` from ``grad [*space, heads, window tokens]``."""
    heads, dtype = grad.shape[-2], compute_dtype(grad.dtype)
    out = grad.new_zeros(heads, *(2 * k - 1 for k in rule.kernel_size), dtype=dtype)
    grad = grad[None]
    for block in _token_blocks(rule, grad):
        index, valid = _slots(block, rule, grad.device)
        view = block.queries(grad, heads)
        lead = tuple(range(2 * rule.rank + 1))
        weights = view.sum(lead, dtype=dtype).reshape(heads, *index.shape)
        rows, box = math.prod(block.query_sizes), math.prod(block.key_sizes)
        dense = _spread(weights, index, valid, box, weights.new_empty(heads, rows, box + 1))
        add_bias_gradient(block, dense, out, rule)
    return out.to(grad.dtype)
