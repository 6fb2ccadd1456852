"""The Hopper backend: tiles on the CPU, kernels compiled without a GPU, results with one.

Masks and geometry are in interpreter/test_hopper_masks.py.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import hopper, reference, triton

from natten import tuning
from natten.backends import Problem
from natten.backends.interface import KINDS, Tiles
from natten.inputs import Inputs
from natten.neighborhood import Dense, Neighborhood

pytest.importorskip("triton", "3.6")  # the first with Gluon for Hopper

from hopper_problems import PROBLEMS, each_way, name_of, partners, rule_of
from masked import check_masks
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

import natten
from natten.backends.hopper import costs, descriptors, widths
from natten.backends.hopper import fused as hopper_fused
from natten.backends.hopper import plan as planning
from natten.backends.hopper import tiles as tiling
from natten.backends.hopper.cuts import rows_held, tile_and_block, warpgroups
from natten.backends.triton import launch


def assert_fits(tiles: Tiles, mask: costs.Mask, work: costs.Work) -> None:
    """There is the shared memory that tiles need, and with a mask of keys for the same tiles."""
    ways = [(tiles, mask, work)] + [costs.masked(tiles, mask, work)] * (not work.of_keys)
    for found, *needed in ways:
        assert found[:3] == tiles[:3] and found.num_stages >= 2 and found.resident_programs >= 1
        own = costs.own_out(found, *needed)
        assert costs.shared_bytes(found, *needed, own) <= 227 * 1024


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_tiles_fit_and_cover(problem: Any, kind: str) -> None:
    shape, *parameters = problem
    rule = rule_of(shape, *parameters)
    needed = 1
    for axis, (n, d) in enumerate(zip(shape, rule.dilation)):
        start, stop = partners(kind, rule, axis, n // d)
        needed *= int((stop - start).sum()) * d
    for dim in (32, 64, 128, 256):
        work = costs.work(kind, dim, dim)
        for tiles in each_way(kind, rule, shape, dim):
            mask = costs.mask(kind, rule, shape, shape, tiles, work)
            tile, _ = tile_and_block(tiles, work.of_keys)
            assert rows_held(tile) == costs.ROWS
            assert mask.ends[-1] <= 16 * mask.steps or mask.kind != costs.PRODUCT
            assert_fits(tiles, mask, work)
            start_registers, registers, fetch = costs.registers(tiles, work)
            groups = warpgroups(tiles)
            used = 128 * (groups * registers + fetch) * tiles.resident_programs
            assert max(used, start_registers * 128 * (groups + 1)) <= 65536
            assert tiling.computed_pairs(kind, rule, shape, shape, tiles) >= needed


def cut_of(launch: Any) -> tuple[Any, ...]:
    """The constants of a launch that tiles decide."""
    names = ("TILE", "BLOCK", "WARPGROUPS", "STAGES", "SPLIT_AXIS")
    return tuple(launch.arguments[name] for name in names)


def test_measured_tiles_are_taken() -> None:
    rule, shape = rule_of((56, 56), 7, 1, 1, False), (56, 56)
    problem = ("forward", rule, shape, shape, 32, 32, 2)
    best, *others = tiling.candidates(*problem)
    assert tiling.choose(*problem) == best
    with tuning.trial(tiling.key(*problem), list(others[3])):
        assert tiling.choose(*problem) == others[3]
        q_block, kv_block, num_warps, num_stages, split_axis, _ = others[3]
        q = torch.empty(1, *shape, 2, 32, dtype=torch.bfloat16)
        found = planning.plan_for(q, q, q, None, rule, 1.0).forward
        assert cut_of(found) == (q_block, kv_block, num_warps // 4, num_stages, split_axis)


def test_the_autotuner_keeps_the_fastest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("NATTEN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launch.Launch, "run", lambda self, **tensors: None)
    rule, shape = rule_of((56, 56), 7, 1, 1, False), (56, 56)
    candidates = tiling.candidates("dkdv", rule, shape, shape, 32, 32)
    q = torch.empty(1, *shape, 2, 32, dtype=torch.bfloat16)
    natten.use_autotuner(False, True)
    try:
        found = planning.plan_for(q, q, q, None, rule, 1.0)
        assert isinstance(found.forward, launch.Launch)
        assert isinstance(found.dkdv, launch.Trials)
        best = found.dkdv.launches[candidates[1]]
        monkeypatch.setattr(launch, "_time", lambda each, _: each is not best)
        found.dkdv.run(query=q, key=q, value=q)
        assert found.dkdv.chosen is best
    finally:
        natten.disable_autotuner()
    assert cut_of(planning.plan_for(q, q, q, None, rule, 1.0).dkdv) == cut_of(best)


@pytest.mark.parametrize(
    ("shape", "heads", "dim", "at_once"),
    [
        ((13, 91, 180), 8, 48, 4),  # four heads have three lines of 128 bytes
        ((13, 91, 180), 8, 64, 1),  # each has one
        ((13, 91, 180), 8, 32, 1),  # two have one
        ((13, 91, 180), 6, 72, 2),  # eight heads would have nine lines
        ((64, 64), 16, 48, 1),  # the layout stays in the cache
    ],
)
def test_heads_that_share_lines_of_the_cache_run_at_once(
    shape: Any, heads: int, dim: int, at_once: int
) -> None:
    rule = Neighborhood.create(len(shape), 5)
    q = torch.empty(1, *shape, heads, dim, dtype=torch.bfloat16, device="meta")
    for kind in KINDS:
        arguments = getattr(planning.plan_for(q, q, q, None, rule, 1.0), kind).arguments
        assert (arguments["heads_at_once"], arguments["HEADS_FIRST"]) == (at_once, at_once > 1)
    apart = torch.empty(1, heads, *shape, dim, dtype=torch.bfloat16, device="meta").movedim(1, -2)
    assert (
        planning.plan_for(apart, apart, apart, None, rule, 1.0).forward.arguments["heads_at_once"]
        == 1
    )


@pytest.mark.parametrize(("dim", "at_once"), [(48, 4), (64, 1)])
def test_heads_of_a_part_run_at_once_whatever_its_size(dim: int, at_once: int) -> None:
    for offset, length in ((0, 64), (0, 2048), (40, 64)):
        k = torch.empty(1, length, 64, 8, dim, dtype=torch.bfloat16, device="meta")
        rule = Neighborhood.create(2, 5, query_offset=(min(offset, length - 16), 0))
        plan = planning.plan_for(k[:, :16], k, k, None, rule, 1.0)
        for kind in KINDS:
            arguments = getattr(plan, kind).arguments
            assert (arguments["heads_at_once"], arguments["HEADS_FIRST"]) == (at_once, at_once > 1)


PLAIN = Problem(
    "attention", torch.device("cpu"), torch.bfloat16, 64, 64, (1, 16, 16, 2, 64),
    Neighborhood.create(2, 5, 1, 1, False), 0.1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": -1.0}, "scaled"),
        ({"shape": (1, 2**15, 2**15, 16, 64)}, "31 bits"),
        ({"bias": True, "rule": Neighborhood.create(2, 2**14, boundary="truncate")}, "31 bits"),
        ({"bias": True, "rule": Neighborhood.create(2, 5, queries_per_key=(2, 1))}, "finer"),
    ],
)
def test_unsupported_says_why(change: dict[str, Any], reason: str) -> None:
    assert hopper.lacks(PLAIN) is None
    said = hopper.lacks(PLAIN._replace(**change))
    assert said is not None and reason in said


def test_heads_of_all_widths() -> None:
    def said(dim: int, value_dim: int, operation: str) -> str | None:
        sizes = {"head_dim": dim, "value_dim": value_dim, "operation": operation}
        return hopper.lacks(PLAIN._replace(**sizes))

    for dim, value_dim in ((1, 8), (20, 7), (72, 128), (128, 32), (160, 160), (256, 512)):
        assert said(dim, value_dim, "attention") is said(dim, value_dim, "gradient") is None
    assert "head_dim 1 to 256" in str(said(264, 64, "attention"))
    assert "value head_dim 1 to 512" in str(said(64, 520, "gradient"))
    assert said(20, 7, "packed") is None
    assert "up to 128 channels" in str(said(160, 160, "packed"))


def test_small_windows_do_not_pay_for_copies() -> None:
    def slower(dim: int, rule: Any) -> bool:
        return hopper.slower(PLAIN._replace(head_dim=dim, rule=rule)) is not None

    small, large = (rule_of((16, 16), window, 1, 1, False) for window in (3, 9))
    assert slower(20, small) and not slower(24, small) and not slower(20, large)
    assert not slower(20, Dense()) and hopper.slower(PLAIN._replace(head_dim=20, rule=None)) is None
    # Of as many channels of values, two heads are read where they are, but not beside a bias.
    alike = PLAIN._replace(head_dim=20, value_dim=20, rule=small, operation="gradient")
    assert hopper.slower(alike) is None
    changes: list[dict[str, Any]] = [
        {"bias": True}, {"shape": (1, 16, 16, 3, 20)}, {"kv_heads": 1}, {"operation": "packed"},
    ]  # fmt: skip
    for change in changes:
        assert "copies" in str(hopper.slower(alike._replace(**change)))


@pytest.mark.parametrize(
    ("layout", "heads", "window", "dim", "is_slower"),
    [
        ((64, 64), 8, 13, 12, True), ((64, 64), 8, 13, 20, False), ((64, 64), 8, 13, 28, False),
        ((56, 56), 2, 7, 12, True), ((56, 56), 2, 7, 20, True),
    ],
)  # fmt: skip
def test_half_aligned_heads_run_where_they_were_faster(
    layout: Any, heads: int, window: int, dim: int, is_slower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, on an H200 (hopper-log.md)."""
    small = importlib.import_module("natten.backends.triton.small_tiles")
    monkeypatch.setattr(small, "runs_here", lambda: True)
    rule, shape = Neighborhood.create(2, window), (8, *layout, heads, dim)
    problem = PLAIN._replace(head_dim=dim, value_dim=dim, rule=rule, shape=shape, key_shape=layout)
    assert (hopper.slower(problem) is not None) == is_slower


