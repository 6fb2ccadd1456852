"""What travels between ranks: messages with gradients, on PyTorch's functional collectives.

Sending is a linear map whose transpose sends back, so that derivatives of every order are made of
the same two functions. A message is on its way between the two, and whatever is computed there
hides it, in the backward as in the forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import collectives

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]  # first and one-past-last token along each axis


@contextmanager
def named_failures(name: str) -> Iterator[None]:
    """Errors of collectives say which function they belong to."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"natten.distributed.{name}: a rank does not answer. It failed, or its call is not "
            f"like this one: {error}"
        ) from error


class _Trip:
    """A message: how many numbers go to each rank of a group, and come from it.

    Groups are known by their names, because graphs must not keep a group that a program has ended.
    """

    def __init__(self, name: str, group: str, sent: list[int], received: list[int]) -> None:
        self.name, self.group, self.sent, self.received = name, group, sent, received
        self.returning: tuple[Tensor, _Trip] | None = None  # its gradient, while it travels

    def back(self) -> _Trip:
        """The way back."""
        return _Trip(self.name, self.group, self.received, self.sent)


class _Start(torch.autograd.Function):
    """Send a message, which has arrived after :class:`_Finish`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        with named_failures(trip.name):
            return collectives.all_to_all_single(
                x.contiguous(), trip.received, trip.sent, trip.group
            )

    @staticmethod
    def backward(ctx: Any, stand_in: Tensor) -> tuple[Tensor, None]:
        returning, ctx.trip.returning = ctx.trip.returning, None
        return _Finish.apply(*returning), None


class _Finish(torch.autograd.Function):
    """Wait for a message."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        with named_failures(trip.name):
            return collectives.wait_tensor(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        back = ctx.trip.back()
        ctx.trip.returning = _Start.apply(grad, back), back
        # What travels has another size than autograd expects here, so that it goes by the trip.
        return grad, None


def send(
    name: str,
    group: dist.ProcessGroup,
    sent: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[Shape]],
    of: Sequence[Tensor],
) -> Callable[[], tuple[list[list[Tensor]], Tensor]]:
    """Send tensors to every rank of a group. All ranks call it together.

    Args:
        name: the public function, for messages of errors.
        group: the ranks.
        sent: for each rank, tensors that go there.
        shapes: for each rank, shapes of what comes from there.
        of: the tensors that are sent in parts. The message has the first one's dtype. If one of
            them requires a gradient, that of the message comes back even if nothing is sent.

    Returns:
        A function that waits, and returns the tensors from each rank, and the message that they
        are parts of.
    """
    counts = [[math.prod(shape) for shape in from_rank] for from_rank in shapes]
    lengths = [sum(x.numel() for x in to_rank) for to_rank in sent]
    trip = _Trip(name, group.group_name, lengths, [sum(c) for c in counts])
    parts = list(chain(*sent)) or [x[:0] for x in of]
    travelling = _Start.apply(_Packed.apply(of[0].dtype, *parts), trip)

    def arrived() -> tuple[list[list[Tensor]], Tensor]:
        received = _Finish.apply(travelling, trip)
        parts = iter(received.split([n for from_rank in counts for n in from_rank]))
        tensors = [[next(parts).view(s) for s in from_rank] for from_rank in shapes]
        return tensors, received

    return arrived


def _copy(target: Tensor, source: Tensor) -> None:
    """``target.copy_(source)``, in the largest words that both consist of.

    A GPU copies strided tensors of two-byte numbers at a third of its memory's speed otherwise.
    """
    if target.dtype == source.dtype:
        for word in (torch.complex128, torch.int64, torch.int32):
            if all(_consists_of(x, word) for x in (target, source)):
                target, source = target.view(word), source.view(word)
                break
    target.copy_(source)


def _consists_of(x: Tensor, word: torch.dtype) -> bool:
    """Whether neighbors along the last axis can be seen as numbers of a larger type."""
    if x.dim() == 0 or x.stride(-1) != 1:
        return False
    count, rest = divmod(word.itemsize, x.dtype.itemsize)
    sizes = x.storage_offset(), x.shape[-1], *x.stride()[:-1]
    fits = count > 1 and rest == 0 and all(n % count == 0 for n in sizes)
    return fits and x.data_ptr() % word.itemsize == 0  # as GPUs load words


