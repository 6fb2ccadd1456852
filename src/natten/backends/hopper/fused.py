"""Fused attention by the Hopper kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...documents import Documents
from ...inputs import Gradients, Inputs
from ...neighborhood import Rule
from ..triton.fused import additional_gradients, rpb_gradient
from ..triton.launch import contiguous, on_device
from .bias_plan import Tables
from .channels import narrowed, narrowed_gradients, widened, widened_inputs
from .costs import MOST_MASKED
from .descriptors import readable
from .flat import flattened
from .flat_plan import row_of_mask
from .plan import Moved, Plan, plan_for
from .widths import reads_in_place


def forward(
    inputs: Inputs, rule: Rule, scale: float, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value_dim]`` and LSE ``[batch, *space, heads]``.

    With ``documents``, batch is 1 and space is the tokens of all of them.
    """
    if _are_in_place(inputs, documents):
        return _forward(inputs, rule, scale, documents)
    with on_device(inputs.query):
        out, lse = _forward(widened_inputs(inputs), rule, scale, documents)
        return narrowed(out, inputs.value.shape[-1]), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    scale: float,
    documents: Documents | None = None,
) -> Gradients:
    """Gradients of the inputs."""
    if _are_in_place(inputs, documents):
        return _backward(grad_out, grad_lse, inputs, out, lse, rule, scale, documents)
    with on_device(inputs.query):
        wide, grad_out, out = widened_inputs(inputs), widened(grad_out), widened(out)
        grads = _backward(grad_out, grad_lse, wide, out, lse, rule, scale, documents)
        return narrowed_gradients(grads, inputs)


def _are_in_place(inputs: Inputs, documents: Documents | None) -> bool:
    """Whether kernels read heads where they are, without copies that are wider."""
    heads, dim = inputs.query.shape[-2:]
    kv_heads, value_dim = inputs.value.shape[-2:]
    more = *inputs[3:], documents
    return reads_in_place(dim, value_dim, heads, kv_heads, any(x is not None for x in more))


def _forward(
    inputs: Inputs, rule: Rule, scale: float, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """As :func:`forward`, of heads that need no copies."""
    query = inputs.query
    *rows, _ = query.shape
    out = query.new_empty(*rows, inputs.value.shape[-1])
    lse = query.new_empty(*rows, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if inputs.key.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    query, key, value = [readable(x, rule.dilation) for x in inputs[:3]]
    additional_keys, additional_values = _additional(inputs)
    tables = _tables(inputs, documents)
    masks = _masks(inputs, rule, additional_keys)
    others = scale, _dtype(inputs.rpb), documents, masks
    found = plan_for(query, key, value, additional_keys, rule, *others)
    with on_device(query):
        found.forward.run(
            query=query, key=key, value=value, out=out, additional_keys=additional_keys,
            additional_values=additional_values, key_at_seam=key, value_at_seam=value, lse=lse,
            key_mask=masks[0], additional_mask=masks[1], **tables, **found.made_columns("forward"),
        )  # fmt: skip
    return out, lse


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    scale: float,
    documents: Documents | None,
) -> Gradients:
    """As :func:`backward`, of heads that need no copies."""
    if inputs.query.numel() == 0 or inputs.key.numel() == 0:
        return Gradients.zeros(inputs)
    grad_query, grad_key, grad_value = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3]
    ]
    lse_delta = lse.new_empty(*lse.shape, 4)
    query, key, value = [readable(x, rule.dilation) for x in inputs[:3]]
    grad_out = readable(grad_out.contiguous(), rule.dilation)
    grad_lse = None if grad_lse is None else contiguous(grad_lse)
    additional_keys, additional_values = _additional(inputs)
    tables = _tables(inputs, documents)
    masks = _masks(inputs, rule, additional_keys)
    others = scale, _dtype(inputs.rpb), documents, masks
    found = plan_for(query, key, value, additional_keys, rule, *others)
    with on_device(query):
        of_additional = None
        if additional_keys is not None and found.dkdv_of_additional is not None:
            # Made here if these are copies: no other kernel may come between passes.
            of_additional = query.flatten(1, -3), grad_out.flatten(1, -3)
        rpb = tables.get("rpb")
        dq_and_bias = None if rpb is None else found.dq_and_bias
        of_bias = None if rpb is None or dq_and_bias is not None else found.bias_gradient
        tables |= found.made_columns("gradient")
        of_dq = found.dq if dq_and_bias is None else dq_and_bias
        of_passes = Tables((of_dq, found.dkdv, of_bias), rpb)
        found.lse_delta[grad_lse is not None].run(
            out=out.contiguous(), lse=lse.contiguous(), grad_out=grad_out, grad_lse=grad_lse,
            lse_delta=lse_delta, grad_key=grad_key, grad_value=grad_value,
        )  # fmt: skip
        made = of_passes.make()
        dkdv: Any = found.through_memory
        of_dkdv: Tensor | None = grad_query
        if dq_and_bias is not None:
            assert rpb is not None
            dkdv, of_dkdv = found.dkdv, None
            summed = dq_and_bias.summed(
                query=query, key=key, value=value, rpb=rpb, grad_out=grad_out,
                lse_delta=lse_delta, key_mask=masks[0], grad_query=grad_query, **made[0],
            )  # fmt: skip
        elif dkdv is None:
            dkdv, of_dkdv = found.dkdv, None
            found.dq.run(
                query=query, key=key, value=value, grad_out=grad_out, lse_delta=lse_delta,
                additional_keys=additional_keys, additional_values=additional_values, ds=None,
                grad_query=grad_query, grad_key=None, grad_value=None, qk_at_seam=key,
                gv_at_seam=value, lse_delta_at_seam=None, key_mask=masks[0],
                additional_mask=masks[1], **tables, **made[0],
            )  # fmt: skip
        dkdv.run(
            query=query, key=key, value=value, grad_out=grad_out, lse_delta=lse_delta,
            additional_keys=None, additional_values=None, ds=None, grad_query=of_dkdv,
            grad_key=grad_key, grad_value=grad_value, qk_at_seam=query, gv_at_seam=grad_out,
            lse_delta_at_seam=lse_delta, key_mask=masks[0], additional_mask=None, **tables,
            **made[1],
        )  # fmt: skip
        grad_additional: Sequence[Tensor | None]
        if additional_keys is not None and additional_values is not None:
            own = additional_keys, additional_values
            grad_additional = (
                additional_gradients(found.portable, query, *own, grad_out, lse_delta, masks[1])
                if of_additional is None
                else _additional_gradients(found, *of_additional, *own, lse_delta, masks[1])
            )
        else:  # not there, or empty
            given = inputs.additional_keys, inputs.additional_values
            grad_additional = [None if x is None else x.new_zeros(x.shape) for x in given]
        grad_rpb = None
        if rpb is not None and dq_and_bias is not None:
            grad_rpb = dq_and_bias.added_up(rpb, summed)
        elif rpb is not None:
            named = {"query": query, "key": key, "value": value, "rpb": rpb}
            named |= {"grad_out": grad_out, "lse_delta": lse_delta, "key_mask": masks[0]}
            grad_rpb = (
                rpb_gradient(found.portable, **named)
                if of_bias is None
                else of_bias.run(**named, **made[2])
            )
    return Gradients(grad_query, grad_key, grad_value, grad_rpb, *grad_additional)


