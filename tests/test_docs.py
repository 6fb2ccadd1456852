"""Every block of code in the documentation runs; blocks of one file share their names.

Examples in docstrings run, too, by pytest's ``--doctest-modules``. Blocks marked ``text`` are
output, or commands that install something.
"""

import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from helpers import RELEASE

import natten
from natten import backends
from natten.cli import main

ROOT = Path(__file__).parents[1]
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *SITE]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REFERENCE = runpy.run_path(str(ROOT / "docs" / "reference.py"))
LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")


COMMANDS = [
    pytest.param(line, id=f"{page.stem}: {line}")
    for page in PAGES
    for block in SHELL.findall(page.read_text(encoding="utf-8"))
    for line in block.splitlines()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page, tmp_path, monkeypatch):
    if page.name == "export.md" and RELEASE < (2, 8):
        pytest.skip("its exporter to ONNX does not say that it is one")
    monkeypatch.chdir(tmp_path)  # examples write their files here
    monkeypatch.setattr(backends, "BACKENDS", backends.BACKENDS)  # one page adds a backend
    torch.manual_seed(0)
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block.group(1), str(page), "exec"), names)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(line)
    assert program == "natten"
    code = main(arguments)
    if "--optimize" in arguments and not torch.cuda.is_available():
        assert code == 2 and "GPU" in capsys.readouterr().err
    else:
        assert code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_say_what_they_are(page):
    """A block without a known name would not run."""
    kinds = re.findall(r"^ *```(.*)\n(?:.*\n)*?^ *```$", page.read_text("utf-8"), re.MULTILINE)
    assert set(kinds) <= {"python", "sh", "text"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_exist(page):
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []
    if page in SITE:  # the site holds only docs/
        paths = [(page.parent / target).resolve() for target in local]
        assert [path for path in paths if not path.is_relative_to(ROOT / "docs")] == []


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in SITE)


SECTIONS = [
    pytest.param(path, members.split(), id=path)
    for page in sorted(REFERENCE["PAGES"].glob("*.md"))
    for path, members in REFERENCE["DIRECTIVE"].findall(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("path, members", SECTIONS)
def test_the_api_has_every_argument(path, members):
    found, section = REFERENCE["find"](path), REFERENCE["section"](path, members)
    headings = re.findall(r"^#+ (.*)$", section, re.MULTILINE)
    assert headings[0] == found.__name__ and not any("__" in each for each in headings)
    assert headings[1:] == [f"{found.__name__}.{name}" for name in members] or not members
    for call in (found, *(getattr(found, name) for name in members)):
        for name, parameter in inspect.signature(call).parameters.items():
            if name != "self" and parameter.annotation != "NoReturn":
                assert re.search(rf"^\| `\**{name}` \| .*\w.* \|$", section, re.MULTILINE), name


def test_the_api_has_every_public_name():
    names = {each.values[0].rpartition(".")[2] for each in SECTIONS}
    assert set(natten.__all__) - names == {"ArgumentError", "__version__"}
    for module in (natten.functional, natten.distributed, natten.draw):
        assert set(module.__all__) <= names


def test_types_of_the_api_are_links():
    section = REFERENCE["section"]("natten.functional.na2d")
    (row,) = re.findall(r"^\| `kernel_size` \| (.*?) \|", section, re.MULTILINE)
    assert row == "[`Dimension`](neighborhood.md#dimension)"
    text = (REFERENCE["PAGES"] / "neighborhood.md").read_text(encoding="utf-8")
    for name in ("Dimension", "Causal"):
        assert str(getattr(natten.neighborhood, name)).replace("collections.abc.", "") in text


def test_the_api_does_not_take_an_argument_without_a_meaning(monkeypatch):
    def function(known, other):
        """Text.

        Args:
            known: what it is.
        """

    monkeypatch.setattr(natten.functional, "na1d", function)
    with pytest.raises(ValueError, match="`other`"):
        REFERENCE["section"]("natten.functional.na1d")


def test_every_module_is_in_the_table_of_the_design():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[\w/]+(?:\.py|/)`.*?) \|", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    package = ROOT / "src" / "natten"
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert named == files | folders


def test_the_page_on_decoding_has_the_processor_of_the_example():
    text = (ROOT / "examples" / "ltx.py").read_text(encoding="utf-8")
    (processor,) = re.findall(
        r"^class AttendInParts:\n(?:(?: .*)?\n)*?(?=\n\n)", text, re.MULTILINE
    )
    assert processor in (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")


def test_the_table_of_backends_is_what_they_say():
    """``python docs/backends.py`` writes it."""
    names = runpy.run_path(str(ROOT / "docs" / "backends.py"))
    text = names["PAGE"].read_text(encoding="utf-8")
    assert names["page"](text) == text and names["table"]() in text


def test_the_outputs_of_commands_are_what_they_print():
    """``python docs/outputs.py`` writes them."""
    names = runpy.run_path(str(ROOT / "docs" / "outputs.py"))
    text = names["PAGE"].read_text(encoding="utf-8")
    assert text.count("<!-- output -->") == len(names["_OUTPUT"].findall(text)) >= 5
    assert names["page"](text) == text


def test_what_the_promise_of_stability_names_is_there():
    text = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    named = re.findall(r"`natten\.([a-z_.]+)`", text)
    assert len(named) > 9
    for path in named:
        found = natten
        for name in path.split("."):
            found = getattr(found, name)
    parameters = natten.NeighborhoodAttention1D(8, 2, 3, rel_pos_bias=True).state_dict()
    assert all(f"`{name}`" in text for name in parameters)
