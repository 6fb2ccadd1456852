"""Operators compile and export once for all sizes, and transforms work in compiled code."""

import io

import pytest
import torch
from helpers import RELEASE, assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.func import jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import NeighborhoodAttention2D
from natten.utils.varlen import generate_varlen_parameters

pytestmark = pytest.mark.no_cover


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def strided(q):
    return natten.na1d(q, q, q, 5, stride=3, dilation=2)


def causal(q):
    return natten.na3d(q, q, q, (2, 3, 3), (1, 2, 1), (1, 1, 2), (True, False, False))


def everything(q, k, rpb, additional):
    more = {"additional_keys": additional, "additional_values": additional.sin()}
    window = (2, 3), (2, 1), (1, 2), (True, False)
    out, lse = natten.na2d(q, k, k.sin(), *window, rpb=rpb, return_lse=True, **more)
    return out * lse[..., None]


def unfused(q, rpb, additional):
    q, additional = q.movedim(-2, 1), additional.movedim(-2, 1)
    options = {"is_causal": (True, False), "dilation": (1, 2)}
    attn = natten.na2d_qk(q, q, 3, additional_keys=additional, rpb=rpb, **options).softmax(-1)
    return natten.na2d_av(attn, q, 3, additional_values=additional, **options)


def merged(q, k):
    parts = (
        natten.attention(q, k, k, is_causal=True, return_lse=True),
        natten.na1d(q, q, q, 3, return_lse=True),
    )
    out, lse = natten.merge_attentions(*zip(*parts))
    return out * lse[..., None]


# No two sizes are equal and none is 1, because the compiler would specialize those.
SIZES = ((8, 13), (6, 17), (9, 29))
INPUTS = {
    strided: lambda b, n: [(b, n, 3, 4)],
    causal: lambda b, n: [(b, n - 6, n, n + 2, 3, 4)],
    everything: lambda b, n: [
        (b, n, n + 1, 6, 4),
        (b, n, n + 1, 3, 4),
        (6, 3, 5),
        (b, n + 4, 3, 4),
    ],
    unfused: lambda b, n: [(b, n, n + 1, 3, 4), (3, 5, 5), (b, n + 4, 3, 4)],
    merged: lambda b, n: [(b, n, 3, 4), (b, n + 4, 3, 4)],
}


def check(function, compiled, inputs):
    """Compare outputs and gradients of compiled and eager code."""
    results = []
    for each in (function, compiled):
        given = [x.detach().requires_grad_() for x in inputs]
        out = each(*given)
        results.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for expected, actual in zip(*results):
        assert_close("compiled", expected, actual, 1e-6)


@pytest.mark.parametrize("function", INPUTS, ids=lambda f: f.__name__)
def test_one_compilation_serves_all_sizes(function):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for b, n in SIZES:
        check(function, compiled, [torch.randn(shape).double() for shape in INPUTS[function](b, n)])
    assert counter.frame_count == 1


@pytest.mark.parametrize("attn_drop", [0.0, 1e-9])
def test_compiled_modules(attn_drop):
    """Dropout takes the unfused path, and a probability of 1e-9 drops nothing."""
    module = NeighborhoodAttention2D(
        8, 2, 3, dilation=2, rel_pos_bias=True, is_causal=(True, False), attn_drop=attn_drop
    ).double()
    x = torch.randn(1, 7, 6, 8).double()
    expected = module.eval()(x)
    compiled = torch.compile(module.train(), fullgraph=True, backend="aot_eager")
    assert_close("module", expected, compiled(x), 1e-6)


