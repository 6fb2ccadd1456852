"""The pages of docs/api, made of signatures and docstrings; a hook of mkdocs.

A line ``::: natten.functional.na2d`` of a page becomes a section with the signature, a table of all
arguments, and what else the docstring says. Names after a class, as in
``::: natten.varlen.VarlenLayout pack unpack``, are the methods to show; without them all are shown.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PAGES = Path(__file__).with_name("api")
DIRECTIVE = re.compile(r"^::: ([\w.]+)(.*)$", re.MULTILINE)
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Shape):\n", re.MULTILINE)
_ITEM = re.compile(r"^([\w*][\w*,.() \n]*):\s+(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
_ROLE = re.compile(r":\w+:`([\w.]+)`")
_SHAPE = re.compile(r"``(\[[^`]+\])``")
_SAID_SHAPE = re.compile(r"^``\[[^`]+\]``[,;.:] +|,? ``\[[^`]+\]``(?=\.$)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return DIRECTIVE.sub(lambda match: section(match[1], match[2].split()), markdown)


def find(path: str) -> Any:
    """The object that a line names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def section(path: str, members: Iterable[str] = ()) -> str:
    """The section of a function, or of a class and its methods and properties."""
    found = find(path)
    parts = _section(2, found.__name__, found)
    if inspect.isclass(found):
        parts += _properties(found)
        for name in members or _public_methods(found):
            parts += _section(3, f"{found.__name__}.{name}", getattr(found, name))
    return "\n\n".join(filter(None, parts))


def _section(level: int, title: str, found: Any) -> list[str]:
    text, sections = _parts(found)
    if inspect.isclass(found) and not {"Args", "Attributes"} & set(sections):
        sections |= _parts(found.__init__)[1]  # the layers of one rank
    signature = inspect.signature(found)
    parameters = [
        each
        for each in signature.parameters.values()
        if each.name != "self" and each.annotation != "NoReturn"  # catches unknown keywords
    ]
    if inspect.isclass(found):
        signature = signature.replace(return_annotation=inspect.Signature.empty)
    parts = [f"{'#' * level} {title}", _call(title, signature, parameters), _linked(text)]
    meanings = _items(sections.get("Args", sections.get("Attributes", "")))
    if parameters:
        parts.append(_arguments(title, parameters, meanings))
    if "Args" in sections and "Attributes" in sections:
        rows = [
            (f"`{name}`", _linked(text)) for name, text in _items(sections["Attributes"]).items()
        ]
        parts.append(_table(("Attribute", "Meaning"), rows))
    if "Shape" in sections:
        parts.append(f"**Shape.** {_linked(sections['Shape'])}")
    returned = _type(signature.return_annotation)
    if returned:
        text = _linked(sections.get("Returns", ""))
        parts.append(f"**Returns** {returned}{': ' if text else ''}{text}")
    for error, text in _items(sections.get("Raises", "")).items():
        parts.append(f"**Raises** `{error}`: {_linked(text)}")
    if "Example" in sections:
        parts.append(f"**Example**\n\n```pycon\n{sections['Example']}\n```")
    return parts


def _parts(found: Any) -> tuple[str, dict[str, str]]:
    """The text of a docstring, and its sections by title."""
    text, *rest = _SECTION.split(inspect.getdoc(found) or "")
    bodies = (textwrap.dedent(body.strip("\n")).strip() for body in rest[1::2])
    return text.strip(), dict(zip(rest[::2], bodies))


def _items(body: str) -> dict[str, str]:
    """What a section says of each name. Names that share a text get it each."""
    found = {}
    for names, text in _ITEM.findall(body):
        for name in names.split(","):
            name, _, release = name.strip().partition(" (")
            note = f" In release {release.rstrip(')')} only." if release else ""
            found[name] = " ".join(text.split()) + note
    return found


