"""Time the problems that users have beside the least time that each could take.

    python benchmarks/spectrum.py --device cuda --out benchmarks/results/spectrum-h200.csv
    python benchmarks/spectrum.py --device cuda --random 40 --seed 1 --dense-ms 0 --out random.csv
    python benchmarks/spectrum.py --device cuda --cases nat,d20 --out some.csv
    python benchmarks/spectrum.py --device cuda --cases uneven --dense-ms 0 --out uneven.csv
    python benchmarks/spectrum.py --device cpu --cases nat,mri --small --out small.csv

The problems are ``SPECTRUM`` of ``cases.py``, or are drawn at random from ranges that people use:
number 3 of seed 1 is always the same problem, called ``random-1-3``. Kernels are compiled first, in
many processes at once. Then each problem is timed, forward and forward+backward, beside dense
attention by the first of PyTorch's kernels that runs it, cuDNN's before others. Products of float32
may be rounded to TF32, as the floor assumes, but with ``--exact``. Each row is written when it is
measured. ``report.py`` makes the table and the picture.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import BF16, FP16, FP32, SPECTRUM, UNEVEN, Case
from records import Record, write
from run import about

import natten
from natten import backends
from natten.functional import neighborhood_attention_generic
from natten.profiler import dense_call, measure
from natten.profiler.dense import DENSE, PLAIN_DENSE, call_with_gradients
from natten.profiler.machine import free_memory
from natten.profiler.report import BOTH, FORWARD
from natten.profiler.tune import computed_over_needed

# What kernels of an H200 reach at best, a second: bytes of DRAM, operations of products in half
# precision and in TF32, and exponentials, 16 a clock on 132 multiprocessors at 1.75 GHz.
BYTES, HALF, SINGLE, EXPONENTIALS = 4.2e12, 790e12, 400e12, 132 * 16 * 1.75e9
# A deterministic backward without atomic additions makes two passes, of dQ and of dK and dV. They
# compute seven products where the forward has two, and move about 3.5 times its bytes: each reads
# query, key, value, output's gradient and numbers per query, and together they store three tensors.
# The weights are computed in both.
GRADIENT, GRADIENT_EXPONENTIALS = 3.5, 2

# From here on a call is timed as it is, three times or once; a graph would say the same.
LONG_MS, VERY_LONG_MS = 20.0, 150.0
DENSE_MS = 1500  # dense attention that is estimated to take longer is left out
DENSE_RATE = {BF16: 450e12, FP16: 450e12, FP32: 25e12}  # of its products, to estimate that


def floor_us(case: Case, pass_: str = FORWARD) -> float:
    """The least time of a pass on an H200, in microseconds.

    It is the longest of three: to move query, key, value and output once, to compute the products
    of the pairs that are needed, and their exponentials. That assumes perfect overlap of the three,
    and no pair that is computed in vain.

    Args:
        case: the problem.
        pass_: "forward", "backward", or "forward+backward", which is the sum of both.
    """
    problem = case.problem("cpu")
    pairs = problem.needed_pairs * problem.batch * problem.heads
    moved = problem.bytes() / BYTES
    products = problem.flops() / (SINGLE if case.dtype is FP32 else HALF)
    exponentials = pairs / EXPONENTIALS
    forward = max(moved, products, exponentials)
    backward = max(GRADIENT * moved, GRADIENT * products, GRADIENT_EXPONENTIALS * exponentials)
    return 1e6 * {FORWARD: forward, "backward": backward, BOTH: forward + backward}[pass_]


def random_case(seed: int, number: int) -> Case:
    """A problem at random, always the same of a seed and a number."""
    draw = random.Random(f"{seed}-{number}")

    def near(low: float, high: float) -> int:  # all orders of magnitude are equally likely
        return round(math.exp(draw.uniform(math.log(low), math.log(high))))

    rank = draw.choices((1, 2, 3), (1, 3, 3))[0]
    ranges = {1: [(512, 65536)], 2: [(14, 256)] * 2, 3: [(4, 40), (16, 96), (16, 96)]}[rank]
    shape = [near(*each) for each in ranges]
    if rank == 2 and draw.random() < 0.5:
        shape[1] = shape[0]
    most = {1: 2048, 2: 48, 3: 20}[rank]
    window = [min(length, near(3, most)) for length in shape]
    if rank > 1 and draw.random() < 0.6:  # windows of one size along height and width
        window[-2:] = [min(window[-2:])] * 2
    stride, dilation = [1] * rank, [1] * rank
    kind = draw.random()
    if kind < 0.2:
        stride = [draw.choice([s for s in (1, 2, 4, 8, 16, k) if s <= k]) for k in window]
    elif kind < 0.4:
        dilation = [draw.randint(1, length // k) for length, k in zip(shape, window)]
        dilation = [min(d, 16) for d in dilation]
    causal = [draw.random() < (0.5, 0.0, 0.2)[rank - 1], *[False] * (rank - 1)]
    dim = draw.choices(
        (16, 24, 32, 40, 48, 64, 72, 80, 96, 128, 256), (2, 1, 5, 1, 2, 8, 1, 2, 2, 8, 1)
    )[0]
    heads = draw.choice((1, 2, 4, 6, 8, 12, 16, 24, 32))
    kv_heads = heads // draw.choice((2, 4)) if heads % 4 == 0 and draw.random() < 0.15 else None
    dtype = draw.choices((BF16, FP16, FP32), (16, 3, 1))[0]
    bias = draw.random() < 0.12
    # As many batch entries as make 10^6 to 10^8 numbers of a tensor.
    batch = max(1, near(1e6, 1e8) // (math.prod(shape) * heads * dim))
    return Case(
        f"random-{seed}-{number}", tuple(shape), batch, heads, dim, tuple(window), tuple(stride),
        tuple(dilation), tuple(causal), dtype, kv_heads=kv_heads, bias=bias,
        num_additional=0 if bias or draw.random() >= 0.1 else draw.choice((1, 77, 256, 512)),
    )  # fmt: skip


def case_of(name: str) -> Case | None:
    """The problem of that name, if there is one."""
    kind, *numbers = name.split("-")
    if kind == "random" and len(numbers) == 2 and all(each.isdecimal() for each in numbers):
        return random_case(int(numbers[0]), int(numbers[1]))
    return (SPECTRUM | UNEVEN).get(name)


def known(name: str) -> Case:
    """The problem of that name, which there is."""
    case = case_of(name)
    if case is None:
        raise ValueError(f"there is no problem {name!r}")
    return case


def small(case: Case) -> Case:
    """The same kind of problem, of few tokens."""
    rule = case.problem("cpu").rule
    shape = (
        min(n, max(k * d + d, 8)) for n, k, d in zip(case.shape, rule.kernel_size, rule.dilation)
    )
    groups = case.heads // (case.kv_heads or case.heads)
    return replace(
        case, shape=tuple(shape), batch=1, heads=groups, kv_heads=1 if case.kv_heads else None,
        num_additional=min(case.num_additional, 4),
    )  # fmt: skip


def natten_call(case: Case, device: str, backward: bool) -> Callable[[], Any]:
    """A call of our operator on random tensors; with ``backward`` it also computes gradients."""
    return call_with_gradients(
        neighborhood_attention_generic, case.inputs(device, backward), window_of(case), backward
    )


def window_of(case: Case) -> dict[str, Any]:
    """The arguments that say who attends whom."""
    rule = case.problem("cpu").rule
    names = "kernel_size", "stride", "dilation", "is_causal"
    return {name: getattr(rule, name) for name in names}


def times(call: Callable[[], Any], device: torch.device, eager: bool) -> dict[str, measure.Timing]:
    """Median and spread of a call: of its kernels, and if asked for of a call from Python."""
    if device.type != "cuda":
        return {"eager": measure.eager_time(call, device, 1, seconds=0.1)}
    call()
    samples = _events(call, 1)
    if samples[0] >= 1e3 * LONG_MS:
        samples += _events(call, 2 * (samples[0] < 1e3 * VERY_LONG_MS))
        timing = measure.Timing.of(samples)
        return {"graph": timing, "eager": timing} if eager else {"graph": timing}
    found = {"graph": _graph_time(call)}
    if eager:
        found["eager"] = measure.eager_time(call, device, 1, seconds=0.1)
    return found


def _graph_time(call: Callable[[], Any]) -> measure.Timing:
    """As :func:`measure.graph_time`, of graphs that take 5 ms and not 20."""
    from triton.testing import do_bench_cudagraph

    samples = do_bench_cudagraph(call, rep=5, return_mode="all")
    return measure.Timing.of([1e3 * time for time in samples])


def _events(call: Callable[[], Any], count: int) -> list[float]:
    """Microseconds of each of some calls, by CUDA's events."""
    found = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(1e3 * start.elapsed_time(end))
    return found