@pytest.mark.parametrize(
    ("dim", "value_dim", "heads", "kv_heads", "has_more", "expected"),
    [
        (64, 128, 3, 1, True, True), (20, 20, 2, 2, False, True), (20, 20, 3, 3, False, False),
        (20, 20, 4, 2, False, False), (20, 24, 2, 2, False, False), (24, 20, 2, 2, False, False),
        (20, 20, 2, 2, True, False), (22, 22, 4, 4, False, False), (7, 7, 8, 8, False, False),
        (124, 124, 8, 8, False, True), (132, 132, 8, 8, False, False),
    ],
)  # fmt: skip
def test_half_aligned_heads_are_read_in_place(
    dim: int, value_dim: int, heads: int, kv_heads: int, has_more: bool, expected: bool
) -> None:
    assert widths.reads_in_place(dim, value_dim, heads, kv_heads, has_more) == expected


@pytest.mark.parametrize("dim", [4, 12, 20, 28, 44, 60, 108, 124])
def test_half_aligned_heads_are_loaded_with_what_is_beside_them(dim: int) -> None:
    """A box begins where TMA can, has the head, and zeros where its products find no more of it."""
    heads = 4
    x = torch.empty(1, 24, 24, heads, dim, dtype=torch.bfloat16, device="meta")
    plan = planning.plan_for(x, x, x, None, Neighborhood.create(2, 7), 1.0)
    for kind, loaded, stored in (
        ("forward", ("query", "key", "value"), ("out",)),
        ("dq", ("query", "key", "value", "grad_out"), ("grad_query",)),
        ("dkdv", ("query", "key", "value", "grad_out"), ("grad_key", "grad_value")),
    ):
        tensors, arguments = getattr(plan, kind).tensors, getattr(plan, kind).arguments
        assert {tensors[name].view.shape[-1] for name in loaded} == {heads * dim}
        assert {tensors[name] for name in stored} == {None}
        first, end = arguments["QK_CLEARED"]
        assert first == dim and end == sum(arguments["QK_CHUNKS"]) >= dim + 4
        assert arguments["V_CLEARED"] == (first, end)
        for name in loaded:
            per_head = tensors[name].view.steps[-1]
            assert [h * per_head % 8 for h in range(heads)] == [0, 4, 0, 4]


