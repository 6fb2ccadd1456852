"""The public functions: neighborhood attention, plain attention, packed sequences, merging.

Fused operators (``na1d``, ``na2d``, ``na3d``) are heads-last and take one call. Unfused operators
(:mod:`natten.unfused`) are heads-first and expose the attention weights: ``na*d_qk``, then softmax,
then ``na*d_av``.

Methods: Hassani et al., "Neighborhood Attention Transformer" (2023), "Dilated Neighborhood
Attention Transformer" (2022), "Faster Neighborhood Attention" (2024), "Generalized Neighborhood
Attention" (2025).
"""

from __future__ import annotations

import functools
import marshal
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import torch
from torch import Tensor

from . import _dtensors, operators, tuning
from ._checks import (
    autocast_tensors,
    check_additional,
    check_hints,
    check_masks,
    check_qkv,
    check_rpb,
    check_same,
    check_same_shape,
    check_scale,
    check_tensors,
    check_tiles,
    check_value_layout,
    warn_of_heads_first,
)
from ._hints import DenseHints, Hints
from ._keywords import check_call, signature_of
from ._numbers import entries, truth
from ._ranks import of_rank
from ._tracing import unscriptable
from ._warnings import warn
from .backends import check_name
from .errors import ArgumentError
from .inputs import Inputs
from .neighborhood import Boundary, Causal, Dense, Dimension, Neighborhood
from .sequences import Lengths
from .softmax import softmax_with_lse
from .unfused import (
    na1d_av,
    na1d_qk,
    na1d_qk_with_bias,
    na2d_av,
    na2d_qk,
    na2d_qk_with_bias,
    na3d_av,
    na3d_qk,
    na3d_qk_with_bias,
)
from .varlen import na1d_varlen, na2d_varlen, na3d_varlen

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "attention",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na1d_qk_with_bias",
    "na1d_varlen",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_qk_with_bias",
    "na2d_varlen",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na3d_qk_with_bias",
    "na3d_varlen",
    "neighborhood_attention_generic",
]


