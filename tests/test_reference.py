"""The oracle is compared with plain Python numbers, computed straight from the definition."""

import itertools
import math

import pytest
import torch
from helpers import Case, assert_close, brute_force_axis, name_of, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from natten.inputs import Inputs

CASES = [
    Case((7,), (3,), batch=1, dim=2, value_dim=1),
    Case((9,), (4,), stride=4, batch=1, heads=1, kv_heads=1, dim=1, value_dim=2),
    Case((8,), (3,), stride=2, dilation=2, is_causal=True, rpb=True, dim=2, value_dim=2),
    Case((4, 5), (2, 3), stride=(1, 2), heads=4, kv_heads=2, dim=2, value_dim=3, num_additional=2),
    Case((5, 4), (2, 2), dilation=(2, 1), is_causal=(True, False), dim=1, value_dim=1, rpb=True),
    Case(
        (3, 4, 2),
        (2, 3, 1),
        is_causal=(False, True, False),
        batch=1,
        dim=2,
        rpb=True,
        num_additional=1,
    ),
    Case((4, 2, 5), (2, 1, 2), dilation=(2, 2, 1), heads=3, kv_heads=1, batch=1, dim=1, rpb=True),
]


def attended(case):
    """For every token, the tokens that it attends, and the index of the bias for each."""
    rule, everyone = case.rule, []
    axes = [
        brute_force_axis(length, k, s, d, causal)
        for length, k, s, d, causal in zip(
            case.space, rule.kernel_size, rule.stride, rule.dilation, rule.is_causal
        )
    ]
    for token in itertools.product(*map(range, case.space)):
        keys = list(itertools.product(*(axis[x] for axis, x in zip(axes, token))))
        offsets = [
            tuple(
                y // d - x // d + k - 1
                for x, y, d, k in zip(token, key, rule.dilation, rule.kernel_size)
            )
            for key in keys
        ]
        everyone.append((token, keys, offsets))
    return everyone


def by_hand(case, inputs, scale):
    """Output and LSE, computed one number after another."""
    q, k, v, rpb, ak, av = inputs.differentiable
    out = torch.zeros(*q.shape[:-1], case.value_dim, dtype=torch.float64)
    lse = torch.zeros(q.shape[:-1], dtype=torch.float64)
    for b, head in itertools.product(range(case.batch), range(case.heads)):
        kv = head // (case.heads // case.kv_heads)
        for token, keys, offsets in attended(case):
            query = q[(b, *token, head)].tolist()
            rows = [(k[(b, *key, kv)].tolist(), v[(b, *key, kv)].tolist()) for key in keys]
            bias = [0.0 if rpb is None else rpb[(head, *o)].item() for o in offsets]
            for e in range(case.num_additional):
                rows.append((ak[b, e, kv].tolist(), av[b, e, kv].tolist()))
                bias.append(0.0)
            scores = [
                scale * sum(x * y for x, y in zip(query, key)) + extra
                for (key, _), extra in zip(rows, bias)
            ]
            total = sum(math.exp(s) for s in scores)
            lse[(b, *token, head)] = math.log(total)
            for c in range(case.value_dim):
                weighted = (math.exp(s) * value[c] for s, (_, value) in zip(scores, rows))
                out[(b, *token, head, c)] = sum(weighted) / total
    return out, lse


def check(case):
    inputs = case.inputs()
    expected, actual = (
        by_hand(case, inputs, 0.7),
        reference.forward(Inputs(*inputs), case.rule, 0.7),
    )
    assert_close("out", expected[0], actual[0], 1e-12)
    assert_close("lse", expected[1], actual[1], 1e-12)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_output_and_lse(case):
    check(case)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_unfused_slots(case):
    """Products and bias are in the slots that the definition says; masked slots are last."""
    case = case._replace(kv_heads=case.heads, rpb=True)
    q, k, _, rpb, *_ = case.inputs()
    products = reference.qk(q, k, case.rule)
    bias = reference.rpb_bias(rpb, case.space, case.space, case.rule)
    valid = case.rule.attended_slots(case.space, case.space)
    for token, keys, offsets in attended(case):
        assert valid[token].sum() == len(keys)
        for head in range(case.heads):
            expected = [torch.dot(q[(0, *token, head)], k[(0, *key, head)]) for key in keys]
            slots = products[(0, *token, head)]
            assert slots[valid[token]].tolist() == pytest.approx([x.item() for x in expected])
            assert (slots[~valid[token]] == 0).all()
            expected = [rpb[(head, *o)].item() for o in offsets]
            assert bias[(*token, head)][valid[token]].tolist() == expected


@st.composite
def small_problems(draw):
    rank = draw(st.integers(1, 3))
    space = tuple(draw(st.integers(1, (9, 5, 3)[rank - 1])) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, min(3, n))) for n in space)
    kernel = tuple(draw(st.integers(1, n // d)) for n, d in zip(space, dilation))
    stride = tuple(draw(st.integers(1, k)) for k in kernel)
    causal = tuple(draw(st.booleans()) for _ in space)
    return Case(
        space, kernel, stride, dilation, causal, batch=1, heads=1, kv_heads=1, dim=1, value_dim=1,
        num_additional=draw(st.integers(0, 2)), rpb=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(small_problems())
def test_anywhere_in_the_parameter_space(case):
    torch.manual_seed(0)
    check(case)


@pytest.mark.parametrize("window", [2, 3, 4])
def test_stride_of_the_window_is_blocked_attention(window):
    """Each block of ``kernel_size`` tokens attends only itself."""
    case = Case((12,), (window,), stride=window)
    q, k, v, *_ = inputs = case.inputs()
    out, _ = reference.forward(Inputs(*inputs), case.rule, 0.5)
    blocks = [x.unflatten(1, (-1, window)).movedim(-2, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*blocks, scale=0.5)
    assert_close("out", expected.movedim(2, -2).flatten(1, 2), out, 1e-12)


def test_dilation_is_attention_inside_every_group():
    case = Case((11,), (3,), stride=2, dilation=3, is_causal=True)
    inputs = case.inputs()
    out, _ = reference.forward(Inputs(*inputs), case.rule, 0.5)
    for group in range(3):
        part = [None if x is None else x[:, group::3] for x in inputs]
        alone = case._replace(dilation=1).rule
        assert_close(
            "group", reference.forward(Inputs(*part), alone, 0.5)[0], out[:, group::3], 1e-12
        )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_references_gradient_is_its_derivative(case):
    """The gradient is written out, because autograd is off inside of dispatch modes."""
    inputs = [None if x is None else x.requires_grad_() for x in case.inputs()]
    outputs = reference.forward(Inputs(*inputs), case.rule, 0.7)
    grads = [torch.randn_like(x) for x in outputs]
    given = [x for x in inputs if x is not None]
    wanted = torch.autograd.grad(outputs, given, grads)
    found = reference.backward(*grads, Inputs(*inputs), *outputs, case.rule, 0.7)
    for expected, actual in zip(wanted, [x for x in found if x is not None], strict=True):
        assert_close("gradient", expected, actual.detach(), 1e-11)