def _arguments(
    title: str, parameters: Iterable[inspect.Parameter], meanings: dict[str, str]
) -> str:
    rows = []
    for each in parameters:
        if each.name not in meanings:
            raise ValueError(f"the docstring of {title} does not say what `{each.name}` is")
        meaning = meanings[each.name]
        shape = _SHAPE.search(meaning)
        stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        needed = "" if stars else "required"
        rows.append(
            (
                f"`{stars}{each.name}`",
                _type(each.annotation),
                needed if each.default is each.empty else f"`{_Default(each.default)}`",
                f"`{shape[1]}`" if shape else "",
                _linked(_SAID_SHAPE.sub("", meaning)),
            )
        )
    return _table(("Argument", "Type", "Default", "Shape", "Meaning"), rows)


class _Default:
    """A default as it is shown."""

    def __init__(self, value: Any) -> None:
        self.text = "..." if inspect.isfunction(value) else repr(value).removeprefix("torch.")

    def __repr__(self) -> str:
        return self.text


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table without the columns that are empty."""
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line[i] for i in used)} |" for line in lines)


def _call(title: str, signature: inspect.Signature, parameters: Iterable[inspect.Parameter]) -> str:
    """How it is called, in lines that fit."""
    empty = inspect.Parameter.empty
    bare = [
        each.replace(
            annotation=empty, default=empty if each.default is empty else _Default(each.default)
        )
        for each in parameters
    ]
    text = str(inspect.Signature(bare))[1:-1].replace("= ", "=").replace(" =", "=")
    if len(title) + len(text) > 86:
        lines = textwrap.wrap(text, 84, break_long_words=False, break_on_hyphens=False)
        text = "\n" + textwrap.indent("\n".join(lines), "    ") + "\n"
    return f"```python\n{title}({text})\n```"


def _type(annotation: Any) -> str:
    """A type in Markdown, in which the names that have a section are links."""
    if annotation is inspect.Signature.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = text.replace("collections.abc.", "").replace("typing.", "")
    known = sections()
    pieces = re.split(r"\b(" + "|".join(map(re.escape, known)) + r")\b", text)
    # Spaces at the ends of code are lost, so they go outside.
    return "".join(
        f"[`{piece}`]({known[piece]})"
        if piece in known
        else re.sub(r"\S(?:.*\S)?", r"`\g<0>`", piece)
        for piece in pieces
    )


def _linked(text: str) -> str:
    """Text in which roles of Sphinx are links where their name has a section."""

    def link(match: re.Match[str]) -> str:
        path, name = match[1], match[1].rpartition(".")[2]
        target = sections().get(path, sections().get(name))
        return f"[`{name}`]({target})" if target else f"`{name}`"

    return _ROLE.sub(link, text)


@functools.cache
def sections() -> dict[str, str]:
    """Where each name has its section, with and without its module.

    Names of several ranks are those of one; alone they mean the latter.
    """
    found: dict[str, str] = {}
    for page in sorted(PAGES.glob("*.md"), key=lambda page: page.stem == "distributed"):
        text = page.read_text(encoding="utf-8")
        paths = [path for path, _ in DIRECTIVE.findall(text)]
        for path in (*re.findall(r"^## (\w+)$", text, re.MULTILINE), *paths):
            name = path.rpartition(".")[2]
            found[path] = f"{page.name}#{name.lower()}"
            found.setdefault(name, found[path])
    return found


def _properties(found: type) -> list[str]:
    """The table of a class's properties."""
    rows = []
    for name, each in vars(found).items():
        getter: Callable[..., Any] | None = getattr(each, "fget", getattr(each, "func", None))
        if getter is not None and not name.startswith("_"):
            returned = _type(inspect.signature(getter).return_annotation)
            rows.append((f"`{name}`", returned, _linked(_parts(getter)[0].replace("\n", " "))))
    return [_table(("Property", "Type", "Meaning"), rows)] if rows else []


def _public_methods(found: type) -> list[str]:
    return [
        name
        for name, each in vars(found).items()
        if not name.startswith("_") and (inspect.isfunction(each) or isinstance(each, classmethod))
    ]
