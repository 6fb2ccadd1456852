"""What kernels are made of: arithmetic per axis, addresses, loads and stores, scores.

Kernels see three axes, and have tuples of what there is of each; an axis that a problem lacks has
one token and mode ``UNIT``, and compiles away.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .windows import CIRCULAR, UNIT, wrapped

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ROUNDING = tl.constexpr(2.0**-22)  # of a product of two numbers, and a little more


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
def minimum(a, b):
    """The lesser per axis."""
    return tl.minimum(a[0], b[0]), tl.minimum(a[1], b[1]), tl.minimum(a[2], b[2])


@triton.jit
def before(a, b):
    """Where ``a`` is less than ``b`` on all axes."""
    return (a[0] < b[0]) & (a[1] < b[1]) & (a[2] < b[2])


@triton.jit
def outside(begin, n):
    """Whether a tile begins beyond the end of an axis."""
    return (begin[0] >= n[0]) | (begin[1] >= n[1]) | (begin[2] >= n[2])


@triton.jit
def coordinates(i, sizes):
    """Position of element ``i`` of a block of ``sizes``, of which the first does not matter."""
    return i // (sizes[1] * sizes[2]), i // sizes[2] % sizes[1], i % sizes[2]


@triton.jit
def split(number, sizes):
    """A number's (rest, index of each axis); the last axis runs fastest."""
    rest = number // sizes[2] // sizes[1]
    return rest // sizes[0], (rest % sizes[0], number // sizes[2] % sizes[1], number % sizes[2])


