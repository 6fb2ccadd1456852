"""Write what the commands of docs/models.md print.

python docs/outputs.py
"""

import contextlib
import io
import itertools
import re
import shlex
from pathlib import Path

from natten.cli import main

PAGE = Path(__file__).with_name("models.md")
_OUTPUT = re.compile(
    r"(```sh\nnatten ([^\n]*)\n```\n\n<!-- output -->\n).*?(?=<!-- /output -->)", re.DOTALL
)


def output(command: str) -> str:
    """What a command prints, as Markdown: its tables, and blocks of the lines around them."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(shlex.split(command))
    if code != 0:
        raise RuntimeError(f"natten {command} ends with {code}")
    parts = []
    for is_table, lines in itertools.groupby(
        printed.getvalue().splitlines(), lambda line: line.startswith("|")
    ):
        text = "\n".join(lines).strip()
        parts.append(text if is_table or not text else f"```text\n{text}\n```")
    return "\n\n".join(filter(None, parts)) + "\n"


def page(text: str) -> str:
    """The page with outputs made anew."""
    return _OUTPUT.sub(lambda match: match[1] + output(match[2]), text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
