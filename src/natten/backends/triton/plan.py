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
from torch import Tensor

from ... import tuning
from ...documents import Documents
from ...neighborhood import Dense, Rule, queries_before
from ...tiling import padded
from . import tiles as tiling
from .backward import (
    additional_kernel,
    dkdv_kernel,
    dq_kernel,
    rpb_grad_kernel,
    rpb_grad_sum_kernel,
)
from .forward import forward_kernel
from .launch import Launch, Trials, per_axis, strides_of
from .windows import modes, per_key

# Of the bias's gradient, between its two kernels: 256 MiB, or one head's.
_MOST_SUMS = 2**26

# Of packed documents: how many, and the longest of each axis, queries and keys.
_Sizes = tuple[int, tuple[int, ...], tuple[int, ...]]


def sizes(rule: Rule, space: Sequence[int], key_space: Sequence[int]) -> dict[str, int]:
    """Arguments for queries, keys, queries before the first one, window, stride and dilation per
    axis."""
    kernel_size, stride = ((), ()) if isinstance(rule, Dense) else (rule.kernel_size, rule.stride)
    return (
        per_axis("L", space)
        | per_axis("KEY_L", key_space)
        | per_axis("P", rule.offset, 0)
        | per_axis("K", kernel_size)
        | per_axis("S", stride)
        | per_axis("D", rule.dilation)
    )


