"""``natten.functional`` of 0.14: windows come from the shapes of the bias and of the weights.

0.14.5 and later passed the window too; both forms are accepted.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from natten import functional as F
from natten.errors import ArgumentError

_QK = {1: F.na1d_qk, 2: F.na2d_qk}
_AV = {1: F.na1d_av, 2: F.na2d_av}


def _qkrpb(rank: int) -> Callable[..., Tensor]:
    def function(query: Tensor, key: Tensor, rpb: Tensor | None, *window: int) -> Tensor:
        if len(window) == 1 and rpb is not None:
            sizes = [(size + 1) // 2 for size in rpb.shape[1:]]
            return _QK[rank](query, key, sizes, window[0], rpb=rpb)
        kernel_size, dilation = _both(window)
        return _QK[rank](query, key, kernel_size, dilation, rpb=rpb)

    function.__name__ = function.__qualname__ = f"natten{rank}dqkrpb"
    function.__doc__ = "``(query, key, rpb, dilation)`` or ``(..., kernel_size, dilation)``."
    return function


def _av(rank: int) -> Callable[..., Tensor]:
    def function(attn: Tensor, value: Tensor, *window: int) -> Tensor:
        if len(window) == 1:
            size = round(attn.shape[-1] ** (1 / rank))
            return _AV[rank](attn, value, size, window[0])
        return _AV[rank](attn, value, *_both(window))

    function.__name__ = function.__qualname__ = f"natten{rank}dav"
    function.__doc__ = "``(attn, value, dilation)`` or ``(..., kernel_size, dilation)``."
    return function


def _both(window: tuple[int, ...]) -> tuple[int, int]:
    if len(window) != 2:
        raise ArgumentError(
            "expected `dilation`, or `kernel_size` and `dilation` (needed when rpb is None), "
            f"got {window}."
        )
    return window[0], window[1]


natten1dqkrpb, natten2dqkrpb = _qkrpb(1), _qkrpb(2)
natten1dav, natten2dav = _av(1), _av(2)
