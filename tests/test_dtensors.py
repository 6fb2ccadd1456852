"""DTensors into the ordinary functions: the numbers of one device, on ranks of a gloo group."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import natten
from natten import VarlenLayout, attention, na1d, na2d

pytestmark = pytest.mark.xdist_group("distributed")

Tensors = dict[str, Tensor]
Placed = dict[str, Sequence[Placement]]
TOLERANCE = 1e-12  # of float64, relative to the largest number


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


# --- what runs on the ranks ---


def mesh_of(*shape: int) -> DeviceMesh | None:
    """A mesh of the first ranks; None on the others."""
    numbers = torch.arange(4)[: torch.Size(shape).numel()].reshape(shape)
    names = ("a", "b", "c")[: len(shape)]
    mesh = DeviceMesh("cpu", numbers, mesh_dim_names=names)
    return mesh if mesh.get_coordinate() is not None else None


def partial_of(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """``x``, of which every rank has a summand."""
    share = x * (1 + dist.get_rank()) / sum(1 + r for r in mesh.mesh.flatten().tolist())
    return DTensor.from_local(share, mesh, [Partial()] * mesh.ndim)


def placed(x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A leaf. Ranks have the same ``x``."""
    if any(p.is_partial() for p in placements):
        found = partial_of(x.detach(), mesh)
    else:
        found = distribute_tensor(x.detach(), mesh, placements)
    return found.detach().requires_grad_(x.requires_grad)


def assert_same(got: Tensor, want: Tensor, what: Any) -> None:
    error = (whole(got) - want).abs().nan_to_num(0.0).max().item() if want.numel() else 0.0
    same_infinities = torch.equal(whole(got).isinf(), want.isinf())
    scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 1.0
    assert whole(got).shape == want.shape and same_infinities, what
    assert error <= TOLERANCE * max(1.0, scale), (what, error)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(
    function: Callable[..., Any], tensors: Tensors, placements: Placed,
    mesh: DeviceMesh, is_placed_alike: bool = True, **options: Any,
) -> dict[str, DTensor]:  # fmt: skip
    """Check results and gradients of ``function(**tensors, **options)``; return the DTensors.

    The results are a tensor or several, and have the placements of the first tensor.
    """
    what = (
        mesh.mesh.shape,
        {name: (tuple(x.shape), placements[name]) for name, x in tensors.items()},
        options,
    )
    ours = {name: placed(x, mesh, placements[name]) for name, x in tensors.items()}
    wanted, found = function(**tensors, **options), function(**ours, **options)
    wanted, found = (x if isinstance(x, tuple) else (x,) for x in (wanted, found))
    first = tuple(
        Replicate() if p.is_partial() else p for p in next(iter(ours.values())).placements
    )
    losses = [torch.zeros((), dtype=torch.float64), 0.0]
    for got, want in zip(found, wanted):
        assert not is_placed_alike or got.placements == first, what
        assert_same(got, want, what)
        weight = torch.randn_like(want)
        losses[0] = losses[0] + (weight * want.nan_to_num(neginf=0.0)).sum()
        losses[1] = (
            losses[1] + (distribute_tensor(weight, mesh, first) * got.nan_to_num(neginf=0.0)).sum()
        )
    leaves = [name for name, x in tensors.items() if x.requires_grad]
    wanted_grads = torch.autograd.grad(losses[0], [tensors[name] for name in leaves])
    grads = torch.autograd.grad(losses[1].full_tensor(), [ours[name] for name in leaves])
    for name, got, want in zip(leaves, grads, wanted_grads):
        assert_same(got, want, (name, what))
    return dict(zip(leaves, grads))


def everywhere(tensors: Tensors, placements: Sequence[Placement]) -> Placed:
    return {name: placements for name in tensors}


