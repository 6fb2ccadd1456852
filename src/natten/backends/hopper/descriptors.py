"""How a tensor looks to TMA, and what TMA can not read.

A tensor ``[batch, *space, heads, channels]`` becomes ``[bases, n0, n1, n2, channels]``: a first
axis of everywhere that the rows of a batch entry's head and dilation group may begin, and positions
inside a group per axis. So every layout with contiguous channels is read in place, whatever its
strides. Blocks may have more channels than a head: TMA fills them with zeros, and does not store
them. But TMA takes up to four times as long for a row that it has to fill. So heads that lie side
by side are one axis with their channels, and a block has the next head's channels instead of zeros,
where products take none of them, or where kernels set those to zero in less time (``widths.py``,
``pipeline.py``). Heads that are half aligned can be read in no other way, with channels of the head
before, too (``head_rows.py``). No head's numbers depend on another one's.

Where a dilation does not divide an axis, groups have ``n`` positions, and from one group on one
less. The axis has one bound for all of them. So the view begins ``dilation`` tokens before the
tensor: of a short group, positions count from there, as 1 to ``n - 1``; of the others, bases are
``dilation`` tokens later, and positions count from 0. Nobody asks for position 0 of a short group,
and nobody loads a box that is wholly out of bounds: for such a box TMA looks at the view's first
number, where there may be no memory (an illegal memory access on an H200). Boxes that are out of
bounds in part, and stores beyond the end, are fine. Channels come in boxes of 128 bytes: heads of
which one would be empty have no uneven groups (:meth:`Hopper.limits`).

Rows of packed documents have many lengths, and likewise one bound: positions count backwards from
where a row ends, so that the view begins as far before the tensor. So no box has tokens of the next
row, or of the next document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...neighborhood import group_length
from ...tiling import padded
from ...tuning import Bounded, cached
from ..interface import Shape
from ..triton.fast_launch import KEPT
from .costs import MOST
from .cuts import rows_held
from .gluon_names import TensorDescriptor, gl


class View(NamedTuple):
    """How TMA sees a tensor.

    Attributes:
        shape, strides: of five axes: where a group's tokens begin, three axes of these, channels.
        steps: how far apart along the first axis are batch entries, tokens along three axes, and
            heads, and along the last axis heads, if they are there.
        long_groups: per axis, how many dilation groups have as many positions as there are at most;
            the others have one less.
        before: how many numbers before the tensor the view begins.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    steps: tuple[int, ...]
    long_groups: tuple[int, ...] = (1, 1, 1)
    before: int = 0


class _Earlier:
    """What a descriptor asks of a tensor, for a view that begins before it."""

    def __init__(self, tensor: Tensor, before: int) -> None:
        self.tensor, self.dtype = tensor, tensor.dtype
        self._bytes = before * tensor.itemsize

    def data_ptr(self) -> int:
        return self.tensor.data_ptr() - self._bytes


class Describe:
    """A function of a tensor that has a view: its descriptor, for blocks of one shape and dtype.

    Types of kernels are powers of two. So of other blocks the type has its tokens in a row, and
    room for more; TMA copies a :attr:`box`, whose tokens it has in a row, too.
    """

    def __init__(self, view: View, block: Sequence[int], layout: Any) -> None:
        self.view, self.box, self.layout = view, list(block), layout
        self.block = self.box
        tokens = block[1:-1]
        if any(n & (n - 1) for n in tokens):
            self.block = [1, 1, 1, rows_held(tokens), block[-1]]
        self.maps = Bounded(KEPT)
        self._newest = self  # of tensors that lie alike, as keys and values do

    def of(self, view: View) -> Describe:
        """The same of tensors that have another view."""
        found = self._newest
        if found.view is not view:
            found = self._newest = Describe(view, self.box, self.layout)
        return found

    def __call__(self, tensor: Tensor) -> TensorDescriptor:
        """The descriptor; the tensor is on the current device."""
        if tensor.is_cuda:
            # Encoding it needs a context, which a new thread has after a call of CUDA's runtime.
            torch.cuda.set_device(tensor.device)
        base: Any = _Earlier(tensor, self.view.before) if self.view.before else tensor
        shape, strides = list(self.view.shape), list(self.view.strides)
        # Without its checks, which take longer than to encode it: a view is as TMA needs it.
        found = object.__new__(TensorDescriptor)
        found.base, found.shape, found.strides = base, shape, strides
        found.block_shape, found.layout = self.block, self.layout
        return found


