"""All pairs of queries and keys, and how tiles of queries and blocks of keys cover them.

A kernel computes a tile of queries at a time. It visits blocks of keys, from where the tile's first
window starts to where its last one ends, and computes every pair of a block that it visits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...neighborhood import Boundary, group_length, queries_before, query_range
from ..layouts import by
from ..simulator import simulate
from .canvas import (
    ATTENDED,
    PARTLY,
    QUIET_INK,
    TOKEN,
    WASTED,
    Key,
    Panel,
    Rect,
    Text,
    compose,
    square,
)
from .window import (
    Drawn,
    Grid,
    Sizes,
    axis_masks,
    every_axis,
    finish,
    integers,
    layout,
    position,
)

MAX_PAIR_TOKENS = 1024
_SIDE = 640  # width and height of a mask


def draw_mask(
    shape: Sizes,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    boundary: Boundary = "shift",
    queries_per_key: Sizes = 1,
    query_offset: Sizes | None = None,
    query_shape: Sizes | None = None,
    q_tile: Sizes | None = None,
    kv_tile: Sizes | None = None,
    title: str = "",
    caption: str = "",
    legend: bool = False,
    path: str | Path | None = None,
) -> str:
    """Draw the attention mask: one row per query, one column per key.

    Tokens are in row-major order. With tiles they are in the order of the tiles instead, a line
    lies between two tiles of queries, and pairs that are computed and masked are red.

    Args:
        shape: token layout of the keys, one to three axis lengths, of at most 1024 queries.
        kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset: as in
            ``na1d``, ``na2d`` and ``na3d``.
        query_shape: token layout of the queries; None means all from ``query_offset`` on.
        q_tile, kv_tile: queries in a tile and keys in a block, per axis; give both or neither.
        title, caption, legend, path: as in :func:`natten.draw.draw_neighborhood`.

    Returns:
        The picture, a complete SVG document.

    Raises:
        ArgumentError: an argument has a type, shape or value that is not allowed.

    Example:
        >>> draw_mask((4, 4), kernel_size=3, q_tile=(2, 2), kv_tile=(1, 2))[:4]
        '<svg'
    """
    window = kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset
    drawn = layout(shape, window, query_shape, MAX_PAIR_TOKENS)
    drawn = drawn._replace(rule=drawn.rule.without_full_rings(drawn.keys))
    masks = covers = axis_masks(drawn)
    query_order = list(range(math.prod(drawn.queries)))
    key_order = list(range(math.prod(drawn.keys)))
    edges: list[int] = []
    if q_tile is not None or kv_tile is not None:
        q, kv = _tiles(q_tile, kv_tile, drawn.keys)
        tiles = [_tiles_of_queries(drawn, axis, size) for axis, size in enumerate(q)]
        tile_of = _sort_keys(tiles)
        query_order.sort(key=tile_of.__getitem__)
        blocks = zip(drawn.keys, drawn.rule.dilation, kv)
        block_of = _sort_keys([[(x % d, x // d // t) for x in range(n)] for n, d, t in blocks])
        key_order.sort(key=block_of.__getitem__)
        covers = [_computed(drawn, axis, *each) for axis, each in enumerate(zip(tiles, kv))]
        edges = [
            row
            for row in range(1, len(query_order))
            if tile_of[query_order[row]] != tile_of[query_order[row - 1]]
        ]
    needed, computed = (_outer(each)[query_order][:, key_order].int() for each in (masks, covers))
    colors = (TOKEN, WASTED, ATTENDED)
    panel = _matrix((needed + computed).tolist(), colors, edges, title, caption)
    key = [Key(ATTENDED, False, "attended"), Key(TOKEN, False, "not attended")]
    if covers is not masks:
        key[1:] = [Key(WASTED, False, "computed and masked"), Key(TOKEN, False, "not computed")]
    return finish(compose([panel], key if legend else ()), path)


def draw_tiles(
    shape: Sizes,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    boundary: Boundary = "shift",
    queries_per_key: Sizes = 1,
    query_offset: Sizes | None = None,
    query_shape: Sizes | None = None,
    q_tile: Sizes,
    kv_tile: Sizes,
    query: Sizes | None = None,
    title: str = "",
    legend: bool = False,
    path: str | Path | None = None,
) -> str:
    """Draw one tile of queries and the blocks of keys that it visits.

    The tile's tokens carry an orange frame and each block a dark one. Keys that all queries of the
    tile attend are blue, keys that only some attend are light blue, and visited keys that no query
    attends are red. The lines below count the blocks, and the pairs that all tiles together compute
    per pair needed.

    Args:
        shape: token layout of the keys, one to three axis lengths.
        kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset: as in
            ``na1d``, ``na2d`` and ``na3d``.
        query_shape: token layout of the queries; None means all from ``query_offset`` on.
        q_tile, kv_tile: queries in a tile and keys in a block, per axis.
        query: a query of the tile; None is the one in the middle of the queries.
        title, legend, path: as in :func:`natten.draw.draw_neighborhood`.

    Returns:
        The picture, a complete SVG document.

    Raises:
        ArgumentError: an argument has a type, shape or value that is not allowed.

    Example:
        >>> draw_tiles((16, 16), kernel_size=7, q_tile=(4, 4), kv_tile=(2, 8))[:4]
        '<svg'
    """
    window = kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset
    drawn = layout(shape, window, query_shape)
    drawn = drawn._replace(rule=drawn.rule.without_full_rings(drawn.keys))
    at, rule = position(query, drawn.queries), drawn.rule
    q, kv = _tiles(q_tile, kv_tile, drawn.keys)
    tiles = [_tiles_of_queries(drawn, axis, size) for axis, size in enumerate(q)]
    axes = [_walk(drawn, axis, *each) for axis, each in enumerate(zip(tiles, at, kv))]
    in_tile = every_axis([drawn.of_queries(n, axis.tile) for n, axis in enumerate(axes)])
    some, every, visited = (
        every_axis([drawn.of_keys(*each) for each in enumerate(marks)])
        for marks in zip(*((axis.some, axis.every, axis.visited) for axis in axes))
    )

    grid = drawn.grid()
    parts: list[Rect | Text] = []
    for i in range(len(visited)):
        color = ATTENDED if every[i] else PARTLY if some[i] else WASTED if visited[i] else TOKEN
        parts.append(square(*grid.place(i), grid.cell, color, in_tile[i]))
    for pieces in itertools.product(*(itertools.chain(*axis.blocks) for axis in axes)):
        parts += grid.outline(every_axis([drawn.of_keys(*each) for each in enumerate(pieces)]))
    blocks = math.prod(len(axis.blocks) for axis in axes)
    full = math.prod(axis.full for axis in axes)
    found = simulate(
        drawn.keys, rule.kernel_size, rule.stride, rule.dilation, rule.is_causal,
        boundary=rule.boundary, queries_per_key=rule.queries_per_key,
        query_offset=rule.query_offset, query_shape=drawn.queries, q_tile=q, kv_tile=kv,
    )  # fmt: skip
    caption = (
        f"{by(q)} queries, {blocks} blocks of {by(kv)} keys, {full or 'none'} without a mask\n"
        f"all tiles: {found.computed_over_needed:.2f} pairs computed per pair needed"
    )
    description = f"{title or 'Tile'} of {q} queries and blocks of {kv} keys: {drawn}"
    panel = grid.panel(parts, title, caption, description)
    key = (
        Key(TOKEN, True, "queries of the tile"),
        Key(ATTENDED, False, "all of them attend it"),
        Key(PARTLY, False, "some attend it"),
        Key(WASTED, False, "none attends it"),
    )
    return finish(compose([panel], key if legend else ()), path)


class _Walk(NamedTuple):
    """What a tile visits along one axis; tensors are bool and mark the axis's queries or keys."""

    tile: Tensor  # [queries], those of the tile
    some: Tensor  # [keys], those that some query attends
    every: Tensor  # [keys], those that all queries attend
    blocks: list[list[Tensor]]  # [keys] of each block, in two pieces where it goes around a ring
    full: int  # blocks that all queries attend in full

    @property
    def visited(self) -> Tensor:
        """The keys of all blocks, ``[keys]``."""
        return torch.stack([piece for block in self.blocks for piece in block]).any(0)


