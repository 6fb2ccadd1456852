"""Derivatives of every order and mode, with transforms, and what PyTorch checks of operators."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import Case, assert_close, tiled
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.library import opcheck

import natten
from natten import merge_attentions, na1d, na2d_av, na2d_qk, operators
from natten.documents import Documents, Sizes
from natten.inputs import Inputs
from natten.modules import NeighborhoodAttention2D
from natten.neighborhood import Dense
from natten.operators import schema
from natten.operators.packed import packed_attention

# All at once: even and strided windows, dilation, causality, GQA, bias, additional tokens.
FULL = Case(
    (4, 7), (2, 3), (2, 1), (1, 2), (True, False), 1, 4, 2, 2, 3, num_additional=2, rpb=True
)
PLAIN = Case((4, 3), (3, 2), batch=1, heads=1, kv_heads=1, dim=2, value_dim=2)


def leaves(case):
    return [x.requires_grad_() for x in case.inputs() if x is not None]


def fused(case):
    def function(q, k, v, *rest):
        given = iter(rest)
        rpb = next(given) if case.rpb else None
        ak, av = (next(given), next(given)) if case.num_additional else (None, None)
        return operators.attention(Inputs(q, k, v, rpb, ak, av), case.rule, 0.7)

    return function


def scalar(function):
    """A number that depends on every output, and not linearly."""

    def wrapped(*args):
        out, lse = function(*args)
        return out.sin().sum() + (lse * lse).sum()

    return wrapped


def unfused(q, k, v, rpb):
    """Unfused attention, heads-first, with bias and causality."""
    options = {"is_causal": (True, False), "dilation": (1, 2)}
    attn = na2d_qk(q, k, (2, 3), rpb=rpb, **options).softmax(-1)
    return na2d_av(attn, v, (2, 3), **options)


def unfused_leaves():
    shapes = [(1, 2, 3, 6, 2)] * 3 + [(2, 3, 5)]
    return [torch.randn(shape).double().requires_grad_() for shape in shapes]


def dense(q, k, v):
    return operators.attention(Inputs(q, k, v), Dense(), 0.7)


def packed_by_a_table(q, k, v):
    """Attention of one document by a backend that reads tables of documents, as on GPUs."""
    backend = SimpleNamespace(
        packed_forward=lambda inputs, _, *rest: tiled.forward(inputs, *rest),
        packed_backward=lambda *args: tiled.backward(*args[:5], *args[6:]),
    )
    documents = Documents(q, Sizes(1, q.shape[1:2], k.shape[1:2]))
    return packed_attention(backend, q, k, v, documents, Dense(), 0.7, dense)


# --- derivatives ---


# The full case entry by entry takes a minute; random projections test every entry, too.
on_both_cases = pytest.mark.parametrize(
    ("case", "fast"), [(FULL, True), (PLAIN, False)], ids=["full-projected", "plain"]
)


@on_both_cases
def test_fused_gradients(case, fast):
    assert gradcheck(fused(case), leaves(case), check_forward_ad=True, fast_mode=fast)


@on_both_cases
def test_fused_second_derivatives(case, fast):
    assert gradgradcheck(fused(case), leaves(case), check_fwd_over_rev=True, fast_mode=fast)


def test_unfused_gradients():
    assert gradcheck(unfused, unfused_leaves(), check_forward_ad=True)
    assert gradgradcheck(unfused, unfused_leaves(), check_fwd_over_rev=True, fast_mode=True)


def test_dense_gradients():
    q, k, v = (torch.randn(1, n, 2, 3).double().requires_grad_() for n in (5, 4, 4))
    for causal in (False, True):

        def function(*qkv, causal=causal):
            return natten.attention(*qkv, is_causal=causal, return_lse=True)

        assert gradcheck(function, (q, k, v), check_forward_ad=True)
        assert gradgradcheck(function, (q, k, v))


def test_merged_gradients():
    q, k, v = (torch.randn(1, 6, 1, 2).double().requires_grad_() for _ in range(3))

    def function(q, k, v):
        parts = [natten.attention(q, k, v, return_lse=True), na1d(q, k, v, 3, return_lse=True)]
        return merge_attentions(*zip(*parts))

    assert gradcheck(function, (q, k, v))


def test_gradient_of_lse_alone():
    q, k, v = (torch.randn(1, 9, 2, 3).double().requires_grad_() for _ in range(3))
    _, lse = na1d(q, k, v, 3, return_lse=True)
    found = torch.autograd.grad(lse.sum(), (q, k, v), retain_graph=True)
    rule = natten.Neighborhood.create(1, 3)
    tokens = rule.window_tokens_of((9,), (9,))
    scores = torch.einsum("bqhd,bqkhd->bqhk", q, k[:, tokens]) * 3**-0.5
    expected = torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k))
    for a, b in zip(expected, found):
        assert_close("gradient", a, b, 1e-12)
    assert (found[2] == 0).all()


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_batched_gradients(backend, strategy):
    def function(x):
        more = {"additional_keys": x[:, :2], "additional_values": x[:, 1:3]}
        some = na1d(x, x, x, 3, is_causal=True, backend=backend, return_lse=True)
        return *some, *na1d(x, x, x, 3, **more, backend=backend, return_lse=True)

    x = torch.randn(1, 5, 2, 3).double()
    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(function, x)
    found = jacobian(function, x, vectorize=True, strategy=strategy)
    for a, b in zip(expected, found):
        assert_close("jacobian", a, b, 1e-12)


def test_gradients_only_where_needed():
    q, k, v, *rest = FULL.inputs()
    rest[0].requires_grad_()
    out, _ = fused(FULL)(q, k, v, *rest)
    out.sum().backward()
    assert rest[0].grad is not None and q.grad is None


@pytest.mark.parametrize("attend", [dense, packed_by_a_table], ids=lambda each: each.__name__)
@pytest.mark.parametrize("made", [lambda x: (x, x, x), lambda x: (x, 2 * x, x.sin())])
def test_gradients_with_a_graph_of_inputs_that_depend_on_each_other(made, attend):
    """Each path counts once: a gradient is the same with and without a graph of it."""
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x):
        return scalar(attend)(*made(x))

    plain, composed = (
        torch.autograd.grad(function(x), x, create_graph=create)[0] for create in (False, True)
    )
    assert_close("gradient", plain, composed, 1e-12)
    assert gradgradcheck(function, (x,))


@pytest.mark.parametrize("attend", [dense, packed_by_a_table], ids=lambda each: each.__name__)
def test_gradients_with_a_graph_of_an_output_that_does_not_depend_on_the_input(attend):
    q, k, v = leaves(Case((6,), (3,)))
    _, lse = attend(q[:1].detach(), k[:1].detach(), v[:1])
    (found,) = torch.autograd.grad(lse.sum(), v, create_graph=True, materialize_grads=True)
    assert not found.any()


def test_gradients_with_a_graph_beside_hooks_on_saved_tensors():
    """Offloading to the CPU sets such hooks, also around the backward."""
    q, k, v = leaves(PLAIN)
    plain = torch.autograd.grad(scalar(fused(PLAIN))(q, k, v), (q, k, v))
    with torch.autograd.graph.save_on_cpu():
        first = torch.autograd.grad(scalar(fused(PLAIN))(q, k, v), (q, k, v), create_graph=True)
        torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v))
    for expected, actual in zip(plain, first):
        assert_close("gradient", expected, actual, 1e-12)


# --- torch.func ---


def test_functional_transforms():
    args = [x.detach() for x in leaves(FULL)]
    loss, everything = scalar(fused(FULL)), tuple(range(6))
    with_graph = leaves(FULL)
    for x, y in zip(with_graph, args):
        x.data.copy_(y)
    expected = torch.autograd.grad(loss(*with_graph), with_graph)
    found = grad(loss, argnums=everything)(*args)
    _, pull = vjp(loss, *args)
    for a, b, c in zip(expected, found, pull(torch.tensor(1.0).double())):
        assert_close("grad", a, b, 1e-12)
        assert_close("vjp", a, c, 1e-12)
    tangents = [torch.randn_like(x) for x in args]
    _, tangent = jvp(loss, tuple(args), tuple(tangents))
    assert_close("jvp", sum((a * t).sum() for a, t in zip(expected, tangents)), tangent, 1e-12)


DIMS = [d for d in itertools.product([None, 0, 1], repeat=6) if any(x is not None for x in d)]


@pytest.mark.parametrize("dims", DIMS[::37], ids=str)
def test_vmap(dims):
    args = [x.detach() for x in leaves(FULL)]
    args = [
        x if d is None else torch.randn(*x.shape[:d], 3, *x.shape[d:]).double()
        for x, d in zip(args, dims)
    ]
    out, lse = vmap(fused(FULL), in_dims=dims)(*args)
    for i in range(3):
        picked = [x if d is None else x.select(d, i) for x, d in zip(args, dims)]
        expected = fused(FULL)(*picked)
        assert_close("out", expected[0], out[i], 1e-12)
        assert_close("lse", expected[1], lse[i], 1e-12)


@pytest.mark.parametrize(
    "dims", [(0, None, None, None), (1, 2, 0, 0), (None, None, None, 1)], ids=str
)
def test_vmap_of_unfused(dims):
    args = [x.detach() for x in unfused_leaves()]
    args = [
        x if d is None else torch.randn(*x.shape[:d], 3, *x.shape[d:]).double()
        for x, d in zip(args, dims)
    ]
    out = vmap(unfused, in_dims=dims)(*args)
    for i in range(3):
        picked = [x if d is None else x.select(d, i) for x, d in zip(args, dims)]
        assert_close("out", unfused(*picked), out[i], 1e-12)


def test_gradients_per_sample():
    args = [x.detach() for x in leaves(FULL)]
    batch = [torch.randn(3, *x.shape).double() for x in (args[0], args[3])]
    loss = scalar(fused(FULL))
    mapped = vmap(grad(loss, argnums=(0, 3)), in_dims=(0, None, None, 0, None, None))
    found = mapped(batch[0], args[1], args[2], batch[1], *args[4:])
    for i in range(3):
        expected = grad(loss, argnums=(0, 3))(batch[0][i], *args[1:3], batch[1][i], *args[4:])
        for a, b in zip(expected, found):
            assert_close("gradient", a, b[i], 1e-12)


def test_module_through_functional_call():
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True).double()
    parameters = dict(module.named_parameters())
    x = torch.randn(1, 5, 6, 8).double()

    def loss(parameters):
        return functional_call(module, parameters, (x,)).square().sum()

    loss(parameters).backward()
    found = grad(loss)(parameters)
    for name, parameter in parameters.items():
        assert_close(name, parameter.grad, found[name], 1e-12)


# --- operators ---


RULE, DENSE = schema.pack(FULL.rule), schema.pack(Dense(causal=True))


def reversed_in_memory(x):
    """The same numbers with reversed order of dimensions in memory."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def op_calls():
    """Fake and real operators return the same strides, whatever the strides of the inputs."""
    tensors = tuple(FULL.inputs(torch.float32).differentiable)
    tensors += *fused(FULL)(*tensors), torch.randn(2, 3, 4, 7, 5), torch.randn(2, 3, 4, 7, 6)
    tensors += torch.randn(1, 9, 2, 4), torch.randn(1, 7, 1, 4)
    q, k, v, rpb, ak, av, out, lse, x, attn, row, pair = map(reversed_in_memory, tensors)
    masks = torch.rand(1, 4, 7) < 0.7, torch.rand(1, ak.shape[1]) < 0.7
    inputs = (q, k, v, rpb, ak, av, *masks)
    dense = (q[:, 0], k[:, 0], v[:, 0], None, None, None, masks[0][:, 0], None)
    saved = (out, lse, out, lse, *inputs)
    lengths = (torch.tensor([4, 5]), None, None, torch.tensor([0, 3, 7]), 5, -1, 1, 0.7, "", [0])
    rows = torch.ops.natten.packed_attention(row, pair, pair, *lengths)
    return {
        "packed_attention": (row, pair, pair, *lengths),
        "packed_attention_backward": (*rows, row, pair, pair, *rows, *lengths),
        "attention": (*inputs, *RULE, 0.7, "", [8, 8] * 4),
        "attention-tiled": (*inputs, *RULE, 0.7, "tiled", [0]),
        "attention-reference": (*inputs, *RULE, 0.7, "reference", [0]),
        "attention-dense": (*dense, *DENSE, 0.7, "", [0]),
        "attention-dense-reference": (*dense, *DENSE, 0.7, "reference", [0]),
        "attention_backward": (*saved, *RULE, 0.7, "", [0]),
        "attention_backward-reference": (*saved, *RULE, 0.7, "reference", [0]),
        "qk": (x, x, *RULE),
        "av": (attn, x, *RULE),
        "av_transposed": (attn, x, [4, 7], *RULE),
        "rpb_bias": (rpb, [4, 7], [4, 7], *RULE),
        "rpb_bias_transposed": (attn[0], [4, 7], *RULE),
    }


@pytest.mark.parametrize("name", list(op_calls()))
def test_opcheck(name):
    operator = getattr(torch.ops.natten, name.split("-")[0])
    args = op_calls()[name]
    if "attention_backward" not in name:
        args = [
            x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in args
        ]
    assert set(opcheck(operator, args).values()) == {"SUCCESS"}


def test_every_operator_is_checked():
    ours = {n for n in dir(torch.ops.natten) if not n.startswith("_") and n != "name"}
    assert ours == {name.split("-")[0] for name in op_calls()}
