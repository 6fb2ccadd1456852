"""Compile the default kernels without a GPU: registers, spills, shared memory.

    python benchmarks/kernels.py                             # what CI checks; `make kernels`
    python benchmarks/kernels.py --target 90 --variants NAT  # some, with the Triton of this Python

Targets are NVIDIA's compute capabilities (80, 86, 90, 100) and AMD's gfx942 for the portable
kernels, and 90a for the Hopper kernels. It is an error if a kernel spills registers in a loop, if
it needs more shared memory than the GPU has, or if its asynchronous products wait for one another.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from compiled import Variant, call_hopper, call_portable, compile_calls
from triton.backends.compiler import GPUTarget

from natten.backends.triton.tiles import SHARED_MEMORY
from natten.cli.tables import markdown

RESULT = Path(__file__).parent / "results/kernels.md"
FP16 = torch.float16

PORTABLE = [
    Variant("NAT", (56, 56), 7, 32),
    Variant("NAT fp16 bias", (56, 56), 7, 32, dtype=FP16, bias=True),
    Variant("NAT fp32", (56, 56), 7, 32, dtype=torch.float32),
    Variant("NAT TF32", (56, 56), 7, 32, dtype=torch.float32, tf32=True),
    Variant("HDiT TF32", (64, 64), 13, 64, dtype=torch.float32, tf32=True),
    Variant("HDiT", (64, 64), 13, 64),
    Variant("FLUX", (256, 256), 80, 128),
    Variant("video", (16, 32, 32), (7, 11, 11), 64),
    Variant("additional", (64, 64), 13, 64, num_additional=5),
]
# More of the same kind, for one target: the others would say the same.
MORE = [
    Variant("1-D causal", (32768,), 2048, 128, causal=True),
    Variant("HDiT fp32", (64, 64), 13, 64, dtype=torch.float32),
    Variant("FLUX strided", (256, 256), 80, 128, stride=16),
    Variant("FLUX bias", (256, 256), 80, 128, bias=True),
    Variant("NAT fp32 bias", (56, 56), 7, 32, dtype=torch.float32, bias=True),
    Variant("Hunyuan", (30, 48, 80), (18, 24, 24), 128),
    Variant("NAT masked", (56, 56), 7, 32, masked=True),
    Variant("HDiT masked", (64, 64), 13, 64, num_additional=5, masked=True),
    Variant("NAT circular", (56, 56), 7, 32, boundary="circular"),
    Variant("NAT part bias", (56, 56), 7, 32, bias=True, part=(28, 56)),
    Variant("AnyUp", (28, 28), 9, 32, queries_per_key=8, value_dim=384),
    Variant("few keys", (14, 14), 9, 64, queries_per_key=8),
    Variant("FLUX part", (256, 256), 80, 128, part=(128, 256)),
    Variant("stream", (4096,), 1024, 128, causal=True, boundary="truncate", part=(256,)),
]
HOPPER = [
    Variant("1-D", (32768,), 2048, 128),
    Variant("1-D strided", (32768,), 2048, 128, stride=256),
    Variant("NAT", (56, 56), 7, 32),
    Variant("NAT wide", (56, 56), 7, 64, dtype=FP16),
    Variant("DiNAT", (28, 28), 7, 32, dilation=4, dtype=FP16),
    Variant("HDiT", (64, 64), 13, 64),
    Variant("video", (16, 32, 32), (7, 11, 11), 64),
    Variant("FLUX", (256, 256), 80, 128),
    Variant("FLUX strided", (256, 256), 80, 128, stride=16),
    Variant("Hunyuan", (30, 48, 80), (18, 24, 24), 128),
    Variant("Hunyuan strided", (30, 48, 80), (18, 24, 24), 128, stride=(16, 8, 8)),
    Variant("wan strided", (21, 45, 80), (9, 15, 24), 128, stride=(3, 5, 8)),
    Variant("causal", (30, 32, 32), (30, 16, 16), 128, causal=(True, False, False)),
    Variant("weather", (13, 91, 180), (5, 7, 7), 48),
    Variant("d72", (64, 64), 13, 72),
    Variant("d96", (64, 64), 13, 96),
    Variant("wan d80", (21, 45, 80), (9, 17, 25), 80),
    Variant("d20", (64, 64), 13, 20),
    Variant("d44", (64, 64), 13, 44),
    Variant("d22", (64, 64), 13, 22),
    Variant("wide", (64, 64), 13, 256),
    Variant("two widths", (64, 64), 13, 128, value_dim=64),
    Variant("wide values", (64, 64), 9, 64, value_dim=512),
    Variant("AnyUp", (28, 28), 9, 32, queries_per_key=8, value_dim=384),
    Variant("additional", (64, 64), 13, 64, num_additional=5),
    Variant("NAT circular", (56, 56), 7, 32, boundary="circular"),
    Variant("HDiT circular", (64, 64), 13, 64, boundary="circular"),
    Variant("near full", (37, 67), (37, 65), 128),
    Variant("near full 64", (21, 9, 19), (20, 9, 18), 64),
    Variant("plain", (4096,), (), 128, plain=True),
    Variant("plain 1k", (1024,), (), 128, plain=True),
    Variant("plain 64", (4096,), (), 64, plain=True),
    Variant("plain causal", (4096,), (), 128, causal=True, plain=True),
    Variant("plain causal 64", (1000,), (), 64, causal=True, part=(700,), plain=True),
    Variant("packed", (64, 64), 7, 64, packed=True),
    Variant("packed videos", (16, 48, 48), (5, 7, 7), 64, packed=True),
    Variant("packed plain", (2048,), (), 128, plain=True, packed=True),
    Variant("packed causal", (2048,), (), 128, causal=True, plain=True, packed=True),
    Variant("NAT bias", (56, 56), 7, 32, bias=True),
    Variant("HDiT bias", (64, 64), 13, 64, dtype=FP16, bias=True),
    Variant("wan bias", (21, 45, 80), (9, 17, 25), 128, bias=True),
    Variant("NAT masked", (56, 56), 7, 32, masked=True),
    Variant("FLUX strided masked", (256, 256), 80, 128, stride=16, masked=True),
    Variant("masked", (64, 64), 13, 64, num_additional=5, bias=True, masked=True),
]

# Targets, and bytes of shared memory that a program may have there.
TARGETS = {str(each): SHARED_MEMORY[each] for each in (80, 86, 90, 100)}
TARGETS |= {"gfx942": SHARED_MEMORY[0], "90a": SHARED_MEMORY[90]}

# What is known to spill in a loop: how many instructions move it at most, until somebody mends it.
KNOWN: dict[tuple[str, str], dict[str, int]] = {
    # No GPU of these generations was there. As sm_80 code on an H200 other tiles are slower, but
    # for HDiT (3 % faster): h200.md.
    ("80", "dkdv"): {"HDiT": 6, "FLUX": 2, "video": 15},
    ("86", "dkdv"): {"HDiT": 4, "FLUX": 3, "video": 9},
    # The portable kernels where the Hopper kernels do not run: a few of 500 to 700 instructions
    # that mask a block. dP before the weights takes more of them, and less time; products that
    # start from -LSE and -delta need none, and take 6 to 17 % longer (h200.md).
    ("90", "forward"): {"FLUX": 1, "FLUX bias": 1, "Hunyuan": 1, "AnyUp": 1},
    ("90", "dkdv"): {
        "FLUX": 11,
        "1-D causal": 2,
        "FLUX strided": 15,
        "FLUX bias": 20,
        "AnyUp": 1,
        "FLUX part": 3,
        "stream": 3,
    },
    # dK and dV have two sums.
    ("gfx942", "dkdv"): {"FLUX": 86},
    # "FLUX" with Triton 3.8. A bias takes four registers of a thread for addresses.
    ("90a", "backward dK dV"): {"FLUX": 1, "wan bias": 17},
}
# Kernels whose products are known to wait for one another: with three axes ptxas copies the sums
# of dK and dV between the loops of partial and of full blocks. Faster all the same than what
# came before, and than with the loops the other way round, where ptxas does not (h100.md).
SERIALISED = {("90", "dkdv"): ("Hunyuan",)}


class Job(NamedTuple):
    """What one process compiles."""

    target: str
    variants: tuple[str, ...]
    release: str = ""  # of Triton, as `make kernels` names its folder; "" is this Python's


class Row(NamedTuple):
    """A kernel in the table."""

    target: str
    triton: str
    kernel: str
    variant: str
    tiles: str
    registers: int
    spilled: int
    looped: int
    shared: int
    serialised: bool

    def problem(self) -> str | None:
        """Why this kernel must not be a default."""
        known = KNOWN.get((self.target, self.kernel), {}).get(self.variant, 0)
        found = []
        if self.looped > known:
            found.append(f"moves spilled registers {self.looped} times in a loop")
        if self.shared > TARGETS[self.target]:
            found.append(f"needs {self.shared} bytes of shared memory")
        if self.serialised and self.variant not in SERIALISED.get((self.target, self.kernel), ()):
            found.append("has serialised products")
        if not found:
            return None
        where = f"{self.kernel} of {self.variant!r}, target {self.target}, Triton {self.triton}"
        return f"{where}: {', '.join(found)}"


def variants(target: str, names: Sequence[str] = ()) -> list[Variant]:
    """The default variants for a target, or some of them."""
    portable = PORTABLE + MORE if target == "90" else PORTABLE
    every = {each.name: each for each in (HOPPER if target == "90a" else portable)}
    return [every[name] for name in names or every]


def compile_target(target: str, names: Sequence[str] = ()) -> list[Row]:
    """Compile default variants with the Triton of this Python."""
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.rstrip("a")), 32)
    call = call_hopper if target == "90a" else call_portable
    found = compile_calls(gpu, TARGETS[target], call, variants(target, names))
    return [Row(target, triton.__version__, *kernel[:-1]) for kernel in found]


# The longest come first, so that two processes end together.
JOBS = [Job(target, ()) for target in ("90a", "90", "100", "gfx942", "80", "86")]
JOBS += [Job("90a", ("NAT", "FLUX"), release) for release in ("3.7", "3.8", "newest")]
JOBS += [Job("90", ("NAT", "FLUX", "video"), "newest")]


def run(job: Job) -> list[Row]:
    """A job in a process of its own: there is one Triton in a process."""
    began = time.time()
    environment = dict(os.environ)
    if job.release:
        environment["PYTHONPATH"] = str(Path(sys.prefix) / f"triton-{job.release}")
    command = [sys.executable, __file__, "--json", "--target", job.target]
    if job.variants:
        command += ["--variants", ",".join(job.variants)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{job} failed")
    rows = [Row(*each) for each in json.loads(done.stdout)]
    print(f"{job}: Triton {rows[0].triton}, {time.time() - began:.0f} s", file=sys.stderr)
    return rows


HEADER = "kernel", "variant", "queries, keys", "registers", "spilled", "in loops", "shared"


def table(rows: Sequence[Row]) -> str:
    """A table per target and Triton, in Markdown."""
    lines: list[str] = []
    for (target, release), part in itertools.groupby(rows, lambda row: row[:2]):
        kernels = (
            "Hopper kernels, sm_90a"
            if target == "90a"
            else f"Portable kernels, {'' if target.startswith('gfx') else 'sm_'}{target}"
        )
        cells = [[str(each) for each in row[2:-1]] for row in part]
        lines += [f"## {kernels}, Triton {release}\n", *markdown(HEADER, cells, left=3), ""]
    return "\n".join(lines)


ABOUT = """# What the default kernels need

Made by `make kernels`, which compiles them without a GPU. Registers are of a thread, and so are
spilled bytes; of the Hopper kernels, registers are what a program starts with. "In loops" are the
instructions of the innermost loops with products that move what was spilled; on AMD, all spilled
registers. Shared memory is in bytes. What may spill in a loop, and why, is in
`benchmarks/kernels.py`.

"""


def main() -> None:
    """Compile, show the table, and fail if a kernel must not be a default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, help="one target, in this process")
    parser.add_argument("--variants", default="", help="names, with commas; all by default")
    parser.add_argument("--json", action="store_true", help="rows only, for another process")
    args = parser.parse_args()
    if args.target:
        rows = compile_target(args.target, args.variants.split(",") if args.variants else ())
    else:
        with ThreadPoolExecutor(2) as pool:
            rows = [row for found in pool.map(run, JOBS) for row in found]
        RESULT.write_text(ABOUT + table(rows), encoding="utf-8")
    if args.json:
        json.dump(rows, sys.stdout)
        return
    print(table(rows), end="")
    problems = [problem for row in rows if (problem := row.problem())]
    if problems:
        sys.exit("\n".join(["These must not be defaults:", *problems]))


if __name__ == "__main__":
    main()
