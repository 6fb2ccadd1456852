"""Neighborhood attention by PyTorch's own attention on CPUs, for windows that hold many pairs.

As in :mod:`natten.backends.tiled`, queries are cut into tiles, and a tile attends the box of keys
that holds its windows. Here a tile is one matrix of a call of PyTorch's kernel, which keeps no
scores in memory. So tiles may be large: a window of the whole layout is one tile without a mask.
Where a window is nearly as large, many queries at each border share one; their tiles have no mask
either. Which tiles are cheapest, and whether ``tiled`` is cheaper still, is estimated
(:mod:`natten.tiling`) from constants that were measured.

What the kernel does not do itself:

* Its channels are as many for queries as for values: zeros are added to the fewer.
* It knows no gradient of the LSE. The kernel subtracts ``sum(grad_out * out)`` from the gradient of
  the weights. One more channel, with the LSE's gradient in ``grad_out``, -1 in ``out`` and 0 in the
  values, makes that ``sum(grad_out * out) - grad_lse``.
* Half precision is computed in float32, as in ``tiled``: the kernel's backward in bfloat16 takes 10
  to 30 times as long on CPUs without instructions for it, and rounds where float32 does not. The
  output is computed again before it is differentiated, because one that was rounded gives wrong
  gradients where values have a large common mean.

The kernel adds up in one order, so every result has the same bits on every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..caches import kept
from ..neighborhood import Dense, Rule, group_length
from ..tiling import Run, TileCost, axis_runs, cheapest, uniform, window_runs
from ..tuning import Bounded
from . import Problem, no_gradients, tiled
from .tiled import Block, Chunk, Plan, add_boxes, compute_dtype, geometry

COPIED = 1 << 21  # numbers copied before a call; 8 MB in float32
VIEWS = 16  # kept for the tiles of one kind; about 1 KB each
MASK = 1 << 22  # most pairs of a tile that needs a mask; 16 MB in float32


class Costs(NamedTuple):
    """What the kernel takes, in the units of what ``tiled`` is estimated to take."""

    product_dim: float  # per query-key pair and head dim
    mask: float  # per pair of a tile that needs a mask
    copy: float  # per copied element, where tiles and boxes are no views
    key: float  # per key of a tile
    run: float  # Python, per call of the kernel: at least one per run
    alone: float  # Python, where there is one tile, which nothing is copied for

    def of(
        self, axes: Sequence[TileCost], queries: int, matrices: int, dim: int, threads: int
    ) -> float:
        """What tiles take, of which the axes are given.

        ``threads`` is how many share the matrices of a call; 0 if they share the queries, too.
        """
        products = math.prod(each.products for each in axes)
        keys, runs = (math.prod(x) for x in zip(*((each.keys, each.runs) for each in axes)))
        largest = math.prod(each.largest for each in axes)
        # A tile needs a mask if it does on one axis.
        masked = max(each.largest_masked * largest // max(each.largest, 1) for each in axes)
        if masked > MASK:
            return math.inf
        # The estimates are of two threads.
        tiles = math.prod(each.tiles for each in axes)
        idle = max(1.0, threads * runs / (2 * matrices * tiles))
        # Boxes that are consecutive tokens are not copied, if the tiles of a run are few.
        few = axes[0].tiles <= 2 * axes[0].runs
        consecutive = few and all(each.tiles == 1 for each in axes[1:])
        copied, calls = 0.0, float(runs)
        if not consecutive:
            copied = 2 * dim * self.copy * (queries + keys)
            calls += (queries + 2 * keys) / (3 * queries)  # see _Tiles._chunks
        # Queries of a tile, on average over pairs.
        rows = math.prod(each.rows for each in axes) / max(1, products)
        return (
            matrices * products * self.product_dim * dim * _of_rows(rows) * idle
            + matrices * (products - math.prod(each.full for each in axes)) * self.mask
            + matrices * (keys * self.key + copied)
            + (self.alone if all(each.tiles == 1 for each in axes) else calls * self.run)
        )


def _of_rows(rows: float) -> float:
    """What products take in tiles of so many queries, beside those of 192 to 767.

    PyTorch's kernel works on 256 queries at a time from 768 on, on 64 from 192 on, else on 32.
    """
    return 0.9 if rows >= 768 else 1.0 if rows >= 192 else 1.25


SURELY = 0.8  # of tiled's estimate: what is estimated is within 30 % of what was measured

# Fitted to times of 50 random problems and tilings on AMD Zen 3 (AVX2), float32, one thread,
# beside `tiled`, whose softmax takes more of its time there than its own constants say. Those of
# the backward are relative to its backward. The forward's mask and what rows cost
# (:func:`_of_rows`) were measured on two threads, beside dense attention.
FORWARD = Costs(product_dim=0.027, mask=0.2, copy=0.21, key=2.2, run=60_000.0, alone=20_000.0)
BACKWARD = Costs(product_dim=0.028, mask=0.15, copy=0.38, key=2.2, run=60_000.0, alone=20_000.0)
RECOMPUTED = Costs(*(b + f / 2 for b, f in zip(BACKWARD, FORWARD)))  # and the forward once more


def _is_causal(rule: Rule) -> bool:
    return rule.causal if isinstance(rule, Dense) else any(rule.is_causal)


def unsupported(problem: Problem) -> str | None:
    """Why it can not run a problem, or None."""
    if problem.rule is not None and _is_causal(problem.rule) and problem.scale <= 0:
        return "needs a positive scale where windows are causal"
    return None


def slower(problem: Problem) -> str | None:
    """Why another backend runs a problem unless this one is asked for, or None."""
    rule, shape = problem.rule, tuple(problem.shape[1:-2])
    if rule is None or not shape:
        return "is for windows that hold many pairs; which they are was not said"
    if 0 in problem.shape:
        return None
    key_shape = problem.key_shape or shape
    matrices, dim = problem.shape[0] * problem.shape[-2], max(problem.head_dim, problem.value_dim)
    ours: Plan = _plan(
        rule, shape, key_shape, matrices, dim, problem.extra, problem.operation == "gradient",
        compute_dtype(problem.dtype) != problem.dtype, torch.get_num_threads(),
    )  # fmt: skip
    theirs = tiled.estimate(
        rule, shape, key_shape, matrices, (problem.head_dim + problem.value_dim) // 2
    )
    return None if ours.cost < SURELY * theirs else "is estimated to be slower than tiled here"


@kept(Plan.bytes)
def _plan(
    rule: Rule,
    shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    matrices: int,
    dim: int,
    extra: bool,
    backward: bool,
    half: bool,
    threads: int,
) -> Plan:
    costs = (RECOMPUTED if half else BACKWARD) if backward else FORWARD
    found = cheapest(
        _options(rule, shape, key_shape),
        lambda axes: costs.of(axes, math.prod(shape), matrices, dim, threads if backward else 0),
        triangles=len(shape) == 1 and not extra,
    )
    return Plan.of(*found, rule)


def computed_pairs(
    rule: Rule, shape: tuple[int, ...], key_shape: tuple[int, ...], matrices: int, dim: int
) -> int:
    """Query-key pairs that the forward computes of one head."""
    plan: Plan = _plan(rule, shape, key_shape, matrices, dim, False, False, False, 0)
    return sum(
        math.prod(run.groups * run.repeats * run.query_size * run.key_size for run in block.runs)
        // (2 if block.triangular else 1)
        for block in plan.blocks
    )


def _options(
    rule: Rule, shape: tuple[int, ...], key_shape: tuple[int, ...]
) -> list[list[list[Run]]]:
    """For each axis, the ways to cut it that are worth a thought."""
    options = []
    for axis, sizes in enumerate(uniform(rule, shape, key_shape)):
        lengths = shape[axis], key_shape[axis]
        whole = axis_runs(rule, axis, *lengths, group_length(shape[axis], rule.dilation[axis], 0))
        ends = [] if _is_causal(rule) else [False, True]
        options.append(
            [*sizes, whole, *(window_runs(rule, axis, *lengths, between) for between in ends)]
        )
    return options


@kept(lambda mask: mask.nbytes)
def _mask(block: Block, dtype: torch.dtype, more: int) -> Tensor:
    """A block's mask, with ``more`` keys that all attend behind those of the box."""
    return F.pad(block.make_mask().to(dtype), (0, more))


