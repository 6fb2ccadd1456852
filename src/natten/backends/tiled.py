"""Neighborhood attention over tiles in plain PyTorch: the CPU default, and the fallback everywhere.

Queries are cut into tiles (:mod:`natten.tiling`); each tile is dense attention against the box of
keys that holds its windows, with a mask. Many tiles of one kind are a batch of matrix products;
they are worked through in chunks small enough to stay in cache, in buffers that are used again.
Nothing grows with the square of the number of tokens, and the backward recomputes the weights.

Sums over overlapping boxes are taken in phases of tiles whose boxes do not overlap, so every
result has the same bits on every run, on any device.

All functions take heads-last tensors, ``[batch, *space, heads, head_dim]``, of any strides. What
the unfused ones return is heads-first in memory, as their callers want it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..caches import kept
from ..neighborhood import Neighborhood, Rule, outer
from ..tiling import Run, Tiling, tiles
from ..tuning import Bounded
from . import no_gradients

CHUNK = 1 << 18  # query-key pairs worked on at a time; 1 MB in float32
GEOMETRIES = 16  # kept for a block; about 1 KB each
CACHED_MASK = 1 << 18  # larger masks are made anew in every call


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32: CPUs do so as fast, and sums stay exact."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


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


def _blocks(rule: Rule, query: Tensor, key: Tensor, head_dim: int) -> list[Block]:
    matrices = query.shape[0] * query.shape[-2]
    plan: Plan = _plan(rule, tuple(query.shape[1:-2]), tuple(key.shape[1:-2]), matrices, head_dim)
    return plan.blocks


# --- relative positional bias ---


def _bias_of(block: Block, rpb: Tensor, rule: Neighborhood) -> Tensor:
    """``[heads, tile tokens, box tokens]`` from ``rpb``; pairs to be masked hold any value."""
    heads = rpb.shape[0]
    picked = rpb
    for axis, run in enumerate(block.runs):
        query = torch.arange(run.query_size, device="cpu")[:, None]
        index = torch.arange(run.key_size, device="cpu") - query + block.offsets(axis)
        index = (index + rule.kernel_size[axis] - 1).clamp(0, rpb.shape[1 + axis] - 1)
        dim = 1 + 2 * axis
        picked = picked.index_select(dim, index.flatten().to(rpb.device))
        picked = picked.unflatten(dim, (run.query_size, run.key_size))
    rank = len(block.runs)
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2)]
    return picked.permute(order).reshape(
        heads, math.prod(block.query_sizes), math.prod(block.key_sizes)
    )


def _sum_diagonals(x: Tensor, dim: int) -> Tensor:
    """Sum ``x`` over dims (dim, dim + 1) = (query, key) along ``key - query``.

    The result's dim has ``queries + keys - 1`` entries; the first is ``key - query = 1 - queries``.
    """
    x = x.movedim((dim, dim + 1), (-2, -1))
    queries, keys = x.shape[-2:]
    # Rows that are one entry shorter than they were written move one column right per row.
    x = F.pad(x.flip(-2), (0, queries)).flatten(-2)[..., : queries * (queries + keys - 1)]
    return x.unflatten(-1, (queries, -1)).sum(-2).movedim(-1, dim)


def _add_bias_gradient(block: Block, grad: Tensor, grad_rpb: Tensor, rule: Neighborhood) -> None:
    """Add ``grad [heads, tile tokens, box tokens]`` to the entries of ``grad_rpb`` it came from."""
    rank = len(block.runs)
    x = grad.reshape(grad.shape[0], *block.query_sizes, *block.key_sizes)
    order = [0, *itertools.chain(*((1 + a, 1 + rank + a) for a in range(rank)))]
    x = x.permute(order)
    target = grad_rpb
    for axis, run in enumerate(block.runs):
        x = _sum_diagonals(x, 1 + axis)
        first = 1 - run.query_size + block.offsets(axis) + rule.kernel_size[axis] - 1
        low, high = max(0, first), min(target.shape[1 + axis], first + x.shape[1 + axis])
        x = x.narrow(1 + axis, low - first, high - low)
        target = target.narrow(1 + axis, low, high - low)
    target += x


# --- fused attention ---


class _Sizes(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    per_kv: int
    dim: int
    value_dim: int
    extra: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, extra_keys: Tensor | None) -> _Sizes:
        heads, kv_heads = query.shape[-2], key.shape[-2]
        extra = 0 if extra_keys is None else extra_keys.shape[1]
        return cls(
            query.shape[0], heads, kv_heads, heads // kv_heads,
            query.shape[-1], value.shape[-1], extra,
        )  # fmt: skip


def _score_bias(
    block: Block, rpb: Tensor | None, rule: Rule, sizes: _Sizes, like: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the scores, ``[kv heads or 1, rows, box tokens + extra]``: bias and mask."""
    mask = block.mask()
    if rpb is None and mask is None:
        return None
    if mask is not None:
        mask = mask.to(like.device, dtype)
    if rpb is None:
        assert mask is not None
        bias = mask.repeat(sizes.per_kv, 1)[None] if sizes.per_kv > 1 else mask[None]
    else:
        assert isinstance(rule, Neighborhood)
        bias = _bias_of(block, rpb.to(dtype), rule)
        bias = bias if mask is None else bias + mask
        bias = bias.reshape(sizes.kv_heads, -1, bias.shape[-1])
    return F.pad(bias, (0, sizes.extra)) if sizes.extra else bias


