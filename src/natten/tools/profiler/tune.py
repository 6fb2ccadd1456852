"""Tiles that a backend can be told to use: listing, forcing, trying, remembering.

A backend that has a :class:`natten.backends.interface.TileChooser` can be tuned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ... import backends, tiling, tuning
from ...backends.interface import KINDS, Shape, TileChooser, Tiles, padded_shape
from ...errors import ArgumentError
from ...neighborhood import Neighborhood
from .problem import Problem

FORWARD_KIND = KINDS[0]


def tile_chooser(backend: str) -> TileChooser | None:
    """How the backend's tiles are chosen, or None if it has nothing to tune.

    Raises:
        ArgumentError: a package that the backend needs is missing.
    """
    found = backends.named(backend)
    try:
        return None if found is None else found.tile_chooser()
    except ModuleNotFoundError as error:
        raise ArgumentError(
            f"`--backend` {backend} needs the package {error.name}, which is not installed."
        ) from None


def windows(problem: Problem, backend: str) -> tuple[Neighborhood, Shape, Shape]:
    """The rule and the token layouts of queries and keys that a backend computes.

    One that has no circular axes pads the keys around.
    """
    key_shape, found = problem.shape, backends.named(backend)
    rule = problem.rule.without_full_rings(key_shape)
    if found is not None and found.pads(problem.question("attention")):
        rule, margins = rule.unrolled()
        key_shape = padded_shape(key_shape, margins)
    return rule, problem.queries, key_shape


def arguments(problem: Problem, backend: str) -> tuple[Any, ...]:
    """What functions of a backend's :class:`TileChooser` take after the kind of kernel."""
    return (
        *windows(problem, backend), problem.dim, problem.value_dim, problem.dtype.itemsize,
    )  # fmt: skip


def kernels(forward: str, gradient: str | None) -> list[tuple[str, str]]:
    """``(backend, kind)`` of each kernel that has tiles.

    Args:
        forward: the backend of the forward pass.
        gradient: that of the backward pass, which may be another; None is none.
    """
    found = [(forward, FORWARD_KIND)] if tile_chooser(forward) is not None else []
    chooser = None if gradient is None else tile_chooser(gradient)
    if gradient is not None and chooser is not None:
        found += [(gradient, kind) for kind in KINDS if kind != FORWARD_KIND]
    return found


def computed_over_needed(problem: Problem, forward: str, gradient: str | None) -> dict[str, float]:
    """Pairs computed per pair needed, per kind of kernel; of those that tell.

    Args:
        problem: what is computed.
        forward, gradient: backends, as in :func:`kernels`.
    """
    computed = {}
    for backend, kind in kernels(forward, gradient):
        chooser = tile_chooser(backend)
        assert chooser is not None
        tiles = chooser.choose(kind, *arguments(problem, backend))
        computed[kind] = chooser.computed_pairs(kind, *windows(problem, backend), tiles)
    plain = backends.named(forward)
    pairs = None if plain is None else plain.computed_pairs(*_tiling_arguments(problem, forward))
    if pairs is not None:
        computed[FORWARD_KIND] = pairs
    additional = problem.num_queries * problem.num_additional
    return {kind: (pairs + additional) / problem.needed_pairs for kind, pairs in computed.items()}


def tiled_axes(problem: Problem) -> list[tiling.TileCost]:
    """What the ``tiled`` backend's tiling costs on each axis."""
    _, runs = tiling.tiles(*_tiling_arguments(problem, "tiled"))
    return [tiling.axis_cost(axis) for axis in runs]


def _tiling_arguments(problem: Problem, backend: str) -> tuple[Any, ...]:
    return (
        *windows(problem, backend), problem.batch * problem.heads,
        (problem.dim + problem.value_dim) // 2,
    )  # fmt: skip


class Forced(NamedTuple):
    """Tile shapes asked for, one size per axis; None leaves the choice."""

    query: Sequence[int] | None
    key: Sequence[int] | None


@contextlib.contextmanager
def forced_tiles(
    problem: Problem, found: Sequence[tuple[str, str]], forward: Forced, backward: Forced
) -> Iterator[None]:
    """Inside, the kernels have the tile shapes asked for.

    Args:
        problem: what is computed.
        found: what :func:`kernels` returns.
        forward, backward: tile shapes of the kernels of either pass.

    Raises:
        ArgumentError: a kernel has no such tiles.
    """
    with contextlib.ExitStack() as stack:
        for backend, kind in found:
            wanted = forward if kind == FORWARD_KIND else backward
            if wanted == Forced(None, None):
                continue
            tiles = tile_chooser(backend)
            assert tiles is not None
            candidates = tiles.candidates(kind, *arguments(problem, backend))
            fitting = next((x for x in candidates if _fits(x, wanted)), None)
            if fitting is None:
                prefix = "" if kind == FORWARD_KIND else "backward-"
                pairs = zip((f"--{prefix}q-tile", f"--{prefix}kv-tile"), wanted)
                asked = " with ".join(
                    f"`{name}` {' '.join(map(str, sizes))}" for name, sizes in pairs if sizes
                )
                raise ArgumentError(
                    f"{asked} is nothing that the kernel {kind!r} of backend {backend} can run; "
                    "--dry-run --max-configs 0 lists what it can."
                )
            stack.enter_context(
                tuning.trial(tiles.key(kind, *arguments(problem, backend)), fitting)
            )
        yield


def _fits(tiles: Tiles, wanted: Forced) -> bool:
    return all(
        sizes is None or shape[-len(sizes) :] == tuple(sizes)
        for shape, sizes in zip((tiles.q_block, tiles.kv_block), wanted)
    )


class Trial(NamedTuple):
    """Tiles that were tried for a kind of kernel, and the time; infinite if they can not run."""

    kind: str
    tiles: Any
    time_us: float


def optimize(
    problem: Problem,
    found: Sequence[tuple[str, str]],
    measure: Callable[[str], float],
    *,
    most: int,
    step: Callable[[str], None] = lambda name: None,
) -> tuple[list[Trial], list[Path]]:
    """Try the candidates that are cheapest by estimate, and remember the fastest of each kind.

    Args:
        problem: what to tune for.
        found: what :func:`kernels` returns.
        measure: time of a kind of kernel with the tiles then chosen, microseconds.
        most: candidates to try of each; 0 means all.
        step: called with a name before each trial.

    Returns:
        All trials, and the files written.

    Raises:
        RuntimeError: no candidate runs.
    """
    trials: list[Trial] = []
    paths = []
    for backend, kind in found:
        tiles = tile_chooser(backend)
        assert tiles is not None
        key = tiles.key(kind, *arguments(problem, backend))

        def timed(candidate: Tiles, kind: str = kind, key: str = key) -> float:
            step(f"{kind}: queries {candidate.q_block}, keys {candidate.kv_block}")
            with tuning.trial(key, candidate):
                return measure(kind)

        candidates = tiles.candidates(kind, *arguments(problem, backend))[: most or None]
        times = tuning.times(f"kernel {kind!r}", candidates, timed)
        paths.append(tuning.remember(key, min(times, key=times.__getitem__)))
        trials += [Trial(kind, each, time_us) for each, time_us in times.items()]
    return trials, paths
