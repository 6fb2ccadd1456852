"""FLOP counters for neighborhood attention.

``torch.utils.flop_counter.FlopCounterMode`` counts 2 per multiply-add, as it does for PyTorch's own
operators. The handlers for fvcore count multiply-adds, as fvcore does. Only products count, not the
softmax and the bias. Windows are counted exactly, also truncated ones, but neither causal masking
nor a mask of keys is subtracted, as PyTorch does for ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import operators, tiling  # the former defines the operators
from ._library import NAMESPACE, ops
from ._torch import dispatch_modes, has_fake
from ._tracing import function_name
from .neighborhood import Dense, Neighborhood, Rule, group_length
from .sequences import Lengths


def _window_pairs(rule: Rule, space: Sequence[int], key_space: Sequence[int]) -> int:
    """Pairs of a query and a key of its window, in one head of a batch entry."""
    if isinstance(rule, Dense):
        return math.prod((*space, *key_space))
    axes = enumerate(zip(space, key_space))
    return math.prod(_axis_pairs(rule, axis, *lengths) for axis, lengths in axes)


def _axis_pairs(rule: Neighborhood, axis: int, length: int, key_length: int) -> int:
    """The pairs along one axis.

    The truncated windows of a causal axis count as many keys as there can be. So do others where
    they can not be worked out, as for symbolic sizes, and below a mode like that of fake tensors.
    """
    k = rule.kernel_size[axis]
    if rule.boundary[axis] != "truncate":
        return length * k
    known = type(length) is type(key_length) is int and not dispatch_modes()
    if known and not rule.is_causal[axis]:
        return tiling.axis_pairs(rule, axis, length, key_length)
    return length * torch.sym_min(k, group_length(key_length, rule.dilation[axis], 0))


def _pairs(
    query: Sequence[int], key: Sequence[int], additional_keys: Any, packed: Sequence[Any]
) -> int:
    """Query-key pairs of fused attention, over all batch entries and heads.

    Args:
        query, key, additional_keys: shapes, heads-last.
        packed: the operator's arguments from the rule on.
    """
    batch, *space, heads, _ = query
    rule = operators.unpack(*packed[: operators.RULE_ARGUMENTS])
    additional = 0 if additional_keys is None else additional_keys[1]
    windows = _window_pairs(rule, space, key[1:-2])
    return batch * heads * (windows + math.prod(space) * additional)


@register_flop_formula(ops.attention)
def _attention_flops(
    query: Any, key: Any, value: Any, rpb: Any, additional_keys: Any, additional_values: Any,
    key_mask: Any, additional_mask: Any, *packed: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return 2 * _pairs(query, key, additional_keys, packed) * (query[-1] + value[-1])


@register_flop_formula(ops.attention_backward)
def _attention_backward_flops(
    grad_out: Any, grad_lse: Any, out: Any, lse: Any, query: Any, key: Any, value: Any, rpb: Any,
    additional_keys: Any, additional_values: Any, key_mask: Any, additional_mask: Any,
    *packed: Any, **kwargs: Any,
) -> int:  # fmt: skip
    # The scores, dQ and dK are products over the query's head dim, dP and dV over the value's.
    return 2 * _pairs(query, key, additional_keys, packed) * (3 * query[-1] + 2 * value[-1])


def _pairs_of_sequences(query: Tensor, key: Tensor, arguments: Sequence[Any]) -> int:
    """Query-key pairs in packed sequences, over all heads.

    Where lengths can not be read, this is the largest number that is possible.
    """
    lengths = Lengths(*arguments[:6])
    if has_fake((query,)) or query.is_meta:
        keys = key.shape[1] if lengths.longest_kv < 0 else lengths.longest_kv
        return math.prod(query.shape[:-1]) * keys
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


def _unfused_macs(
    queries: Sequence[int], space: Sequence[int], channels: int, packed: Sequence[Any]
) -> int:
    """Multiply-adds of an unfused map.

    Args:
        queries: the shape of something with a row for each query, heads-first.
        space: the keys' token layout.
        channels: of the products.
        packed: the operator's arguments from the rule on.
    """
    batch, heads, *own, _ = queries
    rule = operators.unpack(*packed[: operators.RULE_ARGUMENTS])
    return batch * heads * channels * _window_pairs(rule, own, space)


@register_flop_formula(ops.qk)
def _qk_flops(query: Any, key: Any, *packed: Any, **kwargs: Any) -> int:
    return 2 * _unfused_macs(query, key[2:-1], query[-1], packed)


@register_flop_formula(ops.av)
def _av_flops(attn: Any, value: Any, *packed: Any, **kwargs: Any) -> int:
    return 2 * _unfused_macs(attn, value[2:-1], value[-1], packed)


@register_flop_formula(ops.av_transposed)
def _av_transposed_flops(attn: Any, x: Any, key_shape: Any, *packed: Any, **kwargs: Any) -> int:
    return 2 * _unfused_macs(x, key_shape, x[-1], packed)


# --- fvcore ---


def _shapes(values: Sequence[Any]) -> list[list[int]]:
    """The shapes of the tensors among jit values."""
    types = [v.type() for v in values if v.type().kind() == "TensorType"]
    numbers = [each for each in types if each.scalarType() != "Bool"]  # the others are masks
    return [list(each.sizes()) for each in numbers if each.sizes()]


def qk_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of ``na*d_qk``, from jit values: each weight is the product of two rows."""
    query, key = _shapes(inputs)[:2]
    return _unfused_macs(query, key[2:-1], query[-1], _lists(outputs[0].node()))


def av_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of ``na*d_av``, from jit values: each weight scales one row."""
    attn, value = _shapes(inputs)[:2]
    return _unfused_macs(attn, value[2:-1], value[-1], _lists(outputs[0].node()))


def fna_generic_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of ``na*d`` and plain ``attention``, from jit values."""
    query, key, value, *rest = _shapes(inputs)
    # Additional keys and values come last; a bias alone is one more tensor, not two.
    additional_keys = rest[-2] if len(rest) >= 2 else None
    pairs = _pairs(query, key, additional_keys, _lists(outputs[0].node()))
    return pairs * (query[-1] + value[-1])


def _lists(node: Any) -> list[Sequence[int]]:
    """The lists among the arguments of an operator's or a Function's node; the rule comes first."""
    if node.kind() == "prim::PythonOp":
        return [x for x in node.scalar_args() if isinstance(x, (tuple, list))]
    lists = (x.node() for x in node.inputs() if x.type().kind() == "ListType")
    return [[x.toIValue() for x in each.inputs()] for each in lists]


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