@pytest.mark.parametrize(("narrow", "wide"), [(20, 24), (12, 16), (7, 8), (250, 256)])
def test_widened_heads_have_the_tiles_of_their_copies(narrow: int, wide: int) -> None:
    rule, shape = rule_of((64, 64), 13, 1, 1, False), (64, 64)
    for kind in KINDS:
        problems = [(kind, rule, shape, shape, dim, dim, 2) for dim in (narrow, wide)]
        assert tiling.choose(*problems[0]) == tiling.choose(*problems[1])
        assert tiling.key(*problems[0]) == tiling.key(*problems[1])


@pytest.mark.parametrize("channels", range(8, 513, 8))
def test_chunks_hold_the_channels(channels: int) -> None:
    """They are powers of two of at least 16, as few as one of them half of the kernel's allows."""
    found, width = widths.chunks(channels), widths.native(channels)
    assert channels <= sum(found) <= width and len(found) <= 2
    assert all(each >= 16 and each & (each - 1) == 0 for each in found)
    if len(found) == 2:
        assert found[0] == width // 2 and found[1] <= 2 * max(8, channels - found[0])
    else:
        assert width == 32 or channels > width * 3 // 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value_dim", widths.HEAD_DIMS)
@pytest.mark.parametrize("dim", widths.HEAD_DIMS[:-1])
def test_heads_of_all_widths_have_tiles(dim: int, value_dim: int, kind: str) -> None:
    for shape, *parameters in PROBLEMS[1:2] + PROBLEMS[7:8]:
        rule, work = rule_of(shape, *parameters), costs.work(kind, dim, value_dim)
        for tiles in each_way(kind, rule, shape, dim, value_dim):
            mask = costs.mask(kind, rule, shape, shape, tiles, work)
            assert_fits(tiles, mask, work)
            assert max(costs.registers(tiles, work)) <= 256


