"""Unfused attention: maps that are linear in each of their tensors, and each other's derivatives.

Tensors are heads-first, ``[batch, heads, *space, channels]``.

* ``qk(query, key)``: products of each query with the keys of its window;
* ``av(attn, value)``: weighted sums of each window's values;
* ``av_transposed(attn, x)``: for each key, the weighted sum over the queries that attend it;
* ``rpb_bias(rpb)`` and ``rpb_bias_transposed(grad)``: the bias in every window slot, and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _tracing, backends, gather
from .._library import differentiate, implement, ops
from .schema import pack, unpack
from .transforms import merge, refuse_forward_mode, refuse_nested_forward_mode, split


def _unfused_backend(x: Tensor) -> backends.Backend:
    """The backend that runs the unfused maps."""
    return backends.choose("", backends.Problem("unfused", x.device, x.dtype))


def _unfused(name: str) -> Callable[..., Tensor]:
    def real(a: Tensor, b: Tensor, *packed: Any) -> Tensor:
        backend, rule = _unfused_backend(b), unpack(*packed)
        rule.check(b.shape[2:-1])  # a trace may see smaller tensors than those it was made with
        out = getattr(backend, name)(a.movedim(1, -2), b.movedim(1, -2), rule)
        return out.movedim(-2, 1).contiguous()

    return real


def _fake_qk(query: Tensor, key: Tensor, kernel_size: Sequence[int], *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], math.prod(kernel_size))


def _fake_av(attn: Tensor, value: Tensor, *_: Any) -> Tensor:
    return value.new_empty(value.shape)


def _bias(rpb: Tensor, shape: Sequence[int], *rule: Any) -> Tensor:
    backend = _unfused_backend(rpb)
    return backend.rpb_bias(rpb, shape, unpack(*rule)).movedim(-2, 0).contiguous()


def _fake_bias(rpb: Tensor, shape: Sequence[int], kernel_size: Sequence[int], *_: Any) -> Tensor:
    return rpb.new_empty(rpb.shape[0], *shape, math.prod(kernel_size))


def _bias_transposed(grad: Tensor, *rule: Any) -> Tensor:
    backend = _unfused_backend(grad)
    return backend.rpb_bias_transposed(grad.movedim(0, -2), unpack(*rule)).contiguous()


def _fake_bias_transposed(grad: Tensor, kernel_size: Sequence[int], *_: Any) -> Tensor:
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
        # The operator's rule is four arguments, the Function's is one.
        Map.setup_context(ctx, (*inputs[:-4], unpack(*inputs[-4:])), output)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*Map.backward(ctx, grad), None, None, None)

    differentiate(name, backward, setup)
    Map.__name__ = Map.__qualname__ = call.__name__ = name
    return call


qk: Callable[..., Tensor] = _linear(
    "qk",
    _unfused("qk"),
    _fake_qk,
    gather.qk,
    lambda grad, query, key, rule, needs: (
        av(grad, key, rule) if needs[0] else None,
        av_transposed(grad, query, rule) if needs[1] else None,
    ),
)
av: Callable[..., Tensor] = _linear(
    "av",
    _unfused("av"),
    _fake_av,
    gather.av,
    lambda grad, attn, value, rule, needs: (
        qk(grad, value, rule) if needs[0] else None,
        av_transposed(attn, grad, rule) if needs[1] else None,
    ),
)
av_transposed: Callable[..., Tensor] = _linear(
    "av_transposed",
    _unfused("av_transposed"),
    _fake_av,
    gather.av_transposed,
    lambda grad, attn, x, rule, needs: (
        qk(x, grad, rule) if needs[0] else None,
        av(attn, grad, rule) if needs[1] else None,
    ),
)
rpb_bias: Callable[..., Tensor] = _linear(
    "rpb_bias",
    _bias,
    _fake_bias,
    gather.rpb_bias,
    lambda grad, rpb, shape, rule, needs: (rpb_bias_transposed(grad, rule),),
)
rpb_bias_transposed: Callable[..., Tensor] = _linear(
    "rpb_bias_transposed",
    _bias_transposed,
    _fake_bias_transposed,
    gather.rpb_bias_transposed,
    lambda grad, x, rule, needs: (rpb_bias(grad, x.shape[1:-1], rule),),
)
