"""Decompositions of attention into PyTorch's own operators, for exporters that know no others.

Keys and values are gathered window by window (:mod:`natten.gather`), which takes memory of queries
times window tokens. It runs everywhere and is slower than the backends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import gather, operators
from ._library import ops
from ._torch import OpOverload
from .operators import RULE_ARGUMENTS, unpack

__all__ = ["decompositions"]


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Every operator of natten as plain PyTorch operators, forward and backward.

    Give them to ``torch.export.ExportedProgram.run_decompositions`` before a program goes to ONNX,
    Core ML, TensorRT, ExecuTorch or another runtime that knows PyTorch's operators only.

    Returns:
        A new dictionary from operators to functions with the same arguments. You may add to it.

    Example:
        >>> import natten, torch
        >>> layer = natten.NeighborhoodAttention1D(16, 2, kernel_size=3).eval()
        >>> program = torch.export.export(layer, (torch.randn(1, 8, 16),))
        >>> program = program.run_decompositions(natten.export.decompositions())
        >>> any("natten" in str(node.target) for node in program.graph.nodes)
        False
    """
    table: dict[OpOverload, Callable[..., Any]] = {
        ops.attention.default: _attention,
        ops.attention_backward.default: _attention_backward,
        ops.packed_attention.default: _packed,
        ops.packed_attention_backward.default: _packed_backward,
    }
    for function in (
        gather.qk,
        gather.av,
        gather.av_transposed,
        gather.rpb_bias,
        gather.rpb_bias_transposed,
    ):
        table[getattr(ops, function.__name__).default] = _of_rule(function)
    return table


def _of_rule(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let ``function`` take an operator's arguments, of which the last are the rule."""
    return lambda *args: function(*args[:-RULE_ARGUMENTS], unpack(*args[-RULE_ARGUMENTS:]))


def _attention(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, call = operators.unpack_call(args)
    out, lse = operators.composed_attention(inputs, call.rule, call.scale, gathered=True)
    return out.contiguous(), lse.contiguous()


def _attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> list[Tensor]:
    inputs, call = operators.unpack_call(args)  # output and LSE are computed again
    grads = operators.gathered_gradient(grad_out, grad_lse, inputs, call.rule, call.scale)
    return [grad.contiguous() for grad in grads if grad is not None]


def _packed(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    lengths, rule, scale, _ = operators.unpack_sequences(arguments)
    out, lse = operators.gathered_sequences(query, key, value, lengths, rule, scale)
    return out.contiguous(), lse.contiguous()


def _packed_backward(grad_out: Tensor, grad_lse: Tensor | None, *arguments: Any) -> list[Tensor]:
    query, key, value, _, _, *rest = arguments  # output and LSE are computed again
    lengths, rule, scale, _ = operators.unpack_sequences(rest)
    grads = operators.gathered_sequences_gradient(
        grad_out, grad_lse, query, key, value, lengths, rule, scale
    )
    return [grad.contiguous() for grad in grads if grad is not None]
