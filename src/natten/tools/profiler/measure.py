"""Clocks: for a call from Python, for its kernels inside a CUDA graph, and for each kernel."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

Function = Callable[[], Any]


class Timing(NamedTuple):
    """The median time of a call in microseconds, and the range of the middle half of times.

    What is timed are single calls, or blocks of calls where one is short. ``samples_us`` has all
    of these times, per call.
    """

    median_us: float
    spread_us: float
    samples_us: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> Timing:
        """The timing that these samples make."""
        samples = [*samples_us] if len(samples_us) > 1 else [*samples_us] * 2
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, high - low, tuple(samples_us))


class Kernel(NamedTuple):
    """A kernel (on a CPU an operator): how often it ran in a call, and its total time there.

    Both are means where several calls were recorded.
    """

    name: str
    calls: float
    time_us: float


def eager_time(
    function: Function, device: torch.device, warmup: int, seconds: float = 0.2
) -> Timing:
    """Time of a call from Python: by PyTorch's timer on CPUs, by Triton's on GPUs.

    Triton's is the time on the GPU. Before each call it overwrites the L2 cache, and meanwhile
    Python prepares the call. So Python's time counts only where it is longer than that.

    Args:
        function: what to call.
        device: where its kernels run.
        warmup: calls before the first that counts.
        seconds: about how long to measure.
    """
    for _ in range(warmup):
        function()
    if device.type == "cuda":
        from triton.testing import do_bench

        with torch.cuda.device(device):
            return _timing(do_bench(function, rep=1e3 * seconds, return_mode="all"))
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    # The timer's statistics are tensors; a device context would make each of our calls slower.
    has_data = torch.get_default_device().type != "meta"
    with contextlib.nullcontext() if has_data else torch.device("cpu"):
        found = timer.blocked_autorange(min_run_time=seconds)
        return Timing.of([1e6 * time for time in found.times])


def graph_time(function: Function, device: torch.device, warmup: int) -> Timing:
    """Time of a call's kernels inside a CUDA graph, without the time of the host.

    The graph has as many calls, one after another, as take 20 ms. The arguments are those of
    :func:`eager_time`.

    Raises:
        RuntimeError: the call can not be captured.
    """
    from triton.testing import do_bench_cudagraph

    for _ in range(warmup):
        function()
    with torch.cuda.device(device):
        return _timing(do_bench_cudagraph(function, return_mode="all"))


def _timing(milliseconds: Sequence[float]) -> Timing:
    return Timing.of([1e3 * time for time in milliseconds])


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence standard error, where PyTorch 2.13's profiler announces its start and stop.

    It does so at every log level.
    """
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def kernel_times(function: Function, device: torch.device, calls: int = 1) -> list[Kernel]:
    """The kernels of a call, slowest first, from PyTorch's profiler.

    Args:
        function: what to call.
        device: where its kernels run.
        calls: how many calls are recorded, of which the result is the mean.
    """
    function()
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    profiler = profile(activities=activities)
    with _silent_stderr():
        profiler.start()
    try:
        for _ in range(calls):
            function()
        if gpu:
            torch.cuda.synchronize(device)
    finally:  # a process that ends while it records crashes
        with _silent_stderr():
            profiler.stop()
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    kernels = [
        Kernel(
            event.key,
            event.count / calls,
            (event.self_device_time_total if gpu else event.self_cpu_time_total) / calls,
        )
        for event in profiler.key_averages()
        if event.device_type == wanted
    ]
    return sorted((k for k in kernels if k.time_us > 0), key=lambda kernel: -kernel.time_us)
