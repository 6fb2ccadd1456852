"""Every command of the command line runs on a CPU, with good and bad arguments."""

import csv
import io
import itertools
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

from natten import __version__, profiler, simulator, tuning
from natten.backends.interface import KINDS
from natten.cli import COMMANDS, _parser, draw, main, options, tables, tiles
from natten.cli import profile as profile_command
from natten.cli.messages import in_options
from natten.cli.window import window_of
from natten.neighborhood import BOUNDARIES, Neighborhood
from natten.profiler import Problem, Report, Row, dense
from natten.profiler.measure import Kernel, Timing
from natten.tools.layouts import by

OURS = ("profile", "simulate", "env")
ROOT = Path(__file__).parents[1]
# The program that is installed.
PROGRAM = [sys.executable, "-c", "import sys, natten_command; sys.exit(natten_command.main())"]
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
    for name in (*OURS, "draw"):
        out = called(capsys, name, "--help").out
        assert f"natten {name} " in out.partition("examples:")[2]
    assert called(capsys, "--version").out == f"natten {__version__}\n"


def test_help_is_a_command(capsys):
    assert called(capsys, "help").out == called(capsys, "--help").out
    for name in (*OURS, "draw"):
        assert called(capsys, "help", name).out == called(capsys, name, "--help").out
    assert "did you mean profile?" in called(capsys, "help", "profle", code=2).err


@pytest.mark.parametrize("name", ["", *OURS, "draw"])
def test_help_fits_a_terminal_of_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = called(capsys, *filter(None, [name]), "--help").out
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_options_know_what_the_package_has():
    """They do not import it, so that help is printed at once."""
    assert options.BOUNDARIES == BOUNDARIES
    assert tuple(sorted(simulator.DEVICES)) == options.simulate.DEVICES
    assert tuple(draw.KINDS) == options.draw.KINDS
    for short, long in options.profile.DTYPES.items():
        bits = int(re.sub(r"\D", "", short))
        assert getattr(torch, long).itemsize * 8 == bits


def parse(line):
    """Parse the arguments of a command line ``natten NAME ...`` without running it."""
    _, name, *arguments = shlex.split(line)
    if name == "help" or "--help" in arguments:
        return
    args = _parser(name).parse(arguments)
    if name != "env":
        window_of(args)


