"""0.20's questions about backends, answered with our names."""

from __future__ import annotations

from torch import Tensor

from .. import backends
from ..inputs import Inputs
from ..neighborhood import Dense, Rule

__all__ = [
    "choose_backend",
    "choose_fmha_backend",
    "get_compatible_backends",
    "get_compatible_fmha_backends",
]


def _compatible(query: Tensor, key: Tensor, value: Tensor, rule: Rule | None) -> list[str]:
    """Backends that can run a problem: the one that does, then the others in order."""
    problem = backends.Problem.of("attention", Inputs(query, key, value), rule)
    names = [each.name for each in backends.BACKENDS if each.unsupported(problem) is None]
    first = backends.find("", problem)
    return sorted(names, key=lambda name: first is None or name != first.name)


def get_compatible_backends(
    query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False
) -> list[str]:
    """Backends that can run ``na*d`` on these tensors, best first, whatever the window."""
    return _compatible(query, key, value, None)


def choose_backend(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False) -> str:
    """The backend that ``na*d`` runs on these tensors unless another is faster for its window."""
    return get_compatible_backends(query, key, value, torch_compile)[0]


def get_compatible_fmha_backends(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    is_varlen: bool = False,
    torch_compile: bool = False,
) -> list[str]:
    """Backends that can run ``attention`` on these tensors, best first."""
    return _compatible(query, key, value, Dense(bool(is_causal)))


def choose_fmha_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    is_varlen: bool = False,
    torch_compile: bool = False,
) -> str:
    """The backend that ``attention`` runs on these tensors."""
    return get_compatible_fmha_backends(query, key, value, is_causal)[0]
