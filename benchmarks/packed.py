"""Time packed documents and packed sequences beside the same attention one by one, in one run.

    python benchmarks/packed.py --out benchmarks/results/packed-h200.csv     # needs a GPU

``hopper`` and ``triton`` are one launch of each kernel, ``one by one`` the calls that documents by
themselves make, and ``dense`` PyTorch's attention of them: of documents one by one, of sequences
FlashAttention's over packed ones. Times are of kernels in a CUDA graph, the backward without the
forward, in rounds of all in turn; ``host`` is what a call costs in Python, forward and backward.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import PACKED, PackedCase
from records import Record, write
from run import WARMUP, about
from torch import Tensor

import natten
from natten import Neighborhood, VarlenLayout
from natten.backends import named
from natten.documents import Documents
from natten.inputs import Inputs
from natten.neighborhood import Dense
from natten.operators import Call, Choice
from natten.profiler import measure

Run = Callable[[], Any]


def calls_of(case: PackedCase) -> tuple[dict[tuple[str, str], Run], dict[str, Run]]:
    """What is timed on the GPU, by who and which pass, and on the host, by who."""
    layouts, rule = case.layouts, case.rule
    lengths = [math.prod(shape) for shape in layouts]
    tokens, scale = sum(lengths), case.dim**-0.5
    shape = 1, tokens, case.heads, case.dim
    *inputs, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    if isinstance(rule, Neighborhood):
        layout = VarlenLayout(layouts)
        documents = layout.documents(rule, torch.device("cuda"))
        public = {1: natten.na1d_varlen, 2: natten.na2d_varlen, 3: natten.na3d_varlen}[rule.rank]

        def call(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
            found = public(q[0], k[0], v[0], layout, case.window, backend=backend)
            return found[None]
    else:
        starts = torch.tensor([0, *itertools.accumulate(lengths)]).cuda()
        documents = Documents.of_sequences((starts, starts), (max(lengths),) * 2)

        def call(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
            return natten.attention(
                q, k, v, case.causal, backend=backend, cumulative_seqlen_Q=starts,
                cumulative_seqlen_KV=starts, max_seqlen_Q=max(lengths), max_seqlen_KV=max(lengths),
            )  # fmt: skip

    timed: dict[tuple[str, str], Run] = {}
    host: dict[str, Run] = {}
    packed = Inputs(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    for name in ("hopper", "triton"):
        backend: Any = named(name)
        out, lse = backend.packed_forward(packed, documents, rule, scale)
        timed[name, "forward"] = lambda b=backend: b.packed_forward(packed, documents, rule, scale)
        timed[name, "backward"] = lambda b=backend, o=out, e=lse: b.packed_backward(
            grad, None, packed, o, e, documents, rule, scale
        )
        host[name] = lambda name=name: torch.autograd.grad(call(*leaves, name), leaves, grad)

    each: list[tuple[Inputs, Call, Tensor, Tensor, Tensor]] = []
    for size, *qkv, g in zip(layouts, *(x.split(lengths, 1) for x in (*inputs, grad))):
        own = Inputs(*(x.unflatten(1, size) for x in qkv))
        fitted = rule if isinstance(rule, Dense) else rule.fitted(size)
        one = Call(fitted, scale, Choice("hopper"))
        each.append((own, one, g.unflatten(1, size), *one.forward(own)))
    timed["one by one", "forward"] = lambda: [one.forward(own) for own, one, *_ in each]
    timed["one by one", "backward"] = lambda: [
        one.backward(g, None, own, out, lse) for own, one, g, out, lse in each
    ]
    if case.window is None:
        flash(case, inputs, grad, starts, max(lengths), scale, timed)
    else:
        ops = torch.ops.aten
        dense = [
            [x.flatten(1, -3).transpose(1, 2) for x in (*own[:3], g)] for own, _, g, _, _ in each
        ]
        timed["dense", "forward"] = lambda: [
            ops._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)
            for q, k, v, _ in dense
        ]
    return timed, host


def flash(
    case: PackedCase, inputs: list[Tensor], grad: Tensor, starts: Tensor, longest: int,
    scale: float, timed: dict[tuple[str, str], Run],
) -> None:  # fmt: skip
    """FlashAttention's kernels, as PyTorch has them for nested tensors."""
    ops, starts = torch.ops.aten, starts.int()
    q, k, v = (x[0] for x in inputs)

    def forward() -> Any:
        return ops._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, case.causal, False, scale=scale
        )

    out, lse, state, offset, _ = forward()
    timed["dense", "forward"] = forward
    timed["dense", "backward"] = lambda: ops._flash_attention_backward(
        grad[0], q, k, v, out, lse, starts, starts, longest, longest, 0.0, case.causal, state,
        offset, scale=scale,
    )  # fmt: skip


def agree(case: PackedCase, timed: dict[tuple[str, str], Run]) -> None:
    """Raise an error unless one launch gives what the calls one by one do."""
    packed, _ = timed["hopper", "forward"]()
    apart = torch.cat([out.flatten(1, -3) for out, _ in timed["one by one", "forward"]()], 1)
    found = timed["hopper", "backward"]()[:3]
    grads = zip(*(each[:3] for each in timed["one by one", "backward"]()))
    others = [torch.cat([x.flatten(1, -3) for x in each], 1) for each in grads]
    for name, a, b in zip(("output", "dQ", "dK", "dV"), (packed, *found), (apart, *others)):
        error = ((a - b).norm(dtype=torch.float32) / b.norm(dtype=torch.float32)).item()
        if not error < 0.02:
            raise RuntimeError(f"{case.name}: {name} differs by {error:.3g} of itself")


def host_us(call: Run) -> float:
    """Microseconds until a call returns, while the GPU has little to do."""
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main() -> int:
    """Measure the chosen cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(PACKED), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="of all kernels in turn")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write(args.out, [])
    for case in map(PACKED.__getitem__, args.cases.split(",")):
        torch.manual_seed(0)
        timed, host = calls_of(case)
        agree(case, timed)
        found: dict[tuple[str, str], list[float]] = {each: [] for each in timed}
        device = torch.device("cuda")
        for _ in range(args.rounds):
            for each, call in timed.items():
                found[each].append(measure.graph_time(call, device, WARMUP).median_us)
        records = []
        for (who, pass_), times in found.items():
            numbers = f"{statistics.median(times):.1f}", f"{max(times) - min(times):.1f}"
            records.append(Record(case.name, who, pass_, "graph", *numbers, **about(device)))
        for who, call in host.items():
            number = f"{host_us(call):.1f}"
            records.append(
                Record(case.name, who, "forward+backward", "host", number, **about(device))
            )
        write(args.out, records, new=False)
        for r in records:
            print(f"{r.case:14}{r.backend:12}{r.pass_:18}{r.time:8}{r.median_us:>10}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
