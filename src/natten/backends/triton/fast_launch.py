"""The short way to launch a compiled kernel.

At each launch Triton describes it for profilers and encodes its tensor maps; on the host that takes
longer than a small kernel on the GPU. Here Triton's function in C below that is called. What leans
on the internals of Triton is in this file. In a release that is newer than those that were looked
at, that is done only after comparing with what Triton itself passes. Launches go Triton's own way
where they differ, and while a profiler hooks into launches.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ...tuning import Bounded
from .releases import CHECKED, release

Tensors = Mapping[str, Tensor | None]
Addresses = Sequence[int | None]
KEPT = 256  # addresses, per launch and per descriptor


class Describe(Protocol):
    """Makes a descriptor of a tensor."""

    maps: Bounded  # what Triton makes of descriptors, by the tensors' addresses
    block: list[int]  # what a kernel's type says that TMA copies
    box: list[int]  # what it copies, if that is less

    def __call__(self, tensor: Tensor) -> Any: ...

    def of(self, view: Any) -> Describe:
        """What does so of tensors that have another view."""
        ...


Described = Mapping[str, Describe | None]


class Launch(Protocol):
    """What a launch of a kernel is made of, beside its tensors; they are always of the same shapes.

    Attributes:
        grid: how many programs there are along three axes.
        values: numbers and constants, in their order.
        tensors: the kernel's tensors, which are its first parameters, in their order, and what
            makes a descriptor of each, or None.
        kept: what the tensors were for the function in C, by their addresses; one for all launches
            that describe them alike.
    """

    grid: tuple[int, ...]
    values: tuple[Any, ...]
    tensors: Described
    kept: Bounded


Launcher = Callable[[Launch, Addresses, Tensors], None]
# Of a launch, its tensors and the stream: what the function in C takes.
Arguments = Callable[[Launch, Addresses, Tensors, int], tuple[Any, ...]]


def fit_boxes(compiled: Any, describe: Described) -> None:
    """Have TMA copy boxes of which a kernel's types say that they are larger.

    Triton encodes tensor maps as what it keeps beside a compiled kernel says, which it reads anew
    in each process.
    """
    makers = [make for make in describe.values() if make is not None]
    for meta, make in zip(compiled.metadata.tensordesc_meta, makers, strict=True):
        if make.box != make.block:
            meta["block_size"] = [*make.box[:-1], meta["block_size"][-1]]


def build_launcher(compiled: Any) -> None:
    """Have Triton compile the code in C that launches a kernel, which it then finds on disk.

    Otherwise the first launch does that. Nothing is loaded to the GPU, where a graph may be being
    captured.
    """
    # Only to save time: whatever is wrong is raised by the launch.
    with contextlib.suppress(Exception):
        driver.active.launcher_cls(compiled.src, compiled.metadata)


def launcher(compiled: Any, describe: Described) -> Launcher:
    """A function that launches a kernel on the current device, always the same.

    Args:
        compiled: what Triton compiled; it has run on the device.
        describe: as :attr:`Launch.tensors` of all its launches, but for what makes the descriptors.

    Returns:
        A function of a launch and its tensors: of their addresses, in order, and of themselves, by
        name.
    """
    is_checked = release(triton.__version__) in CHECKED
    try:
        short = _short_way(compiled, describe)
    except Exception:
        if is_checked:
            raise
        short = None  # a later Triton has other internals
    hooks, device = knobs.runtime, driver.active.get_current_device()
    stream = driver.active.get_current_stream

    def slow(what: Launch, addresses: Addresses, tensors: Tensors) -> None:
        compiled[what.grid](*described(what.tensors, tensors).values(), *what.values)

    if short is None:
        return slow
    launch, arguments = short

    def fast(what: Launch, addresses: Addresses, tensors: Tensors) -> None:
        try:
            hooked = hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls
        except AttributeError:  # a function in the place of a chain of functions
            hooked = True
        if hooked:
            slow(what, addresses, tensors)
        else:
            launch(*arguments(what, addresses, tensors, stream(device)))

    if is_checked:
        return fast

    def agrees(what: Launch, addresses: Addresses, tensors: Tensors) -> bool:
        passed = _passed(compiled.run, lambda: slow(what, addresses, tensors))
        try:
            return _agree(passed, arguments(what, addresses, tensors, stream(device)))
        except Exception:
            return False

    return _once_compared(agrees, fast, slow)


def _short_way(compiled: Any, describe: Described) -> tuple[Callable[..., None], Arguments] | None:
    """Triton's function in C and what makes its arguments; None where Triton itself has to
    launch."""
    own = compiled.run
    metas = getattr(compiled.metadata, "tensordesc_meta", None) or ()
    count = sum(make is not None for make in describe.values())
    if (
        type(own).__module__ != "triton.backends.nvidia.driver"
        or own.global_scratch_size
        or own.profile_scratch_size
        or getattr(own, "gsan_enabled", False)  # a sanitizer, from Triton 3.8 on
        or len(metas) != count
    ):
        return None
    complete = _complete(compiled)
    launch = getattr(*_place(own))
    if not count:
        return launch, lambda what, addresses, _, stream: complete(what, addresses, stream)
    flat = _flattener(own, metas, describe)

    def arguments(
        what: Launch, addresses: Addresses, tensors: Tensors, stream: int
    ) -> tuple[Any, ...]:
        # Memory is allocated where memory was freed.
        key = tuple(addresses)
        found = what.kept.find(key, flat, what.tensors, addresses, tensors)
        return complete(what, found, stream)

    return launch, arguments


def _complete(compiled: Any) -> Callable[[Launch, Sequence[Any], int], tuple[Any, ...]]:
    """What makes all arguments of the function in C of a launch, of what tensors become there, and
    of the stream."""
    own = compiled.run
    between: tuple[Any, ...]
    start = compiled.function, own.launch_cooperative_grid, own.launch_pdl
    # What is None: memory for scratch, twice, and metadata of the launch for two hooks.
    if release(triton.__version__) <= (3, 6):
        between = (*start, None, None, compiled.packed_metadata, None, None, None)
        return lambda what, flat, stream: (*what.grid, stream, *between, *flat, *what.values)
    between = (
        *start, compiled.packed_metadata, None, None, None, None, None,
        own.arg_annotations, own.kernel_signature,
    )  # fmt: skip
    return lambda what, flat, stream: (*what.grid, stream, *between, (*flat, *what.values))


def _place(own: Any) -> tuple[Any, str]:
    """An object and the name of its attribute that is the function in C, which Triton calls."""
    names = getattr(getattr(own.launch, "__code__", None), "co_freevars", ())
    if "launcher" in names:  # a function that encodes descriptors
        return own.launch.__closure__[names.index("launcher")], "cell_contents"
    return own, "launch"


# --- a release that nobody looked at ------------------------------------------------------------


def _passed(own: Any, run: Callable[[], None]) -> tuple[Any, ...]:
    """What the function in C is given while ``run`` launches a kernel Triton's way."""
    found: tuple[Any, ...] = ()
    holder, name = _place(own)
    launch = getattr(holder, name)

    def keep(*args: Any) -> None:
        nonlocal found
        found = args
        launch(*args)

    setattr(holder, name, keep)
    try:
        run()
    finally:
        setattr(holder, name, launch)
    return found


