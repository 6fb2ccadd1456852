"""The argument helpers of ``natten.utils``, made of :class:`natten.Neighborhood`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..neighborhood import Neighborhood

__all__ = [
    "check_additional_keys",
    "check_additional_values",
    "check_all_args",
    "check_args_against_input",
    "check_backward_tiling_config",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_size_arg",
    "check_stride_arg",
    "check_tiling_config",
    "get_num_na_weights",
    "make_attn_tensor_from_input",
]


def check_kernel_size_arg(na_dim: int, kernel_size: Any) -> tuple[int, ...]:
    """``kernel_size`` as one entry per axis."""
    return Neighborhood.create(na_dim, kernel_size).kernel_size


def check_stride_arg(na_dim: int, stride: Any) -> tuple[int, ...]:
    """``stride`` as one entry per axis."""
    return Neighborhood.create(na_dim, 1 << 30, stride).stride


def check_dilation_arg(na_dim: int, dilation: Any) -> tuple[int, ...]:
    """``dilation`` as one entry per axis; None means 1."""
    return Neighborhood.create(na_dim, 1, 1, dilation).dilation


def check_causal_arg(na_dim: int, is_causal: Any) -> tuple[bool, ...]:
    """``is_causal`` as one entry per axis; None means False."""
    return Neighborhood.create(na_dim, 1, 1, 1, is_causal).is_causal


def check_all_args(
    na_dim: int, kernel_size: Any, dilation: Any, is_causal: Any
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """Kernel size, dilation and causality in 0.17's order, each with one entry per axis."""
    rule = Neighborhood.create(na_dim, kernel_size, 1, dilation, is_causal)
    return rule.kernel_size, rule.dilation, rule.is_causal


def check_args_against_input(
    input_tensor: Tensor, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any
) -> None:
    """Raise ArgumentError unless the windows fit ``input_tensor [batch, *space, heads, dim]``."""
    rank = input_tensor.dim() - 3
    rule = Neighborhood.create(rank, kernel_size, stride, dilation, is_causal)
    rule.check(input_tensor.shape[1:-2], input_tensor.shape[1:-2])


def check_input_size_arg(na_dim: int, input_size: Any) -> tuple[int, ...]:
    """``input_size`` as one entry per axis."""
    return Neighborhood.create(na_dim, input_size).kernel_size


def get_num_na_weights(kernel_size: Sequence[int]) -> int:
    """The number of tokens in a window.

    Example:
        >>> get_num_na_weights((3, 5))
        15
    """
    if not isinstance(kernel_size, (tuple, list)):
        raise ArgumentError(f"`kernel_size` must be a tuple, got {type(kernel_size)}.")
    return math.prod(kernel_size)


def check_tiling_config(na_dim: int, tiling_config: Any) -> Any:
    """The tile shapes as they came, because none is refused here."""
    return tiling_config


def check_backward_tiling_config(na_dim: int, tiling_config: Any) -> Any:
    """The tile shapes as they came, because none is refused here."""
    return tiling_config


def check_additional_keys(input_tensor: Tensor, additional_keys: Tensor | None) -> int:
    """The number of additional keys of a heads-first call."""
    return _check_additional("additional_keys", input_tensor, additional_keys)


def check_additional_values(
    attn_tensor: Tensor,
    additional_values: Tensor | None,
    value: Tensor,
    expected_attn_weights: int,
) -> int:
    """The number of additional values of a heads-first call; their weights come last."""
    num_additional = _check_additional("additional_values", value, additional_values)
    if attn_tensor.shape[-1] != expected_attn_weights + num_additional:
        raise ArgumentError(
            f"Expected {expected_attn_weights + num_additional} attention weights per token, "
            f"got attn_tensor.shape[-1]={attn_tensor.shape[-1]}."
        )
    return num_additional


def _check_additional(name: str, x: Tensor, additional: Tensor | None) -> int:
    if additional is None:
        return 0
    wanted = (x.shape[0], x.shape[1], x.shape[-1])
    if additional.dim() != 4 or (*additional.shape[:2], additional.shape[-1]) != wanted:
        raise ArgumentError(
            f"`{name}` must be [batch, heads, num_additional, head_dim] with batch, heads and "
            f"head_dim {wanted}, got {tuple(additional.shape)}."
        )
    return additional.shape[2]


def make_attn_tensor_from_input(input_tensor: Tensor, attention_dim: int) -> Tensor:
    """Uninitialized weights for ``input_tensor [batch, heads, *space, head_dim]``."""
    return torch.empty(
        *input_tensor.shape[:-1],
        attention_dim,
        dtype=input_tensor.dtype,
        device=input_tensor.device,
        requires_grad=input_tensor.requires_grad,
    )