def dense_times(
    case: Case, device: str, backward: bool, most_ms: float, eager: bool
) -> tuple[str, dict[str, measure.Timing]]:
    """The first of PyTorch's dense kernels that runs, and its times.

    Args:
        most_ms: estimated time of a call from which on it is left out.

    Raises:
        RuntimeError: none runs, or it would take too long; the message says which.
    """
    problem = case.problem(device)
    rate = DENSE_RATE[case.dtype]
    estimate = 1e3 * problem.flops(problem.all_pairs, backward) / rate
    if estimate > most_ms:
        raise RuntimeError(f"dense attention is left out: it would take about {estimate:,.0f} ms")
    for name in DENSE if device == "cuda" else [PLAIN_DENSE]:
        try:
            return name, times(dense_call(problem, name, backward), problem.device, eager)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
    raise RuntimeError(f"dense attention does not run: {reason}")


def measure_case(
    case: Case, device: str, passes: Sequence[str], dense_ms: float, eager: bool
) -> Iterator[Record]:
    """Measure a problem, with one record per time.

    Args:
        case, device, passes: what to measure.
        dense_ms: milliseconds that a call of dense attention may take; none is made at 0.
        eager: whether to time calls from Python, too.
    """
    problem = case.problem(device)
    needed, free = problem.bytes(backward=BOTH in passes), free_memory(problem.device)
    if free is not None and needed > free:
        raise RuntimeError(f"needs {needed / 1e9:.0f} GB, of which {free / 1e9:.0f} are free")
    where = about(problem.device)
    forward, gradient = (
        backends.choose("", problem.question(operation)._replace(bias=case.bias)).name
        for operation in ("attention", "gradient")
    )
    for pass_ in passes:
        backward = pass_ == BOTH
        ours = f"natten {forward}" + (f"+{gradient}" if backward and gradient != forward else "")
        waste = ""
        if not case.bias:  # tiles with a bias are others
            computed = computed_over_needed(problem, forward, gradient if backward else None)
            waste = " ".join(f"{kernel}={ratio:.3f}" for kernel, ratio in computed.items())
        found = {ours: times(natten_call(case, device, backward), problem.device, eager)}
        if dense_ms:
            try:
                name, timed = dense_times(case, device, backward, dense_ms, eager)
                found[f"dense {name}"] = timed
            except RuntimeError as error:
                print(f"{case.name}, {pass_}: {error}", file=sys.stderr)
        for who, timed in found.items():
            for kind, timing in timed.items():
                numbers = f"{timing.median_us:.1f}", f"{timing.spread_us:.1f}"
                extra = waste if who == ours else ""
                yield Record(case.name, who, pass_, kind, *numbers, extra, **where)


