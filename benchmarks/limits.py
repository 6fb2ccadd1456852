"""Measure by Nsight Compute how busy each kernel keeps the resources that may limit it.

    ncu --csv --page raw --section SpeedOfLight --section ComputeWorkloadAnalysis \\
        --section MemoryWorkloadAnalysis -k regex:"(forward|backward|dq|dkdv)_kernel" \\
        python benchmarks/limits.py > ncu.csv              # runs every case once
    python benchmarks/limits.py --from ncu.csv --about "NVIDIA H100, ..." \\
        --out benchmarks/results/limits/h100.csv

With --backend triton, the first command examines the portable kernels.

Large cases run with four heads, which changes how long kernels take, but not what they wait for.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import NamedTuple

import torch
from cases import CASES, GROUPS
from records import RESULTS

from natten.functional import neighborhood_attention_generic

NAMES = [name for name in GROUPS["cuda"] if name not in ("nat-fp16", "nat-d64", "dinat")]
KERNELS = ("forward", "dQ", "dK, dV")  # in the order in which a training step launches them
PERCENT = ".avg.pct_of_peak_sustained_elapsed"
METRICS = {  # for each field of Limit
    "products": "sm__pipe_tensor_cycles_active",
    "exponentials": "sm__inst_executed_pipe_xu",
    "instructions": "sm__issue_active",
    "shared": "l1tex__data_pipe_lsu_wavefronts",
    "l2": "lts__throughput",
    "dram": "gpu__dram_throughput",
}


class Limit(NamedTuple):
    """How busy a kernel keeps each resource, in percent of its peak.

    The resources are tensor cores, exponentials, issue slots, shared memory, L2 cache, and DRAM.
    """

    case: str
    kernel: str
    products: str
    exponentials: str
    instructions: str
    shared: str
    l2: str
    dram: str
    about: str = ""


def read(name: str) -> list[Limit]:
    """Read the results ``limits/NAME.csv``."""
    with (RESULTS / f"limits/{name}.csv").open(newline="") as file:
        return [Limit(**row) for row in csv.DictReader(file)]


def run(names: list[str], backend: str | None) -> None:
    """Run a training step of each case."""
    for name in names:
        case = CASES["cuda"][name]
        rule = case.problem("cuda").rule
        heads = min(case.heads, 4) if case.dim == 128 else case.heads
        q, k, v = (
            torch.randn(
                case.batch, *case.shape, heads, case.dim, device="cuda", dtype=case.dtype
            ).requires_grad_()
            for _ in range(3)
        )
        out = neighborhood_attention_generic(
            q, k, v, rule.kernel_size, rule.stride, rule.dilation, rule.is_causal, backend=backend
        )
        out.backward(torch.randn_like(out))
        torch.cuda.synchronize()


def parse(path: Path, names: list[str], about: str) -> list[Limit]:
    """Parse the output of ncu for :func:`run`."""
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    _units, *rows = csv.DictReader(lines[first:])
    expected = [(name, kernel) for name in names for kernel in KERNELS]
    if len(rows) != len(expected):
        raise SystemExit(f"{path} has {len(rows)} kernels, expected {len(expected)}")
    return [
        Limit(*kernel, *(row[metric + PERCENT] for metric in METRICS.values()), about)
        for kernel, row in zip(expected, rows)
    ]


def main() -> None:
    """Run the cases, or write the results of ncu to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(NAMES), help="comma-separated")
    parser.add_argument("--backend", help="one of ours, instead of the default")
    parser.add_argument("--from", dest="source", type=Path, help="the output of ncu")
    parser.add_argument("--out", type=Path, help="the file to write")
    parser.add_argument("--about", default="", help="device and versions")
    args = parser.parse_args()
    names = args.cases.split(",")
    if (args.source is None) != (args.out is None):
        parser.error("--from and --out belong together")
    if args.source is None:
        run(names, args.backend)
        return
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Limit._fields)
        writer.writerows(parse(args.source, names, args.about))


if __name__ == "__main__":
    main()
