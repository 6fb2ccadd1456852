"""The last step of the bias's gradient: what programs summed by offset is added up."""

import triton
import triton.language as tl

from ..triton.launch import kernel
from ..triton.primitives import coordinates
from .gluon_names import gdc_wait, gluon


@gluon.constexpr_function
def offsets_of(tile, block):
    """How many offsets there are between a tile and a block."""
    found = 1
    for t, n in zip(tile, block):
        found *= t + n - 1
    return found


@triton.jit
def _block_and_offset(o, A, B, AT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Of the blocks along an axis with keys at offset ``o`` from a query, the one ``AT`` before the
    last: its number, the offset's number among those of a block, and whether there is such a
    block."""
    last = o - A + TILE - 1  # the offset's number in the first block
    block = last // BLOCK - AT
    at = last - block * BLOCK
    return block, at, (last >= 0) & (block >= 0) & (block < B) & (at < TILE + BLOCK - 1)


@kernel(triton.jit, tensors="of_offsets grad_rpb")
def bias_sum_kernel(
    of_offsets, grad_rpb, K0, K1, K2, A0, A1, A2, B0, B1, B2, splits,
    TILE: tl.constexpr, BLOCK: tl.constexpr, OFFSETS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The bias's gradient ``[heads, offsets]`` from what ``bias_gradient_kernel`` made; a program
    sums so many ``OFFSETS``, of ``SPLITS`` splits at once."""
    E1: tl.constexpr = TILE[1] + BLOCK[1] - 1
    E2: tl.constexpr = TILE[2] + BLOCK[2] - 1
    EACH: tl.constexpr = (TILE[0] + BLOCK[0] - 1) * E1 * E2
    n0, n1, n2 = 2 * K0 - 1, 2 * K1 - 1, 2 * K2 - 1
    i = tl.program_id(0) * OFFSETS + tl.arange(0, OFFSETS)
    x0, x1, x2 = coordinates(i, (n0, n1, n2))
    o0, o1, o2 = x0 - (K0 - 1), x1 - (K1 - 1), x2 - (K2 - 1)  # [OFFSETS] each
    real = i < n0 * n1 * n2
    blocks, heads, head = B0 * B1 * B2, tl.num_programs(1), tl.program_id(1)
    acc = tl.zeros([SPLITS, OFFSETS], tl.float32)
    gdc_wait()
    for first in range(0, splits, SPLITS):
        split_id = first + tl.arange(0, SPLITS)  # [SPLITS]
        program = (split_id.to(tl.int64) * heads + head) * blocks
        for j0 in tl.static_range((TILE[0] + 2 * BLOCK[0] - 2) // BLOCK[0]):
            b0, e0, here0 = _block_and_offset(o0, A0, B0, j0, TILE[0], BLOCK[0])
            for j1 in tl.static_range((TILE[1] + 2 * BLOCK[1] - 2) // BLOCK[1]):
                b1, e1, here1 = _block_and_offset(o1, A1, B1, j1, TILE[1], BLOCK[1])
                for j2 in tl.static_range((TILE[2] + 2 * BLOCK[2] - 2) // BLOCK[2]):
                    b2, e2, here2 = _block_and_offset(o2, A2, B2, j2, TILE[2], BLOCK[2])
                    here = (real & here0 & here1 & here2)[None, :] & (split_id < splits)[:, None]
                    at = ((b0 * B1 + b1) * B2 + b2) * EACH + (e0 * E1 + e1) * E2 + e2
                    at = of_offsets + (program * EACH)[:, None] + at[None, :]
                    acc += tl.load(at, mask=here, other=0.0)
    tl.store(grad_rpb + head * (n0 * n1 * n2) + i, tl.sum(acc, 0), mask=real)
