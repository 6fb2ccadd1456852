"""Where 0.20 and 0.21 had argument helpers; ``check_all_args`` takes a stride here."""

from natten.legacy.checks import (
    check_all_args_with_stride as check_all_args,
)
from natten.legacy.checks import (
    check_args_against_input,
    check_causal_arg,
    check_dilation_arg,
    check_kernel_size_arg,
    check_stride_arg,
)

__all__ = [
    "check_all_args",
    "check_args_against_input",
    "check_causal_arg",
    "check_dilation_arg",
    "check_kernel_size_arg",
    "check_stride_arg",
]
