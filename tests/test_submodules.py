"""Submodules are attributes of their package, and are imported when they are first asked for."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from typing import Any

import pytest

import natten
from natten.backends.triton import releases

MODULES = [
    each.name
    for each in pkgutil.walk_packages(natten.__path__, "natten.")
    if not each.name.endswith(".__main__")  # these are programs
]
GPU = {"natten.backends.hopper": releases.CHECKED[0], "natten.backends.triton": releases.OLDEST}

ABSENT = (
    *("triton", "matplotlib", "rich", "fvcore", "numpy", "sklearn"),
    *("fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty"),
)


def fresh(code: str) -> str:
    """The output of a program in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_submodule_is_an_attribute() -> None:
    found = releases.release(releases.version() or "")
    absent = tuple(name for name, oldest in GPU.items() if found < oldest)
    names = [name for name in MODULES if not name.startswith(absent)]
    assert "natten.tools.simulator.kernels" in names and "natten.tools.cli.tables" in names
    code = f"import natten\nfor name in {names}: eval(name)\nprint(natten.draw.draw_mask.__name__)"
    assert fresh(code) == "draw_mask\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_one_alone_is_enough() -> None:
    """Each is tested in a new process, so that no other import has brought it."""
    code = """
import importlib, natten, os, sys
for name in ("draw", "simulator", "profiler", "legacy.configs", "legacy.varlen", "cli.options"):
    assert f"natten.{name}" not in sys.modules
    if os.fork() == 0:
        os._exit(eval(f"natten.{name}") is not importlib.import_module(f"natten.{name}"))
    print(name, os.wait()[1])
"""
    assert [line.split()[1] for line in fresh(code).splitlines()] == ["0"] * 6


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = """
import sys, torch, torch.utils.flop_counter  # which imports Triton in some releases of PyTorch
before = set(sys.modules)
import natten
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("natten")))
print(*sorted(name for name in sys.modules if name.startswith("natten")))
"""
    foreign, ours = (line.split() for line in fresh(code).splitlines())
    assert foreign == []
    lazy = {f"natten.{x}" for x in ("draw", "simulator", "profiler", "cli", "backends.triton.plan")}
    lazy |= {f"natten.{x}" for x in ("tools", "tools.draw", "tools.simulator", "tools.profiler")}
    assert not lazy & set(ours)


def test_what_a_system_may_lack_is_not_needed() -> None:
    """Windows and macOS have no Triton, Windows has no module of POSIX, extras may be left out."""
    names = [name for name in MODULES if not name.startswith(tuple(GPU))]
    code = f"""
import sys, torch
sys.modules.update(dict.fromkeys({ABSENT}))
import natten
for name in {names}: eval(name)
q = torch.randn(1, 6, 6, 1, 8, requires_grad=True)
natten.na2d(q, q, q, 3).sum().backward()
print("triton" in natten.backends.explain(q, kernel_size=3), natten.cli.env.run.__name__)
natten.cli.main(["env"])
"""
    assert fresh(code).startswith("True run\n")


@pytest.mark.parametrize("first", ["natten.profiler.measure", "natten.tools.profiler.measure"])
def test_tools_are_the_same_modules_without_their_folders_name(first: str) -> None:
    code = f"""
import {first}, importlib, sys, natten
from natten.profiler import measure, profile
from natten.tools import profiler
assert natten.profiler is sys.modules["natten.profiler"] is profiler and profiler.profile is profile
assert natten.profiler.measure is measure is sys.modules["natten.tools.profiler.measure"]
assert importlib.import_module("natten.profiler.measure") is measure
assert profiler.__spec__.name == "natten.tools.profiler"
for wrong in ("natten.profiler.clocks", "natten.profiler.measure.clocks", "natten.profilers"):
    try:
        __import__(wrong)
    except ModuleNotFoundError as error:
        print(error.name)
"""
    assert fresh(code).split() == [
        "natten.profiler.clocks",
        "natten.profiler.measure.clocks",
        "natten.profilers",
    ]


@pytest.mark.parametrize(
    "package", ["", ".utils", ".backends", ".compat", ".legacy", ".tools", ".tools.cli"]
)
def test_what_is_no_submodule_is_an_attribute_error(package: str) -> None:
    module: Any = sys.modules["natten"]
    for part in package.split(".")[1:]:
        module = getattr(module, part)
    for name in ("darw", "__wrapped__", "a.b", "", "1"):
        with pytest.raises(AttributeError, match=f"'natten{package}' has no attribute"):
            getattr(module, name)
        assert not hasattr(module, name)
