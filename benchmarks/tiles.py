"""Search the best tiles of the Hopper kernels, beside those that are taken.

    python benchmarks/tiles.py --out benchmarks/results/tiles/search-h200.csv
    python benchmarks/tiles.py --cases nat,hdit --kinds forward --within 0.3 --most 64

Of each case and kind of kernel, all tiles whose estimate is up to ``--within`` above the lowest are
timed, at most ``--most`` of them. What they return is compared first with what the tiles that are
taken do. Times are of kernels in CUDA graphs, the median of rounds in turn. The fastest, and those
that are taken, have more rounds by themselves, as of many times one is low by chance. Forward it is
the time of the whole pass; of a gradient's kernel its own with the tiles that are taken, and what
both passes take more or less with others. Processes compile meanwhile, as many as there are
processors.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import CASES as BY_DEVICE
from cases import GROUPS, SPECTRUM, Case, by
from run import about
from spectrum import window_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import natten
from natten import tuning
from natten.backends.hopper import tiles as hopper
from natten.backends.interface import KINDS, Tiles
from natten.functional import neighborhood_attention_generic
from natten.profiler import tune

CASES: dict[str, Case] = SPECTRUM | BY_DEVICE["cuda"]
FORWARD, *GRADIENTS = KINDS
BACKEND = "hopper"
# Of samples in turn; after so many seconds a third of the rounds do. The fastest have more.
ROUNDS, FINAL_ROUNDS, FINALISTS, SECONDS = 9, 30, 4, 3.0
SAMPLE_US = 2000.0  # the least time of a sample, which may be several calls
CLOSE = 0.02  # how far results may be apart, of their norm; bfloat16 rounds by up to 0.004


class Candidate(NamedTuple):
    """Tiles for a kind of kernel of a case."""

    case: str
    kind: str
    tiles: Tiles
    estimate: float  # cycles of a multiprocessor

    def chosen(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the kernel has these tiles."""
        key = hopper.key(self.kind, *tune.arguments(CASES[self.case].problem("cpu"), BACKEND))
        return tuning.trial(key, self.tiles)

    def compile(self) -> None:
        """Compile what the case launches; Triton keeps it on disk."""
        case, is_gradient = CASES[self.case], self.kind != FORWARD
        call = {**case.inputs("meta", is_gradient), **window_of(case), "backend": BACKEND}
        with self.chosen():
            natten.compile_ahead([call])


def candidates(case: Case, kind: str, within: float, most: int) -> list[Candidate]:
    """The tiles that are taken, then the others that may be faster, by estimate."""
    *arguments, _ = tune.arguments(case.problem("cpu"), BACKEND)
    taken, costs = hopper.choose(kind, *arguments), hopper.estimates(kind, *arguments)
    limit = (1 + within) * min(costs.values())
    others = [tiles for tiles, cost in costs.items() if cost <= limit and tiles != taken]
    scale = case.batch * case.heads * math.prod(case.problem("cpu").rule.dilation)
    return [
        Candidate(case.name, kind, tiles, scale * costs[tiles]) for tiles in [taken, *others][:most]
    ]


def call_of(case: Case, kind: str) -> Callable[[], Sequence[Tensor]]:
    """The forward pass of a case on random tensors, or both passes."""
    inputs, options = case.inputs("cuda", kind != FORWARD), window_of(case)
    forward = partial(neighborhood_attention_generic, **inputs, **options, backend=BACKEND)
    grad_out = torch.randn_like(inputs["query"])
    if kind == FORWARD:
        return lambda: [forward()]
    return lambda: torch.autograd.grad(forward(), [*inputs.values()], grad_out)


class Captured:
    """Calls in a CUDA graph."""

    def __init__(self, call: Callable[[], Sequence[Tensor]]) -> None:
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        self.graph, self.calls = torch.cuda.CUDAGraph(), 1
        with torch.cuda.graph(self.graph):
            self.results = call()
        taken = min(self.sample() for _ in range(2))
        if taken < SAMPLE_US:
            self.graph, self.calls = torch.cuda.CUDAGraph(), math.ceil(SAMPLE_US / taken)
            with torch.cuda.graph(self.graph):
                for _ in range(self.calls):
                    self.results = call()

    def sample(self) -> float:
        """Microseconds of a call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / self.calls


def kernel_us(call: Callable[[], Any], kind: str, calls: int = 5) -> float:
    """What a gradient's kernel adds to a backward pass, by PyTorch's profiler: from the end of the
    kernel before it, with whose end it may overlap, to its own."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    names = "lse_delta_kernel", "backward_kernel"
    ends = sorted(event.time_range.end for event in found.events() if event.name in names)
    own, each = 1 + GRADIENTS.index(kind), 1 + len(GRADIENTS)
    return statistics.median(b - a for a, b in zip(ends[own - 1 :: each], ends[own::each]))


