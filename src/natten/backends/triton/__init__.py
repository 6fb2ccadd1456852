"""Portable GPU kernels in Triton: one source for every rank, deterministic forward and backward.

Keys are read in boxes that start where a tile's first window starts; no token is permuted, padded
or copied, except a tensor whose last stride is not 1. What is a compile-time constant: dtype, head
dims, tile shapes, which axes are causal or strided or have one token, whether there is a bias or
additional tokens, and the largest power of two (up to 16) that divides all strides.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
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
from natten.neighborhood import Dense, Rule


def _padded(values: Sequence[Any], fill: Any) -> tuple[Any, ...]:
    """Three axes: the missing ones come first."""
    return (*(fill,) * (3 - len(values)), *values)


def _modes(rule: Rule, shape: Sequence[int]) -> tuple[int, ...]:
    """How the windows of each of three axes go."""
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
    return _padded(modes, UNIT.value)


def _readable(x: Tensor) -> Tensor:
    """Kernels read channels one after another."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Batch, three axes, heads, of ``x [batch, *space, heads, channels]``."""
    batch, *space, heads, _ = x.stride()
    return (batch, *_padded(space, 0), heads)


def _device(x: Tensor) -> Any:
    """Kernels launch on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


class _Call:
    """What the kernels of one call share: contiguous or readable inputs, sizes, constants."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        extra_keys: Tensor | None,
        extra_values: Tensor | None,
        rule: Rule,
        scale: float,
    ) -> None:
        self.query, self.key, self.value = (_readable(x) for x in (query, key, value))
        self.rpb = None if rpb is None else rpb.contiguous()
        self.extra_keys = None if extra_keys is None else extra_keys.contiguous()
        self.extra_values = None if extra_values is None else extra_values.contiguous()
        self.extra = 0 if extra_keys is None else extra_keys.shape[1]
        self.rule, self.scale = rule, scale
        self.space, self.key_space = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
        self.shape = _padded(self.space, 1)
        self.batch, self.heads, self.kv_heads = query.shape[0], query.shape[-2], key.shape[-2]
        self.per_kv = self.heads // self.kv_heads
        self.dim, self.value_dim = query.shape[-1], value.shape[-1]
        self.dilation = _padded(rule.dilation, 1)
        if isinstance(rule, Dense):
            self.window = (1, 1, 1, 1, 1, 1, *self.dilation)
        else:
            self.window = (*_padded(rule.kernel_size, 1), *_padded(rule.stride, 1), *self.dilation)
        self.modes = _modes(rule, self.space)
        self.strides = tuple(_strides(x) for x in (self.query, self.key, self.value))
        divisor = math.gcd(16, *(s for strides in self.strides for s in strides))
        tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        self.precision = "tf32" if tf32 else "ieee"
        self.channels = {
            "ALIGN": divisor,
            "D": self.dim,
            "DV": self.value_dim,
            "BLOCK_D": tiling.block(self.dim),
            "BLOCK_DV": tiling.block(self.value_dim),
        }

    def tensors(self) -> tuple[Tensor, ...]:
        """Query, key, value, rpb and additional tokens; one that is missing is never read."""
        optional = (self.rpb, self.extra_keys, self.extra_values)
        filled = (self.query if x is None else x for x in optional)
        return (self.query, self.key, self.value, *filled)

    def numbers(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Strides, sizes, window and tiles per axis, as kernels take them."""
        flat = (s for strides in self.strides for s in strides)
        return (*flat, *self.shape, self.key_space[-1], *self.window, *counts)

    def tiles(self, kind: str) -> tuple[tiling.Tiles, tuple[int, ...], int, dict[str, Any]]:
        """Tiles of a kind of kernel, how many there are per axis, programs per head, options."""
        tiles = tiling.choose(
            kind, self.rule, self.space, self.key_space,
            self.dim, self.value_dim, self.query.element_size(),
        )  # fmt: skip
        keys = kind == "key"
        outer = tiles.key if keys else tiles.query
        lengths = zip(_padded(self.key_space if keys else self.space, 1), self.dilation, outer)
        counts = tuple(math.ceil(math.ceil(length / d) / size) for length, d, size in lengths)
        options = {
            "MODES": self.modes,
            "TQ": tiles.query,
            "TK": tiles.key,
            "HAS_RPB": self.rpb is not None,
            "PRECISION": self.precision,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            **self.channels,
        }
        return tiles, counts, math.prod(counts) * math.prod(self.dilation) * self.batch, options


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
    call = _Call(query, key, value, rpb, extra_keys, extra_values, rule, scale)
    _, counts, programs, options = call.tiles("forward")
    with _device(query):
        forward_kernel[(programs * call.heads,)](
            *call.tensors(), out, lse, *call.numbers(counts),
            call.heads, call.per_kv, call.extra, scale, HAS_EXTRA=call.extra > 0, **options,
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
    if query.numel() == 0 or key.numel() == 0:
        inputs = (query, key, value, rpb, extra_keys, extra_values)
        return tuple(None if x is None else x.new_zeros(x.shape) for x in inputs)
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    grad_rpb = grad_ek = grad_ev = None
    grad_out, delta = grad_out.contiguous(), torch.empty_like(lse)
    call = _Call(query, key, value, rpb, extra_keys, extra_values, rule, scale)
    per_query = (grad_out, lse, delta)
    with _device(query):
        delta_kernel[(-(-lse.numel() // 16),)](
            out, grad_out, lse if grad_lse is None else grad_lse.contiguous(), delta, lse.numel(),
            DV=call.value_dim, BLOCK_DV=tiling.block(call.value_dim),
            HAS_LSE=grad_lse is not None, M=16,
        )  # fmt: skip
        _, counts, programs, options = call.tiles("query")
        query_kernel[(programs * call.heads,)](
            *call.tensors(), *per_query, grad_query, *call.numbers(counts),
            call.heads, call.per_kv, call.extra, scale, HAS_EXTRA=call.extra > 0, **options,
        )  # fmt: skip
        _, counts, programs, options = call.tiles("key")
        key_kernel[(programs * call.kv_heads,)](
            *call.tensors()[:4], *per_query, grad_key, grad_value, *call.numbers(counts),
            call.kv_heads, call.per_kv, scale, **options,
        )  # fmt: skip
        if extra_keys is not None:
            grad_ek, grad_ev = _extra_gradients(call, per_query)
        if rpb is not None:
            grad_rpb = _bias_gradient(call, per_query)
    return grad_query, grad_key, grad_value, grad_rpb, grad_ek, grad_ev


def _parts(work: int, least: int, most: int) -> tuple[int, int]:
    """How many programs share ``work`` items, at least ``least`` each, and how many each takes."""
    parts = max(1, min(most, work // least))
    return parts, -(-work // parts)


def _extra_gradients(call: _Call, per_query: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Every query reaches the additional tokens: sums over parts, then over the parts."""
    assert call.extra_keys is not None and call.extra_values is not None
    parts, per_part = _parts(math.prod(call.shape), 512, 64)
    shape = (call.batch, call.kv_heads, parts, call.extra)
    grads = [
        call.query.new_empty(*shape, channels, dtype=torch.float32)
        for channels in (call.dim, call.value_dim)
    ]
    if call.extra > 0:
        extra_kernel[(parts, -(-call.extra // 16), call.batch * call.kv_heads)](
            call.query, call.extra_keys, call.extra_values, *per_query, *grads,
            *call.strides[0], *call.shape, call.kv_heads, call.per_kv, call.extra, per_part,
            call.scale, M=32, N=16, PRECISION=call.precision, **call.channels,
        )  # fmt: skip
    grad_keys, grad_values = (x.sum(2).transpose(1, 2).to(call.query.dtype) for x in grads)
    return grad_keys.contiguous(), grad_values.contiguous()


def _bias_gradient(call: _Call, per_query: tuple[Tensor, ...]) -> Tensor:
    assert call.rpb is not None
    offsets = call.rpb[0].numel()
    parts, per_part = _parts(math.prod(call.shape) * call.batch, 64, 512)
    grad = call.query.new_empty(parts, call.heads, offsets, dtype=torch.float32)
    strides = (s for strides in call.strides for s in strides)
    bias_kernel[(parts, -(-offsets // 32), call.heads)](
        call.query, call.key, call.value, call.rpb, *per_query, grad,
        *strides, *call.shape, *call.window, call.heads, call.per_kv, call.batch, offsets,
        per_part, call.scale, MODES=call.modes, N=32, **call.channels,
    )  # fmt: skip
    return grad.sum(0).view(call.rpb.shape).to(call.rpb.dtype)
