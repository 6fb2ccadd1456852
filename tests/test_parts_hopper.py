"""Hopper kernels of queries that are a part of the layout or finer than keys, of cut windows, and
of rings.

What they see of a layout is tested where Triton interprets them, interpreter/test_hopper_parts.py.
"""

from __future__ import annotations

import importlib
import itertools
import math
import pathlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import hopper
from hopper_problems import PARTS, RINGS, part

pytest.importorskip("triton", "3.6")  # the first with Gluon for Hopper

from triton.backends.compiler import GPUTarget

from natten import tuning
from natten.backends import Problem
from natten.backends.hopper import descriptors, forward, widths
from natten.backends.hopper import plan as planning
from natten.backends.hopper import tiles as tiling
from natten.backends.interface import KINDS
from natten.inputs import Inputs
from natten.neighborhood import Neighborhood

DIM = 64  # of heads


def plan_of(queries: Any, keys: Any, rule: Neighborhood) -> planning.Plan:
    """The plan of a problem on tensors without data."""
    q, k = (
        torch.empty(1, *layout, 2, DIM, dtype=torch.bfloat16, device="meta")
        for layout in (queries, keys)
    )
    return planning.plan_for(q, k, k, None, rule, 1.0)


def constants(queries: Any, keys: Any, rule: Neighborhood) -> list[Any]:
    """What kernels are compiled for."""
    plan = plan_of(queries, keys, rule)
    names = [x for x in forward.forward_kernel.arg_names if x.isupper() and not x[-1].isdigit()]
    assert {"MODES", "TILE", "ENDS", "TABLES", "QUERIES", "REGISTERS"} <= set(names)
    return [
        {name: launch.arguments[name] for name in names}
        for launch in (plan.forward, plan.dq, plan.dkdv)
    ]


def test_another_offset_or_length_has_the_same_kernels() -> None:
    def of(count: int, length: int, offset: int, **options: Any) -> list[Any]:
        return constants(
            *part((count, 40), (length, 40), (9, 7), query_offset=(offset, 0), **options)
        )

    truncated = {"boundary": ("truncate", "shift")}
    for options in ({}, {"dilation": (3, 1)}, {"stride": (4, 1)}, truncated):
        first = of(12, 90, 0, **options)
        assert all(of(12, 90, offset, **options) == first for offset in (1, 16, 77, 78))
        assert all(of(12, length, 5, **options) == first for length in (89, 91, 1000))
        assert of(11, 90, 3, **options) == first
    # A cache that begins with one token.
    streams = {"boundary": "truncate", "is_causal": (True, False)}
    modes = {str(of(1, n, n - 1, **streams)[0]["MODES"]) for n in (1, 2, 3, 50)}
    assert len(modes) == 1


def test_another_part_is_other_numbers() -> None:
    """The plan of a part is made of another one's; it is as if it had been made alone."""
    is_shared = []
    for queries, keys, rule in PARTS:
        if rule.query_offset is None:
            continue
        fewer = tuple(max(1, n - 1) for n in queries)
        longer = tuple(n + 1 for n in keys)
        nowhere = replace(rule, query_offset=(0,) * rule.rank)
        for other in ((queries, keys, nowhere), (queries, longer, rule), (fewer, longer, nowhere)):
            tuning._forget_choices()
            first, moved = plan_of(*other), plan_of(queries, keys, rule)
            assert isinstance(first, planning.Part)
            assert isinstance(moved, planning.Part | planning.Moved)
            is_shared.append(moved.plan is first.plan)
            assert is_shared[-1] or other[:2] != (queries, keys)
            alone = planning.Plan(rule, *plan_arguments(queries, keys))
            for kind in KINDS:
                assert_same(getattr(moved, kind), getattr(alone, kind))
            for given in (False, True):
                assert_same(moved.lse_delta[given], alone.lse_delta[given])
    assert sum(is_shared) > len(is_shared) // 2


