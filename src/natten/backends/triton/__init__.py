"""Portable GPU kernels in Triton: one source for every rank, deterministic forward and backward.

Keys are read in boxes that start where a tile's first window starts; no token is permuted, padded
or copied, except a tensor whose last stride is not 1.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

import torch
from torch import Tensor

from natten.backends.triton import tiles as tiling
from natten.backends.triton.backward import (
    bias_kernel,
    delta_kernel,
    extra_kernel,
    key_kernel,
    query_kernel,
)
from natten.backends.triton.forward import forward_kernel
from natten.backends.triton.primitives import (
    CAUSAL,
    CAUSAL_STRIDED,
    FULL,
    FULL_CAUSAL,
    SLIDING,
    STRIDED,
    UNIT,
)
from natten.neighborhood import Dense, Neighborhood, Rule

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _padded(values: Any, fill: Any) -> tuple[Any, Any, Any]:
    """Three axes: the missing ones come first."""
    values = tuple(values)
    return (*(fill,) * (3 - len(values)), *values)  # type: ignore[return-value]


def _three_axes(rule: Rule) -> Rule:
    if isinstance(rule, Dense):
        return _ThreeAxesDense(rule.causal, (1, 1, 1))
    return Neighborhood(
        _padded(rule.kernel_size, 1),
        _padded(rule.stride, 1),
        _padded(rule.dilation, 1),
        _padded(rule.is_causal, False),
    )


class _ThreeAxesDense(Dense):
    """Plain attention along the last of three axes; the others have one token."""

    def windows(self, axis: int, position: Tensor, n: Any, n_keys: Any) -> tuple[Tensor, Tensor]:
        return super().windows(axis, position, n, n_keys)


def _modes(rule: Rule, shape: Any) -> tuple[int, int, int]:
    if isinstance(rule, Dense):
        return UNIT.value, UNIT.value, (FULL_CAUSAL if rule.causal else FULL).value
    modes = []
    for length, stride, causal in zip(shape, rule.stride, rule.is_causal):
        if length == 1:
            mode = UNIT
        elif causal:
            mode = CAUSAL if stride == 1 else CAUSAL_STRIDED
        else:
            mode = SLIDING if stride == 1 else STRIDED
        modes.append(mode.value)
    return tuple(modes)  # type: ignore[return-value]


def _readable(x: Tensor) -> Tensor:
    """Kernels read channels one after another."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Batch, three axes, heads, of ``x [batch, *space, heads, channels]``."""
    batch, *space, heads, _ = x.stride()
    return (batch, *_padded(space, 0), heads)


