"""What a layout decides about its tokens in a row (``flat.py``): how they lie, and the factors of
their mask."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...tiling import padded
from ..interface import Shape, Tiles
from ..triton.launch import Launch, per_axis
from ..triton.windows import modes
from .descriptors import Describe, contiguous_view, describe
from .flat import COLUMNS, Flat
from .flat_columns import columns_kernel

NAMES = "query_columns", "key_columns"  # of both factors, as tensors of kernels

# Tokens of a program of the kernel, and what divides the rows of a factor: no block of keys has
# more tokens, so that none goes on beyond the last row.
_AT_ONCE, _ROWS = 64, 128


def row_of(shape: Shape, stride: Shape) -> tuple[Shape, Shape | None]:
    """Shape and stride of a tensor whose tokens are one axis; no stride if they are not equally far
    apart."""
    batch, *space, heads, channels = shape
    row = batch, math.prod(space), heads, channels
    step = _step_of_row(space, stride[1:-2], heads * channels)
    return row, None if step is None else (stride[0], step, *stride[-2:])


def row_of_mask(space: Sequence[int], strides: Shape) -> Shape | None:
    """As :func:`row_of`, the strides of a mask ``[batch or 1, *space]``."""
    step = _step_of_row(space, strides[1:], 1)
    return None if step is None else (strides[0], step)


def _step_of_row(space: Sequence[int], strides: Sequence[int], of_one: int) -> int | None:
    """How far apart the tokens of a layout are, if equally far; of one token, as is said."""
    steps = [(n, step) for n, step in zip(space, strides) if n > 1]
    for (_, outer), (n, inner) in itertools.pairwise(steps):
        if outer != n * inner:
            return None
    return steps[-1][1] if steps else of_one


class FlatColumns:
    """The factors of a rule's mask, and what makes them."""

    def __init__(self, rule: Flat, tokens: int) -> None:
        assert rule.rule is not None
        windows, columns = rule.rule, rule.columns
        self.shape = -(-tokens // _ROWS) * _ROWS, COLUMNS
        arguments: dict[str, Any] = {
            "tokens": tokens,
            **per_axis("N", rule.space),
            **per_axis("K", windows.kernel_size),
            **per_axis("S", windows.stride),
            **per_axis("D", windows.dilation),
            **per_axis("E", columns.ends),
            "MODES": modes(windows, rule.space),
            "BY_POSITION": padded(columns.by_position, False),
            "M": _AT_ONCE,
            "C": COLUMNS,
        }
        self.launch = Launch(columns_kernel, (self.shape[0] // _AT_ONCE,), arguments)

    def descriptors(self, tiles: Tiles) -> dict[str, Describe]:
        """Descriptors of both factors by name, in blocks of these tiles."""
        view = contiguous_view((1, self.shape[0], 1, COLUMNS), (1,))
        blocks = zip(NAMES, (tiles.q_block, tiles.kv_block))
        return {
            name: describe(view, (1, *block, COLUMNS), torch.bfloat16) for name, block in blocks
        }

    def make(self, device: torch.device) -> dict[str, Tensor | None]:
        """Both factors by name, made for each call: a CUDA graph may outlive what a plan keeps."""
        made = torch.empty(2, *self.shape, dtype=torch.bfloat16, device=device)
        factors: dict[str, Tensor | None] = dict(zip(NAMES, made))
        self.launch.run(**factors)
        return factors
