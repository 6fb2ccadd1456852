"""Tiles of parts of a layout; test_parts.py in the folder ``interpreter`` tests the kernels."""

from __future__ import annotations

import pytest

from natten.backends.triton import releases
from natten.neighborhood import Neighborhood

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