def differ(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether any result is another one, or none."""
    return any(
        not (a.float() - b.float()).norm() <= CLOSE * b.float().norm()
        for a, b in zip(results, expected)
    )


def times(found: Sequence[Candidate]) -> tuple[list[list[float]], list[int]]:
    """Samples of the kernel's time for each candidate, none if it does not run; and the numbers of
    the fastest ones.

    Raises:
        RuntimeError: the first does not run, or results of another are not the first's.
    """
    case, kind = CASES[found[0].case], found[0].kind
    call = call_of(case, kind)
    graphs: dict[int, Captured] = {}
    expected: Sequence[Tensor] = ()
    for i, each in enumerate(found):
        try:
            with each.chosen():
                graph = Captured(call)
        except RuntimeError as error:
            if i == 0:
                raise
            print(f"{each}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        graph.graph.replay()
        results, graph.results = [x.clone() for x in graph.results], []
        expected = expected or results
        if differ(results, expected):
            raise RuntimeError(f"{each} computes something else")
        graphs[i] = graph
    samples = in_turn(graphs, ROUNDS)
    best = sorted(graphs, key=lambda i: statistics.median(samples[i]))[:FINALISTS]
    samples |= in_turn({i: graphs[i] for i in {0, *best}}, FINAL_ROUNDS)
    more = 0.0 if kind == FORWARD else kernel_us(call, kind) - statistics.median(samples[0])
    every = [[more + sample for sample in samples.get(i, [])] for i in range(len(found))]
    return every, best


def in_turn(graphs: Mapping[int, Captured], rounds: int) -> dict[int, list[float]]:
    """Samples of each graph, one a round; every other round is in reverse order."""
    samples: dict[int, list[float]] = {i: [] for i in graphs}
    order, start = list(graphs), time.time()
    for done in range(rounds):
        if 3 * done >= rounds and time.time() - start > SECONDS:
            break
        for i in order:
            samples[i].append(graphs[i].sample())
        order.reverse()
    return samples


COLUMNS = (
    "case", "kernel", "rank", "q_block", "kv_block", "num_warps", "num_stages", "split_axis",
    "resident_programs", "estimate_cycles", "time_us", "spread_us", "usual", "device", "versions",
    "commit", "date",
)  # fmt: skip


def rows(found: Sequence[Candidate], samples: Sequence[Sequence[float]]) -> Iterator[list[Any]]:
    """The file's rows of a case's kernel; a rank counts from the lowest estimate."""
    ranks = sorted(range(len(found)), key=lambda i: found[i].estimate)
    for i, (each, own) in enumerate(zip(found, samples)):
        if not own:
            continue
        low, median, high = statistics.quantiles(own, n=4, method="inclusive")
        tiles = each.tiles
        yield [
            each.case, each.kind, ranks.index(i), by(tiles.q_block), by(tiles.kv_block),
            tiles.num_warps, tiles.num_stages, tiles.split_axis, tiles.resident_programs,
            round(each.estimate), f"{median:.2f}", f"{high - low:.2f}", int(i == 0),
            *about(torch.device("cuda")).values(),
        ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, print a line for each kernel, and write each kernel's rows when they are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(GROUPS["cuda"]), help="names of cases.py")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--within", type=float, default=0.1, help="how far above the lowest")
    parser.add_argument("--most", type=int, default=32, help="how many of a kernel")
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args(arguments)
    names, kinds = args.cases.split(","), args.kinds.split(",")
    for given, known in ((names, CASES), (kinds, KINDS)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        parser.error("there is no Hopper GPU, so there is nothing to measure")
    workers = max(1, (os.cpu_count() or 1) - 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return 1 - search(pool, [(CASES[name], kind) for name in names for kind in kinds], args)


def search(pool: Executor, kernels: Sequence[tuple[Case, str]], args: Any) -> bool:
    """What :func:`main` does with its arguments, ``pool`` compiles. Whether all were searched."""
    is_whole = True
    found = [candidates(case, kind, args.within, args.most) for case, kind in kernels]
    jobs: list[list[Future[None]]] = [[pool.submit(each.compile) for each in own] for own in found]
    with contextlib.ExitStack() as stack:
        writer = None
        if args.out:
            file = stack.enter_context(open(args.out, "w", newline="", encoding="utf-8"))
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
        print(
            f"{'case':14}{'kernel':9}{'tiles':>6}{'taken us':>11}{'best us':>11}{'ratio':>7}  best"
        )
        for own, compiled in zip(found, jobs):
            for job in compiled:
                job.exception()  # what can not be compiled raises again where it is captured
            try:
                samples, fastest = times(own)
            except RuntimeError as error:
                print(f"{own[0].case}, {own[0].kind}: {error}", file=sys.stderr)
                is_whole = False
                continue
            torch.cuda.empty_cache()
            if writer is not None:
                writer.writerows(rows(own, samples))
                file.flush()
            medians = {i: statistics.median(samples[i]) for i in {0, *fastest}}
            best = min(medians, key=medians.__getitem__)
            tiles = own[best].tiles
            print(
                f"{own[0].case:14}{own[0].kind:9}{len(own):6}{medians[0]:11.1f}"
                f"{medians[best]:11.1f}{medians[0] / medians[best]:7.3f}  {by(tiles.q_block)}, "
                f"{by(tiles.kv_block)}, {tiles[2:]}",
                flush=True,
            )
    return is_whole


if __name__ == "__main__":
    sys.exit(main())