@pytest.mark.parametrize(
    ("dim", "value_dim", "narrow", "wide", "width", "passes"),
    [
        (64, 64, 64, 64, 64, ["dkdv"]),
        (64, 128, 64, 128, 128, ["dk", "dv"]),
        (256, 256, 256, 256, 256, ["dk", "dv"]),
        (40, 320, 64, 512, 256, ["dk", "dv"]),
        (32, 512, 32, 512, 256, ["dk", "dv"]),
    ],
)
def test_wide_heads_have_passes_and_slices(
    dim: int, value_dim: int, narrow: int, wide: int, width: int, passes: list[str]
) -> None:
    """dK and dV have a pass each where registers do not hold both, and slices of wide values have
    programs of their own, which together cover them."""
    rule, shape = rule_of((64, 64), 9, 1, 1, False), (2, 64, 64, 4)
    q, v = (torch.empty(*shape, n, dtype=torch.bfloat16, device="meta") for n in (dim, value_dim))
    plan = planning.plan_for(q, q, v, None, rule, 1.0)

    def check(launch: Any, slices: int, **widths: int | None) -> None:
        assert launch.grid[1] == launch.arguments["SLICES"] == slices
        for name, width in widths.items():
            found = launch.tensors[name]
            assert width == (found and found.block[-1]), name

    slices = -(-value_dim // width)
    check(plan.forward, slices, query=narrow, key=narrow, value=width, out=width)
    check(plan.dq, 1, query=narrow, key=narrow, value=wide, grad_out=wide, grad_query=narrow)
    launches = getattr(plan.dkdv, "launches", [plan.dkdv])
    assert [each.arguments["PASS"] for each in launches] == [planning.PASSES[n] for n in passes]
    first, last = launches[0], launches[-1]
    check(first, 1, query=narrow, key=narrow, value=wide, grad_out=wide, grad_key=narrow)
    check(last, slices, query=narrow, key=narrow, grad_out=width, grad_value=width)
    if first is not last:
        check(first, 1, grad_value=None)
        check(last, slices, value=None, grad_key=None)


def test_gradients_of_wide_heads_with_fine_queries_are_left_to_the_portable_kernels() -> None:
    """They share a tile of keys among programs, where few tiles would have most of the GPU wait."""

    def slower(operation: str, value_dim: int, per_key: int) -> bool:
        rule = Neighborhood.create(2, 9, queries_per_key=per_key)
        sizes = {"operation": operation, "head_dim": 32, "value_dim": value_dim}
        found = PLAIN._replace(**sizes, rule=rule, shape=(1, 224, 224, 4, 32))
        found = found._replace(key_shape=(28, 28))
        return hopper.slower(found) is not None

    assert slower("gradient", 384, 8)
    assert not slower("attention", 384, 8)
    assert not slower("gradient", 32, 8) and not slower("gradient", 384, 1)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("order", ["as it is", "heads first", "apart"])
def test_views_show_the_tensor(heads: int, batch: int, order: str) -> None:
    """Bases and positions lead to the tokens of every batch entry, head and dilation group."""
    shape, dilation = (batch, 6, 4, heads, 40), (3, 2)
    x = torch.arange(math.prod(shape)).view(shape)
    if order == "heads first":
        x = x.movedim(-2, 0).contiguous().movedim(0, -2)
    elif order == "apart":  # nothing but 8 divides all strides
        strides = (24 * 40 * heads + 8, 4 * 40 * heads, 40 * heads, 40, 1)
        x = torch.zeros(6000, dtype=x.dtype).as_strided(shape, strides).copy_(x)
    found = descriptors.view(shape, x.stride(), dilation)
    assert all(s % 8 == 0 for s in found.strides[:-1])
    shown = x.as_strided(found.shape, found.strides)
    assert shown.shape == (1 + last_base(found, batch, dilation, heads), 1, 2, 2, 40)
    for b, g1, g2, h in itertools.product(*map(range, (batch, *dilation, heads))):
        at = sum(n * s for n, s in zip((b, 0, g1, g2, h), found.steps))
        assert torch.equal(shown[at, 0], x[b, g1::3, g2::2, h])
    if order == "as it is":  # bases are rows
        assert found.steps == (24 * heads * (batch > 1), 0, 4 * heads, heads, 1, 0)


def test_heads_that_are_joined_have_the_next_heads_channels() -> None:
    shape = (2, 6, 4, 3, 48)
    x = torch.arange(math.prod(shape)).view(shape)
    found = descriptors.view(shape, x.stride(), (3, 2), joined=True)
    shown = x.as_strided(found.shape, found.strides)
    assert shown.shape[-1] == 3 * 48
    *_, per_head = found.steps
    for b, g1, g2, h in itertools.product(range(2), range(3), range(2), range(3)):
        at = sum(n * s for n, s in zip((b, 0, g1, g2, h), found.steps))
        own = shown[at, 0, ..., h * per_head :][..., :48]
        assert torch.equal(own, x[b, g1::3, g2::2, h])
    # Heads that lie apart stay so.
    assert descriptors.view(shape, (3456, 576, 144, 48, 1), (1, 1), joined=True).steps[-1] == 48
    assert descriptors.view(shape, (3456, 24, 144, 1152, 1), (1, 1), joined=True).steps[-1] == 0


@pytest.mark.parametrize(
    ("dim", "is_joined", "cleared"),
    [
        (48, True, 0), (80, True, 0), (96, True, 0), (64, False, 0), (32, False, 0),
        (72, False, 0), (40, True, 8), (24, True, 8), (16, False, 0), (104, True, 24),
        (320, True, 0), (328, False, 0),
    ],
)  # fmt: skip
def test_narrow_heads_are_joined(dim: int, is_joined: bool, cleared: int) -> None:
    """Products find zeros, or no channel, where blocks have the next head's."""
    first, end = widths.cleared(dim)
    assert end - first == cleared and (cleared == 0 or first == dim)
    assert widths.is_joined(dim) == is_joined
    if dim > 256:  # values only
        return
    x = torch.empty(1, 24, 24, 3, dim, dtype=torch.bfloat16, device="meta")
    plan = planning.plan_for(x, x, x, None, Neighborhood.create(2, 7), 1.0)
    width = 3 * dim if is_joined else dim
    for kind, loaded, stored in (
        ("forward", ("query", "key", "value"), ("out",)),
        ("dq", ("query", "key", "value", "grad_out"), ("grad_query",)),
        ("dkdv", ("query", "key", "value", "grad_out"), ("grad_key", "grad_value")),
    ):
        tensors = getattr(plan, kind).tensors
        assert {tensors[name].view.shape[-1] for name in loaded} == {width}
        assert {tensors[name].view.shape[-1] for name in stored} == {dim}
        arguments = getattr(plan, kind).arguments
        assert arguments["QK_CLEARED"] == arguments["V_CLEARED"] == (first, end)


def last_base(view: descriptors.View, batch: int, dilation: Any, heads: int) -> int:
    """The last base that a kernel asks for."""
    lasts = (batch - 1, 0, *(d - 1 for d in dilation), heads - 1)
    return sum(n * s for n, s in zip(lasts, view.steps))


def test_bases_beyond_32_bits_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 7, 3, 48, dtype=torch.bfloat16)[:, :, 1:, 8:40]
    assert descriptors.readable(x, (1,)) is x
    monkeypatch.setattr(descriptors, "MOST", 20)
    copied = descriptors.readable(x, (1,))
    assert copied.is_contiguous() and torch.equal(copied, x)


@pytest.mark.parametrize("width", [20, 24, 32])
def test_half_aligned_heads_that_are_not_side_by_side_are_copied(width: int) -> None:
    """Kernels tell by a head's number where in 16 bytes it begins."""
    x = torch.randn(1, 6, 5, 4, width, dtype=torch.bfloat16)
    beside = torch.stack((x, x), 3)[:, :, :, 0]  # as of a layer: tokens lie farther apart
    assert descriptors.readable(beside, (1, 1)) is beside
    apart = x[..., :20]
    assert (descriptors.readable(apart, (1, 1)) is apart) == (width == 20)


def test_programs_take_tiles_in_turn_unless_some_are_much_longer() -> None:
    def programs(shape: Any, window: Any, kind: str, causal: Any = False) -> int:
        rule = Neighborhood.create(len(shape), window, 1, 1, causal)
        x = torch.empty(1, *shape, 4, 128, dtype=torch.bfloat16, device="meta")
        found = getattr(planning.plan_for(x, x, x, None, rule, 1.0), kind)
        return int(found.grid[0])

    assert programs((32768,), 2048, "forward") == 132
    assert programs((30, 32, 32), (30, 16, 16), "forward", (True, False, False)) > 132
    # A key beyond the first and last windows is attended by few, one at their edges by many.
    assert programs((30, 48, 80), (18, 24, 24), "dkdv") > 132


