"""Unfused attention: products with a window's keys, weighted sums of its values, and their bias.

Weights are ``[batch, *space, heads, window tokens]``, a row of slots per query. A tile of queries
meets blocks of keys in matrix products, as in the fused kernels; a pair inside the window has its
weight at ``slot = position - window start``. Row-major slots make that the sum of a number
that the query has and one that the key has, so that no index is stored or gathered. Every weight
has one writer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import tuning
from ..._torch import allows_tf32
from ...neighborhood import Neighborhood
from ...tiling import padded
from ..interface import Shape
from . import tiles as tiling
from .launch import Launch, contiguous, kernel, on_device, per_axis, readable, strides_of
from .plan import has_shared_kernels, sizes, tile_counts, windows_of
from .primitives import (
    before,
    bias_offset,
    coordinates,
    key_tokens,
    load_rows,
    minus,
    outside,
    plus,
    query_tokens,
    store_rows,
    times,
    token_offset,
)
from .walk import rows_of_tile, tile_of_program
from .windows import UNIT, are_queries, key_positions, margins, modes, per_key, reach, span

# Wider heads are worked on in blocks of channels of so many bytes a row.
MOST_BYTES = 256


@triton.jit
def _count(low, high, SHAPE: tl.constexpr):
    """Blocks along ``low .. high``; a key of a strided causal axis may have no query."""
    return (
        tl.maximum(tl.cdiv(high[0] - low[0], SHAPE[0]), 0),
        tl.maximum(tl.cdiv(high[1] - low[1], SHAPE[1]), 0),
        tl.maximum(tl.cdiv(high[2] - low[2], SHAPE[2]), 0),
    )


@triton.jit
def _slot(p, kernel_size):
    """Number of a slot, a key's part or a window start's part of it."""
    return (p[0].to(tl.int64) * kernel_size[1] + p[1]) * kernel_size[2] + p[2]


@triton.jit
def _down(x):
    """``[R]`` per axis as a column."""
    return x[0][:, None], x[1][:, None], x[2][:, None]


@triton.jit
def _across(x):
    """``[C]`` per axis as a row."""
    return x[0][None, :], x[1][None, :], x[2][None, :]


@triton.jit
def _inside(p, starts, ends, MODES: tl.constexpr, allowed):
    """``allowed`` and where ``p`` lies in ``starts .. ends``."""
    for axis in tl.static_range(3):
        if MODES[axis] != UNIT:
            allowed = allowed & (p[axis] >= starts[axis]) & (p[axis] < ends[axis])
    return allowed


@triton.jit
def _located(shape, key_lengths, offset, dilation, group, PER_KEY: tl.constexpr):
    """The :class:`Span` of a dilation group, and how many tokens come before the first query."""
    if PER_KEY[2] > 0:
        own, before_first = span(shape, key_lengths, offset, dilation, group, PER_KEY), offset
    else:
        own, before_first = span(shape, shape, offset, dilation, group, PER_KEY), (0, 0, 0)
    return own, before_first


@kernel(triton.jit, tensors="query key attn")
def qk_kernel(
    query, key, attn,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, a_b, a_0, a_1, a_2, a_h,
    L0, L1, L2, KEY_L0, KEY_L1, KEY_L2, P0, P1, P2, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    T0, T1, T2, heads,
    MODES: tl.constexpr, PER_KEY: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Numbers are the forward kernel's. ``CUT``: windows may end after the last key."""
    N: tl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    kernel_size, stride, dilation = (K0, K1, K2), (S0, S1, S2), (D0, D1, D2)
    tile, group, head, batch = tile_of_program((T0, T1, T2), dilation, heads)
    begin = times(tile, Q_BLOCK)
    own, start = _located(
        (L0, L1, L2), (KEY_L0, KEY_L1, KEY_L2), (P0, P1, P2), dilation, group, PER_KEY
    )
    begin = plus(own.first, begin)
    if outside(begin, own.n):
        return
    rows = rows_of_tile(begin, own, kernel_size, stride, MODES, PER_KEY, Q_BLOCK, False)
    # The tensors of queries begin at their first one, [M] per axis.
    x = minus(query_tokens(rows.position, group, dilation, own.n_keys, MODES, PER_KEY), start)
    d = tl.arange(0, BLOCK_D)
    q_at = token_offset(batch * q_b + head * q_h, x, (q_0, q_1, q_2), ALIGN)
    q = load_rows(query, q_at, rows.real, d, D)  # [M, BLOCK_D]
    slots = token_offset(batch * a_b + head * a_h, x, (a_0, a_1, a_2), 1)
    slots -= _slot(rows.starts, kernel_size)  # [M]
    c = coordinates(tl.arange(0, N), KV_BLOCK)
    margin = margins(own.n_keys, MODES, (0, 0, 0))

    # Every slot is written, also those that causality masks.
    count = _count(rows.low, plus(rows.all_low, kernel_size), KV_BLOCK)
    for block in range(0, count[0] * count[1] * count[2]):
        p = plus(plus(rows.low, times(coordinates(block, count), KV_BLOCK)), c)  # [N] per axis
        present = before(p, plus(own.n_keys, margin))
        y = key_tokens(p, group, dilation, own.n_keys, MODES)
        k_at = token_offset(batch * k_b + head * k_h, y, (k_0, k_1, k_2), ALIGN)
        k = load_rows(key, k_at, present, d, D)  # [N, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        for first in tl.static_range(BLOCK_D, D, BLOCK_D):
            wide = load_rows(query, q_at, rows.real, first + d, D)  # [M, BLOCK_D]
            k = load_rows(key, k_at, present, first + d, D)
            s = tl.dot(wide, tl.trans(k), s, input_precision=PRECISION)
        starts = _down(rows.starts)
        allowed = _inside(_across(p), starts, _down(rows.ends), MODES, present[None, :])
        slots_end = plus(starts, kernel_size)
        held = _inside(_across(p), starts, slots_end, MODES, rows.real[:, None])
        s = tl.where(allowed, s, 0.0).to(attn.dtype.element_ty)
        at = slots[:, None] + _slot(p, kernel_size)[None, :]  # [M, N]
        held &= before(_across(p), slots_end) if CUT else present[None, :]
        tl.store(attn + at, s, mask=held)


