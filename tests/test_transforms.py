"""Compositions of torch.func transforms and forward mode, compared with the dense oracle."""

import pytest
import torch
from helpers import Case, assert_close, reference
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import natten
from natten.inputs import Inputs

pytestmark = pytest.mark.no_cover

CASE = Case((3, 4), (2, 3), is_causal=(True, False), batch=1, heads=1, kv_heads=1, dim=2, rpb=True)
SEEDED = torch.Generator().manual_seed(0)
Q, T = torch.randn(2, 1, 3, 4, 1, 2, generator=SEEDED, dtype=torch.float64)
RPB = torch.randn(1, 3, 5, generator=SEEDED, dtype=torch.float64)


def oracle(q):
    out, lse = reference.forward(Inputs(q, q.sin(), q.cos(), RPB), CASE.rule, 0.7)
    return out * lse[..., None]


def fused(q):
    options = {"is_causal": (True, False), "rpb": RPB, "scale": 0.7, "return_lse": True}
    out, lse = natten.na2d(q, q.sin(), q.cos(), (2, 3), **options)
    return out * lse[..., None]


def unfused(q):
    options = {"is_causal": (True, False)}
    first = [x.movedim(-2, 1) for x in (0.7 * q, q.sin(), q.cos())]
    attn = natten.na2d_qk(*first[:2], (2, 3), rpb=RPB, **options)
    out = natten.na2d_av(attn.softmax(-1), first[2], (2, 3), **options).movedim(1, -2)
    return out * attn.logsumexp(-1).movedim(1, -1)[..., None]


def loss(function):
    return lambda q: function(q).sin().sum()


def forward_over_reverse(function, create_graph):
    q = Q.clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, T)
        (found,) = torch.autograd.grad(loss(function)(dual), dual, create_graph=create_graph)
        return forward_ad.unpack_dual(found).tangent


def directional(function):
    return lambda q: jvp(function, (q,), (T,))[1]


COMPOSITIONS = {
    "jacrev": lambda f: jacrev(f)(Q),
    "jacfwd": lambda f: jacfwd(f)(Q),
    "hessian": lambda f: hessian(loss(f))(Q),
    "reverse over reverse": lambda f: jacrev(jacrev(loss(f)))(Q),
    "reverse over forward": lambda f: grad(loss(directional(f)))(Q),
    "third derivative": lambda f: grad(lambda q: grad(loss(directional(f)))(q).sin().sum())(Q),
    "forward over reverse": lambda f: forward_over_reverse(f, create_graph=True),
    "forward over reverse without a graph": lambda f: forward_over_reverse(f, create_graph=False),
    "linearize": lambda f: linearize(f, Q)[1](T),
    "vmap over tangents": lambda f: vmap(lambda t: jvp(f, (Q,), (t,))[1])(torch.stack([T, Q])),
    "vmap of vmap": lambda f: vmap(vmap(f))(torch.stack([Q, T]).expand(3, 2, *Q.shape)),
    "vmap in chunks": lambda f: vmap(f, chunk_size=1)(torch.stack([Q, T])),
    "hessian products": lambda f: vmap(lambda t: jvp(grad(loss(f)), (Q,), (t,))[1])(
        torch.stack([T, Q])
    ),
    "traced gradient": lambda f: make_fx(grad(loss(f)))(Q)(T),
}


