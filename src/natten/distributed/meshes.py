"""The ranks of a device mesh over which a layout is split."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .shards import Coordinates


class Ranks(NamedTuple):
    """The ranks over which a layout is split.

    Attributes:
        mesh, dim: the dimension of a mesh along which they lie.
        coordinates: of each of them, in the order of the group: where it is along each mesh
            dimension that was asked for.
    """

    mesh: DeviceMesh
    dim: int
    coordinates: tuple[Coordinates, ...]

    @property
    def group(self) -> dist.ProcessGroup:
        """Their process group, which is not kept, so that it ends when the program ends it."""
        return self.mesh.get_group(self.dim)


@lru_cache(maxsize=64)
def ranks_of(mesh: DeviceMesh, dims: tuple[int, ...]) -> Ranks:
    """The ranks that differ from this one in some dimensions of a mesh.

    Several dimensions together get a group of their own the first time, which every rank of the
    mesh has to ask for.
    """
    sizes = [mesh.size(dim) for dim in dims]
    others = [dim for dim in range(mesh.ndim) if dim not in dims]
    rows = mesh.mesh.permute(*others, *dims).reshape(-1, math.prod(sizes))
    found, dim = mesh, dims[0]
    if len(dims) > 1:
        found, dim = DeviceMesh(mesh.device_type, rows), 1
    (row,) = [row for row in rows.tolist() if dist.get_rank() in row]
    coordinates = []
    for rank in dist.get_process_group_ranks(found.get_group(dim)):
        at = torch.unravel_index(torch.tensor(row.index(rank)), sizes)
        coordinates.append(tuple(int(i) for i in at))
    return Ranks(found, dim, tuple(coordinates))
