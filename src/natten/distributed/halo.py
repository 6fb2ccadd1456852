"""Keys and values of neighbors: every rank gets those that the windows of its queries reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import attend
from ..inputs import Inputs, compute_dtype
from .collectives import send, tied
from .shards import Box, Coordinates, HaloPlan, Piece, Sharding, gather, halo_plan

Grid = dict[tuple[int, ...], Sequence[Tensor]]  # keys, values and perhaps a mask, by index


def attend_with_halo(
    name: str, group: dist.ProcessGroup, ranks: tuple[Coordinates, ...], sharding: Sharding,
    inputs: Inputs, options: Sequence[Any], with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and LSE of a rank's queries.

    Args:
        name: the public function, for messages.
        group, ranks: the ranks, and their coordinates along the axes.
        sharding: the whole layout.
        inputs: the rank's tensors; those without tokens of the layout are the same on every rank.
        options: what :func:`natten.functional.attend` takes after the rule.
        with_lse: without effect, as the LSE costs nothing.
    """
    plan = halo_plan(sharding, ranks, group.rank())
    own = [x for x in (inputs.key, inputs.value, inputs.key_mask) if x is not None]
    grid: Grid = {at: [_part(x, box) for x in own] for at, box in plan.here}

    def run(piece: Piece) -> tuple[Tensor, Tensor]:
        keys = [
            gather({at: tensors[i] for at, tensors in grid.items()}, plan.segments, piece.keys)
            for i in range(len(own))
        ]
        part = inputs._replace(query=_part(inputs.query, piece.queries), key=keys[0], value=keys[1])
        if inputs.key_mask is not None:
            part = part._replace(key_mask=keys[2])
        return attend(part, piece.rule, *options)

    arrived = _send_keys(name, group, plan, own) if plan.moves else None
    if plan.core is None:
        out, lse = _no_queries(inputs)
    elif plan.is_inner:
        out, lse = run(plan.core)  # while keys travel
    if arrived is not None:
        tensors, message = arrived()
        grid.update(tensors)
    if plan.core is not None and not plan.is_inner:
        out, lse = run(plan.core)
    for dim, slabs in reversed(list(enumerate(plan.border, start=1))):
        before, after = ([] if slab is None else [run(slab)] for slab in slabs)
        if before or after:
            results = [*before, (out, lse), *after]
            out, lse = (torch.cat(parts, dim) for parts in zip(*results))
    if plan.core is None:
        out, lse = tied(out, lse, *inputs.differentiable)
    if arrived is not None and not plan.uses_message:
        out, lse = tied(out, lse, message)
    return out, lse


def _part(x: Tensor, box: Box) -> Tensor:
    """The tokens of a box of ``x [batch, *space, ...]``, as a view."""
    for dim, (first, last) in enumerate(box, start=1):
        x = x.narrow(dim, first, last - first)
    return x


def _send_keys(
    name: str, group: dist.ProcessGroup, plan: HaloPlan, own: Sequence[Tensor]
) -> Callable[[], tuple[Grid, Tensor]]:
    """Send the rank's keys to those that need them, in one message of the keys' dtype.

    Returns:
        A function that waits for those of the others, and returns them with their message.
    """
    sent = [[_part(x, box) for box in boxes for x in own] for boxes in plan.sent]
    shapes = []
    for indices in plan.received:
        sizes = [[s[i].length for s, i in zip(plan.segments, at)] for at in indices]
        shapes.append([(len(x), *n, *x.shape[1 + len(n) :]) for n in sizes for x in own])
    finish = send(name, group, sent, shapes, own)

    def arrived() -> tuple[Grid, Tensor]:
        from_ranks, message = finish()
        grid: Grid = {}
        for indices, tensors in zip(plan.received, from_ranks):
            parts = iter(tensors)
            grid.update((at, [next(parts).to(x.dtype) for x in own]) for at in indices)
        return grid, message

    return arrived


def _no_queries(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output and LSE of a rank without queries, from which a backward starts as elsewhere."""
    one = inputs.query.narrow(-1, 0, 1)
    out = one.expand(*one.shape[:-1], inputs.value.shape[-1])
    return out, one.squeeze(-1).to(compute_dtype(one.dtype))
