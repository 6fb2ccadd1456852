"""The profiler: its arithmetic, its clocks, and tuning with a made-up clock."""

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import time

import pytest
import torch

from natten import backends, profiler, tuning
from natten.backends.interface import KINDS
from natten.backends.tiled import grids
from natten.errors import ArgumentError
from natten.neighborhood import Neighborhood, window_mask
from natten.profiler import Problem, choose_backend, count_steps, dense, measure, tune
from natten.profiler.measure import Timing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("NATTEN_CACHE", str(tmp_path / "cache"))


def small(**changes):
    rule = Neighborhood.create(2, (3, 5), (1, 2), (2, 1), (False, True))
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "dim": 8, "value_dim": 4, "num_additional": 3}
    return Problem((7, 9), rule, **(sizes | changes))


def part(**changes):
    """Queries that are a part, three times as fine as keys along the axis that is cut."""
    rule = Neighborhood.create(
        2, (3, 5), (1, 2), (2, 1), boundary=("circular", "truncate"), queries_per_key=(1, 3),
        query_offset=(2, 4),
    )  # fmt: skip
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "dim": 8, "value_dim": 4, "num_additional": 3}
    return Problem((8, 9), rule, **({"query_shape": (5, 20)} | sizes | changes))


def test_needed_pairs_of_a_part_are_those_of_the_mask():
    problem = part()
    attended = int(window_mask(problem.rule, (5, 20), (8, 9)).sum())
    assert problem.window_pairs == attended
    assert problem.needed_pairs == attended + 100 * 3
    assert problem.all_pairs == 100 * (72 + 3)
    rest = dataclasses.replace(problem, query_shape=None)
    assert rest.queries == (6, 23) and rest.needed_pairs > problem.needed_pairs
    assert not problem.is_self_attention
    every = Neighborhood.create(1, 6, query_offset=2)
    assert Problem((6,), every).is_self_attention


def test_a_part_is_measured():
    problem = part(dtype=torch.float64)
    inputs = problem.inputs()
    assert inputs["query"].shape == (2, 5, 20, 4, 8) and inputs["key"].shape == (2, 8, 9, 2, 8)
    out = 2 * 100 * 4 * 4 * 8
    assert problem.bytes() == sum(x.numel() * 8 for x in inputs.values()) + out
    dense = problem.dense_inputs()
    assert dense["query"].shape == (2, 4, 100, 8) and dense["value"].shape == (2, 2, 75, 4)
    report = profiler.profile(problem, backward=True, warmup=0)
    assert [row.attention for row in report.rows] == ["dense sdpa", "natten sdpa"] * 2
    assert report.kept == problem.needed_pairs / 7500 and report.notes == []
    # The backend pads the keys around, so it computes the windows of a longer layout.
    rule, margins = problem.rule.unrolled()
    keys = tuple(before + n + after for n, (before, after) in zip(problem.shape, margins))
    assert keys[0] > 8 and keys[1] == 9
    pairs = backends.named("sdpa").computed_pairs(rule, (5, 20), keys, 8, 8) + 300
    assert report.computed_over_needed == {"forward": pairs / problem.needed_pairs}
    found = report.as_dict()["problem"]
    assert found["boundary"] == ("circular", "truncate") and found["query_offset"] == (2, 4)
    assert found["queries_per_key"] == (1, 3) and found["query_shape"] == (5, 20)
    described = "boundary circular/truncate, 1x3 queries per key, 5x20 queries from 2x4 on"
    assert described in str(problem)


def test_tiles_of_a_part_can_be_listed():
    pytest.importorskip("triton")
    problem = part(dtype=torch.bfloat16, num_additional=0)
    chooser = tune.tile_chooser("triton")
    rule, queries, keys = tune.windows(problem, "triton")
    assert rule == problem.rule and queries == (5, 20) and keys == (8, 9)  # it has circular axes
    padded, _, around = tune.windows(problem, "hopper")
    assert "circular" not in padded.boundary and around[0] > 8
    for kind in KINDS:
        tiles = chooser.choose(kind, *tune.arguments(problem, "triton"))
        assert chooser.computed_pairs(kind, rule, queries, keys, tiles) >= problem.window_pairs


