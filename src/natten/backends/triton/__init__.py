"""Portable GPU kernels in Triton: one source for every rank, deterministic forward and backward.

Keys are read in boxes that start where a tile's first window starts; no token is permuted, padded
or copied, except a tensor whose last stride is not 1. What is a compile-time constant: dtype, head
dims, tile shapes, which axes are causal or strided or have one token, whether there is a bias or
additional tokens or packed documents, and the largest power of two (up to 16) that divides all
strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...neighborhood import Rule
from ...varlen import Documents
from .. import no_gradients
from .plan import Plan, contiguous, on_device, plan_for, readable
from .unfused import av, av_transposed, bias, bias_transposed, qk

__all__ = ["av", "av_transposed", "backward", "bias", "bias_transposed", "forward", "qk"]


def _others(
    query: Tensor,
    rpb: Tensor | None,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
    documents: Documents | None,
) -> list[Tensor]:
    """Bias, additional tokens and table as kernels read them; what is missing is never read."""
    table = None if documents is None else documents.table
    return [query if x is None else contiguous(x) for x in (rpb, extra_keys, extra_values, table)]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
    rule: Rule,
    scale: float,
    documents: Documents | None = None,
    tiles: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value dim]`` and LSE ``[batch, *space, heads]``.

    With ``documents``, batch is 1 and space is the tokens of all of them.
    """
    *rows, _ = query.shape
    out = query.new_empty(*rows, value.shape[-1])
    lse = query.new_empty(*rows, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query, key, value = readable(query), readable(key), readable(value)
    found = plan_for(query, key, value, rpb, extra_keys, rule, scale, documents, tiles)
    with on_device(query):
        others = _others(query, rpb, extra_keys, extra_values, documents)
        found.forward(query, key, value, *others, out, lse)
    return out, lse


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
    rule: Rule,
    scale: float,
    documents: Documents | None = None,
    tiles: tuple[int, ...] = (),
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, rpb, additional keys and additional values."""
    if query.numel() == 0 or key.numel() == 0:
        return no_gradients(query, key, value, rpb, extra_keys, extra_values)
    grad_query, grad_key, grad_value = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    ]
    terms = lse.new_empty(*lse.shape, 4)
    grad_rpb = grad_ek = grad_ev = None
    query, key, value = readable(query), readable(key), readable(value)
    grad_out, out, lse = contiguous(grad_out), out.contiguous(), lse.contiguous()
    found = plan_for(query, key, value, rpb, extra_keys, rule, scale, documents, tiles)
    with on_device(query):
        bias, ek, ev, table = _others(query, rpb, extra_keys, extra_values, documents)
        run, given = found.query, lse  # of which nothing is read
        if grad_lse is not None:
            run, given = found.query_of_both, contiguous(grad_lse)
        run(query, key, value, bias, ek, ev, table, out, lse, grad_out, given, terms, grad_query)
        found.key(query, key, value, bias, table, grad_out, terms, grad_key, grad_value)
        if extra_keys is not None:
            grad_ek, grad_ev = extra_gradients(found, query, ek, ev, grad_out, terms)
        if rpb is not None:
            grad_rpb = _bias_gradient(found, query, key, value, bias, grad_out, terms)
    return grad_query, grad_key, grad_value, grad_rpb, grad_ek, grad_ev


def extra_gradients(found: Plan, query: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """Every query reaches the additional tokens: sums over parts, then over the parts."""
    parts, launch = found.extra_tokens
    shape = (found.batch, found.kv_heads, parts, found.extra or 0)
    grads = [
        query.new_empty(*shape, channels, dtype=torch.float32)
        for channels in (found.dim, found.value_dim)
    ]
    if found.extra:
        launch(query, *others, *grads)
    keys, values = (x.sum(2).transpose(1, 2).to(query.dtype).contiguous() for x in grads)
    return keys, values


def _bias_gradient(
    found: Plan, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor, *others: Tensor
) -> Tensor:
    shape, launches = found.rpb
    partial, grad = query.new_empty(shape, dtype=torch.float32), torch.empty_like(rpb)
    for launch, add_up in launches:
        launch(query, key, value, rpb, *others, partial)
        add_up(partial, grad)
    return grad
