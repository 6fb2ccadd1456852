"""What all kernels share: the window rule inside a kernel, tile coordinates, addresses.

Kernels see three axes, and have tuples of what there is of each; an axis that a problem lacks has
one token and mode ``UNIT``, and compiles away. The rule is
:class:`natten.neighborhood.Neighborhood`'s, and is tested against it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How an axis's windows go, a compile-time constant per axis.
UNIT = tl.constexpr(0)  # one token
SLIDING = tl.constexpr(1)  # stride 1
STRIDED = tl.constexpr(2)
CAUSAL = tl.constexpr(3)  # stride 1
CAUSAL_STRIDED = tl.constexpr(4)
FULL = tl.constexpr(5)  # plain attention: every key
FULL_CAUSAL = tl.constexpr(6)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def group_length(length, dilation, group):
    return (length - group + dilation - 1) // dilation


@triton.jit
def window(i, n, n_keys, k, s, MODE: tl.constexpr):
    """First and one-past-last key of query ``i`` in a group of ``n`` queries."""
    if MODE == UNIT:
        start, end = i * 0, i * 0 + 1
    elif MODE == FULL:
        start, end = i * 0, i * 0 + n_keys
    elif MODE == FULL_CAUSAL:
        start, end = i * 0, tl.minimum(i + 1, n_keys)
    elif MODE == CAUSAL:
        start, end = tl.maximum(i - k + 1, 0), i + 1
    elif MODE == CAUSAL_STRIDED:
        start = tl.maximum(tl.minimum(i // s * s + s - 1, n - 1) - k + 1, 0)
        end = i + 1
    else:
        leader = i
        if MODE == STRIDED:
            leader = tl.minimum(i // s * s + s // 2, n - 1)
        start = tl.minimum(tl.maximum(leader - k // 2, 0), n - k)
        end = start + k
    return start, end


@triton.jit
def queries_of(p, n, n_keys, k, s, MODE: tl.constexpr):
    """First and one-past-last query that attends key ``p``: the inverse of :func:`window`."""
    if MODE == UNIT:
        start, end = p * 0, p * 0 + 1
    elif MODE == FULL:
        start, end = p * 0, p * 0 + n
    elif MODE == FULL_CAUSAL:
        start, end = p, p * 0 + n
    elif MODE == CAUSAL:
        start, end = p, tl.minimum(p + k, n)
    elif MODE == CAUSAL_STRIDED:
        start = p
        end = tl.where(p + k >= n, n, tl.minimum((p + k - s) // s * s + s, n))
    else:
        first = p - k + 1 + k // 2
        last = p + k // 2
        start, end = first, last + 1
        if MODE == STRIDED:
            start = (first - s // 2 + s - 1) // s * s
            end = (last - s // 2) // s * s + s
        start = tl.where(p - k + 1 <= 0, 0, start)
        end = tl.where((p >= n - k) | (last >= n - 1), n, tl.minimum(end, n))
    return start, end


@triton.jit
def tiles_that_attend(
    length, dilation, k, s, o, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr
):
    """The first of an axis's tiles of queries that attend keys of a box, which begins ``o`` after
    its tile, and how many there are; with strides or dilation perhaps a few too many."""
    most, least = group_length(length, dilation, 0), group_length(length, dilation, dilation - 1)
    # Where tiles begin whose box begins before the last key, and ends after the first.
    first, end = 1 - COLUMNS - o, most - o
    if (MODE == CAUSAL) | (MODE == CAUSAL_STRIDED):
        end = tl.where((o < ROWS) & (o + COLUMNS > 1 - k), end, first)
    else:
        left, right = k // 2, k - 1 - k // 2
        if MODE == STRIDED:  # leaders are at most so far from their queries
            left, right = left + s - 1 - s // 2, right + s // 2
        # Beyond these, only windows that an end of the axis moves reach the box.
        first = tl.where(o + COLUMNS > -left, first, first + least - k)
        end = tl.where(o < ROWS + right, end, k - o)
    first = tl.maximum(first + ROWS - 1, 0) // ROWS
    end = (tl.minimum(end, most) + ROWS - 1) // ROWS
    return first, tl.maximum(end - first, 0)


@triton.jit
def longest_first(t, tiles, k, SIZE: tl.constexpr, MODES: tl.constexpr):
    """Which tile of keys comes ``t``-th along the last axis, so that no long one starts last.

    In a row of tokens, the keys of half a window at each end are attended by fewer queries than
    usual, those of the next half by more. So tiles come from both ends inward, and the short ones
    last. With more axes there are more tiles, and their order matters less.
    """
    if MODES[0] == UNIT and MODES[1] == UNIT and (MODES[2] == SLIDING or MODES[2] == STRIDED):
        short = k // (2 * SIZE) * 2
        t = tl.where(t < tiles - short, t + short, tiles - 1 - t)
        t = tl.where(t % 2 == 0, t // 2, tiles - 1 - t // 2)
    return t


@triton.jit
def coordinates(r, sizes):
    """Position of row ``r`` in a box of ``sizes``, of which the first does not matter."""
    return r // (sizes[1] * sizes[2]), r // sizes[2] % sizes[1], r % sizes[2]


@triton.jit
def group_lengths(lengths, dilation, group):
    return (
        group_length(lengths[0], dilation[0], group[0]),
        group_length(lengths[1], dilation[1], group[1]),
        group_length(lengths[2], dilation[2], group[2]),
    )


@triton.jit
def windows(i, n, n_keys, k, s, MODES: tl.constexpr):
    """:func:`window` of each axis: starts, and ends."""
    start0, end0 = window(i[0], n[0], n_keys[0], k[0], s[0], MODES[0])
    start1, end1 = window(i[1], n[1], n_keys[1], k[1], s[1], MODES[1])
    start2, end2 = window(i[2], n[2], n_keys[2], k[2], s[2], MODES[2])
    return (start0, start1, start2), (end0, end1, end2)


@triton.jit
def queries_of_keys(p, n, n_keys, k, s, MODES: tl.constexpr):
    """:func:`queries_of` of each axis: starts, and ends."""
    start0, end0 = queries_of(p[0], n[0], n_keys[0], k[0], s[0], MODES[0])
    start1, end1 = queries_of(p[1], n[1], n_keys[1], k[1], s[1], MODES[1])
    start2, end2 = queries_of(p[2], n[2], n_keys[2], k[2], s[2], MODES[2])
    return (start0, start1, start2), (end0, end1, end2)


@triton.jit
def times(a, b):
    """Products per axis."""
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


@triton.jit
def plus(a, b):
    """Sums per axis."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def minus(a, b):
    """Differences per axis."""
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


