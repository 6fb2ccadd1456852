"""The public operators on a GPU compared with the CPU; sweep.py tests the kernels more widely."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import RATIO, assert_close

import natten
from natten import NeighborhoodAttention2D, VarlenLayout, na2d, na2d_av, na2d_qk
from natten.neighborhood import Neighborhood
from natten.operators.schema import pack

pytestmark = pytest.mark.gpu
FULL = ((3, 5), (2, 1), (1, 2), (True, False))
large = pytest.mark.xdist_group("large")  # with --dist loadgroup, one at a time


def inputs():
    return [torch.randn(2, 9, 11, 4, 16) for _ in range(3)]


def on_both(function, *tensors):
    """The results on the CPU and on the GPU."""
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
    seen = rule.attended_slots(space, space)

    def products(q, k, rpb, attn, v):
        # Causality fills slots with -inf, where no error can be measured.
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
    """The default backend has unfused operators for any head dim, and they need no workspace."""
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


def test_compiled_into_graphs():
    """``mode="reduce-overhead"``, whose third call is the first that a CUDA graph answers."""
    torch.compiler.reset()
    module = NeighborhoodAttention2D(64, 4, 5, rel_pos_bias=True).to("cuda", torch.bfloat16)
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(2, 12, 14, 64, device="cuda", dtype=torch.bfloat16)
        found = []
        for function in (module, compiled):
            out = function(x)
            grads = torch.autograd.grad(out.sum(), module.parameters())
            found.append([each.detach().clone() for each in (out, *grads)])
        for expected, actual in zip(*found):
            assert_close("graphs", expected, actual, RATIO[torch.bfloat16])
    torch.compiler.reset()


def test_same_bits_on_every_run():
    few_keys = (torch.randn(1, *shape, 1, 64) for shape in ((160, 160), (20, 20), (20, 20)))
    for tensors, options in ((inputs(), {}), (few_keys, {"queries_per_key": 8})):
        q, k, v = (x.to("cuda").requires_grad_() for x in tensors)

        def run(options=options, leaves=(q, k, v)):
            windows = (9,) if options else FULL
            out = na2d(*leaves, *windows, **options, backend="triton")
            return (out, *torch.autograd.grad(out.square().sum(), leaves))

        first = run()
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_queries_say_there_is_a_gpu():
    assert natten.has_fused_na() and natten.HAS_LIBNATTEN
    assert "triton: runs" in natten.backends.explain(torch.zeros(1, 9, 1, 8, device="cuda"))


def leaves(*shape, dtype=torch.bfloat16, count=3):
    return [torch.randn(shape, dtype=dtype, device="cuda").requires_grad_() for _ in range(count)]


@large
@pytest.mark.parametrize("backend", [None, "triton"])
def test_more_than_2_to_the_31_elements(backend):
    """Upstream's issue 347: gradients of 2,097,153 x 16 x 64 were silently wrong."""
    tokens, window, tail = 2_097_153, 9, 256
    q, k, v = leaves(1, tokens, 16, 64, dtype=torch.float16)
    out = natten.na1d(q, k, v, window, backend=backend)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    # The end is computed by itself; where it was cut, queries and keys lack neighbors.
    ends = [x.detach()[:, -tail:].cpu().double().requires_grad_() for x in (q, k, v)]
    expected = natten.na1d(*ends, window, backend="reference")
    expected_grads = torch.autograd.grad(expected, ends, grad[:, -tail:].cpu().double())
    for name, a, b in zip(("out", "dq", "dk", "dv"), (expected, *expected_grads), (out, *grads)):
        inner = slice(2 * window, None)
        found = b.detach()[:, -tail:].cpu()[:, inner]
        assert_close(name, a.detach()[:, inner], found, 4e-3)


