"""Fused attention over tiles, forward and backward."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...inputs import Gradients, Inputs, compute_dtype
from ...neighborhood import Neighborhood, Rule
from .bias import add_bias_gradient, bias_of
from .grids import Chunk, Scratch, TileGrid, add_kv_blocks, grids_for, load


class _Sizes(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    per_kv: int
    dim: int
    value_dim: int
    num_additional: int

    @classmethod
    def of(cls, inputs: Inputs) -> _Sizes:
        query, key, value, _, additional_keys, *_ = inputs
        heads, kv_heads = query.shape[-2], key.shape[-2]
        return cls(
            query.shape[0], heads, kv_heads, heads // kv_heads, query.shape[-1], value.shape[-1],
            0 if additional_keys is None else additional_keys.shape[1],
        )  # fmt: skip


def _score_bias(
    grid: TileGrid, rpb: Tensor | None, rule: Rule, sizes: _Sizes, like: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """The sum of bias and mask, to be added to the scores: ``[kv heads or 1, rows, columns]``.

    Rows are the tile's queries of all heads that share a kv head. Columns are the keys of the
    block, then the additional ones.
    """
    mask = grid.mask()
    if rpb is None and mask is None:
        return None
    if mask is not None:
        mask = mask.to(like.device, dtype)
    if rpb is None:
        assert mask is not None
        bias = mask.repeat(sizes.per_kv, 1)[None] if sizes.per_kv > 1 else mask[None]
    else:
        assert isinstance(rule, Neighborhood)
        bias = bias_of(grid, rpb.to(dtype), rule)
        bias = bias if mask is None else bias + mask
        bias = bias.reshape(sizes.kv_heads, -1, bias.shape[-1])
    return F.pad(bias, (0, sizes.num_additional)) if sizes.num_additional else bias


def _masks(inputs: Inputs, sizes: _Sizes) -> tuple[Tensor, Tensor] | None:
    """Masks of keys and of additional keys, shaped like these, with one channel; None if no key is
    masked."""
    if not inputs.is_masked:
        return None
    shapes = inputs.key.shape[:-1], (sizes.batch, sizes.num_additional, sizes.kv_heads)
    every = inputs.key.new_ones((), dtype=torch.bool)
    given = (inputs.key_mask, inputs.additional_mask)
    key_mask, additional_mask = (
        (every if mask is None else mask[..., None]).expand(shape)[..., None]
        for mask, shape in zip(given, shapes)
    )
    return key_mask, additional_mask


def _masked_keys(
    buffer: Tensor, grid: TileGrid, masks: tuple[Tensor, Tensor] | None, chunk: Chunk, k: Tensor,
    v: Tensor,
) -> Tensor | None:  # fmt: skip
    """Which keys of a chunk are masked, bool ``[matrices, keys, 1]``, None if there are no masks.

    In ``k`` and ``v [matrices, keys, channels]`` these become 0, because they may hold NaN.
    """
    if masks is None:
        return None
    key_mask, additional = masks
    additional_mask = additional if additional.shape[1] else None
    masked = _load_keys(buffer, grid, grid.keys(key_mask), chunk, additional_mask) == 0
    for x in (k, v):
        x.masked_fill_(masked, 0.0)
    return masked


def _take_empty(scores: Tensor) -> Tensor:
    """The rows of ``scores [matrices, rows, columns]`` that nothing is left for.

    They become 0, so that the softmax is finite there; its result is replaced later.
    """
    empty = scores.amax(-1, keepdim=True) == -math.inf
    scores.masked_fill_(empty, 0.0)
    return empty


def _load_keys(
    buffer: Tensor, grid: TileGrid, view: Tensor, chunk: Chunk, additional: Tensor | None
) -> Tensor:
    """Copy a chunk of blocks of keys into ``buffer``, each followed by the additional tokens."""
    view = view[chunk]
    if additional is None:
        return load(buffer, view)
    lead = view.shape[: 2 * len(grid.runs) + 2]
    windowed = math.prod(grid.key_sizes)
    rows = buffer.view(*lead, buffer.shape[-2], buffer.shape[-1])
    rows[..., :windowed, :].unflatten(-2, grid.key_sizes).copy_(view.resolve_neg())
    rows[..., windowed:, :].copy_(_of_chunk(additional, chunk).resolve_neg())
    return buffer


def _of_chunk(additional: Tensor, chunk: Chunk) -> Tensor:
    """A chunk's additional tokens, ``[batch, kv heads, num_additional, channels]``."""
    return additional.transpose(1, 2)[chunk[-2:]]