def test_compiled_code_under_autocast():
    q = torch.randn(1, 6, 6, 2, 8)
    compiled = torch.compile(lambda q: natten.na2d(q, q, q, 3), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(q).dtype == torch.bfloat16


@pytest.mark.parametrize("oversize", ["error", "clamp", "pad"])
def test_modules_are_not_compiled_again(oversize):
    module = NeighborhoodAttention2D(24, 2, 3, dilation=2, rel_pos_bias=True, oversize=oversize)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    compiled(torch.randn(4, 9, 11, 24))
    first = counter.frame_count
    for b, n in SIZES:
        x = torch.randn(b, n, n + 1, 24)
        assert_close(oversize, module(x), compiled(x), 1e-6)
    assert counter.frame_count == first


@pytest.mark.parametrize("oversize", ["clamp", "pad"])
def test_compiled_module_with_a_window_larger_than_the_input(oversize):
    module = NeighborhoodAttention2D(24, 2, 7, dilation=2, rel_pos_bias=True, oversize=oversize)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((4, 9, 15), (5, 3, 6)):
        x = torch.randn(*shape, 24)
        assert_close(oversize, module(x), compiled(x), 1e-6)


def packed_by(names):
    """Packed attention whose lengths are arguments of the compiled code."""

    def function(q, k, v, given):
        out, lse = natten.attention(q, k, v, True, return_lse=True, **dict(zip(names, given)))
        return out * lse.clamp(min=-1e3)[..., None]

    return function


CUMULATIVE = ("cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV")
DOCUMENTS = [
    ([5, 1, 9, 0, 2], [4, 2, 11, 8, 7]),
    ([3, 8, 10, 2, 0, 1, 5], [7, 5, 1, 16, 0, 2, 9]),
    ([2, 14, 3, 3], [7, 7, 10, 15]),
]


@pytest.mark.parametrize("names", [CUMULATIVE, CUMULATIVE[:2], ("seqlens_Q", "seqlens_KV")])
def test_packed_attention_compiles_once_for_all_lengths(names):
    """Lengths are data, so other lengths and numbers of documents compile nothing again."""
    function, counter = packed_by(names), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for ours, theirs in DOCUMENTS:
        q = torch.randn(1, sum(ours), 12, 13).double()
        k, v = (torch.randn(1, sum(theirs), 3, 13).double() for _ in range(2))
        given = (torch.tensor(ours), torch.tensor(theirs))
        if names[0] != "seqlens_Q":
            given = generate_varlen_parameters(q, k, v, *given)
        results = []
        for each in (function, compiled):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = each(*leaves, given)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for expected, actual in zip(*results):
            assert_close("packed", expected, actual, 1e-9)
    assert counter.frame_count == 1


def test_compiled_packed_attention_checks_lengths_when_it_runs():
    compiled = torch.compile(packed_by(CUMULATIVE[:2]), fullgraph=True, backend="aot_eager")
    q = torch.randn(1, 6, 2, 4)
    starts = torch.tensor([0, 2, 6])
    compiled(q, q, q, (starts, starts))
    with pytest.raises(natten.ArgumentError, match=r"`cumulative_seqlen_KV`.*6 tokens"):
        compiled(q, q, q, (starts, torch.tensor([0, 2, 5])))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_packed_documents_compile(rank):
    """Layouts are numbers in Python; there are gradients and a bias."""
    shapes = [(6, 4, 5)[:rank], (3, 7, 4)[:rank]]
    layout = natten.VarlenLayout(shapes)
    function = (natten.na1d_varlen, natten.na2d_varlen, natten.na3d_varlen)[rank - 1]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = torch.randn(layout.total_tokens, 2, 4), torch.randn(2, *(5,) * rank)
    results = []
    for each in (function, compiled):
        q, rpb = (x.clone().requires_grad_() for x in inputs)
        out = each(q, q.sin(), q.cos(), layout, 3, rpb=rpb)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, rpb))))
    for expected, actual in zip(*results):
        assert_close("varlen", expected, actual, 1e-5)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traces_of_packed_attention_hold_the_operator(mode):
    """They do not hold the lengths that they were traced with."""
    q, starts = torch.randn(1, 6, 2, 4), torch.tensor([0, 2, 6])
    function = packed_by(CUMULATIVE[:2])
    trace = make_fx(lambda q, starts: function(q, q, q, (starts, starts)), tracing_mode=mode)
    trace = trace(q, starts)
    assert torch.ops.natten.packed_attention.default in [node.target for node in trace.graph.nodes]
    others = torch.tensor([0, 5, 6])
    assert torch.equal(trace(q, others), function(q, q, q, (others, others)))


def test_flops_of_packed_attention():
    """The operator counts as eager code does; with fake tensors it counts an upper bound."""
    q, starts = torch.randn(1, 6, 2, 4, requires_grad=True), torch.tensor([0, 2, 6])
    lengths = None, None, starts, starts, 4, 4
    operator = torch.ops.natten.packed_attention
    functions = (
        lambda q: natten.attention(q, q, q, **dict(zip(CUMULATIVE, lengths[2:]))),
        lambda q: operator(q, q, q, *lengths, 0, 0.5, "", [0])[0],
    )
    for function in functions:
        with FlopCounterMode(display=False) as counter:
            function(q).sum().backward()
        assert counter.get_total_flops() == 2 * 2 * (2 * 2 + 4 * 4) * (2 * 4 + 5 * 4)
    with FlopCounterMode(display=False) as counter:
        operator(*(q.detach().to("meta"),) * 3, *lengths, 0, 0.5, "", [0])
    assert counter.get_total_flops() == 2 * 2 * 6 * 4 * 8


