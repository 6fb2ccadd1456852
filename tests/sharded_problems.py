"""Problems of layouts that are split over ranks, drawn at random, and their check.

Each rank computes the whole problem by the ordinary operator, and its own part of it by
`natten.distributed`; output, LSE and all gradients have to agree.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import natten
from natten import distributed

TENSORS = ("query", "key", "value", "rpb", "additional_keys", "additional_values")


@dataclass
class Sharded:
    """A problem: the keys' layout, the window, and what splits which axis.

    `sizes` has the keys of each rank for every axis of `shard`; `even` axes are not told.
    """

    shape: tuple[int, ...]
    window: dict[str, Any]
    shard: dict[int, int]
    sizes: dict[int, tuple[int, ...]]
    method: str = "halo"
    batch: int = 1
    heads: int = 2
    heads_kv: int = 2
    head_dim: int = 4
    value_dim: int = 4
    additional: int = 0
    has_bias: bool = False
    is_masked: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float64
    even: frozenset[int] = field(default_factory=frozenset)

    @property
    def fine(self) -> tuple[int, ...]:
        r = self.window.get("queries_per_key", 1)
        return (r,) * len(self.shape) if isinstance(r, int) else tuple(r)

    def tensors(self, device: str | torch.device) -> dict[str, Tensor | None]:
        """All tensors of the whole layout, the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return x.to(device, self.dtype).requires_grad_()

        def mask(*shape: int) -> Tensor:
            return (torch.rand(shape, generator=generator) < 0.8).to(device)

        n, h, d, dv = self.batch, self.heads_kv, self.head_dim, self.value_dim
        queries = (r * length for r, length in zip(self.fine, self.shape))
        k = self.window["kernel_size"]
        k = (k,) * len(self.shape) if isinstance(k, int) else k
        more = self.additional
        return {
            "query": randn(n, *queries, self.heads, d),
            "key": randn(n, *self.shape, h, d),
            "value": randn(n, *self.shape, h, dv),
            "rpb": randn(self.heads, *(2 * x - 1 for x in k)) if self.has_bias else None,
            "additional_keys": randn(n, more, h, d) if more else None,
            "additional_values": randn(n, more, h, dv) if more else None,
            "key_mask": mask(n, *self.shape) if self.is_masked else None,
            "additional_mask": mask(1, more) if self.is_masked and more else None,
        }

    def part(self, mesh: DeviceMesh, r: int | tuple[int, ...] = 1) -> tuple[slice, ...]:
        """This rank's tokens of `[batch, *space, ...]` that is `r` times as fine as keys."""
        r = (r,) * len(self.shape) if isinstance(r, int) else r
        found = [slice(None)] * (1 + len(self.shape))
        for axis, dim in self.shard.items():
            me = mesh.get_local_rank(dim)
            ends = (0, *accumulate(self.sizes[axis]))
            found[1 + axis] = slice(r[axis] * ends[me], r[axis] * ends[me + 1])
        return tuple(found)

    def local(self, mesh: DeviceMesh, tensors: dict[str, Tensor | None]) -> dict[str, Any]:
        """This rank's own tensors."""
        found: dict[str, Any] = {}
        for name, x in tensors.items():
            if x is not None and name in ("query", "key", "value", "key_mask"):
                x = x.detach()[self.part(mesh, self.fine if name == "query" else 1)]
            found[name] = None if x is None else x.detach().clone()
            if name in TENSORS and x is not None:
                found[name].requires_grad_()
        return found

    def run(self, mesh: DeviceMesh, local: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Output and LSE of this rank."""
        sizes = {a: n for a, n in self.sizes.items() if a not in self.even} or None
        return getattr(distributed, f"na{len(self.shape)}d")(
            **local, **self.window, mesh=mesh, shard=self.shard, sizes=sizes, method=self.method,
            return_lse=True,
        )  # fmt: skip


def loss_of(out: Tensor, lse: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """A sum of everything with random factors; the LSE of a query without keys does not count."""
    finite = lse.masked_fill(lse.isinf(), 0)
    return (out * weights[0]).sum() + (finite * weights[1]).sum()


def errors(problem: Sharded, mesh: DeviceMesh, device: str | torch.device = "cpu") -> dict:
    """The largest difference of this rank's numbers from the whole problem's, by name.

    It is divided by the largest number there is, where that exceeds 1.
    """
    whole = problem.tensors(device)
    out, lse = getattr(natten, f"na{len(problem.shape)}d")(
        **whole, **problem.window, return_lse=True
    )
    weights = torch.randn_like(out), torch.randn_like(lse)
    for w in weights:  # the same on every rank
        w.copy_(torch.rand(w.shape, generator=torch.Generator().manual_seed(7)).to(w) - 0.5)
    loss_of(out, lse, weights).backward()
    local = problem.local(mesh, whole)
    own_out, own_lse = problem.run(mesh, local)
    queries = problem.part(mesh, problem.fine)
    loss_of(own_out, own_lse, (weights[0][queries], weights[1][queries])).backward()
    pairs = {"out": (own_out, out[queries]), "lse": (own_lse, lse[queries])}
    for name in TENSORS:
        x = whole[name]
        if x is not None:
            part = {"query": queries, "key": problem.part(mesh), "value": problem.part(mesh)}
            assert x.grad is not None
            pairs[f"grad of {name}"] = local[name].grad, x.grad[part.get(name, ())]
    return {name: _difference(*pair) for name, pair in pairs.items()}


def _difference(a: Tensor | None, b: Tensor) -> float:
    assert a is not None and a.shape == b.shape and a.dtype == b.dtype
    if b.numel() == 0:
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    difference = torch.where(a == b, 0.0, a - b).abs()  # both may be -inf
    return float(difference.max() / b.masked_fill(b.isinf(), 0).abs().max().clamp(min=1))


def draw(seed: int, mesh_sizes: tuple[int, ...], **fixed: Any) -> Sharded:
    """A problem whose axes are split over a mesh of these sizes."""
    rng = random.Random(seed)
    rank = rng.randint(len(mesh_sizes), 3)
    window: dict[str, list[Any]] = {
        name: []
        for name in (
            "kernel_size",
            "stride",
            "dilation",
            "is_causal",
            "boundary",
            "queries_per_key",
        )
    }
    shape = []
    for _ in range(rank):
        boundary = rng.choice(["shift", "shift", "truncate", "circular"])
        k = rng.randint(1, 9 if rank == 1 else 5)
        s = rng.randint(1, k) if rng.random() < 0.4 else 1
        d = rng.choice([1, 1, 2, 3] if rank < 3 else [1, 1, 2])
        more = {1: 30, 2: 9, 3: 4}[rank]
        if boundary == "circular":
            runs = -(-k // s)
            length = s * d * rng.randint(runs, runs + more // (s * d) + 1)
        elif boundary == "truncate":
            length = rng.randint(1, more + 5)
        else:
            length = rng.randint(k * d, k * d + more)
        causal = boundary != "circular" and rng.random() < 0.3
        fine = rng.choice([1, 1, 1, 2])
        for entries, entry in zip(window.values(), (k, s, d, causal, boundary, fine)):
            entries.append(entry)
        shape.append(length)
    axes = rng.sample(range(rank), len(mesh_sizes))
    sizes, even = {}, set()
    for axis, count in zip(axes, mesh_sizes):
        length = shape[axis]
        if length % count == 0 and rng.random() < 0.4:
            sizes[axis] = (length // count,) * count
            even.add(axis)
        else:
            cuts = sorted(rng.randint(0, length) for _ in range(count - 1))
            sizes[axis] = tuple(b - a for a, b in zip([0, *cuts], [*cuts, length]))
    heads_kv, ranks = rng.choice([1, 2, 4]), 1
    for count in mesh_sizes:
        ranks *= count
    methods = ["halo", "halo", "auto", "heads"] if heads_kv % ranks == 0 else ["halo", "auto"]
    problem: dict[str, Any] = dict(
        method=rng.choice(methods),
        batch=rng.choice([0, 1, 2]),
        heads=heads_kv * rng.choice([1, 2]),
        heads_kv=heads_kv,
        head_dim=rng.choice([2, 3]),
        value_dim=rng.choice([2, 4]),
        additional=rng.choice([0, 0, 3]),
        has_bias=rng.random() < 0.4,
        is_masked=rng.random() < 0.4,
        seed=seed,
    )
    return Sharded(
        tuple(shape), {name: tuple(entries) for name, entries in window.items()},
        dict(zip(axes, range(rank))), sizes, even=frozenset(even), **{**problem, **fixed},
    )  # fmt: skip