def test_needed_pairs_are_those_of_the_mask():
    problem = small()
    attended = int(window_mask(problem.rule, problem.shape, problem.shape).sum())
    assert problem.needed_pairs == attended + 63 * 3
    assert problem.all_pairs == 63 * 66
    assert not problem.is_self_attention
    assert Problem((6,), Neighborhood.create(1, 6)).is_self_attention


def test_flops_are_those_of_pytorch_for_dense_attention():
    """PyTorch's own counter counts forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    problem = Problem((6, 4), Neighborhood.create(2, (6, 4)), batch=2, heads=3, dim=8, value_dim=8)
    for backward in (False, True):
        call = profiler.natten_call(problem, "tiled", backward)
        with FlopCounterMode(display=False) as counter:
            call()
        # The backward computes the scores again, which Problem counts, beside the forward pass.
        assert counter.get_total_flops() == problem.flops(backward=backward)


def test_bytes():
    problem = small(dtype=torch.float64)
    inputs = problem.inputs()
    out = 2 * 63 * 4 * 4 * 8
    assert problem.bytes() == sum(x.numel() * 8 for x in inputs.values()) + out
    assert problem.bytes(backward=True) == 3 * problem.bytes()


def test_what_is_called_is_the_problem(monkeypatch):
    problem, seen = small(), {}

    def spy(**arguments):
        seen.update(arguments)
        return arguments["query"]

    monkeypatch.setattr(profiler, "neighborhood_attention_generic", spy)
    profiler.natten_call(problem, "tiled", backward=False, scale=2.0)()
    assert seen["query"].shape == (2, 7, 9, 4, 8) and seen["value"].shape == (2, 7, 9, 2, 4)
    assert seen["additional_keys"].shape == (2, 3, 2, 8)
    rule = problem.rule
    for name in ("kernel_size", "stride", "dilation", "is_causal"):
        assert seen[name] == getattr(rule, name)
    assert seen["boundary"] == ("shift", "shift") and seen["query_offset"] is None
    problem = part()
    profiler.natten_call(problem, "tiled", backward=False)()
    assert seen["query"].shape == (2, 5, 20, 4, 8) and seen["key"].shape == (2, 8, 9, 2, 8)
    for name in ("boundary", "queries_per_key", "query_offset"):
        assert seen[name] == getattr(problem.rule, name)
    assert seen["backend"] == "tiled" and seen["scale"] == 2.0


def test_report(tmp_path):
    problem = small(value_dim=8)
    names = []
    options = {"backend": "tiled", "backward": True}
    report = profiler.profile(problem, warmup=0, step=names.append, **options)
    assert len(names) == count_steps(problem, **options, dense=True) == 4
    by_name = {(row.attention, row.pass_name): row for row in report.rows}
    assert len(by_name) == len(report.rows) == 4 and not report.notes
    for pass_name, backward in (("forward", False), ("forward+backward", True)):
        ours, dense = by_name["natten tiled", pass_name], by_name["dense sdpa", pass_name]
        seconds = ours.timing.median_us / 1e6
        assert ours.tflops * 1e12 * seconds == pytest.approx(problem.flops(backward=backward))
        assert ours.gbytes * 1e9 * seconds == pytest.approx(problem.bytes(backward))
        assert dense.speedup == 1 and dense.efficiency is None
        assert ours.speedup == pytest.approx(dense.timing.median_us / ours.timing.median_us)
        assert ours.efficiency == pytest.approx(
            ours.speedup * problem.needed_pairs / problem.all_pairs
        )
    # The tiled backend's products: 2 per tile forward, 5 more backward.
    products = {
        name: sum(kernel.calls for kernel in kernels if kernel.name.endswith("bmm"))
        for name, kernels in report.kernels.items()
    }
    assert products["forward+backward"] == 7 / 2 * products["forward"]
    assert report.computed_over_needed["forward"] >= 1

    record = json.loads(json.dumps(report.as_dict()))
    assert record["backend"] == "tiled" and len(record["times"]) == 4
    for _ in range(2):
        report.append_csv(tmp_path / "times.csv")
    with open(tmp_path / "times.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["time"] for row in rows} == {"eager"}
    assert rows[0]["case"] == str(problem) and float(rows[0]["median_us"]) > 0
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ArgumentError, match=r"`csv`.*other.csv with a,b"):
        report.append_csv(tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


def test_dense_attention_that_can_not_run_is_a_note(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such kernel\nat all")

    monkeypatch.setattr(dense.F, "scaled_dot_product_attention", broken)
    report = profiler.profile(small(), warmup=0)
    assert report.notes == ["dense sdpa, forward: no such kernel"]
    assert [(row.attention, row.speedup) for row in report.rows] == [("natten sdpa", None)]


def test_cost_of_dense_attention(monkeypatch):
    """It is that of a part, times as many pairs."""
    rule = Neighborhood.create(1, 3)
    problem = Problem((1 << 15,), rule, batch=2, heads=2, dim=8, value_dim=8)
    seen = []
    monkeypatch.setattr(dense, "dense_call", lambda part, *_: seen.append(part) or (lambda: None))
    ticks = iter([1.0, 3.0])
    monkeypatch.setattr(dense.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(measure, "kernel_times", lambda *_: [])
    found = dense.cost(problem, "sdpa", backward=False)
    (part,) = seen
    assert (part.batch, part.heads, part.queries, part.shape) == (1, 2, (128,), (4096,))
    assert found == (2.0 * 2 * (1 << 30) / (128 * 4096), problem.bytes())
    math_kernel = measure.Kernel("aten::_scaled_dot_product_attention_math", 1, 1.0)
    monkeypatch.setattr(measure, "kernel_times", lambda *_: [math_kernel])
    ticks = iter([1.0, 3.0])
    assert dense.cost(problem, "sdpa", backward=False).bytes == problem.bytes() + 4 * (8 << 30)


def test_dense_attention_with_scores_in_memory_is_known():
    """PyTorch's kernels for CPUs have one head dim."""
    rule = Neighborhood.create(1, 3)
    kept = [
        dense.cost(Problem((64,), rule, dim=8, value_dim=value), "sdpa", False).bytes
        - Problem((64,), rule, dim=8, value_dim=value).bytes()
        for value in (8, 4)
    ]
    assert kept == [0, 2 * 64 * 64 * 4]


