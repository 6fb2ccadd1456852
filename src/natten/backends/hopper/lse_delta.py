"""LSE and delta of each query, which both passes of the backward load by TMA."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton.backward import make_lse_delta
from ..triton.launch import kernel
from ..triton.primitives import load_rows


@kernel(triton.jit, tensors="out lse grad_out grad_lse lse_delta")
def lse_delta_kernel(
    out, lse, grad_out, grad_lse, lse_delta, rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """:func:`make_lse_delta` of contiguous tensors."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)  # [M]
    real, dv = row < rows, tl.arange(0, BLOCK_DV)  # [M], [DV]
    g = load_rows(grad_out, row * DV, real, dv, DV)  # [M, DV]
    make_lse_delta(out, lse, grad_lse, lse_delta, row, real, g, dv, DV, HAS_GRAD_LSE)
