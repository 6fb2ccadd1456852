"""Type names of 0.17 to 0.21."""

from __future__ import annotations

from enum import Enum
from typing import Union

NoneType = type(None)

Dimension1DType = tuple[int]
Dimension2DType = tuple[int, int]
Dimension3DType = tuple[int, int, int]
CausalArg1DType = tuple[bool]
CausalArg2DType = tuple[bool, bool]
CausalArg3DType = tuple[bool, bool, bool]

Dimension1DTypeOrDed = Union[int, Dimension1DType]  # noqa: UP007
Dimension2DTypeOrDed = Union[int, Dimension2DType]  # noqa: UP007
Dimension3DTypeOrDed = Union[int, Dimension3DType]  # noqa: UP007
CausalArg1DTypeOrDed = Union[bool, CausalArg1DType]  # noqa: UP007
CausalArg2DTypeOrDed = Union[bool, CausalArg2DType]  # noqa: UP007
CausalArg3DTypeOrDed = Union[bool, CausalArg3DType]  # noqa: UP007

DimensionType = Union[Dimension1DType, Dimension2DType, Dimension3DType]  # noqa: UP007
CausalArgType = Union[CausalArg1DType, CausalArg2DType, CausalArg3DType]  # noqa: UP007
DimensionTypeOrDed = Union[int, DimensionType]  # noqa: UP007
CausalArgTypeOrDed = Union[bool, CausalArgType]  # noqa: UP007


class KernelSchedule(Enum):
    """Upstream's Hopper kernel schedules; hints without effect."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2
