"""FLOP counters for neighborhood attention.

``torch.utils.flop_counter.FlopCounterMode`` counts 2 per multiply-add, as it does for PyTorch's own
operators. The handlers for fvcore count multiply-adds, as fvcore does. Only products count, not the
softmax and the bias. Windows are counted exactly, but causal masking is not subtracted, as PyTorch
does for ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import operators  # defines the operators
from ._library import NAMESPACE, ops
from ._torch import has_fake
from ._tracing import function_name
from .sequences import Lengths


def _rows(shape: Sequence[int]) -> int:
    """The number of queries in ``[..., channels]``, over all batch entries and heads."""
    return math.prod(shape[:-1])


def _attended(
    query: Sequence[int], key: Sequence[int], additional_keys: Any, kernel_size: Any
) -> int:
    """The number of keys that each query attends, given the shapes of the tensors.

    Without a window these are all keys of ``[batch, length, ...]``.
    """
    window = math.prod(kernel_size) if operators.has_window(kernel_size) else key[1]
    return window + (0 if additional_keys is None else additional_keys[1])


@register_flop_formula(ops.attention)
def _attention_flops(
    query: Any, key: Any, value: Any, rpb: Any, additional_keys: Any, additional_values: Any,
    kernel_size: Any, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    pairs = _rows(query) * _attended(query, key, additional_keys, kernel_size)
    return 2 * pairs * (query[-1] + value[-1])


@register_flop_formula(ops.attention_backward)
def _attention_backward_flops(
    grad_out: Any, grad_lse: Any, out: Any, lse: Any, query: Any, key: Any, value: Any, rpb: Any,
    additional_keys: Any, additional_values: Any, kernel_size: Any, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    # The scores, dQ and dK are products over the query's head dim, dP and dV over the value's.
    pairs = _rows(query) * _attended(query, key, additional_keys, kernel_size)
    return 2 * pairs * (3 * query[-1] + 2 * value[-1])


def _pairs_of_sequences(query: Tensor, key: Tensor, arguments: Sequence[Any]) -> int:
    """Query-key pairs in packed sequences, over all heads.

    Where lengths can not be read, this is the largest number that is possible.
    """
    lengths = Lengths(*arguments[:6])
    if has_fake((query,)) or query.is_meta:
        keys = key.shape[1] if lengths.longest_kv < 0 else lengths.longest_kv
        return _rows(query.shape) * keys
    return query.shape[2] * sum(n * m for n, m in zip(*lengths.read(query, key)))


@register_flop_formula(ops.packed_attention, get_raw=True)
def _packed_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any) -> int:
    pairs = _pairs_of_sequences(query, key, args)
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


@register_flop_formula(ops.packed_attention_backward, get_raw=True)
def _packed_backward_flops(
    grad_out: Any, grad_lse: Any, query: Tensor, key: Tensor, value: Tensor, out: Any, lse: Any,
    *args: Any, out_val: Any,
) -> int:  # fmt: skip
    pairs = _pairs_of_sequences(query, key, args)
    return 2 * pairs * (3 * query.shape[-1] + 2 * value.shape[-1])


@register_flop_formula(ops.qk)
def _qk_flops(query: Any, key: Any, kernel_size: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(query) * math.prod(kernel_size)


@register_flop_formula(ops.av)
def _av_flops(attn: Any, value: Any, kernel_size: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _rows(attn) * value[-1] * math.prod(kernel_size)


@register_flop_formula(ops.av_transposed)
def _av_transposed_flops(
    attn: Any, x: Any, key_shape: Any, kernel_size: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * math.prod(x) * math.prod(kernel_size)


# --- fvcore ---


def _shapes(values: Sequence[Any]) -> list[list[int]]:
    """The shapes of the tensors among jit values."""
    shapes = [v.type().sizes() for v in values if v.type().kind() == "TensorType"]
    return [list(shape) for shape in shapes if shape]


def qk_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of ``na*d_qk``, from jit values: each weight is the product of two rows."""
    return math.prod(_shapes(outputs)[0]) * _shapes(inputs)[0][-1]


def av_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of ``na*d_av``, from jit values: each weight scales one row."""
    return math.prod(_shapes(inputs)[0]) * _shapes(outputs)[0][-1]


def fna_generic_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of ``na*d`` and plain ``attention``, from jit values."""
    query, key, value, *rest = _shapes(inputs)
    # Additional keys and values come last; a bias alone is one more tensor, not two.
    additional_keys = rest[-2] if len(rest) >= 2 else None
    kernel_size = _kernel_size(outputs[0].node())
    pairs = _rows(query) * _attended(query, key, additional_keys, kernel_size)
    return pairs * (query[-1] + value[-1])


def _kernel_size(node: Any) -> Sequence[int]:
    """The window: the first list among the arguments of an operator's or a Function's node."""
    if node.kind() == "prim::PythonOp":
        return next(x for x in node.scalar_args() if isinstance(x, (tuple, list)))
    lists = (x.node() for x in node.inputs() if x.type().kind() == "ListType")
    return [x.toIValue() for x in next(lists).inputs()]


_HANDLERS = {"qk": qk_flops, "av": av_flops, "attention": fna_generic_flops}


def add_natten_handle(flop_ctr: Any) -> Any:
    """Teach an ``fvcore.nn.FlopCountAnalysis`` to count our operators, and return it.

    fvcore sees them under the names that NATTEN's autograd.Functions had. Plain attention and
    graphs that were traced before hold the operators themselves.
    """
    handlers = {f"{NAMESPACE}::{name}": handler for name, handler in _HANDLERS.items()}
    for name, handler in _HANDLERS.items():
        for rank in (1, 2, 3):
            handlers[f"prim::PythonOp.{function_name(name, rank)}"] = handler
    return flop_ctr.set_op_handle(**handlers)


def get_flops(model: Any, input: Any, disable_warnings: bool = False) -> int:
    """Multiply-adds of ``model(input)``, as fvcore counts them.

    Raises:
        ImportError: fvcore is not installed.
    """
    from fvcore.nn import FlopCountAnalysis

    counter = add_natten_handle(FlopCountAnalysis(model, input))
    if disable_warnings:
        counter = counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return counter.total()
