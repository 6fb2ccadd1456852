"""Write the table of docs/backends.md from the capabilities that the backends declare.

python docs/backends.py
"""

from __future__ import annotations

import pathlib
import re

from natten.backends import BACKENDS, OPERATIONS, Backend, describe
from natten.cli.tables import markdown

PAGE = pathlib.Path(__file__).with_name("backends.md")
_TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->)", re.DOTALL)


def table() -> str:
    """Features by backends, in order of preference."""

    def said(flag: bool) -> str:
        return "yes" if flag else "no"

    def dtypes(backend: Backend) -> str:
        if backend.dtypes is None:
            return "all floating-point"
        return ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)

    rows = [
        ("devices", [each.devices for each in BACKENDS]),
        ("dtypes", [dtypes(each) for each in BACKENDS]),
        ("head_dim", [describe(each.head_dims) for each in BACKENDS]),
        ("value head_dim", [describe(each.value_dims) for each in BACKENDS]),
        *(
            (title, [said(name in each.operations) for each in BACKENDS])
            for name, title in OPERATIONS.items()
        ),
        ("relative positional bias", [said(each.bias) for each in BACKENDS]),
        ("circular axes", ["yes" if each.circular else "with padded keys" for each in BACKENDS]),
        ("tile shapes as arguments", [said(each.takes_tiles) for each in BACKENDS]),
    ]
    header = ["", *(f"`{each.name}`" for each in BACKENDS)]
    lines = markdown(header, [(title, *cells) for title, cells in rows], left=len(header))
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with its table made anew."""
    return _TABLE.sub(lambda _: table(), text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
