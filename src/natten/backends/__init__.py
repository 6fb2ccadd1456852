"""Which backend runs, and why.

A backend is a module with the functions ``forward``, ``backward``, ``qk``, ``av``,
``av_transposed``, ``bias`` and ``bias_transposed``, as in :mod:`natten.backends.reference`.
Adding one is a folder and a line in ``BACKENDS``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from natten.backends import reference, tiled
from natten.errors import ArgumentError

_log = logging.getLogger("natten")


@dataclass(frozen=True)
class Backend:
    """A name, the functions, and what the backend can not run."""

    name: str
    module: ModuleType
    unsupported: Callable[[torch.device, torch.dtype], str | None]


def _floating(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"needs a floating-point dtype, not {dtype}"


# In order of preference.
BACKENDS: tuple[Backend, ...] = (
    Backend("tiled", tiled, _floating),
    Backend("reference", reference, _floating),
)

# Upstream's names: hints, because our own choice serves the same problems.
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
    if name is None or name in HINTS:
        return ""
    allowed = [backend.name for backend in BACKENDS]
    if name not in allowed:
        raise ArgumentError(
            f"`backend` must be None or one of {allowed} (hints: {sorted(HINTS)}), got {name!r}."
        )
    return name


@lru_cache(maxsize=256)
def choose(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called ``name`` if it can run, else the first that can."""
    wanted = [backend for backend in BACKENDS if backend.name == name]
    for backend in (*wanted, *BACKENDS):
        reason = backend.unsupported(device, dtype)
        if reason is None:
            return backend
        _log.debug("backend %s is passed over: it %s", backend.name, reason)
    raise ArgumentError(f"`query` has dtype {dtype}; natten computes in floating point only.")


def explain(query: Tensor, *_: Any, backend: str | None = None, **__: Any) -> str:
    """Say which backend a call with these arguments runs, and why the others do not.

    Args:
        query: the call's query; what follows it is accepted and looked at where it matters.
        backend: as in the call.

    Returns:
        One line per backend.

    Example:
        >>> print(explain(torch.zeros(1, 16, 1, 8)))
        tiled: runs
        reference: can run, comes later in the order of preference
    """
    name = check_name(backend)
    chosen = choose(name, query.device, query.dtype)
    lines = []
    for candidate in BACKENDS:
        reason = candidate.unsupported(query.device, query.dtype)
        if candidate is chosen:
            lines.append(f"{candidate.name}: runs")
        elif reason is not None:
            lines.append(f"{candidate.name}: {reason}")
        elif name:
            lines.append(f"{candidate.name}: can run, `backend` asks for {name}")
        else:
            lines.append(f"{candidate.name}: can run, comes later in the order of preference")
    return "\n".join(lines)