def random_placements(
    draw: random.Random, mesh: DeviceMesh, dims: Sequence[int]
) -> list[Placement]:
    return [draw.choice([Replicate(), *map(Shard, dims)]) for _ in range(mesh.ndim)]


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def random_problem(draw: random.Random, mesh: DeviceMesh) -> None:
    """Check a random call of fused attention, with random placements."""
    rank = draw.choice([1, 2, 2, 3])
    batch, sizes = draw.choice([0, 1, 2, 3]), [draw.randint(5, 9) for _ in range(rank)]
    kv_heads = draw.choice([1, 2, 3, 4])
    heads = kv_heads * draw.choice([1, 1, 2, 4])
    every_rank_has_heads = -(-heads // mesh.size()) * (mesh.size() - 1) < heads
    splits = range(rank + 1 + every_rank_has_heads)
    query: list[Placement] = []
    for _ in range(mesh.ndim):  # an axis at most once
        taken = [p.dim for p in query if isinstance(p, Shard) and 0 < p.dim <= rank]
        query.append(draw.choice([Replicate(), *(Shard(d) for d in splits if d not in taken)]))
    if draw.random() < 0.1:
        query = [Partial()] * mesh.ndim
    border = [draw.choice(["shift", "truncate", "circular"]) for _ in range(rank)]
    kernel_size, stride, dilation, causal = [], [], [], []
    for n, name in zip(sizes, border):
        k = draw.randint(1, 4 if name != "truncate" else 12)
        kernel_size.append(k)
        dilation.append(draw.randint(1, max(1, n // k)))
        fits = [s for s in range(1, k + 1) if name != "circular" or n % (s * dilation[-1]) == 0]
        stride.append(draw.choice(fits or [1]))
        if not fits:
            dilation[-1] = 1
        causal.append(name != "circular" and draw.random() < 0.3)
    tensors = {
        "query": tensor(batch, *sizes, heads, 3),
        "key": tensor(batch, *sizes, kv_heads, 3),
        "value": tensor(batch, *sizes, kv_heads, 2),
    }
    placements = {"query": query}
    for name in ("key", "value"):
        placements[name] = (
            query if draw.random() < 0.5 else random_placements(draw, mesh, range(rank + 3))
        )
    if draw.random() < 0.4:
        tensors["rpb"] = tensor(heads, *(2 * k - 1 for k in kernel_size))
    if draw.random() < 0.4:
        for name, dim in (("additional_keys", 3), ("additional_values", 2)):
            tensors[name] = tensor(batch, 2, kv_heads, dim)
        if draw.random() < 0.5:
            tensors["additional_mask"] = torch.rand(draw.choice([1, batch]), 2) < 0.7
    if draw.random() < 0.4:
        tensors["key_mask"] = torch.rand(draw.choice([1, batch]), *sizes) < 0.7
    for name, x in tensors.items():
        placements.setdefault(name, random_placements(draw, mesh, range(x.dim())))
    compare(
        natten.neighborhood_attention_generic, tensors, placements, mesh, kernel_size=kernel_size,
        stride=stride, dilation=dilation, is_causal=causal, boundary=border, return_lse=True,
    )  # fmt: skip


def random_problems(shape: Sequence[int], seed: int, count: int) -> int:
    mesh, draw = mesh_of(*shape), random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(count):
        if mesh is not None:
            random_problem(draw, mesh)
    return count


@pytest.mark.parametrize(("shape", "count"), [((4,), 8), ((2, 2), 12), ((3,), 10), ((2,), 10)])
def test_random_placements(ranks: Pool, shape: tuple[int, ...], count: int) -> None:
    assert ranks(random_problems, shape, 0, count) == [count] * 4


def shared_heads_of_keys() -> None:
    """Ranks share heads of keys, of which they attend some, one, or parts of the groups."""
    mesh = mesh_of(2, 2)
    assert mesh is not None
    torch.manual_seed(0)
    for heads, kv_heads in ((8, 1), (8, 2), (6, 3)):
        tensors = {"query": tensor(2, 6, heads, 3), "rpb": tensor(heads, 5)}
        for name, n in (("key", 6), ("value", 6), ("additional_keys", 2), ("additional_values", 2)):
            tensors[name] = tensor(2, n, kv_heads, 3)
        for query in ([Shard(2), Shard(1)], [Shard(2), Shard(2)], [Shard(0), Shard(2)]):
            how = everywhere(tensors, [Replicate(), Shard(0)]) | {"query": query}
            compare(na1d, tensors, how, mesh, kernel_size=3)


# --- other functions ---


def plain_attention() -> None:
    mesh = mesh_of(2, 2)
    assert mesh is not None
    torch.manual_seed(0)
    for placements in ([Shard(0), Shard(1)], [Shard(1), Shard(2)], [Replicate(), Shard(1)]):
        for is_causal, queries, masked in ((False, 7, True), (True, 3, False), (True, 5, True)):
            tensors = {
                "query": tensor(2, queries, 4, 3),
                "key": tensor(2, 5 + 2 * (not is_causal), 2, 3),
            }
            tensors["value"] = tensor(*tensors["key"].shape[:-1], 2)
            if masked:
                tensors["key_mask"] = torch.rand(2, tensors["key"].shape[1]) < 0.7
            how = {name: placements for name in tensors} | {"key_mask": [Shard(1), Replicate()]}
            compare(attention, tensors, how, mesh, is_causal=is_causal, return_lse=True)
    # Sequences that are packed.
    tensors = {name: tensor(1, 9, 4, 3) for name in ("query", "key", "value")}
    how = everywhere(tensors, [Shard(2), Replicate()])
    lengths = torch.tensor([4, 5])
    packed = {"seqlens_Q": lengths, "seqlens_KV": lengths}
    compare(attention, tensors, how, mesh, return_lse=True, **packed)
    ours = [distribute_tensor(x, mesh, [Shard(1), Replicate()]) for x in tensors.values()]
    with pytest.raises(natten.ArgumentError, match="split over heads only"):
        attention(*ours, **packed)
    with pytest.raises(natten.ArgumentError, match="no more tokens than `key`"):
        attention(ours[0], ours[1][:, :4], ours[2][:, :4], is_causal=True)


def unfused_operators() -> None:
    mesh = mesh_of(2, 2)
    assert mesh is not None
    torch.manual_seed(0)
    for query in ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Shard(1), Shard(1)]):
        tensors = {"query": tensor(3, 4, 6, 5, 3), "key": tensor(3, 4, 6, 5, 3)}
        tensors |= {"rpb": tensor(4, 5, 5), "additional_keys": tensor(3, 4, 2, 3)}
        tensors |= {
            "key_mask": torch.rand(3, 6, 5) < 0.7,
            "additional_mask": torch.rand(1, 2) < 0.7,
        }
        how: Placed = everywhere(tensors, [Replicate(), Shard(0)])
        how |= {"query": query, "additional_mask": [Replicate()] * 2}
        compare(natten.na2d_qk, tensors, how, mesh, kernel_size=3)
        tensors = {"attn": tensor(3, 4, 6, 5, 11), "value": tensor(3, 4, 6, 5, 2)}
        tensors["additional_values"] = tensor(3, 4, 2, 2)
        how = everywhere(tensors, [Shard(2), Replicate()]) | {"attn": query}
        compare(natten.na2d_av, tensors, how, mesh, kernel_size=3)
    q = distribute_tensor(tensor(1, 2, 8, 3), mesh, [Shard(2), Replicate()])
    with pytest.raises(natten.ArgumentError, match=r"`query` must be placed by .*Shard\(1\)"):
        natten.na1d_qk(q, q, 3)


def documents() -> None:
    mesh = mesh_of(2, 2)
    assert mesh is not None
    torch.manual_seed(0)
    layout, lengths = VarlenLayout([(2, 3), (3, 2), (0, 4), (4, 3), (1, 1)]), [1, 0, 1, 2, 1]
    for query in ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Replicate(), Shard(0)]):
        tensors = {
            "query": tensor(25, 4, 3), "key": tensor(25, 2, 3), "value": tensor(25, 2, 2),
        }  # fmt: skip
        how: Placed = everywhere(tensors, query)
        if query[0] == Shard(0):
            assert layout.lengths[:2] == (6, 6)
            layout = VarlenLayout([(2, 3), (7, 1), (0, 4), (3, 4)])
            lengths = [1, 0, 1, 2]
        compare(
            natten.na2d_varlen, tensors, how, mesh, layout=layout, kernel_size=3, return_lse=True
        )
        tensors |= {"rpb": tensor(4, 5, 5), "key_mask": torch.rand(25) < 0.7}
        tensors |= {"additional_keys": tensor(4, 2, 3), "additional_values": tensor(4, 2, 2)}
        tensors["additional_mask"] = torch.rand(4) < 0.7
        for name in tensors:
            how.setdefault(name, [Replicate(), Shard(0)])
        compare(
            natten.na2d_varlen, tensors, how, mesh, layout=layout, kernel_size=3,
            additional_lengths=lengths, return_lse=True,
        )  # fmt: skip
    uneven = VarlenLayout([(4, 4), (3, 3)])
    x = distribute_tensor(tensor(25, 4, 3), mesh, [Shard(0), Replicate()])
    with pytest.raises(natten.ArgumentError, match="split between documents"):
        natten.na2d_varlen(x, x, x, uneven, 3)


