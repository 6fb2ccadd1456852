"""Nested tensors for the unfused operators, as NATTEN 0.17 took them: strided, forward only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError


def is_nested(*tensors: Any) -> bool:
    """Whether any of the arguments is a nested tensor."""
    return any(isinstance(x, Tensor) and x.is_nested for x in tensors)


def per_item(function: Callable[..., Tensor], **tensors: Tensor | None) -> Tensor:
    """Apply ``function`` to every item of nested tensors; the result is nested.

    Args:
        function: a function that takes one dense tensor for each name.
        tensors: nested tensors with the same number of items, or None.

    Raises:
        ArgumentError: some are nested and some are not, they have different numbers of items, or
            one requires a gradient or is not a leaf.
    """
    present = {name: x for name, x in tensors.items() if x is not None}
    for name, x in present.items():
        if not isinstance(x, Tensor) or not x.is_nested:
            raise ArgumentError(
                f"Expected all inputs to be nested, but `{name}` is {type(x)}, dense."
            )
        if x.layout != torch.strided:
            raise ArgumentError(
                f"`{name}` must be nested with layout torch.strided, got {x.layout}."
            )
        if x.requires_grad or not x.is_leaf:
            raise ArgumentError(
                f"Autograd is not supported for nested tensors, but `{name}` requires a gradient."
            )
    items = {name: x.unbind() for name, x in present.items()}
    counts = {name: len(each) for name, each in items.items()}
    if len(set(counts.values())) > 1:
        raise ArgumentError(f"nested inputs must have as many items each, got {counts}.")
    rows = zip(*items.values())
    missing = dict.fromkeys(name for name, x in tensors.items() if x is None)
    results = [function(**dict(zip(items, row)), **missing) for row in rows]
    return (
        torch.nested.nested_tensor(results)
        if not results
        else torch.nested.as_nested_tensor(results)
    )
