"""Masks take keys away and move no window; what is masked reaches nothing, even if it is NaN."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import Case, assert_close, dense_mask, name_of, sdpa, tiled
from helpers import reference as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import cases, run
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import ArgumentError, VarlenLayout, _warnings, functional
from natten.backends import Problem, explain, runner_of
from natten.backends.reference import relative_bias
from natten.backends.tiled import grids
from natten.errors import UnsupportedError
from natten.inputs import Inputs
from natten.operators import composed_attention, gathered_gradient

MIXED = Case(
    (6, 4), (3, 2), stride=(1, 2), dilation=(2, 1), batch=2, heads=2, kv_heads=1, dim=2,
    value_dim=3, num_additional=2, rpb=True, boundary=("truncate", "circular"),
    queries_per_key=(2, 1), query_offset=(3, 1), query_space=(5, 2),
)  # fmt: skip
PLAIN = Case((7,), (3,), dim=2, value_dim=2, heads=1, kv_heads=1)
SELF = [
    Case((17,), (5,), dilation=2, rpb=True),
    Case((12, 9), (4, 3), stride=(3, 1), dilation=(1, 2), heads=4, num_additional=2),
    Case((6, 5, 7), (3, 2, 3), is_causal=(True, False, False), stride=(2, 1, 1)),
    Case((8, 6), (3, 5), stride=(2, 1), boundary="circular", kv_heads=1, rpb=True),
]
backends = pytest.mark.parametrize("backend", [None, "tiled", "reference"])


def random_masks(case, share=0.6, batches=(None, None)):
    """Masks of keys and of additional tokens, of which a ``share`` may be attended."""
    sizes = [case.batch if n is None else n for n in batches]
    key_mask = torch.rand(sizes[0], *case.space) < share
    additional = torch.rand(sizes[1], case.num_additional) < share
    return key_mask, additional if case.num_additional else None


def masked_inputs(case, share=0.6, dtype=torch.float64, batches=(None, None)):
    masks = random_masks(case, share, batches)
    return case.inputs(dtype)._replace(**dict(zip(Inputs._fields[-2:], masks)))


def filled(inputs, value):
    """The inputs with ``value`` in masked keys, values and additional ones."""
    masks = inputs.key_mask, inputs.additional_mask
    names = ("key", "value"), ("additional_keys", "additional_values")
    for mask, both in zip(masks, names):
        for name in both if mask is not None else ():
            x = getattr(inputs, name).masked_fill(~mask[..., None, None], value)
            inputs = inputs._replace(**{name: x})
    return inputs


def leaves(inputs):
    """The inputs as leaves, and those that there are."""
    tensors = (None if x is None else x.detach().clone() for x in inputs)
    inputs = Inputs(*tensors)
    given = [x.requires_grad_() for x in inputs.differentiable if x is not None]
    return inputs, given


def gradients(function, inputs, grads):
    """Outputs and the gradients of all inputs, None where there is no input."""
    inputs, given = leaves(inputs)
    outputs = function(inputs)
    found = iter(torch.autograd.grad(outputs, given, grads))
    each = (None if x is None else next(found) for x in inputs.differentiable)
    return *(x.detach() for x in outputs), *each


def assert_same_bits(expected, found):
    for a, b in zip(expected, found, strict=True):
        assert a is b or torch.equal(a, b)


def by_hand(case, inputs, scale):
    """Output and LSE of dense attention to the keys that are left: the others are cut out."""
    query = inputs.query.flatten(1, -3).transpose(1, 2)  # [B, heads, queries, head dim]
    window, repeats = dense_mask(case), case.heads // case.kv_heads
    bias = torch.zeros(case.heads, *window.shape, dtype=query.dtype)
    if inputs.rpb is not None:
        bias = relative_bias(case.rule, case.queries, case.space, inputs.rpb)
    bias = bias.reshape(case.heads, *window.shape).masked_fill(~window, -math.inf)
    outs, lses = [], []
    for b in range(case.batch):
        left = ones(math.prod(case.space), inputs.key_mask, b)
        keys, values = (x[b].flatten(0, -3)[left] for x in (inputs.key, inputs.value))
        own = bias[..., left]
        if inputs.additional_keys is not None:
            left = ones(case.num_additional, inputs.additional_mask, b)
            keys = torch.cat([keys, inputs.additional_keys[b][left]])
            values = torch.cat([values, inputs.additional_values[b][left]])
            own = F.pad(own, (0, int(left.sum())))
        keys, values = (x.transpose(0, 1).repeat_interleave(repeats, 0) for x in (keys, values))
        scores = query[b] @ keys.transpose(-1, -2) * scale + own
        empty = (scores == -math.inf).all(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0.0)
        weights = scores.softmax(-1).masked_fill(empty, 0.0)
        outs.append((weights @ values).transpose(0, 1))
        lses.append(scores.logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)[..., 0].T)
    shape = case.batch, *case.queries, case.heads
    return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape)


def ones(size, mask, b):
    """The mask of a batch entry, flat."""
    return torch.ones(size, dtype=torch.bool) if mask is None else mask[b % len(mask)].flatten()


# --- brute force ---


@st.composite
def problems(draw):
    """A problem with masks; masked tokens hold NaN."""
    case = draw(cases())._replace(batch=draw(st.integers(1, 2)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    share = draw(st.sampled_from((0.0, 0.3, 0.8)))
    batches = tuple(draw(st.sampled_from((None, 1))) for _ in range(2))
    inputs = masked_inputs(case, share, batches=batches)
    if draw(st.booleans()) and case.num_additional:
        name = draw(st.sampled_from(("key_mask", "additional_mask")))
        inputs = inputs._replace(**{name: None})
    return case, filled(inputs, math.nan)


def tiled_runner(inputs, rule):
    return runner_of(tiled, Problem.of("attention", inputs, rule))


WAYS = {
    "reference": lambda inputs, rule: oracle.forward(inputs, rule, 0.4),
    "tiled": lambda inputs, rule: tiled_runner(inputs, rule).forward(inputs, rule, 0.4),
    "composed": lambda inputs, rule: composed_attention(inputs, rule, 0.4),
    "gathered": lambda inputs, rule: composed_attention(inputs, rule, 0.4, gathered=True),
}
GRADIENTS = {
    "reference": lambda rule, *args: oracle.backward(*args, rule, 0.4),
    "tiled": lambda rule, *args: tiled_runner(args[2], rule).backward(*args, rule, 0.4),
    "gathered": lambda rule, *args: gathered_gradient(*args[:3], rule, 0.4),
}


@settings(max_examples=100, deadline=None)
@given(problems())
def test_against_brute_force(problem):
    case, inputs = problem
    clean, given = leaves(filled(inputs, 0.0))
    expected = by_hand(case, clean, 0.4)
    out, lse = (x.detach() for x in expected)
    for name, way in WAYS.items():
        for a, b in zip((out, lse), way(inputs, case.rule)):
            assert_close(name, a, b, 1e-12)
    # What flows back from an LSE of -inf may be NaN, as of its square root.
    grads = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -math.inf, math.nan)
    wanted = torch.autograd.grad(expected, given, grads, allow_unused=True, materialize_grads=True)
    for name, way in GRADIENTS.items():
        found = way(case.rule, *grads, inputs, out, lse)
        present = [x for x in found if x is not None]
        for a, b in zip(wanted, present, strict=True):
            assert_close(name, a, b, 1e-11)


@backends
@pytest.mark.parametrize("queries, keys", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_plain_attention(queries, keys, causal, backend):
    """As PyTorch's own with a mask of pairs."""
    q = torch.randn(2, queries, 4, 8).double()
    k, v = (torch.randn(2, keys, 2, 8).double() for _ in range(2))
    key_mask = torch.rand(2, keys) < 0.6
    key_mask[:, 0] = True  # query 0 has a key left
    pairs = key_mask[:, None, None]
    if causal:
        pairs = pairs & torch.ones(queries, keys, dtype=torch.bool).tril()
    given = [x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
    expected = F.scaled_dot_product_attention(*given, attn_mask=pairs).transpose(1, 2)
    k, v = (x.masked_fill(~key_mask[..., None, None], math.nan) for x in (k, v))
    out = natten.attention(q, k, v, is_causal=causal, key_mask=key_mask, backend=backend)
    assert_close("out", expected, out, 1e-12)


# --- identities ---


@backends
@pytest.mark.parametrize("case", SELF, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masks_that_mask_nothing_change_no_bit(case, backend, dtype):
    inputs = case.inputs(dtype)
    grads = torch.randn_like(inputs.query), torch.randn(inputs.query.shape[:-1])
    grads = grads[0], grads[1].to(torch.promote_types(dtype, torch.float32))
    expected = gradients(lambda x: run(case, x, backend), inputs, grads)
    for batches in ((1, 1), (None, None)):
        key_mask, additional_mask = random_masks(case, 1.1, batches)
        same = inputs._replace(key_mask=key_mask, additional_mask=additional_mask)
        assert_same_bits(expected, gradients(lambda x: run(case, x, backend), same, grads))


@backends
@pytest.mark.parametrize(
    "case",
    [
        Case((15,), (5,), dilation=2, boundary="truncate", rpb=True),
        Case((15,), (5,), is_causal=True, kv_heads=1),
        Case((9, 8), (4, 3), is_causal=(True, False), boundary=("shift", "truncate")),
        Case((6, 7, 5), (3, 9, 2), dilation=(1, 2, 1), boundary="truncate", num_additional=2),
    ],
    ids=name_of,
)
def test_padded_batches_are_their_samples(case, backend):
    """At stride 1, where no window moves for the end of an axis. The padding holds NaN."""
    case = case._replace(batch=3)
    sizes = [tuple(max(1, n - 2 * b) for n in case.space) for b in range(3)]
    own = [(slice(b, b + 1), *(slice(n) for n in size)) for b, size in enumerate(sizes)]
    key_mask = torch.zeros(3, *case.space, dtype=torch.bool)
    grad_out = torch.zeros(3, *case.space, case.heads, case.value_dim, dtype=torch.float64)
    grad_lse = grad_out[..., 0].clone()
    for at in own:
        key_mask[at] = True
        grad_out[at], grad_lse[at] = (torch.randn_like(x[at]) for x in (grad_out, grad_lse))
    inputs = filled(case.inputs()._replace(key_mask=key_mask), math.nan)
    *batched, grad_rpb, grad_keys, grad_values = gradients(
        lambda x: run(case, x, backend), inputs, (grad_out, grad_lse)
    )
    biases = []
    for b, (at, size) in enumerate(zip(own, sizes)):
        alone, one = case._replace(space=size), slice(b, b + 1)
        q, k, v = (x[at] for x in inputs[:3])
        more = (None if x is None else x[one] for x in inputs[4:6])
        *found, bias, keys, values = gradients(
            lambda x, alone=alone: run(alone, x, backend),
            Inputs(q, k, v, inputs.rpb, *more), (grad_out[at], grad_lse[at]),
        )  # fmt: skip
        for expected, whole in zip(found, batched, strict=True):
            assert_close("sample", expected, whole[at], 1e-12)
        if case.num_additional:
            assert_close("keys", keys, grad_keys[one], 1e-12)
            assert_close("values", values, grad_values[one], 1e-12)
        biases.append(bias)
    if case.rpb:
        assert_close("bias", sum(biases), grad_rpb, 1e-12)


def test_padded_batches_are_packed_documents():
    """The same three images, padded or packed."""
    sizes = [(7, 5), (4, 8), (2, 3)]
    layout = VarlenLayout(sizes)
    q, k, v = (torch.randn(layout.total_tokens, 2, 4).double() for _ in range(3))
    window = {"kernel_size": (5, 3), "dilation": (1, 2), "boundary": "truncate"}
    packed = natten.na2d_varlen(q, k, v, layout, **window)
    images = torch.full((3, 3, 7, 8, 2, 4), math.nan, dtype=torch.float64)
    key_mask = torch.zeros(3, 7, 8, dtype=torch.bool)
    for x, padded in zip((q, k, v), images):
        for b, own in enumerate(layout.unpack(x)):
            padded[b, : sizes[b][0], : sizes[b][1]] = own
            key_mask[b, : sizes[b][0], : sizes[b][1]] = True
    out = natten.na2d(*images, **window, key_mask=key_mask)
    for b, own in enumerate(layout.unpack(packed)):
        assert_close("image", own, out[b, : sizes[b][0], : sizes[b][1]], 1e-12)


@backends
def test_a_mask_moves_no_window(backend):
    """At the end of a layout, windows shift; at the end of what a mask leaves, they do not."""
    q = torch.randn(1, 8, 1, 4).double()
    key_mask = torch.tensor([[True] * 6 + [False] * 2])
    out = natten.na1d(q, q, q, 3, key_mask=key_mask, backend=backend)
    for query, keys in ((4, (3, 6)), (5, (4, 6)), (6, (5, 6)), (7, (5, 6))):
        own = q[:, slice(*keys)]
        expected = natten.attention(q[:, query : query + 1], own, own)
        assert_close(f"query {query}", expected, out[:, query : query + 1], 1e-12)


@backends
def test_rings_roll_with_their_masks(backend):
    case = Case((12, 8), (3, 5), stride=(2, 1), dilation=(3, 1), boundary="circular", rpb=True)
    inputs = filled(masked_inputs(case, 0.5), math.nan)
    shifts, dims = (6, -3), (1, 2)
    rolled = [x.roll(shifts, dims) for x in inputs[:3]]
    rolled = Inputs(*rolled, inputs.rpb, key_mask=inputs.key_mask.roll(shifts, dims))
    for a, b in zip(run(case, inputs, backend), run(case, rolled, backend)):
        assert_close("rolled", a.roll(shifts, dims), b, 1e-12)


# --- what is masked reaches nothing ---


@backends
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [SELF[1], SELF[3], MIXED], ids=["plain", "circular", "mixed"])
def test_what_masked_tokens_hold_changes_no_bit(case, backend, value, dtype):
    inputs = masked_inputs(case, dtype=dtype)
    out, lse = run(case, inputs)
    grads = torch.randn_like(out), torch.randn_like(lse)
    expected, found = (
        gradients(lambda x: run(case, x, backend), filled(inputs, x), grads) for x in (1.0, value)
    )
    assert_same_bits(expected, found)
    _, dk, dv, _, *additional = found[2:]
    for mask, pair in ((inputs.key_mask, (dk, dv)), (inputs.additional_mask, additional)):
        for x in pair:
            assert x is None or not x[~mask].any()


@backends
@pytest.mark.parametrize("case", [SELF[0], SELF[1], MIXED], ids=name_of)
def test_queries_with_nothing_left(case, backend):
    """The first entry has no key and no additional token left, the other one has one key."""
    inputs = masked_inputs(case, 0.0)
    inputs.key_mask[1][(0,) * len(case.space)] = True
    inputs = filled(inputs, math.nan)
    out, lse = run(case, inputs)
    empty = lse == -math.inf
    assert empty[0].all() and empty[1].any() and not empty[1].all()
    # What flows back from an LSE of -inf may be NaN, as of its square root.
    for grad_lse in (
        torch.zeros_like(lse),
        torch.randn_like(lse),
        lse.masked_fill(empty, math.nan),
    ):
        given = torch.randn_like(out), grad_lse
        out, lse, *grads = gradients(lambda x: run(case, x, backend), inputs, given)
        assert not out[empty].any() and torch.equal(lse == -math.inf, empty)
        assert all(x.isfinite().all() for x in (out, *grads) if x is not None)
        dq, dk, dv, _, *additional = grads
        assert not dq[empty].any() and not any(x.any() for x in additional if x is not None)
        assert not any(x[0].any() for x in (dq, dk, dv)) and dv[1].any()


@backends
def test_additional_tokens_may_be_all_that_is_left(backend):
    case = SELF[1]
    inputs = masked_inputs(case, 0.0)._replace(additional_mask=torch.tensor([[True, False]]))
    inputs = filled(inputs, math.nan)
    out, lse = run(case, inputs, backend)
    value = inputs.additional_values[:, None, None, 0].repeat_interleave(2, -2)
    assert_close("out", value.expand(out.shape), out, 1e-12)
    key = inputs.additional_keys[:, None, None, 0].repeat_interleave(2, -2)
    score = (inputs.query * key).sum(-1) * case.dim**-0.5
    assert_close("lse", score, lse, 1e-12)


@backends
def test_no_batch_and_no_tokens(backend):
    case = SELF[1]._replace(batch=0)
    out, lse = run(case, masked_inputs(case, batches=(1, 1)), backend)
    assert out.shape == (0, 12, 9, 4, 8) and lse.shape == out.shape[:-1]
    q, none = torch.randn(2, 3, 1, 4), torch.randn(2, 0, 1, 4)
    key_mask = torch.zeros(1, 0, dtype=torch.bool)
    out, lse = natten.attention(q, none, none, key_mask=key_mask, return_lse=True, backend=backend)
    assert not out.any() and (lse == -math.inf).all()
    case = SELF[0]
    inputs = masked_inputs(case)
    more = inputs.key[:, :0]
    options = {"additional_mask": torch.zeros(1, 0, dtype=torch.bool)}
    options |= {"additional_keys": more, "additional_values": more}
    expected = run(case, inputs, backend)
    assert_same_bits(expected, run(case, inputs, backend, **options))


@backends
def test_masks_with_any_strides(backend):
    case = Case((6, 8), (3, 4), num_additional=4)
    inputs = masked_inputs(case)
    wide = torch.zeros(2, 8, 12, dtype=torch.bool)
    wide[:, :, ::2] = inputs.key_mask.transpose(1, 2)
    strided = inputs._replace(
        key_mask=wide[:, :, ::2].transpose(1, 2),
        additional_mask=inputs.additional_mask.T.contiguous().T,
    )
    assert_same_bits(run(case, inputs, backend), run(case, strided, backend))
    shown = inputs._replace(key_mask=inputs.key_mask[:1, :1, :1].expand(2, 6, 8))
    alike = inputs._replace(key_mask=shown.key_mask[:1].contiguous())
    assert_same_bits(run(case, shown, backend), run(case, alike, backend))


def test_memory_is_that_of_the_inputs_or_a_chunk():
    """Nothing grows with the square of 65536 tokens."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    case = Case((65536,), (9,), batch=1, heads=1, kv_heads=1, dim=4, value_dim=4)
    inputs = masked_inputs(case, dtype=torch.float32)
    with Watch():
        out, lse = tiled.forward(inputs, case.rule, 0.5)
        tiled.backward(out, lse, inputs, out, lse, case.rule, 0.5)
    assert 0 < largest <= max(4 * grids.CHUNK * 2, inputs.query.nbytes)


# --- unfused ---


def unfused(case, q, k, v, rpb, ak, av, key_mask, additional_mask):
    """Scores, and what they make of the values, heads-first."""
    rule = case.rule
    options = {
        "kernel_size": rule.kernel_size, "stride": rule.stride, "dilation": rule.dilation,
        "is_causal": rule.is_causal, "boundary": rule.boundary,
        "queries_per_key": rule.queries_per_key, "query_offset": rule.query_offset,
    }  # fmt: skip
    qk, weigh = (getattr(natten, f"na{rule.rank}d_{name}") for name in ("qk", "av"))
    masks = {"key_mask": key_mask, "additional_mask": additional_mask}
    attn = qk(q, k, rpb=rpb, additional_keys=ak, **masks, **options)
    left = attn.amax(-1, keepdim=True) > -math.inf
    weights = torch.where(left, attn, 0.0).softmax(-1) * left
    return attn, weigh(weights, v, additional_values=av, **options)


def heads_first(inputs):
    """Inputs of unfused operators."""
    q, k, v, rpb, *additional, key_mask, additional_mask = inputs
    q, k, v, *additional = (None if x is None else x.movedim(-2, 1) for x in (q, k, v, *additional))
    return Inputs(q, k, v, rpb, *additional, key_mask, additional_mask)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_unfused_slots(case):
    """Slots of masked keys hold -inf, the others what they hold without masks."""
    torch.manual_seed(0)
    case = case._replace(kv_heads=case.heads)
    inputs = filled(masked_inputs(case, batches=(1, None)), math.nan)
    first, rule = heads_first(inputs), case.rule
    clean = heads_first(filled(inputs, 0.0)._replace(key_mask=None, additional_mask=None))
    tokens = rule.window_tokens_of(case.queries, case.space)
    left = inputs.key_mask.flatten(1)[:, tokens]
    if case.num_additional:
        sizes = case.batch, *(1 for _ in case.queries), case.num_additional
        more = inputs.additional_mask.view(sizes).expand(case.batch, *case.queries, -1)
        left = torch.cat([left.expand(case.batch, *left.shape[1:]), more], -1)
    attn, out = unfused(case, *first._replace(value=clean.value, additional_values=clean[5]))
    expected, _ = unfused(case, *clean)
    assert_close("slots", expected.masked_fill(~left[:, None], -math.inf), attn, 1e-12)
    fused, _ = run(case, inputs, scale=1.0)
    assert_close("fused", fused, out.movedim(1, -2), 1e-12)


def test_unfused_gradients():
    """Gradients of masked keys are 0, also of those that hold NaN."""
    case = MIXED._replace(kv_heads=2, value_dim=2)
    inputs = masked_inputs(case)
    inputs.key_mask[0] = inputs.additional_mask[0] = False
    inputs, given = leaves(heads_first(inputs))

    def function(*tensors):
        attn, out = unfused(case, *tensors, *inputs[-2:])
        return torch.where(attn.isfinite(), attn, 0), out

    assert gradcheck(function, given, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, given, fast_mode=True)
    q, k, v, rpb, ak, av = given
    masks = [~x[:, None, ..., None] for x in inputs[-2:]]
    nan_k, nan_ak = (x.masked_fill(mask, math.nan) for x, mask in zip((k, ak), masks))
    a, b = (function(q, x, v, rpb, y, av) for x, y in ((k, ak), (nan_k, nan_ak)))
    expected = torch.autograd.grad([x.sin().sum() for x in a], given)
    found = torch.autograd.grad([x.sin().sum() for x in b], given)
    assert_same_bits(expected, found)


# --- derivatives, transforms, compilers ---


def finite(outputs):
    out, lse = outputs
    return out, torch.where(lse.isfinite(), lse, 0.0)


def with_empty(case):
    """Inputs with NaN where they are masked; the first entry has nothing left."""
    inputs = masked_inputs(case)
    inputs.key_mask[0] = False
    if case.num_additional:
        inputs.additional_mask[0] = False
    return leaves(filled(inputs, math.nan))


@pytest.mark.parametrize("case", [MIXED, PLAIN], ids=["mixed", "plain"])
@pytest.mark.no_cover
def test_derivatives(case):
    inputs, given = with_empty(case)

    def function(*tensors):
        present = iter(tensors)
        every = (None if x is None else next(present) for x in inputs.differentiable)
        return finite(run(case, Inputs(*every, *inputs[-2:])))

    assert gradcheck(function, given, check_forward_ad=True)
    assert gradgradcheck(function, given, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
def test_derivatives_of_plain_attention(causal):
    q = torch.randn(2, 4, 2, 2).double()
    k, v = (torch.randn(2, 5, 1, 2).double() for _ in range(2))
    key_mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    given = [x.requires_grad_() for x in (q, k, v)]

    def function(*qkv):
        options = {"is_causal": causal, "key_mask": key_mask, "return_lse": True}
        return finite(natten.attention(*qkv, **options))

    assert gradcheck(function, given, check_forward_ad=True)
    assert gradgradcheck(function, given, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("case", [MIXED, SELF[0]], ids=["mixed", "bias"])
def test_second_derivatives_and_tangents_without_nan(case):
    """What masked tokens hold does not reach them, nor do tangents of masked tokens."""
    inputs, given = with_empty(case)
    clean, own = leaves(filled(inputs, 0.0))
    found = []
    for each, tensors in ((clean, own), (inputs, given)):
        out, lse = finite(run(case, each))
        first = torch.autograd.grad((out.sin().sum() + lse.sin().sum()), tensors, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(x.sin().sum() for x in first), tensors)])
    for expected, actual in zip(*found):
        assert_close("second", expected, actual, 1e-12)
    changes = Inputs(*(None if x is None else torch.ones_like(x) for x in clean[:6]), *clean[6:])
    expected = tangents_of(case, clean, changes)
    for a, b in zip(expected, tangents_of(case, inputs, filled(changes, math.nan))):
        assert_close("tangent", a, b, 1e-12)


def tangents_of(case, inputs, changes):
    """Tangents of output and LSE."""
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        duals = (
            None if x is None else forward.make_dual(x.detach(), change)
            for x, change in zip(inputs[:6], changes)
        )  # fmt: skip
        outputs = finite(run(case, Inputs(*duals, *inputs[6:])))
        return [forward.unpack_dual(x).tangent for x in outputs]


def stacked(case, n=3):
    """Inputs with a first dimension to map, masks too."""
    every = [masked_inputs(case) for _ in range(n)]
    return [None if x[0] is None else torch.stack(x) for x in zip(*every)]


def mapped_dims(inputs, masks):
    """In which dimensions tensors are mapped; ``masks`` says which of the two masks are."""
    dims = [None if x is None else 0 for x in inputs[:6]]
    return *dims, *(0 if is_mapped else None for is_mapped in masks)


@pytest.mark.parametrize("masks", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("case", [MIXED, SELF[0]], ids=["mixed", "bias"])
def test_vmap(case, masks):
    inputs = stacked(case)
    inputs[6:] = [x if m or x is None else x[0] for x, m in zip(inputs[6:], masks)]
    masks = [m and x is not None for x, m in zip(inputs[6:], masks)]
    dims = mapped_dims(inputs, masks)

    def function(*tensors):
        return run(case, Inputs(*tensors))

    def loss(*tensors):
        out, lse = finite(function(*tensors))
        return out.sin().sum() + lse.sin().sum()

    slope = torch.func.grad(loss, argnums=(0, 1, 2))
    for each in (function, slope):
        found = torch.func.vmap(each, in_dims=dims)(*inputs)
        for i in range(3):
            own = (x if dim is None else x[i] for x, dim in zip(inputs, dims))
            for a, b in zip(each(*own), found, strict=True):
                assert_close("mapped", a, b[i], 1e-12)


def test_vmap_of_masks_alone():
    """Also in any dimension, and nested."""
    q, k, v = (torch.randn(1, 9, 2, 4).double() for _ in range(3))
    masks = torch.rand(1, 3, 9, 2) < 0.6
    function = lambda mask: natten.na1d(q, k, v, 3, key_mask=mask)  # noqa: E731
    found = torch.func.vmap(torch.func.vmap(function, in_dims=1), in_dims=3)(masks)
    assert found.shape == (2, 3, *q.shape)
    for i in range(2):
        for j in range(3):
            assert_close("mapped", function(masks[:, j, :, i]), found[i, j], 1e-12)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobians(strategy):
    q = torch.randn(1, 5, 2, 3).double()
    key_mask = torch.tensor([[True, False, True, True, False]])

    def function(q):
        return natten.na1d(q, q, q.sin(), 3, key_mask=key_mask)

    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(function, q)
    assert_close(
        "jacobian", expected, jacobian(function, q, vectorize=True, strategy=strategy), 1e-12
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", [MIXED, SELF[0]], ids=["mixed", "bias"])
def test_compiled(case, dynamic):
    def function(*tensors):
        return run(case, Inputs(*tensors))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        own = case._replace(batch=batch)
        inputs = filled(masked_inputs(own), math.nan)
        out, lse = function(*inputs)
        grads = torch.randn_like(out), torch.randn_like(lse)
        expected, found = (
            gradients(lambda x, each=each: each(*x), inputs, grads) for each in (function, compiled)
        )
        for a, b in zip(expected, found, strict=True):
            assert_close("compiled", a, b, 1e-12)


def test_compiled_unfused_and_plain():
    case = MIXED._replace(kv_heads=2, value_dim=2)
    inputs = heads_first(masked_inputs(case))

    def function(*tensors):
        q, key_mask = tensors[0].flatten(2, 3).transpose(1, 2), tensors[6].flatten(1)[:, :10]
        plain = natten.attention(q, q, q, key_mask=key_mask, is_causal=True)
        return *unfused(case, *tensors), plain

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(function(*inputs), compiled(*inputs), strict=True):
        assert_close("compiled", a, b, 1e-12)


class Masked(torch.nn.Module):
    """Fused, plain and unfused calls with masks of the batch and of one entry."""

    def forward(self, q, k, additional, key_mask, additional_mask, one):
        tokens = {"additional_keys": additional, "additional_values": additional}
        masks = {"key_mask": key_mask, "additional_mask": additional_mask}
        window = {"kernel_size": (3, 2), "boundary": ("truncate", "circular")}
        found = [
            *natten.na2d(q, k, k, **window, **tokens, **masks, return_lse=True),
            natten.na2d(q, k, k, 3, key_mask=one),
            natten.attention(q[:, 0], k[:, 0], k[:, 0], key_mask=key_mask[:, 0]),
        ]
        first, second, more = (x.movedim(-2, 1) for x in (q, k, additional))
        found.append(natten.na2d_qk(first, second, **window, additional_keys=more, **masks))
        found.append(natten.na2d_qk(first, second, 3, key_mask=one))
        return tuple(found)

    @staticmethod
    def inputs(batch, dtype=torch.float32):
        q, k = (torch.randn(batch, 4, 5, 2, 4, dtype=dtype) for _ in range(2))
        masks = torch.rand(batch, 4, 5) < 0.6, torch.rand(batch, 3) < 0.6, torch.rand(1, 4, 5) < 0.6
        masks[0][0] = False
        return q, k, torch.randn(batch, 3, 2, 4, dtype=dtype), *masks


def of_ours(graph):
    return [node for node in graph.nodes if "natten" in str(node.target)]


def test_traced_gradients_are_decomposed():
    def step(*given):
        q, k, additional, *masks = given
        floating = [x.detach().requires_grad_() for x in (q, k, additional)]
        outputs = Masked()(*floating, *masks)
        loss = sum(torch.where(x.isfinite(), x, 0).sin().sum() for x in outputs)
        return *outputs, *torch.autograd.grad(loss, floating)

    given = Masked.inputs(2, torch.float64)
    assert of_ours(make_fx(step)(*given).graph)
    trace = make_fx(step, decomposition_table=natten.export.decompositions())(*given)
    assert not of_ours(trace.graph)
    for expected, found in zip(step(*given), trace(*given), strict=True):
        assert_close("step", expected, found, 1e-12)


@pytest.fixture(scope="module", params=[False, True], ids=["traced", "strict"])
def program(request):
    """:class:`Masked` for all batch sizes."""
    batch = {0: Dim("batch", min=2)}
    shapes = (batch, batch, batch, batch, batch, None)
    return export(Masked(), Masked.inputs(2), dynamic_shapes=shapes, strict=request.param)


def test_exported_for_all_batch_sizes(program):
    decomposed = program.run_decompositions(natten.export.decompositions())
    assert of_ours(program.graph) and not of_ours(decomposed.graph)
    given = Masked.inputs(5)
    for each in (program, decomposed):
        for expected, found in zip(Masked()(*given), each.module()(*given), strict=True):
            assert_close("exported", expected, found, 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.no_cover
def test_onnx(program):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    decomposed = program.run_decompositions(natten.export.decompositions())
    onnx = torch.onnx.export(decomposed, dynamo=True, verbose=False)
    session = runtime.InferenceSession(onnx.model_proto.SerializeToString())
    for batch in (2, 5):
        given = Masked.inputs(batch)
        named = {x.name: y.numpy() for x, y in zip(session.get_inputs(), given, strict=True)}
        for expected, found in zip(Masked()(*given), session.run(None, named), strict=True):
            assert_close("onnx", expected, torch.from_numpy(found), 1e-5)


def test_traces():
    given = Masked.inputs(2)
    traced = torch.jit.trace(Masked(), given)
    given = Masked.inputs(2)
    for expected, found in zip(Masked()(*given), traced(*given), strict=True):
        assert_close("traced", expected, found, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Masks keep their type, and the result is that of a call in half precision."""
    case = SELF[1]._replace(kv_heads=4)
    inputs = masked_inputs(case, dtype=torch.float32)
    halves = Inputs(*(x if x is None or x.dtype == torch.bool else x.to(dtype) for x in inputs))
    first, others = heads_first(inputs), heads_first(halves)
    with torch.autocast("cpu", dtype):
        found = *run(case, inputs), unfused(case, *first)[0]
    assert_same_bits((*run(case, halves), unfused(case, *others)[0]), found)


# --- arguments ---

Q, MASK = torch.randn(2, 8, 2, 4), torch.ones(2, 8, dtype=torch.bool)
ALSO = torch.ones(2, 3, dtype=torch.bool)
TOKENS = {"additional_keys": Q[:, :3], "additional_values": Q[:, :3]}


def fused(**options):
    return natten.na1d(Q, Q, Q, 3, **options)


def generic(**options):
    return natten.neighborhood_attention_generic(Q, Q, Q, 3, **options)


def qk(**options):
    x, more = Q.transpose(1, 2), options.pop("additional_values", None)
    options |= {} if more is None else {"additional_keys": more.transpose(1, 2)}
    return natten.na1d_qk(x, x, 3, **options)


def plain(**options):
    return natten.attention(Q, Q, Q, **options)


def explained(**options):
    return explain(Q, Q, Q, 3, **options)


WRONG = {
    "length": ({"key_mask": MASK[:, :7]}, r"`key_mask` must be.*\(2, 8\) or \(1, 8\).*\(2, 7\)"),
    "batch": ({"key_mask": MASK.repeat(2, 1)}, r"`key_mask` must be \[batch or 1.*\(4, 8\)"),
    "rank": ({"key_mask": MASK[0]}, r"`key_mask` must be.*got \(8,\)"),
    "heads": ({"key_mask": MASK[..., None].expand(2, 8, 2)}, r"`key_mask` must be.*\(2, 8, 2\)"),
    "dtype": ({"key_mask": MASK.float()}, r"`key_mask` must be.*torch.bool.*torch.float32"),
    "bytes": ({"key_mask": MASK.byte()}, r"`key_mask` must be.*torch.bool.*torch.uint8"),
    "type": ({"key_mask": MASK.tolist()}, r"`key_mask` must be a tensor.*list"),
    "device": ({"key_mask": MASK.to("meta")}, "`key_mask` must be on the device.*meta and cpu"),
}
WRONG_ADDITIONAL = {
    "alone": ({"additional_mask": ALSO}, "`additional_mask` needs `additional_keys`"),
    "number": (
        {**TOKENS, "additional_mask": ALSO[:, :2]},
        r"`additional_mask` must be \[batch or 1, num_additional\].*\(2, 3\).*\(2, 2\)",
    ),
    "type": ({**TOKENS, "additional_mask": 1}, "`additional_mask` must be a tensor.*int"),
    "dtype": ({**TOKENS, "additional_mask": ALSO.long()}, "`additional_mask`.*torch.int64"),
    "device": ({**TOKENS, "additional_mask": ALSO.to("meta")}, "`additional_mask`.*meta and cpu"),
}


@pytest.mark.parametrize("function", [fused, generic, qk, plain, explained])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_masks_of_keys(function, name):
    options, message = WRONG[name]
    with pytest.raises(ArgumentError, match=message):
        function(**options)


@pytest.mark.parametrize("function", [fused, generic, qk, explained])
@pytest.mark.parametrize("name", WRONG_ADDITIONAL)
def test_wrong_masks_of_additional_tokens(function, name):
    options, message = WRONG_ADDITIONAL[name]
    with pytest.raises(ArgumentError, match=message):
        function(**options)


def test_packed_sequences_have_lengths_instead():
    x, lengths = Q[:1], torch.tensor([3, 5])
    with pytest.raises(ArgumentError, match="`key_mask` is not for packed sequences"):
        natten.attention(x, x, x, seqlens_Q=lengths, seqlens_KV=lengths, key_mask=MASK[:1])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_and_sparse_tensors():
    items = torch.nested.nested_tensor([torch.randn(1, 2, n, 4) for n in (5, 7)])
    with pytest.raises(ArgumentError, match="`key_mask` and `additional_mask` are for dense"):
        natten.na1d_qk(items, items, 3, key_mask=MASK)
    nested = torch.nested.nested_tensor([MASK[0], MASK[1, :7]])
    for mask in (nested, MASK.to_sparse()):
        for function in (fused, qk, plain):
            with pytest.raises(UnsupportedError, match="`key_mask` must be dense"):
                function(key_mask=mask)


def test_kept_calls():
    """Calls with and without masks are of different kinds, and wrong masks are always found."""
    functional._calls.clear()
    for _ in range(2):
        without = fused()
        masked = fused(key_mask=MASK.tril())
        assert_close("masked", fused(key_mask=MASK.tril(), backend="reference"), masked, 1e-5)
        assert not torch.equal(masked, without)
        assert_same_bits([fused(key_mask=MASK.tril()[:1])], [fused(key_mask=MASK.tril()[:1])])
        for options, message in WRONG.values():
            with pytest.raises(ArgumentError, match=message):
                fused(**options)
        assert_same_bits([fused(key_mask=MASK.tril())], [masked])
        assert_same_bits([fused()], [without])


# --- tools ---


def test_explain_says_which_backends_have_masks():
    some = MASK.tril()
    lines = dict(x.split(": ", 1) for x in explain(Q, kernel_size=7, key_mask=some).split("\n"))
    assert lines["tiled"] == "runs"
    assert lines["reference"] == "can run, comes later in the order of preference"
    assert "masks" not in explain(Q, kernel_size=7)
    lines = explain(Q, Q, Q, key_mask=some).split("\n")
    assert "tiled: runs" in lines
    assert explain(Q, Q, Q, key_mask=MASK) == explain(Q, Q, Q)  # it hides nothing
    lines = explain(Q, kernel_size=7, **TOKENS, additional_mask=ALSO, backend="reference")
    assert "reference: runs" in lines.split("\n")


def test_a_backend_without_masks_is_replaced(monkeypatch):
    monkeypatch.setattr(_warnings, "_given", set())  # other tests may have been warned already
    some = MASK.tril()
    assert sdpa.masks or "sdpa: has no masks of keys" in explain(Q, kernel_size=7, key_mask=some)
    with pytest.warns(UserWarning, match="'sdpa' has no masks of keys; 'tiled' runs instead"):
        fused(key_mask=some, backend="sdpa")


def test_masks_are_not_subtracted_from_operations():
    case = SELF[1]._replace(kv_heads=4)
    inputs = masked_inputs(case, dtype=torch.float32)
    counts = []
    for each in (inputs, inputs._replace(key_mask=None, additional_mask=None)):
        each, given = leaves(each)
        with FlopCounterMode(display=False) as counter:
            out, _ = run(case, each)
            torch.autograd.grad(out.sum(), given)
        with FlopCounterMode(display=False) as unfused_counter:
            unfused(case, *heads_first(each))
        counts.append((counter.get_total_flops(), unfused_counter.get_total_flops()))
    assert counts[0] == counts[1] and all(counts[0])


def test_fvcore_counts_no_mask_as_a_tensor_of_numbers():
    pytest.importorskip("fvcore")

    class Model(torch.nn.Module):
        def forward(self, q, tokens, key_mask, additional_mask):
            more = {"additional_keys": tokens, "additional_values": tokens}
            masks = {"key_mask": key_mask, "additional_mask": additional_mask}
            first, heads_first = q.movedim(-2, 1), tokens.movedim(-2, 1)
            return (
                natten.na1d(q, q, q, 3, key_mask=key_mask),
                natten.na1d(q, q, q, 3, **more, **masks),
                natten.na1d_qk(first, first, 3, additional_keys=heads_first, **masks),
                natten.attention(q, q, q, key_mask=key_mask),
            )

    class Without(Model):
        def forward(self, q, tokens, key_mask, additional_mask):
            return super().forward(q, tokens, None, None)

    given = Q, Q[:, :3], MASK, ALSO
    count = natten.flops.get_flops
    found, expected = (count(m, given, disable_warnings=True) for m in (Model(), Without()))
    assert found == expected > 0
