"""The names that ``natten.functional`` had in 0.14 to 0.21 and has no longer.

Each ``natten*d*`` operator warns with a DeprecationWarning that says its new name.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import checks, operators, switches, types
from .checks import *  # noqa: F403
from .operators import *  # noqa: F403
from .selection import choose_backend, choose_fmha_backend
from .strided_checks import check_all_args  # type: ignore[assignment]
from .switches import *  # noqa: F403
from .types import *  # noqa: F403


def _renamed(rank: int, old: str) -> Callable[..., Any]:
    function = getattr(operators, f"natten{rank}d{old}")
    new = f"na{rank}d_{old.removesuffix('rpb')}"

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # a warning would break the graph
            message = f"natten: {function.__name__} is an old name of {new}"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
        return function(*args, **kwargs)

    return renamed


natten1dqk, natten2dqk, natten3dqk = (_renamed(rank, "qk") for rank in (1, 2, 3))
natten1dqkrpb, natten2dqkrpb, natten3dqkrpb = (_renamed(rank, "qkrpb") for rank in (1, 2, 3))
natten1dav, natten2dav, natten3dav = (_renamed(rank, "av") for rank in (1, 2, 3))

__all__ = ["check_all_args", "choose_backend", "choose_fmha_backend"]
__all__ += [*checks.__all__, *operators.__all__, *switches.__all__, *types.__all__]