def _scores(
    query: Tensor, keys: Tensor, bias: Tensor | None, masked: Tensor | None, kv_heads: slice,
    scale: float, out: Tensor,
) -> Tensor:  # fmt: skip
    """The scores ``scale * query @ keys^T + bias``, in ``out``; the softmax is taken in place."""
    shared = bias is not None and bias.shape[0] == 1  # by all matrices
    _product(query, keys.transpose(1, 2), scale, out, bias if shared else None)
    if bias is not None and not shared:
        out.view(-1, *bias[kv_heads].shape).add_(bias[kv_heads])
    if masked is not None:
        out.masked_fill_(masked.transpose(1, 2), -math.inf)
    return out


def _product(
    a: Tensor, b: Tensor, scale: float, out: Tensor, added: Tensor | None = None
) -> Tensor:
    """``scale * a @ b + added`` of matrices, in ``out``, without a pass for anything but a @ b."""
    if added is None:
        return torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)
    return torch.baddbmm(added, a, b, alpha=scale, out=out)


class _Loaded(NamedTuple):
    """A chunk of queries, keys and values, each ``[matrices, tokens, channels]``, and scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor  # [matrices, rows, columns]
    empty: Tensor | None  # rows that nothing is left for, whose scores are 0


def _load_chunk(
    inputs: Inputs, grid: TileGrid, views: tuple[Tensor, Tensor, Tensor], chunk: Chunk,
    sizes: _Sizes, bias: Tensor | None, masks: tuple[Tensor, Tensor] | None, scale: float,
    scratch: Scratch,
) -> _Loaded:  # fmt: skip
    """Copy a chunk, and compute its scores. ``views``: of the queries, keys and values of all
    tiles."""
    q_view, k_view, v_view = views
    rows = sizes.per_kv * math.prod(grid.query_sizes)
    cols = math.prod(grid.key_sizes) + sizes.num_additional
    part = q_view[chunk]
    n = part.numel() // (rows * sizes.dim)
    q = load(scratch("q", n, rows, sizes.dim), part)
    k = scratch("k", n, cols, sizes.dim)
    k = _load_keys(k, grid, k_view, chunk, inputs.additional_keys)
    v = scratch("v", n, cols, sizes.value_dim)
    v = _load_keys(v, grid, v_view, chunk, inputs.additional_values)
    masked = _masked_keys(scratch("m", n, cols, 1), grid, masks, chunk, k, v)
    s = _scores(q, k, bias, masked, chunk[-1], scale, scratch("s", n, rows, cols))
    may_be_empty = inputs.rpb is not None or masks is not None  # a bias may be -inf
    return _Loaded(q, k, v, s, _take_empty(s) if may_be_empty else None)


def forward(
    inputs: Inputs, rule: Rule, scale: float, tiles: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value dim]`` and LSE ``[batch, *space, heads]``."""
    query, key, value, rpb, *_ = inputs
    dtype = compute_dtype(query.dtype)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=dtype)
    if query.numel() == 0:
        return out, lse
    sizes = _Sizes.of(inputs)
    scratch, masks = Scratch(query, dtype), _masks(inputs, sizes)
    for grid in grids_for(rule, query, key, (sizes.dim + sizes.value_dim) // 2):
        views = grid.queries(query, sizes.kv_heads), grid.keys(key), grid.keys(value)
        out_view = grid.queries(out, sizes.kv_heads)
        lse_view = grid.queries(lse[..., None], sizes.kv_heads)
        rows = sizes.per_kv * math.prod(grid.query_sizes)
        cols = math.prod(grid.key_sizes) + sizes.num_additional
        if cols == 0:
            out_view.zero_()
            lse_view.fill_(-math.inf)
            continue
        bias = _score_bias(grid, rpb, rule, sizes, query, dtype)
        for chunk in grid.chunks(query, key, sizes.num_additional):
            loaded = _load_chunk(inputs, grid, views, chunk, sizes, bias, masks, scale, scratch)
            _, _, v, s, empty = loaded
            row_max = s.amax(-1, keepdim=True)
            p = torch.softmax(s, -1, out=s)
            # The largest weight is exp(row_max - LSE).
            row_lse = row_max.sub_(p.amax(-1, keepdim=True).log_())
            o = torch.bmm(p, v, out=scratch("o", len(v), rows, sizes.value_dim))
            if empty is not None:
                o.masked_fill_(empty, 0.0)
                row_lse.masked_fill_(empty, -math.inf)
            target = out_view[chunk]
            target.copy_(o.view(target.shape))
            target = lse_view[chunk]
            target.copy_(row_lse.view(target.shape))
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor, rule: Rule,
    scale: float, tiles: tuple[int, ...] = (),
) -> Gradients:  # fmt: skip
    """Gradients of the inputs; the weights are computed again."""
    query, key, value, rpb, additional_keys, additional_values, *_ = inputs
    if query.numel() == 0:
        return Gradients.zeros(inputs)
    sizes = _Sizes.of(inputs)
    dtype = compute_dtype(query.dtype)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key = key.new_zeros(key.shape, dtype=dtype)
    grad_value = value.new_zeros(value.shape, dtype=dtype)
    grad_rpb = None if rpb is None else rpb.new_zeros(rpb.shape, dtype=dtype)
    grad_keys = grad_values = None
    if additional_keys is not None and additional_values is not None:
        grad_keys = additional_keys.new_zeros(additional_keys.shape, dtype=dtype)
        grad_values = additional_values.new_zeros(additional_values.shape, dtype=dtype)
    scratch, masks = Scratch(query, dtype), _masks(inputs, sizes)
    for grid in grids_for(rule, query, key, (sizes.dim + sizes.value_dim) // 2):
        views = grid.queries(query, sizes.kv_heads), grid.keys(key), grid.keys(value)
        do_view = grid.queries(grad_out, sizes.kv_heads)
        dl_view = None if grad_lse is None else grid.queries(grad_lse[..., None], sizes.kv_heads)
        dq_view = grid.queries(grad_query, sizes.kv_heads)
        dk_view, dv_view = grid.keys(grad_key), grid.keys(grad_value)
        windowed = math.prod(grid.key_sizes)
        rows = sizes.per_kv * math.prod(grid.query_sizes)
        cols = windowed + sizes.num_additional
        if cols == 0:
            dq_view.zero_()
            continue
        bias = _score_bias(grid, rpb, rule, sizes, query, dtype)
        grad_bias = None
        if rpb is not None:
            grad_bias = query.new_zeros(sizes.kv_heads, rows, windowed, dtype=dtype)
        for chunk in grid.chunks(query, key, sizes.num_additional):
            loaded = _load_chunk(inputs, grid, views, chunk, sizes, bias, masks, scale, scratch)
            q, k, v, s, empty = loaded
            n = len(q)
            do = load(scratch("do", n, rows, sizes.value_dim), do_view[chunk])

            p = torch.softmax(s, -1, out=s)
            if empty is not None:
                p.masked_fill_(empty, 0.0)
                do.masked_fill_(empty, 0.0)
            ds = torch.bmm(do, v.transpose(1, 2), out=scratch("ds", n, rows, cols)).mul_(p)
            # delta = sum(P * dP), not sum(dO * O), because an output in half precision is rounded.
            delta = ds.sum(-1, keepdim=True)
            if dl_view is not None:
                delta.view(dl_view[chunk].shape).sub_(dl_view[chunk])
                if empty is not None:  # the gradient of an LSE of -inf may be NaN
                    delta.masked_fill_(empty, 0.0)
            ds.addcmul_(p, delta, value=-1)
            dv = torch.bmm(p.transpose(1, 2), do, out=scratch("v", n, cols, sizes.value_dim))
            dq = _product(ds, k, scale, scratch("dq", n, rows, sizes.dim))
            dk = _product(ds.transpose(1, 2), q, scale, scratch("k", n, cols, sizes.dim))

            target = dq_view[chunk]
            target.copy_(dq.view(target.shape))
            sums = (dk, dk_view, grad_keys), (dv, dv_view, grad_values)
            for grad, view, additional in sums:
                if additional is not None:
                    of_chunk = _of_chunk(additional, chunk)
                    tail = grad[:, windowed:].unflatten(0, (-1, *of_chunk.shape[:2]))
                    of_chunk.add_(tail.sum(0))
                    grad = grad[:, :windowed]
                add_kv_blocks(grid, view, chunk, grad)
            if grad_bias is not None:
                heads = chunk[-1].stop - chunk[-1].start
                own = ds.view(-1, heads, rows, cols).sum(0)[..., :windowed]
                grad_bias[chunk[-1]].add_(own)
        if grad_bias is not None and grad_rpb is not None and isinstance(rule, Neighborhood):
            grad_bias = grad_bias.reshape(sizes.heads, -1, windowed)
            add_bias_gradient(grid, grad_bias, grad_rpb, rule)

    grads = (grad_query, grad_key, grad_value, grad_rpb, grad_keys, grad_values)
    return Gradients(
        *(None if x is None or like is None else x.to(like.dtype) for x, like in zip(grads, inputs))
    )
