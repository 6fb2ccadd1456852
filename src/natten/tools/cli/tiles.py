"""Tiles at the command line: ``natten profile --dry-run`` and ``--optimize``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from ... import backends
from ...errors import ArgumentError
from ..layouts import by
from ..profiler import choose_backend, natten_call
from ..profiler.measure import graph_time
from ..profiler.problem import Problem
from ..profiler.tune import (
    FORWARD_KIND,
    Forced,
    arguments,
    forced_tiles,
    kernels,
    optimize,
    tile_chooser,
    tiled_axes,
    windows,
)
from .outputs import STDOUT, write
from .tables import duration, print_table, progress


def dry_run(
    args: argparse.Namespace, problem: Problem, forward: Forced, backward: Forced, notes: list[str]
) -> int:
    """List the tiles that the kernels could use, and say which they would use.

    Args:
        args: the options.
        problem: what would be computed.
        forward, backward: tiles that were asked for.
        notes: sentences to print with the list.
    """
    asked = backends.named(args.backend)
    backend = asked.name if asked else choose_backend(problem, args.backend)
    # Whatever this machine lacks: nothing runs.
    if asked is not None and (reason := asked.lacks(problem.question("attention"))) is not None:
        raise ArgumentError(f"`--backend` {backend}: it {reason}.")
    if args.backend in backends.HINTS:
        notes = [*notes, f"{args.backend} is a hint here: backend {backend} would run."]
    gradient = None
    if args.backprop and problem.device.type == "cuda":
        gradient = choose_backend(problem, args.backend, "gradient")
    elif args.backprop:  # this backend, or the next one that can
        question = problem.question("gradient")
        names = [each.name for each in backends.BACKENDS if each.lacks(question) is None]
        gradient = backend if backend in names else names[0]
    found = kernels(backend, gradient)
    if not found and any(each is not None for each in (*forward, *backward)):
        notes = [*notes, f"Tile sizes have no effect on backend {backend}: it chooses its own."]
    if found and problem.device.type != "cuda":
        notes = [*notes, "No GPU is used: what would run on one is listed."]
    with forced_tiles(problem, found, forward, backward):
        lists = [Listed(problem, name, kind, args.max_configs) for name, kind in found]
    if args.json is not None:
        listed = {
            "problem": problem.as_dict(),
            "backend": backend,
            "kernels": [each.as_dict() for each in lists],
            "notes": notes,
        }
        write(args.json, json.dumps(listed, indent=2))
        if args.json == STDOUT:
            return 0
    print(problem)
    for note in notes:
        print(note)
    for each in lists:
        each.print()
    if not found and backend == "tiled":
        axes = [
            (str(number), str(length), str(axis.tiles), f"{axis.products:,}")
            for number, (length, axis) in enumerate(zip(problem.queries, tiled_axes(problem)))
        ]
        title = "Backend tiled chooses its tiles by cost; there is no choice:"
        print_table(title, ("axis", "queries", "tiles", "pairs computed"), axes)
    elif not found:
        print(f"\nBackend {backend} has no tiles.")
    return 0


class Listed:
    """The tiles that a kernel can use, best estimate first.

    Args:
        problem: what would be computed.
        backend, kind: the kernel.
        most: how many to list; 0 means all.
    """

    def __init__(self, problem: Problem, backend: str, kind: str, most: int) -> None:
        self.problem, self.backend, self.kind = problem, backend, kind
        tiles: Any = tile_chooser(backend)
        found = tiles.candidates(kind, *arguments(problem, backend))
        self.count = len(found)
        self.chosen = tiles.choose(kind, *arguments(problem, backend))
        self.shown = found[: most or None]
        if self.chosen not in self.shown:  # tuned, or asked for
            self.shown = [self.chosen, *self.shown]
        layouts = windows(problem, backend)
        self.computed_over_needed = [
            tiles.computed_pairs(kind, *layouts, each) / problem.window_pairs for each in self.shown
        ]
        # What only another backend's kernels have is the same in all tiles.
        self.fields = [
            name
            for name in self.chosen._fields[2:]
            if name.startswith("num_") or len({getattr(each, name) for each in found}) > 1
        ]

    def as_dict(self) -> dict[str, Any]:
        """The list for JSON."""
        return {
            "backend": self.backend,
            "kernel": self.kind,
            "candidates": self.count,
            "tiles": [
                {
                    "queries": each.q_block[-len(self.problem.shape) :],
                    "keys": each.kv_block[-len(self.problem.shape) :],
                    **{name: self._value(name, each) for name in self.fields},
                    "computed_over_needed": ratio,
                    "used": each == self.chosen,
                }
                for each, ratio in zip(self.shown, self.computed_over_needed)
            ],
        }

    def print(self) -> None:
        """Print the list; the columns are the fields of the tiles."""
        rank = len(self.problem.shape)
        rows = [
            (
                f"{by(each.q_block[-rank:])}{' *' if each == self.chosen else ''}",
                by(each.kv_block[-rank:]),
                *(str(self._value(name, each)) for name in self.fields),
                f"{ratio:.2f}",
            )
            for each, ratio in zip(self.shown, self.computed_over_needed)
        ]
        names = (name.removeprefix("num_").replace("_", " ") for name in self.fields)
        title = f"Backend {self.backend}, kernel {self.kind}: {len(rows)} of {self.count} tiles, "
        header = ("queries", "keys", *names, "computed/needed")
        print_table(f"{title}best estimate first, * is used:", header, rows, keys=2)

    def _value(self, field: str, tiles: Any) -> int:
        """A field of tiles, which have three axes; the last ones are the problem's."""
        value: int = getattr(tiles, field)
        return value - (3 - len(self.problem.shape)) if field == "split_axis" else value


def tune(
    args: argparse.Namespace, problem: Problem, backend: str, found: Sequence[tuple[str, str]]
) -> None:
    """Try tiles, remember the fastest, and say what was found."""
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
    out = sys.stderr if STDOUT in (args.json, args.csv) else sys.stdout
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
