"""What the methods move between ranks."""

from __future__ import annotations

import math
from functools import lru_cache

from ..inputs import Inputs
from .shards import Coordinates, Sharding, needs_of


@lru_cache(maxsize=256)
def halo_tokens(sharding: Sharding, ranks: tuple[Coordinates, ...]) -> tuple[int, ...]:
    """How many keys each rank gets from others."""
    found = []
    for at in ranks:
        foreign = [box for owner, box in needs_of(sharding, at) if owner != at]
        found.append(sum(math.prod(last - first for first, last in box) for box in foreign))
    return tuple(found)


def fewer_bytes(inputs: Inputs, sharding: Sharding, ranks: tuple[Coordinates, ...]) -> str:
    """The method in which the rank that gets most gets fewer bytes; heads have to be divisible."""
    heads, kv_heads = inputs.query.shape[-2], inputs.key.shape[-2]
    if kv_heads % len(ranks):
        return "halo"
    key_dim, value_dim = inputs.key.shape[-1], inputs.value.shape[-1]
    halo = max(halo_tokens(sharding, ranks)) * kv_heads * (key_dim + value_dim)
    most = math.prod(max(sizes) for sizes in sharding.sizes)
    queries = most * math.prod(sharding.rule.queries_per_key)
    moved = (queries * heads + most * kv_heads) * (key_dim + value_dim)
    return "halo" if halo <= moved * (len(ranks) - 1) / len(ranks) else "heads"
