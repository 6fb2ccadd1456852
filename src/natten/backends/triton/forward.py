"""Forward: one program per tile of queries walks the box of keys that holds the tile's windows."""

from __future__ import annotations

import triton
import triton.language as tl

from natten.backends.triton.primitives import (
    LN2,
    LOG2E,
    bias_place,
    box_offset,
    coordinates,
    count_boxes,
    document,
    group_length,
    hidden,
    kernel,
    load_rows,
    load_tile,
    next_whole_box,
    row_number,
    scores,
    split,
    store_rows,
    straddling_box,
    token,
    token_offset,
    whole_box_step,
    whole_box_steps,
    window,
    within_box,
)


@triton.jit
def _accumulate(acc, top, total, s, v, PRECISION: tl.constexpr):
    """One step of the online softmax; scores are exponents of two."""
    new_top = tl.maximum(top, tl.max(s, 1))
    # A row whose keys so far are all masked stays at -inf without making NaN.
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - reference[:, None])
    shrink = tl.exp2(top - reference)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@kernel
def forward_kernel(
    query, key, value, rpb, extra_key, extra_value, documents, out, lse,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, KEYS, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, heads, per_kv, extra, scale,
    MODES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_RPB: tl.constexpr, HAS_EXTRA: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens ``L``, keys of the last axis ``KEYS``, window ``K``, stride ``S``, dilation ``D``,
    tiles ``T``, per axis. ``PACKED``: a batch is a document of its own sizes."""
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    pid, t0, t1, t2 = split(tl.program_id(0), T0, T1, T2)
    pid, g0, g1, g2 = split(pid, D0, D1, D2)
    head, batch = (pid % heads).to(tl.int64), (pid // heads).to(tl.int64)
    kv_head = head // per_kv
    if PACKED:
        first, key_first, L0, L1, L2, KEYS, K0, K1, K2, S0, S1, S2, D0, D1, D2 = document(
            documents, batch
        )
        if (g0 >= D0) | (g1 >= D1) | (g2 >= D2):
            return
        q_1, k_1, v_1 = L2.to(tl.int64) * q_2, KEYS.to(tl.int64) * k_2, KEYS.to(tl.int64) * v_2
        q_0, k_0, v_0 = L1 * q_1, L1 * k_1, L1 * v_1
        q_start, k_start, v_start = first * q_2, key_first * k_2, key_first * v_2
    else:
        first = batch * L0 * L1 * L2
        q_start, k_start, v_start = batch * q_b, batch * k_b, batch * v_b
    q_start += head * q_h
    k_start += kv_head * k_h
    v_start += kv_head * v_h

    n0, n1, n2 = group_length(L0, D0, g0), group_length(L1, D1, g1), group_length(L2, D2, g2)
    m2 = group_length(KEYS, D2, g2)
    f0, f1, f2 = t0 * TQ[0], t1 * TQ[1], t2 * TQ[2]
    if (f0 >= n0) | (f1 >= n1) | (f2 >= n2):
        return
    z0, z1 = tl.minimum(f0 + TQ[0], n0) - 1, tl.minimum(f1 + TQ[1], n1) - 1
    z2 = tl.minimum(f2 + TQ[2], n2) - 1
    # Windows move monotonically: the first and the last query bound the box, and what every
    # query of the tile attends.
    low0, all_high0 = window(f0, n0, n0, K0, S0, MODES[0])
    low1, all_high1 = window(f1, n1, n1, K1, S1, MODES[1])
    low2, all_high2 = window(f2, n2, m2, K2, S2, MODES[2])
    all_low0, high0 = window(z0, n0, n0, K0, S0, MODES[0])
    all_low1, high1 = window(z1, n1, n1, K1, S1, MODES[1])
    all_low2, high2 = window(z2, n2, m2, K2, S2, MODES[2])

    r0, r1, r2 = coordinates(tl.arange(0, M), TQ[1], TQ[2])
    i0, i1, i2 = tl.minimum(f0 + r0, z0), tl.minimum(f1 + r1, z1), tl.minimum(f2 + r2, z2)
    real = (f0 + r0 <= z0) & (f1 + r1 <= z1) & (f2 + r2 <= z2)
    s0, e0 = window(i0, n0, n0, K0, S0, MODES[0])
    s1, e1 = window(i1, n1, n1, K1, S1, MODES[1])
    s2, e2 = window(i2, n2, m2, K2, S2, MODES[2])
    x0, x1 = token(i0, g0, D0, MODES[0]), token(i1, g1, D1, MODES[1])
    x2 = token(i2, g2, D2, MODES[2])

    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = token_offset(q_start, x0, x1, x2, q_0, q_1, q_2, ALIGN)
    q = load_rows(query, rows, real, d, D)
    c0, c1, c2 = coordinates(tl.arange(0, N), TK[1], TK[2])
    group, dilation = (g0, g1, g2), (D0, D1, D2)
    k_strides, v_strides = (k_0, k_1, k_2), (v_0, v_1, v_2)
    window_size = (K0, K1, K2)  # what only a bias needs compiles away without one
    places = bias_place(i0, i1, i2, window_size)
    k_box = within_box(c0, c1, c2, dilation, k_strides, ALIGN)
    v_box = within_box(c0, c1, c2, dilation, v_strides, ALIGN)

    acc = tl.zeros([M, BLOCK_DV], dtype=tl.float32)
    top = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    b0, f0, w0 = count_boxes(low0, high0, all_low0, all_high0, TK[0])
    b1, f1, w1 = count_boxes(low1, high1, all_low1, all_high1, TK[1])
    b2, f2, w2 = count_boxes(low2, high2, all_low2, all_high2, TK[2])
    whole = w0 * w1 * w2
    # Boxes that straddle the edge of a window, then those that need no mask: what masks need is
    # not kept meanwhile.
    for WHOLE in tl.static_range(2):
        j0, j1, j2 = 0, 0, 0
        if WHOLE:
            a0, a1, a2 = low0 + f0 * TK[0], low1 + f1 * TK[1], low2 + f2 * TK[2]
            k_at = box_offset(k_start, a0, a1, a2, group, dilation, k_strides, MODES, ALIGN)
            v_at = box_offset(v_start, a0, a1, a2, group, dilation, v_strides, MODES, ALIGN)
            k_rows = key + (k_at + k_box)[:, None] + d[None, :]
            v_rows = value + (v_at + v_box)[:, None] + dv[None, :]
            k_steps = whole_box_steps(w1, w2, dilation, k_strides, TK)
            v_steps = whole_box_steps(w1, w2, dilation, v_strides, TK)
        for box in range(0, whole if WHOLE else b0 * b1 * b2 - whole):
            if WHOLE:
                a0, a1 = low0 + (f0 + j0) * TK[0], low1 + (f1 + j1) * TK[1]
                a2 = low2 + (f2 + j2) * TK[2]
                k, v = load_tile(k_rows, d, D), load_tile(v_rows, dv, DV)
                j0, j1, j2, end1, end2 = next_whole_box(j0, j1, j2, w1, w2)
                k_rows += whole_box_step(k_steps, end1, end2, ALIGN)
                v_rows += whole_box_step(v_steps, end1, end2, ALIGN)
            else:
                j0, j1, j2 = straddling_box(box, b0, b1, b2, f0, f1, f2, w0, w1, w2)
                a0, a1, a2 = low0 + j0 * TK[0], low1 + j1 * TK[1], low2 + j2 * TK[2]
                present = (a0 + c0 < high0) & (a1 + c1 < high1) & (a2 + c2 < high2)
                k_at = box_offset(k_start, a0, a1, a2, group, dilation, k_strides, MODES, ALIGN)
                v_at = box_offset(v_start, a0, a1, a2, group, dilation, v_strides, MODES, ALIGN)
                k = load_rows(key + k_at, k_box, present, d, D)
                v = load_rows(value + v_at, v_box, present, dv, DV)
            at = bias_place(a0 + c0, a1 + c1, a2 + c2, window_size)[None, :] - places[:, None]
            s = scores(q, k, scale, rpb, at, window_size, head, HAS_RPB, WHOLE, PRECISION)
            if not WHOLE:
                s += hidden(a0, a1, a2, (s0, s1, s2), (e0, e1, e2), TK, MODES)
            acc, top, total = _accumulate(acc, top, total, s, v, PRECISION)

    if HAS_EXTRA:
        kv_heads = heads // per_kv
        for e_first in range(0, extra, N):
            e = e_first + tl.arange(0, N)
            present = e < extra
            cols = (batch * extra + e) * kv_heads + kv_head
            k = load_rows(extra_key, cols * D, present, d, D)
            v = load_rows(extra_value, cols * DV, present, dv, DV)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            s = tl.where(present[None, :], s, float("-inf"))
            acc, top, total = _accumulate(acc, top, total, s, v, PRECISION)

    found = total > 0
    total = tl.where(found, total, 1.0)
    rows = row_number(first, x0, x1, x2, L1, L2, heads, head)
    store_rows(out, rows * DV, real, dv, DV, acc / total[:, None])
    tl.store(lse + rows, tl.where(found, (top + tl.log2(total)) * LN2, float("-inf")), mask=real)
