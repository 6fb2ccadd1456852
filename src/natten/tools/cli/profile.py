"""Time neighborhood attention beside dense attention of the same queries and keys.

It measures the default GPU, or the CPU where there is no GPU. The table shows the median time of a
call from Python ("eager") and of its kernels alone in a CUDA graph ("graph"), the rate of needed
products, the speed-up over the fastest dense attention, and how close the time is to the ideal,
which is dense time times the fraction of query-key pairs that are needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ... import backends
from ...errors import ArgumentError
from ..layouts import by
from .options import (
    add_layer_arguments,
    not_negative,
    output,
    positive,
    window_of,
    write,
)
from .tables import duration, print_table, progress

if TYPE_CHECKING:
    from ..profiler import Problem, Report

EPILOG = """examples:
  a 2-D layer of NAT, forward:
    natten profile -i 56 56 -w 7 7 -b 4 -n 2 -d 32
  forward and backward of a causal 1-D window on the CPU, with each time a line of a CSV file:
    natten profile -i 2048 -w 256 -c true --backprop --device cpu --csv times.csv
  HunyuanVideo with the stride that needs no masks, on a GPU:
    natten profile -i 30 48 80 -w 18 24 24 -s 16 8 8 -n 24 -d 128 --dtype bf16
  a frame of a video, causal in time, with the three frames before it in a cache of keys:
    natten profile -i 4 32 32 -w 4 7 7 -c true 0 0 --query-offset 3 0 0
  features that are upsampled, with queries eight times as fine as keys:
    natten profile -i 28 28 -w 9 --queries-per-key 8 -n 4 -d 32 --dim-value 384
  list the tiles that the GPU kernels could use, without a GPU:
    natten profile -i 256 256 -w 80 80 -d 128 --dtype bf16 --backend triton --dry-run
  try the best ten of them and use the fastest from now on, on a GPU:
    natten profile -i 256 256 -w 80 80 -n 24 -d 128 --dtype bf16 --optimize
  dense attention alone, by cuDNN, on a GPU:
    natten profile -i 4096 -d 128 --dtype bf16 --backend cudnn

