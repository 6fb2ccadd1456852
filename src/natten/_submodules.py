"""Submodules as attributes of their package, imported when they are first asked for (PEP 562).

So ``import natten; natten.draw`` works, and ``import natten`` stays fast. Some of them stand in a
folder that their names leave out.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any


def getter(package: str) -> Callable[[str], Any]:
    """A package's ``__getattr__`` that finds its submodules."""

    def __getattr__(name: str) -> Any:
        module = f"{package}.{name}"
        if name.isidentifier() and not name.startswith("__") and importlib.util.find_spec(module):
            return importlib.import_module(module)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


class Shortcut(MetaPathFinder, Loader):
    """Finds modules of a folder of ``package``, and what is in them, without the folder's name.

    Both names mean the same module object, and ``python -m`` runs the same program.
    """

    def __init__(self, package: str, folder: str, modules: Sequence[str]) -> None:
        self.homes = {f"{package}.{name}": f"{package}.{folder}.{name}" for name in modules}

    def home(self, name: str) -> str:
        """The full name of the module that ``name`` means, or ""."""
        for short, full in self.homes.items():
            if name == short or name.startswith(f"{short}."):
                return full + name.removeprefix(short)
        return ""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """For the import system."""
        home = self.home(name)
        found = importlib.util.find_spec(home) if home else None
        if found is None:
            return None
        is_package = found.submodule_search_locations is not None
        return ModuleSpec(name, self, origin=found.origin, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that the name means in place of a new one."""
        sys.modules[module.__name__] = importlib.import_module(self.home(module.__name__))

    def get_code(self, name: str) -> CodeType | None:
        """For ``python -m``."""
        found = importlib.util.find_spec(self.home(name))
        return found.loader.get_code(found.name)  # type: ignore[union-attr]
