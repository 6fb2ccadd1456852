"""Which keys a query attends, inside a kernel.

The rule is :class:`natten.neighborhood.Neighborhood`'s, and is tested against it.

Positions are inside a dilation group of ``n`` queries and ``n_keys`` keys. Windows move
monotonically with their queries, so what the first and the last position of a tile reach bounds
what any, and what all of its positions reach. On a circular axis positions are those before the
modulo; :func:`wrapped` takes it.

Where queries are a layout of their own (``PER_KEY``), those of a dilation group have numbers:
number ``j`` stands at key position ``j // r``, and only some numbers are those of queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...neighborhood import Dense, Neighborhood, Rule
from ...tiling import padded

# How the windows of an axis go, a compile-time constant per axis.
UNIT = tl.constexpr(0)  # one token
SLIDING = tl.constexpr(1)  # stride 1
STRIDED = tl.constexpr(2)
CAUSAL = tl.constexpr(3)  # stride 1
CAUSAL_STRIDED = tl.constexpr(4)
FULL = tl.constexpr(5)  # plain attention: every key
FULL_CAUSAL = tl.constexpr(6)
TRUNCATED = tl.constexpr(7)  # stride 1
TRUNCATED_STRIDED = tl.constexpr(8)
CIRCULAR = tl.constexpr(9)  # stride 1; circular modes are the last ones
CIRCULAR_STRIDED = tl.constexpr(10)

# By the axis's boundary, of stride 1 and of others.
_BORDERS = {
    "shift": (SLIDING, STRIDED),
    "truncate": (TRUNCATED, TRUNCATED_STRIDED),
    "circular": (CIRCULAR, CIRCULAR_STRIDED),
}


def modes(rule: Rule, key_shape: Sequence[int]) -> tuple[int, ...]:
    """How the windows of each of three axes go."""
    if isinstance(rule, Dense):
        return UNIT.value, UNIT.value, (FULL_CAUSAL if rule.causal else FULL).value
    found = []
    for axis, length in enumerate(key_shape):
        is_strided = rule.stride[axis] > 1
        # With a dilation, a truncated axis has groups of no token.
        is_unit = max(length, rule.kernel_size[axis], rule.dilation[axis]) == 1
        if is_unit and rule.is_self_attention:
            mode = UNIT
        elif rule.is_causal[axis]:
            mode = CAUSAL_STRIDED if is_strided else CAUSAL
        else:
            mode = _BORDERS[rule.boundary[axis]][is_strided]
        found.append(mode.value)
    return padded(found, UNIT.value)


def per_key(rule: Rule) -> tuple[int, ...]:
    """Queries per key of each of three axes, a compile-time constant: 0 where queries are the
    keys' own tokens."""
    if isinstance(rule, Neighborhood) and not rule.is_self_attention:
        return padded(rule.queries_per_key, 0)
    return 0, 0, 0


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


class Span(NamedTuple):
    """A dilation group, per axis: its queries have numbers ``first .. n``, its keys positions
    ``0 .. n_keys``."""

    first: Any
    n: Any
    n_keys: Any


@triton.jit
def _queries_before(token, dilation, group, R: tl.constexpr):
    """The same as :func:`natten.neighborhood.queries_before`."""
    period = dilation * R
    rest = token % period - group * R
    return token // period * R + tl.minimum(tl.maximum(rest, 0), R)


@triton.jit
def _first_and_n(length, offset, dilation, group, R: tl.constexpr):
    if R == 0:
        first, n = 0, group_length(length, dilation, group)
    else:
        first = _queries_before(offset, dilation, group, R)
        n = _queries_before(offset + length, dilation, group, R)
    return first, n


@triton.jit
def span(lengths, key_lengths, offsets, dilation, group, PER_KEY: tl.constexpr):
    """The :class:`Span` of a dilation group of the queries from ``offsets`` on."""
    first0, n0 = _first_and_n(lengths[0], offsets[0], dilation[0], group[0], PER_KEY[0])
    first1, n1 = _first_and_n(lengths[1], offsets[1], dilation[1], group[1], PER_KEY[1])
    first2, n2 = _first_and_n(lengths[2], offsets[2], dilation[2], group[2], PER_KEY[2])
    n_keys = group_lengths(key_lengths, dilation, group)
    return Span((first0, first1, first2), (n0, n1, n2), n_keys)


