"""Unfused attention: products with a window's keys, weighted sums of its values, and their bias.

Weights are ``[batch, *space, heads, window tokens]``, a row of slots per query. A tile of queries
meets boxes of keys in matrix products, as in the fused kernels; a pair inside the window has its
weight at ``slot = position - window start``. Row-major slots make that a term of the query plus a
term of the key, so that no index is stored or gathered. Every number has one writer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from natten import tuning
from natten.backends.triton import tiles as tiling
from natten.backends.triton.plan import (
    Launch,
    allows_tf32,
    contiguous,
    modes,
    on_device,
    padded,
    readable,
)
from natten.backends.triton.primitives import (
    bias_offset,
    coordinates,
    group_length,
    inside,
    kernel,
    load_rows,
    queries_of,
    split,
    store_rows,
    token,
    token_offset,
    window,
)
from natten.neighborhood import Neighborhood

# Wider heads are worked on in blocks of channels of so many bytes a row.
MOST_BYTES = 256


@triton.jit
def _tile(t, r, n, k, s, MODE: tl.constexpr, T: tl.constexpr, TRANSPOSED: tl.constexpr):
    """An axis of tile ``t``: its rows' positions, which are real, their reach, the whole reach.

    Reach is keys of queries; ``TRANSPOSED``: queries of keys.
    """
    first, last = t * T, tl.minimum(t * T + T, n) - 1
    i = tl.minimum(first + r, last)
    if TRANSPOSED:
        start, end = queries_of(i, n, n, k, s, MODE)
        low, _ = queries_of(first, n, n, k, s, MODE)
        _, high = queries_of(last, n, n, k, s, MODE)
    else:
        start, end = window(i, n, n, k, s, MODE)
        low, _ = window(first, n, n, k, s, MODE)
        # All slots, also those that causality masks.
        high, _ = window(last, n, n, k, s, MODE)
        high += k
    return i, first + r <= last, start, end, low, high


@triton.jit
def _slot(p0, p1, p2, K1, K2):
    """Number of a slot, a key's part or a window start's part of it."""
    return (p0.to(tl.int64) * K1 + p1) * K2 + p2


@kernel
def qk_kernel(
    query, key, attn,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, a_b, a_0, a_1, a_2, a_h,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, heads,
    MODES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens ``L``, window ``K``, stride ``S``, dilation ``D``, tiles ``T``, per axis."""
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    pid, t0, t1, t2 = split(tl.program_id(0), T0, T1, T2)
    pid, g0, g1, g2 = split(pid, D0, D1, D2)
    head, batch = (pid % heads).to(tl.int64), (pid // heads).to(tl.int64)
    n0, n1, n2 = group_length(L0, D0, g0), group_length(L1, D1, g1), group_length(L2, D2, g2)
    if (t0 * TQ[0] >= n0) | (t1 * TQ[1] >= n1) | (t2 * TQ[2] >= n2):
        return
    r0, r1, r2 = coordinates(tl.arange(0, M), TQ[1], TQ[2])
    i0, real0, s0, e0, low0, high0 = _tile(t0, r0, n0, K0, S0, MODES[0], TQ[0], False)
    i1, real1, s1, e1, low1, high1 = _tile(t1, r1, n1, K1, S1, MODES[1], TQ[1], False)
    i2, real2, s2, e2, low2, high2 = _tile(t2, r2, n2, K2, S2, MODES[2], TQ[2], False)
    real = real0 & real1 & real2
    x0, x1 = token(i0, g0, D0, MODES[0]), token(i1, g1, D1, MODES[1])
    x2 = token(i2, g2, D2, MODES[2])
    d = tl.arange(0, BLOCK_D)
    rows = token_offset(batch * q_b + head * q_h, x0, x1, x2, q_0, q_1, q_2, ALIGN)
    q = load_rows(query, rows, real, d, D)
    slots = token_offset(batch * a_b + head * a_h, x0, x1, x2, a_0, a_1, a_2, 1)
    slots -= _slot(s0, s1, s2, K1, K2)
    c0, c1, c2 = coordinates(tl.arange(0, N), TK[1], TK[2])
    k_start = batch * k_b + head * k_h

    b1, b2 = tl.cdiv(high1 - low1, TK[1]), tl.cdiv(high2 - low2, TK[2])
    for box in range(0, tl.cdiv(high0 - low0, TK[0]) * b1 * b2):
        p0, p1 = low0 + box // (b1 * b2) * TK[0] + c0, low1 + box // b2 % b1 * TK[1] + c1
        p2 = low2 + box % b2 * TK[2] + c2
        present = (p0 < n0) & (p1 < n1) & (p2 < n2)
        y0, y1 = token(p0, g0, D0, MODES[0]), token(p1, g1, D1, MODES[1])
        y2 = token(p2, g2, D2, MODES[2])
        cols = token_offset(k_start, y0, y1, y2, k_0, k_1, k_2, ALIGN)
        k = load_rows(key, cols, present, d, D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        for c in tl.static_range(BLOCK_D, D, BLOCK_D):
            more = load_rows(query, rows, real, c + d, D)
            k = load_rows(key, cols, present, c + d, D)
            s = tl.dot(more, tl.trans(k), s, input_precision=PRECISION)
        allowed = inside(p0[None, :], s0[:, None], e0[:, None], MODES[0], present[None, :])
        allowed = inside(p1[None, :], s1[:, None], e1[:, None], MODES[1], allowed)
        allowed = inside(p2[None, :], s2[:, None], e2[:, None], MODES[2], allowed)
        held = inside(p0[None, :], s0[:, None], s0[:, None] + K0, MODES[0], real[:, None])
        held = inside(p1[None, :], s1[:, None], s1[:, None] + K1, MODES[1], held)
        held = inside(p2[None, :], s2[:, None], s2[:, None] + K2, MODES[2], held)
        at = slots[:, None] + _slot(p0, p1, p2, K1, K2)[None, :]
        s = tl.where(allowed, s, 0.0).to(attn.dtype.element_ty)
        tl.store(attn + at, s, mask=held & present[None, :])


@kernel
def av_kernel(
    attn, value, out,
    a_b, a_0, a_1, a_2, a_h, v_b, v_0, v_1, v_2, v_h, o_b, o_0, o_1, o_2, o_h,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, heads,
    MODES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The arguments are ``qk_kernel``'s; a program has one block of channels."""
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    pid, t0, t1, t2 = split(tl.program_id(0), T0, T1, T2)
    pid, g0, g1, g2 = split(pid, D0, D1, D2)
    head, batch = (pid % heads).to(tl.int64), (pid // heads).to(tl.int64)
    n0, n1, n2 = group_length(L0, D0, g0), group_length(L1, D1, g1), group_length(L2, D2, g2)
    if (t0 * TQ[0] >= n0) | (t1 * TQ[1] >= n1) | (t2 * TQ[2] >= n2):
        return
    r0, r1, r2 = coordinates(tl.arange(0, M), TQ[1], TQ[2])
    i0, real0, s0, e0, low0, high0 = _tile(t0, r0, n0, K0, S0, MODES[0], TQ[0], False)
    i1, real1, s1, e1, low1, high1 = _tile(t1, r1, n1, K1, S1, MODES[1], TQ[1], False)
    i2, real2, s2, e2, low2, high2 = _tile(t2, r2, n2, K2, S2, MODES[2], TQ[2], False)
    real = real0 & real1 & real2
    x0, x1 = token(i0, g0, D0, MODES[0]), token(i1, g1, D1, MODES[1])
    x2 = token(i2, g2, D2, MODES[2])
    slots = token_offset(batch * a_b + head * a_h, x0, x1, x2, a_0, a_1, a_2, 1)
    slots -= _slot(s0, s1, s2, K1, K2)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c0, c1, c2 = coordinates(tl.arange(0, N), TK[1], TK[2])
    v_start = batch * v_b + head * v_h

    acc = tl.zeros([M, BLOCK_D], dtype=tl.float32)
    b1, b2 = tl.cdiv(high1 - low1, TK[1]), tl.cdiv(high2 - low2, TK[2])
    for box in range(0, tl.cdiv(high0 - low0, TK[0]) * b1 * b2):
        p0, p1 = low0 + box // (b1 * b2) * TK[0] + c0, low1 + box // b2 % b1 * TK[1] + c1
        p2 = low2 + box % b2 * TK[2] + c2
        present = (p0 < n0) & (p1 < n1) & (p2 < n2)
        y0, y1 = token(p0, g0, D0, MODES[0]), token(p1, g1, D1, MODES[1])
        y2 = token(p2, g2, D2, MODES[2])
        cols = token_offset(v_start, y0, y1, y2, v_0, v_1, v_2, ALIGN)
        v = load_rows(value, cols, present, d, D)
        allowed = real[:, None] & present[None, :]
        allowed = inside(p0[None, :], s0[:, None], e0[:, None], MODES[0], allowed)
        allowed = inside(p1[None, :], s1[:, None], e1[:, None], MODES[1], allowed)
        allowed = inside(p2[None, :], s2[:, None], e2[:, None], MODES[2], allowed)
        at = slots[:, None] + _slot(p0, p1, p2, K1, K2)[None, :]
        p = tl.load(attn + at, mask=allowed, other=0.0).to(v.dtype)
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
    rows = token_offset(batch * o_b + head * o_h, x0, x1, x2, o_0, o_1, o_2, 1)
    store_rows(out, rows, real, d, D, acc)


@kernel
def av_transposed_kernel(
    attn, value, out,
    a_b, a_0, a_1, a_2, a_h, v_b, v_0, v_1, v_2, v_h, o_b, o_0, o_1, o_2, o_h,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, heads,
    MODES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The arguments are ``av_kernel``'s; tiles ``T`` are of keys, ``value`` belongs to queries."""
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    pid, t0, t1, t2 = split(tl.program_id(0), T0, T1, T2)
    pid, g0, g1, g2 = split(pid, D0, D1, D2)
    head, batch = (pid % heads).to(tl.int64), (pid // heads).to(tl.int64)
    n0, n1, n2 = group_length(L0, D0, g0), group_length(L1, D1, g1), group_length(L2, D2, g2)
    if (t0 * TK[0] >= n0) | (t1 * TK[1] >= n1) | (t2 * TK[2] >= n2):
        return
    c0, c1, c2 = coordinates(tl.arange(0, N), TK[1], TK[2])
    p0, real0, s0, e0, low0, high0 = _tile(t0, c0, n0, K0, S0, MODES[0], TK[0], True)
    p1, real1, s1, e1, low1, high1 = _tile(t1, c1, n1, K1, S1, MODES[1], TK[1], True)
    p2, real2, s2, e2, low2, high2 = _tile(t2, c2, n2, K2, S2, MODES[2], TK[2], True)
    present = real0 & real1 & real2
    keys = _slot(p0, p1, p2, K1, K2)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    r0, r1, r2 = coordinates(tl.arange(0, M), TQ[1], TQ[2])
    a_start, v_start = batch * a_b + head * a_h, batch * v_b + head * v_h

    acc = tl.zeros([N, BLOCK_D], dtype=tl.float32)
    # A key of a strided causal axis may have no query at all.
    b0 = tl.maximum(tl.cdiv(high0 - low0, TQ[0]), 0)
    b1 = tl.maximum(tl.cdiv(high1 - low1, TQ[1]), 0)
    b2 = tl.maximum(tl.cdiv(high2 - low2, TQ[2]), 0)
    for box in range(0, b0 * b1 * b2):
        i0, i1 = low0 + box // (b1 * b2) * TQ[0] + r0, low1 + box // b2 % b1 * TQ[1] + r1
        i2 = low2 + box % b2 * TQ[2] + r2
        real = (i0 < n0) & (i1 < n1) & (i2 < n2)
        x0, x1 = token(i0, g0, D0, MODES[0]), token(i1, g1, D1, MODES[1])
        x2 = token(i2, g2, D2, MODES[2])
        rows = token_offset(v_start, x0, x1, x2, v_0, v_1, v_2, ALIGN)
        v = load_rows(value, rows, real, d, D)
        w0, _ = window(i0, n0, n0, K0, S0, MODES[0])
        w1, _ = window(i1, n1, n1, K1, S1, MODES[1])
        w2, _ = window(i2, n2, n2, K2, S2, MODES[2])
        slots = token_offset(a_start, x0, x1, x2, a_0, a_1, a_2, 1) - _slot(w0, w1, w2, K1, K2)
        allowed = real[:, None] & present[None, :]
        allowed = inside(i0[:, None], s0[None, :], e0[None, :], MODES[0], allowed)
        allowed = inside(i1[:, None], s1[None, :], e1[None, :], MODES[1], allowed)
        allowed = inside(i2[:, None], s2[None, :], e2[None, :], MODES[2], allowed)
        # Slots of a query lie side by side: read by query, then transpose.
        p = tl.load(attn + slots[:, None] + keys[None, :], mask=allowed, other=0.0).to(v.dtype)
        acc = tl.dot(tl.trans(p), v, acc, input_precision=PRECISION)
    y0, y1 = token(p0, g0, D0, MODES[0]), token(p1, g1, D1, MODES[1])
    y2 = token(p2, g2, D2, MODES[2])
    cols = token_offset(batch * o_b + head * o_h, y0, y1, y2, o_0, o_1, o_2, 1)
    store_rows(out, cols, present, d, D, acc)


@kernel
def slot_bias_kernel(
    rpb, out, L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    MODES: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The bias in every slot: ``out [heads, *space, window tokens]``."""
    head, slots = tl.program_id(2).to(tl.int64), K0 * K1 * K2
    x = tl.program_id(0) * M + tl.arange(0, M)
    slot = tl.program_id(1) * N + tl.arange(0, N)
    x0, x1, x2 = x // (L1 * L2), x // L2 % L1, x % L2
    i0, i1, i2 = x0 // D0, x1 // D1, x2 // D2
    n0, n1 = group_length(L0, D0, x0 % D0), group_length(L1, D1, x1 % D1)
    n2 = group_length(L2, D2, x2 % D2)
    s0, e0 = window(i0, n0, n0, K0, S0, MODES[0])
    s1, e1 = window(i1, n1, n1, K1, S1, MODES[1])
    s2, e2 = window(i2, n2, n2, K2, S2, MODES[2])
    p0 = s0[:, None] + (slot // (K1 * K2))[None, :]
    p1 = s1[:, None] + (slot // K2 % K1)[None, :]
    p2 = s2[:, None] + (slot % K2)[None, :]
    held = (x < L0 * L1 * L2)[:, None] & (slot < slots)[None, :]
    allowed = held & (p0 < e0[:, None]) & (p1 < e1[:, None]) & (p2 < e2[:, None])
    at = bias_offset(
        p0 - i0[:, None], p1 - i1[:, None], p2 - i2[:, None], (K0, K1, K2), head
    )  # fmt: skip
    bias = tl.load(rpb + at, mask=allowed, other=0.0)
    rows = head * L0 * L1 * L2 + x
    tl.store(out + rows[:, None] * slots + slot[None, :], bias, mask=held)


@kernel
def slot_bias_transposed_kernel(
    grad_out, grad_rpb, a_0, a_1, a_2, a_h, L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    offsets, per_part, MODES: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Sums over one part of the queries, ``grad_rpb [parts, heads, offsets]``.

    Offsets fix the slot of each query, so that nothing is scattered.
    """
    part, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    at = tl.program_id(1) * N + tl.arange(0, N)
    width1, width2 = 2 * K1 - 1, 2 * K2 - 1
    o0, o1, o2 = at // (width1 * width2), at // width2 % width1, at % width2
    o0, o1, o2 = o0 - (K0 - 1), o1 - (K1 - 1), o2 - (K2 - 1)
    acc = tl.zeros([M, N], dtype=tl.float32)
    for first in range(0, per_part, M):
        own = first + tl.arange(0, M)
        x = part * per_part + own
        x0, x1, x2 = x // (L1 * L2), x // L2 % L1, x % L2
        i0, i1, i2 = x0 // D0, x1 // D1, x2 // D2
        n0, n1 = group_length(L0, D0, x0 % D0), group_length(L1, D1, x1 % D1)
        n2 = group_length(L2, D2, x2 % D2)
        s0, e0 = window(i0, n0, n0, K0, S0, MODES[0])
        s1, e1 = window(i1, n1, n1, K1, S1, MODES[1])
        s2, e2 = window(i2, n2, n2, K2, S2, MODES[2])
        p0, p1 = i0[:, None] + o0[None, :], i1[:, None] + o1[None, :]
        p2 = i2[:, None] + o2[None, :]
        allowed = ((own < per_part) & (x < L0 * L1 * L2))[:, None] & (at < offsets)[None, :]
        allowed = inside(p0, s0[:, None], e0[:, None], MODES[0], allowed)
        allowed = inside(p1, s1[:, None], e1[:, None], MODES[1], allowed)
        allowed = inside(p2, s2[:, None], e2[:, None], MODES[2], allowed)
        rows = token_offset(head * a_h, x0, x1, x2, a_0, a_1, a_2, 1)[:, None]
        rows += _slot(p0 - s0[:, None], p1 - s1[:, None], p2 - s2[:, None], K1, K2)
        acc += tl.load(grad_out + rows, mask=allowed, other=0.0).to(tl.float32)
    to = (part.to(tl.int64) * tl.num_programs(2) + head) * offsets + at
    tl.store(grad_rpb + to, tl.sum(acc, 0), mask=at < offsets)


KERNELS = {"qk": qk_kernel, "av": av_kernel, "av_transposed": av_transposed_kernel}


def _sizes(rule: Neighborhood, space: Sequence[int]) -> tuple[int, ...]:
    """Tokens, window, stride and dilation per axis, as kernels take them."""
    return (
        *padded(space, 1), *padded(rule.kernel_size, 1), *padded(rule.stride, 1),
        *padded(rule.dilation, 1),
    )  # fmt: skip


def choose_tiles(
    name: str, rule: Neighborhood, space: tuple[int, ...], dim: int, itemsize: int
) -> tuple[tiling.Tiles, dict[str, Any]]:
    """Tiles of a map and the constants that follow from them; any head dim."""
    kind = "key" if name == "av_transposed" else "forward"
    most = min(dim, MOST_BYTES // itemsize)
    # As of narrow heads: addresses of single weights fill the registers beside large tiles.
    narrow = min(dim, 128 // itemsize)
    tiles = tiling.choose(kind, rule, space, space, narrow, narrow, itemsize)
    return tiles, {
        "MODES": modes(rule, space),
        "TQ": tiles.query,
        "TK": tiles.key,
        "D": dim,
        "BLOCK_D": tiling.block(most),
        "num_warps": 8 if most > 32 else 4,
        "num_stages": 2,
    }


@tuning.cached
def _map_launch(
    name: str,
    rule: Neighborhood,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    tf32: bool,
) -> Launch:
    """The kernel of a map; ``shape`` is of its second tensor, ``strides`` are of all three."""
    batch, *space, heads, dim = shape
    tiles, constants = choose_tiles(name, rule, tuple(space), dim, dtypes[1].itemsize)
    outer = tiles.key if name == "av_transposed" else tiles.query
    lengths, dilation = padded(space, 1), padded(rule.dilation, 1)
    counts = [math.ceil(math.ceil(n / d) / size) for n, d, size in zip(lengths, dilation, outer)]
    flat = [(each[0], *padded(each[1:-2], 0), each[-2]) for each in strides]
    channels = flat[:2] if name == "qk" else flat[1:2]  # weights have rows of any length
    constants["ALIGN"] = math.gcd(16, *(s for each in channels for s in each))
    constants["PRECISION"] = "tf32" if tf32 else "ieee"
    blocks = 1 if name == "qk" else -(-dim // constants["BLOCK_D"])
    numbers = (*(s for each in flat for s in each), *_sizes(rule, space), *counts, heads)
    programs = math.prod(counts) * math.prod(dilation) * batch * heads
    return Launch(KERNELS[name], (programs, blocks), numbers, constants)


def _run(name: str, a: Tensor, b: Tensor, channels: int, rule: Neighborhood) -> Tensor:
    """A map of ``a`` and ``b``; the result is heads-first in memory."""
    like = a if name == "qk" else b
    batch, *space, heads, _ = b.shape
    out = like.new_empty(batch, heads, *space, channels).movedim(1, -2)
    if out.numel() == 0:
        return out
    a, b = readable(a), readable(b)
    tensors = (a, b, out)
    launch = _map_launch(
        name,
        rule,
        b.device,
        tuple(x.dtype for x in tensors),
        tuple(b.shape),
        tuple(x.stride() for x in tensors),
        b.dtype == torch.float32 and allows_tf32(),
    )
    with on_device(b):
        launch(*tensors)
    return out


def qk(query: Tensor, key: Tensor, rule: Neighborhood) -> Tensor:
    """Products of every query with its window's keys; 0 in masked slots."""
    return _run("qk", query, key, rule.window_tokens, rule)


def av(attn: Tensor, value: Tensor, rule: Neighborhood) -> Tensor:
    """Sum of the window's values, weighted; masked slots are ignored."""
    return _run("av", attn, value, value.shape[-1], rule)


def av_transposed(attn: Tensor, x: Tensor, rule: Neighborhood) -> Tensor:
    """For every key, the sum of ``x`` at the queries that attend it, weighted."""
    return _run("av_transposed", attn, x, x.shape[-1], rule)


def bias(rpb: Tensor, shape: Sequence[int], rule: Neighborhood) -> Tensor:
    """``rpb`` in every window slot, ``[*space, heads, window tokens]``; 0 in masked slots."""
    heads, slots, tokens = rpb.shape[0], rule.window_tokens, math.prod(shape)
    out = rpb.new_empty(heads, *shape, slots)
    rpb = contiguous(rpb)
    with on_device(rpb):
        slot_bias_kernel[(-(-tokens // 16), -(-slots // 64), heads)](
            rpb, out, *_sizes(rule, shape), MODES=modes(rule, shape), M=16, N=64
        )
    return out.movedim(0, -2)


def bias_transposed(grad: Tensor, rule: Neighborhood) -> Tensor:
    """The gradient of ``rpb`` from ``grad [*space, heads, window tokens]``."""
    *shape, heads, _ = grad.shape
    grad = readable(grad)
    *strides, head_stride, _ = grad.stride()
    sizes = [2 * k - 1 for k in rule.kernel_size]
    offsets, tokens = math.prod(sizes), math.prod(shape)
    blocks = -(-offsets // 32)
    # Enough parts to fill a GPU; more would only cost memory.
    parts = max(1, min(tokens // 64, 4096 // (blocks * heads)))
    found = grad.new_empty(parts, heads, *sizes, dtype=torch.float32)
    with on_device(grad):
        slot_bias_transposed_kernel[(parts, blocks, heads)](
            grad, found, *padded(strides, 0), head_stride, *_sizes(rule, shape), offsets,
            -(-tokens // parts), MODES=modes(rule, shape), M=32, N=32,
        )  # fmt: skip
    return found.sum(0).to(grad.dtype)
