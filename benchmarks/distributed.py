"""Weak and strong scaling of layouts that are split over several ranks.

    torchrun --nproc-per-node 8 benchmarks/distributed.py --out scaling.csv    # NCCL, on GPUs
    torchrun --nproc-per-node 2 benchmarks/distributed.py --small              # gloo, on a CPU
    python benchmarks/distributed.py --emulate 2 4 8                           # on one GPU

First, every case in a small size has to agree with the same call on one rank. Then ``one`` is the
time of the case's layout on one rank. With strong scaling this layout is split; with weak scaling
every rank has one of its size. ``together`` is a call, ``compute`` the same call whose messages are
left out, copies and all, and ``messages`` exchanges of the same sizes alone. Times are eager ones,
in microseconds: medians, of the slowest rank. The four are measured in turn, as a GPU's clock
changes when it is warm. ``hidden`` is the share of the messages' time by which a call does not take
longer than its compute, and ``expected`` is the efficiency by `natten.distributed.plan`, for the
measured ``one`` and the links that are given. A row without times needs more memory than the GPU
has.

``--emulate`` needs one rank: the shards of as many ranks run one after another, without messages,
whose time is the plan's, and without the copies that messages need. ``sum/one`` is the time of all
shards together over that of ``one``: what halos and smaller tiles cost. ``NCCL_NVLS_ENABLE=0``
leaves NVLink multicast off.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from cases import BF16, Case, by
from run import about
from torch import Tensor

import natten
from natten import Neighborhood
from natten.distributed import plan
from natten.distributed.planning import Estimate, Plan
from natten.distributed.shards import HaloPlan, Sharding, halo_plan
from natten.profiler.report import BOTH, FORWARD

CASES = [
    Case("ltx-full", (121, 272, 480), 1, 4, 64, 11),
    Case("weather", (13, 91, 180), 1, 8, 48, (5, 7, 7)),
    Case("hunyuan", (30, 48, 80), 1, 24, 128, (18, 24, 24)),
    Case("audio", (16384,), 4, 8, 64, 65),
]
SMALL = [
    Case("ltx-full", (6, 16, 24), 1, 4, 16, 5, dtype=torch.float32),
    Case("weather", (5, 13, 24), 1, 8, 8, (3, 5, 5), dtype=torch.float32),
    Case("hunyuan", (6, 12, 16), 1, 8, 16, (4, 6, 6), dtype=torch.float32),
    Case("audio", (512,), 2, 8, 16, 33, dtype=torch.float32),
]
LOCAL = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
SHARDED: dict[int, Any] = {
    1: natten.distributed.na1d, 2: natten.distributed.na2d, 3: natten.distributed.na3d,
}  # fmt: skip
METHODS = "halo", "heads"
BLOCKS = 5  # of calls, whose median counts
CLOSE = {torch.float32: 1e-5, BF16: 2e-2}  # error over size
Call = Callable[[], Any]
Splits = list[int]


class Row(NamedTuple):
    """One line of the table and of the CSV file; fields that are not known are empty strings."""

    case: str
    scaling: str
    ranks: str
    split: str
    method: str
    pass_: str
    one_us: str = ""
    compute_us: str = ""
    messages_us: str = ""
    together_us: str = ""
    hidden: str = ""
    efficiency: str = ""
    expected: str = ""
    sum_over_one: str = ""
    peak_mb: str = ""
    planned_mb: str = ""


HEADER = [name.rstrip("_").replace("_over_", "/").replace("_", " ") for name in Row._fields]


@dataclass(frozen=True)
class Split:
    """A case on several ranks.

    Attributes:
        case: the problem, with the whole layout of the ranks.
        grid: how many ranks there are along each axis.
        link, latency: bytes per second, and seconds, of the plan's messages.
    """

    case: Case
    grid: tuple[int, ...]
    link: float
    latency: float

    @property
    def count(self) -> int:
        return math.prod(self.grid)

    @property
    def rule(self) -> Neighborhood:
        return self.case.problem("cpu").rule

    def plan(self, flops: float) -> Plan:
        """The plan, for ranks that compute at a rate."""
        case = self.case
        return plan(
            case.shape, case.kernel_size, ranks=dict(enumerate(self.grid)), batch=case.batch,
            heads=case.heads, head_dim=case.dim, dtype=case.dtype, bandwidth=self.link,
            latency=self.latency, flops=flops,
        )  # fmt: skip

    @property
    def sharding(self) -> Sharding:
        return Sharding(self.rule, self.plan(1.0).sizes)

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """The coordinates of each rank."""
        return tuple(itertools.product(*map(range, self.grid)))

    def steps(self, rank: int) -> HaloPlan:
        """What a rank does with the method "halo"."""
        return halo_plan(self.sharding, self.ranks, rank)

    def local(self, rank: int) -> tuple[int, ...]:
        """The layout of a rank's tokens."""
        return tuple(each[i] for each, i in zip(self.sharding.sizes, self.ranks[rank]))

    def methods(self) -> list[str]:
        return [name for name in METHODS if name == "halo" or self.case.heads % self.count == 0]


