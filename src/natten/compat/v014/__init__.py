"""NATTEN 0.14.1 to 0.14.4: the window comes before the heads, and the bias is always there."""

from __future__ import annotations

import sys
from typing import Any

from natten import flops
from natten.compat.v014 import functional
from natten.modules import NeighborhoodAttentionGeneric

__version__ = "0.14.4"


class _Module(NeighborhoodAttentionGeneric):
    """0.14's argument order; the rank comes from the subclass."""

    rank: int

    def __init__(
        self,
        dim: int,
        kernel_size: Any,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dilation: Any = None,
        bias: bool = True,
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
    """``[batch, length, channels]``, in 0.14's argument order."""

    rank = 1


class NeighborhoodAttention2D(_Module):
    """``[batch, height, width, channels]``, in 0.14's argument order."""

    rank = 2


NeighborhoodAttention = NeighborhoodAttention2D
natten1d = natten2d = sys.modules[__name__]
