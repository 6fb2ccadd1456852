"""Plain attention over packed sequences, of which the lengths are tensors.

It is an operator of its own, because compiled and exported code can not read the lengths, which are
data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _tracing
from .._library import define, differentiate, implement, ops
from .._torch import has_fake, is_recorded
from ..inputs import Inputs
from ..neighborhood import Dense
from ..sequences import Lengths
from . import composed
from .composed import composed_attention
from .fused import Call, attention, fake_attention
from .packed import Attention, backend_for, packed_attention
from .schema import CHOICE, Choice, pack_choice, unpack_choice
from .transforms import refuse_forward_mode


def sequence_attention(inputs: Inputs, lengths: Lengths, call: Call) -> tuple[Tensor, Tensor]:
    """Plain attention inside each packed sequence.

    Args:
        inputs: packed tensors ``[1, tokens, heads, channels]``.
        lengths: how long the sequences are.
        call: attention of one of them.

    Returns:
        Output ``[1, tokens, heads, value_dim]`` and LSE ``[1, tokens, heads]``.
    """
    query, key, value, *_ = inputs
    rule, scale, choice = call.rule, call.scale, call.choice
    assert isinstance(rule, Dense)
    recorded = torch.compiler.is_compiling() or _tracing.is_traced()
    # Or the tensors have no data, or what is done with them is written down.
    if recorded or has_fake((query, key, value, *lengths.tensors)) or is_recorded():
        if recorded:
            refuse_forward_mode()
        if recorded and _tracing.is_for_onnx():
            return gathered_sequences(query, key, value, lengths, rule, scale)
        options = int(rule.causal), scale, *pack_choice(choice)
        return ops.packed_attention(query, key, value, *lengths, *options)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return attention(Inputs(q, k, v), rule, scale, choice)

        return _one_by_one(dense, lengths, q, k, v)

    backend = backend_for(query, key, value, rule, scale, choice.backend)
    if backend is None:
        return one_by_one(query, key, value)
    documents = lengths.documents(query, key)
    return packed_attention(backend, query, key, value, documents, rule, scale, one_by_one)


def gathered_sequences(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, rule: Dense, scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`sequence_attention` in PyTorch's own operators, of all queries with all keys."""
    mask = _same_sequence(query, key, lengths, rule)
    return composed_attention(Inputs(query, key, value), rule, scale, mask=mask)


def gathered_sequences_gradient(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    lengths: Lengths, rule: Dense, scale: float,
) -> Sequence[Any]:  # fmt: skip
    """The gradient of :func:`gathered_sequences`, of query, key and value."""
    mask, inputs = _same_sequence(query, key, lengths, rule), Inputs(query, key, value)
    return composed.gathered_gradient(grad_out, grad_lse, inputs, rule, scale, mask=mask)[:3]


def _same_sequence(query: Tensor, key: Tensor, lengths: Lengths, rule: Dense) -> Tensor:
    """Who attends whom, ``[queries, keys]``. Lengths are data, and can not be checked here."""

    def ends(seqlens: Tensor | None, starts: Tensor | None) -> Tensor:
        if starts is not None:
            return starts[1:]
        assert seqlens is not None
        return seqlens.cumsum(0)

    q, k = (torch.arange(x.shape[1], device=x.device)[:, None] for x in (query, key))
    q_ends = ends(lengths.seqlens_q, lengths.starts_q).to(query.device)
    k_ends = ends(lengths.seqlens_kv, lengths.starts_kv).to(key.device)
    q_sequence, k_sequence = (q >= q_ends).sum(-1), (k >= k_ends).sum(-1)
    mask = q_sequence[:, None] == k_sequence
    if rule.causal:
        q_starts, k_starts = (F.pad(x, (1, 0)) for x in (q_ends, k_ends))
        own_q = q[:, 0] - q_starts.index_select(0, q_sequence)
        own_k = k[:, 0] - k_starts.index_select(0, k_sequence)
        mask = mask & (own_k <= own_q[:, None])
    return mask


def _one_by_one(
    dense: Attention, lengths: Lengths, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """``dense`` of every sequence."""
    ours, theirs = lengths.read(query, key)
    if not ours:
        return dense(query, key, value)
    parts = zip(query.split(ours, 1), key.split(theirs, 1), value.split(theirs, 1))
    outputs, exponents = zip(*(dense(*part) for part in parts))
    return torch.cat(outputs, dim=1), torch.cat(exponents, dim=1)


_LENGTHS = (
    "Tensor? seqlens_q, Tensor? seqlens_kv, Tensor? starts_q, Tensor? starts_kv, "
    "SymInt longest_q, SymInt longest_kv"
)
_OPTIONS = f"int is_causal, float scale, {CHOICE}"
define(
    f"packed_attention(Tensor query, Tensor key, Tensor value, {_LENGTHS}, {_OPTIONS}) "
    "-> (Tensor, Tensor)"
)
define(
    "packed_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
    f"Tensor value, Tensor out, Tensor lse, {_LENGTHS}, {_OPTIONS}) -> Tensor[]"
)


def unpack_sequences(arguments: Sequence[Any]) -> tuple[Lengths, Dense, float, Choice]:
    """What ``natten::packed_attention`` takes after the tensors."""
    *lengths, is_causal, scale, backend, tiles = arguments
    return Lengths(*lengths), Dense(bool(is_causal)), scale, unpack_choice(backend, tiles)


def _forward(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    lengths, rule, scale, choice = unpack_sequences(arguments)
    backend = backend_for(query, key, value, rule, scale, choice.backend)
    if backend is None:
        found = _one_by_one(
            lambda *qkv: Call(rule, scale, choice).forward(Inputs(*qkv)),
            lengths, query, key, value,
        )  # fmt: skip
    else:
        documents = lengths.documents(query, key)
        found = backend.packed_forward(Inputs(query, key, value), documents, rule, scale)
    out, lse = found
    return out.contiguous(), lse.contiguous()


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor, *arguments: Any,
) -> list[Tensor]:  # fmt: skip
    lengths, rule, scale, choice = unpack_sequences(arguments)
    backend = backend_for(query, key, value, rule, scale, choice.backend)
    if backend is not None:
        documents = lengths.documents(query, key)
        found = backend.packed_backward(
            grad_out, grad_lse, Inputs(query, key, value), out, lse, documents, rule, scale
        )
        return [x.contiguous() for x in found[:3] if x is not None]
    ours, theirs = lengths.read(query, key)
    ours, theirs = (ours, theirs) if ours else ([query.shape[1]], [key.shape[1]])
    sizes = ours, ours, ours, theirs, theirs, ours, ours
    tensors = grad_out, grad_lse, query, key, value, out, lse
    parts = ([None] * len(ours) if x is None else x.split(n, 1) for x, n in zip(tensors, sizes))
    grads = []
    for grad, grad_exponent, q, k, v, each_out, each_lse in zip(*parts):
        call = Call(rule, scale, choice)
        grads.append(call.backward(grad, grad_exponent, Inputs(q, k, v), each_out, each_lse)[:3])
    return [torch.cat(each, dim=1) for each in zip(*grads)]


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return fake_attention(query, key, value)


def _fake_backward(grad_out: Tensor, grad_lse: Any, *args: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in args[:3]]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.others = inputs[7:]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, *tensors = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    found = ops.packed_attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, *tensors, *ctx.others
    )
    return (*found, *(None for _ in (*tensors, *ctx.others)))


implement("packed_attention", _forward, _fake_forward)
implement("packed_attention_backward", _backward, _fake_backward)
differentiate("packed_attention", _gradient, _setup)
