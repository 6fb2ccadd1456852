"""Forward of small windows: each warp has 16 queries, and computes the keys that these reach.

The fewer queries a tile has, the fewer pairs it computes in vain: with windows of 7x7 a tile of 64
queries computes 4.9 times what is needed, one of 16 queries 2.6 times. A product has no fewer rows
than 16, which is what one warp multiplies (mma.sync). So each warp has a tile of its own, which no
other warp waits for. Numbers have two bytes, or four that products may round to TF32.

The tiles of a program lie beside one another. What they reach, the halo, is copied to shared memory
once, keys and values. There each warp's blocks begin somewhere else, which Gluon has no words for:
it loads tensors, not what lies at addresses. So matrices are loaded by PTX (``ldmatrix``), and
values of four bytes, which it does not transpose, one by one.
"""

# Gluon reads annotations as objects: no ``from __future__``.

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from . import primitives, windows
from .launch import kernel
from .primitives import LN2, LOG2E, ROUNDING
from .windows import CIRCULAR, UNIT

# Newer releases of Triton renamed these.
barrier: Any = getattr(gl, "barrier", None) or getattr(gl, "thread_barrier", None)
load_async: Any = getattr(async_copy, "async_load", None) or getattr(
    async_copy, "async_copy_global_to_shared", None
)


def _from_triton(function: Any) -> Any:
    """A function of the portable kernels as one that Gluon kernels can call."""
    return gluon.jit(function.fn)


before = _from_triton(primitives.before)
bit = _from_triton(primitives.bit)
bias_index = _from_triton(primitives.bias_index)
bias_offset = _from_triton(primitives.bias_offset)
coordinates = _from_triton(primitives.coordinates)
group_lengths = _from_triton(windows.group_lengths)
key_tokens = _from_triton(primitives.key_tokens)
minimum = _from_triton(primitives.minimum)
minus = _from_triton(primitives.minus)
outside = _from_triton(primitives.outside)
packed = _from_triton(primitives.packed)
plus = _from_triton(primitives.plus)
row_number = _from_triton(primitives.row_number)
times = _from_triton(primitives.times)
token_offset = _from_triton(primitives.token_offset)
window = _from_triton(windows.window)

ROWS = gl.constexpr(16)  # queries of a warp
# A score that is masked, before it is scaled: finite, so that no NaN comes of it, and a power of
# two, which is scaled without a rounding error. In a block of them its exponential would be large.
MASKED = gl.constexpr(-(2.0**100))


# --- layouts: what each thread of a warp has ----------------------------------------------------


@gluon.constexpr_function
def _bits(n, least=1):
    """Powers of two from ``least`` on and below ``n``."""
    return [1 << i for i in range(n.bit_length() - 1) if 1 << i >= least]


