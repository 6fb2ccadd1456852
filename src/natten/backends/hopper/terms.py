"""LSE and delta of each query, which both passes of the backward load by TMA."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton.backward import make_terms
from ..triton.launch import kernel
from ..triton.primitives import load_rows


@kernel(triton.jit, tensors="out lse grad_out grad_lse terms")
def terms_kernel(
    out, lse, grad_out, grad_lse, terms, rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """:func:`make_terms` of contiguous tensors."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    real, dv = row < rows, tl.arange(0, BLOCK_DV)
    g = load_rows(grad_out, row * DV, real, dv, DV)
    make_terms(out, lse, grad_lse, terms, row, real, g, dv, DV, HAS_GRAD_LSE)
