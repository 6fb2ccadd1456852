"""The sdpa backend beyond the tests of every backend: ways to cut, choice, exactness."""

import math
import random

import pytest
import torch
from helpers import CASES, RATIO, Case, assert_close, name_of, reference, sdpa

import natten
from natten import backends, caches, tiling, tuning
from natten.backends import Problem
from natten.backends.sdpa import costs, fused, views
from natten.inputs import Inputs, compute_dtype
from natten.neighborhood import Dense, Neighborhood

NEAR = [
    Case((40,), (37,), batch=1, heads=4, dim=12, value_dim=5, num_additional=3),
    Case((41,), (18,), dilation=2, heads=4, kv_heads=2),
    Case((33,), (33,), is_causal=True, dim=4),
    Case((21,), (20,), is_causal=True, num_additional=2),
    Case((9, 11), (8, 10), batch=1, value_dim=12),
    Case((12, 7), (11, 7), stride=(5, 1)),
    Case((12, 10), (6, 5), dilation=2, is_causal=(True, False), num_additional=1),
    Case((5, 6, 7), (5, 5, 6)),
    # With one head, the batch may be the kernel's heads.
    Case((6,), (6,), batch=3, heads=1, kv_heads=1, value_dim=3),
    Case((4, 5), (3, 5), batch=3, heads=1, kv_heads=1),
    Case((40,), (37,), batch=2, heads=1, kv_heads=1, is_causal=True, dim=5),
]


@pytest.fixture
def fresh():
    """Drop all kept plans before and after a test that changes how plans are made."""
    caches.STORE.forget(lambda key: True)
    yield
    caches.STORE.forget(lambda key: True)


def run(module, inputs, rule, grads):
    out, lse = module.forward(Inputs(*inputs), rule, 0.4)
    found = module.backward(*grads, Inputs(*inputs), out, lse, rule, 0.4)
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    return {"out": out, "lse": lse} | dict(zip(names, found))


def check(case, dtype=torch.float64, grad_lse=True):
    inputs = case.inputs(dtype)
    grad = torch.randn(*inputs[0].shape[:-1], case.value_dim, dtype=dtype)
    exponents = torch.randn(grad.shape[:-1], dtype=compute_dtype(dtype)) if grad_lse else None
    *oracle, a, b = (None if x is None else x.double() for x in (*inputs, grad, exponents))
    expected = run(reference, oracle, case.rule, (a, b))
    actual = run(sdpa, inputs, case.rule, (grad, exponents))
    for name, x in expected.items():
        ratio = RATIO[compute_dtype(dtype) if name == "lse" else dtype]
        assert_close(name, x, actual[name], ratio if name in ("out", "lse") else 2 * ratio)


