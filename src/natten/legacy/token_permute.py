"""0.21's token permutation in plain PyTorch, which orders tokens by dilation groups and tiles.

No operator here needs it. It is for old code that calls it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError

__all__ = ["token_permute_operation", "token_unpermute_operation"]


def _padded(layout: Sequence[int], tile: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """The layout inside one dilation group, padded to whole tiles."""
    return [math.ceil(math.ceil(n / t) / d) * t for n, t, d in zip(layout, tile, dilation)]


def _order(rank: int, flip: bool) -> list[int]:
    """The order in which ``[batch, (tiles, tile, dilation) per axis, heads, dim]`` is permuted."""
    axes = list(reversed(range(rank))) if flip else list(range(rank))
    dilation, tiles, tile = ([3 * a + part for a in axes] for part in (3, 1, 2))
    return [0, *dilation, *tiles, *tile, 3 * rank + 1, 3 * rank + 2]


def _check(name: str, value: Any, rank: int) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) != rank:
        raise ArgumentError(f"`{name}` must be a tuple of {rank} integers, got {value!r}.")
    return tuple(value)


def token_permute_operation(
    tensor: Tensor,
    tile_shape: Sequence[int],
    dilation: Sequence[int] | None = None,
    flip_tiled_dims: bool = True,
    use_torch: bool = True,
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Pad ``[batch, *space, heads, dim]`` with zeros to whole tiles and reorder its tokens.

    Returns:
        ``[batch * dilation groups, tokens of a group, heads, dim]``, the token layout, and the
        padded token layout of a group.
    """
    batch, *layout, heads, dim = tensor.shape
    rank = len(layout)
    tile = _check("tile_shape", tile_shape, rank)
    gaps = _check("dilation", dilation or (1,) * rank, rank)
    inner = _padded(layout, tile, gaps)
    missing = [n * d - length for n, d, length in zip(inner, gaps, layout)]
    x = F.pad(tensor, (0, 0, 0, 0, *(p for m in reversed(missing) for p in (0, m))))
    sizes = [size for n, t, d in zip(inner, tile, gaps) for size in (n // t, t, d)]
    x = x.reshape(batch, *sizes, heads, dim).permute(_order(rank, flip_tiled_dims))
    x = x.reshape(batch * math.prod(gaps), math.prod(inner), heads, dim)
    return x.contiguous(), tuple(layout), tuple(inner)


def token_unpermute_operation(
    tensor: Tensor,
    token_layout_shape: Sequence[int],
    tile_shape: Sequence[int],
    dilation: Sequence[int] | None = None,
    flip_tiled_dims: bool = True,
    use_torch: bool = True,
) -> Tensor:
    """Undo :func:`token_permute_operation`: ``[batch, *token_layout_shape, heads, dim]``."""
    rank = len(token_layout_shape)
    tile = _check("tile_shape", tile_shape, rank)
    gaps = _check("dilation", dilation or (1,) * rank, rank)
    inner = _padded(token_layout_shape, tile, gaps)
    batch, (heads, dim) = tensor.shape[0] // math.prod(gaps), tensor.shape[-2:]
    sizes = [size for n, t, d in zip(inner, tile, gaps) for size in (n // t, t, d)]
    order = _order(rank, flip_tiled_dims)
    full = [batch, *sizes, heads, dim]
    x = tensor.reshape([full[i] for i in order])
    x = x.permute([order.index(i) for i in range(len(order))])
    x = x.reshape(batch, *(n * d for n, d in zip(inner, gaps)), heads, dim)
    for axis, length in enumerate(token_layout_shape):
        x = x.narrow(1 + axis, 0, length)
    return x.contiguous()
