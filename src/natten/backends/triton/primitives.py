"""What all kernels share: the window rule inside a kernel, tile coordinates, addresses.

Kernels see three axes; an axis that a problem lacks has one token and mode ``UNIT``, and compiles
away. The rule is :class:`natten.neighborhood.Neighborhood`'s, and is tested against it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How an axis's windows go, a compile-time constant per axis.
UNIT = tl.constexpr(0)  # one token
SLIDING = tl.constexpr(1)  # stride 1
STRIDED = tl.constexpr(2)
CAUSAL = tl.constexpr(3)  # stride 1
CAUSAL_STRIDED = tl.constexpr(4)
FULL = tl.constexpr(5)  # plain attention: every key
FULL_CAUSAL = tl.constexpr(6)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def group_length(length, dilation, group):
    return (length - group + dilation - 1) // dilation


@triton.jit
def window(i, n, n_keys, k, s, MODE: tl.constexpr):
    """First and one-past-last key of query ``i`` in a group of ``n`` queries."""
    if MODE == UNIT:
        start, end = i * 0, i * 0 + 1
    elif MODE == FULL:
        start, end = i * 0, i * 0 + n_keys
    elif MODE == FULL_CAUSAL:
        start, end = i * 0, tl.minimum(i + 1, n_keys)
    elif MODE == CAUSAL:
        start, end = tl.maximum(i - k + 1, 0), i + 1
    elif MODE == CAUSAL_STRIDED:
        start = tl.maximum(tl.minimum(i // s * s + s - 1, n - 1) - k + 1, 0)
        end = i + 1
    else:
        leader = i
        if MODE == STRIDED:
            leader = tl.minimum(i // s * s + s // 2, n - 1)
        start = tl.minimum(tl.maximum(leader - k // 2, 0), n - k)
        end = start + k
    return start, end


@triton.jit
def queries_of(first, last, n, n_keys, k, s, MODE: tl.constexpr):
    """First and one-past-last query that may attend a key in ``first .. last``."""
    if MODE == UNIT:
        low, high = first * 0, first * 0 + 1
    elif MODE == FULL:
        low, high = first * 0, first * 0 + n
    elif MODE == FULL_CAUSAL:
        low, high = first, first * 0 + n
    elif MODE == CAUSAL or MODE == CAUSAL_STRIDED:
        low = first
        high = tl.minimum((last + k - s) // s * s + s, n)
        high = tl.where(last + k >= n, n, high)
    else:
        reach = last + k // 2 - s // 2
        high = tl.minimum(reach // s * s + s, n)
        high = tl.where((last >= n - k) | (last + k // 2 >= n - 1), n, high)
        start = first - k + 1
        low = (start + k // 2 - s // 2 + s - 1) // s * s
        low = tl.where(start <= 0, 0, low)
    return low, high


@triton.jit
def coordinates(r, T1: tl.constexpr, T2: tl.constexpr):
    """Position inside a tile ``[.., T1, T2]`` of its row ``r``."""
    return r // (T1 * T2), r // T2 % T1, r % T2


@triton.jit
def token_offset(p0, p1, p2, group, dilation, strides):
    """Offset of the tokens at group positions ``p``; 64 bits, because tensors may be large."""
    x0 = (p0 * dilation[0] + group[0]).to(tl.int64) * strides[1]
    x1 = (p1 * dilation[1] + group[1]).to(tl.int64) * strides[2]
    x2 = (p2 * dilation[2] + group[2]).to(tl.int64) * strides[3]
    return x0 + x1 + x2


@triton.jit
def split(pid, n0, n1, n2):
    """Program id to (rest, index of each axis); the last axis runs fastest."""
    i2 = pid % n2
    pid = pid // n2
    i1 = pid % n1
    pid = pid // n1
    return pid // n0, pid % n0, i1, i2


@triton.jit
def inside(p, start, end, MODE: tl.constexpr, allowed):
    """``allowed`` and the keys ``p`` of this axis that lie in the windows ``start .. end``."""
    if MODE != UNIT:
        allowed = allowed & (p >= start) & (p < end)
    return allowed
