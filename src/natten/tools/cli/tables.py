"""Tables and progress on a terminal, with colors where rich is installed.

Tables are Markdown, so that the output of a command can be pasted into an issue.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence

Row = Sequence[str]
HEAD, RULE, BOLD = "bold cyan", "dim", "bold green"  # styles of lines


def has_rich() -> bool:
    """Whether rich is installed."""
    return importlib.util.find_spec("rich") is not None


def terminal_width() -> int | None:
    """Columns of the terminal that standard output is, None if it is something else."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def say(text: str) -> None:
    """Print a paragraph, in lines that fit the terminal if there is one."""
    width = terminal_width()
    print(text if width is None else textwrap.fill(text, width), flush=True)


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
    widths = _widths(header, rows) if padded else [0] * len(header)
    lines = (_line(row, widths, left) for row in rows)
    return [_line(header, widths, left), _rule(widths, left), *lines]


def _widths(header: Row, rows: Sequence[Row]) -> list[int]:
    return [max(map(len, column)) for column in zip(header, *rows)]


def _line(row: Row, widths: Sequence[int], left: int) -> str:
    cells = (
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths))
    )
    return f"| {' | '.join(cells)} |"


def _rule(widths: Sequence[int], left: int) -> str:
    dashes = ("-" * max(width + 2, 3) for width in widths)
    return f"|{'|'.join(each if i < left else f'{each[1:]}:' for i, each in enumerate(dashes))}|"


class Table:
    """A table that appears row by row.

    On a terminal that is too narrow for it, cells that are the same in all rows are said once, and
    columns that do not fit even so follow in further tables below, when the table is finished.

    Args:
        title: a line above the table.
        header: the texts above the columns.
        widths: characters of each column's widest cell.
        same: the columns whose cells are the same in all rows, with these cells.
        keys: how many columns say which row it is; further tables repeat them.
    """

    def __init__(
        self, title: str, header: Row, widths: Sequence[int], same: dict[int, str], keys: int = 1
    ) -> None:
        self.header = header
        self.widths = [max(len(name), width) for name, width in zip(header, widths)]
        self.rows: list[tuple[Row, str]] = []
        columns = list(range(len(header)))
        width = terminal_width()
        sentences = [title] if title else []
        if width is not None and self._room(columns) > width and len(same) < len(columns):
            said = ", ".join(f"{header[i]} {cell}" for i, cell in same.items() if cell)
            columns = [i for i in columns if i not in same]
            sentences += [f"In all rows: {said}."] if said else []
        first = [i for i in columns if i < keys] or columns[:1]
        self.parts = [list(first)]
        for i in columns:
            if i in first:
                continue
            part = self.parts[-1]
            if width is not None and part != first and self._room([*part, i]) > width:
                self.parts.append(part := list(first))
            part.append(i)
        print()
        for sentence in sentences:
            say(sentence)
            print()
        self._head(self.parts[0])

    def _room(self, columns: Sequence[int]) -> int:
        return sum(self.widths[i] + 3 for i in columns) + 1

    def _head(self, part: Sequence[int]) -> None:
        self._print(self.header, part, HEAD)
        _print(_rule([self.widths[i] for i in part], 1), RULE)

    def _print(self, row: Row, part: Sequence[int], style: str) -> None:
        _print(_line([row[i] for i in part], [self.widths[i] for i in part], 1), style)

    def add(self, row: Row, bold: bool = False) -> None:
        """Print a row."""
        style = BOLD if bold else ""
        self.rows.append((row, style))
        self._print(row, self.parts[0], style)

    def finish(self) -> None:
        """Print the tables of further columns."""
        for part in self.parts[1:]:
            print()
            self._head(part)
            for row, style in self.rows:
                self._print(row, part, style)


def print_table(
    title: str, header: Row, rows: Sequence[Row], bold: int | None = None, keys: int = 1
) -> None:
    """Print a table whose rows are known, as :class:`Table` does.

    Args:
        title, header, keys: as in :class:`Table`.
        rows: the texts of the cells.
        bold: index of a row to print in bold where there is rich and a terminal.
    """
    columns = [set(column) for column in zip(*rows)] if len(rows) > 1 else []
    same = {i: column.pop() for i, column in enumerate(columns) if len(column) == 1}
    table = Table(title, header, _widths(header, rows), same, keys)
    for number, row in enumerate(rows):
        table.add(row, number == bold)
    table.finish()


def _print(line: str, style: str) -> None:
    if not (style and has_rich() and sys.stdout.isatty()):
        print(line, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    Console(soft_wrap=True).print(Text(line, style=style))


class Status:
    """One line at the end of a terminal that says what is being done.

    Args:
        steps: how many there are; if that is not known, they may be many, and not all are shown.
    """

    def __init__(self, steps: int | None = None) -> None:
        self.steps, self.number, self.shown = steps, 0, sys.stderr.isatty()
        self.since = -math.inf

    def __call__(self, name: str) -> None:
        """Say what starts now."""
        self.number += 1
        now = time.monotonic()
        if self.shown and (self.steps is not None or now > self.since + 0.1):
            self.since = now
            count = "" if self.steps is None else f"[{self.number}/{self.steps}] "
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{f'{count}{name}'[:width]}\033[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for other output."""
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(steps: int | None = None) -> Iterator[Status]:
    """Show progress; what this yields is called with the name of each step that starts."""
    status = Status(steps)
    try:
        yield status
    finally:
        status.clear()


def duration(microseconds: float) -> str:
    """A duration with three digits and a unit."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{_three_digits(microseconds / size)} {unit}"
    return f"{_three_digits(microseconds)} us"


def _three_digits(number: float) -> str:
    return f"{number:.{max(0, 3 - len(str(int(number))))}f}"
