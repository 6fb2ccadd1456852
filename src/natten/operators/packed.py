"""Attention inside packed documents: in one launch where the backend reads a table of documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._torch import in_forward_mode
from ..documents import Documents
from ..inputs import Inputs
from ..neighborhood import Dense, Neighborhood, Rule, crop_rpb
from .composed import differentiable_gradients
from .fused import attention
from .schema import Choice
from .transforms import is_composed, is_plain_call

Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def document_attention(
    inputs: Inputs, shapes: Sequence[tuple[int, ...]], documents: Callable[[], Documents],
    rule: Neighborhood, scale: float, choice: Choice, additional_lengths: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Neighborhood attention inside each document, whose window is the largest that fits it.

    Args:
        inputs: packed tensors, ``[1, tokens, ...]`` and ``[1, total, ...]``, and perhaps a bias.
        shapes: the documents' token layouts.
        documents: makes the table that a kernel reads.
        rule, scale, choice: as of one document.
        additional_lengths: how many additional tokens each document has; empty if there are none.

    Returns:
        Output ``[1, tokens, heads, value_dim]`` and LSE ``[1, tokens, heads]``.
    """
    query, key, value, *others = inputs

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        results = []
        for own, fitted in each_document(
            Inputs(q, k, v, *others), shapes, rule, additional_lengths
        ):
            out, lse = attention(own, fitted, scale, choice)
            results.append((out.flatten(1, -3), lse.flatten(1, -2)))
        if not results:
            return attention(Inputs(q, k, v), Dense(), 1.0)
        outputs, exponents = zip(*results)
        return torch.cat(outputs, dim=1), torch.cat(exponents, dim=1)

    backend = None
    # A table of documents has windows only, neither a bias nor additional tokens nor masks.
    if query.shape[1] and all(x is None for x in others):
        backend = backend_for(query, key, value, rule, scale, choice.backend)
    if backend is None:
        return one_by_one(query, key, value)
    return packed_attention(backend, query, key, value, documents(), rule, scale, one_by_one)


def each_document(
    inputs: Inputs, shapes: Sequence[tuple[int, ...]], rule: Neighborhood,
    additional_lengths: Sequence[int] = (),
) -> Iterator[tuple[Inputs, Neighborhood]]:  # fmt: skip
    """The inputs of each document that has tokens, with batch size 1, and the windows that fit it.

    The arguments are those of :func:`document_attention`.
    """
    query, key, value, rpb, *additional, key_mask, additional_mask = inputs
    tokens = [math.prod(shape) for shape in shapes]
    counts = list(additional_lengths) or [0] * len(shapes)

    def split(sizes: list[int], *packed: Tensor | None) -> Iterator[Any]:
        return zip(*([None] * len(sizes) if x is None else x.split(sizes, 1) for x in packed))

    theirs = split(tokens, query, key, value, key_mask), split(counts, *additional, additional_mask)
    for shape, count, own, own_additional in zip(shapes, counts, *theirs):
        if 0 in shape:
            continue
        fitted = rule.fitted(shape)
        own_rpb = None if rpb is None else crop_rpb(rpb, rule.kernel_size, fitted.kernel_size)
        *packed, own_mask = own
        q, k, v = (x.unflatten(1, shape) for x in packed)
        own_mask = None if own_mask is None else own_mask.unflatten(1, shape)
        keys, values, mask = own_additional if count else (None, None, None)
        yield Inputs(q, k, v, own_rpb, keys, values, own_mask, mask), fitted


def problem_of(query: Tensor, value: Tensor, rule: Rule, scale: float) -> backends.Problem:
    """What decides which backend runs packed documents."""
    # Not their number of tokens, which would have the choice made again for every batch.
    dims = query.shape[-1], value.shape[-1]
    return backends.Problem("packed", query.device, query.dtype, *dims, rule=rule, scale=scale)


def backend_for(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, scale: float, name: str
) -> backends.Backend | None:
    """The backend that runs packed documents, or None if none does."""
    if in_forward_mode() or not is_plain_call((query, key, value)):
        return None
    found = backends.find(name, problem_of(query, value, rule, scale))
    return None if found is None or found.name != (name or found.name) else found


def packed_attention(
    backend: backends.Backend,
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
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any
    ) -> tuple[Tensor, Tensor]:
        backend, documents, rule, scale, _ = ctx.others = others
        out, lse = backend.packed_forward(Inputs(query, key, value), documents, rule, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        backend, documents, rule, scale, one_by_one = ctx.others
        grads: Sequence[Tensor | None]
        if is_composed(grad_out, grad_lse):
            needed = ctx.needs_input_grad[: len(tensors)]
            grads = differentiable_gradients(one_by_one, tensors, needed, (grad_out, grad_lse))
        else:
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            found = backend.packed_backward(
                grad_out, grad_lse, Inputs(*tensors), out, lse, documents, rule, scale
            )
            grads = found.query, found.key, found.value
        return (*grads, *(None for _ in ctx.others))
