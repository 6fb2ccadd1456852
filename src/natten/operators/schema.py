"""The operators' arguments: how a rule and a choice of backend are written in a schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .._library import define
from ..neighborhood import BOUNDARIES, Dense, Neighborhood, Rule

# Lists of integers that are never empty, which every consumer of a schema takes: torch.jit.trace
# knows no bool[], AOTInductor passes None for an empty list. pack and unpack know what is in them.
RULE = (
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] dilation, SymInt[] is_causal, "
    "SymInt[] boundary, SymInt[] queries_per_key, SymInt[] query_offset"
)
RULE_ARGUMENTS = 7
CHOICE = "str backend, SymInt[] tiles"
INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor? additional_keys, "
    "Tensor? additional_values, Tensor? key_mask, Tensor? additional_mask"
)

define(f"attention({INPUTS}, {RULE}, float scale, {CHOICE}) -> (Tensor, Tensor)")
define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {INPUTS}, "
    f"{RULE}, float scale, {CHOICE}) -> Tensor[]"
)
define(f"qk(Tensor query, Tensor key, {RULE}) -> Tensor")
define(f"av(Tensor attn, Tensor value, {RULE}) -> Tensor")
define(f"av_transposed(Tensor attn, Tensor x, SymInt[] key_shape, {RULE}) -> Tensor")
define(f"rpb_bias(Tensor rpb, SymInt[] shape, SymInt[] key_shape, {RULE}) -> Tensor")
define(f"rpb_bias_transposed(Tensor grad, SymInt[] key_shape, {RULE}) -> Tensor")


def pack(rule: Rule) -> tuple[Sequence[int], ...]:
    """A rule as operator arguments; plain attention has the window 0, no offset is -1."""
    if isinstance(rule, Dense):
        return [0], [0], [0], [int(rule.causal)], [0], [1], [-1]
    return (
        rule.kernel_size, rule.stride, rule.dilation, [int(c) for c in rule.is_causal],
        [BOUNDARIES.index(b) for b in rule.boundary], rule.queries_per_key,
        [-1] if rule.query_offset is None else rule.query_offset,
    )  # fmt: skip


def unpack(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
    boundary: Sequence[int],
    queries_per_key: Sequence[int],
    query_offset: Sequence[int],
) -> Any:
    """The rule of operator arguments."""
    causal = tuple(map(bool, is_causal))
    if not has_window(kernel_size):
        return Dense(causal[0])
    return Neighborhood(
        tuple(kernel_size), tuple(stride), tuple(dilation), causal,
        tuple([BOUNDARIES[b] for b in boundary]), tuple(queries_per_key),
        None if query_offset[0] < 0 else tuple(query_offset),
    )  # fmt: skip


def has_window(kernel_size: Sequence[int]) -> bool:
    """Whether an operator's argument is that of a neighborhood, not of plain attention."""
    return any(kernel_size)


class Choice(NamedTuple):
    """Which backend is asked for, and with which tiles; "" and () leave the choice.

    ``tiles`` are sizes along every axis, of tiles of queries and of keys in the forward pass, and
    of both in the backward pass; 0 leaves the choice.
    """

    backend: str = ""
    tiles: tuple[int, ...] = ()


ANY = Choice()


def pack_choice(choice: Choice) -> tuple[str, Sequence[int]]:
    return choice.backend, choice.tiles or [0]


def unpack_choice(backend: str, tiles: Sequence[int]) -> Choice:
    return Choice(backend, tuple(tiles) if any(tiles) else ())
