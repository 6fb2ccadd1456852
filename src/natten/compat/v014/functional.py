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
    def function(
        query: Tensor, key: Tensor, rpb: Tensor | None, *window: int, **named: int
    ) -> Tensor:
        *kernel_size, dilation = _window(window, named)
        if not kernel_size and rpb is None:
            raise ArgumentError("`kernel_size` is needed when `rpb` is None.")
        sizes = kernel_size[0] if rpb is None or kernel_size else _window_of(rpb)
        return _QK[rank](query, key, sizes, dilation, rpb=rpb)

    function.__name__ = function.__qualname__ = f"natten{rank}dqkrpb"
    function.__doc__ = "``(query, key, rpb, dilation)`` or ``(..., kernel_size, dilation)``."
    return function


def _av(rank: int) -> Callable[..., Tensor]:
    def function(attn: Tensor, value: Tensor, *window: int, **named: int) -> Tensor:
        *kernel_size, dilation = _window(window, named)
        size = kernel_size[0] if kernel_size else round(attn.shape[-1] ** (1 / rank))
        return _AV[rank](attn, value, size, dilation)

    function.__name__ = function.__qualname__ = f"natten{rank}dav"
    function.__doc__ = "``(attn, value, dilation)`` or ``(..., kernel_size, dilation)``."
    return function


def _window_of(rpb: Tensor) -> list[int]:
    return [(size + 1) // 2 for size in rpb.shape[1:]]


def _window(window: tuple[int, ...], named: dict[str, int]) -> list[int]:
    """``[dilation]`` or ``[kernel_size, dilation]``, given by place or by name."""
    names = ("kernel_size", "dilation")
    found = [*window, *(named[name] for name in names if name in named)]
    if len(found) not in (1, 2) or named.keys() - set(names):
        raise ArgumentError(
            f"expected `dilation`, or `kernel_size` and `dilation`, got {window} and {named}."
        )
    return found


natten1dqkrpb, natten2dqkrpb = _qkrpb(1), _qkrpb(2)
natten1dav, natten2dav = _av(1), _av(2)
