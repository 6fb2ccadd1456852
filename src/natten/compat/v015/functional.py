"""``natten.functional`` of 0.15: 3-D operators give the depth's window of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from natten import functional as F
from natten.compat.v014.functional import natten1dav, natten2dav  # 0.14.5's had no kernel_size

__all__ = ["na3d_av", "na3d_qk", "na3d_qk_with_bias", "natten1dav", "natten2dav"]


def na3d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """``natten.na3d_qk`` in 0.15's argument order."""
    window = (kernel_size_d, kernel_size, kernel_size)
    gaps = (dilation_d, dilation, dilation)
    return F.na3d_qk(query, key, window, gaps, additional_keys, rpb=bias)


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """``natten.na3d_qk`` in 0.15's argument order."""
    window = (kernel_size_d, kernel_size, dilation_d, dilation)
    return na3d_qk_with_bias(query, key, None, *window, additional_keys)


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_values: Tensor | None = None,
) -> Tensor:
    """``natten.na3d_av`` in 0.15's argument order."""
    window = (kernel_size_d, kernel_size, kernel_size)
    return F.na3d_av(attn, value, window, (dilation_d, dilation, dilation), additional_values)


def __getattr__(name: str) -> Any:
    """Everything else is the same in :mod:`natten.functional`."""
    return getattr(F, name)
