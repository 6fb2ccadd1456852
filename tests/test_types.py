"""The types that users' checkers see, and the text that ``help`` shows."""

import importlib.util
import inspect
import json
import os
import pathlib
import pydoc
import re
import subprocess
import sys
import typing

import pytest

import natten

USES = pathlib.Path(__file__).parent / "typing_uses.py"
SOURCE = pathlib.Path(natten.__file__).parent.parent
WRONG = {
    number
    for number, line in enumerate(USES.read_text(encoding="utf-8").splitlines(), 1)
    if line.endswith("# wrong")
}


def output(*command: str) -> str:
    environment = os.environ | {"MYPYPATH": str(SOURCE)}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=SOURCE.parent, env=environment
    ).stdout


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"needs the package {module}")


@needs("mypy")
def test_mypy_finds_what_is_wrong():
    found = output(
        sys.executable, "-m", "mypy", "--no-pretty", "--follow-imports=silent", str(USES)
    )
    lines = re.findall(rf"{USES.name}:(\d+): error", found)
    assert {int(line) for line in lines} == WRONG, found


@needs("pyright")
def test_pyright_finds_what_is_wrong():
    command = ("--pythonpath", sys.executable, "--outputjson", str(USES))
    found = json.loads(output(sys.executable, "-m", "pyright", *command))["generalDiagnostics"]
    lines = {each["range"]["start"]["line"] + 1 for each in found if each["severity"] == "error"}
    assert lines == WRONG, found


PUBLIC = [getattr(natten, name) for name in natten.__all__ if callable(getattr(natten, name))]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
def test_results_have_types(function):
    """Every parameter and result of public functions has a type; so have methods of classes."""
    of_class = inspect.isclass(function)
    functions = (
        [f for n, f in vars(function).items() if inspect.isfunction(f) and not n.startswith("_")]
        if of_class
        else [function]
    )
    for each in functions:
        signature = inspect.signature(each)
        assert signature.return_annotation not in (inspect.Signature.empty, "Any", typing.Any), each
        names = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        assert all(p.annotation is not p.empty for p in names), each


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", ["na{}d", "na{}d_qk", "na{}d_av", "NeighborhoodAttention{}D"])
def test_help_lists_every_argument(name, rank):
    function = getattr(natten, name.format(rank))
    text = pydoc.render_doc(function)
    signature = inspect.signature(function)
    assert not any(p.kind == p.VAR_POSITIONAL for p in signature.parameters.values())
    for argument in signature.parameters:
        assert re.search(rf"\b{argument}\b", text), argument
    space = {1: "length", 2: "height, width", 3: "depth, height, width"}[rank]
    assert space in inspect.getdoc(function) and "*space" not in inspect.getdoc(function)
