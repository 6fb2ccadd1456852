"""Fused attention by the portable kernels, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...documents import Documents
from ...inputs import Gradients, Inputs
from ...neighborhood import Rule
from .launch import contiguous, on_device, readable
from .plan import Plan, plan_for


def _others(inputs: Inputs, documents: Documents | None) -> list[Tensor | None]:
    """Bias, additional tokens and table as kernels read them."""
    table = None if documents is None else documents.table
    others = (inputs.rpb, inputs.additional_keys, inputs.additional_values, table)
    return [None if x is None else contiguous(x) for x in others]


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
        bias, ek, ev, table = _others(inputs, documents)
        found.forward.run(
            query=inputs.query, key=inputs.key, value=inputs.value, rpb=bias, extra_key=ek,
            extra_value=ev, documents=table, out=out, lse=lse,
        )  # fmt: skip
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
        of_query = found.query if grad_lse is None else found.query_of_both
        grad_lse = None if grad_lse is None else contiguous(grad_lse)
        of_query.run(
            query=query, key=key, value=value, rpb=bias, extra_key=ek, extra_value=ev,
            documents=table, out=out, lse=lse, grad_out=grad_out, grad_lse=grad_lse, terms=terms,
            grad_query=grad_query,
        )  # fmt: skip
        found.key.run(
            query=query, key=key, value=value, rpb=bias, documents=table, grad_out=grad_out,
            terms=terms, grad_key=grad_key, grad_value=grad_value,
        )  # fmt: skip
        if ek is not None and ev is not None:
            grad_additional_keys, grad_additional_values = extra_gradients(
                found, query, ek, ev, grad_out, terms
            )
        if bias is not None:
            grad_rpb = _bias_gradient(found, query, key, value, bias, grad_out, terms)
    return Gradients(
        grad_query, grad_key, grad_value, grad_rpb, grad_additional_keys, grad_additional_values
    )


def extra_gradients(
    found: Plan, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, terms: Tensor
) -> tuple[Tensor, Tensor]:
    """Every query reaches the additional tokens: sums over parts, then over the parts."""
    parts, launch = found.extra_tokens
    shape = (found.batch, found.kv_heads, parts, found.extra or 0)
    grads = [
        query.new_empty(*shape, channels, dtype=torch.float32)
        for channels in (found.dim, found.value_dim)
    ]
    if found.extra:
        launch.run(
            query=query, extra_key=key, extra_value=value, grad_out=grad_out, terms=terms,
            grad_key=grads[0], grad_value=grads[1],
        )  # fmt: skip
    keys, values = (x.sum(2).transpose(1, 2).to(query.dtype).contiguous() for x in grads)
    return keys, values


def _bias_gradient(
    found: Plan, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor, grad_out: Tensor,
    terms: Tensor,
) -> Tensor:  # fmt: skip
    shape, launches = found.rpb
    partial, grad = query.new_empty(shape, dtype=torch.float32), torch.empty_like(rpb)
    for launch, add_up in launches:
        launch.run(
            query=query, key=key, value=value, rpb=rpb, grad_out=grad_out, terms=terms,
            partial=partial,
        )  # fmt: skip
        add_up.run(partial=partial, grad_rpb=grad)
    return grad
