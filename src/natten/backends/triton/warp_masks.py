"""Masks of keys for tiles of 16 rows, one of each warp (``warps.py``)."""

# Gluon reads annotations as objects: no ``from __future__``.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import primitives
from .warps import coordinates, expanded, from_triton, minus, plus, present_tokens

bit, packed = from_triton(primitives.bit), from_triton(primitives.packed)


@gluon.jit
def offset_from(tokens, origin, strides):
    """How far tokens are in memory from a token nearby, in 32 bits, which take fewer instructions;
    ``small_tiles`` and ``plan`` say where they are enough."""
    x = minus(tokens, origin)
    at = x[0] * strides[0].to(gl.int32) + x[1] * strides[1].to(gl.int32)
    return at + x[2] * strides[2].to(gl.int32)


@gluon.constexpr_function
def lane_layout(warps):
    """Of ``[W, 32]``: one key a thread."""
    return gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])


class KeyMask(NamedTuple):
    """Where a mask of keys is, and the keys of a program's dilation group."""

    origin_at: Any  # address of what it holds of the token ``origin``
    origin: Any  # a token nearby, per axis
    strides: Any  # per axis
    group: Any  # per axis
    dilation: Any  # per axis
    n: Any  # keys of the group, per axis


@gluon.jit
def allowed_at(mask, y, MODES: gl.constexpr):
    """Whether keys at positions ``y`` may be attended."""
    x = present_tokens(y, mask.group, mask.dilation, mask.n, MODES)
    return gl.load(mask.origin_at + offset_from(x, mask.origin, mask.strides)) != 0


@gluon.jit
def allowed_keys(mask, first, MODES: gl.constexpr, KV_BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """Which keys of each warp's block may be attended, ``[W, N]`` in a layout; ``first``: where it
    begins, per axis ``[W]`` in the layout of lanes."""
    N: gl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    W: gl.constexpr = first[2].shape[0]
    lane = gl.arange(0, 32, gl.SliceLayout(0, lane_layout(W)))
    i = gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, LAYOUT)), 0)  # [1, N]
    words = gl.zeros([W, N], gl.int32, LAYOUT)
    for word in gl.static_range((N + 31) // 32):
        k = 32 * word + lane
        if N < 32:  # keys come again
            k = k % N
        c = coordinates(k, KV_BLOCK)  # [32] per axis
        allowed = allowed_at(mask, plus(expanded(first, 1), expanded(c, 0)), MODES)  # [W, 32]
        own = packed(allowed, gl.expand_dims(lane, 0), 1)  # [W]
        own = gl.expand_dims(gl.convert_layout(own, gl.SliceLayout(1, LAYOUT)), 1)
        words = gl.where(i // 32 == word, own, words)
    return bit(words, i % 32)
