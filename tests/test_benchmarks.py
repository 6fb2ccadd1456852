"""Results have one schema, tables and charts are current, and the runner runs."""

import csv
import importlib
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
    known = {*load("cases").CASES["cpu" if path.stem == "cpu" else "cuda"], "anyup"}  # parts.py's
    keys = [(each.case, each.backend, each.pass_, each.time) for each in records]
    assert len(set(keys)) == len(keys)
    for each in records:
        assert each.case in known
        assert each.pass_ in ("forward", "backward", "forward+backward")
        assert each.time in ("graph", "eager", "")
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
