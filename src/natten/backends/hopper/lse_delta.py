"""What the passes of the backward find made: LSE and delta of each query, four numbers that
they load by TMA, and gradients of keys that no query attends, which no tile stores."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton.backward import make_lse_delta
from ..triton.launch import kernel
from ..triton.primitives import coordinates, load_rows
from .gluon_names import gdc_launch_dependents


@triton.jit
def _zeros(x, token, mask, units):
    """Zeros in rows ``token`` of ``x [tokens, 8 * units]``; as Triton knows of the 8, a thread
    stores 16 bytes at once."""
    width, columns = units * 8, tl.arange(0, 64)
    for start in range(0, width, 64):
        at = start + columns  # [64]
        zeros = tl.zeros([token.shape[0], 64], x.dtype.element_ty)
        tl.store(x + token[:, None] * width + at[None, :], zeros, mask[:, None] & (at < width))


@kernel(triton.jit, tensors="out lse grad_out grad_lse lse_delta grad_key grad_value")
def lse_delta_kernel(
    out, lse, grad_out, grad_lse, lse_delta, grad_key, grad_value,
    rows, tokens, N0, N1, N2, F0, F1, F2, E0, E1, E2, k_units, v_units,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, M: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """:func:`make_lse_delta` of contiguous tensors, by the first programs. The others store zeros:
    of keys ``[tokens]`` in layouts ``N``, those from ``F`` to ``E`` have tiles."""
    gdc_launch_dependents()  # tables of a bias are made meanwhile; passes wait for the end
    of_rows = tl.cdiv(rows, M)
    if tl.program_id(0) < of_rows:
        row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)  # [M]
        real, dv = row < rows, tl.arange(0, BLOCK_DV)  # [M], [DV]
        g = load_rows(grad_out, row * DV, real, dv, DV)  # [M, DV]
        make_lse_delta(out, lse, grad_lse, lse_delta, row, real, g, dv, DV, HAS_GRAD_LSE)
    else:
        token = (tl.program_id(0) - of_rows) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
        x0, x1, x2 = coordinates(token, (N0, N1, N2))
        x0 = x0 % N0
        tiled = (x0 >= F0) & (x0 < E0) & (x1 >= F1) & (x1 < E1) & (x2 >= F2) & (x2 < E2)
        mask = (token < tokens) & (tiled == 0)
        _zeros(grad_key, token.to(tl.int64), mask, k_units)
        _zeros(grad_value, token.to(tl.int64), mask, v_units)