def _extra_strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _device(x: Tensor) -> Any:
    """Kernels launch on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _precision(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


class _Problem:
    """What all kernels of one call share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> None:
        self.rule = _three_axes(rule)
        self.shape = _padded(query.shape[1:-2], 1)
        self.key_shape = _padded(key.shape[1:-2], 1)
        self.batch, self.heads, self.kv_heads = query.shape[0], query.shape[-2], key.shape[-2]
        self.dim, self.value_dim = query.shape[-1], value.shape[-1]
        self.itemsize = query.element_size()
        plain = isinstance(self.rule, Dense)
        self.window = (
            ((1, 1, 1), (1, 1, 1), (1, 1, 1))
            if plain
            else (self.rule.kernel_size, self.rule.stride, self.rule.dilation)  # type: ignore[union-attr]
        )
        self.constants = dict(
            MODES=_modes(self.rule, self.shape),
            PER_KV=self.heads // self.kv_heads,
            D=self.dim,
            DV=self.value_dim,
            BLOCK_D=tiling.block(self.dim),
            BLOCK_DV=tiling.block(self.value_dim),
        )

    def tiles(self, kind: str) -> tiling.Tiles:
        return tiling.choose(
            kind, self.rule, self.shape, self.key_shape, self.dim, self.value_dim, self.itemsize
        )

    def counts(self, shape: Any, tile: Any) -> tuple[int, ...]:
        """Tiles per axis of the longest dilation group."""
        lengths = (-(-length // d) for length, d in zip(shape, self.rule.dilation))
        return tuple(-(-length // t) for length, t in zip(lengths, tile))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
    rule: Rule,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value dim]`` and LSE ``[batch, *space, heads]``."""
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query, key, value = (_readable(x) for x in (query, key, value))
    problem, config = _Problem(query, key, value, rule), None
    config = problem.tiles("forward")
    counts = problem.counts(problem.shape, config.query)
    programs = math.prod(counts) * math.prod(problem.rule.dilation) * problem.heads * problem.batch
    extra_keys = None if extra_keys is None else _readable(extra_keys)
    extra_values = None if extra_values is None else _readable(extra_values)
    with _device(query):
        forward_kernel[(programs,)](
            query, key, value, query if rpb is None else rpb.contiguous(),
            query if extra_keys is None else extra_keys,
            query if extra_values is None else extra_values, out, lse,
            _strides(query), _strides(key), _strides(value),
            _extra_strides(extra_keys), _extra_strides(extra_values),
            _strides(out), _strides(lse[..., None]),
            problem.shape, problem.key_shape, *problem.window, counts, problem.heads,
            0 if extra_keys is None else extra_keys.shape[1], scale,
            TQ=config.query, TK=config.key, HAS_RPB=rpb is not None,
            HAS_EXTRA=extra_keys is not None, PRECISION=_precision(query.dtype),
            **problem.constants, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, rpb, additional keys and additional values."""
    grad_query, grad_key, grad_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    if key.numel() == 0 or query.numel() == 0:
        none = (None if x is None else torch.zeros_like(x) for x in (rpb, extra_keys, extra_values))
        return (grad_query.zero_(), grad_key.zero_(), grad_value.zero_(), *none)
    query, key, value = (_readable(x) for x in (query, key, value))
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    rpb = None if rpb is None else rpb.contiguous()
    has_extra = extra_keys is not None and extra_values is not None
    ek = _readable(extra_keys) if extra_keys is not None else query
    ev = _readable(extra_values) if extra_values is not None else query
    extra = 0 if extra_keys is None else extra_keys.shape[1]
    delta = torch.empty_like(lse)
    problem, precision = _Problem(query, key, value, rule), _precision(query.dtype)
    bias = query if rpb is None else rpb
    q, k, v = (_strides(x) for x in (query, key, value))
    o, row = _strides(out), _strides(lse[..., None])
    groups = math.prod(problem.rule.dilation) * problem.batch
    grad_rpb = grad_ek = grad_ev = None
    with _device(query):
        delta_kernel[(-(-lse.numel() // 16),)](
            out, grad_out, lse if grad_lse is None else grad_lse.contiguous(), delta, lse.numel(),
            DV=problem.value_dim, BLOCK_DV=tiling.block(problem.value_dim),
            HAS_LSE=grad_lse is not None, M=16,
        )  # fmt: skip
        config = problem.tiles("query")
        counts = problem.counts(problem.shape, config.query)
        query_kernel[(math.prod(counts) * groups * problem.heads,)](
            query, key, value, bias, ek, ev, grad_out, lse, delta, grad_query,
            q, k, v, _extra_strides(ek if has_extra else None),
            _extra_strides(ev if has_extra else None), o, row, _strides(grad_query),
            problem.shape, problem.key_shape, *problem.window, counts, problem.heads, extra, scale,
            TQ=config.query, TK=config.key, HAS_RPB=rpb is not None, HAS_EXTRA=has_extra,
            PRECISION=precision, **problem.constants,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        config = problem.tiles("key")
        counts = problem.counts(problem.key_shape, config.key)
        key_kernel[(math.prod(counts) * groups * problem.kv_heads,)](
            query, key, value, bias, grad_out, lse, delta, grad_key, grad_value,
            q, k, v, o, row, _strides(grad_key), _strides(grad_value),
            problem.shape, problem.key_shape, *problem.window, counts, problem.kv_heads, scale,
            TQ=config.query, TK=config.key, HAS_RPB=rpb is not None, PRECISION=precision,
            **problem.constants, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        constants = dict(problem.constants)
        modes = constants.pop("MODES")
        if has_extra:
            grad_ek, grad_ev = _extra_gradients(
                problem,
                query,
                ek,
                ev,
                grad_out,
                lse,
                delta,
                (q, o, row),
                scale,
                precision,
                constants,
            )
        if rpb is not None:
            grad_rpb = _bias_gradient(
                problem, query, key, value, rpb, grad_out, lse, delta, (q, k, v, o, row), scale,
                modes, constants,
            )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_rpb, grad_ek, grad_ev


def _splits(work: int, least: int, most: int) -> tuple[int, int]:
    """How many programs share ``work`` items, and how many items each takes."""
    splits = max(1, min(most, work // least))
    return splits, -(-work // splits)


def _extra_gradients(
    problem: _Problem, query: Tensor, ek: Tensor, ev: Tensor, grad_out: Tensor, lse: Tensor,
    delta: Tensor, strides: Any, scale: float, precision: str, constants: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every query reaches the additional tokens: partial sums, then one sum over the parts."""
    extra, rows = ek.shape[1], 16
    splits, per_split = _splits(math.prod(problem.shape), 512, 64)
    parts = (problem.batch, problem.kv_heads, splits, extra)
    grad_ek = query.new_empty(*parts, problem.dim, dtype=torch.float32)
    grad_ev = query.new_empty(*parts, problem.value_dim, dtype=torch.float32)
    if extra == 0:
        return torch.zeros_like(ek), torch.zeros_like(ev)
    q, o, row = strides
    extra_kernel[(splits, -(-extra // rows), problem.batch * problem.kv_heads)](
        query, ek, ev, grad_out, lse, delta, grad_ek, grad_ev,
        q, _extra_strides(ek), _extra_strides(ev), o, row,
        problem.shape, problem.kv_heads, extra, per_split, scale,
        M=32, N=rows, PRECISION=precision, **constants,
    )  # fmt: skip
    sums = (x.sum(2).transpose(1, 2).contiguous() for x in (grad_ek, grad_ev))
    grad_ek, grad_ev = (x.to(like.dtype) for x, like in zip(sums, (ek, ev)))
    return grad_ek, grad_ev


def _bias_gradient(
    problem: _Problem, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor, grad_out: Tensor,
    lse: Tensor, delta: Tensor, strides: Any, scale: float, modes: Any, constants: Any,
) -> Tensor:  # fmt: skip
    offsets, rows = rpb[0].numel(), 32
    splits, per_split = _splits(math.prod(problem.shape) * problem.batch, 64, 512)
    partial = query.new_empty(splits, problem.heads, offsets, dtype=torch.float32)
    bias_kernel[(splits, -(-offsets // rows), problem.heads)](
        query, key, value, rpb, grad_out, lse, delta, partial, *strides,
        problem.shape, *problem.window, problem.heads, problem.batch, offsets, per_split, scale,
        MODES=modes, N=rows, **constants,
    )  # fmt: skip
    return partial.sum(0).view(rpb.shape).to(rpb.dtype)
