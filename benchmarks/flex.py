"""Time the portable kernels beside compiled FlexAttention, in one run.

    python benchmarks/flex.py --out benchmarks/results/flex-h200.csv     # needs a GPU

FlexAttention gets its tokens already in tiles that match its blocks of 128. The time to permute
them and to make its block mask does not count. With the strides of these cases its blocks are full,
as ours are, so that it computes no mask. Its outputs and gradients are compared with ours first.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case
from records import Record, write
from run import about, times
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from natten.functional import neighborhood_attention_generic
from natten.legacy.token_permute import token_permute_operation
from natten.profiler.report import BOTH, FORWARD

NAMES = ("1d", "1d-s256", "flux-s16", "hunyuan-s")
TILE = {1: (128,), 2: (16, 8), 3: (2, 8, 8)}  # 128 tokens each
ROUNDS = 3  # both are timed in each round, because clocks drift
TOLERANCE = 0.02  # relative; both results are bfloat16 and within 0.01 of the exact ones

# A function, its inputs, and the gradient of its output.
Call = tuple[Callable[..., Any], list[Tensor], Tensor]


def tiled(x: Tensor, tile: tuple[int, ...]) -> Tensor:
    """``[batch, *space, heads, channels]`` in the order of tiles, heads-first with flat tokens."""
    permuted, *_ = token_permute_operation(x, tile, flip_tiled_dims=False)
    return permuted.transpose(1, 2).contiguous()


def window_mask(case: Case) -> Callable[..., Tensor]:
    """Which query attends which key, as FlexAttention asks; tokens are in :func:`tiled` order."""
    rule, tile = case.problem("cuda").rule, TILE[len(case.shape)]
    counts = [n // t for n, t in zip(case.shape, tile)]

    def coordinates(number: Tensor) -> list[Tensor]:
        within, block = number % math.prod(tile), number // math.prod(tile)
        found = []
        for count, size in zip(reversed(counts), reversed(tile)):
            found.append(block % count * size + within % size)
            block, within = block // count, within // size
        return found[::-1]

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = query >= 0
        axes = zip(coordinates(query), coordinates(key), case.shape)
        for axis, (x, y, length) in enumerate(axes):
            start, end = rule.windows(axis, x, length)
            allowed = allowed & (y >= start) & (y < end)
        return allowed

    return mask


def training_step(call: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Any:
    """Forward and backward."""
    return torch.autograd.grad(call(*inputs), inputs, grad)


def calls_of(case: Case, backend: str) -> dict[str, Call]:
    """The calls that are timed, by name."""
    rule, tile = case.problem("cuda").rule, TILE[len(case.shape)]
    shape = (case.batch, *case.shape, case.heads, case.dim)
    *ours, grad = (torch.randn(shape, device="cuda", dtype=case.dtype) for _ in range(4))
    theirs = [tiled(x, tile).requires_grad_() for x in ours]
    tokens = math.prod(case.shape)
    make = torch.compile(create_block_mask)
    blocks = make(window_mask(case), None, None, tokens, tokens, "cuda")
    attention = partial(
        neighborhood_attention_generic, kernel_size=rule.kernel_size, stride=rule.stride,
        backend=backend,
    )  # fmt: skip
    torch._dynamo.reset()  # otherwise the next shape is compiled for all shapes
    flex = partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks)
    return {
        f"natten {backend}": (attention, [x.requires_grad_() for x in ours], grad),
        "flex attention": (flex, theirs, tiled(grad, tile)),
    }


def check(case: Case, calls: dict[str, Call]) -> None:
    """Raise an error unless both compute the same."""
    ours, theirs = calls.values()
    tile = TILE[len(case.shape)]
    pairs = [(ours[0](*ours[1]), theirs[0](*theirs[1]))]
    pairs += zip(training_step(*ours), training_step(*theirs))
    for a, b in pairs:
        a, b = tiled(a, tile).detach(), b.detach()
        error = ((a - b).norm(dtype=torch.float32) / b.norm(dtype=torch.float32)).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"{case.name}: FlexAttention computes something else, {error:.3g}")


def measure_case(name: str, calls: dict[str, Call]) -> Iterator[Record]:
    """A record per time: the median of the rounds, and their range."""
    device = torch.device("cuda")
    for pass_ in (FORWARD, BOTH):
        rounds: dict[tuple[str, str], list[float]] = {}
        for _, (backend, (call, inputs, grad)) in itertools.product(range(ROUNDS), calls.items()):
            timed = partial(call, *(x.detach() for x in inputs))
            if pass_ == BOTH:
                timed = partial(training_step, call, inputs, grad)
            for kind, timing in times(timed, device).items():
                rounds.setdefault((backend, kind), []).append(timing.median_us)
        for (backend, kind), found in rounds.items():
            numbers = f"{statistics.median(found):.1f}", f"{max(found) - min(found):.1f}"
            yield Record(name, backend, pass_, kind, *numbers, **about(device))


def main() -> int:
    """Measure the chosen cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(NAMES), help="comma-separated")
    parser.add_argument("--backend", default="triton", help="one of ours")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    write(args.out, [])
    for name in args.cases.split(","):
        case = CASES["cuda"][name]
        calls = calls_of(case, args.backend)
        check(case, calls)
        for record in measure_case(name, calls):
            write(args.out, [record], new=False)
            kind = f"{record.backend:16}{record.pass_:18}{record.time:7}"
            print(f"{name:12}{kind}{record.median_us:>12} us  +-{record.spread_us}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