@triton.jit
def _key_position(j, n_keys, MODE: tl.constexpr, R: tl.constexpr):
    if R <= 1:
        i = j
    elif MODE >= CIRCULAR:
        i = (j + n_keys * R) // R - n_keys  # division is of what is not negative
    else:
        i = j // R
    return i


@triton.jit
def key_positions(j, n_keys, MODES: tl.constexpr, PER_KEY: tl.constexpr):
    """Key positions at which queries of numbers ``j`` stand, per axis."""
    return (
        _key_position(j[0], n_keys[0], MODES[0], PER_KEY[0]),
        _key_position(j[1], n_keys[1], MODES[1], PER_KEY[1]),
        _key_position(j[2], n_keys[2], MODES[2], PER_KEY[2]),
    )


@triton.jit
def wrapped(i, n):
    """``i`` modulo ``n``, of positions from ``-n`` on and below ``2 n``."""
    i = tl.where(i < 0, i + n, i)
    return tl.where(i >= n, i - n, i)


@triton.jit
def _margin(n_keys, MODE: tl.constexpr, R: tl.constexpr):
    once_around = n_keys * R if R > 1 else n_keys
    return once_around if MODE >= CIRCULAR else 0


@triton.jit
def margins(n_keys, MODES: tl.constexpr, PER_KEY: tl.constexpr):
    """How far numbers may be from the group's, per axis: once around on a circular one."""
    return (
        _margin(n_keys[0], MODES[0], PER_KEY[0]),
        _margin(n_keys[1], MODES[1], PER_KEY[1]),
        _margin(n_keys[2], MODES[2], PER_KEY[2]),
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
    elif MODE == CIRCULAR:
        start = i - k // 2
        end = start + k
    elif MODE == CIRCULAR_STRIDED:
        start = (i + n) // s * s + s // 2 - n - k // 2  # division is of what is not negative
        end = start + k
    else:
        leader = i
        if (MODE == STRIDED) | (MODE == TRUNCATED_STRIDED):
            leader = tl.minimum(i // s * s + s // 2, n - 1)
        if (MODE == TRUNCATED) | (MODE == TRUNCATED_STRIDED):
            start = tl.maximum(leader - k // 2, 0)
            end = tl.minimum(leader - k // 2 + k, n_keys)
        else:
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
        if MODE == CIRCULAR_STRIDED:
            start = (first + n - s // 2 + s - 1) // s * s - n
            end = (last - s // 2) // s * s + s
        if (MODE == STRIDED) | (MODE == TRUNCATED_STRIDED):
            start = (first - s // 2 + s - 1) // s * s
            end = (last - s // 2) // s * s + s
        if (MODE == TRUNCATED) | (MODE == TRUNCATED_STRIDED):
            start = tl.maximum(start, 0)
            end = tl.where(last >= n - 1, n, tl.minimum(end, n))
        elif MODE < CIRCULAR:
            start = tl.where(p - k + 1 <= 0, 0, start)
            end = tl.where((p >= n - k) | (last >= n - 1), n, tl.minimum(end, n))
    return start, end


@triton.jit
def _reach(i, first, n, n_keys, k, s, MODE: tl.constexpr, R: tl.constexpr, OF_KEYS: tl.constexpr):
    if OF_KEYS:
        if R == 0:
            start, end = queries_of(i, n, n_keys, k, s, MODE)
        else:
            start, end = queries_of(i, n_keys, n_keys, k, s, MODE)
            start, end = start * R, end * R
            if MODE < CIRCULAR:
                start, end = tl.maximum(start, first), tl.minimum(end, n)
    elif R == 0:
        start, end = window(i, n, n_keys, k, s, MODE)
    else:
        start, end = window(_key_position(i, n_keys, MODE, R), n_keys, n_keys, k, s, MODE)
    return start, end


@triton.jit
def reach(i, group, k, s, MODES: tl.constexpr, PER_KEY: tl.constexpr, OF_KEYS: tl.constexpr):
    """What ``i`` reach along each axis of a :class:`Span`, starts and ends: :func:`window` of
    queries, or, where these are ``OF_KEYS``, :func:`queries_of`, as numbers of queries. On a
    circular axis some are not of queries that are there: :func:`are_queries` tells."""
    first, n, n_keys = group.first, group.n, group.n_keys
    start0, end0 = _reach(
        i[0], first[0], n[0], n_keys[0], k[0], s[0], MODES[0], PER_KEY[0], OF_KEYS
    )
    start1, end1 = _reach(
        i[1], first[1], n[1], n_keys[1], k[1], s[1], MODES[1], PER_KEY[1], OF_KEYS
    )
    start2, end2 = _reach(
        i[2], first[2], n[2], n_keys[2], k[2], s[2], MODES[2], PER_KEY[2], OF_KEYS
    )
    return (start0, start1, start2), (end0, end1, end2)


@triton.jit
def _is_query(j, group, AXIS: tl.constexpr, PER_KEY: tl.constexpr):
    j = wrapped(j[AXIS], group.n_keys[AXIS] * PER_KEY[AXIS])
    return (j >= group.first[AXIS]) & (j < group.n[AXIS])


@triton.jit
def are_queries(j, group, real, MODES: tl.constexpr, PER_KEY: tl.constexpr):
    """``real`` and where numbers ``j``, before the modulo, are those of queries that are there."""
    for axis in tl.static_range(3):
        if (MODES[axis] >= CIRCULAR) & (PER_KEY[axis] > 0):
            real = real & _is_query(j, group, axis, PER_KEY)
    return real


@triton.jit
def tiles_that_attend(
    key_length, dilation, k, s, o, Q_SIZE: tl.constexpr, KV_SIZE: tl.constexpr,
    MODE: tl.constexpr, length=0, offset=0, R: tl.constexpr = 0,
):  # fmt: skip
    """The first of an axis's tiles of queries that attend a block of keys which begins ``o`` after
    its tile, and how many there are; with strides or dilation perhaps a few too many. A tile is of
    queries that stand at neighboring keys, one at each. ``length`` and ``offset`` are of queries
    that are a layout of their own, ``R`` per key."""
    most = group_length(key_length, dilation, 0)
    least = group_length(key_length, dilation, dilation - 1)
    # One past the last position of a query, and least and greatest of the first ones of groups.
    end_of_queries, begin, last_begin = most, 0, 0
    if R > 0:
        apart = dilation * R
        end_of_queries = group_length(offset + length, apart, 0)
        begin, last_begin = group_length(offset, apart, apart - 1), group_length(offset, apart, 0)
    # Where tiles begin whose block begins before the last key, and ends after the first.
    first, end = 1 - KV_SIZE - o, most - o
    if (MODE == CAUSAL) | (MODE == CAUSAL_STRIDED):
        end = tl.where((o < Q_SIZE) & (o + KV_SIZE > 1 - k), end, first)
    else:
        left, right = k // 2, k - 1 - k // 2
        if (MODE == STRIDED) | (MODE == TRUNCATED_STRIDED) | (MODE == CIRCULAR_STRIDED):
            # Leaders are at most so far from their queries.
            left, right = left + s - 1 - s // 2, right + s // 2
        if (MODE == SLIDING) | (MODE == STRIDED):
            # Beyond these, only windows that an end of the axis moves reach the block.
            first = tl.where(o + KV_SIZE > -left, first, first + least - k)
            end = tl.where(o < Q_SIZE + right, end, k - o)
        else:
            if MODE >= CIRCULAR:
                first, end = 0, end_of_queries
            end = tl.where((o + KV_SIZE > -left) & (o < Q_SIZE + right), end, first)
    first = tl.maximum(first - last_begin + Q_SIZE - 1, 0) // Q_SIZE
    end = (tl.minimum(end, end_of_queries) - begin + Q_SIZE - 1) // Q_SIZE
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
