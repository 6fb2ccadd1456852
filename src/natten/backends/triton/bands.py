"""Wide windows of float32 rounded to TF32, band by band: forward and backward.

Each warp has a tile of 16 rows of its own (``warps.py``). Where what the tiles of a program reach
has no room in shared memory, they lie beside one another along the last axis only, and it comes in
bands: a few lines of tokens, of which one is copied while another is multiplied. Rows are queries,
which reach keys, or keys, which reach the queries that attend them; what they reach are columns.
"""

# Gluon reads annotations as objects: no ``from __future__``.

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .launch import kernel
from .primitives import LN2, LOG2E
from .warp_masks import KeyMask, allowed_at, allowed_keys, lane_layout
from .warps import (
    MASKED,
    ROWS,
    barrier,
    before,
    coordinates,
    copy_layout,
    expanded,
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
    queries_of,
    row_layout,
    row_number,
    rows_of_warps,
    times,
    token_strides,
    value_layout,
    window,
    window_mask,
)


class Walk(NamedTuple):
    """Where a program's rows are, and the bands that they reach."""

    group: Any  # of dilation, per axis
    dilation: Any  # per axis
    n: Any  # rows of the group, and as many columns, per axis
    kernel_size: Any  # per axis
    stride: Any  # per axis
    begin: Any  # the first row, per axis
    last: Any  # the last row of the group, per axis
    low: Any  # the columns that rows reach, per axis
    high: Any
    bands1: Any  # how many bands there are along axis 1
    bands: Any
    blocks: Any  # how many blocks of a band a warp has, the one that has most


class Starts(NamedTuple):
    """Where each warp's blocks begin along a band, ``[W]``, in the layouts of what is there."""

    of_keys: Any
    of_values: Any
    of_scores: Any
    of_lanes: Any


class Source(NamedTuple):
    """A tensor whose bands are copied."""

    first: Any  # address of its first token
    strides: Any  # per axis
    columns: Any  # how far the tokens of a line are from its first one


class Bands(NamedTuple):
    """Two tensors whose bands are copied together, and shared memory for two bands of both."""

    a: Any  # a :class:`Source`
    b: Any  # likewise
    stages: Any  # [4 * lines of a band, HALO, D]
    mask: Any  # a :class:`KeyMask` in a tuple, () if there is none


# --- where rows are, and what they reach --------------------------------------------------------


@gluon.jit
def _reach_along(
    i, n, kernel_size, stride, MODES: gl.constexpr, OF_KEYS: gl.constexpr, AXIS: gl.constexpr
):
    """First and one-past-last column that rows ``i`` reach along an axis."""
    if OF_KEYS:
        start, end = queries_of(i, n[AXIS], n[AXIS], kernel_size[AXIS], stride[AXIS], MODES[AXIS])
    else:
        start, end = window(i, n[AXIS], n[AXIS], kernel_size[AXIS], stride[AXIS], MODES[AXIS])
    return start, end


@gluon.jit
def _reach(i, n, kernel_size, stride, MODES: gl.constexpr, OF_KEYS: gl.constexpr):
    """First and one-past-last column that rows ``i`` reach, per axis."""
    start0, end0 = _reach_along(i[0], n, kernel_size, stride, MODES, OF_KEYS, 0)
    start1, end1 = _reach_along(i[1], n, kernel_size, stride, MODES, OF_KEYS, 1)
    start2, end2 = _reach_along(i[2], n, kernel_size, stride, MODES, OF_KEYS, 2)
    return (start0, start1, start2), (end0, end1, end2)


