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
from ...neighborhood import Neighborhood
from ..simulator import simulate
from .canvas import (
    ATTENDED,
    INK,
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
_FRAME = 1.5  # thickness of a block's frame


def draw_mask(
    shape: Sizes,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
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
        shape: token layout, one to three axis lengths, at most 1024 tokens.
        kernel_size, stride, dilation, is_causal: as in ``na1d``, ``na2d`` and ``na3d``.
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
    lengths, rule = layout(shape, kernel_size, stride, dilation, is_causal, MAX_PAIR_TOKENS)
    masks = axis_masks(rule, lengths)
    tokens = list(itertools.product(*(range(n) for n in lengths)))
    query_order = key_order = list(range(len(tokens)))
    covers: list[Tensor] = masks
    edges: list[int] = []
    if q_tile is not None or kv_tile is not None:
        q, kv = _tiles(q_tile, kv_tile, lengths)
        tile_of = [_tile_of(rule, q, token) for token in tokens]
        query_order = sorted(query_order, key=tile_of.__getitem__)
        key_order = sorted(key_order, key=lambda i: _tile_of(rule, kv, tokens[i]))
        covers = [_computed(rule, axis, n, q[axis], kv[axis]) for axis, n in enumerate(lengths)]
        edges = [
            row
            for row in range(1, len(tokens))
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
        shape: token layout, one to three axis lengths.
        kernel_size, stride, dilation, is_causal: as in ``na1d``, ``na2d`` and ``na3d``.
        q_tile, kv_tile: queries in a tile and keys in a block, per axis.
        query: a token of the tile; None is the middle of the layout.
        title, legend, path: as in :func:`natten.draw.draw_neighborhood`.

    Returns:
        The picture, a complete SVG document.

    Raises:
        ArgumentError: an argument has a type, shape or value that is not allowed.

    Example:
        >>> draw_tiles((16, 16), kernel_size=7, q_tile=(4, 4), kv_tile=(2, 8))[:4]
        '<svg'
    """
    lengths, rule = layout(shape, kernel_size, stride, dilation, is_causal)
    at = position(query, lengths)
    q, kv = _tiles(q_tile, kv_tile, lengths)
    axes = [_walk(rule, axis, n, at[axis], q[axis], kv[axis]) for axis, n in enumerate(lengths)]
    in_tile = every_axis([axis.tile for axis in axes])
    some, every = (
        every_axis([axis.some for axis in axes]),
        every_axis([axis.every for axis in axes]),
    )
    visited = every_axis([axis.blocks.sum(0) > 0 for axis in axes])

    grid = Grid(lengths)
    parts: list[Rect | Text] = []
    for i in range(len(visited)):
        color = ATTENDED if every[i] else PARTLY if some[i] else WASTED if visited[i] else TOKEN
        parts.append(square(*grid.place(i), grid.cell, color, in_tile[i]))
    blocks = list(itertools.product(*(axis.blocks for axis in axes)))
    for block in blocks:
        parts += _outline(grid, [int(i) for i, inside in enumerate(every_axis(block)) if inside])
    full = math.prod(axis.full for axis in axes)
    found = simulate(
        lengths, rule.kernel_size, rule.stride, rule.dilation, rule.is_causal, q_tile=q, kv_tile=kv
    )
    caption = (
        f"{_by(q)} queries, {len(blocks)} blocks of {_by(kv)} keys, "
        f"{full or 'none'} without a mask\n"
        f"all tiles: {found.computed_over_needed:.2f} pairs computed per pair needed"
    )
    description = f"{title or 'Tile'} of {q} queries and blocks of {kv} keys: {rule}"
    panel = grid.panel(parts, title, caption, description)
    key = (
        Key(TOKEN, True, "queries of the tile"),
        Key(ATTENDED, False, "all of them attend it"),
        Key(PARTLY, False, "some attend it"),
        Key(WASTED, False, "none attends it"),
    )
    return finish(compose([panel], key if legend else ()), path)


class _Walk(NamedTuple):
    """What a tile visits along one axis; the tensors are bool and mark the axis's tokens."""

    tile: Tensor  # [length], queries of the tile
    some: Tensor  # [length], keys that some query attends
    every: Tensor  # [length], keys that all queries attend
    blocks: Tensor  # [blocks, length], keys of each block
    full: int  # blocks that all queries attend in full


def _walk(rule: Neighborhood, axis: int, length: int, x: int, q: int, kv: int) -> _Walk:
    """The tile of ``q`` queries that holds token ``x``, and its blocks of ``kv`` keys."""
    d = rule.dilation[axis]
    token = torch.arange(length, device="cpu")
    group, at = token % d == x % d, token // d
    tile = group & (at // q == x // d // q)
    n = int(group.sum())
    start, end = rule.windows(axis, at[tile], n)
    low, high = int(start.min()), int(end.max())
    every = group & (at >= start.max()) & (at < end.min())
    blocks = torch.stack([group & (at >= b) & (at < b + kv) for b in range(low, high, kv)])
    full = sum(int((block & every).sum()) == kv for block in blocks)
    return _Walk(tile, group & (at >= low) & (at < high), every, blocks, full)


def _computed(rule: Neighborhood, axis: int, length: int, q: int, kv: int) -> Tensor:
    """Pairs that tiles compute along an axis, bool ``[length, length]``."""
    walks = (_walk(rule, axis, length, x, q, kv) for x in range(length))
    return torch.stack([walk.blocks.any(0) for walk in walks])


def _tile_of(rule: Neighborhood, tile: Sequence[int], token: Sequence[int]) -> list[int]:
    """The sort key of a token's tile: dilation group, then index of the tile, on each axis."""
    groups = [x % d for x, d in zip(token, rule.dilation)]
    return groups + [x // d // t for x, d, t in zip(token, rule.dilation, tile)]


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
    """The product of one mask ``[length, length]`` per axis, ``[tokens, tokens]``."""
    product = torch.ones(1, 1, device="cpu")
    for axis in axes:
        product = torch.kron(product, axis.float())
    return product.bool()


def _matrix(
    rows: list[list[int]], colors: Sequence[str], edges: Sequence[int], title: str, caption: str
) -> Panel:
    """Cells of a table as squares; where these are small, equal neighbors become one bar."""
    grid = Grid((len(rows), len(rows)), max_width=_SIDE, min_step=1)
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


def _outline(grid: Grid, tokens: Sequence[int]) -> list[Rect | Text]:
    """A frame around tokens in each slice, in the middle of the gap that neighbors share."""
    frames: list[Rect | Text] = []
    out = (grid.step - grid.cell + _FRAME) / 2
    for _, group in itertools.groupby(tokens, key=lambda i: i // (grid.rows * grid.columns)):
        inside = list(group)
        (left, top), (right, bottom) = grid.place(inside[0]), grid.place(inside[-1])
        width, height = right - left + grid.cell, bottom - top + grid.cell
        frames.append(
            Rect(
                left - out, top - out, width + 2 * out, height + 2 * out, "none", 3, INK, _FRAME
            )
        )  # fmt: skip
    return frames


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
