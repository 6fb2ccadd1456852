"""Numbers as people pass them: Python's, NumPy's, a configuration's, tensors of one element.

Each function returns None if its argument is not such a number. Text and bytes are not numbers, and
a boolean is neither an integer nor a real number. ``torch.compile`` can trace all functions.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch


def entries(value: Any) -> tuple[Any, ...] | None:
    """The entries of a sequence of any kind: lists, ranges, 1-D arrays, a configuration's lists."""
    if isinstance(value, (tuple, list, range)):
        return tuple(value)
    if value is None or isinstance(value, (int, float, torch.SymInt, str, bytes, Mapping)):
        return None
    axes = getattr(value, "ndim", None)  # arrays and tensors
    if axes is None and hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        axes = 1
    return tuple(value) if axes == 1 else None


def integer(value: Any) -> Any:
    """``value`` as an int; a symbolic size stays symbolic."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    if _is_truth(value):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        return None


def truth(value: Any) -> bool | None:
    """``value`` as a bool."""
    if isinstance(value, (int, torch.SymInt)):
        return value if isinstance(value, bool) else None
    return bool(value) if _is_truth(value) else None


def real(value: Any) -> Any:
    """``value`` as an int or a float; arrays and tensors of one element may have axes."""
    if isinstance(value, (int, float)):
        return None if isinstance(value, bool) else value
    try:
        number = value.item() if hasattr(value, "item") else value
        return None if isinstance(number, (bool, str, bytes)) else float(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _is_truth(value: Any) -> bool:
    """Whether ``value`` is a single boolean of NumPy or PyTorch."""
    if torch.compiler.is_compiling() and type(value).__module__ == "numpy":
        return False  # NumPy's numbers have no dtype there
    if str(getattr(value, "dtype", "")) not in ("bool", "torch.bool"):
        return False
    return getattr(value, "ndim", 0) == 0 and not getattr(value, "is_meta", False)