@pytest.mark.parametrize(
    "function", [shared_heads_of_keys, plain_attention, unfused_operators, documents]
)
def test_other_functions(ranks: Pool, function: Callable[[], None]) -> None:
    ranks(function)


# --- layers, and what is built around them ---


def layers() -> None:
    line, square = mesh_of(4), mesh_of(2, 2)
    assert line is not None and square is not None
    check_layer(square, [Shard(1), Shard(2)], rel_pos_bias=True, oversize="clamp")
    check_layer(line, [Shard(1)], is_causal=(True, False), stride=2, boundary=("shift", "truncate"))
    check_layer(line, [Shard(2)], kernel_size=9, dilation=1, oversize="pad", pad_mask=True)
    check_layer(line, [Shard(0)], attn_drop=1e-300)  # which drops nothing


def check_layer(mesh: DeviceMesh, placements: Sequence[Placement], **options: Any) -> None:
    torch.manual_seed(0)
    defaults = {"embed_dim": 8, "num_heads": 4, "kernel_size": 3, "dilation": 2}
    layer = natten.NeighborhoodAttention2D(**defaults | options).double()
    ours = distribute_module(copy.deepcopy(layer), mesh)
    tensors = {"x": tensor(4, 8, 8, 8)}
    if mesh.ndim == 1:  # on more dimensions DTensor's planning takes long
        tensors["additional_tokens"] = tensor(4, 3, 8)
    if "pad_mask" not in options:  # with which the layer makes the mask
        tensors["key_mask"] = torch.rand(1, 8, 8) < 0.7
    how = {"x": placements, "additional_tokens": [Replicate()]}
    how["key_mask"] = [Shard(2), *placements[1:]]

    def call(x: Tensor, **kwargs: Tensor) -> Tensor:
        return (ours if isinstance(x, DTensor) else layer)(x, **kwargs)

    # DTensor gathers axes that are padded.
    compare(call, tensors, how, mesh, is_placed_alike="pad_mask" not in options)
    layer(**tensors).square().sum().backward()
    split = {name: placed(x, mesh, how[name]) for name, x in tensors.items()}
    ours(**split).square().sum().full_tensor().backward()
    for (name, p), own in zip(layer.named_parameters(), ours.parameters()):
        assert_same(own.grad, p.grad, (options, name))
    if placements == [Shard(0)]:
        weights = layer.attention_weights(tensors["x"])
        assert_same(ours.attention_weights(split["x"]), weights, "attention_weights")


