"""Where 0.15 and 0.17 had helpers for tensors; they live in :mod:`natten.legacy.checks`."""

from natten.legacy.checks import (
    check_additional_keys,
    check_additional_values,
    make_attn_tensor_from_input,
)

__all__ = ["check_additional_keys", "check_additional_values", "make_attn_tensor_from_input"]
