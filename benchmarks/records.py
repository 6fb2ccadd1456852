"""The schema of all results: a CSV file with one line per time."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"


class Record(NamedTuple):
    """One time; fields that are not known are empty strings.

    ``case`` is a name of ``cases.py``. ``backend`` is "natten" and our backend, "dense" and its
    implementation, or another library. ``pass_`` is "forward", "backward" or "forward+backward".
    ``time`` is "graph" for kernels in a CUDA graph, "eager" for a call from Python, or "host" for
    what a call costs in Python while the GPU computes.
    ``spread_us`` is the range of the middle half. ``computed_over_needed`` is the pairs computed
    per pair needed, for each kind of kernel. ``peak_over_inputs`` is the memory that the pass adds,
    over the size of query, key and value.
    """

    case: str
    backend: str
    pass_: str
    time: str
    median_us: str
    spread_us: str = ""
    computed_over_needed: str = ""
    peak_over_inputs: str = ""
    device: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""


COLUMNS = tuple(name.rstrip("_") for name in Record._fields)


def read(name: str) -> list[Record]:
    """Read the results ``NAME.csv``."""
    with open(RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        if tuple(next(rows)) != COLUMNS:
            raise ValueError(f"{name}.csv has other columns than {COLUMNS}")
        return [Record(*row) for row in rows]


def write(path: Path, records: list[Record], new: bool = True) -> None:
    """Write a file of results, or append to it."""
    with open(path, "w" if new else "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerows(records)