class Unfused(torch.nn.Module):
    def forward(self, q):
        attn = natten.na2d_qk(q, q, 3, is_causal=True).softmax(-1)
        return natten.na2d_av(attn, q, 3, is_causal=True)


@pytest.mark.parametrize(
    ("module", "shapes", "space", "operators"),
    [
        (
            NeighborhoodAttention2D(8, 2, 3, 2, (1, 2), (True, False), rel_pos_bias=True),
            ((2, 5, 7, 8), (3, 9, 12, 8)),
            (1, 2),
            {"attention"},
        ),
        (Unfused(), ((2, 2, 5, 7, 8), (3, 2, 9, 12, 8)), (2, 3), {"qk", "av"}),
    ],
    ids=["module", "unfused"],
)
def test_export_for_all_sizes(module, shapes, space, operators):
    """A program is saved, loaded, and run on a size that the export never saw."""
    dynamic = {0: Dim("batch"), space[0]: Dim("height", min=4), space[1]: Dim("width", min=6)}
    small, large = (torch.randn(shape) for shape in shapes)
    program = export(module, (small,), dynamic_shapes=(dynamic,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {f"natten.{name}.default" for name in operators} <= targets
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x in (small, large):
        assert_close("exported", module(x), loaded(x), 1e-6)


def test_transforms_inside_compiled_code():
    """torch.func.grad is left out: PyTorch refuses it for operators with a gradient formula."""
    q = torch.randn(3, 1, 9, 2, 4).double()
    functions = {
        "vmap": vmap(lambda x: natten.na1d(x, x, x, 3)),
        "vmap of unfused": vmap(lambda x: natten.na1d_qk(*(x.movedim(-2, 1),) * 2, 3)),
    }
    for name, function in functions.items():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_close(name, function(q), compiled(q), 1e-12)


def through_jvp(function, q, tangent):
    return jvp(function, (q,), (tangent,))[1]


def through_dual_numbers(function, q, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(q, tangent))).tangent


@pytest.mark.parametrize("mode", [through_jvp, through_dual_numbers], ids=lambda m: m.__name__)
@pytest.mark.parametrize("function", [strided, lambda q: natten.na2d_qk(q, q, 3)], ids=["f", "u"])
def test_forward_mode_is_never_silently_zero(mode, function):
    """PyTorch takes tangents of torch.library operators for zero; ours refuse or run eagerly."""
    q, tangent = (torch.randn(1, 11, 5, 3, 4).double() for _ in range(2))
    q, tangent = (x[:, :, 0] if function is strided else x for x in (q, tangent))
    expected = mode(function, q, tangent)
    assert expected.abs().min() > 0
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(mode, fullgraph=True, backend="aot_eager")(function, q, tangent)
    eager_inside = torch.compile(mode, backend="aot_eager")
    if RELEASE < (2, 7) and mode is through_dual_numbers:  # it runs nothing eagerly there
        with pytest.raises(natten.errors.UnsupportedError, match="forward mode"):
            eager_inside(function, q, tangent)
    else:
        assert_close("tangent", expected, eager_inside(function, q, tangent), 1e-12)


def test_activation_checkpointing():
    def function(q):
        return torch.utils.checkpoint.checkpoint(strided, q, use_reentrant=False)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    check(strided, compiled, [torch.randn(2, 11, 3, 4).double()])
    check(strided, function, [torch.randn(2, 11, 3, 4).double()])


def test_fake_tensors_have_the_shapes_of_real_ones():
    with torch.device("meta"):
        module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
        assert module(torch.zeros(2, 5, 6, 8)).shape == (2, 5, 6, 8)
        q = torch.zeros(2, 9, 4, 3, dtype=torch.bfloat16, requires_grad=True)
        v = torch.zeros(2, 9, 2, 5, dtype=torch.bfloat16)
        out, lse = natten.na1d(q, q[:, :, :2], v, 3, return_lse=True)
    assert (out.shape, out.dtype) == ((2, 9, 4, 5), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 9, 4), torch.float32)
    out.sum().backward()
    assert q.grad.shape == q.shape and q.grad.is_meta


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_traces_hold_the_operator(pre_dispatch):
    q, k, v = (torch.randn(1, 6, 6, 1, 8) for _ in range(3))
    trace = make_fx(lambda *x: natten.na2d(*x, 3), pre_dispatch=pre_dispatch)(q, k, v)
    assert torch.ops.natten.attention.default in [node.target for node in trace.graph.nodes]
    assert torch.equal(trace(q, k, v), natten.na2d(q, k, v, 3))
