"""What a call costs the host: Python and launches, as a table.

    python benchmarks/host.py                # needs a GPU
    taskset -c 3 python benchmarks/host.py   # on one processor, where its threads wake one another

Tensors are so small that the GPU waits for the host. Calls follow one another without waiting for
it. Yardsticks are ``x + 1``, an autograd function that does nothing, and PyTorch's attention over
as many tokens.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from run import about
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from natten import na2d
from natten.backends import explain

SHAPE, WINDOW = (1, 16, 16, 2, 32), 7
WARMUP, ROUNDS, CALLS = 50, 25, 60


class Nothing(torch.autograd.Function):
    """Allocates the output and returns gradients that exist."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, grad, grad


def host_us(call: Callable[[], Any]) -> str:
    """Microseconds of a call until it returns, the median of rounds."""
    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return f"{statistics.median(times):.0f}"


def row(name: str, call: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[str]:
    """A line of the table: without gradients, with, and with a backward in one and two threads."""

    def step() -> Any:
        return torch.autograd.grad(call(*inputs), inputs, grad)

    with torch.no_grad():
        cells = [name, host_us(partial(call, *inputs))]
    cells.append(host_us(partial(call, *inputs)))
    for threads in (False, True):
        with torch.autograd.set_multithreading_enabled(threads):
            cells.append(host_us(step))
    return cells


def main() -> int:
    """Measure and print."""
    *inputs, grad = (torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    inputs = [x.requires_grad_() for x in inputs]
    dense = [x.detach().flatten(1, 2).transpose(1, 2).requires_grad_() for x in inputs]
    rows = [["`x + 1`", host_us(lambda: grad + 1), "", "", ""]]
    for name in ("hopper", "triton"):
        if f"{name}: runs" in explain(grad, kernel_size=WINDOW, backend=name):
            rows.append(row(name, partial(na2d, kernel_size=WINDOW, backend=name), inputs, grad))
    rows.append(row("nothing", Nothing.apply, inputs, grad))
    dense_grad = grad.flatten(1, 2).transpose(1, 2)
    rows.append(row("PyTorch's attention", scaled_dot_product_attention, dense, dense_grad))
    print("| | no gradients | forward | forward+backward, one thread | usual two threads |")
    print("|---|---:|---:|---:|---:|")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")
    print(", ".join(filter(None, about(torch.device("cuda")).values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