@gluon.constexpr_function
def product_layout(warps):
    """Of ``[W, 16, columns]``, a product of each warp."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def _layout(warps, shape, registers, lanes):
    """Of ``[W, *shape]``: where the bits of a register's and of a lane's number lead."""
    return gl.DistributedLinearLayout(
        [[0, *each] for each in registers], [[0, *each] for each in lanes],
        [[each, 0, 0] for each in _bits(warps)], [], [warps, *shape],
    )  # fmt: skip


@gluon.constexpr_function
def row_layout(warps, channels, n):
    """Of ``[W, 16, channels]`` in memory, ``n`` channels at a time: as products have a left operand
    of which ``n`` are four bytes, and sums, of which they have two."""
    registers = [[0, bit] for bit in _bits(n)] + [[8, 0]]
    registers += [[0, bit] for bit in _bits(channels, 4 * n)]
    return _layout(
        warps, [16, channels], registers, [[0, n], [0, 2 * n], [1, 0], [2, 0], [4, 0]]
    )  # fmt: skip


@gluon.constexpr_function
def key_layout(warps, rows, channels, size):
    """Of keys ``[W, rows, channels]`` as ``ldmatrix`` loads them: four matrices have 64 bytes of 8
    keys, or 32 of 16; ``size``: of a number, in bytes."""
    n = 4 // size
    registers = [[0, bit] for bit in (*_bits(n), 4 * n, *_bits(channels, 8 * n))]
    registers += [[bit, 0] for bit in _bits(rows, 8)]
    return _layout(
        warps, [rows, channels], registers, [[0, n], [0, 2 * n], [1, 0], [2, 0], [4, 0]]
    )  # fmt: skip


@gluon.constexpr_function
def value_layout(warps, rows, channels, size):
    """Of values ``[W, rows, channels]`` as ``ldmatrix`` loads them, transposed: four matrices have
    16 keys and 16 channels. Of values of four bytes, products have 8 keys."""
    keys = 16 * 2 // size
    registers = [[bit, 0] for bit in (1, *_bits(keys, 8))]
    registers += [[0, bit] for bit in _bits(channels, 8)]
    registers += [[bit, 0] for bit in _bits(rows, keys)]
    return _layout(
        warps, [rows, channels], registers, [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]]
    )  # fmt: skip


@gluon.constexpr_function
def phases(row_bytes):
    """Rows that lie in all banks of shared memory, and in how many ways their pieces of 16 bytes
    take turns, so that those of eight rows are in different banks."""
    return max(1, 128 // row_bytes), min(8, row_bytes // 16)


@gluon.constexpr_function
def copy_layout(warps, channels, size):
    """Of ``[rows, channels]`` on their way to shared memory: 16 bytes a thread."""
    pieces = channels * size // 16
    return gl.BlockedLayout([1, 16 // size], [32 // pieces, pieces], [warps, 1], [1, 0])


@gluon.constexpr_function
def lane_layout(warps):
    """Of ``[W, 32]``: one key a thread."""
    return gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])


# --- shared memory ------------------------------------------------------------------------------


@gluon.jit
def _row(c, HALO: gl.constexpr):
    """Row of a key in shared memory, at ``c`` in the halo."""
    return (c[0] * HALO[1] + c[1]) * HALO[2] + c[2]


@gluon.jit
def _address(
    at, piece, far, far_piece, ROW: gl.constexpr, KV_BLOCK: gl.constexpr, HALO: gl.constexpr
):  # fmt: skip
    """Bytes from the first row to 16 of them, a piece, of a block's key ``at + far``; ``ROW``: the
    bytes of a row.

    The halo and blocks have rows of 8 keys or a multiple. So ``far``, multiples of 8, does not
    change how pieces take turns, and of all addresses a thread computes a few; the others are
    constants added.
    """
    PHASES: gl.constexpr = phases(ROW)
    row = _row(at, HALO)
    turned = (piece ^ (row // PHASES[0] % PHASES[1])) * 16 ^ far_piece * 16
    return (row + _row(coordinates(far, KV_BLOCK), HALO)) * ROW + turned


_LOAD = """{
    .reg .u32 at;
    mov.u32 at, global_smem;
    add.u32 at, at, %s;
    %s, [at];
}"""
_MATRICES = "ldmatrix.sync.aligned.m8n8.x4%s.shared.b16 {$0, $1, $2, $3}"
MATRICES = gl.constexpr(_LOAD % ("$4", _MATRICES % ""))
MATRICES_TRANSPOSED = gl.constexpr(_LOAD % ("$4", _MATRICES % ".trans"))
ONE = gl.constexpr(_LOAD % ("$1", "ld.shared.b32 $0"))


@gluon.jit
def _load_matrices(at, tensor, LOAD: gl.constexpr):
    """Four matrices of 8 rows of 16 bytes for every four registers, of which lane ``8 j + i`` has
    ``at``, the address of row ``i`` of matrix ``j``. The program has no other shared memory."""
    if tensor.dtype.element_ty.primitive_bitwidth == 32:
        x = gl.inline_asm_elementwise(LOAD, "=r,=r,=r,=r,r,r,r,r", [at], gl.int32, False, 4)
        x = x.to(tensor.dtype.element_ty, bitcast=True)
    else:
        x = gl.inline_asm_elementwise(
            LOAD, "=r,=r,=r,=r,r,r,r,r,r,r,r,r", [at], tensor.dtype.element_ty, False, 8
        )
    return x


@gluon.jit
def _load_keys(
    key, first, W: gl.constexpr, D: gl.constexpr, KV_BLOCK: gl.constexpr, HALO: gl.constexpr
):  # fmt: skip
    """A block of keys of each warp, ``[W, D, N]``; ``first``: where it begins in the halo, per axis
    ``[W]``."""
    N: gl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    SIZE: gl.constexpr = key.dtype.element_ty.primitive_bitwidth // 8
    LAYOUT: gl.constexpr = key_layout(W, N, D, SIZE)
    n = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    d = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    byte = d * SIZE
    lane = n % 8 * 4 + byte % 16 // 4
    if D * SIZE == 32:
        near, far, piece, far_piece = lane // 16 * 8 + lane % 8, n // 16 * 16, lane // 8 % 2, d * 0
    else:
        near, far, piece, far_piece = lane % 8, n // 8 * 8, lane // 8, byte // 64 * 4
    at = plus(_expanded(_expanded(first, 1), 2), coordinates(near, KV_BLOCK))
    at = _address(at, piece, far, far_piece, D * SIZE, KV_BLOCK, HALO)
    return gl.permute(_load_matrices(at, key, MATRICES), (0, 2, 1))


@gluon.jit
def _load_values(
    value, first, START: gl.constexpr, W: gl.constexpr, DV: gl.constexpr, KV_BLOCK: gl.constexpr,
    HALO: gl.constexpr,
):  # fmt: skip
    """As :func:`_load_keys`, values ``[W, N, DV]``, which begin ``START`` bytes later."""
    N: gl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    SIZE: gl.constexpr = value.dtype.element_ty.primitive_bitwidth // 8
    LAYOUT: gl.constexpr = value_layout(W, N, DV, SIZE)
    n = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    d = gl.arange(0, DV, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    if SIZE == 4:
        at = plus(_expanded(_expanded(first, 1), 2), coordinates(n % 8, KV_BLOCK))
        at = _address(at, d // 4, n // 8 * 8, d * 0, DV * SIZE, KV_BLOCK, HALO) + d % 4 * 4
        v = gl.inline_asm_elementwise(ONE, "=r,r", [START + at], gl.int32, False, 1)
        v = v.to(value.dtype.element_ty, bitcast=True)
    else:
        lane = d % 8 * 4 + n % 8 // 2
        at = plus(_expanded(_expanded(first, 1), 2), coordinates(lane % 16, KV_BLOCK))
        at = _address(at, lane // 16, n // 16 * 16, d // 16 * 2, DV * SIZE, KV_BLOCK, HALO)
        v = _load_matrices(START + at, value, MATRICES_TRANSPOSED)
    return v


@gluon.jit
def _keys_of_products(x, AXIS: gl.constexpr):
    """Numbers of four bytes, of three axes, in another order of keys, along axis 1 or 2: of 8 in
    order, the even ones before the others.

    The product that gives the scores leaves to a thread those of two neighboring keys. The next one
    wants of it two that are four apart; which ones does not matter if values are in the same order.
    So no number goes from thread to thread.
    """
    SHAPE: gl.constexpr = x.shape
    if AXIS == 1:
        x = gl.reshape(x, [SHAPE[0], SHAPE[1] // 8, 4, 2, SHAPE[2]])
        x = gl.permute(x, (0, 1, 3, 2, 4))
    else:
        x = gl.reshape(x, [SHAPE[0], SHAPE[1], SHAPE[2] // 8, 4, 2])
        x = gl.permute(x, (0, 1, 2, 4, 3))
    return gl.reshape(x, SHAPE)


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
    at = gl.multiple_of(tensor + start + _offset(tokens, origin, strides)[:, None] + d, [ALIGN] * 2)
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


# --- where tiles are, and what they reach -------------------------------------------------------


@gluon.jit
def _expanded(x, AXIS: gl.constexpr):
    """``gl.expand_dims`` per axis."""
    return gl.expand_dims(x[0], AXIS), gl.expand_dims(x[1], AXIS), gl.expand_dims(x[2], AXIS)


@gluon.jit
def _index(number, sizes, MODES: gl.constexpr):
    """A number's index of each axis; the last axis runs fastest. A program divides as little as it
    can: it does little else."""
    i0 = number * 0
    i1 = number * 0
    if MODES[0] != UNIT or MODES[1] != UNIT:
        i1 = number // sizes[2]
        number -= i1 * sizes[2]
    if MODES[0] != UNIT:
        i0 = i1 // sizes[1]
        i1 -= i0 * sizes[1]
    return i0, i1, number


@gluon.jit
def _windows(i, n, kernel_size, stride, MODES: gl.constexpr):
    """First and one-past-last key of queries ``i``, per axis."""
    start0, end0 = window(i[0], n[0], n[0], kernel_size[0], stride[0], MODES[0])
    start1, end1 = window(i[1], n[1], n[1], kernel_size[1], stride[1], MODES[1])
    start2, end2 = window(i[2], n[2], n[2], kernel_size[2], stride[2], MODES[2])
    return (start0, start1, start2), (end0, end1, end2)


@gluon.jit
def _tiles(begin, WARPS: gl.constexpr, Q_BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """First query of each warp, per axis ``[W]`` in a layout."""
    w = gl.arange(0, WARPS[0] * WARPS[1] * WARPS[2], LAYOUT)
    return plus(begin, times(coordinates(w, WARPS), Q_BLOCK))


@gluon.jit
def _queries(begin, WARPS: gl.constexpr, Q_BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """Queries of each warp, per axis ``[W, 16]`` in a layout; some may be beyond the end."""
    tiles = _tiles(begin, WARPS, Q_BLOCK, gl.SliceLayout(1, LAYOUT))
    m = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    return plus(_expanded(tiles, 1), _expanded(coordinates(m, Q_BLOCK), 0))


@gluon.jit
def _lows(
    begin, last, n, kernel_size, stride, MODES: gl.constexpr, WARPS: gl.constexpr,
    Q_BLOCK: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """First key of each warp, per axis ``[W]`` in a layout; ``last``: the last query."""
    first = minimum(_tiles(begin, WARPS, Q_BLOCK, LAYOUT), last)
    low, _ = _windows(first, n, kernel_size, stride, MODES)
    return low


@gluon.jit
def _present(y, n, MODE: gl.constexpr):
    """Positions of keys that are there, before the modulo of a ring; those beyond are masked, and
    have the last one's numbers."""
    return gl.minimum(y, 2 * n - 1 if MODE >= CIRCULAR else n - 1)


