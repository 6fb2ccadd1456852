"""DTensors: whether a call has some, and who runs it then.

It is :mod:`natten.distributed.dtensors`, which is above those who ask. The package says here how to
import it, and the first call that has a DTensor does so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ._torch import PLAIN_TYPES

#: Imports the module.
runner: Callable[[], Any]


def has_dtensor(tensors: Iterable[Any]) -> bool:
    """Whether any of the arguments is a DTensor.

    It is known by its mesh, because its class would have to be imported.
    """
    return any(
        type(x) not in PLAIN_TYPES and isinstance(x, Tensor) and hasattr(x, "device_mesh")
        for x in tensors
    )
