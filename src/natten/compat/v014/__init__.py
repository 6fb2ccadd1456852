"""NATTEN 0.14.1 to 0.14.4: the window comes before the heads, and there is a bias by default.

0.14.5 and 0.14.6 had the order of :mod:`natten.compat.v015`. Calls in that order are understood
where they can be told apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from inspect import Parameter, Signature
from typing import Any

from ...errors import ArgumentError
from ...legacy.imports import install
from ...modules import NeighborhoodAttentionGeneric
from . import functional

__version__ = "0.14.4"

_REQUIRED = {"dim": ..., "kernel_size": ..., "num_heads": ...}
_DEFAULTS = {"qkv_bias": True, "qk_scale": None, "attn_drop": 0.0, "proj_drop": 0.0}
_DEFAULTS |= {"dilation": None, "bias": True}
_FIRST = (*_REQUIRED, *_DEFAULTS)
_LATER = (
    *("dim", "num_heads", "kernel_size", "dilation", "bias"),
    *("qkv_bias", "qk_scale", "attn_drop", "proj_drop"),
)


def _order(args: Sequence[Any]) -> Sequence[str]:
    """The names of positional arguments; windows were odd, and heads divide channels."""
    if len(args) < 3:
        return _FIRST
    dim, second, third = args[:3]
    if len(args) > 3:  # the fourth is `qkv_bias` in 0.14.4, and the dilation in 0.14.5
        return _FIRST if isinstance(args[3], bool) else _LATER

    def fits(kernel_size: Any, num_heads: Any) -> bool:
        whole = all(isinstance(n, int) for n in (dim, kernel_size, num_heads)) and num_heads > 0
        return whole and kernel_size > 1 and kernel_size % 2 == 1 and dim % num_heads == 0

    is_first, is_later = fits(second, third), fits(third, second)
    if is_first and is_later and second != third:
        warnings.warn(
            f"NeighborhoodAttention{args} is read as 0.14.1 to 0.14.4 did, (dim, kernel_size, "
            "num_heads); natten.compat.v015 has the order of 0.14.5 and later.",
            stacklevel=3,
        )
    return _LATER if is_later and not is_first else _FIRST


class _Module(NeighborhoodAttentionGeneric):
    """0.14's argument order; the rank comes from the subclass."""

    rank: int
    __signature__ = Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in _REQUIRED]
        + [
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default)
            for name, default in _DEFAULTS.items()
        ]
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(_order(args), args)) | kwargs
        unknown = sorted(given.keys() - _FIRST)
        if unknown or len(given) != len(args) + len(kwargs):
            raise ArgumentError(
                f"expected {_FIRST}, once each, got {args} and {kwargs} (unknown: {unknown})."
            )
        given = _DEFAULTS | given
        super().__init__(
            self.rank, rel_pos_bias=given.pop("bias"), dim=given.pop("dim", None), oversize="pad",
            **given,
        )  # fmt: skip


class NeighborhoodAttention1D(_Module):
    """``[batch, length, channels]``, in 0.14's argument order."""

    rank = 1


class NeighborhoodAttention2D(_Module):
    """``[batch, height, width, channels]``, in 0.14's argument order."""

    rank = 2


NeighborhoodAttention = NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention", "NeighborhoodAttention1D", "NeighborhoodAttention2D"]
install(__name__)
