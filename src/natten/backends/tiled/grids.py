"""Grids of equal tiles: their views of tensors, their masks, and the buffers that they use."""

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

CHUNK = 1 << 18  # query-key pairs computed at a time; 1 MB in float32
GEOMETRIES = 16  # how many are kept for a grid; about 1 KB each
CACHED_MASK = 1 << 18  # masks with more pairs are made anew in every call


class Scratch:
    """Named buffers that all chunks share, because first touching new memory takes long."""

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
class TileGrid:
    """Equal tiles at regular distances: one run of each axis.

    Its views have first the dimensions ``[tiles per axis, groups per axis, batch, kv heads]``, the
    lead. Then come ``[heads per kv head, queries per axis, channels]`` for queries, and
    ``[keys per axis, channels]`` for keys.
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
        """Whether every query of a tile attends every key of its block."""
        return all(run.full for run in self.runs)

    @cached_property
    def triangular(self) -> bool:
        """Whether the mask is a lower triangle, for which some kernels have a causal mode."""
        return len(self.runs) == 1 and not self.full and self.runs[0].triangular

    def queries(self, x: Tensor, kv_heads: int) -> Tensor:
        """The queries of all tiles, a view of ``x [batch, *space, heads, channels]``."""
        return self._view(x, kv_heads)

    def keys(self, x: Tensor) -> Tensor:
        """The overlapping blocks of keys, a view of ``x [batch, *space, kv heads, channels]``."""
        return self._view(x, None)

    @cached_property
    def _geometries(self) -> Bounded:
        # In small problems overhead dominates, so geometries of views are kept between calls.
        return Bounded(GEOMETRIES)

    def _view(self, x: Tensor, kv_heads: int | None) -> Tensor:
        key = kv_heads, x.shape, x.stride()
        shape, stride, offset = self._geometries.find(key, geometry, self, *key)
        return x.as_strided(shape, stride, x.storage_offset() + offset)

    def chunks(self, query: Tensor, key: Tensor, num_additional: int = 0) -> Iterator[Chunk]:
        """Slices of the lead dimensions that hold about ``CHUNK`` query-key pairs each.

        They hold no more pairs than the inputs hold numbers, so that scores do not take more memory
        than the inputs.
        """
        per_kv = query.shape[-2] // key.shape[-2]
        pairs = per_kv * math.prod(self.query_sizes) * (math.prod(self.key_sizes) + num_additional)
        most = min(CHUNK, query.numel() + 2 * key.numel())
        return self.slices(query.shape[0], key.shape[-2], most // max(1, pairs))

    def slices(self, batch: int, kv_heads: int, most: int) -> Iterator[Chunk]:
        """Slices of the lead dimensions that hold at most ``most`` entries, but at least one."""
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

    @cached_property
    def looks(self) -> Looks:
        """What decides the mask; tiles of many layouts look alike."""
        return Looks((*run.spans, run.key_size) for run in self.runs)

    def mask(self) -> Tensor | None:
        """The mask that is added to scores, float32 ``[queries, keys]``; None for full blocks."""
        if self.full:
            return None
        if math.prod(self.query_sizes) * math.prod(self.key_sizes) <= CACHED_MASK:
            return _kept_mask(self.looks)
        return make_mask(self.looks)


# Of an axis, where each query's window starts and ends inside the block of keys, and its length.
Look = tuple[tuple[int, ...], tuple[int, ...], int]


class Looks(tuple[Look, ...]):
    """The looks of all axes. They are hashed once, because every call looks its masks up, and
    hashing the windows of many queries takes as long as a small call."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()


def make_mask(looks: Looks) -> Tensor:
    """The mask of a tile, 0 where a query attends a key and -inf elsewhere."""
    *others, last = looks
    if not others:
        return _axis_mask(last)
    # Tiles share the parts that differ along other axes.
    return outer(_kept_mask(Looks(others)), _kept_mask(Looks((last,))), torch.add)


def _axis_mask(look: Look) -> Tensor:
    starts, ends, key_size = look
    position = torch.arange(key_size, device="cpu")
    lower, upper = torch.tensor([starts, ends], device="cpu")[..., None]
    outside = (position < lower) | (position >= upper)
    return torch.zeros(outside.shape, device="cpu").masked_fill_(outside, -math.inf)


_kept_mask = kept(lambda mask: mask.nbytes)(make_mask)