@triton.jit
def before(a, b):
    """Where ``a`` is less than ``b`` on all axes."""
    return (a[0] < b[0]) & (a[1] < b[1]) & (a[2] < b[2])


@triton.jit
def outside(begin, n):
    """Whether a tile begins beyond the end of an axis."""
    return (begin[0] >= n[0]) | (begin[1] >= n[1]) | (begin[2] >= n[2])


@triton.jit
def last_of_tile(first, n, T: tl.constexpr):
    """Last position of a tile, which may be cut short."""
    return (
        tl.minimum(first[0] + T[0], n[0]) - 1,
        tl.minimum(first[1] + T[1], n[1]) - 1,
        tl.minimum(first[2] + T[2], n[2]) - 1,
    )


@triton.jit
def clipped(i, last):
    """Positions, none beyond the last."""
    return tl.minimum(i[0], last[0]), tl.minimum(i[1], last[1]), tl.minimum(i[2], last[2])


@triton.jit
def _size(row, column: tl.constexpr):
    return tl.load(row + column).to(tl.int32)


@triton.jit
def document(documents, number):
    """A row of the table of :class:`natten.varlen.Documents`: first query and key, the layouts of
    both, window, stride, dilation."""
    row = documents + number * 16
    n0, n1 = _size(row, 2), _size(row, 3)
    return (
        tl.load(row), tl.load(row + 1), (n0, n1, _size(row, 4)), (n0, n1, _size(row, 5)),
        (_size(row, 6), _size(row, 7), _size(row, 8)),
        (_size(row, 9), _size(row, 10), _size(row, 11)),
        (_size(row, 12), _size(row, 13), _size(row, 14)),
    )  # fmt: skip


@triton.jit
def token(p, group, dilation, MODE: tl.constexpr):
    """Token at position ``p`` of a dilation group."""
    return p if MODE == UNIT else p * dilation + group


@triton.jit
def tokens(p, group, dilation, MODES: tl.constexpr):
    """:func:`token` of each axis."""
    return (
        token(p[0], group[0], dilation[0], MODES[0]),
        token(p[1], group[1], dilation[1], MODES[1]),
        token(p[2], group[2], dilation[2], MODES[2]),
    )


@triton.jit
def token_offset(start, x, strides, ALIGN: tl.constexpr):
    """Offset of tokens ``x``, a multiple of ``ALIGN``; 64 bits, because tensors may be large."""
    offset = start + x[0].to(tl.int64) * strides[0] + x[1].to(tl.int64) * strides[1]
    return tl.multiple_of(offset + x[2].to(tl.int64) * strides[2], ALIGN)


