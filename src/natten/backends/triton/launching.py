"""The short way to launch a compiled kernel.

Triton's own launch asks for the device, describes the launch for profilers and encodes tensor maps,
each time anew; on the host that takes longer than a small kernel on the GPU. Here the function in C
below it is called. All that leans on Triton's internals is in this file. Where they are not those
of a release that is known, or a profiler hooks into launches, launches go Triton's way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

_KNOWN = ("3.6.",)


class Launcher:
    """A compiled kernel with its grid and all arguments but the first; see :func:`launcher`."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], last: tuple[Any, ...]) -> None:
        self.run = compiled[grid]
        self.last = last

    def __call__(self, first: Iterable[Any]) -> None:
        """Launch on the current device, which is that of the first launch."""
        self.run(*first, *self.last)


class _Direct(Launcher):
    """With what ``CompiledKernel`` and ``CudaLauncher`` of Triton 3.6 work out at each launch."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], last: tuple[Any, ...]) -> None:
        super().__init__(compiled, grid, last)
        own = compiled.run
        self.launch, self.boxes = own.launch, ()
        metas = compiled.metadata.tensordesc_meta
        if metas:
            inner = inspect.getclosurevars(own.launch).nonlocals
            self.launch = inner["launcher"]
        self.grid = grid
        self.device = driver.active.get_current_device()
        self.stream_of = driver.active.get_current_stream
        self.middle = (
            compiled.function, own.launch_cooperative_grid, own.launch_pdl, None, None,
            compiled.packed_metadata, None, None, None,
        )  # fmt: skip
