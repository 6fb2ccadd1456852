"""Attention's linear maps as plain PyTorch operators, for exporters that know no others.

Every query gathers the tokens of its window, so memory is queries times window tokens. Shapes may
be symbolic. The maps have the names of the operators in :mod:`natten.operators` and compute the
same; tensors are heads-first there and here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import compute_dtype
from .neighborhood import Neighborhood, group_length, outer


class _Axis(NamedTuple):
    """Tables of one axis, ``[queries, window]``.

    Attributes:
        token: the key in each slot; slots that are not attended hold the last one that is.
        attended: whether each slot is attended.
        bias: the index of the bias in each slot.
    """

    token: Tensor
    attended: Tensor
    bias: Tensor

    @classmethod
    def of(
        cls, rule: Neighborhood, axis: int, length: int, key_length: int, device: torch.device
    ) -> _Axis:
        d, k = rule.dilation[axis], rule.kernel_size[axis]
        at = rule.key_tokens(axis, torch.arange(length, device=device))
        # Without dilation there is one group, and skipping these divisions makes the graph smaller.
        position, group = (at, 0) if d == 1 else (at // d, at % d)
        n = group_length(key_length, d, group)
        start, end = (bound[:, None] for bound in rule.windows(axis, position, n))
        slots = start + torch.arange(k, device=device)
        attended = slots < end
        if rule.is_causal[axis] or rule.boundary[axis] == "truncate":
            slots = slots.minimum(end - 1)
        bias = slots - position[:, None] + k - 1
        if rule.boundary[axis] == "circular":
            slots = slots % (key_length // d)
        token = slots if d == 1 else slots * d + (at % d)[:, None]
        return cls(token, attended, bias)


class Windows:
    """The maps for one rule and the token layouts of queries and keys, which share its tables.

    Tensor operators compute the tables and become part of the graph, because PyTorch's
    ``run_decompositions`` can not add constants. Where shapes are known, the reader of the graph
    folds them into constants.
    """

    def __init__(
        self,
        rule: Neighborhood,
        space: Sequence[int],
        key_space: Sequence[int],
        device: torch.device,
    ) -> None:
        self.rule, self.space, self.key_space, self.device = rule, space, key_space, device

    @cached_property
    def _axes(self) -> list[_Axis]:
        lengths = enumerate(zip(self.space, self.key_space))
        return [_Axis.of(self.rule, i, n, n_keys, self.device) for i, (n, n_keys) in lengths]

    @cached_property
    def _tokens(self) -> Tensor:
        """The key in each slot of each window, ``[queries * window tokens]``."""
        token = self._axes[0].token
        for length, axis in zip(self.key_space[1:], self._axes[1:]):
            token = outer(token * length, axis.token, torch.add)
        return token.flatten()

    @cached_property
    def attended(self) -> Tensor | None:
        """Whether each slot is attended, ``[*space, window tokens]``; None if all are."""
        if not self.rule.has_empty_slots:
            return None
        attended = self._axes[0].attended
        for axis in self._axes[1:]:
            attended = outer(attended, axis.attended, torch.logical_and)
        return attended.reshape(*self.space, self.rule.window_tokens)

    @cached_property
    def _bias_index(self) -> Tensor:
        """The index of each slot in the flat bias, ``[tokens * window tokens]``.

        In slots that are not attended it is the index of some entry.
        """
        index = self._axes[0].bias
        for k, axis in zip(self.rule.kernel_size[1:], self._axes[1:]):
            index = outer(index * (2 * k - 1), axis.bias, torch.add)
        return index.flatten()

    def _gathered(self, x: Tensor) -> Tensor:
        """The windows of ``x [B, H, *space, C]`` as ``[B, H, tokens, window tokens, C]``."""
        return x.flatten(2, -2).index_select(2, self._tokens).unflatten(2, self._flat)

    @property
    def _flat(self) -> tuple[int, int]:
        return -1, self.rule.window_tokens

    def masked(self, x: Tensor) -> Tensor:
        """``x [..., *space, window tokens]`` with 0 in slots that are not attended."""
        return x if self.attended is None else x.masked_fill(~self.attended, 0)

    def qk(self, query: Tensor, key: Tensor) -> Tensor:
        """The product of each query with the key in each slot of its window."""
        keys = self._gathered(key).transpose(-1, -2)  # [B, H, N, C, W]
        products = query.flatten(2, -2)[..., None, :] @ keys
        return products.reshape(*query.shape[:-1], self.rule.window_tokens)

    def av(self, attn: Tensor, value: Tensor) -> Tensor:
        """For each query, the weighted sum of the values in its window."""
        weights = attn.flatten(2, -2)[..., None, :]  # [B, H, N, 1, W]
        out = weights @ self._gathered(value)
        return out.reshape(*value.shape[:2], *self.space, value.shape[-1])

    def av_transposed(self, attn: Tensor, x: Tensor) -> Tensor:
        """For each key, the weighted sum of ``x`` at the queries whose windows hold it."""
        dtype = compute_dtype(x.dtype)
        weights, rows = attn.flatten(2, -2).to(dtype), x.flatten(2, -2).to(dtype)
        sent = weights[..., None] * rows[..., None, :]  # [B, H, N, W, C]
        keys = rows.new_zeros(*rows.shape[:2], math.prod(self.key_space), rows.shape[-1])
        out = keys.index_add(2, self._tokens, sent.flatten(2, 3))
        return out.to(x.dtype).reshape(*x.shape[:2], *self.key_space, x.shape[-1])

    def rpb_bias(self, rpb: Tensor) -> Tensor:
        """``rpb`` in each slot of each window, ``[heads, *space, window tokens]``."""
        picked = rpb.flatten(1).index_select(1, self._bias_index)
        return picked.reshape(rpb.shape[0], *self.space, self.rule.window_tokens)

    def rpb_bias_transposed(self, grad: Tensor) -> Tensor:
        """The gradient of ``rpb`` from ``grad [heads, *space, window tokens]``."""
        sizes = [2 * k - 1 for k in self.rule.kernel_size]
        sent = grad.to(compute_dtype(grad.dtype)).flatten(1)
        out = sent.new_zeros(grad.shape[0], math.prod(sizes))
        out = out.index_add(1, self._bias_index, sent)
        return out.to(grad.dtype).reshape(grad.shape[0], *sizes)


# The operators' maps: slots that are not attended hold 0 in results and are not read in arguments.


def qk(query: Tensor, key: Tensor, rule: Neighborhood) -> Tensor:
    """The product of each query with each key of its window; 0 in masked slots."""
    windows = Windows(rule, query.shape[2:-1], key.shape[2:-1], query.device)
    return windows.masked(windows.qk(query, key))


def av(attn: Tensor, value: Tensor, rule: Neighborhood) -> Tensor:
    """For each query, the weighted sum of its window's values; masked slots are ignored."""
    windows = Windows(rule, attn.shape[2:-1], value.shape[2:-1], value.device)
    return windows.av(windows.masked(attn), value)


def av_transposed(attn: Tensor, x: Tensor, key_shape: Sequence[int], rule: Neighborhood) -> Tensor:
    """For each key, the weighted sum of ``x`` at the queries that attend it."""
    windows = Windows(rule, x.shape[2:-1], key_shape, x.device)
    return windows.av_transposed(windows.masked(attn), x)


def rpb_bias(
    rpb: Tensor, shape: Sequence[int], key_shape: Sequence[int], rule: Neighborhood
) -> Tensor:
    """``rpb`` in each window slot, ``[heads, *space, window tokens]``; 0 in masked slots."""
    windows = Windows(rule, shape, key_shape, rpb.device)
    return windows.masked(windows.rpb_bias(rpb))


def rpb_bias_transposed(grad: Tensor, key_shape: Sequence[int], rule: Neighborhood) -> Tensor:
    """The gradient of ``rpb`` from ``grad [heads, *space, window tokens]``."""
    windows = Windows(rule, grad.shape[1:-1], key_shape, grad.device)
    return windows.rpb_bias_transposed(windows.masked(grad))
