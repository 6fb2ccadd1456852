"""All tokens of some heads: heads are spread over the ranks while attention runs.

Every rank sends each other one the heads that it is to have, and gets its own queries' results
back. That is two all-to-all exchanges, as Jacobs et al., "DeepSpeed Ulysses" (2023), describe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import attend
from ..inputs import Inputs
from .collectives import joined, parts_of, send, tied
from .shards import Coordinates, Segment, Sharding, gather


def attend_by_heads(
    name: str, group: dist.ProcessGroup, ranks: tuple[Coordinates, ...], sharding: Sharding,
    inputs: Inputs, options: Sequence[Any], with_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Output and LSE of a rank's queries; arguments as in :func:`.halo.attend_with_halo`.

    The LSE takes a message of its own, so that it is None unless it is wanted.
    """
    size, rank = group.size(), group.rank()
    fine = sharding.rule.queries_per_key
    tokens = [inputs.query, inputs.key, inputs.value]
    sent = [[x.chunk(size, -2)[to] for x in tokens] for to in range(size)]
    shapes = []
    for at in ranks:
        keys = tuple(sizes[i] for sizes, i in zip(sharding.sizes, at))
        queries = tuple(r * n for r, n in zip(fine, keys))
        batch = len(inputs.query)
        shapes.append(
            [
                (batch, *space, x.shape[-2] // size, x.shape[-1])
                for x, space in zip(tokens, (queries, keys, keys))
            ]
        )
        if inputs.key_mask is not None:
            shapes[-1].append((len(inputs.key_mask), *keys))
    if inputs.key_mask is not None:
        for to_rank in sent:
            to_rank.append(inputs.key_mask)
    received, _ = send(name, group, sent, shapes, tokens)()

    def whole(tensors: Sequence[Tensor], fine: Sequence[int]) -> Tensor:
        """All tokens, from the tokens of every rank."""
        segments = [_segments(sizes, r) for sizes, r in zip(sharding.sizes, fine)]
        box = tuple((0, r * sum(sizes)) for sizes, r in zip(sharding.sizes, fine))
        of_ranks = dict(zip(ranks, tensors))
        return gather(lambda index, _: of_ranks[index], segments, box)

    query, *others = zip(*received)
    key, value, *masks = (whole(each, (1,) * len(fine)) for each in others)
    key_mask = masks[0].to(torch.bool) if masks else None

    def own_heads(x: Tensor | None, dim: int) -> Tensor | None:
        return None if x is None else x.chunk(size, dim)[rank]

    part = Inputs(
        whole(query, fine), key, value, own_heads(inputs.rpb, 0),
        own_heads(inputs.additional_keys, -2), own_heads(inputs.additional_values, -2),
        key_mask, inputs.additional_mask,
    )  # fmt: skip
    out, lse = attend(part, sharding.rule, *options)
    own_out = _back(name, group, ranks, sharding, out, inputs.query, -2)
    if not with_lse:
        return own_out, None
    return tied(own_out, _back(name, group, ranks, sharding, lse, inputs.query, -1))


def _segments(sizes: Sequence[int], r: int) -> list[Segment]:
    found, at = [], 0
    for rank, n in enumerate(sizes):
        found.append(Segment(at, rank, (0, r * n)))
        at += r * n
    return found


def _back(
    name: str, group: dist.ProcessGroup, ranks: tuple[Coordinates, ...], sharding: Sharding,
    x: Tensor, query: Tensor, dim: int,
) -> Tensor:  # fmt: skip
    """A result ``x [batch, *space, heads, ...]`` of all tokens and some heads, for a rank's tokens
    and all heads."""
    boxes = []
    for at in ranks:
        spans = (sharding.own(axis, i) for axis, i in enumerate(at))
        fine = sharding.rule.queries_per_key
        boxes.append(tuple((r * first, r * last) for r, (first, last) in zip(fine, spans)))
    sent = [[part] for part in parts_of(x, boxes)]
    own = query.shape[1:-2]
    shape = (len(x), *own, *x.shape[1 + len(own) :])
    received, _ = send(name, group, sent, [[shape]] * group.size(), [x])()
    return joined([each for (each,) in received], dim)
