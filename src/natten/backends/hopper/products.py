"""Products of wgmma whose channels come in chunks.

Blocks in shared memory have a power of two of channels: a head's, and what lies beside them, which
are zeros or the next head's (``descriptors.py``). Shapes are powers of two, so a product of fewer
channels is made of two: of 64 and 32 channels for heads of 96. A sum over blocks, ``[M, D]``, is a
tuple of as many. Each is committed by itself, and counts where others are waited for.
"""

# Triton reads the annotations of an aggregate as objects: no ``from __future__``.

from .geometry import mma_layout
from .gluon_names import gl, gluon, warpgroup_mma, warpgroup_mma_wait


@gluon.constexpr_function
def left_operand(columns):
    """Layout of the left operand of a product that has so many columns."""
    return gl.DotOperandLayout(0, mma_layout(columns), 2)


@gluon.jit
def multiply(a, b, LAYOUT: gl.constexpr, CHUNKS: gl.constexpr):
    """Start ``A B^T`` of matrices ``[M, D]`` and ``[N, D]``."""
    M: gl.constexpr = a.shape[0]
    N: gl.constexpr = b.shape[0]
    zeros = gl.zeros([M, N], gl.float32, LAYOUT)
    return _multiply(a, b, zeros, CHUNKS, False)


@gluon.jit
def add_product(a, b, acc, CHUNKS: gl.constexpr):
    """Start ``acc + A B^T``."""
    return _multiply(a, b, acc, CHUNKS, True)


@gluon.jit
def _multiply(a, b, acc, CHUNKS: gl.constexpr, USE_ACC: gl.constexpr):
    if len(CHUNKS) == 1:
        return warpgroup_mma(a, b.permute((1, 0)), acc, use_acc=USE_ACC, is_async=True)
    else:
        low, high = b.slice(0, CHUNKS[0], 1), b.slice(CHUNKS[0], CHUNKS[1], 1)
        left = a.slice(0, CHUNKS[0], 1)
        acc = warpgroup_mma(left, low.permute((1, 0)), acc, use_acc=USE_ACC, is_async=True)
        left = a.slice(CHUNKS[0], CHUNKS[1], 1)
        return warpgroup_mma(left, high.permute((1, 0)), acc, is_async=True)


@gluon.jit
def _zeros(M: gl.constexpr, D: gl.constexpr):
    return gl.zeros([M, D], gl.float32, mma_layout(D))


@gluon.jit
def zeros(M: gl.constexpr, CHUNKS: gl.constexpr):
    """A sum ``[M, D]`` of nothing."""
    acc = ()
    for i in gl.static_range(len(CHUNKS)):
        acc = acc + (_zeros(M, CHUNKS[i]),)
    return acc


@gluon.jit
def add(acc, a, b, CHUNKS: gl.constexpr):
    """Start ``acc += A B`` of a matrix ``[N, D]``; ``a`` is the first chunk's left operand."""
    if len(CHUNKS) == 1:
        return (warpgroup_mma(a, b, acc[0], is_async=True),)
    else:
        low = warpgroup_mma(a, b.slice(0, CHUNKS[0], 1), acc[0], is_async=True)
        # The same registers: how wide a product is does not change its left operand.
        a = gl.convert_layout(a, left_operand(CHUNKS[1]))
        high = warpgroup_mma(a, b.slice(CHUNKS[0], CHUNKS[1], 1), acc[1], is_async=True)
        return low, high


@gluon.jit
def wait(acc, PENDING: gl.constexpr):
    """The results of products, once no more than ``PENDING`` others are under way."""
    if len(acc) == 1:
        return (warpgroup_mma_wait(PENDING, deps=acc),)
    else:
        return warpgroup_mma_wait(PENDING, deps=acc)


@gluon.jit
def _scaled(acc, by):
    return acc * gl.convert_layout(by, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def scaled(acc, by):
    """``acc [M, D]`` with its rows scaled by ``[M]``."""
    found = ()
    for i in gl.static_range(len(acc)):
        found = found + (_scaled(acc[i], by),)
    return found


@gluon.jit
def times(acc, factor):
    """``acc`` times a number."""
    found = ()
    for i in gl.static_range(len(acc)):
        found = found + (acc[i] * factor,)
    return found


@gluon.jit
def kept(acc, is_kept):
    """``acc``, or zeros unless it is kept."""
    found = ()
    for i in gl.static_range(len(acc)):
        found = found + (gl.where(is_kept, acc[i], 0.0),)
    return found


@gluon.jit
def store(acc, buffer, CHUNKS: gl.constexpr, DTYPE: gl.constexpr):
    """Write a sum to a tile ``[1, *tile, channels]`` in shared memory.

    Channels beyond the chunks keep what is there: they are none of the head's.
    """
    tile = buffer.reshape([acc[0].shape[0], buffer.shape[4]])
    if len(CHUNKS) == 1:
        tile.store(acc[0].to(DTYPE))
    else:
        tile.slice(0, CHUNKS[0], 1).store(acc[0].to(DTYPE))
        tile.slice(CHUNKS[0], CHUNKS[1], 1).store(acc[1].to(DTYPE))
