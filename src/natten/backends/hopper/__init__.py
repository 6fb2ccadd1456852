"""Hopper kernels (sm_90) in Gluon: TMA boxes, wgmma, warp specialisation.

The fastest way for fp16 and bf16 without relative positional bias; what it can not run,
:func:`unsupported` says. Compile-time constants: dtype, head dims, which axes are causal or
strided or have one token, tile shapes and the kind of mask, whether there are additional tokens,
whether there is dilation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ...neighborhood import Neighborhood, Rule
from .. import Problem, no_gradients
from .releases import KNOWN, release
from .tiles import native

# The simulator reads this package's tiles, also where there is no Triton, or one without Gluon.
if release() in KNOWN:
    from .. import triton as portable
    from ..triton.plan import contiguous, on_device
    from .descriptors import MOST, readable
    from .plan import plan_for

__all__ = ["backward", "forward", "unsupported"]


def unsupported(problem: Problem) -> str | None:
    """Why these kernels can not run a problem whose dtype and head dims they can, or None."""
    if release() not in KNOWN:
        return f"is checked with Triton {KNOWN}, not with {release()}"
    wide = native(problem.head_dim), native(problem.value_dim)
    if problem.operation == "gradient" and (max(wide) > 128 or wide[0] != wide[1]):
        return (
            "has backward kernels for heads of up to 128 channels, the value's, rounded up to 32, "
            "64 or 128, like the key's"
        )
    if not 1e-20 < problem.scale < 1e6:
        return "masks scores that are scaled by a positive number of usual size"
    if problem.rule is None:
        return None
    shape, dilation = problem.shape, problem.rule.dilation
    if any(n % d for n, d in zip(shape[1:-2], dilation)):
        return f"needs dilations that divide the token layout, {tuple(shape[1:-2])}"
    if math.prod(shape[:-1]) > MOST:
        return "numbers the tokens of all heads with 31 bits"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
    rule: Rule,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value dim]`` and LSE ``[batch, *space, heads]``."""
    assert isinstance(rule, Neighborhood) and rpb is None
    *rows, _ = query.shape
    out = query.new_empty(*rows, value.shape[-1])
    lse = query.new_empty(*rows, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query, key, value = [readable(x, rule.dilation) for x in (query, key, value)]
    more = _additional(extra_keys, extra_values)
    found = plan_for(query, key, value, more, rule, scale)
    with on_device(query):
        found.forward(query, key, value, more, out, lse)
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
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, rpb (None), additional keys and additional values."""
    assert isinstance(rule, Neighborhood) and rpb is None
    if query.numel() == 0:
        return no_gradients(query, key, value, None, extra_keys, extra_values)
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    ]
    terms = lse.new_empty(*lse.shape, 4)
    query, key, value = [readable(x, rule.dilation) for x in (query, key, value)]
    grad_out = readable(grad_out.contiguous(), rule.dilation)
    given = terms if grad_lse is None else contiguous(grad_lse)
    more = _additional(extra_keys, extra_values)
    found = plan_for(query, key, value, more, rule, scale)
    extra: Iterable[Tensor | None]
    with on_device(query):
        found.terms[grad_lse is not None](
            out.contiguous(), lse.contiguous(), grad_out, given, terms
        )
        found.query((query, grad_out), (key, value), terms, more, grads[:1])
        found.key((key, value), (query, grad_out), terms, (), grads[1:])
        if more:
            extra = portable.extra_gradients(found.portable, query, *more, grad_out, terms)
        else:  # not there, or empty
            extra = no_gradients(extra_keys, extra_values)
    return (*grads, None, *extra)


def _additional(keys: Tensor | None, values: Tensor | None) -> tuple[Tensor, ...]:
    """Additional keys and values, if there are any."""
    if keys is None or values is None or keys.shape[1] == 0:
        return ()
    return readable(keys.contiguous(), (1,)), readable(values.contiguous(), (1,))
