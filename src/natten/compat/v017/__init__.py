"""NATTEN 0.17: modules and fused operators have ``dilation`` where they have a stride now."""

from __future__ import annotations

from typing import Any

from ...legacy import switches
from ...legacy.imports import install
from ...legacy.switches import *  # noqa: F403
from ...modules import NeighborhoodAttentionGeneric
from . import functional

__version__ = "0.17.5"


class _Module(NeighborhoodAttentionGeneric):
    """0.17's argument order; the rank comes from the subclass."""

    rank: int

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Any,
        dilation: Any = 1,
        is_causal: Any = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ) -> None:
        super().__init__(
            self.rank,
            dim,
            num_heads,
            kernel_size,
            dilation=dilation,
            is_causal=is_causal,
            rel_pos_bias=rel_pos_bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )


class NeighborhoodAttention1D(_Module):
    """``[batch, length, channels]``, in 0.17's argument order."""

    rank = 1


class NeighborhoodAttention2D(_Module):
    """``[batch, height, width, channels]``, in 0.17's argument order."""

    rank = 2


class NeighborhoodAttention3D(_Module):
    """``[batch, depth, height, width, channels]``, in 0.17's argument order."""

    rank = 3


NeighborhoodAttention = NeighborhoodAttention2D

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    *switches.__all__,
]
install(__name__)