@overload
def neighborhood_attention_generic(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: Dimension, stride: Dimension = ...,
    dilation: Dimension = ..., is_causal: Causal | None = ..., scale: float | None = ...,
    additional_keys: Tensor | None = ..., additional_values: Tensor | None = ...,
    *, backend: str | None = ..., rpb: Tensor | None = ...,
    query_offset: Dimension | None = ..., queries_per_key: Dimension = ...,
    boundary: Boundary = ..., key_mask: Tensor | None = ..., additional_mask: Tensor | None = ...,
    return_lse: Literal[False] = ..., **hints: Unpack[Hints],
) -> Tensor: ...  # fmt: skip
@overload
def neighborhood_attention_generic(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: Dimension, stride: Dimension = ...,
    dilation: Dimension = ..., is_causal: Causal | None = ..., scale: float | None = ...,
    additional_keys: Tensor | None = ..., additional_values: Tensor | None = ...,
    *, backend: str | None = ..., rpb: Tensor | None = ...,
    query_offset: Dimension | None = ..., queries_per_key: Dimension = ...,
    boundary: Boundary = ..., key_mask: Tensor | None = ..., additional_mask: Tensor | None = ...,
    return_lse: Literal[True], **hints: Unpack[Hints],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def neighborhood_attention_generic(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: Dimension, stride: Dimension = ...,
    dilation: Dimension = ..., is_causal: Causal | None = ..., scale: float | None = ...,
    additional_keys: Tensor | None = ..., additional_values: Tensor | None = ...,
    *, backend: str | None = ..., rpb: Tensor | None = ...,
    query_offset: Dimension | None = ..., queries_per_key: Dimension = ...,
    boundary: Boundary = ..., key_mask: Tensor | None = ..., additional_mask: Tensor | None = ...,
    return_lse: bool, **hints: Unpack[Hints],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@unscriptable
def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Dimension,
    stride: Dimension = 1,
    dilation: Dimension = 1,
    is_causal: Causal | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    backward_kv_splits: Sequence[int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
    *,
    rpb: Tensor | None = None,
    query_offset: Dimension | None = None,
    queries_per_key: Dimension = 1,
    boundary: Boundary = "shift",
    key_mask: Tensor | None = None,
    additional_mask: Tensor | None = None,
    xformers_kwargs: dict[str, Any] | None = None,
    try_fuse_additional_kv: bool = False,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention over 1-D, 2-D or 3-D token layouts; ``query`` decides the rank.

    Args:
        query: ``[batch, *space, heads, head_dim]``, floating point, with any strides.
        key: ``[batch, *space, heads_kv, head_dim]``; ``heads`` is a multiple of ``heads_kv``. With
            ``query_offset`` or ``queries_per_key`` it has a token layout of its own.
        value: ``[batch, *space, heads_kv, value_dim]``, the token layout of ``key``.
        kernel_size: tokens in the window, one number for all axes or one per axis.
        stride: how many queries share a window. 1 gives sliding windows, and ``kernel_size`` gives
            blocks that attend themselves.
        dilation: step between the tokens of a window.
        is_causal: whether a query attends no later tokens, per axis.
        scale: factor on the scores; None means ``head_dim ** -0.5``.
        additional_keys, additional_values: keys and values that every query attends in the same
            softmax, ``[batch, num_additional, heads_kv, head_dim or value_dim]``.
        rpb: trainable relative positional bias ``[heads, 2 * kernel_size - 1, ...]``.
        query_offset: for queries that are a part of the layout, the number of queries before them,
            one number for all axes or one per axis, 0 too. None: the queries are the whole layout.
        queries_per_key: how many times as fine as keys queries are. Query ``x`` of an axis has the
            window of the key at ``(query_offset + x) // queries_per_key``.
        boundary: what windows do at the ends of an axis: ``"shift"`` inwards and keep their size,
            ``"truncate"``, or go on at the other end (``"circular"``). A truncated window may
            exceed the axis; a circular axis is a multiple of ``stride * dilation`` and not causal.
        key_mask: bool ``[batch or 1, *space]`` of the key's tokens, True where a key may be
            attended. A mask takes keys away and moves no window. Masked keys and values may hold
            anything, NaN too. A query with nothing left gives output 0, LSE -inf and no gradients.
        additional_mask: bool ``[batch or 1, num_additional]``, the same of additional tokens.
        return_lse: also return the LSE, the logarithm of the sum of the scores' exponentials.
        backend: None, or the name of a backend; upstream's names are accepted, without effect.
        q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape: tiles of queries
            and of keys of the forward and of the backward pass, one size per axis. They replace the
            tiles that a cost model chooses; a backend that has no such tiles ignores them.
        attention_kwargs, backward_kv_splits, backward_use_pt_reduction, run_persistent_kernel,
        kernel_schedule, torch_compile, xformers_kwargs (0.17.5), try_fuse_additional_kv (0.20):
            accepted, without effect.

    Returns:
        ``[batch, *space, heads, value_dim]``; with ``return_lse`` also the LSE (natural logarithm)
        ``[batch, *space, heads]`` in float32, or in float64 for float64 inputs. Both are
        differentiable.

    Raises:
        ArgumentError: an argument has a type, shape, dtype, device or value that is not allowed.

    Example:
        >>> q, k, v = (torch.randn(1, 8, 8, 2, 16) for _ in range(3))
        >>> neighborhood_attention_generic(q, k, v, kernel_size=(3, 5), dilation=(2, 1)).shape
        torch.Size([1, 8, 8, 2, 16])
    """
    if unknown:
        check_call("neighborhood_attention_generic", GENERIC, (), unknown)
    query, key, value, additional_keys, additional_values = autocast_tensors(
        query, key, value, additional_keys, additional_values
    )
    out, lse = attend(
        Inputs(
            query, key, value, rpb, additional_keys, additional_values, key_mask, additional_mask
        ),
        (kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset),
        scale, attention_kwargs, backend, q_tile_shape, kv_tile_shape, backward_q_tile_shape,
        backward_kv_tile_shape,
    )  # fmt: skip
    return (out, lse) if return_lse else out


GENERIC = signature_of(neighborhood_attention_generic)
neighborhood_attention_generic.__signature__ = GENERIC  # type: ignore[attr-defined]

# The arguments that make the rule, in the order of :meth:`Neighborhood.create`.
WINDOW = (
    "kernel_size", "stride", "dilation", "is_causal", "boundary", "queries_per_key", "query_offset",
)  # fmt: skip
_OFFSET = WINDOW.index("query_offset")


class _Calls(tuning.Bounded):
    """Calls of a kind, by the part of a layout that each has, None if it has none."""

    last: tuple[Any, operators.Call]  # a part and its call, the newest ones

    def keep(self, part: Any, call: operators.Call) -> None:
        super().keep(part, call)
        self.last = part, call


# Calls repeat, and checking each of them again would take longer than a small kernel runs. Of a
# kind, a few parts of a layout may take turns.
_calls = tuning.Kept()
_KEPT_PARTS = 16


def attend(
    inputs: Inputs, window: Neighborhood | tuple[Any, ...], *options: Any
) -> tuple[Tensor, Tensor]:
    """Output and LSE of fused attention.

    Args:
        inputs: the tensors, in autocast's dtype.
        window: a rule, or the arguments of :meth:`Neighborhood.create`, which are checked.
        options: the arguments of :func:`check_call_of` after the window.
    """
    plain = operators.is_plain_call(inputs)
    if not plain and _dtensors.has_dtensor(inputs):
        results: tuple[Tensor, Tensor] = _dtensors.runner().attend(inputs, window, *options)
        return results
    kind, part = _kind_and_part(inputs, window, options) if plain else (None, None)
    # Compiled code does not look at what is kept, or it would be compiled again for all that is.
    kept: _Calls | None = None if kind is None else _calls.get(kind)
    if kept is None:
        call = check_call_of(inputs, window, *options)
        if kind is not None and _is_known(window) and _is_builtin(options):
            kept = _Calls(_KEPT_PARTS)
            kept.keep(part, call)
            _calls.keep(kind, kept)
        return call(inputs, plain)
    known = kept.get(part)
    if known is None:  # a cache or a part moves from call to call
        assert part is not None and not isinstance(window, Neighborhood)
        before, last = kept.last
        if part[2] != part[3]:
            check_value_layout(inputs.key, inputs.value)
        offset, is_resized = window[_OFFSET], part[1] != before[1] or part[2] != before[2]
        known = last.moved(offset, inputs, is_resized)
        if part[1] != before[1]:
            warn_of_heads_first(inputs.query)
        if known.rule.offset is offset or _is_builtin(offset):
            kept.keep(part, known)
    return known(inputs, plain)


def _kind_and_part(
    inputs: Inputs, window: Any, options: tuple[Any, ...]
) -> tuple[Any | None, Any | None]:
    """Hashable keys of all that checks and backends look at. The second one is of queries that are
    a part of a layout: their offset and the token layouts, in which calls of a kind may differ.

    None if something else may matter, so that the call can not be recognized.
    """
    try:
        # The arguments become bytes, because 1, 1.0 and True are equal and lists have no hash.
        # Objects of other than builtin types may have the same bytes and different types.
        kinds: list[Any] = [
            None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in inputs
        ]
        if isinstance(window, Neighborhood):
            return (window, marshal.dumps(options, 2), *kinds), None
        if window[_OFFSET] is None:
            return (marshal.dumps((window, options), 2), *kinds), None
        part = marshal.dumps(window[_OFFSET], 2), *[x.shape for x in inputs[:3]]
        kinds[:3] = [(len(s), s[0], s[-2], s[-1], *others) for s, *others in kinds[:3]]
        return (marshal.dumps((window[:_OFFSET], options), 2), *kinds), part
    # Nested tensors have no shape, some tensors too few sizes, and some objects no bytes.
    except (RuntimeError, ValueError, IndexError):
        return None, None


def _is_builtin(x: Any) -> bool:
    if type(x) in (tuple, list):
        return all(map(_is_builtin, x))
    return x is None or type(x) in (bool, int, float, str)


def _is_known(window: Any) -> bool:
    return isinstance(window, Neighborhood) or _is_builtin(window)


def check_call_of(
    inputs: Inputs, window: Neighborhood | tuple[Any, ...], scale: Any = None,
    attention_kwargs: Any = None, backend: Any = None, q_tile_shape: Any = None,
    kv_tile_shape: Any = None, backward_q_tile_shape: Any = None,
    backward_kv_tile_shape: Any = None, **_: Any,
) -> operators.Call:  # fmt: skip
    """Check the arguments of :func:`attend`, and return its call."""
    query, key, value, rpb, additional_keys, additional_values, key_mask, additional_mask = inputs
    check_tensors(query=query, key=key, value=value)
    rank = query.dim() - 3
    if rank not in (1, 2, 3):
        raise ArgumentError(
            "`query` must be [batch, *space, heads, head_dim] with 1 to 3 axes of tokens, "
            f"got {tuple(query.shape)}."
        )
    rule = window if isinstance(window, Neighborhood) else _rule_of(rank, *window)
    check_qkv(query, key, value)
    rule.check(query.shape[1:-2], key.shape[1:-2])
    warn_of_heads_first(query)
    check_additional(query, key, value, additional_keys, additional_values)
    check_masks(key, additional_keys, key_mask, additional_mask)
    check_rpb(rpb, query, rule, heads=query.shape[-2])
    check_hints(attention_kwargs)
    factor, name = check_scale(scale, query.shape[-1]), check_name(backend)
    tiles = check_tiles(
        rank,
        q_tile_shape=q_tile_shape,
        kv_tile_shape=kv_tile_shape,
        backward_q_tile_shape=backward_q_tile_shape,
        backward_kv_tile_shape=backward_kv_tile_shape,
    )
    if torch.compiler.is_compiling():  # the operator does it, which knows the sizes
        return operators.Call(rule, factor, operators.Choice(name, tiles))
    simple = operators.simplified(rule, inputs)
    return operators.Call(simple, factor, operators.Choice(name, tiles), rule)


def _rule_of(rank: int, kernel_size: Any, stride: Any, dilation: Any, *others: Any) -> Neighborhood:
    if _is_bool(dilation):
        raise ArgumentError(
            f"`dilation`, the sixth argument, must be integers, got {dilation!r}. Code written for "
            "NATTEN 0.17 passes `is_causal` there; natten.compat.v017 has that order."
        )
    return Neighborhood.create(rank, kernel_size, stride, dilation, *others)


def _is_bool(value: Any) -> bool:
    given = entries(value)
    given = (value,) if given is None else given
    return len(given) > 0 and all(truth(entry) is not None for entry in given)


_FUSED = """Fused {rank}-D neighborhood attention.

    {arguments}

    Example:
        >>> q, k, v = (torch.randn(1, {sizes}, 2, 16) for _ in range(3))
        >>> {name}(q, k, v, kernel_size={kernel}).shape
        torch.Size([1, {sizes}, 2, 16])
"""

na1d = of_rank(1, "na1d", neighborhood_attention_generic, _FUSED)
na2d = of_rank(2, "na2d", neighborhood_attention_generic, _FUSED)
na3d = of_rank(3, "na3d", neighborhood_attention_generic, _FUSED)


# --- plain attention, packed sequences, merging ---


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = ..., scale: float | None = ...,
    seqlens_Q: Tensor | None = ..., seqlens_KV: Tensor | None = ...,
    cumulative_seqlen_Q: Tensor | None = ..., cumulative_seqlen_KV: Tensor | None = ...,
    max_seqlen_Q: int | None = ..., max_seqlen_KV: int | None = ...,
    *, backend: str | None = ..., key_mask: Tensor | None = ..., return_lse: Literal[False] = ...,
    **hints: Unpack[DenseHints],
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = ..., scale: float | None = ...,
    seqlens_Q: Tensor | None = ..., seqlens_KV: Tensor | None = ...,
    cumulative_seqlen_Q: Tensor | None = ..., cumulative_seqlen_KV: Tensor | None = ...,
    max_seqlen_Q: int | None = ..., max_seqlen_KV: int | None = ...,
    *, backend: str | None = ..., key_mask: Tensor | None = ..., return_lse: Literal[True],
    **hints: Unpack[DenseHints],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = ..., scale: float | None = ...,
    seqlens_Q: Tensor | None = ..., seqlens_KV: Tensor | None = ...,
    cumulative_seqlen_Q: Tensor | None = ..., cumulative_seqlen_KV: Tensor | None = ...,
    max_seqlen_Q: int | None = ..., max_seqlen_KV: int | None = ...,
    *, backend: str | None = ..., key_mask: Tensor | None = ..., return_lse: bool,
    **hints: Unpack[DenseHints],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@unscriptable
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
    *,
    key_mask: Tensor | None = None,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain attention, heads-last; over packed sequences when their lengths are given.

    Args:
        query: ``[batch, length, heads, head_dim]``.
        key, value: ``[batch, length_kv, heads_kv, head_dim or value_dim]``.
        is_causal: whether query ``i`` attends only keys ``0 .. i`` (aligned top-left).
        scale: factor on the scores; None means ``head_dim ** -0.5``.
        seqlens_Q, seqlens_KV: integers ``[sequences]``. With them the batch size is 1, and the
            batch entry holds sequences one after another, each of which attends only itself.
            Reading the lengths waits for the device.
        cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV: the same lengths as
            cumulative sums ``[sequences + 1]``, and the longest length of each.
        return_lse: also return the LSE, the logarithm of the sum of the scores' exponentials.
        key_mask: bool ``[batch or 1, length_kv]``, True where a key may be attended. It is not for
            packed sequences, whose lengths say which keys there are.
        backend, q_tile_size, kv_tile_size, backward_q_tile_size, backward_kv_tile_size: as backend
            and tile shapes of :func:`neighborhood_attention_generic`.
        backward_kv_splits, backward_use_pt_reduction, run_persistent_kernel, kernel_schedule,
        torch_compile: accepted, without effect.

    Returns:
        ``[batch, length, heads, value_dim]``; with ``return_lse`` also the LSE
        ``[batch, length, heads]``. A query with nothing to attend gets output 0 and LSE -inf.

    Raises:
        ArgumentError: an argument has a type, shape, dtype, device or value that is not allowed.

    Example:
        >>> q, k, v = (torch.randn(1, 7, 2, 16) for _ in range(3))
        >>> lengths = torch.tensor([3, 4])
        >>> attention(q, k, v, seqlens_Q=lengths, seqlens_KV=lengths).shape
        torch.Size([1, 7, 2, 16])
    """
    if unknown:
        check_call("attention", ATTENTION, (), unknown)
    inputs, lengths, call = check_attention(
        query, key, value, is_causal, scale, seqlens_Q, seqlens_KV, cumulative_seqlen_Q,
        cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV, backend, q_tile_size, kv_tile_size,
        backward_q_tile_size, backward_kv_tile_size, key_mask,
    )  # fmt: skip
    plain = operators.is_plain_call(inputs)
    if not plain and _dtensors.has_dtensor(inputs):
        out, lse = _dtensors.runner().attend_densely(inputs, lengths, call)
    elif lengths is None:
        out, lse = call(inputs, plain)
    else:
        out, lse = operators.sequence_attention(inputs, lengths, call)
    return (out, lse) if return_lse else out


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: Any = False, scale: Any = None,
    seqlens_Q: Any = None, seqlens_KV: Any = None, cumulative_seqlen_Q: Any = None,
    cumulative_seqlen_KV: Any = None, max_seqlen_Q: Any = None, max_seqlen_KV: Any = None,
    backend: Any = None, q_tile_size: Any = None, kv_tile_size: Any = None,
    backward_q_tile_size: Any = None, backward_kv_tile_size: Any = None, key_mask: Any = None,
    **_: Any,
) -> tuple[Inputs, Lengths | None, operators.Call]:  # fmt: skip
    """Check the arguments of :func:`attention`, and return what the call computes."""
    check_tensors(query=query, key=key, value=value)
    query, key, value = autocast_tensors(query, key, value)
    if query.dim() != 4:
        raise ArgumentError(
            f"`query` must be [batch, length, heads, head_dim], got {tuple(query.shape)}."
        )
    causal = truth(is_causal)
    if causal is None:
        raise ArgumentError(f"`is_causal` must be a bool, got {type(is_causal)}.")
    check_qkv(query, key, value)
    check_masks(key, None, key_mask, None)
    factor, name = check_scale(scale, query.shape[-1]), check_name(backend)
    tiles = check_tiles(
        1,
        q_tile_size=q_tile_size,
        kv_tile_size=kv_tile_size,
        backward_q_tile_size=backward_q_tile_size,
        backward_kv_tile_size=backward_kv_tile_size,
    )
    lengths = Lengths.create(
        seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV,
        longest=(max_seqlen_Q, max_seqlen_KV),
    )  # fmt: skip
    if lengths is not None and query.shape[0] != 1:
        raise ArgumentError(
            f"`query` must have batch size 1 when sequences are packed, got {query.shape[0]}."
        )
    if lengths is not None and key_mask is not None:
        raise ArgumentError(
            "`key_mask` is not for packed sequences, whose lengths say which keys there are."
        )
    call = operators.Call(Dense(causal), factor, operators.Choice(name, tiles))
    return Inputs(query, key, value, key_mask=key_mask), lengths, call


ATTENTION = signature_of(attention)
attention.__signature__ = ATTENTION  # type: ignore[attr-defined]


@unscriptable
def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
    **unknown: NoReturn,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from attention over each set.

    This is plain autograd: the gradient reaches every part through its output and its LSE, and no
    input is changed.

    Args:
        outputs: one or more outputs ``[batch, *space, heads, value_dim]`` of the same queries.
        lse_tensors: one LSE ``[batch, *space, heads]`` for each output. -inf says that a query
            has nothing to attend in that part; so does +inf, which flash attention writes there.
        torch_compile: accepted, without effect.
        use_autograd_fix: accepted, without effect. Upstream overwrites the parts' tensors in the
            backward, for operators that ignore the gradient of their LSE. With plain autograd,
            parts that such operators of other libraries made get a wrong gradient. A part whose
            output requires a gradient while its LSE does not is such a part, and a warning says so.

    Returns:
        The merged output and its LSE.

    Raises:
        ArgumentError: the lists are empty, differ in length, or their shapes do not fit.

    Example:
        >>> q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
        >>> halves = [
        ...     attention(q, k[:, i : i + 3], v[:, i : i + 3], return_lse=True) for i in (0, 3)
        ... ]
        >>> out, lse = merge_attentions(*zip(*halves))
        >>> torch.allclose(out, attention(q, k, v), atol=1e-6)
        True
    """
    if unknown:
        check_call("merge_attentions", _MERGE, (), unknown)
    for name, given in (("outputs", outputs), ("lse_tensors", lse_tensors)):
        if not isinstance(given, (list, tuple)):
            raise ArgumentError(f"`{name}` must be a list or tuple of tensors, got {type(given)}.")
    if not outputs or len(outputs) != len(lse_tensors):
        raise ArgumentError(
            "`outputs` and `lse_tensors` must be equally many, at least one, got "
            f"{len(outputs)} and {len(lse_tensors)}."
        )
    for out, lse in zip(outputs, lse_tensors):
        check_tensors(outputs=out, lse_tensors=lse)
        check_same_shape("outputs", out.shape, "outputs[0]", outputs[0].shape)
        check_same_shape("lse_tensors", lse.shape, "outputs[0]", outputs[0].shape[:-1])
        check_same("outputs", out, "outputs[0]", outputs[0])
        if lse.device != out.device:
            raise ArgumentError(
                "`lse_tensors` must be on the device of `outputs`, got "
                f"{lse.device} and {out.device}."
            )
        if out.requires_grad and not lse.requires_grad and torch.is_grad_enabled():
            warn(
                "merge_attentions got an output that requires a gradient with an LSE that does "
                "not: if the LSE depends on trained tensors, their gradient is incomplete"
            )
    dtype = functools.reduce(
        torch.promote_types, [x.dtype for x in (*outputs, *lse_tensors)], torch.float32
    )
    exponents = torch.stack([x.to(dtype) for x in lse_tensors])
    exponents = exponents.masked_fill(exponents == math.inf, -math.inf)
    # The weights come from a softmax. As exp(LSE - merged LSE) they would not add up to one where
    # the LSE is large.
    weights, lse = softmax_with_lse(exponents, dim=0)
    merged = sum(out.to(dtype) * weight[..., None] for out, weight in zip(outputs, weights))
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype), lse


_MERGE = signature_of(merge_attentions)
merge_attentions.__signature__ = _MERGE  # type: ignore[attr-defined]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Names that other programs import from here, which the package adds."""