Tuned tiles are kept in $NATTEN_CACHE, else $XDG_CACHE_HOME/natten, else where the system keeps
caches; natten env says where that is.
"""
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
SHOWN_KERNELS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``natten profile``, named as in NATTEN's profiler."""
    parser.epilog = EPILOG
    add_layer_arguments(parser, head_dim=64)
    problem = parser.add_argument_group("problem")
    problem.add_argument(
        "--heads-kv", type=positive, metavar="N", help="heads of key and value; default: as --heads"
    )
    problem.add_argument(
        "--dim-value", type=positive, metavar="N", help="head dim of the value; default: as --dim"
    )
    problem.add_argument(
        "--add-kv", type=not_negative, default=0, metavar="N",
        help="additional keys and values that every query attends; default: 0",
    )  # fmt: skip
    problem.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    problem.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU"
    )
    problem.add_argument("--backprop", action="store_true", help="also time forward and backward")

    how = parser.add_argument_group("how it is computed")
    how.add_argument(
        "--backend",
        help="hopper, triton, sdpa, tiled, reference; one of NATTEN's (cutlass-fna, hopper-fna, "
        "blackwell-fna, flex-fna), with which natten chooses; or dense attention alone on a GPU: "
        "cudnn, fav2, xformers",
    )
    how.add_argument("--fmha-backend", metavar="NAME", help="accepted; has no effect here")
    for prefix, kernel in (("", "forward"), ("backward-", "backward")):
        for tile in ("q-tile", "kv-tile"):
            how.add_argument(
                f"--{prefix}{tile}", nargs="+", type=positive, metavar="N",
                help=f"tile of the {kernel} kernels, one size per axis, as --dry-run lists them",
            )  # fmt: skip
    how.add_argument("--schedule", choices=("non", "coop", "pp"), help="accepted; has no effect")
    how.add_argument("--persistent", action="store_true", help="accepted; has no effect")
    how.add_argument("--compile", action="store_true", help="time ours under torch.compile")

    what = parser.add_argument_group("what is done")
    what.add_argument(
        "--warmup-steps", type=not_negative, metavar="N",
        help="calls before those that count; default: 10 on a GPU, 2 on a CPU",
    )  # fmt: skip
    what.add_argument("--no-dense", action="store_true", help="do not time dense attention")
    what.add_argument("--dry-run", action="store_true", help="list tiles and exit")
    what.add_argument(
        "--max-configs", type=not_negative, default=10, metavar="N",
        help="tiles to list, or to try, of each kernel; 0 means all; default: 10",
    )  # fmt: skip
    what.add_argument(
        "--optimize", action="store_true",
        help="try tiles on a GPU, remember the fastest, and profile with them",
    )  # fmt: skip
    what.add_argument(
        "--optimize-warmup-steps", type=not_negative, default=5, metavar="N",
        help="calls of each tile before those that count; default: 5",
    )  # fmt: skip
    what.add_argument(
        "--json", nargs="?", const="-", type=output, metavar="FILE",
        help="write everything as JSON to a file, or instead of the tables",
    )  # fmt: skip
    what.add_argument(
        "--csv", type=output, metavar="FILE",
        help="append one line per time to a file, or write them instead of the tables to -",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Profile the problem, list its tiles or tune them, as the module says."""
    from .. import profiler
    from ..profiler.report import check_csv
    from ..profiler.tune import Forced, forced_tiles, kernels

    problem = problem_of(args)
    for tile in ("q_tile", "kv_tile", "backward_q_tile", "backward_kv_tile"):
        sizes = getattr(args, tile)
        if sizes is not None and len(sizes) != len(problem.shape):
            raise ArgumentError(
                f"`--{tile.replace('_', '-')}` must have one size per axis of `--input-size` "
                f"({len(problem.shape)}), got {len(sizes)}."
            )
    if args.fmha_backend is not None:
        backends.check_name(args.fmha_backend)
    if args.dry_run:
        return _dry_run(args, problem)
    if args.json == args.csv == "-":
        raise ArgumentError("`--json` and `--csv` can not both be -, standard output.")
    if args.csv not in (None, "-"):
        check_csv(Path(args.csv))
    gradient = None
    if args.backend in profiler.DENSE:
        backend = args.backend
        if args.optimize:
            raise ArgumentError(f"`--optimize` needs a backend of natten, not {backend}.")
    else:
        backend = profiler.choose_backend(problem, args.backend)
        if args.backprop:
            gradient = profiler.choose_backend(problem, args.backend, "gradient")
    found = kernels(backend, gradient)
    on_gpu = problem.device.type == "cuda"
    warmup = args.warmup_steps if args.warmup_steps is not None else (10 if on_gpu else 2)
    forward = Forced(args.q_tile, args.kv_tile)
    backward = Forced(args.backward_q_tile, args.backward_kv_tile)
    notes = []
    ignored = {"--fmha-backend": args.fmha_backend, "--schedule": args.schedule}
    ignored |= {"--persistent": args.persistent}
    if named := [name for name, value in ignored.items() if value]:
        notes.append(f"Accepted, without effect here: {', '.join(named)}.")
    if not on_gpu:
        notes.append("No GPU is used: this is the CPU.")
    if args.backend in backends.HINTS:
        notes.append(f"{args.backend} is a hint here: backend {backend} runs.")
    if any(each is not None for each in (*forward, *backward)) and not found:
        notes.append(f"Tile sizes have no effect on backend {backend}: it chooses its own.")
    if args.optimize:
        _optimize(args, problem, backend, found)
    steps = profiler.count_steps(problem, backend, args.backprop, not args.no_dense)
    with forced_tiles(problem, found, forward, backward), progress(steps) as step:
        report = profiler.profile(
            problem,
            backend=backend,
            backward=args.backprop,
            dense=not args.no_dense,
            compiled=args.compile,
            warmup=warmup,
            step=step,
        )
    report.notes = notes + report.notes
    if args.json is not None:
        write(args.json, json.dumps(report.as_dict(), indent=2))
    if args.csv == "-":
        report.write_csv(sys.stdout)
        for note in report.notes:
            print(note, file=sys.stderr)
    elif args.csv is not None:
        report.append_csv(Path(args.csv))
    if "-" not in (args.json, args.csv):
        print_report(report)
    return 0


def problem_of(args: argparse.Namespace) -> Problem:
    """The problem that the arguments describe."""
    from ..profiler import Problem

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("`--device` cuda: PyTorch sees no GPU here.")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
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
        dtype=DTYPES[args.dtype or ("bf16" if on_gpu else "fp32")],
        device=device,
        query_shape=queries,
    )


def print_report(report: Report) -> None:
    """Print the report as tables."""
    from ..profiler.machine import device_name, versions

    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(device_name(report.problem.device))
    print(report.problem)
    # CPUs are a thousand times slower than GPUs.
    unit, scale = ("TFLOP/s", 1) if max(r.tflops for r in report.rows) >= 1 else ("GFLOP/s", 1000)
    rows = [
        (
            row.attention,
            row.pass_name,
            row.kind,
            duration(row.timing.median_us),
            duration(row.timing.spread_us),
            f"{scale * row.tflops:.3g}",
            f"{row.gbytes:.3g}",
            "" if row.speedup is None else f"{row.speedup:.2f}x",
            "" if row.efficiency is None else f"{row.efficiency:.0%}",
        )
        for row in report.rows
    ]
    header = (
        "attention", "pass", "time", "median", "spread", unit, "GB/s", "vs dense", "of ideal",
    )  # fmt: skip
    print_table("", header, rows, emphasized=0)
    print(
        f"\nNeeded: {report.kept:.2%} of the query-key pairs, so at most "
        f"{1 / report.kept:.1f}x by FLOPs."
    )
    if report.computed_over_needed:
        ratios = (f"{kind} {ratio:.2f}" for kind, ratio in report.computed_over_needed.items())
        print(f"Computed over needed pairs: {', '.join(ratios)}.")
    for note in report.notes:
        print(note)
    for pass_name, kernels in report.kernels.items():
        _print_kernels(report, pass_name, kernels)


def _print_kernels(report: Report, pass_name: str, kernels: list[Any]) -> None:
    total = sum(kernel.time_us for kernel in kernels)
    if total == 0:
        return
    shown = kernels[:SHOWN_KERNELS]
    rows = [
        (k.name[:60], str(k.calls), duration(k.time_us), f"{k.time_us / total:.0%}") for k in shown
    ]
    rest = kernels[SHOWN_KERNELS:]
    if rest:
        time_us = sum(kernel.time_us for kernel in rest)
        calls = sum(kernel.calls for kernel in rest)
        rows.append(
            (f"{len(rest)} others", str(calls), duration(time_us), f"{time_us / total:.0%}")
        )
    what = "kernels" if report.problem.device.type == "cuda" else "operators"
    ours = report.rows[0].attention if report.rows else "natten"
    title = f"The {what} of one call of {ours}, {pass_name}, by PyTorch's profiler:"
    print_table(title, (what[:-1], "calls", "time", "share"), rows)


def _dry_run(args: argparse.Namespace, problem: Problem) -> int:
    from ..profiler import choose_backend
    from ..profiler.tune import kernels, tile_chooser, tiled_axes

    asked = backends.named(args.backend)
    backend = asked.name if asked else choose_backend(problem, args.backend)
    # Whatever this machine lacks: nothing runs.
    if asked is not None and (reason := asked.lacks(problem.question("attention"))) is not None:
        raise ArgumentError(f"`--backend` {backend}: it {reason}.")
    tiles = tile_chooser(backend)
    print(problem)
    if tiles is None and backend == "tiled":
        axes = [
            (str(number), str(length), str(axis.tiles), f"{axis.products:,}")
            for number, (length, axis) in enumerate(zip(problem.queries, tiled_axes(problem)))
        ]
        title = "Backend tiled chooses its tiles by cost; there is no choice:"
        print_table(title, ("axis", "queries", "tiles", "pairs computed"), axes)
        return 0
    if tiles is None:
        print(f"\nBackend {backend} has no tiles.")
        return 0
    gradient = None
    if args.backprop and problem.device.type == "cuda":
        gradient = choose_backend(problem, args.backend, "gradient")
    elif args.backprop:  # this backend, or the next one that can
        question = problem.question("gradient")
        names = [each.name for each in backends.BACKENDS if each.lacks(question) is None]
        gradient = backend if backend in names else names[0]
    if problem.device.type != "cuda":
        print("\nNo GPU is used: what would run on one is listed.")
    for name, kind in kernels(backend, gradient):
        _print_tiles(problem, name, kind, args.max_configs)
    return 0


def _print_tiles(problem: Problem, backend: str, kind: str, most: int) -> None:
    """Print the tiles that a kernel can use; the columns are the fields of the tiles."""
    from ..profiler.tune import arguments, tile_chooser, windows

    tiles: Any = tile_chooser(backend)
    found = tiles.candidates(kind, *arguments(problem, backend))
    chosen = tiles.choose(kind, *arguments(problem, backend))
    rank, layouts = len(problem.shape), windows(problem, backend)
    shown = found[: most or None]
    if chosen not in shown:  # tuned
        shown = [chosen, *shown]
    # What only another backend's kernels have is the same in all tiles.
    others = [
        name
        for name in chosen._fields[2:]
        if name.startswith("num_") or len({getattr(each, name) for each in found}) > 1
    ]
    rows = [
        (
            f"{by(each.q_block[-rank:])}{' *' if each == chosen else ''}",
            by(each.kv_block[-rank:]),
            *(_cell(name, getattr(each, name), rank) for name in others),
            f"{tiles.computed_pairs(kind, *layouts, each) / problem.window_pairs:.2f}",
        )
        for each in shown
    ]
    header = (
        "queries",
        "keys",
        *(name.removeprefix("num_").replace("_", " ") for name in others),
        "computed/needed",
    )
    title = f"Backend {backend}, kernel {kind}: {len(shown)} of {len(found)} tiles, "
    print_table(title + "best estimate first, * is used:", header, rows)


def _cell(field: str, value: int, rank: int) -> str:
    """A field of tiles as text; tiles have three axes, and the last ones are the problem's."""
    return str(value - (3 - rank) if field == "split_axis" else value)


def _optimize(
    args: argparse.Namespace, problem: Problem, backend: str, found: Sequence[tuple[str, str]]
) -> None:
    from ..profiler import natten_call
    from ..profiler.measure import graph_time
    from ..profiler.tune import FORWARD_KIND, arguments, optimize, tile_chooser

    if not found:
        raise ArgumentError(
            f"`--optimize`: backend {backend} chooses its tiles by cost for each problem and has "
            "nothing to tune; the GPU backends have."
        )
    forward = natten_call(problem, backend, backward=False)
    both = natten_call(problem, backend, backward=True) if args.backprop else forward

    def measure(kind: str) -> float:
        call = forward if kind == FORWARD_KIND else both
        return graph_time(call, problem.device, args.optimize_warmup_steps).median_us

    steps = 0
    for name, kind in found:
        tiles: Any = tile_chooser(name)
        count = len(tiles.candidates(kind, *arguments(problem, name)))
        steps += min(count, args.max_configs or count)
    with progress(steps) as step:
        trials, paths = optimize(problem, found, measure, most=args.max_configs, step=step)
    out = sys.stderr if "-" in (args.json, args.csv) else sys.stdout
    for _, kind in found:
        of_kind = [trial for trial in trials if trial.kind == kind]
        best = min(of_kind, key=lambda trial: trial.time_us)
        pass_name = "forward" if kind == FORWARD_KIND else "forward+backward"
        print(
            f"{kind}: {len(of_kind)} tiles tried; {duration(of_kind[0].time_us)} {pass_name} with "
            f"the first by estimate, {duration(best.time_us)} with the fastest, queries "
            f"{best.tiles.q_block}, keys {best.tiles.kv_block}",
            file=out,
        )
    for path in paths:
        print(f"remembered in {path}", file=out)
