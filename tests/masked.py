"""What holds of every mask of keys, checked on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from helpers import reference

from natten.backends import Backend
from natten.inputs import Inputs
from natten.neighborhood import Rule

# Errors of root mean square, over its own; float32 is rounded to TF32.
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 6e-3}


def check_masks(
    inputs: Inputs, rule: Rule, scale: float, backends: Sequence[Backend], has_grad_lse: bool = True
) -> None:
    """What is masked reaches nothing, whatever it is; a mask that hides nothing changes no bit; and
    a mask that hides everything leaves nothing.

    Args:
        inputs: with a mask of keys, and one of additional tokens if there are some.
        rule, scale: of the problem.
        backends: of the forward, and of the gradients.
        has_grad_lse: whether the LSE has a gradient, too.
    """
    dtype, key_mask, own_mask = inputs.query.dtype, inputs.key_mask, inputs.additional_mask
    assert key_mask is not None

    def run(inputs: Inputs) -> list[torch.Tensor | None]:
        out, lse = backends[0].forward(inputs, rule, scale)
        return [out, lse, *backends[1].backward(*grads_of(out, lse), inputs, out, lse, rule, scale)]

    def grads_of(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        grad_lse = torch.cos(lse.masked_fill(lse.isinf(), 0.0)) if has_grad_lse else None
        return torch.sin(out + 1.0), grad_lse

    def masked_by(hide: bool) -> Inputs:
        masks = (None if x is None else torch.full_like(x, not hide) for x in inputs[-2:])
        return Inputs(*inputs[:-2], *masks)

    def filled(inputs: Inputs, value: float) -> Inputs:
        """With that number in all keys and values that are masked."""
        key, value_ = (x.masked_fill(~inputs.key_mask[..., None, None], value) for x in inputs[1:3])
        found = inputs._replace(key=key, value=value_)
        if own_mask is None:
            return found
        mask = ~inputs.additional_mask[..., None, None]
        return found._replace(
            additional_keys=inputs.additional_keys.masked_fill(mask, value),
            additional_values=inputs.additional_values.masked_fill(mask, value),
        )

    def assert_same(a: Sequence[torch.Tensor | None], b: Sequence[torch.Tensor | None]) -> None:
        for x, y in zip(a, b):
            assert (x is None and y is None) or torch.equal(x, y)

    assert_same(run(Inputs(*inputs[:-2])), run(masked_by(False)))
    out, lse, *grads = run(filled(masked_by(True), math.nan))
    assert lse.isneginf().all()
    assert not any(x.any() for x in (out, *grads) if x is not None)

    found = run(inputs)
    exact = Inputs(*(x if x is None or x.dtype == torch.bool else x.double() for x in inputs))
    out, lse = reference.forward(exact, rule, scale)
    double = [None if x is None else x.double() for x in grads_of(*found[:2])]
    wanted = reference.backward(*double, exact, out, lse, rule, scale)
    assert torch.equal(lse.isinf(), found[1].isinf()) and not found[0][lse.isinf()].any()
    for right, x in zip((out, lse, *wanted), found):
        if right is None:
            continue
        assert not x.isnan().any()
        finite = right.isfinite()
        if not finite.any():  # the LSE of queries that all see no key
            continue
        error = (x - right)[finite].square().mean().sqrt()
        size = right[finite].square().mean().sqrt().clamp(min=0.1)
        assert error < LIMITS[dtype] * size
    for value in (math.nan, math.inf, torch.finfo(dtype).max):
        assert_same(found, run(filled(inputs, value)))
