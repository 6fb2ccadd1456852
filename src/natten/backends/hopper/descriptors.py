"""How a tensor looks to TMA, and what TMA can not read.

A tensor ``[batch, *space, heads, channels]`` becomes ``[batch, n0, n1, n2, span]``: positions
inside a dilation group per axis, and a last axis in which head and group are an offset. So every
layout with contiguous channels is read in place, whatever its strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten.backends.hopper.gluon_names import TensorDescriptor, gl

_MOST = 2**31 - 1  # TMA coordinates are 32 bits


class View(NamedTuple):
    """Shape and strides for TMA, and strides of one token along three axes and of a head."""

    shape: list[int]
    strides: list[int]
    steps: tuple[int, ...]


class Boxes:
    """Descriptors of boxes of shape ``block`` of tensors that have a view."""

    def __init__(self, view: View, block: Sequence[int], layout: Any) -> None:
        self.view, self.block, self.layout = view, list(block), layout

    def __call__(self, tensor: Tensor) -> TensorDescriptor:
        """The descriptor of one, which is on the current device."""
        if tensor.is_cuda:
            # Encoding it needs a context, which a new thread has after a call of CUDA's runtime.
            torch.cuda.set_device(tensor.device)
        return TensorDescriptor(tensor, self.view.shape, self.view.strides, self.block, self.layout)


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
        # Only what is ever a multiple of: strides of axes without groups can be of any size.
        (
            *[0] * missing,
            *(s if d > 1 else 0 for s, d in zip(tokens, dilation)),
            stride[-2] if heads > 1 else 0,
        ),
    )


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, n = [], 1
    for length in reversed(shape):
        strides.append(n)
        n *= length
    return tuple(reversed(strides))


def too_wide(shape: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether a dilation group of a contiguous tensor is farther away than TMA can say."""
    return view(shape, contiguous(shape), dilation).shape[-1] > _MOST


def readable(x: Tensor, dilation: Sequence[int]) -> Tensor:
    """``x [batch, *space, heads, channels]``, copied if TMA can not read it where it is.

    TMA reads contiguous channels, from addresses and with strides that 16 bytes divide.
    """
    x = x.resolve_neg()
    if x.data_ptr() % 16 == 0:
        if x.is_contiguous():
            return x
        strides = [s for n, s in zip(x.shape[:-1], x.stride()[:-1]) if n > 1]
        aligned = x.stride(-1) == 1 and all(s > 0 and s % 8 == 0 for s in strides)
        if aligned and view(x.shape, x.stride(), dilation).shape[-1] <= _MOST:
            return x
    return x.clone(memory_format=torch.contiguous_format)


def box_layout(channels: int, dtype: torch.dtype) -> Any:
    """Shared memory layout of five-axis boxes with that many channels."""
    return gl.NVMMASharedLayout(min(128, channels * dtype.itemsize), 16, 5)
