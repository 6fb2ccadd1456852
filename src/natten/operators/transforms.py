"""What watches, changes or differentiates a call, and what is done about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import (
    PLAIN_TYPES,
    dispatch_modes,
    in_forward_mode,
    in_nested_forward_mode,
    is_jit_tracing,
    is_legacy_batch,
    is_transformed,
    pre_dispatch_modes,
)
from ..errors import UnsupportedError


def is_plain(tensors: Sequence[Any]) -> bool:
    """Whether nothing watches what an eager call does, so that it needs no operator.

    The dispatcher costs as much time on the host as a small kernel takes on a GPU.
    """
    return not (
        is_jit_tracing()
        or is_transformed()
        or dispatch_modes()
        or pre_dispatch_modes()
        or not PLAIN_TYPES.issuperset(map(type, tensors))
    )


def is_plain_call(tensors: Sequence[Any]) -> bool:
    """As :func:`is_plain`, for a call of the user's, which may also be compiled."""
    return not torch.compiler.is_compiling() and is_plain(tensors)


def is_composed(grad_out: Tensor | None, grad_lse: Tensor | None) -> bool:
    """Whether a backward pass must be made of differentiable maps, not by a kernel.

    It is differentiated itself, carries tangents, or its gradients are a batch of which no kernel
    knows (``is_grads_batched``, ``torch.autograd.functional``).
    """
    return (
        torch.is_grad_enabled()
        or in_forward_mode()
        or (grad_out is not None and is_legacy_batch(grad_out))
        or (grad_lse is not None and is_legacy_batch(grad_lse))
    )


def refuse_forward_mode() -> None:
    """Raise where a torch.library operator would be differentiated in forward mode.

    PyTorch takes its tangent for zero. Without ``fullgraph`` raising makes the caller run eagerly.
    """
    if in_forward_mode():
        raise UnsupportedError(
            "natten's operators can be differentiated in forward mode in eager mode only, not "
            "inside torch.compile or torch.export."
        )


def refuse_nested_forward_mode() -> None:
    """Raise for ``jvp`` of ``jvp``, where PyTorch takes a Function's second tangent for zero."""
    if in_nested_forward_mode():
        raise UnsupportedError(
            "natten's operators can not be differentiated twice in forward mode; nest forward mode "
            "and reverse mode instead, as torch.func.hessian does."
        )


def merge(x: Any, dim: int | None, size: int, into: int) -> Any:
    """Merge a mapped dimension, or copies of what has none, into dimension ``into`` of the rest."""
    if not isinstance(x, Tensor):
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    into %= x.ndim - 1
    x = x.movedim(0, into)
    return x.reshape(*x.shape[:into], size * x.shape[into + 1], *x.shape[into + 2 :])


def split(x: Tensor, size: int, out_of: int) -> Tensor:
    """Undo :func:`merge`: the mapped dimension comes first."""
    out_of %= x.ndim
    rest = x.shape[out_of] // size
    return x.reshape(*x.shape[:out_of], size, rest, *x.shape[out_of + 1 :]).movedim(out_of, 0)
