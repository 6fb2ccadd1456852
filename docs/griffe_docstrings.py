"""Docstrings as mkdocstrings wants them; the sources stay as they are."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """``Example:`` becomes the section ``Examples:``, and a role of Sphinx plain code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class and function."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
