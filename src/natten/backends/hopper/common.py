"""What forward and backward launches share: three axes, the missing ones first."""

from __future__ import annotations

from collections.abc import Sequence

from natten.backends.triton import primitives
from natten.neighborhood import Neighborhood


def padded(values: Sequence[int], fill: int) -> tuple[int, ...]:
    """Three axes: the missing ones come first."""
    return (*(fill,) * (3 - len(values)), *values)


def modes(rule: Neighborhood, shape: Sequence[int]) -> tuple[int, ...]:
    """How the windows of each of three axes go, in the terms of ``primitives.window``."""
    found = []
    for length, stride, causal in zip(shape, rule.stride, rule.is_causal):
        if length == 1:
            mode = primitives.UNIT
        elif causal:
            mode = primitives.CAUSAL if stride == 1 else primitives.CAUSAL_STRIDED
        else:
            mode = primitives.SLIDING if stride == 1 else primitives.STRIDED
        found.append(mode.value)
    return padded(found, primitives.UNIT.value)
