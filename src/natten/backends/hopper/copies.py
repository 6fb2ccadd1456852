"""Rows of channels, copied into narrower or wider ones."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton.launch import kernel


@kernel(triton.jit, tensors="x copy")
def copy_kernel(
    x, copy, rows, tokens, heads, x_b, x_t, x_h,
    C: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Rows of words ``x [batch, tokens, heads, C]`` as ``copy [rows, WIDTH]``: with zeros after
    them, or without the last ones."""
    row = tl.program_id(0) * M + tl.arange(0, M)  # [M]
    c, real = tl.arange(0, COLUMNS)[None, :], (row < rows)[:, None]
    token = row // heads
    at = (token // tokens).to(tl.int64) * x_b + (token % tokens).to(tl.int64) * x_t
    at += row % heads * x_h
    words = tl.load(x + at[:, None] + c, mask=real & (c < C), other=0)  # [M, COLUMNS]
    tl.store(copy + row.to(tl.int64)[:, None] * WIDTH + c, words, mask=real & (c < WIDTH))
