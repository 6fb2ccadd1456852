"""The results of profiling, for people and as JSON and CSV."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ...errors import ArgumentError
from .machine import device_name, versions
from .measure import Kernel, Timing
from .problem import Problem

FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Row:
    """One time: which attention in which pass it belongs to, how it was measured, what it means.

    Attributes:
        attention: "natten" and the backend, or "dense" and its implementation.
        pass_name: "forward" or "forward+backward".
        kind: "eager" for a call from Python, or "graph" for its kernels alone, in a CUDA graph.
        timing: microseconds of a call.
        tflops: 10^12 operations of the needed matrix products per second.
        gbytes: 10^9 bytes per second, if inputs and outputs move once.
        speedup: the time of the fastest dense attention over this one; None without dense times.
        efficiency: the ideal time over this one; None for dense attention. The ideal is the time of
            the fastest dense attention times the fraction of pairs that are needed.
    """

    attention: str
    pass_name: str
    kind: str
    timing: Timing
    tflops: float
    gbytes: float
    speedup: float | None = None
    efficiency: float | None = None


@dataclass
class Report:
    """A problem's times.

    Attributes:
        problem: what was measured.
        backend: the backend that ran.
        rows: the times.
        kernels: for each pass, the kernels of a call of ours, slowest first.
        recorded: for each pass, the calls of which ``kernels`` is the mean.
        computed_over_needed: for each kind of kernel, pairs computed per pair needed; 1 means that
            nothing is wasted.
        notes: sentences that the reader should know.
    """

    problem: Problem
    backend: str
    rows: list[Row] = field(default_factory=list)
    kernels: dict[str, list[Kernel]] = field(default_factory=dict)
    recorded: dict[str, int] = field(default_factory=dict)
    computed_over_needed: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """The fraction of all pairs that are needed."""
        return self.problem.needed_pairs / self.problem.all_pairs

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "problem": self.problem.as_dict(),
            "device": device_name(self.problem.device),
            "versions": versions(),
            "backend": self.backend,
            "kept": self.kept,
            "computed_over_needed": self.computed_over_needed,
            "times": [
                {
                    "attention": row.attention,
                    "pass": row.pass_name,
                    "kind": row.kind,
                    "median_us": row.timing.median_us,
                    "spread_us": row.timing.spread_us,
                    "samples_us": row.timing.samples_us,
                    "tflops": row.tflops,
                    "gbytes": row.gbytes,
                    "speedup": row.speedup,
                    "efficiency": row.efficiency,
                }
                for row in self.rows
            ],
            "kernels": {
                name: [kernel._asdict() for kernel in kernels]
                for name, kernels in self.kernels.items()
            },
            "recorded_calls": self.recorded,
            "notes": self.notes,
        }

    def records(self) -> Iterator[dict[str, Any]]:
        """One flat record per time, for CSV."""
        now = datetime.datetime.now(datetime.timezone.utc)
        for row in self.rows:
            yield {
                "case": str(self.problem),
                "backend": row.attention,
                "pass": row.pass_name,
                "time": row.kind,
                "median_us": f"{row.timing.median_us:.3f}",
                "spread_us": f"{row.timing.spread_us:.3f}",
                "device": device_name(self.problem.device),
                "versions": " ".join(f"{name}={each}" for name, each in versions().items()),
                "date": now.isoformat(timespec="seconds"),
            }

    def append_csv(self, path: Path) -> None:
        """Append the times to a file; a new one gets a line of column names first.

        Raises:
            ArgumentError: the file has other columns.
        """
        new = check_csv(path)
        with open(path, "a", newline="", encoding="utf-8") as file:
            self.write_csv(file, header=new)

    def write_csv(self, file: TextIO, header: bool = True) -> None:
        """Write the times; with ``header``, a line of column names comes first."""
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        if header:
            writer.writeheader()
        writer.writerows(self.records())


COLUMNS = (
    "case", "backend", "pass", "time", "median_us", "spread_us", "device", "versions", "date",
)  # fmt: skip


def check_csv(path: Path) -> bool:
    """Whether a file is new or empty, so that the column names are to be written first.

    Raises:
        ArgumentError: the file has other columns than a report.
    """
    if not path.exists() or path.stat().st_size == 0:
        return True
    with open(path, newline="", encoding="utf-8") as file:
        first = tuple(next(csv.reader(file), ()))
    if first != COLUMNS:
        raise ArgumentError(
            f"`csv` must be a new file or have the columns {','.join(COLUMNS)}, got {path} with "
            f"{','.join(first)}."
        )
    return False