@cache
def split_of(case: Case, count: int, weak: bool, link: float, latency: float) -> Split:
    """The case on ``count`` ranks, along those axes of which the plan expects the shortest time."""
    found = []
    for grid in itertools.product(range(1, count + 1), repeat=len(case.shape)):
        if math.prod(grid) != count:
            continue
        grown = tuple(n * each for n, each in zip(case.shape, grid))
        split = Split(replace(case, shape=grown) if weak else case, grid, link, latency)
        if all(min(sizes) for sizes in split.sharding.sizes):
            (halo, *_) = split.plan(flops=2e14).methods
            assert halo.forward is not None
            found.append((halo.forward.time, split))
    if not found:
        raise ValueError(f"{case.name} has too few tokens for {count} ranks")
    return min(found, key=lambda each: each[0])[1]


# --- what is timed -------------------------------------------------------------------------------


def random(shape: tuple[int, ...], case: Case, device: torch.device) -> Tensor:
    """Random tokens ``[batch, *shape, heads, dim]`` that need a gradient."""
    sizes = case.batch, *shape, case.heads, case.dim
    return torch.randn(sizes, dtype=case.dtype, device=device, requires_grad=True)


def attend(rule: Neighborhood, *inputs: Tensor) -> Tensor:
    """The ordinary operator."""
    return LOCAL[rule.rank](
        *inputs, rule.kernel_size, rule.stride, rule.dilation, rule.is_causal,
        boundary=rule.boundary, queries_per_key=rule.queries_per_key,
        query_offset=rule.query_offset,
    )  # fmt: skip


def in_pass(call: Callable[..., Tensor], inputs: list[Tensor], pass_: str) -> Call:
    """The call without gradients, or with those of its inputs."""
    if pass_ == FORWARD:
        return torch.no_grad()(lambda: call(*inputs))
    with torch.no_grad():
        grad = torch.randn_like(call(*inputs))
    return lambda: torch.autograd.grad(call(*inputs), inputs, grad)


def one_rank(case: Case, device: torch.device, pass_: str) -> Call:
    """The whole layout on this rank."""
    inputs = [random(case.shape, case, device) for _ in range(3)]
    rule = case.problem("cpu").rule
    return in_pass(lambda *x: attend(rule, *x), inputs, pass_)


def compute(split: Split, rank: int, device: torch.device, pass_: str) -> Iterator[Call]:
    """What a rank computes with the method "halo": first what it does while messages travel."""
    steps = split.steps(rank)
    for piece in [steps.core, *(slab for slabs in steps.border for slab in slabs if slab)]:
        assert piece is not None  # every rank has queries
        layouts = ([last - first for first, last in box] for box in (piece.queries, piece.keys))
        query, key = (random(tuple(layout), split.case, device) for layout in layouts)
        value = torch.randn_like(key, requires_grad=True)
        rule = piece.rule
        yield in_pass(lambda *x, rule=rule: attend(rule, *x), [query, key, value], pass_)


def messages(split: Split, rank: int, method: str, device: torch.device, pass_: str) -> Call:
    """What a rank sends and gets, by all-to-all exchanges of the same sizes."""
    both = exchanges(split, rank, method)
    if pass_ == BOTH:
        both += [(received, sent) for sent, received in reversed(both)]
    buffers = [
        [torch.empty(sum(sizes), dtype=split.case.dtype, device=device) for sizes in each]
        for each in both
    ]

    def call() -> None:
        for (sent, received), (source, target) in zip(both, buffers):
            dist.all_to_all_single(target, source, received, sent)

    return call


