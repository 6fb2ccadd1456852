"""Unfused attention: maps that are linear in each of their tensors, and each other's derivatives.

Tensors are heads-first, ``[batch, heads, *space, channels]``.

* ``qk(query, key)``: products of each query with the keys of its window;
* ``av(attn, value)``: weighted sums of each window's values;
* ``av_transposed(attn, x, key_shape)``: for each key of this layout, the weighted sum over the
  queries that attend it;
* ``rpb_bias(rpb, shape, key_shape)`` and ``rpb_bias_transposed(grad, key_shape)``: the bias in
  every window slot of queries of this shape, and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _tracing, backends, gather
from .._library import differentiate, implement, ops
from ..neighborhood import Neighborhood
from .schema import RULE_ARGUMENTS, pack, unpack
from .transforms import merge, refuse_forward_mode, refuse_nested_forward_mode, split


def _unfused_backend(x: Tensor, rule: Neighborhood) -> backends.Backend:
    """The backend that runs the unfused maps."""
    problem = backends.Problem("unfused", x.device, x.dtype, rule=rule)
    return backends.runner_of(backends.choose("", problem), problem)


def _real_qk(query: Tensor, key: Tensor, *packed: Any) -> Tensor:
    rule = unpack(*packed)
    # A trace may see smaller tensors than those it was made with.
    rule.check(query.shape[2:-1], key.shape[2:-1])
    out = _unfused_backend(key, rule).qk(query.movedim(1, -2), key.movedim(1, -2), rule)
    return out.movedim(-2, 1).contiguous()


def _fake_qk(query: Tensor, key: Tensor, kernel_size: Sequence[int], *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], math.prod(kernel_size))


def _real_av(attn: Tensor, value: Tensor, *packed: Any) -> Tensor:
    rule = unpack(*packed)
    rule.check(attn.shape[2:-1], value.shape[2:-1])
    out = _unfused_backend(value, rule).av(attn.movedim(1, -2), value.movedim(1, -2), rule)
    return out.movedim(-2, 1).contiguous()


def _fake_av(attn: Tensor, value: Tensor, *_: Any) -> Tensor:
    return value.new_empty(*attn.shape[:-1], value.shape[-1])


def _real_av_transposed(attn: Tensor, x: Tensor, key_shape: Sequence[int], *packed: Any) -> Tensor:
    rule = unpack(*packed)
    rule.check(x.shape[2:-1], key_shape)
    backend = _unfused_backend(x, rule)
    out = backend.av_transposed(attn.movedim(1, -2), x.movedim(1, -2), tuple(key_shape), rule)
    return out.movedim(-2, 1).contiguous()


def _fake_av_transposed(attn: Tensor, x: Tensor, key_shape: Sequence[int], *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], *key_shape, x.shape[-1])


def _real_bias(rpb: Tensor, shape: Sequence[int], key_shape: Sequence[int], *packed: Any) -> Tensor:
    rule = unpack(*packed)
    out = _unfused_backend(rpb, rule).rpb_bias(rpb, tuple(shape), tuple(key_shape), rule)
    return out.movedim(-2, 0).contiguous()


def _fake_bias(
    rpb: Tensor, shape: Sequence[int], key_shape: Sequence[int], kernel_size: Sequence[int], *_: Any
) -> Tensor:
    return rpb.new_empty(rpb.shape[0], *shape, math.prod(kernel_size))


def _real_bias_transposed(grad: Tensor, key_shape: Sequence[int], *packed: Any) -> Tensor:
    rule = unpack(*packed)
    backend = _unfused_backend(grad, rule)
    return backend.rpb_bias_transposed(grad.movedim(0, -2), tuple(key_shape), rule).contiguous()


def _fake_bias_transposed(
    grad: Tensor, key_shape: Sequence[int], kernel_size: Sequence[int], *_: Any
) -> Tensor:
    return grad.new_empty(grad.shape[0], *(2 * k - 1 for k in kernel_size))


def _linear(
    name: str,
    real: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    gradients: Callable[..., Sequence[Any]],
) -> Callable[..., Tensor]:
    """Implement the operator ``name``, a map that is linear in each of its tensors.

    ``gradients(grad, *tensors, *others, rule, needs)`` gives one gradient per tensor, in terms of
    such maps. The map takes the tensors, then other arguments, then the rule. ``plain`` is the same
    map in PyTorch's own operators.
    """
    implement(name, real, fake)
    operator = getattr(ops, name)

    def call(*args: Any) -> Tensor:
        if torch.compiler.is_compiling() or _tracing.is_traced():
            refuse_forward_mode()
            if _tracing.is_for_onnx():
                return plain(*args)
            rule = args[-1]
            return _tracing.record(operator, rule.rank, *args[:-1], *pack(rule))
        return Map.apply(*args)

    class Map(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Tensor:
            return operator(*args[:-1], *pack(args[-1]))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            ctx.others = inputs[len(tensors) :]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            _tracing.refuse_gradients()
            found = gradients(grad, *ctx.saved_tensors, *ctx.others, ctx.needs_input_grad)
            return (*found, *(None for _ in ctx.others))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor:
            refuse_nested_forward_mode()
            primals = ctx.saved_tensors
            parts = [
                call(*primals[:i], tangents[i], *primals[i + 1 :], *ctx.others)
                for i in range(len(primals))
                if tangents[i] is not None
            ]
            return sum(parts[1:], parts[0])

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
            size = info.batch_size
            merged = [merge(x, dim, size, 0) for x, dim in zip(args, in_dims)]
            return split(call(*merged), size, 0), 0

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        # The operator's rule is several arguments, the Function's is one.
        packed = inputs[-RULE_ARGUMENTS:]
        Map.setup_context(ctx, (*inputs[:-RULE_ARGUMENTS], unpack(*packed)), output)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*Map.backward(ctx, grad), *(None,) * (RULE_ARGUMENTS - 1))

    differentiate(name, backward, setup)
    Map.__name__ = Map.__qualname__ = call.__name__ = name
    return call


qk: Callable[..., Tensor] = _linear(
    "qk",
    _real_qk,
    _fake_qk,
    gather.qk,
    lambda grad, query, key, rule, needs: (
        av(grad, key, rule) if needs[0] else None,
        av_transposed(grad, query, key.shape[2:-1], rule) if needs[1] else None,
    ),
)
av: Callable[..., Tensor] = _linear(
    "av",
    _real_av,
    _fake_av,
    gather.av,
    lambda grad, attn, value, rule, needs: (
        qk(grad, value, rule) if needs[0] else None,
        av_transposed(attn, grad, value.shape[2:-1], rule) if needs[1] else None,
    ),
)
av_transposed: Callable[..., Tensor] = _linear(
    "av_transposed",
    _real_av_transposed,
    _fake_av_transposed,
    gather.av_transposed,
    lambda grad, attn, x, key_shape, rule, needs: (
        qk(x, grad, rule) if needs[0] else None,
        av(attn, grad, rule) if needs[1] else None,
    ),
)
rpb_bias: Callable[..., Tensor] = _linear(
    "rpb_bias",
    _real_bias,
    _fake_bias,
    gather.rpb_bias,
    lambda grad, rpb, shape, key_shape, rule, needs: (rpb_bias_transposed(grad, key_shape, rule),),
)
rpb_bias_transposed: Callable[..., Tensor] = _linear(
    "rpb_bias_transposed",
    _real_bias_transposed,
    _fake_bias_transposed,
    gather.rpb_bias_transposed,
    lambda grad, x, key_shape, rule, needs: (rpb_bias(grad, x.shape[1:-1], key_shape, rule),),
)
