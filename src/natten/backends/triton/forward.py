"""Forward: one program per tile of queries walks the box of keys that holds the tile's windows."""

from __future__ import annotations

import triton
import triton.language as tl

from natten.backends.triton.primitives import (
    LN2,
    LOG2E,
    coordinates,
    group_length,
    inside,
    split,
    token_offset,
    window,
)


@triton.jit
def _accumulate(acc, top, total, s, v, PRECISION: tl.constexpr):
    """One step of the online softmax; scores are in powers of two."""
    new_top = tl.maximum(top, tl.max(s, 1))
    # A row whose keys so far are all masked stays at -inf without making NaN.
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - reference[:, None])
    shrink = tl.exp2(top - reference)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def forward_kernel(
    query, key, value, rpb, extra_key, extra_value, out, lse,
    q_strides, k_strides, v_strides, ek_strides, ev_strides, out_strides, lse_strides,
    shape, key_shape, kernel_size, stride, dilation, tiles, heads, extra, scale,
    MODES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, PER_KV: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_RPB: tl.constexpr, HAS_EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    pid, t0, t1, t2 = split(tl.program_id(0), tiles[0], tiles[1], tiles[2])
    pid, g0, g1, g2 = split(pid, dilation[0], dilation[1], dilation[2])
    head, batch = pid % heads, (pid // heads).to(tl.int64)
    kv_head = head // PER_KV

    n0 = group_length(shape[0], dilation[0], g0)
    n1 = group_length(shape[1], dilation[1], g1)
    n2 = group_length(shape[2], dilation[2], g2)
    f0, f1, f2 = t0 * TQ[0], t1 * TQ[1], t2 * TQ[2]
    if (f0 >= n0) | (f1 >= n1) | (f2 >= n2):
        return
    m0 = group_length(key_shape[0], dilation[0], g0)
    m1 = group_length(key_shape[1], dilation[1], g1)
    m2 = group_length(key_shape[2], dilation[2], g2)

    r0, r1, r2 = coordinates(tl.arange(0, M), TQ[1], TQ[2])
    i0, i1, i2 = f0 + r0, f1 + r1, f2 + r2
    real = (i0 < n0) & (i1 < n1) & (i2 < n2)
    i0, i1, i2 = tl.minimum(i0, n0 - 1), tl.minimum(i1, n1 - 1), tl.minimum(i2, n2 - 1)
    s0, e0 = window(i0, n0, m0, kernel_size[0], stride[0], MODES[0])
    s1, e1 = window(i1, n1, m1, kernel_size[1], stride[1], MODES[1])
    s2, e2 = window(i2, n2, m2, kernel_size[2], stride[2], MODES[2])
    # Windows move monotonically: the first query's start and the last one's end bound the box.
    low0, _ = window(f0, n0, m0, kernel_size[0], stride[0], MODES[0])
    low1, _ = window(f1, n1, m1, kernel_size[1], stride[1], MODES[1])
    low2, _ = window(f2, n2, m2, kernel_size[2], stride[2], MODES[2])
    last0, last1 = tl.minimum(f0 + TQ[0], n0) - 1, tl.minimum(f1 + TQ[1], n1) - 1
    last2 = tl.minimum(f2 + TQ[2], n2) - 1
    _, high0 = window(last0, n0, m0, kernel_size[0], stride[0], MODES[0])
    _, high1 = window(last1, n1, m1, kernel_size[1], stride[1], MODES[1])
    _, high2 = window(last2, n2, m2, kernel_size[2], stride[2], MODES[2])

    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = token_offset(i0, i1, i2, (g0, g1, g2), dilation, q_strides)
    q_base = query + batch * q_strides[0] + head.to(tl.int64) * q_strides[4]
    q = tl.load(
        q_base + rows[:, None] + d[None, :], mask=real[:, None] & (d[None, :] < D), other=0.0
    )
    k_base = key + batch * k_strides[0] + kv_head.to(tl.int64) * k_strides[4]
    v_base = value + batch * v_strides[0] + kv_head.to(tl.int64) * v_strides[4]
    c0, c1, c2 = coordinates(tl.arange(0, N), TK[1], TK[2])

    acc = tl.zeros([M, BLOCK_DV], dtype=tl.float32)
    top = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    b1, b2 = tl.cdiv(high1 - low1, TK[1]), tl.cdiv(high2 - low2, TK[2])
    boxes = tl.cdiv(high0 - low0, TK[0]) * b1 * b2
    for box in range(0, boxes):
        p0 = low0 + box // (b1 * b2) * TK[0] + c0
        p1 = low1 + box // b2 % b1 * TK[1] + c1
        p2 = low2 + box % b2 * TK[2] + c2
        present = (p0 < high0) & (p1 < high1) & (p2 < high2)
        cols = token_offset(p0, p1, p2, (g0, g1, g2), dilation, k_strides)
        k = tl.load(
            k_base + cols[:, None] + d[None, :], mask=present[:, None] & (d[None, :] < D), other=0.0
        )
        cols = token_offset(p0, p1, p2, (g0, g1, g2), dilation, v_strides)
        v = tl.load(
            v_base + cols[:, None] + dv[None, :],
            mask=present[:, None] & (dv[None, :] < DV),
            other=0.0,
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        allowed = present[None, :] & real[:, None]
        allowed = inside(p0[None, :], s0[:, None], e0[:, None], MODES[0], allowed)
        allowed = inside(p1[None, :], s1[:, None], e1[:, None], MODES[1], allowed)
        allowed = inside(p2[None, :], s2[:, None], e2[:, None], MODES[2], allowed)
        if HAS_RPB:
            size1, size2 = 2 * kernel_size[1] - 1, 2 * kernel_size[2] - 1
            o0 = p0[None, :] - i0[:, None] + kernel_size[0] - 1
            o1 = p1[None, :] - i1[:, None] + kernel_size[1] - 1
            o2 = p2[None, :] - i2[:, None] + kernel_size[2] - 1
            at = ((head * (2 * kernel_size[0] - 1) + o0) * size1 + o1) * size2 + o2
            s += tl.load(rpb + at, mask=allowed, other=0.0).to(tl.float32) * LOG2E
        s = tl.where(allowed, s, float("-inf"))
        acc, top, total = _accumulate(acc, top, total, s, v, PRECISION)

    if HAS_EXTRA:
        ek_base = extra_key + batch * ek_strides[0] + kv_head.to(tl.int64) * ek_strides[2]
        ev_base = extra_value + batch * ev_strides[0] + kv_head.to(tl.int64) * ev_strides[2]
        for first in range(0, extra, N):
            e = first + tl.arange(0, N)
            present = e < extra
            cols = e.to(tl.int64) * ek_strides[1]
            k = tl.load(
                ek_base + cols[:, None] + d[None, :],
                mask=present[:, None] & (d[None, :] < D), other=0.0,
            )  # fmt: skip
            cols = e.to(tl.int64) * ev_strides[1]
            v = tl.load(
                ev_base + cols[:, None] + dv[None, :],
                mask=present[:, None] & (dv[None, :] < DV), other=0.0,
            )  # fmt: skip
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            s = tl.where(present[None, :], s, float("-inf"))
            acc, top, total = _accumulate(acc, top, total, s, v, PRECISION)

    found = total > 0
    acc = acc / tl.where(found, total, 1.0)[:, None]
    rows = token_offset(i0, i1, i2, (g0, g1, g2), dilation, out_strides)
    out_base = out + batch * out_strides[0] + head.to(tl.int64) * out_strides[4]
    tl.store(
        out_base + rows[:, None] + dv[None, :], acc.to(out.dtype.element_ty),
        mask=real[:, None] & (dv[None, :] < DV),
    )  # fmt: skip
    rows = token_offset(i0, i1, i2, (g0, g1, g2), dilation, lse_strides)
    lse_base = lse + batch * lse_strides[0] + head.to(tl.int64) * lse_strides[4]
    tl.store(lse_base + rows, tl.where(found, top + tl.log2(total), float("-inf")) * LN2, mask=real)
