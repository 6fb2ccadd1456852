"""The oracle is tested by independent means, then every backend against the oracle."""

import math
import random
import re
from pathlib import Path

import pytest
import torch
from helpers import (
    CASES,
    RATIO,
    Case,
    assert_close,
    dense_mask,
    masked_attention,
    name_of,
    reference,
    sdpa,
    tiled,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import natten
from natten import backends, tuning
from natten.backends.tiled import grids
from natten.inputs import Inputs, compute_dtype
from natten.neighborhood import Dense

GRADS = ("query", "key", "value", "rpb", "additional_keys", "additional_values")


# --- the oracle ---


def test_oracle_by_hand():
    """With three tokens and window 2, query 0 attends keys 0 and 1."""
    q = torch.tensor([1.0, 2.0, 3.0]).double().view(1, 3, 1, 1)
    k = torch.tensor([0.0, 1.0, -1.0]).double().view(1, 3, 1, 1)
    v = torch.tensor([10.0, 20.0, 40.0]).double().view(1, 3, 1, 1)
    out, lse = reference.forward(Inputs(q, k, v), Case((3,), (2,)).rule, 0.5)
    weight = math.exp(0.5) / (1 + math.exp(0.5))
    assert out[0, 0].item() == pytest.approx(10 + 10 * weight)
    assert lse[0, 0].item() == pytest.approx(math.log(1 + math.exp(0.5)))
    weight = math.exp(-1.5) / (math.exp(1.5) + math.exp(-1.5))
    assert out[0, 2].item() == pytest.approx(20 + 20 * weight)


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.rpb and not c.num_additional], ids=name_of
)
def test_oracle_is_masked_attention(case):
    q, k, v, *_ = case.inputs()
    out, _ = reference.forward(Inputs(q, k, v), case.rule, 0.3)
    flat = [x.flatten(1, -3).repeat_interleave(case.heads // x.shape[-2], -2) for x in (q, k, v)]
    expected = masked_attention(*flat, dense_mask(case), 0.3)
    assert_close("out", expected.reshape(out.shape), out, 1e-12)


def test_oracle_with_the_whole_axis_is_self_attention():
    case = Case((4, 5), (4, 5))
    q, k, v, *_ = case.inputs()
    out, _ = reference.forward(Inputs(q, k, v), case.rule, 0.3)
    everything = torch.ones(20, 20, dtype=torch.bool)
    flat = [x.flatten(1, 2) for x in (q, k, v)]
    assert_close("out", masked_attention(*flat, everything, 0.3).view(out.shape), out, 1e-12)


def test_oracle_bias_by_hand():
    """For query 1 of three tokens, window 3, offsets -1, 0, 1 are entries 1, 2, 3 of five."""
    rpb = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]).double()
    slots = reference.rpb_bias(rpb, (3,), (3,), Case((3,), (3,)).rule)
    assert slots[:, 0].tolist() == [[3.0, 4.0, 5.0], [2.0, 3.0, 4.0], [1.0, 2.0, 3.0]]


# --- backends ---


def run(module, inputs, rule, scale, grads=None):
    """Run a backend and return output, LSE and gradients."""
    out, lse = module.forward(Inputs(*inputs), rule, scale)
    if grads is None:
        return out, lse, ()
    return out, lse, module.backward(*grads, Inputs(*inputs), out, lse, rule, scale)


def check(case, dtype, grad_lse=True, transform=lambda x: x, module=tiled):
    case = case._replace(rpb=case.rpb and module is not sdpa)  # which has no bias
    inputs = [None if x is None else transform(x) for x in case.inputs(dtype)]
    oracle = [None if x is None else x.double() for x in inputs]
    shape = (*oracle[0].shape[:-1], case.value_dim)
    grad = torch.randn(shape, dtype=dtype)
    grad_of_lse = torch.randn(shape[:-1], dtype=compute_dtype(dtype)) if grad_lse else None
    expected = run(
        reference,
        oracle,
        case.rule,
        0.4,
        (grad.double(), None if grad_of_lse is None else grad_of_lse.double()),
    )
    actual = run(module, inputs, case.rule, 0.4, (grad, grad_of_lse))
    ratio = RATIO[dtype]
    assert_close("out", expected[0], actual[0], ratio)
    assert_close("lse", expected[1], actual[1], RATIO[compute_dtype(dtype)])
    for name, a, b in zip(GRADS, expected[2], actual[2]):
        assert_close(f"gradient of {name}", a, b, 2 * ratio)
    assert actual[0].dtype == dtype


both = pytest.mark.parametrize("module", [tiled, sdpa], ids=["tiled", "sdpa"])


