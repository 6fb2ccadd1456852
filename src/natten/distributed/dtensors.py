"""DTensors into the functions that people know: local tensors, an ordinary call, DTensors again.

How the query is placed decides. A mesh dimension that splits its batch or its heads splits those of
the other tensors, too, and each rank makes the ordinary call. One that splits an axis of tokens
makes it a call of :func:`.sharded.attend_sharded`. What is placed otherwise is redistributed. Where
a mesh dimension splits the query and not another tensor, that one's gradient is ``Partial``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .. import functional, operators, unfused
from ..errors import ArgumentError
from ..inputs import Inputs
from ..neighborhood import Dense, Neighborhood
from ..sequences import Lengths
from ..varlen import VarlenLayout, varlen_generic
from .agreement import agree
from .meshes import ranks_of
from .sharded import attend_sharded
from .shards import chunk_sizes

# What a mesh dimension may split: an axis of tokens by its number, or what is named.
Part = int | str
# Which dimension of a tensor each part is; few tensors have all of them.
Dims = Mapping[Any, int]


class Split(NamedTuple):
    """How a call is split over a mesh.

    Attributes:
        mesh: the ranks.
        parts: for each dimension of the mesh, what it splits, or None.
    """

    mesh: DeviceMesh
    parts: tuple[Part | None, ...]

    @property
    def axes(self) -> dict[int, int]:
        """The mesh dimension of each axis of tokens that is split."""
        return dict(sorted((p, i) for i, p in enumerate(self.parts) if isinstance(p, int)))

    def placements(self, dims: Dims) -> tuple[Placement, ...]:
        """How a tensor is placed that has these parts."""
        return tuple(
            Replicate() if part is None or part not in dims else Shard(dims[part])
            for part in self.parts
        )

    def sizes(self, part: Part, n: int) -> list[int]:
        """How many of the ``n`` entries of a part each rank has, of those that differ in it."""
        return _sizes(n, self.mesh, self._dims(part))

    def span(self, part: Part, n: int) -> tuple[int, int]:
        """First and one-past-last of the ``n`` entries of a part that this rank has."""
        return _span(n, self.mesh, self._dims(part))

    def _dims(self, part: Part) -> list[int]:
        return [i for i, other in enumerate(self.parts) if other == part]

    def local(self, x: DTensor | None, dims: Dims) -> Any:
        """This rank's share of a tensor that has these parts."""
        if x is None:
            return None
        wanted = self.placements(dims)
        if x.placements != wanted:
            x = x.redistribute(placements=wanted)
        grads = [
            Partial() if part is not None and part not in dims else placement
            for part, placement in zip(self.parts, wanted)
        ]
        return x.to_local(grad_placements=grads)

    def whole(self, x: Tensor, dims: Dims, shape: Sequence[int]) -> DTensor:
        """The DTensor of a shape and of these parts, of which ``x`` is this rank's share."""
        strides = [1]
        for n in reversed(shape[1:]):
            strides.insert(0, strides[0] * max(n, 1))
        return DTensor.from_local(
            x.contiguous(), self.mesh, self.placements(dims), run_check=False,
            shape=torch.Size(shape), stride=tuple(strides),
        )  # fmt: skip


def _sizes(n: int, mesh: DeviceMesh, dims: Sequence[int]) -> list[int]:
    """How many of ``n`` entries each rank has that ``dims`` of a mesh split one after another."""
    sizes = [n]
    for dim in dims:
        sizes = [each for size in sizes for each in chunk_sizes(size, mesh.size(dim))]
    return sizes


def _span(n: int, mesh: DeviceMesh, dims: Sequence[int]) -> tuple[int, int]:
    """First and one-past-last of those that this rank has."""
    sizes, index = _sizes(n, mesh, dims), 0
    for dim in dims:
        index = index * mesh.size(dim) + mesh.get_local_rank(dim)
    first = sum(sizes[:index])
    return first, first + sizes[index]


# --- what a call is split over -------------------------------------------------------------------


