"""Neighborhood attention over token layouts that are split over several ranks.

Every rank gives its own queries, keys and values, and gets the output of its own queries, with the
numbers that one device would compute, forward and backward. Masks, borders, strides and dilation
count in the whole layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NoReturn

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._checks import autocast_tensors
from .._keywords import check_call, signature_of
from .._ranks import of_rank
from .._submodules import getter
from .._tracing import unscriptable
from ..inputs import Inputs
from ..neighborhood import Boundary, Causal, Dimension
from .planning import Plan, plan
from .sharded import attend_sharded

__all__ = ["Plan", "na1d", "na2d", "na3d", "neighborhood_attention_generic", "plan"]

Method = Literal["auto", "halo", "heads"]


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
    *,
    mesh: DeviceMesh,
    shard: Mapping[int, int | str],
    sizes: Mapping[int, Sequence[int]] | None = None,
    method: Method = "auto",
    rpb: Tensor | None = None,
    queries_per_key: Dimension = 1,
    boundary: Boundary = "shift",
    key_mask: Tensor | None = None,
    additional_mask: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention over a layout that is split over ranks; ``query`` decides the rank.

    Every rank of ``mesh`` calls it, with equal arguments but for the tensors' data. The first call
    of a kind compares shapes, dtypes and options of all ranks.

    Args:
        query: this rank's ``[batch, *space, heads, head_dim]``, floating point.
        key: this rank's ``[batch, *space, heads_kv, head_dim]``.
        value: this rank's ``[batch, *space, heads_kv, value_dim]``.
        kernel_size, stride, dilation, is_causal, scale, boundary, backend: as those of
            :func:`natten.neighborhood_attention_generic`, for the whole layout.
        additional_keys, additional_values: the same tensors on every rank, ``[batch,
            num_additional, heads_kv, head_dim or value_dim]``. Their gradients are summed over the
            ranks that share the layout.
        mesh: the ranks.
        shard: for each axis of tokens that is split, the dimension of ``mesh`` that splits it, by
            number or name.
        sizes: for axes whose ranks have different numbers of tokens, the keys of each rank, which
            may be 0. Axes that are not named are split evenly.
        method: ``"halo"`` gets keys and values that windows reach from the ranks that have them.
            ``"heads"`` spreads heads over ranks instead of tokens, whose number has to divide
            ``heads_kv``. ``"auto"`` takes the one that moves fewer bytes.
        rpb: trainable relative positional bias, the same on every rank,
            ``[heads, 2 * kernel_size - 1, ...]``. Its gradient is summed like that of
            ``additional_keys``.
        queries_per_key: how many times as fine as keys queries are, on every rank.
        key_mask: bool ``[batch or 1, *space]`` of this rank's keys, True where a key may be
            attended.
        additional_mask: bool ``[batch or 1, num_additional]``, the same on every rank.
        return_lse: also return the LSE, the logarithm of the sum of the scores' exponentials.

    Returns:
        This rank's ``[batch, *space, heads, value_dim]``; with ``return_lse`` also the LSE
        ``[batch, *space, heads]``. Both are differentiable; the loss is the sum of every rank's.

    Raises:
        ArgumentError: an argument has a type, shape, dtype, device or value that is not allowed, or
            ranks differ in what has to be the same.
        RuntimeError: another rank does not take part, within the process group's timeout.

    Example:
        >>> import tempfile, torch, torch.distributed as dist
        >>> store = dist.FileStore(tempfile.mktemp(), 1)
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> q, k, v = (torch.randn(1, 8, 8, 2, 16) for _ in range(3))
        >>> neighborhood_attention_generic(q, k, v, 3, mesh=mesh, shard={0: 0}).shape
        torch.Size([1, 8, 8, 2, 16])
        >>> dist.destroy_process_group()
    """
    if unknown:
        check_call("natten.distributed", GENERIC, (), unknown)
    query, key, value, additional_keys, additional_values = autocast_tensors(
        query, key, value, additional_keys, additional_values
    )
    inputs = Inputs(
        query, key, value, rpb, additional_keys, additional_values, key_mask, additional_mask
    )
    window = (kernel_size, stride, dilation, is_causal, boundary, queries_per_key)
    out, lse = attend_sharded(
        inputs, window, scale, backend, mesh, shard, sizes, method, return_lse
    )
    return out if lse is None or not return_lse else (out, lse)


GENERIC = signature_of(neighborhood_attention_generic)
neighborhood_attention_generic.__signature__ = GENERIC  # type: ignore[attr-defined]


_FUSED = """Fused {rank}-D neighborhood attention over a layout that is split over ranks.

    {arguments}
"""

na1d = of_rank(1, "na1d", neighborhood_attention_generic, _FUSED)
na2d = of_rank(2, "na2d", neighborhood_attention_generic, _FUSED)
na3d = of_rank(3, "na3d", neighborhood_attention_generic, _FUSED)

__getattr__ = getter(__name__)
