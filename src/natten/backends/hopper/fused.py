"""Fused attention by the Hopper kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...inputs import Gradients, Inputs
from ...neighborhood import Neighborhood, Rule
from ..triton.fused import additional_gradients
from ..triton.launch import contiguous, on_device
from .descriptors import readable
from .plan import plan_for


def forward(inputs: Inputs, rule: Rule, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value_dim]`` and LSE ``[batch, *space, heads]``."""
    assert isinstance(rule, Neighborhood) and inputs.rpb is None
    query = inputs.query
    *rows, _ = query.shape
    out = query.new_empty(*rows, inputs.value.shape[-1])
    lse = query.new_empty(*rows, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query, key, value = [readable(x, rule.dilation) for x in inputs[:3]]
    more = _additional(inputs)
    found = plan_for(query, key, value, more, rule, scale)
    with on_device(query):
        found.forward.run(query=query, key=key, value=value, more=more, out=out, lse=lse)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    scale: float,
) -> Gradients:
    """Gradients of the inputs; there is no bias."""
    assert isinstance(rule, Neighborhood) and inputs.rpb is None
    if inputs.query.numel() == 0:
        return Gradients.zeros(inputs)
    grad_query, grad_key, grad_value = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3]
    ]
    terms = lse.new_empty(*lse.shape, 4)
    query, key, value = [readable(x, rule.dilation) for x in inputs[:3]]
    grad_out = readable(grad_out.contiguous(), rule.dilation)
    grad_lse = None if grad_lse is None else contiguous(grad_lse)
    more = _additional(inputs)
    found = plan_for(query, key, value, more, rule, scale)
    with on_device(query):
        found.terms[grad_lse is not None].run(
            out=out.contiguous(), lse=lse.contiguous(), grad_out=grad_out, grad_lse=grad_lse,
            lse_delta=terms,
        )  # fmt: skip
        queries, keys = (query, grad_out), (key, value)
        found.query.run(outer=queries, inner=keys, terms=terms, more=more, grads=(grad_query,))
        found.key.run(outer=keys, inner=queries, terms=terms, more=(), grads=(grad_key, grad_value))
        additional: Sequence[Tensor | None] = Gradients.zeros(inputs)[4:]
        if more:
            additional = additional_gradients(
                found.portable, query, more[0], more[1], grad_out, terms
            )
    return Gradients(grad_query, grad_key, grad_value, None, *additional)


def _additional(inputs: Inputs) -> tuple[Tensor, ...]:
    """Additional keys and values, if there are any."""
    keys, values = inputs.additional_keys, inputs.additional_values
    if keys is None or values is None or keys.shape[1] == 0:
        return ()
    return readable(keys.contiguous(), (1,)), readable(values.contiguous(), (1,))
