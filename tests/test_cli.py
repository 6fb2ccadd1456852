"""Every command of the command line runs on a CPU, with good and bad arguments."""

import argparse
import csv
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from natten import __version__, tuning
from natten.backends.interface import KINDS
from natten.cli import COMMANDS, main, options, tables
from natten.cli import profile as profile_command
from natten.neighborhood import Neighborhood
from natten.profiler import Problem, Report, Row
from natten.profiler.measure import Kernel, Timing
from natten.tools.layouts import by

OURS = ("profile", "simulate", "env")
ROOT = Path(__file__).parents[1]
SMALL = ["-i", "8", "6", "-w", "3", "-d", "8", "--device", "cpu", "--warmup-steps", "0"]


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("NATTEN_CACHE", str(tmp_path / "cache"))


def called(capsys, *arguments, code=0):
    """Run a command and return what it prints to stdout and to stderr."""
    assert main([str(each) for each in arguments]) == code
    return capsys.readouterr()


def table(text):
    """The cells of the Markdown tables in a text, without headers and separators."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    rules = [i for i, row in enumerate(rows) if set("".join(row)) <= set("-:")]
    skipped = {*rules, *(i - 1 for i in rules)}
    return [[cell.strip() for cell in row] for i, row in enumerate(rows) if i not in skipped]


def test_help_names_every_command_and_teaches_by_example(capsys):
    out = called(capsys, "--help").out
    assert all(f"  {name} " in out for name in COMMANDS) and "examples:" in out
    for name in OURS:
        out = called(capsys, name, "--help").out
        assert f"natten {name} " in out.partition("examples:")[2]
    assert called(capsys, "--version").out == f"natten {__version__}\n"


def parse(line):
    """Parse the arguments of a command line ``natten NAME ...`` without running it."""
    _, name, *arguments = shlex.split(line)
    command = importlib.import_module(f"natten.cli.{name}")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    if "--help" in arguments:
        return
    args = parser.parse_args(arguments)
    if name in ("profile", "simulate"):
        options.window_of(args)


def examples():
    """The command lines in the help texts and in the documentation."""
    for name in OURS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"natten.cli.{name}").add_arguments(parser)
        lines = re.findall(rf"^ *(natten {name}.*)$", parser.epilog, re.MULTILINE)
        assert lines, name
        yield from lines
    for page in (ROOT / "docs").glob("*.md"):
        for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            yield from re.findall(r"^natten (?:profile|simulate|env).*$", block, re.MULTILINE)


@pytest.mark.parametrize("line", sorted(set(examples())))
def test_examples_are_well_formed(line):
    """They are only parsed, because some need a GPU to run."""
    parse(line)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "usage: natten"),
        (["frobnicate"], "frobnicate"),
        (["profile"], "--input-size"),
        (["profile", "-i", "8", "x"], "'x'"),
        (["profile", "-i", "0"], "at least 1"),
        (["profile", "-i", "4", "4", "4", "4"], "`--input-size`"),
        (["profile", "-i", "8", "16", "-w", "3", "17"], "on axis 1, 17 * 1 > 16"),
        (["profile", "-i", "8", "-w", "3", "3"], "`--window-size`"),
        (["profile", "-i", "8", "-w", "3", "-s", "4"], "`stride`"),
        (["profile", "-i", "8", "-c", "maybe"], "'maybe'"),
        (["profile", "-i", "8", "-n", "4", "--heads-kv", "3"], "`--heads-kv`"),
        (["profile", "-i", "8", "--q-tile", "4", "4"], "`--q-tile`"),
        (["profile", "-i", "8", "--backend", "abacus"], "'abacus'"),
        (["profile", "-i", "8", "--fmha-backend", "abacus"], "'abacus'"),
        (["profile", "-i", "8", "--device", "cpu", "--backend", "triton"], "GPU"),
        (["profile", "-i", "8", "--device", "cpu", "--backend", "fav2"], "GPU"),
        (["profile", "-i", "8", "--device", "cpu", "--backend", "fav2", "--optimize"], "fav2"),
        (["profile", "-i", "8", "--device", "cpu", "--optimize"], "nothing to tune"),
        (["profile", "-i", "8", "-d", "16", "--backend", "hopper", "--dry-run"], "torch.float32"),
        (["profile", "-i", "8", "--boundary", "mirror"], "invalid choice: 'mirror'"),
        (["profile", "-i", "8", "--query-offset", "-1"], "at least 0"),
        (["profile", "-i", "8", "--query-offset", "8"], "`query_offset` must leave"),
        (["profile", "-i", "8", "--query-offset", "1", "--query-shape", "8"], "1 + 8 > 1 * 8"),
        (["profile", "-i", "8", "--queries-per-key", "2", "2"], "`--queries-per-key`"),
        (["simulate", "-i", "8", "-w", "3", "--query-offset", "2", "--aligned"], "`aligned`"),
        (["simulate", "-i", "8", "-w", "9"], "on axis 0, 9 * 1 > 8"),
        (["simulate", "-i", "8", "-w", "3", "--device", "abacus"], "'abacus'"),
        (["simulate", "-i", "8", "-w", "3", "--tflops", "0"], "`--tflops`"),
        (["simulate", "-i", "8", "-w", "3", "--bandwidth", "nan"], "`--bandwidth`"),
        (["simulate", "-i", "8", "-w", "3", "--near", "2"], "`near`"),
        (["env", "--frobnicate"], "--frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments(arguments, message, capsys):
    captured = called(capsys, *arguments, code=2)
    assert message in captured.err and captured.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert "sees no GPU" in called(capsys, "profile", "-i", 8, "--device", "cuda", code=2).err


def test_files_that_can_not_be_written_are_told_before_anything_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("natten.profiler.profile", None)
    missing, full = tmp_path / "no" / "such" / "folder.json", tmp_path / "full.csv"
    full.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != full)
    for command, path, why in (
        (["profile", *SMALL, "--json"], missing, "there is no folder"),
        (["profile", *SMALL, "--csv"], tmp_path, "is a folder"),
        (["profile", *SMALL, "--csv"], full, "can not be written"),
        (["simulate", "-i", 8, "-w", 3, "--json"], missing, "there is no folder"),
    ):
        captured = called(capsys, *command, path, code=2)
        assert why in captured.err and str(path) in captured.err and captured.out == ""


def test_an_interruption_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("natten.profiler.profile", lambda *_, **__: signal.raise_signal(2))
    captured = called(capsys, "profile", *SMALL, code=130)
    assert captured.err == "natten: interrupted\n" and captured.out == ""


def test_failures_are_told_without_a_traceback(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    path = tmp_path / "report.json"
    err = called(capsys, "profile", *SMALL, "--no-dense", "--json", path, code=1).err
    assert "no space left" in err and "Traceback" not in err


def test_profile(capsys, tmp_path):
    out = called(capsys, "profile", *SMALL, "--backprop", "--csv", tmp_path / "times.csv").out
    assert __version__ in out and torch.__version__ in out
    assert "2-D 8x6, window 3x3" in out and "this is the CPU" in out
    names = [row[:3] for row in table(out)]
    for attention in ("natten sdpa", "dense sdpa"):
        for pass_name in ("forward", "forward+backward"):
            assert [attention, pass_name, "eager"] in names
    assert "Computed over needed pairs: forward" in out
    assert len((tmp_path / "times.csv").read_text().splitlines()) == 5


def test_profile_of_a_part(capsys):
    arguments = ["-i", 6, 8, "-w", 3, "-n", 2, "-d", 8, "--device", "cpu", "--warmup-steps", 0]
    arguments += ["--boundary", "truncate", "circular", "--queries-per-key", 2]
    arguments += ["--query-offset", 4, 0, "--query-shape", 8, 16, "--backprop"]
    out = called(capsys, "profile", *arguments).out
    part = "boundary truncate/circular, 2x2 queries per key, 8x16 queries from 4x0 on"
    assert f"2-D 6x8, window 3x3, {part}, batch 1" in out
    assert len(table(out)) >= 4
    listed = called(capsys, "profile", *arguments, "--dry-run", "--backend", "tiled").out
    assert part in listed and [row[:2] for row in table(listed)] == [["0", "8"], ["1", "16"]]


def test_simulate_of_a_part(capsys):
    arguments = ["-i", 6, 8, "-w", 3, "--boundary", "circular", "--query-offset", 2, "--json"]
    every = json.loads(called(capsys, "simulate", *arguments, "--all").out)
    # A ring of 8 has no stride of 3.
    assert sorted(each["stride"] for each in every) == [[s, t] for s in (1, 2, 3) for t in (1, 2)]
    assert every[0]["kept"] == pytest.approx(9 / 48)
    out = called(capsys, "simulate", *arguments[:-1]).out
    assert "window 3x3, boundary circular, 4x6 queries from 2x2 on, batch 1" in out


def test_profile_as_json(capsys, tmp_path):
    arguments = [*SMALL, "--no-dense", "--add-kv", 2, "--dim-value", 4, "-n", 2, "--heads-kv", 1]
    arguments += ["--dilation", 2, "-c", "true", "0", "--dtype", "fp64"]
    found = json.loads(called(capsys, "profile", *arguments, "--json").out)
    problem = found["problem"]
    assert problem["num_additional"] == 2 and (problem["dim"], problem["value_dim"]) == (8, 4)
    assert (problem["heads"], problem["kv_heads"]) == (2, 1)
    assert problem["is_causal"] == [True, False] and problem["dtype"] == "float64"
    assert [each["attention"] for each in found["times"]] == ["natten tiled"]
    path = tmp_path / "report.json"
    assert table(called(capsys, "profile", *arguments, "--json", path).out)
    assert json.loads(path.read_text())["problem"] == problem


def test_a_dash_is_standard_output(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["profile", *SMALL, "--no-dense", "--backprop", "--backend", "hopper-fna"]
    captured = called(capsys, *arguments, "--csv", "-")
    rows = list(csv.DictReader(io.StringIO(captured.out, newline="")))
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]
    assert "hopper-fna is a hint here" in captured.err  # tables would say it, too
    captured = called(capsys, *arguments, "--csv", "-", "--json", "report.json")
    assert len(captured.out.splitlines()) == 3 and json.loads(Path("report.json").read_text())
    captured = called(capsys, *arguments, "--csv", "times.csv", "--json", "-")
    assert json.loads(captured.out) and len(Path("times.csv").read_text().splitlines()) == 3
    captured = called(capsys, *arguments, "--csv", "-", "--json", code=2)
    assert "can not both be -" in captured.err and captured.out == ""
    assert json.loads(called(capsys, "simulate", "-i", 8, "-w", 3, "--json", "-").out)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["report.json", "times.csv"]
    called(capsys, *arguments, "--csv", "./-")  # a file with that name
    assert Path("-").exists()


def test_hints_of_upstream_are_accepted_and_explained(capsys):
    hints = ["--backend", "hopper-fna", "--fmha-backend", "hopper-fmha", "--schedule", "pp"]
    hints += ["--persistent", "--q-tile", 4, 4, "--kv-tile", 4, 4, "--no-dense"]
    out = called(capsys, "profile", *SMALL, *hints).out
    assert "hopper-fna is a hint here: backend sdpa runs." in out
    assert "Tile sizes have no effect on backend sdpa" in out
    assert "Accepted, without effect here: --fmha-backend, --schedule, --persistent." in out


def test_the_whole_layout_is_the_default_window(capsys):
    arguments = ["-i", 7, 6, "--dilation", 2, "--device", "cpu", "--no-dense", "--json"]
    found = json.loads(called(capsys, "profile", *arguments, "--warmup-steps", 0).out)
    assert found["problem"]["kernel_size"] == [3, 3]


def test_dry_run_on_a_cpu(capsys):
    out = called(capsys, "profile", *SMALL, "--dry-run", "--backend", "tiled").out
    assert [row[:2] for row in table(out)] == [["0", "8"], ["1", "6"]]
    out = called(capsys, "profile", *SMALL, "--dry-run", "--backend", "reference").out
    assert "has no tiles" in out


def test_dry_run_of_gpu_kernels_needs_no_gpu(capsys):
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    arguments = ["-i", 64, 64, "-w", 9, "-d", 32, "--dtype", "bf16", "--device", "cpu"]
    arguments += ["--backend", "triton", "--dry-run", "--backprop"]
    rows = table(called(capsys, "profile", *arguments, "--max-configs", 3).out)
    assert len(rows) == 9 and [row[0].endswith("*") for row in rows] == [True, False, False] * 3
    rule = Neighborhood.create(2, 9)
    problem = ("forward", rule, (64, 64), (64, 64), 32, 32, 2)
    tuned = tiles.candidates(*problem)[5]
    tuning.remember(tiles.key(*problem), tuned)
    rows = table(called(capsys, "profile", *arguments, "--max-configs", 3).out)
    assert rows[0][0] == f"{by(tuned.q_block[1:])} *"
    every = table(called(capsys, "profile", *arguments, "--max-configs", 0).out)
    assert len(every) == sum(len(tiles.candidates(k, *problem[1:])) for k in KINDS)


def test_dry_run_of_a_backend_whose_gradient_another_runs(capsys):
    pytest.importorskip("triton")
    arguments = ["-i", 64, 64, "-w", 9, "--dtype", "bf16", "--device", "cpu"]
    arguments += ["--backend", "hopper", "--dry-run", "--backprop", "--max-configs", 2]
    for dim, gradient in ((64, "hopper"), (256, "triton")):
        out = called(capsys, "profile", *arguments, "-d", dim).out
        assert re.search(r"hopper, kernel forward: 2 of \d+ tiles", out)
        for kind in ("dq", "dkdv"):
            assert re.search(rf"{gradient}, kernel {kind}: 2 of \d+ tiles", out)
        assert len(table(out)) == 6


def test_optimize(capsys, monkeypatch):
    """The clock is made up, so that no GPU is needed."""
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    from natten.profiler import measure

    times = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(
        measure, "graph_time", lambda call, device, warmup: Timing(next(times), 0.0)
    )
    rule = Neighborhood.create(2, 3)
    problem = Problem((8, 6), rule)
    monkeypatch.setattr("natten.profiler.natten_call", lambda *_, **__: None)
    args = type("Arguments", (), {"json": None, "csv": None, "backprop": False, "max_configs": 3})()
    args.optimize_warmup_steps = 1
    profile_command._optimize(args, problem, "triton", [("triton", "forward")])
    out = capsys.readouterr().out
    assert "3 tiles tried; 5.00 us forward" in out and "3.00 us with the fastest" in out
    arguments = ("forward", rule, (8, 6), (8, 6), 64, 64, 4)
    assert tiles.choose(*arguments) == tiles.candidates(*arguments)[1]


def test_long_lists_of_kernels_are_cut(capsys):
    problem = Problem((8,), Neighborhood.create(1, 3))
    row = Row("natten triton", "forward", "graph", Timing(2e3, 1.0), 1.5, 20.0)
    kernels = [Kernel("k" * 90 + str(i), 1, float(20 - i)) for i in range(11)]
    profile_command.print_report(Report(problem, "triton", [row], {"forward": kernels}))
    rows = table(capsys.readouterr().out)
    assert rows[0][3] == "2.00 ms" and rows[0][5] == "1.5"
    assert len(rows) == 10 and rows[-1][0] == "3 others" and max(map(len, rows[1])) == 60


def test_simulate(capsys):
    layer = ["-i", 30, 48, 80, "-w", 18, 24, 24, "-n", 24]
    out = called(capsys, "simulate", *layer, "-s", 16, 8, 8, "--device", "h200").out
    rows = {row[1]: row for row in table(out)}
    assert "at most 11.1x by FLOPs" in out and "of 10368 strides" in out
    assert rows["1x1x1"][7] == "7.5x" and rows["16x8x8"][6] == "all"
    every = json.loads(called(capsys, "simulate", "-i", 9, "-w", 4, "--all", "--json").out)
    assert [each["stride"] for each in every] == [[1], [2], [3], [4]]


def test_simulate_shows_the_finest_stride_without_masks(capsys):
    """It is shown even where memory is the bound, so that it is not faster."""
    arguments = ["-i", 40, "-w", 10, "--q-tile", 2, "--kv-tile", 1, "--bandwidth", 1e-6]
    rows = table(called(capsys, "simulate", *arguments).out)
    assert [(row[1], row[6] == "all", row[10]) for row in rows] == [
        ("1", False, "memory"), ("2", True, "memory"),
    ]  # fmt: skip


def test_simulate_windows_near_a_wish(capsys, tmp_path):
    path = tmp_path / "front.json"
    arguments = ["-i", 96, 96, "-w", 32, "-s", 4, "--near", 0.25, "--top", 3, "--json", path]
    rows = table(called(capsys, "simulate", *arguments).out)
    assert rows[0][:2] == ["32x32", "4x4"] and len(rows) == 4
    wish, *shown = json.loads(path.read_text())
    assert len(shown) == 3
    every = json.loads(called(capsys, "simulate", *arguments[:-1], "-", "--all").out)[1:]
    farthest = max(abs(each["kept"] - wish["kept"]) for each in shown)
    others = [each for each in every if each not in shown]
    assert others and all(abs(each["kept"] - wish["kept"]) >= farthest for each in others)


def test_simulate_a_device_as_given(capsys):
    arguments = ["-i", 32, "-w", 8, "--tflops", 1.5, "--q-tile", 4, "--kv-tile", 2, "--aligned"]
    out = called(capsys, "simulate", *arguments).out
    assert "as given: 1.5 TFLOP/s, 3.35 TB/s, tiles of 4 queries, blocks of 2 keys, on a " in out


@pytest.mark.parametrize(
    "options, tiles",
    [
        (["--device", "h200"], "tiles of our hopper backend"),
        (["--device", "h200", "-d", "50"], "tiles of 128 queries, blocks of 64 keys"),
        (["--device", "a100"], "tiles of 128 queries, blocks of 64 keys"),
        (["--device", "cpu"], "tiles of 16 queries, blocks as large as needed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_simulate_says_whose_tiles_it_counts(options, tiles, capsys):
    out = called(capsys, "simulate", "-i", 64, "-w", 16, *options).out
    assert re.search(rf", {tiles}$", out, re.MULTILINE), out


def test_env(capsys, monkeypatch):
    monkeypatch.setenv("NATTEN_LOG_LEVEL", "warning")
    monkeypatch.setenv("SECRET", "hunter2")
    out = called(capsys, "env").out
    assert f"natten: {__version__}" in out and f"torch: {torch.__version__}" in out
    assert ": runs" in out and "NATTEN_LOG_LEVEL: warning" in out
    assert "hunter2" not in out
    found = json.loads(called(capsys, "env", "--json").out)
    reasons = found["backends"]["na*d, cpu, float32"]
    assert list(reasons.values()).count("runs") == 1
    if not torch.cuda.is_available():
        assert reasons["triton"] == "runs on GPUs, not on cpu"


def test_tables_with_and_without_rich_say_the_same(capsys, monkeypatch):
    header, rows = ("name", "time"), [("ours", "1 us"), ("dense", "10 us")]
    tables.print_table("Times:", header, rows, emphasized=0)
    plain = capsys.readouterr().out
    assert plain.splitlines()[-4:] == [
        "| name  |  time |",
        "|-------|------:|",
        "| ours  |  1 us |",
        "| dense | 10 us |",
    ]
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    tables.print_table("Times:", header, rows, emphasized=0)
    colored = capsys.readouterr().out
    assert colored != plain and re.sub("\x1b\\[[0-9;]*m", "", colored) == plain
    monkeypatch.setattr(tables, "has_rich", lambda: False)
    tables.print_table("Times:", header, rows, emphasized=0)
    assert capsys.readouterr().out == plain


@pytest.mark.parametrize("rich", [False, True])
def test_progress(rich, capsys, monkeypatch):
    if rich:
        pytest.importorskip("rich")
    monkeypatch.setattr(tables, "has_rich", lambda: rich)
    with tables.progress(2) as step:
        step("no terminal")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with tables.progress(2) as step:
        step("first")
        step("second")
    captured = capsys.readouterr()
    assert captured.out == "" and "second" in captured.err
    assert rich or captured.err == "[1/2] first\n[2/2] second\n"


def test_durations():
    times = [0.1234, 9.87, 12.34, 999.4, 1000, 45_600, 1e6, 1.5e8]
    assert [tables.duration(each) for each in times] == [
        "0.12 us", "9.87 us", "12.3 us", "999 us", "1.00 ms", "45.6 ms", "1.00 s", "150 s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "module, arguments",
    [("natten.profiler", [*SMALL, "--no-dense"]), ("natten.cli", ["env"])],
    ids=["profiler", "cli"],
)
def test_as_a_program(module, arguments):
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert __version__ in done.stdout
    done = subprocess.run([*command, "--frobnicate"], capture_output=True, text=True)
    assert done.returncode == 2


def test_a_reader_that_leaves_is_no_failure(tmp_path):
    """``natten env | head -1`` does this."""
    code = "import os, sys; from natten.cli import main; sys.exit(main(['env']))"
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed, open(tmp_path / "err", "w+") as err:
        subprocess.run([sys.executable, "-c", code], stdout=closed, stderr=err)
        err.seek(0)
        assert err.read() == ""
