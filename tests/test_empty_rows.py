"""Queries with nothing to attend have output 0, LSE -inf, and derivatives of 0, never NaN."""

import itertools
import math
import os

import pytest
import torch
from helpers import assert_close
from torch.autograd import gradcheck, gradgradcheck

import natten
from natten import merge_attentions, neighborhood_attention_generic

GPU = torch.cuda.is_available()
BACKENDS = {
    "tiled": torch.float64,
    "reference": torch.float64,
    "triton": torch.float32,  # on a GPU, or interpreted in test_interpreter.py
    "default": torch.bfloat16,
}
RATIO = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def runs(name):
    return GPU or name in ("tiled", "reference") or os.environ.get("TRITON_INTERPRET") == "1"


on_backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(not runs(name), reason="needs a GPU"))
        for name in BACKENDS
    ],
)


def problem(space, dtype, heads=(4, 2), channels=16, num_additional=0, batch=2):
    """Query, key, value, a bias that hides each token from itself, and additional tokens.

    Where every axis is causal, the first token has nothing to attend.
    """
    q, k, v = (torch.randn(batch, *space, n, channels) for n in (heads[0], heads[1], heads[1]))
    bias = torch.randn(heads[0], *(3 for _ in space))
    bias[(slice(None), *(1 for _ in space))] = -math.inf
    sizes = batch, num_additional, heads[1], channels
    additional = (torch.randn(sizes) for _ in range(2 if num_additional else 0))
    device = "cuda" if GPU and dtype != torch.float64 else "cpu"
    return [x.to(device, dtype) for x in (q, k, v, bias, *additional)]


def causal(q, k, v, rpb, additional_keys=None, additional_values=None, backend="tiled"):
    """Output and LSE with windows of two tokens on each axis."""
    return neighborhood_attention_generic(
        q, k, v, 2, is_causal=True, rpb=rpb, return_lse=True,
        additional_keys=additional_keys, additional_values=additional_values,
        backend=None if backend == "default" else backend,
    )  # fmt: skip


def first(x):
    """The entries of the first token of ``[batch, *space, heads, ...]``."""
    while x.dim() > 3:
        x = x[:, 0]
    return x


@on_backends
@pytest.mark.parametrize("space", [(9,), (5, 4), (3, 4, 2)], ids=len)
def test_a_bias_hides_everything(space, backend):
    leaves = [x.requires_grad_() for x in problem(space, BACKENDS[backend])]
    out, lse = causal(*leaves, backend=backend)
    empty = lse == -math.inf
    assert empty.sum() == 2 * 4 and empty[(slice(None), *(0 for _ in space))].all()
    assert not out[empty].any()
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    assert all(x.isfinite().all() for x in (out, *grads))
    assert not grads[0][empty].any()
    # A bias that almost hides tokens gives the same numbers in all other rows.
    near = [x.detach() for x in leaves]
    near[3] = near[3].clamp(min=-300)
    near = [x.double().cpu().requires_grad_() for x in near]
    expected = causal(*near, backend="reference")
    empty = empty.cpu()
    wanted = torch.autograd.grad(
        expected,
        near,
        (
            grad_out.double().cpu().masked_fill(empty[..., None], 0),
            grad_lse.double().cpu().masked_fill(empty, 0),
        ),
    )
    assert_close("lse", expected[1][~empty], lse.cpu()[~empty], RATIO[BACKENDS[backend]])
    for name, a, b in zip("oqkvb", (expected[0], *wanted), (out, *grads)):
        a = a.masked_fill(empty[..., None], 0) if name == "o" else a
        assert_close(name, a.detach(), b.detach().cpu(), 2 * RATIO[BACKENDS[backend]])