@pytest.mark.parametrize("function", [fused, unfused], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition(name, function):
    expected = COMPOSITIONS[name](oracle)
    assert expected.abs().max() > 0.1
    assert_close(name, expected, COMPOSITIONS[name](function), 1e-10)


@pytest.mark.parametrize("function", [fused, unfused], ids=lambda f: f.__name__)
def test_forward_over_forward_is_refused(function):
    """PyTorch would take the second tangent of any autograd.Function for zero."""
    assert directional(directional(oracle))(Q).abs().max() > 0.1
    with pytest.raises(NotImplementedError, match="twice in forward mode"):
        directional(directional(function))(Q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_autocast_casts_every_input_and_returns_gradients_in_their_own_dtype(dtype):
    """The result is bit for bit that of a call in half precision."""
    case = Case((5, 6), (3, 3), num_additional=3, rpb=True)
    leaves = [x.requires_grad_() for x in case.inputs(torch.float32).differentiable]

    def call(q, k, v, rpb, keys, values):
        options = {"additional_keys": keys, "additional_values": values}
        return natten.na2d(q, k, v, 3, rpb=rpb, **options)

    with torch.autocast("cpu", dtype):
        out = call(*leaves)
    halves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    halves[3] = leaves[3]  # the bias keeps its precision
    expected = call(*halves)
    assert out.dtype == dtype and torch.equal(out, expected)
    found = torch.autograd.grad(out.float().square().sum(), leaves)
    wanted = torch.autograd.grad(expected.float().square().sum(), halves)
    for a, b in zip(found, wanted):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_autocast_of_everything_else():
    """As PyTorch's own attention does it."""
    x, image = torch.randn(1, 9, 2, 4), torch.randn(1, 6, 6, 2, 4)
    heads_first = x.movedim(-2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.scaled_dot_product_attention(x, x, x).dtype == torch.bfloat16
        assert natten.na1d(x, x.bfloat16(), x, 3).dtype == torch.bfloat16  # mixed inputs
        assert natten.na1d(*(x.double(),) * 3, 3).dtype == torch.float64
        assert natten.na1d_qk(heads_first, heads_first, 3).dtype == torch.bfloat16
        layer = natten.NeighborhoodAttention2D(4, 2, 3)
        assert layer(image[..., 0, :]).dtype == torch.bfloat16
        assert natten.na1d_av(torch.randn(1, 2, 9, 3), heads_first, 3).dtype == torch.bfloat16
        assert natten.na1d_varlen(*(x[0],) * 3, natten.VarlenLayout([4, 5]), 3).dtype == (
            torch.bfloat16
        )
        parts = [natten.attention(x, x, x, return_lse=True) for _ in range(2)]
        out, lse = natten.merge_attentions(*zip(*parts))
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        assert vmap(lambda y: natten.na1d(y, y, y, 3))(x[None]).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert natten.na2d(image, image, image, 3).dtype == torch.float32


@pytest.mark.parametrize("causal", [False, True])
def test_nested_with_bias(causal):
    """The bias is dense and shared by all items."""
    items = [torch.randn(1, 2, n, 6, 4) for n in (5, 7)]
    nested, rpb = torch.nested.nested_tensor(items), torch.randn(2, 5, 5)
    attn = natten.na2d_qk(nested, nested, 3, is_causal=causal, rpb=rpb)
    for item, found in zip(items, attn.unbind(), strict=True):
        assert torch.equal(natten.na2d_qk(item, item, 3, is_causal=causal, rpb=rpb), found)


class Subclass(torch.Tensor):
    """A tensor of another class."""


@pytest.mark.parametrize("function", [fused, unfused], ids=lambda f: f.__name__)
def test_forward_mode_of_a_subclass(function):
    found = []
    for q in (Q, Q.as_subclass(Subclass)):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(function(forward_ad.make_dual(q, T))).tangent)
    assert_close("tangent", *found, 1e-12)


def test_tensors_kept_from_a_transform():
    """They are wrapped by a transform that is over; a plain call takes them as they are."""
    kept = []
    torch.func.grad(lambda q: kept.append(q) or q.sum())(Q)
    leaf = Q.clone().requires_grad_()
    out = natten.na2d(leaf, kept[0], kept[0], (2, 3))
    wanted = natten.na2d(leaf, Q, Q, (2, 3))
    assert torch.equal(out, wanted)
    grads = (torch.autograd.grad(x.square().sum(), leaf)[0] for x in (out, wanted))
    assert torch.equal(*grads)
