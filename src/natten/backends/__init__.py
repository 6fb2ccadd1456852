"""Which backend runs, and why.

A backend is a module with the functions ``forward``, ``backward``, ``qk``, ``av``,
``av_transposed``, ``bias`` and ``bias_transposed``, as in :mod:`natten.backends.reference`.
Adding one is a folder and a line in ``BACKENDS``; one without unfused operators says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten.errors import ArgumentError
from natten.neighborhood import Neighborhood

_log = logging.getLogger("natten")


class Problem(NamedTuple):
    """What decides which backend runs.

    Attributes:
        operation: "attention", its "gradient", "packed" documents, or "unfused": qk, av,
            av_transposed and the bias.
        device, dtype: of the tensors.
        head_dim, value_dim: channels of a head.
        shape: of the query, heads-last; of attention and its gradient only, as what follows.
        rule: the neighborhood, None where only tensors are asked about.
        scale: factor on the scores.
        bias: whether there is a relative positional bias.
    """

    operation: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int = 0
    value_dim: int = 0
    shape: tuple[int, ...] = ()
    rule: Any = None
    scale: float = 1.0
    bias: bool = False


@dataclass(frozen=True)
class Backend:
    """A name, the module that is imported at first use, and what it can not run."""

    name: str
    unsupported: Callable[[Problem], str | None]
    has_tiles: bool = False  # whether forward and backward take ``tiles``

    @property
    def module(self) -> ModuleType:
        """The functions."""
        return importlib.import_module(f"natten.backends.{self.name}")


def _without_hopper(problem: Problem) -> str | None:
    """Why the Hopper kernels can not run a problem."""
    if problem.device.type != "cuda":
        return f"runs on GPUs, not on {problem.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if problem.operation != "attention":
        return f"has no kernels for {problem.operation}"
    return importlib.import_module("natten.backends.hopper").unsupported(problem)


def _without_triton(problem: Problem) -> str | None:
    """Why the Triton kernels can not run a problem."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if problem.device.type != "cuda" and not interpreted:
        return f"runs on GPUs, not on {problem.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"has no kernels for {problem.dtype}"
    fused = problem.operation != "unfused"
    if fused and (problem.head_dim > 256 or problem.value_dim > 512):
        return "has kernels for head_dim up to 256 and value head_dim up to 512"
    if interpreted:
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def _floating(problem: Problem) -> str | None:
    if problem.operation == "packed":
        return "runs packed documents one by one"
    dtype = problem.dtype
    return None if dtype.is_floating_point else f"needs a floating-point dtype, not {dtype}"


# In order of preference.
BACKENDS: tuple[Backend, ...] = (
    Backend("hopper", _without_hopper),
    Backend("triton", _without_triton, has_tiles=True),
    Backend("tiled", _floating),
    Backend("reference", _floating),
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
    known = isinstance(name, str)
    if name is None or (known and name in HINTS):
        return ""
    allowed = [backend.name for backend in BACKENDS]
    if not known or name not in allowed:
        raise ArgumentError(
            f"`backend` must be None or one of {allowed} (hints: {sorted(HINTS)}), got {name!r}."
        )
    return name


@lru_cache(maxsize=1024)
def find(name: str, problem: Problem) -> Backend | None:
    """The backend called ``name`` if it can run, else the first that can, if any."""
    wanted = [backend for backend in BACKENDS if backend.name == name]
    for backend in (*wanted, *BACKENDS):
        reason = backend.unsupported(problem)
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


def explain(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    kernel_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    *_: Any,
    backend: str | None = None,
    rpb: Tensor | None = None,
    **__: Any,
) -> str:
    """Say which backend a call of a fused operator runs, and why the others do not.

    Args:
        query, key, value, kernel_size, stride, dilation, is_causal, scale, backend, rpb: as in the
            call; its other arguments are accepted. Without a ``kernel_size`` the answer is about
            the tensors only.

    Returns:
        One line per backend.

    Example:
        >>> print(explain(torch.zeros(1, 16, 1, 8), kernel_size=3))
        hopper: runs on GPUs, not on cpu
        triton: runs on GPUs, not on cpu
        tiled: runs
        reference: can run, comes later in the order of preference
    """
    name = check_name(backend)
    value = query if value is None else value
    rule = None
    if kernel_size is not None:
        rank = query.dim() - 3
        rule = Neighborhood.create(rank, kernel_size, stride, dilation, is_causal)
    problem = Problem(
        "attention",
        query.device,
        query.dtype,
        query.shape[-1],
        value.shape[-1],
        tuple(query.shape),
        rule,
        query.shape[-1] ** -0.5 if scale is None else scale,
        rpb is not None,
    )
    chosen = choose(name, problem)
    lines = []
    for candidate in BACKENDS:
        reason = candidate.unsupported(problem)
        if candidate is chosen:
            lines.append(f"{candidate.name}: runs")
        elif reason is not None:
            lines.append(f"{candidate.name}: {reason}")
        elif name:
            lines.append(f"{candidate.name}: can run, `backend` asks for {name}")
        else:
            lines.append(f"{candidate.name}: can run, comes later in the order of preference")
    return "\n".join(lines)


def __getattr__(name: str) -> Any:
    """0.20's names, from :mod:`natten.backends.selection`."""
    if name in ("choose_backend", "choose_fmha_backend"):
        return getattr(importlib.import_module("natten.backends.selection"), name)
    if name in ("get_compatible_backends", "get_compatible_fmha_backends"):
        return getattr(importlib.import_module("natten.backends.selection"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
