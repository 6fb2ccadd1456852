"""The kernels of bands beside the reference: where tiles and their bands are, and masks. Which
thread has which number only a GPU tells, so stand-ins copy to shared memory and load from there."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", "3.6")

import gluon  # noqa: F401  (before the kernels)
import numpy as np
import torch
import triton
import triton.language as tl
from helpers import assert_close, reference
from triton.runtime.interpreter import TensorHandle

from natten.backends.triton import band_tiles, bands, small_tiles
from natten.backends.triton import plan as plans
from natten.backends.triton import tiles as tiling
from natten.inputs import Inputs
from natten.neighborhood import Neighborhood


class Memory:
    """Shared memory of a program. Copies are there once it has waited for them."""

    def __init__(self) -> None:
        self.lines: dict[int, np.ndarray] = {}
        self.on_the_way: dict[int, np.ndarray] = {}

    def index(self, i: Any) -> int:
        return int(i)

    def load_async(self, line: int, at: Any, mask: Any) -> None:
        self.lines.pop(line, None)
        self.on_the_way[line] = tl.load(at, mask, 0.0).handle.data

    def wait_group(self, _: int) -> None:
        self.lines |= self.on_the_way
        self.on_the_way = {}

    def commit_group(self) -> None:
        pass

    def rows(self, first: Any, start: Any, block: Any, band: Any, dim: int) -> Any:
        """Rows of each warp's block, ``[W, N, channels]``."""
        start, dim = int(start), getattr(dim, "value", dim)
        line, rest = divmod(start, band[2] * dim * 4)
        assert rest == 0
        x = []
        for w in range(len(first[2].handle.data)):
            for c0, c1, c2 in np.ndindex(*block):
                column = int(first[2].handle.data[w]) + c2
                assert 0 <= column < band[2]
                x.append(self.lines[line + c0 * band[1] + c1][column])
        x = np.stack(x).reshape(-1, int(np.prod(block)), dim)
        return tl.tensor(TensorHandle(x, tl.float32), tl.block_type(tl.float32, list(x.shape)))


memory = Memory()


def allocate(*_: Any) -> Memory:
    memory.__init__()
    return memory


def load_keys(key, first, start, W, D, BLOCK, BAND):
    return tl.permute(memory.rows(first, start, BLOCK, BAND, D), (0, 2, 1))


def load_values(value, first, start, W, D, BLOCK, BAND):
    return memory.rows(first, start, BLOCK, BAND, D)


def run(launch: Any, **tensors: Any) -> None:
    """Run all programs; the interpreter takes annotations for those of portable kernels."""
    numbers = {name: launch.arguments[name] for name in launch.kernel.numbers}
    constants = {name: x for name, x in launch.arguments.items() if name not in numbers}
    given = tuple(tensors[name] for name in launch.kernel.tensors)
    RUN[len(given)][launch.grid](*given, launch.kernel.fn, numbers, constants)


def _called(kernel, tensors, numbers, constants):
    numbers = {
        name: tl.full([], x, tl.float32 if isinstance(x, float) else tl.int32)
        for name, x in numbers.items()
    }
    kernel(*tensors, **numbers, **constants)


@triton.jit
def six(a, b, c, d, e, f, KERNEL: tl.constexpr, NUMBERS: tl.constexpr, CONSTANTS: tl.constexpr):
    _called(KERNEL, (a, b, c, d, e, f), NUMBERS, CONSTANTS)


@triton.jit
def eight(
    a, b, c, d, e, f, g, h, KERNEL: tl.constexpr, NUMBERS: tl.constexpr, CONSTANTS: tl.constexpr
):  # fmt: skip
    _called(KERNEL, (a, b, c, d, e, f, g, h), NUMBERS, CONSTANTS)


@triton.jit
def nine(
    a, b, c, d, e, f, g, h, i, KERNEL: tl.constexpr, NUMBERS: tl.constexpr, CONSTANTS: tl.constexpr
):  # fmt: skip
    _called(KERNEL, (a, b, c, d, e, f, g, h, i), NUMBERS, CONSTANTS)


