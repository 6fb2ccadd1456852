"""Forward: one program per tile of queries walks the keys that the tile's windows span."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .primitives import (
    LN2,
    load_rows,
    plus,
    query_tokens,
    row_number,
    store_rows,
    times,
    token_offset,
)
from .walk import is_empty, locate, rows_of_tile, walk_additional, walk_keys


@triton.jit
def _softmax_step(state, operands, q, k, v, s, PRECISION: tl.constexpr):
    """One step of the online softmax; scores are exponents of two."""
    acc, row_max, row_sum = state  # [M, DV], [M], [M]
    new_max = tl.maximum(row_max, tl.max(s, 1))
    # A row whose keys so far are all masked stays at -inf without making NaN.
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(s - reference[:, None])  # [M, N]
    rescale = tl.exp2(row_max - reference)  # [M]
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)  # [M, DV]
    return acc, new_max, row_sum


@kernel(
    triton.jit,
    tensors="query key value rpb additional_keys additional_values documents out lse",
    masks="key_mask additional_mask",
)
def forward_kernel(
    query, key, value, rpb, additional_keys, additional_values, documents, out, lse,
    key_mask, additional_mask,
    P0, P1, P2, q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, KEY_L0, KEY_L1, KEY_L2, T0, T1, T2, m_b, m_0, m_1, m_2, a_b, a_0,
    K0, K1, K2, S0, S1, S2, D0, D1, D2, heads, per_kv, num_additional, scale,
    MODES: tl.constexpr, PER_KEY: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_RPB: tl.constexpr, HAS_ADDITIONAL: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ADDITIONAL_MASK: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Per axis queries ``L``, keys ``KEY_L``, queries before the first one ``P``, window ``K``,
    stride ``S``, dilation ``D``, number of tiles ``T``. ``PACKED``: a batch entry is a document of
    its own sizes. Where queries are keys' own tokens (``PER_KEY``), ``P`` is not read, and of
    ``KEY_L`` only the last axis."""
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
    at = token_offset(p.query.start, x, p.query.strides, ALIGN)
    q = load_rows(query, at, rows.real, d, D)  # [M, D]

    state = (
        tl.zeros([M, BLOCK_DV], dtype=tl.float32),  # acc
        tl.full([M], float("-inf"), dtype=tl.float32),  # row_max
        tl.zeros([M], dtype=tl.float32),  # row_sum
    )
    state = walk_keys(
        _softmax_step, state, (), q, key, value, rpb, key_mask, p, rows, scale, MODES, PER_KEY,
        KV_BLOCK, ALIGN, D, DV, BLOCK_D, BLOCK_DV, HAS_RPB, HAS_KEY_MASK, PRECISION,
    )  # fmt: skip
    if HAS_ADDITIONAL:
        state = walk_additional(
            _softmax_step, state, (), q, additional_keys, additional_values, additional_mask, p,
            heads // per_kv, (a_b, a_0), num_additional, scale, N, D, DV, BLOCK_D, BLOCK_DV,
            HAS_ADDITIONAL_MASK, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = state

    found = row_sum > 0
    row_sum = tl.where(found, row_sum, 1.0)
    at = row_number(p.first, x, p.shape, heads, p.head)
    store_rows(out, at * DV, rows.real, dv, DV, acc / row_sum[:, None])
    row_lse = tl.where(found, (row_max + tl.log2(row_sum)) * LN2, float("-inf"))
    tl.store(lse + at, row_lse, mask=rows.real)
