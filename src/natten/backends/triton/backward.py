"""Backward in two passes without atomics, so that every run gives the same bits.

The first pass walks the keys of a tile of queries, as the forward does, and gives dQ. The second
walks the queries that can see a tile of keys, and gives dK and dV; its scores are transposed, so
that weights stay in registers as the left operand of both products. What every query reaches (the
bias, additional tokens) is summed in parts by two further kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from natten.backends.triton.primitives import (
    LOG2E,
    bias_place,
    biases,
    box_offset,
    coordinates,
    count_boxes,
    document,
    group_length,
    hidden,
    kernel,
    load_rows,
    load_tile,
    longest_first,
    next_whole_box,
    queries_of,
    row_number,
    scores,
    split,
    store_rows,
    straddling_box,
    tiles_that_attend,
    token,
    token_offset,
    whole_box_step,
    whole_box_steps,
    window,
    within_box,
)


@triton.jit
def make_terms(
    out, lse, grad_lse, terms, rows, real, g, dv, DV: tl.constexpr, HAS_GRAD_LSE: tl.constexpr
):
    """Per query: LSE as an exponent of two, and delta, ``sum(out * grad_out) - grad_lse``.

    Both are stored, too, in ``terms [rows, 4]``, of which two are used: 16 bytes that one thread
    copies; two tensors ``[rows]`` become one small copy per product and thread.
    """
    o = load_rows(out, rows * DV, real, dv, DV).to(tl.float32)
    delta = tl.sum(o * g.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse + rows, mask=real, other=0.0)
    exponent = tl.load(lse + rows, mask=real, other=0.0) * LOG2E
    # A query that attends nothing gets weights of zero.
    exponent = tl.where(exponent == float("-inf"), float("inf"), exponent)
    column = tl.arange(0, 4)[None, :]
    both = tl.where(column == 0, exponent[:, None], tl.where(column == 1, delta[:, None], 0.0))
    tl.store(terms + rows[:, None] * 4 + column, both, mask=real[:, None])
    return exponent, delta


@triton.jit
def load_terms(terms, rows, real):
    """What :func:`make_terms` stored, for :func:`exponent_and_delta`."""
    at = rows[:, None] * 4 + tl.arange(0, 4)[None, :]
    return tl.load(terms + at, mask=real[:, None], other=0.0)


@triton.jit
def exponent_and_delta(terms):
    """LSE as an exponent of two, and delta."""
    even, odd = tl.split(terms.reshape(terms.shape[0], 2, 2))
    exponent, _ = tl.split(even)
    delta, _ = tl.split(odd)
    return exponent, delta


@triton.jit
def _query_step(acc, q, k, v, g, lse, delta, s, PRECISION: tl.constexpr):
    """Add one tile of keys, with scores ``s``, to dQ (without the scale)."""
    p = tl.exp2(s - lse[:, None])
    ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def _key_step(dk, dv, q, k, v, g, terms, s, PRECISION: tl.constexpr):
    """Add one tile of queries, with scores ``s [keys, queries]``, to dK (without scale) and dV."""
    lse, delta = exponent_and_delta(terms)
    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)  # runs while exponentials are taken
    p = tl.exp2(s - lse[None, :])
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@kernel
def query_kernel(
    query, key, value, rpb, extra_key, extra_value, documents, out, lse, grad_out, grad_lse, terms,
    grad_query,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, KEYS, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, heads, per_kv, extra, scale,
    MODES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_RPB: tl.constexpr, HAS_EXTRA: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """dQ, and the terms that the other kernels need; the arguments are ``forward_kernel``'s."""
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
    rows = row_number(first, x0, x1, x2, L1, L2, heads, head)
    g = load_rows(grad_out, rows * DV, real, dv, DV)
    row_lse, row_delta = make_terms(out, lse, grad_lse, terms, rows, real, g, dv, DV, HAS_GRAD_LSE)
    c0, c1, c2 = coordinates(tl.arange(0, N), TK[1], TK[2])
    group, dilation = (g0, g1, g2), (D0, D1, D2)
    k_strides, v_strides = (k_0, k_1, k_2), (v_0, v_1, v_2)
    window_size = (K0, K1, K2)  # what only a bias needs compiles away without one
    places = bias_place(i0, i1, i2, window_size)
    k_box = within_box(c0, c1, c2, dilation, k_strides, ALIGN)
    v_box = within_box(c0, c1, c2, dilation, v_strides, ALIGN)

    acc = tl.zeros([M, BLOCK_D], dtype=tl.float32)
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
            acc = _query_step(acc, q, k, v, g, row_lse, row_delta, s, PRECISION)

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
            acc = _query_step(acc, q, k, v, g, row_lse, row_delta, s, PRECISION)

    store_rows(grad_query, rows * D, real, d, D, acc * scale)


