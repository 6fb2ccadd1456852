"""What a program works on: a tile, and the blocks of keys, or of queries, that its rows reach.

Blocks start where the first row's reach starts, not on a fixed grid. A block that lies in what all
rows of the tile reach is full and needs no mask; the others are partial.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    before,
    bias_index,
    bit,
    coordinates,
    key_tokens,
    load_mask,
    load_rows,
    load_some,
    load_tile,
    minimum,
    minus,
    outside,
    packed,
    plus,
    row_number,
    scores,
    split,
    times,
    token_offset,
    token_strides,
)
from .windows import CIRCULAR, UNIT, key_positions, reach, span, wrapped


class View(NamedTuple):
    """Where the tokens of a program's layout and head lie in a tensor."""

    start: Any  # offset of the first; of queries that are a part, of the whole layout's first
    strides: Any  # per axis


class Program(NamedTuple):
    """What a program works on: a tile of one dilation group of one head. The layout is that of the
    problem, or of a document."""

    tile: Any  # its index, per axis
    group: Any  # per axis
    batch: Any
    head: Any  # of the query, or of the key where tiles are of keys
    kv_head: Any  # of the key
    shape: Any  # queries of the layout, per axis
    key_shape: Any  # keys of the layout, per axis
    kernel_size: Any  # per axis
    stride: Any  # per axis
    dilation: Any  # per axis
    span: Any  # the Span of the dilation group
    first: Any  # the layout's first query, as a contiguous tensor counts tokens
    key_first: Any  # its first key, likewise
    query: View  # of the head; of head 0 where tiles are of keys
    key: View
    value: View
    mask: View  # of keys; compiles away where there is none


class Rows(NamedTuple):
    """The rows of a tile, and what they reach: queries reach keys, and keys queries."""

    # [R] per axis, in the dilation group: numbers of queries, positions of keys; the last one for
    # rows beyond its end
    position: Any
    real: Any  # [R], which rows are not beyond the end
    starts: Any  # [R] per axis, what each row reaches
    ends: Any  # [R] per axis
    low: Any  # per axis, what any row reaches
    high: Any  # per axis
    all_low: Any  # per axis, what all rows reach
    all_high: Any  # per axis


class Blocks(NamedTuple):
    """The blocks that a tile visits."""

    counts: Any  # how many, per axis
    first_full: Any  # index of the first full one, per axis
    full: Any  # how many are full, per axis
    num_partial: Any  # how many are not full on all axes
    num_full: Any


@triton.jit
def tile_of_program(tiles, dilation, heads):
    """Which tile, dilation group, head and batch entry a program has."""
    rest, tile = split(tl.program_id(0), tiles)
    rest, group = split(rest, dilation)
    return tile, group, (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)


@triton.jit
def _size(row, COLUMN: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.int32)


@triton.jit
def _document(documents, document):
    """A row of the table of :class:`natten.documents.Documents`: first query and key, the layouts
    of both, window, stride, dilation."""
    row = documents + document * 16
    n0, n1 = _size(row, 2), _size(row, 3)
    return (
        tl.load(row), tl.load(row + 1), (n0, n1, _size(row, 4)), (n0, n1, _size(row, 5)),
        (_size(row, 6), _size(row, 7), _size(row, 8)),
        (_size(row, 9), _size(row, 10), _size(row, 11)),
        (_size(row, 12), _size(row, 13), _size(row, 14)),
    )  # fmt: skip


@triton.jit
def _view(strides, batch, first, shape, head, PACKED: tl.constexpr):
    """``strides`` are of batch, three axes, heads; packed tokens follow one another."""
    if PACKED:
        start, per_axis = first * strides[3], token_strides(shape, strides[3])
    else:
        start, per_axis = batch * strides[0], (strides[1], strides[2], strides[3])
    return View(start + head * strides[4], per_axis)


