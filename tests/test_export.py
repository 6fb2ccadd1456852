"""Programs for other runtimes: decompositions and ONNX. programs/test_inductor.py has packages."""

import math

import pytest
import torch
from helpers import CASES, RELEASE, assert_close, name_of, reference
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

import natten
from natten import gather
from natten.inputs import Inputs
from natten.operators import composed_attention, gathered_gradient

pytestmark = pytest.mark.no_cover

# --- gathered maps ---


def unfused_tensors(case):
    """Tensors for the unfused maps, heads-first."""
    shape = (case.batch, case.heads, *case.space)
    attn = torch.randn(*shape, case.rule.window_tokens).double()
    return attn, *(torch.randn(*shape, case.dim).double() for _ in range(2))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gathered_maps(case):
    """Masked slots hold NaN, and nothing may read them."""
    (attn, x, y), rule = unfused_tensors(case), case.rule
    masked = ~rule.attended_slots(case.space, case.space)
    attn = attn.masked_fill(masked, math.nan)
    last = [t.movedim(1, -2) for t in (attn.nan_to_num(), x, y)]
    wanted = {
        "qk": reference.qk(*last[1:], rule),
        "av": reference.av(last[0], last[1], rule),
        "av_transposed": reference.av_transposed(last[0], last[1], case.space, rule),
    }
    found = {
        "qk": gather.qk(x, y, rule),
        "av": gather.av(attn, x, rule),
        "av_transposed": gather.av_transposed(attn, x, case.space, rule),
    }
    for name, expected in wanted.items():
        assert_close(name, expected.movedim(-2, 1), found[name], 1e-12)
    rpb = torch.randn(case.heads, *(2 * k - 1 for k in case.kernel_size)).double()
    bias = reference.rpb_bias(rpb, case.space, case.space, rule).movedim(-2, 0)
    assert_close("bias", bias, gather.rpb_bias(rpb, case.space, case.space, rule), 1e-12)
    if case.batch:
        grad = reference.rpb_bias_transposed(last[0][0], case.space, rule)
        assert_close("rpb", grad, gather.rpb_bias_transposed(attn[0], case.space, rule), 1e-12)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gathered_gradient(case):
    inputs, rule = case.inputs(), case.rule
    out, lse = reference.forward(Inputs(*inputs), rule, 0.7)
    grads = torch.randn_like(out), torch.randn_like(lse)
    wanted = reference.backward(*grads, Inputs(*inputs), out, lse, rule, 0.7)
    found = gathered_gradient(*grads, inputs, rule, 0.7)
    for expected, actual in zip(wanted, found, strict=True):
        assert_close("gradient", expected, actual, 1e-11)


# --- decompositions ---


def calls(rank):
    """Calls of everything that operators can do, on tensors whose batch size is unknown."""
    space, kernel = (7, 6, 5)[:rank], (3, 2, 3)[:rank]

    def function(x, additional, rpb):
        q = x.unflatten(-1, (4, 6))
        k, v = q[..., :2, :], q[..., 2:, :4]  # two key heads for four query heads
        causal = (True, False, False)[:rank]
        options = {"dilation": (2, 1, 1)[:rank], "is_causal": causal, "rpb": rpb}
        tokens = additional.unflatten(-1, (2, 6))
        options |= {"additional_keys": tokens, "additional_values": tokens[..., :4]}
        out, lse = natten.neighborhood_attention_generic(
            q, k, v, kernel, (1, 2, 2)[:rank], return_lse=True, **options
        )
        if rank == 1:
            dense = natten.attention(q, k, v, is_causal=True, return_lse=True)
            return out, lse, *dense
        if rank == 3:
            return out, lse
        first, options = q.movedim(-2, 1), {"is_causal": causal}
        attn = natten.na2d_qk(first, first, kernel, rpb=rpb, **options).softmax(-1)
        return out, lse, natten.na2d_av(attn, first, kernel, **options)

    def inputs(batch):
        rpb = torch.randn(4, *(2 * k - 1 for k in kernel))
        return torch.randn(batch, *space, 24), torch.randn(batch, 3, 12), rpb

    return function, inputs


RANKS = {rank: calls(rank) for rank in (1, 2, 3)}


def of_ours(graph):
    return [node for node in graph.nodes if "natten" in str(node.target)]


@pytest.mark.parametrize("rank", RANKS)
def test_decomposed_training_step(rank):
    """In a graph with gradients, the forward and the backward operators are decomposed."""
    function, inputs = RANKS[rank]

    def step(*given):
        given = [x.detach().requires_grad_() for x in given]
        outputs = function(*given)
        loss = sum(x.sin().sum() for x in outputs)
        return *outputs, *torch.autograd.grad(loss, given)

    given = inputs(2)
    assert of_ours(make_fx(step)(*given).graph)
    trace = make_fx(step, decomposition_table=natten.export.decompositions())(*given)
    assert not of_ours(trace.graph)
    for expected, found in zip(step(*given), trace(*given), strict=True):
        assert_close("step", expected, found, 1e-5)


