"""The Hopper kernels and a release of Triton that nobody checked them with."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import hopper, reference

from natten import tuning
from natten.backends import Problem
from natten.backends.hopper import probe

GPU = Problem("attention", torch.device("cuda", 0), torch.bfloat16, 64, 64)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The commands that would run, on a machine that seems to have an H100 and a new Triton."""
    found = []
    monkeypatch.setenv("NATTEN_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.99.0"))
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: found.append(command))
    monkeypatch.setattr(probe, "_started", {})
    return found


def test_a_new_release_is_tried_once(started):
    for _ in range(3):
        said = hopper.unsupported(GPU)
        assert said is not None and said.startswith("is being tried with Triton 3.99.0")
    assert started == [probe._command("keep('3.99.0', 0)")]


def test_nothing_is_started_while_a_graph_is_captured(started, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert hopper.unsupported(GPU) is not None and not started


@pytest.mark.parametrize(
    ("code", "errors", "said"),
    [
        (0, "a warning", None),
        (
            1,
            "Traceback:\n  x: 1\nArithmeticError: LSE is off\nBye",
            ": ArithmeticError: LSE is off",
        ),
        (-11, "", ": exit code -11"),
    ],
)
def test_the_answer_is_kept(code, errors, said, started, monkeypatch):
    done = SimpleNamespace(returncode=code, stderr=errors)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    probe.keep("3.99.0", 0)
    expected = said and f"does not work with Triton 3.99.0{said}"
    assert hopper.unsupported(GPU) == expected and not started


def test_a_try_that_hangs_is_an_answer(started, monkeypatch):
    def run(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    probe.keep("3.99.0", 0)
    assert "nothing after 600 seconds" in hopper.unsupported(GPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_the_processes_run(tmp_path, monkeypatch):
    """Here the kernels can not, which is what they find."""
    monkeypatch.setenv("NATTEN_CACHE", str(tmp_path))
    command, options = probe._command("keep('3.99.0', 0)"), probe._quiet()
    subprocess.run(command, check=True, **options)
    found = tuning.lookup("hopper with Triton 3.99.0")
    assert re.match(r"(RuntimeError|AssertionError): .*(CUDA|NVIDIA)", found)


def test_right_and_wrong_kernels():
    cpu = torch.device("cpu")
    tried = []

    def forward(inputs, rule, scale):
        tried.append(Problem.of("attention", inputs, rule, scale))
        return reference.forward(inputs, rule, scale)

    backward = reference.backward
    probe.compare(SimpleNamespace(forward=forward, backward=backward), cpu, torch.bfloat16)
    rings = [each for each in tried if each.has_rings]
    assert rings and not any(map(hopper.pads, rings))  # the kernels have these themselves
    wrong = SimpleNamespace(
        forward=reference.forward,
        backward=lambda *args: backward(*args)._replace(key=torch.zeros_like(args[2].key)),
    )
    with pytest.raises(ArithmeticError, match=r"key of .* is off by 1"):
        probe.compare(wrong, cpu, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="an H100's"
)
def test_the_kernels_are_right_here():
    probe.attempt(hopper, torch.cuda.current_device())
