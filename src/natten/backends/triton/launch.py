"""Kernels and their launches, which name every argument.

A kernel has three sorts of parameters: tensors, numbers, and compile-time constants. A
:class:`Launch` is made once with all numbers and constants, and is run with the tensors.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ... import compiling, tuning
from ...tiling import padded
from ...tuning import Bounded
from .fast_launch import (
    KEPT,
    Describe,
    Described,
    Launcher,
    build_launcher,
    described,
    fit_boxes,
    launcher,
)

_log = logging.getLogger("natten")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


def kernel(
    jit: Callable[..., Any], tensors: str, masks: str = ""
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a kernel that is compiled once for all sizes and strides, whatever divides them.

    Args:
        jit: ``triton.jit`` or ``gluon.jit``.
        tensors: the names of the parameters that are tensors; they come first. Of the others, those
            that are not annotated as ``constexpr`` are numbers.
        masks: of further tensors, which come next and are read byte by byte, so that the kernel is
            the same wherever they begin.
    """
    by_byte = masks.split()
    names = (*tensors.split(), *by_byte)

    def decorate(function: Callable[..., Any]) -> Any:
        parameters = inspect.signature(function).parameters
        if tuple(parameters)[: len(names)] != names:
            raise TypeError(f"the first parameters of {function.__name__} are not {names}")
        numbers = [
            name
            for name, parameter in parameters.items()
            if name not in names and "constexpr" not in str(parameter.annotation)
        ]
        made = jit(do_not_specialize=[*by_byte, *numbers])(function)
        made.tensors, made.num_aligned = names, len(names) - len(by_byte)
        made.numbers = frozenset(numbers)
        return made

    return decorate


@lru_cache(maxsize=256)
def _names(name: str, parts: str) -> tuple[str, ...]:
    return tuple(name + part for part in parts)


def per_axis(name: str, values: Sequence[Any], fill: Any = 1) -> dict[str, Any]:
    """Arguments ``name0``, ``name1``, ``name2``; ``fill`` for axes that a problem lacks."""
    return dict(zip(_names(name, "012"), padded(values, fill)))


def strides_of(name: str, strides: Sequence[int]) -> dict[str, int]:
    """Arguments ``name_b``, ``name_0`` to ``name_2`` and ``name_h``: strides of batch, three axes
    and heads of a tensor ``[batch, *space, heads, channels]``."""
    batch, *space, heads, _ = strides
    return dict(zip(_names(f"{name}_", "b012h"), (batch, *padded(space, 0), heads)))


