"""``natten simulate --ranks`` shows the plan of `natten.distributed`."""

from __future__ import annotations

import json

import pytest

from natten.cli import main
from natten.distributed import plan
from natten.simulator import simulate

SMALL = ["simulate", "-i", "32", "24", "-w", "5", "7", "-n", "4", "-d", "16", "-b", "2"]


def test_it_shows_the_plan(capsys):
    assert main([*SMALL, "--ranks", "2", "2", "--link", "100", "--latency", "5"]) == 0
    out = capsys.readouterr().out
    time = 1e-6 * simulate((32, 24), (5, 7), heads=4, head_dim=16, batch=2).time_us
    found = plan(
        (32, 24), (5, 7), ranks={0: 2, 1: 2}, heads=4, head_dim=16, batch=2, bandwidth=1e11,
        latency=5e-6, flops=4 * 16 * 2 * 4 * 32 * 24 * 35 / time,
    )  # fmt: skip
    assert out.startswith(f"{found}\n") and "100 GB/s" in out and "5 us" in out


def test_one_number_splits_the_first_axis(capsys):
    assert main([*SMALL, "--ranks", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sizes"] == [[8] * 4, [24]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2", "2", "2"], "--ranks"),
        (["--ranks", "2", "--query-offset", "3"], "--query-offset"),
        (["--ranks", "2", "--link", "0"], "--link"),
        (["--ranks", "2", "--latency", "-1"], "--latency"),
        (["--ranks", "2", "--itemsize", "3"], "--itemsize"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err
