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

from ...tuning import Bounded

Launcher = Callable[[Sequence[Any]], None]
Arguments = Callable[[Sequence[Any], int], tuple[Any, ...]]
_KEPT = 256  # addresses, per kernel


def launcher(
    compiled: Any, grid: tuple[int, ...], last: Sequence[Any], descriptors: Sequence[Any] = ()
) -> Launcher:
    """A function that launches a kernel on the current device, which must always be the same.

    Args:
        compiled: what Triton compiled; it has run on the device.
        grid: numbers of programs along three axes.
        last: numbers and constants, the same in each launch.
        descriptors: for each other argument, which come first, what makes a descriptor of a tensor,
            or None; empty if no argument has one.

    Returns:
        A function of the first arguments: addresses; with ``descriptors`` tensors and None.
    """
    runner, own = compiled[grid], compiled.run

    def slow(first: Sequence[Any]) -> None:
        runner(*described(descriptors, first), *last)

    if (
        not triton.__version__.startswith("3.6.")
        or type(own).__module__ != "triton.backends.nvidia.driver"
        or own.global_scratch_size
        or own.profile_scratch_size
        or len(compiled.metadata.tensordesc_meta) != sum(x is not None for x in descriptors)
    ):
        return slow
    launch = own.launch
    hooks, device = knobs.runtime, driver.active.get_current_device()
    stream = driver.active.get_current_stream
    between = (
        compiled.function, own.launch_cooperative_grid, own.launch_pdl, None, None,
        compiled.packed_metadata, None, None, None,
    )  # fmt: skip

    def complete(first: Sequence[Any], stream: int) -> tuple[Any, ...]:
        return (*grid, stream, *between, *first, *last)

    arguments: Arguments = complete
    if descriptors:
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
        encode = sys.modules[type(own).__module__].make_tensordesc_arg
        arguments = _kept(complete, _flattener(compiled, descriptors, encode))

    def fast(first: Sequence[Any]) -> None:
        # Chains of functions; what is none may be a function.
        if getattr(hooks.launch_enter_hook, "calls", True) or getattr(
            hooks.launch_exit_hook, "calls", True
        ):
            slow(first)
        else:
            launch(*arguments(first, stream(device)))

    return fast


def described(descriptors: Sequence[Any], first: Sequence[Any]) -> Sequence[Any]:
    """The first arguments of a kernel as Triton takes them."""
    if not descriptors:
        return first
    return [x if make is None else make(x) for make, x in zip(descriptors, first)]


def _kept(complete: Arguments, flat: Callable[[Sequence[Any]], Sequence[Any]]) -> Arguments:
    """``complete`` of what ``flat`` makes of tensors, which depends on their addresses alone.

    All of it is kept, because memory is allocated where memory was freed.
    """
    kept = Bounded(_KEPT)

    def arguments(first: Sequence[Any], stream: int) -> tuple[Any, ...]:
        key = stream, *[None if x is None else x.data_ptr() for x in first]
        found = kept.get(key)
        if found is None:
            found = complete(flat(first), stream)
            kept.keep(key, found)
        return found

    return arguments


def _flattener(
    compiled: Any, descriptors: Sequence[Any], encode: Callable[..., list[Any]]
) -> Callable[[Sequence[Any]], list[Any]]:
    """A function of a kernel's first arguments: those that the function in C takes.

    What a descriptor becomes there, a tensor map with shape and strides, depends on the address
    alone. It is kept, too, for when only some tensors are where others were.
    """
    metas = iter(compiled.metadata.tensordesc_meta)
    places: list[Any] = [
        None if make is None else (make, next(metas), Bounded(_KEPT)) for make in descriptors
    ]

    def flat(first: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        for x, place in zip(first, places):
            if place is None:
                found.append(None if x is None else x.data_ptr())
                continue
            make, meta, kept = place
            address = x.data_ptr()
            known = kept.get(address)
            if known is None:
                known = encode(make(x), meta)
                kept.keep(address, known)
            found += known
        return found

    return flat
