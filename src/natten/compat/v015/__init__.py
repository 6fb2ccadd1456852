"""NATTEN 0.14.5 to 0.15.1: there is a bias by default, and inputs that are too small are padded."""

from __future__ import annotations

from typing import Any

from ...legacy.imports import install
from ...legacy.switches import (
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
from ...modules import NeighborhoodAttentionGeneric
from . import functional

__version__ = "0.15.1"


class _Module(NeighborhoodAttentionGeneric):
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
            qk_scale=qk_scale,
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


class NeighborhoodAttention3D(NeighborhoodAttentionGeneric):
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
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            oversize="pad",
        )


NeighborhoodAttention = NeighborhoodAttention2D

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "has_bfloat",
    "has_cuda",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
]
install(__name__)
