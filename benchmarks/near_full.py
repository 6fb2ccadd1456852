"""Time random windows that hold nearly all pairs, beside dense attention, in turn.

    python benchmarks/near_full.py                              # 40 problems, one thread of a CPU
    python benchmarks/near_full.py --draws 10 --threads 2 --dtype bfloat16 --seed 3
    python benchmarks/near_full.py --device cuda --dtype bfloat16 --draws 20

Each problem has a window of at least three quarters of the pairs that the largest window of its
dilation and causality has. Dense attention over all tokens is PyTorch's, in the same dtype, and in
float32 where that is faster. Its tensors are heads-first, and, in the column "same", the views of
heads-last tensors that ours are. A ratio is the median, over rounds, of dense time over ours.

On a GPU dense attention is cuDNN's, and times are of kernels in CUDA graphs.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import FP32, Case
from run import ROUNDS, WARMUP, dense_problems, in_turn

from natten.profiler import Problem, choose_backend, dense_call, natten_call
from natten.profiler.measure import graph_time
from natten.profiler.report import BOTH, FORWARD

LEAST = 0.75  # of the pairs of the largest window
TOKENS = 196, 4096
# batch * heads * pairs * head dim of dense attention, which takes at most 0.3 s, of a GPU 3 ms
MOST = {"cpu": 2e9, "cuda": 5e11}
TARGET = {"cpu": 0.95, "cuda": 0.98}


class Row(NamedTuple):
    """A problem's time in milliseconds, and dense attention's over it."""

    ratio: float
    same: float  # where dense attention's tensors are heads-last in memory
    ours: float
    pass_: str
    backend: str
    problem: str

    def line(self) -> str:
        """What is printed of it."""
        times = f"{self.ratio:6.2f}  same {self.same:5.2f}  {self.ours:9.2f} ms"
        return f"{times}  {self.backend:6}  {self.pass_:18}{self.problem}"


def draw(rng: random.Random, dtype: torch.dtype, device: str = "cpu") -> Case:
    """A random problem whose window holds nearly all pairs; on a GPU, one that keeps it busy."""
    while True:
        rank, left = rng.randint(1, 3), math.exp(rng.uniform(*map(math.log, TOKENS)))
        shape: list[int] = []
        for axes in range(rank, 0, -1):
            spread = math.exp(rng.uniform(-0.5, 0.5)) if axes > 1 else 1.0
            shape.append(max(3, round(left ** (1 / axes) * spread)))
            left /= shape[-1]
        dilation = [rng.choice((1, 1, 1, 2)) for _ in shape]
        largest = [n // d for n, d in zip(shape, dilation)]
        window = [rng.randint(math.ceil(LEAST * n), n) for n in largest]
        stride = [rng.choice((1, 1, rng.randint(1, k))) for k in window]
        causal = [rng.random() < 0.1 for _ in shape]
        batch, heads = rng.choice((1, 1, 2, 4, 16)), rng.choice((1, 2, 3, 4, 8))
        dim = rng.choice((16, 32, 64, 80, 128))
        case = Case(
            "random", tuple(shape), batch, heads, dim, tuple(window), tuple(stride),
            tuple(dilation), tuple(causal), dtype,
        )  # fmt: skip
        size = batch * heads * dim * math.prod(shape) ** 2
        if size > MOST[device] or math.prod(shape) < TOKENS[0]:
            continue
        if device == "cuda" and size < MOST[device] / 50:
            continue
        widest = replace(case, kernel_size=tuple(largest), stride=1)
        if case.problem("cpu").needed_pairs >= LEAST * widest.problem("cpu").needed_pairs:
            return case


def heads_last(problem: Problem, backward: bool) -> Callable[[], Any]:
    """A call of PyTorch's attention of all tokens, on views of heads-last tensors."""
    tensors = [x.flatten(1, -3) for x in problem.inputs().values()]
    views = [x.transpose(1, 2).requires_grad_(backward) for x in tensors]
    grad = torch.ones_like(views[0])

    def call() -> Any:
        with torch.set_grad_enabled(backward):
            out = F.scaled_dot_product_attention(*views)
            return torch.autograd.grad(out, views, grad) if backward else out

    return call


def graphs_in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """As ``in_turn``, of kernels in CUDA graphs."""
    device = torch.device("cuda")
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(1e-6 * graph_time(call, device, WARMUP).median_us)
    return found


def measure(case: Case, passes: list[str], rounds: int, device: str = "cpu") -> Iterator[Row]:
    """Measure a problem beside dense attention."""
    problem = case.problem(device)
    dense = dense_problems(problem)
    for pass_ in passes:
        backward = pass_ == BOTH
        calls = {"ours": natten_call(problem, None, backward)}
        for name, each in dense.items():
            calls[name] = dense_call(each, "sdpa" if device == "cpu" else "cudnn", backward)
            calls[f"{name}, heads-last"] = heads_last(each, backward)
        seconds = (in_turn if device == "cpu" else graphs_in_turn)(calls, rounds)

        def ratio(layout: str, seconds: dict[str, list[float]] = seconds) -> float:
            names = [name + layout for name in dense]
            return min(
                statistics.median(a / b for a, b in zip(seconds[name], seconds["ours"]))
                for name in names
            )

        ours = 1e3 * statistics.median(seconds["ours"])
        backend = choose_backend(problem, None, "gradient" if backward else "attention")
        yield Row(ratio(""), ratio(", heads-last"), ours, pass_, backend, case.describe(FP32))


def main() -> None:
    """Measure, print each time to standard error, and last the problems with the lowest ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=MOST, default="cpu")
    parser.add_argument("--draws", type=int, default=40, help="how many problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--passes", default=f"{FORWARD},{BOTH}", help="comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--worst", type=int, default=10, help="how many are printed of each pass")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng, rows = random.Random(args.seed), []
    for _ in range(args.draws):
        case = draw(rng, getattr(torch, args.dtype), args.device)
        for row in measure(case, args.passes.split(","), args.rounds, args.device):
            rows.append(row)
            print(row.line(), file=sys.stderr, flush=True)
    for pass_ in args.passes.split(","):
        own = sorted(row for row in rows if row.pass_ == pass_)
        target = TARGET[args.device]
        below = sum(row.ratio < target for row in own)
        middle = statistics.median(row.ratio for row in own)
        print(f"{pass_}: median {middle:.2f}, {below} of {len(own)} below {target}; the lowest:")
        for row in own[: args.worst]:
            print(row.line())


if __name__ == "__main__":
    main()
