"""Which backend runs, and why.

A backend is a module with the functions ``forward``, ``backward``, ``qk``, ``av``,
``av_transposed``, ``bias`` and ``bias_transposed``, as in :mod:`natten.backends.reference`, or some
of them. Adding one is a folder and an entry in ``BACKENDS``, from which the choice,
:func:`natten.backends.explaining.explain` and the table of the documentation follow.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _submodules, tuning
from .._warnings import warn_once
from ..errors import ArgumentError
from ..neighborhood import Dense

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
        key_shape: token layout of the keys; () where it is the query's.
        extra: whether there are additional keys.
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
    key_shape: tuple[int, ...] = ()
    extra: bool = False


# What a problem's operation is called.
OPERATIONS = {
    "attention": "fused forward",
    "gradient": "fused backward",
    "packed": "packed documents in one launch",
    "unfused": "unfused operators",
}


@dataclass(frozen=True)
class Backend:
    """What a backend can run; the functions are imported at first use.

    Attributes:
        name: of the module below ``natten.backends``.
        devices: where it runs, for people.
        missing: what a problem's device or this machine lacks, None if nothing.
        operations: keys of ``OPERATIONS``.
        dtypes: None for every floating-point dtype.
        head_dims, value_dims: None for all.
        bias: whether fused operators take a relative positional bias.
        plain: whether fused operators run plain attention.
        tiles: whether fused operators take tile shapes.
        limits: further reasons why it can not run a problem of a device that it can run on.
        slower: why a problem that it can run is left to the next unless it is asked for by name.
    """

    name: str
    devices: str
    missing: Callable[[Problem], str | None]
    operations: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: range | None = None
    value_dims: range | None = None
    bias: bool = True
    plain: bool = True
    tiles: bool = False
    limits: Callable[[Problem], str | None] | None = None
    slower: Callable[[Problem], str | None] | None = None

    def declined(self, problem: Problem) -> str | None:
        """Why it does not run a problem unless it is asked for, or None."""
        reason = self.unsupported(problem)
        return reason if reason is not None or self.slower is None else self.slower(problem)

    def unsupported(self, problem: Problem) -> str | None:
        """Why it can not run a problem, or None."""
        dtype, fused = problem.dtype, problem.operation != "unfused"
        missing = self.missing(problem)
        if missing is not None:
            return missing
        if problem.operation not in self.operations:
            return f"has no {OPERATIONS[problem.operation]}"
        if not dtype.is_floating_point:
            return f"needs a floating-point dtype, not {dtype}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"has no kernels for {dtype}"
        for name, dims, dim in (
            ("head_dim", self.head_dims, problem.head_dim),
            ("value head_dim", self.value_dims, problem.value_dim),
        ):
            if fused and dims is not None and dim not in dims:
                return f"has kernels for {name} {describe(dims)}"
        if problem.bias and not self.bias:
            return "has no relative positional bias"
        if isinstance(problem.rule, Dense) and not self.plain:
            return "has kernels for neighborhoods only"
        return None if self.limits is None else self.limits(problem)

    @property
    def module(self) -> ModuleType:
        """The functions."""
        return importlib.import_module(f"natten.backends.{self.name}")


def describe(dims: range | None) -> str:
    """Head dims for people."""
    if dims is None:
        return "any"
    return f"{dims[0]} to {dims[-1]}" + (f", multiples of {dims.step}" if dims.step > 1 else "")


def _without_triton(problem: Problem) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if problem.device.type != "cuda" and not interpreted:
        return f"runs on GPUs, not on {problem.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if interpreted or torch.version.hip is not None:
        return None
    if torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def _without_hopper(problem: Problem) -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "has no kernels that Triton can interpret"
    if problem.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return _without_triton(problem)
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(problem.device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    return None


def _beyond_hopper(problem: Problem) -> str | None:
    return importlib.import_module("natten.backends.hopper").unsupported(problem)


def _beyond_triton(problem: Problem) -> str | None:
    if problem.bias and abs(problem.scale) < 1e-20:
        return "divides a bias by the scale, which must not be that small"
    return None


def _without_cpu(problem: Problem) -> str | None:
    return None if problem.device.type == "cpu" else f"runs on CPUs, not on {problem.device.type}"


def _beyond_sdpa(problem: Problem) -> str | None:
    return importlib.import_module("natten.backends.sdpa").unsupported(problem)


def _sdpa_is_slower(problem: Problem) -> str | None:
    return importlib.import_module("natten.backends.sdpa").slower(problem)


def _nothing_missing(problem: Problem) -> str | None:
    return None


_HALF = (torch.float16, torch.bfloat16)
_EVERYWHERE = ("attention", "gradient", "unfused")

# In order of preference.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "hopper",
        "NVIDIA H100 and H200 (compute capability 9.0)",
        _without_hopper,
        ("attention", "gradient"),
        dtypes=_HALF,
        head_dims=range(8, 257, 8),
        value_dims=range(8, 257, 8),
        bias=False,
        plain=False,
        limits=_beyond_hopper,
    ),
    Backend(
        "triton",
        "NVIDIA from compute capability 8.0, AMD",
        _without_triton,
        (*_EVERYWHERE, "packed"),
        dtypes=(*_HALF, torch.float32),
        head_dims=range(1, 257),
        value_dims=range(1, 513),
        tiles=True,
        limits=_beyond_triton,
    ),
    Backend(
        "sdpa",
        "CPUs",
        _without_cpu,
        ("attention", "gradient"),
        dtypes=(*_HALF, torch.float32, torch.float64),
        bias=False,
        limits=_beyond_sdpa,
        slower=_sdpa_is_slower,
    ),
    Backend("tiled", "every device of PyTorch", _nothing_missing, _EVERYWHERE),
    Backend("reference", "every device of PyTorch", _nothing_missing, _EVERYWHERE),
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


def no_gradients(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """Zeros for the inputs that are there: their gradients where there is nothing to attend."""
    return tuple(None if x is None else x.new_zeros(x.shape) for x in inputs)


@tuning.cached
def find(name: str, problem: Problem) -> Backend | None:
    """The backend called ``name`` if it can run, else the first that can, if any."""
    wanted = [backend for backend in BACKENDS if backend.name == name]
    for backend in (*wanted, *BACKENDS):
        asked = backend.name == name
        reason = backend.unsupported(problem) if asked else backend.declined(problem)
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
    for asked in BACKENDS:
        if asked.name == name:
            reason = asked.unsupported(problem)
            warn_once(f"backend {name!r} {reason}; {chosen.name!r} runs instead.")


def __getattr__(name: str) -> Any:
    """:func:`explain`, which stands on the operators, names of old eras, and the backends."""
    if name == "explain":
        return importlib.import_module("natten.backends.explaining").explain
    if name.startswith(("choose_", "get_")):
        for home in ("natten.backends.selection", "natten.legacy.configs"):
            module = importlib.import_module(home)
            if hasattr(module, name):
                return getattr(module, name)
    return _submodules.getter(__name__)(name)