def _split_of(parts: Mapping[int, Part], **tensors: Any) -> Split:
    """How a call is split: as the first of its tensors is placed.

    Args:
        parts: what each dimension of that tensor is, of those that may be split.
        tensors: all tensors of the call by the names of its arguments; some may be None.

    Raises:
        ArgumentError: some are no DTensors, their meshes differ, the first one is split in a way in
            which attention can not be, or a rank has another share than DTensor's rule gives it.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    known = next(name for name, x in given.items() if isinstance(x, DTensor))
    for name, x in given.items():
        if not isinstance(x, DTensor):
            raise ArgumentError(
                f"`{name}` must be a DTensor, because `{known}` is one. "
                "torch.distributed.tensor.distribute_tensor(x, mesh, placements) makes one of what "
                "every rank has, DTensor.from_local of what is this rank's own."
            )
        if x.device_mesh != given[known].device_mesh:
            raise ArgumentError(
                f"`{name}` must have the mesh of `{known}`, got {x.device_mesh} and "
                f"{given[known].device_mesh}."
            )
    name, first = next(iter(given.items()))
    found: list[Part | None] = []
    for placement in first.placements:
        # Of the other kinds, some are classes that derive from Shard.
        part = parts.get(placement.dim) if type(placement) is Shard else None
        is_whole = placement.is_replicate() or placement.is_partial()
        if (part is None and not is_whole) or (isinstance(part, int) and part in found):
            allowed = ", ".join(f"Shard({dim})" for dim in parts)
            raise ArgumentError(
                f"`{name}` must be placed by Replicate, Partial, {allowed}, and an axis of tokens "
                f"by one dimension of the mesh, got {first.placements} of shape "
                f"{tuple(first.shape)}; redistribute it."
            )
        found.append(part)
    split = Split(first.device_mesh, tuple(found))
    if not torch.compiler.is_compiling():  # sizes may be symbols there
        _check_shares(split, given)
    return split


@torch.no_grad()
def _check_shares(split: Split, tensors: Mapping[str, DTensor]) -> None:
    """Raise ArgumentError unless this rank has what DTensor's rule gives it.

    Where tokens are split, the other ranks are told, because they would wait for this one.
    """
    if split.mesh.get_coordinate() is None:
        raise ArgumentError(f"`{next(iter(tensors))}` must be on a mesh with this rank.")
    for name, x in tensors.items():
        wanted, got = _share(x.shape, x.device_mesh, x.placements), x.to_local().shape
        if wanted is None or wanted == got:
            continue
        error = ArgumentError(
            f"`{name}` of shape {tuple(x.shape)}, placed by {x.placements}, must be split as "
            f"torch.chunk splits, which gives this rank {wanted}, got {tuple(got)}. The functions "
            "of natten.distributed take local tensors of any `sizes`."
        )
        if split.axes:
            axes = tuple(split.axes.values())
            agree(f"na{tensors['query'].dim() - 3}d", ranks_of(split.mesh, axes).group, {}, error)
        raise error


@lru_cache(maxsize=256)
def _share(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[int, ...] | None:
    """The shape of this rank's share, None if a placement has a rule of its own."""
    if any(type(p) not in (Shard, Replicate) and not p.is_partial() for p in placements):
        return None
    spans = (
        _span(n, mesh, [i for i, p in enumerate(placements) if p.is_shard(dim)])
        for dim, n in enumerate(shape)
    )
    return tuple(last - first for first, last in spans)


def _check_heads(split: Split, query: Tensor) -> None:
    sizes = split.sizes("heads", query.shape[-2])
    if min(sizes) < 1:
        raise ArgumentError(
            "`query` must have heads for each of the ranks over which they are split, got "
            f"{query.shape[-2]}, of which the ranks have {sizes}."
        )


# --- fused attention -----------------------------------------------------------------------------