class _Sizes(NamedTuple):
    """The sizes of a call's tensors."""

    batch: int
    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    extra: int | None  # additional keys

    @classmethod
    def of(
        cls, query: torch.Size, key: torch.Size, value: torch.Size, extra: torch.Size | None
    ) -> _Sizes:
        batch, *shape, heads, dim = query
        return cls(
            batch, tuple(shape), tuple(key[1:-2]), heads, key[-2], dim, value[-1],
            None if extra is None else extra[1],
        )  # fmt: skip


class _View(NamedTuple):
    """Where a chunk of tiles or boxes lies in a tensor of given strides."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    merged: tuple[int, ...] | None  # the shape for the kernel, if no view has it
    ready: bool  # the kernel takes the view as it is

    def of(self, x: Tensor) -> Tensor:
        return x.as_strided(self.shape, self.stride, x.storage_offset() + self.offset)


def _as_one(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Size and stride of dimensions seen as one, or None where they have no single stride."""
    size, stride = sizes[-1], strides[-1]
    for n, step in zip(sizes[-2::-1], strides[-2::-1]):
        if size == 1:
            stride = step
        elif n > 1 and step != size * stride:
            return None
        size *= n
    return size, stride


class _Tiles:
    """The tiles of one kind, as PyTorch's kernel takes them: what is the same in every call.

    Its tensors are ``[matrices, heads, tokens, channels]``, in memory ``[matrices, tokens, heads,
    channels]`` where it makes them. They are views of the call's tensors where such views exist:
    where consecutive tokens of a tile, and of a box, are equally far apart.
    """

    def __init__(
        self, block: Block, sizes: _Sizes, dtype: torch.dtype, scale: float, grad_lse: bool
    ) -> None:
        self.block, self.rank, self.dtype, self.scale = block, len(block.runs), dtype, scale
        self.kv_heads, self.per_kv = sizes.kv_heads, sizes.heads // sizes.kv_heads
        self.cols = math.prod(block.key_sizes)
        self.width = max(sizes.dim, sizes.value_dim)
        if grad_lse and self.width == sizes.value_dim:
            self.width += 8  # one is needed; rows are read faster from multiples of 32 bytes
        self.more = sizes.extra or 0
        self.alone = (
            block.query_sizes == sizes.shape and block.key_sizes == sizes.key_shape
        )  # all queries in one tile, and all keys in its box
        self.causal = block.triangular and not self.more
        self.masked = not (self.causal or block.full)
        # One head's batch may be the kernel's heads, so that tiles may be its matrices; what one
        # tile gives is handed out as the kernel writes it, a batch entry after another.
        self.matrices = 2 * self.rank + (self.alone or sizes.heads > 1 or sizes.extra is not None)
        self._views = Bounded(VIEWS)
        self.chunks: list[Chunk | None] = [None]
        if not (self.alone or self._all_views(sizes)):
            self.chunks = list(self._chunks(sizes))
            self._views.clear()

    def bytes(self) -> int:
        """About what it takes in memory."""
        return 1024 * (1 + VIEWS) + 512 * len(self.chunks)

    def _chunks(self, sizes: _Sizes) -> Iterable[Chunk | None]:
        """Slices of tiles of which no more numbers are copied than the inputs hold."""
        rows, heads = math.prod(self.block.query_sizes), sizes.batch * self.kv_heads
        each = self.width * self.per_kv * (rows + 2 * self.cols)
        queries = math.prod(sizes.shape) * sizes.heads * sizes.dim
        keys = math.prod(sizes.key_shape) * self.kv_heads * sizes.dim
        room = min(COPIED, sizes.batch * (queries + 2 * keys)) // each
        tiles = math.prod(run.groups * run.repeats for run in self.block.runs)
        if tiles == 2:
            room = min(room, heads)  # one at a time they may be views
        if room >= tiles * heads:
            return [None]
        return self.block.slices(sizes.batch, self.kv_heads, room)

    def _all_views(self, sizes: _Sizes) -> bool:
        """Whether the kernel takes views of all tiles and boxes, if the inputs are contiguous."""
        if self.more or self.per_kv > 1:
            return False
        batch = sizes.batch
        query = torch.empty(batch, *sizes.shape, sizes.heads, self.width, device="meta")
        key = torch.empty(batch, *sizes.key_shape, sizes.kv_heads, self.width, device="meta")
        views = self._view(query, 0, self.kv_heads), self._view(key, 0, None)
        return all(view.merged is None for view in views)

    @property
    def mask(self) -> Tensor | None:
        """Added to the scores; masks have a bound of their own, so it may be made anew."""
        return _mask(self.block, self.dtype, self.more) if self.masked else None

    def inputs(self, tensors: Sequence[Tensor | None], index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a chunk, all with as many heads and channels."""
        query, key, value, _, extra_keys, extra_values = tensors
        assert query is not None and key is not None and value is not None
        return (
            self.load(query, index),
            self._keys(key, extra_keys, index),
            self._keys(value, extra_values, index),
        )

    def _keys(self, x: Tensor, extra: Tensor | None, index: int) -> Tensor:
        view = self._view(x, index, None)
        box = view.of(x)
        if view.ready:
            return box
        box = box if view.merged is None else box.reshape(view.merged)
        if extra is not None:
            own = extra.transpose(1, 2)
            own = own if (chunk := self.chunks[index]) is None else own[chunk[-2:]]
            own = own.expand(len(box) // len(own), *own.shape).flatten(0, 1)
            box = torch.cat([box, own], dim=2)
        if self.per_kv > 1:
            box = box.repeat_interleave(self.per_kv, dim=1)
        return self._fit(box)

    def load(self, x: Tensor, index: int) -> Tensor:
        """A chunk of ``x [batch, *space, heads, channels]``, which is of queries.

        A number per query and head has no channels, here and there.
        """
        view = self._view(x, index, self.kv_heads)
        part = view.of(x)
        if view.ready:
            return part
        part = part if view.merged is None else part.reshape(view.merged)
        return self._fit(part) if part.ndim == 4 else part

    def store(self, target: Tensor, index: int, x: Tensor) -> None:
        """Undo :meth:`load`."""
        view = self._view(target, index, self.kv_heads)
        part = view.of(target)
        if x.ndim == 4 and x.shape[-1] > target.shape[-1]:
            x = x[..., : target.shape[-1]]
        part.copy_(x if view.merged is None else x.reshape(view.shape))

    def add(self, target: Tensor, index: int, boxes: Tensor) -> None:
        """Add boxes ``[matrices, heads, tokens, channels or more]`` to what they were cut from."""
        if boxes.shape[-1] > target.shape[-1]:
            boxes = boxes[..., : target.shape[-1]]
        if len(self.chunks) == 1 and all(run.repeats == 1 for run in self.block.runs):
            view = self._view(target, index, None)
            view.of(target).add_(boxes if view.merged is None else boxes.reshape(view.shape))
        else:
            chunk = self.chunks[index]
            everything = (slice(None),) * (2 * self.rank + 2)
            add_boxes(self.block, self.block.keys(target), chunk or everything, boxes)

    def _view(self, x: Tensor, index: int, kv_heads: int | None) -> _View:
        """Where tiles of queries lie, or boxes of keys if ``kv_heads`` is None."""
        key = index, kv_heads, x.shape, x.stride()
        view: _View | None = self._views.get(key)
        if view is None:
            view = self._find_view(*key)
            self._views.keep(key, view)
        return view

    def _find_view(
        self, index: int, kv_heads: int | None, shape: Sequence[int], stride: Sequence[int]
    ) -> _View:
        numbers = len(shape) == self.rank + 2
        if numbers:
            shape, stride = (*shape, 1), (*stride, 1)
        sizes, steps, offset = geometry(self.block, kv_heads, shape, stride)
        chunk = self.chunks[index]
        if chunk is not None:
            offset += sum(part.start * step for part, step in zip(chunk, steps))
            lead = tuple(part.stop - part.start for part in chunk)
            sizes = (*lead, *sizes[len(lead) :])
        heads, tokens = self.matrices, len(sizes) - 1 - self.rank
        cuts = [slice(0, heads), slice(heads, tokens), slice(tokens, -1), slice(-1, None)]
        cuts = cuts[:-1] if numbers else cuts
        parts = [_as_one(sizes[cut], steps[cut]) for cut in cuts]
        if None in parts:
            merged = tuple(math.prod(sizes[cut]) for cut in cuts)
            if numbers:
                sizes, steps = sizes[:-1], steps[:-1]
            return _View(sizes, steps, offset, merged, False)
        sizes, steps = zip(*(part for part in parts if part is not None))
        ready = numbers or (
            self._fits(sizes, steps)
            and (kv_heads is not None or (not self.more and self.per_kv == 1))
        )
        return _View(sizes, steps, offset, None, ready)

    def _fits(self, shape: Sequence[int], stride: Sequence[int]) -> bool:
        # What the kernel takes for granted; tokens that are shown many times have a stride of 0.
        return shape[-1] == self.width and stride[-1] == 1 and stride[-2] >= self.width

    def _fit(self, x: Tensor) -> Tensor:
        if x.shape[-1] < self.width:
            return F.pad(x, (0, self.width - x.shape[-1]))
        return x if self._fits(x.shape, x.stride()) else x.contiguous()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output and LSE."""
        out, lse = _forward(q, k, v, 0.0, self.causal, attn_mask=self.mask, scale=self.scale)
        return out, lse

    def backward(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values from those of the output, inputs and outputs."""
        dq, dk, dv = _backward(*tensors, 0.0, self.causal, attn_mask=self.mask, scale=self.scale)
        if self.per_kv > 1:
            dk, dv = (x.unflatten(1, (-1, self.per_kv)).sum(2) for x in (dk, dv))
        return dq, dk, dv


# As overloads: looking one up takes as long as half a call.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _exact(x: Tensor) -> Tensor:
    """A tensor of half precision in the dtype that is computed in."""
    # PyTorch copies float16 views that negate to float32 without the sign.
    return x.resolve_neg().to(compute_dtype(x.dtype))


@kept(lambda every: sum(tiles.bytes() for tiles in every))
def _kept_tiles(
    rule: Rule, scale: float, dtype: torch.dtype, shapes: tuple[Any, ...], half: bool,
    backward: bool, grad_lse: bool, threads: int,
) -> list[_Tiles]:  # fmt: skip
    sizes = _Sizes.of(*shapes)
    plan: Plan = _plan(
        rule, sizes.shape, sizes.key_shape, sizes.batch * sizes.heads,
        max(sizes.dim, sizes.value_dim), sizes.extra is not None, backward, half, threads,
    )  # fmt: skip
    return [_Tiles(block, sizes, dtype, scale, grad_lse) for block in plan.blocks]


def _tiles(
    rule: Rule, scale: float, inputs: Sequence[Any], half: bool, backward: bool = False,
    grad_lse: bool = False,
) -> list[_Tiles]:  # fmt: skip
    query, key, value, _, extra, _ = inputs
    shapes = query.shape, key.shape, value.shape, None if extra is None else extra.shape
    every: list[_Tiles] = _kept_tiles(
        rule, scale, query.dtype, shapes, half, backward, grad_lse, torch.get_num_threads()
    )
    return every


def _heads_last(x: Tensor, like: Tensor, channels: int) -> Tensor:
    """What the kernel made of all tokens at once, in the layout and dtype of ``like``.

    Nobody else has ``x``, which changes in place: views are nothing that a Function with forward
    mode may return.
    """
    x = _tokens_first(x if x.shape[-1] == channels else x[..., :channels], like.shape[:-1])
    return x if x.dtype == like.dtype else x.to(like.dtype)


def _tokens_first(x: Tensor, shape: torch.Size) -> Tensor:
    """``[batch, heads, tokens, ...]`` as ``[*shape, ...]``, where it lies: so the kernel writes."""
    rest = x.shape[3:]
    return x.transpose_(1, 2).contiguous().resize_(*shape, *rest)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
    rule: Rule,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value dim]`` and LSE ``[batch, *space, heads]``."""
    shape, value_dim, dtype = query.shape[:-1], value.shape[-1], compute_dtype(query.dtype)
    if query.numel() == 0 or key.numel() == 0:
        return query.new_zeros(*shape, value_dim), query.new_full(shape, -math.inf, dtype=dtype)
    half = query.dtype != dtype
    inputs = [query, key, value, rpb, extra_keys, extra_values]
    if half:
        inputs = [None if x is None else _exact(x) for x in inputs]
    every = _tiles(rule, scale, inputs, half)
    if every[0].alone:
        out, lse = every[0].forward(*every[0].inputs(inputs, 0))
        return _heads_last(out, query, value_dim), _tokens_first(lse, shape)
    out, lse = query.new_empty(*shape, value_dim), query.new_empty(shape, dtype=dtype)
    for tiles in every:
        for index in range(len(tiles.chunks)):
            own_out, own_lse = tiles.forward(*tiles.inputs(inputs, index))
            tiles.store(out, index, own_out)
            tiles.store(lse, index, own_lse)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, rpb, additional keys and additional values."""
    if query.numel() == 0 or key.numel() == 0:
        return no_gradients(query, key, value, rpb, extra_keys, extra_values)
    dtype, value_dim = compute_dtype(query.dtype), value.shape[-1]
    half = query.dtype != dtype
    inputs = [query, key, value, rpb, extra_keys, extra_values]
    if half:
        inputs = [None if x is None else _exact(x) for x in inputs]
        grad_out = _exact(grad_out)
    every = _tiles(rule, scale, inputs, half, True, grad_lse is not None)
    alone = every[0].alone
    grad_query, grad_boxes = query, []
    if not alone:
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_boxes = [x.new_zeros(x.shape, dtype=dtype) for x in (key, value)]
    grad_extra = [
        None if x is None else x.new_zeros(x.shape, dtype=dtype) for x in (extra_keys, extra_values)
    ]
    for tiles in every:
        for index, chunk in enumerate(tiles.chunks):
            q, k, v = tiles.inputs(inputs, index)
            grad = tiles.load(grad_out, index)
            if half:
                own_out, own_lse = tiles.forward(q, k, v)
            else:
                own_out, own_lse = tiles.load(out, index), tiles.load(lse, index)
            if grad_lse is not None:
                grad[..., value_dim] = tiles.load(grad_lse, index)
                own_out[..., value_dim] = -1.0
            dq, *boxes = tiles.backward(grad, q, k, v, own_out, own_lse)
            for i, extra in enumerate(grad_extra):
                if extra is not None:
                    target = extra if chunk is None else extra[chunk[-2], :, chunk[-1]]
                    tail = boxes[i][:, :, tiles.cols :, : extra.shape[-1]].transpose(1, 2)
                    target.add_(tail.unflatten(0, (-1, len(target))).sum(0))
                    boxes[i] = boxes[i][:, :, : tiles.cols]
            if alone:
                grad_query = _heads_last(dq, query, query.shape[-1])
                grad_boxes = [_heads_last(x, y, y.shape[-1]) for x, y in zip(boxes, (key, value))]
                break
            tiles.store(grad_query, index, dq)
            for x, total in zip(boxes, grad_boxes):
                tiles.add(total, index, x)
    return (
        grad_query,
        *(x.to(query.dtype) for x in grad_boxes),
        None,
        *(None if x is None else x.to(query.dtype) for x in grad_extra),
    )