@on_backends
def test_additional_tokens_are_left(backend):
    tensors = problem((5, 4), BACKENDS[backend], num_additional=3)
    out, lse = causal(*tensors, backend=backend)
    q, k, v = (x.double().cpu() for x in (tensors[0][:, 0, 0], *tensors[4:]))
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bhc,bnhc->bhn", q, k) * 16**-0.5
    ratio = RATIO[BACKENDS[backend]]
    assert_close("lse", scores.logsumexp(-1), lse[:, 0, 0].cpu(), ratio)
    expected = torch.einsum("bhn,bnhc->bhc", scores.softmax(-1), v)
    assert_close("out", expected, out[:, 0, 0].cpu(), ratio)


@pytest.mark.parametrize("space", [(3,), (2, 3), (2, 2, 2)], ids=len)
def test_forward_mode_and_second_derivatives(space):
    *qkv, rpb = problem(space, torch.float64, heads=(1, 1), channels=2, batch=1)
    masked = rpb == -math.inf
    leaves = [x.requires_grad_() for x in (*qkv, rpb.masked_fill(masked, 0.0))]

    def function(q, k, v, bias):
        out, lse = causal(q, k, v, bias.masked_fill(masked, -math.inf))
        return out, lse.exp()  # because -inf minus -inf is NaN

    assert function(*leaves)[1].flatten()[0] == 0
    assert gradcheck(function, leaves, check_forward_ad=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("mark", [-math.inf, math.inf])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_that_are_all_empty(parts, mark):
    """For a query with nothing to attend, flash attention writes +inf."""
    outs = [torch.randn(1, 5, 2, 4).double() for _ in range(parts)]
    exponents = [torch.randn(1, 5, 2).double() for _ in range(parts)]
    for out, lse in zip(outs, exponents):
        out[:, 1], lse[:, 1] = 0, mark
    outs[0][:, 3], exponents[0][:, 3] = 0, mark
    leaves = [x.requires_grad_() for x in (*outs, *exponents)]
    out, lse = merge_attentions(outs, exponents)
    assert (out[:, 1] == 0).all() and (lse[:, 1] == -math.inf).all()
    assert lse[:, 0].isfinite().all()
    alive = torch.ones_like(lse).masked_fill(lse == -math.inf, 0)
    total = out.square().sum() + (lse.masked_fill(alive == 0, 0.0)).sum()
    grads = torch.autograd.grad(total, leaves, create_graph=True)
    assert all(g.isfinite().all() and (g[:, 1] == 0).all() for g in grads)
    again = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    assert all(g.isfinite().all() for g in again)
    if parts > 1:  # the empty part must not matter
        expected, _ = merge_attentions(outs[1:], exponents[1:])
        assert_close("the others", expected[:, 3].detach(), out[:, 3].detach(), 1e-12)


def test_keys_of_no_length():
    """Plain attention to no keys at all, with every derivative."""
    for causal, backend in itertools.product((False, True), ("tiled", "reference")):
        q = torch.randn(1, 3, 2, 4).double().requires_grad_()
        k, v = (torch.randn(1, 0, 2, 4).double().requires_grad_() for _ in range(2))
        options = {"is_causal": causal, "backend": backend, "return_lse": True}

        def function(q, k, v, options=options):
            out, lse = natten.attention(q, k, v, **options)
            return out, lse.exp()

        out, weight = function(q, k, v)
        assert not out.any() and not weight.any()
        grads = torch.autograd.grad((out.sum(), weight.sum()), (q, k, v), create_graph=True)
        assert all(not g.any() and g.shape == x.shape for g, x in zip(grads, (q, k, v)))
        tangents = tuple(torch.ones_like(x) for x in (q, k, v))
        _, (change, _) = torch.func.jvp(function, (q, k, v), tangents)
        assert not change.any()


def test_gradients_of_nothing_are_the_callers_own():
    """Zero gradients are new tensors, and do not keep the inputs of the call."""
    q = torch.randn(1, 0, 1, 8, requires_grad=True)
    k, v = (torch.randn(1, 4, 1, 8, requires_grad=True) for _ in range(2))

    def grads():
        return torch.autograd.grad(natten.attention(q, k, v).sum(), (k, v))

    grads()[0].add_(1.0)
    assert all(not x.any() for x in grads())
