"""Problems for the Hopper kernels, and the ways to cut them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from natten import tuning
from natten.backends.hopper import costs
from natten.backends.hopper import tiles as tiling
from natten.backends.interface import Tiles
from natten.documents import Documents
from natten.neighborhood import Dense, Neighborhood, Rule

# shape, window, stride, dilation, causal
PROBLEMS: list[tuple[Any, ...]] = [
    ((19,), 7, 1, 1, False),
    ((17, 19), (7, 7), 1, 1, False),
    ((40, 24), (16, 12), (4, 8), 1, False),
    ((24, 36), (5, 7), (2, 1), (2, 3), (True, False)),
    ((3, 100), (2, 50), 1, 1, False),
    ((20, 33), (9, 11), (3, 2), 1, (False, True)),
    ((9, 13, 17), (5, 7, 9), 1, 1, False),
    ((8, 16, 32), (8, 8, 16), 1, 1, (True, False, False)),
    ((10, 24, 30), (6, 12, 16), (2, 4, 4), 1, False),
    ((1,), 1, 1, 1, False),
    ((20, 1), (7, 1), 1, 1, False),
    ((4, 4, 1), (3, 2, 1), 1, 1, False),
]


def name_of(problem: Any) -> str:
    shape, _, stride, _, causal = problem
    return "x".join(map(str, shape)) + f"-{stride}-{causal}"


def rule_of(shape: Any, *parameters: Any) -> Neighborhood:
    return Neighborhood.create(len(shape), *parameters)


def each_way(
    kind: str, rule: Neighborhood, shape: Any, dim: int = 64, value_dim: int = 0
) -> list[Tiles]:
    """The best tiles of each kind of program and mask; values are as wide as keys by default."""
    found = {}
    dims = dim, value_dim or dim
    for tiles in tiling.candidates(kind, rule, shape, shape, *dims):
        mask = costs.mask(kind, rule, shape, shape, tiles, costs.work(kind, *dims))
        found.setdefault((tiles.num_warps, mask.kind, mask.by_row, mask.steps), tiles)
    return list(found.values())


def partners(kind: str, rule: Neighborhood, axis: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-past-last key of each query, or query of each key."""
    tokens = torch.arange(n)
    start, stop = rule.windows(axis, tokens, n)
    if kind != "dkdv":
        return start, stop
    attended = (start <= tokens[:, None]) & (tokens[:, None] < stop)  # [key, query]
    return attended.int().argmax(1), n - attended.flip(1).int().argmax(1)


def part(queries: Any, keys: Any, window: Any, **options: Any) -> Any:
    """Layouts of queries and of keys, and the rule."""
    rule = Neighborhood.create(len(keys), window, **options)
    rule.check(queries, keys)
    return queries, keys, rule


TIME = {"is_causal": (True, False), "boundary": ("truncate", "shift")}
PARTS = [
    part((1,), (90,), 20, query_offset=89),
    part((1,), (1,), 20, query_offset=0, is_causal=True, boundary="truncate"),
    part((70,), (500,), 33, query_offset=201),
    part((150,), (400,), 64, stride=16, query_offset=83),
    part((37,), (101,), 9, dilation=4, query_offset=13),
    part((2,), (101,), 9, stride=3, dilation=5, query_offset=98),
    part((101,), (101,), 9, dilation=4),
    part((3,), (3,), 9, dilation=5, boundary="truncate"),
    part((130,), (130,), 200, boundary="truncate"),
    part((130,), (130,), 31, stride=16, boundary="truncate"),
    part((120,), (15,), 9, queries_per_key=8),
    part((77,), (50,), 9, queries_per_key=3, stride=2, query_offset=31, is_causal=True),
    part((9, 20), (20, 20), 7, query_offset=(7, 0)),
    part((13, 27), (29, 30), (5, 7), stride=(2, 3), dilation=(4, 3), query_offset=(16, 3)),
    part((20, 30), (20, 30), (41, 13), boundary="truncate"),
    part((31, 33), (8, 9), (5, 3), queries_per_key=(8, 4), query_offset=(20, 2)),
    part((1, 40), (6, 40), (4, 9), query_offset=(5, 0), **TIME),
    part((5, 9, 11), (13, 15, 17), (3, 4, 5), dilation=(2, 3, 2), query_offset=(3, 5, 1)),
    part((6, 8, 9), (6, 8, 9), (5, 3, 12), boundary="truncate"),
    part((7, 7, 9), (7, 7, 9), (1, 4, 6), dilation=(4, 1, 1)),
    part((9, 9, 5), (9, 9, 5), (8, 1, 4), stride=(3, 1, 1), dilation=(1, 4, 1)),
]
RING = {"boundary": "circular"}
RINGS = [
    part((400,), (400,), 64, **RING),
    part((256,), (256,), 250, **RING),  # pieces meet at both ends
    # Tiles at one end whose blocks, begun earlier to meet there, would cross the other end, too.
    part((148,), (148,), 100, **RING),
    part((24, 8), (24, 8), (4, 3), stride=(3, 1), dilation=(4, 1), **RING),
    part((10, 9, 10), (10, 9, 10), (2, 9, 4), stride=(2, 1, 1), dilation=(1, 1, 2), **RING),
    part((384,), (384,), 90, stride=8, dilation=2, **RING),
    part((20, 24), (20, 24), (5, 6), **RING),
    part((16, 36), (16, 36), (9, 8), stride=(4, 3), dilation=(1, 2), **RING),
    part((17, 20), (17, 20), 7, boundary=("truncate", "circular")),
    part((9, 10, 12), (9, 10, 12), (3, 4, 5), boundary=("circular", "shift", "circular")),
    part(
        (3, 12, 14), (3, 12, 14), (2, 5, 3), is_causal=(True, False, False),
        boundary=("shift", "circular", "circular"),
    ),
]  # fmt: skip


