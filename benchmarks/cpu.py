"""Neighborhood attention on the CPU beside dense attention over all tokens, in one run.

    python benchmarks/cpu.py            # print the table
    python benchmarks/cpu.py --write    # also write it to benchmarks/results/cpu.md

Times are medians over random inputs after a warm-up. Memory is what a forward and backward adds to
the process at its peak, over the size of query, key and value. Only ratios within one run mean
anything: the machine's own speed drifts.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from natten.functional import neighborhood_attention_generic


class Case(NamedTuple):
    """One problem; the targets are our time over dense time, forward / forward+backward."""

    shape: tuple[int, ...]
    batch: int
    heads: int
    head_dim: int
    kernel_size: int
    dilation: int = 1
    target: tuple[float, float] | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        text = f"{len(self.shape)}-D {'x'.join(map(str, self.shape))}, batch {self.batch}, "
        text += f"{self.heads} heads, d {self.head_dim}, window {self.kernel_size}"
        if self.dilation > 1:
            text += f", dilation {self.dilation}"
        return text + ("" if self.dtype is torch.float32 else f", {str(self.dtype)[6:]}")


CASES = [
    Case((56, 56), 4, 2, 32, 7, 1, (0.25, 0.25)),
    Case((28, 28), 4, 4, 32, 7, 4, (1.0, 1.0)),
    Case((64, 64), 1, 4, 64, 13, 1, (0.40, 0.30)),
    Case((4096,), 1, 4, 64, 129, 1, (0.15, 0.13)),
    Case((16, 28, 28), 1, 2, 32, 7, 1, (0.30, 0.22)),
]
# From 1024 tokens on, a window of a quarter of the tokens or less is never slower than dense.
QUARTER = [
    Case((1024,), 1, 1, 32, 255, target=(1.0, 1.0)),
    Case((1024,), 4, 8, 64, 256, target=(1.0, 1.0)),
    Case((32, 32), 1, 2, 32, 16, target=(1.0, 1.0)),
    Case((32, 32), 1, 1, 16, 3, target=(1.0, 1.0)),
    Case((32, 32), 4, 4, 64, 8, 2, (1.0, 1.0)),
    Case((64, 64), 1, 2, 64, 31, target=(1.0, 1.0)),
    Case((8, 12, 12), 1, 2, 32, 6, target=(1.0, 1.0)),
    Case((8, 12, 12), 1, 1, 32, 3, 2, target=(1.0, 1.0)),
    Case((8, 32, 32), 1, 2, 64, 7, target=(1.0, 1.0)),
]


def median_ms(function: Callable[[], Any], repeats: int) -> float:
    """Median wall time after two warm-up calls."""
    function()
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def attend(case: Case, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Our operator, heads-last."""
    return neighborhood_attention_generic(*inputs, case.kernel_size, dilation=case.dilation)


def dense(inputs: list[torch.Tensor]) -> torch.Tensor:
    """Attention over all tokens, heads-first, as scaled_dot_product_attention wants it."""
    return F.scaled_dot_product_attention(*inputs)


def make_inputs(case: Case, heads_last: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random query, key and value."""
    shape: tuple[int, ...] = (case.batch, *case.shape, case.heads, case.head_dim)
    if not heads_last:
        shape = (case.batch, case.heads, math.prod(case.shape), case.head_dim)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3)]


def time_both(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], repeats: int):
    """Milliseconds forward, and forward+backward."""

    def forward() -> None:
        with torch.no_grad():
            function(inputs)

    def forward_backward() -> None:
        out = function(inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return median_ms(forward, repeats), median_ms(forward_backward, repeats)


def status_kb(field: str) -> int:
    """A size from this process's status, in kB."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def _measure_memory(case: Case, queue: Any) -> None:
    small = case._replace(shape=tuple(case.kernel_size * case.dilation for _ in case.shape))
    for each in (small, case):  # the first loads libraries and starts threads
        inputs = make_inputs(each, True, each.dtype)
        before = status_kb("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        out = attend(each, inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        extra = status_kb("VmHWM") - before
    queue.put(1024 * extra / sum(x.numel() * x.element_size() for x in inputs))


def peak_memory(case: Case) -> float:
    """Peak extra memory of forward+backward over the size of q + k + v, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_memory, args=(case, queue))
    process.start()
    result = queue.get(timeout=300)
    process.join()
    return result


def run(case: Case, repeats: int) -> str:
    """One row of the table."""
    dense_ms = time_both(dense, make_inputs(case, False, torch.float32), max(3, repeats // 3))
    inputs = make_inputs(case, True, case.dtype)
    ours_ms = time_both(lambda x: attend(case, x), inputs, repeats)
    ratios = [ours / yard for ours, yard in zip(ours_ms, dense_ms)]
    target = "" if case.target is None else f"{case.target[0]:.2f} / {case.target[1]:.2f}"
    return (
        f"| {case} | {dense_ms[0]:.1f} / {dense_ms[1]:.1f} | {ours_ms[0]:.1f} / {ours_ms[1]:.1f} "
        f"| {ratios[0]:.2f} / {ratios[1]:.2f} | {target} | {peak_memory(case):.1f}x |"
    )


def cpu_name() -> str:
    """The processor's name, if the system tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Run all cases and print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cpu.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}"
    lines = [
        machine,
        "",
        "| Case (float32 unless said) | dense ms, fwd / fwd+bwd | ours ms | ours / dense | target "
        "| peak extra memory / (q+k+v) |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    halves = [case._replace(dtype=torch.bfloat16, target=None) for case in CASES]
    for case in [*CASES, *halves, *QUARTER]:
        lines.append(run(case, args.repeats))
        print(lines[-1], flush=True)
    if args.write:
        path = pathlib.Path(__file__).parent / "results" / "cpu.md"
        notes = path.read_text().split("<!-- notes -->")[-1] if path.exists() else "\n"
        path.write_text("\n".join(["# CPU", "", *lines, "", "<!-- notes -->"]) + notes)


if __name__ == "__main__":
    main()
