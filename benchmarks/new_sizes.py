"""Print a table of what the first call of a size costs on a CPU, beside later ones.

    python benchmarks/new_sizes.py              # one thread
    python benchmarks/new_sizes.py --draws 40 --seed 3

Each row is a kind of layer whose layouts differ from call to call, as in detection or in training
with many aspects; layouts are drawn at random. Times are of the process on its processor, forward
and forward+backward. A ratio is the median, over layouts, of the first call over later ones.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from run import about
from torch import Tensor

import natten
from natten.cli.tables import markdown

LATER = 5  # calls of each size after the first
WARMUP = 3  # sizes that do not count


class Kind(NamedTuple):
    """Layers whose layouts are drawn, between two lengths of each axis."""

    lengths: tuple[tuple[int, int], ...]
    window: int | tuple[int, ...]
    dim: int = 32
    dilation: int = 1
    batch: int = 1


HEADS = 4
KINDS = {
    "1-D, 900 to 4000, window 129": Kind(((900, 4000),), 129, 64),
    "2-D, 10 to 24 a side, window 7x7": Kind(((10, 24),) * 2, 7),
    "2-D, 20 to 40 a side, batch 2, window 7x7": Kind(((20, 40),) * 2, 7, batch=2),
    "2-D, 24 to 100 a side, window 7x7": Kind(((24, 100),) * 2, 7),
    "the same, dilation 2x2": Kind(((24, 100),) * 2, 7, dilation=2),
    "2-D, 32 to 90 a side, window 13x13": Kind(((32, 90),) * 2, 13, 64),
    "3-D, 4 to 12 x 12 to 36 a side, window 3x7x7": Kind(((4, 12), (12, 36), (12, 36)), (3, 7, 7)),
    "3-D, 5 to 12 x 8 to 24 a side, window 5x5x5": Kind(((5, 12), (8, 24), (8, 24)), 5),
}


def first_and_later(call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of the first call, and of the median of later ones."""
    times = []
    for _ in range(1 + LATER):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return times[0], statistics.median(times[1:])


def measure(kind: Kind, draws: int, rng: random.Random) -> list[str]:
    """The cells of a row: later calls in milliseconds, the first over these, and how much longer
    it takes; of the forward, then with the backward."""
    attend: Any = (natten.na1d, natten.na2d, natten.na3d)[len(kind.lengths) - 1]

    def tensors() -> list[Tensor]:
        shape = kind.batch, *(rng.randint(*each) for each in kind.lengths), HEADS, kind.dim
        return [torch.randn(shape) for _ in range(4)]

    def forward(query: Tensor, key: Tensor, value: Tensor, _: Tensor) -> Tensor:
        found: Tensor = attend(query, key, value, kind.window, dilation=kind.dilation)
        return found

    def step(*given: Tensor) -> None:
        inputs = [x.requires_grad_() for x in given[:3]]
        torch.autograd.grad(forward(*inputs, given[3]), inputs, given[3])

    cells = []
    for run in (forward, step):
        found = []
        for _ in range(WARMUP + draws):
            given = tensors()
            found.append(first_and_later(lambda: run(*given)))  # noqa: B023
        found = found[WARMUP:]
        later = statistics.median(each for _, each in found)
        ratio = statistics.median(first / each for first, each in found)
        longer = statistics.median(first - each for first, each in found)
        cells += [f"{later:.2f}", f"{ratio:.2f}", f"{longer:.2f}"]
    return cells


def main(argv: list[str] | None = None) -> int:
    """Measure all kinds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=20, help="layouts of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    for name, kind in KINDS.items():
        cells = measure(kind, options.draws, random.Random(options.seed))
        rows.append((name, *cells))
        print(name, *cells, file=sys.stderr)
    both = [f"{name}{what}" for name in ("forward", "forward+backward") for what in (
        ", later calls, ms", ", first / later", ", longer by, ms")]  # fmt: skip
    print("\n".join(markdown(("", *both), rows)))
    print(", ".join(filter(None, about(torch.device("cpu")).values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
