"""How a tensor looks to TMA, and what TMA can not read.

A tensor ``[batch, *space, heads, channels]`` becomes ``[batch, n0, n1, n2, span]``: positions
inside a dilation group per axis, and a last axis in which head and group are an offset. So every
layout with contiguous channels is read in place, whatever its strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten.backends.hopper.gluon_names import TensorDescriptor, gl

_MOST = 2**31 - 1  # TMA coordinates are 32 bits
TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


class View(NamedTuple):
    """Shape and strides for TMA, and strides of one token along three axes and of a head."""

    shape: list[int]
    strides: list[int]
    steps: tuple[int, ...]

    def boxes(self, tensor: Tensor, block: Sequence[int], layout: Any) -> TensorDescriptor:
        """A descriptor of boxes of shape ``block``."""
        return TensorDescriptor(tensor, self.shape, self.strides, block, layout)


def view(shape: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> View:
    """The view of a tensor of that shape and stride; every dilation divides its axis."""
    batch, *space, heads, channels = shape
    missing = 3 - len(space)
    lengths = [n // d for n, d in zip(space, dilation)]
    tokens = stride[1:-2]
    span = channels + (heads - 1) * stride[-2]
    span += sum((d - 1) * s for d, s in zip(dilation, tokens))
    whole = -(-span // 8) * 8  # a valid stride for axes that have one position

    def step(n: int, s: int) -> int:
        return s if n > 1 else whole

    return View(
        [batch, *[1] * missing, *lengths, span],
        [
            step(batch, stride[0]),
            *[whole] * missing,
            *(step(n, s * d) for n, s, d in zip(lengths, tokens, dilation)),
            1,
        ],
        (*[0] * missing, *tokens, stride[-2]),
    )


def unreadable(name: str, x: Tensor, dilation: Sequence[int]) -> str | None:
    """Why TMA can not read ``x [batch, *space, heads, channels]``."""
    if x.stride(-1) != 1:
        return f"reads contiguous channels; `{name}` has stride {x.stride(-1)} there"
    if x.data_ptr() % 16:
        return f"reads from addresses that 16 divides; `{name}` starts elsewhere"
    strides = [s for n, s in zip(x.shape[:-1], x.stride()[:-1]) if n > 1]
    if any(s % 8 or s <= 0 for s in strides):
        return f"reads strides that are multiples of 8 elements, `{name}` has {x.stride()}"
    if any(n % d for n, d in zip(x.shape[1:-2], dilation)):
        return f"reads dilated tokens where the dilation divides the layout {tuple(x.shape[1:-2])}"
    if view(x.shape, x.stride(), dilation).shape[-1] > _MOST or max(strides, default=0) >= 2**39:
        return f"reads offsets of 31 bits; `{name}` is wider"
    return None


def box_layout(channels: int, dtype: torch.dtype) -> Any:
    """Shared memory layout of five-axis boxes with that many channels."""
    return gl.NVMMASharedLayout(min(128, channels * dtype.itemsize), 16, 5)


def tile_count(length: int, size: int) -> int:
    """Tiles that cover an axis."""
    return math.ceil(length / size)