def weights_over_tokens() -> None:
    mesh = mesh_of(4)
    assert mesh is not None
    layer = natten.NeighborhoodAttention1D(8, 4, kernel_size=3, attn_drop=0.5)
    distribute_module(layer, mesh)
    with pytest.raises(natten.ArgumentError, match=r"`query` must be placed by .* redistribute it"):
        layer(distribute_tensor(torch.randn(2, 8, 8), mesh, [Shard(1)]))


def a_layer_and_its_gradients(batch: int) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A layer, inputs, and the gradients of the mean over the batch of a loss."""
    torch.manual_seed(0)
    layer = natten.NeighborhoodAttention2D(8, 2, kernel_size=3, rel_pos_bias=True).double()
    x = torch.randn(batch, 8, 6, 8, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters())
    grads = torch.autograd.grad(layer(x).square().sum() / batch, parameters)
    return layer, x, dict(zip(names, grads))


class OnDTensors(nn.Module):
    """A layer whose parameters are plain, for inputs that are split over a mesh."""

    def __init__(self, layer: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.layer, self.mesh = layer, mesh

    def forward(self, x: DTensor) -> Tensor:
        parameters = {
            name: DTensor.from_local(p, self.mesh, [Replicate()])
            for name, p in self.layer.named_parameters()
        }
        return torch.func.functional_call(self.layer, parameters, (x,))


def data_parallel() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "space"))
    layer, x, wanted = a_layer_and_its_gradients(2)
    own = x.chunk(2)[mesh.get_local_rank("data")]
    model = nn.parallel.DistributedDataParallel(
        OnDTensors(layer, mesh["space"]), process_group=mesh.get_group("data")
    )
    out = model(distribute_tensor(own, mesh["space"], [Shard(1)]))
    out.square().sum().full_tensor().backward()
    for name, p in layer.named_parameters():
        assert_same(p.grad, wanted[name], name)


def fully_sharded() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "space"))
    layer, x, wanted = a_layer_and_its_gradients(2)
    own = x.chunk(2)[mesh.get_local_rank("data")]
    fully_shard(distribute_module(layer, mesh["space"]), mesh=mesh["data"])
    out = layer(distribute_tensor(own, mesh["space"], [Shard(2)]))
    out.square().sum().full_tensor().backward()
    for name, p in layer.named_parameters():
        assert_same(p.grad, wanted[name], name)


class Block(nn.Module):
    """Attention whose projections may be split over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8).double() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (4, 2)) for linear in (self.q, self.k, self.v))
        return self.out(na2d(q, k, v, 3).flatten(-2))


