"""Two tables of what old code imports from elsewhere: modules, and names in modules.

A name is looked up in our modules when it is asked for, so that these need not know the old names.
``natten`` and the stand-ins in ``natten.compat`` install their part of the tables when they are
imported. The names of our modules begin with a dot here, because a copy of this package has another
name.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = __package__.rpartition(".")[0]
_TYPES = ".legacy.types"
_CHECKS = f".legacy.checks {_TYPES}"
_UTILS = {
    "utils": f".utils {_CHECKS}",
    "utils.checks": _CHECKS,
    "utils.log": ".utils.log",
    "utils.testing": ".legacy.testing",
    "utils.tensor": ".legacy.checks",
    "utils.misc utils.device": ".legacy.switches",
    "utils.typing": _TYPES,
}

#: For each package: the names of modules, and the modules in which their names are looked up. The
#: first module that has a name counts.
MODULES: dict[str, dict[str, str]] = {
    _PACKAGE: {
        # These modules had a dilation at the position where layers and operators now have a stride.
        "natten1d natten2d natten3d na1d na2d na3d": (
            ".compat.v017 .compat.v014 .compat.v017.functional"
        ),
        "experimental": ".compat.v017.functional",
        "flex": ".legacy.operators",
        "nattencuda nattencuda1d nattencuda2d": (".compat.v014 .compat.v014.functional"),
        "ops": ".legacy.operators",
        "autotuner": ".legacy.operators",
        "attn_merge": ".functional",
        "utils.tensor": _UTILS["utils.tensor"],
        "utils.misc utils.device": _UTILS["utils.misc utils.device"],
        "utils.typing": _UTILS["utils.typing"],
        "utils.tuples": _TYPES,
    },
    f"{_PACKAGE}.compat.v014": {
        "natten1d natten2d nattencuda nattencuda1d nattencuda2d": (
            ".compat.v014 .compat.v014.functional"
        ),
        "flops": ".flops",
    },
    f"{_PACKAGE}.compat.v015": {
        "natten1d natten2d natten3d": ".compat.v015 .compat.v015.functional",
        "flops": ".flops",
        "nested ops": ".compat.v015.functional",
        **_UTILS,
    },
    f"{_PACKAGE}.compat.v017": {
        "na1d na2d na3d natten1d natten2d natten3d": (".compat.v017 .compat.v017.functional"),
        "experimental": ".compat.v017.functional",
        "flex nested ops": ".legacy.operators",
        "autotuner": ".legacy.operators",
        "context": ".legacy.switches",
        "flops": ".flops",
        "types": _TYPES,
        **_UTILS,
    },
}

#: Our modules that once had additional names, and the modules where these are looked up.
NAMES = {
    "backends": ".backends.selection .legacy.configs",
    "functional": ".legacy.functional",
    "nested": ".legacy.operators",
}


def lookup(module: str, *sources: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``module``, which finds the public names of the modules ``sources``.

    A source that begins with a dot is a module of this package. A name that was found stays in
    ``module``, so that it is looked up once.
    """

    def __getattr__(name: str) -> Any:
        if not name.startswith("__"):
            for source in _imported(sources):
                if name in _names(source):
                    return vars(sys.modules[module]).setdefault(name, getattr(source, name))
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


def _imported(sources: Iterable[str]) -> Iterator[ModuleType]:
    return (importlib.import_module(source, _PACKAGE) for source in sources)


def _names(source: ModuleType) -> Sequence[str]:
    return getattr(source, "__all__", None) or [n for n in vars(source) if not n.startswith("_")]


def install(package: str) -> None:
    """Give ``package`` its part of both tables; the modules that they extend must be imported."""
    rows = MODULES[package]
    names = [name for row in rows for name in row.split()]
    for row, sources in rows.items():
        for name in row.split():
            has_children = any(other.startswith(f"{name}.") for other in names)
            _stand_in(f"{package}.{name}", sources.split(), has_children)
    if package == _PACKAGE:
        for name, sources in NAMES.items():
            _extend(sys.modules[f"{package}.{name}"], sources.split())


def _stand_in(path: str, sources: Sequence[str], has_children: bool) -> None:
    """Make a module that has no file importable, and an attribute of its parent.

    An attribute that is no module stays as it is: ``natten.na2d`` is a function.
    """
    module = ModuleType(path, f"Where old code imports from; see {' '.join(sources)}.")
    module.__spec__ = ModuleSpec(path, None, is_package=has_children)
    if has_children:
        module.__path__ = []
    find = lookup(path, *sources)

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            return sorted({each for source in _imported(sources) for each in _names(source)})
        return find(name)

    module.__getattr__ = __getattr__  # type: ignore[method-assign]
    sys.modules[path] = module
    parent, _, child = path.rpartition(".")
    attributes = vars(sys.modules[parent])
    if isinstance(attributes.get(child, module), ModuleType):
        attributes[child] = module


def _extend(module: ModuleType, sources: Sequence[str]) -> None:
    """Let a module find old names beside its own."""
    own, find = vars(module).get("__getattr__"), lookup(module.__name__, *sources)

    def __getattr__(name: str) -> Any:
        if own is not None:
            with contextlib.suppress(AttributeError):
                return own(name)
        return find(name)

    module.__getattr__ = __getattr__  # type: ignore[method-assign]
