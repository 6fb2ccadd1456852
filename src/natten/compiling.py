"""Compiling kernels before they are launched, several at once.

A call on tensors without data says which kernels it launches: :func:`recorded` keeps the launches,
which then run nothing. Threads compile them (:func:`start`). Triton holds Python's lock for a
sixth to a half of that, so a few threads do as much as many, which would only wait for the lock.
A launch of a kernel that a thread is compiling waits for it.

Before Python 3.11.8 and 3.12.2, ``ast.parse`` may raise a SystemError if two threads parse at the
same time, also in another one that is not ours (python/cpython issue 106905). There, kernels are
compiled one after another by the thread that asks for them, and none behind a forward.

While Triton reads a kernel it makes a million objects, and Python's collector goes through all
that the process has again and again, with the lock held: a third of what a kernel costs. So it
pauses meanwhile (:func:`uncollected`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch


class Job(NamedTuple):
    """A kernel to be compiled: what identifies it, and what compiles it for the current device."""

    key: Hashable
    compile: Callable[[], Any]


_record: ContextVar[list[Job] | None] = ContextVar("natten_record", default=None)
_before_new: ContextVar[Callable[[], Any] | None] = ContextVar("natten_before_new", default=None)
# Kernels that were compiled or are being compiled, by device and key.
_known: dict[Hashable, Future[Any]] = {}
_lock = threading.RLock()  # a thread that compiles what it asks for has it already
THREADS = 6  # at most
CAN_PARSE_IN_THREADS = not (3, 11) <= sys.version_info < (3, 11, 8) and not (
    (3, 12) <= sys.version_info < (3, 12, 2)
)


def is_recording() -> bool:
    """Whether launches are kept and run nothing, in this thread and now."""
    return _record.get() is not None


def record(job: Job) -> None:
    """Keep a launch's kernel."""
    jobs = _record.get()
    assert jobs is not None
    jobs.append(job)


@contextlib.contextmanager
def recorded() -> Iterator[list[Job]]:
    """Inside, launches on tensors without data run nothing; their kernels come into the list."""
    jobs: list[Job] = []
    token = _record.set(jobs)
    try:
        yield jobs
    finally:
        _record.reset(token)


@contextlib.contextmanager
def before_a_new_kernel(function: Callable[[], Any]) -> Iterator[None]:
    """Inside, ``function`` is called once, before the first launch whose kernel is new."""
    token = _before_new.set(function)
    try:
        yield
    finally:
        _before_new.reset(token)


def start(device: torch.device, jobs: Iterable[Job]) -> list[Future[Any]]:
    """Begin to compile kernels for a GPU; those that are known are not compiled again, unless they
    failed.

    Returns:
        What to wait for, the same object for the same kernel. It has what Triton compiled, or the
        exception of one that fails; None of one that a launch compiled.
    """
    futures = []
    with _lock:
        for key, compile_one in jobs:
            name = _index(device), key
            known = _known.get(name)
            if known is None or (known.done() and known.exception() is not None):
                _known[name] = _pool().submit(_compile, device, compile_one)
            futures.append(_known[name])
    return futures


def await_kernel(key: Hashable) -> None:
    """Before a launch on the current device: wait for the thread that compiles its kernel.

    If it failed there, the launch compiles it and raises what there is to raise.
    """
    name = _index(None), key
    with _lock:
        future = _known.get(name)
        if future is None:
            done: Future[Any] = Future()
            done.set_result(None)
            _known[name] = done
    if future is not None:
        wait([future])
    elif CAN_PARSE_IN_THREADS and (function := _before_new.get()) is not None:
        _before_new.set(None)
        # What it begins is only to save time: whatever is wrong is raised by who needs it.
        with contextlib.suppress(Exception):
            function()


class _Collector:
    """Python's collector of garbage, which pauses while any thread asks for that."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pauses = 0
        self.was_enabled = False

    def pause(self) -> None:
        with self.lock:
            if self.pauses == 0:
                self.was_enabled = gc.isenabled()
                gc.disable()
            self.pauses += 1

    def resume(self) -> None:
        with self.lock:
            self.pauses -= 1
            if self.pauses == 0 and self.was_enabled:
                gc.enable()


_collector = _Collector()


def _forked() -> None:
    """A child has none of the threads that would let the collector resume."""
    global _collector
    if _collector.pauses and _collector.was_enabled:
        gc.enable()
    _collector = _Collector()


if hasattr(os, "register_at_fork"):  # not on every system
    os.register_at_fork(after_in_child=_forked)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python collects no garbage, in any thread."""
    collector = _collector  # a child's is another one
    collector.pause()
    try:
        yield
    finally:
        collector.resume()


def load(device: torch.device, kernels: Iterable[Any]) -> None:
    """Load kernels to a GPU and build what launches them, for which Triton 3.6 takes a compiler of
    C. Otherwise the first launch does that; it is also what raises an error of that.

    While a graph is captured, nothing may be loaded.
    """

    def load_one(kernel: Any) -> None:
        with _on(device), contextlib.suppress(Exception):
            kernel.run  # noqa: B018

    wait([_pool().submit(load_one, kernel) for kernel in kernels if kernel is not None])


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A thread has a current device of its own."""
    return torch.cuda.device(device) if torch.cuda.is_available() else contextlib.nullcontext()


def _compile(device: torch.device, compile_one: Callable[[], Any]) -> Any:
    """What a thread does."""
    with _on(device):
        return compile_one()


def _index(device: torch.device | None) -> int:
    """The number of a GPU, by default of the current one."""
    if device is not None and device.index is not None:
        return device.index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


class _Here(Executor):
    """Does what it is asked for at once, in the thread that asks."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@lru_cache(maxsize=1)
def _pool() -> Executor:
    """The threads, not more than there are processors for this process."""
    if not CAN_PARSE_IN_THREADS:
        return _Here()
    affinity = getattr(os, "sched_getaffinity", None)  # not of every system
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    return ThreadPoolExecutor(min(THREADS, processors), thread_name_prefix="natten-compile")
