"""Where 0.17 to 0.21 had argument helpers; ``check_all_args`` takes a stride here, or none."""

from ..legacy.checks import (
    check_additional_keys,
    check_additional_values,
    check_args_against_input,
    check_backward_tiling_config,
    check_causal_arg,
    check_dilation_arg,
    check_input_size_arg,
    check_kernel_size_arg,
    check_stride_arg,
    check_tiling_config,
    get_num_na_weights,
)
from ..legacy.checks import (
    check_all_args_with_stride as check_all_args,
)
from ..legacy.types import create_causal_arg_from_bool, create_dim_from_int

__all__ = [
    "check_additional_keys",
    "check_additional_values",
    "check_all_args",
    "check_args_against_input",
    "check_backward_tiling_config",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_size_arg",
    "check_stride_arg",
    "check_tiling_config",
    "create_causal_arg_from_bool",
    "create_dim_from_int",
    "get_num_na_weights",
]