@lru_cache(maxsize=256)
def view(
    shape: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], joined: bool = False
) -> View:
    """The view of a tensor of that shape and stride.

    Args:
        shape, stride: of the tensor.
        dilation: of each axis.
        joined: whether heads that lie side by side are one axis with their channels.
    """
    batch, *space, heads, channels = shape
    of_batch, *apart, of_head, _ = stride
    missing = 3 - len(space)
    # A valid stride where there is one position; of one head, so that bases of a contiguous tensor
    # are its rows.
    width = -(-channels // 8) * 8
    joined = joined and heads > 1 and of_head == channels
    starts = of_batch if batch > 1 else 0, *apart, 0 if joined else of_head if heads > 1 else width
    unit, steps = _steps(starts, dilation)
    lengths, strides, long_groups = [1] * missing, [width] * missing, [1] * missing
    bases, before = 1 + (batch - 1) * steps[0] + (heads - 1) * steps[4], 0
    for n, step, d, start in zip(space, apart, dilation, steps[1 + missing :]):
        length, longer = group_length(n, d, 0), n % d
        lengths.append(length)
        strides.append(step * d if length > 1 else width)
        long_groups.append(longer or d)
        if d > 1:
            bases += (d + longer - 1) * start  # where long ones begin later
            before += step * d if longer else 0
    per_head = channels if joined else 0
    sizes = bases, *lengths, channels * heads if joined else channels
    return View(sizes, (unit or width, *strides, 1), (*steps, per_head), tuple(long_groups), before)


@lru_cache(maxsize=256)
def _steps(starts: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """How far apart bases are, and by how many of them batch entries, groups of three axes, and
    heads are, given how far these are."""
    batch, *apart, head = starts
    found = batch, *padded([n if d > 1 else 0 for n, d in zip(apart, dilation)], 0), head
    unit = math.gcd(*found)
    return unit, tuple([n // (unit or 1) for n in found])


@lru_cache(maxsize=1024)
def packed_view(shape: tuple[int, ...], stride: tuple[int, ...]) -> View:
    """The view of packed documents ``[1, tokens, heads, channels]``, in which a box is part of a
    row: of a head, of the row that ends before a token, and of the tokens before that end."""
    _, tokens, heads, channels = shape
    width = -(-channels // 8) * 8
    token, head = stride[1] if tokens > 1 else width, stride[2] if heads > 1 else width
    lengths, strides = (heads, 1, tokens + 1, tokens, channels), (head, width, token, token, 1)
    return View(lengths, strides, (0, 0, 0, 0, 1, 0), before=tokens * token)


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
        # Side by side, heads are one axis with their channels; half aligned ones are read only so.
        axes = -2 if x.stride(-2) == x.shape[-1] else -1
        strides = [s for n, s in zip(x.shape[:axes], x.stride()[:axes]) if n > 1]
        aligned = x.stride(-1) == 1 and all(s > 0 and s % 8 == 0 for s in strides)
        aligned = aligned and (axes == -2 or x.shape[-1] % 8 == 0)
        if aligned and view(x.shape, x.stride(), dilation).shape[0] <= MOST:
            return x
    return x.clone(memory_format=torch.contiguous_format)


@cached
def describe(view: View, block: Shape, dtype: torch.dtype) -> Describe:
    """Descriptors of tensors of that view and dtype, for blocks of that shape."""
    return Describe(view, block, _layout(block[-1], dtype))


@lru_cache(maxsize=64)
def _layout(channels: int, dtype: torch.dtype) -> Any:
    """Shared memory layout of blocks of five axes with that many channels."""
    row = min(128, channels * dtype.itemsize)
    return gl.NVMMASharedLayout(row if row >= 32 else 0, 8 * dtype.itemsize, 5)
