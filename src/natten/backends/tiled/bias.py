"""The relative positional bias of a tile, and its gradient, without an index of pairs."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...neighborhood import Neighborhood
from .blocks import Block


def bias_of(block: Block, rpb: Tensor, rule: Neighborhood) -> Tensor:
    """``[heads, tile tokens, box tokens]`` from ``rpb``; pairs to be masked hold any value."""
    heads = rpb.shape[0]
    picked = rpb
    for axis, run in enumerate(block.runs):
        query = torch.arange(run.query_size, device="cpu")[:, None]
        index = torch.arange(run.key_size, device="cpu") - query + block.offsets(axis)
        index = (index + rule.kernel_size[axis] - 1).clamp(0, rpb.shape[1 + axis] - 1)
        dim = 1 + 2 * axis
        picked = picked.index_select(dim, index.flatten().to(rpb.device))
        picked = picked.unflatten(dim, (run.query_size, run.key_size))
    rank = len(block.runs)
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2)]
    return picked.permute(order).reshape(
        heads, math.prod(block.query_sizes), math.prod(block.key_sizes)
    )


def _sum_diagonals(x: Tensor, dim: int) -> Tensor:
    """Sum ``x`` over dims (dim, dim + 1) = (query, key) along ``key - query``.

    The result's dim has ``queries + keys - 1`` entries; the first is ``key - query = 1 - queries``.
    """
    x = x.movedim((dim, dim + 1), (-2, -1))
    queries, keys = x.shape[-2:]
    # Rows that are one entry shorter than they were written move one column right per row.
    x = F.pad(x.flip(-2), (0, queries)).flatten(-2)[..., : queries * (queries + keys - 1)]
    return x.unflatten(-1, (queries, -1)).sum(-2).movedim(-1, dim)


def add_bias_gradient(block: Block, grad: Tensor, grad_rpb: Tensor, rule: Neighborhood) -> None:
    """Add ``grad [heads, tile tokens, box tokens]`` to the entries of ``grad_rpb`` it came from."""
    rank = len(block.runs)
    x = grad.reshape(grad.shape[0], *block.query_sizes, *block.key_sizes)
    order = [0, *itertools.chain(*((1 + a, 1 + rank + a) for a in range(rank)))]
    x = x.permute(order)
    target = grad_rpb
    for axis, run in enumerate(block.runs):
        x = _sum_diagonals(x, 1 + axis)
        first = 1 - run.query_size + block.offsets(axis) + rule.kernel_size[axis] - 1
        low, high = max(0, first), min(target.shape[1 + axis], first + x.shape[1 + axis])
        x = x.narrow(1 + axis, low - first, high - low)
        target = target.narrow(1 + axis, low, high - low)
    target += x
