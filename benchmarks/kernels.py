"""Compile the default kernel variants without a GPU and print what they need.

    python benchmarks/kernels.py [--target 90] [--variants NAT,FLUX] [--fail-on-spills]

Targets are NVIDIA compute capabilities (80, 86, 90, 100) or an AMD architecture (gfx942). Registers
and spills are read from ptxas, for NVIDIA only.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from natten.backends.triton import tiles
from natten.backends.triton.backward import key_kernel, query_kernel
from natten.backends.triton.forward import forward_kernel
from natten.backends.triton.plan import modes
from natten.backends.triton.primitives import POINTERS
from natten.backends.triton.unfused import KERNELS as UNFUSED
from natten.backends.triton.unfused import choose_tiles
from natten.neighborhood import Neighborhood

KERNELS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel, **UNFUSED}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Variant(NamedTuple):
    """One problem whose kernels are compiled."""

    name: str
    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    head_dim: int
    stride: int = 1
    is_causal: bool = False
    dtype: torch.dtype = torch.bfloat16


VARIANTS = [
    Variant("NAT", (56, 56), (7, 7), 32),
    Variant("NAT fp16", (56, 56), (7, 7), 32, dtype=torch.float16),
    Variant("HDiT", (64, 64), (13, 13), 64),
    Variant("FLUX", (256, 256), (80, 80), 128),
    Variant("FLUX strided", (256, 256), (80, 80), 128, stride=16),
    Variant("1-D causal", (32768,), (2048,), 128, is_causal=True),
    Variant("video", (16, 32, 32), (7, 11, 11), 64),
    Variant("Hunyuan", (30, 48, 80), (18, 24, 24), 128),
]


def compile_variant(variant: Variant, kind: str, target: GPUTarget) -> Any:
    """The compiled kernel."""
    rule = Neighborhood.create(
        len(variant.shape), variant.kernel_size, variant.stride, 1, variant.is_causal
    )
    d = variant.head_dim
    size = variant.dtype.itemsize
    constants = {"ALIGN": 16, "PRECISION": "ieee"}
    if kind in UNFUSED:
        choice, more = choose_tiles(kind, rule, variant.shape, d, size)
        options = {name: more.pop(name) for name in ("num_warps", "num_stages")}
        constants |= more
    else:
        choice = tiles.choose(kind, rule, variant.shape, variant.shape, d, d, size)
        options = {"num_warps": choice.num_warps, "num_stages": choice.num_stages}
        if choice.registers is not None and target.backend == "cuda":
            options["maxnreg"] = choice.registers
        constants |= {
            "MODES": modes(rule, variant.shape), "TQ": choice.query, "TK": choice.key,
            "D": d, "DV": d, "BLOCK_D": tiles.block(d), "BLOCK_DV": tiles.block(d),
            "HAS_RPB": False, "HAS_EXTRA": False, "PACKED": False,
        }  # fmt: skip
    kernel = KERNELS[kind]
    kept = {name: x for name, x in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in kept:
            signature[name] = "constexpr"
        elif name in POINTERS:
            full = name in ("lse", "terms")
            signature[name] = "*fp32" if full else f"*{TYPES[variant.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    source = ASTSource(kernel, signature, constexprs=kept, attrs=attributes)
    return choice, triton.compile(source, target=target, options=options)


def resources(compiled: Any, capability: int) -> tuple[str, str]:
    """Registers and spilled bytes, from ptxas."""
    ptxas = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    tool = ptxas / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    suffix = "a" if capability >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [tool, "-v", f"--gpu-name=sm_{capability}{suffix}", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = (
        re.search(r"(\d+) registers", text),
        re.search(r"(\d+) bytes spill st", text),
    )
    return (registers.group(1) if registers else "?"), (spills.group(1) if spills else "?")


def main() -> None:
    """Compile everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="90")
    parser.add_argument("--variants", help="comma-separated names; all by default")
    parser.add_argument("--fail-on-spills", action="store_true")
    args = parser.parse_args()
    amd = args.target.startswith("gfx")
    target = GPUTarget("hip", args.target, 64) if amd else GPUTarget("cuda", int(args.target), 32)
    print("| kernel | variant | queries | keys | warps | stages | registers | spills | shared kB |")
    print("|---|---|---|---|---|---|---|---|---|")
    spilled = False
    names = args.variants.split(",") if args.variants else [each.name for each in VARIANTS]
    for variant in (each for each in VARIANTS if each.name in names):
        for kind in KERNELS:
            choice, compiled = compile_variant(variant, kind, target)
            used = ("-", "0") if amd else resources(compiled, int(args.target))
            spilled |= used[1] != "0"
            print(
                f"| {kind} | {variant.name} | {choice.query} | {choice.key} | {choice.num_warps} "
                f"| {choice.num_stages} | {used[0]} | {used[1]} "
                f"| {compiled.metadata.shared / 1024:.0f} |",
                flush=True,
            )
    if spilled and args.fail_on_spills:
        sys.exit("a default variant spills registers")


if __name__ == "__main__":
    main()