# --- compiling ---


def compile_cases(cases: Sequence[Case], backward: bool) -> None:
    """Compile the kernels of problems; they are kept in Triton's cache on disk."""
    calls = ({**case.inputs("meta", backward), **window_of(case)} for case in cases)
    natten.compile_ahead(calls)


def compile_in_processes(names: Sequence[str], backward: bool, exact: bool) -> None:
    """As :func:`compile_cases`, in as many processes as there are processors.

    Kernels of Gluon take much of Python's time, in which a process has one thread.
    """
    count = min(len(names), os.cpu_count() or 1)
    command = [sys.executable, __file__, "--device", "cuda", "--compile-only"]
    command += ["--passes", BOTH if backward else FORWARD, *["--exact"] * exact]
    running = [
        subprocess.Popen([*command, "--cases", ",".join(names[i::count])]) for i in range(count)
    ]
    if any([process.wait() for process in running]):
        print("some kernels could not be compiled ahead", file=sys.stderr)


# --- the command ---


def shares(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Of each pass, "forward" and "backward", the floor over the time of our kernels, by problem.

    The backward is what forward and backward together take beyond the forward.
    """
    found: dict[str, dict[str, float]] = {FORWARD: {}, "backward": {}}
    both = {}
    for each in records:
        if each.time != "graph" or not each.backend.startswith("natten"):
            continue
        if each.pass_ == FORWARD:
            found[FORWARD][each.case] = float(each.median_us)
        else:
            both[each.case] = float(each.median_us)
    for name, taken in both.items():
        if name in found[FORWARD]:
            found["backward"][name] = taken - found[FORWARD][name]
    return {
        pass_: {name: floor_us(known(name), pass_) / time for name, time in times.items()}
        for pass_, times in found.items()
    }


def summary(records: Sequence[Record]) -> str:
    """The geometric means of :func:`shares`, in words."""
    parts = []
    for pass_, found in shares(records).items():
        if found:
            mean = statistics.geometric_mean(found.values())
            parts.append(f"{pass_} {mean:.2f} ({len(found)} problems)")
    return f"floor / natten, geometric mean: {', '.join(parts)}" if parts else ""


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen problems, and write each to the file when it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--cases", help='comma-separated names, or "uneven"; default: the spectrum')
    parser.add_argument("--random", type=int, metavar="N", help="N problems at random instead")
    parser.add_argument("--seed", type=int, default=0, help="of these")
    parser.add_argument("--passes", default=f"{FORWARD},{BOTH}", help="comma-separated")
    parser.add_argument(
        "--dense-ms", type=int, default=DENSE_MS, metavar="MS",
        help="leave out dense attention that takes longer; 0: all of it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--exact", action="store_true", help="no products in TF32")
    parser.add_argument("--no-eager", action="store_true", help="time kernels only")
    parser.add_argument("--small", action="store_true", help="few tokens, to try this program")
    parser.add_argument("--compile-only", action="store_true", help="compile, measure nothing")
    parser.add_argument("--no-compile", action="store_true", help="kernels are on disk already")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--out", type=Path, help="the CSV file to write")
    args = parser.parse_args(arguments)
    if args.random is not None and (args.random < 1 or args.cases):
        parser.error("--random is a number of at least 1, and excludes --cases")
    if args.random:
        names = [f"random-{args.seed}-{number}" for number in range(args.random)]
    else:
        names = [*SPECTRUM] if args.cases is None else args.cases.split(",")
        names = [each for name in names for each in (UNEVEN if name == "uneven" else [name])]
    found = {name: case_of(name) for name in names}
    passes = args.passes.split(",")
    if unknown := [name for name, case in found.items() if case is None]:
        parser.error(f"unknown {unknown}; cases: {', '.join([*SPECTRUM, *UNEVEN])}")
    if unknown := [each for each in passes if each not in (FORWARD, BOTH)]:
        parser.error(f"unknown {unknown}; passes: {FORWARD}, {BOTH}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.dense_ms < 0:
        parser.error(f"--dense-ms must be at least 0, got {args.dense_ms}")
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = not args.exact
    cases = [small(case) if args.small else case for case in found.values() if case is not None]
    if args.compile_only:
        compile_cases(cases, BOTH in passes)
        return 0
    if args.out is None:
        parser.error("--out is needed, but with --compile-only")
    try:
        write(args.out, [])
    except OSError as error:
        parser.error(f"--out: {error}")
    if args.device == "cuda" and not args.small and not args.no_compile:
        start = time.time()
        compile_in_processes(names, BOTH in passes, args.exact)
        print(f"compiled in {time.time() - start:.0f} s", flush=True)
    records, failed = [], []
    for case in cases:
        try:
            for record in measure_case(case, args.device, passes, args.dense_ms, not args.no_eager):
                write(args.out, [record], new=False)
                records.append(record)
                text = f"{record.median_us:>12} us"
                if args.device == "cuda":
                    share = floor_us(case, record.pass_) / float(record.median_us)
                    text += f"   floor / time {share:.2f}"
                print(f"{case.name:20}{record.backend:18}{record.pass_:18}{record.time:7}{text}")
                sys.stdout.flush()
        except (RuntimeError, ValueError) as error:  # go on with the other cases
            failed.append(case.name)
            print(f"{case.name}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(summary(records))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
