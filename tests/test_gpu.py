"""The public operators on a GPU against the CPU; the kernels' own sweep is in sweep.py."""

import pytest
import torch
from helpers import assert_close

import natten
from natten import NeighborhoodAttention2D, VarlenLayout, na2d, na2d_av, na2d_qk

pytestmark = pytest.mark.gpu
FULL = ((3, 5), (2, 1), (1, 2), (True, False))


def inputs():
    return [torch.randn(2, 9, 11, 4, 16) for _ in range(3)]


def on_both(function, *tensors):
    """Results on the CPU and on the GPU."""
    return function(*tensors), function(*(x.to("cuda") for x in tensors))


def test_fused_with_gradients():
    for dtype, backend in (
        (torch.float64, None),
        (torch.float32, "tiled"),
        (torch.float32, None),
        (torch.bfloat16, None),
    ):

        def function(*args, backend=backend):
            leaves = [x.detach().requires_grad_() for x in args]
            q, k, v, rpb = leaves
            out, lse = na2d(q, k, v, *FULL, rpb=rpb, backend=backend, return_lse=True)
            total = out.float().square().sum() + lse.sum()
            return (out, lse, *torch.autograd.grad(total, leaves))

        tensors = [x.to(dtype) for x in (*inputs(), torch.randn(4, 5, 9))]
        ratio = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
        for a, b in zip(*on_both(function, *tensors)):
            assert_close(f"{dtype} {backend}", a, b.cpu(), ratio)


def test_unfused():
    q, k, v = (x.movedim(-2, 1) for x in inputs())

    def function(q, k, v, rpb):
        attn = na2d_qk(q, k, 3, 2, rpb=rpb).softmax(-1)
        return na2d_av(attn, v, 3, 2)

    a, b = on_both(function, q, k, v, torch.randn(4, 5, 5))
    assert_close("unfused", a, b.cpu(), 1e-5)


def test_forward_mode():
    def function(q, k, v, t):
        return torch.func.jvp(lambda x: na2d(x, k, v, 3), (q,), (t,))[1]

    a, b = on_both(function, *inputs(), torch.randn(2, 9, 11, 4, 16))
    assert_close("tangent", a, b.cpu(), 1e-5)


def test_packed_and_plain():
    layout = VarlenLayout([(5, 6), (9, 4)])
    a, b = on_both(lambda x: natten.na2d_varlen(x, x, x, layout, 3), torch.randn(66, 2, 8))
    assert_close("varlen", a, b.cpu(), 1e-5)
    a, b = on_both(lambda x: natten.attention(x, x, x, is_causal=True), torch.randn(2, 50, 2, 8))
    assert_close("attention", a, b.cpu(), 1e-5)


def test_compiled_and_captured_module():
    module = NeighborhoodAttention2D(64, 4, 5, dilation=2, rel_pos_bias=True)
    x = torch.randn(2, 12, 14, 64)
    expected = module(x)
    module, x = module.to("cuda"), x.to("cuda")
    compiled = torch.compile(module, fullgraph=True)
    out = compiled(x)
    out.sum().backward()
    assert_close("compiled", expected, out.detach().cpu(), 1e-4)
    with torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(x)
    graph.replay()
    assert_close("captured", expected, captured.cpu(), 1e-4)


def test_same_bits_on_every_run():
    q, k, v = (x.to("cuda").requires_grad_() for x in inputs())

    def run():
        out = na2d(q, k, v, *FULL)
        return (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_queries_say_there_is_a_gpu():
    assert natten.has_fused_na() and natten.HAS_LIBNATTEN
    assert "triton: runs" in natten.backends.explain(torch.zeros(1, 9, 1, 8, device="cuda"))