def tensor_parallel() -> None:
    mesh = mesh_of(4)
    assert mesh is not None
    torch.manual_seed(0)
    plain, x = Block(), torch.randn(2, 5, 6, 8, dtype=torch.float64)
    plain(x).square().sum().backward()
    split, column = copy.deepcopy(plain), ColwiseParallel(use_local_output=False)
    plan = {"q": column, "k": column, "v": column, "out": RowwiseParallel()}
    parallelize_module(split, mesh, plan)
    split(x).square().sum().backward()
    for (name, p), own in zip(plain.named_parameters(), split.parameters()):
        assert_same(own.grad, p.grad, name)
    # The layer's one projection to query, key and value is gathered, because heads lie across it.
    layer, x, wanted = a_layer_and_its_gradients(2)
    pairs = mesh_of(2)
    if pairs is None:
        return
    gathered = ColwiseParallel(output_layouts=Replicate(), use_local_output=False)
    parallelize_module(layer, pairs, {"qkv": gathered, "proj": RowwiseParallel()})
    layer.rpb = nn.Parameter(distribute_tensor(layer.rpb, pairs, [Replicate()]))
    (layer(x).square().sum() / 2).backward()
    for name, p in layer.named_parameters():
        assert_same(p.grad, wanted[name], name)


def checkpointed() -> None:
    mesh = mesh_of(4)
    assert mesh is not None
    torch.manual_seed(0)
    tensors = {name: tensor(2, 9, 6, 4, 4) for name in ("query", "key", "value")}

    def call(**tensors: Tensor) -> Tensor:
        return checkpoint(lambda: na2d(**tensors, kernel_size=3, dilation=2), use_reentrant=False)

    compare(call, tensors, everywhere(tensors, [Shard(1)]), mesh)
    compare(call, tensors, everywhere(tensors, [Shard(3)]) | {"key": [Shard(0)]}, mesh)


def twice_differentiated() -> None:
    mesh = mesh_of(2, 2)
    assert mesh is not None
    torch.manual_seed(0)
    tensors = {name: tensor(2, 6, 4, 4, 3) for name in ("query", "key", "value")}
    tensors["rpb"] = tensor(4, 5, 5)

    def call(**tensors: Tensor) -> Tensor:
        out = na2d(**tensors, kernel_size=3)
        (grad,) = torch.autograd.grad(out.square().sum(), tensors["query"], create_graph=True)
        return grad

    for query in ([Shard(0), Shard(3)], [Shard(1), Shard(2)]):
        how = everywhere(tensors, query) | {"rpb": [Replicate()] * 2}
        compare(call, tensors, how, mesh)


def under_autocast() -> None:
    mesh = mesh_of(2, 2)
    assert mesh is not None
    q, k, v = torch.randn(3, 2, 6, 8, 4, 3).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = na2d(q, k, v, 3)
        for placements in ([Shard(0), Shard(3)], [Shard(1), Shard(2)]):
            found = na2d(*(distribute_tensor(x, mesh, placements) for x in (q, k, v)), 3)
            assert found.dtype == wanted.dtype == torch.bfloat16
            torch.testing.assert_close(found.full_tensor(), wanted)