@gluon.jit
def _tokens(y, group, dilation, n, MODES: gl.constexpr):
    """Tokens of keys at positions ``y``, per axis."""
    y0, y1 = _present(y[0], n[0], MODES[0]), _present(y[1], n[1], MODES[1])
    return key_tokens((y0, y1, _present(y[2], n[2], MODES[2])), group, dilation, n, MODES)


@gluon.jit
def _offset(tokens, origin, strides):
    """How far tokens are in memory from a token nearby, in 32 bits, which take fewer instructions;
    ``small_tiles`` says where they are enough."""
    x = minus(tokens, origin)
    at = x[0] * strides[0].to(gl.int32) + x[1] * strides[1].to(gl.int32)
    return at + x[2] * strides[2].to(gl.int32)


@gluon.jit
def _mask(y, start, end, MODE: gl.constexpr, EXTENT: gl.constexpr):
    """``[W, 16, N]``: zero where keys ``y [W, N]`` lie in ``start .. end [W, 16]``; ``EXTENT``:
    of all blocks, which may have more keys than one along an axis of one token."""
    if MODE == UNIT and EXTENT == 1:
        mask = 0.0
    else:
        y = gl.expand_dims(y, 1)
        within = (y >= gl.expand_dims(start, 2)) & (y < gl.expand_dims(end, 2))
        mask = gl.where(within, 0.0, MASKED)
    return mask