@large
def test_wide_values_dilated_over_a_large_picture():
    """Dilation groups are independent problems, so one near the end is compared."""
    size, dilation, window = 1216, 16, 5
    q, k = leaves(1, size, size, 4, 32, count=2)
    (v,) = leaves(1, size, size, 4, 384, count=1)  # 2.27e9 elements
    out = na2d(q, k, v, window, dilation=dilation)
    grads = torch.autograd.grad(out, (q, k, v), out.detach())
    group = (slice(None), slice(13, None, dilation), slice(15, None, dilation))
    own = [x.detach()[group].double().requires_grad_() for x in (q, k, v)]
    expected = na2d(*own, window, backend="tiled")
    expected_grads = torch.autograd.grad(expected, own, out.detach()[group].double())
    for a, b in zip((expected, *expected_grads), (out, *grads)):
        assert_close("group", a.detach(), b.detach()[group], 2e-2)


def test_operators_under_opcheck():
    rule = pack(Neighborhood.create(2, (3, 5), (2, 1), (1, 2), (True, False)))
    q, k, v = leaves(1, 9, 11, 2, 32)
    for backend in ("", "triton"):
        others = (*[None] * 5, *rule, 0.3, backend, [0])
        args = (q, k, v, *others)
        torch.library.opcheck(torch.ops.natten.attention.default, args)
        out, lse = (x.detach() for x in torch.ops.natten.attention(*args))
        given = (out, lse, out, lse, *(x.detach() for x in (q, k, v)), *others)
        torch.library.opcheck(torch.ops.natten.attention_backward.default, given)


def test_exported():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return na2d(q, k, v, 5, dilation=2)

    qkv = [x.detach() for x in leaves(1, 12, 14, 2, 32)]
    program = torch.export.export(Model(), tuple(qkv))
    assert_close("exported", Model()(*qkv).cpu(), program.module()(*qkv).cpu(), 1e-3)