def exchanges(split: Split, rank: int, method: str) -> list[tuple[Splits, Splits]]:
    """How many numbers go to each rank and come from it, in each exchange of a forward."""
    case = split.case
    each = case.batch * case.heads * case.dim
    if method == "heads":
        tokens, share = [math.prod(split.local(r)) for r in range(split.count)], each // split.count
        own = tokens[rank]
        inward = [3 * share * own] * split.count, [3 * share * n for n in tokens]
        outward = [share * n for n in tokens], [share * own] * split.count
        return [inward, outward]
    steps = split.steps(rank)
    sent = [
        2 * each * sum(math.prod(last - first for first, last in steps.own[i]) for i in numbers)
        for numbers in steps.sent
    ]
    received = [
        2 * each * sum(math.prod(s[i].length for s, i in zip(steps.segments, at)) for at in places)
        for places in steps.received
    ]
    return [(sent, received)]


@cache
def mesh_of(device: str, grid: tuple[int, ...]) -> dist.DeviceMesh:
    return dist.init_device_mesh(device, grid)


def together(split: Split, method: str) -> Callable[..., Tensor]:
    """The call of the ranks."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    axes = range(len(split.grid))
    sizes = dict(zip(axes, split.sharding.sizes))
    mesh = mesh_of(device, split.grid)

    def call(*inputs: Tensor) -> Tensor:
        return SHARDED[len(split.grid)](
            *inputs, split.case.kernel_size, mesh=mesh, shard={axis: axis for axis in axes},
            sizes=sizes, method=method,
        )  # fmt: skip

    return call


class Silent:
    """Collectives that send nothing."""

    @staticmethod
    def all_to_all_single(x: Tensor, received: Splits, sent: Splits, group: Any) -> Tensor:
        return x.new_empty(sum(received))

    @staticmethod
    def wait_tensor(x: Tensor) -> Tensor:
        return x


def without_messages(call: Call) -> Call:
    """The call, in which nothing travels."""

    def silent() -> None:
        with patch("natten.distributed.collectives.collectives", Silent):
            call()

    return silent


# --- clocks --------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slowest(number: float, device: torch.device) -> float:
    """The largest of all ranks' numbers."""
    found = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def times_us(calls: Sequence[Call], device: torch.device, seconds: float) -> list[float]:
    """The median times of calls that are made in turn, of the slowest rank.

    All ranks make as many calls, those of one kind together for ``seconds / BLOCKS``.
    """

    def timed(call: Call, count: int) -> float:
        dist.barrier()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / count

    counts = []
    for call in calls:
        for _ in range(2):  # kernels are compiled, and plans made
            once = slowest(timed(call, 1), device)
        counts.append(max(2, round(seconds / BLOCKS / once)))
    rounds = [list(map(timed, calls, counts)) for _ in range(BLOCKS)]
    return [1e6 * slowest(statistics.median(times), device) for times in zip(*rounds)]


