"""Time the kernels of plain attention beside cuDNN's, forward and backward, in one run.

    python benchmarks/plain.py --out benchmarks/results/plain-h200.csv     # needs a GPU

Both get the same tensors, heads-last in memory. Outputs and gradients are compared first. Times are
of kernels in a CUDA graph, the backward without the forward, in rounds of all kernels in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from cases import PLAIN, PlainCase
from records import Record, write
from run import WARMUP, about
from torch import Tensor

from natten.inputs import Inputs
from natten.neighborhood import Dense
from natten.operators import Call, Choice
from natten.profiler import measure

TOLERANCE = 0.02  # relative; both results are bfloat16 and within 0.01 of the exact ones

# A forward, which gives the output and what the backward needs, and a backward, which takes the
# gradient of the output and these, and gives those of query, key and value.
Attention = tuple[Callable[[], Sequence[Tensor]], Callable[..., Sequence[Tensor]]]


def natten(case: PlainCase, query: Tensor, key: Tensor, value: Tensor) -> Attention:
    """Ours, by the backends that a call takes."""
    inputs = Inputs(query, key, value)
    call = Call(Dense(case.causal), case.dim**-0.5, Choice())

    def backward(grad: Tensor, out: Tensor, lse: Tensor) -> Sequence[Tensor]:
        return [x for x in call.backward(grad, None, inputs, out, lse)[:3] if x is not None]

    return lambda: call.forward(inputs), backward


def cudnn(case: PlainCase, query: Tensor, key: Tensor, value: Tensor) -> Attention:
    """cuDNN's, by PyTorch's operators."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # heads-first views
    ops, scale = torch.ops.aten, case.dim**-0.5

    def forward() -> Sequence[Tensor]:
        out, *others = ops._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, case.causal, False, scale=scale
        )
        return out.transpose(1, 2), *others[:7]

    def backward(
        grad: Tensor, out: Tensor, lse: Tensor, q_starts: Tensor, k_starts: Tensor, q_most: int,
        k_most: int, seed: Tensor, offset: Tensor,
    ) -> Sequence[Tensor]:  # fmt: skip
        grads = ops._scaled_dot_product_cudnn_attention_backward(
            grad.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, seed, offset, None, q_starts,
            k_starts, q_most, k_most, 0.0, case.causal, scale=scale,
        )  # fmt: skip
        return [x.transpose(1, 2) for x in grads]

    return forward, backward


def check(
    case: PlainCase, ours: Attention, theirs: Attention, grad: Tensor
) -> list[tuple[Tensor, ...]]:
    """Raise an error unless both compute the same; return what both forwards gave."""
    found = [tuple(forward()) for forward, _ in (ours, theirs)]
    results = [
        (kept[0], *backward(grad, *kept)) for (_, backward), kept in zip((ours, theirs), found)
    ]
    for name, a, b in zip(("output", "dQ", "dK", "dV"), *results):
        error = ((a - b).norm(dtype=torch.float32) / b.norm(dtype=torch.float32)).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"{case.name}: {name} differs by {error:.3g} of itself")
    return found


def measured(case: PlainCase, rounds: int) -> Iterator[Record]:
    """A record per time: the median of the rounds, and their range."""
    device, shape = torch.device("cuda"), (case.batch, case.length, case.heads, case.dim)
    *inputs, grad = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    both = natten(case, *inputs), cudnn(case, *inputs)
    kept = check(case, *both, grad)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, (forward, backward), given in zip(("natten", "dense cudnn"), both, kept):
        calls[name, "forward"] = forward
        calls[name, "backward"] = lambda run=backward, given=given: run(grad, *given)
    found: dict[tuple[str, str], list[float]] = {each: [] for each in calls}
    for _ in range(rounds):
        for each, call in calls.items():
            found[each].append(measure.graph_time(call, device, WARMUP).median_us)
    for (name, pass_), times in found.items():
        numbers = f"{statistics.median(times):.1f}", f"{max(times) - min(times):.1f}"
        yield Record(case.name, name, pass_, "graph", *numbers, **about(device))


def main() -> int:
    """Measure the chosen cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(PLAIN), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="of all kernels in turn")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    write(args.out, [])
    for name in args.cases.split(","):
        for record in measured(PLAIN[name], args.rounds):
            write(args.out, [record], new=False)
            time = f"{record.median_us:>12} us  +-{record.spread_us}"
            print(f"{name:20}{record.backend:16}{record.pass_:10}{time}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
