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

from natten.backends import Problem, no_gradients, tiled
from natten.backends.tiled import Block, Chunk, Plan, add_boxes, compute_dtype
from natten.caches import kept
from natten.neighborhood import Dense, Rule, group_length
from natten.tiling import Run, TileCost, axis_runs, cheapest, uniform, window_runs

COPIED = 1 << 21  # numbers copied before a call; 8 MB in float32
MASK = 1 << 22  # most pairs of a tile that needs a mask; 16 MB in float32


class Costs(NamedTuple):
    """What the kernel takes, in the units of what ``tiled`` is estimated to take."""

    product_dim: float  # per query-key pair and head dim
    mask: float  # per pair of a tile that needs a mask
    copy: float  # per copied element of a box
    key: float  # per key of a tile
    run: float  # Python, per run
    alone: float  # Python, where there is one tile, which nothing is copied for

    def of(self, axes: Sequence[TileCost], matrices: int, dim: int, threads: int) -> float:
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
        # Boxes that are consecutive tokens are not copied.
        consecutive = axes[0].tiles == axes[0].runs and all(each.tiles == 1 for each in axes[1:])
        return (
            matrices * products * self.product_dim * dim * idle
            + matrices * (products - math.prod(each.whole for each in axes)) * self.mask
            + matrices * keys * (self.key + (0 if consecutive else 2 * dim * self.copy))
            + (self.alone if all(each.tiles == 1 for each in axes) else runs * self.run)
        )


SURELY = 0.8  # of tiled's estimate: what is estimated is within 30 % of what was measured

# Fitted to times of 50 random problems and tilings on AMD Zen 3 (AVX2), float32, one thread,
# beside `tiled`, whose softmax takes more of its time there than its own constants say. Those of
# the backward are relative to its backward.
FORWARD = Costs(product_dim=0.027, mask=0.13, copy=0.21, key=2.2, run=60_000.0, alone=20_000.0)
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
        lambda axes: costs.of(axes, matrices, dim, threads if backward else 0),
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
def _kept_mask(block: Block) -> Tensor:
    return block.make_mask()


class _Tiles:
    """The tiles of one kind, as PyTorch's kernel takes them.

    Its tensors are ``[matrices, heads, tokens, channels]``, in memory ``[matrices, tokens, heads,
    channels]`` where it makes them.
    """

    def __init__(
        self, block: Block, inputs: Sequence[Tensor | None], scale: float, grad_lse: bool = False
    ) -> None:
        query, key, value, _, *extra = inputs
        assert query is not None and key is not None and value is not None
        self.block, self.rank, self.scale = block, len(block.runs), scale
        self.query, self.key, self.value, self.extra = query, key, value, extra
        self.kv_heads, self.per_kv = key.shape[-2], query.shape[-2] // key.shape[-2]
        self.cols = math.prod(block.key_sizes)
        self.width = max(query.shape[-1], value.shape[-1])
        if grad_lse and self.width == value.shape[-1]:
            self.width += 8  # one is needed; rows are read faster from multiples of 32 bytes
        more = 0 if extra[0] is None else extra[0].shape[1]
        self.alone = (
            block.query_sizes == query.shape[1:-2] and block.key_sizes == key.shape[1:-2]
        )  # all queries in one tile, and all keys in its box
        self.everything = (slice(None),) * (2 * self.rank + 2)
        self.causal = block.triangular and not more
        self.mask = None
        if not (self.causal or block.whole):
            mask = _kept_mask(block).to(query.dtype)
            self.mask = F.pad(mask, (0, more)) if more else mask

    def chunks(self) -> Iterable[Chunk]:
        """Slices of tiles of which no more numbers are copied than the inputs hold."""
        rows, batch = math.prod(self.block.query_sizes), self.query.shape[0]
        each = self.width * self.per_kv * (rows + 2 * self.cols)
        room = min(COPIED, self.query.numel() + 2 * self.key.numel()) // each
        tiles = math.prod(run.groups * run.repeats for run in self.block.runs)
        if self.alone or room >= tiles * batch * self.kv_heads:
            return [self.everything]
        return self.block.slices(batch, self.kv_heads, room)

    def inputs(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a chunk, all with as many heads and channels."""
        boxes = []
        for x, extra in zip((self.key, self.value), self.extra):
            box = self._tokens(x, chunk, None)
            if extra is not None:
                own = extra.transpose(1, 2)[chunk[-2:]]
                own = own.expand(len(box) // len(own), *own.shape).flatten(0, 1)
                box = torch.cat([box, own], dim=2)
            if self.per_kv > 1:
                box = box.repeat_interleave(self.per_kv, dim=1)
            boxes.append(self._fit(box))
        return self.load(self.query, chunk), boxes[0], boxes[1]

    def load(self, x: Tensor, chunk: Chunk) -> Tensor:
        """A chunk of ``x [batch, *space, heads, channels]``, which is of queries."""
        return self._fit(self._tokens(x, chunk, self.kv_heads))

    def load_numbers(self, x: Tensor, chunk: Chunk) -> Tensor:
        """As :meth:`load`, of one number per query and head."""
        return self._tokens(x[..., None], chunk, self.kv_heads)[..., 0]

    def store(self, target: Tensor, chunk: Chunk, x: Tensor) -> None:
        """Undo :meth:`load`."""
        part = self.block.queries(target, self.kv_heads)
        part = part if chunk is self.everything else part[chunk]
        part.copy_(x[..., : target.shape[-1]].reshape(part.shape))

    def _tokens(self, x: Tensor, chunk: Chunk, kv_heads: int | None) -> Tensor:
        """Tiles of queries, or boxes of keys if ``kv_heads`` is None."""
        if self.alone:
            return x.flatten(1, -3).transpose(1, 2)
        part = self.block.keys(x) if kv_heads is None else self.block.queries(x, kv_heads)
        part = part if chunk is self.everything else part[chunk]
        matrices, tokens = part.shape[: 2 * self.rank + 1], part.shape[-1 - self.rank : -1]
        return part.reshape(math.prod(matrices), -1, math.prod(tokens), x.shape[-1])

    def _fit(self, x: Tensor) -> Tensor:
        if x.shape[-1] < self.width:
            return F.pad(x, (0, self.width - x.shape[-1]))
        # What the kernel takes for granted; tokens that are shown many times have a stride of 0.
        return x if x.stride(-1) == 1 and x.stride(-2) >= self.width else x.contiguous()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output and LSE."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, self.causal, attn_mask=self.mask, scale=self.scale
        )
        return out, lse

    def backward(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values from those of the output, inputs and outputs."""
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, 0.0, self.causal, attn_mask=self.mask, scale=self.scale
        )
        if self.per_kv > 1:
            dk, dv = (x.unflatten(1, (-1, self.per_kv)).sum(2) for x in (dk, dv))
        return dq, dk, dv