def peak_bytes(call: Call, device: torch.device) -> float:
    """What a call adds to the memory of the rank that needs most; a GPU's."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return slowest(torch.cuda.max_memory_allocated(device) - before, device)


def fits(case: Case, planned: float, pass_: str, device: torch.device) -> bool:
    """Whether a GPU has the memory for a pass whose forward holds ``planned`` bytes, and for the
    same on one rank.

    One rank holds queries, keys, values and output. A backward needs about as much again for the
    gradients, and what it saves of the forward.
    """
    if device.type != "cuda":
        return True
    one = 4 * case.batch * math.prod(case.shape) * case.heads * case.dim * case.dtype.itemsize
    room = torch.cuda.get_device_properties(device).total_memory
    return (1.0 if pass_ == FORWARD else 2.4) * (planned + one) < 0.95 * room


# --- rows ----------------------------------------------------------------------------------------


def check(case: Case, device: torch.device, link: float, latency: float) -> None:
    """Compare every method with one rank.

    Raises:
        RuntimeError: an output or a gradient is another.
    """
    split = split_of(case, dist.get_world_size(), False, link, latency)
    rank, close = dist.get_rank(), CLOSE[case.dtype]
    generator = torch.Generator().manual_seed(1)
    sizes = case.batch, *case.shape, case.heads, case.dim
    whole = [torch.randn(sizes, generator=generator).to(device, case.dtype) for _ in range(4)]
    *inputs, grad = whole
    inputs = [x.requires_grad_() for x in inputs]
    out = attend(split.rule, *inputs)
    expected = [out, *torch.autograd.grad(out, inputs, grad)]
    spans = [split.sharding.own(axis, i) for axis, i in enumerate(split.ranks[rank])]
    own = (slice(None), *(slice(*span) for span in spans))
    for method in split.methods():
        local = [x.detach()[own].clone().requires_grad_() for x in inputs]
        out = together(split, method)(*local)
        found = [out, *torch.autograd.grad(out, local, grad[own])]
        for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected):
            error = (a - b[own]).double().norm() / b[own].double().norm()
            if not slowest(error.item(), device) < close:
                raise RuntimeError(f"{case.name}, {method}: {name} differs from one rank's")


def expected(split: Split, method: str, share_us: float, pass_: str) -> tuple[float, float]:
    """The plan's time of the messages in microseconds, and its efficiency.

    ``share_us`` is the time of a rank's share of the whole layout, if one rank computes all of it.
    """

    def estimates(flops: float) -> list[Estimate]:
        found = split.plan(flops)[method]
        assert found.forward is not None and found.backward is not None
        return [found.forward] if pass_ == FORWARD else [found.forward, found.backward]

    operations = sum(each.compute for each in estimates(1.0))
    found = estimates(operations / (1e-6 * share_us))
    message_us = 1e6 * sum(each.communication for each in found)
    return message_us, 1e-6 * share_us / sum(each.time for each in found)


def numbers(**fields: float) -> dict[str, str]:
    """Fields of a row."""
    return {
        name: f"{value:.3f}" if name in ("hidden", "efficiency", "expected", "sum_over_one")
        else f"{value:.1f}"
        for name, value in fields.items()
    }  # fmt: skip


def scaled(case: Case, weak: bool, args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """The rows of a case, on all ranks."""
    split = split_of(case, dist.get_world_size(), weak, args.link, args.latency)
    rank = dist.get_rank()
    scaling = "weak" if weak else "strong"
    for pass_, method in itertools.product(args.passes, split.methods()):
        planned = max(load.memory for load in split.plan(1.0)[method].loads)
        head = case.name, scaling, str(split.count), by(split.grid), method, pass_
        memory = {"planned_mb": planned / 1e6} if pass_ == FORWARD else {}
        if not fits(case, planned, pass_, device):
            yield Row(*head, **numbers(planned_mb=planned / 1e6))
            continue
        inputs = [random(split.local(rank), case, device) for _ in range(3)]
        call = in_pass(together(split, method), inputs, pass_)
        calls = [
            one_rank(case, device, pass_), without_messages(call),
            messages(split, rank, method, device, pass_), call,
        ]  # fmt: skip
        one_us, compute_us, messages_us, together_us = times_us(calls, device, args.seconds)
        share = one_us if weak else one_us / split.count
        hidden = (compute_us + messages_us - together_us) / messages_us
        if device.type == "cuda":
            memory["peak_mb"] = (peak_bytes(call, device) + 3 * inputs[0].nbytes) / 1e6
        del call, calls, inputs
        yield Row(
            *head,
            **numbers(
                one_us=one_us, compute_us=compute_us, messages_us=messages_us,
                together_us=together_us, hidden=min(max(hidden, 0), 1),
                efficiency=share / together_us, expected=expected(split, method, share, pass_)[1],
                **memory,
            ),
        )  # fmt: skip


def emulated(
    case: Case, count: int, weak: bool, args: argparse.Namespace, device: torch.device
) -> Iterator[Row]:
    """The rows of a case on ranks that are not there, one after another."""
    split = split_of(case, count, weak, args.link, args.latency)
    for pass_ in args.passes:
        (one_us,) = times_us([one_rank(case, device, pass_)], device, args.seconds)
        share = one_us if weak else one_us / count
        for method in split.methods():
            message_us, by_plan = expected(split, method, share, pass_)
            known: dict[Any, tuple[float, float]] = {}
            total, most, slowest_us = 0.0, 0.0, 0.0
            for rank in range(count):
                steps = split.steps(rank)
                kind = (steps.core, steps.border) if method == "halo" else method
                if kind not in known:
                    if method == "halo":
                        calls = list(compute(split, rank, device, pass_))
                    else:
                        part = replace(case, shape=split.case.shape, heads=case.heads // count)
                        calls = [one_rank(part, device, pass_)]
                    times = times_us(calls, device, args.seconds)
                    hides = times[0] if method == "halo" and steps.is_inner else 0.0
                    known[kind] = sum(times), sum(times) + max(message_us - hides, 0)
                    del calls
                alone_us, with_messages = known[kind]
                total += alone_us
                most, slowest_us = max(most, alone_us), max(slowest_us, with_messages)
            yield Row(
                case.name, f"{'weak' if weak else 'strong'}, emulated", str(count),
                by(split.grid), method, pass_,
                **numbers(
                    one_us=one_us, compute_us=most, messages_us=message_us,
                    together_us=slowest_us, efficiency=share / slowest_us, expected=by_plan,
                    sum_over_one=total / (count * share),
                ),
            )  # fmt: skip


def show(row: Sequence[str]) -> None:
    """Print a line of a Markdown table, in columns."""
    widths = [max(len(name), 8) for name in HEADER]
    widths[:6] = 8, 16, 5, 6, 6, 16
    cells = [
        cell.ljust(width) if i < 6 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths))
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def join() -> torch.device:
    """Join the group of torchrun, or one of this process alone, and return the rank's device."""
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if is_gpu else None
    if device is not None:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone: dict[str, Any] = {}
        if "RANK" not in os.environ:
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl" if is_gpu else "gloo", device_id=device, **alone)
    return device or torch.device("cpu")


