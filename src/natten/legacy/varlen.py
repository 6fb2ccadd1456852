"""0.21's parameters of packed sequences, ``natten.utils.varlen``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from ..sequences import sequence_lengths

__all__ = ["generate_varlen_parameters"]


def generate_varlen_parameters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """``attention``'s cumulative and longest lengths, which many layers can share.

    Args:
        query, key, value: packed, ``[1, tokens, heads, head_dim]``.
        seqlens_Q, seqlens_KV: integers ``[sequences]``.

    Returns:
        ``cumulative_seqlen_Q``, ``cumulative_seqlen_KV`` (int32 ``[sequences + 1]``),
        ``max_seqlen_Q``, ``max_seqlen_KV``; ``(None, None, 0, 0)`` when nothing is packed.

    Raises:
        ArgumentError: only one side is given, or lengths do not add up to the tokens.
    """
    if seqlens_Q is None and seqlens_KV is None:
        return None, None, 0, 0
    if seqlens_Q is None or seqlens_KV is None:
        raise ArgumentError("`seqlens_Q` and `seqlens_KV` must be given together.")
    if len(seqlens_Q) != len(seqlens_KV):
        raise ArgumentError(
            "`seqlens_Q` and `seqlens_KV` must be equally many, "
            f"got {len(seqlens_Q)} and {len(seqlens_KV)}."
        )
    results = []
    for side, x, seqlens in (("Q", query, seqlens_Q), ("KV", key, seqlens_KV)):
        lengths = sequence_lengths(side, x.shape[1], seqlens, None) or []
        sums = F.pad(seqlens.cumsum(0), (1, 0)).to(x.device, torch.int32)
        results.append((sums, max(lengths, default=0)))
    (sums_q, longest_q), (sums_kv, longest_kv) = results
    return sums_q, sums_kv, longest_q, longest_kv
