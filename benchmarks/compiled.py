"""The kernels that calls launch, compiled for a GPU that is not there.

A call runs on tensors without data; what it would launch is compiled instead, by Triton's own way
from arguments to a kernel. So tiles, options and types are what a user gets, whatever they are.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from natten import compiling, tuning
from natten._torch import allows_tf32
from natten.backends import Backend, Problem, named
from natten.backends.hopper.costs import DK, DKDV, DQ, DV
from natten.backends.triton import tiles as tiling
from natten.backends.triton.fast_launch import described
from natten.backends.triton.launch import Launch
from natten.documents import Documents, Sizes
from natten.inputs import Inputs
from natten.neighborhood import Dense, Neighborhood, Rule


class Variant(NamedTuple):
    """A problem whose kernels are compiled."""

    name: str
    shape: tuple[int, ...]
    window: int | tuple[int, ...]
    dim: int
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    dtype: torch.dtype = torch.bfloat16
    value_dim: int | None = None
    num_additional: int = 0
    bias: bool = False
    boundary: str | tuple[str, ...] = "shift"
    queries_per_key: int | tuple[int, ...] = 1
    part: tuple[int, ...] = ()  # the layout of queries that are a part
    masked: bool = False
    plain: bool = False  # attention of all keys, or causal; part: the queries' length
    packed: bool = False  # documents up to this layout
    tf32: bool = False  # whether products of float32 may be rounded to TF32


class Kernel(NamedTuple):
    """A compiled kernel and what it needs."""

    name: str
    variant: str
    tiles: str
    registers: int  # of a thread; of Hopper's kernels, when a program starts
    spilled: int  # bytes of a thread
    looped: int  # instructions of a loop with products that move what was spilled
    shared: int  # bytes
    serialised: bool  # ptxas waits after each asynchronous product
    asm: dict[str, Any]


def call_portable(variant: Variant) -> None:
    """Attention and its gradient, then the unfused maps."""
    portable = _backend("triton")
    _attention(variant, portable)
    if not variant.bias:
        rule, q, k, v = _inputs(variant)
        attn = portable.qk(q, k, rule)
        portable.av(attn, v, rule)
        portable.av_transposed(attn, q, q.shape[1:-2], rule)


def call_hopper(variant: Variant) -> None:
    """Attention, and its gradient where there is one."""
    _attention(variant, _backend("hopper"))


def _backend(name: str) -> Backend:
    found = named(name)
    assert found is not None
    return found


def _rule(variant: Variant) -> Rule:
    if variant.plain:
        assert isinstance(variant.causal, bool)
        return Dense(variant.causal)
    return Neighborhood.create(
        len(variant.shape), variant.window, variant.stride, variant.dilation, variant.causal,
        variant.boundary, variant.queries_per_key, 1 if variant.part else None,
    )  # fmt: skip


def _inputs(variant: Variant) -> tuple[Rule, Tensor, Tensor, Tensor]:
    rule = _rule(variant)
    fine = tuple(r * n for r, n in zip(rule.queries_per_key, variant.shape))
    each = (variant.part or fine, variant.dim), (variant.shape, variant.dim)
    q, k, v = (
        torch.empty(2, *shape, 4, dim, dtype=variant.dtype, device="meta")
        for shape, dim in (*each, (variant.shape, variant.value_dim or variant.dim))
    )
    return rule, q, k, v


def _attention(variant: Variant, backend: Backend) -> None:
    rule, q, k, v = _inputs(variant)
    inputs = Inputs(q, k, v)
    if variant.bias:
        inputs = inputs._replace(rpb=q.new_empty(4, *(2 * size - 1 for size in rule.kernel_size)))
    if variant.num_additional:
        tokens = [x.new_empty(2, variant.num_additional, 4, x.shape[-1]) for x in (k, v)]
        inputs = inputs._replace(additional_keys=tokens[0], additional_values=tokens[1])
    if variant.masked:
        shapes = {"key_mask": k.shape[:-2]}
        if inputs.additional_keys is not None:
            shapes["additional_mask"] = inputs.additional_keys.shape[:2]
        masks = {name: q.new_empty(shape, dtype=torch.bool) for name, shape in shapes.items()}
        inputs = inputs._replace(**masks)
    scale = variant.dim**-0.5
    if variant.packed:
        inputs = Inputs(*(x.flatten(0, -3)[None] for x in inputs[:3]))
        table = q.new_empty(q.shape[0], 16, dtype=torch.int64)
        documents = Documents(table, Sizes(len(table), variant.shape, variant.shape))
        out, lse = backend.packed_forward(inputs, documents, rule, scale)
        backend.packed_backward(out, None, inputs, out, lse, documents, rule, scale)
        return
    out, lse = backend.forward(inputs, rule, scale)
    if backend.lacks(Problem.of("gradient", inputs, rule, scale)) is None:
        backend.backward(out, None, inputs, out, lse, rule, scale)


def launches(
    call: Callable[[Variant], None], variant: Variant
) -> list[tuple[Launch, dict[str, Any]]]:
    """What a call would launch, each with its tensors."""
    found = []

    def keep(launch: Launch, **tensors: Any) -> None:
        found.append((launch, tensors))

    with mock.patch.object(Launch, "run", keep), _rounding(variant.tf32):
        call(variant)
    return found


@contextlib.contextmanager
def _rounding(tf32: bool) -> Iterator[None]:
    """Whether products of float32 may be rounded to TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = before


