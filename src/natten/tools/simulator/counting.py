"""How many pairs an axis needs, and how many blocks its tiles visit, for many windows at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import tiling
from ...neighborhood import Neighborhood, window_bounds
from .kernels import Axis
from .layer import Layer

_AT_A_TIME = 1 << 17  # how many tiles or positions, times windows, are counted at a time


def sums_positions(layer: Layer, axis: int) -> bool:
    """Whether the windows of an axis differ in size, so that each query is looked at."""
    return layer.rule.is_causal[axis] or layer.rule.boundary[axis] == "truncate"


def needed_pairs(layer: Layer, axis: int, windows: Sequence[tuple[int, int]]) -> Tensor:
    """Pairs of a query and a key that attend each other, for every ``(kernel_size, stride)``."""
    rule = layer.rule
    kernel, stride = torch.tensor(windows, device="cpu")[:, :, None].unbind(1)
    needed = torch.zeros(len(windows), dtype=torch.float64, device="cpu")
    for (begin, end, n), groups in layer.groups(axis).items():
        if not sums_positions(layer, axis):
            needed += groups * (end - begin) * kernel[:, 0]
            continue
        position = torch.arange(begin, end, device="cpu") // rule.queries_per_key[axis]
        most = max(1, _AT_A_TIME // len(position))
        sums = []
        for k, s in zip(kernel.split(most), stride.split(most)):
            first, last = window_bounds(
                position, n, k, s, rule.is_causal[axis], rule.boundary[axis]
            )  # fmt: skip
            sums.append((last - first).sum(-1))
        needed += groups * torch.cat(sums)
    return needed


def _bounds(
    position: Tensor, n: int, kernel: Tensor, stride: Tensor, rule: Neighborhood, axis: int
) -> tuple[Tensor, Tensor]:
    """What kernels take for the first and one-past-last key of queries ``[windows, queries]``.

    A window that fills a ring is all of it, wherever it begins.
    """
    causal, boundary = rule.is_causal[axis], rule.boundary[axis]
    start, end = window_bounds(position, n, kernel, stride, causal, boundary)
    if boundary == "circular":
        start, end = start.where(kernel != n, 0), end.where(kernel != n, n)
    return start, end


def count_axis(
    layer: Layer,
    axis: int,
    windows: Sequence[tuple[int, int]],
    needed: Tensor,
    q_block: int,
    kv_block: int,
    warpgroups: int,
) -> Axis:
    """Count what one axis contributes, for every ``(kernel_size, stride)`` of ``windows``.

    Args:
        layer, axis, windows: what is counted.
        needed: what :func:`needed_pairs` says of them.
        q_block, kv_block, warpgroups: the tiles, as in :class:`Tiling`.
    """
    most = max(1, _AT_A_TIME * q_block // layer.queries[axis])
    if len(windows) > most:
        parts = [
            count_axis(
                layer, axis, windows[i : i + most], needed[i : i + most], q_block, kv_block,
                warpgroups,
            )
            for i in range(0, len(windows), most)
        ]  # fmt: skip
        names = (name for name in Axis._fields if name != "q_blocks")
        joined: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in names
        }
        return parts[0]._replace(**joined)
    r = layer.rule.queries_per_key[axis]
    kernel, stride = torch.tensor(windows, device="cpu")[:, :, None].unbind(1)
    visited = full = most_visited = fetched = torch.zeros_like(needed)
    q_blocks = 0
    tile = q_block * warpgroups
    for (begin, end, n), groups in layer.groups(axis).items():

        def bounds(query: Tensor, begin: int = begin, end: int = end, n: int = n) -> Any:
            position = (begin + query).clamp(max=end - 1) // r
            return _bounds(position, n, kernel, stride, layer.rule, axis)

        first = torch.arange(0, end - begin, tile, device="cpu")  # of each tile
        q_blocks += groups * len(first) * warpgroups
        origin, _ = bounds(first)
        _, tile_end = bounds(first + tile - 1)
        fetched = fetched + groups * warpgroups * (-((origin - tile_end) // kv_block)).sum(-1)
        for warpgroup in range(warpgroups):
            own = first + warpgroup * q_block
            low, first_end = bounds(own)
            last_start, high = bounds(own + q_block - 1)
            count = tiling.count_blocks(
                low, last_start, first_end, high, kv_block,
                torch.zeros_like(low) if layer.aligned else origin,
            )  # fmt: skip
            visited = visited + groups * count.visited
            full = full + groups * count.full
            most_visited = torch.maximum(most_visited, count.most)
    slides = (stride[:, 0] == 1) & (not layer.rule.is_causal[axis]) & (r == 1)
    return Axis(needed, visited, full, most_visited, fetched, slides, q_blocks)
