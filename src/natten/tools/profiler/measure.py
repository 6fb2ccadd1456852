"""Clocks: for a call from Python, for its kernels inside a CUDA graph, and for each kernel."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler import DeviceType
from torch.profiler import ProfilerActivity, profile

Function = Callable[[], Any]


class Timing(NamedTuple):
    """The median of several calls in microseconds, and the range of their middle half."""

    median_us: float
    spread_us: float


class Kernel(NamedTuple):
    """A kernel (on a CPU an operator): how often it ran in one call, and its total time."""

    name: str
    calls: int
    time_us: float


def _summary(times: list[float]) -> Timing:
    if len(times) == 1:
        return Timing(times[0], 0.0)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, high - low)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def eager_time(
    function: Function, device: torch.device, warmup: int, seconds: float = 1.0, calls: int = 50
) -> Timing:
    """Time of a call, from Python to the end of its kernels.

    Args:
        function: what to call.
        device: where its kernels run.
        warmup: calls before the first that counts.
        seconds, calls: measure at least once, until either is reached.
    """
    for _ in range(warmup):
        function()
    times: list[float] = []
    while len(times) < calls and (not times or sum(times) < seconds * 1e6):
        _synchronize(device)
        begin = time.perf_counter()
        function()
        _synchronize(device)
        times.append(1e6 * (time.perf_counter() - begin))
    return _summary(times)


def graph_time(
    function: Function,
    device: torch.device,
    warmup: int,
    seconds: float = 0.3,
    replays: int = 50,
) -> Timing:
    """Time of a call's kernels inside a CUDA graph, without the time of the host.

    Short calls are captured several times, so that the start of the graph hardly counts. The
    arguments are those of :func:`eager_time`, and ``replays`` limits how often the graph runs.

    Raises:
        RuntimeError: the call can not be captured.
    """
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):  # warm up on a side stream, as capturing requires
        function()
    once = eager_time(function, device, warmup, calls=1).median_us
    calls = max(1, min(20, int(2e3 / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    times: list[float] = []
    while len(times) < replays and (len(times) < 3 or sum(times) * calls < seconds * 1e6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / calls)
    return _summary(times)


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


def kernel_times(function: Function, device: torch.device) -> list[Kernel]:
    """The kernels of one call, slowest first, from PyTorch's profiler."""
    function()
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    profiler = profile(activities=activities)
    with _silent_stderr():
        profiler.start()
    function()
    _synchronize(device)
    with _silent_stderr():
        profiler.stop()
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    kernels = [
        Kernel(
            event.key,
            event.count,
            event.self_device_time_total if gpu else event.self_cpu_time_total,
        )
        for event in profiler.key_averages()
        if event.device_type == wanted
    ]
    return sorted((k for k in kernels if k.time_us > 0), key=lambda kernel: -kernel.time_us)
