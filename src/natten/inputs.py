"""The tensors of fused attention by their names, and those of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
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
        key_mask: bool ``[batch or 1, *key_space]``, which keys may be attended.
        additional_mask: bool ``[batch or 1, num_additional]``, the same of additional ones.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    key_mask: Tensor | None = None
    additional_mask: Tensor | None = None

    @property
    def differentiable(self) -> Sequence[Tensor | None]:
        """The inputs that may have gradients, as :class:`Gradients` names them."""
        return self[: len(Gradients._fields)]

    @property
    def is_masked(self) -> bool:
        """Whether some keys may not be attended."""
        return self.key_mask is not None or self.additional_mask is not None

    def without_idle_masks(self) -> Inputs:
        """The same without masks that are True everywhere, if they are on a CPU: there it costs
        little to look at them, and kernels without masks are faster."""
        kept = self
        if _is_idle(self.key_mask):
            kept = kept._replace(key_mask=None)
        if _is_idle(self.additional_mask):
            kept = kept._replace(additional_mask=None)
        return kept


def _is_idle(mask: Tensor | None) -> bool:
    """Whether a mask is known to be True everywhere."""
    return type(mask) is Tensor and mask.device.type == "cpu" and bool(mask.all())


class Gradients(NamedTuple):
    """Gradients of the first of :class:`Inputs`, each shaped like its input; None where there is no
    input."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    rpb: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None

    @classmethod
    def zeros(cls, inputs: Inputs) -> Gradients:
        """The gradients where nothing is attended."""
        return cls(*(None if x is None else x.new_zeros(x.shape) for x in inputs.differentiable))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of ``dtype`` are computed, and which their LSE has.

    Half precision is computed in float32: CPUs do so as fast, and sums stay exact.
    """
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