def examples():
    """The command lines in the help texts and in the documentation."""
    for name in (*OURS, "draw"):
        epilog = _parser(name).epilog.replace("\\\n", "")
        lines = re.findall(rf"^ *(natten {name}.*)$", epilog, re.MULTILINE)
        assert lines, name
        yield from lines
    for page in (ROOT / "docs").glob("*.md"):
        for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            yield from re.findall(r"^natten (?:profile|simulate|env|draw).*$", block, re.MULTILINE)


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
        (["profile", "-i", "8", "y"], "'y'"),
        (["profile", "-i", "8x"], "--input-size: expected one value per axis, got '8x'"),
        (["profile", "-i", "0"], "at least 1"),
        (["profile", "-i", "4", "4", "4", "4"], "`--input-size`"),
        (["profile", "-i", "8", "16", "-w", "3", "17"], "on axis 1, 17 * 1 > 16"),
        (["profile", "-i", "8", "-w", "3", "3"], "`--window-size`"),
        (["profile", "-i", "8", "-w", "3", "-s", "4"], "got --stride 4 with --window-size 3."),
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
        (["profile", "-i", "8", "--boundary", "mirror"], "--boundary: expected one of shift, tr"),
        (["profile", "-i", "8", "--query-offset", "-1"], "at least 0"),
        (["profile", "-i", "8", "--query-offset", "8"], "`--query-offset` must leave"),
        (["profile", "-i", "8", "--query-offset", "1", "--query-shape", "8"], "1 + 8 > 1 * 8"),
        (["profile", "-i", "8", "--queries-per-key", "2", "2"], "`--queries-per-key`"),
        (["simulate", "-i", "8", "-w", "3", "--query-offset", "2", "--aligned"], "`--aligned`"),
        (["simulate", "-i", "8", "-w", "9"], "on axis 0, 9 * 1 > 8"),
        (["simulate", "-i", "8", "-w", "3", "--device", "abacus"], "'abacus'"),
        (
            ["simulate", "-i", "8", "-w", "3", "--tflops", "0"],
            "--tflops: expected a number above 0",
        ),
        (
            ["simulate", "-i", "8", "-w", "3", "--bandwidth", "nan"],
            "--bandwidth: expected a number above 0",
        ),
        (["simulate", "-i", "8", "-w", "3", "--near", "2"], "`--near`"),
        (["simulate", "-i", str(10**9), "-w", "3"], "`--input-size` must have at most"),
        (["env", "--frobnicate"], "there is no option --frobnicate\n\nusage: natten env"),
        (["profil"], "did you mean profile?"),
        (["profile", "-i", "8", "--windowsize", "3"], "--windowsize; did you mean --window-size?"),
        (["profile", "-i", "8", "--kernel-size=3"], "--kernel-size; did you mean --window-size?"),
        (["profile", "-i", "8", "-dim", "3"], "there is no option -dim; did you mean --dim?"),
        (["profile", "-i", "8", "-x", "3"], "there is no option -x\n"),
        (["profile", "-i", "8", "--dtype", "bfloat17"], "got 'bfloat17'; did you mean bfloat16?"),
        (["profile", "-i", "8", "--backend", "tritn"], "got 'tritn'; did you mean triton?"),
        (["profile", "-i", "8", "--device", "gpu"], "--device: expected cpu, cuda, or cuda:0"),
        (["profile", "-i", "8", "--optimize", "--dry-run"], "`--optimize` measures"),
        (["profile", "-i", "8", "--csv", "-", "--dry-run"], "`--csv` writes times"),
        (["profile", "-i", "8", "--backend", "fav2", "--dry-run"], "not fav2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments(arguments, message, capsys):
    captured = called(capsys, *arguments, code=2)
    assert message in captured.err and captured.out == ""


def test_a_layout_that_memory_can_not_hold(capsys, monkeypatch):
    monkeypatch.setattr(profiler, "free_memory", lambda device: 10**9)
    err = called(capsys, "profile", "-i", "9999x9999", "-w", "3", "--device", "cpu", code=2).err
    assert "`--input-size` 9999x9999 is too much for cpu: the tensors take 102 GB" in err


def test_errors_come_before_the_usage(capsys):
    err = called(capsys, "profile", "-i", "8", "-b", "none", code=2).err
    assert err.splitlines() == [
        "natten profile: error: --batch-size: expected an integer that is at least 1, got 'none'",
        "",
        "usage: natten profile -i N [N ...] [-w N [N ...]] [options]",
        "natten profile --help lists everything.",
    ]


@pytest.mark.parametrize("device", ["cuda:99", "cuda"])
def test_a_gpu_that_is_not_there(device, capsys, monkeypatch):
    """The error says what is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device != "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Abacus {index}")
    err = called(capsys, "profile", "-i", 8, "--device", device, code=2).err
    there = "cuda:0 (Abacus 0)" if device != "cuda" else "no GPU, only cpu ("
    assert f"`--device` {device} is not here: PyTorch {torch.__version__} sees {there}" in err


def test_a_device_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = _parser("profile").parse(["-i", "8", "--device", "cuda:1"])
    problem = profile_command.problem_of(args)
    assert problem.device == torch.device("cuda", 1) and problem.dtype == torch.bfloat16


def test_values_per_axis_and_dtypes_in_other_forms():
    line = "-i 56x48 -w 7,5 --dilation 2 -c 1,false --boundary shift,truncate --query-offset 0x1"
    args = _parser("profile").parse([*line.split(), "--dtype", "bfloat16"])
    assert (args.input_size, args.window_size, args.dilation) == ([56, 48], [7, 5], [2])
    assert args.causal == [True, False] and args.boundary == ["shift", "truncate"]
    assert args.query_offset == [0, 1] and args.dtype == "bf16"
    assert _parser("draw").parse(["tiles", "-i30x48x80", "--q-tile=4x4x8"]).q_tile == [4, 4, 8]
    assert _parser("draw").parse(["-i", "8", "--title", "-a b", "-o", "-"]).title == "-a b"


@pytest.mark.parametrize(
    "line, message",
    [
        ("simulate -i 8x9 -w 9", "got --window-size 9x9, --dilation 1x1 for --input-size 8x9: on"),
        ("profile -i 8 -w 9", "9 * 1 > 8; `--boundary truncate` cuts it."),
        ("profile -i 8x9 -c 1 --boundary circular", "--boundary circular,circular with --causal t"),
        ("profile -i 8 -w 3 --query-shape 4", "`--input-size` and `--query-shape` must be the sa"),
        ("simulate -i 8x8 -w 4 --q-tile 4", "`--q-tile` must be 2 integers of at least 1, one p"),
        ("draw -i 8 -w 3 -o x.bmp", "`--output` must end in .svg or .png, got 'x.bmp'"),
        ("draw -i 8 -w 3 -q 9", "`--query` must be one of the layout 8, got 9."),
    ],
)
def test_messages_name_options(line, message, capsys):
    err = called(capsys, *line.split(), code=2).err
    assert message in err
    assert not re.search(r"kernel_size|is_causal|query_\w|q_tile|fit_window|\(\d+,|`path`", err)


def test_what_is_no_option_stays_as_it_is():
    args = _parser("simulate").parse(["-i", "8"])
    text = "`frames` and `rpb` of (2) are in natten.functional (one per axis)."
    assert in_options(text, args) == text


def test_files_that_can_not_be_written_are_told_before_anything_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("natten.profiler.profile", None)
    full, closed = tmp_path / "full.csv", tmp_path / "closed"
    full.touch()
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path not in (full, closed))
    for path, why in (
        (tmp_path, "is a folder"),
        (full, "can not be written: no right to"),
        (full / "below", "can not be written"),
        (closed / "new" / "file.json", f"can not be written: no right to '{closed}'"),
    ):
        for command in (
            ["profile", *SMALL, "--json"],
            ["profile", *SMALL, "--csv"],
            ["simulate", "-i", 8, "-w", 3, "--json"],
            ["env", "--json"],
            ["draw", "-i", 8, "-w", 3, "-o"],
        ):
            captured = called(capsys, *command, path, code=2)
            assert why in captured.err and str(path) in captured.err and captured.out == ""


def test_missing_folders_are_made(capsys, tmp_path):
    for command, name in (
        (["profile", *SMALL, "--no-dense", "--json"], "a/report.json"),
        (["profile", *SMALL, "--no-dense", "--csv"], "b/times.csv"),
        (["simulate", "-i", 8, "-w", 3, "--json"], "c/d/rows.json"),
        (["env", "--json"], "e/env.json"),
        (["draw", "-i", 8, "-w", 3, "-o"], "f/window.svg"),
    ):
        called(capsys, *command, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 100


def test_without_matplotlib_a_walk_is_a_page(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    walk = ["draw", "walk", "-i", 6, "-w", 3]
    assert "wrote natten-walk.html" in called(capsys, *walk).out
    assert called(capsys, *walk, "-o", "-").out.startswith("<!doctype html>")
    err = called(capsys, *walk, "-o", "walk.gif", code=2).err
    assert "`--output` must end in .html, got 'walk.gif': matplotlib" in err
    assert [each.name for each in tmp_path.iterdir()] == ["natten-walk.html"]


def test_an_interruption_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("natten.profiler.profile", lambda *_, **__: signal.raise_signal(2))
    captured = called(capsys, "profile", *SMALL, code=130)
    assert captured.err == "natten: interrupted\n" and captured.out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_ctrl_c_ends_without_a_traceback():
    command = [*PROGRAM, "profile", "-i", "60000", "-w", "7", "-n", "8", "--no-dense"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert any("attention" in line for line in program.stdout)  # it measures
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=60)
    assert err == "natten: interrupted\n" and program.returncode == 130


def test_ctrl_c_while_pytorch_is_imported():
    code = """
import signal, sys, natten_command
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv[1:] = ["env"]
sys.exit(natten_command.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "natten: interrupted\n" and done.returncode == 130


def test_failures_are_told_without_a_traceback(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
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
    assert [each["attention"] for each in found["times"]] == ["natten sdpa"]
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
    triton = pytest.importorskip("natten.backends.triton.tiles")
    arguments = ["-i", 64, 64, "-w", 9, "-d", 32, "--dtype", "bf16", "--device", "cpu"]
    arguments += ["--backend", "triton", "--dry-run", "--backprop"]
    rows = table(called(capsys, "profile", *arguments, "--max-configs", 3).out)
    assert len(rows) == 9 and [row[0].endswith("*") for row in rows] == [True, False, False] * 3
    rule = Neighborhood.create(2, 9)
    problem = ("forward", rule, (64, 64), (64, 64), 32, 32, 2)
    tuned = triton.candidates(*problem)[5]
    tuning.remember(triton.key(*problem), tuned)
    rows = table(called(capsys, "profile", *arguments, "--max-configs", 3).out)
    assert rows[0][0] == f"{by(tuned.q_block[1:])} *"
    every = table(called(capsys, "profile", *arguments, "--max-configs", 0).out)
    assert len(every) == sum(len(triton.candidates(k, *problem[1:])) for k in KINDS)


def test_dry_run_with_the_gradient(capsys):
    pytest.importorskip("triton")
    arguments = ["-i", 64, 64, "-w", 9, "--dtype", "bf16", "--device", "cpu"]
    arguments += ["--backend", "hopper", "--dry-run", "--backprop", "--max-configs", 2]
    for dim in (64, 256):
        out = called(capsys, "profile", *arguments, "-d", dim).out
        for kind in KINDS:
            assert re.search(rf"hopper, kernel {kind}: 2 of \d+ tiles", out)
        assert len(table(out)) == 6


def test_optimize(capsys, monkeypatch):
    """The clock is made up, so that no GPU is needed."""
    triton = pytest.importorskip("natten.backends.triton.tiles")
    times = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(tiles, "graph_time", lambda call, device, warmup: Timing(next(times), 0.0))
    rule = Neighborhood.create(2, 3)
    problem = Problem((8, 6), rule)
    monkeypatch.setattr(tiles, "natten_call", lambda *_, **__: None)
    args = type("Arguments", (), {"json": None, "csv": None, "backprop": False, "max_configs": 3})()
    args.optimize_warmup_steps = 1
    tiles.tune(args, problem, "triton", [("triton", "forward")])
    out = capsys.readouterr().out
    assert "3 tiles tried; 5.00 us forward" in out and "3.00 us with the fastest" in out
    arguments = ("forward", rule, (8, 6), (8, 6), 64, 64, 4)
    assert triton.choose(*arguments) == triton.candidates(*arguments)[1]


def test_dry_run_honors_every_option(capsys, tmp_path):
    triton = pytest.importorskip("natten.backends.triton.tiles")
    arguments = ["profile", "-i", 64, 64, "-w", 9, "-d", 32, "--dtype", "bf16", "--device", "cpu"]
    arguments += ["--backend", "triton", "--dry-run", "--max-configs", 2]
    problem = ("forward", Neighborhood.create(2, 9), (64, 64), (64, 64), 32, 32, 2)
    other = triton.candidates(*problem)[7]
    forced = ["--q-tile", by(other.q_block[1:]), "--kv-tile", by(other.kv_block[1:])]
    out = called(capsys, *arguments, *forced, "--persistent").out
    rows = table(out)
    assert rows[0][:2] == [f"{by(other.q_block[1:])} *", by(other.kv_block[1:])] and len(rows) == 3
    assert "Accepted, without effect here: --persistent." in out
    err = called(capsys, *arguments, "--q-tile", "7x7", code=2).err
    assert "`--q-tile` 7 7 is nothing that the kernel 'forward'" in err
    found = json.loads(called(capsys, *arguments, *forced, "--json").out)
    (kernel,) = found["kernels"]
    assert found["problem"]["shape"] == [64, 64] and kernel["kernel"] == "forward"
    assert kernel["tiles"][0]["queries"] == [*other.q_block[1:]] and kernel["tiles"][0]["used"]
    path = tmp_path / "tiles.json"
    assert table(called(capsys, *arguments, "--json", path).out)
    assert len(json.loads(path.read_text())["kernels"][0]["tiles"]) == 2
    plain = ["profile", *SMALL, "--dry-run", "--q-tile", 4, 4, "--backend", "hopper-fna"]
    out = called(capsys, *plain).out
    assert "hopper-fna is a hint here: backend sdpa would run." in out
    assert "Tile sizes have no effect on backend sdpa" in out


def test_long_lists_of_kernels_are_cut(capsys):
    problem = Problem((8,), Neighborhood.create(1, 3))
    row = Row("natten triton", "forward", "graph", Timing(2e3, 1.0), 1.5, 20.0)
    kernels = [Kernel("k" * 90 + str(i), 1, float(20 - i)) for i in range(11)]
    report = Report(problem, "triton", [row], {"forward": kernels}, {"forward": 7})
    profile_command.print_rest(report)
    out = capsys.readouterr().out
    rows = table(out)
    assert len(rows) == 9 and rows[-1][0] == "3 others" and max(map(len, rows[0])) == 60
    assert "a call of natten triton, forward, the mean of 7 calls, by" in out


def test_rows_appear_as_they_are_measured(capsys, monkeypatch):
    """Each is printed before the next measurement begins."""
    seen = []

    def clock(call, device, warmup):
        seen.append(capsys.readouterr().out)
        return Timing.of([2e3, 1e3, 4e3])

    monkeypatch.setattr("natten.profiler.measure.eager_time", clock)
    last = called(capsys, "profile", *SMALL, "--backprop").out
    assert "2-D 8x6, window 3x3" in seen[0]
    rows = [
        table("| |\n|-|\n" + "\n".join(re.findall(r"^\| \w+ sdpa .*$", text, re.M)))
        for text in (*seen[1:], last)
    ]
    assert [[each[:2] for each in found] for found in rows] == [
        [["dense sdpa", "forward"]],
        [["natten sdpa", "forward"]],
        [["dense sdpa", "forward+backward"]],
        [["natten sdpa", "forward+backward"]],
    ]
    assert rows[1][0][3:5] == ["2.00 ms", "1.00x"]


def test_dense_attention_that_is_hopeless_is_left_out(capsys, monkeypatch):
    arguments = ["profile", *SMALL, "--json"]
    monkeypatch.setattr(dense, "LIMIT_SECONDS", 0.0)
    found = json.loads(called(capsys, *arguments).out)
    assert [each["attention"] for each in found["times"]] == ["natten sdpa"]
    assert "dense sdpa, forward, is left out: it would take about 0 s a call." in found["notes"]
    assert "--dense times it all the same." in found["notes"]
    found = json.loads(called(capsys, *arguments, "--dense").out)
    assert [each["attention"] for each in found["times"]] == ["dense sdpa", "natten sdpa"]
    monkeypatch.setattr(dense, "free_memory", lambda device: 10)
    found = json.loads(called(capsys, *arguments).out)
    assert "would need 6.14e-06 GB of memory, of which 1e-08 are free" in found["notes"][-2]


def test_simulate(capsys):
    layer = ["-i", 30, 48, 80, "-w", 18, 24, 24, "-n", 24]
    out = called(capsys, "simulate", *layer, "-s", 16, 8, 8, "--device", "h200").out
    rows = {row[1]: row for row in table(out)}
    assert "at most 11.1x by FLOPs" in out and "of 10368 strides" in out
    assert rows["1x1x1"][4] == "7.5x" and rows["16x8x8"][6] == "all"
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


def test_simulate_of_more_strides_than_can_be_tried(capsys, monkeypatch):
    monkeypatch.setattr(simulator, "MOST_COMBINATIONS", 100)
    arguments = ["simulate", "-i", 16, 40, "-w", 10, 20]
    out = called(capsys, *arguments, "--device", "a100").out
    assert "The window has 200 strides. Along some axes, only powers of two and" in out
    assert " of 60 strides" in out
    every = json.loads(called(capsys, *arguments, "--all", "--json").out)
    assert sorted({each["stride"][1] for each in every}) == [1, 2, 4, 8, 16, 20]
    front = ["--near", 0.9, "--all", "--json"]
    thinned = json.loads(called(capsys, "simulate", "-i", 99, 99, "-w", 50, *front).out)
    assert len(thinned) > 5


def test_simulate_shows_progress(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    err = called(capsys, "simulate", "-i", 64, "-w", 16).err
    assert err.startswith("\rcounting the blocks of tile 1 of ") and err.endswith("\r\033[K")
    monkeypatch.setattr(tables.time, "monotonic", itertools.count().__next__)
    err = called(capsys, "simulate", "-i", 64, "-w", 16).err
    assert "comparing tiles for 16 combinations" in err and "prediction 0 of 16" in err


def test_tables_with_and_without_rich_say_the_same(capsys, monkeypatch):
    header, rows = ("name", "time"), [("ours", "1 us"), ("dense", "10 us")]
    tables.print_table("Times:", header, rows, bold=0)
    plain = capsys.readouterr().out
    assert plain.splitlines() == [
        "", "Times:", "",
        "| name  |  time |",
        "|-------|------:|",
        "| ours  |  1 us |",
        "| dense | 10 us |",
    ]  # fmt: skip
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    tables.print_table("Times:", header, rows, bold=0)
    colored = capsys.readouterr().out
    assert colored != plain and re.sub("\x1b\\[[0-9;]*m", "", colored) == plain
    monkeypatch.setattr(tables, "has_rich", lambda: False)
    tables.print_table("Times:", header, rows, bold=0)
    assert capsys.readouterr().out == plain


def test_a_table_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(tables, "has_rich", lambda: False)
    monkeypatch.setenv("COLUMNS", "26")
    header = ("name", "kind", "time", "speed", "rate")
    rows = [("ours", "graph", "1 us", "10x", "3 GB/s"), ("dense", "graph", "10 us", "1x", "1 GB/s")]
    tables.print_table("", header, rows)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "In all rows: kind graph.",
        "",
        "| name  |  time | speed |",
        "|-------|------:|------:|",
        "| ours  |  1 us |   10x |",
        "| dense | 10 us |    1x |",
        "",
        "| name  |   rate |",
        "|-------|-------:|",
        "| ours  | 3 GB/s |",
        "| dense | 1 GB/s |",
    ]
    tables.print_table("", header, rows[:1])  # of one row, no column is constant
    assert "|  kind | time |" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    tables.print_table("", header, rows)
    assert "| ours  | graph |  1 us |   10x | 3 GB/s |" in capsys.readouterr().out


def test_progress(capsys, monkeypatch):
    with tables.progress(2) as status:
        status("no terminal")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "12")
    with tables.progress(2) as status:
        status("first")
        status("second is long")
    captured = capsys.readouterr()
    assert captured.err == "\r[1/2] first\033[K\r[2/2] secon\033[K\r\033[K"
    assert captured.out == ""


def test_durations():
    times = [0.1234, 9.87, 12.34, 999.4, 1000, 45_600, 1e6, 1.5e8]
    assert [tables.duration(each) for each in times] == [
        "0.12 us", "9.87 us", "12.3 us", "999 us", "1.00 ms", "45.6 ms", "1.00 s", "150 s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "module, arguments",
    [
        ("natten", ["env"]),
        ("natten.cli", ["env"]),
        ("natten.profiler", [*SMALL, "--no-dense"]),
    ],
    ids=["natten", "cli", "profiler"],
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


@pytest.mark.parametrize(
    "line", ["", "--help", "--version", "help", "help draw", "profile --help", "simulate -i 8 -h"]
)
def test_help_and_version_do_not_import_torch(line):
    code = (
        f"import sys, natten_command; sys.argv[1:] = {line.split()}; natten_command.main(); "
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'triton')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr
    shown = done.stdout + done.stderr
    assert "usage: natten" in shown or shown.startswith(f"natten {__version__}")


def test_the_installed_program_is_the_command(capsys):
    done = subprocess.run([*PROGRAM, "env"], capture_output=True, text=True)
    assert done.returncode == 0 and f"natten: {__version__}" in done.stdout
    done = subprocess.run([*PROGRAM, "simulate", "-i", "8", "-w", "9"], capture_output=True)
    assert done.returncode == 2
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'natten = "natten_command:main"' in text
