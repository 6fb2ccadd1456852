"""``natten.functional`` of 0.14.5 to 0.15.1, where a 3-D window or dilation is two numbers.

Everything else is the same in ``natten.functional`` and :mod:`natten.legacy`.
"""

from __future__ import annotations

from torch import Tensor

from ... import functional as F
from ...legacy import functional as legacy
from ...legacy.imports import lookup


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
    window, gaps = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return F.na3d_qk(query, key, window, gaps, additional_keys)


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
    """``natten.functional.na3d_qk_with_bias`` in 0.15's argument order."""
    window, gaps = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return F.na3d_qk_with_bias(query, key, bias, window, gaps, additional_keys)


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
    window, gaps = (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)
    return F.na3d_av(attn, value, window, gaps, additional_values)


na3d_qk_nested, na3d_av_nested = na3d_qk_with_bias, na3d_av

__all__ = [*F.__all__, *legacy.__all__]
__getattr__ = lookup(__name__, ".legacy.operators", F.__name__, legacy.__name__)
