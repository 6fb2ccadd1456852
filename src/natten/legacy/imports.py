"""Two tables of what old code imports from elsewhere: modules, and names in modules.

A name is looked up in our modules when it is asked for, so that these need not know the old names.
A module of old code has no file here, unless that has something of its own.
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
    "utils": f"{_CHECKS} .legacy.switches",
    "utils.checks": _CHECKS,
    "utils.log": ".legacy.log",
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
        "context": ".legacy.switches",
        "token_permute": ".legacy.token_permute",
        "types": _TYPES,
        **_UTILS,
        "utils.checks": f".legacy.strided_checks {_CHECKS}",
        "utils.tuples": _TYPES,
        "utils.varlen": ".legacy.varlen",
    },
    f"{_PACKAGE}.compat.v014": {
        "natten1d natten2d nattencuda nattencuda1d nattencuda2d": (
            ".compat.v014 .compat.v014.functional"
        ),
        "flops": ".flops .legacy.flops",
    },
    f"{_PACKAGE}.compat.v015": {
        "natten1d natten2d natten3d": ".compat.v015 .compat.v015.functional",
        "flops": ".flops .legacy.flops",
        "nested ops": ".compat.v015.functional",
        **_UTILS,
    },
    f"{_PACKAGE}.compat.v017": {
        "na1d na2d na3d natten1d natten2d natten3d": (".compat.v017 .compat.v017.functional"),
        "experimental": ".compat.v017.functional",
        "flex nested ops": ".legacy.operators",
        "autotuner": ".legacy.operators",
        "context": ".legacy.switches",
        "flops": ".flops .legacy.flops",
        "types": _TYPES,
        **_UTILS,
    },
}

#: Our modules that once had additional names, and the modules where these are looked up. The
#: package itself is "".
NAMES = {
    "": ".legacy.switches .legacy.configs",
    "backends": ".legacy.selection .legacy.configs",
    "flops": ".legacy.flops",
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
                if name in names_of(source):
                    return vars(sys.modules[module]).setdefault(name, getattr(source, name))
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


def _imported(sources: Iterable[str]) -> Iterator[ModuleType]:
    return (importlib.import_module(source, _PACKAGE) for source in sources)


def names_of(source: ModuleType) -> Sequence[str]:
    """The public names of a module."""
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
            module = sys.modules[f"{package}.{name}" if name else package]
            _extend(module, sources.split())


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
            return sorted({each for source in _imported(sources) for each in names_of(source)})
        return find(name)

    module.__getattr__ = __getattr__  # type: ignore[method-assign]
    module.__dir__ = lambda: module.__all__  # type: ignore[method-assign]
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
