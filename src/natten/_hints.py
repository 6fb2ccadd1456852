"""Keyword arguments for kernels, which never change the result; only tile shapes change kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict


class Hints(TypedDict, total=False):
    """Arguments of fused operators that do not change the result."""

    attention_kwargs: dict[str, Any] | None
    q_tile_shape: Sequence[int] | None
    kv_tile_shape: Sequence[int] | None
    backward_q_tile_shape: Sequence[int] | None
    backward_kv_tile_shape: Sequence[int] | None
    backward_kv_splits: Sequence[int] | None
    backward_use_pt_reduction: bool
    run_persistent_kernel: bool
    kernel_schedule: Any
    torch_compile: bool


class DenseHints(TypedDict, total=False):
    """Arguments of :func:`attention` that do not change the result."""

    q_tile_size: int | None
    kv_tile_size: int | None
    backward_q_tile_size: int | None
    backward_kv_tile_size: int | None
    backward_kv_splits: int | None
    backward_use_pt_reduction: bool
    run_persistent_kernel: bool
    kernel_schedule: Any
    torch_compile: bool


KERNEL_HINTS = tuple(Hints.__annotations__)
