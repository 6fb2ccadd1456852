"""Decorators that skip a test where a feature is missing, under the names of 0.17 and 0.21."""

from __future__ import annotations

import importlib.util
import unittest
from collections.abc import Callable
from typing import Any

import torch

from . import switches

Decorator = Callable[[Any], Any]


def _skip(missing: bool, what: str) -> Decorator:
    return unittest.skipIf(missing, f"{what} is not available")


def skip_if_cuda_is_not_supported() -> Decorator:
    """Skip without a GPU."""
    return _skip(not switches.has_cuda(), "a GPU")


def skip_if_gemm_is_not_supported() -> Decorator:
    """Skip without a GPU with matrix units."""
    return _skip(not switches.has_gemm(), "a GPU with matrix units")


def skip_if_gemm_does_not_support_double_precision() -> Decorator:
    """Skip without a GPU with float64 matrix units."""
    return _skip(not switches.has_fp64_gemm(), "a GPU with float64 matrix units")


def skip_if_nested_is_not_supported() -> Decorator:
    """Never skip: PyTorch 2.6 has nested tensors."""
    return _skip(False, "nested tensors")


def skip_if_flex_is_not_supported() -> Decorator:
    """Always skip: there is no FlexAttention backend."""
    return _skip(True, "the FlexAttention backend")


def skip_if_hopper_kernels_not_supported() -> Decorator:
    """Always skip: upstream's Hopper kernels are not here."""
    return _skip(True, "upstream's Hopper backend")


def skip_if_blackwell_kernels_not_supported() -> Decorator:
    """Always skip: upstream's Blackwell kernels are not here."""
    return _skip(True, "upstream's Blackwell backend")


def skip_if_not_running_extended_tests() -> Decorator:
    """Always skip: extended tests are upstream's own."""
    return _skip(True, "the extended test run")


def skip_if_fvcore_is_not_available() -> Decorator:
    """Skip without fvcore."""
    return _skip(importlib.util.find_spec("fvcore") is None, "fvcore")


def skip_if_torch_compile_is_not_supported() -> Decorator:
    """Never skip: operators here compile."""
    return _skip(False, "torch.compile")


def skip_if_triton_is_not_supported() -> Decorator:
    """Skip without a GPU that Triton knows."""
    return _skip(not switches.has_gemm(), "a GPU for Triton")


skip_if_experimental_ops_are_not_supported = skip_if_torch_compile_is_not_supported
skip_if_torch_flop_count_is_not_supported = skip_if_torch_compile_is_not_supported
skip_if_fna_is_not_supported = skip_if_cuda_is_not_supported
skip_if_libnatten_is_not_supported = skip_if_cuda_is_not_supported
skip_if_flex_compile_is_not_supported = skip_if_flex_is_not_supported


def fna_supports_additional_kv(head_dim: int = 0, device_index: switches.Device = None) -> bool:
    """Whether fused operators take additional keys and values: always."""
    return True


def supports_float16(device: torch.device) -> bool:
    """Whether operators run float16 on ``device``: always."""
    return True


def supports_bfloat16(device: torch.device) -> bool:
    """Whether operators run bfloat16 on ``device``."""
    return device.type != "cuda" or switches.has_bfloat(device)


__all__ = [name for name in globals() if name.startswith(("skip_if_", "supports_"))]
__all__ += ["fna_supports_additional_kv"]
