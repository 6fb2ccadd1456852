"""The softmax of attention, in which a row may have nothing to attend."""

from __future__ import annotations

import math

from torch import Tensor


def softmax_with_lse(scores: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Softmax over a dimension, and the logarithm of the sum of its exponentials.

    Where all scores are -inf, or there are none, the weights are 0, the LSE is -inf, and every
    derivative is 0. PyTorch's softmax is NaN there, and so is the derivative of its logsumexp.

    Args:
        scores: floating point, any shape.
        dim: the dimension of the keys.

    Returns:
        Weights shaped like ``scores``, and the LSE without ``dim``.
    """
    nothing = (scores == -math.inf).all(dim, keepdim=True)
    scores = scores.masked_fill(nothing, 0.0)
    weights = scores.softmax(dim).masked_fill(nothing, 0.0)
    return weights, scores.logsumexp(dim).masked_fill(nothing.squeeze(dim), -math.inf)