def geometry(
    grid: TileGrid, kv_heads: int | None, shape: Sequence[int], stride: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, stride and offset of a grid's view of queries, or of keys if ``kv_heads`` is None.

    Args:
        grid: the tiles.
        kv_heads: heads of keys and values, which split the heads of queries.
        shape, stride: of the tensor that is viewed.
    """
    heads, between_heads = [shape[-2]], [stride[-2]]
    if kv_heads is not None:
        per_kv = shape[-2] // kv_heads
        heads, between_heads = [kv_heads, per_kv], [per_kv * stride[-2], stride[-2]]
    repeats, between_tiles, groups, sizes, apart, offset = [], [], [], [], [], 0
    for run, d, step in zip(grid.runs, grid.dilation, stride[1:]):
        if kv_heads is None:
            first, start, size, tiles_apart = (
                run.key_group,
                run.key_start,
                run.key_size,
                run.key_step,
            )
        else:
            first, start, size, tiles_apart = run.group, run.query_start, run.query_size, run.step
            d = run.apart
        repeats.append(run.repeats)
        groups.append(run.groups)
        sizes.append(size)
        between_tiles.append(tiles_apart * d * step)
        apart.append(d * step)
        offset += (start * d + first) * step
    between_groups = stride[1 : 1 + len(groups)]
    return (
        (*repeats, *groups, shape[0], *heads, *sizes, shape[-1]),
        (*between_tiles, *between_groups, stride[0], *between_heads, *apart, stride[-1]),
        offset,
    )


class Plan(NamedTuple):
    """Grids of tiles and their estimated cost, by :mod:`natten.tiling`."""

    cost: float
    grids: list[TileGrid]

    @classmethod
    def of(cls, cost: float, tiling: Tiling, rule: Rule) -> Plan:
        """A plan of all grids of a tiling."""
        grids = [TileGrid(runs, rule.dilation) for runs in itertools.product(*tiling)]
        return cls(cost, grids)

    def bytes(self) -> int:
        """About how many bytes the plan takes."""
        axes = {id(run): run for grid in self.grids for run in grid.runs}
        runs = sum(run.bytes() for run in axes.values())
        return runs + 1024 * (1 + GEOMETRIES) * len(self.grids)


@kept(Plan.bytes)
def _plan(
    rule: Rule, shape: tuple[int, ...], key_shape: tuple[int, ...], matrices: int, head_dim: int
) -> Plan:
    return Plan.of(*tiles(rule, shape, key_shape, matrices, head_dim), rule)


def estimate(
    rule: Rule, shape: Sequence[int], key_shape: Sequence[int], matrices: int, head_dim: int
) -> float:
    """The estimated cost of attention; only ratios of costs mean anything."""
    found: Plan = _plan(rule, tuple(shape), tuple(key_shape), matrices, head_dim)
    return found.cost


def grids_for(rule: Rule, query: Tensor, key: Tensor, head_dim: int) -> list[TileGrid]:
    """The grids of tiles that are estimated to be cheapest for these tensors."""
    matrices = query.shape[0] * query.shape[-2]
    return grids_of(rule, query.shape[1:-2], key.shape[1:-2], matrices, head_dim)


def grids_of(
    rule: Rule, shape: Sequence[int], key_shape: Sequence[int], matrices: int, head_dim: int
) -> list[TileGrid]:
    """As :func:`grids_for`, of layouts, and of batch entries times heads."""
    plan: Plan = _plan(rule, tuple(shape), tuple(key_shape), matrices, head_dim)
    return plan.grids


def load(buffer: Tensor, view: Tensor) -> Tensor:
    """Copy a chunk of a view into ``buffer [matrices, rows, channels]``."""
    # PyTorch loses the sign where it copies lazily negated float16 views to float32.
    buffer.view(view.shape).copy_(view.resolve_neg())
    return buffer


def add_kv_blocks(grid: TileGrid, target: Tensor, chunk: Chunk, kv_blocks: Tensor) -> None:
    """Add a chunk of overlapping blocks of keys to ``target``, in phases of disjoint blocks."""
    view = target[chunk]
    contiguous = kv_blocks.is_contiguous()
    kv_blocks = kv_blocks.view(view.shape) if contiguous else kv_blocks.reshape(view.shape)
    phases = [
        [slice(p, None, every) for p in range(min(every, count))]
        for every, count in zip((-(-run.key_size // run.key_step) for run in grid.runs), view.shape)
    ]
    for phase in itertools.product(*phases):
        view[phase].add_(kv_blocks[phase])
