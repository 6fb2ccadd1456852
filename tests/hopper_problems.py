"""Problems for the Hopper kernels, and the ways to cut them."""

from __future__ import annotations

from typing import Any

import torch

from natten.backends.hopper import tiles as tiling
from natten.backends.interface import Tiles
from natten.neighborhood import Neighborhood

# shape, window, stride, dilation, causal
PROBLEMS: list[tuple[Any, ...]] = [
    ((19,), 7, 1, 1, False),
    ((17, 19), (7, 7), 1, 1, False),
    ((40, 24), (16, 12), (4, 8), 1, False),
    ((24, 36), (5, 7), (2, 1), (2, 3), (True, False)),
    ((3, 100), (2, 50), 1, 1, False),
    ((20, 33), (9, 11), (3, 2), 1, (False, True)),
    ((9, 13, 17), (5, 7, 9), 1, 1, False),
    ((8, 16, 32), (8, 8, 16), 1, 1, (True, False, False)),
    ((10, 24, 30), (6, 12, 16), (2, 4, 4), 1, False),
    ((1,), 1, 1, 1, False),
    ((20, 1), (7, 1), 1, 1, False),
    ((4, 4, 1), (3, 2, 1), 1, 1, False),
]


def name_of(problem: Any) -> str:
    shape, _, stride, _, causal = problem
    return "x".join(map(str, shape)) + f"-{stride}-{causal}"


def rule_of(shape: Any, *parameters: Any) -> Neighborhood:
    return Neighborhood.create(len(shape), *parameters)


def each_way(kind: str, rule: Neighborhood, shape: Any, dim: int = 64) -> list[Tiles]:
    """The best tiles of each kind of program and mask."""
    found = {}
    for tiles in tiling.candidates(kind, rule, shape, shape, dim, dim):
        mask = tiling.mask(kind, rule, shape, tiles, tiling.work(kind, dim, dim))
        found.setdefault((tiles.num_warps, mask.kind, mask.by_row, mask.steps), tiles)
    return list(found.values())


def partners(kind: str, rule: Neighborhood, axis: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-past-last key of each query, or query of each key."""
    tokens = torch.arange(n)
    start, stop = rule.windows(axis, tokens, n)
    if kind != "dkdv":
        return start, stop
    attended = (start <= tokens[:, None]) & (tokens[:, None] < stop)  # [key, query]
    return attended.int().argmax(1), n - attended.flip(1).int().argmax(1)