def _exact(x: Any) -> Any:
    """A tensor in the dtype that is computed in."""
    if x is None or x.dtype == compute_dtype(x.dtype):
        return x
    # PyTorch copies float16 views that negate to float32 without the sign.
    return x.resolve_neg().to(compute_dtype(x.dtype))


def _tiles(
    rule: Rule,
    scale: float,
    inputs: Sequence[Tensor | None],
    half: bool,
    backward: bool = False,
    grad_lse: bool = False,
) -> list[_Tiles]:
    query, key, value, _, extra, _ = inputs
    assert query is not None and key is not None and value is not None
    plan: Plan = _plan(
        rule, tuple(query.shape[1:-2]), tuple(key.shape[1:-2]), query.shape[0] * query.shape[-2],
        max(query.shape[-1], value.shape[-1]), extra is not None, backward, half,
        torch.get_num_threads(),
    )  # fmt: skip
    return [_Tiles(block, inputs, scale, grad_lse) for block in plan.blocks]


def _heads_last(x: Tensor, channels: int, like: Tensor) -> Tensor:
    """What the kernel made of all tokens at once, in the layout and dtype of ``like``."""
    x = x.transpose(1, 2)
    x = x if x.shape[-1] == channels else x[..., :channels]
    return _owned(x.reshape(*like.shape[:-1], channels)).to(like.dtype)


def _owned(x: Tensor) -> Tensor:
    """A view of what nobody else has, as no view: a Function that has forward mode returns none."""
    return x.new_empty(0).set_(x.contiguous())  # type: ignore[call-overload]


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
    inputs = [_exact(x) for x in (query, key, value, rpb, extra_keys, extra_values)]
    every = _tiles(rule, scale, inputs, query.dtype != dtype)
    if every[0].alone:
        out, lse = every[0].forward(*every[0].inputs(every[0].everything))
        return _heads_last(out, value_dim, query), _owned(lse.transpose(1, 2).reshape(shape))
    out, lse = query.new_empty(*shape, value_dim), query.new_empty(shape, dtype=dtype)
    for tiles in every:
        for chunk in tiles.chunks():
            own_out, own_lse = tiles.forward(*tiles.inputs(chunk))
            tiles.store(out, chunk, own_out)
            tiles.store(lse[..., None], chunk, own_lse[..., None])
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
    inputs = [_exact(x) for x in (query, key, value, rpb, extra_keys, extra_values)]
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
        for chunk in tiles.chunks():
            q, k, v = tiles.inputs(chunk)
            grad = tiles.load(grad_out, chunk)
            if half:
                own_out, own_lse = tiles.forward(q, k, v)
            else:
                own_out, own_lse = tiles.load(out, chunk), tiles.load_numbers(lse, chunk)
            if grad_lse is not None:
                grad[..., value_dim] = tiles.load_numbers(grad_lse, chunk)
                own_out[..., value_dim] = -1.0
            dq, *boxes = tiles.backward(grad, q, k, v, own_out, own_lse)
            for i, extra in enumerate(grad_extra):
                if extra is not None:
                    target = extra[chunk[-2], :, chunk[-1]]
                    tail = boxes[i][:, :, tiles.cols :, : extra.shape[-1]].transpose(1, 2)
                    target.add_(tail.unflatten(0, (-1, len(target))).sum(0))
                    boxes[i] = boxes[i][:, :, : tiles.cols]
            if alone:
                grad_query = _heads_last(dq, query.shape[-1], query)
                grad_boxes = [_heads_last(x, y.shape[-1], y) for x, y in zip(boxes, (key, value))]
                break
            tiles.store(grad_query, chunk, dq)
            for x, total in zip(boxes, grad_boxes):
                own = x[..., : total.shape[-1]]
                add_boxes(tiles.block, tiles.block.keys(total), chunk, own)
    return (
        grad_query,
        *(x.to(query.dtype) for x in grad_boxes),
        None,
        *(None if x is None else x.to(query.dtype) for x in grad_extra),
    )
