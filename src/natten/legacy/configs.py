"""``get_configs_for_*`` of 0.20 and 0.21: tile shapes in upstream's structure.

Tile shapes are hints here, so every entry is accepted; the lists are short and never empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from natten.errors import ArgumentError
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


def _listing(name: str) -> Callable[..., list[Any]]:
    """The function ``name``; Hopper's forward has a schedule in each entry."""
    is_fmha, is_scheduled = name.endswith("fmha"), name.startswith("get_configs_for_cutlass_hopper")

    def function(
        query: Tensor, key: Tensor | None = None, value: Tensor | None = None,
        torch_compile: bool = False,
    ) -> list[Any]:  # fmt: skip
        rank = query.dim() - 3
        if rank not in ((1,) if is_fmha else _SHAPES):
            dims = "4" if is_fmha else "4 to 6"
            raise ArgumentError(f"`query` must have {dims} dimensions, got {tuple(query.shape)}.")
        pairs = [(q[0], kv[0]) for q, kv in _SHAPES[1]] if is_fmha else list(_SHAPES[rank])
        return [(pair, KernelSchedule.NonPersistent) for pair in pairs] if is_scheduled else pairs

    operator, entry = ("attention", "sizes") if is_fmha else ("na*d", "shapes")
    tiles = f"(query tile, key tile) {entry}"
    function.__name__ = function.__qualname__ = name
    function.__doc__ = (
        f"{f'({tiles}, kernel_schedule)' if is_scheduled else tiles} that ``{operator}`` accepts "
        "for a query of this shape; only the query is needed."
    )
    return function


get_bwd_configs_for_cutlass_blackwell_fmha = _listing("get_bwd_configs_for_cutlass_blackwell_fmha")
get_bwd_configs_for_cutlass_blackwell_fna = _listing("get_bwd_configs_for_cutlass_blackwell_fna")
get_bwd_configs_for_cutlass_fmha = _listing("get_bwd_configs_for_cutlass_fmha")
get_bwd_configs_for_cutlass_fna = _listing("get_bwd_configs_for_cutlass_fna")
get_bwd_configs_for_cutlass_hopper_fmha = _listing("get_bwd_configs_for_cutlass_hopper_fmha")
get_bwd_configs_for_cutlass_hopper_fna = _listing("get_bwd_configs_for_cutlass_hopper_fna")
get_configs_for_cutlass_blackwell_fmha = _listing("get_configs_for_cutlass_blackwell_fmha")
get_configs_for_cutlass_blackwell_fna = _listing("get_configs_for_cutlass_blackwell_fna")
get_configs_for_cutlass_fmha = _listing("get_configs_for_cutlass_fmha")
get_configs_for_cutlass_fna = _listing("get_configs_for_cutlass_fna")
get_configs_for_cutlass_hopper_fmha = _listing("get_configs_for_cutlass_hopper_fmha")
get_configs_for_cutlass_hopper_fna = _listing("get_configs_for_cutlass_hopper_fna")
get_configs_for_flex_fmha = _listing("get_configs_for_flex_fmha")
get_configs_for_flex_fna = _listing("get_configs_for_flex_fna")
