"""The factors of masks of tokens in a row (``flat.py``), made by a small kernel before those that
read them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton.launch import kernel
from ..triton.primitives import coordinates
from ..triton.windows import group_length, window

ROOT = tl.constexpr(2.0**50)  # as in ``masks.py``


@triton.jit
def _axis(x, c, n, k, s, d, MODE: tl.constexpr, BY_POSITION: tl.constexpr):
    """Of positions ``[M, 1]`` and columns ``[1, C]`` of an axis: whether a query there has the
    column's window, and whether the window holds a key there."""
    if BY_POSITION:
        group, at = c % d, x // d
        length = group_length(n, d, group)
        start, end = window(c // d, length, length, k, s, MODE)  # [1, C]
        return x == c, (x % d == group) & (at >= start) & (at < end)
    else:
        start, _ = window(x, n, n, k, s, MODE)  # [M, 1]
        return start == c, (x >= c) & (x < c + k)


@kernel(triton.jit, tensors="query_columns key_columns")
def columns_kernel(
    query_columns, key_columns, tokens,
    N0, N1, N2, K0, K1, K2, S0, S1, S2, D0, D1, D2, E0, E1, E2,
    MODES: tl.constexpr, BY_POSITION: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Both factors ``[tokens, C]``, of a layout ``N``; columns of each axis end at ``E``. Rows from
    ``tokens`` on are of no token, and no query attends them."""
    token = tl.program_id(0) * M + tl.arange(0, M)[:, None]  # [M, 1]
    c = tl.arange(0, C)[None, :]  # [1, C]
    x0, x1, x2 = coordinates(token, (N0, N1, N2))  # [M, 1]
    own0, holds0 = _axis(x0, c, N0, K0, S0, D0, MODES[0], BY_POSITION[0])  # [M, C]
    own1, holds1 = _axis(x1, c - E0, N1, K1, S1, D1, MODES[1], BY_POSITION[1])
    own2, holds2 = _axis(x2, c - E1, N2, K2, S2, D2, MODES[2], BY_POSITION[2])
    own = tl.where(c < E0, own0, tl.where(c < E1, own1, own2))
    holds = tl.where(c < E0, holds0, tl.where(c < E1, holds1, holds2))
    is_token, is_column = token < tokens, c < E2
    of_query = tl.where(own & is_token & is_column, ROOT, 0.0)
    of_key = tl.where(is_column & ~(holds & is_token), -ROOT, 0.0)
    tl.store(query_columns + token * C + c, of_query.to(query_columns.dtype.element_ty))
    tl.store(key_columns + token * C + c, of_key.to(key_columns.dtype.element_ty))
