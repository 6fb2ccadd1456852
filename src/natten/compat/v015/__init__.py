"""NATTEN 0.14.5 to 0.15.1: the bias is on by default, and inputs that are too small are padded."""

from __future__ import annotations

import sys
from typing import Any

from natten import flops, nested, ops, utils
from natten.compat import OneWindow, add_submodules
from natten.compat.v015 import functional
from natten.legacy.functional import (
    disable_gemm_na,
    disable_tf32,
    disable_tiled_na,
    enable_gemm_na,
    enable_tf32,
    enable_tiled_na,
    has_bfloat,
    has_cuda,
    has_fp32_gemm,
    has_fp64_gemm,
    has_gemm,
    has_half,
    has_tf32_gemm,
)

__version__ = "0.15.1"


class _Module(OneWindow):
    """0.15's argument order; the rank comes from the subclass."""

    rank: int

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Any,
        dilation: Any = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            self.rank,
            dim,
            num_heads,
            kernel_size,
            dilation=dilation,
            rel_pos_bias=bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale or None,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            oversize="pad",
        )


class NeighborhoodAttention1D(_Module):
    """``[batch, length, channels]``, in 0.15's argument order."""

    rank = 1


class NeighborhoodAttention2D(_Module):
    """``[batch, height, width, channels]``, in 0.15's argument order."""

    rank = 2


class NeighborhoodAttention3D(OneWindow):
    """``[batch, depth, height, width, channels]``, in 0.15's argument order."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int | None = None,
        dilation: int | None = 1,
        dilation_d: int | None = None,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            3,
            dim,
            num_heads,
            kernel_size,
            dilation=dilation,
            kernel_size_d=kernel_size_d,
            dilation_d=dilation_d,
            rel_pos_bias=bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale or None,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            oversize="pad",
        )

    @property
    def kernel_size_d(self) -> int:
        """Window of the first axis."""
        return self.neighborhood.kernel_size[0]

    @property
    def dilation_d(self) -> int:
        """Dilation of the first axis."""
        return self.neighborhood.dilation[0]

    @property
    def window_size_d(self) -> int:
        """What the first axis must hold."""
        return self.kernel_size_d * self.dilation_d


NeighborhoodAttention = NeighborhoodAttention2D
natten1d = natten2d = natten3d = sys.modules[__name__]
add_submodules(
    __name__,
    flops=flops,
    natten1d=natten1d,
    natten2d=natten2d,
    natten3d=natten3d,
    nested=nested,
    ops=ops,
    utils=utils,
)
