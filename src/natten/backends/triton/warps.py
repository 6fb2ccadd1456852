"""Tiles of 16 rows, one of each warp: who has which numbers, and what lies in shared memory.

A product has no fewer rows than 16, which is what one warp multiplies (mma.sync). The warps of a
program have tiles beside one another, and share what these reach, the halo, in shared memory. There
each warp's blocks begin somewhere else, which Gluon has no words for: it loads tensors, not what
lies at addresses. So matrices are loaded by PTX (``ldmatrix``), and values of four bytes, which it
does not transpose, one by one.
"""

# Gluon reads annotations as objects: no ``from __future__``.

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from . import primitives, windows
from .windows import CIRCULAR, UNIT

# Newer releases of Triton renamed these.
barrier: Any = getattr(gl, "barrier", None) or getattr(gl, "thread_barrier", None)
load_async: Any = getattr(async_copy, "async_load", None) or getattr(
    async_copy, "async_copy_global_to_shared", None
)


def from_triton(function: Any) -> Any:
    """A function of the portable kernels as one that Gluon kernels can call."""
    return gluon.jit(function.fn)


before = from_triton(primitives.before)
coordinates = from_triton(primitives.coordinates)
group_lengths = from_triton(windows.group_lengths)
key_tokens = from_triton(primitives.key_tokens)
minimum = from_triton(primitives.minimum)
minus = from_triton(primitives.minus)
outside = from_triton(primitives.outside)
plus = from_triton(primitives.plus)
row_number = from_triton(primitives.row_number)
times = from_triton(primitives.times)
token_offset = from_triton(primitives.token_offset)
token_strides = from_triton(primitives.token_strides)
queries_of = from_triton(windows.queries_of)
window = from_triton(windows.window)

ROWS = gl.constexpr(16)  # of a warp
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
def load_keys(
    key, first, start, W: gl.constexpr, D: gl.constexpr, KV_BLOCK: gl.constexpr, HALO: gl.constexpr
):  # fmt: skip
    """A block of keys of each warp, ``[W, D, N]``, which lie from byte ``start`` on; ``first``:
    where it begins in the halo, per axis ``[W]``."""
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
    at = plus(expanded(expanded(first, 1), 2), coordinates(near, KV_BLOCK))
    at = _address(at, piece, far, far_piece, D * SIZE, KV_BLOCK, HALO)
    return gl.permute(_load_matrices(start + at, key, MATRICES), (0, 2, 1))


@gluon.jit
def load_values(
    value, first, start, W: gl.constexpr, DV: gl.constexpr, KV_BLOCK: gl.constexpr,
    HALO: gl.constexpr,
):  # fmt: skip
    """As :func:`load_keys`, values ``[W, N, DV]``."""
    N: gl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    SIZE: gl.constexpr = value.dtype.element_ty.primitive_bitwidth // 8
    LAYOUT: gl.constexpr = value_layout(W, N, DV, SIZE)
    n = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    d = gl.arange(0, DV, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    if SIZE == 4:
        at = plus(expanded(expanded(first, 1), 2), coordinates(n % 8, KV_BLOCK))
        at = _address(at, d // 4, n // 8 * 8, d * 0, DV * SIZE, KV_BLOCK, HALO) + d % 4 * 4
        v = gl.inline_asm_elementwise(ONE, "=r,r", [start + at], gl.int32, False, 1)
        v = v.to(value.dtype.element_ty, bitcast=True)
    else:
        lane = d % 8 * 4 + n % 8 // 2
        at = plus(expanded(expanded(first, 1), 2), coordinates(lane % 16, KV_BLOCK))
        at = _address(at, lane // 16, n // 16 * 16, d // 16 * 2, DV * SIZE, KV_BLOCK, HALO)
        v = _load_matrices(start + at, value, MATRICES_TRANSPOSED)
    return v


@gluon.jit
def keys_of_products(x, AXIS: gl.constexpr):
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


# --- where tiles are, and what they reach -------------------------------------------------------


@gluon.jit
def expanded(x, AXIS: gl.constexpr):
    """``gl.expand_dims`` per axis."""
    return gl.expand_dims(x[0], AXIS), gl.expand_dims(x[1], AXIS), gl.expand_dims(x[2], AXIS)


@gluon.jit
def index_of(number, sizes, MODES: gl.constexpr):
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
def tiles_of_warps(begin, WARPS: gl.constexpr, Q_BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """First query of each warp, per axis ``[W]`` in a layout."""
    w = gl.arange(0, WARPS[0] * WARPS[1] * WARPS[2], LAYOUT)
    return plus(begin, times(coordinates(w, WARPS), Q_BLOCK))


@gluon.jit
def rows_of_warps(begin, WARPS: gl.constexpr, Q_BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """Queries of each warp, per axis ``[W, 16]`` in a layout; some may be beyond the end."""
    tiles = tiles_of_warps(begin, WARPS, Q_BLOCK, gl.SliceLayout(1, LAYOUT))
    m = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    return plus(expanded(tiles, 1), expanded(coordinates(m, Q_BLOCK), 0))


@gluon.jit
def _present(y, n, MODE: gl.constexpr):
    """Positions of keys that are there, before the modulo of a ring; those beyond are masked, and
    have the last one's numbers."""
    return gl.minimum(y, 2 * n - 1 if MODE >= CIRCULAR else n - 1)


@gluon.jit
def present_tokens(y, group, dilation, n, MODES: gl.constexpr):
    """Tokens of keys at positions ``y``, per axis."""
    y0, y1 = _present(y[0], n[0], MODES[0]), _present(y[1], n[1], MODES[1])
    return key_tokens((y0, y1, _present(y[2], n[2], MODES[2])), group, dilation, n, MODES)


@gluon.jit
def _masked(mask, y, start, end, MODE: gl.constexpr, EXTENT: gl.constexpr):
    """``mask [W, 16, N]``, zero or less, and less where keys ``y [W, N]`` are not in ``start .. end
    [W, 16]``; ``EXTENT``: of all blocks, which may have more keys than one along an axis of one
    token."""
    if MODE != UNIT or EXTENT > 1:
        y = gl.expand_dims(y, 1)
        within = (y >= gl.expand_dims(start, 2)) & (y < gl.expand_dims(end, 2))
        mask = gl.minimum(mask, gl.where(within, 0.0, MASKED))
    return mask


@gluon.jit
def window_mask(y, starts, ends, MODES: gl.constexpr, EXTENT: gl.constexpr):
    """``[W, 16, N]``: zero where keys ``y`` lie in windows, per axis."""
    N: gl.constexpr = y[2].shape[1]
    mask = gl.zeros([y[2].shape[0], ROWS, N], gl.float32, product_layout(y[2].shape[0]))
    mask = _masked(mask, y[2], starts[2], ends[2], MODES[2], EXTENT[2])
    mask = _masked(mask, y[1], starts[1], ends[1], MODES[1], EXTENT[1])
    return _masked(mask, y[0], starts[0], ends[0], MODES[0], EXTENT[0])
