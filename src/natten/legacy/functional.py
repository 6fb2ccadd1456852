"""The operators of 0.14 to 0.17 under their old names; each warns with DeprecationWarning.

The signatures are those of 0.15 to 0.17. For 0.14.4 and before see :mod:`natten.compat.v014`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from natten import functional as F
from natten.legacy.checks import (  # noqa: F401
    check_additional_keys,
    check_additional_values,
    check_all_args,
    check_backward_tiling_config,
    check_causal_arg,
    check_dilation_arg,
    check_kernel_size_arg,
    check_tiling_config,
    get_num_na_weights,
    make_attn_tensor_from_input,
)
from natten.legacy.switches import (  # noqa: F401
    disable_gemm_na,
    disable_tf32,
    disable_tiled_na,
    enable_gemm_na,
    enable_tf32,
    enable_tiled_na,
    get_device_cc,
    has_bfloat,
    has_cuda,
    has_fp32_gemm,
    has_fp64_gemm,
    has_gemm,
    has_half,
    has_tf32_gemm,
)

_QK = {1: F.na1d_qk, 2: F.na2d_qk, 3: F.na3d_qk}
_AV = {1: F.na1d_av, 2: F.na2d_av, 3: F.na3d_av}


def warn_renamed(old: str, new: str) -> None:
    """Say that ``old`` is an old name, at the line that calls it."""
    warnings.warn(f"natten: {old} is an old name of {new}", DeprecationWarning, stacklevel=3)


def _qk(rank: int, with_bias: bool) -> Callable[..., Tensor]:
    """``natten*dqk`` or ``natten*dqkrpb``; 3-D ones give the depth's window of its own."""
    name = f"natten{rank}dqk" + ("rpb" if with_bias else "")

    if rank < 3 and with_bias:

        def function(
            query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Any, dilation: Any
        ) -> Tensor:
            warn_renamed(name, f"na{rank}d_qk")
            return _QK[rank](query, key, kernel_size, dilation, rpb=rpb)

    elif rank < 3:

        def function(query: Tensor, key: Tensor, kernel_size: Any, dilation: Any) -> Tensor:  # type: ignore[misc]
            warn_renamed(name, f"na{rank}d_qk")
            return _QK[rank](query, key, kernel_size, dilation)

    elif with_bias:

        def function(  # type: ignore[misc]
            query: Tensor,
            key: Tensor,
            rpb: Tensor | None,
            kernel_size_d: int,
            kernel_size: int,
            dilation_d: int,
            dilation: int,
        ) -> Tensor:
            warn_renamed(name, "na3d_qk")
            window, gaps = _with_depth(kernel_size_d, kernel_size, dilation_d, dilation)
            return _QK[3](query, key, window, gaps, rpb=rpb)

    else:

        def function(  # type: ignore[misc]
            query: Tensor,
            key: Tensor,
            kernel_size_d: int,
            kernel_size: int,
            dilation_d: int,
            dilation: int,
        ) -> Tensor:
            warn_renamed(name, "na3d_qk")
            window, gaps = _with_depth(kernel_size_d, kernel_size, dilation_d, dilation)
            return _QK[3](query, key, window, gaps)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Old name of ``na{rank}d_qk``."
    return function


def _av(rank: int) -> Callable[..., Tensor]:
    name = f"natten{rank}dav"

    if rank < 3:

        def function(attn: Tensor, value: Tensor, kernel_size: Any, dilation: Any) -> Tensor:
            warn_renamed(name, f"na{rank}d_av")
            return _AV[rank](attn, value, kernel_size, dilation)

    else:

        def function(  # type: ignore[misc]
            attn: Tensor,
            value: Tensor,
            kernel_size_d: int,
            kernel_size: int,
            dilation_d: int,
            dilation: int,
        ) -> Tensor:
            warn_renamed(name, "na3d_av")
            window, gaps = _with_depth(kernel_size_d, kernel_size, dilation_d, dilation)
            return _AV[3](attn, value, window, gaps)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Old name of ``na{rank}d_av``."
    return function


def _with_depth(kernel_d: int, kernel: int, dilation_d: int, dilation: int) -> tuple[Any, Any]:
    return (kernel_d, kernel, kernel), (dilation_d, dilation, dilation)


natten1dqk, natten2dqk, natten3dqk = (_qk(rank, with_bias=False) for rank in (1, 2, 3))
natten1dqkrpb, natten2dqkrpb, natten3dqkrpb = (_qk(rank, with_bias=True) for rank in (1, 2, 3))
natten1dav, natten2dav, natten3dav = (_av(rank) for rank in (1, 2, 3))