class _Packed(torch.autograd.Function):
    """One flat tensor of all numbers of some tensors."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        ctx.parts = [(x.shape, x.dtype) for x in parts]
        lengths = [x.numel() for x in parts]
        flat = parts[0].new_empty(sum(lengths), dtype=dtype)
        for target, part in zip(flat.split(lengths), parts):
            _copy(target.view(part.shape), part)
        return flat

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = grad.split([shape.numel() for shape, _ in ctx.parts])
        found = (g.view(shape).to(dtype) for g, (shape, dtype) in zip(grads, ctx.parts))
        wanted = ctx.needs_input_grad[1:]  # not those of masks
        return None, *(g if needed else None for g, needed in zip(found, wanted))


class _Joined(torch.autograd.Function):
    """``torch.cat``, whose kernels are slow for more than four axes."""

    @staticmethod
    def forward(ctx: Any, dim: int, *parts: Tensor) -> Tensor:
        ctx.dim, ctx.lengths = dim, [x.shape[dim] for x in parts]
        shape = list(parts[0].shape)
        shape[dim] = sum(ctx.lengths)
        out = parts[0].new_empty(shape)
        for target, part in zip(out.split(ctx.lengths, dim), parts):
            _copy(target, part)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.split(ctx.lengths, ctx.dim)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts one after another along an axis; of one part, the part itself."""
    if len(parts) == 1:
        return parts[0]
    found: Tensor = _Joined.apply(dim, *parts)
    return found


class _Parts(torch.autograd.Function):
    """Boxes of tokens, as views; what their gradients are added up in is made once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, boxes: tuple[Box, ...]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.boxes = x.shape, boxes
        return tuple(_narrowed(x, box) for box in boxes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Added.apply(ctx.shape, ctx.boxes, *grads), None


class _Added(torch.autograd.Function):
    """The transpose of :class:`_Parts`: a tensor in which each box was added to zeros."""

    @staticmethod
    def forward(ctx: Any, shape: Shape, boxes: tuple[Box, ...], *parts: Tensor) -> Tensor:
        ctx.boxes = boxes
        once = _is_partition(boxes, shape[1 : 1 + len(boxes[0])])
        out = parts[0].new_empty(shape) if once else parts[0].new_zeros(shape)
        for number, (part, box) in enumerate(zip(parts, boxes)):
            if once or number == 0:
                _copy(_narrowed(out, box), part)
            else:
                _narrowed(out, box).add_(part)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *_Parts.apply(grad, ctx.boxes)


@lru_cache(maxsize=256)
def _is_partition(boxes: tuple[Box, ...], space: Shape) -> bool:
    """Whether each token is in exactly one of the boxes."""
    apart = all(
        any(b <= c or d <= a for (a, b), (c, d) in zip(one, other))
        for one, other in combinations(boxes, 2)
    )
    volumes = (math.prod(last - first for first, last in box) for box in boxes)
    return apart and sum(volumes) == math.prod(space)


def _narrowed(x: Tensor, box: Box) -> Tensor:
    shape = x.shape
    for dim, (first, last) in enumerate(box, start=1):
        if last - first < shape[dim]:
            x = x.narrow(dim, first, last - first)
    return x


def parts_of(x: Tensor, boxes: Sequence[Box]) -> Sequence[Tensor]:
    """The tokens of each box of ``x [batch, *space, ...]``.

    Slices of autograd would each have a gradient of the size of ``x``, once for every axis.
    """
    whole = tuple((0, n) for n in x.shape[1 : 1 + len(boxes[0])]) if boxes else ()
    if all(box == whole for box in boxes):
        return [x] * len(boxes)
    if not x.is_floating_point():
        return [_narrowed(x, box) for box in boxes]
    found: Sequence[Tensor] = _Parts.apply(x, tuple(boxes))
    return found


def together(parts: Sequence[Tensor], boxes: Sequence[Box], space: Shape) -> Tensor:
    """The inverse of :func:`parts_of`: tokens ``[batch, *space, ...]`` of boxes that have each
    token once."""
    if len(parts) == 1:
        return parts[0]
    x = parts[0]
    found: Tensor = _Added.apply((len(x), *space, *x.shape[1 + len(space) :]), tuple(boxes), *parts)
    return found


class _Summed(torch.autograd.Function):
    """The sum of every rank's tensor, which is its own transpose."""

    @staticmethod
    def forward(x: Tensor, name: str, group: str) -> Tensor:
        with named_failures(name):
            found = collectives.all_reduce(x.contiguous(), "sum", group)
            return collectives.wait_tensor(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.name, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Summed.apply(grad, ctx.name, ctx.group), None, None


class _Replicated(_Summed):
    """A tensor that all ranks have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(x: Tensor, name: str, group: str) -> Tensor:
        return x.view_as(x)


def replicated(x: Tensor | None, name: str, group: dist.ProcessGroup) -> Any:
    """``x``, which every rank has; its gradient is summed over the group before it returns."""
    return None if x is None else _Replicated.apply(x, name, group.group_name)


class _Tied(torch.autograd.Function):
    """Outputs as they are, whose gradient also reaches tensors that they do not depend on.

    A rank that needs nothing of a message still has to take part when its gradient goes back.
    """

    @staticmethod
    def forward(out: Tensor, lse: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
        return grad_out, grad_lse, *(torch.zeros_like(x) for x in ctx.saved_tensors)


def tied(out: Tensor, lse: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and LSE, whose backward also reaches ``others``."""
    return _Tied.apply(out, lse, *(x for x in others if x is not None))
