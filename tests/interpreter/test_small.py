"""The kernel of small windows beside the reference: where tiles and their keys are, masks, biases
and the softmax. Which thread has which number only a GPU tells, so stand-ins copy to shared memory
and load from there."""

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

from natten.backends.triton import plan as plans
from natten.backends.triton import small, small_tiles
from natten.backends.triton import tiles as tiling
from natten.inputs import Inputs
from natten.neighborhood import Neighborhood

copies: list[np.ndarray] = []  # rows [keys, channels]: of keys, of values, of keys ..
halo_rows: list[np.ndarray] = []  # a program's keys and values


class Copies:
    """``async_copy``: copies are there when a program has met at a barrier."""

    @staticmethod
    def load_async(stage: Any, at: Any, mask: Any = None) -> None:
        copies.append(tl.load(at, mask, None if mask is None else 0.0).handle.data)

    @staticmethod
    def barrier() -> None:
        halo_rows[:] = (np.concatenate(copies[first::2]) for first in (0, 1))
        copies.clear()

    commit_group = staticmethod(lambda: None)
    wait_group = staticmethod(lambda _: None)


def loaded(first: Any, kv_block: Any, halo: Any, of_values: bool) -> Any:
    """Rows of each warp's block, ``[W, N, channels]``."""
    c = np.unravel_index(np.arange(np.prod(kv_block)), kv_block)
    axes = [np.asarray(f.handle.data)[:, None] + at for f, at in zip(first, c)]
    rows = (axes[0] * halo[1] + axes[1]) * halo[2] + axes[2]
    assert rows.min() >= 0 and rows.max() < np.prod(halo)
    x = halo_rows[of_values][rows].astype(np.float32)
    return tl.tensor(TensorHandle(x, tl.float32), tl.block_type(tl.float32, list(x.shape)))


def load_keys(key, first, start, W, D, KV_BLOCK, HALO):
    return tl.permute(loaded(first, KV_BLOCK, HALO, False), (0, 2, 1))


def load_values(value, first, start, W, DV, KV_BLOCK, HALO):
    return loaded(first, KV_BLOCK, HALO, True)


@triton.jit
def small_kernel(
    query, key, value, rpb, out, lse, key_mask, NUMBERS: tl.constexpr, CONSTANTS: tl.constexpr
):  # fmt: skip
    """A program of the kernel; the interpreter takes annotations for those of portable kernels."""
    numbers = {
        name: tl.full([], x, tl.float32 if isinstance(x, float) else tl.int32)
        for name, x in NUMBERS.items()
    }
    tensors = query, key, value, rpb, out, lse, key_mask
    small.small_forward_kernel.fn(*tensors, **numbers, **CONSTANTS)


# A layout, whether there is a bias, and the rule.
CASES = {
    "dilated": ((7, 12), True, {"kernel_size": (3, 5), "dilation": (1, 2)}),
    "strided": ((9, 11), False, {"kernel_size": (5, 6), "stride": (2, 3)}),
    "truncated": ((7, 9), True, {"kernel_size": (3, 12), "boundary": ("shift", "truncate")}),
    "one row": ((1, 20), True, {"kernel_size": (1, 5), "dilation": (2, 1), "boundary": "truncate"}),
    "ring": ((6, 10), False, {"kernel_size": (3, 5), "boundary": "circular"}),
    "video": ((2, 5, 6), False, {"kernel_size": (2, 3, 3), "is_causal": (True, False, False)}),
    "part": ((9, 16), True, {"kernel_size": (3, 5), "dilation": (1, 3), "query_offset": (2, 4)}),
}
PART = (5, 8)  # queries
MASKED = ("strided", "ring", "video", "part")  # keys and values that are NaN where they are masked
NARROW = ("dilated", "ring", "part")  # heads of fewer channels than products have
FLOAT32 = ("strided", "part")  # whose products may be rounded to TF32; others are of float16


@pytest.mark.parametrize("name", CASES)
def test_small_windows(monkeypatch, name):
    """Two query heads share a key head."""
    shape, with_bias, options = CASES[name]
    rule = Neighborhood.create(len(shape), **options)
    queries = shape if rule.query_offset is None else PART
    dtype = torch.float32 if name in FLOAT32 else torch.float16
    dim = 12 if name in NARROW else 16
    query = torch.randn(1, *queries, 2, dim, dtype=dtype)
    key, value = (torch.randn(1, *shape, 1, dim, dtype=dtype) for _ in range(2))
    bias = None
    if with_bias:
        bias = torch.randn(2, *(2 * k - 1 for k in rule.kernel_size), dtype=dtype)
        bias[1].masked_fill_(torch.rand_like(bias[1]) < 0.5, -torch.inf)
    monkeypatch.setattr(small_tiles, "runs_here", lambda: True)
    monkeypatch.setattr(tiling, "forward_cycles", lambda *_: float("inf"))
    monkeypatch.setattr(tiling, "allows_tf32", lambda: dtype == torch.float32)
    monkeypatch.setattr(small, "barrier", Copies.barrier)
    monkeypatch.setattr(small, "load_async", Copies.load_async)
    monkeypatch.setattr(small, "async_copy", Copies)
    monkeypatch.setattr(small, "load_keys", load_keys)
    monkeypatch.setattr(small, "load_values", load_values)
    for name_of_cache in ("_cached_plan", "parts_of"):
        monkeypatch.setattr(plans, name_of_cache, getattr(plans, name_of_cache).__wrapped__)
    mask = None
    if name in MASKED:
        mask = torch.rand(1, *shape, 2)[..., 1] < 0.4  # some queries attend nothing
        key[~mask], value[~mask] = torch.nan, torch.nan
    masks = mask, None
    launch = plans.plan_for(query, key, value, bias, None, rule, 0.5, masks=masks).small
    out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:-1], torch.nan)
    numbers = {name: launch.arguments[name] for name in launch.kernel.numbers}
    constants = {name: x for name, x in launch.arguments.items() if name not in numbers}
    small_kernel[launch.grid](query, key, value, bias, out, lse, mask, numbers, constants)
    exact = (None if x is None else x.double() for x in (query, key, value, bias))
    inputs = Inputs(*exact, key_mask=mask)
    expected, expected_lse = reference.forward(inputs, rule, 0.5)
    # Weights and output are rounded to 2**-11; the interpreter does not round to TF32.
    assert_close(name, expected, out, 1e-5 if name in FLOAT32 else 2e-3)
    assert_close(name, expected_lse, lse, 1e-4)
