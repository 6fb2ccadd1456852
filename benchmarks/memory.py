"""Measure the memory that one forward and backward adds to a process."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

from cases import Case

from natten.profiler import natten_call


def peak_over_inputs(case: Case) -> float:
    """Peak added memory over the size of query, key and value, in a new process (Linux)."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(case, queue))
    process.start()
    result = queue.get(timeout=300)
    process.join()
    return result


def _measure(case: Case, queue: Any) -> None:
    problem = case.problem("cpu")
    call = natten_call(problem, None, backward=True)
    natten_call(_small(case), None, backward=True)()  # loads libraries and starts threads
    before = _status_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    call()
    inputs = 3 * problem.batch * problem.num_queries * problem.heads * problem.dim
    queue.put(1024 * (_status_kb("VmHWM") - before) / (inputs * problem.dtype.itemsize))


def _small(case: Case) -> Any:
    window = case.problem("cpu").rule
    shape = tuple(k * d for k, d in zip(window.kernel_size, window.dilation))
    return Case("", shape, 1, 1, 16, case.kernel_size, 1, case.dilation).problem("cpu")


def _status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")
