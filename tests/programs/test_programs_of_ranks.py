"""The programs that run on several ranks do so, by gloo on a CPU."""

from __future__ import annotations

import csv
import importlib
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from ranks import Pool

pytestmark = pytest.mark.xdist_group("distributed")
ROOT = Path(__file__).parents[2]


def benchmark(*arguments: str) -> str:
    """Run the benchmark on this rank, and return what it prints."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    with redirect_stdout(StringIO()) as printed:
        assert importlib.import_module("distributed").main(list(arguments)) == 0
    return printed.getvalue()


def example(*arguments: str) -> str:
    """Run the example on this rank, and return what it prints."""
    with redirect_stdout(StringIO()) as printed:
        names = runpy.run_path(str(ROOT / "examples" / "sharded.py"))
        assert names["main"](list(arguments)) == 0
    return printed.getvalue()


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_benchmark_on_two_ranks(two_ranks: Pool, tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    arguments = ["--small", "--cases", "weather,audio", "--seconds", "0.001", "--out", str(path)]
    first, second = two_ranks(benchmark, *arguments)
    assert "2 cases agree with one rank." in first and second == ""
    rows = read(path)
    assert len(rows) == 16  # cases, scalings, passes, methods
    for row in rows:
        times = ("one_us", "compute_us", "messages_us", "together_us")
        assert all(float(row[name]) > 0 for name in times)
        assert 0 <= float(row["hidden"]) <= 1 and 0 < float(row["expected"]) <= 1
        assert row["versions"] and row["split"] in ("1x1x2", "2")


def test_benchmark_of_ranks_that_are_not_there(tmp_path: Path, capsys) -> None:
    """It needs no torchrun, and makes a group of its own."""
    path = tmp_path / "some.csv"
    arguments = ["--small", "--cases", "audio", "--passes", "forward", "--scalings", "strong"]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    main = importlib.import_module("distributed").main
    assert main([*arguments, "--seconds", "0.001", "--emulate", "2", "4", "--out", str(path)]) == 0
    rows = read(path)
    assert [(row["ranks"], row["method"]) for row in rows] == [
        ("2", "halo"), ("2", "heads"), ("4", "halo"), ("4", "heads"),
    ]  # fmt: skip
    assert all(float(row["sum_over_one"]) > 0 for row in rows)
    with pytest.raises(SystemExit):
        main(["--cases", "nothing"])
    assert "nothing" in capsys.readouterr().err


def test_example(two_ranks: Pool) -> None:
    first, second = two_ranks(example)
    assert "equal" in first and second == ""
