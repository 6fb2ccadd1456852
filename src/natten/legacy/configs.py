"""``get_configs_for_*`` of 0.20 and 0.21, which return tile shapes in upstream's structure.

No tile shape is refused here, and those without a kernel have no effect. The lists are short and
never empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import ArgumentError
from .types import KernelSchedule

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

SHAPES: dict[int, list[Any]] = {
    1: [((64,), (64,)), ((128,), (128,))],
    2: [((8, 8), (8, 8)), ((16, 8), (16, 8))],
    3: [((4, 4, 4), (4, 4, 4)), ((2, 8, 8), (2, 8, 8))],
}


def _fna(x: Tensor) -> list[Any]:
    return list(SHAPES[x.dim() - 3])


def _fmha(x: Tensor) -> list[Any]:
    return [(query[0], key[0]) for query, key in SHAPES[1]]


def _with_schedule(configs: list[Any]) -> list[Any]:
    return [(config, KernelSchedule.NonPersistent) for config in configs]


def _configs(name: str, of: Callable[[Tensor], list[Any]], doc: str) -> Callable[..., list[Any]]:
    """A function of ``(query, key, value)`` or, as in 0.20.0, of one ``input_tensor``."""

    def function(
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        torch_compile: bool = False,
        *,
        input_tensor: Tensor | None = None,
    ) -> list[Any]:
        x = query if query is not None else input_tensor
        if not isinstance(x, Tensor):
            raise ArgumentError(f"`query` of {name} must be a torch.Tensor, got {type(x)}.")
        return of(x)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


def _pairs(name: str) -> Callable[..., list[Any]]:
    doc = "``(query tile, key tile)`` pairs for ``{}``; only ``query``'s rank matters."
    if name.endswith("fmha"):
        return _configs(name, _fmha, doc.format("attention"))
    return _configs(name, _fna, doc.format("na*d"))


def _scheduled(name: str) -> Callable[..., list[Any]]:
    of = _fmha if name.endswith("fmha") else _fna
    doc = "``((query tile, key tile), schedule)`` pairs; only ``query``'s rank matters."
    return _configs(name, lambda x: _with_schedule(of(x)), doc)


get_configs_for_cutlass_fna = _pairs("get_configs_for_cutlass_fna")
get_configs_for_cutlass_fmha = _pairs("get_configs_for_cutlass_fmha")
get_configs_for_cutlass_hopper_fna = _scheduled("get_configs_for_cutlass_hopper_fna")
get_configs_for_cutlass_hopper_fmha = _scheduled("get_configs_for_cutlass_hopper_fmha")
get_configs_for_cutlass_blackwell_fna = _pairs("get_configs_for_cutlass_blackwell_fna")
get_configs_for_cutlass_blackwell_fmha = _pairs("get_configs_for_cutlass_blackwell_fmha")
get_configs_for_flex_fna = _pairs("get_configs_for_flex_fna")
get_configs_for_flex_fmha = _pairs("get_configs_for_flex_fmha")
get_bwd_configs_for_cutlass_fna = _pairs("get_bwd_configs_for_cutlass_fna")
get_bwd_configs_for_cutlass_fmha = _pairs("get_bwd_configs_for_cutlass_fmha")
get_bwd_configs_for_cutlass_hopper_fna = _pairs("get_bwd_configs_for_cutlass_hopper_fna")
get_bwd_configs_for_cutlass_hopper_fmha = _pairs("get_bwd_configs_for_cutlass_hopper_fmha")
get_bwd_configs_for_cutlass_blackwell_fna = _pairs("get_bwd_configs_for_cutlass_blackwell_fna")
get_bwd_configs_for_cutlass_blackwell_fmha = _pairs("get_bwd_configs_for_cutlass_blackwell_fmha")