def _walk(drawn: Drawn, axis: int, tiles: list[tuple[int, int]], x: int, kv: int) -> _Walk:
    """The tile that holds query ``x``, and its blocks of ``kv`` keys."""
    rule, d, length = drawn.rule, drawn.rule.dilation[axis], drawn.keys[axis]
    tile = torch.tensor([each == tiles[x] for each in tiles], device="cpu")
    group, n = tiles[x][0], group_length(length, d, tiles[x][0])
    query = tile.nonzero().flatten()
    start, end = rule.windows(axis, rule.key_tokens(axis, query) // d, n)
    key = torch.arange(length, device="cpu")

    def pieces(first: int, last: int) -> list[Tensor]:
        """The keys at positions ``first .. last - 1``, once for each time around the ring."""
        laps = range(first // n, (last - 1) // n + 1) if rule.boundary[axis] == "circular" else (0,)
        at = (key // d + lap * n for lap in laps)
        return [(key % d == group) & (first <= each) & (each < last) for each in at]

    def keys(first: int, last: int) -> Tensor:
        return sum(pieces(first, last), torch.zeros_like(key)).bool()

    low, high, last_start, first_end = (
        int(each) for each in (start.min(), end.max(), start.max(), end.min())
    )
    blocks = [pieces(first, first + kv) for first in range(low, high, kv)]
    full = sum(last_start <= b and b + kv <= first_end for b in range(low, high, kv))
    return _Walk(tile, keys(low, high), keys(last_start, first_end), blocks, full)


def _computed(drawn: Drawn, axis: int, tiles: list[tuple[int, int]], kv: int) -> Tensor:
    """Pairs that tiles compute along an axis, bool ``[queries, keys]``."""
    firsts = {tile: x for x, tile in reversed(list(enumerate(tiles)))}
    visited = {tile: _walk(drawn, axis, tiles, x, kv).visited for tile, x in firsts.items()}
    return torch.stack([visited[tile] for tile in tiles])


def _tiles_of_queries(drawn: Drawn, axis: int, tile: int) -> list[tuple[int, int]]:
    """For each query of an axis, its dilation group and which tile of the group holds it."""
    rule, length = drawn.rule, drawn.queries[axis]
    d, r, offset = rule.dilation[axis], rule.queries_per_key[axis], rule.offset[axis]
    found = []
    for x in range(offset, offset + length):
        group = x // r % d
        first, _ = query_range(rule, axis, length, group)
        found.append((group, (queries_before(x, group, d, r) - first) // tile))
    return found


def _sort_keys(axes: Sequence[Sequence[tuple[int, int]]]) -> list[list[tuple[int, ...]]]:
    """For each token in row-major order, its groups and then its tiles, of ``axes``."""
    return [list(zip(*token)) for token in itertools.product(*axes)]


def _tiles(
    q_tile: Sizes | None, kv_tile: Sizes | None, lengths: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if q_tile is None or kv_tile is None:
        raise ArgumentError(
            f"`q_tile` and `kv_tile` come together, got {q_tile!r} and {kv_tile!r}."
        )
    both = []
    for name, value in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        tile = integers(name, value)
        if len(tile) != len(lengths) or min(tile) < 1:
            raise ArgumentError(
                f"`{name}` must have one size of at least 1 per axis of {lengths}, got {value!r}."
            )
        both.append(tile)
    return both[0], both[1]


def _outer(axes: Sequence[Tensor]) -> Tensor:
    """The product of one mask per axis, ``[queries, keys]``."""
    product = torch.ones(1, 1, device="cpu")
    for axis in axes:
        product = torch.kron(product, axis.float())
    return product.bool()


def _matrix(
    rows: list[list[int]], colors: Sequence[str], edges: Sequence[int], title: str, caption: str
) -> Panel:
    """Cells of a table as squares; where these are small, equal neighbors become one bar."""
    grid = Grid((len(rows), len(rows[0])), max_width=_SIDE, min_step=1)
    merge = grid.step < 7
    parts: list[Rect | Text] = []
    if merge:
        parts.append(Rect(0, 0, grid.width, grid.height, colors[0]))
    for y, row in enumerate(rows):
        x = 0
        for state, run in itertools.groupby(row):
            count = len(list(run))
            if not merge:
                cells = range(x, x + count)
                parts += [
                    square(i * grid.step, y * grid.step, grid.cell, colors[state]) for i in cells
                ]
            elif state:
                size = count * grid.step, grid.step
                parts.append(Rect(x * grid.step, y * grid.step, *size, colors[state]))
            x += count
    gap = grid.step - grid.cell
    thick = max(1, gap / 2)
    parts += [
        Rect(0, y * grid.step - (gap + thick) / 2, grid.width, thick, QUIET_INK) for y in edges
    ]
    label = "one row per query, one column per key"
    label += ", in the order of the tiles" if edges else ""
    return grid.panel(parts, title, f"{label}\n{caption}".rstrip(), f"{title or 'Mask'}: {label}")
