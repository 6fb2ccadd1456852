"""Heads of other widths than there are kernels for: padded with zeros, where that pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from natten.backends import Problem
from natten.backends.hopper.tiles import HEADS, native

# Keys of a window per channel that is copied (read or written), from which on the portable kernels
# take longer than the copies: 1 ns more for 2000 pairs computed for a query (h100-triton.csv,
# native heads of 64 and 128), and memory moves 2.5 TB/s. And the pairs of all queries in whose
# time, 50 us, the copies are launched.
_KEYS, _PAIRS = 1.5, 1e8


def is_native(query: Tensor, value: Tensor) -> bool:
    """Whether there are kernels for these heads as they are."""
    return query.shape[-1] in HEADS and value.shape[-1] in HEADS


def too_small(problem: Problem) -> str | None:
    """Why a problem's heads are not worth padding, or None."""
    dims = [dim for dim in (problem.head_dim, problem.value_dim) if dim not in HEADS]
    if not dims:
        return None
    pads = f"pads heads of {' and '.join(map(str, dims))} channels"
    if problem.rule is None:
        return f"{pads} for large windows only"
    # Query and key, value and output.
    least = _KEYS * sum(2 * (dim + native(dim)) for dim in dims)
    least += _PAIRS / max(1, math.prod(problem.shape[:-1]))
    if math.prod(problem.rule.kernel_size) < least:
        return f"{pads} for windows of at least {math.ceil(least)} tokens here"
    return None


def forward(run: Callable[..., Any], inputs: Sequence[Any], *how: Any) -> tuple[Tensor, Tensor]:
    """Output and LSE that ``run`` finds for padded inputs."""
    out, lse = run(*map(_padded, inputs), *how)
    return _narrowed(out, inputs[2].shape[-1]), lse


def backward(
    run: Callable[..., Any], grad_out: Tensor, grad_lse: Tensor | None, inputs: Sequence[Any],
    out: Tensor, lse: Tensor, *how: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients that ``run`` finds for padded inputs and outputs."""
    wide = map(_padded, inputs)
    grads = run(_padded(grad_out), grad_lse, *wide, _padded(out), lse, *how)
    return tuple(
        None if x is None else _narrowed(grad, x.shape[-1]) for x, grad in zip(inputs, grads)
    )


def _padded(x: Tensor | None) -> Tensor | None:
    """``x`` with zeros after its channels, as many as kernels have."""
    if x is None or x.shape[-1] in HEADS:
        return x
    channels = x.shape[-1]
    wide = x.new_empty(*x.shape[:-1], native(channels))
    wide[..., :channels] = x
    wide[..., channels:] = 0
    return wide


def _narrowed(x: Tensor, channels: int) -> Tensor:
    """The first channels of what kernels made of padded tensors."""
    if x.shape[-1] == channels:
        return x
    return x[..., :channels].clone(memory_format=torch.contiguous_format)
