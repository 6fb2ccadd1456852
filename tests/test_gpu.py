"""The public operators on a GPU against the CPU; the kernels' own sweep is in sweep.py."""

import pytest
import torch
from helpers import RATIO, assert_close

import natten
from natten import NeighborhoodAttention2D, VarlenLayout, na2d, na2d_av, na2d_qk
from natten.neighborhood import Neighborhood

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


UNFUSED = {
    "plain": {"kernel_size": (3, 5)},
    "dilated": {"kernel_size": (3, 3), "stride": (2, 1), "dilation": (1, 3)},
    "causal": {"kernel_size": (4, 3), "stride": (3, 1), "is_causal": (True, False)},
}


@pytest.mark.parametrize("name", UNFUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unfused(name, dtype):
    """Values, tangents and gradients of the unfused operators against float64."""
    options, space = UNFUSED[name], (9, 11)
    rule = Neighborhood.create(2, **options)
    seen = rule.attended_slots(space)

    def products(q, k, rpb, attn, v):
        # Causality fills slots with -inf, on which no error can be measured.
        scores = na2d_qk(q, k, rpb=rpb, **options).masked_fill(~seen.to(q.device), 0)
        return scores, na2d_av(attn, v, **options)

    def derivatives(*tensors):
        inputs, changes, grads = tensors[:5], tensors[5:10], tensors[10:]
        _, tangents = torch.func.jvp(products, inputs, changes)
        out, pull = torch.func.vjp(products, *inputs)
        return (*out, *tangents, *pull(grads))

    q, k, v = (torch.randn(2, *space, 3, 20, dtype=dtype).movedim(-2, 1) for _ in range(3))
    rpb = torch.randn(3, *(2 * n - 1 for n in rule.kernel_size), dtype=dtype)
    attn = torch.randn(2, 3, *space, rule.window_tokens, dtype=dtype)
    inputs = (q, k, rpb, attn, v)
    tensors = (*inputs, *(torch.randn_like(x) for x in (*inputs, attn, v)))
    expected = derivatives(*(x.double() for x in tensors))
    actual = derivatives(*(x.to("cuda") for x in tensors))
    for i, (a, b) in enumerate(zip(expected, actual)):
        assert_close(f"{name} {i}", a, b.cpu(), RATIO[dtype] * (1 if i < 2 else 2))


def test_unfused_runs_without_gathers():
    """The default backend has the unfused operators, for any head dim; they need no workspace."""
    problem = natten.backends.Problem("unfused", torch.device("cuda"), torch.bfloat16, 300)
    assert natten.backends.choose("", problem).name == "triton"
    q = torch.randn(2, 2, 128, 128, 64, device="cuda", dtype=torch.bfloat16)
    attn = na2d_qk(q, q, 7)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = na2d_av(attn, q, 7)
    assert torch.cuda.max_memory_allocated() - before <= out.nbytes + 2**20


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
