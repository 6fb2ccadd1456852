"""Backward in two passes without atomics, so that every run gives the same bits.

The first pass walks the keys of a tile of queries, as the forward does, and gives dQ. The second
walks the queries that attend a tile of keys, and gives dK and dV; its scores are transposed, so
that weights stay in registers as the left operand of both products. Gradients to which every query
adds (of the bias, of additional tokens) are summed in splits by further kernels. Where tiles of
keys are few, several programs share the queries of each, and their sums are added up.

With weights ``P``, ``dP = dO V^T`` and ``dS = P * (dP - delta)``, the gradients are
``dQ = scale * dS K``, ``dK = scale * dS^T Q`` and ``dV = P^T dO``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .primitives import (
    LOG2E,
    before,
    bias_index,
    biases,
    coordinates,
    hidden,
    key_tokens,
    load_mask,
    load_rows,
    load_tile,
    minus,
    plus,
    query_tokens,
    row_number,
    scores,
    split,
    store_rows,
    times,
    token_offset,
    token_strides,
)
from .walk import (
    count_blocks,
    full_block_step,
    full_block_steps,
    is_empty,
    locate,
    mask_bias,
    next_full_block,
    nth_full_block,
    partial_block,
    rows_of_tile,
    walk_additional,
    walk_keys,
    within_block,
)
from .windows import (
    CIRCULAR,
    Span,
    are_queries,
    group_lengths,
    key_positions,
    lpt_order,
    margins,
    span,
    tiles_that_attend,
)


@triton.jit
def make_lse_delta(
    out, lse, grad_lse, lse_delta, at, real, g, dv, DV: tl.constexpr, HAS_GRAD_LSE: tl.constexpr
):
    """For rows ``at [M]`` LSE as an exponent of two, and delta, ``sum(out * dO) - grad_lse``.

    Both are stored, too, in ``lse_delta [rows, 4]``, of which two are used: 16 bytes that one
    thread copies; two tensors ``[rows]`` become one small copy per product and thread.
    """
    o = load_rows(out, at * DV, real, dv, DV).to(tl.float32)  # [M, DV]
    delta = tl.sum(o * g.to(tl.float32), 1)  # [M]
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse + at, mask=real, other=0.0)
    exponent = tl.load(lse + at, mask=real, other=0.0) * LOG2E  # [M]
    # A query that attends nothing gets weights of zero.
    exponent = tl.where(exponent == float("-inf"), float("inf"), exponent)
    column = tl.arange(0, 4)[None, :]
    both = tl.where(column == 0, exponent[:, None], tl.where(column == 1, delta[:, None], 0.0))
    tl.store(lse_delta + at[:, None] * 4 + column, both, mask=real[:, None])
    return exponent, delta


@triton.jit
def load_lse_delta(lse_delta, at, real):
    """What :func:`make_lse_delta` stored, ``[M, 4]``, for :func:`split_lse_delta`."""
    at = at[:, None] * 4 + tl.arange(0, 4)[None, :]
    return tl.load(lse_delta + at, mask=real[:, None], other=0.0)


@triton.jit
def split_lse_delta(lse_delta):
    """LSE as an exponent of two, and delta, ``[M]`` each."""
    even, odd = tl.split(lse_delta.reshape(lse_delta.shape[0], 2, 2))
    exponent, _ = tl.split(even)
    delta, _ = tl.split(odd)
    return exponent, delta


@triton.jit
def _dq_step(dq, operands, q, k, v, s, PRECISION: tl.constexpr):
    """Add one block of keys, with scores ``s [M, N]``, to dQ, which is not scaled yet."""
    g, lse, delta = operands  # [M, DV], [M], [M]
    p = tl.exp2(s - lse[:, None])  # [M, N]
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)  # dP = dO V^T, [M, N]
    ds = p * (dp - delta[:, None])  # dS = P * (dP - delta), [M, N]
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _dkdv_step(dk, dv, q, k, v, g, lse_delta, s, PRECISION: tl.constexpr):
    """Add one block of queries, with scores ``s [N, M]``, to dK, not scaled yet, and dV."""
    lse, delta = split_lse_delta(lse_delta)  # [M], [M]
    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)  # [N, M]; while exponentials are taken
    p = tl.exp2(s - lse[None, :])  # P^T, [N, M]
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)  # dV += P^T dO, [N, DV]
    ds = p * (dp - delta[None, :])  # dS^T, [N, M]
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@kernel(
    triton.jit,
    tensors="query key value rpb additional_keys additional_values documents "
    "out lse grad_out grad_lse lse_delta grad_query",
    masks="key_mask additional_mask",
)
def dq_kernel(
    query, key, value, rpb, additional_keys, additional_values, documents,
    out, lse, grad_out, grad_lse, lse_delta, grad_query, key_mask, additional_mask,
    P0, P1, P2, q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, KEY_L0, KEY_L1, KEY_L2, T0, T1, T2, m_b, m_0, m_1, m_2, a_b, a_0,
    K0, K1, K2, S0, S1, S2, D0, D1, D2, heads, per_kv, num_additional, scale,
    MODES: tl.constexpr, PER_KEY: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_RPB: tl.constexpr, HAS_ADDITIONAL: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ADDITIONAL_MASK: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """dQ, and the ``lse_delta`` that the other kernels need; arguments are ``forward_kernel``'s."""
    M: tl.constexpr = Q_BLOCK[0] * Q_BLOCK[1] * Q_BLOCK[2]
    N: tl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    p = locate(
        documents, (T0, T1, T2), heads, per_kv, (L0, L1, L2), (KEY_L0, KEY_L1, KEY_L2),
        (P0, P1, P2), (K0, K1, K2), (S0, S1, S2), (D0, D1, D2), (q_b, q_0, q_1, q_2, q_h),
        (k_b, k_0, k_1, k_2, k_h), (v_b, v_0, v_1, v_2, v_h), (m_b, m_0, m_1, m_2),
        PER_KEY, PACKED, False,
    )  # fmt: skip
    begin = plus(p.span.first, times(p.tile, Q_BLOCK))
    if is_empty(p, begin, p.span.n, PACKED):
        return
    rows = rows_of_tile(begin, p.span, p.kernel_size, p.stride, MODES, PER_KEY, Q_BLOCK, False)
    x = query_tokens(rows.position, p.group, p.dilation, p.span.n_keys, MODES, PER_KEY)  # [M]
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_at = token_offset(p.query.start, x, p.query.strides, ALIGN)
    q = load_rows(query, q_at, rows.real, d, D)  # [M, D]
    at = row_number(p.first, x, p.shape, heads, p.head)  # [M]
    g = load_rows(grad_out, at * DV, rows.real, dv, DV)  # [M, DV]
    row_lse, delta = make_lse_delta(  # [M], [M]
        out, lse, grad_lse, lse_delta, at, rows.real, g, dv, DV, HAS_GRAD_LSE
    )

    dq = walk_keys(
        _dq_step, tl.zeros([M, BLOCK_D], dtype=tl.float32), (g, row_lse, delta),
        q, key, value, rpb, key_mask, p, rows, scale, MODES, PER_KEY, KV_BLOCK, ALIGN,
        D, DV, BLOCK_D, BLOCK_DV, HAS_RPB, HAS_KEY_MASK, PRECISION,
    )  # fmt: skip
    if HAS_ADDITIONAL:
        dq = walk_additional(
            _dq_step, dq, (g, row_lse, delta), q, additional_keys, additional_values,
            additional_mask, p, heads // per_kv, (a_b, a_0), num_additional, scale, N, D, DV,
            BLOCK_D, BLOCK_DV, HAS_ADDITIONAL_MASK, PRECISION,
        )  # fmt: skip
    store_rows(grad_query, at * D, rows.real, d, D, dq * scale)


