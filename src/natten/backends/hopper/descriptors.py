"""How a tensor looks to TMA, and what TMA can not read.

A tensor ``[batch, *space, heads, channels]`` becomes ``[bases, n0, n1, n2, channels]``: a first
axis of everywhere that the rows of a batch entry's head and dilation group may begin, and positions
inside a group per axis. So every layout with contiguous channels is read in place, whatever its
strides. Blocks may have more channels than a head: TMA fills them with zeros, and does not store
them.

Where a dilation does not divide an axis, groups have ``n`` positions, and from one group on one
less. The axis has one bound for all of them. So the view begins ``dilation`` tokens before the
tensor: of a short group, positions count from there, as 1 to ``n - 1``; of the others, bases are
``dilation`` tokens later, and positions count from 0. Nobody asks for position 0 of a short group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...neighborhood import group_length
from ...tuning import Bounded
from ..interface import Shape
from ..triton.fast_launch import KEPT
from .gluon_names import TensorDescriptor, gl
from .tiles import MOST


class View(NamedTuple):
    """Shape and strides for TMA; how far apart along the first axis are batch entries, tokens
    along three axes, and heads; and how many numbers before the tensor the view begins."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    steps: tuple[int, ...]
    before: int = 0


class _Earlier:
    """What a descriptor asks of a tensor, for a view that begins before it."""

    def __init__(self, tensor: Tensor, before: int) -> None:
        self.tensor, self.dtype = tensor, tensor.dtype
        self._bytes = before * tensor.itemsize

    def data_ptr(self) -> int:
        return self.tensor.data_ptr() - self._bytes


class Describe:
    """A function of a tensor that has a view: its descriptor, for blocks of one shape and dtype."""

    def __init__(self, view: View, block: Sequence[int], layout: Any) -> None:
        self.view, self.block, self.layout = view, list(block), layout
        self.maps = Bounded(KEPT)

    def __call__(self, tensor: Tensor) -> TensorDescriptor:
        """The descriptor; the tensor is on the current device."""
        if tensor.is_cuda:
            # Encoding it needs a context, which a new thread has after a call of CUDA's runtime.
            torch.cuda.set_device(tensor.device)
        base: Any = _Earlier(tensor, self.view.before) if self.view.before else tensor
        shape, strides = list(self.view.shape), list(self.view.strides)
        return TensorDescriptor(base, shape, strides, self.block, self.layout)


@lru_cache(maxsize=1024)
def view(shape: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> View:
    """The view of a tensor of that shape and stride."""
    batch, *space, heads, channels = shape
    missing = 3 - len(space)
    lengths = [group_length(n, d, 0) for n, d in zip(space, dilation)]
    tokens = stride[1:-2]
    # A valid stride where there is one position; of one head, so that bases of a contiguous tensor
    # are its rows.
    width = -(-channels // 8) * 8
    groups = (d + n % d for n, d in zip(space, dilation))  # where long ones begin later
    counts = (batch, *[1] * missing, *groups, heads)
    starts = (
        stride[0] if batch > 1 else 0,
        *[0] * missing,
        *(s if d > 1 else 0 for s, d in zip(tokens, dilation)),
        stride[-2] if heads > 1 else width,
    )
    unit = math.gcd(*starts)
    steps = tuple(s // unit for s in starts)
    return View(
        (1 + sum((n - 1) * s for n, s in zip(counts, steps)), *[1] * missing, *lengths, channels),
        (
            unit,
            *[width] * missing,
            *(s * d if n > 1 else width for n, s, d in zip(lengths, tokens, dilation)),
            1,
        ),
        steps,
        sum(s * d for n, s, d in zip(space, tokens, dilation) if n % d),
    )


@lru_cache(maxsize=1024)
def contiguous_view(shape: tuple[int, ...], dilation: tuple[int, ...]) -> View:
    """The view of a contiguous tensor of that shape."""
    return view(shape, contiguous_strides(shape), dilation)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, n = [], 1
    for length in reversed(shape):
        strides.append(n)
        n *= length
    return tuple(reversed(strides))


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
        if aligned and view(x.shape, x.stride(), dilation).shape[0] <= MOST:
            return x
    return x.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=1024)
def describe(view: View, block: Shape, dtype: torch.dtype) -> Describe:
    """Descriptors of tensors of that view and dtype, for blocks of that shape."""
    # What rows of shared memory are swizzled by; 0 where they are shorter.
    swizzle = min(128, block[-1] * dtype.itemsize)
    layout = gl.NVMMASharedLayout(swizzle if swizzle >= 32 else 0, 8 * dtype.itemsize, 5)
    return Describe(view, block, layout)
