"""The few functions of 0.17's C++ extension that Python code imported."""

from torch import Tensor

from natten.legacy.switches import has_cuda, has_gemm

__all__ = ["compute_delta", "has_cuda", "has_gemm"]


def compute_delta(out: Tensor, d_out: Tensor, delta: Tensor) -> None:
    """Write the sums over channels of ``out * d_out`` into ``delta``, in its dtype."""
    delta.copy_((out.to(delta.dtype) * d_out.to(delta.dtype)).sum(-1))
