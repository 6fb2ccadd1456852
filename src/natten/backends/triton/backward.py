"""Backward in two passes without atomics, so that every run gives the same bits.

The first pass walks the keys of a tile of queries, as the forward does, and gives dQ. The second
walks the queries that can see a tile of keys, and gives dK and dV; its scores are transposed, so
that weights stay in registers as the left operand of both products. What every query reaches (the
bias, additional tokens) is summed in parts by two further kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .primitives import (
    LOG2E,
    before,
    bias_place,
    biases,
    box_offset,
    clipped,
    coordinates,
    count_boxes,
    document,
    group_lengths,
    hidden,
    last_of_tile,
    load_rows,
    load_tile,
    longest_first,
    next_whole_box,
    outside,
    plus,
    queries_of_keys,
    row_number,
    scores,
    split,
    store_rows,
    straddling_box,
    tiles_that_attend,
    times,
    token_offset,
    token_strides,
    tokens,
    whole_box_step,
    whole_box_steps,
    windows,
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


@kernel(
    triton.jit,
    tensors="query key value rpb extra_key extra_value "
    "documents out lse grad_out grad_lse terms grad_query",
)
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
    shape, key_shape = (L0, L1, L2), (L0, L1, KEYS)
    kernel_size, stride, dilation = (K0, K1, K2), (S0, S1, S2), (D0, D1, D2)
    q_strides, k_strides, v_strides = (q_0, q_1, q_2), (k_0, k_1, k_2), (v_0, v_1, v_2)
    pid, tile = split(tl.program_id(0), (T0, T1, T2))
    pid, group = split(pid, dilation)
    head, batch = (pid % heads).to(tl.int64), (pid // heads).to(tl.int64)
    kv_head = head // per_kv
    if PACKED:
        first, key_first, shape, key_shape, kernel_size, stride, dilation = document(
            documents, batch
        )
        if outside(group, dilation):
            return
        q_strides, k_strides = token_strides(shape, q_2), token_strides(key_shape, k_2)
        v_strides = token_strides(key_shape, v_2)
        q_start, k_start, v_start = first * q_2, key_first * k_2, key_first * v_2
    else:
        first = batch * L0 * L1 * L2
        q_start, k_start, v_start = batch * q_b, batch * k_b, batch * v_b
    q_start += head * q_h
    k_start += kv_head * k_h
    v_start += kv_head * v_h

    n, n_keys = group_lengths(shape, dilation, group), group_lengths(key_shape, dilation, group)
    begin = times(tile, TQ)
    if outside(begin, n):
        return
    last = last_of_tile(begin, n, TQ)
    # Windows move monotonically: the first and the last query bound the box, and what every
    # query of the tile attends.
    low, all_high = windows(begin, n, n_keys, kernel_size, stride, MODES)
    all_low, high = windows(last, n, n_keys, kernel_size, stride, MODES)

    r = plus(begin, coordinates(tl.arange(0, M), TQ))
    i, real = clipped(r, last), before(r, n)
    starts, ends = windows(i, n, n_keys, kernel_size, stride, MODES)
    x = tokens(i, group, dilation, MODES)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = token_offset(q_start, x, q_strides, ALIGN)
    q = load_rows(query, rows, real, d, D)
    rows = row_number(first, x, shape, heads, head)
    g = load_rows(grad_out, rows * DV, real, dv, DV)
    row_lse, row_delta = make_terms(out, lse, grad_lse, terms, rows, real, g, dv, DV, HAS_GRAD_LSE)
    c = coordinates(tl.arange(0, N), TK)
    places = bias_place(i, kernel_size)  # what only a bias needs compiles away without one
    k_box = within_box(c, dilation, k_strides, ALIGN)
    v_box = within_box(c, dilation, v_strides, ALIGN)

    acc = tl.zeros([M, BLOCK_D], dtype=tl.float32)
    boxes, first_whole, whole = count_boxes(low, high, all_low, all_high, TK)
    every, wholes = boxes[0] * boxes[1] * boxes[2], whole[0] * whole[1] * whole[2]
    # Boxes that straddle the edge of a window, then those that need no mask: what masks need is
    # not kept meanwhile.
    for WHOLE in tl.static_range(2):
        j0, j1, j2 = 0, 0, 0
        if WHOLE:
            low = plus(low, times(first_whole, TK))
            k_at = box_offset(k_start, low, group, dilation, k_strides, MODES, ALIGN)
            v_at = box_offset(v_start, low, group, dilation, v_strides, MODES, ALIGN)
            k_rows = key + (k_at + k_box)[:, None] + d[None, :]
            v_rows = value + (v_at + v_box)[:, None] + dv[None, :]
            k_steps = whole_box_steps(whole, dilation, k_strides, TK)
            v_steps = whole_box_steps(whole, dilation, v_strides, TK)
        for box in range(0, wholes if WHOLE else every - wholes):
            if WHOLE:
                a = plus(low, times((j0, j1, j2), TK))
                k, v = load_tile(k_rows, d, D), load_tile(v_rows, dv, DV)
                j0, j1, j2, ended = next_whole_box(j0, j1, j2, whole)
                k_rows += whole_box_step(k_steps, ended, ALIGN)
                v_rows += whole_box_step(v_steps, ended, ALIGN)
            else:
                a = plus(low, times(straddling_box(box, boxes, first_whole, whole), TK))
                present = before(plus(a, c), high)
                k_at = box_offset(k_start, a, group, dilation, k_strides, MODES, ALIGN)
                v_at = box_offset(v_start, a, group, dilation, v_strides, MODES, ALIGN)
                k = load_rows(key + k_at, k_box, present, d, D)
                v = load_rows(value + v_at, v_box, present, dv, DV)
            at = bias_place(plus(a, c), kernel_size)[None, :] - places[:, None]
            s = scores(q, k, scale, rpb, at, kernel_size, head, HAS_RPB, WHOLE, PRECISION)
            if not WHOLE:
                s += hidden(a, starts, ends, TK, MODES)
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


@kernel(triton.jit, tensors="query key value rpb documents grad_out terms grad_key grad_value")
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
    shape, key_shape = (L0, L1, L2), (L0, L1, KEYS)
    kernel_size, stride, dilation = (K0, K1, K2), (S0, S1, S2), (D0, D1, D2)
    q_strides, k_strides, v_strides = (q_0, q_1, q_2), (k_0, k_1, k_2), (v_0, v_1, v_2)
    pid, tile = split(tl.program_id(0), (T0, T1, T2))
    pid, group = split(pid, dilation)
    kv_head, batch = (pid % kv_heads).to(tl.int64), (pid // kv_heads).to(tl.int64)
    if PACKED:
        first, key_first, shape, key_shape, kernel_size, stride, dilation = document(
            documents, batch
        )
        if outside(group, dilation):
            return
        q_strides, k_strides = token_strides(shape, q_2), token_strides(key_shape, k_2)
        v_strides = token_strides(key_shape, v_2)
        q_start, k_start, v_start = first * q_2, key_first * k_2, key_first * v_2
    else:
        first, key_first = batch * L0 * L1 * L2, batch * L0 * L1 * KEYS
        q_start, k_start, v_start = batch * q_b, batch * k_b, batch * v_b
    k_start += kv_head * k_h
    v_start += kv_head * v_h

    n, n_keys = group_lengths(shape, dilation, group), group_lengths(key_shape, dilation, group)
    tile = tile[0], tile[1], longest_first(tile[2], T2, kernel_size[2], TK[2], MODES)
    begin = times(tile, TK)
    if outside(begin, n_keys):
        return
    last = last_of_tile(begin, n_keys, TK)
    # Queries move monotonically too: the first and the last key bound the box, and the queries that
    # attend every key of the tile.
    low, all_high = queries_of_keys(begin, n, n_keys, kernel_size, stride, MODES)
    all_low, high = queries_of_keys(last, n, n_keys, kernel_size, stride, MODES)

    c = plus(begin, coordinates(tl.arange(0, N), TK))
    p, present = clipped(c, last), before(c, n_keys)
    starts, ends = queries_of_keys(p, n, n_keys, kernel_size, stride, MODES)
    y = tokens(p, group, dilation, MODES)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k = load_rows(key, token_offset(k_start, y, k_strides, ALIGN), present, d, D)
    v = load_rows(value, token_offset(v_start, y, v_strides, ALIGN), present, dv, DV)
    r = coordinates(tl.arange(0, M), TQ)
    heads = kv_heads * per_kv
    q_box = within_box(r, dilation, q_strides, ALIGN)
    row_strides = token_strides(shape, heads)
    row_box = within_box(r, dilation, row_strides, 1)
    places = bias_place(p, kernel_size)  # what only a bias needs compiles away without one

    dk_acc = tl.zeros([N, BLOCK_D], dtype=tl.float32)
    dv_acc = tl.zeros([N, BLOCK_DV], dtype=tl.float32)
    boxes, first_whole, whole = count_boxes(low, high, all_low, all_high, TQ)
    every, wholes = boxes[0] * boxes[1] * boxes[2], whole[0] * whole[1] * whole[2]
    q_steps = whole_box_steps(whole, dilation, q_strides, TQ)
    row_steps = whole_box_steps(whole, dilation, row_strides, TQ)
    for WHOLE in tl.static_range(2):
        if WHOLE:
            low = plus(low, times(first_whole, TQ))
        for number in range(0, 1 if SINGLE else per_kv):
            head = kv_head * per_kv + number
            q_first = q_start + head * q_h
            j0, j1, j2 = 0, 0, 0
            if WHOLE:
                q_at = box_offset(q_first, low, group, dilation, q_strides, MODES, ALIGN)
                row = row_number(first, tokens(low, group, dilation, MODES), shape, heads, head)
                q_rows = query + (q_at + q_box)[:, None] + d[None, :]
                g_rows = grad_out + (row + row_box)[:, None] * DV + dv[None, :]
                terms_rows = terms + (row + row_box)[:, None] * 4 + tl.arange(0, 4)[None, :]
            for box in range(0, wholes if WHOLE else every - wholes):
                if WHOLE:
                    a = plus(low, times((j0, j1, j2), TQ))
                    q, g = load_tile(q_rows, d, D), load_tile(g_rows, dv, DV)
                    row_terms = tl.load(terms_rows)
                    j0, j1, j2, ended = next_whole_box(j0, j1, j2, whole)
                    q_rows += whole_box_step(q_steps, ended, ALIGN)
                    step = whole_box_step(row_steps, ended, 1)
                    g_rows += step * DV
                    terms_rows += step * 4
                else:
                    a = plus(low, times(straddling_box(box, boxes, first_whole, whole), TQ))
                    real = before(plus(a, r), high)
                    q_at = box_offset(q_first, a, group, dilation, q_strides, MODES, ALIGN)
                    row = row_number(first, tokens(a, group, dilation, MODES), shape, heads, head)
                    q = load_rows(query + q_at, q_box, real, d, D)
                    g = load_rows(grad_out + row * DV, row_box * DV, real, dv, DV)
                    row_terms = load_terms(terms + row * 4, row_box, real)
                at = places[:, None] - bias_place(plus(a, r), kernel_size)[None, :]
                s = scores(k, q, scale, rpb, at, kernel_size, head, HAS_RPB, WHOLE, PRECISION)
                if not WHOLE:
                    s += hidden(a, starts, ends, TQ, MODES)
                dk_acc, dv_acc = _key_step(dk_acc, dv_acc, q, k, v, g, row_terms, s, PRECISION)

    cols = row_number(key_first, y, key_shape, kv_heads, kv_head)
    store_rows(grad_key, cols * D, present, d, D, dk_acc * scale)
    store_rows(grad_value, cols * DV, present, dv, DV, dv_acc)


@kernel(triton.jit, tensors="query extra_key extra_value grad_out terms grad_key grad_value")
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
    part, parts, shape = tl.program_id(2), tl.num_programs(2), (L0, L1, L2)
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
        x = coordinates(x, shape)
        rows = token_offset(batch * q_b + head * q_h, x, (q_0, q_1, q_2), ALIGN)
        q = load_rows(query, rows, real, d, D)
        rows = row_number(batch * L0 * L1 * L2, x, shape, kv_heads * per_kv, head)
        g = load_rows(grad_out, rows * DV, real, dv, DV)
        row_terms = load_terms(terms, rows, real)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        s = tl.where(real[None, :], s, float("-inf"))
        dk_acc, dv_acc = _key_step(dk_acc, dv_acc, q, k, v, g, row_terms, s, PRECISION)
    row = ((batch * kv_heads + kv_head) * parts + part) * extra + e
    store_rows(grad_key, row * D, present, d, D, dk_acc * scale)
    store_rows(grad_value, row * DV, present, dv, DV, dv_acc)


@kernel(triton.jit, tensors="query key value rpb grad_out terms partial")
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
    shape, kernel_size, stride, dilation = (L0, L1, L2), (K0, K1, K2), (S0, S1, S2), (D0, D1, D2)
    q_strides, k_strides, v_strides = (q_0, q_1, q_2), (k_0, k_1, k_2), (v_0, v_1, v_2)
    apart = plus((O0, O1, O2), times(coordinates(box, (1, B1, B2)), TK))
    t0, w0 = tiles_that_attend(L0, D0, K0, S0, apart[0], TQ[0], TK[0], MODES[0])
    t1, w1 = tiles_that_attend(L1, D1, K1, S1, apart[1], TQ[1], TK[1], MODES[1])
    t2, w2 = tiles_that_attend(L2, D2, K2, S2, apart[2], TQ[2], TK[2], MODES[2])
    r, c = coordinates(tl.arange(0, M), TQ), coordinates(tl.arange(0, N), TK)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    at = bias_place(plus(apart, c), kernel_size)[None, :] - bias_place(r, kernel_size)[:, None]
    bias = biases(rpb, at, kernel_size, head, scale, False)
    acc = tl.zeros([M, N], dtype=tl.float32)
    tiles = w0 * w1 * w2 * D0 * D1 * D2 * batches
    per_part = tl.cdiv(tiles, tl.num_programs(1))
    for number in range(part * per_part, tl.minimum((part + 1) * per_part, tiles)):
        rest, tile = split(number, (w0, w1, w2))
        batch, group = split(rest, dilation)
        batch = batch.to(tl.int64)
        n = group_lengths(shape, dilation, group)
        begin = times(plus(tile, (t0, t1, t2)), TQ)
        i, real = clipped(plus(begin, r), last_of_tile(begin, n, TQ)), before(plus(begin, r), n)
        starts, ends = windows(i, n, n, kernel_size, stride, MODES)
        x = tokens(i, group, dilation, MODES)
        rows = token_offset(batch * q_b + head * q_h, x, q_strides, ALIGN)
        q = load_rows(query, rows, real, d, D)
        rows = row_number(batch * L0 * L1 * L2, x, shape, heads, head)
        g = load_rows(grad_out, rows * DV, real, dv, DV)
        lse, delta = exponent_and_delta(load_terms(terms, rows, real))
        a = plus(begin, apart)
        at_keys = plus(a, c)
        present = before((-1, -1, -1), at_keys) & before(at_keys, n)
        y = tokens(at_keys, group, dilation, MODES)
        cols = token_offset(batch * k_b + kv_head * k_h, y, k_strides, ALIGN)
        k = load_rows(key, cols, present, d, D)
        cols = token_offset(batch * v_b + kv_head * v_h, y, v_strides, ALIGN)
        v = load_rows(value, cols, present, dv, DV)
        s = tl.dot(q, tl.trans(k), bias, input_precision=PRECISION) * (scale * LOG2E)
        s += hidden(a, starts, ends, TK, MODES)
        # Rows that are no query have weights of zero, whatever their bias.
        p = tl.exp2(s - tl.where(real, lse, float("inf"))[:, None])
        acc += p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    place = part.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    place = (place * tl.num_programs(0) + box) * M + tl.arange(0, M)
    tl.store(partial + place[:, None] * N + tl.arange(0, N)[None, :], acc)


@kernel(triton.jit, tensors="partial grad_rpb")
def bias_sum_kernel(
    partial, grad_rpb, K0, K1, K2, O0, O1, O2, B1, B2, first_head, boxes, parts, offsets,
    TQ: tl.constexpr, TK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bias's gradient ``[heads, offsets]`` from what :func:`bias_kernel` made."""
    M: tl.constexpr = TQ[0] * TQ[1] * TQ[2]
    N: tl.constexpr = TK[0] * TK[1] * TK[2]
    head = (first_head + tl.program_id(1)).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o0, o1, o2 = coordinates(at, (1, 2 * K1 - 1, 2 * K2 - 1))
    r = tl.arange(0, M)
    r0, r1, r2 = coordinates(r, TQ)
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