@triton.jit
def _places(
    p, start, j, heads, head, MODES: tl.constexpr, PER_KEY: tl.constexpr, ALIGN: tl.constexpr
):
    """Offsets and rows of queries of numbers ``j``, where those of the head begin at ``start``."""
    x = query_tokens(j, p.group, p.dilation, p.span.n_keys, MODES, PER_KEY)
    at = token_offset(start, x, p.query.strides, ALIGN)
    return at, row_number(p.first, x, p.shape, heads, head)


@triton.jit
def _share(n, AXIS: tl.constexpr):
    """The first and one-past-last of ``n`` items that a program has, which are shared by those
    along an axis of the grid."""
    each = tl.cdiv(n, tl.num_programs(AXIS))
    first = tl.program_id(AXIS) * each
    return first, tl.minimum(first + each, n)


@kernel(
    triton.jit,
    tensors="query key value rpb documents grad_out lse_delta grad_key grad_value",
    masks="key_mask",
)
def dkdv_kernel(
    query, key, value, rpb, documents, grad_out, lse_delta, grad_key, grad_value, key_mask,
    P0, P1, P2, q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, KEY_L0, KEY_L1, KEY_L2, T0, T1, T2, m_b, m_0, m_1, m_2,
    K0, K1, K2, S0, S1, S2, D0, D1, D2, kv_heads, per_kv, scale,
    MODES: tl.constexpr, PER_KEY: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_RPB: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, SINGLE: tl.constexpr, EVEN: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """dK and dV; arguments are ``forward_kernel``'s, tiles ``T`` are of keys.

    ``SINGLE``: a key head has one query head, and the loop over them is compiled away. ``EVEN``:
    queries lie as far apart in every block. ``SPLIT``: programs along the second axis of the grid
    share the blocks of a tile, and those along the third the query heads of its key head;
    ``grad_key`` and ``grad_value`` are ``[*rows, splits, channels]``.
    """
    M: tl.constexpr = Q_BLOCK[0] * Q_BLOCK[1] * Q_BLOCK[2]
    N: tl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    RING: tl.constexpr = (MODES[0] >= CIRCULAR) | (MODES[1] >= CIRCULAR) | (MODES[2] >= CIRCULAR)
    p = locate(
        documents, (T0, T1, T2), kv_heads, per_kv, (L0, L1, L2), (KEY_L0, KEY_L1, KEY_L2),
        (P0, P1, P2), (K0, K1, K2), (S0, S1, S2), (D0, D1, D2), (q_b, q_0, q_1, q_2, q_h),
        (k_b, k_0, k_1, k_2, k_h), (v_b, v_0, v_1, v_2, v_h), (m_b, m_0, m_1, m_2),
        PER_KEY, PACKED, True,
    )  # fmt: skip
    t2 = lpt_order(p.tile[2], T2, p.kernel_size[2], KV_BLOCK[2], MODES)
    begin = times((p.tile[0], p.tile[1], t2), KV_BLOCK)
    if is_empty(p, begin, p.span.n_keys, PACKED):
        return
    rows = rows_of_tile(begin, p.span, p.kernel_size, p.stride, MODES, PER_KEY, KV_BLOCK, True)
    y = key_tokens(rows.position, p.group, p.dilation, p.span.n_keys, MODES)  # [N] per axis
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_at = token_offset(p.key.start, y, p.key.strides, ALIGN)
    k = load_rows(key, k_at, rows.real, d, D)  # [N, D]
    v_at = token_offset(p.value.start, y, p.value.strides, ALIGN)
    v = load_rows(value, v_at, rows.real, dv, DV)  # [N, DV]
    if HAS_KEY_MASK:
        m_at = token_offset(p.mask.start, y, p.mask.strides, 1)
        allowed = load_mask(key_mask, m_at, rows.real)  # [N]

    r = coordinates(tl.arange(0, M), Q_BLOCK)  # [M] per axis
    heads = kv_heads * per_kv
    q_within = within_block(r, p.dilation, p.query.strides, ALIGN)  # [M]
    row_strides = token_strides(p.shape, heads)
    row_within = within_block(r, p.dilation, row_strides, 1)  # [M]
    row_index = bias_index(rows.position, p.kernel_size)  # [N]; compiles away without a bias
    blocks = count_blocks(rows, Q_BLOCK)
    q_steps = full_block_steps(blocks.full, p.dilation, p.query.strides, Q_BLOCK)
    row_steps = full_block_steps(blocks.full, p.dilation, row_strides, Q_BLOCK)
    dk_acc = tl.zeros([N, BLOCK_D], dtype=tl.float32)  # [N, D]
    dv_acc = tl.zeros([N, BLOCK_DV], dtype=tl.float32)  # [N, DV]

    first_head, end_head = 0, 1 if SINGLE else per_kv
    first_partial, end_partial, first_full, end_full = 0, blocks.num_partial, 0, blocks.num_full
    first_full_block = 0, 0, 0
    if SPLIT:
        first_head, end_head = _share(per_kv, 2)
        first, end = _share(blocks.num_partial + blocks.num_full, 1)
        first_partial, end_partial = first, tl.minimum(end, blocks.num_partial)
        first_full = tl.maximum(first - blocks.num_partial, 0)
        end_full = end - blocks.num_partial
        first_full_block = nth_full_block(first_full, blocks.full)

    for shared in range(first_head, end_head):
        head = p.kv_head * per_kv + shared
        q_start = p.query.start + head * q_h
        for block in range(first_partial, end_partial):
            a = plus(rows.low, times(partial_block(block, blocks), Q_BLOCK))
            real = before(plus(a, r), rows.high)  # [M]
            real = are_queries(plus(a, r), p.span, real, MODES, PER_KEY)
            if EVEN:
                q_at, row = _places(p, q_start, a, heads, head, MODES, PER_KEY, ALIGN)
                q = load_rows(query + q_at, q_within, real, d, D)  # [M, D]
                g = load_rows(grad_out + row * DV, row_within * DV, real, dv, DV)  # [M, DV]
                row_lse_delta = load_lse_delta(lse_delta + row * 4, row_within, real)  # [M, 4]
            else:
                q_at, row = _places(p, q_start, plus(a, r), heads, head, MODES, PER_KEY, ALIGN)
                q = load_rows(query, q_at, real, d, D)
                g = load_rows(grad_out, row * DV, real, dv, DV)
                row_lse_delta = load_lse_delta(lse_delta, row, real)
            position = key_positions(plus(a, r), p.span.n_keys, MODES, PER_KEY)  # [M] per axis
            at = row_index[:, None] - bias_index(position, p.kernel_size)[None, :]  # [N, M]
            s = scores(k, q, scale, rpb, at, p.kernel_size, head, None, HAS_RPB, False, PRECISION)
            s += mask_bias(a, rows.starts, rows.ends, Q_BLOCK, MODES)  # [N, M]
            if RING and PER_KEY[2] > 0:
                s = tl.where(real[None, :], s, float("-inf"))
            dk_acc, dv_acc = _dkdv_step(dk_acc, dv_acc, q, k, v, g, row_lse_delta, s, PRECISION)

    low = plus(rows.low, times(blocks.first_full, Q_BLOCK))
    for shared in range(first_head, end_head):
        head, full_block = p.kv_head * per_kv + shared, first_full_block
        q_start = p.query.start + head * q_h
        a = plus(low, times(full_block, Q_BLOCK))
        q_at, row = _places(p, q_start, a, heads, head, MODES, PER_KEY, ALIGN)
        q_rows = query + (q_at + q_within)[:, None] + d[None, :]  # [M, D]
        g_rows = grad_out + (row + row_within)[:, None] * DV + dv[None, :]  # [M, DV]
        lse_delta_rows = lse_delta + (row + row_within)[:, None] * 4 + tl.arange(0, 4)[None, :]
        for _ in range(first_full, end_full):
            a = plus(low, times(full_block, Q_BLOCK))
            if not EVEN:
                q_each, each = _places(p, q_start, plus(a, r), heads, head, MODES, PER_KEY, ALIGN)
                q_rows = query + q_each[:, None] + d[None, :]
                g_rows = grad_out + each[:, None] * DV + dv[None, :]
                lse_delta_rows = lse_delta + each[:, None] * 4 + tl.arange(0, 4)[None, :]
            q, g = load_tile(q_rows, d, D), load_tile(g_rows, dv, DV)  # [M, D], [M, DV]
            row_lse_delta = tl.load(lse_delta_rows)  # [M, 4]
            full_block, ended = next_full_block(full_block, blocks.full)
            if EVEN:
                q_rows += full_block_step(q_steps, ended, ALIGN)
                step = full_block_step(row_steps, ended, 1)
                g_rows += step * DV
                lse_delta_rows += step * 4
            position = key_positions(plus(a, r), p.span.n_keys, MODES, PER_KEY)  # [M] per axis
            at = row_index[:, None] - bias_index(position, p.kernel_size)[None, :]  # [N, M]
            s = scores(k, q, scale, rpb, at, p.kernel_size, head, None, HAS_RPB, True, PRECISION)
            dk_acc, dv_acc = _dkdv_step(dk_acc, dv_acc, q, k, v, g, row_lse_delta, s, PRECISION)

    if HAS_KEY_MASK:
        # What a masked key makes of its numbers, which may be NaN, stays in its own row.
        dk_acc = tl.where(allowed[:, None], dk_acc, 0.0)
        dv_acc = tl.where(allowed[:, None], dv_acc, 0.0)
    at = row_number(p.key_first, y, p.key_shape, kv_heads, p.kv_head)
    if SPLIT:
        at = at * (tl.num_programs(1) * tl.num_programs(2))
        at += tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    store_rows(grad_key, at * D, rows.real, d, D, dk_acc * scale)
    store_rows(grad_value, at * DV, rows.real, dv, DV, dv_acc)


@kernel(
    triton.jit,
    tensors="query additional_keys additional_values grad_out lse_delta grad_keys grad_values",
    masks="additional_mask",
)
def additional_kernel(
    query, additional_keys, additional_values, grad_out, lse_delta, grad_keys, grad_values,
    additional_mask, q_b, q_0, q_1, q_2, q_h, L0, L1, L2, per_split, a_b, a_0, kv_heads, per_kv,
    num_additional, scale, M: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_ADDITIONAL_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The additional tokens' gradients from one split of the queries.

    ``grad_keys`` and ``grad_values`` are ``[batch, kv heads, splits, num_additional, channels]``.
    """
    split_id, splits, shape = tl.program_id(2), tl.num_programs(2), (L0, L1, L2)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    c = tl.program_id(1) * N + tl.arange(0, N)
    present = c < num_additional  # [N]
    col = (batch * num_additional + c) * kv_heads + kv_head
    k = load_rows(additional_keys, col * D, present, d, D)  # [N, D]
    v = load_rows(additional_values, col * DV, present, dv, DV)  # [N, DV]
    dk_acc = tl.zeros([N, BLOCK_D], dtype=tl.float32)  # [N, D]
    dv_acc = tl.zeros([N, BLOCK_DV], dtype=tl.float32)  # [N, DV]
    steps = tl.cdiv(per_split, M)
    for step in range(0, steps * per_kv):
        head = kv_head * per_kv + step // steps
        x = split_id * per_split + step % steps * M + tl.arange(0, M)
        real = (x < L0 * L1 * L2) & (x < (split_id + 1) * per_split)  # [M]
        x = coordinates(x, shape)
        q_at = token_offset(batch * q_b + head * q_h, x, (q_0, q_1, q_2), ALIGN)
        q = load_rows(query, q_at, real, d, D)  # [M, D]
        row = row_number(batch * L0 * L1 * L2, x, shape, kv_heads * per_kv, head)
        g = load_rows(grad_out, row * DV, real, dv, DV)  # [M, DV]
        row_lse_delta = load_lse_delta(lse_delta, row, real)  # [M, 4]
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)  # [N, M]
        s = tl.where(real[None, :], s, float("-inf"))
        dk_acc, dv_acc = _dkdv_step(dk_acc, dv_acc, q, k, v, g, row_lse_delta, s, PRECISION)
    if HAS_ADDITIONAL_MASK:  # as in dkdv_kernel
        allowed = load_mask(additional_mask + batch * a_b, c.to(tl.int64) * a_0, present)[:, None]
        dk_acc, dv_acc = tl.where(allowed, dk_acc, 0.0), tl.where(allowed, dv_acc, 0.0)
    col = ((batch * kv_heads + kv_head) * splits + split_id) * num_additional + c
    store_rows(grad_keys, col * D, present, d, D, dk_acc * scale)
    store_rows(grad_values, col * DV, present, dv, DV, dv_acc)


@triton.jit
def _fine(dilation, R: tl.constexpr):
    """How many groups of queries an axis has that stand at neighboring keys, one at each, of which
    tokens are so far apart."""
    return dilation * R if R > 1 else dilation


@kernel(triton.jit, tensors="query key value rpb grad_out lse_delta sums", masks="key_mask")
def rpb_grad_kernel(
    query, key, value, rpb, grad_out, lse_delta, sums, key_mask,
    P0, P1, P2, q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, KEY_L0, KEY_L1, KEY_L2, m_b, m_0, m_1, m_2,
    K0, K1, K2, S0, S1, S2, D0, D1, D2, heads, per_kv, batches, O0, O1, O2, B1, B2, first_head,
    scale,
    MODES: tl.constexpr, PER_KEY: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS of one block of keys for each tile of queries, summed over a split of the tiles, into
    ``sums [splits, heads, blocks, queries, keys]``, for heads from ``first_head`` on.

    All blocks of a program are as far from their tiles, so that a pair of rows has the same bias in
    every tile. ``O``: how far the first block is, ``B``: how many there are, per axis. A tile is of
    queries that stand at neighboring keys, one at each. :func:`rpb_grad_sum_kernel` adds up pairs
    that have the same bias.
    """
    M: tl.constexpr = Q_BLOCK[0] * Q_BLOCK[1] * Q_BLOCK[2]
    N: tl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    block, split_id = tl.program_id(0), tl.program_id(1)
    head = (first_head + tl.program_id(2)).to(tl.int64)
    kv_head = head // per_kv
    shape, kernel_size, stride, dilation = (L0, L1, L2), (K0, K1, K2), (S0, S1, S2), (D0, D1, D2)
    offset = P0, P1, P2
    ONE: tl.constexpr = (
        1 if PER_KEY[0] > 0 else 0, 1 if PER_KEY[1] > 0 else 0, 1 if PER_KEY[2] > 0 else 0
    )  # fmt: skip
    fine = _fine(D0, PER_KEY[0]), _fine(D1, PER_KEY[1]), _fine(D2, PER_KEY[2])
    q_strides, k_strides, v_strides = (q_0, q_1, q_2), (k_0, k_1, k_2), (v_0, v_1, v_2)
    apart = plus((O0, O1, O2), times(coordinates(block, (1, B1, B2)), KV_BLOCK))
    key_shape = shape
    if PER_KEY[2] > 0:
        key_shape = KEY_L0, KEY_L1, KEY_L2
    t0, w0 = tiles_that_attend(
        key_shape[0], D0, K0, S0, apart[0], Q_BLOCK[0], KV_BLOCK[0], MODES[0],
        L0, P0, PER_KEY[0],
    )  # fmt: skip
    t1, w1 = tiles_that_attend(
        key_shape[1], D1, K1, S1, apart[1], Q_BLOCK[1], KV_BLOCK[1], MODES[1],
        L1, P1, PER_KEY[1],
    )  # fmt: skip
    t2, w2 = tiles_that_attend(
        key_shape[2], D2, K2, S2, apart[2], Q_BLOCK[2], KV_BLOCK[2], MODES[2],
        L2, P2, PER_KEY[2],
    )  # fmt: skip
    r, c = coordinates(tl.arange(0, M), Q_BLOCK), coordinates(tl.arange(0, N), KV_BLOCK)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    at = bias_index(plus(apart, c), kernel_size)[None, :] - bias_index(r, kernel_size)[:, None]
    bias = biases(rpb, at, kernel_size, head, scale, False)  # [M, N]
    acc = tl.zeros([M, N], dtype=tl.float32)
    tiles = w0 * w1 * w2 * fine[0] * fine[1] * fine[2] * batches
    per_split = tl.cdiv(tiles, tl.num_programs(1))
    for tile_id in range(split_id * per_split, tl.minimum((split_id + 1) * per_split, tiles)):
        rest, tile = split(tile_id, (w0, w1, w2))
        batch, group = split(rest, fine)
        batch = batch.to(tl.int64)
        key_group = key_positions(group, dilation, MODES, PER_KEY)
        own = span(shape, shape, offset, fine, group, ONE)
        own = Span(own.first, own.n, group_lengths(key_shape, dilation, key_group))
        q_start, first = batch * q_b + head * q_h, batch * L0 * L1 * L2
        if PER_KEY[2] > 0:
            q_start -= token_offset(0, offset, q_strides, 1)
            first -= row_number(0, offset, shape, 1, 0)
        begin = plus(own.first, times(plus(tile, (t0, t1, t2)), Q_BLOCK))
        rows = rows_of_tile(begin, own, kernel_size, stride, MODES, ONE, Q_BLOCK, False)
        x = key_tokens(rows.position, group, fine, own.n_keys, MODES)  # [M] per axis
        q_at = token_offset(q_start, x, q_strides, ALIGN)
        q = load_rows(query, q_at, rows.real, d, D)  # [M, D]
        row = row_number(first, x, shape, heads, head)
        g = load_rows(grad_out, row * DV, rows.real, dv, DV)  # [M, DV]
        lse, delta = split_lse_delta(load_lse_delta(lse_delta, row, rows.real))  # [M], [M]
        a = plus(begin, apart)
        position = plus(a, c)  # [N] per axis
        margin = margins(own.n_keys, MODES, ONE)
        present = before(minus((-1, -1, -1), margin), position)  # [N]
        present = present & before(position, plus(own.n_keys, margin))
        y = key_tokens(position, key_group, dilation, own.n_keys, MODES)
        if HAS_KEY_MASK:
            m_at = token_offset(batch * m_b, y, (m_0, m_1, m_2), 1)
            present = load_mask(key_mask, m_at, present)  # [N]
        k_at = token_offset(batch * k_b + kv_head * k_h, y, k_strides, ALIGN)
        k = load_rows(key, k_at, present, d, D)  # [N, D]
        v_at = token_offset(batch * v_b + kv_head * v_h, y, v_strides, ALIGN)
        v = load_rows(value, v_at, present, dv, DV)  # [N, DV]
        s = tl.dot(q, tl.trans(k), bias, input_precision=PRECISION) * (scale * LOG2E)  # [M, N]
        s += mask_bias(a, rows.starts, rows.ends, KV_BLOCK, MODES)
        if HAS_KEY_MASK:
            s += hidden(present)
        # Rows that are no query have weights of zero, whatever their bias.
        p = tl.exp2(s - tl.where(rows.real, lse, float("inf"))[:, None])  # [M, N]
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)  # [M, N]
        acc += p * (dp - delta[:, None])
    at = split_id.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    at = (at * tl.num_programs(0) + block) * M + tl.arange(0, M)
    tl.store(sums + at[:, None] * N + tl.arange(0, N)[None, :], acc)


@kernel(triton.jit, tensors="sums grad_rpb")
def rpb_grad_sum_kernel(
    sums, grad_rpb, splits, K0, K1, K2, O0, O1, O2, B1, B2, first_head, blocks, offsets,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The bias's gradient ``[heads, offsets]`` from what :func:`rpb_grad_kernel` made; a program
    sums ``BLOCK`` offsets, of ``SPLITS`` splits at once."""
    M: tl.constexpr = Q_BLOCK[0] * Q_BLOCK[1] * Q_BLOCK[2]
    N: tl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    head = (first_head + tl.program_id(1)).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o0, o1, o2 = coordinates(at, (1, 2 * K1 - 1, 2 * K2 - 1))  # [BLOCK] per axis
    r = tl.arange(0, M)
    r0, r1, r2 = coordinates(r, Q_BLOCK)  # [M] per axis
    # Each query's key with that bias, from the first block's first key on, [M, BLOCK] per axis.
    p0 = r0[:, None] + (o0 - (K0 - 1) - O0)[None, :]
    p1 = r1[:, None] + (o1 - (K1 - 1) - O1)[None, :]
    p2 = r2[:, None] + (o2 - (K2 - 1) - O2)[None, :]
    # No tile attends keys that are in no block.
    here = (p0 >= 0) & (p1 >= 0) & (p1 < B1 * KV_BLOCK[1]) & (p2 >= 0) & (p2 < B2 * KV_BLOCK[2])
    block = (p0 // KV_BLOCK[0] * B1 + p1 // KV_BLOCK[1]) * B2 + p2 // KV_BLOCK[2]
    column = (p0 % KV_BLOCK[0] * KV_BLOCK[1] + p1 % KV_BLOCK[1]) * KV_BLOCK[2] + p2 % KV_BLOCK[2]
    here = here & (block < blocks) & (at < offsets)[None, :]
    pair = (block * M + r[:, None]) * N + column
    # A number is seldom beside the next one: many have to be on their way at once.
    acc = tl.zeros([SPLITS, M, BLOCK], dtype=tl.float32)
    for first in range(0, splits, SPLITS):
        split_id = first + tl.arange(0, SPLITS)  # [SPLITS]
        start = split_id.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        start = (start * blocks * M * N)[:, None, None]
        present = here[None, :, :] & (split_id < splits)[:, None, None]
        acc += tl.load(sums + start + pair[None, :, :], mask=present, other=0.0)
    acc = tl.sum(tl.sum(acc, 0), 0)  # [BLOCK]
    tl.store(grad_rpb + head * offsets + at, acc, mask=at < offsets)
