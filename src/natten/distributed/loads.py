"""What each rank moves, computes and holds by each method: arithmetic on what the methods do.

Bytes are those of queries, keys, values, outputs and their gradients. What is small is left out:
masks, biases, additional tokens, the LSE's messages, and the first call's comparison of arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from ..inputs import Inputs, compute_dtype
from ..neighborhood import Neighborhood, group_length
from .shards import Box, Coordinates, Piece, Segment, Sharding, halo_plan, needs_of


@dataclass(frozen=True)
class Layer:
    """What bytes and operations depend on beside the layout.

    Attributes:
        batch, heads, heads_kv, head_dim, value_dim: as in :func:`.planning.plan`.
        itemsize, lse_itemsize: bytes of a number, and of one of the LSE.
    """

    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    value_dim: int
    itemsize: int
    lse_itemsize: int

    @property
    def query(self) -> int:
        """Bytes of a query with all heads, for all batch entries."""
        return self.batch * self.heads * self.head_dim * self.itemsize

    @property
    def key(self) -> int:
        """Bytes of a key and its value."""
        return self.batch * self.heads_kv * (self.head_dim + self.value_dim) * self.itemsize

    @property
    def out(self) -> int:
        """Bytes of a query's output."""
        return self.batch * self.heads * self.value_dim * self.itemsize

    @property
    def lse(self) -> int:
        """Bytes of a query's LSE."""
        return self.batch * self.heads * self.lse_itemsize

    @property
    def operations(self) -> dict[str, int]:
        """Operations for a pair: two for each multiply-add, of two products forward and of five
        backward."""
        d, dv = self.head_dim, self.value_dim
        return {"forward": 2 * (d + dv), "backward": 2 * (3 * d + 2 * dv)}


class Traffic(NamedTuple):
    """Bytes that a rank sends to others, and gets from them."""

    sent: int
    received: int


@dataclass(frozen=True)
class Load:
    """What one rank moves, computes and holds.

    Attributes:
        at: where the rank is along each axis of tokens.
        keys: how many keys it has.
        extra_keys: how many it gets from others; with the method "heads", of its share of heads.
        pairs: pairs of a query and a key that it computes, over all batch entries and heads.
        inner_pairs: those of them that are computed while messages travel.
        forward, backward: what it moves.
        shard: bytes of its query, key and value.
        halo: bytes that it holds of others.
        copies: bytes of messages to others, and of keys and results that are put together.
        output: bytes of its output and LSE.
    """

    at: Coordinates
    keys: int
    extra_keys: int
    pairs: int
    inner_pairs: int
    forward: Traffic
    backward: Traffic
    shard: int
    halo: int
    copies: int
    output: int

    @property
    def memory(self) -> int:
        """Bytes that a forward pass holds at most."""
        return self.shard + self.halo + self.copies + self.output


def fewer_bytes(inputs: Inputs, sharding: Sharding, ranks: tuple[Coordinates, ...]) -> str:
    """The method in which the rank that gets most gets fewer bytes; heads have to be divisible."""
    query, key, value = inputs[:3]
    lse_itemsize = compute_dtype(query.dtype).itemsize
    heads = query.shape[-2], key.shape[-2]
    dims = key.shape[-1], value.shape[-1]
    layer = Layer(1, *heads, *dims, query.dtype.itemsize, lse_itemsize)
    return fewer_bytes_of(sharding, ranks, layer)


@lru_cache(maxsize=256)
def fewer_bytes_of(sharding: Sharding, ranks: tuple[Coordinates, ...], layer: Layer) -> str:
    """The same of a layer."""
    if layer.heads_kv % len(ranks):
        return "halo"
    halo = max(layer.key * n for n in halo_tokens(sharding, ranks))
    heads = max(each.received for each in _heads_traffic(sharding, ranks, layer))
    return "halo" if halo <= heads else "heads"


@lru_cache(maxsize=256)
def halo_tokens(sharding: Sharding, ranks: tuple[Coordinates, ...]) -> tuple[int, ...]:
    """How many keys each rank gets from others."""
    found = []
    for at in ranks:
        foreign = [box for owner, box in needs_of(sharding, at) if owner != at]
        found.append(sum(map(_volume, foreign)))
    return tuple(found)


def _volume(box: Box) -> int:
    return math.prod(last - first for first, last in box)


def _own_keys(sharding: Sharding, at: Coordinates) -> int:
    return math.prod(sizes[i] for sizes, i in zip(sharding.sizes, at))


