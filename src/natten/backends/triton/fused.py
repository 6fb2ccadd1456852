"""Fused attention by the portable kernels, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...documents import Documents
from ...inputs import Gradients, Inputs
from ...neighborhood import Rule
from .plan import Plan, contiguous, on_device, plan_for, readable


def _others(inputs: Inputs, documents: Documents | None) -> list[Tensor]:
    """Bias, additional tokens and table as kernels read them; what is missing is never read."""
    table = None if documents is None else documents.table
    others = (inputs.rpb, inputs.additional_keys, inputs.additional_values, table)
    return [inputs.query if x is None else contiguous(x) for x in others]


def _readable(inputs: Inputs) -> Inputs:
    query, key, value, *others = inputs
    return Inputs(readable(query), readable(key), readable(value), *others)


def forward(
    inputs: Inputs,
    rule: Rule,
    scale: float,
    documents: Documents | None = None,
    tiles: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value_dim]`` and LSE ``[batch, *space, heads]``.

    With ``documents``, batch is 1 and space is the tokens of all of them.
    """
    query = inputs.query
    *rows, _ = query.shape
    out = query.new_empty(*rows, inputs.value.shape[-1])
    lse = query.new_empty(*rows, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    inputs = _readable(inputs)
    found = plan_for(inputs, rule, scale, documents, tiles)
    with on_device(query):
        found.forward(*inputs[:3], *_others(inputs, documents), out, lse)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    scale: float,
    documents: Documents | None = None,
    tiles: tuple[int, ...] = (),
) -> Gradients:
    """Gradients of the inputs."""
    if inputs.query.numel() == 0 or inputs.key.numel() == 0:
        return Gradients.zeros(inputs)
    grad_query, grad_key, grad_value = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3]
    ]
    terms = lse.new_empty(*lse.shape, 4)
    grad_rpb = grad_additional_keys = grad_additional_values = None
    inputs = _readable(inputs)
    query, key, value = inputs[:3]
    grad_out, out, lse = contiguous(grad_out), out.contiguous(), lse.contiguous()
    found = plan_for(inputs, rule, scale, documents, tiles)
    with on_device(query):
        bias, ek, ev, table = _others(inputs, documents)
        run, given = found.query, lse  # of which nothing is read
        if grad_lse is not None:
            run, given = found.query_of_both, contiguous(grad_lse)
        run(query, key, value, bias, ek, ev, table, out, lse, grad_out, given, terms, grad_query)
        found.key(query, key, value, bias, table, grad_out, terms, grad_key, grad_value)
        if inputs.additional_keys is not None:
            grad_additional_keys, grad_additional_values = extra_gradients(
                found, query, ek, ev, grad_out, terms
            )
        if inputs.rpb is not None:
            grad_rpb = _bias_gradient(found, query, key, value, bias, grad_out, terms)
    return Gradients(
        grad_query, grad_key, grad_value, grad_rpb, grad_additional_keys, grad_additional_values
    )


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
