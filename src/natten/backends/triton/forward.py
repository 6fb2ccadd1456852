"""Forward: one program per tile of queries walks the box of keys that holds the tile's windows."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .primitives import (
    LN2,
    LOG2E,
    before,
    bias_place,
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
    next_whole_box,
    outside,
    plus,
    row_number,
    scores,
    split,
    store_rows,
    straddling_box,
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


@kernel(triton.jit, tensors="query key value rpb extra_key extra_value documents out lse")
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
    c = coordinates(tl.arange(0, N), TK)
    places = bias_place(i, kernel_size)  # what only a bias needs compiles away without one
    k_box = within_box(c, dilation, k_strides, ALIGN)
    v_box = within_box(c, dilation, v_strides, ALIGN)

    acc = tl.zeros([M, BLOCK_DV], dtype=tl.float32)
    top = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
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
    rows = row_number(first, x, shape, heads, head)
    store_rows(out, rows * DV, real, dv, DV, acc / total[:, None])
    tl.store(lse + rows, tl.where(found, (top + tl.log2(total)) * LN2, float("-inf")), mask=real)
