"""Forward of small windows: each warp has 16 queries, and computes the keys that these reach.

The fewer queries a tile has, the fewer pairs it computes in vain: with windows of 7x7 a tile of 64
queries computes 4.9 times what is needed, one of 16 queries 2.6 times. So each warp has a tile of
its own (``warps.py``), which no other warp waits for. Numbers have two bytes, or four that products
may round to TF32. The halo is copied to shared memory once, keys and values.
"""

# Gluon reads annotations as objects: no ``from __future__``.

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from . import primitives
from .launch import kernel
from .primitives import LN2, LOG2E, ROUNDING
from .warp_masks import KeyMask, allowed_at, allowed_keys, lane_layout, offset_from
from .warps import (
    MASKED,
    ROWS,
    barrier,
    before,
    coordinates,
    copy_layout,
    expanded,
    from_triton,
    group_lengths,
    index_of,
    key_layout,
    key_tokens,
    keys_of_products,
    load_async,
    load_keys,
    load_values,
    minimum,
    minus,
    outside,
    phases,
    plus,
    present_tokens,
    product_layout,
    row_layout,
    row_number,
    rows_of_warps,
    tiles_of_warps,
    times,
    token_offset,
    value_layout,
    window,
    window_mask,
)

bias_index = from_triton(primitives.bias_index)
bias_offset = from_triton(primitives.bias_offset)


# --- copies, where tiles are, and what they reach -----------------------------------------------