def _empty_rows(bias: Tensor | None, rpb: Tensor | None) -> Tensor | None:
    """Rows ``[kv heads, rows, 1]`` that a bias of -inf leaves nothing to attend.

    Their bias becomes 0, so that the softmax is finite there; what it gives is thrown away. A mask
    alone leaves no row empty: the answer is None.
    """
    if bias is None or rpb is None:
        return None
    empty = bias.amax(-1, keepdim=True) == -math.inf
    bias.masked_fill_(empty, 0.0)
    return empty


def _fill_rows(x: Tensor, rows: Tensor | None, kv_heads: slice, value: float) -> None:
    """Fill the given rows of a chunk's ``x [matrices, rows, channels]``."""
    if rows is not None:
        rows = rows[kv_heads]
        x.view(-1, *rows.shape[:-1], x.shape[-1]).masked_fill_(rows, value)


def _load(buffer: Tensor, view: Tensor) -> Tensor:
    """Copy a chunk of tiles into ``buffer [matrices, rows, channels]``."""
    # PyTorch copies float16 views that negate to float32 without the sign.
    buffer.view(view.shape).copy_(view.resolve_neg())
    return buffer


def _load_keys(buffer: Tensor, block: Block, view: Tensor, extra: Tensor | None) -> Tensor:
    """Copy a chunk of boxes, and the additional tokens behind each box, into ``buffer``."""
    if extra is None:
        return _load(buffer, view)
    lead = view.shape[: 2 * len(block.runs) + 2]
    box = math.prod(block.key_sizes)
    rows = buffer.view(*lead, buffer.shape[-2], buffer.shape[-1])
    rows[..., :box, :].unflatten(-2, block.key_sizes).copy_(view.resolve_neg())
    rows[..., box:, :].copy_(extra.resolve_neg())
    return buffer