@gluon.jit
def _walk(
    tiles, shape, kernel_size, stride, dilation, MODES: gl.constexpr, OF_KEYS: gl.constexpr,
    DILATED: gl.constexpr, W: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """The :class:`Walk` of this program."""
    PROGRAM: gl.constexpr = (TILE[0], TILE[1], W * TILE[2])
    END: gl.constexpr = (TILE[0] - 1, TILE[1] - 1, W * TILE[2] - 1)
    group, n = (0, 0, 0), shape
    if DILATED:
        group = index_of(gl.program_id(1), dilation, MODES)
        n = group_lengths(n, dilation, group)
    else:
        dilation = (1, 1, 1)
    begin = times(index_of(gl.program_id(0), tiles, MODES), PROGRAM)
    last = minus(n, (1, 1, 1))
    low, _ = _reach(minimum(begin, last), n, kernel_size, stride, MODES, OF_KEYS)
    _, high = _reach(minimum(plus(begin, END), last), n, kernel_size, stride, MODES, OF_KEYS)
    most = low[2] * 0
    for w in gl.static_range(W):
        i = gl.minimum(begin[2] + w * TILE[2], last[2])
        j = gl.minimum(begin[2] + (w + 1) * TILE[2] - 1, last[2])
        start, _ = _reach_along(i, n, kernel_size, stride, MODES, OF_KEYS, 2)
        _, end = _reach_along(j, n, kernel_size, stride, MODES, OF_KEYS, 2)
        most = gl.maximum(most, end - start)
    bands0 = (high[0] - low[0] + BLOCK[0] - 1) // BLOCK[0]
    bands1 = (high[1] - low[1] + BLOCK[1] - 1) // BLOCK[1]
    blocks = (most + BLOCK[2] - 1) // BLOCK[2]
    return Walk(
        group, dilation, n, kernel_size, stride, begin, last, low, high, bands1, bands0 * bands1,
        blocks,
    )  # fmt: skip


@gluon.jit
def _rows(walk, W: gl.constexpr, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows of each warp, per axis ``[W, 16]`` in a layout; some may be beyond the end."""
    WARPS: gl.constexpr = (1, 1, W)
    return rows_of_warps(walk.begin, WARPS, TILE, LAYOUT)


@gluon.jit
def _starts_in(
    walk, MODES: gl.constexpr, OF_KEYS: gl.constexpr, W: gl.constexpr, TILE: gl.constexpr,
    BLOCK: gl.constexpr, HALO: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where each warp's blocks begin along a band, in a layout. None ends beyond the band: what a
    warp reaches less than another one has masked columns on the left, too."""
    i = gl.minimum(walk.begin[2] + gl.arange(0, W, LAYOUT) * TILE[2], walk.last[2])
    start, _ = _reach_along(i, walk.n, walk.kernel_size, walk.stride, MODES, OF_KEYS, 2)
    return gl.minimum(start - walk.low[2], HALO - walk.blocks * BLOCK[2])


@gluon.jit
def _starts(
    walk, MODES: gl.constexpr, OF_KEYS: gl.constexpr, W: gl.constexpr, TILE: gl.constexpr,
    BLOCK: gl.constexpr, HALO: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The :class:`Starts` of a program."""
    N: gl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    KEYS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, key_layout(W, N, D, 4)))
    VALUES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, value_layout(W, N, D, 4)))
    SCORES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, product_layout(W)))
    LANES: gl.constexpr = gl.SliceLayout(1, lane_layout(W))
    return Starts(
        _starts_in(walk, MODES, OF_KEYS, W, TILE, BLOCK, HALO, KEYS),
        _starts_in(walk, MODES, OF_KEYS, W, TILE, BLOCK, HALO, VALUES),
        _starts_in(walk, MODES, OF_KEYS, W, TILE, BLOCK, HALO, SCORES),
        _starts_in(walk, MODES, OF_KEYS, W, TILE, BLOCK, HALO, LANES),
    )


@gluon.jit
def _first_of_band(walk, band, BLOCK: gl.constexpr):
    """Where a band begins along axes 0 and 1."""
    j0 = band // walk.bands1
    return walk.low[0] + j0 * BLOCK[0], walk.low[1] + (band - j0 * walk.bands1) * BLOCK[1]


@gluon.jit
def _positions(walk, band, starts, block, W: gl.constexpr, BLOCK: gl.constexpr):
    """Columns of each warp's block of a band, per axis ``[W, N]``."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, product_layout(W)))
    first0, first1 = _first_of_band(walk, band, BLOCK)
    c = coordinates(gl.arange(0, BLOCK[0] * BLOCK[1] * BLOCK[2], COLUMNS), BLOCK)
    c = expanded(c, 0)
    first2 = gl.expand_dims(starts.of_scores + (walk.low[2] + block * BLOCK[2]), 1)
    none = first2 * 0
    return none + first0 + c[0], none + first1 + c[1], first2 + c[2]


# --- masks of keys ------------------------------------------------------------------------------


@gluon.jit
def _key_mask(key_mask, start, strides, walk, HAS_KEY_MASK: gl.constexpr):
    """The :class:`KeyMask` of the program's batch entry, which begins at ``start``, in a tuple; ()
    if there is none."""
    mask = ()
    if HAS_KEY_MASK:
        first = key_mask + start
        mask = (KeyMask(first, (0, 0, 0), strides, walk.group, walk.dilation, walk.n),)
    return mask


@gluon.jit
def _masked(s, mask, walk, band, starts, block, MODES: gl.constexpr, BLOCK: gl.constexpr):
    """What scores ``[W, 16, N]`` of each warp's block of a band start from, with the mask of keys,
    if there is one."""
    if len(mask) > 0:
        W: gl.constexpr = s.shape[0]
        first0, first1 = _first_of_band(walk, band, BLOCK)
        first2 = starts.of_lanes + (walk.low[2] + block * BLOCK[2])
        first = first2 * 0 + first0, first2 * 0 + first1, first2
        COLUMNS: gl.constexpr = gl.SliceLayout(1, product_layout(W))
        allowed = allowed_keys(mask[0], first, MODES, BLOCK, COLUMNS)  # [W, N]
        s = gl.where(gl.expand_dims(allowed, 1), s, MASKED)
    return s


# --- what lies in memory ------------------------------------------------------------------------


@gluon.jit
def _offset(x, strides):
    """How far tokens are from the first one."""
    at = x[0].to(gl.int64) * strides[0] + x[1].to(gl.int64) * strides[1]
    return at + x[2].to(gl.int64) * strides[2]


@gluon.jit
def _source(
    first, strides, walk, MODES: gl.constexpr, W: gl.constexpr, HALO: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """The :class:`Source` of a tensor, given the address of its first token."""
    position = walk.low[2] + gl.arange(0, HALO, gl.SliceLayout(1, copy_layout(W, D, 4)))
    line = walk.low[0], walk.low[1], position
    x = present_tokens(line, walk.group, walk.dilation, walk.n, MODES)
    origin = present_tokens(walk.low, walk.group, walk.dilation, walk.n, MODES)
    return Source(first, strides, (x[2] - origin[2]) * strides[2].to(gl.int32))


@gluon.jit
def _copy_line(
    source, shift, x, reached, stage, D: gl.constexpr, BYTES: gl.constexpr, LAYOUT: gl.constexpr
):
    at = source.first + shift + _offset(x, source.strides) + gl.expand_dims(source.columns, 1)
    at += gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    load_async(stage, gl.multiple_of(at, [BYTES, BYTES]), mask=gl.expand_dims(reached, 1))


@gluon.jit
def _copy_band(
    bands, a_shift, b_shift, walk, band, stage, MODES: gl.constexpr, W: gl.constexpr,
    BLOCK: gl.constexpr, HALO: gl.constexpr, D: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Start to copy a band of both tensors, of each from so much farther on, to a stage. Columns
    that no row reaches are zeros, and so are masked keys and values."""
    LAYOUT: gl.constexpr = copy_layout(W, D, 4)
    LINES: gl.constexpr = BLOCK[0] * BLOCK[1]
    first0, first1 = _first_of_band(walk, band, BLOCK)
    columns = gl.arange(0, HALO, gl.SliceLayout(1, LAYOUT))
    reached = columns < walk.high[2] - walk.low[2]
    for line in gl.static_range(LINES):
        position = first0 + line // BLOCK[1], first1 + line % BLOCK[1], walk.low[2]
        x = present_tokens(position, walk.group, walk.dilation, walk.n, MODES)
        at, own = 2 * LINES * stage + line, reached
        if len(bands.mask) > 0:
            last = walk.low[2] + columns
            y = last * 0 + position[0], last * 0 + position[1], last
            own = own & allowed_at(bands.mask[0], y, MODES)
        _copy_line(bands.a, a_shift, x, own, bands.stages.index(at), D, BYTES, LAYOUT)
        _copy_line(bands.b, b_shift, x, own, bands.stages.index(at + LINES), D, BYTES, LAYOUT)
    async_copy.commit_group()


@gluon.jit
def _first_band(
    a, b, mask, walk, MODES: gl.constexpr, W: gl.constexpr, BLOCK: gl.constexpr,
    HALO: gl.constexpr, D: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """The :class:`Bands` of two sources, of which the first band is on its way."""
    PHASES: gl.constexpr = phases(4 * D)
    stages = gl.allocate_shared_memory(
        a.first.dtype.element_ty, [4 * BLOCK[0] * BLOCK[1], HALO, D],
        gl.SwizzledSharedLayout(4, PHASES[0], PHASES[1], [1, 0]),
    )  # fmt: skip
    bands = Bands(a, b, stages, mask)
    _copy_band(bands, 0, 0, walk, 0, 0, MODES, W, BLOCK, HALO, D, BYTES)
    return bands


@gluon.jit
def _rows_of(tensor, x, strides, D: gl.constexpr, BYTES: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows ``[W, 16, D]`` of tokens ``x``; ``tensor``: address of the first."""
    at = tensor + gl.expand_dims(_offset(x, strides), 2)
    at += gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    return gl.load(gl.multiple_of(at, [BYTES, BYTES, BYTES]))


@gluon.jit
def _store(
    tensor, x, first_row, walk, shape, heads, head, MODES: gl.constexpr, W: gl.constexpr,
    TILE: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Store rows ``x [W, 16, D]`` in a contiguous tensor."""
    OUT: gl.constexpr = row_layout(W, D, 2)
    i = _rows(walk, W, TILE, gl.SliceLayout(2, OUT))
    token = key_tokens(i, walk.group, walk.dilation, walk.n, MODES)
    at = tensor + gl.expand_dims(row_number(first_row, token, shape, heads, head) * D, 2)
    at += gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, OUT)))[None, None, :]
    at = gl.multiple_of(at, [2 * ROWS, 2 * ROWS, 2 * ROWS])
    gl.store(at, gl.convert_layout(x, OUT), mask=gl.expand_dims(before(i, walk.n), 2))


# --- products -----------------------------------------------------------------------------------


@gluon.jit
def _left(x):
    """A left operand."""
    return gl.convert_layout(x, gl.DotOperandLayout(0, product_layout(x.shape[0]), 1))


@gluon.jit
def _right(x):
    return gl.convert_layout(x, gl.DotOperandLayout(1, product_layout(x.shape[0]), 1))


@gluon.jit
def _product(
    rows,
    tensor,
    first,
    starts,
    block,
    init,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    HALO: gl.constexpr,
):
    """``init`` and products ``[W, 16, N]`` of rows and of each warp's block of a band, which lies
    from byte ``first`` on."""
    BAND: gl.constexpr = (BLOCK[0], BLOCK[1], HALO)
    W: gl.constexpr = init.shape[0]
    none = starts.of_keys * 0
    at = none, none, starts.of_keys + block * BLOCK[2]
    columns = load_keys(tensor, at, first, W, D, BLOCK, BAND)
    return mma_v2(rows, _right(columns), init, "tf32")


@gluon.jit
def _add(weights, tensor, first, starts, block, acc, BLOCK: gl.constexpr, HALO: gl.constexpr):
    """``acc [W, 16, D]`` and a block's columns, weighted ``[W, 16, N]``."""
    BAND: gl.constexpr = (BLOCK[0], BLOCK[1], HALO)
    W: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[2]
    none = starts.of_values * 0
    at = none, none, starts.of_values + block * BLOCK[2]
    columns = load_values(tensor, at, first, W, D, BLOCK, BAND)
    columns = keys_of_products(columns, 1)
    return mma_v2(_left(keys_of_products(weights, 2)), _right(columns), acc, "tf32")


# --- the kernels --------------------------------------------------------------------------------
# Numbers are ``forward_kernel``'s. A program has ``W`` tiles of ``TILE`` rows. A band has
# ``BLOCK[0]`` x ``BLOCK[1]`` lines of ``HALO`` columns, of which each warp visits blocks. The grid
# has tiles, dilation groups, and heads of all batch entries.


@kernel(gluon.jit, tensors="query key value out lse", masks="key_mask")
def bands_forward_kernel(
    query, key, value, out, lse, key_mask,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    m_b, m_0, m_1, m_2, L0, L1, L2, T0, T1, T2, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    heads, per_kv, scale,
    MODES: gl.constexpr, DILATED: gl.constexpr, W: gl.constexpr, TILE: gl.constexpr,
    BLOCK: gl.constexpr, HALO: gl.constexpr, ALIGN: gl.constexpr, D: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
):  # fmt: skip
    """Output and LSE."""
    PRODUCT: gl.constexpr = product_layout(W)
    M_ROWS: gl.constexpr = gl.SliceLayout(2, PRODUCT)  # [W, 16]
    QUERY: gl.constexpr = row_layout(W, D, 1)
    BYTES: gl.constexpr = min(16, 4 * ALIGN)  # that addresses are known to be multiples of
    # Bytes from a band's keys to its values.
    OF_VALUES: gl.constexpr = BLOCK[0] * BLOCK[1] * HALO * D * 4

    shape = (L0, L1, L2)
    walk = _walk(
        (T0, T1, T2), shape, (K0, K1, K2), (S0, S1, S2), (D0, D1, D2), MODES, False, DILATED, W,
        TILE, BLOCK,
    )  # fmt: skip
    if outside(walk.begin, walk.n):
        return
    batch = (gl.program_id(2) // heads).to(gl.int64)
    head = (gl.program_id(2) % heads).to(gl.int64)
    kv_head = head // per_kv
    mask = _key_mask(key_mask, batch * m_b, (m_0, m_1, m_2), walk, HAS_KEY_MASK)
    k_first, v_first = key + batch * k_b + kv_head * k_h, value + batch * v_b + kv_head * v_h
    keys = _source(k_first, (k_0, k_1, k_2), walk, MODES, W, HALO, D)
    values = _source(v_first, (v_0, v_1, v_2), walk, MODES, W, HALO, D)
    bands = _first_band(keys, values, mask, walk, MODES, W, BLOCK, HALO, D, BYTES)

    i = minimum(_rows(walk, W, TILE, gl.SliceLayout(2, QUERY)), walk.last)
    token = key_tokens(i, walk.group, walk.dilation, walk.n, MODES)
    q_first = query + batch * q_b + head * q_h
    q = _left(_rows_of(q_first, token, (q_0, q_1, q_2), D, BYTES, QUERY))
    i = minimum(_rows(walk, W, TILE, M_ROWS), walk.last)
    lows, highs = _reach(i, walk.n, walk.kernel_size, walk.stride, MODES, False)
    starts = _starts(walk, MODES, False, W, TILE, BLOCK, HALO, D)

    scale_log2 = scale * LOG2E  # scores times it are exponents of two
    acc = gl.zeros([W, ROWS, D], gl.float32, PRODUCT)
    row_max = gl.full([W, ROWS], float("-inf"), gl.float32, M_ROWS)
    row_sum = gl.zeros([W, ROWS], gl.float32, M_ROWS)
    for band in range(0, walk.bands):
        async_copy.wait_group(0)
        barrier()
        stage = band % 2
        if band + 1 < walk.bands:
            _copy_band(bands, 0, 0, walk, band + 1, 1 - stage, MODES, W, BLOCK, HALO, D, BYTES)
        first = stage * (2 * OF_VALUES)
        for block in range(0, walk.blocks):
            y = _positions(walk, band, starts, block, W, BLOCK)
            s = window_mask(y, lows, highs, MODES, BLOCK)
            s = _masked(s, mask, walk, band, starts, block, MODES, BLOCK)
            s = _product(q, key, first, starts, block, s, D, BLOCK, HALO)  # [W, 16, N]
            new_max = gl.maximum(row_max, gl.max(s, 2) * scale_log2)  # [W, 16]
            p = gl.exp2(s * scale_log2 - gl.expand_dims(new_max, 2))  # [W, 16, N]
            rescale = gl.exp2(row_max - new_max)
            row_sum = row_sum * rescale + gl.sum(p, 2)
            row_max = new_max
            acc = acc * gl.expand_dims(rescale, 2)
            acc = _add(p, value, first + OF_VALUES, starts, block, acc, BLOCK, HALO)

    first_row = batch * L0 * L1 * L2
    token = key_tokens(i, walk.group, walk.dilation, walk.n, MODES)
    real = before(_rows(walk, W, TILE, M_ROWS), walk.n)
    row_lse, inverse = (row_max + gl.log2(row_sum)) * LN2, 1.0 / row_sum
    if HAS_KEY_MASK:  # which may leave nothing to attend
        attends = row_max > 0.5 * MASKED * scale_log2
        row_lse = gl.where(attends, row_lse, float("-inf"))
        inverse = gl.where(attends, inverse, 0.0)
    gl.store(lse + row_number(first_row, token, shape, heads, head), row_lse, mask=real)
    o = acc * gl.expand_dims(inverse, 2)
    _store(out, o, first_row, walk, shape, heads, head, MODES, W, TILE, D)


@kernel(
    gluon.jit, tensors="query key value out lse grad_out lse_delta grad_query", masks="key_mask"
)
def bands_dq_kernel(
    query, key, value, out, lse, grad_out, lse_delta, grad_query, key_mask,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    m_b, m_0, m_1, m_2, L0, L1, L2, T0, T1, T2, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    heads, per_kv, scale,
    MODES: gl.constexpr, DILATED: gl.constexpr, W: gl.constexpr, TILE: gl.constexpr,
    BLOCK: gl.constexpr, HALO: gl.constexpr, ALIGN: gl.constexpr, D: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
):  # fmt: skip
    """dQ, and of ``lse_delta [rows, 4]`` the two numbers that dK and dV need."""
    PRODUCT: gl.constexpr = product_layout(W)
    M_ROWS: gl.constexpr = gl.SliceLayout(2, PRODUCT)  # [W, 16]
    N: gl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    QUERY: gl.constexpr = row_layout(W, D, 1)
    BYTES: gl.constexpr = min(16, 4 * ALIGN)  # that addresses are known to be multiples of
    # Bytes from a band's keys to its values.
    OF_VALUES: gl.constexpr = BLOCK[0] * BLOCK[1] * HALO * D * 4

    shape = (L0, L1, L2)
    walk = _walk(
        (T0, T1, T2), shape, (K0, K1, K2), (S0, S1, S2), (D0, D1, D2), MODES, False, DILATED, W,
        TILE, BLOCK,
    )  # fmt: skip
    if outside(walk.begin, walk.n):
        return
    batch = (gl.program_id(2) // heads).to(gl.int64)
    head = (gl.program_id(2) % heads).to(gl.int64)
    kv_head = head // per_kv
    mask = _key_mask(key_mask, batch * m_b, (m_0, m_1, m_2), walk, HAS_KEY_MASK)
    k_first, v_first = key + batch * k_b + kv_head * k_h, value + batch * v_b + kv_head * v_h
    keys = _source(k_first, (k_0, k_1, k_2), walk, MODES, W, HALO, D)
    values = _source(v_first, (v_0, v_1, v_2), walk, MODES, W, HALO, D)
    bands = _first_band(keys, values, mask, walk, MODES, W, BLOCK, HALO, D, BYTES)

    i = minimum(_rows(walk, W, TILE, gl.SliceLayout(2, QUERY)), walk.last)
    token = key_tokens(i, walk.group, walk.dilation, walk.n, MODES)
    q_first = query + batch * q_b + head * q_h
    q = _rows_of(q_first, token, (q_0, q_1, q_2), D, BYTES, QUERY)
    first_row = batch * L0 * L1 * L2
    row_start, row_strides = (first_row * heads + head) * D, token_strides(shape, heads * D)
    g = _rows_of(grad_out + row_start, token, row_strides, D, BYTES, QUERY)
    o = _rows_of(out + row_start, token, row_strides, D, BYTES, QUERY)
    delta = gl.convert_layout(gl.sum(o * g, 2), M_ROWS)  # [W, 16]
    q, g = _left(q), _left(g)
    i = minimum(_rows(walk, W, TILE, M_ROWS), walk.last)
    token = key_tokens(i, walk.group, walk.dilation, walk.n, MODES)
    at = row_number(first_row, token, shape, heads, head)
    real = before(_rows(walk, W, TILE, M_ROWS), walk.n)
    exponent = gl.load(lse + at) * LOG2E
    if HAS_KEY_MASK:  # weights of who attends nothing are zero
        exponent = gl.where(exponent == float("-inf"), float("inf"), exponent)
    gl.store(lse_delta + at * 4, exponent, mask=real)
    gl.store(lse_delta + at * 4 + 1, delta, mask=real)
    lows, highs = _reach(i, walk.n, walk.kernel_size, walk.stride, MODES, False)
    starts = _starts(walk, MODES, False, W, TILE, BLOCK, HALO, D)

    scale_log2 = scale * LOG2E
    dq = gl.zeros([W, ROWS, D], gl.float32, PRODUCT)
    for band in range(0, walk.bands):
        async_copy.wait_group(0)
        barrier()
        stage = band % 2
        if band + 1 < walk.bands:
            _copy_band(bands, 0, 0, walk, band + 1, 1 - stage, MODES, W, BLOCK, HALO, D, BYTES)
        first = stage * (2 * OF_VALUES)
        for block in range(0, walk.blocks):
            y = _positions(walk, band, starts, block, W, BLOCK)
            s = window_mask(y, lows, highs, MODES, BLOCK)
            s = _masked(s, mask, walk, band, starts, block, MODES, BLOCK)
            s = _product(q, key, first, starts, block, s, D, BLOCK, HALO)  # [W, 16, N]
            dp = gl.zeros([W, ROWS, N], gl.float32, PRODUCT) - gl.expand_dims(delta, 2)
            dp = _product(g, value, first + OF_VALUES, starts, block, dp, D, BLOCK, HALO)
            ds = gl.exp2(s * scale_log2 - gl.expand_dims(exponent, 2)) * dp  # P * (dP - delta)
            dq = _add(ds, key, first, starts, block, dq, BLOCK, HALO)
    _store(grad_query, dq * scale, first_row, walk, shape, heads, head, MODES, W, TILE, D)


@kernel(
    gluon.jit, tensors="query key value grad_out lse_delta grad_key grad_value", masks="key_mask"
)
def bands_dkdv_kernel(
    query, key, value, grad_out, lse_delta, grad_key, grad_value, key_mask,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    m_b, m_0, m_1, m_2, L0, L1, L2, T0, T1, T2, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    heads, per_kv, scale,
    MODES: gl.constexpr, DILATED: gl.constexpr, W: gl.constexpr, TILE: gl.constexpr,
    BLOCK: gl.constexpr, HALO: gl.constexpr, ALIGN: gl.constexpr, D: gl.constexpr,
    HAS_KEY_MASK: gl.constexpr,
):  # fmt: skip
    """dK and dV: rows are keys. The bands of a key head's query heads follow one another."""
    PRODUCT: gl.constexpr = product_layout(W)
    M_ROWS: gl.constexpr = gl.SliceLayout(2, PRODUCT)  # [W, 16]
    N: gl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    KEY: gl.constexpr = row_layout(W, D, 1)
    BYTES: gl.constexpr = min(16, 4 * ALIGN)  # that addresses are known to be multiples of
    # Bytes from a band's queries to their dO.
    OF_GRADS: gl.constexpr = BLOCK[0] * BLOCK[1] * HALO * D * 4

    shape = (L0, L1, L2)
    walk = _walk(
        (T0, T1, T2), shape, (K0, K1, K2), (S0, S1, S2), (D0, D1, D2), MODES, True, DILATED, W,
        TILE, BLOCK,
    )  # fmt: skip
    if outside(walk.begin, walk.n):
        return
    kv_heads = heads // per_kv
    batch = (gl.program_id(2) // kv_heads).to(gl.int64)
    kv_head = (gl.program_id(2) % kv_heads).to(gl.int64)
    mask = _key_mask(key_mask, batch * m_b, (m_0, m_1, m_2), walk, HAS_KEY_MASK)
    first_row, first_head = batch * L0 * L1 * L2, kv_head * per_kv
    q_first, row_start = query + batch * q_b + first_head * q_h, first_row * heads + first_head
    queries = _source(q_first, (q_0, q_1, q_2), walk, MODES, W, HALO, D)
    row_strides = token_strides(shape, heads * D)
    grads = _source(grad_out + row_start * D, row_strides, walk, MODES, W, HALO, D)
    bands = _first_band(queries, grads, (), walk, MODES, W, BLOCK, HALO, D, BYTES)

    i = minimum(_rows(walk, W, TILE, gl.SliceLayout(2, KEY)), walk.last)
    token = key_tokens(i, walk.group, walk.dilation, walk.n, MODES)
    k_first, v_first = key + batch * k_b + kv_head * k_h, value + batch * v_b + kv_head * v_h
    k = _left(_rows_of(k_first, token, (k_0, k_1, k_2), D, BYTES, KEY))
    v = _left(_rows_of(v_first, token, (v_0, v_1, v_2), D, BYTES, KEY))
    i = minimum(_rows(walk, W, TILE, M_ROWS), walk.last)
    lows, highs = _reach(i, walk.n, walk.kernel_size, walk.stride, MODES, True)
    starts = _starts(walk, MODES, True, W, TILE, BLOCK, HALO, D)

    scale_log2 = scale * LOG2E
    dk = gl.zeros([W, ROWS, D], gl.float32, PRODUCT)
    dv = gl.zeros([W, ROWS, D], gl.float32, PRODUCT)
    every = walk.bands * per_kv
    for number in range(0, every):
        async_copy.wait_group(0)
        barrier()
        stage = number % 2
        if number + 1 < every:
            after = (number + 1) // walk.bands
            _copy_band(
                bands, q_h.to(gl.int64) * after, after * D, walk, number + 1 - after * walk.bands,
                1 - stage, MODES, W, BLOCK, HALO, D, BYTES,
            )  # fmt: skip
        first = stage * (2 * OF_GRADS)
        shared = number // walk.bands  # query head of the key's
        for block in range(0, walk.blocks):
            y = _positions(walk, number - shared * walk.bands, starts, block, W, BLOCK)
            each = present_tokens(y, walk.group, walk.dilation, walk.n, MODES)
            row = ((each[0] * L1 + each[1]) * L2 + each[2]) * heads + shared  # [W, N]
            at = lse_delta + row_start * 4 + row * 4
            exponent, delta = gl.expand_dims(gl.load(at), 1), gl.expand_dims(gl.load(at + 1), 1)
            s = window_mask(y, lows, highs, MODES, BLOCK)
            s = _product(k, query, first, starts, block, s, D, BLOCK, HALO)  # S^T, [W, 16, N]
            p = gl.exp2(s * scale_log2 - exponent)
            dp = gl.zeros([W, ROWS, N], gl.float32, PRODUCT) - delta
            dp = _product(v, grad_out, first + OF_GRADS, starts, block, dp, D, BLOCK, HALO)
            dv = _add(p, grad_out, first + OF_GRADS, starts, block, dv, BLOCK, HALO)
            dk = _add(p * dp, query, first, starts, block, dk, BLOCK, HALO)
    if HAS_KEY_MASK:  # those of masked keys and values are zero, whatever these are
        allowed = gl.expand_dims(allowed_at(mask[0], i, MODES), 2)  # [W, 16, 1]
        dk, dv = gl.where(allowed, dk, 0.0), gl.where(allowed, dv, 0.0)
    _store(grad_key, dk * scale, first_row, walk, shape, kv_heads, kv_head, MODES, W, TILE, D)
    _store(grad_value, dv, first_row, walk, shape, kv_heads, kv_head, MODES, W, TILE, D)


KERNELS = {
    "forward": bands_forward_kernel,
    "dq": bands_dq_kernel,
    "dkdv": bands_dkdv_kernel,
}