def tile_counts(
    rule: Rule, space: Sequence[int], tile: Sequence[int], of_keys: bool = False
) -> list[int]:
    """How many tiles the longest dilation group has, per axis, of queries or ``of_keys``."""
    fine = (1,) * len(space) if of_keys else rule.queries_per_key
    axes = zip(padded(space, 1), padded(rule.dilation, 1), padded(fine, 1), tile)
    return [-(-queries_before(length, 0, d, r) // size) for length, d, r, size in axes]


def _splits(work: int, least: int, most: int) -> tuple[int, int]:
    """How many programs share ``work`` items, at least ``least`` each, and how many each takes."""
    splits = max(1, min(most, work // least))
    return splits, -(-work // splits)


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
        num_additional: int | None,
        packed: _Sizes | None,
        tiles: tuple[int, ...],
        tf32: bool,
    ) -> None:
        query, key, value = shapes
        self.rule, self.scale, self.device = rule, scale, device
        self.itemsize, self.packed = dtype.itemsize, packed is not None
        own = query[0], tuple(query[1:-2]), tuple(key[1:-2])
        self.batch, self.space, self.key_space = packed or own
        self.heads, self.kv_heads = query[-2], key[-2]
        self.per_kv = self.heads // self.kv_heads
        self.dim, self.value_dim = query[-1], value[-1]
        self.modes = modes(rule, self.key_space if packed is None else [2] * len(self.space))
        self.query_strides, *others = map(strides_of, "qkv", strides)
        self.strides = self.query_strides | others[0] | others[1]
        self.sizes = sizes(rule, self.space, self.key_space)
        self.numbers = {"per_kv": self.per_kv, "scale": scale}
        # Tile shapes asked for, of queries and keys: of the forward pass, then of the backward.
        rank = len(self.space)
        asked = [tiles[i : i + rank] for i in range(0, 4 * rank, rank)]
        self.asked = {"forward": asked[:2], "dq": asked[2:], "dkdv": asked[2:]}
        self.bias, self.num_additional = bias_dtype is not None, num_additional
        self.constants = {
            "PER_KEY": per_key(rule),
            "ALIGN": math.gcd(16, *self.strides.values()),
            "D": self.dim,
            "DV": self.value_dim,
            "BLOCK_D": tiling.padded_channels(self.dim),
            "BLOCK_DV": tiling.padded_channels(self.value_dim),
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
        of_keys = kind == "dkdv"
        heads = self.kv_heads if of_keys else self.heads
        tile, space = (tiles.kv_block, self.key_space) if of_keys else (tiles.q_block, self.space)
        counts = tile_counts(self.rule, space, tile, of_keys)
        programs = math.prod(counts) * math.prod(self.rule.dilation) * self.batch * heads
        arguments = {
            **self.strides, **self.sizes,
            **per_axis("T", counts), **self.numbers, **arguments, **self.constants,
            "MODES": self.modes, "Q_BLOCK": tiles.q_block, "KV_BLOCK": tiles.kv_block,
            "HAS_RPB": self.bias, "PACKED": self.packed,
        }  # fmt: skip
        return Launch(
            kernel, (programs,), arguments, num_warps=tiles.num_warps, num_stages=tiles.num_stages
        )

    @cached_property
    def forward(self) -> Launch | Trials:
        return self._of_queries(forward_kernel, "forward")

    @cached_property
    def dq(self) -> Launch | Trials:
        """dQ and ``lse_delta``."""
        return self._of_queries(dq_kernel, "dq", HAS_GRAD_LSE=False)

    @cached_property
    def dq_with_grad_lse(self) -> Launch | Trials:
        """As :attr:`dq`, where the LSE has a gradient, too."""
        return self._of_queries(dq_kernel, "dq", HAS_GRAD_LSE=True)

    def _of_queries(self, kernel: Any, kind: str, **arguments: Any) -> Launch | Trials:
        return self._tiled(
            kernel, kind, heads=self.heads, num_additional=self.num_additional or 0,
            HAS_ADDITIONAL=bool(self.num_additional), **arguments,
        )  # fmt: skip

    @cached_property
    def dkdv(self) -> Launch | Trials:
        # Without the loop over heads, ptxas spills what it then keeps beside two sums of 128
        # channels; narrower ones are up to a quarter faster (benchmarks/results/h200.md).
        single = self.per_kv == 1 and max(self.dim, self.value_dim) <= 64
        return self._tiled(dkdv_kernel, "dkdv", kv_heads=self.kv_heads, SINGLE=single)

    @cached_property
    def additional(self) -> tuple[int, Launch]:
        """The additional tokens' gradients in splits: how many, and the kernel."""
        assert self.num_additional is not None
        splits, per_split = _splits(math.prod(self.space), 512, 64)
        constants = {name: x for name, x in self.constants.items() if name != "PER_KEY"}
        arguments = {
            **self.query_strides, **per_axis("L", self.space), "kv_heads": self.kv_heads,
            **self.numbers, "num_additional": self.num_additional, "per_split": per_split,
            **constants, "M": 32, "N": 16,
        }  # fmt: skip
        grid = (self.batch * self.kv_heads, -(-self.num_additional // 16), splits)
        return splits, Launch(additional_kernel, grid, arguments)

    @cached_property
    def rpb(self) -> tuple[tuple[int, ...], list[tuple[Launch, Launch]]]:
        """The bias's gradient: the shape of the sums between its two kernels, and these, for as
        many heads at once as their sums have room for."""
        assert not isinstance(self.rule, Dense)
        kernel_size = padded(self.rule.kernel_size, 1)
        # As of dQ without a bias, also where those were tuned: a program loads its biases once.
        tiles = tiling.choose(*self._problem("dq", False), *self.asked["dq"])
        counts = tile_counts(self.rule, self.space, tiles.q_block)
        # A window begins half of it before its query, at the ends of an axis up to all of it.
        apart, blocks = [], []
        for k, rows, columns in zip(kernel_size, tiles.q_block, tiles.kv_block):
            apart.append(-(k // 2) - math.ceil((k - 1 - k // 2) / columns) * columns)
            blocks.append(math.ceil((rows + k - 1 - apart[-1]) / columns))
        num_blocks = math.prod(blocks)
        num_tiles = math.prod(counts) * math.prod(self.rule.dilation) * self.batch
        pairs = math.prod(tiles.q_block), math.prod(tiles.kv_block)
        heads = max(1, min(self.heads, _MOST_SUMS // (num_blocks * math.prod(pairs))))
        splits, _ = _splits(num_tiles, 4, 2048 // (num_blocks * heads))
        offsets = math.prod(2 * k - 1 for k in kernel_size)
        of_blocks = {
            **per_axis("O", apart), "B1": blocks[1], "B2": blocks[2],
            "Q_BLOCK": tiles.q_block, "KV_BLOCK": tiles.kv_block,
        }  # fmt: skip
        arguments = {
            **self.strides, **self.sizes, "heads": self.heads, **self.numbers,
            "batches": self.batch, **of_blocks, **self.constants, "MODES": self.modes,
        }  # fmt: skip
        sums = {
            **per_axis("K", kernel_size), **of_blocks, "blocks": num_blocks, "splits": splits,
            "offsets": offsets, "BLOCK": 32,
        }  # fmt: skip
        stages = tiling.stages_of_both(tiles, self.dim, self.value_dim, self.itemsize)
        options: dict[str, Any] = {"num_warps": tiles.num_warps, "num_stages": stages}
        launches = []
        for first in range(0, self.heads, heads):
            count, these = min(heads, self.heads - first), {"first_head": first}
            grid = num_blocks, splits, count
            each = Launch(rpb_grad_kernel, grid, arguments | these, **options)
            add_up = Launch(rpb_grad_sum_kernel, (-(-offsets // 32), count), sums | these)
            launches.append((each, add_up))
        return (splits, heads, num_blocks, *pairs), launches


# Calls of one shape come again: a model has few.
_cached_plan = tuning.cached(Plan)


def plan_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    rule: Rule,
    scale: float,
    documents: Documents | None = None,
    tiles: tuple[int, ...] = (),
) -> Plan:
    """The plan of a call; tensors have channels one after another."""
    return _cached_plan(
        rule,
        scale,
        query.device,
        query.dtype,
        (query.shape, key.shape, value.shape),
        (query.stride(), key.stride(), value.stride()),
        None if rpb is None else rpb.dtype,
        None if additional_keys is None else additional_keys.shape[1],
        None if documents is None else (documents.number, documents.space, documents.key_space),
        tiles,
        query.dtype == torch.float32 and allows_tf32(),
    )


def allows_tf32() -> bool:
    """Whether float32 products may be rounded to TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # 2.9's, which also knows what allow_tf32 was set to
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
