"""Unfused neighborhood attention, heads-first: scores, and sums of values with given weights."""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import torch
from torch import Tensor

from . import _dtensors, operators
from ._checks import (
    autocast_tensors,
    check_masks,
    check_rpb,
    check_same,
    check_same_shape,
    check_tensors,
)
from ._ranks import Function, of_rank
from .errors import ArgumentError
from .neighborhood import Boundary, Causal, Dimension, Neighborhood
from .nested import is_nested, per_item


def _qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Dimension,
    dilation: Dimension | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: Causal | None = False,
    rpb: Tensor | None = None,
    *,
    stride: Dimension = 1,
    query_offset: Dimension | None = None,
    queries_per_key: Dimension = 1,
    boundary: Boundary = "shift",
    key_mask: Tensor | None = None,
    additional_mask: Tensor | None = None,
) -> Tensor:
    window = kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset
    if is_nested(query, key, additional_keys, rpb):
        if is_nested(rpb):
            raise ArgumentError("`rpb` must be dense, also where the other inputs are nested.")
        if key_mask is not None or additional_mask is not None:
            raise ArgumentError(
                "`key_mask` and `additional_mask` are for dense tensors; items of nested ones have "
                "the sizes that they need."
            )

        def each(query: Tensor, key: Tensor, additional_keys: Tensor | None) -> Tensor:
            return scores(query, key, window, rpb, additional_keys)

        return per_item(each, query=query, key=key, additional_keys=additional_keys)
    return scores(query, key, window, rpb, additional_keys, key_mask, additional_mask)


def _av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Dimension,
    dilation: Dimension | None = 1,
    additional_values: Tensor | None = None,
    is_causal: Causal | None = False,
    *,
    stride: Dimension = 1,
    query_offset: Dimension | None = None,
    queries_per_key: Dimension = 1,
    boundary: Boundary = "shift",
) -> Tensor:
    window = kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset
    if is_nested(attn, value, additional_values):

        def each(attn: Tensor, value: Tensor, additional_values: Tensor | None) -> Tensor:
            return weighted_sum(attn, value, window, additional_values)

        return per_item(each, attn=attn, value=value, additional_values=additional_values)
    return weighted_sum(attn, value, window, additional_values)