def _scores(
    query: Tensor, keys: Tensor, bias: Tensor | None, kv_heads: slice, out: Tensor
) -> Tensor:
    """Softmaxed in place by the caller: ``query @ keys^T + bias``."""
    torch.bmm(query, keys.transpose(1, 2), out=out)
    if bias is not None:
        if bias.shape[0] > 1:
            bias = bias[kv_heads]
        out.view(-1, *bias.shape).add_(bias)
    return out


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
    dtype = compute_dtype(query.dtype)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=dtype)
    if query.numel() == 0:
        return out, lse
    sizes = _Sizes.of(query, key, value, extra_keys)
    scratch = Scratch(query, dtype)
    extra_k = None if extra_keys is None else extra_keys.transpose(1, 2)
    extra_v = None if extra_values is None else extra_values.transpose(1, 2)
    for block in _blocks(rule, query, key, (sizes.dim + sizes.value_dim) // 2):
        q_view, k_view, v_view = (
            block.queries(query, sizes.kv_heads),
            block.keys(key),
            block.keys(value),
        )
        out_view = block.queries(out, sizes.kv_heads)
        lse_view = block.queries(lse[..., None], sizes.kv_heads)
        rows = sizes.per_kv * math.prod(block.query_sizes)
        cols = math.prod(block.key_sizes) + sizes.extra
        if cols == 0:
            out_view.zero_()
            lse_view.fill_(-math.inf)
            continue
        bias = _score_bias(block, rpb, rule, sizes, query, dtype)
        empty = _empty_rows(bias, rpb)
        for chunk in block.chunks(query, key, sizes.extra):
            part = q_view[chunk]
            n = part.numel() // (rows * sizes.dim)
            q = _load(scratch("q", n, rows, sizes.dim), part).mul_(scale)
            k = _load_keys(
                scratch("k", n, cols, sizes.dim), block, k_view[chunk],
                None if extra_k is None else extra_k[chunk[-2:]],
            )  # fmt: skip
            v = _load_keys(
                scratch("v", n, cols, sizes.value_dim), block, v_view[chunk],
                None if extra_v is None else extra_v[chunk[-2:]],
            )  # fmt: skip
            s = _scores(q, k, bias, chunk[-1], scratch("s", n, rows, cols))
            top = s.amax(-1, keepdim=True)
            p = torch.softmax(s, -1, out=s)
            # The largest weight belongs to the largest score: its logarithm gives the LSE.
            top.sub_(p.amax(-1, keepdim=True).log_())
            o = torch.bmm(p, v, out=scratch("o", n, rows, sizes.value_dim))
            _fill_rows(o, empty, chunk[-1], 0.0)
            _fill_rows(top, empty, chunk[-1], -math.inf)
            target = out_view[chunk]
            target.copy_(o.view(target.shape))
            target = lse_view[chunk]
            target.copy_(top.view(target.shape))
    return out, lse


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
    if query.numel() == 0:
        return no_gradients(query, key, value, rpb, extra_keys, extra_values)
    sizes = _Sizes.of(query, key, value, extra_keys)
    dtype = compute_dtype(query.dtype)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key = key.new_zeros(key.shape, dtype=dtype)
    grad_value = value.new_zeros(value.shape, dtype=dtype)
    grad_rpb = None if rpb is None else rpb.new_zeros(rpb.shape, dtype=dtype)
    extra_k = extra_v = grad_ek = grad_ev = None
    if extra_keys is not None and extra_values is not None:
        extra_k, extra_v = extra_keys.transpose(1, 2), extra_values.transpose(1, 2)
        grad_ek = extra_k.new_zeros(extra_k.shape, dtype=dtype)
        grad_ev = extra_v.new_zeros(extra_v.shape, dtype=dtype)
    scratch = Scratch(query, dtype)
    for block in _blocks(rule, query, key, (sizes.dim + sizes.value_dim) // 2):
        q_view, k_view, v_view = (
            block.queries(query, sizes.kv_heads),
            block.keys(key),
            block.keys(value),
        )
        do_view = block.queries(grad_out, sizes.kv_heads)
        dl_view = None if grad_lse is None else block.queries(grad_lse[..., None], sizes.kv_heads)
        dq_view = block.queries(grad_query, sizes.kv_heads)
        dk_view, dv_view = block.keys(grad_key), block.keys(grad_value)
        box = math.prod(block.key_sizes)
        rows = sizes.per_kv * math.prod(block.query_sizes)
        cols = box + sizes.extra
        if cols == 0:
            dq_view.zero_()
            continue
        bias = _score_bias(block, rpb, rule, sizes, query, dtype)
        empty = _empty_rows(bias, rpb)
        grad_bias = None
        if rpb is not None:
            grad_bias = query.new_zeros(sizes.kv_heads, rows, box, dtype=dtype)
        for chunk in block.chunks(query, key, sizes.extra):
            part = q_view[chunk]
            n = part.numel() // (rows * sizes.dim)
            q = _load(scratch("q", n, rows, sizes.dim), part).mul_(scale)
            k = _load_keys(
                scratch("k", n, cols, sizes.dim), block, k_view[chunk],
                None if extra_k is None else extra_k[chunk[-2:]],
            )  # fmt: skip
            v = _load_keys(
                scratch("v", n, cols, sizes.value_dim), block, v_view[chunk],
                None if extra_v is None else extra_v[chunk[-2:]],
            )  # fmt: skip
            do = _load(scratch("do", n, rows, sizes.value_dim), do_view[chunk])
            _fill_rows(do, empty, chunk[-1], 0.0)

            p = _scores(q, k, bias, chunk[-1], scratch("s", n, rows, cols))
            torch.softmax(p, -1, out=p)
            ds = torch.bmm(do, v.transpose(1, 2), out=scratch("ds", n, rows, cols)).mul_(p)
            # delta = sum(P * dP), not sum(dO * O): an output in half precision is rounded.
            delta = ds.sum(-1, keepdim=True)
            if dl_view is not None:
                delta.view(dl_view[chunk].shape).sub_(dl_view[chunk])
                _fill_rows(delta, empty, chunk[-1], 0.0)
            ds.addcmul_(p, delta, value=-1)
            dv = torch.bmm(p.transpose(1, 2), do, out=scratch("v", n, cols, sizes.value_dim))
            dq = torch.bmm(ds, k, out=scratch("dq", n, rows, sizes.dim)).mul_(scale)
            dk = torch.bmm(ds.transpose(1, 2), q, out=scratch("k", n, cols, sizes.dim))

            target = dq_view[chunk]
            target.copy_(dq.view(target.shape))
            for boxes, view, grad_extra in ((dk, dk_view, grad_ek), (dv, dv_view, grad_ev)):
                if grad_extra is not None:
                    tail = boxes[:, box:].unflatten(0, (-1, *grad_extra[chunk[-2:]].shape[:2]))
                    grad_extra[chunk[-2:]].add_(tail.sum(0))
                    boxes = boxes[:, :box]
                add_boxes(block, view, chunk, boxes)
            if grad_bias is not None:
                heads = chunk[-1].stop - chunk[-1].start
                grad_bias[chunk[-1]].add_(ds.view(-1, heads, rows, cols).sum(0)[..., :box])
        if grad_bias is not None and grad_rpb is not None and isinstance(rule, Neighborhood):
            _add_bias_gradient(block, grad_bias.reshape(sizes.heads, -1, box), grad_rpb, rule)

    def finish(x: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if x is None or like is None else x.to(like.dtype)

    return (
        grad_query,
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
        finish(grad_rpb, rpb),
        finish(None if grad_ek is None else grad_ek.transpose(1, 2).contiguous(), extra_keys),
        finish(None if grad_ev is None else grad_ev.transpose(1, 2).contiguous(), extra_values),
    )


# --- unfused attention: weights are [batch, *space, heads, window tokens] --------------------


def _slots(block: Block, rule: Neighborhood, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Box position of every window slot, ``[tile tokens, window tokens]``, and which are attended.

    The second is None where all are; slots that are not hold some position inside the box.
    """
    index = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    valid = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for run, k in zip(block.runs, rule.kernel_size):
        position = run.lower[:, None] + torch.arange(k, device="cpu")
        own_valid = position < run.upper[:, None]
        index = outer(index * run.key_size, position.clamp(max=run.key_size - 1), torch.add)
        valid = outer(valid, own_valid, torch.logical_and)
    return index.to(device), None if bool(valid.all()) else valid.to(device)


def _spread(weights: Tensor, index: Tensor, valid: Tensor | None, box: int, out: Tensor) -> Tensor:
    """Weights in window slots as weights over the box; ``out`` has ``box + 1`` columns."""
    if valid is not None:  # masked slots go to the column that nobody reads
        index = index.masked_fill(~valid, box)
    out.zero_().scatter_(2, index.expand(len(weights), -1, -1), weights)
    return out[..., :box]


def qk(query: Tensor, key: Tensor, rule: Neighborhood) -> Tensor:
    """Products of every query with its window's keys; 0 in masked slots."""
    batch, heads, dim = query.shape[0], query.shape[-2], query.shape[-1]
    attn = query.new_empty(batch, heads, *query.shape[1:-2], rule.window_tokens).movedim(1, -2)
    scratch = Scratch(query, compute_dtype(query.dtype))
    for block in _blocks(rule, query, key, dim):
        q_view, k_view = block.queries(query, heads), block.keys(key)
        attn_view = block.queries(attn, heads)
        index, valid = _slots(block, rule, query.device)
        rows, box = math.prod(block.query_sizes), math.prod(block.key_sizes)
        for chunk in block.chunks(query, key):
            part = q_view[chunk]
            n = part.numel() // (rows * dim)
            q = _load(scratch("q", n, rows, dim), part)
            k = _load(scratch("k", n, box, dim), k_view[chunk])
            s = torch.bmm(q, k.transpose(1, 2), out=scratch("s", n, rows, box))
            picked = scratch("picked", n, *index.shape)
            torch.gather(s, 2, index.expand(n, -1, -1), out=picked)
            if valid is not None:
                picked.masked_fill_(~valid, 0)
            target = attn_view[chunk]
            target.copy_(picked.view(target.shape))
    return attn


def av(attn: Tensor, value: Tensor, rule: Neighborhood) -> Tensor:
    """Sum of the window's values, weighted; masked slots are ignored."""
    batch, heads, dim = value.shape[0], value.shape[-2], value.shape[-1]
    out = value.new_empty(batch, heads, *value.shape[1:-2], dim).movedim(1, -2)
    scratch = Scratch(value, compute_dtype(value.dtype))
    for block in _blocks(rule, value, value, dim):
        attn_view, v_view, out_view = (
            block.queries(attn, heads),
            block.keys(value),
            block.queries(out, heads),
        )
        index, valid = _slots(block, rule, value.device)
        rows, box = math.prod(block.query_sizes), math.prod(block.key_sizes)
        for chunk in block.chunks(value, value):
            part = attn_view[chunk]
            n = part.numel() // index.numel()
            weights = _load(scratch("a", n, *index.shape), part)
            dense = _spread(weights, index, valid, box, scratch("p", n, rows, box + 1))
            v = _load(scratch("v", n, box, dim), v_view[chunk])
            o = torch.bmm(dense, v, out=scratch("o", n, rows, dim))
            target = out_view[chunk]
            target.copy_(o.view(target.shape))
    return out


def av_transposed(attn: Tensor, x: Tensor, rule: Neighborhood) -> Tensor:
    """For every key, the sum of ``x`` at the queries that attend it, weighted."""
    batch, heads, dim = x.shape[0], x.shape[-2], x.shape[-1]
    dtype = compute_dtype(x.dtype)
    out = x.new_zeros(batch, heads, *x.shape[1:-2], dim, dtype=dtype).movedim(1, -2)
    scratch = Scratch(x, dtype)
    for block in _blocks(rule, x, x, dim):
        attn_view, x_view, out_view = (
            block.queries(attn, heads),
            block.queries(x, heads),
            block.keys(out),
        )
        index, valid = _slots(block, rule, x.device)
        rows, box = math.prod(block.query_sizes), math.prod(block.key_sizes)
        for chunk in block.chunks(x, x):
            part = attn_view[chunk]
            n = part.numel() // index.numel()
            weights = _load(scratch("a", n, *index.shape), part)
            dense = _spread(weights, index, valid, box, scratch("p", n, rows, box + 1))
            xs = _load(scratch("x", n, rows, dim), x_view[chunk])
            boxes = torch.bmm(dense.transpose(1, 2), xs, out=scratch("o", n, box, dim))
            add_boxes(block, out_view, chunk, boxes)
    return out.to(x.dtype)


def _token_blocks(rule: Neighborhood, like: Tensor) -> list[Block]:
    """Blocks for a tensor ``[1, *space, heads, channels]``."""
    return _blocks(rule, like, like, like.shape[-1])


def bias(rpb: Tensor, shape: Sequence[int], rule: Neighborhood) -> Tensor:
    """``rpb`` in every window slot, ``[*space, heads, window tokens]``; 0 in masked slots."""
    heads = rpb.shape[0]
    out = rpb.new_empty(1, heads, *shape, rule.window_tokens).movedim(1, -2)
    for block in _token_blocks(rule, out):
        index, valid = _slots(block, rule, rpb.device)
        picked = _bias_of(block, rpb, rule).gather(2, index.expand(heads, -1, -1))
        if valid is not None:
            picked = picked.masked_fill(~valid, 0)
        view = block.queries(out, heads)
        view.copy_(picked.view(heads, *view.shape[-len(shape) - 2 :]))
    return out[0]


def bias_transposed(grad: Tensor, rule: Neighborhood) -> Tensor:
    """The gradient of ``rpb`` from ``grad [*space, heads, window tokens]``."""
    heads, dtype = grad.shape[-2], compute_dtype(grad.dtype)
    out = grad.new_zeros(heads, *(2 * k - 1 for k in rule.kernel_size), dtype=dtype)
    grad = grad[None]
    for block in _token_blocks(rule, grad):
        index, valid = _slots(block, rule, grad.device)
        view = block.queries(grad, heads)
        lead = tuple(range(2 * rule.rank + 1))
        weights = view.sum(lead, dtype=dtype).reshape(heads, *index.shape)
        rows, box = math.prod(block.query_sizes), math.prod(block.key_sizes)
        dense = _spread(weights, index, valid, box, weights.new_empty(heads, rows, box + 1))
        _add_bias_gradient(block, dense, out, rule)
    return out.to(grad.dtype)
