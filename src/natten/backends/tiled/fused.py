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
from .blocks import Block, Chunk, Scratch, add_boxes, blocks_for, load


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
        query, key, value, _, additional_keys, _ = inputs
        heads, kv_heads = query.shape[-2], key.shape[-2]
        return cls(
            query.shape[0], heads, kv_heads, heads // kv_heads, query.shape[-1], value.shape[-1],
            0 if additional_keys is None else additional_keys.shape[1],
        )  # fmt: skip


def _score_bias(
    block: Block, rpb: Tensor | None, rule: Rule, sizes: _Sizes, like: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Bias and mask, which are added to the scores: ``[kv heads or 1, rows, columns]``.

    Rows are the tile's queries of all heads that share a kv head; columns are the tokens of the
    box, then the additional ones.
    """
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
        bias = bias_of(block, rpb.to(dtype), rule)
        bias = bias if mask is None else bias + mask
        bias = bias.reshape(sizes.kv_heads, -1, bias.shape[-1])
    return F.pad(bias, (0, sizes.num_additional)) if sizes.num_additional else bias


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


def _load_keys(
    buffer: Tensor, block: Block, view: Tensor, chunk: Chunk, additional: Tensor | None
) -> Tensor:
    """Copy a chunk of boxes into ``buffer``, after each box its batch entry's additional tokens."""
    view = view[chunk]
    if additional is None:
        return load(buffer, view)
    lead = view.shape[: 2 * len(block.runs) + 2]
    box = math.prod(block.key_sizes)
    rows = buffer.view(*lead, buffer.shape[-2], buffer.shape[-1])
    rows[..., :box, :].unflatten(-2, block.key_sizes).copy_(view.resolve_neg())
    rows[..., box:, :].copy_(_of_chunk(additional, chunk).resolve_neg())
    return buffer


def _of_chunk(additional: Tensor, chunk: Chunk) -> Tensor:
    """Additional tokens ``[batch, kv heads, tokens, channels]`` of a chunk of tiles."""
    return additional.transpose(1, 2)[chunk[-2:]]


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
    inputs: Inputs, rule: Rule, scale: float, tiles: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value dim]`` and LSE ``[batch, *space, heads]``."""
    query, key, value, rpb, additional_keys, additional_values = inputs
    dtype = compute_dtype(query.dtype)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=dtype)
    if query.numel() == 0:
        return out, lse
    sizes = _Sizes.of(inputs)
    scratch = Scratch(query, dtype)
    for block in blocks_for(rule, query, key, (sizes.dim + sizes.value_dim) // 2):
        q_view = block.queries(query, sizes.kv_heads)
        k_view, v_view = block.keys(key), block.keys(value)
        out_view = block.queries(out, sizes.kv_heads)
        lse_view = block.queries(lse[..., None], sizes.kv_heads)
        rows = sizes.per_kv * math.prod(block.query_sizes)
        cols = math.prod(block.key_sizes) + sizes.num_additional
        if cols == 0:
            out_view.zero_()
            lse_view.fill_(-math.inf)
            continue
        bias = _score_bias(block, rpb, rule, sizes, query, dtype)
        empty = _empty_rows(bias, rpb)
        for chunk in block.chunks(query, key, sizes.num_additional):
            part = q_view[chunk]
            n = part.numel() // (rows * sizes.dim)
            q = load(scratch("q", n, rows, sizes.dim), part).mul_(scale)
            k = _load_keys(scratch("k", n, cols, sizes.dim), block, k_view, chunk, additional_keys)
            v = scratch("v", n, cols, sizes.value_dim)
            v = _load_keys(v, block, v_view, chunk, additional_values)
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


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor, rule: Rule,
    scale: float, tiles: tuple[int, ...] = (),
) -> Gradients:  # fmt: skip
    """Gradients of the inputs; the weights are computed again."""
    query, key, value, rpb, additional_keys, additional_values = inputs
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
    scratch = Scratch(query, dtype)
    for block in blocks_for(rule, query, key, (sizes.dim + sizes.value_dim) // 2):
        q_view = block.queries(query, sizes.kv_heads)
        k_view, v_view = block.keys(key), block.keys(value)
        do_view = block.queries(grad_out, sizes.kv_heads)
        dl_view = None if grad_lse is None else block.queries(grad_lse[..., None], sizes.kv_heads)
        dq_view = block.queries(grad_query, sizes.kv_heads)
        dk_view, dv_view = block.keys(grad_key), block.keys(grad_value)
        box = math.prod(block.key_sizes)
        rows = sizes.per_kv * math.prod(block.query_sizes)
        cols = box + sizes.num_additional
        if cols == 0:
            dq_view.zero_()
            continue
        bias = _score_bias(block, rpb, rule, sizes, query, dtype)
        empty = _empty_rows(bias, rpb)
        grad_bias = None
        if rpb is not None:
            grad_bias = query.new_zeros(sizes.kv_heads, rows, box, dtype=dtype)
        for chunk in block.chunks(query, key, sizes.num_additional):
            part = q_view[chunk]
            n = part.numel() // (rows * sizes.dim)
            q = load(scratch("q", n, rows, sizes.dim), part).mul_(scale)
            k = _load_keys(scratch("k", n, cols, sizes.dim), block, k_view, chunk, additional_keys)
            v = scratch("v", n, cols, sizes.value_dim)
            v = _load_keys(v, block, v_view, chunk, additional_values)
            do = load(scratch("do", n, rows, sizes.value_dim), do_view[chunk])
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
            sums = (dk, dk_view, grad_keys), (dv, dv_view, grad_values)
            for boxes, view, additional in sums:
                if additional is not None:
                    of_chunk = _of_chunk(additional, chunk)
                    of_chunk.add_(boxes[:, box:].unflatten(0, (-1, *of_chunk.shape[:2])).sum(0))
                    boxes = boxes[:, :box]
                add_boxes(block, view, chunk, boxes)
            if grad_bias is not None:
                heads = chunk[-1].stop - chunk[-1].start
                grad_bias[chunk[-1]].add_(ds.view(-1, heads, rows, cols).sum(0)[..., :box])
        if grad_bias is not None and grad_rpb is not None and isinstance(rule, Neighborhood):
            add_bias_gradient(block, grad_bias.reshape(sizes.heads, -1, box), grad_rpb, rule)

    grads = (grad_query, grad_key, grad_value, grad_rpb, grad_keys, grad_values)
    return Gradients(
        *(None if x is None or like is None else x.to(like.dtype) for x, like in zip(grads, inputs))
    )
