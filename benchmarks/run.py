"""Time neighborhood attention beside dense attention over all tokens, in one run.

    python benchmarks/run.py --device cpu                  # print, write benchmarks/results/cpu.csv
    python benchmarks/run.py --device cuda --out h100.csv
    python benchmarks/run.py --device cuda --cases nat,flux --passes forward --out some.csv
    python benchmarks/run.py --device cuda --cases strides --passes forward --no-dense \\
        --out benchmarks/results/strides.csv           # the simulator's order is compared with it

`python benchmarks/report.py` makes tables and charts of the results. Dense attention is cuDNN's on
a GPU. On a CPU it is PyTorch's in float32 for every case. Windows of most pairs in half precision
are also measured beside dense attention in that, which is slower there. On a CPU the calls of a
case take turns, because its speed drifts within seconds. With one thread, times are those of the
process on its processor, so that other programs cost nothing but what they take of the caches.
Only ratios within one run are meaningful.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cases import CASES, GROUPS, Case
from memory import peak_over_inputs
from records import RESULTS, Record, write

from natten import Neighborhood
from natten.profiler import Problem, choose_backend, dense_call, measure, natten_call
from natten.profiler.machine import device_name, versions
from natten.profiler.report import BOTH, FORWARD
from natten.profiler.tune import computed_over_needed

WARMUP = 2
ROUNDS, SECONDS = 15, 10.0  # of calls in turn; after so many seconds, a third of the rounds do
BLOCK_SECONDS = 0.01  # the least time of a sample, which may be several calls


def in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each call on a CPU, one sample per round; every other round is in reverse order.

    Samples of one round are taken close to each other, so their ratios hardly drift.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def sample(call: Callable[[], Any], count: int) -> float:
        start = clock()
        for _ in range(count):
            call()
        return (clock() - start) / count

    counts = {}
    for name, call in calls.items():
        for _ in range(WARMUP):
            call()
        counts[name] = 1 + int(BLOCK_SECONDS / max(sample(call, 1), 1e-6))
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, start = list(calls), clock()
    for done in range(rounds):
        if 3 * done >= rounds and clock() - start > SECONDS:
            break
        for name in order:
            found[name].append(sample(calls[name], counts[name]))
        order.reverse()
    return found


def times(call: Callable[[], Any], device: torch.device) -> dict[str, measure.Timing]:
    """Median and spread of a call, for each kind of time."""
    found = {}
    if device.type == "cuda":
        found["graph"] = measure.graph_time(call, device, WARMUP)
    found["eager"] = measure.eager_time(call, device, WARMUP, seconds=0.5)
    return found


@cache  # the cases of one layout share it
def dense_times(problem: Problem, name: str, backward: bool) -> dict[str, measure.Timing]:
    """The times of dense attention over a problem's tokens."""
    return times(dense_call(problem, name, backward), problem.device)


def dense_problems(problem: Problem) -> dict[str, Problem]:
    """Dense attention over a problem's tokens, by the names of its times in a record."""
    whole = replace(problem, rule=whole_layout(problem))
    if problem.device.type == "cuda":
        return {"dense cudnn": whole}
    found = {"dense sdpa": replace(whole, dtype=torch.float32)}
    if problem.dtype != torch.float32 and 2 * problem.needed_pairs > problem.all_pairs:
        found[same_dtype(problem.dtype)] = whole
    return found


def same_dtype(dtype: torch.dtype) -> str:
    """The name of dense attention in a dtype that is not the yardstick's."""
    return f"{str(dtype).removeprefix('torch.')} dense sdpa"


def measure_case(
    case: Case, device: str, passes: list[str], backend: str | None, dense: bool
) -> Iterator[Record]:
    """Measure a case, with one record per time."""
    problem = case.problem(device)
    forward = choose_backend(problem, backend)
    gradient = choose_backend(problem, backend, "gradient")
    for pass_ in passes:
        backward = pass_ == BOTH
        computed = computed_over_needed(problem, forward, gradient if backward else None)
        ours = f"natten {forward}"
        if backward and gradient != forward:
            ours += f"+{gradient}"
        waste = " ".join(f"{kernel}={ratio:.3f}" for kernel, ratio in computed.items())
        memory = f"{peak_over_inputs(case):.2f}" if device == "cpu" and backward else ""
        call = natten_call(problem, backend, backward)
        everything = dense_problems(problem) if dense else {}
        if device == "cpu":
            calls = {ours: call}
            for name, each in everything.items():
                calls[name] = dense_call(each, "sdpa", backward)
            found = {
                name: {"eager": measure.Timing.of([1e6 * each for each in seconds])}
                for name, seconds in in_turn(calls).items()
            }
        else:
            found = {ours: times(call, problem.device)}
            for name, each in everything.items():
                found[name] = dense_times(each, "cudnn", backward)
        for name, timings in found.items():
            extra = (waste, memory) if name == ours else ("", "")
            for kind, timing in timings.items():
                numbers = f"{timing.median_us:.1f}", f"{timing.spread_us:.1f}"
                yield Record(
                    case.name, name, pass_, kind, *numbers, *extra, **about(problem.device)
                )


def about(device: torch.device) -> dict[str, str]:
    """The fields of a record that say where and when a time was measured."""
    return {
        "device": device_name(device),
        "versions": " ".join(f"{name}={each}" for name, each in versions().items()),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def whole_layout(problem: Problem) -> Neighborhood:
    """A window of the whole layout, with which all problems of one layout are equal."""
    rank = problem.rule.rank
    return replace(
        problem.rule, kernel_size=problem.shape, stride=(1,) * rank, dilation=(1,) * rank,
        is_causal=(False,) * rank,
    )  # fmt: skip


@cache
def commit() -> str:
    """The commit that is measured; "" where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen cases, and write each to the file when it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=CASES, required=True)
    parser.add_argument(
        "--cases", metavar="NAMES",
        help="comma-separated names of cases.py, or of its groups; default: all of the table",
    )  # fmt: skip
    parser.add_argument("--passes", default=f"{FORWARD},{BOTH}", help="comma-separated")
    parser.add_argument("--backend", help="one of ours; default: our choice")
    parser.add_argument("--no-dense", action="store_true", help="time ours only")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cpu.csv on a CPU")
    args = parser.parse_args(arguments)
    known, passes = CASES[args.device], args.passes.split(",")
    asked = (args.cases or args.device).split(",")
    names = list(dict.fromkeys(name for each in asked for name in GROUPS.get(each, [each])))
    unknown = [name for name in names if name not in known]
    if unknown := unknown + [each for each in passes if each not in (FORWARD, BOTH)]:
        parser.error(f"unknown {unknown}; cases: {', '.join(known)}; passes: {FORWARD}, {BOTH}")
    if args.device == "cuda" and args.out is None:
        parser.error("--out is needed with --device cuda: GPUs differ")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    out = args.out or RESULTS / "cpu.csv"
    try:
        write(out, [])
    except OSError as error:
        parser.error(f"--out: {error}")
    failed = []
    for name in names:
        try:
            case = known[name]
            for record in measure_case(
                case, args.device, passes, args.backend, not args.no_dense
            ):  # fmt: skip
                write(out, [record], new=False)
                text = f"{record.median_us:>12} us  +-{record.spread_us}"
                print(f"{name:20}{record.backend:21}{record.pass_:18}{record.time:7}{text}")
                sys.stdout.flush()
        except (RuntimeError, ValueError) as error:  # go on with the other cases
            failed.append(name)
            print(f"{name}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