@kernel
def key_kernel(
    query, key, value, rpb, documents, grad_out, terms, grad_key, grad_value,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, KEYS, K0, K1, K2, S0, S1, S2, D0, D1, D2, T0, T1, T2, kv_heads, per_kv, scale,
    MODES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_RPB: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """dK and dV; the arguments are ``forward_kernel``'s, tiles ``T`` are of keys.

    ``SINGLE``: a key head has one query head, and the loop over them is compiled away.
    """
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    pid, t0, t1, t2 = split(tl.program_id(0), T0, T1, T2)
    pid, g0, g1, g2 = split(pid, D0, D1, D2)
    kv_head, batch = (pid % kv_heads).to(tl.int64), (pid // kv_heads).to(tl.int64)
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
        first, key_first = batch * L0 * L1 * L2, batch * L0 * L1 * KEYS
        q_start, k_start, v_start = batch * q_b, batch * k_b, batch * v_b
    k_start += kv_head * k_h
    v_start += kv_head * v_h

    n0, n1, n2 = group_length(L0, D0, g0), group_length(L1, D1, g1), group_length(L2, D2, g2)
    m2 = group_length(KEYS, D2, g2)
    t2 = longest_first(t2, T2, K2, TK[2], MODES)
    f0, f1, f2 = t0 * TK[0], t1 * TK[1], t2 * TK[2]
    if (f0 >= n0) | (f1 >= n1) | (f2 >= m2):
        return
    z0, z1 = tl.minimum(f0 + TK[0], n0) - 1, tl.minimum(f1 + TK[1], n1) - 1
    z2 = tl.minimum(f2 + TK[2], m2) - 1
    # Queries move monotonically too: the first and the last key bound the box, and the queries that
    # attend every key of the tile.
    low0, all_high0 = queries_of(f0, n0, n0, K0, S0, MODES[0])
    low1, all_high1 = queries_of(f1, n1, n1, K1, S1, MODES[1])
    low2, all_high2 = queries_of(f2, n2, m2, K2, S2, MODES[2])
    all_low0, high0 = queries_of(z0, n0, n0, K0, S0, MODES[0])
    all_low1, high1 = queries_of(z1, n1, n1, K1, S1, MODES[1])
    all_low2, high2 = queries_of(z2, n2, m2, K2, S2, MODES[2])

    c0, c1, c2 = coordinates(tl.arange(0, N), TK[1], TK[2])
    p0, p1, p2 = tl.minimum(f0 + c0, z0), tl.minimum(f1 + c1, z1), tl.minimum(f2 + c2, z2)
    present = (f0 + c0 <= z0) & (f1 + c1 <= z1) & (f2 + c2 <= z2)
    s0, e0 = queries_of(p0, n0, n0, K0, S0, MODES[0])
    s1, e1 = queries_of(p1, n1, n1, K1, S1, MODES[1])
    s2, e2 = queries_of(p2, n2, m2, K2, S2, MODES[2])
    y0, y1 = token(p0, g0, D0, MODES[0]), token(p1, g1, D1, MODES[1])
    y2 = token(p2, g2, D2, MODES[2])
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    cols = token_offset(k_start, y0, y1, y2, k_0, k_1, k_2, ALIGN)
    k = load_rows(key, cols, present, d, D)
    cols = token_offset(v_start, y0, y1, y2, v_0, v_1, v_2, ALIGN)
    v = load_rows(value, cols, present, dv, DV)
    r0, r1, r2 = coordinates(tl.arange(0, M), TQ[1], TQ[2])
    heads = kv_heads * per_kv
    group, dilation, q_strides = (g0, g1, g2), (D0, D1, D2), (q_0, q_1, q_2)
    q_box = within_box(r0, r1, r2, dilation, q_strides, ALIGN)
    row_strides = L1.to(tl.int64) * L2 * heads, L2.to(tl.int64) * heads, heads
    row_box = within_box(r0, r1, r2, dilation, row_strides, 1)
    window_size = (K0, K1, K2)  # what only a bias needs compiles away without one
    places = bias_place(p0, p1, p2, window_size)

    dk_acc = tl.zeros([N, BLOCK_D], dtype=tl.float32)
    dv_acc = tl.zeros([N, BLOCK_DV], dtype=tl.float32)
    b0, f0, w0 = count_boxes(low0, high0, all_low0, all_high0, TQ[0])
    b1, f1, w1 = count_boxes(low1, high1, all_low1, all_high1, TQ[1])
    b2, f2, w2 = count_boxes(low2, high2, all_low2, all_high2, TQ[2])
    whole = w0 * w1 * w2
    q_steps = whole_box_steps(w1, w2, dilation, q_strides, TQ)
    row_steps = whole_box_steps(w1, w2, dilation, row_strides, TQ)
    for WHOLE in tl.static_range(2):
        for number in range(0, 1 if SINGLE else per_kv):
            head = kv_head * per_kv + number
            q_first = q_start + head * q_h
            j0, j1, j2 = 0, 0, 0
            if WHOLE:
                a0, a1, a2 = low0 + f0 * TQ[0], low1 + f1 * TQ[1], low2 + f2 * TQ[2]
                q_at = box_offset(q_first, a0, a1, a2, group, dilation, q_strides, MODES, ALIGN)
                x0, x1 = token(a0, g0, D0, MODES[0]), token(a1, g1, D1, MODES[1])
                row = row_number(first, x0, x1, token(a2, g2, D2, MODES[2]), L1, L2, heads, head)
                q_rows = query + (q_at + q_box)[:, None] + d[None, :]
                g_rows = grad_out + (row + row_box)[:, None] * DV + dv[None, :]
                terms_rows = terms + (row + row_box)[:, None] * 4 + tl.arange(0, 4)[None, :]
            for box in range(0, whole if WHOLE else b0 * b1 * b2 - whole):
                if WHOLE:
                    a0, a1 = low0 + (f0 + j0) * TQ[0], low1 + (f1 + j1) * TQ[1]
                    a2 = low2 + (f2 + j2) * TQ[2]
                    q, g = load_tile(q_rows, d, D), load_tile(g_rows, dv, DV)
                    row_terms = tl.load(terms_rows)
                    j0, j1, j2, end1, end2 = next_whole_box(j0, j1, j2, w1, w2)
                    q_rows += whole_box_step(q_steps, end1, end2, ALIGN)
                    step = whole_box_step(row_steps, end1, end2, 1)
                    g_rows += step * DV
                    terms_rows += step * 4
                else:
                    j0, j1, j2 = straddling_box(box, b0, b1, b2, f0, f1, f2, w0, w1, w2)
                    a0, a1, a2 = low0 + j0 * TQ[0], low1 + j1 * TQ[1], low2 + j2 * TQ[2]
                    real = (a0 + r0 < high0) & (a1 + r1 < high1) & (a2 + r2 < high2)
                    q_at = box_offset(q_first, a0, a1, a2, group, dilation, q_strides, MODES, ALIGN)
                    x0, x1 = token(a0, g0, D0, MODES[0]), token(a1, g1, D1, MODES[1])
                    row = row_number(
                        first, x0, x1, token(a2, g2, D2, MODES[2]), L1, L2, heads, head
                    )
                    q = load_rows(query + q_at, q_box, real, d, D)
                    g = load_rows(grad_out + row * DV, row_box * DV, real, dv, DV)
                    row_terms = load_terms(terms + row * 4, row_box, real)
                at = places[:, None] - bias_place(a0 + r0, a1 + r1, a2 + r2, window_size)[None, :]
                s = scores(k, q, scale, rpb, at, window_size, head, HAS_RPB, WHOLE, PRECISION)
                if not WHOLE:
                    s += hidden(a0, a1, a2, (s0, s1, s2), (e0, e1, e2), TQ, MODES)
                dk_acc, dv_acc = _key_step(dk_acc, dv_acc, q, k, v, g, row_terms, s, PRECISION)

    cols = row_number(key_first, y0, y1, y2, L1, KEYS, kv_heads, kv_head)
    store_rows(grad_key, cols * D, present, d, D, dk_acc * scale)
    store_rows(grad_value, cols * DV, present, dv, DV, dv_acc)


@kernel
def extra_kernel(
    query, extra_key, extra_value, grad_out, terms, grad_key, grad_value,
    q_b, q_0, q_1, q_2, q_h, L0, L1, L2, kv_heads, per_kv, extra, per_split, scale,
    M: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The additional tokens' gradients from one part of the queries.

    ``grad_key`` and ``grad_value`` are ``[batch, kv heads, parts, extra, channels]``.
    """
    part, parts = tl.program_id(2), tl.num_programs(2)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    e = tl.program_id(1) * N + tl.arange(0, N)
    present = e < extra
    cols = (batch * extra + e) * kv_heads + kv_head
    k = load_rows(extra_key, cols * D, present, d, D)
    v = load_rows(extra_value, cols * DV, present, dv, DV)
    dk_acc = tl.zeros([N, BLOCK_D], dtype=tl.float32)
    dv_acc = tl.zeros([N, BLOCK_DV], dtype=tl.float32)
    steps = tl.cdiv(per_split, M)
    for step in range(0, steps * per_kv):
        head = kv_head * per_kv + step // steps
        x = part * per_split + step % steps * M + tl.arange(0, M)
        real = (x < L0 * L1 * L2) & (x < (part + 1) * per_split)
        x0, x1, x2 = coordinates(x, L1, L2)
        rows = token_offset(batch * q_b + head * q_h, x0, x1, x2, q_0, q_1, q_2, ALIGN)
        q = load_rows(query, rows, real, d, D)
        rows = row_number(batch * L0 * L1 * L2, x0, x1, x2, L1, L2, kv_heads * per_kv, head)
        g = load_rows(grad_out, rows * DV, real, dv, DV)
        row_terms = load_terms(terms, rows, real)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        s = tl.where(real[None, :], s, float("-inf"))
        dk_acc, dv_acc = _key_step(dk_acc, dv_acc, q, k, v, g, row_terms, s, PRECISION)
    row = ((batch * kv_heads + kv_head) * parts + part) * extra + e
    store_rows(grad_key, row * D, present, d, D, dk_acc * scale)
    store_rows(grad_value, row * DV, present, dv, DV, dv_acc)


@kernel
def bias_kernel(
    query, key, value, rpb, grad_out, terms, partial,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2, heads, per_kv, batches,
    O0, O1, O2, B1, B2, first_head, scale,
    MODES: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dS of one box of keys for each tile of queries, summed over a part of the tiles, into
    ``partial [parts, heads, boxes, queries, keys]``, for heads from ``first_head`` on.

    All boxes of a program are as far from their tiles, so that a pair of rows has the same bias in
    every tile. ``O``: how far the first box is, ``B``: how many there are, per axis.
    :func:`bias_sum_kernel` adds up pairs that have the same bias.
    """
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    box, part = tl.program_id(0), tl.program_id(1)
    head = (first_head + tl.program_id(2)).to(tl.int64)
    kv_head = head // per_kv
    j0, j1, j2 = coordinates(box, B1, B2)
    o0, o1, o2 = O0 + j0 * TK[0], O1 + j1 * TK[1], O2 + j2 * TK[2]
    t0, w0 = tiles_that_attend(L0, D0, K0, S0, o0, TQ[0], TK[0], MODES[0])
    t1, w1 = tiles_that_attend(L1, D1, K1, S1, o1, TQ[1], TK[1], MODES[1])
    t2, w2 = tiles_that_attend(L2, D2, K2, S2, o2, TQ[2], TK[2], MODES[2])
    r0, r1, r2 = coordinates(tl.arange(0, M), TQ[1], TQ[2])
    c0, c1, c2 = coordinates(tl.arange(0, N), TK[1], TK[2])
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    kernel_size = (K0, K1, K2)
    at = bias_place(o0 + c0, o1 + c1, o2 + c2, kernel_size)[None, :]
    at -= bias_place(r0, r1, r2, kernel_size)[:, None]
    start = biases(rpb, at, kernel_size, head, scale, False)
    acc = tl.zeros([M, N], dtype=tl.float32)
    tiles = w0 * w1 * w2 * D0 * D1 * D2 * batches
    per_part = tl.cdiv(tiles, tl.num_programs(1))
    for number in range(part * per_part, tl.minimum((part + 1) * per_part, tiles)):
        rest, u0, u1, u2 = split(number, w0, w1, w2)
        batch, g0, g1, g2 = split(rest, D0, D1, D2)
        batch = batch.to(tl.int64)
        n0, n1, n2 = group_length(L0, D0, g0), group_length(L1, D1, g1), group_length(L2, D2, g2)
        f0, f1, f2 = (t0 + u0) * TQ[0], (t1 + u1) * TQ[1], (t2 + u2) * TQ[2]
        real = (f0 + r0 < n0) & (f1 + r1 < n1) & (f2 + r2 < n2)
        i0, i1 = tl.minimum(f0 + r0, n0 - 1), tl.minimum(f1 + r1, n1 - 1)
        i2 = tl.minimum(f2 + r2, n2 - 1)
        s0, e0 = window(i0, n0, n0, K0, S0, MODES[0])
        s1, e1 = window(i1, n1, n1, K1, S1, MODES[1])
        s2, e2 = window(i2, n2, n2, K2, S2, MODES[2])
        x0, x1 = token(i0, g0, D0, MODES[0]), token(i1, g1, D1, MODES[1])
        x2 = token(i2, g2, D2, MODES[2])
        rows = token_offset(batch * q_b + head * q_h, x0, x1, x2, q_0, q_1, q_2, ALIGN)
        q = load_rows(query, rows, real, d, D)
        rows = row_number(batch * L0 * L1 * L2, x0, x1, x2, L1, L2, heads, head)
        g = load_rows(grad_out, rows * DV, real, dv, DV)
        lse, delta = exponent_and_delta(load_terms(terms, rows, real))
        a0, a1, a2 = f0 + o0, f1 + o1, f2 + o2
        p0, p1, p2 = a0 + c0, a1 + c1, a2 + c2
        present = (p0 >= 0) & (p1 >= 0) & (p2 >= 0) & (p0 < n0) & (p1 < n1) & (p2 < n2)
        y0, y1 = token(p0, g0, D0, MODES[0]), token(p1, g1, D1, MODES[1])
        y2 = token(p2, g2, D2, MODES[2])
        cols = token_offset(batch * k_b + kv_head * k_h, y0, y1, y2, k_0, k_1, k_2, ALIGN)
        k = load_rows(key, cols, present, d, D)
        cols = token_offset(batch * v_b + kv_head * v_h, y0, y1, y2, v_0, v_1, v_2, ALIGN)
        v = load_rows(value, cols, present, dv, DV)
        s = tl.dot(q, tl.trans(k), start, input_precision=PRECISION) * (scale * LOG2E)
        s += hidden(a0, a1, a2, (s0, s1, s2), (e0, e1, e2), TK, MODES)
        # Rows that are no query have weights of zero, whatever their bias.
        p = tl.exp2(s - tl.where(real, lse, float("inf"))[:, None])
        acc += p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    place = part.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    place = (place * tl.num_programs(0) + box) * M + tl.arange(0, M)
    tl.store(partial + place[:, None] * N + tl.arange(0, N)[None, :], acc)


@kernel
def bias_sum_kernel(
    partial, grad_rpb, K0, K1, K2, O0, O1, O2, B1, B2, first_head, boxes, parts, offsets,
    TQ: tl.constexpr, TK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bias's gradient ``[heads, offsets]`` from what :func:`bias_kernel` made."""
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    head = (first_head + tl.program_id(1)).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o0, o1, o2 = coordinates(at, 2 * K1 - 1, 2 * K2 - 1)
    r = tl.arange(0, M)
    r0, r1, r2 = coordinates(r, TQ[1], TQ[2])
    # Each query's key with that bias, from the first box's first key on.
    p0 = r0[:, None] + (o0 - (K0 - 1) - O0)[None, :]
    p1 = r1[:, None] + (o1 - (K1 - 1) - O1)[None, :]
    p2 = r2[:, None] + (o2 - (K2 - 1) - O2)[None, :]
    box = (p0 // TK[0] * B1 + p1 // TK[1]) * B2 + p2 // TK[2]
    column = (p0 % TK[0] * TK[1] + p1 % TK[1]) * TK[2] + p2 % TK[2]
    place = (box * M + r[:, None]) * N + column
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(0, parts):
        start = (part * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * boxes * M * N
        acc += tl.sum(tl.load(partial + start + place, mask=at[None, :] < offsets, other=0.0), 0)
    tl.store(grad_rpb + head * offsets + at, acc, mask=at < offsets)
