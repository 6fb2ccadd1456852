"""Let mkdocstrings see the docstrings' ``Example:`` as the section that it calls ``Examples:``."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Only what the site is built from changes; the sources stay."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
