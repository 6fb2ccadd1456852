"""Who runs a call, and what reasons are given, under the interpreter."""

import pytest
import torch
from helpers import assert_close, triton

import natten
from natten import backends


def test_explanations():
    q = torch.randn(1, 9, 1, 4)
    assert "triton: runs" in backends.explain(q)
    assert "float64" in backends.explain(q.double())
    assert "head_dim 1 to 256" in backends.explain(torch.zeros(1, 9, 1, 300))


def test_the_default_is_right():
    q = torch.randn(1, 9, 1, 4)
    assert_close("out", natten.na1d(q, q, q, 3, backend="reference"), natten.na1d(q, q, q, 3), 1e-5)


@pytest.mark.parametrize("scale", [0.0, -2.0, 1e-6, 30.0])
def test_scales_of_scores_with_a_bias(scale):
    """The product starts from the bias over the scale."""
    q, rpb = torch.randn(1, 9, 1, 4), torch.randn(1, 5)
    problem = backends.Problem("attention", q.device, q.dtype, 4, 4, scale=scale, bias=True)
    assert ("divides a bias" in str(triton.unsupported(problem))) == (scale == 0.0)
    out = natten.na1d(q, q, q, 3, scale=scale, rpb=rpb)
    right = natten.na1d(q, q, q, 3, scale=scale, rpb=rpb, backend="reference")
    assert torch.allclose(out, right, atol=1e-5)
