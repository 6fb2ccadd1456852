"""Attention of a rank's queries: what is checked, what ranks agree about, and by which method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._checks import (
    check_additional,
    check_masks,
    check_qkv,
    check_rpb,
    check_scale,
    check_tensors,
)
from .._numbers import entries, integer
from ..backends import check_name
from ..errors import ArgumentError
from ..inputs import Inputs
from ..neighborhood import Neighborhood
from .agreement import agree
from .collectives import replicated
from .halo import attend_with_halo
from .heads import attend_by_heads
from .loads import fewer_bytes
from .meshes import Ranks, ranks_of
from .shards import Sharding

METHODS = {"halo": attend_with_halo, "heads": attend_by_heads}


def attend_sharded(
    inputs: Inputs,
    window: Neighborhood | tuple[Any, ...],
    scale: float | None,
    backend: str | None,
    mesh: DeviceMesh,
    shard: Mapping[int, int | str],
    sizes: Mapping[int, Sequence[int]] | None = None,
    method: str = "auto",
    with_lse: bool = True,
    sum_shared: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Output and LSE of a rank's queries; the LSE may be None if it is not wanted.

    Args:
        inputs: the rank's tensors, in autocast's dtype.
        window: a rule, or the arguments of :meth:`Neighborhood.create`, for the whole layout.
        scale, backend, mesh, shard, sizes, method: as in
            :func:`natten.distributed.neighborhood_attention_generic`.
        with_lse: whether the LSE is wanted.
        sum_shared: whether gradients of what every rank has are summed before they return.
    """
    arguments = (
        inputs, window, scale, backend, mesh, shard, sizes, method, with_lse, sum_shared,
    )  # fmt: skip
    if torch.compiler.is_compiling():  # the graph breaks here, as messages are Python's affair
        return torch.compiler.disable(_attend_sharded)(*arguments)
    return _attend_sharded(*arguments)


