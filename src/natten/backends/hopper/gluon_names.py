"""What drifts between Triton releases: every Gluon name the kernels use, in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from triton.language.core import _aggregate, constexpr
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# 3.9 named what copies after what it does, and made reinterpreting public.
load_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_block = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
store_wait = tma.store_wait
tensor_descriptor = tma.tensor_descriptor
_shared = gl.shared_memory_descriptor
reinterpret = getattr(_shared, "reinterpret", None) or _shared._reinterpret
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

__all__ = [
    "TensorDescriptor",
    "aggregate",
    "barrier",
    "fence_async_shared",
    "from_triton",
    "gdc_launch_dependents",
    "gdc_wait",
    "gl",
    "gluon",
    "load_block",
    "mbarrier",
    "reinterpret",
    "store_block",
    "store_wait",
    "tensor_descriptor",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]


def from_triton(function: Any) -> Any:
    """A ``triton.jit`` function as one that Gluon kernels can call."""
    return gluon.jit(function.fn)


def _with_constructor(cls: Any) -> Any:
    """An aggregate, with a constructor of its fields, which Triton makes since 3.8."""
    fields = cls.__annotations__

    def init(self: Any, *values: Any, **named: Any) -> None:
        named.update(zip(fields, values))
        for field, kind in fields.items():
            setattr(self, field, constexpr(named[field]) if kind is constexpr else named[field])

    init.__triton_builtin__ = True  # type: ignore[attr-defined]
    cls.__init__ = init
    return _aggregate(cls)


# A class whose annotations say what kernels pass as one.
if TYPE_CHECKING:
    from dataclasses import dataclass as aggregate
else:
    aggregate = _with_constructor
