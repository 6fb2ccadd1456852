"""Blocks of tiles of one kind: their views of tensors, their masks, and the buffers they use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...caches import kept
from ...neighborhood import Rule, outer
from ...tiling import Run, Tiling, tiles
from ...tuning import Bounded

CHUNK = 1 << 18  # query-key pairs worked on at a time; 1 MB in float32
GEOMETRIES = 16  # kept for a block; about 1 KB each
CACHED_MASK = 1 << 18  # larger masks are made anew in every call


class Scratch:
    """Named buffers that are used again, so that no chunk faults in fresh memory."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._like.new_empty(size, dtype=self._dtype)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


Chunk = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Block:
    """Tiles of one kind: one run per axis.

    Its views have the dimensions ``[tiles per axis, groups per axis, batch, kv heads]`` ("lead")
    and then, for queries, ``[heads per kv head, tile sizes, channels]``, for keys
    ``[box sizes, channels]``.
    """

    runs: tuple[Run, ...]
    dilation: tuple[int, ...]

    @cached_property
    def query_sizes(self) -> tuple[int, ...]:
        return tuple(run.query_size for run in self.runs)

    @cached_property
    def key_sizes(self) -> tuple[int, ...]:
        return tuple(run.key_size for run in self.runs)

    @cached_property
    def full(self) -> bool:
        """Whether every query of a tile attends every key of its box."""
        return all(run.full for run in self.runs)

    @cached_property
    def triangular(self) -> bool:
        """Whether the mask is a lower triangle, which some kernels know by themselves."""
        return len(self.runs) == 1 and not self.full and self.runs[0].triangular

    def queries(self, x: Tensor, kv_heads: int) -> Tensor:
        """View ``[lead, heads per kv head, tile sizes, C]`` of ``x [B, *space, heads, C]``."""
        return self._view(x, kv_heads)

    def keys(self, x: Tensor) -> Tensor:
        """View ``[lead, box sizes, channels]`` of ``x [B, *space, kv heads, C]``; boxes overlap."""
        return self._view(x, None)

    @cached_property
    def _geometries(self) -> Bounded:
        # Small problems are all overhead: what views need is kept between calls.
        return Bounded(GEOMETRIES)

    def _view(self, x: Tensor, kv_heads: int | None) -> Tensor:
        key = kv_heads, x.shape, x.stride()
        found = self._geometries.get(key)
        if found is None:
            found = geometry(self, *key)
            self._geometries.keep(key, found)
        shape, stride, offset = found
        return x.as_strided(shape, stride, x.storage_offset() + offset)

    def chunks(self, query: Tensor, key: Tensor, extra: int = 0) -> Iterator[Chunk]:
        """Slices of the lead dimensions that hold about ``CHUNK`` query-key pairs each.

        They hold no more pairs than the inputs hold numbers, so that scores take no more memory.
        """
        per_kv = query.shape[-2] // key.shape[-2]
        pairs = per_kv * math.prod(self.query_sizes) * (math.prod(self.key_sizes) + extra)
        most = min(CHUNK, query.numel() + 2 * key.numel())
        return self.slices(query.shape[0], key.shape[-2], most // max(1, pairs))

    def slices(self, batch: int, kv_heads: int, most: int) -> Iterator[Chunk]:
        """Slices of the lead dimensions that hold at most ``most`` tiles, or one, of a kv head."""
        lead = [run.repeats for run in self.runs] + [run.groups for run in self.runs]
        lead += [batch, kv_heads]
        room = max(1, most)
        steps = []
        for size in reversed(lead):
            step = max(1, min(size, room))
            room //= step
            steps.append(step)
        return itertools.product(
            *(
                [slice(i, min(i + step, size)) for i in range(0, size, step)]
                for size, step in zip(lead, reversed(steps))
            )
        )

    def mask(self) -> Tensor | None:
        """Added to scores, float32 ``[tile tokens, box tokens]``; None if the tile attends all."""
        if self.full:
            return None
        if math.prod(self.query_sizes) * math.prod(self.key_sizes) <= CACHED_MASK:
            return _kept_mask(self)
        return self.make_mask()

    def make_mask(self) -> Tensor:
        """The mask, made anew."""
        mask = torch.zeros(1, 1, device="cpu")
        for run in self.runs:
            position = torch.arange(run.key_size, device="cpu")
            outside = (position < run.lower[:, None]) | (position >= run.upper[:, None])
            own = torch.zeros(outside.shape, device="cpu").masked_fill_(outside, -math.inf)
            mask = outer(mask, own, torch.add)
        return mask

    def offsets(self, axis: int) -> int:
        """Key position minus query position of the box's and the tile's first positions."""
        return self.runs[axis].key_start - self.runs[axis].query_start


@kept(lambda mask: mask.nbytes)
def _kept_mask(block: Block) -> Tensor:
    return block.make_mask()


def geometry(
    block: Block, kv_heads: int | None, shape: Sequence[int], stride: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, stride and offset of a block's view of queries, or of keys if ``kv_heads`` is None."""
    heads = [(shape[-2], stride[-2])]
    if kv_heads is not None:
        per_kv = shape[-2] // kv_heads
        heads = [(kv_heads, per_kv * stride[-2]), (per_kv, stride[-2])]
    offset = 0
    count, group, inner = [], [], []
    for run, d, step in zip(block.runs, block.dilation, stride[1:]):
        start = run.key_start if kv_heads is None else run.query_start
        size = run.key_size if kv_heads is None else run.query_size
        apart = run.key_step if kv_heads is None else run.step
        count.append((run.repeats, apart * d * step))
        group.append((run.groups, step))
        inner.append((size, d * step))
        offset += (start * d + run.group) * step
    batch, channels = (shape[0], stride[0]), (shape[-1], stride[-1])
    view_shape, view_stride = zip(*count, *group, batch, *heads, *inner, channels)
    return view_shape, view_stride, offset


class Plan(NamedTuple):
    """Blocks of tiles, and what they are estimated to take; see :mod:`natten.tiling`."""

    cost: float
    blocks: list[Block]

    @classmethod
    def of(cls, cost: float, tiling: Tiling, rule: Rule) -> Plan:
        """A plan of every block of a tiling."""
        blocks = [Block(block, rule.dilation) for block in itertools.product(*tiling)]
        return cls(cost, blocks)

    def bytes(self) -> int:
        """About what it takes in memory."""
        axes = {id(run): run for block in self.blocks for run in block.runs}
        tensors = sum(run.lower.nbytes + run.upper.nbytes for run in axes.values())
        return tensors + 1024 * (len(axes) + (1 + GEOMETRIES) * len(self.blocks))


@kept(Plan.bytes)
def _plan(
    rule: Rule, shape: tuple[int, ...], key_shape: tuple[int, ...], matrices: int, head_dim: int
) -> Plan:
    return Plan.of(*tiles(rule, shape, key_shape, matrices, head_dim), rule)


def estimate(
    rule: Rule, shape: Sequence[int], key_shape: Sequence[int], matrices: int, head_dim: int
) -> float:
    """What attention is estimated to take; only ratios matter."""
    found: Plan = _plan(rule, tuple(shape), tuple(key_shape), matrices, head_dim)
    return found.cost


def blocks_for(rule: Rule, query: Tensor, key: Tensor, head_dim: int) -> list[Block]:
    matrices = query.shape[0] * query.shape[-2]
    plan: Plan = _plan(rule, tuple(query.shape[1:-2]), tuple(key.shape[1:-2]), matrices, head_dim)
    return plan.blocks


def load(buffer: Tensor, view: Tensor) -> Tensor:
    """Copy a chunk of tiles into ``buffer [matrices, rows, channels]``."""
    # PyTorch copies float16 views that negate to float32 without the sign.
    buffer.view(view.shape).copy_(view.resolve_neg())
    return buffer


def add_boxes(block: Block, target: Tensor, chunk: Chunk, boxes: Tensor) -> None:
    """Add a chunk of overlapping boxes to ``target``, one phase of disjoint boxes at a time."""
    view = target[chunk]
    boxes = boxes.view(view.shape) if boxes.is_contiguous() else boxes.reshape(view.shape)
    phases = [
        [slice(p, None, every) for p in range(min(every, count))]
        for every, count in zip(
            (-(-run.key_size // run.key_step) for run in block.runs), view.shape
        )
    ]
    for phase in itertools.product(*phases):
        view[phase].add_(boxes[phase])