class _Driver:
    """The little that Triton asks of a driver to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> _Driver:
        return self  # kernels are kept by device: none from another time

    def get_current_stream(self, device: _Driver) -> int:
        return 0


@contextlib.contextmanager
def _compiler(target: GPUTarget, shared: int) -> Iterator[None]:
    """Tiles and Triton as on a machine with that GPU.

    The cache is empty: of a kernel from there, nothing would be known but its code.
    """
    before = driver._active
    driver.set_active(_Driver(target))
    gpu = tiling.Gpu(target.arch if target.backend == "cuda" else 0, shared)
    try:
        with (
            mock.patch.object(tiling, "gpu", lambda: gpu._replace(tf32=allows_tf32())),
            tempfile.TemporaryDirectory() as folder,
            knobs.cache.scope(),
            knobs.nvidia.scope(),
        ):
            tuning._forget_choices()
            knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
            yield
    finally:
        driver._active = before
        tuning._forget_choices()


def compile_calls(
    target: GPUTarget, shared: int, call: Callable[[Variant], None], variants: Iterable[Variant]
) -> Iterator[Kernel]:
    """The kernels that calls launch, compiled for a GPU; none twice.

    Args:
        target: the GPU.
        shared: bytes of shared memory that a program may have there.
        call: :func:`call_portable` or :func:`call_hopper`.
        variants: what it is called for.
    """
    seen = set()
    with _compiler(target, shared):
        for variant in variants:
            for launch, tensors in launches(call, variant):
                log = io.StringIO()
                with contextlib.redirect_stdout(log), compiling.uncollected():
                    compiled = launch.kernel.run(
                        **described(launch.tensors, tensors),
                        **launch.arguments,
                        **launch.options,
                        grid=launch.grid,
                        warmup=True,
                    )
                if compiled.hash in seen:
                    continue
                seen.add(compiled.hash)
                said, asm = log.getvalue(), compiled.asm
                hip = target.backend == "hip"
                used = _amd(asm["amdgcn"]) if hip else (*_nvidia(said), _looped(asm["cubin"]))
                yield Kernel(
                    _name(launch), variant.name, _tiles(launch), *used,
                    compiled.metadata.shared, "Potential Performance Loss" in said, asm,
                )  # fmt: skip


def _nvidia(log: str) -> tuple[int, int]:
    """Registers and spilled bytes, as ptxas says."""
    spilled = re.findall(r"(\d+) bytes spill", log)  # stores and loads
    return max(map(int, re.findall(r"Used (\d+) registers", log))), max(map(int, spilled))


def _looped(cubin: bytes) -> int:
    """Loads and stores of spilled registers in the innermost loops with products, at most.

    Outside of them spilling costs next to nothing: a loop needs all registers for itself.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        command = [tool, "-c", file.name]
        listing = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    labels: dict[str, int] = {}
    jumps, instructions = [], []
    for line in map(str.strip, listing.splitlines()):
        if found := re.match(r"(\.L_x_\d+):", line):
            labels[found[1]] = len(instructions)
        elif re.match(r"/\*[0-9a-f]{4,5}\*/", line):
            found = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if found and found[1] in labels:
                jumps.append((labels[found[1]], len(instructions)))
            instructions.append(line)

    def count(names: str, first: int, last: int) -> int:
        return sum(bool(re.search(rf"\b({names})\b", x)) for x in instructions[first : last + 1])

    products = r"\w*MMA"
    if not count(products, 0, len(instructions)):
        products = "FFMA"
    # A jump back from beyond an exit is no loop, but the end of an unlikely path.
    loops = [each for each in jumps if count(products, *each) and not count("EXIT|RET", *each)]
    inner = [
        (a, b)
        for a, b in loops
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)
    ]
    return max((count("LDL|STL", *each) for each in inner), default=0)


def _amd(code: str) -> tuple[int, int, int]:
    """Vector registers, the bytes of those that were spilled, and how many."""
    found = {
        name: max(map(int, re.findall(rf"\.{name}:\s+(\d+)", code)))
        for name in ("vgpr_count", "vgpr_spill_count")
    }
    return found["vgpr_count"], 4 * found["vgpr_spill_count"], found["vgpr_spill_count"]


def _name(launch: Launch) -> str:
    """A kernel's name; Hopper's passes are one kernel."""
    name = launch.kernel.__name__.removesuffix("_kernel")
    if name == "backward":
        name += {DQ: " dQ", DKDV: " dK dV", DK: " dK", DV: " dV"}[launch.arguments["PASS"]]
    return name


def _tiles(launch: Launch) -> str:
    """Shapes of queries and of keys, and what goes with them."""
    constants = launch.arguments | launch.options
    names = ("Q_BLOCK", "KV_BLOCK") if "Q_BLOCK" in constants else ("TILE", "BLOCK")
    shapes = [constants[name] for name in names if name in constants]
    if constants.get("PASS", DQ) != DQ:  # tiles are of keys, blocks of queries
        shapes.reverse()
    text = " ".join("x".join(map(str, shape)) for shape in shapes) or "-"
    for name, what in (("num_warps", "warps"), ("num_stages", "stages"), ("STAGES", "stages")):
        text += f", {constants[name]} {what}" if name in constants else ""
    return text