@both
@pytest.mark.parametrize("dtype", RATIO, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_against_the_oracle(case, dtype, module):
    check(case, dtype, module=module)


@pytest.mark.parametrize("chunk", [1, 100, 2000])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_tiled_in_chunks(case, chunk, monkeypatch):
    monkeypatch.setattr(grids, "CHUNK", chunk)
    check(case, torch.float64, grad_lse=False)


@pytest.mark.parametrize("case", CASES[4:8], ids=name_of)
def test_tiled_without_kept_masks(case, monkeypatch):
    monkeypatch.setattr(grids, "CACHED_MASK", 0)
    check(case, torch.float64)


@both
@pytest.mark.parametrize("case", CASES[5:8], ids=name_of)
def test_on_views(case, module):
    """Inputs are views with heads before space in memory, and of every other channel."""

    def strided(x):
        wide = torch.randn(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        return wide.movedim(-2, 1).contiguous().movedim(1, -2)[..., ::2]

    check(case, torch.float64, transform=lambda x: strided(x) if x.dim() > 3 else x, module=module)


@both
def test_on_expanded_inputs(module):
    case = Case((9, 8), (3, 4), num_additional=2)
    check(case, torch.float64, transform=lambda x: x[:, :1].expand(x.shape), module=module)


@st.composite
def problems(draw):
    rank = draw(st.integers(1, 3))
    space = tuple(draw(st.integers(1, (40, 12, 7)[rank - 1])) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, min(4, n))) for n in space)
    kernel = tuple(draw(st.integers(1, n // d)) for n, d in zip(space, dilation))
    kv_heads = draw(st.integers(1, 2))
    return Case(
        space,
        kernel,
        tuple(draw(st.integers(1, k)) for k in kernel),
        dilation,
        tuple(draw(st.booleans()) for _ in space),
        batch=draw(st.integers(0, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        dim=draw(st.integers(1, 9)),
        value_dim=draw(st.integers(1, 9)),
        num_additional=draw(st.sampled_from([0, 0, 1, 4])),
        rpb=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(problems(), st.booleans(), st.sampled_from([tiled, sdpa]))
def test_anywhere_in_the_parameter_space(case, grad_lse, module):
    torch.manual_seed(0)
    check(case, torch.float64, grad_lse, module=module)


@settings(max_examples=80, deadline=None)
@given(problems())
def test_unfused_anywhere_in_the_parameter_space(case):
    torch.manual_seed(0)
    case = case._replace(kv_heads=case.heads, value_dim=case.dim)
    q, k, *_ = case.inputs()
    attn = torch.randn(*q.shape[:-1], case.rule.window_tokens).double()
    bias = torch.randn(case.heads, *(2 * n - 1 for n in case.kernel_size)).double()
    calls = {
        "qk": (q, k, case.rule),
        "av": (attn, k, case.rule),
        "av_transposed": (attn, q, case.space, case.rule),
        "rpb_bias": (bias, case.space, case.space, case.rule),
        "rpb_bias_transposed": (torch.randn(*attn.shape[1:]).double(), case.space, case.rule),
    }
    for name, args in calls.items():
        expected, actual = (getattr(module, name)(*args) for module in (reference, tiled))
        assert_close(name, expected, actual, 1e-12)


@both
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (7, 3), (3, 70), (1, 1), (4, 0)])
def test_dense(causal, queries, keys, module):
    """Lengths may differ; a query with nothing to attend gets 0, LSE -inf and gradients of 0."""
    inputs = [torch.randn(2, n, 2, 3).double() for n in (queries, keys, keys)] + [None] * 3
    grads = torch.randn(2, queries, 2, 3).double(), torch.randn(2, queries, 2).double()
    expected, actual = (
        run(each, inputs, Dense(causal), 0.5, grads) for each in (reference, module)
    )
    assert_close("out", expected[0], actual[0], 1e-12)
    assert_close("lse", expected[1], actual[1], 1e-12)
    for name, a, b in zip(GRADS, expected[2], actual[2]):
        assert_close(f"gradient of {name}", a.nan_to_num() if a is not None else a, b, 2e-12)


@both
@pytest.mark.parametrize("case", CASES[5:8], ids=name_of)
def test_same_bits_on_every_run(case, module):
    case = case._replace(rpb=case.rpb and module is not sdpa)
    inputs = case.inputs(torch.float32)
    grad = torch.randn(*inputs[0].shape[:-1], case.value_dim)
    first = run(module, inputs, case.rule, 0.4, (grad, None))
    for _ in range(3):
        again = run(module, inputs, case.rule, 0.4, (grad, None))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        for a, b in zip(first[2], again[2]):
            assert a is b or torch.equal(a, b)


def test_memory_does_not_grow_with_the_square_of_the_tokens():
    """The square of 65536 tokens would be 17 GB; no tensor exceeds the inputs or a chunk."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    case = Case((65536,), (9,), batch=1, heads=1, kv_heads=1, dim=4, value_dim=4)
    inputs = case.inputs(torch.float32)
    with Watch():
        run(tiled, inputs, case.rule, 0.5, (torch.ones_like(inputs[0]), None))
    assert 0 < largest <= max(4 * grids.CHUNK * 2, inputs[0].nbytes)


# --- choice ---


def problem(dtype=torch.float32, operation="attention"):
    return backends.Problem(operation, torch.device("cpu"), dtype, 8, 8)


def test_windows_that_nothing_is_known_of_run_on_tiled():
    assert backends.choose("", problem()).name == "tiled"
    assert backends.choose("reference", problem()).name == "reference"
    assert backends.choose("triton", problem()).name == "tiled"  # it can not run here
    q = torch.zeros(1, 8, 1, 4)
    assert backends.choose_backend(q, q, q) == "tiled"
    assert backends.get_compatible_backends(q, q, q) == ["tiled", "sdpa", "reference"]


def test_what_is_asked_for_runs_even_if_it_is_slower():
    assert backends.choose("sdpa", problem()).name == "sdpa"
    assert "sdpa: runs" in backends.explain(torch.zeros(1, 64, 1, 8), kernel_size=3, backend="sdpa")
    assert "slower than tiled" in backends.explain(torch.zeros(1, 64, 64, 2, 128), kernel_size=1)


def test_plain_attention_of_long_sequences_runs_on_sdpa():
    q = torch.zeros(1, 512, 1, 32)
    assert backends.choose_fmha_backend(q, q, q) == "sdpa"
    assert backends.get_compatible_fmha_backends(q, q, q) == ["sdpa", "tiled", "reference"]


def test_falling_back_is_said_at_debug_level(caplog):
    tuning._forget_choices()
    with caplog.at_level("DEBUG", logger="natten"):
        backends.choose("triton", problem())
    assert "triton is passed over" in caplog.text


def test_a_choice_is_made_once(caplog):
    """Choices are also kept for unfused calls, of which no plan is kept."""
    tuning._forget_choices()
    q = torch.randn(1, 2, 9, 4)
    natten.na1d_qk(q, q, 3)
    with caplog.at_level("DEBUG", logger="natten"):
        natten.na1d_qk(q, q, 3)
    assert "passed over" not in caplog.text


@pytest.mark.parametrize("backend", [None, "sdpa", "tiled", "reference"])
def test_explain_names_the_backend_that_runs(backend):
    text = backends.explain(torch.zeros(1, 8, 1, 4), backend=backend)
    assert f"{backend or 'sdpa'}: runs" in text


def test_gluon_is_not_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hopper = next(each for each in backends.BACKENDS if each.name == "hopper")
    for device in ("cpu", "cuda"):
        problem = backends.Problem("attention", torch.device(device), torch.bfloat16, 64, 64)
        assert "interpret" in hopper.unsupported(problem)


def test_integers_have_no_backend():
    with pytest.raises(backends.ArgumentError, match="int64"):
        backends.choose("", problem(torch.int64))


def test_hypothesis_draws_are_varied():
    """A strategy that always draws the same problem would prove nothing."""
    random.seed(0)
    drawn = []
    settings(max_examples=60, deadline=None, database=None)(
        given(problems())(lambda case: drawn.append(case))
    )()
    assert {len(c.space) for c in drawn} == {1, 2, 3}
    assert any(c.rpb and any(c.is_causal) for c in drawn) and any(c.num_additional for c in drawn)


def test_explain_names_the_backend_of_the_backward(monkeypatch):
    """One backend may run the forward and another the backward of a call."""
    first, *others = backends.BACKENDS[-2:]
    monkeypatch.setattr(first, "operations", ("attention",))
    monkeypatch.setattr(backends, "BACKENDS", (first, *others))
    tuning._forget_choices()
    text = backends.explain(torch.zeros(1, 8, 1, 4))
    tuning._forget_choices()
    assert text.splitlines() == [
        f"tiled: runs forward, but has no {backends.OPERATIONS['gradient']}",
        "reference: runs backward",
    ]


# --- adding one ---


@pytest.fixture(scope="module")
def toy():
    """The backend that the documentation builds."""
    page = Path(__file__).parents[1] / "docs" / "adding-a-backend.md"
    code = re.search(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(code[1], str(page), "exec"), names)
    return names["Toy"]()


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.rpb and not c.num_additional], ids=name_of
)
def test_the_documented_backend_is_right(case, toy):
    check(case, torch.float64, module=toy)


def test_the_documented_backend_is_chosen(toy, monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", (toy, *backends.BACKENDS))
    tuning._forget_choices()
    q = torch.randn(1, 9, 2, 8)
    assert backends.explain(q, kernel_size=3).startswith("toy: runs\n")
    additional = torch.randn(1, 2, 2, 8)
    said = backends.explain(
        q, kernel_size=3, additional_keys=additional, additional_values=additional
    )
    assert said.startswith("toy: has no additional tokens\n")
    rpb = torch.randn(2, 5)
    assert "toy: has no relative" in backends.explain(q, kernel_size=3, rpb=rpb)
    assert "toy: has no kernels for" in backends.explain(q.half(), kernel_size=3)
    with pytest.warns(UserWarning, match="'toy' has no kernels for torch.float16"):
        natten.na1d(q.half(), q.half(), q.half(), 3, backend="toy")
    tuning._forget_choices()
