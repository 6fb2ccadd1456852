"""Tables and progress on a terminal, by rich where it is installed, else in plain text.

Both ways write Markdown, so that the output of a command can be pasted into an issue.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence

Row = Sequence[str]


def has_rich() -> bool:
    """Whether rich is installed."""
    return importlib.util.find_spec("rich") is not None


def markdown(header: Row, rows: Sequence[Row], left: int = 1, padded: bool = False) -> list[str]:
    """The lines of a Markdown table.

    Args:
        header, rows: the texts of the cells.
        left: how many columns are left-aligned; the others are right-aligned.
        padded: whether columns are aligned in the text, too.

    Example:
        >>> rows = [("ours", "1"), ("dense", "10")]
        >>> print("\\n".join(markdown(("name", "us"), rows, padded=True)))
        | name  | us |
        |-------|---:|
        | ours  |  1 |
        | dense | 10 |
    """
    widths = [max(map(len, column)) if padded else 0 for column in zip(header, *rows)]

    def line(row: Row) -> str:
        cells = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        return f"| {' | '.join(cells)} |"

    dashes = ("-" * max(width + 2, 3) for width in widths)
    rule = (each if i < left else f"{each[1:]}:" for i, each in enumerate(dashes))
    return [line(header), f"|{'|'.join(rule)}|", *map(line, rows)]


def print_table(
    title: str, header: Row, rows: Sequence[Row], emphasized: int | None = None
) -> None:
    """Print a table.

    Args:
        title: a line above the table.
        header, rows: as in :func:`markdown`.
        emphasized: index of a row to print in bold where there is rich and a terminal.
    """
    lines = markdown(header, rows, padded=True)
    print(f"\n{title}\n" if title else "")
    if not (has_rich() and sys.stdout.isatty()):
        print("\n".join(lines))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    for number, text in enumerate(lines):
        style = {0: "bold cyan", 1: "dim"}.get(number, "")
        if emphasized is not None and number == emphasized + 2:
            style = "bold green"
        console.print(Text(text, style=style))


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Show progress; call the function that this yields with the name of each step that starts."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    if not has_rich():
        number = iter(range(1, steps + 1))
        yield lambda name: print(f"[{next(number)}/{steps}] {name}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps)

        def step(name: str) -> None:
            if bar.tasks[0].description:
                bar.advance(task)
            bar.update(task, description=name)

        yield step


def duration(microseconds: float) -> str:
    """A duration with three digits and a unit."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{_three_digits(microseconds / size)} {unit}"
    return f"{_three_digits(microseconds)} us"


def _three_digits(number: float) -> str:
    return f"{number:.{max(0, 3 - len(str(int(number))))}f}"
