"""The switches and feature queries of 0.14 to 0.21.

The autotuner's set what :mod:`natten.tuning` has. The others steered kernels that this package does
not have. They remember their settings, so that their getters stay consistent, and refuse what
upstream's refused. Feature queries say whether there is a GPU.
"""

from __future__ import annotations

import warnings
from enum import Enum
from typing import Any

import torch

from .. import tuning
from ..errors import ArgumentError
from ..tuning import disable_autotuner

__all__ = [
    "AutotunerContext",
    "MemoryUsagePreference",
    "NattenContext",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "disable_autotuner",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "force_flex_attention",
    "get_device_cc",
    "get_memory_usage_preference",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_backward",
    "is_autotuner_enabled_for_forward",
    "is_autotuner_thorough_for_backward",
    "is_autotuner_thorough_for_forward",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_gemm_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "is_tf32_in_gemm_na_enabled",
    "is_tiled_na_enabled",
    "set_memory_usage_preference",
    "should_force_flex_attention",
    "should_use_flex_attention",
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_flex_attention",
    "use_fna",
    "use_fused_na",
    "use_gemm_na",
    "use_kv_parallelism_in_fused_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
]


class MemoryUsagePreference(Enum):
    """How much memory upstream's fused backward was allowed to take."""

    Default = 0
    Strict = 1
    Unrestricted = 2


class NattenContext:
    """The settings of the switches, which have no effect on results and speed."""

    is_deterministic_mode_enabled: bool = False
    is_fused_na_enabled: bool = False
    is_kv_parallelism_enabled: bool = True
    training_memory_preference: MemoryUsagePreference = MemoryUsagePreference.Default
    is_tiled_na_enabled: bool = True
    is_gemm_na_enabled: bool = True
    is_tf32_in_gemm_na_enabled: bool = False
    flex_attention: bool = False
    flex_attention_forced: bool = False
    flex_compile_allowed: bool = False
    flex_compile_backprop_allowed: bool = False

    @staticmethod
    def reset() -> None:
        """Set everything back to the defaults."""
        _restore(NattenContext, _NATTEN_DEFAULTS)


class AutotunerContext(tuning.Autotuner):
    """The settings of :func:`use_autotuner`."""

    warmup_steps_forward: int = 5
    warmup_steps_backward: int = 5
    steps_forward: int = 5
    steps_backward: int = 5

    @staticmethod
    def reset() -> None:
        """Set everything back to the defaults."""
        tuning.disable_autotuner()
        _restore(AutotunerContext, _AUTOTUNER_DEFAULTS)


def _values(context: type) -> dict[str, Any]:
    return {name: getattr(context, name) for name in context.__annotations__}


