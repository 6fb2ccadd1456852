"""0.20's questions about backends, answered with our names."""

from __future__ import annotations

from torch import Tensor

from natten import backends


def get_compatible_backends(
    query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False
) -> list[str]:
    """Backends that can run ``na*d`` on these tensors, best first."""
    problem = backends.Problem(
        "attention", query.device, query.dtype, query.shape[-1], value.shape[-1]
    )
    return [each.name for each in backends.BACKENDS if each.unsupported(problem) is None]


def choose_backend(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False) -> str:
    """The backend that ``na*d`` runs on these tensors."""
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
    return get_compatible_backends(query, key, value, torch_compile)


def choose_fmha_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    is_varlen: bool = False,
    torch_compile: bool = False,
) -> str:
    """The backend that ``attention`` runs on these tensors."""
    return get_compatible_fmha_backends(query, key, value)[0]
