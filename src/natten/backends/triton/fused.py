"""Fused attention by the portable kernels, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...documents import Documents
from ...inputs import Gradients, Inputs
from ...neighborhood import Rule
from .launch import contiguous, is_aligned, on_device, readable, summed
from .plan import Moved, Part, Plan, plan_for


def _as_read(inputs: Inputs) -> list[Any]:
    """The tensors of :class:`Inputs` as kernels read them; masks are read as they lie."""
    others = [None if x is None else contiguous(x) for x in inputs.differentiable[3:]]
    return [*map(readable, inputs[:3]), *others]


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
    query, key, value, rpb, additional_keys, additional_values, *_ = _as_read(inputs)
    table = None if documents is None else documents.table
    masks = inputs.key_mask, inputs.additional_mask
    found = plan_for(query, key, value, rpb, additional_keys, rule, scale, documents, tiles, masks)
    with on_device(query):
        if found.small is not None and is_aligned(query, key, value):
            found.small.run(
                query=query, key=key, value=value, rpb=rpb, out=out, lse=lse, key_mask=masks[0]
            )
            return out, lse
        if found.bands_forward is not None and is_aligned(query, key, value):
            found.bands_forward.run(
                query=query, key=key, value=value, out=out, lse=lse, key_mask=masks[0]
            )
            return out, lse
        found.forward.run(
            query=query, key=key, value=value, rpb=rpb, additional_keys=additional_keys,
            additional_values=additional_values, documents=table, out=out, lse=lse,
            key_mask=masks[0], additional_mask=masks[1],
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
    grad_rpb = None
    grad_additional: tuple[Tensor | None, Tensor | None] = None, None
    lse_delta = lse.new_empty(*lse.shape, 4)
    query, key, value, rpb, additional_keys, additional_values, *_ = _as_read(inputs)
    grad_out, out, lse = contiguous(grad_out), out.contiguous(), lse.contiguous()
    table = None if documents is None else documents.table
    masks = inputs.key_mask, inputs.additional_mask
    found = plan_for(query, key, value, rpb, additional_keys, rule, scale, documents, tiles, masks)
    with on_device(query):
        of_bands = is_aligned(query, key, value, grad_out, out)
        if of_bands and grad_lse is None and found.bands_dq is not None:
            found.bands_dq.run(
                query=query, key=key, value=value, out=out, lse=lse, grad_out=grad_out,
                lse_delta=lse_delta, grad_query=grad_query, key_mask=masks[0],
            )  # fmt: skip
        else:
            dq = found.dq if grad_lse is None else found.dq_with_grad_lse
            dq.run(
                query=query, key=key, value=value, rpb=rpb, additional_keys=additional_keys,
                additional_values=additional_values, documents=table, out=out, lse=lse,
                grad_out=grad_out, grad_lse=None if grad_lse is None else contiguous(grad_lse),
                lse_delta=lse_delta, grad_query=grad_query, key_mask=masks[0],
                additional_mask=masks[1],
            )  # fmt: skip
        if of_bands and found.bands_dkdv is not None:
            found.bands_dkdv.run(
                query=query, key=key, value=value, grad_out=grad_out, lse_delta=lse_delta,
                grad_key=grad_key, grad_value=grad_value, key_mask=masks[0],
            )  # fmt: skip
        else:
            found.dkdv.run(
                query=query, key=key, value=value, rpb=rpb, documents=table, grad_out=grad_out,
                lse_delta=lse_delta, grad_key=grad_key, grad_value=grad_value, key_mask=masks[0],
            )  # fmt: skip
        if additional_keys is not None and additional_values is not None:
            grad_additional = additional_gradients(
                found, query, additional_keys, additional_values, grad_out, lse_delta, masks[1]
            )
        if rpb is not None:
            grad_rpb = rpb_gradient(found, query, key, value, rpb, grad_out, lse_delta, masks[0])
    return Gradients(grad_query, grad_key, grad_value, grad_rpb, *grad_additional)


def additional_gradients(
    found: Plan | Part | Moved,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    lse_delta: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of additional keys and values, which every query attends: sums over each split of
    the queries, then over the splits."""
    splits, launch = found.additional
    shape = (found.batch, found.kv_heads, splits, found.num_additional or 0)
    grads = [
        query.new_empty(*shape, channels, dtype=torch.float32)
        for channels in (found.dim, found.value_dim)
    ]
    if found.num_additional:
        launch.run(
            query=query, additional_keys=key, additional_values=value, grad_out=grad_out,
            lse_delta=lse_delta, grad_keys=grads[0], grad_values=grads[1], additional_mask=mask,
        )  # fmt: skip
    keys, values = (summed(x, 2).transpose(1, 2).to(query.dtype).contiguous() for x in grads)
    return keys, values


def rpb_gradient(
    found: Plan | Part | Moved, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor,
    grad_out: Tensor, lse_delta: Tensor, key_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of the bias: sums over splits of the queries, pair by pair, and these summed."""
    shape, launches = found.rpb
    sums, grad = query.new_empty(shape, dtype=torch.float32), torch.empty_like(rpb)
    for launch, add_up in launches:
        launch.run(
            query=query, key=key, value=value, rpb=rpb, grad_out=grad_out, lse_delta=lse_delta,
            sums=sums, key_mask=key_mask,
        )  # fmt: skip
        add_up.run(sums=sums, grad_rpb=grad)
    return grad