def attend(inputs: Inputs, window: Any, *options: Any) -> tuple[Tensor, Tensor]:
    """What :func:`natten.functional.attend` returns, of DTensors."""
    call = functional.check_call_of(inputs, window, *options)  # of whole shapes
    split, dims = _split_of_inputs(inputs)
    if split.axes and torch.compiler.is_compiling():  # ranks do not talk to each other in a graph
        found: Any = _attend_uncompiled(inputs, window, *options)
        return cast(tuple[Tensor, Tensor], found)
    rule = call.given or call.rule
    assert isinstance(rule, Neighborhood)
    sizes = _key_sizes(split, inputs, rule)
    local = _local_inputs(split, dims, inputs, list(split.axes))
    if not split.axes:
        return _results(split, dims, inputs, functional.attend(local, rule, *options))
    backend = call.choice.backend or None
    found = attend_sharded(
        local, rule, call.scale, backend, split.mesh, split.axes, sizes, sum_shared=False
    )
    return _results(split, dims, inputs, found)


_attend_uncompiled = torch.compiler.disable(attend)


def attend_densely(
    inputs: Inputs, lengths: Lengths | None, call: operators.Call
) -> tuple[Tensor, Tensor]:
    """What :func:`natten.attention` computes, of DTensors whose arguments were checked.

    Every rank has all keys. Where the tokens of queries are split, those of a causal call are a
    part of a layout with one window.
    """
    split, dims = _split_of_inputs(inputs)
    if lengths is not None:
        return _results(split, dims, inputs, _attend_packed(split, dims, inputs, lengths, call))
    local = _local_inputs(split, dims, inputs, ())
    assert isinstance(call.rule, Dense)
    if not (split.axes and call.rule.causal):
        own = operators.Call(call.rule, call.scale, call.choice)
        return _results(split, dims, inputs, own(local, operators.is_plain_call(local)))
    queries, keys = inputs.query.shape[1], inputs.key.shape[1]
    if queries > keys:
        raise ArgumentError(
            "`query` must have no more tokens than `key` if they are split over ranks and "
            f"`is_causal`, got {queries} and {keys}."
        )
    offset, _ = split.span(0, queries)
    rule = Neighborhood.create(1, queries, is_causal=True, query_offset=offset)
    local = local._replace(
        key=local.key[:, :queries],
        value=local.value[:, :queries],
        key_mask=None if local.key_mask is None else local.key_mask[:, :queries],
    )
    backend = call.choice.backend or None
    found = functional.attend(local, rule, call.scale, None, backend)
    return _results(split, dims, inputs, found)


def _attend_packed(
    split: Split, dims: Dims, inputs: Inputs, lengths: Lengths, call: operators.Call
) -> tuple[Tensor, Tensor]:
    """Packed sequences, of which every rank has all tokens of some heads."""
    if split.axes or "batch" in split.parts:
        raise ArgumentError(
            "`query` of packed sequences can be split over heads only, got "
            f"{inputs.query.placements}; redistribute it."  # type: ignore[attr-defined]
        )
    own = [x.full_tensor() if isinstance(x, DTensor) else x for x in lengths.tensors]
    lengths = Lengths(*own, *lengths[len(own) :])  # type: ignore[arg-type]
    return operators.sequence_attention(_local_inputs(split, dims, inputs, ()), lengths, call)


def _split_of_inputs(inputs: Inputs) -> tuple[Split, Dims]:
    """How a call of fused attention is split, and the dimensions of the query and the results."""
    rank = inputs.query.dim() - 3
    parts: dict[int, Part] = {0: "batch", **{1 + i: i for i in range(rank)}, 1 + rank: "heads"}
    split = _split_of(parts, **inputs._asdict())
    _check_heads(split, inputs.query)
    return split, {part: dim for dim, part in parts.items()}


def _local_inputs(split: Split, dims: Dims, inputs: Inputs, axes: Sequence[int]) -> Inputs:
    """This rank's inputs of fused attention; keys are split along these axes only."""
    own_axes: Dims = {axis: 1 + axis for axis in axes}
    keys: Dims = {"batch": 0, **own_axes, "heads": dims["heads"]}
    additional = {"batch": 0, "heads": 2}

    def batch_of(mask: Tensor | None) -> Dims:
        return {} if mask is None or mask.shape[0] == 1 else {"batch": 0}

    masks = {**batch_of(inputs.key_mask), **own_axes}, batch_of(inputs.additional_mask)
    each = dims, keys, keys, {"heads": 0}, additional, additional, *masks
    return _locals(split, inputs, each)