def _attend_sharded(
    inputs: Inputs, window: Any, scale: Any, backend: Any, mesh: Any, shard: Any, sizes: Any,
    method: str, with_lse: bool, sum_shared: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    check_tensors(query=inputs.query)
    axes = _split_axes(inputs.query.dim() - 3, mesh, shard)
    ranks = ranks_of(mesh, tuple(axes.values()))
    name = f"na{inputs.query.dim() - 3}d"
    error = None
    kind: dict[str, Any] = {}
    try:
        sharding = _sharding(inputs, window, axes, ranks, sizes)
        factor = _check(inputs, sharding, scale, backend, method, ranks)
        kind = _kind(inputs, sharding, factor, backend, method, with_lse)
    except ArgumentError as wrong:
        error = wrong
    agree(name, ranks.group, kind, error)
    coordinates = _along_axes(ranks, axes, sharding)
    if method == "auto":
        method = fewer_bytes(inputs, sharding, coordinates)
    shared = ("rpb", "additional_keys", "additional_values") if sum_shared else ()
    inputs = inputs._replace(
        **{x: replicated(getattr(inputs, x), name, ranks.group) for x in shared}
    )
    run = METHODS[method]
    return run(name, ranks.group, coordinates, sharding, inputs, (factor, None, backend), with_lse)


def _split_axes(rank: int, mesh: Any, shard: Any) -> dict[int, int]:
    """The mesh dimension that splits each axis that is split."""
    if not isinstance(mesh, DeviceMesh):
        raise ArgumentError(
            f"`mesh` must be a torch.distributed.DeviceMesh, got {type(mesh)}: {mesh!r}."
        )
    if mesh.get_coordinate() is None:
        raise ArgumentError(f"`mesh` must contain this rank, got {mesh}.")
    if not isinstance(shard, Mapping) or not shard:
        raise ArgumentError(
            "`shard` must name at least one axis and the mesh dimension that splits it, as "
            f'{{0: "space"}}, got {shard!r}.'
        )
    found: dict[int, int] = {}
    names = mesh.mesh_dim_names or ()
    for given, dim in shard.items():
        axis, number = integer(given), names.index(dim) if dim in names else integer(dim)
        if axis is None or not -rank <= axis < rank or axis % rank in found:
            raise ArgumentError(
                f"`shard` must have different axes from 0 to {rank - 1}, got {dict(shard)}."
            )
        if number is None or not -mesh.ndim <= number < mesh.ndim:
            raise ArgumentError(
                f"`shard` must map axes to dimensions of the mesh, 0 to {mesh.ndim - 1} or one of "
                f"{names}, got {dict(shard)}."
            )
        found[axis % rank] = number % mesh.ndim
    if len(set(found.values())) < len(found):
        raise ArgumentError(
            f"`shard` must map every axis to a mesh dimension of its own, got {dict(shard)}."
        )
    return dict(sorted(found.items()))


def _sharding(
    inputs: Inputs, window: Any, axes: Mapping[int, int], ranks: Ranks, sizes: Any
) -> Sharding:
    """The whole layout."""
    query, key = inputs.query, inputs.key
    check_tensors(query=query, key=key, value=inputs.value)
    rank = query.dim() - 3
    if rank not in (1, 2, 3) or key.dim() != query.dim():
        raise ArgumentError(
            "`query` and `key` must be [batch, *space, heads, head_dim] with 1 to 3 axes of "
            f"tokens, got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    rule = window if isinstance(window, Neighborhood) else Neighborhood.create(rank, *window)
    given = _sizes(sizes, axes)
    me = ranks.coordinates[ranks.group.rank()]
    found: list[tuple[int, ...]] = [(n,) for n in key.shape[1:-2]]
    for i, axis in enumerate(axes):
        count = 1 + max(at[i] for at in ranks.coordinates)
        local = key.shape[1 + axis]
        found[axis] = given.get(axis, (local,) * count)
        if len(found[axis]) != count:
            raise ArgumentError(
                f"`sizes` must have one number for each of the {count} ranks along axis {axis}, "
                f"got {found[axis]}."
            )
        if found[axis][me[i]] != local:
            raise ArgumentError(
                f"`key` must have the tokens that `sizes` gives this rank along axis {axis}, "
                f"{found[axis][me[i]]}, got {tuple(key.shape)}."
            )
    for axis, (n, keys, r) in enumerate(
        zip(query.shape[1:-2], key.shape[1:-2], rule.queries_per_key)
    ):
        if n != r * keys:
            raise ArgumentError(
                "`query` must have `queries_per_key` times the tokens of `key` on every rank, got "
                f"{tuple(query.shape)} for {r} times {tuple(key.shape)} on axis {axis}."
            )
    sharding = Sharding(rule, tuple(found))
    shape = tuple(r * n for r, n in zip(rule.queries_per_key, sharding.shape))
    rule.check(shape, sharding.shape)
    return sharding


def _sizes(sizes: Any, axes: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    if sizes is None:
        return {}
    if not isinstance(sizes, Mapping) or not axes.keys() >= sizes.keys():
        raise ArgumentError(
            f"`sizes` must be a dict whose axes are among those of `shard`, {list(axes)}, got "
            f"{sizes!r}."
        )
    found = {}
    for axis, given in sizes.items():
        numbers = tuple(integer(n) for n in entries(given) or (None,))
        if None in numbers or min(numbers) < 0:
            raise ArgumentError(
                f"`sizes` must have the tokens of each rank, at least 0, got {given!r} for axis "
                f"{axis}."
            )
        found[axis] = numbers
    return found


def _check(
    inputs: Inputs, sharding: Sharding, scale: Any, backend: Any, method: Any, ranks: Ranks
) -> float:
    """Check the other arguments, and return the scale."""
    query, key, value, rpb, additional_keys, additional_values, key_mask, additional_mask = inputs
    check_qkv(query, key, value)
    check_additional(query, key, value, additional_keys, additional_values)
    check_masks(key, additional_keys, key_mask, additional_mask)
    check_rpb(rpb, query, sharding.rule, heads=query.shape[-2])
    check_name(backend)
    if method not in ("auto", *METHODS):
        raise ArgumentError(f"`method` must be one of {('auto', *METHODS)}, got {method!r}.")
    count = ranks.group.size()
    if method == "heads" and key.shape[-2] % count:
        raise ArgumentError(
            f'`method="heads"` needs heads that the {count} ranks divide, got {query.shape[-2]} '
            f'heads of queries and {key.shape[-2]} of keys; `method="halo"` takes any number.'
        )
    return check_scale(scale, query.shape[-1])


def _kind(
    inputs: Inputs, sharding: Sharding, scale: float, backend: Any, method: str, with_lse: bool
) -> dict[str, Any]:
    """What has to be the same on every rank."""
    kind: dict[str, Any] = {
        "key": sharding.shape,
        "sizes": sharding.sizes,
        "kernel_size, stride, dilation, is_causal, boundary, queries_per_key": sharding.rule,
        "scale": scale,
        "backend": backend,
        "method": method,
        "return_lse": with_lse,
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
    }
    rank = sharding.rule.rank
    for name, x in zip(Inputs._fields, inputs):
        if x is None:
            kind[name] = None
            continue
        has_tokens = name in ("query", "key", "value", "key_mask")
        shape = (len(x), *x.shape[1 + rank :]) if has_tokens else tuple(x.shape)
        kind[name] = (shape, str(x.dtype), x.device.type, x.requires_grad)
    return kind


def _along_axes(
    ranks: Ranks, axes: Mapping[int, int], sharding: Sharding
) -> tuple[tuple[int, ...], ...]:
    """The coordinates of every rank along all axes, 0 along those that are not split."""
    places = list(axes)
    return tuple(
        tuple(at[places.index(i)] if i in axes else 0 for i in range(sharding.rule.rank))
        for at in ranks.coordinates
    )
