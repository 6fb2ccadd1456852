"""Type names of 0.17 to 0.21."""

from __future__ import annotations

from enum import Enum
from typing import Union

from torch import Tensor

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
    """Upstream's schedules of Hopper kernels, which are hints without effect."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2


# Tile settings of upstream's kernels: the tiles of queries and of keys, then how keys are split and
# whether PyTorch reduces. In 0.20 and later Hopper's forward kernels have a schedule, too.
QKTileShapeType = Union[  # noqa: UP007
    tuple[Dimension1DType, Dimension1DType],
    tuple[Dimension2DType, Dimension2DType],
    tuple[Dimension3DType, Dimension3DType],
]
FnaTileShapeType = FnaForwardConfigType = QKTileShapeType
FnaBackwardConfigType = Union[  # noqa: UP007
    tuple[Dimension1DType, Dimension1DType, Dimension1DType, bool],
    tuple[Dimension2DType, Dimension2DType, Dimension2DType, bool],
    tuple[Dimension3DType, Dimension3DType, Dimension3DType, bool],
]
CutlassFnaForwardConfigType = CutlassFnaBackwardConfigType = QKTileShapeType
CutlassBlackwellFnaForwardConfigType = CutlassBlackwellFnaBackwardConfigType = QKTileShapeType
CutlassHopperFnaForwardConfigType = tuple[QKTileShapeType, KernelSchedule]
CutlassHopperFnaBackwardConfigType = FlexFnaForwardConfigType = QKTileShapeType

FmhaForwardConfigType = tuple[int, int]
CutlassFmhaForwardConfigType = CutlassFmhaBackwardConfigType = FmhaForwardConfigType
CutlassBlackwellFmhaForwardConfigType = FmhaForwardConfigType
CutlassBlackwellFmhaBackwardConfigType = FmhaForwardConfigType
CutlassHopperFmhaForwardConfigType = tuple[FmhaForwardConfigType, KernelSchedule]
CutlassHopperFmhaBackwardConfigType = FlexFmhaForwardConfigType = FmhaForwardConfigType

ListOrNestedTensor = Union[list, Tensor]  # noqa: UP007


def create_dim_from_int(na_dim: int, value: int) -> tuple[int, ...]:
    """A tuple with ``value`` for every axis."""
    return (value,) * na_dim


def create_causal_arg_from_bool(na_dim: int, value: bool) -> tuple[bool, ...]:
    """A tuple with ``value`` for every axis."""
    return (value,) * na_dim


__all__ = [name for name in globals() if name.endswith("Type") or name.endswith("TypeOrDed")]
__all__ += ["KernelSchedule", "ListOrNestedTensor"]
__all__ += ["create_causal_arg_from_bool", "create_dim_from_int"]
