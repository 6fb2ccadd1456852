"""Which releases of Triton the GPU backends take, and what they say of the others."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import hopper, triton

import natten
from natten.backends import Problem
from natten.backends.triton import releases
from natten.cli import env

GPU = Problem("attention", torch.device("cuda"), torch.bfloat16, 64, 64)
OLD = "needs Triton 3.4 or newer, not 3.2.0"


@pytest.fixture
def install(monkeypatch):
    """Let a release of Triton seem to be installed beside an H100; None for no Triton."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def install(version):
        made = None if version is None else SimpleNamespace(__version__=version)
        monkeypatch.setitem(sys.modules, "triton", made)

    return install


@pytest.mark.parametrize(
    ("version", "portable", "fast"),
    [
        (None, "needs the package triton", "needs the package triton"),
        ("3.2.0", OLD, "needs Triton 3.6 or newer, not 3.2.0"),
        ("3.4.0", None, "needs Triton 3.6 or newer, not 3.4.0"),
        ("3.6.0", None, None),
        ("3.9.0+git1234", None, None),
        ("unknown", OLD.replace("3.2.0", "unknown"), "needs Triton 3.6 or newer, not unknown"),
    ],
)
def test_releases_of_triton(install, version, portable, fast):
    install(version)
    assert triton.unsupported(GPU) == portable
    assert hopper.unsupported(GPU) == fast


def test_the_next_backend_runs(install, monkeypatch):
    """With the interpreter, the portable backend takes tensors of a CPU."""
    install("3.2.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.randn(1, 9, 1, 64, requires_grad=True)
    said = natten.backends.explain(q, kernel_size=3).splitlines()
    assert f"triton: {OLD}" in said and any(line.endswith(": runs") for line in said)
    assert env.environment()["backends"]["na*d, cpu, float32"]["triton"] == OLD
    natten.na1d(q, q, q, kernel_size=3).sum().backward()
    with pytest.warns(UserWarning, match=OLD):
        natten.na1d(q, q, q, kernel_size=3, backend="triton")


def test_releases_are_numbers():
    assert releases.release("3.10.0rc1") == (3, 10) > releases.release("3.9.1")
