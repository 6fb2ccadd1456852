"""Outputs and gradients of heads that TMA can not store, row by row.

TMA wants addresses at multiples of 16 bytes, where of heads side by side with 12 or 20 channels,
which are half aligned, only every second one begins. It reads the others from 8 bytes earlier on.
So the first four channels that come are those of the head before, and sums have four columns that
are nobody's, too. What products must not find is set to zero (``pipeline.py``). To store a box of a
sum would overwrite a neighbor, so the warps that have it store the head's own channels.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from .gluon_names import aggregate, gl, gluon
from .pipeline import TmaTensor, are_half_aligned


@aggregate
class HeadRows:
    """A contiguous tensor ``[rows, CHANNELS]``, in which a row is a head of a token."""

    pointer: gl.tensor
    steps: gl.tuple  # rows from a batch entry to the next, from a token and from a head
    slice: gl.tuple  # () as a program has all channels
    CHANNELS: gl.constexpr

    @gluon.jit
    def store(self, acc, row, real, head):
        """Store a sum, whose columns begin where its ``head`` was loaded, to rows ``[M]``, of which
        some are ``real``."""
        column = 0
        for i in gl.static_range(len(acc)):
            self._store(acc[i], row, real, head, column)
            column += acc[i].shape[1]

    @gluon.jit
    def _store(self, x, row, real, head, column):
        LAYOUT: gl.constexpr = x.type.layout
        ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
        row, real = gl.convert_layout(row, ROWS), gl.convert_layout(real, ROWS)
        before = (head & 1) * 4  # channels of the head before
        lane = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT)) + column  # [D]
        own = (lane >= before) & (lane < before + self.CHANNELS)
        at = (row.to(gl.int64) * self.CHANNELS - before)[:, None] + lane[None, :]
        own = own[None, :] & real[:, None]
        gl.store(self.pointer + at, x.to(self.pointer.dtype.element_ty), mask=own)


@gluon.jit
def stored_tensor(tensor, steps, slice, CLEARED: gl.constexpr):
    """What a kernel stores, by TMA if that can; ``CLEARED`` channels are those of queries."""
    if are_half_aligned(CLEARED):
        return HeadRows(tensor, steps, slice, CLEARED[0])
    else:
        return TmaTensor(tensor, steps, slice, ())