RUN = {6: six, 8: eight, 9: nine}

# A layout, query heads of a key head, and the rule.
CASES = {
    "two heads": ((5, 18), 2, {"kernel_size": (3, 7)}),
    "dilated": ((5, 21), 1, {"kernel_size": (3, 5), "dilation": (1, 2)}),
    "strided": ((7, 20), 1, {"kernel_size": (5, 6), "stride": (2, 3)}),
    "truncated": ((5, 19), 1, {"kernel_size": (3, 12), "boundary": ("shift", "truncate")}),
    "rows": ((2, 40), 1, {"kernel_size": (1, 9), "is_causal": (False, True), "stride": (1, 2)}),
    "ring": ((6, 20), 1, {"kernel_size": (3, 6), "boundary": "circular", "stride": (1, 4)}),
    "video": ((3, 4, 6), 1, {"kernel_size": (2, 3, 3), "is_causal": (True, False, False)}),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", CASES)
def test_bands(monkeypatch, name, masked):
    """Output, LSE and gradients, also where masked keys and values hold NaN and infinity."""
    shape, heads, options = CASES[name]
    rule = Neighborhood.create(len(shape), **options)
    torch.manual_seed(0)
    query, grad = (torch.randn(1, *shape, heads, 32) for _ in range(2))
    key, value = (torch.randn(1, *shape, 1, 32) for _ in range(2))
    monkeypatch.setattr(small_tiles, "runs_here", lambda: True)
    monkeypatch.setattr(band_tiles, "pays", lambda *_: True)
    monkeypatch.setattr(plans.Plan, "_shares", lambda *_: None)
    monkeypatch.setattr(tiling, "allows_tf32", lambda: True)
    monkeypatch.setattr(bands, "barrier", lambda: None)
    monkeypatch.setattr(bands, "load_async", memory.load_async)
    monkeypatch.setattr(bands, "async_copy", memory)
    monkeypatch.setattr(bands, "load_keys", load_keys)
    monkeypatch.setattr(bands, "load_values", load_values)
    monkeypatch.setattr(type(bands.gl), "allocate_shared_memory", lambda self, *_: allocate())
    monkeypatch.setattr(plans, "_cached_plan", plans._cached_plan.__wrapped__)
    mask = None
    if masked:
        mask = (torch.rand(*reversed(shape), 1) < 0.7).permute(*range(len(shape), -1, -1))
        mask[:, :2] = False  # queries there have less left, or nothing
        key[~mask], value[~mask] = torch.nan, torch.inf
    plan = plans.plan_for(query, key, value, None, None, rule, 0.5, masks=(mask, None))
    out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:-1], torch.nan)
    inputs = {"query": query, "key": key, "value": value, "key_mask": mask}
    run(plan.bands_forward, **inputs, out=out, lse=lse)
    exact = Inputs(query.double(), key.double(), value.double(), key_mask=mask)
    expected, expected_lse = reference.forward(exact, rule, 0.5)
    assert_close(name, expected, out, 1e-5)
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    assert_close(name, expected_lse.clamp(min=-1e3), lse.clamp(min=-1e3), 1e-5)
    lse_delta = torch.full((*lse.shape, 4), torch.nan)
    grads = [torch.full_like(x, torch.nan) for x in (query, key, value)]
    run(
        plan.bands_dq, **inputs, out=out, lse=lse, grad_out=grad, lse_delta=lse_delta,
        grad_query=grads[0],
    )  # fmt: skip
    run(
        plan.bands_dkdv, **inputs, grad_out=grad, lse_delta=lse_delta, grad_key=grads[1],
        grad_value=grads[2],
    )  # fmt: skip
    found = reference.backward(grad.double(), None, exact, expected, expected_lse, rule, 0.5)
    for a, b in zip(found, grads):
        assert_close(name, a, b, 1e-5)
