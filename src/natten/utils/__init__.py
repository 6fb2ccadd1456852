"""Where 0.17 to 0.21 had argument helpers; they live in :mod:`natten.legacy.checks`."""

from .._submodules import getter as _getter
from ..legacy.checks import (
    check_additional_keys,
    check_additional_values,
    check_all_args,
    check_backward_tiling_config,
    check_causal_arg,
    check_dilation_arg,
    check_input_size_arg,
    check_kernel_size_arg,
    check_tiling_config,
    get_num_na_weights,
    make_attn_tensor_from_input,
)
from ..legacy.switches import get_device_cc
from ..legacy.types import NoneType

__all__ = [
    "NoneType",
    "check_additional_keys",
    "check_additional_values",
    "check_all_args",
    "check_backward_tiling_config",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_size_arg",
    "check_tiling_config",
    "get_device_cc",
    "get_num_na_weights",
    "make_attn_tensor_from_input",
]

__getattr__ = _getter(__name__)