def test_packaged(tmp_path):
    """AOTInductor packages run in half precision; it does not allow empty lists as arguments."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = NeighborhoodAttention2D(64, 2, 3, dilation=(1, 2), rel_pos_bias=True)

        def forward(self, x):
            tokens = self.layer(x).unflatten(-1, (2, 32)).flatten(1, 2)
            return natten.attention(tokens, tokens, tokens)

    model, x = Model().to("cuda", torch.float16).eval(), torch.randn(2, 9, 8, 64)
    x = x.to("cuda", torch.float16)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        # Packages of a compiler with a static standard library do not load (docs/export.md).
        compilers = "/usr/bin/g++", *torch._inductor.config.cpp.cxx
        with torch._inductor.config.patch({"cpp.cxx": compilers}):
            path = torch._inductor.aoti_compile_and_package(
                program, package_path=str(tmp_path / "model.pt2")
            )
        found = torch._inductor.aoti_load_package(path)(x)
        assert_close("packaged", model(x), found, RATIO[torch.float16])


def test_training_step_is_captured():
    q, k, v = leaves(2, 12, 14, 2, 64)

    def step():
        out = na2d(q, k, v, 5)
        return (out, *torch.autograd.grad(out, (q, k, v), out.detach()))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(step(), captured):
        assert torch.equal(a, b)


def test_calls_neither_wait_nor_allocate_more_than_they_return():
    q, k, v = leaves(2, 64, 64, 4, 64)
    size = q.numel() * q.element_size()
    rows = q.numel() // 64
    torch.use_deterministic_algorithms(True)
    try:
        out = na2d(q, k, v, 7)
        torch.autograd.grad(out, (q, k, v), out.detach())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = na2d(q, k, v, 7)
        after_forward = torch.cuda.max_memory_allocated() - before
        grad = out.detach()
        torch.autograd.grad(out, (q, k, v), grad)
        after_backward = torch.cuda.max_memory_allocated() - before
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert after_forward <= 1.01 * (size + 4 * rows)
    assert after_backward <= 1.01 * (4 * size + (4 + 16) * rows) + (1 << 20)


def test_new_sizes_compile_nothing():
    from natten.backends.triton.forward import forward_kernel

    tiles = {"q_tile_shape": (8, 8), "kv_tile_shape": (8, 8), "backend": "triton"}

    def compiled():
        return sum(len(caches[0]) for caches in forward_kernel.device_caches.values())

    counts = []
    for height, width, heads in ((20, 30, 2), (21, 33, 3), (64, 17, 1), (50, 50, 4)):
        q, k, v = (x.detach() for x in leaves(1, height, width, heads, 32))
        na2d(q, k, v, (5, 7), **tiles)
        na2d(q, k, v, (3, 11), dilation=(2, 1), **tiles)
        counts.append(compiled())
    assert len(set(counts)) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_what_was_compiled_ahead_is_launched(bias, monkeypatch):
    """With tensors that hold data nothing is compiled again, and numbers are right."""
    from triton.runtime.jit import JITFunction

    heads, window, tensors = 3, (3, 9), leaves(1, 24, 40, 3, 48)
    if bias:
        tensors += leaves(heads, 5, 17, dtype=torch.float32, count=1)
    names = "query", "key", "value", "rpb"
    meta = [torch.empty_like(x, device="meta").requires_grad_() for x in tensors]
    natten.compile_ahead([{**dict(zip(names, meta)), "kernel_size": window}])
    monkeypatch.setattr(JITFunction, "_do_compile", lambda *_: pytest.fail("compiles again"))

    def function(*args):
        leaves = [x.detach().requires_grad_() for x in args]
        out = na2d(**dict(zip(names, leaves)), kernel_size=window)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    for a, b in zip(*on_both(function, *(x.detach().cpu() for x in tensors))):
        assert_close(f"bias {bias}", a, b.cpu(), 2e-2)


def test_autotuner_keeps_the_fastest(tmp_path, monkeypatch):
    monkeypatch.setenv("NATTEN_CACHE", str(tmp_path))
    q, k, v = leaves(1, 40, 40, 2, 32)
    expected = na2d(q, k, v, 7, backend="triton")
    natten.use_autotuner(True, True)
    try:
        out = na2d(q, k, v, 7, backend="triton")
        torch.autograd.grad(out, (q, k, v), out.detach())
    finally:
        natten.disable_autotuner()
    assert_close("tuned", expected.detach().cpu(), out.detach().cpu(), 1e-2)
    assert len(list(tmp_path.rglob("*.json"))) == 3


@pytest.mark.parametrize("backend", [None, "triton"])
def test_in_new_threads(backend):
    """A call may be the first use of CUDA in its thread."""
    q, k, v = (x.detach() for x in leaves(1, 20, 20, 2, 64))
    expected = na2d(q, k, v, 7, backend=backend)
    others = [[x.clone() for x in (q, k, v)] for _ in range(3)]  # at new addresses
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda each: na2d(*each, 7, backend=backend), others))
    assert all(torch.equal(expected, x) for x in found)


def test_packed_sequences_without_waiting():
    q, k, v = leaves(1, 700, 2, 64)
    starts = torch.tensor([0, 100, 100, 300, 700], dtype=torch.int32, device="cuda")
    options = {"cumulative_seqlen_Q": starts, "cumulative_seqlen_KV": starts}
    options |= {"max_seqlen_Q": 400, "max_seqlen_KV": 400, "return_lse": True}
    found = []
    for backend in (None, "tiled"):
        if backend is None:
            natten.attention(q, k, v, **options)
            torch.cuda.set_sync_debug_mode("error")
        try:
            out, lse = natten.attention(q, k, v, is_causal=True, backend=backend, **options)
            grads = torch.autograd.grad((out, lse), (q, k, v), (out.detach(), lse.detach()))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append((out, lse, *grads))
    for a, b in zip(*found):
        assert_close("packed", b.detach().cpu(), a.detach().cpu(), 2e-2)
