"""``check_all_args`` of 0.20 and later, which takes a stride; 0.17's is in :mod:`.checks`."""

from __future__ import annotations

from typing import Any

from ..neighborhood import Neighborhood
from . import checks

__all__ = ["check_all_args"]


def check_all_args(
    na_dim: int, kernel_size: Any, stride: Any = ..., dilation: Any = ..., is_causal: Any = ...
) -> tuple[tuple[Any, ...], ...]:
    """Kernel size, stride, dilation and causality in 0.20's order, each with one entry per axis.

    A call with four arguments is in 0.17's order, without a stride.
    """
    if is_causal is ...:
        stride, dilation, is_causal = ..., stride, dilation
    if stride is ...:
        return checks.check_all_args(na_dim, kernel_size, dilation, is_causal)
    rule = Neighborhood.create(na_dim, kernel_size, stride, dilation, is_causal)
    return rule.kernel_size, rule.stride, rule.dilation, rule.is_causal