class Launch:
    """A kernel with its grid, numbers and constants, to be run with tensors.

    Args:
        kernel: made by :func:`kernel`.
        grid: how many programs there are, along up to three axes.
        arguments: the numbers and constants, by the names of the kernel's parameters.
        descriptors: what makes a descriptor of a tensor, by the names of the tensors that the
            kernel reads through one.
        kernels: what Triton compiled, one at most; given, it is shared by launches that differ in
            numbers and in the shapes of descriptors only.
        options: of the compiler, such as ``num_warps``.

    Raises:
        TypeError: an argument is missing, or the kernel has none of that name.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Iterable[int],
        arguments: Mapping[str, Any],
        descriptors: Mapping[str, Describe] = _NOTHING,
        kernels: list[Any] | None = None,
        **options: Any,
    ) -> None:
        names = kernel.arg_names[len(kernel.tensors) :]
        missing = [name for name in names if name not in arguments]
        unknown = [name for name in arguments if name not in names]
        unknown += [name for name in descriptors if name not in kernel.tensors]
        if missing or unknown:
            raise TypeError(f"{kernel.__name__}: missing {missing}, unknown {unknown}")
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.values = tuple([arguments[name] for name in names])
        self.tensors: Described = {name: descriptors.get(name) for name in kernel.tensors}
        self._in_order = itemgetter(*kernel.tensors)
        # Descriptors are made of tensors that 16 bytes divide.
        self._may_be_unaligned = not descriptors
        # Triton 3.10 fuses products and sums only where it is asked to.
        self.options = {"enable_fp_fusion": True, **options}
        self._kernels = [] if kernels is None else kernels
        self._launchers: list[Launcher] = []  # one at most, shared by launches that were moved
        self.kept = Bounded(KEPT)

    @property
    def arguments(self) -> dict[str, Any]:
        """Numbers and constants by name."""
        return dict(zip(self.kernel.arg_names[len(self.kernel.tensors) :], self.values))

    def moved(
        self,
        grid: Iterable[int],
        numbers: Sequence[Any],
        views: Mapping[str, Any] = _NOTHING,
    ) -> Launch:
        """The same kernel with another grid, other ``numbers`` in the place of as many first ones,
        and descriptors of tensors that have other ``views``. Nothing is compiled for it."""
        found = object.__new__(Launch)
        found.kernel, found.options = self.kernel, self.options
        found._in_order, found._may_be_unaligned = self._in_order, self._may_be_unaligned
        found._kernels, found._launchers = self._kernels, self._launchers
        found.grid = (*grid, 1, 1)[:3]
        found.values = (*numbers, *self.values[len(numbers) :])
        found.tensors, found.kept = self.tensors, self.kept
        if views:
            tensors = dict(self.tensors)
            for name, view in views.items():
                describe = tensors.get(name)
                if describe is not None:
                    tensors[name] = describe.of(view)
            found.tensors, found.kept = tensors, Bounded(KEPT)
        return found

    # Not __call__: calling an object by keywords copies them once more.
    def run(self, **tensors: Tensor | None) -> None:
        """Launch on the current device, where the tensors must be.

        Every tensor of the kernel has to be named; None stands for those that it does not read.
        """
        addresses = [None if x is None else x.data_ptr() for x in self._in_order(tensors)]
        # Triton compiles for addresses that 16 divides, which only views can lack.
        aligned = filter(None, addresses[: self.kernel.num_aligned])
        unaligned = self._may_be_unaligned and math.gcd(16, *aligned) < 16
        if not self._launchers and self._kernels:
            self._launchers.append(launcher(self._kernels[0], self.tensors))
        if unaligned or not self._launchers:
            self._compile(tensors, not unaligned)
        else:
            self._launchers[0](self, addresses, tensors)

    def _compile(self, tensors: Mapping[str, Tensor | None], keep: bool) -> None:
        """Launch through Triton, which compiles at the first call; ``keep`` what it compiled."""
        if tensors.keys() != self.tensors.keys():
            raise TypeError(f"{self.kernel.__name__} takes {[*self.tensors]}, not {[*tensors]}")
        named = described(self.tensors, tensors)
        arguments = {**named, **self.arguments, **self.options}
        if compiling.is_recording():
            compile_one = partial(_compile_ahead, self.kernel, grid=self.grid, **arguments)
            compiling.record(compiling.Job(self._compiled_for(named), compile_one))
            return
        if keep:  # threads compile for tensors whose addresses 16 divides
            compiling.await_kernel(self._compiled_for(named))
        with compiling.uncollected():
            if any(make is not None and make.box != make.block for make in self.tensors.values()):
                fit_boxes(self.kernel.warmup(grid=self.grid, **arguments), self.tensors)
            compiled = self.kernel[self.grid](**arguments)
        if keep and compiled is not None:  # the interpreter compiles nothing
            self._kernels.append(compiled)

    def _compiled_for(self, named: Mapping[str, Any]) -> Hashable:
        """What decides which kernel Triton compiles, of tensors whose addresses 16 divides."""
        numbers = self.kernel.numbers
        return (
            self.kernel,
            *map(_kind, named.values()),
            *(_kind(x) if name in numbers else x for name, x in self.arguments.items()),
            *self.options.items(),
        )


def _compile_ahead(kernel: Any, **arguments: Any) -> Any:
    """What Triton compiles of a kernel, and of C to launch it."""
    with compiling.uncollected():
        compiled = kernel.warmup(**arguments)
    build_launcher(compiled)
    return compiled


def _kind(x: Any) -> Hashable:
    """What a kernel is compiled for of a tensor, a descriptor or a number."""
    if isinstance(x, int):
        return -(2**31) <= x < 2**31
    tensor = getattr(x, "base", x)  # of a descriptor
    return getattr(tensor, "dtype", None), *getattr(x, "block_shape", ())


class Wrapped:
    """What does more than a ``launch``, and has its grid, numbers and constants."""

    launch: Any

    @property
    def arguments(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.launch.arguments
        return found

    @property
    def grid(self) -> tuple[int, ...]:
        found: tuple[int, ...] = self.launch.grid
        return found

    @property
    def values(self) -> tuple[Any, ...]:
        found: tuple[Any, ...] = self.launch.values
        return found


class Split(Wrapped):
    """A launch in which several programs share what a tile adds up; their sums are added up after.

    The order of both is fixed, so that every run gives the same bits.

    Args:
        launch: along the second and third axis of its grid are the programs that share a tile. They
            store their sums as ``[*rows, splits, channels]``.
        sums: the tensors ``[*rows, channels]`` that are the sums of these, by name.
        shares: the second and third axis of a grid, given the first.
    """

    def __init__(
        self, launch: Launch, sums: Sequence[str], shares: Callable[[int], tuple[int, int]]
    ) -> None:
        self.launch, self.sums, self.shares = launch, sums, shares

    def moved(self, grid: Iterable[int], numbers: Sequence[Any]) -> Split:
        """As :meth:`Launch.moved`."""
        return Split(self.launch.moved(grid, numbers), self.sums, self.shares)

    def run(self, **tensors: Any) -> None:
        """As :meth:`Launch.run`."""
        splits = math.prod(self.launch.grid[1:])
        parts = {}
        for name in self.sums:
            *rows, channels = tensors[name].shape
            parts[name] = tensors[name].new_empty(*rows, splits, channels, dtype=torch.float32)
        self.launch.run(**{**tensors, **parts})
        for name, part in parts.items():
            tensors[name].copy_(summed(part, -2))


class Trials:
    """Launches that do the same with different tiles; the first call keeps the fastest."""

    def __init__(self, key: str, launches: Mapping[Any, Any]) -> None:
        self.key, self.launches = key, launches
        self.chosen, *_ = launches.values()

    def run(self, **tensors: Any) -> None:
        if compiling.is_recording():
            for launch in [*self.launches.values()] or [self.chosen]:
                launch.run(**tensors)
            return
        if self.launches and not torch.cuda.is_current_stream_capturing():
            times = tuning.times(
                self.key, self.launches, lambda each: _time(self.launches[each], tensors)
            )
            tiles = min(times, key=times.__getitem__)
            self.chosen, self.launches = self.launches[tiles], {}
            _log.debug("%s: %s", self.key, tiles)
            try:
                tuning.remember(self.key, list(tiles), forget=False)
            except OSError as error:
                _log.debug("%s is not remembered: %s", self.key, error)
        self.chosen.run(**tensors)


def _time(launch: Any, tensors: Mapping[str, Any]) -> float:
    """Milliseconds of a launch, the median of five."""
    launch.run(**tensors)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch.run(**tensors)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[2]


def summed(x: Tensor, dim: int) -> Tensor:
    """``x.sum(dim)``. Of a tensor without data PyTorch would import SymPy for that, in a second."""
    return x.select(dim, 0) if x.is_meta else x.sum(dim)


def contiguous(x: Tensor) -> Tensor:
    """A tensor as it lies in memory: views can negate what they show."""
    return x.resolve_neg().contiguous()


def readable(x: Tensor) -> Tensor:
    """Kernels read channels one after another, as they lie in memory."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def is_aligned(*tensors: Tensor) -> bool:
    """Whether 16 bytes can be copied at once from where tensors begin."""
    return math.gcd(16, *(x.data_ptr() for x in tensors)) == 16


def on_device(x: Tensor) -> Any:
    """Kernels launch on the current device: make it the tensor's."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


_HERE = contextlib.nullcontext()
