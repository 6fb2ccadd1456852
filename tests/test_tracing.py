"""Tools that record calls get a right graph, or an error that says what to do."""

import io

import pytest
import torch
from helpers import assert_close
from torch.fx import symbolic_trace
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from natten.errors import UnsupportedError

LAYERS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


def fused(q, k, rpb):
    options = {"is_causal": (True, False), "rpb": rpb, "return_lse": True}
    out, lse = natten.na2d(q, k, k, (2, 3), dilation=(2, 1), **options)
    return out * lse[..., None]


def unfused(q, k, rpb):
    q, k = q.movedim(-2, 1), k.repeat_interleave(2, -2).movedim(-2, 1)
    options = {"is_causal": (True, False)}
    attn = natten.na2d_qk(q, k, (2, 3), (2, 1), rpb=rpb, **options).softmax(-1)
    return natten.na2d_av(attn, k, (2, 3), (2, 1), **options)


def dense(q, k, rpb):
    out, lse = natten.attention(
        q.flatten(1, 2), k.flatten(1, 2), k.flatten(1, 2), True, return_lse=True
    )
    return out * lse[..., None]


def inputs(height=5):
    shapes = (2, height, 6, 4, 3), (2, height, 6, 2, 3), (4, 3, 5)
    return [torch.randn(shape).double().requires_grad_() for shape in shapes]


def saved(traced):
    """A traced function after saving and loading."""
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


def nodes(traced):
    return [node.kind() for node in traced.inlined_graph.nodes() if "natten" in node.kind()]


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (fused, ["natten::attention"]),
        (unfused, ["natten::qk", "natten::rpb_bias", "natten::av"]),
        (dense, ["natten::attention"]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_trace_holds_the_operators_and_can_be_saved(function, wanted):
    """It takes new numbers, and gives first and second derivatives."""
    traced = torch.jit.trace(function, inputs())
    assert nodes(traced) == wanted
    given = inputs()
    used = given if function is not dense else given[:2]
    results = []
    for each in (function, saved(traced)):
        out = each(*given)
        grads = torch.autograd.grad(out.sin().sum(), used, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), used)
        results.append((out, *grads, *second))
    for expected, found in zip(*results):
        assert_close(function.__name__, expected, found, 1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_traced_layers(rank):
    """They take other sizes, too, and refuse an image that the window does not fit."""
    layer = LAYERS[rank](8, 2, 3, rel_pos_bias=True, dilation=2).eval()
    traced = saved(torch.jit.trace(layer, torch.randn(2, *(7, 8, 6)[:rank], 8)))
    x = torch.randn(3, *(6, 7, 9)[:rank], 8)
    assert_close("traced", layer(x), traced(x), 1e-6)
    with pytest.raises(RuntimeError, match="must not exceed the input on any axis"):
        traced(torch.randn(1, *(6, 6, 6)[: rank - 1], 5, 8))


def test_traced_packed_attention_reads_its_lengths():
    def packed(q, lengths):
        return natten.attention(q, q, q, seqlens_Q=lengths, seqlens_KV=lengths)

    q = torch.randn(1, 9, 2, 4)
    traced = torch.jit.trace(packed, (q, torch.tensor([4, 5])))
    assert nodes(traced) == ["natten::packed_attention"]
    lengths = torch.tensor([2, 3, 4])
    assert torch.equal(saved(traced)(q, lengths), packed(q, lengths))


def test_gradients_inside_a_trace_are_refused():
    """The tracer would record the tensors that the forward pass saved as constants."""

    def gradient(q):
        q = q.detach().requires_grad_()
        return torch.autograd.grad(natten.na1d(q, q, q, 3).square().sum(), q)[0]

    def second(q):
        q = q.detach().requires_grad_()
        out = natten.na1d(q, q, q, 3).square().sum()
        return torch.autograd.grad(out, q, create_graph=True)[0]

    def of_unfused(q):
        q = q.detach().requires_grad_()
        x = q.movedim(-2, 1)
        return torch.autograd.grad(natten.na1d_qk(x, x, 3).square().sum(), q)[0]

    for function in (gradient, second, of_unfused):
        with pytest.raises(UnsupportedError, match="can not record gradients"):
            torch.jit.trace(function, torch.randn(1, 9, 2, 4))


@pytest.mark.parametrize("function", [fused, unfused, dense], ids=lambda f: f.__name__)
def test_the_old_onnx_exporter_is_refused(function):
    """It would record attention as a constant."""

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    pytest.importorskip("onnx")
    given = tuple(x.detach().float() for x in inputs())
    message = r"dynamo=True.*natten\.export\.decompositions\(\)"
    with pytest.raises(UnsupportedError, match=message):
        torch.onnx.export(Module(), given, io.BytesIO(), dynamo=False)


def test_symbolic_traces_hold_layers_as_nodes():
    layer = NeighborhoodAttention2D(8, 2, 3)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), layer)
    traced, x = symbolic_trace(model), torch.randn(1, 5, 6, 8)
    assert "call_module" in [node.op for node in traced.graph.nodes if node.target == "1"]
    assert torch.equal(traced(x), model(x))
    with pytest.raises(UnsupportedError, match=r"Sequential\(layer\).*torch\.export"):
        symbolic_trace(layer)


