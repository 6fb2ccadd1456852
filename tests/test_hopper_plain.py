"""Plain attention by the Hopper kernels, and what else runs as such: choices and plans on the CPU,
results on a GPU.

What the kernels see of queries and keys is in interpreter/test_hopper_parts.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any

import pytest
import torch
from helpers import hopper, reference
from hopper_problems import FLAT, PLAIN, id_of
from masked import check_masks

pytest.importorskip("triton", "3.6")  # the first with Gluon for Hopper

from natten import tuning
from natten.backends import Problem
from natten.backends.hopper import costs, ds_plan
from natten.backends.hopper import plan as planning
from natten.backends.hopper import tiles as tiling
from natten.backends.hopper.flat import flattened
from natten.backends.interface import KINDS
from natten.backends.triton.launch import Launch
from natten.inputs import Inputs
from natten.neighborhood import Dense, Neighborhood


def plan_of(
    length: int, key_length: int, causal: bool, batch: int = 1, heads: int = 4, kv_heads: int = 4,
    dim: int = 64,
) -> planning.Plan:  # fmt: skip
    """The plan of a problem on tensors without data."""
    q, k = (
        torch.empty(batch, n, h, dim, dtype=torch.bfloat16, device="meta")
        for n, h in ((length, heads), (key_length, kv_heads))
    )
    return planning.plan_for(q, k, k, None, Dense(causal), 1.0)


def test_it_runs_plain_attention() -> None:
    problem = Problem(
        "attention", torch.device("cpu"), torch.bfloat16, 64, 64, (1, 100, 2, 64), Dense(), 0.1,
        key_shape=(70,),
    )  # fmt: skip
    assert hopper.lacks(problem) is None
    assert hopper.lacks(problem._replace(operation="gradient")) is None
    assert "31 bits" in str(hopper.lacks(problem._replace(shape=(1, 2**29, 4, 64))))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_where_they_have_to_be(kind: str) -> None:
    def mask(length: int, key_length: int, causal: bool) -> int:
        return int(getattr(plan_of(length, key_length, causal), kind).arguments["MASK"])

    assert mask(1024, 1024, False) == mask(1000, 1024, False) == costs.NONE
    assert mask(1024, 1000, False) == (costs.NONE if kind == "dkdv" else costs.FIRST)
    assert mask(1024, 1024, True) == mask(1000, 70, True) == costs.FIRST


@pytest.mark.parametrize("kind", KINDS)
def test_heads_whose_blocks_stay_in_the_cache_have_tiles_in_turn(kind: str) -> None:
    def at_once(length: int, key_length: int, kv_heads: int = 8) -> int:
        plan = plan_of(length, key_length, True, 3, 8, kv_heads)
        return int(getattr(plan, kind).arguments["heads_at_once"])

    count = 24 if kind != "dkdv" else 3
    assert at_once(256, 256) == 24
    assert at_once(256, 256, 1) == count
    assert at_once(2**17, 2**17) == 1
    # Keys and values of a head that is shared are there once, its queries for each that shares it.
    shared, own = at_once(2**14, 2**14, 1), at_once(2**14, 2**14)
    assert shared > own if kind != "dkdv" else shared < own
    for n in (shared, own):
        assert 24 % n == 0


def test_where_two_warpgroups_share_keys() -> None:
    """As measured on an H200, and where a program for each would leave processors idle."""

    def warpgroups(batch: int, length: int, causal: bool = False, dim: int = 64) -> int:
        launch = plan_of(length, length, causal, batch, 16, 16, dim).forward
        assert isinstance(launch, Launch)
        return int(launch.arguments["WARPGROUPS"])

    assert [warpgroups(2**14 // n, n) for n in (512, 1024, 2048, 4096)] == [2, 2, 2, 2]
    assert warpgroups(64, 197) == warpgroups(16, 1024, True) == warpgroups(16, 1024, dim=32) == 1
    assert warpgroups(1, 1024) == 1


def test_tiles_that_were_measured_are_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(1024, 1024, False, 16, 16, 16)
    tiles = tiling.choose(*plan._problem("forward"))
    monkeypatch.setattr(tuning, "lookup", lambda name: list(tiles))
    plan = planning.Plan(
        plan.rule, plan.scale, plan.device, plan.dtype, plan.shapes, plan.strides, 0
    )  # fmt: skip
    launch = plan.forward
    assert isinstance(launch, Launch)
    assert launch.arguments["WARPGROUPS"] == tiles.num_warps // 4 == 1


def test_windows_of_nearly_the_whole_layout_are_a_row() -> None:
    """Where tiles of the layout's axes waste more than masks of a row cost, and nothing else is
    asked for than windows."""

    def masks(
        shape: Any, rule: Neighborhood, more: int = 0, lacks_a_row: bool = False, **others: Any
    ) -> set[Any]:
        sizes = 1, *shape, 4, 128
        q = torch.empty(sizes, dtype=torch.bfloat16, device="meta")
        if lacks_a_row:
            q = q.new_empty(1, *(n + 1 for n in shape), 4, 128)[(slice(None), *map(slice, shape))]
        additional = q.new_empty(1, more, 4, 128) if more else None
        plan = planning.plan_for(q, q, q, additional, rule, 1.0, **others)
        launches: list[Any] = [getattr(plan, kind) for kind in KINDS]
        found = {each.arguments["MASK"] for each in launches}
        rows = [plan.in_a_row("forward"), plan.in_a_row("gradient")]
        assert any(row and row.columns for row in rows) == (costs.COLUMNS in found)
        return found

    uneven, nearly = (37, 67), Neighborhood.create(2, (37, 65))
    assert masks(uneven, nearly) == {costs.COLUMNS}
    assert masks((17, 17, 11), Neighborhood.create(3, (16, 16, 10))) == {costs.COLUMNS}
    whole = Neighborhood.create(2, uneven)
    assert masks(uneven, whole) == {costs.FIRST, costs.NONE}
    mask = torch.ones(1, *uneven, dtype=torch.bool, device="meta")
    assert masks(uneven, nearly, masks=(mask, None)) == {costs.COLUMNS}
    for options in ({"more": 3}, {"bias_dtype": torch.float32}, {"lacks_a_row": True}):
        assert costs.COLUMNS not in masks(uneven, nearly, **options), options
    part = Neighborhood.create(2, (37, 65), query_offset=(0, 0))
    small, even = Neighborhood.create(2, 31), Neighborhood.create(2, 60)
    for shape, rule in ((uneven, part), (uneven, small), ((64, 64), even)):
        assert costs.COLUMNS not in masks(shape, rule), rule
    name = tiling.key("dq", nearly, uneven, uneven, 128, 128, 2)
    with tuning.trial(name, list(tiling.choose("dq", nearly, uneven, uneven, 128, 128))):
        assert costs.COLUMNS in masks(uneven, nearly) != {costs.COLUMNS}  # tiles were measured


def test_when_dq_is_made_of_ds_in_memory() -> None:
    def share(length: int, key_length: int, sets: int) -> Any:
        return ds_plan.share_of(length, key_length, sets, 1, 132)

    assert share(4096, 4096, 64) == (8, 128) and share(16384, 16384, 24) == (1, 64)
    assert share(32768, 32768, 24) is share(4096, 77, 64) is share(1024, 1024, 64) is None
    for length, sets in itertools.product((2048, 3000, 5000, 8192, 15000), (1, 7, 64)):
        found = share(length, length, sets)
        assert found is None or 2 * found.sets * length**2 <= max(2**28, 2 * length**2)
    plan = plan_of(4096, 4096, False, 4, 16, 16)  # of 64 channels
    assert plan.through_memory is None


@pytest.mark.parametrize(("kv_heads", "count"), [(6, 4), (2, 3), (6, 12), (2, 1)])
def test_every_tile_is_made_once_where_its_ds_is(
    kv_heads: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What launches say of tiles, as kernels number them."""
    monkeypatch.setattr(ds_plan, "share_of", lambda *_: ds_plan.Share(count, 64))
    tuning._forget_choices()
    q, k = (
        torch.empty(2, n, h, 128, dtype=torch.bfloat16, device="meta")
        for n, h in ((700, 6), (300, kv_heads))
    )
    plan = planning.plan_for(q, k, k, None, Dense(), 1.0)
    both, per_kv = plan.through_memory, 6 // kv_heads
    assert both is not None and both.shape == (count * per_kv, 300, 704)
    keys, queries = [], []
    for leaving, from_ds in both.launches:
        a, b = leaving.arguments, from_ds.arguments
        made = set()
        for tile_id in range(a["first_tile"], a["num_tiles"]):
            rest, at_once = tile_id // a["heads_at_once"], a["heads_at_once"]
            which = rest // a["T2"] * at_once + tile_id % at_once  # batch entry and head of keys
            keys.append((which, rest % a["T2"]))
            made.add(which)
        first = a["first_tile"] // a["T2"]
        assert made == set(range(first, first + len(made))) and len(made) <= count
        assert b["first"] == first and b["count"] == len(made) * per_kv
        for tile_id in range(b["num_tiles"]):
            which = first + tile_id % b["count"] // per_kv
            assert which in made
            queries.append((which, tile_id % b["count"] % per_kv, tile_id // b["count"]))
    assert sorted(keys) == [*itertools.product(range(2 * kv_heads), range(3))]
    assert sorted(queries) == [*itertools.product(range(2 * kv_heads), range(per_kv), range(6))]
    tuning._forget_choices()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_keys() -> None:
    q, k = (torch.randn(2, n, 4, 64, device="cuda", dtype=torch.bfloat16) for n in (5, 0))
    inputs = Inputs(q, k, k)
    out, lse = hopper.forward(inputs, Dense(), 1.0)
    assert not out.any() and (lse == -torch.inf).all()
    assert not any(x.any() for x in hopper.backward(out, None, inputs, out, lse, Dense(), 1.0)[:3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("shape", "rule"), FLAT)
@pytest.mark.parametrize("dims", [(64, 64), (128, 80), (32, 24)])
def test_results_of_a_row(
    shape: Any, rule: Any, dims: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever windows would cost. The output's memory is NaN first, as PyTorch fills it."""
    always = lambda kinds, rule, space, *dims: flattened(rule, space)  # noqa: E731
    monkeypatch.setattr(tiling, "in_a_row", always)
    tuning._forget_choices()
    dim, value_dim = dims
    sizes = (4, dim), (2, dim), (2, value_dim), (4, value_dim)
    tensors = [torch.randn(2, *shape, *size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    *qkv, grad = tensors
    inputs, exact_inputs = Inputs(*qkv), Inputs(*(x.double() for x in qkv))
    exact = reference.forward(exact_inputs, rule, 0.3)
    expected = [*exact]
    expected += reference.backward(grad.double(), None, exact_inputs, *exact, rule, 0.3)[:3]
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            out, lse = hopper.forward(inputs, rule, 0.3)
            found = [out, lse, *hopper.backward(grad, None, inputs, out, lse, rule, 0.3)[:3]]
            for name, right, x in zip("olqkv", expected, found):
                error = (x - right).square().mean().sqrt() / right.square().mean().sqrt()
                assert error < (1e-4 if name == "l" else 2e-2), name
    finally:
        torch.use_deterministic_algorithms(False)
        tuning._forget_choices()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("shape", "rule"), FLAT)
@pytest.mark.parametrize("dims", [(64, 64), (128, 80), (32, 24), (256, 256)])
def test_masks_of_a_row(shape: Any, rule: Any, dims: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    always = lambda kinds, rule, space, *dims: flattened(rule, space)  # noqa: E731
    monkeypatch.setattr(tiling, "in_a_row", always)
    tuning._forget_choices()
    sizes = (4, dims[0]), (2, dims[0]), (2, dims[1])
    qkv = [torch.randn(3, *shape, *size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    mask = torch.rand(3, *reversed(shape), device="cuda") < 0.8
    mask = mask.permute(0, *range(len(shape), 0, -1))  # no row of tokens
    check_masks(Inputs(*qkv, key_mask=mask), rule, 0.3, (hopper, hopper))
    tuning._forget_choices()


# heads, heads of keys, head dim, value dim, gradient of the LSE, dtype
TENSORS = [
    (2, 2, 64, 64, False, torch.bfloat16),
    (4, 2, 128, 128, True, torch.float16),
    (3, 1, 32, 24, True, torch.bfloat16),
    (4, 2, 72, 96, True, torch.bfloat16),
    (2, 1, 256, 200, False, torch.float16),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("each", PLAIN, ids=id_of)
@pytest.mark.parametrize("tensors", TENSORS)
def test_results(each: Any, tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, LSE and gradients by all tiles, with one program and with many; every run the same.

    PyTorch fills what is not initialized with NaN.
    """
    (length,), (key_length,), rule = each
    heads, kv_heads, dim, value_dim, has_grad_lse, dtype = tensors
    torch.manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device="cuda", dtype=dtype)

    q, k = random(2, length, heads, dim), random(2, key_length, kv_heads, dim)
    inputs = Inputs(q, k, random(2, key_length, kv_heads, value_dim))
    problem = Problem.of("attention", inputs, rule, dim**-0.5)
    if (reason := hopper.unsupported(problem)) is not None:
        pytest.skip(reason)
    has_gradient = hopper.lacks(problem._replace(operation="gradient")) is None
    grad_out = random(2, length, heads, value_dim)
    grad_lse = torch.randn(2, length, heads, device="cuda") if has_grad_lse else None
    double = [None if x is None else x.double() for x in (grad_out, grad_lse, *inputs)]
    exact_inputs, scale = Inputs(*double[2:]), dim**-0.5
    exact = reference.forward(exact_inputs, rule, scale)
    expected = list(exact)
    if has_gradient:
        expected += reference.backward(*double[:2], exact_inputs, *exact, rule, scale)[:3]

    def run() -> list[torch.Tensor]:
        out, lse = hopper.forward(inputs, rule, scale)
        if not has_gradient:
            return [out, lse]
        grads = hopper.backward(grad_out, grad_lse, inputs, out, lse, rule, scale)
        return [out, lse, *(x for x in grads[:3] if x is not None)]

    monkeypatch.setattr(ds_plan, "share_of", lambda *_: None)
    layout = (rule, (length,), (key_length,), dim, value_dim)
    kinds = KINDS if has_gradient else KINDS[:1]
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        for choice in itertools.zip_longest(*(tiling.candidates(x, *layout) for x in kinds)):
            results = []
            for processors in (132, 1):  # with one, a program takes many tiles
                monkeypatch.setattr(planning, "_processors", lambda _, n=processors: n)
                with contextlib.ExitStack() as stack:
                    for kind, tiles in zip(kinds, choice):
                        if tiles is not None:
                            name = tiling.key(kind, *layout, 2)
                            stack.enter_context(tuning.trial(name, list(tiles)))
                    results += [run() for _ in range(2)]
            found, *others = results
            for name, right, x, *same in zip("olqkv", expected, found, *others):
                assert all(torch.equal(x, y) for y in same), name
                error = (x - right).square().mean().sqrt()
                # A gradient that cancels to nothing keeps the rounding errors of its inputs.
                size = right.square().mean().sqrt().clamp(min=0.1)
                limit = 1e-4 if name == "l" else 2e-2 if dtype == torch.bfloat16 else 4e-3
                assert error < limit * size, name
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share", [(1, 64), (3, 128), (4, 64)])
@pytest.mark.parametrize(
    ("length", "key_length", "kv_heads", "dims", "dtype"),
    [
        (1000, 1000, 4, (128, 128), torch.bfloat16),
        (300, 77, 2, (112, 72), torch.float16),
        (77, 700, 1, (128, 96), torch.bfloat16),
    ],
)
def test_gradients_through_memory(
    length: int, key_length: int, kv_heads: int, dims: Any, dtype: torch.dtype, share: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """dQ of dS in memory. PyTorch fills what is not initialized with NaN."""
    dim, value_dim = dims
    monkeypatch.setattr(ds_plan, "share_of", lambda *_: ds_plan.Share(*share))
    tuning._forget_choices()
    sizes = (length, 4, dim), (key_length, kv_heads, dim), (key_length, kv_heads, value_dim)
    inputs = Inputs(*(torch.randn(2, *size, device="cuda", dtype=dtype) for size in sizes))
    grads = torch.randn(2, length, 4, value_dim, device="cuda", dtype=dtype)
    grad_lse = torch.randn(2, length, 4, device="cuda")
    exact_inputs, rule, scale = Inputs(*(x.double() for x in inputs[:3])), Dense(), dim**-0.5
    exact = reference.forward(exact_inputs, rule, scale)
    double = grads.double(), grad_lse.double()
    expected = reference.backward(*double, exact_inputs, *exact, rule, scale)
    out, lse = hopper.forward(inputs, rule, scale)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        found, again = (
            hopper.backward(grads, grad_lse, inputs, out, lse, rule, scale) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for name, right, x, same in zip("qkv", expected, found, again):
        assert x is not None and same is not None and right is not None
        error = (x - right).square().mean().sqrt() / right.square().mean().sqrt()
        assert torch.equal(x, same) and error < (2e-2 if dtype == torch.bfloat16 else 4e-3), name
    tuning._forget_choices()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share", [(1, 64), (3, 128)])
@pytest.mark.parametrize(("length", "key_length", "kv_heads"), [(300, 300, 4), (77, 700, 1)])
def test_masks_through_memory(
    length: int, key_length: int, kv_heads: int, share: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ds_plan, "share_of", lambda *_: ds_plan.Share(*share))
    tuning._forget_choices()
    sizes = (length, 4, 128), (key_length, kv_heads, 128), (key_length, kv_heads, 112)
    qkv = [torch.randn(2, *size, device="cuda", dtype=torch.float16) for size in sizes]
    mask = torch.rand(2, 2 * key_length, device="cuda")[:, ::2] < 0.8
    check_masks(Inputs(*qkv, key_mask=mask), Dense(), 128**-0.5, (hopper, hopper))
    tuning._forget_choices()


def additional_plan(space: Any, heads: int, num_additional: int) -> planning.Plan:
    """The plan of windows with additional tokens, on tensors without data."""
    q, more = (
        torch.empty(1, *layout, heads, 128, dtype=torch.bfloat16, device="meta")
        for layout in (space, (num_additional,))
    )
    return planning.plan_for(q, q, q, more, Neighborhood.create(len(space), 3), 1.0)


def test_who_makes_the_gradients_of_additional_tokens() -> None:
    def tiles(space: Any, heads: int, num_additional: int) -> int | None:
        launch = additional_plan(space, heads, num_additional).dkdv_of_additional
        if launch is None:
            return None
        assert isinstance(launch, Launch)
        arguments = launch.arguments
        assert (arguments["Q2"], arguments["N2"]) == (math.prod(space), num_additional)
        assert arguments["MASK"] == costs.NONE
        return int(arguments["num_tiles"])

    assert tiles((128, 128), 24, 512) == 24 * 4
    assert tiles((9, 17, 31), 24, 500) == 24 * 4
    # Fewer tokens than a tile has, and fewer tiles than a GPU has processors.
    assert tiles((128, 128), 24, 5) is tiles((128, 128), 1, 128) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_additional", [1, 70, 300])
@pytest.mark.parametrize(
    ("space", "key_space", "options"),
    [
        ((200,), (200,), {}),
        ((9, 14), (18, 14), {"query_offset": (3, 0)}),
        ((24, 20), (8, 5), {"queries_per_key": (3, 4)}),
        ((6, 9, 10), (6, 9, 10), {"dilation": (1, 2, 3)}),
    ],
)
def test_gradients_of_additional_tokens(
    space: Any, key_space: Any, options: Any, num_additional: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel of dK and dV, from queries that lie apart, too."""
    rule = Neighborhood.create(len(space), 3, **options)
    for heads, kv_heads, dim, value_dim, dtype in (
        (2, 2, 64, 64, torch.bfloat16),
        (4, 1, 128, 72, torch.float16),
    ):

        def random(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(sizes, device="cuda", dtype=dtype)

        q = random(2, *(n + 1 for n in space), heads, dim)[(slice(None), *map(slice, space))]
        layouts = (key_space, dim), (key_space, value_dim)
        k, v = (random(2, *layout, kv_heads, n) for layout, n in layouts)
        more = [random(2, num_additional, kv_heads, n) for n in (dim, value_dim)]
        inputs, scale = Inputs(q, k, v, None, *more), dim**-0.5
        out, lse = hopper.forward(inputs, rule, scale)
        grads = random(*out.shape), random(*lse.shape, dtype=torch.float32)
        exact_inputs = Inputs(*(None if x is None else x.double() for x in inputs))
        exact = reference.forward(exact_inputs, rule, scale)
        double = [x.double() for x in grads]
        expected = reference.backward(*double, exact_inputs, *exact, rule, scale)
        for portable_time in (0.0, math.inf):
            tuning._forget_choices()
            monkeypatch.setattr(planning, "_PORTABLE_TIME", portable_time)
            found, again = (
                hopper.backward(*grads, inputs, out, lse, rule, scale) for _ in range(2)
            )
            for name in ("additional_keys", "additional_values"):
                a, right = getattr(found, name), getattr(expected, name)
                assert torch.equal(a, getattr(again, name))
                error = (a - right).square().mean().sqrt()
                limit = 2e-2 if dtype == torch.bfloat16 else 4e-3
                assert error < limit * right.square().mean().sqrt(), (name, portable_time)
