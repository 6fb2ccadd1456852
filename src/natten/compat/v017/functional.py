"""``natten.functional`` of 0.17, where ``dilation`` is the fifth argument of fused operators.

Everything else is the same in ``natten.functional`` and :mod:`natten.legacy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ... import functional as F
from ...legacy import functional as legacy
from ...legacy.imports import lookup


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
        xformers_kwargs: dict[str, Any] | None = None,
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
            attention_kwargs=xformers_kwargs,
        )

    function.__name__ = function.__qualname__ = f"na{rank}d"
    function.__doc__ = f"``natten.na{rank}d`` in 0.17's argument order."
    return function


na1d, na2d, na3d = (_fused(rank) for rank in (1, 2, 3))


__all__ = [*F.__all__, *legacy.__all__]
__getattr__ = lookup(__name__, ".legacy.operators", ".legacy.checks", F.__name__, legacy.__name__)
