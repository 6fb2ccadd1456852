"""What a call's shapes decide, worked out once: tiles, grids, numbers and constants of its kernels.

An eager call must not cost more on the host than its kernels on the GPU. So everything but
addresses is kept in a plan, found by one lookup, and a kernel that has run before is launched
through its compiled object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from ... import tuning
from ...documents import Documents
from ...inputs import Inputs
from ...neighborhood import Dense, Rule
from ...tiling import padded
from . import tiles as tiling
from .backward import (
    bias_kernel,
    bias_sum_kernel,
    extra_kernel,
    key_kernel,
    query_kernel,
)
from .forward import forward_kernel
from .launch import Launch, Trials, per_axis, strides_of
from .primitives import (
    CAUSAL,
    CAUSAL_STRIDED,
    FULL,
    FULL_CAUSAL,
    SLIDING,
    STRIDED,
    UNIT,
)

# Of the bias's gradient, between its two kernels: 256 MiB, or one head's.
_MOST_SUMS = 2**26

# Of packed documents: how many, and the longest of each axis, queries and keys.
_Sizes = tuple[int, tuple[int, ...], tuple[int, ...]]


def modes(rule: Rule, shape: Sequence[int]) -> tuple[int, ...]:
    """How the windows of each of three axes go."""
    if isinstance(rule, Dense):
        return UNIT.value, UNIT.value, (FULL_CAUSAL if rule.causal else FULL).value
    found = []
    for length, stride, causal in zip(shape, rule.stride, rule.is_causal):
        if length == 1:
            mode = UNIT
        elif causal:
            mode = CAUSAL if stride == 1 else CAUSAL_STRIDED
        else:
            mode = SLIDING if stride == 1 else STRIDED
        found.append(mode.value)
    return padded(found, UNIT.value)


def sizes(rule: Rule, space: Sequence[int]) -> dict[str, int]:
    """Arguments for tokens, window, stride and dilation per axis."""
    kernel_size, stride = ((), ()) if isinstance(rule, Dense) else (rule.kernel_size, rule.stride)
    return (
        per_axis("L", space)
        | per_axis("K", kernel_size)
        | per_axis("S", stride)
        | per_axis("D", rule.dilation)
    )


def _parts(work: int, least: int, most: int) -> tuple[int, int]:
    """How many programs share ``work`` items, at least ``least`` each, and how many each takes."""
    parts = max(1, min(most, work // least))
    return parts, -(-work // parts)


class Plan:
    """The kernels of one problem; see :func:`plan_for` for the arguments."""

    def __init__(
        self,
        rule: Rule,
        scale: float,
        device: torch.device,
        dtype: torch.dtype,
        shapes: Sequence[tuple[int, ...]],
        strides: Sequence[Sequence[int]],
        bias_dtype: torch.dtype | None,
        extra: int | None,
        packed: _Sizes | None,
        tiles: tuple[int, ...],
        tf32: bool,
    ) -> None:
        query, key, value = shapes
        self.rule, self.scale, self.device = rule, scale, device
        self.itemsize, self.packed = dtype.itemsize, packed is not None
        own = query[0], tuple(query[1:-2]), tuple(key[1:-2])
        self.batch, self.space, self.key_space = packed or own
        self.shape = padded(self.space, 1)
        self.heads, self.kv_heads = query[-2], key[-2]
        self.per_kv = self.heads // self.kv_heads
        self.dim, self.value_dim = query[-1], value[-1]
        self.dilation = padded(rule.dilation, 1)
        self.modes = modes(rule, self.space if packed is None else [2] * len(self.space))
        self.strides = [strides_of(name, each) for name, each in zip("qkv", strides)]
        self.sizes = sizes(rule, self.space)
        self.numbers = {"per_kv": self.per_kv, "scale": scale}
        # Tile shapes asked for, of queries and keys: of the forward pass, then of the backward.
        rank = len(self.space)
        asked = [tiles[i : i + rank] for i in range(0, 4 * rank, rank)]
        self.asked = {"forward": asked[:2], "query": asked[2:], "key": asked[2:]}
        self.bias, self.extra = bias_dtype is not None, extra
        self.constants = {
            "ALIGN": math.gcd(16, *(s for each in self.strides for s in each.values())),
            "D": self.dim,
            "DV": self.value_dim,
            "BLOCK_D": tiling.block(self.dim),
            "BLOCK_DV": tiling.block(self.value_dim),
            "PRECISION": "tf32" if tf32 else "ieee",
        }

    def _problem(self, kind: str, bias: bool) -> tuple[Any, ...]:
        """What decides the tiles of a kind of kernel."""
        sizes = self.space, self.key_space, self.dim, self.value_dim, self.itemsize
        return (kind, self.rule, *sizes, bias)

    def _tiled(self, kernel: Any, kind: str, **arguments: Any) -> Launch | Trials:
        """A kernel with a program per tile; ``arguments`` are those that not all such have."""
        problem = self._problem(kind, self.bias)

        def launch(tiles: tiling.Tiles) -> Launch:
            return self._launch(kernel, kind, tiles, arguments)

        name, count = tiling.key(*problem), tuning.wanted(backward=kind != "forward")
        if count > 1 and not any(map(any, self.asked[kind])) and tuning.lookup(name) is None:
            return Trials(
                name, {each: launch(each) for each in tiling.candidates(*problem)[:count]}
            )
        return launch(tiling.choose(*problem, *self.asked[kind]))

    def _launch(
        self, kernel: Any, kind: str, tiles: tiling.Tiles, arguments: dict[str, Any]
    ) -> Launch:
        of_keys = kind == "key"
        heads = self.kv_heads if of_keys else self.heads
        counts = self._counts(
            *((tiles.key, self.key_space) if of_keys else (tiles.query, self.space))
        )
        programs = math.prod(counts) * math.prod(self.dilation) * self.batch * heads
        query, key, value = self.strides
        arguments = {
            **query, **key, **value, **self.sizes, "KEYS": self.key_space[-1],
            **per_axis("T", counts), **self.numbers, **arguments, **self.constants,
            "MODES": self.modes, "TQ": tiles.query, "TK": tiles.key, "HAS_RPB": self.bias,
            "PACKED": self.packed,
        }  # fmt: skip
        return Launch(
            kernel, (programs,), arguments, num_warps=tiles.num_warps, num_stages=tiles.num_stages
        )

    def _counts(self, tile: tiling.Shape, space: tuple[int, ...]) -> list[int]:
        """How many tiles the longest dilation group has, per axis."""
        lengths = zip(padded(space, 1), self.dilation, tile)
        return [math.ceil(math.ceil(length / d) / size) for length, d, size in lengths]

    @cached_property
    def forward(self) -> Launch | Trials:
        return self._of_queries(forward_kernel, "forward")

    @cached_property
    def query(self) -> Launch | Trials:
        """dQ, and terms."""
        return self._of_queries(query_kernel, "query", HAS_GRAD_LSE=False)

    @cached_property
    def query_of_both(self) -> Launch | Trials:
        """As :attr:`query`, where the LSE has a gradient, too."""
        return self._of_queries(query_kernel, "query", HAS_GRAD_LSE=True)

    def _of_queries(self, kernel: Any, kind: str, **arguments: Any) -> Launch | Trials:
        arguments |= {"heads": self.heads, "extra": self.extra or 0, "HAS_EXTRA": bool(self.extra)}
        return self._tiled(kernel, kind, **arguments)

    @cached_property
    def key(self) -> Launch | Trials:
        """dK and dV."""
        # Without the loop over heads, ptxas spills what it then keeps beside two sums of 128
        # channels; narrower ones are up to a quarter faster (benchmarks/results/h200.md).
        single = self.per_kv == 1 and max(self.dim, self.value_dim) <= 64
        return self._tiled(key_kernel, "key", kv_heads=self.kv_heads, SINGLE=single)

    @cached_property
    def extra_tokens(self) -> tuple[int, Launch]:
        """The additional tokens' gradients in parts: how many, and the kernel."""
        assert self.extra is not None
        parts, per_part = _parts(math.prod(self.shape), 512, 64)
        arguments = {
            **self.strides[0], **per_axis("L", self.space), "kv_heads": self.kv_heads,
            **self.numbers, "extra": self.extra, "per_split": per_part, **self.constants,
            "M": 32, "N": 16,
        }  # fmt: skip
        grid = (self.batch * self.kv_heads, -(-self.extra // 16), parts)
        return parts, Launch(extra_kernel, grid, arguments)

    @cached_property
    def rpb(self) -> tuple[tuple[int, ...], list[tuple[Launch, Launch]]]:
        """The bias's gradient: the shape of the sums between its two kernels, and these, for as
        many heads at once as their sums have room for."""
        assert not isinstance(self.rule, Dense)
        kernel_size = padded(self.rule.kernel_size, 1)
        # As of dQ without a bias, also where those were tuned: a program loads its biases once.
        tiles = tiling.choose(*self._problem("query", False), *self.asked["query"])
        counts = self._counts(tiles.query, self.space)
        # A window begins half of it before its query, at the ends of an axis up to all of it.
        apart, boxes = [], []
        for k, rows, columns in zip(kernel_size, tiles.query, tiles.key):
            apart.append(-(k // 2) - math.ceil((k - 1 - k // 2) / columns) * columns)
            boxes.append(math.ceil((rows + k - 1 - apart[-1]) / columns))
        every, total = math.prod(boxes), math.prod(counts) * math.prod(self.dilation) * self.batch
        pairs = math.prod(tiles.query), math.prod(tiles.key)
        heads = max(1, min(self.heads, _MOST_SUMS // (every * math.prod(pairs))))
        parts, _ = _parts(total, 4, 2048 // (every * heads))
        offsets = math.prod(2 * k - 1 for k in kernel_size)
        of_boxes = {
            **per_axis("O", apart), "B1": boxes[1], "B2": boxes[2],
            "TQ": tiles.query, "TK": tiles.key,
        }  # fmt: skip
        query, key, value = self.strides
        arguments = {
            **query, **key, **value, **self.sizes, "heads": self.heads, **self.numbers,
            "batches": self.batch, **of_boxes, **self.constants, "MODES": self.modes,
        }  # fmt: skip
        sums = {
            **per_axis("K", kernel_size), **of_boxes, "boxes": every, "parts": parts,
            "offsets": offsets, "BLOCK": 32,
        }  # fmt: skip
        stages = tiling.stages_of_both(tiles, self.dim, self.value_dim, self.itemsize)
        options: dict[str, Any] = {"num_warps": tiles.num_warps, "num_stages": stages}
        launches = []
        for first in range(0, self.heads, heads):
            count, these = min(heads, self.heads - first), {"first_head": first}
            each = Launch(bias_kernel, (every, parts, count), arguments | these, **options)
            add_up = Launch(bias_sum_kernel, (-(-offsets // 32), count), sums | these)
            launches.append((each, add_up))
        return (parts, heads, every, *pairs), launches


# Calls of one shape come again: a model has few.
_cached_plan = tuning.cached(Plan)


def plan_for(
    inputs: Inputs,
    rule: Rule,
    scale: float,
    documents: Documents | None = None,
    tiles: tuple[int, ...] = (),
) -> Plan:
    """The plan of a call; tensors have channels one after another."""
    query, key, value, rpb, additional_keys, _ = inputs
    return _cached_plan(
        rule,
        scale,
        query.device,
        query.dtype,
        (query.shape, key.shape, value.shape),
        (query.stride(), key.stride(), value.stride()),
        None if rpb is None else rpb.dtype,
        None if additional_keys is None else additional_keys.shape[1],
        None if documents is None else documents[1:],
        tiles,
        query.dtype == torch.float32 and allows_tf32(),
    )


def allows_tf32() -> bool:
    """Whether float32 products may be rounded to TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # 2.9's, which also knows what allow_tf32 was set to
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
