"""Attention inside packed documents: in one launch where the backend reads a table of documents.

Plain attention over packed sequences is an operator as well, because compiled and exported code can
not read the lengths, which are data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _tracing, backends, operators
from ._checks import check_same_shape
from ._library import define, differentiate, implement, ops
from ._numbers import integer
from ._torch import has_fake, in_forward_mode, is_recorded
from .documents import Documents
from .errors import ArgumentError
from .inputs import Inputs
from .neighborhood import Dense, Rule
from .operators import Call, Choice, differentiable_gradients, is_composed, is_plain
from .varlen import check_integers, check_starts, sequence_lengths

Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def problem_of(query: Tensor, value: Tensor) -> backends.Problem:
    """What decides which backend runs packed documents."""
    # Not their number of tokens, which would have the choice made again for every batch.
    dims = query.shape[-1], value.shape[-1]
    return backends.Problem("packed", query.device, query.dtype, *dims)


def backend_for(query: Tensor, key: Tensor, value: Tensor, name: str) -> backends.Backend | None:
    """The backend that runs packed documents, or None if none does."""
    compiling = torch.compiler.is_compiling()
    if compiling or in_forward_mode() or not is_plain((query, key, value)):
        return None
    found = backends.find(name, problem_of(query, value))
    return None if found is None or found.name != (name or found.name) else found


def packed_attention(
    backend: backends.Backend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    rule: Rule,
    scale: float,
    one_by_one: Attention,
) -> tuple[Tensor, Tensor]:
    """Output ``[1, tokens, heads, value dim]`` and LSE ``[1, tokens, heads]``.

    Args:
        query, key, value: ``[1, tokens, heads, channels]``.
        one_by_one: the same function of these three, for second derivatives.
    """
    return _PackedAttention.apply(query, key, value, backend, documents, rule, scale, one_by_one)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        query, key, value, backend, documents, rule, scale, _ = args
        out, lse = backend.packed_forward(Inputs(query, key, value), documents, rule, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.others = args[3:]
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *inputs, out, lse = ctx.saved_tensors
        backend, documents, rule, scale, one_by_one = ctx.others
        if is_composed(grads):
            found = differentiable_gradients(one_by_one, inputs, ctx.needs_input_grad[:3], grads)
        else:
            grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
            found = backend.packed_backward(
                grad_out, grads[1], Inputs(*inputs), out, lse, documents, rule, scale
            )
        return (*found[:3], *(None for _ in ctx.others))


# --- sequences: plain attention, of which the lengths are tensors -------------------------------


class Lengths(NamedTuple):
    """How long packed sequences are, as :func:`natten.attention` is told.

    Attributes:
        seqlens_q, seqlens_kv: integers ``[sequences]``.
        starts_q, starts_kv: their cumulative sums ``[sequences + 1]``.
        longest_q, longest_kv: at least the longest lengths, or -1.
    """

    seqlens_q: Tensor | None
    seqlens_kv: Tensor | None
    starts_q: Tensor | None
    starts_kv: Tensor | None
    longest_q: int = -1
    longest_kv: int = -1

    @classmethod
    def create(cls, *tensors: Tensor | None, longest: Sequence[Any]) -> Lengths | None:
        """What was given, None if nothing was.

        Raises:
            ArgumentError: something has the wrong type, or one side lacks lengths.
        """
        if all(x is None for x in tensors):
            return None
        names = "seqlens_Q", "seqlens_KV", "cumulative_seqlen_Q", "cumulative_seqlen_KV"
        for name, x in zip(names, tensors):
            if x is not None:
                check_integers(name, x)
        if all(x is None for x in tensors[::2]) or all(x is None for x in tensors[1::2]):
            given = [name for name, x in zip(names, tensors) if x is not None]
            raise ArgumentError(
                "the lengths of packed sequences must be given for `query` and for `key`, got "
                f"{' and '.join(given)} only."
            )
        numbers = []
        for name, x in zip(("max_seqlen_Q", "max_seqlen_KV"), longest):
            number = -1 if x is None else integer(x)
            if number is None or (x is not None and number < 0):
                raise ArgumentError(
                    f"`{name}` must be None or an integer from 0 on, got {type(x)}: {x!r}."
                )
            numbers.append(number)
        seqlens_q, seqlens_kv, starts_q, starts_kv = tensors
        return cls(seqlens_q, seqlens_kv, starts_q, starts_kv, *numbers)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the longest."""
        return self[:4]

    def read(self, query: Tensor, key: Tensor) -> tuple[list[int], list[int]]:
        """The lengths, which waits for the device.

        Raises:
            ArgumentError: they do not add up, or there are more of queries or of keys.
        """
        most = [None if n < 0 else n for n in (self.longest_q, self.longest_kv)]
        ours = sequence_lengths("Q", query.shape[1], self.seqlens_q, self.starts_q, most[0])
        theirs = sequence_lengths("KV", key.shape[1], self.seqlens_kv, self.starts_kv, most[1])
        if ours is None or theirs is None or len(ours) != len(theirs):
            raise ArgumentError(
                "the lengths of packed sequences must be given for `query` and for `key`, as many "
                f"each, got {ours} and {theirs}."
            )
        return ours, theirs

    def documents(self, query: Tensor, key: Tensor) -> Documents:
        """What a kernel reads. Cumulative sums with longest lengths never leave the GPU."""
        starts_q, starts_kv, most = self.starts_q, self.starts_kv, self[4:]
        if query.is_cuda and starts_q is not None and starts_kv is not None and min(most) >= 0:
            check_same_shape(
                "cumulative_seqlen_KV", starts_kv.shape, "cumulative_seqlen_Q", starts_q.shape
            )
            check_starts("Q", query.shape[1], starts_q, most[0])
            check_starts("KV", key.shape[1], starts_kv, most[1])
            return Documents.of_sequences((starts_q, starts_kv), most)
        both = self.read(query, key)
        sums = [torch.tensor([0, *accumulate(each)], device=query.device) for each in both]
        return Documents.of_sequences(sums, [max(each, default=0) for each in both])


def sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Lengths,
    rule: Dense,
    scale: float,
    choice: Choice,
) -> tuple[Tensor, Tensor]:
    """Plain attention inside each packed sequence; shapes as in :func:`packed_attention`."""
    recorded = torch.compiler.is_compiling() or _tracing.is_traced()
    # Or the tensors have no data, or what is done with them is written down.
    if recorded or has_fake((query, key, value, *lengths.tensors)) or is_recorded():
        if recorded:
            operators._refuse_forward_mode()
        if recorded and _tracing.is_for_onnx():
            return gathered(query, key, value, lengths, rule, scale)
        options = int(rule.causal), scale, choice.backend, choice.tiles or (0,)
        return ops.packed_attention(query, key, value, *lengths, *options)

    def each(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return operators.attention(Inputs(q, k, v), rule, scale, choice)

        return _one_by_one(dense, lengths, q, k, v)

    backend = backend_for(query, key, value, choice.backend)
    if backend is None:
        return each(query, key, value)
    documents = lengths.documents(query, key)
    return packed_attention(backend, query, key, value, documents, rule, scale, each)


def gathered(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, rule: Dense, scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`sequence_attention` in PyTorch's own operators, of all queries with all keys."""
    mask = _same_sequence(query, key, lengths, rule)
    return operators.composed_attention(Inputs(query, key, value), rule, scale, mask=mask)


def gathered_gradient(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    lengths: Lengths, rule: Dense, scale: float,
) -> Sequence[Any]:  # fmt: skip
    """The gradient of :func:`gathered`, of query, key and value."""
    mask, inputs = _same_sequence(query, key, lengths, rule), Inputs(query, key, value)
    return operators.gathered_gradient(grad_out, grad_lse, inputs, rule, scale, mask=mask)[:3]


def _same_sequence(query: Tensor, key: Tensor, lengths: Lengths, rule: Dense) -> Tensor:
    """Who attends whom, ``[queries, keys]``. Lengths are data, and can not be checked here."""

    def ends(seqlens: Tensor | None, starts: Tensor | None) -> Tensor:
        if starts is not None:
            return starts[1:]
        assert seqlens is not None
        return seqlens.cumsum(0)

    q, k = (torch.arange(x.shape[1], device=x.device)[:, None] for x in (query, key))
    q_ends, k_ends = ends(lengths.seqlens_q, lengths.starts_q), ends(*lengths[1:4:2])
    q_ends, k_ends = q_ends.to(query.device), k_ends.to(key.device)
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
# Lists are never empty, and is_causal is 0 or 1: some exporters know neither empty lists nor bools.
_OPTIONS = "int is_causal, float scale, str backend, SymInt[] tiles"
define(
    f"packed_attention(Tensor query, Tensor key, Tensor value, {_LENGTHS}, {_OPTIONS}) "
    "-> (Tensor, Tensor)"
)
define(
    "packed_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
    f"Tensor value, Tensor out, Tensor lse, {_LENGTHS}, {_OPTIONS}) -> Tensor[]"
)


def unpack(arguments: Sequence[Any]) -> tuple[Lengths, Dense, float, Choice]:
    *lengths, is_causal, scale, backend, tiles = arguments
    choice = Choice(backend, tuple(tiles) if any(tiles) else ())
    return Lengths(*lengths), Dense(bool(is_causal)), scale, choice


def _forward(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    lengths, rule, scale, choice = unpack(arguments)
    backend = backend_for(query, key, value, choice.backend)
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
    lengths, rule, scale, choice = unpack(arguments)
    backend = backend_for(query, key, value, choice.backend)
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
    return operators._fake_attention(query, key, value)


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