def test_other_queries_of_wide_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the gradients of keys and of values have a launch each."""
    monkeypatch.setattr(f"{__name__}.DIM", 256)
    rules = [Neighborhood.create(1, 9, query_offset=at) for at in (5, 40)]
    first, moved = (plan_of((20,), (100,), rule) for rule in rules)
    alone = planning.Plan(rules[1], *plan_arguments((20,), (100,)))
    assert isinstance(moved, planning.Moved) and moved.part is first
    for each, expected in zip(moved.dkdv.launches, alone.dkdv.launches, strict=True):
        assert_same(each, expected)


def test_keys_that_no_query_attends_have_no_tiles() -> None:
    """Their gradients are zeros; the kernel has half of the tiles for half of the queries."""
    queries, keys, rule = part((28, 56), (56, 56), 7, query_offset=(28, 0))
    whole = plan_of(keys, keys, Neighborhood.create(2, 7)).dkdv
    half = plan_of(queries, keys, rule)
    rows = half.dkdv.arguments["TILE"][1]
    assert whole.arguments["T1"] == 56 // rows
    assert half.dkdv.arguments["F1"] == 25 // rows * rows and half.dkdv.arguments["F2"] == 0
    assert half.dkdv.arguments["T1"] == -(-56 // rows) - 25 // rows
    assert half.dkdv.arguments["num_tiles"] <= 0.6 * whole.arguments["num_tiles"]
    assert attended(half) == [(25, 56), (0, 56)]
    dilated = plan_of(*part((4, 30), (28, 30), (3, 5), dilation=(4, 1), query_offset=(13, 0)))
    assert attended(dilated) == [(8, 24), (0, 30)]
    every = plan_of(*part((10, 20), (10, 20), 5, query_offset=0))
    assert attended(every) == [(0, 10), (0, 20)] and every.lse_delta[False].arguments["tokens"] == 0


def attended(plan: Any) -> list[tuple[int, int]]:
    """Per axis, the first and one-past-last key that has a tile."""
    return plan.attended(plan.key_spans)


def assert_same(a: Any, b: Any) -> None:
    """Two launches are the same but for the addresses of tensors."""
    assert (a.arguments, a.grid, a.options) == (b.arguments, b.grid, b.options)
    assert a._kernels is b._kernels
    assert list(a.tensors) == list(b.tensors)
    for x, y in zip(a.tensors.values(), b.tensors.values()):
        assert (x is None) == (y is None)
        assert x is None or (x.view, x.block, x.layout) == (y.view, y.block, y.layout)


def test_additional_gradients_of_another_part_are_those_of_it_alone() -> None:
    rule = Neighborhood.create(1, 9, query_offset=3)

    def of(count: int, length: int, stride: int) -> Any:
        x = torch.empty(1, 4096, 2, stride, dtype=torch.bfloat16, device="meta")[..., :DIM]
        more = torch.empty(1, 40, 2, DIM, dtype=torch.bfloat16, device="meta")
        plan = planning.plan_for(x[:, :count], x[:, :length], x[:, :length], more, rule, 1.0)
        splits, launch = plan.portable.additional
        return plan, (splits, launch.grid, launch.arguments)

    of(1025, 2000, 64)
    plan, moved = of(1270, 2000, 128)
    tuning._forget_choices()
    other, alone = of(1270, 2000, 128)
    assert plan.plan.space == (1025,) and other.plan.space == (1270,) and moved == alone


def plan_arguments(queries: Any, keys: Any) -> Any:
    """What :func:`plan_of` gives a plan beside the rule."""
    shapes = [(1, *layout, 2, DIM) for layout in (queries, keys, keys)]
    strides = [descriptors.contiguous_strides(shape) for shape in shapes]
    return 1.0, torch.device("meta"), torch.bfloat16, shapes, strides, 0


def test_what_stands_for_a_part_stands_for_itself() -> None:
    for queries, keys, rule in PARTS:
        model = tiling._model(rule, queries, keys)
        assert tiling._model(*model) == model
    own = Neighborhood.create(2, 7)
    assert tiling._model(own, (56, 56), (56, 56)) == (own, (56, 56), (56, 56))


def test_limits() -> None:
    def said(queries: Any, keys: Any, rule: Neighborhood) -> str | None:
        return hopper.lacks(problem_of(queries, keys, rule))

    for queries, keys, rule in PARTS:
        assert said(queries, keys, rule) is None
    mixed = part((64, 32), (32, 32), 5, queries_per_key=(2, 1), dilation=(1, 2))
    assert said(*mixed) is None
    assert "finer" in str(said(*part((64,), (32,), 5, queries_per_key=2, dilation=2)))
    assert "31 bits" in str(said(*part((64,), (2**30,), 5, query_offset=0)))


def test_uneven_groups_load_no_box_without_channels() -> None:
    """TMA's boxes have 64 channels. One that has none of a head's is wholly out of bounds."""
    empty = range(136, 193, 8)
    in_place = (dim for dim in hopper.head_dims if dim % 8 == 0)  # others are copied
    assert [dim for dim in in_place if widths.has_empty_box(dim)] == list(empty)
    ring = part((60,), (60,), 19, dilation=3, boundary="circular")  # with padded keys, a part
    uneven = [
        part((2,), (42,), 1, dilation=3, query_offset=26),
        part((41,), (41,), 5, dilation=3),
        ring,
    ]
    even = [part((42,), (42,), 5, dilation=3), part((20,), (42,), 5, query_offset=7)]
    for dim in empty:
        for each in uneven:
            assert "129 to 192 channels" in str(hopper.lacks(problem_of(*each, dim)))
            values = problem_of(*each)._replace(value_dim=dim)
            assert "129 to 192 channels" in str(hopper.lacks(values))
        assert all(hopper.lacks(problem_of(*each, dim)) is None for each in even)
    assert pads(*ring)
    for dim in (128, 200):
        assert all(hopper.lacks(problem_of(*each, dim)) is None for each in uneven)


def problem_of(queries: Any, keys: Any, rule: Neighborhood, dim: int = DIM) -> Problem:
    shape = (1, *queries, 2, dim)
    tensors = torch.device("cpu"), torch.bfloat16, dim, dim, shape, rule, 0.1
    return Problem("attention", *tensors, key_shape=keys)


def pads(queries: Any, keys: Any, rule: Neighborhood, dim: int = DIM) -> bool:
    return hopper.pads(problem_of(queries, keys, rule, dim))


def test_rings_are_padded_only_where_they_must_be() -> None:
    for each in RINGS:
        assert not pads(*each)
        assert hopper.lacks(problem_of(*each)) is None
    ring = {"boundary": "circular"}
    assert pads(*part((60,), (100,), 9, query_offset=5, **ring))
    assert pads(*part((200,), (100,), 9, queries_per_key=2, **ring))
    # A tile of 64 queries reaches over both ends, and no piece meets both.
    assert pads(*part((101,), (101,), 99, **ring))
    # It reaches over one end, but its blocks begin earlier, to meet there, and cross the other.
    assert pads(*part((157,), (157,), 121, **ring))
    assert not pads(*part((64, 64), (64, 64), 13, **ring), dim=256)  # no backward kernel


@pytest.mark.parametrize("heads_first", [False, True])
def test_short_groups_begin_before_the_tensor(heads_first: bool) -> None:
    """The view shows the tokens of every group; those of short ones count from one."""
    shape, dilation = (2, 7, 10, 3, 16), (3, 4)
    memory = torch.arange(math.prod(shape))
    x = memory.view(3, 2, 7, 10, 16).movedim(0, -2) if heads_first else memory.view(shape)
    found = descriptors.view(shape, x.stride(), dilation)
    memory = torch.cat([torch.full((found.before,), -1), memory])
    for b, g1, g2, head in itertools.product(range(2), range(3), range(4), range(3)):
        short = [g >= n % d for g, n, d in zip((g1, g2), shape[1:3], dilation)]
        bases = [g if s else g + d for g, s, d in zip((g1, g2), short, dilation)]
        base = sum(n * s for n, s in zip((b, 0, *bases, head), found.steps))
        assert base < found.shape[0]
        offset = base * found.strides[0] + sum(s * n for s, n in zip(short, found.strides[2:4]))
        own = [n - s for s, n in zip(short, found.shape[2:4])]
        shown = memory.as_strided((*own, 16), found.strides[2:], offset)
        assert torch.equal(shown, x[b, g1::3, g2::4, head])


VARIANTS = {
    "part": part((28, 56), (56, 56), 7, query_offset=(28, 0)),
    "dilated part": part((14, 27), (28, 30), 7, dilation=4, query_offset=(13, 1)),
    "truncated": part((56, 56), (56, 56), 7, boundary="truncate"),
    "finer": part((56, 56), (14, 14), 7, queries_per_key=4),
    "ring": part((56, 56), (56, 56), 7, boundary="circular"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
    compiling = importlib.import_module("compiled")
    queries, keys, rule = VARIANTS[name]

    def call(_: Any) -> None:
        q, k = (
            torch.empty(2, *layout, 4, DIM, dtype=torch.bfloat16, device="meta")
            for layout in (queries, keys)
        )
        inputs = Inputs(q, k, k)
        out, lse = hopper.forward(inputs, rule, 0.125)
        hopper.backward(out, None, inputs, out, lse, rule, 0.125)

    variant = compiling.Variant(name, queries, 1, DIM)
    kernels = list(compiling.compile_calls(GPUTarget("cuda", 90, 32), 232448, call, [variant]))
    assert [x.name for x in kernels] == ["forward", "lse_delta", "backward dQ", "backward dK dV"]
    assert not any(x.looped or x.serialised for x in kernels)