def _tables(inputs: Inputs, documents: Documents | None) -> dict[str, Any]:
    """Arguments of kernels that read tables: of the bias, and of the tiles of documents. What such
    a table is made of stands for it."""
    found: dict[str, Any] = {"bias_tables": None, "tile_table": None}
    if inputs.rpb is not None:
        del found["bias_tables"]
        found["rpb"] = contiguous(inputs.rpb)
    if documents is not None:
        del found["tile_table"]
        found["documents"] = documents.table
    return found


def _masks(
    inputs: Inputs, rule: Rule, additional_keys: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Masks of keys and of additional ones, if there are such, as kernels can number them; those of
    windows that may be a row of tokens as such, so that a mask does not decide what runs."""
    key_mask, additional_mask = (
        x if x is None or max(x.stride()) <= MOST_MASKED // max(x.shape) else x.contiguous()
        for x in (inputs.key_mask, inputs.additional_mask)
    )
    if key_mask is not None:
        space = tuple(key_mask.shape[1:])
        if flattened(rule, space) is not None and row_of_mask(space, key_mask.stride()) is None:
            key_mask = key_mask.contiguous()
    return key_mask, None if additional_keys is None else additional_mask


def _additional_gradients(
    found: Plan | Moved,
    query: Tensor,
    grad_out: Tensor,
    keys: Tensor,
    values: Tensor,
    lse_delta: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of additional keys and values, which every query of a row of tokens attends."""
    dkdv = found.dkdv_of_additional
    assert dkdv is not None
    grad_keys, grad_values = torch.empty_like(keys), torch.empty_like(values)
    lse_delta = lse_delta.flatten(1, -3)
    dkdv.run(
        query=query, key=keys, value=values, grad_out=grad_out, lse_delta=lse_delta,
        additional_keys=None, additional_values=None, query_columns=None, key_columns=None, ds=None,
        grad_query=None, grad_key=grad_keys, grad_value=grad_values, qk_at_seam=query,
        gv_at_seam=grad_out, lse_delta_at_seam=lse_delta, bias_tables=None, tile_table=None,
        key_mask=mask, additional_mask=None,
    )  # fmt: skip
    return grad_keys, grad_values


def _additional(inputs: Inputs) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Additional keys and values, if there are any; zeros where they are masked."""
    keys, values = inputs.additional_keys, inputs.additional_values
    if keys is None or values is None or keys.shape[1] == 0:
        return None, None
    if inputs.additional_mask is not None:
        allowed = inputs.additional_mask[..., None, None]
        keys, values = torch.where(allowed, keys, 0.0), torch.where(allowed, values, 0.0)
    return readable(keys.contiguous(), (1,)), readable(values.contiguous(), (1,))


def _dtype(x: Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype
