"""Results have one schema, tables and charts are current, and the runner runs."""

import csv
import dataclasses
import importlib
import math
import random
from pathlib import Path

import pytest
import torch

import natten

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.csv"))


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as in `python benchmarks/run.py`
    return importlib.import_module


def test_tables_and_charts_are_current(load, capsys):
    assert load("report").main(["--check"]) == 0, capsys.readouterr().out + "make tables"


def test_stale_table_is_found(load, monkeypatch, capsys):
    report = load("report")
    monkeypatch.setitem(report.TABLES, "cpu", lambda: ["other"])
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().out == "stale benchmarks/results/cpu.md\n"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results(path, load):
    records = load("records").read(path.stem)
    cases = load("cases")
    if path.stem.startswith("spectrum"):
        known = cases.SPECTRUM.keys()
    else:
        known = {
            *cases.CASES["cpu" if path.stem == "cpu" else "cuda"],
            *cases.PLAIN,
            *cases.PACKED,
            "anyup",
        }  # parts.py's
    keys = [(each.case, each.backend, each.pass_, each.time) for each in records]
    assert len(set(keys)) == len(keys)
    for each in records:
        assert each.case in known
        assert each.pass_ in ("forward", "backward", "forward+backward")
        assert each.time in ("graph", "eager", "host", "")
        assert float(each.median_us) > 0 and each.device and each.versions


def test_cases_are_problems(load):
    for device, cases in load("cases").CASES.items():
        for name, case in cases.items():
            problem = case.problem("cpu")  # checks the window
            assert 0 < problem.needed_pairs <= problem.all_pairs, (device, name)


def test_groups_are_of_known_cases(load):
    cases = load("cases")
    for name, group in cases.GROUPS.items():
        assert group and set(group) <= set(cases.CASES["cpu" if name == "cpu" else "cuda"])
    main, strides = cases.GROUPS["cuda"], cases.GROUPS["strides"]
    assert set(strides) - set(main), "strides have cases of their own, which no table has"


def test_runner_writes_the_schema(load, tmp_path, capsys):
    path = tmp_path / "some.csv"
    arguments = ["--device", "cpu", "--cases", "quarter-3d-dilated", "--passes", "forward"]
    assert load("run").main([*arguments, "--threads", "1", "--out", str(path)]) == 0
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == load("records").COLUMNS
    ours, dense = (row["backend"] for row in rows)
    assert ours in ("natten sdpa", "natten tiled") and dense == "dense sdpa"
    assert all(float(row["median_us"]) > 0 and row["device"] and row["versions"] for row in rows)
    assert rows[0]["computed_over_needed"].startswith("forward=")


def test_half_precision_has_dense_attention_of_both_dtypes(load):
    run, case = (
        load("run"),
        dataclasses.replace(load("cases").CASES["cpu"]["full-2d"], shape=(6, 6)),
    )
    case = dataclasses.replace(case, kernel_size=6, dtype=torch.bfloat16)
    records = run.measure_case(case, "cpu", ["forward"], None, dense=True)
    names = ["natten sdpa", "dense sdpa", run.same_dtype(torch.bfloat16)]
    assert [record.backend for record in records] == names


def test_calls_take_turns(load, monkeypatch):
    run, seen = load("run"), []
    monkeypatch.setattr(run, "BLOCK_SECONDS", 0.0)  # a sample is one call
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    assert [len(each) for each in run.in_turn(calls, rounds=3).values()] == [3, 3]
    assert "".join(seen[-6:]) == "abbaab"


def test_first_calls_of_sizes(load):
    sizes = load("new_sizes")
    cells = sizes.measure(sizes.Kind(((4, 9),) * 2, 3, 8), 1, random.Random(0))
    assert len(cells) == 6 and all(float(each) > 0 for each in (cells[0], cells[3]))


def test_windows_of_nearly_all_pairs(load):
    near, rng = load("near_full"), random.Random(0)
    for _ in range(5):
        case = near.draw(rng, torch.float32)
        problem = case.problem("cpu")
        share = math.prod(problem.rule.dilation)  # tokens of other groups are never attended
        assert (
            problem.needed_pairs * share * 2 ** sum(problem.rule.is_causal)
            > 0.7 * problem.all_pairs
        )
    case = dataclasses.replace(
        case, shape=(6, 6), kernel_size=5, stride=1, dilation=1, is_causal=False
    )
    rows = list(near.measure(case, ["forward", "forward+backward"], rounds=2))
    assert [row.pass_ for row in rows] == ["forward", "forward+backward"]
    assert all(row.ratio > 0 and row.same > 0 and row.ours > 0 for row in rows)


def test_runner_refuses_unknown_cases(load, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load("run").main(["--device", "cpu", "--cases", "nothing", "--out", str(tmp_path / "x")])
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cpu", "--cases", "nat", "--out", "no/such/folder.csv"], "no/such/folder"),
        (["--device", "cuda", "--cases", "strides"], "--out"),
        (["--device", "cuda", "--cases", "strides", "--out", "x.csv"], "no GPU"),
        (["--device", "cpu", "--passes", "sideways"], "sideways"),
        (["--device", "cpu", "--threads", "0"], "--threads"),
    ],
)
def test_runner_refuses_what_it_can_not_do(arguments, message, load, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        load("run").main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- the spectrum ---


def test_floors(load):
    """By hand: bytes, products and exponentials are the longest of these in turn."""
    spectrum, cases = load("spectrum"), load("cases")
    moved = cases.Case("moved", (1000,), 1, 4, 64, 1)  # 4 tensors of 1000 x 4 x 64 numbers
    assert spectrum.floor_us(moved) == pytest.approx(4 * 256e3 * 2 / 4.2e6)
    assert spectrum.floor_us(moved, "backward") == pytest.approx(3.5 * 4 * 256e3 * 2 / 4.2e6)
    products = cases.Case("products", (4096,), 1, 4, 128, 4096)
    needed = 4 * 4096**2 * 4 * 128
    assert spectrum.floor_us(products) == pytest.approx(needed / 790e6)
    single = cases.Case("single", (4096,), 1, 4, 128, 4096, dtype=torch.float32)
    assert spectrum.floor_us(single) == pytest.approx(needed / 400e6)
    exponentials = cases.Case("exponentials", (4096,), 1, 4, 16, 4096)
    assert spectrum.floor_us(exponentials) == pytest.approx(4 * 4096**2 / (132 * 16 * 1.75e3))
    both = sum(spectrum.floor_us(products, pass_) for pass_ in ("forward", "backward"))
    assert spectrum.floor_us(products, "forward+backward") == pytest.approx(both)
    # Fewer key heads move less, additional tokens are needed pairs of every query.
    shared = cases.Case("shared", (1000,), 1, 4, 64, 1, kv_heads=1)
    assert spectrum.floor_us(shared) == pytest.approx(2.5 * 256e3 * 2 / 4.2e6)
    more = cases.Case("more", (4096,), 1, 4, 128, 4096, num_additional=4096)
    assert spectrum.floor_us(more) == pytest.approx(2 * needed / 790e6)


def test_problems_of_the_spectrum(load):
    cases = load("cases")
    assert len(cases.SPECTRUM) == 46 and not set(cases.SPECTRUM) & set(cases.UNEVEN)
    for name, case in (cases.SPECTRUM | cases.UNEVEN).items():
        assert case.name == name
        assert case.problem("cpu").needed_pairs > 0
        assert ("rpb" in case.inputs("meta")) == case.bias
        if case.bias:
            assert "bias" in case.describe(case.dtype)


def test_uneven_dilations_have_partners(load):
    for case in load("cases").UNEVEN.values():
        rule = case.problem("cpu").rule
        divides = all(n % d == 0 for n, d in zip(case.shape, rule.dilation))
        assert divides == case.name.endswith("-even") and max(rule.dilation) > 1


def test_random_problems(load):
    """They are problems, the same ones each time, and of many kinds."""
    spectrum = load("spectrum")
    found = [spectrum.random_case(5, number) for number in range(150)]
    assert found[7] == spectrum.case_of("random-5-7") == spectrum.random_case(5, 7)
    assert found[7] != spectrum.random_case(6, 7)
    for case in found:
        problem = case.problem("cpu")
        assert problem.needed_pairs > 0 and problem.bytes() < 4e9
        assert not (case.bias and case.num_additional)
    rules = [case.problem("cpu").rule for case in found]
    assert {rule.rank for rule in rules} == {1, 2, 3}
    for what in ("stride", "dilation"):
        assert 0.1 < sum(max(getattr(rule, what)) > 1 for rule in rules) / len(rules) < 0.3
    assert any(case.bias for case in found) and any(case.kv_heads for case in found)
    for name in ("random-5", "random-5-x", "random--1-2", "nothing"):
        assert spectrum.case_of(name) is None


def test_spectrum_on_a_cpu(load, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("natten.profiler.measure.eager_time", once)
    path = tmp_path / "small.csv"
    names = "nat-s3-rpb,gqa-2d,wan-extra,anyup"
    arguments = ["--device", "cpu", "--cases", names, "--small", "--threads", "1"]
    assert load("spectrum").main([*arguments, "--out", str(path)]) == 0
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == load("records").COLUMNS
    assert [row["case"] for row in rows[::4]] == names.split(",")
    for row in rows:
        assert row["backend"].startswith("natten" if rows.index(row) % 2 == 0 else "dense sdpa")
    assert "floor" not in capsys.readouterr().out  # that is a GPU's


def once(function, device, warmup, seconds=0):
    function()
    return natten.profiler.measure.Timing(5.0, 0.0)


def test_long_dense_attention_is_left_out(load, monkeypatch, capsys):
    spectrum = load("spectrum")
    monkeypatch.setattr("natten.profiler.measure.eager_time", once)
    case = spectrum.small(load("cases").SPECTRUM["nat"])
    (record,) = spectrum.measure_case(case, "cpu", ["forward"], 1e-9, True)
    assert record.backend.startswith("natten")
    assert "nat, forward: dense attention is left out: it would take" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cpu"], "--out"),
        (["--device", "cpu", "--cases", "nothing", "--out", "x"], "nothing"),
        (["--device", "cpu", "--passes", "backward", "--out", "x"], "backward"),
        (["--device", "cpu", "--random", "0", "--out", "x"], "--random"),
        (["--device", "cpu", "--random", "2", "--cases", "nat", "--out", "x"], "--random"),
        (["--device", "cpu", "--threads", "0", "--out", "x"], "--threads"),
        (["--device", "cpu", "--dense-ms", "-1", "--out", "x"], "--dense-ms"),
        (["--device", "cpu", "--out", "no/such/folder.csv"], "no/such/folder"),
        (["--device", "cuda", "--out", "x"], "no GPU"),
    ],
)
def test_spectrum_refuses_what_it_can_not_do(
    arguments, message, load, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        load("spectrum").main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_report_of_the_spectrum(load, tmp_path, monkeypatch):
    """Time is 1.25 floors forward, four backward; dense is half as fast."""
    records, spectrum, report = load("records"), load("spectrum"), load("report")
    rows = []
    for name, backends in {"nat": "hopper", "d256": "hopper+triton", "d20": "triton"}.items():
        case = spectrum.known(name)
        forward = 1.25 * spectrum.floor_us(case)
        both = forward + 4 * spectrum.floor_us(case, "backward")
        for who, factor in ((f"natten {backends}", 1), ("dense cudnn", 2)):
            for pass_, time in (("forward", forward), ("forward+backward", both)):
                who_ran = who.partition("+")[0] if pass_ == "forward" else who
                row = records.Record(name, who_ran, pass_, "graph", f"{factor * time:.6f}")
                rows.append(row._replace(device="a GPU", versions="some"))
    records.write(tmp_path / "spectrum-h200.csv", rows)
    for module in (records, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    shares = spectrum.shares(rows)
    assert shares["forward"] == pytest.approx(dict.fromkeys(("nat", "d256", "d20"), 0.8))
    assert shares["backward"] == pytest.approx(dict.fromkeys(("nat", "d256", "d20"), 0.25))
    table = "\n".join(report.spectrum_table())
    assert table.count("| 0.80 / 0.25 | 2.0x / 2.0x |") == 3 and "| hopper+triton |" in table
    text = "\n".join(report.spectrum_summary("images"))
    assert "0.80 forward (3 of 3 problems reach 0.50), 0.25 backward (0 of 3" in text
    assert "faster in none of the 3" in text
    picture = report.spectrum_chart()
    assert picture.count(report.QUERY) >= 3 and "d256" not in picture  # the triton dots; no names
    monkeypatch.setattr(report, "NAMED", 0.3)
    assert "d256" in report.spectrum_chart()


def test_decoding_checks_before_it_measures(load):
    decoding, case = load("decoding"), load("cases").Case("small", (7, 6, 8), 1, 2, 16, (3, 5, 5))
    inputs = case.problem("cpu").inputs()
    out = natten.na3d(**inputs, kernel_size=(3, 5, 5))
    decoding.check(case, **inputs, out=out)
    with pytest.raises(RuntimeError, match="small: wrong by"):
        decoding.check(case, **inputs, out=natten.na3d(**inputs, kernel_size=5))


def test_decoding_in_parts(load):
    decoding = load("decoding")
    layer, x = decoding.Layer(32, (5, 3, 3), head_dim=16), torch.randn(1, 12, 5, 6, 32)
    whole = decoding.attend_whole(layer, x)
    for frames in (1, 4, 5, 12):
        assert decoding.error(decoding.AttendInParts(frames)(layer, x), whole) < 1e-5


def test_decoding_needs_a_gpu(load, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        load("decoding").main(["--out", str(tmp_path / "x.csv")])
    assert "no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_plain_attention_is_checked_before_it_is_measured(load):
    plain, case = load("plain"), load("cases").PlainCase("small", 2, 9, 2, 16, causal=True)
    *inputs, grad = (torch.randn(2, 9, 2, 16) for _ in range(4))
    ours = plain.natten(case, *inputs)
    out, _ = plain.check(case, ours, ours, grad)[0]
    assert torch.equal(out, natten.attention(*inputs, is_causal=True))
    dense = plain.natten(dataclasses.replace(case, causal=False), *inputs)
    with pytest.raises(RuntimeError, match="small: output differs by"):
        plain.check(case, ours, dense, grad)


def test_models_are_checked_before_they_are_measured(load, tmp_path, monkeypatch, capsys):
    models = load("models")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, message in (([], "no GPU"), (["--models", "nat,resnet"], "unknown ['resnet']")):
        with pytest.raises(SystemExit):
            models.main([*arguments, "--out", str(tmp_path / "x.csv")])
        assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_models_are_those_of_the_papers(load):
    """NAT-tiny and DiNAT-tiny have 28 million parameters."""
    models = load("models")
    with torch.device("meta"):
        parameters = [models.MODELS[name]().parameters() for name in ("nat-rpb", "dinat-rpb")]
    assert [round(sum(p.numel() for p in each), -5) for each in parameters] == [27_900_000] * 2


def test_the_search_of_tiles_begins_with_those_that_are_taken(load):
    tiles = load("tiles")
    case = tiles.CASES["hdit"]
    for kind in tiles.KINDS:
        *sizes, _ = tiles.tune.arguments(case.problem("cpu"), "hopper")
        found = tiles.candidates(case, kind, within=0.1, most=5)
        assert found[0].tiles == tiles.hopper.choose(kind, *sizes)
        assert 1 < len({each.tiles for each in found}) == len(found) <= 5
        estimates = [each.estimate for each in found]
        assert max(estimates) <= 1.1 * min(estimates)
        with found[1].chosen():
            assert tiles.hopper.choose(kind, *sizes) == found[1].tiles


def test_results_of_a_search_are_compared(load):
    tiles = load("tiles")
    a, b = torch.randn(2, 100)
    nothing = torch.full_like(a, float("nan"))
    assert not tiles.differ([a, b], [a, 1.01 * b])
    assert tiles.differ([a, b], [a, 1.1 * b]) and tiles.differ([nothing], [a])


def test_the_search_of_tiles_checks_before_it_measures(load, tmp_path, monkeypatch, capsys):
    tiles = load("tiles")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    wrong = (
        (["--cases", "hdit,x"], "unknown: x"),
        (["--kinds", "dk"], "unknown: dk"),
        ([], "no Hopper"),
    )
    for arguments, message in wrong:
        with pytest.raises(SystemExit):
            tiles.main([*arguments, "--out", str(tmp_path / "x.csv")])
        assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