# Windows that are few along each axis: layouts and rules.
FLAT = [
    (shape, Neighborhood.create(len(shape), window, **options))
    for shape, window, options in (
        ((70,), 62, {"stride": 5}),
        ((13,), 5, {"is_causal": True, "boundary": "truncate"}),
        ((9, 21), (8, 15), {}),
        ((11, 16), (11, 9), {"stride": (1, 4)}),
        ((12, 6), (12, 3), {"dilation": (1, 2)}),
        ((5, 6, 9), (4, 9, 9), {"boundary": ("shift", "truncate", "circular")}),
        ((7, 5, 8), (6, 4, 8), {"is_causal": (True, False, False), "stride": (3, 2, 1)}),
    )
]

# Of plain attention: queries, keys, the rule.
PLAIN = [
    ((length,), (key_length,), Dense(causal))
    for causal in (False, True)
    for length, key_length in ((384, 384), (1, 1), (197, 197), (1, 300), (500, 70), (130, 700))
]


def id_of(value: Any) -> str | None:
    """The name of a part, a ring or plain attention in tests."""
    queries, keys, rule = value
    name = "-of-".join("x".join(map(str, each)) for each in (queries, keys))
    if isinstance(rule, Dense):
        return name + ("-causal" if rule.causal else "-dense")
    return f"{name}-{'x'.join(map(str, rule.kernel_size))}"


def windows(rank: int, window: Any, *parameters: Any, **options: Any) -> Neighborhood:
    return Neighborhood.create(rank, window, *parameters, **options)


# Layouts of documents, and a rule.
IMAGES = [(20, 33), (5, 4), (16, 16), (1, 1), (0, 7), (40, 9), (3, 70)]
VIDEOS = [(4, 9, 12), (2, 3, 30), (1, 1, 5), (6, 8, 8)]
DOCUMENTS: list[tuple[list[tuple[int, ...]], Neighborhood]] = [
    ([(500,), (3,), (70,), (64,), (1,)], windows(1, 64)),
    ([(300,), (9,), (130,)], windows(1, 50, 8, is_causal=True)),
    (IMAGES, windows(2, 7)),
    (IMAGES, windows(2, (9, 12), (3, 4), is_causal=(True, False))),
    (IMAGES, windows(2, (30, 5), boundary="truncate")),
    (VIDEOS, windows(3, (3, 5, 7))),
    (VIDEOS, windows(3, (6, 4, 4), (1, 2, 2), is_causal=(True, False, False))),
]

# Lengths of queries and of keys, and whether attention is causal.
LENGTHS = ([130, 0, 1, 77, 300, 64], [200, 5, 0, 300, 70, 64])
SEQUENCES = [(*LENGTHS, causal) for causal in (False, True)]


def packed_ways(kind: str, rule: Rule, space: Any, dim: int) -> list[Tiles]:
    """The best tiles of each kind of program and mask."""
    fitted = rule if isinstance(rule, Dense) else rule.fitted(space)
    found: dict[Any, Tiles] = {}
    work = costs.work(kind, dim, dim)
    for tiles in tiling.candidates(kind, fitted, space, space, dim, dim, packed=True):
        mask = costs.mask(kind, fitted, space, space, tiles, work, packed=True)
        found.setdefault((tiles.num_warps, mask.kind, mask.steps), tiles)
    return list(found.values())


@contextlib.contextmanager
def chosen(tiles: dict[str, Tiles], rule: Rule, documents: Documents, dims: Any) -> Iterator[None]:
    """Have the kernels run these tiles."""
    _, space, key_space = documents.sizes
    fitted = rule if isinstance(rule, Dense) else rule.fitted(space)
    with contextlib.ExitStack() as stack:
        for kind, each in tiles.items():
            name = tiling.key(kind, fitted, space, key_space, *dims, 2, packed=True)
            stack.enter_context(tuning.trial(name, list(each)))
        yield