@triton.jit
def locate(
    documents, tiles, heads, per_kv, shape, key_lengths, offset, kernel_size, stride, dilation,
    query_strides, key_strides, value_strides, mask_strides, PER_KEY: tl.constexpr,
    PACKED: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """This :class:`Program`. ``heads`` are of the query, or of the key where tiles are ``OF_KEYS``.
    ``PACKED``: a batch entry is a document of its own sizes. ``offset``: how many queries come
    before the first one, where queries are a layout of their own (``PER_KEY``)."""
    tile, group, head, batch = tile_of_program(tiles, dilation, heads)
    if OF_KEYS:
        kv_head, q_head = head, 0
    else:
        kv_head, q_head = head // per_kv, head
    if PACKED:
        first, key_first, shape, key_shape, kernel_size, stride, dilation = _document(
            documents, batch
        )
    else:
        key_shape = shape[0], shape[1], key_lengths[2]
        if PER_KEY[2] > 0:
            key_shape = key_lengths
        first = batch * shape[0] * shape[1] * shape[2]
        key_first = batch * key_shape[0] * key_shape[1] * key_shape[2]
    query = _view(query_strides, batch, first, shape, q_head, PACKED)
    key = _view(key_strides, batch, key_first, key_shape, kv_head, PACKED)
    value = _view(value_strides, batch, key_first, key_shape, kv_head, PACKED)
    mask = View(batch * mask_strides[0], (mask_strides[1], mask_strides[2], mask_strides[3]))
    if PER_KEY[2] > 0:
        first -= row_number(0, offset, shape, 1, 0)
        query = View(query.start - token_offset(0, offset, query.strides, 1), query.strides)
    own = span(shape, key_shape, offset, dilation, group, PER_KEY)
    return Program(
        tile, group, batch, head, kv_head, shape, key_shape, kernel_size, stride, dilation,
        own, first, key_first, query, key, value, mask,
    )  # fmt: skip


@triton.jit
def is_empty(p, begin, n, PACKED: tl.constexpr):
    """Whether a program's tile has no rows: it begins beyond the end of an axis, or a document has
    fewer dilation groups than others."""
    empty = outside(begin, n)
    if PACKED:
        empty |= outside(p.group, p.dilation)
    return empty


@triton.jit
def _clipped(low, high, all_low, all_high, first, n, n_all):
    """What queries a tile of keys reaches along a circular axis: from the first to the last one
    that is there, ``first .. n`` of ``n_all``; blocks are full only where all are there."""
    at = wrapped(low, n_all)
    low += tl.where(at < first, first - at, tl.where(at < n, 0, n_all - at + first))
    at = wrapped(high - 1, n_all)
    high -= tl.where(at >= n, at - n + 1, tl.where(at >= first, 0, at + n_all - n + 1))
    all_high = tl.where(n - first == n_all, all_high, low)
    return low, high, tl.maximum(all_low, low), all_high


@triton.jit
def _tile_reach(
    low, high, all_low, all_high, first, n, n_keys, MODE: tl.constexpr, R: tl.constexpr,
    OF_KEYS: tl.constexpr,
):  # fmt: skip
    if OF_KEYS and (MODE >= CIRCULAR) & (R > 0):
        low, high, all_low, all_high = _clipped(low, high, all_low, all_high, first, n, n_keys * R)
    return low, high, all_low, all_high


@triton.jit
def rows_of_tile(
    begin, group, kernel_size, stride, MODES: tl.constexpr, PER_KEY: tl.constexpr,
    SHAPE: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """The :class:`Rows` of a tile, which begins at ``begin``; it may be cut short. ``group`` is its
    :class:`Span`."""
    R: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    length = group.n_keys if OF_KEYS else group.n
    last = minus(minimum(plus(begin, SHAPE), length), (1, 1, 1))
    low, all_high = reach(begin, group, kernel_size, stride, MODES, PER_KEY, OF_KEYS)
    all_low, high = reach(last, group, kernel_size, stride, MODES, PER_KEY, OF_KEYS)
    i = plus(begin, coordinates(tl.arange(0, R), SHAPE))
    position, real = minimum(i, last), before(i, length)
    starts, ends = reach(position, group, kernel_size, stride, MODES, PER_KEY, OF_KEYS)
    low0, high0, all_low0, all_high0 = _tile_reach(
        low[0], high[0], all_low[0], all_high[0], group.first[0], group.n[0], group.n_keys[0],
        MODES[0], PER_KEY[0], OF_KEYS,
    )  # fmt: skip
    low1, high1, all_low1, all_high1 = _tile_reach(
        low[1], high[1], all_low[1], all_high[1], group.first[1], group.n[1], group.n_keys[1],
        MODES[1], PER_KEY[1], OF_KEYS,
    )  # fmt: skip
    low2, high2, all_low2, all_high2 = _tile_reach(
        low[2], high[2], all_low[2], all_high[2], group.first[2], group.n[2], group.n_keys[2],
        MODES[2], PER_KEY[2], OF_KEYS,
    )  # fmt: skip
    return Rows(
        position, real, starts, ends, (low0, low1, low2), (high0, high1, high2),
        (all_low0, all_low1, all_low2), (all_high0, all_high1, all_high2),
    )  # fmt: skip


@triton.jit
def _count(low, high, all_low, all_high, T: tl.constexpr):
    count = tl.maximum(tl.cdiv(high - low, T), 0)
    first = tl.cdiv(all_low - low, T)
    return count, first, tl.maximum((all_high - low) // T - first, 0)


@triton.jit
def count_blocks(rows, SHAPE: tl.constexpr):
    """The :class:`Blocks` of a shape that the rows reach."""
    low, high, all_low, all_high = rows.low, rows.high, rows.all_low, rows.all_high
    count0, first0, full0 = _count(low[0], high[0], all_low[0], all_high[0], SHAPE[0])
    count1, first1, full1 = _count(low[1], high[1], all_low[1], all_high[1], SHAPE[1])
    count2, first2, full2 = _count(low[2], high[2], all_low[2], all_high[2], SHAPE[2])
    every, num_full = count0 * count1 * count2, full0 * full1 * full2
    return Blocks(
        (count0, count1, count2), (first0, first1, first2), (full0, full1, full2),
        every - num_full, num_full,
    )  # fmt: skip


@triton.jit
def _beside(i, first, full):
    """Index of an axis's ``i``-th block that is not full."""
    return tl.where(i < first, i, i + full)


@triton.jit
def partial_block(i, blocks, AHEAD: tl.constexpr = False):
    """Index per axis of the ``i``-th partial block: first come those that are not full on axis 0,
    then of the others those that are not on axis 1, then those that are not on axis 2. ``AHEAD``:
    there may be no such block, which must not divide by zero."""
    count, first, full = blocks.counts, blocks.first_full, blocks.full
    on0 = (count[0] - full[0]) * count[1] * count[2]
    on1 = full[0] * (count[1] - full[1]) * count[2]
    is0, is2 = i < on0, i >= on0 + on1
    i -= tl.where(is0, 0, tl.where(is2, on0 + on1, on0))
    n1 = tl.where(is0, count[1], tl.where(is2, full[1], count[1] - full[1]))
    n2 = tl.where(is2, count[2] - full[2], count[2])
    if AHEAD:
        n1, n2 = tl.maximum(n1, 1), tl.maximum(n2, 1)
    j0, j1, j2 = i // (n1 * n2), i // n2 % n1, i % n2
    j0 = tl.where(is0, _beside(j0, first[0], full[0]), j0 + first[0])
    j1 = tl.where(is0, j1, tl.where(is2, j1 + first[1], _beside(j1, first[1], full[1])))
    return j0, j1, tl.where(is2, _beside(j2, first[2], full[2]), j2)


@triton.jit
def next_full_block(j, full):
    """The block after ``j`` of those that are full on all axes, and whether axes 1 and 2 ended."""
    end2 = j[2] + 1 == full[2]
    j2 = tl.where(end2, 0, j[2] + 1)
    j1 = tl.where(end2, j[1] + 1, j[1])
    end1 = j1 == full[1]
    return (tl.where(end1, j[0] + 1, j[0]), tl.where(end1, 0, j1), j2), (end1, end2)


@triton.jit
def nth_full_block(i, full):
    """The ``i``-th of the blocks that are full on all axes, for :func:`next_full_block`."""
    return coordinates(i, (1, tl.maximum(full[1], 1), tl.maximum(full[2], 1)))


@triton.jit
def full_block_steps(full, dilation, strides, SHAPE: tl.constexpr):
    """By how much an offset grows from a full block to the next: usually, where axis 2 ended, and
    where axis 1 ended, too.

    Adding one number to all addresses of a block takes fewer registers and instructions than
    working them out, which counts where two sums fill them.
    """
    on0 = dilation[0].to(tl.int64) * SHAPE[0] * strides[0]
    on1 = dilation[1].to(tl.int64) * SHAPE[1] * strides[1]
    on2 = dilation[2].to(tl.int64) * SHAPE[2] * strides[2]
    back2 = (full[2] - 1) * on2
    return on2, on1 - back2, on0 - (full[1] - 1) * on1 - back2


@triton.jit
def full_block_step(steps, ends, ALIGN: tl.constexpr):
    """Which of :func:`full_block_steps` comes where axes ended; a multiple of ``ALIGN``."""
    step = tl.where(ends[0], steps[2], tl.where(ends[1], steps[1], steps[0]))
    return tl.multiple_of(step, ALIGN)


@triton.jit
def within_block(c, dilation, strides, ALIGN: tl.constexpr):
    """Offsets from a block's first token of its tokens, at positions ``c`` inside.

    They are the same in every block, so that a loop works out that of the first token only.
    """
    return token_offset(0, times(c, dilation), strides, ALIGN)


@triton.jit
def keys_of_block(p, view, a, c, within, MODES: tl.constexpr, ALIGN: tl.constexpr):
    """Offset of a block of keys that begins at position ``a``, and offsets from there of its keys,
    at positions ``c`` inside. These are ``within``, the same in every block, but on circular axes,
    where a block may go on at the other end."""
    if (MODES[0] >= CIRCULAR) | (MODES[1] >= CIRCULAR) | (MODES[2] >= CIRCULAR):
        y = key_tokens(plus(a, c), p.group, p.dilation, p.span.n_keys, MODES)  # [N] per axis
        start, within = 0, token_offset(view.start, y, view.strides, ALIGN)  # [N]
    else:
        y = key_tokens(a, p.group, p.dilation, p.span.n_keys, MODES)
        start = token_offset(view.start, y, view.strides, ALIGN)
    return start, within


@triton.jit
def _keys_of_word(FIRST: tl.constexpr, KV_BLOCK: tl.constexpr):
    """Positions inside a block of 32 of its keys, from the ``FIRST`` one on, ``[32]`` per axis. Of
    a smaller block, keys come again."""
    N: tl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    return coordinates((FIRST + tl.arange(0, 32)) % N, KV_BLOCK)


@triton.jit
def mask_rows(key_mask, p, a, MODES: tl.constexpr, KV_BLOCK: tl.constexpr):
    """Addresses of what a mask holds of a block of keys that begins at ``a``: of its first 32 keys
    and of the others, ``[32]`` each."""
    c, d = _keys_of_word(0, KV_BLOCK), _keys_of_word(32, KV_BLOCK)
    c_within = within_block(c, p.dilation, p.mask.strides, 1)
    d_within = within_block(d, p.dilation, p.mask.strides, 1)
    c_start, c_at = keys_of_block(p, p.mask, a, c, c_within, MODES, 1)
    d_start, d_at = keys_of_block(p, p.mask, a, d, d_within, MODES, 1)
    return key_mask + c_start + c_at, key_mask + d_start + d_at


@triton.jit
def present_rows(a, high, is_there, KV_BLOCK: tl.constexpr):
    """Which of :func:`mask_rows` are of keys before ``high``, none if no block is there."""
    c, d = _keys_of_word(0, KV_BLOCK), _keys_of_word(32, KV_BLOCK)
    return before(plus(a, c), high) & is_there, before(plus(a, d), high) & is_there


@triton.jit
def load_mask_rows(at, present, N: tl.constexpr):
    """What a mask holds of a block of ``N`` keys, for :func:`allowed_keys`."""
    first = tl.load(at[0], mask=present[0], other=0)
    second = first
    if N > 32:
        second = tl.load(at[1], mask=present[1], other=0)
    return first, second


@triton.jit
def allowed_keys(mask, N: tl.constexpr):
    """Which of at most 64 keys may be attended, ``[N]``; ``mask``: of :func:`load_mask_rows`."""
    tl.static_assert(N <= 64)
    i, lane = tl.arange(0, N), tl.arange(0, 32)
    word = tl.where(i < 32, packed(mask[0], lane, 0), packed(mask[1], lane, 0))
    return bit(word, i & 31)


@triton.jit
def _mask_bias(a, start, end, T: tl.constexpr, MODE: tl.constexpr):
    """``[R, T]``: zero where position ``a + column`` lies in ``start .. end``, else -inf."""
    p = a + tl.arange(0, T)[None, :]
    if MODE == UNIT:
        # Along an axis of one token a block may be longer than that.
        within = (p == 0) & (start[:, None] == 0)
    else:
        within = (p >= start[:, None]) & (p < end[:, None])
    return tl.where(within, 0.0, float("-inf"))


@triton.jit
def mask_bias(a, starts, ends, SHAPE: tl.constexpr, MODES: tl.constexpr):
    """``[R, C]``, to be added to the scores of a block that begins at ``a``: -inf where a row does
    not reach a column.

    Each axis is compared by itself, so that a score costs little.
    """
    x0 = _mask_bias(a[0], starts[0], ends[0], SHAPE[0], MODES[0])
    x1 = _mask_bias(a[1], starts[1], ends[1], SHAPE[1], MODES[1])
    x2 = _mask_bias(a[2], starts[2], ends[2], SHAPE[2], MODES[2])
    x = x0[:, :, None, None] + x1[:, None, :, None] + x2[:, None, None, :]
    return x.reshape(x0.shape[0], SHAPE[0] * SHAPE[1] * SHAPE[2])


@triton.jit
def walk_keys(
    STEP: tl.constexpr, state, operands, q, key, value, rpb, key_mask, p, rows, scale,
    MODES: tl.constexpr, PER_KEY: tl.constexpr, KV_BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_RPB: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after all blocks of keys that the queries ``q [M, D]`` reach.

    ``STEP(state, operands, q, k, v, s, PRECISION)`` is the state after one more block, of keys
    ``k [N, D]`` and values ``v [N, DV]``, with scores ``s [M, N]``. Keys that ``key_mask`` takes
    away are zeros, as are their values: in memory both may hold NaN.
    """
    N: tl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    RING: tl.constexpr = (MODES[0] >= CIRCULAR) | (MODES[1] >= CIRCULAR) | (MODES[2] >= CIRCULAR)
    c = coordinates(tl.arange(0, N), KV_BLOCK)  # [N] per axis
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_within = within_block(c, p.dilation, p.key.strides, ALIGN)  # [N]
    v_within = within_block(c, p.dilation, p.value.strides, ALIGN)  # [N]
    position = key_positions(rows.position, p.span.n_keys, MODES, PER_KEY)  # [M] per axis
    row_index = bias_index(position, p.kernel_size)  # [M]; compiles away without a bias
    blocks = count_blocks(rows, KV_BLOCK)

    # Partial blocks come first, so that what masks need is not kept beside full ones.
    if HAS_KEY_MASK:
        scale = tl.where(scale == 0.0, 1e-30, scale)  # as good as zero, but hides keys
        # Bytes are loaded a whole step ahead; truth values, which Triton has to convert, at the
        # beginning of a step. Only full blocks are found in that time.
        mask_bytes = key_mask.to(tl.pointer_type(tl.int8), bitcast=True)
        after = plus(rows.low, times(partial_block(0, blocks, True), KV_BLOCK))
        m_rows = mask_rows(mask_bytes, p, after, MODES, KV_BLOCK)
        m_present = present_rows(after, rows.high, blocks.num_partial > 0, KV_BLOCK)
        mask = load_mask_rows(m_rows, m_present, N)
    for block in range(0, blocks.num_partial):
        if HAS_KEY_MASK:
            allowed = allowed_keys(mask, N)  # [N]
            a, number = after, partial_block(block + 1, blocks, True)
            after = plus(rows.low, times(number, KV_BLOCK))
            m_rows = mask_rows(mask_bytes, p, after, MODES, KV_BLOCK)
            m_present = present_rows(after, rows.high, block + 1 < blocks.num_partial, KV_BLOCK)
            mask = load_mask_rows(m_rows, m_present, N)
            present = allowed
        else:
            a = plus(rows.low, times(partial_block(block, blocks), KV_BLOCK))
            present = before(plus(a, c), rows.high)  # [N]
            allowed = None
        k_start, k_at = keys_of_block(p, p.key, a, c, k_within, MODES, ALIGN)
        v_start, v_at = keys_of_block(p, p.value, a, c, v_within, MODES, ALIGN)
        k = load_rows(key + k_start, k_at, present, d, D)  # [N, D]
        v = load_rows(value + v_start, v_at, present, dv, DV)  # [N, DV]
        at = bias_index(plus(a, c), p.kernel_size)[None, :] - row_index[:, None]  # [M, N]
        s = scores(q, k, scale, rpb, at, p.kernel_size, p.head, allowed, HAS_RPB, False, PRECISION)
        s += mask_bias(a, rows.starts, rows.ends, KV_BLOCK, MODES)  # [M, N]
        state = STEP(state, operands, q, k, v, s, PRECISION)

    low, full_block = plus(rows.low, times(blocks.first_full, KV_BLOCK)), (0, 0, 0)
    k_start, k_at = keys_of_block(p, p.key, low, c, k_within, MODES, ALIGN)
    v_start, v_at = keys_of_block(p, p.value, low, c, v_within, MODES, ALIGN)
    k_rows = key + (k_start + k_at)[:, None] + d[None, :]  # [N, D]
    v_rows = value + (v_start + v_at)[:, None] + dv[None, :]  # [N, DV]
    k_steps = full_block_steps(blocks.full, p.dilation, p.key.strides, KV_BLOCK)
    v_steps = full_block_steps(blocks.full, p.dilation, p.value.strides, KV_BLOCK)
    if HAS_KEY_MASK:
        m_rows = mask_rows(key_mask, p, low, MODES, KV_BLOCK)
        m_steps = full_block_steps(blocks.full, p.dilation, p.mask.strides, KV_BLOCK)
        mask = load_mask_rows(m_rows, (blocks.num_full > 0, blocks.num_full > 0), N)
    for block in range(0, blocks.num_full):
        a = plus(low, times(full_block, KV_BLOCK))
        if RING:
            k_start, k_at = keys_of_block(p, p.key, a, c, k_within, MODES, ALIGN)
            v_start, v_at = keys_of_block(p, p.value, a, c, v_within, MODES, ALIGN)
            k_rows = key + (k_start + k_at)[:, None] + d[None, :]
            v_rows = value + (v_start + v_at)[:, None] + dv[None, :]
        if HAS_KEY_MASK:
            allowed = allowed_keys(mask, N)  # [N]
            k, v = load_some(k_rows, allowed, d, D), load_some(v_rows, allowed, dv, DV)
        else:
            allowed = None
            k, v = load_tile(k_rows, d, D), load_tile(v_rows, dv, DV)  # [N, D], [N, DV]
        full_block, ended = next_full_block(full_block, blocks.full)
        if HAS_KEY_MASK:
            if RING:
                after = plus(low, times(full_block, KV_BLOCK))
                m_rows = mask_rows(key_mask, p, after, MODES, KV_BLOCK)
            else:
                m_step = full_block_step(m_steps, ended, 1)
                m_rows = m_rows[0] + m_step, m_rows[1] + m_step
            is_there = block + 1 < blocks.num_full
            mask = load_mask_rows(m_rows, (is_there, is_there), N)
        if not RING:
            k_rows += full_block_step(k_steps, ended, ALIGN)
            v_rows += full_block_step(v_steps, ended, ALIGN)
        at = bias_index(plus(a, c), p.kernel_size)[None, :] - row_index[:, None]  # [M, N]
        s = scores(q, k, scale, rpb, at, p.kernel_size, p.head, allowed, HAS_RPB, True, PRECISION)
        state = STEP(state, operands, q, k, v, s, PRECISION)
    return state


@triton.jit
def walk_additional(
    STEP: tl.constexpr, state, operands, q, keys, values, mask, p, kv_heads, mask_strides,
    num_additional, scale, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As :func:`walk_keys`, over the additional tokens, which every query attends: ``keys`` and
    ``values [batch, tokens, heads, channels]``; ``mask_strides``: of batch and tokens."""
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for begin in range(0, num_additional, N):
        c = begin + tl.arange(0, N)
        present = c < num_additional  # [N]
        at = (p.batch * num_additional + c) * kv_heads + p.kv_head  # [N]
        if HAS_MASK:
            m_at = c.to(tl.int64) * mask_strides[1]
            present = load_mask(mask + p.batch * mask_strides[0], m_at, present)
        k = load_rows(keys, at * D, present, d, D)  # [N, D]
        v = load_rows(values, at * DV, present, dv, DV)  # [N, DV]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)  # [M, N]
        s = tl.where(present[None, :], s, float("-inf"))
        state = STEP(state, operands, q, k, v, s, PRECISION)
    return state