@gluon.jit
def _copy(
    tensor, start, tokens, origin, strides, stage, allowed, C: gl.constexpr, ALIGN: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Start to copy rows of tokens, ``[rows]`` per axis, to shared memory; ``ALIGN``: bytes. Rows
    that are not ``allowed``, unless that is None, are zeros there, and so are channels from ``C``
    on."""
    D: gl.constexpr = stage.shape[1]
    d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    at = gl.multiple_of(
        tensor + start + offset_from(tokens, origin, strides)[:, None] + d, [ALIGN] * 2
    )
    if allowed is not None:
        allowed = gl.expand_dims(allowed, 1)
        if C < D:
            allowed = allowed & (d < C)
    elif C < D:
        allowed = d < C
    if allowed is None:
        load_async(stage, at)
    else:
        load_async(stage, at, mask=allowed)


@gluon.jit
def _windows(i, n, kernel_size, stride, MODES: gl.constexpr):
    """First and one-past-last key of queries ``i``, per axis."""
    start0, end0 = window(i[0], n[0], n[0], kernel_size[0], stride[0], MODES[0])
    start1, end1 = window(i[1], n[1], n[1], kernel_size[1], stride[1], MODES[1])
    start2, end2 = window(i[2], n[2], n[2], kernel_size[2], stride[2], MODES[2])
    return (start0, start1, start2), (end0, end1, end2)


@gluon.jit
def _lows(
    begin, last, n, kernel_size, stride, MODES: gl.constexpr, WARPS: gl.constexpr,
    Q_BLOCK: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """First key of each warp, per axis ``[W]`` in a layout; ``last``: the last query."""
    first = minimum(tiles_of_warps(begin, WARPS, Q_BLOCK, LAYOUT), last)
    low, _ = _windows(first, n, kernel_size, stride, MODES)
    return low


@gluon.jit
def _biases(rpb, i, y, kernel_size, head, scale):
    """What ``rpb`` adds to the scores of queries ``i [W, 16]`` and keys ``y [W, N]``, per axis,
    before they are scaled."""
    row = gl.expand_dims(bias_index(i, kernel_size), 2)
    at = gl.expand_dims(bias_index(y, kernel_size), 1) - row  # [W, 16, N]
    half = bias_offset((0, 0, 0), kernel_size, 0)
    at = gl.minimum(gl.maximum(at, -half), half)  # what is farther is masked
    bias = gl.load(rpb + bias_offset((0, 0, 0), kernel_size, head) + at)
    return bias.to(gl.float32) * (1.0 / scale)


# --- the kernel ---------------------------------------------------------------------------------


@kernel(gluon.jit, tensors="query key value rpb out lse", masks="key_mask")
def small_forward_kernel(
    query, key, value, rpb, out, lse, key_mask,
    P0, P1, P2, q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    L0, L1, L2, KEY_L0, KEY_L1, KEY_L2, T0, T1, T2, m_b, m_0, m_1, m_2,
    K0, K1, K2, S0, S1, S2, D0, D1, D2, heads, per_kv, scale,
    MODES: gl.constexpr, DILATED: gl.constexpr, PART: gl.constexpr, WARPS: gl.constexpr,
    Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr, BLOCKS: gl.constexpr, HALO: gl.constexpr,
    CHUNK: gl.constexpr, ALIGN: gl.constexpr, C: gl.constexpr, D: gl.constexpr,
    HAS_RPB: gl.constexpr, HAS_KEY_MASK: gl.constexpr,
):  # fmt: skip
    """Numbers as in ``forward_kernel``; ``P`` and ``KEY_L`` are not read unless queries are a
    ``PART``, which are counted as keys are. All per axis: the tiles of ``WARPS``, of ``Q_BLOCK``
    queries each, are beside one another; each visits ``BLOCKS`` of ``KV_BLOCK`` keys, which
    together lie in ``HALO``. The grid has tiles, dilation groups, and heads of all batch entries.
    Heads have ``C`` channels, and products ``D``, of which the others are zeros.
    """
    W: gl.constexpr = WARPS[0] * WARPS[1] * WARPS[2]
    PRODUCT: gl.constexpr = product_layout(W)
    SIZE: gl.constexpr = query.dtype.element_ty.primitive_bitwidth // 8
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4 // SIZE)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 4 // SIZE)
    M_ROWS: gl.constexpr = gl.SliceLayout(2, PRODUCT)  # [W, 16]
    N_ROWS: gl.constexpr = gl.SliceLayout(1, PRODUCT)  # [W, N]
    N: gl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    QUERY: gl.constexpr = row_layout(W, D, 4 // SIZE)
    OUT: gl.constexpr = row_layout(W, D, 2)
    COPY: gl.constexpr = copy_layout(W, D, SIZE)
    PHASES: gl.constexpr = phases(D * SIZE)
    BYTES: gl.constexpr = ALIGN * SIZE
    EXTENT: gl.constexpr = (
        BLOCKS[0] * KV_BLOCK[0],
        BLOCKS[1] * KV_BLOCK[1],
        BLOCKS[2] * KV_BLOCK[2],
    )
    CHUNKS: gl.constexpr = (HALO[0] * HALO[1] * HALO[2] + CHUNK - 1) // CHUNK

    kernel_size, stride = (K0, K1, K2), (S0, S1, S2)
    group, dilation, shape = (0, 0, 0), (1, 1, 1), (L0, L1, L2)
    offset, end, n = (0, 0, 0), shape, shape
    if PART:
        offset, n = (P0, P1, P2), (KEY_L0, KEY_L1, KEY_L2)
        end = plus(offset, shape)
    begin = offset
    if DILATED:
        dilation = (D0, D1, D2)
        group = index_of(gl.program_id(1), dilation, MODES)
        n, end = group_lengths(n, dilation, group), group_lengths(end, dilation, group)
        if PART:
            begin = group_lengths(offset, dilation, group)
    number = index_of(gl.program_id(0), (T0, T1, T2), MODES)
    begin = plus(begin, times(number, times(WARPS, Q_BLOCK)))
    if outside(begin, end):
        return
    last = minus(end, (1, 1, 1))
    batch = (gl.program_id(2) // heads).to(gl.int64)
    head = (gl.program_id(2) % heads).to(gl.int64)
    kv_head = gl.program_id(2) % heads // per_kv

    # Keys and values of the halo.
    q_strides, k_strides, v_strides = (q_0, q_1, q_2), (k_0, k_1, k_2), (v_0, v_1, v_2)
    low, _ = _windows(begin, n, kernel_size, stride, MODES)
    origin = present_tokens(low, group, dilation, n, MODES)
    k_start = token_offset(batch * k_b + kv_head * k_h, origin, k_strides, 1)
    v_start = token_offset(batch * v_b + kv_head * v_h, origin, v_strides, 1)
    stages = gl.allocate_shared_memory(
        key.dtype.element_ty, [2 * CHUNKS, CHUNK, D],
        gl.SwizzledSharedLayout(16 // SIZE, PHASES[0], PHASES[1], [1, 0]),
    )  # fmt: skip
    m_strides, allowed = (m_0, m_1, m_2), None
    m_start = token_offset(batch * m_b, origin, m_strides, 1)
    mask = KeyMask(key_mask + m_start if HAS_KEY_MASK else 0, origin, m_strides, group, dilation, n)
    for chunk in gl.static_range(CHUNKS):
        row = chunk * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, COPY))
        position = plus(low, coordinates(row, HALO))
        x = present_tokens(position, group, dilation, n, MODES)
        if HAS_KEY_MASK:
            allowed = allowed_at(mask, position, MODES)
        k_stage, v_stage = stages.index(chunk), stages.index(CHUNKS + chunk)
        _copy(key, k_start, x, origin, k_strides, k_stage, allowed, C, BYTES, COPY)
        _copy(value, v_start, x, origin, v_strides, v_stage, allowed, C, BYTES, COPY)
    async_copy.commit_group()

    i = rows_of_warps(begin, WARPS, Q_BLOCK, gl.SliceLayout(2, QUERY))
    x = key_tokens(minimum(i, last), group, dilation, n, MODES)
    d = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, QUERY)))[None, None, :]
    origin = key_tokens(begin, group, dilation, n, MODES)
    at = query + token_offset(batch * q_b + head * q_h, minus(origin, offset), q_strides, 1)
    at += gl.expand_dims(offset_from(x, origin, q_strides), 2) + d
    at = gl.multiple_of(at, [BYTES, BYTES, BYTES])
    q = gl.load(at, mask=d < C, other=0) if C < D else gl.load(at)
    q = gl.convert_layout(q, LEFT)  # [W, 16, D]

    i = minimum(rows_of_warps(begin, WARPS, Q_BLOCK, M_ROWS), last)  # [W, 16] per axis
    starts, ends = _windows(i, n, kernel_size, stride, MODES)
    # Where each warp's keys begin, per axis [W]; of those in shared memory, in the halo.
    OF_KEYS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, key_layout(W, N, D, SIZE)))
    OF_VALUES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, value_layout(W, N, D, SIZE)))
    OF_SCORES: gl.constexpr = gl.SliceLayout(1, N_ROWS)
    k_low = _lows(begin, last, n, kernel_size, stride, MODES, WARPS, Q_BLOCK, OF_KEYS)
    v_low = _lows(begin, last, n, kernel_size, stride, MODES, WARPS, Q_BLOCK, OF_VALUES)
    k_low, v_low = minus(k_low, low), minus(v_low, low)
    s_low = _lows(begin, last, n, kernel_size, stride, MODES, WARPS, Q_BLOCK, OF_SCORES)
    OF_LANES: gl.constexpr = gl.SliceLayout(1, lane_layout(W))
    m_low = _lows(begin, last, n, kernel_size, stride, MODES, WARPS, Q_BLOCK, OF_LANES)
    c = expanded(coordinates(gl.arange(0, N, gl.SliceLayout(0, N_ROWS)), KV_BLOCK), 0)  # [1, N]

    scale_log2 = scale * LOG2E  # scores times it are exponents of two
    acc = gl.zeros([W, ROWS, D], gl.float32, PRODUCT)
    row_max = gl.full([W, ROWS], float("-inf"), gl.float32, M_ROWS)
    row_sum = gl.zeros([W, ROWS], gl.float32, M_ROWS)
    async_copy.wait_group(0)
    barrier()
    for number in range(0, BLOCKS[0] * BLOCKS[1] * BLOCKS[2]):
        first = times(coordinates(number, BLOCKS), KV_BLOCK)
        k = load_keys(key, plus(k_low, first), 0, W, D, KV_BLOCK, HALO)
        k = gl.convert_layout(k, RIGHT)  # [W, D, N]

        # The product starts from masks and biases. Keys that a mask takes away are zeros.
        y = plus(expanded(plus(s_low, first), 1), c)  # [W, N] per axis
        s = window_mask(y, starts, ends, MODES, EXTENT)  # [W, 16, N]
        if HAS_RPB:
            s += _biases(rpb, i, y, kernel_size, head, scale)
            s = gl.maximum(s, MASKED, propagate_nan=tl.PropagateNan.ALL)  # of a bias of -inf
        if HAS_KEY_MASK:
            of_block = allowed_keys(mask, plus(m_low, first), MODES, KV_BLOCK, N_ROWS)  # [W, N]
            s = gl.where(gl.expand_dims(of_block, 1), s, MASKED)
        s = mma_v2(q, k, s, "tf32")

        new_max = gl.max(s, 2) * scale_log2  # [W, 16]
        if HAS_RPB:  # as on Hopper: above all scores, whose rounding errors may be large
            new_max += gl.abs(new_max) * ROUNDING
        new_max = gl.maximum(row_max, new_max)
        p = gl.exp2(s * scale_log2 - gl.expand_dims(new_max, 2))  # [W, 16, N]
        rescale = gl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + gl.sum(p, 2)
        row_max = new_max

        v = load_values(
            value, plus(v_low, first), CHUNKS * CHUNK * D * SIZE, W, D, KV_BLOCK, HALO
        )  # fmt: skip
        p = p.to(value.dtype.element_ty)
        if SIZE == 4:
            v, p = keys_of_products(v, 1), keys_of_products(p, 2)
        v = gl.convert_layout(v, RIGHT)  # [W, N, D]
        p = gl.convert_layout(p, LEFT)
        acc = mma_v2(p, v, acc * gl.expand_dims(rescale, 2), "tf32")  # [W, 16, D]

    found = row_max > 0.5 * MASKED * scale_log2  # a bias of -inf may leave nothing to attend
    real = before(rows_of_warps(begin, WARPS, Q_BLOCK, M_ROWS), end)
    x = minus(key_tokens(i, group, dilation, n, MODES), offset)
    first_row = batch * L0 * L1 * L2
    at = row_number(first_row, x, shape, heads, head)  # [W, 16]
    row_lse = gl.where(found, (row_max + gl.log2(row_sum)) * LN2, float("-inf"))
    gl.store(lse + at, row_lse, mask=real)

    inverse = gl.where(found, 1.0 / row_sum, 0.0)
    o = (acc * gl.expand_dims(inverse, 2)).to(out.dtype.element_ty)  # O = acc / row_sum
    i = rows_of_warps(begin, WARPS, Q_BLOCK, gl.SliceLayout(2, OUT))
    x = minus(key_tokens(i, group, dilation, n, MODES), offset)
    at = out + gl.expand_dims(row_number(first_row, x, shape, heads, head) * C, 2)
    d = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, OUT)))[None, None, :]
    OUT_BYTES: gl.constexpr = 16 if C % 16 == 0 else (C & -C) * SIZE
    at = gl.multiple_of(at + d, [OUT_BYTES, OUT_BYTES, OUT_BYTES])
    real = gl.expand_dims(before(i, end), 2)
    if C < D:
        real = real & (d < C)
    gl.store(at, gl.convert_layout(o, OUT), mask=real)