def halo_loads(
    sharding: Sharding, ranks: tuple[Coordinates, ...], layer: Layer
) -> tuple[Load, ...]:
    """What each rank does with the method "halo"."""
    found = []
    fine = math.prod(sharding.rule.queries_per_key)
    matrices = layer.batch * layer.heads
    for rank, (at, extra) in enumerate(zip(ranks, halo_tokens(sharding, ranks))):
        steps = halo_plan(sharding, ranks, rank)
        sent = layer.key * sum(_volume(steps.own[i]) for numbers in steps.sent for i in numbers)
        received = layer.key * extra
        border = [slab for slabs in steps.border for slab in slabs if slab is not None]
        pieces = [*border, *([] if steps.core is None else [steps.core])]
        pairs = [matrices * _pairs(sharding, at, piece.queries) for piece in pieces]
        copied = layer.key * sum(_copied_keys(steps.segments, piece) for piece in pieces)
        keys = _own_keys(sharding, at)
        output = fine * keys * (layer.out + layer.lse)
        found.append(
            Load(
                at=at,
                keys=keys,
                extra_keys=extra,
                pairs=sum(pairs),
                inner_pairs=pairs[-1] if steps.is_inner else 0,
                forward=Traffic(sent, received),
                backward=Traffic(received, sent),
                shard=keys * (fine * layer.query + layer.key),
                halo=received,
                copies=sent + copied + (output if border else 0),
                output=output,
            )
        )
    return tuple(found)


def _pairs(sharding: Sharding, at: Coordinates, queries: Box) -> int:
    """How many pairs the queries of a rank have with keys, of one head."""
    found = 1
    for axis, (first, last) in enumerate(queries):
        r, own = sharding.rule.queries_per_key[axis], sharding.own(axis, at[axis])[0]
        attended = _attended(sharding.rule, axis, sharding.shape[axis])
        found *= r * sum(attended[own + first // r : own + last // r])
    return found


@lru_cache(maxsize=256)
def _attended(rule: Neighborhood, axis: int, length: int) -> list[int]:
    """How many keys of an axis a query at each of its tokens attends."""
    d, token = rule.dilation[axis], torch.arange(length)
    start, end = rule.windows(axis, token // d, group_length(length, d, token % d))
    return (end - start).tolist()


def _copied_keys(segments: tuple[tuple[Segment, ...], ...], piece: Piece) -> int:
    """The keys of a piece, if they come from several ranks and so are put together."""
    for along, (first, last) in zip(segments, piece.keys):
        if sum(each.at < last and first < each.at + each.length for each in along) > 1:
            return _volume(piece.keys)
    return 0


def _heads_traffic(
    sharding: Sharding, ranks: tuple[Coordinates, ...], layer: Layer
) -> Iterator[Traffic]:
    """What each rank moves forward; backward it is what others send it, and the reverse."""
    count, fine = len(ranks), math.prod(sharding.rule.queries_per_key)
    inward, outward = fine * layer.query + layer.key, fine * layer.out
    total = math.prod(sharding.shape)
    for at in ranks:
        own = _own_keys(sharding, at)
        leaving, coming = own * (count - 1), total - own  # tokens, of one rank's share of heads
        sent = leaving * inward + coming * outward
        received = coming * inward + leaving * outward
        yield Traffic(sent // count, received // count)


def heads_loads(
    sharding: Sharding, ranks: tuple[Coordinates, ...], layer: Layer
) -> tuple[Load, ...]:
    """What each rank does with the method "heads", whose ranks divide the heads."""
    found = []
    count, fine = len(ranks), math.prod(sharding.rule.queries_per_key)
    pairs = layer.batch * layer.heads * _all_pairs(sharding)
    total = math.prod(sharding.shape)
    inward, outward = fine * layer.query + layer.key, fine * (layer.out + layer.lse)
    for at, (sent, received) in zip(ranks, _heads_traffic(sharding, ranks, layer)):
        keys = _own_keys(sharding, at)
        found.append(
            Load(
                at=at,
                keys=keys,
                extra_keys=total - keys,
                pairs=pairs // count,
                inner_pairs=0,
                forward=Traffic(sent, received),
                backward=Traffic(received, sent),
                shard=keys * inward,
                halo=(total - keys) * inward // count,
                # What is sent, all tokens put together, and the results before they are sent.
                copies=keys * inward + total * (inward + outward) // count,
                output=keys * outward,
            )
        )
    return tuple(found)


def _all_pairs(sharding: Sharding) -> int:
    """The pairs of all queries, of one head."""
    return math.prod(
        r * sum(_attended(sharding.rule, axis, length))
        for axis, (r, length) in enumerate(zip(sharding.rule.queries_per_key, sharding.shape))
    )
