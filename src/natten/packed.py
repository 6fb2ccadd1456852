"""Attention inside packed documents in one launch, where the backend reads a table of documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from natten import backends
from natten.neighborhood import Rule
from natten.operators import differentiable_gradients, is_composed, is_plain
from natten.varlen import Documents

Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def backend_for(query: Tensor, key: Tensor, value: Tensor, name: str) -> Any | None:
    """The functions of the backend that runs packed documents, or None if none does."""
    tangents = forward_ad._current_level >= 0
    if torch.compiler.is_compiling() or tangents or not is_plain((query, key, value)):
        return None
    dims = query.shape[-1], value.shape[-1]
    found = backends.find(name, backends.Problem("packed", query.device, query.dtype, *dims))
    return None if found is None or found.name != (name or found.name) else found.module


def packed_attention(
    backend: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    rule: Rule,
    scale: float,
    one_by_one: Attention,
) -> tuple[Tensor, Tensor]:
    """Output ``[1, tokens, heads, value dim]`` and LSE ``[1, tokens, heads]``.

    Args:
        query, key, value: ``[1, tokens, heads, channels]``.
        one_by_one: the same function of these three, for second derivatives.
    """
    return _PackedAttention.apply(query, key, value, backend, documents, rule, scale, one_by_one)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        query, key, value, backend, documents, rule, scale, _ = args
        out, lse = backend.forward(query, key, value, None, None, None, rule, scale, documents)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.others = args[3:]
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *inputs, out, lse = ctx.saved_tensors
        backend, documents, rule, scale, one_by_one = ctx.others
        if is_composed(grads):
            found = differentiable_gradients(one_by_one, inputs, ctx.needs_input_grad[:3], grads)
        else:
            grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
            empty = (None, None, None)
            found = backend.backward(
                grad_out, grads[1], *inputs, *empty, out, lse, rule, scale, documents
            )
        return (*found[:3], *(None for _ in ctx.others))
