"""Print a table of what a call costs on the host, for Python and for launches.

    python benchmarks/host.py                # needs a GPU
    taskset -c 3 python benchmarks/host.py   # on one processor: threads wake faster

Tensors are so small that the GPU waits for the host, and calls do not wait for the GPU. The other
rows are for comparison: ``x + 1``, an autograd function that does nothing, and PyTorch's attention
over the same number of tokens. Parts of a layout are timed as a stream sees them: again and again
the same or three in turn; with another offset each time, another number of keys, or both. In the
rows "a new length", a number of keys comes once, and in the rows "a new size", no call has a layout
that was there before; their kernels are compiled.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from run import about
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from natten import na2d
from natten.backends import explain
from natten.cli.tables import markdown

SHAPE, WINDOW = (1, 16, 16, 2, 32), 7
LONGEST = 128  # keys along the first axis of a part's layout
SIZES = range(14, 91)  # of both axes, where each call has a new layout: more than there are calls
WARMUP, ROUNDS, CALLS = 2, 25, 60  # each round has CALLS calls; the first WARMUP do not count


class Nothing(torch.autograd.Function):
    """A function that allocates its output and returns a given tensor as every gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, grad, grad


def host_us(call: Callable[[], Any]) -> float:
    """Microseconds until a call returns."""
    torch.cuda.synchronize()
    # Not its own clock, which waits for the GPU.
    timer = Timer("call()", globals={"call": call}, timer=time.perf_counter)
    return 1e6 * timer.timeit(CALLS).median


def step(call: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, threads: bool) -> None:
    """Run forward and backward; with ``threads`` autograd runs the backward in another thread."""
    with torch.autograd.set_multithreading_enabled(threads):
        torch.autograd.grad(call(*inputs), inputs, grad)


def parts(name: str, query: Tensor) -> dict[str, list[Callable[[], Any]]]:
    """The rows of a backend's parts of a layout, of which the first repeats, without gradients."""
    space, offsets = query.shape[1], range(LONGEST - query.shape[1])
    new = range(LONGEST, LONGEST + 2 * (WARMUP + ROUNDS) * CALLS)  # more than there are calls
    keys = query.repeat(1, -(-new.stop // space), 1, 1, 1)

    def row(steps: list[tuple[int, int]], window: int = WINDOW) -> list[Callable[[], Any]]:
        turns = itertools.cycle([(offset, keys[:, :length]) for offset, length in steps])

        def call() -> None:
            offset, key = next(turns)
            na2d(query, key, key, window, query_offset=(offset, 0), backend=name)

        return [call]

    return {
        "a part": row([(0, LONGEST)]),
        "three parts in turn": row([(0, LONGEST), (16, LONGEST), (5, LONGEST - 9)]),
        "another offset": row([(offset, LONGEST) for offset in offsets]),
        "another length": row([(0, LONGEST - offset) for offset in offsets]),
        "both": row([(offset, space + offset) for offset in offsets]),
        # Of another window, so that what is kept of other rows stays.
        "a new length": row([(length - space, length) for length in new], WINDOW - 2),
    }


def new_sizes(call: Callable[..., Tensor]) -> list[Callable[[], Any] | None]:
    """The row of layouts of which each is new, without gradients and with backward in one
    thread."""
    batch, *_, heads, dim = SHAPE
    width = batch * heads * dim
    every = torch.randn(4, SIZES[-1] ** 2 * width, device="cuda", dtype=torch.bfloat16)
    layouts = list(itertools.product(SIZES, repeat=2))
    random.Random(0).shuffle(layouts)

    def tensors(layouts: list[tuple[int, ...]]) -> Iterator[list[Tensor]]:
        for a, b in layouts:
            yield [x[: a * b * width].view(batch, a, b, heads, dim) for x in every]

    plain, with_gradients = tensors(layouts[::2]), tensors(layouts[1::2])

    def forward() -> None:
        call(*next(plain)[:3])

    def backward() -> None:
        *inputs, grad = next(with_gradients)
        step(call, [x.requires_grad_() for x in inputs], grad, False)

    return [forward, None, backward]


def columns(
    call: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor
) -> list[Callable[[], Any]]:
    """The calls of a row: without gradients, with them, and with backward in one or two threads."""
    return [
        partial(call, *(x.detach() for x in inputs)),
        partial(call, *inputs),
        partial(step, call, inputs, grad, False),
        partial(step, call, inputs, grad, True),
    ]


def main() -> int:
    """Measure all rows in turn and print the table."""
    *inputs, grad = (torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    inputs = [x.requires_grad_() for x in inputs]
    dense = [x.detach().flatten(1, 2).transpose(1, 2).requires_grad_() for x in inputs]
    rows: dict[str, Sequence[Callable[[], Any] | None]] = {"`x + 1`": [lambda: grad + 1]}
    for name in ("hopper", "triton"):
        if f"{name}: runs" in explain(grad, kernel_size=WINDOW, backend=name):
            call = partial(na2d, kernel_size=WINDOW, backend=name)
            rows[f"`{name}`"] = columns(call, inputs, grad)
            rows[f"`{name}`, a new size"] = new_sizes(call)
            own = parts(name, inputs[0].detach())
            rows |= {f"`{name}`, {each}": row for each, row in own.items()}
    rows["nothing"] = columns(Nothing.apply, inputs, grad)
    dense_grad = grad.flatten(1, 2).transpose(1, 2)
    rows["PyTorch's attention"] = columns(scaled_dot_product_attention, dense, dense_grad)
    cells = {
        (name, i): call
        for name, calls in rows.items()
        for i, call in enumerate(calls)
        if call is not None
    }
    times: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    for number in range(WARMUP + ROUNDS):  # in turn, because a machine's speed drifts
        for cell, call in cells.items():
            time_us = host_us(call)
            if number >= WARMUP:
                times[cell].append(time_us)
    header = "", "no gradients", "forward", "forward+backward, one thread", "usual two threads"
    medians = {cell: f"{statistics.median(each):.0f}" for cell, each in times.items()}
    cells = [(name, *(medians.get((name, i), "") for i in range(4))) for name in rows]
    print("\n".join(markdown(header, cells)))
    print(", ".join(filter(None, about(torch.device("cuda")).values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