def test_what_takes_too_long_is_left_out(monkeypatch):
    problem, rows = small(), []
    assert dense.too_much(problem, "sdpa", False, 2) is None
    monkeypatch.setattr(dense, "cost", lambda *_: dense.Cost(10.0, 1000))
    assert dense.too_much(problem, "sdpa", False, 2) == "would take about 10 s a call"
    assert dense.too_much(problem, "sdpa", False, 0) is None  # 30 s in all
    report = profiler.profile(problem, warmup=2, measured=rows.append)
    assert report.notes == ["dense sdpa, forward, is left out: it would take about 10 s a call."]
    assert [row.attention for row in report.rows] == ["natten sdpa"] and rows == report.rows
    monkeypatch.setattr(dense, "cost", lambda *_: dense.Cost(0.0, 1 << 60))
    assert "GB of memory, of which" in dense.too_much(problem, "sdpa", False, 2)
    assert len(profiler.profile(problem, warmup=0, dense=True).rows) == 2


def test_a_problem_that_memory_can_not_hold(monkeypatch):
    monkeypatch.setattr(profiler, "free_memory", lambda device: 24 * 10**9)
    huge = Problem((1 << 26, 1 << 26), Neighborhood.create(2, 3))
    with pytest.raises(ArgumentError, match=r"`shape`.*GB, and 24 are free"):
        profiler.profile(huge)


def test_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(options) or f)
    profiler.natten_call(small(), "tiled", backward=False, compiled=True)()
    assert compiled == [{"fullgraph": True}]