def scores(
    query: Tensor, key: Tensor, window: Neighborhood | tuple[Any, ...], rpb: Tensor | None,
    additional_keys: Tensor | None, key_mask: Tensor | None = None,
    additional_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What ``na*d_qk`` returns, of dense tensors; ``window`` is as that of the fused ``attend``."""
    check_tensors(query=query, key=key)
    tensors = query, key, rpb, additional_keys, key_mask, additional_mask
    if _dtensors.has_dtensor(tensors):
        return cast(Tensor, _dtensors.runner().scores(*tensors[:2], window, *tensors[2:]))
    rule = _rule(query, window)
    query, key, additional_keys = autocast_tensors(query, key, additional_keys)
    space, key_space = _space(query, "query"), _space(key, "key")
    wanted = (*query.shape[:2], *key_space, query.shape[-1])
    check_same_shape("key", key.shape, "query", wanted)
    check_same("key", key, "query", query)
    rule.check(space, key_space)
    check_rpb(rpb, query, rule, heads=query.shape[1])
    if additional_keys is not None:
        _check_additional("additional_keys", additional_keys, query)
    check_masks(key, additional_keys, key_mask, additional_mask, first=2)
    if key_mask is not None:  # masked keys may hold NaN, which a gradient of 0 does not take away
        key = key.masked_fill(~key_mask[:, None, ..., None], 0.0)
    attn = operators.qk(query, key, rule)
    if rpb is not None:
        attn = attn + operators.rpb_bias(rpb.to(attn.dtype), space, key_space, rule)
    if rule.has_empty_slots:
        attn = attn.masked_fill(~rule.attended_slots(space, key_space, attn.device), -math.inf)
    if key_mask is not None:
        attn = attn.masked_fill(~rule.in_slots(key_mask, space)[:, None], -math.inf)
    if additional_keys is None:
        return attn
    if additional_mask is not None:
        mask = ~additional_mask[:, None, :]
        additional_keys = additional_keys.masked_fill(mask[..., None], 0.0)
    additional = query.flatten(2, -2) @ additional_keys.transpose(-1, -2)
    if additional_mask is not None:
        additional = additional.masked_fill(mask[:, :, None], -math.inf)
    return torch.cat([attn, additional.unflatten(2, space)], dim=-1)


def weighted_sum(
    attn: Tensor, value: Tensor, window: Neighborhood | tuple[Any, ...],
    additional_values: Tensor | None,
) -> Tensor:  # fmt: skip
    """What ``na*d_av`` returns, of dense tensors; ``window`` is as that of the fused ``attend``."""
    check_tensors(attn=attn, value=value)
    if _dtensors.has_dtensor((attn, value, additional_values)):
        found = _dtensors.runner().weighted_sum(attn, value, window, additional_values)
        return cast(Tensor, found)
    rule = _rule(value, window)
    attn, value, additional_values = autocast_tensors(attn, value, additional_values)
    space, key_space = _space(attn, "attn"), _space(value, "value")
    check_same_shape("attn", attn.shape[:-1], "value", (*value.shape[:2], *space))
    if attn.device != value.device:
        raise ArgumentError(
            f"`attn` must be on the device of `value`, got {attn.device} and {value.device}."
        )
    rule.check(space, key_space)
    if additional_values is not None:
        _check_additional("additional_values", additional_values, value)
    num_additional = 0 if additional_values is None else additional_values.shape[-2]
    windowed = rule.window_tokens
    if attn.shape[-1] != windowed + num_additional:
        raise ArgumentError(
            f"`attn` must hold {windowed + num_additional} attention weights per token, "
            f"got attn.shape[-1]={attn.shape[-1]}."
        )
    attn = attn.to(value.dtype)
    if additional_values is None:
        return operators.av(attn, value, rule)
    out = operators.av(attn[..., :windowed], value, rule)
    return out + (attn[..., windowed:].flatten(2, -2) @ additional_values).unflatten(2, space)


def _rule(x: Tensor, window: Neighborhood | tuple[Any, ...]) -> Neighborhood:
    """The windows of heads-first ``x [batch, heads, *space, head_dim]``."""
    if isinstance(window, Neighborhood):
        return window
    return Neighborhood.create(x.dim() - 3, *window)


def _space(x: Tensor, name: str) -> tuple[int, ...]:
    """The token layout of heads-first ``x``."""
    space = tuple(x.shape[2:-1])
    if torch.jit.is_tracing():  # sizes are tensors there, which an autograd.Function can not take
        space = tuple(int(n) for n in space)
    if x.shape[-1] < 1:
        raise ArgumentError(f"the last dimension of `{name}` must be at least 1, got {x.shape}.")
    return space


def _check_additional(name: str, additional: Tensor, like: Tensor) -> None:
    check_tensors(**{name: additional})
    check_same(name, additional, "query" if name == "additional_keys" else "value", like)
    wanted = (like.shape[0], like.shape[1], like.shape[-1])
    if additional.dim() != 4 or (*additional.shape[:2], additional.shape[-1]) != wanted:
        raise ArgumentError(
            f"`{name}` must be [batch, heads, num_additional, head_dim] with batch, heads and "
            f"head_dim {wanted}, got {tuple(additional.shape)}."
        )


_QK = """Scores of every query with the keys of its window, {rank}-D and unfused.

    Tensors are heads-first, and the caller scales the query. Derivatives of every order exist, also
    in forward mode.

    Args:
        query, key: ``[batch, heads, {space}, head_dim]``; the key has a token layout of its own
            with ``query_offset`` or ``queries_per_key``.
        kernel_size, dilation, is_causal, stride, query_offset, queries_per_key, boundary: one value
            for all axes or one per axis, as in the fused operator.
        additional_keys: ``[batch, heads, num_additional, head_dim]``; every query attends them.
        key_mask, additional_mask: bool ``[batch or 1, {space}]`` of the key and
            ``[batch or 1, num_additional]``, True where a key may be attended.
        rpb: trainable relative positional bias ``[heads, 2 * kernel_size - 1, ...]``.

    Returns:
        ``[batch, heads, {space}, window tokens + num_additional]``. The first slot of an axis holds
        the first token that is attended; slots that causality or a boundary cuts off come last and
        hold -inf, and so do slots of masked keys. Slots of additional keys follow.

    Raises:
        ArgumentError: an argument has a type, shape, dtype, device or value that is not allowed.

    Example:
        >>> q, k = (torch.randn(1, 2, {sizes}, 16) for _ in range(2))
        >>> attn = {name}(16**-0.5 * q, k, kernel_size={kernel}).softmax(-1)
"""

_AV = """Weighted sum of the values of every token's window, {rank}-D and unfused.

    It is the counterpart of ``na{rank}d_qk``. Tensors are heads-first. Derivatives of every order
    exist.

    Args:
        attn: weights ``[batch, heads, {space}, window tokens + num_additional]``; those of
            additional values come last, and slots that are cut off are ignored.
        value: ``[batch, heads, {space}, head_dim]``, the token layout of the key.
        kernel_size, dilation, is_causal, stride, query_offset, queries_per_key, boundary: as given
            to ``na{rank}d_qk``.
        additional_values: ``[batch, heads, num_additional, head_dim]``.

    Returns:
        ``[batch, heads, {space}, head_dim]``.

    Raises:
        ArgumentError: an argument has a type, shape, dtype, device or value that is not allowed.

    Example:
        >>> q, k, v = (torch.randn(1, 2, {sizes}, 16) for _ in range(3))
        >>> attn = na{rank}d_qk(q, k, kernel_size={kernel}).softmax(-1)
        >>> {name}(attn, v, kernel_size={kernel}).shape
        torch.Size([1, 2, {sizes}, 16])
"""


def _with_depth(function: Function, before: int) -> Function:
    """Let ``function`` take 0.15's arguments, too: a window and a dilation of the first axis.

    Each of them came before that of the other axes. Today additional tokens follow window and
    dilation, so an integer there tells the eras apart.

    Args:
        function: takes window and dilation of all axes.
        before: the number of arguments before the window.
    """
    names = ("kernel_size_d", "kernel_size", "dilation_d", "dilation")

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Tensor:
        given, rest = args[before : before + 4], args[before + 4 :]
        by_position = len(given) > 2 and isinstance(given[2], int)
        if not (by_position or "kernel_size_d" in kwargs or "dilation_d" in kwargs):
            return function(*args, **kwargs)
        named = {name: kwargs[name] for name in names if name in kwargs}
        values = dict(zip(names, given)) | named
        if len(values) != 4 or len(given) + len(named) != 4:
            raise ArgumentError(f"{names} must be given once each, got {given} and {named}.")
        others = {name: value for name, value in kwargs.items() if name not in names}
        window = (values["kernel_size_d"], *(values["kernel_size"],) * 2)
        dilation = (values["dilation_d"], *(values["dilation"],) * 2)
        if len(args) < before:
            return function(*args, kernel_size=window, dilation=dilation, **others)
        return function(*args[:before], window, dilation, *rest, **others)

    return cast(Function, either)


na1d_qk = of_rank(1, "na1d_qk", _qk, _QK, nested=True)
na2d_qk = of_rank(2, "na2d_qk", _qk, _QK, nested=True)
na3d_qk = _with_depth(of_rank(3, "na3d_qk", _qk, _QK, nested=True), 2)
na1d_av = of_rank(1, "na1d_av", _av, _AV, nested=True)
na2d_av = of_rank(2, "na2d_av", _av, _AV, nested=True)
na3d_av = _with_depth(of_rank(3, "na3d_av", _av, _AV, nested=True), 2)


def _qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: Dimension,
    dilation: Dimension | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: Causal | None = False,
) -> Tensor:
    return _qk(query, key, kernel_size, dilation, additional_keys, is_causal, bias)


_QK_BIAS = """``na{rank}d_qk`` with the relative positional bias as its third argument.

    Args:
        query, key: ``[batch, heads, {space}, head_dim]``.
        bias: relative positional bias ``[heads, 2 * kernel_size - 1, ...]``, or None.
        kernel_size, dilation, additional_keys, is_causal: as in ``na{rank}d_qk``.

    Returns:
        ``[batch, heads, {space}, window tokens + num_additional]``, as ``na{rank}d_qk``.

    Raises:
        ArgumentError: an argument has a type, shape, dtype, device or value that is not allowed.
    """

na1d_qk_with_bias = of_rank(1, "na1d_qk_with_bias", _qk_with_bias, _QK_BIAS, nested=True)
na2d_qk_with_bias = of_rank(2, "na2d_qk_with_bias", _qk_with_bias, _QK_BIAS, nested=True)
na3d_qk_with_bias = _with_depth(
    of_rank(3, "na3d_qk_with_bias", _qk_with_bias, _QK_BIAS, nested=True), 3
)
