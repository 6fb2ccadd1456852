"""Which keys a query attends, inside a kernel.

The rule is :class:`natten.neighborhood.Neighborhood`'s, and is tested against it.

Positions are inside a dilation group of ``n`` queries and ``n_keys`` keys. Windows move
monotonically with their queries, so what the first and the last position of a tile reach bounds
what any, and what all of its positions reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ...neighborhood import Dense, Rule
from ...tiling import padded

# How the windows of an axis go, a compile-time constant per axis.
UNIT = tl.constexpr(0)  # one token
SLIDING = tl.constexpr(1)  # stride 1
STRIDED = tl.constexpr(2)
CAUSAL = tl.constexpr(3)  # stride 1
CAUSAL_STRIDED = tl.constexpr(4)
FULL = tl.constexpr(5)  # plain attention: every key
FULL_CAUSAL = tl.constexpr(6)


def modes(rule: Rule, shape: Sequence[int]) -> tuple[int, ...]:
    """How the windows of each of three axes go."""
    if isinstance(rule, Dense):
        return UNIT.value, UNIT.value, (FULL_CAUSAL if rule.causal else FULL).value
    found = []
    for length, stride, causal in zip(shape, rule.stride, rule.is_causal):
        if length == 1:
            mode = UNIT
        elif causal:
            mode = CAUSAL if stride == 1 else CAUSAL_STRIDED
        else:
            mode = SLIDING if stride == 1 else STRIDED
        found.append(mode.value)
    return padded(found, UNIT.value)


@triton.jit
def group_length(length, dilation, group):
    """How many of an axis's tokens are in a dilation group."""
    return (length - group + dilation - 1) // dilation


@triton.jit
def group_lengths(lengths, dilation, group):
    """:func:`group_length` of each axis."""
    return (
        group_length(lengths[0], dilation[0], group[0]),
        group_length(lengths[1], dilation[1], group[1]),
        group_length(lengths[2], dilation[2], group[2]),
    )


@triton.jit
def window(i, n, n_keys, k, s, MODE: tl.constexpr):
    """First and one-past-last key of query ``i``, for window ``k`` and stride ``s``."""
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
def queries_of(p, n, n_keys, k, s, MODE: tl.constexpr):
    """First and one-past-last query that attends key ``p``: the inverse of :func:`window`."""
    if MODE == UNIT:
        start, end = p * 0, p * 0 + 1
    elif MODE == FULL:
        start, end = p * 0, p * 0 + n
    elif MODE == FULL_CAUSAL:
        start, end = p, p * 0 + n
    elif MODE == CAUSAL:
        start, end = p, tl.minimum(p + k, n)
    elif MODE == CAUSAL_STRIDED:
        start = p
        end = tl.where(p + k >= n, n, tl.minimum((p + k - s) // s * s + s, n))
    else:
        first = p - k + 1 + k // 2
        last = p + k // 2
        start, end = first, last + 1
        if MODE == STRIDED:
            start = (first - s // 2 + s - 1) // s * s
            end = (last - s // 2) // s * s + s
        start = tl.where(p - k + 1 <= 0, 0, start)
        end = tl.where((p >= n - k) | (last >= n - 1), n, tl.minimum(end, n))
    return start, end


@triton.jit
def _reach(i, n, n_keys, k, s, MODE: tl.constexpr, OF_KEYS: tl.constexpr):
    if OF_KEYS:
        start, end = queries_of(i, n, n_keys, k, s, MODE)
    else:
        start, end = window(i, n, n_keys, k, s, MODE)
    return start, end


@triton.jit
def reach(i, n, n_keys, k, s, MODES: tl.constexpr, OF_KEYS: tl.constexpr):
    """What positions ``i`` reach along each axis, starts and ends: :func:`window` of queries, or,
    where positions are ``OF_KEYS``, :func:`queries_of`."""
    start0, end0 = _reach(i[0], n[0], n_keys[0], k[0], s[0], MODES[0], OF_KEYS)
    start1, end1 = _reach(i[1], n[1], n_keys[1], k[1], s[1], MODES[1], OF_KEYS)
    start2, end2 = _reach(i[2], n[2], n_keys[2], k[2], s[2], MODES[2], OF_KEYS)
    return (start0, start1, start2), (end0, end1, end2)


@triton.jit
def tiles_that_attend(
    length, dilation, k, s, o, Q_SIZE: tl.constexpr, KV_SIZE: tl.constexpr, MODE: tl.constexpr
):
    """The first of an axis's tiles of queries that attend a block of keys which begins ``o`` after
    its tile, and how many there are; with strides or dilation perhaps a few too many."""
    most, least = group_length(length, dilation, 0), group_length(length, dilation, dilation - 1)
    # Where tiles begin whose block begins before the last key, and ends after the first.
    first, end = 1 - KV_SIZE - o, most - o
    if (MODE == CAUSAL) | (MODE == CAUSAL_STRIDED):
        end = tl.where((o < Q_SIZE) & (o + KV_SIZE > 1 - k), end, first)
    else:
        left, right = k // 2, k - 1 - k // 2
        if MODE == STRIDED:  # leaders are at most so far from their queries
            left, right = left + s - 1 - s // 2, right + s // 2
        # Beyond these, only windows that an end of the axis moves reach the block.
        first = tl.where(o + KV_SIZE > -left, first, first + least - k)
        end = tl.where(o < Q_SIZE + right, end, k - o)
    first = tl.maximum(first + Q_SIZE - 1, 0) // Q_SIZE
    end = (tl.minimum(end, most) + Q_SIZE - 1) // Q_SIZE
    return first, tl.maximum(end - first, 0)


@triton.jit
def lpt_order(t, tiles, k, SIZE: tl.constexpr, MODES: tl.constexpr):
    """Which tile of keys comes ``t``-th along the last axis: those that take long come first (LPT,
    longest processing time first), so that none of them ends after all others.

    In a row of tokens, the keys of half a window at each end are attended by fewer queries than
    usual, those of the next half by more. So tiles come from both ends inward, and the short ones
    last. With more axes there are more tiles, and their order matters less.
    """
    if MODES[0] == UNIT and MODES[1] == UNIT and (MODES[2] == SLIDING or MODES[2] == STRIDED):
        short = k // (2 * SIZE) * 2
        t = tl.where(t < tiles - short, t + short, tiles - 1 - t)
        t = tl.where(t % 2 == 0, t // 2, tiles - 1 - t // 2)
    return t