def test_computed_pairs_of_each_backend():
    rule = Neighborhood.create(1, 4, stride=4)
    problem = Problem((16,), rule)
    assert tune.computed_over_needed(problem, "reference", None) == {"forward": 4.0}
    rule = Neighborhood.create(2, (7, 5), dilation=(1, 2))
    plane = Problem((40, 30), rule)
    plan = grids._plan(rule, plane.shape, plane.shape, 1, 64)
    computed = sum(
        math.prod(run.repeats * run.groups * run.query_size * run.key_size for run in grid.runs)
        for grid in plan.grids
    )
    found = tune.computed_over_needed(plane, "tiled", "tiled")
    assert found == {"forward": computed / plane.needed_pairs}
    found = tune.computed_over_needed(Problem((600,), Neighborhood.create(1, 600)), "sdpa", "sdpa")
    assert found == {"forward": 1.0}
    pytest.importorskip("triton")
    found = tune.computed_over_needed(problem, "triton", "triton")
    assert set(found) == {"forward", "dq", "dkdv"} and min(found.values()) >= 1
    mixed = tune.computed_over_needed(problem, "hopper", "triton")
    assert set(mixed) == set(found) and mixed["dq"] == found["dq"]


def test_choosing_a_backend():
    problem = small()
    assert choose_backend(problem, None) == choose_backend(problem, "hopper-fna") == "sdpa"
    assert choose_backend(problem, "reference") == "reference"
    with pytest.raises(ArgumentError, match=r"triton.*GPU"):
        choose_backend(problem, "triton")
    with pytest.raises(ArgumentError, match=r"whole layout|runs on GPUs"):
        profiler.profile(problem, backend="cudnn")


def test_problem_checks_itself():
    with pytest.raises(ArgumentError, match="axis 1, 5"):
        small().__class__((7, 4), small().rule)
    with pytest.raises(ArgumentError, match="`query_offset` plus"):
        part(query_shape=(7, 20))
    with pytest.raises(ArgumentError, match="`query_shape`"):
        part(query_shape=(7,))
    with pytest.raises(ArgumentError, match="`heads`"):
        small(kv_heads=3)
    for name, size in (("batch", 0), ("kv_heads", 0), ("dim", 8.0), ("num_additional", -1)):
        with pytest.raises(ArgumentError, match=f"`{name}`.*{size}"):
            small(**{name: size})


def test_clocks():
    calls = []
    threads = torch.get_num_threads()
    timing = measure.eager_time(
        lambda: calls.append(torch.get_num_threads()) or time.sleep(2e-3), CPU, 3, seconds=0.02
    )
    assert 2e3 <= timing.median_us < 2e4 and timing.spread_us >= 0
    assert min(timing.samples_us) <= timing.median_us <= max(timing.samples_us)
    assert Timing.of([3.0]) == Timing(3.0, 0.0, (3.0,))
    assert len(calls) > 3 and set(calls) == {threads}
    kernels = measure.kernel_times(lambda: torch.ones(64, 64) @ torch.ones(64, 64), CPU)
    assert "aten::mm" in {kernel.name for kernel in kernels}
    assert all(a.time_us >= b.time_us for a, b in itertools.pairwise(kernels))
    counted = []
    several = measure.kernel_times(lambda: counted.append(torch.ones(64, 64).exp()), CPU, 4)
    assert len(counted) == 5 and {k.name: k.calls for k in several}["aten::exp"] == 1


