"""``get_configs_for_*`` of 0.20 and 0.21: tile shapes in upstream's structure.

Tile shapes are hints here, so every entry is accepted; the lists are short and never empty.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from natten.legacy.types import KernelSchedule

__all__ = [
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fna",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_cutlass_blackwell_fna",
    "get_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_hopper_fna",
    "get_configs_for_flex_fmha",
    "get_configs_for_flex_fna",
]

_SHAPES: dict[int, list[Any]] = {
    1: [((64,), (64,)), ((128,), (128,))],
    2: [((8, 8), (8, 8)), ((16, 8), (16, 8))],
    3: [((4, 4, 4), (4, 4, 4)), ((2, 8, 8), (2, 8, 8))],
}


def _fna(input_tensor: Tensor) -> list[Any]:
    return list(_SHAPES[input_tensor.dim() - 3])


def _fmha(input_tensor: Tensor) -> list[Any]:
    return [(query[0], key[0]) for query, key in _SHAPES[1]]


def _with_schedule(configs: list[Any]) -> list[Any]:
    return [(config, KernelSchedule.NonPersistent) for config in configs]


def get_configs_for_cutlass_fna(input_tensor: Tensor) -> list[Any]:
    """``(query tile, key tile)`` pairs for ``na*d`` on ``[batch, *space, heads, head_dim]``."""
    return _fna(input_tensor)


def get_configs_for_cutlass_fmha(input_tensor: Tensor) -> list[Any]:
    """``(query tile, key tile)`` pairs for ``attention`` on ``[batch, length, heads, dim]``."""
    return _fmha(input_tensor)


def get_configs_for_cutlass_hopper_fna(input_tensor: Tensor) -> list[Any]:
    """``((query tile, key tile), schedule)`` pairs."""
    return _with_schedule(_fna(input_tensor))


def get_configs_for_cutlass_hopper_fmha(input_tensor: Tensor) -> list[Any]:
    """``((query tile, key tile), schedule)`` pairs."""
    return _with_schedule(_fmha(input_tensor))


get_bwd_configs_for_cutlass_fna = get_configs_for_cutlass_fna
get_bwd_configs_for_cutlass_fmha = get_configs_for_cutlass_fmha
get_bwd_configs_for_cutlass_hopper_fna = get_configs_for_cutlass_fna
get_bwd_configs_for_cutlass_hopper_fmha = get_configs_for_cutlass_fmha
get_configs_for_cutlass_blackwell_fna = get_configs_for_cutlass_fna
get_configs_for_cutlass_blackwell_fmha = get_configs_for_cutlass_fmha
get_bwd_configs_for_cutlass_blackwell_fna = get_configs_for_cutlass_fna
get_bwd_configs_for_cutlass_blackwell_fmha = get_configs_for_cutlass_fmha
get_configs_for_flex_fna = get_configs_for_cutlass_fna
get_configs_for_flex_fmha = get_configs_for_cutlass_fmha
