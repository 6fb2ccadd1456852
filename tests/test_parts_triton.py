"""Tiles and plans of parts of a layout and of finer queries; test_parts.py and test_split.py in the
folder ``interpreter`` test the kernels."""

from __future__ import annotations

import pytest
import torch

from natten.backends.interface import Shape
from natten.backends.triton import releases
from natten.neighborhood import Dense, Neighborhood, Rule

FOUND = releases.release(releases.version() or "")
pytestmark = pytest.mark.skipif(FOUND < releases.OLDEST, reason="needs Triton 3.4 or newer")


KINDS = ("forward", "dq", "dkdv")


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_and_lengths_of_keys_change_no_tiles(kind: str) -> None:
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    found = set()
    for offset, length in ((0, 16), (1, 17), (16, 40), (900, 999)):
        rule = Neighborhood.create(2, (9, 7), 1, 1, (True, False), "truncate", 1, (offset, 0))
        found.add(tiles.choose(kind, rule, (8, 24), (length, 24), 64, 64, 2))
    assert len(found) == 1


def test_tiles_of_few_queries_are_small() -> None:
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    rule = Neighborhood.create(2, 7, query_offset=(3, 0))
    for length, least in ((1, 1), (2, 2), (32, 4)):
        found = tiles.choose("forward", rule, (length, 32), (64, 32), 64, 64, 2)
        assert least <= found.q_block[1] <= 2 * length, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("boundary", ["shift", "truncate", "circular"])
def test_computed_pairs_of_parts(kind: str, boundary: str) -> None:
    """Those of two halves are those of all, and on a ring every tile has as many."""
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    found = tiles.Tiles((1, 1, 8), (1, 1, 16), 4, 2)

    def pairs(length: int, r: int = 1, offset: int | None = None) -> int:
        rule = Neighborhood.create(1, 21, 1, 2, False, boundary, r, offset)
        return tiles.computed_pairs(kind, rule, (length,), (256,), found)

    halves = pairs(128, offset=0) + pairs(128, offset=128)
    if kind == "dkdv":  # tiles of keys near the middle are in both, with a block each
        assert pairs(256) <= halves <= pairs(256) + 2 * 3 * 8 * 16 * 2
    else:
        assert halves == pairs(256) == pairs(256, offset=0)
    if boundary == "circular" and kind != "dkdv":
        per_tile = 2 * 8 * 16  # of 28 keys, or of 22, where eight queries stand at two of them
        assert pairs(256) == 32 * per_tile and pairs(1024, r=4) == 128 * per_tile


def test_few_tiles_of_keys_are_shared() -> None:
    """Programs are about as many as a GPU runs, and each has enough to do."""
    plan = pytest.importorskip("natten.backends.triton.plan")

    def grid(heads: tuple[int, int], rule: Rule, *shapes: Shape, dim: int = 64) -> Shape:
        (queries, keys), (q_heads, k_heads) = shapes, heads
        q, k = torch.empty(1, *queries, q_heads, dim), torch.empty(1, *keys, k_heads, dim)
        found = plan.plan_for(q, k, k, None, None, rule, 1.0).dkdv
        assert found.arguments["SPLIT"] == isinstance(found, plan.Split)
        return found.launch.grid if isinstance(found, plan.Split) else found.grid

    finer = Neighborhood.create(2, 9, queries_per_key=8)
    programs, of_blocks, of_heads = grid((1, 1), finer, (224, 224), (28, 28))
    assert of_heads == 1 and 264 < programs * of_blocks <= 528
    # Query heads are shared first.
    assert grid((16, 1), Dense(), (16384,), (77,))[1:] == (11, 16)
    assert grid((64, 1), Dense(), (32,), (32,))[1:] == (1, 8)
    # Enough tiles; few queries; few blocks of them.
    one, causal = Neighborhood.create(2, 7), Neighborhood.create(1, 512, is_causal=True)
    assert grid((64, 64), one, (56, 56), (56, 56))[1:] == (1, 1)
    assert grid((8, 1), one, (8, 8), (8, 8))[1:] == (1, 1)
    assert grid((4, 4), causal, (1024,), (1024,))[1:] == (1, 1)


def test_sums_of_shared_tiles_take_little_memory() -> None:
    """However many keys a part has beside those that its queries attend."""
    plan = pytest.importorskip("natten.backends.triton.plan")
    tokens = []
    for length in (2048, 8192, 2**18):
        rule = Neighborhood.create(1, 1024, is_causal=True, query_offset=length - 512)
        q, k = torch.empty(1, 512, 16, 64), torch.empty(1, length, 1, 64)
        found = plan.plan_for(q, k, k, None, None, rule, 1.0).dkdv
        # The same kernel, also where one program has a tile.
        assert isinstance(found, plan.Split) and found.arguments["SPLIT"]
        _, of_blocks, of_heads = found.launch.grid
        tokens.append(length * of_blocks * of_heads)
    tile = torch.Size(found.arguments["KV_BLOCK"]).numel()
    assert tokens[0] > 2048 and max(tokens[:2]) <= 528 * tile and tokens[2] == 2**18
