"""Tiles that a backend can be told to use: listing, forcing, trying, remembering.

A backend whose package has a module ``tiles`` with ``KINDS``, ``candidates``, ``choose``, ``key``
and ``computed_pairs`` can be tuned; :mod:`natten.backends.triton.tiles` says what they are.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from natten import tiling, tuning
from natten.errors import ArgumentError
from natten.profiler.problem import Problem

FORWARD_KIND = "forward"


def tiles_module(backend: str) -> Any | None:
    """The backend's module ``tiles``, or None if it has nothing to tune.

    Raises:
        ArgumentError: a package that the backend needs is missing.
    """
    try:
        if importlib.util.find_spec(f"natten.backends.{backend}.tiles") is None:
            return None
        module = importlib.import_module(f"natten.backends.{backend}.tiles")
        return module if hasattr(module, "KINDS") else None
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("natten"):
            return None  # a backend in one file
        raise ArgumentError(
            f"`--backend` {backend} needs the package {error.name}, which is not installed."
        ) from None


def arguments(problem: Problem) -> tuple[Any, ...]:
    """What functions of a module ``tiles`` take after the kind of kernel."""
    return (
        problem.rule, problem.shape, problem.shape, problem.dim, problem.value_dim,
        problem.dtype.itemsize,
    )  # fmt: skip


def computed_over_needed(problem: Problem, backend: str, backward: bool) -> dict[str, float]:
    """Pairs computed per pair needed, per kind of kernel; empty if the backend does not tell."""
    tiles = tiles_module(backend)
    if tiles is not None:
        kinds = tiles.KINDS if backward else (FORWARD_KIND,)
        computed = {
            kind: tiles.computed_pairs(
                kind, problem.rule, problem.shape, problem.shape,
                tiles.choose(kind, *arguments(problem)),
            )
            for kind in kinds
        }  # fmt: skip
    elif backend == "tiled":
        computed = {FORWARD_KIND: math.prod(axis.products for axis in tiled_axes(problem))}
    elif backend == "reference":
        computed = {FORWARD_KIND: problem.tokens**2}
    else:
        return {}
    extra = problem.tokens * problem.extra
    return {kind: (pairs + extra) / problem.needed_pairs for kind, pairs in computed.items()}


def tiled_axes(problem: Problem) -> list[tiling.TileCost]:
    """What the ``tiled`` backend's tiling costs on each axis."""
    runs = tiling.tiles(
        problem.rule, problem.shape, problem.shape, problem.batch * problem.heads,
        (problem.dim + problem.value_dim) // 2,
    )  # fmt: skip
    return [tiling.axis_cost(list(axis)) for axis in runs]


class Forced(NamedTuple):
    """Tile shapes asked for, one size per axis; None leaves the choice."""

    query: Sequence[int] | None
    key: Sequence[int] | None


@contextlib.contextmanager
def forced_tiles(
    problem: Problem, backend: str, forward: Forced, backward: Forced
) -> Iterator[None]:
    """Inside, the backend's kernels have the tile shapes asked for.

    Raises:
        ArgumentError: the backend has no such tiles.
    """
    tiles = tiles_module(backend)
    if tiles is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for kind in tiles.KINDS:
            wanted = forward if kind == FORWARD_KIND else backward
            if wanted == Forced(None, None):
                continue
            candidates = tiles.candidates(kind, *arguments(problem))
            found = next((each for each in candidates if _fits(each, wanted)), None)
            if found is None:
                prefix = "" if kind == FORWARD_KIND else "backward-"
                raise ArgumentError(
                    f"`--{prefix}q-tile` {wanted.query} with `--{prefix}kv-tile` {wanted.key} is "
                    f"nothing that the kernel {kind!r} of backend {backend} can run; "
                    "--dry-run --max-configs 0 lists what it can."
                )
            stack.enter_context(tuning.trial(tiles.key(kind, *arguments(problem)), found))
        yield


def _fits(tiles: Any, wanted: Forced) -> bool:
    pairs = ((tiles.query, wanted.query), (tiles.key, wanted.key))
    return all(
        shape is None or tuple(found[-len(shape) :]) == tuple(shape) for found, shape in pairs
    )


class Trial(NamedTuple):
    """Tiles that were tried for a kind of kernel, and the time; infinite if they can not run."""

    kind: str
    tiles: Any
    time_us: float


def optimize(
    problem: Problem,
    backend: str,
    measure: Callable[[str], float],
    *,
    kinds: Sequence[str],
    most: int,
    step: Callable[[str], None] = lambda name: None,
) -> tuple[list[Trial], list[Path]]:
    """Try the candidates that are cheapest by estimate, and remember the fastest of each kind.

    Args:
        problem: what to tune for.
        backend: one that :func:`tiles_module` knows.
        measure: time of a kind of kernel with the tiles then chosen, microseconds.
        kinds: which kernels.
        most: candidates to try of each; 0 means all.
        step: called with a name before each trial.

    Returns:
        All trials, and the files written.

    Raises:
        RuntimeError: no candidate runs.
    """
    tiles = tiles_module(backend)
    assert tiles is not None
    trials: list[Trial] = []
    paths = []
    for kind in kinds:
        key = tiles.key(kind, *arguments(problem))
        of_kind = []
        reason: Exception | None = None
        for candidate in tiles.candidates(kind, *arguments(problem))[: most or None]:
            step(f"{kind}: queries {candidate.query}, keys {candidate.key}")
            with tuning.trial(key, candidate):
                try:
                    time_us = measure(kind)
                # Compilers have their own classes: too much shared memory, too many registers.
                except Exception as error:
                    time_us, reason = math.inf, error
            of_kind.append(Trial(kind, candidate, time_us))
        best = min(of_kind, key=lambda trial: trial.time_us)
        if best.time_us == math.inf:
            raise RuntimeError(
                f"none of the tiles of kernel {kind!r} runs here: {reason}"
            ) from reason
        paths.append(tuning.remember(key, best.tiles))
        trials += of_kind
    return trials, paths
