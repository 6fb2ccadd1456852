"""Queries that are a part of the layout, queries finer than keys, and the borders of windows."""

import math
from itertools import pairwise, product

import pytest
import torch
from helpers import Case, assert_close, dense_mask, masked_attention, name_of, sdpa, tiled
from helpers import reference as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import axes, cases, run
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck, gradgradcheck

import natten
from natten import ArgumentError, Neighborhood, fit_window, gather
from natten.backends import Problem, runner_of
from natten.inputs import Gradients, Inputs
from natten.neighborhood import query_range, window_mask
from natten.operators import composed_attention, gathered_gradient
from natten.tiling import query_groups
from natten.varlen import VarlenLayout

# --- the definition ---


def attended(
    length, queries, k, s=1, d=1, causal=False, boundary="shift", r=1, o=0
) -> list[list[int]]:
    """The keys that each query of an axis attends, straight from the definition."""
    rows = []
    for x in range(queries):
        p = (o + x) // r
        i, g = divmod(p, d)
        n = len(range(g, length, d))
        if causal:
            leader = min(i // s * s + s - 1, n - 1)
            positions = list(range(max(leader - k + 1, 0), i + 1))
        else:
            start = min(i // s * s + s // 2, n - 1) - k // 2
            if boundary == "shift":
                start = min(max(start, 0), n - k)
            positions = list(range(start, start + k))
            if boundary == "truncate":
                positions = [j for j in positions if 0 <= j < n]
            if boundary == "circular":
                positions = [j % n for j in positions]
        rows.append([j * d + g for j in positions])
    return rows


@pytest.mark.parametrize(
    ("options", "length", "queries", "expected"),
    [
        # queries 2 and 3 of five
        ({"kernel_size": 3, "query_offset": 2}, 5, 2, [[1, 2, 3], [2, 3, 4]]),
        ({"kernel_size": 3, "query_offset": 0}, 5, 1, [[0, 1, 2]]),
        ({"kernel_size": 3, "query_offset": 4}, 5, 1, [[2, 3, 4]]),
        # runs of stride 2 count from the layout's first query, not from the part's
        ({"kernel_size": 2, "stride": 2, "query_offset": 1}, 4, 2, [[0, 1], [2, 3]]),
        # tokens 1 and 2 are in groups 1 and 0
        ({"kernel_size": 2, "dilation": 2, "query_offset": 1}, 6, 2, [[1, 3], [0, 2]]),
        # two queries stand at each key; the part begins in the middle of a key
        ({"kernel_size": 1, "queries_per_key": 2}, 2, 4, [[0], [0], [1], [1]]),
        (
            {"kernel_size": 1, "queries_per_key": 3, "query_offset": 2},
            2, 3, [[0], [1], [1]],
        ),
        ({"kernel_size": 3, "boundary": "truncate"}, 4, 4, [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]),
        ({"kernel_size": 4, "boundary": "truncate"}, 2, 2, [[0, 1], [0, 1]]),
        # dilation 3 of two tokens: each is alone in its group
        ({"kernel_size": 3, "dilation": 3, "boundary": "truncate"}, 2, 2, [[0], [1]]),
        (
            {"kernel_size": 9, "is_causal": True, "boundary": "truncate"},
            3, 3, [[0], [0, 1], [0, 1, 2]],
        ),
        ({"kernel_size": 3, "boundary": "circular"}, 4, 4,
         [[3, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 0]]),
        ({"kernel_size": 2, "stride": 2, "boundary": "circular"}, 4, 4,
         [[0, 1], [0, 1], [2, 3], [2, 3]]),
        ({"kernel_size": 3, "stride": 2, "boundary": "circular"}, 4, 4,
         [[0, 1, 2], [0, 1, 2], [2, 3, 0], [2, 3, 0]]),
        ({"kernel_size": 2, "dilation": 2, "boundary": "circular"}, 4, 4,
         [[2, 0], [3, 1], [0, 2], [1, 3]]),
    ],
)  # fmt: skip
def test_by_hand(options, length, queries, expected):
    rule = Neighborhood.create(1, **options)
    rule.check((queries,), (length,))
    tokens, valid = (
        each((queries,), (length,)) for each in (rule.window_tokens_of, rule.attended_slots)
    )
    assert [row[seen].tolist() for row, seen in zip(tokens, valid)] == expected
    assert not (valid[:, 1:] & ~valid[:, :-1]).any()  # what is cut off comes last
    mask = window_mask(rule, (queries,), (length,))
    assert [row.nonzero().flatten().tolist() for row in mask] == [sorted(x) for x in expected]


@settings(max_examples=100, deadline=None)
@given(cases())
def test_definition_against_brute_force(case):
    rule = case.rule
    rule.check(case.queries, case.space)
    rows = [
        attended(
            case.space[a], case.queries[a], rule.kernel_size[a], rule.stride[a], rule.dilation[a],
            rule.is_causal[a], rule.boundary[a], rule.queries_per_key[a], rule.offset[a],
        )
        for a in range(rule.rank)
    ]  # fmt: skip
    strides = [math.prod(case.space[a + 1 :]) for a in range(rule.rank)]
    mask = torch.zeros(math.prod(case.queries), math.prod(case.space), dtype=torch.bool)
    windows = []
    for i, query in enumerate(product(*(range(n) for n in case.queries))):
        own = [rows[a][x] for a, x in enumerate(query)]
        tokens = [sum(map(math.prod, zip(key, strides))) for key in product(*own)]
        assert len(set(tokens)) == len(tokens)
        mask[i, tokens] = True
        windows.append(tokens)
    assert torch.equal(dense_mask(case), mask)
    found = rule.window_tokens_of(case.queries, case.space).flatten(0, -2)
    valid = rule.attended_slots(case.queries, case.space).flatten(0, -2)
    assert [row[seen].tolist() for row, seen in zip(found, valid)] == windows


@settings(max_examples=100, deadline=None)
@given(axes(), st.booleans())
def test_numbers_of_queries(axis, is_part):
    """The queries of a dilation group have the numbers that ``query_range`` says."""
    length, queries, (k, s, d, causal, boundary, r), offset = axis
    if not is_part:
        queries, offset = length * r, 0
    rule = Neighborhood.create(1, k, s, d, causal, boundary, r, offset)
    for group in range(min(d, length)):
        own = [y for y in range(length * r) if y // r % d == group]
        first, end = query_range(rule, 0, queries, group)
        assert own[first:end] == [y for y in own if offset <= y < offset + queries]
        assert [y // r // d for y in own] == [j // r for j in range(len(own))]
    groups = query_groups(rule, 0, queries, length)
    seen = {}
    for each in groups:
        for i in range(each.groups):
            tokens = range(each.group + i, queries, each.apart)
            assert len(tokens) == len(each.positions)
            assert each.n_keys == len(range(each.key_group + i, length, d))
            at = (each.positions * d + each.key_group + i).tolist()
            seen.update(zip(tokens, at))
    assert seen == {x: (offset + x) // r for x in range(queries)}


# --- backends ---


def inputs_and_grads(case):
    inputs = case.inputs()
    out = torch.randn(case.batch, *case.queries, case.heads, case.value_dim).double()
    return inputs, out, out[..., 0].sin()


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([tiled, sdpa]))
def test_backends_against_the_oracle(case, backend):
    torch.manual_seed(0)
    case = case._replace(rpb=case.rpb and backend is tiled)
    inputs, *grads = inputs_and_grads(case)
    runner = runner_of(backend, Problem.of("attention", inputs, case.rule))
    expected, found = (each.forward(inputs, case.rule, 0.4) for each in (oracle, runner))
    for name, a, b in zip(("out", "lse"), expected, found):
        assert_close(name, a, b, 1e-12)
    wanted = oracle.backward(*grads, inputs, *expected, case.rule, 0.4)
    actual = runner.backward(*grads, inputs, *found, case.rule, 0.4)
    for name, a, b in zip(Gradients._fields, wanted, actual):
        assert_close(name, a, b, 1e-12)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_maps_against_the_oracle(case):
    """The maps of ``tiled`` and the gathered ones; slots that are cut off hold NaN."""
    torch.manual_seed(0)
    case = case._replace(kv_heads=case.heads, value_dim=case.dim, rpb=True)
    (q, k, _, rpb, *_), rule = case.inputs(), case.rule
    valid = rule.attended_slots(case.queries, case.space)[..., None, :]
    attn = torch.randn(*q.shape[:-1], rule.window_tokens).double()
    layouts = case.queries, case.space
    calls = {
        "qk": (q, k),
        "av": (attn, k),
        "av_transposed": (attn, q, case.space),
        "rpb_bias": (rpb, *layouts),
        "rpb_bias_transposed": (attn.sum(0), case.space),
    }
    runner = runner_of(tiled, Problem("unfused", q.device, q.dtype, rule=rule))
    for name, args in calls.items():
        expected = getattr(oracle, name)(*args, rule)
        a, *others = args
        if name != "qk" and a is not rpb:
            a = a.masked_fill(~valid, math.nan)
        assert_close(name, expected, getattr(runner, name)(a, *others, rule), 1e-12)
        heads = 0 if "rpb" in name else 1
        first = [
            x.movedim(-2, heads) if isinstance(x, torch.Tensor) and x is not rpb else x
            for x in (a, *others)
        ]
        found = getattr(gather, name)(*first, rule)
        expected = expected if name == "rpb_bias_transposed" else expected.movedim(-2, heads)
        assert_close(f"gathered {name}", expected, found, 1e-12)


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_composed_and_gathered(case, gathered):
    torch.manual_seed(0)
    inputs, *grads = inputs_and_grads(case)
    expected = oracle.forward(inputs, case.rule, 0.4)
    for a, b in zip(expected, composed_attention(inputs, case.rule, 0.4, gathered=gathered)):
        assert_close("composed", a, b, 1e-12)
    if gathered:
        wanted = oracle.backward(*grads, inputs, *expected, case.rule, 0.4)
        found = gathered_gradient(*grads, inputs, case.rule, 0.4)
        for name, a, b in zip(Gradients._fields, wanted, found):
            assert_close(name, a, b, 1e-12)


# --- identities ---

SELF = [
    Case((17,), (5,), dilation=2, rpb=True),
    Case((12, 9), (4, 3), stride=(3, 1), dilation=(1, 2), heads=4, num_additional=2),
    Case((6, 5, 7), (3, 2, 3), is_causal=(True, False, False), stride=(2, 1, 1)),
]


backends = pytest.mark.parametrize("backend", [None, "tiled", "reference"])


@backends
@pytest.mark.parametrize("boundary", ["shift", "truncate"])
@pytest.mark.parametrize("case", SELF, ids=name_of)
def test_parts_together_are_the_whole(case, boundary, backend):
    case = case._replace(boundary=boundary)
    inputs = Inputs(*(None if x is None else x.requires_grad_() for x in case.inputs()))
    out, lse = run(case, inputs, backend)
    for a, b in zip((out, lse), run(case, inputs, backend, query_offset=0)):
        assert torch.equal(a, b)
    cuts = [(0, 1, n // 2, n) for n in case.space]
    outs, lses = torch.zeros_like(out), torch.zeros_like(lse)
    for edges in product(*(pairwise(cut) for cut in cuts)):
        part = (slice(None), *(slice(a, b) for a, b in edges))
        offset = tuple(a for a, _ in edges)
        own = inputs._replace(query=inputs.query[part])
        outs[part], lses[part] = run(case, own, backend, query_offset=offset)
    assert_close("out", out, outs, 1e-12)
    assert_close("lse", lse, lses, 1e-12)
    given = [x for x in inputs if x is not None]
    grads = torch.randn_like(out), torch.randn_like(lse)
    whole = torch.autograd.grad((out, lse), given, grads)
    for a, b in zip(whole, torch.autograd.grad((outs, lses), given, grads)):
        assert_close("gradient", a, b, 1e-12)


@backends
def test_a_part_needs_the_keys_of_its_windows_only(backend):
    """Keys may be a part, too, that begins at a multiple of stride times dilation."""
    case = Case((40,), (5,), stride=2, dilation=2)
    inputs = case.inputs()
    out, lse = run(case, inputs, backend)
    keys, queries = slice(8, 36), slice(17, 23)
    q, k, v, *_ = inputs
    own = Inputs(q[:, queries], k[:, keys], v[:, keys])
    for a, b in zip((out, lse), run(case, own, backend, query_offset=17 - 8)):
        assert_close("part", a[:, queries], b, 1e-12)


@backends
def test_circular_axes_roll(backend):
    case = Case((12, 8), (3, 5), stride=(2, 1), dilation=(3, 1), boundary="circular", rpb=True)
    inputs = case.inputs()
    out, lse = run(case, inputs, backend)
    shifts, dims = (6, -3), (1, 2)
    rolled = [x.roll(shifts, dims) for x in inputs[:3]]
    for a, b in zip((out, lse), run(case, Inputs(*rolled, inputs.rpb), backend)):
        assert_close("rolled", a.roll(shifts, dims), b, 1e-12)


@backends
def test_truncated_windows_are_a_banded_mask(backend):
    case = Case((20,), (7,), boundary="truncate", dim=8)
    q, k, v, *_ = inputs = case.inputs()
    apart = torch.arange(20)[None] - torch.arange(20)[:, None]
    expected = masked_attention(q, k, v, apart.abs() <= 3, 8**-0.5)
    assert_close("out", expected, run(case, inputs, backend)[0], 1e-12)


@backends
def test_finer_queries_are_repeated_keys_with_dilation(backend):
    case = Case((6, 5), (3, 2), dilation=(2, 1), queries_per_key=(2, 3), rpb=True)
    inputs = case.inputs()
    many = [x.repeat_interleave(2, 1).repeat_interleave(3, 2) for x in inputs[1:3]]
    wide = Case((12, 15), (3, 2), dilation=(4, 3))
    expected = run(wide, Inputs(inputs.query, *many, inputs.rpb), backend)
    for a, b in zip(expected, run(case, inputs, backend)):
        assert_close("fine", a, b, 1e-12)


@backends
def test_streaming_is_all_at_once(backend):
    """Frames come one by one, and a cache holds those that later windows reach."""
    case = Case(
        (9, 5, 4), (4, 3, 3), is_causal=(True, False, False),
        boundary=("truncate", "shift", "shift"),
    )  # fmt: skip
    q, k, v, *_ = inputs = case.inputs()
    out, _ = run(case, inputs, backend)
    for t in range(9):
        first = max(0, t - 3)
        frames = slice(first, t + 1)
        own = Inputs(q[:, t : t + 1], k[:, frames], v[:, frames])
        now, _ = run(case, own, backend, query_offset=(t - first, 0, 0))
        assert_close(f"frame {t}", out[:, t : t + 1], now, 1e-12)


# --- derivatives, transforms, compilers ---

MIXED = Case(
    (6, 4), (3, 2), stride=(1, 2), dilation=(2, 1), batch=1, heads=2, kv_heads=1, dim=2,
    value_dim=3, num_additional=1, rpb=True, boundary=("truncate", "circular"),
    queries_per_key=(2, 1), query_offset=(3, 1), query_space=(5, 2),
)  # fmt: skip
PART = Case((7,), (3,), batch=1, dim=2, value_dim=2, query_offset=(2,), query_space=(3,))


def leaves(case):
    return [None if x is None else x.requires_grad_() for x in case.inputs().differentiable]


@pytest.mark.parametrize("case", [MIXED, PART], ids=["mixed", "part"])
@pytest.mark.no_cover
def test_gradients(case):
    def function(*tensors):
        return run(case, Inputs(*tensors))

    assert gradcheck(function, leaves(case), check_forward_ad=True)
    assert gradgradcheck(function, leaves(case), check_fwd_over_rev=True, fast_mode=True)


def unfused(case, q, k, v, rpb):
    rule = case.rule
    options = {
        "kernel_size": rule.kernel_size, "stride": rule.stride, "dilation": rule.dilation,
        "is_causal": rule.is_causal, "boundary": rule.boundary,
        "queries_per_key": rule.queries_per_key, "query_offset": rule.query_offset,
    }  # fmt: skip
    names = f"na{rule.rank}d_qk", f"na{rule.rank}d_av"
    qk, av = (getattr(natten, name) for name in names)
    return av(qk(q, k, rpb=rpb, **options).softmax(-1), v, **options)


@pytest.mark.no_cover
def test_unfused_gradients():
    case = MIXED._replace(kv_heads=2, num_additional=0)
    q, k, v, rpb, *_ = case.inputs()
    given = [*(x.movedim(-2, 1).detach().requires_grad_() for x in (q, k, v)), rpb.requires_grad_()]
    out = unfused(case, *given).movedim(1, -2)
    scaled = Inputs(q, k, v, rpb)
    assert_close("out", run(case, scaled, scale=1.0)[0], out, 1e-12)
    assert gradcheck(lambda *x: unfused(case, *x), given, check_forward_ad=True)
    assert gradgradcheck(lambda *x: unfused(case, *x), given, fast_mode=True)


def test_vmap():
    inputs = [torch.stack([x, x.sin()]) for x in MIXED.inputs().differentiable]
    found = torch.func.vmap(lambda *x: run(MIXED, Inputs(*x)))(*inputs)
    for i in range(2):
        for a, b in zip(run(MIXED, Inputs(*(x[i] for x in inputs))), found):
            assert_close("mapped", a, b[i], 1e-12)


@pytest.mark.parametrize("case", [MIXED, PART], ids=["mixed", "part"])
def test_compiled(case):
    given = leaves(case)
    compiled = torch.compile(lambda *x: run(case, Inputs(*x)), fullgraph=True, backend="aot_eager")
    grads = [torch.randn_like(x) for x in run(case, Inputs(*given))]
    present = [x for x in given if x is not None]
    expected, found = (
        torch.autograd.grad(function(*given), present, grads)
        for function in (lambda *x: run(case, Inputs(*x)), compiled)
    )
    for a, b in zip(expected, found):
        assert_close("gradient", a, b, 1e-12)


def test_a_new_offset_compiles_no_graph():
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(q, k, v, offset):
        return natten.na1d(q, k, v, 5, is_causal=True, query_offset=offset, boundary="truncate")

    q, k, v = (torch.randn(1, 40, 2, 4) for _ in range(3))
    whole = natten.na1d(q, k, v, 5, is_causal=True, boundary="truncate")
    for offset, queries, keys in ((3, 6, 20), (5, 7, 31), (9, 5, 40), (30, 3, 33)):
        part = slice(offset, offset + queries)
        found = step(q[:, part].clone(), k[:, :keys].clone(), v[:, :keys].clone(), offset)
        assert_close("part", whole[:, part], found, 1e-5)
    assert counter.frame_count == 1


def test_exported_for_every_length():
    class Step(torch.nn.Module):
        def forward(self, q, k, v):
            offset = k.shape[1] - q.shape[1]
            options = {"is_causal": True, "boundary": "truncate"}
            return natten.na1d(q, k, v, 5, query_offset=offset, **options)

    q, k, v = (torch.randn(1, 40, 2, 4) for _ in range(3))
    keys = {1: torch.export.Dim("keys", min=4, max=64)}
    queries = {1: torch.export.Dim("queries", min=2, max=64)}
    step = torch.export.export(
        Step(), (q[:, 8:12], k[:, :12], v[:, :12]), dynamic_shapes=(queries, keys, keys)
    )
    whole = natten.na1d(q, k, v, 5, is_causal=True, boundary="truncate")
    for program in (step, step.run_decompositions(natten.export.decompositions())):
        for a, b in ((3, 7), (20, 40)):
            found = program.module()(q[:, a:b], k[:, :b], v[:, :b])
            assert_close("part", whole[:, a:b], found, 1e-5)


def test_a_new_offset_is_a_kept_call(monkeypatch):
    """What a call checks is checked once; a new offset only has to fit the layout."""
    q, k, v = (torch.randn(1, n, 2, 4) for n in (3, 9, 9))
    whole = natten.na1d(torch.cat([q, q, q], 1), k, v, 3)
    for offset in (0, (0,), [6], torch.tensor([6])):
        natten.na1d(q, k, v, 3, query_offset=offset)
    monkeypatch.setattr(natten.functional, "check_call_of", None)
    for offset in (6, 0, (3,), [6]):
        (start,) = offset if isinstance(offset, (tuple, list)) else (offset,)
        found = natten.na1d(q, k, v, 3, query_offset=offset)
        assert_close("part", whole[:, start : start + 3], found, 1e-5)
    for offset, message in ((7, "7 \\+ 3 > 1 \\* 9"), (-1, "at least 0"), ((1, 1), "1 of them")):
        with pytest.raises(ArgumentError, match=message):
            natten.na1d(q, k, v, 3, query_offset=offset)


def test_another_length_or_part_is_a_kept_call(monkeypatch):
    """Only what depends on token layouts is checked again, all of it."""
    q, k, v = (torch.randn(1, n, 2, 4) for n in (40, 40, 40))
    options = {"stride": 2, "boundary": "shift"}

    def step(offset, queries, keys, values=None, **more):
        own = q[:, offset : offset + queries], k[:, :keys], v[:, : values or keys]
        return natten.na1d(*own, 5, query_offset=offset, **(options | more))

    step(0, 3, 12)
    step(0, 3, 12, boundary="circular")
    monkeypatch.setattr(natten.functional, "check_call_of", None)
    for offset, queries, keys in ((0, 3, 12), (2, 3, 12), (2, 7, 12), (2, 7, 40), (39, 1, 40)):
        given = q[:, offset : offset + queries], k[:, :keys], v[:, :keys]
        rule = Neighborhood.create(1, 5, **options, query_offset=offset)
        mask = window_mask(rule, (queries,), (keys,))
        expected = masked_attention(*given, mask, 0.5)
        for _ in range(2):
            assert_close("part", expected, step(offset, queries, keys), 1e-5)
    for problem, message in (
        ((10, 3, 12), "10 \\+ 3 > 1 \\* 12"),
        ((0, 3, 4), "5 \\* 1 > 4"),
        ((0, 3, 12, 13), "`value` must have the token layout"),
        ((10, 3, 12), "10 \\+ 3 > 1 \\* 12"),
    ):
        with pytest.raises(ArgumentError, match=message):
            step(*problem)
    with pytest.raises(ArgumentError, match="2 \\* 1 does not divide 13"):
        step(0, 3, 13, boundary="circular")


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_a_ring_may_grow_beyond_its_window(backend):
    """Whether a window fills its ring is asked of every length of keys."""
    q, k, v = (torch.randn(1, n, 2, 4) for n in (3, 20, 20))
    options = {"boundary": "circular", "query_offset": 2}
    rule = Neighborhood.create(1, 9, **options)
    for keys in (9, 10, 9, 20, 9):
        own = k[:, :keys], v[:, :keys]
        expected = masked_attention(q, *own, window_mask(rule, (3,), (keys,)), 0.5)
        found = natten.na1d(q, *own, 9, **options, backend=backend, scale=0.5)
        assert_close("ring", expected, found, 1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_rings_that_windows_fill(compiled):
    """Without a bias the circle makes no difference, and keys need not be padded."""
    case = Case((6, 8), (3, 4), dilation=2, boundary="circular")
    inputs = case.inputs()
    attend = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    for a, b in zip(run(case, inputs, boundary="shift"), attend(case, inputs)):
        assert torch.equal(a, b)
    rpb = torch.randn(2, 5, 7).double()
    found, expected = (attend(case, inputs, backend=name, rpb=rpb) for name in (None, "reference"))
    for a, b in zip(expected, found):
        assert_close("biased", a, b, 1e-12)


# --- packed documents, layers, windows that fit ---


@pytest.mark.parametrize("boundary", ["truncate", "circular", ("truncate", "shift")])
def test_documents(boundary):
    layout = VarlenLayout([(4, 6), (9, 3), (0, 5), (2, 2)])
    q, k, v = (torch.randn(layout.total_tokens, 2, 4).double() for _ in range(3))
    found = natten.na2d_varlen(q, k, v, layout, (5, 3), dilation=(1, 2), boundary=boundary)
    options = {"boundary": boundary}
    for out, *qkv in zip(*(layout.unpack(x) for x in (found, q, k, v))):
        if out.numel():
            window, stride, dilation = fit_window(out.shape[:2], (5, 3), 1, (1, 2), **options)
            own = (x[None] for x in qkv)
            expected = natten.na2d(*own, window, stride, dilation, **options)
            assert_close("document", expected[0], out, 1e-12)


def test_layers_take_a_boundary():
    layer = natten.NeighborhoodAttention2D(8, 2, 7, boundary=("truncate", "circular")).double()
    plain = natten.NeighborhoodAttention2D(8, 2, 7).double()
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert "boundary=('truncate', 'circular')" in repr(layer) and "boundary" not in repr(plain)
    x = torch.randn(1, 5, 9, 8).double()  # the first axis is shorter than the window
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    out = natten.na2d(q, k, v, 7, boundary=layer.boundary)
    assert_close("layer", layer.proj(out.flatten(-2)), layer(x), 1e-12)
    layer.attn_drop.p = 1e-9
    assert_close("with dropout", layer.eval()(x), layer.train()(x), 1e-6)


def test_layers_keep_the_window_or_the_dilation():
    x = torch.randn(1, 5, 9, 8)
    options = {"dilation": 4, "oversize": "clamp", "rel_pos_bias": True}
    for keep, window, dilation in (("window", (5, 7), 1), ("dilation", (1, 2), 4)):
        layer = natten.NeighborhoodAttention2D(8, 2, 7, keep=keep, **options)
        fitted = natten.NeighborhoodAttention2D(8, 2, window, dilation=dilation, rel_pos_bias=True)
        weights = layer.state_dict()
        weights["rpb"] = natten.neighborhood.crop_rpb(weights["rpb"], (7, 7), window)
        fitted.load_state_dict(weights)
        assert_close(keep, fitted(x), layer(x), 1e-5)


def test_fitted_windows():
    assert fit_window((5, 9), 7, dilation=4) == ((1, 2), (1, 1), (4, 4))
    assert fit_window((5, 9), 7, dilation=4, keep="window") == ((5, 7), (1, 1), (1, 1))
    assert fit_window((20,), 7, 4, 4, keep="window") == ((7,), (4,), (2,))
    assert fit_window((5,), 9, 8, 7, boundary="truncate") == ((9,), (8,), (7,))
    assert fit_window((12,), 7, 4, 5, boundary="circular") == ((3,), (3,), (4,))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 8),
    st.sampled_from(("window", "dilation")), st.sampled_from(("shift", "truncate", "circular")),
)  # fmt: skip
def test_what_is_fitted_fits(length, k, s, d, keep, boundary):
    window, stride, dilation = fit_window((length,), k, min(s, k), d, keep=keep, boundary=boundary)
    rule = Neighborhood.create(1, window, stride, dilation, boundary=boundary)
    rule.check((length,), (length,))
    assert window[0] <= k and dilation[0] <= d and stride[0] <= s
    if keep == "window" and boundary == "shift":
        assert window[0] == min(k, length)


# --- errors ---


def call(shape=(1, 8, 2, 4), keys=(1, 8, 2, 4), **options):
    key = torch.zeros(keys)
    return natten.na1d(torch.zeros(shape), key, key, **({"kernel_size": 3} | options))


SHORT = (1, 4, 2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": SHORT}, "`query_offset` is for queries that are a part of the layout"),
        ({"shape": SHORT, "query_offset": 5}, "`query_offset` plus .* 5 \\+ 4 > 1 \\* 8"),
        ({"shape": SHORT, "query_offset": -1}, "`query_offset` must be at least 0"),
        ({"shape": SHORT, "query_offset": 1.5}, "`query_offset`; expected an integer"),
        ({"shape": SHORT, "query_offset": (1, 2)}, "`query_offset`; expected an integer or 1 of"),
        ({"queries_per_key": 2}, "8 is not 2 \\* 8"),
        ({"queries_per_key": 0}, "`queries_per_key` must be at least 1"),
        ({"queries_per_key": "2"}, "`queries_per_key`; expected an integer"),
        ({"boundary": "wrap"}, "`boundary` must be one of .*'circular'.*'wrap'"),
        ({"boundary": 1}, "`boundary`; expected a string"),
        ({"boundary": "circular", "is_causal": True}, "`boundary` must not be circular on an axis"),
        ({"boundary": "circular", "stride": 3}, "3 \\* 1 does not divide 8"),
        ({"boundary": "circular", "dilation": 3, "kernel_size": 2}, "1 \\* 3 does not divide 8"),
        ({"boundary": "circular", "kernel_size": 9}, "9 \\* 1 > 8"),
        ({"kernel_size": 9}, 'boundary="truncate"` cuts it'),
        ({"boundary": "truncate", "stride": 4}, "`stride` must be at least 1 and at most"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ArgumentError, match=message):
        call(**options)


def test_errors_of_fit_window_and_layers():
    with pytest.raises(ArgumentError, match='`keep` must be "dilation" or "window", got \'both\''):
        fit_window((5,), 3, keep="both")
    with pytest.raises(ArgumentError, match="`keep` must be"):
        natten.NeighborhoodAttention1D(8, 2, 3, keep="stride")
    with pytest.raises(ArgumentError, match="`boundary` must be one of"):
        natten.NeighborhoodAttention1D(8, 2, 3, boundary="same")
