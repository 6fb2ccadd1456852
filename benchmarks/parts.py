"""Time parts of a layout, finer queries, borders and masks beside the whole layout, in one run.

    python benchmarks/parts.py --device cpu
    python benchmarks/parts.py --device cuda --out benchmarks/results/parts-h200.csv
    python benchmarks/parts.py --device cuda --backend triton --cases nat,hdit
    python benchmarks/parts.py --device cuda --variants whole,masked

Of every case, ``half`` are the queries of the second half of the first axis, with the keys of the
whole layout, and ``masked`` is the whole layout without a tenth of its keys, chosen at random.
``anyup`` are queries eight times as fine as keys, beside keys that are repeated and dilated, which
gives the same numbers. Times on a GPU are of kernels in a CUDA graph.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import CASES, GROUPS, Case
from records import Record, write
from run import WARMUP, about
from torch import Tensor

import natten
from natten.profiler import measure
from natten.profiler.report import BOTH, FORWARD

SMALL = "nat,dinat,hdit,1d,video"  # of the CPU's cases
FUSED = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Call = tuple[Attention, list[Tensor]]


def random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """A random tensor that needs a gradient."""
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def calls_of(case: Case, device: str, backend: str | None) -> dict[str, Call]:
    """The calls of a case, by name; the first is the whole layout."""
    rule = case.problem(device).rule
    rank, length = rule.rank, case.shape[0]
    sizes = case.batch, *case.shape, case.heads, case.dim
    query, key, value = (random(device, case.dtype, *sizes) for _ in range(3))
    half = query.detach()[:, length // 2 :].clone().requires_grad_()
    attend: Any = partial(
        FUSED[rank], kernel_size=rule.kernel_size, stride=rule.stride, dilation=rule.dilation,
        is_causal=rule.is_causal, backend=backend,
    )  # fmt: skip
    kept = torch.rand(case.batch, *case.shape, device=device) >= 0.1
    offset = (length // 2, *(0,) * (rank - 1))
    calls = {
        "whole": (attend, [query, key, value]),
        "half": (partial(attend, query_offset=offset), [half, key, value]),
        "truncate": (partial(attend, boundary="truncate"), [query, key, value]),
        "masked": (partial(attend, key_mask=kept), [query, key, value]),
    }
    steps = (s * d for s, d in zip(rule.stride, rule.dilation))
    if not any(rule.is_causal) and not any(n % step for n, step in zip(case.shape, steps)):
        calls["circular"] = partial(attend, boundary="circular"), [query, key, value]
    return calls


def anyup(device: str, backend: str | None) -> dict[str, Call]:
    """A feature upsampler: 224 x 224 queries, 28 x 28 keys, windows of 9 x 9, values of 384."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query = random(device, dtype, 1, 224, 224, 1, 32)
    key, value = (random(device, dtype, 1, 28, 28, 1, d) for d in (32, 384))
    repeated = [x.detach().repeat_interleave(8, 1).repeat_interleave(8, 2) for x in (key, value)]
    attend = partial(natten.na2d, kernel_size=9, backend=backend)
    return {
        "repeated": (partial(attend, dilation=8), [query, *(x.requires_grad_() for x in repeated)]),
        "finer": (partial(attend, queries_per_key=8), [query, key, value]),
    }


def time_of(call: Call, backward: bool) -> measure.Timing:
    """Median and spread of a call, perhaps with its gradients."""
    attend, inputs = call
    device, grad = inputs[0].device, torch.randn_like(attend(*inputs))

    def run() -> None:
        if backward:
            torch.autograd.grad(attend(*inputs), inputs, grad)
        else:
            attend(*(x.detach() for x in inputs))

    if device.type == "cuda":
        return measure.graph_time(run, device, WARMUP)
    return measure.eager_time(run, device, WARMUP, seconds=1.0)


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen cases and print how their times compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=CASES, required=True)
    parser.add_argument("--cases", help="names of cases.py and anyup; default: the table's")
    parser.add_argument("--backend", help="one of ours; default: our choice")
    parser.add_argument(
        "--variants", help="comma-separated; default: all, the first is compared with"
    )
    parser.add_argument("--passes", default=f"{FORWARD},{BOTH}", help="comma-separated")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--out", type=Path, help="a CSV file of all times")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    usual = SMALL if args.device == "cpu" else ",".join(GROUPS["cuda"])
    records = []
    print(f"{'case':12}{'pass':18}{'variant':10}{'us':>12}{'ratio':>8}")
    for name in (args.cases or f"{usual},anyup").split(","):
        if name == "anyup":
            calls = anyup(args.device, args.backend)
        else:
            calls = calls_of(CASES[args.device][name], args.device, args.backend)
        for pass_ in args.passes.split(","):
            first = None
            for variant in args.variants.split(",") if args.variants else calls:
                call = calls[variant]
                timing = time_of(call, pass_ == BOTH)
                first = first or timing.median_us
                ratio = f"{timing.median_us / first:8.3f}"
                print(f"{name:12}{pass_:18}{variant:10}{timing.median_us:12.1f}{ratio}", flush=True)
                kind = "graph" if args.device == "cuda" else "eager"
                numbers = f"{timing.median_us:.1f}", f"{timing.spread_us:.1f}"
                who = f"natten {args.backend or 'default'} {variant}"
                where = about(torch.device(args.device))
                records.append(Record(name, who, pass_, kind, *numbers, **where))
    if args.out:
        write(args.out, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