def _locals(split: Split, inputs: Inputs, dims: Sequence[Dims]) -> Inputs:
    """This rank's inputs; ``dims`` are the parts of each of them."""
    heads, kv_heads = inputs.query.shape[-2], inputs.key.shape[-2]
    # Ranks may share a head of keys, which all of them have then.
    is_shared = heads != kv_heads and kv_heads % len(split.sizes("heads", heads)) != 0
    found: dict[str, Any] = {}
    for (name, x), own in zip(inputs._asdict().items(), dims):
        selects = is_shared and x is not None and name in _WITH_HEADS_OF_KEYS
        if selects:
            own = {part: dim for part, dim in own.items() if part != "heads"}
        found[name] = split.local(x, own)
        if selects:
            found[name] = _attended_heads(found[name], heads, split.span("heads", heads))
    return Inputs(**found)


_WITH_HEADS_OF_KEYS = ("key", "value", "additional_keys", "additional_values")


def _attended_heads(x: Tensor, heads: int, own: tuple[int, int]) -> Tensor:
    """The heads of keys that a rank's queries attend.

    Args:
        x: keys or values ``[..., heads_kv, channels]``.
        heads: how many heads queries have.
        own: first and one-past-last head of the rank's queries.
    """
    attended = [head * x.shape[-2] // heads for head in range(*own)]
    first = attended[0]
    counts = [attended.count(head) for head in range(first, attended[-1] + 1)]
    if min(counts) == max(counts):
        return x.narrow(-2, first, len(counts))
    # Groups of different sizes: each head of queries has one of its own.
    parts = [x.narrow(-2, first + i, 1).repeat_interleave(n, -2) for i, n in enumerate(counts)]
    return torch.cat(parts, -2)


def _key_sizes(split: Split, inputs: Inputs, rule: Neighborhood) -> dict[int, list[int]]:
    """The keys of each rank along the axes that are split."""
    if split.axes and rule.query_offset is not None:
        raise ArgumentError(
            "`query_offset` must be None where tokens are split over ranks, which are parts of a "
            f"layout already, got {rule.query_offset}."
        )
    found = {}
    for axis, dim in split.axes.items():
        ranks, r = split.mesh.size(dim), rule.queries_per_key[axis]
        queries, keys = inputs.query.shape[1 + axis], inputs.key.shape[1 + axis]
        found[axis] = chunk_sizes(keys, ranks)
        if chunk_sizes(queries, ranks) != [r * n for n in found[axis]]:
            raise ArgumentError(
                "`query` must be split where `key` is, but torch.chunk splits "
                f"{queries} = {r} * {keys} tokens on axis {axis} elsewhere; tokens of `key` that "
                f"the {ranks} ranks divide are split alike."
            )
    return found


def _results(split: Split, dims: Dims, inputs: Inputs, results: Any) -> tuple[Tensor, Tensor]:
    """Output and LSE of the whole from those of this rank."""
    out, lse = results
    shape = inputs.query.shape[:-1]
    value_dim = inputs.value.shape[-1]
    return split.whole(out, dims, (*shape, value_dim)), split.whole(lse, dims, shape)


# --- packed documents ----------------------------------------------------------------------------


def attend_documents(
    inputs: Inputs, layout: VarlenLayout, rule: Neighborhood, lengths: Sequence[int],
    scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What :func:`natten.varlen.varlen_generic` computes, of DTensors that were checked.

    Args:
        inputs: packed tensors without a batch.
        layout: all documents; those of a rank are whole.
        rule, lengths, scale, backend: the windows, how many additional tokens each document has,
            and the other arguments.
    """
    dims: Dims = {"documents": 0, "heads": 1}
    split = _split_of({0: "documents", 1: "heads"}, **inputs._asdict())
    _check_heads(split, inputs.query)
    own = slice(*_own_documents(split, layout))
    heads: Dims = {"heads": 1}
    each: tuple[Dims, ...] = (dims, dims, dims, {"heads": 0}, heads, heads, {"documents": 0}, {})
    local = _locals(split, inputs, each)
    first, last = sum(lengths[: own.start]), sum(lengths[: own.stop])
    keys, values, mask = (
        None if x is None else x[first:last]
        for x in (local.additional_keys, local.additional_values, local.additional_mask)
    )
    found = varlen_generic(
        *local[:3], _layout(layout, own), rule.kernel_size, rule.stride, rule.dilation,
        rule.is_causal, scale, backend or None, rpb=local.rpb, boundary=rule.boundary,
        additional_keys=keys, additional_values=values,
        additional_lengths=(lengths[own] or (0,)) if lengths else None,
        key_mask=local.key_mask, additional_mask=mask, return_lse=True,
    )  # fmt: skip
    return _results(split, dims, inputs, found)


def _own_documents(split: Split, layout: VarlenLayout) -> tuple[int, int]:
    """First and one-past-last document of this rank."""
    if "documents" not in split.parts:
        return 0, len(layout)
    starts = [0, *accumulate(layout.lengths)]
    sizes = split.sizes("documents", starts[-1])
    if not set(accumulate(sizes)) <= set(starts):
        raise ArgumentError(
            "`query` must be split between documents, which none of the ranks shares with another "
            f"one, but torch.chunk gives the ranks {sizes} tokens of documents with "
            f"{list(layout.lengths)}; pad the layout with documents, or replicate it."
        )
    first, last = split.span("documents", starts[-1])
    return bisect_left(starts, first), bisect_right(starts, last) - 1


def _layout(layout: VarlenLayout, own: slice) -> VarlenLayout:
    """The layout of some documents."""
    if own == slice(0, len(layout)):
        return layout
    return _kept_layout(layout.shapes[own] or ((0,) * layout.rank,), layout.device)


@lru_cache(maxsize=64)
def _kept_layout(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> VarlenLayout:
    return VarlenLayout(shapes, device)


# --- unfused operators ---------------------------------------------------------------------------

_HEADS_FIRST: Mapping[int, Part] = {0: "batch", 1: "heads"}
_BATCH_AND_HEADS: Dims = {"batch": 0, "heads": 1}


def scores(
    query: Any, key: Any, window: Any, rpb: Any, additional_keys: Any, key_mask: Any = None,
    additional_mask: Any = None,
) -> Tensor:  # fmt: skip
    """What :func:`natten.unfused.scores` returns, of DTensors."""
    split = _split_of(
        _HEADS_FIRST, query=query, key=key, rpb=rpb, additional_keys=additional_keys,
        key_mask=key_mask, additional_mask=additional_mask,
    )  # fmt: skip
    masks = (
        split.local(x, {"batch": 0} if x is not None and x.shape[0] != 1 else {})
        for x in (key_mask, additional_mask)
    )
    found = unfused.scores(
        split.local(query, _BATCH_AND_HEADS),
        split.local(key, _BATCH_AND_HEADS),
        window,
        split.local(rpb, {"heads": 0}),
        split.local(additional_keys, _BATCH_AND_HEADS),
        *masks,
    )
    return split.whole(found, _BATCH_AND_HEADS, (*query.shape[:-1], found.shape[-1]))


def weighted_sum(attn: Any, value: Any, window: Any, additional_values: Any) -> Tensor:
    """What :func:`natten.unfused.weighted_sum` returns, of DTensors."""
    split = _split_of(_HEADS_FIRST, attn=attn, value=value, additional_values=additional_values)
    found = unfused.weighted_sum(
        split.local(attn, _BATCH_AND_HEADS),
        split.local(value, _BATCH_AND_HEADS),
        window,
        split.local(additional_values, _BATCH_AND_HEADS),
    )
    return split.whole(found, _BATCH_AND_HEADS, (*attn.shape[:-1], found.shape[-1]))
