"""Neighborhood attention on a GPU beside dense cuDNN attention over all tokens, in one run.

    python benchmarks/h100.py [--rows nat,flux,...] [--write FILE]

"graph" is kernel time inside a CUDA graph, "eager" one call from Python, medians in microseconds.
"ideal" is dense time times the fraction of keys a query attends.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from natten.functional import neighborhood_attention_generic


class Case(NamedTuple):
    """One problem, bf16."""

    name: str
    shape: tuple[int, ...]
    batch: int
    heads: int
    head_dim: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] | int = 1
    dilation: int = 1


CASES = [
    Case("1d", (32768,), 1, 1, 128, (2048,)),
    Case("1d-s256", (32768,), 1, 1, 128, (2048,), 256),
    Case("nat", (56, 56), 64, 2, 32, (7, 7)),
    Case("nat-d64", (56, 56), 64, 2, 64, (7, 7)),
    Case("dinat", (28, 28), 64, 4, 32, (7, 7), 1, 4),
    Case("hdit", (64, 64), 16, 8, 64, (13, 13)),
    Case("video", (16, 32, 32), 2, 12, 64, (7, 11, 11)),
    Case("flux", (256, 256), 1, 24, 128, (80, 80)),
    Case("flux-s16", (256, 256), 1, 24, 128, (80, 80), (16, 16)),
    Case("hunyuan", (30, 48, 80), 1, 24, 128, (18, 24, 24)),
    Case("hunyuan-s", (30, 48, 80), 1, 24, 128, (18, 24, 24), (16, 8, 8)),
]


def graph_us(function: Callable[[], Any], target_s: float = 0.15) -> float:
    """Median microseconds of one call inside a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    calls = max(1, min(20, int(2e-3 / (time.perf_counter() - start))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    times, spent = [], 0.0
    while len(times) < 5 or (spent < target_s and len(times) < 50):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
        spent += times[-1] * calls / 1e6
    return statistics.median(times)


def eager_us(function: Callable[[], Any], repeats: int = 20) -> float:
    """Median microseconds from the call to the end of its kernels."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def run(case: Case, dense: bool = True) -> str:
    """One row of the table."""
    tokens, kept = math.prod(case.shape), math.prod(case.kernel_size)
    shape = (case.batch, *case.shape, case.heads, case.head_dim)
    q, k, v, g = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def ours(*qkv: torch.Tensor) -> torch.Tensor:
        return neighborhood_attention_generic(*qkv, case.kernel_size, case.stride, case.dilation)

    def both() -> None:
        torch.autograd.grad(ours(*leaves), leaves, g)

    with torch.no_grad():
        forward = graph_us(lambda: ours(q, k, v)), eager_us(lambda: ours(q, k, v))
    total = graph_us(both), eager_us(both)
    yard = (math.nan, math.nan)
    if dense:
        flat = [x.reshape(case.batch, tokens, case.heads, -1).transpose(1, 2) for x in (q, k, v)]
        flat = [x.contiguous() for x in flat]
        grad_leaves = [x.clone().requires_grad_() for x in flat]
        grad = g.reshape(case.batch, tokens, case.heads, -1).transpose(1, 2).contiguous()

        def dense_both() -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(*grad_leaves), grad_leaves, grad)

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            with torch.no_grad():
                once = graph_us(lambda: F.scaled_dot_product_attention(*flat))
            yard = once, graph_us(dense_both)
    ideal = [t * kept / tokens for t in yard]
    return (
        f"| {case.name} | {yard[0]:.0f} / {yard[1]:.0f} | {ideal[0]:.0f} / {ideal[1]:.0f} "
        f"| {forward[0]:.0f} / {forward[1]:.0f} | {total[0]:.0f} / {total[1]:.0f} "
        f"| {yard[0] / forward[0]:.1f}x / {yard[1] / total[0]:.1f}x |"
    )


def main() -> None:
    """Run the chosen rows and print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(case.name for case in CASES))
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--write", type=pathlib.Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    import triton

    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, bf16",
        "",
        "| Case | dense cuDNN us, fwd / fwd+bwd | ideal | ours fwd us, graph / eager "
        "| ours fwd+bwd us, graph / eager | dense / ours |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for case in CASES:
        if case.name in args.rows.split(","):
            lines.append(run(case, dense=not args.no_dense))
            print(lines[-1], flush=True)
    if args.write:
        args.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