def _restore(context: type, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(context, name, value)


_NATTEN_DEFAULTS, _AUTOTUNER_DEFAULTS = _values(NattenContext), _values(AutotunerContext)


# --- memory, determinism, KV parallelism, fused ---


def set_memory_usage_preference(pref: str = "default") -> None:
    """Remember "default", "strict" or "unrestricted", without effect.

    Raises:
        ArgumentError: ``pref`` is something else.
    """
    names = {each.name.lower(): each for each in MemoryUsagePreference}
    if pref not in names:
        raise ArgumentError(f"`pref` must be one of {sorted(names)}, got {pref!r}.")
    NattenContext.training_memory_preference = names[pref]


def get_memory_usage_preference() -> MemoryUsagePreference:
    """The setting of :func:`set_memory_usage_preference`."""
    return NattenContext.training_memory_preference


def is_memory_usage_default() -> bool:
    """Whether the preference is "default"."""
    return get_memory_usage_preference() is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    """Whether the preference is "strict"."""
    return get_memory_usage_preference() is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    """Whether the preference is "unrestricted"."""
    return get_memory_usage_preference() is MemoryUsagePreference.Unrestricted


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Forbid the autotuner and KV parallelism, as upstream does.

    Results are the same either way, because every backend is deterministic.
    """
    NattenContext.is_deterministic_mode_enabled = mode
    if mode:
        NattenContext.is_kv_parallelism_enabled = False
        tuning.use_autotuner(False, False)


def are_deterministic_algorithms_enabled() -> bool:
    """The setting of :func:`use_deterministic_algorithms`."""
    return NattenContext.is_deterministic_mode_enabled


def _forbid(what: str) -> None:
    """Raise an error in natten's deterministic mode."""
    if NattenContext.is_deterministic_mode_enabled:
        raise ArgumentError(
            f"{what} is not deterministic, and natten.use_deterministic_algorithms is on."
        )


def _forbidden(what: str) -> bool:
    """Whether determinism forbids ``what``: natten's raises an error, torch's only warns."""
    _forbid(what)
    if torch.are_deterministic_algorithms_enabled():
        warnings.warn(
            f"{what} is not deterministic: left off, because PyTorch's deterministic mode is on",
            stacklevel=3,
        )
        return True
    return False


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """No effect: kernels here need no KV parallelism.

    Raises:
        ArgumentError: natten's deterministic mode is on, and ``mode`` is True.
    """
    NattenContext.is_kv_parallelism_enabled = bool(mode) and not _forbidden("KV parallelism")


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """The setting of :func:`use_kv_parallelism_in_fused_na`; True by default, as since 0.17.2."""
    return NattenContext.is_kv_parallelism_enabled


def use_fused_na(
    mode: bool = True,
    kv_parallel: bool = True,
    use_flex_attention: bool = False,
    force_flex_attention: bool = False,
) -> None:
    """No effect: modules take the fused operator wherever it can do their work.

    Raises:
        ArgumentError: ``kv_parallel`` is asked for in natten's deterministic mode.
    """
    if not mode:
        NattenContext.is_fused_na_enabled = NattenContext.is_kv_parallelism_enabled = False
        return
    NattenContext.is_kv_parallelism_enabled = kv_parallel and not _forbidden("KV parallelism")
    NattenContext.is_fused_na_enabled = True
    NattenContext.flex_attention = use_flex_attention or force_flex_attention
    NattenContext.flex_attention_forced = force_flex_attention


def is_fused_na_enabled() -> bool:
    """The setting of :func:`use_fused_na`."""
    return NattenContext.is_fused_na_enabled


use_fna, is_fna_enabled = use_fused_na, is_fused_na_enabled


def use_flex_attention() -> None:
    """No effect: there is no FlexAttention backend."""
    NattenContext.flex_attention = True


def force_flex_attention() -> None:
    """No effect: there is no FlexAttention backend."""
    NattenContext.flex_attention = NattenContext.flex_attention_forced = True


def should_use_flex_attention() -> bool:
    """The setting of :func:`use_flex_attention`."""
    return NattenContext.flex_attention


def should_force_flex_attention() -> bool:
    """The setting of :func:`force_flex_attention`."""
    return NattenContext.flex_attention_forced


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """No effect: there is no FlexAttention backend."""
    NattenContext.flex_compile_allowed = mode
    NattenContext.flex_compile_backprop_allowed = mode and backprop


def allow_flex_compile_backprop(mode: bool = True) -> None:
    """No effect: there is no FlexAttention backend."""
    NattenContext.flex_compile_backprop_allowed = mode


def disable_flex_compile() -> None:
    """``allow_flex_compile(False)``."""
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    """``allow_flex_compile_backprop(False)``."""
    allow_flex_compile_backprop(False)


def is_flex_compile_allowed() -> bool:
    """The setting of :func:`allow_flex_compile`."""
    return NattenContext.flex_compile_allowed


def is_flex_compile_backprop_allowed() -> bool:
    """The setting of :func:`allow_flex_compile_backprop`."""
    return NattenContext.flex_compile_backprop_allowed


# --- the autotuner ---


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """:func:`natten.tuning.use_autotuner`; numbers of steps are remembered, without effect.

    Raises:
        ArgumentError: a setting has the wrong type, or natten's deterministic mode is on.
    """
    steps = {
        "warmup_steps_forward": warmup_steps_forward,
        "warmup_steps_backward": warmup_steps_backward,
        "steps_forward": steps_forward,
        "steps_backward": steps_backward,
    }
    for name, count in steps.items():
        fits = isinstance(count, int) and not isinstance(count, bool) and count > 0
        if count is not None and not fits:
            raise ArgumentError(f"`{name}` must be None or a positive integer, got {count!r}.")
    if forward_pass is False and backward_pass is False:
        tuning.use_autotuner(False, False)
        return
    if forward_pass or backward_pass:
        _forbid("the autotuner")
    tuning.use_autotuner(forward_pass, backward_pass, thorough_mode_forward, thorough_mode_backward)
    _restore(AutotunerContext, {name: x for name, x in steps.items() if x is not None})


def is_autotuner_enabled_for_forward() -> bool:
    """The setting of :func:`use_autotuner`."""
    return tuning.Autotuner.enabled_for_forward


def is_autotuner_enabled_for_backward() -> bool:
    """The setting of :func:`use_autotuner`."""
    return tuning.Autotuner.enabled_for_backward


def is_autotuner_enabled() -> bool:
    """Whether either pass is on."""
    return is_autotuner_enabled_for_forward() or is_autotuner_enabled_for_backward()


def is_autotuner_thorough_for_forward() -> bool:
    """Whether the forward pass is on, and thorough."""
    return is_autotuner_enabled_for_forward() and tuning.Autotuner.thorough_mode_forward


def is_autotuner_thorough_for_backward() -> bool:
    """Whether the backward pass is on, and thorough."""
    return is_autotuner_enabled_for_backward() and tuning.Autotuner.thorough_mode_backward


# --- features and the unfused kernels of 0.14 to 0.17 ---

Device = torch.device | int | str | None


def has_cuda() -> bool:
    """Whether there is a GPU."""
    return torch.cuda.is_available()


def get_device_cc(device_index: Device = None) -> int:
    """Compute capability of a GPU, such as 90 for 9.0; 0 without a GPU."""
    if not has_cuda():
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def has_half(device_index: Device = None) -> bool:
    """Whether there is a GPU. The CPU runs float16 too, but old releases asked about the GPU."""
    return get_device_cc(device_index) >= 50


def has_bfloat(device_index: Device = None) -> bool:
    """Whether there is a GPU with bfloat16. The CPU runs bfloat16 too."""
    return get_device_cc(device_index) >= 80


def has_gemm(device_index: Device = None) -> bool:
    """Whether there is a GPU with matrix units."""
    return get_device_cc(device_index) >= 70


def has_fused_na(device_index: Device = None) -> bool:
    """Whether there is a GPU. The fused operators run on the CPU too."""
    return get_device_cc(device_index) >= 50


def has_tf32_gemm(device_index: Device = None) -> bool:
    """Whether there is a GPU with TF32."""
    return get_device_cc(device_index) >= 80


has_fna, has_fp32_gemm, has_fp64_gemm = has_fused_na, has_tf32_gemm, has_tf32_gemm


def use_tf32_in_gemm_na(mode: bool = True) -> None:
    """No effect; the setting stays off without a GPU. PyTorch's own TF32 setting counts."""
    NattenContext.is_tf32_in_gemm_na_enabled = mode and has_tf32_gemm()


def use_tiled_na(mode: bool = True) -> None:
    """No effect."""
    NattenContext.is_tiled_na_enabled = mode


def use_gemm_na(mode: bool = True) -> None:
    """No effect."""
    NattenContext.is_gemm_na_enabled = mode


def is_tf32_in_gemm_na_enabled() -> bool:
    """The setting of :func:`use_tf32_in_gemm_na`."""
    return NattenContext.is_tf32_in_gemm_na_enabled


def is_tiled_na_enabled() -> bool:
    """The setting of :func:`use_tiled_na`."""
    return NattenContext.is_tiled_na_enabled


def is_gemm_na_enabled() -> bool:
    """The setting of :func:`use_gemm_na`."""
    return NattenContext.is_gemm_na_enabled


def enable_tf32() -> bool:
    """``use_tf32_in_gemm_na(True)``; returns the flag."""
    use_tf32_in_gemm_na(True)
    return is_tf32_in_gemm_na_enabled()


def disable_tf32() -> bool:
    """``use_tf32_in_gemm_na(False)``; returns the flag."""
    use_tf32_in_gemm_na(False)
    return is_tf32_in_gemm_na_enabled()


def enable_tiled_na() -> bool:
    """``use_tiled_na(True)``; returns the flag."""
    use_tiled_na(True)
    return is_tiled_na_enabled()


def disable_tiled_na() -> bool:
    """``use_tiled_na(False)``; returns the flag."""
    use_tiled_na(False)
    return is_tiled_na_enabled()


def enable_gemm_na() -> bool:
    """``use_gemm_na(True)``; returns the flag."""
    use_gemm_na(True)
    return is_gemm_na_enabled()


def disable_gemm_na() -> bool:
    """``use_gemm_na(False)``; returns the flag."""
    use_gemm_na(False)
    return is_gemm_na_enabled()