@kernel(triton.jit, tensors="attn value out")
def av_kernel(
    attn, value, out,
    a_b, a_0, a_1, a_2, a_h, v_b, v_0, v_1, v_2, v_h, o_b, o_0, o_1, o_2, o_h,
    L0, L1, L2, KEY_L0, KEY_L1, KEY_L2, P0, P1, P2, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    T0, T1, T2, heads,
    MODES: tl.constexpr, PER_KEY: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The arguments are ``qk_kernel``'s; a program has one block of channels."""
    M: tl.constexpr = Q_BLOCK[0] * Q_BLOCK[1] * Q_BLOCK[2]
    N: tl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    kernel_size, stride, dilation = (K0, K1, K2), (S0, S1, S2), (D0, D1, D2)
    tile, group, head, batch = tile_of_program((T0, T1, T2), dilation, heads)
    begin = times(tile, Q_BLOCK)
    own, start = _located(
        (L0, L1, L2), (KEY_L0, KEY_L1, KEY_L2), (P0, P1, P2), dilation, group, PER_KEY
    )
    begin = plus(own.first, begin)
    if outside(begin, own.n):
        return
    rows = rows_of_tile(begin, own, kernel_size, stride, MODES, PER_KEY, Q_BLOCK, False)
    # The tensors of queries begin at their first one, [M] per axis.
    x = minus(query_tokens(rows.position, group, dilation, own.n_keys, MODES, PER_KEY), start)
    slots = token_offset(batch * a_b + head * a_h, x, (a_0, a_1, a_2), 1)
    slots -= _slot(rows.starts, kernel_size)  # [M]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = coordinates(tl.arange(0, N), KV_BLOCK)
    margin = margins(own.n_keys, MODES, (0, 0, 0))

    acc = tl.zeros([M, BLOCK_D], dtype=tl.float32)
    count = _count(rows.low, plus(rows.all_low, kernel_size), KV_BLOCK)
    for block in range(0, count[0] * count[1] * count[2]):
        p = plus(plus(rows.low, times(coordinates(block, count), KV_BLOCK)), c)  # [N] per axis
        present = before(p, plus(own.n_keys, margin))
        y = key_tokens(p, group, dilation, own.n_keys, MODES)
        v_at = token_offset(batch * v_b + head * v_h, y, (v_0, v_1, v_2), ALIGN)
        v = load_rows(value, v_at, present, d, D)  # [N, BLOCK_D]
        allowed = rows.real[:, None] & present[None, :]
        allowed = _inside(_across(p), _down(rows.starts), _down(rows.ends), MODES, allowed)
        at = slots[:, None] + _slot(p, kernel_size)[None, :]
        w = tl.load(attn + at, mask=allowed, other=0.0).to(v.dtype)  # [M, N]
        acc = tl.dot(w, v, acc, input_precision=PRECISION)
    at = token_offset(batch * o_b + head * o_h, x, (o_0, o_1, o_2), 1)
    store_rows(out, at, rows.real, d, D, acc)


@kernel(triton.jit, tensors="attn value out")
def av_transposed_kernel(
    attn, value, out,
    a_b, a_0, a_1, a_2, a_h, v_b, v_0, v_1, v_2, v_h, o_b, o_0, o_1, o_2, o_h,
    L0, L1, L2, KEY_L0, KEY_L1, KEY_L2, P0, P1, P2, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    T0, T1, T2, heads,
    MODES: tl.constexpr, PER_KEY: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The arguments are ``av_kernel``'s; tiles ``T`` are of keys, ``value`` belongs to queries."""
    M: tl.constexpr = Q_BLOCK[0] * Q_BLOCK[1] * Q_BLOCK[2]
    N: tl.constexpr = KV_BLOCK[0] * KV_BLOCK[1] * KV_BLOCK[2]
    kernel_size, stride, dilation = (K0, K1, K2), (S0, S1, S2), (D0, D1, D2)
    tile, group, head, batch = tile_of_program((T0, T1, T2), dilation, heads)
    begin = times(tile, KV_BLOCK)
    own, start = _located(
        (L0, L1, L2), (KEY_L0, KEY_L1, KEY_L2), (P0, P1, P2), dilation, group, PER_KEY
    )
    if outside(begin, own.n_keys):
        return
    rows = rows_of_tile(begin, own, kernel_size, stride, MODES, PER_KEY, KV_BLOCK, True)
    keys = _slot(rows.position, kernel_size)  # [N]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = coordinates(tl.arange(0, M), Q_BLOCK)
    margin = margins(own.n_keys, MODES, PER_KEY)

    acc = tl.zeros([N, BLOCK_D], dtype=tl.float32)
    count = _count(rows.low, rows.high, Q_BLOCK)
    for block in range(0, count[0] * count[1] * count[2]):
        i = plus(plus(rows.low, times(coordinates(block, count), Q_BLOCK)), r)  # [M] per axis
        real = are_queries(i, own, before(i, plus(own.n, margin)), MODES, PER_KEY)
        x = minus(query_tokens(i, group, dilation, own.n_keys, MODES, PER_KEY), start)
        v_at = token_offset(batch * v_b + head * v_h, x, (v_0, v_1, v_2), ALIGN)
        v = load_rows(value, v_at, real, d, D)  # [M, BLOCK_D]
        first, _ = reach(i, own, kernel_size, stride, MODES, PER_KEY, False)
        slots = token_offset(batch * a_b + head * a_h, x, (a_0, a_1, a_2), 1)
        slots -= _slot(first, kernel_size)  # [M]
        allowed = real[:, None] & rows.real[None, :]
        allowed = _inside(_down(i), _across(rows.starts), _across(rows.ends), MODES, allowed)
        # Slots of a query lie side by side: read by query, then transpose.
        at = slots[:, None] + keys[None, :]
        w = tl.load(attn + at, mask=allowed, other=0.0).to(v.dtype)  # [M, N]
        acc = tl.dot(tl.trans(w), v, acc, input_precision=PRECISION)
    y = key_tokens(rows.position, group, dilation, own.n_keys, MODES)
    at = token_offset(batch * o_b + head * o_h, y, (o_0, o_1, o_2), 1)
    store_rows(out, at, rows.real, d, D, acc)


@triton.jit
def _windows_of_queries(
    x, shape, key_lengths, offset, kernel_size, stride, dilation, MODES: tl.constexpr,
    PER_KEY: tl.constexpr,
):  # fmt: skip
    """Key positions of queries in their dilation groups, and starts and ends of their windows."""
    key_shape = shape
    if PER_KEY[2] > 0:
        x = key_positions(plus(x, offset), key_lengths, MODES, PER_KEY)
        key_shape = key_lengths
    i = x[0] // dilation[0], x[1] // dilation[1], x[2] // dilation[2]
    group = x[0] % dilation[0], x[1] % dilation[1], x[2] % dilation[2]
    own = span(key_shape, key_shape, (0, 0, 0), dilation, group, (0, 0, 0))
    starts, ends = reach(i, own, kernel_size, stride, MODES, (0, 0, 0), False)
    return i, starts, ends


@kernel(triton.jit, tensors="rpb out")
def slot_bias_kernel(
    rpb, out, L0, L1, L2, KEY_L0, KEY_L1, KEY_L2, P0, P1, P2, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    MODES: tl.constexpr, PER_KEY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The bias in every slot: ``out [heads, *space, window tokens]``."""
    head, slots = tl.program_id(2).to(tl.int64), K0 * K1 * K2
    shape, kernel_size = (L0, L1, L2), (K0, K1, K2)
    x = tl.program_id(0) * M + tl.arange(0, M)
    slot = tl.program_id(1) * N + tl.arange(0, N)
    i, starts, ends = _windows_of_queries(
        coordinates(x, shape), shape, (KEY_L0, KEY_L1, KEY_L2), (P0, P1, P2), kernel_size,
        (S0, S1, S2), (D0, D1, D2), MODES, PER_KEY,
    )  # fmt: skip
    p = plus(_down(starts), _across(coordinates(slot, kernel_size)))
    held = (x < L0 * L1 * L2)[:, None] & (slot < slots)[None, :]
    allowed = held & before(p, _down(ends))
    at = bias_offset(minus(p, _down(i)), kernel_size, head)
    bias = tl.load(rpb + at, mask=allowed, other=0.0)
    rows = head * L0 * L1 * L2 + x
    tl.store(out + rows[:, None] * slots + slot[None, :], bias, mask=held)


@kernel(triton.jit, tensors="grad_out grad_rpb")
def slot_bias_transposed_kernel(
    grad_out, grad_rpb, a_0, a_1, a_2, a_h, L0, L1, L2, KEY_L0, KEY_L1, KEY_L2, P0, P1, P2,
    K0, K1, K2, S0, S1, S2, D0, D1, D2, offsets, per_split,
    MODES: tl.constexpr, PER_KEY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Sums over one split of the queries, ``grad_rpb [splits, heads, offsets]``.

    Offsets fix the slot of each query, so that nothing is scattered.
    """
    split_id, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    shape, kernel_size = (L0, L1, L2), (K0, K1, K2)
    at = tl.program_id(1) * N + tl.arange(0, N)
    o = coordinates(at, (1, 2 * K1 - 1, 2 * K2 - 1))
    o = minus(o, (K0 - 1, K1 - 1, K2 - 1))
    acc = tl.zeros([M, N], dtype=tl.float32)
    for first in range(0, per_split, M):
        own = first + tl.arange(0, M)
        rows = split_id * per_split + own
        x = coordinates(rows, shape)
        i, starts, ends = _windows_of_queries(
            x, shape, (KEY_L0, KEY_L1, KEY_L2), (P0, P1, P2), kernel_size,
            (S0, S1, S2), (D0, D1, D2), MODES, PER_KEY,
        )  # fmt: skip
        p = plus(_down(i), _across(o))
        allowed = ((own < per_split) & (rows < L0 * L1 * L2))[:, None] & (at < offsets)[None, :]
        allowed = _inside(p, _down(starts), _down(ends), MODES, allowed)
        slots = token_offset(head * a_h, x, (a_0, a_1, a_2), 1)[:, None]
        slots += _slot(minus(p, _down(starts)), kernel_size)
        acc += tl.load(grad_out + slots, mask=allowed, other=0.0).to(tl.float32)
    to = (split_id.to(tl.int64) * tl.num_programs(2) + head) * offsets + at
    tl.store(grad_rpb + to, tl.sum(acc, 0), mask=at < offsets)


class _Map(NamedTuple):
    """A kernel of two tensors and a result."""

    kernel: Any
    kind: str  # of kernel that has tiles like these
    strides: str  # what the kernel calls those of its tensors, in their order
    aligned: str  # of these, those whose rows are heads; weights have rows of any length


_MAPS = {
    "qk": _Map(qk_kernel, "forward", "qka", "qk"),
    "av": _Map(av_kernel, "forward", "avo", "v"),
    "av_transposed": _Map(av_transposed_kernel, "dkdv", "avo", "v"),
}


@tuning.cached
def _made_for_parts(*kind: Any) -> dict[str, Any]:
    """Tiles and launch of a map, once they are made, which parts share that differ in where they
    are; ``kind`` says what else they are."""
    return {}


@tuning.cached
def _map_launch(
    name: str,
    rule: Neighborhood,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    space: tuple[int, ...],
    key_space: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    tf32: bool,
) -> Launch:
    """The kernel of a map of queries ``space`` and keys ``key_space``; ``shape`` is of its second
    tensor, ``strides`` are of all three."""
    each, (batch, *_, heads, dim), itemsize = _MAPS[name], shape, dtypes[1].itemsize
    # As of narrow heads: addresses of single weights fill the registers beside large tiles.
    narrow = min(dim, 128 // itemsize)
    named = {letter: strides_of(letter, x) for letter, x in zip(each.strides, strides)}
    align = math.gcd(16, *(s for letter in each.aligned for s in named[letter].values()))
    made: dict[str, Any] = {}
    if has_shared_kernels(rule, *strides):
        made = _made_for_parts(
            *windows_of(rule), name, device, dtypes, batch, heads, dim, space, align, tf32
        )
    if "tiles" not in made:
        made["tiles"] = tiling.choose(each.kind, rule, space, key_space, narrow, narrow, itemsize)
    tiles = made["tiles"]
    if each.kind == "dkdv":
        counts = tile_counts(rule, key_space, tiles.kv_block, of_keys=True)
    else:
        counts = tile_counts(rule, space, tiles.q_block)
    block_d = tiling.padded_channels(min(dim, MOST_BYTES // itemsize))
    arguments = {
        **sizes(rule, space, key_space), **per_axis("T", counts), "heads": heads,
        "MODES": modes(rule, key_space), "PER_KEY": per_key(rule), "Q_BLOCK": tiles.q_block,
        "KV_BLOCK": tiles.kv_block, "ALIGN": align, "D": dim, "BLOCK_D": block_d,
        "PRECISION": "tf32" if tf32 else "ieee",
    }  # fmt: skip
    if name == "qk":
        arguments["CUT"] = "truncate" in rule.boundary
    for letter in each.strides:
        arguments |= named[letter]
    programs = math.prod(counts) * math.prod(rule.dilation) * batch * heads
    grid = programs, 1 if name == "qk" else -(-dim // block_d)
    if "launch" in made:
        return made["launch"].moved(grid, [arguments[name] for name in made["launch"].arguments])
    warps = 8 if block_d > 32 else 4
    made["launch"] = Launch(each.kernel, grid, arguments, num_warps=warps, num_stages=2)
    return made["launch"]


def _run(
    name: str, a: Tensor, b: Tensor, channels: int, key_space: Shape, rule: Neighborhood
) -> Tensor:
    """A map of ``a``, which queries have, and ``b``; the result is heads-first in memory."""
    like = a if name == "qk" else b
    space, of_result = a.shape[1:-2], key_space if name == "av_transposed" else a.shape[1:-2]
    out = like.new_empty(len(b), b.shape[-2], *of_result, channels).movedim(1, -2)
    if out.numel() == 0:
        return out
    a, b = readable(a), readable(b)
    tensors = (a, b, out)
    with on_device(b):
        launch = _map_launch(
            name,
            rule,
            b.device,
            tuple(x.dtype for x in tensors),
            tuple(b.shape),
            tuple(space),
            tuple(key_space),
            tuple(x.stride() for x in tensors),
            b.dtype == torch.float32 and allows_tf32(),
        )
        launch.run(**dict(zip(launch.tensors, tensors)))
    return out


def qk(query: Tensor, key: Tensor, rule: Neighborhood) -> Tensor:
    """Products of every query with its window's keys; 0 in masked slots."""
    return _run("qk", query, key, rule.window_tokens, key.shape[1:-2], rule)


def av(attn: Tensor, value: Tensor, rule: Neighborhood) -> Tensor:
    """Sum of the window's values, weighted; masked slots are ignored."""
    return _run("av", attn, value, value.shape[-1], value.shape[1:-2], rule)


def av_transposed(attn: Tensor, x: Tensor, key_space: Shape, rule: Neighborhood) -> Tensor:
    """For every key, the sum of ``x`` at the queries that attend it, weighted."""
    return _run("av_transposed", attn, x, x.shape[-1], key_space, rule)


def rpb_bias(rpb: Tensor, shape: Shape, key_shape: Shape, rule: Neighborhood) -> Tensor:
    """``rpb`` in every window slot, ``[*space, heads, window tokens]``; 0 in masked slots."""
    heads, slots, tokens = rpb.shape[0], rule.window_tokens, math.prod(shape)
    out = rpb.new_empty(heads, *shape, slots)
    rpb = contiguous(rpb)
    grid = (-(-tokens // 16), -(-slots // 64), heads)
    arguments = {
        **sizes(rule, shape, key_shape), "MODES": modes(rule, key_shape), "PER_KEY": per_key(rule),
        "M": 16, "N": 64,
    }  # fmt: skip
    with on_device(rpb):
        Launch(slot_bias_kernel, grid, arguments).run(rpb=rpb, out=out)
    return out.movedim(0, -2)


def rpb_bias_transposed(grad: Tensor, key_shape: Shape, rule: Neighborhood) -> Tensor:
    """The gradient of ``rpb`` from ``grad [*space, heads, window tokens]``."""
    *shape, heads, _ = grad.shape
    grad = readable(grad)
    *strides, head_stride, _ = grad.stride()
    table = [2 * k - 1 for k in rule.kernel_size]
    offsets, tokens = math.prod(table), math.prod(shape)
    blocks = -(-offsets // 32)
    # Enough splits to fill a GPU; more would only cost memory.
    splits = max(1, min(tokens // 64, 4096 // (blocks * heads)))
    found = grad.new_empty(splits, heads, *table, dtype=torch.float32)
    per_split = -(-tokens // splits)
    arguments = {
        **{f"a_{axis}": stride for axis, stride in zip("012", padded(strides, 0))},
        "a_h": head_stride, **sizes(rule, shape, key_shape), "offsets": offsets,
        "per_split": per_split, "MODES": modes(rule, key_shape), "PER_KEY": per_key(rule),
        "M": 32, "N": 32,
    }  # fmt: skip
    with on_device(grad):
        launch = Launch(slot_bias_transposed_kernel, (splits, blocks, heads), arguments)
        launch.run(grad_out=grad, grad_rpb=found)
    return found.sum(0).to(grad.dtype)
