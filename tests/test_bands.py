"""The kernels of bands: what has them, whether lines are long enough, and numbers on a GPU."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import assert_close, triton
from masked import check_masks
from test_small import drawn

from natten.functional import neighborhood_attention_generic
from natten.inputs import Inputs
from natten.neighborhood import Dense, Neighborhood
from natten.tiling import group_kinds, reach

bands = pytest.importorskip("natten.backends.triton.band_tiles")
tiling = pytest.importorskip("natten.backends.triton.tiles")
plans = pytest.importorskip("natten.backends.triton.plan")

HDIT = Neighborhood.create(2, 13)
SIZES = (64, 64), (64, 64), 64, 64, 4, False, 0.125


def test_lines_hold_what_rows_reach():
    """Wherever a warp's blocks begin, none ends beyond a line, and they hold what its rows reach; a
    line half as long would not do for all."""
    draw = random.Random(0)
    tight = 0
    for number in range(60):
        rule, shape = drawn(draw, 2 + number % 2)
        axis = rule.of_axis(rule.rank - 1)
        for of_keys in (False, True):
            tile, block = draw.choice((1, 2, 4, 8)), draw.choice((8, 16, 32))
            *_, need = bands._along_line(axis, shape[-1], of_keys, tile, block)
            for group, _ in group_kinds(shape[-1], axis.dilation[0]):
                first, end = reach(axis, 0, shape[-1], shape[-1], group, of_keys)
                last = len(first) - 1
                for begin in range(0, last + 1, bands.WARPS * tile):
                    rows = range(begin, min(begin + bands.WARPS * tile, last + 1))
                    blocks = max(
                        -(-(end[min(i + tile - 1, last)] - first[i]) // block) for i in rows[::tile]
                    )
                    for i in rows[::tile]:
                        start = min(first[i] - first[begin], need - blocks * block)
                        assert start >= 0
                        stop = end[min(i + tile - 1, last)] - first[begin]
                        assert stop <= start + blocks * block <= need
                        tight += int(2 * stop > need)
    assert tight > 100


def test_choice(monkeypatch):
    monkeypatch.setattr(tiling, "allows_tf32", lambda: True)
    tiles = bands.choose("forward", HDIT, *SIZES)
    assert tiles == bands.BandTiles((1, 4, 4), (1, 2, 16), 32)
    assert tiles.program() == (1, 4, 16) and tiles.shared_bytes(64) == 65536
    wider = (30, 30), (30, 30), 32, 32, 4, False, 0.125
    assert bands.choose("dq", Neighborhood.create(2, 15), *wider)
    assert not bands.choose("dkdv", Neighborhood.create(2, 15), *wider)  # more pairs
    row = (1, 64)
    for rule, (shape, key_shape, *sizes) in (
        (Dense(), SIZES),
        (Neighborhood.create(2, 13, queries_per_key=2), SIZES),
        (Neighborhood.create(2, 13, query_offset=(0, 4)), SIZES),
        (Neighborhood.create(2, 200), ((256, 256), (256, 256), *SIZES[2:])),  # longer lines
        (Neighborhood.create(2, (1, 13)), (row, row, *SIZES[2:])),
        (HDIT, (*SIZES[:2], 128, 128, *SIZES[4:])),
        (HDIT, (*SIZES[:2], 64, 32, *SIZES[4:])),
        (HDIT, (*SIZES[:4], 2, False, 0.125)),
        (HDIT, (*SIZES[:4], 4, True, 0.125)),
        (HDIT, (*SIZES[:-1], -0.125)),
    ):
        assert bands.choose("forward", rule, shape, key_shape, *sizes) is None
    monkeypatch.setattr(tiling, "allows_tf32", lambda: False)
    assert bands.choose("forward", HDIT, *SIZES) is None


# A layout, query heads and key heads, channels, and the rule.
ON_GPU = {
    "wide": ((29, 37), 4, 2, 64, {"kernel_size": 13}),
    "dilated": ((29, 37), 4, 2, 32, {"kernel_size": (7, 5), "dilation": 2}),
    "ring": (
        (24, 40),
        2,
        1,
        64,
        {"kernel_size": (5, 8), "stride": (1, 4), "boundary": "circular"},
    ),
    "video": (
        (7, 9, 20),
        2,
        2,
        32,
        {"kernel_size": (3, 5, 5), "is_causal": (True, False, False)},
    ),
    "truncated": ((13, 60), 2, 1, 32, {"kernel_size": (3, 15), "boundary": "truncate"}),
}


@pytest.fixture
def always(monkeypatch):
    """Bands run wherever they have room."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    monkeypatch.setattr(bands, "pays", lambda *_: True)
    monkeypatch.setattr(plans.Plan, "_shares", lambda *_: None)
    monkeypatch.setattr(plans, "_cached_plan", plans._cached_plan.__wrapped__)


@pytest.mark.gpu
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", ON_GPU)
def test_on_gpu(name):
    """Output and gradients against float64, and the same bits in every run. TF32 cuts off what is
    below 2**-10 of a number; a gradient is of four products in a row."""
    shape, heads, kv_heads, dim, options = ON_GPU[name]
    rule = Neighborhood.create(len(shape), **options)
    torch.manual_seed(0)
    query, grad = (torch.randn(2, *shape, heads, dim, device="cuda") for _ in range(2))
    key, value = (torch.randn(2, *shape, kv_heads, dim, device="cuda") for _ in range(2))
    inputs = {"query": query, "key": key, "value": value}
    plan = plans.plan_for(*inputs.values(), None, None, rule, dim**-0.5)
    if plan.bands_forward is None or plan.bands_dq is None or plan.bands_dkdv is None:
        pytest.skip("no band fits in this GPU's shared memory")

    def run():
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:-1])
        lse_delta = query.new_empty(*lse.shape, 4)
        grads = [torch.empty_like(x) for x in inputs.values()]
        given = {**inputs, "key_mask": None}
        plan.bands_forward.run(**given, out=out, lse=lse)
        plan.bands_dq.run(
            **given, out=out, lse=lse, grad_out=grad, lse_delta=lse_delta, grad_query=grads[0]
        )
        plan.bands_dkdv.run(
            **given, grad_out=grad, lse_delta=lse_delta, grad_key=grads[1], grad_value=grads[2]
        )
        return out, *grads

    exact = [x.double().requires_grad_() for x in inputs.values()]
    out = neighborhood_attention_generic(*exact, backend="reference", **options)
    found = run()
    for a, b in zip((out, *torch.autograd.grad(out, exact, grad.double())), found):
        assert_close(name, a, b, 6e-3)
    assert all(map(torch.equal, found, run()))


@pytest.mark.gpu
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", ON_GPU)
def test_masks_on_gpu(name):
    shape, heads, kv_heads, dim, options = ON_GPU[name]
    rule = Neighborhood.create(len(shape), **options)
    query, *key_value = (
        torch.randn(2, *shape, each, dim, device="cuda") for each in (heads, kv_heads, kv_heads)
    )
    mask = torch.rand(2, *shape, device="cuda") < 0.7
    inputs = Inputs(query, *key_value, key_mask=mask)
    plan = plans.plan_for(*inputs[:3], None, None, rule, dim**-0.5, masks=(mask, None))
    if plan.bands_forward is None or plan.bands_dq is None or plan.bands_dkdv is None:
        pytest.skip("no band fits in this GPU's shared memory")
    check_masks(inputs, rule, dim**-0.5, (triton, triton), has_grad_lse=False)
