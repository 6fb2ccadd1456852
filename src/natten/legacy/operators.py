"""The operators of 0.14 to 0.17 under their old names, in every form in which they were called.

Releases differ in the arguments after the tensors, by which they are told apart:

* up to 0.14.4 (``av`` up to 0.14.5) the dilation alone; the window's size is that of the bias or of
  the weights;
* then window and dilation, in 3-D with separate numbers for the first axis;
* from 0.17 on one value for all axes or one per axis, and causality.

:mod:`natten.legacy.functional` has the same operators with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

from torch import Tensor

from .. import functional as F
from ..errors import ArgumentError
from .checks import check_all_args
from .configs import SHAPES

_FUSED = {1: F.na1d, 2: F.na2d, 3: F.na3d}
_QK = {1: F.na1d_qk, 2: F.na2d_qk, 3: F.na3d_qk}
_AV = {1: F.na1d_av, 2: F.na2d_av, 3: F.na3d_av}
_WINDOW = ("kernel_size", "dilation")
_WINDOW_3D = ("kernel_size_d", "kernel_size", "dilation_d", "dilation")


def _window(
    rank: int, given: Sequence[Any], default: Callable[[], Sequence[int] | None]
) -> tuple[Any, Any, Any]:
    """Window, dilation and causality, from the arguments after the tensors.

    Args:
        rank: axes of tokens.
        given: the arguments.
        default: gives the window if only a dilation was given; None if it is not known.
    """
    if len(given) == 1 and (window := default()) is not None:
        return window, given[0], False
    if len(given) == 2:
        return given[0], given[1], False
    if len(given) == 3:
        return given[0], given[1], given[2]
    if len(given) == 4 and rank == 3:
        depth, window, dilation_d, dilation = given
        return (depth, window, window), (dilation_d, dilation, dilation), False
    raise ArgumentError(
        "expected `kernel_size` and `dilation` after the tensors, in 3-D also `kernel_size_d` and "
        "`dilation_d`, each before the other; `dilation` alone is enough where the bias or the "
        f"weights have the window's shape (`kernel_size` is needed when rpb is None), got {given}."
    )


def _in_order(rank: int, window: Sequence[Any], named: dict[str, Any], name: str) -> Sequence[Any]:
    """The arguments of ``name`` after the tensors, given by position and by keyword."""
    names = _WINDOW_3D if rank == 3 else _WINDOW
    number = len(window) + len(named)
    order = names if number == len(names) else names[-1:]
    values = dict(zip(order, window)) | named
    if len(values) != number or set(values) != set(order):
        raise ArgumentError(
            f"{name} takes {', '.join(f'`{each}`' for each in names)} after the tensors, "
            f"got {tuple(window)} and {named}."
        )
    return [values[each] for each in order]


def _bias_window(rpb: Tensor | None) -> Callable[[], Sequence[int] | None]:
    return lambda: None if rpb is None else [(int(size) + 1) // 2 for size in rpb.shape[1:]]


def _weights_window(rank: int, attn: Tensor) -> Callable[[], Sequence[int]]:
    return lambda: [round(int(attn.shape[-1]) ** (1 / rank))] * rank


def _named(function: Callable[..., Any], name: str, tensors: str, rank: int) -> Callable[..., Any]:
    names = [*tensors.split(), *(_WINDOW_3D if rank == 3 else _WINDOW)]
    parameters = [Parameter(each, Parameter.POSITIONAL_OR_KEYWORD) for each in names]
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"``na{rank}d_{'av' if name.endswith('av') else 'qk'}`` of older eras."
    function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return function


def _qkrpb(rank: int) -> Callable[..., Tensor]:
    name = f"natten{rank}dqkrpb"

    def function(
        query: Tensor, key: Tensor, rpb: Tensor | None, *args: Any, **named: Any
    ) -> Tensor:
        given = _in_order(rank, args, named, name)
        window, dilation, _ = _window(rank, given, _bias_window(rpb))
        return _QK[rank](query, key, window, dilation, rpb=rpb)

    return _named(function, name, "query key rpb", rank)


def _qk(rank: int) -> Callable[..., Tensor]:
    name = f"natten{rank}dqk"

    def function(query: Tensor, key: Tensor, *args: Any, **named: Any) -> Tensor:
        window, dilation, _ = _window(rank, _in_order(rank, args, named, name), lambda: None)
        return _QK[rank](query, key, window, dilation)

    return _named(function, name, "query key", rank)


def _av(rank: int) -> Callable[..., Tensor]:
    name = f"natten{rank}dav"

    def function(attn: Tensor, value: Tensor, *args: Any, **named: Any) -> Tensor:
        given = _in_order(rank, args, named, name)
        window, dilation, _ = _window(rank, given, _weights_window(rank, attn))
        return _AV[rank](attn, value, window, dilation)

    return _named(function, name, "attn value", rank)


natten1dqk, natten2dqk, natten3dqk = (_qk(rank) for rank in (1, 2, 3))
natten1dqkrpb, natten2dqkrpb, natten3dqkrpb = (_qkrpb(rank) for rank in (1, 2, 3))
natten1dav, natten2dav, natten3dav = (_av(rank) for rank in (1, 2, 3))


# --- autograd Functions, whose ``apply`` programs call ---


def _function(name: str, apply: Callable[..., Tensor]) -> type:
    """A class with ``apply``, which calls a differentiable and traceable function."""
    doc = f"0.14 to 0.17 had an autograd Function of this name; ``{name}.apply`` does the same."
    return type(name, (), {"apply": staticmethod(apply), "__doc__": doc, "__module__": __name__})


def _additional(rest: Sequence[Any]) -> tuple[Tensor | None, Sequence[Any]]:
    """Split off the additional tokens (or None) that 0.15.1 and later pass before the window."""
    if rest and (rest[0] is None or isinstance(rest[0], Tensor)):
        return rest[0], rest[1:]
    return None, rest


def _qk_function(rank: int, name: str) -> type:
    def apply(query: Tensor, key: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        additional, given = _additional(rest)
        window, dilation, is_causal = _window(rank, given, _bias_window(bias))
        return _QK[rank](query, key, window, dilation, additional, is_causal, bias)

    return _function(name, apply)


def _av_function(rank: int, name: str) -> type:
    def apply(attn: Tensor, value: Tensor, *rest: Any) -> Tensor:
        additional, given = _additional(rest)
        window, dilation, is_causal = _window(rank, given, _weights_window(rank, attn))
        return _AV[rank](attn, value, window, dilation, additional, is_causal)

    return _function(name, apply)


def _fused_function(rank: int) -> type:
    def apply(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        kernel_size: Any,
        dilation: Any,
        is_causal: Any,
        scale: float | None,
        tiling_config: Any = None,
        tiling_config_backward: Any = None,
    ) -> Tensor:
        window = {"dilation": dilation, "is_causal": is_causal, "scale": scale}
        return _FUSED[rank](query, key, value, kernel_size, rpb=bias, **window)

    return _function(f"FusedNeighborhoodAttention{rank}D", apply)


NATTEN1DQKRPBFunction = _qk_function(1, "NATTEN1DQKRPBFunction")
NATTEN2DQKRPBFunction = _qk_function(2, "NATTEN2DQKRPBFunction")
NATTEN1DAVFunction = _av_function(1, "NATTEN1DAVFunction")
NATTEN2DAVFunction = _av_function(2, "NATTEN2DAVFunction")
(
    NeighborhoodAttention1DQKAutogradFunction,
    NeighborhoodAttention2DQKAutogradFunction,
    NeighborhoodAttention3DQKAutogradFunction,
) = (_qk_function(rank, f"NeighborhoodAttention{rank}DQKAutogradFunction") for rank in (1, 2, 3))
(
    NeighborhoodAttention1DAVAutogradFunction,
    NeighborhoodAttention2DAVAutogradFunction,
    NeighborhoodAttention3DAVAutogradFunction,
) = (_av_function(rank, f"NeighborhoodAttention{rank}DAVAutogradFunction") for rank in (1, 2, 3))
(
    FusedNeighborhoodAttention1D,
    FusedNeighborhoodAttention2D,
    FusedNeighborhoodAttention3D,
) = (_fused_function(rank) for rank in (1, 2, 3))


def autotune_fna(
    na_dim: int, input_tensor: Tensor, kernel_size: Any, dilation: Any, is_causal: Any
) -> tuple[Any, Any]:
    """0.17's tiles of the forward and of the backward pass.

    The Functions accept them without effect. Nothing is timed here; calls choose tiles themselves.
    """
    check_all_args(na_dim, kernel_size, dilation, is_causal)
    tiles = SHAPES[na_dim][0]
    return tiles, (*tiles, (1,) * na_dim, False)


# --- 0.17.5's operators on FlexAttention ---


def _flex(rank: int) -> Callable[..., Tensor]:
    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Any,
        dilation: Any = 1,
        is_causal: Any = False,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        xformers_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        return _FUSED[rank](
            query,
            key,
            value,
            kernel_size,
            dilation=dilation,
            is_causal=is_causal,
            additional_keys=additional_keys,
            additional_values=additional_values,
        )

    function.__name__ = function.__qualname__ = f"flex_na{rank}d"
    function.__doc__ = f"``natten.na{rank}d`` in 0.17's argument order; there is no FlexAttention."
    return function


flex_na1d, flex_na2d, flex_na3d = (_flex(rank) for rank in (1, 2, 3))


# --- nested tensors; today's operators take them directly ---

na1d_qk_nested, na1d_av_nested = F.na1d_qk_with_bias, F.na1d_av
na2d_qk_nested, na2d_av_nested = F.na2d_qk_with_bias, F.na2d_av
na3d_qk_nested, na3d_av_nested = F.na3d_qk_with_bias, F.na3d_av

_PREFIXES = ("natten", "na1d", "na2d", "na3d", "NATTEN", "Neighborhood", "Fused", "auto", "flex")
__all__ = [name for name in globals() if name.startswith(_PREFIXES)]
