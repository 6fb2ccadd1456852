"""``natten.functional`` of 0.17: ``dilation`` is the fused operators' fifth argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from natten import functional as F


def _fused(rank: int) -> Callable[..., Any]:
    fused = {1: F.na1d, 2: F.na2d, 3: F.na3d}[rank]

    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Any,
        dilation: Any = 1,
        is_causal: Any = False,
        rpb: Tensor | None = None,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
    ) -> Tensor:
        return fused(
            query,
            key,
            value,
            kernel_size,
            dilation=1 if dilation is None else dilation,
            is_causal=is_causal,
            rpb=rpb,
            scale=scale,
            additional_keys=additional_keys,
            additional_values=additional_values,
        )

    function.__name__ = function.__qualname__ = f"na{rank}d"
    function.__doc__ = f"``natten.na{rank}d`` in 0.17's argument order."
    return function


na1d, na2d, na3d = (_fused(rank) for rank in (1, 2, 3))


def __getattr__(name: str) -> Any:
    """Everything else is the same in :mod:`natten.functional`."""
    return getattr(F, name)
