"""The forward kernel of small windows: what has it, and whether its blocks are enough."""

from __future__ import annotations

import math
import random

import pytest
import torch
from helpers import assert_close

from natten import na2d
from natten.backends import Problem, named
from natten.functional import neighborhood_attention_generic
from natten.neighborhood import Dense, Neighborhood
from natten.tiling import reach

small = pytest.importorskip("natten.backends.triton.small_tiles")
tiling = pytest.importorskip("natten.backends.triton.tiles")
plans = pytest.importorskip("natten.backends.triton.plan")

NAT = Neighborhood.create(2, 7)


def drawn(draw: random.Random, rank: int) -> tuple[Neighborhood, tuple[int, ...]]:
    axes = []
    for _ in range(rank):
        boundary, d = draw.choice(("shift", "truncate", "circular")), draw.choice((1, 1, 2))
        n = draw.randint(1, 60 // rank) * d
        k = draw.randint(1, min(n // d, 9))
        s = draw.choice((1, 1, draw.randint(1, k)))
        n = -(-n // (s * d)) * s * d if boundary == "circular" else n + draw.choice((0, 0, 1))
        axes.append((n, k, s, d, boundary != "circular" and draw.random() < 0.3, boundary))
    shape, *parameters = zip(*axes)
    return Neighborhood.create(rank, *parameters), shape


def test_blocks_and_halo_hold_what_tiles_reach():
    """Wherever a program's tiles are, each warp's blocks hold its windows, and the halo holds the
    blocks; a size less would not do for all."""
    draw = random.Random(0)
    tight = 0
    for number in range(300):
        rank = 1 + number % 3
        rule, shape = drawn(draw, rank)
        tiles = draw.choice(small._every(rank))
        windows = small.windows_of(rule)
        blocks, halo = tiles.blocks(windows), tiles.halo(windows)
        for axis, at in enumerate(range(3 - rank, 3)):
            q, kv, warps = tiles.q_block[at], tiles.kv_block[at], tiles.warps[at]
            first, end = reach(rule.of_axis(axis), 0, shape[axis], shape[axis], 0, False)
            last = len(first) - 1
            for begin in range(0, last + 1, q * warps):
                for tile in range(begin, begin + q * warps, q):
                    low, high = first[min(tile, last)], end[min(tile + q - 1, last)]
                    assert high - low <= blocks[at] * kv
                    assert low - first[begin] + blocks[at] * kv <= halo[at]
                    tight += int(high - low > (blocks[at] - 1) * kv)
        assert halo[2] % 8 == 0 and halo[:2] >= blocks[:2]
    assert tight > 1000


def test_blocks_of_a_window():
    """56x56 tokens with windows of 7x7, in tiles of 2x8 queries."""
    tiles = small.SmallTiles((1, 2, 8), (1, 8, 16), (1, 4, 1))
    windows = small.windows_of(NAT)
    assert (tiles.blocks(windows), tiles.halo(windows)) == ((1, 1, 1), (1, 14, 16))
    assert tiles.program() == (1, 8, 8)
    assert small.shared_bytes(14 * 16, 32, 2) == 2 * 256 * 32 * 2
    assert small.shared_bytes(14 * 16, 32, 4) == 2 * 224 * 32 * 4


SIZES = (56, 56), (56, 56), 32, 32, 2, False, 0.2


def test_choice():
    cycles, tiles = small.choose(NAT, *SIZES)
    assert tiles == small.SmallTiles((1, 2, 8), (1, 8, 16), (1, 4, 1))
    assert cycles < tiling.forward_cycles(NAT, *SIZES[:-1])
    for fine in (Neighborhood.create(2, 7, queries_per_key=2), Dense()):
        assert small.choose(fine, *SIZES) is None
    # Parts of about one size have the same tiles, whatever the keys.
    part = Neighborhood.create(2, 7, query_offset=0)
    found = {small.choose(part, (n, 56), *SIZES[1:]) for n in (25, 26, 28)}
    assert len(found) == 1 and None not in found
    longer = (28, 56), (99, 77), *SIZES[2:]
    assert small.choose(part, *longer) in found
    for at, value in ((2, 24), (2, 128), (3, 64), (4, 4), (6, -0.2), (6, 0.0), (6, 1e-30)):
        sizes = list(SIZES)
        sizes[at] = value
        assert small.choose(NAT, *sizes) is None, (at, value)
    # Narrower heads have the products of wider ones, if whole words of their numbers are copied.
    for dim in (18, 20, 24):
        more, same = small.choose(NAT, *SIZES[:2], dim, dim, *SIZES[4:])
        assert more > cycles and same == tiles
    assert small.choose(NAT, *SIZES[:2], 21, 21, *SIZES[4:]) is None
    # Most of a halo is waste where windows are large, and the largest fit nowhere.
    for window in (40, (1, 2**30)):
        rule = Neighborhood.create(2, window, boundary="truncate")
        assert small.choose(rule, *SIZES) is None


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 0])
def test_choice_by_gpu(monkeypatch, capability):
    monkeypatch.setattr(tiling, "gpu", lambda: tiling.gpu_of(capability))
    found = small.choose(NAT, *SIZES)
    assert (found is None) == (capability == 0)
    if found is not None:
        halo = found[1].halo(small.windows_of(NAT))
        keys = halo[0] * halo[1] * halo[2]
        assert 2 * small.shared_bytes(keys, 32, 2) < tiling.SHARED_MEMORY[capability]


def test_room():
    """Of 32-bit numbers for a halo in memory, and of the grid."""
    halo = small.SmallTiles((1, 2, 8), (1, 8, 16), (1, 4, 1)).halo(small.windows_of(NAT))
    ring = Neighborhood.create(2, 7, boundary="circular")
    shape, grid = (50_000, 50_000), (1, 1, 1)
    assert small.has_room(halo, NAT, shape, (50_000 * 32, 32), grid)
    assert not small.has_room(halo, ring, shape, (50_000 * 32, 32), grid)
    assert not small.has_room(halo, NAT, shape, (2**28, 32), grid)
    assert not small.has_room(halo, NAT, shape, (1, 1), (1, 1, 70_001))
    # Three planes of 8x8 keys are copied as 256 rows, the last ones of a fourth plane.
    video, shape = Neighborhood.create(3, 3), (9, 9, 9)
    assert small.has_room((3, 8, 8), video, shape, (2**28, 9, 1), grid)
    assert not small.has_room((3, 8, 8), video, shape, (2**29, 9, 1), grid)


def plan(query: torch.Tensor, key: torch.Tensor, rule: Neighborhood = NAT, **options):
    masks = options.get("key_mask"), None
    others = options.get("rpb"), options.get("additional")
    return plans.plan_for(
        query, key, key, *others, rule, 0.2, None, options.get("tiles", ()), masks
    )


def test_plan(monkeypatch):
    """A plan has the kernel only of what it computes."""
    query = torch.empty(2, 56, 56, 4, 32, dtype=torch.bfloat16, device="meta")
    launch = plan(query, query).small
    assert launch.grid == (49, 1, 8) and launch.options["num_warps"] == 4
    assert launch.arguments["BLOCKS"] == (1, 1, 1) and not launch.arguments["HAS_RPB"]
    bias = query.new_empty(4, 13, 13)
    assert plan(query, query[..., :2, :], rpb=bias).small.arguments["HAS_RPB"]
    mask = torch.empty(2, 56, 56, dtype=torch.bool, device="meta")
    launch = plan(query, query, key_mask=mask).small
    assert launch.arguments["HAS_KEY_MASK"] and launch.arguments["m_1"] == 56
    far_apart = torch.empty(1, 1, dtype=torch.bool, device="meta").as_strided(
        (2, 56, 56), (1, 1, 2**28)
    )
    dilated = Neighborhood.create(2, 7, dilation=(2, 3))
    launch = plan(query, query, dilated).small
    assert launch.grid[1] == 6 and launch.arguments["DILATED"]
    assert plan(query.float(), query.float()).small is None
    monkeypatch.setattr(tiling, "allows_tf32", lambda: True)
    found = plan(query.float()[..., :1, :], query.float()).small
    assert math.prod(found.arguments["KV_BLOCK"]) <= 64 and found.arguments["CHUNK"] == 32
    for without in (
        plan(query, query, key_mask=far_apart),
        plan(query, query, additional=query.new_empty(2, 3, 4, 32)),
        plan(query, query, tiles=(8, 8, 4, 16)),
        plan(query, query.new_empty(2, 56, 56, 4, 33)[..., :32]),
    ):
        assert without.small is None


def test_plans_of_parts():
    """Another part runs the same kernel with other numbers, if there is room for it."""
    keys = torch.empty(2, 70, 60, 4, 32, dtype=torch.bfloat16, device="meta")

    mask = torch.empty(2, 70, 60, dtype=torch.bool, device="meta")

    def part(rows, columns, length, at):
        rule = Neighborhood.create(2, 7, query_offset=at)
        queries = keys[:, :rows, :columns].contiguous()
        return plan(queries, keys[:, :length], rule, key_mask=mask[:, :length]).small

    first = part(28, 56, 56, (28, 0))
    assert first.arguments["PART"] and first.grid == (28, 1, 8)
    for rows, columns, length, at in (
        (28, 56, 56, (3, 0)),
        (27, 56, 70, (41, 4)),
        (25, 50, 31, (6, 1)),
    ):
        other = part(rows, columns, length, at)
        assert other._kernels is first._kernels
        numbers = [other.arguments[name] for name in ("P1", "P2", "L1", "L2", "KEY_L1", "KEY_L2")]
        assert numbers == [*at, rows, columns, length, 60]
        tiles = small.SmallTiles(*(other.arguments[n] for n in ("Q_BLOCK", "KV_BLOCK", "WARPS")))
        _, down, across = tiles.program()
        assert other.grid == (-(-rows // down) * -(-columns // across), 1, 8)
        assert other.arguments["T2"] == -(-columns // across)
        assert other.arguments["m_b"] == 70 * 60


def test_hopper_leaves_small_windows_to_it():
    hopper = named("hopper")

    def slower(shape, rule, batch=8, dim=16, **options):
        query = (batch, *shape, 4, dim)
        given = {"scale": 0.2, "key_shape": shape, "rule": rule, **options}
        return hopper.slower(
            Problem("attention", torch.device("cuda"), torch.bfloat16, dim, dim, query, **given)
        )

    dilated = Neighborhood.create(2, 7, dilation=16)
    assert "small windows" in slower((512, 512), dilated)
    assert "small windows" in slower((512, 512), dilated, masked=True)
    assert slower((512, 512), dilated, bias=True) is None
    assert slower((512, 512), dilated, batch=2**14) is None
    assert slower((512, 512), dilated, additional=True) is None
    assert slower((64, 64), Neighborhood.create(2, 31)) is None
    assert slower((64,), Dense()) is None
    # Copies of heads that TMA can not read take longer than what the kernel saves otherwise.
    nat = Neighborhood.create(2, 7)
    assert "small windows" in slower((56, 56), nat, dim=20)
    assert slower((56, 56), nat, dim=24) is None
    assert slower((64, 64), Neighborhood.create(2, 31), dim=20) is None


# --- on a GPU -----------------------------------------------------------------------------------

# A layout, channels, whether there is a bias, and the rule.
ON_GPU = {
    "plain": ((23, 37), 32, False, {"kernel_size": 7}),
    "bias": ((23, 37), 32, True, {"kernel_size": 7}),
    "dilated": ((29, 40), 16, False, {"kernel_size": (7, 5), "dilation": (2, 3)}),
    "dilated bias": ((29, 40), 16, True, {"kernel_size": (7, 5), "dilation": (2, 3)}),
    "strided": ((30, 37), 32, False, {"kernel_size": (7, 8), "stride": (2, 3)}),
    "causal": ((23, 37), 64, False, {"kernel_size": 7, "is_causal": (True, False)}),
    "truncated": ((23, 37), 16, False, {"kernel_size": (5, 7), "boundary": "truncate"}),
    "ring": ((24, 38), 32, True, {"kernel_size": (5, 7), "boundary": "circular"}),
    "video": (
        (9, 12, 17),
        32,
        False,
        {"kernel_size": (3, 5, 5), "is_causal": (True, False, False)},
    ),
    "row": ((500,), 64, True, {"kernel_size": 33}),
    "part": ((23, 37), 32, True, {"kernel_size": 7, "query_offset": (5, 0)}),
    "dilated part": (
        (29, 40),
        16,
        False,
        {"kernel_size": (7, 5), "dilation": (2, 3), "query_offset": (3, 7)},
    ),
}
PART = (18, 31)  # queries
MASKED = ("bias", "dilated", "strided", "ring", "video", "row", "dilated part")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ON_GPU)
def test_on_gpu(monkeypatch, name, dtype):
    """Output and LSE against float64, of two query heads a key head. bfloat16 rounds to 2**-9. TF32
    cuts off what is below 2**-10, so that errors of a sum do not cancel. What is masked is NaN, and
    a mask of ones changes no bit."""
    shape, dim, with_bias, options = ON_GPU[name]
    rule = Neighborhood.create(len(shape), **options)
    monkeypatch.setattr(tiling, "forward_cycles", lambda *_: float("inf"))
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    torch.manual_seed(0)
    new = {"dtype": dtype, "device": "cuda"}
    queries = shape if rule.query_offset is None else PART
    query = torch.randn(2, *queries, 4, dim, **new)
    key, value = (torch.randn(2, *shape, 2, dim, **new) for _ in range(2))
    bias = None
    if with_bias:
        bias = torch.randn(4, *(2 * k - 1 for k in rule.kernel_size), **new)
        bias[0] = -300.0
        bias[1].masked_fill_(torch.rand_like(bias[1]) < 0.5, -torch.inf)
    for name_of_cache in ("_cached_plan", "parts_of"):
        monkeypatch.setattr(plans, name_of_cache, getattr(plans, name_of_cache).__wrapped__)

    def run(mask):
        found = plans.plan_for(query, key, value, bias, None, rule, dim**-0.5, masks=(mask, None))
        if found.small is None:
            pytest.skip("no halo fits in this GPU's shared memory")
        out = torch.full_like(query, torch.nan)
        lse = torch.full(query.shape[:-1], torch.nan, device="cuda")
        found.small.run(
            query=query, key=key, value=value, rpb=bias, out=out, lse=lse, key_mask=mask
        )
        return out, lse

    mask = None
    if name in MASKED:
        every = torch.ones(1, *shape, dtype=torch.bool, device="cuda")
        assert all(map(torch.equal, run(every), run(None)))
        mask = torch.rand(2, *shape, device="cuda") < 0.3
        key[~mask], value[~mask] = torch.nan, torch.nan
    exact = [None if x is None else x.double() for x in (query, key, value, bias)]
    expected = neighborhood_attention_generic(
        *exact[:3], rpb=exact[3], key_mask=mask, return_lse=True, backend="reference", **options
    )
    for a, b in zip(expected, run(mask)):
        assert_close(name, a, b, 1e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.gpu
def test_windows_with_nothing_to_attend(monkeypatch):
    """A bias of -inf everywhere leaves nothing."""
    monkeypatch.setattr(tiling, "forward_cycles", lambda *_: float("inf"))
    query = torch.randn(1, 16, 16, 2, 32, dtype=torch.bfloat16, device="cuda")
    bias = torch.full((2, 13, 13), -torch.inf, dtype=query.dtype, device="cuda")
    out, lse = na2d(query, query, query, 7, rpb=bias, backend="triton", return_lse=True)
    assert not out.any() and torch.isneginf(lse).all()


@pytest.mark.gpu
def test_tensors_that_16_bytes_do_not_divide(monkeypatch):
    """Another kernel reads them."""
    monkeypatch.setattr(tiling, "forward_cycles", lambda *_: float("inf"))
    query = torch.randn(1, 16, 16, 2, 32, dtype=torch.bfloat16, device="cuda")
    moved = torch.cat([query.new_zeros(1), query.flatten()])[1:].view(query.shape)
    expected, actual = (na2d(x, x, x, 7, backend="triton") for x in (query, moved))
    assert_close("output", expected, actual, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dim, window, with_bias", [(32, 7, True), (64, 13, False)])
def test_gradients_rounded_to_tf32(monkeypatch, dim, window, with_bias):
    """Output and gradients against float64. TF32 cuts off what is below 2**-10 of a number; a
    gradient is of four products in a row."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    torch.manual_seed(0)
    leaves = [torch.randn(2, 29, 37, 2, dim, device="cuda") for _ in range(3)]
    if with_bias:
        leaves.append(torch.randn(2, 2 * window - 1, 2 * window - 1, device="cuda"))
    grad = torch.randn_like(leaves[0])
    found = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        given = [x.to(dtype).requires_grad_() for x in leaves]
        out = na2d(*given[:3], window, rpb=given[3] if with_bias else None, backend=backend)
        found.append((out, *torch.autograd.grad(out, given, grad.to(dtype))))
    for a, b in zip(*found):
        assert_close("output or gradient", a, b, 6e-3)


@pytest.mark.gpu
def test_with_a_backward_of_another_kernel():
    """Output and gradients, by the backends of the default and by others."""
    leaves = [torch.randn(8, 56, 56, 2, 32).bfloat16().cuda().requires_grad_() for _ in range(3)]
    grad = torch.randn_like(leaves[0])
    expected, actual = (
        (out, *torch.autograd.grad(out, leaves, grad))
        for out in (na2d(*leaves, 7, backend="tiled"), na2d(*leaves, 7))
    )
    for a, b in zip(expected, actual):
        assert_close("output or gradient", a, b, 2e-2)