def test_clocks_of_gpus_are_tritons(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    asked, calls, gpu = [], [], torch.device("cuda", 1)

    def clock(name):
        def bench(function, return_mode, **options):
            asked.append((name, return_mode, options))
            return [0.007, 0.004, 0.005, 0.004, 0.008]

        monkeypatch.setattr(testing, name, bench)

    clock("do_bench")
    clock("do_bench_cudagraph")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for timed in (measure.eager_time, measure.graph_time):
        timing = timed(lambda: calls.append(1), gpu, 2)
        assert timing[:2] == pytest.approx((5.0, 3.0))
        assert timing.samples_us == pytest.approx((7.0, 4.0, 5.0, 4.0, 8.0))
    assert len(calls) == 4 and [name for name, *_ in asked] == ["do_bench", "do_bench_cudagraph"]
    assert {return_mode for _, return_mode, _ in asked} == {"all"}
    assert asked[0][2] == {"rep": 200}


def triton_problem():
    pytest.importorskip("triton")
    rule = Neighborhood.create(2, 5)
    return Problem((30, 20), rule, dtype=torch.bfloat16), tune.tile_chooser("triton")


def test_only_backends_with_tiles_can_be_tuned():
    assert tune.tile_chooser("tiled") is None and tune.tile_chooser("reference") is None
    _, chooser = triton_problem()
    kernels = tune.kernels("triton", "triton")
    assert chooser is not None and kernels == [("triton", kind) for kind in KINDS]


def test_optimize_remembers_the_fastest():
    problem, tiles = triton_problem()
    arguments = tune.arguments(problem, "triton")
    wanted = {kind: tiles.candidates(kind, *arguments)[i] for i, kind in enumerate(KINDS, 2)}
    broken = tiles.candidates("forward", *arguments)[0]
    steps = []

    class OutOfSharedMemory(Exception):
        """Compilers raise such an error; it is not a RuntimeError."""

    def measured(kind):
        now = tiles.choose(kind, *arguments)
        if now == broken:
            raise OutOfSharedMemory
        return 1.0 if now == wanted[kind] else 2.0

    trials, paths = tune.optimize(
        problem, tune.kernels("triton", "triton"), measured, most=6, step=steps.append
    )
    assert len(trials) == len(steps) == 18 and len(paths) == 3
    assert trials[0].time_us == math.inf
    for kind in KINDS:
        assert tiles.choose(kind, *arguments) == wanted[kind]


def test_nothing_is_remembered_if_nothing_runs():
    problem, _ = triton_problem()

    def broken(kind):
        raise ValueError("no such luck")

    with pytest.raises(RuntimeError, match=r"none of the tiles.*no such luck"):
        tune.optimize(problem, tune.kernels("triton", None), broken, most=2)
    assert not tuning.directory().exists()


def test_forced_tiles():
    problem, tiles = triton_problem()
    arguments = tune.arguments(problem, "triton")
    before = tiles.choose("forward", *arguments)
    other = next(each for each in tiles.candidates("forward", *arguments) if each != before)
    forward = tune.Forced(other.q_block[1:], other.kv_block[1:])
    found = tune.kernels("triton", "triton")
    with tune.forced_tiles(problem, found, forward, tune.Forced(None, None)):
        assert tiles.choose("forward", *arguments)[:2] == other[:2]
    assert tiles.choose("forward", *arguments) == before
    impossible = tune.Forced((7, 7), None)
    with (
        pytest.raises(ArgumentError, match="`--backward-q-tile` 7 7 is nothing"),
        tune.forced_tiles(problem, found, tune.Forced(None, None), impossible),
    ):
        pass


def test_forced_tiles_of_kernels_that_hold_keys():
    """Of the keys' gradients: ``--backward-q-tile`` is its block of queries."""
    problem = dataclasses.replace(triton_problem()[0], shape=(32, 32))
    tiles, arguments = tune.tile_chooser("hopper"), tune.arguments(problem, "hopper")
    for kind in ("dq", "dkdv"):
        other = tiles.candidates(kind, *arguments)[-1]
        wanted = tune.Forced(other.q_block[1:], other.kv_block[1:])
        with tune.forced_tiles(problem, [("hopper", kind)], tune.Forced(None, None), wanted):
            assert tiles.choose(kind, *arguments)[:2] == other[:2]


@pytest.mark.gpu
def test_on_a_gpu():
    rule = Neighborhood.create(2, 5)
    gpu = torch.device("cuda")
    problem = Problem((32, 32), rule, heads=2, dtype=torch.bfloat16, device=gpu)
    report = profiler.profile(problem, backward=True, warmup=2)
    found = {(row.attention, row.kind) for row in report.rows}
    assert found >= {(f"natten {report.backend}", kind) for kind in ("graph", "eager")}
    assert any(name.startswith("dense") for name, _ in found), report.notes
    assert report.kernels["forward"]
    whole = Neighborhood.create(2, 32)
    dense = Problem((32, 32), whole, dtype=torch.bfloat16, device=gpu)
    assert profiler.profile(dense, backend="fav2", warmup=2).rows[0].attention == "dense fav2"
