"""The simulator is checked against counting by hand, published bounds, and measured times."""

import csv
import functools
import importlib
import itertools
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from natten.backends.hopper import costs, cuts
from natten.backends.hopper import tiles as hopper
from natten.errors import ArgumentError
from natten.neighborhood import Neighborhood, window_mask
from natten.simulator import (
    DEVICES,
    Device,
    kernels,
    recommend,
    recommended_strides,
    simulate,
    simulate_strides,
)

ROOT = Path(__file__).parents[1]
VIDEO = ((30, 48, 80), (18, 24, 24))  # HunyuanVideo
IMAGE = ((256, 256), (80, 80))  # FLUX at 4K


def count_by_hand(rule, shape, q_tile, kv_tile, aligned, queries=None):
    """Blocks visited, blocks attended in full, and pairs needed, counted token by token."""
    queries = queries or shape
    mask = window_mask(rule, queries, shape)
    query_index = torch.arange(math.prod(queries)).view(queries)
    index = torch.arange(math.prod(shape)).view(shape)
    visited = full = 0
    for group in itertools.product(*(range(d) for d in rule.dilation)):
        own = index[tuple(slice(g, None, d) for g, d in zip(group, rule.dilation))]
        own_queries = query_index
        for axis, g in enumerate(group):
            key = rule.key_tokens(axis, torch.arange(queries[axis]))
            chosen = (key % rule.dilation[axis] == g).nonzero().flatten()
            own_queries = own_queries.index_select(axis, chosen)
        tiles = itertools.product(*(range(0, n, t) for n, t in zip(own_queries.shape, q_tile)))
        for corner in tiles:
            tile = own_queries[tuple(slice(c, c + t) for c, t in zip(corner, q_tile))].flatten()
            attended = mask[tile][:, own.flatten()].view(-1, *own.shape)
            some, every = attended.any(0), attended.all(0)
            first = [int(axis.min()) for axis in some.nonzero().unbind(1)]
            origin = [0] * len(shape) if aligned else first
            blocks = [
                [range(o + i * b, o + (i + 1) * b) for i in range(-(-(n - o) // b))]
                for o, b, n in zip(origin, kv_tile, own.shape)
            ]
            for block in itertools.product(*blocks):
                inside = tuple(slice(r.start, r.stop) for r in block)
                if some[inside].any():
                    visited += 1
                    complete = all(r.stop <= n for r, n in zip(block, own.shape))
                    full += int(complete and bool(every[inside].all()))
    return visited, full, int(mask.sum())


@pytest.mark.parametrize("aligned", [False, True], ids=["free", "aligned"])
@pytest.mark.parametrize(
    "shape, kernel_size, stride, dilation, is_causal, q_tile, kv_tile",
    [
        ((13,), 5, 1, 1, False, (4,), (2,)),
        ((13,), 5, 3, 2, False, (2,), (4,)),
        ((17,), 6, 4, 1, True, (4,), (3,)),
        ((9, 8), (4, 3), (2, 1), (1, 2), (False, True), (2, 2), (2, 1)),
        ((5, 6, 7), (2, 3, 4), (2, 1, 4), 1, (True, False, False), (2, 2, 4), (1, 2, 2)),
    ],
)
def test_counts_are_those_of_the_mask(
    shape, kernel_size, stride, dilation, is_causal, q_tile, kv_tile, aligned
):
    rule = Neighborhood.create(len(shape), kernel_size, stride, dilation, is_causal)
    visited, full, needed = count_by_hand(rule, shape, q_tile, kv_tile, aligned)
    found = simulate(
        shape, kernel_size, stride, dilation, is_causal,
        q_tile=q_tile, kv_tile=kv_tile, aligned=aligned,
    )  # fmt: skip
    pairs = math.prod(q_tile) * math.prod(kv_tile)  # of one tile and one block
    tokens = math.prod(shape)
    assert found.kept == pytest.approx(needed / tokens**2)
    assert found.computed_over_needed == pytest.approx(visited * pairs / needed)
    assert found.full_blocks == pytest.approx(full / visited)
    assert found.tile_bound == pytest.approx(tokens**2 / (visited * pairs))


@pytest.mark.parametrize(
    "shape, window, options, q_tile, kv_tile",
    [
        ((13,), (5,), {"boundary": "truncate"}, (4,), (2,)),
        ((6,), (9, 1, 2), {"boundary": "truncate"}, (2,), (3,)),
        ((12,), (5, 2), {"boundary": "circular"}, (4,), (3,)),
        ((13,), (5, 3, 2), {"query_offset": 3}, (3,), (2,)),
        ((13,), (5, 3, 2), {"query_offset": 5, "query_shape": 3}, (2,), (2,)),
        (
            (13,), (4, 1, 3), {"queries_per_key": 2, "query_offset": 5, "query_shape": 17},
            (4,), (2,),
        ),
        (
            (6, 8), ((4, 3), (2, 1), (1, 2), (True, False)),
            {"boundary": ("truncate", "circular"), "queries_per_key": (1, 3),
             "query_offset": (2, 5), "query_shape": (3, 14)},
            (2, 4), (2, 2),
        ),
    ],
)  # fmt: skip
def test_counts_of_parts_finer_queries_and_borders(shape, window, options, q_tile, kv_tile):
    names = "boundary", "queries_per_key", "query_offset"
    given = {name: options[name] for name in names if name in options}
    rule = Neighborhood.create(len(shape), *window, **given)
    found = simulate(shape, *window, **options, q_tile=q_tile, kv_tile=kv_tile)
    queries = tuple(r * n - o for r, n, o in zip(rule.queries_per_key, shape, rule.offset))
    if "query_shape" in options:
        queries = options["query_shape"]
        queries = (queries,) if isinstance(queries, int) else queries
    # Around a ring, blocks are those of the middle of a longer layout.
    unrolled, margins = rule.unrolled()
    longer = tuple(before + n + after for n, (before, after) in zip(shape, margins))
    visited, full, needed = count_by_hand(unrolled, longer, q_tile, kv_tile, False, queries)
    assert needed == window_mask(rule, queries, shape).sum()
    every, pairs = math.prod(queries) * math.prod(shape), math.prod(q_tile + kv_tile)
    assert found.kept == pytest.approx(needed / every)
    assert found.computed_over_needed == pytest.approx(visited * pairs / needed)
    assert found.full_blocks == pytest.approx(full / visited)
    assert found.tile_bound == pytest.approx(every / (visited * pairs))


def test_a_part_moves_its_own_queries():
    device = Device("toy", tflops=1e3, bandwidth=1e-6, exponentials=1e3)
    layer = {"device": device, "head_dim": 8, "itemsize": 4}
    found = simulate((64,), 2, query_offset=48, **layer)
    assert found.bound_by == "memory"
    assert found.time_us == pytest.approx((2 * 16 + 2 * 64) * 8 * 4 / 1e-6 / 1e6)
    found = simulate((64,), 2, queries_per_key=4, **layer)
    assert found.time_us == pytest.approx((2 * 256 + 2 * 64) * 8 * 4 / 1e-6 / 1e6)


def test_a_window_that_fills_a_ring_is_all_of_it():
    found = simulate((16,), 16, boundary="circular", q_tile=(4,), kv_tile=(8,))
    assert found.kept == found.computed_over_needed == 1 and found.is_full


def test_a_ring_has_strides_that_divide_it():
    ring = {"dilation": 2, "boundary": "circular"}
    assert [each.stride for each in simulate_strides((24,), 6, **ring)] == [
        (1,),
        (2,),
        (3,),
        (4,),
        (6,),
    ]
    assert all(12 % each.stride[0] == 0 for each in recommend((24,), 6, near=0.5, **ring))
    assert (
        max(each.kernel_size[0] for each in recommend((8,), 8, near=0.5, boundary="truncate")) == 12
    )


def test_published_bound_of_hunyuan_video():
    """arXiv 2504.16922 has 11.1x by FLOPs, and 3.3x at stride 1 on a fixed grid."""
    fixed = simulate(*VIDEO, q_tile=(4, 8, 8), kv_tile=(2, 8, 8), aligned=True)
    assert round(fixed.flop_bound, 1) == 11.1
    assert round(fixed.interior_bound, 1) == 3.3
    ours = simulate(*VIDEO)
    assert fixed.interior_bound < fixed.tile_bound < ours.tile_bound < ours.flop_bound


def test_strides_known_to_need_no_mask():
    assert simulate(*VIDEO, stride=(16, 8, 8)).is_full
    assert simulate(*IMAGE, stride=16).is_full
    assert not simulate(*VIDEO).is_full
    # Upstream's documentation says that 256 is the least stride without masks for such tiles.
    tiles = {"q_tile": (256,), "kv_tile": (128,), "aligned": True}
    full = [p.stride for p in simulate_strides((32768,), 2048, **tiles) if p.is_full]
    assert full[0] == (256,)


def measured(name, monkeypatch):
    """For each layer in a file of results, its cases with graph times of the forward pass."""
    path = ROOT / "benchmarks/results" / name
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is not there: strides were not measured yet")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    known = importlib.import_module("cases").CASES["cuda"]
    layers = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["backend"].startswith("natten") and row["pass"] == "forward":
                case = known[row["case"]]
                if row["time"] == "graph" and case.dtype.itemsize == 2:
                    layer = replace(case, name="", stride=1, target=None)
                    layers.setdefault(layer, []).append((case, float(row["median_us"])))
    if not layers:
        pytest.skip(f"{path.relative_to(ROOT)} has no graph times of our forward")
    return layers


@functools.cache
def predicted(case):
    return simulate(
        case.shape, case.kernel_size, case.stride, case.dilation, case.is_causal,
        device="h100", batch=case.batch, heads=case.heads, head_dim=case.dim,
    ).time_us  # fmt: skip


@pytest.mark.parametrize("name", ["strides.csv", "h100.csv"])
def test_the_predicted_order_of_strides_is_the_measured_order(name, monkeypatch):
    """Compared are strides of one layer whose measured times are more than 5 % apart."""
    wrong, compared = [], 0
    for times in measured(name, monkeypatch).values():
        for (fast, a), (slow, b) in itertools.permutations(times, 2):
            if b > 1.05 * a and fast.stride != slow.stride:
                compared += 1
                few, many = predicted(fast), predicted(slow)
                if few >= many:
                    wrong.append(
                        f"measured {fast.name} {a:.0f} < {slow.name} {b:.0f} us, "
                        f"predicted {few:.0f} and {many:.0f}"
                    )
    assert compared and not wrong, "\n".join(wrong)


def test_a_roofline_is_a_lower_bound(monkeypatch):
    for times in measured("h100.csv", monkeypatch).values():
        for case, time_us in times:
            assert predicted(case) < time_us, case.name


def test_every_stride_is_predicted_once():
    predictions = simulate_strides(*VIDEO, heads=24)
    assert {p.stride for p in predictions} == set(
        itertools.product(*(range(1, k + 1) for k in VIDEO[1]))
    )
    assert len(predictions) == math.prod(VIDEO[1])


def test_every_stride_is_what_one_stride_is():
    by_stride = {p.stride: p for p in simulate_strides((12, 10), (6, 5), heads=2)}
    for stride in ((1, 1), (4, 5), (6, 2)):
        assert by_stride[stride] == simulate((12, 10), (6, 5), stride, heads=2)


def test_recommended_strides_are_ever_coarser_and_faster():
    best = recommended_strides(simulate_strides(*IMAGE))
    assert best[0].stride == (1, 1)
    for a, b in itertools.pairwise(best):
        assert math.prod(a.stride) < math.prod(b.stride) and a.time_us > b.time_us


def test_recommendations_are_the_pareto_front():
    shape, wish, near = (24, 20), (8, 7), 0.2
    front = recommend(shape, wish, (1, 2), near=near)
    for a, b in itertools.pairwise(front):
        assert a.kept < b.kept and a.time_us < b.time_us
    limits = [(math.ceil(k * (1 - near)), int(k * (1 + near))) for k in wish]
    every = [
        simulate(shape, window, stride)
        for window in itertools.product(*(range(low, high + 1) for low, high in limits))
        for stride in itertools.product((1, 2, 4), repeat=2)
        if all(s <= max(1, k // 2) for s, k in zip(stride, window))
    ]
    for other in every:
        assert not any(
            other.kept > best.kept * (1 + 1e-6) and other.time_us < best.time_us * (1 - 1e-6)
            for best in front
        ), other


def test_roofline_by_hand():
    device = Device("toy", tflops=1, bandwidth=1, exponentials=1, q_tile=4, kv_tile=4, masking=0.5)
    layer = {"device": device, "batch": 2, "heads": 3, "head_dim": 8, "itemsize": 4}
    found = simulate((64,), 64, **layer)  # dense attention has 4096 pairs and no mask
    assert found.is_full and found.speedup == pytest.approx(1)
    assert found.time_us == pytest.approx(4 * 6 * 4096 * 8 / 1e6)
    assert found.bound_by == "products"
    # There are 16 tiles of 4 queries. With a window of 2, the first needs 4 keys, which are one
    # block, and each other one 5 keys, which are two. All blocks are masked.
    found = simulate((64,), 2, **layer)
    blocks = 16 + 15
    assert found.time_us == pytest.approx(4 * 6 * blocks * 16 * 1.5 * 8 / 1e6)
    slow_memory = Device("toy", tflops=1, bandwidth=1e-3, exponentials=1)
    found = simulate((64,), 2, **(layer | {"device": slow_memory}))
    assert found.bound_by == "memory"
    assert found.time_us == pytest.approx(4 * 6 * 64 * 8 * 4 / 1e-3 / 1e6)


def test_a_causal_axis_keeps_its_triangle():
    found = simulate((8,), 8, is_causal=True)
    assert found.kept == pytest.approx(36 / 64)


def test_tiles_are_no_larger_than_the_device_says():
    for device in DEVICES.values():
        found = simulate((6, 50), (3, 9), device=device, itemsize=4)
        assert found.backend == ""
        assert math.prod(found.q_tile) == device.q_tile
        assert math.prod(found.kv_tile) == device.kv_tile


def test_for_machines():
    found = simulate((8,), 3)
    record = found.as_dict()
    assert record["speedup"] == found.speedup and record["is_full"] == found.is_full
    assert record["kernel_size"] == (3,)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kernel_size": 9}, r"axis 0, 9 \* 1 > 8"),
        ({"device": "abacus"}, "`device`.*'abacus'"),
        ({"heads": 0}, "`heads`.*0"),
        ({"q_tile": (4, 4)}, "`q_tile`"),
        ({"kv_tile": (0,)}, "`kv_tile`"),
        ({"q_tile": 4.0}, "`q_tile`.*4.0"),
        ({"heads": "2"}, "`heads`.*'2'"),
        ({"batch": 1.5}, "`batch`.*1.5"),
        ({"device": None}, "`device`.*None"),
        ({"boundary": "mirror"}, "`boundary`.*'mirror'"),
        ({"boundary": "circular", "is_causal": True}, "`boundary`.*ring"),
        ({"query_offset": 8}, "`query_offset` must leave"),
        ({"query_offset": 4, "query_shape": 5}, r"axis 0, \(?4.* > 1 \* 8"),
        ({"query_offset": 4, "query_shape": (2, 2)}, "`query_shape`"),
        ({"query_shape": 4}, "`query_offset` is for queries that are a part"),
        ({"query_offset": 4, "aligned": True}, "`aligned`"),
        ({"queries_per_key": 2, "aligned": True}, "`aligned`"),
        ({"boundary": "circular", "aligned": True}, "`aligned`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        simulate((8,), **({"kernel_size": 3} | arguments))


@pytest.mark.parametrize("shape", ["8", (8.0,), (), (2, 2, 2, 2), (0,)], ids=str)
def test_bad_shapes(shape):
    with pytest.raises(ArgumentError, match="`shape`"):
        simulate(shape, 1)


def test_one_axis_may_be_a_number():
    assert simulate(8, 3) == simulate((8,), 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"tflops": 0}, {"bandwidth": math.inf}, {"exponentials": math.nan}, {"q_tile": 100},
        {"kv_tile": 0}, {"masking": -1}, {"backend": "abacus"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_devices(changes):
    with pytest.raises(ArgumentError, match=f"`{next(iter(changes))}`"):
        replace(DEVICES["h100"], **changes)


def test_bad_near():
    with pytest.raises(ArgumentError, match="`near`"):
        recommend((8,), 3, near=1)


def test_tile_shapes_fit_the_layout():
    assert kernels.tile_shapes(64, (3, 5)) == [(4, 16)]


# Layers that the Hopper backend runs, as (shape, window, dilation, causal, head dim).
HOPPER = [
    ((512,), 33, 1, True, 64),
    ((56, 56), 7, 1, False, 32),
    ((64, 48), (13, 16), (2, 1), (True, False), 128),
    ((16, 32, 24), (7, 8, 12), 1, False, 256),
    ((30, 48, 80), (18, 24, 24), 1, False, 128),
    ((8, 24, 32), (3, 4, 8), (1, 2, 2), (False, False, True), 64),
]


@pytest.mark.parametrize("layer", HOPPER, ids=lambda layer: "x".join(map(str, layer[0])))
def test_the_tiles_are_those_that_the_hopper_backend_estimates_to_be_cheapest(layer):
    shape, kernel_size, dilation, is_causal, dim = layer
    options = {"dilation": dilation, "is_causal": is_causal, "head_dim": dim, "device": "h200"}
    every = {each.stride: each for each in simulate_strides(shape, kernel_size, **options)}
    finest, coarsest = min(every), max(every)
    for stride in (finest, *random.Random(0).sample(sorted(every), min(5, len(every))), coarsest):
        rule = Neighborhood.create(len(shape), kernel_size, stride, dilation, is_causal)
        search = hopper._Search("forward", rule, shape, shape, dim, dim)
        search.uneven = []  # it tries powers of two only
        _, chosen = search.cheapest()
        computed = hopper.computed_pairs("forward", rule, shape, shape, chosen)
        work = costs.work("forward", dim, dim)
        mask = costs.mask("forward", rule, shape, shape, chosen, work)
        found = every[stride]
        missing = 3 - len(shape)
        groups = cuts.warpgroups(chosen)
        split = [groups if axis == chosen.split_axis else 1 for axis in range(3)]
        tile = tuple(q * n for q, n in zip(chosen.q_block, split))
        assert found.backend == "hopper"
        assert (found.q_tile, found.kv_tile) == (tile[missing:], chosen.kv_block[missing:]), stride
        assert found.tile_bound == pytest.approx(math.prod(shape) ** 2 / computed)
        assert found.is_full == (mask.kind == costs.NONE)


def test_what_masks_of_the_hopper_backend_cost():
    """A mask adds 16 or 32 channels to the product that gives the scores.

    Where two warpgroups do not share all blocks, each also waits for blocks of the other.
    """
    layer = {"shape": (256, 256), "kernel_size": 80, "heads": 24, "device": "h200"}
    free = DEVICES["h200"].tflops * 1e6 / 24 / (4 * 128)  # pairs a microsecond
    for stride, extra in ((1, 16 / 256), (2, 32 / 256), (16, 0)):
        found = simulate(stride=stride, **layer)
        bare = 65536**2 / found.tile_bound / free
        waiting = found.time_us / bare - 1 - extra
        # A tile has 12 columns of blocks, of which each warpgroup needs at least 11.
        assert (waiting > 1e-9) == (stride != 16) and waiting < cuts.IDLE / 11 + 1e-9, stride


def test_what_the_hopper_backend_can_not_run_has_other_tiles():
    def backend(shape=(64,), **options):
        return simulate(shape, 8, device="h200", **options).backend

    assert backend() == backend(head_dim=48) == "hopper"
    for options in (
        {"itemsize": 4}, {"head_dim": 50}, {"shape": (65,), "dilation": 2}, {"q_tile": (64,)},
        {"kv_tile": (8,)}, {"aligned": True}, {"boundary": "truncate"}, {"query_offset": 3},
    ):  # fmt: skip
        assert backend(**options) == "", options


def test_without_triton():
    """Most machines on which one plans for a GPU have neither a GPU nor Triton."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as util; real = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'triton' else real(name, *a)\n"
        "from natten.simulator import simulate; print(simulate((64,), 8).backend)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "hopper\n"), done.stderr