def compiled() -> None:
    mesh = mesh_of(4)
    assert mesh is not None
    torch.manual_seed(0)

    def call(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        return na2d(**tensors, kernel_size=3, return_lse=True)

    for placement, fullgraph in ((Shard(0), True), (Shard(3), True), (Shard(1), False)):
        tensors = {"query": tensor(5, 6, 4, 4, 3), "key": tensor(5, 6, 4, 2, 3)}
        tensors |= {"value": tensor(5, 6, 4, 2, 3), "rpb": tensor(4, 5, 5)}
        tensors["key_mask"] = torch.rand(5, 6, 4) < 0.7
        how = everywhere(tensors, [placement]) | {"rpb": [Replicate()], "key_mask": [Shard(0)]}
        torch._dynamo.reset()
        function = torch.compile(call, fullgraph=fullgraph, backend="aot_eager")
        compare(function, tensors, how, mesh)


@pytest.mark.parametrize(
    "function",
    [
        layers, weights_over_tokens, data_parallel, fully_sharded, tensor_parallel, checkpointed,
        twice_differentiated, under_autocast, compiled,
    ],
)  # fmt: skip
def test_layers_and_programs(ranks: Pool, function: Callable[[], None]) -> None:
    ranks(function)


# --- mistakes ---


def mistakes() -> None:
    mesh = mesh_of(4)
    assert mesh is not None
    x = torch.randn(2, 8, 6, 4, 3)
    d = distribute_tensor(x, mesh, [Shard(1)])
    refused = functools.partial(pytest.raises, natten.ArgumentError)
    with refused(match="`key` must be a DTensor, because `query` is one.*distribute_tensor"):
        na2d(d, x, d, 3)
    with refused(match="`query` must be a DTensor, because `value` is one"):
        na2d(x, x, d, 3)
    with refused(match="`key_mask` must be a DTensor"):
        na2d(d, d, d, 3, key_mask=torch.ones(1, 8, 6, dtype=torch.bool))
    with refused(match="`rpb` must be a DTensor"):
        na2d(d, d, d, 3, rpb=torch.randn(4, 5, 5))
    with refused(match=r"placed by Replicate, Partial, Shard\(0\), .*got .*dim=4"):
        na2d(*[distribute_tensor(x, mesh, [Shard(4)])] * 3, 3)
    with refused(match="heads for each of the ranks"):
        na2d(*[distribute_tensor(x[..., :2, :], mesh, [Shard(3)])] * 3, 3)
    with refused(match="`query_offset` must be None where tokens are split"):
        na2d(d, d, d, 3, query_offset=0)
    with refused(match="must not exceed the input"):  # whole layouts, in words of the call
        na2d(d, d, d, 9)
    fine = distribute_tensor(torch.randn(2, 18, 6, 4, 3), mesh, [Shard(1)])
    coarse = distribute_tensor(torch.randn(2, 9, 6, 4, 3), mesh, [Shard(1)])
    with refused(match=r"torch.chunk splits 18 = 2 \* 9 tokens"):
        na2d(fine, coarse, coarse, 3, queries_per_key=(2, 1))
    square = mesh_of(2, 2)
    assert square is not None
    with refused(match="an axis of tokens by one dimension of the mesh"):
        na2d(*[distribute_tensor(x, square, [Shard(1), Shard(1)])] * 3, 3)
    other = distribute_tensor(x, square, [Replicate(), Replicate()])
    with refused(match="`value` must have the mesh of `query`"):
        na2d(d, d, other, 3)
    three = mesh_of(3)  # a group of its own, which has agreed about nothing yet
    if three is None:
        return
    own = x[:, : (3, 4, 1)[dist.get_rank()]]  # where DTensor's rule gives 3, 3 and 2
    uneven = DTensor.from_local(own, three, [Shard(1)], shape=x.shape, stride=x.stride())
    with refused(match="must be split as torch.chunk splits|rank 1 of the group says"):
        na2d(uneven, uneven, uneven, 3)


def test_mistakes(ranks: Pool) -> None:
    ranks(mistakes)