def _agree(theirs: Sequence[Any], ours: Sequence[Any]) -> bool:
    """Whether arguments of the function in C are the same, but those that are for hooks."""
    if len(theirs) != len(ours):
        return False
    hooks = range(8, 11)
    return all(_same(a, b) for i, (a, b) in enumerate(zip(theirs, ours)) if i not in hooks)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return type(b) is int and a.data_ptr() == b
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    # Tensor maps have no equality.
    return a is b or (type(a) is type(b) and (a == b or type(a).__eq__ is object.__eq__))


def _once_compared(
    agrees: Callable[[Launch, Addresses, Tensors], bool], fast: Launcher, slow: Launcher
) -> Launcher:
    """A launcher that is ``fast`` from the second launch on, if the first one ``agrees``."""
    chosen: Launcher | None = None

    def run(what: Launch, addresses: Addresses, tensors: Tensors) -> None:
        nonlocal chosen
        if chosen is None:
            chosen = fast if agrees(what, addresses, tensors) else slow
        else:
            chosen(what, addresses, tensors)

    return run


# --- arguments ----------------------------------------------------------------------------------


def described(describe: Described, tensors: Tensors) -> dict[str, Any]:
    """A kernel's tensors as Triton takes them, in order."""
    found = {}
    for name, make in describe.items():
        x = tensors[name]
        found[name] = x if x is None or make is None else make(x)
    return found


def _flattener(
    own: Any, metas: Sequence[Any], describe: Described
) -> Callable[[Described, Addresses, Tensors], list[Any]]:
    """What makes, of tensors and what describes them, those arguments that the function in C takes.

    What a descriptor becomes there, a tensor map with shape and strides, depends on the address
    alone. It is kept, too, for when only some tensors are where others were.
    """
    encode = sys.modules[type(own).__module__].make_tensordesc_arg
    unused = (None,) * (len(inspect.signature(encode).parameters) - 2)  # from Triton 3.8 on
    meta = dict(zip((name for name, make in describe.items() if make is not None), metas))

    def encode_one(name: str, make: Describe, x: Tensor) -> Any:
        return encode(make(x), meta[name], *unused)

    def flat(describe: Described, addresses: Addresses, tensors: Tensors) -> list[Any]:
        found: list[Any] = []
        for address, (name, make) in zip(addresses, describe.items()):
            x = tensors[name]
            if make is None or x is None:
                found.append(address)
                continue
            found += make.maps.find(address, encode_one, name, make, x)
        return found

    return flat