def test_gathered_attention_under_autocast():
    """Products are rounded there, the LSE is not; the bias has its part in that."""
    q, rpb = torch.randn(1, 9, 2, 8), torch.randn(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = composed_attention(
            Inputs(q, q, q, rpb), natten.Neighborhood.create(1, 3), 0.3, gathered=True
        )
    assert out.dtype == lse.dtype == torch.float32


def test_rows_with_nothing_to_attend():
    rpb = torch.zeros(2, 7)
    rpb[:, 3] = -math.inf  # a token does not see itself; query 0 sees nothing

    def empty_rows(q, nothing):
        out, lse = natten.na1d(q, q, q, 4, is_causal=True, rpb=rpb.to(q), return_lse=True)
        return out, lse, *natten.attention(q, nothing, nothing, return_lse=True)

    given = torch.randn(1, 9, 2, 8), torch.randn(1, 0, 2, 8)
    trace = make_fx(empty_rows, decomposition_table=natten.export.decompositions())(*given)
    out, lse, nothing, nothing_lse = trace(*given)
    assert not out[:, 0].any() and (lse[:, 0] == -math.inf).all()
    assert not nothing.any() and (nothing_lse == -math.inf).all()
    for expected, found in zip(empty_rows(*given), (out, lse)):
        assert_close("empty", expected, found, 1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_decomposed_packed_attention(causal):
    """Lengths are data, so other lengths give other sequences, also empty ones."""

    def step(q, kv, lengths, starts):
        q, kv = (x.detach().requires_grad_() for x in (q, kv))
        out, lse = natten.attention(
            q, kv, kv, causal, seqlens_Q=lengths, cumulative_seqlen_KV=starts, return_lse=True
        )
        grads = torch.autograd.grad(out.sin().sum() + lse.clamp(min=-9).sin().sum(), (q, kv))
        return out, lse, *grads

    q, kv = torch.randn(1, 9, 4, 6), torch.randn(1, 7, 2, 6)
    table = natten.export.decompositions()
    given = (q, kv, torch.tensor([4, 5]), torch.tensor([0, 3, 7]))
    trace = make_fx(step, decomposition_table=table)(*given)
    assert not of_ours(trace.graph)
    for lengths, starts in (([4, 5], [0, 3, 7]), ([9, 0], [0, 6, 7]), ([2, 7], [0, 0, 7])):
        given = (q, kv, torch.tensor(lengths), torch.tensor(starts))
        for expected, found in zip(step(*given), trace(*given), strict=True):
            assert_close("packed", expected, found, 1e-5)


# Parts, finer queries and borders, one call for each rank, with a layout of keys and of queries.
PARTS = {
    1: ((9,), (8,), {
        "kernel_size": 12, "stride": 3, "is_causal": True, "boundary": "truncate",
        "query_offset": 1,
    }),
    2: ((6, 5), (6, 15), {
        "kernel_size": (3, 4), "dilation": (2, 1), "boundary": ("circular", "truncate"),
        "queries_per_key": (1, 3),
    }),
    3: ((4, 3, 4), (3, 5, 4), {
        "kernel_size": (5, 2, 3), "stride": (2, 1, 1), "query_offset": (1, 1, 0),
        "queries_per_key": (1, 2, 1), "boundary": ("truncate", "shift", "circular"),
    }),
}  # fmt: skip


class Parts(torch.nn.Module):
    """Fused and unfused calls of :data:`PARTS`, with a bias and additional tokens."""

    def forward(self, *given):
        found = []
        for rank, (_, _, window) in PARTS.items():
            q, k, additional, rpb = given[4 * (rank - 1) : 4 * rank]
            tokens = {"additional_keys": additional, "additional_values": additional[..., :4]}
            found += natten.neighborhood_attention_generic(
                q, k, k[..., :4], **window, **tokens, rpb=rpb, return_lse=True
            )
            first, second = q[..., :2, :].movedim(-2, 1), k.movedim(-2, 1)
            scores = getattr(natten, f"na{rank}d_qk")(first, second, **window, rpb=rpb[:2])
            found.append(scores)
            found.append(getattr(natten, f"na{rank}d_av")(scores.softmax(-1), second, **window))
        return tuple(found)

    @staticmethod
    def inputs(batch, dtype=torch.float32):
        found = []
        for keys, queries, window in PARTS.values():
            kernel = natten.Neighborhood.create(len(keys), window["kernel_size"]).kernel_size
            sizes = (batch, *queries, 4, 6), (batch, *keys, 2, 6), (batch, 3, 2, 6)
            sizes += ((4, *(2 * k - 1 for k in kernel)),)
            found += [torch.randn(size, dtype=dtype) for size in sizes]
        return tuple(found)


def test_decomposed_parts_finer_queries_and_borders():
    """Forward and backward of each rank."""

    def step(*given):
        given = [x.detach().requires_grad_() for x in given]
        outputs = Parts()(*given)
        # Slots that are cut off hold -inf.
        loss = sum(torch.where(x.isfinite(), x, 0).sin().sum() for x in outputs)
        return *outputs, *torch.autograd.grad(loss, given)

    given = Parts.inputs(2, torch.float64)
    assert of_ours(make_fx(step)(*given).graph)
    trace = make_fx(step, decomposition_table=natten.export.decompositions())(*given)
    assert not of_ours(trace.graph)
    for expected, found in zip(step(*given), trace(*given), strict=True):
        assert_close("step", expected, found, 1e-12)


@pytest.fixture(scope="module")
def decomposed_parts():
    """A decomposed program of :class:`Parts` for all batch sizes."""
    batch = Dim("batch", min=2)
    dynamic = tuple(None if i % 4 == 3 else {0: batch} for i in range(4 * len(PARTS)))
    program = export(Parts(), Parts.inputs(2), dynamic_shapes=(dynamic,))
    assert of_ours(program.graph)
    return program.run_decompositions(natten.export.decompositions())


def test_decomposed_parts_for_all_batch_sizes(decomposed_parts):
    assert not of_ours(decomposed_parts.graph)
    given = Parts.inputs(3)
    for expected, found in zip(Parts()(*given), decomposed_parts.module()(*given), strict=True):
        assert_close("parts", expected, found, 1e-5)


def test_every_operator_is_decomposed():
    ours = {n for n in dir(torch.ops.natten) if not n.startswith("_") and n != "name"}
    assert ours == {x.__name__.split(".")[0] for x in natten.export.decompositions()}


@pytest.fixture(scope="module")
def decomposed():
    """A layer and its decomposed program for all sizes, captured by Dynamo."""
    layer = natten.NeighborhoodAttention2D(8, 2, 3, 2, (1, 2), (True, False), rel_pos_bias=True)
    dynamic = {0: Dim("batch"), 1: Dim("height", min=4), 2: Dim("width", min=7)}
    given = (torch.randn(2, 5, 8, 8),)
    program = export(layer.eval(), given, dynamic_shapes=(dynamic,), strict=True)
    assert of_ours(program.graph)
    return layer, program.run_decompositions(natten.export.decompositions())


def test_decomposed_layer_for_all_sizes(decomposed):
    layer, program = decomposed
    assert not of_ours(program.graph)
    x = torch.randn(3, 9, 12, 8)
    assert_close("layer", layer(x), program.module()(x), 1e-6)


# --- ONNX ---


class Everything(torch.nn.Module):
    """A module with all ranks at once, because an export takes seconds."""

    def forward(self, *given):
        calls = [
            function(*given[3 * i : 3 * i + 3]) for i, (function, _) in enumerate(RANKS.values())
        ]
        return tuple(x for each in calls for x in each)


def everything(batch):
    """Only the first batch size is symbolic, because symbolic sizes are slow."""
    return tuple(x for rank in RANKS for x in RANKS[rank][1](batch if rank == 1 else 2))


def check_onnx(program, module, *given):
    """Check that onnxruntime runs a program, and that it holds only ONNX's own operators."""
    runtime = pytest.importorskip("onnxruntime")
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    for inputs in given:
        flat = [x.numpy() for x in torch.utils._pytree.tree_leaves(inputs)]
        named = dict(zip([x.name for x in session.get_inputs()], flat, strict=True))
        expected = torch.utils._pytree.tree_leaves(module(*inputs))
        for wanted, found in zip(expected, session.run(None, named), strict=True):
            assert_close("onnx", wanted.detach(), torch.from_numpy(found), 1e-5)


@pytest.mark.skipif(RELEASE < (2, 8), reason="its exporter does not say that it is one")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_of_modules():
    """torch.onnx.export captures PyTorch's own operators by itself."""
    pytest.importorskip("onnxscript")
    batch, module = {0: Dim("batch", min=2)}, Everything().eval()
    onnx = torch.onnx.export(
        module,
        everything(2),
        dynamic_shapes=((batch, batch, *(None,) * 7),),
        dynamo=True,
        verbose=False,
        optimize=False,
    )
    check_onnx(onnx, module, everything(2), everything(3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_of_decomposed_programs(decomposed):
    pytest.importorskip("onnxscript")
    layer, program = decomposed
    onnx = torch.onnx.export(program, dynamo=True, verbose=False)
    check_onnx(onnx, layer, *((torch.randn(shape),) for shape in ((2, 5, 8, 8), (3, 9, 7, 8))))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_of_parts_finer_queries_and_borders(decomposed_parts):
    pytest.importorskip("onnxscript")
    onnx = torch.onnx.export(decomposed_parts, dynamo=True, verbose=False)
    check_onnx(onnx, Parts(), Parts.inputs(2), Parts.inputs(3))
