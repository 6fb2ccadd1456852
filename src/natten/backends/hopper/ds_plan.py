"""What sizes decide about a backward of plain attention that makes dQ of dS in memory: of how many
heads dS is there at a time, and the launches."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..interface import Shape, Tiles
from ..triton.launch import Launch
from ..triton.tiles import SHARED_MEMORY
from .costs import Mask, Work, own_out, shared_bytes
from .cuts import warpgroups
from .descriptors import View, describe
from .dq_from_ds import dq_from_ds_kernel
from .passes import compiled
from .widths import native

# Bytes of dS: of several sets of heads, and of one.
_MOST, _MOST_OF_ONE = 2**28, 2**29

# Microseconds of a tile of 128 tokens with 4096 others: of dK and dV without dS and with it, and of
# dQ; of dQ from dS, by the queries of a warpgroup, of which a tile has two; and until a kernel's
# first tiles begin. With fewer tokens dS gained nothing (measured: hopper-log.md).
_DKDV, _LEAVING, _DQ, _START = 107.0, 109.0, 74.0, 5.0
_FROM_DS = {64: 44.0, 128: 81.0}
_LEAST = 2048

# Of the kernel of dQ: keys of a block, and registers of a thread when it starts, of warpgroups that
# compute, and of the warp that fetches.
_KEYS = 64
_REGISTERS = 168, 232, 40


class Share(NamedTuple):
    """Of how many sets of heads dS is in memory at a time, and how many queries of dQ a warpgroup
    has."""

    sets: int
    rows: int


@lru_cache(maxsize=1024)
def share_of(
    length: int, key_length: int, sets: int, heads_per_kv: int, processors: int
) -> Share | None:
    """What takes least by estimate; None if that is the usual passes.

    Args:
        length, key_length: queries and keys.
        sets: of heads that share a key head, of all batch entries.
        heads_per_kv: query heads of a set.
        processors: multiprocessors of the GPU.
    """
    size = 2 * math.prod(_room(heads_per_kv, length, key_length))
    if size > _MOST_OF_ONE or min(length, key_length) < _LEAST:
        return None
    # Of a tile of keys, and of queries.
    to_queries, to_keys = heads_per_kv * length / 4096, key_length / 4096
    key_tiles = -(-key_length // 128)

    def cost(count: int, rows: int) -> float:
        if count == 0:
            return 0.0
        tiles = count * heads_per_kv * -(-length // (2 * rows))
        leaving = -(-count * key_tiles // processors) * _LEAVING * to_queries
        from_ds = -(-tiles // processors) * _FROM_DS[rows] * to_keys
        return leaving + from_ds + 2 * _START

    # The usual passes overlap, so that all processors have work until the end.
    tiles = heads_per_kv * -(-length // 128)
    work = sets * (key_tiles * _DKDV * to_queries + tiles * _DQ * to_keys)
    best, found = 0.97 * (work / processors + _START), None
    counts = range(1, max(1, min(_MOST // size, sets)) + 1)
    for count, rows in itertools.product(counts, _FROM_DS):
        own = sets // count * cost(count, rows) + cost(sets % count, rows)
        if own < best:
            best, found = own, Share(count, rows)
    return found


def _room(heads: int, length: int, key_length: int) -> Shape:
    """Shape of dS^T ``[heads, keys, queries]``, where 16 bytes divide a row, for TMA."""
    return heads, key_length, -(-length // 8) * 8


def with_room_for_ds(tiles: Tiles, mask: Mask, work: Work) -> Tiles:
    """Tiles of dK and dV with fewer stages, if need be, so that there is room for dS of blocks."""
    own = 2 * math.prod(tiles.kv_block) * math.prod(tiles.q_block) * warpgroups(tiles)
    for stages in range(tiles.num_stages, 1, -1):
        tiles = tiles._replace(num_stages=stages)
        is_own = own_out(tiles, mask, work)
        if shared_bytes(tiles, mask, work, is_own) + own <= SHARED_MEMORY[90]:
            break
    return tiles


class ThroughMemory:
    """Launches that leave dS of some sets of heads in memory, and make dQ of it, set by set.

    Args:
        dkdv: the usual launch of dK and dV.
        tiles: of dK and dV, with room for dS.
        key, grad_query: how these tensors lie.
        device, dtype: theirs.
        share: of the sets of heads.
    """

    def __init__(
        self, dkdv: Launch, tiles: Tiles, key: View, grad_query: View, device: torch.device,
        dtype: torch.dtype, share: Share,
    ) -> None:  # fmt: skip
        usual, (count, rows) = dkdv.arguments, share
        length, key_length, key_tiles = usual["Q2"], usual["N2"], usual["T2"]
        heads_per_kv, sets = usual["heads_per_kv"], usual["num_tiles"] // key_tiles
        self.shape = room = _room(count * heads_per_kv, length, key_length)
        of_room = View(
            (room[0], 1, 1, *room[1:]), (room[1] * room[2],) * 3 + (room[2], 1), (0,) * 6
        )
        descriptors = {name: each for name, each in dkdv.tensors.items() if each is not None}
        columns = tiles.q_block[2]
        descriptors["ds"] = describe(of_room, (1, *tiles.kv_block, columns), dtype)
        constants = {"LEAVE_DS": True, "OVERLAP": False, "STAGES": tiles.num_stages}

        dim = native(sum(usual["QK_CHUNKS"]))
        own_descriptors = {
            "key": describe(key, (1, 1, 1, _KEYS, dim), dtype),
            "ds": describe(of_room, (1, 1, 1, _KEYS, 2 * rows), dtype),
            "grad_query": describe(grad_query, (1, 1, 1, rows, dim), dtype),
        }
        start, compute, fetch = _REGISTERS
        stage, outputs = 2 * _KEYS * (dim + 2 * rows), 4 * rows * dim
        k_b, *_, k_h, k_c = key.steps
        own: dict[str, Any] = {
            **{"k_b": k_b, "k_h": k_h, "k_c": k_c},
            **{"m_b": usual["m_b"], "m_k": usual["m_2"], "m_last": usual["m_last"]},
            "q_b": length * usual["heads"] * heads_per_kv,
            "kv_heads": usual["heads"],
            "heads_per_kv": heads_per_kv,
            "num_blocks": -(-key_length // _KEYS),
            "scale_log2": usual["scale_log2"],
            "CHUNKS": usual["QK_CHUNKS"],
            "STAGES": (SHARED_MEMORY[90] - 2176 - outputs) // stage,
            "REGISTERS": compute,
            "FETCH_REGISTERS": fetch,
            "HAS_KEY_MASK": usual["HAS_KEY_MASK"],
        }
        options = {name: x for name, x in dkdv.options.items() if name != "enable_fp_fusion"}
        shared = device, dtype, dim, options["maxnreg"]
        all_constants = {**usual, **constants}
        kept = [x for name, x in all_constants.items() if name not in dkdv.kernel.numbers]
        of_leaving = compiled("dkdv that leaves dS", *shared, *kept)
        own_constants = own["STAGES"], own["CHUNKS"], own["HAS_KEY_MASK"], rows, _KEYS
        of_from_ds = compiled("dq from dS", *shared, *own_constants)
        self.launches: list[tuple[Launch, Launch]] = []
        for first in range(0, sets, count):
            now = min(count, sets - first)
            begin, end = first * key_tiles, (first + now) * key_tiles
            # Tiles at one position of all of these sets follow one another, if they are as many.
            at_once = now if first % now == 0 else 1
            numbers = {"first_tile": begin, "num_tiles": end, "heads_at_once": at_once}
            leaving = Launch(
                dkdv.kernel, (min(dkdv.grid[0], end - begin), 1),
                {**all_constants, **numbers}, descriptors, of_leaving, **options,
            )  # fmt: skip
            heads = now * heads_per_kv
            num_tiles = heads * -(-length // (2 * rows))
            numbers = {"first": first, "count": heads, "num_tiles": num_tiles}
            from_ds = Launch(
                dq_from_ds_kernel, (min(dkdv.grid[0], num_tiles),), {**own, **numbers},
                own_descriptors, of_from_ds, **{**options, "maxnreg": start},
            )  # fmt: skip
            self.launches.append((leaving, from_ds))

    def run(self, grad_query: Tensor, ds: None = None, **tensors: Tensor | None) -> None:
        """As :meth:`Launch.run` of dK and dV, with the gradient of the query, too."""
        key = tensors["key"]
        assert key is not None
        room = torch.empty(self.shape, dtype=key.dtype, device=key.device)
        for leaving, from_ds in self.launches:
            leaving.run(**tensors, ds=room, grad_query=None)
            from_ds.run(key=key, ds=room, grad_query=grad_query, key_mask=tensors["key_mask"])
