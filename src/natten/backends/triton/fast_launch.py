"""The short way to launch a compiled kernel.

At each launch Triton describes it for profilers and encodes its tensor maps; on the host that takes
longer than a small kernel on the GPU. Here Triton's function in C below that is called. What leans
on the internals of Triton is in this file; launches go Triton's own way in releases whose internals
are not known, and while a profiler hooks into launches.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ...tuning import Bounded

Tensors = Mapping[str, Tensor | None]
Addresses = Sequence[int | None]
Describe = Callable[[Tensor], Any]  # makes a descriptor of a tensor
Launcher = Callable[[Addresses, Tensors], None]
Arguments = Callable[[Sequence[Any], Tensors, int], tuple[Any, ...]]  # of the function in C
_KEPT = 256  # addresses, per kernel


def launcher(
    compiled: Any,
    grid: tuple[int, ...],
    describe: Mapping[str, Describe | None],
    last: Sequence[Any],
) -> Launcher:
    """A function that launches a kernel on the current device, which must always be the same.

    Args:
        compiled: what Triton compiled; it has run on the device.
        grid: numbers of programs along three axes.
        describe: the kernel's tensors, which are its first parameters, in their order, and what
            makes a descriptor of each, or None.
        last: numbers and constants, the same in each launch.

    Returns:
        A function of the tensors: of their addresses, in order, and of themselves, by name.
    """
    runner, own = compiled[grid], compiled.run
    count = sum(make is not None for make in describe.values())

    def slow(addresses: Addresses, tensors: Tensors) -> None:
        runner(*described(describe, tensors).values(), *last)

    if (
        not triton.__version__.startswith("3.6.")
        or type(own).__module__ != "triton.backends.nvidia.driver"
        or own.global_scratch_size
        or own.profile_scratch_size
        or len(compiled.metadata.tensordesc_meta) != count
    ):
        return slow
    launch = own.launch
    hooks, device = knobs.runtime, driver.active.get_current_device()
    stream = driver.active.get_current_stream
    between = (
        compiled.function, own.launch_cooperative_grid, own.launch_pdl, None, None,
        compiled.packed_metadata, None, None, None,
    )  # fmt: skip

    def complete(addresses: Sequence[Any], tensors: Tensors, stream: int) -> tuple[Any, ...]:
        return (*grid, stream, *between, *addresses, *last)

    arguments: Arguments = complete
    if count:
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
        encode = sys.modules[type(own).__module__].make_tensordesc_arg
        arguments = _kept(complete, _flattener(compiled, describe, encode))

    def fast(addresses: Addresses, tensors: Tensors) -> None:
        try:
            hooked = hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls
        except AttributeError:  # a function in the place of a chain of functions
            hooked = True
        if hooked:
            slow(addresses, tensors)
        else:
            launch(*arguments(addresses, tensors, stream(device)))

    return fast


def described(describe: Mapping[str, Describe | None], tensors: Tensors) -> dict[str, Any]:
    """A kernel's tensors as Triton takes them, in order."""
    found = {}
    for name, make in describe.items():
        x = tensors[name]
        found[name] = x if x is None or make is None else make(x)
    return found


def _kept(complete: Arguments, flat: Callable[[Addresses, Tensors], Sequence[Any]]) -> Arguments:
    """``complete`` of what ``flat`` makes of tensors, which depends on their addresses alone.

    All of it is kept, because memory is allocated where memory was freed.
    """
    kept = Bounded(_KEPT)

    def arguments(addresses: Sequence[Any], tensors: Tensors, stream: int) -> tuple[Any, ...]:
        key = stream, *addresses
        found = kept.get(key)
        if found is None:
            found = complete(flat(addresses, tensors), tensors, stream)
            kept.keep(key, found)
        return found

    return arguments


def _flattener(
    compiled: Any, describe: Mapping[str, Describe | None], encode: Callable[..., list[Any]]
) -> Callable[[Addresses, Tensors], list[Any]]:
    """A function of a kernel's tensors: those arguments that the function in C takes.

    What a descriptor becomes there, a tensor map with shape and strides, depends on the address
    alone. It is kept, too, for when only some tensors are where others were.
    """
    metas = iter(compiled.metadata.tensordesc_meta)
    encoders: list[Any] = [
        make and (name, make, next(metas), Bounded(_KEPT)) for name, make in describe.items()
    ]

    def flat(addresses: Addresses, tensors: Tensors) -> list[Any]:
        found: list[Any] = []
        for address, encoder in zip(addresses, encoders):
            if encoder is None:
                found.append(address)
                continue
            name, make, meta, kept = encoder
            known = kept.get(address)
            if known is None:
                known = encode(make(tensors[name]), meta)
                kept.keep(address, known)
            found += known
        return found

    return flat
