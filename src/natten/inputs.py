"""The tensors of fused attention by their names, and those of its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What fused attention attends; heads come last.

    Attributes:
        query: ``[batch, *space, heads, head_dim]``.
        key: ``[batch, *key_space, heads_kv, head_dim]``.
        value: ``[batch, *key_space, heads_kv, value_dim]``.
        rpb: relative positional bias ``[heads, 2 * kernel_size - 1, ...]``.
        additional_keys: ``[batch, num_additional, heads_kv, head_dim]``.
        additional_values: ``[batch, num_additional, heads_kv, value_dim]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None


class Gradients(NamedTuple):
    """Gradients of :class:`Inputs`, each shaped like its input; None where there is no input."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    rpb: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None

    @classmethod
    def zeros(cls, inputs: Inputs) -> Gradients:
        """The gradients where nothing is attended."""
        return cls(*(None if x is None else x.new_zeros(x.shape) for x in inputs))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of ``dtype`` are computed, and which their LSE has.

    Half precision is computed in float32: CPUs do so as fast, and sums stay exact.
    """
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
