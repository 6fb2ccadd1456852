"""Packed documents and sequences: the table of tiles, where the Hopper kernels find tokens, and
what masks hide. It is the kernels' own code, beside the definition.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

pytest.importorskip("triton", "3.6")  # the first with Gluon for Hopper

import gluon  # noqa: F401  (before the kernels)
import torch
import triton
import triton.language as tl
from hopper_problems import DOCUMENTS, SEQUENCES, chosen, packed_ways
from test_hopper_parts import DIM, FOUND, geometry_of, grid, numbers, walk_kernel

from natten.backends.hopper import plan as planning
from natten.backends.interface import KINDS, Tiles
from natten.documents import Documents
from natten.neighborhood import Dense, Rule, window_mask

CPU = torch.device("cpu")
STORED: list[Any] = []  # what the program below would store


class Stored:
    """A tensor that takes rows of a tile."""

    def store(self, base: Any, place: Any, row: int) -> None:
        STORED.append(numbers(place))


class Rows:
    """A buffer of a tile; a row of it is its number."""

    def slice(self, start: Any, length: int) -> int:
        assert length == 1
        return int(start)


@triton.jit
def store_kernel(tile_id, tile_table, WARPGROUP: tl.constexpr, ARGUMENTS: tl.constexpr):
    """Store a warpgroup's tile as the kernels do."""
    g = geometry_of(ARGUMENTS, tile_table)
    tile = g.tile(tile_id)
    g.store_tile(Stored(), 0, g.own_side(tile), g.first_of(tile, WARPGROUP), Rows())


