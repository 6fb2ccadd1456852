"""Time the first training step of NAT-tiny's layers, which compiles their kernels.

    python benchmarks/first_calls.py                     # with a bias, and without one
    python benchmarks/first_calls.py --processors 4      # as on a machine with fewer

Each time is of a new process with an empty cache of compiled kernels. "first step" is the time of
the first forward and backward of four layers, those of NAT-tiny's four stages at 224 pixels, in
bfloat16 autocast. The cases "-ahead" first call ``natten.compile_ahead`` for the same layers. What
the first call of any program costs, such as cuBLAS's and the import of Triton, is taken before.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

import natten

STAGES = ((56, 2), (28, 4), (14, 8), (7, 16))  # tokens of a side, and heads of 32 channels
BATCH, DIM, WINDOW = 128, 32, 7
CASES = ("bias", "plain", "bias-ahead", "plain-ahead")


def step(layers: list[Any], inputs: list[torch.Tensor]) -> float:
    """Seconds of a forward and backward of all layers."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16):
        loss = sum(layer(x).float().mean() for layer, x in zip(layers, inputs))
    loss.backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def calls(bias: bool) -> list[dict[str, Any]]:
    """The layers' calls, on tensors without data."""
    found = []
    for side, heads in STAGES:
        qkv = torch.empty(
            3, BATCH, side, side, heads, DIM, dtype=torch.bfloat16, device="meta",
            requires_grad=True,
        )  # fmt: skip
        found.append(dict(zip(("query", "key", "value"), qkv), kernel_size=WINDOW))
        if bias:
            sizes = heads, 2 * WINDOW - 1, 2 * WINDOW - 1
            found[-1]["rpb"] = torch.empty(sizes, device="meta", requires_grad=True)
    return found


def measure(bias: bool, ahead: bool) -> None:
    """Print the seconds of this process: of compiling ahead, of the first and of a later step."""
    layers, inputs = [], []
    for side, heads in STAGES:
        width = heads * DIM
        layer = natten.NeighborhoodAttention2D(width, heads, WINDOW, rel_pos_bias=bias)
        layers.append(layer.cuda())
        inputs.append(torch.randn(BATCH, side, side, width, device="cuda"))
    importlib.import_module("triton")
    step([torch.nn.Linear(32, 32, device="cuda")], [torch.randn(8, 32, device="cuda")])
    before = time.perf_counter()
    if ahead:
        natten.compile_ahead(calls(bias))
    seconds = time.perf_counter() - before
    first = step(layers, inputs)
    print(f"{seconds:.1f} {first:.1f} {step(layers, inputs):.3f}")


def main() -> None:
    """Measure in new processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processors", type=int, help="use that many")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--here", choices=CASES, help="measure one case in this process")
    args = parser.parse_args()
    if args.here:
        if args.processors:
            os.sched_setaffinity(0, range(args.processors))
        measure("bias" in args.here, "ahead" in args.here)
        return
    print(f"{'':12}{'ahead s':>9}{'first step s':>14}{'later step s':>14}")
    cases = args.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"unknown {sorted(unknown)}; cases: {', '.join(CASES)}")
    for name in cases:
        if "ahead" in name and not hasattr(natten, "compile_ahead"):
            continue  # an older version
        command = [sys.executable, __file__, "--here", name]
        if args.processors:
            command += ["--processors", str(args.processors)]
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                command, env={**os.environ, "TRITON_CACHE_DIR": folder}, stdout=subprocess.PIPE,
                text=True, check=True,
            )  # fmt: skip
        ahead, first, later = done.stdout.split()
        print(f"{name:12}{ahead:>9}{first:>14}{later:>14}", flush=True)


if __name__ == "__main__":
    main()
