"""What ``natten profile`` does: it measures a problem and prints the report as it grows."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from ... import backends
from ...errors import ArgumentError
from .. import profiler
from ..profiler.machine import cpu_name, device_name, versions
from ..profiler.measure import Kernel
from ..profiler.problem import Problem
from ..profiler.report import BOTH, FORWARD, Report, Row, check_csv
from ..profiler.tune import Forced, forced_tiles, kernels
from .options.profile import DTYPES
from .outputs import STDOUT, path, write
from .parser import did_you_mean, nearest
from .tables import Table, duration, print_table, progress, say, terminal_width
from .tiles import dry_run, tune
from .window import window_of

SHOWN_KERNELS = 8


def run(args: argparse.Namespace) -> int:
    """Profile the problem, list its tiles or tune them, as the options say."""
    problem = problem_of(args)
    forward, backward = _forced(args, problem)
    _check(args)
    if args.dry_run:
        return dry_run(args, problem, forward, backward, _ignored(args))
    profiler.check_memory(problem, args.backprop)
    gradient = None
    if args.backend in profiler.DENSE:
        backend = args.backend
    else:
        backend = profiler.choose_backend(problem, args.backend)
        if args.backprop:
            gradient = profiler.choose_backend(problem, args.backend, "gradient")
    found = kernels(backend, gradient)
    on_gpu = problem.device.type == "cuda"
    notes = _ignored(args)
    if not on_gpu:
        notes.append("No GPU is used: this is the CPU.")
    if args.backend in backends.HINTS:
        notes.append(f"{args.backend} is a hint here: backend {backend} runs.")
    if any(each is not None for each in (*forward, *backward)) and not found:
        notes.append(f"Tile sizes have no effect on backend {backend}: it chooses its own.")
    shows = STDOUT not in (args.json, args.csv)
    if args.optimize:
        tune(args, problem, backend, found)
    steps = profiler.count_steps(problem, backend, args.backprop, args.dense)
    times = Times(args, problem, backend) if shows else None
    with forced_tiles(problem, found, forward, backward), progress(steps) as status:

        def step(name: str) -> None:
            if times is not None:
                times.begin()
            status(name)

        def measured(row: Row) -> None:
            if times is not None:
                status.clear()
                times.add(row)

        report = profiler.profile(
            problem,
            backend=backend,
            backward=args.backprop,
            dense=args.dense,
            compiled=args.compile,
            warmup=args.warmup_steps if args.warmup_steps is not None else (10 if on_gpu else 2),
            step=step,
            measured=measured,
        )
    report.notes = notes + report.notes
    if args.dense is None and any(" is left out: " in note for note in report.notes):
        report.notes.append("--dense times it all the same.")
    if args.json is not None:
        write(args.json, json.dumps(report.as_dict(), indent=2))
    if args.csv == STDOUT:
        report.write_csv(sys.stdout)
        for note in report.notes:
            print(note, file=sys.stderr)
    elif args.csv is not None:
        report.append_csv(path(args.csv))
    if times is not None:
        times.finish()
        print_rest(report)
    return 0


def problem_of(args: argparse.Namespace) -> Problem:
    """The problem that the options describe."""
    device = _device(args.device)
    rule, queries = window_of(args)
    heads_kv = args.heads_kv or args.heads
    if args.heads % heads_kv != 0:
        raise ArgumentError(
            f"`--heads` must be a multiple of `--heads-kv`, got {args.heads} and {heads_kv}."
        )
    return Problem(
        tuple(args.input_size),
        rule,
        batch=args.batch_size,
        heads=args.heads,
        kv_heads=heads_kv,
        dim=args.dim,
        value_dim=args.dim_value or args.dim,
        num_additional=args.add_kv,
        dtype=getattr(torch, DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]),
        device=device,
        query_shape=queries,
    )


def _device(name: str | None) -> torch.device:
    """The device of that name, which must be there; without a name a GPU if there is one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name or ("cuda" if count else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= count:
        gpus = [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(count)]
        there = ", ".join(gpus) or f"no GPU, only cpu ({cpu_name()})"
        raise ArgumentError(
            f"`--device` {name} is not here: PyTorch {torch.__version__} sees {there}."
        )
    return device


def _forced(args: argparse.Namespace, problem: Problem) -> tuple[Forced, Forced]:
    """The tiles that were asked for, of the forward and of the backward kernels."""
    for tile in ("q_tile", "kv_tile", "backward_q_tile", "backward_kv_tile"):
        sizes = getattr(args, tile)
        if sizes is not None and len(sizes) != len(problem.shape):
            raise ArgumentError(
                f"`--{tile.replace('_', '-')}` must have one size per axis of `--input-size` "
                f"({len(problem.shape)}), got {len(sizes)}."
            )
    return (
        Forced(args.q_tile, args.kv_tile),
        Forced(args.backward_q_tile, args.backward_kv_tile),
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse names that nobody has, and options that contradict each other."""
    own = [each.name for each in backends.BACKENDS]
    for option, known in (
        ("backend", [*own, *backends.HINTS, *profiler.DENSE]),
        ("fmha_backend", [*own, *backends.HINTS]),
    ):
        name = getattr(args, option)
        if name is not None and name not in known:
            raise ArgumentError(
                f"`--{option.replace('_', '-')}` must be one of {', '.join(known[: len(own)])}, or "
                f"of {', '.join(sorted(known[len(own) :]))}, got {name!r}"
                f"{did_you_mean(nearest(name, known))}"
            )
    if args.json == args.csv == STDOUT:
        raise ArgumentError("`--json` and `--csv` can not both be -, standard output.")
    if args.optimize and args.backend in profiler.DENSE:
        raise ArgumentError(f"`--optimize` needs a backend of natten, not {args.backend}.")
    if args.dry_run:
        for option, why in (
            ("optimize", "measures"),
            ("csv", "writes times"),
        ):
            if getattr(args, option):
                raise ArgumentError(f"`--{option}` {why}, and `--dry-run` measures nothing.")
        if args.backend in profiler.DENSE:
            raise ArgumentError(f"`--dry-run` needs a backend of natten, not {args.backend}.")
    if args.csv not in (None, STDOUT):
        check_csv(Path(args.csv))


def _ignored(args: argparse.Namespace) -> list[str]:
    """A note of the options that are taken because NATTEN's profiler has them."""
    ignored = {"--fmha-backend": args.fmha_backend, "--schedule": args.schedule}
    ignored |= {"--persistent": args.persistent}
    named = [name for name, value in ignored.items() if value]
    return [f"Accepted, without effect here: {', '.join(named)}."] if named else []


class Times:
    """The table of times below a few lines that say what is measured.

    Args:
        args: the options.
        problem: what is measured.
        backend: what measures it.
    """

    def __init__(self, args: argparse.Namespace, problem: Problem, backend: str) -> None:
        on_gpu = problem.device.type == "cuda"
        # CPUs are a thousand times slower than GPUs.
        unit, self.scale = ("TFLOP/s", 1) if on_gpu else ("GFLOP/s", 1000)
        if args.backend in profiler.DENSE:
            names = [f"dense {backend}"]
        else:
            names = [profiler.attention_name(backend, args.compile)]
            names += [f"dense {name}" for name in profiler.dense_names(problem)]
        passes = [FORWARD, BOTH] if args.backprop else [FORWARD]
        kinds = ["graph", "eager"] if on_gpu else ["eager"]
        words = [names, passes, kinds]
        header = (
            "attention", "pass", "time", "median", "vs dense", "of ideal", "spread", unit, "GB/s",
        )  # fmt: skip
        self.problem, self.header = problem, header
        self.same = {i: each[0] for i, each in enumerate(words) if i > 0 and len(each) == 1}
        # Seven characters are a duration, and six a rate.
        self.widths = [*(max(map(len, each)) for each in words), 7, 0, 0, 7, 0, 6]
        self.table: Table | None = None

    def begin(self) -> None:
        """Print what is above the rows, once nothing speaks against measuring."""
        if self.table is None:
            say(", ".join(f"{name} {version}" for name, version in versions().items()))
            say(device_name(self.problem.device))
            say(str(self.problem))
            self.table = Table("", self.header, self.widths, self.same, keys=3)

    def add(self, row: Row) -> None:
        """Print a row."""
        assert self.table is not None
        cells = (
            row.attention,
            row.pass_name,
            row.kind,
            duration(row.timing.median_us),
            "" if row.speedup is None else f"{row.speedup:.2f}x",
            "" if row.efficiency is None else f"{row.efficiency:.0%}",
            duration(row.timing.spread_us) if len(row.timing.samples_us) > 1 else "",
            f"{self.scale * row.tflops:.3g}",
            f"{row.gbytes:.3g}",
        )
        self.table.add(cells, bold=row.attention.startswith("natten"))

    def finish(self) -> None:
        """Print what the terminal had no room for."""
        assert self.table is not None
        self.table.finish()


def print_rest(report: Report) -> None:
    """Print what follows the times: counts of pairs, notes, and the kernels."""
    print()
    say(
        f"Needed: {100 * report.kept:.3g}% of the query-key pairs, so at most "
        f"{1 / report.kept:.1f}x by FLOPs."
    )
    if report.computed_over_needed:
        ratios = (f"{kind} {ratio:.2f}" for kind, ratio in report.computed_over_needed.items())
        say(f"Computed over needed pairs: {', '.join(ratios)}.")
    for note in report.notes:
        say(note)
    for pass_name, found in report.kernels.items():
        _print_kernels(report, pass_name, found)


def _print_kernels(report: Report, pass_name: str, found: list[Kernel]) -> None:
    total = sum(kernel.time_us for kernel in found)
    if total == 0:
        return
    longest = min(60, (terminal_width() or 100) - 34)  # of a name, beside the other columns
    rows = [
        (k.name[:longest], f"{k.calls:g}", duration(k.time_us), f"{k.time_us / total:.0%}")
        for k in found[:SHOWN_KERNELS]
    ]
    rest = found[SHOWN_KERNELS:]
    if rest:
        time_us = sum(kernel.time_us for kernel in rest)
        calls = sum(kernel.calls for kernel in rest)
        rows.append(
            (f"{len(rest)} others", f"{calls:g}", duration(time_us), f"{time_us / total:.0%}")
        )
    what = "kernels" if report.problem.device.type == "cuda" else "operators"
    ours = [row.attention for row in report.rows if row.attention.startswith("natten")]
    name = next(iter(ours), report.rows[0].attention)
    recorded = report.recorded.get(pass_name, 1)
    mean = f", the mean of {recorded} calls" if recorded > 1 else ""
    title = f"The {what} of a call of {name}, {pass_name}{mean}, by PyTorch's profiler:"
    print_table(title, (what[:-1], "calls", "time", "share"), rows)
