"""Neighborhood attention as dense masked attention: short, slow, and the oracle of all tests.

It is plain differentiable PyTorch for any dtype and device. Memory grows with the square of the
number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..inputs import Gradients, Inputs
from ..neighborhood import Neighborhood, Rule, outer, window_mask
from ..softmax import softmax_with_lse
from .interface import Backend, Shape


def relative_bias(
    rule: Neighborhood, shape: Sequence[int], key_shape: Sequence[int], rpb: Tensor
) -> Tensor:
    """The bias of each pair, ``[heads, queries, keys]``; masked pairs hold any value."""
    return rpb.flatten(1)[:, _bias_index(rule, shape, key_shape, rpb.device)]


def _bias_index(
    rule: Neighborhood, shape: Sequence[int], key_shape: Sequence[int], device: torch.device
) -> Tensor:
    """The index of each pair in the flat bias, ``[queries, keys]``."""
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for axis, (length, key_length) in enumerate(zip(shape, key_shape)):
        d, k = rule.dilation[axis], rule.kernel_size[axis]
        at = rule.key_tokens(axis, torch.arange(length, device=device))
        own = torch.arange(key_length, device=device) // d - (at // d)[:, None]
        if (
            rule.boundary[axis] == "circular"
        ):  # positions before the modulo, from the window's start
            n = key_length // d
            start = rule.windows(axis, at // d, n)[0] - at // d
            own = start[:, None] + (own - start[:, None]) % n
        index = outer(index * (2 * k - 1), (own + k - 1).clamp(0, 2 * k - 2), torch.add)
    return index


def _bias_gradient(grad: Tensor, index: Tensor, rule: Neighborhood) -> Tensor:
    """The gradient of ``rpb``, given ``grad [heads, ...]`` of its entries at ``index [...]``."""
    sizes = [2 * k - 1 for k in rule.kernel_size]
    flat = grad.new_zeros(len(grad), math.prod(sizes))
    return flat.index_add(1, index.flatten(), grad.flatten(1)).unflatten(1, sizes)


def _scores(inputs: Inputs, rule: Rule, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[batch, heads, tokens, channels]``, and the scores.

    All are float32 or float64. Additional keys and values come last, and kv heads are repeated.
    """
    query, key, value, rpb, additional_keys, additional_values, key_mask, additional_mask = inputs
    shape, key_shape, heads = query.shape[1:-2], key.shape[1:-2], query.shape[-2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    mask = window_mask(rule, shape, key_shape, query.device)
    q, k, v = (x.to(dtype).flatten(1, -3).transpose(1, 2) for x in (query, key, value))
    bias = torch.zeros(1, heads, *mask.shape, dtype=dtype, device=query.device)
    if rpb is not None:
        assert isinstance(rule, Neighborhood)
        bias = relative_bias(rule, shape, key_shape, rpb.to(dtype))
    bias = bias.masked_fill(~mask, -math.inf)
    bias, k, v = _without_masked(bias, k, v, key_mask)
    if additional_keys is not None and additional_values is not None:
        ak, av = (x.to(dtype).transpose(1, 2) for x in (additional_keys, additional_values))
        free = bias.new_zeros(*bias.shape[:-1], additional_keys.shape[1])
        free, ak, av = _without_masked(free, ak, av, additional_mask)
        k, v = torch.cat([k, ak], dim=2), torch.cat([v, av], dim=2)
        bias = torch.cat([bias, free], dim=-1)
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    return q, k, v, q @ k.transpose(-1, -2) * scale + bias


def _without_masked(
    bias: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Bias ``[B, heads, queries, keys]``, and keys and values, which may hold NaN where the mask
    takes them away."""
    if mask is None:
        return bias.expand(len(k), -1, -1, -1), k, v
    own = ~mask.flatten(1)[:, None].expand(len(k), -1, -1)  # [B, 1, keys]
    k, v = (x.masked_fill(own[..., None], 0.0) for x in (k, v))
    return bias.masked_fill(own[..., None, :], -math.inf), k, v


def _slots(
    rule: Neighborhood, shape: Sequence[int], key_shape: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    token = rule.window_tokens_of(shape, key_shape, device)
    valid = rule.attended_slots(shape, key_shape, device)
    return token.flatten(0, -2), valid.flatten(0, -2)


def _dense(attn: Tensor, rule: Neighborhood, key_shape: Sequence[int]) -> Tensor:
    """Weights as ``[batch, heads, queries, keys]``, which are 0 outside the windows."""
    token, valid = _slots(rule, attn.shape[1:-2], key_shape, attn.device)
    weights = attn.flatten(1, -3).transpose(1, 2).masked_fill(~valid, 0)
    dense = weights.new_zeros(*weights.shape[:-1], math.prod(key_shape))
    return dense.scatter_add(-1, token.expand(weights.shape), weights)


class Reference(Backend):
    """The definition, written out."""

    name = "reference"
    devices = "every device of PyTorch"
    operations = ("attention", "gradient", "unfused")
    circular = True
    masks = True

    def forward(
        self, inputs: Inputs, rule: Rule, scale: float, tiles: Shape = ()
    ) -> tuple[Tensor, Tensor]:
        query, shape = inputs.query, inputs.query.shape[1:-2]
        _, _, v, scores = _scores(inputs, rule, scale)
        weights, lse = softmax_with_lse(scores)
        out = (weights @ v).transpose(1, 2).unflatten(1, shape)
        return out.to(query.dtype), lse.transpose(1, 2).unflatten(1, shape)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor,
        rule: Rule, scale: float, tiles: Shape = (),
    ) -> Gradients:  # fmt: skip
        # Autograd can not serve here: it is off where a dispatch mode, such as a FLOP counter,
        # calls an operator.
        query, key, value, rpb, additional_keys, additional_values, *_ = inputs
        q, k, v, scores = _scores(inputs, rule, scale)
        weights, exponents = softmax_with_lse(scores)  # P [B, H, queries, keys + additional]
        empty = exponents == -math.inf  # rows whose gradients may be NaN, as of an LSE of -inf
        do = grad_out.to(q.dtype).flatten(1, -3).transpose(1, 2).masked_fill(empty[..., None], 0.0)
        dp = do @ v.transpose(-1, -2)  # dP = dO V^T
        delta = (weights * dp).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse.flatten(1, -2).transpose(1, 2).masked_fill(empty, 0.0)
        ds = weights * (dp - delta[..., None])  # dS = P * (dP - delta)
        dq = ds @ k * scale
        dk, dv = ds.transpose(-1, -2) @ q * scale, weights.transpose(-1, -2) @ do

        def finish(grad: Tensor, like: Tensor) -> Tensor:
            return grad.transpose(1, 2).reshape(like.shape).to(like.dtype)

        def finish_kv(grad: Tensor, like: Tensor) -> Tensor:
            return finish(grad.unflatten(1, (like.shape[-2], -1)).sum(2), like)

        tokens = math.prod(key.shape[1:-2])
        grad_rpb = grad_keys = grad_values = None
        if rpb is not None and isinstance(rule, Neighborhood):
            index = _bias_index(rule, query.shape[1:-2], key.shape[1:-2], query.device)
            grad_rpb = _bias_gradient(ds[..., :tokens].sum(0), index, rule).to(rpb.dtype)
        if additional_keys is not None and additional_values is not None:
            grad_keys = finish_kv(dk[:, :, tokens:], additional_keys)
            grad_values = finish_kv(dv[:, :, tokens:], additional_values)
        dk, dv = finish_kv(dk[:, :, :tokens], key), finish_kv(dv[:, :, :tokens], value)
        return Gradients(finish(dq, query), dk, dv, grad_rpb, grad_keys, grad_values)

    def qk(self, query: Tensor, key: Tensor, rule: Neighborhood) -> Tensor:
        shape = query.shape[1:-2]
        token, valid = _slots(rule, shape, key.shape[1:-2], query.device)
        q, k = (x.flatten(1, -3).transpose(1, 2) for x in (query, key))
        scores = q @ k.transpose(-1, -2)
        scores = scores.gather(-1, token.expand(*scores.shape[:-1], -1)).masked_fill(~valid, 0)
        return scores.transpose(1, 2).unflatten(1, shape)

    def av(self, attn: Tensor, value: Tensor, rule: Neighborhood) -> Tensor:
        out = _dense(attn, rule, value.shape[1:-2]) @ value.flatten(1, -3).transpose(1, 2)
        return out.transpose(1, 2).unflatten(1, attn.shape[1:-2])

    def av_transposed(
        self, attn: Tensor, x: Tensor, key_shape: Shape, rule: Neighborhood
    ) -> Tensor:
        dense = _dense(attn, rule, key_shape)
        out = dense.transpose(-1, -2) @ x.flatten(1, -3).transpose(1, 2)
        return out.transpose(1, 2).unflatten(1, key_shape)

    def rpb_bias(self, rpb: Tensor, shape: Shape, key_shape: Shape, rule: Neighborhood) -> Tensor:
        token, valid = _slots(rule, shape, key_shape, rpb.device)
        dense = relative_bias(rule, shape, key_shape, rpb)
        picked = dense.gather(-1, token.expand(len(dense), -1, -1)).masked_fill(~valid, 0)
        return picked.transpose(0, 1).unflatten(0, shape)

    def rpb_bias_transposed(self, grad: Tensor, key_shape: Shape, rule: Neighborhood) -> Tensor:
        token, valid = _slots(rule, grad.shape[:-2], key_shape, grad.device)
        index = _bias_index(rule, grad.shape[:-2], key_shape, grad.device).gather(1, token)
        slots = grad.flatten(0, -3).transpose(0, 1).masked_fill(~valid, 0)
        return _bias_gradient(slots, index, rule)

    def computed_pairs(
        self, rule: Neighborhood, shape: Shape, key_shape: Shape, matrices: int, dim: int
    ) -> int:
        return math.prod(shape) * math.prod(key_shape)
