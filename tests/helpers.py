"""Functions that compare tensors, make problems, and compute them in independent ways."""

from __future__ import annotations

import math
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from natten import backends
from natten.inputs import Inputs
from natten.neighborhood import Neighborhood, window_mask

hopper, sdpa, triton, tiled, reference = backends.BACKENDS
ROOT = pathlib.Path(__file__).parents[1]
RELEASE = tuple(int(n) for n in torch.__version__.split(".")[:2])  # of PyTorch

# RMS of the error over RMS of the value, for outputs; gradients may have twice as much.
RATIO = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


def assert_close(name: str, expected: Tensor | None, actual: Tensor | None, ratio: float) -> None:
    """Check for the same shape, no NaN where none is expected, and a small RMS error."""
    if expected is None or actual is None:
        assert expected is actual, f"{name}: {expected} and {actual}"
        return
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(actual), finite), f"{name}: not finite where it should be"
    error = (actual.double() - expected.double())[finite].square().mean().sqrt()
    size = expected.double()[finite].square().mean().sqrt()
    if finite.any():
        # Inputs are of size 1, so even a sum that cancels to 0 keeps their rounding errors.
        assert error <= ratio * max(size, 0.1), f"{name}: {error / size:.1e} exceeds {ratio:.1e}"


class Case(NamedTuple):
    """A problem for fused attention; other problems are made from it.

    ``space`` is the layout of the keys; ``query_space`` that of the queries, if they are a part.
    """

    space: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] | int = 1
    dilation: tuple[int, ...] | int = 1
    is_causal: tuple[bool, ...] | bool = False
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    dim: int = 8
    value_dim: int = 8
    num_additional: int = 0
    rpb: bool = False
    boundary: tuple[str, ...] | str = "shift"
    queries_per_key: tuple[int, ...] | int = 1
    query_offset: tuple[int, ...] | None = None
    query_space: tuple[int, ...] | None = None

    @property
    def rule(self) -> Neighborhood:
        return Neighborhood.create(
            len(self.space), self.kernel_size, self.stride, self.dilation, self.is_causal,
            self.boundary, self.queries_per_key, self.query_offset,
        )  # fmt: skip

    @property
    def queries(self) -> tuple[int, ...]:
        """The layout of the queries."""
        whole = tuple(n * r for n, r in zip(self.space, self.rule.queries_per_key))
        return whole if self.query_space is None else self.query_space

    @property
    def options(self) -> dict:
        return self._asdict() | {"rpb": None}

    def inputs(self, dtype: torch.dtype = torch.float64) -> Inputs:
        """Random inputs for the problem."""

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype)

        bias = make(self.heads, *(2 * k - 1 for k in self.kernel_size)) if self.rpb else None
        additional = (self.batch, self.num_additional, self.kv_heads)
        return Inputs(
            make(self.batch, *self.queries, self.heads, self.dim),
            make(self.batch, *self.space, self.kv_heads, self.dim),
            make(self.batch, *self.space, self.kv_heads, self.value_dim),
            bias,
            make(*additional, self.dim) if self.num_additional else None,
            make(*additional, self.value_dim) if self.num_additional else None,
        )


def name_of(case: Case) -> str:
    """A readable test id, made of the fields that differ from the defaults."""
    space = "x".join(map(str, case.space)) + "-k" + "x".join(map(str, case.kernel_size))
    rest = [
        f"{field}{value}"
        for field, value in zip(case._fields[2:], case[2:])
        if value != case._field_defaults[field]
    ]
    text = "-".join([space, *rest])
    return "".join(c for c in text if c not in "(), ")


CASES = [
    Case((7,), (3,)),
    Case((13,), (4,), dilation=3),
    Case((20,), (5,), stride=3, is_causal=True),
    Case((33,), (8,), stride=8, batch=1, heads=1, kv_heads=1, dim=1, value_dim=3),
    Case((11,), (11,), is_causal=True, rpb=True),
    Case((9, 7), (3, 5), rpb=True),
    Case((13, 11), (4, 3), stride=(2, 3), dilation=(2, 3), heads=6, num_additional=3),
    Case((10, 6), (3, 3), dilation=(3, 2), is_causal=(True, False), rpb=True, num_additional=1),
    Case((1, 17), (1, 6), stride=(1, 4), kv_heads=1, dim=12, value_dim=5),
    Case((8, 8), (8, 8), heads=3, kv_heads=1, value_dim=17),
    Case((5, 6, 7), (3, 2, 5), rpb=True),
    Case((7, 5, 9), (2, 2, 3), stride=(2, 1, 2), dilation=(3, 2, 2), heads=4, num_additional=2),
    Case((4, 6, 5), (4, 3, 2), is_causal=(True, True, False), stride=(1, 3, 1), dim=65),
    Case((3, 4), (2, 2), batch=0),
]


def dense_mask(case: Case) -> Tensor:
    """Which query attends which key, bool ``[queries, keys]``."""
    return window_mask(case.rule, case.queries, case.space)


def brute_force_windows(n: int, k: int, s: int, causal: bool) -> list[list[int]]:
    """The keys of every query of a group of ``n``, straight from the definition."""
    windows = []
    for i in range(n):
        if causal:
            leader = min((i // s) * s + s - 1, n - 1)
            start = max(leader - k + 1, 0)
            windows.append(list(range(start, i + 1)))
        else:
            leader = min((i // s) * s + s // 2, n - 1)
            start = min(max(leader - k // 2, 0), n - k)
            windows.append(list(range(start, start + k)))
    return windows


def brute_force_axis(length: int, k: int, s: int, d: int, causal: bool) -> list[list[int]]:
    """The tokens that every token of an axis attends, straight from the definition."""
    attended: list[list[int]] = [[] for _ in range(length)]
    for g in range(d):
        n = math.ceil((length - g) / d)
        for i, window in enumerate(brute_force_windows(n, k, s, causal)):
            attended[i * d + g] = [j * d + g for j in window]
    return attended


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """PyTorch's attention with a mask, for heads-last ``[batch, tokens, heads, dim]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def run_interpreted(*arguments: str) -> None:
    """Let pytest run tests in a process of its own where Triton interprets the kernels.

    The interpreter must be chosen before Triton is imported. It is an error if one of the tests
    fails, if none runs, or if the process dies; the message is what pytest said there.
    """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    # Coverage is of what the CPU runs (pyproject.toml), so it is not measured there.
    others = "PYTEST_", "COVERAGE_"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            *arguments,
        ],
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    passed = re.search(r"^[1-9]\d* passed", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and passed, f"exit code {done.returncode}\n{done.stdout[-20000:]}"