@triton.jit
def _token(i, group, dilation, n_keys, MODE: tl.constexpr, R: tl.constexpr):
    if MODE == UNIT:
        x = i
    else:
        if MODE >= CIRCULAR:
            i = wrapped(i, n_keys * R if R > 1 else n_keys)
        x = (i // R * dilation + group) * R + i % R if R > 1 else i * dilation + group
    return x


@triton.jit
def query_tokens(j, group, dilation, n_keys, MODES: tl.constexpr, PER_KEY: tl.constexpr):
    """Tokens of queries of numbers ``j`` of a dilation group, per axis, as the whole layout of
    queries counts them."""
    return (
        _token(j[0], group[0], dilation[0], n_keys[0], MODES[0], PER_KEY[0]),
        _token(j[1], group[1], dilation[1], n_keys[1], MODES[1], PER_KEY[1]),
        _token(j[2], group[2], dilation[2], n_keys[2], MODES[2], PER_KEY[2]),
    )


@triton.jit
def key_tokens(i, group, dilation, n_keys, MODES: tl.constexpr):
    """Tokens of keys at positions ``i`` of a dilation group, per axis."""
    return query_tokens(i, group, dilation, n_keys, MODES, (0, 0, 0))


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
def row_number(first, x, shape, heads, head):
    """Row, in ``[*, heads]``, of token ``x`` of a layout ``shape`` from ``first`` on."""
    token = first + (x[0].to(tl.int64) * shape[1] + x[1]) * shape[2] + x[2]
    return token * heads + head


@triton.jit
def load_rows(base, offset, present, columns, COLUMNS: tl.constexpr):
    """Rows of ``COLUMNS`` channels, zeros where not ``present``; ``columns`` is padded."""
    return load_some(base + offset[:, None] + columns[None, :], present, columns, COLUMNS)


@triton.jit
def load_some(at, present, columns, COLUMNS: tl.constexpr):
    """Like :func:`load_rows` at the addresses ``at``."""
    return tl.load(at, mask=present[:, None] & (columns[None, :] < COLUMNS), other=0.0)


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
    """The inverse of :func:`load_rows`."""
    mask = present[:, None] & (columns[None, :] < COLUMNS)
    tl.store(base + offset[:, None] + columns[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_mask(mask, offset, present):
    """Which of the keys at these offsets in a mask may be attended, if they are ``present``."""
    return tl.load(mask + offset, mask=present, other=0)


@triton.jit
def packed(allowed, lane, AXIS: tl.constexpr):
    """What a mask holds of 32 keys, key ``lane`` along an axis, as bits of a word.

    Each warp has all of them, one a thread, so that this takes one instruction, and no shared
    memory as a conversion to the layout of scores would.
    """
    return tl.sum((allowed != 0).to(tl.int32) << lane, AXIS)


@triton.jit
def bit(word, i):
    """Whether bit ``i`` of a word is set, of 32.

    A thread's columns of a product differ by 1 and by multiples of 8, so that it shifts a word once
    by what depends on the thread, and then looks at bits whose numbers are constants.
    """
    return ((word >> (i & 6)) >> (i & 25)) & 1 != 0


@triton.jit
def hidden(allowed):
    """What :func:`load_mask` gave, to be added to scores, ``[1, N]``: -inf for masked keys.

    It is made by a thread each and read by those that need it, through shared memory. Else each
    thread would load all bytes of a mask that it needs, and keep an address for each.
    """
    x = tl.where(allowed, 0.0, float("-inf"))
    return tl.gather(x, tl.arange(0, x.shape[0]), 0)[None, :]


@triton.jit
def bias_offset(o, kernel_size, head):
    """Where ``rpb`` holds the bias of key position minus query position ``o``."""
    at = head * (2 * kernel_size[0] - 1) + o[0] + kernel_size[0] - 1
    at = at * (2 * kernel_size[1] - 1) + o[1] + kernel_size[1] - 1
    return at * (2 * kernel_size[2] - 1) + o[2] + kernel_size[2] - 1


@triton.jit
def bias_index(i, kernel_size):
    """Number of a position in ``rpb``'s layout: two differ by where the bias is from the middle.

    Numbers may wrap around in 32 bits; their differences do not.
    """
    return (i[0] * (2 * kernel_size[1] - 1) + i[1]) * (2 * kernel_size[2] - 1) + i[2]


@triton.jit
def biases(rpb, at, kernel_size, head, scale, INSIDE: tl.constexpr):
    """Biases ``at`` from the middle of the head's, as a product of queries and keys before it is
    scaled; if not ``INSIDE``, some are outside of the head's, and zero."""
    middle = rpb + bias_offset((0, 0, 0), kernel_size, head)
    if INSIDE:
        bias = tl.load(middle + at)
    else:
        half = bias_offset((0, 0, 0), kernel_size, 0)
        bias = tl.load(middle + at, mask=(at >= -half) & (at <= half), other=0.0)
    return bias.to(tl.float32) * (1.0 / scale)


@triton.jit
def scores(
    a, b, scale, rpb, at, kernel_size, head, allowed,
    HAS_RPB: tl.constexpr, IS_FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Exponents of two, ``(a b^T * scale + bias) * log2 e``, of rows ``a [R, D]`` and ``b [C, D]``;
    ``at [R, C]``: where the biases are from the middle of the head's. If the block is not
    ``IS_FULL``, pairs that are not attended may have any. Columns that are not ``allowed [C]`` are
    -inf, unless that is None; their ``b`` are zeros, and the scale is not zero.

    The product starts from the bias. Added later, it has Triton compute the softmax in the layout
    of the load, too. In partial blocks it also starts from what hides columns: that is what Triton
    makes of the sum. In full blocks, which have less to do beside products, a choice is faster.
    """
    if HAS_RPB:
        bias = biases(rpb, at, kernel_size, head, scale, IS_FULL)  # [R, C]
        s = tl.dot(a, tl.trans(b), bias, input_precision=PRECISION)
    else:
        s = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if allowed is not None:
        hides = tl.where(scale < 0.0, float("inf"), float("-inf"))  # before it is scaled
        if IS_FULL:
            s = tl.where(allowed[None, :], s, hides)
        else:
            s += tl.where(allowed, 0.0, hides)[None, :]
    return s * (scale * LOG2E)
