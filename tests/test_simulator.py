"""The simulator: against counting by hand, published bounds, and measured times."""

import csv
import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from natten import simulator
from natten.errors import ArgumentError
from natten.neighborhood import Neighborhood, window_mask
from natten.simulator import (
    DEVICES,
    Device,
    recommend,
    recommended_strides,
    simulate,
    simulate_strides,
)

ROOT = Path(__file__).parents[1]
VIDEO = ((30, 48, 80), (18, 24, 24))  # HunyuanVideo
IMAGE = ((256, 256), (80, 80))  # FLUX at 4K


def count_by_hand(rule, shape, q_tile, kv_tile, aligned):
    """Boxes visited, boxes that are attended whole, and pairs needed, token by token."""
    mask = window_mask(rule, shape, shape)
    index = torch.arange(math.prod(shape)).view(shape)
    visited = whole = 0
    for group in itertools.product(*(range(d) for d in rule.dilation)):
        own = index[tuple(slice(g, None, d) for g, d in zip(group, rule.dilation))]
        tiles = itertools.product(*(range(0, n, t) for n, t in zip(own.shape, q_tile)))
        for corner in tiles:
            queries = own[tuple(slice(c, c + t) for c, t in zip(corner, q_tile))].flatten()
            attended = mask[queries][:, own.flatten()].view(-1, *own.shape)
            some, every = attended.any(0), attended.all(0)
            first = [int(axis.min()) for axis in some.nonzero().unbind(1)]
            origin = [0] * len(shape) if aligned else first
            boxes = [
                [range(o + i * b, o + (i + 1) * b) for i in range(-(-(n - o) // b))]
                for o, b, n in zip(origin, kv_tile, own.shape)
            ]
            for box in itertools.product(*boxes):
                inside = tuple(slice(r.start, r.stop) for r in box)
                if some[inside].any():
                    visited += 1
                    complete = all(r.stop <= n for r, n in zip(box, own.shape))
                    whole += int(complete and bool(every[inside].all()))
    return visited, whole, int(mask.sum())


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
    visited, whole, needed = count_by_hand(rule, shape, q_tile, kv_tile, aligned)
    found = simulate(
        shape, kernel_size, stride, dilation, is_causal,
        q_tile=q_tile, kv_tile=kv_tile, aligned=aligned,
    )  # fmt: skip
    box = math.prod(q_tile) * math.prod(kv_tile)
    tokens = math.prod(shape)
    assert found.kept == pytest.approx(needed / tokens**2)
    assert found.computed_over_needed == pytest.approx(visited * box / needed)
    assert found.whole_boxes == pytest.approx(whole / visited)
    assert found.tile_bound == pytest.approx(tokens**2 / (visited * box))


def test_published_bound_of_hunyuan_video():
    """arXiv 2504.16922: 11.1x by FLOPs, of which 3.3x are left at stride 1 on a fixed grid."""
    fixed = simulate(*VIDEO, q_tile=(4, 8, 8), kv_tile=(2, 8, 8), aligned=True)
    assert round(fixed.flop_bound, 1) == 11.1
    assert round(fixed.interior_bound, 1) == 3.3
    ours = simulate(*VIDEO)
    assert fixed.interior_bound < fixed.tile_bound < ours.tile_bound < ours.flop_bound


def test_table_of_the_documentation():
    """docs/simulator.md shows what the simulator says today."""
    page = (ROOT / "docs/simulator.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \w+ (\d.*) \|$", page.partition("<!-- bounds -->")[2], re.MULTILINE)
    assert len(rows) == 6
    for row in rows:
        cells = row.split(" | ")
        shape, window, stride = (tuple(map(int, cell.split("x"))) for cell in cells[:3])
        q_tile, kv_tile = ((16, 16), (16, 8)) if len(shape) == 2 else ((4, 8, 8), (2, 8, 8))
        grid = simulate(shape, window, stride, q_tile=q_tile, kv_tile=kv_tile, aligned=True)
        ours = simulate(shape, window, stride)
        bounds = (
            ours.flop_bound, grid.interior_bound, grid.tile_bound, ours.interior_bound,
            ours.tile_bound,
        )  # fmt: skip
        assert cells[3:8] == [f"{bound:.1f}x" for bound in bounds], row
        assert cells[8] == ("yes" if ours.is_whole else "no"), row


def test_strides_known_to_need_no_mask():
    assert simulate(*VIDEO, stride=(16, 8, 8)).is_whole
    assert simulate(*IMAGE, stride=16).is_whole
    assert not simulate(*VIDEO).is_whole
    # Upstream's documentation: 256 is the least stride without masks for tiles of 256 queries.
    tiles = {"q_tile": (256,), "kv_tile": (128,), "aligned": True}
    whole = [p.stride for p in simulate_strides((32768,), 2048, **tiles) if p.is_whole]
    assert whole[0] == (256,)


def measured_times():
    """Microseconds of the forward in a graph, by the name of the benchmark's case."""
    with open(ROOT / "benchmarks/results/h200.csv", newline="", encoding="utf-8") as file:
        return {
            row["case"]: float(row["median_us"])
            for row in csv.DictReader(file)
            if row["backend"].startswith("natten")
            and (row["pass"], row["time"]) == ("forward", "graph")
        }


@pytest.mark.parametrize(
    "names, shape, kernel_size, strides, heads",
    [
        (("1d", "1d-s256"), (32768,), (2048,), (1, 256), 1),
        (("flux", "flux-s16"), *IMAGE, (1, 16), 24),
        (("hunyuan", "hunyuan-s"), *VIDEO, (1, (16, 8, 8)), 24),
    ],
    ids=["1d", "flux", "hunyuan"],
)
def test_order_is_the_measured_order(names, shape, kernel_size, strides, heads):
    measured = [measured_times()[name] for name in names]
    options = {"device": "h200", "heads": heads}
    predicted = [simulate(shape, kernel_size, stride, **options).time_us for stride in strides]
    fast, slow = sorted(measured)
    if slow > 1.05 * fast:  # else they are equal within noise
        assert (predicted[0] < predicted[1]) == (measured[0] < measured[1])
    # A roofline is a lower bound.
    assert all(p < m for p, m in zip(predicted, measured))


def test_measured_pairs_differ():
    """Otherwise the test above says nothing."""
    times = measured_times()
    for name, strided in (("flux", "flux-s16"), ("hunyuan", "hunyuan-s")):
        assert times[name] > 1.05 * times[strided]


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
    shape, wish, near = (24, 20), (8, 7), 0.3
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
    found = simulate((64,), 64, **layer)  # dense: 4096 pairs, nothing masked
    assert found.is_whole and found.speedup == pytest.approx(1)
    assert found.time_us == pytest.approx(4 * 6 * 4096 * 8 / 1e6)
    assert found.bound_by == "products"
    # A window of 2 over tiles of 4: 16 tiles, 5 keys each but for the first (2 boxes), all masked.
    found = simulate((64,), 2, **layer)
    boxes = 16 + 15
    assert found.time_us == pytest.approx(4 * 6 * boxes * 16 * 1.5 * 8 / 1e6)
    slow_memory = Device("toy", tflops=1, bandwidth=1e-3, exponentials=1)
    found = simulate((64,), 2, **(layer | {"device": slow_memory}))
    assert found.bound_by == "memory"
    assert found.time_us == pytest.approx(4 * 6 * 64 * 8 * 4 / 1e-3 / 1e6)


def test_a_causal_axis_keeps_its_triangle():
    found = simulate((8,), 8, is_causal=True)
    assert found.kept == pytest.approx(36 / 64)


def test_tiles_are_no_larger_than_the_device_says():
    for device in DEVICES.values():
        found = simulate((6, 50), (3, 9), device=device)
        assert math.prod(found.q_tile) == device.q_tile
        assert math.prod(found.kv_tile) == device.kv_tile


def test_for_machines():
    found = simulate((8,), 3)
    record = found.as_dict()
    assert record["speedup"] == found.speedup and record["is_whole"] == found.is_whole
    assert record["kernel_size"] == (3,)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kernel_size": 9}, r"axis 0, 9 \* 1 > 8"),
        ({"device": "abacus"}, "`device`.*'abacus'"),
        ({"heads": 0}, "`heads`.*0"),
        ({"q_tile": (4, 4)}, "`q_tile`"),
        ({"kv_tile": (0,)}, "`kv_tile`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        simulate((8,), **({"kernel_size": 3} | arguments))


def test_bad_near():
    with pytest.raises(ArgumentError, match="`near`"):
        recommend((8,), 3, near=1)


def test_tile_shapes_fit_the_layout():
    assert simulator._tile_shapes(64, (3, 5)) == [(4, 16)]