def boxes(
    places: list[torch.Tensor], width: int, tokens: int, stores: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that boxes of a row have, and which there are: TMA fills the others with zeros,
    and does not store them.

    No box that is loaded is wholly out of bounds, and none reaches beyond the tensor.
    """
    found, there = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.bool)]
    for zero, end, first in places:
        assert zero == 0 and 0 <= end <= tokens and first >= 0 and (stores or first < tokens)
        at = first + torch.arange(width)
        found.append(end + at - tokens)
        there.append(at < tokens)
    every, real = torch.cat(found), torch.cat(there)
    assert ((every[real] >= 0) & (every[real] < tokens)).all()
    return every, real


def tokens_of(row: torch.Tensor, arguments: Any, of_keys: bool) -> torch.Tensor:
    """The tokens of the tile of a row of the table."""
    length = torch.stack([row[2], row[3], row[5 if of_keys else 4]]).long()
    sizes = list(arguments["TILE"])
    if arguments["SPLIT_AXIS"] < 3:
        sizes[arguments["SPLIT_AXIS"]] *= arguments["WARPGROUPS"]
    token, real = expected_of(row[12:15].long() * torch.tensor(sizes) + grid(*sizes), length)
    return row[1 if of_keys else 0] + token[real]


def expected_of(position: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of a document's tokens at positions, and which there are."""
    real = (position < length).all(1)
    return (position[:, 0] * length[1] + position[:, 1]) * length[2] + position[:, 2], real


def check(
    kind: str, documents: Documents, rule: Rule, tokens: Any, tiles: Tiles, wanted: Any
) -> None:
    """Tiles cover the tokens of all documents; every partner of a token is visible in one block,
    and nothing else is, but zeros where gradients of plain attention's keys see them.

    ``wanted``: for each document, where its tokens of the tiles' kind begin, where those of the
    blocks' kind do, and which pairs attend each other.
    """
    of_keys, is_plain = kind == "dkdv", isinstance(rule, Dense)
    with chosen({kind: tiles}, rule, documents, (DIM, DIM)):
        q, k = (torch.empty(1, n, 1, DIM, dtype=torch.bfloat16, device="meta") for n in tokens)
        plan = planning.plan_for(q, k, k, None, rule, 0.5, documents=documents)
        launch: Any = getattr(plan, kind)
    arguments, (rows, width) = launch.arguments, launch.shape
    table = torch.full((rows, width), 2**30, dtype=torch.int32)
    launch.make.run(documents=documents.table, tile_table=table)
    own_tokens, other_tokens = tokens[::-1] if of_keys else tokens
    _, _, tile_width = arguments["TILE"]
    _, _, block_width = arguments["BLOCK"]
    assert arguments["PIECE"] == (1, 1, block_width)
    count = int(table[0, 0])
    assert 0 < count < rows
    by_start = {first: (other, pairs) for first, other, pairs in wanted if len(pairs)}
    covered = [tokens_of(row, arguments, of_keys) for row in table[1 : 1 + count]]
    assert torch.equal(torch.cat(covered).sort()[0], torch.arange(own_tokens))
    for tile, warpgroup in itertools.product(
        random.sample(range(count), 1), range(arguments["WARPGROUPS"])
    ):
        FOUND.clear()
        walk_kernel[(1,)](tile, None, table, None, warpgroup, arguments)
        ((own, other, first, places, blocks),) = FOUND
        start = int(own[4][0])
        other_start, pairs = by_start[start]
        found, there = boxes(places, tile_width, own_tokens)
        token, real = expected_of(first + grid(*arguments["TILE"]), own[0])
        assert torch.equal(found[real], start + token[real]) and there[real].all()
        STORED.clear()
        store_kernel[(1,)](tile, table, warpgroup, arguments)
        stored, there = boxes(STORED, tile_width, own_tokens, stores=True)
        assert torch.equal(stored[there], start + token[real])
        visible = torch.zeros(len(token), pairs.shape[1], dtype=torch.int64)
        for block_start, block_places, scores in blocks:
            unmasked = (scores > -(2.0**99))[real]
            found, there = boxes(block_places.found, block_width, other_tokens)
            column, is_column = expected_of(block_start + grid(*arguments["BLOCK"]), other[0])
            if pairs.shape[1] == 0:
                continue
            if is_plain and of_keys:
                assert not unmasked[:, ~is_column & there].any()
            else:
                assert not unmasked[:, ~is_column].any()
            assert torch.equal(found[is_column], other_start + column[is_column])
            assert there[is_column].all()
            column, unmasked = column[is_column], unmasked[:, is_column]
            visible[real] = visible[real].index_add(1, column, unmasked.long())
        assert torch.equal(visible[real], pairs[token[real]].long())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layouts, rule", DOCUMENTS[::2])
def test_documents(layouts: Any, rule: Any, kind: str) -> None:
    random.seed(0)
    layouts = [shape for shape in layouts if 0 not in shape]
    documents = Documents.of_layouts(layouts, rule, CPU)
    starts = [0, *itertools.accumulate(map(math.prod, layouts))]
    wanted = []
    for first, shape in zip(starts, layouts):
        pairs = window_mask(rule.fitted(shape), shape, shape)
        wanted.append((first, first, pairs.T if kind == "dkdv" else pairs))
    ways = packed_ways(kind, rule, documents.sizes.space, DIM)
    for tiles in random.sample(ways, 1):
        check(kind, documents, rule, (starts[-1], starts[-1]), tiles, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths, key_lengths, causal", SEQUENCES)
def test_sequences(lengths: Any, key_lengths: Any, causal: bool, kind: str) -> None:
    random.seed(0)
    both = [torch.tensor([0, *itertools.accumulate(each)]) for each in (lengths, key_lengths)]
    documents = Documents.of_sequences(both, [max(lengths), max(key_lengths)])
    rule, wanted = Dense(causal), []
    for first, key_first, *sizes in zip(*both, lengths, key_lengths):
        pairs = window_mask(rule, *((n,) for n in sizes))
        starts = int(first), int(key_first)
        of_keys = kind == "dkdv"
        wanted.append((*starts[:: -1 if of_keys else 1], pairs.T if of_keys else pairs))
    for tiles in random.sample(packed_ways(kind, rule, documents.sizes.space, DIM), 1):
        tokens = sum(lengths), sum(key_lengths)
        check(kind, documents, rule, tokens, tiles, wanted)
