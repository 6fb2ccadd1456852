"""The short way to launch a compiled kernel.

At each launch Triton describes it for profilers and encodes its tensor maps; on the host that takes
longer than a small kernel on the GPU. Here Triton's function in C below that is called. What leans
on the internals of Triton is in this file; launches go Triton's own way in releases whose internals
are not known, and while a profiler hooks into launches.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

Launcher = Callable[[Sequence[Any]], None]


def launcher(compiled: Any, grid: tuple[int, ...], last: Sequence[Any]) -> Launcher:
    """A function that launches a kernel on the current device, which must always be the same.

    Args:
        compiled: what Triton compiled; it has run on the device.
        grid: numbers of programs along three axes.
        last: numbers and constants, the same in each launch.

    Returns:
        A function of the other arguments, which come first: addresses, or for kernels with tensor
        descriptors those, tensors and None.
    """
    runner, own = compiled[grid], compiled.run

    def slow(first: Sequence[Any]) -> None:
        runner(*first, *last)

    if (
        not triton.__version__.startswith("3.6.")
        or type(own).__module__ != "triton.backends.nvidia.driver"
        or own.global_scratch_size
        or own.profile_scratch_size
    ):
        return slow
    launch, flat = own.launch, None
    if compiled.metadata.tensordesc_meta:
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
        flat = _flattener(compiled, sys.modules[type(own).__module__].make_tensordesc_arg)
    hooks, device = knobs.runtime, driver.active.get_current_device()
    stream = driver.active.get_current_stream
    between = (
        compiled.function, own.launch_cooperative_grid, own.launch_pdl, None, None,
        compiled.packed_metadata, None, None, None,
    )  # fmt: skip

    def fast(first: Sequence[Any]) -> None:
        # Chains of functions; what is none may be a function.
        if getattr(hooks.launch_enter_hook, "calls", True) or getattr(
            hooks.launch_exit_hook, "calls", True
        ):
            slow(first)
        else:
            given = first if flat is None else flat(first)
            launch(*grid, stream(device), *between, *given, *last)

    return fast


def _flattener(compiled: Any, encode: Callable[..., Any]) -> Callable[[Sequence[Any]], list[Any]]:
    """A function of a kernel's first arguments: those that the function in C takes.

    What a descriptor becomes, a tensor map with shape and strides, is kept as its ``encoded``.
    """
    metas = iter(compiled.metadata.tensordesc_meta)
    places = [
        next(metas) if isinstance(each, str) and each.startswith("tensordesc") else None
        for each in compiled.src.signature.values()
    ]

    def flat(first: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        for x, meta in zip(first, places):
            if meta is None:
                found.append(None if x is None else x.data_ptr())
                continue
            if x.encoded is None:
                x.encoded = encode(x, meta)
            found += x.encoded
        return found

    return flat