@triton.jit
def token_strides(shape, apart):
    """Strides of a layout whose tokens follow one another, ``apart``."""
    last = shape[2].to(tl.int64) * apart
    return shape[1] * last, last, apart


@triton.jit
def box_offset(start, a, group, dilation, strides, MODES: tl.constexpr, ALIGN: tl.constexpr):
    """Offset of a box's first token, at position ``a`` of a dilation group."""
    return token_offset(start, tokens(a, group, dilation, MODES), strides, ALIGN)


@triton.jit
def within_box(c, dilation, strides, ALIGN: tl.constexpr):
    """Offset of a box's tokens, at positions ``c``, from its first.

    It is the same in every box, so that in a loop only the first token's has to be worked out.
    """
    return token_offset(0, times(c, dilation), strides, ALIGN)


@triton.jit
def row_number(first, x, shape, heads, head):
    """Row, in ``[*, heads]``, of token ``x`` of a layout ``shape`` from ``first`` on."""
    token = first + (x[0].to(tl.int64) * shape[1] + x[1]) * shape[2] + x[2]
    return token * heads + head


@triton.jit
def load_rows(base, offset, present, columns, COLUMNS: tl.constexpr):
    """Rows of ``COLUMNS`` channels, zeros where not ``present``; ``columns`` is padded."""
    mask = present[:, None] & (columns[None, :] < COLUMNS)
    return tl.load(base + offset[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_tile(at, columns, COLUMNS: tl.constexpr):
    """Like :func:`load_rows` at the addresses ``at``, where all rows are present."""
    if columns.shape[0] == COLUMNS:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=tl.broadcast_to(columns[None, :] < COLUMNS, at.shape), other=0.0)
    return x


@triton.jit
def store_rows(base, offset, present, columns, COLUMNS: tl.constexpr, x):
    mask = present[:, None] & (columns[None, :] < COLUMNS)
    tl.store(base + offset[:, None] + columns[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def bias_offset(o, kernel_size, head):
    """Where ``rpb`` holds the bias of key position minus query position ``o``."""
    at = head * (2 * kernel_size[0] - 1) + o[0] + kernel_size[0] - 1
    at = at * (2 * kernel_size[1] - 1) + o[1] + kernel_size[1] - 1
    return at * (2 * kernel_size[2] - 1) + o[2] + kernel_size[2] - 1


@triton.jit
def bias_place(x, kernel_size):
    """Number of a position in ``rpb``'s layout: two differ by where the bias is from the middle.

    Numbers may wrap around in 32 bits; their differences do not.
    """
    return (x[0] * (2 * kernel_size[1] - 1) + x[1]) * (2 * kernel_size[2] - 1) + x[2]


@triton.jit
def biases(rpb, at, kernel_size, head, scale, WHOLE: tl.constexpr):
    """Biases ``at`` from the middle of the head's, as a product of queries and keys before it is
    scaled; if not ``WHOLE``, some are outside of the head's, and zero."""
    middle = rpb + bias_offset((0, 0, 0), kernel_size, head)
    if WHOLE:
        bias = tl.load(middle + at)
    else:
        half = bias_offset((0, 0, 0), kernel_size, 0)
        bias = tl.load(middle + at, mask=(at >= -half) & (at <= half), other=0.0)
    return bias.to(tl.float32) * (1.0 / scale)


@triton.jit
def scores(
    a, b, scale, rpb, at, kernel_size, head,
    HAS_RPB: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Exponents of two: ``a`` times ``b`` transposed, scaled, and the biases ``at`` from the middle
    of the head's; pairs that are not attended may have any.

    The product starts from the bias. Added later, it has Triton compute the softmax in the layout
    of the load, too.
    """
    if HAS_RPB:
        bias = biases(rpb, at, kernel_size, head, scale, WHOLE)
        s = tl.dot(a, tl.trans(b), bias, input_precision=PRECISION)
    else:
        s = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return s * (scale * LOG2E)


@triton.jit
def split(pid, sizes):
    """Program id to (rest, index of each axis); the last axis runs fastest."""
    rest = pid // sizes[2] // sizes[1]
    return rest // sizes[0], (rest % sizes[0], pid // sizes[2] % sizes[1], pid % sizes[2])


@triton.jit
def _count_boxes(low, high, all_low, all_high, T: tl.constexpr):
    count = tl.maximum(tl.cdiv(high - low, T), 0)
    first = tl.cdiv(all_low - low, T)
    return count, first, tl.maximum((all_high - low) // T - first, 0)


@triton.jit
def count_boxes(low, high, all_low, all_high, T: tl.constexpr):
    """Per axis, boxes of ``T`` along ``low .. high``, the first that is whole, how many are.

    A whole box lies in ``all_low .. all_high``, which all rows of the tile have in common: nothing
    in it has to be masked.
    """
    count0, first0, whole0 = _count_boxes(low[0], high[0], all_low[0], all_high[0], T[0])
    count1, first1, whole1 = _count_boxes(low[1], high[1], all_low[1], all_high[1], T[1])
    count2, first2, whole2 = _count_boxes(low[2], high[2], all_low[2], all_high[2], T[2])
    return (count0, count1, count2), (first0, first1, first2), (whole0, whole1, whole2)


@triton.jit
def _beside(i, first, whole):
    """The ``i``-th box of an axis that is not whole."""
    return tl.where(i < first, i, i + whole)


@triton.jit
def next_whole_box(j0, j1, j2, whole):
    """The box after ``j`` of those that are whole on every axis, and whether axes 1 and 2 ended."""
    end2 = j2 + 1 == whole[2]
    j2 = tl.where(end2, 0, j2 + 1)
    j1 = tl.where(end2, j1 + 1, j1)
    end1 = j1 == whole[1]
    return tl.where(end1, j0 + 1, j0), tl.where(end1, 0, j1), j2, (end1, end2)


@triton.jit
def whole_box_steps(whole, dilation, strides, T: tl.constexpr):
    """What an offset grows by to :func:`next_whole_box`: usually, and where axes 2 and 1 ended.

    Adding one number to all addresses of a box takes fewer registers and instructions than working
    them out, which counts where two sums fill them.
    """
    on0 = dilation[0].to(tl.int64) * T[0] * strides[0]
    on1 = dilation[1].to(tl.int64) * T[1] * strides[1]
    on2 = dilation[2].to(tl.int64) * T[2] * strides[2]
    back2 = (whole[2] - 1) * on2
    return on2, on1 - back2, on0 - (whole[1] - 1) * on1 - back2


@triton.jit
def whole_box_step(steps, ends, ALIGN: tl.constexpr):
    """The one of :func:`whole_box_steps` to take, a multiple of ``ALIGN``."""
    step = tl.where(ends[0], steps[2], tl.where(ends[1], steps[1], steps[0]))
    return tl.multiple_of(step, ALIGN)


@triton.jit
def straddling_box(i, boxes, first, whole):
    """The ``i``-th other box: not whole on axis 0, or else on axis 1, or else on axis 2."""
    on0 = (boxes[0] - whole[0]) * boxes[1] * boxes[2]
    on1 = whole[0] * (boxes[1] - whole[1]) * boxes[2]
    is0, is2 = i < on0, i >= on0 + on1
    i -= tl.where(is0, 0, tl.where(is2, on0 + on1, on0))
    n1 = tl.where(is0, boxes[1], tl.where(is2, whole[1], boxes[1] - whole[1]))
    n2 = tl.where(is2, boxes[2] - whole[2], boxes[2])
    j0, j1, j2 = i // (n1 * n2), i // n2 % n1, i % n2
    j0 = tl.where(is0, _beside(j0, first[0], whole[0]), j0 + first[0])
    j1 = tl.where(is0, j1, tl.where(is2, j1 + first[1], _beside(j1, first[1], whole[1])))
    return j0, j1, tl.where(is2, _beside(j2, first[2], whole[2]), j2)


@triton.jit
def _hidden(a, start, end, T: tl.constexpr, MODE: tl.constexpr):
    """``[rows, T]``: zero where position ``a + column`` lies in ``start .. end``, else -inf."""
    p = a + tl.arange(0, T)[None, :]
    if MODE == UNIT:
        # Along an axis of one token a box may be longer than that.
        within = (p == 0) & (start[:, None] == 0)
    else:
        within = (p >= start[:, None]) & (p < end[:, None])
    return tl.where(within, 0.0, float("-inf"))


@triton.jit
def hidden(a, starts, ends, T: tl.constexpr, MODES: tl.constexpr):
    """What to add to scores ``[rows, box]``: -inf where a column is not in its row's window.

    The box begins at ``a``. Each axis compares on its own, so that a score costs little.
    """
    x0 = _hidden(a[0], starts[0], ends[0], T[0], MODES[0])
    x1 = _hidden(a[1], starts[1], ends[1], T[1], MODES[1])
    x2 = _hidden(a[2], starts[2], ends[2], T[2], MODES[2])
    x = x0[:, :, None, None] + x1[:, None, :, None] + x2[:, None, None, :]
    return x.reshape(x0.shape[0], T[0] * T[1] * T[2])
