"""The relative positional bias of a tile, and its gradient, without an index of pairs."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...neighborhood import Neighborhood
from .grids import TileGrid


def bias_of(grid: TileGrid, rpb: Tensor, rule: Neighborhood) -> Tensor:
    """The bias of a tile, ``[heads, queries, keys]``; pairs that are masked hold any value."""
    heads = rpb.shape[0]
    picked = rpb
    for axis, run in enumerate(grid.runs):
        stands = torch.tensor(run.stands, device="cpu")
        index = torch.arange(run.key_size, device="cpu") - stands[:, None]
        index = (index + rule.kernel_size[axis] - 1).clamp(0, rpb.shape[1 + axis] - 1)
        dim = 1 + 2 * axis
        picked = picked.index_select(dim, index.flatten().to(rpb.device))
        picked = picked.unflatten(dim, (run.query_size, run.key_size))
    rank = len(grid.runs)
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2)]
    return picked.permute(order).reshape(
        heads, math.prod(grid.query_sizes), math.prod(grid.key_sizes)
    )


def _sum_positions(x: Tensor, dim: int, positions: Tensor) -> Tensor:
    """Sum ``x`` over queries, in ``dim``, that stand at one position."""
    row = positions - positions[0]
    count = int(row[-1]) + 1
    if count == len(row):
        return x
    shape = (*x.shape[:dim], count, *x.shape[dim + 1 :])
    return x.new_zeros(shape).index_add_(dim, row.to(x.device), x)


def _sum_diagonals(x: Tensor, dim: int) -> Tensor:
    """Sum ``x`` over its diagonals, where dims (dim, dim + 1) are (query, key).

    The result has ``queries + keys - 1`` entries in ``dim``, one for each value of ``key - query``
    from ``1 - queries`` on.
    """
    x = x.movedim((dim, dim + 1), (-2, -1))
    queries, keys = x.shape[-2:]
    # Rows are padded to queries + keys entries and read as one entry shorter, so that each row is
    # one column further right than the one before.
    x = F.pad(x.flip(-2), (0, queries)).flatten(-2)[..., : queries * (queries + keys - 1)]
    return x.unflatten(-1, (queries, -1)).sum(-2).movedim(-1, dim)


def add_bias_gradient(grid: TileGrid, grad: Tensor, grad_rpb: Tensor, rule: Neighborhood) -> None:
    """Add ``grad [heads, queries, keys]`` of a tile to the entries of ``grad_rpb`` it came from."""
    rank = len(grid.runs)
    x = grad.reshape(grad.shape[0], *grid.query_sizes, *grid.key_sizes)
    order = [0, *itertools.chain(*((1 + a, 1 + rank + a) for a in range(rank)))]
    x = x.permute(order)
    target = grad_rpb
    for axis, run in enumerate(grid.runs):
        stands = torch.tensor(run.stands, device="cpu")
        x = _sum_positions(x, 1 + axis, stands)
        queries, start = x.shape[1 + axis], int(stands[0])
        x = _sum_diagonals(x, 1 + axis)
        first = 1 - queries - start + rule.kernel_size[axis] - 1
        low, high = max(0, first), min(target.shape[1 + axis], first + x.shape[1 + axis])
        x = x.narrow(1 + axis, low - first, high - low)
        target = target.narrow(1 + axis, low, high - low)
    target += x
