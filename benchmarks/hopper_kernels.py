"""Compile the listed default variants of the Hopper kernels for sm_90a; needs no GPU.

    python benchmarks/hopper_kernels.py [name ...]

One row per variant: registers when a program starts, bytes spilled, shared memory, instructions
for products and for TMA, seconds.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from natten.backends.hopper import tiles as tiling
from natten.backends.hopper.descriptors import Boxes, contiguous
from natten.backends.hopper.gluon_names import release
from natten.backends.hopper.plan import Launch, Plan
from natten.neighborhood import Neighborhood

# name: shape, head dim, value dim, window, stride, dilation, causal, additional tokens, dtype
VARIANTS: dict[str, tuple[Any, ...]] = {
    "1d": ((32768,), 128, 128, 2048, 1, 1, False, 0, torch.bfloat16),
    "1d-strided": ((32768,), 128, 128, 2048, 256, 1, False, 0, torch.bfloat16),
    "nat": ((56, 56), 32, 32, 7, 1, 1, False, 0, torch.bfloat16),
    "nat-64": ((56, 56), 64, 64, 7, 1, 1, False, 0, torch.float16),
    "dinat": ((28, 28), 32, 32, 7, 1, 4, False, 0, torch.float16),
    "hdit": ((64, 64), 64, 64, 13, 1, 1, False, 0, torch.bfloat16),
    "video": ((16, 32, 32), 64, 64, (7, 11, 11), 1, 1, False, 0, torch.bfloat16),
    "flux": ((256, 256), 128, 128, 80, 1, 1, False, 0, torch.bfloat16),
    "flux-strided": ((256, 256), 128, 128, 80, 16, 1, False, 0, torch.bfloat16),
    "hunyuan": ((30, 48, 80), 128, 128, (18, 24, 24), 1, 1, False, 0, torch.bfloat16),
    "hunyuan-strided": (
        (30, 48, 80), 128, 128, (18, 24, 24), (16, 8, 8), 1, False, 0, torch.bfloat16,
    ),
    "causal": (
        (30, 32, 32), 128, 128, (30, 16, 16), 1, 1, (True, False, False), 0, torch.bfloat16,
    ),
    "wide": ((64, 64), 256, 256, 13, 1, 1, False, 0, torch.bfloat16),
    "extra": ((64, 64), 128, 64, 13, 1, 1, False, 5, torch.bfloat16),
}  # fmt: skip
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Row(NamedTuple):
    """What a variant compiled to."""

    name: str
    tiles: str
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    products: int
    tma: int
    seconds: float


def plan(name: str, tiles: tiling.Tiles | None = None) -> Plan:
    """The plan of a variant, with the tiles of its choice or with others."""
    shape, dim, value_dim, window, stride, dilation, causal, extra, dtype = VARIANTS[name]
    rule = Neighborhood.create(len(shape), window, stride, dilation, causal)
    shapes = [(2, *shape, 4, d) for d in (dim, dim, value_dim)]
    strides = [contiguous(x) for x in shapes]
    cpu = torch.device("cpu")
    arguments = (rule, dim**-0.5, cpu, dtype, shapes, strides, extra)
    if tiles is None:
        return Plan(*arguments)
    chosen = tiling.choose
    tiling.choose = lambda *_: tiles  # type: ignore[assignment]
    try:
        return Plan(*arguments)
    finally:
        tiling.choose = chosen


def compile_forward(found: Plan, dtype: torch.dtype) -> Any:
    """The compiled forward kernel of a plan."""
    run = found.forward
    described = {"q_desc": run.query, "k_desc": run.key, "v_desc": run.value, "o_desc": run.out}
    missing: dict[str, Any] = {"ek_desc": None, "ev_desc": None}
    if found.extra:
        described |= {"ek_desc": run.extra_key, "ev_desc": run.extra_value}
        missing = {}
    return _compile(run.run, described, missing, dtype)


def _compile(
    launch: Launch, described: dict[str, Boxes], missing: dict[str, Any], dtype: torch.dtype
) -> Any:
    options = {x: launch.constants[x] for x in ("num_warps", "maxnreg")}
    constants = {x: y for x, y in launch.constants.items() if x not in options} | missing
    signature = {}
    for name in launch.kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in described:
            boxes = described[name]
            signature[name] = f"tensordesc<{_TYPES[dtype]}{boxes.block},{boxes.layout!r}>"
        else:
            signature[name] = {"lse": "*fp32", "factor": "fp32"}.get(name, "i32")
    source = GluonASTSource(launch.kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def measure(name: str, found: Plan, dtype: torch.dtype) -> tuple[Row, Any]:
    """Compile a plan's forward and look at what came out."""
    began = time.time()
    kernel = compile_forward(found, dtype)
    seconds = time.time() - began
    ptx = kernel.asm["ptx"]
    # From 3.9 on, Triton compiles for every GPU with the newer of its two.
    newer = release() >= (3, 9)
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    tool = tool / ("ptxas-blackwell" if newer else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool, "-v", "--gpu-name=sm_90a", source, "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", said)
    used = re.search(r"Used (\d+) registers", said)
    t = found.forward.tiles
    shape = "q{}k{}".format(*("x".join(map(str, x)) for x in t[:2]))
    row = Row(
        name, f"{shape} split {t.split} {t.groups}x{t.programs} stages {t.stages} "
        f"mask {found.forward.mask.kind} own {found.forward.own_out:d}",
        int(used[1]) if used else -1, int(spilled[1]) if spilled else -1, kernel.metadata.shared,
        ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor"), seconds,
    )  # fmt: skip
    if "C7514" in said or "C7510" in said:
        row = row._replace(name=name + " SERIALISED")
    return row, kernel


def compile_all(names: list[str] | None = None) -> list[Row]:
    """The listed default variants."""
    return [measure(name, plan(name), VARIANTS[name][-1])[0] for name in names or VARIANTS]


if __name__ == "__main__":
    print("triton", triton.__version__)
    for each in sys.argv[1:] or VARIANTS:
        print(*compile_all([each])[0], flush=True)
