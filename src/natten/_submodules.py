"""Submodules as attributes of their package, imported when they are first asked for (PEP 562).

So ``import natten; natten.draw`` works, and ``import natten`` stays fast.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any


def getter(package: str) -> Callable[[str], Any]:
    """A package's ``__getattr__`` that finds its submodules."""

    def __getattr__(name: str) -> Any:
        module = f"{package}.{name}"
        if name.isidentifier() and not name.startswith("__") and importlib.util.find_spec(module):
            return importlib.import_module(module)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
