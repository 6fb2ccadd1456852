"""Backward in two passes without atomics, so that every run gives the same bits.

The first pass walks the keys of a tile of queries, as the forward does, and gives dQ. The second
walks the queries that can see a tile of keys, and gives dK and dV; its scores are transposed, so
that weights stay in registers as the left operand of both products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from natten.backends.triton.primitives import (
    LOG2E,
    coordinates,
    group_length,
    inside,
    queries_of,
    split,
    token_offset,
    window,
)


@triton.jit
def delta_kernel(out, grad_out, grad_lse, delta, rows, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
                 HAS_LSE: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """``sum(out * grad_out) - grad_lse`` per query; all tensors contiguous."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    dv = tl.arange(0, BLOCK_DV)
    mask = (row < rows)[:, None] & (dv < DV)[None, :]
    at = row[:, None] * DV + dv[None, :]
    o = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(o * g, 1)
    if HAS_LSE:
        total -= tl.load(grad_lse + row, mask=row < rows, other=0.0)
    tl.store(delta + row, total, mask=row < rows)


@triton.jit
def _query_step(acc, q, k, v, g, lse, delta, allowed, bias, scale, PRECISION: tl.constexpr):
    """Add one tile of keys to dQ (without the scale)."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
    p = tl.where(allowed, tl.exp2(s - lse[:, None]), 0.0)
    ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def query_kernel(
    query, key, value, rpb, extra_key, extra_value, grad_out, lse, delta, grad_query,
    q_strides, k_strides, v_strides, ek_strides, ev_strides, out_strides, lse_strides, dq_strides,
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
    low0, _ = window(f0, n0, m0, kernel_size[0], stride[0], MODES[0])
    low1, _ = window(f1, n1, m1, kernel_size[1], stride[1], MODES[1])
    low2, _ = window(f2, n2, m2, kernel_size[2], stride[2], MODES[2])
    last0, last1 = tl.minimum(f0 + TQ[0], n0) - 1, tl.minimum(f1 + TQ[1], n1) - 1
    last2 = tl.minimum(f2 + TQ[2], n2) - 1
    _, high0 = window(last0, n0, m0, kernel_size[0], stride[0], MODES[0])
    _, high1 = window(last1, n1, m1, kernel_size[1], stride[1], MODES[1])
    _, high2 = window(last2, n2, m2, kernel_size[2], stride[2], MODES[2])

    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    head64 = head.to(tl.int64)
    rows = token_offset(i0, i1, i2, (g0, g1, g2), dilation, q_strides)
    q_mask = real[:, None] & (d[None, :] < D)
    q_base = query + batch * q_strides[0] + head64 * q_strides[4]
    q = tl.load(q_base + rows[:, None] + d[None, :], mask=q_mask, other=0.0)
    rows = token_offset(i0, i1, i2, (g0, g1, g2), dilation, out_strides)
    g_base = grad_out + batch * out_strides[0] + head64 * out_strides[4]
    g = tl.load(
        g_base + rows[:, None] + dv[None, :], mask=real[:, None] & (dv[None, :] < DV), other=0.0
    )
    rows = token_offset(i0, i1, i2, (g0, g1, g2), dilation, lse_strides)
    rows += batch * lse_strides[0] + head64 * lse_strides[4]
    row_lse = tl.load(lse + rows, mask=real, other=0.0) * LOG2E
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
    row_delta = tl.load(delta + rows, mask=real, other=0.0)
    k_base = key + batch * k_strides[0] + kv_head.to(tl.int64) * k_strides[4]
    v_base = value + batch * v_strides[0] + kv_head.to(tl.int64) * v_strides[4]
    c0, c1, c2 = coordinates(tl.arange(0, N), TK[1], TK[2])

    acc = tl.zeros([M, BLOCK_D], dtype=tl.float32)
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
        allowed = present[None, :] & real[:, None]
        allowed = inside(p0[None, :], s0[:, None], e0[:, None], MODES[0], allowed)
        allowed = inside(p1[None, :], s1[:, None], e1[:, None], MODES[1], allowed)
        allowed = inside(p2[None, :], s2[:, None], e2[:, None], MODES[2], allowed)
        bias = 0.0
        if HAS_RPB:
            size1, size2 = 2 * kernel_size[1] - 1, 2 * kernel_size[2] - 1
            o0 = p0[None, :] - i0[:, None] + kernel_size[0] - 1
            o1 = p1[None, :] - i1[:, None] + kernel_size[1] - 1
            o2 = p2[None, :] - i2[:, None] + kernel_size[2] - 1
            at = ((head * (2 * kernel_size[0] - 1) + o0) * size1 + o1) * size2 + o2
            bias = tl.load(rpb + at, mask=allowed, other=0.0).to(tl.float32) * LOG2E
        acc = _query_step(acc, q, k, v, g, row_lse, row_delta, allowed, bias, scale, PRECISION)

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
            allowed = present[None, :] & real[:, None]
            acc = _query_step(acc, q, k, v, g, row_lse, row_delta, allowed, 0.0, scale, PRECISION)

    rows = token_offset(i0, i1, i2, (g0, g1, g2), dilation, dq_strides)
    dq_base = grad_query + batch * dq_strides[0] + head64 * dq_strides[4]
    tl.store(
        dq_base + rows[:, None] + d[None, :], (acc * scale).to(grad_query.dtype.element_ty),
        mask=q_mask,
    )  # fmt: skip


@triton.jit
def key_kernel(
    query, key, value, rpb, grad_out, lse, delta, grad_key, grad_value,
    q_strides, k_strides, v_strides, out_strides, lse_strides, dk_strides, dv_strides,
    shape, key_shape, kernel_size, stride, dilation, tiles, kv_heads, scale,
    MODES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, PER_KV: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_RPB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    pid, t0, t1, t2 = split(tl.program_id(0), tiles[0], tiles[1], tiles[2])
    pid, g0, g1, g2 = split(pid, dilation[0], dilation[1], dilation[2])
    kv_head, batch = pid % kv_heads, (pid // kv_heads).to(tl.int64)

    n0 = group_length(shape[0], dilation[0], g0)
    n1 = group_length(shape[1], dilation[1], g1)
    n2 = group_length(shape[2], dilation[2], g2)
    m0 = group_length(key_shape[0], dilation[0], g0)
    m1 = group_length(key_shape[1], dilation[1], g1)
    m2 = group_length(key_shape[2], dilation[2], g2)
    f0, f1, f2 = t0 * TK[0], t1 * TK[1], t2 * TK[2]
    if (f0 >= m0) | (f1 >= m1) | (f2 >= m2):
        return

    c0, c1, c2 = coordinates(tl.arange(0, N), TK[1], TK[2])
    p0, p1, p2 = f0 + c0, f1 + c1, f2 + c2
    present = (p0 < m0) & (p1 < m1) & (p2 < m2)
    last0, last1 = tl.minimum(f0 + TK[0], m0) - 1, tl.minimum(f1 + TK[1], m1) - 1
    last2 = tl.minimum(f2 + TK[2], m2) - 1
    low0, high0 = queries_of(f0, last0, n0, m0, kernel_size[0], stride[0], MODES[0])
    low1, high1 = queries_of(f1, last1, n1, m1, kernel_size[1], stride[1], MODES[1])
    low2, high2 = queries_of(f2, last2, n2, m2, kernel_size[2], stride[2], MODES[2])

    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    kv_head64 = kv_head.to(tl.int64)
    cols = token_offset(p0, p1, p2, (g0, g1, g2), dilation, k_strides)
    k_mask = present[:, None] & (d[None, :] < D)
    v_mask = present[:, None] & (dv[None, :] < DV)
    k_base = key + batch * k_strides[0] + kv_head64 * k_strides[4]
    k = tl.load(k_base + cols[:, None] + d[None, :], mask=k_mask, other=0.0)
    cols = token_offset(p0, p1, p2, (g0, g1, g2), dilation, v_strides)
    v_base = value + batch * v_strides[0] + kv_head64 * v_strides[4]
    v = tl.load(v_base + cols[:, None] + dv[None, :], mask=v_mask, other=0.0)
    r0, r1, r2 = coordinates(tl.arange(0, M), TQ[1], TQ[2])

    dk_acc = tl.zeros([N, BLOCK_D], dtype=tl.float32)
    dv_acc = tl.zeros([N, BLOCK_DV], dtype=tl.float32)
    b1, b2 = tl.cdiv(high1 - low1, TQ[1]), tl.cdiv(high2 - low2, TQ[2])
    boxes = tl.cdiv(high0 - low0, TQ[0]) * b1 * b2
    boxes = tl.where((high0 > low0) & (high1 > low1) & (high2 > low2), boxes, 0)
    for step in range(0, boxes * PER_KV):
        head, box = kv_head * PER_KV + step // boxes, step % boxes
        i0 = low0 + box // (b1 * b2) * TQ[0] + r0
        i1 = low1 + box // b2 % b1 * TQ[1] + r1
        i2 = low2 + box % b2 * TQ[2] + r2
        real = (i0 < high0) & (i1 < high1) & (i2 < high2)
        head64 = head.to(tl.int64)
        rows = token_offset(i0, i1, i2, (g0, g1, g2), dilation, q_strides)
        q_base = query + batch * q_strides[0] + head64 * q_strides[4]
        q = tl.load(
            q_base + rows[:, None] + d[None, :], mask=real[:, None] & (d[None, :] < D), other=0.0
        )
        rows = token_offset(i0, i1, i2, (g0, g1, g2), dilation, out_strides)
        g_base = grad_out + batch * out_strides[0] + head64 * out_strides[4]
        g = tl.load(
            g_base + rows[:, None] + dv[None, :], mask=real[:, None] & (dv[None, :] < DV), other=0.0
        )
        rows = token_offset(i0, i1, i2, (g0, g1, g2), dilation, lse_strides)
        rows += batch * lse_strides[0] + head64 * lse_strides[4]
        row_lse = tl.load(lse + rows, mask=real, other=0.0) * LOG2E
        row_delta = tl.load(delta + rows, mask=real, other=0.0)

        s0, e0 = window(i0, n0, m0, kernel_size[0], stride[0], MODES[0])
        s1, e1 = window(i1, n1, m1, kernel_size[1], stride[1], MODES[1])
        s2, e2 = window(i2, n2, m2, kernel_size[2], stride[2], MODES[2])
        allowed = present[:, None] & real[None, :]
        allowed = inside(p0[:, None], s0[None, :], e0[None, :], MODES[0], allowed)
        allowed = inside(p1[:, None], s1[None, :], e1[None, :], MODES[1], allowed)
        allowed = inside(p2[:, None], s2[None, :], e2[None, :], MODES[2], allowed)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        if HAS_RPB:
            size1, size2 = 2 * kernel_size[1] - 1, 2 * kernel_size[2] - 1
            o0 = p0[:, None] - i0[None, :] + kernel_size[0] - 1
            o1 = p1[:, None] - i1[None, :] + kernel_size[1] - 1
            o2 = p2[:, None] - i2[None, :] + kernel_size[2] - 1
            at = ((head * (2 * kernel_size[0] - 1) + o0) * size1 + o1) * size2 + o2
            s += tl.load(rpb + at, mask=allowed, other=0.0).to(tl.float32) * LOG2E
        p = tl.where(allowed, tl.exp2(s - row_lse[None, :]), 0.0)
        dv_acc = tl.dot(p.to(g.dtype), g, dv_acc, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        dk_acc = tl.dot(ds.to(q.dtype), q, dk_acc, input_precision=PRECISION)

    cols = token_offset(p0, p1, p2, (g0, g1, g2), dilation, dk_strides)
    dk_base = grad_key + batch * dk_strides[0] + kv_head64 * dk_strides[4]
    tl.store(
        dk_base + cols[:, None] + d[None, :], (dk_acc * scale).to(grad_key.dtype.element_ty),
        mask=k_mask,
    )  # fmt: skip
    cols = token_offset(p0, p1, p2, (g0, g1, g2), dilation, dv_strides)
    dv_base = grad_value + batch * dv_strides[0] + kv_head64 * dv_strides[4]
    tl.store(
        dv_base + cols[:, None] + dv[None, :], dv_acc.to(grad_value.dtype.element_ty), mask=v_mask
    )


@triton.jit
def extra_kernel(
    query, extra_key, extra_value, grad_out, lse, delta, grad_key, grad_value,
    q_strides, ek_strides, ev_strides, out_strides, lse_strides,
    shape, kv_heads, extra, per_split, scale,
    PER_KV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the queries' share of the additional tokens' gradients.

    ``grad_key`` and ``grad_value`` are ``[batch, kv heads, splits, extra, channels]``.
    """
    split_id, splits = tl.program_id(0), tl.num_programs(0)
    first = tl.program_id(1) * N
    kv_head, batch = tl.program_id(2) % kv_heads, (tl.program_id(2) // kv_heads).to(tl.int64)
    tokens = shape[0] * shape[1] * shape[2]
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    e = first + tl.arange(0, N)
    present = e < extra
    kv_head64 = kv_head.to(tl.int64)
    k_mask = present[:, None] & (d[None, :] < D)
    v_mask = present[:, None] & (dv[None, :] < DV)
    k_base = extra_key + batch * ek_strides[0] + kv_head64 * ek_strides[2]
    k = tl.load(
        k_base + e.to(tl.int64)[:, None] * ek_strides[1] + d[None, :], mask=k_mask, other=0.0
    )
    v_base = extra_value + batch * ev_strides[0] + kv_head64 * ev_strides[2]
    v = tl.load(
        v_base + e.to(tl.int64)[:, None] * ev_strides[1] + dv[None, :], mask=v_mask, other=0.0
    )
    dk_acc = tl.zeros([N, BLOCK_D], dtype=tl.float32)
    dv_acc = tl.zeros([N, BLOCK_DV], dtype=tl.float32)
    steps = tl.cdiv(per_split, M)
    for step in range(0, steps * PER_KV):
        head = kv_head * PER_KV + step // steps
        x = split_id * per_split + step % steps * M + tl.arange(0, M)
        real = (x < tokens) & (x < (split_id + 1) * per_split)
        x0, x1, x2 = coordinates(x, shape[1], shape[2])
        head64 = head.to(tl.int64)
        rows = token_offset(x0, x1, x2, (0, 0, 0), (1, 1, 1), q_strides)
        q_base = query + batch * q_strides[0] + head64 * q_strides[4]
        q = tl.load(
            q_base + rows[:, None] + d[None, :], mask=real[:, None] & (d[None, :] < D), other=0.0
        )
        rows = token_offset(x0, x1, x2, (0, 0, 0), (1, 1, 1), out_strides)
        g_base = grad_out + batch * out_strides[0] + head64 * out_strides[4]
        g = tl.load(
            g_base + rows[:, None] + dv[None, :], mask=real[:, None] & (dv[None, :] < DV), other=0.0
        )
        rows = token_offset(x0, x1, x2, (0, 0, 0), (1, 1, 1), lse_strides)
        rows += batch * lse_strides[0] + head64 * lse_strides[4]
        row_lse = tl.load(lse + rows, mask=real, other=0.0) * LOG2E
        row_delta = tl.load(delta + rows, mask=real, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        allowed = present[:, None] & real[None, :]
        p = tl.where(allowed, tl.exp2(s - row_lse[None, :]), 0.0)
        dv_acc = tl.dot(p.to(g.dtype), g, dv_acc, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        dk_acc = tl.dot(ds.to(q.dtype), q, dk_acc, input_precision=PRECISION)
    row = ((batch * kv_heads + kv_head) * splits + split_id) * extra + e
    tl.store(grad_key + row[:, None] * D + d[None, :], dk_acc * scale, mask=k_mask)
    tl.store(grad_value + row[:, None] * DV + dv[None, :], dv_acc, mask=v_mask)


@triton.jit
def bias_kernel(
    query, key, value, rpb, grad_out, lse, delta, grad_rpb,
    q_strides, k_strides, v_strides, out_strides, lse_strides,
    shape, kernel_size, stride, dilation, heads, batches, offsets, per_split, scale,
    MODES: tl.constexpr, PER_KV: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One split of the queries' share of the bias's gradient, ``[splits, heads, offsets]``.

    Query by query: along the offsets of one query no two keys meet, so nothing is scattered.
    """
    split_id, head = tl.program_id(0), tl.program_id(2)
    o = tl.program_id(1) * N + tl.arange(0, N)
    size1, size2 = 2 * kernel_size[1] - 1, 2 * kernel_size[2] - 1
    o0 = o // (size1 * size2) - (kernel_size[0] - 1)
    o1 = o // size2 % size1 - (kernel_size[1] - 1)
    o2 = o % size2 - (kernel_size[2] - 1)
    bias = tl.load(rpb + head * offsets + o, mask=o < offsets, other=0.0).to(tl.float32)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    tokens = shape[0] * shape[1] * shape[2]
    head64, kv_head64 = head.to(tl.int64), (head // PER_KV).to(tl.int64)
    acc = tl.zeros([N], dtype=tl.float32)
    first = split_id.to(tl.int64) * per_split
    last = tl.minimum(first + per_split, tokens.to(tl.int64) * batches)
    for at in range(first, last):
        batch, x = at // tokens, at % tokens
        x0, x1, x2 = coordinates(x, shape[1], shape[2])
        g0, g1, g2 = x0 % dilation[0], x1 % dilation[1], x2 % dilation[2]
        i0, i1, i2 = x0 // dilation[0], x1 // dilation[1], x2 // dilation[2]
        n0 = group_length(shape[0], dilation[0], g0)
        n1 = group_length(shape[1], dilation[1], g1)
        n2 = group_length(shape[2], dilation[2], g2)
        s0, e0 = window(i0, n0, n0, kernel_size[0], stride[0], MODES[0])
        s1, e1 = window(i1, n1, n1, kernel_size[1], stride[1], MODES[1])
        s2, e2 = window(i2, n2, n2, kernel_size[2], stride[2], MODES[2])
        p0, p1, p2 = i0 + o0, i1 + o1, i2 + o2
        allowed = inside(p0, s0, e0, MODES[0], o < offsets)
        allowed = inside(p1, s1, e1, MODES[1], allowed)
        allowed = inside(p2, s2, e2, MODES[2], allowed)
        row = x0 * q_strides[1] + x1 * q_strides[2] + x2 * q_strides[3]
        row += batch * q_strides[0] + head64 * q_strides[4]
        q = tl.load(query + row + d, mask=d < D, other=0.0).to(tl.float32)
        row = x0 * out_strides[1] + x1 * out_strides[2] + x2 * out_strides[3]
        row += batch * out_strides[0] + head64 * out_strides[4]
        g = tl.load(grad_out + row + dv, mask=dv < DV, other=0.0).to(tl.float32)
        row = x0 * lse_strides[1] + x1 * lse_strides[2] + x2 * lse_strides[3]
        row += batch * lse_strides[0] + head64 * lse_strides[4]
        cols = token_offset(p0, p1, p2, (g0, g1, g2), dilation, k_strides)
        cols += batch * k_strides[0] + kv_head64 * k_strides[4]
        k = tl.load(
            key + cols[:, None] + d[None, :], mask=allowed[:, None] & (d[None, :] < D), other=0.0
        ).to(tl.float32)
        cols = token_offset(p0, p1, p2, (g0, g1, g2), dilation, v_strides)
        cols += batch * v_strides[0] + kv_head64 * v_strides[4]
        v = tl.load(
            value + cols[:, None] + dv[None, :],
            mask=allowed[:, None] & (dv[None, :] < DV),
            other=0.0,
        ).to(tl.float32)
        s = tl.sum(k * q[None, :], 1) * scale + bias - tl.load(lse + row)
        p = tl.where(allowed, tl.exp2(s * LOG2E), 0.0)
        acc += p * (tl.sum(v * g[None, :], 1) - tl.load(delta + row))
    tl.store(grad_rpb + (split_id * heads + head) * offsets + o, acc, mask=o < offsets)