# --- masks of keys ------------------------------------------------------------------------------


class KeyMask(NamedTuple):
    """Where a mask of keys is, and the keys of a program's dilation group."""

    origin_at: Any  # address of what it holds of the token ``origin``
    origin: Any  # a token nearby, per axis
    strides: Any  # per axis
    group: Any  # per axis
    dilation: Any  # per axis
    n: Any  # keys of the group, per axis


@gluon.jit
def _allowed(mask, y, MODES: gl.constexpr):
    """Whether keys at positions ``y`` may be attended."""
    x = _tokens(y, mask.group, mask.dilation, mask.n, MODES)
    return gl.load(mask.origin_at + _offset(x, mask.origin, mask.strides)) != 0


@gluon.jit
def _allowed_keys(mask, first, MODES: gl.constexpr, KV_BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """Which keys of each warp's block may be attended, ``[W, N]`` in a layout; ``first``: where it
    begins, per axis ``[W]`` in the layout of lanes."""
    N: gl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    W: gl.constexpr = first[2].shape[0]
    lane = gl.arange(0, 32, gl.SliceLayout(0, lane_layout(W)))
    i = gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, LAYOUT)), 0)  # [1, N]
    words = gl.zeros([W, N], gl.int32, LAYOUT)
    for word in gl.static_range(N // 32):
        c = coordinates(32 * word + lane, KV_BLOCK)  # [32] per axis
        allowed = _allowed(mask, plus(_expanded(first, 1), _expanded(c, 0)), MODES)  # [W, 32]
        own = packed(allowed, gl.expand_dims(lane, 0), 1)  # [W]
        own = gl.expand_dims(gl.convert_layout(own, gl.SliceLayout(1, LAYOUT)), 1)
        words = gl.where(i // 32 == word, own, words)
    return bit(words, i % 32)


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
        group = _index(gl.program_id(1), dilation, MODES)
        n, end = group_lengths(n, dilation, group), group_lengths(end, dilation, group)
        if PART:
            begin = group_lengths(offset, dilation, group)
    number = _index(gl.program_id(0), (T0, T1, T2), MODES)
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
    origin = _tokens(low, group, dilation, n, MODES)
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
        x = _tokens(position, group, dilation, n, MODES)
        if HAS_KEY_MASK:
            allowed = _allowed(mask, position, MODES)
        k_stage, v_stage = stages.index(chunk), stages.index(CHUNKS + chunk)
        _copy(key, k_start, x, origin, k_strides, k_stage, allowed, C, BYTES, COPY)
        _copy(value, v_start, x, origin, v_strides, v_stage, allowed, C, BYTES, COPY)
    async_copy.commit_group()

    i = _queries(begin, WARPS, Q_BLOCK, gl.SliceLayout(2, QUERY))
    x = key_tokens(minimum(i, last), group, dilation, n, MODES)
    d = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, QUERY)))[None, None, :]
    origin = key_tokens(begin, group, dilation, n, MODES)
    at = query + token_offset(batch * q_b + head * q_h, minus(origin, offset), q_strides, 1)
    at += gl.expand_dims(_offset(x, origin, q_strides), 2) + d
    at = gl.multiple_of(at, [BYTES, BYTES, BYTES])
    q = gl.load(at, mask=d < C, other=0) if C < D else gl.load(at)
    q = gl.convert_layout(q, LEFT)  # [W, 16, D]

    i = minimum(_queries(begin, WARPS, Q_BLOCK, M_ROWS), last)  # [W, 16] per axis
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
    c = _expanded(coordinates(gl.arange(0, N, gl.SliceLayout(0, N_ROWS)), KV_BLOCK), 0)  # [1, N]

    scale_log2 = scale * LOG2E  # scores times it are exponents of two
    acc = gl.zeros([W, ROWS, D], gl.float32, PRODUCT)
    row_max = gl.full([W, ROWS], float("-inf"), gl.float32, M_ROWS)
    row_sum = gl.zeros([W, ROWS], gl.float32, M_ROWS)
    async_copy.wait_group(0)
    barrier()
    for number in range(0, BLOCKS[0] * BLOCKS[1] * BLOCKS[2]):
        first = times(coordinates(number, BLOCKS), KV_BLOCK)
        k = _load_keys(key, plus(k_low, first), W, D, KV_BLOCK, HALO)
        k = gl.convert_layout(k, RIGHT)  # [W, D, N]

        # The product starts from masks and biases. Keys that a mask takes away are zeros.
        y = plus(_expanded(plus(s_low, first), 1), c)  # [W, N] per axis
        s = _mask(y[2], starts[2], ends[2], MODES[2], BLOCKS[2] * KV_BLOCK[2])  # [W, 16, N]
        s = gl.minimum(s, _mask(y[1], starts[1], ends[1], MODES[1], BLOCKS[1] * KV_BLOCK[1]))
        s = gl.minimum(s, _mask(y[0], starts[0], ends[0], MODES[0], BLOCKS[0] * KV_BLOCK[0]))
        if HAS_RPB:
            s += _biases(rpb, i, y, kernel_size, head, scale)
            s = gl.maximum(s, MASKED, propagate_nan=tl.PropagateNan.ALL)  # of a bias of -inf
        if HAS_KEY_MASK:
            of_block = _allowed_keys(mask, plus(m_low, first), MODES, KV_BLOCK, N_ROWS)  # [W, N]
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

        v = _load_values(
            value, plus(v_low, first), CHUNKS * CHUNK * D * SIZE, W, D, KV_BLOCK, HALO
        )  # fmt: skip
        p = p.to(value.dtype.element_ty)
        if SIZE == 4:
            v, p = _keys_of_products(v, 1), _keys_of_products(p, 2)
        v = gl.convert_layout(v, RIGHT)  # [W, N, D]
        p = gl.convert_layout(p, LEFT)
        acc = mma_v2(p, v, acc * gl.expand_dims(rescale, 2), "tf32")  # [W, 16, D]

    found = row_max > 0.5 * MASKED * scale_log2  # a bias of -inf may leave nothing to attend
    real = before(_queries(begin, WARPS, Q_BLOCK, M_ROWS), end)
    x = minus(key_tokens(i, group, dilation, n, MODES), offset)
    first_row = batch * L0 * L1 * L2
    at = row_number(first_row, x, shape, heads, head)  # [W, 16]
    row_lse = gl.where(found, (row_max + gl.log2(row_sum)) * LN2, float("-inf"))
    gl.store(lse + at, row_lse, mask=real)

    inverse = gl.where(found, 1.0 / row_sum, 0.0)
    o = (acc * gl.expand_dims(inverse, 2)).to(out.dtype.element_ty)  # O = acc / row_sum
    i = _queries(begin, WARPS, Q_BLOCK, gl.SliceLayout(2, OUT))
    x = minus(key_tokens(i, group, dilation, n, MODES), offset)
    at = out + gl.expand_dims(row_number(first_row, x, shape, heads, head) * C, 2)
    d = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, OUT)))[None, None, :]
    OUT_BYTES: gl.constexpr = 16 if C % 16 == 0 else (C & -C) * SIZE
    at = gl.multiple_of(at + d, [OUT_BYTES, OUT_BYTES, OUT_BYTES])
    real = gl.expand_dims(before(i, end), 2)
    if C < D:
        real = real & (d < C)
    gl.store(at, gl.convert_layout(o, OUT), mask=real)
