"""The fused kernels against the reference, and what they must not read."""

import ctypes
import mmap
import sys

import pytest
import torch
from helpers import Case, assert_close, name_of, reference, triton

from natten import na1d, tuning
from natten.backends.triton import plan
from natten.inputs import Inputs
from natten.neighborhood import Dense

CASES = [
    Case((13,), (4,), dilation=3, batch=1, dim=3, value_dim=8),
    Case((9,), (5,), stride=3, is_causal=True, heads=4, num_additional=3, dim=4, value_dim=4),
    Case((43,), (6,), dilation=2, batch=1, dim=4, rpb=True),  # tiles of groups of two lengths
    Case((7, 5), (3, 2), (2, 1), (2, 2), batch=1, heads=1, kv_heads=1, rpb=True),
    Case((4, 6), (3, 5), is_causal=(True, False), rpb=True, batch=1, kv_heads=1, num_additional=1),
    Case((3, 4, 5), (2, 3, 3), stride=(1, 2, 3), batch=1, dim=5),
    Case((4, 3, 4), (2, 2, 2), dilation=(2, 1, 2), is_causal=(False, True, False), batch=1),
]


def check(inputs, rule, **tiles):
    """Outputs, LSE and gradients are the reference's."""
    backends = (reference, {}), (triton, tiles)
    expected, actual = (m.forward(inputs, rule, 0.6, **options) for m, options in backends)
    grads = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    for name, a, b in zip(("output", "LSE"), expected, actual):
        assert_close(name, a, b, 1e-5)
    found = [
        m.backward(*grads, inputs, *x, rule, 0.6, **options)
        for (m, options), x in zip(backends, (expected, actual))
    ]
    for name, a, b in zip(Inputs._fields, *found):
        assert_close(f"gradient of {name}", a, b, 2e-5)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_neighborhoods(case):
    check(case.inputs(torch.float32), case.rule)


@pytest.mark.parametrize("causal", [False, True])
def test_plain_attention(causal):
    q, k = torch.randn(1, 9, 2, 4), torch.randn(1, 5, 1, 4)
    check(Inputs(q, k, k.clone()), Dense(causal))


def test_tiles_longer_than_an_axis_of_one_token():
    """Nothing beyond the bias is read."""
    case = Case((1, 9), (1, 4), is_causal=(False, True), rpb=True, batch=1)
    inputs = case.inputs(torch.float32)
    around = torch.full((3, *inputs.rpb.shape), float("inf"))
    around[1] = inputs.rpb
    check(inputs._replace(rpb=around[1]), case.rule, tiles=(8, 8) * 4)


def test_gradient_of_the_bias_head_by_head(monkeypatch):
    """Where the sums of all heads have no room."""
    case = CASES[2]
    inputs = case.inputs(torch.float32)
    monkeypatch.setattr(plan, "MOST_SUMS", 1)
    tuning._forget_choices()
    try:
        check(inputs, case.rule)
        assert len(plan.plan_for(*inputs[:5], case.rule, 0.6).rpb[1]) == 2
    finally:
        tuning._forget_choices()


def test_no_batch():
    q = torch.randn(0, 5, 1, 4)
    assert triton.forward(Inputs(q, q, q), CASES[0].rule, 1.0)[0].shape == q.shape


def test_views_that_negate_are_read_as_what_they_say():
    def results(*tensors):
        found = na1d(*tensors[:3], 3, rpb=tensors[3], return_lse=True, backend="triton")
        return *found, *torch.autograd.grad(found, tensors[:4], tensors[4:])

    shapes = [(1, 9, 1, 16)] * 3 + [(1, 5), (1, 9, 1, 16), (1, 9, 1)]
    plain = [torch.randn(shape) for shape in shapes]
    views = [torch._neg_view(-x).requires_grad_() for x in plain]
    for a, b in zip(results(*[x.requires_grad_() for x in plain]), results(*views)):
        assert torch.equal(a, b)


@pytest.fixture
def guarded():
    """A page of memory between two that can not be read: its address, and one past its end."""
    libc, page = ctypes.CDLL(None), mmap.PAGESIZE
    pages = mmap.mmap(-1, 3 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for at in (first, first + 2 * page):
        assert libc.mprotect(ctypes.c_void_p(at), page, 0) == 0
    yield first + page, first + 2 * page
    pages = None


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("scores", ["nan", "infinite"])
def test_bias_is_not_read_outside_of_itself(scores, end, guarded):
    """A masked score that is not finite is not -inf. Reading the pages would end the process."""
    first, after = guarded
    numbers = (ctypes.c_float * 9).from_address(first if end == "first" else after - 9 * 4)
    rpb = torch.frombuffer(numbers, dtype=torch.float32).view(1, 9)
    rpb.copy_(torch.randn(1, 9))
    q, k, v = torch.randn(3, 1, 64, 1, 16)
    if scores == "nan":
        q[0, 30] = float("nan")
    else:
        q, k[0, 30] = q.abs() * 1e19, 3e19
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    na1d(q, k, v, 5, rpb=rpb, backend="triton").sum().backward()