@pytest.mark.parametrize("grad_lse", [False, True])
@pytest.mark.parametrize("dtype", RATIO, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", NEAR, ids=name_of)
def test_windows_that_are_nearly_the_layout(case, dtype, grad_lse):
    check(case, dtype, grad_lse)


@pytest.mark.parametrize("case", [*NEAR, *(c for c in CASES[:-1] if not c.rpb)], ids=name_of)
def test_every_way_to_cut_is_right(case, monkeypatch, fresh):
    """The choice of tiles is a guess about machines, and must not change the result."""
    options, rng = costs._options, random.Random(0)
    monkeypatch.setattr(
        costs, "_options", lambda *args: [[rng.choice(axis)] for axis in options(*args)]
    )
    for copied in (1, views.COPIED, 1, views.COPIED):
        monkeypatch.setattr(views, "COPIED", copied)
        caches.STORE.forget(lambda key: True)
        check(case)


def grids(shape, kernel_size, **rule):
    rule = Neighborhood.create(len(shape), kernel_size, **rule)
    return costs.plan_for(rule, shape, shape, 4, 64, False, False, False, 1).grids


def test_a_full_window_needs_no_mask():
    (grid,) = grids((24, 24), 24)
    assert grid.full and grid.query_sizes == grid.key_sizes == (24, 24)
    (grid,) = grids((900,), 900, is_causal=True)
    assert grid.triangular


def test_the_ends_of_nearly_full_windows_need_no_mask():
    """On each axis, 2 * 30 queries share the windows at the ends."""
    found = grids((64, 64), 60)
    queries = [math.prod(run.repeats * run.query_size for run in grid.runs) for grid in found]
    assert sum(queries) == 64 * 64
    assert sum(n for n, grid in zip(queries, found) if grid.full) == 60 * 60


@pytest.mark.parametrize(("batch", "heads"), [(1, 3), (3, 1), (1, 1)])
def test_the_ends_are_one_call_on_views(batch, heads, monkeypatch, fresh):
    """The kernel's matrices are two tiles times the batch, or two tiles times the heads."""
    options = costs._options
    monkeypatch.setattr(costs, "_options", lambda *args: [[axis[-2]] for axis in options(*args)])
    query = torch.randn(batch, 400, heads, 16)
    inputs = Inputs(query, query, query)
    ends, between = fused._tile_views(Neighborhood.create(1, 391), 1.0, inputs, False)
    assert [each.chunks for each in (ends, between)] == [[None], [None]]
    for x in (*ends.load_all(inputs, 0), *between.load_all(inputs, 0)):
        assert x.untyped_storage().data_ptr() == query.untyped_storage().data_ptr()
    assert ends.load(query, 0).shape == (2, batch * heads, 196, 16)


@pytest.mark.parametrize(
    ("shape", "kernel_size", "causal"),
    [((128, 128), 100, False), ((30000,), 29000, False), ((20, 24, 24), 18, (True, False, False))],
)
def test_masks_are_small(shape, kernel_size, causal):
    """A mask of all pairs would be 1 GB, 3.6 GB and 0.5 GB; one tile's is at most 16 MB."""
    for grid in grids(shape, kernel_size, is_causal=causal):
        pairs = 1
        for run in grid.runs:
            pairs *= run.query_size * run.key_size
        assert grid.full or 4 * pairs <= 4 * costs.MASK == 16 << 20


def problem(shape, rule, operation="attention", **others):
    size = (1, *shape, 4, 64)
    cpu = torch.device("cpu")
    return Problem(operation, cpu, torch.float32, 64, 64, size, rule, 0.125, **others)


@pytest.mark.parametrize("operation", ["attention", "gradient"])
def test_choice(operation):
    """All but the gradient of small windows on AVX2, which is faster on tiled."""
    whole, small = (Neighborhood.create(2, k) for k in (32, 3))
    avx2 = (costs.FORWARD, costs.BACKWARD) == costs.AVX2
    faster = "tiled" if avx2 and operation == "gradient" else "sdpa"
    assert backends.choose("", problem((32, 32), whole, operation)).name == "sdpa"
    assert backends.choose("", problem((32, 32), small, operation)).name == faster
    for causal in (False, True):
        dense = problem((512,), Dense(causal), operation, key_shape=(700,))
        assert backends.choose("", dense).name == "sdpa"


def test_a_backward_that_leaves_threads_idle(monkeypatch):
    """PyTorch's backward splits matrices among threads, but not the queries of one matrix."""
    one = problem((32, 32), Neighborhood.create(2, 32), "gradient")._replace(
        shape=(1, 32, 32, 1, 64)
    )
    found = []
    for threads in (1, 32):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        tuning._forget_choices()
        both = one._replace(operation="attention"), one
        found.append([backends.choose("", each).name for each in both])
    tuning._forget_choices()
    assert found == [["sdpa", "sdpa"], ["sdpa", "tiled"]]


def test_what_it_can_not_run():
    (backend,) = (each for each in backends.BACKENDS if each.name == "sdpa")
    rule = Neighborhood.create(1, 16, is_causal=True)
    question = problem((16,), rule)
    assert backend.unsupported(question) is None
    assert "positive scale" in backend.unsupported(question._replace(scale=0.0))
    assert "bias" in backend.unsupported(question._replace(bias=True))
    elsewhere = question._replace(device=torch.device("mps"))
    assert backend.unsupported(elsewhere) == "runs on CPUs and GPUs, not on mps"


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("causal", [False, True])
def test_scales_that_are_not_positive(scale, causal):
    """They are refused, because PyTorch's causal kernel multiplies -inf by the scale."""
    q, k, v = (torch.randn(1, 12, 2, 8).double() for _ in range(3))
    out = natten.na1d(q, k, v, 12, is_causal=causal, scale=scale, backend="sdpa")
    expected = natten.na1d(q, k, v, 12, is_causal=causal, scale=scale, backend="reference")
    assert_close("out", expected, out, 1e-12)


def test_large_scores_do_not_overflow():
    case = Case((40,), (37,), dim=4)
    inputs = [None if x is None else 100 * x for x in case.inputs(torch.float32)]
    oracle = [None if x is None else x.double() for x in inputs]
    expected = reference.forward(Inputs(*oracle), case.rule, 0.4)
    out, lse = sdpa.forward(Inputs(*inputs), case.rule, 0.4)
    assert lse.abs().max() > 1e3
    assert_close("lse", expected[1], lse, 1e-5)
    # float32 scores near 10^4 are exact to 10^-3, and weights inherit this error.
    assert_close("out", expected[0], out, 2e-3)


@pytest.mark.parametrize("mean", [0, 1, 10, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_gradients_where_values_have_a_common_mean(mean, dtype):
    """The rounded output is not read, so the error is at most twice the math path's."""
    q, k, v, grad = (torch.randn(1, 96, 2, 32) for _ in range(4))
    inputs = [x.to(dtype) for x in (q, k, v + mean)]
    grad = grad.to(dtype)

    def gradients(call, tensors, last):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        return torch.autograd.grad(call(*leaves), leaves, last)

    def ours(*tensors):
        return natten.na1d(*tensors, 91, backend="sdpa")

    def math_path(*tensors):
        inside = natten.neighborhood.window_mask(Neighborhood.create(1, 91), (96,), (96,))
        mask = torch.zeros(96, 96, dtype=tensors[0].dtype).masked_fill_(~inside, -torch.inf)
        first = [x.transpose(1, 2) for x in tensors]
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(*first, attn_mask=mask)
        return out.transpose(1, 2)

    def error(actual, expected):
        return ((actual.double() - expected).norm() / expected.norm()).item()

    exact = gradients(math_path, [x.double() for x in inputs], grad.double())
    theirs = gradients(math_path, inputs, grad)
    for name, a, b, x in zip("qkv", gradients(ours, inputs, grad), theirs, exact):
        assert error(a, x) <= 2 * error(b, x) + 1e-4, (name, error(a, x), error(b, x))


@pytest.mark.parametrize("case", [Case((24,), (24,)), NEAR[0], NEAR[4]], ids=name_of)
def test_outputs_are_no_views(case):
    """A Function with forward mode must not return views."""
    rule, inputs = case.rule, case.inputs()
    assert not any(x._is_view() for x in sdpa.forward(Inputs(*inputs), rule, 0.4))
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.randn_like(q))
        out = natten.neighborhood_attention_generic(dual, k, v, *rule_arguments(rule))
        assert torch.autograd.forward_ad.unpack_dual(out).tangent.isfinite().all()


def rule_arguments(rule):
    return rule.kernel_size, rule.stride, rule.dilation, rule.is_causal


def test_tokens_that_are_shown_many_times():
    """Expanded tokens have strides of zero, which a matrix product does not take."""
    x = torch.randn(1, 1, 1, 8).expand(2, 30, 2, 8)
    rule = Neighborhood.create(1, 28)
    inputs = (x, x, x, None, None, None)
    expected, actual = (module.forward(Inputs(*inputs), rule, 0.3) for module in (reference, sdpa))
    assert_close("out", expected[0], actual[0], 1e-5)
    assert_close("lse", expected[1], actual[1], 1e-5)


def test_tiles_are_cut_where_windows_change():
    rule = Neighborhood.create(1, 60)
    ends = tiling.window_runs(rule, 0, 64, 64, between=False)
    assert [(r.query_size, r.repeats, r.full) for r in ends] == [(30, 2, True), (4, 1, False)]
    assert (ends[0].step, ends[0].key_step) == (34, 4)
    each = tiling.window_runs(rule, 0, 64, 64, between=True)
    assert [(r.query_size, r.repeats, r.full) for r in each] == [
        (31, 1, True), (1, 3, True), (30, 1, True),
    ]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
def test_plain_attention_has_the_same_bits_on_every_run(causal):
    """Also with several threads, whose order changes from run to run."""
    q, k, v = (torch.randn(2, n, h, 32) for n, h in ((150, 4), (170, 2), (170, 2)))
    grads, rule = (torch.randn_like(q), torch.randn(q.shape[:-1])), Dense(causal)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, *others = (run(sdpa, (q, k, v), rule, grads) for _ in range(8))
    finally:
        torch.set_num_threads(threads)
    for name, x in first.items():
        assert x is None or all(torch.equal(x, other[name]) for other in others), name
