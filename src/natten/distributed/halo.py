"""Keys and values of neighbors: every rank gets those that the windows of its queries reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..functional import attend
from ..inputs import Inputs, compute_dtype
from .collectives import parts_of, send, tied, together
from .shards import Box, Coordinates, HaloPlan, Index, Piece, Sharding, gather, halo_plan

Keys = Sequence[Tensor]  # keys, values, and a mask if there is one


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
    whole = [x for x in (inputs.key, inputs.value, inputs.key_mask) if x is not None]
    own = list(zip(*(parts_of(x, plan.own) for x in whole)))
    pieces = [each for each in (plan.core, *chain(*plan.border)) if each is not None]
    queries = dict(zip(pieces, parts_of(inputs.query, [piece.queries for piece in pieces])))
    there: dict[Index, Keys] = {}

    def run(piece: Piece) -> tuple[Tensor, Tensor]:
        def find(i: int, index: Index, spans: Box) -> Tensor:
            number = plan.here.get((index, spans))
            if number is not None:
                return own[number][i]
            (part,) = parts_of(there[index][i], [spans])
            return part

        keys = [gather(partial(find, i), plan.segments, piece.keys) for i in range(len(whole))]
        part = inputs._replace(query=queries[piece], key=keys[0], value=keys[1])
        if inputs.key_mask is not None:
            part = part._replace(key_mask=keys[2])
        return attend(part, piece.rule, *options)

    arrived = _send_keys(name, group, plan, own, whole) if plan.moves else None
    results = [run(plan.core)] if plan.core is not None and plan.is_inner else []
    if arrived is not None:  # the inner queries run while keys travel
        there, message = arrived()
    results += [run(piece) for piece in pieces[len(results) :]]
    if results:
        boxes = [piece.queries for piece in pieces]
        out, lse = (together(each, boxes, inputs.query.shape[1:-2]) for each in zip(*results))
    else:
        out, lse = _no_queries(inputs)
    if plan.core is None:
        out, lse = tied(out, lse, *inputs.differentiable)
    if arrived is not None and not plan.uses_message:
        out, lse = tied(out, lse, message)
    return out, lse


def _send_keys(
    name: str, group: dist.ProcessGroup, plan: HaloPlan, own: Sequence[Keys], whole: Keys
) -> Callable[[], tuple[dict[Index, Keys], Tensor]]:
    """Send the rank's keys to those that need them, in one message of the keys' dtype.

    Returns:
        A function that waits for those of the others, and returns them by their places in the
        grid, and the message that they are parts of.
    """
    sent = [[x for number in numbers for x in own[number]] for numbers in plan.sent]
    shapes = []
    for indices in plan.received:
        sizes = [[s[i].length for s, i in zip(plan.segments, at)] for at in indices]
        shapes.append([(len(x), *n, *x.shape[1 + len(n) :]) for n in sizes for x in whole])
    finish = send(name, group, sent, shapes, whole)

    def arrived() -> tuple[dict[Index, Keys], Tensor]:
        from_ranks, message = finish()
        found: dict[Index, Keys] = {}
        for indices, tensors in zip(plan.received, from_ranks):
            parts = iter(tensors)
            found.update((at, [next(parts).to(x.dtype) for x in whole]) for at in indices)
        return found, message

    return arrived


def _no_queries(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output and LSE of a rank without queries, from which a backward starts as elsewhere."""
    one = inputs.query.narrow(-1, 0, 1)
    out = one.expand(*one.shape[:-1], inputs.value.shape[-1])
    return out, one.squeeze(-1).to(compute_dtype(one.dtype))
