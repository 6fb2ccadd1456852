"""Which backend runs, and why.

``BACKENDS`` lists the backends, each a class of :mod:`natten.backends.interface`. The choice,
:func:`natten.backends.explain` and the table of the documentation follow from what they
say of themselves.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from .. import _submodules, tuning
from .._warnings import warn_once
from ..errors import ArgumentError
from .hopper import Hopper
from .interface import OPERATIONS, Backend, Problem, Tiles, describe
from .reference import Reference
from .rings import runner_of
from .sdpa import Sdpa
from .tiled import Tiled
from .triton import Triton

_log = logging.getLogger("natten")

# In order of preference.
BACKENDS: tuple[Backend, ...] = (Hopper(), Sdpa(), Triton(), Tiled(), Reference())

# Upstream's names have no effect, because our own choice serves the same problems.
HINTS = frozenset(
    f"{family}-{kind}"
    for family in ("cutlass", "hopper", "blackwell", "flex")
    for kind in ("fna", "fmha")
)


def check_name(name: str | None) -> str:
    """The backend that ``name`` asks for, or "" for the default.

    Raises:
        ArgumentError: nobody ever had a backend of that name.
    """
    known = isinstance(name, str)
    if name is None or (known and name in HINTS):
        return ""
    allowed = [backend.name for backend in BACKENDS]
    if not known or name not in allowed:
        raise ArgumentError(
            f"`backend` must be None or one of {allowed}, or one of {sorted(HINTS)}, which have no "
            f"effect, got {name!r}."
        )
    return name


def named(name: str) -> Backend | None:
    """The backend called ``name``, if there is one."""
    return next((backend for backend in BACKENDS if backend.name == name), None)


@tuning.cached
def find(name: str, problem: Problem) -> Backend | None:
    """The backend called ``name`` if it can run, else the first that can, if any."""
    asked = named(name)
    for backend in (*([asked] if asked else []), *BACKENDS):
        reason = (backend.unsupported if backend is asked else backend.declined)(problem)
        if reason is None:
            return backend
        _log.debug("backend %s is passed over: it %s", backend.name, reason)
    return None


def choose(name: str, problem: Problem) -> Backend:
    """As :func:`find`, for what some backend can run in every floating-point dtype."""
    backend = find(name, problem)
    if backend is None:
        raise ArgumentError(
            f"`query` has dtype {problem.dtype}; natten computes in floating point only."
        )
    return backend


def warn_of_another(name: str, chosen: Backend, problem: Problem) -> None:
    """Warn once that not the backend that was asked for runs, but another, and why."""
    asked = named(name)
    if asked is not None:
        warn_once(f"backend {name!r} {asked.unsupported(problem)}; {chosen.name!r} runs instead.")


def __getattr__(name: str) -> Any:
    """:func:`explain`, which stands on what users call, and the submodules."""
    if name == "explain":
        return importlib.import_module("..explaining", __name__).explain
    return _submodules.getter(__name__)(name)