def main(arguments: list[str] | None = None) -> int:
    """Check and measure the chosen cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in CASES]
    parser.add_argument("--small", action="store_true", help="small sizes, for CPUs")
    parser.add_argument("--cases", default=",".join(names), help="comma-separated")
    parser.add_argument("--passes", default=f"{FORWARD},{BOTH}", help="comma-separated")
    parser.add_argument("--scalings", default="strong,weak", help="comma-separated")
    parser.add_argument("--emulate", nargs="+", type=int, metavar="N", help="numbers of ranks")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each time; default: 0.2")
    parser.add_argument(
        "--link", type=float, default=3e11, metavar="X",
        help="bytes a second that the plan's ranks send, and receive; default: 3e11",
    )  # fmt: skip
    parser.add_argument(
        "--latency", type=float, default=3e-5, metavar="X",
        help="seconds until a message's first byte arrives; default: 3e-5",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="a CSV file of all rows")
    args = parser.parse_args(arguments)
    chosen, args.passes = args.cases.split(","), args.passes.split(",")
    scalings = args.scalings.split(",")
    known = [*names, FORWARD, BOTH, "strong", "weak"]
    if unknown := [each for each in chosen + args.passes + scalings if each not in known]:
        parser.error(f"unknown {unknown}; known: {', '.join(known)}")
    started = not dist.is_initialized()
    device = join()
    if args.emulate and dist.get_world_size() > 1:
        parser.error("--emulate is for one rank")
    is_first = dist.get_rank() == 0
    torch.manual_seed(dist.get_rank())
    large = {case.name: case for case in (SMALL if args.small else CASES)}
    small = {case.name: case for case in SMALL}
    for name in chosen:
        dtype = BF16 if device.type == "cuda" else torch.float32
        check(replace(small[name], dtype=dtype), device, args.link, args.latency)
    if is_first:
        print(f"{len(chosen)} cases agree with one rank.")
        show(HEADER)
        show([*["---"] * 6, *["--:"] * (len(HEADER) - 6)])
    where = about(device)
    with open(args.out if args.out and is_first else os.devnull, "w", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(each.rstrip("_") for each in Row._fields), *where])
        for name, scaling in itertools.product(chosen, scalings):
            case, weak = large[name], scaling == "weak"
            if args.emulate:
                found = (r for n in args.emulate for r in emulated(case, n, weak, args, device))
            else:
                found = scaled(case, weak, args, device)
            for row in found:
                writer.writerow([*row, *where.values()])
                file.flush()  # a run may be cut off
                if is_first:
                    show(row)
    if started:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
