"""What drifts between Triton releases: every Gluon name the kernels use, in one place."""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# 3.9 named what copies after what it does, and made reinterpreting public.
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
store_wait = tma.store_wait
_shared = gl.shared_memory_descriptor
reinterpret = getattr(_shared, "reinterpret", None) or _shared._reinterpret

__all__ = [
    "TensorDescriptor",
    "aggregate",
    "fence_async_shared",
    "from_triton",
    "gdc_launch_dependents",
    "gdc_wait",
    "gl",
    "gluon",
    "load_box",
    "mbarrier",
    "reinterpret",
    "store_box",
    "store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]


def from_triton(function: Any) -> Any:
    """A ``triton.jit`` function as one that Gluon kernels can call."""
    return gluon.jit(function.fn)