@pytest.mark.parametrize(
    "function",
    [
        lambda q: natten.na2d(q, q, q, 3),
        lambda q: natten.neighborhood_attention_generic(q, q, q, 3),
        lambda q: natten.na2d_qk(q, q, 3),
        lambda q: natten.na2d_av(q, q, 3),
        lambda q: natten.attention(q, q, q),
        lambda q: natten.merge_attentions([q], [q]),
    ],
)
def test_symbolic_traces_of_functions_are_refused(function):
    with pytest.raises(UnsupportedError, match=r"torch\.fx\.wrap"):
        symbolic_trace(function)


na2d = natten.na2d
torch.fx.wrap("na2d")


def test_symbolic_traces_hold_wrapped_functions():
    traced, q = symbolic_trace(lambda q: na2d(q, q, q, 3)), torch.randn(1, 5, 6, 2, 4)
    assert torch.equal(traced(q), na2d(q, q, q, 3))


def test_scripting_is_refused_and_scripts_call_traces():
    def uses_function(q: torch.Tensor) -> torch.Tensor:
        return natten.na2d(q, q, q, 3)

    layer, x = NeighborhoodAttention2D(8, 2, 3), torch.randn(1, 5, 6, 8)
    things = (layer, torch.nn.Sequential(layer), uses_function, natten.na1d_qk, natten.attention)
    for thing in things:
        with pytest.raises(UnsupportedError, match=r"torch\.jit\.trace"):
            torch.jit.script(thing)
    scripted = torch.jit.script(torch.nn.Sequential(torch.jit.trace(layer, x)))
    assert torch.equal(scripted(x), layer(x))


# --- counters of floating-point operations ---


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fvcore_counts_by_the_names_of_old_functions(rank):
    """VMamba and others register handlers for the names of NATTEN's autograd.Functions."""
    fvcore = pytest.importorskip("fvcore.nn")
    layer = LAYERS[rank](16, 2, 3, rel_pos_bias=True, attn_drop=0.1)
    x = torch.randn(1, *(5, 4, 6)[:rank], 16)
    tokens = x[0, ..., 0].numel()
    products = tokens * 16 * 3**rank  # multiply-adds of qk; av has the same number
    qk, av = (
        f"prim::PythonOp.NeighborhoodAttention{rank}D{n}AutogradFunction" for n in ("QK", "AV")
    )
    handlers = {
        qk: getattr(natten.flops, f"qk_{rank}d_rpb_flop"),
        av: getattr(natten.flops, f"av_{rank}d_flop"),
        f"prim::PythonOp.FusedNeighborhoodAttention{rank}D": natten.flops.fna_generic_flops,
    }

    def count():
        analysis = fvcore.FlopCountAnalysis(layer, x).set_op_handle(**handlers)
        counted = analysis.unsupported_ops_warnings(False).by_operator()
        assert counted["linear"] == 4 * tokens * 16 * 16
        return {name: n for name, n in counted.items() if name.startswith("PythonOp")}

    assert set(count().values()) == {products} and len(count()) == 2
    layer.eval()
    assert list(count().values()) == [2 * products]


def test_fvcore_counts_plain_attention_and_additional_tokens():
    pytest.importorskip("fvcore")

    class Model(torch.nn.Module):
        def forward(self, q, k, tokens):
            dense = natten.attention(q, k, k)
            window = natten.na1d(q, q, q, 3, additional_keys=tokens, additional_values=tokens)
            return dense + window

    given = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 4, 8), torch.randn(2, 6, 4, 8)
    found = natten.flops.get_flops(Model(), given, disable_warnings=True)
    assert found == 2 * (2 * 5 * 4) * (7 + 3 + 6) * 8


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_flop_counter_mode_counts_every_backend(backend):
    q = torch.randn(1, 9, 2, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        natten.na1d(q, q, q, 3, backend=backend).sum().backward()
    assert counter.get_total_flops() == 2 * (9 * 2 * 3 * 4) * (2 + 5)
