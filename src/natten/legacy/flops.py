"""Names of ``natten.flops`` in 0.14 to 0.17: counts from shapes, and fvcore's handlers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import ArgumentError
from ..flops import av_flops, qk_flops
from ..neighborhood import Neighborhood

qk_1d_rpb_flop = qk_2d_rpb_flop = qk_3d_rpb_flop = qk_flops
av_1d_flop = av_2d_flop = av_3d_flop = av_flops
qk_rpb_flop, av_flop = qk_flops, av_flops


def _window_macs(
    shape: Sequence[int], kernel_size: Any, dilation: Any, is_causal: Any, is_heads_last: bool
) -> int:
    rank = len(shape) - 3
    if rank not in (1, 2, 3):
        raise ArgumentError(f"shapes must have 4 to 6 dimensions, got {tuple(shape)}.")
    rule = Neighborhood.create(rank, kernel_size, 1, dilation, is_causal)
    return math.prod(shape) * rule.window_tokens


def na_qk_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    kernel_size: Any,
    dilation: Any,
    is_causal: Any,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Floating-point operations (or multiply-adds) of ``na*d_qk``."""
    if tuple(q_shape) != tuple(k_shape):
        raise ArgumentError(f"`k_shape` must be `q_shape`, got {k_shape} and {q_shape}.")
    macs = _window_macs(q_shape, kernel_size, dilation, is_causal, is_heads_last)
    return macs if return_macs else 2 * macs


def na_av_flop_count(
    a_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Any,
    dilation: Any,
    is_causal: Any,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Floating-point operations (or multiply-adds) of ``na*d_av``."""
    macs = _window_macs(v_shape, kernel_size, dilation, is_causal, is_heads_last)
    return macs if return_macs else 2 * macs


def fna_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Any,
    dilation: Any,
    is_causal: Any,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Floating-point operations (or multiply-adds) of ``na*d``."""
    rest = (kernel_size, dilation, is_causal, is_heads_last, return_macs)
    return na_qk_flop_count(q_shape, k_shape, *rest) + na_av_flop_count(q_shape, v_shape, *rest)


__all__ = [name for name in globals() if name.endswith(("_flop", "_flop_count"))]
