"""Packed documents in one launch, against the backend that runs one after another."""

from unittest.mock import Mock

import pytest
import torch
from helpers import assert_close, triton

import natten

LAYOUT = natten.VarlenLayout([(0, 4), (5, 4), (3, 9), (7, 0), (1, 2)])
LENGTHS = {"seqlens_Q": torch.tensor([5, 0, 4, 3]), "seqlens_KV": torch.tensor([7, 2, 2, 0])}


@pytest.fixture
def one_launch(monkeypatch):
    """The test must run the forward pass that takes a table of documents."""
    spy = Mock(wraps=triton.packed_forward)
    monkeypatch.setattr(triton, "packed_forward", spy)
    yield
    assert spy.called


def weight(x):
    return torch.linspace(-1, 1, x.numel()).view(x.shape)


def check(function, *tensors):
    """Outputs, LSE and gradients are those of the backend ``tiled``."""
    leaves = [x.requires_grad_() for x in tensors]
    found = []
    for backend in ("triton", "tiled"):
        out, lse = function(*leaves, backend=backend, return_lse=True)
        finite = lse.isfinite()
        total = (out * weight(out)).sum() + (lse[finite] * weight(lse)[finite]).sum()
        found.append((out, lse, *torch.autograd.grad(total, leaves)))
    for actual, expected in zip(*found):
        assert_close("packed", expected, actual, 2e-5)


def tensors():
    return torch.randn(1, 12, 2, 4), torch.randn(1, 11, 1, 4), torch.randn(1, 11, 1, 4)


@pytest.mark.usefixtures("one_launch")
@pytest.mark.parametrize("window", [((3, 4), (3, 2), (2, 1)), ((2, 5), 1, (2, 1), (True, False))])
def test_documents(window):
    q, k, v = torch.randn(49, 2, 6), torch.randn(49, 1, 6), torch.randn(49, 1, 5)
    check(lambda *x, **options: natten.na2d_varlen(*x, LAYOUT, *window, **options), q, k, v)


@pytest.mark.usefixtures("one_launch")
@pytest.mark.parametrize("causal", [False, True])
def test_sequences(causal):
    check(lambda *x, **options: natten.attention(*x, causal, **LENGTHS, **options), *tensors())


@pytest.mark.usefixtures("one_launch")
def test_the_operator_that_compiled_code_calls():
    def operator(*tensors, backend, return_lse):
        options = *LENGTHS.values(), None, None, -1, -1, 1, 0.5, backend, [0]
        return torch.ops.natten.packed_attention(*tensors, *options)

    check(operator, *tensors())


def second_derivative(q, k, v, backend):
    out = natten.attention(q, k, v, backend=backend, **LENGTHS)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    return torch.autograd.grad(first.square().sum(), q)


def forward_over_reverse(q, k, v, backend):
    out, ad = natten.attention(q, k, v, backend=backend, **LENGTHS), torch.autograd.forward_ad
    with ad.dual_level():
        dual = ad.make_dual(weight(out), weight(out).flip(1))
        (pulled,) = torch.autograd.grad(out, q, dual)
        return out, ad.unpack_dual(pulled).tangent


def forward_mode(q, k, v, backend):
    ad = torch.autograd.forward_ad
    with ad.dual_level():
        dual = ad.make_dual(q.detach(), weight(q))
        out = natten.attention(dual, k, v, backend=backend, **LENGTHS)
        return tuple(ad.unpack_dual(out))


def batched_gradients(q, k, v, backend):
    out = natten.attention(q, k, v, backend=backend, **LENGTHS)
    batch = torch.stack([weight(out), weight(out).flip(1)])
    return torch.autograd.grad(out, q, batch, is_grads_batched=True)


def check_derivative(derivative):
    q, k, v = tensors()
    q.requires_grad_()
    expected, found = (derivative(q, k, v, backend) for backend in ("tiled", "triton"))
    for a, b in zip(expected, found, strict=True):
        assert_close(derivative.__name__, a, b, 1e-4)


@pytest.mark.usefixtures("one_launch")
@pytest.mark.parametrize(
    "derivative",
    [second_derivative, forward_over_reverse, batched_gradients],
    ids=lambda function: function.__name__,
)
def test_derivatives(derivative):
    check_derivative(derivative)


def test_forward_mode():
    """Tangents are composed of the unfused maps, one document after another."""
    check_derivative(forward_mode)