class _Copies(TorchDispatchMode):
    """Names copies of tensors."""

    def __init__(self, found: list[Any]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Plans copy a few numbers on the CPU.
        if func._schema.name in ("aten::clone", "aten::copy_") and args[0].is_meta:
            self.found.append(("a copy", None))
        return func(*args, **(kwargs or {}))


def test_passes_overlap_where_they_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched or copied between them that they read."""
    q, keys = (torch.empty(2, 9, n, 4, 64, dtype=torch.bfloat16, device="meta") for n in (11, 512))
    apart = q.transpose(1, 2).contiguous().transpose(1, 2)  # tokens that do not lie in a row
    narrow = q.new_empty(*q.shape[:-1], 32)
    found: list[Any] = []

    def run(self: launch.Launch, **tensors: Any) -> None:
        found.append((self.kernel.__name__, self.arguments.get("OVERLAP")))

    monkeypatch.setattr(launch.Launch, "run", run)
    rule, lse = Neighborhood.create(2, 5), q.new_empty(q.shape[:-1], dtype=torch.float32)
    for inputs, expected in (
        (Inputs(q, q, q), [True, True]),
        (Inputs(apart, q, q, None, keys[:, 0], keys[:, 0]), [True, True, True]),
        # Tables are made before.
        (Inputs(q, q, q, q.new_empty(4, 9, 9)), [True, True]),
        # One kernel makes dQ and the bias's gradient.
        (Inputs(narrow, narrow, narrow, q.new_empty(4, 9, 9)), [None, True]),
    ):
        found.clear()
        with _Copies(found):
            hopper_fused.backward(inputs.query, None, inputs, inputs.query, lse, rule, 0.1)
        names = [name for name, _ in found]
        tables = names.count("bias_table_kernel")
        after = found[names.index("lse_delta_kernel") + 1 + tables :]
        assert [overlap for _, overlap in after[: len(expected)]] == expected, after


@pytest.mark.parametrize(("dim", "kernels"), [(64, 1), (256, 2)])
def test_passes_on_trial_wait_for_tables_of_a_bias(
    dim: int, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the tiles has tables of its own, which are made between the passes."""
    monkeypatch.setattr(tuning, "wanted", lambda backward: 2)
    monkeypatch.setattr(tuning, "lookup", lambda name: None)
    x, rule = (
        torch.empty(1, 24, 24, 2, dim, dtype=torch.bfloat16, device="meta"),
        Neighborhood.create(2, 5),
    )
    shapes, strides = (x.shape,) * 3, (x.stride(),) * 3
    for bias, overlap in ((None, True), (torch.float32, False)):
        plan = planning.Plan(rule, 0.1, x.device, x.dtype, shapes, strides, 0, bias)
        trials = plan.dkdv
        assert isinstance(trials, launch.Trials) and len(trials.launches) == 2
        for each in trials.launches.values():
            made = each.launch if bias else each
            passes = getattr(made, "launches", [made])
            assert [found.arguments["OVERLAP"] for found in passes] == [overlap] * kernels


def test_masked_scores_are_exact() -> None:
    """A column masked on three axes scores -3 * 2^100: its weight must be one, not infinite."""
    for scale in torch.rand(200).tolist():
        factor = planning._exact_thrice(scale + 0.01)
        assert torch.tensor(factor).item() == factor == pytest.approx(scale + 0.01, rel=1e-6)
        assert (torch.tensor(factor) * 3).item() == factor * 3


def test_strides_that_no_offset_needs_may_be_large() -> None:
    """Coordinates have 32 bits: along axes without groups, and of one head, they are 0."""
    shape = (1, 2, 2**24, 4, 32)
    strides = descriptors.contiguous_strides(shape)
    assert descriptors.view(shape, strides, (1, 1)).steps == (0, 0, 0, 0, 1, 0)
    assert descriptors.view((1, 8, 1, 32), (256, 32, 32, 1), (2,)).steps == (0, 0, 0, 1, 1, 0)


def test_descriptors_are_made_in_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that called nothing of CUDA's runtime yet has none; encoding raised there."""
    called: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    view = descriptors.view((1, 8, 1, 32), (256, 32, 32, 1), (1,))
    tensor = SimpleNamespace(is_cuda=True, device="cuda:1")
    found = descriptors.Describe(view, [1, 1, 1, 8, 32], None)(tensor)  # type: ignore[arg-type]
    assert called == ["cuda:1"] and found.base is tensor


def test_an_older_triton_is_declined_before_gluon_is_imported() -> None:
    code = (
        "import sys, triton; triton.__version__ = '3.2.0'\n"
        "sys.modules['triton.experimental'] = None\n"
        "import torch; from natten import backends\n"
        "torch.cuda.get_device_capability = lambda _: (9, 0)\n"
        "problem = backends.Problem('attention', torch.device('cuda'), torch.bfloat16, 64, 64)\n"
        "print(backends.named('hopper').unsupported(problem))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "not 3.2.0" in done.stdout, done.stderr


def test_compiles_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This variant; `make kernels` compiles the whole list."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
    kernels = importlib.import_module("kernels")
    forward, *others = kernels.compile_target("90a", ["FLUX"])
    assert [each.kernel for each in others] == ["lse_delta", "backward dQ", "backward dK dV"]
    assert forward.spilled == 0
    assert not any(each.problem() for each in (forward, *others))


def test_threads_that_mask_keys_of_their_own_meet_no_barrier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
    compiled, kernels = (importlib.import_module(name) for name in ("compiled", "kernels"))
    target, shared = GPUTarget("cuda", 90, 32), kernels.TARGETS["90a"]
    variants = kernels.variants("90a", ["NAT masked"])
    found = []
    for each in compiled.compile_calls(target, shared, compiled.call_hopper, variants):
        assert not each.looped and not each.serialised
        code = each.asm["ptx"]
        for store in re.finditer(r"st\.shared\.v4\.b32\s+\[.*\], \{0, 0, 0, 0\}", code):
            parted = code.rindex("bra ", 0, store.start())
            assert "bar." not in code[parted : store.start()]
            found.append(each.name)
    # Of keys and of values, 64 rows of four threads each.
    assert found == ["forward"] * 16 + ["backward dQ"] * 16


def test_products_and_copies_are_asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
    compiled, kernels = (importlib.import_module(name) for name in ("compiled", "kernels"))
    target, shared = GPUTarget("cuda", 90, 32), kernels.TARGETS["90a"]
    variants = kernels.variants("90a", ["HDiT"])
    for each in compiled.compile_calls(target, shared, compiled.call_hopper, variants):
        if each.name != "lse_delta":
            assert "wgmma.mma_async" in each.asm["ptx"] and not each.serialised
            code = each.asm["ptx"]
            assert code.count("cp.async.bulk.tensor") >= 4
            fetches, waits, starts = (
                [found.start() for found in re.finditer(pattern, code)]
                for pattern in (
                    r"cp.async.bulk.tensor.*shared::(cluster|cta)\.glo",
                    "griddepcontrol.wait",
                    "griddepcontrol.launch_dependents",
                )
            )
            (start,) = starts  # from where on the next kernel may start
            if each.name == "backward dK dV":  # beside dQ, and for its end it waits last
                assert fetches[-1] < waits[0] < start and len(waits) == 1
                continue
            # Both warps that fetch wait for the kernel before, and first of all.
            assert waits[0] < fetches[0] and any(waits[0] < at < waits[1] for at in fetches)
            if each.name == "backward dQ":  # what dK and dV read is there when they start
                assert waits[1] < start < waits[2] < fetches[-1] and len(waits) == 3
            else:
                assert fetches[-1] < start and len(waits) == 2


# heads, heads of keys, head dim, value dim, additional tokens, dtype, dtype of a bias
TENSORS = [
    (2, 2, 64, 64, 0, torch.bfloat16, None),
    (4, 2, 128, 128, 3, torch.float16, None),
    (2, 1, 32, 256, 130, torch.bfloat16, None),
    (2, 2, 256, 256, 0, torch.float16, torch.float16),
    (2, 1, 64, 512, 7, torch.bfloat16, None),
    (2, 2, 24, 320, 0, torch.float16, torch.float32),
    (4, 2, 96, 72, 5, torch.bfloat16, torch.float32),
    (1, 1, 8, 40, 0, torch.float16, None),
    (2, 1, 20, 12, 5, torch.bfloat16, torch.float32),
    (4, 4, 20, 20, 0, torch.bfloat16, None),
    (2, 2, 44, 44, 0, torch.float16, None),
    (2, 1, 7, 80, 0, torch.float16, None),
    (2, 1, 136, 200, 0, torch.bfloat16, None),
    (3, 1, 32, 32, 0, torch.bfloat16, torch.bfloat16),
    (2, 1, 40, 40, 64, torch.bfloat16, None),  # more than the tokens of a block that is not full
]


def bias_of(rule: Neighborhood, heads: int, dtype: torch.dtype | None) -> torch.Tensor | None:
    """A random bias on the GPU, if it has a dtype."""
    if dtype is None:
        return None
    sizes = [2 * k - 1 for k in rule.kernel_size]
    return torch.randn(heads, *sizes, device="cuda", dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
@pytest.mark.parametrize("tensors", TENSORS)
def test_forward(problem: Any, tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, *parameters = problem
    heads, kv_heads, dim, value_dim, num_additional, dtype, bias_dtype = tensors
    rule, scale = rule_of(shape, *parameters), dim**-0.5
    torch.manual_seed(0)
    packed = torch.randn(2, *shape, heads * dim + kv_heads * (dim + value_dim), device="cuda")
    q, k, v = packed.to(dtype).split([heads * dim, kv_heads * dim, kv_heads * value_dim], -1)
    q, k, v = (x.unflatten(-1, (-1, d)) for x, d in ((q, dim), (k, dim), (v, value_dim)))
    additional = [
        torch.randn(2, num_additional, kv_heads, d, device="cuda", dtype=dtype)
        for d in (dim, value_dim)
    ]
    problem = Problem("attention", q.device, dtype, dim, value_dim, tuple(q.shape), rule, scale)
    reason = hopper.unsupported(problem)
    if reason is not None:
        pytest.skip(reason)
    rpb = bias_of(rule, heads, bias_dtype)
    inputs = Inputs(q, k, v, rpb, *(additional if num_additional else ()))
    double = [None if x is None else x.double() for x in inputs]
    expected, expected_lse = reference.forward(Inputs(*double), rule, scale)
    for tiles in each_way("forward", rule, shape, dim, value_dim):
        key = tiling.key("forward", rule, shape, shape, dim, value_dim, 2)
        results = []
        for processors in (132, 1):  # with one, a program takes many tiles
            monkeypatch.setattr(planning, "_processors", lambda _, n=processors: n)
            with tuning.trial(key, list(tiles)):
                results += [hopper.forward(inputs, rule, scale) for _ in range(2)]
        (out, lse), *others = results
        assert not out.isnan().any() and not lse.isnan().any()
        assert all(torch.equal(out, a) and torch.equal(lse, b) for a, b in others)
        error = (out - expected).square().mean() / expected.square().mean()
        assert error.sqrt() < (1e-2 if dtype == torch.bfloat16 else 2e-3)
        assert (lse - expected_lse).abs().max() < 1e-4


# As above, with whether the LSE has a gradient.
GRADIENTS = [
    (2, 2, 64, 64, 0, False, torch.bfloat16, None),
    (4, 2, 128, 128, 3, True, torch.float16, None),
    (3, 1, 32, 32, 130, True, torch.bfloat16, torch.float32),
    (4, 2, 96, 72, 5, True, torch.bfloat16, torch.bfloat16),
    (1, 1, 24, 8, 0, False, torch.float16, None),
    (2, 1, 64, 512, 7, True, torch.bfloat16, None),
    (2, 2, 256, 200, 0, False, torch.float16, torch.float16),
    (4, 2, 32, 128, 0, True, torch.bfloat16, None),
    (2, 1, 20, 12, 5, True, torch.bfloat16, torch.float32),
    (4, 4, 12, 12, 0, True, torch.bfloat16, None),
    (2, 2, 44, 44, 0, False, torch.float16, None),
    (2, 1, 80, 96, 0, False, torch.float16, None),
    (2, 2, 64, 64, 0, False, torch.float16, torch.float16),
    (2, 1, 32, 24, 0, True, torch.bfloat16, torch.bfloat16),
    (2, 1, 40, 40, 64, False, torch.bfloat16, None),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
@pytest.mark.parametrize("tensors", GRADIENTS)
def test_backward(problem: Any, tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, *parameters = problem
    heads, kv_heads, dim, value_dim, num_additional, has_grad_lse, dtype, bias_dtype = tensors
    rule, scale = rule_of(shape, *parameters), dim**-0.5
    torch.manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device="cuda", dtype=dtype)

    q, k = (random(2, *shape, n, dim) for n in (heads, kv_heads))
    v = random(2, *shape, kv_heads, value_dim)
    additional = [random(2, num_additional, kv_heads, n) for n in (dim, value_dim)]
    rpb = bias_of(rule, heads, bias_dtype)
    inputs = Inputs(q, k, v, rpb, *(additional if num_additional else ()))
    out, lse = hopper.forward(inputs, rule, scale)
    grad_out, grad_lse = random(*out.shape), torch.randn_like(lse) if has_grad_lse else None
    double = [None if x is None else x.double() for x in (grad_out, grad_lse, *inputs)]
    exact_inputs = Inputs(*double[2:])
    exact = reference.forward(exact_inputs, rule, scale)
    expected = reference.backward(*double[:2], exact_inputs, *exact, rule, scale)
    # Pairwise: the passes do not know of each other's tiles. With none, as they are chosen, one
    # kernel may make dQ and the bias's gradient.
    choices = itertools.zip_longest(
        *(each_way(x, rule, shape, dim, value_dim) for x in ("dq", "dkdv"))
    )
    for choice in ((None, None), *choices):
        results = []
        for processors in (132, 1):  # with one, a program takes many tiles
            monkeypatch.setattr(planning, "_processors", lambda _, n=processors: n)
            with contextlib.ExitStack() as stack:
                for kind, tiles in zip(("dq", "dkdv"), choice):
                    key = tiling.key(kind, rule, shape, shape, dim, value_dim, 2)
                    if tiles is not None:
                        stack.enter_context(tuning.trial(key, list(tiles)))
                for _ in range(2):
                    results.append(
                        hopper.backward(grad_out, grad_lse, inputs, out, lse, rule, scale)
                    )
        for name, right, *found in zip("qkvbef", expected, *results):
            if right is None:
                assert found == [None] * 4
                continue
            # As many splits of a sum over all queries run as there are processors for.
            alike = (found[:2], found[2:]) if name in "bef" else (found,)
            for first, *others in alike:
                assert all(torch.equal(first, x) for x in others), name
                error = (first - right).square().mean().sqrt()
                # Inputs are of size 1: gradients that cancel to nothing keep their rounding errors.
                size = right.square().mean().sqrt().clamp(min=0.1)
                assert error < 2 * (1e-2 if dtype == torch.bfloat16 else 2e-3) * size, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [12, 20, 24, 28, 40, 44, 56, 104, 108])
def test_no_number_of_the_next_head(dim: int, masked: bool) -> None:
    """Heads have the same bits beside heads of Inf and NaN as beside zeros, whose channels a block
    may have next to its own; of 12, 20, 28, 44 and 108 channels, odd ones on both sides."""
    rule, scale = Neighborhood.create(2, 7), dim**-0.5
    tensors = [torch.randn(2, 13, 21, 4, dim, device="cuda", dtype=torch.bfloat16) for _ in "qkvg"]
    mask = torch.rand(2, 13, 21, device="cuda") < 0.8 if masked else None

    def every_second(first: int, others: float) -> list[torch.Tensor]:
        q, k, v, grad = [x.clone() for x in tensors]
        for x in (q, k, v, grad):
            x[..., 1 - first :: 2, :] = others
        inputs = Inputs(q, k, v, key_mask=mask)
        out, lse = hopper.forward(inputs, rule, scale)
        grads = hopper.backward(grad, None, inputs, out, lse, rule, scale)[:3]
        every = (out, lse[..., None], *grads)
        return [x[..., first::2, :] for x in every if x is not None]

    for first in (0, 1):
        found = every_second(first, 0.0)
        assert all(x.isfinite().all() for x in found)
        for others in (math.inf, math.nan):
            again = every_second(first, others)
            assert all(torch.equal(a, b) for a, b in zip(found, again))


# heads, heads of keys, head dim, value dim, additional tokens, dtype, dtype of a bias
MASKED = [
    (2, 2, 64, 64, 0, torch.bfloat16, None),
    (4, 2, 128, 128, 130, torch.float16, None),
    (2, 1, 32, 32, 3, torch.bfloat16, torch.bfloat16),
    (2, 1, 32, 24, 0, torch.float16, torch.float32),
    (2, 1, 256, 40, 5, torch.bfloat16, None),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
@pytest.mark.parametrize("tensors", MASKED)
def test_masks(problem: Any, tensors: Any) -> None:
    shape, *parameters = problem
    heads, kv_heads, dim, value_dim, num_additional, dtype, bias_dtype = tensors
    rule, scale = rule_of(shape, *parameters), dim**-0.5
    torch.manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(2, *sizes, device="cuda", dtype=dtype)

    def mask(*sizes: int) -> torch.Tensor:
        return torch.rand(2, *sizes, device="cuda") < 0.6

    q, k = random(*shape, heads, dim), random(*shape, kv_heads, dim)
    v, rpb = random(*shape, kv_heads, value_dim), bias_of(rule, heads, bias_dtype)
    inputs = Inputs(q, k, v, rpb, key_mask=mask(*shape))
    if num_additional:
        additional = [random(num_additional, kv_heads, n) for n in (dim, value_dim)]
        inputs = inputs._replace(
            additional_keys=additional[0], additional_values=additional[1],
            additional_mask=mask(num_additional),
        )  # fmt: skip
    problem_of = Problem.of("gradient", inputs, rule, scale)
    backends = hopper, hopper if hopper.unsupported(problem_of) is None else triton
    check_masks(inputs, rule, scale, backends)


BIASED = {"dtype": torch.float32}
WITH_MASKS: dict[str, tuple[Any, ...]] = {
    "windows": ((24, 36), Neighborhood.create(2, 7), 64, {}),
    "a row": ((37, 67), Neighborhood.create(2, (37, 65)), 64, {}),
    "a row of all": ((37, 67), Neighborhood.create(2, (37, 67)), 64, {}),
    "a row, dS in memory": ((50, 61), Neighborhood.create(2, (48, 57)), 128, {}),
    "plain": ((1000,), Dense(), 64, {}),
    "plain, dS in memory": ((4096,), Dense(), 128, {}),
    "bias": ((64, 64), Neighborhood.create(2, 13), 64, BIASED),
    "dQ and the bias's gradient": ((28, 28), Neighborhood.create(2, 7), 32, BIASED),
}


@pytest.mark.parametrize("name", WITH_MASKS)
def test_a_mask_does_not_decide_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask, however it lies, the same kernels with the same tiles run, in the same order."""
    shape, rule, dim, of_bias = WITH_MASKS[name]
    launched: list[Any] = []
    constants = "TILE", "BLOCK", "BLOCKS", "WARPGROUPS", "MASK", "PASS", "LEAVE_DS", "HAS_DQ"

    def keep(self: launch.Launch, **_: Any) -> None:
        chosen = [(key, self.arguments[key]) for key in constants if key in self.arguments]
        launched.append((self.kernel.__name__, self.grid[1:], chosen))

    monkeypatch.setattr(launch.Launch, "run", keep)
    q = torch.empty(8, *shape, 8, dim, dtype=torch.bfloat16, device="meta")
    rpb = None
    if of_bias:
        rpb = q.new_empty(8, *(2 * k - 1 for k in rule.kernel_size), **of_bias)
    mask = q.new_empty(8, *shape, dtype=torch.bool)
    backwards = q.new_empty(8, *shape[::-1], dtype=torch.bool)
    masks = None, mask, mask[:1], backwards.permute(0, *range(len(shape), 0, -1))
    runs = []
    for key_mask in masks:
        inputs = Inputs(q, q, q, rpb, key_mask=key_mask)
        out, lse = hopper.forward(inputs, rule, 0.1)
        hopper.backward(out, None, inputs, out, lse, rule, 0.1)
        runs.append(launched.copy())
        launched.clear()
    assert all(each == runs[0] for each in runs) and len(runs[0]) >= 4
    kernels = {kernel for kernel, *_ in runs[0]}
    assert ("columns_kernel" in kernels) == (name in ("a row", "a row, dS in memory"))
    assert ("dq_from_ds_kernel" in kernels) == ("dS in memory" in name)
    assert any(dict(chosen).get("HAS_DQ") for *_, chosen in runs[0]) == name.startswith("dQ and")


def test_layouts_whose_masks_are_too_large_are_left_to_triton() -> None:
    tensors = "attention", torch.device("cuda"), torch.bfloat16, 64, 64
    for n, said in ((2**29, None), (2**29 + 2, "numbers the keys of a mask with 29 bits")):
        rule = Neighborhood.create(1, 9, 1, 1)
        problem = Problem(*tensors, (1, n, 1, 64), rule, key_shape=(n,), masked=True)
        assert hopper.lacks(problem) == said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_errors_are_those_of_cudnn(dim: int) -> None:
    """A window over everything is dense attention: we may be off by a tenth more than cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    shape, heads = (32, 48), 4
    rule = rule_of(shape, shape, 1, 1, False)
    tensors = [
        torch.randn(2, *shape, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    ]
    q, k, v, grad = tensors
    inputs, exact_inputs = Inputs(q, k, v), Inputs(q.double(), k.double(), v.double())
    exact = reference.forward(exact_inputs, rule, dim**-0.5)
    right = reference.backward(grad.double(), None, exact_inputs, *exact, rule, dim**-0.5)
    out, lse = hopper.forward(inputs, rule, dim**-0.5)
    ours = (out, *hopper.backward(grad, None, inputs, out, lse, rule, dim**-0.5)[:3])
    leaves = [x.flatten(1, 2).transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        dense = torch.nn.functional.scaled_dot_product_attention(*leaves)
        grads = torch.autograd.grad(dense, leaves, grad.flatten(1, 2).transpose(1, 2))
    theirs = [x.transpose(1, 2).unflatten(1, shape) for x in (dense, *grads)]
    for name, a, b, expected in zip("oqkv", ours, theirs, (exact[0], *right[:3])):
        errors = [(x - expected).square().mean().sqrt() for x in (a, b)]
        assert errors[0] <= 1.1 * errors[1], name
